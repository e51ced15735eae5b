"""The engine against transformers: greedy ids, log-probs, distributions; and its promises: samples that depend on
nothing but their key, shared prefills, stops."""

import math
import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.checkpoint import load_model
from models.common import Runtime
from models.decode import load_for_inference, to_inference
from models.generation import Engine, Request
from models.graphs import StepRunner, graph_sizes
from models.noise import column_hashes, exponential, exponential_noise, noise_key
from models.paged_cache import PagedCache
from models.qlinear import Scheme
from models.repetition import SeenTokens
from models.sampling import SamplingParams, sample, top_p_threshold
from models.tokenizer import Tokenizer
from tests import tiny
from tests.stand_ins import Graph

CPU = torch.device("cpu")
EOS = 2
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
VARIANTS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True, "std": 0.5},  # the wider, the less its biases drown the rest
    "head_dim": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "yarn": {"rope_parameters": tiny.YARN},
    "qwen2_dynamic": {**tiny.QWEN2, "std": 0.5, "rope_parameters": DYNAMIC_ROPE},
    "qwen2_tied_yarn": {**tiny.QWEN2, "std": 0.5, "tie_word_embeddings": True, "rope_parameters": tiny.YARN},
    "qwen3_dynamic": {**tiny.QWEN3, "rms_norm_eps": 0.1, "rope_parameters": DYNAMIC_ROPE},
    "qwen3_tied_yarn": {**tiny.QWEN3, "tie_word_embeddings": True, "rope_parameters": tiny.YARN},
}


def make_engine(folder, params=None, *, num_slots=5, max_seq_len=96, pack=True, **options):
    model = to_inference(load_model(folder), pack=pack)
    return Engine(model, params or SamplingParams(0.0), num_slots=num_slots, max_seq_len=max_seq_len, **options)


def as_on_gpus(engine):
    """The path of GPUs: their cache, steps of as many rows as are in use, and the host a look behind."""
    rows, shape = engine.rows, {"num_pages": engine.pool.num_pages, "max_seq_len": engine.cache_len}
    rows.layers, rows.draw = rows.network, sample
    rows.cache = PagedCache(engine.model.config, num_rows=engine.num_slots, **shape, dtype=torch.float32, device=CPU)
    state = [rows.tokens, rows.positions, rows.remaining, rows.active, *([rows.seen.table] if rows.seen else [])]
    rows.runner = StepRunner(rows.step, engine.num_slots, state, Graph)
    Graph.made.clear()
    Graph.replayed.clear()
    engine.looks_ahead = 1


def ragged_requests(count=24, *, num_samples=1, longest=60, most_new=20, seed=0):
    rng = random.Random(seed)
    requests = []
    for idx in range(count):
        length = (1, longest)[idx] if idx < 2 else rng.randint(1, longest)
        prompt_ids = [1, *(rng.randrange(3, tiny.VOCAB_SIZE) for _ in range(length - 1))]
        max_new_tokens = rng.randint(1, most_new)
        requests += [Request(idx, s, prompt_ids, max_new_tokens) for s in range(num_samples)]
    return requests


def by_key(completions):
    return {(c.request.idx, c.request.sample_idx): c for c in completions}


def outcome(engine, requests):
    completions = list(engine.generate(requests))
    assert len(completions) == len(requests)
    return {key: (c.token_ids, c.finish_reason) for key, c in by_key(completions).items()}


def hf_greedy(model, request):
    """transformers' greedy ids for one prompt alone, with no EOS to stop at."""
    ids = torch.tensor([request.prompt_ids])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, **settings)
    return out[0, ids.shape[1] :].tolist()


def until(ids, stop_ids):
    """What a run that ends at a stop id gives: (ids, finish_reason)."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    return (ids, "length") if end is None else (ids[:end], "stop")


# -------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_transformers_one_by_one(tmp_path, variant):
    """Catches a wrong mask, position, cache row, head grouping, bias, norm of heads, RoPE or stop in ragged, refilled
    batches."""
    model = tiny.write_model(tmp_path, **VARIANTS[variant])
    requests = ragged_requests()
    free = {r.idx: hf_greedy(model, r) for r in requests}
    # two EOS ids that occur: one as the very first token of a prompt, one later
    occurs_in = Counter(token for ids in free.values() for token in set(ids[2:]))
    eos_ids = (free[2][0], min(occurs_in, key=lambda token: abs(occurs_in[token] - 6)))
    expected = {(idx, 0): until(ids, eos_ids) for idx, ids in free.items()}
    reasons = Counter(reason for _, reason in expected.values())
    assert len(occurs_in) > 24, "a model that says the same whatever it is told would hide mistakes"
    assert reasons["stop"] >= 2 and reasons["length"] >= 2 and ([], "stop") in expected.values(), reasons
    for pack, look_every in ((True, 1), (False, 8)):
        params = SamplingParams(0.0, stop_token_ids=eos_ids)
        engine = make_engine(tmp_path, params, pack=pack, look_every=look_every)
        assert outcome(engine, requests) == expected, (pack, look_every)


def test_every_look_and_slot_count_gives_the_same(folder, hf_model):
    """Catches stop flags that only work when the host looks at every step, and state left over from a slot's last
    sample or from an earlier call."""
    requests = ragged_requests(12)
    free = {(r.idx, 0): hf_greedy(hf_model, r) for r in requests}
    eos_ids = (free[2, 0][-1], free[3, 0][0])
    expected = {key: until(ids, eos_ids) for key, ids in free.items()}
    for num_slots, look_every in ((1, 8), (3, 3), (5, 8), (16, 1)):
        engine = make_engine(
            folder, SamplingParams(0.0, stop_token_ids=eos_ids), num_slots=num_slots, look_every=look_every
        )
        assert outcome(engine, requests) == expected, (num_slots, look_every)
        assert outcome(engine, requests[::-1]) == expected, "the second call"


def test_cache_is_used_to_its_last_place(folder, hf_model):
    """Catches an attention length or a cache that is one too short at the end of max_seq_len, over several buckets, and
    a row that has ended and runs on, past the end of the cache."""
    long = Request(0, 0, list(range(3, 20)), 111)
    ended = [Request(1, 0, list(range(3, 130)), 1), Request(2, 0, list(range(3, 129)), 2)]
    engine = make_engine(folder, num_slots=3, max_seq_len=128, look_every=8)
    expected = {(r.idx, 0): (hf_greedy(hf_model, r), "length") for r in (long, *ended)}
    assert outcome(engine, [long, *ended]) == expected
    assert engine.rows.positions.max() < 128


def test_the_path_of_gpus_gives_the_same(folder, hf_model):
    """Catches, in what GPUs run, a page, a place or a row's length that is one off, a row that is lost or mixed up when
    those in use are put together, a graph of too few rows, and one that is captured twice."""
    requests = ragged_requests(12, num_samples=2)
    expected = {(r.idx, r.sample_idx): (hf_greedy(hf_model, r), "length") for r in requests}
    engine = make_engine(folder, num_slots=11, look_every=3)
    as_on_gpus(engine)
    addresses = [buffer.data_ptr() for buffer in engine.buffers()]
    assert outcome(engine, requests) == expected
    assert outcome(engine, requests[::-1]) == expected, "the second call"
    assert len(Graph.made) == len({*Graph.made}) and {1, 4, 8, 11} <= {*Graph.made} == {*Graph.replayed}
    assert addresses == [buffer.data_ptr() for buffer in engine.buffers()]


def test_capturing_changes_nothing(folder):
    """Catches a step that is run to warm up and leaves its traces: what rows have seen, for the penalty."""
    params, requests = SamplingParams(1.0, repetition_penalty=5.0, stop_token_ids=(11, 12)), ragged_requests(9)
    expected = outcome(make_engine(folder, params), requests)
    engine = make_engine(folder, params, look_every=2)
    as_on_gpus(engine)
    assert outcome(engine, requests) == expected
    assert graph_sizes(256) == [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256] and graph_sizes(1) == [1]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_few_pages_and_short_prefills_give_the_same(folder, hf_model, on_gpu):
    """Catches a page that is given away while somebody reads it, or found for what it does not hold, a chunk that does
    not see what came before, a sample that is not the same when it is computed again, and pages that are lost."""
    generator = random.Random(0)
    words = [[generator.randrange(3, 300) for _ in range(length)] for length in (64, 65, 100, 130, 190)]
    words += [[*words[3][:128], 7, 8, 9], words[3][:70] + words[2], words[4][:64]]  # share their beginnings
    requests = [Request(i % 8, i // 8, words[i % 8], 110 - 4 * (i % 8)) for i in range(24)]
    engine = make_engine(folder, SamplingParams(1.0, stop_token_ids=(11,)), num_slots=6, max_seq_len=320, look_every=3)
    wanted = outcome(engine, requests)
    assert not engine.num_preempted
    whole = engine.num_prompt_tokens
    assert sum(map(len, words)) - 500 < whole < sum(map(len, words)) + 64 * 24
    few = make_engine(folder, engine.params, num_slots=6, max_seq_len=320, num_pages=9, prefill_tokens=50, look_every=3)
    if on_gpu:
        as_on_gpus(few)
    assert outcome(few, requests) == wanted
    assert few.num_preempted > 3
    assert outcome(few, requests[::-1]) == wanted, "the second call"
    assert few.pool.num_free == 9


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_equals_eager(tmp_path):
    """Catches a decode step that cannot be traced whole (a branch on data, in the top-p shortcut too) or that torch
    specialises wrongly, quantised products that the compiler computes otherwise, and a repetition penalty whose table a
    compiled step does not keep. Compiling takes long, so one graph has it all: a block in int8 and one in int4."""
    shape = {"vocab_size": 2500, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    tiny.write_model(tmp_path, **shape, **tiny.QWEN3 | {"head_dim": 16}, rope_parameters=tiny.YARN)
    params = SamplingParams(1.0, top_p=0.9, stop_token_ids=(7,), repetition_penalty=1.4)
    requests = ragged_requests(6, longest=10, most_new=12)
    found = []
    for compile in (False, True):
        runtime, schemes = Runtime(CPU, torch.float32, compile), (Scheme("int8"), Scheme("int4", 32))
        model, other = (load_for_inference(tmp_path, runtime, scheme=scheme) for scheme in schemes)
        model.layers[1] = other.layers[1]
        options = {"compile": compile, "look_every": 4} if compile else {}
        found.append(outcome(Engine(model, params, num_slots=3, max_seq_len=24, **options), requests))
    assert found[0] == found[1]


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
    """Catches a penalty that misses the prompt or the first token, goes by another slot's or an earlier sample's
    tokens, counts a token twice, is a factor of the wrong kind for negative logits, or enters the log-probs."""
    model = tiny.write_model(tmp_path, **VARIANTS[variant])
    requests = ragged_requests(16, num_samples=2)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": penalty}
    expected = {}
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, **settings
        )
        expected[request.idx, request.sample_idx] = (out[0, ids.shape[1] :].tolist(), "length")
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
    """Catches another order of the steps than transformers', in the CPU's parts of a batch too."""
    torch.manual_seed(0)
    logits, prompts = 3 * torch.randn(200, 3000) - 8, torch.randint(3000, (200, 500))  # of both signs at the top
    keys, positions, hashes = torch.arange(200), torch.arange(200), column_hashes(3000)
    table = SeenTokens(200, 3000, CPU, None)
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
    """Catches noise that depends on the slot, the batch or the order of the requests, and noise that is shared."""
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
    """Catches keys of (1, 0) and (0, 1) that are the same, and token ids that would share all their noise."""
    keys = {noise_key(seed, idx, s) for seed in range(-4, 4) for idx in range(64) for s in range(64)}
    assert len(keys) == 8 * 64 * 64
    for vocab_size in (32000, 32256, 102400, 128256):
        assert column_hashes(vocab_size).unique().numel() == vocab_size


def chi_square_limit(dof, z=3.72):
    """The 0.9999 quantile of chi-square (Wilson and Hilferty 1931)."""
    return dof * (1 - 2 / (9 * dof) + z * math.sqrt(2 / (9 * dof))) ** 3


def assert_drawn_from(counts, probs):
    """Pearson's test at 0.0001; cells with few expected counts are one cell, impossible ones must be empty."""
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
    """Catches a uniform that rounds to 1 or 0 at the ends of the 31 bits: its noise is infinite, and where top-p has
    left one candidate, token 0 wins the race with it. Other draws stay as they were, to the bit."""
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
    """Catches a wrong race, temperature or filter, in prefill and decode: the joint counts of the first two tokens
    pass a chi-square test, so noise that repeats from one position to the next fails too."""
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
    """Catches a CPU shortcut that drops candidates where the mass does not lie in the first thousand."""
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
    """Catches a threshold of the halving that keeps a token too many or too few, or tears ties apart: against a sort in
    fp64, whose masses may be off by their rounding in fp32, and where the answer is known."""
    logits = torch.randn(64, 3000, generator=torch.Generator().manual_seed(0)) * spread - 3
    logits[32:] = (4 * logits[32:]).round() / 4
    for top_p in (0.0, 0.1, 0.5, 0.9, 0.9999):
        probs = logits.double().softmax(-1)
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        mass = (ordered.cumsum(-1) - ordered).gather(-1, order.argsort(-1))  # of the tokens before each
        mass = torch.where(logits == logits.amax(-1, keepdim=True), -1.0, mass)
        least = torch.where(mass < top_p, logits, torch.inf).amin(-1, keepdim=True)
        kept = logits >= top_p_threshold(logits, top_p)
        differ = kept != (logits >= least)
        assert (mass[differ] - top_p).abs().max().item() < 2e-6 if differ.any() else True, (top_p, differ.sum())
        assert differ.sum() <= 20 * (top_p == 0.9999)
    known = torch.tensor([[0.0, -1.0, 3.0, 3.0, -torch.inf]])  # 3.0 twice has nearly all
    assert [top_p_threshold(known, p).item() for p in (0.0, 0.4, 0.9, 0.97, 0.999)] == [3.0, 3.0, 3.0, 0.0, -1.0]


@pytest.mark.parametrize("params", [SamplingParams(1.0, top_k=20), SamplingParams(0.7, top_k=60, top_p=0.9)], ids=str)
def test_ties_at_the_end_of_top_k(params, monkeypatch):
    """Catches candidates that depend on how a kernel orders equal logits: all that tie with the last are kept, as in
    transformers, and the CPU's shortcut over few candidates draws what the whole vocabulary does."""
    rounded = (3 * torch.randn(256, 3000, generator=torch.Generator().manual_seed(0)) * 4).round() / 4
    last = rounded.topk(params.top_k).values[:, -1:]
    tied = (rounded >= last).sum(-1) > params.top_k
    assert 30 < tied.sum() < 256
    keys, positions, hashes = torch.arange(256), torch.arange(256), column_hashes(3000)
    for logits in (rounded, rounded[tied], rounded[~tied]):  # the shortcut is for batches without a tie
        n = len(logits)
        tokens, logprobs = sample(logits, keys[:n], positions[:n], hashes, params)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            whole_tokens, whole_logprobs = sample(logits, keys[:n], positions[:n], hashes, params)
        assert torch.equal(tokens, whole_tokens) and torch.equal(logprobs, whole_logprobs)
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


# ------------------------------------------------------------------------------------- shared prefill


@pytest.mark.parametrize("num_slots", [1, 4, 16])
def test_samples_of_a_prompt_share_one_prefill(folder, num_slots):
    """Catches a prefill that is done again for each sample, also when there are more samples than slots and when
    prompts repeat; and a shared one that is another prompt's, too short, or overwritten."""
    prompts = [[1, 5, 6, 7], [1, 5, 6, 8, 9], [1, 5, 6, 8, 9], [1, 5], [1, 5, 6, 7]]
    requests = [Request(idx, s, prompt, 3 + (idx + s) % 5) for idx, prompt in enumerate(prompts) for s in range(7)]
    params = SamplingParams(1.0, stop_token_ids=tuple(range(60, 100)))
    engine = make_engine(folder, params, num_slots=num_slots)
    shared = outcome(engine, requests)
    assert engine.num_prompt_tokens == 4 + 5 + 2 + 4
    alone = {}
    for request in requests:
        alone |= outcome(engine, [request])
    assert shared == alone


def test_interleaved_prompts_share_within_one_admission(folder):
    """Catches a copy that is made before its source is filled, or that takes the row of another prompt."""
    a, b = [1, 5, 6, 7, 8], [1, 9, 10]
    requests = [Request(i, 0, prompt, 6) for i, prompt in enumerate([a, b, a, b, b, a])]
    engine = make_engine(folder, SamplingParams(1.0), num_slots=6)
    shared = outcome(engine, requests)
    assert engine.num_prompt_tokens == len(a) + len(b)
    assert shared == {(r.idx, 0): outcome(engine, [r])[r.idx, 0] for r in requests}


def test_prefill_in_groups_equals_one(folder):
    """Catches prompts that get lost or swapped when one admission needs several packed prefills."""
    requests = ragged_requests(16)
    expected = outcome(make_engine(folder, num_slots=16), requests)
    assert outcome(make_engine(folder, num_slots=16, prefill_tokens=50), requests) == expected


# ----------------------------------------------------------------------------------------------- stops


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A folder whose model says SCRIPT after BOS, then EOS: its layers do nothing, and the head turns each token into
    the next one."""
    folder = tmp_path_factory.mktemp("scripted")
    model = tiny.write_model(folder, hidden_size=tiny.VOCAB_SIZE, num_hidden_layers=1)
    tokenizer = Tokenizer(folder)
    ids = [*tokenizer.encode(SCRIPT), EOS]
    assert len(set(ids)) == len(ids) and ids[0] == 1, "each token has one successor"
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(tiny.VOCAB_SIZE))
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[1:], ids[:-1]] = 1.0
    model.save_pretrained(folder)
    return folder, tokenizer, ids[1:]


SCRIPT = "The answer to question 3é is 17,€."


def speak(scripted, max_new_tokens=60, **options):
    folder, tokenizer, _ = scripted
    params = SamplingParams(0.0, stop_token_ids=(EOS,), **options)
    engine = make_engine(folder, params, num_slots=2, tokenizer=tokenizer)
    (completion,) = engine.generate([Request(0, 0, [1], max_new_tokens)])
    assert len(completion.logprobs) >= len(completion.token_ids)
    return completion


def test_without_a_stop_string_the_text_runs_to_the_eos(scripted):
    """Catches an EOS in the ids or the text, or left out of the log-probs."""
    completion = speak(scripted)
    assert (completion.text, completion.finish_reason) == (SCRIPT, "stop")
    assert completion.token_ids == scripted[2][:-1]
    assert len(completion.logprobs) == len(scripted[2])


def test_one_new_token(scripted):
    """Catches a first token that is not counted, or followed by another; an EOS right away is an empty text."""
    completion = speak(scripted, 1)
    assert (completion.token_ids, completion.finish_reason) == (scripted[2][:1], "length")
    folder, tokenizer, ids = scripted
    engine = make_engine(folder, SamplingParams(0.0, stop_token_ids=(EOS,)), tokenizer=tokenizer)
    (completion,) = engine.generate([Request(0, 0, [1, *ids[:-1]], 9)])
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [], "stop")
    assert len(completion.logprobs) == 1


@pytest.mark.parametrize(
    "stop",
    [
        ("er to qu",),  # spans tokens, begins and ends inside one
        ("The",),  # the very first text
        ("he answ",),
        (" question",),
        ("é",),  # two bytes, two tokens
        ("3é i",),
        ("€",),  # three bytes
        ("€.",),
        (".",),  # the last token
        ("17", "é"),  # the one that comes first in the text, whatever the order
        ("é", "17"),
        ("question 3", "quest", "stion 3é"),
        ("stion", "que"),  # both end with the same token
        ("never said", "wer"),
    ],
    ids=str,
)
def test_stop_strings(scripted, stop):
    """Catches a stop string missed because it spans tokens or characters of several bytes, text of it left in or text
    before it lost, and ids that do not belong to the text."""
    _, tokenizer, ids = scripted
    place = min(SCRIPT.find(s) for s in stop if s in SCRIPT)
    completion = speak(scripted, stop=stop)
    assert (completion.text, completion.finish_reason) == (SCRIPT[:place], "stop")
    # the fewest tokens that hold the text
    count = next(i for i in range(len(ids)) if tokenizer.decode_continuation([1], ids[:i]).startswith(SCRIPT[:place]))
    assert completion.token_ids == ids[:count]
    said = tokenizer.decode_continuation([1], ids[: len(completion.logprobs)])
    assert any(s in said for s in stop)
    before = tokenizer.decode_continuation([1], ids[: len(completion.logprobs) - 1])
    assert not any(s in before for s in stop), "goes on after the stop string"


def test_stop_string_in_the_last_token(scripted):
    """Catches a limit that hides a stop string completed by the very last token, and one that comes a token later."""
    _, tokenizer, ids = scripted
    needed = next(i for i in range(len(ids)) if "question" in tokenizer.decode_continuation([1], ids[:i]))
    completion = speak(scripted, needed, stop=("question",))
    assert (completion.text, completion.finish_reason) == ("The answer to ", "stop")
    completion = speak(scripted, needed - 1, stop=("question",))
    assert completion.finish_reason == "length" and completion.token_ids == ids[: needed - 1]


def test_a_stop_string_frees_the_slot_for_the_next_prompt(scripted):
    """Catches a slot that goes on after its stop string and disturbs the sample that follows it, at any look_every."""
    folder, tokenizer, _ = scripted
    params = SamplingParams(0.0, stop_token_ids=(EOS,), stop=("question",))
    for look_every in (1, 8):
        engine = make_engine(folder, params, num_slots=2, tokenizer=tokenizer, look_every=look_every)
        completions = list(engine.generate([Request(i, 0, [1], 3 + i % 2 * 50) for i in range(7)]))
        assert all(c.text == "The answer to " for c in completions if c.request.idx % 2)
        assert all(len(c.token_ids) == 3 for c in completions if c.request.idx % 2 == 0)


def test_on_token_sees_every_token_in_order(folder):
    """Catches tokens that are streamed late, twice, for another sample, or after the end."""
    seen = {}
    params = SamplingParams(1.0, stop_token_ids=tuple(range(60, 90)))
    engine = make_engine(folder, params, look_every=4)
    requests = ragged_requests(12)
    completions = engine.generate(requests, lambda request, token: seen.setdefault(request.idx, []).append(token))
    for completion in completions:
        streamed = seen[completion.request.idx]
        if completion.finish_reason == "stop":
            assert streamed[-1] in params.stop_token_ids
            streamed = streamed[:-1]
        assert streamed == completion.token_ids


def test_requests_that_cannot_be_served_are_refused(folder):
    """Catches an empty prompt, nothing to generate and a too long sample, which would write past the cache."""
    engine = make_engine(folder, max_seq_len=16)
    for prompt_ids, max_new_tokens in (([], 4), ([1], 0), ([1] * 12, 5)):
        with pytest.raises(ValueError, match="prompt 3"):
            list(engine.generate([Request(3, 0, prompt_ids, max_new_tokens)]))
    with pytest.raises(ValueError, match="tokenizer"):
        make_engine(folder, SamplingParams(stop=("x",)))
