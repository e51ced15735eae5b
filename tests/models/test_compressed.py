"""Folders in the layout of compressed-tensors against the library: packed bits, what transformers computes with our
folders, what we compute with the library's, and which layers a config.json targets."""

import copy
import json

import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import CompressedTensorsConfig

from models import compressed, qlinear
from models.checkpoint import WeightFiles
from models.common import Runtime
from models.compressed import linear_layers, pack_int32, packed_tensors, read_packed, read_scheme, unpack_int32
from models.decode import load_for_inference
from models.qlinear import MixedScheme, Quantized, QuantizedLinear, Scheme, dequantize
from models.quantize import choose_scheme
from tests import tiny
from tests.inference.test_score import write_reward_model

CPU = torch.device("cpu")
FP32 = Runtime(CPU, torch.float32, False)
SHAPE = {"attention_bias": True, "mlp_bias": True, "intermediate_size": 128}
PROMPT = "3 plus so"
IDS = torch.arange(60).view(2, 30) % 300 + 3


@pytest.mark.parametrize("bits", [4, 8])
def test_bits(bits):
    """Catches nibbles, bytes or words in another order, another offset, zero points packed along rows, and a partly
    filled last word that is lost: bits are those of the library's packing, and unpack to the same integers."""
    low, dtype, offset = (-8, torch.uint8, 8) if bits == 4 else (-128, torch.int8, 0)
    for rows, columns in ((16, 64), (5, 37), (3, 1)):
        values = torch.randint(low, -low, (rows, columns), dtype=torch.int8)
        ours = (values + offset).to(dtype)
        packed = pack_int32(ours)
        assert torch.equal(packed, pack_to_int32(values, bits))
        assert torch.equal(unpack_int32(packed, bits)[:, :columns], ours)
        weight = Quantized(ours, torch.ones(rows, columns), ours)
        *_, (name, zeros) = packed_tensors("up_proj.weight", weight)
        assert name == "up_proj.weight_zero_point" and torch.equal(zeros, pack_to_int32(values, bits, packed_dim=0))


@pytest.mark.parametrize(
    "scheme",
    [Scheme("int4", 32, False), Scheme("int4", None, False), Scheme("int8"), Scheme("int8", 32, False)],
    ids=str,
)
def test_parts(tmp_path, scheme):
    """Catches a rank that reads words, scales or zero points of another rank, also where its rows or columns begin
    inside a word: the part it reads equals that part of the whole."""
    low, high, dtype = (0, 16, torch.uint8) if scheme.mode == "int4" else (-128, 128, torch.int8)
    zero = torch.randint(low, high, (30, scheme.num_groups(96)), dtype=dtype)
    whole = Quantized(torch.randint(low, high, (30, 96), dtype=dtype), torch.rand(zero.shape), zero)
    whole = whole._replace(zero=None) if scheme.symmetric else whole
    save_file(dict(packed_tensors("model.w.weight", whole)), tmp_path / "model.safetensors")
    values = dequantize(whole)
    for rows in (slice(0, 30), slice(0, 15), slice(15, 30), slice(6, 23)):
        for columns in (slice(0, 96), slice(32, 64), slice(64, 96)):
            part = read_packed(WeightFiles(tmp_path), "w.weight", (30, 96), (rows, columns), scheme, CPU)
            assert torch.equal(dequantize(part), values[rows, columns])


# ------------------------------------------------------------------------------- our folders, elsewhere

FLAGS = {
    "int8": ["--mode", "int8"],
    "int4": ["--mode", "int4", "--group_size", 32],
    "mixed": ["--mode", "int4", "--group_size", 32, "--int8_layers", "down_proj", "o_proj"],
}


def logits_of(folder, kind="lm"):
    scheme = choose_scheme(folder, "none")
    model = load_for_inference(folder, FP32, scheme=scheme, head="score" if kind == "score" else "lm")
    with torch.no_grad():
        return getattr(model, "score" if kind == "score" else "lm_head")(model(IDS))


def greedy_ids(folder):
    """The token ids that generate.py answers PROMPT with."""
    flags = ["--checkpoint_path", folder, "--prompt", PROMPT, "--temperature", 0, "--max_new_tokens", 20]
    result = tiny.run("inference/generate.py", *flags, "--return_token_ids")
    assert result.code == 0, result
    return json.loads(result.stdout)["token_ids"]


def greedy_ids_of(model, folder):
    ids = transformers.AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    return [token for token in answer if token != 2]


@pytest.mark.parametrize("kind", ["untied", "tied", "score"])
def test_transformers_opens_them(tmp_path, kind):
    """Catches a config.json that transformers does not understand, layers it wrongly takes for plain or quantised,
    scales that round the weights again, and a lost head: its logits and greedy text are ours, whether the library
    decompresses at the first forward or at loading (not tested for mixed folders, since transformers 5.23 then applies
    the first group to all layers)."""
    auto = transformers.AutoModelForSequenceClassification if kind == "score" else transformers.AutoModelForCausalLM
    if kind == "score":
        write_reward_model(tmp_path / "model", **SHAPE)
    else:
        more = tiny.QWEN3 | {"tie_word_embeddings": True} if kind == "tied" else {}
        tiny.write_model(tmp_path / "model", **SHAPE, **more)
    for mode, flags in FLAGS.items():
        out = tmp_path / mode
        result = tiny.run("scripts/quantize.py", "--checkpoint_path", tmp_path / "model", "--output_dir", out, *flags)
        assert result.code == 0, result
        ours = logits_of(out, kind)
        for how in ({}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}):
            if how and mode == "mixed":
                continue
            theirs = auto.from_pretrained(out, **how).eval()
            with torch.no_grad():
                found = theirs(IDS).logits
            wanted = ours[:, -1:] if kind == "score" else ours
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        if kind != "score":
            assert greedy_ids(out) == greedy_ids_of(theirs, out), mode


# ------------------------------------------------------------------------------- the library's folders


def group(targets, **weights):
    plain = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"targets": targets, "weights": plain | weights}


CHANNEL = {"strategy": "channel", "group_size": None}
LIBRARY = {
    "W4A16": {"a": group(["Linear"])},
    "W4A16 asymmetric": {"a": group(["Linear"], symmetric=False)},
    "int4 by rows": {"a": group(["Linear"], symmetric=False, **CHANNEL)},
    "int4 in groups of 16": {"a": group(["Linear"], group_size=16, actorder="weight")},
    "W8A16": {"a": group(["Linear"], num_bits=8)},
    "int8 by rows, asymmetric": {"a": group(["Linear"], num_bits=8, symmetric=False, **CHANNEL)},
    "mixed": {
        "a": group(["Linear"], symmetric=False),
        "b": group([r"re:.*down_proj$", "model.layers.1.self_attn.o_proj"], num_bits=8, **CHANNEL),
    },
}


def quantize_by_library(model, config: QuantizationConfig, folder) -> None:
    """Writes the folder that the library makes of a model, each group rounded to its own range."""
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            groups = module.weight.data.unflatten(1, (-1, scheme.weights.group_size or module.weight.shape[1]))
            scale, zero = calculate_qparams(*groups.aminmax(dim=-1), scheme.weights)
            module.weight_scale.data, module.weight_zero_point.data = scale, zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


@pytest.mark.parametrize("name", LIBRARY)
def test_library_folder(tmp_path, name):
    """Catches zero points on the wrong side or in another order, groups of other layers, and scales that lose bits:
    a folder that the library wrote gives the logits that the library computes."""
    model = tiny.write_model(tmp_path / "model", **SHAPE)
    quantize_by_library(model, QuantizationConfig(config_groups=LIBRARY[name], ignore=["lm_head"]), tmp_path / "out")
    with torch.no_grad():
        wanted = model(IDS).logits
    torch.testing.assert_close(logits_of(tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)


TARGETS = {
    "a name before a pattern before a class": (
        {
            "a": group(["Linear"]),
            "b": group(["re:.*mlp.*"], group_size=64),
            "c": group(["model.layers.0.mlp.down_proj"], num_bits=8),
        },
        ["lm_head"],
    ),
    "the first pattern by alphabet": (
        {"a": group(["re:.*_proj"]), "b": group([r"re:.*\.(up|gate)_proj"], group_size=64)},
        ["lm_head"],
    ),
    "a pattern begins at the name's start": ({"a": group(["Linear"]), "b": group(["re:layers.*"], num_bits=8)}, []),
    "a target said twice": ({"a": group(["Linear"]), "b": group(["Linear"], num_bits=8)}, ["re:lm_.*"]),
}


@pytest.mark.parametrize("name", TARGETS)
def test_which_layer_is_meant(name):
    """Catches another precedence of targets, patterns that are searched rather than matched, and names with another
    prefix: each layer's scheme is the one that the library gives it."""
    groups, ignore = TARGETS[name]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(num_hidden_layers=2, vocab_size=8, hidden_size=128)
        )
    stored = {"config_groups": groups, "ignore": ignore, "format": "pack-quantized"}
    stored |= {"quantization_status": "frozen"}  # as older versions wrote for packed weights
    scheme = read_scheme(stored | {"sparsity_config": {"format": "dense", "targets": []}}, 2, "here")
    apply_quantization_config(model, QuantizationConfig(**copy.deepcopy(stored)), show_progress=False)
    for layer in linear_layers(2):
        weights = model.get_submodule(f"model.{layer}").quantization_scheme.weights
        assert (scheme.of(layer).bits, scheme.of(layer).group_size) == (weights.num_bits, weights.group_size), layer


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int4", 64),
        MixedScheme(dict.fromkeys(linear_layers(3), Scheme("int4", 32)) | {"layers.1.mlp.down_proj": Scheme("int8")}),
    ],
    ids=["plain", "one layer"],
)
def test_config_round_trip(scheme):
    """Catches targets that match more or fewer layers than have their scheme, and a strategy that contradicts the group
    size."""
    stored = json.loads(json.dumps(compressed.quantization_config(scheme, 3, "lm_head")))
    assert read_scheme(stored, 3, "here") == scheme
    for each in stored["config_groups"].values():  # which the library infers
        each["weights"]["group_size"] = each["weights"]["group_size"] or -1
        each["weights"]["strategy"] = None
    assert read_scheme(stored, 3, "here") == scheme


W4 = group(["Linear"])
REFUSED = {
    "fp8": ({"config_groups": {"a": group(["Linear"], num_bits=8, type="float")}}, "a.weights.type 'float'"),
    "three bits": ({"config_groups": {"a": group(["Linear"], num_bits=3)}}, "a.weights.num_bits 3"),
    "activations": ({"config_groups": {"a": W4 | {"input_activations": {"num_bits": 8}}}}, "a.input_activations"),
    "activation order": ({"config_groups": {"a": group(["Linear"], actorder="group")}}, "a.weights.actorder 'group'"),
    "one scale": ({"config_groups": {"a": group(["Linear"], strategy="tensor", group_size=None)}}, "'tensor'"),
    "blocks": ({"config_groups": {"a": group(["Linear"], strategy="block")}}, "a.weights.strategy 'block'"),
    "no group size": ({"config_groups": {"a": group(["Linear"], group_size=None)}}, "a.weights.group_size None"),
    "groups of a list": ({"config_groups": {"a": group(["Linear"], group_size=[32])}}, "a.weights.group_size [32]"),
    "no weights": ({"config_groups": {"a": {"targets": ["Linear"], "weights": None}}}, "a.weights must be an object"),
    "a preset's name": ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups must be"),
    "another format": ({"format": "int-quantized"}, "format 'int-quantized'"),
    "sparsity": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "a transform": ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    "a quantised cache": ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "a layer left out": ({"ignore": ["lm_head", "re:.*layers.1.*up_proj"]}, "leaves model.layers.1.mlp.up_proj out"),
    "a broken pattern": ({"ignore": ["re:*"]}, "not a regular expression"),
    "unlike neighbours": (
        {"config_groups": {"a": W4, "b": group(["re:.*v_proj"], num_bits=8)}},
        "model.layers.0.self_attn.v_proj is int8, groups of 32, but q_proj on the same input is not",
    ),
    "the former layout": ({"quant_method": None, "format": "gpt-accelera", "mode": "int4"}, "run it again"),
    "another method": ({"quant_method": "gptq"}, "only the layout of compressed-tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    """Catches a folder computed otherwise than its config.json says, and an error that does not name the key."""
    changed, complaint = REFUSED[name]
    stored = compressed.quantization_config(Scheme("int4", 32), 2, "lm_head") | changed
    config = transformers.LlamaConfig(num_hidden_layers=2).to_dict() | {"quantization_config": stored}
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = tiny.run("inference/generate.py", "--checkpoint_path", tmp_path, "--prompt", "3 plus")
    tiny.assert_refused(result, f"{tmp_path}/config.json: quantization_config", complaint)


def test_broken_tensors(tmp_path):
    """Catches packed weights of a wrong shape or dtype, and a quantised head, that are read nevertheless."""
    tiny.write_model(tmp_path / "model", **SHAPE)
    flags = ["--checkpoint_path", tmp_path / "model", "--output_dir", tmp_path / "out", *FLAGS["int4"]]
    assert tiny.run("scripts/quantize.py", *flags).code == 0
    path, name = tmp_path / "out/model.safetensors", "model.layers.0.mlp.up_proj.weight"
    path.with_name("checksums.json").unlink()
    tensors = load_file(path)
    for changed, complaint in (
        ({f"{name}_scale": None}, "missing tensors"),
        ({f"{name}_packed": tensors[f"{name}_packed"].float()}, f"{name}_packed is torch.float32"),
        ({f"{name}_scale": tensors[f"{name}_scale"].int()}, f"{name}_scale is torch.int32"),
        ({f"{name}_scale": tensors[f"{name}_scale"][:5].clone()}, "wrong shapes"),
        ({f"{name}_shape": torch.tensor([128, 32])}, f"{name}_shape says [128, 32]"),
        ({f"{name}_g_idx": torch.arange(64)}, f"unexpected tensors: {name}_g_idx"),
        ({"lm_head.weight": None, "lm_head.weight_packed": torch.zeros(384, 8)}, "lm_head"),
    ):
        save_file({key: x for key, x in (tensors | changed).items() if x is not None}, path)
        result = tiny.run("inference/generate.py", "--checkpoint_path", tmp_path / "out", "--prompt", "3 plus")
        tiny.assert_refused(result, str(tmp_path / "out"), complaint)


@pytest.mark.parametrize("scales", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int8", 32, False), Scheme("int4", 32)], ids=str)
def test_scales_that_bf16_does_not_hold(scheme, scales, monkeypatch):
    """Catches the scales of other tools rounded to bf16 before they multiply, where no kernel asks for it: each weight
    in bf16 is the exact one, rounded once."""
    generator = torch.Generator().manual_seed(0)
    low, high, dtype = (0, 16, torch.uint8) if scheme.mode == "int4" else (-127, 128, torch.int8)
    values = torch.randint(low, high, (64, 128), dtype=dtype, generator=generator)
    scale = torch.rand(64, scheme.num_groups(128), generator=generator).to(scales)
    zero = None if scheme.symmetric else torch.full(scale.shape, 3, dtype=dtype)
    weight = Quantized(values, scale, zero)
    wanted = dequantize(weight).bfloat16()
    assert torch.equal(dequantize(weight, torch.bfloat16), wanted)
    monkeypatch.setattr(qlinear, "kernel_for", lambda *_: None)
    layer = QuantizedLinear([weight], None, scheme, torch.bfloat16)
    assert torch.equal(layer(torch.eye(128, dtype=torch.bfloat16)).T, wanted)
