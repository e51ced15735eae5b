"""Runs scripts and ranks in processes that can be killed. A new interpreter needs four seconds for their imports, so
the tests' process forks a server before it runs anything (conftest.py). The server has one thread, imports the scripts
once, and forks a process for each request of Forked.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NoReturn

from models.forked import begin_fork, without_collections

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ("torch._dynamo", "torch.onnx", "torch.distributed.checkpoint", "training.train_ppo", "training.train_grpo")
PRELOADED += ("training.finetune_sft", "training.train_rm", "training.train_dpo")
PRELOADED += ("inference.generate", "inference.score", "inference.chat", "tests.ranks_worker")


@cache
def start_server() -> socket.socket:
    """Forks the server, at the first call. It must be called before there are threads (other than pytest-xdist's own),
    since a fork lacks them and keeps their locks. Requests are lines of JSON, answers are numbers or null."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        try:
            serve(theirs)
        finally:
            traceback.print_exc()
            os._exit(1)
    theirs.close()
    return ours


def fork(action: Callable[[], object]) -> int:
    """Returns the pid of a fork of this process that does action() and exits, with code 1 after an error. It leaves
    earlier tests' garbage alone: the destructor of a process group, say, joins threads that the fork lacks."""
    parent = os.getpid()
    with without_collections():
        child = os.fork()
        if child == 0:
            try:
                begin_fork(parent)
                action()
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
    return child


@cache
def scratch() -> Path:
    """Returns a folder that is deleted when the session ends."""
    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def ask(request: object) -> int | None:
    server = start_server()
    server.sendall(json.dumps(request).encode() + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        answer += server.recv(64) or b"null\n"
    return json.loads(answer)


class Forked:
    """Runs a script as from the command line; has as much of subprocess.Popen as the tests need.

    environment: variables beyond those of this process. stdin: its whole input. stdout: a file or a named pipe.
    """

    def __init__(
        self,
        script: Path | str,
        *args: object,
        cwd: Path | None = None,
        stdin: str = "",
        stdout: Path | None = None,
        **environment: object,
    ):
        self.folder, self.returncode = Path(tempfile.mkdtemp(dir=scratch())), None
        for name, text in (("stdin", stdin), ("stdout", ""), ("stderr", "")):
            (self.folder / name).write_text(text, encoding="utf-8")
        if stdout:
            (self.folder / "stdout").unlink()
            (self.folder / "stdout").symlink_to(stdout)
        given = {name: str(value) for name, value in environment.items()}
        request = {"words": [str(ROOT / script), *map(str, args)], "cwd": str(cwd or os.getcwd()), "environment": given}
        self.pid = ask(request | {"folder": str(self.folder)})

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask(self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Waits for the process, and kills it after `timeout` seconds. Returns (stdout, stderr)."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.005)
        return self.read("stdout"), self.read("stderr")

    def read(self, name: str) -> str:
        """Returns the output so far; name: stdout or stderr."""
        return (self.folder / name).read_text(encoding="utf-8")


def run(words: list[str], folder: str, cwd: str, environment: dict[str, str]) -> NoReturn:
    code = 1
    try:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(os.open(Path(folder, name), os.O_WRONLY if number else os.O_RDONLY), number)
        os.environ.update(environment)
        options = {"encoding": environment.get("PYTHONIOENCODING", "utf-8"), "closefd": False}
        sys.stdin, sys.stdout = os.fdopen(0, **options), os.fdopen(1, "w", **options)
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", buffering=1, **options)
        warnings.resetwarnings()  # drops pytest's filters
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may ignore it, under nohup
        sys.argv = words
        os.chdir(cwd)
        runpy.run_path(words[0], run_name="__main__")  # our scripts end the process
        sys.stdout.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve(connection: socket.socket) -> NoReturn:
    """Forks a process for each request and answers with its pid. A request that is a pid is answered with the exit code
    of that process, or null while it runs. Ends with the tests' process, and kills the processes that still run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests' process
    running, imported = set(), False
    with connection.makefile("r", encoding="utf-8") as requests:
        for line in requests:
            request, answer = json.loads(line), None
            if not imported:
                for module in PRELOADED:
                    importlib.import_module(module)
                gc.freeze()  # keeps the modules' memory shared with the forks
                imported = True
            if isinstance(request, int):
                pid, status = os.waitpid(request, os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
                running -= {pid}
            else:
                answer = os.fork()
                if answer == 0:
                    connection.close()
                    run(**request)
                running.add(answer)
            connection.sendall(json.dumps(answer).encode() + b"\n")
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)
