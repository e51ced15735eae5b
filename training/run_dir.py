"""A run directory: its flags, metrics and checkpoints.

- args.json, metrics.jsonl, checkpoints/step-000100/ (torch.distributed.checkpoint), and at the end the model itself
- a checkpoint is whole or absent; --resume takes the newest one that can be read
"""

import importlib.util
import json
import logging
import os
import pickle
import shutil
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from models.model import read_json_object
from models.tp import is_main_rank
from training.common import say, write_json

# A run that goes on with another of these would not be the same run: another model, other batches or another loss.
FIXED_ARGS = (
    "checkpoint_path",
    "train_file",
    "batch_size",
    "shuffle",
    "seed",
    "max_seq_len",
    "overlong",
    "pack",
    "loss",
    "center_coef",
    "step_separator",
    "beta",
    "label_smoothing",
    "simpo_gamma",
    "rpo_alpha",
    "ref_checkpoint_path",
    "quantize_ref",
    "quantize_reward",
    "group_size",
    "prompt_file",
    "reward_checkpoint_path",
    "reward_fn",
    "reward_model_weight",
    "reward_fn_weight",
    "normalize_reward",
    "process_reward",
    "missing_eos_penalty",
    "length_penalty",
    "whiten_rewards",
    "gamma",
    "value_checkpoint_path",
    "rollout_batch_size",
    "minibatch_size",
    "ppo_epochs",
    "max_new_tokens",
    "temperature",
    "kl_coef",
    "kl_in",
    "dtype",
    "param_dtype",
    "optim",
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
        found = _checkpoints(self.output_dir)
        kept = found[: found.index(path) + 1][-self.limit :]
        for other in found:
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
    found = [path for path in (output_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def load_newest_checkpoint(output_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Puts the newest usable checkpoint into the model and the optimizer and returns its step; 0 if there is none,
    which it says. A broken one is passed over with a warning; ValueError if all are broken."""
    found = _checkpoints(output_dir)
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


def begin_or_resume(
    output_dir: Path,
    args: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    resume: bool,
) -> int:
    """The number of the first step to take, from 1; with `resume` the model and the optimizer are put back to what they
    were before it. Writes args.json. Raises ValueError if the run has gone further than it is asked to."""
    done = load_newest_checkpoint(output_dir, model, optimizer) if resume else 0
    if done > total_steps:
        raise ValueError(f"--resume: the run has done {done} steps already, and only {total_steps} are asked for")
    if is_main_rank():
        output_dir.mkdir(parents=True, exist_ok=True)
        write_args(output_dir, args)
    return 1 + done
