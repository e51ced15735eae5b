"""Speed beside the physical limit, with random weights.

- the ceilings (a matrix product, a copy) are measured in the same run, so MFU and MBU mean something on any machine
- generate: tokens/s, time to the first token and MBU of the engine, for a batch size, a sweep of them, or ragged work
  in few slots; in any precision, over tensor-parallel ranks. sft, dpo: tokens/s of whole optimizer steps
- ppo: the split of an update of training/train_ppo.py, its rollouts beside the engine alone, its memory on paper
- memory: what a training run needs on each rank, on paper for any layout, and with --measure held against this machine
- --compare runs the peer (transformers; dpo: TRL's DPOTrainer) on the same shape in alternating processes and prints
  the ratios; one process's timing alone says little on a shared machine
- the last line is JSON; each job has its file beside this one

    python scripts/benchmark.py generate --preset 134m --dtype bfloat16 --batch_size 8 --prompt_len 64 --new_tokens 128
    python scripts/benchmark.py sft --preset 134m --dtype bfloat16 --batch_size 4 --seq_len 512
    python scripts/benchmark.py dpo --preset 134m --dtype bfloat16 --batch_size 4 --prompt_len 128 --new_tokens 128
    python scripts/benchmark.py ppo --preset 134m --dtype bfloat16 --batch_size 16 --prompt_len 64 --new_tokens 64
    python scripts/benchmark.py memory --preset 7b --layouts 1x1 8x1 4x2
    python scripts/benchmark.py memory --preset 7b --quantize int4 --measure
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from models.qlinear import MODES
from scripts.benchmark_common import SIZES, ceilings
from scripts.benchmark_generate import generate_setting, measure_generate
from scripts.benchmark_memory import report_memory
from scripts.benchmark_peers import PEERS, peer
from scripts.benchmark_ppo import measure_ppo, ppo_setting, report_plan
from scripts.benchmark_training import dpo_setting, measure_dpo, measure_sft, sft_setting
from training.common import (
    ArgumentParser,
    add_quantize_arguments,
    add_runtime_arguments,
    card,
    choose_runtime,
    device_name,
    peak_memory,
    positive_int,
    run_script,
    say,
)

# job: (measure(config, runtime, repeats, options) -> its figures, setting(options) -> its title)
JOBS = {
    "generate": (measure_generate, generate_setting),
    "sft": (measure_sft, sft_setting),
    "dpo": (measure_dpo, dpo_setting),
    "ppo": (measure_ppo, ppo_setting),
}


def parser() -> ArgumentParser:
    parser = ArgumentParser("Speed beside the physical limit, with random weights.")
    add_runtime_arguments(parser)
    add = parser.add_argument
    add("job", choices=[*JOBS, "memory"], help="what to measure")
    add("--preset", choices=list(SIZES), default="134m", help="shape of the model")
    add(
        "--batch_size",
        type=positive_int,
        default=8,
        help="slots, rows of a step, its pairs or answers; memory: micro-batch",
    )
    add("--prompt_len", type=positive_int, default=64, help="generate, dpo, ppo: tokens of each prompt")
    add("--new_tokens", type=positive_int, default=128, help="generate, dpo, ppo: tokens of each completion")
    add("--sweep", type=positive_int, nargs="*", default=[], help="generate: batch sizes to measure in turn")
    add(
        "--ragged",
        type=positive_int,
        default=None,
        help="generate: so many prompts, lengths and ends around the flags'",
    )
    add("--tensor_parallel_size", type=positive_int, default=1, help="generate: ranks that share the model")
    add_quantize_arguments(parser)
    add(
        "--precisions",
        choices=["none", *MODES],
        nargs="+",
        default=[],
        help="generate: values of --quantize to measure in turns, with their speeds as ratios to the first's",
    )
    add("--seq_len", type=positive_int, default=512, help="sft, memory: tokens of each row")
    add("--activation_checkpointing", choices=["none", "full", "selective"], default="none", help="recompute in steps")
    add(
        "--precompute_ref",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="dpo: the reference's log-probs once before training, else in each step",
    )
    add("--repeats", type=positive_int, default=3, help="timed runs (generate) or steps, after one to warm up")
    add("--engine", choices=["ours", "peer"], default="ours", help="what to run; the peer is transformers, or trl")
    add("--reward_preset", choices=list(SIZES), default=None, help="ppo: shape of reward model and critic; --preset")
    add("--slots", type=positive_int, default=None, help="ppo: answers drawn at a time; --batch_size, up to 128")
    add("--micro_batch_size", type=positive_int, default=None, help="ppo: answers of a forward; --batch_size")
    add("--ppo_epochs", type=positive_int, default=1, help="ppo: passes over the answers of an update")
    add("--param_dtype", choices=["float32", "bfloat16"], default="float32", help="ppo: of the trained weights")
    add("--optim", choices=["adamw", "adamw_8bit"], default="adamw", help="ppo: the optimizer")
    add("--plan", action="store_true", help="ppo: print the memory on paper, and run nothing")
    add("--layouts", nargs="+", type=layout, default=None, help="memory, ppo --plan: dp x tp, as 1x1 8x1 4x2; one")
    add("--measure", action="store_true", help="memory: do it with random weights and print the measured bytes beside")
    add("--compare", type=positive_int, default=None, help="alternate ours and the peer so many times")
    add("--peer_python", type=Path, default=Path(sys.executable), help="--compare: interpreter that has the peer")
    return parser


def layout(text: str) -> tuple[int, int]:
    dp, _, tp = text.partition("x")
    return positive_int(dp), positive_int(tp)


def main(*, job: str, compare: int | None, engine: str, preset: str, repeats: int, seed: int, **options) -> None:
    if job not in PEERS and (compare or engine == "peer"):
        raise ValueError(f"{job} has no peer to compare with")
    if options["precisions"] and (compare or options["quantize"] != "none"):
        raise ValueError("--precisions: takes the place of --quantize, and of --compare")
    if compare:
        compare_engines(job, compare, options["peer_python"], options["sweep"])
        return
    if job == "memory":
        report_memory(preset, options)
        return
    if job == "ppo" and options["plan"]:
        report_plan(preset, options)
        return
    runtime = choose_runtime(options["device"], options["dtype"], options["compile"])
    config = SIZES[preset]
    torch.manual_seed(seed)
    flops, bandwidth = ceilings(runtime.device)
    measure, setting = JOBS[job]
    measure = measure if engine == "ours" else peer(job)
    result = measure(config, runtime, repeats, options | {"bandwidth": bandwidth})
    rows = {
        "model": f"{preset}, {config.num_parameters() / 1e6:,.1f} M parameters, random",
        "device": f"{device_name(runtime.device)}, {str(runtime.dtype).removeprefix('torch.')}"
        + ", compiled" * runtime.compile,
        "versions": f"torch {torch.__version__}, engine {engine if engine == 'ours' else PEERS[job]}",
        "ceilings": f"{flops / 1e12:,.2f} TFLOP/s (matrix product), {bandwidth / 1e9:,.1f} GB/s (copy)",
        "speed": f"{result['tokens_per_second']:,.1f} tok/s (median of {repeats})",
    }
    if "bytes_per_second" in result:
        result["mbu"] = result["bytes_per_second"] / bandwidth
        rows["bandwidth"] = f"{result['bytes_per_second'] / 1e9:,.1f} GB/s, {result['mbu']:.1%} of the copy"
    if "flops_per_second" in result:
        result["mfu"] = result["flops_per_second"] / flops
        rows["rate"] = f"{result['flops_per_second'] / 1e12:,.2f} TFLOP/s, {result['mfu']:.1%} of the matrix product"
    result.setdefault("peak_memory", peak_memory(runtime.device))
    rows |= result.pop("rows", {})
    rows["memory"] = f"{result['peak_memory'] / 1e9:,.2f} GB peak"
    say(card(f"{job}, {setting(options)}", rows))
    say(json.dumps({"job": job, "preset": preset, "engine": engine, **rows, **result}))


def compare_engines(job: str, rounds: int, peer_python: Path, sweep: list[int]) -> None:
    """Runs this command with either engine in turn, each in a process of its own, and prints the ratios, for each batch
    size of a sweep."""
    arguments = sys.argv[1:]
    at = arguments.index("--compare")
    del arguments[at : at + 2]
    for size in sweep or [None]:
        one_size = [] if size is None else ["--sweep", "--batch_size", str(size)]
        if size is not None:
            print(f"batch {size}", flush=True)
        compare_once(job, rounds, peer_python, [*arguments, *one_size])


def compare_once(job: str, rounds: int, peer_python: Path, arguments: list[str]) -> None:
    found = {"ours": [], "peer": []}
    for i in range(rounds):
        for engine, results in found.items():
            python = sys.executable if engine == "ours" else peer_python
            command = [python, __file__, *arguments, "--engine", engine]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"--engine {engine} failed: {done.stderr.strip().splitlines()[-1]}")
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
            name = engine if engine == "ours" else PEERS[job]
            speed, memory = results[-1]["tokens_per_second"], results[-1]["peak_memory"] / 1e9
            print(f"round {i + 1}: {name:12} {speed:10,.1f} tok/s, {memory:,.2f} GB peak", flush=True)
    pairs = list(zip(found["ours"], found["peer"]))
    speed = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
    memory = [ours["peak_memory"] / theirs["peak_memory"] for ours, theirs in pairs]
    print(f"ours / {PEERS[job]}: speed {', '.join(f'{x:.2f}' for x in speed)}; memory {statistics.median(memory):.2f}")
    print(json.dumps({"speed_ratios": speed, "memory_ratios": memory, "ours": found["ours"][-1]}))


if __name__ == "__main__":
    run_script(main, parser())
