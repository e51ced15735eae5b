"""The parts of PPO in training/losses.py against what TRL, verl and OpenRLHF compute for the same numbers on ragged
masks (fixtures/ppo.json): values, clip fractions and gradients; and against closed forms.

Where the three differ, the tests say which we follow:
- TRL writes the score of an answer shorter than the batch's longest on the token after EOS, and its value mask includes
  that token: rewards, advantages and returns agree on that longer mask. We and the other two write it on EOS itself.
- OpenRLHF whitens with the biased variance, TRL and verl (and we) with the unbiased one.
- TRL's approxkl is a mean over the padding too; OpenRLHF clamps single estimates of the KL at 10.
- the factor 0.5 of the value loss is the same in all three, and all average over the masked tokens of a batch.
"""

import json
import math

import pytest
import torch

from tests.training.fixtures import make_ppo_fixtures as made
from training.losses import (
    adapted_kl_coef,
    gae,
    importance_weights,
    kl_k3,
    ppo_policy_loss,
    ppo_value_loss,
    sequence_kl_loss,
    shaped_rewards,
    whiten,
)

FIXTURES = json.loads(made.FILE.read_text())
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
RUNS = [(case, peer) for case in FIXTURES["cases"] for peer in ("trl", "verl", "openrlhf") if peer in case]
ALL = pytest.mark.parametrize(("case", "peer"), RUNS, ids=[f"{case['name']}-{peer}" for case, peer in RUNS])


def load(case):
    """Returns (the fixture's inputs, its mask); inputs are NaN outside the mask, so that any use of them shows."""
    mask = made.mask_of(case["rows"])
    inputs = {name: torch.tensor(x) for name, x in case["inputs"].items()}
    inputs |= {name: x.view(mask.shape).masked_fill(~mask, math.nan) for name, x in inputs.items() if name != "scores"}
    return inputs, mask


def rollout(case):
    """Returns (inputs, mask, rewards, advantages, returns), chained as in a trainer."""
    x, mask = load(case)
    rewards = shaped_rewards(x["scores"], x["logps"], x["ref_logps"], mask, case["kl_coef"])
    return x, mask, rewards, *gae(rewards, x["values"], mask, case["gamma"], case["lam"])


def trl_rollout(case):
    """Returns the same on TRL's longer mask, on whose last token the log-ratio is 0 and the value the fixture's."""
    mask = made.mask_of(case["rows"])
    longer = mask | made.mask_of([(0, end + 1) for _, end in case["rows"]])
    x = {name: torch.tensor(x) for name, x in case["inputs"].items()}
    x |= {name: value.view(mask.shape) for name, value in x.items() if name != "scores"}
    x |= {name: x[name].masked_fill(~mask, 1.0) for name in ("logps", "ref_logps", "new_logps")}
    rewards = shaped_rewards(x["scores"], x["logps"], x["ref_logps"], longer, case["kl_coef"])
    return x, mask, longer, rewards, *gae(rewards, x["values"], longer, case["gamma"], case["lam"])


def check(ours, mask, theirs, name):
    assert ours.dtype == torch.float32 and not ours[~mask].any(), f"{name}: not 0 outside the mask"
    torch.testing.assert_close(ours[mask], torch.tensor(theirs), **CLOSE, msg=lambda text: f"{name}: {text}")


def check_loss(losses, x, mask, theirs, name):
    """Checks the mean over the tokens and its gradient, which is 0 for every token outside the mask."""
    mean = losses.sum() / mask.sum()
    assert losses.shape == (mask.sum(),) and mean.item() == pytest.approx(theirs[name], rel=1e-6, abs=1e-6)
    (grad,) = torch.autograd.grad(mean, x, retain_graph=True)
    check(grad, mask, theirs[f"{name}_grad"], f"{name}'s gradient")


# ------------------------------------------------------------------------------------ against the others


@ALL
def test_rewards_and_gae_equal_the_others(case, peer):
    """Catches a KL clamped at 0 or of the wrong sign; the score on the last column, twice, or lost without EOS; a
    bootstrap past the last token; gamma and lambda swapped; and any value from outside the mask."""
    if peer == "trl":
        _, _, mask, rewards, advantages, returns = trl_rollout(case)
        prefix = "longer_"
    else:
        (_, mask, rewards, advantages, returns), prefix = rollout(case), ""
    for name, ours in (("rewards", rewards), ("advantages", advantages), ("returns", returns)):
        check(ours, mask, case[peer][prefix + name], name)


@ALL
def test_whitening_equals_the_others(case, peer):
    """Catches padding in mean or variance, the biased variance, statistics of single rows, and the mean kept or removed
    where it should not be."""
    if peer == "trl":
        _, mask, _, _, advantages, _ = trl_rollout(case)
    else:
        _, mask, _, advantages, _ = rollout(case)
    dirty = advantages.masked_fill(~mask, math.nan)
    theirs = torch.tensor(case[peer]["whitened"])
    if peer == "openrlhf":  # divides by n where the others divide by n - 1
        theirs *= ((mask.sum() - 1) / mask.sum()).sqrt()
    check(whiten(dirty, mask), mask, theirs.tolist(), "whitened")
    if "whitened_scale" in case[peer]:
        check(whiten(dirty, mask, shift_mean=False), mask, case[peer]["whitened_scale"], "whitened, mean kept")


def policy_inputs(case, peer):
    """Returns (inputs with a gradient to new_logps, mask, the advantages that the peer's loss was given)."""
    x, mask = load(case)
    x["new_logps"].requires_grad_()
    advantages = torch.zeros(mask.shape).masked_scatter(mask, torch.tensor(case[peer]["whitened"]))
    return x, mask, advantages


@ALL
def test_policy_loss_equals_the_others(case, peer):
    """Catches min instead of max, a clip of the wrong side or around 0, a wrong sign, an inverted ratio; a clip
    fraction that counts ratios out of range although the clipped term is not the larger one; and a dual clip of the
    wrong sign."""
    x, mask, advantages = policy_inputs(case, peer)
    inputs = x["new_logps"][mask], x["logps"][mask], advantages[mask]
    losses, stats = ppo_policy_loss(*inputs, cliprange=made.CLIPRANGE)
    check_loss(losses, x["new_logps"], mask, case[peer], "policy")
    assert stats.clipped.mean().item() == pytest.approx(case[peer]["policy_clipfrac"], abs=1e-6)
    out = (stats.ratio - 1).abs() > made.CLIPRANGE
    assert 0 < stats.clipped.sum() < out.sum()  # the fixture tells the two apart
    assert not any(value.requires_grad for value in stats)
    torch.testing.assert_close(stats.ratio, (inputs[0] - inputs[1]).detach().exp(), **CLOSE)
    if peer == "trl":
        assert stats.approx_kl.sum().item() / mask.numel() == pytest.approx(case[peer]["policy_approxkl"], rel=1e-6)
    else:
        losses, stats = ppo_policy_loss(*inputs, cliprange=made.CLIPRANGE, dual_clip=made.DUAL_CLIP)
        check_loss(losses, x["new_logps"], mask, case[peer], "dual")
        assert stats.clipped.mean().item() == pytest.approx(case[peer]["dual_clipfrac"], abs=1e-6)
        assert abs(case[peer]["dual"] - case[peer]["policy"]) > 1e-3


@ALL
def test_value_loss_equals_the_others(case, peer):
    """Catches a factor 0.5 lost, min instead of max, and a clip around the return or the new value instead of the old
    value."""
    if peer == "trl":
        x, _, mask, _, _, returns = trl_rollout(case)
    else:
        x, mask, _, _, returns = rollout(case)
    x["new_values"].requires_grad_()
    inputs = x["new_values"][mask], x["values"][mask], returns[mask]
    losses, clipped = ppo_value_loss(*inputs, cliprange_value=made.CLIPRANGE_VALUE)
    check_loss(losses, x["new_values"], mask, case[peer], "value")
    assert not clipped.requires_grad and 0 < clipped.mean() < 1
    if peer == "openrlhf":
        losses, clipped = ppo_value_loss(*inputs, cliprange_value=0.0)
        check_loss(losses, x["new_values"], mask, case[peer], "value_unclipped")
        assert not clipped.requires_grad and not clipped.any() and clipped.shape == losses.shape
    else:
        assert clipped.mean().item() == pytest.approx(case[peer]["value_clipfrac"], abs=1e-6)


@pytest.mark.parametrize("case", FIXTURES["cases"], ids=lambda case: case["name"])
def test_truncated_importance_sampling_equals_openrlhf(case):
    """Catches engine and trainer swapped, and weights bounded from below."""
    x, mask, advantages = policy_inputs(case, "openrlhf")
    weights = importance_weights((x["logps"] - x["engine_logps"])[mask], made.CAP)
    assert weights.max() == made.CAP and weights.min() < 1 / made.CAP
    logps = x["new_logps"][mask], x["logps"].detach()[mask]
    losses, _ = ppo_policy_loss(*logps, advantages[mask], cliprange=made.CLIPRANGE)
    check_loss(weights * losses, x["new_logps"], mask, case["openrlhf"], "truncated")


@pytest.mark.parametrize("case", FIXTURES["cases"], ids=lambda case: case["name"])
def test_kl_estimate_equals_the_others(case):
    """Catches policy and reference swapped."""
    x, mask = load(case)
    k3 = kl_k3(x["logps"][mask], x["ref_logps"][mask])
    assert (k3 >= 0).all() and k3.max() < 10  # where OpenRLHF clamps
    for peer in ("verl", "openrlhf"):
        torch.testing.assert_close(k3, torch.tensor(case[peer]["k3"]), **CLOSE)


def test_adapted_kl_coef_equals_the_others():
    """Catches the error not clipped or clipped elsewhere, a wrong sign, and n / horizon left out."""
    ours = [adapted_kl_coef(0.2, kl, made.KL_TARGET, made.ANSWERS, made.HORIZON) for kl in made.KL]
    for peer in ("verl", "openrlhf"):
        assert ours == pytest.approx(FIXTURES["controllers"][peer], rel=1e-12)
    assert ours[0] < ours[1] < ours[2] == 0.2 < ours[3] < ours[4] == pytest.approx(0.2 * (1 + 0.2 * 0.0256))


# ---------------------------------------------------------------------------------------- planted faults


def clamp_kl(x, mask):
    x["ref_logps"] = torch.minimum(x["ref_logps"], x["logps"])


def without_eos(x, mask):
    last = torch.arange(mask.shape[1]).where(mask, -1).amax(dim=1, keepdim=True)
    mask &= torch.arange(mask.shape[1]) != last


def swapped_models(x, mask):
    x["logps"], x["ref_logps"] = x["ref_logps"], x["logps"]


def everything_masked(x, mask):
    for name, value in x.items():
        x[name] = value.nan_to_num(0.5)
    mask |= True


@pytest.mark.parametrize("fault", [clamp_kl, without_eos, swapped_models, everything_masked])
def test_fixtures_show_faults(fault):
    """Catches fixtures too weak to show a mistake: each of these faults of a caller puts the returns far off."""
    for case in FIXTURES["cases"]:
        x, mask = load(case)
        right = mask.clone()
        fault(x, mask)
        rewards = shaped_rewards(x["scores"], x["logps"], x["ref_logps"], mask, case["kl_coef"])
        _, returns = gae(rewards, x["values"], mask, case["gamma"], case["lam"])
        theirs = torch.zeros(mask.shape).masked_scatter(right, torch.tensor(case["verl"]["returns"]))
        assert ((returns - theirs) * right).abs().max() > 0.05, case["name"]


# ------------------------------------------------------------------------------------------- closed forms


def test_score_on_the_last_masked_token():
    """Catches the score on the last column, on every row's first token or in an empty row, and infinite or NaN padding
    that comes through."""
    mask = made.mask_of([(0, 3), (2, 5), (1, 2), (3, 3)], length=5)
    logps = torch.full(mask.shape, -math.inf).masked_fill(mask, -1.0)
    ref_logps = torch.full(mask.shape, math.nan).masked_fill(mask, -0.5)
    rewards = shaped_rewards(torch.tensor([1.0, 2.0, 4.0, 8.0]), logps.requires_grad_(), ref_logps, mask, 0.1)
    wanted = torch.tensor([[0.05, 0.05, 1.05, 0, 0], [0, 0, 0.05, 0.05, 2.05], [0, 4.05, 0, 0, 0], [0] * 5])
    assert torch.equal(rewards, wanted) and not rewards.requires_grad
    none = torch.zeros(2, 0)
    assert shaped_rewards(torch.ones(2), none, none, none.bool(), 0.1).shape == (2, 0)


def test_gae_by_its_definition():
    """Catches a bootstrap from a padded token's value, a sum that reaches past the end, returns that are not the
    discounted rewards at lambda 1, and a gradient into the targets."""
    generator = torch.Generator().manual_seed(3)
    mask = made.mask_of([(0, 8), (2, 6), (5, 8), (0, 1), (4, 4)], length=8)
    rewards, values = torch.randn(2, *mask.shape, generator=generator)
    gamma, lam = 0.9, 0.6
    wanted = torch.zeros(mask.shape)
    for b, t in mask.nonzero().tolist():
        ahead = mask[b].nonzero()[:, 0]
        for k in ahead[ahead >= t].tolist():
            following = values[b, k + 1] if k + 1 in ahead else 0.0
            wanted[b, t] += (gamma * lam) ** (k - t) * (rewards[b, k] + gamma * following - values[b, k])
    advantages, returns = gae(rewards, values.clone().requires_grad_(), mask, gamma, lam)
    torch.testing.assert_close(advantages, wanted, **CLOSE)
    torch.testing.assert_close(returns, wanted + values * mask, **CLOSE)
    assert not advantages.requires_grad and not returns.requires_grad
    sums = (rewards * mask).flip(1).cumsum(dim=1).flip(1) * mask  # gamma 1, lambda 1: the rewards to come
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 1.0)[1], sums, rtol=1e-5, atol=1e-5)
    errors, _ = gae(rewards, values, mask, 1.0, 0.0)
    assert errors[3, 0] == rewards[3, 0] - values[3, 0]
    lower = gae(rewards.bfloat16(), values.bfloat16(), mask, gamma, lam)
    raised = gae(rewards.bfloat16().float(), values.bfloat16().float(), mask, gamma, lam)
    assert all(torch.equal(a, b) for a, b in zip(lower, raised, strict=True))


def test_whiten():
    """Catches NaN for one value or none, the biased variance, padding that counts, and a result that depends on the
    width of the padding or on the order of the ranks' rows."""
    generator = torch.Generator().manual_seed(4)
    x, mask = torch.randn(6, 9, generator=generator) * 3 + 5, torch.rand(6, 9, generator=generator) < 0.4
    white = whiten(x, mask)
    assert abs(white[mask].mean()) < 1e-6 and white[mask].var() == pytest.approx(1, rel=1e-6)
    assert not white[~mask].any()
    kept = whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask], white[mask] + x[mask].mean(), **CLOSE)
    order = torch.randperm(6, generator=generator)
    wide = torch.cat([x[order], torch.full((6, 30), 1e6)], dim=1), torch.cat([mask[order], torch.zeros(6, 30) > 0], 1)
    assert torch.equal(whiten(*wide)[:, :9], white[order])
    one, none = torch.tensor([[True, False]]), torch.tensor([[False, False]])
    values = torch.tensor([[7.0, math.nan]])
    assert whiten(values, one).tolist() == [[0, 0]] and whiten(values, none).tolist() == [[0, 0]]
    assert whiten(values, one, shift_mean=False).tolist() == [[7, 0]]
    assert not whiten(torch.full((2, 3), 0.3), torch.ones(2, 3).bool()).any()


def test_first_minibatch():
    """Catches a ratio that is not exactly 1 before the policy has moved, in bf16 too, and a gradient other than that of
    -A log pi."""
    logps = -torch.rand(50, generator=torch.Generator().manual_seed(5)) * 30
    advantages = torch.randn(50, generator=torch.Generator().manual_seed(6))
    for dtype in (torch.float32, torch.bfloat16):
        new = logps.to(dtype).requires_grad_()
        losses, stats = ppo_policy_loss(new, new.detach(), advantages, cliprange=0.2, dual_clip=3.0)
        assert (stats.ratio == 1).all() and not stats.approx_kl.any() and not stats.clipped.any()
        assert losses.dtype == torch.float32 and torch.equal(losses.detach(), -advantages)
        (grad,) = torch.autograd.grad(losses.sum(), new)
        assert torch.equal(grad, -advantages.to(dtype))


def test_policy_loss_by_hand():
    """Catches a mistake in the four corners of the clip, in the dual clip's bound or in which gradients are 0."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 4.0, 4.0])
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0, -2.0, 2.0])
    new = ratio.log().requires_grad_()
    losses, stats = ppo_policy_loss(new, torch.zeros(6), advantages, cliprange=0.2, dual_clip=3.0)
    torch.testing.assert_close(losses, torch.tensor([-2.4, -1.0, 3.0, 1.6, 6.0, -2.4]), **CLOSE)
    assert stats.clipped.tolist() == [1, 0, 0, 1, 0, 1]
    (grad,) = torch.autograd.grad(losses.sum(), new)
    torch.testing.assert_close(grad, torch.tensor([0, -1.0, 3.0, 0, 0, 0]), **CLOSE)
    torch.testing.assert_close(stats.approx_kl, 0.5 * new.detach() ** 2, **CLOSE)


def test_far_from_the_rollout():
    """Catches inf and NaN from a ratio that overflows, in the loss and in the gradient of a clipped token."""
    new = torch.tensor([500.0, 500.0, 500.0, -500.0, -500.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    for dual_clip in (None, 3.0):
        losses, _ = ppo_policy_loss(new, torch.zeros(5), advantages, cliprange=0.2, dual_clip=dual_clip)
        (grad,) = torch.autograd.grad(losses.sum(), new)
        assert losses.isfinite().all() and not grad.any()
    assert importance_weights(new, 2.0).tolist() == [2, 2, 2, 0, 0]


def test_value_loss_by_hand():
    """Catches the clip around anything but the value at rollout, and a clip that lowers the loss."""
    values, old = torch.tensor([1.0, 1.0, 0.1, -1.0], requires_grad=True), torch.zeros(4)
    returns = torch.tensor([2.0, 0.5, 0.7, 0.0])
    losses, clipped = ppo_value_loss(values, old, returns, cliprange_value=0.2)
    torch.testing.assert_close(losses, 0.5 * torch.tensor([1.8**2, 0.5**2, 0.6**2, 1.0]), **CLOSE)
    assert clipped.tolist() == [1, 0, 0, 0]
    (grad,) = torch.autograd.grad(losses.sum(), values)
    torch.testing.assert_close(grad, torch.tensor([0.0, 0.5, -0.6, -1.0]), **CLOSE)


def test_values_within_the_range_are_not_clipped():
    """Catches a clip fraction that counts rounding: it was a tenth for small values that were all within the range."""
    values, old, returns = 0.02 * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    losses, clipped = ppo_value_loss(values, old, returns, cliprange_value=0.2)
    assert clipped.sum() == 0 and torch.equal(losses, 0.5 * (values - returns).square())


def test_no_tokens():
    """Catches a rank without tokens, whose losses must be empty sums that are still attached to the graph."""
    new = torch.zeros(0, requires_grad=True)
    losses, stats = ppo_policy_loss(new, torch.zeros(0), torch.zeros(0), cliprange=0.2, dual_clip=2.0)
    value_losses, clipped = ppo_value_loss(new, torch.zeros(0), torch.zeros(0), cliprange_value=0.2)
    (losses.sum() + value_losses.sum() + sequence_kl_loss(new.view(0, 3)).sum()).backward()
    assert new.grad.shape == (0,) and all(x.shape == (0,) for x in (*stats, clipped))


def test_sequence_kl_loss_has_the_gradient_of_the_kl():
    """Catches half the square of each token's log-ratio instead of half the square of their sum: over all answers of
    two tokens, weighted by their probability, the latter has the gradient of KL(pi || ref), and the former does not."""
    generator = torch.Generator().manual_seed(7)
    vocab = 4
    first, second = (torch.randn(*s, generator=generator).requires_grad_() for s in ((vocab,), (vocab, vocab)))
    ref = [torch.randn(*s, generator=generator).log_softmax(-1) for s in ((vocab,), (vocab, vocab))]

    def ratios():  # [answers, 2]: token 0 ends an answer at once
        logps = first.log_softmax(-1), second.log_softmax(-1)
        rows, weights = [], []
        for a in range(vocab):
            for b in range(vocab if a else 1):
                pairs = [logps[0][a] - ref[0][a], (logps[1][a, b] - ref[1][a, b]) if a else torch.zeros(())]
                rows.append(torch.stack(pairs))
                weights.append((logps[0][a] + (logps[1][a, b] if a else 0)).exp())
        return torch.stack(rows), torch.stack(weights)

    log_ratios, weights = ratios()
    parameters = first, second
    wanted = torch.autograd.grad((weights * log_ratios.sum(dim=1)).sum(), parameters, retain_graph=True)
    losses = sequence_kl_loss(log_ratios)
    assert losses.shape == weights.shape and torch.isclose(weights.sum(), torch.ones(()))
    ours = torch.autograd.grad((weights.detach() * losses).sum(), parameters, retain_graph=True)
    by_token = (weights.detach()[:, None] * 0.5 * log_ratios.square()).sum()
    for a, b, c in zip(ours, wanted, torch.autograd.grad(by_token, parameters), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
        if a is ours[0]:
            assert (c - b).abs().max() > 0.05
    k3 = kl_k3(log_ratios.sum(dim=1), torch.zeros(len(weights)))
    kl = (weights * log_ratios.sum(dim=1)).sum()
    torch.testing.assert_close((weights * k3).sum(), kl, **CLOSE)
