"""Adapter folders as other programs write them: models/adapters.py."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.adapters import open_adapter, weight_files
from models.checkpoint import load_model, model_folder
from models.fingerprint import fingerprint
from models.trained_adapters import choose_lora
from tests import tiny
from tests.damage import flip
from tests.models.test_lora import CPU, IDS, Args, broken, made_by_peft
from tests.tiny import refused

NAME = "adapter_model.safetensors"
WRITTEN = {  # settings of PEFT
    "a pattern": {"r": 2, "target_modules": r".*\.(q|down)_proj"},
    "some layers": {"r": 2, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
    "the first layer": {"r": 2, "target_modules": ["v_proj"], "layers_to_transform": 0},
    "all but one": {"r": 2, "target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
    "names of layers": {"r": 2, "target_modules": ["model.layers.1.mlp.up_proj", "0.self_attn.q_proj"]},
}


def same_factors(found, wanted):
    assert found.factors.keys() == wanted.factors.keys()
    for layer, pair in wanted.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(found.factors[layer], pair)), layer


@pytest.mark.parametrize("kind", WRITTEN)
def test_layers_by_pattern(kind, tmp_path):
    """Catches layers adapted by the config's target_modules instead of by the tensors in the file, or taken for missing
    where the config leaves them out; on a tied model."""
    base, folder, oracle = made_by_peft(tmp_path, {**tiny.QWEN2, "tie_word_embeddings": True}, WRITTEN[kind])
    torn = broken(folder, tmp_path / "torn", tensors=lambda found: dict(sorted(found.items())[2:]))
    if kind == "names of layers":  # PEFT warns: "Found missing adapter keys"
        refused(lambda: open_adapter(torn, base), torn, "has no adapter, and target_modules")
    merged = load_model(base, files=weight_files(base, folder), param_dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged.lm_head(merged(IDS)), oracle(IDS).logits, atol=1e-5, rtol=1e-5)


INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "olora", "OLoRA", "pissa_niter_2")


@pytest.mark.parametrize("kind", INITIALISATIONS)
def test_initialisations_of_peft(kind, tmp_path):
    """Catches an initialisation that changes the base, in any spelling, merged into the base as it was before: each is
    refused or gives PEFT's logits."""
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": kind}
    base, folder, oracle = made_by_peft(tmp_path, {}, settings)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    found = {name.replace(".base_layer", ""): t for name, t in oracle.base_model.model.state_dict().items()}
    if not all(torch.equal(found[name], t) for name, t in plain.items()):
        refused(lambda: open_adapter(folder, base), folder, "has changed the base")
        return
    merged = load_model(base, files=weight_files(base, folder), param_dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged.lm_head(merged(IDS)), oracle(IDS).logits, atol=1e-5, rtol=1e-5)


def test_other_ways_to_write_them(tmp_path):
    """Catches an adapter refused or misread for its dtype, tensor names as in PEFT's state_dict (".default"), pickled
    weights, a setting that PEFT ignores for linear layers, or a base that is a snapshot in the hub's cache."""
    base, folder, oracle = made_by_peft(tmp_path, {}, {"r": 2, "target_modules": ["q_proj"]})
    wanted, tensors = open_adapter(folder, base), load_file(folder / NAME)
    named = broken(folder, tmp_path / "named")
    save_file({name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}, named / NAME)
    same_factors(open_adapter(named, base), wanted)
    pickled = broken(folder, tmp_path / "pickled")
    (pickled / NAME).unlink()
    torch.save(tensors, pickled / "adapter_model.bin")
    same_factors(open_adapter(pickled, base), wanted)
    halves = broken(folder, tmp_path / "bf16", tensors=lambda found: {name: t.bfloat16() for name, t in found.items()})
    assert all(t.dtype == torch.float32 for pair in open_adapter(halves, base).factors.values() for t in pair)
    turned = broken(folder, tmp_path / "turned", config={"fan_in_fan_out": True})  # which is for Conv1D
    same_factors(open_adapter(turned, base), wanted)
    of_peft = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), turned)
    torch.testing.assert_close(of_peft(IDS).logits, oracle(IDS).logits)
    snapshot = shutil.copytree(base, tmp_path / "hub/models--org--Some-7B/snapshots/0123abc")
    of_hub = broken(folder, tmp_path / "of-hub", config={"base_model_name_or_path": "org/Some-7B"})
    same_factors(open_adapter(of_hub, snapshot), wanted)


@pytest.mark.parametrize("pad", [None, 2])
def test_a_quantised_reward_model(pad, tmp_path):
    """Catches a folder that transformers opens as a language model or with two labels, and a pad token other than its
    tokenizer's or the base's, since the pad token decides where scores are read: on a padded batch transformers' scores
    equal score.py's and, up to rounding, those of the base with the adapter."""
    model = {"intermediate_size": 128, "pad_token_id": pad}
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    base, folder, _ = made_by_peft(tmp_path, model, settings)
    adapted, quantised = ["--checkpoint_path", base, "--adapter_path", folder], tmp_path / "quantised"
    result = tiny.run("scripts/quantize.py", *adapted, "--mode", "int8", "--output_dir", quantised)
    assert result.code == 0, result
    found = tiny.run("inference/generate.py", *adapted, "--prompt", "3")  # naming the adapter, which brings the head
    tiny.assert_refused(found, f"--adapter_path {folder}: the adapter of a reward model")
    found = tiny.run("scripts/quantize.py", *adapted, "--eval_file", "x", "--output_dir", tmp_path / "x")
    tiny.assert_refused(found, f"--eval_file: {folder} is of a reward model")
    texts = ["3 plus 4 is 7", "so it seems", "3"]
    data = tiny.write_records(tmp_path / "data.jsonl", [{"prompt": "", "completion": text} for text in texts])
    rewards = []
    for i, given in enumerate((adapted, ["--checkpoint_path", quantised])):
        out = tmp_path / f"{i}.jsonl"
        assert tiny.run("inference/score.py", *given, "--data_file", data, "--output_file", out).code == 0
        rewards.append(torch.tensor([[line["reward"]] for line in tiny.read_lines(out)]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(quantised, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or "</s>"
    batch = tokenizer([f"{text}</s>" for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = transformers.AutoModelForSequenceClassification.from_pretrained(quantised).eval()(**batch).logits
    torch.testing.assert_close(found, rewards[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, rewards[0], atol=0.1, rtol=0.1)


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def test_what_is_not_computed_is_named(tmp_path):
    """Catches a pickle that runs code or ends in a traceback, an adapter of lm_head called one for another base, and a
    traceback where the base lacks the adapted tensor, such as one saved from a compiled model."""
    base, folder, _ = made_by_peft(tmp_path, {}, {"r": 2, "target_modules": ["q_proj"]})
    pickled = broken(folder, tmp_path / "pickled")
    (pickled / NAME).unlink()
    for content, complaint in (
        ({"a": Code()}, "its weights cannot be read"),
        ([torch.ones(2)], "not a dict of tensors"),
    ):
        torch.save(content, pickled / "adapter_model.bin")
        refused(lambda: open_adapter(pickled, base), pickled, complaint)
    head = "base_model.model.lm_head.lora_{}.weight"
    more = {head.format("A"): torch.ones(2, 64), head.format("B"): torch.ones(tiny.VOCAB_SIZE, 2)}
    with_head = broken(folder, tmp_path / "head", tensors=lambda found: found | more)
    refused(lambda: open_adapter(with_head, base), with_head, "lm_head has an adapter; supported are q_proj")
    renamed = {f"_orig_mod.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(renamed, base / "model.safetensors")
    refused(lambda: open_adapter(folder, base), base, "have no tensor model.layers.0.self_attn.q_proj.weight, which")


def test_what_lies_beside_an_adapter(tmp_path, capsys):
    """Catches no notice, or two where PPO's critic has adapters too, if the tokenizer files saved beside an adapter
    have another chat template or EOS than the base; a notice where the base only does not name its EOS; no notice of a
    base that has changed or holds an adapter itself; and notices on stdout, among the samples."""
    base, folder, _ = made_by_peft(tmp_path, {}, {"r": 2, "target_modules": ["q_proj"]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    flags = ["--checkpoint_path", base, "--adapter_path", folder, "--prompt", "3 plus", "--max_new_tokens", 2]

    def said():
        result = tiny.run("inference/generate.py", *flags)
        assert result.code == 0 and json.loads(result.stdout)["num_tokens"] == 2, result
        return [line for line in result.stderr.splitlines() if line.startswith((f"{folder}:", f"{base}:"))]

    tokenizer.save_pretrained(folder)
    assert not said()
    config = base / "tokenizer_config.json"
    named = config.read_text()
    config.write_text(json.dumps({**json.loads(named), "eos_token": "", "tokenizer_class": "LlamaTokenizer"}))
    assert not said()
    config.write_text(named)
    tokenizer.chat_template, tokenizer.eos_token = "{% for m in messages %}{{ m.content }}{% endfor %}", "<unk>"
    tokenizer.save_pretrained(folder)
    ends = ("its chat template differs from that of", "its eos_token differs from that of")
    assert all(end in line for end, line in zip(ends, said(), strict=True))
    policy = choose_lora(Args(base, adapter_path=folder), base, CPU)
    choose_lora(Args(base, adapter_path=folder), base, CPU, policy=policy)
    assert capsys.readouterr().err.count(ends[1]) == 1
    tokenizer.save_pretrained(base)  # changes the base, as the adapter notices if its file has a fingerprint
    path = folder / NAME
    save_file(load_file(path), path, metadata={"base_fingerprint": "another"})
    assert said() == [f"{base}: has other content than the base of the adapter {folder}"]
    for name in (NAME, "adapter_config.json"):
        shutil.copy(folder / name, base)
    flags[2:4] = []  # without --adapter_path; transformers with PEFT loads both
    assert said() == [f"{base}: holds an adapter too, which is not used; --adapter_path {base} uses it"]
    for settings in ({}, {"lora_r": 2}, {"adapter_path": folder}):  # of a trainer
        choose_lora(Args(base, **settings), base, CPU)
        assert ("holds an adapter too" in capsys.readouterr().err) == ("adapter_path" not in settings)
    both, alone = (load_model(base, files=weight_files(base, path), param_dtype=torch.float32) for path in (base, None))
    logits = transformers.AutoModelForCausalLM.from_pretrained(base)(IDS).logits
    torch.testing.assert_close(both.lm_head(both(IDS)), logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone.lm_head(alone(IDS)), logits, atol=1e-2)


def test_the_folder_of_a_run(tmp_path):
    """Catches an adapter beside merged weights, to which transformers with PEFT would add it again; a merged model that
    --checkpoint_path does not find; a fingerprint of an adapter that depends on other files in its folder; a damaged
    tensor that is merged, or not named; and one that PEFT has changed and saved taken for a damaged one."""
    base, folder, oracle = made_by_peft(tmp_path, {}, {"r": 2, "target_modules": "all-linear"})
    train_file = tiny.write_records(tmp_path / "train.jsonl", [{"prompt": "a", "completion": " b"}])
    out = tmp_path / "out"
    given = ["--checkpoint_path", base, "--train_file", train_file, "--output_dir", out, "--batch_size", 1]
    given += ["--adapter_path", folder, "--max_steps", 0]
    result = tiny.run("training/finetune_sft.py", *given, "--no-merge")
    assert result.code == 0 and model_folder(out) == out and not (out / "merged").exists(), result.stderr
    before = fingerprint(out)
    (out / "metrics.jsonl").write_text("{}")
    assert fingerprint(out) == before
    result = tiny.run("training/finetune_sft.py", *given, "--resume", "--merge")
    assert result.code == 0 and model_folder(out) == out / "merged", result.stderr
    with torch.no_grad():
        for place in (out, out / "merged"):
            model = transformers.AutoModelForCausalLM.from_pretrained(place)
            torch.testing.assert_close(model(IDS).logits, oracle(IDS).logits, atol=1e-5, rtol=1e-5)
    again = tmp_path / "again"
    changed = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), out)
    torch.nn.init.ones_(changed.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight)
    changed.save_pretrained(again)
    open_adapter(again, base)
    whole, before = (out / NAME).read_bytes(), {name: t.clone() for name, t in load_file(out / NAME).items()}
    for share in (0.6, 1.0):
        flip(out / NAME, share)
        [hit] = [name for name, t in load_file(out / NAME).items() if not torch.equal(t, before[name])]
        refused(lambda: open_adapter(out, base), out / NAME, f"the tensor {hit} is damaged")
        (out / NAME).write_bytes(whole)
    (out / NAME).write_bytes(whole.replace(b'"F32"', b'"I32"', 1))  # the same bytes, read as other numbers
    refused(lambda: open_adapter(out, base), out / NAME, "is damaged")
