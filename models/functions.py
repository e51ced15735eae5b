"""Functions of a user's file, FILE.py:NAME: found, told apart, called, and what they return checked.

- a function that grades answers says by its parameters' names whether it takes one answer or a whole batch
- nothing here needs torch, so a worker process that grades answers starts in a tenth of a second
"""

import contextlib
import copy
import importlib.util
import inspect
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import SOURCE_SUFFIXES, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import NamedTuple

ASK_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # a run: training/stop.py
LARGEST = 1e9  # of a reward: its square must be a number in fp32


class FunctionPlace(str):
    """FILE.py:NAME, as the type of a flag: what the file holds belongs to a run, as data does (models/identity.py)."""

    @property
    def path(self) -> Path:
        return Path(self.rpartition(":")[0])

    @property
    def name(self) -> str:
        return self.rpartition(":")[2]


BATCH, ANSWER = ("prompts", "completions", "examples"), ("prompt", "completion", "example")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Around somebody's code, or a decorator: puts back what that may set for the whole process: the directory, which
    paths of flags are meant in, handlers of signals, and torch's gradients, defaults, threads and precision."""
    directory, torch = os.getcwd(), sys.modules.get("torch")
    handlers = {number: signal.getsignal(number) for number in ASK_TO_END}
    if torch is not None:
        learns, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
        precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        os.chdir(directory)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        if torch is not None:
            torch.set_grad_enabled(learns)
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            torch.set_default_device(None)  # none of ours is set
            if torch.get_float32_matmul_precision() != precision:
                torch.set_float32_matmul_precision(precision)


class _Source(SourceFileLoader):
    """Runs a text in the place of the file."""

    text: str

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


def load_function(flag: str, place: str, text: str | None = None) -> Callable:
    """The function NAME of "FILE.py:NAME", which a flag gives. Raises FileNotFoundError or ValueError that says what is
    wrong with it. text: what the file held, where it may hold something else by now."""
    path, separator, name = place.rpartition(":")
    if not separator or not name.isidentifier():
        raise ValueError(f"{flag} {place!r}: must be FILE.py:NAME")
    if text is None and not Path(path).is_file():
        raise FileNotFoundError(f"{flag} {place}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", f"{flag.lstrip('-')}_{place}"), path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{flag} {place}: {path} is not a Python file")
    if text is not None:
        spec.loader = _Source(spec.name, spec.origin)
        spec.loader.text = text
    beside = str(Path(path).resolve().parent)  # where it may import from, as a script does
    sys.path += [beside] * (beside not in sys.path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what dataclasses and pickle in that file look for
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever somebody's file does when it is run
        raise ValueError(f"{flag} {place}: {path} cannot be imported: {short(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{flag} {place}: {path} has no function {name}")
    return function


def short(error: BaseException) -> str:
    """The error of somebody else's code in a line."""
    try:
        text = " ".join(str(error).split())[:200]
    except Exception:  # a __str__ that fails
        text = ""
    return type(error).__name__ + (f": {text}" if text else "")


class Grade(NamedTuple):
    value: float  # NaN where there is none
    failure: str | None = None  # "timeout", or what went wrong


class Grader(NamedTuple):
    """A function that gives answers their grades."""

    flag: str
    place: str  # FILE.py:NAME
    function: Callable
    per_answer: bool  # (prompt, completion, example) -> number; else lists of them -> list of numbers
    is_async: bool
    text: str | None = None  # of the file; None of one that is no text

    @property
    def name(self) -> str:
        return self.place.rpartition(":")[2]


def load_grader(flag: str, place: str, text: str | None = None) -> Grader:
    """See load_function. Raises ValueError also for other parameters than those of the two forms."""
    path = Path(place.rpartition(":")[0])
    if text is None and path.suffix in SOURCE_SUFFIXES and path.is_file():
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):  # whoever imports it will say so
            text = importlib.util.decode_source(path.read_bytes())
    function = load_function(flag, place, text)
    called = (function, getattr(function, "__call__", None))  # noqa: B004 (an object with an async __call__)
    is_async = any(map(inspect.iscoroutinefunction, called))
    for names in (BATCH, ANSWER):
        try:
            signature = inspect.signature(function)
            signature.bind(**dict.fromkeys(names))
        except (TypeError, ValueError):  # other parameters; a built-in without a signature
            continue
        if signature.parameters.keys() >= set(names):
            return Grader(flag, place, function, names == ANSWER, is_async, text)
    raise ValueError(
        f"{flag} {place}: must take ({', '.join(BATCH)}) and return a list of numbers, or ({', '.join(ANSWER)}) and "
        "return a number"
    )


def number(value: object) -> float:
    """A number that a function returned, at most LARGEST in size. Raises TypeError, ValueError or OverflowError for
    anything else."""
    if isinstance(value, str | bytes):
        raise TypeError(f"returned a {type(value).__name__}, not a number")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"returned {result}")
    if abs(result) > LARGEST:
        raise ValueError(f"returned {result}, and a reward is at most {LARGEST:g} in size")
    return result


def call_batch(grader: Grader, prompts: list[str], completions: list[str], examples: list[dict]) -> list[Grade]:
    """The grade of each completion, in order. One has none where the function returned None, or a number that is not
    finite or too large. ValueError if the function fails or returns anything else."""
    where = f"{grader.flag}: {grader.name}"
    own = [copy.deepcopy(example) for example in examples]  # to be changed at will, also where one serves many answers
    columns, pid = (list(prompts), list(completions), own), os.getpid()
    try:
        with undisturbed():
            rewards = grader.function(**dict(zip(BATCH, columns)))
            if inspect.isawaitable(rewards):
                import asyncio  # takes longer than all else that a worker process imports

                rewards = asyncio.run(_awaited(rewards))
            rewards = list(rewards) if isinstance(rewards, Iterator) else rewards
    except KeyboardInterrupt:  # a person's, or that of a signal
        raise
    except BaseException as error:  # somebody's code may raise anything, a generator's while it is read
        raise ValueError(f"{where} raised {short(error)}") from error
    finally:
        if os.getpid() != pid:  # the function forked, and has come back in both
            os._exit(0)
    try:
        if isinstance(rewards, str | dict | set | frozenset):
            raise TypeError(f"it is a {type(rewards).__name__}")
        rewards = list(rewards)
        if len(rewards) != len(completions):
            raise ValueError(f"{where} returned {len(rewards)} rewards for {len(completions)} completions")
        return [_grade_in_batch(reward, where, completion) for reward, completion in zip(rewards, completions)]
    except ValueError:
        raise
    except Exception as error:  # what is no number may raise anything when it is asked for one
        raise ValueError(f"{where} must return a list of numbers: {short(error)}") from None


def _grade_in_batch(reward: object, where: str, completion: str) -> Grade:
    why = "returned None"
    if reward is not None:
        try:
            return Grade(number(reward))
        except (ValueError, OverflowError) as error:
            why = str(error) if isinstance(error, ValueError) else "returned an integer that no float can hold"
    return Grade(math.nan, f"{where} {why} for the completion {completion[:80]!r}")


async def _awaited(value: object) -> object:
    return await value
