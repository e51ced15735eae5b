"""training/finetune_sft.py: kills and resumes, and the files that a run leaves in its folder."""

import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests import tiny
from tests.forked import Forked
from tests.training.test_finetune_sft import (  # noqa: F401 (fixtures)
    SCRIPT,
    assert_same_weights,
    finetune,
    flags,
    train_file,
    weights_of,
)
from training import finetune_sft, run_dir
from training.data import training_batches
from training.metrics import Metrics

# ------------------------------------------------------------------------------------ kill and resume

RUN = {"batch_size": 3, "micro_batch_size": 2, "num_epochs": 4, "weight_decay": 0.1, "warmup_ratio": 0.2}
LAST_STEP = 16


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    tiny.write_model(folder, tie_word_embeddings=True, attention_bias=True)
    return folder


@pytest.fixture(scope="module")
def whole(tied_folder, train_file, tmp_path_factory):
    """The run that is not interrupted; read it only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finetune(tied_folder, train_file, out, **RUN, save_steps=6)
    return out


def deterministic(lines):
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def assert_same_run(resumed, whole):
    assert_same_weights(resumed, whole)
    ours, theirs = tiny.read_lines(resumed / "metrics.jsonl"), tiny.read_lines(whole / "metrics.jsonl")
    assert deterministic(ours) == deterministic(theirs) and [line["step"] for line in ours] == list(
        range(1, LAST_STEP + 1)
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_kill_and_resume(how, whole, tied_folder, train_file, tmp_path):
    """Catches a batch repeated or skipped after a resume, Adam's moments or step count lost, a learning-rate schedule
    that restarts, a step twice in metrics.jsonl, and a SIGTERM that kills the run or saves nothing."""
    run, out = {**RUN, "save_steps": 2}, tmp_path / "out"
    process = Forked(SCRIPT, *flags(tied_folder, train_file, out, **run))
    while process.poll() is None and not (out / "checkpoints/step-000002").exists():
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.15))
    process.send_signal(how)
    printed, errors = process.communicate(timeout=240)
    done = (out / "config.json").exists()  # it may have finished before the signal
    assert process.returncode in ({0, -how} if done else {0 if how == signal.SIGTERM else -how}), errors
    if how == signal.SIGTERM and not done:
        assert "stopped by a signal after step" in printed
        last = tiny.read_lines(out / "metrics.jsonl")[-1]["step"]
        assert (out / "checkpoints" / f"step-{last:06d}").is_dir()  # the last step was saved
    assert "resuming after step" in finetune(tied_folder, train_file, out, **run, resume=True).stdout
    assert_same_run(out, whole)


def stop_after(monkeypatch, step):
    """Sends SIGTERM to this process while the run writes the metrics of a step."""
    write = Metrics.write

    def write_and_stop(self, values):
        write(self, values)
        if values["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "write", write_and_stop)


@pytest.mark.parametrize("steps", [(1,), (4, 9), (LAST_STEP,)], ids=str)
def test_stop_anywhere_and_resume(steps, whole, tied_folder, train_file, tmp_path, monkeypatch):
    """Catches a data cursor off by one step at the start, in mid-epoch, at an epoch's end or at the last step, and a
    run that cannot be stopped twice."""
    out = tmp_path / "out"
    for n, step in enumerate(steps):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            result = finetune(tied_folder, train_file, out, **RUN, **({"resume": True} if n else {}))
        assert f"stopped by a signal after step {step};" in result.stdout and not (out / "config.json").exists()
        assert f"step-{step:06d}" in os.listdir(out / "checkpoints")
    finetune(tied_folder, train_file, out, **RUN, resume=True)
    assert_same_run(out, whole)


def test_resume_without_a_checkpoint(whole, tied_folder, train_file, tmp_path):
    """Catches --resume refused because an early kill left no checkpoint, and old lines of metrics that are kept."""
    out = tmp_path / "out"
    result = finetune(tied_folder, train_file, out, **RUN, resume=True)
    assert f"{out}: no checkpoint to resume from, starting from the beginning" in result.stdout
    assert_same_run(out, whole)
    finetune(tied_folder, train_file, out, **RUN, resume=True)  # after the run's end too: it saved no checkpoint
    assert_same_run(out, whole)


def test_resume_as_another_run(folder, tmp_path):
    """Catches a record inserted before the data and not noticed (of 48 records 10 would be seen twice, 9 never), and a
    changed weight decay that is accepted without effect, since the optimizer's saved state has the old one."""
    records = [{"prompt": f"Question {i}:", "completion": f" {i + 3}"} for i in range(48)]
    data, begun = tiny.write_records(tmp_path / "data.jsonl", records), tmp_path / "begun"
    run = {"batch_size": 8, "lr_schedule": "constant", "warmup_ratio": 0, "save_steps": 2, "max_steps": 2}
    finetune(folder, data, begun, **run)
    run |= {"max_steps": 3, "resume": True}
    for name in ("plain", "decayed", "other"):
        shutil.copytree(begun, tmp_path / name)
    finetune(folder, data, tmp_path / "plain", **run)
    run["weight_decay"] = 10
    result = tiny.run(SCRIPT, *flags(folder, data, tmp_path / "decayed", **run))
    tiny.assert_refused(result, "begun with other --weight_decay; go on knowingly with --accept_changed weight_decay")
    result = finetune(folder, data, tmp_path / "decayed", **run, accept_changed="weight_decay")
    assert "goes on with other --weight_decay, as accepted" in result.stdout
    before, plain, decayed = (weights_of(tmp_path / name) for name in ("begun", "plain", "decayed"))
    for name, weight in before.items():
        decay = 1e-3 * 10 * weight if weight.dim() > 1 else torch.zeros_like(weight)
        torch.testing.assert_close(plain[name] - decayed[name], decay, atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "decayed/args.json").read_text())["weight_decay"] == 10

    run["weight_decay"] = None
    shutil.copytree(begun, tmp_path / "larger")
    finetune(folder, data, tmp_path / "larger", **{**run, "batch_size": 16}, accept_changed="batch_size")
    counts = [
        [x["num_tokens"] for x in tiny.read_lines(tmp_path / name / "metrics.jsonl")] for name in ("plain", "larger")
    ]
    assert counts[0][:2] == counts[1][:2] and counts[1][2] - counts[1][1] > 1.5 * (counts[0][2] - counts[0][1])

    tiny.write_records(data, [{"prompt": "First:", "completion": " 0"}, *records])
    result = tiny.run(SCRIPT, *flags(folder, data, tmp_path / "other", **run))
    tiny.assert_refused(result, "--train_file: other content than the run was begun with; go on knowingly with")
    said = [finetune(folder, data, tmp_path / "other", **run, accept_changed="train_file").stdout for _ in range(2)]
    assert "--train_file changed which records a step takes" in said[0] and "changed which" not in said[1]
    finetune(folder, data, tmp_path / "other", **run)  # the file that was accepted is now the run's own


def test_resume_past_a_broken_checkpoint(whole, tied_folder, train_file, tmp_path):
    """Catches a resume that fails at a broken newest checkpoint, or loads half of it."""
    run, out = {**RUN, "save_steps": 6}, tmp_path / "out"
    shutil.copytree(whole, out)
    newest, older = sorted(path.name for path in (out / "checkpoints").iterdir())[::-1]
    (data,) = (out / "checkpoints" / newest).glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-3000])
    result = finetune(tied_folder, train_file, out, **run, resume=True)
    assert f"{newest}: broken" in result.stdout and f"{older}: resuming after step" in result.stdout
    assert_same_run(out, whole)
    for checkpoint_path in (out / "checkpoints").iterdir():
        (checkpoint_path / ".metadata").write_bytes(b"")
    before = (out / "model.safetensors").read_bytes()
    result = tiny.run(SCRIPT, *flags(tied_folder, train_file, out, **run, resume=True))
    tiny.assert_refused(result, f"{out / 'checkpoints'}: no checkpoint can be read")
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("moves, finished", [(0, True), (1, False), (1, True), (3, False)])
def test_kill_during_the_export(moves, finished, whole, tied_folder, train_file, tmp_path, monkeypatch):
    """Catches a config.json after a first export that was killed, a first export lost when a second one was killed, and
    leftovers of either that a resumed run keeps."""
    out, run = tmp_path / "out", {**RUN, "save_steps": 12}
    if finished:  # a finished run that is resumed exports over its older export
        shutil.copytree(whole, out)
    replace, left = os.replace, [moves]

    def killed(source, target):
        if Path(source).parent.name.endswith(".partial"):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert tiny.run(SCRIPT, *flags(tied_folder, train_file, out, **run, resume=True)).code == 130
    assert (out / "config.json").exists() == finished
    if finished:
        transformers.AutoModelForCausalLM.from_pretrained(out)
    assert "resuming after step 16" in finetune(tied_folder, train_file, out, **run, resume=True).stdout
    assert_same_run(out, whole)
    assert [path.name for path in out.glob(".*")] == [".lock"]


def test_exports_of_steps(tied_folder, train_file, tmp_path):
    """Catches the export of a step that is not that step's model, that transformers does not open, that breaks a
    resume, or whose writing changes the run; and fp32 weights that an evaluation before the export or checkpoint left
    in the compute dtype."""
    run, out = {**RUN, "dtype": "bfloat16", "max_steps": 4}, tmp_path / "out"
    finetune(tied_folder, train_file, tmp_path / "plain", **run)
    more = {"eval_file": train_file, "eval_steps": 1, "num_eval_samples": 0, "export_steps": 2, "save_steps": 3}
    finetune(tied_folder, train_file, out, **run, **more)
    shutil.rmtree(out / "checkpoints/step-000004")
    finetune(tied_folder, train_file, out, **run, **more, resume=True)
    folders = (tmp_path / "plain", out, out / "step-000004")
    plain, *others = (load_file(folder / "model.safetensors") for folder in folders)
    assert {w.dtype for w in plain.values()} == {torch.float32}
    for name, weight in plain.items():
        assert (weight.bfloat16() != weight).any() and all(torch.equal(other[name], weight) for other in others), name
    assert sorted(path.name for path in out.glob("step-*")) == ["step-000002", "step-000004"]
    two = transformers.AutoModelForCausalLM.from_pretrained(out / "step-000002")
    assert not torch.equal(two.model.norm.weight, plain["model.norm.weight"])


def test_saved_by_the_clock(folder, train_file, tmp_path, monkeypatch):
    """Catches a run that is lost entirely because --save_steps was not given, and one that saves although --save_steps
    is 0; and a checkpoint sooner or later than 15 minutes after the last one."""
    saved = lambda out: sorted(path.name for path in out.glob("checkpoints/*"))  # noqa: E731
    run = {"max_steps": 4, "batch_size": 4, "save_steps": None}
    finetune(folder, train_file, tmp_path / "a", **run)
    assert saved(tmp_path / "a") == ["step-000004"]
    finetune(folder, train_file, tmp_path / "b", **run | {"save_steps": 0})
    assert not saved(tmp_path / "b")
    ends, now, write = {1: 899, 2: 901, 3: 1800, 4: 1800}, [0], Metrics.write  # seconds after which the steps end
    monkeypatch.setattr(Metrics, "write", lambda self, line: write(self, line) or now.append(ends[line["step"]]))
    monkeypatch.setattr(run_dir, "time", SimpleNamespace(monotonic=lambda: now[-1]))
    finetune(folder, train_file, tmp_path / "c", **run, save_total_limit=5)
    assert saved(tmp_path / "c") == ["step-000002", "step-000004"]
    assert_same_weights(tmp_path / "b", tmp_path / "c")


def test_trains_the_head_that_the_files_hold(folder, train_file, tmp_path):
    """Catches a separate head that is tied in training, or in the export, because config.json says so."""
    shutil.copytree(folder, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "in/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for source, out in ((folder, "a"), (tmp_path / "in", "b")):
        finetune(source, train_file, tmp_path / out, max_steps=2, batch_size=4)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("added, pad_id", [({}, 0), ({"<pad>": tiny.VOCAB_SIZE}, 1)])
def test_one_pad_token(added, pad_id, train_file, tmp_path):
    """Catches config.json and the tokenizer naming different pad tokens, and a pad token without an embedding in
    config.json, with which transformers cannot open the folder."""
    tiny.write_model(tmp_path / "in", pad_token_id=1)
    tiny.write_tokenizer(tmp_path / "in", pad_token=next(iter(added), "<unk>"))
    (tmp_path / "in/added_tokens.json").write_text(json.dumps(added))
    finetune(tmp_path / "in", train_file, tmp_path / "out", max_steps=0)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.pad_token_id == pad_id
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").pad_token_id == pad_id


def test_through_a_link(tied_folder, train_file, tmp_path):
    """Catches a model not written where the link leads, and files staged beside the link, maybe on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    finetune(tied_folder, train_file, tmp_path / "out", max_steps=0)
    assert_same_weights(tmp_path / "disk", tied_folder)
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"] and (tmp_path / "out").is_symlink()


def test_non_finite_loss(folder, train_file, tmp_path, monkeypatch):
    """Catches a run that goes on with NaN, saves it over the last good checkpoint or hides its step and records."""
    out, run = tmp_path / "out", {**RUN, "save_steps": 2}
    calls, real = [], finetune_sft.token_cross_entropy

    def overflows(*args, **kwargs):
        calls.append(1)  # 2 + 2 + 2 + 1 micro-batches in steps 1 to 4, then an infinite one
        return real(*args, **kwargs) * (math.inf if len(calls) > 7 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_sft, "token_cross_entropy", overflows)
        result = tiny.run(SCRIPT, *flags(folder, train_file, out, **run))
    batches = dict(training_batches(11, 3, seed=0, shuffle=True, first_step=1, last_step=LAST_STEP))
    shown = ", ".join(map(str, batches[5]))
    tiny.assert_refused(result, "step 5: loss is", f"records of the step (from 0): {shown}\n")
    assert [line["step"] for line in tiny.read_lines(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert sorted(os.listdir(out / "checkpoints")) == ["step-000002", "step-000004"]
    assert not (out / "config.json").exists()
    assert "resuming after step 4" in finetune(folder, train_file, out, **run, resume=True).stdout
