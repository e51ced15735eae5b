"""Ends a run early, because of a signal or of an error that all ranks raise.

- SIGTERM, Ctrl-C, SIGHUP, SIGUSR1 and SIGUSR2, which would otherwise kill the process, request a stop. The run stops
  where nothing is lost: after a step, or while the state is still that of the last step (in a rollout, while answers
  are scored, between forward passes, in an evaluation), but not within an update
- all ranks stop at the same place. During a rollout the data-parallel ranks share no collectives: each leaves the
  rollout by itself, one without a signal when its answers are finished, and then they agree to stop
- the state is saved first, if it is not saved yet (keep, which Run sets)
- a second Ctrl-C ends the process at once: checkpoints and exports are complete or absent at any moment
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from models.common import is_main_rank, say
from models.functions import ASK_TO_END
from models.script import Stopped, exit_now

# Under torchrun two signals within this time count as one: Slurm signals the ranks and torchrun, which passes it on. A
# second signal from torchrun to its ranks is always SIGTERM, whatever it received.
AGAIN_SECONDS = 1.0
NOTICE = "\nstopping at the next place where nothing is lost; press Ctrl-C {} to end now\n"


class _Interrupted(KeyboardInterrupt):
    """Raised within a user's function; not an Exception, which the function might catch."""


class Stop:
    """received: whether this process has received a stop signal. state_of: the step whose result the weights and the
    optimizer hold, None within an update; the same on all ranks. keep(failed): saves them and says when. Collective."""

    def __init__(self):
        self.received, self.state_of = False, 0
        self.keep: Callable[[bool], str] = lambda failed: "while it loaded"
        self._ctrl_c_at: float | None = None
        self._pid = os.getpid()
        self._interruptible = False

    def listen(self) -> None:
        """Installs the handler of the stop signals in this process; under nohup SIGHUP stays ignored."""
        drop_what_nobody_reads()
        for number in ASK_TO_END:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _: object) -> None:
        if os.getpid() != self._pid:  # a process that a user's function has forked: nothing in it would ever stop
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
            return
        now, launched = time.monotonic(), "TORCHELASTIC_RUN_ID" in os.environ
        if self._ctrl_c_at is not None and (number == signal.SIGINT or launched):
            if now - self._ctrl_c_at >= (AGAIN_SECONDS if launched else 0.0):
                exit_now(130)
        elif number == signal.SIGINT:
            self._ctrl_c_at = now
        if number == signal.SIGHUP:  # the terminal was closed
            drop_what_nobody_reads()
        if not self.received and is_main_rank():
            with contextlib.suppress(OSError):  # print is not reentrant in a signal handler
                os.write(2, NOTICE.format("again" if number == signal.SIGINT else "twice").encode())
        self.received = True
        if self._interruptible:
            self._interruptible = False
            raise _Interrupted

    def check(self) -> None:
        """Ends the run if a rank has received a signal, unless it is within an update. A collective."""
        if self.state_of is not None and any_rank([self.received])[0]:
            self.leave()

    def leave(self) -> NoReturn:
        """Saves the state and ends the run, to be resumed. A collective."""
        drop_what_nobody_reads()  # the same Ctrl-C may have ended a `tee` behind this process
        say(f"stopped by a signal {self.keep(False)}; go on with --resume")
        raise Stopped

    def fail(self, message: str) -> NoReturn:
        """Saves the state and ends the run with a ValueError. A collective: all ranks must call it."""
        self.keep(True)
        raise ValueError(message)

    def asked(self, tp: DeviceMesh | None) -> bool:
        """Whether one of the tensor-parallel ranks has received a signal: they must leave an engine together."""
        return self.received if tp is None else any_rank([self.received], tp.get_group())[0]

    def call(self, function: Callable, *args):
        """Returns function(*args), or None if a signal has come before or interrupts it; C code is not interrupted."""
        try:  # the signal may come just before or after the call, too
            self._interruptible = True
            try:
                return None if self.received else function(*args)
            finally:
                self._interruptible = False
        except _Interrupted:
            return None


def drop_what_nobody_reads() -> None:
    """Redirects stdout and stderr to /dev/null if their terminal or reader is gone, so that the run goes on."""
    for stream in (1, 2):
        reader = select.poll()
        reader.register(stream, 0)
        if reader.poll(0):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != stream:  # equal if the stream was closed
                os.dup2(nowhere, stream)
                os.close(nowhere)


def any_rank(facts: list[bool], group: dist.ProcessGroup | None = None) -> list[bool]:
    """Returns for each of the facts whether any rank has it. A collective on the CPU, which waits for no GPU: less than
    a millisecond between two processes. group: the ranks; default: all."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return facts
    flags = torch.tensor(facts, dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in flags.tolist()]
