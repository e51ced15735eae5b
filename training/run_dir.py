"""A run directory, and what every trainer does around its steps.

- args.json, metrics.jsonl, checkpoints/step-000100/ (torch.distributed.checkpoint), and at the end the model itself
- a checkpoint is whole or absent; --resume takes the newest one that can be read
- a resumed run has the flags that it was begun with, but for those that say may_change where they are declared
- Run holds the cadence: what is resumed, logged, evaluated, saved and ended when. A script calls it and keeps its loop
"""

import importlib.util
import json
import logging
import math
import os
import pickle
import shutil
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from models.checkpoint import ModelArgs, save_folder, stored_dtype
from models.common import (
    DTYPES,
    Flag,
    Stopwatch,
    at_least_one,
    chat_day,
    check_alike,
    flag,
    flags_of,
    is_main_rank,
    peak_memory,
    peaks,
    progress_bar,
    read_json_object,
    say,
    write_json,
)
from models.fsdp import full_tensors
from models.model import ModelConfig, read_hf_config


@dataclass(frozen=True, kw_only=True)
class RunArgs(ModelArgs):
    """A run directory, and what goes into it when."""

    output_dir: Path = flag(help="run directory: metrics, checkpoints and at the end the model", may_change=True)
    resume: bool = flag(False, help="go on from the newest checkpoint in --output_dir", may_change=True)
    eval_steps: int | None = flag(
        None, bounds=at_least_one, help="evaluate every so many steps; at the end only", may_change=True
    )
    save_steps: int | None = flag(
        None, bounds=at_least_one, help="save a checkpoint every so many steps; none", may_change=True
    )
    save_total_limit: int = flag(2, bounds=at_least_one, help="checkpoints to keep", may_change=True)
    log_steps: int = flag(1, bounds=at_least_one, help="write metrics every so many steps", may_change=True)
    report_to: str = flag(
        "none",
        choices=("none", "tensorboard", "wandb"),
        help="where else metrics go; the package must be installed",
        may_change=True,
    )
    export_dtype: str | None = flag(
        None, choices=DTYPES, help="dtype of the exported model; the input folder's", may_change=True
    )


class Run:
    """A training run around its steps. It is called, in this order:

    run = Run(args)                                 refuses what cannot go on, before anything is loaded
    run.begin(model, optimizer, ...)                puts both back to the newest checkpoint; first_step, total_steps
    for step, numbers in run.steps(batches):        saves, and ends early for a signal, after the loop's body
        run.check_finite(...)                       names the step and its records
        if run.eval_due: ...
        run.log(metrics)
    if not run.stopped:
        run.export(model)

    step, numbers: of the step under way; first_step: the one to begin with, from 1; stopped: whether a signal ended the
    loop. num_tokens: taken so far; speed() adds to it.
    """

    def __init__(self, args: RunArgs):
        """Raises ValueError if the run would mix with an earlier one, or go on as another."""
        self._signal = StopSignal()
        check_installed(args.report_to)
        args_file = args.output_dir / "args.json"
        earlier = read_json_object(args_file) if args.resume and args_file.exists() else {}
        self.today = chat_day(args.chat_date, earlier.get("chat_date"))
        args = replace(args, chat_date=self.today.isoformat())
        prepare_output_dir(args)
        self.args, self.stopped, self.num_tokens = args, False, 0

    def begin(self, model: nn.Module, optimizer, *, total_steps: int, device: torch.device) -> None:
        """With --resume model and optimizer (or a list of them) are put back to what they were. Writes args.json.
        Raises ValueError if the run has gone further than it is asked to."""
        args = self.args
        check_alike(self.today, "the day")
        done = load_newest_checkpoint(args.output_dir, model, optimizer) if args.resume else 0
        if done > total_steps:
            raise ValueError(f"--resume: the run has done {done} steps already, and only {total_steps} are asked for")
        if is_main_rank():
            args.output_dir.mkdir(parents=True, exist_ok=True)
            write_args(args)
        self.first_step, self.total_steps, self.device = done + 1, total_steps, device
        self._metrics = Metrics(args.output_dir, after_step=done, report_to=args.report_to)
        # in the background on a GPU; of an offloaded model that would hold the state in the CPU's memory twice
        in_background = next(model.parameters()).is_cuda
        self._checkpoints = CheckpointWriter(
            args.output_dir, model, optimizer, limit=args.save_total_limit, asynchronous=in_background
        )
        self._export_dtype = DTYPES[args.export_dtype] if args.export_dtype else stored_dtype(args.checkpoint_path)

    def steps(self, batches: Iterable[tuple[int, list[int]]], unit: str = "step") -> Iterator[tuple[int, list[int]]]:
        """Yields (step, numbers of its records) of `batches`, from first_step on; after each step the checkpoint that
        is due, and after the last, or one in which a signal came, whatever is to be closed."""
        self._watch = Stopwatch(self.device)
        self._bar = progress_bar(total=self.total_steps, initial=self.first_step - 1, desc="training", unit=unit)
        for self.step, self.numbers in batches:
            self._watch.lap()
            yield self.step, self.numbers
            self._bar.update(1)
            self.stopped = self._signal.agreed(self.device)
            if self.stopped or self._save_due():
                self._checkpoints.save(self.step)
            if self.stopped:
                break
        self._checkpoints.finish()
        self._bar.close()
        self._metrics.close()
        if self.stopped:
            say(f"stopped by a signal after {unit} {self.step}; go on with --resume")

    @property
    def eval_due(self) -> bool:
        """Whether this step ends with an evaluation."""
        every = self.args.eval_steps
        return self.step == self.total_steps or (every is not None and self.step % every == 0)

    def _save_due(self) -> bool:
        every = self.args.save_steps
        return every is not None and (self.step == self.total_steps or self.step % every == 0)

    def check_finite(self, **values: float | Tensor) -> None:
        """Raises ValueError that names the step and its records if a value is not finite."""
        check_finite(self.step, self.numbers, **values)

    def speed(self, config: ModelConfig, lengths: list[int], flops_factor: float = 1.0) -> dict[str, float]:
        """The metrics num_tokens, tokens_per_second, and mfu where the device's peak is known, of the time since the
        step began. lengths: of the sequences in it; flops_factor: what is computed, relative to a forward and
        backward."""
        self.num_tokens += sum(lengths)
        rate = sum(lengths) / self._watch.lap()
        metrics = {"num_tokens": self.num_tokens, "tokens_per_second": rate}
        peak = peaks(self.device)
        if peak is not None:
            mean_len = sum(n * n for n in lengths) / sum(lengths)  # the length of its sequence, for the average token
            metrics["mfu"] = flops_factor * rate * config.training_flops_per_token(mean_len) / peak[0]
        return metrics

    def log(self, metrics: dict[str, float], shown: str | None = None) -> None:
        """Writes the metrics of this step, under any names, if they are due. shown: what the progress bar says, beside
        the speed; the loss."""
        if self.eval_due or self.step % self.args.log_steps == 0:
            self._metrics.write({"step": self.step, **metrics})
        parts = [shown] if shown else [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
        parts += [f"{metrics[name]:,.0f} tok/s" for name in ("tokens_per_second",) if name in metrics]
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def show(self, text: str) -> None:
        """Prints on the main rank, above the progress bar."""
        if is_main_rank():
            self._bar.write(text)

    def export(self, model: nn.Module, config: dict | None = None, *, what: str = "model", subfolder: str = "") -> None:
        """Writes the model as a Hugging Face folder into the run directory. A collective. config: of its config.json;
        that of the folder the run began with."""
        folder = self.args.output_dir / subfolder
        config = config or read_hf_config(self.args.checkpoint_path)[0]
        start = self.args.checkpoint_path
        save_folder(folder, full_tensors(model), config=config, copy_from=start, dtype=self._export_dtype)
        say(f"{folder}: {what} written; peak memory {peak_memory(self.device) / 1e9:,.2f} GB")


def check_finite(step: int, numbers: list[int], **values: float | Tensor) -> None:
    """Raises ValueError that names the step and its records if a value is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            shown = ", ".join(map(str, numbers[:64])) + (", ..." if len(numbers) > 64 else "")
            raise ValueError(f"step {step}: {name} is {float(value)}; records of the step (from 0): {shown}")


# ------------------------------------------------------------------------------------------- flags


def prepare_output_dir(args: RunArgs) -> None:
    """Raises ValueError if the run would mix with an earlier one, or go on with flags that make it another."""
    folder = args.output_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder}: is a file")
    if not args.resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--output_dir {folder}: is not empty; take another, empty it, or go on with --resume")
    if (folder / "config.json").exists() and not (folder / "args.json").exists():
        raise ValueError(f"--output_dir {folder}: holds a model and no run to --resume; it would be overwritten")
    if args.resume and (folder / "args.json").exists():
        earlier = read_json_object(folder / "args.json")
        changed = [f"--{each.name}" for each in flags_of(type(args)) if _is_changed(each, args, earlier)]
        if changed:
            raise ValueError(f"--resume {folder}: the run was begun with other {', '.join(changed)}")


def _is_changed(each: Flag, args: RunArgs, earlier: dict) -> bool:
    """Whether a flag has another value than a run was begun with, and may not. A flag that is younger than the run had
    its default there."""
    if each.may_change(args) if callable(each.may_change) else each.may_change:
        return False
    default = None if each.default is MISSING else _recorded(each.default)
    return earlier.get(each.name, default) != _recorded(getattr(args, each.name))


def _recorded(value: object) -> object:
    """A flag's value as args.json holds it; paths are absolute, so that a run can be resumed from elsewhere."""
    value = value.resolve() if isinstance(value, Path) else value
    return json.loads(json.dumps(value, default=str))


def write_args(args: RunArgs) -> None:
    """args.json: the flags of the run."""
    values = {each.name: _recorded(getattr(args, each.name)) for each in flags_of(type(args))}
    write_json(args.output_dir / "args.json", values)


def check_installed(report_to: str) -> None:
    """Raises ValueError that says what to install for --report_to."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise ValueError(f"--report_to {report_to}: the package is not installed; pip install {report_to}")


def open_log(path: Path, after_step: int) -> IO[str]:
    """A file of JSON lines, each with its `step`, to append to; the lines of an earlier run after `after_step` are
    dropped, to be written again, and a torn one."""
    kept = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n"):
            try:
                if json.loads(line)["step"] <= after_step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: not a line that a training script wrote") from None
    staging = path.with_name(f".{path.name}.partial")
    staging.write_bytes(b"".join(kept))
    os.replace(staging, path)
    # backslashreplace writes half a surrogate pair, which UTF-8 cannot hold, as JSON's own escape
    return open(path, "a", encoding="utf-8", errors="backslashreplace")


class Metrics:
    """metrics.jsonl: one object for each logged step, flushed at once; the main rank's business alone."""

    def __init__(self, output_dir: Path, *, after_step: int = 0, report_to: str = "none"):
        """after_step: when resuming, the step of the checkpoint; later lines are dropped, to be written again."""
        self._file, self._report, self._close = None, None, None
        if not is_main_rank():
            return
        self._file = open_log(output_dir / "metrics.jsonl", after_step)

        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(output_dir / "tensorboard", purge_step=after_step + 1)
            self._report = lambda step, values: [board.add_scalar(name, x, step) for name, x in values.items()]
            self._close = board.close
        elif report_to == "wandb":
            import wandb

            run = wandb.init(dir=output_dir, name=output_dir.name, resume="allow")
            self._report = lambda step, values: run.log(values, step=step)
            self._close = run.finish

    def write(self, values: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        if self._report is not None:
            self._report(values["step"], {name: x for name, x in values.items() if name != "step"})

    def close(self) -> None:
        """Lets the reporters finish; a run that ends by an error does without."""
        if self._close is not None:
            self._close()


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


class CheckpointWriter:
    """Writes checkpoints/step-000100, whole or not at all, and keeps the newest `limit` up to it. Later ones are
    removed: they are what a run that was resumed from an earlier step could not read.

    asynchronous: save returns when the state is copied to the CPU's memory, and a thread writes it while training goes
    on; it has its final name as soon as all ranks have written. A failure is raised by the next save or by finish,
    which comes before the process ends; a run that ends by an error drops what is still being written.
    """

    def __init__(
        self,
        output_dir: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        limit: int,
        asynchronous: bool = False,
    ):
        self.output_dir, self.model, self.optimizer, self.limit = output_dir, model, optimizer, limit
        self._thread = _one_thread(model) if asynchronous else None
        self._pending: Future | None = None
        # its collectives run beside those of the training, which would otherwise be taken for them
        self._group = dist.new_group(backend="gloo") if asynchronous and dist.is_initialized() else None

    def save(self, step: int) -> None:
        """Saves what the model and the optimizer hold now. A collective."""
        self.finish()
        path = self.output_dir / "checkpoints" / f"step-{step:06d}"
        for left_over in path.parent.glob(".step-*.partial") if is_main_rank() else ():  # of a run killed while saving
            shutil.rmtree(left_over)
        if dist.is_initialized():
            dist.barrier()
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        if self._thread is None:
            self._write(state, path)
        else:
            self._pending = self._thread.submit(self._write, _copied(state), path)

    def finish(self) -> None:
        """Returns when the last checkpoint is in its place; raises OSError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: dict, path: Path) -> None:
        staging = path.with_name(f".{path.name}.partial")
        try:
            dcp.save(state, checkpoint_id=staging, process_group=self._group, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # a BaseException
            reasons = "; ".join(str(failure[0]) for failure in error.failures.values())
            raise OSError(f"{staging}: cannot be written: {reasons}") from error
        if not is_main_rank():
            return
        shutil.rmtree(path, ignore_errors=True)  # dcp.save returns when all ranks have written
        os.rename(staging, path)
        present = _checkpoints(self.output_dir)
        kept = present[: present.index(path) + 1][-self.limit :]
        for other in present:
            if other not in kept:
                shutil.rmtree(other)


def _one_thread(model: nn.Module) -> ThreadPoolExecutor:
    if not next(model.parameters()).is_cuda:
        return ThreadPoolExecutor(max_workers=1)
    # a thread begins on the first GPU, which belongs to another rank
    device = torch.cuda.current_device()
    return ThreadPoolExecutor(max_workers=1, initializer=torch.cuda.set_device, initargs=(device,))


def _copied(state: object) -> object:
    """A state dict with its tensors copied to the CPU."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state.detach().to("cpu", copy=True) if isinstance(state, Tensor) else state


def _checkpoints(output_dir: Path) -> list[Path]:
    """From the oldest to the newest."""
    paths = [path for path in (output_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(paths, key=lambda path: int(path.name[5:]))


def load_newest_checkpoint(output_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Puts the newest usable checkpoint into the model and the optimizer and returns its step; 0 if there is none,
    which it says. A broken one is passed over with a warning; ValueError if all are broken."""
    checkpoints = _checkpoints(output_dir)
    if not checkpoints:
        say(f"{output_dir}: no checkpoint to resume from, starting from the beginning")
        return 0
    for path in reversed(checkpoints):
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
