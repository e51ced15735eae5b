"""The jobs `sft` and `dpo` of scripts/benchmark.py: tokens/s of whole optimizer steps."""

from collections.abc import Callable

import torch

from models.fsdp import clip_grad_norm, init_mesh, parallel_of, shard_model
from models.model import ModelConfig, Transformer
from scripts.benchmark_common import seconds_of
from training.common import Runtime, training_flops_per_token
from training.data import IGNORE_INDEX, Example
from training.losses import dpo_loss, sequence_logps, token_cross_entropy, token_logps
from training.optim import make_optimizer
from training.preferences import Pair, collate_pairs


def sft_setting(options: dict) -> str:
    return "{batch_size} x {seq_len} tokens, recompute {activation_checkpointing}".format(**options)


def dpo_setting(options: dict) -> str:
    when = "before training" if options["precompute_ref"] else "in each step"
    rows = "{batch_size} x 2 x ({prompt_len} + {new_tokens}) tokens".format(**options)
    return f"{rows}, reference {when}, recompute {options['activation_checkpointing']}"


def sharded_model(config: ModelConfig, runtime: Runtime, tensor_parallel_size: int = 1, **options) -> Transformer:
    """A model of random weights on the ranks of this run, as the training scripts have it. options: of shard_model."""
    mesh = init_mesh(runtime.device, tensor_parallel_size)
    with torch.device("meta"):
        model = Transformer(config, runtime.dtype, parallel_of(mesh))
    shard_model(model, mesh, compute_dtype=runtime.dtype, compile=runtime.compile, **options)
    model.to_empty(device=runtime.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(0.0, 0.02)
    model.reset_buffers(runtime.device)
    return model


def random_model(config: ModelConfig, runtime: Runtime, recompute: str, tensor_parallel_size: int):
    """(a model of random weights, its optimizer), ready for training on the ranks of this run."""
    model = sharded_model(config, runtime, tensor_parallel_size, recompute=recompute)
    return model, make_optimizer(model, learning_rate=1e-5, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)


def seconds_of_step(model, optimizer, loss_of: Callable[[], torch.Tensor], runtime: Runtime, repeats: int) -> float:
    def step() -> None:
        loss_of().backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return seconds_of(step, runtime.device, repeats)


def measure_sft(config: ModelConfig, runtime, repeats: int, options: dict) -> dict:
    model, optimizer = random_model(config, runtime, options["activation_checkpointing"], tensor_parallel_size=1)
    shape = (options["batch_size"], options["seq_len"])
    ids = torch.randint(3, config.vocab_size, shape, device=runtime.device)
    tokens = ids.numel()

    def loss_of() -> torch.Tensor:
        return token_cross_entropy(model(ids), model.lm_head.weight, ids) / tokens

    rate = tokens / seconds_of_step(model, optimizer, loss_of, runtime, repeats)
    return {"tokens_per_second": rate, "flops_per_second": rate * training_flops_per_token(config, shape[1])}


def random_pairs(config: ModelConfig, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompts [B, T], chosen and rejected completions [B, 2, T])"""
    batch, prompt_len, new_tokens = (options[name] for name in ("batch_size", "prompt_len", "new_tokens"))
    prompts = torch.randint(3, config.vocab_size, (batch, prompt_len))
    return prompts, torch.randint(3, config.vocab_size, (batch, 2, new_tokens))


def measure_dpo(config: ModelConfig, runtime, repeats: int, options: dict) -> dict:
    pairs = []
    for prompt, sides in zip(*(ids.tolist() for ids in random_pairs(config, options))):
        rows = [Example(prompt + side, [IGNORE_INDEX] * len(prompt) + side) for side in sides]
        pairs.append(Pair(len(prompt), *rows))
    model, optimizer = random_model(config, runtime, options["activation_checkpointing"], tensor_parallel_size=1)
    reference = sharded_model(config, runtime, param_dtype=runtime.dtype).requires_grad_(False)

    def logps_of(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate_pairs(pairs, 0, runtime.device)
        logps, _ = token_logps(model(batch.input_ids), model.lm_head.weight, batch.labels)
        return sequence_logps(logps, batch.labels)

    @torch.no_grad()
    def reference_logps() -> torch.Tensor:
        return logps_of(reference)[0]

    known = None
    if options["precompute_ref"]:
        known, reference = reference_logps(), None

    def loss_of() -> torch.Tensor:
        logps, lengths = logps_of(model)
        ref_logps = reference_logps() if known is None else known
        return dpo_loss("sigmoid", *logps.chunk(2), *ref_logps.chunk(2), *lengths.chunk(2), beta=0.1).losses.mean()

    length = options["prompt_len"] + options["new_tokens"]
    rate = 2 * len(pairs) * length / seconds_of_step(model, optimizer, loss_of, runtime, repeats)
    flops = training_flops_per_token(config, length) * (1 if options["precompute_ref"] else 4 / 3)
    return {"tokens_per_second": rate, "flops_per_second": rate * flops}
