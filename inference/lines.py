"""JSON lines that survive a kill: the output files of inference/generate.py and inference/score.py.

- each line is one write, flushed: after a kill every line but maybe the last is whole; a torn last line is cut off and
  written again
- a small sidecar file beside the output records the flags and the content of the data and models it was begun with, so
  that --resume with other ones is refused
- ranks, also on several hosts, append to one file in turns, without relying on the file system's locks
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path

from models.chat_template import ChatTemplate
from models.common import is_main_rank, on_main
from models.files import naming_file, read_json_object, write_json, write_whole
from models.identity import begun_with, changed_flags
from models.record_files import Record
from models.records import naming, require
from models.shared import check_free, check_writable, hold
from models.sharing import several_ranks, wait_for_all_ranks
from models.tokenizer import chat_day


def sidecar(output_file: Path) -> Path:
    """Path of the file that records the flags, data and models an output file was begun with."""
    return output_file.with_name(output_file.name + ".args.json")


def begun_on(output_file: Path) -> str | None:
    """Returns the date given to chat templates when an output file was begun, or None if it is not known."""
    return read_json_object(sidecar(output_file), missing_ok=True).get("chat_date")


def sampled_on(file: Path, most_steps: int = 8) -> str | None:
    """Returns the date given to chat templates when a file of samples was begun, or one from which it was graded,
    scored or chosen; None if it is not known. most_steps: scripts that may lie between, since files may be renamed."""
    for known in (file, all_scored(file)):
        if day := begun_on(known):
            return day
    source = read_json_object(sidecar(file), missing_ok=True).get("data_file")
    return sampled_on(Path(source), most_steps - 1) if source and most_steps else None


def all_scored(chosen: Path) -> Path:
    """Returns the file of all scored records beside that of the chosen ones."""
    return chosen.with_name(f"{chosen.stem}.scored{chosen.suffix}")


def day_of(args) -> date:
    """Returns the date that chat templates are told by score.py: --chat_date, else the day that the resumed run began,
    else the day of the samples in --data_file, so that answers follow the prompts they were drawn for, else today.
    args: the ScoreArgs of score.py."""
    resumed = begun_on(args.scored_file) if args.resume else None
    return chat_day(args.chat_date, resumed or sampled_on(args.data_file))


def day_told(day: date, template: ChatTemplate | None) -> dict[str, str]:
    """Row of the card: the date, if the chat template asks for it."""
    return {"chat date": day.isoformat()} if template is not None and template.asks_for_date else {}


def refuse_occupied(output_file: Path) -> None:
    """Raises ValueError if a new run would overwrite a file, OSError if its folder cannot be written."""
    _check_place(output_file)
    if output_file.exists() and output_file.stat().st_size:
        raise ValueError(f"--output_file {output_file}: exists; take another, or go on with --resume")


def _lock_file(output_file: Path) -> Path:
    return output_file.with_name(f".{output_file.name}.lock")


def _check_place(output_file: Path) -> None:
    """Raises ValueError if output_file is a folder, pipe or device, which --resume cannot continue; OSError if its
    folder cannot be written."""
    check_writable(output_file.parent, f"--output_file {output_file}")
    if output_file.exists() and not output_file.is_file():
        kind = "a folder" if output_file.is_dir() else "not a regular file, which --resume needs"
        raise ValueError(f"--output_file {output_file}: is {kind}; name a file")
    for number, name in enumerate(("output", "error"), start=1) if output_file.exists() else ():
        if os.path.samestat(output_file.stat(), os.fstat(number)):  # accept_any_text has opened those that were closed
            what = f"is where standard {name} goes, which has the run's messages too"
            raise ValueError(f"--output_file {output_file}: {what}; name another file")


def begin(output_file: Path, args) -> dict:
    """Returns the data, models and flags that a file is begun with. Raises ValueError if the file exists already or,
    with --resume, was begun with others or is still being written."""
    if not args.resume:
        refuse_occupied(output_file)
        return begun_with(args)
    _check_place(output_file)
    now = begun_with(args)
    if not output_file.exists() or not output_file.stat().st_size:
        print(f"{output_file}: nothing to resume, starting from the beginning")
        return now
    args_file = sidecar(output_file)
    if not args_file.is_file():
        raise ValueError(f"{args_file}: missing, so --resume cannot tell what {output_file.name} was begun with")
    changed_flags(args, now, read_json_object(args_file), str(output_file))
    check_free(_lock_file(output_file), f"--output_file {output_file}")
    return now


def read_begun(output_file: Path, writer: str, fields: tuple[str, ...] = ()) -> Iterator[dict]:
    """Yields the lines that an earlier run finished, without a torn last line. Raises ValueError for a line that was
    not written by the script `writer` or lacks one of `fields`."""
    if not output_file.exists():
        return
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


def with_room_for(names: tuple[str, ...], record: Record) -> Record:
    """Returns the record without those of these fields that are null, since they count as missing, and a line begins
    with the record's own fields. Raises ValueError if it has a value in one of them."""
    with naming(record):
        for name in names:
            require(name not in record.given, f"has a field {name!r} already, which this run would add; rename it")
    return record._replace(fields={name: value for name, value in record.fields.items() if name not in names})


def lines_of(records: list[Record], output_file: Path, fields: tuple[str, ...] = ()) -> list[dict]:
    """Returns read_begun's lines of score.py, one for each record from the first on. Raises ValueError if a line is of
    another record: --accept_changed admits a data file with other records at these places."""
    lines = list(read_begun(output_file, "score.py", fields))
    for number, line in enumerate(lines, start=1):
        if number > len(records):
            raise ValueError(f"{output_file}:{number}: this run has {len(records)} records; begin another file")
        where, fields_of_record = records[number - 1]
        kept = dict(islice(line.items(), len(fields_of_record)))
        if kept != fields_of_record and json.dumps(kept) != json.dumps(fields_of_record):  # NaN != NaN
            raise ValueError(f"{output_file}:{number}: is not of the record at its place, {where}; begin another file")
        if not all(_is_score(*each) for each in islice(line.items(), len(fields_of_record), None)):
            raise ValueError(f"{output_file}:{number}: not a line that score.py wrote")
    return lines


def _is_score(name: str, value: object) -> bool:
    """Whether score.py adds such a field to a line: a number, a list of step rewards, or the error of a grader."""
    numbers = value if name == "step_rewards" and isinstance(value, list) else [value]
    return isinstance(value, str) if name == "grade_error" else all(type(each) in (int, float) for each in numbers)


def encode_line(line: dict, encoding: str = "utf-8") -> bytes:
    """Encodes one JSON line, with JSON's escapes if the encoding lacks a character (for UTF-8 a lone surrogate)."""
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode(encoding)
    except UnicodeEncodeError:
        return (json.dumps(line) + "\n").encode(encoding)


def write_lines(path: Path, lines: list[dict]) -> None:
    """Writes a whole file, atomically."""
    write_whole(path, b"".join(map(encode_line, lines)))


class LineWriter:
    """Appends lines to a file, each in one write.

    Several ranks append to one file, one at a time; ranks that are not `active` write nothing. num_lines: the number of
    lines the file holds already. Entering is a collective of all ranks; it raises ValueError if another run is writing
    the file, or has written to it since num_lines was counted.
    """

    def __init__(self, output_file: Path, begun: dict, active: bool, num_lines: int):
        self.output_file, self.begun, self.active, self.num_lines = output_file, begun, active, num_lines
        self.file, self.lock_file = None, _lock_file(output_file)
        self.turn = output_file.with_name(f".{output_file.name}.turn")

    def write(self, line: dict) -> None:
        with naming_file(self.output_file):
            if self.file is not None:
                self.file.write(encode_line(line))
                self.file.flush()
            elif self.active:
                with in_turn(self.turn):
                    _append(self.output_file, encode_line(line))

    def __enter__(self) -> "LineWriter":
        on_main(self._begin)
        if self.active and not several_ranks():
            self.file = open(self.output_file, "ab")
        return self

    def _begin(self) -> None:
        self.output_file.parent.mkdir(parents=True, exist_ok=True)
        self.lock = hold(self.lock_file, f"--output_file {self.output_file}")
        self.turn.unlink(missing_ok=True)  # left by a rank that was killed in its turn
        with open(self.output_file, "a+b") as file:
            file.seek(0)
            count = size = 0
            for line in file:
                if line.endswith(b"\n"):
                    count, size = count + 1, size + len(line)
            if count != self.num_lines:
                raise ValueError(f"--output_file {self.output_file}: another run has written it since this one began")
            file.truncate(size)  # a line torn by a kill
        write_json(sidecar(self.output_file), self.begun)

    def __exit__(self, error: type | None, *_) -> None:
        if self.file is not None:
            with naming_file(self.output_file):  # closing retries a write that failed on a full disk
                self.file.close()
        if error is None:
            wait_for_all_ranks()  # other ranks may still be writing
        if is_main_rank():
            self.lock_file.unlink()
            self.lock.close()


def _append(path: Path, line: bytes) -> None:
    """Appends the whole line or, on a full disk, nothing: another rank's line would go on from a part of it."""
    with open(path, "ab", buffering=0) as file:  # opening makes NFS see the current end
        size = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line) :]
        except BaseException:
            file.truncate(size)
            raise


@contextlib.contextmanager
def in_turn(path: Path, seconds: float = 60) -> Iterator[None]:
    """A lock: of the processes that use the same path, one at a time runs the block. It creates the file exclusively,
    which every file system does for all its hosts; flock may be missing, or lock on one host only. A rank that is
    killed in its turn, maybe amid a line, leaves the file behind: the others get OSError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        begun = time.monotonic()
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            now = time.monotonic()
            if now - begun > 1:  # the disk has stalled, maybe for the other rank, too
                deadline = now + seconds
            if now > deadline:
                raise OSError(f"{path}: another rank has had its turn for {seconds:.0f} s; is it dead?") from None
            time.sleep(0.001)
    try:
        yield
    finally:
        path.unlink()
