"""Models with quantised weights: rounded while they are loaded, or loaded from a folder of quantised weights.

- the attention and MLP layers of the blocks are quantised; embedding, norms and head keep the model's dtype (an
  inference copy on the CPU has an int8 head: models/decode.py)
- one matrix is in memory at a time, never the whole model
- such a folder (scripts/quantize.py writes it, in the layout of models/compressed.py) holds the weights that --quantize
  computes, to the bit, or int4 chosen on calibration data (models/gptq.py), or what other tools wrote in that layout
- with tensor parallelism a rank holds its part of the integers and scales of the whole weight
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.checkpoint import WeightFiles, fill_parameters, model_config
from models.checksums import check_weights
from models.common import Runtime, flag, is_main_rank, short_bar
from models.compressed import (
    LINEARS,
    columns_of,
    is_linear_weight,
    linear_layers,
    packed_tensors,
    read_packed,
    read_scheme,
    stored_shapes,
)
from models.config import ModelConfig, is_quantized, read_hf_config
from models.model import Block, RowLinear, Transformer
from models.qlinear import GROUP_SIZES, MODES, MixedScheme, Quantized, QuantizedLinear, Scheme, Schemes, quantize
from models.tp import Parallel, shard_dim, size_of, tensor_parallel_part

DEFAULT_GROUP = 128


@dataclass(frozen=True, kw_only=True)
class GroupSizeArgs:
    """The scales of int4."""

    group_size: int | None = flag(
        None, choices=GROUP_SIZES, help="int4: weights that share a scale; unset: the most up to 128 that fit the model"
    )


@dataclass(frozen=True, kw_only=True)
class QuantizeArgs(GroupSizeArgs):
    """Quantised weights of a model that is not trained."""

    quantize: str = flag(
        "none",
        choices=("none", *MODES),
        help="round the weights of the blocks while loading; text generation on a CPU in bfloat16 also rounds the head "
        "to int8; fp8 needs a Hopper GPU. A folder with quantised weights is run as it is stored",
    )


def check_scheme(
    scheme: Schemes,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    tp_size: int,
    *,
    is_stored: bool = False,
    named: str = "",
) -> None:
    """Raises ValueError if a model sharded over tp_size ranks cannot be quantised so, or cannot run on this device.
    is_stored: a folder holds the model in this scheme. named: what the error begins with, the folder and the flag that
    ask for the scheme ("checkpoints/x: --quantize ")."""
    if isinstance(scheme, Scheme) and scheme.mode == "fp8":
        if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
            hopper = "an NVIDIA GPU of compute capability 9.0 (Hopper) or later"
            raise ValueError(f"{named}fp8 needs {hopper}; take int8 or int4")
        if dtype != torch.bfloat16:
            raise ValueError(f"{named}fp8 computes in bfloat16: give --dtype bfloat16")
    by_kind = _inputs(config, tp_size)
    layers = [(scheme.of(name), by_kind[name.rpartition(".")[2]]) for name in linear_layers(config.num_hidden_layers)]
    grouped = [(each, inputs) for each, inputs in layers if each.group_size is not None]
    for each, (key, size, parts) in grouped:
        if size % (parts * each.group_size):
            fitting = [group for group in GROUP_SIZES if all(n % (cut * group) == 0 for _, (_, n, cut) in grouped)]
            advice = f"groups of {fitting[-1]} are possible" if fitting else "take int8"
            if is_stored:
                smaller = f" or quantise the original again in groups of {fitting[-1]}" if fitting else ""
                advice = f"take fewer ranks{smaller}"
            share = _share(key, size, parts)
            raise ValueError(f"{named}{each.mode}: {share} is not divisible by groups of {each.group_size}; {advice}")


def _inputs(config: ModelConfig, tp_size: int) -> dict[str, tuple[str, int, int]]:
    """For each kind of layer: (its input size's name in config.json, that size, the number of ranks that shard it)."""
    cut = {
        "o_proj": ("heads x head_dim", config.num_attention_heads * config.head_dim, tp_size),
        "down_proj": ("intermediate_size", config.intermediate_size, tp_size),
    }
    return dict.fromkeys(LINEARS, ("hidden_size", config.hidden_size, 1)) | cut


def _share(key: str, size: int, parts: int) -> str:
    return f"{key} {size}" + (f" / {parts} ranks" if parts > 1 else "")


def rounding_scheme(
    mode: str, group_size: int | None, config: ModelConfig, tp_size: int = 1, flag: str = "--quantize"
) -> Scheme:
    """The scheme of a flag's `mode` for a model. group_size None: for int4, the largest up to 128 that divides every
    layer's inputs on a rank, printed if it is smaller. Raises ValueError if there is none."""
    if mode != "int4":
        return Scheme(mode)
    if group_size is not None:
        return Scheme(mode, group_size)
    inputs = set(_inputs(config, tp_size).values())
    undivided = [_share(*each) for each in inputs if each[1] % (each[2] * DEFAULT_GROUP)]
    fitting = [group for group in GROUP_SIZES if all(size % (parts * group) == 0 for _, size, parts in inputs)]
    if not fitting:
        raise ValueError(f"{flag} int4: no group size divides {' and '.join(sorted(undivided))}; take int8")
    group_size = min(fitting[-1], DEFAULT_GROUP)
    if undivided and is_main_rank():  # on stderr, since stdout may be for samples alone
        sizes = " or ".join(sorted(undivided))
        print(f"int4: groups of {group_size}, since {DEFAULT_GROUP} does not divide {sizes}", file=sys.stderr)
    return Scheme(mode, group_size)


def with_int8(scheme: Schemes, kinds: Sequence[str], num_layers: int) -> Schemes:
    """The scheme with layers of some kinds ("down_proj") in int8."""
    by_layer = {layer: scheme.of(layer) for layer in linear_layers(num_layers)}
    chosen = [layer for layer in by_layer if layer.rpartition(".")[2] in kinds]
    return MixedScheme(by_layer | dict.fromkeys(chosen, Scheme("int8"))) if chosen else scheme


def choose_scheme(
    folder: str | Path, mode: str, group_size: int | None = None, flag: str = "--quantize", tp_size: int = 1
) -> Schemes | None:
    """The scheme to run a folder's model with: as it is stored, or quantised as the flags say (mode none: not at all;
    group_size None: see rounding_scheme). Raises ValueError if it is stored in another scheme than the flags', or in an
    unsupported one."""
    config, stored = read_hf_config(folder), None
    if is_quantized(config):  # another layout is refused by ModelConfig.from_hf
        num_layers = ModelConfig.from_hf(folder).num_hidden_layers
        stored = read_scheme(config["quantization_config"], num_layers, f"{folder}/config.json")
    if group_size is not None and mode != "int4":
        raise ValueError(f"--group_size is for {flag} int4, not for {mode}")
    if mode == "none":
        return stored
    if stored is None:
        return rounding_scheme(mode, group_size, ModelConfig.from_hf(folder), tp_size, flag)
    if isinstance(stored, MixedScheme) or (mode, group_size or stored.group_size) != stored[:2]:
        raise ValueError(f"{flag} {mode}: {folder} holds {stored} already; leave the flag out")
    return stored


def quantize_block(
    block: Block,
    prefix: str,
    weight_of: Callable[[str], Quantized],
    bias_of: Callable[[str], Tensor],
    scheme: Schemes,
    dtype: torch.dtype,
) -> None:
    """Replaces a block's linear layers by quantised products. weight_of and bias_of return this rank's part of a
    parameter by its name, which begins with the prefix; dtype: of the activations."""

    def product_of(names: list[str]) -> QuantizedLinear:
        first = block.get_submodule(names[0])
        weights = [weight_of(f"{prefix}{name}.weight") for name in names]
        biases = None if first.bias is None else [bias_of(f"{prefix}{name}.bias") for name in names]
        parallel = first.parallel if isinstance(first, RowLinear) else Parallel()
        return QuantizedLinear(weights, biases, scheme.of(f"{prefix}{names[0]}"), dtype, parallel)

    block.fuse(product_of)


@torch.no_grad()
def quantize_in_place(block: Block, scheme: Scheme) -> None:
    """Quantises a block in memory, not sharded, by rounding; the activations will have the dtype of its weights."""
    get, dtype = block.get_parameter, block.input_layernorm.weight.dtype
    quantize_block(block, "", lambda name: quantize(get(name), scheme), lambda name: get(name).detach(), scheme, dtype)


def quantize_file(
    files: WeightFiles, name: str, slices: tuple[slice, ...], scheme: Schemes, device: torch.device
) -> Quantized:
    """quantize() of a weight in a folder, or of a part of it, from the numbers as stored."""
    try:
        return quantize(files.read(name, slices).to(device), scheme.of(name.removesuffix(".weight")))
    except ValueError as error:
        raise ValueError(f"{files.folder}: {name}: {error}") from None


def quantized_part(
    files: WeightFiles, name: str, shape: tuple[int, ...], scheme: Schemes, tp: DeviceMesh | None, device: torch.device
) -> Quantized:
    """quantize_file() of this tp rank's part of a weight. For a row-parallel layer every rank reads the whole weight,
    since a scale may be that of a whole row."""
    cut = tensor_parallel_part(name, shape, tp)
    rows = cut[:1] if shard_dim(name) == 0 else ()
    whole = quantize_file(files, name, rows, scheme, device)
    return whole if rows else columns_of(whole, cut[1], scheme.of(name.removesuffix(".weight")))


def check_runnable(
    files: WeightFiles,
    config: ModelConfig,
    scheme: Schemes | None,
    runtime: Runtime,
    tp_size: int,
    head: str = "lm",
    flag: str = "--quantize",
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters. Raises the errors of load_model, or with a scheme of load_quantized,
    early, before data are tokenised: ValueError for an unsupported scheme, and for files that do not hold the model.
    flag: that a scheme which the folder does not hold comes from."""
    is_stored = is_quantized(read_hf_config(files.folder))
    if scheme is not None:
        named = f"{files.folder}: " + f"{flag} " * (not is_stored)
        check_scheme(scheme, config, runtime.device, runtime.dtype, tp_size, is_stored=is_stored, named=named)
    if "lm_head.weight_packed" in files.names():
        raise ValueError(f"{files.folder}: its lm_head is quantised; only the layers of the blocks may be")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(config, head=head).named_parameters()}
    expected = stored_shapes(shapes, scheme) if is_stored else shapes
    files.check(expected, allowed=["lm_head.weight"] if config.tie_word_embeddings else [])
    return shapes


@torch.no_grad()
def load_quantized(
    folder: str | Path,
    scheme: Schemes,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tp: DeviceMesh | None = None,
    head: str = "lm",
    files: WeightFiles | None = None,
) -> Transformer:
    """The model of a Hugging Face folder, or this tp rank's part of it, with quantised blocks, frozen.

    A folder with quantised weights must hold this scheme; any other is quantised by rounding while it is read, from
    the numbers as stored. dtype: of all other parameters and of the activations. head: "lm" or "score". files: as for
    load_model. Raises the errors of load_model and of check_scheme.
    """
    config, files = model_config(folder), files or WeightFiles(folder)
    is_stored = is_quantized(read_hf_config(folder))
    with torch.device("meta"):
        model = Transformer(config, dtype, Parallel(tp), head)
    shapes = check_runnable(files, config, scheme, Runtime(device, dtype, compile=False), size_of(tp), head)
    check_weights(files.folder, files.paths())

    def weight_of(name: str) -> Quantized:
        if not is_stored:
            return quantized_part(files, name, shapes[name], scheme, tp, device)
        cut, each = tensor_parallel_part(name, shapes[name], tp), scheme.of(name.removesuffix(".weight"))
        return read_packed(files, name, shapes[name], cut, each, device)

    def bias_of(name: str) -> Tensor:
        return files.read(name, tensor_parallel_part(name, shapes[name], tp))

    for i, block in enumerate(short_bar(model.layers, "loading", "block")):
        quantize_block(block, f"layers.{i}.", weight_of, bias_of, scheme, dtype)
    fill_parameters(model, files, device=device, dtype=dtype, part_of=partial(tensor_parallel_part, tp=tp))
    return model.requires_grad_(False).eval()


def rounded_tensors(files: WeightFiles, scheme: Schemes, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of the blocks for a quantised folder, by rounding, with one weight in memory at a time."""
    for name in short_bar([name for name in files.names() if name.startswith("layers.")], "rounding", "tensor"):
        if is_linear_weight(name):
            yield from packed_tensors(name, quantize_file(files, name, (), scheme, device))
        else:
            yield name, files.read(name)
