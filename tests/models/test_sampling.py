"""Sampling against transformers' warpers and chi-square: log-probs, noise, filters and their ties, the penalty."""

import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models import sampling
from models.generation import Request
from models.noise import column_hashes, exponential, exponential_noise, noise_key
from models.repetition import SeenTokens
from models.sampling import SamplingParams, top_p_threshold
from models.sampling_cpu import sample
from tests import tiny
from tests.models.test_generation import VARIANTS, hf_greedy, make_engine, outcome, ragged_requests

# ------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0.0, stop_token_ids=tuple(range(100, 130))),
        SamplingParams(1.0, stop_token_ids=tuple(range(100, 130))),
        SamplingParams(0.7, top_k=40, top_p=0.8, stop_token_ids=tuple(range(100, 130))),
    ],
    ids=["greedy", "temperature 1", "filtered"],
)
def test_logprobs_and_noise_are_those_of_the_definition(folder, hf_model, params):
    """Catches log-probs taken after the filters, at another temperature, one token late or without the EOS; and noise
    that is not that of the token's own seed, prompt, sample and position."""
    completions = list(make_engine(folder, params, num_slots=4).generate(ragged_requests(8, num_samples=3)))
    hashes = column_hashes(tiny.VOCAB_SIZE)
    num_stopped = 0
    for completion in completions:
        request = completion.request
        num = len(completion.logprobs)
        stopped = completion.finish_reason == "stop"
        num_stopped += stopped
        assert num == len(completion.token_ids) + stopped
        start = len(request.prompt_ids)
        for i in range(num):
            ids = torch.tensor([request.prompt_ids + completion.token_ids[:i]])
            if i == 0 or i == num - 1 or i % 5 == 0:
                with torch.no_grad():
                    logits = hf_model(ids).logits[:, -1].float()
                logprobs = (logits / (params.temperature or 1.0)).log_softmax(-1)
                if params.temperature == 0:
                    token = logprobs.argmax(-1)
                else:
                    key = torch.tensor([noise_key(params.seed, request.idx, request.sample_idx)])
                    noise = exponential_noise(key, torch.tensor([start + i]), hashes)
                    token = (hf_filtered(logits, params).exp() / noise).argmax(-1)
                if i < len(completion.token_ids):
                    assert token.item() == completion.token_ids[i]
                assert (token.item() in params.stop_token_ids) == (i == num - 1 and stopped)
                assert completion.logprobs[i] == pytest.approx(logprobs[0, token].item(), abs=2e-4)
    assert 0 < num_stopped < len(completions)


@pytest.mark.parametrize("variant, penalty", [("gqa", 1.8), ("tied", 0.6)])
def test_repetition_penalty_equals_transformers(tmp_path, variant, penalty):
    """Catches a penalty that misses the prompt or the first token, counts the tokens of another slot or of an earlier
    sample, counts a token twice, is a factor of the wrong kind for negative logits, or enters the log-probs."""
    model = tiny.write_model(tmp_path, **VARIANTS[variant])
    requests = ragged_requests(16, num_samples=2)
    of_hf = partial(hf_greedy, model, repetition_penalty=penalty)
    expected = {(r.idx, r.sample_idx): (of_hf(r), "length") for r in requests}
    assert sum(expected[r.idx, 0][0] != hf_greedy(model, r) for r in requests if not r.sample_idx) > 12
    params = SamplingParams(0.0, repetition_penalty=penalty)
    for num_slots, look_every in ((5, 1), (3, 8), (32, 2)):
        engine = make_engine(tmp_path, params, num_slots=num_slots, look_every=look_every)
        assert outcome(engine, requests) == expected, (num_slots, look_every)
        assert outcome(engine, requests[::-1]) == expected, "the second call"
    completion = next(engine.generate([requests[2]]))
    ids = torch.tensor([requests[2].prompt_ids + completion.token_ids])
    with torch.no_grad():
        logprobs = model(ids).logits[0, len(requests[2].prompt_ids) - 1 : -1].log_softmax(-1)
    wanted = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("params", [SamplingParams(0.7, top_k=20, top_p=0.9), SamplingParams(1.0)], ids=str)
def test_repetition_penalty_comes_before_temperature_and_filters(params):
    """Catches another order of the steps than transformers', also where a CPU samples a batch in parts."""
    torch.manual_seed(0)
    logits, prompts = 3 * torch.randn(200, 3000) - 8, torch.randint(3000, (200, 500))  # top logits of both signs
    keys, positions, hashes = torch.arange(200), torch.arange(200), column_hashes(3000)
    table = SeenTokens(200, 3000, torch.device("cpu"), None)
    for slot, ids in enumerate(prompts.tolist()):
        table.begin(slot, ids)
    params = replace(params, repetition_penalty=1.5)
    tokens, logprobs = sample(logits, keys, positions, hashes, params, seen=table.table)
    scores = hf_filtered(RepetitionPenaltyLogitsProcessor(1.5)(prompts, logits), params)
    assert torch.equal(tokens, (scores.exp() / exponential_noise(keys, positions, hashes)).argmax(-1))
    wanted = (logits / params.temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, wanted)


def hf_filtered(logits, params):
    """log-probs after transformers' own warpers, in its order."""
    steps = [TemperatureLogitsWarper(params.temperature)]
    steps += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    steps += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    for step in steps:
        logits = step(None, logits)
    return logits.log_softmax(-1)


def test_same_samples_for_every_batch_and_order(folder):
    """Catches noise that depends on the slot, the batch or the order of requests, and noise that samples share."""
    requests = ragged_requests(10, num_samples=3, most_new=16)
    params = SamplingParams(1.0, seed=5, stop_token_ids=tuple(range(60, 80)))
    expected = outcome(make_engine(folder, params, num_slots=4), requests)
    for num_slots in (1, 16):
        shuffled = random.Random(num_slots).sample(requests, len(requests))
        assert outcome(make_engine(folder, params, num_slots=num_slots, look_every=5), shuffled) == expected, num_slots
    long = [(r.idx, r.sample_idx) for r in requests if r.max_new_tokens > 4]
    samples = [(idx, tuple(expected[idx, s][0])) for idx, s in long if expected[idx, s][1] == "length"]
    assert len(samples) > 5 and len(set(samples)) == len(samples), "samples of one prompt differ"
    other_seed = SamplingParams(1.0, seed=6, stop_token_ids=params.stop_token_ids)
    other = outcome(make_engine(folder, other_seed), requests)
    assert sum(other[key] == expected[key] for key in long) <= 1


def test_equal_prompts_with_other_numbers_get_other_samples(folder):
    """Catches noise that forgets the prompt's number: a prompt given twice would get the same samples twice."""
    requests = [Request(idx, 0, [1, 5, 9], 12) for idx in range(6)]
    found = outcome(make_engine(folder, SamplingParams(1.0)), requests)
    assert len({tuple(ids) for ids, _ in found.values()}) == 6


def test_noise_keys_and_column_hashes_do_not_collide():
    """Catches equal keys for (1, 0) and (0, 1), and token ids that would share all their noise."""
    keys = {noise_key(seed, idx, s) for seed in range(-4, 4) for idx in range(64) for s in range(64)}
    assert len(keys) == 8 * 64 * 64
    for vocab_size in (32000, 32256, 102400, 128256):
        assert column_hashes(vocab_size).unique().numel() == vocab_size


def chi_square_limit(dof, z=3.72):
    """The 0.9999 quantile of chi-square (Wilson and Hilferty 1931)."""
    return dof * (1 - 2 / (9 * dof) + z * math.sqrt(2 / (9 * dof))) ** 3


def assert_drawn_from(counts, probs):
    """Pearson's test at 0.0001. Cells with few expected counts are merged; impossible cells must be empty."""
    expected = probs.double() * counts.sum()
    assert counts[probs == 0].sum() == 0, "a token that the filters drop was drawn"
    rare = expected < 5
    cells = [(counts[~rare].double(), expected[~rare])]
    if expected[rare].sum() > 5:
        cells.append((counts[rare].sum()[None].double(), expected[rare].sum()[None]))
    statistic = sum(((seen - wanted) ** 2 / wanted).sum().item() for seen, wanted in cells)
    dof = sum(len(seen) for seen, _ in cells) - 1
    assert dof > 0 and statistic < chi_square_limit(dof), (statistic, dof)


def test_noise_is_exponential_in_its_tail_too():
    """Catches a hash of few bits or a uniform without small values: the tail below 1e-3 decides the rare tokens."""
    keys = torch.tensor([noise_key(0, idx, 0) for idx in range(64)])
    hashes = column_hashes(4096)
    draws = torch.cat([exponential_noise(keys, torch.full((64,), p), hashes).flatten() for p in range(16)]).double()
    n = draws.numel()  # 4.2 million
    assert draws.min() > 0
    assert abs(draws.mean() - 1) < 4 / math.sqrt(n)
    assert abs(draws.var() - 1) < 4 * math.sqrt(8 / n)
    for bound in (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0, 10.0):
        p = 1 - math.exp(-bound)
        assert abs((draws < bound).sum() - n * p) < 4 * math.sqrt(n * p * (1 - p)), bound


def test_noise_is_finite_for_every_hash(monkeypatch):
    """Catches a uniform that rounds to 1 or 0 at the ends of the 31 bits: its noise is infinite, and where top-p leaves
    one candidate, token 0 wins the race by it. Other draws stay as they were, to the bit."""
    ends = [torch.arange(start, start + 4096) for start in (0, 2**30 - 2048, 2**31 - 4096, -(2**31), -4096)]
    bits = torch.cat(ends).to(torch.int32)
    draws = exponential(bits.clone())
    uniforms = ((bits & 0x7FFFFFFF).double() + 0.5) / 2**31
    assert draws.isfinite().all() and draws.min() > 0 and draws.log().isfinite().all()
    small = uniforms < 0.1
    torch.testing.assert_close(draws[small].double(), -torch.log1p(-uniforms[small]), rtol=1e-6, atol=0)
    before = -torch.log1p(-((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31)
    assert torch.equal(draws[before.isfinite()], before[before.isfinite()])
    assert 0 < before.isinf().sum() <= 2 * 64

    largest = lambda keys, rows, hashes: torch.full_like(hashes, -1).view(1, -1)  # noqa: E731
    monkeypatch.setattr("models.noise.random_bits", largest)
    logits, key = torch.tensor([[1.0, 2.0, 9.0, 3.0, 0.0]]), torch.zeros(1, dtype=torch.int64)
    for params in (SamplingParams(1.0, top_p=0.5), SamplingParams(1.0, top_k=1, top_p=0.5)):
        assert sample(logits, key, key, column_hashes(5), params)[0].item() == 2


@pytest.mark.parametrize("neighbours", ["tokens", "positions", "samples", "prompts", "seeds"])
def test_noise_of_neighbours_is_independent(neighbours):
    """Catches noise that two samples, positions or tokens share, or that correlates (a sum of the parts, say)."""
    base = [(seed, idx, s) for seed in range(2) for idx in range(2) for s in range(32)]
    step = {"seeds": (1, 0, 0), "prompts": (0, 1, 0), "samples": (0, 0, 1)}.get(neighbours, (0, 0, 0))
    hashes = column_hashes(1025)

    def uniforms(shift, p_shift, t_shift):
        keys = torch.tensor([noise_key(*(a + b for a, b in zip(key, shift))) for key in base])
        parts = [
            exponential_noise(keys, torch.full_like(keys, p + p_shift), hashes[t_shift : 1024 + t_shift])
            for p in range(0, 32, 2)
        ]
        return 1 - torch.exp(-torch.cat(parts).flatten().double())

    first = uniforms((0, 0, 0), 0, 0)
    second = uniforms(step, int(neighbours == "positions"), int(neighbours == "tokens"))
    correlation = torch.corrcoef(torch.stack((first, second)))[0, 1].item()
    assert abs(correlation) < 4 / math.sqrt(len(first))
    cells = (first * 16).long().clamp(max=15) * 16 + (second * 16).long().clamp(max=15)
    assert_drawn_from(cells.bincount(minlength=256), torch.full((256,), 1 / 256))
    small = (first < 0.01) & (second < 0.01)  # both in the tail
    assert abs(small.sum() - 1e-4 * len(first)) < 4 * math.sqrt(1e-4 * len(first))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0),
        SamplingParams(0.7),
        SamplingParams(1.0, top_k=5),
        SamplingParams(1.0, top_p=0.6),
        SamplingParams(0.7, top_k=6, top_p=0.9),
    ],
    ids=["temperature 1", "temperature 0.7", "top-k", "top-p", "all"],
)
def test_samples_follow_the_models_distribution(small_vocabulary, params):
    """Catches a wrong race, temperature or filter, in prefill and decode, and noise that repeats from one position to
    the next: the joint counts of the first two tokens pass a chi-square test."""
    folder, model = small_vocabulary
    prompt_ids = [1, 5, 3, 9]
    engine = make_engine(folder, params, num_slots=64, max_seq_len=8)
    pairs = [c.token_ids for c in engine.generate([Request(0, s, prompt_ids, 2) for s in range(4000)])]
    pairs = torch.tensor(pairs)
    with torch.no_grad():
        after_prompt = hf_filtered(model(torch.tensor([prompt_ids])).logits[:, -1], params).exp()[0]
        after_first = hf_filtered(
            model(torch.tensor([[*prompt_ids, t] for t in range(12)])).logits[:, -1], params
        ).exp()
    assert_drawn_from(pairs[:, 0].bincount(minlength=12), after_prompt)
    joint = after_prompt[:, None] * after_first
    assert_drawn_from((pairs[:, 0] * 12 + pairs[:, 1]).bincount(minlength=144), joint.flatten())


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, tiny.write_model(folder, vocab_size=12, std=0.1)


@pytest.mark.parametrize("flat_rows", ["none", "some", "all"])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.9999])
def test_top_p_of_a_large_vocabulary_equals_the_full_sort(flat_rows, top_p):
    """Catches a CPU shortcut that drops candidates where the top thousand do not hold the mass."""
    torch.manual_seed(0)
    logits = torch.randn(64, 5000)
    peaked = {"none": slice(0, 64), "some": slice(0, 32), "all": slice(0, 0)}[flat_rows]
    logits[peaked] *= 6
    keys = torch.tensor([noise_key(0, idx, 0) for idx in range(64)])
    positions, hashes = torch.arange(64), column_hashes(5000)
    params = SamplingParams(1.0, top_p=top_p)
    tokens, logprobs = sample(logits, keys, positions, hashes, params)
    expected = (hf_filtered(logits, params).exp() / exponential_noise(keys, positions, hashes)).argmax(-1)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_top_p_without_sorting(spread):
    """Catches a threshold by halving that keeps a token too many or too few, or splits ties: against a sort in fp64,
    whose masses may differ by fp32's rounding, and where the answer is known."""
    logits = torch.randn(64, 3000, generator=torch.Generator().manual_seed(0)) * spread - 3
    logits[32:] = (4 * logits[32:]).round() / 4
    for top_p in (0.0, 0.1, 0.5, 0.9, 0.9999):
        probs = logits.double().softmax(-1)
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        mass = (ordered.cumsum(-1) - ordered).gather(-1, order.argsort(-1))  # of the tokens ahead of each
        mass = torch.where(logits == logits.amax(-1, keepdim=True), -1.0, mass)
        least = torch.where(mass < top_p, logits, torch.inf).amin(-1, keepdim=True)
        kept = logits >= top_p_threshold(logits, top_p)
        differ = kept != (logits >= least)
        assert (mass[differ] - top_p).abs().max().item() < 2e-6 if differ.any() else True, (top_p, differ.sum())
        assert differ.sum() <= 20 * (top_p == 0.9999)
    known = torch.tensor([[0.0, -1.0, 3.0, 3.0, -torch.inf]])  # the two 3.0 have nearly all the mass
    assert [top_p_threshold(known, p).item() for p in (0.0, 0.4, 0.9, 0.97, 0.999)] == [3.0, 3.0, 3.0, 0.0, -1.0]


@pytest.mark.parametrize("params", [SamplingParams(1.0, top_k=20), SamplingParams(0.7, top_k=60, top_p=0.9)], ids=str)
def test_ties_at_the_end_of_top_k(params):
    """Catches candidates that depend on how a kernel orders equal logits: all ties with the last candidate are kept, as
    in transformers, and the CPU's shortcut over few candidates draws what the whole vocabulary does."""
    rounded = (3 * torch.randn(256, 3000, generator=torch.Generator().manual_seed(0)) * 4).round() / 4
    last = rounded.topk(params.top_k).values[:, -1:]
    tied = (rounded >= last).sum(-1) > params.top_k
    assert 30 < tied.sum() < 256
    keys, positions, hashes = torch.arange(256), torch.arange(256), column_hashes(3000)
    for logits in (rounded, rounded[tied], rounded[~tied]):  # the shortcut is for batches without a tie
        n = len(logits)
        tokens, logprobs = sample(logits, keys[:n], positions[:n], hashes, params)
        whole_tokens, whole_logprobs = sampling.sample(logits, keys[:n], positions[:n], hashes, params)
        assert torch.equal(tokens, whole_tokens)
        torch.testing.assert_close(logprobs, whole_logprobs)
        if params.top_p == 1:
            noise = exponential_noise(keys[:n], positions[:n], hashes)
            assert torch.equal(tokens, (hf_filtered(logits, params).exp() / noise).argmax(-1))


@pytest.mark.parametrize(
    "params", [SamplingParams(1.0, top_p=0.0), SamplingParams(1.0, top_k=1), SamplingParams(1e-4)], ids=str
)
def test_narrow_filters_are_greedy(folder, params):
    """Catches a filter that drops the best token, or keeps one too many."""
    requests = ragged_requests(8)
    assert outcome(make_engine(folder, params), requests) == outcome(make_engine(folder), requests)


def test_wide_filters_change_nothing(folder):
    """Catches a top-k beyond the vocabulary that fails, and noise that depends on a candidate's rank."""
    requests = ragged_requests(8)
    expected = outcome(make_engine(folder, SamplingParams(1.0)), requests)
    for params in (SamplingParams(1.0, top_k=10**6), SamplingParams(1.0, top_p=1 - 1e-9)):
        assert outcome(make_engine(folder, params), requests) == expected
