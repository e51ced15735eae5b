"""Sections `ceilings`, `decode` and `peers` of scripts/gpu_report.py: speed of decoding, beside its limits."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from models.common import dtype_name
from models.decode import weight_bytes
from models.generation import Engine, Request
from models.gpu import peaks
from models.model import Transformer
from models.pages import PAGE, pages_for
from models.quantize import check_scheme, rounding_scheme
from models.sampling import SamplingParams
from scripts.benchmark_common import SIZES, copy_bandwidth, product_dtype, product_rate
from scripts.benchmark_generate import random_inference_model, run_once
from scripts.report.record import Item, Section, free_memory, last_json, run_script
from scripts.workload import MathArgs, counted, math_requests, ragged_sizes, random_ids, sized, token_bytes

RAGGED = 192  # number of ragged prompts

# ---------------------------------------------------------------------------------------- ceilings


def bandwidth_of(section: Section) -> float:
    """Returns bytes/s of a copy, measured once for a section."""
    if "bandwidth" not in section.kept:
        section.kept["bandwidth"] = copy_bandwidth(section.runtime.device, 2**22 if section.small else 2**32)
    return section.kept["bandwidth"]


def measure_copy(section: Section) -> None:
    rate, known = bandwidth_of(section), peaks(section.runtime.device)
    detail = f"{rate / known[1]:.0%} of the datasheet's" if known else "read and written"
    section.figure("copy", rate / 1e9, "GB/s", detail=detail)


def measure_products(section: Section) -> None:
    device, known = section.runtime.device, peaks(section.runtime.device)
    dtype = product_dtype(device)
    for size in (64,) if section.small else (4096, 8192, 16384):
        rate = product_rate(device, size, dtype)
        detail = f"{rate / known[0]:.0%} of the datasheet's" if known else ""
        section.figure(f"matrix product, {size}, {dtype_name(dtype)}", rate / 1e12, "TFLOP/s", detail=detail)


# ------------------------------------------------------------------------------------------ decode


def model_of(section: Section, mode: str = "none") -> Transformer:
    """Returns the model of a section's items; only one is kept at a time."""
    kept = section.kept
    if kept.get("mode") != mode:
        for name in ("model", "mode"):  # neither is left if the other one cannot be built
            kept.pop(name, None)
        free_memory(section.runtime.device)
        config = SIZES["tiny" if section.small else "math-7b"]
        scheme = None if mode == "none" else rounding_scheme(mode, None, config)
        if scheme is not None:
            check_scheme(scheme, config, section.runtime.device, section.runtime.dtype, 1)
        kept["model"], kept["mode"] = random_inference_model(config, section.runtime, scheme), mode
    return kept["model"]


def name_of(section: Section, mode: str = "none") -> str:
    return f"decode {'tiny' if section.small else '7B'} {dtype_name(section.runtime.dtype) if mode == 'none' else mode}"


def full_engine(section: Section, mode: str, slots: int, prompt: int, new: int) -> tuple[Engine, list[Request]]:
    """Returns an engine, and requests whose prompts are computed in one prefill, so that all rows run in all steps."""
    model = model_of(section, mode)
    options = {"num_slots": slots, "max_seq_len": prompt + new, "compile": section.runtime.compile}
    engine = Engine(model, SamplingParams(), prefill_tokens=slots * prompt, **options)
    return engine, [Request(i, 0, random_ids(model.config.vocab_size, prompt).tolist(), new) for i in range(slots)]


def decode(slots: int, prompt_len: int, *, mode: str = "none", goals: dict | None = None) -> Callable:
    """Returns an item that measures decode steps of full slots: tokens/s without prefill, and MBU, the bytes per second
    that steps must read (weights, and the cache of their rows) over a copy's. goals: lowest acceptable mbu, rate and
    ratio (to the rate of unquantised weights), highest acceptable startup."""
    goals = goals or {}

    @torch.inference_mode()
    def run(section: Section) -> None:
        prompt, new = (8, 12) if section.small else (prompt_len, 128)
        engine, requests = full_engine(section, mode, slots, prompt, new)
        first = run_once(engine, [replace(request, max_new_tokens=9) for request in requests])
        if "is_first" not in section.kept:
            section.kept["is_first"] = False
            seconds = time.time() - section.started
            detail = "from the start of the process to the 9th token, with random weights and "
            detail += f"{first.compile_seconds:.1f} s of compiling (less if an earlier run's code is kept)"
            section.figure("start-up", seconds, "s", goals.get("startup"), detail)
        again = run_once(engine, requests)
        name = f"{name_of(section, mode)}, {counted(slots, 'slot')}"
        rate, mbu = slots / again.step_ms * 1e3, again.bandwidth / bandwidth_of(section)
        detail = f"{rate:,.0f} tok/s, {again.rate:,.0f} with prefill, {again.step_ms:.2f} ms a step, {prompt} + {new} "
        detail += f"tokens, first token after {again.first_token_ms:.0f} ms, {first.compile_seconds:.1f} s of compiling"
        numbers = {"tokens_per_second": rate, "first_token_ms": again.first_token_ms, "step_ms": again.step_ms}
        section.figure(f"{name}, MBU", mbu, "of the copy", goals.get("mbu"), detail, numbers=numbers)
        if "rate" in goals:
            section.figure(f"{name}, speed", rate, "tok/s", goals["rate"])
        section.kept[mode, slots] = rate
        if "ratio" in goals and ("none", slots) in section.kept:
            section.figure(f"{name}, speed / unquantised", rate / section.kept["none", slots], "times", goals["ratio"])

    return run


@torch.inference_mode()
def decode_ragged(section: Section) -> None:
    """Measures the same ragged work as the section `peers` gives to transformers' generate_batch."""
    model, slots = model_of(section), 64
    count, *shape = (4, 8, 4) if section.small else (RAGGED, 64, 128)
    sizes = ragged_sizes(count, *shape)
    requests = [
        Request(i, 0, random_ids(model.config.vocab_size, prompt).tolist(), new)
        for i, (prompt, new) in enumerate(sizes)
    ]
    options = {"num_slots": slots, "max_seq_len": max(map(sum, sizes)), "compile": section.runtime.compile}
    engine = Engine(model, SamplingParams(), **options)
    run_once(engine, requests)
    detail = f"{count} ragged prompts of about {shape[0]} + {shape[1]} tokens"
    section.figure(f"{name_of(section)}, ragged, {slots} slots", run_once(engine, requests).rate, "tok/s", None, detail)


def capture_all(engine: Engine) -> None:
    """Captures steps of all sizes on a GPU: the last answers run in fewer rows than any warm-up's."""
    runner = engine.rows.runner
    for size in runner.sizes if runner is not None else ():
        if size not in runner.graphs:
            runner.prepare(size)


@torch.inference_mode()
def decode_math(section: Section) -> None:
    """Measures 64 samples of each MATH-shaped prompt, with up to 320 slots and as many pages as the memory holds."""
    model, device = model_of(section), section.runtime.device
    args = MathArgs(num_prompts=2, num_samples=2, answer_mean=6.0, answer_most=12, prompt_mean=10.0)
    args = args if section.small else MathArgs(num_prompts=10)
    requests = list(math_requests(args, model.config.vocab_size))
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    slots, num_pages = 4 if section.small else 320, None
    if device.type == "cuda":
        page = PAGE * token_bytes(model.config, 2)
        free = torch.cuda.mem_get_info(device)[0] * 0.85
        num_pages = min(slots * pages_for(longest), max(pages_for(longest) + 1, int(free // page)))
    options = {"num_slots": slots, "max_seq_len": longest, "num_pages": num_pages, "compile": section.runtime.compile}
    engine = Engine(model, SamplingParams(), **options)
    run_once(engine, [replace(r, max_new_tokens=min(r.max_new_tokens, 9)) for r in requests[:slots]])
    capture_all(engine)
    run = run_once(engine, requests)
    rows = engine.num_decoded / max(1, engine.num_steps)
    detail = (
        f"{args.num_prompts} x {args.num_samples} answers of {args.answer_mean:.0f} tokens on average, {rows:.0f} of "
    )
    detail += f"{slots} rows on average, {engine.scheduler.num_preempted} computed again, "
    detail += f"{run.bandwidth / bandwidth_of(section):.0%} of the copy; the last answers run in few rows"
    numbers = {"mean_rows": rows, "steps": engine.num_steps, "cache_bytes": engine.rows.cache.bytes_per_token}
    section.figure(f"{name_of(section)}, MATH-shaped", run.rate, "tok/s", None, detail, numbers=numbers)


def note_weights(section: Section) -> None:
    model = model_of(section)
    text = f"{model.config.num_parameters() / 1e6:,.1f} M parameters, {sized(weight_bytes(model)).strip()} a step"
    section.note("model", text)


# ------------------------------------------------------------------------------------------- peers


def peer(engine: str, batch_size: int, prompt_len: int, ragged: int | None = None) -> Callable:
    """Returns an item that runs transformers through scripts/benchmark.py, with the same shape, precision, sampling and
    compile mode."""

    def run(section: Section) -> None:
        preset, sizes = ("tiny", [8, 4]) if section.small else ("math-7b", [prompt_len, 128])
        flags = ["generate", "--preset", preset, "--engine", engine, "--batch_size", batch_size, "--repeats", 1]
        flags += ["--prompt_len", sizes[0], "--new_tokens", sizes[1], "--device", section.runtime.device]
        count = 4 if ragged and section.small else ragged
        flags += [] if count is None else ["--ragged", count]
        found = last_json(run_script("scripts/benchmark.py", *flags, seconds=section.left()))
        work = f"{sizes[0]} + {sizes[1]} tokens" if count is None else f"{count} ragged prompts"
        name = f"{engine} {preset}, batch {batch_size}"
        section.figure(name, found["tokens_per_second"], "tok/s", None, f"{found['ran']}; {work}")

    return run


CEILINGS = [Item("copy", 3, measure_copy), Item("products", 3, measure_products)]
DECODE = [
    Item("batch 1", 25, decode(1, 64, goals={"mbu": 0.75, "startup": 30})),
    Item("batch 64", 15, decode(64, 448, goals={"mbu": 0.6})),
    Item("batch 256", 15, decode(256, 64, goals={"rate": 10_000})),
    Item("model", 0, note_weights),
    Item("int4, batch 1", 20, decode(1, 64, mode="int4", goals={"ratio": 1.8})),
    Item("MATH", 40, decode_math),
    Item("ragged", 12, decode_ragged),
    Item("int8, batch 1", 20, decode(1, 64, mode="int8")),
]
PEERS = [
    Item("generate_batch", 30, peer("generate_batch", 64, 64, ragged=RAGGED)),
    Item("generate, batch 1", 45, peer("transformers", 1, 64)),
    Item("generate, batch 64", 40, peer("transformers", 64, 448)),
]
