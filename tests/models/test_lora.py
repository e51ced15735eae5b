"""models/lora.py and models/adapters.py against PEFT."""

import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.adapters import open_adapter, weight_files
from models.checkpoint import load_model
from models.common import Runtime
from models.decode import copy_for_inference
from models.dropout import TokenDropout
from models.fsdp import ParallelArgs, full_tensors, init_mesh, load_for_training
from models.noise import noise_key
from models.qlinear import dequantize, quantize
from models.shared_base import adapter, lora_layers
from models.tp import local
from models.trained_adapters import LoraArgs, choose_lora
from tests import tiny
from tests.tiny import refused

CPU = Runtime(torch.device("cpu"), torch.float32, False)
IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))
KINDS = {  # name: (model, settings of PEFT)
    "llama, all-linear": ({}, {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}),
    "qwen2, q and v, rslora": (tiny.QWEN2, {"r": 5, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "reward model": (
        {"attention_bias": True},
        {"r": 2, "target_modules": ["down_proj", "k_proj"], "task_type": "SEQ_CLS"},
    ),
}


class Args(LoraArgs, ParallelArgs):
    """A trainer's flags, as far as choose_lora reads them."""

    checkpoint_path: Path
    seed = 0

    def __init__(self, folder, **flags):
        super().__init__(**flags)
        object.__setattr__(self, "checkpoint_path", folder)


def made_by_peft(root, model, settings, seed=0):
    """(a base, PEFT's adapter for it, PEFT's model): every factor is random."""
    base, out = root / "base", root / "adapter"
    tiny.write_model(base, **model)
    hf = transformers.AutoModelForCausalLM.from_pretrained(base)
    if settings.get("task_type") == "SEQ_CLS":
        hf = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(hf, peft.LoraConfig(**settings)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(out)
    return base, out, adapted


def trainable(folder, **flags):
    """Loads the model of the flags, as a trainer does."""
    args = Args(folder, **flags)
    lora = choose_lora(args, folder, CPU)
    head = {"head": "score", "new_score": torch.zeros(1, 64)} if "score.weight" in lora.values else {}
    return load_for_training(folder, init_mesh(CPU.device, 1), args, CPU, lora=lora, **head)


def output_of(model):
    return model.score(model(IDS)) if hasattr(model, "score") else model.lm_head(model(IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft(kind, tmp_path):
    """Catches a transposed factor, a wrong scale (rank-stabilised), wrongly matched layers, and a lost score head: in a
    model merged while the base is read, in one that trains the adapter further, and in its copy that draws samples."""
    base, folder, oracle = made_by_peft(tmp_path, *KINDS[kind])
    is_reward = "SEQ_CLS" in KINDS[kind][1].values()
    with torch.no_grad():
        if is_reward:  # of the last token alone
            score = oracle.base_model.model.score
            wanted = score(oracle.base_model.model.model(IDS).last_hidden_state)[..., 0]
        else:
            wanted = oracle(IDS).logits
        files, head = weight_files(base, folder), "score" if is_reward else "lm"
        merged = load_model(base, files=files, param_dtype=torch.float32, head=head)
        torch.testing.assert_close(output_of(merged), wanted, atol=1e-5, rtol=1e-5)
        model = trainable(base, adapter_path=folder)
        torch.testing.assert_close(output_of(model), wanted, atol=1e-5, rtol=1e-5)
        if not is_reward:
            copy = copy_for_inference(model, pack=False)
            torch.testing.assert_close(output_of(copy), wanted, atol=1e-5, rtol=1e-5)
            plain = load_model(base)
            assert (output_of(plain) - wanted).abs().max() > 0.05
            with adapter(model, None):
                assert torch.equal(output_of(model), output_of(plain))


def broken(folder, target, *, config=(), tensors=None):
    """A copy of an adapter's folder with other keys in its config, or other tensors."""
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **dict(config)}))
    if tensors is not None:
        found = load_file(target / "adapter_model.safetensors")
        save_file(tensors(found), target / "adapter_model.safetensors")
    return target


def test_what_is_refused(tmp_path):
    """Catches an adapter merged into another base than its own, or without a part of it, and flags without effect or in
    conflict: the error names each of them, in one line."""
    base, good, _ = made_by_peft(tmp_path, {}, {"r": 4, "target_modules": ["q_proj"]})
    tiny.write_model(tmp_path / "other", hidden_size=32, num_attention_heads=2)
    tiny.write_model(tmp_path / "short", num_hidden_layers=1)
    tiny.write_model(tmp_path / "long", num_hidden_layers=3)
    tiny.write_model(tmp_path / "elsewhere" / "base", seed=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    shutil.copy(good / "adapter_config.json", tmp_path / "torn")
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    configs = {  # keys of adapter_config.json: what the error says
        ("peft_type", "LOHA"): "peft_type 'LOHA' is not supported",
        ("r", 0): "r must be a positive number",
        ("use_dora", True): "use_dora True is not supported",
        ("rank_pattern", (("q_proj", 3),)): "rank_pattern",
        ("bias", "all"): "bias 'all' is not supported",
        ("modules_to_save", ("embed_tokens",)): "modules_to_save embed_tokens is not supported",
        ("modules_to_save", True): "modules_to_save must be a list, not True",
        ("base_model_name_or_path", ("base",)): "base_model_name_or_path must be a str, not ['base']",
        ("lora_alpha", math.inf): "lora_alpha must be a positive number, not inf",
        ("init_lora_weights", "pissa"): "has changed the base",
        ("init_lora_weights", "OLoRA"): "'OLoRA' has changed the base",
        ("r", 8): "is of rank 4, adapter_config.json says 8",
        ("base_model_name_or_path", "meta-llama/Llama-2-7b-hf"): "an adapter for meta-llama/Llama-2-7b-hf",
    }
    for i, ((key, value), complaint) in enumerate(configs.items()):
        folder = broken(good, tmp_path / f"broken-{i}", config={key: value})
        if value == "meta-llama/Llama-2-7b-hf":
            complaint = "an adapter for another base, meta-llama/Llama-2-7b-hf"
        refused(lambda folder=folder: open_adapter(folder, base), folder, complaint)
    renamed = {"r": 4, "base_model_name_or_path": str(base)}
    tensors = {
        "has no lora_A": lambda found: {name: t for name, t in found.items() if name != first},
        "layers.1.self_attn.q_proj has no adapter": lambda found: {
            n: t for n, t in found.items() if "layers.1" not in n
        },
        "embed.weight is no low-rank factor": lambda found: {**found, "embed.weight": torch.ones(1)},
    }
    for i, (complaint, change) in enumerate(tensors.items()):
        folder = broken(good, tmp_path / f"tensors-{i}", config=renamed, tensors=change)
        refused(lambda folder=folder: open_adapter(folder, base), folder, complaint)
    for other, complaint in (("other", "q_proj is [64, 64]"), ("short", "has no layer model.layers.1")):
        refused(lambda other=other: open_adapter(good, tmp_path / other), good, complaint)
    for other in ("long", "elsewhere/base"):
        refused(lambda other=other: open_adapter(good, tmp_path / other), good, "an adapter for another base, ")
    open_adapter(broken(good, tmp_path / "moved", config={"base_model_name_or_path": "hub/base"}), base)
    two_scores = {"base_model.model.score.weight": torch.ones(2, 64)}  # PEFT's, where num_labels is left out
    folder = broken(good, tmp_path / "labels", tensors=lambda found: found | two_scores)
    refused(
        lambda: open_adapter(folder, base), folder, "score.weight is [2, 64], should be [1, 64]: a reward model has"
    )
    with pytest.raises(AssertionError, match=r"score.weight"):
        load_for_training(base, init_mesh(CPU.device, 1), Args(base), CPU, head="score", new_score=torch.zeros(2, 64))
    for folder, complaint in (
        ("none", "no such folder"),
        ("empty", "no adapter_config.json"),
        ("torn", "no adapter_mod"),
    ):
        with pytest.raises(FileNotFoundError, match=complaint):
            open_adapter(tmp_path / folder, base)

    flags = {  # choose_lora's error: flags
        "--lora_target_modules c_attn: choose from q_proj, k_proj": {"lora_r": 4, "lora_target_modules": ["c_attn"]},
        "--lora_alpha is for LoRA": {"lora_alpha": 3.0},
        "--no-merge is for LoRA": {"merge": False},
        "--quantize_base is for LoRA": {"quantize_base": "int8"},
        "--lora_r: the adapter of --adapter_path": {"lora_r": 3, "adapter_path": good},
        "--lora_target_modules: the adapter": {"adapter_path": good, "lora_target_modules": ["v_proj"]},
        f"{base}: --quantize_base int4: intermediate_size 112 is not divisible by groups of 32": {
            "lora_r": 4,
            "quantize_base": "int4",
        },
    }
    for complaint, given in flags.items():
        refused(lambda given=given: choose_lora(Args(base, **given), base, CPU), complaint, complaint)


SCRIPT_FLAGS = {  # script, flags: what its error says
    ("finetune_sft", "--lora_r", 0): "'0' is not an int >= 1",
    ("finetune_sft", "--lora_r", 2, "--lora_dropout", 1): "'1' is not a float >= 0 and < 1",
    ("train_dpo", "--lora_r", 2, "--quantize_ref", "int8"): "--quantize_ref: with LoRA the reference is the base",
    ("train_grpo", "--lora_r", 2, "--lora_dropout", 0.1): "--lora_dropout 0.1: a ratio to the policy",
    ("train_ppo", "--shared_base"): "--shared_base is for LoRA",
    ("train_ppo", "--lora_r", 2, "--shared_base", "--value_checkpoint_path", "x"): "leave --value_checkpoint_path out",
    ("generate", "--adapter_path", "x"): "--adapter_path x: no such folder",
    ("quantize", "--mode", "int8", "--adapter_path", "x"): "--adapter_path x: no such folder",
}


@pytest.mark.parametrize("command", SCRIPT_FLAGS, ids=str)
def test_what_scripts_refuse(folder, tmp_path, command):
    """Catches a flag that a script accepts and ignores."""
    name, *flags = command
    records = tiny.write_records(tmp_path / "records.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    files = {"train_dpo": ["--train_file", records], "finetune_sft": ["--train_file", records]}
    reward = ["--prompt_file", records, "--reward_fn", "training/graders.py:last_number", "--rollout_batch_size", 8]
    given = files.get(name, reward if "train" in name else [])
    given += {"generate": ["--prompt", "a"]}.get(name, ["--output_dir", tmp_path / "out"])
    place = {"generate": "inference", "quantize": "scripts"}.get(name, "training")
    result = tiny.run(f"{place}/{name}.py", "--checkpoint_path", folder, *given, *flags)
    tiny.assert_refused(result, SCRIPT_FLAGS[command])


def test_dropout_is_of_the_token():
    """Catches noise that depends on the batch or on other documents of a row, or does not depend on the step, layer,
    feature and preceding tokens; a share of zeros that is not the rate, and a changed mean."""
    dropout = TokenDropout(0.25, seed=1)

    def kept(ids, positions=None, step=0, layer=0):
        dropout.step = step
        positions = torch.arange(ids.shape[1])[None] if positions is None else positions
        dropout.see(ids, positions)
        return dropout(torch.ones(ids.numel(), 400), torch.tensor(noise_key(layer)), None).view(*ids.shape, -1)

    whole = kept(IDS)
    assert torch.equal(kept(IDS[1:])[0], whole[1])  # another batch
    packed = torch.cat((IDS[0], IDS[1, :5]))[None]
    positions = torch.cat((torch.arange(11), torch.arange(5)))[None]
    assert torch.equal(kept(packed, positions)[0], torch.cat((whole[0], whole[1, :5])))
    assert abs((whole == 0).float().mean() - 0.25) < 0.02 and abs(whole.mean() - 1) < 0.03
    others = [kept(IDS, step=1), kept(IDS, layer=1), whole.flip(0), whole.roll(1, 1), whole.roll(1, 2)]
    for other in others:
        assert abs(((whole == 0) & (other == 0)).float().mean() - 0.25**2) < 0.015
    changed = IDS.clone()
    changed[0, 3] += 1
    assert (kept(changed)[0] != whole[0]).any(-1).tolist() == [False] * 3 + [True] * 8
    with torch.no_grad():
        assert torch.equal(kept(IDS), torch.ones(2, 11, 400))


def test_dropout_is_in_every_product(tmp_path):
    """Catches adapted layers that share a product, such as q, k and v, and are computed without their dropout: with
    nearly all dropped, the model is nearly its base."""
    tiny.write_model(tmp_path)
    dropped, kept = (trainable(tmp_path, lora_r=4, lora_dropout=rate) for rate in (0.999999, 0.0))
    for layer in (*lora_layers(dropped), *lora_layers(kept)):
        torch.nn.init.normal_(local(layer.lora_B))
    base = output_of(trainable(tmp_path, lora_r=4))  # whose B is 0
    assert not torch.allclose(output_of(kept), base, atol=1e-2)
    torch.testing.assert_close(output_of(dropped), base)  # with grad: without, nothing is dropped


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_products_with_integers(tmp_path, mode):
    """Catches a gradient through other weights than the forward's, or through their transpose, and a copy for samples
    that is not base + adapters: against the same model with dequantised weights."""
    base = tmp_path / "base"
    tiny.write_model(base, intermediate_size=128)
    model = trainable(base, lora_r=4, quantize_base=mode, lora_dropout=0.0)
    plain = trainable(base, lora_r=4)
    with torch.no_grad():
        for layer, other in zip(lora_layers(model), lora_layers(plain), strict=True):
            for each in (layer, other):
                local(each.lora_B).normal_(generator=torch.Generator().manual_seed(2))
            other.weight.copy_(dequantize(quantize(other.weight, model.lora.scheme)))
    found, wanted = output_of(model), output_of(plain)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for each in (found, wanted):
        each.square().mean().backward()
    torch.testing.assert_close(output_of(copy_for_inference(model, pack=False)), wanted, atol=1e-4, rtol=1e-5)
    for layer, other in zip(lora_layers(model), lora_layers(plain), strict=True):
        for name in ("lora_A", "lora_B"):
            torch.testing.assert_close(*(local(getattr(x, name).grad) for x in (layer, other)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for name, p in plain.named_parameters() if "lora_" in name)
    tensors = dict(full_tensors(model))
    assert tensors.keys() == dict(load_model(base).named_parameters()).keys()
