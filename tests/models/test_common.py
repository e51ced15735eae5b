"""models/common.py and models/script.py: flags, errors, the device; and the FLOPs, against hand-computed values."""

import io
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from models import common, script
from models.common import (
    RuntimeArgs,
    at_least_one,
    choose_runtime,
    flag,
    flags_of,
    fraction,
    non_negative,
    parse_args,
)
from models.config import ModelConfig
from models.script import run_main
from tests import tiny


@pytest.mark.parametrize("tied", [False, True])
def test_flops_by_hand(tied):
    """Catches the input embedding counted as a product (or a tied head not), GQA ignored, a wrong attention term."""
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
    assert config.training_flops_per_token(40) == pytest.approx(6 * weights + attention)
    assert config.training_flops_per_token(40, frozen=True) == pytest.approx(4 * weights + attention)
    for share in (0.0, 0.25):
        found = config.training_flops_per_token(40, logits=share)
        assert found == pytest.approx(6 * (weights - (1 - share) * 100 * 8) + attention)


@dataclass(frozen=True, kw_only=True)
class OtherArgs:
    """What another file needs. And more of it.

    A second paragraph."""

    rate: float = flag(0.5, bounds=non_negative, help="a rate")
    kind: str = flag("plain", choices=("plain", "fancy"), help="a kind", may_change=True)


@dataclass(frozen=True, kw_only=True)
class Args(OtherArgs):
    """A script."""

    rate: float = 0.25
    path: Path = flag(help="a file")
    count: int | None = flag(3, bounds=at_least_one, help="a count")
    steps: int = flag(0, bounds=non_negative, help="steps")
    ratio: float = flag(0.5, bounds=fraction, help="a share")
    names: list[str] = flag((), help="some names")
    sizes: list[int] = flag((), bounds=at_least_one, nargs="*", help="some sizes")
    pause: bool = flag(True, help="a switch")
    offset: float = flag(0.0, help="a number of either sign")


@dataclass(frozen=True, kw_only=True)
class PlaceArgs:
    """A script with positional arguments."""

    runs: list[Path] = flag(help="run directories", positional=True)
    repo: str = flag(help="a repository", positional=True, metavar="ORG/NAME")


def parse(capsys, *args):
    try:
        return parse_args(Args, ["--path", "x", *args])
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
        ("--rate", "1e39"),  # infinite in fp32, where it would be computed with
        ("--cou", "3"),
        ("--ratio",),
        ("--kind", "other"),
        ("--sizes", "2", "0"),
        ("--pause", "yes"),
        ("stray",),
    ],
)
def test_bad_flags(args, capsys):
    """Catches an accepted value out of range or abbreviated flag, and argparse's usage text before the message."""
    code, message = parse(capsys, *args)
    assert code == 2 and message.count("\n") == 1 and args[0] in message.replace("yes", "--pause")
    assert "usage" not in message


def test_good_flags(capsys):
    """Catches a bound that excludes its own edge, a value of another type than the field's, and a default that ignores
    a subclass's override or leaks from it into the base class."""
    assert parse(capsys, "--count", "1", "--steps", "0", "--ratio", "1", "--rate", "0") == Args(
        path=Path("x"), count=1, steps=0, ratio=1.0, rate=0.0
    )
    args = parse(capsys, "--ratio", "0", "--names", "a", "b", "--sizes", "1", "7", "--no-pause", "--kind", "fancy")
    assert args == Args(path=Path("x"), ratio=0.0, names=["a", "b"], sizes=[1, 7], pause=False, kind="fancy")
    assert (args.rate, args.count, OtherArgs().rate) == (0.25, 3, 0.5)
    code, message = parse(capsys, "--path")
    assert code == 2 and "--path" in message
    with pytest.raises(SystemExit):
        parse_args(Args, [])


def test_what_to_do_about_a_flag(capsys):
    """Catches a misspelt flag refused without naming the flag it resembles, numbers such as -1e-3 taken for flags, and
    a text that begins with a dash refused without saying how to give it."""
    for given, meant in (
        ("--pathh", "--path"),
        ("--rate-x=1", "--rate"),
        ("--no_pause", "--no-pause"),
        ("--patth=/a/long/one", "--path"),
    ):
        assert parse(capsys, given)[1].endswith(f": error: unrecognized arguments: {given}; did you mean {meant}?\n")
    assert parse(capsys, "--bf16", "stray")[1].endswith(": --bf16 stray; --help lists the flags\n")
    assert parse(capsys, "--offset", "-1e-3").offset == -1e-3 and parse(capsys, "--offset", "-.5").offset == -0.5
    code, message = parse(capsys, "--names", "-a")
    assert code == 2 and message.endswith("; a value that begins with - is given as --flag=VALUE\n")
    assert parse(capsys, "--names=-a").names == ["-a"]


def test_help_and_groups(capsys):
    """Catches a flag without its help, default or group, a default of another class, and a positional argument with two
    names."""
    code, _ = parse(capsys, "--help")
    assert code == 0
    with pytest.raises(SystemExit):
        parse_args(Args, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "A script." in text and "What another file needs. And more of it:" in text and "second" not in text
    own, _, group = text.partition("What another file needs")
    assert "--count N a count (default: 3)" in own and "--path PATH a file" in own and "--rate" not in own
    assert "--rate X a rate (default: 0.25)" in group and "--kind {plain,fancy} a kind (default: plain)" in group
    with pytest.raises(SystemExit):
        parse_args(PlaceArgs, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert " runs ORG/NAME [--flag value ...]" in text and "runs run directories ORG/NAME a repository" in text
    with pytest.raises(SystemExit):
        parse_args(PlaceArgs, [])
    assert "required: runs, ORG/NAME" in capsys.readouterr().err
    others = [each for each in flags_of(Args) if each.group is OtherArgs]
    assert [(each.name, each.metadata["may_change"]) for each in others] == [("rate", False), ("kind", True)]


@dataclass(frozen=True, kw_only=True)
class WritingArgs(OtherArgs):
    """A script that writes."""

    output_dir: Path = flag(Path("out"), help="a folder", written=True)
    resume: bool = flag(False, help="go on")


def interrupted(args):
    raise KeyboardInterrupt


def broken_pipe():
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def outcome(error, monkeypatch, capsys, Args=OtherArgs):
    """(exit code, stderr) of a script whose main raises `error`."""

    def main(args):
        bar = common.progress_bar(total=3, desc="working")
        bar.update(1)
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    return run_main(main, Args), capsys.readouterr().err


def raised_by(function) -> Exception:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        function()
    return caught.value


def test_run_main(monkeypatch, capsys):
    """Catches a user's mistake or a lack of memory shown as a traceback or on a progress bar's line, a bug shown as a
    mere message, the last line of NCCL's error, which gives the reason, cut off; and exit code 0 where the reader of
    stdout has gone before a run with outputs or several ranks is done."""
    monkeypatch.delenv("TRACEBACK", raising=False)
    for error in (ValueError("data.jsonl:3:\n  broken"), FileNotFoundError("data.jsonl:3: broken")):
        code, message = outcome(error, monkeypatch, capsys)
        assert code == 2 and message.count("\n") == 1
        assert message.split("\r")[-1] == "script.py: error: data.jsonl:3: broken\n"
        assert not message.split("\r")[-2].strip()  # the bar was wiped away
    assert outcome(ValueError(), monkeypatch, capsys)[1].endswith("error: ValueError\n")
    code, message = outcome(KeyboardInterrupt(), monkeypatch, capsys)
    assert code == 130 and message.split("\r")[-1] == "script.py: interrupted\n"
    assert outcome(script.Stopped(), monkeypatch, capsys)[0] == 0
    fileno = os.dup(1)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: fileno)
    assert outcome(BrokenPipeError(), monkeypatch, capsys)[0] == 0  # `| head`, of a script without other outputs
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")  # the other rank would wait for ever for one that ended with code 0
        assert outcome(BrokenPipeError(), monkeypatch, capsys)[0] == 2
    code, message = outcome(BrokenPipeError(), monkeypatch, capsys, WritingArgs)
    assert code == 2 and message.split("\r")[-1].endswith("has gone; go on with --resume\n")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", os.fdopen(broken_pipe(), "w", buffering=1))
        assert run_main(interrupted, OtherArgs) == 130
    for allocate in (partial(torch.empty, 10**15), partial(bytearray, 10**18)):
        code, message = outcome(raised_by(allocate), monkeypatch, capsys)
        assert code == 2 and "error: out of memory (" in message and message.count("\n") == 1, message
    for bug in (RuntimeError("bug"), KeyError("bug"), AssertionError("bug")):
        with pytest.raises(type(bug)):
            outcome(bug, monkeypatch, capsys)
    nccl = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {} (run with NCCL_DEBUG=WARN for "
    nccl += "details), NCCL version 2.27.3\nnccl{}: {}\nLast error:\n{}"
    same_gpu = "invalid usage", "InvalidUsage", "This usually reflects invalid usage.", "Duplicate GPU detected"
    gone = "remote process exited", "RemoteError", "A call failed, possibly.", "socketProgress: Connection closed"
    for said, why in ((same_gpu, "the ranks cannot be joined"), (gone, "another rank has ended")):
        code, message = outcome(torch.distributed.DistBackendError(nccl.format(*said)), monkeypatch, capsys)
        assert code == 2 and f"error: {why}" in message and message.endswith(f"({said[-1]})\n"), message
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="shown"):
        outcome(ValueError("shown"), monkeypatch, capsys)


def test_ranks_end_without_nccl_s_end(monkeypatch, capsys):
    """Catches a rank that never exits because NCCL's own shutdown waits for the others, and for CUDA graphs. A finished
    rank waits for the others without NCCL, a failed one does not wait, and a bug still shows its traceback."""
    order = []
    for where, name in ((script, "leave_together"), (torch.cuda, "synchronize")):
        monkeypatch.setattr(where, name, lambda name=name: order.append(name))
    monkeypatch.setattr(script.dist, "destroy_process_group", lambda: order.append("destroyed"))
    monkeypatch.setattr(script.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(script.dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert outcome(script.Stopped(), monkeypatch, capsys)[0] == 0
    assert order == ["synchronize", "leave_together"]
    assert outcome(ValueError("one rank's"), monkeypatch, capsys)[0] == 2 and len(order) == 2
    monkeypatch.setattr(script, "end_process", lambda code: order.append(code))
    monkeypatch.setattr(script, "accept_any_text", lambda: None)

    def broken(args):
        raise RuntimeError("a bug")

    script.run_script(broken, OtherArgs)
    assert order[2:] == [1] and "RuntimeError: a bug" in capsys.readouterr().err
    monkeypatch.setattr(script.dist, "get_backend_config", lambda: "cpu:gloo")
    assert outcome(script.Stopped(), monkeypatch, capsys)[0] == 0 and order[3:] == ["destroyed"]


def test_a_process_leaves_nothing_behind():
    """Catches a warning about a progress bar's semaphore at the end of every run where processes are not forked (the
    default of Python 3.14, and of macOS), and processes of a user's file that outlive the run, whose output `tee`
    would go on waiting for."""
    lines = (
        "import multiprocessing, time",
        "from models.common import RuntimeArgs, progress_bar",
        "from models.script import run_script",
        "multiprocessing.set_start_method('forkserver')",
        "multiprocessing.Process(target=time.sleep, args=(100,)).start()",
        "run_script(lambda args: progress_bar(total=1, desc='shown').update(), RuntimeArgs)",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "shown" in done.stderr and "resource_tracker" not in done.stderr, done.stderr


def test_an_error_is_written_at_once(monkeypatch):
    """Catches a newline written by a call of its own: under torchrun, whose processes do not buffer, the messages of
    two ranks ended up in one line. The socket receives each write as one datagram."""

    def main(args):
        raise ValueError("broken")

    monkeypatch.delenv("TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    ours, theirs = socket.socketpair(type=socket.SOCK_DGRAM)
    with ours, theirs, open(theirs.fileno(), "wb", buffering=0, closefd=False) as raw:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", io.TextIOWrapper(raw, write_through=True))  # as python -u has it
            assert run_main(main, OtherArgs) == 2
        assert ours.recv(4096) == b"script.py: error: broken\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_is_printed_and_read(encoding, monkeypatch):
    """Catches a run that fails, at its end or in the middle of a chat, on a character that the terminal lacks, or on a
    progress bar without a stderr."""
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xc3\xa9 \xff\n"), encoding=encoding)
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    for name, stream in (("stdin", typed), ("stdout", shown), ("stderr", None)):
        monkeypatch.setattr(sys, name, stream)
    script.accept_any_text()
    assert sys.stdin.readline().startswith("caf")
    common.progress_bar(total=1).close()
    common.say("é 字 \ud83d")
    text = shown.buffer.getvalue().decode(encoding)
    assert "\\ud83d" in text and ("é" if encoding != "ascii" else "\\xe9") in text
    assert ("字" if encoding == "utf-8" else "\\u5b57") in text


def test_runtime(monkeypatch):
    """Catches a device that is not there accepted, or refused in torch's words rather than ours, and a GPU that is
    named but not taken under torchrun."""
    assert choose_runtime(RuntimeArgs(device="cpu")) == (torch.device("cpu"), torch.float32, False)
    assert choose_runtime(RuntimeArgs(device="cpu", dtype="bfloat16", compile=True)) == (
        torch.device("cpu"),
        torch.bfloat16,
        True,
    )
    for device in ("meta", "gpu", "cuda:77"):
        with pytest.raises(ValueError, match=f"--device {device}: "):
            choose_runtime(RuntimeArgs(device=device))
    monkeypatch.setenv("LOCAL_RANK", "0")
    for device, ranks, why in (
        ("cuda:1", "1", "each rank takes a GPU of its own"),
        ("cuda:0", "2", "each rank takes a GPU of its own"),
        ("cuda:0", "1", "there "),
    ):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        with pytest.raises(ValueError, match=f"--device {device}: {why}"):
            choose_runtime(RuntimeArgs(device=device))


def test_bounds_of_an_integer_that_no_float_holds():
    """Catches a traceback for a flag with hundreds of digits."""
    assert 10**400 in at_least_one and -(10**400) not in at_least_one and 10**400 not in fraction
    assert float("nan") not in at_least_one and float("inf") not in at_least_one
