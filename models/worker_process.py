"""The code of a process that grades answers with a user's functions, which may do anything.

- it is two processes: one that runs the functions, and a supervisor that never does. When the run or the other process
  has ended, the supervisor kills all remaining processes that the functions started, and ends
- requests and replies are lines of JSON on pipes of their own; what a function prints goes to stderr
- plain functions run one at a time in the main thread, where they may use signals; `async def` functions run
  concurrently in one event loop

models/workers.py starts it. It does not import torch.
"""

import contextlib
import ctypes
import glob
import json
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import BinaryIO, NoReturn

AT_A_TIME = 64  # answers that a process grades at once with an async function
MOST_LATE = 16  # late answers, each of which may hold a thread for ever, after which a process is replaced
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main() -> None:
    """Command-line arguments: the descriptors of the pipe to read requests from and of the pipe for replies."""
    requests, replies = map(int, sys.argv[1:])
    wake, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGCHLD, signal.SIGTERM):  # they wake the supervisor, which then checks what happened
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
    """Calls prctl(2) on Linux; does nothing on other systems, which lack it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# -------------------------------------------------------------------------------------- supervisor


def _supervise(child: int, requests: int, wake: int) -> NoReturn:
    """Waits until the run closes its end of the pipe, or the child ends; then kills all processes that are left. Exits
    with the child's exit code, or 128 + the signal that ended the child."""
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
        os.waitpid(-1, 0)  # the children of a process that ends become ours
    if pids is None:
        os.killpg(0, signal.SIGKILL)  # this process, too, but none that has left the group
    os._exit(code if code >= 0 else 128 - code)


def _children() -> set[int] | None:
    """The children of this process, by whichever thread; None if the system does not tell (Linux does)."""
    if not os.path.exists("/proc/thread-self/children"):
        return None
    found = set()
    for path in glob.iglob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError), open(path) as file:  # the thread may have ended
            found.update(map(int, file.read().split()))
    return found


# --------------------------------------------------------------------------- what runs the functions


def _serve(requests: int, replies: int) -> None:
    """Answers requests until their pipe is closed."""
    from models.functions import load_grader  # the supervisor does not need it

    def send(**reply: object) -> None:
        os.write(replies, json.dumps(reply).encode() + b"\n")

    file = os.fdopen(requests, "rb")
    start = json.loads(file.readline())
    sys.path[:] = start["path"]
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = start["memory"] if hard == resource.RLIM_INFINITY else min(start["memory"], hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # also of each process that this one starts
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
    """_serve() with `async def` functions among others: their answers are graded concurrently. The event loop stops
    while a plain function is called, which may use asyncio itself. A reply with "drain" asks for this process to be
    ended once the answers under way are graded: a function has left processes behind, or threads."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from models.functions import ANSWER, number, short

    async def graded(grader, arguments: list) -> dict:
        try:
            return {"value": number(await grader.function(**dict(zip(ANSWER, arguments))))}
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # SystemExit would end the loop
            return {"failure": short(error), "last": isinstance(error, MemoryError)}

    async def grade_soon(request: dict) -> None:
        task = asyncio.ensure_future(graded(graders[request["grader"]], request["arguments"]))
        done, _ = await asyncio.wait({task}, timeout=timeout)
        reply = task.result() if done and not task.cancelled() else {"failure": "timeout" if not done else "cancelled"}
        task.cancel()
        del under_way[request["id"]]
        left = (_children() or set()) - children
        if not done:
            late.append(request["id"])
        else:  # a process that is younger than an answer under way may be that one's
            left.intersection_update(*(before for _, before in under_way.values()))
        reply["drain"] = bool(left) or len(late) >= MOST_LATE
        send(id=request["id"], **reply)
        if reply.get("last"):
            os._exit(0)

    loop, late, children = asyncio.new_event_loop(), [], _children() or set()
    under_way = {}  # (task, the children when it began) by answer; the loop has only weak references to tasks
    loop.set_default_executor(ThreadPoolExecutor(AT_A_TIME + MOST_LATE))  # for asyncio.to_thread: nobody waits for one
    threading.stack_size(2**21)  # counts as memory, and is usually four times as large
    reader = asyncio.StreamReader(limit=2**31, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    loop.run_until_complete(loop.connect_read_pipe(lambda: protocol, file))
    while line := loop.run_until_complete(reader.readline()):
        request = json.loads(line)
        if graders[request["grader"]].is_async:
            under_way[request["id"]] = loop.create_task(grade_soon(request)), _children() or set()
        else:
            _grade_now(request, graders, send)


def _grade_now(request: dict, graders: list, send: Callable[..., None]) -> None:
    """Grades one answer. Afterwards this process ends, to be replaced, if it ran out of memory, or the function left
    processes behind. (A function with a decorator may be async without being known as such.)"""
    from models.functions import ANSWER, awaited, number, short

    function, arguments = graders[request["grader"]].function, dict(zip(ANSWER, request["arguments"]))
    pid, children, last = os.getpid(), _children() or set(), False
    try:
        reply = {"value": number(awaited(function(**arguments)))}
    except BaseException as error:
        reply, last = {"failure": short(error)}, isinstance(error, MemoryError)
    if os.getpid() != pid:  # the function forked, and returned in both processes
        os._exit(0)
    signal.setitimer(signal.ITIMER_REAL, 0)  # a pending alarm would interrupt the next answer
    last |= bool((_children() or set()) - children)
    send(id=request["id"], **reply, last=last)
    if last:
        os._exit(0)
