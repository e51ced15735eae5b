"""What the jobs of scripts/benchmark.py that train have in common: a model of random weights, and whole steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.common import Runtime, flag
from models.fsdp import ParallelArgs, clip_grad_norm, init_mesh, parallel_of, shard_model
from models.model import ModelConfig, Transformer
from scripts.benchmark_common import seconds_of
from training.optim import OptimArgs, make_optimizer


@dataclass(frozen=True, kw_only=True)
class RecomputeArgs:
    """Memory of a step."""

    activation_checkpointing: str = flag("none", choices=("none", "full", "selective"), help="recompute in steps")

    def parallel(self) -> ParallelArgs:
        """How the training scripts would be told."""
        return ParallelArgs(activation_checkpointing=self.activation_checkpointing)


@dataclass(frozen=True, kw_only=True)
class TrainedArgs(RecomputeArgs):
    """What is trained, and how it is stored."""

    param_dtype: str = flag("float32", choices=("float32", "bfloat16"), help="of the trained weights")
    optim: str = flag("adamw", choices=("adamw", "adamw_8bit"), help="the optimizer")

    def parallel(self) -> ParallelArgs:
        return ParallelArgs(activation_checkpointing=self.activation_checkpointing, param_dtype=self.param_dtype)

    def optimizer(self) -> OptimArgs:
        return OptimArgs(learning_rate=1e-5, optim=self.optim)


def sharded_model(
    config: ModelConfig, args: ParallelArgs, runtime: Runtime, param_dtype: torch.dtype | None = None
) -> Transformer:
    """A model of random weights on the ranks of this run, as the training scripts have it."""
    mesh = init_mesh(runtime.device, args.tensor_parallel_size)
    with torch.device("meta"):
        model = Transformer(config, runtime.dtype, parallel_of(mesh))
    shard_model(model, mesh, args, runtime, param_dtype)
    model.to_empty(device=runtime.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(0.0, 0.02)
    model.reset_buffers(runtime.device)
    return model


def seconds_of_step(
    model: Transformer, args: TrainedArgs, loss_of: Callable[[], torch.Tensor], runtime: Runtime, repeats: int
) -> float:
    """Seconds of forward, backward, clipping and update, the median after a step that does not count."""
    optimizer = make_optimizer(model, args.optimizer(), compile=runtime.compile)

    def step() -> None:
        loss_of().backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return seconds_of(step, runtime.device, repeats)
