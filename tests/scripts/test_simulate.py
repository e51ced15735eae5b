"""scripts/simulate.py: the real scheduler on a roofline model's clock, where the result follows by arithmetic."""

import json
from dataclasses import replace

import pytest

from models.generation import Request
from models.gpu import PEAKS
from scripts.benchmark_common import SIZES
from scripts.simulate import SimulateArgs, pages_that_fit, simulate
from scripts.workload import MathArgs, math_requests, token_bytes
from tests import tiny

CONFIG = SIZES["math-7b"]


def simulated(num_samples: int, new_tokens: int, num_pages: int, batch_size: int) -> dict:
    args = SimulateArgs(batch_size=batch_size, look_every=4, bandwidth_share=1.0, flops_share=1.0, step_us=0.0)
    requests = [Request(0, i, [3] * 64, new_tokens) for i in range(num_samples)]
    return simulate(args, requests, num_pages, "H100")


def test_equal_answers():
    """Catches steps, rows, pages or bytes that are not the scheduler's: samples that do not share their prompt's page,
    contexts one token off, weights that are not read in each step; and a clock that does not follow the bytes read."""
    n, new = 6, 9  # 8 decode steps in two looks
    found = simulated(n, new, 40, batch_size=n)
    assert found["steps"] == new - 1 and found["mean_rows"] == n and found["prompt_tokens"] == 64
    assert found["mean_pages"] == found["most_pages"] == 1 + n  # the prompt's, and one for each answer
    contexts = n * sum(64 + i for i in range(1, new))
    assert found["cached_tokens_read"] == found["cached_tokens_needed"] == contexts
    weights = 2 * (CONFIG.num_parameters() - CONFIG.vocab_size * CONFIG.hidden_size)  # but few rows of the embedding
    assert found["bytes_read"] == found["bytes_needed"] == (new - 1) * weights + contexts * token_bytes(CONFIG, 2)
    assert token_bytes(CONFIG, 2) == 2 * token_bytes(CONFIG, 2, tp=2) == 2 * 2 * 30 * 4096
    prefill = (weights + 64 * token_bytes(CONFIG, 2)) / PEAKS["H100"][1]
    assert found["seconds"] == pytest.approx(found["bytes_read"] / PEAKS["H100"][1] + prefill)
    assert found["tokens_per_second"] == n * new / found["seconds"] and not found["preempted"]


def test_few_pages_and_idle_rows():
    """Catches uncounted cache reads of finished or empty rows, and a scheduler that never runs out of pages."""
    found = simulated(3, 8, 40, batch_size=4)  # no row needs the last of 8 steps, and one row is empty
    assert found["steps"] == 8
    assert found["cached_tokens_read"] - found["cached_tokens_needed"] == 3 * (64 + 8) + 8
    scarce = simulated(6, 150, 9, batch_size=6)  # 2 or 3 of the 6 fit until they end
    assert scarce["preempted"] > 0 and scarce["most_pages"] <= 9 and scarce["tokens"] == 6 * 150
    assert scarce["mean_rows"] < 5 and scarce["prompt_tokens"] > 64  # recomputed after preemption


def test_no_answer_is_lost():
    """Catches samples that wait forever for the prompt of a preempted sample: it draws no first token when it goes on,
    so that they never begin."""
    args = SimulateArgs(num_prompts=8, num_samples=16, batch_size=64)
    requests = [replace(request, max_new_tokens=100) for request in math_requests(args, 16)]
    found = simulate(args, requests, 60, "H100")
    assert found["preempted"] > 20 and found["tokens"] == 128 * 100
    assert 1 <= found["cached_tokens_read"] / found["cached_tokens_needed"] < 1.2


def test_workload():
    """Catches a mean length that is not the flag's, lengths beyond the limit, samples that do not stand beside the
    others of their prompt, and requests that differ from run to run."""
    args = MathArgs(num_prompts=20, num_samples=16)
    requests = list(math_requests(args, 1000))
    lengths = [request.max_new_tokens for request in requests]
    assert sum(lengths) / len(lengths) == pytest.approx(429, rel=1e-3) and 1024 < max(lengths) <= 2048
    assert [(r.idx, r.sample_idx) for r in requests] == [(i, j) for i in range(20) for j in range(16)]
    assert all(len({tuple(r.prompt_ids) for r in requests if r.idx == i}) == 1 for i in range(20))
    assert requests == list(math_requests(args, 1000))


def test_command():
    """Catches a card or a last line that lacks a GPU, a model that does not fit a GPU, and a --num_pages that is raised
    silently because it is too small for one answer."""
    small = ["--num_prompts", 2, "--num_samples", 2, "--answer_mean", 6, "--answer_most", 12, "--batch_size", 2]
    result = tiny.run("scripts/simulate.py", *small, "--gpus", "H100", "MI300X")
    assert result.code == 0 and "8b" not in result.stdout, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])["gpus"]
    fast, faster = found["H100"], found["MI300X"]
    assert fast["tokens"] == faster["tokens"] and faster["tokens_per_second"] > fast["tokens_per_second"]
    # 80 GB less a tenth and 13.8 GB of weights, in pages of 64 tokens of 0.49 MB each
    assert fast["num_pages"] == pages_that_fit(CONFIG, SimulateArgs(), "H100") == int((72e9 - 2 * 6.910e9) / 31.457e6)
    refused = tiny.run("scripts/simulate.py", *small, "--gpus", "H100", "--memory_share", 0.1)
    tiny.assert_refused(refused, "H100", "0 pages")
    refused = tiny.run("scripts/simulate.py", *small, "--answer_mean", 300, "--answer_most", 600, "--num_pages", 2)
    tiny.assert_refused(refused, "--num_pages: 2 pages", "takes 1")
