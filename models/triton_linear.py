"""Products with int8 and int4 weights on a GPU, as Triton kernels: NVIDIA and AMD; bf16, fp16 and fp32 activations.

- for few rows the weights are read once, as they are stored: products take the integers minus zero points, which every
  dtype here holds exactly, and the sum over a group is scaled in fp32, so the weights are those of dequantize()
- where there are few output features, several programs share the input features, and the last one to finish adds their
  parts in a fixed order. Blocks and parts depend only on the weight's shape, the dtype and the device, so a row's
  result does not depend on how many rows there are
- for many rows the weights are expanded once, for one product of the device's library

pack() stores a weight in the order in which the threads of NVIDIA's tensor cores hold a left factor, so that a thread
reads, 16 bytes at a time, the numbers that it multiplies with: without shared memory in between, whose writes, barriers
and transposed reads took longer than all else.

Dimensions: M rows of activations, N output features (columns: padded to whole blocks), K input features, G groups of a
row, S programs that share a row of the weight.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from models.gpu import has_bf16_cores

WIDTH = 128  # output features of a block, for four warps; each block reads the activations again
UNIT = 32  # input features of a block that are stored together: 16 bytes of int4 for each of 128 threads
FEW_ROWS = 64  # most rows for the kernel; for more, the weights are expanded
ON_AMD = torch.version.hip is not None
BF16_MAGIC, FP16_MAGIC = 0x43004300, 0x64006400  # 128 and 1024, twice: see unpack_int4


# --------------------------------------------------------------------------------- order of weights
#
# A left factor of 64 x 16, [m, k], in the registers of 4 warps (PTX, register fragments of wgmma): warp w has rows 16 w
# to 16 w + 15, thread 4 a + b of it rows a and a + 8, and of these k = 2 b, 2 b + 1, 2 b + 8 and 2 b + 9; neighbours of
# k share a register. A block of 128 output features is two such factors, a unit of 32 input features two of k.


def pack(values: Tensor) -> Tensor:
    """uint8 in 0..15 or int8, [columns, K], columns divisible by WIDTH -> int32 [columns / WIDTH, K / UNIT, words], the
    last unit padded with zeros: the words that a thread reads of a unit are stored together, for int8 those of rows a
    before those of rows a + 8. In a word, from the low bits up, int4: k and k + 8 of row a, both of row a + 8, then the
    neighbours of all four; int8: k, k + 8 and their neighbours."""
    values = F.pad(values, (0, -values.shape[1] % UNIT))
    m64, warp, m8, a, unit, k16, k8, b, neighbour = range(1, 10)
    places = values.view(-1, 2, 4, 2, 8, values.shape[1] // UNIT, 2, 2, 4, 2)
    if values.dtype == torch.uint8:
        low, high = places.permute(0, unit, warp, a, b, m64, k16, neighbour, m8, k8).unbind(-1)
        packed = low | (high << 4)
    else:
        packed = places.permute(0, unit, m8, warp, a, b, m64, k16, neighbour, k8)
    return packed.flatten().view(torch.int32).view(len(values) // WIDTH, values.shape[1] // UNIT, -1)


@triton.jit
def two_numbers(words, DTYPE: tl.constexpr):
    """int32 [...] -> bfloat16 or float16 [..., 2]: the two numbers whose bits a word holds, the low half first."""
    low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
    return tl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))


@triton.jit
def unpack_int4(words, magic, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr):
    """The integers of a block plus 128 in bfloat16, plus 1024 in float16, [128, BLOCK_K]; words: int32, in pack()'s
    order.

    Two at a time, as fast as a processor can: 4 bits in the low end of a 16-bit half of `magic` make it 128 plus the
    integer in bf16, 1024 plus the integer in fp16 (Kim et al. 2022, arxiv.org/abs/2211.10017). `magic` is an argument,
    not a constant, so that it stays in a register, where the compiler combines it with one instruction.
    """
    row = tl.join((words & 0x000F000F) | magic, ((words >> 4) & 0x000F000F) | magic)
    next_row = tl.join(((words >> 8) & 0x000F000F) | magic, ((words >> 12) & 0x000F000F) | magic)
    # unit, warp, a, b, m64, k16, k8, m8, neighbour
    numbers = tl.reshape(two_numbers(tl.join(row, next_row), DTYPE), (BLOCK_K // 32, 4, 8, 4, 2, 2, 2, 2, 2))
    return tl.reshape(tl.permute(numbers, (4, 1, 7, 2, 0, 5, 6, 3, 8)), (128, BLOCK_K))


@triton.jit
def unpack_int8(words, magic, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr):
    """As unpack_int4, but the integers themselves. For bf16 they have a bit too many: the 8th bit, the sign, would turn
    128 into 256; so it is put into another `magic`, which is subtracted."""
    if DTYPE.is_bf16():
        low = tl.join((words & 0x007F007F) | magic, ((words >> 8) & 0x007F007F) | magic)
        sign = tl.join((words & 0x00800080) | magic, ((words >> 8) & 0x00800080) | magic)
        numbers = two_numbers(low, DTYPE) - two_numbers(sign, DTYPE)
    else:
        words ^= -0x7F7F7F80  # 0x80808080: all signs
        both = tl.join((words & 0x00FF00FF) | magic, ((words >> 8) & 0x00FF00FF) | magic)
        numbers = two_numbers(both, DTYPE) - 1152.0
    # unit, m8, warp, a, b, m64, k16, k8, neighbour
    numbers = tl.reshape(numbers, (BLOCK_K // 32, 2, 4, 8, 4, 2, 2, 2, 2))
    return tl.reshape(tl.permute(numbers, (5, 2, 1, 3, 0, 6, 7, 4, 8)), (128, BLOCK_K))


# ----------------------------------------------------------------------------------------- kernels


@triton.jit
def read(
    weight, zeros, block, step, steps, group, num_columns, magic, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    BLOCK_K: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The integers minus zero points, [128, BLOCK_K], of a block of output features and a block of input features, all
    of one group."""
    size: tl.constexpr = BLOCK_K * 4 * BITS  # words
    words = tl.load(weight + (block.to(tl.int64) * steps + step) * size + tl.arange(0, size))
    numbers = unpack_int4(words, magic, BLOCK_K, DTYPE) if BITS == 4 else unpack_int8(words, magic, BLOCK_K, DTYPE)
    more: tl.constexpr = 0.0 if BITS == 8 else 128.0 if DTYPE.is_bf16() else 1024.0
    if HAS_ZEROS:
        zero = tl.load(zeros + group * num_columns + block * 128 + tl.arange(0, 128)).to(tl.float32)
        numbers -= (zero + more).to(DTYPE)[:, None]
    elif BITS == 4:
        numbers -= more + 8.0
    return numbers


@triton.jit(do_not_specialize=["M", "steps", "share"])  # one compiled kernel for all values
def multiply_few_rows(
    x,  # [M, K]
    weight,
    scales,  # [G, columns]
    zeros,  # [G, columns], as the integers; not read where HAS_ZEROS is not set
    out,  # [M, N]
    parts,  # fp32 [S, M, N]
    arrivals,  # int32 [columns / WIDTH], zeros before and after the call
    M,
    N,
    K,
    num_columns,
    steps,  # blocks of input features
    share,  # of them for each program
    magic,
    GROUP: tl.constexpr,  # input features that share a scale; 0: all
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    ARRIVALS: tl.constexpr,  # num_arrivals()
):
    """One program: all rows of a block of output features, from its share of the input features. The weights are the
    left factor, the rows the right one."""
    block, split = tl.program_id(0), tl.program_id(1)
    m, n = tl.arange(0, BLOCK_M), block * 128 + tl.arange(0, 128)
    dtype = tl.float32 if UPCAST else x.dtype.element_ty
    half = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    total = tl.zeros((128, BLOCK_M), tl.float32)
    first, end = split * share, tl.minimum((split + 1) * share, steps)
    next_scale = tl.load(scales + (first * BLOCK_K // GROUP if GROUP else 0) * num_columns + n)
    for step in range(first, end):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        group = step * BLOCK_K // GROUP if GROUP else 0
        rows = tl.load(x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0).to(dtype)
        numbers = read(weight, zeros, block, step, steps, group, num_columns, magic, BITS, HAS_ZEROS, BLOCK_K, half).to(
            dtype
        )
        if GROUP:  # a scale is loaded one step before it is needed
            scale = next_scale.to(tl.float32)
            next_scale = tl.load(scales + tl.minimum(step + 1, end - 1) * BLOCK_K // GROUP * num_columns + n)
            total += tl.dot(numbers, rows, input_precision="ieee") * scale[:, None]
        else:
            total = tl.dot(numbers, rows, total, input_precision="ieee")
    if not GROUP:
        total *= next_scale.to(tl.float32)[:, None]
    places, mask = m[None, :] * N + n[:, None], (m < M)[None, :] & (n < N)[:, None]
    splits = tl.num_programs(1)
    if splits == 1:
        tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(parts + split * M * N + places, total, mask=mask)
        tl.debug_barrier()  # all of this program's part is written before it counts as arrived
        if ARRIVALS == 1:
            arrived = tl.atomic_add(arrivals + block, 1)
        else:
            arrived = tl.max(tl.atomic_add(arrivals + block + tl.zeros((ARRIVALS,), tl.int32), 1), axis=0)
        tl.debug_barrier()  # the other programs' parts are read only after that
        if arrived == splits * ARRIVALS - 1:
            total = tl.zeros((128, BLOCK_M), tl.float32)
            for s in range(splits):  # .cg: past NVIDIA's first cache, which other programs' parts do not reach
                total += tl.load(parts + s * M * N + places, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)
            tl.store(arrivals + block, 0)


@triton.jit
def expand(
    weight, scales, zeros,
    out,  # [columns, K]
    K, num_columns, steps, magic, GROUP: tl.constexpr, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The values of a weight, each rounded once to out's dtype."""
    block, step = tl.program_id(0), tl.program_id(1)
    k, n = step * BLOCK_K + tl.arange(0, BLOCK_K), block * 128 + tl.arange(0, 128)
    group = step * BLOCK_K // GROUP if GROUP else 0
    numbers = read(
        weight, zeros, block, step, steps, group, num_columns, magic, BITS, HAS_ZEROS, BLOCK_K, tl.float16
    ).to(tl.float32)
    numbers *= tl.load(scales + group * num_columns + n).to(tl.float32)[:, None]
    tl.store(out + n.to(tl.int64)[:, None] * K + k, numbers.to(out.dtype.element_ty), mask=(k < K)[None, :])


# ---------------------------------------------------------------------------------------- launching


def most_inputs(bits: int, device: torch.device) -> int:
    """The most input features of a step, in 16 bits: 128 for int4 where 64 rows leave registers and shared memory for
    as many (Hopper, and data-centre Blackwell, whose tensor cores keep sums elsewhere), else 64."""
    is_large = not ON_AMD and (device.type == "cpu" or torch.cuda.get_device_capability(device)[0] in (9, 10))
    return 128 if is_large and bits == 4 else 64


def block_k(group_size: int, num_inputs: int, most: int) -> int:
    """Input features of a step, which share a scale: the largest power of 2, up to `most`, that divides a group, or
    without groups (0) the units of a row."""
    whole = group_size or num_inputs + -num_inputs % UNIT
    return min(most, whole & -whole)


def num_splits(num_outputs: int, num_inputs: int, num_processors: int) -> int:
    """How many programs share a row of a weight: the fewest with which the busiest processor finishes soonest, assuming
    that one alone keeps half a processor busy. At most four programs for each processor, with two or more steps of
    128 input features on average. With earlier kernels on an H200, the best or within 5 % of it for 7B's layers."""
    blocks, steps = -(-num_outputs // WIDTH), -(-num_inputs // 128)
    most = max(1, min(16, steps // 2, 4 * num_processors // blocks))

    def time(splits: int) -> int:
        share = -(-steps // splits)
        return max(2, -(-blocks * -(-steps // share) // num_processors)) * share

    return min(range(1, most + 1), key=time)


def launch_options(element_size: int, on_amd: bool = ON_AMD) -> dict[str, int]:
    """num_warps: the 4 that pack() assumes; for fp32 twice as many, since the registers of 4 do not suffice.
    num_stages: blocks in flight. AMD's matrix instructions are set to one size, as NVIDIA's are by themselves, so that
    sums have the same order for every BLOCK_M."""
    options = {"num_warps": 8 if element_size == 4 else 4, "num_stages": 2 if element_size == 4 else 3}
    return options | ({"matrix_instr_nonkdim": 16} if on_amd else {})


def num_arrivals(num_warps: int, on_amd: bool = ON_AMD) -> int:
    """How often a program arrives. On AMD a barrier does not wait for other wavefronts' stores, and an atomic waits for
    those of its own only, so each of them arrives, with all its threads, of which the compiler makes one atomic. On
    NVIDIA a barrier and one atomic after it order the stores of all threads (PTX's memory model, causality order)."""
    return 64 * num_warps if on_amd else 1


class Shape(NamedTuple):
    """The shape of a quantised weight, and of its products."""

    num_outputs: int
    num_inputs: int
    group_size: int  # 0: all of a row
    bits: int
    splits: int  # S at most
    most_inputs: int  # of a step, in 16 bits

    def constants(self, zeros: Tensor | None, element_size: int) -> dict[str, int]:
        """The kernels' constants. BLOCK_K: at most 32 for fp32, multiplied without tensor cores, from shared memory."""
        size = block_k(self.group_size, self.num_inputs, 32 if element_size == 4 else self.most_inputs)
        return {"GROUP": self.group_size, "BITS": self.bits, "HAS_ZEROS": zeros is not None, "BLOCK_K": size}


def few_rows(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    arrivals: Tensor,
    shape: Shape,
    *,
    upcast: bool = False,
) -> Tensor:
    """[M, K] -> [M, N] in x's dtype. upcast: as in paged_decode of models/triton_attention.py."""
    (M, K), N, columns = x.shape, shape.num_outputs, scales.shape[1]
    element_size = 4 if upcast else x.element_size()
    block_m = next((size for size in (16, 32) if size >= M), FEW_ROWS)  # of tensor cores' sizes
    constants = shape.constants(zeros, element_size)
    steps = -(-K // constants["BLOCK_K"])
    share = -(-steps // shape.splits)
    S = -(-steps // share)
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    parts = torch.empty(S if S > 1 else 0, M, N, dtype=torch.float32, device=x.device)  # one dtype: one kernel
    magic = BF16_MAGIC if x.dtype == torch.bfloat16 and not upcast else FP16_MAGIC
    numbers = (M, N, K, columns, steps, share, magic)
    options = launch_options(element_size)
    options |= {"BLOCK_M": block_m, "UPCAST": upcast, "ARRIVALS": num_arrivals(options["num_warps"])}
    tensors = (x, weight, scales, scales if zeros is None else zeros, out, parts, arrivals)
    multiply_few_rows[(columns // WIDTH, S)](*tensors, *numbers, **constants, **options)
    return out


def expanded(weight: Tensor, scales: Tensor, zeros: Tensor | None, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The values of the weight: [N, K] in dtype."""
    K, columns, constants = shape.num_inputs, scales.shape[1], shape.constants(zeros, 4)
    steps = -(-K // constants["BLOCK_K"])
    out = torch.empty(columns, K, dtype=dtype, device=weight.device)
    tensors = (weight, scales, scales if zeros is None else zeros, out)
    expand[(columns // WIDTH, steps)](*tensors, K, columns, steps, FP16_MAGIC, **constants, num_warps=4)
    return out[: shape.num_outputs]


# One operation for torch.compile, which would otherwise compile each kind of launch separately. It leaves arrivals as
# they were, so the schema does not declare them as written
library = torch.library.Library("gpt_accelera", "FRAGMENT")
library.define(
    "quantized_product(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor arrivals, int[] shape,"
    " bool upcast) -> Tensor"
)


@torch.library.impl(library, "quantized_product", "CompositeExplicitAutograd")
def quantized_product(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    arrivals: Tensor,
    shape: Sequence[int],
    upcast: bool,
) -> Tensor:
    """[M, K] -> [M, N] in x's dtype. shape: the fields of a Shape."""
    shape = Shape(*shape)
    if len(x) <= FEW_ROWS:
        return few_rows(x.contiguous(), weight, scales, zeros, arrivals, shape, upcast=upcast)
    return F.linear(x, expanded(weight, scales, zeros, shape, x.dtype))


@torch.library.register_fake("gpt_accelera::quantized_product", lib=library)
def _(x, weight, scales, zeros, arrivals, shape, upcast) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])  # len() would fix the number of rows


class TritonProducts(nn.Module):
    """The product with an int8 or int4 weight, [M, K] -> [M, N]; one call at a time, since calls share arrivals."""

    def __init__(self, values: Tensor, scale: Tensor, zero: Tensor | None, group_size: int | None, splits: int | None):
        """values [N, K]: uint8 in 0..15 or int8; scale, zero [N, G]; zero None: 8 for int4, 0 for int8. group_size:
        divisible by UNIT; None for whole rows. splits: S at most; None for the number that suits the device."""
        super().__init__()
        (N, K), bits = values.shape, 4 if values.dtype == torch.uint8 else 8
        blocks = (0, 0, 0, -N % WIDTH)
        self.register_buffer("weight", pack(F.pad(values, blocks)))
        self.register_buffer("scales", F.pad(scale, blocks).T.contiguous())
        self.register_buffer("zeros", None if zero is None else F.pad(zero, blocks).T.contiguous())
        self.register_buffer("arrivals", torch.zeros(len(self.weight), dtype=torch.int32, device=values.device))
        if splits is None:
            processors = torch.cuda.get_device_properties(values.device).multi_processor_count
            splits = num_splits(N, K, processors)
        self.shape = Shape(N, K, group_size or 0, bits, splits, most_inputs(bits, values.device))
        self.has_to_upcast = values.device.type == "cuda" and not has_bf16_cores(values.device)
        self.num_bytes = sum(buffer.nbytes for buffer in self.buffers())

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        return self.weight, self.scales, self.zeros, self.arrivals

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N] in x's dtype"""
        upcast = self.has_to_upcast and x.dtype != torch.float32
        return torch.ops.gpt_accelera.quantized_product(x, *self.tensors, list(self.shape), upcast)
