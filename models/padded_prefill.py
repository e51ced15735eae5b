"""Attention of a prefill by SDPA, for fp32, devices and head dims that the variable-length kernel does not take.

Chunks of similar size are padded to the same size and computed together, so that kernels are launched for each size and
not for each chunk. Sizes are powers of two from 64 on: on a GPU SDPA makes a plan for each new size, and chooses
kernels by its divisors.

Dimensions: N packed tokens, C chunks of a size, T query tokens, S keys, H query heads, K key/value heads, D head dim.
"""

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.attention import causal_attention
from models.pages import PAGE, pages_for
from models.transfer import to_device


class Batch(NamedTuple):
    """Chunks of one size. A chunk is padded with its own last token, so that it reads nothing of other sequences."""

    size: tuple[int, int]  # C, T
    queries: Tensor  # int64 [C * T], indices of packed tokens
    keys: Tensor  # int64 [C * S], places of tokens in the cache's flattened pages
    mask: Tensor  # bool [C, 1, T, S]


def padded_length(length: int) -> int:
    return PAGE << (pages_for(length) - 1).bit_length()


def batches_of(
    starts: list[int], lengths: list[int], key_places: list[np.ndarray], device: torch.device
) -> tuple[list[Batch], Tensor]:
    """(chunks in batches; the index of each packed token in the batches' concatenated outputs, int64 [N]). starts,
    lengths: of the chunks; key_places: of all tokens of a chunk's sequence up to its end, int64 [start + length]."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, (start, length) in enumerate(zip(starts, lengths)):
        by_size.setdefault((padded_length(length), padded_length(start + length)), []).append(i)
    first, back, arrays = [0, *accumulate(lengths)], np.empty(sum(lengths), dtype=np.int64), []
    end = 0
    for (T, S), chunks in by_size.items():
        queries = [first[i] + np.minimum(np.arange(T), lengths[i] - 1) for i in chunks]
        keys = [key_places[i][np.minimum(np.arange(S), len(key_places[i]) - 1)] for i in chunks]
        arrays += [np.concatenate(queries), np.concatenate(keys), np.array([starts[i] for i in chunks])]
        for i in chunks:
            back[first[i] : first[i + 1]] = end + np.arange(lengths[i])
            end += T
    numbers = to_device(np.concatenate([*arrays, back]), device)  # all in one copy
    *parts, back = numbers.split([*map(len, arrays), len(back)])
    batches = []
    for (T, S), queries, keys, begin in zip(by_size, parts[::3], parts[1::3], parts[2::3]):
        last_seen = begin[:, None] + torch.arange(T, device=device)  # [C, T]
        mask = torch.arange(S, device=device) <= last_seen[..., None]
        batches.append(Batch((len(begin), T), queries, keys, mask[:, None]))
    return batches, back


def attend_batches(layer: int, q: Tensor, k: Tensor, v: Tensor, batches: list[Batch], back: Tensor) -> Tensor:
    """q [N, H, D]; k and v: all tokens of the cache, [tokens, K, D] -> [N, H, D]"""
    outputs = []
    for (C, T), queries, keys, mask in batches:
        rows = q.index_select(0, queries).view(C, T, *q.shape[1:])
        seen = (t.index_select(0, keys).view(C, -1, *t.shape[1:]) for t in (k, v))
        outputs.append(causal_attention(layer, rows, *seen, mask).flatten(0, 1))
    return torch.cat(outputs).index_select(0, back)
