"""The rows of a data file in flat arrays, 5 bytes a token, made once for all processes of a node and for later runs.

- a token takes an int32 id and one byte that says whether it is learnt, since a label is either the id or IGNORE_INDEX;
  a row is assembled when it is accessed
- a file of BIG_FILE bytes or more is encoded by several processes into a cache folder, which is memory-mapped. Its name
  is a digest of all that the rows depend on: the data, the tokenizer's files, the limits and the code
- a cache folder appears when it is complete (written under another name, then renamed) and has checksums, so a damaged
  one is detected and rebuilt; where it cannot be written, the rows stay in memory
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.checksums import bytes_bar, digest
from models.common import is_main_rank, say
from models.forked import map_in_processes
from models.limits import num_cores
from models.record_files import Items, Lines, chunks_of, records_of
from models.records import IGNORE_INDEX, Encoder, EncodingCounts, Flat
from models.tokenizer import Tokenizer

BIG_FILE = 2**23  # in bytes: a few seconds of tokenising


class Store(NamedTuple):
    """The parent of the cache folders of big files (None: no cache), and how many processes encode a file (None: one
    for each core)."""

    folder: Path | None = None
    num_workers: int | None = None


IN_MEMORY = Store()


class Columns(NamedTuple):
    """Rows, end to end in flat arrays."""

    ids: np.ndarray  # int32 [tokens]
    marks: np.ndarray  # bool [tokens], whether a token is learnt, or scored
    lengths: np.ndarray  # int32 [sequences]
    prompt_lengths: np.ndarray  # int32 [rows]
    num_values: np.ndarray  # int32 [rows]
    values: np.ndarray  # float64 [values]


DTYPES = Columns(*map(np.dtype, (np.int32, bool, np.int32, np.int32, np.int32, np.float64)))


class Rows(Sequence):
    """The rows of a file, of a `kind` with flat() and from_flat(): Example, or Pair or Scored of models/reward.py.

    lengths: int32 [rows, token sequences of a row]. reference: for pairs, a frozen model's log-probs of the two
    completions, float32 [rows, 2], once they are computed.
    """

    def __init__(self, kind: type, num_sequences: int, columns: Columns):
        self.kind, self.columns = kind, columns
        self.lengths = columns.lengths.reshape(-1, num_sequences)
        self.reference: np.ndarray | None = None
        self._starts = np.concatenate(([0], np.cumsum(columns.lengths, dtype=np.int64)))
        self._first_values = np.concatenate(([0], np.cumsum(columns.num_values, dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int | slice):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]  # raises IndexError; negative numbers count from the end
        first, sequences = i * self.lengths.shape[1], []
        for start, end in zip(self._starts[first:], self._starts[first + 1 :][: self.lengths.shape[1]]):
            ids = self.columns.ids[start:end]
            sequences.append((ids, np.where(self.columns.marks[start:end], ids, IGNORE_INDEX)))
        values = self.columns.values[self._first_values[i] : self._first_values[i + 1]].tolist()
        row = self.kind.from_flat(Flat(sequences, int(self.columns.prompt_lengths[i]), values))
        if self.reference is not None:
            row.reference = tuple(self.reference[i].tolist())
        return row

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def num_targets(self) -> int:
        """Number of tokens that are predicted and learnt: a sequence's first is not predicted."""
        first = self._starts[:-1][self.columns.lengths > 0]
        return int(np.count_nonzero(self.columns.marks)) - int(np.count_nonzero(self.columns.marks[first]))


# -------------------------------------------------------------------------------------- encoding


def encode_file(
    path: Path, kind: type, num_sequences: int, encoder: Encoder, tokenizer: Tokenizer, what: str, store: Store
) -> tuple[Rows, EncodingCounts]:
    """(the rows that the encoder makes of a file, counts). num_sequences: token sequences of a row; what: tells apart
    encodings with the same code. Raises FileNotFoundError, or ValueError that names the first line it cannot use."""
    size, found = path.stat().st_size if path.is_file() else 0, None
    if store.folder is not None and size >= BIG_FILE:
        name = partial(_digest, path, encoder, tokenizer, what)
        folder = store.folder / name()
        try:
            found = _read(folder) or _read_or_make(folder, path, encoder, store.num_workers or num_cores(), name)
        except _NotKept as error:
            say(f"--data_cache {store.folder}: {error}; {path} is tokenised in the memory of each process")
    if found is None:
        num_workers = store.num_workers or num_cores(of_rank=True)  # each rank does it
        found = _joined(_blocks(path, encoder, num_workers, shown=is_main_rank()))
    columns, counts = found
    return Rows(kind, num_sequences, columns), counts


def flatten(rows: Iterable) -> Columns:
    ids, labels, lengths, prompt_lengths, num_values = (array("i") for _ in range(5))
    values = array("d")
    for row in rows:
        flat = row.flat()
        for sequence, sequence_labels in flat.sequences:
            ids.extend(sequence)
            labels.extend(sequence_labels)
            lengths.append(len(sequence))
        prompt_lengths.append(flat.prompt_length)
        num_values.append(len(flat.values))
        values.extend(flat.values)
    ids, labels = np.asarray(ids), np.asarray(labels)
    marks = labels != IGNORE_INDEX
    assert np.array_equal(labels[marks], ids[marks])
    return Columns(ids, marks, *map(np.asarray, (lengths, prompt_lengths, num_values, values)))


class _Block(NamedTuple):
    """A part of a file, encoded."""

    columns: Columns
    counts: EncodingCounts
    size: int  # bytes that the part takes in the file
    num_records: int


def _encode_chunk(encoder: Encoder, chunk: Lines | Items) -> _Block:
    rows, counts, num_records = [], EncodingCounts(), 0
    for record in records_of([chunk]):
        num_records += 1
        row, happened = encoder.row_of(record)
        if row is not None:
            happened = happened._replace(nothing_to_learn=int(row.nothing_to_learn))
            rows.append(row)
        counts = counts.plus(happened) if happened else counts
    return _Block(flatten(rows), counts, chunk.size, num_records)


def _blocks(path: Path, encoder: Encoder, num_workers: int, *, shown: bool) -> Iterator[_Block]:
    """Yields a file's parts in order, encoded. shown: with a progress bar."""
    size = path.stat().st_size if path.is_file() else 0
    empty, num_workers = True, num_workers if size >= BIG_FILE else 1
    with bytes_bar(size, "tokenising", shown=shown) as bar:
        encode, fewer = partial(_encode_chunk, encoder), "lower --data_workers"
        for block in map_in_processes(encode, chunks_of(path), num_workers, fewer=fewer):
            empty = empty and not block.num_records
            bar.update(block.size)
            yield block
    if empty:
        raise ValueError(f"{path}: holds no records")


def _joined(blocks: Iterator[_Block]) -> tuple[Columns, EncodingCounts]:
    """Concatenates the blocks in this process's memory."""
    columns, counts, *_ = zip(*blocks)
    return Columns(*map(np.concatenate, zip(*columns))), EncodingCounts(*map(sum, zip(*counts)))


# ----------------------------------------------------------------------------------------- the cache


class _NotKept(Exception):
    """The cache cannot be written."""


def _digest(path: Path, encoder: Encoder, tokenizer: Tokenizer, what: str) -> str:
    """The digest of all that the rows of a file depend on."""
    function = getattr(encoder.encode, "func", encoder.encode)
    code = [*_CODE, Path(sys.modules[function.__module__].__file__)]
    template = tokenizer.chat_template
    depends_on = {
        "data": digest(path),
        "tokenizer": {file.name: digest(file) for file in tokenizer.files()},
        "today": str(tokenizer.today) if template is not None and template.asks_for_date else None,
        "limits": encoder.limits._replace(more=None),
        "what": what,
        "code": [digest(file) for file in code],
        "packages": [*map(_version, ("jinja2", "numpy", "tokenizers", "sentencepiece"))],
    }
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:40]


def _version(package: str) -> str | None:
    """The version of a package, if it is installed, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_ENCODING = ("chat_template", "chats", "parts", "record_files", "records", "reward", "rows", "tokenizer")
_CODE = [Path(__file__).with_name(f"{name}.py") for name in _ENCODING]


def _read_or_make(
    folder: Path, path: Path, encoder: Encoder, num_workers: int, name: Callable[[], str]
) -> tuple[Columns, EncodingCounts] | None:
    """Reads or makes a cache folder; waits while another process makes it. name(): its name for the data as of now."""
    with _alone(folder):
        found = _read(folder)
        if found is None:
            with _keeping():
                _remove_left(folder)
            is_first_node = os.environ.get("GROUP_RANK", "0") == "0"  # any of its ranks may come here first
            _write(folder, path, _blocks(path, encoder, num_workers, shown=is_first_node), name)
            found = _read(folder)
        return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with this process; does nothing where the file system has no locks."""
    with _keeping():
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(f".{folder.name}.lock"), "a")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process, which is tokenising the same file")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # no locks: each process makes the folder, and one of them stays
            pass
        yield


@contextmanager
def _keeping() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _NotKept(f"{error.strerror or error}") from None


def _remove_left(folder: Path) -> None:
    """Removes the folder if it is damaged, and what killed processes have left unfinished. Where the file system has no
    locks, or each host its own, other processes may be at work: theirs stay, unless nothing was written for a day."""
    if folder.is_dir():
        shutil.rmtree(folder)
    for left in folder.parent.glob(f".{folder.name}.*.*"):
        host, _, pid = left.name.removeprefix(f".{folder.name}.").rpartition(".")
        with suppress(OSError, ValueError):  # it ends meanwhile; another program's name
            at_work = host != socket.gethostname() or _runs(int(pid))
            if not at_work or time.time() - max(file.stat().st_mtime for file in (left, *left.iterdir())) > 86_400:
                shutil.rmtree(left)


def _runs(pid: int) -> bool:
    """Whether another process of this host has this id."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # of another user
    return pid != os.getpid()


def _write(folder: Path, path: Path, blocks: Iterator[_Block], name: Callable[[], str]) -> None:
    """Writes the arrays block by block, and at the end rows.json, which describes them. Raises ValueError if the data
    have changed by then: their rows would be found under the digest of the old data."""
    staging = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    counts, checksums = EncodingCounts(), [0] * len(Columns._fields)
    try:
        with _keeping():
            staging.mkdir()
            files = [open(staging / name, "wb") for name in Columns._fields]  # noqa: SIM115
        for block in blocks:
            counts = counts.plus(block.counts)
            for i, (file, values) in enumerate(zip(files, block.columns)):
                with _keeping():
                    file.write(values.data)
                checksums[i] = zlib.crc32(values.data, checksums[i])
        if name() != folder.name:
            raise ValueError(f"{path}: changed while it was tokenised; run this again when it is complete")
        with _keeping():
            for file in files:
                file.close()
            about = {"file": str(path), "counts": counts, "checksums": checksums}
            (staging / "rows.json").write_text(json.dumps({**about, "checksum": _checksum(about)}))
            try:
                os.rename(staging, folder)
            except OSError:
                if not folder.is_dir():  # else another process has made it meanwhile, where there are no locks
                    raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _checksum(about: dict) -> int:
    return zlib.crc32(json.dumps(about).encode())


def _read(folder: Path) -> tuple[Columns, EncodingCounts] | None:
    """The content of a cache folder; None if it is missing, or damaged, which is printed."""
    if not folder.is_dir():
        return None
    try:
        about = json.loads((folder / "rows.json").read_text())
        checksum = about.pop("checksum")
        files = [(folder / name, dtype) for name, dtype in zip(Columns._fields, DTYPES)]
        columns = [np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype) for file, dtype in files]
        whole = checksum == _checksum(about) and about["checksums"] == [zlib.crc32(each.data) for each in columns]
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        whole = False
    if not whole:
        say(f"{folder}: damaged; the data file is tokenised again")
        return None
    return Columns(*columns), EncodingCounts(*about["counts"])
