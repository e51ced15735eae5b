"""training/run_dir.py and training/output_dir.py: checks and records of a run, and refused resumes."""

import json
import math
import os
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from models import identity, shared
from models.common import flag
from models.config import ModelConfig
from models.files import write_json
from models.functions import FunctionPlace
from models.identity import CONTENTS, begun_with
from models.quantize import rounding_scheme
from tests import tiny
from tests.models.test_shared import answer_of, end, in_child
from training.data import DataArgs
from training.metrics import Metrics
from training.optim import OptimArgs
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
