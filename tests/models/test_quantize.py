import io
from contextlib import redirect_stderr

import pytest
import torch
import torch.nn.functional as F

from models import qlinear as q
from models.checkpoint import WeightFiles, load_model
from models.common import Runtime
from models.compressed import columns_of
from models.config import ModelConfig, read_hf_config
from models.cpu_linear import FloatMatrix, FloatProducts, HalfMatrix, half_matrix, has_fbgemm
from models.decode import InferenceLinear, can_pack, load_for_inference, weight_bytes
from models.decode_cpu import QuantizedHead
from models.export import save_folder
from models.generation import Engine, Request
from models.qlinear import Quantized, QuantizedLinear, Scheme, dequantize, quantize
from models.quantize import check_scheme, choose_scheme, load_quantized, rounding_scheme
from models.sampling import SamplingParams
from tests import tiny
from tests.inference.test_score import write_reward_model

INT4 = [Scheme("int4", g) for g in q.GROUP_SIZES]
ZEROS = Scheme("int4", 32, symmetric=False)
SCHEMES = [Scheme("int8"), *INT4]
MINIMA = Scheme("int4", 32, has_minima=True)
READ = [Scheme("int8", 64), Scheme("int8", None, False), Scheme("int4", None), Scheme("int4", 8, False), ZEROS]
CPU = torch.device("cpu")
FP32, BF16 = Runtime(CPU, torch.float32, False), Runtime(CPU, torch.bfloat16, False)
HAS_HEAD = can_pack(BF16) and has_fbgemm()


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


# ------------------------------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A folder of a GQA model with biases, whose sizes are divisible by groups of 32."""
    path = tmp_path_factory.mktemp("quantize") / "biased"
    tiny.write_model(path, attention_bias=True, mlp_bias=True, intermediate_size=128)
    return path


def dequantized_reference(folder, scheme):
    """transformers' model of a folder, with the weights of its blocks replaced by their dequantised values."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data = dequantize(quantize(parameter.data, scheme))
    return model


@pytest.mark.parametrize("kind", ["biased", "qwen2", "qwen3"])
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 32)], ids=str)
def test_loaded_model(biased, scheme, kind, tmp_path):
    """Catches weights of other layers, biases or norms lost, and layers left out or quantised that should not be: the
    logits are those of transformers with the dequantised weights."""
    if kind != "biased":
        config = {"qwen2": tiny.QWEN2, "qwen3": tiny.QWEN3}[kind]
        tiny.write_model(tmp_path, intermediate_size=128, rope_parameters=tiny.YARN, **config)
    folder = biased if kind == "biased" else tmp_path
    reference = dequantized_reference(folder, scheme)
    ids = torch.randint(3, tiny.VOCAB_SIZE, (2, 30))
    wanted = reference(ids).logits
    model = load_for_inference(folder, FP32, scheme=scheme)
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(model(ids)), wanted, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("slots, config", [(1, {}), (3, {}), (3, tiny.QWEN3)], ids=str)
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 32)], ids=str)
def test_decode_step_in_bf16(tmp_path, scheme, slots, config):
    """Catches a decode step whose products, bound once for a run, differ from the prefill's: the log-probs of drawn
    tokens are those of transformers with the dequantised weights, for one run after another."""
    tiny.write_model(tmp_path / "model", intermediate_size=128, **config)
    reference = dequantized_reference(tmp_path / "model", scheme)
    model = load_for_inference(tmp_path / "model", BF16, scheme=scheme)
    engine = Engine(model, SamplingParams(), num_slots=slots, max_seq_len=40)
    requests = [Request(i, 0, torch.randint(3, tiny.VOCAB_SIZE, (3 + i,)).tolist(), 20) for i in range(5)]
    for _ in range(2):
        errors = []
        for done in engine.generate(requests):
            ids = torch.tensor(done.request.prompt_ids + done.token_ids)
            wanted = reference(ids[None]).logits[0, -21:-1].log_softmax(-1).gather(1, ids[-20:, None])[:, 0]
            errors.append(wanted - torch.tensor(done.logprobs))
        assert len(errors) == 5 and torch.stack(errors).abs().max() < 0.08


def test_bytes(biased):
    """Catches a weight kept twice or unpacked: compares the bytes that a decode step reads with arithmetic."""
    config = ModelConfig.from_hf(biased)
    E, ffn = config.hidden_size, config.intermediate_size
    weights = 2 * (E * E + 2 * E * E // 2 + E * E + 3 * E * ffn)
    head = config.vocab_size * (E + 4 if HAS_HEAD else 2 * E)
    of_int4 = 0.5 if q.has_bf16_products() or not has_fbgemm() else 1  # FBGEMM's bags hold bytes
    for scheme, each in ((Scheme("int8"), 1), (Scheme("int4", 32), of_int4 + 4 / 32)):
        model = load_for_inference(biased, BF16, scheme=scheme)
        assert weights * each + head <= weight_bytes(model) <= 1.3 * (weights * each + head)


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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_which_head(tmp_path, tied):
    """Catches an embedding rounded with the head; a head quantised from other numbers than the folder's, or at all in
    fp32, under torch.compile or in a plain model; and a frozen model without lm_head.weight, which the references of
    DPO and PPO read."""
    tiny.write_model(tmp_path / "model", tie_word_embeddings=tied)
    scheme = Scheme("int8")
    frozen = load_quantized(tmp_path / "model", scheme, device=CPU, dtype=torch.bfloat16)
    weight = frozen.lm_head.weight
    assert weight.dtype == torch.bfloat16
    model = load_for_inference(tmp_path / "model", BF16, scheme=scheme)
    assert torch.equal(model.embed_tokens.weight, frozen.embed_tokens.weight)
    if HAS_HEAD:
        assert isinstance(model.lm_head, QuantizedHead)
        x = torch.randn(1, weight.shape[1]).bfloat16()
        wanted = x.float() @ dequantize(quantize(weight, scheme)).T
        assert (model.lm_head(x) - wanted).norm() < 1e-6 * wanted.norm()
    for runtime, how in ((BF16, None), (BF16._replace(compile=True), scheme), (FP32, scheme)):
        model = load_for_inference(tmp_path / "model", runtime, scheme=how)
        assert isinstance(model.lm_head, InferenceLinear), (runtime, how)


# ------------------------------------------------------------------------------------------ folder

SCRIPT = "scripts/quantize.py"
FLAGS = {"int8": ("--mode", "int8"), "int4": ("--mode", "int4", "--group_size", 32)}
SMALL = {"int8": Scheme("int8"), "int4": Scheme("int4", 32)}


@pytest.fixture(scope="module", params=FLAGS)
def written(request, biased, tmp_path_factory):
    """(scheme, the folder that the script wrote of `biased`)"""
    out = tmp_path_factory.mktemp("written") / "new" / request.param
    result = tiny.run(SCRIPT, "--checkpoint_path", biased, "--output_dir", out, *FLAGS[request.param])
    assert result.code == 0 and str(SMALL[request.param]) in result.stdout, result
    return SMALL[request.param], out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folder_equals_on_the_fly(biased, written, dtype):
    """Catches scales that lose bits in the files, and a reader that pairs them with other weights: every tensor of the
    loaded model is that of --quantize, to the bit."""
    scheme, folder = written
    assert choose_scheme(folder, "none") == scheme == choose_scheme(folder, scheme.mode)
    stored = load_for_inference(folder, Runtime(CPU, dtype, False), scheme=choose_scheme(folder, "none"))
    wanted = load_for_inference(biased, Runtime(CPU, dtype, False), scheme=scheme)
    ids = torch.randint(3, tiny.VOCAB_SIZE, (2, 20))
    with torch.no_grad():
        assert torch.equal(stored.lm_head(stored(ids)), wanted.lm_head(wanted(ids)))
    for (name, found), (other, expected) in zip(stored.named_buffers(), wanted.named_buffers(), strict=True):
        assert name == other and torch.equal(found, expected), name


def test_largest_group_that_fits(tmp_path):
    """Catches --quantize int4 that stops where 128 does not divide, takes smaller groups than it must, forgets that
    ranks share the inputs of down_proj and o_proj, or says nothing; and advice that another layer refuses."""
    shares = "heads x head_dim 128 / 4 ranks or intermediate_size 256 / 4 ranks"
    for ffn, tp_size, group_size, undivided in (
        (256, 1, 128, None),
        (192, 1, 64, "intermediate_size 192"),
        (256, 4, 32, shares),
    ):
        config, stderr = ModelConfig(384, 128, ffn, 1, 4, 4, 32), io.StringIO()
        with redirect_stderr(stderr):
            scheme = rounding_scheme("int4", None, config, tp_size)
        assert scheme == Scheme("int4", group_size)
        said = f"int4: groups of {group_size}, since 128 does not divide {undivided}\n"
        assert stderr.getvalue() == ("" if undivided is None else said)
        check_scheme(scheme, config, CPU, torch.bfloat16, tp_size)
    with pytest.raises(ValueError, match="no group size divides intermediate_size 112; take int8"):
        rounding_scheme("int4", None, ModelConfig(384, 128, 112, 1, 4, 4, 32))
    with pytest.raises(ValueError, match="128 is not divisible by groups of 256; groups of 64 are possible"):
        check_scheme(Scheme("int4", 256), ModelConfig(384, 128, 192, 1, 4, 4, 32), CPU, torch.bfloat16, 1)


def test_folder_of_several_shards(biased, tmp_path):
    """Catches an index without the scales, and shards that are not joined."""
    tensors = {name: WeightFiles(biased).read(name) for name in WeightFiles(biased).names()}
    config = read_hf_config(biased)
    save_folder(tmp_path / "in", tensors.items(), config=config, copy_from=biased, max_shard_bytes=60_000)
    flags = ("--mode", "int8", "--output_dir", tmp_path / "out")
    assert tiny.run(SCRIPT, "--checkpoint_path", tmp_path / "in", *flags).code == 0
    model = load_for_inference(tmp_path / "out", FP32, scheme=Scheme("int8"))
    wanted = load_for_inference(biased, FP32, scheme=Scheme("int8"))
    ids = torch.randint(3, tiny.VOCAB_SIZE, (1, 20))
    assert torch.equal(model(ids), wanted(ids))


def test_tied_and_reward_folders(tmp_path):
    """Catches a head that is written twice or lost: tied embeddings, and a scalar head."""
    tiny.write_model(tmp_path / "tied", tie_word_embeddings=True, intermediate_size=128)
    write_reward_model(tmp_path / "rm", intermediate_size=128)
    ids = torch.randint(3, tiny.VOCAB_SIZE, (1, 20))
    for name, head in (("tied", "lm"), ("rm", "score")):
        out = tmp_path / f"{name}-int8"
        assert tiny.run(SCRIPT, "--checkpoint_path", tmp_path / name, "--output_dir", out, "--mode", "int8").code == 0
        options = {"scheme": Scheme("int8"), "head": head}
        found, wanted = (load_for_inference(folder, FP32, **options) for folder in (out, tmp_path / name))
        assert torch.equal(found(ids), wanted(ids))
        if head == "score":
            assert torch.equal(found.score.weight, wanted.score.weight)


def test_frozen(written):
    """Catches quantised weights that are loaded as plain ones or for training."""
    with pytest.raises(ValueError, match="quantised weights are frozen"):
        load_model(written[1])


BAD = {
    "group that does not divide": (
        ("--mode", "int4", "--group_size", 128),
        ("hidden_size 64", "groups of 128", "groups of 64"),
    ),
    "unknown mode": (("--mode", "int3"), ("--mode", "int3")),
    "group size": (("--mode", "int4", "--group_size", 48), ("--group_size", "48")),
    "group size of int8": (("--mode", "int8", "--group_size", 64), ("--group_size",)),
    "int8 layers of int8": (("--mode", "int8", "--int8_layers", "o_proj"), ("--int8_layers", "int4")),
    "fused layers in int8": (("--mode", "int4", "--int8_layers", "v_proj"), ("--int8_layers", "v_proj")),
    "gptq without a file": (("--group_size", 32, "--method", "gptq"), ("gptq", "--calibration_file")),
    "a file without gptq": (("--method", "rtn", "--calibration_file", "r.jsonl"), ("gptq", "--calibration_file")),
    "gptq of int8": (("--mode", "int8", "--method", "gptq", "--calibration_file", "r.jsonl"), ("gptq", "int4")),
    "records for int8": (("--mode", "int8", "--calibration_file", "r.jsonl"), ("--calibration_file", "int4")),
    "missing records": (("--group_size", 32, "--eval_file", "nowhere.jsonl"), ("nowhere.jsonl",)),
    "no GPU": (("--mode", "int8", "--device", "cuda:7"), ("cuda:7",)),
    "no tokens": (("--mode", "int8", "--max_seq_len", 0), ("--max_seq_len",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(biased, tmp_path, case):
    """Catches a flag that is ignored or answered with a traceback, and a folder left behind."""
    flags, parts = BAD[case]
    result = tiny.run(SCRIPT, "--checkpoint_path", biased, "--output_dir", tmp_path / "out", *flags)
    tiny.assert_refused(result, *parts)
    assert not any(tmp_path.iterdir())


def test_bad_folders(biased, written, tmp_path):
    """Catches a folder quantised twice or in another mode than it is, or written over another one, NaN turned into
    integers, and perplexity of a reward model."""
    scheme, folder = written

    def refused(*parts, source=biased, flags=("--mode", "int8")):
        out = tmp_path / "out"
        tiny.assert_refused(tiny.run(SCRIPT, "--checkpoint_path", source, "--output_dir", out, *flags), *parts)
        assert not out.exists() and not (tmp_path / ".out.partial").exists()

    refused("quantised weights are frozen", source=folder)
    refused("no such file", source=tmp_path / "nothing")
    tensors = {name: WeightFiles(biased).read(name) for name in WeightFiles(biased).names()}
    config = read_hf_config(biased)
    broken = dict(tensors) | {"layers.1.mlp.up_proj.weight": torch.full((128, 64), torch.nan)}
    save_folder(tmp_path / "nan", broken.items(), config=config, copy_from=biased)
    refused("layers.1.mlp.up_proj.weight", "not finite", source=tmp_path / "nan")
    write_reward_model(tmp_path / "rm")
    records = tiny.write_records(tmp_path / "r.jsonl", [{"text": "3 plus 17"}])
    refused("--eval_file", "perplexity", source=tmp_path / "rm", flags=("--mode", "int8", "--eval_file", records))
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes").write_text("mine")
    result = tiny.run(SCRIPT, "--checkpoint_path", biased, "--output_dir", occupied, "--mode", "int8")
    tiny.assert_refused(result, "--output_dir", "exists")

    other = {"int4": "int8", "int8": "int4"}[scheme.mode]
    flags = ["--checkpoint_path", folder, "--prompt", "3 plus", "--quantize", other]
    tiny.assert_refused(tiny.run("inference/generate.py", *flags), f"--quantize {other}", "already")
