"""The job `memory` of scripts/benchmark.py: computes the memory of a training run on each rank, for any layout, or of a
quantised model; with --measure compares it with the memory used on this machine."""

import gc
import itertools
import json
import os
from dataclasses import dataclass

import torch

from models.common import (
    Runtime,
    RuntimeArgs,
    at_least_one,
    card,
    choose_runtime,
    flag,
    peak_memory,
    refuse_idle,
    say,
)
from models.config import ModelConfig
from models.fsdp import ParallelArgs, clip_grad_norm, reducing_gradients
from models.lora import Lora
from models.qlinear import Scheme
from models.quantize import QuantizeArgs, check_scheme, rounding_scheme
from models.vocab_parallel import CHUNK_TOKENS
from scripts.benchmark_common import AnswerArgs, JobArgs, LayoutArgs, PresetArgs
from scripts.benchmark_generate import random_model
from scripts.benchmark_training import AdapterArgs, RecomputeArgs, sharded_model
from scripts.workload import counted, random_ids, sized, token_bytes
from training.losses import token_cross_entropy
from training.optim import OptimArgs, make_optimizer


@dataclass(frozen=True, kw_only=True)
class MemoryArgs(JobArgs, PresetArgs, LayoutArgs, RecomputeArgs, AdapterArgs, AnswerArgs, QuantizeArgs, RuntimeArgs):
    """Computes the memory of a training run, or of a quantised model."""

    dtype: str | None = "bfloat16"
    compile: bool | None = False
    batch_size: int = flag(8, bounds=at_least_one, help="rows per micro-batch")
    seq_len: int = flag(512, bounds=at_least_one, help="tokens of each row")
    slots: int = flag(32, bounds=at_least_one, help="with --lora_r: answers that PPO and GRPO draw at a time")
    measure: bool = flag(False, help="also run it with random weights, and print the measured bytes")


def main(args: MemoryArgs) -> None:
    if args.quantize != "none":
        of_training = ("layouts", "activation_checkpointing", "batch_size", "seq_len", "lora_r", "quantize_base")
        refuse_idle(args, "beside --quantize, which is for a model that is not trained", *of_training)
    if args.lora_r is None:
        refuse_idle(args, "without --lora_r", "slots", "prompt_len", "new_tokens")
    if args.quantize != "int4":
        refuse_idle(args, "without --quantize int4", "group_size")
    report_memory(args) if args.quantize == "none" else report_quantized_memory(args)


def training_memory(
    config: ModelConfig,
    *,
    dp: int,
    tp: int,
    tokens: int,
    recompute: str = "none",
    compute_bytes: int = 2,
    on_cpu: bool = False,
) -> dict[str, float]:
    """Computes bytes on each rank, by purpose, at the peak of a step of several micro-batches of `tokens` tokens.

    Counts fp32 weights, gradients and AdamW moments; embedding and head, gathered throughout; two gathered blocks at a
    time; the activations that eager layers keep (models/products.py), with a fused attention. The peak is in the loss,
    in the backward of the last block, or in the reduction of the gradients of embedding and head. on_cpu: the backward
    of a block does not overlap with the reduction of the block before.
    """
    E, F, c = config.hidden_size, config.intermediate_size, compute_bytes
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    table = config.vocab_size * E / tp
    root = (2 - config.tie_word_embeddings) * table + E
    block = (2 * E * (q + kv) + 3 * E * F + config.qkv_bias * (q + 2 * kv)) / tp + 2 * E
    block += config.qk_norm * 2 * config.head_dim + config.attention_bias * E
    shard = (config.num_hidden_layers * block + root) / dp

    kept, of_loss, widest = activations(config, tp, tokens, recompute, c)
    loss = of_loss + (4 + c) * table  # with the head's gradient
    reduction = c + (4 if dp > 1 else c) + 4 / dp  # a whole gradient, its fp32 copy for the reduction, the result
    overlapping = (widest, reduction * block)
    backward = (max if on_cpu else sum)(overlapping) + 2 * c * block + c * table
    return {
        "parameters": 4 * shard,
        "gradients": 4 * shard,
        "AdamW moments": 8 * shard,
        "embedding and head, gathered": c * root,
        "activations": kept,
        "at the peak": max(loss, backward, reduction * root - kept),
    }


def activations(
    config: ModelConfig, tp: int, tokens: int, recompute: str, c: int, lora_r: int = 0
) -> tuple[float, float, float]:
    """Returns (bytes of activations kept for the backward, additional bytes in the loss, additional bytes in a block's
    backward) of `tokens` tokens; c: bytes per element of the compute dtype."""
    if recompute == "selective":
        raise ValueError("--activation_checkpointing selective: memory is computed for none and full only; choose one")
    E, F, H = config.hidden_size, config.intermediate_size, config.num_attention_heads
    q, kv = H * config.head_dim, config.num_key_value_heads * config.head_dim
    norm = c * E + 4  # its input, and the reciprocal of the root mean square
    whole = 2 * norm + (2 * c * (q + kv) + 4 * H + 2 * c * F) / tp  # norms; q, k, v, attention, its log-sums; the MLP
    whole += config.qk_norm * (c + 4 / config.head_dim) * (q + kv) / tp  # q and k before their norms
    whole += 7 * lora_r * c  # the adapters' projections
    kept = tokens * (config.num_hidden_layers * {"none": whole, "full": c * E}[recompute] + norm)
    logits = min(tokens, CHUNK_TOKENS) * config.vocab_size / tp * (c if c == 4 else c + 4)
    widest = tokens * (3 * c * F / tp + 2 * c * E + (whole if recompute == "full" else 0))
    return kept, logits + 2 * c * tokens * E, widest


def lora_memory(
    config: ModelConfig, lora: Lora, *, dp: int, tp: int, tokens: int, recompute: str = "none", compute_bytes: int = 2
) -> dict[str, float]:
    """training_memory for LoRA adapters in all linear layers of the blocks. The base is sharded in the compute dtype or
    quantised and whole on every dp rank; only adapters have gradients and AdamW moments, all fp32. One quantised weight
    is dequantised at a time, with two temporaries of its size. Frozen weights that dp ranks share are gathered."""
    E, F, c, L = config.hidden_size, config.intermediate_size, compute_bytes, config.num_hidden_layers
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    kept, of_loss, widest = activations(config, tp, tokens, recompute, c, lora.r)
    shapes = [(E, q), (E, kv), (E, kv), (q, E), (E, F), (E, F), (F, E)]
    weights, adapters = L * sum(K * N for K, N in shapes), L * lora.r * sum(K + N for K, N in shapes)
    others = config.num_parameters() - weights
    if lora.scheme is None:
        base, gathered, dequantised = c * weights / (dp * tp), (dp > 1) * 2 * c * weights / L / tp, 0
    else:
        beside = 16 * (1 + lora.scheme.has_minima)  # bits of a scale, or of a scale and a minimum
        bits = lora.scheme.bits + (beside / lora.scheme.group_size if lora.scheme.group_size else 0)
        base, gathered, dequantised = weights * bits / 8 / tp, 0, 3 * c * E * F / tp
    root = c * ((2 - config.tie_word_embeddings) * config.vocab_size * E / tp + E)
    return {
        "base": base + c * others / (dp * tp),
        "adapters, gradients, AdamW moments": 16 * adapters / (dp * tp),
        "embedding and head, gathered": (dp > 1) * root,
        "activations": kept,
        "at the peak": max(of_loss, widest + gathered + dequantised),
    }


def sampling_memory(config: ModelConfig, args: MemoryArgs, tp: int, compute_bytes: int) -> dict[str, float]:
    """Bytes that PPO and GRPO need beside the policy: the merged copy that draws answers, and its cache."""
    length = args.prompt_len + args.new_tokens
    return {
        "copy that draws": compute_bytes * config.num_parameters() / tp,
        f"cache of {args.slots} x {length} tokens": args.slots * length * token_bytes(config, compute_bytes, tp),
    }


def report_memory(args: MemoryArgs) -> None:
    """Prints training_memory or lora_memory for each layout; with --measure also the bytes that this rank used."""
    config, recompute, runtime = args.config, args.activation_checkpointing, choose_runtime(args)
    world, number_bytes = int(os.environ.get("WORLD_SIZE", 1)), runtime.dtype.itemsize
    layouts, on_cpu = args.layouts or [(world, 1)], args.measure and runtime.device.type == "cpu"
    lora = args.lora(config)
    setting = f"{args.batch_size} x {args.seq_len} tokens, recompute {recompute}"
    setting += "" if lora is None else f", LoRA of rank {args.lora_r}, base {args.quantize_base}"
    tables = []
    for dp, tp in layouts:
        config.check_divisible(tp)
        if args.measure and dp * tp != world:
            raise ValueError(f"--measure takes one layout, that of this run's {counted(world, 'rank')}")
        if on_cpu and dp > 1:  # gloo frees reduced tensors in a thread that the profiler does not see
            raise ValueError("--measure on the CPU counts correctly with dp 1 only")
        sizes = {"dp": dp, "tp": tp, "tokens": args.batch_size * args.seq_len, "recompute": recompute}
        sizes["compute_bytes"] = number_bytes
        table = training_memory(config, **sizes, on_cpu=on_cpu) if lora is None else lora_memory(config, lora, **sizes)
        table["sum"] = sum(table.values())
        rows = {name: sized(size) for name, size in table.items()}
        if args.measure:
            parallel = ParallelArgs(activation_checkpointing=recompute, tensor_parallel_size=tp)
            table["measured"] = measure_memory(config, runtime, parallel, (args.batch_size, args.seq_len), lora)
            off = table["sum"] / table["measured"] - 1
            rows["measured"] = f"{sized(table['measured'])}, the sum is {off:+.1%} off"
        elif lora is not None:
            drawing = sampling_memory(config, args, tp, number_bytes)
            rows |= {name: f"{sized(size)}, of PPO and GRPO" for name, size in drawing.items()}
            rows["PPO or GRPO"] = sized(table["sum"] + sum(drawing.values()))
        tables.append(table)
        say(card(f"memory of {args.preset}, dp {dp} x tp {tp}, {setting}", rows))
    say(json.dumps({"job": "memory", "preset": args.preset, "layouts": layouts, "bytes": tables}))


def measure_memory(
    config: ModelConfig, runtime: Runtime, parallel: ParallelArgs, shape: tuple[int, int], lora: Lora | None = None
) -> int:
    """Returns the peak of bytes allocated on this rank in two optimizer steps of two micro-batches each."""

    def train() -> None:
        model = sharded_model(config, parallel, runtime, lora=lora)
        optimizer = make_optimizer(model, OptimArgs(learning_rate=1e-5))
        ids = random_ids(config.vocab_size, *shape).to(runtime.device)
        vocabulary = {"vocab_size": config.vocab_size, "tp": model.parallel.tp}
        for _ in range(2):
            for rows in reducing_gradients(model, [ids, ids], every=True):
                token_cross_entropy(model(rows), model.lm_head.weight, rows, **vocabulary).backward()
            clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    if runtime.device.type == "cuda":
        train()
        return torch.cuda.max_memory_allocated(runtime.device)
    gc.collect()  # garbage freed during the measurement would count as negative
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def quantized_memory(config: ModelConfig, scheme: Scheme, dtype: torch.dtype) -> dict[str, float]:
    """Computes bytes of a model with quantised blocks, by purpose, without the KV cache."""
    E, q = config.hidden_size, config.num_attention_heads * config.head_dim
    kv, ffn, L = config.num_key_value_heads * config.head_dim, config.intermediate_size, config.num_hidden_layers
    rows, weights = L * (q + 2 * kv + 2 * E + 2 * ffn), L * (2 * E * (q + kv) + 3 * E * ffn)
    biases = L * (config.qkv_bias * (q + 2 * kv) + config.attention_bias * E + config.mlp_bias * (2 * ffn + E))
    return {
        "integers": weights * (0.5 if scheme.mode == "int4" else 1),
        "scales": dtype.itemsize * (2 * weights / scheme.group_size if scheme.mode == "int4" else rows),
        "embedding and head": dtype.itemsize * (2 - config.tie_word_embeddings) * config.vocab_size * E,
        "norms and biases": dtype.itemsize * ((2 * L + 1) * E + config.qk_norm * 2 * L * config.head_dim + biases),
    }


def report_quantized_memory(args: MemoryArgs) -> None:
    """Prints quantized_memory; with --measure also the bytes of such a model, and the growth of this process's peak
    memory while building it."""
    config = args.config
    scheme = rounding_scheme(args.quantize, args.group_size, config)
    runtime = choose_runtime(args)
    check_scheme(scheme, config, runtime.device, runtime.dtype, 1, named="--quantize ")
    sizes = quantized_memory(config, scheme, runtime.dtype)
    sizes["sum"] = sum(sizes.values())
    rows = {name: sized(size) for name, size in sizes.items()}
    if args.measure:
        before = peak_memory(runtime.device)
        model = random_model(config, runtime, scheme)
        storages = {x.data_ptr(): x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers())}
        sizes["measured"], sizes["peak"] = sum(storages.values()), peak_memory(runtime.device) - before
        rows["measured"] = f"{sized(sizes['measured'])}, {sizes['measured'] / sizes['sum'] - 1:+.1%}"
        rows["peak"] = f"{sized(sizes['peak'])} while building it"
    say(card(f"memory of {args.preset}, {scheme}, {runtime.dtype}", rows))
    say(json.dumps({"job": "memory", "preset": args.preset, "scheme": str(scheme), "bytes": sizes}))
