"""Shared by the jobs of scripts/benchmark.py that train: a model with random weights, and timed optimizer steps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from models.common import Runtime, at_least_one, flag
from models.compressed import linear_layers
from models.config import ModelConfig
from models.fsdp import ParallelArgs, clip_grad_norm, frozen_dtype, init_mesh, parallel_of, shard_model
from models.lora import Lora, LoraLinear, add_adapters
from models.model import Transformer
from models.qlinear import quantize
from models.tp import local, tensor_parallel_part
from models.trained_adapters import base_scheme
from scripts.benchmark_common import seconds_of
from training.optim import OptimArgs, make_optimizer


@dataclass(frozen=True, kw_only=True)
class RecomputeArgs:
    """Activation checkpointing."""

    activation_checkpointing: str = flag(
        "none", choices=("none", "full", "selective"), help="activations to recompute in the backward pass"
    )

    def parallel(self) -> ParallelArgs:
        return ParallelArgs(activation_checkpointing=self.activation_checkpointing)


@dataclass(frozen=True, kw_only=True)
class TrainedArgs(RecomputeArgs):
    """Trained weights and optimizer."""

    param_dtype: str = flag("float32", choices=("float32", "bfloat16"), help="dtype of the trained weights")
    optim: str = flag("adamw", choices=("adamw", "adamw_8bit"), help="optimizer")

    def parallel(self) -> ParallelArgs:
        return ParallelArgs(activation_checkpointing=self.activation_checkpointing, param_dtype=self.param_dtype)

    @property
    def setting(self) -> str:
        return f"{self.param_dtype} weights, {self.optim}, recompute {self.activation_checkpointing}"

    def optimizer(self) -> OptimArgs:
        return OptimArgs(learning_rate=1e-5, optim=self.optim)


@dataclass(frozen=True, kw_only=True)
class AdapterArgs:
    """LoRA adapters in all linear layers of the blocks, instead of training all weights."""

    lora_r: int | None = flag(None, bounds=at_least_one, help="rank of the adapters; default: no adapters")
    quantize_base: str = flag("none", choices=("none", "int8", "int4"), help="format of the adapters' frozen base")

    def lora(self, config: ModelConfig) -> Lora | None:
        """Returns adapters of rank --lora_r, or None."""
        if self.lora_r is None:
            if self.quantize_base != "none":
                raise ValueError("--quantize_base: quantises the base of adapters; give --lora_r too")
            return None
        layers = frozenset(linear_layers(config.num_hidden_layers))
        scheme = base_scheme(self.quantize_base)
        return Lora(self.lora_r, 2.0 * self.lora_r, False, 0.0, layers, scheme, {}, Path(), "", 0)


def sharded_model(
    config: ModelConfig,
    args: ParallelArgs,
    runtime: Runtime,
    param_dtype: torch.dtype | None = None,
    lora: Lora | None = None,
) -> Transformer:
    """Returns a model with random weights, sharded over the ranks of this run as in the training scripts."""
    mesh = init_mesh(runtime.device, args.tensor_parallel_size)
    with torch.device("meta"):
        model = Transformer(config, runtime.dtype, parallel_of(mesh))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if lora is not None:
            add_adapters(model, lora)
            param_dtype = frozen_dtype(args, runtime)
    shard_model(model, mesh, args, runtime, param_dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).normal_(0.0, 0.02)
        for name, layer in model.named_modules() if lora is not None and lora.scheme is not None else ():
            if isinstance(layer, LoraLinear):
                part = tensor_parallel_part(f"{name}.weight", shapes[f"{name}.weight"], mesh["tp"])
                N, K = (range_.stop - range_.start for range_ in part)
                layer.set_quantized(quantize(0.02 * torch.randn(N, K, device=runtime.device), lora.scheme))
    model.reset_buffers(runtime.device)
    return model


def figures_of_steps(
    model: Transformer,
    args: TrainedArgs,
    runtime: Runtime,
    loss_of: Callable[[], torch.Tensor],
    *,
    tokens: int,
    flops_per_token: float,
) -> dict:
    """Measures optimizer steps (forward, backward, clipping, update) of `tokens` tokens on each rank."""
    optimizer = make_optimizer(model, args.optimizer(), compile=runtime.compile)

    def step() -> None:
        loss_of().backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    rate = tokens / seconds_of(step, runtime.device, args.repeats)
    num_ranks = dist.get_world_size()
    of = f"; of each of {num_ranks} ranks" if num_ranks > 1 else ""
    return {"tokens_per_second": rate, "flops_per_second": rate * flops_per_token, "of": of}
