"""Answers of a policy for PPO: prompts in a resumable order, drawn by all ranks and known to all, what the training
models say of their tokens, and what is measured of them.

Dimensions: A answers, R tokens of the longest answer (left-aligned), n rows of a forward, T their tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.chats import Chat
from models.common import Bounds, at_least_one, flag, visible
from models.generation import Engine, Request
from models.model import Transformer
from models.records import (
    IGNORE_INDEX,
    Example,
    Limits,
    Split,
    check_ids,
    collate,
    encode_prompt,
    get_prompt,
    naming,
    tokenising,
)
from models.tokenizer import Tokenizer
from training.data import epoch_order
from training.losses import kl_estimates, token_logps
from training.run_dir import write_lines


@dataclass(frozen=True, kw_only=True)
class RolloutArgs:
    """Prompts, and the answers that are drawn to them."""

    prompt_file: Path = flag(help="records with a prompt; other fields go to --reward_fn")
    eval_prompt_file: Path | None = flag(None, help="held-out prompts: their mean score and KL", may_change=True)
    overlong: str = flag("refuse", choices=("refuse", "skip"), help="what to do with prompts that leave no room")
    rollout_batch_size: int = flag(64, bounds=at_least_one, help="answers per update, over all ranks")
    rollout_slots: int | None = flag(
        None, bounds=at_least_one, help="answers drawn at a time on a rank; up to 128", may_change=True
    )
    max_new_tokens: int = flag(256, bounds=at_least_one, help="most tokens of an answer")
    temperature: float = flag(1.0, bounds=Bounds(least=1e-4, most=1e4), help="of the sampler and all log-probs")


class Prompt(NamedTuple):
    ids: list[int]
    fields: dict  # the whole record
    asked: str | Chat
    text: str  # what a reward function is given


def load_prompts(path: Path, tokenizer: Tokenizer, limits: Limits) -> tuple[list[Prompt], int]:
    """(the prompts of a file, how many were skipped as too long)"""
    prompts, skipped = [], 0
    for record in tokenising(path):
        prompt = get_prompt(record)
        with naming(record):
            ids = encode_prompt(prompt, tokenizer)
            check_ids(ids, limits.vocab_size, record.where)
        if 0 < len(ids) <= limits.max_seq_len:
            text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
            prompts.append(Prompt(ids, record.fields, prompt, text))
        elif ids and limits.overlong == "skip":
            skipped += 1
        else:
            raise ValueError(
                f"{record.where}: the prompt has {len(ids)} tokens, and between 1 and {limits.max_seq_len} leave "
                "room for --max_new_tokens in the model's context; lower that or choose --overlong skip"
            )
    if not prompts:
        raise ValueError(f"{path}: no prompt is left: all {skipped} leave no room for --max_new_tokens")
    return prompts, skipped


def prompt_numbers(num_prompts: int, first: int, count: int, *, seed: int) -> list[int]:
    """The prompts of the answers first..first + count - 1 of a run: a new order each epoch, without gaps in between."""
    numbers, epoch = [], first // num_prompts
    while len(numbers) < first % num_prompts + count:
        numbers += epoch_order(num_prompts, seed=seed, epoch=epoch, shuffle=True)
        epoch += 1
    return numbers[first % num_prompts :][:count]


# ---------------------------------------------------------------------------------------- rollouts


class Answer(NamedTuple):
    ids: list[int]  # the EOS that ended it included
    logps: list[float]
    text: str
    finished: bool


def draw(
    engine: Engine,
    prompts: list[Prompt],
    first: int,
    sample_idx: int,
    max_new_tokens: int,
    dp: DeviceMesh,
    on_finished: Callable[[int, Prompt, str], None] | None = None,
) -> list[Answer]:
    """An answer to each prompt, the same on all ranks, which draw a share each. A collective.

    on_finished: called with the number of the prompt, the prompt and the text as soon as this rank has an answer.
    """
    requests = [Request(first + i, sample_idx, prompt.ids, max_new_tokens) for i, prompt in enumerate(prompts)]
    own = {}
    for done in engine.generate(requests[dp.get_local_rank() :: dp.size()]):
        end = [] if done.stop_token_id is None else [done.stop_token_id]
        own[done.request.idx] = Answer(done.token_ids + end, done.logprobs, done.text, bool(end))
        if on_finished is not None:
            i = done.request.idx - first
            on_finished(i, prompts[i], done.text)
    parts = [None] * dp.size()
    dist.all_gather_object(parts, own, group=dp.get_group())
    answers = {idx: answer for part in parts for idx, answer in part.items()}
    return [answers[request.idx] for request in requests]


def as_rows(prompts: list[Prompt], answers: list[Answer], device: torch.device) -> tuple[list[Example], Tensor, Tensor]:
    """(prompt and answer, with labels on the answer; which of R places hold a token of it, bool [A, R]; the engine's
    log-probs of these, fp32 [A, R], 0 elsewhere)"""
    width = max(len(answer.ids) for answer in answers)
    mask, logps = torch.zeros(len(answers), width, dtype=torch.bool), torch.zeros(len(answers), width)
    for i, answer in enumerate(answers):
        mask[i, : len(answer.ids)] = True
        logps[i, : len(answer.ids)] = torch.tensor(answer.logps)
    rows = [
        Example(prompt.ids + answer.ids, [IGNORE_INDEX] * len(prompt.ids) + answer.ids)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return rows, mask.to(device), logps.to(device)


def shares(chosen: list[int], rows: list[Example], split: Split) -> Iterator[list[int]]:
    """The numbers of this rank's rows among the chosen, in micro-batches of like length."""
    return split.shares(chosen, key=lambda i: len(rows[i].input_ids))


def over_ranks(rows: list[Example], function: Callable[[list[Example]], Tensor], split: Split) -> Tensor:
    """function(some rows) -> [n, R], for all rows, the same on all ranks: fp32 [A, R]. A collective."""
    result = None
    for part in shares(list(range(len(rows))), rows, split):
        values = function([rows[i] for i in part])
        result = values.new_zeros(len(rows), values.shape[1]) if result is None else result
        result[part] = values[: len(part)]  # no rows give one of padding
    return split.sum(result)  # each row is one rank's; the others have 0 there


def _forward(model: Transformer, rows: list[Example], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """(final hidden states [n, T, E], labels [n, T]) of some rows; no rows give one of padding."""
    batch = collate(rows, pad_token_id, model.inv_freq.device, model.row_multiple)
    return model(batch.input_ids), batch.labels


def _left_aligned(values: Tensor, labels: Tensor, width: int) -> Tensor:
    """[n, width] from one value for each label of [n, T], row by row; 0 beyond a row's last."""
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
    places = torch.arange(width, device=labels.device) < counts[:, None]
    return values.new_zeros(places.shape).masked_scatter(places, values)


def answer_logps(
    model: Transformer, rows: list[Example], width: int, pad_token_id: int, temperature: float, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """(log-prob of each token of the answers, entropy of the distribution it was drawn from), fp32 [n, width] each."""
    hidden, labels = _forward(model, rows, pad_token_id)
    vocabulary = {"vocab_size": model.config.vocab_size, "tp": model.parallel.tp}
    values = token_logps(hidden, model.lm_head.weight, labels, **vocabulary, temperature=temperature, entropy=entropy)
    return tuple(_left_aligned(each, labels, width) for each in values)


def answer_values(model: Transformer, rows: list[Example], width: int, pad_token_id: int) -> Tensor:
    """The critic's value before each token of the answers, fp32 [n, width]."""
    hidden, labels = _forward(model, rows, pad_token_id)
    return _left_aligned(model.score(hidden)[:, :-1][labels[:, 1:] != IGNORE_INDEX], labels, width)


class Rollout(NamedTuple):
    """The answers of an update, the same on all ranks."""

    rows: list[Example]  # prompt and answer, with labels on the answer, its EOS included
    texts: list[str]
    finished: list[bool]  # whether it ended, rather than ran out of tokens
    mask: Tensor  # bool [A, R]
    engine_logps: Tensor  # fp32 [A, R] each, 0 outside the mask: what the sampler said,
    logps: Tensor  # what the policy in training says,
    ref_logps: Tensor  # and the reference
    scores: Tensor  # fp32 [A], penalties included, KL not
    step_rewards: Tensor  # fp32 [A, R]: process rewards of their own tokens
    num_cut: int  # rows that were too long for the reward model
    source_metrics: dict[str, float]  # of each source of the scores
    seconds: dict[str, float]
    values: Tensor | None = None  # fp32 [A, R]: what the critic says, where there is one

    def kls(self) -> Tensor:
        """The log-ratio to the reference of each answer, fp32 [A]: their mean is the KL."""
        return ((self.logps - self.ref_logps) * self.mask).sum(1)

    def all_scores(self) -> Tensor:
        """fp32 [A]"""
        return self.scores + self.step_rewards.sum(1)


# ----------------------------------------------------------------------------------------- metrics


class TokenSums:
    """Means over the tokens of an update's minibatches, under any names."""

    def __init__(self, device: torch.device):
        self.device, self.sums = device, {}

    def add(self, num_tokens: int, **values: Tensor) -> None:
        """Adds what num_tokens tokens have, one value each or their sum. Every rank must add the same names in the same
        order, if only of no tokens."""
        count = torch.tensor(num_tokens, dtype=torch.float64, device=self.device)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + torch.stack((value.detach().double().sum(), count))

    def means(self, dp: DeviceMesh) -> dict[str, float]:
        """Over the tokens of all ranks; 0 where there were none. A collective."""
        if not self.sums:
            return {}
        sums = torch.stack(list(self.sums.values()))  # [names, 2]
        dist.all_reduce(sums, group=dp.get_group())
        return {name: total / max(1.0, count) for name, (total, count) in zip(self.sums, sums.tolist())}


def objectives(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """What is measured of answers, under TRL's names. An answer's KL and entropy are sums over its tokens."""
    mask, kl, score = rollout.mask, rollout.kls().mean().item(), rollout.all_scores().mean().item()
    gap = (rollout.logps - rollout.engine_logps)[mask].abs()
    return {
        "objective/kl": kl,
        "objective/k3": (kl_estimates(rollout.logps, rollout.ref_logps)[1] * mask).sum(1).mean().item(),
        "objective/entropy": -(rollout.logps * mask).sum(1).mean().item(),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": score - kl_coef * kl,
        "objective/scores": score,
        "val/num_eos_tokens": sum(rollout.finished),
        "val/num_cut_for_reward": rollout.num_cut,
        **rollout.source_metrics,
        "completion_length": mask.sum(1).double().mean().item(),
        "engine/logprob_gap_mean": gap.mean().item(),
        "engine/logprob_gap_max": gap.max().item(),
    }


def check_first_minibatch(means: dict[str, float], rollout: Rollout, dtype: torch.dtype, *, is_reference: bool) -> None:
    """Raises RuntimeError unless the policy is still the one that drew: ratio 1, the engine's log-probs (a sampler of
    another temperature leaves the ratio at 1), and those of the reference if it has the same weights.

    means: of the first minibatch, see TokenSums. dtype: of the computation.
    """
    least, most_clipped, gap = (1e-4, 0.0, 1e-3) if dtype == torch.float32 else (2e-2, 1e-2, 5e-2)
    wrong = []
    if not (abs(means["ratio"] - 1) <= least and means["approx_kl"] <= least and means["clipped"] <= most_clipped):
        wrong.append(f"ratio {means['ratio']}, approxkl {means['approx_kl']}, clipfrac {means['clipped']}")
    for name, others in (("engine", rollout.engine_logps), ("reference", rollout.ref_logps)):
        away = (rollout.logps - others)[rollout.mask].abs().mean().item()
        if not away <= gap and (name == "engine" or is_reference):
            wrong.append(f"log-probs {away} away from those of the {name}, which has the same weights")
    if wrong:
        raise RuntimeError(f"--debug_checks: at the first minibatch {'; '.join(wrong)}")


def show_samples(
    step: int, prompts: list[Prompt], rollout: Rollout, count: int, log: TextIO, tokenizer: Tokenizer
) -> str:
    """Writes all answers to the log, and returns the first `count` as a table for people."""
    kls, scores = rollout.kls().tolist(), rollout.all_scores().tolist()
    shown = [f"step {step}: held-out score {sum(scores) / len(scores):.4f}, KL {sum(kls) / len(kls):.4f}"]
    for i, prompt in enumerate(prompts):
        asked = tokenizer.decode(prompt.ids, skip_special_tokens=False)
        line = {"step": step, "prompt": asked, "output": rollout.texts[i], "score": scores[i], "kl": kls[i]}
        write_lines(log, [line | {"finished": rollout.finished[i]}])
        if i < count:
            end = "" if rollout.finished[i] else " (not finished)"
            shown.append(f"  {scores[i]:8.3f}  {visible(asked)[-60:]} -> {visible(rollout.texts[i])[:160]}{end}")
    return "\n".join(shown)
