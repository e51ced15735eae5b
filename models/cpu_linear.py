"""Matrix products on a CPU in fp32 with weights stored in fewer bits, by FBGEMM's kernels (x86).

- HalfMatrix: weights in fp16, used if fp16 loses no more than fp32's rounding, as for weights of bf16 folders, int8
  integers and int4 values. For few rows it takes half the time of fp32 weights, for more rows never longer
- Bags: int8 or int4 integers as bytes, for few rows. Their sums weighted by the activations are embedding_bags, one for
  each group of input features and block of output features. For more rows, blocks of weights are dequantised
- the processor's features decide which one is used, never a timing, so that a run is reproducible

All accumulate in fp32 with exact weights, so their results agree to fp32's rounding.

Dimensions: M rows of activations, N output features in blocks of W, K input features, G groups of a row.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@cache
def has_bf16_products() -> bool:
    """Whether this CPU has instructions for bf16 products. Otherwise they are emulated: on AVX2 a product of 512 x 512
    takes 26 times as long as in fp32."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    capability = torch.backends.cpu.get_cpu_capability()  # what torch uses, which the user can set lower
    if capability.startswith("AVX"):
        return capability.startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
    return True


@cache
def has_fbgemm() -> bool:
    """Whether FBGEMM's kernels are available; without them the operators are plain loops, or missing."""
    names = ("linear_prepack_fp16", "embedding_bag_byte_rowwise_offsets", "embedding_bag_byte_unpack")
    built = "fbgemm" in torch.backends.quantized.supported_engines and torch.backends.mkldnn.is_available()
    return built and all(hasattr(torch.ops.quantized, name) for name in names)


class HalfMatrix:
    """A weight [N, K] in fp16, packed for FBGEMM's kernel; made by half_matrix()."""

    def __init__(self, weight: Tensor):
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        self.nbytes = 2 * weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], fp32"""
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def half_matrix(weight: Tensor) -> HalfMatrix | None:
    """Makes a HalfMatrix; None if fp16 loses more of a weight [N, K] than fp32's rounding, or there is no kernel. Each
    row and column is checked, too: small numbers, which fp16 holds in fewer bits, may be all of an output's weights, or
    meet large activations. The limit for each is 16 times as large, 1e-6, since their losses vary."""
    if not has_fbgemm():
        return None
    weight = weight.float()
    lost = weight.half().float() - weight
    if not lost.norm() <= 2**-24 * weight.norm():  # inf and NaN compare as False
        return None
    is_held = all((lost.norm(dim=dim) <= 2**-20 * weight.norm(dim=dim)).all() for dim in (0, 1))
    return HalfMatrix(weight) if is_held else None


class OneDNNMatrix:
    """A weight [N, K] reordered for oneDNN's kernels, in its own dtype."""

    PACK_ROWS = 8  # batch size that oneDNN chooses the layout for; measured equally fast for 1 to 512 rows

    def __init__(self, weight: Tensor):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, self.PACK_ROWS)
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N] in x's dtype, which must be the weight's"""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


class FloatMatrix:
    """A weight [N, K] that is multiplied in fp32 whatever the activations' dtype; in fp16 if HalfMatrix supports it."""

    def __init__(self, weight: Tensor):
        self.product = half_matrix(weight) or OneDNNMatrix(weight.float())
        self.nbytes = self.product.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N] in x's dtype"""
        y = self.product(x.float())
        return (y if bias is None else y.add_(bias)).to(x.dtype)


PackedMatrix = OneDNNMatrix | FloatMatrix


def can_pack_weights(dtype: torch.dtype) -> bool:
    """Whether pack_weight supports activations of this dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and (has_bf16_products() or has_fbgemm()))


def pack_weight(weight: Tensor) -> PackedMatrix:
    """Packs a weight [N, K] in the form whose product with activations of its dtype is fastest on this CPU."""
    return OneDNNMatrix(weight) if has_bf16_products() else FloatMatrix(weight)


def block_width(num_outputs: int) -> int:
    """Returns a block's output features: as many sums as FBGEMM keeps in registers, or fewer if that pads less."""
    most = 384 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 96
    blocks = -(-num_outputs // most)
    return -(-num_outputs // (16 * blocks)) * 16


class Bags(nn.Module):
    """Quantised weights as tables of embedding bags: row k of a block holds the integers of W output features as bytes,
    then the scale and offset that the operator applies: 1, and minus the byte that stands for 0.

    A group's scale multiplies the sum over the group, in fp32. int4 takes a whole byte too: the operator's kernel for
    half bytes takes 1.6 times as long (3072 x 576, groups of 32, one core with AVX2: 304 us and 193).
    """

    EXPANDED = 2**20  # numbers that are dequantised at a time: 4 MB, about the size of the cores' caches
    FEW_ROWS = 6  # up to so many rows, bags take less time than one product of dequantised weights
    MANY_ROWS = 96  # from here on, oneDNN's product of a wide matrix takes less time than MKL's of blocks

    def __init__(self, values: Tensor, scale: Tensor):
        """values [N, K]: int8 with zero point 0, or uint8 in 0..15 with zero point 8; scale [N, G]."""
        super().__init__()
        (N, K), (_, G), W = values.shape, scale.shape, block_width(len(values))
        self.sizes, missing = (N, K, G), -N % W
        if values.dtype == torch.int8:
            values, self.zero = values.view(torch.uint8) ^ 128, 128
        else:
            self.zero = 8
        rows = F.pad(values, (0, 0, 0, missing)).unflatten(0, (-1, W)).transpose(1, 2)  # [blocks, K, W]
        trailer = torch.tensor([1.0, -self.zero]).view(torch.uint8)
        self.register_buffer("table", torch.cat((rows, trailer.expand(*rows.shape[:2], -1)), dim=-1))
        scale = F.pad(scale.float(), (0, 0, 0, missing)).unflatten(0, (-1, W)).transpose(1, 2)  # [blocks, G, W]
        self.register_buffer("scale", scale.contiguous())
        self.bound: dict[int, Callable[[Tensor], Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        return self.table.nbytes + self.scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x @ weight.T, [M, K] -> fp32 [M, N]; computed in fp32, or many bf16 rows in bf16 if the CPU supports it"""
        if len(x) <= self.FEW_ROWS:
            return self.for_few_rows(len(x))(x)
        return self.many_rows(x if has_bf16_products() else x.float())

    def for_few_rows(self, M: int) -> Callable[[Tensor], Tensor]:
        """Returns a function x @ weight.T in fp32, [M, K] -> [M, N], whose time grows with M. Its constants are looked
        up only once: at one row the look-ups would take a fifth of a small product's time."""
        if M in self.bound:
            return self.bound[M]
        (N, K, G), (blocks, _, W) = self.sizes, self.scale.shape
        every = torch.arange(blocks * K, dtype=torch.int32).view(blocks, 1, K).expand(blocks, M, K).flatten()
        ends = torch.arange(0, len(every) + 1, K // G, dtype=torch.int32)
        table, scale = self.table.flatten(0, 1), self.scale[:, None]
        bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default

        def product(x: Tensor) -> Tensor:
            weights = x.float().expand(blocks, M, K).reshape(-1)
            sums = bag(table, every, ends, False, 0, False, weights, None, True).view(blocks, M, G, W)
            y = (sums.mul_(scale).sum(dim=2) if G > 1 else sums.mul_(scale)).view(blocks, M, W)
            y = y.view(1, -1) if M == 1 else y.transpose(0, 1).reshape(M, -1)
            return y[:, :N] if blocks * W > N else y

        self.bound[M] = product
        return product

    def many_rows(self, x: Tensor) -> Tensor:
        """x @ weight.T in x's dtype, [M, K] -> fp32 [M, N]; dequantises a few blocks of weights at a time."""
        (N, K, G), (blocks, _, W), M = self.sizes, self.scale.shape, len(x)
        few, is_wide = max(1, self.EXPANDED // (K * W)), M >= self.MANY_ROWS
        y = torch.empty(M, blocks, W)
        for first in range(0, blocks, few):
            part = slice(first, first + few)
            if is_wide:
                weight = self._expanded(part, together=True).to(x.dtype)  # oneDNN takes this layout without a copy
                sums = torch.ops.mkldnn._linear_pointwise(x, weight.flatten(1).T, None, "none", [], "")
                sums = sums.unflatten(1, (-1, W))
            else:
                weight = self._expanded(part).to(x.dtype)
                sums = torch.bmm(x.expand(len(weight), M, K), weight).transpose(0, 1)
            torch.mul(sums, self.scale[part, 0] if G == 1 else 1.0, out=y[:, part])
        return y.view(M, -1)[:, :N]

    def _expanded(self, blocks: slice, *, together: bool = False) -> Tensor:
        """Dequantises blocks, to integers only if a row has one scale: [blocks, K, W]; together: [K, blocks, W]"""
        (_, K, G), table, scale = self.sizes, self.table[blocks], self.scale[blocks]
        if together:
            table, scale = table.transpose(0, 1), scale.transpose(0, 1)
        weight = self._integers(table)
        if G > 1:
            dim = 0 if together else 1
            weight.unflatten(dim, (G, K // G)).mul_(scale.unsqueeze(dim + 1))
        return weight

    def _integers(self, table: Tensor) -> Tensor:
        """Unpacks the integers of rows [..., W + 8], fp32 [..., W]"""
        if torch.compiler.is_compiling():  # torch.compile does not support FBGEMM's operators
            return table[..., : self.scale.shape[-1]].float() - self.zero
        unpack = torch.ops.quantized.embedding_bag_byte_unpack.default
        return unpack(table.reshape(-1, table.shape[-1])).view(*table.shape[:-1], -1)

    def whole(self, *, scaled: bool) -> Tensor:
        """Returns the weight [N, K], or its integers."""
        weight = self._expanded(slice(None)) if scaled else self._integers(self.table)
        weight = weight * self.scale if scaled and self.sizes[2] == 1 else weight
        return weight.transpose(1, 2).flatten(0, 1)[: self.sizes[0]]

    def row_scale(self) -> Tensor:
        """[N], if a row has one scale"""
        return self.scale.flatten()[: self.sizes[0]]


class FloatProducts(nn.Module):
    """The product of quantised weights on CPUs for activations of any dtype: Bags, which a HalfMatrix replaces if
    decode steps have more rows and fp16 holds the weights exactly. Zero points are a separate term: their offset of a
    group's weights, times the sum of the group's activations.
    """

    def __init__(self, values: Tensor, scale: Tensor, zero: Tensor | None = None):
        """values, scale: as for Bags; zero [N, G]: zero points other than those of Bags."""
        super().__init__()
        self.bags, self.half, self.scale = Bags(values, scale), None, None
        usual = 0 if values.dtype == torch.int8 else 8
        offsets = None if zero is None else ((usual - zero.float()) * scale.float()).T.contiguous()
        self.register_buffer("offsets", offsets)  # [G, N]: what a zero point adds to every weight of a group
        # rows of a decode step up to which Bags are faster. On one core with AVX2 the products of SmolLM2-135M's blocks
        # take at 1 and 4 rows 15.5 and 39 ms in int8; as HalfMatrix 25.6 and 33; in fp32 47 and 63
        self.most_rows = 2 if scale.shape[1] == 1 else 1

    @property
    def num_bytes(self) -> int:
        more = sum(x.nbytes for x in (self.scale, self.offsets) if x is not None)
        return more + (self.bags.num_bytes if self.half is None else self.half.nbytes)

    def for_rows(self, num_rows: int) -> Callable[[Tensor], Tensor]:
        """Returns forward() for decode steps of num_rows rows."""
        if self.half is None and num_rows > self.most_rows:
            self._become_half()
        if self.bags is None or num_rows > self.most_rows:
            return self
        product = self.bags.for_few_rows(num_rows)
        if self.offsets is None:
            return lambda x: product(x).to(x.dtype)
        return lambda x: self._with_offsets(x, product(x)).to(x.dtype)

    def _become_half(self) -> None:
        integers_alone = self.bags.sizes[2] == 1
        self.half = half_matrix(self.bags.whole(scaled=not integers_alone))
        if self.half is not None:
            self.scale, self.bags = (self.bags.row_scale() if integers_alone else None), None

    def _with_offsets(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds the zero points' term to y, in place."""
        return y.addmm_(x.float().view(len(x), len(self.offsets), -1).sum(dim=2), self.offsets)

    def _values(self) -> Tensor:
        """Returns the dequantised weight, fp32 [N, K]."""
        weight = self.bags.whole(scaled=True)
        if self.offsets is not None:
            weight.unflatten(1, (len(self.offsets), -1)).add_(self.offsets.T[..., None])
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N] in x's dtype"""
        if torch.compiler.is_compiling():  # torch.compile does not support FBGEMM's operators
            return F.linear(x.float(), self._values()).to(x.dtype)
        if self.half is not None:
            y = self.half(x.float())
            y = y if self.scale is None else y.mul_(self.scale)
        else:
            y = self.bags(x)
        return (y if self.offsets is None else self._with_offsets(x, y)).to(x.dtype)
