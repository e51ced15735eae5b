"""Processes that scripts/torture.py kills: starting them, finding the phase they are in, killing them.

- one rank is forked from this process, which has imported everything, so that a kill costs a second; four ranks, 2 x 2,
  are started by torchrun
- the phase is read from files on disk, so it is also known after a kill
"""

import contextlib
import math
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 600  # for an attempt; a busy machine takes a minute to start four ranks


class Job(NamedTuple):
    script: str
    phases: tuple[str, ...]
    flags: str  # {world} stands for the world's folder
    lines: str = ""  # name of the output file of lines; "" for a trainer

    @property
    def title(self) -> bytes:
        """The beginning of the card that a run prints once it has started."""
        return b"%s\n  " % Path(self.script).stem.encode()


class Attempt:
    """A process, or torchrun and its ranks, that runs a job in a folder."""

    def __init__(self, job: Job, out: Path, world: Path, ranks: int, *, resume: bool, most_bytes: int | None = None):
        self.job, self.out, self.mark, self.log = job, out, Path(f"{out}.mark"), b""
        self.mark.unlink(missing_ok=True)
        where = ["--output_file", out / job.lines] if job.lines else ["--output_dir", out]
        flags = [*job.flags.format(world=world).split(), *where, "--device", "cpu"] + ["--resume"] * resume
        flags += ["--tensor_parallel_size", 2] if ranks == 4 else []
        words = [str(word) for word in (ROOT / job.script, *flags)]
        self.began, self.ranks, self.code, self.deadline = time.time_ns(), ranks, None, time.monotonic() + LIMIT_SECONDS
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORTURE_MARK": str(self.mark)}
        self.reads, writes = os.pipe()  # a pipe, since a full disk would cut a file short
        os.set_blocking(self.reads, False)
        if ranks == 1:
            self.pid = fork(words, environment, writes, most_bytes)
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command, environment = [sys.executable, *launcher, *words], {**os.environ, **environment}
            self.pid = subprocess.Popen(command, stdout=writes, stderr=writes, env=environment, process_group=0).pid
        os.close(writes)

    def ended(self) -> bool:
        """Whether the attempt has ended. If it takes more than LIMIT_SECONDS, kills it and raises TimeoutError."""
        if self.code is None and time.monotonic() > self.deadline:
            self.deadline = math.inf
            self.kill()
            raise TimeoutError(f"hung: {self.close()[-300:]!r}")
        self._read_log()
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def _read_log(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.reads, 1 << 16):
                self.log += piece

    def close(self) -> str:
        """Returns the output of an attempt that has ended."""
        self._read_log()
        os.close(self.reads)
        return self.log.decode(errors="replace")

    def wait(self) -> int:
        while not self.ended():
            time.sleep(0.005)
        return self.code

    def kill(self) -> None:
        """Sends SIGKILL to the launcher and all its descendants; returns when they are gone."""
        pids = [self.pid]
        for pid in pids:  # stopped first, so that none can start another one unseen
            send(pid, signal.SIGSTOP)
            pids += started_by(pid)
        for pid in pids:
            send(pid, signal.SIGKILL)
        self.wait()
        while any(state_and_parent(pid)[0] not in "ZX" for pid in pids):
            time.sleep(0.002)

    def phase(self) -> str:
        """Returns the phase of the attempt, from its output and files on disk; also after a kill."""
        if self.job.title not in self.log:
            return "start"
        if self._is_new(self.out / "checkpoints", "step-"):
            return "save"
        if any(self._is_new(folder) for folder in (self.out, *self.out.glob("step-*"))):
            return "export"
        if "rollout" in self.job.phases and not self.job.lines:
            return self._phase_of_update()
        return next(phase for phase in ("step", "rollout", "score") if phase in self.job.phases)

    def _is_new(self, folder: Path, name: str = "") -> bool:
        """Whether this attempt is writing a .partial folder here; those left by kills are older than the attempt."""
        with contextlib.suppress(OSError):  # the folder has just been renamed
            for entry in os.scandir(folder):
                is_partial = entry.name.startswith(f".{name}") and entry.name.endswith(".partial") and entry.is_dir()
                if is_partial and entry.stat().st_mtime_ns > self.began:
                    return True
        return False

    def _phase_of_update(self) -> str:
        try:
            mark, marked = self.mark.read_text(), self.mark.stat().st_mtime_ns
            logged = (self.out / "metrics.jsonl").stat().st_mtime_ns
        except OSError:
            return "rollout"  # the first one
        return "score" if mark == "begin" else "step" if marked > logged else "rollout"

    def progress(self) -> int:
        """Number of lines written so far, of metrics or results."""
        path = self.out / (self.job.lines or "metrics.jsonl")
        return path.read_bytes().count(b"\n") if path.exists() else 0


def fork(words: list[str], environment: dict[str, str], log: int, most_bytes: int | None) -> int:
    """Runs a script as from the command line, in a fork of this process, which has imported torch. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr, sys.argv = *(os.fdopen(stream, "w", buffering=1) for stream in (1, 2)), words
    tqdm.set_lock(threading.RLock())  # a new lock, which no thread of the parent holds
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        runpy.run_path(words[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def state_and_parent(pid: int) -> tuple[str, int]:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[0], int(words[1])
    except OSError:
        return "X", 0


def started_by(pid: int) -> list[int]:
    each = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [child for child in each if state_and_parent(child)[1] == pid]


def send(pid: int, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # the process has just ended
        os.kill(pid, what)
