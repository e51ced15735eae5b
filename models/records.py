"""Records, and their prompts, answers and chats as token ids and rows.

- prompts are encoded by one function, so training and scoring see the ids that generation sees
- a completion's ids are those that follow the prompt's when both are encoded together; where a token would span the
  boundary, the completion is encoded as a continuation of the prompt, and counted as split_differently
- a completion ends with EOS, in chats with the end-of-turn token: models/chats.py
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from models.chats import MEDIA, NOT_READ, ONE_MEDIUM, Chat, learnt_turns, not_read, parsed, read_chat, text_of_chat
from models.checkpoint import Folder
from models.common import short_bar
from models.parts import ids_of_parts
from models.record_files import Record, chunks_of, is_finished, kind_of, records_of, refuse_messages_as_text
from models.tokenizer import Tokenizer

IGNORE_INDEX = -100  # label of a token that is not learnt, as everywhere in Hugging Face


def read_records(path: str | Path) -> list[Record]:
    """The objects of a JSON list or JSONL file. Raises FileNotFoundError, or ValueError that names the line."""
    records = list(records_of(chunks_of(path)))
    require(records, f"{path}: holds no records")
    return records


def tokenising(path: Path) -> Iterable[Record]:
    """The records of a file that is being tokenised, with a progress bar."""
    return short_bar(read_records(path), "tokenising", "record")


@contextmanager
def naming(record: Record) -> Iterator[None]:
    """Makes a ValueError raised within begin with the record's place."""
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
    """The first of these fields that has a value; raises ValueError if all are missing or null."""
    for name in names:
        if name in record.given:
            return record.fields[name]
    nulls = [name for name in names if name in record.fields]
    why = f"{nulls[0]!r} is null" if nulls else f"{names[0]!r} is missing (found: {', '.join(record.fields) or 'none'})"
    advice = "; give messages with role and content" * ("conversations" in record.fields)
    advice += "; give the messages up to the answer as prompt" * ("messages" in record.given and names[0] == "prompt")
    raise ValueError(f"{record.where}: the field {why}{advice}")


def has_prompt(record: Record) -> bool:
    """Whether the record has a prompt in a field of its own."""
    return not record.given.keys().isdisjoint({"prompt", "input", "instruction"})


def stated_prompt(record: Record) -> str | list[dict]:
    """The record's `prompt` (or `input`) as written; in Alpaca's form, `instruction`, newline, `input`."""
    given = record.given
    if "instruction" not in given or "prompt" in given:
        return get_field(record, "prompt", "input")
    require(not given.get("context"), f'{record.where}: "context" is not read; call it input')  # Dolly's
    parts = [given["instruction"], given.get("input", "")]
    require(all(isinstance(part, str) for part in parts), f"{record.where}: instruction and input must be text")
    return "\n".join(part for part in parts if part)


def get_prompt(record: Record, *, as_chat: bool = False) -> str | Chat:
    """The record's prompt: text, or a chat, which also takes the record's `system` and `tools`. as_chat: turns text
    into a message of the user."""
    prompt, fields = stated_prompt(record), record.fields
    with naming(record):
        refuse_messages_as_text("prompt", prompt)
        if as_chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list):
            chat = read_chat(prompt, fields, "prompt")
            require(not chat.ends_in_silence, "prompt ends with a message of the assistant that is empty; leave it out")
            return chat
        require(isinstance(prompt, str), f"prompt must be text or a list of messages, not {kind_of(prompt)}")
        for name in ("system", "tools", "chat_template_kwargs"):
            require(not parsed(fields.get(name)), f"{name} belongs to a chat: give prompt as a list of messages")
        for name in not_read(fields):
            # only chat templates read documents; a text already contains them, and a reward function may use the field
            stated = name in ("documents", *ONE_MEDIUM) or (name == "system_prompt" and str(fields[name]) in prompt)
            advice = "give prompt as a list of messages, and " * (name not in MEDIA) + NOT_READ[name]
            require(stated, f'"{name}" is not read; {advice}')
        return prompt


def encode_prompt(prompt: str | Chat, tokenizer: Tokenizer) -> list[int]:
    """The ids that a completion follows; a chat is rendered by the chat template, up to the assistant's header."""
    encode = tokenizer.encode_prefix if isinstance(prompt, str) else tokenizer.encode_plain
    return encode(text_of(prompt, tokenizer))


def cut_prompt(ids: list[int], length: int, tokenizer: Tokenizer) -> list[int]:
    """Cuts a longer prompt to `length` ids: its BOS, if it has one, and its end, which an answer continues."""
    bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []  # also a BOS that only the chat template writes
    return bos + ids[len(ids) - (length - len(bos)) :]


def text_of(prompt: str | Chat, tokenizer: Tokenizer) -> str:
    """The text of a prompt, up to the assistant's header."""
    return prompt if isinstance(prompt, str) else text_of_chat(prompt, tokenizer)


def check_ids(ids: list[int], vocab_size: int, where: str) -> None:
    if max(ids, default=0) >= vocab_size:
        raise ValueError(
            f"{where}: holds token id {max(ids)}, which the model with vocab_size {vocab_size} does not have"
        )


class Limits(NamedTuple):
    """The limits of a row: ids below vocab_size, at most max_seq_len of them. overlong: how to treat a longer row:
    refuse (ValueError), skip, or truncate. more: advice on how to allow longer rows."""

    vocab_size: int
    max_seq_len: int
    overlong: str = "refuse"
    more: str | None = None

    @property
    def advice(self) -> str:
        """What to do about a row that is too long."""
        return (f"{self.more} or " if self.more else "") + "choose --overlong skip or truncate"


def folder_limits(folder: Folder, overlong: str) -> Limits:
    """The limits of a model's rows: its vocabulary, and --max_seq_len or its context."""
    config = folder.config
    more = "raise --max_seq_len" if folder.max_seq_len < config.max_position_embeddings else None
    return Limits(config.vocab_size, folder.max_seq_len, overlong, more)


class EncodingCounts(NamedTuple):
    """Counts to report about the encoding of a file, or of one record."""

    truncated: int = 0
    skipped: int = 0
    nothing_to_learn: int = 0  # no label, or chosen and rejected are equal, maybe only because both were truncated
    split_differently: int = 0  # the ids are not the whole text's: a token would span the end of a prompt or a step
    turns_cut_by_the_template: int = 0  # turns that lose a part once others follow, so they are not learnt
    with_the_separator_inside_a_step: int = 0  # labelled steps that scoring would find elsewhere in the same text

    def __str__(self) -> str:
        said = "".join(f"; {n:,} {name.replace('_', ' ')}" for name, n in self._asdict().items() if n)
        advice = ", at which scoring would cut it: take a --step_separator that no step holds"
        return said + advice * bool(self.with_the_separator_inside_a_step)

    def __bool__(self) -> bool:
        return any(self)

    def plus(self, other: "EncodingCounts") -> "EncodingCounts":
        return EncodingCounts(*map(sum, zip(self, other)))


Row = TypeVar("Row")


class Encoder(NamedTuple):
    """Makes rows of records: encode(record) -> (row, counts); cut(row) -> the row's beginning, of at most max_seq_len
    tokens, or None if nothing of an answer is left, which counts as skipped. A row's `sequences` are lists of token
    ids, one for each sequence that it puts through a model."""

    encode: Callable[[Record], tuple[Row, EncodingCounts]]
    cut: Callable[[Row], Row | None]
    limits: Limits

    def row_of(self, record: Record) -> tuple[Row | None, EncodingCounts]:
        """(the record's row within the limits, or None if it is skipped; counts)"""
        row, happened = self.encode(record)
        for ids in row.sequences:
            check_ids(ids, self.limits.vocab_size, record.where)
        longest = max(map(len, row.sequences))
        if longest > self.limits.max_seq_len:
            if self.limits.overlong == "refuse":
                limit, advice = self.limits.max_seq_len, self.limits.advice
                raise ValueError(f"{record.where}: {longest} tokens, the limit is {limit}; {advice}")
            row = self.cut(row) if self.limits.overlong == "truncate" else None
            happened = happened._replace(truncated=int(row is not None), skipped=int(row is None))
        return row, happened


# ------------------------------------------------------------------------------------------ answers


class Flat(NamedTuple):
    """A row as models/rows.py stores it."""

    sequences: list[tuple[Sequence[int], Sequence[int]]]  # (ids, labels), where a label is IGNORE_INDEX or the id
    prompt_length: int = 0
    values: Sequence[float] = ()


@dataclass(eq=False)
class Example:
    """One row: input_ids, and labels of the same length, not shifted, IGNORE_INDEX where nothing is learnt; lists or
    int32 arrays. lengths: of the records in a packed row."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    lengths: list[int] | None = None

    @property
    def num_targets(self) -> int:
        """Number of tokens that are predicted and learnt; the first token of a row is never predicted."""
        labels = self.labels[1:]
        if isinstance(labels, list):  # much quicker than to make an array of it
            return len(labels) - labels.count(IGNORE_INDEX)
        return int(np.count_nonzero(np.asarray(labels) != IGNORE_INDEX))

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first that is learnt."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORE_INDEX), len(self.labels))

    @property
    def sequences(self) -> list[Sequence[int]]:
        return [self.input_ids]

    @property
    def nothing_to_learn(self) -> bool:
        return self.num_targets == 0

    def ended(self, end: list[int]) -> "Example":
        """Appends `end`, at most one id, as a learnt token, unless the labels end with it already: many data sets and
        some generators write it. For rows of lists."""
        return self if self.labels[-1:] == end else Example(self.input_ids + end, self.labels + end)

    def flat(self) -> Flat:
        return Flat([(self.input_ids, self.labels)])

    @classmethod
    def from_flat(cls, flat: Flat) -> "Example":
        return cls(*flat.sequences[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Example) and all(map(np.array_equal, vars(self).values(), vars(other).values()))


Encoded = tuple[Example, EncodingCounts]  # a row and its counts


def end_of_text(tokenizer: Tokenizer) -> list[int]:
    """The ids that training appends to a text: EOS; raises ValueError if the folder names none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.config_path.parent}: the tokenizer has no EOS token to train")
    return [tokenizer.eos_token_id]


def encode_parts(parts: list[tuple[str, bool]], tokenizer: Tokenizer, *, is_chat: bool) -> Encoded:
    """Encodes a text, given in parts (text, whether it is learnt), as a row. Where a token of the whole text spans a
    boundary, the ids differ from those of the whole text: see models/parts.py."""
    ids_of, are_whole = ids_of_parts([text for text, _ in parts], tokenizer, is_chat=is_chat)
    labels = [part if learnt else [IGNORE_INDEX] * len(part) for part, (_, learnt) in zip(ids_of, parts)]
    return Example([*chain(*ids_of)], [*chain(*labels)]), EncodingCounts(split_differently=int(not are_whole))


def _answered(prompt: str | Chat, answer: str, tokenizer: Tokenizer, end: list[int]) -> Encoded:
    """Encodes a prompt and the text that follows it, ended by `end`."""
    parts = [(text_of(prompt, tokenizer), False), (answer, True)]
    example, counts = encode_parts(parts, tokenizer, is_chat=isinstance(prompt, Chat))
    return example.ended(end), counts


def encode_chat(chat: Chat, tokenizer: Tokenizer, *, as_generated: bool = False) -> Encoded:
    """(a conversation with loss on the assistant's turns that learnt_turns() finds; counts)"""
    text, spans, cut = learnt_turns(chat, tokenizer, as_generated=as_generated)
    cuts = [0, *chain(*spans), len(text)]
    parts = [(text[begin:end], i % 2 == 1) for i, (begin, end) in enumerate(pairwise(cuts)) if end > begin or i == 0]
    example, counts = encode_parts(parts, tokenizer, is_chat=True)
    return example, counts._replace(turns_cut_by_the_template=cut)


def encode_answer(prompt: str | Chat, answer: object, tokenizer: Tokenizer, name: str = "completion") -> Encoded:
    """encode_answered(), cut after the last token that generation would sample: EOS, or the end of the turn. A template
    may mark more as part of the assistant's turn: a newline after it, and EOS after that."""
    example, counts = encode_answered(prompt, answer, tokenizer, name)
    require(example.num_targets > 0, f"the chat template writes nothing for {name}")
    learnt = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
    end, ends = learnt[-1] + 1, tokenizer.ends_of_turn
    for stop in [i + 1 for i in reversed(learnt) if example.input_ids[i] in ends]:
        behind = [token for token in example.input_ids[stop:end] if token not in ends]
        if behind and tokenizer.decode(behind, skip_special_tokens=False).strip():
            break
        end = stop
    return Example(example.input_ids[:end], example.labels[:end]), counts


def encode_answered(prompt: str | Chat, answer: object, tokenizer: Tokenizer, name: str = "completion") -> Encoded:
    """(a prompt and the answer to it, with loss on the answer; counts). A text follows the prompt as generation encodes
    it; messages are rendered by the chat template. name: what to call the answer in a ValueError."""
    refuse_messages_as_text(name, answer)
    if isinstance(prompt, str):
        require(isinstance(answer, str), f"{name} must be text where prompt is text")
        return _answered(prompt, answer, tokenizer, end_of_text(tokenizer))
    is_text = isinstance(answer, str)
    answer = _without_end_of_turn(answer, tokenizer) if is_text else answer
    if is_text and prompt.is_open:
        return _answered(prompt, answer, tokenizer, ids_at_the_end(prompt, tokenizer))
    messages = [{"role": "assistant", "content": answer}] if is_text else answer
    require(isinstance(messages, list), f"{name} must be text or a list of messages, not {kind_of(answer)}")
    require(messages, f"{name} holds no message")
    chat = read_chat(messages, what=name)
    ends = {chat.messages[i]["role"] for i in (0, -1)}
    require(ends == {"assistant"}, f"{name} must begin and end with a message of the assistant, after the prompt")
    return encode_chat(prompt.before(chat), tokenizer, as_generated=is_text)


def _without_end_of_turn(answer: str, tokenizer: Tokenizer) -> str:
    """Removes the end-of-turn token, and white space after it, if the answer's text ends with them."""
    end = "" if tokenizer.end_of_turn_id is None else tokenizer.decode([tokenizer.end_of_turn_id], False)
    whole = answer.rstrip()
    return whole[: -len(end)] if end and whole.endswith(end) else answer


def encode_generated(prompt: str | Chat, text: str, tokenizer: Tokenizer, *, finished: bool) -> list[int]:
    """The ids of the prompt and of a generated text, which no chat template rewrites; if finished, followed by the
    token that ended it: EOS, or the end of the turn."""
    end = ids_at_the_end(prompt, tokenizer) if finished else []
    return list(_answered(prompt, text, tokenizer, end)[0].input_ids)


def ids_at_the_end(prompt: str | Chat, tokenizer: Tokenizer) -> list[int]:
    """The id that training appends to a finished answer: in chats the end of the turn, else EOS; [] without either."""
    if isinstance(prompt, str):
        return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tokenizer.ends_of_turn[:1]


def is_sample(record: Record) -> bool:
    """Whether generate.py wrote the record, or another engine: a prompt, a finish_reason, and an `output` (or else a
    `completion`) that is text. It is read as it was drawn, whatever fields the prompt's record had. Other tools write a
    finish_reason, too, beside pairs, labelled steps and conversations."""
    answer = record.given.get("output", record.given.get("completion"))
    return "finish_reason" in record.given and has_prompt(record) and isinstance(answer, str)


def get_answer(record: Record, *, steps: bool) -> str | list:
    """The answer to the record's prompt: text or a list of messages; with steps, text or a list of steps."""
    if is_sample(record):
        is_finished(record.fields["finish_reason"])  # raises ValueError for an unknown one
        answer = get_field(record, "output", "completion")
        if "output" not in record.given:
            refuse_messages_as_text("completion", answer)
        return answer
    if steps and "completions" in record.given:
        return get_steps(record)
    answer = get_field(record, "completion", "output")
    require(not steps or isinstance(answer, str), f"completion must be text, not {kind_of(answer)}")
    return answer


def encode_sample(record: Record, tokenizer: Tokenizer) -> Encoded:
    """(a line of generate.py as it was sampled, with loss on the answer and on the token that ended it, unless it ran
    out of tokens; counts)"""
    prompt, answer = get_prompt(record), get_answer(record, steps=False)
    end = ids_at_the_end(prompt, tokenizer) if is_finished(record.fields["finish_reason"]) else []
    return _answered(prompt, answer, tokenizer, end)


def get_steps(record: Record) -> list[str]:
    """The record's `completions`: at least one step, each of them text."""
    steps = get_field(record, "completions")
    require(isinstance(steps, list), f"completions must be a list of steps, not {kind_of(steps)}")
    require(steps, "completions holds no step")
    for i, step in enumerate(steps):
        require(isinstance(step, str), f"completions[{i}] must be text, not {kind_of(step)}")
        require(step.strip(), f"completions[{i}] is an empty step")
    return steps
