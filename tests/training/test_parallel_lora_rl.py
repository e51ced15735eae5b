"""Reinforcement learning with LoRA on several ranks against one process: the same answers token for token, the same
metrics, every gradient and the weights, on gloo."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests import tiny
from tests.ranks import launch
from tests.ranks_worker import run_job
from tests.training import test_parallel_grpo as grpo
from tests.training import test_parallel_ppo as ppo
from tests.training.test_lora_reference import adapted

ADAPTER = "adapter_model.safetensors"
RUNS = {  # name, also of its folder: (the module that runs and compares it, flags)
    "grpo": (grpo, ["--adapter_path", "adapter", "--save_steps", "1"]),
    "ppo": (ppo, ["--lora_r", "3", "--shared_base", "--quantize_base", "int4"]),
}
LAYOUTS = {  # name: (ranks, tensor_parallel_size, what runs, more flags)
    "dp 2": (2, 1, ["grpo"], ["--micro_batch_size", "2"]),
    "tp 2": (2, 2, ["ppo"], ["--sequence_parallel", "--activation_checkpointing", "full"]),
    "dp 2 x tp 2": (4, 2, ["grpo", "ppo"], ["--max_tokens_per_micro_batch", "26"]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Writes a policy that ends some of its answers, an adapter and a reward model, and trains in one process."""
    root = tmp_path_factory.mktemp("parallel-lora-rl")
    # 128 is a multiple of int4's group size
    model = tiny.write_model(root / "lm", std=0.1, num_hidden_layers=1, intermediate_size=128)
    with torch.no_grad():  # EOS is likely enough that answers have different lengths
        model.lm_head.weight[2] = model.lm_head.weight[5:25].sum(0)
    model.save_pretrained(root / "lm")
    adapted(root / "lm", root)
    pairs = tiny.write_records(root / "pairs.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}])
    flags = ["--checkpoint_path", root / "lm", "--train_file", pairs, "--output_dir", root / "rm", "--max_steps", 0]
    assert tiny.run("training/train_rm.py", *flags).code == 0
    for name, (algorithm, _) in RUNS.items():
        folder = root / name
        folder.mkdir()
        for shared in ("lm", "rm", "adapter"):
            (folder / shared).symlink_to(root / shared)
        tiny.write_records(folder / "prompts.jsonl", [{"prompt": f"{i} plus" + " so" * (i % 4)} for i in range(5)])
        (folder / "fn.py").write_text(algorithm.REWARDS)
        run_job(*job_of(root, name, "one"))
    dist.destroy_process_group()
    return root


def job_of(root, name, out, *more):
    algorithm, flags = RUNS[name]
    flags = [root / name / "adapter" if flag == "adapter" else flag for flag in flags]
    return algorithm.arguments(root / name, out, *flags, *more)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(world, layout):
    """Catches adapters that reach the sampler of one rank alone, or only in part; adapters of the reference or critic
    that are sharded or summed differently from the policy's; and, on two ranks, state that a checkpoint lacks: resumed
    from its first step, the run ends bitwise equal."""
    ranks, tp_size, names, more = LAYOUTS[layout]
    out, more = layout.replace(" ", "-"), ["--tensor_parallel_size", tp_size, *more]
    jobs = [job_of(world, name, out, *more) for name in names]
    if layout == "dp 2":
        jobs.append(["rewind", world / "grpo" / out, world / "grpo/resumed", 1])
        jobs.append(job_of(world, "grpo", "resumed", *more, "--resume"))
    launch(ranks, jobs)
    found = {name: RUNS[name][0].compare(world / name, out) for name in names}
    assert max(found.values()) < 1e-4, found
    if layout == "dp 2":
        weights, wanted = (load_file(world / "grpo" / folder / ADAPTER) for folder in ("resumed", out))
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
