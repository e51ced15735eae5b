"""The losses of policy optimisation without a critic, as pure functions of tensors: what an answer is compared with are
the other answers to its prompt.

| --loss_type | ratio to the policy that drew    | an answer's loss       | divided by                                |
|-------------|----------------------------------|------------------------|-------------------------------------------|
| grpo        | of each token, clipped           | mean over its tokens   | answers of the step                       |
| gspo        | of the answer (geometric mean)   | mean over its tokens   | answers of the step                       |
| bnpo        | of each token, clipped           | sum                    | tokens of the step                        |
| dapo        | of each token, clipped           | sum                    | tokens of the update, per step            |
| cispo       | of each token, a capped constant | sum                    | tokens of the update, per step            |
| dr_grpo     | of each token, clipped           | sum                    | answers of the step x --max_new_tokens    |
| rloo        | of the answer, clipped           | one term               | answers of the step                       |

- a step is an optimizer step; an update may take several on the same answers. The divisor is a number of all ranks and
  micro-batches (loss_divisor), so neither changes the loss
- names and formulas are those of TRL 1.16's GRPOTrainer and RLOOTrainer (tests/training/fixtures/grpo.json), defaults
  those of the former; gspo is its loss_type grpo with importance_sampling_level sequence, which combines with the
  other types too

A reward of NaN is that of an answer that could not be graded: as in TRL it counts in no mean and no deviation, and its
advantage is 0.

Dimensions: A answers of an update, G answers to one prompt (next to each other), n answers of a forward, R tokens of
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
    """The loss of groups of answers."""

    loss_type: str = flag("dapo", choices=LOSS_TYPES, help="what is minimised; see training/README.md")
    beta: float = flag(
        0.0, bounds=non_negative, help="weight of the KL to the reference, in nats; 0 loads no reference"
    )
    use_bias_correction_kl: bool = flag(
        True, help="the KL in the loss times the probability ratio, which makes its gradient that of the KL"
    )
    epsilon: float = flag(0.2, bounds=positive, help="how far a probability ratio may fall below 1")
    epsilon_high: float | None = flag(
        None, bounds=positive, help="how far it may rise above 1; --epsilon. cispo: the most that it counts"
    )
    delta: float | None = flag(None, bounds=Bounds(above=1), help="bound on the ratio of bad tokens; none")
    importance_sampling_level: str = flag(
        "token", choices=("token", "sequence"), help="ratios of tokens, or of whole answers (geometric means)"
    )
    scale_rewards: str = flag(
        "group", choices=("group", "batch", "none"), help="what advantages are divided by the deviation of; not rloo"
    )
    mask_truncated_completions: bool = flag(
        False, help="learn nothing from answers that ran out of tokens, which --soft_punish_cache then spares"
    )
    tis_cap: float | None = flag(
        None,
        bounds=at_least_one,
        help="weigh tokens by trainer / engine probability, at most this much (truncated importance sampling); off",
    )

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL lowers the reward of an answer, rather than being a term of the loss."""
        return self.loss_type == "rloo" and self.beta > 0

    @property
    def by_sequence(self) -> bool:
        return self.loss_type == "gspo" or self.importance_sampling_level == "sequence"


# -------------------------------------------------------------------------------------- advantages


def group_spread(rewards: Tensor, num_generations: int) -> Tensor:
    """The deviation (unbiased) of the rewards of each group, fp32 [A / G]; 0 for groups of one. rewards [A]."""
    groups = rewards.float().view(-1, num_generations)
    others = (~groups.isnan()).sum(dim=1) - 1
    squares = (groups - groups.nanmean(dim=1, keepdim=True)).square().nansum(dim=1)
    return (squares / others.clamp(min=1)).sqrt()


def all_alike(rewards: Tensor, num_generations: int) -> Tensor:
    """Whether the rewards of a group are all equal, bool [A / G]: its deviation would be 0 but for rounding."""
    groups = rewards.view(-1, num_generations)
    largest, least = (groups.where(~groups.isnan(), end) for end in (-torch.inf, torch.inf))
    return largest.amax(dim=1) <= least.amin(dim=1)


@torch.no_grad()
def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str) -> Tensor:
    """Each reward less the mean of its group, divided by the deviation of the group or of the batch, or not: fp32 [A].

    Shao et al. 2024 (arXiv 2402.03300, section 4.1.2); without the division Liu et al. 2025 (2503.20783). rewards [A],
    those of one prompt next to each other; the deviation is unbiased, and 1e-4 is added to it.
    """
    groups = rewards.float().view(-1, num_generations)
    advantages = groups - groups.nanmean(dim=1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (group_spread(rewards, num_generations)[:, None] + 1e-4)
    elif scale_rewards == "batch":
        advantages = advantages / (group_spread(rewards, rewards.numel()) + 1e-4)
    return advantages.flatten().nan_to_num(nan=0.0)


@torch.no_grad()
def leave_one_out_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Each reward less the mean of the others of its group, G / (G - 1) (r - mean), fp32 [A]: Ahmadian et al. 2024
    (arXiv 2402.14740, eq. 6), whose gradient is unbiased. rewards [A]; G of at least 2, or 0 for an answer alone."""
    groups = rewards.float().view(-1, num_generations)
    graded = (~groups.isnan()).sum(dim=1, keepdim=True)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    return (centred * graded / (graded - 1).clamp(min=1)).flatten().nan_to_num(nan=0.0)


def soft_overlong_punishment(lengths: Tensor, max_new_tokens: int, cache: int) -> Tensor:
    """0 for answers that leave `cache` tokens unused, down to -1 for those that use all: fp32 [A]. Yu et al. 2025
    (DAPO, arXiv 2503.14476, eq. 13). lengths [A], at most max_new_tokens."""
    return ((max_new_tokens - cache - lengths.float()) / cache).clamp(-1.0, 0.0)


# ------------------------------------------------------------------------------------------ losses


class GrpoStats(NamedTuple):
    """fp32 [n] each, without gradient: sums over what an answer has, and how much that is."""

    low_clipped: Tensor  # ratios below 1 - epsilon where the advantage is negative
    high_clipped: Tensor  # ratios above 1 + epsilon_high (cispo: epsilon_high) where it is positive
    num_ratios: Tensor  # one for each learnt token, or one for the answer
    kl: Tensor  # of its learnt tokens as it stands in the loss: k3 in nats; 0 without a reference


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
    """(the loss of each answer, fp32 [n], of which the sum over a step by loss_divisor is minimised; stats).

    logps, old_logps, ref_logps, engine_logps [n, R] in nats: of the policy, of the same when it drew, of the reference,
    which adds beta k3 to each token unless the KL is in the reward, and of the engine, which tis_cap needs. Only the
    first has a gradient. advantages [n]. mask bool [n, R]: the tokens that are learnt, the EOS that ended an answer
    included; what lies outside may be anything.

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
    """What the summed losses of a step are divided by, see the table above. step, update: the numbers of learnt tokens
    of the answers of the step and of the update, over all ranks."""
    if args.loss_type in ("grpo", "gspo", "rloo"):
        return len(step)
    if args.loss_type == "dr_grpo":
        return len(step) * max_new_tokens
    if args.loss_type == "bnpo":
        return max(1, sum(step))
    return max(1, sum(update)) * len(step) / len(update)
