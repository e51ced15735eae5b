"""Losses and metrics as pure functions of tensors, computed in fp32, with one value per pair, example or token.

- losses are not averaged here: the caller sums them and divides by the number of pairs (examples, tokens) of the whole
  optimizer step, so that neither micro-batches nor ranks change the result
- the log-probability of a completion is a sum over its tokens, EOS included; a loss that needs the mean divides
- tests/training/fixtures holds the values that TRL, verl and OpenRLHF return for the same inputs

Dimensions: B batch (pairs), T tokens, E model dim, V vocabulary, N target tokens (tokens with a label) or examples.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from models.common import Bounds, flag, non_negative, positive
from models.records import IGNORE_INDEX
from models.vocab_parallel import linear_cross_entropy, linear_logprobs


def token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    learnt: Tensor | None = None,
    vocab_size: int | None = None,
    tp: DeviceMesh | None = None,
) -> Tensor:
    """Returns the summed next-token cross entropy (nats, fp32 scalar) of a batch. For the token mean, divide by the
    number of targets of the whole optimizer step, over all micro-batches and ranks.

    hidden [B, T, E] final hidden states; weight [V, E] of the language-model head, or this tp rank's rows of it (then
    pass vocab_size, the V of all ranks); labels int64 [B, T], not shifted: the hidden state at t predicts labels[t +
    1]. Only positions that predict a label are projected; without any, loss and gradients are 0. learnt: the indices of
    these positions in hidden.flatten(0, 1), int64 [N] (models.batches.collate); computing them here needs a host sync.
    """
    hidden, targets = _learnt(hidden, labels, learnt)
    return linear_cross_entropy(hidden, weight, targets, vocab_size=vocab_size, tp=tp)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    learnt: Tensor | None = None,
    vocab_size: int | None = None,
    tp: DeviceMesh | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns (log-probability of every target token, entropy of its distribution), fp32 [N] each, row by row; N is the
    number of labels[:, 1:] other than IGNORE_INDEX. Without entropy=True the entropies are meaningless.

    Arguments as for token_cross_entropy; the distribution is softmax(logits / temperature).
    """
    hidden, targets = _learnt(hidden, labels, learnt)
    return linear_logprobs(
        hidden, weight, targets, vocab_size=vocab_size, tp=tp, temperature=temperature, entropy=entropy
    )


def _learnt(hidden: Tensor, labels: Tensor, learnt: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (the hidden states that predict a label [N, E], these labels [N])."""
    if learnt is None:
        row, place = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        learnt = row * labels.shape[1] + place
    return hidden.flatten(0, 1).index_select(0, learnt), labels.flatten().index_select(0, learnt + 1)


def placed(values: Tensor, places: Tensor) -> Tensor:
    """Scatters values [N], row by row, to where the mask `places` [B, T] is true; 0 elsewhere. Avoids masked_scatter,
    whose backward needs a host sync, and index_add, whose sums on a GPU differ from run to run."""
    number = torch.where(places, places.flatten().cumsum(0).view(places.shape) - 1, len(values))
    return F.pad(values, (0, 1)).index_select(0, number.flatten()).view(places.shape)


# ----------------------------------------------------------------------------------- reward models


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, center_coef: float) -> Tensor:
    """Returns -logsigmoid(r_c - r_r - margin) + center_coef (r_c + r_r)^2 for each pair, fp32 [B].

    Bradley and Terry's likelihood; the margin is from Llama 2 (Touvron et al. 2023, arXiv 2307.09288, eq. 2), the term
    that centres rewards at 0 from Eisenstein et al. 2023 (arXiv 2312.09244). chosen, rejected: rewards [B]; margin [B].
    """
    chosen, rejected = chosen.float(), rejected.float()
    losses = -F.logsigmoid(chosen - rejected - margin)
    return losses + center_coef * (chosen + rejected).square() if center_coef else losses


def pointwise_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns the binary cross entropy of sigmoid(score) and the label, fp32 [N], for N examples, or N steps of process
    rewards. scores [N]; labels [N] in [0, 1]: the loss of a soft label is smallest at score = logit(label).
    """
    return F.binary_cross_entropy_with_logits(scores.float(), labels.float(), reduction="none")


# --------------------------------------------------------------------------------- direct preference


class Ratios(NamedTuple):
    """The inputs of a DPO loss, fp32 [B] each."""

    chosen: Tensor  # log pi - log ref of the completion, summed over its tokens; simpo: its mean log pi
    rejected: Tensor
    chosen_lengths: Tensor  # tokens of the completion, at least 1
    rejected_lengths: Tensor
    chosen_logps: Tensor  # log pi, summed

    @property
    def h(self) -> Tensor:
        return self.chosen - self.rejected


def _smoothed(x: Tensor, e: float) -> Tensor:
    return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)


def sigmoid_loss(ratios: Ratios, args: "DpoLossArgs") -> Tensor:
    """S(b h): Rafailov et al. 2023 (arXiv 2305.18290); with e > 0 cDPO (Mitchell 2023)."""
    return _smoothed(args.beta * ratios.h, args.label_smoothing)


def robust_loss(ratios: Ratios, args: "DpoLossArgs") -> Tensor:
    """[-(1-e) logsigmoid(b h) + e logsigmoid(-b h)] / (1 - 2e), e < 0.5: Chowdhury et al. 2024 (arXiv 2403.00409)."""
    e = args.label_smoothing
    right, wrong = -F.logsigmoid(args.beta * ratios.h), -F.logsigmoid(-args.beta * ratios.h)
    return ((1 - e) * right - e * wrong) / (1 - 2 * e)


def hinge_loss(ratios: Ratios, args: "DpoLossArgs") -> Tensor:
    """relu(1 - b h): SLiC, Zhao et al. 2023 (arXiv 2305.10425)."""
    return F.relu(1 - args.beta * ratios.h)


def ipo_loss(ratios: Ratios, args: "DpoLossArgs") -> Tensor:
    """(h - 1/(2b))^2: Azar et al. 2023 (arXiv 2310.12036)."""
    return (ratios.h - 1 / (2 * args.beta)).square()


def ipo_avg_loss(ratios: Ratios, args: "DpoLossArgs") -> Tensor:
    """ipo with each log-ratio divided by its completion's length; TRL calls this one ipo."""
    means = ratios.chosen / ratios.chosen_lengths - ratios.rejected / ratios.rejected_lengths
    return (means - 1 / (2 * args.beta)).square()


def simpo_loss(ratios: Ratios, args: "DpoLossArgs") -> Tensor:
    """S(b (lp_c/|c| - lp_r/|r|) - simpo_gamma): Meng et al. 2024 (arXiv 2405.14734)."""
    gamma = 0.5 if args.simpo_gamma is None else args.simpo_gamma
    return _smoothed(args.beta * ratios.h - gamma, args.label_smoothing)


def rpo_loss(ratios: Ratios, args: "DpoLossArgs") -> Tensor:
    """S(b h) - rpo_alpha lp_c/|c|: Pang et al. 2024 (arXiv 2404.19733), where e is 0. The last term is a mean over the
    tokens of each chosen completion, as in the paper; TRL's `sft` is a mean over a micro-batch and varies with it."""
    alpha = 1.0 if args.rpo_alpha is None else args.rpo_alpha
    return sigmoid_loss(ratios, args) - alpha * (ratios.chosen_logps / ratios.chosen_lengths)


DPO_LOSSES = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "ipo_avg": ipo_avg_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "simpo": simpo_loss,
    "rpo": rpo_loss,
}
REFERENCE_FREE = ("simpo",)  # losses that need no reference model
SMOOTHED = ("sigmoid", "robust", "simpo", "rpo")  # losses that use label_smoothing


@dataclass(frozen=True, kw_only=True)
class DpoLossArgs:
    """DPO loss."""

    loss: str = flag("sigmoid", choices=DPO_LOSSES, help="the loss of a pair; training/losses.py has the formulae")
    beta: float = flag(0.1, bounds=positive, help="larger stays nearer to the reference; simpo: scale of the log-probs")
    label_smoothing: float = flag(
        0.0,
        bounds=Bounds(least=0, most=0.5),
        help="assumed share of pairs whose answers are swapped; not for ipo, ipo_avg and hinge",
    )
    simpo_gamma: float | None = flag(None, bounds=non_negative, help="simpo: target margin; default: 0.5")
    rpo_alpha: float | None = flag(None, bounds=non_negative, help="rpo: weight of the chosen answer's NLL; default: 1")


class DPOLoss(NamedTuple):
    """fp32 [B] each; the rewards carry no gradient."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(args: DpoLossArgs, logps: Tensor, ref_logps: Tensor | None, lengths: Tensor) -> DPOLoss:
    """Returns the loss and the implicit rewards of each pair.

    logps, ref_logps [2, B], chosen then rejected: log-probability of the completion under policy and reference, summed
    over its tokens, EOS included; REFERENCE_FREE losses ignore ref_logps. lengths [2, B]: the number of these tokens.
    In the formulae above, h = (lp_c - ref_c) - (lp_r - ref_r), b = beta, e = label_smoothing and
    S(x) = -(1-e) logsigmoid(x) - e logsigmoid(-x). Rewards are TRL's: b (lp - ref); simpo: b lp / |.|.
    """
    logps, lengths = logps.float(), lengths.clamp(min=1)
    ratios = logps / lengths if args.loss in REFERENCE_FREE else logps - ref_logps.float()
    losses = DPO_LOSSES[args.loss](Ratios(*ratios, *lengths, logps[0]), args)
    return DPOLoss(losses, *(args.beta * ratios.detach()))


def sequence_logps(token_logps: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (the summed log-probabilities of each row's target tokens, fp32 [B]; their number, int64 [B]).

    token_logps [N]: from the function of that name; labels int64 [B, T], not shifted.
    """
    learnt = labels[:, 1:] != IGNORE_INDEX
    return placed(token_logps.float(), learnt).sum(dim=1), learnt.sum(dim=1)


# ------------------------------------------------------------------------------------------------ PPO
# Schulman et al. 2017 (arXiv 1707.06347) on answers of a language model: Ziegler et al. 2019 (1909.08593).
#
# mask bool [B, T]: the tokens that the policy sampled, including the EOS that ended the answer; contiguous in each row,
# starting anywhere. Values outside it are ignored, even NaN. Only the losses (policy, value, KL) have gradients.


@torch.no_grad()
def shaped_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Returns the reward of each token: -kl_coef (logp - ref_logp), plus the row's score on its last masked token; fp32
    [B, T], 0 outside the mask (Ziegler et al. 2019, arXiv 1909.08593; Ouyang et al. 2022, 2203.02155).

    scores [B]; logps, ref_logps [B, T] in nats, of the policy at rollout and of the reference. The log-ratio (k1) is
    negative on many tokens and is not clamped: its mean is the KL, and clamping at 0 would change the optimal policy.
    """
    rewards = torch.where(mask, -kl_coef * (logps.float() - ref_logps.float()), 0.0)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # one masked token from here to the end: this one
    return rewards + torch.where(last, scores.float()[:, None], 0.0)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Computes generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, eq. 16) of the masked tokens:
    A_t = sum_k (gamma lam)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}), where V is 0 past the last masked token.

    rewards, values [B, T]: the value at t is that of the state in which token t is sampled. Returns (advantages,
    returns), fp32 [B, T], 0 outside the mask; returns = advantages + values, before any whitening.
    """
    rewards, values = rewards.float(), torch.where(mask, values.float(), 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scales x to variance 1 (unbiased) over the mask, and shifts it to mean 0, or with shift_mean=False keeps its
    mean; fp32, 0 outside the mask.

    x, mask: of the same shape; the caller gathers the answers of all ranks. A single value has variance 0.
    """
    # sums in fp64, so that neither the padding nor the order of the rows changes the result
    x, count = torch.where(mask, x.double(), 0.0), mask.sum()
    mean = x.sum() / count.clamp(min=1)
    variance = torch.where(mask, x - mean, 0.0).square().sum() / (count - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0).float()


class PPOStats(NamedTuple):
    """fp32 [N] each, without gradient, to be averaged over tokens."""

    ratio: Tensor  # pi / pi_old
    clipped: Tensor  # 1 where the clipped term is the larger one, as in TRL's clipfrac; dual_clip is not counted
    approx_kl: Tensor  # 0.5 (logp - old_logp)^2, TRL's policy/approxkl_avg


def ppo_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, cliprange: float, dual_clip: float | None = None
) -> tuple[Tensor, PPOStats]:
    """Returns (max(-A r, -A clip(r, 1 - cliprange, 1 + cliprange)), stats) of each token, fp32 [N], with
    r = exp(logp - old_logp): Schulman et al. 2017, arXiv 1707.06347, eq. 7.

    With dual_clip c > 1 the loss of a token with A < 0 is at most -c A, and its gradient beyond that 0 (Ye et al. 2020,
    1912.09729). logps, old_logps (nats), advantages: [N].
    """
    advantages, log_ratios = advantages.float(), logps.float() - old_logps.float()
    ratios = log_ratios.clamp(-20, 20).exp()  # an infinite ratio would make its gradient NaN even where it is clipped
    plain, clipped = -advantages * ratios, -advantages * ratios.clamp(1 - cliprange, 1 + cliprange)
    losses = torch.maximum(plain, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return losses, PPOStats(ratios.detach(), (clipped > plain).float(), 0.5 * log_ratios.detach().square())


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Returns (0.5 max((V - R)^2, (V' - R)^2), 1 where the second term is the larger one) of each token, fp32 [N]. V'
    is V clipped to within cliprange_value of the value at rollout; with cliprange_value 0 the loss is 0.5 (V - R)^2.

    As in OpenAI's baselines (Engstrom et al. 2020, arXiv 2005.12729, section 3). values, old_values, returns [N].
    """
    values, old_values, returns = values.float(), old_values.float(), returns.float()
    plain = (values - returns).square()
    if not cliprange_value:
        return 0.5 * plain, torch.zeros_like(plain)
    held = values.clamp(old_values - cliprange_value, old_values + cliprange_value)  # inside the range exactly V
    clipped = (held - returns).square()
    return 0.5 * torch.maximum(plain, clipped), (clipped > plain).float()


def sequence_kl_loss(log_ratios: Tensor) -> Tensor:
    """Returns 0.5 (sum_t log pi - log ref)^2 of each sequence, fp32 [B]: the KL as a loss term, not in the reward.

    log_ratios [B, T]: logp - ref_logp, 0 outside the mask. On samples of the current policy its mean gradient is that
    of KL(pi || ref) (Liu et al. 2025, arXiv 2510.01555: k2 as loss); samples of an older policy bias it. Half the
    square of each token's log-ratio would ignore a token's effect on the KL of the tokens after it.
    """
    return 0.5 * log_ratios.float().sum(dim=1).square()


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Returns k3 = exp(-d) - 1 + d of each token, fp32, with d = logp - ref_logp; k3 is never negative.

    On samples of the policy the mean of k3, as that of d, is the KL to the reference in nats (Schulman 2020,
    joschu.net/blog/kl-approx.html). Outside GRPO's loss, only for metrics: as a reward or loss, k3 has another optimum.
    """
    log_ratios = logps.float() - ref_logps.float()
    return torch.expm1(-log_ratios) + log_ratios


def adapted_kl_coef(kl_coef: float, kl: float, target: float, n: int, horizon: float) -> float:
    """Returns kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon): the controller of Ziegler et al. 2019 (arXiv
    1909.08593). kl, target: nats per answer; n answers in this update; horizon in answers."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


@torch.no_grad()
def importance_weights(log_ratios: Tensor, cap: float) -> Tensor:
    """Returns min(exp(log_ratio), cap), of the same shape, a factor of the policy loss: truncated importance sampling
    (Ionides 2008; for rollouts of an inference engine Yao et al. 2025, fengyao.notion.site/off-policy-rl).

    log_ratios: log-prob of the training model at rollout minus that of the engine that sampled, in nats, of tokens or
    whole answers, fp32.
    """
    return log_ratios.exp().clamp(max=cap)


# ------------------------------------------------------------------------------------------ metrics


def auc(scores: Tensor, labels: Tensor) -> float:
    """Returns the area under the ROC curve: the chance that a positive scores above a negative, ties counting half
    (Mann and Whitney's rank statistic). scores, labels [N]; labels >= 0.5 are positive. NaN if a class is empty."""
    right = labels.flatten() >= 0.5
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    if not num_right or not num_wrong:
        return float("nan")
    _, place, counts = scores.flatten().double().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2  # counted from 1; tied scores share their mean rank
    rank_sum = ranks[place][right].double().sum().item()
    return (rank_sum - num_right * (num_right + 1) / 2) / (num_right * num_wrong)


def calibration_error(probs: Tensor, labels: Tensor) -> float:
    """Returns the expected calibration error (Guo et al. 2017, arXiv 1706.04599): |mean probability - mean label| of
    each of 10 equal bins of probability, weighted by the bin's share of examples. probs, labels [N] in [0, 1]."""
    bins, probs, labels = 10, probs.flatten().double(), labels.flatten().double()
    place = (probs * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=probs.device).index_add(0, place, probs - labels)
    return gaps.abs().sum().item() / len(probs)
