"""Where PPO's scores come from: a reward model's folder, a Python function in a file, or both.

- a reward model with the policy's tokenizer reads the very ids that were drawn; one with another tokenizer reads the
  text, encoded as its own training did
- a process reward model scores every step; its numbers go to the steps' last tokens or, aggregated, to the answer's end
- a reward function sees texts and whole records, and what it returns is checked
"""

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from models.checkpoint import WeightFiles
from models.model import ModelConfig, Transformer, read_hf_config
from models.tokenizer import Tokenizer

RewardFunction = Callable[[list[str], list[str], list[dict]], list[float]]


def load_reward_function(place: str) -> RewardFunction:
    """The function NAME of "FILE.py:NAME". Raises FileNotFoundError or ValueError that says what is wrong with it."""
    path, separator, name = place.rpartition(":")
    if not separator or not name.isidentifier():
        raise ValueError(f"--reward_fn {place!r}: must be FILE.py:NAME")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--reward_fn {place}: there is no file {path}")
    spec = importlib.util.spec_from_file_location("reward_fn", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--reward_fn {place}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what dataclasses and pickle in that file look for
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file does when it is run
        raise ValueError(f"--reward_fn {place}: {path} cannot be imported: {_short(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--reward_fn {place}: {path} has no function {name}")
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
    except Exception as error:  # somebody's code may raise anything
        raise ValueError(f"--reward_fn: {name} raised {_short(error)}") from error
    try:
        rewards = [float(reward) for reward in rewards]
    except (TypeError, ValueError) as error:
        raise ValueError(f"--reward_fn: {name} must return a list of numbers: {_short(error)}") from None
    if len(rewards) != len(completions):
        raise ValueError(f"--reward_fn: {name} returned {len(rewards)} rewards for {len(completions)} completions")
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"--reward_fn: {name} returned {reward} for the completion {completions[i][:80]!r}")
    return rewards


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class RewardFolder(NamedTuple):
    """What a reward model's folder says of itself."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    same_tokenizer: bool  # as the policy's: it can read the policy's ids
    mean: float | None
    std: float | None
    step_separator: str | None  # of a process reward model


def open_reward_folder(path: Path, policy_path: Path) -> RewardFolder:
    """Raises ValueError if the folder holds no scalar head."""
    config, hf_config = ModelConfig.from_hf(path), read_hf_config(path)[0]
    if not has_score_head(path):
        raise ValueError(f"{path}: not a reward model, it has no score.weight; train one with training/train_rm.py")
    same = path.resolve() == policy_path.resolve() or _tokenizer_bytes(path) == _tokenizer_bytes(policy_path)
    is_process = hf_config.get("reward_model_type") == "process"
    return RewardFolder(
        path,
        config,
        Tokenizer(path),
        same,
        hf_config.get("reward_mean"),
        hf_config.get("reward_std"),
        hf_config.get("step_separator", "\n") if is_process else None,
    )


def has_score_head(folder: Path) -> bool:
    return "score.weight" in WeightFiles(folder).names()


def _tokenizer_bytes(folder: Path) -> dict[str, bytes]:
    """What decides how text becomes ids."""
    names = ("tokenizer.model", "tokenizer.json", "added_tokens.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


class RewardModel(NamedTuple):
    folder: RewardFolder
    model: Transformer
