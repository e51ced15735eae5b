"""models/sampling_cpu.py draws the same tokens as models/sampling.py."""

import pytest
import torch

from models import sampling, sampling_cpu
from models.noise import column_hashes
from models.sampling import SamplingParams

PARAMS = [
    SamplingParams(0.0),
    SamplingParams(0.7),
    SamplingParams(1.0, top_k=1),
    SamplingParams(1.3, top_k=50, top_p=0.9),
    SamplingParams(1.0, top_p=0.8),
    SamplingParams(1.0, top_k=7, repetition_penalty=1.5),
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("vocab_size", [3000, 3001])
def test_a_cpu_draws_the_same(params, vocab_size, monkeypatch):
    """Catches rows split or joined wrongly, noise of other tokens than those that were kept, split ties, and a maximum
    whose index counts from another part: flat rows, peaked ones and ties, against the path that GPUs run."""
    monkeypatch.setattr(sampling_cpu, "NUM_NUMBERS", 4 * vocab_size)  # 4 rows at a time
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(22, vocab_size, generator=generator) * torch.logspace(-2, 1, 22)[:, None]
    logits[5::3] = (4 * logits[5::3]).round() / 4
    keys, positions = torch.arange(22) * 12345, torch.arange(22)
    seen = torch.rand(22, vocab_size, generator=generator) < 0.1 if params.repetition_penalty != 1 else None
    inputs = (logits, keys, positions, column_hashes(vocab_size), params, None, seen)
    tokens, logprobs = sampling_cpu.sample(*inputs)
    wanted_tokens, wanted_logprobs = sampling.sample(*inputs)
    assert torch.equal(tokens, wanted_tokens)
    torch.testing.assert_close(logprobs, wanted_logprobs)
