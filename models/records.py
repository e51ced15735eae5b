"""Records and what becomes of them: prompts, answers and chats as token ids, rows and batches.

- a file is a JSON list or JSONL, by its content; every complaint names file and line
- prompts are encoded by one function, so training and scoring see the ids that generation sees
- a completion's ids are those that follow the prompt's when both are encoded together; EOS (in chats the end-of-turn
  token) ends it, and what a chat template writes after that token is not the assistant's
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.common import short_bar
from models.tokenizer import Tokenizer

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
        records = [Record(f"{path}: item {i}", item) for i, item in enumerate(items)]
    else:
        records = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append(Record(f"{path}:{number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
    if not records:
        raise ValueError(f"{path}: holds no records")
    for where, fields in records:
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: must be an object with named fields, not a {type(fields).__name__}")
    return records


def tokenising(path: Path) -> Iterable[Record]:
    """The records of a file that is being tokenised, with a progress bar."""
    return short_bar(read_records(path), "tokenising", "record")


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


def text_of(prompt: str | list[dict], tokenizer: Tokenizer) -> str:
    """The text of a prompt, up to the assistant's header."""
    return prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, add_generation_prompt=True)


def check_ids(ids: list[int], vocab_size: int, where: str) -> None:
    if max(ids, default=0) >= vocab_size:
        raise ValueError(
            f"{where}: holds token id {max(ids)}, which the model with vocab_size {vocab_size} does not have"
        )


class Limits(NamedTuple):
    """What a row may be: ids below vocab_size, at most max_seq_len of them. overlong: what becomes of a longer one:
    refuse (ValueError), skip, or truncate."""

    vocab_size: int
    max_seq_len: int
    overlong: str = "refuse"


class EncodingCounts(NamedTuple):
    """What happened while encoding a file, to be reported."""

    truncated: int
    skipped: int
    nothing_to_learn: int  # no label, or chosen and rejected are equal, maybe only since they were cut
    split_differently: int  # not the ids of the whole text, since tokens would span the end of the prompt or of a step

    def __str__(self) -> str:
        return "".join(f"; {n:,} {name.replace('_', ' ')}" for name, n in self._asdict().items() if n)


Row = TypeVar("Row")


def encode_records(
    records: Iterable[Record],
    encode: Callable[[Record], tuple[Row, bool]],
    ids_of: Callable[[Row], list[list[int]]],
    cut: Callable[[Row], Row | None],
    limits: Limits,
) -> tuple[list[Row], EncodingCounts]:
    """Records as rows within the limits, and what that took.

    encode(record) -> (row, whether it is split differently); ids_of(row): of all its token sequences; cut(row): its
    beginning, of max_seq_len tokens, or None if nothing worth a row is left of it, which counts as skipped.
    """
    rows, truncated, skipped, split_differently = [], 0, 0, 0
    for record in records:
        row, differs = encode(record)
        split_differently += differs
        for ids in ids_of(row):
            check_ids(ids, limits.vocab_size, record.where)
        longest = max(map(len, ids_of(row)))
        if longest > limits.max_seq_len:
            if limits.overlong == "refuse":
                raise ValueError(
                    f"{record.where}: {longest} tokens, the limit is {limits.max_seq_len}; raise --max_seq_len or "
                    "choose --overlong skip or truncate"
                )
            row = cut(row) if limits.overlong == "truncate" else None
            if row is None:
                skipped += 1
                continue
            truncated += 1
        rows.append(row)
    return rows, EncodingCounts(truncated, skipped, 0, split_differently)


# ------------------------------------------------------------------------------------------ answers


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


def eos_ids(tokenizer: Tokenizer) -> list[int]:
    """The EOS that training puts behind a text; ValueError if the folder names none."""
    folder = tokenizer.config_path.parent
    require(tokenizer.eos_token_id is not None, f"{folder}: the tokenizer has no EOS token to train")
    return [tokenizer.eos_token_id]


def encode_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> tuple[Example, bool]:
    """(prompt, completion and EOS, with loss on the latter two; whether the prompt's ids are no prefix of the whole
    text's, so that the completion is encoded alone)."""
    prompt_ids = encode_text(prompt, tokenizer)
    ids, differs = split_after(prompt_ids, encode_text(prompt + completion, tokenizer), completion, tokenizer)
    ids = ids + eos_ids(tokenizer)
    return Example(prompt_ids + ids, [IGNORE_INDEX] * len(prompt_ids) + ids), differs


def split_after(context: list[int], both: list[int], text: str, tokenizer: Tokenizer) -> tuple[list[int], bool]:
    """(the ids of the text behind a context, of which `both` are the ids together; whether a token would span the
    boundary, so that the text is encoded alone)."""
    if both[: len(context)] == context:
        return both[len(context) :], False
    return tokenizer.encode(text, add_special_tokens=False), True


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
    if added and not tokenizer.decode(ids[added[-1] + 1 : end]).strip():  # else it is part of the turn's text
        return added[-1] + 1
    return end


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def encode_answer(
    prompt: str | list[dict], answer: object, tokenizer: Tokenizer, name: str = "completion"
) -> tuple[Example, bool]:
    """(row, whether it is not split into the tokens of its whole text). It begins with the ids of the prompt and ends
    with EOS, or with the answer's last end-of-turn token; loss on the answer. name: what to call it in a ValueError."""
    if isinstance(prompt, str):
        require(isinstance(answer, str), f"{name} must be text where prompt is text")
        return encode_completion(prompt, answer, tokenizer)
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    require(isinstance(messages, list), f"{name} must be text or a list of messages, not a {type(answer).__name__}")
    require(messages, f"{name} holds no message")
    for message in (messages[0], messages[-1]):
        require(
            isinstance(message, dict) and message.get("role") == "assistant",
            f"{name} must begin and end with a message of the assistant, after the prompt",
        )
    example, _ = encode_messages(prompt + messages, tokenizer, first=len(prompt))
    ids, labels = example.input_ids, example.labels
    prompt_ids = encode_prompt(prompt, tokenizer)
    differs = ids[: len(prompt_ids)] != prompt_ids
    if differs:  # the answer's first characters would merge with the header's last
        require(len(messages) == 1, f"{name} does not follow the prompt's tokens under this chat template")
        header = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(prompt + messages, add_generation_prompt=False)
        turn = tokenizer.encode(whole.removeprefix(header), add_special_tokens=False)
        turn = turn[: turn_end(turn, 0, len(turn), tokenizer)]
        ids, labels = prompt_ids + turn, [IGNORE_INDEX] * len(prompt_ids) + turn
    end = len(labels) - next((i for i, label in enumerate(reversed(labels)) if label != IGNORE_INDEX), len(labels))
    require(end > len(prompt_ids), f"the chat template writes nothing for {name}")
    return Example(ids[:end], labels[:end]), differs


def encode_unfinished(prompt: str | list[dict], text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of the prompt and of an answer that ran out of tokens: nothing ends it, and it is the text as generated,
    which no chat template has rewritten."""
    if isinstance(prompt, str):
        return encode_completion(prompt, text, tokenizer)[0].input_ids[:-1]
    prompt_ids = encode_prompt(prompt, tokenizer)
    both = tokenizer.encode(text_of(prompt, tokenizer) + text, add_special_tokens=False)
    return prompt_ids + split_after(prompt_ids, both, text, tokenizer)[0]


def is_sample(record: Record) -> bool:
    """Whether generate.py wrote it: then `output` is the answer, whatever fields the prompt's record had."""
    return "finish_reason" in record.fields


def get_answer(record: Record, *, steps: bool) -> str | list:
    """The answer to the record's prompt: text or a list of messages; where steps are scored, text or a list of them."""
    if is_sample(record):
        reason, answer = record.fields["finish_reason"], get_field(record, "output")
        require(reason in ("stop", "length"), f"finish_reason must be stop or length, not {ascii(reason)[:60]}")
        require(isinstance(answer, str), f"output must be text, not a {type(answer).__name__}")
        return answer
    if steps and "completions" in record.fields:
        return get_steps(record)
    answer = get_field(record, "completion", "output")
    require(not steps or isinstance(answer, str), f"completion must be text, not a {type(answer).__name__}")
    return answer


def get_steps(record: Record) -> list[str]:
    """The record's `completions`: at least one step, each of them text."""
    steps = get_field(record, "completions")
    require(isinstance(steps, list), f"completions must be a list of steps, not a {type(steps).__name__}")
    require(steps, "completions holds no step")
    for i, step in enumerate(steps):
        require(isinstance(step, str), f"completions[{i}] must be text, not a {type(step).__name__}")
        require(step.strip(), f"completions[{i}] is an empty step")
    return steps


# ------------------------------------------------------------------------------------------ batches


def micro_batches(
    rows: list[Row], size: int, dp_rank: int = 0, dp_size: int = 1, key: Callable[[Row], int] | None = None
) -> Iterator[list[Row]]:
    """One rank's share of a batch in groups of at most `size` rows, of like length so that little is padded. Every rank
    yields the same number of groups, since each is a collective; a group may be empty.

    key: the length of a row; by default that of its input_ids.
    """
    share = sorted(rows, key=key or (lambda row: len(row.input_ids)))[dp_rank::dp_size]
    for start in range(0, -(-len(rows) // dp_size), size):
        yield share[start : start + size]


class Split(NamedTuple):
    """How the rows of a step are spread: over the data-parallel ranks, and there over forwards."""

    micro_batch_size: int  # rows of a forward on one rank
    dp: DeviceMesh
    pad_token_id: int

    def shares(self, rows: list[Row], key: Callable[[Row], int] | None = None) -> Iterator[list[Row]]:
        """This rank's rows, a group for each forward: see micro_batches."""
        return micro_batches(rows, self.micro_batch_size, self.dp.get_local_rank(), self.dp.size(), key)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the data-parallel ranks, in place. A collective."""
        dist.all_reduce(values, group=self.dp.get_group())
        return values


class Batch(NamedTuple):
    """int64 [B, T], on the device. position_ids and lengths (of the records in each row) only if rows are packed."""

    input_ids: Tensor
    labels: Tensor  # not shifted
    position_ids: Tensor | None
    lengths: list[list[int]] | None


def collate(examples: list[Example], pad_token_id: int, device: torch.device, multiple_of: int = 1) -> Batch:
    """Rows padded on the right to a multiple of `multiple_of`; no examples give one row of padding."""
    rows = examples or [Example([pad_token_id] * 2, [IGNORE_INDEX] * 2)]
    width = -(-max(len(row.input_ids) for row in rows) // multiple_of) * multiple_of

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in values], device=device)

    input_ids = padded([row.input_ids for row in rows], pad_token_id)
    labels = padded([row.labels for row in rows], IGNORE_INDEX)
    if not any(row.lengths is not None and len(row.lengths) > 1 for row in rows):
        return Batch(input_ids, labels, None, None)
    lengths = [row.lengths or [len(row.input_ids)] for row in rows]
    return Batch(input_ids, labels, padded([[*chain(*map(range, row))] for row in lengths], 0), lengths)
