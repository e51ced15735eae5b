"""A language-model head fused with its loss on a GPU: models/vocab_parallel.py with kernels of models/triton_head.py.

- at most LOGIT_BYTES of logits exist, in the compute dtype, and become their own gradient; if the logits of a whole
  batch fit, the backward reuses them, so that it repeats no product and scales no tensor of the weight's size
- otherwise chunk by chunk; the weight's gradient is summed in fp32, in parts that need no second tensor of its size

FLOPs and memory traffic are counted in training/README.md.

Dimensions: N tokens, E model dim, V this rank's part of the vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models import triton_head
from models.tp import all_reduce, size_of

LOGIT_BYTES = 5 << 28  # 1.34 GB: 4096 tokens x 128256 in bf16, and 10 % more
WEIGHT_ROWS = 16384  # rows of the weight's gradient that are summed at a time


def rows_at_once(hidden: Tensor, num_columns: int) -> int:
    """Returns the tokens of a chunk. num_columns: the maximum over ranks, so that all ranks have the same number of
    chunks, each of which runs collectives."""
    return max(1024, LOGIT_BYTES // (num_columns * hidden.element_size()))


def _chunks(num_tokens: int, rows: int) -> Iterator[slice]:
    """Yields slices of at most `rows` tokens; at least one slice."""
    for start in range(0, max(1, num_tokens), rows):
        yield slice(start, start + rows)


def _statistics(logits: Tensor, targets: Tensor, start: int, temperature: float, tp: DeviceMesh | None) -> Tensor:
    """Returns (log-prob of the target, logsumexp, entropy) over all ranks, fp32 [3, N]."""
    largest, total, weighted, chosen = triton_head.row_statistics(logits, targets, start, temperature)
    if size_of(tp) > 1:
        own, largest = largest, all_reduce(largest, tp, "max")
        factor = (own - largest).exp()  # 0 on a rank without columns
        total, weighted, chosen = all_reduce(torch.stack((total * factor, weighted * factor, chosen)), tp)
    logsumexp = largest + total.log()
    return torch.stack((chosen - logsumexp, logsumexp, logsumexp - weighted / total))


class _WeightGradient:
    """Sums logits' gradients.T @ hidden over chunks, in fp32 unless there is only one. The sum of a frozen head stays
    None, which saves a third of the arithmetic and a tensor of the head's size."""

    def __init__(self, weight: Tensor, *, learns: bool, single: bool):
        self.dtype, self.learns = weight.dtype, learns
        self.sum = torch.zeros_like(weight, dtype=torch.float32) if learns and not single else None

    def add(self, gradients: Tensor, hidden: Tensor) -> None:
        if not self.learns:
            return
        if self.sum is None:
            self.sum = gradients.T @ hidden
            return
        for first in range(0, len(self.sum), WEIGHT_ROWS):
            part = slice(first, first + WEIGHT_ROWS)
            self.sum[part] += gradients[:, part].T @ hidden

    def scaled(self, factor: Tensor) -> Tensor | None:
        """Returns the sum times factor in the weight's dtype, without another fp32 tensor of its size."""
        if self.sum is None:
            return None
        result = torch.empty_like(self.sum, dtype=self.dtype)
        for part, ours in zip(result.split(WEIGHT_ROWS), self.sum.split(WEIGHT_ROWS)):
            part.copy_(ours * factor)
        return result


class FusedLogprobs(torch.autograd.Function):
    """Log-probs of the targets, and entropies: vocab_parallel.linear_logprobs, `rows` tokens at a time."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, start: int, tp: DeviceMesh | None, temperature, rows: int
    ):
        compute_weight, found = weight.to(hidden.dtype), []
        for chunk in _chunks(len(hidden), rows):
            logits = hidden[chunk] @ compute_weight.T
            found.append(_statistics(logits, targets[chunk], start, temperature, tp))
        logprobs, logsumexp, entropies = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropies)
        ctx.start, ctx.temperature, ctx.rows = start, temperature, rows
        ctx.logits = logits if len(found) == 1 else None
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropies: Tensor | None):
        hidden, weight, targets, logsumexp, entropies = ctx.saved_tensors
        compute_weight, grad_hidden = weight.to(hidden.dtype), torch.empty_like(hidden)
        grad_logprobs = torch.zeros_like(logsumexp) if grad_logprobs is None else grad_logprobs.contiguous()
        grad_entropies = None if grad_entropies is None else grad_entropies.contiguous()
        kept, ctx.logits = ctx.logits, None  # their gradient overwrites them
        learns = ctx.needs_input_grad[1]
        grad_weight = _WeightGradient(weight, learns=learns, single=len(hidden) <= ctx.rows)
        for chunk in _chunks(len(hidden), ctx.rows):
            logits = hidden[chunk] @ compute_weight.T if kept is None else kept
            more = () if grad_entropies is None else (entropies[chunk], grad_entropies[chunk])
            given = (targets[chunk], ctx.start, ctx.temperature, logsumexp[chunk], grad_logprobs[chunk], *more)
            triton_head.to_gradients_(logits, *given)
            grad_hidden[chunk] = logits @ compute_weight
            grad_weight.add(logits, hidden[chunk])
        return grad_hidden, grad_weight.sum.to(weight.dtype) if learns else None, None, None, None, None, None


class _CrossEntropyOfChunks(torch.autograd.Function):
    """The summed loss of several chunks; forward computes the gradients, too, so that no product is repeated."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, start: int, tp: DeviceMesh | None, rows: int):
        compute_weight = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        ctx.grad_hidden = torch.empty_like(hidden)
        ctx.grad_weight = _WeightGradient(weight, learns=ctx.needs_input_grad[1], single=False)
        for chunk in _chunks(len(hidden), rows):
            logits = hidden[chunk] @ compute_weight.T
            logprobs, logsumexp, _ = _statistics(logits, targets[chunk], start, 1.0, tp)
            total -= logprobs.sum()
            triton_head.to_gradients_(logits, targets[chunk], start, 1.0, logsumexp, torch.full_like(logprobs, -1.0))
            ctx.grad_hidden[chunk] = logits @ compute_weight
            ctx.grad_weight.add(logits, hidden[chunk])
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden = (ctx.grad_hidden.float() * grad).to(ctx.grad_hidden.dtype)  # fp32, so that grad is not rounded
        return grad_hidden, ctx.grad_weight.scaled(grad), None, None, None, None


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, start: int, tp: DeviceMesh | None, rows: int, needs_grad: bool
) -> Tensor:
    """Returns vocab_parallel.linear_cross_entropy, summed over tokens, computed `rows` tokens at a time."""
    if needs_grad and len(hidden) > rows:
        return _CrossEntropyOfChunks.apply(hidden, weight, targets, start, tp, rows)
    return -FusedLogprobs.apply(hidden, weight, targets, start, tp, 1.0, rows)[0].sum()
