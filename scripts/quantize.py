"""Writes a Hugging Face folder with quantised weights, and measures the loss of accuracy.

- the layout is compressed-tensors' "pack-quantized", which transformers opens too
- int4 weights are calibrated on records, block by block (models/calibration.py); int8 weights, and int4 weights
  without a calibration file, are rounded to nearest, as with --quantize in the other scripts
- --eval_file: perplexity of the original weights, and perplexity and KL after rounding to nearest and as written

    python scripts/quantize.py --checkpoint_path DIR --output_dir DIR-int4 --calibration_file train.jsonl \\
        --eval_file heldout.jsonl
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

import torch
from torch import Tensor

from models.adapters import AdapterArgs, weight_files
from models.batches import collate
from models.calibration import Cost, Rows, quantize_blocks
from models.checkpoint import Folder, ModelArgs, WeightFiles, folder_config, has_score_head, open_folder, stored_dtype
from models.checksums import check_weights
from models.common import at_least_one, card, choose_runtime, flag, refuse_idle, say
from models.compressed import is_linear_weight, quantization_config
from models.config import ModelConfig, is_quantized, read_hf_config
from models.export import STAGING, save_folder
from models.pad_token import choose_pad_token, pad_changes
from models.qlinear import GROUP_SIZES
from models.quantize import check_runnable, choose_scheme, rounded_tensors, with_int8
from models.records import Example, check_ids, tokenising
from models.reward import scalar_head_config
from models.script import run_script
from models.tokenizer import Tokenizer, chat_day
from models.tp import ROW_PARALLEL
from training.data import encode_sft_record

INT4_GROUP = 32  # 4.5 bits a weight


@dataclass(frozen=True, kw_only=True)
class QuantizeScriptArgs(ModelArgs, AdapterArgs):
    """Writes a Hugging Face folder with quantised weights, for inference and frozen models."""

    dtype: str | None = "float32"
    compile: bool | None = False
    output_dir: Path = flag(help="folder to write, atomically")
    mode: str = flag("int4", choices=("int8", "int4"), help="format of the weights of the blocks")
    method: str | None = flag(
        None,
        choices=("rtn", "gptq"),
        help="rtn: round to nearest, as --quantize in the other scripts; gptq, int4 only: minimise the change of the "
        "layers' outputs on the calibration file; default: gptq with a --calibration_file, else rtn",
    )
    group_size: int | None = flag(None, choices=GROUP_SIZES, help="int4: weights that share a scale; default: 32")
    int8_layers: list[str] = flag(
        (), nargs="*", choices=ROW_PARALLEL, help="int4: layers to store in int8, which costs little in some models"
    )
    calibration_file: Path | None = flag(None, help="records as for finetune_sft.py, to calibrate int4 with")
    eval_file: Path | None = flag(None, help="records as for finetune_sft.py, to print perplexity and KL on")
    calibration_tokens: int = flag(65536, bounds=at_least_one, help="tokens to calibrate with, from the file's start")
    max_seq_len: int = flag(512, bounds=at_least_one, help="most tokens of a row; longer records are cut into rows")


@torch.no_grad()
def main(args: QuantizeScriptArgs) -> None:
    method = args.method or ("rtn" if args.calibration_file is None else "gptq")
    if args.mode == "int8" and method != "rtn":
        raise ValueError("--method gptq and --calibration_file are for int4; int8 is rounded to nearest")
    if args.mode == "int8" and args.int8_layers:
        raise ValueError("--int8_layers is for --mode int4")
    if (method == "gptq") != (args.calibration_file is not None):
        raise ValueError("--method gptq and --calibration_file go together")
    refuse_idle(args, "here, where each block runs a few times", "compile")
    if args.calibration_file is None:
        refuse_idle(args, "without a --calibration_file", "calibration_tokens")
    if args.calibration_file is None and args.eval_file is None:
        refuse_idle(args, "without a --calibration_file or an --eval_file", "max_seq_len")
    out = args.output_dir
    if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= {STAGING}):  # left by a kill
        raise ValueError(f"--output_dir {out}: exists; take another")
    runtime = choose_runtime(args)
    folder = open_folder(args.checkpoint_path, frozen=True, today=chat_day(args.chat_date))
    if is_quantized(read_hf_config(args.checkpoint_path)):
        again = "and cannot be quantised again; give the folder that it was made from"
        raise ValueError(f"{args.checkpoint_path}: its quantised weights are frozen, {again}")
    config = folder.config
    group_size = args.group_size or (INT4_GROUP if args.mode == "int4" else None)
    scheme = choose_scheme(args.checkpoint_path, args.mode, group_size, flag="--mode")
    scheme = with_int8(scheme, args.int8_layers, config.num_hidden_layers)
    files = weight_files(args.checkpoint_path, args.adapter_path)
    head = "score" if "score.weight" in files.names() else "lm"
    if args.eval_file is not None and head == "score":
        source = args.checkpoint_path if has_score_head(args.checkpoint_path) else args.adapter_path
        raise ValueError(f"--eval_file: {source} is of a reward model, which has no perplexity")
    shapes = check_runnable(files, config, scheme, runtime, 1, head, "--mode")
    check_weights(files.folder, files.paths())
    calibration, evaluation = (
        [] if path is None else load_rows(path, folder.tokenizer, config, args.max_seq_len, most)
        for path, most in ((args.calibration_file, args.calibration_tokens), (args.eval_file, None))
    )
    is_fp32 = stored_dtype(args.checkpoint_path) == torch.float32
    costs: list[dict[str, Cost]] = []
    sizes: list[int] = []  # bytes of the tensors that hold quantised weights

    def tensors() -> Iterator[tuple[str, Tensor]]:
        if calibration or evaluation:
            rows = {"calibration": calibration, "evaluation": evaluation}
            quantised = quantize_blocks(files, config, scheme, runtime, **rows, report=costs.append)
        else:
            quantised = rounded_tensors(files, scheme, runtime.device)
        for name, tensor in quantised:  # loaders that decompress a weight use the dtype of its scales
            tensor = tensor.float() if is_fp32 and name.endswith("_scale") else tensor
            if name.endswith(("_packed", "_scale", "_zero_point")):
                sizes.append(tensor.nbytes)
            yield name, tensor
        for name in sorted(shapes):
            if not name.startswith("layers."):
                yield name, files.read(name)

    stored = quantization_config(scheme, config.num_hidden_layers, "score" if head == "score" else "lm_head")
    hf_config, changes = settings_of(folder, files)
    hf_config["quantization_config"] = stored
    save_folder(args.output_dir, tensors(), config=hf_config, copy_from=args.checkpoint_path, json_changes=changes)
    size = sum(path.stat().st_size for path in args.output_dir.glob("*.safetensors"))
    num_weights = sum(math.prod(shape) for name, shape in shapes.items() if is_linear_weight(name))
    kept = f"{scheme} by {method}, {8 * sum(sizes) / num_weights:.3f} bits for each of their weights"
    rows = {"model": folder, "blocks": kept, "written": f"{args.output_dir}, {size / 1e6:,.1f} MB"}
    for cost in costs:
        plain = cost["stored"].perplexity
        rows["perplexity as stored"] = f"{plain:.4f}"
        named = {"rounded": cost["rounded"], "as written": cost["chosen"]}
        if method == "rtn":  # both are rounded to nearest
            del named["rounded"]
        for name, each in named.items():
            rows[f"perplexity {name}"] = f"{each.perplexity:.4f} ({each.perplexity / plain - 1:+.3%}), KL {each.kl:.3e}"
    say(card("quantize", rows))


def settings_of(folder: Folder, files: WeightFiles) -> tuple[dict, dict[str, dict]]:
    """Returns (the contents of config.json without quantization_config, the changes of the other JSON files). If an
    adapter makes a language model a reward model, config.json is one that transformers opens as such; its pad token
    stays, if it has one, since scores are read at the last token that is no pad."""
    config, changes = folder_config(folder.path), {"generation_config.json": folder.generation_changes()}
    if "score.weight" in files.names() and not has_score_head(folder.path):
        stated, pad = config.get("pad_token_id"), choose_pad_token(folder)
        has_pad = isinstance(stated, int) and stated >= 0
        config = files.config_of(scalar_head_config(config, stated if has_pad else pad.id))
        for name, values in pad_changes(folder.path, pad).items() if config["pad_token_id"] == pad.id else ():
            changes[name] = {**changes.get(name, {}), **values}
    return files.config_of(config), changes


def load_rows(path: Path, tokenizer: Tokenizer, config: ModelConfig, max_seq_len: int, most: int | None) -> list[Rows]:
    """Reads about the first `most` tokens of a file of records, or all, as batches of rows of similar length."""
    rows, num_tokens, longest = [], 0, min(max_seq_len, config.max_position_embeddings)
    for record in tokenising(path):
        example, _ = encode_sft_record(record, tokenizer)
        check_ids(example.input_ids, config.vocab_size, record.where)
        for start in range(0, len(example.input_ids), longest):
            part = slice(start, start + longest)
            rows.append(Example(example.input_ids[part], example.labels[part]))
            num_tokens += len(rows[-1].input_ids)
        if most is not None and num_tokens >= most:
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
    run_script(main, QuantizeScriptArgs)
