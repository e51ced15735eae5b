"""Models with quantised weights, rounded while they are loaded or read from a folder."""

import io
from contextlib import redirect_stderr

import pytest
import torch

from models import qlinear as q
from models.checkpoint import WeightFiles, load_model
from models.common import Runtime
from models.config import ModelConfig, read_hf_config
from models.cpu_linear import has_fbgemm
from models.decode import InferenceLinear, can_pack, load_for_inference, weight_bytes
from models.decode_cpu import QuantizedHead
from models.export import save_folder
from models.generation import Engine, Request
from models.qlinear import Scheme, dequantize, quantize
from models.quantize import check_scheme, choose_scheme, load_quantized, rounding_scheme
from models.sampling import SamplingParams
from tests import tiny
from tests.inference.test_score import write_reward_model

CPU = torch.device("cpu")
FP32, BF16 = Runtime(CPU, torch.float32, False), Runtime(CPU, torch.bfloat16, False)
HAS_HEAD = can_pack(BF16) and has_fbgemm()


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
