"""training/stop.py by itself: which signals end a run, and when, and outputs that nobody reads."""

import os
import signal
import time

import pytest

from models.script import Stopped
from training.stop import ASK_TO_END, Stop, drop_what_nobody_reads


def test_ctrl_c_that_ends_the_reader_too():
    """Catches a run that ends as failed, or unsaved, because the `tee` behind it had the same Ctrl-C."""
    (reader, writer), kept = os.pipe(), os.dup(1)
    os.close(reader)
    os.dup2(writer, 1)
    stop = Stop()
    stop.keep = lambda failed: f"after {os.write(1, b'what a bar writes')} letters"
    try:
        with pytest.raises(Stopped):
            stop.leave()
    finally:
        os.dup2(kept, 1)


def test_a_terminal_that_has_gone(monkeypatch):
    """Catches a run that cannot print after SIGHUP, a closed stream whose descriptor is reused for the next file, and a
    signal that is handled although nohup set it to be ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = {number: signal.getsignal(number) for number in ASK_TO_END if number != signal.SIGHUP}
    (reader, writer), kept = os.pipe(), os.dup(1)
    os.close(reader)
    try:
        stop = Stop()
        stop.listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert all(signal.getsignal(number) == stop._receive for number in others)
        os.dup2(writer, 1)
        stop._receive(signal.SIGHUP, None)
        assert os.write(1, b"for nobody") == 10 and stop.received
        os.close(1)
        drop_what_nobody_reads()
        assert os.write(1, b"for nobody") == 10
    finally:
        os.dup2(kept, 1)
        for number, handler in {signal.SIGHUP: before, **others}.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_beside_a_call(when, monkeypatch):
    """Catches a signal that ends the run without a save because it comes when the user's function is not running yet,
    or has just returned, but may be interrupted."""

    def interruptible(stop, value):
        if when == "after" and not value and not stop.received:
            stop._receive(signal.SIGTERM, None)
        vars(stop)["_interruptible"] = value
        if when == "before" and value:
            stop._receive(signal.SIGTERM, None)

    stop, place = Stop(), property(lambda self: vars(self)["_interruptible"], interruptible)
    monkeypatch.setattr(Stop, "_interruptible", place, raising=False)
    assert stop.call(lambda: 5) is None and stop.received


@pytest.mark.parametrize("launched", [False, True])
def test_two_signals(launched, monkeypatch):
    """Catches one Ctrl-C counted as two because torchrun passes on a signal that its ranks have already had, torchrun's
    second signal (SIGTERM, whatever it got itself) ignored, and a scheduler's second SIGTERM that ends the process at
    once."""
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    stop = Stop()
    assert stop.keep(False) == "while it loaded"
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        stop._receive(number, None)
    assert stop.received and not exits
    stop._receive(signal.SIGINT, None)
    assert exits == ([] if launched else [130])
    monkeypatch.setattr(time, "monotonic", lambda real=time.monotonic: real() + 2)
    stop._receive(signal.SIGTERM, None)
    assert exits == [130]
