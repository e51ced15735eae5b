"""Writes a report on a GPU: are results right, and how fast is it beside its limits. scripts/gpu_report.sh runs it.

- sections, the most valuable first: right, ceilings, decode, sft, rl, peers, kernels. Each runs in its own process,
  within its share of the time and the time that earlier ones left over; a failure is recorded, and the next one begins
- report.md and report.json are rewritten after every section, so that an aborted run leaves the results it had
- needs the repository and a Python with torch and transformers, no network and no data; any GPU of torch.cuda,
  including AMD's. --dry_run runs everything with tiny shapes, also on a CPU

    python scripts/gpu_report.py --output_dir runs/gpu
"""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

import torch

from models.common import RuntimeArgs, choose_runtime, device_name, flag, positive, say
from models.files import write_json
from models.script import run_script
from scripts.report import kernels, right, speed, trained
from scripts.report.markdown import markdown
from scripts.report.record import ROOT, Item, Section, append_row, last_lines, run_items


class Plan(NamedTuple):
    """A section: its title, its share of the time in seconds, and its items."""

    title: str
    seconds: float
    items: list[Item]


SECTIONS = {
    "right": Plan("Is it right?", 125, right.ITEMS),
    "ceilings": Plan("Ceilings", 16, speed.CEILINGS),
    "decode": Plan("Decoding, 7B (deepseek-math)", 101, speed.DECODE),
    "sft": Plan("Fine-tuning", 68, trained.SFT_ITEMS),
    "rl": Plan("Reinforcement learning, 1B", 85, trained.RL_ITEMS),
    "peers": Plan("transformers on the same work", 55, speed.PEERS),
    "kernels": Plan("Kernels", 30, kernels.ITEMS),
}
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
START = 12.0  # seconds that a section's process needs to start; with less time left, none is started


@dataclass(frozen=True, kw_only=True)
class ReportArgs(RuntimeArgs):
    """Checks this project's results on a GPU and measures its speed."""

    output_dir: Path = flag(
        Path("runs/gpu"), help="folder for report.md, report.json, rows.jsonl and log.txt", written=True
    )
    minutes: float = flag(8.0, bounds=positive, help="time limit for the whole report")
    sections: list[str] = flag((), choices=SECTIONS, help="sections to run; default: all")
    dry_run: bool = flag(False, help="run with tiny shapes, to see that it works and what the report looks like")
    section: str | None = flag(None, choices=SECTIONS, help="internal: run one section in this process")
    started: float | None = flag(None, help="internal: start of the section's process, in seconds since the epoch")
    deadline: float | None = flag(None, help="internal: end of the section's time, in seconds since the epoch")


def main(args: ReportArgs) -> None:
    if args.section is not None:
        run_section(args)
        return
    if args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --dry_run --device cpu runs the same with tiny shapes")
    begun = time.time()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "report.json", "rows.jsonl", "log.txt"):
        (args.output_dir / name).unlink(missing_ok=True)
    head, chosen = header(args.dry_run), args.sections or list(SECTIONS)
    write_report(args, head, chosen)
    for i, name in enumerate(chosen):
        left = begun + 60 * args.minutes - time.time()
        limit = left - sum(SECTIONS[later].seconds for later in chosen[i + 1 :])
        limit = min(left, max(limit, SECTIONS[name].seconds))
        start_and_wait(args, name, limit)
        write_report(args, head, chosen)
    say(f"{args.output_dir / 'report.md'}: {time.time() - begun:.0f} s")


def run_section(args: ReportArgs) -> None:
    """Runs the items of --section in this process."""
    plan, runtime = SECTIONS[args.section], choose_runtime(args)
    started = args.started or time.time()
    deadline = args.deadline or started + plan.seconds
    rows_file = args.output_dir / "rows.jsonl"
    append_row(rows_file, {"section": args.section, "kind": "device", "name": name_and_memory(runtime.device)})
    section = Section(args.section, runtime, rows_file, deadline, started, small=args.dry_run)
    run_items(section, plan.items)


def start_and_wait(args: ReportArgs, name: str, limit: float) -> None:
    """Runs a section in its own process, with the flags of this one; kills it, with all processes that it started, when
    its time is up."""
    rows_file, row = args.output_dir / "rows.jsonl", {"section": name, "kind": "section"}
    if limit < START:
        append_row(rows_file, {**row, "state": f"skipped: {max(0, limit):.0f} s are left"})
        return
    start, log = time.time(), args.output_dir / "log.txt"
    flags = [*sys.argv[1:], "--section", name, "--started", start, "--deadline", start + limit - 3]
    say(f"{name}: at most {limit:.0f} s")
    size = log.stat().st_size if log.exists() else 0
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, __file__, *map(str, flags)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
            state = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            code, state = 1, f"ended after {limit:.0f} s, when its time was up"
        finally:  # also kills the processes that it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        with open(log, encoding="utf-8", errors="replace") as file:
            file.seek(size)
            row["detail"] = last_lines(file.read())
    append_row(rows_file, {**row, "state": state, "seconds": time.time() - start})


# ---------------------------------------------------------------------------------------- the report


def header(dry_run: bool) -> dict[str, str]:
    """Returns date, commit, versions and command. The sections report the card, so that this process takes none of its
    memory."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "commit": commit(),
        "card": "not known yet",
        "driver": driver(),
        "versions": ", ".join(f"{name} {version_of(name)}" for name in PACKAGES),
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]) + (" (a dry run: tiny shapes, no speeds)" if dry_run else ""),
    }


def version_of(package: str) -> str:
    try:
        return torch.__version__ if package == "torch" else version(package)
    except PackageNotFoundError:
        return "none"


def name_and_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return device_name(device)
    return f"{device_name(device)}, {torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB"


def commit() -> str:
    """Returns the commit of the repository; in a copy without git, COMMIT from the environment."""
    done = _output(["git", "-C", str(ROOT), "log", "-1", "--format=%h %cs"])
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return (done or os.environ.get("COMMIT", "unknown")) + (", with changes" if changed else "")


def driver() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return f"{found or 'unknown'}, CUDA {torch.version.cuda}" if torch.version.cuda else "none"


def _output(command: list[str]) -> str:
    """Returns the first line that a program prints; "" if it does not exist, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def parsed(line: str) -> dict | None:
    """Parses a row; None for a torn one, of a section that was killed while it wrote."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def write_report(args: ReportArgs, head: dict[str, str], chosen: list[str]) -> None:
    rows_file = args.output_dir / "rows.jsonl"
    lines = rows_file.read_text(encoding="utf-8").splitlines() if rows_file.exists() else []
    rows = [row for row in map(parsed, lines) if row is not None]
    cards = [row["name"] for row in rows if row["kind"] == "device"]
    head = head | {"card": cards[0]} if cards else head
    rows = [row for row in rows if row["kind"] != "device"]
    by_section = {name: [row for row in rows if row["section"] == name] for name in chosen}
    write_json(args.output_dir / "report.json", {"header": head, "sections": by_section})
    text = markdown(head, {name: (SECTIONS[name].title, found) for name, found in by_section.items()})
    (args.output_dir / "report.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running section is killed too
    run_script(main, ReportArgs)
