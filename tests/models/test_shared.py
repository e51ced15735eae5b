"""models/shared.py: one run at a time in a folder, on one host and on several."""

import errno
import fcntl
import json
import os
import signal
import time

import pytest

from models import shared
from models.shared import hold
from tests.forked import fork

WHAT = "--output_dir out"


def in_child(work):
    """Forks a process that does work(), reports its outcome in a line, and then stays until it is killed."""
    reads, writes = os.pipe()

    def reported():
        signal.alarm(60)  # also if the test ends without killing it
        try:
            kept = work()
            os.write(writes, b"done")
            signal.pause()
            return kept
        except BaseException as error:
            os.write(writes, str(error).encode()[:1000])

    child = fork(reported)
    os.close(writes)
    return child, reads


def answer_of(reads) -> str:
    return os.read(reads, 1000).decode()


def end(child, how=signal.SIGKILL):
    os.kill(child, how)
    return os.waitpid(child, 0)


def test_a_lock_goes_with_its_process(tmp_path, monkeypatch):
    """Catches two runs that write one output, a killed run's lock that stays or makes the next run wait, a lock dropped
    when its file is opened and closed once more, and a run refused because the one before is just ending."""
    path = tmp_path / ".lock"
    child, reads = in_child(lambda: hold(path, "x"))
    assert answer_of(reads) == "done"
    monkeypatch.setattr(shared, "GRACE", 0.2)
    monkeypatch.setattr(shared, "BEAT", 0.05)
    monkeypatch.setattr(shared, "SETTLE", 0.05)
    with pytest.raises(ValueError, match=rf"^{WHAT}: another run is writing there \(process {child} on \S+\); wait"):
        hold(path, WHAT)
    end(child)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
        lock = hold(path, WHAT)
    time.sleep(0.3)  # some touches later
    child, reads = in_child(lambda: hold(path, WHAT))
    assert "another run is writing there" in answer_of(reads)
    end(child)
    lock.close()
    assert path.read_bytes() == b""

    child, reads = in_child(lambda: hold(path, "x"))
    assert answer_of(reads) == "done"
    monkeypatch.setattr(shared, "GRACE", 30)
    waiting, answer = in_child(lambda: hold(path, WHAT))
    time.sleep(0.3)
    end(child)
    assert answer_of(answer) == "done"
    end(waiting)


HOSTS = {"no locks": errno.ENOLCK, "locks of a host alone": None}


@pytest.fixture(params=HOSTS)
def hosts(request, monkeypatch):
    """Makes each process a host of its own, on which lockf fails, or excludes nobody."""

    def lockf(*_):
        if HOSTS[request.param]:
            raise OSError(HOSTS[request.param], "injected")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(shared, "_kernel", lambda: str(os.getpid()))
    for name, seconds in {"BEAT": 0.1, "STALE": 2.0, "SETTLE": 0.3, "GRACE": 0.1}.items():
        monkeypatch.setattr(shared, name, seconds)


def test_locks_of_several_hosts(hosts, tmp_path, capsys):
    """Catches a second run on another host while the first lives, a dead host's lock that stays forever, a released
    lock that still holds, and two runs that begin at the same moment and both go on."""
    path = tmp_path / ".lock"
    child, reads = in_child(lambda: hold(path, "x"))
    assert answer_of(reads) == "done"
    with pytest.raises(ValueError, match=rf"^{WHAT}: another run is writing there \(process {child} on "):
        hold(path, WHAT)
    end(child)
    lock = hold(path, WHAT)
    printed = capsys.readouterr().out
    assert "waiting up to" in printed and f"taken over from process {child} on " in printed
    lock.close()
    hold(path, WHAT).close()
    assert capsys.readouterr().out == ""
    path.write_text(json.dumps({"pid": 5, "host": "far", "kernel": "another"}))
    os.utime(path, (1, 1))  # long ago, by the file system's clock: nothing to wait for
    hold(path, WHAT).close()
    assert "waiting" not in (printed := capsys.readouterr().out) and "taken over from process 5 on far" in printed

    both = [in_child(lambda: hold(path, WHAT))[0] for _ in range(2)]
    while not (ended := [child for child in both if os.waitpid(child, os.WNOHANG)[0]]):
        time.sleep(0.05)
    [living] = set(both) - set(ended)  # one of them has found the other
    time.sleep(5 * shared.BEAT)
    assert os.waitpid(living, os.WNOHANG) == (0, 0)
    end(living)


def test_a_run_that_was_taken_for_dead_ends(hosts, tmp_path, capfd):
    """Catches a suspended run that wakes up and goes on beside the run that took its folder over."""
    path = tmp_path / ".lock"
    child, reads = in_child(lambda: hold(path, WHAT))
    assert answer_of(reads) == "done"
    os.kill(child, signal.SIGSTOP)
    lock = hold(path, WHAT)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert capfd.readouterr().err == f"{WHAT}: another run has taken it over; this one ends\n"
    lock.close()
