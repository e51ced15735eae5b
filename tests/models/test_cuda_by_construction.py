"""What GPUs run, on a machine without one: the real code over fake tensors, which know their device and no numbers. A
tensor on another device, a shape that the CUDA kernels refuse and a host that waits for the GPU all raise here."""

import ctypes
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import attention, generation, paged_cache, qlinear
from models.attention import document_attention
from models.decode import copy_for_inference, refresh, to_inference
from models.generation import Engine, Request
from models.model import ModelConfig, Transformer
from models.qlinear import Quantized, QuantizedLinear, Scheme
from models.quantize import quantize_block, quantize_in_place
from models.records import IGNORE_INDEX, Example, Split, collate
from models.sampling import SamplingParams
from models.vocab_parallel import _CrossEntropySum, _TokenLogprobs
from training import losses, optim, rollouts

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = ModelConfig(
    vocab_size=500,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
SCHEMES = [None, Scheme("int8"), Scheme("int4", 32), Scheme("int4", 128), Scheme("fp8")]
PARAMS = {
    "greedy": SamplingParams(0.0, stop_token_ids=(7,)),
    "temperature": SamplingParams(0.7),
    "top_k": SamplingParams(1.0, top_k=5),
    "top_p": SamplingParams(1.0, top_p=0.9),
    "both": SamplingParams(0.7, top_k=5, top_p=0.9),
    "penalty": SamplingParams(0.7, top_k=5, repetition_penalty=1.3),
}


def paged_decode(q, k, v, table, lengths, splits):
    """What models.triton_attention says that it takes and gives; tests/models/test_triton_attention.py runs it."""
    assert q.shape == (3, 4, 32) and k.shape == v.shape == (4, 64, 2, 32) and table.shape == (3, 1) and splits == 4
    assert {t.dtype for t in (table, lengths)} == {torch.int32} and all(t.is_contiguous() for t in (q, k, v, table))
    return torch.empty_like(q)


class TritonProducts(nn.Module):
    """What models.triton_linear says that it takes and gives; tests/models/test_triton_linear.py runs it."""

    def __init__(self, weight: Quantized, scheme: Scheme):
        super().__init__()
        self.N, self.K = weight.values.shape
        assert weight.scale.shape == (self.N, scheme.num_groups(self.K)) and weight.scale.dtype == torch.bfloat16

    def forward(self, x):
        assert x.dim() == 2 and x.shape[1] == self.K
        return x.new_empty(len(x), self.N)


@pytest.fixture
def gpu(monkeypatch):
    """Fake tensors on a Hopper GPU with all kernels."""
    registry = None
    if torch.version.cuda is None and torch.version.hip is None:
        # torch without CUDA has nobody to ask for the current GPU, which FakeTensorMode overrides only in builds with
        # it: the guard of the meta device (index 14), which does nothing, stands in for CUDA's (index 1)
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        registry = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
        registry[1] = registry[14]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(qlinear, "has_triton", lambda: True)
    monkeypatch.setattr(qlinear, "triton_products", TritonProducts)
    monkeypatch.setattr(paged_cache, "gpu_kernel", lambda device: paged_decode)
    monkeypatch.setattr(paged_cache, "num_splits", lambda *sizes: 4)
    with FakeTensorMode():
        yield
    if registry is not None:
        registry[1] = None


class OnGPU(TorchDispatchMode):
    """All tensors of all operations are on the GPU; a number in a CPU tensor too would keep torch.compile from CUDA
    graphs, though eager code takes it."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, found)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "cuda", f"{operator} on the CPU"
        return found


class MostSelected(TorchDispatchMode):
    """Answers how many elements are chosen, which fake tensors do not know: all of them. And a step counter is 1."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.nonzero.default:
            return args[0].new_zeros(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if operator is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            return args[0].flatten(0, args[1][0].dim() - 1).clone()
        if operator is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "cpu":
            return 1
        return operator(*args, **(kwargs or {}))


def on_gpu(dtype: torch.dtype, head: str = "lm") -> Transformer:
    with torch.device("meta"):
        transformer = Transformer(CONFIG, torch.bfloat16, head=head)
    for module in transformer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=GPU))
    transformer.reset_buffers(GPU)
    return transformer


def quantised_on_gpu(shape: torch.Size, scheme: Scheme) -> Quantized:
    """quantize() of a weight, less its look at the numbers."""
    rows, columns = shape
    if scheme.mode == "int4":
        scale = torch.empty(rows, columns // scheme.group_size, dtype=torch.bfloat16, device=GPU)
        return Quantized(torch.empty(shape, dtype=torch.uint8, device=GPU), scale)
    small, of_scale = {"int8": (torch.int8, torch.bfloat16), "fp8": (torch.float8_e4m3fn, torch.float32)}[scheme.mode]
    return Quantized(torch.empty(shape, dtype=small, device=GPU), torch.empty(rows, 1, dtype=of_scale, device=GPU))


def make_engine(params: SamplingParams, scheme: Scheme | None = None) -> Engine:
    transformer = on_gpu(torch.bfloat16)
    for block in transformer.layers if scheme else ():
        get = block.get_parameter
        weight_of = lambda name, get=get: quantised_on_gpu(get(name).shape, scheme)  # noqa: E731
        quantize_block(block, "", weight_of, get, scheme, torch.bfloat16)
    engine = Engine(to_inference(transformer, pack=False), params, num_slots=3, max_seq_len=64, look_every=2)
    step = engine._step

    def on_gpu_only(most_pages):
        with OnGPU():
            return step(most_pages)

    engine._step = on_gpu_only
    return engine


def generate(engine: Engine, monkeypatch) -> list:
    """Runs the engine to its end; what the host reads of the GPU, which must be lists, are zeros."""
    zeros = lambda shape: [zeros(shape[1:]) for _ in range(shape[0])] if shape else 0  # noqa: E731
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: zeros(tensor.shape))
    requests = [Request(i, 0, [3, 4, 5, 6][: 2 + i // 2], 5) for i in range(5)]  # two share a prefill, two wait
    return list(engine.generate(requests))


@pytest.mark.parametrize("name, kernel", [*((name, True) for name in PARAMS), ("both", False)])
def test_generation(gpu, name, kernel, monkeypatch):
    """Catches a CPU tensor on the way from prompts to tokens, and in a decode step a host that waits for the GPU."""
    if not kernel:  # no Triton
        monkeypatch.setattr(paged_cache, "gpu_kernel", lambda device: None)
    done = generate(make_engine(PARAMS[name]), monkeypatch)
    assert sorted(c.request.idx for c in done) == list(range(5)) and all(len(c.token_ids) == 5 for c in done)


@pytest.mark.parametrize("scheme, kernel", [*((scheme, True) for scheme in SCHEMES[1:]), (SCHEMES[2], False)], ids=str)
def test_quantised_generation(gpu, scheme, kernel, monkeypatch):
    """Catches shapes, dtypes or layouts that the CUDA products refuse (fp8: a column-major weight, scales [M, 1] and
    [1, N]), a product that does not take its kernel, and one that fails where there is no Triton."""
    monkeypatch.setattr(qlinear, "has_triton", lambda: kernel)
    engine = make_engine(PARAMS["both"], scheme)
    kernels = {module.kernel for module in engine.modules() if isinstance(module, QuantizedLinear)}
    assert kernels == {("fp8" if scheme.mode == "fp8" else "triton") if kernel else None}
    assert len(generate(engine, monkeypatch)) == 5
    weight = quantised_on_gpu((24, 128), scheme)  # fp8: the kernel does not take 24 features
    layer = QuantizedLinear([weight], [torch.empty(24, device=GPU)], scheme, torch.bfloat16)
    for rows in (1, 17):
        assert layer(torch.empty(rows, 128, dtype=torch.bfloat16, device=GPU)).shape == (rows, 24)


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
    whole = generation.sample
    engine = make_engine(PARAMS["greedy"])
    monkeypatch.setattr(generation, "sample", lambda logits, *args: whole(change(logits), *args))
    expected = (
        {"expected_exception": seen} if isinstance(seen, type) else {"expected_exception": Exception, "match": seen}
    )
    with pytest.raises(**expected):
        engine._step(None)


def test_head_dims_that_have_no_kernel():
    """Catches FlashAttention for a device, a dtype or a head dim that it refuses (a multiple of 8 up to 256)."""
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
            for function, more in ((_CrossEntropySum, (True,)), (_TokenLogprobs, (0.7, True))):
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
    """Catches packed rows whose attention waits for the GPU, or that make the mask, rows x tokens^2 bytes, for a kernel
    that needs none."""
    attend = document_attention([[5, 3], [8]], 10, GPU, dtype, 32)
    assert attend.__name__ == ("variable_length" if dtype == torch.bfloat16 and attention.varlen_kernel() else "masked")
    q, k = (torch.empty(2, 10, heads, 32, dtype=dtype, device=GPU) for heads in (4, 2))
    with OnGPU():
        assert attend(0, q, k, k).shape == q.shape
    held = [cell.cell_contents for cell in attend.__closure__ or ()]
    largest = max((t.numel() for t in held if isinstance(t, torch.Tensor)), default=0)
    assert largest == (6 if attend.__name__ == "variable_length" else 2 * 10 * 10)


def test_preferences_and_ppo(gpu):
    """Catches a CPU tensor in what DPO, reward models and PPO compute of their tokens."""
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
            losses.kl_estimates(logps, logps)


# --------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize(
    "scheme, dtype",
    [
        *((scheme, torch.float32) for scheme in (None, Scheme("int8"), Scheme("int4", 32), Scheme("fp8"))),
        *((scheme, torch.bfloat16) for scheme in (None, Scheme("int4", 128))),
    ],
    ids=str,
)
def test_compiled_step(scheme, dtype, monkeypatch):
    """Catches a decode step that is not one graph, that is compiled again for another length, that moves its state, or
    that takes a tensor which belongs to no module: CUDA graphs copy such a tensor before each replay, and torch.compile
    does without them where it is changed in place. And the graph computes what the step does (in fp32: the same tokens;
    in bf16, whose rounding chooses others, the same log-probs at first)."""
    transformer = Transformer(replace(CONFIG, num_hidden_layers=1))
    transformer.init_weights(torch.Generator().manual_seed(0))
    transformer = transformer.to(dtype)
    transformer.reset_buffers(CPU)
    for block in transformer.layers if scheme else ():
        quantize_in_place(block, scheme)
    transformer = to_inference(transformer, pack=False)
    most = 25 if scheme else 40
    options = {"num_slots": 3, "max_seq_len": 100 if scheme is None else 64, "compile": True, "look_every": 4}
    taken = []

    def inner(graph, inputs, *, static_input_idxs, **options):
        taken.append((len(inputs), len(static_input_idxs)))
        return graph.forward

    compile_ = torch.compile
    backend = lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner)  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, **options, backend=backend))
    requests = [Request(i, 0, [(7 * i + j) % 490 + 3 for j in range(3 + 8 * i)], most) for i in range(5)]
    params = PARAMS["both" if dtype == torch.float32 else "greedy"]
    engine, plain = Engine(transformer, params, **options), Engine(transformer, params, **options)
    plain._step = plain._decode_step
    addresses = [buffer.data_ptr() for buffer in engine.buffers()]
    try:
        found, wanted = ({c.request.idx: c for c in e.generate(requests)} for e in (engine, plain))
    except (RuntimeError, NotImplementedError) as error:
        if scheme and scheme.mode == "fp8" and "scaled_mm" in str(error):
            pytest.skip(f"no fp8 product here: {error}")  # torch 2.11 on the CPU
        raise
    assert len(taken) == 1 and all(inputs == static for inputs, static in taken)
    assert addresses == [buffer.data_ptr() for buffer in engine.buffers()]
    for idx, completion in wanted.items():
        if dtype == torch.float32:
            assert found[idx].token_ids == completion.token_ids
        assert found[idx].logprobs[1] == pytest.approx(
            completion.logprobs[1], abs=1e-4 if dtype == torch.float32 else 0.05
        )
