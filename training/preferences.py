"""Turns preference records into rows of tokens: pairs (chosen, rejected), labelled completions, labelled steps.

- a completion is encoded as for supervised fine-tuning, and scored at the last token of its row, which is also the last
  token of a generated answer: models/records.py, models/reward.py
- both rows of a pair begin with the same prompt ids
- `--overlong truncate` cuts the end and adds no EOS, so that a cut answer is scored as PPO scores one that ran out of
  tokens; of labelled steps, only whole ones are kept. If no token of the completion (no whole step) is left, the record
  is skipped
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from models.record_files import Record, kind_of
from models.records import (
    Encoder,
    EncodingCounts,
    Example,
    Limits,
    encode_answer,
    encode_generated,
    encode_prompt,
    encode_sample,
    get_field,
    get_prompt,
    get_steps,
    is_sample,
    naming,
    require,
)
from models.reward import (
    Pair,
    Scored,
    cut_completion,
    cut_steps,
    encode_pair_record,
    encode_steps,
    finite_number,
    split_steps,
    without_separator,
)
from models.rows import IN_MEMORY, Rows, Store, encode_file
from models.tokenizer import Tokenizer


def encode_pair_file(
    path: Path,
    tokenizer: Tokenizer,
    limits: Limits,
    store: Store = IN_MEMORY,
    check: Callable[[Record], None] = lambda record: None,
) -> tuple[Rows, EncodingCounts]:
    """Encodes all records of a file as pairs of rows, see encode_pair_record. check(record) may raise a ValueError."""

    def encode(record: Record) -> tuple[Pair, EncodingCounts]:
        check(record)
        return encode_pair_record(record, tokenizer)

    def cut(pair: Pair) -> Pair | None:
        if pair.prompt_length >= limits.max_seq_len:
            return None
        part = slice(limits.max_seq_len)
        sides = [Example(side.input_ids[part], side.labels[part]) for side in (pair.chosen, pair.rejected)]
        return Pair(pair.prompt_length, *sides, pair.margin)

    pairs, counts = encode_file(path, Pair, 2, Encoder(encode, cut, limits), tokenizer, "pairs", store)
    _check_some_left(path, pairs, counts, limits)
    if counts.nothing_to_learn == len(pairs):
        raise ValueError(f"{path}: chosen and rejected are the same in every record, so there is nothing to learn")
    return pairs, counts


def _check_some_left(path: Path, rows: Rows, counts: EncodingCounts, limits: Limits) -> None:
    if not rows:
        raise ValueError(
            f"{path}: no record is left: all {counts.skipped} are too long for {limits.max_seq_len} tokens"
        )


def encode_scored_file(
    path: Path,
    tokenizer: Tokenizer,
    limits: Limits,
    store: Store = IN_MEMORY,
    check: Callable[[Record], None] = lambda record: None,
    *,
    kind: str,
    step_separator: str = "\n",
) -> tuple[Rows, EncodingCounts]:
    """Encodes all records of a file as rows, see encode_pointwise_record and encode_process_record. check(record) may
    raise a ValueError."""
    cut = partial(cut_completion if kind == "pointwise" else cut_steps, max_seq_len=limits.max_seq_len)

    def encode(record: Record) -> tuple[Scored, EncodingCounts]:
        check(record)
        if kind == "pointwise":
            return encode_pointwise_record(record, tokenizer)
        return encode_process_record(record, step_separator, tokenizer)

    what = kind if kind == "pointwise" else f"{kind} {step_separator}"
    rows, counts = encode_file(path, Scored, 1, Encoder(encode, cut, limits), tokenizer, what, store)
    _check_some_left(path, rows, counts, limits)
    return rows, counts


def encode_pointwise_record(record: Record, tokenizer: Tokenizer) -> tuple[Scored, EncodingCounts]:
    """Encodes a record with `prompt`, `completion` and `label` (0, 1, true, false or a probability). Returns (row with
    the label on its last token, EOS or the end of the turn; counts)."""
    with naming(record):
        label = _label("label", get_field(record, "label"))
        if is_sample(record):
            row, counts = encode_sample(record, tokenizer)
        else:
            completion = get_field(record, "completion", "output")
            row, counts = encode_answer(get_prompt(record), completion, tokenizer)
        return Scored(row.input_ids, [len(row.input_ids) - 1], [label], row.prompt_length), counts


def encode_process_record(record: Record, step_separator: str, tokenizer: Tokenizer) -> tuple[Scored, EncodingCounts]:
    """Encodes a record with `prompt`, `completions` (a list of steps) and `labels` (one for each step). Returns (row
    with a label on the last token of each step, see encode_steps; counts)."""
    with naming(record):
        prompt, steps, labels = get_prompt(record), get_steps(record), get_field(record, "labels")
        require(isinstance(labels, list), f"labels must be a list, one for each step, not {kind_of(labels)}")
        require(len(labels) == len(steps), f"{len(steps)} completions but {len(labels)} labels: one is needed for each")
        labels = [_label(f"labels[{i}]", label) for i, label in enumerate(labels)]
        steps = without_separator(steps, step_separator)
        ids, positions = encode_steps(prompt, steps, step_separator, tokenizer)
        text = "".join(step + step_separator for step in steps)
        counts = EncodingCounts(
            split_differently=int(ids != encode_generated(prompt, text, tokenizer, finished=False)),
            with_the_separator_inside_a_step=int(step_separator != "" and split_steps(text, step_separator) != steps),
        )
        return Scored(ids, positions, labels, len(encode_prompt(prompt, tokenizer))), counts


def _label(name: str, value: object) -> float:
    label = float(value) if isinstance(value, bool) else finite_number(name, value)
    require(0 <= label <= 1, f"{name} must be 0, 1 or a probability between them, not {ascii(value)[:60]}")
    return label
