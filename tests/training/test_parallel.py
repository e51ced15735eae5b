"""Training on several ranks against one process: losses, norms, every gradient and the weights, on gloo."""

import json
import random
import re
import shutil
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from models.checkpoint import model_folder
from models.shared import hold
from tests import tiny
from tests.damage import flip
from tests.forked import Forked
from tests.ranks import launch, start_nodes
from tests.ranks_worker import run_job

LAYOUTS = {"dp 2": (2, 1), "tp 2": (2, 2), "dp 2 x tp 2": (4, 2)}  # name: (ranks, tensor_parallel_size)
TIED = {**tiny.QWEN3, "tie_word_embeddings": True, "num_key_value_heads": 4, "rope_parameters": tiny.YARN}
BIASED = {"attention_bias": True, "mlp_bias": True, "vocab_size": tiny.VOCAB_SIZE + 1}  # GQA; not divisible by 2
BIASED |= {"num_hidden_layers": 1}
STEPS = 2  # they see all records, the second with the weights and moments of the first
SAMPLES = ["--eval_steps", "1", "--num_eval_samples", "3", "--eval_max_new_tokens", "8"]
FLAGS = {
    "plain": ["--micro_batch_size", "1"],
    "recompute": ["--activation_checkpointing", "full"],
    "sequence parallel": [
        *["--sequence_parallel", "--activation_checkpointing", "selective", "--micro_batch_size", "2"],
        *SAMPLES,
    ],
    "packed": ["--pack", "--batch_size", "2"],
    "compiled": ["--compile", "--micro_batch_size", "1", "--activation_checkpointing", "full"],
    "one reduction": ["--max_tokens_per_micro_batch", "40", "--no-sync_every_micro_batch"],
}
BOTH = ("plain", "sequence parallel")  # run with both models; the rest with one
HYBRID = {  # on 4 ranks: 2 replicas, each sharded over 2 ranks or none
    "hybrid": ["--dp_replicate", "2", "--micro_batch_size", "1", "--save_steps", "1"],
    "hybrid, one reduction": ["--dp_replicate", "2", "--micro_batch_size", "1", "--no-sync_every_micro_batch"],
    "hybrid x tp 2": ["--dp_replicate", "2", "--tensor_parallel_size", "2", *FLAGS["sequence parallel"]],
}
REWARDS = {  # --loss: flags of train_rm.py; 13 records in batches of 8 leave one rank an empty micro-batch
    "pairwise": ["--center_coef", "0.1"],
    "pointwise": ["--activation_checkpointing", "full"],
    "process": ["--sequence_parallel"],
}
SIZES = {1: ["--micro_batch_size", "1"], 2: ["--micro_batch_size", "3"], 4: ["--max_tokens_per_micro_batch", "30"]}


def arguments(folder, train_file, out, *more) -> list[str]:
    flags = ["--checkpoint_path", folder, "--train_file", train_file, "--output_dir", out, "--batch_size", 8]
    flags += ["--max_steps", STEPS, "--learning_rate", 1e-2, "--max_seq_len", 40, "--overlong", "truncate"]
    flags += ["--adam_eps", 1e-3]  # AdamW's first steps are signs of gradients: noise in near-zero ones must stay small
    flags += [] if "--compile" in more else ["--eval_file", train_file]  # an evaluation would be traced as well
    flags += [] if "--save_steps" in more else ["--save_steps", 0]
    flags += [] if "--num_eval_samples" in more else ["--num_eval_samples", 0]
    return list(map(str, [*flags, *more]))


def sft_job(*args: object) -> list[str]:
    return ["training.finetune_sft", *arguments(*args)]


def reward_job(root, loss, out, ranks, *more) -> list[str]:
    folder = root / ("tied" if loss == "process" else "biased")
    flags = ["--loss", loss, *REWARDS[loss], *SIZES[ranks], *more]
    return ["training.train_rm", *arguments(folder, root / f"{loss}.jsonl", out, *flags)]


def judged_records(loss):
    """Returns ragged records for train_rm.py."""
    records = []
    for i in range(13):
        prompt, good, bad = f"{i} plus" + " so" * (i % 5), f" {i} is" + " it" * (i % 4), " or" * (i % 6)
        if loss == "pairwise":
            records.append({"prompt": prompt, "chosen": good, "rejected": bad, "margin": i % 3})
        elif loss == "pointwise":
            records.append({"prompt": prompt, "completion": good, "label": (i % 4) / 3})
        else:
            labels = [i % 2, 1, 0][: 1 + i % 3]
            records.append({"prompt": prompt + "\n", "completions": [good.strip()] * len(labels), "labels": labels})
    return records


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Writes three models and ragged records (one without targets), and trains on them in one process."""
    root = tmp_path_factory.mktemp("parallel")
    records = [{"prompt": f"{i} plus" + " so" * (i % 5), "completion": f" {i} is" + " it" * (i % 4)} for i in range(13)]
    records.insert(3, {"prompt": "very long " * 30, "completion": " never seen"})
    train_file = tiny.write_records(root / "train.jsonl", records)
    models = {"tied": TIED, "biased": BIASED, "qwen2": tiny.QWEN2}
    for name, config in models.items():
        tiny.write_model(root / name, **config)
    jobs = [sft_job(root / name, train_file, root / f"one-{name}", *SAMPLES) for name in models]
    jobs.append(sft_job(root / "biased", train_file, root / "one-packed", *FLAGS["packed"]))
    for loss in REWARDS:
        tiny.write_records(root / f"{loss}.jsonl", judged_records(loss))
        jobs.append(reward_job(root, loss, root / f"one-{loss}", 1))
    for job in jobs:
        run_job(*job)
    dist.destroy_process_group()
    return root, train_file


def compare(root, name: str, out: str) -> float:
    """Returns the largest relative difference from one process in losses, norms, gradients and weights."""
    worst = 0.0
    lines, wanted = (tiny.read_lines(root / d / "metrics.jsonl") for d in (out, f"one-{name}"))
    assert len(lines) == len(wanted) == STEPS
    for line, want in zip(lines, wanted):
        for key in {"loss", "grad_norm", "eval_loss"} & line.keys() & want.keys():
            worst = max(worst, abs(line[key] - want[key]) / want[key])
        for key in line.keys() & want.keys() - {"tokens_per_second"}:  # a mean reward may be close to 0
            worst = max(worst, abs(line[key] - want[key]) / max(1, abs(want[key])))
        assert line["num_tokens"] == want["num_tokens"]
    folders = [model_folder(root / d) for d in (out, f"one-{name}")]
    config, wanted = (json.loads((folder / "config.json").read_text()) for folder in folders)
    for key in ("reward_mean", "reward_std"):
        worst = max(worst, abs(config.get(key, 0) - wanted.get(key, 0)))
    gradients, wanted = (torch.load(root / f"{d}.gradients.pt") for d in (out, f"one-{name}"))
    for step, want in zip(gradients, wanted):
        assert step.keys() == want.keys()
        total = torch.stack([g.norm() for g in want.values()]).norm()
        for key in want:  # relative to its own norm; but the gradient of a key's bias is 0 in theory, only rounding
            scale = max(want[key].norm().item(), 1e-3 * total.item())
            worst = max(worst, (step[key] - want[key]).norm().item() / scale)
    weights, wanted = (load_file(folder / "model.safetensors") for folder in folders)
    for key, want in wanted.items():
        worst = max(worst, ((weights[key] - want).norm() / want.norm()).item())
    return worst


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(world, layout):
    """Catches a collective that is missing or doubled, a shard read or written in the wrong place, a mean over
    micro-batches or ranks instead of tokens, a rank that repeats or skips rows, evaluation samples drawn with a part of
    the weights or with earlier ones, a scalar head that differs between ranks, a metric with the rewards of one rank
    alone, and a recomputation that repeats all-reduces."""
    root, train_file = world
    ranks, tp_size = LAYOUTS[layout]
    jobs, outs = [], []
    for name in ("tied", "biased"):
        for kind, flags in FLAGS.items():
            if kind == "compiled" and layout != "tp 2":
                continue  # only tp puts collectives into a compiled block
            if (kind == "sequence parallel" and tp_size == 1) or (kind not in BOTH and name == "tied"):
                continue
            if ranks == 4 and kind != {"tied": "sequence parallel", "biased": "plain"}[name]:
                continue  # the rest runs where one dimension of the mesh is 1
            outs.append((name, kind, f"{ranks}-{tp_size}-{name}-{kind.replace(' ', '-')}"))
            more = [*flags, "--tensor_parallel_size", tp_size]
            more += SAMPLES if (name, kind) == ("biased", "plain") and ranks == 2 else []
            job = sft_job(root / name, train_file, root / outs[-1][2], *more)
            jobs.append(["traced", *job] if kind == "compiled" else job)
    for kind, flags in HYBRID.items() if ranks == 4 else ():
        outs.append(("biased", kind, kind.replace(" ", "-")))
        jobs.append(sft_job(root / "biased", train_file, root / outs[-1][2], *flags))
    if layout == "tp 2":
        outs.append(("qwen2", "plain", "tp-2-qwen2"))
        more = [*FLAGS["plain"], "--tensor_parallel_size", tp_size]
        jobs.append(sft_job(root / "qwen2", train_file, root / outs[-1][2], *more))
    for loss in REWARDS if ranks == 2 else ("pairwise",):
        outs.append((loss, loss, f"{ranks}-{tp_size}-{loss}"))
        jobs.append(reward_job(root, loss, root / outs[-1][2], ranks, "--tensor_parallel_size", tp_size))
    if layout == "tp 2":
        jobs.append(["recomputing", root / "biased"])
    launch(ranks, jobs)
    found = {(n, kind): compare(root, "packed" if kind == "packed" else n, out) for n, kind, out in outs}
    # the process model's third gradient amplifies rounding: on 2 x 2 padded and packed rows alike (1.5e-5, 1.3e-5)
    limits = {pair: 2e-5 if pair[0] == "process" else 1e-5 for pair in found}
    assert all(found[pair] < limit for pair, limit in limits.items()), found
    for (name, kind, out), job in zip(outs, jobs):
        if "--eval_steps" in job:
            samples, wanted = (tiny.read_lines(root / d / "samples.jsonl") for d in (out, f"one-{name}"))
            assert [sample["step"] for sample in samples] == [1, 1, 1, 2, 2, 2] and samples == wanted, (name, kind)
    if ranks == 4:  # one process resumes from the hybrid run's checkpoint, which a thread wrote
        shutil.rmtree(root / "hybrid/checkpoints/step-000002")
        job = arguments(root / "biased", train_file, root / "hybrid", "--resume")
        result = tiny.run("training/finetune_sft.py", *job)
        assert result.code == 0 and "resuming after step 1" in result.stdout, result.stderr
        assert compare(root, "biased", "hybrid") < 1e-5


FAULTS = {  # name: (model, layout, flags); as few micro-batches as show it
    "norm gradient not summed": ("biased", "tp 2", ["--sequence_parallel"]),
    "gradient of the heads' norm not summed": ("tied", "tp 2", []),
    "bias added by every rank": ("biased", "tp 2", []),
    "mean of micro-batches": ("biased", "dp 2", FLAGS["plain"]),
    "dp factor missing": ("biased", "dp 2", []),
    "input gradient not summed": ("biased", "tp 2", []),
    "padding row learnt twice": ("biased", "dp 2", FLAGS["plain"]),
    "replicas not averaged": ("biased", "dp 2", ["--dp_replicate", "2"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(world, fault):
    """Catches a comparison too weak to see the mistakes it is made for."""
    root, train_file = world
    name, layout, flags = FAULTS[fault]
    ranks, tp_size = LAYOUTS[layout]
    out = root / fault.replace(" ", "-")
    job = sft_job(root / name, train_file, out, *flags, "--tensor_parallel_size", tp_size)
    launch(ranks, [job], fault)
    assert compare(root, name, out.name) > 1e-3


def wait_until(condition, run: Forked) -> None:
    while not condition():
        assert run.poll() is None, run.read("stderr")[-3000:]
        time.sleep(0.002)


def test_nodes_that_share_no_disk(world, tmp_path):
    """Catches two nodes that each save their half of the checkpoints on a disk of their own, and then hang at a resume:
    all ranks must refuse this at the start, in one line, and leave nothing behind."""
    root, train_file = world
    printed = launch(2, [["refused", "elsewhere", tmp_path, *sft_job(root / "tied", train_file, "out")]])
    refused = "^refused: --output_dir out: rank 1 on .* does not see what rank 0 on .* all nodes share"
    assert len(re.findall(refused, printed, re.MULTILINE)) == 2, printed
    assert not list(tmp_path.glob("*/*"))


def test_kill_a_node_and_resume(world):
    """Catches an optimizer shard lost or misplaced, a batch repeated or skipped, a half checkpoint taken for whole, a
    node that stays, or keeps its lock, after another one has died; ranks that disagree on where a signal stops them, on
    a refusal that concerns one of them, or on which checkpoint is sound if one of them finds damage; and a checkpoint
    that only the ranks that wrote it can read."""
    root, train_file = world
    flags = ["--max_steps", 9, "--save_steps", 3, "--save_total_limit", 3]
    launch(2, [sft_job(root / "tied", train_file, root / "whole", *flags)])
    out = root / "killed"
    nodes = start_nodes(
        [root, root], "training/finetune_sft.py", *arguments(root / "tied", train_file, "killed", *flags)
    )
    wait_until(lambda: list(out.glob("checkpoints/step-0000*")), nodes[0])
    wait_until(lambda: list(out.glob("checkpoints/.step-*.partial")), nodes[0])  # a checkpoint is being written
    time.sleep(random.random() / 20)
    nodes[0].kill()
    for node in nodes:
        node.communicate(timeout=240)
    last = nodes[1].read("stderr").splitlines()[-1]  # no traceback of the lost connection
    assert nodes[1].returncode == 2 and "[rank 1] error: another rank has ended or cannot be reached" in last
    assert not (out / "config.json").exists()
    shutil.copytree(out, root / "elsewhere")

    resumed = sft_job(root / "tied", train_file, out, *flags, "--resume")
    other = tiny.write_records(root / "other.jsonl", [{"prompt": "a", "completion": "b"}, *tiny.read_lines(train_file)])
    lock = hold(out / ".lock", "the test")
    printed = launch(2, [["refused", *resumed], ["refused", *resumed, "--train_file", other]])
    assert printed.count("refused: --output_dir") == printed.count("another run is writing there (process") == 2
    assert printed.count(f"refused: --resume {out}: --train_file: other content than the run was begun with") == 2
    lock.close()

    printed = launch(2, [["stopped", 1, 2, *resumed]])  # a signal to one rank stops all
    step = len(tiny.read_lines(out / "metrics.jsonl"))
    assert f"stopped by a signal after step {step};" in printed and 3 < step < 9
    assert not (out / "config.json").exists() and (out / f"checkpoints/step-{step:06d}").exists()

    launch(2, [resumed])
    wanted, weights = (load_file(d / "model.safetensors") for d in (root / "whole", out))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)

    flip(out / "checkpoints/step-000009/__1_0.distcp")
    printed = launch(2, [resumed])
    assert "step-000009: broken, trying the one before (__1_0.distcp is damaged" in printed
    assert printed.count("resuming after step 6") == 1
    weights = load_file(out / "model.safetensors")
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert [line["step"] for line in tiny.read_lines(out / "metrics.jsonl")] == list(range(1, 10))

    # the same run goes on in one process
    args = arguments(root / "tied", train_file, root / "elsewhere", *flags, "--resume")
    result = tiny.run("training/finetune_sft.py", *args)
    assert result.code == 0 and "resuming after step" in result.stdout, result.stderr
    resumed = load_file(root / "elsewhere" / "model.safetensors")
    for name in wanted:
        assert (resumed[name] - wanted[name]).norm() / wanted[name].norm() < 1e-4, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_offload(world):
    """Catches weights or gradients left on the wrong device, a norm or an export that cannot reach them, and a step
    taken before the gradients have arrived."""
    root, train_file = world
    outs = [root / "on-gpu", root / "offloaded"]
    for out, flag in zip(outs, ("--no-cpu_offload", "--cpu_offload")):
        more = ["--dtype", "float32", "--no-compile", "--device", "cuda", "--micro_batch_size", 2, "--save_steps", 2]
        result = tiny.run("training/finetune_sft.py", *arguments(root / "tied", train_file, out, *more, flag))
        assert result.code == 0, result.stderr
    wanted, offloaded = (load_file(out / "model.safetensors") for out in outs)
    for name in wanted:
        assert (offloaded[name] - wanted[name]).norm() / wanted[name].norm() < 1e-5, name


LEAN = {  # name: (folder, flags)
    "bf16 8-bit": ("biased", ["--param_dtype", "bfloat16", "--optim", "adamw_8bit"]),
    "8-bit": ("tied", ["--optim", "adamw_8bit"]),
}


def test_lean_optimizers_on_four_ranks(world):
    """Catches rounding noise or block scales that depend on the layout, replicas that drift apart, and a moment, a
    scale or a step count lost or converted in a checkpoint that is resumed on the same layout or on another."""
    root, train_file = world
    jobs = []
    for name, (folder, flags) in LEAN.items():
        more = [*flags, "--save_steps", 1]
        out = root / f"lean-{name}"
        run = arguments(root / folder, train_file, f"{out}-one", *more)
        assert tiny.run("training/finetune_sft.py", *run).code == 0
        more += ["--tensor_parallel_size", 2]
        jobs.append(sft_job(root / folder, train_file, f"{out}-four", *more))
        for copy in ("again", "alone"):
            jobs.append(["rewind", f"{out}-four", f"{out}-{copy}", "1"])
        jobs.append(sft_job(root / folder, train_file, f"{out}-again", *more, "--resume"))
    launch(4, jobs)
    for name, (folder, flags) in LEAN.items():
        out = root / f"lean-{name}"
        run = arguments(root / folder, train_file, f"{out}-alone", *flags, "--save_steps", 1, "--resume")
        result = tiny.run("training/finetune_sft.py", *run)
        assert result.code == 0 and "resuming after step 1" in result.stdout, result.stderr
        one, four, again, alone = (load_file(f"{out}-{r}/model.safetensors") for r in ("one", "four", "again", "alone"))
        assert len(torch.load(f"{out}-again.gradients.pt")) == 1  # it resumed after step 1
        for key, want in four.items():
            assert torch.equal(again[key], want), (name, key)
            for other in (one, alone):
                differ, error = (other[key] != want).sum(), (other[key] - want).norm() / want.norm()
                # gradients agree to 1e-6; where one is rounded to another bf16 number (when reduced or scaled), or a
                # weight or a moment is that close to where its rounding changes, the results are neighbours: a few
                # elements, one ulp each
                few = differ < 5 + 0.02 * want.numel() and error < 2e-3
                assert few if "bf16" in name else error < 3e-5, (name, key, differ, error)
