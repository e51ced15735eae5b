"""An AdamW step of one parameter (this rank's part) as a single Triton kernel, for NVIDIA and AMD GPUs. It computes the
same as `_update` in training/optim.py, the oracle in plain torch operations.

Weights are fp32, or bf16 with stochastic rounding and the noise of models/noise.py; moments are fp32, or 8-bit with a
scale for each block of columns. Every tensor is read once and written once.

Dimensions: R rows, C columns, in blocks of `block` columns; the last block of a row may be shorter.
"""

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS, NUM_WARPS = 1024, 4  # per program; 2048 elements take 157 registers, not 92, on sm_90, and spill a few more
WIDEST = 256  # most columns of a block with fp32 moments


@triton.jit
def shifted(x, BITS: tl.constexpr, SIZE: tl.constexpr):
    """Logical shift x >> BITS of signed integers of SIZE bits: fills with zeros, not with the sign."""
    return (x >> BITS) & ((1 << (SIZE - BITS)) - 1)


@triton.jit
def random_bits(key, row, of_columns):
    """The same as models.noise.random_bits, int32: row [N, 1], of_columns [N, W]."""
    x = key + row * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer, as those below
    x = (x ^ shifted(x, 30, 64)) * -4658895280553007687
    x = (x ^ shifted(x, 27, 64)) * -7723592293110705685
    x = x ^ shifted(x, 31, 64)
    low = ((x & 0xFFFFFFFF) - 2147483648).to(tl.int32)
    high = (shifted(x, 32, 64) - 2147483648).to(tl.int32)
    bits = (of_columns ^ low) * -2048144789
    bits = ((bits ^ shifted(bits, 15, 32)) + high) * -1028477387
    bits = (bits ^ shifted(bits, 16, 32)) * -1640531535
    return bits ^ shifted(bits, 15, 32)


@triton.jit
def level_of(x, scale, middles, NUM_LEVELS: tl.constexpr):
    """Returns the index of the level nearest to x / scale, uint8: the number of midpoints below it (binary search)."""
    relative = tl.where(scale > 0, tl.div_rn(x, tl.where(scale > 0, scale, 1.0)), 0.0)
    found = tl.zeros_like(relative).to(tl.int32)
    for power in tl.static_range(8):
        place = found + (128 >> power)
        middle = tl.load(middles + place - 1, mask=place < NUM_LEVELS, other=float("inf"))
        found = tl.where(middle < relative, place, found)
    return found.to(tl.uint8)


@triton.jit(do_not_specialize=["key", "first_row"])
def adamw_kernel(
    weight,  # [R, C], fp32 or bf16
    grad,  # [R, C]
    exp_avg,  # [R, C], fp32 or uint8 codes, as exp_avg_sq
    exp_avg_sq,
    exp_avg_scale,  # fp32 [R, C / block], as exp_avg_sq_scale
    exp_avg_sq_scale,
    signed_levels,  # fp32, like the next three; middles are midpoints between levels
    levels,
    signed_middles,
    middles,
    column_hashes,  # int32 [C]
    key,
    first_row,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    step_size,
    correction2,
    eps,
    num_columns,
    num_blocks,
    blocks_of_row,
    block,
    QUANTIZED: tl.constexpr,
    ROUNDED: tl.constexpr,
    NUM_SIGNED: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program updates BLOCKS blocks of up to WIDTH columns."""
    number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = number < num_blocks
    row, lane = (number // blocks_of_row)[:, None], tl.arange(0, WIDTH)
    column = (number % blocks_of_row)[:, None] * block + lane
    inside = is_block[:, None] & (lane < block) & (column < num_columns)
    place = row * num_columns + column
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if QUANTIZED:
        scale = tl.load(exp_avg_scale + number, mask=is_block, other=0.0)[:, None]
        scale_sq = tl.load(exp_avg_sq_scale + number, mask=is_block, other=0.0)[:, None]
        m = tl.load(signed_levels + tl.load(exp_avg + place, mask=inside, other=0).to(tl.int32)) * scale
        v = tl.load(levels + tl.load(exp_avg_sq + place, mask=inside, other=0).to(tl.int32)) * scale_sq
    else:
        m = tl.load(exp_avg + place, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + correction2) + eps
    new = w * decay - tl.div_rn(m, denominator) * step_size
    if ROUNDED:
        noise = random_bits(key, row + first_row, tl.load(column_hashes + column, mask=inside, other=0))
        bits = new.to(tl.int32, bitcast=True)
        rounded = ((bits + (noise & 0xFFFF)) & -65536).to(tl.float32, bitcast=True)
        is_finite = (bits & 0x7F800000) != 0x7F800000
        tl.store(weight + place, tl.where(is_finite, rounded, new).to(tl.bfloat16), mask=inside)
    else:
        tl.store(weight + place, new, mask=inside)
    if QUANTIZED:
        m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
        scale, scale_sq = tl.max(tl.abs(m), axis=1), tl.max(v, axis=1)
        tl.store(exp_avg_scale + number, scale, mask=is_block)
        tl.store(exp_avg_sq_scale + number, scale_sq, mask=is_block)
        tl.store(exp_avg + place, level_of(m, scale[:, None], signed_middles, NUM_SIGNED), mask=inside)
        tl.store(exp_avg_sq + place, level_of(v, scale_sq[:, None], middles, NUM_LEVELS), mask=inside)
    else:
        tl.store(exp_avg + place, m, mask=inside)
        tl.store(exp_avg_sq + place, v, mask=inside)


def shape_of(num_columns: int, block: int) -> dict[str, int]:
    """Returns the kernel's compile-time constants. block: columns that share a scale, 0 for fp32 moments."""
    width = triton.next_power_of_2(block or min(num_columns, WIDEST))
    return {"BLOCKS": max(1, ELEMENTS // width), "WIDTH": width}


def adamw_(
    weight: Tensor,
    tensors: dict[str, Tensor],
    levels: dict[str, Tensor],
    middles: dict[str, Tensor],
    noise: tuple[int, int, Tensor],
    factors: dict[str, float],
    block: int,
) -> None:
    """Takes one step, in place. weight and tensors (grad, exp_avg, exp_avg_sq; for 8-bit moments also their _scale) are
    contiguous [R, C]. noise: (key, index of the first row, column hashes int32 [C]). factors: those of
    training.optim.factors_of, in their order. block: columns that share a scale of 8-bit moments; 0: fp32 moments."""
    num_rows, num_columns = weight.shape
    shape = shape_of(num_columns, block)
    block_size = block or shape["WIDTH"]
    blocks_of_row = triton.cdiv(num_columns, block_size)
    num_blocks = num_rows * blocks_of_row
    if not num_blocks:
        return
    moments = [tensors["exp_avg"], tensors["exp_avg_sq"]]
    scales = [tensors["exp_avg_scale"], tensors["exp_avg_sq_scale"]] if block else moments
    tables = [table[name] for table in (levels, middles) for name in ("exp_avg", "exp_avg_sq")]
    key, first_row, hashes = noise
    adamw_kernel[(triton.cdiv(num_blocks, shape["BLOCKS"]),)](
        weight,
        tensors["grad"],
        *moments,
        *scales,
        *tables,
        hashes,
        key,
        first_row,
        *factors.values(),
        num_columns,
        num_blocks,
        blocks_of_row,
        block_size,
        QUANTIZED=bool(block),
        ROUNDED=weight.element_size() == 2,
        NUM_SIGNED=len(tables[0]),
        NUM_LEVELS=len(tables[1]),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # else the last bit would differ from _update's
        **shape,
    )
