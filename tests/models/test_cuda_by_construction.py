"""The GPU's code path on a machine without one: the real code over fake tensors, which have a device but no values. A
tensor on another device, a shape that the CUDA kernels refuse, and a host that waits for the GPU all raise here."""

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)

from models import attention, decode_rows, graphs, paged_cache, qlinear
from models.attention import document_attention
from models.batches import Split, collate
from models.decode import copy_for_inference, refresh, to_inference
from models.generation import Engine, Request
from models.gpu import peaks
from models.paged_cache import Chunk
from models.qlinear import QuantizedLinear, Scheme
from models.quantize import quantize_block
from models.records import IGNORE_INDEX, Example
from models.reward import Scored, step_scores
from models.sampling import SamplingParams
from models.scheduler import Prefill
from models.vocab_parallel import _CrossEntropySum, _TokenLogprobs, fused_head
from tests.models.fake_gpu import (  # noqa: F401 (a fixture)
    CPU,
    GPU,
    Launches,
    MostSelected,
    NobodyWaits,
    OnGPU,
    gpu,
    on_gpu,
    quantised_on_gpu,
)
from training import losses, optim, rollouts

SCHEMES = [None, Scheme("int8"), Scheme("int4", 32), Scheme("int4", 128), Scheme("fp8")]
PARAMS = {
    "greedy": SamplingParams(0.0, stop_token_ids=(7,)),
    "temperature": SamplingParams(0.7),
    "top_k": SamplingParams(1.0, top_k=5),
    "top_p": SamplingParams(1.0, top_p=0.9),
    "both": SamplingParams(0.7, top_k=5, top_p=0.9),
    "penalty": SamplingParams(0.7, top_k=5, repetition_penalty=1.3),
}


def make_engine(params: SamplingParams, scheme: Scheme | None = None) -> Engine:
    transformer = on_gpu(torch.bfloat16)
    for block in transformer.layers if scheme else ():
        get = block.get_parameter
        weight_of = lambda name, get=get: quantised_on_gpu(get(name).shape, scheme)  # noqa: E731
        quantize_block(block, "", weight_of, get, scheme, torch.bfloat16)
    model, shape = to_inference(transformer, pack=False), {"num_slots": 3, "max_seq_len": 64}
    return Engine(model, params, **shape, look_every=2, prefill_tokens=4, compile=True)


def generate(engine: Engine, monkeypatch) -> list:
    """Runs the engine to its end. The host reads zeros, and only from tensors that have been copied to the CPU."""

    def tolist(tensor):
        assert tensor.device.type == "cpu"
        zeros = lambda shape: [zeros(shape[1:]) for _ in range(shape[0])] if shape else 0  # noqa: E731
        return zeros(tensor.shape)

    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    requests = [Request(i, 0, [3, 4, 5, 6][: 2 + i // 2], 3) for i in range(5)]  # two share a prefill, two wait
    with NobodyWaits():
        return list(engine.generate(requests))


@pytest.mark.parametrize("name, kernel", [*((name, True) for name in PARAMS), ("both", False)])
def test_generation(gpu, name, kernel, monkeypatch):
    """Catches a CPU tensor between prompts and tokens, a host or a GPU that waits for the other, and a part of a decode
    step that CUDA graphs cannot capture."""
    if not kernel:  # no Triton
        monkeypatch.setattr(paged_cache, "gpu_kernel", lambda device: None)
    done = generate(make_engine(PARAMS[name]), monkeypatch)
    assert sorted(c.request.idx for c in done) == list(range(5)) and all(len(c.token_ids) == 3 for c in done)


@pytest.mark.parametrize("scheme, kernel", [*((scheme, True) for scheme in SCHEMES[1:]), (SCHEMES[2], False)], ids=str)
def test_quantised_generation(gpu, scheme, kernel, monkeypatch):
    """Catches shapes, dtypes or layouts that the CUDA products refuse (fp8: a column-major weight, scales [M, 1] and
    [1, N]), a layer that does not use its kernel, and one that fails without Triton."""
    monkeypatch.setattr(qlinear, "has_triton", lambda device: kernel)
    engine = make_engine(PARAMS["both"], scheme)
    kernels = {module.kernel for module in engine.model.modules() if isinstance(module, QuantizedLinear)}
    assert kernels == {("fp8" if scheme.mode == "fp8" else "triton") if kernel else None}
    assert len(generate(engine, monkeypatch)) == 5
    weight = quantised_on_gpu((24, 128), scheme)  # fp8: the kernel does not take 24 features
    layer = QuantizedLinear([weight], [torch.empty(24, device=GPU)], scheme, torch.bfloat16)
    for rows in (1, 17):
        assert layer(torch.empty(rows, 128, dtype=torch.bfloat16, device=GPU)).shape == (rows, 24)


def test_a_dropped_engine_is_freed(gpu, monkeypatch):
    """Catches an engine whose cache and graphs hold their memory until Python collects garbage, beside the next one."""
    engine = make_engine(PARAMS["both"])
    assert len(generate(engine, monkeypatch)) == 5 and engine.rows.runner.graphs
    dropped = weakref.ref(engine.rows)
    gc.disable()
    del engine
    is_freed = dropped() is None
    gc.enable()
    assert is_freed


def test_launches_of_a_prefill_do_not_grow_with_prompts(gpu):
    """Catches a prefill that handles its prompts, or the chunks that continue earlier pages, one by one."""
    engine, counts, begun = make_engine(PARAMS["temperature"]), [], Chunk([1, 2], 70, 5)
    for chunks in ([Chunk([1], 0, 9)], [Chunk([1], 0, 5)] * 64, [begun], [begun, *[Chunk([3], 0, 2)] * 9]):
        size = sum(chunk.length for chunk in chunks)
        with Launches() as launches:
            engine.rows.prefill(Prefill([3] * size, [0] * size, chunks, [], []))
        counts.append(launches.count)
    assert counts[0] == counts[1] and counts[2] == counts[3], counts


FAULTS = {
    "a tensor on the CPU": (lambda logits: logits + torch.zeros(logits.shape), "cpu"),
    "a number on the CPU": (lambda logits: logits * torch.tensor(2.0), "on the CPU"),
    "a look at a number": (lambda logits: logits * logits.amax().item(), DataDependentOutputException),
    "a branch on a number": (lambda logits: logits if (logits > 0).any() else -logits, DataDependentOutputException),
    "a shape that depends on numbers": (lambda logits: logits[(logits[:, 0] > 0)], DynamicOutputShapeException),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(gpu, fault, monkeypatch):
    """The tests above bite: each fault in the sampling of a decode step raises."""
    change, seen = FAULTS[fault]
    whole = decode_rows.sample
    monkeypatch.setattr(decode_rows, "sample", lambda logits, *args: whole(change(logits), *args))
    engine = make_engine(PARAMS["greedy"])
    expected = (
        {"expected_exception": seen} if isinstance(seen, type) else {"expected_exception": Exception, "match": seen}
    )
    with pytest.raises(**expected):
        engine.rows.runner.prepare(1)
        engine.rows.runner(1)


WAITS = {
    "a list that is sent": lambda tensor: torch.tensor([1, 2], device=GPU),
    "a tensor that is fetched": lambda tensor: tensor.cpu(),
    "a number that is read": lambda tensor: int(tensor.sum()),
}


@pytest.mark.parametrize("fault", WAITS)
def test_waiting_is_seen(gpu, fault):
    """Catches a NobodyWaits that does not notice a wait."""
    with NobodyWaits(), pytest.raises((AssertionError, DataDependentOutputException)):
        WAITS[fault](torch.ones(3, device=GPU))


def test_head_dims_that_have_no_kernel():
    """Catches FlashAttention chosen for a device, dtype or head dim (not a multiple of 8 up to 256) that it refuses."""
    if attention.varlen_kernel() is None:
        pytest.skip("torch 2.11")
    with pytest.MonkeyPatch.context() as patch:
        for capability, dtype, head_dim, expected in (
            ((8, 0), torch.bfloat16, 128, True),
            ((8, 0), torch.bfloat16, 256, True),
            ((8, 0), torch.bfloat16, 100, False),
            ((8, 0), torch.bfloat16, 264, False),
            ((8, 0), torch.float32, 128, False),
            ((7, 5), torch.bfloat16, 128, False),
        ):
            patch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
            assert attention.has_varlen(GPU, dtype, head_dim) == expected
    assert not attention.has_varlen(CPU, torch.bfloat16, 128)


def test_one_stream_captures_all(monkeypatch):
    """Catches a new stream for each capture: torch keeps a workspace of its library for products on each, for ever."""
    captured, replayed = mock.Mock(return_value=nullcontext()), mock.Mock()
    for name, stand_in in {
        "graph": captured,
        "CUDAGraph": replayed,
        "stream": mock.Mock(side_effect=nullcontext),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("Stream", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    graphs.side_stream.cache_clear()
    runner = graphs.StepRunner(lambda size: size, 4, [])
    for size in (1, 2):
        runner(size)
        runner.forget()
    assert torch.cuda.Stream.call_count == 1 and captured.call_count == 2
    assert {call.kwargs["stream"] for call in captured.call_args_list} == {torch.cuda.Stream()}
    assert [call.args for call in torch.cuda.stream.call_args_list] == 2 * [(torch.cuda.Stream(),)]
    graphs.side_stream.cache_clear()


def test_peaks(monkeypatch):
    """Catches a card taken for another whose name is a part of its own (GH200, of which some have an H100's memory),
    and each of an MI250X's two devices, or a slice of a card, measured against the peaks of the whole."""
    for name, expected in (
        ("NVIDIA H200", (989e12, 4.8e12)),
        ("NVIDIA H200 NVL", (835e12, 4.8e12)),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 80GB HBM3", (989e12, 3.35e12)),
        ("NVIDIA H100 PCIe", (756e12, 2.0e12)),
        ("NVIDIA A100-SXM4-40GB", (312e12, 1.56e12)),
        ("NVIDIA A100-SXM4-80GB", (312e12, 2.04e12)),
        ("NVIDIA GH200 480GB", None),
        ("AMD Instinct MI250X", (191.5e12, 1.64e12)),
        ("AMD Instinct MI250X / MI250", (191.5e12, 1.64e12)),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 NVL", (835e12, 3.9e12)),
        ("NVIDIA A100-SXM-80GB", (312e12, 2.04e12)),
        ("NVIDIA GeForce RTX 4090", (165e12, 1.01e12)),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peaks(GPU) == expected, name
    assert peaks(CPU) is None


# ---------------------------------------------------------------------------------------- training

ROWS = [Example([1, *range(3, 3 + n)], [IGNORE_INDEX] * 2 + list(range(4, 3 + n))) for n in (4, 7)]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_step(gpu, dtype, optimizer):
    """Catches a CPU tensor in the forward, the losses' own forward and backward, the optimizers, and the inference copy
    with its refresh. (The engine of autograd itself needs a GPU.)"""
    with MostSelected():
        policy = on_gpu(dtype)
        batch = collate(ROWS, 0, GPU)
        hidden, weight = policy(batch.input_ids), policy.lm_head.weight
        assert losses.token_cross_entropy(hidden, weight, batch.labels).device == GPU
        saved = SimpleNamespace(save_for_backward=lambda *tensors: setattr(saved, "saved_tensors", tensors))
        rows, targets = hidden.detach().flatten(0, 1), batch.labels.flatten()
        with torch.no_grad():
            saved.set_materialize_grads = saved.mark_non_differentiable = lambda value: None
            saved.needs_input_grad = (True, True)
            several, fused = [(_CrossEntropySum, (True,)), (_TokenLogprobs, (0.7, True))], fused_head(GPU)
            several += [(fused.FusedLogprobs, (0.7, 9)), (fused._CrossEntropyOfChunks, (9,))] if fused else []
            for function, more in several:
                found = function.forward(saved, rows, weight, targets, 0, None, *more)
                grads = function.backward(saved, *(found if isinstance(found, tuple) else (found,)))
                assert [(g.device, g.shape, g.dtype) for g in grads[:2]] == [
                    (GPU, t.shape, t.dtype) for t in (rows, weight)
                ]
        update = optim.make_optimizer(policy, optim.OptimArgs(weight_decay=0.1, optim=optimizer))
        for parameter in policy.parameters():
            parameter.grad = torch.empty_like(parameter)
        for _ in range(2):
            update.step()
        copy = copy_for_inference(policy, pack=False)
        refresh(copy, policy)
        assert {t.device for t in (*copy.parameters(), *copy.buffers())} == {GPU}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_rows(gpu, dtype):
    """Catches attention over packed rows that waits for the GPU, or that builds the mask, rows x tokens^2 bytes, for a
    kernel that needs none."""
    attend = document_attention([[5, 3], [8]], 10, GPU, dtype, 32)
    assert attend.__name__ == ("variable_length" if dtype == torch.bfloat16 and attention.varlen_kernel() else "masked")
    q, k = (torch.empty(2, 10, heads, 32, dtype=dtype, device=GPU) for heads in (4, 2))
    with OnGPU():
        assert attend(0, q, k, k).shape == q.shape
    held = [cell.cell_contents for cell in attend.__closure__ or ()]
    largest = max((t.numel() for t in held if isinstance(t, torch.Tensor)), default=0)
    assert largest == (6 if attend.__name__ == "variable_length" else 2 * 10 * 10)


def test_a_kernel_that_cannot_run(gpu, monkeypatch):
    """Catches packed rows given to a variable-length kernel that torch has and this GPU cannot run."""
    monkeypatch.setattr(attention, "varlen_works", lambda *about: False)
    assert document_attention([[5, 3], [8]], 10, GPU, torch.bfloat16, 32).__name__ == "masked"
    assert attention.length_multiple(GPU, torch.bfloat16, 32) == 128


def test_scores_of_two_ranks(gpu, monkeypatch):
    """Catches scores that are exchanged between GPUs: score.py would start NCCL for these numbers alone."""
    exchanged, dp = [], mock.Mock(**{"size.return_value": 2, "get_local_rank.return_value": 0})
    monkeypatch.setattr(dist, "all_reduce", lambda values, group: exchanged.append(values.device))
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [0.0] * len(tensor))
    rows = [Scored([3, 4, 5, 6][:length], [length - 1], [1.0]) for length in (2, 3, 4)]
    assert step_scores(on_gpu(torch.float32, head="score"), rows, Split(2, dp, 0)) == 3 * [[0.0]]
    assert exchanged == [CPU]


def test_preferences_and_ppo(gpu):
    """Catches a CPU tensor in the losses of DPO, reward models and PPO, or in their inputs."""
    with MostSelected():
        policy, critic = on_gpu(torch.float32), on_gpu(torch.float32, head="score")
        batch = collate(ROWS, 0, GPU)
        logps, _ = losses.token_logps(policy(batch.input_ids), policy.lm_head.weight, batch.labels)
        sums, counts = losses.sequence_logps(logps, batch.labels)
        for kind in losses.DPO_LOSSES:
            pairs, lengths = torch.stack((sums, sums)), torch.stack((counts, counts))
            assert losses.dpo_loss(losses.DpoLossArgs(loss=kind), pairs, pairs, lengths).losses.device == GPU
        for split in (Split(2, None, 0), Split(2, None, 0, 20)):
            logps, _ = rollouts.answer_logps(policy, ROWS, 6, split, 0.7, entropy=True)
            values = rollouts.answer_values(critic, ROWS, 6, split)
        mask, scores = torch.ones(2, 6, dtype=torch.bool, device=GPU), values[:, 0]
        with OnGPU():
            losses.pairwise_loss(scores, scores, scores, 0.1)
            losses.pointwise_loss(scores, scores)
            rewards = losses.shaped_rewards(scores, logps, logps, mask, 0.1)
            advantages, returns = losses.gae(rewards, values, mask, 1.0, 0.95)
            advantages = losses.whiten(advantages, mask)
            losses.ppo_policy_loss(logps, logps, advantages, cliprange=0.2, dual_clip=3.0)
            losses.ppo_value_loss(values, values, returns, cliprange_value=0.2)
            losses.sequence_kl_loss(logps)
            losses.kl_k3(logps, logps)
