"""Log-probs, entropies and gradients of a head's logits, as Triton kernels: NVIDIA and AMD, bf16, fp16 and fp32.

A row of logits is read once for its softmax's normaliser, its entropy and the target's logit, and read and written once
more to become its own gradient: no other tensor of its size is allocated, and all arithmetic is in fp32.

Dimensions: N tokens, V columns: the vocabulary, or the part of it from `start` on that a tensor-parallel rank has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 4096, 8  # columns at a time


@triton.jit(do_not_specialize=["num_rows", "start"])
def row_statistics_kernel(
    logits,  # [N, V]
    targets,  # int64 [N]
    found,  # fp32 [4, N]: see row_statistics
    scale,
    num_rows,
    num_columns,
    start,
    BLOCK: tl.constexpr,
):
    """One program: a row."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * num_columns
    largest, total, weighted = -float("inf"), 0.0, 0.0
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < num_columns
        x = tl.load(line + columns, mask=inside, other=-float("inf")).to(tl.float32) * scale
        new = tl.maximum(largest, tl.max(x, axis=0))
        shrunk, terms = tl.exp(largest - new), tl.exp(x - new)
        total = total * shrunk + tl.sum(terms, axis=0)
        weighted = weighted * shrunk + tl.sum(terms * tl.where(inside, x, 0.0), axis=0)
        largest = new
    place = tl.load(targets + row) - start
    owned = (place >= 0) & (place < num_columns)
    chosen = tl.load(line + place, mask=owned, other=0.0).to(tl.float32) * scale
    tl.store(found + row, largest)
    tl.store(found + num_rows + row, total)
    tl.store(found + 2 * num_rows + row, weighted)
    tl.store(found + 3 * num_rows + row, chosen)


@triton.jit(do_not_specialize=["start"])
def gradients_kernel(
    logits,  # [N, V], which becomes its gradient
    targets,  # int64 [N]
    logsumexp,  # fp32 [N] each
    of_logprobs,
    entropies,
    of_entropies,
    scale,
    num_columns,
    start,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a block of a row. d logprob / d logit = (1 at the target) - p, d entropy / d logit = -p (log p +
    entropy)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, places = columns < num_columns, logits + row * num_columns + columns
    x = tl.load(places, mask=inside, other=0.0).to(tl.float32) * scale - tl.load(logsumexp + row)  # log p
    of_logprob = tl.load(of_logprobs + row)
    factor = of_logprob
    if ENTROPY:
        factor += tl.load(of_entropies + row) * (x + tl.load(entropies + row))
    is_target = columns == tl.load(targets + row) - start
    gradient = (tl.where(is_target, of_logprob, 0.0) - tl.exp(x) * factor) * scale
    tl.store(places, gradient.to(logits.dtype.element_ty), mask=inside)


def row_statistics(logits: Tensor, targets: Tensor, start: int, temperature: float) -> Tensor:
    """For each row of x = logits / temperature, fp32 [4, N]: the largest x, the sum of exp(x - largest), the same sum
    with each term times its x, and the target's x, 0 where it is not among these columns.

    logits: contiguous [N, V]; targets: int64 [N], of the whole vocabulary.
    """
    num_rows, num_columns = logits.shape
    found = torch.empty(4, num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        sizes = (1 / temperature, num_rows, num_columns, start)
        row_statistics_kernel[(num_rows,)](logits, targets, found, *sizes, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return found


def to_gradients_(
    logits: Tensor,
    targets: Tensor,
    start: int,
    temperature: float,
    logsumexp: Tensor,
    of_logprobs: Tensor,
    entropies: Tensor | None = None,
    of_entropies: Tensor | None = None,
) -> None:
    """Turns logits into their gradient, in place, from the gradients of the targets' log-probs and, if not None, of the
    entropies: fp32 [N] each. logsumexp, entropies: of logits / temperature, over the whole vocabulary."""
    num_rows, num_columns = logits.shape
    if not logits.numel():
        return
    grid, has_entropy = (num_rows, triton.cdiv(num_columns, BLOCK)), of_entropies is not None
    more = (entropies, of_entropies) if has_entropy else (logsumexp, logsumexp)
    given = (logits, targets, logsumexp, of_logprobs, *more, 1 / temperature, num_columns, start)
    gradients_kernel[grid](*given, ENTROPY=has_entropy, BLOCK=BLOCK, num_warps=NUM_WARPS)
