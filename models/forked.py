"""Maps a function over an iterable in forked processes, with results in order.

- a forked process shares everything that its parent has loaded, such as a tokenizer, without copying or importing
- results are awaited in order, so the error that is raised is that of the first failing item
- signals that ask to end are the parent's: forked processes block them, since some senders signal all at once (a
  terminal, `timeout`, systemd, Slurm)
- forked processes use neither torch.distributed nor a GPU, which do not survive a fork; they exit without cleanup of
  either, and do not finalise what their parent has left to the garbage collector: the destructor of an earlier run's
  process group joins threads that a fork does not have, and crashes or waits without end
"""

import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkContext, ForkProcess
from typing import TypeVar

from models.functions import ASK_TO_END

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# looked up before a fork, which may find the loader's lock held by a thread that it lacks
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
Thing, Result = TypeVar("Thing"), TypeVar("Result")


class _Process(ForkProcess):
    def terminate(self) -> None:
        """What the pool does to the others when a process has died; they block SIGTERM."""
        self.kill()


class _Context(ForkContext):
    Process = _Process


def map_in_processes(
    function: Callable[[Thing], Result], things: Iterable[Thing], num_workers: int, *, fewer: str
) -> Iterator[Result]:
    """Yields function(thing) of each thing, in order; in this process with fewer than 2 workers, outside Linux, where
    forking is not safe, or without semaphores. Raises the function's exceptions in their turn, and ValueError if a
    process is killed. fewer: what a user does to have fewer processes."""
    if num_workers < 2 or sys.platform != "linux":
        yield from map(function, things)
        return
    try:
        pool = ProcessPoolExecutor(num_workers, _Context(), initializer=_begin, initargs=(function, os.getpid()))
    except OSError:  # its semaphores need a /dev/shm that can be written
        yield from map(function, things)
        return
    waiting: deque = deque()
    try:
        for thing in things:
            waiting.append(_submit(pool, thing))
            if len(waiting) > 2 * num_workers:  # limits the results held in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(f"a worker process was killed, maybe for lack of memory; {fewer}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, thing) -> Future:
    """Submits a call. The first one forks all processes, which keep the blocked signals."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ASK_TO_END)
    try:
        with without_collections():
            return pool.submit(_call, thing)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """The context in which to fork: a collection in the fork, before begin_fork, would take its parent's garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def begin_fork(parent: int) -> None:
    """Makes a forked process leave its parent's garbage alone, and end when its parent does."""
    gc.freeze()
    gc.enable()
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent has ended already
        os._exit(1)


def _begin(function: Callable, parent: int) -> None:
    begin_fork(parent)
    _call.function = function


def _call(thing):
    return _call.function(thing)
