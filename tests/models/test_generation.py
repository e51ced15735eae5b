"""The engine against transformers' greedy ids, shared prefills, stops. Sampling: test_sampling.py."""

import random
import time
from collections import Counter

import pytest
import sentencepiece
import tokenizers
import torch

from models.checkpoint import load_model
from models.decode import to_inference
from models.generation import Engine, Request
from models.graphs import StepRunner, graph_sizes
from models.paged_cache import PagedCache
from models.sampling import SamplingParams, sample
from models.sequences import Sample
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
    "biases": {"attention_bias": True, "mlp_bias": True, "std": 0.5},  # a std at which biases do not drown the rest
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
    """Takes the GPU's path: its cache, steps over the rows in use, and a host that is one look behind."""
    rows, shape = engine.rows, {"num_pages": engine.pool.num_pages, "max_seq_len": engine.cache_len}
    rows.layers, rows.draw = rows.network, sample
    rows.cache = PagedCache(engine.model, num_rows=engine.num_slots, **shape)
    state = [rows.tokens, rows.positions, rows.remaining, rows.active, *([rows.seen.table] if rows.seen else [])]
    rows.runner = StepRunner(rows.step, engine.num_slots, state, Graph)
    Graph.made.clear()
    Graph.replayed.clear()
    engine.looks_ahead = 1


def addresses(engine):
    state = [*vars(engine.rows).items(), ("table", engine.rows.cache.table), *enumerate(engine.rows.cache.tensors())]
    return {name: tensor.data_ptr() for name, tensor in state if isinstance(tensor, torch.Tensor)}


def ragged_requests(count=24, *, num_samples=1, longest=60, most_new=20):
    rng = random.Random(0)
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


def hf_greedy(model, request, **more):
    """transformers' greedy ids for one prompt alone, with no EOS to stop at."""
    ids = torch.tensor([request.prompt_ids])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, **settings)
    return out[0, ids.shape[1] :].tolist()


def until(ids, stop_ids):
    """Cuts ids at the first stop id: (ids, finish_reason)."""
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
    a finished row that runs on past the end of the cache."""
    long = Request(0, 0, list(range(3, 20)), 111)
    ended = [Request(1, 0, list(range(3, 130)), 1), Request(2, 0, list(range(3, 129)), 2)]
    engine = make_engine(folder, num_slots=3, max_seq_len=128, look_every=8)
    expected = {(r.idx, 0): (hf_greedy(hf_model, r), "length") for r in (long, *ended)}
    assert outcome(engine, [long, *ended]) == expected
    assert engine.rows.positions.max() < 128


def test_the_path_of_gpus_gives_the_same(folder, hf_model):
    """Catches, on the GPU's path, a page, a place or a row's length that is off by one, a row lost or mixed up when
    rows in use are compacted, a graph of too few rows, and a graph that is captured twice."""
    requests = ragged_requests(12, num_samples=2)
    expected = {(r.idx, r.sample_idx): (hf_greedy(hf_model, r), "length") for r in requests}
    engine = make_engine(folder, num_slots=11, look_every=3)
    as_on_gpus(engine)
    before = addresses(engine)
    assert outcome(engine, requests) == expected
    assert outcome(engine, requests[::-1]) == expected, "the second call"
    assert len(Graph.made) == len({*Graph.made}) and {1, 4, 8, 11} <= {*Graph.made} == {*Graph.replayed}
    assert addresses(engine) == before


def test_capturing_changes_nothing(folder):
    """Catches a warm-up step that leaves traces: tokens that rows have seen, for the penalty."""
    params, requests = SamplingParams(1.0, repetition_penalty=5.0, stop_token_ids=(11, 12)), ragged_requests(9)
    expected = outcome(make_engine(folder, params), requests)
    engine = make_engine(folder, params, look_every=2)
    as_on_gpus(engine)
    assert outcome(engine, requests) == expected
    assert graph_sizes(256) == [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256] and graph_sizes(1) == [1]


def test_compiling_is_counted_once(folder, monkeypatch):
    """Catches the seconds of a capture that are counted as decoding too, or as the prefill of the flight ahead."""
    prepare = StepRunner.prepare

    def slowly(runner, size):
        start = time.perf_counter()
        prepare(runner, size)
        time.sleep(0.2)
        runner.seconds += 0.2
        assert time.perf_counter() - start >= 0.2

    monkeypatch.setattr(StepRunner, "prepare", slowly)
    engine = make_engine(folder, num_slots=3, look_every=2, prefill_tokens=16)
    as_on_gpus(engine)
    engine._is_cold = dict.fromkeys(engine._is_cold, True)  # as with compile=True
    start = time.perf_counter()
    completions = list(engine.generate(ragged_requests(3)))
    whole, captured = time.perf_counter() - start, 0.2 * len(Graph.made)
    counted = engine.compile_seconds + engine.prefill_seconds + engine.decode_seconds
    assert captured > 0.5 and captured <= engine.compile_seconds <= counted <= whole
    later = sum(len(each.token_ids) - 1 for each in completions)  # the first token is the prefill's
    assert later - 2 * 3 <= engine.num_decoded < later


@pytest.fixture(scope="module")
def ample(folder):
    """Requests that share beginnings, and what an engine with pages for all of them answers."""
    generator = random.Random(0)
    words = [[generator.randrange(3, 300) for _ in range(length)] for length in (64, 65, 100, 130, 190)]
    words += [[*words[3][:128], 7, 8, 9], words[3][:70] + words[2], words[4][:64]]  # share their beginnings
    requests = [Request(i % 8, i // 8, words[i % 8], 110 - 4 * (i % 8)) for i in range(10)]
    params = SamplingParams(1.0, stop_token_ids=(11,))
    engine = make_engine(folder, params, num_slots=6, max_seq_len=320, look_every=3)
    wanted = outcome(engine, requests)
    assert not engine.scheduler.num_preempted
    whole = engine.num_prompt_tokens
    assert sum(map(len, words)) - 500 < whole < sum(map(len, words)) + 64 * len(requests)
    return params, requests, wanted


@pytest.mark.parametrize("on_gpu", [False, True])
def test_few_pages_and_short_prefills_give_the_same(folder, ample, on_gpu):
    """Catches a page given away while a row reads it, or found for tokens that it does not hold, a chunk that does not
    attend to the chunks before it, a preempted sample that differs when it is computed again, and lost pages."""
    params, requests, wanted = ample
    few = make_engine(folder, params, num_slots=6, max_seq_len=320, num_pages=9, prefill_tokens=50, look_every=3)
    if on_gpu:
        as_on_gpus(few)
    assert outcome(few, requests) == wanted
    assert few.scheduler.num_preempted >= 3
    assert outcome(few, requests[::-1]) == wanted, "the second call"
    assert few.pool.num_free == 9


# ------------------------------------------------------------------------------------- shared prefill


@pytest.mark.parametrize("prefill_tokens, most", [(32, 3), (16, 2)])
def test_questions_on_one_document_are_computed_few_at_a_time(folder, hf_model, prefill_tokens, most):
    """Catches a prefill that gathers the same document once for each question that fits into it, which takes as much
    memory on a GPU as the cache has to spare, and a long prompt that waits forever."""
    document = [i % 290 + 3 for i in range(128)]
    engine = make_engine(folder, num_slots=12, max_seq_len=320, prefill_tokens=prefill_tokens)
    list(engine.generate([Request(0, 0, [*document, 5], 1)]))
    seen, prefill = [], engine.rows.prefill

    def watch(batch):
        seen.append([chunk.start + chunk.length for chunk in batch.chunks])
        return prefill(batch)

    engine.rows.prefill = watch
    requests = [Request(i, 0, [*document, 7 + i, 8], 4) for i in range(1, 12)]
    requests.append(Request(12, 0, [i % 97 + 3 for i in range(300)], 4))
    assert outcome(engine, requests) == {(r.idx, 0): (hf_greedy(hf_model, r), "length") for r in requests}
    assert max(map(len, seen)) == most  # contexts of 130 tokens, 2 of them computed; or one, and the last's beginning
    assert all(len(contexts) == 1 or sum(contexts) <= 16 * prefill_tokens for contexts in seen)


def test_a_prefill_that_is_broken_off_is_not_found(folder, hf_model):
    """Catches pages found for a prompt though Ctrl-C in a chat came before they were computed."""
    engine = make_engine(folder, max_seq_len=192)
    request, prefill = Request(0, 0, [i % 90 + 3 for i in range(150)], 6), engine.rows.prefill

    def break_off(batch):
        raise KeyboardInterrupt

    engine.rows.prefill = break_off
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate([request]))
    engine.rows.prefill = prefill
    [done] = engine.generate([request])
    assert done.token_ids == hf_greedy(hf_model, request)


@pytest.mark.parametrize("num_slots", [1, 4, 16])
def test_samples_of_a_prompt_share_one_prefill(folder, num_slots):
    """Catches a prefill repeated for each sample, also when there are more samples than slots and when prompts repeat;
    and a shared prefill that is another prompt's, too short, overwritten, or lacks a layer."""
    prompts = [[1, 5, 6, 7], [1, 5, 6, 8, 9], [1, 5, 6, 8, 9], [1, 5], [1, 5, 6, 7], [1, *range(9, 79)]]
    requests = [Request(idx, s, prompt, 3 + (idx + s) % 5) for idx, prompt in enumerate(prompts) for s in range(7)]
    params = SamplingParams(1.0, stop_token_ids=tuple(range(60, 100)))
    engine = make_engine(folder, params, num_slots=num_slots, num_pages=40)  # which keep a prompt beside its samples
    shared = outcome(engine, requests)
    assert engine.num_prompt_tokens == 4 + 5 + 2 + 4 + 71  # the last prompt has two pages
    alone = {}
    for request in requests:
        alone |= outcome(engine, [request])
    assert shared == alone


def test_interleaved_prompts_share_within_one_admission(folder):
    """Catches a prefix copied before its source is filled, or from another prompt's row."""
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
    """Catches a first token that is not counted, or followed by another; and an EOS right away that gives a text."""
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
    """Catches a limit that hides a stop string completed by the very last token, and a stop beyond the limit."""
    _, tokenizer, ids = scripted
    needed = next(i for i in range(len(ids)) if "question" in tokenizer.decode_continuation([1], ids[:i]))
    completion = speak(scripted, needed, stop=("question",))
    assert (completion.text, completion.finish_reason) == ("The answer to ", "stop")
    completion = speak(scripted, needed - 1, stop=("question",))
    assert completion.finish_reason == "length" and completion.token_ids == ids[: needed - 1]


def test_a_stop_string_of_bytes(folder, tmp_path):
    """Catches a newline, which LLaMA 2 spells as a byte, that stops a sample only when another token follows; a newline
    found though an invalid byte before it spoils it; a stop token's text taken for a stop string; and a stop token
    behind a stop string that removes a token of the text."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    params, newline = SamplingParams(stop_token_ids=(EOS, vocab["s"]), stop=("\n", "as", "wer")), vocab["<0x0A>"]
    texts = {"swer": "s"}  # the other texts end with a token
    for tokens, said, ended in (
        ([vocab["a"], vocab["s"], EOS], [vocab["a"]], [vocab["s"]]),
        ([vocab["swer"], EOS], [vocab["swer"]], []),
        ([vocab["a"], newline, newline, EOS], [vocab["a"]], [newline]),
        ([vocab["a"], newline, vocab["<0xC3>"], EOS], [vocab["a"]], [newline]),
        ([vocab["a"], vocab["<0xC3>"], newline, EOS], [vocab["a"], vocab["<0xC3>"], newline], [EOS]),  # no newline
    ):
        sample = Sample(Request(0, 0, [1], 9), params, Tokenizer(tmp_path))
        sample.take(tokens, [0.0] * len(tokens), None)
        done = sample.completion
        assert (done.token_ids, done.stop_ids, done.finish_reason) == (said, ended, "stop")
        text = backend.decode(said)
        assert done.text == texts.get(text, text) and len(done.logprobs) == len(said + ended)


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
