"""Workloads of the benchmarks, the GPU report and the simulation: lengths of prompts and answers, and text about them.

- ragged: lengths uniform from a quarter to seven quarters of a mean
- MATH-shaped: many samples of each prompt, as for best of n; lengths are log-normal, so most answers are short and a
  few reach their limit
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from models.common import at_least_one, flag, positive
from models.config import ModelConfig
from models.generation import Request

FIRST_TOKEN = 3  # lowest id in random prompts: those below are special tokens


@dataclass(frozen=True, kw_only=True)
class MathArgs:
    """Many samples of each problem, with lengths like those of MATH."""

    num_prompts: int = flag(64, bounds=at_least_one, help="number of problems")
    num_samples: int = flag(64, bounds=at_least_one, help="answers to each problem")
    prompt_mean: float = flag(110.0, bounds=positive, help="mean tokens of a prompt")
    answer_mean: float = flag(429.0, bounds=positive, help="mean tokens of an answer")
    answer_most: int = flag(2048, bounds=at_least_one, help="most tokens of an answer")

    def sizes(self) -> list[tuple[int, list[int]]]:
        """Returns (tokens of the prompt, tokens of each answer) for every problem, the same in each call."""
        generator = random.Random(0)
        prompts = _log_normal(generator, self.num_prompts, self.prompt_mean, 0.6, 8 * self.prompt_mean)
        count = self.num_prompts * self.num_samples
        answers = _log_normal(generator, count, self.answer_mean, 0.85, self.answer_most)
        n = self.num_samples
        return [(prompt, answers[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts)]


def _log_normal(generator: random.Random, count: int, mean: float, sigma: float, most: float) -> list[int]:
    """Draws log-normal lengths, clamped to 1 ... `most`, and scaled so that their mean is `mean` after clamping."""
    shapes = [math.exp(sigma * generator.gauss(0, 1)) for _ in range(count)]

    def lengths(scale: float) -> list[int]:
        return [max(1, min(int(most), round(scale * shape))) for shape in shapes]

    low, high = 0.0, 4 * mean / min(shapes)
    for _ in range(60):  # the mean grows with the scale
        middle = (low + high) / 2
        low, high = (middle, high) if sum(lengths(middle)) < mean * count else (low, middle)
    return lengths(high)


def math_requests(args: MathArgs, vocab_size: int) -> Iterator[Request]:
    """Yields requests for the samples of every problem in turn, each of its length; prompts are random tokens."""
    generator = torch.Generator().manual_seed(0)
    for idx, (prompt_len, answers) in enumerate(args.sizes()):
        prompt = torch.randint(FIRST_TOKEN, vocab_size, (prompt_len,), generator=generator).tolist()
        for sample_idx, length in enumerate(answers):
            yield Request(idx, sample_idx, prompt, length)


def ragged_sizes(count: int, prompt_len: int, new_tokens: int) -> list[tuple[int, int]]:
    """Returns (tokens of the prompt, tokens to generate) of `count` requests, uniform from a quarter to seven quarters
    of the means; the same in each call."""
    generator = torch.Generator().manual_seed(0)
    drawn = (
        torch.randint(-(-n // 4), 7 * n // 4 + 1, (count,), generator=generator).tolist()
        for n in (prompt_len, new_tokens)
    )
    return list(zip(*drawn))


def random_ids(vocab_size: int, *shape: int) -> torch.Tensor:
    return torch.randint(FIRST_TOKEN, vocab_size, shape)


def counted(number: int, noun: str) -> str:
    """Returns "1 slot" or "8 slots"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def sized(num_bytes: float) -> str:
    """Formats bytes with a unit, for a column."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, size = next((each for each in units if num_bytes >= each[1] / 10), units[0])
    return f"{num_bytes / size:9.3f} {unit}"


def token_bytes(config: ModelConfig, number_bytes: int, tp: int = 1) -> float:
    """Bytes of the KV cache per token, on each rank."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * number_bytes / tp
