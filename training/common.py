"""What all scripts do alike: the command line, start-up, errors, optimizer, schedule, metrics, the run directory.

- run_script is the only place where an exception becomes a message: a user's mistake (ValueError, OSError) is one
  line on stderr and exit code 2; anything else is a bug and keeps its traceback, as does everything with
  TRACEBACK=1 in the environment
- nothing here knows a loss or a data format
"""

import argparse
import importlib.util
import json
import logging
import math
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

from models.checkpoint import DTYPES
from models.model import ModelConfig, read_json_object
from models.tp import is_main_rank

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


def add_training_arguments(parser: ArgumentParser) -> None:
    """The flags of every training script, beside those of add_model_arguments."""
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="run directory: metrics, checkpoints and at the end the model")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output_dir")
    add("--train_file", type=Path, required=True, help="JSON or JSONL records to train on")
    add("--eval_file", type=Path, default=None, help="records to evaluate on")
    add("--max_seq_len", type=positive_int, default=None, help="longest row in tokens; the model's context")
    add("--overlong", choices=["refuse", "skip", "truncate"], default="refuse", help="what to do with longer records")
    add("--batch_size", type=positive_int, default=32, help="rows per optimizer step, over all ranks")
    add("--micro_batch_size", type=positive_int, default=None, help="rows per forward on one rank; --batch_size")
    add("--learning_rate", type=non_negative_float, default=2e-5, help="peak learning rate")
    add("--lr_schedule", choices=["constant", "linear", "cosine"], default="cosine", help="what follows the warm-up")
    add("--warmup_ratio", type=fraction, default=0.03, help="share of the steps in which the learning rate rises")
    add("--weight_decay", type=non_negative_float, default=0.0, help="AdamW decay of matrices; not of norms and biases")
    add("--adam_beta1", type=below_one, default=0.9, help="decay of AdamW's first moment")
    add("--adam_beta2", type=below_one, default=0.95, help="decay of AdamW's second moment")
    add("--adam_eps", type=positive_float, default=1e-8, help="AdamW's epsilon")
    add("--max_grad_norm", type=positive_float, default=1.0, help="gradients are clipped to this global norm")
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
    add(
        "--tensor_parallel_size",
        type=positive_int,
        default=1,
        help="ranks that share the model, adjacent under torchrun",
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
    add("--export_dtype", choices=list(DTYPES), default=None, help="dtype of the exported model; the input folder's")


def run_script(main: Callable, parser: ArgumentParser) -> None:
    """Parses the command line and calls main with the arguments as keywords."""
    args = parser.parse_args()
    try:
        main(**vars(args))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
        sys.exit(2)
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
    chosen_dtype = DTYPES[dtype] if dtype else (torch.bfloat16 if on_gpu else torch.float32)
    return Runtime(chosen, chosen_dtype, on_gpu if compile is None else compile)


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


def card(title: str, rows: dict[str, object]) -> str:
    """A short table for people: one aligned line for each row."""
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def progress_bar(**options) -> tqdm:
    """A tqdm bar; where stderr is not a terminal it writes seldom, so that log files stay short."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(mininterval=interval, smoothing=0, dynamic_ncols=True, disable=not is_main_rank(), **options)


# ------------------------------------------------------------------------------------ optimisation


def make_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def learning_rate_at(step: int, *, peak: float, schedule: str, total_steps: int, warmup_ratio: float) -> float:
    """The learning rate of optimizer step `step`, counted from 1: it rises linearly over ceil(warmup_ratio *
    total_steps) steps and reaches the peak with the last of them, then stays, or falls to 0 one step after the last."""
    warmup_steps = math.ceil(warmup_ratio * total_steps - 1e-9)  # 0.07 * 100 is a little more than 7
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[schedule]
    return peak * factor


def training_flops_per_token(config: ModelConfig, seq_len: float) -> float:
    """FLOPs of forward and backward for one token of a row of seq_len tokens: 6 for each weight that multiplies it, and
    the causal attention's two products over seq_len / 2 positions on average (PaLM, arXiv 2204.02311, appendix B)."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 6 * (config.num_parameters() - embedding) + 6 * attention


# ------------------------------------------------------------------------------- the run directory


# A run that goes on with another of these would not be the same run: another model, or other batches.
FIXED_ARGS = (
    "checkpoint_path",
    "train_file",
    "batch_size",
    "shuffle",
    "seed",
    "max_seq_len",
    "overlong",
    "pack",
    "dtype",
)


def prepare_output_dir(output_dir: Path, resume: bool, args: dict) -> None:
    """Raises ValueError if the run would mix with an earlier one, or go on with other data."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir}: is a file")
    if not resume and output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"--output_dir {output_dir}: is not empty; take another, empty it, or go on with --resume")
    if (output_dir / "config.json").exists() and not (output_dir / "args.json").exists():
        raise ValueError(f"--output_dir {output_dir}: holds a model and no run to --resume; it would be overwritten")
    if resume and (output_dir / "args.json").exists():
        earlier = read_json_object(output_dir / "args.json")
        changed = [f"--{name}" for name in FIXED_ARGS if name in args and earlier.get(name) != _recorded(args[name])]
        if changed:
            raise ValueError(f"--resume {output_dir}: the run was begun with other {', '.join(changed)}")


def _recorded(value: object) -> object:
    """A flag's value as args.json holds it; paths are absolute, so that a run can be resumed from elsewhere."""
    return str(value.resolve()) if isinstance(value, Path) else value


def write_args(output_dir: Path, args: dict) -> None:
    """args.json: the flags of the run."""
    write_json(output_dir / "args.json", {name: _recorded(value) for name, value in args.items()})


def write_json(path: Path, value: object) -> None:
    """Writes a small JSON file at once: beside and renamed."""
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(staging, path)


def check_installed(report_to: str) -> None:
    """Raises ValueError that says what to install for --report_to."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise ValueError(f"--report_to {report_to}: the package is not installed; pip install {report_to}")


class Metrics:
    """metrics.jsonl: one object for each logged step, flushed at once; the main rank's business alone."""

    def __init__(self, output_dir: Path, *, after_step: int = 0, report_to: str = "none"):
        """after_step: when resuming, the step of the checkpoint; later lines are dropped, to be written again."""
        self._file, self._report = None, None
        if not is_main_rank():
            return
        self.path = output_dir / "metrics.jsonl"
        kept = []
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                try:
                    if json.loads(line)["step"] <= after_step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{self.path}:{number}: not a line that a training script wrote") from None
        staging = self.path.with_name(".metrics.jsonl.partial")
        staging.write_bytes(b"".join(kept))
        os.replace(staging, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(output_dir / "tensorboard", purge_step=after_step + 1)
            self._report = lambda step, values: [board.add_scalar(name, x, step) for name, x in values.items()]
        elif report_to == "wandb":
            import wandb

            run = wandb.init(dir=output_dir, name=output_dir.name, resume="allow")
            self._report = lambda step, values: run.log(values, step=step)

    def write(self, values: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        if self._report is not None:
            self._report(values["step"], {name: x for name, x in values.items() if name != "step"})


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


class StopSignal:
    """SIGTERM asks for an end after the current step."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_) -> None:
        self.received = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank has received it: all ranks must end after the same step. A collective."""
        if dist.get_world_size() == 1:
            return self.received
        flag = torch.tensor(int(self.received), dtype=torch.int32, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


# ---------------------------------------------------------------------------- checkpoints of a run


def save_checkpoint(
    output_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, limit: int
) -> None:
    """Writes checkpoints/step-000100, whole or not at all, and keeps the newest `limit` up to this one. Later ones are
    removed: they are what a run that was resumed from an earlier step could not read."""
    path = output_dir / "checkpoints" / f"step-{step:06d}"
    staging = path.with_name(f".{path.name}.partial")
    for left_over in path.parent.glob(".step-*.partial") if is_main_rank() else ():  # of a run killed while saving
        shutil.rmtree(left_over)
    _barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    try:
        dcp.save(state, checkpoint_id=staging, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # a BaseException
        reasons = "; ".join(str(failure[0]) for failure in error.failures.values())
        raise OSError(f"{staging}: cannot be written: {reasons}") from error
    if is_main_rank():  # dcp.save returns when all ranks have written
        shutil.rmtree(path, ignore_errors=True)
        os.rename(staging, path)
        found = _checkpoints(output_dir)
        kept = found[: found.index(path) + 1][-limit:]
        for other in found:
            if other not in kept:
                shutil.rmtree(other)
    _barrier()


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _checkpoints(output_dir: Path) -> list[Path]:
    """From the oldest to the newest."""
    found = [path for path in (output_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def load_newest_checkpoint(output_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Puts the newest usable checkpoint into the model and the optimizer and returns its step; 0 if there is none,
    which it says. A broken one is passed over with a warning; ValueError if all are broken."""
    found = _checkpoints(output_dir)
    say = print if is_main_rank() else lambda _: None
    if not found:
        say(f"{output_dir}: no checkpoint to resume from, starting from the beginning")
        return 0
    for path in reversed(found):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        try:
            logging.disable(logging.CRITICAL)  # it logs tracebacks of what is reported here in a line
            if not (path / ".metadata").is_file():
                raise FileNotFoundError(".metadata is missing")
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        except (CheckpointException, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            failures = error.failures.values() if isinstance(error, CheckpointException) else [(error,)]
            reason = " ".join(str(next(iter(failures))[0]).split())[:200]
            say(f"{path}: broken, trying the one before ({reason})")
            continue
        finally:
            logging.disable(logging.NOTSET)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        say(f"{path}: resuming after step {int(path.name[5:])}")
        return int(path.name[5:])
    raise ValueError(
        f"{output_dir / 'checkpoints'}: no checkpoint can be read; remove them to start from the beginning"
    )
