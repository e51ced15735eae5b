"""training/grpo_losses.py against closed forms of the papers; against TRL: test_losses_grpo.py."""

import math
import statistics
from itertools import product

import pytest
import torch

from tests.training.test_losses_grpo import CLOSE, divisor_of
from training.grpo_losses import (
    LOSS_TYPES,
    GrpoLossArgs,
    all_alike,
    group_advantages,
    group_spread,
    grpo_losses,
    leave_one_out_advantages,
)


def one_answer(loss_type, ratios, advantage, **options):
    """Returns (loss, its gradient, log-probs) of an answer whose tokens have these ratios to the policy at rollout."""
    args = GrpoLossArgs(loss_type=loss_type, **options)
    old = torch.linspace(-2.0, -1.0, len(ratios))[None]
    new = (old + torch.tensor([ratios]).log()).requires_grad_()
    mask = torch.ones_like(old, dtype=torch.bool)
    losses, _ = grpo_losses(args, new, old, torch.tensor([advantage]), mask)
    (grad,) = torch.autograd.grad(losses.sum(), new)
    return losses.detach(), grad[0], new.detach()[0]


@pytest.mark.parametrize("loss_type", [each for each in LOSS_TYPES if each != "cispo"])
def test_bounds_do_nothing_in_a_first_step(loss_type):
    """Catches a bound that matters where all ratios are 1; train_grpo.py says that none does."""
    for advantage in (1.5, -1.5):
        loose, tight = {}, {"epsilon": 1e-6, "epsilon_high": 1e-6, "delta": 1 + 1e-6}
        found = [one_answer(loss_type, [1.0] * 4, advantage, **options)[:2] for options in (loose, tight)]
        assert all(map(torch.equal, *found)) and found[0][1].any()


def test_group_advantages_by_hand():
    """Catches the biased deviation, statistics over all prompts, 1e-4 added in the wrong place, and 0 / 0."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0])
    half, none = 0.5 / (math.sqrt(1 / 3) + 1e-4), [0.0] * 4
    batch = torch.tensor([1.0, 0, 0, 1, 5, 5, 5, 5]).double().var(unbiased=True).sqrt().item()
    wanted = {"group": half, "none": 0.5, "batch": 0.5 / (batch + 1e-4)}
    for scale, size in wanted.items():
        ours = group_advantages(rewards, 4, scale)
        torch.testing.assert_close(ours, torch.tensor([size, -size, -size, size, *none]), **CLOSE)
    assert group_spread(rewards, 4).tolist() == pytest.approx([math.sqrt(1 / 3), 0.0])
    assert group_spread(torch.ones(3), 1).tolist() == [0.0, 0.0, 0.0]


def test_leave_one_out_is_the_mean_of_the_others():
    """Catches a baseline that includes the reward itself, and a group across prompts."""
    rewards = torch.randn(15, generator=torch.Generator().manual_seed(0))
    groups = rewards.view(3, 5)
    others = [[(g.sum() - g[i]) / 4 for i in range(5)] for g in groups]
    torch.testing.assert_close(leave_one_out_advantages(rewards, 5), rewards - torch.tensor(others).flatten(), **CLOSE)


def test_leave_one_out_gradient_is_unbiased():
    """Catches a biased estimator: over all groups that a policy of three answers can draw, the mean of RLOO's gradient
    is the exact gradient of the expected reward, and with rewards less the group's mean (Dr. GRPO) it is (G - 1) / G of
    it."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 0.5])
    (exact,) = torch.autograd.grad(-(logits.softmax(0) * reward).sum(), logits)
    for G in (2, 3):
        for scale, factor in ((None, 1.0), ("none", (G - 1) / G)):
            args = GrpoLossArgs(loss_type="dr_grpo" if scale else "rloo", scale_rewards="none")
            mean = torch.zeros(3, dtype=torch.float64)
            for group in product(range(3), repeat=G):
                drawn = torch.tensor(group)
                logps = logits.log_softmax(0)[drawn][:, None]
                advantages = (
                    group_advantages(reward[drawn], G, scale) if scale else leave_one_out_advantages(reward[drawn], G)
                )
                mask = torch.ones(G, 1, dtype=torch.bool)
                losses, _ = grpo_losses(args, logps, logps.detach(), advantages, mask)
                loss = losses.sum() / divisor_of(args, mask, mask, 1)
                mean += logps.detach().sum().exp() * torch.autograd.grad(loss, logits)[0]
            torch.testing.assert_close(mean, factor * exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_clipped_tokens(advantage):
    """Catches min and max swapped, and a gradient of a clipped token: it is -A r within the range, or on the side that
    is not clipped, and else 0."""
    ratios = [0.5, 0.9, 1.0, 1.2, 1.6]
    _, grad, _ = one_answer("dapo", ratios, advantage, epsilon=0.2, epsilon_high=0.3)
    free = [r < 1.3 if advantage > 0 else r > 0.8 for r in ratios]
    torch.testing.assert_close(
        grad, torch.tensor([-advantage * r * f for r, f in zip(ratios, free, strict=True)]), **CLOSE
    )
    _, grad, _ = one_answer("dapo", ratios, advantage, epsilon=0.2, epsilon_high=0.3, delta=1.5)
    free[-1] = False  # a bad token that has become much likelier has no gradient
    torch.testing.assert_close(
        grad, torch.tensor([-advantage * r * f for r, f in zip(ratios, free, strict=True)]), **CLOSE
    )


def test_gspo_ratio_is_the_geometric_mean():
    """Catches the product or the arithmetic mean of the tokens' ratios (Zheng et al. 2025, eq. 7), and tokens clipped
    one by one: the gradient of each is -A s / n, or all are 0."""
    ratios = [0.5, 2.0, 1.1, 1.3]
    s = math.prod(ratios) ** (1 / 4)
    losses, grad, _ = one_answer("gspo", ratios, 2.0, epsilon=0.5)
    torch.testing.assert_close(losses, torch.tensor([-2 * s]), **CLOSE)
    torch.testing.assert_close(grad, torch.full((4,), -2 * s / 4), **CLOSE)
    losses, grad, _ = one_answer("gspo", ratios, 2.0, epsilon=3e-4, epsilon_high=4e-4)
    assert losses.item() == pytest.approx(-2 * 1.0004, rel=1e-6) and not grad.any()


def test_cispo_weight_is_a_constant():
    """Catches a gradient through the weight, a lower bound on it, and a capped token without a gradient (MiniMax 2025,
    arXiv 2506.13585): the gradient of every token is -A min(r, cap)."""
    ratios = [0.1, 0.9, 1.4, 3.0]
    for advantage in (2.0, -2.0):
        losses, grad, new = one_answer("cispo", ratios, advantage, epsilon_high=1.5)
        weights = torch.tensor(ratios).clamp(max=1.5)
        torch.testing.assert_close(grad, -advantage * weights, **CLOSE)
        torch.testing.assert_close(losses, -(advantage * weights * new).sum()[None], **CLOSE)


def test_rloo_ratio_is_of_the_whole_answer():
    """Catches a length-normalised ratio and tokens clipped one by one."""
    ratios = [0.5, 2.0, 1.1]
    losses, grad, _ = one_answer("rloo", ratios, 2.0)
    torch.testing.assert_close(losses, torch.tensor([-2.2]), **CLOSE)
    torch.testing.assert_close(grad, torch.full((3,), -2.2), **CLOSE)
    _, grad, _ = one_answer("rloo", [1.1, 1.1, 1.1], 2.0)
    assert not grad.any()


def test_weight_of_a_token_on_policy():
    """Catches the length normalisation of another loss type: on policy a token's gradient is -A over this divisor."""
    lengths, limit = torch.tensor([1, 4, 2]), 7
    mask = torch.arange(4) < lengths[:, None]
    advantages = torch.tensor([1.0, -0.5, 2.0])
    over = {
        "grpo": 3 * lengths,
        "gspo": 3 * lengths,
        "rloo": torch.full((3,), 3),
        "dr_grpo": torch.full((3,), 3 * limit),
        "dapo": torch.full((3,), 7),
        "bnpo": torch.full((3,), 7),
    }
    for loss_type, divisors in over.items():
        args = GrpoLossArgs(loss_type=loss_type)
        logps = torch.full(mask.shape, -1.0, requires_grad=True)
        losses, _ = grpo_losses(args, logps, logps.detach(), advantages, mask)
        (grad,) = torch.autograd.grad(losses.sum() / divisor_of(args, mask, mask, limit), logps)
        torch.testing.assert_close(grad, -(advantages / divisors)[:, None] * mask, **CLOSE)


def test_kl_gradient_on_policy():
    """Catches the estimator's own gradient instead of the KL's: multiplied by the ratio it is log pi / pi_ref for each
    token; without the factor it would be 1 - pi_ref / pi."""
    logps = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0, -0.5]])
    mask, zero = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1)
    for corrected, wanted in ((True, logps - ref), (False, 1 - (ref - logps).exp())):
        args = GrpoLossArgs(beta=0.5, use_bias_correction_kl=corrected)
        losses, stats = grpo_losses(args, logps, logps.detach(), zero, mask, ref_logps=ref)
        (grad,) = torch.autograd.grad(losses.sum(), logps)
        torch.testing.assert_close(grad, 0.5 * wanted.detach(), **CLOSE)
        assert stats.kl.item() == pytest.approx(((ref - logps).exp() - 1 - (ref - logps)).sum().item(), rel=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "bnpo", "dapo", "cispo", "dr_grpo", "rloo"])
def test_nothing_learnt_is_no_loss(loss_type):
    """Catches a division by zero tokens, and masked values that come through as NaN."""
    args = GrpoLossArgs(loss_type=loss_type, beta=0.1)
    dirty = torch.tensor([[math.nan, math.inf, -math.inf]] * 2).requires_grad_()
    mask = torch.zeros(2, 3, dtype=torch.bool)
    losses, _ = grpo_losses(args, dirty, dirty.detach(), torch.tensor([1.0, -1.0]), mask, ref_logps=dirty.detach())
    loss = losses.sum() / divisor_of(args, mask, mask, 5)
    (grad,) = torch.autograd.grad(loss, dirty)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("scale", ["group", "batch", "none", "rloo"])
def test_answers_that_could_not_be_graded(scale):
    """Catches a NaN reward that spreads, or counts as 0 or as a member of its group: advantages are those of the other
    answers alone, by the standard library's mean and deviation, and 0 for the ungraded one."""
    groups = [[1.0, -1.0, None, -1.0], [None, 2.0, None, None], [0.5, 0.5, None, 0.5], [None] * 4]
    rewards = torch.tensor([math.nan if r is None else r for group in groups for r in group])
    graded = [[r for r in group if r is not None] for group in groups]
    deviation = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0  # noqa: E731
    wanted = []
    for group, others in zip(groups, graded):
        for r in group:
            centred = 0.0 if r is None else r - statistics.fmean(others)
            spread = {"group": deviation(others), "batch": deviation([r for each in graded for r in each])}.get(scale)
            if scale == "rloo":
                centred *= len(others) / max(1, len(others) - 1)
            wanted.append(centred if spread is None else centred / (spread + 1e-4))
    found = leave_one_out_advantages(rewards, 4) if scale == "rloo" else group_advantages(rewards, 4, scale)
    torch.testing.assert_close(found, torch.tensor(wanted))
    assert all_alike(rewards, 4).tolist() == [False, True, True, True]
