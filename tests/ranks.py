"""Ranks for the tests of parallel runs. Starting them costs more than most of what they then do, so those of each size
serve the whole session, forked from one process that has imported everything: tests/ranks_worker.py."""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests import tiny

TIMEOUT = 300  # seconds for a list of jobs


def _start(*command: object, environment: dict[str, object] | None = None, **options) -> subprocess.Popen:
    """A Python process on the CPU, with a thread for each rank."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    env |= {name: str(value) for name, value in (environment or {}).items()}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True, **options)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def start_torchrun(ranks: int, *command: object, **options) -> subprocess.Popen:
    """torchrun on gloo, for what needs processes of its own."""
    return _start("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command, **options)


def start_nodes(folders: list[Path], *command: object, **options) -> list[subprocess.Popen]:
    """Several nodes of a rank each, in folders of their own, with what torchrun gives it in the environment; without
    torchrun's agents, of which each would import torch, and which would end a rank that does not end by itself."""
    world = {"WORLD_SIZE": len(folders), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "LOCAL_RANK": 0}
    nodes = [{**world, "RANK": rank, "GROUP_RANK": rank} for rank in range(len(folders))]
    return [_start(*command, cwd=each, environment=node, **options) for each, node in zip(folders, nodes)]


class Pool(NamedTuple):
    process: subprocess.Popen
    folder: Path
    size: int

    def run(self, jobs: list[list[object]], fault: str, stdin: str) -> str:
        number = len(list(self.folder.glob("*.json")))
        staging = self.folder / "next"
        staging.write_text(json.dumps({"jobs": [list(map(str, job)) for job in jobs], "fault": fault, "stdin": stdin}))
        staging.rename(self.folder / f"{number}.json")
        deadline = time.monotonic() + TIMEOUT
        while len(list(self.folder.glob(f"{number}.*.done"))) < self.size:
            if self.process.poll() is not None or time.monotonic() > deadline:
                _pool.cache_clear()
                self.kill()
                raise AssertionError((self.folder / "stderr").read_text()[-4000:])
            time.sleep(0.02)
        return "".join((self.folder / f"{number}.{rank}.out").read_text() for rank in range(self.size))

    def stop(self) -> None:
        (self.folder / "stop").touch()
        try:
            self.process.wait(timeout=240)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@cache
def _pool(size: int) -> Pool:
    folder = Path(tempfile.mkdtemp(prefix=f"ranks-{size}-"))
    with open(folder / "stderr", "w") as stderr:
        command = [tiny.ROOT / "tests/ranks_worker.py", folder, os.getpid(), size]
        pool = Pool(_start(*command, stdout=stderr, stderr=stderr, start_new_session=True), folder, size)
    atexit.register(pool.stop)
    return pool


def launch(ranks: int, jobs: list[list[object]], fault: str = "", stdin: str = "") -> str:
    """Runs jobs on so many ranks, one after the other, and returns what the ranks printed; AssertionError with the end
    of their stderr if one fails. fault: of tests/faults.py, planted meanwhile. stdin: what the first rank reads."""
    return _pool(ranks).run(jobs, fault, stdin)
