"""A folder that several processes write: one run at a time, and the same folder on every rank.

- a lock is a POSIX lock on a small file, released at once when its process ends, however it ends. Between hosts such
  locks may be missing, or hold on one host only (NFS and Lustre mounts differ): so the file also names its owner, which
  touches it every few seconds. An owner on another host counts as dead when the file has not been touched for a minute,
  by the file system's clock, since the hosts' clocks may differ
- ranks that do not share --output_dir would each write a part of a run that no one can read
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from models.common import is_main_rank, on_main, say
from models.files import naming_file
from models.script import exit_now
from models.sharing import several_ranks

BEAT = 5.0  # seconds between two touches
STALE = 60.0  # seconds without a touch after which an owner on another host counts as dead
GRACE = 3.0  # seconds to wait for a process of this host that may just be ending, which releases its lock
SETTLE = 1.0  # seconds after which two processes that take a lock at the same time know which one has it
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
SEEN_WITHIN = 5.0  # seconds within which a file written on one host appears on the others


class Lock:
    """A lock that hold() has taken. It is released by close(), with this object, or with the process."""

    def __init__(self, file: int, owner: bytes, what: str):
        stop = threading.Event()
        thread = threading.Thread(target=_keep_touching, args=(file, owner, stop, what), daemon=True)
        self.close = weakref.finalize(self, _release, file, owner, stop, thread, os.getpid())
        thread.start()


def hold(path: Path, what: str) -> Lock:
    """Creates a lock file, and takes its lock against other processes, also on other hosts. Raises ValueError, which
    begins with `what`, if another process holds it: after a few seconds' grace if that is on this host, at its next
    sign of life if on another. Raises OSError if the file cannot be created."""
    look = _free(path, what)
    if not look.is_free():
        say(f"{what}: taken over from {look}, which has shown no sign of life for {STALE:.0f} s")
    return _take(look, path, what)


def check_free(path: Path, what: str) -> None:
    """Raises the errors of hold() early, before minutes of loading; neither creates nor changes a lock file."""
    if path.exists():
        os.close(_free(path, what).file)


def _free(path: Path, what: str) -> "_Look":
    """Waits until a lock file has no owner, or its owner counts as dead, and returns what it shows then; this process
    holds its lock, as far as locks work. Raises as hold()."""
    start, first_beat, told = time.monotonic(), None, False
    while True:
        look = _look(path)
        if look.is_free():
            return look
        waited = time.monotonic() - start
        if first_beat is None:
            first_beat = look.beat
            silence = 0.0 if look.here else (_clock_of(path.parent) - look.beat) / 1e9
        is_alive = not look.here and look.beat != first_beat
        may_be_dead = look.locked is not False and not look.here and not is_alive
        if may_be_dead and silence + waited >= STALE:
            return look
        os.close(look.file)
        if is_alive or waited > (GRACE if look.here else 2 * STALE):
            raise ValueError(f"{what}: another run is writing there ({look}); wait for its end, or take another")
        if not look.here and not told:
            told = True
            say(f"{what}: {look} has written there; waiting up to {STALE:.0f} s for a sign of life from it")
        time.sleep(0.1)


class _Look(NamedTuple):
    """The state of a lock file: the open file, whether its POSIX lock is ours now (None: there are no such locks here),
    who wrote it, and when it was last touched."""

    file: int
    locked: bool | None
    owner: dict
    beat: int  # ns of the file system's clock

    @property
    def here(self) -> bool:
        """Whether the POSIX lock alone tells if the owner is alive: it is a process under this kernel."""
        return self.locked is not None and self.owner.get("kernel", _kernel()) == _kernel()

    def is_free(self) -> bool:
        return (self.locked is True and self.here) or (self.locked is None and not self.owner)

    def __str__(self) -> str:
        return f"process {self.owner['pid']} on {self.owner['host']}" if self.owner else "of this host"


def _look(path: Path) -> _Look:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # reopened each time, so that NFS asks the server
        locked = _try_lock(file)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)  # its last owner has removed it meanwhile
    try:
        owner = json.loads(os.pread(file, 4096, 0) or b"{}")
    except ValueError:  # half written by a process that was killed
        owner = {}
    return _Look(file, locked, owner if owner.keys() >= {"pid", "host"} else {}, os.fstat(file).st_mtime_ns)


def _try_lock(file: int) -> bool | None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # POSIX allows either: another process has the lock
            return False
        if error.errno in NO_LOCKS:
            return None
        raise


def _kernel() -> str:
    """An id that is the same for all processes under one kernel, also in containers with their own host names."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return boot_id.read_text().strip() if boot_id.exists() else socket.gethostname()


def _clock_of(folder: Path) -> int:
    """The time now, in ns, by the clock that stamps files in a folder."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b".")
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_mtime_ns


def _take(look: _Look, path: Path, what: str) -> Lock:
    """Writes the owner's name. Without POSIX locks, the later of two processes that do so at once gets the lock."""
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "kernel": _kernel(), "run": secrets.token_hex(8)}
    content = json.dumps(owner).encode()
    with naming_file(path):  # the disk may be full
        os.ftruncate(look.file, 0)
        os.pwrite(look.file, content, 0)
        os.fsync(look.file)
    if look.locked is None:
        time.sleep(SETTLE)
        if path.read_bytes() != content:
            os.close(look.file)
            raise ValueError(f"{what}: another run began to write there at the same time; take another")
    return Lock(look.file, content, what)


def _keep_touching(file: int, owner: bytes, stop: threading.Event, what: str) -> None:
    """The thread of a held lock: touches the file, and ends the process if another run has taken the lock. Two runs may
    have begun at once on hosts whose locks do not reach each other, or one was suspended and taken for dead."""
    seconds = SETTLE
    while not stop.wait(seconds):
        seconds = BEAT
        with contextlib.suppress(OSError):  # the network may fail; tries again next time
            os.utime(file)
            now = os.pread(file, 4096, 0)
            if now and _process_of(now) != _process_of(owner):  # this process may take it again before releasing it
                print(f"{what}: another run has taken it over; this one ends", file=sys.stderr, flush=True)
                exit_now(2)


def _process_of(content: bytes) -> tuple:
    """The process that wrote a lock file; for incomplete content, a value that equals no process."""
    try:
        owner = json.loads(content)
        return owner["kernel"], owner["pid"]
    except (ValueError, KeyError, TypeError):
        return (content,)


def _release(file: int, owner: bytes, stop: threading.Event, thread: threading.Thread, pid: int) -> None:
    if os.getpid() != pid:  # a fork of the owner's process
        return
    stop.set()
    if thread is not threading.current_thread():  # the garbage collector may run this in that thread
        thread.join(1)
    with contextlib.suppress(OSError):
        if os.pread(file, 4096, 0) == owner:
            os.ftruncate(file, 0)
        os.close(file)


# ------------------------------------------------------------------------------- the same on every rank


def existing_part(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_writable(folder: Path, what: str) -> None:
    """Raises OSError, which begins with `what`, if no file can be made in the folder, or in its existing part."""
    place = existing_part(folder)
    if not place.is_dir():
        raise NotADirectoryError(f"{what}: {place} is a file, where a folder is needed")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise OSError(f"{what}: {place} cannot be written: {error.strerror}") from None


def check_shared(folder: Path, what: str, *, writes: bool = True) -> None:
    """Raises ValueError, on all ranks, which begins with `what`, unless each rank that writes there sees the same
    folder, or existing part of the path, as rank 0. A collective; it leaves nothing behind."""
    if not several_ranks():
        return
    token = on_main(lambda: _leave_token(folder, what))
    seen = not writes or _is_seen(token, time.monotonic() + SEEN_WITHIN)
    hosts: list = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, (socket.gethostname(), seen))
    if is_main_rank():
        token.unlink(missing_ok=True)
    blind = {host: rank for rank, (host, seen) in reversed(list(enumerate(hosts))) if not seen}
    if blind:
        names = ", ".join(f"rank {rank} on {host}" for host, rank in list(reversed(blind.items()))[:4])
        more = f" and {len(blind) - 4} more hosts" if len(blind) > 4 else ""
        raise ValueError(
            f"{what}: {names}{more} does not see what rank 0 on {hosts[0][0]} writes there; give a folder on a file "
            "system that all nodes share, under the same path on each"
        )


def _leave_token(folder: Path, what: str) -> Path:
    """Writes a file of random name and content, so that no file of an earlier run or another disk is taken for it."""
    check_writable(folder, what)
    token = existing_part(folder) / f".rank-0-{secrets.token_hex(8)}"
    with naming_file(folder):
        token.write_text(token.name)
    return token


def _is_seen(token: Path, deadline: float) -> bool:
    while True:
        with contextlib.suppress(OSError):
            if token.read_text() == token.name:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
