"""training/optim.py: schedule and optimizer, against hand-computed values."""

import math

import pytest
import torch
from torch import nn

from training.optim import learning_rate_at, make_optimizer


def rates(schedule, total, warmup):
    settings = {"peak": 8.0, "schedule": schedule, "total_steps": total, "warmup_ratio": warmup}
    return [learning_rate_at(step, **settings) for step in range(1, total + 1)]


def test_schedules_by_hand():
    """Catches a schedule one step early or late, a warm-up that starts at 0 or misses the peak, a wrong formula."""
    assert rates("constant", 5, 0.4) == [4, 8, 8, 8, 8]
    assert rates("linear", 6, 0.3) == [4, 8, 8, 6, 4, 2]  # ceil(1.8) = 2 steps up, then 4 steps to 0 at step 7
    assert rates("linear", 4, 0) == [8, 6, 4, 2]
    half = math.sqrt(0.5)
    expected = [8, 8, 4 * (1 + half), 4, 4 * (1 - half)]
    assert rates("cosine", 5, 0.2) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_at_its_edges(schedule):
    """Catches a division by zero and a rate of 0 that would learn nothing, for one step and for all warm-up or none."""
    assert rates(schedule, 1, 0.0) == rates(schedule, 1, 0.03) == rates(schedule, 1, 1.0) == [8]
    assert rates(schedule, 4, 1.0) == [2, 4, 6, 8]
    assert all(rate > 0 for rate in rates(schedule, 7, 0.0))
    # a run that was resumed with fewer --max_steps than it has done asks for nothing, but must not fail
    learning_rate_at(9, peak=8.0, schedule=schedule, total_steps=4, warmup_ratio=0.0)


def test_optimizer_decays_matrices_only(folder):
    """Catches weight decay on norms and biases, parameters left out, and flags that do not reach AdamW."""
    model = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.RMSNorm(3), "embedding": nn.Embedding(4, 3)})
    model["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.7), eps=1e-3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():
        decays = p.dim() == 2 and not name.startswith("frozen")
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 if decays else 1), msg=name)
    assert {(g["betas"], g["eps"], g["lr"]) for g in optimizer.param_groups} == {((0.8, 0.7), 1e-3, 0.1)}
