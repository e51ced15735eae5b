"""A pool of processes that grade answers with functions of a user's file, each answer within a deadline.

- whatever a function does, it costs the grade of one answer: if it hangs, exits, crashes or takes all memory, its
  process is killed with everything it started, and replaced
- a process grades one answer at a time, or many at once with an `async def` function; if a process with many must be
  killed, its unfinished answers are graded again, one by one, to find the one at fault
- the processes are fresh interpreters (models/worker_process.py): no torch, no threads, no GPU of the run. They end
  with the run, also after SIGKILL. All run the file as it was when the pool began, even if it is edited meanwhile
"""

import concurrent.futures
import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from models.common import Bounds, at_least_one, flag, positive
from models.functions import Grade, Grader
from models.limits import num_cores
from models.worker_process import AT_A_TIME

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 300.0  # for the imports of the user's file
GRACE_SECONDS = 0.5  # a process enforces the deadlines of async functions itself; it is killed this much later
PROGRAM = "import sys; sys.path[0] = sys.argv.pop(1); from models.worker_process import main; main()"


@dataclass(frozen=True, kw_only=True)
class GradingArgs:
    """Processes that grade answers with functions of a file."""

    reward_timeout: float = flag(10.0, bounds=positive, help="most seconds to grade an answer", may_change=True)
    reward_workers: int | None = flag(
        None,
        bounds=at_least_one,
        help="processes on each rank that grade answers; default: 2 to 8, by the number of CPU cores",
        may_change=True,
    )
    reward_memory: float = flag(
        2.0, bounds=Bounds(above=0, most=10**9), help="most GB of a process that grades", may_change=True
    )

    def num_workers(self) -> int:
        """The flag; unset, half of this rank's share of the machine's cores, within 2 to 8."""
        if self.reward_workers is not None:
            return self.reward_workers
        return min(8, max(2, num_cores(of_rank=True) // 2))


@dataclass(eq=False)
class _Task:
    grader: int
    arguments: tuple[str, str, dict]
    is_async: bool
    alone: bool  # whether its process grades nothing else meanwhile
    grade: concurrent.futures.Future = field(default_factory=concurrent.futures.Future)
    deadline: float = math.inf

    def end(self, grade: Grade) -> None:
        if self.grade.set_running_or_notify_cancel():
            self.grade.set_result(grade)


class Pool:
    """Processes that grade answers with these functions, of the per-answer form. They run until close(), or until the
    pool is garbage-collected. Raises ValueError if a process cannot import a function's file."""

    def __init__(self, graders: Sequence[Grader], args: GradingArgs):
        self.graders = graders
        self._dispatcher = _Dispatcher(graders, args)
        self.close = weakref.finalize(self, self._dispatcher.close)
        self._dispatcher.start()
        self._dispatcher.ready.result()

    def submit(self, grader: int, prompt: str, completion: str, example: dict) -> concurrent.futures.Future:
        """A future of the Grade of an answer by graders[grader]."""
        is_async = self.graders[grader].is_async
        task = _Task(grader, (prompt, completion, example), is_async, alone=not is_async)
        self._dispatcher.submit(task)
        return task.grade


def grade_of(future: concurrent.futures.Future) -> Grade:
    """Waits for a future of Pool.submit. Raises ValueError if the pool has ended."""
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        raise ValueError("the answers are not graded any more: the pool of graders has ended") from None


class _Worker:
    """A process that grades, or the place of one that has ended."""

    def __init__(self):
        self.process: subprocess.Popen | None = None

    def start(self, settings: dict) -> None:
        """Raises OSError if the system cannot start another process."""
        theirs, self.requests = os.pipe()
        self.replies, their_replies = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", PROGRAM, str(ROOT), str(theirs), str(their_replies)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=(theirs, their_replies),
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        except OSError:
            os.close(self.requests)
            os.close(self.replies)
            raise
        finally:
            os.close(theirs)
            os.close(their_replies)
        os.set_blocking(self.requests, False)
        self.ready, self.draining, self.running, self.started = False, False, {}, time.monotonic()
        self.outgoing, self.incoming = bytearray(), bytearray()
        self.send(settings)

    def stop(self, *, gone: bool = False) -> str:
        """Ends the process and all that it has started; returns how it ended. gone: it closed its pipe, so it is ending
        by itself; waits for that first."""
        if gone:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a function may have closed the pipe and live on
                self.process.wait(timeout=0.5)
        os.close(self.requests)  # which makes the process end itself
        os.close(self.replies)
        try:
            code = self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            code = self.process.wait()
        self.process = None
        return f"its process ended, exit code {code}" if code <= 128 else f"its process died of signal {code - 128}"

    def takes(self, task: _Task) -> bool:
        if self.process is None or not self.ready or self.draining:
            return False
        alone = task.alone or any(other.alone for other in self.running.values())
        return len(self.running) < (1 if alone else AT_A_TIME)

    def due(self) -> float:
        """The time from which the process is late with something."""
        deadlines = [task.deadline for task in self.running.values()]
        return min(deadlines, default=math.inf if self.ready else self.started + START_SECONDS)

    def send(self, message: dict) -> None:
        self.outgoing += json.dumps(message).encode() + b"\n"

    def write(self) -> None:
        """Writes what fits into the pipe. Raises BrokenPipeError if the process has closed it."""
        with contextlib.suppress(BlockingIOError):
            del self.outgoing[: os.write(self.requests, self.outgoing[:65536])]

    def read(self) -> list[dict]:
        """The replies that have arrived. Raises EOFError if the pipe is closed, ValueError for anything but replies."""
        data = os.read(self.replies, 65536)
        if not data:
            raise EOFError
        *lines, self.incoming = (self.incoming + data).split(b"\n")
        if len(self.incoming) > 65536:
            raise ValueError("a reply without end")
        return [json.loads(line) for line in lines]


class _Dispatcher(threading.Thread):
    """The thread that hands answers to processes, reads their grades, and replaces processes that fail."""

    def __init__(self, graders: Sequence[Grader], args: GradingArgs):
        super().__init__(daemon=True, name="grading")
        self.timeout, self.closing, self.queue, self.count = args.reward_timeout, False, deque(), 0
        self.where = " and ".join(f"{grader.flag} {grader.place}" for grader in graders)
        self.settings = {
            "path": sys.path,
            "graders": [(grader.flag, grader.place, grader.text) for grader in graders],
            "timeout": args.reward_timeout,
            "memory": int(args.reward_memory * 1e9),
        }
        self.workers = [_Worker() for _ in range(args.num_workers())]
        self.ready = concurrent.futures.Future()  # done once all processes are ready, or one cannot be started
        self.woken, self.waking = os.pipe()
        os.set_blocking(self.waking, False)

    def submit(self, task: _Task) -> None:
        if self.closing:
            task.grade.cancel()
            return
        self.queue.append(task)
        self._wake()

    def close(self) -> None:
        """Ends the processes; cancels what is not graded yet."""
        self.closing = True
        self._wake()
        if threading.current_thread() is not self:  # the garbage collector may call this in it
            self.join()
            os.close(self.woken)
            os.close(self.waking)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes it as well
            os.write(self.waking, b"\n")

    def run(self) -> None:
        try:
            for worker in self.workers:
                self._start(worker)
            while not self.closing:
                self._hand_out()
                self._wait()
                for worker in self.workers:
                    if worker.process is not None and worker.due() <= time.monotonic():
                        slow = f"its import takes over {START_SECONDS:.0f} s; do slow work in the function"
                        self._lost(worker, "timeout" if worker.ready else f"{self.where}: {slow}")
        finally:  # also after an error in this thread, so that no caller waits for ever
            self.closing = True
            tasks = list(self.queue)
            for worker in self.workers:
                if worker.process is not None:
                    tasks += worker.running.values()
                    worker.stop()
            for future in (*(task.grade for task in tasks), self.ready):
                future.cancel()

    def _start(self, worker: _Worker) -> None:
        try:
            worker.start(self.settings)
        except OSError as error:
            self._cannot_start(f"a process to grade answers cannot be started: {error}")

    def _cannot_start(self, why: str) -> None:
        """At the beginning, ends the run; later, fails the next queued answer, if no process is left to grade it, so
        that the queue comes to an end."""
        if not self.ready.done():
            self.closing = True
            self.ready.set_exception(ValueError(why))
        elif self.queue and not any(worker.process is not None and worker.ready for worker in self.workers):
            self.queue.popleft().end(Grade(math.nan, why))

    def _hand_out(self) -> None:
        """Sends queued answers to processes that are free for them."""
        while self.queue:
            for worker in self.workers:
                if worker.process is None and self.queue:
                    self._start(worker)
            free = [worker for worker in self.workers if self.queue and worker.takes(self.queue[0])]
            if free:
                worker, task = min(free, key=lambda each: len(each.running)), self.queue.popleft()
                grace = GRACE_SECONDS if task.is_async else 0.0
                task.deadline = time.monotonic() + self.timeout + grace
                worker.running[self.count] = task
                worker.send({"id": self.count, "grader": task.grader, "arguments": task.arguments})
                self.count += 1
            elif any(worker.process is not None for worker in self.workers):
                return

    def _wait(self) -> None:
        """Waits until something can be read or written, or a process is late."""
        poll, owners = select.poll(), {}
        poll.register(self.woken, select.POLLIN)
        for worker in self.workers:
            if worker.process is not None:
                poll.register(worker.replies, select.POLLIN)
                owners[worker.replies] = worker, worker.process
                if worker.outgoing:
                    poll.register(worker.requests, select.POLLOUT)
                    owners[worker.requests] = worker, worker.process
        due = min((worker.due() for worker, _ in owners.values()), default=math.inf)
        # in milliseconds; poll takes no more than 2^31 of them, and run() waits again
        patience = None if due == math.inf else math.ceil(1000 * min(60.0, max(0.0, due - time.monotonic())))
        for descriptor, _ in poll.poll(patience):
            if descriptor == self.woken:
                os.read(self.woken, 65536)
                continue
            worker, process = owners[descriptor]
            if worker.process is process:  # else the other pipe's end replaced it, and a new pipe may have this number
                self._attend(worker, descriptor)

    def _attend(self, worker: _Worker, descriptor: int) -> None:
        try:
            if descriptor == worker.requests:
                worker.write()
            else:
                for reply in worker.read():
                    self._take(worker, reply)
        except (EOFError, BrokenPipeError):
            self._lost(worker, gone=True)
        except (ValueError, KeyError, TypeError):
            self._lost(worker, "something else was written where grades are expected")

    def _take(self, worker: _Worker, reply: dict) -> None:
        if "ready" in reply:
            worker.ready = True
            if not self.ready.done() and all(each.ready for each in self.workers):
                self.ready.set_result(None)
        elif "refused" in reply:
            self._lost(worker, reply["refused"])
        else:
            task = worker.running.pop(reply["id"])
            task.end(Grade(float(reply.get("value", math.nan)), reply.get("failure")))
            worker.draining |= reply.get("drain", False)
            if reply.get("last") or (worker.draining and not worker.running):
                self._lost(worker, found=True, alone=reply.get("last", False))

    def _lost(
        self, worker: _Worker, why: str | None = None, *, gone: bool = False, found: bool = False, alone: bool = True
    ) -> None:
        """Ends a process and replaces it. why: the failure of its answer, if it had only one; gone: see stop; found:
        whether one that failed has been taken; alone: whether each of the others is graded alone from now on, since
        they may be at fault (together they may need more memory than there is), rather than as before."""
        tasks, ready = list(worker.running.values()), worker.ready
        end = worker.stop(gone=gone)
        if not ready:
            self._cannot_start(why or f"{self.where}: {end} while it imported the file")
            return
        if len(tasks) == 1 and not found:
            tasks[0].end(Grade(math.nan, why or end))
        else:
            for task in reversed(tasks):
                task.alone |= alone
                self.queue.appendleft(task)
        self._start(worker)
