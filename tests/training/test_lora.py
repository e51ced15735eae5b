"""LoRA in the five trainers: against PEFT's step, resumed, with quantised bases, and through every stage."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from models.decode import refresh as real_refresh
from models.records import collate, tokenising
from models.tokenizer import Tokenizer
from tests import tiny
from tests.training import optimum
from tests.training.optimum import log_probs, relative_regret, write_task
from training.data import encode_sft_record

RECORDS = [{"prompt": f"{i} plus" + " so" * (i % 5), "completion": f" {i} is" + " it" * (i % 4)} for i in range(13)]
ADAPTER = "adapter_model.safetensors"
QWEN2 = {**tiny.QWEN2, "intermediate_size": 128}  # groups of int4 divide it


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(a folder for everything, the base, records)"""
    root = tmp_path_factory.mktemp("lora")
    tiny.write_model(root / "base", **QWEN2)
    return root, root / "base", tiny.write_records(root / "train.jsonl", RECORDS)


def run(script, world, out, *flags):
    """A trainer with adapters of rank 4; its result."""
    _, base, train_file = world
    given = ["--checkpoint_path", base, "--train_file", train_file, "--output_dir", out, "--batch_size", 8]
    given += ["--max_steps", 4, "--learning_rate", 1e-2, "--lora_r", 4, "--adam_eps", 1e-3]
    result = tiny.run(f"training/{script}.py", *given, *flags)
    assert result.code == 0, result.stderr
    return result


def batch_of(folder, train_file):
    """(input_ids, labels) of SFT records."""
    tokenizer = Tokenizer(folder)
    rows = [encode_sft_record(record, tokenizer)[0] for record in tokenising(train_file)]
    batch = collate(rows, 0, torch.device("cpu"))
    return batch.input_ids, batch.labels


@pytest.mark.parametrize("flags", [[], ["--use_rslora", "--lora_target_modules", "q_proj", "v_proj"]], ids=str)
def test_steps_are_those_of_peft(world, tmp_path, flags):
    """Catches a scale in the wrong place, a factor that is not trained, decayed or clipped otherwise, an adapter that
    begins or ends otherwise than PEFT's, and a frozen weight that moves."""
    root, base, _ = world
    train_file = tiny.write_records(tmp_path / "train.jsonl", RECORDS[:8])
    common = ["--train_file", train_file, "--no-shuffle", "--lr_schedule", "constant", "--warmup_ratio", 0, *flags]
    begun, out = tmp_path / "begun", tmp_path / "out"
    run("finetune_sft", world, begun, *common, "--max_steps", 0, "--no-merge")  # what is random comes from here
    run("finetune_sft", world, out, *common, "--max_steps", 2)

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, begun, is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    ids, labels = batch_of(base, train_file)
    for line in tiny.read_lines(out / "metrics.jsonl"):
        loss = model(ids, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert abs(line["loss"] - loss.item()) < 1e-6 * line["loss"] + 1e-6
        assert abs(line["grad_norm"] - norm.item()) < 1e-5 * line["grad_norm"]
    wanted, found = peft.get_peft_model_state_dict(model), load_file(out / ADAPTER)
    assert wanted.keys() == found.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name

    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    read = peft.PeftModel.from_pretrained(plain, out)  # all that was written, as PEFT opens it
    assert not [key for key in read.load_adapter(out, "again").missing_keys if "again" in key]
    with torch.no_grad():
        logits = read(ids).logits
        whole = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(out)).eval()
        whole.load_state_dict(load_file(out / "model.safetensors"))
        torch.testing.assert_close(whole(ids).logits, logits, atol=1e-5, rtol=1e-5)
    stored, exported = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora")[0] for name in found}
    assert exported.keys() == stored.keys()
    for name in stored:
        assert torch.equal(stored[name], exported[name]) != (name.removesuffix(".weight") in adapted), name
