"""Losses, as pure functions of tensors.

Dimensions: N tokens, E model dim, V vocabulary.
"""

import torch
from torch import Tensor

CHUNK_TOKENS = 1024  # tokens whose logits exist at a time: [1024, V] in fp32 is 131 MB for V = 32000


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross entropy of hidden @ weight.T, computed chunk by chunk with its gradients, so that
    neither logits nor their gradients exist for more than one chunk."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, needs_grad: bool) -> Tensor:
        compute_weight = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for start in range(0, len(hidden), CHUNK_TOKENS):
            h, t = hidden[start : start + CHUNK_TOKENS], targets[start : start + CHUNK_TOKENS, None]
            logits = (h @ compute_weight.T).float()
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            total += (normaliser - logits.gather(-1, t)).sum()
            if needs_grad:
                grad_logits = logits.sub_(normaliser).exp_()  # the softmax, less 1 at the target
                grad_logits.scatter_add_(-1, t, grad_logits.new_full((), -1.0).expand_as(t))
                grad_logits = grad_logits.to(h.dtype)
                grad_hidden[start : start + CHUNK_TOKENS] = grad_logits @ compute_weight
                grad_weight += grad_logits.T @ h
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = grad_hidden * grad_output.to(grad_hidden.dtype)
        return grad_hidden, (grad_weight * grad_output).to(ctx.weight_dtype), None, None


def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The summed next-token cross entropy (nats, fp32 scalar) of a batch: divide by the number of targets of the whole
    optimizer step, over micro-batches and ranks, for its token mean.

    hidden [B, T, E] final hidden states; weight [V, E] of the language-model head; labels int64 [B, T], not shifted:
    the hidden state at t predicts labels[t + 1]. Only positions with a label are projected. 0, with gradients 0, if
    there is none.
    """
    targets = labels[:, 1:].reshape(-1)
    learnt = (targets != ignore_index).nonzero()[:, 0]
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, learnt)
    # decided here, since grad mode is off inside forward and requires_grad stays true under no_grad
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets.index_select(0, learnt), needs_grad)
