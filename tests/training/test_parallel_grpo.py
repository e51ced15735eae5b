"""training/train_grpo.py on several ranks against one process: the same answers token for token, the same losses, every
gradient, and the weights."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from models.checkpoint import model_folder
from tests import tiny
from tests.ranks import launch
from tests.ranks_worker import run_job

STEPS, ITERATIONS, MINIBATCHES = 2, 1, 2
LAYOUTS = {  # of 4 ranks: (tensor_parallel_size, more flags)
    "dp 4": (1, ["--sleep", "2"]),
    "dp 2 x tp 2": (2, ["--sequence_parallel", "--micro_batch_size", "1"]),
}
REWARDS = """
def reward(prompts, completions, examples):
    return [len(c.split()) / 3 for c in completions]

def each(prompt, completion, example):
    return len(completion) % 3 / 10
"""


def arguments(root, name, *more) -> list[str]:
    flags = ["--checkpoint_path", root / "lm", "--prompt_file", root / "prompts.jsonl", "--output_dir", root / name]
    flags += ["--reward_fn", f"{root / 'fn.py'}:reward", "--reward_fn", f"{root / 'fn.py'}:each"]
    flags += ["--reward_workers", 1, "--eval_prompt_file", root / "prompts.jsonl"]
    flags += ["--num_generations_eval", 2, "--eval_steps", STEPS, "--max_new_tokens", 8, "--num_generations", 4]
    flags += ["--total_steps", STEPS, "--rollout_batch_size", 16, "--minibatch_size", 8, "--num_iterations", ITERATIONS]
    flags += ["--learning_rate", 1e-3, "--lr_schedule", "constant", "--warmup_ratio", 0, "--adam_eps", 1e-3]
    flags += ["--beta", 0.1, "--temperature", 1.3, "--max_resamples", 1, "--mask_truncated_completions"]
    return ["training.train_grpo", *map(str, [*flags, *more])]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Writes a policy that ends some of its answers and ragged prompts, and trains in one process."""
    root = tmp_path_factory.mktemp("parallel")
    model = tiny.write_model(root / "lm", std=0.1, num_hidden_layers=1)
    with torch.no_grad():  # EOS is likely enough that answers have different lengths
        model.lm_head.weight[2] = model.lm_head.weight[5:25].sum(0)
    model.save_pretrained(root / "lm")
    tiny.write_records(root / "prompts.jsonl", [{"prompt": f"{i} plus" + " so" * (i % 4)} for i in range(5)])
    (root / "fn.py").write_text(REWARDS)
    run_job(*arguments(root, "one"))
    dist.destroy_process_group()
    samples = tiny.read_lines(root / "one/samples.jsonl")
    assert 0 < sum(sample["finished"] for sample in samples) < len(samples)
    return root


def compare(root, out) -> float:
    """Returns the largest relative difference from one process: metrics, gradients and weights; answers must be
    equal."""
    worst = 0.0
    lines, wanted = (tiny.read_lines(root / d / "metrics.jsonl") for d in (out, "one"))
    assert len(lines) == len(wanted) == STEPS + 1
    for line, want in zip(lines, wanted):
        assert line.keys() == want.keys()
        for key in want:
            if not key.startswith(("time/", "tokens_per_second", "sampling/")):
                worst = max(worst, abs(line[key] - want[key]) / max(abs(want[key]), 1e-2))
    samples, wanted = ((root / d / "samples.jsonl").read_text() for d in (out, "one"))
    assert samples == wanted
    gradients, wanted = (torch.load(root / f"{d}.gradients.pt") for d in (out, "one"))
    assert len(gradients) == len(wanted) == STEPS * ITERATIONS * MINIBATCHES
    for step, want in zip(gradients, wanted):
        total = torch.stack([g.norm() for g in want.values()]).norm()
        for key in want:
            scale = max(want[key].norm().item(), 1e-2 * total.item(), 1e-2)  # some steps have little to learn
            worst = max(worst, (step[key] - want[key]).norm().item() / scale)
    weights, wanted = (load_file(model_folder(root / d) / "model.safetensors") for d in (out, "one"))
    for key, want in wanted.items():
        worst = max(worst, ((weights[key] - want).norm() / want.norm()).item())
    return worst


def test_four_ranks(world):
    """Catches answers that depend on the rank that draws them, groups split between ranks, a rank without rows of its
    own that hangs or counts, a divisor per micro-batch or per rank, and metrics that differ by rank."""
    jobs = []
    for name, (tp_size, more) in LAYOUTS.items():
        jobs.append(arguments(world, name.replace(" ", "-"), "--tensor_parallel_size", tp_size, *more))
    launch(4, jobs)
    found = {name: compare(world, name.replace(" ", "-")) for name in LAYOUTS}
    assert max(found.values()) < 1e-4, found


def test_two_ranks(world):
    """Catches state that a checkpoint of two ranks lacks (resumed from its first step, the run ends bitwise equal), and
    tp ranks that do not leave a rollout together after one of them had a signal."""
    jobs = [arguments(world, "tp-2", "--tensor_parallel_size", 2, "--save_steps", 1)]
    jobs.append(["rewind", str(world / "tp-2"), str(world / "resumed"), "1"])
    jobs.append(arguments(world, "resumed", "--tensor_parallel_size", 2, "--save_steps", 1, "--resume"))
    broken = arguments(world, "broken", "--tensor_parallel_size", 2)
    jobs += [["broken off", "1", "12", *broken], [*broken, "--resume"]]
    assert "stopped by a signal before the first " in launch(2, jobs)
    assert max(compare(world, out) for out in ("tp-2", "broken")) < 1e-4
    for other in ("resumed", "broken"):
        weights, wanted = (load_file(world / out / "model.safetensors") for out in (other, "tp-2"))
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
