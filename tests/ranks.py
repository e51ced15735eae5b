"""Ranks for the tests of parallel runs. Starting them costs more than most of what they then do, so one torchrun launch
of each size serves the whole session: tests/ranks_worker.py."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests import tiny

TIMEOUT = 300  # seconds for a list of jobs


def start_torchrun(ranks: int, *command: object, **options) -> subprocess.Popen:
    """torchrun on gloo, a thread for each rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(list(map(str, [*launcher, *command])), env=env, text=True, **options)


class Pool(NamedTuple):
    process: subprocess.Popen
    folder: Path
    size: int

    def run(self, jobs: list[list[object]], fault: str) -> str:
        number = len(list(self.folder.glob("*.json")))
        staging = self.folder / "next"
        staging.write_text(json.dumps({"jobs": [list(map(str, job)) for job in jobs], "fault": fault}))
        staging.rename(self.folder / f"{number}.json")
        deadline = time.monotonic() + TIMEOUT
        while len(list(self.folder.glob(f"{number}.*.done"))) < self.size:
            if self.process.poll() is not None or time.monotonic() > deadline:
                _pool.cache_clear()
                self.process.kill()
                raise AssertionError((self.folder / "stderr").read_text()[-4000:])
            time.sleep(0.02)
        return "".join((self.folder / f"{number}.{rank}.out").read_text() for rank in range(self.size))

    def stop(self) -> None:
        (self.folder / "stop").touch()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:  # its ranks end when this process has
            self.process.kill()


@cache
def _pool(size: int) -> Pool:
    folder = Path(tempfile.mkdtemp(prefix=f"ranks-{size}-"))
    with open(folder / "stderr", "w") as stderr:
        worker = [tiny.ROOT / "tests/ranks_worker.py", folder, os.getpid()]
        pool = Pool(start_torchrun(size, *worker, stdout=stderr, stderr=stderr), folder, size)
    atexit.register(pool.stop)
    return pool


def launch(ranks: int, jobs: list[list[object]], fault: str = "") -> str:
    """Runs jobs on so many ranks, one after the other, and returns what the ranks printed; AssertionError with the end
    of their stderr if one fails. fault: of tests/faults.py, planted meanwhile."""
    return _pool(ranks).run(jobs, fault)
