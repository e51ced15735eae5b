"""Losses of policy optimisation without a critic, as pure functions of tensors: each answer is compared with the other
answers to its prompt.

| --loss_type | ratio to the sampling policy     | an answer's loss       | divided by                                |
|-------------|----------------------------------|------------------------|-------------------------------------------|
| grpo        | of each token, clipped           | mean over its tokens   | answers of the step                       |
| gspo        | of the answer (geometric mean)   | mean over its tokens   | answers of the step                       |
| bnpo        | of each token, clipped           | sum                    | tokens of the step                        |
| dapo        | of each token, clipped           | sum                    | tokens of the update, per step            |
| cispo       | of each token, a capped constant | sum                    | tokens of the update, per step            |
| dr_grpo     | of each token, clipped           | sum                    | answers of the step x --max_new_tokens    |
| rloo        | of the answer, clipped           | one term               | answers of the step                       |

- a step is an optimizer step; an update may take several on the same answers. The divisor (loss_divisor) counts over
  all ranks and micro-batches, so that neither changes the loss
- names and formulas are those of TRL 1.16's GRPOTrainer and RLOOTrainer (tests/training/fixtures/grpo.json), defaults
  those of GRPOTrainer; gspo is TRL's loss_type grpo with importance_sampling_level sequence, which can be combined with
  other loss types too

An answer that could not be graded has a reward of NaN: as in TRL, means and deviations leave it out, and its advantage
is 0.

Dimensions: A answers of an update, G adjacent answers to one prompt (a group), n answers of a forward pass, R tokens of
the longest answer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.common import Bounds, at_least_one, flag, non_negative, positive
from training.losses import importance_weights, kl_k3

LOSS_TYPES = ("grpo", "gspo", "bnpo", "dapo", "cispo", "dr_grpo", "rloo")


@dataclass(frozen=True, kw_only=True)
class GrpoLossArgs:
    """GRPO loss."""

    loss_type: str = flag("dapo", choices=LOSS_TYPES, help="the loss; training/README.md compares them")
    beta: float = flag(
        0.0, bounds=non_negative, help="weight of the KL to the reference, in nats; 0 loads no reference"
    )
    use_bias_correction_kl: bool = flag(
        True, help="multiply the KL in the loss by the probability ratio, so that its gradient is that of the KL"
    )
    epsilon: float = flag(0.2, bounds=positive, help="clip probability ratios below 1 - this")
    epsilon_high: float | None = flag(
        None, bounds=positive, help="clip ratios above 1 + this (cispo: cap their weight at this); default: --epsilon"
    )
    delta: float | None = flag(None, bounds=Bounds(above=1), help="cap on ratios with advantage < 0; default: none")
    importance_sampling_level: str = flag(
        "token", choices=("token", "sequence"), help="ratio of each token, or of the whole answer (geometric mean)"
    )
    scale_rewards: str = flag(
        "group", choices=("group", "batch", "none"), help="divide advantages by the reward std of this; not for rloo"
    )
    mask_truncated_completions: bool = flag(
        False,
        help="do not train on answers that ran out of tokens, nor apply --soft_punish_cache to them; their rewards, "
        "with a --length_penalty, stay in their group's mean",
    )
    tis_cap: float | None = flag(
        None,
        bounds=at_least_one,
        help="truncated importance sampling: weight tokens by min(p_trainer / p_engine, this); default: off",
    )

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL is subtracted from the reward of an answer, rather than added to the loss."""
        return self.loss_type == "rloo" and self.beta > 0

    @property
    def by_sequence(self) -> bool:
        return self.loss_type == "gspo" or self.importance_sampling_level == "sequence"


# -------------------------------------------------------------------------------------- advantages


def group_spread(rewards: Tensor, num_generations: int) -> Tensor:
    """Returns the unbiased standard deviation of each group's rewards, fp32 [A / G]; 0 if G is 1. rewards [A]."""
    centred = _centred(rewards, num_generations)
    others = (~centred.isnan()).sum(dim=1) - 1
    return (centred.square().nansum(dim=1) / others.clamp(min=1)).sqrt().float()


def _centred(rewards: Tensor, num_generations: int) -> Tensor:
    """Returns each reward minus the mean of its group, fp64 [A / G, G]. fp32 would round the mean of equal rewards to
    another number: eight times 0.7 had advantages of 6e-4, which AdamW makes a whole step where no group differs. In
    fp64 the sum of equal fp32 numbers is exact."""
    groups = rewards.float().double().view(-1, num_generations)
    return groups - groups.nanmean(dim=1, keepdim=True)


def all_alike(rewards: Tensor, num_generations: int) -> Tensor:
    """Returns whether the rewards of each group are all equal, bool [A / G]; exact, unlike a deviation of 0."""
    groups = rewards.view(-1, num_generations)
    largest, least = (groups.where(~groups.isnan(), end) for end in (-torch.inf, torch.inf))
    return largest.amax(dim=1) <= least.amin(dim=1)


@torch.no_grad()
def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str) -> Tensor:
    """Returns each reward minus the mean of its group, divided by the unbiased standard deviation of the group or batch
    plus 1e-4, or not divided (scale_rewards "none"): fp32 [A]. rewards [A].

    Shao et al. 2024 (arXiv 2402.03300, section 4.1.2); without the division Liu et al. 2025 (2503.20783).
    """
    advantages = _centred(rewards, num_generations)
    if scale_rewards == "group":
        advantages = advantages / (group_spread(rewards, num_generations)[:, None] + 1e-4)
    elif scale_rewards == "batch":
        advantages = advantages / (group_spread(rewards, rewards.numel()) + 1e-4)
    return advantages.flatten().nan_to_num(nan=0.0).float()


@torch.no_grad()
def leave_one_out_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Returns each reward minus the mean of the others in its group, G / (G - 1) (r - mean), fp32 [A]: Ahmadian et al.
    2024 (arXiv 2402.14740, eq. 6); its policy gradient is unbiased. 0 if no other answer is graded. rewards [A]."""
    centred = _centred(rewards, num_generations)
    graded = (~centred.isnan()).sum(dim=1, keepdim=True)
    return (centred * graded / (graded - 1).clamp(min=1)).flatten().nan_to_num(nan=0.0).float()


def soft_overlong_punishment(lengths: Tensor, max_new_tokens: int, cache: int) -> Tensor:
    """Returns 0 for answers that leave at least `cache` tokens unused, falling to -1 for those that use all, fp64 [A]:
    Yu et al. 2025 (DAPO, arXiv 2503.14476, eq. 13). lengths [A], at most max_new_tokens."""
    return ((max_new_tokens - cache - lengths.double()) / cache).clamp(-1.0, 0.0)


# ------------------------------------------------------------------------------------------ losses


class GrpoStats(NamedTuple):
    """Sums and counts of each answer, fp32 [n] each, without gradient."""

    low_clipped: Tensor  # number of ratios below 1 - epsilon with a negative advantage
    high_clipped: Tensor  # number of ratios above 1 + epsilon_high (cispo: epsilon_high) with a positive advantage
    num_ratios: Tensor  # one for each learnt token, or one for the answer
    kl: Tensor  # KL as in the loss, without beta, summed over the learnt tokens: k3 in nats; 0 without a reference


def grpo_losses(
    args: GrpoLossArgs,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logps: Tensor | None = None,
    engine_logps: Tensor | None = None,
) -> tuple[Tensor, GrpoStats]:
    """Returns (the loss of each answer, fp32 [n], to be summed over a step and divided by loss_divisor; stats).

    logps, old_logps, ref_logps, engine_logps [n, R] in nats: of the policy now, of the policy when it sampled, of the
    reference, which adds beta k3 to each token's loss unless the KL is in the reward, and of the engine, which tis_cap
    needs. Only logps has a gradient. advantages [n]. mask bool [n, R]: the tokens to train on, including the EOS that
    ended an answer; values outside it are ignored.

    Sources: grpo arXiv 2402.03300, dr_grpo 2503.20783, dapo 2503.14476, gspo 2507.18071, cispo 2506.13585, rloo
    2402.14740; the KL's factor: DeepSeek-V3.2, 2512.02556.
    """
    logps, old_logps = (torch.where(mask, x.float(), 0.0) for x in (logps, old_logps))
    advantages, lengths = advantages.float()[:, None], mask.sum(dim=1, keepdim=True).clamp(min=1)
    log_ratios = logps - old_logps
    if args.loss_type == "rloo":
        log_ratios = log_ratios.sum(dim=1, keepdim=True)
    elif args.by_sequence:
        log_ratios = log_ratios.sum(dim=1, keepdim=True) / lengths
    # [n, R] or [n, 1]; an infinite ratio would make its gradient NaN even where it is clipped
    ratios = log_ratios.clamp(-20, 20).exp()
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo":
        most = high
        losses = -ratios.detach().clamp(max=most) * advantages * logps
    else:
        most = 1 + high
        bounded = ratios if args.delta is None else ratios.clamp(max=args.delta)
        losses = -torch.minimum(bounded * advantages, ratios.clamp(1 - args.epsilon, most) * advantages)

    if args.tis_cap is not None:
        drift = torch.where(mask, old_logps - engine_logps.float(), 0.0)
        drift = drift.sum(dim=1, keepdim=True) if args.loss_type == "rloo" else drift
        losses = losses * importance_weights(drift, args.tis_cap)
    kl = torch.zeros_like(logps)
    if ref_logps is not None and not args.kl_in_reward:
        kl = kl_k3(logps, torch.where(mask, ref_logps.float(), 0.0))
        kl = kl * ratios if args.use_bias_correction_kl else kl
        losses = losses + args.beta * kl

    with torch.no_grad():
        counted = mask if ratios.shape == mask.shape else torch.ones_like(ratios, dtype=torch.bool)
        low = (ratios < 1 - args.epsilon) & (advantages < 0) & counted
        over = (ratios > most) & (advantages > 0) & counted
        each = torch.where(mask, kl, 0.0)
        stats = GrpoStats(*(x.sum(dim=1).float() for x in (low, over, counted, each)))
    if args.loss_type == "rloo":
        return losses[:, 0], stats
    losses = torch.where(mask, losses, 0.0).sum(dim=1, keepdim=True)
    return (losses / lengths if args.loss_type in ("grpo", "gspo") else losses)[:, 0], stats


def loss_divisor(args: GrpoLossArgs, step: list[int], update: list[int], max_new_tokens: int) -> float:
    """Returns the divisor of a step's summed losses, see the table above. step, update: the number of learnt tokens of
    each answer in the step and in the update, over all ranks."""
    if args.loss_type in ("grpo", "gspo", "rloo"):
        return len(step)
    if args.loss_type == "dr_grpo":
        return len(step) * max_new_tokens
    if args.loss_type == "bnpo":
        return max(1, sum(step))
    return max(1, sum(update)) * len(step) / len(update)
