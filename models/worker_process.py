"""A process that grades answers with somebody's functions, which may do anything: what runs on its side.

- it is two processes: one that runs the functions, and a supervisor that never does. When the run that started them is
  gone, or the other process is, the supervisor kills whatever is left of what the functions started, and ends
- requests and replies are lines of JSON on pipes of their own; what a function prints goes to stderr
- functions without await run one at a time in the main thread, where they may use signals; `async def` ones side by
  side in one event loop

models/workers.py starts it. It does not import torch.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main() -> None:
    """Arguments of the command line: the descriptors of the pipe to read requests from and of that for replies."""
    requests, replies = map(int, sys.argv[1:])
    wake, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGCHLD, signal.SIGTERM):  # they wake the supervisor, which then looks what there is
        signal.signal(number, lambda *_: None)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a function starts in the background becomes a child of the supervisor
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    child = os.fork()
    if child:
        os.close(replies)
        _supervise(child, requests, wake)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _serve(requests, replies)
        os._exit(0)
    finally:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    """Does nothing where there is no such call: only Linux has it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# -------------------------------------------------------------------------------------- supervisor


def _supervise(child: int, requests: int, wake: int) -> NoReturn:
    """Waits until the run closes its end of the pipe, or the child ends; then kills all that is left. Its exit code is
    that of the child, 128 + the signal that ended it."""
    poll, code = select.poll(), None
    poll.register(requests, 0)  # POLLHUP alone: the child reads
    poll.register(wake, select.POLLIN)
    while code is None:
        events = dict(poll.poll())
        told_to_end = requests in events or signal.SIGTERM in (os.read(wake, 512) if wake in events else b"")
        while code is None:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
            elif pid == 0:
                code = 0 if told_to_end else None
                break
    while pids := _children():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(-1, 0)  # the children of what ends become ours
    if pids is None:
        os.killpg(0, signal.SIGKILL)  # all but what has left the group, and this process
    os._exit(code if code >= 0 else 128 - code)


def _children() -> set[int] | None:
    """The children of this thread; None where the system does not tell (Linux does)."""
    try:
        with open("/proc/thread-self/children") as file:
            return {int(pid) for pid in file.read().split()}
    except OSError:
        return None


# --------------------------------------------------------------------------- what runs the functions


def _serve(requests: int, replies: int) -> None:
    """Grades what is asked until nobody asks any more."""
    from models.functions import load_grader  # the supervisor does without

    def send(**reply: object) -> None:
        os.write(replies, json.dumps(reply).encode() + b"\n")

    file = os.fdopen(requests, "rb")
    start = json.loads(file.readline())
    sys.path[:] = start["path"]
    resource.setrlimit(resource.RLIMIT_DATA, 2 * (start["memory"],))  # also of each process that this one starts
    try:
        graders = [load_grader(*each) for each in start["graders"]]
    except (ValueError, OSError) as error:
        send(refused=str(error))
        return
    send(ready=True)
    if any(grader.is_async for grader in graders):
        _serve_side_by_side(file, graders, start["timeout"], send)
    else:
        for line in file:
            _grade_now(json.loads(line), graders, send)


def _serve_side_by_side(file: BinaryIO, graders: list, timeout: float, send: Callable[..., None]) -> None:
    """The same with some `async def` functions, whose answers are under way at once. The loop stands still while one of
    the others is called, which may use asyncio itself."""
    import asyncio

    from models.functions import ANSWER, number, short

    async def graded(grader, arguments: list) -> dict:
        try:
            return {"value": number(await grader.function(**dict(zip(ANSWER, arguments))))}
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # SystemExit would end the loop
            return {"failure": short(error)}

    async def grade_soon(request: dict) -> None:
        task = asyncio.ensure_future(graded(graders[request["grader"]], request["arguments"]))
        done, _ = await asyncio.wait({task}, timeout=timeout)
        reply = task.result() if done and not task.cancelled() else {"failure": "timeout" if not done else "cancelled"}
        task.cancel()
        send(id=request["id"], **reply)

    loop, under_way = asyncio.new_event_loop(), set()
    reader = asyncio.StreamReader(limit=2**31, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    loop.run_until_complete(loop.connect_read_pipe(lambda: protocol, file))
    while line := loop.run_until_complete(reader.readline()):
        request = json.loads(line)
        if graders[request["grader"]].is_async:
            under_way.add(task := loop.create_task(grade_soon(request)))  # the loop itself holds its tasks weakly
            task.add_done_callback(under_way.discard)
        else:
            _grade_now(request, graders, send)


def _grade_now(request: dict, graders: list, send: Callable[..., None]) -> None:
    """Grades one answer. This process ends, to be replaced, if it is not as good as new afterwards: short of memory, or
    with processes that the function left behind."""
    from models.functions import ANSWER, number, short

    function, arguments = graders[request["grader"]].function, dict(zip(ANSWER, request["arguments"]))
    pid, children, last = os.getpid(), _children() or set(), False
    try:
        reply = {"value": number(function(**arguments))}
    except BaseException as error:
        reply, last = {"failure": short(error)}, isinstance(error, MemoryError)
    if os.getpid() != pid:  # the function forked, and has come back in both
        os._exit(0)
    signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm would meet the next answer
    last |= bool((_children() or set()) - children)
    send(id=request["id"], **reply, last=last)
    if last:
        os._exit(0)
