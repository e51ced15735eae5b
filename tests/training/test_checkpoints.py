"""training/checkpoints.py: checkpoints of a run, written, kept, damaged and restored."""

import errno
import os
import resource
import shutil
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import filesystem

from tests.forked import Forked
from training.checkpoints import CheckpointWriter, load_newest_checkpoint
from training.optim import OptimArgs, make_optimizer


def trained(steps, *, tied=True, seed=0):
    """Returns a small model with tied weights and a norm, and its optimizer, after `steps` steps."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "norm": nn.RMSNorm(4), "head": nn.Linear(4, 7, bias=False)})
    if tied:
        model["head"].weight = model["embed"].weight
    optimizer = make_optimizer(model, OptimArgs(learning_rate=0.1, weight_decay=0.1))
    for step in range(1, steps + 1):
        train_step(model, optimizer, step)
    return model, optimizer


def train_step(model, optimizer, step):
    ids = torch.tensor([step % 7, (3 * step) % 7])
    nn.functional.cross_entropy(model["head"](model["norm"](model["embed"](ids))), ids.flip(0)).backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def save(output_dir, step, model, optimizer, *, limit):
    CheckpointWriter(output_dir, model, optimizer, limit=limit).save(step)


def names(output_dir):
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_restores_everything(tied, tmp_path):
    """Catches a moment, a step count or a tied weight lost: the next steps would differ."""
    model, optimizer = trained(3, tied=tied)
    save(tmp_path, 3, model, optimizer, limit=2)
    fresh, fresh_optimizer = trained(0, tied=tied, seed=1)
    assert load_newest_checkpoint(tmp_path, fresh, fresh_optimizer) == 3
    assert torch.equal(weights(fresh), weights(model))
    for step in (4, 5):
        train_step(model, optimizer, step)
        train_step(fresh, fresh_optimizer, step)
        assert torch.equal(weights(fresh), weights(model)), step


@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoint_is_whole_or_absent(asynchronous, tmp_path, monkeypatch):
    """Catches a half-written checkpoint under its final name, leftovers of a killed save that are kept forever, and a
    failure of the thread that is not reported."""
    model, optimizer = trained(1)
    checkpoints = CheckpointWriter(tmp_path, model, optimizer, limit=2, asynchronous=asynchronous)

    rename = os.rename

    def killed(source, target):
        if Path(target).name == "step-000001":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        checkpoints.save(1)
        checkpoints.finish()
    assert load_newest_checkpoint(tmp_path, *trained(0)) == 0
    checkpoints.save(2)
    checkpoints.finish()
    assert names(tmp_path) == ["step-000002"]


def test_asynchronous_checkpoints(tmp_path, monkeypatch):
    """Catches training that changes tensors which are still being written, a save that overtakes the one before, and
    one that waits needlessly, also for the GPU that trains meanwhile."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", mock.Mock(side_effect=AssertionError("waits for the GPU")))
    model, optimizer = trained(0)
    checkpoints = CheckpointWriter(tmp_path, model, optimizer, limit=9, asynchronous=True)
    started, go_on = threading.Event(), threading.Event()
    checkpoints._thread.submit(lambda: started.set() or go_on.wait(60))  # the thread is busy, as with a slow disk
    assert started.wait(60)
    history = {}
    for step in (1, 2, 3):
        train_step(model, optimizer, step)
        history[step] = weights(model)
        checkpoints.save(step)
        if step == 1:
            assert not (tmp_path / "checkpoints/step-000001").exists()
            go_on.set()
    train_step(model, optimizer, 4)
    checkpoints.finish()
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]
    for step in (3, 2, 1):
        fresh, fresh_optimizer = trained(0, seed=1)
        assert load_newest_checkpoint(tmp_path, fresh, fresh_optimizer) == step
        assert torch.equal(weights(fresh), history[step])
        train_step(fresh, fresh_optimizer, step + 1)
        assert torch.equal(weights(fresh), history.get(step + 1, weights(model)))
        shutil.rmtree(tmp_path / f"checkpoints/step-{step:06d}")


def keep_saving(output_dir):
    """Saves in a process of its own, until the test below kills it."""
    model, optimizer = trained(0)
    checkpoints = CheckpointWriter(output_dir, model, optimizer, limit=2, asynchronous=True)
    for step in range(1, 10_000):
        train_step(model, optimizer, step)
        checkpoints.save(step)


def test_kill_during_an_asynchronous_save(tmp_path):
    """Catches a half-written checkpoint under its final name, and one that holds the weights of a later step."""
    saving = Forked("tests/training/test_checkpoints.py", tmp_path)
    folder = tmp_path / "checkpoints"
    while not list(folder.glob("step-*")) or not list(folder.glob(".step-*.partial")):
        assert saving.poll() is None, saving.read("stderr")
        time.sleep(0.001)
    saving.kill()
    saving.communicate()
    model, optimizer = trained(0)
    step = load_newest_checkpoint(tmp_path, model, optimizer)
    assert step > 0 and torch.equal(weights(model), weights(trained(step)[0]))
    CheckpointWriter(tmp_path, model, optimizer, limit=1).save(step + 1)
    assert names(tmp_path) == [f"step-{step + 1:06d}"]


@pytest.mark.parametrize("most", [0, 100_000])
def test_a_file_that_cannot_grow(most, tmp_path):
    """Catches an error that does not give the reason; torch's own speaks of a position in a file."""
    model = nn.Linear(300, 300)
    optimizer, limits = torch.optim.AdamW(model.parameters()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written: .*(File too large|most likely the disk is full)$"):
            save(tmp_path, 1, model, optimizer, limit=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_checkpoint_limit(tmp_path):
    """Catches the newest checkpoint removed instead of the oldest, an order by name (step-1000000 < step-999999), and a
    good checkpoint removed in favour of a later one that could not be read."""
    model, optimizer = trained(1)
    for step in (5, 999_999, 1_000_000):
        save(tmp_path, step, model, optimizer, limit=2)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert load_newest_checkpoint(tmp_path, model, optimizer) == 1_000_000
    save(tmp_path, 7, model, optimizer, limit=1)  # resumed from an earlier one
    assert names(tmp_path) == ["step-000007"]


def test_old_folders_that_cannot_be_removed(tmp_path, monkeypatch, capsys):
    """Catches a run that ends because a user removes an old checkpoint at the same moment, or because a file of it, or
    of a save that was killed, cannot be removed: on an NFS, say, while another process has it open."""
    model, optimizer = trained(1)
    save(tmp_path, 1, model, optimizer, limit=1)
    (tmp_path / "checkpoints/.step-000002.partial").mkdir()

    def remove(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove)
        save(tmp_path, 3, model, optimizer, limit=1)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{tmp_path}/checkpoints/{x}: cannot be removed, at least not yet"
        for x in (".step-000002.partial", "step-000001")
    ]
    save(tmp_path, 4, model, optimizer, limit=1)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000004"]


def damage(path, how):
    if how == "no metadata":
        (path / ".metadata").unlink()
    elif how == "cut metadata":
        (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:50])
    elif how == "empty":
        shutil.rmtree(path)
        path.mkdir()
    else:
        (data,) = path.glob("*.distcp")
        data.unlink() if how == "no data" else data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


@pytest.mark.parametrize("how", ["no metadata", "cut metadata", "no data", "cut data", "empty"])
def test_broken_checkpoints(how, tmp_path, capsys):
    """Catches a resume from half a checkpoint, a crash although an older one is whole, and a silent restart."""
    model, optimizer = trained(0)
    for step in (1, 2):
        train_step(model, optimizer, step)
        save(tmp_path, step, model, optimizer, limit=2)
        if step == 1:
            wanted = weights(model)
    damage(tmp_path / "checkpoints" / "step-000002", how)
    fresh, fresh_optimizer = trained(0, seed=1)
    assert load_newest_checkpoint(tmp_path, fresh, fresh_optimizer) == 1
    printed = capsys.readouterr().out
    assert "step-000002: broken" in printed and "resuming after step 1" in printed
    assert torch.equal(weights(fresh), wanted)
    train_step(fresh, fresh_optimizer, 2)  # the moments too are those of step 1
    assert torch.equal(weights(fresh), weights(model))
    damage(tmp_path / "checkpoints" / "step-000001", how)
    with pytest.raises(ValueError, match="checkpoints: no checkpoint can be read"):
        load_newest_checkpoint(tmp_path, fresh, fresh_optimizer)


def test_no_checkpoint(tmp_path, capsys):
    """Catches --resume refused before the first checkpoint, and a run that does not say where it starts."""
    assert load_newest_checkpoint(tmp_path, *trained(0)) == 0
    assert "no checkpoint to resume from, starting from the beginning" in capsys.readouterr().out


if __name__ == "__main__":
    keep_saving(Path(sys.argv[1]))
