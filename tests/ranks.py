"""Ranks for the tests of parallel runs. Starting them costs more than most of what they then do, so those of each size
serve the whole session: tests/ranks_worker.py."""

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
    """torchrun on gloo, for what needs processes of its own: its ranks are new interpreters."""
    flags = ["--standalone", f"--nproc-per-node={ranks}"]
    torchrun = Path(torch.__file__).parent / "distributed/run.py"
    return Forked(torchrun, *flags, *command, **environment)


def start_nodes(folders: list[Path], *command: object, stdin: str = "") -> list[Forked]:
    """Several nodes of a rank each, in folders of their own, with what torchrun gives it in the environment; without
    torchrun's agents, which would end a rank that does not end by itself. stdin: all that each can read."""
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
        pool.pipes.append(os.open(path, os.O_RDWR))  # which waits for no reader; this process's end is that of the rank
        pool.ranks.append(Forked("tests/ranks_worker.py", pool.folder, **world, RANK=rank, LOCAL_RANK=rank))
    return pool


def launch(ranks: int, jobs: list[list[object]], fault: str = "", stdin: str = "") -> str:
    """Runs jobs on so many ranks, one after the other, and returns what the ranks printed; AssertionError with the end
    of their stderr if one fails. fault: of tests/faults.py, planted meanwhile. stdin: what the first rank reads."""
    return _pool(ranks).run(jobs, fault, stdin)
