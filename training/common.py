"""What all scripts do alike: the command line, start-up, errors, and what a person sees.

- run_script is the only place where an exception becomes a message: a user's mistake (ValueError, OSError) is one
  line on stderr and exit code 2; anything else is a bug and keeps its traceback, as does everything with
  TRACEBACK=1 in the environment
- nothing here knows a loss or a data format
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from models.checkpoint import DTYPES, refuse_quantized
from models.fsdp import check_divisible, data_parallel_size
from models.model import ModelConfig
from models.qlinear import GROUP_SIZES, MODES
from models.tokenizer import Tokenizer
from models.tp import is_main_rank
from training.data import check_vocabulary

# Peak dense bf16 rate (FLOP/s) and memory bandwidth (bytes/s) from the vendors' datasheets, by a part of the device's
# name. A device that is not listed prints no MFU or MBU.
PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100 80GB PCIe": (312e12, 1.94e12),
    "A100": (312e12, 1.56e12),
    "MI300X": (1307e12, 5.3e12),
    "MI250X": (383e12, 3.28e12),
    "L40S": (362e12, 0.864e12),
    "RTX 4090": (165e12, 1.01e12),
    "RTX 3090": (71e12, 0.936e12),
}


# -------------------------------------------------------------------------------- the command line


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # a default of None is described by the help text
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults shown in --help, no abbreviations, and errors of one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> Callable:
    """An argparse type: an int or float that is > above, >= least and <= most."""
    bounds = [f"> {above}"] * (above > -math.inf) + [f">= {least}"] * (least > -math.inf)
    bounds += [f"<= {most}"] * (most < math.inf)

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > above and value >= least and value <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {kind.__name__} {' and '.join(bounds)}".rstrip())
        return value

    return parse


positive_int = number(int, least=1)
non_negative_int = number(int, least=0)
positive_float = number(float, above=0, most=sys.float_info.max)
non_negative_float = number(float, least=0, most=sys.float_info.max)
fraction = number(float, least=0, most=1)
below_one = number(float, least=0, most=math.nextafter(1, 0))


def add_model_arguments(parser: ArgumentParser) -> None:
    """The flags of every script that runs a model of a folder."""
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="Hugging Face folder with the model")
    add_runtime_arguments(parser)


def add_runtime_arguments(parser: ArgumentParser) -> None:
    """Where and how to compute."""
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; the GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default=None,
        help="dtype of the computation; bfloat16 on a GPU, float32 on the CPU",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile; on for a GPU, off for the CPU",
    )


def add_quantize_arguments(parser: ArgumentParser) -> None:
    """The flags of the scripts that run a model and do not train it."""
    add = parser.add_argument
    add(
        "--quantize",
        choices=["none", *MODES],
        default="none",
        help="round the weights of the blocks while loading, and for text on a CPU in bfloat16 the head to int8; "
        "fp8 needs a Hopper GPU. A folder that models/quantize.py wrote is run as it is stored",
    )
    add_group_size_argument(parser)


def add_group_size_argument(parser: ArgumentParser) -> None:
    text = "int4: weights that share a scale; 128"
    parser.add_argument("--group_size", type=int, choices=GROUP_SIZES, default=None, help=text)


def add_training_arguments(parser: ArgumentParser) -> None:
    """The flags of the scripts that learn from a file of records, beside those of add_model_arguments."""
    add_run_arguments(parser)
    add = parser.add_argument
    add("--train_file", type=Path, required=True, help="JSON or JSONL records to train on")
    add("--eval_file", type=Path, default=None, help="records to evaluate on")
    add("--max_seq_len", type=positive_int, default=None, help="longest row in tokens; the model's context")
    add("--overlong", choices=["refuse", "skip", "truncate"], default="refuse", help="what to do with longer records")
    add("--batch_size", type=positive_int, default=32, help="rows per optimizer step, over all ranks")
    add("--num_epochs", type=positive_int, default=1, help="passes over the training file")
    add(
        "--max_steps",
        type=non_negative_int,
        default=None,
        help="optimizer steps, wins over --num_epochs; 0 only exports",
    )
    add(
        "--shuffle", action=argparse.BooleanOptionalAction, default=True, help="a new order each epoch; else the file's"
    )
    add_optimizer_arguments(parser)
    add_parallel_arguments(parser)


def add_run_arguments(parser: ArgumentParser) -> None:
    """A run directory, and what goes into it when."""
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="run directory: metrics, checkpoints and at the end the model")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output_dir")
    add("--eval_steps", type=positive_int, default=None, help="evaluate every so many steps; at the end only")
    add("--save_steps", type=positive_int, default=None, help="save a checkpoint every so many steps; none")
    add("--save_total_limit", type=positive_int, default=2, help="checkpoints to keep")
    add("--log_steps", type=positive_int, default=1, help="write metrics every so many steps")
    add(
        "--report_to",
        choices=["none", "tensorboard", "wandb"],
        default="none",
        help="where else metrics go; the package must be installed",
    )
    add("--export_dtype", choices=list(DTYPES), default=None, help="dtype of the exported model; the input folder's")


def add_optimizer_arguments(parser: ArgumentParser) -> None:
    """AdamW and its schedule."""
    add = parser.add_argument
    add("--learning_rate", type=non_negative_float, default=2e-5, help="peak learning rate")
    add("--lr_schedule", choices=["constant", "linear", "cosine"], default="cosine", help="what follows the warm-up")
    add("--warmup_ratio", type=fraction, default=0.03, help="share of the steps in which the learning rate rises")
    add("--weight_decay", type=non_negative_float, default=0.0, help="AdamW decay of matrices; not of norms and biases")
    add("--adam_beta1", type=below_one, default=0.9, help="decay of AdamW's first moment")
    add("--adam_beta2", type=below_one, default=0.95, help="decay of AdamW's second moment")
    add("--adam_eps", type=positive_float, default=1e-8, help="AdamW's epsilon")
    add(
        "--param_dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of the stored weights and gradients; bfloat16 weights get fp32 updates, rounded stochastically "
        "(bytes for a parameter, its gradient and AdamW's moments: 16 or 12, with adamw_8bit 10 or 6)",
    )
    add(
        "--optim",
        choices=["adamw", "adamw_8bit"],
        default="adamw",
        help="AdamW with fp32 moments (8 bytes for a parameter), or with 8-bit ones of blocks (2 bytes)",
    )
    add("--max_grad_norm", type=positive_float, default=1.0, help="gradients are clipped to this global norm")


def add_parallel_arguments(parser: ArgumentParser) -> None:
    """How a step is spread over ranks and over forwards."""
    add = parser.add_argument
    add("--micro_batch_size", type=positive_int, default=None, help="rows per forward on one rank; --batch_size")
    add(
        "--tensor_parallel_size",
        type=positive_int,
        default=1,
        help="ranks that share the model, adjacent under torchrun",
    )
    add(
        "--dp_replicate",
        type=positive_int,
        default=1,
        help="hybrid sharding: so many whole copies of the model, each cut over the other ranks; the number of nodes",
    )
    add(
        "--sequence_parallel",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="with tensor parallelism: spread the tokens between the parallel layers, which saves activations",
    )
    add(
        "--activation_checkpointing",
        choices=["none", "full", "selective"],
        default="none",
        help="recompute in the backward: nothing, whole blocks, or all but matrix products and attention",
    )
    add(
        "--sync_every_micro_batch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reduce the gradients over the ranks after each micro-batch; else after the last: less communication, "
        "but every rank holds the whole gradients",
    )
    add(
        "--cpu_offload",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep weights, gradients and optimizer state in the CPU's memory, and step there; for GPUs",
    )


def run_script(main: Callable, parser: ArgumentParser) -> None:
    """Parses the command line, calls main with the arguments as keywords, and ends the process."""
    end_process(run_main(main, parser))


def end_process(code: int) -> None:
    """Exits without the interpreter's own shutdown: a thread of gloo may still hold the tensors of the last collective,
    and aborts if it drops them meanwhile (torch 2.13, https://github.com/pytorch/pytorch/issues/190489)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def run_main(main: Callable, parser: ArgumentParser) -> int:
    """The exit code of a command line, run in this process; a user's mistake is reported here."""
    args = parser.parse_args()
    try:
        main(**vars(args))
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        rank = "" if is_main_rank() else f" [rank {os.environ['RANK']}]"
        for bar in list(getattr(tqdm, "_instances", ())):  # an unfinished bar would share the message's line
            bar.leave = False
            bar.close()
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError):
            reason = f"out of GPU memory; take smaller batches or shorter rows ({reason})"
        print(f"{parser.prog}:{rank} error: {reason}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------- start-up


class Runtime(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of the computation
    compile: bool


def choose_runtime(device: str | None, dtype: str | None, compile: bool | None) -> Runtime:
    """Fills in what the user left open. Raises ValueError for a device that is not there."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {device}: not a device name; try cpu or cuda") from None
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {device}: there is no such GPU here ({torch.cuda.device_count()} found)")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: only cpu and cuda (NVIDIA or AMD) are supported")
    on_gpu = chosen.type == "cuda"
    if on_gpu and "LOCAL_RANK" in os.environ:
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not on_gpu:
        keep_freed_memory()
    chosen_dtype = DTYPES[dtype] if dtype else (torch.bfloat16 if on_gpu else torch.float32)
    return Runtime(chosen, chosen_dtype, on_gpu if compile is None else compile)


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed, also blocks above 32 MB, for the next step: a fresh page costs the CPU more than
    the arithmetic on it (an SFT step of the 134M model takes a sixth less time). glibc alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def split_batch(
    batch_size: int,
    micro_batch_size: int | None,
    tensor_parallel_size: int,
    dp_replicate: int = 1,
    flag: str = "--batch_size",
) -> tuple[int, int]:
    """(data-parallel ranks, rows of one forward on one rank). Raises ValueError for sizes that do not go together; flag
    gave the batch_size."""
    dp_size = data_parallel_size(tensor_parallel_size, dp_replicate)
    if batch_size % dp_size:
        raise ValueError(f"{flag} {batch_size} does not divide over {dp_size} data-parallel ranks")
    micro_batch_size = micro_batch_size or batch_size // dp_size
    if micro_batch_size * dp_size > batch_size:
        ranks = "" if dp_size == 1 else f" over {dp_size} data-parallel ranks"
        raise ValueError(f"--micro_batch_size {micro_batch_size}{ranks} is larger than {flag} {batch_size}")
    return dp_size, micro_batch_size


def open_folder(
    checkpoint_path: Path, max_seq_len: int | None, tensor_parallel_size: int, *, frozen: bool = False
) -> tuple[ModelConfig, Tokenizer, int]:
    """The model's shape, its tokenizer, and the longest row: max_seq_len, or the model's context. Raises ValueError if
    they do not go together or the model cannot be cut over so many ranks, and for quantised weights unless it is
    frozen."""
    config = ModelConfig.from_hf(checkpoint_path)
    if not frozen:
        refuse_quantized(checkpoint_path)
    check_divisible(config, tensor_parallel_size)
    context = config.max_position_embeddings
    if max_seq_len is not None and max_seq_len > context:
        raise ValueError(f"--max_seq_len {max_seq_len}: the model's context is {context} tokens")
    tokenizer = Tokenizer(checkpoint_path)
    check_vocabulary(tokenizer, config.vocab_size, checkpoint_path)
    return config, tokenizer, max_seq_len or context


def pad_id(tokenizer: Tokenizer, config: ModelConfig) -> int:
    """The id that fills rows up; many folders name a pad token that has no embedding, and any other does as well."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id < config.vocab_size else 0


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def peaks(device: torch.device) -> tuple[float, float] | None:
    """(FLOP/s in bf16, bytes/s) of a known GPU, else None."""
    name = device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the device's allocator, or of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training_flops_per_token(config: ModelConfig, seq_len: float) -> float:
    """FLOPs of forward and backward for one token of a row of seq_len tokens: 6 for each weight that multiplies it, and
    the causal attention's two products over seq_len / 2 positions on average (PaLM, arXiv 2204.02311, appendix B)."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 6 * (config.num_parameters() - embedding) + 6 * attention


def throughput(config: ModelConfig, device: torch.device, lengths: list[int], seconds: float) -> dict[str, float]:
    """The metrics tokens_per_second, and mfu where the device's peak is known. lengths: of the records of a step."""
    rate = sum(lengths) / seconds
    peak = peaks(device)
    if peak is None:
        return {"tokens_per_second": rate}
    mean_len = sum(n * n for n in lengths) / sum(lengths)  # the length of its record, for the average token
    return {"tokens_per_second": rate, "mfu": rate * training_flops_per_token(config, mean_len) / peak[0]}


def say(text: str) -> None:
    """Prints on the main rank alone."""
    if is_main_rank():
        print(text, flush=True)


def card(title: str, rows: dict[str, object]) -> str:
    """A short table for people: one aligned line for each row."""
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def progress_bar(**options) -> tqdm:
    """A tqdm bar; where stderr is not a terminal it writes seldom, so that log files stay short."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(mininterval=interval, smoothing=0, dynamic_ncols=True, disable=not is_main_rank(), **options)


def write_json(path: Path, value: object) -> None:
    """Writes a small JSON file at once: beside and renamed."""
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(staging, path)


class Stopwatch:
    """Seconds since the last call; waits for the device first, so that the time is that of finished work."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self) -> float:
        now = self._now()
        seconds, self.last = now - self.last, now
        return seconds


def check_finite(step: int, rows: list[int], **values: float | Tensor) -> None:
    """Raises ValueError that names the step and its records if a value is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            shown = ", ".join(map(str, rows[:64])) + (", ..." if len(rows) > 64 else "")
            raise ValueError(f"step {step}: {name} is {float(value)}; records of the step (from 0): {shown}")
