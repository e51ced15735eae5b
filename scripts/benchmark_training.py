"""The jobs `sft` and `dpo` of scripts/benchmark.py: tokens/s of whole optimizer steps."""

from collections.abc import Callable

import torch

from models.common import Runtime
from models.fsdp import ParallelArgs, clip_grad_norm, frozen_dtype, init_mesh, parallel_of, shard_model
from models.lora import Lora, LoraLinear, add_adapters
from models.model import ModelConfig, Transformer
from models.qlinear import quantize
from models.records import IGNORE_INDEX, Example, collate
from models.reward import Pair, pair_rows
from models.tp import tensor_parallel_part
from scripts.benchmark_common import BenchmarkArgs, seconds_of
from training.losses import DpoLossArgs, dpo_loss, sequence_logps, token_cross_entropy, token_logps
from training.optim import make_optimizer


def sft_setting(args: BenchmarkArgs) -> str:
    adapters = "" if args.lora_r is None else f", LoRA of rank {args.lora_r}, base {args.quantize_base}"
    return f"{args.batch_size} x {args.seq_len} tokens, recompute {args.activation_checkpointing}{adapters}"


def dpo_setting(args: BenchmarkArgs) -> str:
    when = "before training" if args.precompute_ref else "in each step"
    rows = f"{args.batch_size} x 2 x ({args.prompt_len} + {args.new_tokens}) tokens"
    return f"{rows}, reference {when}, recompute {args.activation_checkpointing}"


def sharded_model(
    config: ModelConfig,
    args: ParallelArgs,
    runtime: Runtime,
    param_dtype: torch.dtype | None = None,
    lora: Lora | None = None,
) -> Transformer:
    """A model of random weights on the ranks of this run, as the training scripts have it."""
    mesh = init_mesh(runtime.device, args.tensor_parallel_size)
    with torch.device("meta"):
        model = Transformer(config, runtime.dtype, parallel_of(mesh))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if lora is not None:
            add_adapters(model, lora)
            param_dtype = frozen_dtype(args, runtime)
    shard_model(model, mesh, args, runtime, param_dtype)
    model.to_empty(device=runtime.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(0.0, 0.02)
        for name, layer in model.named_modules() if lora is not None and lora.scheme is not None else ():
            if isinstance(layer, LoraLinear):
                shape = shapes[f"{name}.weight"]
                N, K = (part.stop - part.start for part in tensor_parallel_part(f"{name}.weight", shape, mesh["tp"]))
                layer.set_quantized(quantize(0.02 * torch.randn(N, K, device=runtime.device), lora.scheme))
    model.reset_buffers(runtime.device)
    return model


def seconds_of_step(model, optimizer, loss_of: Callable[[], torch.Tensor], runtime: Runtime, repeats: int) -> float:
    def step() -> None:
        loss_of().backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return seconds_of(step, runtime.device, repeats)


def measure_sft(args: BenchmarkArgs, runtime: Runtime, bandwidth: float) -> dict:
    config, parallel = args.config, ParallelArgs(activation_checkpointing=args.activation_checkpointing)
    model = sharded_model(config, parallel, runtime, lora=args.lora())
    optimizer = make_optimizer(model, args.optimizer())
    ids = torch.randint(3, config.vocab_size, (args.batch_size, args.seq_len), device=runtime.device)
    tokens = ids.numel()

    def loss_of() -> torch.Tensor:
        return token_cross_entropy(model(ids), model.lm_head.weight, ids) / tokens

    rate = tokens / seconds_of_step(model, optimizer, loss_of, runtime, args.repeats)
    return {"tokens_per_second": rate, "flops_per_second": rate * config.training_flops_per_token(args.seq_len)}


def random_pairs(args: BenchmarkArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompts [B, T], chosen and rejected completions [B, 2, T])"""
    prompts = torch.randint(3, args.config.vocab_size, (args.batch_size, args.prompt_len))
    return prompts, torch.randint(3, args.config.vocab_size, (args.batch_size, 2, args.new_tokens))


def measure_dpo(args: BenchmarkArgs, runtime: Runtime, bandwidth: float) -> dict:
    config, parallel = args.config, ParallelArgs(activation_checkpointing=args.activation_checkpointing)
    pairs = []
    for prompt, sides in zip(*(ids.tolist() for ids in random_pairs(args))):
        rows = [Example(prompt + side, [IGNORE_INDEX] * len(prompt) + side) for side in sides]
        pairs.append(Pair(len(prompt), *rows))
    model = sharded_model(config, parallel, runtime)
    optimizer = make_optimizer(model, args.optimizer())
    reference = sharded_model(config, ParallelArgs(), runtime, runtime.dtype).requires_grad_(False)

    def logps_of(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate(pair_rows(pairs), 0, runtime.device)
        logps, _ = token_logps(model(batch.input_ids), model.lm_head.weight, batch.labels)
        logps, lengths = sequence_logps(logps, batch.labels)
        return logps.view(2, -1), lengths.view(2, -1)

    @torch.no_grad()
    def reference_logps() -> torch.Tensor:
        return logps_of(reference)[0]

    known = None
    if args.precompute_ref:
        known, reference = reference_logps(), None

    def loss_of() -> torch.Tensor:
        logps, lengths = logps_of(model)
        return dpo_loss(DpoLossArgs(), logps, reference_logps() if known is None else known, lengths).losses.mean()

    length = args.prompt_len + args.new_tokens
    rate = 2 * len(pairs) * length / seconds_of_step(model, optimizer, loss_of, runtime, args.repeats)
    flops = config.training_flops_per_token(length) * (1 if args.precompute_ref else 4 / 3)
    return {"tokens_per_second": rate, "flops_per_second": rate * flops}
