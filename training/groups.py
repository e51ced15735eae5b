"""Groups of answers to one prompt: drawn, scored, drawn anew where they teach nothing, and what is measured of them.

Dimensions: A answers, G of them to one prompt (next to each other), R tokens of the longest answer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.common import Stopwatch
from models.generation import Engine
from models.records import Example, Split
from training.grpo_losses import all_alike, group_spread, soft_overlong_punishment
from training.prompts import Prompt, prompt_numbers
from training.rewards import Scorer, Scores, source_metrics
from training.rollouts import Answer, TokenSums, as_rows, draw


class Sampled(NamedTuple):
    """Answers with their rewards, the same on all ranks; those to one prompt stand together."""

    prompts: list[Prompt]
    answers: list[Answer]
    mask: Tensor  # bool [A, R]: their tokens, the EOS included
    scores: Scores
    rewards: Tensor  # fp32 [A], all penalties included, the KL not; NaN where an answer has none and is to be skipped
    seconds: dict[str, float]  # what drawing and scoring took

    @property
    def finished(self) -> list[bool]:
        return [answer.finished for answer in self.answers]


def answers_to(engine: Engine, scorer: Scorer, prompts: list[Prompt], first: int, sample_idx: int) -> Sampled:
    """An answer to each prompt, scored; see draw. A collective."""
    args, watch = scorer.args, Stopwatch(engine.device)
    answers = draw(engine, scorer, prompts, first, sample_idx)
    rows, mask, _ = as_rows(prompts, answers, engine.device)
    seconds = {"rollout": watch.lap()}
    texts, finished = [answer.text for answer in answers], [answer.finished for answer in answers]
    scores = scorer.score(prompts, rows, texts, finished)
    rewards = scores.total
    if args.soft_punish_cache:
        punishment = soft_overlong_punishment(mask.sum(1), args.max_new_tokens, args.soft_punish_cache)
        if args.mask_truncated_completions:  # of what is not learnt it would only lift the others of the group
            punishment = punishment * torch.tensor(finished, device=punishment.device)
        rewards = rewards + punishment
    seconds["score"] = watch.lap()
    return Sampled(prompts, answers, mask, scores, rewards, seconds)


class Groups(NamedTuple):
    """What the steps of an update learn from, the same on all ranks."""

    rows: list[Example]  # prompt and answer, with labels on the answer
    mask: Tensor  # bool [A, R]: the tokens of the answers,
    learnt: Tensor  # and those of them that are learnt,
    num_learnt: list[int]  # so many of each answer
    advantages: Tensor  # fp32 [A]
    kl: float  # nats of a token, where it is in the reward
    engine_logps: Tensor  # fp32 [A, R] each: what the sampler said,
    logps: Tensor | None  # what the policy said before the update; None where the only step sees it by itself,
    ref_logps: Tensor | None  # and the reference
    drawn_logps: Tensor  # where that step puts what it saw
    clipped: Tensor  # fp32 [2, A]: where the steps add the share of ratios clipped below and above


def sample_groups(engine: Engine, scorer: Scorer, train: list[Prompt], num_done: int) -> list[Sampled]:
    """Groups of answers to the prompts that follow the first num_done of the run, and as often as --max_resamples says
    to further prompts, in place of groups whose rewards are all equal (Yu et al. 2025, DAPO, arXiv 2503.14476, section
    3.2; there without an end)."""
    args, sampled = scorer.args, []
    G, missing = args.num_generations, args.rollout_batch_size // args.num_generations
    for _ in range(1 + args.max_resamples):
        numbers = prompt_numbers(len(train), num_done, missing, seed=args.seed)
        asked = [train[i] for i in numbers for _ in range(G)]
        sampled.append(answers_to(engine, scorer, asked, num_done * G, 0))
        num_done += missing
        missing = int(all_alike(sampled[-1].rewards, G).sum())
        if not missing:
            break
    return sampled


def group_metrics(sampled: list[Sampled], num_generations: int) -> dict[str, float]:
    """Of all answers drawn, also those of groups that were replaced, under TRL's names."""
    rewards = torch.cat([part.rewards for part in sampled])
    graded = rewards[~rewards.isnan()]
    lengths = torch.cat([part.mask.sum(1) for part in sampled])
    return {
        "reward": graded.mean().item() if len(graded) else 0.0,
        "reward_std": group_spread(rewards, len(rewards)).item(),
        "rewards/num_skipped": len(rewards) - len(graded),
        "frac_reward_zero_std": all_alike(rewards, num_generations).double().mean().item(),
        "num_resampled_groups": sum(len(part.rewards) for part in sampled[1:]) // num_generations,
        **source_metrics([part.scores for part in sampled]),
        **completion_metrics(lengths, [ended for part in sampled for ended in part.finished]),
    }


def completion_metrics(lengths: Tensor, finished: list[bool]) -> dict[str, float]:
    """Lengths of answers under TRL's names; an answer that ran out of tokens is clipped. lengths [A], in tokens."""
    lengths, ended = lengths.double(), torch.tensor(finished, device=lengths.device)
    metrics = {"completions/clipped_ratio": 1 - ended.double().mean().item()}
    for name, chosen in (("", lengths), ("_terminated", lengths[ended])):
        chosen = chosen if len(chosen) else lengths.new_zeros(1)
        for kind, value in (("mean", chosen.mean()), ("min", chosen.min()), ("max", chosen.max())):
            metrics[f"completions/{kind}{name}_length"] = value.item()
    return metrics


def step_metrics(groups: Groups, sums: TokenSums, num_steps: int, args, split: Split) -> dict[str, float]:
    """What the steps of an update saw, under TRL's names, but for the KL of rloo. A collective."""
    means = sums.means(split.dp)
    logps = split.sum(groups.drawn_logps) if groups.logps is None else groups.logps
    gaps = (logps - groups.engine_logps)[groups.mask].abs()
    clipped = split.sum(groups.clipped) * len(groups.rows) / (num_steps * args.step_size)
    low, high = clipped[:, ~clipped[0].isnan()]  # NaN: an answer of which nothing is learnt
    metrics = {
        "entropy": means["entropy"],
        "sampling/sampling_logp_difference/mean": gaps.mean().item(),
        "sampling/sampling_logp_difference/max": gaps.max().item(),
    }
    if args.beta:
        metrics["kl"] = groups.kl if args.kl_in_reward else means["kl"]
    if args.loss_type == "cispo":
        return metrics | {"cispo_clip_ratio": means["high"]}
    return metrics | {
        "clip_ratio/low_mean": means["low"],
        "clip_ratio/low_min": low.min().item() if len(low) else 0.0,
        "clip_ratio/high_mean": means["high"],
        "clip_ratio/high_max": high.max().item() if len(high) else 0.0,
        "clip_ratio/region_mean": means["low"] + means["high"],
    }
