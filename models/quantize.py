"""Models with quantised weights: rounded while they are loaded, or written to a folder and loaded from there.

- the attention and MLP layers of the blocks are quantised; embedding, norms and head keep the model's dtype (an
  inference copy on the CPU has an int8 head: models/decode.py)
- one matrix is in memory at a time, never the whole model
- a folder (scripts/quantize.py writes it) holds what --quantize computes, to the bit; or int4 that was chosen with more
  care (models/gptq.py)
- with tensor parallelism a rank has its part of the integers and of their scales, those of the whole weight
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.checkpoint import WeightFiles, fill_parameters, model_config
from models.common import flag, short_bar
from models.model import FUSIONS, Block, ModelConfig, RowLinear, Transformer, is_quantized, read_hf_config
from models.qlinear import GROUP_SIZES, MODES, Quantized, QuantizedLinear, Scheme, quantize
from models.tp import Parallel, shard_dim, size_of, tensor_parallel_part


@dataclass(frozen=True, kw_only=True)
class GroupSizeArgs:
    """The scales of int4."""

    group_size: int | None = flag(None, choices=GROUP_SIZES, help="int4: weights that share a scale; 128")


@dataclass(frozen=True, kw_only=True)
class QuantizeArgs(GroupSizeArgs):
    """Weights in few bits, of a model that is not trained."""

    quantize: str = flag(
        "none",
        choices=("none", *MODES),
        help="round the weights of the blocks while loading, and for text on a CPU in bfloat16 the head to int8; "
        "fp8 needs a Hopper GPU. A folder that scripts/quantize.py wrote is run as it is stored",
    )


LINEARS = tuple(name for _, names, _ in FUSIONS for name in names)  # the layers of a block that are quantised


def check_scheme(scheme: Scheme, config: ModelConfig, device: torch.device, dtype: torch.dtype, tp_size: int) -> None:
    """Raises ValueError if a model cannot be quantised so, cut over so many ranks, or computed on this device."""
    if scheme.mode == "int4":
        if scheme.group_size not in GROUP_SIZES:
            raise ValueError(
                f"groups of {scheme.group_size} are not supported, only {', '.join(map(str, GROUP_SIZES))}"
            )
        # what is cut over ranks is the input of o_proj and down_proj
        _check_groups("hidden_size", config.hidden_size, 1, scheme.group_size)
        _check_groups("heads x head_dim", config.num_attention_heads * config.head_dim, tp_size, scheme.group_size)
        _check_groups("intermediate_size", config.intermediate_size, tp_size, scheme.group_size)
    if scheme.mode == "fp8":
        if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
            raise ValueError("fp8 needs an NVIDIA GPU of compute capability 9.0 (Hopper) or later; take int8 or int4")
        if dtype != torch.bfloat16:
            raise ValueError("fp8 computes in bfloat16: give --dtype bfloat16")


def _check_groups(what: str, size: int, parts: int, group_size: int) -> None:
    if size % (parts * group_size):
        share = f" / {parts} ranks" if parts > 1 else ""
        fitting = [g for g in GROUP_SIZES if size % (parts * g) == 0]
        advice = f"groups of {fitting[-1]} are possible" if fitting else "take int8"
        raise ValueError(f"int4: {what} {size}{share} is not divisible by groups of {group_size}; {advice}")


def stored_scheme(folder: str | Path) -> Scheme | None:
    """The scheme of a folder with quantised weights, None for any other. Raises ValueError for a broken one."""
    config, where = read_hf_config(folder)
    if not is_quantized(config):  # another format is refused by ModelConfig.from_hf
        return None
    stored = config["quantization_config"]
    mode, group_size = stored.get("mode"), stored.get("group_size", 128)
    if mode not in ("int8", "int4") or group_size not in GROUP_SIZES:
        raise ValueError(f"{where}: quantization_config has mode {mode!r} and group_size {group_size!r}; it is broken")
    return Scheme(mode, group_size)


def choose_scheme(
    folder: str | Path, mode: str, group_size: int | None = None, flag: str = "--quantize"
) -> Scheme | None:
    """How to run the model of a folder: as it is stored, or quantised as the flags say (mode none: not at all;
    group_size None: 128). Raises ValueError if it is stored in another way than they say."""
    stored = stored_scheme(folder)
    if group_size is not None and mode != "int4":
        raise ValueError(f"--group_size is for {flag} int4, not for {mode}")
    if mode == "none":
        return stored
    if stored is None:
        return Scheme(mode, group_size or 128)
    if mode != stored.mode or (group_size or stored.group_size) != stored.group_size:
        raise ValueError(f"{flag} {mode}: {folder} holds {stored} already; leave the flag out")
    return stored


def quantize_block(
    block: Block,
    prefix: str,
    weight_of: Callable[[str], Quantized],
    bias_of: Callable[[str], Tensor],
    scheme: Scheme,
    dtype: torch.dtype,
) -> None:
    """Puts quantised products in the place of a block's linear layers. weight_of and bias_of give this rank's part of a
    parameter by its name, which begins with the prefix; dtype is that of the activations."""

    def product_of(names: list[str]) -> QuantizedLinear:
        first = block.get_submodule(names[0])
        weights = [weight_of(f"{prefix}{name}.weight") for name in names]
        biases = None if first.bias is None else [bias_of(f"{prefix}{name}.bias") for name in names]
        parallel = first.parallel if isinstance(first, RowLinear) else Parallel()
        return QuantizedLinear(weights, biases, scheme, dtype, parallel)

    block.fuse(product_of)


@torch.no_grad()
def quantize_in_place(block: Block, scheme: Scheme) -> None:
    """Quantises a block that is in memory, whole, by rounding; the activations will have the dtype of its weights."""
    get, dtype = block.get_parameter, block.input_layernorm.weight.dtype
    quantize_block(block, "", lambda name: quantize(get(name), scheme), lambda name: get(name).detach(), scheme, dtype)


# A folder with quantised weights has for each "NAME.weight" the integers, one in a byte, as "NAME.weight_int8" or
# "NAME.weight_int4", with "NAME.weight_scale" and, of int4, "NAME.weight_zero". A reader that does not know the format
# finds no weights; and transformers stops at a quantization_config without quant_method (one with a name that it does
# not know it only warns of).


def stored_names(name: str, scheme: Scheme) -> list[str]:
    """The tensors of a file that hold the quantised weight `name`, in the order of Quantized."""
    return [f"{name}_{kind}" for kind in (scheme.mode, "scale", *["zero"] * (scheme.mode == "int4"))]


def is_linear_weight(name: str) -> bool:
    """Whether a parameter of a plain model is one that is quantised."""
    layer, _, kind = name.rpartition(".")
    return kind == "weight" and layer.rpartition(".")[2] in LINEARS


def stored_shapes(shapes: dict[str, tuple[int, ...]], scheme: Scheme) -> dict[str, tuple[int, ...]]:
    """The tensors of a folder with quantised weights, from the parameters of the model."""
    stored = {}
    for name, shape in shapes.items():
        if is_linear_weight(name):
            values, *scales = stored_names(name, scheme)
            num_groups = shape[1] // scheme.group_size if scheme.mode == "int4" else 1
            stored |= {values: shape, **dict.fromkeys(scales, (shape[0], num_groups))}
        else:
            stored[name] = shape
    return stored


def _slices(cut: tuple[slice, slice], scheme: Scheme) -> list[tuple[slice, slice]]:
    """The parts of a quantised weight's tensors that belong to a part of the weight."""
    rows, columns = cut
    if scheme.mode != "int4":
        return [cut, (rows, slice(0, 1))]
    groups = slice(columns.start // scheme.group_size, columns.stop // scheme.group_size)
    return [cut, (rows, groups), (rows, groups)]


def quantize_file(
    files: WeightFiles, name: str, slices: tuple[slice, ...], scheme: Scheme, device: torch.device
) -> Quantized:
    """quantize() of a weight in a folder, or of a part of it, from the numbers in the file."""
    try:
        return quantize(files.read(name, slices).to(device), scheme)
    except ValueError as error:
        raise ValueError(f"{files.folder}: {name}: {error}") from None


@torch.no_grad()
def load_quantized(
    folder: str | Path,
    scheme: Scheme,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tp: DeviceMesh | None = None,
    head: str = "lm",
) -> Transformer:
    """The model of a Hugging Face folder, or this tp rank's part of it, with quantised blocks, frozen.

    A folder with quantised weights must hold this scheme; any other is quantised by rounding while it is read, from
    the numbers in the files. dtype: of everything else and of the activations. head: "lm" or "score". Raises what
    load_model and check_scheme do.
    """
    config, files = model_config(folder), WeightFiles(folder)
    check_scheme(scheme, config, device, dtype, size_of(tp))
    is_stored = is_quantized(read_hf_config(folder)[0])
    with torch.device("meta"):
        model = Transformer(config, dtype, Parallel(tp), head)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = stored_shapes(shapes, scheme) if is_stored else shapes
    files.check(expected, allowed=["lm_head.weight"] if config.tie_word_embeddings else [])

    def weight_of(name: str) -> Quantized:
        cut = tensor_parallel_part(name, shapes[name], tp)
        if is_stored:
            names = stored_names(name, scheme)
            weight = Quantized(*(files.read(each, s).to(device) for each, s in zip(names, _slices(cut, scheme))))
            dtypes = [part.dtype for part in weight if part is not None]
            wanted = [torch.int8 if scheme.mode == "int8" else torch.uint8, *[torch.bfloat16] * len(dtypes[1:])]
            if dtypes != wanted:
                raise ValueError(f"{folder}: {names[0]} must be {wanted[0]} and its scales bfloat16; it is broken")
            return weight
        # of a row-parallel layer every rank reads the whole, since a scale may be that of a whole row
        rows = cut[:1] if shard_dim(name) == 0 else ()
        whole = quantize_file(files, name, rows, scheme, device)
        return whole if rows else Quantized(*(t[s] for t, s in zip(whole, _slices(cut, scheme)) if t is not None))

    def bias_of(name: str) -> Tensor:
        return files.read(name, tensor_parallel_part(name, shapes[name], tp))

    for i, block in enumerate(short_bar(model.layers, "loading", "block")):
        quantize_block(block, f"layers.{i}.", weight_of, bias_of, scheme, dtype)
    fill_parameters(model, files, device=device, dtype=dtype, part_of=partial(tensor_parallel_part, tp=tp))
    return model.requires_grad_(False).eval()


def rounded_tensors(files: WeightFiles, scheme: Scheme, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the blocks of a folder with quantised weights, (name, tensor), one weight in memory at a time."""
    for name in short_bar([name for name in files.names() if name.startswith("layers.")], "rounding", "tensor"):
        if is_linear_weight(name):
            yield from zip(stored_names(name, scheme), quantize_file(files, name, (), scheme, device))
        else:
            yield name, files.read(name)
