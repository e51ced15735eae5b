"""Loads and calls functions of a user's file, FILE.py:NAME, and checks what they return.

- the parameter names of a function that grades answers show whether it takes one answer or a whole batch
- nothing here imports torch, so a worker process that grades answers starts in a tenth of a second
"""

import ast
import contextlib
import copy
import functools
import importlib.util
import inspect
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import SOURCE_SUFFIXES, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import NamedTuple

ASK_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # see training/stop.py
LARGEST = 1e9  # largest size of a reward, whose square must be finite in fp32


class FunctionPlace(str):
    """FILE.py:NAME, as the type of a flag; --resume compares the file's content, as for data (models/identity.py)."""

    @property
    def path(self) -> Path:
        return Path(self.rpartition(":")[0])

    @property
    def name(self) -> str:
        return self.rpartition(":")[2]


BATCH, ANSWER = ("prompts", "completions", "examples"), ("prompt", "completion", "example")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Context manager or decorator that restores what a user's code may change for the whole process: the directory
    (flags' paths are relative to it), the stop signals' handlers, the timer of alarms, which would interrupt the run
    later, and torch's grad mode, defaults, threads, precision and GPU. (SIGALRM's handler is for the user's file.)"""
    (alarm, interval), began = signal.getitimer(signal.ITIMER_REAL), time.monotonic()
    directory, torch = os.getcwd(), sys.modules.get("torch")
    handlers = {number: signal.getsignal(number) for number in ASK_TO_END}
    if torch is not None:
        learns, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
        precision = torch.get_float32_matmul_precision()
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        left = max(alarm - (time.monotonic() - began), 1e-6) if alarm else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        os.chdir(directory)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        if torch is not None:
            torch.set_grad_enabled(learns)
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            torch.set_default_device(None)  # we never set one
            if torch.get_float32_matmul_precision() != precision:
                torch.set_float32_matmul_precision(precision)
            if gpu is not None:
                torch.cuda.set_device(gpu)


class _Source(SourceFileLoader):
    """Loads a module from a text instead of its file."""

    text: str

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


def load_function(flag: str, place: str, text: str | None = None) -> Callable:
    """Imports the function NAME of a flag's "FILE.py:NAME". Raises FileNotFoundError or ValueError that says what is
    wrong with it. text: the file's content, if the file may have changed since it was read."""
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
    beside = str(Path(path).resolve().parent)  # so that the file can import its neighbours, as a script can
    sys.path += [beside] * (beside not in sys.path)
    _check_neighbours(f"{flag} {place}", _source(Path(path)) if text is None else text, Path(beside))
    spec.name = spec.loader.name = _importable_name(Path(path)) or spec.name
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look it up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise ValueError(f"{flag} {place}: {path} cannot be imported: {short(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{flag} {place}: {path} has no function {name}")
    return function


def _importable_name(path: Path) -> str | None:
    """Returns the name under which a process that multiprocessing starts anew (the default on macOS, and since Python
    3.14) finds a file beside others of sys.path; None if another module has this name."""
    found = None
    if path.stem.isidentifier() and path.stem not in sys.modules:
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(path.stem)
    is_it = found is not None and found.origin is not None and Path(found.origin).resolve() == path.resolve()
    return path.stem if is_it else None


def _source(path: Path) -> str:
    """Returns a file's text; "" if it cannot be read as Python's: importing it will report the error."""
    with contextlib.suppress(OSError, SyntaxError, UnicodeDecodeError):
        return importlib.util.decode_source(path.read_bytes())
    return ""


def _imported(source: str) -> set[str]:
    """Returns the top-level names that a file imports, also within its functions."""
    names = set()
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names


def _check_neighbours(where: str, source: str, folder: Path) -> None:
    """Raises ValueError, which begins with `where`, if a file imports a module beside it, or such a module another one,
    and Python would take another module of that name: of a package, of the project, or beside another function."""
    sources, seen = [source], set()
    for each in sources:  # grows
        for name in sorted(_imported(each) - seen):
            seen.add(name)
            paths = (folder / name / "__init__.py", folder / f"{name}.py")
            own, spec = next((path for path in paths if path.is_file()), None), None
            with contextlib.suppress(ImportError, ValueError):
                spec = importlib.util.find_spec(name) if own else None
            if spec is not None and (spec.origin is None or Path(spec.origin).resolve() != own.resolve()):
                other = spec.origin or f"a folder {name}"
                raise ValueError(f"{where}: imports {name}, which would be {other}, not {own}; rename the latter")
            sources += [_source(own)] if own else []


def short(error: BaseException) -> str:
    """Formats an error of foreign code in one line."""
    try:
        text = " ".join(str(error).split())[:200]
    except Exception:  # a __str__ that fails
        text = ""
    return type(error).__name__ + (f": {text}" if text else "")


class Grade(NamedTuple):
    value: float  # NaN without a grade
    failure: str | None = None  # "timeout", or a message


class Grader(NamedTuple):
    """A function that grades answers."""

    flag: str
    place: str  # FILE.py:NAME
    function: Callable
    per_answer: bool  # (prompt, completion, example) -> number; else lists of these -> list of numbers
    is_async: bool
    text: str | None = None  # the file's source; None if it cannot be read as text

    @property
    def name(self) -> str:
        return self.place.rpartition(":")[2]


def load_grader(flag: str, place: str, text: str | None = None) -> Grader:
    """load_function() for a grader. Raises ValueError also if its parameters are neither BATCH nor ANSWER."""
    path = Path(place.rpartition(":")[0])
    if text is None and path.suffix in SOURCE_SUFFIXES and path.is_file():
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):  # importing it will report the error
            text = importlib.util.decode_source(path.read_bytes())
    function = load_function(flag, place, text)
    called = (function, getattr(function, "__call__", None))  # noqa: B004 (an object with an async __call__)
    is_async = any(map(inspect.iscoroutinefunction, called))
    options = {}
    if sys.version_info >= (3, 14):  # names suffice: a type may be known to type checkers alone, and is looked up there
        import annotationlib

        options["annotation_format"] = annotationlib.Format.FORWARDREF
    for names in (BATCH, ANSWER):
        try:
            signature = inspect.signature(function, **options)
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
    """Converts a function's result to a number of at most LARGEST in size. Raises TypeError, ValueError or
    OverflowError for anything else."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        raise TypeError(f"returned a {type(value).__name__}, not a number")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"returned {result}")
    if abs(result) > LARGEST:
        raise ValueError(f"returned {result}, but a reward is at most {LARGEST:g} in size")
    return result


def call_batch(grader: Grader, prompts: list[str], completions: list[str], examples: list[dict]) -> list[Grade]:
    """Returns the grade of each completion, in order; NaN where the function returned None, or a number that is not
    finite or too large. Raises ValueError if the function fails or returns anything else."""
    where = f"{grader.flag}: {grader.name}"
    own = [copy.deepcopy(example) for example in examples]  # the function may change them; one may serve many answers
    columns, pid = (list(prompts), list(completions), own), os.getpid()
    try:
        with undisturbed():
            rewards = awaited(grader.function(**dict(zip(BATCH, columns))))
            rewards = list(rewards) if isinstance(rewards, Iterator) else rewards
    except KeyboardInterrupt:  # from Ctrl-C, or raised for a signal
        raise
    except BaseException as error:  # a user's code may raise anything, a generator also while it is consumed
        raise ValueError(f"{where} raised {short(error)}") from error
    finally:
        if os.getpid() != pid:  # the function forked, and returned in the child, too
            os._exit(0)
    try:
        if isinstance(rewards, str | bytes | bytearray | memoryview | dict | set | frozenset):
            raise TypeError(f"it is a {type(rewards).__name__}")
        rewards = list(rewards)
        if len(rewards) != len(completions):
            raise ValueError(f"{where} returned {len(rewards)} rewards for {len(completions)} completions")
        return [_grade_in_batch(reward, where, completion) for reward, completion in zip(rewards, completions)]
    except ValueError:
        raise
    except Exception as error:  # a foreign object may raise anything when it is converted to a number
        raise ValueError(f"{where} must return a list of numbers: {short(error)}") from None


def _grade_in_batch(reward: object, where: str, completion: str) -> Grade:
    why = "returned None"
    if reward is not None:
        try:
            return Grade(number(reward))
        except (ValueError, OverflowError) as error:
            why = str(error) if isinstance(error, ValueError) else "returned an integer that no float can hold"
    return Grade(math.nan, f"{where} {why} for the completion {completion[:80]!r}")


def awaited(result: object) -> object:
    """Returns a function's result, awaited if it is awaitable."""
    return _event_loop().run_until_complete(result) if inspect.isawaitable(result) else result


@functools.cache
def _event_loop():
    """Returns the loop of all calls, since locks and clients of a user's module belong to the loop in which they began.
    It is never closed, which would wait for the threads that a function has started."""
    import asyncio  # takes longer than all other imports of a worker process

    return asyncio.new_event_loop()
