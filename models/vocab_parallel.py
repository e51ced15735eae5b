"""Embedding and head over a vocabulary that the tensor-parallel ranks share: cross entropy, log-probs, entropy.

- the vocabulary need not be divisible by the ranks; a few numbers per token are combined, and whole logits are gathered
  only where sampling needs the order of all of them
- logits exist for CHUNK_TOKENS tokens at a time, never [B, T, V]; on a GPU models/fused_head.py computes the loss

`tp` is always the 1-D DeviceMesh of the tensor-parallel ranks, or None for one rank. Dimensions: N tokens, E model dim,
V vocabulary, V' this rank's part of it.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.gpu import has_triton
from models.tp import Parallel, all_gather, all_reduce, chunk_range, enter_parallel, local, own_chunk, size_of


def embed(ids: Tensor, weight: Tensor, vocab_size: int, tp: DeviceMesh | None) -> Tensor:
    """This rank's part of the embedding of ids: rows of other ranks' tokens are 0, so the sum over ranks is the whole.

    weight: the rank's rows of the [V, E] table.
    """
    if size_of(tp) == 1:
        return torch.nn.functional.embedding(ids, weight)
    start, end = own_chunk(vocab_size, tp)
    if end == start:  # more ranks than chunks of the vocabulary
        return weight.new_zeros(*ids.shape, weight.shape[1]) + 0 * weight.sum()
    owned = (ids >= start) & (ids < end)
    rows = torch.nn.functional.embedding(torch.where(owned, ids - start, 0), weight)
    return torch.where(owned[..., None], rows, torch.zeros_like(rows))


def most_columns(vocab_size: int, tp: DeviceMesh | None) -> int:
    """The most columns of the vocabulary on a rank, which the first one has; the last ranks may have fewer."""
    return chunk_range(vocab_size, 0, size_of(tp))[1]


def pad_vocabulary(x: Tensor, vocab_size: int, tp: DeviceMesh | None, value: float) -> Tensor:
    """This rank's columns [..., V'], padded to most_columns()."""
    missing = most_columns(vocab_size, tp) - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing), value=value) if missing else x


def gather_vocabulary(logits: Tensor, vocab_size: int, tp: DeviceMesh | None) -> Tensor:
    """The whole logits [n, V] from each rank's part; for inference (no gradient)."""
    if size_of(tp) == 1:
        return logits
    return all_gather(pad_vocabulary(logits, vocab_size, tp, -torch.inf), -1, tp)[:, :vocab_size]


CHUNK_TOKENS = 1024  # tokens whose logits exist at a time: [1024, V] in fp32 is 131 MB for V = 32000


def _own_targets(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """(column of each target in this rank's logits, 0 where it has none; whether this rank has it), [n, 1] each."""
    offsets = targets[:, None] - start
    owned = (offsets >= 0) & (offsets < size)
    return torch.where(owned, offsets, 0), owned


def _logits(hidden: Tensor, weight: Tensor, temperature: float = 1.0) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields (slice of the tokens, raw, logits) chunk by chunk: logits = hidden @ weight.T / temperature in fp32, raw a
    tensor of their shape in the compute dtype (the same one if that is fp32). Two buffers serve all chunks: fresh ones
    of this size cost the CPU more than the arithmetic."""
    raw_buffer = hidden.new_empty(min(len(hidden), CHUNK_TOKENS), len(weight))
    in_fp32 = hidden.dtype == torch.float32
    buffer = raw_buffer if in_fp32 else torch.empty_like(raw_buffer, dtype=torch.float32)
    for first in range(0, len(hidden), CHUNK_TOKENS):
        chunk = slice(first, min(first + CHUNK_TOKENS, len(hidden)))
        raw = torch.mm(hidden[chunk], weight.T, out=raw_buffer[: chunk.stop - first])
        logits = raw if in_fp32 else buffer[: len(raw)].copy_(raw)
        if temperature != 1:
            logits.div_(temperature)
        yield chunk, raw, logits


def _exponentiate(logits: Tensor, targets: Tensor, start: int, tp: DeviceMesh | None) -> tuple[Tensor, ...]:
    """Turns this rank's columns of logits [n, V / tp] into exp(logit - largest of the row over all ranks), in place.

    Returns (logit of the target, logsumexp, the divisor that makes the exponentials the softmax), [n, 1] each.
    """
    offsets, owned = _own_targets(targets, start, logits.shape[1])
    largest, target = logits.new_full((len(logits), 1), -torch.inf), logits.new_zeros(len(logits), 1)
    if logits.shape[1]:
        largest = logits.amax(dim=-1, keepdim=True)
        target = torch.where(owned, logits.gather(-1, offsets), target)
    if size_of(tp) > 1:
        largest = all_reduce(largest, tp, "max")
    partition = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    if size_of(tp) > 1:
        partition, target = all_reduce(torch.stack((partition, target)), tp)
    return target, largest + partition.log(), partition


def _add_at_targets(logits: Tensor, targets: Tensor, start: int, values: Tensor | float) -> None:
    """Adds values, [n, 1] or one for all, to the target of each row, where this rank has it."""
    if logits.shape[1]:
        offsets, owned = _own_targets(targets, start, logits.shape[1])
        logits.scatter_add_(-1, offsets, owned * values)


def _propagate(
    logits: Tensor, raw: Tensor, hidden: Tensor, weight: Tensor, grads: tuple[Tensor, Tensor | None]
) -> None:
    """Writes the gradients of a chunk's hidden states and adds those of the weight, given `logits`, the gradient of its
    logits. The weight's are fp32; None for a frozen head, which saves half of the arithmetic. raw: see _logits."""
    grad_hidden, grad_weight = grads
    if logits is not raw:
        raw.copy_(logits)
    grad_hidden.copy_(raw @ weight)
    if grad_weight is None:
        return
    if raw.dtype == torch.float32:  # in place: no tensor of the weight's size beside it
        grad_weight.addmm_(raw.T, hidden)
    else:
        grad_weight += raw.T @ hidden


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
        learns = needs_grad and weight.requires_grad
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if learns else None
        for chunk, raw, logits in _logits(hidden, compute_weight):
            target, logsumexp, partition = _exponentiate(logits, targets[chunk], start, tp)
            total += (logsumexp - target).sum()
            if needs_grad:
                _add_at_targets(logits.div_(partition), targets[chunk], start, -1.0)  # softmax - 1 at the target
                _propagate(logits, raw, hidden[chunk], compute_weight, (grad_hidden[chunk], grad_weight))
        ctx.gradients, ctx.weight_dtype = (grad_hidden, grad_weight), weight.dtype  # the backward only scales them
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the loss of the head goes backward once: its gradients were scaled in place")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        grad_hidden = (grad_hidden.float() * grad).to(grad_hidden.dtype)  # a bf16 factor would be off by up to 0.4 %
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def fused_head(device: torch.device) -> ModuleType | None:
    """The module models/fused_head.py, which imports Triton; None where Triton does not work."""
    if not has_triton(device):
        return None
    from models import fused_head

    return fused_head


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int | None = None, tp: DeviceMesh | None = None
) -> Tensor:
    """Sum over tokens of the cross entropy of hidden @ weight.T (nats, an fp32 scalar, the same on all tp ranks).

    hidden [N, E], the same on all tp ranks; weight: this rank's rows of the [V, E] head; targets int64 [N]. Without
    tokens: 0, with gradients 0.
    """
    hidden, weight = enter_parallel(hidden, Parallel(tp)), local(weight)
    start, _ = own_chunk(vocab_size, tp)
    # decided here, since grad mode is off inside forward and requires_grad stays true under no_grad
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if (fused := fused_head(hidden.device)) is not None:
        rows = fused.rows_at_once(hidden, len(weight) if tp is None else most_columns(vocab_size, tp))
        return fused.cross_entropy_sum(hidden, weight, targets, start, tp, rows, needs_grad)
    return _CrossEntropySum.apply(hidden, weight, targets, start, tp, needs_grad)


class _TokenLogprobs(torch.autograd.Function):
    """Log-probs of the targets, and the entropy if it is asked for, chunk by chunk. The backward recomputes the logits,
    since the gradients of the outputs are not known before; that needs no collective."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, start: int, tp: DeviceMesh | None, temperature, entropy
    ):
        logprobs, logsumexp, entropies = hidden.new_zeros(3, len(hidden), 1, dtype=torch.float32)
        for chunk, _, logits in _logits(hidden, weight.to(hidden.dtype), temperature):
            original = logits.clone() if entropy else None
            target, logsumexp[chunk], partition = _exponentiate(logits, targets[chunk], start, tp)
            logprobs[chunk] = target - logsumexp[chunk]
            if entropy:
                logits.mul_(original.sub_(logsumexp[chunk])).div_(-partition)
                entropies[chunk] = logits.sum(dim=-1, keepdim=True)
        if entropy and size_of(tp) > 1:
            entropies = all_reduce(entropies, tp)
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropies)
        ctx.start, ctx.temperature = start, temperature
        ctx.set_materialize_grads(False)  # entropies that enter no loss cost the backward nothing
        entropies = entropies[:, 0]
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs[:, 0], entropies

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropies: Tensor | None):
        hidden, weight, targets, logsumexp, entropies = ctx.saved_tensors
        compute_weight = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_logprobs = torch.zeros_like(logsumexp[:, 0]) if grad_logprobs is None else grad_logprobs
        for chunk, raw, logits in _logits(hidden, compute_weight, ctx.temperature):
            grad = grad_logprobs[chunk, None]
            logits.sub_(logsumexp[chunk])  # the log-probs of all tokens
            if grad_entropies is not None:  # d entropy / d logit = -p (log p + entropy)
                weights = (logits + entropies[chunk]).mul_(grad_entropies[chunk, None]).add_(grad)
                logits.exp_().mul_(weights.neg_())
            else:  # d log-prob / d logit = (1 at the target) - p
                logits.exp_().mul_(-grad)
            _add_at_targets(logits, targets[chunk], ctx.start, grad)
            if ctx.temperature != 1:
                logits.div_(ctx.temperature)
            _propagate(logits, raw, hidden[chunk], compute_weight, (grad_hidden[chunk], grad_weight))
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


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
    nats, fp32 [N] each, the same on all tp ranks. Without `entropy`, the entropies are meaningless.

    hidden [N, E], the same on all tp ranks; weight: this rank's rows of the [V, E] head; targets int64 [N].
    """
    hidden, weight = enter_parallel(hidden, Parallel(tp)), local(weight)
    start, _ = own_chunk(vocab_size, tp)
    if (fused := fused_head(hidden.device)) is not None:
        rows = fused.rows_at_once(hidden, len(weight) if tp is None else most_columns(vocab_size, tp))
        return fused.FusedLogprobs.apply(hidden, weight, targets, start, tp, temperature, rows)
    return _TokenLogprobs.apply(hidden, weight, targets, start, tp, temperature, entropy)
