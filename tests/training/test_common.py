"""training/common.py: schedule, optimizer, metrics, errors and checkpoints, against hand-computed values."""

import json
import math
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from models.model import ModelConfig
from tests import tiny
from training import common
from training.common import (
    ArgumentParser,
    Metrics,
    check_finite,
    check_installed,
    choose_runtime,
    fraction,
    learning_rate_at,
    load_newest_checkpoint,
    make_optimizer,
    non_negative_float,
    non_negative_int,
    positive_int,
    prepare_output_dir,
    run_script,
    save_checkpoint,
    training_flops_per_token,
    write_args,
    write_json,
)


def rates(schedule, total, warmup):
    settings = {"peak": 8.0, "schedule": schedule, "total_steps": total, "warmup_ratio": warmup}
    return [learning_rate_at(step, **settings) for step in range(1, total + 1)]


def test_schedules_by_hand():
    """Catches a schedule one step early or late, a warm-up that starts at 0 or misses the peak, a wrong formula."""
    assert rates("constant", 5, 0.4) == [4, 8, 8, 8, 8]
    assert rates("linear", 6, 0.3) == [4, 8, 8, 6, 4, 2]  # ceil(1.8) = 2 steps up, then 4 steps to 0 at step 7
    assert rates("linear", 4, 0) == [8, 6, 4, 2]
    half = math.sqrt(0.5)
    expected = [8, 8, 4 * (1 + half), 4, 4 * (1 - half)]
    assert rates("cosine", 5, 0.2) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_at_its_edges(schedule):
    """Catches a division by zero and a rate of 0 that would learn nothing, for one step and for all warm-up or none."""
    assert rates(schedule, 1, 0.0) == rates(schedule, 1, 0.03) == rates(schedule, 1, 1.0) == [8]
    assert rates(schedule, 4, 1.0) == [2, 4, 6, 8]
    assert all(rate > 0 for rate in rates(schedule, 7, 0.0))
    # a run that was resumed with fewer --max_steps than it has done asks for nothing, but must not fail
    learning_rate_at(9, peak=8.0, schedule=schedule, total_steps=4, warmup_ratio=0.0)


def test_optimizer_decays_matrices_only(folder):
    """Catches weight decay on norms and biases, parameters left out, and flags that do not reach AdamW."""
    model = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.RMSNorm(3), "embedding": nn.Embedding(4, 3)})
    model["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.7), eps=1e-3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():
        decays = p.dim() == 2 and not name.startswith("frozen")
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 if decays else 1), msg=name)
    assert {(g["betas"], g["eps"], g["lr"]) for g in optimizer.param_groups} == {((0.8, 0.7), 1e-3, 0.1)}


@pytest.mark.parametrize("tied", [False, True])
def test_flops_by_hand(tied):
    """Catches the input embedding counted as a product (or a tied head not), GQA, and a wrong attention term."""
    config = ModelConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=tied,
    )
    layer = 2 * (8 * 24) + 2 * (8 * 12) + 3 * (8 * 20) + 2 * 8  # q and o, k and v, the three of the MLP, two norms
    weights = 3 * layer + 8 + 100 * 8  # and the last norm and the head
    # forward: q k^T and p v are 2 FLOPs x 24 each for each of 40 / 2 positions seen; backward twice that
    attention = 3 * 3 * (2 * 2 * 24 * 40 / 2)
    assert training_flops_per_token(config, 40) == pytest.approx(6 * weights + attention)


def test_metrics_resume(tmp_path):
    """Catches a step twice in metrics.jsonl after a resume, and a torn last line that makes the file unreadable."""
    metrics = Metrics(tmp_path)
    for step in (1, 2, 3, 4):
        metrics.write({"step": step, "loss": step / 2})
        assert tiny.read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == step  # flushed at once
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    metrics = Metrics(tmp_path, after_step=2)
    metrics.write({"step": 3, "loss": -1})
    assert [(line["step"], line["loss"]) for line in tiny.read_lines(tmp_path / "metrics.jsonl")] == [
        (1, 0.5),
        (2, 1.0),
        (3, -1),
    ]
    Metrics(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_check_finite():
    """Catches a NaN that goes by, and a complaint that does not say which step, value and records."""
    check_finite(3, [1], loss=torch.tensor(2.0), grad_norm=0.0)
    for bad in (math.nan, math.inf, torch.tensor(-math.inf)):
        with pytest.raises(ValueError, match=r"step 3: grad_norm is .*: 7, 0, 4$"):
            check_finite(3, [7, 0, 4], loss=1.0, grad_norm=bad)
    with pytest.raises(ValueError, match=r"62, 63, \.\.\.$"):
        check_finite(1, list(range(100)), loss=math.nan)


def parse(capsys, *args):
    parser = ArgumentParser("test")
    parser.add_argument("--count", type=positive_int, default=3, help="a count")
    parser.add_argument("--steps", type=non_negative_int, default=0, help="steps")
    parser.add_argument("--ratio", type=fraction, default=0.5, help="a share")
    parser.add_argument("--rate", type=non_negative_float, default=0.5, help="a rate")
    try:
        return vars(parser.parse_args(args))
    except SystemExit as exit:
        return exit.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ("--count", "0"),
        ("--count", "1.5"),
        ("--count", "many"),
        ("--steps", "-1"),
        ("--ratio", "1.01"),
        ("--ratio", "nan"),
        ("--rate", "-1"),
        ("--rate", "nan"),
        ("--rate", "inf"),
        ("--cou", "3"),
        ("--ratio",),
        ("stray",),
    ],
)
def test_bad_flags(args, capsys):
    """Catches a value out of range let through, an abbreviation, and argparse's usage text before the message."""
    code, message = parse(capsys, *args)
    assert code == 2 and message.count("\n") == 1 and args[0] in message and "usage" not in message


def test_good_flags(capsys):
    """Catches a bound that excludes its own edge."""
    assert parse(capsys, "--count", "1", "--steps", "0", "--ratio", "1", "--rate", "0") == {
        "count": 1,
        "steps": 0,
        "ratio": 1.0,
        "rate": 0.0,
    }
    assert parse(capsys, "--ratio", "0")["ratio"] == 0


def outcome(error, monkeypatch, capsys):
    """(exit code, stderr) of a script whose main raises `error`."""

    def main():
        bar = common.progress_bar(total=3, desc="working")
        bar.update(1)
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    parser = ArgumentParser("test")
    parser.prog = "script.py"
    try:
        run_script(main, parser)
    except SystemExit as exit:
        return exit.code, capsys.readouterr().err
    raise AssertionError("no error")


def test_run_script(monkeypatch, capsys):
    """Catches a user's mistake shown as a traceback or on the line of a progress bar, and a bug hidden as a message."""
    monkeypatch.delenv("TRACEBACK", raising=False)
    for error in (ValueError("data.jsonl:3:\n  broken"), FileNotFoundError("data.jsonl:3: broken")):
        code, message = outcome(error, monkeypatch, capsys)
        assert code == 2 and message.count("\n") == 1
        assert message.split("\r")[-1] == "script.py: error: data.jsonl:3: broken\n"
        assert not message.split("\r")[-2].strip()  # the bar was wiped away
    assert outcome(ValueError(), monkeypatch, capsys)[1].endswith("error: ValueError\n")
    assert outcome(KeyboardInterrupt(), monkeypatch, capsys)[0] == 130
    for bug in (RuntimeError("bug"), KeyError("bug"), AssertionError("bug")):
        with pytest.raises(type(bug)):
            outcome(bug, monkeypatch, capsys)
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="shown"):
        outcome(ValueError("shown"), monkeypatch, capsys)


def test_runtime():
    """Catches a device that is not there accepted, or refused in torch's words rather than ours."""
    assert choose_runtime("cpu", None, None) == (torch.device("cpu"), torch.float32, False)
    assert choose_runtime("cpu", "bfloat16", True) == (torch.device("cpu"), torch.bfloat16, True)
    for device in ("meta", "gpu", "cuda:77"):
        with pytest.raises(ValueError, match=f"--device {device}: "):
            choose_runtime(device, None, None)


def test_output_dir(tmp_path):
    """Catches a run mixed with another, and somebody's model overwritten by a run that only says --resume."""
    prepare_output_dir(tmp_path / "new", False, {})
    prepare_output_dir(tmp_path / "new", True, {})
    assert not (tmp_path / "new").exists()
    prepare_output_dir(tmp_path, False, {})
    (tmp_path / "metrics.jsonl").touch()
    prepare_output_dir(tmp_path, True, {})
    with pytest.raises(ValueError, match="not empty"):
        prepare_output_dir(tmp_path, False, {})
    with pytest.raises(ValueError, match="is a file"):
        prepare_output_dir(tmp_path / "metrics.jsonl", True, {})
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="no run to --resume"):
        prepare_output_dir(tmp_path, True, {})
    write_json(tmp_path / "args.json", {"path": tmp_path, "text": "é"})
    prepare_output_dir(tmp_path, True, {})
    assert json.loads((tmp_path / "args.json").read_text()) == {"path": str(tmp_path), "text": "é"}


@pytest.mark.parametrize("content", ["", "[]", "{", "5"])
def test_unusable_args_and_metrics(tmp_path, content):
    """Catches a traceback, or a message without the file's name, for files of a run that somebody edited."""
    (tmp_path / "args.json").write_text(content)
    with pytest.raises(ValueError, match=r"args\.json: "):
        prepare_output_dir(tmp_path, True, {"seed": 0})
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{content or "{}"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        Metrics(tmp_path, after_step=5)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_resume_with_other_data(tmp_path):
    """Catches a run that goes on with other batches than those it has yet to take."""
    args = {"train_file": tmp_path / "a", "batch_size": 4, "seed": 0, "num_epochs": 1}
    write_args(tmp_path, args)
    prepare_output_dir(tmp_path, True, {**args, "num_epochs": 2})
    with pytest.raises(ValueError, match="--train_file, --batch_size"):
        prepare_output_dir(tmp_path, True, {**args, "train_file": tmp_path / "b", "batch_size": 8})


# ------------------------------------------------------------------------------------- checkpoints


def trained(steps, *, tied=True, seed=0):
    """A small model with tied weights, a norm and `steps` optimizer steps behind it."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "norm": nn.RMSNorm(4), "head": nn.Linear(4, 7, bias=False)})
    if tied:
        model["head"].weight = model["embed"].weight
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
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


def names(output_dir):
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_restores_everything(tied, tmp_path):
    """Catches a moment, a step count or a tied weight lost: the next steps would differ."""
    model, optimizer = trained(3, tied=tied)
    save_checkpoint(tmp_path, 3, model, optimizer, limit=2)
    fresh, fresh_optimizer = trained(0, tied=tied, seed=1)
    assert load_newest_checkpoint(tmp_path, fresh, fresh_optimizer) == 3
    assert torch.equal(weights(fresh), weights(model))
    for step in (4, 5):
        train_step(model, optimizer, step)
        train_step(fresh, fresh_optimizer, step)
        assert torch.equal(weights(fresh), weights(model)), step


def test_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    """Catches a half-written checkpoint under its final name, and what a killed save left behind kept for ever."""
    model, optimizer = trained(1)

    rename = os.rename

    def killed(source, target):
        if Path(target).name == "step-000001":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        save_checkpoint(tmp_path, 1, model, optimizer, limit=2)
    assert load_newest_checkpoint(tmp_path, *trained(0)) == 0
    save_checkpoint(tmp_path, 2, model, optimizer, limit=2)
    assert names(tmp_path) == ["step-000002"]


def test_checkpoint_limit(tmp_path):
    """Catches the newest removed instead of the oldest, an order by name (step-1000000 < step-999999), and a good
    checkpoint removed in favour of a later one that could not be read."""
    model, optimizer = trained(1)
    for step in (5, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, limit=2)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert load_newest_checkpoint(tmp_path, model, optimizer) == 1_000_000
    save_checkpoint(tmp_path, 7, model, optimizer, limit=1)  # resumed from an earlier one
    assert names(tmp_path) == ["step-000007"]


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
    """Catches a resume from half a checkpoint, a crash where an older one is whole, and a silent start from nothing."""
    model, optimizer = trained(0)
    for step in (1, 2):
        train_step(model, optimizer, step)
        save_checkpoint(tmp_path, step, model, optimizer, limit=2)
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
    """Catches a --resume before the first checkpoint refused, or one that does not say where it starts."""
    assert load_newest_checkpoint(tmp_path, *trained(0)) == 0
    assert "no checkpoint to resume from, starting from the beginning" in capsys.readouterr().out


def test_report_to(tmp_path, monkeypatch):
    """Catches metrics that do not reach the dashboard, or reach it without their step, and a missing package noticed
    late or with a traceback."""
    with pytest.raises(ValueError, match="pip install not_there"):
        check_installed("not_there")
    check_installed("none")
    logged = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    Metrics(tmp_path, report_to="wandb").write({"step": 3, "loss": 1.5})
    assert logged == [(3, {"loss": 1.5})]
    boards = []

    class SummaryWriter:
        def __init__(self, path, purge_step):
            boards.append((path, purge_step))

        def add_scalar(self, name, value, step):
            boards.append((name, value, step))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    Metrics(tmp_path, after_step=3, report_to="tensorboard").write({"step": 4, "loss": 1.25})
    assert boards == [(tmp_path / "tensorboard", 4), ("loss", 1.25, 4)]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [3, 4]
