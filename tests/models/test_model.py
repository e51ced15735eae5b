"""The network against transformers, on random folders that transformers wrote."""

import json

import pytest
import torch
import transformers

from models.checkpoint import load_model, open_folder
from models.config import ModelConfig
from models.model import Transformer
from models.presets import PRESETS
from tests import tiny

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "many heads": {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3},
    "wide head_dim": {"head_dim": 32},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "theta and eps": {"rope_theta": 1e6, "rms_norm_eps": 1e-3},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
    "llama3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 5e5}},
    "llama3, crossed": {
        "rope_parameters": {**LLAMA3, "low_freq_factor": 6.0, "original_max_position_embeddings": 64, "rope_theta": 1e2}
    },
    "yarn": {"rope_parameters": tiny.YARN},
    "yarn's other numbers": {
        "rope_parameters": {**tiny.YARN, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False, "beta_slow": 2},
        "head_dim": 32,
    },
    "yarn's attention_factor": {"rope_parameters": {**tiny.YARN, "attention_factor": 1.7}, "model_type": "qwen2"},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 100.0}},
    "qwen2": {**tiny.QWEN2, "num_key_value_heads": 1},
    "qwen2, tied": {**tiny.QWEN2, "tie_word_embeddings": True},
    "qwen3": {**tiny.QWEN3, "rms_norm_eps": 0.1},
    "qwen3, tied, all": {
        **tiny.QWEN3,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "rope_parameters": {**tiny.YARN, "factor": 2.0},
    },
    "qwen3 dynamic": {**tiny.QWEN3, "rope_parameters": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 5e3}},
    "everything": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
    },
}


def logits_of(model: Transformer, input_ids: torch.Tensor, **more) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(model(input_ids, **more))


def assert_same_logits(folder, theirs) -> None:
    """theirs: transformers' model of the folder."""
    input_ids = torch.randint(tiny.VOCAB_SIZE, (3, 200))
    with torch.no_grad():
        expected = theirs(input_ids).logits
    assert expected.std() > 0.3  # else the comparison would say little
    torch.testing.assert_close(logits_of(load_model(folder), input_ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_transformers(tmp_path, config):
    """Catches: a wrong head order, a bias left out or made up, RoPE halves swapped, a wrong frequency, norm or
    residual; q and k normed after the rotation, over all heads at once or with another eps; yarn's factor dropped."""
    assert_same_logits(tmp_path, tiny.write_model(tmp_path, **config))


def test_both_spellings_at_once(tmp_path):
    """Catches an ignored rope_scaling that a user has added to a newer config, as transformers obeys it."""
    tiny.write_model(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": {"type": "linear", "factor": 4.0}}))
    assert_same_logits(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_parameter_count():
    """Catches a formula that leaves out what a variant adds."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 20}
    for change in VARIANTS.values():
        hf_config = {"model_type": "llama", "num_hidden_layers": 3, "vocab_size": 33, **shape, **change}
        config = ModelConfig.from_hf({"max_position_embeddings": 256, **hf_config})
        with torch.device("meta"):
            assert config.num_parameters() == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("name", ["linear", "llama3", "theta and eps"])
def test_older_spelling_of_rope_settings(tmp_path, name):
    """Catches: top-level rope_theta / rope_scaling (with "type" or "rope_type") ignored beside the nested spelling."""
    theirs = tiny.write_model(tmp_path, **VARIANTS[name])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    nested = config.pop("rope_parameters")
    config["rope_theta"] = nested.pop("rope_theta")
    if nested["rope_type"] == "linear":
        nested["type"] = nested.pop("rope_type")
    config["rope_scaling"] = nested if nested.get("rope_type") != "default" else None
    del config["head_dim"]
    path.write_text(json.dumps(config))
    assert_same_logits(tmp_path, theirs)


@pytest.mark.parametrize("nested", [16, None])
def test_original_context_at_the_top(tmp_path, nested):
    """Catches: the key at the top level ignored, which transformers reads before the nested one."""
    tiny.write_model(tmp_path, **VARIANTS["llama3"])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"original_max_position_embeddings": 40}
    config["rope_parameters"]["original_max_position_embeddings"] = nested
    if nested is None:
        del config["rope_parameters"]["original_max_position_embeddings"]
    path.write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path).inv_freq, theirs.model.rotary_emb.inv_freq)
    assert ModelConfig.from_hf(tmp_path).rope_scaling["original_max_position_embeddings"] == 40


def test_right_padding_changes_nothing(folder):
    """Catches: attention that looks ahead, where a padded row would differ from the same row alone."""
    model = load_model(folder)
    row = torch.randint(3, tiny.VOCAB_SIZE, (1, 20))
    padded = torch.cat((row, torch.zeros(1, 13, dtype=torch.int64)), dim=1)
    torch.testing.assert_close(logits_of(model, padded)[:, :20], logits_of(model, row), atol=1e-5, rtol=0)


def test_position_ids(folder, hf_model):
    """Catches: positions that are taken from the row instead of from the argument."""
    input_ids = torch.randint(3, tiny.VOCAB_SIZE, (2, 12))
    positions = torch.arange(12) * 3 + torch.tensor([[0], [50]])
    with torch.no_grad():
        expected = hf_model(input_ids, position_ids=positions).logits
    actual = logits_of(load_model(folder), input_ids, position_ids=positions)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_bf16_compute_on_fp32_weights(folder):
    """Catches: norms or RoPE in bf16, and a compute dtype that does not reach the layers or reaches the weights."""
    model, reference = load_model(folder), load_model(folder)
    model.compute_dtype = torch.bfloat16
    input_ids = torch.randint(3, tiny.VOCAB_SIZE, (2, 64))
    hidden = model(input_ids)
    assert hidden.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = logits_of(reference, input_ids)
    error = (logits_of(model, input_ids).float() - expected).norm() / expected.norm()
    assert error < 0.02


def test_gradients_equal_transformers(folder, hf_model):
    """Catches: a detached path, a cast that loses a gradient."""
    model = load_model(folder)
    input_ids = torch.randint(3, tiny.VOCAB_SIZE, (2, 30))
    model.lm_head(model(input_ids)).logsumexp(-1).sum().backward()
    hf_model.zero_grad()
    hf_model(input_ids).logits.logsumexp(-1).sum().backward()
    theirs = {name.removeprefix("model."): p.grad for name, p in hf_model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# Parameters as the model cards count them, or as they follow from the public config.json.
PUBLIC_SIZES = {
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-chat-hf": 68_976_648_192,
    "codellama/CodeLlama-7b-Python-hf": 6_738_415_616,
    "codellama/CodeLlama-34b-Python-hf": 33_743_970_304,
    "EleutherAI/llemma_7b": 6_738_546_688,
    "EleutherAI/llemma_34b": 33_743_970_304,
    "deepseek-ai/deepseek-llm-7b-base": 6_910_365_696,
    "deepseek-ai/deepseek-math-7b-base": 6_910_365_696,
    "deepseek-ai/deepseek-coder-6.7b-base": 6_740_512_768,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": 8_190_735_360,
}


def test_preset_sizes():
    """Catches: a wrong width, depth, vocabulary or head count in a preset."""
    assert {name: config.num_parameters() for name, config in PRESETS.items()} == PUBLIC_SIZES


SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
ROPE_31 = {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}}
ROPE_32 = {"rope_theta": 500000.0, "rope_scaling": {**ROPE_31["rope_scaling"], "factor": 32.0}}
R1_0528 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.878248856}
TIED, CODE = {"tie_word_embeddings": True}, {"rope_theta": 1000000}
QWEN = {"rope_theta": 1000000.0, "use_sliding_window": False, "max_window_layers": 28, "sliding_window": 32768}
# The config.json of these folders as published, as far as it decides the network, with each family's keys: (the end of
# the name: vocabulary, SHAPE, context, eps, other keys).
PUBLIC = {
    "llama": {
        "Llama-2-7b-chat-hf": (32000, (4096, 11008, 32, 32, 32), 4096, 1e-5, {}),
        "Llama-2-13b-chat-hf": (32000, (5120, 13824, 40, 40, 40), 4096, 1e-5, {}),
        "Llama-2-70b-chat-hf": (32000, (8192, 28672, 80, 64, 8), 4096, 1e-5, {}),
        "CodeLlama-7b-Python-hf": (32000, (4096, 11008, 32, 32, 32), 16384, 1e-5, CODE),
        "CodeLlama-34b-Python-hf": (32000, (8192, 22016, 48, 64, 8), 16384, 1e-5, CODE),
        "llemma_7b": (32016, (4096, 11008, 32, 32, 32), 4096, 1e-5, {}),
        "llemma_34b": (32000, (8192, 22016, 48, 64, 8), 4096, 1e-5, CODE),
        "deepseek-llm-7b-base": (102400, (4096, 11008, 30, 32, 32), 4096, 1e-6, {"rope_theta": 10000}),
        "deepseek-math-7b-base": (102400, (4096, 11008, 30, 32, 32), 4096, 1e-6, {"rope_theta": 10000}),
        "deepseek-coder-6.7b-base": (
            32256,
            (4096, 11008, 32, 32, 32),
            16384,
            1e-6,
            {"rope_theta": 100000, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        "Meta-Llama-3-8B": (128256, (4096, 14336, 32, 32, 8), 8192, 1e-5, {"rope_theta": 500000.0}),
        "Meta-Llama-3-70B": (128256, (8192, 28672, 80, 64, 8), 8192, 1e-5, {"rope_theta": 500000.0}),
        "Llama-3.1-8B": (128256, (4096, 14336, 32, 32, 8), 131072, 1e-5, ROPE_31),
        "Llama-3.1-70B": (128256, (8192, 28672, 80, 64, 8), 131072, 1e-5, ROPE_31),
        "Llama-3.2-1B": (128256, (2048, 8192, 16, 32, 8), 131072, 1e-5, {"head_dim": 64, **ROPE_32, **TIED}),
        "Llama-3.2-3B": (128256, (3072, 8192, 28, 24, 8), 131072, 1e-5, {"head_dim": 128, **ROPE_32, **TIED}),
        "Llama-3.3-70B-Instruct": (128256, (8192, 28672, 80, 64, 8), 131072, 1e-5, ROPE_31),
        "DeepSeek-R1-Distill-Llama-8B": (128256, (4096, 14336, 32, 32, 8), 131072, 1e-5, ROPE_31),
        "DeepSeek-R1-Distill-Llama-70B": (128256, (8192, 28672, 80, 64, 8), 131072, 1e-5, ROPE_31),
    },
    "qwen2": {
        "Qwen2.5-0.5B": (151936, (896, 4864, 24, 14, 2), 32768, 1e-6, TIED),
        "Qwen2.5-1.5B": (151936, (1536, 8960, 28, 12, 2), 131072, 1e-6, TIED),
        "Qwen2.5-1.5B-Instruct": (151936, (1536, 8960, 28, 12, 2), 32768, 1e-6, TIED),
        "Qwen2.5-3B": (151936, (2048, 11008, 36, 16, 2), 32768, 1e-6, TIED),
        "Qwen2.5-7B": (152064, (3584, 18944, 28, 28, 4), 131072, 1e-6, {}),
        "Qwen2.5-7B-Instruct": (152064, (3584, 18944, 28, 28, 4), 32768, 1e-6, {}),
        "DeepSeek-R1-Distill-Qwen-1.5B": (151936, (1536, 8960, 28, 12, 2), 131072, 1e-6, {"rope_theta": 10000}),
        "DeepSeek-R1-Distill-Qwen-7B": (152064, (3584, 18944, 28, 28, 4), 131072, 1e-6, {"rope_theta": 10000}),
        "DeepSeek-R1-Distill-Qwen-14B": (152064, (5120, 13824, 48, 40, 8), 131072, 1e-5, {}),
        "DeepSeek-R1-Distill-Qwen-32B": (152064, (5120, 27648, 64, 40, 8), 131072, 1e-5, {}),
    },
    "qwen3": {
        "Qwen3-0.6B": (151936, (1024, 3072, 28, 16, 8), 40960, 1e-6, TIED),
        "Qwen3-1.7B": (151936, (2048, 6144, 28, 16, 8), 40960, 1e-6, TIED),
        "Qwen3-4B": (151936, (2560, 9728, 36, 32, 8), 40960, 1e-6, TIED),
        "Qwen3-8B": (151936, (4096, 12288, 36, 32, 8), 40960, 1e-6, {}),
        "DeepSeek-R1-0528-Qwen3-8B": (151936, (4096, 12288, 36, 32, 8), 131072, 1e-6, {"rope_scaling": R1_0528}),
    },
}
FAMILY_KEYS = {"llama": {}, "qwen2": QWEN, "qwen3": {**QWEN, "head_dim": 128, "attention_bias": False}}


def test_presets_equal_their_config():
    """Catches: a preset whose theta, eps, context, scaling or tying differs from the folder's, which no size shows."""
    found = {}
    for model_type, models in PUBLIC.items():
        for name, (vocab_size, shape, context, eps, more) in models.items():
            numbers = {"vocab_size": vocab_size, "max_position_embeddings": context, "rms_norm_eps": eps}
            hf_config = {"model_type": model_type, "hidden_act": "silu", "tie_word_embeddings": False, **numbers}
            found[name] = ModelConfig.from_hf(hf_config | dict(zip(SHAPE, shape)) | FAMILY_KEYS[model_type] | more)
    assert found == {name.rpartition("/")[2]: config for name, config in PRESETS.items()}


def test_rope_frequencies_equal_transformers():
    """Catches: a wrong ramp of llama3 or yarn at the widths and factors of the real models, or a wrong factor."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for config in PRESETS.values():
        rope = dict(config.rope_scaling or {"rope_type": "default"}, rope_theta=config.rope_theta)
        theirs = transformers.LlamaConfig(
            hidden_size=config.num_attention_heads * config.head_dim,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=rope,
        )
        rotary = LlamaRotaryEmbedding(theirs)
        torch.testing.assert_close(config.inv_freq(), rotary.inv_freq, atol=0, rtol=1e-6)
        assert config.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)


YARNS = [
    {"attention_factor": 0.9},
    {"mscale": 1.0, "mscale_all_dim": 0.8},
    {"mscale": 0.707},  # no effect without mscale_all_dim
    {"mscale": 1.0, "mscale_all_dim": 0},
    {"truncate": False, "beta_fast": 8, "beta_slow": 2.5},
    {"beta_fast": None, "beta_slow": 0, "attention_factor": None},
    {"factor": 0.5},
    {"factor": 1.0, "original_max_position_embeddings": None},  # max_position_embeddings
    {"original_max_position_embeddings": 8},  # no dimension turns that often: the ramp is clipped
]


@pytest.mark.parametrize("settings", YARNS, ids=str)
def test_yarn_equals_transformers(settings):
    """Catches: a setting of yarn that is overlooked, or taken where transformers takes its default."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"factor": 4.0, "original_max_position_embeddings": 4096, **settings}
    rope = {key: value for key, value in rope.items() if key != "original_max_position_embeddings" or value}
    shape = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "max_position_embeddings": 16384}
    for spelling in ({"type": "yarn"}, {"rope_type": "yarn"}):
        hf_config = {"rope_theta": 5e4, "rope_scaling": {**spelling, **rope}, **shape}
        ours = ModelConfig.from_hf(GOOD | hf_config)
        rotary = LlamaRotaryEmbedding(transformers.LlamaConfig(**hf_config))
        torch.testing.assert_close(ours.inv_freq(), rotary.inv_freq, atol=0, rtol=1e-6)
        assert ours.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)


CONTEXTS = {  # (max_position_embeddings, rope_scaling): the context
    (32768, (("type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 32768))): 131072,  # Qwen2.5's card
    (40960, (("type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 32768))): 131072,  # Qwen3's
    (163840, (("type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 4096))): 163840,
    (4096, (("type", "linear"), ("factor", 4.0))): 4096,  # vicuna-16k; deepseek-coder's 16384 includes the factor
}


@pytest.mark.parametrize("given", CONTEXTS, ids=str)
def test_context(given, tmp_path):
    """Catches rows refused that yarn makes room for, and an error that calls linear scaling's unscaled context the
    model's."""
    (unscaled, rope), context = given, CONTEXTS[given]
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    tiny.write_model(tmp_path, **shape, num_key_value_heads=1)
    path = tmp_path / "config.json"
    changes = {"max_position_embeddings": unscaled, "rope_scaling": dict(rope)}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert open_folder(tmp_path).max_seq_len == open_folder(tmp_path, context).max_seq_len == context
    advice = r" \(max_position_embeddings in config.json; raise it 4 times if .*\)" if rope[0][1] == "linear" else ""
    with pytest.raises(ValueError, match=f"the model's context is {context} tokens{advice}$"):
        open_folder(tmp_path, context + 1)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_defaults_equal_transformers(model_type):
    """Catches: another family's default for a key that config.json leaves out, switches read that a family does not
    have, and an unsupported key refused though it is null."""
    theirs = transformers.AutoConfig.for_model(model_type, hidden_size=1024, num_attention_heads=64)
    shape = {key: getattr(theirs, key) for key in ("vocab_size", *SHAPE[:4])}
    more = {"mlp_bias": model_type != "llama", "partial_rotary_factor": None, "is_causal": None}
    ours = ModelConfig.from_hf({"model_type": model_type, **shape, **more})
    names = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    assert all(getattr(ours, name) == getattr(theirs, name) for name in names)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and not ours.mlp_bias
    with torch.device("meta"):
        wanted = transformers.AutoModelForCausalLM.from_config(theirs).state_dict()
        found = Transformer(ours).state_dict()
    assert {k.removeprefix("model."): v.shape for k, v in wanted.items()} == {k: v.shape for k, v in found.items()}


GOOD = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "yarn"}, "max_position_embeddings": 8}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": "x"}}, "attention_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": "x", "mscale_all_dim": 1}}, "mscale"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": -1}}, "beta_fast"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 0}}, "truncate"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen2"}, "num_key_value_heads 32"),
        ({"sliding_window": 2047}, "sliding_window"),
        ({"sliding_window": False}, "sliding_window"),
        ({"attention_chunk_size": 16}, "attention_chunk_size"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types lists 2 layers, num_hidden_layers is 1"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": [], "factor": 2.0}}, "rope_scaling"),
        ({"num_hidden_layers": float("inf")}, "num_hidden_layers"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 18}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 2.5}, "num_attention_heads"),
        ({"vocab_size": "32"}, "vocab_size"),
        ({"head_dim": 5}, "head_dim"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"is_causal": False}, "is_causal"),
    ],
)
def test_unsupported_configs_name_the_key(change, culprit):
    """Catches: a config that would load and compute something else."""
    ModelConfig.from_hf(GOOD)
    with pytest.raises(ValueError, match=culprit):
        ModelConfig.from_hf(GOOD | change)


@pytest.mark.parametrize("key", ["sliding_window", "attention_chunk_size"])
def test_windows(key, tmp_path):
    """Catches a window ignored that transformers has when it decodes, though not in whole rows; and a window refused
    that is as long as the context, or that layer_types overrules."""
    context = 64
    input_ids = torch.randint(tiny.VOCAB_SIZE, (1, context))
    for window, more in ((context, {}), (16, {"layer_types": ["full_attention"] * 2}), (16, {})):
        theirs = tiny.write_model(tmp_path, max_position_embeddings=context, **{key: window}, **more)
        with torch.no_grad():
            cache = theirs(input_ids[:, :-1], use_cache=True).past_key_values
            decoded = theirs(input_ids[:, -1:], past_key_values=cache).logits
        if window == context or more:
            ours = logits_of(load_model(tmp_path), input_ids)
            torch.testing.assert_close(ours[:, -1:], decoded, atol=1e-4, rtol=0)
    assert not torch.allclose(ours[:, -1:], decoded, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match=f"{key} 16 is not supported, only the context's 64 or more"):
        open_folder(tmp_path)


def test_score_head(folder, tmp_path):
    """Catches scores that are not transformers', that are rounded to bf16, and a head made up where there is none."""
    torch.manual_seed(0)
    shape = transformers.LlamaConfig.from_pretrained(folder)
    shape.num_labels, shape.pad_token_id = 1, 0
    theirs = transformers.LlamaForSequenceClassification(shape).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, head="score")
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        scores = ours.score(ours(ids))
        torch.testing.assert_close(scores[:, -1], theirs(ids).logits[:, 0], atol=1e-5, rtol=1e-5)
        assert scores.shape == (2, 9) and ours.bfloat16().score(ours(ids)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"missing tensors: score.weight; unexpected tensors: lm_head.weight"):
        load_model(folder, head="score")
