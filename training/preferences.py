"""Records with a judgement to rows of tokens: pairs (chosen, rejected), labelled completions, labelled steps.

- a completion is encoded as for supervised fine-tuning: prompt ids are those of generation, EOS (in chats the
  end-of-turn token) ends it. What a chat template writes after that token is cut off, so that a score sits on the last
  token of its row, which is the last token that generation gives
- the two rows of a pair begin with the same prompt ids
- the ids of a step depend on the prompt and the steps up to it alone, so its score does not depend on what follows;
  training/train_rm.py and inference/score.py find their positions with the same function, encode_steps
- `--overlong truncate` cuts the end and puts no EOS after the cut, so a cut answer is scored as PPO scores one that ran
  out of tokens; of labelled steps only whole ones are kept. Where no token of the completion (no whole step) is left,
  the record is skipped
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from models.tokenizer import Tokenizer
from training.data import (
    IGNORE_INDEX,
    Example,
    Record,
    check_ids,
    collate,
    encode_completion,
    encode_messages,
    encode_prompt,
    encode_text,
    get_field,
    get_prompt,
    naming,
    require,
    tokenising,
    turn_end,
)


@dataclass
class Pair:
    """Two rows that begin with the same prompt_length ids; loss on what follows. margin: how much better the chosen one
    is, in units of the reward; None where the record does not say. reference: what a frozen model gives for the two
    completions, summed log-probabilities; NaN until training/reference.py has computed it."""

    prompt_length: int
    chosen: Example
    rejected: Example
    margin: float | None = None
    reference: tuple[float, float] = (math.nan, math.nan)


@dataclass
class Scored:
    """A row whose score at each of `positions` (ascending) should be the logit of the label, in [0, 1], beside it."""

    input_ids: list[int]
    positions: list[int]
    labels: list[float]
    prompt_length: int = 0


class PreferenceCounts(NamedTuple):
    """What happened while encoding a file, to be reported."""

    truncated: int
    skipped: int
    identical: int  # pairs of two equal rows, maybe only since they were cut; nothing is learnt from them
    split_differently: int  # not the ids of the whole text, since tokens would span the end of the prompt or of a step


def pair_length(pair: Pair) -> int:
    """The length of the longer row: the `key` of micro_batches, since both rows go through one forward."""
    return max(len(pair.chosen.input_ids), len(pair.rejected.input_ids))


# -------------------------------------------------------------------------------------------- pairs


def encode_pair_file(
    path: Path, tokenizer: Tokenizer, *, vocab_size: int, max_seq_len: int, overlong: str
) -> tuple[list[Pair], PreferenceCounts]:
    """All records of a file, see encode_pair_record, as pairs of rows of at most max_seq_len tokens.

    overlong: refuse (ValueError), skip, or truncate (see the top of this file).
    """

    def cut(pair: Pair) -> Pair | None:
        if pair.prompt_length >= max_seq_len:
            return None
        sides = [
            Example(side.input_ids[:max_seq_len], side.labels[:max_seq_len]) for side in (pair.chosen, pair.rejected)
        ]
        return Pair(pair.prompt_length, *sides, pair.margin)

    def ids_of(pair: Pair) -> list[list[int]]:
        return [pair.chosen.input_ids, pair.rejected.input_ids]

    limits = {"vocab_size": vocab_size, "max_seq_len": max_seq_len, "overlong": overlong}
    pairs, counts = _encode_file(path, lambda record: encode_pair_record(record, tokenizer), ids_of, cut, **limits)
    identical = sum(pair.chosen.input_ids == pair.rejected.input_ids for pair in pairs)
    if identical == len(pairs):
        raise ValueError(f"{path}: chosen and rejected are the same in every record, so there is nothing to learn")
    return pairs, counts._replace(identical=identical)


def encode_pair_record(record: Record, tokenizer: Tokenizer) -> tuple[Pair, bool]:
    """(pair, whether a side is not split into the tokens of its whole text).

    `prompt`, `chosen`, `rejected`, each text or a list of chat messages, and maybe `margin`. Where chosen and rejected
    are message lists, the prompt may be missing, or be the text of one of its messages: it is the messages that both
    begin with. Raises ValueError with the record's place.
    """
    with naming(record):
        prompt, chosen, rejected = _prompt_and_sides(record)
        margin = record.fields.get("margin")
        if margin is not None:
            margin = _number("margin", margin)
        chosen, chosen_differs = encode_answer(prompt, chosen, tokenizer, "chosen")
        rejected, rejected_differs = encode_answer(prompt, rejected, tokenizer, "rejected")
        prompt_length = len(encode_prompt(prompt, tokenizer))
        assert chosen.input_ids[:prompt_length] == rejected.input_ids[:prompt_length]
        return Pair(prompt_length, chosen, rejected, margin), chosen_differs or rejected_differs


def _prompt_and_sides(record: Record) -> tuple[str | list[dict], str | list[dict], str | list[dict]]:
    chosen, rejected = get_field(record, "chosen"), get_field(record, "rejected")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        require(isinstance(side, str | list), f"{name} must be text or a list of messages, not a {type(side).__name__}")
    require(type(chosen) is type(rejected), "of chosen and rejected one is text, the other a list of messages")
    has_prompt = "prompt" in record.fields or "input" in record.fields
    prompt = get_prompt(record) if has_prompt or isinstance(chosen, str) else None
    if isinstance(chosen, str):
        return prompt, chosen, rejected
    if isinstance(prompt, list):  # maybe said again at the beginning of both sides
        whole = prompt and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt
        return (prompt, chosen[len(prompt) :], rejected[len(prompt) :]) if whole else (prompt, chosen, rejected)
    most = min(len(chosen), len(rejected)) - 1  # an answer has a message at least
    num_shared = next((i for i in range(most) if chosen[i] != rejected[i]), max(0, most))
    shared = chosen[:num_shared]
    require(shared, "there is no prompt: chosen and rejected begin with different messages")
    require(
        prompt is None or any(isinstance(message, dict) and message.get("content") == prompt for message in shared),
        "prompt is none of the messages that chosen and rejected both begin with; correct it or leave it out",
    )
    return shared, chosen[num_shared:], rejected[num_shared:]


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
    ids = tokenizer.encode(_text_of(prompt, tokenizer) + text, add_special_tokens=False)
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + tokenizer.encode(text, add_special_tokens=False)
    return ids


# ------------------------------------------------------------------ labelled completions and steps


def encode_scored_file(
    path: Path,
    tokenizer: Tokenizer,
    *,
    kind: str,
    step_separator: str = "\n",
    vocab_size: int,
    max_seq_len: int,
    overlong: str,
) -> tuple[list[Scored], PreferenceCounts]:
    """All records of a file as rows of at most max_seq_len tokens.

    kind: pointwise, see encode_pointwise_record, or process, see encode_process_record.
    overlong: refuse (ValueError), skip, or truncate (see the top of this file).
    """
    assert kind in ("pointwise", "process")

    def encode(record: Record) -> tuple[Scored, bool]:
        if kind == "pointwise":
            return encode_pointwise_record(record, tokenizer)
        return encode_process_record(record, step_separator, tokenizer)

    cut = cut_completion if kind == "pointwise" else cut_steps
    limits = {"vocab_size": vocab_size, "max_seq_len": max_seq_len, "overlong": overlong}
    return _encode_file(path, encode, lambda row: [row.input_ids], lambda row: cut(row, max_seq_len), **limits)


def cut_completion(row: Scored, max_seq_len: int) -> Scored | None:
    """The beginning of a longer row, with its score on the last token; None if no token of the completion is left."""
    if row.prompt_length >= max_seq_len:
        return None
    return Scored(row.input_ids[:max_seq_len], [max_seq_len - 1], row.labels, row.prompt_length)


def cut_steps(row: Scored, max_seq_len: int) -> Scored | None:
    """The whole steps of a longer row that fit; None if none does."""
    whole = sum(position < max_seq_len for position in row.positions)
    if not whole:
        return None
    ids = row.input_ids[: row.positions[whole - 1] + 1]
    return Scored(ids, row.positions[:whole], row.labels[:whole], row.prompt_length)


def encode_pointwise_record(record: Record, tokenizer: Tokenizer) -> tuple[Scored, bool]:
    """(row with its label on the last token, EOS or the end of the turn; whether it is not split into the tokens of its
    whole text) of a record with `prompt`, `completion` and `label`: 0, 1, true, false or a probability."""
    with naming(record):
        prompt, completion = get_prompt(record), get_field(record, "completion", "output")
        label = _label("label", get_field(record, "label"))
        row, differs = encode_answer(prompt, completion, tokenizer)
        prompt_length = len(encode_prompt(prompt, tokenizer))
        return Scored(row.input_ids, [len(row.input_ids) - 1], [label], prompt_length), differs


def encode_process_record(record: Record, step_separator: str, tokenizer: Tokenizer) -> tuple[Scored, bool]:
    """(row with a label on the last token of each step, see encode_steps; whether it is not split into the tokens of
    its whole text) of a record with `prompt`, `completions`, a list of steps, and `labels`, one for each step."""
    with naming(record):
        prompt, steps, labels = get_prompt(record), get_steps(record), get_field(record, "labels")
        require(isinstance(labels, list), f"labels must be a list, one for each step, not a {type(labels).__name__}")
        require(len(labels) == len(steps), f"{len(steps)} completions but {len(labels)} labels: one is needed for each")
        labels = [_label(f"labels[{i}]", label) for i, label in enumerate(labels)]
        ids, positions = encode_steps(prompt, steps, step_separator, tokenizer)
        text = _text_of(prompt, tokenizer) + "".join(step + step_separator for step in steps)
        whole = encode_text(text, tokenizer) if isinstance(prompt, str) else tokenizer.encode(text, False)
        return Scored(ids, positions, labels, len(encode_prompt(prompt, tokenizer))), ids != whole


def get_steps(record: Record) -> list[str]:
    """The record's `completions`: at least one step, each of them text."""
    steps = get_field(record, "completions")
    require(isinstance(steps, list), f"completions must be a list of steps, not a {type(steps).__name__}")
    require(steps, "completions holds no step")
    for i, step in enumerate(steps):
        require(isinstance(step, str), f"completions[{i}] must be text, not a {type(step).__name__}")
        require(step.strip(), f"completions[{i}] is an empty step")
    return steps


def split_steps(text: str, separator: str) -> list[str]:
    """The steps of a text: it is cut after each separator that ends something, so that the steps, each followed by the
    separator, are the text again. A last step without a separator counts, white space after the last step does not, and
    blank parts before a step belong to it. A text of white space alone is one empty step."""
    steps, blank = [], ""
    for part in text.split(separator):
        if part.strip():
            steps.append(blank + part)
            blank = ""
        else:
            blank += part + separator
    return steps or [""]


def encode_steps(
    prompt: str | list[dict], steps: list[str], separator: str, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """(ids, the position of each step's score): the ids of the prompt, then of each step followed by the separator; a
    step's position is that of the last token of both, no EOS comes at the end.

    No token holds text of two steps, or of the prompt and a step: a step's ids are those that follow its predecessor's
    (the first one's: the prompt's) when both are encoded together, so a sentencepiece tokenizer puts no space before
    it; where a token would span the boundary, the step is encoded alone. So encode_steps(prompt, steps[:k], ...) is the
    beginning of encode_steps(prompt, steps, ...), and positions[:k] are the same.
    """
    ids, positions, before = encode_prompt(prompt, tokenizer), [], _text_of(prompt, tokenizer)
    for i, step in enumerate(steps):
        text = step + separator
        context = tokenizer.encode(before, add_special_tokens=False)
        both = tokenizer.encode(before + text, add_special_tokens=False)
        if both[: len(context)] == context:
            added = both[len(context) :]
        else:
            added = tokenizer.encode(text, add_special_tokens=False)
        require(added, f"step {i} with its separator has no token, so there is no place for its score")
        ids += added
        positions.append(len(ids) - 1)
        before = text
    return ids, positions


def _text_of(prompt: str | list[dict], tokenizer: Tokenizer) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, add_generation_prompt=True)


def _number(name: str, value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    finite = is_number and abs(value) <= torch.finfo(torch.float32).max  # false for NaN
    require(finite, f"{name} must be a finite number, not {ascii(value)[:60]}")
    return float(value)


def _label(name: str, value: object) -> float:
    label = float(value) if isinstance(value, bool) else _number(name, value)
    require(0 <= label <= 1, f"{name} must be 0, 1 or a probability between them, not {ascii(value)[:60]}")
    return label


# ------------------------------------------------------------------------------ answers to be scored


def is_sample(record: Record) -> bool:
    """Whether generate.py wrote it: then `output` is what was said, whatever fields the prompt's record had."""
    return "finish_reason" in record.fields


def is_pair(record: Record) -> bool:
    fields = record.fields
    answered = is_sample(record) or "completion" in fields or "completions" in fields or "output" in fields
    return not answered and ("chosen" in fields or "rejected" in fields)


def encode_to_score(record: Record, separator: str | None, tokenizer: Tokenizer) -> list[Scored]:
    """The rows of a record without labels, as in training: one, or chosen and rejected of a pair.

    separator: None scores an answer on its last token, EOS if it was finished; else what ends a step, and each step of
    `completions`, or of the text of a completion (see split_steps), is scored. Raises ValueError with the record's
    place.
    """
    with naming(record):
        if is_pair(record):
            require(separator is None, "a pair, and this process model scores the steps of completions")
            pair, _ = encode_pair_record(record, tokenizer)
            sides = (pair.chosen.input_ids, pair.rejected.input_ids)
            return [Scored(ids, [len(ids) - 1], [], pair.prompt_length) for ids in sides]
        prompt, answer = get_prompt(record), get_answer(record, steps=separator is not None)
        if separator is not None:
            steps = split_steps(answer, separator) if isinstance(answer, str) else answer
            ids, positions = encode_steps(prompt, steps, separator, tokenizer)
        elif is_sample(record) and record.fields["finish_reason"] == "length":
            ids = encode_unfinished(prompt, answer, tokenizer)
            positions = [len(ids) - 1]
        else:
            ids = encode_answer(prompt, answer, tokenizer)[0].input_ids
            positions = [len(ids) - 1]
        require(ids, "has no tokens, so there is no place for a score")
        return [Scored(ids, positions, [], len(encode_prompt(prompt, tokenizer)))]


def get_answer(record: Record, *, steps: bool) -> str | list:
    """What the record says to its prompt: text, or a list of messages; where steps are scored, text or a list of
    them."""
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


# -------------------------------------------------------------------------------- files and batches

Row = TypeVar("Row", Pair, Scored)


def _encode_file(
    path: Path,
    encode: Callable[[Record], tuple[Row, bool]],
    ids_of: Callable[[Row], list[list[int]]],
    cut: Callable[[Row], Row | None],
    *,
    vocab_size: int,
    max_seq_len: int,
    overlong: str,
) -> tuple[list[Row], PreferenceCounts]:
    rows, truncated, skipped, split_differently = [], 0, 0, 0
    for record in tokenising(path):
        row, differs = encode(record)
        split_differently += differs
        for ids in ids_of(row):
            check_ids(ids, vocab_size, record.where)
        longest = max(map(len, ids_of(row)))
        if longest > max_seq_len:
            if overlong == "refuse":
                raise ValueError(
                    f"{record.where}: {longest} tokens, the limit is {max_seq_len}; raise --max_seq_len or choose "
                    "--overlong skip or truncate"
                )
            row = cut(row) if overlong == "truncate" else None
            if row is None:
                skipped += 1
                continue
            truncated += 1
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no record is left: all {skipped} are too long for {max_seq_len} tokens")
    return rows, PreferenceCounts(truncated, skipped, 0, split_differently)


class PairBatch(NamedTuple):
    """One forward for B pairs: rows 0..B-1 are the chosen sides, rows B..2B-1 the rejected ones, in the same order, so
    `x.chunk(2)` parts them. On the device."""

    input_ids: Tensor  # int64 [2B, T]
    labels: Tensor  # int64 [2B, T], not shifted, IGNORE_INDEX off the completions
    last: Tensor  # int64 [2B], where each row's last token is
    margin: Tensor  # float32 [B], 0 where a record has none


def collate_pairs(pairs: list[Pair], pad_token_id: int, device: torch.device, multiple_of: int = 1) -> PairBatch:
    """Rows padded on the right to a multiple of `multiple_of`. No pairs give two rows of padding, of which nothing may
    count: sum losses[: len(pairs)], which is 0 and keeps the gradient's collectives."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rows = rows or [Example([pad_token_id] * 2, [IGNORE_INDEX] * 2) for _ in range(2)]
    batch = collate(rows, pad_token_id, device, multiple_of)
    last = torch.tensor([len(row.input_ids) - 1 for row in rows], device=device)
    margin = torch.tensor([pair.margin or 0.0 for pair in pairs] or [0.0], device=device)
    return PairBatch(batch.input_ids, batch.labels, last, margin)


class ScoredBatch(NamedTuple):
    """One forward for B rows with N labels in all, row by row: `scores[rows, positions]` belong to `labels`. On the
    device."""

    input_ids: Tensor  # int64 [B, T]
    rows: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    labels: Tensor  # float32 [N]


def collate_scored(
    examples: list[Scored], pad_token_id: int, device: torch.device, multiple_of: int = 1
) -> ScoredBatch:
    """Rows padded on the right to a multiple of `multiple_of`; no examples give one row of padding and N = 0."""
    unlabelled = [Example(example.input_ids, [IGNORE_INDEX] * len(example.input_ids)) for example in examples]
    rows = [i for i, example in enumerate(examples) for _ in example.positions]
    positions = [position for example in examples for position in example.positions]
    labels = [label for example in examples for label in example.labels]
    return ScoredBatch(
        collate(unlabelled, pad_token_id, device, multiple_of).input_ids,
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(positions, dtype=torch.int64, device=device),
        torch.tensor(labels, dtype=torch.float32, device=device),
    )
