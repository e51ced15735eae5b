"""What GPUs run, on a machine without one: the real code over fake tensors, which know their device and no numbers. A
tensor on another device, a shape that the CUDA kernels refuse and a host that waits for the GPU all raise here."""

import ctypes
import importlib.util
from dataclasses import fields, replace
from functools import partial
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

from models import attention, decode_rows, paged_cache, qlinear, sampling, vocab_parallel
from models.attention import document_attention
from models.decode import copy_for_inference, refresh, to_inference
from models.generation import Engine, Request
from models.graphs import StepRunner
from models.model import ModelConfig, Transformer
from models.paged_cache import Chunk
from models.qlinear import Quantized, QuantizedLinear, Scheme
from models.quantize import quantize_block, quantize_in_place
from models.records import IGNORE_INDEX, Example, Split, collate
from models.reward import Pair, Scored
from models.sampling import SamplingParams
from models.scheduler import Prefill
from models.transfer import index_on, to_device
from models.vocab_parallel import _CrossEntropySum, _TokenLogprobs, fused_head
from tests.stand_ins import Graph
from training import finetune_sft, losses, optim, rollouts, train_dpo, train_grpo, train_ppo, train_rm
from training.groups import Groups

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
    """What models.triton_attention says that it takes and gives; tests/models/test_triton_kernels.py runs it."""
    B = len(q)
    assert B <= 3 and q.shape == (B, 4, 32) and k.shape == v.shape == (4, 64, 2, 32) and table.shape == (B, 1)
    assert len(lengths) == B and splits == 4
    assert {t.dtype for t in (table, lengths)} == {torch.int32} and all(t.is_contiguous() for t in (q, k, v, table))
    return torch.empty_like(q)


def row_statistics(logits, targets, start, temperature):
    """What models.triton_head says that it takes and gives; tests/training/test_triton_kernels.py runs it."""
    assert logits.dim() == 2 and logits.is_contiguous() and targets.shape == logits.shape[:1]
    assert targets.dtype == torch.int64 and isinstance(start, int) and isinstance(temperature, float)
    return logits.new_empty(4, len(logits), dtype=torch.float32)


def to_gradients_(logits, targets, start, temperature, *of_rows):
    row_statistics(logits, targets, start, temperature)
    assert all(t.shape == targets.shape and t.dtype == torch.float32 and t.is_contiguous() for t in of_rows)


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
    monkeypatch.setattr(qlinear, "has_triton", lambda device: device.type == "cuda")
    monkeypatch.setattr(vocab_parallel, "has_triton", lambda device: importlib.util.find_spec("triton") is not None)
    monkeypatch.setattr(qlinear, "triton_products", TritonProducts)
    monkeypatch.setattr(paged_cache, "gpu_kernel", lambda device: paged_decode)
    monkeypatch.setattr(paged_cache, "num_splits", lambda *sizes: 4)
    monkeypatch.setattr(paged_cache, "varlen_works", attention.has_varlen)
    monkeypatch.setattr(sampling, "has_triton", lambda device: False)  # its kernel needs numbers
    monkeypatch.setattr(decode_rows, "StepRunner", partial(StepRunner, graph=OnGPUGraph))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    monkeypatch.setattr(optim, "gpu_kernel", lambda device: None)  # tests/training/test_triton_kernels.py
    if (fused := fused_head(GPU)) is not None:
        monkeypatch.setattr(fused.triton_head, "row_statistics", row_statistics)
        monkeypatch.setattr(fused.triton_head, "to_gradients_", to_gradients_)
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


class OnGPUGraph(Graph):
    """What is captured is on the GPU alone."""

    def replay(self):
        with OnGPU():
            return super().replay()


class NobodyWaits(TorchDispatchMode):
    """No copy between host and GPU that one of them waits for, and no number that the host reads of it."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        if operator in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if operator is torch.ops.aten.copy_.default else args[0]
            is_async = (kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2])
            assert is_async or found.device.type == source.device.type, f"{operator} waits"
        return found


class Launches(TorchDispatchMode):
    """Counts operations that launch kernels: all but views, and memory that is taken as it is."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().partition("::")[2]
        is_free = operator.is_view or name.startswith(("empty", "detach", "new_empty", "_unsafe_view", "lift_fresh"))
        self.count += not is_free
        return operator(*args, **(kwargs or {}))


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
    model, shape = to_inference(transformer, pack=False), {"num_slots": 3, "max_seq_len": 64}
    return Engine(model, params, **shape, look_every=2, prefill_tokens=4, compile=True)


def generate(engine: Engine, monkeypatch) -> list:
    """Runs the engine to its end; what the host reads are lists of zeros, which must have come to it by the way."""

    def tolist(tensor):
        assert tensor.device.type == "cpu"
        zeros = lambda shape: [zeros(shape[1:]) for _ in range(shape[0])] if shape else 0  # noqa: E731
        return zeros(tensor.shape)

    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    requests = [Request(i, 0, [3, 4, 5, 6][: 2 + i // 2], 5) for i in range(5)]  # two share a prefill, two wait
    with NobodyWaits():
        return list(engine.generate(requests))


@pytest.mark.parametrize("name, kernel", [*((name, True) for name in PARAMS), ("both", False)])
def test_generation(gpu, name, kernel, monkeypatch):
    """Catches a CPU tensor on the way from prompts to tokens, a host or a GPU that waits for the other, and a part of a
    step that cannot be captured."""
    if not kernel:  # no Triton
        monkeypatch.setattr(paged_cache, "gpu_kernel", lambda device: None)
    done = generate(make_engine(PARAMS[name]), monkeypatch)
    assert sorted(c.request.idx for c in done) == list(range(5)) and all(len(c.token_ids) == 5 for c in done)


@pytest.mark.parametrize("scheme, kernel", [*((scheme, True) for scheme in SCHEMES[1:]), (SCHEMES[2], False)], ids=str)
def test_quantised_generation(gpu, scheme, kernel, monkeypatch):
    """Catches shapes, dtypes or layouts that the CUDA products refuse (fp8: a column-major weight, scales [M, 1] and
    [1, N]), a product that does not take its kernel, and one that fails where there is no Triton."""
    monkeypatch.setattr(qlinear, "has_triton", lambda device: kernel)
    engine = make_engine(PARAMS["both"], scheme)
    kernels = {module.kernel for module in engine.modules() if isinstance(module, QuantizedLinear)}
    assert kernels == {("fp8" if scheme.mode == "fp8" else "triton") if kernel else None}
    assert len(generate(engine, monkeypatch)) == 5
    weight = quantised_on_gpu((24, 128), scheme)  # fp8: the kernel does not take 24 features
    layer = QuantizedLinear([weight], [torch.empty(24, device=GPU)], scheme, torch.bfloat16)
    for rows in (1, 17):
        assert layer(torch.empty(rows, 128, dtype=torch.bfloat16, device=GPU)).shape == (rows, 24)


def test_launches_of_a_prefill_do_not_grow_with_prompts(gpu):
    """Catches a prefill that goes through its prompts, or the chunks that have pages from before, one by one."""
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
    """NobodyWaits bites."""
    with NobodyWaits(), pytest.raises((AssertionError, DataDependentOutputException)):
        WAITS[fault](torch.ones(3, device=GPU))


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


# ------------------------------------------------------------------------------------ what is compiled


class Compiled:
    """Stands in for the compiler behind torch.compile: counts what it is given, and runs it."""

    def __init__(self, monkeypatch):
        self.count, compile_ = 0, torch.compile
        monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=self.take))

    def take(self, graph, inputs):
        self.count += 1
        return graph.forward


def on_cpu(num_layers: int, dtype: torch.dtype = torch.float32, scheme: Scheme | None = None) -> Transformer:
    transformer = Transformer(replace(CONFIG, num_hidden_layers=num_layers))
    transformer.init_weights(torch.Generator().manual_seed(0))
    transformer = transformer.to(dtype)
    transformer.reset_buffers(CPU)
    for block in transformer.layers if scheme else ():
        quantize_in_place(block, scheme)
    return to_inference(transformer, pack=False)


def test_compilations_do_not_grow(monkeypatch):
    """Catches code that is compiled for each layer, for a length, for a number of rows or of prompts, or once more for
    another engine: blocks before and after attention, sampling of first tokens, and the end of a step, for any number
    of tokens and for one."""
    compiled, found = Compiled(monkeypatch), []
    for num_layers, num_engines in ((2, 2), (32, 1)):
        torch._dynamo.reset()
        for _ in range(num_engines):
            options = {"num_slots": 5, "max_seq_len": 200, "look_every": 3}
            engine = Engine(on_cpu(num_layers), PARAMS["temperature"], **options, compile=True)
            for lengths in ([10, 20, 30], [7], [1], [150, 3, 2, 1, 77, 9]):
                prompts = ([(3 * i + j) % 490 + 3 for j in range(length)] for i, length in enumerate(lengths))
                requests = [Request(i, 0, prompt, 3 + i) for i, prompt in enumerate(prompts)]
                assert len(list(engine.generate(requests))) == len(requests)
        found.append(compiled.count)
    assert found == [7, 14]


@pytest.mark.parametrize(
    "scheme, dtype",
    [
        *((scheme, torch.float32) for scheme in (None, Scheme("int8"), Scheme("int4", 32), Scheme("fp8"))),
        *((scheme, torch.bfloat16) for scheme in (None, Scheme("int4", 128))),
    ],
    ids=str,
)
def test_what_is_compiled_computes_the_same(scheme, dtype, monkeypatch):
    """Catches graphs that torch.compile makes of a block or of sampling that compute something else (in fp32: the same
    tokens; in bf16, whose rounding chooses others, the same log-probs at first), and state that it moves."""
    transformer, most = on_cpu(1, dtype, scheme), 25 if scheme else 40
    options = {"num_slots": 3, "max_seq_len": 100 if scheme is None else 64, "look_every": 4}
    inner = lambda graph, inputs, **options: graph.forward  # noqa: E731
    backend, compile_ = lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=backend))
    requests = [Request(i, 0, [(7 * i + j) % 490 + 3 for j in range(3 + 8 * i)], most) for i in range(5)]
    params = PARAMS["both" if dtype == torch.float32 else "greedy"]
    engine, plain = (Engine(transformer, params, **options, compile=compile) for compile in (True, False))

    def addresses():
        return {name: b.data_ptr() for name, b in engine.rows.named_buffers() if not name.startswith("model.")}

    before = addresses()
    try:
        found, wanted = ({c.request.idx: c for c in e.generate(requests)} for e in (engine, plain))
    except (RuntimeError, NotImplementedError) as error:
        if scheme and scheme.mode == "fp8" and "scaled_mm" in str(error):
            pytest.skip(f"no fp8 product here: {error}")  # torch 2.11 on the CPU
        raise
    assert addresses() == before and "tokens" in before
    for idx, completion in wanted.items():
        if dtype == torch.float32:
            assert found[idx].token_ids == completion.token_ids
        assert found[idx].logprobs[1] == pytest.approx(
            completion.logprobs[1], abs=1e-4 if dtype == torch.float32 else 0.05
        )


# ---------------------------------------------------------------------------------- micro-batches

ANSWERS = [Example([1, *range(3, 3 + n)], [IGNORE_INDEX] * 3 + list(range(5, 3 + n))) for n in (4, 7, 5)]
PAIRS = [Pair(3, ANSWERS[0], ANSWERS[1], 0.5, (-3.0, -4.0)), Pair(3, ANSWERS[1], ANSWERS[2], None, (-2.0, -5.0))]
STEPS = [Scored([1, 4, 5, 6, 7], [2, 4], [0.0, 1.0]), Scored([1, 4, 5], [2], [0.5])]
ONE_RANK = SimpleNamespace(size=lambda: 1, get_local_rank=lambda: 0)
SPLITS = {"padded": Split(2, ONE_RANK, 0), "packed": Split(2, ONE_RANK, 0, 40)}


def flags_of_run(Args: type, **given):
    """Args with nothing else that must be given."""
    paths = {
        "checkpoint_path": Path("in"),
        "output_dir": Path("out"),
        "train_file": Path("t"),
        "prompt_file": Path("p"),
    }
    names = {field.name for field in fields(Args)}
    return Args(**{name: path for name, path in paths.items() if name in names}, **given)


def sft(model, critic, split):
    (finetune_sft.summed_loss(model, ANSWERS, split) * 2.0**-3).backward()


def dpo(model, critic, split):
    args = flags_of_run(train_dpo.DpoArgs, micro_batch_size=2)
    loss, sums = train_dpo.summed_loss(model, None, PAIRS, args, split)
    (loss * 2.0**-1).backward()
    sums += sums


def reward_model(model, critic, split):
    for kind, rows in (("pairwise", PAIRS), ("process", STEPS)):
        args = flags_of_run(train_rm.RmArgs, loss=kind)
        rewards, targets = train_rm.rewards_of(critic, rows, split)
        (train_rm.losses_of(args, rewards, targets).sum() * 0.5).backward()
        all_rewards = torch.zeros(8, device=rewards.device)
        all_rewards.index_copy_(0, index_on(range(len(rewards)), rewards.device), rewards.detach())


def rollout_of(device):
    mask = to_device([[True] * 2 + [False] * 3, [True] * 5, [True] * 3 + [False] * 2], device)
    values = torch.zeros(3, 5, device=device)
    return mask, values, rollouts.Rollout(ANSWERS, [], [], mask, values, values, values, None, {}, values)


def ppo(model, critic, split):
    mask, values, rollout = rollout_of(model.inv_freq.device)
    ones = torch.ones_like(values)
    update = train_ppo.Update(rollout, mask, values, ones, ones, values[0, 0], 0.1, [2, 5, 3])
    for more in ({}, {"tis_cap": 2.0, "entropy_coef": 0.1, "kl_in": "loss", "dual_clip": 3.0}):
        args, sums = flags_of_run(train_ppo.PpoArgs, **more), rollouts.TokenSums(values.device)
        train_ppo.policy_backward(model, update, [2, 0, 1], args, split, sums)
        train_ppo.value_backward(critic, update, [2, 0, 1], args, split, sums)


def grpo(model, critic, split):
    mask, values, _ = rollout_of(model.inv_freq.device)
    for kind in ("dapo", "gspo", "cispo", "rloo"):
        for logps in (None, values):
            args, sums = flags_of_run(train_grpo.GrpoArgs, loss_type=kind, beta=0.1), rollouts.TokenSums(values.device)
            advantages, clipped = values[:, 0] + 1, torch.zeros(2, 3, device=values.device)
            made = (advantages, 0.0, values, logps, values, values.clone(), clipped)
            groups = Groups(ANSWERS, mask, mask, [2, 5, 3], *made)
            train_grpo.backward(model, groups, [1, 0, 2], args, split, sums)


TRAINERS = [sft, dpo, reward_model, ppo, grpo]


class NothingWaits(TorchDispatchMode):
    """Refuses what would hold the host until a GPU is through: a look at a number, a shape that numbers decide, and a
    copy between host and GPU that is not asked not to block."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward", "is_nonzero", "equal")

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operator.overloadpacket.__name__
        assert name not in self.WAITS and not name.startswith("unique"), f"{name} waits"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as an index waits"
        found = operator(*args, **kwargs)
        devices = {tensor.device.type for tensor in tree_leaves((args, found)) if isinstance(tensor, torch.Tensor)}
        if len(devices) > 1 and not any(isinstance(t, torch.Tensor) and not t.dim() for t in tree_leaves(args)):
            does_not_block = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
            assert does_not_block, f"{name} between {devices} waits"
        return found


@pytest.fixture
def plain(monkeypatch):
    """Models that no FSDP holds."""
    for script in (train_ppo, train_grpo):
        monkeypatch.setattr(script, "reducing_gradients", lambda model, parts, every: parts)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_micro_batches_wait_for_nobody(gpu, plain, trainer, monkeypatch):
    """Catches a batch, an index or a number that is sent with a wait, and a look at a result: each would leave the GPU
    without work until the host has seen it. Less the backward, which needs a GPU."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    policy, critic = on_gpu(torch.bfloat16), on_gpu(torch.bfloat16, head="score")
    for split in SPLITS.values():
        with NothingWaits():
            trainer(policy, critic, split)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_backwards_wait_for_nobody(plain, trainer):
    """Catches the same in the gradient of an operation: masked_scatter's, say, asks how much was chosen."""
    models = [Transformer(CONFIG, head=head) for head in ("lm", "score")]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(0))
        model.reset_buffers(CPU)
    for split in SPLITS.values():
        with NothingWaits():
            trainer(*models, split)
    assert any(p.grad is not None and p.grad.any() for model in models for p in model.parameters())


def test_waits_are_seen(gpu):
    """The tests above bite."""
    x = torch.empty(3, 4, device=GPU)
    for wait in (
        lambda: torch.tensor([1, 2], device=GPU),
        lambda: torch.arange(3).to(GPU),
        lambda: x[x > 0],
        lambda: x[[0, 1]],
        lambda: x.cpu(),
        lambda: x.sum().item(),
        lambda: (x > 0).nonzero(),
    ):
        with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)), NothingWaits():
            wait()
