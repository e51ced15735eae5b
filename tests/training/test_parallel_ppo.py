"""training/train_ppo.py on several ranks against one process: the same answers token for token, the same losses, every
gradient of policy and critic, and the weights."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from models.checkpoint import model_folder
from tests import tiny
from tests.ranks import launch
from tests.ranks_worker import run_job

STEPS, EPOCHS, MINIBATCHES = 2, 1, 2
LAYOUTS = {  # of 4 ranks: (tensor_parallel_size, more flags)
    "dp 4": (1, ["--sleep", "1"]),
    "dp 2 x tp 2": (2, ["--sequence_parallel", "--max_tokens_per_micro_batch", "26"]),
}
REWARDS = """
def reward(prompts, completions, examples):
    return [len(c.split()) / 3 for c in completions]

def each(prompt, completion, example):
    return len(completion) / 10 if "so" in prompt else None
"""


def arguments(root, name, *more) -> list[str]:
    flags = ["--checkpoint_path", root / "lm", "--prompt_file", root / "prompts.jsonl", "--output_dir", root / name]
    flags += ["--reward_checkpoint_path", root / "rm", "--reward_fn", f"{root / 'fn.py'}:reward"]
    flags += ["--reward_fn", f"{root / 'fn.py'}:each", "--reward_workers", 1]
    flags += ["--reward_fn_weight", 1, "--reward_fn_weight", -0.1]
    flags += ["--eval_prompt_file", root / "prompts.jsonl", "--eval_steps", STEPS, "--max_new_tokens", 8]
    flags += ["--total_steps", STEPS, "--rollout_batch_size", 8, "--minibatch_size", 4, "--ppo_epochs", EPOCHS]
    flags += ["--learning_rate", 1e-3, "--value_learning_rate", 1e-3, "--lr_schedule", "constant", "--warmup_ratio", 0]
    flags += ["--adam_eps", 1e-3, "--kl_target", 0.1, "--debug_checks", "--entropy_coef", 0.01, "--temperature", 1.3]
    return ["training.train_ppo", *map(str, [*flags, *more])]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Writes a policy that ends some of its answers, a reward model and ragged prompts, and trains in one process."""
    root = tmp_path_factory.mktemp("parallel")
    model = tiny.write_model(root / "lm", std=0.1, num_hidden_layers=1)
    with torch.no_grad():  # EOS is likely enough that answers have different lengths
        model.lm_head.weight[2] = model.lm_head.weight[5:25].sum(0)
    model.save_pretrained(root / "lm")
    pairs = tiny.write_records(root / "pairs.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}])
    flags = ["--checkpoint_path", root / "lm", "--train_file", pairs, "--output_dir", root / "rm", "--max_steps", 0]
    assert tiny.run("training/train_rm.py", *flags).code == 0
    tiny.write_records(root / "prompts.jsonl", [{"prompt": f"{i} plus" + " so" * (i % 4)} for i in range(5)])
    (root / "fn.py").write_text(REWARDS)
    run_job(*arguments(root, "one"))
    dist.destroy_process_group()
    samples = tiny.read_lines(root / "one/samples.jsonl")
    assert 0 < sum(sample["finished"] for sample in samples) < len(samples)
    return root


def compare(root, out) -> float:
    """Returns the largest relative difference from one process: losses, gradients and weights; answers must be
    equal."""
    worst = 0.0
    keys = ("loss", "loss/policy_avg", "loss/value_avg", "grad_norm", "value_grad_norm", "objective/rlhf_reward")
    keys += ("objective/entropy", "policy/entropy_avg", "kl_coef", "eval_objective/scores", "num_tokens")
    keys += ("rewards/reward_model/mean", "rewards/reward/mean", "rewards/each/mean", "eval_rewards/each/std")
    lines, wanted = (tiny.read_lines(root / d / "metrics.jsonl") for d in (out, "one"))
    assert len(lines) == len(wanted) == STEPS + 1
    for line, want in zip(lines, wanted):
        if want["step"] > 0:
            assert line["rewards/each/errors"] == want["rewards/each/errors"] > 0
        assert want["step"] < STEPS or want.keys() >= set(keys)
        for key in want.keys() & set(keys):
            worst = max(worst, abs(line[key] - want[key]) / max(abs(want[key]), 1e-2))
    samples, wanted = (tiny.read_lines(root / d / "samples.jsonl") for d in (out, "one"))
    assert [(s["step"], s["prompt"], s["output"]) for s in samples] == [
        (s["step"], s["prompt"], s["output"]) for s in wanted
    ]
    gradients, wanted = (torch.load(root / f"{d}.gradients.pt") for d in (out, "one"))
    assert len(gradients) == len(wanted) == 2 * STEPS * EPOCHS * MINIBATCHES  # policy and critic
    for step, want in zip(gradients, wanted):
        total = torch.stack([g.norm() for g in want.values()]).norm()
        for key in want:
            scale = max(want[key].norm().item(), 1e-2 * total.item())
            worst = max(worst, (step[key] - want[key]).norm().item() / scale)
    for part in ("", "critic"):
        weights, wanted = (load_file(model_folder(root / d / part) / "model.safetensors") for d in (out, "one"))
        for key, want in wanted.items():
            worst = max(worst, ((weights[key] - want).norm() / want.norm()).item())
    return worst


def test_four_ranks(world):
    """Catches answers that depend on the rank that draws them, a rank without rows of its own that hangs or counts,
    advantages whitened over one rank's share, a token mean per micro-batch or per rank, and scores that differ by rank;
    packed answers that attend to each other, and a number of groups that differs between ranks: of five held-out
    answers one rank has none for its last group."""
    jobs = []
    for name, (tp_size, more) in LAYOUTS.items():
        jobs.append(arguments(world, name.replace(" ", "-"), "--tensor_parallel_size", tp_size, *more))
    launch(4, jobs)
    found = {name: compare(world, name.replace(" ", "-")) for name in LAYOUTS}
    assert max(found.values()) < 1e-4, found


def test_two_ranks(world):
    """Catches the same mistakes without data parallelism (dp 4 has no tensor parallelism), and state of the critic, an
    optimizer or the KL coefficient that a checkpoint of two ranks lacks: resumed from its first step, the run ends
    bitwise equal."""
    jobs = [arguments(world, "tp-2", "--tensor_parallel_size", 2, "--save_steps", 1)]
    jobs.append(["rewind", str(world / "tp-2"), str(world / "resumed"), "1"])
    jobs.append(arguments(world, "resumed", "--tensor_parallel_size", 2, "--save_steps", 1, "--resume"))
    launch(2, jobs)
    assert compare(world, "tp-2") < 1e-4
    for part in ("model.safetensors", "critic/model.safetensors"):
        weights, wanted = (load_file(world / out / part) for out in ("resumed", "tp-2"))
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted), part
