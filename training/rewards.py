"""Where the scores of answers come from: a reward model's folder, a Python function in a file, or both.

- a reward model with the policy's tokenizer reads the very ids that were drawn; one with another tokenizer reads the
  text, encoded as its own training did
- a process reward model scores every step; its numbers go to the steps' last tokens or, aggregated, to the answer's end
- a reward function sees texts and whole records, and what it returns is checked

Dimensions: A answers, R tokens of the longest answer.
"""

import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from models.chats import Chat
from models.checkpoint import Folder, open_folder
from models.common import Bounds, flag, is_main_rank, load_function, non_negative, positive, short
from models.model import Transformer
from models.records import Example, Split, encode_generated
from models.reward import (
    RewardKind,
    Scored,
    aggregate,
    encode_steps,
    read_reward_kind,
    sigmoid,
    split_steps,
    step_scores,
)
from models.tokenizer import StreamDecoder, Tokenizer
from training.prompts import Prompt

RewardFunction = Callable[[list[str], list[str], list[dict]], list[float]]
finite = Bounds(least=-1e9, most=1e9)


@dataclass(frozen=True, kw_only=True)
class RewardArgs:
    """Where the scores of answers come from."""

    reward_checkpoint_path: Path | None = flag(None, help="folder of a reward model")
    reward_fn: str | None = flag(
        None, help="FILE.py:NAME, a function (prompts, completions, examples) -> list of numbers"
    )
    reward_model_weight: float = flag(1.0, bounds=finite, help="what the reward model's scores are multiplied by")
    reward_fn_weight: float = flag(1.0, bounds=finite, help="what the function's numbers are multiplied by")
    normalize_reward: bool = flag(False, help="scores less reward_mean, by reward_std of the folder")
    process_reward: str = flag(
        "min",
        choices=("min", "prod", "last", "mean", "steps"),
        help="of a process reward model: one of the steps' probabilities at the end, or each at its step's last token",
    )
    missing_eos_penalty: float | None = flag(None, bounds=positive, help="subtracted where an answer has no end; none")
    length_penalty: float = flag(0.0, bounds=non_negative, help="subtracted for each token of an answer")
    quantize_reward: str = flag(
        "none", choices=("none", "int8", "int4"), help="round the weights of the reward model, replicated over dp"
    )


def load_reward_function(place: str) -> RewardFunction:
    """The function that --reward_fn names; see load_function. Raises ValueError also for other parameters."""
    function = load_function("--reward_fn", place)
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError:
        raise ValueError(
            f"--reward_fn {place}: {place.rpartition(':')[2]} must take (prompts, completions, examples), it takes "
            f"{inspect.signature(function)}"
        ) from None
    except ValueError:  # a built-in without a signature
        pass
    return function


def call_reward_function(
    function: RewardFunction, prompts: list[str], completions: list[str], examples: list[dict]
) -> list[float]:
    """One finite number for each completion, in order; ValueError if the function fails or returns anything else."""
    name = getattr(function, "__name__", "the reward function")
    try:
        rewards = function(list(prompts), list(completions), [dict(example) for example in examples])
        rewards = list(rewards) if isinstance(rewards, Iterator) else rewards
    except (Exception, SystemExit) as error:  # somebody's code may raise anything, a generator's while it is read
        raise ValueError(f"--reward_fn: {name} raised {short(error)}") from error
    try:
        if isinstance(rewards, str | dict):
            raise TypeError(f"it is a {type(rewards).__name__}")
        rewards = [float(reward) for reward in rewards]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"--reward_fn: {name} must return a list of numbers: {short(error)}") from None
    if len(rewards) != len(completions):
        raise ValueError(f"--reward_fn: {name} returned {len(rewards)} rewards for {len(completions)} completions")
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"--reward_fn: {name} returned {reward} for the completion {completions[i][:80]!r}")
    return rewards


class RewardFolder(NamedTuple):
    """A reward model's folder, beside that of the policy whose answers it scores."""

    folder: Folder
    same_tokenizer: bool  # as the policy's: it can read the policy's ids
    kind: RewardKind


def open_reward_folder(path: Path, policy: Folder, tensor_parallel_size: int) -> RewardFolder:
    """Raises ValueError if the folder holds no scalar head, or cannot be cut over so many ranks."""
    today = policy.tokenizer.today
    folder = open_folder(path, None, tensor_parallel_size, frozen=True, today=today)
    same_size = folder.config.vocab_size == policy.config.vocab_size  # any id can be drawn
    same_tokenizer = same_size and _text_to_ids(path) == _text_to_ids(policy.path)
    return RewardFolder(folder, same_tokenizer, read_reward_kind(path))


def _text_to_ids(folder: Path) -> dict[str, object]:
    """What decides how text becomes ids. Not padding: a reward model's pad token may be its own."""
    names = ("tokenizer.model", "tokenizer.json", "added_tokens.json")
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if b'"padding"' in files.get("tokenizer.json", b""):
        files["tokenizer.json"] = {**json.loads(files["tokenizer.json"]), "padding": None}
    return files


def rows_to_score(
    reward: RewardFolder, prompts: list[str | Chat], rows: list[Example], texts: list[str], finished: list[bool]
) -> tuple[list[Scored], int]:
    """(what the reward model reads of each answer: its row and the places of its scores; how many rows are cut since
    they are too long for the model). An answer that ran out of tokens has no EOS.

    prompts: as the records have them; rows: the policy's, prompt and answer; texts: the answers' alone.
    """
    to_score, num_cut = [], 0
    tokenizer, separator, max_seq_len = reward.folder.tokenizer, reward.kind.separator, reward.folder.max_seq_len
    for prompt, row, text, ended in zip(prompts, rows, texts, finished, strict=True):
        ends_of_steps = []
        if separator is not None:
            ids, ends_of_steps = encode_steps(prompt, split_steps(text, separator), separator, tokenizer)
        elif reward.same_tokenizer:
            ids = row.input_ids
        else:
            ids = encode_generated(prompt, text, tokenizer, finished=ended)
        num_cut += len(ids) > max_seq_len
        positions = [end for end in ends_of_steps if end < max_seq_len] or [min(len(ids), max_seq_len) - 1]
        to_score.append(Scored(ids[: positions[-1] + 1], positions, []))
    return to_score, num_cut


def place_of_steps(text: str, separator: str, prompt: Prompt, row: Example, tokenizer: Tokenizer) -> list[int]:
    """The token of an answer, counted from 0, that ends each of split_steps(text, separator): the first with which the
    text so far holds the whole step."""
    stream = StreamDecoder(tokenizer, prompt.ids)
    characters = (len(stream.push(token)) for token in row.input_ids[len(prompt.ids) :])
    lengths = list(itertools.accumulate(characters))  # of the text that the first 1, 2, ... tokens have completed
    places, end = [], 0
    for step in split_steps(text, separator):
        end = min(end + len(step) + len(separator), len(text))
        places.append(next((i for i, length in enumerate(lengths) if length >= end), len(lengths) - 1))
    return places


class Scores(NamedTuple):
    total: Tensor
    step_rewards: Tensor
    num_cut: int
    sources: dict
    failures: dict

    @property
    def metrics(self):
        return source_metrics([self])

    @property
    def checked(self) -> Tensor | None:
        """What the first reward function gave, [A]; None without one."""
        return next((values for name, values in self.sources.items() if name != "reward_model"), None)


def source_metrics(scores: list[Scores]) -> dict[str, float]:
    metrics = {}
    for name in scores[0].sources:
        x = torch.cat([each.sources[name] for each in scores])
        metrics |= {f"rewards/{name}/mean": x.mean().item(), f"rewards/{name}/std": x.std().item()}
    return metrics


class Scorer(NamedTuple):
    """What gives answers their scores. folder and model go together; so do they and the function, each may be None."""

    args: RewardArgs
    tokenizer: Tokenizer  # the policy's
    folder: RewardFolder | None
    model: Transformer | None
    function: RewardFunction | None
    split: Split

    def score(self, prompts: list[Prompt], rows: list[Example], texts: list[str], finished: list[bool]) -> Scores:
        """(scores [A], process rewards [A, R] of their own tokens, both fp32; rows that were cut for the reward model),
        the same on all ranks. A collective.

        rows: the policy's, prompt and answer with labels on the answer; texts, finished: of the answers.
        """
        args, scores, num_cut = self.args, torch.zeros(len(rows)), 0
        step_rewards = torch.zeros(len(rows), max(row.num_targets for row in rows))
        if self.folder is not None:
            kind, weight = self.folder.kind, args.reward_model_weight
            asked = [prompt.asked for prompt in prompts]
            to_score, num_cut = rows_to_score(self.folder, asked, rows, texts, finished)
            split = self.split._replace(pad_token_id=self.folder.folder.pad_token_id)
            mean, std = (kind.mean, kind.std) if args.normalize_reward else (0.0, 1.0)
            for i, values in enumerate(step_scores(self.model, to_score, split)):
                if kind.separator is None:
                    scores[i] += weight * (values[0] - mean) / std
                elif args.process_reward != "steps":
                    scores[i] += weight * aggregate(values, args.process_reward)
                else:
                    places = place_of_steps(texts[i], kind.separator, prompts[i], rows[i], self.tokenizer)
                    for place, value in zip(places, values, strict=False):  # a row cut for the model has fewer
                        step_rewards[i, place] += weight * sigmoid(value)
        if self.function is not None:
            records = [prompt.text for prompt in prompts], texts, [prompt.fields for prompt in prompts]
            rewards = _on_main_rank(call_reward_function, self.function, *records)
            scores += args.reward_fn_weight * torch.tensor(rewards)
        scores -= args.length_penalty * torch.tensor([row.num_targets for row in rows])
        scores -= (args.missing_eos_penalty or 0.0) * ~torch.tensor(finished)
        device = torch.device(self.split.dp.device_type)
        sources = {"function": torch.tensor(rewards, device=device)} if self.function else {}
        return Scores(scores.to(device), step_rewards.to(device), num_cut, sources, {})

    def submit(self, i, prompt, text):
        pass

    def close(self):
        pass


def _on_main_rank(function: Callable, *args):
    """function(*args) of the main rank, on all ranks; a ValueError is raised on all of them."""
    outcome = [None, None]
    if is_main_rank():
        try:
            outcome[0] = function(*args)
        except ValueError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]
