"""The clock of scripts/simulate.py: the host's work beside the device's, and prefills between decode steps."""

import pytest

from scripts.simulate import STAND_IN, SimulateArgs, simulate
from scripts.workload import math_requests

WORK = {"num_prompts": 6, "num_samples": 1, "prompt_mean": 400.0, "answer_mean": 20.0, "answer_most": 40}


def found(**flags) -> dict:
    args = SimulateArgs(batch_size=3, **WORK, **flags)
    return simulate(args, list(math_requests(args, STAND_IN.vocab_size)), 100, "H100")


def test_the_host_works_meanwhile():
    """Catches host time that is added to the device's, which it overlaps, or never counted where it is longer, and
    launches that take no time."""
    free, slow = found(host_us=0.0), found(host_us=1e6)
    launched = found(host_us=0.0, step_us=1100.0)  # the default is 100 us
    assert launched["seconds"] - free["seconds"] == pytest.approx(1e-3 * (free["steps"] + free["prefills"]))
    assert free["host_waits"] == 0 and found(host_us=1.0)["seconds"] == pytest.approx(free["seconds"])
    looks = slow["steps"] / 4
    assert 0.5 * looks < slow["host_waits"] < 3 * looks and slow["seconds"] > free["seconds"] + 0.5 * looks
    assert slow["steps"] == free["steps"]


def test_prompts_hold_up_less_in_pieces():
    """Catches a pause that does not depend on --prefill_tokens, the prompts' tokens computed at a time."""
    pauses = [found(prefill_tokens=tokens)["longest_pause"] for tokens in (64, 256, 4096)]
    assert 0 < pauses[0] < pauses[1] < pauses[2]
