"""Checkpoints of a run: model and optimizer as they are after a step, in OUT/checkpoints/step-000100.

- written by torch.distributed.checkpoint, each rank its own shards, so another layout can read them
- a checkpoint is whole or absent, and its content is checked (manifest.py); --resume takes the newest sound one
- it holds tensors alone: weights, buffers and moments. What the flags say, learning rates and decay for example, comes
  from the flags
- saving writes to nothing: torch's get_state_dict would let an optimizer that has not stepped take a step
"""

import logging
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from models.checksums import agreed
from models.common import is_main_rank, on_main, say
from models.tp import local
from training.manifest import HAS_MANIFEST, Reader, TensorPlanner, open_checkpoint, write_manifest
from training.stop import any_rank

Optimizers = torch.optim.Optimizer | list[torch.optim.Optimizer]


def all_fit(model: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Whether all weights that are trained are finite, in dtype, or as they are stored; a scalar head stays as it is. A
    collective."""
    fits = []
    for name, parameter in model.named_parameters():
        part, kept = local(parameter.detach()), dtype is None or name.endswith("score.weight")
        if parameter.requires_grad and part.numel():
            most = torch.finfo(part.dtype if kept else dtype).max
            fits.append(torch.linalg.vector_norm(part, math.inf, dtype=torch.float32) <= most)  # of a NaN: False
    return not any_rank([bool(fits) and not bool(torch.stack(fits).all())])[0]


class CheckpointWriter:
    """Writes checkpoints/step-000100, whole or not at all, and keeps the newest `limit` up to it. Later ones are
    removed: they are what a run that was resumed from an earlier step could not read.

    asynchronous: save returns when the state is copied to the CPU's memory, and a thread writes it while training goes
    on; it has its final name as soon as all ranks have written. A failure is raised by the next save or by finish,
    which comes before the process ends; a run that ends by an error drops what is still being written.
    """

    def __init__(
        self, output_dir: Path, model: nn.Module, optimizer: Optimizers, *, limit: int, asynchronous: bool = False
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
        state = {**_state(self.model, self.optimizer), HAS_MANIFEST: torch.ones(())}
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
            write_manifest(staging, int(path.name[5:]), self._group)
        except (CheckpointException, OSError) as error:  # the one, a BaseException, when all ranks have ended writing
            if is_main_rank():
                shutil.rmtree(staging, ignore_errors=True)  # it may be what fills the disk
            failures = error.failures.values() if isinstance(error, CheckpointException) else [(error,)]
            reasons = "; ".join(dict.fromkeys(_reason(failure[0]) for failure in failures))
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


def _reason(error: BaseException) -> str:
    """Why a rank could not write: torch's writer says where it was, and the system's word is lost on the way here."""
    return f"{error}; most likely the disk is full" if "inline_container" in str(error) else str(error)


def _one_thread(model: nn.Module) -> ThreadPoolExecutor:
    if not next(model.parameters()).is_cuda:
        return ThreadPoolExecutor(max_workers=1)
    # a thread begins on the first GPU, which belongs to another rank
    device = torch.cuda.current_device()
    return ThreadPoolExecutor(max_workers=1, initializer=torch.cuda.set_device, initargs=(device,))


def _state(model: nn.Module, optimizer: Optimizers) -> dict:
    """What a checkpoint holds, the tensors themselves and not copies: {"model": {name: tensor}, "optimizer": {"state":
    {name of a parameter: {"exp_avg": tensor, ...}}}}. Tied weights have the first of their names, and what is frozen is
    left out: it is in the folder that the run began with."""
    weights: dict[str, Tensor] = {}
    name_of: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if id(tensor) not in name_of and not is_frozen:
            name_of[id(tensor)], weights[name] = name, tensor.detach()
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    states = {name_of[id(p)]: dict(state) for each in optimizers for p, state in each.state.items()}
    return {"model": weights, "optimizer": {"state": states}}


def _copied(state: dict | Tensor) -> dict | Tensor:
    """A state dict with its tensors copied to the CPU."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return state.detach().to("cpu", copy=True)


def _checkpoints(output_dir: Path) -> list[Path]:
    """From the oldest to the newest."""
    paths = [path for path in (output_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(paths, key=lambda path: int(path.name[5:]))


def load_newest_checkpoint(output_dir: Path, model: nn.Module, optimizer: Optimizers) -> int:
    """Puts the newest sound checkpoint into the model and the optimizer and returns its step; 0 if there is none, which
    it says. A broken one is passed over with a warning, by all ranks if one finds it so; ValueError if all are broken.
    A collective."""
    listed = on_main(lambda: _checkpoints(output_dir))
    if not listed:
        say(f"{output_dir}: no checkpoint to resume from, starting from the beginning")
        return 0
    reasons = []
    for path in reversed(listed):
        step, reason = int(path.name[5:]), _load(path, model, optimizer)
        if reason is None:
            say(f"{path}: resuming after step {step}")
            return step
        reasons.append(reason)
        say(f"{path}: broken, trying the one before ({reason})")
    raise ValueError(
        f"{output_dir / 'checkpoints'}: no checkpoint can be read by this run, the newest since {reasons[0]}; give the "
        "flags that they were written with, or take another --output_dir to start from the beginning"
    )


def _load(path: Path, model: nn.Module, optimizer: Optimizers) -> str | None:
    """Puts a checkpoint into the model and the optimizer, or says in a line what is wrong with it. A collective."""
    state, opened = _state(model, optimizer), []

    def open_it() -> None:
        opened.append(open_checkpoint(path, int(path.name[5:])))
        unused = opened[0].state_dict_metadata.keys() - _names_in(state)
        for name in sorted(name for name in unused if name.startswith("optimizer.state.")):
            raise ValueError(f"it holds {name}, and this run's optimizer has no such state")

    def load_it() -> None:
        reader, planner = Reader(path, opened[0]), TensorPlanner()
        dcp.load(state, storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())

    return agreed(_failure(open_it)) or agreed(_failure(load_it))


def _names_in(state: dict, prefix: str = "") -> set[str]:
    """The names that torch gives the tensors of a nested state."""
    names = set()
    for key, value in state.items():
        names |= _names_in(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
    return names


def _failure(action: Callable[[], None]) -> str | None:
    """Why an action on a checkpoint failed, in a line of at most 200 characters, or None."""
    try:
        logging.disable(logging.CRITICAL)  # torch logs tracebacks of what is reported here in a line
        action()
        return None
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else [(error,)]
        return " ".join(str(next(iter(failures))[0]).split())[:200]
    finally:
        logging.disable(logging.NOTSET)
