"""Section `kernels` of scripts/gpu_report.py: compares kernels that do the same work, each with its options, and shows
which operations take the time of a decode step and of a training step."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attention import Attend, document_attention
from models.gpu import has_triton
from models.graphs import CudaGraph
from models.pages import PAGE, pages_for
from models.qlinear import Scheme, quantize, triton_products
from scripts.benchmark_common import SIZES, profiled, seconds_of
from scripts.benchmark_generate import run_once
from scripts.report.record import Item, Section
from scripts.report.speed import full_engine, name_of
from scripts.report.trained import benchmark_sft
from scripts.workload import counted

CALLS = 24  # calls per measurement, captured as one graph: to launch some kernels takes longer than to run them
CACHE_BYTES = 2**28  # larger than a GPU's caches


def compare_decode_attention(section: Section) -> None:
    """Times the Triton kernel by splits, varlen_attn on the same pages, and SDPA without pages, for equal lengths."""
    device = section.runtime.device
    if not has_triton(device):
        section.note("decode attention", "its kernel needs a GPU with Triton")
        return
    from models.triton_attention import paged_decode

    for title, B, K, groups, length in (("7B", 64, 32, 1, 512), ("8B", 64, 8, 4, 2048), ("7B", 1, 32, 1, 2048)):
        pages, D = pages_for(length), 128
        k, v = (torch.randn(B * pages + 1, PAGE, K, D, device=device, dtype=torch.bfloat16) for _ in range(2))
        q = torch.randn(B, K * groups, D, device=device, dtype=torch.bfloat16)
        new = torch.randn(2, B, K, D, device=device, dtype=torch.bfloat16)
        table = (torch.randperm(B * pages, device=device) + 1).int().view(B, pages)
        lengths = torch.full((B,), length, dtype=torch.int32, device=device)
        num_bytes, name = 2 * B * length * K * D * 2, f"decode attention {title}, {counted(B, 'row')} of {length}"
        for splits in (1, 2, 4, 8, 16):
            step = partial(paged_decode, q, *new, k, v, table, lengths, splits)
            time_or_say(section, f"{name}, Triton, {counted(splits, 'split')}", CALLS * [step], num_bytes=num_bytes)
        ends = torch.arange(B + 1, dtype=torch.int32, device=device)
        step = partial(paged_varlen, q, k, v, ends, lengths, table, length)
        time_or_say(section, f"{name}, varlen_attn with a block table", CALLS * [step], num_bytes=num_bytes)
        keys, values = (torch.randn(B, K, length, D, device=device, dtype=torch.bfloat16) for _ in range(2))
        queries = q.view(B, K, groups, D)
        step = partial(F.scaled_dot_product_attention, queries, keys, values)
        time_or_say(section, f"{name}, SDPA without pages", CALLS * [step], num_bytes=num_bytes)


def paged_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """torch's kernel on the same pages (torch 2.13 or later)."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"enable_gqa": q.shape[1] != k.shape[2], "seqused_k": lengths, "block_table": table}
    return varlen_attn(q, k, v, ends, None, 1, longest, **options)


def compare_training_attention(section: Section) -> None:
    """Times forward and backward of one causal row: packed texts with our attention, and SDPA's backends."""
    device, T = section.runtime.device, 64 if section.small else 4096
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for title, H, K, D in (("7B", 32, 32, 128), ("8B", 32, 8, 128)):
        q, k, v = (torch.randn(1, n, T, D, device=device, dtype=dtype, requires_grad=True) for n in (H, K, K))
        lengths = [T // 8] * 8
        packed = document_attention([lengths], T, device, dtype, head_dim=D)
        step = partial(packed_and_back, packed, *(t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v)))
        name = f"training attention {title}, 8 packed texts of {T // 8} tokens, ours"
        time_or_say(section, name, [step], flops=3.5 * 4 * H * D * sum(n * n for n in lengths) / 2)
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            step = partial(attend_and_back, getattr(SDPBackend, backend), q, k, v)
            name = f"training attention {title}, {T} tokens, {backend.lower().removesuffix('_attention')}"
            time_or_say(section, name, [step], flops=3.5 * 4 * H * D * T * T / 2)


def attend_and_back(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    with sdpa_kernel(backend):
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).sum().backward()


def packed_and_back(attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    attend(0, q, k, v).sum().backward()


def compare_products(section: Section) -> None:
    """Times products of a 7B layer with int8 and int4 weights, for each number of splits, and with bf16 weights. There
    are more weights than the caches hold, so that they are read from memory."""
    device, config = section.runtime.device, SIZES["math-7b"]
    if not has_triton(device):
        section.note("products of few rows", "their kernel needs a GPU with Triton")
        return
    width, inner = config.hidden_size, config.intermediate_size
    for N, K in ((3 * width, width), (width, width), (2 * inner, width), (width, inner)):
        weight = 0.02 * torch.randn(N, K, device=device)
        for scheme in (Scheme("int8"), Scheme("int4", 128)):
            small, num_bytes = quantize(weight, scheme), N * K * scheme.bits / 8
            for splits in (1, 2, 3, 4, 6, 8, 16):
                make = partial(triton_products, small, scheme, splits)
                time_products(section, f"product {N} x {K}, {scheme}, {counted(splits, 'split')}", make, K, num_bytes)
        time_products(section, f"product {N} x {K}, bf16", partial(bf16_layer, weight), K, 2 * N * K)


def bf16_layer(weight: torch.Tensor) -> Callable:
    return partial(F.linear, weight=weight.bfloat16())


def time_products(section: Section, name: str, make: Callable[[], Callable], K: int, num_bytes: float) -> None:
    """Times products of layers that make() returns, of num_bytes each."""
    layers = [make() for _ in range(1 + int(CACHE_BYTES / num_bytes))]
    for rows in (1, 64):
        x = torch.randn(rows, K, device=section.runtime.device, dtype=torch.bfloat16)
        steps = [partial(layers[i % len(layers)], x) for i in range(CALLS)]
        time_or_say(section, f"{name}, {counted(rows, 'row')}", steps, num_bytes=num_bytes)


def time_or_say(section: Section, name: str, steps: list[Callable], *, flops: float = 0, num_bytes: float = 0) -> None:
    """Records the time of a call; on a GPU, the calls are one graph. Notes a backend that does not support the shape.
    flops, num_bytes: of one call."""
    device = section.runtime.device
    try:
        seconds = seconds_of(together(steps, device), device, 2 if section.small else 10) / len(steps)
    except (RuntimeError, TypeError, ValueError, ImportError) as error:
        section.note(name, f"not here: {str(error).splitlines()[0][:120]}")
        return
    detail = f"{flops / seconds / 1e12:,.1f} TFLOP/s" if flops else f"{num_bytes / seconds / 1e9:,.0f} GB/s"
    section.figure(name, seconds * 1e3, "ms", None, detail)


def together(steps: list[Callable], device: torch.device) -> Callable:
    """Combines functions to one; on a GPU, to a graph."""

    def run() -> None:
        for step in steps:
            step()

    if device.type != "cuda" or len(steps) == 1:
        return run
    CudaGraph.warm_up(run)
    return CudaGraph(run, CudaGraph.make_pool()).replay


# --------------------------------------------------------------------------------------- profiles


def profile_decode(slots: int, prompt_len: int, mode: str = "none") -> Callable:
    """Returns an item that shows which operations take the time of a decode step of full slots."""

    @torch.inference_mode()
    def run(section: Section) -> None:
        prompt, new = (8, 8) if section.small else (prompt_len, 32)
        engine, requests = full_engine(section, mode, slots, prompt, new)
        run_once(engine, requests)
        _, found = profiled(lambda: run_once(engine, requests), section.runtime.device, 12)
        detail = f"{found}; a prefill and {engine.num_steps} steps"
        section.note(f"{name_of(section, mode)}, {counted(slots, 'slot')}, time by operation", detail)

    return run


@torch.inference_mode()
def split_first_token(section: Section) -> None:
    """Measures the host's time before the first token of a prompt, for which the device may wait."""
    engine, requests = full_engine(section, "none", 1, 8 if section.small else 64, 12)
    run_once(engine, requests)
    seconds = {name: [] for name in ("prefill", "logits", "start", "look")}

    def timed(name: str, method: Callable) -> Callable:
        def call(*args: object) -> object:
            began = time.perf_counter()
            result = method(*args)
            seconds[name].append(time.perf_counter() - began)
            return result

        return call

    for name in seconds:
        setattr(engine.rows, name, timed(name, getattr(engine.rows, name)))
    first = statistics.median(run_once(engine, requests).first_token_ms for _ in range(5))
    shares = ", ".join(f"{name} {1e3 * statistics.median(each):.2f} ms" for name, each in seconds.items())
    section.note(f"{name_of(section)}, first token", f"after {first:.1f} ms; of the host's time: {shares}")


def profile_sft(section: Section) -> None:
    preset, seq_len = ("tiny", 64) if section.small else ("8b", 4096)
    found = benchmark_sft(section, preset, 1, seq_len, "selective", "--profile", 20)
    section.note(f"SFT {preset}, time by operation", found["operations"])


ITEMS = [
    Item("products of few rows", 12, compare_products),
    Item("profile, 1 slot", 15, profile_decode(1, 64)),
    Item("first token, 1 slot", 4, split_first_token),
    Item("profile, SFT 8B", 30, profile_sft),
    Item("profile, 64 slots", 10, profile_decode(64, 448)),
    Item("decode attention", 8, compare_decode_attention),
    Item("training attention", 5, compare_training_attention),
    Item("profile, int4", 15, profile_decode(1, 64, "int4")),
]
