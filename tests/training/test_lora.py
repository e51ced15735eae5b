"""LoRA in the five trainers: against PEFT's step, resumed, with quantised bases, and through every stage."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models import decode, generation
from models.adapters import weight_files
from models.batches import collate
from models.checkpoint import folder_config
from models.qlinear import dequantize, quantize
from models.records import tokenising
from models.reward import read_reward_kind, scalar_head_config
from models.tokenizer import Tokenizer
from models.tp import local
from models.trained_adapters import base_scheme
from tests import tiny
from tests.training import optimum
from tests.training.optimum import write_task
from training.data import encode_sft_record
from training.manifest import read_metadata

RECORDS = [{"prompt": f"{i} plus" + " so" * (i % 5), "completion": f" {i} is" + " it" * (i % 4)} for i in range(13)]
ADAPTER, MODEL = "adapter_model.safetensors", "merged/model.safetensors"
QWEN2 = {**tiny.QWEN2, "intermediate_size": 128}  # a multiple of int4's group size


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Returns (a folder for everything, the base, a file of records)."""
    root = tmp_path_factory.mktemp("lora")
    tiny.write_model(root / "base", **QWEN2)
    return root, root / "base", tiny.write_records(root / "train.jsonl", RECORDS)


def run(script, world, out, *flags):
    """Runs a trainer with adapters of rank 4; returns its result."""
    _, base, train_file = world
    given = ["--checkpoint_path", base, "--train_file", train_file, "--output_dir", out, "--batch_size", 8]
    given += ["--max_steps", 4, "--learning_rate", 1e-2, "--lora_r", 4, "--adam_eps", 1e-3]
    result = tiny.run(f"training/{script}.py", *given, *flags)
    assert result.code == 0, result.stderr
    return result


def batch_of(folder, train_file):
    """Returns (input_ids, labels) of SFT records."""
    tokenizer = Tokenizer(folder)
    rows = [encode_sft_record(record, tokenizer)[0] for record in tokenising(train_file)]
    batch = collate(rows, 0, torch.device("cpu"))
    return batch.input_ids, batch.labels


@pytest.mark.parametrize("flags", [[], ["--use_rslora", "--lora_target_modules", "q_proj", "v_proj"]], ids=str)
def test_steps_are_those_of_peft(world, tmp_path, flags):
    """Catches a scale in the wrong place, a factor that is not trained or is decayed or clipped differently, an adapter
    that starts or ends differently from PEFT's, and a frozen weight that changes."""
    _, base, _ = world
    train_file = tiny.write_records(tmp_path / "train.jsonl", RECORDS[:8])
    common = ["--train_file", train_file, "--no-shuffle", "--lr_schedule", "constant", "--warmup_ratio", 0, *flags]
    begun, out = tmp_path / "begun", tmp_path / "out"
    run("finetune_sft", world, begun, *common, "--max_steps", 0, "--no-merge")  # PEFT starts from these random factors
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
    read = peft.PeftModel.from_pretrained(plain, out)  # PEFT reads all that was written
    assert not [key for key in read.load_adapter(out, "again").missing_keys if "again" in key]
    with torch.no_grad():
        logits = read(ids).logits
        for folder in (out, out / "merged"):  # transformers applies an adapter that it finds
            whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
            torch.testing.assert_close(whole(ids).logits, logits, atol=1e-5, rtol=1e-5)
    stored, exported = load_file(base / "model.safetensors"), load_file(out / MODEL)
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora")[0] for name in found}
    assert exported.keys() == stored.keys()
    for name in stored:
        assert torch.equal(stored[name], exported[name]) != (name.removesuffix(".weight") in adapted), name


BASES = {
    "dropout": ["--lora_dropout", 0.3, "--activation_checkpointing", "full"],
    "bf16": ["--dtype", "bfloat16"],
    "int4": ["--quantize_base", "int4", "--optim", "adamw_8bit"],
}


@pytest.mark.parametrize("kind", BASES)
def test_resumed(world, kind):
    """Catches other adapters, moments or dropout noise after a resume, a checkpoint or an optimizer that holds the
    base, and a merged export of another base than the folder's (rounded to bf16 by the run's computation) or, for int4,
    than the quantised one that was trained on."""
    root, base, _ = world
    whole, again = root / f"whole-{kind}", root / f"again-{kind}"
    flags = [*BASES[kind], "--save_steps", 2]
    run("finetune_sft", world, whole, *flags)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints/step-000004")
    (again / ADAPTER).unlink()
    assert "resuming after step 2" in run("finetune_sft", world, again, *flags, "--resume").stdout
    for name in (ADAPTER, MODEL):
        wanted, found = load_file(whole / name), load_file(again / name)
        assert wanted.keys() == found.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted), name
    held = read_metadata(whole / "checkpoints/step-000004").state_dict_metadata
    assert held and all("lora_" in name for name in held)
    adapters, merged, stored = (
        load_file(whole / ADAPTER),
        load_file(whole / MODEL),
        load_file(base / "model.safetensors"),
    )
    for name, tensor in stored.items():
        B, A = (adapters.get(f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight") for x in "BA")
        if A is not None:
            scheme = base_scheme("int4")
            tensor = (dequantize(quantize(tensor, scheme)) if kind == "int4" else tensor) + 2 * B @ A
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_base_that_is_replaced_meanwhile(world, tmp_path):
    """Catches adapters merged at the end with another model that has replaced the base in its folder, and a run that is
    lost when it is not merged."""
    base, out = shutil.copytree(world[1], tmp_path / "base"), tmp_path / "out"
    tiny.write_model(tmp_path / "other", **QWEN2, seed=1)
    weights, kept = base / "model.safetensors", (base / "model.safetensors").read_bytes()
    (tmp_path / "fn.py").write_text(
        "import os\nimport shutil\n\n\ndef reward(prompts, completions, examples):\n"
        f"    shutil.copy({str(tmp_path / 'other/model.safetensors')!r}, {str(tmp_path / 'new')!r})\n"
        f"    os.replace({str(tmp_path / 'new')!r}, {str(weights)!r})\n"
        "    return list(map(len, completions))\n"
    )
    flags = ["--checkpoint_path", base, "--prompt_file", world[2], "--reward_fn", f"{tmp_path / 'fn.py'}:reward"]
    flags += ["--output_dir", out, "--rollout_batch_size", 4, "--num_generations", 2, "--max_new_tokens", 4]
    flags += ["--total_steps", 1, "--lora_r", 4, "--save_steps", 0]
    result = tiny.run("training/train_grpo.py", *flags)
    assert result.code == 2 and f"error: {base}: other content than when the run began" in result.stderr, result
    assert (out / ADAPTER).exists() and not (out / MODEL).exists()
    weights.write_bytes(kept)
    result = tiny.run("training/train_grpo.py", *flags, "--resume")
    assert result.code == 0 and "resuming after step 1" in result.stdout, result
    stored, exported = load_file(weights), load_file(out / MODEL)
    assert torch.equal(stored["model.embed_tokens.weight"], exported["model.embed_tokens.weight"])
    flags[flags.index("--total_steps") + 1] = 2
    result = tiny.run("training/train_grpo.py", *flags, "--resume", "--accept_changed", "total_steps")
    assert result.code == 2 and "other content than when the run began" in result.stderr, result
    assert not (out / MODEL).exists()  # merged with earlier adapters: --checkpoint_path would take it for these


def test_stages(world, tmp_path):
    """Catches an adapter that the next stage ignores (training, generation or quantisation), or that is scored without
    its head or its reward statistics: on its base and merged it must be the same model."""
    _, base, _ = world
    pairs = tiny.write_records(
        tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": f" {i} so", "rejected": " or"} for i in range(8)]
    )
    alone, merged = tmp_path / "alone", tmp_path / "merged"
    run("train_rm", world, alone, "--train_file", pairs, "--no-merge", "--quantize_base", "int8")
    written = {path.name for path in alone.iterdir()}
    assert written >= {"adapter_model.safetensors", "adapter_config.json"} and not written & {"config.json", "merged"}
    run("train_rm", world, merged, "--train_file", pairs)
    run("train_rm", world, tmp_path / "plain", "--train_file", pairs, "--no-merge")
    lines = []
    for name, model in (("m", [merged]), ("a", [base, "--adapter_path", tmp_path / "plain"])):
        out = tmp_path / f"{name}.jsonl"
        result = tiny.run(
            "inference/score.py", "--checkpoint_path", *model, "--data_file", pairs, "--output_file", out, "--normalize"
        )
        assert result.code == 0, result.stderr
        lines.append([(line["chosen_reward"], line["rejected_reward"]) for line in tiny.read_lines(out)])
    torch.testing.assert_close(torch.tensor(lines[0]), torch.tensor(lines[1]), atol=1e-4, rtol=1e-4)
    assert lines[0][0][0] > lines[0][0][1]

    sft, more = tmp_path / "sft", tmp_path / "more"
    run("finetune_sft", world, sft, "--learning_rate", 3e-2)
    outputs = []
    for model in ([sft], [base, "--adapter_path", sft]):
        for flags in ([], ["--quantize", "int4"]):
            result = tiny.run(
                "inference/generate.py",
                "--checkpoint_path",
                *model,
                "--prompt",
                "3 plus",
                "--temperature",
                0,
                "--max_new_tokens",
                12,
                *flags,
            )
            assert result.code == 0, result.stderr
            outputs.append(json.loads(result.stdout)["output"])
    assert outputs[:2] == outputs[2:]
    result = tiny.run(
        "inference/generate.py",
        "--checkpoint_path",
        base,
        "--prompt",
        "3 plus",
        "--temperature",
        0,
        "--max_new_tokens",
        12,
    )
    assert json.loads(result.stdout)["output"] != outputs[0]

    first = tiny.read_lines(sft / "metrics.jsonl")[-1]["loss"]
    result = tiny.run(
        "training/finetune_sft.py",
        "--checkpoint_path",
        base,
        "--adapter_path",
        sft,
        "--train_file",
        world[2],
        "--output_dir",
        more,
        "--batch_size",
        8,
        "--max_steps",
        1,
    )
    assert result.code == 0 and tiny.read_lines(more / "metrics.jsonl")[0]["loss"] < first + 0.2
    folders = [tmp_path / "q-merged", tmp_path / "q-adapted"]
    for out, model in zip(folders, ([sft], [base, "--adapter_path", sft])):
        result = tiny.run("scripts/quantize.py", "--checkpoint_path", *model, "--output_dir", out, "--mode", "int8")
        assert result.code == 0, result.stderr
    wanted, found = (load_file(out / "model.safetensors") for out in folders)
    differing = sum((found[name] != wanted[name]).sum().item() for name in wanted)
    assert wanted.keys() == found.keys() and differing < 20  # integers at the edge of rounding, since B A is recomputed


PPO = {"temperature": optimum.TEMPERATURE, "kl_coef": 0.1, "total_steps": 2, "rollout_batch_size": 64, "ppo_epochs": 2}
PPO |= {"minibatch_size": 32, "learning_rate": 1e-2, "value_learning_rate": 1e-2, "lora_r": 4, "debug_checks": True}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("task")
    write_task(root, 0, head_scale=0.3, num_hidden_layers=2)
    return root


def test_critic_on_the_policys_base(task):
    """Catches the policy's adapters used in place of the critic's, also where a backward pass recomputes a forward
    pass, a reference with adapters on, an export of the other model's adapters, and a resume of only one set."""
    train, out, again = "training/train_ppo.py", task / "shared", task / "again"
    settings = {**PPO, "shared_base": True, "activation_checkpointing": "full", "save_steps": 1}
    lines = optimum.train(train, task, out, **settings)
    assert lines[0]["objective/kl"] == 0 and abs(lines[1]["objective/kl"]) > 1e-3
    # a separate critic computes the same: it starts from the same weights, and no adapters are shared
    apart = optimum.train(train, task, task / "apart", **PPO)
    for line, other in zip(lines, apart, strict=True):
        for key in ("loss/policy_avg", "objective/kl", "objective/scores", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
    assert lines[1]["loss/value_avg"] < lines[0]["loss/value_avg"]
    policy, critic = load_file(out / ADAPTER), load_file(out / "critic" / ADAPTER)
    assert critic.keys() - policy.keys() == {"base_model.model.score.weight"} and len(policy) == 28
    assert all(not torch.equal(policy[name], critic[name]) for name in policy)
    stored = load_file(task / "ref/model.safetensors")
    for folder, adapters in ((out, policy), (out / "critic", critic)):
        merged, name = load_file(folder / MODEL), "model.layers.1.mlp.down_proj"
        B, A = (adapters[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
        torch.testing.assert_close(merged[f"{name}.weight"], stored[f"{name}.weight"] + 2 * B @ A)
        assert ("score.weight" in merged) == (folder != out) == ("lm_head.weight" not in merged)

    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints/step-000002")
    optimum.train(train, task, again, **settings, resume=True)
    for name in (ADAPTER, f"critic/{ADAPTER}"):
        wanted, found = load_file(out / name), load_file(again / name)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def test_a_critic_is_no_longer_the_reward_model(task):
    """Catches a critic whose adapter, on the reward model that it started from, is read with that model's separator,
    mean and deviation, unlike the merged folder."""
    start = task / "process"
    model = transformers.AutoModelForCausalLM.from_pretrained(task / "ref")
    shutil.copytree(task / "ref", start)
    weights = model.model.state_dict(prefix="model.") | {"score.weight": torch.ones(1, model.config.hidden_size)}
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    config = json.loads((start / "config.json").read_text())
    config = scalar_head_config(config, config["eos_token_id"])
    told = {"reward_model_type": "process", "step_separator": "\n", "reward_mean": 1.0, "reward_std": 2.0}
    (start / "config.json").write_text(json.dumps(config | told))
    settings = {**PPO, "total_steps": 1, "value_checkpoint_path": start}
    optimum.train("training/train_ppo.py", task, task / "from-rm", **settings)
    merged = task / "from-rm/critic/merged"
    adapted = weight_files(start, task / "from-rm/critic")
    assert read_reward_kind(start, adapted) == read_reward_kind(merged)
    assert adapted.config_of(folder_config(start)) == folder_config(merged)
    assert told.keys().isdisjoint(folder_config(merged)) and read_reward_kind(start).mean == 1


def test_adapters_reach_the_sampler(task, monkeypatch):
    """Catches a sampler that keeps using the base, or the adapters of an earlier update: --debug_checks, passed above,
    compares its log-probs with the trainer's."""
    monkeypatch.setattr(decode, "weight_of", lambda linear: local(linear.weight))
    with pytest.raises(RuntimeError, match="away from those of the engine"):
        optimum.train("training/train_ppo.py", task, task / "base", **PPO)
    monkeypatch.undo()
    monkeypatch.setattr(generation, "refresh", lambda copy, source: None)
    with pytest.raises(RuntimeError, match="away from those of the engine"):
        optimum.train("training/train_ppo.py", task, task / "stale", **PPO)
