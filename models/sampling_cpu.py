"""Sampling on a CPU: models.sampling.sample's tokens and log-probs, by steps that are faster on a CPU.

- noise is drawn only for the few tokens that top-k and top-p keep, and for as many rows at a time as caches hold
- top-p sorts the vocabulary, which takes as long as a small model's layers, only if its top 1024 tokens do not suffice

Dimensions: as in models/sampling.py.
"""

import itertools
import math
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models import sampling
from models.sampling import SamplingParams, last_kept
from models.tp import gather_ranks, size_of
from models.vocab_parallel import gather_vocabulary

NUM_NUMBERS = 2**18  # logits that are sampled from at a time


def sample(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    hashes: Tensor,
    params: SamplingParams,
    tp: DeviceMesh | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See models.sampling.sample."""
    draw = partial(sampling.sample, filtered=few_filtered, largest=largest_of_rows, logprobs=logprobs_of)
    few = max(1, NUM_NUMBERS // len(hashes))
    if len(logits) <= few or size_of(tp) > 1:
        return draw(logits, keys, positions, hashes, params, tp, seen)
    parts = zip(*(t.split(few) for t in (logits, keys, positions)))
    seen_parts = itertools.repeat(None) if seen is None else seen.split(few)
    tokens, logprobs = zip(*(draw(*part, hashes, params, tp, s) for part, s in zip(parts, seen_parts)))
    return torch.cat(tokens), torch.cat(logprobs)


def largest_of_rows(scores: Tensor) -> tuple[Tensor, Tensor]:
    """See models.sampling.largest_of_rows. A maximum with its index takes ten times as long as one without, so it is
    taken over a 64th of the columns, if 64 divides them."""
    parts = scores.unflatten(-1, (math.gcd(scores.shape[-1], 64), -1))  # [B, parts, V' / parts]
    part = parts.amax(dim=-1).argmax(dim=-1)
    best, place = parts[torch.arange(len(part)), part].max(dim=-1, keepdim=True)
    return best, part[:, None] * parts.shape[-1] + place


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """See models.sampling.logprobs_of; in half the time of logsumexp."""
    return logits.log_softmax(dim=-1).gather(-1, tokens)


def few_filtered(logits: Tensor, params: SamplingParams, V: int, tp: DeviceMesh | None) -> tuple[Tensor, Tensor | None]:
    """See models.sampling.all_filtered; or only some of the logits, among them all that the filters keep, and their ids
    in ascending order."""
    if params.top_k:
        few, ids = logits.topk(min(params.top_k + 1, logits.shape[-1]), dim=-1)  # one more, to see a tie at the end
        top = few if size_of(tp) == 1 else gather_ranks(few, tp).flatten(1).topk(min(params.top_k, V), dim=-1).values
        top = within = top[:, : params.top_k]  # top-p is a share of what top-k leaves
    else:
        within = gather_vocabulary(logits, V, tp)
        few, ids = within.topk(min(1024, V), dim=-1)
        if ((few - within.logsumexp(dim=-1, keepdim=True)).exp().sum(dim=-1) < params.top_p).any():
            few, ids = within.sort(dim=-1, descending=True)
        top = few
    threshold = last_kept(top, within, params.top_p)
    # with top-p alone the few are those of all tp ranks
    are_own = few.shape[-1] < logits.shape[-1] and (params.top_k or size_of(tp) == 1)
    if are_own and (few[:, -1:] < threshold).all():
        ids, order = ids.sort(dim=-1)
        few = few.gather(-1, order)
        return few.masked_fill(few < threshold, float("-inf")), ids
    return logits.masked_fill(logits < threshold, float("-inf")), None
