"""Tensor parallelism: who is sharded how, and the collectives that stand in the forward where they happen.

- the layers compute on local tensors; `copy_to_ranks` and `sum_over_ranks` (Megatron's f and g, Shoeybi et al. 2019,
  arXiv 1909.08053) are the only communication of a block; with one rank, or tp = None, they are the identity
- trained weights are DTensors (FSDP2 and checkpoints need to know the whole), inference weights plain local shards;
  `local` gives the tensor to compute with in either case
- embedding and head are sharded over the vocabulary, which need not be divisible by the ranks; log-probs, entropy and
  sampling combine a few numbers per token; logits are gathered only for top-p without top-k
- the small sums of a decode step go through memory that the ranks' GPUs share, where there is such, instead of NCCL

`tp` is everywhere the 1-D DeviceMesh of the tensor-parallel ranks, or None for one rank.
"""

import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

# torch 2.13 deprecates the *_tensor names for *_single ones, which 2.12 and older lack
_gather_single = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_scatter_single = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor

# The dimension in which a layer's weight is cut; a row-parallel layer's bias and the norms are whole on every rank.
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
ROW_PARALLEL = ("o_proj", "down_proj")


def shard_dim(name: str) -> int | None:
    """The dimension of parameter `name` ("layers.0.self_attn.q_proj.weight") that is cut over tp ranks, or None."""
    layer, _, kind = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    if layer in COLUMN_PARALLEL:
        return 0
    return 1 if layer in ROW_PARALLEL and kind == "weight" else None


def chunk_range(size: int, index: int, num_chunks: int) -> tuple[int, int]:
    """[start, end) of chunk `index` when torch.chunk (and so DTensor) cuts `size` rows; the last ones may be short
    or empty."""
    step = -(-size // num_chunks)
    return min(size, index * step), min(size, (index + 1) * step)


def tensor_parallel_part(name: str, shape: tuple[int, ...], tp: DeviceMesh | None) -> tuple[slice, ...]:
    """The part of the whole parameter `name` that this tp rank holds, a slice for each dimension."""
    rank, size, cut = (0, 1, None) if tp is None else (tp.get_local_rank(), tp.size(), shard_dim(name))
    return tuple(slice(*chunk_range(n, rank, size)) if dim == cut else slice(0, n) for dim, n in enumerate(shape))


def is_main_rank() -> bool:
    """Whether this process is the one that prints and writes; true before torch.distributed starts, also."""
    return os.environ.get("RANK", "0") == "0"


def size_of(tp: DeviceMesh | None) -> int:
    return 1 if tp is None else tp.size()


class SharedMemory(NamedTuple):
    """A piece of each tp rank's GPU memory that the other ranks read directly. A small sum over the ranks is then one
    kernel: each rank writes its part and adds up all parts, in the same order on every rank."""

    memory: Tensor  # [elements], of the dtype that is summed
    group_name: str

    def takes(self, x: Tensor) -> bool:
        return x.dtype == self.memory.dtype and x.numel() <= self.memory.numel() and x.nbytes % 16 == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks of an x that it takes."""
        return _quick_sum(self.memory, x.contiguous(), self.group_name)


# An operator of its own, because the compiler knows torch's and gives it other memory (torch 2.13). The memory counts
# as untouched: nothing reads what a sum has left there.
@torch.library.custom_op("gpt_accelera::quick_sum", mutates_args=())
def _quick_sum(memory: Tensor, x: Tensor, group_name: str) -> Tensor:
    mine = memory[: x.numel()].view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(mine, x, "sum", group_name)


@_quick_sum.register_fake
def _(memory: Tensor, x: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(x)


SHARED_BYTES = 2**18  # the largest sum that goes this way; for larger ones bandwidth counts, and NCCL has more of it


class Parallel(NamedTuple):
    """How one model is spread: the mesh of its tensor-parallel ranks (None: one rank), whether the tokens between the
    parallel layers are spread as well, and, for inference, memory for quick sums."""

    tp: DeviceMesh | None = None
    sequence_parallel: bool = False
    shared: SharedMemory | None = None


def inference_parallel(tp: DeviceMesh | None, device: torch.device, dtype: torch.dtype | None) -> Parallel:
    """For a model that only computes forward, with activations of this dtype; a collective over tp."""
    return Parallel(tp, shared=share_memory(tp, device, dtype))


def share_memory(tp: DeviceMesh | None, device: torch.device, dtype: torch.dtype | None) -> SharedMemory | None:
    """Memory for quick sums over the tp ranks; None where there is none (CPUs, AMD, ranks of several hosts, GPUs that
    do not reach each other's memory) or where a trial gives a wrong sum. A collective over tp."""
    if size_of(tp) == 1 or device.type != "cuda" or torch.version.hip or dtype not in (torch.float32, torch.bfloat16):
        return None
    if not hasattr(torch.ops.symm_mem, "one_shot_all_reduce_copy"):
        return None
    hosts: list[str | None] = [None] * tp.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=tp.get_group())
    if len(set(hosts)) > 1:
        return None
    try:
        memory = symmetric_memory.empty(SHARED_BYTES // dtype.itemsize, dtype=dtype, device=device)
        symmetric_memory.rendezvous(memory, tp.get_group().group_name)
        shared = SharedMemory(memory, tp.get_group().group_name)
        works = _sums_rightly(shared, tp)
    except RuntimeError:
        shared, works = None, False
    if _all_reduce(torch.tensor(float(works), device=device), tp).item() < tp.size():
        return None
    torch._dynamo.mark_static_address(shared.memory)  # else CUDA graphs take a copy, which no other rank reaches
    return shared


def _sums_rightly(shared: SharedMemory, tp: DeviceMesh) -> bool:
    """Tries sums as a decode step has them, in a CUDA graph that is replayed; of small integers, exact in bf16."""
    ones = torch.arange(4096, device=shared.memory.device).remainder(4).to(shared.memory.dtype)
    x, wanted = torch.empty_like(ones), ones * sum(range(1, tp.size() + 1))
    shared.sum(x.zero_())  # what the first call sets up must not be in the graph
    torch.cuda.synchronize(x.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y = shared.sum(x)
    works = True
    for factor in (1, 2):
        x.copy_(ones * (factor * (tp.get_local_rank() + 1)))
        graph.replay()
        works = works and torch.equal(y, wanted * factor)
    return works


def local(parameter: Tensor, partial_grad: bool = False) -> Tensor:
    """The tensor to compute with. partial_grad: each rank contributes a part of the gradient of a whole weight."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial()] if partial_grad else None)


def _all_reduce(x: Tensor, tp: DeviceMesh, operation: str = "sum") -> Tensor:
    # Waited for here: an asynchronous result that enters a compiled region loses its gradient without a word (torch
    # 2.13).
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), operation, tp))


def _all_gather(x: Tensor, dim: int, tp: DeviceMesh) -> Tensor:
    return funcol.wait_tensor(_gather_single(x.contiguous(), dim % x.dim(), tp))


def _reduce_scatter(x: Tensor, dim: int, tp: DeviceMesh) -> Tensor:
    return funcol.wait_tensor(_scatter_single(x.contiguous(), "sum", dim, tp))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tp: DeviceMesh) -> Tensor:
        ctx.tp = tp
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_reduce(grad, ctx.tp), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tp: DeviceMesh) -> Tensor:
        return _all_reduce(x, tp)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tp: DeviceMesh) -> Tensor:
        ctx.tp = tp
        return _all_gather(x, 1, tp)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _reduce_scatter(grad, 1, ctx.tp), None


class _SumAndScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tp: DeviceMesh) -> Tensor:
        ctx.tp = tp
        return _reduce_scatter(x, 1, tp)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_gather(grad, 1, ctx.tp), None


class _WholeTokens(_GatherTokens):
    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.chunk(ctx.tp.size(), dim=1)[ctx.tp.get_local_rank()].contiguous(), None


def enter_parallel(x: Tensor, parallel: Parallel) -> Tensor:
    """Before column-parallel layers: every rank gets the whole x, and the ranks' gradients of x are summed.

    x [B, T, E], or [B, T / tp, E] under sequence parallelism.
    """
    tp, sequence_parallel, _ = parallel
    if size_of(tp) == 1:
        return x
    return _GatherTokens.apply(x, tp) if sequence_parallel else _Copy.apply(x, tp)


def leave_parallel(x: Tensor, parallel: Parallel) -> Tensor:
    """After a row-parallel layer: the ranks' parts of x [B, T, E] are summed; under sequence parallelism each rank
    keeps its tokens, [B, T / tp, E]."""
    tp, sequence_parallel, shared = parallel
    if size_of(tp) == 1:
        return x
    if shared is not None and shared.takes(x):
        return shared.sum(x)
    return _SumAndScatterTokens.apply(x, tp) if sequence_parallel else _Sum.apply(x, tp)


def whole_sequence(x: Tensor, tp: DeviceMesh | None) -> Tensor:
    """Ends sequence parallelism: [B, T / tp, E] -> [B, T, E] for what all ranks then compute alike."""
    return x if size_of(tp) == 1 else _WholeTokens.apply(x, tp)


def embed(ids: Tensor, weight: Tensor, vocab_size: int, tp: DeviceMesh | None) -> Tensor:
    """This rank's part of the embedding of ids: rows of other ranks' tokens are 0, so the sum over ranks is the whole.

    weight: the rank's rows of the [V, E] table.
    """
    if size_of(tp) == 1:
        return torch.nn.functional.embedding(ids, weight)
    start, end = chunk_range(vocab_size, tp.get_local_rank(), tp.size())
    mine = (ids >= start) & (ids < end)
    rows = torch.nn.functional.embedding(torch.where(mine, ids - start, 0), weight) if end > start else None
    if rows is None:  # more ranks than chunks of the vocabulary
        return weight.new_zeros(*ids.shape, weight.shape[1]) + 0 * weight.sum()
    return torch.where(mine[..., None], rows, torch.zeros_like(rows))


def pad_vocabulary(x: Tensor, vocab_size: int, tp: DeviceMesh | None, value: float) -> Tensor:
    """This rank's columns [..., V'] filled up to as many as the first rank has: the last ranks may have fewer."""
    missing = chunk_range(vocab_size, 0, size_of(tp))[1] - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing), value=value) if missing else x


def gather_vocabulary(logits: Tensor, vocab_size: int, tp: DeviceMesh | None) -> Tensor:
    """The whole logits [n, V] from each rank's part; for inference (no gradient)."""
    if size_of(tp) == 1:
        return logits
    return _all_gather(pad_vocabulary(logits, vocab_size, tp, -torch.inf), -1, tp)[:, :vocab_size]


def gather_ranks(x: Tensor, tp: DeviceMesh) -> Tensor:
    """x [n, k] of each rank, in the order of the ranks: [n, tp, k]; for inference (no gradient)."""
    return _all_gather(x[:, None], 1, tp)


CHUNK_TOKENS = 1024  # tokens whose logits exist at a time: [1024, V] in fp32 is 131 MB for V = 32000


def _own_targets(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """(column of each target in this rank's logits, 0 where another rank has it; whether this rank has it), [n, 1]
    each."""
    offsets = targets[:, None] - start
    mine = (offsets >= 0) & (offsets < size)
    return torch.where(mine, offsets, 0), mine


def _chunks(hidden: Tensor, num_columns: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(slice of the tokens, buffer for its logits in the compute dtype, the same in fp32) for chunk after chunk. Two
    buffers serve all of them: fresh ones of this size cost the CPU more than the arithmetic."""
    raw = hidden.new_empty(min(len(hidden), CHUNK_TOKENS), num_columns)
    logits = raw if hidden.dtype == torch.float32 else torch.empty_like(raw, dtype=torch.float32)
    for first in range(0, len(hidden), CHUNK_TOKENS):
        size = min(CHUNK_TOKENS, len(hidden) - first)
        part = raw[:size]
        yield slice(first, first + size), part, part if logits is raw else logits[:size]


def _logits_into(logits: Tensor, raw: Tensor, hidden: Tensor, weight: Tensor, temperature: float = 1.0) -> None:
    """logits = hidden @ weight.T / temperature in fp32, by way of raw in the compute dtype (the same tensor if that is
    fp32)."""
    torch.mm(hidden, weight.T, out=raw)
    if logits is not raw:
        logits.copy_(raw)
    if temperature != 1:
        logits.div_(temperature)


class _Exponentials(NamedTuple):
    """What is known of a chunk of n tokens beside its exponentials, [n, 1] each."""

    target: Tensor  # the target's logit
    logsumexp: Tensor
    partition: Tensor  # the softmax is the exponentials divided by this
    offsets: Tensor  # see _own_targets
    mine: Tensor


def _exponentiate(logits: Tensor, targets: Tensor, start: int, tp: DeviceMesh | None) -> _Exponentials:
    """Turns this rank's columns of logits [n, V / tp] into exp(logit - largest of the row over all ranks), in place."""
    offsets, mine = _own_targets(targets, start, logits.shape[1])
    largest, target = logits.new_full((len(logits), 1), -torch.inf), logits.new_zeros(len(logits), 1)
    if logits.shape[1]:
        largest = logits.amax(dim=-1, keepdim=True)
        target = torch.where(mine, logits.gather(-1, offsets), target)
    if size_of(tp) > 1:
        largest = _all_reduce(largest, tp, "max")
    partition = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    if size_of(tp) > 1:
        partition, target = _all_reduce(torch.stack((partition, target)), tp)
    return _Exponentials(target, largest + partition.log(), partition, offsets, mine)


class _CrossEntropySum(torch.autograd.Function):
    """Computes the loss chunk by chunk with its gradients, so that neither logits nor their gradients exist for more
    than one chunk, and nothing is computed twice."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, start: int, tp: DeviceMesh | None, needs_grad: bool
    ) -> Tensor:
        compute_weight = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for chunk, raw, logits in _chunks(hidden, len(weight)):
            h, t = hidden[chunk], targets[chunk]
            _logits_into(logits, raw, h, compute_weight)
            known = _exponentiate(logits, t, start, tp)
            total += (known.logsumexp - known.target).sum()
            if needs_grad:
                logits.div_(known.partition)  # the softmax, less 1 at the target
                if logits.shape[1]:
                    logits.scatter_add_(-1, known.offsets, -known.mine.float())
                if logits is not raw:
                    raw.copy_(logits)
                grad_hidden[chunk] = raw @ compute_weight
                grad_weight += raw.T @ h
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        return grad_hidden, (grad_weight * grad).to(ctx.weight_dtype), None, None, None, None


def _first_column(vocab_size: int | None, tp: DeviceMesh | None) -> int:
    return 0 if tp is None else chunk_range(vocab_size, tp.get_local_rank(), tp.size())[0]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int | None = None, tp: DeviceMesh | None = None
) -> Tensor:
    """Sum over tokens of the cross entropy of hidden @ weight.T (nats, an fp32 scalar, the same on all tp ranks).

    hidden [N, E], alike on all tp ranks; weight: this rank's rows of the [V, E] head; targets int64 [N]. No token: 0,
    with gradients 0.
    """
    hidden, weight = enter_parallel(hidden, Parallel(tp)), local(weight)
    start = _first_column(vocab_size, tp)
    # decided here, since grad mode is off inside forward and requires_grad stays true under no_grad
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _CrossEntropySum.apply(hidden, weight, targets, start, tp, needs_grad)


class _TokenLogprobs(torch.autograd.Function):
    """Log-probs of the targets, and the entropy if it is asked for, chunk by chunk. The backward computes the logits
    anew, since what comes from above is not known before; no collective is needed for that."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, start: int, tp: DeviceMesh | None, temperature, entropy
    ):
        compute_weight = weight.to(hidden.dtype)
        logprobs, logsumexp, entropies = hidden.new_zeros(3, len(hidden), 1, dtype=torch.float32)
        for chunk, raw, logits in _chunks(hidden, len(weight)):
            _logits_into(logits, raw, hidden[chunk], compute_weight, temperature)
            original = logits.clone() if entropy else None
            known = _exponentiate(logits, targets[chunk], start, tp)
            logprobs[chunk], logsumexp[chunk] = known.target - known.logsumexp, known.logsumexp
            if entropy:
                logits.mul_(original.sub_(known.logsumexp)).div_(-known.partition)
                entropies[chunk] = logits.sum(dim=-1, keepdim=True)
        if entropy and size_of(tp) > 1:
            entropies = _all_reduce(entropies, tp)
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropies)
        ctx.start, ctx.temperature, ctx.entropy = start, temperature, entropy
        return logprobs[:, 0], entropies[:, 0]

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, grad_entropies: Tensor):
        hidden, weight, targets, logsumexp, entropies = ctx.saved_tensors
        compute_weight = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for chunk, raw, logits in _chunks(hidden, len(weight)):
            h, grad = hidden[chunk], grad_logprobs[chunk, None]
            _logits_into(logits, raw, h, compute_weight, ctx.temperature)
            logits.sub_(logsumexp[chunk])  # the log-probs of all tokens
            if ctx.entropy:  # d entropy / d logit = -p (log p + entropy)
                weights = (logits + entropies[chunk]).mul_(grad_entropies[chunk, None]).add_(grad)
                logits.exp_().mul_(weights.neg_())
            else:  # d log-prob / d logit = (1 at the target) - p
                logits.exp_().mul_(-grad)
            if logits.shape[1]:
                offsets, mine = _own_targets(targets[chunk], ctx.start, logits.shape[1])
                logits.scatter_add_(-1, offsets, mine * grad)
            if ctx.temperature != 1:
                logits.div_(ctx.temperature)
            if logits is not raw:
                raw.copy_(logits)
            grad_hidden[chunk] = raw @ compute_weight
            grad_weight += raw.T @ h
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    tp: DeviceMesh | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log-prob of each target, entropy of each token's distribution) under softmax(hidden @ weight.T / temperature):
    nats, fp32 [N] each, the same on all tp ranks. The entropies are 0 unless asked for.

    hidden [N, E], alike on all tp ranks; weight: this rank's rows of the [V, E] head; targets int64 [N].
    """
    start = _first_column(vocab_size, tp)
    hidden, weight = enter_parallel(hidden, Parallel(tp)), local(weight)
    return _TokenLogprobs.apply(hidden, weight, targets, start, tp, temperature, entropy)
