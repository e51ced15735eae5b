"""The reference of a run that starts from an adapter is the base with that adapter. The oracle is this model merged by
PEFT into a folder of its own, given as --ref_checkpoint_path."""

import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.shared_base import adapter
from tests import tiny
from tests.training import optimum
from training import train_dpo, train_grpo

ADAPTER = "adapter_model.safetensors"
COMMON = {"temperature": optimum.TEMPERATURE, "total_steps": 2, "rollout_batch_size": 32}
COMMON |= {"learning_rate": 1e-2, "save_steps": 1}
RUNS = {  # name: (script, flags, the metric of its KL)
    "ppo": ("train_ppo", {"kl_coef": 0.1, "ppo_epochs": 1, "shared_base": True, "debug_checks": True}, "objective/kl"),
    "grpo": ("train_grpo", {"beta": 0.1}, "kl"),
    "rloo on int8": ("train_grpo", {"beta": 0.1, "loss_type": "rloo", "quantize_base": "int8"}, "kl"),
}


def adapted(base, root):
    """Returns the folders of (an adapter made by PEFT, the model into which PEFT merged it)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(root / "adapter")
    shutil.copytree(base, root / "merged")
    model.merge_and_unload().save_pretrained(root / "merged")
    return root / "adapter", root / "merged"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Returns (a task of optimum.py, an adapter for its model, both merged)."""
    root = tmp_path_factory.mktemp("reference")
    optimum.write_task(root, 0, head_scale=0.3)
    return root, *adapted(root / "ref", root)


def agree(found, wanted, tolerance=1e-5):
    for line, want in zip(found, wanted, strict=True):
        assert line.keys() == want.keys()
        noise = {"rewards/accuracies"} if want["step"] == 1 else set()  # of margins that are 0 up to rounding
        for key in want.keys() - noise:
            if not key.startswith("time/") and "tokens_per_second" not in key:
                assert line[key] == pytest.approx(want[key], rel=tolerance, abs=tolerance), (want["step"], key)


@pytest.mark.parametrize("name", RUNS)
def test_answers_are_held_near_the_start(task, name):
    """Catches a reference that lacks the adapter, changes with the policy, is the critic's or is rounded differently,
    and a resume with another reference: the merged folder as reference must give the same numbers."""
    root, start, merged = task
    script, flags, kl = RUNS[name]
    script, settings, out = f"training/{script}.py", COMMON | flags | {"adapter_path": start}, root / name
    lines = optimum.train(script, root, out, **settings)
    assert lines[0][kl] == 0 and abs(lines[1][kl]) > 1e-3
    if "quantize_base" not in settings:
        agree(lines, optimum.train(script, root, root / f"{name}-merged", **settings, ref_checkpoint_path=merged))
    again = shutil.copytree(out, root / f"{name}-again")
    shutil.rmtree(again / "checkpoints/step-000002")
    agree(optimum.train(script, root, again, **settings, resume=True), lines, tolerance=0)
    found, wanted = (load_file(folder / ADAPTER) for folder in (again, out))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted) and not [key for key in wanted if "ref" in key]
    if name == "grpo":  # the base's folder means the base without the adapter
        lines = optimum.train(script, root, root / "base", **settings, ref_checkpoint_path=root / "ref")
        assert lines[0][kl] > 1e-2


def test_the_critic_starts_from_the_policy(task, tmp_path):
    """Catches a critic, on the policy's base or on its own, that starts without the policy's adapter; or with it from a
    folder that --value_checkpoint_path names."""
    root, start, merged = task
    critics = {"shared": {"shared_base": True}, "own": {}, "named": {"value_checkpoint_path": root / "ref"}}
    for name, more in critics.items():
        settings = {"total_steps": 0, "adapter_path": start, **more}
        optimum.train("training/train_ppo.py", root, tmp_path / name, **settings)
        found = load_file(tmp_path / name / "critic/merged/model.safetensors")
        wanted = load_file((root / "ref" if name == "named" else merged) / "model.safetensors")
        assert not found.pop("score.weight").any() and found.keys() == wanted.keys() - {"lm_head.weight"}
        for key, value in found.items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flag", ["--precompute_ref", "--no-precompute_ref"])
def test_pairs_are_held_near_the_start(task, tmp_path, flag, monkeypatch):
    """Catches the same mistakes in DPO, with log-probs computed before training or in each step; a file of log-probs
    that is reused for another adapter; and a second model in memory where the base serves, or a second adapter that
    nobody reads."""
    root, start, merged = task
    letters = optimum.LETTERS
    pairs = [{"prompt": "bca", "chosen": letters[i], "rejected": letters[3 * i % 8] * (i % 3)} for i in range(8)]
    train_file = tiny.write_records(tmp_path / "pairs.jsonl", pairs)
    given = ["--checkpoint_path", root / "ref", "--train_file", train_file, "--batch_size", 8, "--max_steps", 3]
    given += ["--learning_rate", 1e-2, "--adapter_path", start, flag]

    def train(name, *more):
        result = tiny.run("training/train_dpo.py", *given, "--output_dir", tmp_path / name, *more)
        assert result.code == 0, result.stderr
        return tiny.read_lines(tmp_path / name / "metrics.jsonl")

    loaded, copied, load, choose = [], [], train_dpo.load_frozen, train_dpo.choose_lora
    monkeypatch.setattr(train_dpo, "load_frozen", lambda path, *rest: loaded.append(path) or load(path, *rest))
    monkeypatch.setattr(train_dpo, "choose_lora", lambda *a, **k: copied.append(choose(*a, **k)) or copied[-1])
    lines = train("own")
    assert lines[0]["rewards/chosen"] == lines[0]["rewards/rejected"] == 0 and lines[2]["rewards/margins"] > 1e-6
    agree(lines, train("merged", "--ref_checkpoint_path", merged))
    lines = train("base", "--ref_checkpoint_path", root / "ref")  # which means the base without the adapter
    assert loaded == [merged] and abs(lines[0]["rewards/chosen"]) > 1e-3
    agree(lines, train("copy", "--ref_checkpoint_path", shutil.copytree(root / "ref", tmp_path / "ref")))
    assert [lora.with_reference for lora in copied] == [flag == "--no-precompute_ref", False, False, False]
    if flag == "--precompute_ref":
        other = shutil.copytree(start, tmp_path / "twice")
        weights = other / "adapter_model.safetensors"
        tensors = load_file(weights)
        save_file({key: 2 * tensor if "lora_B" in key else tensor for key, tensor in tensors.items()}, weights)
        shutil.copytree(tmp_path / "own/reference", tmp_path / "other/reference")
        assert abs(train("other", "--resume", "--adapter_path", other)[0]["rewards/chosen"]) < 1e-6


def test_a_reference_without_the_adapter_shows(task, monkeypatch):
    """Catches a comparison too weak to notice a reference without the adapter."""
    root, start, _ = task
    script, flags, kl = RUNS["grpo"]
    monkeypatch.setattr(train_grpo, "as_reference", lambda model: adapter(model, None))
    lines = optimum.train(f"training/{script}.py", root, root / "off", **COMMON | flags | {"adapter_path": start})
    assert lines[0][kl] > 1e-2
