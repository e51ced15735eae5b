"""Quantised weights: the arithmetic, and the linear layer that computes with them (weight-only; int8, int4 and fp8).

- w = (q - zero) * scale: an integer q, the integer that stands for 0 (none in a symmetric grid), and a scale; each
  output feature, or each group of its input features, has its own zero and scale. Scales are bf16 numbers and the
  integers are chosen for these, so every dtype and every device computes with the same weights; but torch's CPU kernels
  for bf16 round the scales of other tools (fp16 or fp32) to bf16, and its int4 kernel adds the value of q = 8 as a bf16
  number, which moves a group with a zero point by at most 1/64 of a step
- or w = q * scale + minimum, both bf16, in int4 of a base under adapters (models/lora.py): half a bit more per weight,
  a sixth less squared error for normally distributed weights, and none for weights that lie on such a grid
- a layer stores the integers in the order in which the device's kernel reads them; where there is no kernel, or for
  many rows, for which one product of dequantised weights is cheaper, it dequantises for each product
- fp8 (e4m3, a scale for each output feature and each row of activations) saves memory and computes in fp8, on Hopper

Dimensions: M rows of activations, N output features, K input features, G groups of a row, W output features of a block.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cpu_linear import FloatProducts, has_bf16_products, has_fbgemm
from models.gpu import has_triton
from models.tp import Parallel, size_of, sum_parts

MODES = ("int8", "int4", "fp8")
GROUP_SIZES = (32, 64, 128, 256)  # those that the kernels take
ELEMENTS = 2**21  # quantised, or dequantised, at a time
FP8_MAX = 448.0  # the largest number of e4m3fn


class Scheme(NamedTuple):
    """How the weight of a layer is kept."""

    mode: str  # of MODES
    group_size: int | None = None  # input features that share a scale; None: all of a row
    symmetric: bool = True  # about 0; else each scale has a zero point
    has_minima: bool = False  # int4 only: each scale has a minimum, the value of q = 0

    @property
    def bits(self) -> int:
        return 4 if self.mode == "int4" else 8

    def of(self, layer: str) -> "Scheme":
        """The scheme of a layer by its name: the same for all layers."""
        return self

    def num_groups(self, num_inputs: int) -> int:
        return num_inputs // (self.group_size or num_inputs)

    def __str__(self) -> str:
        groups = "" if self.group_size is None else f", groups of {self.group_size}"
        return self.mode + groups + " with minima" * self.has_minima + " with zero points" * (not self.symmetric)


class MixedScheme(NamedTuple):
    """The schemes of a model's layers, where they differ."""

    by_layer: dict[str, Scheme]  # "layers.0.self_attn.q_proj"

    def of(self, layer: str) -> Scheme:
        return self.by_layer[layer]

    def __str__(self) -> str:
        counts = Counter(self.by_layer.values()).most_common()
        return ", ".join(f"{count} layers {scheme}" for scheme, count in counts)


Schemes = Scheme | MixedScheme


class Quantized(NamedTuple):
    """A weight [N, K] in few bits; dequantize() gives its values."""

    values: Tensor  # int8, float8_e4m3fn, or for int4 uint8 in 0..15
    scale: Tensor  # [N, G]; G is 1 where a whole row shares a scale
    zero: Tensor | None = None  # [N, G], in values' dtype: the integer that stands for 0; None: 8 for int4, else 0
    minimum: Tensor | None = None  # [N, G]: the value of q = 0, instead of a zero point


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Concatenates weights along the output features."""
    return Quantized(*(None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*parts)))


# ------------------------------------------------------------------------------------- arithmetic


def quantize(weight: Tensor, scheme: Scheme) -> Quantized:
    """Rounds a weight [N, K] to nearest: int8 symmetric about 0 (-127..127), int4 with int4_scale(), fp8 scaled to its
    largest number. Raises ValueError for a weight that is not finite, or K not divisible by groups."""
    # a few rows at a time: fp32 intermediates of a whole matrix would be several times as large as the result
    return joined([_quantize_rows(rows, scheme) for rows in weight.split(max(1, ELEMENTS // weight.shape[1]))])


def _quantize_rows(weight: Tensor, scheme: Scheme) -> Quantized:
    assert scheme.symmetric, "zero points are read, not written"
    weight = weight.float()
    if scheme.has_minima:
        return _round_from_minima(_in_groups(weight, scheme.group_size))
    if scheme.mode == "int4":
        scale = int4_scale(weight, scheme.group_size)
        _check_finite(scale)
        return round_int4(weight, scale)
    groups = _in_groups(weight, scheme.group_size)
    low, high = _range(groups)
    largest = torch.maximum(high, -low)  # not finite if any weight is not
    _check_finite(largest)
    if scheme.mode == "fp8":
        scale = (largest / FP8_MAX).clamp(min=1e-12)
        return Quantized((weight / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale)
    scale = (largest / 127).bfloat16()
    values = (groups / _divisor(scale)[..., None]).round_().clamp_(-127, 127)
    return Quantized(values.to(torch.int8).view(weight.shape), scale)


def _range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum and maximum of each group; aminmax takes 12 times as long (torch 2.13, CPU)."""
    return groups.amin(dim=-1), groups.amax(dim=-1)


def _check_finite(numbers: Tensor) -> None:
    if not numbers.isfinite().all():
        raise ValueError("a weight is not finite, so it cannot be quantised")


def _in_groups(weight: Tensor, group_size: int | None) -> Tensor:
    """[N, G, group_size]"""
    if group_size is not None and weight.shape[1] % group_size:
        raise ValueError(f"{weight.shape[1]} input features are not divisible by groups of {group_size}")
    return weight.unflatten(1, (-1, group_size or weight.shape[1]))


def int4_scale(weight: Tensor, group_size: int | None) -> Tensor:
    """The int4 scales, bf16 [N, G], of a weight fp32 [N, K]: the number of largest magnitude in a group becomes -8, in
    the range -8 to 7, so a scale may be negative."""
    low, high = _range(_in_groups(weight, group_size))
    return (torch.where(high > -low, high, low) / -8).bfloat16()


def round_int4(weight: Tensor, scale: Tensor) -> Quantized:
    """The nearest of the 16 numbers (q - 8) * scale for each weight [N, K]; scale [N, G]."""
    groups = weight.view(len(weight), scale.shape[1], -1)
    values = (groups / _divisor(scale)[..., None]).round_().add_(8)
    return Quantized(values.clamp_(0, 15).to(torch.uint8).view(weight.shape), scale)


def _round_from_minima(groups: Tensor) -> Quantized:
    """int4 in 15 steps from the minimum of each group to its maximum. groups: fp32 [N, G, group_size]."""
    low, high = _range(groups)
    scale, minimum = ((high - low) / 15).bfloat16(), low.bfloat16()
    _check_finite(scale)
    values = ((groups - minimum[..., None]) / _divisor(scale)[..., None]).round_().clamp_(0, 15)
    return Quantized(values.to(torch.uint8).flatten(1), scale, minimum=minimum)


def dequantize(weight: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a quantised weight, [N, K], each rounded once to dtype."""
    if weight.minimum is not None:
        return _from_minima(weight, dtype)
    scale, zero = weight.scale.to(_exact(weight.scale, dtype)), weight.zero
    groups = weight.values.to(dtype).view(len(scale), scale.shape[1], -1)
    if zero is not None:
        groups.sub_(zero.to(dtype)[..., None])  # 8-bit integers and their differences are exact in bf16
    elif weight.values.dtype == torch.uint8:
        groups.sub_(8)
    return groups.mul_(scale[..., None]).view(weight.values.shape)


def _exact(numbers: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to multiply with these numbers for a result in dtype: fp32 unless dtype holds them."""
    return torch.promote_types(numbers.dtype, dtype)


def _from_minima(weight: Quantized, dtype: torch.dtype) -> Tensor:
    on_gpu = weight.values.device.type == "cuda"
    scale, minimum = (x.to(dtype if on_gpu else torch.float32)[..., None] for x in (weight.scale, weight.minimum))
    groups = weight.values.to(scale.dtype).view(*scale.shape[:2], -1)
    if on_gpu:
        torch.addcmul(minimum, groups, scale, out=groups)
    else:  # addcmul takes five times as long there; the product of 4 bits and a bf16 number is exact in fp32
        groups.mul_(scale).add_(minimum)
    return groups.to(dtype).view(weight.values.shape)


def _divisor(scale: Tensor) -> Tensor:
    """The scale, or 1 where it is 0: in a group of zeros."""
    return scale.float().masked_fill(scale == 0, 1.0)


def fp8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x @ dequantised weight.T in fp8 arithmetic, each row of x scaled to e4m3's range: [M, K] -> [M, N] in x's dtype.

    weight: float8_e4m3fn [N, K]; scale: fp32 [N, 1].
    """
    row_scale = (x.abs().amax(dim=1, keepdim=True).float() / FP8_MAX).clamp(min=1e-12)
    small = (x.float() / row_scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    scales = {"scale_a": row_scale, "scale_b": scale.T.contiguous()}
    return torch._scaled_mm(small, weight.T, **scales, out_dtype=x.dtype, use_fast_accum=x.device.type == "cuda")


# ----------------------------------------------------------------------------------------- kernels
#
# int4 is stored in blocks of W output features, [N / W, K, W / 2] bytes: byte j of an input feature has feature j of
# the block in its low half and j + W / 2 in its high half. That is the order of torch's CPU kernel (W = 64 with
# AVX-512, 32 with AVX2), and as good as any other without it, so one layout serves the kernel and dequantisation.
# GPU kernels have an order of their own (models/triton_linear.py).


def pack_int4(values: Tensor, width: int) -> Tensor:
    """uint8 [N, K] in 0..15 -> uint8 [N / W, K, W / 2]; N divisible by width."""
    low, high = values.view(-1, 2, width // 2, values.shape[1]).transpose(2, 3).unbind(1)
    return (low | (high << 4)).contiguous()


def unpack_int4(packed: Tensor, scales_and_zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """The dequantised weight, transposed: [K, N]. packed: see pack_int4; scales_and_zeros [G, N, 2]."""
    blocks, K, half = packed.shape
    weight = torch.empty(K, blocks, 2 * half, dtype=dtype, device=packed.device)
    scales_and_zeros = scales_and_zeros.to(_exact(scales_and_zeros, dtype)).view(-1, blocks, 2 * half, 2)
    few = max(1, ELEMENTS // (K * 2 * half))
    for part, *numbers in zip(weight.split(few, dim=1), packed.split(few), scales_and_zeros.split(few, dim=1)):
        part.copy_(_unpack_blocks(*numbers).transpose(0, 1))
    return weight.view(K, -1)


def _unpack_blocks(packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """[blocks, K, W]. scales_and_zeros [G, blocks, W, 2]."""
    blocks, K, half = packed.shape
    q = torch.empty(blocks, K, 2, half, dtype=torch.int8, device=packed.device)
    q[:, :, 0], q[:, :, 1] = packed & 15, packed >> 4
    # contiguous, since addcmul takes six times as long over strided numbers
    scale, zero = scales_and_zeros.permute(3, 1, 0, 2).contiguous().unsqueeze(3)  # [blocks, G, 1, W] each
    weight = (q - 8).to(scale.dtype).view(blocks, scale.shape[1], -1, 2 * half)
    return torch.addcmul(zero, weight, scale, out=weight).view(blocks, K, 2 * half)  # rounded once


@cache
def cpu_int4_width() -> int | None:
    """W of this CPU's int4 kernel; None if torch has none, or one with another order of the integers."""
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return None
    values = torch.randint(0, 16, (128, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1).flatten()
    return next((w for w in (64, 32) if torch.equal(pack_int4(values, w).flatten(), packed)), None)


def scales_and_zeros(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """[G, N, 2]: the scales of an int4 weight and the values that q = 8 stands for, as torch's kernels take them."""
    scale = weight.scale.float()
    zero = torch.zeros_like(scale) if weight.zero is None else (8 - weight.zero.float()) * scale
    return torch.stack((scale.T, zero.T), dim=-1).to(dtype).contiguous()


def triton_products(weight: Quantized, scheme: Scheme, splits: int | None = None) -> nn.Module:
    """The module of models/triton_linear.py that multiplies with a weight on its GPU; splits: see there."""
    from models.triton_linear import TritonProducts

    return TritonProducts(weight.values, weight.scale, weight.zero, scheme.group_size, splits)


def kernel_for(scheme: Scheme, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
    """Which kernel multiplies with a quantised weight [N, K]: "fp8", "triton" on GPUs, on CPUs "torch" for products in
    bf16 and "fbgemm" for those in fp32 (models/cpu_linear.py); None for dequantisation."""
    N, K = shape
    if scheme.mode == "fp8":
        return "fp8" if N % 16 == K % 16 == 0 else None
    if device.type == "cuda":
        return "triton" if has_triton(device) and (scheme.group_size or 32) % 32 == 0 else None
    if dtype == torch.float32 or not has_bf16_products():
        return "fbgemm" if has_fbgemm() else None
    if scheme.mode == "int8":  # torch's int8 kernel computes nonsense for an odd K (2.13)
        is_plain = scheme.group_size is None and scheme.symmetric and K % 32 == 0
        return "torch" if is_plain and hasattr(torch.ops.aten, "_weight_int8pack_mm") else None
    return "torch" if scheme.group_size in GROUP_SIZES and cpu_int4_width() else None


def _in_kernel_groups(weight: Quantized, scheme: Scheme) -> tuple[Quantized, Scheme]:
    """Turns int4 with one scale for a row into groups of a size that kernels take, if such a size divides the row."""
    K = weight.values.shape[1]
    size = next((size for size in reversed(GROUP_SIZES) if K % size == 0), K)
    numbers = (None if x is None else x.repeat_interleave(K // size, dim=1) for x in (weight.scale, weight.zero))
    return Quantized(weight.values, *numbers), scheme._replace(group_size=size)


# Rows from which dequantising the weight into one product is faster than the CPU's kernel, which computes row by row:
# measured for 4096 x 768 weights (int8 0.34 and 0.50 ms at 16 and 24 rows against 0.38 and 0.45 dequantised; int4 2.1
# and 2.4 ms at 112 and 128 against 2.3 and 2.4).
MOST_KERNEL_ROWS = {"int8": 20, "int4": 120}


class QuantizedLinear(nn.Module):
    """Quantised linear layers that share an input, as one product, whose output is theirs concatenated. For inference:
    nothing here has a gradient."""

    def __init__(
        self,
        weights: list[Quantized],
        biases: list[Tensor] | None,
        scheme: Scheme,
        dtype: torch.dtype,
        parallel: Parallel = Parallel(),
    ):
        """weights, biases: this tp rank's part of each layer's. dtype: of the activations. parallel: for row-parallel
        layers, whose outputs are summed over the ranks."""
        super().__init__()
        weight = joined(weights)
        shape, device = weight.values.shape, weight.values.device
        self.kernel = kernel_for(scheme, shape, device, dtype)
        if self.kernel is None and scheme.mode == "int4" and scheme.group_size is None:
            weight, scheme = _in_kernel_groups(weight, scheme)
            self.kernel = kernel_for(scheme, shape, device, dtype)
        if self.kernel is None:  # weights that torch's bf16 kernels do not take
            self.kernel = kernel_for(scheme, shape, device, torch.float32)
        self.scheme, self.num_rows = scheme, shape[0]
        self.parallel = parallel if size_of(parallel.tp) > 1 else None
        self.register_buffer("bias", None if biases is None else torch.cat(biases).to(device, dtype))
        self.product, self.is_padded = None, False
        if self.kernel == "fbgemm":
            self.product = FloatProducts(weight.values, weight.scale, weight.zero)
        elif self.kernel == "triton":
            self.product = triton_products(weight, scheme)
        else:
            self._keep(weight, dtype)

    def _keep(self, weight: Quantized, dtype: torch.dtype) -> None:
        """Registers the tensors that torch's kernels or dequantisation read."""
        scheme = self.scheme
        # torch's kernels take scales of the input's dtype only
        kept = dtype if self.kernel == "torch" else _exact(weight.scale, dtype)
        if scheme.mode == "fp8":
            values, scale = weight.values, weight.scale
        elif scheme.mode == "int8":
            values, scale = weight.values, weight.scale.to(kept)
            scale = scale[:, 0] if scheme.group_size is None else scale
        else:
            width = cpu_int4_width() if self.kernel == "torch" else 64
            blocks = (0, 0, 0, -self.num_rows % width)  # padding to whole blocks
            padded = Quantized(*(None if part is None else F.pad(part, blocks) for part in weight))
            values = pack_int4(padded.values, width).view(len(padded.values), -1)  # [N, K / 2], as the kernel takes it
            scale, self.half_width = scales_and_zeros(padded, kept), width // 2
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", weight.zero if scheme.mode == "int8" else None)
        self.is_padded = scheme.mode == "int4" and len(values) != self.num_rows

    @property
    def num_bytes(self) -> int:
        """Bytes that a product of few rows reads."""
        return self.weight.nbytes + self.scale.nbytes if self.product is None else self.product.num_bytes

    def for_rows(self, num_rows: int) -> Callable[[Tensor], Tensor]:
        """forward() for [num_rows, K]; where that is only a call of the CPU's kernel, its tensors are looked up once,
        here: at one row, looking them up takes a tenth of a small product's time."""
        if self.kernel == "fbgemm":
            product = self.product.for_rows(num_rows)
            return product if self.parallel is None and self.bias is None else self
        is_plain = self.kernel == "torch" and self.parallel is None and self.bias is None and not self.is_padded
        if not is_plain or num_rows > MOST_KERNEL_ROWS[self.scheme.mode]:
            return self
        weight, scale, group_size = self.weight, self.scale, self.scheme.group_size
        if self.scheme.mode == "int8":
            product = torch.ops.aten._weight_int8pack_mm.default
            return lambda x: product(x, weight, scale)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        return lambda x: product(x, weight, group_size, scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        if x.dim() != 2:
            return self.forward(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        y = self._product(x)
        if self.parallel is not None:
            return sum_parts(y, self.bias, self.parallel)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]"""
        if self.product is not None:
            return self.product(x)
        if self.kernel == "fp8":
            return fp8_product(x, self.weight, self.scale)
        if self.scheme.mode == "fp8":
            return F.linear(x, (self.weight.float() * self.scale).to(x.dtype))
        few = self.kernel == "torch" and len(x) <= MOST_KERNEL_ROWS[self.scheme.mode]
        if self.scheme.mode == "int8":
            if few:
                return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)
            if self.scale.dim() == 2 or self.zero is not None:
                scale = self.scale.view(len(self.weight), -1)
                return F.linear(x, dequantize(Quantized(self.weight, scale, self.zero), x.dtype))
            return (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        if few:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.scheme.group_size, self.scale)
        else:
            y = x @ unpack_int4(self.weight.view(-1, x.shape[1], self.half_width), self.scale, x.dtype)
        return y[:, : self.num_rows] if self.is_padded else y
