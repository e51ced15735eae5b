"""What the sections of scripts/gpu_report.py write, and how they run their items, each within the time that is left.

A section writes a line of JSON for each thing it finds, at once, so that one that is killed leaves what it had.
"""

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from models.common import Runtime

ROOT = Path(__file__).resolve().parent.parent.parent


class Item(NamedTuple):
    """A part of a section: it is skipped where less time is left than it takes about."""

    name: str
    seconds: float
    run: Callable[["Section"], None]


@dataclass
class Section:
    """What the items of a section are given. deadline, started: of time.time(); started: when its process was. kept: of
    one item for the next ones."""

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
        """Something that is right where the distance is at most the bound; NaN is not."""
        ok = bool(distance <= bound)
        self.write(kind="check", name=name, value=float(distance), bound=bound, ok=ok, detail=detail)

    def figure(self, name: str, value: float, unit: str, goal: float | None = None, detail: str = "", **more) -> None:
        """goal: the least value; a unit of seconds has the most instead."""
        met = None if goal is None else bool(value <= goal if unit == "s" else value >= goal)
        self.write(kind="figure", name=name, value=float(value), unit=unit, goal=goal, met=met, detail=detail, **more)

    def note(self, name: str, text: str) -> None:
        self.write(kind="note", name=name, detail=text)


class TimeIsUp(RuntimeError):
    """A script took longer than it was given."""


def append_row(rows_file: Path, row: dict) -> None:
    with open(rows_file, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def run_items(section: Section, items: list[Item]) -> None:
    """Runs the items that there is time for; what fails is written down and does not stop the others."""
    for item in items:
        if section.left() < (0 if section.small else item.seconds):
            about = f"skipped: {max(0, section.left()):.0f} s are left, it takes about {item.seconds:.0f}"
            section.note(item.name, about)
            continue
        start = time.time()
        try:
            item.run(section)
        except Exception as error:  # whatever it is, the report says it and goes on; log.txt has it whole
            traceback.print_exc()
            section.write(kind="error", name=item.name, detail=last_lines(f"{type(error).__name__}: {error}"))
        free_memory(section.runtime.device)
        print(f"{section.name}, {item.name}: {time.time() - start:.1f} s", flush=True)  # in log.txt, to plan by


def last_lines(text: str) -> str:
    """The end of what a program said; of a long line its beginning and its end."""
    lines = [line for line in text.strip().splitlines() if line.strip()][-6:]
    return "\n".join(line if len(line) <= 300 else f"{line[:150]} ... {line[-150:]}" for line in lines)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_script(script: str, *flags: object, seconds: float) -> str:
    """Standard output of a script of the project in a process of its own. Raises RuntimeError with its last lines where
    it fails, or takes longer."""
    process = start_script(script, *flags)
    return finish_script(process, script, seconds)


def start_script(script: str, *flags: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen(command, **options, cwd=ROOT)  # in the section's process group, which is ended as one


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
