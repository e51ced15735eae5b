"""Models with quantised weights: rounded while they are loaded, or written to a folder and loaded from there.

- the attention and MLP layers of the blocks are quantised; embedding, norms and head keep the model's dtype (an
  inference copy on the CPU has an int8 head: models/decode.py)
- one matrix is in memory at a time, never the whole model
- a folder holds what --quantize computes, to the bit; or int4 that was chosen with more care (models/gptq.py)
- with tensor parallelism a rank has its part of the integers and of their scales, those of the whole weight

    python models/quantize.py --checkpoint_path DIR --output_dir DIR-int4 --mode int4 --group_size 128 \\
        --method gptq --calibration_file train.jsonl --eval_file heldout.jsonl
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.checkpoint import WeightFiles, fill_parameters, loading_bar, save_folder
from models.model import (
    FUSIONS,
    QUANTIZED_FORMAT,
    Block,
    ModelConfig,
    RowLinear,
    Transformer,
    is_quantized,
    read_hf_config,
)
from models.qlinear import GROUP_SIZES, Quantized, QuantizedLinear, Scheme, quantize
from models.tp import Parallel, inference_parallel, shard_dim, size_of, tensor_parallel_part

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
    for part_name, names, product in FUSIONS:
        part = getattr(block, part_name)
        first = getattr(part, names[0])
        stems = [f"{prefix}{part_name}.{name}" for name in names]
        weights = [weight_of(f"{stem}.weight") for stem in stems]
        biases = None if first.bias is None else [bias_of(f"{stem}.bias") for stem in stems]
        parallel = first.parallel if isinstance(first, RowLinear) else Parallel()
        for name in names:
            setattr(part, name, None)
        setattr(part, product, QuantizedLinear(weights, biases, scheme, dtype, parallel))


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
    found = {}
    for name, shape in shapes.items():
        if is_linear_weight(name):
            parts = _slices(tuple(slice(0, n) for n in shape), scheme)
            sizes = [tuple(part.stop - part.start for part in slices) for slices in parts]
            found |= dict(zip(stored_names(name, scheme), sizes))
        else:
            found[name] = shape
    return found


def _slices(cut: tuple[slice, slice], scheme: Scheme) -> list[tuple[slice, slice]]:
    """The parts of a quantised weight's tensors that belong to a part of the weight."""
    rows, columns = cut
    if scheme.mode != "int4":
        return [cut, (rows, slice(0, 1))]
    groups = slice(columns.start // scheme.group_size, columns.stop // scheme.group_size)
    return [cut, (rows, groups), (rows, groups)]


def quantize_file(
    files: WeightFiles,
    name: str,
    slices: tuple[slice, ...],
    scheme: Scheme,
    device: torch.device,
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
    config, files = ModelConfig.from_hf(folder), WeightFiles(folder)
    check_scheme(scheme, config, device, dtype, size_of(tp))
    is_stored = is_quantized(read_hf_config(folder)[0])
    parallel = inference_parallel(tp, device, dtype)
    with torch.device("meta"):
        model = Transformer(config, dtype, parallel, head)
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

    for i, block in enumerate(loading_bar(model.layers, "block")):
        quantize_block(block, f"layers.{i}.", weight_of, bias_of, scheme, dtype)
    fill_parameters(model, files, device=device, dtype=dtype, part_of=partial(tensor_parallel_part, tp=tp))
    return model.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------ folder


def rounded_tensors(files: WeightFiles, scheme: Scheme, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the blocks of a folder with quantised weights, (name, tensor), one weight in memory at a time."""
    for name in loading_bar([name for name in files.names() if name.startswith("layers.")], "tensor"):
        if is_linear_weight(name):
            yield from zip(stored_names(name, scheme), quantize_file(files, name, (), scheme, device))
        else:
            yield name, files.read(name)


# The script alone imports training/, for the command line and the records.


def parser():
    from training.common import ArgumentParser, positive_int

    parser = ArgumentParser("Writes a Hugging Face folder with quantised weights, for inference and frozen models.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="Hugging Face folder with the model")
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; the GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the model that reads the records")
    add("--output_dir", type=Path, required=True, help="folder to write; whole or not at all")
    add("--mode", choices=["int8", "int4"], default="int4", help="what the weights of the blocks become")
    add("--group_size", type=int, choices=GROUP_SIZES, default=None, help="int4: weights that share a scale; 128")
    add(
        "--method",
        choices=["rtn", "gptq"],
        default="rtn",
        help="rtn: round to nearest, as --quantize does elsewhere; gptq, of int4: each column's error is made up for "
        "by the next ones, as the calibration file's activations want it",
    )
    add("--calibration_file", type=Path, default=None, help="records as finetune_sft.py's: what the model reads")
    add("--eval_file", type=Path, default=None, help="records: print what it costs, beside rounding to nearest")
    add("--calibration_tokens", type=positive_int, default=65536, help="tokens taken from each file, from its start")
    add("--max_seq_len", type=positive_int, default=512, help="longer records are cut into rows of so many tokens")
    return parser


@torch.no_grad()
def main(
    *,
    checkpoint_path: Path,
    device: str | None,
    dtype: str,
    output_dir: Path,
    mode: str,
    group_size: int | None,
    method: str,
    calibration_file: Path | None,
    eval_file: Path | None,
    calibration_tokens: int,
    max_seq_len: int,
) -> None:
    from models.gptq import quantize_blocks
    from training.common import card, choose_runtime, open_folder, say

    if mode == "int8" and method != "rtn":
        raise ValueError(f"--method {method} is for int4; int8 is rounded to nearest")
    if (method == "gptq") != (calibration_file is not None):
        raise ValueError("--method gptq and --calibration_file go together")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"--output_dir {output_dir}: exists; take another, or remove it")
    runtime = choose_runtime(device, dtype, False)
    config, tokenizer, context = open_folder(checkpoint_path, None, 1)
    scheme = choose_scheme(checkpoint_path, mode, group_size)
    check_scheme(scheme, config, runtime.device, runtime.dtype, 1)
    files = WeightFiles(checkpoint_path)
    head = "score" if "score.weight" in files.names() else "lm"
    if eval_file is not None and head == "score":
        raise ValueError(f"--eval_file: {checkpoint_path} is a reward model, which has no perplexity")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(config, head=head).named_parameters()}
    files.check(shapes, allowed=["lm_head.weight"] if config.tie_word_embeddings else [])
    limits = {
        "max_seq_len": min(max_seq_len, context),
        "most_tokens": calibration_tokens,
        "vocab_size": config.vocab_size,
    }
    calibration, evaluation = (
        [] if path is None else _load_rows(path, tokenizer, **limits) for path in (calibration_file, eval_file)
    )
    found = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        if calibration or evaluation:
            rows = {"calibration": calibration, "evaluation": evaluation, "report": found.append}
            placing = {"device": runtime.device, "dtype": runtime.dtype}
            yield from quantize_blocks(files, config, scheme, method, **rows, **placing)
        else:
            yield from rounded_tensors(files, scheme, runtime.device)
        for name in sorted(shapes, reverse=True):  # the embedding last: its dtype is the one that config.json names
            if not name.startswith("layers."):
                yield name, files.read(name)

    stored = {"format": QUANTIZED_FORMAT, "mode": mode, "method": method}
    stored |= {"group_size": scheme.group_size} if mode == "int4" else {}
    hf_config = read_hf_config(checkpoint_path)[0] | {"quantization_config": stored}
    save_folder(output_dir, tensors(), config=hf_config, copy_from=checkpoint_path)
    size = sum(path.stat().st_size for path in output_dir.glob("*.safetensors"))
    rows = {"model": f"{checkpoint_path}, {config.num_parameters() / 1e6:,.1f} M parameters"}
    rows |= {"written": f"{output_dir}, {scheme} by {method}, {size / 1e9:,.2f} GB (one byte for each integer)"}
    for costs in found:
        plain = costs["stored"].perplexity
        rows["perplexity as stored"] = f"{plain:.4f}"
        for name, cost in (("rounded", costs["rounded"]), ("as written", costs["chosen"])):
            rows[f"perplexity {name}"] = f"{cost.perplexity:.4f} ({cost.perplexity / plain - 1:+.3%}), KL {cost.kl:.3e}"
    say(card("quantize", rows))


def _load_rows(path: Path, tokenizer, *, max_seq_len: int, most_tokens: int, vocab_size: int) -> list:
    """The first tokens of a file of records, in batches of rows of like length."""
    from models.gptq import Rows
    from training.data import Example, check_ids, collate, encode_sft_record, tokenising

    rows, num_tokens = [], 0
    for record in tokenising(path):
        example, _ = encode_sft_record(record, tokenizer)
        check_ids(example.input_ids, vocab_size, record.where)
        for start in range(0, len(example.input_ids), max_seq_len):
            part = slice(start, start + max_seq_len)
            rows.append(Example(example.input_ids[part], example.labels[part]))
            num_tokens += len(rows[-1].input_ids)
        if num_tokens >= most_tokens:
            break
    rows.sort(key=lambda row: len(row.input_ids))
    if not any(row.num_targets for row in rows):
        raise ValueError(f"{path}: no record has a token to predict")
    batches = []
    for start in range(0, len(rows), 8):
        group = rows[start : start + 8]
        batch = collate(group, 0, torch.device("cpu"))
        lengths = torch.tensor([len(row.input_ids) for row in group])
        batches.append(Rows(batch.input_ids, batch.labels, torch.arange(batch.input_ids.shape[1]) < lengths[:, None]))
    return batches


if __name__ == "__main__":
    from training.common import run_script

    run_script(main, parser())
