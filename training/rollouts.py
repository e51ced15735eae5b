"""Answers of a policy for PPO: prompts in a resumable order, drawn by all ranks and known to all, and what the training
models say of their tokens.

Dimensions: A answers, R tokens of the longest answer (left-aligned), n rows of a forward, T their tokens.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.generation import Engine, Request
from models.model import Transformer
from models.tokenizer import Tokenizer
from models.tp import size_of
from training.data import (
    IGNORE_INDEX,
    Example,
    check_ids,
    collate,
    encode_prompt,
    epoch_order,
    get_prompt,
    micro_batches,
    naming,
    tokenising,
)
from training.losses import token_logps


class Prompt(NamedTuple):
    ids: list[int]
    fields: dict  # the whole record
    text: str  # what a reward function is given


def load_prompts(
    path: Path, tokenizer: Tokenizer, most: int, vocab_size: int, overlong: str
) -> tuple[list[Prompt], int]:
    """(the prompts of a file, how many were skipped since they are longer than `most` tokens)"""
    prompts, skipped = [], 0
    for record in tokenising(path):
        prompt = get_prompt(record)
        with naming(record):
            ids = encode_prompt(prompt, tokenizer)
            check_ids(ids, vocab_size, record.where)
        if not ids or len(ids) > most:
            if overlong == "refuse" or not ids:
                raise ValueError(
                    f"{record.where}: the prompt has {len(ids)} tokens, and between 1 and {most} leave room for "
                    "--max_new_tokens in the model's context; lower that or choose --overlong skip"
                )
            skipped += 1
            continue
        prompts.append(Prompt(ids, record.fields, prompt if isinstance(prompt, str) else tokenizer.decode(ids)))
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
    engine: Engine, prompts: list[Prompt], first: int, sample_idx: int, max_new_tokens: int, dp: DeviceMesh
) -> list[Answer]:
    """An answer to each prompt, the same on all ranks, which draw a share each. A collective."""
    requests = [Request(first + i, sample_idx, prompt.ids, max_new_tokens) for i, prompt in enumerate(prompts)]
    mine = {}
    for done in engine.generate(requests[dp.get_local_rank() :: dp.size()]):
        end = [] if done.stop_token_id is None else [done.stop_token_id]
        answer = Answer(done.token_ids + end, done.logprobs, done.text, bool(end))
        mine[done.request.idx] = answer
    parts = [None] * dp.size()
    dist.all_gather_object(parts, mine, group=dp.get_group())
    found = {idx: answer for part in parts for idx, answer in part.items()}
    return [found[request.idx] for request in requests]


def shares(chosen: list[int], rows: list[Example], *, micro_batch_size: int, dp: DeviceMesh) -> Iterator[list[int]]:
    """The numbers of this rank's rows among the chosen, in micro-batches of like length."""
    length = lambda i: len(rows[i].input_ids)  # noqa: E731
    return micro_batches(chosen, micro_batch_size, dp.get_local_rank(), dp.size(), key=length)


def over_ranks(
    rows: list[Example], function: Callable[[list[Example]], Tensor], *, micro_batch_size: int, dp: DeviceMesh
) -> Tensor:
    """function(some rows) -> [n, R], for all rows, the same on all ranks: fp32 [A, R]. A collective."""
    result = None
    for part in shares(list(range(len(rows))), rows, micro_batch_size=micro_batch_size, dp=dp):
        values = function([rows[i] for i in part])
        result = values.new_zeros(len(rows), values.shape[1]) if result is None else result
        result[part] = values[: len(part)]  # no rows give one of padding
    dist.all_reduce(result, group=dp.get_group())  # each row is one rank's; the others have 0 there
    return result


def _forward(model: Transformer, rows: list[Example], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """(final hidden states [n, T, E], labels [n, T]) of some rows; no rows give one of padding."""
    multiple_of = size_of(model.parallel.tp) if model.parallel.sequence_parallel else 1
    batch = collate(rows, pad_token_id, model.inv_freq.device, multiple_of)
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
    options = {"vocab_size": model.config.vocab_size, "tp": model.parallel.tp, "temperature": temperature}
    found = token_logps(hidden, model.lm_head.weight, labels, **options, entropy=entropy)
    return tuple(_left_aligned(values, labels, width) for values in found)


def answer_values(model: Transformer, rows: list[Example], width: int, pad_token_id: int) -> Tensor:
    """The critic's value before each token of the answers, fp32 [n, width]."""
    hidden, labels = _forward(model, rows, pad_token_id)
    return _left_aligned(model.score(hidden)[:, :-1][labels[:, 1:] != IGNORE_INDEX], labels, width)
