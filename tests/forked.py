"""Scripts in processes that can be killed. A new interpreter takes four seconds to import what a script needs, so one
process of the session has imported it, does nothing else, and forks: python -m tests.forked, of which Forked asks.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ("torch._dynamo", "torch.onnx", "torch.distributed.checkpoint", "training.train_ppo", "training.train_grpo")
PRELOADED += (
    "training.finetune_sft",
    "training.train_rm",
    "training.train_dpo",
    "inference.generate",
    "inference.score",
)


@cache
def _parent() -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.forked"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.stdin.close)
    return process


class Forked:
    """A script as from the command line, one at a time; as much of subprocess.Popen as the tests need."""

    def __init__(self, script: str, *args: object):
        self.folder, self.returncode = Path(tempfile.mkdtemp(prefix="forked-")), None
        self.parent = _parent()
        request = {"words": [str(ROOT / script), *map(str, args)], "folder": str(self.folder), "cwd": os.getcwd()}
        self.parent.stdin.write(json.dumps(request) + "\n")
        self.parent.stdin.flush()
        self.pid = int(self.parent.stdout.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.parent.stdout], [], [], 0)[0]:
            self.returncode = int(self.parent.stdout.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """(stdout, stderr) of a process that ends within so many seconds; else it is killed."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.002)
        return (self.folder / "stdout").read_text(), (self.folder / "stderr").read_text()


def run(words: list[str], folder: str, cwd: str) -> NoReturn:
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
        sys.argv = words
        os.chdir(cwd)
        runpy.run_path(words[0], run_name="__main__")  # which ends the process
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def serve() -> None:
    """For each request in a line on stdin prints the number of the process that runs it, and its exit code when it has
    ended."""
    for module in PRELOADED:
        importlib.import_module(module)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(**json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
