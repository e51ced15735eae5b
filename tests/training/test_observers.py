"""Observing a run does not change it: each trainer ends with bitwise equal weights whether or not it saves, evaluates,
exports, draws samples and reports to a dashboard in every step, and wherever it caches tokens."""

import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from models import rows
from tests import tiny
from training import data, run_dir

REWARDS = "def reward(prompts, completions, examples):\n    return [len(c.split()) / 3 for c in completions]\n"
LEAN = ["--param_dtype", "bfloat16", "--optim", "adamw_8bit"]
PPO = ["--rollout_batch_size", 4, "--minibatch_size", 2, "--total_steps", 3, "--max_new_tokens", 4]
PPO += ["--ppo_epochs", 1]
PPO += ["--critic_warmup_steps", 2, "--value_learning_rate", 1e-2]  # at first, the policy's optimizer has not stepped
GRPO = ["--rollout_batch_size", 4, "--num_generations", 2, "--minibatch_size", 4, "--total_steps", 2]
GRPO += ["--max_new_tokens", 4]
RUNS = {  # name: (script, flags)
    "sft": ("finetune_sft", ["--batch_size", 4, "--max_steps", 3]),
    "rm": ("train_rm", ["--batch_size", 4, "--max_steps", 3]),
    "dpo": ("train_dpo", ["--batch_size", 4, "--max_steps", 3]),
    "ppo": ("train_ppo", PPO),
    "ppo, lean": ("train_ppo", [*PPO, *LEAN]),
    "grpo, lean": ("train_grpo", [*GRPO, *LEAN]),
    "grpo, one beginning": ("train_grpo", [*GRPO, "--tis_cap", 1]),  # whose pages an evaluation could leave
}
QUIET = ["--save_steps", 0, "--log_steps", 100]
WATCHED = ["--save_steps", 1, "--save_total_limit", 9, "--eval_steps", 1, "--export_steps", 1]
WATCHED += ["--report_to", "tensorboard"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("observers")
    tiny.write_model(root / "lm", hidden_size=64, num_hidden_layers=1)
    records = [{"prompt": f"{i} plus", "completion": f" {i} is", "chosen": " so", "rejected": " or"} for i in range(9)]
    tiny.write_records(root / "records.jsonl", records)
    begin = " ".join(f"{a} plus {a + 1} is {2 * a + 1}." for a in range(40))[:560]
    more = [{"prompt": begin + f" {i} plus 3 is" * (i + 1)} for i in range(9)]
    tiny.write_records(root / "beginning.jsonl", more)
    (root / "fn.py").write_text(REWARDS)
    return root


@pytest.fixture(autouse=True)
def board(monkeypatch):
    """Pretends that a dashboard is installed."""
    writer = types.SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)
    module = types.SimpleNamespace(SummaryWriter=lambda *_, **__: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(run_dir, "check_installed", lambda _: None)


def draws(name):
    """Whether the run samples its own answers, and so has no tokens to cache."""
    return "--rollout_batch_size" in RUNS[name][1]


def train(world, name, out, *more):
    script, flags = RUNS[name]
    given = ["--checkpoint_path", world / "lm", "--output_dir", out, "--learning_rate", 1e-2, "--warmup_ratio", 0]
    kind = "prompt_file" if draws(name) else "train_file"
    records = world / ("beginning.jsonl" if "beginning" in name else "records.jsonl")
    given += [f"--{kind}", records, "--lr_schedule", "constant"]
    given += ["--reward_fn", f"{world / 'fn.py'}:reward"] * draws(name)
    if "--eval_steps" in more:
        given += [f"--eval_{kind.removeprefix('train_')}", records]
        given += ["--eval_max_new_tokens", 4] * (script in ("finetune_sft", "train_dpo"))
    result = tiny.run(f"training/{script}.py", *given, *flags, *more)
    assert result.code == 0, result.stderr


@pytest.mark.parametrize("name", RUNS)
def test_observers_do_not_write(name, world, tmp_path, monkeypatch):
    """Catches a save that steps an optimizer which has not stepped yet (as torch's get_state_dict does), an evaluation
    that uses up the run's random numbers, an export that changes weights, a resume that differs after any of them, and
    a --data_cache that does not reach the tokens, or is not off, and --data_workers that do not."""
    workers, in_processes = [], rows.map_in_processes
    once = lambda encode, chunks, n, **more: (workers.append(n), in_processes(encode, chunks, 1, **more))[1]  # noqa: E731
    monkeypatch.setattr(rows, "map_in_processes", once)
    monkeypatch.setattr(rows, "BIG_FILE", 1)
    monkeypatch.setattr(data, "cache_folder", lambda: tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    off, given = [], []
    if not draws(name):
        off = ["--data_cache", "off", "--data_workers", 5]
        given = ["--data_cache", tmp_path / "given", "--data_workers", 7]
    cached = lambda: {each: any((tmp_path / each).glob("*")) for each in ("off", "given", "home")}  # noqa: E731
    train(world, name, tmp_path / "quiet", *QUIET, *off)
    assert cached() == {"off": False, "given": False, "home": False}
    train(world, name, tmp_path / "watched", *WATCHED, *given)
    assert cached() == {"off": False, "given": bool(given), "home": False}
    assert set(workers) == (set() if draws(name) else {5, 7})
    (tmp_path / "resumed/checkpoints").mkdir(parents=True)
    shutil.copyfile(tmp_path / "watched/args.json", tmp_path / "resumed/args.json")
    first = "checkpoints/step-000001"
    shutil.copytree(tmp_path / "watched" / first, tmp_path / "resumed" / first)
    train(world, name, tmp_path / "resumed", *QUIET, "--resume")
    assert cached() == {"off": False, "given": bool(given), "home": bool(given)}
    parts = ["model.safetensors", *(["critic/model.safetensors"] if "ppo" in name else [])]
    start = load_file(world / "lm/model.safetensors")
    for part in parts:
        wanted = load_file(tmp_path / "quiet" / part)
        assert any(not torch.equal(wanted[key], start[key]) for key in wanted.keys() & start.keys())
        for other in ("watched", "resumed"):
            found = load_file(tmp_path / other / part)
            for key in wanted:
                assert torch.equal(found[key], wanted[key]), (other, part, key)
    lines, wanted = (tiny.read_lines(tmp_path / out / "metrics.jsonl") for out in ("watched", "quiet"))
    assert lines[-1]["step"] == wanted[-1]["step"] and any("eval" in key for key in lines[-1])
