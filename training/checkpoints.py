"""Checkpoints of a run: the model and the optimizer after a step, in OUT/checkpoints/step-000100.

- written by torch.distributed.checkpoint, each rank its own shards, so that another layout can read them
- a checkpoint is complete or absent, and its content is verified (manifest.py); --resume takes the newest intact one
- it holds tensors only: weights, buffers and moments. Settings such as learning rate and decay come from the flags
- saving does not change the state, whereas torch's get_state_dict makes an optimizer that has not stepped take a step
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from models.checksums import agreed
from models.common import is_main_rank, on_main, say
from models.fingerprint import ADAPTER_CONFIG
from models.tp import local
from training.manifest import Reader, TensorPlanner, open_checkpoint, write_manifest
from training.metrics import logged
from training.stop import any_rank

Optimizers = torch.optim.Optimizer | list[torch.optim.Optimizer]


def all_fit(model: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Returns whether all trained weights are finite, after a cast to dtype if given (a scalar head is not cast). A
    collective."""
    fits = []
    for name, parameter in model.named_parameters():
        part, kept = local(parameter.detach()), dtype is None or name.endswith("score.weight")
        if parameter.requires_grad and part.numel():
            most = torch.finfo(part.dtype if kept else dtype).max
            fits.append(torch.linalg.vector_norm(part, math.inf, dtype=torch.float32) <= most)  # of a NaN: False
    return not any_rank([bool(fits) and not bool(torch.stack(fits).all())])[0]


class CheckpointWriter:
    """Writes checkpoints/step-000100, completely or not at all, and keeps the newest `limit` up to it. Checkpoints of
    later steps are deleted: the run was resumed from an earlier step because it could not read them.

    asynchronous: save returns when the state is copied to the CPU's memory, and a thread writes it while training
    continues. The checkpoint gets its final name when all ranks have written. If writing fails, the next save raises,
    or finish at the end of the run; a run that ends with an error drops a checkpoint that is still being written.
    """

    def __init__(
        self, output_dir: Path, model: nn.Module, optimizer: Optimizers, *, limit: int, asynchronous: bool = False
    ):
        self.output_dir, self.model, self.optimizer, self.limit = output_dir, model, optimizer, limit
        self._thread = _one_thread(model) if asynchronous else None
        self._pending: Future | None = None
        # a group of its own, since its collectives run concurrently with those of training and could be mixed up
        self._group = dist.new_group(backend="gloo") if asynchronous and dist.is_initialized() else None

    def save(self, step: int) -> None:
        """Saves the current state of model and optimizer. A collective."""
        self.finish()
        path = self.output_dir / "checkpoints" / f"step-{step:06d}"
        on_main(lambda: _remove(path.parent.glob(".step-*.partial")))  # of a run killed while saving
        state = _state(self.model, self.optimizer)
        if self._thread is None:
            self._write(state, path)
        else:
            self._pending = self._thread.submit(self._write, _copied(state), path)

    def finish(self) -> None:
        """Waits until the last checkpoint has its final name. Raises OSError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: dict, path: Path) -> None:
        staging = path.with_name(f".{path.name}.partial")
        try:
            # copying ahead would wait for the stream on which a GPU trains, even for copies in the CPU's memory
            writer = dcp.FileSystemWriter(staging, per_thread_copy_ahead=0)
            dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=not dist.is_initialized())
            write_manifest(staging, int(path.name[5:]), self._group)
        except (CheckpointException, OSError) as error:  # the first is a BaseException, raised when all ranks are done
            if is_main_rank():
                shutil.rmtree(staging, ignore_errors=True)  # it may have filled the disk
            failures = error.failures.values() if isinstance(error, CheckpointException) else [(error,)]
            reasons = "; ".join(dict.fromkeys(_reason(failure[0]) for failure in failures))
            raise OSError(f"{staging}: cannot be written: {reasons}") from error
        if not is_main_rank():
            return
        shutil.rmtree(path, ignore_errors=True)  # dcp.save returns when all ranks have written
        os.rename(staging, path)
        present = _checkpoints(self.output_dir)
        kept = present[: present.index(path) + 1][-self.limit :]
        _remove(other for other in present if other not in kept)


def _remove(folders: Iterable[Path]) -> None:
    """Removes folders, which a user may be removing, too; one that cannot be removed does not end the run."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            say(f"{folder}: cannot be removed, at least not yet")


def _reason(error: BaseException) -> str:
    """Returns why a rank could not write. torch's writer raises only its own position, without the system's error."""
    return f"{error}; most likely the disk is full" if "inline_container" in str(error) else str(error)


def _one_thread(model: nn.Module) -> ThreadPoolExecutor:
    if not next(model.parameters()).is_cuda:
        return ThreadPoolExecutor(max_workers=1)
    # a new thread uses the first GPU, which may belong to another rank
    device = torch.cuda.current_device()
    return ThreadPoolExecutor(max_workers=1, initializer=torch.cuda.set_device, initargs=(device,))


def _state(model: nn.Module, optimizer: Optimizers) -> dict:
    """Returns the contents of a checkpoint, without copying tensors: {"model": {name: tensor}, "optimizer": {"state":
    {name of a parameter: {"exp_avg": tensor, ...}}}}. Tied weights have the first of their names. Frozen weights are
    left out: the run's initial folder holds them."""
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
    """Returns a state dict with its tensors copied to the CPU."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return state.detach().to("cpu", copy=True)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints' folders, from the oldest to the newest."""
    paths = [path for path in (output_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(paths, key=lambda path: int(path.name[5:]))


def check_checkpoints_are_there(output_dir: Path, save_steps: int | None) -> None:
    """Raises ValueError if the folder holds the model of a finished run that took steps and saved checkpoints, and none
    of them: a --resume would train again from the beginning. save_steps: the run's."""
    names = {"--adapter_path": ADAPTER_CONFIG, "--checkpoint_path": "config.json"}
    model = next((flag for flag, name in names.items() if (output_dir / name).is_file()), None)
    if not model or save_steps == 0 or _checkpoints(output_dir):
        return
    if any(values["step"] > 0 for values, _ in logged(output_dir / "metrics.jsonl")):
        raise ValueError(
            f"--resume {output_dir}: holds the model of a finished run, and its checkpoints are gone; go on from the "
            f"model with {model} {output_dir} and another --output_dir"
        )


def load_newest_checkpoint(output_dir: Path, model: nn.Module, optimizer: Optimizers) -> int:
    """Loads the newest intact checkpoint into the model and the optimizer and returns its step; 0, with a message, if
    there is none. If a rank finds a checkpoint broken, all skip it with a warning. Raises ValueError if all are broken.
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
        f"{output_dir / 'checkpoints'}: no checkpoint can be read by this run, the newest because {reasons[0]}; give "
        "the flags that they were written with, or take another --output_dir to start from the beginning"
    )


def _load(path: Path, model: nn.Module, optimizer: Optimizers) -> str | None:
    """Loads a checkpoint into the model and the optimizer, or returns a line that says what is wrong with it. A
    collective."""
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
    """Returns the names that torch gives to the tensors of a nested state."""
    names = set()
    for key, value in state.items():
        names |= _names_in(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
    return names


def _failure(action: Callable[[], None]) -> str | None:
    """Runs an action on a checkpoint; returns why it failed, in at most 200 characters, or None."""
    try:
        logging.disable(logging.CRITICAL)  # torch would log tracebacks of failures that are reported here in one line
        action()
        return None
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else [(error,)]
        return " ".join(str(next(iter(failures))[0]).split())[:200]
    finally:
        logging.disable(logging.NOTSET)
