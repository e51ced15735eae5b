"""training/train_dpo.py: kills and resumes, with a cache of the reference's log-probs that is right or wrong, and
refusals."""

import math
import os
import random
import shutil
import signal
import time
import types

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.checkpoint import open_folder
from tests import tiny
from tests.forked import Forked
from tests.training.test_finetune_sft import assert_same_weights, weights_of
from tests.training.test_finetune_sft_refusals import copy_with
from tests.training.test_finetune_sft_runs import deterministic, stop_after
from tests.training.test_train_dpo import RECORDS, SCRIPT, flags, metrics_of, train
from training import reference, train_dpo
from training.data import training_batches
from training.frozen import check_reader


@pytest.fixture(scope="module")
def train_file(tmp_path_factory):
    return tiny.write_records(tmp_path_factory.mktemp("data") / "train.jsonl", RECORDS)


# ------------------------------------------------------------------------------------ kill and resume

RUN = {"batch_size": 3, "micro_batch_size": 2, "num_epochs": 4, "weight_decay": 0.1, "warmup_ratio": 0.2}
LAST_STEP = 16


@pytest.fixture(scope="module")
def run_flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied") / "in"
    tiny.write_model(folder, tie_word_embeddings=True, attention_bias=True)
    path = tiny.write_records(folder.parent / "train.jsonl", RECORDS)
    return folder, path


@pytest.fixture(scope="module")
def whole(run_flags, tmp_path_factory):
    """The run that is not interrupted; read it only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(*run_flags, out, **RUN, save_steps=6)
    return out


def assert_same_run(resumed, whole, last_step=LAST_STEP):
    assert_same_weights(resumed, whole)
    ours, theirs = metrics_of(resumed), metrics_of(whole)
    assert deterministic(ours) == deterministic(theirs)
    assert [line["step"] for line in ours] == list(range(1, last_step + 1))


READ = "log-probs of the reference read, a batch of "


def test_kill_and_resume(whole, run_flags, tmp_path):
    """Catches a reference that changed with the policy after a resume, and what test_finetune_sft_runs.py lists."""
    run, out = {**RUN, "save_steps": 2}, tmp_path / "out"
    process = Forked(SCRIPT, *flags(*run_flags, out, **run))
    while process.poll() is None and not (out / "checkpoints/step-000002").exists():
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.15))
    process.kill()
    _, errors = process.communicate(timeout=240)
    done = (out / "config.json").exists()  # it may have finished before the signal
    assert process.returncode in ({0, -signal.SIGKILL} if done else {-signal.SIGKILL}), errors
    result = train(*run_flags, out, **run, resume=True)
    assert "resuming after step" in result.stdout and f"reference/train.safetensors: {READ}" in result.stdout
    assert_same_run(out, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("more", [{}, {"precompute_ref": False}], ids=["precomputed", "in each step"])
def test_resume_without_the_cache(dtype, more, run_flags, tmp_path, monkeypatch):
    """Catches a reference recomputed from the policy's checkpoint, or a head and embedding left gathered by the
    reference's forward pass, in the first step after a resume."""
    run = {**RUN, **more, "dtype": dtype, "max_steps": 9}
    train(*run_flags, tmp_path / "whole", **run)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert "stopped by a signal after step 7;" in train(*run_flags, out, **run).stdout
    (out / "reference/train.safetensors").unlink(missing_ok=True)
    assert READ not in train(*run_flags, out, **run, resume=True).stdout
    assert_same_run(out, tmp_path / "whole", last_step=9)


def test_stop_while_the_reference_runs(whole, run_flags, tmp_path, monkeypatch):
    """Catches log-probs of the reference that a signal or a kill discards: a job whose time is over before they are all
    computed would never get past them. The batches are of 3, 3, 3 and 1 pairs, in micro-batches of 2 and 1."""
    run, out, cache = {**RUN, "save_steps": 6}, tmp_path / "out", tmp_path / "out/reference/train.safetensors"
    pair_logps, calls = train_dpo.pair_logps, []

    def at_call(number, event):
        def counted(*args):
            calls.append(number)
            if len(calls) == number:
                event()
            return pair_logps(*args)

        calls.clear()
        monkeypatch.setattr(train_dpo, "pair_logps", counted)

    def known():
        return int(load_file(cache)["logps"].isfinite().all(dim=1).sum())

    at_call(3, lambda: os.kill(os.getpid(), signal.SIGTERM))  # within the second batch
    assert "stopped by a signal while it loaded; go on with --resume" in train(*run_flags, out, **run).stdout
    assert len(calls) == 3 and known() == 3
    monkeypatch.setattr(reference, "WRITE_SECONDS", 0)
    at_call(2 + 2 + 1, lambda: os.read(-1, 1))  # the first batch again, the second, and half of the third
    assert tiny.run(SCRIPT, *flags(*run_flags, out, **run, resume=True)).code == 2
    assert known() == 6
    at_call(0, None)
    assert READ in train(*run_flags, out, **run, resume=True).stdout
    assert calls and known() == 10
    assert_same_run(out, whole)


def change_cache(path, change):
    logps = load_file(path)["logps"]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"logps": change(logps)}, path, metadata=metadata)


def test_a_cache_that_is_wrong(whole, run_flags, tmp_path):
    """Catches log-probs of another reference, a broken file or other pairs' values used silently."""
    out = shutil.copytree(whole, tmp_path / "out")
    cache = out / "reference/train.safetensors"
    shutil.rmtree(out / "checkpoints/step-000016")
    change_cache(cache, lambda logps: logps + 0.05)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    tampered = tiny.run(SCRIPT, *flags(*run_flags, out, **RUN, resume=True))
    tiny.assert_refused(tampered, f"{cache}: record ", "remove the file to compute all anew")
    cache.write_bytes(cache.read_bytes()[:-5])
    tiny.assert_refused(tiny.run(SCRIPT, *flags(*run_flags, out, **RUN, resume=True)), f"{cache}: cannot be read")
    cache.write_bytes(before[cache])
    assert all(path.read_bytes() == content for path, content in before.items())
    # the same command, but the reference is another model now
    folder = copy_with(run_flags[0], tmp_path / "in")
    run = flags(folder, run_flags[1], tmp_path / "again", **RUN, save_steps=6)
    assert tiny.run(SCRIPT, *run, "--max_steps", 1).code == 0
    weights = weights_of(folder)
    weights["model.norm.weight"][5] += 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = tiny.run(SCRIPT, *run, "--max_steps", 1, "--resume")
    tiny.assert_refused(result, "--checkpoint_path: other content than the run was begun with")
    result = tiny.run(SCRIPT, *run, "--max_steps", 1, "--resume", "--accept_changed", "checkpoint_path")
    assert result.code == 0 and "another reference or another dtype; computing anew" in result.stdout
    # and the base of adapters, which is the reference, is quantised now
    run = [*flags(*run_flags, tmp_path / "lora", **RUN, lora_r=2), "--max_steps", 1]
    assert tiny.run(SCRIPT, *run).code == 0
    more = ["--resume", "--quantize_base", "int8", "--accept_changed", "quantize_base"]
    assert "another reference or another dtype; computing anew" in tiny.run(SCRIPT, *run, *more).stdout


@pytest.mark.parametrize("name, value", [("beta", 0.2), ("loss", "hinge"), ("label_smoothing", 0.1)])
def test_another_loss_on_resume(name, value, whole, run_flags, tmp_path):
    """Catches a run that resumes with another loss."""
    out = shutil.copytree(whole, tmp_path / "out")
    result = tiny.run(SCRIPT, *flags(*run_flags, out, **RUN, resume=True, **{name: value}))
    tiny.assert_refused(result, f"the run was begun with other --{name}")


# ---------------------------------------------------------------------------------------- bad input


def test_non_finite_loss(run_flags, tmp_path, monkeypatch):
    """Catches a run that goes on with NaN, saves it over the last good checkpoint or hides its step and records."""
    calls, real = [], train_dpo.dpo_loss

    def overflows(*args, **kwargs):
        calls.append(1)  # 2 + 2 + 1 + 2 micro-batches in steps 1 to 4, and a finite one in step 5
        found = real(*args, **kwargs)
        return found._replace(losses=found.losses * (math.inf if len(calls) > 8 else 1))

    monkeypatch.setattr(train_dpo, "dpo_loss", overflows)
    run = {**RUN, "batch_size": 4, "save_steps": 2}
    result = tiny.run(SCRIPT, *flags(*run_flags, tmp_path / "out", **run))
    batches = dict(training_batches(10, 4, seed=0, shuffle=True, first_step=1, last_step=9))
    shown = ", ".join(map(str, batches[5]))
    tiny.assert_refused(result, "step 5: loss is inf", f"records of the step (from 0): {shown}\n")
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [1, 2, 3, 4]
    assert sorted(os.listdir(tmp_path / "out/checkpoints")) == ["step-000002", "step-000004"]
    assert not (tmp_path / "out/config.json").exists()


def test_infinite_reference(folder, train_file, tmp_path):
    """Catches training on log-probs of a broken reference."""
    broken = copy_with(folder, tmp_path / "in", lambda w: w["model.norm.weight"].__setitem__(3, math.inf))
    result = tiny.run(SCRIPT, *flags(folder, train_file, tmp_path / "out", ref_checkpoint_path=broken))
    tiny.assert_refused(result, "the reference gives record ", "not finite")
    assert not (tmp_path / "out").exists()


GOOD = {"prompt": "a", "chosen": " b", "rejected": " c"}
BAD_RECORDS = {
    "empty file": ([], "holds no records"),
    "no rejected": ([GOOD, {"prompt": "a", "chosen": " b"}], "train.jsonl:2: the field 'rejected' is missing"),
    "types": ([GOOD, {**GOOD, "rejected": 3}], "train.jsonl:2: rejected must be text or a list of messages"),
    "all identical": ([{**GOOD, "chosen": " c"}], "chosen and rejected are the same in every record"),
    "margin": ([{**GOOD, "margin": "much"}], "train.jsonl:1: margin must be a finite number"),
    "too long": ([{**GOOD, "chosen": " b" * 99}], "tokens, the limit is 40"),
}
BAD_FLAGS = {
    "smoothing with ipo": ({"loss": "ipo", "label_smoothing": 0.1}, ["--label_smoothing", "--loss ipo"]),
    "smoothing with hinge": ({"loss": "hinge", "label_smoothing": 0.1}, ["--label_smoothing", "--loss hinge"]),
    "robust at a half": ({"loss": "robust", "label_smoothing": 0.5}, ["--label_smoothing 0.5", "robust"]),
    "smoothing": ({"label_smoothing": 0.7}, ["--label_smoothing", "'0.7'"]),
    "beta": ({"beta": 0}, ["--beta", "'0'"]),
    "loss": ({"loss": "kto"}, ["--loss", "kto"]),
    "reference for simpo": ({"loss": "simpo", "ref_checkpoint_path": "x"}, ["--ref_checkpoint_path", "simpo"]),
    "gamma": ({"simpo_gamma": 0.3}, ["--simpo_gamma 0.3 does nothing for --loss sigmoid; it is for simpo"]),
    "alpha": ({"rpo_alpha": 0.3, "loss": "ipo"}, ["--rpo_alpha 0.3 does nothing for --loss ipo; it is for rpo"]),
    "int4 groups": ({"quantize_ref": "int4"}, ["--quantize_ref int4: no group size divides", "intermediate_size 112"]),
    "given groups": (
        {"quantize_ref": "int4", "group_size": 32},
        ["{folder}: --quantize_ref int4: intermediate_size 112 is not divisible by groups of 32; take int8"],
    ),
    "quantised nothing": (
        {"quantize_ref": "int8", "loss": "simpo"},
        ["--quantize_ref int8 does nothing", "simpo, which has no reference"],
    ),
    "reference in each step for simpo": (
        {"loss": "simpo", "precompute_ref": False},
        ["--no-precompute_ref does nothing for --loss simpo, which has no reference"],
    ),
    "fp8": ({"quantize_ref": "fp8"}, ["--quantize_ref", "fp8"]),
    "no reference there": ({"ref_checkpoint_path": "nowhere"}, ["nowhere: no such file or folder"]),
    "micro batch": ({"micro_batch_size": 5, "batch_size": 4}, ["--micro_batch_size 5", "--batch_size 4"]),
    "eval steps": ({"eval_steps": 3}, ["--eval_steps needs an --eval_file"]),
    "no eval file": ({"eval_file": "nowhere.jsonl"}, ["nowhere.jsonl: no such file"]),
}


@pytest.mark.parametrize("name", [*BAD_RECORDS, *BAD_FLAGS])
def test_bad_input(name, folder, train_file, tmp_path):
    """Catches a mistake found late or never, a traceback, and output left behind."""
    given, parts = BAD_FLAGS.get(name, ({"overlong": "refuse"}, [BAD_RECORDS.get(name, (0, ""))[1]]))
    if name in BAD_RECORDS:
        train_file = tiny.write_records(tmp_path / "train.jsonl", BAD_RECORDS[name][0])
    result = tiny.run(SCRIPT, *flags(folder, train_file, tmp_path / "out", **given))
    tiny.assert_refused(result, *(part.replace("{folder}", str(folder)) for part in parts))
    assert not (tmp_path / "out").exists()


def test_reference_that_does_not_fit(folder, train_file, tmp_path):
    """Catches a reference with another vocabulary, a shorter context, broken weights or an edited file, or that cannot
    be sharded as the policy is, and an error that comes only after the pairs were read."""
    tiny.write_model(tmp_path / "vocabulary", vocab_size=400)
    tiny.write_model(tmp_path / "context", max_position_embeddings=32)
    copy_with(folder, tmp_path / "weights", lambda w: w.pop("model.norm.weight"))
    train(folder, train_file, tmp_path / "edited", max_steps=0)
    with open(tmp_path / "edited/config.json", "a") as file:
        file.write("\n")
    parts = {"vocabulary": "400", "context": "32 tokens; lower --max_seq_len", "weights": "missing tensors"}
    for name, part in (parts | {"edited": "config.json: is damaged or was edited"}).items():
        args = flags(folder, "nowhere.jsonl", tmp_path / "out", ref_checkpoint_path=tmp_path / name)
        tiny.assert_refused(tiny.run(SCRIPT, *args), str(tmp_path / name), part)
        assert not (tmp_path / "out").exists()
    args = types.SimpleNamespace(tensor_parallel_size=4)
    with pytest.raises(ValueError, match="tensor_parallel_size 4"):
        check_reader("reference", folder, open_folder(folder), args)
