"""training/train_rm.py: a kill and its resume, and refusals."""

import math
import os
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.forked import Forked
from tests.training.test_train_rm import SCRIPT, files, flags, train, weights_of  # noqa: F401 (fixtures)
from training import train_rm
from training.data import training_batches

# ------------------------------------------------------------------------------------ kill and resume

RUN = {"batch_size": 3, "micro_batch_size": 2, "num_epochs": 3, "weight_decay": 0.1, "lr_schedule": "cosine"}


def test_kill_and_resume(folder, files, tmp_path):
    """Catches a batch repeated or skipped, a new head on resuming, moments lost, and a step twice in metrics.jsonl."""
    file, out = files["pairwise"], tmp_path / "out"
    run = {**RUN, "loss": "pairwise", "eval_file": file, "eval_steps": 5, "save_steps": 2}
    train(folder, file, tmp_path / "whole", **run)
    process = Forked(SCRIPT, *flags(folder, file, out, **run))
    while process.poll() is None and not (out / "checkpoints/step-000002").exists():
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.1))
    process.kill()
    _, errors = process.communicate(timeout=240)
    done = (out / "config.json").exists()  # it may have finished before the signal
    assert process.returncode in ({0, -signal.SIGKILL} if done else {-signal.SIGKILL}), errors
    assert "resuming after step" in train(folder, file, out, **run, resume=True).stdout
    ours, wanted = weights_of(out), weights_of(tmp_path / "whole")
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)
    ours, wanted = (tiny.read_lines(d / "metrics.jsonl") for d in (out, tmp_path / "whole"))
    timed = {"tokens_per_second"}
    assert [line["step"] for line in ours] == list(range(1, 13))
    assert [{k: line[k] for k in line.keys() - timed} for line in ours] == [
        {k: line[k] for k in line.keys() - timed} for line in wanted
    ]
    assert (out / "config.json").read_bytes() == (tmp_path / "whole/config.json").read_bytes()


# ---------------------------------------------------------------------------------------- bad input


def test_non_finite_loss(folder, files, tmp_path, monkeypatch):
    """Catches a run that goes on with NaN, or does not name its step and records."""
    calls, real = [], train_rm.pairwise_loss
    overflows = lambda *args: real(*args) * (math.nan if len(calls) > 2 else 1)  # noqa: E731
    monkeypatch.setattr(train_rm, "pairwise_loss", lambda *args: calls.append(1) or overflows(*args))
    out = tmp_path / "out"
    result = tiny.run(SCRIPT, *flags(folder, files["pairwise"], out, batch_size=3, save_steps=1))
    order = dict(training_batches(11, 3, seed=0, shuffle=True, first_step=1, last_step=4))
    shown = ", ".join(map(str, order[3]))
    tiny.assert_refused(result, "step 3: loss is nan", f"records of the step (from 0): {shown}\n")
    assert sorted(os.listdir(out / "checkpoints")) == ["step-000001", "step-000002"]
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("loss", ["pairwise", "pointwise"])
def test_non_finite_rewards_of_an_evaluation(loss, folder, files, tmp_path, monkeypatch):
    """Catches an evaluation with NaN that goes on, or ends in a traceback from the calibration error."""
    real = train_rm.all_rewards
    monkeypatch.setattr(train_rm, "all_rewards", lambda *args: real(*args).index_fill(0, torch.tensor([1]), math.nan))
    more = {"loss": loss, "eval_file": files[loss], "eval_steps": 1, "max_steps": 2}
    result = tiny.run(SCRIPT, *flags(folder, files[loss], tmp_path / "out", **more))
    tiny.assert_refused(result, "step 1: eval_rewards is nan; in its evaluation")


def with_weights(folder, target, **changed):
    shutil.copytree(folder, target)
    weights = weights_of(folder) | changed
    weights = {name: w for name, w in weights.items() if w is not None}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


BAD_WEIGHTS = {
    "two labels": ({"lm_head.weight": None, "score.weight": torch.ones(2, 64)}, ["score.weight is [2, 64]", "[1, 64]"]),
    "two heads": ({"score.weight": torch.ones(1, 64)}, ["unexpected tensors: lm_head.weight"]),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_model_folders(name, folder, tmp_path):
    """Catches a classifier of another shape taken for a reward model, one of two heads chosen for the user, and an
    error that comes only after the records were read."""
    changed, parts = BAD_WEIGHTS[name]
    source = with_weights(folder, tmp_path / "in", **changed)
    tiny.assert_refused(tiny.run(SCRIPT, *flags(source, "nowhere.jsonl", tmp_path / "out", max_steps=0)), *parts)
    assert not (tmp_path / "out").exists()


def test_rewards_that_are_not_finite(folder, files, tmp_path, monkeypatch):
    """Catches NaN written into config.json, and a run that is lost with its export."""
    source = with_weights(folder, tmp_path / "in", **{"model.norm.weight": torch.full((64,), math.inf)})
    result = tiny.run(SCRIPT, *flags(source, files["pairwise"], tmp_path / "out", max_steps=0))
    assert result.code == 2 and "error: the model's rewards are not finite" in result.stderr.split("\n")[-2]
    assert not (tmp_path / "out/config.json").exists()
    monkeypatch.setattr(train_rm, "all_rewards", lambda *args: torch.full((4,), math.inf))
    result = tiny.run(SCRIPT, *flags(folder, files["pairwise"], tmp_path / "step", max_steps=1, save_steps=0))
    assert result.code == 2 and (tmp_path / "step/checkpoints/step-000001").exists()


PAIR = {"prompt": "a", "chosen": " b", "rejected": " c"}
POINT = {"prompt": "a", "completion": " b", "label": 1}
STEPS = {"prompt": "a\n", "completions": ["b", "c"], "labels": [1, 0]}
BAD_RECORDS = {  # name: (loss, good record, bad record, complaints)
    "pointwise for pairwise": ("pairwise", PAIR, POINT, ["needs the field 'chosen'", "--loss pointwise"]),
    "process for pairwise": ("pairwise", PAIR, STEPS, ["needs the field 'chosen'", "--loss process"]),
    "pairwise for pointwise": ("pointwise", POINT, PAIR, ["needs the field 'label'", "--loss pairwise"]),
    "process for pointwise": ("pointwise", POINT, STEPS, ["needs the field 'label'", "--loss process"]),
    "pairwise for process": ("process", STEPS, PAIR, ["needs the field 'completions'", "--loss pairwise"]),
    "pointwise for process": ("process", STEPS, POINT, ["needs the field 'completions'", "--loss pointwise"]),
    "completion alone": ("pairwise", PAIR, {"prompt": "a", "completion": "b"}, ["field 'chosen' is missing"]),
    "no rejected": ("pairwise", PAIR, {"prompt": "a", "chosen": "b"}, ["field 'rejected' is missing"]),
    "no prompt": ("pairwise", PAIR, {"chosen": "b", "rejected": "c"}, ["field 'prompt' is missing"]),
    "chosen a number": ("pairwise", PAIR, {**PAIR, "chosen": 5}, ["chosen must be text"]),
    "margin": ("pairwise", PAIR, {**PAIR, "margin": "much"}, ["margin must be a finite number"]),
    "label above 1": ("pointwise", POINT, {**POINT, "label": 2}, ["label must be 0, 1 or a probability"]),
    "label a word": ("pointwise", POINT, {**POINT, "label": "good"}, ["label must be a finite number"]),
    "labels too few": ("process", STEPS, {**STEPS, "labels": [1]}, ["2 completions but 1 labels"]),
    "label of a step": ("process", STEPS, {**STEPS, "labels": [1, -1]}, ["labels[1] must be"]),
    "no steps": ("process", STEPS, {**STEPS, "completions": [], "labels": []}, ["completions holds no step"]),
    "steps as text": ("process", STEPS, {**STEPS, "completions": "b\nc"}, ["completions must be a list of steps"]),
    "too long": ("pairwise", PAIR, {**PAIR, "rejected": " so" * 300}, ["tokens, the limit is 256"]),
    "not an object": ("process", STEPS, 5, ["must be an object"]),
}


@pytest.mark.parametrize("which", ["train_file", "eval_file"])
@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records(name, which, folder, tmp_path):
    """Catches an error without file and line or without the fitting --loss, a traceback, and output left behind."""
    loss, good, bad, complaints = BAD_RECORDS[name]
    files = {"train_file": tiny.write_records(tmp_path / "good.jsonl", [good])}
    files[which] = tiny.write_records(tmp_path / "bad.jsonl", [good, bad])
    result = tiny.run(SCRIPT, *flags(folder, output_dir=tmp_path / "out", loss=loss, **files))
    tiny.assert_refused(result, f"{tmp_path / 'bad.jsonl'}:2: ", *complaints)
    assert not (tmp_path / "out").exists()


BAD_FLAGS = {
    "loss": ({"loss": "listwise"}, ["--loss", "listwise"]),
    "centring labels": (
        {"loss": "process", "center_coef": 0.1},
        ["--center_coef 0.1 does nothing for --loss process; it is for pairwise"],
    ),
    "centring below 0": ({"center_coef": -1}, ["--center_coef", "'-1'"]),
    "samples below 0": ({"num_eval_samples": -1}, ["--num_eval_samples", "'-1'"]),
    "eval steps": ({"eval_steps": 3}, ["--eval_steps needs an --eval_file"]),
    "micro batch": ({"micro_batch_size": 5, "batch_size": 4}, ["--micro_batch_size 5", "--batch_size 4"]),
    "no train file": ({"train_file": "nowhere.jsonl"}, ["nowhere.jsonl: no such file"]),
    "no folder": ({"checkpoint_path": "nowhere"}, ["nowhere"]),
    "beyond the context": ({"max_seq_len": 257}, ["--max_seq_len 257", "context is 256"]),
    "nothing left": ({"max_seq_len": 3, "overlong": "skip"}, ["no record is left: all 11 are too long"]),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(name, folder, files, tmp_path):
    given, parts = BAD_FLAGS[name]
    given = {"checkpoint_path": folder, "train_file": files["pairwise"], **given}
    tiny.assert_refused(tiny.run(SCRIPT, *flags(output_dir=tmp_path / "out", **given)), *parts)
    assert not (tmp_path / "out").exists()


def test_nothing_to_learn(folder, tmp_path):
    """Catches training on pairs of two equal answers, and their number not reported beside other pairs."""
    same = {"prompt": "a", "chosen": " b", "rejected": " b"}
    path = tiny.write_records(tmp_path / "same.jsonl", [same, same])
    tiny.assert_refused(tiny.run(SCRIPT, *flags(folder, path, tmp_path / "out")), "chosen and rejected are the same")
    assert not (tmp_path / "out").exists()
    path = tiny.write_records(tmp_path / "some.jsonl", [same, PAIR])
    assert "1 nothing to learn" in train(folder, path, tmp_path / "out", max_steps=1, batch_size=2).stdout


def test_equal_sides_are_a_tie(folder, tmp_path):
    """Catches a pair of two equal answers that counts as right or wrong because its two rows, at other positions in a
    forward pass, are rounded differently: its accuracy was 0 or 1, and the calibration error as far off."""
    equal = [{"prompt": "so", "chosen": text, "rejected": text} for text in (" and so" * n for n in range(1, 9))]
    path = tiny.write_records(tmp_path / "some.jsonl", [*equal, PAIR])
    for name, split in (("padded", {"micro_batch_size": 2}), ("packed", {"max_tokens_per_micro_batch": 64})):
        train(folder, path, tmp_path / name, max_steps=1, batch_size=9, eval_file=path, **split)
        line = tiny.read_lines(tmp_path / name / "metrics.jsonl")[-1]
        right = line["margin"] > 0  # the margin is the other pair's
        assert line["accuracy"] == pytest.approx(right / 9)
        right, sure = line["eval_margin"] > 0, 1 / (1 + math.exp(-abs(9 * line["eval_margin"])))
        assert line["eval_accuracy"] == pytest.approx(right / 9)
        assert line["eval_calibration_error"] == pytest.approx(abs(right - sure) / 9, abs=1e-6)


def test_another_loss_on_resume(folder, files, tmp_path):
    """Catches a resume with another loss, and an occupied folder."""
    train(folder, files["pairwise"], tmp_path / "out", max_steps=2, save_steps=1)
    again = {"max_steps": 3, "center_coef": 0.5, "adam_eps": 1e-6}
    result = tiny.run(SCRIPT, *flags(folder, files["pairwise"], tmp_path / "out", resume=True, **again))
    tiny.assert_refused(result, "the run was begun with other --center_coef, --adam_eps")
    result = tiny.run(SCRIPT, *flags(folder, files["pairwise"], tmp_path / "out"))
    tiny.assert_refused(result, f"--output_dir {tmp_path / 'out'}: is not empty")
