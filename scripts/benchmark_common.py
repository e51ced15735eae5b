"""Shared by the jobs of scripts/benchmark.py: model shapes, timing, the machine's ceilings, and the run of a speed job,
alone or alternating with a peer."""

import json
import operator
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from models.common import (
    RuntimeArgs,
    Stopwatch,
    at_least_one,
    card,
    choose_runtime,
    dtype_name,
    flag,
    non_negative,
    peak_memory,
    say,
    short_bar,
)
from models.config import ModelConfig
from models.cpu_linear import has_bf16_products
from models.presets import PRESETS

SIZES = {
    "tiny": ModelConfig(512, 64, 192, 2, 4, 2, 16, 4096),  # for trying out
    "23m": ModelConfig(4000, 512, 1376, 6, 8, 8, 64, 4096),
    "134m": ModelConfig(32000, 768, 2048, 12, 12, 12, 64, 4096),
    "135m": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, 1e5, tie_word_embeddings=True),  # SmolLM2-135M's
    "0.5b": PRESETS["Qwen/Qwen2.5-0.5B"],
    "1b": PRESETS["meta-llama/Llama-3.2-1B"],
    "1.5b": PRESETS["Qwen/Qwen2.5-1.5B"],
    "7b": PRESETS["meta-llama/Llama-2-7b-chat-hf"],
    "math-7b": PRESETS["deepseek-ai/deepseek-math-7b-base"],
    "8b": PRESETS["meta-llama/Llama-3.1-8B"],
    "qwen3-8b": PRESETS["Qwen/Qwen3-8B"],
}
SCRIPT = Path(__file__).resolve().with_name("benchmark.py")


def layout(text: str) -> tuple[int, int]:
    """Parses "4x2", dp x tp. Raises ValueError."""
    dp, _, tp = text.partition("x")
    if not (dp.isdigit() and tp.isdigit() and int(dp) and int(tp)):
        raise ValueError(text)
    return int(dp), int(tp)


@dataclass(frozen=True, kw_only=True)
class JobArgs:
    """The job."""

    job: str = flag(help="what to measure", positional=True, metavar="JOB")


@dataclass(frozen=True, kw_only=True)
class PresetArgs:
    """The model, with random weights."""

    preset: str = flag("134m", choices=SIZES, help="shape of the model")

    @property
    def config(self) -> ModelConfig:
        return SIZES[self.preset]


@dataclass(frozen=True, kw_only=True)
class AnswerArgs:
    """Lengths of prompts and answers."""

    prompt_len: int = flag(64, bounds=at_least_one, help="tokens of each prompt")
    new_tokens: int = flag(128, bounds=at_least_one, help="tokens of each completion")


@dataclass(frozen=True, kw_only=True)
class LayoutArgs:
    """Layouts to compute the memory of."""

    layouts: list[layout] = flag((), metavar="DPxTP", help="dp x tp, as 1x1 8x1 4x2; default: all ranks as dp")


@dataclass(frozen=True, kw_only=True)
class RepeatArgs:
    """Repetitions."""

    repeats: int = flag(3, bounds=at_least_one, help="timed runs or steps, after a warm-up")


@dataclass(frozen=True, kw_only=True)
class SpeedArgs(JobArgs, PresetArgs, RepeatArgs, RuntimeArgs):
    """Profiling."""

    profile: int = flag(0, bounds=non_negative, help="print the N operations that take longest; slows the run down")


@dataclass(frozen=True, kw_only=True)
class PeerArgs:
    """Comparison with a peer."""

    compare: int | None = flag(None, bounds=at_least_one, help="alternate this project's engine and --peer N times")
    peer_python: Path = flag(Path(sys.executable), help="with --compare: Python interpreter that has the peer")


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Returns the median time of a call, after one warm-up call."""
    watch, times = Stopwatch(device), []
    for _ in short_bar(range(repeats + 1), "measuring", "run"):
        watch.lap()
        function()
        times.append(watch.lap())
    return statistics.median(times[1:])


def profiled(function: Callable[[], object], device: torch.device, most: int) -> tuple[object, str]:
    """Returns (a call's result, a text that lists the `most` operations that took longest: mean time, number, share of
    the total time). On a GPU, operations are its kernels."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        result = function()
        if on_gpu:
            torch.cuda.synchronize(device)
    time_of = operator.attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")
    # marks of the compiler are not operations
    found = [(time_of(e), e.count, e.key) for e in profile.key_averages() if "dynamo_timed" not in e.key]
    total = sum(microseconds for microseconds, _, _ in found) or 1.0
    longest = sorted(found, reverse=True)[:most]
    return result, ", ".join(f"{short(name)} {t / n:,.1f} us x {n:,} ({t / total:.1%})" for t, n, name in longest)


def short(name: str) -> str:
    """Returns an operation's name without "void" and "at::native::", shortened to 60 characters."""
    name = name.removeprefix("void ").replace("at::native::", "")
    return name if len(name) <= 60 else name[:57] + "..."


def product_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype that the device multiplies fastest: bf16, or fp32 on a CPU that only emulates bf16."""
    return torch.bfloat16 if device.type == "cuda" or has_bf16_products() else torch.float32


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Measures bytes/s of a copy, read and written ones added."""
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, 7)


def product_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Measures FLOP/s of a matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, 7)


@cache
def ceilings(device: torch.device) -> tuple[float, float, torch.dtype]:
    """Measures (FLOP/s of a matrix product, bytes/s of a copy, read and written); returns them and the product's
    dtype."""
    dtype = product_dtype(device)
    size, num_bytes = (8192, 2**32) if device.type == "cuda" else (1024, 2**28)
    return product_rate(device, size, dtype), copy_bandwidth(device, num_bytes), dtype


# ------------------------------------------------------------------------------------------ running a job


def run_speed_job(args: SpeedArgs, title: str, measure: Callable, peers: dict[str, Callable] | None = None) -> None:
    """Calls measure(args, runtime), or the peer that --engine names, and prints the card and JSON line of its figures;
    with --compare runs this command with both engines in turn.

    Figures: tokens_per_second; bytes_per_second and flops_per_second if they can be compared with a ceiling; rows: more
    lines of the card; ran: a peer's description of what it ran: package, version, path, precision, compiled or not.

    peers: {name: function as measure}. A peer does the job in the same precision, with the same sampling and the same
    --compile, or raises ValueError, and imports its package when it is called.
    """
    if peers and args.compare:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("--compare: alternates two engines on one rank; start it without torchrun")
        if args.profile:
            raise ValueError("--profile: profiles one engine; leave out --compare")
        compare_engines(args)
        return
    engine = args.engine if peers else "ours"
    runtime = choose_runtime(args)
    torch.manual_seed(args.seed % 2**63)
    flops, bandwidth, dtype = ceilings(runtime.device)
    if runtime.device.type == "cuda":  # leave the memory to the job, and measure its own peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    measure = partial(measure if engine == "ours" else peers[engine], args, runtime)
    result, operations = profiled(measure, runtime.device, args.profile) if args.profile else (measure(), "")
    product = f"{dtype_name(dtype)} matrix product"
    rows = {
        "model": f"{args.preset}, {args.config.num_parameters() / 1e6:,.1f} M parameters, random",
        "device": str(runtime),
        "versions": f"torch {torch.__version__}",
        "ran": result.get("ran", f"gpt-accelera, {'compiled' if runtime.compile else 'eager'}"),
        "ceilings": f"{flops / 1e12:,.2f} TFLOP/s ({product}), {bandwidth / 1e9:,.1f} GB/s (copy)",
        "speed": f"{result['tokens_per_second']:,.1f} tok/s (median of {args.repeats}{result.pop('of', '')})",
    }
    if "bytes_per_second" in result:
        result["mbu"] = result["bytes_per_second"] / bandwidth
        rows["bandwidth"] = f"{result['bytes_per_second'] / 1e9:,.1f} GB/s, {result['mbu']:.1%} of the copy"
    if "flops_per_second" in result:
        result["mfu"] = result["flops_per_second"] / flops
        rows["rate"] = f"{result['flops_per_second'] / 1e12:,.2f} TFLOP/s, {result['mfu']:.1%} of the {product}"
    result.setdefault("peak_memory", peak_memory(runtime.device))
    rows.update(result.pop("rows", {}))
    if operations:
        rows["operations"] = operations
    if result["peak_memory"]:
        rows["memory"] = f"{result['peak_memory'] / 1e9:,.2f} GB peak"
    say(card(f"{args.job}, {title}", rows))
    say(json.dumps({"job": args.job, "preset": args.preset, "engine": engine, **rows, **result}))


def compare_engines(args: SpeedArgs) -> None:
    """Runs this command with both engines in turn, each in its own process, and prints the ratios; for a sweep, of each
    batch size."""
    if shutil.which(args.peer_python) is None:
        raise ValueError(f"--peer_python {args.peer_python}: there is no such program")
    arguments, words = [], iter(sys.argv[1:])
    for word in words:
        if word == "--compare":
            next(words)
        elif not word.startswith("--compare="):
            arguments.append(word)
    sizes = getattr(args, "sweep", ())
    for size in sizes or [None]:
        one_size = [] if size is None else ["--sweep", "--batch_size", str(size)]
        if size is not None:
            print(f"batch {size}", flush=True)
        compare_once(args, [*arguments, *one_size])


def why_it_failed(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the last line of its stderr, which a killed process may have left empty."""
    return next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")


def compare_once(args: SpeedArgs, arguments: list[str]) -> None:
    results = {args.peer: [], "ours": []}  # the peer first, since its package may be missing
    for i in range(args.compare):
        for engine in results:
            python = sys.executable if engine == "ours" else args.peer_python
            command = [python, SCRIPT, *arguments, "--engine", engine]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = why_it_failed(done).removeprefix(f"{SCRIPT.name}: error: ")
                raise ValueError(f"--engine {engine} failed: {why}")
            result = json.loads(done.stdout.strip().splitlines()[-1])
            results[engine].append(result)
            peak = f", {result['peak_memory'] / 1e9:,.2f} GB peak" if result["peak_memory"] else ""
            print(f"round {i + 1}: {result['tokens_per_second']:,.1f} tok/s{peak}: {result['ran']}", flush=True)
    pairs = list(zip(results["ours"], results[args.peer]))
    speeds = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
    memory = [ours["peak_memory"] / theirs["peak_memory"] for ours, theirs in pairs if theirs["peak_memory"]]
    shown = ", ".join(f"{x:.2f}" for x in speeds) + (f"; memory {statistics.median(memory):.2f}" if memory else "")
    ran = results[args.peer][-1]["ran"]
    last = [results[engine][-1] for engine in ("ours", args.peer)]
    at = ""
    if all("bits" in result for result in last):  # the two store weights in formats of their own
        at = " at {:.1f} / {:.1f} bits a weight".format(*(result["bits"] for result in last))
    print(f"ours / {ran}{at}: speed {shown}")
    print(json.dumps({"speed_ratios": speeds, "memory_ratios": memory, "ran": ran, "ours": results["ours"][-1]}))
