"""Dropout without a generator: a token's mask is a function of (seed, step, its document so far, layer, feature).

So masks are the same in a resumed run, on another layout of ranks, with other micro-batches and in a recomputed
forward. Two rows with a common prefix have the same masks there.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models.noise import column_hashes, mix64, noise_key, random_bits

DROPOUT = 0x44524F50  # separates this noise from the sampling noise of the same seed


class TokenDropout:
    """Dropout of a whole model: a forward pass first gives its tokens to `see`, then the layers call this."""

    def __init__(self, rate: float, seed: int):
        self.rate, self.seed, self.step = rate, seed, 0
        self.keys: Tensor | None = None  # int64 [tokens] of the current forward; None: no dropout

    def see(self, input_ids: Tensor, position_ids: Tensor) -> None:
        """input_ids [B, T]; position_ids [1 or B, T], which begin at 0 in each document. No dropout without grad."""
        self.keys = None
        if not torch.is_grad_enabled():
            return
        positions = position_ids.expand_as(input_ids)
        sums = mix64(input_ids * 0x10001 + positions + 1).cumsum(dim=1)  # mod 2^64
        before = torch.arange(input_ids.shape[1], device=input_ids.device) - positions - 1  # the document's first is 0
        others = torch.where(before >= 0, sums.gather(1, before.clamp(min=0)), 0)
        self.keys = mix64(sums - others + noise_key(DROPOUT, self.seed, self.step)).flatten()

    def __call__(self, x: Tensor, layer_key: Tensor, tp: DeviceMesh | None) -> Tensor:
        """Zeroes some features of x [tokens, features] and scales up the others. layer_key: noise_key of the layer, an
        int64 scalar; tp: given if each rank has a part of the features."""
        if self.keys is None:
            return x
        K = x.shape[1]
        first = 0 if tp is None else tp.get_local_rank() * K
        hashes = column_hashes(first + K, x.device)[first:]
        bits = random_bits(layer_key, self.keys, hashes)
        kept = (bits & 0x7FFFFFFF) >= int(self.rate * 2**31)
        return torch.where(kept, x / (1 - self.rate), 0)


def new_dropout(model: nn.Module, step: int) -> None:
    """Changes the noise for an optimizer step, if the model has dropout."""
    if model.dropout is not None:
        model.dropout.step = step
