"""Reads files of records, JSON lists or JSONL as their content tells, in parts: no large JSONL is held in memory.

Errors name the file, and the line or item where one is at fault. A part of a JSONL file is a range of bytes: the
process that works on it, maybe another one, reads them from the file.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

CHUNK_BYTES = 2**20
PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
}
LFS_NOTE = b"version https://git-lfs"
MESSAGES_AS_TEXT = re.compile(  # as JSON, Python or numpy prints them; other kinds of objects may have a "role", too
    r"""
    \s* \[ \s* \{ (?= \s* ['"] (role|content) ['"] \s* : )
    (?= .* ['"] role ['"] \s* : \s* ['"] (system|user|assistant|tool) ['"] ) (?= .* ['"] content ['"] \s* : )
    .* \} \s* \] \s*""",
    re.DOTALL | re.VERBOSE,
)
# The words of generate.py and other engines for how an answer ended, and whether the answer is complete then.
FINISHED = dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn", "tool_calls", "tool_use"), True)
FINISHED |= dict.fromkeys(("length", "max_tokens", "max_new_tokens", "abort", "content_filter"), False)
KINDS = {  # JSON's names for Python's types
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def _object_of(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # JSON readers take the last value and drop the others
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"an object has {name!a} twice")
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=_object_of)


class Record(NamedTuple):
    where: str  # "file:line" or "file: item 3", for messages
    fields: dict

    def __str__(self) -> str:
        return self.where

    @property
    def given(self) -> dict:
        """The fields that are not null: where records of several forms share columns, those of other forms are null."""
        return {name: value for name, value in self.fields.items() if value is not None}


def kind_of(value: object) -> str:
    """JSON's name for a value's type, for messages."""
    return KINDS.get(type(value), type(value).__name__)


def refuse_messages_as_text(name: str, value: object) -> None:
    """Raises ValueError for a list of messages that a column of text has turned into a string: it would be read as
    plain text."""
    if isinstance(value, str) and MESSAGES_AS_TEXT.fullmatch(value):
        raise ValueError(f"{name} is a list of messages as text; give the list itself")


def is_finished(reason: object) -> bool:
    """Whether a sample with this finish_reason is complete, not cut off by a limit. Raises ValueError for an unknown
    one: no EOS may be learnt behind an answer that was cut off."""
    if not isinstance(reason, str) or reason.lower() not in FINISHED:
        known = "stop, length or another engine's word for these, or be left out"
        raise ValueError(f"finish_reason must be {known}, not {ascii(reason)[:60]}")
    return FINISHED[reason.lower()]


def unreadable(path: Path, reason: str) -> str:
    """Why a file cannot be read: `reason`, which its reader gave, unless the file is only a Git LFS pointer."""
    try:
        with open(path, "rb") as file:
            is_note = file.read(len(LFS_NOTE)) == LFS_NOTE
    except OSError:
        is_note = False
    return "is a Git LFS pointer, not the file itself; fetch that with git lfs pull" if is_note else reason


class Lines(NamedTuple):
    """Whole lines of a JSONL file."""

    path: Path
    start: int  # in bytes
    size: int
    number: int  # of the first line

    def deferred(self) -> Iterator[Callable[[], Record]]:
        """For each line that is not blank, a function that parses it; so a line may be skipped unparsed."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            block = file.read(self.size)
        for number, line in enumerate(_decode(self.path, block, self.start).split("\n"), start=self.number):
            if line.strip():
                yield partial(_parse, self.path, number, line)


class Items(NamedTuple):
    """Records in memory, such as the items of a JSON list."""

    items: list[Record]
    size: int = 0  # about how many bytes of the file they take

    def deferred(self) -> Iterator[Callable[[], Record]]:
        return (partial(_checked, item) for item in self.items)


def chunks_of(path: str | Path) -> Iterator[Lines | Items]:
    """The parts of a file of records, of about a MiB each. Raises FileNotFoundError; ValueError for a broken JSON list,
    or for a compressed or binary file."""
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is not a regular file, and records are read more than once"
        raise FileNotFoundError(f"{path}: " + (f"{kind}; name a file" if path.exists() else "no such file"))
    with open(path, "rb") as file:
        head = file.read(4096)
        for beginning, kind in PACKED.items():
            if head.startswith(beginning):
                raise ValueError(f"{path}: is a {kind} file, and records are read from JSON or JSONL; convert it")
        start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        file.seek(start)
        if head[start:].lstrip().startswith(b"["):
            yield from _parts_of_list(path, file.read())
            return
        number = 1
        while block := file.read(CHUNK_BYTES):
            block += b"" if block.endswith(b"\n") else file.readline()
            yield Lines(path, start, len(block), number)
            start, number = start + len(block), number + block.count(b"\n")


def _parts_of_list(path: Path, content: bytes) -> Iterator[Items]:
    text = _decode(path, content, 0)
    try:
        items = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid JSON list: {error}") from None
    each = len(content) / max(1, len(items))  # bytes of an item
    count = max(1, int(CHUNK_BYTES / max(1, each)))
    for first in range(0, len(items), count):
        part = [Record(f"{path}: item {i}", item) for i, item in enumerate(items[first : first + count], start=first)]
        yield Items(part, int(each * len(part)))


def _decode(path: Path, block: bytes, start: int) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {start + error.start})") from None


def _parse(path: Path, number: int, line: str) -> Record:
    try:
        fields = DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):  # some of whose messages end with "at" themselves
            reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        spread = "; put each object on one line" * (line.strip() == "{")
        raise ValueError(f"{path}:{number}: {unreadable(path, f'not valid JSON: {reason}{spread}')}") from None
    return _checked(Record(f"{path}:{number}", fields))


def _checked(record: Record) -> Record:
    if not isinstance(record.fields, dict):
        raise ValueError(f"{record.where}: must be an object with named fields, not {kind_of(record.fields)}")
    return record


def records_of(chunks: Iterable[Lines | Items]) -> Iterator[Record]:
    return (parsed() for chunk in chunks for parsed in chunk.deferred())
