"""Attention functions that Transformer.forward takes as its argument `attend`: for training and for packed rows.

The generation engine passes its own, which write and read its KV cache: models/paged_cache.py and decode_cpu.py.

Dimensions: B batch, T query tokens, H query heads, K key/value heads, D head dim.
"""

import contextlib
import inspect
from collections.abc import Callable
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.gpu import has_bf16_cores
from models.transfer import to_device

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes causal attention, or attention under a boolean mask, [T, S] or [B, 1, T, S]. q [B, T, H, D], k and v
    [B, T, K, D], with a mask [B, S, K, D] -> [B, T, H, D].

    Right padding needs no mask: no real token attends to it.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    groups, kernels = q.shape[1] // k.shape[1], contextlib.nullcontext()
    if q.device.type == "cuda":
        if groups > 1 and (mask is not None or q.dtype == torch.float32):  # no fused kernel supports GQA here
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        # cuDNN takes 20 to 40 ms to plan each new length, so it is for training only, whose rows have few lengths, and
        # without a mask: with one its backward is wrong in torch 2.11 (https://github.com/pytorch/pytorch/issues/196678)
        if mask is not None or not torch.is_grad_enabled():
            kernels = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    with kernels:
        options = {"is_causal": mask is None, "attn_mask": mask, "enable_gqa": q.shape[1] != k.shape[1]}
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


@cache
def varlen_kernel() -> Callable[..., Tensor] | None:
    """Returns torch's variable-length kernel (FlashAttention 2), causal attention of sequences packed end to end; None
    where torch lacks it. Arguments: q [N, H, D], k and v [S, K, D], the cumulative lengths of the sequences in q and in
    k (int32, from 0), the longest of each -> [N, H, D]. A sequence's last query attends to all its keys.

    Before torch 2.13 the kernel has no GQA, so keys and values are repeated. Imported on first use, because the import
    loads the compiler, which takes a second.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters.keys()
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if not causal.keys() <= known:
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, *ends_and_longest) -> Tensor:
        groups, options = q.shape[1] // k.shape[1], causal
        if groups > 1 and "enable_gqa" in known:
            options = causal | {"enable_gqa": True}
        elif groups > 1:
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        return varlen_attn(q, k, v, *ends_and_longest, **options)

    return kernel


@cache
def varlen_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether varlen_kernel supports this device, dtype and head dim, and aligns queries with the end of the keys (not
    every version does); tried once on a sequence of 2 queries and 4 keys."""
    if not has_varlen(device, dtype, head_dim):
        return False
    q, k = (torch.zeros(n, 1, head_dim, dtype=dtype, device=device) for n in (2, 4))
    v = torch.arange(4, device=device, dtype=dtype)[:, None, None].expand_as(k).contiguous()
    ends = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (2, 4)]
    try:
        return varlen_kernel()(q, k, v, *ends, 2, 4)[:, 0, 0].tolist() == [1.0, 1.5]
    except RuntimeError:
        return False


def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether varlen_kernel supports this device, dtype and head dim; without trying it."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return False
    return has_bf16_cores(device) and varlen_kernel() is not None


def length_multiple(device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """Returns the multiple to which rows of tokens are padded: SDPA on a GPU takes 20 to 40 ms to plan each new length,
    and chooses its kernel by the length's divisors. With a mask cuDNN's gradient is NaN on an H100 if the length modulo
    128 is 64 (torch 2.11 on, https://github.com/pytorch/pytorch/issues/196678)."""
    if device.type == "cpu":
        return 1
    return 64 if varlen_works(device, dtype, head_dim) else 128


def document_attention(
    lengths: list[list[int]],
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    compiled: bool = False,
) -> Attend:
    """Returns causal attention within the documents of packed rows. lengths[b]: of the documents of row b, end to end;
    the rest of its num_tokens is padding. dtype: of the activations. compiled: whether the caller is compiled.

    CUDA in 16 bits uses the variable-length kernel, where it works. A CPU computes document by document, since a mask
    costs the square of the row's length. Others use a mask; so do compiled callers on a CPU, which would be recompiled
    for each length.
    """
    lengths = [[*row, num_tokens - sum(row)] if sum(row) < num_tokens else row for row in lengths]
    flat = [length for row in lengths for length in row]

    if varlen_works(device, dtype, head_dim):
        ends, longest = to_device([0, *accumulate(flat)], device, torch.int32), max(flat)
        kernel = varlen_kernel()

        def variable_length(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = (t.flatten(0, 1) for t in (q, k, v))
            return kernel(*rows, ends, ends, longest, longest).view(q.shape)

        return variable_length
    if device.type == "cpu" and not compiled:

        def one_by_one(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(*(t.flatten(0, 1).split(flat) for t in (q, k, v)))
            return torch.cat([causal_attention(layer, *(t[None] for t in part))[0] for part in parts]).view(q.shape)

        return one_by_one
    size = len(lengths) * num_tokens  # given to repeat_interleave to avoid a host sync
    document = torch.repeat_interleave(to_device(flat, device), output_size=size).view(-1, num_tokens)  # [B, T]
    places = torch.arange(num_tokens, device=device)
    mask = (document[:, :, None] == document[:, None, :]) & (places[:, None] >= places)  # [B, T, T]

    def masked(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(layer, q, k, v, mask[:, None])

    return masked
