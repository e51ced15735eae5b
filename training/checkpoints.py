"""Checkpoints of a run: model and optimizer as they are after a step, in OUT/checkpoints/step-000100.

- written by torch.distributed.checkpoint, each rank its own shards, so another layout can read them
- a checkpoint is whole or absent; --resume takes the newest one that can be read
"""

import logging
import os
import pickle
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from models.common import is_main_rank, say


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
        except CheckpointException as error:  # a BaseException, when all ranks have ended writing
            if is_main_rank():
                shutil.rmtree(staging, ignore_errors=True)  # it may be what fills the disk
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
