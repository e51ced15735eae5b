"""JSON lines that survive a kill: what inference/generate.py and inference/score.py write.

- each line is one write, flushed: after a kill every line but maybe the last is whole, and that one is cut off and
  written again
- a small sidecar file beside the output remembers what it was begun with, so that --resume with other data or flags is
  refused
"""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from models.common import hold, is_main_rank, read_json_object, write_json


def sidecar(output_file: Path) -> Path:
    """Remembers what an output file was begun with."""
    return output_file.with_name(output_file.name + ".args.json")


def begun_on(output_file: Path) -> str | None:
    """The day that chat templates were told when an output file was begun, where that is known."""
    return read_json_object(sidecar(output_file), missing_ok=True).get("chat_date")


def refuse_occupied(output_file: Path) -> None:
    """Raises ValueError if a new run would write over something."""
    if output_file.exists() and output_file.stat().st_size:
        raise ValueError(f"--output_file {output_file}: exists; take another, remove it, or go on with --resume")


def read_begun(output_file: Path, begun_with: dict, writer: str, fields: tuple[str, ...] = ()) -> Iterator[dict]:
    """The lines that an earlier run finished, in turn; a torn last line does not count. Raises ValueError if that run
    had other data or flags, or if a line is none that `writer` wrote, with these fields."""
    if not output_file.exists() or not output_file.stat().st_size:
        if is_main_rank():
            print(f"{output_file}: nothing to resume, starting from the beginning")
        return
    args_file = sidecar(output_file)
    if not args_file.is_file():
        raise ValueError(f"{args_file}: missing, so --resume cannot tell what {output_file.name} was begun with")
    earlier = read_json_object(args_file)
    differing = [key for key, value in json.loads(json.dumps(begun_with)).items() if earlier.get(key) != value]
    if differing:
        raise ValueError(f"{output_file}: was begun with other {', '.join(differing)}; --resume needs the same")
    with open(output_file, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                try:
                    fields_of_line = json.loads(line)
                except (ValueError, RecursionError):
                    fields_of_line = None
                if not isinstance(fields_of_line, dict) or not fields_of_line.keys() >= set(fields):
                    raise ValueError(f"{output_file}:{number}: not a line that {writer} wrote")
                yield fields_of_line


def encode_line(line: dict, encoding: str = "utf-8") -> bytes:
    """One JSON line; with JSON's own escapes where the encoding lacks a character (UTF-8: half a surrogate pair)."""
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode(encoding)
    except UnicodeEncodeError:
        return (json.dumps(line) + "\n").encode(encoding)


def write_lines(path: Path, lines: list[dict]) -> None:
    """Writes a whole file of JSON lines at once: beside and renamed."""
    staging = path.with_name(f".{path.name}.partial")
    staging.write_bytes(b"".join(map(encode_line, lines)))
    os.replace(staging, path)


class LineWriter:
    """Appends lines to a file, each in one write.

    Several ranks append to one file, each line under a lock; those that are not `active` write nothing. num_lines: that
    the file has already. Entering is a collective of all ranks; it raises ValueError if another run writes the file, or
    has written it meanwhile.
    """

    def __init__(self, output_file: Path, begun_with: dict, active: bool, num_lines: int):
        self.output_file, self.begun_with, self.active, self.num_lines = output_file, begun_with, active, num_lines
        self.file, self.lock_file = None, output_file.with_name(f".{output_file.name}.lock")

    def write(self, line: dict) -> None:
        if self.file is not None:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self.file.write(encode_line(line))
            self.file.flush()
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def __enter__(self) -> "LineWriter":
        if is_main_rank():
            self.output_file.parent.mkdir(parents=True, exist_ok=True)
            self.lock = hold(self.lock_file, f"--output_file {self.output_file}")
            with open(self.output_file, "a+b") as file:
                file.seek(0)
                count = size = 0
                for line in file:
                    if line.endswith(b"\n"):
                        count, size = count + 1, size + len(line)
                if count != self.num_lines:
                    raise ValueError(
                        f"--output_file {self.output_file}: another run has written it since this one began"
                    )
                file.truncate(size)  # a line torn by a kill
            write_json(sidecar(self.output_file), self.begun_with)
        if dist.is_initialized():
            dist.barrier()
        if self.active:
            self.file = open(self.output_file, "ab")
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.close()
        if is_main_rank():
            self.lock_file.unlink()
            self.lock.close()
