"""LoRA on several ranks against one process: losses, every gradient of adapters and heads, the adapters and the merged
weights, on gloo."""

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from tests import tiny
from tests.ranks import launch
from tests.ranks_worker import run_job
from tests.training.test_parallel import BIASED, LAYOUTS, TIED, arguments, compare

LORA = ["--lora_r", "3", "--lora_dropout", "0.2"]
RUNS = {  # name: (script, model, flags)
    "biased": ("finetune_sft", "biased", LORA),
    "int4": ("finetune_sft", "tied", ["--lora_r", "4", "--quantize_base", "int4", "--use_rslora"]),
    "dpo": (
        "train_dpo",
        "tied",
        ["--lora_r", "2", "--lora_target_modules", "q_proj", "down_proj", "--no-precompute_ref"],
    ),
    "rm": ("train_rm", "biased", LORA),
}
MORE = {  # layout: more flags of each run
    "dp 2": {"biased": ["--max_tokens_per_micro_batch", "40"], "int4": ["--micro_batch_size", "1"], "rm": []},
    "tp 2": {
        "biased": ["--sequence_parallel", "--activation_checkpointing", "full"],
        "int4": ["--micro_batch_size", "3"],
        "dpo": ["--sequence_parallel", "--activation_checkpointing", "selective"],
        "rm": [],
    },
    "dp 2 x tp 2": {"biased": ["--micro_batch_size", "1", "--save_steps", "1"], "int4": [], "dpo": []},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Writes two models, ragged records and pairs, and trains in one process."""
    root = tmp_path_factory.mktemp("parallel-lora")
    records = [{"prompt": f"{i} plus" + " so" * (i % 5), "completion": f" {i} is" + " it" * (i % 4)} for i in range(13)]
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": " or" * (i % 6)} for i, r in enumerate(records)
    ]
    for name, content in (("finetune_sft", records), ("train_dpo", pairs), ("train_rm", pairs)):
        tiny.write_records(root / f"{name}.jsonl", content)
    tiny.write_model(root / "biased", **BIASED)
    tiny.write_model(root / "tied", **{**TIED, "num_hidden_layers": 1, "intermediate_size": 128, "head_dim": 32})
    for name in RUNS:
        run_job(*job_of(root, name, f"one-{name}"))
    dist.destroy_process_group()
    return root


def job_of(root, name, out, *more):
    script, model, flags = RUNS[name]
    return [f"training.{script}", *arguments(root / model, root / f"{script}.jsonl", root / out, *flags, *more)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(world, layout):
    """Catches a factor sharded as the other one is, a gradient of an unsharded factor that is one rank's part, an
    update that is counted once per rank, dropout that depends on the layout, and a base quantised on another grid."""
    ranks, tp_size = LAYOUTS[layout]
    outs = {name: f"{layout.replace(' ', '-')}-{name}" for name in MORE[layout]}
    more = ["--tensor_parallel_size", tp_size]
    launch(ranks, [job_of(world, name, outs[name], *MORE[layout][name], *more) for name in outs])
    found = {name: compare(world, name, outs[name]) for name in outs}
    for name in outs:
        places = [world / out / "adapter_model.safetensors" for out in (outs[name], f"one-{name}")]
        adapters, wanted = map(load_file, places)
        assert adapters.keys() == wanted.keys()
        found |= {(name, key): ((adapters[key] - want).norm() / want.norm()).item() for key, want in wanted.items()}
    assert max(found.values()) < 1e-5, {key: value for key, value in found.items() if value >= 1e-5}
    if ranks == 4:  # one process resumes
        (world / outs["biased"] / "checkpoints/step-000002/.metadata").unlink()
        result = tiny.run("training/finetune_sft.py", *job_of(world, "biased", outs["biased"], "--resume")[1:])
        assert result.code == 0 and "resuming after step 1" in result.stdout, result.stderr
        assert compare(world, "biased", outs["biased"]) < 1e-5


@pytest.mark.parametrize("fault", ["adapter's gradient not summed", "update counted by every rank"])
def test_planted_faults_show(world, fault):
    """Catches a comparison too weak to see the mistakes it is made for."""
    out = fault.replace(" ", "-")
    launch(2, [job_of(world, "biased", out, "--tensor_parallel_size", 2)], fault)
    assert compare(world, "biased", out) > 1e-3
