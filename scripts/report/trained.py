"""Sections `sft` and `rl` of scripts/gpu_report.py, and the training part of `right`: runs the project's scripts, each
in its own process."""

import json
import math
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from inference.lines import write_lines
from models.common import Runtime
from models.config import ModelConfig
from scripts.benchmark_common import SIZES
from scripts.benchmark_ppo import text_of, write_policy, write_reward_model
from scripts.report.record import (
    Item,
    Section,
    TimeIsUp,
    finish_script,
    largest,
    last_json,
    run_script,
    start_script,
)
from scripts.workload import random_ids

SHORT = SIZES["tiny"]
REWARD = (
    "def score(prompts, completions, examples):\n    return [sum(map(ord, text)) % 7 / 7 for text in completions]\n"
)
UNEQUAL = ("time/", "tokens_per_second", "mfu", "memory")  # metrics of speed and memory, not compared
STEPS = ("rollout", "score", "logprobs", "update", "refresh")  # phases of an update


def start_together(commands: dict[str, tuple[str, list]]) -> dict[str, subprocess.Popen]:
    """Starts scripts that run at the same time."""
    return {name: start_script(script, *flags) for name, (script, flags) in commands.items()}


def finish_together(
    processes: dict[str, subprocess.Popen], commands: dict[str, tuple[str, list]], seconds: float
) -> None:
    """Waits for all scripts. The first that fails raises RuntimeError and ends the others."""
    end = time.time() + seconds
    try:
        for name, process in processes.items():
            finish_script(process, commands[name][0], end - time.time())
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
                process.communicate()


def write_work(root: Path, config: ModelConfig, runtime: Runtime, num_prompts: int, prompt_len: int) -> None:
    """Writes a policy and a reward model with random weights, prompts, records to fine-tune on, a reward function."""
    write_policy(root / "policy", config, runtime)
    write_reward_model(root / "reward", config, runtime, root / "policy")
    texts = [text_of(row) for row in (random_ids(config.vocab_size, 2, num_prompts, prompt_len)).flatten(0, 1).tolist()]
    prompts, answers = texts[:num_prompts], texts[num_prompts:]
    write_lines(root / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    records = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(prompts, answers)]
    write_lines(root / "records.jsonl", records)
    (root / "reward.py").write_text(REWARD)


def training_commands(root: Path, device: torch.device, out: Path) -> dict[str, tuple[str, list]]:
    """Returns the commands of an SFT step, a PPO update and a GRPO update in fp32, each with its own folder in out."""
    plain = ["--checkpoint_path", root / "policy", "--device", device, "--dtype", "float32", "--no-compile"]
    plain += ["--learning_rate", 1e-3, "--export_dtype", "float32", "--lr_schedule", "constant", "--warmup_ratio", 0]
    rollouts = [*plain, "--prompt_file", root / "prompts.jsonl", "--total_steps", 1, "--rollout_batch_size", 8]
    rollouts += ["--max_new_tokens", 8]
    flags = {
        "SFT step": ["finetune_sft", *plain, "--train_file", root / "records.jsonl", "--max_steps", 1],
        "PPO update": ["train_ppo", *rollouts, "--reward_checkpoint_path", root / "reward"],
        "GRPO update": ["train_grpo", *rollouts, "--reward_fn", f"{root / 'reward.py'}:score", "--num_generations", 4],
    }
    flags["SFT step"] += ["--batch_size", 8, "--micro_batch_size", 2]
    return {
        name: (f"training/{script}.py", [*rest, "--output_dir", out / script])
        for name, (script, *rest) in flags.items()
    }


def start_training(section: Section) -> None:
    """Starts an SFT step, a PPO update and a GRPO update in fp32, on this device and on the CPU."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    torch.manual_seed(5)
    write_work(root, SHORT, Runtime(torch.device("cpu"), torch.float32, False), 8, 12)
    on_cpu = training_commands(root, torch.device("cpu"), root / "cpu")
    here = training_commands(root, section.runtime.device, root / "here")
    both = {**{f"{name}, CPU": c for name, c in on_cpu.items()}, **{f"{name}, here": c for name, c in here.items()}}
    section.kept["training"] = folder, on_cpu, here, both, start_together(both)


def check_training(section: Section) -> None:
    """Compares the results of start_training on this device and on the CPU."""
    folder, on_cpu, here, both, processes = section.kept.pop("training")
    with folder as root:
        finish_together(processes, both, section.left())
        for name in on_cpu:
            theirs, ours = (commands[name][1][-1] for commands in (on_cpu, here))
            section.check(f"{name}, metrics", metrics_distance(ours, theirs), 0.01, "against the CPU, fp32, relative")
            moved = weights_distance(ours, theirs, Path(root) / "policy")
            section.check(f"{name}, weights", moved, 0.02, "difference of the weights, relative to their change")


def metrics_distance(ours: Path, theirs: Path) -> float:
    """Returns the largest relative difference among the metrics of the last step."""
    last = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in (ours, theirs)]
    a, b = ({k: v for k, v in each.items() if not any(word in k for word in UNEQUAL)} for each in last)
    if a.keys() != b.keys():
        return math.inf
    numbers = [(float(a[k]), float(b[k])) for k in a if isinstance(a[k], int | float) and math.isfinite(b[k])]
    return largest(abs(x - y) / (abs(y) + 1e-3) for x, y in numbers)


def weights_distance(ours: Path, theirs: Path, begun: Path) -> float:
    a, b, start = (
        {
            name: tensor.float()
            for file in sorted(folder.glob("model*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for folder in (ours, theirs, begun)
    )
    apart = sum((a[name] - b[name]).pow(2).sum().item() for name in b)
    moved = sum((start[name] - b[name]).pow(2).sum().item() for name in b)
    return math.sqrt(apart / moved) if moved else math.inf


# --------------------------------------------------------------------------------------------- sft


def sft_of(preset: str, batch_size: int, seq_len: int, goal: float | None):
    """Returns an item that measures SFT. Recomputes whole blocks only if memory runs out otherwise."""

    def run(section: Section) -> None:
        shape = ("tiny", 1, 64) if section.small else (preset, batch_size, seq_len)
        for recompute in ("selective", "full"):
            try:
                found = benchmark_sft(section, *shape, recompute)
                break
            except RuntimeError as error:
                if "out of GPU memory" not in str(error) or recompute == "full":
                    raise
        detail = (
            f"{found['tokens_per_second']:,.0f} tok/s, {found['peak_memory'] / 1e9:.1f} GB, {shape[1]} x {shape[2]} "
        )
        detail += f"packed tokens, bf16 weights, adamw_8bit, recompute {recompute}"
        numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
        section.figure(f"SFT {shape[0]}, MFU", found["mfu"], "of the product", goal, detail, numbers=numbers)

    return run


def benchmark_sft(section: Section, preset: str, batch_size: int, seq_len: int, recompute: str, *more: object) -> dict:
    """Runs scripts/benchmark.py on packed rows with bf16 weights and 8-bit moments, and returns its figures."""
    flags = ["sft", "--preset", preset, "--batch_size", batch_size, "--seq_len", seq_len, "--documents", 8]
    flags += ["--param_dtype", "bfloat16", "--optim", "adamw_8bit", "--activation_checkpointing", recompute]
    flags += ["--device", section.runtime.device, *more]
    return last_json(run_script("scripts/benchmark.py", *flags, seconds=section.left()))


# ---------------------------------------------------------------------------------------------- rl


def update_of(script: str, title: str):
    """Returns an item that measures the second of two updates: its time, and that of each phase."""

    def run(section: Section) -> None:
        config = SHORT if section.small else SIZES["1b"]
        answers, together, prompt_len, new = (4, 4, 8, 8) if section.small else (64, 32, 128, 256)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_work(root, config, section.runtime, answers, prompt_len)
            flags = ["--checkpoint_path", root / "policy", "--prompt_file", root / "prompts.jsonl", "--total_steps", 2]
            flags += ["--rollout_batch_size", answers, "--max_new_tokens", new, "--micro_batch_size", together]
            flags += ["--param_dtype", "bfloat16", "--optim", "adamw_8bit", "--output_dir", root / "out"]
            flags += ["--device", section.runtime.device, "--save_steps", 0]
            if script == "train_ppo":
                flags += ["--reward_checkpoint_path", root / "reward"]
            else:
                flags += ["--reward_fn", f"{root / 'reward.py'}:score", "--num_generations", 4]
            measured = root / "out" / "metrics.jsonl"
            try:
                run_script(f"training/{script}.py", *flags, seconds=section.left())
            except TimeIsUp:  # fine once the second update is logged, say while the model is being written
                if not measured.exists() or len(measured.read_text().splitlines()) < 2:
                    raise
            metrics = json.loads(measured.read_text().splitlines()[-1])
        seconds = {name: metrics[f"time/{name}"] for name in STEPS}
        whole = sum(seconds.values())
        split = ", ".join(f"{name} {value:.2f} s ({value / whole:.0%})" for name, value in seconds.items())
        work = f"{answers} answers of {new} tokens to prompts of {prompt_len}, {together} of them a forward, "
        work += "bf16 weights, adamw_8bit"
        name = f"{title} {'tiny' if section.small else '1B'} update"
        section.figure(name, whole, "s, all", None, f"{split}; {work}", seconds=seconds)

    return run


SFT_ITEMS = [Item("SFT 8B", 40, sft_of("8b", 1, 4096, 0.4)), Item("SFT 1B", 30, sft_of("1b", 4, 4096, None))]
RL_ITEMS = [Item("GRPO", 40, update_of("train_grpo", "GRPO")), Item("PPO", 75, update_of("train_ppo", "PPO"))]
