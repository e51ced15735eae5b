"""Tensor parallelism: how parameters are sharded, and the collectives, called explicitly in the forward.

- the layers compute on local tensors; `enter_parallel` and `leave_parallel` (Megatron's f and g, Shoeybi et al. 2019,
  arXiv 1909.08053) are the only communication of a block; with one rank, or tp = None, they are the identity
- trained weights are DTensors (FSDP2 and checkpoints need the global shape), inference weights plain local shards;
  `local` gives the tensor to compute with in either case
- embedding and head are sharded over the vocabulary: models/vocab_parallel.py

`tp` is always the 1-D DeviceMesh of the tensor-parallel ranks, or None for one rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from models.common import at_least_one, flag

# torch 2.13 deprecates the *_tensor names for *_single ones, which 2.12 and older lack
_gather_single = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_scatter_single = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor

# Weights sharded in dimension 0, or in dimension 1; a row-parallel layer's bias and the norms are whole on every rank.
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
ROW_PARALLEL = ("o_proj", "down_proj")


def rounds_alike(args: object) -> bool:
    """Whether quantised weights are the same for any number of ranks: not int4 in groups fitted to a rank's part."""
    modes = [getattr(args, name, None) for name in ("quantize", "quantize_ref", "quantize_reward")]
    return "int4" not in modes or args.group_size is not None


@dataclass(frozen=True, kw_only=True)
class TensorParallelArgs:
    """How one model is spread over ranks."""

    tensor_parallel_size: int = flag(
        1, bounds=at_least_one, help="ranks that share the model, adjacent under torchrun", may_change=rounds_alike
    )


def shard_dim(name: str) -> int | None:
    """The dimension of parameter `name` ("layers.0.self_attn.q_proj.weight") that is sharded over tp ranks, or None."""
    layer, _, kind = name.rpartition(".")
    layer, is_input_factor = layer.rpartition(".")[2], kind.startswith("lora_A")  # of models/lora.py
    if layer in COLUMN_PARALLEL:
        return None if is_input_factor else 0
    return 1 if layer in ROW_PARALLEL and (kind == "weight" or is_input_factor) else None


def chunk_range(size: int, index: int, num_chunks: int) -> tuple[int, int]:
    """[start, end) of chunk `index` when torch.chunk (so DTensor) cuts `size` rows; the last may be short or empty."""
    step = -(-size // num_chunks)
    return min(size, index * step), min(size, (index + 1) * step)


def own_chunk(size: int, ranks: DeviceMesh | None) -> tuple[int, int]:
    """chunk_range() of this rank in a 1-D mesh."""
    return (0, size) if ranks is None else chunk_range(size, ranks.get_local_rank(), ranks.size())


def tensor_parallel_part(name: str, shape: tuple[int, ...], tp: DeviceMesh | None) -> tuple[slice, ...]:
    """The part of the whole parameter `name` that this tp rank holds, a slice for each dimension."""
    cut = shard_dim(name)
    return tuple(slice(*own_chunk(n, tp if dim == cut else None)) for dim, n in enumerate(shape))


def size_of(tp: DeviceMesh | None) -> int:
    return 1 if tp is None else tp.size()


class Parallel(NamedTuple):
    """How one model is sharded: the mesh of its tensor-parallel ranks (None: one rank), and whether the tokens between
    the parallel layers are sharded as well."""

    tp: DeviceMesh | None = None
    sequence_parallel: bool = False


def local(parameter: Tensor, partial_grad: bool = False) -> Tensor:
    """The tensor to compute with. partial_grad: a whole weight's gradient is the sum of the ranks' gradients."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial()] if partial_grad else None)


def whole(parameter: Tensor) -> Tensor:
    """The whole parameter, gathered if it is sharded: a collective. An offloaded parameter is gathered by the GPUs, not
    by the CPUs."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    return parameter.detach().to(parameter.device_mesh.device_type).full_tensor()


def all_reduce(x: Tensor, tp: DeviceMesh, operation: str = "sum") -> Tensor:
    """The sum (or "max") of the ranks' x."""
    # waits here: an asynchronous result that enters a compiled region silently loses its gradient (torch 2.13)
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), operation, tp))


def all_gather(x: Tensor, dim: int, tp: DeviceMesh) -> Tensor:
    """The ranks' x, end to end along dim."""
    return funcol.wait_tensor(_gather_single(x.contiguous(), dim % x.dim(), tp))


def _identity(x: Tensor, tp: DeviceMesh) -> Tensor:
    return x


def _gather_tokens(x: Tensor, tp: DeviceMesh) -> Tensor:
    return all_gather(x, 1, tp)


def _sum_and_scatter_tokens(x: Tensor, tp: DeviceMesh) -> Tensor:
    return funcol.wait_tensor(_scatter_single(x.contiguous(), "sum", 1, tp))


def _own_tokens(x: Tensor, tp: DeviceMesh) -> Tensor:
    return x.chunk(tp.size(), dim=1)[tp.get_local_rank()].contiguous()


def _collective(of_values: Callable, of_gradient: Callable) -> type[torch.autograd.Function]:
    """An autograd function: apply(x, tp) computes of_values(x, tp), its backward of_gradient(grad, tp)."""

    class Collective(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, tp: DeviceMesh) -> Tensor:
            ctx.tp = tp
            return of_values(x, tp)

        @staticmethod
        def backward(ctx, grad: Tensor):
            return of_gradient(grad, ctx.tp), None

    return Collective


_Copy = _collective(_identity, all_reduce)
_Sum = _collective(all_reduce, _identity)
_GatherTokens = _collective(_gather_tokens, _sum_and_scatter_tokens)
_SumAndScatterTokens = _collective(_sum_and_scatter_tokens, _gather_tokens)
_WholeTokens = _collective(_gather_tokens, _own_tokens)


def enter_parallel(x: Tensor, parallel: Parallel) -> Tensor:
    """Before column-parallel layers: every rank gets the whole x, and the ranks' gradients of x are summed.

    x [B, T, E], or [B, T / tp, E] under sequence parallelism.
    """
    tp, sequence_parallel = parallel
    if size_of(tp) == 1:
        return x
    return _GatherTokens.apply(x, tp) if sequence_parallel else _Copy.apply(x, tp)


def leave_parallel(x: Tensor, parallel: Parallel) -> Tensor:
    """After a row-parallel layer: the ranks' parts of x [B, T, E] are summed; under sequence parallelism each rank
    keeps its tokens, [B, T / tp, E]."""
    tp, sequence_parallel = parallel
    if size_of(tp) == 1:
        return x
    return _SumAndScatterTokens.apply(x, tp) if sequence_parallel else _Sum.apply(x, tp)


def sum_parts(y: Tensor, bias: Tensor | None, parallel: Parallel) -> Tensor:
    """The output of a row-parallel layer from the ranks' parts: the bias is added once, to the sum."""
    y = leave_parallel(y, parallel)
    return y if bias is None else y + local(bias, partial_grad=parallel.sequence_parallel).to(y.dtype)


def whole_sequence(x: Tensor, parallel: Parallel) -> Tensor:
    """Ends sequence parallelism: [B, T / tp, E] -> [B, T, E], from which all ranks must compute the same."""
    tp, sequence_parallel = parallel
    return _WholeTokens.apply(x, tp) if sequence_parallel and size_of(tp) > 1 else x


def gather_ranks(x: Tensor, tp: DeviceMesh) -> Tensor:
    """x [n, k] of each rank, in the order of the ranks: [n, tp, k]; for inference (no gradient)."""
    return all_gather(x[:, None], 1, tp)
