"""top-p on a GPU without sorting, as a Triton kernel: see models.sampling.top_p_threshold, which is its oracle.

Dimensions: B rows, V' logits of each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 4096, 16  # one program reads a row 34 times, from the second time on from the cache


@triton.jit
def _ordered(bits):
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def find_thresholds(logits, thresholds, top_p, num_columns, row_stride, BLOCK: tl.constexpr):
    """One program: the threshold of a row. logits fp32 [B, V'], thresholds fp32 [B]"""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * row_stride
    columns = tl.arange(0, BLOCK)
    maxima = tl.full((BLOCK,), -float("inf"), tl.float32)
    for first in range(0, num_columns, BLOCK):
        x = tl.load(start + first + columns, mask=first + columns < num_columns, other=-float("inf"))
        maxima = tl.maximum(maxima, x)
    largest = tl.max(maxima, axis=0)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_columns, BLOCK):
        x = tl.load(start + first + columns, mask=first + columns < num_columns, other=-float("inf"))
        sums += tl.exp(x - largest)
    wanted = top_p * tl.sum(sums, axis=0)
    high = _ordered(largest.to(tl.int32, bitcast=True)).to(tl.int64)
    low = tl.full((), -2139095041, tl.int64)  # of -inf
    for _ in range(32):
        middle = (low + high) >> 1
        threshold = _ordered(middle.to(tl.int32)).to(tl.float32, bitcast=True)
        sums = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, num_columns, BLOCK):
            x = tl.load(start + first + columns, mask=first + columns < num_columns, other=-float("inf"))
            sums += tl.where(x > threshold, tl.exp(x - largest), 0.0)
        has_less = tl.sum(sums, axis=0) < wanted
        low = tl.where(has_less, low, middle + 1)
        high = tl.where(has_less, middle, high)
    tl.store(thresholds + row, _ordered(high.to(tl.int32)).to(tl.float32, bitcast=True))


def top_p_threshold(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit that top-p keeps, fp32 [B, 1], for logits fp32 [B, V'], whose rows are contiguous."""
    thresholds = torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device)
    grid = (len(logits),)
    options = {"BLOCK": BLOCK, "num_warps": NUM_WARPS}
    find_thresholds[grid](logits, thresholds, top_p, logits.shape[1], logits.stride(0), **options)
    return thresholds
