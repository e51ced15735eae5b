"""Speed beside the physical limit, with random weights.

- the ceilings (a matrix product, a copy) are measured in the same run, so MFU and MBU mean something on any machine
- generate: tokens/s, time to the first token and MBU of the engine, for a batch size, a sweep of them, or ragged work
  in few slots; in any precision, over tensor-parallel ranks. sft, dpo: tokens/s of whole optimizer steps
- ppo: the split of an update of training/train_ppo.py, its rollouts beside the engine alone, its memory on paper
- grpo: a policy update on ragged answers, padded and packed in turns
- memory: what a training run needs on each rank, on paper for any layout, and with --measure held against this machine
- data: what tokenising costs for chats of 1, 4 and 16 turns
- --compare runs the peer (transformers; dpo: TRL's DPOTrainer) on the same shape in alternating processes and prints
  the ratios; one process's timing alone says little on a shared machine
- the last line is JSON; each job has its file beside this one

    python scripts/benchmark.py generate --preset 134m --dtype bfloat16 --batch_size 8 --prompt_len 64 --new_tokens 128
    python scripts/benchmark.py sft --preset 134m --dtype bfloat16 --batch_size 4 --seq_len 512
    python scripts/benchmark.py dpo --preset 134m --dtype bfloat16 --batch_size 4 --prompt_len 128 --new_tokens 128
    python scripts/benchmark.py ppo --preset 134m --dtype bfloat16 --batch_size 16 --prompt_len 64 --new_tokens 64
    python scripts/benchmark.py memory --preset 7b --layouts 1x1 8x1 4x2
    python scripts/benchmark.py memory --preset 7b --quantize int4 --measure
    python scripts/benchmark.py data
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from models.common import card, choose_runtime, dtype_name, peak_memory, run_script, say
from scripts.benchmark_common import BenchmarkArgs, ceilings
from scripts.benchmark_data import report_data
from scripts.benchmark_generate import generate_setting, measure_generate
from scripts.benchmark_grpo import grpo_setting, measure_grpo
from scripts.benchmark_memory import report_memory
from scripts.benchmark_peers import PEERS, peer, peer_name
from scripts.benchmark_ppo import measure_ppo, ppo_setting, report_plan
from scripts.benchmark_training import dpo_setting, measure_dpo, measure_sft, sft_setting

# job: (measure(args, runtime, bandwidth of a copy) -> its figures, setting(args) -> its title)
JOBS = {
    "generate": (measure_generate, generate_setting),
    "sft": (measure_sft, sft_setting),
    "dpo": (measure_dpo, dpo_setting),
    "ppo": (measure_ppo, ppo_setting),
    "grpo": (measure_grpo, grpo_setting),
}


def main(args: BenchmarkArgs) -> None:
    job = args.job
    if job not in PEERS and (args.compare or args.engine == "peer"):
        raise ValueError(f"{job} has no peer to compare with")
    if args.precisions and (args.compare or args.quantize != "none"):
        raise ValueError("--precisions: takes the place of --quantize, and of --compare")
    if args.compare:
        compare_engines(args)
        return
    if job in ("data", "memory"):
        {"data": report_data, "memory": report_memory}[job](args)
        return
    if job == "ppo" and args.plan:
        report_plan(args)
        return
    runtime = choose_runtime(args)
    torch.manual_seed(args.seed)
    flops, bandwidth, dtype = ceilings(runtime.device)
    measure, setting = JOBS[job]
    measure = measure if args.engine == "ours" else peer(args)
    result = measure(args, runtime, bandwidth)
    product = f"{dtype_name(dtype)} matrix product"
    rows = {
        "model": f"{args.preset}, {args.config.num_parameters() / 1e6:,.1f} M parameters, random",
        "device": str(runtime),
        "versions": f"torch {torch.__version__}, engine {args.engine if args.engine == 'ours' else peer_name(args)}",
        "ceilings": f"{flops / 1e12:,.2f} TFLOP/s ({product}), {bandwidth / 1e9:,.1f} GB/s (copy)",
        "speed": f"{result['tokens_per_second']:,.1f} tok/s (median of {args.repeats})",
    }
    if "bytes_per_second" in result:
        result["mbu"] = result["bytes_per_second"] / bandwidth
        rows["bandwidth"] = f"{result['bytes_per_second'] / 1e9:,.1f} GB/s, {result['mbu']:.1%} of the copy"
    if "flops_per_second" in result:
        result["mfu"] = result["flops_per_second"] / flops
        rows["rate"] = f"{result['flops_per_second'] / 1e12:,.2f} TFLOP/s, {result['mfu']:.1%} of the {product}"
    result.setdefault("peak_memory", peak_memory(runtime.device))
    rows.update(result.pop("rows", {}))
    rows["memory"] = f"{result['peak_memory'] / 1e9:,.2f} GB peak"
    say(card(f"{job}, {setting(args)}", rows))
    say(json.dumps({"job": job, "preset": args.preset, "engine": args.engine, **rows, **result}))


def compare_engines(args: BenchmarkArgs) -> None:
    """Runs this command with either engine in turn, each in a process of its own, and prints the ratios, for each batch
    size of a sweep."""
    arguments = sys.argv[1:]
    at = arguments.index("--compare")
    del arguments[at : at + 2]
    for size in args.sweep or [None]:
        one_size = [] if size is None else ["--sweep", "--batch_size", str(size)]
        if size is not None:
            print(f"batch {size}", flush=True)
        compare_once(args, [*arguments, *one_size])


def compare_once(args: BenchmarkArgs, arguments: list[str]) -> None:
    results = {"ours": [], "peer": []}
    for i in range(args.compare):
        for engine in results:
            python = sys.executable if engine == "ours" else args.peer_python
            command = [python, __file__, *arguments, "--engine", engine]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"--engine {engine} failed: {done.stderr.strip().splitlines()[-1]}")
            result = json.loads(done.stdout.strip().splitlines()[-1])
            results[engine].append(result)
            name = engine if engine == "ours" else peer_name(args)
            speed, memory = result["tokens_per_second"], result["peak_memory"] / 1e9
            print(f"round {i + 1}: {name:12} {speed:10,.1f} tok/s, {memory:,.2f} GB peak", flush=True)
    pairs = list(zip(results["ours"], results["peer"]))
    speeds = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
    memory = [ours["peak_memory"] / theirs["peak_memory"] for ours, theirs in pairs]
    shown = ", ".join(f"{x:.2f}" for x in speeds)
    print(f"ours / {peer_name(args)}: speed {shown}; memory {statistics.median(memory):.2f}")
    print(json.dumps({"speed_ratios": speeds, "memory_ratios": memory, "ours": results["ours"][-1]}))


if __name__ == "__main__":
    run_script(main, BenchmarkArgs)
