"""Attention as an argument: what Transformer.forward takes as `attend`, for training and for packed rows.

The generation engine has its own, which write and read its cache: models/decode.py.

Dimensions: B batch, T query tokens, H query heads, K key/value heads, D head dim.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from models.transfer import to_device

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each token sees itself and the earlier ones of its row, or what the mask [T, S] lets it. q [B, T, H, D], k and v
    [B, T, K, D], with a mask [B, S, K, D] -> [B, T, H, D].

    Right padding needs no mask: no real token ever sees it.
    """
    return _sdpa(q, k, v, is_causal=True) if mask is None else _sdpa(q, k, v, attn_mask=mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **mask).transpose(1, 2)


def packed_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dtype: torch.dtype) -> Tensor:
    """causal_attention of documents packed end to end in rows of sum(lengths) tokens in all, each on its own, computed
    in dtype."""
    parts = zip(*(t.flatten(0, 1).to(dtype).split(lengths) for t in (q, k, v)))
    outputs = [causal_attention(layer, *(t[None] for t in part))[0] for part in parts]
    return torch.cat(outputs).view(q.shape).to(q.dtype)


@cache
def varlen_kernel() -> Callable | None:
    """torch's variable-length attention, FlashAttention 2, with grouped heads; None in torch 2.11 and older. Imported
    when it is asked for, since it brings the compiler along: a second of start-up."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys() else None


def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether varlen_kernel serves this device, dtype and head dim."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return varlen_kernel() is not None


def length_multiple(device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """What rows of tokens are padded to a multiple of: a GPU's SDPA makes a plan for each new length, 20 to 40 ms, and
    chooses kernels by what divides it. With a mask cuDNN's gradient is NaN on an H100 where 64 is left of 128 (torch
    2.11 on, https://github.com/pytorch/pytorch/issues/196678)."""
    if device.type == "cpu":
        return 1
    return 64 if has_varlen(device, dtype, head_dim) else 128


def document_attention(
    lengths: list[list[int]],
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    compiled: bool = False,
) -> Attend:
    """Causal attention within the documents that rows were packed from: lengths[b] are those of row b, end to end; what
    follows them in a row of num_tokens is padding. dtype: of the activations. compiled: whether the caller is.

    CUDA in 16 bits uses the variable-length kernel, where torch has it with grouped heads (2.12 on). The CPU takes one
    document after the other: a mask costs the square of the row. Others use a mask, and so does a compiled caller,
    which would be compiled anew for other lengths.
    """
    lengths = [[*row, num_tokens - sum(row)] if sum(row) < num_tokens else row for row in lengths]
    flat = [length for row in lengths for length in row]

    if has_varlen(device, dtype, head_dim):
        ends, longest = to_device([0, *accumulate(flat)], device, torch.int32), max(flat)
        kernel = varlen_kernel()

        def variable_length(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            options = {"window_size": (-1, 0), "enable_gqa": q.shape[2] != k.shape[2]}
            rows = (t.flatten(0, 1) for t in (q, k, v))
            return kernel(*rows, ends, ends, longest, longest, **options).view(q.shape)

        return variable_length
    if device.type == "cpu" and not compiled:
        return partial(packed_attention, lengths=flat, dtype=dtype)
    size = len(lengths) * num_tokens  # else torch asks the device for it
    document = torch.repeat_interleave(to_device(flat, device), output_size=size)
    document = document.view(-1, num_tokens)  # [B, T]
    places = torch.arange(num_tokens, device=device)
    mask = (document[:, :, None] == document[:, None, :]) & (places[:, None] >= places)  # [B, T, T]

    def masked(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(q, k, v, attn_mask=mask[:, None])

    return masked
