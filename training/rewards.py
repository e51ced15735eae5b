"""Where PPO's scores come from: a reward model's folder, a Python function in a file, or both.

- a reward model with the policy's tokenizer reads the very ids that were drawn; one with another tokenizer reads the
  text, encoded as its own training did
- a process reward model scores every step; its numbers go to the steps' last tokens or, aggregated, to the answer's end
- a reward function sees texts and whole records, and what it returns is checked
"""

import importlib.util
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from models.checkpoint import WeightFiles
from models.model import ModelConfig, Transformer, read_hf_config
from models.tokenizer import StreamDecoder, Tokenizer
from models.tp import is_main_rank, size_of
from training.choosing import sigmoid
from training.common import open_folder, pad_id
from training.data import Example, encode_prompt, micro_batches
from training.preferences import (
    Scored,
    collate_scored,
    cut_steps,
    encode_answer,
    encode_steps,
    encode_unfinished,
    split_steps,
)
from training.rollouts import Prompt

RewardFunction = Callable[[list[str], list[str], list[dict]], list[float]]


def load_function(flag: str, place: str) -> Callable:
    """The function NAME of "FILE.py:NAME", which a flag gives. Raises FileNotFoundError or ValueError that says what is
    wrong with it."""
    path, separator, name = place.rpartition(":")
    if not separator or not name.isidentifier():
        raise ValueError(f"{flag} {place!r}: must be FILE.py:NAME")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag} {place}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(flag.lstrip("-"), path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{flag} {place}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what dataclasses and pickle in that file look for
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever somebody's file does when it is run
        raise ValueError(f"{flag} {place}: {path} cannot be imported: {_short(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{flag} {place}: {path} has no function {name}")
    return function


def load_reward_function(place: str) -> RewardFunction:
    """The function that --reward_fn names; see load_function. Raises ValueError also for other parameters."""
    function = load_function("--reward_fn", place)
    name = place.rpartition(":")[2]
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError:
        raise ValueError(
            f"--reward_fn {place}: {name} must take (prompts, completions, examples), it takes "
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
        raise ValueError(f"--reward_fn: {name} raised {_short(error)}") from error
    try:
        if isinstance(rewards, str | dict):
            raise TypeError(f"it is a {type(rewards).__name__}")
        rewards = [float(reward) for reward in rewards]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"--reward_fn: {name} must return a list of numbers: {_short(error)}") from None
    if len(rewards) != len(completions):
        raise ValueError(f"--reward_fn: {name} returned {len(rewards)} rewards for {len(completions)} completions")
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"--reward_fn: {name} returned {reward} for the completion {completions[i][:80]!r}")
    return rewards


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class RewardKind(NamedTuple):
    """What a reward model's config.json says about its scores."""

    separator: str | None  # what ends a step; None for an outcome model
    mean: float | None
    std: float | None

    def can_normalize(self) -> bool:
        """Whether (score - mean) / std is to be had."""
        return self.mean is not None and self.std is not None and self.std > 0


def read_reward_kind(folder: Path) -> RewardKind:
    """Raises ValueError unless the folder holds a model with one score for each token."""
    config, where = read_hf_config(folder)
    files = WeightFiles(folder)
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
    mean, std = config.get("reward_mean"), config.get("reward_std")
    for key, value in (("reward_mean", mean), ("reward_std", std)):
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not finite:
            raise ValueError(f"{where}: {key} must be a finite number, not {value!r}")
    return RewardKind(separator, mean, std)


def scalar_head_config(hf_config: dict, pad_token_id: int) -> dict:
    """The config.json of a scalar head on a model of hf_config: what transformers needs to find the last token and the
    single output, and nothing that an earlier reward model's said of its scores."""
    others = ("reward_model_type", "reward_position", "reward_mean", "reward_std", "step_separator", "problem_type")
    return {name: value for name, value in hf_config.items() if name not in others} | {
        "architectures": ["LlamaForSequenceClassification"],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_token_id,
    }


class RewardFolder(NamedTuple):
    """A reward model's folder, beside that of the policy it judges."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    same_tokenizer: bool  # as the policy's: it can read the policy's ids
    kind: RewardKind


def open_reward_folder(path: Path, policy_path: Path, tensor_parallel_size: int) -> RewardFolder:
    """Raises ValueError if the folder holds no scalar head, or cannot be cut over so many ranks."""
    config, tokenizer, _ = open_folder(path, None, tensor_parallel_size, frozen=True)
    kind = read_reward_kind(path)
    same = _tokenizer_bytes(path) == _tokenizer_bytes(policy_path)
    same = same and config.vocab_size == ModelConfig.from_hf(policy_path).vocab_size  # any id can be drawn
    return RewardFolder(path, config, tokenizer, same, kind)


def _tokenizer_bytes(folder: Path) -> dict[str, bytes]:
    """What decides how text becomes ids."""
    names = ("tokenizer.model", "tokenizer.json", "added_tokens.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def rows_to_score(
    folder: RewardFolder,
    prompts: list[str | list[dict]],
    answers: list[Example],
    texts: list[str],
    finished: list[bool],
    max_seq_len: int,
) -> tuple[list[Scored], int]:
    """(what the reward model reads of each answer: its row and the places of its scores; how many rows are cut since
    they are too long for the model). An answer that ran out of tokens has no EOS.

    prompts: as the records have them; answers: the policy's rows, prompt and answer; texts: the answers' alone.
    """
    rows, num_cut = [], 0
    for prompt, answer, text, ended in zip(prompts, answers, texts, finished, strict=True):
        if folder.kind.separator is not None:
            steps = split_steps(text, folder.kind.separator)
            ids, positions = encode_steps(prompt, steps, folder.kind.separator, folder.tokenizer)
            row = Scored(ids, positions, [], len(encode_prompt(prompt, folder.tokenizer)))
            row = row if len(ids) <= max_seq_len else cut_steps(row, max_seq_len)
            num_cut += len(ids) > max_seq_len
            rows.append(row or Scored(ids[:max_seq_len], [max_seq_len - 1], []))
            continue
        if folder.same_tokenizer:
            ids = answer.input_ids
        else:
            whole = encode_answer(prompt, text, folder.tokenizer)[0].input_ids if ended else None
            ids = whole or encode_unfinished(prompt, text, folder.tokenizer)
        num_cut += len(ids) > max_seq_len
        ids = ids[:max_seq_len]
        rows.append(Scored(ids, [len(ids) - 1], []))
    return rows, num_cut


def step_scores(
    model: Transformer,
    rows: list[Scored],
    *,
    micro_batch_size: int,
    pad_token_id: int,
    dp: DeviceMesh,
    bar: tqdm | None = None,
) -> list[list[float]]:
    """The scores at each row's positions, the same on all ranks, which share the rows over `dp`. A collective. bar:
    shows tokens."""
    device = model.inv_freq.device
    multiple_of = size_of(model.parallel.tp) if model.parallel.sequence_parallel else 1
    first = list(itertools.accumulate((len(row.positions) for row in rows), initial=0))
    found = torch.zeros(first[-1], device=device)
    numbers = micro_batches(
        list(range(len(rows))),
        micro_batch_size,
        dp.get_local_rank(),
        dp.size(),
        key=lambda i: len(rows[i].input_ids),
    )
    with torch.no_grad():
        for group in numbers:
            batch = collate_scored([rows[i] for i in group], pad_token_id, device, multiple_of)
            scores = model.score(model(batch.input_ids)[batch.rows, batch.positions])
            places = [first[i] + j for i in group for j in range(len(rows[i].positions))]
            found[torch.tensor(places, dtype=torch.int64, device=device)] = scores
            if bar is not None:
                bar.update(min(bar.total - bar.n, dp.size() * sum(len(rows[i].input_ids) for i in group)))
    dist.all_reduce(found, group=dp.get_group())  # each score is one rank's; the others have 0 there
    values = found.tolist()
    return [values[a:b] for a, b in itertools.pairwise(first)]


def aggregate(step_scores: list[float], how: str) -> float:
    """One number for the steps of an answer: the least, the product, the last or the mean of their probabilities,
    which are sigmoid(score) (Lightman et al. 2023, arXiv 2305.20050; Sun et al. 2024, Easy-to-Hard, 2403.09472)."""
    probs = torch.tensor(step_scores, dtype=torch.float64).sigmoid()
    return {"min": probs.min, "prod": probs.prod, "last": lambda: probs[-1], "mean": probs.mean}[how]().item()


def place_of_steps(text: str, separator: str, lengths: list[int]) -> list[int]:
    """The token, counted from 0, that ends each of split_steps(text, separator): the first with which the text so far
    holds the whole step. lengths[i]: characters that the first i + 1 tokens have completed."""
    places, end = [], 0
    for step in split_steps(text, separator):
        end = min(end + len(step) + len(separator), len(text))
        places.append(next((i for i, length in enumerate(lengths) if length >= end), len(lengths) - 1))
    return places


def score_answers(
    prompts: list[Prompt],
    rows: list[Example],
    texts: list[str],
    finished: list[bool],
    width: int,
    *,
    judge: RewardFolder | None,
    reward_model: Transformer | None,
    function: RewardFunction | None,
    tokenizer: Tokenizer,
    reward_model_weight: float,
    reward_fn_weight: float,
    normalize: bool,
    process_reward: str,
    missing_eos_penalty: float,
    length_penalty: float,
    micro_batch_size: int,
    dp: DeviceMesh,
) -> tuple[Tensor, Tensor, int]:
    """(scores [A], process rewards [A, width] of their own tokens, both fp32; rows that were cut for the reward model),
    the same on all ranks. A collective.

    rows: the policy's, prompt and answer with labels on the answer; texts, finished: of the answers. width: tokens of
    the longest answer.
    """
    scores, step_rewards, num_cut = torch.zeros(len(rows)), torch.zeros(len(rows), width), 0
    if judge is not None:
        said = [prompt.fields.get("prompt", prompt.fields.get("input")) for prompt in prompts]
        judged, num_cut = rows_to_score(judge, said, rows, texts, finished, judge.config.max_position_embeddings)
        padding = pad_id(judge.tokenizer, judge.config)
        found = step_scores(reward_model, judged, micro_batch_size=micro_batch_size, pad_token_id=padding, dp=dp)
        mean, std = (judge.kind.mean, judge.kind.std) if normalize else (0.0, 1.0)
        for i, values in enumerate(found):
            if judge.kind.separator is None:
                scores[i] += reward_model_weight * (values[0] - mean) / std
            elif process_reward != "steps":
                scores[i] += reward_model_weight * aggregate(values, process_reward)
            else:
                lengths = _text_lengths(tokenizer, prompts[i].ids, rows[i])
                places = place_of_steps(texts[i], judge.kind.separator, lengths)
                for place, value in zip(places, values, strict=False):  # a row cut for the model has fewer
                    step_rewards[i, place] += reward_model_weight * sigmoid(value)
    if function is not None:
        said = [prompt.text for prompt in prompts], texts, [prompt.fields for prompt in prompts]
        scores += reward_fn_weight * torch.tensor(_on_main_rank(call_reward_function, function, *said))
    scores -= length_penalty * torch.tensor([row.num_targets for row in rows])
    scores -= missing_eos_penalty * ~torch.tensor(finished)
    device = torch.device(dp.device_type)
    return scores.to(device), step_rewards.to(device), num_cut


def _on_main_rank(function: Callable, *args):
    """function(*args) of the main rank, on all ranks; a ValueError is raised on all of them."""
    found = [None, None]
    if is_main_rank():
        try:
            found[0] = function(*args)
        except ValueError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]


def _text_lengths(tokenizer: Tokenizer, prompt_ids: list[int], row: Example) -> list[int]:
    """Characters of the text of the first 1, 2, ... tokens of an answer."""
    stream = StreamDecoder(tokenizer, prompt_ids)
    return list(itertools.accumulate(len(stream.push(token)) for token in row.input_ids[len(prompt_ids) :]))
