"""Products with int8 and int4 weights on a GPU, as Triton kernels: NVIDIA and AMD; bf16, fp16 and fp32 activations.

- for few rows the weights are read once, as they are stored: integers less their zero points enter the products, which
  every dtype here holds exactly, and the sum over a group is scaled in fp32, so the weights are those of dequantize()
- input features are shared by several programs where there are few output features, and a second kernel adds their
  parts in a fixed order. Blocks and parts depend on the weight's shape and the device alone, so a row's result does not
  depend on how many rows there are
- many rows: the weights are expanded once, into one product of the device's library

A weight is in blocks of WIDTH output features, the last of which is filled up: int8 as it is, [N, K]; int4 as
qlinear.pack_int4 has it, [N / WIDTH, K, WIDTH / 2], so that the two halves of a byte belong to two halves of a block.

Dimensions: M rows of activations, N output features (columns: filled up to whole blocks), K input features, G groups of
a row, S programs that share a row of the weight.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from models.gpu import has_bf16_cores

WIDTH = 128  # output features of a block: with more rows than few, activations are read again for each block
FEW_ROWS = 64  # up to here the kernel; above, the weights are expanded
MOST_BLOCK_K = 64
BF16_MAGIC, FP16_MAGIC = 0x43004300, 0x64006400  # 128 and 1024, twice: see read_int4


@triton.jit
def place_of(p):
    """The output feature, within a block, of the p-th number that read_int4 makes of a row: of p's bits, from the 8s
    up, a word of 8 halves of bytes, and below that which half it is."""
    half = p % 8 // 4 + p % 4 // 2 * 2 + p % 2 * 4
    return p // 8 * 4 + half // 2 + half % 2 * 64


@triton.jit
def read_int4(words, zeros, block, k, group, K, num_columns, magic, HAS_ZEROS: tl.constexpr, DTYPE: tl.constexpr):
    """The integers less their zero points of a block, [BLOCK_K, 128], in the order of place_of. words: int32, [blocks,
    K, 16]; k [BLOCK_K]: input features, all of one group; DTYPE: bfloat16 or float16.

    Two at a time: 4 bits below the 16 of `magic` are those of 128 and as much in bf16, of 1024 and as much in fp16, as
    fast as a processor can (Kim et al. 2022, arxiv.org/abs/2211.10017). It is no constant, so that it stays in a
    register, where the compiler joins it with one instruction.
    """
    packed = tl.load(words + (block * K + k)[:, None] * 16 + tl.arange(0, 16), mask=(k < K)[:, None], other=0)
    first, second = (packed & 0x000F000F) | magic, ((packed >> 4) & 0x000F000F) | magic
    third, fourth = ((packed >> 8) & 0x000F000F) | magic, ((packed >> 12) & 0x000F000F) | magic
    pairs = tl.join(tl.join(first, second), tl.join(third, fourth))
    low, high = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
    numbers = tl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))
    numbers = tl.reshape(numbers, (k.shape[0], 128))
    offset: tl.constexpr = 128.0 if DTYPE.is_bf16() else 1024.0
    if HAS_ZEROS:
        n = block * 128 + place_of(tl.arange(0, 128))
        return numbers - (tl.load(zeros + group * num_columns + n).to(tl.float32) + offset).to(DTYPE)
    return numbers - (offset + 8.0)


@triton.jit
def read_int8(weight, zeros, block, k, group, K, num_columns, HAS_ZEROS: tl.constexpr):
    """The integers less their zero points of a block, [128, BLOCK_K] in fp32. weight: int8 [columns, K]."""
    n = block * 128 + tl.arange(0, 128)
    numbers = tl.load(weight + n[:, None] * K + k, mask=(k < K)[None, :], other=0).to(tl.float32)
    if HAS_ZEROS:
        numbers -= tl.load(zeros + group * num_columns + n).to(tl.float32)[:, None]
    return numbers


@triton.jit
def multiply_few_rows(
    x,  # [M, K]
    weight,
    scales,  # [G, columns]
    zeros,  # [G, columns], as the integers; not read where HAS_ZEROS is not set
    out,  # [S, M, N]; fp32 where S > 1
    M,
    N,
    K,
    num_columns,
    share,  # blocks of input features for each program
    magic,
    GROUP: tl.constexpr,  # input features that share a scale; 0: all
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program: a block of output features, from its share of the input features. The weights are the left factor,
    whose registers a product takes as they come."""
    block, split = tl.program_id(0), tl.program_id(1)
    m, p = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, 128)
    n = block * 128 + (place_of(p) if BITS == 4 else p)
    dtype = tl.float32 if UPCAST else x.dtype.element_ty
    total = tl.zeros((128, BLOCK_M), tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, tl.cdiv(K, BLOCK_K))):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        group = step * BLOCK_K // GROUP if GROUP else 0
        rows = tl.load(x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0).to(dtype)
        if BITS == 4:
            half = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
            read = read_int4(weight, zeros, block, k, group, K, num_columns, magic, HAS_ZEROS, half)
            numbers = tl.trans(read.to(dtype))
        else:
            numbers = read_int8(weight, zeros, block, k, group, K, num_columns, HAS_ZEROS).to(dtype)
        if GROUP:
            scale = tl.load(scales + group * num_columns + n).to(tl.float32)
            total += tl.dot(numbers, rows, input_precision="ieee") * scale[:, None]
        else:
            total = tl.dot(numbers, rows, total, input_precision="ieee")
    if not GROUP:
        total *= tl.load(scales + n).to(tl.float32)[:, None]
    places = out + (split * M + m)[None, :] * N + n[:, None]
    tl.store(places, total.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


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
    magic,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The values of a weight, transposed, each rounded once to out's dtype."""
    block, step = tl.program_id(0), tl.program_id(1)
    k, p = step * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, 128)
    n = block * 128 + (place_of(p) if BITS == 4 else p)
    group = step * BLOCK_K // GROUP if GROUP else 0
    if BITS == 4:
        read = read_int4(weight, zeros, block, k, group, K, num_columns, magic, HAS_ZEROS, tl.float16)
        numbers = read.to(tl.float32)
    else:
        numbers = tl.trans(read_int8(weight, zeros, block, k, group, K, num_columns, HAS_ZEROS))
    numbers *= tl.load(scales + group * num_columns + n).to(tl.float32)
    places = out + k.to(tl.int64)[:, None] * num_columns + n
    tl.store(places, numbers.to(out.dtype.element_ty), mask=(k < K)[:, None])


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


def launch_options(block_m: int, element_size: int, on_amd: bool = torch.version.hip is not None) -> dict[str, int]:
    """num_stages: blocks under way, of fp32 as many as fit into 64 KiB of shared memory. fp32 is multiplied without
    tensor cores, and with 4 warps the registers do not suffice. AMD's matrix instructions are of one size, as NVIDIA's
    are by themselves, so that a sum has the same order whatever BLOCK_M is."""
    is_fp32 = element_size == 4
    options = {"num_warps": 8 if is_fp32 or block_m > 32 else 4, "num_stages": 2 if is_fp32 else 3}
    return options | ({"matrix_instr_nonkdim": 16} if on_amd else {})


def magic_of(dtype: torch.dtype, upcast: bool) -> int:
    """What read_int4 makes numbers of, for activations of this dtype."""
    return BF16_MAGIC if dtype == torch.bfloat16 and not upcast else FP16_MAGIC


class Shape(NamedTuple):
    """How a quantised weight lies in memory."""

    num_outputs: int
    group_size: int  # 0: all of a row
    bits: int
    splits: int  # S

    def constants(self, zeros: Tensor | None) -> dict[str, int]:
        """What the kernels are compiled for."""
        shape = {"GROUP": self.group_size, "BITS": self.bits, "HAS_ZEROS": zeros is not None}
        return shape | {"BLOCK_K": block_k(self.group_size or None)}


def few_rows(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, shape: Shape, *, upcast: bool = False
) -> Tensor:
    """[M, K] -> [M, N] in x's dtype. upcast: as of paged_decode in models/triton_attention.py."""
    (M, K), N, S, columns = x.shape, shape.num_outputs, shape.splits, scales.shape[1]
    block_m = next((size for size in (16, 32) if size >= M), FEW_ROWS)  # tl.dot needs 16 rows
    constants = shape.constants(zeros)
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    parts = out if S == 1 else torch.empty(S, M, N, dtype=torch.float32, device=x.device)
    share = -(-K // (constants["BLOCK_K"] * S))
    options = {"BLOCK_M": block_m, "UPCAST": upcast, **launch_options(block_m, 4 if upcast else x.element_size())}
    grid, numbers = (columns // WIDTH, S, -(-M // block_m)), (M, N, K, columns, share, magic_of(x.dtype, upcast))
    zeros = scales if zeros is None else zeros
    multiply_few_rows[grid](x, weight, scales, zeros, parts, *numbers, **constants, **options)
    if S > 1:
        add_parts[(-(-M * N // 1024),)](parts, out, M * N, S, 1024, num_warps=4)
    return out


def expanded(
    num_inputs: int, weight: Tensor, scales: Tensor, zeros: Tensor | None, shape: Shape, dtype: torch.dtype
) -> Tensor:
    """The values of the weight, transposed: [K, N] in dtype."""
    K, columns, constants = num_inputs, scales.shape[1], shape.constants(zeros)
    out = torch.empty(K, columns, dtype=dtype, device=weight.device)
    grid, zeros = (columns // WIDTH, -(-K // constants["BLOCK_K"])), scales if zeros is None else zeros
    expand[grid](weight, scales, zeros, out, K, columns, FP16_MAGIC, **constants, num_warps=4)
    return out[:, : shape.num_outputs]


# One operation for torch.compile, which would make code of its own for each kind of launch
library = torch.library.Library("gpt_accelera", "FRAGMENT")
library.define(
    "quantized_product(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, int[] shape, bool upcast) -> Tensor"
)


@torch.library.impl(library, "quantized_product", "CompositeExplicitAutograd")
def quantized_product(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, shape: Sequence[int], upcast: bool
) -> Tensor:
    """[M, K] -> [M, N] in x's dtype. shape: of a Shape."""
    shape = Shape(*shape)
    if len(x) <= FEW_ROWS:
        return few_rows(x.contiguous(), weight, scales, zeros, shape, upcast=upcast)
    return x @ expanded(x.shape[1], weight, scales, zeros, shape, x.dtype)


@torch.library.register_fake("gpt_accelera::quantized_product", lib=library)
def _(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, shape: Sequence[int], upcast: bool) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])  # len() would fix the number of rows


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
        self.register_buffer("weight", weight.view(torch.int32) if bits == 4 else weight)
        self.register_buffer("scales", scale.T.contiguous())
        self.register_buffer("zeros", None if zero is None else zero.T.contiguous())
        if splits is None:
            processors = torch.cuda.get_device_properties(weight.device).multi_processor_count
            splits = num_splits(num_outputs, weight.shape[1], processors)  # K stands second in both layouts
        self.shape = Shape(num_outputs, group_size or 0, bits, splits)
        self.has_to_upcast = weight.device.type == "cuda" and not has_bf16_cores(weight.device)
        self.num_bytes = sum(buffer.nbytes for buffer in self.buffers())

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.weight, self.scales, self.zeros

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N] in x's dtype"""
        upcast = self.has_to_upcast and x.dtype != torch.float32
        return torch.ops.gpt_accelera.quantized_product(x, *self.tensors, list(self.shape), upcast)
