"""The optimizer and its schedule."""

import math

import torch
from torch import nn


def make_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def learning_rate_at(step: int, *, peak: float, schedule: str, total_steps: int, warmup_ratio: float) -> float:
    """The learning rate of optimizer step `step`, counted from 1: it rises linearly over ceil(warmup_ratio *
    total_steps) steps and reaches the peak with the last of them, then stays, or falls to 0 one step after the last."""
    warmup_steps = math.ceil(warmup_ratio * total_steps - 1e-9)  # 0.07 * 100 is a little more than 7
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[schedule]
    return peak * factor
