"""Products with int8 and int4 weights on a GPU, as Triton kernels: NVIDIA and AMD; bf16, fp16 and fp32 activations.

- for few rows the weights are read once, as they are stored: integers less their zero points enter the products, which
  every dtype here holds exactly, and the sum over a group is scaled in fp32, so the weights are those of dequantize()
- input features are shared by several programs where there are few output features, and a second kernel adds their
  parts in a fixed order. Blocks and parts depend on the weight's shape alone, so a row's result does not depend on how
  many rows there are
- many rows: the weights are expanded once, into one product of the device's library

A weight is in blocks of WIDTH output features, the last of which is filled up: int8 as it is, [N, K]; int4 as
qlinear.pack_int4 has it, [N / WIDTH, K, WIDTH / 2], so that the two halves of a byte belong to two halves of a block.

Dimensions: M rows of activations, N output features (columns: filled up to whole blocks), K input features, G groups of
a row, S programs that share a row of the weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from models.gpu import has_bf16_cores

WIDTH = 128  # output features of a block: with more rows than few, activations are read again for each block
FEW_ROWS = 64  # up to here the kernel; above, the weights are expanded
MOST_BLOCK_K = 32  # with 64, and 64 rows, registers do not suffice on sm_80
NUM_STAGES = 4  # blocks under way


@triton.jit
def read_halves(
    weight,  # int8 [columns, K], or int4 as bytes
    zeros,  # [G, columns], as the integers; not read where HAS_ZEROS is not set
    block,
    k,  # [BLOCK_K]: input features
    group,
    K,
    num_columns,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The integers less their zero points of both halves of a block, [BLOCK_K, HALF] each."""
    j = tl.arange(0, HALF)
    first = block * 2 * HALF + j
    is_read = (k < K)[:, None]
    if BITS == 4:
        packed = tl.load(weight + (block * K + k)[:, None] * HALF + j, mask=is_read, other=0)
        low, high = (packed & 15).to(tl.int16), (packed >> 4).to(tl.int16)
    else:
        low = tl.load(weight + first * K + k[:, None], mask=is_read, other=0).to(tl.int16)
        high = tl.load(weight + (first + HALF) * K + k[:, None], mask=is_read, other=0).to(tl.int16)
    if HAS_ZEROS:
        low -= tl.load(zeros + group * num_columns + first).to(tl.int16)
        high -= tl.load(zeros + group * num_columns + first + HALF).to(tl.int16)
    elif BITS == 4:
        low -= 8
        high -= 8
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def multiply_few_rows(
    x,  # [M, K]
    weight,
    scales,  # [G, columns]
    zeros,
    out,  # [S, M, N]; fp32 where S > 1
    M,
    N,
    K,
    num_columns,
    share,  # blocks of input features for each program
    GROUP: tl.constexpr,  # input features that share a scale; 0: all
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program: a block of output features, from its share of the input features."""
    block, split = tl.program_id(0), tl.program_id(1)
    m, j = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, HALF)
    dtype = tl.float32 if UPCAST else x.dtype.element_ty
    low_total = tl.zeros((BLOCK_M, HALF), tl.float32)
    high_total = tl.zeros((BLOCK_M, HALF), tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, tl.cdiv(K, BLOCK_K))):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        group = step * BLOCK_K // GROUP if GROUP else 0
        rows = tl.load(x + m[:, None] * K + k, mask=(m < M)[:, None] & (k < K), other=0.0).to(dtype)
        low, high = read_halves(weight, zeros, block, k, group, K, num_columns, BITS, HAS_ZEROS, HALF, DTYPE=dtype)
        places = scales + group * num_columns + block * 2 * HALF + j
        low_total += tl.dot(rows, low, input_precision="ieee") * tl.load(places).to(tl.float32)
        high_total += tl.dot(rows, high, input_precision="ieee") * tl.load(places + HALF).to(tl.float32)
    n = block * 2 * HALF + j
    places = out + (split * M + m)[:, None] * N + n
    is_row = (m < M)[:, None]
    tl.store(places, low_total.to(out.dtype.element_ty), mask=is_row & (n < N))
    tl.store(places + HALF, high_total.to(out.dtype.element_ty), mask=is_row & (n + HALF < N))


@triton.jit
def add_parts(parts, out, size, S: tl.constexpr, BLOCK: tl.constexpr):
    """out [size]: the sum of parts [S, size], one after the other."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(S):
        total += tl.load(parts + s * size + place, mask=place < size, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < size)


@triton.jit
def expand(
    weight,
    scales,
    zeros,
    out,  # [K, columns]
    K,
    num_columns,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The values of a weight, transposed, each rounded once to out's dtype."""
    block, step = tl.program_id(0), tl.program_id(1)
    k, n = step * BLOCK_K + tl.arange(0, BLOCK_K), block * 2 * HALF + tl.arange(0, HALF)
    group = step * BLOCK_K // GROUP if GROUP else 0
    low, high = read_halves(weight, zeros, block, k, group, K, num_columns, BITS, HAS_ZEROS, HALF, DTYPE=tl.float32)
    low *= tl.load(scales + group * num_columns + n).to(tl.float32)
    high *= tl.load(scales + group * num_columns + n + HALF).to(tl.float32)
    places = out + k.to(tl.int64)[:, None] * num_columns + n
    tl.store(places, low.to(out.dtype.element_ty), mask=(k < K)[:, None])
    tl.store(places + HALF, high.to(out.dtype.element_ty), mask=(k < K)[:, None])


def block_k(group_size: int | None) -> int:
    """Input features of a block, which have one scale: the largest power of 2 that divides a group."""
    return MOST_BLOCK_K if group_size is None else min(MOST_BLOCK_K, group_size & -group_size)


def num_splits(num_outputs: int, num_inputs: int, num_processors: int) -> int:
    """How many programs share a row of a weight: about four for each of the device's processors in all, and at least
    256 input features for each. A power of 2."""
    wanted = 4 * num_processors / -(-num_outputs // WIDTH)
    splits = 1
    while splits * 2 <= min(wanted, num_inputs // 256, 16):
        splits *= 2
    return splits


def num_warps(block_m: int, element_size: int) -> int:
    """fp32 is multiplied without tensor cores, and with 4 warps the registers do not suffice."""
    return 8 if element_size == 4 or block_m > 32 else 4


class TritonProducts(nn.Module):
    """The product with an int8 or int4 weight, [M, K] -> [M, N]."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        num_outputs: int,
        group_size: int | None,
        bits: int,
        splits: int | None = None,
    ):
        """weight: see above; scale, zero [columns, G], zero None for 8 of int4 and 0 of int8. group_size: None for all
        of a row. splits: S, by default what suits the device."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scale.T.contiguous())
        self.register_buffer("zeros", None if zero is None else zero.T.contiguous())
        num_inputs = weight.shape[1]  # of both layouts
        if splits is None:
            processors = torch.cuda.get_device_properties(weight.device).multi_processor_count
            splits = num_splits(num_outputs, num_inputs, processors)
        self.num_outputs, self.splits = num_outputs, splits
        self.has_to_upcast = weight.device.type == "cuda" and not has_bf16_cores(weight.device)
        self.shape = {"GROUP": group_size or 0, "BITS": bits, "HAS_ZEROS": zero is not None, "HALF": WIDTH // 2}
        self.shape["BLOCK_K"] = block_k(group_size)
        self.num_bytes = sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N] in x's dtype"""
        if len(x) <= FEW_ROWS:
            return self.few_rows(x.contiguous(), upcast=self.has_to_upcast and x.dtype == torch.bfloat16)
        return x @ self.expanded(x.shape[1], x.dtype)

    def few_rows(self, x: Tensor, *, upcast: bool = False) -> Tensor:
        """upcast: as of paged_decode in models/triton_attention.py."""
        (M, K), N, S, columns = x.shape, self.num_outputs, self.splits, self.scales.shape[1]
        block_m = next((size for size in (16, 32) if size >= M), FEW_ROWS)  # tl.dot needs 16 rows
        out = torch.empty(M, N, dtype=x.dtype, device=x.device)
        parts = out if S == 1 else torch.empty(S, M, N, dtype=torch.float32, device=x.device)
        share = -(-K // (self.shape["BLOCK_K"] * S))
        tensors = (x, self.weight, self.scales, self.scales if self.zeros is None else self.zeros, parts)
        options = {"num_warps": num_warps(block_m, 4 if upcast else x.element_size()), "num_stages": NUM_STAGES}
        multiply_few_rows[(columns // WIDTH, S, -(-M // block_m))](
            *tensors, M, N, K, columns, share, **self.shape, BLOCK_M=block_m, UPCAST=upcast, **options
        )
        if S > 1:
            add_parts[(-(-M * N // 1024),)](parts, out, M * N, S, 1024, num_warps=4)
        return out

    def expanded(self, num_inputs: int, dtype: torch.dtype) -> Tensor:
        """The values of the weight, transposed: [K, N] in dtype."""
        K, columns = num_inputs, self.scales.shape[1]
        out = torch.empty(K, columns, dtype=dtype, device=self.weight.device)
        tensors = (self.weight, self.scales, self.scales if self.zeros is None else self.zeros, out)
        expand[(columns // WIDTH, -(-K // self.shape["BLOCK_K"]))](*tensors, K, columns, **self.shape, num_warps=4)
        return out[:, : self.num_outputs]
