"""The prompts of generate.py, read and tokenised when slots become free.

- a first pass over the whole file refuses unusable records before anything is written. For a file of up to BIG_FILE
  bytes it tokenises all prompts and keeps their ids; for a larger one it checks the fields in several processes and
  tokenises only the longest prompts. A prompt found overlong later then ends the run, which --resume continues
- of a large file only the prompts in progress are in memory
- data-parallel replicas take work when they have room for it: whole prompts at first, whose samples share a prefill,
  and single samples at the end (models/sharing.py)
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.chats import NOT_READ, Chat, content_of, read_chat
from models.checkpoint import Folder
from models.checksums import bytes_bar
from models.common import at_least_one, flag, short_bar
from models.forked import map_in_processes
from models.generation import Request
from models.limits import num_cores
from models.record_files import Items, Lines, Record, chunks_of, records_of
from models.records import (
    check_ids,
    cut_prompt,
    encode_prompt,
    folder_limits,
    get_prompt,
    naming,
    require,
    stated_prompt,
)
from models.tokenizer import Tokenizer, not_encodable

BIG_FILE = 2**23  # in bytes; tokenising as much takes a few seconds
NUM_LONGEST = 64  # longest prompts of a large file, tokenised first, since the cache must have room for them

# Fields of an output line; a record's own field of such a name is carried along as reference_NAME.
WRITTEN = ("idx", "sample_idx", "output", "finish_reason", "num_tokens", "logprob", "token_ids")
# Fields that make a record with a text prompt need the full check.
LOOKED_AT = {*WRITTEN, *NOT_READ, "system", "tools", "chat_template_kwargs"}


@dataclass(frozen=True, kw_only=True)
class PromptArgs:
    """What to answer."""

    prompt: list[str] | None = flag(None, action="append", help="a prompt; may be given several times")
    prompt_file: Path | None = flag(None, help="JSON or JSONL records with a prompt each")
    num_samples: int = flag(1, bounds=at_least_one, help="samples for each prompt")
    overlong: str = flag("refuse", choices=("refuse", "skip", "truncate"), help="for prompts that leave no room")
    chat: bool = flag(False, help="put text prompts through the chat template, as a message of the user")
    system: str | None = flag(None, help="with --chat: a system message before each prompt")


class _Look(NamedTuple):
    """Findings of the first pass in one chunk of the file."""

    num_records: int
    renamed: set[str]  # fields that are written as reference_NAME
    longest: list[tuple[int, Record]]  # (size in bytes, record)
    size: int  # of the chunk, in bytes


class PromptSource:
    """The prompts of a run. num_records: number of records in the file, skipped ones included.

    max_new_tokens: most tokens of a sample; there may be room for fewer. stamp: the file's stamp_of() when the run
    began. Raises ValueError or OSError for an unusable file or record, or if the file is not that one any more.
    """

    def __init__(self, args: PromptArgs, folder: Folder, max_new_tokens: int, stamp: tuple[int, int] | None):
        self.stamp = stamp
        self.args, self.folder, self.max_new_tokens = args, folder, max_new_tokens
        self.opening = opening_of(args.system, folder.tokenizer)
        self.counts = dict.fromkeys(("skipped", "truncated", "short"), 0)  # of the prompts tokenised so far
        # the ids of each prompt, None for a skipped one; not for a large file
        self._encoded: list[list[int] | None] | None = None
        path = args.prompt_file
        self.size = path.stat().st_size if path is not None and path.is_file() else 0
        self.is_large = self.size >= BIG_FILE
        self.num_records, self._longest, self._renamed = 0, 0, set()
        longest = self._look_at_all()
        if not self.num_records:
            raise ValueError(f"{path}: holds no records")
        if self.is_large:
            for record in longest:
                self._longest = max(self._longest, len(self._encode(record, counted=False) or ()))
        else:
            self._tokenise_all()
        self._check_stamp()

    def _check_stamp(self) -> None:
        if stamp_of(self.args.prompt_file) != self.stamp:
            raise ValueError(f"{self.args.prompt_file}: was replaced while it was being read; restore it and --resume")

    def _chunks(self) -> Iterable[Lines | Items]:
        if self.args.prompt_file is not None:
            return chunks_of(self.args.prompt_file)
        return [Items([Record(f"--prompt {i}", {"prompt": text}) for i, text in enumerate(self.args.prompt, start=1)])]

    def _look_at_all(self) -> list[Record]:
        """Checks all records. Returns those with the longest prompts of a large file."""
        workers = num_cores(of_rank=True) if self.is_large else 1
        longest: list[tuple[int, Record]] = []
        with bytes_bar(self.size, "reading prompts") as bar:
            fewer = "run it on fewer cores (taskset)"
            for look in map_in_processes(self._look, self._chunks(), workers, fewer=fewer):
                self.num_records += look.num_records
                self._renamed |= look.renamed
                longest = _longest_of(longest + look.longest)
                bar.update(look.size)
        return [record for _, record in longest]

    def _look(self, chunk: Lines | Items) -> _Look:
        num_records, renamed, sized = 0, set(), []
        for record in records_of([chunk]):
            num_records += 1
            prompt = record.fields.get("prompt")
            is_text = isinstance(prompt, str) and not prompt.lstrip().startswith("[")  # else maybe messages
            if not is_text or not record.fields.keys().isdisjoint(LOOKED_AT):
                with naming(record):
                    carried_fields(record)
                    prompt = prompt_of(record, self.opening, self.args.chat)
                renamed.update(name for name in WRITTEN if name in record.fields)
            if self.is_large:
                texts = [prompt] if isinstance(prompt, str) else map(content_of, prompt.messages)
                with naming(record):
                    sized.append((sum(map(num_bytes, texts)), record))
        return _Look(num_records, renamed, _longest_of(sized), chunk.size)

    def _tokenise_all(self) -> None:
        self._encoded = []
        for record in short_bar(records_of(self._chunks()), "tokenising", "prompt"):
            self._encoded.append(ids := self._encode(record))
            self._longest = max(self._longest, len(ids or ()))
        if self.counts["skipped"] == self.num_records:
            raise ValueError(f"all {self.num_records} prompts leave no room in {self.folder.max_seq_len} tokens")

    def _encode(self, record: Record, *, counted: bool = True) -> list[int] | None:
        """Returns the ids of a record's prompt, or None to skip it. A prompt is overlong if it leaves no room for one
        token; truncating drops its beginning, except the BOS, until the completion fits or has half of the room."""
        limit = self.folder.max_seq_len
        with naming(record):
            ids = encode_prompt(prompt_of(record, self.opening, self.args.chat), self.folder.tokenizer)
            require(ids, "the prompt has no tokens, so there is nothing to go on from")
        check_ids(ids, self.folder.config.vocab_size, record.where)
        if len(ids) >= limit:
            if self.args.overlong == "refuse" or limit < 2:
                advice = folder_limits(self.folder, self.args.overlong).advice
                raise ValueError(
                    f"{record.where}: the prompt has {len(ids)} tokens, which leaves no room in {limit}; {advice}"
                )
            if self.args.overlong == "skip":
                self.counts["skipped"] += counted
                return None
            self.counts["truncated"] += counted
            ids = cut_prompt(ids, max(limit - self.max_new_tokens, limit // 2), self.folder.tokenizer)
        self.counts["short"] += counted and len(ids) + self.max_new_tokens > limit
        return ids

    @property
    def most_tokens(self) -> int:
        """Most tokens of a prompt with its answer, as far as prompts are tokenised."""
        return min(self._longest + self.max_new_tokens, self.folder.max_seq_len)

    @property
    def usual_tokens(self) -> int:
        """Tokens of the mean prompt (in a large file, the longest known prompt) and half of the longest answer."""
        lengths = [len(ids) for ids in self._encoded or () if ids is not None]
        mean = sum(lengths) // len(lengths) if lengths else self._longest
        return min(mean + -(-self.max_new_tokens // 2), self.folder.max_seq_len)

    def missing(self, done: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (the numbers of the prompts with missing samples, the number of samples each of them misses). done: a
        mask of the samples already drawn, bool [num_records, num_samples]."""
        is_kept = True if self._encoded is None else np.array([ids is not None for ids in self._encoded])
        numbers = np.flatnonzero(is_kept & ~done.all(axis=1))
        return numbers, (~done[numbers]).sum(axis=1)

    def requests(self, numbers: np.ndarray, done: np.ndarray, taken: Iterable[range]) -> Iterator[Request]:
        """Yields requests for the missing samples of these prompts, in the ascending ranges that this replica takes."""
        deferred = enumerate(chain.from_iterable(chunk.deferred() for chunk in self._chunks()))
        ends, prompt = (~done[numbers]).sum(axis=1).cumsum(), -1
        for samples in taken:
            first, last = np.searchsorted(ends, (samples.start, samples.stop - 1), "right").tolist()
            for place in range(first, last + 1):
                number = int(numbers[place])
                if number != prompt:  # equal if the samples of a prompt are spread over several ranges
                    prompt, record = number, self._next(deferred, number)
                    missing = np.flatnonzero(~done[number]).tolist()
                    begin = int(ends[place]) - len(missing)  # counted by the replica that takes the first sample
                    counted = begin in samples
                    ids = self._encode(record, counted=counted) if self.is_large else self._encoded[number]
                if ids is None:
                    continue
                most = min(self.max_new_tokens, self.folder.max_seq_len - len(ids))
                for sample_idx in missing[max(0, samples.start - begin) : samples.stop - begin]:
                    yield Request(number, sample_idx, ids, most, record)

    def _next(self, deferred: Iterator[tuple[int, Callable[[], Record]]], number: int) -> Record:
        """Returns the record of this number, which the first pass has read before."""
        try:
            return next(read for idx, read in deferred if idx == number)()
        finally:  # a line of another file may be no record
            self._check_stamp()

    def asked(self, record: Record) -> str | list[dict]:
        """Returns the record's prompt as the model got it: as messages with --chat and --system, so that scoring and
        training on the line use the same prompt."""
        prompt = stated_prompt(record)
        if self.args.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return [*self.opening, *prompt] if self.opening else prompt

    def all_asked(self) -> Iterator[tuple[str, str | list[dict]]]:
        """Yields (where, asked()) of each record in the file, from the first on."""
        for record in records_of(self._chunks()):
            yield record.where, self.asked(record)

    def notes(self) -> dict[str, str]:
        """Returns the notes for the card: a row, or none."""
        renamed = [name for name in WRITTEN if name in self._renamed]
        kept = f"the records' own {', '.join(renamed)} kept as reference_{', reference_'.join(renamed)}" * bool(renamed)
        notes = [note for note in (self.remarks(), kept) if note]
        return {"note": "; ".join(notes)} if notes else {}

    def remarks(self) -> str:
        """Describes the prompts tokenised so far that were skipped, truncated or short of room."""
        remarks = (
            ("skipped", "prompts skipped as too long"),
            ("truncated", "prompts truncated"),
            ("short", f"prompts with room for fewer than {self.max_new_tokens} new tokens"),
        )
        return "; ".join(f"{self.counts[name]} {what}" for name, what in remarks if self.counts[name])


def stamp_of(path: Path | None) -> tuple[int, int] | None:
    """Returns what changes if a file is replaced: its size and time; None if there is none."""
    if path is None or not path.is_file():
        return None
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def num_bytes(text: str) -> int:
    """Returns the size of a text in UTF-8. Raises ValueError for a text that cannot be tokenised."""
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise not_encodable(text) from error


def _longest_of(sized: list[tuple[int, Record]]) -> list[tuple[int, Record]]:
    return heapq.nlargest(NUM_LONGEST, sized, key=lambda each: each[0])


def opening_of(system: str | None, tokenizer: Tokenizer) -> list[dict]:
    """Returns the messages that a conversation begins with: the system message, or none. Raises ValueError if the chat
    template refuses it or silently drops it."""
    if system is None:
        return []
    opening = [{"role": "system", "content": system}]
    if tokenizer.chat_template is None:
        return opening
    question = [{"role": "user", "content": "?"}]
    without = tokenizer.chat_template.render(question, add_generation_prompt=True)
    try:
        text = tokenizer.chat_template.render(opening + question, add_generation_prompt=True)
    except ValueError as error:
        raise ValueError(f"{error}; does it take a system message at all? Leave it out") from None
    if text == without:
        raise ValueError("the chat template would silently leave the system message out; do without it")
    return opening


def prompt_of(record: Record, opening: list[dict], chat: bool) -> str | Chat:
    """Returns the record's prompt, after the opening; --chat: as a chat. Raises ValueError for two system messages."""
    prompt = get_prompt(record, as_chat=chat)
    if not opening:
        return prompt
    roles = [message["role"] for message in prompt.messages]
    require("system" not in roles, "the prompt has a system message of its own; take it out, or leave out --system")
    return read_chat(opening).before(prompt)


def carried_fields(record: Record) -> dict[str, object]:
    """Returns the fields of a record that the lines of its samples carry along; a name in WRITTEN becomes
    reference_NAME. Raises ValueError if the record has that name too. A null counts as missing."""
    given, carried = record.given, {}
    read = next((name for name in ("prompt", "instruction", "input") if name in given), None)
    for name, value in record.fields.items():
        new = f"reference_{name}" if name in WRITTEN else name
        require(
            new == name or value is None or new not in given,
            f"{name!r} would be written as {new!r}, which the record has too; rename one",
        )
        if name in ("prompt", read):
            continue
        if value is not None:
            carried[new] = value
        elif new not in given:
            carried.setdefault(new, None)
    return carried
