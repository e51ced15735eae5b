"""training/common.py: flags, errors and arithmetic, against hand-computed values."""

import math
import sys

import pytest
import torch

from models.model import ModelConfig
from training import common
from training.common import (
    ArgumentParser,
    check_finite,
    choose_runtime,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_int,
    run_main,
    training_flops_per_token,
)


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
    return run_main(main, parser), capsys.readouterr().err


def test_run_main(monkeypatch, capsys):
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
