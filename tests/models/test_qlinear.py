"""Quantised weights: their arithmetic, and the products with them."""

import pytest
import torch
import torch.nn.functional as F

from models import qlinear as q
from models.common import Runtime
from models.compressed import columns_of
from models.cpu_linear import FloatMatrix, FloatProducts, HalfMatrix, half_matrix, has_fbgemm
from models.decode import can_pack
from models.decode_cpu import QuantizedHead
from models.qlinear import Quantized, QuantizedLinear, Scheme, dequantize, quantize

INT4 = [Scheme("int4", g) for g in q.GROUP_SIZES]
ZEROS = Scheme("int4", 32, symmetric=False)
SCHEMES = [Scheme("int8"), *INT4]
MINIMA = Scheme("int4", 32, has_minima=True)
READ = [Scheme("int8", 64), Scheme("int8", None, False), Scheme("int4", None), Scheme("int4", 8, False), ZEROS]
CPU = torch.device("cpu")
HAS_HEAD = can_pack(Runtime(CPU, torch.bfloat16, False)) and has_fbgemm()


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight[:, ::7] *= 5  # groups of unlike ranges
    return weight + 0.1


@pytest.mark.parametrize("scheme", [*SCHEMES, MINIMA], ids=str)
def test_rounding(scheme):
    """Catches a scale of another row or group, a zero or minimum on the wrong side, truncation instead of rounding, and
    integers out of range: no weight is off by more than half a step, plus the bf16 rounding of scale, zero and minimum,
    and, in symmetric int4, whose range ends at 7 steps on one side, half a step more there."""
    weight = random_weight(24, 512)
    small = quantize(weight, scheme)
    assert small.values.min() >= (-127 if scheme.mode == "int8" else 0)
    assert small.values.max() <= (127 if scheme.mode == "int8" else 15)
    groups = weight.view(24, -1, scheme.group_size or 512)
    low, high, about_0 = groups.amin(-1), groups.amax(-1), not scheme.has_minima
    if not scheme.has_minima:
        low, high = low.clamp(max=0), high.clamp(min=0)
    spread = 2 * torch.maximum(high, -low) if about_0 else high - low
    step = spread / (254 if scheme.mode == "int8" else 16 if about_0 else 15)
    error = (dequantize(small) - weight).abs().view(groups.shape)
    bound = 0.5 * step + (spread / 2 if about_0 else torch.maximum(high, spread)) * 2**-8
    if scheme.mode == "int4" and about_0:
        beyond = torch.where(high > -low, -low, high) - 7.5 * step  # of the side with 7 steps
        bound += beyond.clamp(min=0)
    assert (error <= bound[..., None]).all()
    assert error.mean() < 0.3 * step.mean()  # 0.25 is uniform rounding


def test_constant_and_broken_weights():
    """Catches 0 / 0 in rows or groups that are all zero, an end of the range out of reach, and NaN that would become
    integers."""
    for scheme in [*SCHEMES, MINIMA]:
        assert torch.equal(dequantize(quantize(torch.zeros(4, 256), scheme)), torch.zeros(4, 256))
        constant = torch.full((4, 256), 0.75)
        half_step = 0.75 / 15 if scheme.mode == "int4" and not scheme.has_minima else 0
        torch.testing.assert_close(dequantize(quantize(constant, scheme)), constant, rtol=2**-8, atol=half_step)
        with pytest.raises(ValueError, match="not finite"):
            quantize(constant.index_fill(0, torch.tensor([2]), torch.nan), scheme)
    with pytest.raises(ValueError, match="100 input features are not divisible by groups of 64"):
        quantize(torch.zeros(4, 100), Scheme("int4", 64))


def test_minima():
    """Catches a grid other than that of GGUF's Q4_1, 15 steps from the least weight of a group to its largest: weights
    on such a grid come back to the bit, in fp32 and bf16, and so does a part of their columns."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (6, 4, 32), generator=generator)
    values[..., 3], values[..., 20] = 0, 15
    step = torch.rand(6, 4, 1, generator=generator).bfloat16().float()
    minimum = step * torch.randint(-40, 20, step.shape, generator=generator)
    minimum = minimum.bfloat16().float()
    weight = (minimum + step * values).flatten(1)
    small = quantize(weight, MINIMA)
    assert torch.equal(small.values, values.flatten(1).to(torch.uint8))
    assert torch.equal(dequantize(small), weight)
    assert torch.equal(dequantize(small, torch.bfloat16), weight.bfloat16())
    assert torch.equal(dequantize(columns_of(small, slice(32, 96), MINIMA)), weight[:, 32:96])


def quantized(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """quantize(), or random integers, scales and zero points where a scheme is only read, never written."""
    if scheme.symmetric and scheme not in READ:
        return quantize(weight, scheme)
    low, high, dtype = (0, 16, torch.uint8) if scheme.mode == "int4" else (-128, 128, torch.int8)
    generator = torch.Generator().manual_seed(len(weight))
    values = torch.randint(low, high, weight.shape, dtype=dtype, generator=generator)
    shape = (len(weight), scheme.num_groups(weight.shape[1]))
    zero = None if scheme.symmetric else torch.randint(low, high, shape, dtype=dtype, generator=generator)
    return Quantized(values, torch.rand(shape, generator=generator).bfloat16(), zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES + READ, ids=str)
def test_product(scheme, dtype):
    """Catches a layout that is not the kernel's, scales in another order, rows of padding in the output, a bias that
    is lost or of another layer, and a switch between kernel and dequantisation that changes the result: fused layers
    of odd widths, 1 to 150 rows, against torch's product of the dequantised weights."""
    weights = [random_weight(rows, 256, seed=rows) for rows in (40, 13, 7)]
    small = [quantized(weight, scheme) for weight in weights]
    biases = [torch.randn(len(weight)) for weight in weights]
    whole = torch.cat([dequantize(part) for part in small])
    for with_bias in (biases, None):
        layer = QuantizedLinear(small, with_bias, scheme, dtype)
        for shape in [(rows,) for rows in (*range(1, 41), 72, 73, 150)] + [(2, 5), (3, 50)]:
            x = torch.randn(*shape, 256).to(dtype)
            bias = torch.cat(with_bias).to(dtype).float() if with_bias else None
            wanted = F.linear(x.float(), whole, bias)
            tolerance = 3e-6 if dtype == torch.float32 else 6e-3
            error = (layer(x).float() - wanted).norm() / wanted.norm()
            assert layer(x).dtype == dtype and layer(x).shape == wanted.shape and error < tolerance, (shape, error)


def test_kernels_are_used(monkeypatch):
    """Catches a kernel that is never reached, or reached with a shape that it computes wrongly (torch's int8 kernel
    reads past the end of rows that 32 does not divide), on CPUs with and without bf16 instructions."""
    of_fp32 = "fbgemm" if has_fbgemm() else None
    odd = (Scheme("int8", 64), Scheme("int8", None, False), Scheme("int4", 8), Scheme("int4", 512))
    for scheme in (Scheme("int8"), Scheme("int4", 32), *odd):
        assert q.kernel_for(scheme, (64, 512), CPU, torch.float32) == of_fp32
        monkeypatch.setattr(q, "has_bf16_products", lambda: False)
        assert q.kernel_for(scheme, (64, 512), CPU, torch.bfloat16) == of_fp32
    monkeypatch.setattr(q, "has_bf16_products", lambda: True)
    assert q.kernel_for(Scheme("int8"), (64, 256), CPU, torch.bfloat16) == "torch"
    assert q.kernel_for(Scheme("int8"), (64, 40), CPU, torch.bfloat16) is None
    for scheme in odd:
        assert q.kernel_for(scheme, (64, 512), CPU, torch.bfloat16) is None
        layer = QuantizedLinear([quantized(random_weight(16, 512), scheme)], None, scheme, torch.bfloat16)
        assert layer.kernel == of_fp32  # rather than to be expanded in every step
    assert q.cpu_int4_width() in (32, 64, None)
    has_int4 = q.cpu_int4_width() is not None
    assert (q.kernel_for(Scheme("int4", 128), (64, 256), CPU, torch.bfloat16) == "torch") == has_int4
    by_rows = Scheme("int4", None, False)  # reaches the kernel as groups
    layer = QuantizedLinear([quantized(random_weight(8, 96), by_rows)], None, by_rows, torch.bfloat16)
    assert (layer.kernel == "torch") == has_int4 and layer.scheme.group_size == 32
    layer = QuantizedLinear([quantize(random_weight(5, 40), Scheme("int8"))], None, Scheme("int8"), torch.bfloat16)
    x = torch.randn(3, 40).bfloat16()
    wanted = x.float() @ dequantize(quantize(random_weight(5, 40), Scheme("int8"))).T
    torch.testing.assert_close(layer(x).float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not has_fbgemm(), reason="no FBGEMM on this CPU")
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 32), Scheme("int8", 64), ZEROS, READ[1]], ids=str)
def test_forms_in_fp32(scheme):
    """Catches a form of a decode step's weights (bags or fp16) that rounds them, is not taken for its number of rows,
    or is kept beside the other; zero points lost or of another group; and expanded blocks joined wrongly. int8 in
    groups stays in bags, since fp16 does not hold it."""
    small = quantized(random_weight(1000, 192), scheme)
    whole, group_size = dequantize(small), scheme.group_size
    products = FloatProducts(small.values, small.scale, small.zero)
    products.bags.EXPANDED = 2**16
    x = torch.randn(3, 192)
    compiled = torch.compile(products, backend="eager", fullgraph=True)(x)  # which knows none of FBGEMM's operators
    torch.testing.assert_close(compiled, x @ whole.T, rtol=1e-4, atol=1e-4)
    for slots in (1, 3, 40, 2):
        step = products.for_rows(slots)
        for rows, product in ((slots, step), (1, products), (5, products), (70, products)):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(rows, 192).to(dtype)
                found, wanted = product(x), x.float() @ whole.T
                error = (found.float() - wanted).norm() / wanted.norm()
                assert found.dtype == dtype and error < (2e-6 if dtype == torch.float32 else 4e-3), (slots, rows, error)
        is_half = slots != 1 and not (scheme.mode == "int8" and group_size)
        assert (products.half is not None) == is_half == (products.bags is None)
    bytes_each = 2 if products.half else 1
    assert 1 <= products.num_bytes / (bytes_each * whole.numel()) < (1.4 if group_size else 1.2)


@pytest.mark.skipif(not has_fbgemm(), reason="no FBGEMM on this CPU")
def test_half_holds_what_fp32_does():
    """Catches fp16 chosen for weights that it does not hold (fp32 ones, very large or small ones, NaN), errors where a
    row or a column is small beside the others, and a bias or a dtype lost."""
    torch.manual_seed(0)
    weight = random_weight(70, 96).bfloat16()
    assert isinstance(half_matrix(weight), HalfMatrix) and isinstance(half_matrix(weight.float()), HalfMatrix)
    for size, dim in ((70, 0), (96, 1)):  # a channel that is small here, and large in the layer before or behind
        scales = torch.ones(size).index_fill(0, torch.tensor([3, 17]), 2**-16).unsqueeze(1 - dim)
        x, uneven = torch.randn(3, 96), weight * scales.bfloat16()
        x = x if dim == 0 else x / scales
        found, wanted = FloatMatrix(uneven)(x).double(), x.double() @ uneven.double().T
        assert ((found - wanted).norm(dim=0) / wanted.norm(dim=0)).max() < 2e-6
    for other in (random_weight(70, 96), weight.float() * 2**-22, weight.float() * 2**16, weight * torch.nan):
        assert half_matrix(other) is None
    for each in (weight, random_weight(70, 96)):
        for dtype in (torch.float32, torch.bfloat16):
            x, bias = torch.randn(2, 3, 96).to(dtype), torch.randn(70).to(dtype)
            found, wanted = FloatMatrix(each)(x, bias), F.linear(x.float(), each.float(), bias.float())
            error = (found.float() - wanted).norm() / wanted.norm()
            assert found.dtype == dtype and error < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("width", [32, 64])
def test_plain_layout(width):
    """Catches swapped halves of a byte: unpacking gives what was packed, also where torch has no kernel."""
    small = quantized(random_weight(192, 96), ZEROS)
    scales = q.scales_and_zeros(small, torch.float32)
    unpacked = q.unpack_int4(q.pack_int4(small.values, width), scales, torch.float32)
    assert torch.equal(unpacked.T, dequantize(small))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_product(dtype):
    """Catches a scale of the wrong operand, or one scale for a whole operand: rows differ widely in size, and the error
    is that of an e4m3 product (3 bits: 2^-4 at most for each factor)."""
    weight = random_weight(48, 64) * torch.logspace(-3, 3, 48)[:, None]
    small = quantize(weight, Scheme("fp8"))
    rows = (dequantize(small) - weight).norm(dim=1) / weight.norm(dim=1)
    assert rows.max() < 0.04 and small.values.dtype == torch.float8_e4m3fn
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    x = (x * torch.logspace(-2, 2, 5)[:, None]).to(dtype)
    wanted = dequantize(quantize(x, Scheme("fp8"))) @ dequantize(small).T  # each row of x has a scale of its own too
    layer = QuantizedLinear([small], None, Scheme("fp8"), dtype)
    try:
        found = layer(x)
    except RuntimeError as error:  # torch 2.11 on the CPU
        pytest.skip(f"no fp8 product here: {error}")
    error = (found.float() - wanted).norm(dim=0) / wanted.norm(dim=0)
    assert found.dtype == dtype and error.max() < 0.01
    few = Quantized(small.values[:5], small.scale[:5])  # 5 features: no kernel
    plain = QuantizedLinear([few], None, Scheme("fp8"), dtype)(x).float()
    wanted = x.float() @ dequantize(few).T
    assert (plain - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.skipif(not HAS_HEAD, reason="no packed bf16 products or no byte bags on this CPU")
@pytest.mark.parametrize("vocab_size", [100, 1000])
def test_quantized_head(vocab_size):
    """Catches bags that read other rows or scales, a partly filled last bag misread, a packed form with other weights,
    sums rounded to bf16, and two forms kept at once: few rows, many and few again, against torch's product of the
    dequantised weights."""
    weight = random_weight(vocab_size, 64).bfloat16()
    whole = dequantize(quantize(weight, Scheme("int8")))
    head = QuantizedHead(weight)
    assert vocab_size * 64 < head.num_bytes < 1.2 * (vocab_size + 384) * 64 + 4 * vocab_size
    for shape in ((1,), (1, 2), (2,), (1,), (5,), (40,), (2, 3), (1,)):
        x = torch.randn(*shape, 64).bfloat16()
        found, wanted = head(x), F.linear(x.float(), whole)
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        error = (found - wanted).norm() / wanted.norm()
        assert error < 1e-6, shape
        assert (head.products.bags is None) == (head.products.half is not None)
    assert head.products.half is not None and head.num_bytes >= 2 * vocab_size * 64
    with pytest.raises(ValueError, match=r"lm_head\.weight: .* not finite"):
        QuantizedHead(weight.index_fill(0, torch.tensor([2]), torch.nan))
