"""Records to batches.

- a file is a JSON list or JSONL, by its content; every complaint names file and line
- prompts are encoded by one function, so training sees the ids that generation sees
- the order is a pure function of (seed, epoch), the same for every rank layout, so a data cursor is just the step
  number
"""

import bisect
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from models.tokenizer import Tokenizer
from models.tp import is_main_rank

IGNORE_INDEX = -100  # label of a token that is not learnt, as everywhere in Hugging Face


class Record(NamedTuple):
    where: str  # "file:line" or "file: item 3", for messages
    fields: dict


def read_records(path: str | Path) -> list[Record]:
    """The objects of a JSON list or JSONL file. Raises FileNotFoundError, or ValueError that names the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a valid JSON list: {error}") from None
        found = [(f"{path}: item {i}", item) for i, item in enumerate(items)]
    else:
        found = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    found.append((f"{path}:{number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
    if not found:
        raise ValueError(f"{path}: holds no records")
    for where, item in found:
        if not isinstance(item, dict):
            raise ValueError(f"{where}: must be an object with named fields, not a {type(item).__name__}")
    return [Record(where, item) for where, item in found]


def tokenising(path: Path) -> Iterable[Record]:
    """The records of a file that is being tokenised, with a progress bar."""
    records = read_records(path)
    return tqdm(records, desc="tokenising", unit="record", delay=1, leave=False, disable=not is_main_rank())


@contextmanager
def naming(record: Record) -> Iterator[None]:
    """A ValueError raised within says where the record is."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(record.where):
            raise
        raise ValueError(f"{record.where}: {error}") from None


def require(condition: bool, complaint: str) -> None:
    if not condition:
        raise ValueError(complaint)


def get_field(record: Record, *names: str) -> object:
    """The first of these fields that the record has; ValueError if it has none."""
    for name in names:
        if name in record.fields:
            return record.fields[name]
    raise ValueError(f"{record.where}: the field {names[0]!r} is missing (found: {', '.join(record.fields) or 'none'})")


def get_prompt(record: Record) -> str | list[dict]:
    """The record's `prompt` (or `input`): text or a list of chat messages."""
    prompt = get_field(record, "prompt", "input")
    if not isinstance(prompt, str | list):
        raise ValueError(f"{record.where}: prompt must be text or a list of messages, not a {type(prompt).__name__}")
    return prompt


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text to go on from: BOS once where the tokenizer wants one (also if the text spells it), no EOS."""
    ids = tokenizer.encode(text)
    if tokenizer.adds_eos:
        ids = ids[:-1]
    while tokenizer.adds_bos and ids[1:2] == [tokenizer.bos_token_id]:
        ids = ids[1:]
    return ids


def encode_prompt(prompt: str | list[dict], tokenizer: Tokenizer) -> list[int]:
    """The ids a completion follows; a list of messages goes through the chat template, up to the assistant's header."""
    if isinstance(prompt, str):
        return encode_text(prompt, tokenizer)
    return tokenizer.encode_chat(prompt, add_generation_prompt=True)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, folder: Path) -> None:
    """Raises ValueError if the tokenizer was not made for a model of this vocabulary. Added tokens may lie beyond it,
    since many folders name a pad token that has no embedding; check_ids refuses them where they occur."""
    size = tokenizer.base_vocab_size
    if size > vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer does not fit: it has {size} tokens, the model's vocab_size is {vocab_size}"
        )


def check_ids(ids: list[int], vocab_size: int, where: str) -> None:
    if max(ids, default=0) >= vocab_size:
        raise ValueError(
            f"{where}: holds token id {max(ids)}, which the model with vocab_size {vocab_size} does not have"
        )


# -------------------------------------------------------------------------- supervised fine-tuning


@dataclass
class Example:
    """One row: input_ids, and labels of the same length, IGNORE_INDEX where nothing is learnt (not yet shifted). A
    packed row has the lengths of the records in it."""

    input_ids: list[int]
    labels: list[int]
    lengths: list[int] | None = None

    @property
    def num_targets(self) -> int:
        """Number of tokens that are predicted and learnt; the first token of a row is never predicted."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def pack(examples: list[Example], max_seq_len: int) -> list[Example]:
    """Records put into rows of at most max_seq_len tokens, none of them split: longest first, each into the fullest row
    that has room (best-fit decreasing). No record predicts the next one's first token."""
    rows: list[list[Example]] = []
    rows_with_room: dict[int, list[int]] = {}  # free tokens -> rows
    rooms: list[int] = []  # the keys, sorted
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        size = len(example.input_ids)
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[place]
        else:
            room, row = max_seq_len, len(rows)
            rows.append([])
        rows[row].append(example)
        if room - size not in rows_with_room:
            rows_with_room[room - size] = []
            bisect.insort(rooms, room - size)
        rows_with_room[room - size].append(row)
    return [
        Example(
            [token for example in row for token in example.input_ids],
            [label for example in row for label in (IGNORE_INDEX, *example.labels[1:])],
            [len(example.input_ids) for example in row],
        )
        for row in rows
    ]


class EncodingCounts(NamedTuple):
    """What happened while encoding a file, to be reported."""

    truncated: int
    skipped: int
    nothing_to_learn: int
    split_differently: int  # the prompt's ids are no prefix of the whole text's


def encode_sft_file(
    path: Path, tokenizer: Tokenizer, *, vocab_size: int, max_seq_len: int, overlong: str
) -> tuple[list[Example], EncodingCounts]:
    """All records of a file as rows of at most max_seq_len tokens.

    overlong: refuse (ValueError), skip, or truncate (the end is cut, and no EOS is put after the cut).
    """
    examples, truncated, skipped, nothing, split_differently = [], 0, 0, 0, 0
    for record in tokenising(path):
        example, differs = encode_sft_record(record, tokenizer)
        split_differently += differs
        check_ids(example.input_ids, vocab_size, record.where)
        if len(example.input_ids) > max_seq_len:
            if overlong == "refuse":
                raise ValueError(
                    f"{record.where}: {len(example.input_ids)} tokens, the limit is {max_seq_len}; raise --max_seq_len "
                    "or choose --overlong skip or truncate"
                )
            if overlong == "skip":
                skipped += 1
                continue
            truncated += 1
            example = Example(example.input_ids[:max_seq_len], example.labels[:max_seq_len])
        nothing += example.num_targets == 0
        examples.append(example)
    if not any(example.num_targets for example in examples):
        raise ValueError(f"{path}: no record has a token to learn ({len(examples)} records kept, {skipped} too long)")
    return examples, EncodingCounts(truncated, skipped, nothing, split_differently)


def encode_sft_record(record: Record, tokenizer: Tokenizer) -> tuple[Example, bool]:
    """(row, whether the prompt was split into other tokens beside its completion than alone).

    `prompt` + `completion`: loss on the completion and EOS. `messages`, or a prompt in messages: loss on the
    assistant's turns and their end-of-turn tokens. `text`: loss on all of it and EOS.
    """
    fields = record.fields
    with naming(record):
        if "messages" in fields:
            return encode_messages(fields["messages"], tokenizer)
        if "text" in fields and "completion" not in fields and "output" not in fields:
            require(isinstance(fields["text"], str), "text must be a string")
            ids = [*encode_text(fields["text"], tokenizer), *_eos(tokenizer)]
            return Example(ids, list(ids)), False
        prompt, completion = get_prompt(record), get_field(record, "completion", "output")
        if isinstance(prompt, list):
            answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            require(isinstance(answer, list), "completion must be text or a list of messages")
            return encode_messages(prompt + answer, tokenizer, first=len(prompt))
        require(isinstance(completion, str), "completion must be a string where prompt is one")
        return encode_completion(prompt, completion, tokenizer)


def _eos(tokenizer: Tokenizer) -> list[int]:
    require(
        tokenizer.eos_token_id is not None, f"{tokenizer.config_path.parent}: the tokenizer has no EOS token to train"
    )
    return [tokenizer.eos_token_id]


def encode_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> tuple[Example, bool]:
    """(prompt, completion and EOS, with loss on the latter two; whether the prompt's ids are no prefix of the whole
    text's, so that the completion is encoded alone)."""
    prompt_ids = encode_text(prompt, tokenizer)
    ids = encode_text(prompt + completion, tokenizer)
    differs = ids[: len(prompt_ids)] != prompt_ids
    if differs:
        ids = prompt_ids + tokenizer.encode(completion, add_special_tokens=False)
    ids = ids + _eos(tokenizer)
    return Example(ids, [IGNORE_INDEX] * len(prompt_ids) + ids[len(prompt_ids) :]), differs


def encode_messages(messages: object, tokenizer: Tokenizer, first: int = 0) -> tuple[Example, bool]:
    """A conversation with loss on the assistant's turns from message `first` on.

    A turn runs from the end of its header (what the template adds as the generation prompt) to its end-of-turn token;
    what the template puts after that, often a newline, is not the assistant's.
    """
    require(isinstance(messages, list), "messages must be a list")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    labels, differs = [IGNORE_INDEX] * len(ids), False
    for i, message in enumerate(messages):
        if i < first or message["role"] != "assistant":
            continue
        require(i > 0, "message 0 is the assistant's, so there is nothing it answers")
        before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=False)
        require(
            after.startswith(before) and text.startswith(after),
            f"the chat template writes message {i} differently once others follow; give it as prompt and completion",
        )
        header = tokenizer.encode(before, add_special_tokens=False)
        start = _common_prefix(header, ids)
        differs |= start != len(header)
        end = _common_prefix(tokenizer.encode(after, add_special_tokens=False), ids)
        end = turn_end(ids, start, end, tokenizer)
        labels[start:end] = ids[start:end]
    return Example(ids, labels), differs


def turn_end(ids: list[int], start: int, end: int, tokenizer: Tokenizer) -> int:
    """One past the end-of-turn token of the turn ids[start:end]; `end` if the template writes no such token."""
    added = [j for j in range(start, end) if ids[j] in tokenizer.special_ids or ids[j] >= tokenizer.base_vocab_size]
    if added and not tokenizer.decode(ids[added[-1] + 1 : end]).strip():  # else it is part of what was said
        return added[-1] + 1
    return end


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# ------------------------------------------------------------------------------- order and batches


def epoch_order(num_rows: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of the rows in an epoch: a pure function of its arguments."""
    if not shuffle:
        return list(range(num_rows))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_rows, generator=generator).tolist()


def training_batches(
    num_rows: int, batch_size: int, *, seed: int, shuffle: bool, first_step: int, last_step: int
) -> Iterator[tuple[int, list[int]]]:
    """(step, row numbers) for the optimizer steps first_step..last_step, counted from 1. An epoch's last, incomplete
    batch is used."""
    per_epoch = -(-num_rows // batch_size)
    order, order_epoch = [], -1
    for step in range(first_step, last_step + 1):
        epoch, batch = divmod(step - 1, per_epoch)
        if epoch != order_epoch:
            order, order_epoch = epoch_order(num_rows, seed=seed, epoch=epoch, shuffle=shuffle), epoch
        yield step, order[batch * batch_size : (batch + 1) * batch_size]


Row = TypeVar("Row")


def micro_batches(
    rows: list[Row], size: int, dp_rank: int = 0, dp_size: int = 1, key: Callable[[Row], int] | None = None
) -> Iterator[list[Row]]:
    """One rank's share of a batch in groups of at most `size` rows, of like length so that little is padded. Every rank
    yields the same number of groups, since each is a collective; a group may be empty.

    key: the length of a row; by default that of its input_ids.
    """
    by_length = sorted(rows, key=key or (lambda row: len(row.input_ids)))
    mine = by_length[dp_rank::dp_size]
    for start in range(0, -(-len(rows) // dp_size), size):
        yield mine[start : start + size]


class Batch(NamedTuple):
    """int64 [B, T] each, on the device. position_ids and lengths (of the records in each row) only if rows are
    packed."""

    input_ids: Tensor
    labels: Tensor  # not shifted
    position_ids: Tensor | None
    lengths: list[list[int]] | None


def collate(examples: list[Example], pad_token_id: int, device: torch.device, multiple_of: int = 1) -> Batch:
    """Rows padded on the right to a multiple of `multiple_of`; no examples give one row of padding."""
    rows = examples or [Example([pad_token_id] * 2, [IGNORE_INDEX] * 2)]
    length = -(-max(len(row.input_ids) for row in rows) // multiple_of) * multiple_of
    input_ids = torch.full((len(rows), length), pad_token_id)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    packed = any(row.lengths is not None and len(row.lengths) > 1 for row in rows)
    lengths = [row.lengths or [len(row.input_ids)] for row in rows] if packed else None
    position_ids = None
    if packed:
        position_ids = torch.zeros_like(input_ids)
        for i, row in enumerate(lengths):
            places = torch.cat([torch.arange(length) for length in row])
            position_ids[i, : len(places)] = places
        position_ids = position_ids.to(device)
    return Batch(input_ids.to(device), labels.to(device), position_ids, lengths)
