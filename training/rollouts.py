"""Answers of a policy in reinforcement learning: drawn by all ranks and known to all, and what the models in training
say of their tokens.

Dimensions: A answers, R tokens of the longest answer (left-aligned), n rows of a forward, T their tokens.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.checkpoint import Folder
from models.common import Runtime
from models.decode import can_pack, copy_for_inference
from models.forward import forward_rows
from models.generation import Completion, Engine, Request
from models.memory import free_memory, plan_cache
from models.model import Transformer
from models.records import IGNORE_INDEX, Example, Split
from models.reward import pass_at_k
from models.sampling import SamplingParams, stops_of
from models.tp import local
from models.transfer import index_on
from training.data import epoch_order
from training.losses import placed, token_logps
from training.prompts import Prompt, RolloutArgs
from training.rewards import Scorer
from training.samples import draw_together

# ---------------------------------------------------------------------------------------- rollouts


def make_engine(
    policy: Transformer, folder: Folder, args: RolloutArgs, *, max_seq_len: int, dp_size: int, runtime: Runtime
) -> Engine:
    """What draws answers, from an inference copy of the policy (its `model`, to be refreshed). A rank draws its share
    of an update at a time, as many as --rollout_slots says. Raises ValueError if memory does not hold one answer. A
    collective."""
    stop_ids, stop = stops_of(args.stop or (), folder.tokenizer)
    stop_ids = tuple(dict.fromkeys((*folder.eos_token_ids, *stop_ids)))
    model, share = copy_for_inference(policy, pack=can_pack(runtime)), -(-args.rollout_batch_size // dp_size)
    num_slots, num_pages = args.rollout_slots or min(128, share), None
    if runtime.device.type == "cuda":
        num_slots, num_pages, *_ = plan_cache(
            model,
            num_slots=args.rollout_slots,
            num_requests=share,
            usual_tokens=max_seq_len,
            known_tokens=max_seq_len,
            most_tokens=max_seq_len,
            prefill_tokens=args.prefill_tokens,
            reserved=0 if args.sleep else memory_of_training(policy, free_memory(runtime.device)),
        )
    return Engine(
        model,
        SamplingParams(args.temperature, seed=args.seed, stop_token_ids=stop_ids, stop=stop),
        num_slots=num_slots,
        num_pages=num_pages,
        max_seq_len=max_seq_len,
        tokenizer=folder.tokenizer,
        compile=runtime.compile,
        prefill_tokens=args.prefill_tokens,
    )


def memory_of_training(model: Transformer, free: int) -> int:
    """Bytes that an update will take of those that are free when the weights and the optimizer's state are there: the
    gradients, and half of what they leave, for activations, whose size nobody knows before. With --sleep the cache is
    given back meanwhile."""
    parts = [local(p) for p in model.parameters() if p.requires_grad]
    gradients = sum(part.nbytes for part in parts if part.device.type == "cuda")
    return gradients + max(0, free - gradients) // 2


class Answer(NamedTuple):
    ids: list[int]  # all that was drawn: the EOS or the stop string that ended it included
    logps: list[float]
    text: str
    finished: bool


def draw(engine: Engine, scorer: Scorer, prompts: list[Prompt], first: int, sample_idx: int) -> list[Answer]:
    """An answer to each prompt, the same on all ranks; the scorer hears of each on the rank that drew it. A collective.
    first: number of the first answer, which with sample_idx decides the sampler's noise."""
    length = scorer.args.max_new_tokens
    requests = [Request(first + i, sample_idx, each.ids, length, each.where) for i, each in enumerate(prompts)]

    def answer_of(done: Completion) -> Answer:
        i = done.request.idx - first
        scorer.submit(i, prompts[i], done.text)
        return Answer(done.token_ids + done.stop_ids, done.logprobs, done.text, done.finish_reason == "stop")

    answers = draw_together(engine, requests, scorer.split.dp, scorer.stop, answer_of)
    return [answers[first + i] for i in range(len(prompts))]


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


def minibatches(args: RolloutArgs, step: int, num_passes: int) -> Iterator[list[int]]:
    """The numbers of the answers of each optimizer step of an update, which takes all answers so many times."""
    for number in range((step - 1) * num_passes, step * num_passes):
        order = epoch_order(args.rollout_batch_size, seed=args.seed, epoch=number, shuffle=True)
        yield from (order[i : i + args.step_size] for i in range(0, len(order), args.step_size))


def rows_at(part: list[int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """What takes these rows of a tensor [A, ...] on the device, for which nobody waits."""
    index = index_on(part, device)
    return lambda values: values.index_select(0, index)


def over_ranks(rows: list[Example], function: Callable[[list[Example]], Tensor], split: Split) -> Tensor:
    """function(n rows, maybe none) -> [n, R], for all rows, the same on all ranks: fp32 [A, R]. A collective."""
    result = None
    for part in split.numbers(rows):
        values = function([rows[i] for i in part])
        result = values.new_zeros(len(rows), values.shape[1]) if result is None else result
        result.index_copy_(0, index_on(part, values.device), values)
    return split.sum(result)  # each row is one rank's; the others have 0 there


def _left_aligned(values: Tensor, labels: Tensor, width: int) -> Tensor:
    """[n, width] from one value for each label of [n, T], row by row; 0 beyond a row's last."""
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
    return placed(values, torch.arange(width, device=labels.device) < counts[:, None])


def answer_logps(
    model: Transformer, rows: list[Example], width: int, split: Split, temperature: float, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """(log-prob of each token of the answers, entropy of the distribution it was drawn from), fp32 [n, width] each; no
    rows give [0, width], in the graph of a forward."""
    forward = forward_rows(model, rows, split)
    options = {"learnt": forward.learnt, "vocab_size": model.config.vocab_size, "tp": model.parallel.tp}
    options |= {"temperature": temperature, "entropy": entropy}
    values = token_logps(forward.hidden, model.lm_head.weight, forward.labels, **options)
    return tuple(_left_aligned(each, forward.row_labels, width) for each in values)


@torch.no_grad()
def all_logps(model: Transformer, rows: list[Example], width: int, split: Split, temperature: float) -> Tensor:
    """answer_logps of all rows, without gradient, the same on all ranks: fp32 [A, width]. A collective."""
    return over_ranks(rows, lambda part: answer_logps(model, part, width, split, temperature)[0], split)


def answer_values(model: Transformer, rows: list[Example], width: int, split: Split) -> Tensor:
    """The critic's value before each token of the answers, fp32 [n, width]; no rows as in answer_logps."""
    forward = forward_rows(model, rows, split)
    values = model.score(forward.hidden).flatten().index_select(0, forward.learnt)
    return _left_aligned(values, forward.row_labels, width)


# ----------------------------------------------------------------------------------------- metrics


class TokenSums:
    """Means over the tokens of an update's minibatches, under any names."""

    def __init__(self, device: torch.device):
        self.device, self.sums = device, {}

    def add(self, num_tokens: int | Tensor, **values: Tensor) -> None:
        """Adds what num_tokens tokens have, one value each or their sum. Every rank must add the same names in the same
        order, if only of no tokens. A number that is on the device stays there."""
        if not isinstance(num_tokens, Tensor):  # a kernel writes it: sent, it would be waited for
            num_tokens = torch.full((), num_tokens, device=self.device)
        count = num_tokens.double()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + torch.stack((value.detach().double().sum(), count))

    def means(self, split: Split) -> dict[str, float]:
        """Over the tokens of all ranks; 0 where there were none. A collective."""
        if not self.sums:
            return {}
        sums = split.sum(torch.stack(list(self.sums.values())))  # [names, 2]
        return {name: total / max(1.0, count) for name, (total, count) in zip(self.sums, sums.tolist())}


def pass_rates(checked: Tensor | None, num_generations: int) -> dict[str, float]:
    """pass@1 to pass@N of N answers to each prompt, by powers of two: an answer passes if the first reward function
    gives it at least 1. checked: what that gave, [A]; without a reward function there is nothing to pass."""
    if checked is None:
        return {}
    passed = (checked >= 1).view(-1, num_generations).sum(dim=1).tolist()
    ks = sorted({*(2**i for i in range(num_generations.bit_length())), num_generations})
    return {f"pass@{k}": sum(pass_at_k(num_generations, n, k) for n in passed) / len(passed) for k in ks}
