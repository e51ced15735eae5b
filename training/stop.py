"""How a run is left before its end: because of a signal, or of an error that all ranks have found.

- SIGTERM and Ctrl-C ask for an end, and SIGHUP, SIGUSR1 and SIGUSR2, which else end a process at once. It comes where
  nothing is lost: after a step, or where the state is still that of the last one (in a rollout, while answers are
  scored, between forwards, in an evaluation), but not within an update
- all ranks leave at the same place. Those that share no collectives for a while, the data-parallel ranks in a rollout,
  end that by themselves, and agree after it: one that has had no signal takes the others along when it is through
- whoever leaves saves the state first, if it is not saved yet (keep, which Run gives)
- a second Ctrl-C ends the process at once: a checkpoint or an export is whole or absent at any moment
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

from models.common import Stopped, is_main_rank, say
from models.functions import ASK_TO_END

# Under torchrun, where two signals within this time are one: Slurm sends it to the ranks and to torchrun, which passes
# it on. torchrun's own second signal to its ranks is SIGTERM, whatever it has got itself.
AGAIN_SECONDS = 1.0
NOTICE = "\nstopping at the next place where nothing is lost; press Ctrl-C {} to end now\n"


class _Interrupted(KeyboardInterrupt):
    """Raised within somebody's function, which may catch every Exception."""


class Stop:
    """received: whether this process is asked to end. state_of: the step after which weights and optimizer are as they
    are, None within an update, the same on all ranks. keep(failed): saves them, and says when; a collective."""

    def __init__(self):
        self.received, self.state_of = False, 0
        self.keep: Callable[[bool], str] = lambda failed: "while it loaded"
        self._ctrl_c_at: float | None = None
        self._interruptible = False

    def listen(self) -> None:
        """Takes the signals that ask for an end over for this process, but for SIGHUP under nohup."""
        drop_what_nobody_reads()
        for number in ASK_TO_END:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _: object) -> None:
        now, launched = time.monotonic(), "TORCHELASTIC_RUN_ID" in os.environ
        if self._ctrl_c_at is not None and (number == signal.SIGINT or launched):
            if now - self._ctrl_c_at >= (AGAIN_SECONDS if launched else 0.0):
                os._exit(130)
        elif number == signal.SIGINT:
            self._ctrl_c_at = now
        if number == signal.SIGHUP:  # the terminal has gone
            drop_what_nobody_reads()
        if not self.received and is_main_rank():
            with contextlib.suppress(OSError):  # print could meet itself half-way
                os.write(2, NOTICE.format("again" if number == signal.SIGINT else "twice").encode())
        self.received = True
        if self._interruptible:
            self._interruptible = False
            raise _Interrupted

    def check(self) -> None:
        """Leaves the run if a rank is asked to end, unless it is within an update. A collective."""
        if self.state_of is not None and any_rank([self.received])[0]:
            self.leave()

    def leave(self) -> NoReturn:
        """Ends the run, to be resumed. A collective."""
        drop_what_nobody_reads()  # the same Ctrl-C ends the `tee`
        say(f"stopped by a signal {self.keep(False)}; go on with --resume")
        raise Stopped

    def fail(self, message: str) -> NoReturn:
        """Ends the run with a ValueError that all ranks have found. A collective."""
        self.keep(True)
        raise ValueError(message)

    def asked(self, tp: DeviceMesh | None) -> bool:
        """Whether one of the ranks that share a model is asked to end: they must leave an engine together."""
        return self.received if tp is None else any_rank([self.received], tp.get_group())[0]

    def call(self, function: Callable, *args):
        """function(*args), which a signal breaks off wherever it is, unless it is in C; then, or after one, None."""
        self._interruptible = True
        try:
            return None if self.received else function(*args)
        except _Interrupted:
            return None
        finally:
            self._interruptible = False


def drop_what_nobody_reads() -> None:
    """Sends stdout and stderr nowhere if the terminal, or whoever read them, has gone: a run goes on without."""
    for stream in (1, 2):
        reader = select.poll()
        reader.register(stream, 0)
        if reader.poll(0):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != stream:  # which was closed
                os.dup2(nowhere, stream)
                os.close(nowhere)


def any_rank(facts: list[bool], group: dist.ProcessGroup | None = None) -> list[bool]:
    """Whether any rank has each of the facts. A collective, on the CPU, so that it waits for no GPU: less than a
    millisecond between two processes. group: of these ranks; of all."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return facts
    flags = torch.tensor(facts, dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in flags.tolist()]
