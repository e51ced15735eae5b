"""The job `generate` of scripts/benchmark.py: the engine's rates for one batch size or a sweep of them, with weights in
any precision, over tensor-parallel ranks."""

import math
import statistics
import time

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from models.decode import can_pack, to_inference, weight_bytes
from models.fsdp import check_divisible, data_parallel_size, init_mesh, parallel_of
from models.generation import Engine, Request, SamplingParams
from models.model import ModelConfig, Transformer
from models.qlinear import Scheme
from models.quantize import check_scheme, quantize_in_place
from models.tp import inference_parallel, tensor_parallel_part
from scripts.benchmark_common import seconds_of


def generate_setting(options: dict) -> str:
    if options["sweep"]:
        text = "sweep of {prompt_len} + {new_tokens} tokens"
    elif options["ragged"]:
        text = "{ragged} ragged prompts of about {prompt_len} + {new_tokens} tokens, {batch_size} slots"
    else:
        text = "{batch_size} slots, {prompt_len} + {new_tokens} tokens"
    return text.format(**options)


def work(options: dict) -> list[tuple[int, int]]:
    """(tokens of the prompt, tokens to generate) of each row: all alike, or --ragged of them, from a quarter to seven
    quarters of the flags', drawn from a fixed seed."""
    sizes = [options[name] for name in ("prompt_len", "new_tokens")]
    if not options["ragged"]:
        return [tuple(sizes)] * options["batch_size"]
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(-(-n // 4), 7 * n // 4 + 1, (options["ragged"],), generator=generator) for n in sizes)
    return list(zip(*(numbers.tolist() for numbers in drawn)))


@torch.no_grad()
def random_inference_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    pack: bool,
    scheme: Scheme | None,
    tp: DeviceMesh | None,
) -> Transformer:
    """The inference copy of random weights, or this tp rank's part of it, built block by block."""
    parallel = inference_parallel(tp, device, dtype)
    with torch.device("meta"):
        model = Transformer(config, dtype, parallel)

    def fill(module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            part = tensor_parallel_part(name, tuple(parameter.shape), tp)
            values = torch.empty([s.stop - s.start for s in part], dtype=dtype, device=device)
            values = values.fill_(1.0) if "norm" in name else values.normal_(0.0, 0.02)
            setattr(module.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=False))

    for block in model.layers:
        fill(block)
        if scheme is not None:
            quantize_in_place(block, scheme)
    blocks, model.layers = model.layers, nn.ModuleList()
    fill(model)
    model.layers = blocks
    model.tie_weights()
    model.reset_buffers(device)
    return to_inference(model, pack=pack)


def products_seconds(model: Transformer, batch_size: int, device: torch.device) -> float:
    """The time of a decode step's matrix products alone, one after the other."""
    config = model.config
    widths = (config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size)
    x = {n: torch.randn(batch_size, n, device=device).to(model.compute_dtype) for n in widths}
    E, q, ffn = widths

    def products() -> None:
        for block in model.layers:
            attention, mlp = block.self_attn, block.mlp
            for product, width in ((attention.qkv_proj, E), (attention.o_proj, q), (mlp.gate_up_proj, E)):
                product(x[width])
            mlp.down_proj(x[ffn])
        model.lm_head(x[E])

    return seconds_of(products, device, 20)


@torch.inference_mode()
def measure_generate(config: ModelConfig, runtime, repeats: int, options: dict) -> dict:
    tp_size = options["tensor_parallel_size"]
    if data_parallel_size(tp_size) > 1:
        raise ValueError(f"--tensor_parallel_size {tp_size}: must be the number of ranks of this run")
    check_divisible(config, tp_size)
    mode = options["quantize"]
    scheme = None if mode == "none" else Scheme(mode, options["group_size"] or 128)
    if scheme is not None:
        check_scheme(scheme, config, runtime.device, runtime.dtype, tp_size)
    tp = parallel_of(init_mesh(runtime.device, tp_size)).tp if tp_size > 1 else None
    pack = not runtime.compile and can_pack(runtime.device, runtime.dtype)
    model = random_inference_model(config, runtime.dtype, runtime.device, pack, scheme, tp)
    found = []
    for batch_size in options["sweep"] or [options["batch_size"]]:
        found.append(measure_batch(model, runtime, repeats, options | {"batch_size": batch_size}))
    rows = {}
    for result in found:
        line = "{tokens_per_second:,.1f} tok/s, {tokens_per_second_per_row:,.1f} a row, {ms_per_step:.2f} ms a step, "
        line += "first token after {first_token_ms:,.0f} ms, {mbu:.1%} of the copy's bandwidth"
        line += ", {compile_seconds:,.0f} s to compile" if runtime.compile else ""
        line += ", products alone {products_ms:.2f} ms" if "products_ms" in result else ""
        rows[f"batch {result['batch_size']}"] = line.format(**result)
    best = max(found, key=lambda result: result["tokens_per_second"])
    return best | {"rows": rows, "batches": found}


def measure_batch(model: Transformer, runtime, repeats: int, options: dict) -> dict:
    """The figures of one batch size, medians over the repeats, after a run that does not count."""
    sizes, batch_size = work(options), options["batch_size"]
    prompts = [torch.randint(3, model.config.vocab_size, (prompt_len,)).tolist() for prompt_len, _ in sizes]
    requests = [Request(i, 0, prompt, new) for i, (prompt, (_, new)) in enumerate(zip(prompts, sizes))]
    max_seq_len = max(map(sum, sizes))
    options_of_engine = {"num_slots": batch_size, "max_seq_len": max_seq_len, "compile": runtime.compile}
    engine = Engine(model, SamplingParams(), **options_of_engine)
    results, compile_seconds = [], 0.0
    for _ in range(repeats + 1):
        engine.reset_stats()
        first, start = math.inf, time.perf_counter()

        def on_token(request: Request, token: int) -> None:
            nonlocal first
            first = min(first, time.perf_counter())

        for _ in engine.generate(requests, on_token):
            pass
        seconds = time.perf_counter() - start
        compile_seconds += engine.compile_seconds
        read = engine.num_steps * weight_bytes(model) + engine.cache_bytes_read
        decode = max(engine.decode_seconds, 1e-9)
        step = 1e3 * engine.decode_seconds / max(engine.num_steps, 1)
        results.append((sum(new for _, new in sizes) / seconds, read / decode, step, 1e3 * (first - start)))
    rate, bandwidth, step, first = (statistics.median(column) for column in zip(*results[1:]))
    found = {
        "batch_size": batch_size,
        "tokens_per_second": rate,
        "tokens_per_second_per_row": rate / batch_size,
        "ms_per_step": step,
        "first_token_ms": first,
        "bytes_per_second": bandwidth,
        "mbu": bandwidth / options["bandwidth"],  # of this rank
        "compile_seconds": compile_seconds,
    }
    if runtime.device.type == "cpu" and model.parallel.tp is None:
        found["products_ms"] = 1e3 * products_seconds(model, batch_size, runtime.device)
    return found
