"""The process of a script: its errors, its exit code and its end.

- run_script is the only place where an exception becomes a message: a user's mistake (ValueError, OSError) is one
  line on stderr and exit code 2; anything else is a bug and keeps its traceback. With TRACEBACK=1 in the environment
  every error keeps its traceback
"""

import contextlib
import io
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

from models.common import close_bars, is_main_rank, parse_args
from models.sharing import leave_together


class Stopped(Exception):
    """Ends a script early and successfully, as if its main had returned."""


def run_script(main: Callable, Args: type) -> None:
    """Parses the command line, calls main with its Args, and ends the process."""
    accept_any_text()
    # tqdm's default is a multiprocessing lock, which warns at exit where processes are not forked (Python 3.14, macOS)
    tqdm.set_lock(threading.RLock())
    try:
        code = run_main(main, Args)
    except Exception:  # a bug
        traceback.print_exc()
        code = 1
    end_process(code)


def accept_any_text() -> None:
    """Keeps a character that the terminal's encoding lacks from ending a run: on output it becomes an escape, on input
    U+FFFD. Also replaces closed standard streams by /dev/null."""
    for name, mode in zip(("stdin", "stdout", "stderr"), "rww"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # it has been read from already
                stream.reconfigure(errors="replace" if mode == "r" else "backslashreplace")


def end_process(code: int) -> NoReturn:
    """Exits without the interpreter's shutdown: a gloo thread may still hold the last collective's tensors, and aborts
    the process if it drops them during shutdown (torch 2.13, https://github.com/pytorch/pytorch/issues/190489)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    exit_now(code)


def exit_now(code: int) -> NoReturn:
    """Exits without any cleanup, and kills the processes that a user's file has started: they would live on, and keep
    whoever reads this process's output (`| tee`) waiting for its end."""
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(code)


def run_main(main: Callable, Args: type) -> int:
    """Runs main in this process with its command line, reports a user's mistake, and returns the exit code."""
    args = parse_args(Args)
    script, writes = Path(sys.argv[0]).name, getattr(args, "output_file", None) or hasattr(args, "output_dir")
    hint = "; go on with --resume" if writes and hasattr(args, "resume") else ""
    try:
        with contextlib.suppress(Stopped):
            main(args)
        if _has_nccl():  # data that this rank sent may still be in transfer
            torch.cuda.synchronize()
            leave_together()
        return 0
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):  # the same Ctrl-C ended a `tee` behind this process
            close_bars()
            if is_main_rank():
                print(f"{script}: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone (`| head`): no error for a script that only prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not writes:  # the other ranks wait for this one, and torchrun ends them only after a failure
            return 0 if os.environ.get("WORLD_SIZE", "1") == "1" else 2
        with contextlib.suppress(BrokenPipeError):  # stderr may be closed as well
            close_bars()
            print(f"{script}: error: the reader of its output has gone{hint}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        reason = _reason(error)
        if os.environ.get("TRACEBACK") or reason is None:
            raise
        rank = "" if is_main_rank() else f" [rank {os.environ['RANK']}]"
        close_bars()
        sys.stderr.write(f"{script}:{rank} error: {reason}\n")  # one write, so that ranks do not mix their lines
        return 2
    finally:
        if dist.is_initialized() and not _has_nccl():
            dist.destroy_process_group()


def _reason(error: Exception) -> str | None:
    """Returns the one line that tells the user about an error; None if the error is a bug."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory; use smaller batches or shorter rows ({text})"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in text:  # torch's is a plain RuntimeError
        return f"out of memory ({text.rpartition('DefaultCPUAllocator: ')[2]})"
    if isinstance(error, dist.DistError) or "gloo/transport" in text:  # gloo's own errors are plain RuntimeErrors
        why = text.rpartition("Last error: ")[2]  # NCCL's message, without the source location in torch before it
        if "ncclInvalidUsage" in text or "EADDRINUSE" in text:
            return f"the ranks cannot be joined as they were started ({why[:200]})"
        return f"another rank has ended or cannot be reached; see its own error, if it printed one ({why[:160]})"
    return None if isinstance(error, RuntimeError) else text


def _has_nccl() -> bool:
    """Whether the process group uses NCCL or RCCL. Destroying it waits for the other ranks and for CUDA graphs that
    captured its kernels: a rank that failed, or that generated, would never exit
    (https://github.com/pytorch/pytorch/issues/115388)."""
    return dist.is_initialized() and "nccl" in dist.get_backend_config()
