"""A function over many things in forked processes, its results in the order of the things.

- a forked process has all that its parent has, a loaded tokenizer among it, and nothing is copied or imported anew
- a result is asked for in turn, so the first thing that cannot be done is the one that is complained of
- what a process forks here neither asks its group of ranks nor touches a GPU, since neither survives a fork, and ends
  without cleaning up after them
"""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

PR_SET_PDEATHSIG = 1  # linux/prctl.h
Thing, Result = TypeVar("Thing"), TypeVar("Result")


def map_in_processes(
    function: Callable[[Thing], Result], things: Iterable[Thing], num_workers: int
) -> Iterator[Result]:
    """function(thing) of each thing, in their order; in this process with at most one worker, and where processes
    cannot be forked safely (outside Linux). An exception of the function is raised in its turn; ValueError if a process
    is killed."""
    if num_workers < 2 or sys.platform != "linux":
        yield from map(function, things)
        return
    pool = ProcessPoolExecutor(num_workers, get_context("fork"), initializer=_begin, initargs=(function, os.getpid()))
    waiting: deque = deque()
    try:
        for thing in things:
            waiting.append(pool.submit(_call, thing))
            if len(waiting) > 2 * num_workers:  # no more, so that results do not pile up
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a worker process was killed, maybe for its memory; take fewer: --data_workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable, parent: int) -> None:
    """What a forked process does first: it ends with its parent, leaves Ctrl-C to it, and knows the function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)
    _call.function = function


def _call(thing):
    return _call.function(thing)
