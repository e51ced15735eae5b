"""Reward models: the settings in their folder, the positions of their scores, and the scores of rows.

- an outcome model scores an answer at its last token, EOS if it was finished (but see place_of_score); a process model
  scores each step at the last token of the step with its separator
- the ids of a step depend only on the prompt and the steps up to it, so its score does not depend on later steps;
  training and scoring find the positions with the same function, encode_steps
"""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.batches import Split, micro_batches
from models.chats import Chat, read_chat, without_nulls
from models.checkpoint import WeightFiles
from models.config import read_hf_config
from models.forward import forward_rows
from models.model import Transformer
from models.parts import encode_continuation
from models.record_files import kind_of
from models.records import (
    IGNORE_INDEX,
    EncodingCounts,
    Example,
    Flat,
    Record,
    encode_answer,
    encode_prompt,
    encode_sample,
    get_answer,
    get_field,
    get_prompt,
    has_prompt,
    is_sample,
    naming,
    require,
    stated_prompt,
)
from models.sharing import shared_work
from models.tokenizer import Tokenizer
from models.transfer import index_on, to_device


class RewardKind(NamedTuple):
    """What a reward model's config.json says about its scores."""

    separator: str | None  # the text that ends a step; None for an outcome model
    mean: float | None
    std: float | None
    pad_token_id: int | None = None

    def can_normalize(self) -> bool:
        """Whether (score - mean) / std can be computed."""
        return self.mean is not None and self.std is not None and self.std > 0


def read_reward_kind(folder: Path, files: WeightFiles | None = None) -> RewardKind:
    """Reads a RewardKind; raises ValueError unless the folder holds a model with one score for each token. files: the
    folder's, if an adapter is combined with them."""
    files = files or WeightFiles(folder)
    config, where = files.config_of(read_hf_config(folder)), f"{folder}/config.json"
    if "score.weight" not in files.names():
        raise ValueError(
            f"{folder}: not a reward model, it has no score head (no score.weight); training/train_rm.py makes one"
        )
    if files.shape("score.weight")[0] != 1:
        raise ValueError(f"{folder}: num_labels is {files.shape('score.weight')[0]}; a reward model has one score")
    model_type, separator = config.get("reward_model_type"), None
    if model_type not in (None, "pairwise", "pointwise", "process"):
        raise ValueError(f"{where}: reward_model_type {model_type!r} is not pairwise, pointwise or process")
    if model_type == "process":
        separator = config.get("step_separator")
        if not isinstance(separator, str) or not separator:
            raise ValueError(f"{where}: step_separator must be the text that ends a step, not {separator!r}")
    mean, std, pad = config.get("reward_mean"), config.get("reward_std"), config.get("pad_token_id")
    for key, value in (("reward_mean", mean), ("reward_std", std)):
        if value is not None:
            finite_number(f"{where}: {key}", value)
    return RewardKind(separator, mean, std, pad if isinstance(pad, int) else None)


def scalar_head_config(hf_config: dict, pad_token_id: int) -> dict:
    """The config.json of a model of hf_config with a scalar head: it has the keys that transformers needs to find the
    last token and the single output, and none of those that describe an earlier reward model's scores."""
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[hf_config["model_type"]]
    others = ("reward_model_type", "reward_position", "reward_mean", "reward_std", "step_separator", "problem_type")
    return {name: value for name, value in hf_config.items() if name not in others} | {
        "architectures": [f"{family}ForSequenceClassification"],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_token_id,
    }


# -------------------------------------------------------------------------------------------- rows


@dataclass
class Pair:
    """Two rows that begin with the same prompt_length ids; later ids are learnt. margin: how much better the chosen
    answer is, in units of the reward; None if the record has none. reference: a frozen model's summed log-probs of the
    two completions; NaN until training/reference.py has computed them."""

    prompt_length: int
    chosen: Example
    rejected: Example
    margin: float | None = None
    reference: tuple[float, float] = (math.nan, math.nan)

    @property
    def sequences(self) -> list[Sequence[int]]:
        return [self.chosen.input_ids, self.rejected.input_ids]

    @property
    def nothing_to_learn(self) -> bool:
        return np.array_equal(*self.sequences)

    def flat(self) -> Flat:
        sides = [(side.input_ids, side.labels) for side in (self.chosen, self.rejected)]
        return Flat(sides, self.prompt_length, () if self.margin is None else (self.margin,))

    @classmethod
    def from_flat(cls, flat: Flat) -> "Pair":
        return cls(flat.prompt_length, *(Example(*side) for side in flat.sequences), *flat.values)


@dataclass(eq=False)
class Scored:
    """A row whose score at each of `positions` (ascending) should be the logit of its label, which is in [0, 1]."""

    input_ids: Sequence[int]
    positions: list[int]
    labels: list[float]
    prompt_length: int = 0
    nothing_to_learn = False

    @property
    def sequences(self) -> list[Sequence[int]]:
        return [self.input_ids]

    def flat(self) -> Flat:
        marks = [IGNORE_INDEX] * len(self.input_ids)
        for position in self.positions:
            marks[position] = self.input_ids[position]
        return Flat([(self.input_ids, marks)], self.prompt_length, self.labels)

    @classmethod
    def from_flat(cls, flat: Flat) -> "Scored":
        [(ids, marks)] = flat.sequences
        return cls(ids, np.flatnonzero(marks != IGNORE_INDEX).tolist(), list(flat.values), flat.prompt_length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scored) and all(map(np.array_equal, vars(self).values(), vars(other).values()))


def pair_rows(pairs: list[Pair]) -> list[Example]:
    """The rows of one forward: all chosen sides, then the rejected ones in the same order, so that `x.view(2, -1)`
    separates their results."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def sides_are_equal(pairs: list[Pair], device: torch.device) -> Tensor:
    """Whether chosen and rejected of each pair have the same ids, bool [B]. Then their results differ only by rounding,
    which depends on their places in the forward, and the sign of a margin would be noise."""
    return to_device([pair.nothing_to_learn for pair in pairs], device, torch.bool)


def encode_pair_record(record: Record, tokenizer: Tokenizer) -> tuple[Pair, EncodingCounts]:
    """(pair, counts, each the larger of the two sides')

    The record has `prompt`, `chosen` and `rejected`, each text or a list of chat messages, and maybe `margin`. Where
    chosen and rejected are message lists, `prompt` may be missing, or be the text of a message that both begin with:
    the prompt is then all messages that both begin with. Raises ValueError with the record's place.
    """
    with naming(record):
        prompt, chosen, rejected = _prompt_and_sides(record)
        margin = record.fields.get("margin")
        if margin is not None:
            margin = finite_number("margin", margin)
        chosen, counts = encode_answer(prompt, chosen, tokenizer, "chosen")
        rejected, others = encode_answer(prompt, rejected, tokenizer, "rejected")
        prompt_length = min(chosen.prompt_length, rejected.prompt_length)
        same = chosen.input_ids[:prompt_length] == rejected.input_ids[:prompt_length]
        require(same, "the chat template writes the prompt differently before chosen and before rejected")
        return Pair(prompt_length, chosen, rejected, margin), EncodingCounts(*map(max, zip(counts, others)))


def _prompt_and_sides(record: Record) -> tuple[str | Chat, str | list[dict], str | list[dict]]:
    chosen, rejected = get_field(record, "chosen"), get_field(record, "rejected")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        require(isinstance(side, str | list), f"{name} must be text or a list of messages, not {kind_of(side)}")
    require(type(chosen) is type(rejected), "chosen and rejected must both be text, or both be lists of messages")
    if isinstance(chosen, str):
        return get_prompt(record), chosen, rejected
    prompt = stated_prompt(record) if has_prompt(record) else None
    if not isinstance(prompt, str | None):  # both sides may begin with it, too
        chat = get_prompt(record)
        begins = [list(map(_given, side[: len(prompt)])) for side in (chosen, rejected, prompt)]
        repeated = len(prompt) if begins[0] == begins[1] == begins[2] else 0
        return chat, chosen[repeated:], rejected[repeated:]
    most = min(len(chosen), len(rejected)) - 1  # an answer has at least one message
    num_shared = next((i for i in range(most) if _given(chosen[i]) != _given(rejected[i])), max(0, most))
    shared = chosen[:num_shared]
    missing = "there is no prompt" if prompt is None else "prompt is text, which must be a list of messages here"
    require(shared, f"{missing}: chosen and rejected begin with different messages")
    require(
        prompt is None or any(isinstance(message, dict) and message.get("content") == prompt for message in shared),
        "prompt is none of the messages that chosen and rejected both begin with; correct it or leave it out",
    )
    return read_chat(shared, record.fields, "chosen"), chosen[num_shared:], rejected[num_shared:]


def _given(message: object) -> object:
    """A message without its empty keys: where columns have types, each message has the keys of all others, and each
    object within it, such as a call's arguments, has them as nulls."""
    given = without_nulls(message)
    return {k: v for k, v in given.items() if v not in ("", [])} if isinstance(given, dict) else given


def place_of_score(ids: Sequence[int], pad_token_id: int | None) -> int:
    """The position of an outcome model's score in a row: the last token that is not config.json's pad, where
    transformers reads it. This project's reward models have a pad that ends no row; others that pad with EOS, as TRL
    does for tokenizers without a pad, were trained, and are read, at the token before EOS."""
    return next((i for i in range(len(ids) - 1, 0, -1) if ids[i] != pad_token_id), 0)


def cut_completion(row: Scored, max_seq_len: int, pad_token_id: int | None = None) -> Scored | None:
    """Truncates a longer row, with its score at the new end; None if no token of the completion is left."""
    if row.prompt_length >= max_seq_len:
        return None
    ids = row.input_ids[:max_seq_len]
    return Scored(ids, [place_of_score(ids, pad_token_id)], row.labels, row.prompt_length)


def cut_steps(row: Scored, max_seq_len: int) -> Scored | None:
    """Truncates a longer row to the whole steps that fit; None if none does."""
    whole = sum(position < max_seq_len for position in row.positions)
    if not whole:
        return None
    ids = row.input_ids[: row.positions[whole - 1] + 1]
    return Scored(ids, row.positions[:whole], row.labels[:whole], row.prompt_length)


def split_steps(text: str, separator: str) -> list[str]:
    """The steps of a text, which is cut after each separator that follows text, so that the steps, each followed by the
    separator, join to the text again. A last step without a separator counts, white space after the last step does not,
    and blank parts before a step belong to it. A text of white space alone is one empty step."""
    steps, blank = [], ""
    for part in text.split(separator):
        if part.strip():
            steps.append(blank + part)
            blank = ""
        else:
            blank += part + separator
    return steps or [""]


def without_separator(steps: list[str], separator: str) -> list[str]:
    """The steps of a record without the separator, which some may end with already: encode_steps adds one to each, as
    to the steps of split_steps."""
    return [step.removesuffix(separator) for step in steps]


def encode_steps(
    prompt: str | Chat, steps: list[str], separator: str, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """(ids, the position of each step's score): the ids of the prompt, then of each step followed by the separator, and
    no EOS; a step's score is at the last token of step and separator.

    No token holds text of two steps, or of the prompt and a step: a step is encoded as a continuation of the ids before
    it, so a sentencepiece tokenizer puts no space before it. So encode_steps(prompt, steps[:k], ...) is the beginning
    of encode_steps(prompt, steps, ...), and positions[:k] are the same.
    """
    ids, positions = encode_prompt(prompt, tokenizer), []
    for i, step in enumerate(steps):
        added = encode_continuation(step + separator, ids, tokenizer)
        require(added, f"step {i} with its separator has no token, so there is no place for its score")
        ids = ids + added
        positions.append(len(ids) - 1)
    return ids, positions


def finite_number(name: str, value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    finite = is_number and abs(value) <= torch.finfo(torch.float32).max  # false for NaN
    require(finite, f"{name} must be a finite number, not {ascii(value)[:60]}")
    return float(value)


def is_pair(record: Record) -> bool:
    answered = record.given.keys() & {"completion", "completions", "output"}
    return not answered and not record.given.keys().isdisjoint({"chosen", "rejected"})


def encode_to_score(
    record: Record, separator: str | None, tokenizer: Tokenizer, pad_token_id: int | None = None
) -> tuple[list[Scored], EncodingCounts]:
    """(rows of a record, encoded as in training but without labels: one, or chosen and rejected of a pair; counts)

    separator: None scores an answer at its end, see place_of_score; otherwise the text that ends a step, and each step
    of `completions`, or of the text of a completion (see split_steps), is scored. Raises ValueError with the record's
    place.
    """
    with naming(record):
        if is_pair(record):
            require(separator is None, "is a pair, but this process model scores the steps of completions")
            pair, counts = encode_pair_record(record, tokenizer)
            sides = (pair.chosen.input_ids, pair.rejected.input_ids)
            return [Scored(ids, [place_of_score(ids, pad_token_id)], [], pair.prompt_length) for ids in sides], counts
        prompt, answer = get_prompt(record), get_answer(record, steps=separator is not None)
        counts = EncodingCounts()
        if separator is not None:
            steps = split_steps(answer, separator) if isinstance(answer, str) else without_separator(answer, separator)
            ids, positions = encode_steps(prompt, steps, separator, tokenizer)
        else:
            if is_sample(record):
                row, _ = encode_sample(record, tokenizer)
            else:
                row, counts = encode_answer(prompt, answer, tokenizer)
            ids = row.input_ids
            positions = [place_of_score(ids, pad_token_id)]
        require(ids, "has no tokens, so there is no place for a score")
        return [Scored(ids, positions, [], len(encode_prompt(prompt, tokenizer)))], counts


# ------------------------------------------------------------------------------------------ scores


def rows_to_score(judged: list[Pair] | list[Scored]) -> tuple[list[Example], list[tuple[int, int]]]:
    """(the rows of one forward, the places of their scores for Forward.at): the last tokens of each pair's chosen and
    rejected, or all positions of scored rows."""
    if judged and isinstance(judged[0], Pair):
        rows, count = pair_rows(judged), len(judged)
        return rows, [(i, len(rows[i].input_ids) - 1) for j in range(count) for i in (j, count + j)]
    rows = [Example(row.input_ids, [IGNORE_INDEX] * len(row.input_ids)) for row in judged]
    return rows, [(i, position) for i, row in enumerate(judged) for position in row.positions]


def distinct(rows: list[Scored]) -> tuple[list[Scored], list[int]]:
    """(the rows without repetitions, the number of each row there)"""
    places_of = {}
    keys = [(hashlib.sha256(np.asarray(row.input_ids, np.int64)).digest(), *row.positions) for row in rows]
    which = [places_of.setdefault(key, len(places_of)) for key in keys]
    return list(dict(zip(which, rows)).values()), which


def step_scores(
    model: Transformer, rows: list[Scored], split: Split, bar: tqdm | None = None, *, taken: bool = False
) -> list[list[float]]:
    """The scores at each row's positions, the same on all ranks, which share the rows. A collective. bar: shows tokens.
    Equal rows are computed once: beside other rows the scores may differ in their last bits, of which GRPO makes whole
    advantages, since it divides by the group's deviation.

    taken: a replica takes the next batch when it has finished one. Not for a model sharded by FSDP, whose replicas must
    all have the same number of batches.
    """
    device = model.inv_freq.device
    rows, which = distinct(rows)
    counts = Counter(which)
    first = list(itertools.accumulate((len(row.positions) for row in rows), initial=0))
    scores = torch.zeros(first[-1], device=device)
    lengths = [len(row.input_ids) for row in rows]
    with torch.no_grad():
        for group in _taken(lengths, split) if taken else split.numbers(rows):
            examples, places = rows_to_score([rows[i] for i in group])
            found = model.score(forward_rows(model, examples, split).at(places))
            places_of_scores = [first[i] + j for i in group for j in range(len(rows[i].positions))]
            scores.index_copy_(0, index_on(places_of_scores, device), found)
            if bar is not None:
                num_tokens = sum(counts[i] * lengths[i] for i in group)
                bar.update(min(bar.total - bar.n, split.dp.size() * num_tokens))
    # one rank computed each score; the others have 0 there. On the CPU: score.py would start NCCL for these numbers
    values = split.sum(scores.cpu()).tolist()
    return [values[first[i] : first[i + 1]] for i in which]


def _taken(lengths: list[int], split: Split) -> Iterator[list[int]]:
    """The numbers of rows of similar length in batches that this replica takes, the longest first."""
    batches = list(micro_batches(list(range(len(lengths))), split.micro_batch_size, lengths.__getitem__))[::-1]
    work = shared_work("scores", [1] * len(batches), split.dp, most=1)
    for taken in work:
        for i in taken:
            yield batches[i]
    work.close()


def aggregate(step_scores: list[float], how: str) -> float:
    """One number for the steps of an answer: the minimum, product, last or mean of their probabilities, which are
    sigmoid(score) (Lightman et al. 2023, arXiv 2305.20050; Sun et al. 2024, Easy-to-Hard, 2403.09472)."""
    probs = torch.tensor(step_scores, dtype=torch.float64).sigmoid()
    return {"min": probs.min, "prod": probs.prod, "last": lambda: probs[-1], "mean": probs.mean}[how]().item()


def sigmoid(reward: float) -> float:
    return 1 / (1 + math.exp(-reward)) if reward > 0 else math.exp(reward) / (1 + math.exp(reward))


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The probability that of k samples, drawn from num_samples without replacement, at least one is right:
    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), in exact integers."""
    if not 0 <= num_right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples, {num_right} of them right, is not defined")
    wrong = math.comb(num_samples - num_right, k)  # 0 where fewer than k are wrong
    all_sets = math.comb(num_samples, k)
    return (all_sets - wrong) / all_sets
