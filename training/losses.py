"""Losses and the metrics beside them, as pure functions of tensors: fp32 inside, one value per pair, example or token.

- a loss is not averaged here: callers sum it and divide by the global number of pairs (examples, tokens) of the
  optimizer step, so neither micro-batches nor ranks change it
- log-probabilities of a completion are sums over its tokens, EOS included; where a loss wants the mean, it divides
- tests/training/fixtures holds what TRL's trainers give for the same inputs

Dimensions: B batch (pairs), T tokens, E model dim, V vocabulary, N tokens or examples that are learnt.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from models.tp import linear_cross_entropy, linear_logprobs


def token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    tp: DeviceMesh | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The summed next-token cross entropy (nats, fp32 scalar) of a batch: divide by the number of targets of the whole
    optimizer step, over micro-batches and ranks, for its token mean.

    hidden [B, T, E] final hidden states; weight [V, E] of the language-model head, or this tp rank's rows of it (then
    with vocab_size, the V of all ranks); labels int64 [B, T], not shifted: the hidden state at t predicts labels[t +
    1]. Only positions with a label are projected. 0, with gradients 0, if there is none.
    """
    hidden, targets = _learnt(hidden, labels, ignore_index)
    return linear_cross_entropy(hidden, weight, targets, vocab_size=vocab_size, tp=tp)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    tp: DeviceMesh | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """(log-probability of every learnt token, entropy of the distribution it is from), fp32 [N] each, row by row: N is
    the number of labels[:, 1:] other than ignore_index. Entropies are 0 unless asked for.

    Arguments as for token_cross_entropy; the distribution is softmax(logits / temperature).
    """
    hidden, targets = _learnt(hidden, labels, ignore_index)
    options = {"vocab_size": vocab_size, "tp": tp, "temperature": temperature, "entropy": entropy}
    return linear_logprobs(hidden, weight, targets, **options)


def _learnt(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(hidden states [N, E] that predict a label, those labels [N])"""
    targets = labels[:, 1:].reshape(-1)
    learnt = (targets != ignore_index).nonzero()[:, 0]
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, learnt)
    return hidden, targets.index_select(0, learnt)


# ----------------------------------------------------------------------------------- reward models


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_coef: float = 0.0) -> Tensor:
    """-logsigmoid(r_c - r_r - margin) + center_coef (r_c + r_r)^2 for each pair, fp32 [B].

    Bradley and Terry's likelihood; the margin from Llama 2 (Touvron et al. 2023, arXiv 2307.09288, eq. 2), the term
    that centres rewards at 0 from Eisenstein et al. 2023 (arXiv 2312.09244). chosen, rejected: rewards [B]; margin [B].
    """
    chosen, rejected = chosen.float(), rejected.float()
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    losses = -F.logsigmoid(difference)
    return losses + center_coef * (chosen + rejected).square() if center_coef else losses


def pointwise_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy of sigmoid(score) with the label, fp32 [N]: N examples, or N steps of process rewards.

    scores [N]; labels [N] in [0, 1]: a probability is a soft label, whose loss is least at score = logit(label).
    """
    return F.binary_cross_entropy_with_logits(scores.float(), labels.float(), reduction="none")


# --------------------------------------------------------------------------------- direct preference

DPO_LOSSES = ("sigmoid", "ipo", "ipo_avg", "hinge", "robust", "simpo", "rpo")
REFERENCE_FREE = ("simpo",)  # no reference model is needed
SMOOTHED = ("sigmoid", "robust", "simpo", "rpo")  # those that label_smoothing has a meaning for


class DPOLoss(NamedTuple):
    """fp32 [B] each; the rewards carry no gradient."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    kind: str,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.0,
    rpo_alpha: float = 1.0,
) -> DPOLoss:
    """The loss and the implicit rewards of each pair.

    logps [B]: log-probability of the completion under policy and reference, summed over its tokens, EOS included; the
    reference's are None for the losses of REFERENCE_FREE. lengths [B]: the number of those tokens.

    With h = (lp_c - ref_c) - (lp_r - ref_r), b = beta, e = label_smoothing and S(x) = -(1-e) logsigmoid(x) - e
    logsigmoid(-x):

    sigmoid  S(b h)                              Rafailov et al. 2023 (2305.18290); e > 0: cDPO (Mitchell 2023)
    robust   [-(1-e) logsigmoid(b h) + e logsigmoid(-b h)] / (1 - 2e)        Chowdhury et al. 2024 (2403.00409)
    hinge    relu(1 - b h)                                      SLiC: Zhao et al. 2023 (2305.10425)
    ipo      (h - 1/(2b))^2                                     Azar et al. 2023 (2310.12036)
    ipo_avg  the same with each log-ratio divided by its completion's length; this is what TRL calls ipo
    simpo    S(b (lp_c/|c| - lp_r/|r|) - simpo_gamma)           Meng et al. 2024 (2405.14734)
    rpo      S(b h) - rpo_alpha lp_c/|c|                        Pang et al. 2024 (2404.19733), whose e is 0

    rpo's last term is the mean over each chosen completion's tokens, as in its paper; TRL's `sft` term is the mean over
    all tokens of a micro-batch, which depends on its make-up. Rewards are TRL's: b (lp - ref); simpo: b lp/|.|.
    """
    if kind not in DPO_LOSSES:
        raise ValueError(f"loss {kind!r} is none of {', '.join(DPO_LOSSES)}")
    if label_smoothing and kind not in SMOOTHED:
        raise ValueError(f"label_smoothing {label_smoothing} has no meaning for the {kind} loss")
    if kind == "robust" and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing {label_smoothing}: the robust loss needs 0 <= label_smoothing < 0.5")
    chosen, rejected = chosen_logps.float(), rejected_logps.float()
    chosen_means = chosen / chosen_lengths.clamp(min=1)
    if kind == "simpo":
        chosen_ratios, rejected_ratios = chosen_means, rejected / rejected_lengths.clamp(min=1)
    else:
        chosen_ratios, rejected_ratios = chosen - ref_chosen_logps.float(), rejected - ref_rejected_logps.float()
    h = chosen_ratios - rejected_ratios

    def smoothed(x: Tensor) -> Tensor:
        return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)

    if kind == "sigmoid":
        losses = smoothed(beta * h)
    elif kind == "robust":
        right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
        losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif kind == "hinge":
        losses = F.relu(1 - beta * h)
    elif kind == "ipo":
        losses = (h - 1 / (2 * beta)).square()
    elif kind == "ipo_avg":
        means = chosen_ratios / chosen_lengths.clamp(min=1) - rejected_ratios / rejected_lengths.clamp(min=1)
        losses = (means - 1 / (2 * beta)).square()
    elif kind == "simpo":
        losses = smoothed(beta * h - simpo_gamma)
    else:
        losses = smoothed(beta * h) - rpo_alpha * chosen_means
    return DPOLoss(losses, beta * chosen_ratios.detach(), beta * rejected_ratios.detach())


def sequence_logps(token_logps: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """(summed log-probabilities of each row's learnt tokens, fp32 [B]; their number, int64 [B]).

    token_logps [N]: from the function of that name; labels int64 [B, T], not shifted.
    """
    learnt = labels[:, 1:] != ignore_index
    # not index_add, whose sums on a GPU differ from run to run
    placed = torch.zeros(learnt.shape, device=labels.device).masked_scatter(learnt, token_logps.float())
    return placed.sum(dim=1), learnt.sum(dim=1)


# ------------------------------------------------------------------------------------------ metrics


def auc(scores: Tensor, labels: Tensor) -> float:
    """The area under the ROC curve: the chance that a right one scores higher than a wrong one, a tie counting half
    (Mann and Whitney's rank statistic). scores, labels [N]; a label of at least 0.5 is right. NaN if all are of one
    kind."""
    right = labels.flatten() >= 0.5
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    if not num_right or not num_wrong:
        return float("nan")
    _, place, counts = scores.flatten().double().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2  # counted from 1; tied scores share their mean rank
    rank_sum = ranks[place][right].double().sum().item()
    return (rank_sum - num_right * (num_right + 1) / 2) / (num_right * num_wrong)


def calibration_error(probs: Tensor, labels: Tensor, bins: int = 10) -> float:
    """The expected calibration error (Guo et al. 2017, arXiv 1706.04599): |mean probability - mean label| within each
    of `bins` equal intervals of probability, weighted by how many fall into it. probs, labels [N] in [0, 1]."""
    probs, labels = probs.flatten().double(), labels.flatten().double()
    place = (probs * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=probs.device).index_add(0, place, probs - labels)
    return gaps.abs().sum().item() / len(probs)
