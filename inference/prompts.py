"""The prompts that generate.py answers, read and tokenised when a slot is free for them.

- a first look at the whole file refuses what cannot be used before there is any output. It tokenises the prompts of a
  file of up to BIG_FILE bytes, which are kept; of a larger one it reads the fields in several processes and tokenises
  the longest prompts, and what is found overlong later ends the run there, to be resumed
- of a large file no more is in memory than the prompts under way
- data-parallel replicas take samples when they have room for them, at first whole prompts, whose samples share a
  prefill, at the end single samples: models/sharing.py
"""

import heapq
from collections.abc import Iterable, Iterator
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
from models.tokenizer import Tokenizer

BIG_FILE = 2**23  # in bytes: a few seconds of tokenising
NUM_LONGEST = 64  # prompts of a large file that are tokenised first: what the cache must have room for

# What a line says of its sample; a record's own field of such a name is carried along as reference_NAME.
WRITTEN = ("idx", "sample_idx", "output", "finish_reason", "num_tokens", "logprob", "token_ids")
# What may be wrong in a record with a prompt of text.
LOOKED_AT = {*WRITTEN, *NOT_READ, "system", "tools", "chat_template_kwargs"}


@dataclass(frozen=True, kw_only=True)
class PromptArgs:
    """What to answer."""

    prompt: list[str] | None = flag(None, action="append", help="a prompt; may be given several times")
    prompt_file: Path | None = flag(None, help="JSON or JSONL records with a prompt each")
    num_samples: int = flag(1, bounds=at_least_one, help="samples for each prompt")
    overlong: str = flag("refuse", choices=("refuse", "skip", "truncate"), help="prompts that leave no room")
    chat: bool = flag(False, help="put text prompts through the chat template, as the user's message")
    system: str | None = flag(None, help="with --chat: a system message before each prompt")


class _Look(NamedTuple):
    """What a first look at a part of a file finds."""

    num_records: int
    renamed: set[str]  # fields that lines cannot have under their own name
    longest: list[tuple[int, Record]]  # with their sizes
    size: int  # bytes of the file


class PromptSource:
    """The prompts of a run. num_records: of the file, also where prompts are skipped.

    max_new_tokens: of a sample; there may be room for fewer. Raises ValueError or OSError for what cannot be used.
    """

    def __init__(self, args: PromptArgs, folder: Folder, max_new_tokens: int):
        self.args, self.folder, self.max_new_tokens = args, folder, max_new_tokens
        self.opening = opening_of(args.system, folder.tokenizer)
        self.skipped = self.truncated = self.short = 0  # of the prompts tokenised so far
        # ids of each prompt, None of one skipped; where all are known
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
                self._longest = max(self._longest, len(self._encode(record) or ()))
            self.skipped = self.truncated = self.short = 0  # they are counted when their turn comes
        else:
            self._tokenise_all()

    def _chunks(self) -> Iterable[Lines | Items]:
        if self.args.prompt_file is not None:
            return chunks_of(self.args.prompt_file)
        return [Items([Record(f"--prompt {i}", {"prompt": text}) for i, text in enumerate(self.args.prompt, start=1)])]

    def _look_at_all(self) -> list[Record]:
        """The longest prompts of a large file."""
        workers = num_cores(of_rank=True) if self.is_large else 1
        longest: list[tuple[int, Record]] = []
        with bytes_bar(self.size, "reading prompts") as bar:
            for look in map_in_processes(self._look, self._chunks(), workers):
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
            is_text = isinstance(prompt, str) and not prompt.lstrip().startswith("[")  # of messages, maybe
            if not is_text or not record.fields.keys().isdisjoint(LOOKED_AT):
                with naming(record):
                    carried_fields(record)
                    prompt = prompt_of(record, self.opening, self.args.chat)
                renamed.update(name for name in WRITTEN if name in record.fields)
            if self.is_large:
                texts = [prompt] if isinstance(prompt, str) else map(content_of, prompt.messages)
                sized.append((sum(len(text) if text.isascii() else len(text.encode()) for text in texts), record))
        return _Look(num_records, renamed, _longest_of(sized), chunk.size)

    def _tokenise_all(self) -> None:
        self._encoded = []
        for record in short_bar(records_of(self._chunks()), "tokenising", "prompt"):
            self._encoded.append(ids := self._encode(record))
            self._longest = max(self._longest, len(ids or ()))
        if self.skipped == self.num_records:
            raise ValueError(f"all {self.skipped} prompts leave no room in {self.folder.max_seq_len} tokens")

    def _encode(self, record: Record) -> list[int] | None:
        """The ids of a record's prompt, None if it is to be skipped. A prompt is overlong if it leaves no room for one
        token; truncating cuts its beginning, but for the BOS, so that the completion fits or has half of the room."""
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
                self.skipped += 1
                return None
            self.truncated += 1
            # at least half of the room is the prompt's
            ids = cut_prompt(ids, max(limit - self.max_new_tokens, limit // 2), self.folder.tokenizer)
        self.short += len(ids) + self.max_new_tokens > limit
        return ids

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its answer, as far as is known."""
        return min(self._longest + self.max_new_tokens, self.folder.max_seq_len)

    @property
    def usual_tokens(self) -> int:
        """Of a prompt and half of its answer's tokens: the mean, of a large file the longest that is known."""
        lengths = [len(ids) for ids in self._encoded or () if ids is not None]
        mean = sum(lengths) // len(lengths) if lengths else self._longest
        return min(mean + -(-self.max_new_tokens // 2), self.folder.max_seq_len)

    def missing(self, done: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the numbers of the prompts that have samples to draw, how many of each). done: the samples that are drawn,
        bool [num_records, num_samples]."""
        is_kept = True if self._encoded is None else np.array([ids is not None for ids in self._encoded])
        numbers = np.flatnonzero(is_kept & ~done.all(axis=1))
        return numbers, (~done[numbers]).sum(axis=1)

    def requests(self, numbers: np.ndarray, done: np.ndarray, taken: Iterable[range]) -> Iterator[Request]:
        """The samples of these prompts that are not done, of them the ranges that are taken, in ascending order."""
        deferred = enumerate(chain.from_iterable(chunk.deferred() for chunk in self._chunks()))
        ends, prompt = (~done[numbers]).sum(axis=1).cumsum(), -1
        for samples in taken:
            first, last = np.searchsorted(ends, (samples.start, samples.stop - 1), "right").tolist()
            for place in range(first, last + 1):
                number = int(numbers[place])
                if number != prompt:  # else its samples come in several chunks
                    prompt, record = number, next(read for idx, read in deferred if idx == number)()
                    ids = self._encode(record) if self._encoded is None else self._encoded[number]
                if ids is None:
                    continue
                missing = np.flatnonzero(~done[number]).tolist()
                begin = int(ends[place]) - len(missing)
                most = min(self.max_new_tokens, self.folder.max_seq_len - len(ids))
                for sample_idx in missing[max(0, samples.start - begin) : samples.stop - begin]:
                    yield Request(number, sample_idx, ids, most, record)

    def asked(self, record: Record) -> str | list[dict]:
        """The record's prompt as the model got it: messages with --chat and --system, so that whoever reads the line
        scores, or learns, the answer to the same."""
        prompt = stated_prompt(record)
        if self.args.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return [*self.opening, *prompt] if self.opening else prompt

    def notes(self) -> dict[str, str]:
        """A row of the card, or none."""
        renamed = [name for name in WRITTEN if name in self._renamed]
        kept = f"the records' own {', '.join(renamed)} kept as reference_{', reference_'.join(renamed)}" * bool(renamed)
        notes = [note for note in (self.remarks(), kept) if note]
        return {"note": "; ".join(notes)} if notes else {}

    def remarks(self) -> str:
        """On the prompts tokenised so far, for people."""
        remarks = (
            (self.skipped, "prompts skipped as too long"),
            (self.truncated, "prompts truncated"),
            (self.short, f"prompts with room for fewer than {self.max_new_tokens} new tokens"),
        )
        return "; ".join(f"{count} {what}" for count, what in remarks if count)


def _longest_of(sized: list[tuple[int, Record]]) -> list[tuple[int, Record]]:
    return heapq.nlargest(NUM_LONGEST, sized, key=lambda each: each[0])


def opening_of(system: str | None, tokenizer: Tokenizer) -> list[dict]:
    """The messages that a conversation begins with: the system message, or none. Raises ValueError where the chat
    template refuses it, or would leave it out without a word."""
    if system is None:
        return []
    opening = [{"role": "system", "content": system}]
    if tokenizer.chat_template is None:
        return opening
    question = [{"role": "user", "content": "?"}]
    without = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    try:
        text = tokenizer.apply_chat_template(opening + question, add_generation_prompt=True)
    except ValueError as error:
        raise ValueError(f"{error}; does it take a system message at all? Leave it out") from None
    if text == without:
        raise ValueError("the chat template would leave the system message out without a word; do without it")
    return opening


def prompt_of(record: Record, opening: list[dict], chat: bool) -> str | Chat:
    """The record's prompt, with --chat as a chat, behind the opening. Raises ValueError for two system messages."""
    prompt = get_prompt(record, as_chat=chat)
    if not opening:
        return prompt
    roles = [message["role"] for message in prompt.messages]
    require("system" not in roles, "the prompt has a system message of its own; take it out, or leave out --system")
    return read_chat(opening).before(prompt)


def carried_fields(record: Record) -> dict[str, object]:
    """The fields of a record that its samples' lines carry along, those of the names in WRITTEN as reference_NAME.
    Raises ValueError where that name is taken as well."""
    read, carried = next((name for name in ("prompt", "instruction", "input") if name in record.fields), None), {}
    for name, value in record.fields.items():
        new = f"reference_{name}" if name in WRITTEN else name
        require(
            new == name or new not in record.fields,
            f"{name!r} would be written as {new!r}, which is there too; rename one",
        )
        if name != read:
            carried[new] = value
    return carried
