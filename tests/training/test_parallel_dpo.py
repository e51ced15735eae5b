"""training/train_dpo.py on four ranks against one process: metrics, every gradient and the weights, on gloo."""

import pytest
import torch.distributed as dist

from tests import tiny
from tests.ranks import launch
from tests.ranks_worker import run_job
from tests.training.test_parallel import BIASED, TIED, arguments, compare

# 13 pairs in batches of 8: in the last one some ranks have no pair, but still join the forward pass's collectives
RUNS = {  # name: (model, flags)
    "dp 4": ("biased", ["--micro_batch_size", "1"]),
    "dp 2 x tp 2": ("tied", ["--tensor_parallel_size", "2", "--max_tokens_per_micro_batch", "40", "--save_steps", "1"]),
    "tp 4, in each step": ("tied", ["--tensor_parallel_size", "4", "--sequence_parallel", "--no-precompute_ref"]),
    "hybrid, recomputed": (
        "biased",
        ["--dp_replicate", "2", "--activation_checkpointing", "full", "--no-sync_every_micro_batch"],
    ),
}


@pytest.fixture
def world(tmp_path):
    """Writes pairs, a model that is its own reference and one that has another, and trains both in one process."""
    records = [
        {
            "prompt": f"{i} plus" + " so" * (i % 5),
            "chosen": f" {i} is" + " it" * (i % 4),
            "rejected": " or" * (i * 5 % 7),
        }
        for i in range(13)
    ]
    train_file = tiny.write_records(tmp_path / "train.jsonl", records)
    for seed, (name, config) in enumerate((("tied", TIED), ("biased", BIASED), ("reference", BIASED))):
        tiny.write_model(tmp_path / name, seed=seed, **{**config, "num_hidden_layers": 1})

    def flags(name, out, *more):
        other = ["--ref_checkpoint_path", tmp_path / "reference"] if name == "biased" else []
        return arguments(tmp_path / name, train_file, tmp_path / out, "--loss", "rpo", *other, *more)

    for name in ("tied", "biased"):
        run_job("training.train_dpo", *flags(name, f"one-{name}", "--micro_batch_size", "5"))
    dist.destroy_process_group()
    return tmp_path, flags


def test_layouts_agree(world):
    """Catches a reference's log-prob that stays on one rank or goes to another pair, a metric of one rank alone or
    counted once per tp rank, a mean over micro-batches or ranks instead of pairs, and a rank without a pair that leaves
    the others waiting."""
    root, flags = world
    jobs = [["training.train_dpo", *flags(name, run.replace(" ", "-"), *more)] for run, (name, more) in RUNS.items()]
    launch(4, jobs)
    found = {run: compare(root, name, run.replace(" ", "-")) for run, (name, _) in RUNS.items()}
    assert max(found.values()) < 1e-5, found
    for run, (name, _) in RUNS.items():
        lines, wanted = (tiny.read_lines(root / d / "metrics.jsonl") for d in (run.replace(" ", "-"), f"one-{name}"))
        for line, want in zip(lines, wanted, strict=True):
            assert line.keys() == want.keys()
            for key in line.keys() - {"tokens_per_second"}:
                assert line[key] == pytest.approx(want[key], rel=1e-5, abs=1e-5), (run, key)
    # one process resumes from what four have computed and saved
    (root / "dp-2-x-tp-2/checkpoints/step-000002/.metadata").unlink()
    result = tiny.run("training/train_dpo.py", *flags("tied", "dp-2-x-tp-2", "--resume"))
    assert result.code == 0 and "resuming after step 1" in result.stdout, result.stderr
    assert result.stdout.count("log-probs of the reference read, a batch of ") == 2  # training and evaluation
    assert compare(root, "tied", "dp-2-x-tp-2") < 1e-5
