"""Rollouts of reinforcement learning: the ranks sample answers together, exchange them, and compute the log-probs and
values of their tokens with the models in training.

Dimensions: A answers, R tokens of the longest answer (left-aligned), n rows of a forward pass, T their tokens.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.batches import Split
from models.checkpoint import Folder
from models.common import Runtime, given_of, say
from models.decode import can_pack, copy_for_inference
from models.forward import forward_rows
from models.fsdp import ParallelArgs, reshard
from models.generation import Completion, Engine, Request
from models.memory import free_memory, plan_cache
from models.model import Transformer
from models.records import IGNORE_INDEX, Example
from models.reward import pass_at_k
from models.sampling import SamplingParams
from models.tp import local
from models.transfer import index_on
from training.data import epoch_order
from training.losses import placed, token_logps
from training.prompts import Prompt, RolloutArgs
from training.rewards import Scorer
from training.samples import draw_together

# ---------------------------------------------------------------------------------------- rollouts


def make_engine(
    policy: Transformer,
    folder: Folder,
    args: RolloutArgs,
    *,
    max_seq_len: int,
    dp_size: int,
    runtime: Runtime,
    critic: Transformer | None = None,
) -> Engine:
    """Returns an engine on an inference copy of the policy (`engine.model`, to be refreshed after updates). A dp rank
    generates its share of an update's answers, --rollout_slots at a time. Raises ValueError if not even one answer fits
    in memory. A collective. args: of a trainer, with ParallelArgs."""
    stop_ids, stop = args.stops(folder.tokenizer, folder.eos_token_ids)
    model, share = copy_for_inference(policy, pack=can_pack(runtime)), -(-args.rollout_batch_size // dp_size)
    num_slots, num_pages = min(args.rollout_slots or 128, share), None
    if runtime.device.type == "cuda":
        advice = "lower --max_prompt_len, --max_new_tokens or --prefill_tokens"
        num_slots, num_pages, *_ = plan_cache(
            model,
            num_slots=args.rollout_slots,
            num_requests=share,
            usual_tokens=max_seq_len,
            known_tokens=max_seq_len,
            most_tokens=max_seq_len,
            prefill_tokens=args.prefill_tokens,
            reserved=0 if args.sleep else memory_of_training([policy, critic], free_memory(runtime.device), args),
            advice=advice if args.sleep else f"give --sleep 1, or {advice}",
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


def memory_of_training(models: list[nn.Module | None], free: int, args: ParallelArgs) -> int:
    """Estimates how many of the `free` bytes, left beside weights and optimizer state, an update needs: the gradients
    of the largest of the models, which learn one after the other, and half of the remainder for activations, whose size
    is not known in advance. (With --sleep nothing is reserved: the engine releases its cache during all of that.)"""
    gradients = 0
    for model in filter(None, models):
        trained = [p for p in model.parameters() if p.requires_grad]
        if args.sync_every_micro_batch:
            of_model = sum(local(p).nbytes for p in trained if p.device.type == "cuda")
        else:  # they accumulate whole, in fp32, also those of weights that --cpu_offload keeps
            of_model = 4 * sum(p.numel() for p in trained) // args.tensor_parallel_size
        gradients = max(gradients, of_model)
    return gradients + max(0, free - gradients) // 2


class Answer(NamedTuple):
    ids: list[int]  # all sampled tokens, including the EOS or stop string that ended the answer
    logps: list[float]
    text: str
    finished: bool


def draw(engine: Engine, scorer: Scorer, prompts: list[Prompt], first: int, sample_idx: int) -> list[Answer]:
    """Samples an answer to each prompt and returns them on all ranks; the rank that sampled an answer submits it to the
    scorer. A collective. first: number of the first answer; with sample_idx it determines the sampling noise."""
    engine.pool.forget()  # an evaluation's pages differ in their last bits from those that a resumed run computes
    length = scorer.args.max_new_tokens
    requests = [Request(first + i, sample_idx, each.ids, length, each.where) for i, each in enumerate(prompts)]

    def answer_of(done: Completion) -> Answer:
        i = done.request.idx - first
        scorer.submit(i, prompts[i], done.text)
        return Answer(done.token_ids + done.stop_ids, done.logprobs, done.text, done.finish_reason == "stop")

    answers = draw_together(engine, requests, scorer.split.dp, scorer.stop, answer_of)
    return [answers[first + i] for i in range(len(prompts))]


def as_rows(prompts: list[Prompt], answers: list[Answer], device: torch.device) -> tuple[list[Example], Tensor, Tensor]:
    """Returns (rows of prompt and answer, with labels on the answer; the mask of the answers' tokens, bool [A, R]; the
    engine's log-probs of these tokens, fp32 [A, R], 0 outside the mask)."""
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
    """Yields the indices of the answers of each optimizer step of an update, for num_passes passes over all answers."""
    for number in range((step - 1) * num_passes, step * num_passes):
        order = epoch_order(args.rollout_batch_size, seed=args.seed, epoch=number)
        yield from (order[i : i + args.step_size] for i in range(0, len(order), args.step_size))


def say_what_is_not_clipped(args: RolloutArgs, num_passes: int, *names: str) -> None:
    """Says if one of these flags, each a range to clip to, is given although an update is one optimizer step: its
    ratios are 1 then, and its values the old ones, but for rounding."""
    given = given_of(args, *names)
    if given and num_passes * args.rollout_batch_size == args.step_size:
        say(f"{', '.join(given)}: nothing is clipped, since an update is one step, from the model that answered")


def rows_at(part: list[int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns a function that selects these rows of a tensor [A, ...] on its device, without a host sync."""
    index = index_on(part, device)
    return lambda values: values.index_select(0, index)


@torch.no_grad()
def over_ranks(
    model: Transformer, rows: list[Example], function: Callable[[list[Example]], Tensor], split: Split
) -> Tensor:
    """Applies function(n rows, maybe 0) -> [n, R], which runs the model, to all rows, split over ranks; all get fp32
    [A, R]. A collective."""
    result = None
    for part in split.numbers(rows):
        values = function([rows[i] for i in part])
        result = values.new_zeros(len(rows), values.shape[1]) if result is None else result
        result.index_copy_(0, index_on(part, values.device), values)
    reshard(model)
    return split.sum(result)  # one rank computed each row; the others hold 0 there


def _left_aligned(values: Tensor, labels: Tensor, width: int) -> Tensor:
    """Arranges one value per label of [n, T], given row by row, as [n, width], left-aligned and padded with 0."""
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
    return placed(values, torch.arange(width, device=labels.device) < counts[:, None])


def answer_logps(
    model: Transformer, rows: list[Example], width: int, split: Split, temperature: float, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns (log-prob of each answer token, entropy of its distribution), fp32 [n, width] each. Without rows: [0,
    width], still attached to the graph of a forward pass, so that its collectives run."""
    forward = forward_rows(model, rows, split)
    options = {"learnt": forward.learnt, "vocab_size": model.config.vocab_size, "tp": model.parallel.tp}
    options |= {"temperature": temperature, "entropy": entropy}
    values = token_logps(forward.hidden, model.lm_head.weight, forward.labels, **options)
    return tuple(_left_aligned(each, forward.row_labels, width) for each in values)


def all_logps(model: Transformer, rows: list[Example], width: int, split: Split, temperature: float) -> Tensor:
    """Returns answer_logps of all rows, which the ranks share, without gradient: fp32 [A, width]. A collective."""
    return over_ranks(model, rows, lambda part: answer_logps(model, part, width, split, temperature)[0], split)


def answer_values(model: Transformer, rows: list[Example], width: int, split: Split) -> Tensor:
    """Returns the critic's value before each answer token, fp32 [n, width]; without rows, as answer_logps."""
    forward = forward_rows(model, rows, split)
    values = model.score(forward.hidden).flatten().index_select(0, forward.learnt)
    return _left_aligned(values, forward.row_labels, width)


def all_values(critic: Transformer, rows: list[Example], width: int, split: Split) -> Tensor:
    """Returns answer_values of all rows, as all_logps."""
    return over_ranks(critic, rows, lambda part: answer_values(critic, part, width, split), split)


# ----------------------------------------------------------------------------------------- metrics


class TokenSums:
    """Accumulates token means of any metrics over the minibatches of an update."""

    def __init__(self, device: torch.device):
        self.device, self.sums = device, {}

    def add(self, num_tokens: int | Tensor, **values: Tensor) -> None:
        """Adds values of num_tokens tokens: one value for each token, or their sum. Every rank must add the same names
        in the same order, also for 0 tokens. A num_tokens on the device is not read on the host."""
        if not isinstance(num_tokens, Tensor):  # torch.full launches a kernel; a copy from the host would sync
            num_tokens = torch.full((), num_tokens, device=self.device)
        count = num_tokens.double()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + torch.stack((value.detach().double().sum(), count))

    def means(self, split: Split) -> dict[str, float]:
        """Returns the means over the tokens of all ranks, 0 if there are none. A collective."""
        sums = split.sum(torch.stack(list(self.sums.values())))  # [names, 2]
        return {name: total / max(1.0, count) for name, (total, count) in zip(self.sums, sums.tolist())}


def pass_rates(checked: Tensor | None, num_generations: int) -> dict[str, float]:
    """Returns pass@k for k = 1, 2, 4, ... and N, with N answers to each prompt. An answer passes if its grade from the
    first reward function is at least 1. checked: these grades, [A]; None without a reward function: returns {}."""
    if checked is None:
        return {}
    passed = (checked >= 1).view(-1, num_generations).sum(dim=1).tolist()
    ks = sorted({*(2**i for i in range(num_generations.bit_length())), num_generations})
    return {f"pass@{k}": sum(pass_at_k(num_generations, n, k) for n in passed) / len(passed) for k in ks}


def check_first_minibatch(
    means: dict[str, float], logps: Tensor, others: dict[str, Tensor], mask: Tensor, dtype: torch.dtype
) -> None:
    """Raises RuntimeError unless, at an update's first minibatch, the policy is still the one that sampled: its ratio
    is 1, and its log-probs are those of others with the same weights (a wrong sampling temperature would leave the
    ratio at 1). means: of the minibatch, from TokenSums. logps: of the policy, fp32 [A, R]; others: {whose: theirs};
    mask: the answers' tokens. dtype: of the computation."""
    least, most_clipped, gap = (1e-4, 0.0, 1e-3) if dtype == torch.float32 else (2e-2, 1e-2, 5e-2)
    wrong = []
    if not (abs(means["ratio"] - 1) <= least and means["approx_kl"] <= least and means["clipped"] <= most_clipped):
        wrong.append(f"ratio {means['ratio']}, approxkl {means['approx_kl']}, clipfrac {means['clipped']}")
    for name, theirs in others.items():
        away = (logps - theirs)[mask].abs().mean().item()
        if not away <= gap:
            wrong.append(f"log-probs {away} away from those of the {name}, though the weights are the same")
    if wrong:
        raise RuntimeError(f"--debug_checks: at the first minibatch {'; '.join(wrong)}")
