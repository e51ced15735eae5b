"""Runs the items of a section of scripts/gpu_report.py, within the time left, and records their results.

A section writes each result at once, as a line of JSON, so that a killed section leaves its earlier results.
"""

import contextlib
import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from models.common import Runtime

ROOT = Path(__file__).resolve().parent.parent.parent


class Item(NamedTuple):
    """A part of a section; `seconds` is about how long it takes. It is skipped if less time is left."""

    name: str
    seconds: float
    run: Callable[["Section"], None]


@dataclass
class Section:
    """The state of a section, passed to its items. deadline, started (of its process): as time.time() counts. kept:
    values that items keep for later items."""

    name: str
    runtime: Runtime
    rows_file: Path
    deadline: float
    started: float
    small: bool = False  # tiny shapes, for a dry run
    kept: dict = field(default_factory=dict)

    def left(self) -> float:
        return self.deadline - time.time()

    def write(self, **row: object) -> None:
        append_row(self.rows_file, {"section": self.name, **row})

    def check(self, name: str, distance: float, bound: float, detail: str = "") -> None:
        """Records a check, which is right if the distance is at most the bound; NaN is wrong."""
        ok = bool(distance <= bound)
        self.write(kind="check", name=name, value=float(distance), bound=bound, ok=ok, detail=detail)

    def figure(self, name: str, value: float, unit: str, goal: float | None = None, detail: str = "", **more) -> None:
        """Records a measurement. goal: the lowest acceptable value; for the unit s, the highest."""
        met = None if goal is None else bool(value <= goal if unit == "s" else value >= goal)
        self.write(kind="figure", name=name, value=float(value), unit=unit, goal=goal, met=met, detail=detail, **more)

    def note(self, name: str, text: str) -> None:
        self.write(kind="note", name=name, detail=text)


def largest(distances: Iterable[float]) -> float:
    """The largest distance, NaN if one is: Python's max drops a NaN that does not come first."""
    return torch.tensor(list(distances), dtype=torch.float64).max().item()


class TimeIsUp(RuntimeError):
    """A script exceeded its time limit."""


def append_row(rows_file: Path, row: dict) -> None:
    with open(rows_file, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def run_items(section: Section, items: list[Item]) -> None:
    """Runs the items that there is time for; a failure is recorded, and the next item runs."""
    for item in items:
        if section.left() < (0 if section.small else item.seconds):
            about = f"skipped: {max(0, section.left()):.0f} s are left, and it takes about {item.seconds:.0f}"
            section.note(item.name, about)
            continue
        start = time.time()
        try:
            item.run(section)
        except Exception as error:  # of any kind: the report names it and continues; log.txt has the traceback
            traceback.print_exc()
            section.write(kind="error", name=item.name, detail=last_lines(f"{type(error).__name__}: {error}"))
        with contextlib.suppress(RuntimeError):  # a CUDA error that stays: other processes' items can still run
            free_memory(section.runtime.device)
        print(f"{section.name}, {item.name}: {time.time() - start:.1f} s", flush=True)  # in log.txt, for planning


def last_lines(text: str) -> str:
    """Returns the last lines of a program's output; the middle of a long line is left out."""
    lines = [line for line in text.strip().splitlines() if line.strip()][-6:]
    return "\n".join(line if len(line) <= 300 else f"{line[:150]} ... {line[-150:]}" for line in lines)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_script(script: str, *flags: object, seconds: float) -> str:
    """Runs a script of the project in its own process and returns its standard output. Raises RuntimeError with its
    last lines if it fails, TimeIsUp if it takes longer."""
    process = start_script(script, *flags)
    return finish_script(process, script, seconds)


def start_script(script: str, *flags: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen(command, **options, cwd=ROOT)  # in the section's process group, which is killed as one


def finish_script(process: subprocess.Popen, script: str, seconds: float) -> str:
    try:
        out, err = process.communicate(timeout=max(1, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise TimeIsUp(f"{script}: ended after {seconds:.0f} s, when its time was up") from None
    if process.returncode:
        print(err, file=sys.stderr)
        raise RuntimeError(f"{script}: exit code {process.returncode}\n{last_lines(err)}")
    return out


def last_json(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1])
