"""Ranks for the tests of parallel runs. Starting ranks takes longer than most of their jobs, so a pool of each size is
kept for the whole session: tests/ranks_worker.py."""

import json
import os
import socket
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from tests.forked import Forked, scratch

TIMEOUT = 300  # seconds for a list of jobs


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def start_torchrun(ranks: int, *command: object, **environment: object) -> Forked:
    """Starts torchrun on gloo, for tests that need separate processes: its ranks are new interpreters."""
    flags = ["--standalone", f"--nproc-per-node={ranks}"]
    torchrun = Path(torch.__file__).parent / "distributed/run.py"
    return Forked(torchrun, *flags, *command, **environment)


def start_nodes(folders: list[Path], *command: object, stdin: str = "") -> list[Forked]:
    """Starts several nodes with a rank each, in separate folders, with torchrun's environment variables but without its
    agents, which would end a rank that does not end by itself. stdin: the whole input of each."""
    world = {"WORLD_SIZE": len(folders), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "LOCAL_RANK": 0}
    places = enumerate(folders)
    return [Forked(*command, cwd=each, stdin=stdin, **world, RANK=rank, GROUP_RANK=rank) for rank, each in places]


class Pool(NamedTuple):
    ranks: list[Forked]
    pipes: list[int]
    folder: Path

    def run(self, jobs: list[list[object]], fault: str, stdin: str) -> str:
        number = len(list(self.folder.glob("*.0.out")))
        request = {"jobs": [list(map(str, job)) for job in jobs], "fault": fault, "stdin": stdin}
        for pipe in self.pipes:
            os.write(pipe, json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + TIMEOUT
        while len(list(self.folder.glob(f"{number}.*.done"))) < len(self.ranks):
            if any(rank.poll() is not None for rank in self.ranks) or time.monotonic() > deadline:
                _pool.cache_clear()
                for rank in self.ranks:
                    rank.kill()
                raise AssertionError("\n".join(rank.read("stderr")[-4000:] for rank in self.ranks))
            time.sleep(0.01)
        return "".join((self.folder / f"{number}.{rank}.out").read_text() for rank in range(len(self.ranks)))


@cache
def _pool(size: int) -> Pool:
    pool = Pool([], [], Path(tempfile.mkdtemp(dir=scratch())))
    world = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    for rank in range(size):
        path = pool.folder / f"requests.{rank}"
        os.mkfifo(path)
        pool.pipes.append(os.open(path, os.O_RDWR))  # O_RDWR waits for no reader; a rank ends with this process
        pool.ranks.append(Forked("tests/ranks_worker.py", pool.folder, **world, RANK=rank, LOCAL_RANK=rank))
    return pool


def launch(ranks: int, jobs: list[list[object]], fault: str = "", stdin: str = "") -> str:
    """Runs jobs on `ranks` ranks, one after the other, and returns their output. Raises AssertionError with the end of
    their stderr if one fails. fault: name of a fault in tests/faults.py to plant. stdin: input of the first rank."""
    return _pool(ranks).run(jobs, fault, stdin)
