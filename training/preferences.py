"""Records with a judgement to rows of tokens: pairs (chosen, rejected), labelled completions, labelled steps.

- a completion is encoded as for supervised fine-tuning, and a score sits on the last token of its row, which is the
  last token that generation gives: models/records.py, models/reward.py
- the two rows of a pair begin with the same prompt ids
- `--overlong truncate` cuts the end and puts no EOS after the cut, so a cut answer is scored as PPO scores one that ran
  out of tokens; of labelled steps only whole ones are kept. Where no token of the completion (no whole step) is left,
  the record is skipped
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from models.records import (
    EncodingCounts,
    Example,
    Limits,
    Record,
    encode_answer,
    encode_generated,
    encode_prompt,
    encode_records,
    get_field,
    get_prompt,
    get_steps,
    naming,
    require,
    tokenising,
)
from models.reward import Pair, Scored, cut_completion, cut_steps, encode_pair_record, encode_steps, finite_number
from models.tokenizer import Tokenizer


def encode_pair_file(path: Path, tokenizer: Tokenizer, limits: Limits) -> tuple[list[Pair], EncodingCounts]:
    """All records of a file as pairs of rows, see encode_pair_record."""

    def cut(pair: Pair) -> Pair | None:
        if pair.prompt_length >= limits.max_seq_len:
            return None
        part = slice(limits.max_seq_len)
        sides = [Example(side.input_ids[part], side.labels[part]) for side in (pair.chosen, pair.rejected)]
        return Pair(pair.prompt_length, *sides, pair.margin)

    def ids_of(pair: Pair) -> list[list[int]]:
        return [pair.chosen.input_ids, pair.rejected.input_ids]

    pairs, counts = _encode_file(path, partial(encode_pair_record, tokenizer=tokenizer), ids_of, cut, limits=limits)
    identical = sum(pair.chosen.input_ids == pair.rejected.input_ids for pair in pairs)
    if identical == len(pairs):
        raise ValueError(f"{path}: chosen and rejected are the same in every record, so there is nothing to learn")
    return pairs, counts._replace(nothing_to_learn=identical)


def _encode_file(path: Path, *functions: Callable, limits: Limits) -> tuple[list, EncodingCounts]:
    """encode_records of a file, with its encode, ids_of and cut; ValueError if no row is left."""
    rows, counts = encode_records(tokenising(path), *functions, limits)
    if not rows:
        raise ValueError(
            f"{path}: no record is left: all {counts.skipped} are too long for {limits.max_seq_len} tokens"
        )
    return rows, counts


def encode_scored_file(
    path: Path, tokenizer: Tokenizer, limits: Limits, *, kind: str, step_separator: str = "\n"
) -> tuple[list[Scored], EncodingCounts]:
    """All records of a file as rows, see encode_pointwise_record and encode_process_record."""
    assert kind in ("pointwise", "process")
    if kind == "pointwise":
        encode, cut = encode_pointwise_record, cut_completion
    else:
        encode, cut = partial(encode_process_record, step_separator=step_separator), cut_steps
    encode, cut = partial(encode, tokenizer=tokenizer), partial(cut, max_seq_len=limits.max_seq_len)
    return _encode_file(path, encode, lambda row: [row.input_ids], cut, limits=limits)


def encode_pointwise_record(record: Record, tokenizer: Tokenizer) -> tuple[Scored, EncodingCounts]:
    """(row with its label on the last token, EOS or the end of the turn; what happened) of a record with `prompt`,
    `completion` and `label`: 0, 1, true, false or a probability."""
    with naming(record):
        prompt, completion = get_prompt(record), get_field(record, "completion", "output")
        label = _label("label", get_field(record, "label"))
        row, counts = encode_answer(prompt, completion, tokenizer)
        return Scored(row.input_ids, [len(row.input_ids) - 1], [label], row.prompt_length), counts


def encode_process_record(record: Record, step_separator: str, tokenizer: Tokenizer) -> tuple[Scored, EncodingCounts]:
    """(row with a label on the last token of each step, see encode_steps; what happened) of a record with `prompt`,
    `completions`, a list of steps, and `labels`, one for each step."""
    with naming(record):
        prompt, steps, labels = get_prompt(record), get_steps(record), get_field(record, "labels")
        require(isinstance(labels, list), f"labels must be a list, one for each step, not a {type(labels).__name__}")
        require(len(labels) == len(steps), f"{len(steps)} completions but {len(labels)} labels: one is needed for each")
        labels = [_label(f"labels[{i}]", label) for i, label in enumerate(labels)]
        ids, positions = encode_steps(prompt, steps, step_separator, tokenizer)
        whole = encode_generated(prompt, "".join(step + step_separator for step in steps), tokenizer, finished=False)
        counts = EncodingCounts(split_differently=int(ids != whole))
        return Scored(ids, positions, labels, len(encode_prompt(prompt, tokenizer))), counts


def _label(name: str, value: object) -> float:
    label = float(value) if isinstance(value, bool) else finite_number(name, value)
    require(0 <= label <= 1, f"{name} must be 0, 1 or a probability between them, not {ascii(value)[:60]}")
    return label
