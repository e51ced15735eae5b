"""What every script shares: command-line flags, the device, and terminal output.

- a flag is a field of a frozen dataclass, declared once, in a group beside the code that uses it; a script's own Args
  inherits the groups it needs, and a subclass changes a flag's default by assigning another value
- nothing here depends on a model, a loss or a data format
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import resource
import sys
import time
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from models.caches import keep_compiled_code
from models.cpu_linear import has_bf16_products
from models.gpu import compiles_for_cpu, has_triton
from models.limits import num_cores
from models.malloc import keep_freed_memory
from models.sharing import several_ranks, wait_for_all_ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_main_rank() -> bool:
    """Whether this process is rank 0, which prints and writes; works before torch.distributed has started."""
    return os.environ.get("RANK", "0") == "0"


# ------------------------------------------------------------------------------------------- flags

FLOAT32_MAX = torch.finfo(torch.float32).max


class Bounds(NamedTuple):
    above: float = -math.inf
    least: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        # an integer counts as finite whatever its size, unlike by math.isfinite; a float as in the fp32 it is used in
        is_finite = abs(value) <= (FLOAT32_MAX if isinstance(value, float) else math.inf)
        return is_finite and self.above < value < self.below and self.least <= value <= self.most

    def __str__(self) -> str:
        signs = zip((">", ">=", "<=", "<"), self)
        return " and ".join(f"{sign} {bound}" for sign, bound in signs if math.isfinite(bound))


def flag(
    default: object = dataclasses.MISSING,
    *,
    help: str,
    bounds: Bounds = Bounds(),
    choices: typing.Iterable | None = None,
    may_change: bool | Callable[[object], bool] = False,
    written: bool = False,
    **argparse_options,
):
    """Declares a flag as a dataclass field; the flag has the field's name and type. Without a default it is required.

    bounds: of a number; NaN and what is infinite in fp32 are always refused. may_change: whether a resumed run may have
    another value, because the flag cannot alter what the run computes; or a function of all flags that returns this.
    written: the run writes to this Path; every other Path is an input, whose content --resume compares
    (models/identity.py). argparse_options: passed to add_argument.
    """
    options = {"help": help, "choices": None if choices is None else tuple(choices), **argparse_options}
    held = {"may_change": may_change, "written": written}
    return dataclasses.field(default=default, metadata={"options": options, "bounds": bounds, **held})


def with_newlines(text: str) -> str:
    r"""Replaces \n in a flag's text by newlines; for flags with type=with_newlines."""
    return text.replace("\\n", "\n")


positive = Bounds(above=0)
non_negative = Bounds(least=0)
at_least_one = Bounds(least=1)
fraction = Bounds(least=0, most=1)


class Flag(NamedTuple):
    name: str
    default: object
    group: type  # the dataclass that declares it
    metadata: typing.Mapping
    replaces_none: bool  # a subclass replaced the default None, whose meaning ends the help: "...; bfloat16 on a GPU"


def flags_of(Args: type) -> list[Flag]:
    """Returns the flags of a dataclass: its own first, then those of its base classes in their order."""
    flags = []
    for field in dataclasses.fields(Args):
        # a subclass that only assigns another default has no metadata: take help and bounds from the declaring class
        fields = [(c, vars(c)["__dataclass_fields__"].get(field.name)) for c in Args.__mro__[:-1]]
        declared = [(c, declaration) for c, declaration in fields if declaration and declaration.metadata]
        nearest, replaces_none = declared[0][1], declared[0][1].default is None is not field.default
        flags.append(Flag(field.name, field.default, declared[-1][0], nearest.metadata, replaces_none))
    return sorted(flags, key=lambda each: Args.__mro__.index(each.group))  # stable


def given_of(args, *names: str) -> list[str]:
    """Returns those of these flags that are given, with their values, as in a command line."""
    given = []
    for each in flags_of(type(args)):
        if each.name in names and getattr(args, each.name) != each.default:
            value = getattr(args, each.name)
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            given.append(f"--{'no-' * (not value)}{each.name}" if isinstance(value, bool) else f"--{each.name} {value}")
    return given


def refuse_idle(args, why: str, *names: str) -> None:
    """Raises ValueError if one of these flags is given, since it would have no effect; names the first one."""
    for given in given_of(args, *names):
        raise ValueError(f"{given} does nothing {why}")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # None and empty defaults are not shown: the help text describes them
        shown = action.default not in (None, ()) and str(action.default).strip()
        text = super()._get_help_string(action) if shown else action.help
        several = isinstance(action.default, tuple)
        return text.replace("%(default)s", " ".join(map(str, action.default))) if several else text


class ArgumentParser(argparse.ArgumentParser):
    """Parser for a dataclass of flags: --help shows defaults, flags cannot be abbreviated, errors take one line."""

    def __init__(self, Args: type):
        flags, types_of, groups = flags_of(Args), typing.get_type_hints(Args), {}
        needed = [_shown(each) for each in flags if each.default is dataclasses.MISSING]
        super().__init__(
            usage=" ".join(["%(prog)s", *needed, "[--flag value ...]"]),
            description=_first_sentence(Args),
            formatter_class=partial(_HelpFormatter, max_help_position=34),
            allow_abbrev=False,
        )
        self._negative_number_matcher = re.compile(r"-\.?\d")  # Python 3.14's; earlier ones take -1e-3 for a flag
        for each in flags:
            if each.group not in groups:
                own = "flags of this script" if each.group is Args else _first_sentence(each.group).rstrip(".")
                groups[each.group] = self.add_argument_group(own)
            _add_flag(groups[each.group], each, types_of[each.name])

    def error(self, message: str):
        hint = "; a value that begins with - is given as --flag=VALUE" * message.endswith(" one argument")
        self.exit(2, f"{self.prog}: error: {message}{hint}\n")


def _shown(each: Flag) -> str:
    """A required flag, as the usage line shows it."""
    options = each.metadata["options"]
    return options.get("metavar", each.name) if "positional" in options else f"--{each.name} ..."


def _first_sentence(Args: type) -> str:
    return " ".join(Args.__doc__.partition("\n\n")[0].split())


def _add_flag(group, each: Flag, kind: object) -> None:
    options = dict(each.metadata["options"])
    if each.replaces_none:
        options["help"] = options["help"].rpartition("; ")[0]
    if isinstance(kind, types.UnionType):  # X | None
        [kind] = [part for part in typing.get_args(kind) if part is not types.NoneType]
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
        del options["choices"]
    elif typing.get_origin(kind) is list:
        [kind] = typing.get_args(kind)
        if "action" not in options:
            options.setdefault("nargs", "+")
    if kind is not bool:
        options.setdefault("type", _number(kind, each.metadata["bounds"]) if kind in (int, float) else kind)
        if options["choices"] is None and "positional" not in options:
            options.setdefault("metavar", {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT"))
    required = each.default is dataclasses.MISSING
    if options.pop("positional", False):
        group.add_argument(each.name, **options)
    else:
        group.add_argument(f"--{each.name}", required=required, default=None if required else each.default, **options)


def _number(kind: type, bounds: Bounds) -> Callable[[str], float]:
    article = "an" if kind is int else "a"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value not in bounds:
            limits = "that fp32 can hold" if kind is float and FLOAT32_MAX < abs(value) < math.inf else bounds
            raise argparse.ArgumentTypeError(f"{text!r} is not {article} {kind.__name__} {limits}".rstrip())
        return value

    return parse


def count_or_auto(text: str) -> int | None:
    """The type of a flag that takes a number of at least 1, or auto, which is parsed as None."""
    return None if text == "auto" else _number(int, at_least_one)(text)


def parse_args(Args: type, arguments: list[str] | None = None):
    """Parses a command line, by default this process's, into Args."""
    parser = ArgumentParser(Args)
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        names = {name.replace("-", "_"): name for name in parser._option_string_actions}
        like = difflib.get_close_matches(unknown[0].partition("=")[0].replace("-", "_"), names, n=1, cutoff=0.75)
        hint = f"did you mean {names[like[0]]}?" if like else "--help lists the flags"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; {hint}")
    return Args(**vars(values))


# ------------------------------------------------------------------------------------------ device


@dataclass(frozen=True, kw_only=True)
class RuntimeArgs:
    """Device, dtype, seed and compilation."""

    device: str | None = flag(None, help="cpu, cuda, cuda:1, ...; default: the GPU if there is one", may_change=True)
    dtype: str | None = flag(
        None,
        choices=("float32", "bfloat16"),
        help="dtype of the computation; default: bfloat16 on a GPU, float32 on a CPU",
    )
    seed: int = flag(0, help="seed of all random numbers")
    compile: bool | None = flag(
        None, help="torch.compile; default: on for a GPU where Triton works, off for a CPU", may_change=True
    )


class Runtime(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of the computation
    compile: bool

    def __str__(self) -> str:
        note = ""
        if self.device.type == "cpu" and self.dtype == torch.bfloat16 and not has_bf16_products():
            note = " (this CPU has no instructions for it: inference multiplies in float32)"
        return f"{device_name(self.device)}, {dtype_name(self.dtype)}{note}" + ", compiled" * self.compile


def choose_runtime(args: RuntimeArgs) -> Runtime:
    """Chooses device, dtype and compilation where no flag does. Raises ValueError for a device that does not exist."""
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {args.device}: not a device name; try cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device}: only cpu and cuda (NVIDIA or AMD) are supported")
    on_gpu = device.type == "cuda"
    of_rank = (os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE"))
    if on_gpu and device.index is not None and of_rank[0] is not None and of_rank != (str(device.index), "1"):
        raise ValueError(f"--device {args.device}: each rank takes a GPU of its own; name them in CUDA_VISIBLE_DEVICES")
    if on_gpu:  # torch.cuda.set_device needs the index; Triton launches its kernels on the current device
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index >= count:
            raise ValueError(f"--device {args.device or device}: there is no such GPU here ({count} found)")
        torch.cuda.set_device(device)
    keep_compiled_code()  # before Triton is tried, which writes there
    if on_gpu and args.compile and not has_triton(device):
        raise ValueError("--compile: Triton, which compiles for GPUs, does not work here; leave the flag out")
    if not on_gpu and args.compile and not compiles_for_cpu():
        raise ValueError("--compile: g++ (or what CXX names), which compiles for CPUs, is missing; leave the flag out")
    if not on_gpu:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:  # torch counts all the host's cores, also those a container may not use
            torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
    dtype = DTYPES[args.dtype] if args.dtype else (torch.bfloat16 if on_gpu else torch.float32)
    return Runtime(device, dtype, has_triton(device) if args.compile is None else args.compile)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    count = torch.get_num_threads()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {count} thread{'s' * (count > 1)}"


def peak_memory(device: torch.device) -> int:
    """Returns the peak number of bytes in use so far, of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopwatch:
    """Measures the seconds between calls of lap(); lap() waits for the device first, so only finished work counts."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self) -> float:
        now = self._now()
        seconds, self.last = now - self.last, now
        return seconds


# ------------------------------------------------------------------------------------ terminal output


def say(text: str) -> None:
    """Prints on the main rank only."""
    if is_main_rank():
        print(text, flush=True)


def card(title: str, rows: dict[str, object]) -> str:
    """Formats a short table: the title, then one aligned line for each row."""
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def close_bars() -> None:
    """Closes unfinished progress bars, since the next message would be printed on their line."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.leave = False
        bar.close()


def progress_bar(*, shown: bool | None = None, **options) -> tqdm:
    """Returns a tqdm bar, by default shown on the main rank only. Where stderr is not a terminal it is updated every 10
    seconds, so that log files stay short."""
    interval, shown = 0.2 if sys.stderr.isatty() else 10, is_main_rank() if shown is None else shown
    return tqdm(mininterval=interval, smoothing=0, dynamic_ncols=True, disable=not shown, **options)


def short_bar(things: typing.Iterable, desc: str, unit: str) -> tqdm:
    """Returns a bar for loops that mostly take under a second: shown after one second, removed at the end."""
    return progress_bar(iterable=things, desc=desc, unit=unit, delay=1, leave=False)


def on_main(function: Callable[[], object]) -> object:
    """Calls function() on the main rank and returns its result on all ranks, so that all agree on what a disk holds.
    Raises a ValueError or OSError of it on all ranks. A collective, if torch.distributed has started."""
    result, error = None, None
    if is_main_rank():
        try:
            result = function()
        except (ValueError, OSError) as raised:
            error = raised
    if several_ranks():
        wait_for_all_ranks()  # hashing or writing hundreds of gigabytes may take longer than a collective's timeout
        outcome = [result, error]
        dist.broadcast_object_list(outcome, src=0)
        result, error = outcome
    if error is not None:
        raise error
    return result
