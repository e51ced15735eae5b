"""Simulates a GPU on a machine without one: fake tensors, which have a device but no values, stand-ins for the kernels,
and dispatch modes that raise where the GPU or the host would have to wait."""

import ctypes
import importlib.util
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import attention, decode_rows, paged_cache, qlinear, sampling, vocab_parallel
from models.config import ModelConfig
from models.graphs import StepRunner
from models.model import Transformer
from models.qlinear import Quantized, Scheme
from models.vocab_parallel import fused_head
from tests.stand_ins import Graph
from training import optim

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


def paged_decode(q, new_k, new_v, k, v, table, lengths, splits):
    """Stands in for models.triton_attention, checking its documented inputs; test_triton_kernels.py runs the kernel."""
    B = len(q)
    assert B <= 3 and q.shape == (B, 4, 32) and k.shape == v.shape == (4, 64, 2, 32) and table.shape == (B, 1)
    assert new_k.shape == new_v.shape == (B, 2, 32) and len(lengths) == B and splits == 4
    assert all(t.stride()[1:] == (32, 1) for t in (q, new_k, new_v)) and len({t.dtype for t in (q, new_k, k, v)}) == 1
    assert {t.dtype for t in (table, lengths)} == {torch.int32} and all(t.is_contiguous() for t in (k, v, table))
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def row_statistics(logits, targets, start, temperature):
    """Stands in for models.triton_head, checking its inputs; tests/training/test_triton_kernels.py runs the kernel."""
    assert logits.dim() == 2 and logits.is_contiguous() and targets.shape == logits.shape[:1]
    assert targets.dtype == torch.int64 and isinstance(start, int) and isinstance(temperature, float)
    return logits.new_empty(4, len(logits), dtype=torch.float32)


def to_gradients_(logits, targets, start, temperature, *of_rows):
    row_statistics(logits, targets, start, temperature)
    assert all(t.shape == targets.shape and t.dtype == torch.float32 and t.is_contiguous() for t in of_rows)


class TritonProducts(nn.Module):
    """Stands in for models.triton_linear, checking its documented inputs; test_triton_linear.py runs the kernel."""

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
        # torch without CUDA has no guard that tells the current GPU, and FakeTensorMode overrides it only in builds
        # with CUDA: the guard of the meta device (index 14), which does nothing, stands in for CUDA's (index 1)
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        registry = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
        registry[1] = registry[14]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(qlinear, "has_triton", lambda device: device.type == "cuda")
    monkeypatch.setattr(vocab_parallel, "has_triton", lambda device: importlib.util.find_spec("triton") is not None)
    monkeypatch.setattr(qlinear, "triton_products", TritonProducts)
    monkeypatch.setattr(paged_cache, "gpu_kernel", lambda device: paged_decode)
    monkeypatch.setattr(paged_cache, "num_splits", lambda *sizes: 4)
    for module in (attention, paged_cache):
        monkeypatch.setattr(module, "varlen_works", attention.has_varlen)
    monkeypatch.setattr(sampling, "has_triton", lambda device: False)  # its kernel needs values
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
    """Asserts that all tensors of all operations are on the GPU. Eager code accepts a CPU tensor of one number, but it
    would keep torch.compile from using CUDA graphs."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, found)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "cuda", f"{operator} on the CPU"
        return found


class OnGPUGraph(Graph):
    """A Graph whose replay asserts that all tensors are on the GPU."""

    def replay(self):
        with OnGPU():
            return super().replay()


class NobodyWaits(TorchDispatchMode):
    """Asserts that copies between host and GPU are non-blocking. Fake tensors raise where the host reads a value."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        if operator in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if operator is torch.ops.aten.copy_.default else args[0]
            is_async = (kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2])
            assert is_async or found.device.type == source.device.type, f"{operator} waits"
        return found


class Launches(TorchDispatchMode):
    """Counts operations that launch kernels: all but views and uninitialised allocations."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().partition("::")[2]
        is_free = operator.is_view or name.startswith(("empty", "detach", "new_empty", "_unsafe_view", "lift_fresh"))
        self.count += not is_free
        return operator(*args, **(kwargs or {}))


class MostSelected(TorchDispatchMode):
    """Decides what fake tensors cannot know: a selection takes all elements, and a step counter is 1."""

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
    """Returns what quantize() returns for a weight of this shape, without reading its values."""
    rows, columns = shape
    if scheme.mode == "int4":
        scale = torch.empty(rows, columns // scheme.group_size, dtype=torch.bfloat16, device=GPU)
        return Quantized(torch.empty(shape, dtype=torch.uint8, device=GPU), scale)
    small, of_scale = {"int8": (torch.int8, torch.bfloat16), "fp8": (torch.float8_e4m3fn, torch.float32)}[scheme.mode]
    return Quantized(torch.empty(shape, dtype=small, device=GPU), torch.empty(rows, 1, dtype=of_scale, device=GPU))
