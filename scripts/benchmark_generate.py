"""The job `generate` of scripts/benchmark.py: speed of the generation engine for one or several batch sizes, in any
precision of the weights, over tensor-parallel ranks."""

import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from models.common import Runtime, at_least_one, flag, refuse_idle, short_bar
from models.config import ModelConfig
from models.decode import can_pack, to_inference, weight_bytes
from models.fsdp import data_parallel_size, init_mesh, parallel_of
from models.generation import Engine, Request
from models.model import Transformer
from models.qlinear import MODES, Scheme
from models.quantize import QuantizeArgs, check_scheme, quantize_in_place, rounding_scheme
from models.sampling import SamplingParams
from models.tp import Parallel, TensorParallelArgs, size_of, tensor_parallel_part
from scripts import peer_llama_cpp, peer_transformers, peer_vllm
from scripts.benchmark_common import AnswerArgs, PeerArgs, SpeedArgs, ceilings, run_speed_job, seconds_of
from scripts.workload import counted, ragged_sizes, random_ids, token_bytes

PEERS = {
    "transformers": peer_transformers.generate,
    "generate_batch": peer_transformers.generate_batch,
    "vllm": peer_vllm.generate,
    "llama_cpp": peer_llama_cpp.generate,
}


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(SpeedArgs, AnswerArgs, PeerArgs, QuantizeArgs, TensorParallelArgs):
    """Measures the speed of the generation engine, with random weights."""

    batch_size: int = flag(8, bounds=at_least_one, help="number of slots")
    sweep: list[int] = flag((), nargs="*", bounds=at_least_one, help="batch sizes to measure one after the other")
    ragged: int | None = flag(
        None, bounds=at_least_one, help="serve N ragged requests, with 1/4 to 7/4 of --prompt_len and --new_tokens"
    )
    precisions: list[str] = flag(
        (),
        choices=("none", *MODES),
        help="values of --quantize to measure alternately, with speeds as ratios to the first",
    )
    engine: str = flag("ours", choices=("ours", *PEERS), help="engine to run")
    peer: str = flag("transformers", choices=PEERS, help="with --compare: engine to alternate with")
    llama_cpp_gguf: Path | None = flag(None, help="GGUF file for the peer llama_cpp to run")
    weight_dtype: str | None = flag(
        None,
        choices=("float32", "bfloat16"),
        help="dtype to round the random weights to, as if a folder stored them in it; default: --dtype",
    )

    def work(self) -> list[tuple[int, int]]:
        """Returns (tokens of the prompt, tokens to generate) of each row: equal for all rows, or --ragged rows."""
        if self.ragged:
            return ragged_sizes(self.ragged, self.prompt_len, self.new_tokens)
        return [(self.prompt_len, self.new_tokens)] * self.batch_size


def main(args: GenerateArgs) -> None:
    if args.precisions and (args.compare or args.quantize != "none"):
        raise ValueError("--precisions: replaces --quantize and --compare; leave them out")
    if "int4" not in (args.quantize, *args.precisions):
        refuse_idle(args, "without int4", "group_size")
    if args.engine != "ours":
        sweep = ["sweep"] if args.sweep else []  # --compare passes an empty --sweep with each batch size
        refuse_idle(args, f"with --engine {args.engine}", "precisions", "tensor_parallel_size", *sweep)
    if "llama_cpp" not in (args.engine, args.peer):
        refuse_idle(args, "without the peer llama_cpp", "llama_cpp_gguf")
    run_speed_job(args, generate_setting(args), measure_generate, PEERS)


def generate_setting(args: GenerateArgs) -> str:
    tokens = f"{args.prompt_len} + {args.new_tokens} tokens"
    if args.sweep:
        return f"sweep of {tokens}"
    if args.ragged:
        return f"{counted(args.ragged, 'ragged prompt')} of about {tokens}, {counted(args.batch_size, 'slot')}"
    return f"{counted(args.batch_size, 'slot')}, {tokens}"


def random_inference_model(config: ModelConfig, runtime: Runtime, *more) -> Transformer:
    """Returns the inference copy of random_model(config, runtime, *more)."""
    return to_inference(random_model(config, runtime, *more), pack=can_pack(runtime))


@torch.no_grad()
def random_model(
    config: ModelConfig,
    runtime: Runtime,
    scheme: Scheme | None = None,
    tp: DeviceMesh | None = None,
    weight_dtype: torch.dtype | None = None,
) -> Transformer:
    """Builds a model with random weights, or this tp rank's part of it, each block quantised before the next one is
    allocated. weight_dtype: rounds the weights to this dtype, if it is not that of the computation."""
    device, dtype, _ = runtime
    with torch.device("meta"):
        model = Transformer(config, dtype, Parallel(tp))

    def fill(module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            part = tensor_parallel_part(name, tuple(parameter.shape), tp)
            values = torch.empty([s.stop - s.start for s in part], dtype=dtype, device=device)
            values = values.fill_(1.0) if "norm" in name else values.normal_(0.0, 0.02)
            values = values.to(weight_dtype or dtype).to(dtype)
            setattr(module.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=False))

    for block in short_bar(model.layers, "drawing weights", "block"):
        fill(block)
        if scheme is not None:
            quantize_in_place(block, scheme)
    blocks, model.layers = model.layers, nn.ModuleList()
    fill(model)
    model.layers = blocks
    model.tie_weights()
    model.reset_buffers(device)
    return model


def products_seconds(model: Transformer, batch_size: int, device: torch.device) -> float:
    """Measures the seconds of a decode step's matrix products alone, one after the other."""
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
def measure_generate(args: GenerateArgs, runtime: Runtime) -> dict:
    tp_size, config = args.tensor_parallel_size, args.config
    if data_parallel_size(tp_size) > 1:
        raise ValueError(f"--tensor_parallel_size {tp_size}: must be the number of ranks of this run")
    config.check_divisible(tp_size)
    modes, flag = (args.precisions, "--precisions") if args.precisions else ([args.quantize], "--quantize")
    schemes = {}
    for mode in modes:
        group_size = args.group_size if mode == "int4" else None
        schemes[mode] = None if mode == "none" else rounding_scheme(mode, group_size, config, tp_size, flag)
    for scheme in filter(None, schemes.values()):
        check_scheme(scheme, config, runtime.device, runtime.dtype, tp_size, named=f"{flag} ")
    tp = parallel_of(init_mesh(runtime.device, tp_size)).tp if tp_size > 1 else None
    stored = None if args.weight_dtype is None else getattr(torch, args.weight_dtype)
    models = {mode: random_inference_model(config, runtime, scheme, tp, stored) for mode, scheme in schemes.items()}
    batches = []
    for batch_size in args.sweep or [args.batch_size]:
        batches += measure_batch(models, replace(args, batch_size=batch_size), runtime)
    rows = {}
    for result in batches:
        line = "{tokens_per_second:,.1f} tok/s, {tokens_per_second_per_row:,.1f} a row, {ms_per_step:.2f} ms a step, "
        line += "first token after {first_token_ms:,.0f} ms, {mbu:.1%} of the copy's bandwidth"
        line += ", {compile_seconds:,.0f} s to compile" if runtime.compile else ""
        line += ", products alone {products_ms:.2f} ms" if "products_ms" in result else ""
        title = f"batch {result['batch_size']}"
        if args.precisions:
            title += f", {result['quantize']}"
            line += f", speed / {modes[0]} " + ", ".join(f"{ratio:.2f}" for ratio in result["speed_ratios"])
        rows[title] = line.format(**result)
    best, title = max(zip(batches, rows), key=lambda each: each[0]["tokens_per_second"])
    bits = f"{best['bits']:.1f} bits a weight in memory"
    of = f"; the fastest, {title}" if len(batches) > 1 else ""
    return {**best, "rows": rows | {"weights": bits}, "batches": batches, "of": of}


def measure_batch(models: dict[str, Transformer], args: GenerateArgs, runtime: Runtime) -> list[dict]:
    """Measures one batch size in each precision: medians over the repeats, after a warm-up. The precisions alternate,
    and each run's rate is also given as a ratio to the first precision's rate in the same round."""
    sizes, batch_size = args.work(), args.batch_size
    vocab_size = next(iter(models.values())).config.vocab_size
    prompts = [random_ids(vocab_size, prompt_len).tolist() for prompt_len, _ in sizes]
    requests = [Request(i, 0, prompt, new) for i, (prompt, (_, new)) in enumerate(zip(prompts, sizes))]
    options = {"num_slots": batch_size, "max_seq_len": max(map(sum, sizes)), "compile": runtime.compile}
    engines = {mode: Engine(model, SamplingParams(), **options) for mode, model in models.items()}
    bar = short_bar(range(args.repeats + 1), f"batch {batch_size}", "round")
    rounds = [{mode: run_once(engine, requests) for mode, engine in engines.items()} for _ in bar]
    results = []
    for mode, model in models.items():
        runs = [round[mode] for round in rounds]
        rate, bandwidth, step, first, _ = (statistics.median(column) for column in zip(*runs[1:]))
        result = {
            "batch_size": batch_size,
            "quantize": mode,
            "tokens_per_second": rate,
            "tokens_per_second_per_row": rate / batch_size,
            "ms_per_step": step,
            "first_token_ms": first,
            "bytes_per_second": bandwidth,
            "mbu": bandwidth / ceilings(runtime.device)[1],  # on this rank
            "bits": 8 * weight_bytes(model) / num_product_weights(model.config) * size_of(model.parallel.tp),
            "compile_seconds": sum(run.compile_seconds for run in runs),
            "speed_ratios": [round[mode].rate / next(iter(round.values())).rate for round in rounds[1:]],
        }
        if runtime.device.type == "cpu" and model.parallel.tp is None:
            result["products_ms"] = 1e3 * products_seconds(model, batch_size, runtime.device)
        results.append(result)
    return results


def num_product_weights(config: ModelConfig) -> int:
    """Number of weights in the matrix products of a decode step: those of the blocks and the head."""
    embedding = config.vocab_size * config.hidden_size
    return config.num_parameters() - (0 if config.tie_word_embeddings else embedding)


class Run(NamedTuple):
    rate: float  # tokens/s, prefill and decode
    bandwidth: float  # bytes of weights and cache that decode steps read per second
    step_ms: float
    first_token_ms: float
    compile_seconds: float


def run_once(engine: Engine, requests: list[Request]) -> Run:
    """Serves the requests. Forgets the cached prompts of the run before, so that every run computes them."""
    engine.pool.forget()
    engine.reset_stats()
    first, start = math.inf, time.perf_counter()

    def on_token(request: Request, token: int) -> None:
        nonlocal first
        first = min(first, time.perf_counter())

    for _ in engine.generate(requests, on_token):
        pass
    seconds = time.perf_counter() - start
    read = engine.num_steps * weight_bytes(engine.model) + cache_bytes(engine)
    bandwidth = read / max(engine.decode_seconds, 1e-9)
    step_ms = 1e3 * engine.decode_seconds / max(engine.num_steps, 1)
    rate = sum(request.max_new_tokens for request in requests) / seconds
    return Run(rate, bandwidth, step_ms, 1e3 * (first - start), engine.compile_seconds)


def cache_bytes(engine: Engine) -> float:
    """Bytes of cache that the decode steps had to read, counted in the dtype of the computation: a cache in a wider
    dtype must not raise the MBU."""
    model = engine.model
    of_token = token_bytes(model.config, model.dtype.itemsize, size_of(model.parallel.tp))
    return engine.cache_bytes_read / engine.rows.cache.bytes_per_token * of_token
