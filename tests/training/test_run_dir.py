"""training/run_dir.py and training/checkpoints.py: checks, records and checkpoints of a run, and refused resumes."""

import errno
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from models import identity, shared
from models.common import flag
from models.files import write_json
from models.functions import FunctionPlace
from models.identity import CONTENTS, begun_with
from models.model import ModelConfig
from models.quantize import rounding_scheme
from tests import tiny
from tests.forked import Forked
from tests.models.test_shared import answer_of, end, in_child
from training.checkpoints import CheckpointWriter, load_newest_checkpoint
from training.data import DataArgs
from training.metrics import Metrics
from training.optim import OptimArgs, make_optimizer
from training.output_dir import prepare_output_dir
from training.run_dir import Run, RunArgs
from training.train_dpo import DpoArgs


def test_check_finite(tmp_path):
    """Catches a NaN that passes, and an error that does not name the step, the value and the records."""
    run = Run(RunArgs(checkpoint_path=tmp_path, output_dir=tmp_path / "out"))
    run.step, run.numbers = 3, [7, 0, 4]
    run.check_finite(loss=torch.tensor(2.0), grad_norm=0.0)
    for bad in (math.nan, math.inf, torch.tensor(-math.inf)):
        with pytest.raises(ValueError, match=r"step 3: grad_norm is .*: 7, 0, 4$"):
            run.check_finite(loss=1.0, grad_norm=bad)
    run.numbers = list(range(100))
    with pytest.raises(ValueError, match=r"62, 63, \.\.\.$"):
        run.check_finite(loss=math.nan)


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs, DataArgs, OptimArgs):
    """A run."""

    strength: float = flag(1.0, help="a flag that somebody added")
    shown: int = flag(3, help="another, which says that it cannot alter the run", may_change=True)
    functions: list[FunctionPlace] | None = flag(None, help="a list of functions", action="append")
    mine: Path | None = flag(None, help="data of somebody's own")
    late: Path | None = flag(None, help="where the run writes", written=True)


def args_of(folder, **changes):
    given = {"checkpoint_path": folder / "in", "train_file": folder / "a", "output_dir": folder, "resume": True}
    return Args(**{**given, **changes})


def write_args(args):
    """Records a run's flags, with the day and the dtype that it has chosen, as Run does."""
    chosen = {"chat_date": "2026-01-31", "dtype": "float32"}
    write_json(args.output_dir / "args.json", begun_with(replace(args, **chosen)))


def test_output_dir(tmp_path):
    """Catches a run mixed with another one, a user's model overwritten by a run with --resume, and a finished run that
    begins again because its checkpoints were deleted."""
    new = args_of(tmp_path, output_dir=tmp_path / "new")
    prepare_output_dir(replace(new, resume=False))
    prepare_output_dir(new)
    assert not (tmp_path / "new").exists()
    prepare_output_dir(args_of(tmp_path, resume=False))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    prepare_output_dir(args_of(tmp_path))
    with pytest.raises(ValueError, match="not empty"):
        prepare_output_dir(args_of(tmp_path, resume=False))
    with pytest.raises(ValueError, match="is a file"):
        prepare_output_dir(args_of(tmp_path, output_dir=tmp_path / "metrics.jsonl"))
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="no run to --resume"):
        prepare_output_dir(args_of(tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(ValueError, match="no run to --resume"):
        prepare_output_dir(args_of(tmp_path))
    write_args(args_of(tmp_path, save_steps=0))  # it saves no checkpoints, and so begins again
    prepare_output_dir(args_of(tmp_path))
    write_args(args_of(tmp_path, report_to="é"))
    with pytest.raises(
        ValueError, match=r"its checkpoints are gone; go on from the model with --adapter_path .*/test_"
    ):
        prepare_output_dir(args_of(tmp_path))
    (tmp_path / "checkpoints/step-000001").mkdir(parents=True)
    prepare_output_dir(args_of(tmp_path))
    written = json.loads((tmp_path / "args.json").read_text(encoding="utf-8"))
    assert written["train_file"] == str(tmp_path / "a") and written["report_to"] == "é"
    assert written.keys() == {field.name for field in fields(Args)} | {CONTENTS}


DENIED = "cannot be written: Permission denied"
# {name: (what makes the folder unwritable, the error)}
UNWRITABLE = {
    "a folder for a file": (lambda out: (out / "config.json").mkdir(), "config.json is a folder"),
    "a file for a folder": (lambda out: (out / "checkpoints").touch(), "checkpoints is a file"),
    "a broken link": (lambda out: (out.rmdir(), out.symlink_to("nowhere")), "is a symbolic link to nothing"),
    "no permission": (lambda out: out.chmod(0o555), f"out {DENIED}"),
    "none for a new folder": (lambda out: (out.rmdir(), out.parent.chmod(0o555)), DENIED),
    "none below": (lambda out: (out / "step-000002").mkdir(0o555), f"step-000002 {DENIED}"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_an_output_dir_that_cannot_be_written(name, monkeypatch):
    """Catches a run that trains first, and only then finds that its model cannot be written."""
    damage, complaint = UNWRITABLE[name]
    with tempfile.TemporaryDirectory() as root:  # pytest's own folder is closed to other users
        out, user = Path(root, "out"), os.geteuid()
        if user == 0:
            os.chown(root, 65534, 65534)
            os.seteuid(65534)  # root may write anywhere
        try:
            out.mkdir()
            damage(out)
            with pytest.raises((OSError, ValueError), match=complaint) as caught:
                prepare_output_dir(args_of(out))
            assert str(caught.value).startswith(f"--output_dir {out}: ")
        finally:
            for folder in (Path(root), out, out / "step-000002"):
                if folder.exists():
                    folder.chmod(0o755)
            os.seteuid(user)


@pytest.mark.parametrize("content", ["", "[]", "{", "5"])
def test_unusable_args_and_metrics(tmp_path, content):
    """Catches a traceback, or an error without the file's name, for files of a run that were edited."""
    (tmp_path / "args.json").write_text(content)
    with pytest.raises(ValueError, match=r"args\.json: "):
        prepare_output_dir(args_of(tmp_path))
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{content or "{}"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        Metrics(tmp_path, after_step=5)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_resume_as_another_run(tmp_path):
    """Catches a resume with other batches, another model, loss or optimizer; a flag that a forker adds and that may
    change because it is on no list; a path refused that differs only in spelling; and a flag refused that alters
    nothing."""
    begun = args_of(tmp_path)
    write_args(begun)
    refused = {"train_file": tmp_path / "b", "batch_size": 8, "weight_decay": 0.1, "seed": 1, "strength": 2.0}
    refused |= {"checkpoint_path": tmp_path / "other", "dtype": "bfloat16", "lr_schedule": "linear", "max_steps": 7}
    for name, value in refused.items():
        other, way_on = f"the run was begun with other --{name}; ", f"knowingly with --accept_changed {name}$"
        with pytest.raises(ValueError, match=f"{other}go on {way_on}"):
            prepare_output_dir(replace(begun, **{name: value}))
        _, now, changed = prepare_output_dir(replace(begun, **{name: value, "accept_changed": ["seed", name]}))
        assert changed == {name} and now[name] == (str(value) if isinstance(value, Path) else value)
    with pytest.raises(ValueError, match="--train_file, --batch_size"):
        prepare_output_dir(replace(begun, train_file=tmp_path / "b", batch_size=8))
    with pytest.raises(ValueError, match=r"other --batch_size; go on knowingly with --accept_changed batch_size$"):
        prepare_output_dir(replace(begun, seed=1, batch_size=8, accept_changed=["seed"]))
    with pytest.raises(ValueError, match=r"^--accept_changed --seed: no flag of this script"):
        prepare_output_dir(replace(begun, seed=1, accept_changed=["--seed"]))
    with pytest.raises(ValueError, match=r"^--accept_changed is for a run that goes on"):
        prepare_output_dir(replace(begun, resume=False, accept_changed=["seed"]))
    for name, value in {"log_steps": 9, "device": "cpu", "shown": 4, "save_steps": 3, "eval_file": tmp_path}.items():
        prepare_output_dir(replace(begun, **{name: value}))
    prepare_output_dir(replace(begun, train_file=tmp_path / "x/../a"))
    recorded = json.loads((tmp_path / "args.json").read_text())
    del recorded["strength"]  # a run from before the flag existed had its default
    write_json(tmp_path / "args.json", recorded)
    prepare_output_dir(begun)
    with pytest.raises(ValueError, match=r"begun with other --strength, --functions; "):
        prepare_output_dir(replace(begun, functions=["f.py:h"], strength=2.0))


def test_resume_of_a_run_that_has_not_ended(tmp_path, monkeypatch):
    """Catches a second run in a folder that is refused only after it has read its data and loaded its model."""
    child, reads = in_child(lambda: shared.hold(tmp_path / ".lock", "x"))
    assert answer_of(reads) == "done"
    monkeypatch.setattr(shared, "GRACE", 0.1)
    args = RunArgs(checkpoint_path=tmp_path, output_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"^--output_dir .*: another run is writing there"):
        Run(args)
    end(child)
    Run(args)


def test_resume_with_other_content(tmp_path):
    """Catches other content accepted under the same path, of a file, a model's folder, a function's file or a forker's
    own; a file refused that has only moved, may change or is written; and an accepted change that is refused the next
    time."""
    files = {name: tmp_path / name for name in ("a", "eval", "mine", "late", "f.py")}
    for path in files.values():
        path.write_text("one\n")
    tiny.write_model(tmp_path / "in")
    given = {"eval_file": files["eval"], "mine": files["mine"], "late": files["late"]}
    begun = args_of(tmp_path, **given, functions=[FunctionPlace(f"{files['f.py']}:g")])
    write_args(begun)

    moved = {"train_file": "a", "mine": "mine", "eval_file": "eval"}
    for name, path in moved.items():
        (tmp_path / f"moved-{path}").write_text("one\n")
        moved[name] = tmp_path / f"moved-{path}"
    shutil.copytree(tmp_path / "in", tmp_path / "in-moved")
    prepare_output_dir(replace(begun, **moved, checkpoint_path=tmp_path / "in-moved"))
    prepare_output_dir(replace(begun, functions=[FunctionPlace(f"{files['f.py'].parent}/../{tmp_path.name}/f.py:g")]))

    config = json.loads((tmp_path / "in/generation_config.json").read_text())
    changes = {
        "train_file": lambda: files["a"].write_text("zero\none\n"),
        "mine": lambda: files["mine"].write_text("two\n"),
        "functions": lambda: files["f.py"].write_text("two\n"),
        "checkpoint_path": lambda: write_json(tmp_path / "in/generation_config.json", {**config, "eos_token_id": 5}),
    }
    for name, change in changes.items():
        prepare_output_dir(begun)
        change()
        files["eval"].write_text(name)
        files["late"].write_text(name)
        wanted = rf"^--resume {tmp_path}: --{name}: other content than the run was begun with; go on knowingly with "
        with pytest.raises(ValueError, match=f"{wanted}--accept_changed {name}$"):
            prepare_output_dir(begun)
        accepting = replace(begun, accept_changed=[name])
        _, now, changed = prepare_output_dir(accepting)
        assert changed == {name}
        write_json(tmp_path / "args.json", now)
        assert prepare_output_dir(accepting)[2] == frozenset()  # the same command after the next kill


def test_what_is_not_hashed(tmp_path, monkeypatch):
    """Catches a folder given for a data file, a model or an adapter that is read whole before it is refused, what the
    run itself writes, and a function's file that is a pipe or a device, which would never end; and a forker's own
    folder that is left out."""
    (tmp_path / "file").write_text("of many")
    places = dict.fromkeys(("train_file", "eval_file", "checkpoint_path", "adapter_path", "mine"), tmp_path)
    args = args_of(tmp_path / "out", **places, functions=[FunctionPlace("/dev/null:f")])
    hashed, real = [], identity.fingerprint
    monkeypatch.setattr(identity, "fingerprint", lambda folder, **how: hashed.append(folder) or real(folder, **how))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    assert begun_with(args)["content_digests"].keys() == {"mine"} and hashed == [tmp_path]


def test_other_ranks_round_in_other_groups(tmp_path):
    """Catches a reference that changes when a run resumes, since int4's groups are as large as fits a rank's shard:
    11,008 inputs are 128 times 86, and a quarter of them 64 times 43."""
    config = ModelConfig.from_hf(LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict())  # LLaMA 2 7B's sizes
    assert [rounding_scheme("int4", None, config, tp).group_size for tp in (1, 4)] == [128, 64]
    paths = {"checkpoint_path": tmp_path / "lm", "train_file": tmp_path / "a", "output_dir": tmp_path}
    for more, refused in (({}, True), ({"group_size": 32}, False), ({"quantize_ref": "int8"}, False)):
        begun = DpoArgs(**{**paths, "resume": True, "quantize_ref": "int4", **more})
        write_args(begun)
        with pytest.raises(ValueError, match="other --tensor_parallel_size; ") if refused else nullcontext():
            prepare_output_dir(replace(begun, tensor_parallel_size=4))
    prepare_output_dir(replace(begun, dp_replicate=2))


def test_a_run_may_get_longer(tmp_path):
    """Catches a longer run refused, and one accepted whose learning rates would not be those of a longer run."""
    begun = args_of(tmp_path, lr_schedule="constant", warmup_ratio=0.0)
    write_args(begun)
    prepare_output_dir(replace(begun, num_epochs=2))
    prepare_output_dir(replace(begun, max_steps=7))
    write_args(replace(begun, lr_schedule="cosine"))
    with pytest.raises(ValueError, match=r"begun with other --num_epochs; "):
        prepare_output_dir(replace(begun, lr_schedule="cosine", num_epochs=2))


# ------------------------------------------------------------------------------------- checkpoints


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


def test_asynchronous_checkpoints(tmp_path):
    """Catches training that changes tensors which are still being written, a save that overtakes the one before, and
    one that waits needlessly."""
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
    saving = Forked("tests/training/test_run_dir.py", tmp_path)
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
