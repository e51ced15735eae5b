"""The inference copy and its cache: fused and packed weights, refresh(), rows of the cache."""

import weakref

import pytest
import torch

from models.attention import causal_attention
from models.checkpoint import load_model
from models.common import Runtime
from models.decode import (
    InferenceLinear,
    can_pack,
    copy_for_inference,
    load_for_inference,
    refresh,
    to_inference,
    weight_bytes,
)
from models.decode_cpu import CPUCache
from models.fsdp import ParallelArgs, full_tensors, init_mesh, load_for_training
from models.generation import Engine, Request
from models.paged_cache import Chunk, PagedCache
from models.sampling import SamplingParams
from tests import tiny

CPU = torch.device("cpu")
REQUESTS = [Request(i, 0, [1, *range(3 + i, 8 + 3 * i)], 6 + i) for i in range(6)]
REQUESTS.append(Request(6, 0, [1, *range(9, 79)], 6))  # fills a page, which the pool finds again
VARIANTS = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "std": 0.5},
    "head_dim": {"head_dim": 24, "num_key_value_heads": 1},
    "qwen2": {**tiny.QWEN2, "std": 0.5},
    "qwen3": tiny.QWEN3,
}


def make_engine(model):
    return Engine(model, SamplingParams(0.0), num_slots=4, max_seq_len=80)


def greedy_ids(model, engine=None):
    engine = engine or make_engine(model)
    return {c.request.idx: c.token_ids for c in engine.generate(REQUESTS)}


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_refresh_gives_the_new_model(tmp_path, variant, pack):
    """Catches a weight, bias, norm or tied head that refresh() forgets or mixes up in a fused product, an existing
    engine that keeps an old weight, and pages reused though the old weights filled them."""
    for seed in (0, 1):
        tiny.write_model(tmp_path / str(seed), seed=seed, **VARIANTS[variant])
    old, new = load_model(tmp_path / "0"), load_model(tmp_path / "1")
    for model, scale in ((old, 1.0), (new, 0.7)):  # norms that differ too: transformers starts them all at 1
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data.uniform_(0.5, 1.5).mul_(scale).add_(torch.randn_like(parameter) * (1 - scale))
    copy = to_inference(old, pack=pack)
    engine = make_engine(copy)
    before = greedy_ids(copy, engine)
    addresses = [t.data_ptr() for t in (*copy.parameters(), *copy.buffers())]
    engine.refresh(new)
    assert [t.data_ptr() for t in (*copy.parameters(), *copy.buffers())] == addresses, "CUDA graphs need them fixed"
    after = greedy_ids(copy, engine)
    expected = greedy_ids(to_inference(new, pack=False))
    assert after == expected and after != before


@pytest.mark.skipif(not can_pack(Runtime(CPU, torch.bfloat16, False)), reason="this CPU has no bf16 kernels in oneDNN")
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "plain"])
def test_refresh_casts_to_the_copys_dtype(tmp_path, pack):
    """Catches fp32 master weights that arrive in a bf16 copy as fp32."""
    for seed in (0, 1):
        tiny.write_model(tmp_path / str(seed), seed=seed)
    copy = to_inference(load_model(tmp_path / "0", param_dtype=torch.bfloat16), pack=pack)
    refresh(copy, load_model(tmp_path / "1"))
    fresh = to_inference(load_model(tmp_path / "1", param_dtype=torch.bfloat16), pack=pack)
    assert greedy_ids(copy) == greedy_ids(fresh)


@pytest.mark.skipif(not can_pack(Runtime(CPU, torch.float32, False)), reason="no oneDNN on this CPU")
def test_refresh_lets_the_old_weights_go(tmp_path):
    """Catches an engine that keeps the packed weights from before a refresh: a second copy in memory."""
    tiny.write_model(tmp_path)
    copy = to_inference(load_model(tmp_path), pack=True)
    engine = make_engine(copy)
    greedy_ids(copy, engine)
    old = [weakref.ref(module.packed) for module in copy.modules() if isinstance(module, InferenceLinear)]
    refresh(copy, load_model(tmp_path))
    assert len(old) > 4 and not any(reference() is not None for reference in old)


@pytest.fixture
def mesh():
    yield init_mesh(CPU, 1)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant, pack", [("tied", False), ("biases", True), ("gqa", False), ("qwen3", True)])
def test_copy_beside_a_model_in_training(tmp_path, mesh, variant, pack, compute_dtype):
    """Catches a copy that is stale in some weight (block, embedding, final norm, head), shares storage with FSDP's
    weights or is not in the compute dtype; and a refresh that moves the copy's storage, or leaves FSDP's weights
    gathered or changed when training goes on. Several ranks: tests/training/test_parallel.py."""
    pack = pack and can_pack(Runtime(CPU, compute_dtype, False))
    tiny.write_model(tmp_path, **VARIANTS[variant])
    source = load_for_training(tmp_path, mesh, ParallelArgs(), Runtime(CPU, compute_dtype, False))
    copy = copy_for_inference(source, pack=pack)
    assert {t.dtype for t in (*copy.parameters(), *copy.buffers())} - {torch.float32} <= {compute_dtype}
    assert copy.embed_tokens.weight.dtype == compute_dtype
    tensors = [*copy.parameters(), *copy.buffers()]
    addresses = [t.data_ptr() for t in tensors]

    def expected():
        plain = load_model(tmp_path)
        for name, values in full_tensors(source):
            plain.get_parameter(name).data.copy_(values)
        return to_inference(plain.to(compute_dtype), pack=pack)

    def same_outputs():
        plain, ids = expected(), torch.arange(3, 40)[None]
        plain.reset_buffers(CPU)
        with torch.no_grad():
            return torch.equal(copy.lm_head(copy(ids)), plain.lm_head(plain(ids)))

    assert same_outputs()
    for changed in ("layers.1.mlp", "self_attn", "layernorm", "embed_tokens", "norm", "lm_head"):
        with torch.no_grad():
            for name, parameter in source.named_parameters():
                if name.startswith(changed) or changed in name:
                    parameter.to_local().mul_(1.25)
        assert same_outputs() == (changed == "lm_head" and variant == "tied"), changed
        with torch.no_grad():
            source(torch.tensor([[1, 2]]))  # an evaluation leaves the root gathered
        refresh(copy, source)
        assert same_outputs(), changed
    assert [t.data_ptr() for t in tensors] == addresses and all(a is b for a, b in zip(tensors, copy.parameters()))
    assert all(hasattr(p, "device_mesh") and p.dtype == torch.float32 for p in source.parameters())
    source(torch.tensor([[1, 2]])).float().sum().backward()


@pytest.mark.parametrize("variant", ["gqa", "biases", "qwen2", "qwen3"])
def test_fused_products_compute_what_the_layers_did(tmp_path, variant):
    """Catches q, k and v (or gate and up) in the wrong order, their biases forgotten, the norms of q and k swapped, and
    a packed weight that differs from the plain one."""
    tiny.write_model(tmp_path, **VARIANTS[variant])
    model = load_model(tmp_path)
    ids = torch.randint(3, tiny.VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head(model(ids))
        for pack in (False, True):
            copy = to_inference(load_model(tmp_path), pack=pack)
            torch.testing.assert_close(copy.lm_head(copy(ids)), expected, atol=1e-4, rtol=1e-4)


def test_weight_bytes_counts_each_product_once(tmp_path):
    """Catches an MBU that counts the embedding, or that omits the packed weights."""
    tiny.write_model(tmp_path)
    source = load_model(tmp_path)
    expected = sum(p.nbytes for name, p in source.named_parameters() if "proj" in name or "lm_head" in name)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = load_for_inference(tmp_path, Runtime(CPU, dtype, False))
        assert weight_bytes(model) == expected * size // 4


@pytest.mark.parametrize("kind", ["plain", "cpu"])
def test_decode_attends_to_its_own_row_and_no_further(folder, kind):
    """Catches a mask that is off by one, mixed up rows or pages of the cache, a chunk that does not attend to the chunk
    before it, and a read of the unused tail: every place that must not be seen holds a huge value."""
    model = load_model(folder)
    config = model.config
    num_heads, num_kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cache = (CPUCache if kind == "cpu" else PagedCache)(model, num_rows=5, num_pages=12, max_seq_len=200)
    generator = torch.Generator().manual_seed(0)
    lengths, pages = [4, 1, 63, 64, 150], [[7], [2], [12], [3, 5], [4, 11, 1]]  # around the end of a page
    rows = {}
    for name, heads in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
        rows[name] = [torch.randn(1, n + 1, heads, D, generator=generator) for n in lengths]
    for tensor in cache.tensors():
        tensor.fill_(1e4)
    whole = [causal_attention(0, *(rows[name][i] for name in "qkv")) for i in range(5)]
    for chunks in ([(0, 0, 4), (4, 0, 70)], [(4, 70, 80), (1, 0, 1), (2, 0, 63), (3, 0, 64)]):
        attend = cache.prefill([Chunk(pages[i], start, length) for i, start, length in chunks])
        packed = [torch.cat([rows[name][i][:, s : s + n] for i, s, n in chunks], dim=1) for name in "qkv"]
        expected = torch.cat([whole[i][:, s : s + n] for i, s, n in chunks], dim=1)
        torch.testing.assert_close(attend(1, *packed), expected)
    order = [2, 0, 1, 4, 3]
    cache.set_table(torch.tensor([pages[i] + [0] * (3 - len(pages[i])) for i in order], dtype=torch.int32))
    dim = 0 if kind == "cpu" else 1  # decode rows lie along the dim of tokens, in the CPU's cache along the batch
    new = [torch.cat([rows[name][i][:, -1:] for i in order], dim) for name in "qkv"]
    attend = cache.decode(torch.tensor([lengths[i] for i in order]), 3)
    torch.testing.assert_close(attend(1, *new), torch.cat([whole[i][:, -1:] for i in order], dim))


def test_cpu_cache_in_bf16_keeps_its_scores(folder):
    """Catches attention scores rounded to bf16: at scores around 50, weights would be off by a fifth."""
    model = load_model(folder, param_dtype=torch.bfloat16)
    config, cache = model.config, CPUCache(model, num_rows=2, num_pages=2, max_seq_len=64)
    generator = torch.Generator().manual_seed(0)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch.randn(1, 40, h, config.head_dim, generator=generator).bfloat16() for h in heads)
    q *= 20
    expected = causal_attention(0, *(t.float() for t in (q, k, v)))[:, -1:]
    cache.prefill([Chunk([2], 0, 39)])(0, *(t[:, :-1] for t in (q, k, v)))
    cache.set_table(torch.tensor([[0], [2]], dtype=torch.int32))
    found = cache.decode(torch.tensor([0, 39]), 1)(0, *(t[:, -1:].expand(2, -1, -1, -1) for t in (q, k, v)))[1:]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
