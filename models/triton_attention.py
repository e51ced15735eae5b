"""Attention of a decode step over a paged cache, as Triton kernels: NVIDIA and AMD, bf16, fp16 and fp32.

The keys of a row are split over programs, each of which keeps its own softmax; a second kernel joins them. The first
program of a row also takes its new key and value, and writes them to the row's last place, which no other program
reads. A row's cost depends on its own length only. Memory outside the used part of its pages has no effect on the
result, whatever it holds, even NaN. Flash-decoding: Dao et al. 2023, crfm.stanford.edu/2023/10/12/flashdecoding.html.

Dimensions: B rows, H query heads, K key/value heads, G = H / K, D head dim, P pages, N tokens of a page, M pages of a
row at most, S splits of a row's keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
NUM_STAGES = 2  # blocks in flight


@triton.jit
def attend_splits(
    q,  # [B, H, D], rows q_stride apart
    new_k,  # [B, K, D], rows new_k_stride apart
    new_v,
    k,  # [P, N, K, D]
    v,
    table,  # int32 [B, M]
    lengths,  # int32 [B]
    sums,  # [B, H, S, D]: softmax-weighted values of a split; fp32, the result's dtype where S is 1
    maxima,  # fp32 [B, H, S]: log2 of the split's normaliser; where S is 1 nothing is written
    q_stride,
    new_k_stride,
    new_v_stride,
    scale,  # of the logits, times log2 e
    num_table_columns,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program: the G query heads of a key/value head of a row, over its share of the row's keys."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    last = tl.load(lengths + row) - 1  # the new token's place, and the number of cached tokens
    share = tl.cdiv(tl.cdiv(last, S), BLOCK) * BLOCK  # whole blocks, so that no block is read twice
    start = split * share
    end = tl.minimum(start + share, last)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    heads = head * G + g
    is_head, in_head = g < G, d < D
    queries = tl.load(q + row * q_stride + heads[:, None] * D + d, mask=is_head[:, None] & in_head, other=0.0)
    queries = queries.to(tl.float32) if UPCAST else queries

    is_first = split == 0
    key = tl.load(new_k + row * new_k_stride + head * D + d, mask=in_head, other=0.0)
    value = tl.load(new_v + row * new_v_stride + head * D + d, mask=in_head, other=0.0)
    last_page = tl.load(table + row * num_table_columns + last // N).to(tl.int64)
    written = ((last_page * N + last % N) * K + head) * D + d
    writes = d < tl.where(is_first, D, 0)
    tl.store(k + written, key.to(k.dtype.element_ty), mask=writes)
    tl.store(v + written, value.to(v.dtype.element_ty), mask=writes)
    logit = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale
    largest = tl.where(is_first, logit, -float("inf"))
    normaliser = tl.zeros((BLOCK_G,), tl.float32) + tl.where(is_first, 1.0, 0.0)
    total = tl.zeros((BLOCK_G, BLOCK_D), tl.float32) + tl.where(is_first, value.to(tl.float32), 0.0)[None, :]
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        used = place < end
        page = tl.load(table + row * num_table_columns + place // N, mask=used, other=0).to(tl.int64)
        offsets = ((page * N + place % N) * K + head)[:, None] * D + d
        is_read = used[:, None] & in_head
        keys = tl.load(k + offsets, mask=is_read, other=0.0)
        keys = keys.to(tl.float32) if UPCAST else keys
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where(used, logits, -float("inf"))
        most = tl.maximum(largest, tl.max(logits, axis=1))  # finite: the block has a used place
        weights = tl.exp2(logits - most[:, None])
        kept = tl.exp2(largest - most)
        values = tl.load(v + offsets, mask=is_read, other=0.0)
        values = values.to(tl.float32) if UPCAST else values
        total = total * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        normaliser = normaliser * kept + tl.sum(weights, axis=1)
        largest = most

    has_keys = normaliser > 0  # a split beyond the row's end has none
    divisor = tl.where(has_keys, normaliser, 1.0)
    places = (row * K * G + heads) * S + split
    if S > 1:
        tl.store(maxima + places, tl.where(has_keys, largest + tl.log2(divisor), -float("inf")), mask=is_head)
    found = (total / divisor[:, None]).to(sums.dtype.element_ty)
    tl.store(sums + places[:, None] * D + d, found, mask=is_head[:, None] & in_head)


@triton.jit
def join_splits(sums, maxima, out, D: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: the splits of one query head of a row."""
    head = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    norms = tl.load(maxima + head * S + s, mask=s < S, other=-float("inf"))
    weights = tl.exp2(norms - tl.max(norms, axis=0))
    is_read = (s < S)[:, None] & (d < D)
    parts = tl.load(sums + (head * S + s)[:, None] * D + d, mask=is_read, other=0.0)
    joined = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out + head * D + d, joined.to(out.dtype.element_ty), mask=d < D)


def shape_of(*, G: int, K: int, D: int, N: int, splits: int, element_size: int, upcast: bool = False) -> dict[str, int]:
    """The constants that attend_splits is compiled for. element_size: bytes of a number of the cache."""
    block_d = max(16, triton.next_power_of_2(D))  # tl.dot needs 16
    shape = {"N": N, "K": K, "G": G, "D": D, "S": splits, "BLOCK_D": block_d, "UPCAST": upcast}
    # two blocks of keys and of values fit into 64 KiB of shared memory
    shape["BLOCK"] = max(16, min(64, 2**13 // block_d * 2 // element_size))
    # and 16 rows; the kernel is memory-bound
    return shape | {"BLOCK_G": max(16, triton.next_power_of_2(G))}


def num_warps(element_size: int) -> int:
    """8 for fp32: it is multiplied without tensor cores, and the registers of 4 warps do not suffice."""
    return 8 if element_size == 4 else 4


def paged_decode(
    q: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    splits: int,
    *,
    upcast: bool = False,
) -> Tensor:
    """Writes each row's new key and value, and attends from its query to its lengths[b] keys in the pages table[b], of
    which the new one is the last: [B, H, D] in q's dtype.

    q [B, H, D]; new_k and new_v [B, K, D]; k and v [P, N, K, D], contiguous; table int32 [B, M];
    lengths int32 [B], at least 1. upcast: multiply in fp32, where there are no products of bf16 (before sm_80, and in
    Triton's interpreter). Without a host sync, so that CUDA graphs can capture it.
    """
    (B, H, D), (_, N, K, _) = q.shape, k.shape
    q, new_k, new_v = (t if t.stride()[1:] == (D, 1) else t.contiguous() for t in (q, new_k, new_v))
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    sums = out if splits == 1 else torch.empty(B, H, splits, D, dtype=torch.float32, device=q.device)
    maxima = torch.empty(B, H, splits, dtype=torch.float32, device=q.device)
    element_size = 4 if upcast else k.element_size()
    shape = shape_of(G=H // K, K=K, D=D, N=N, splits=splits, element_size=element_size, upcast=upcast)
    options = {"num_warps": num_warps(element_size), "num_stages": NUM_STAGES}
    tensors, strides = (q, new_k, new_v, k, v, table, lengths, sums, maxima), [t.stride(0) for t in (q, new_k, new_v)]
    attend_splits[(B, K, splits)](*tensors, *strides, D**-0.5 * LOG2_E, table.shape[1], **shape, **options)
    if splits > 1:
        join_splits[(B * H,)](sums, maxima, out, D, splits, splits, shape["BLOCK_D"], num_warps=4)
    return out
