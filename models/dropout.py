"""Dropout without a generator: what a token drops is a function of (seed, step, its document so far, layer, feature).

So a resumed run, another layout over ranks, other micro-batches and a forward that is computed again drop the same. Two
rows that begin alike drop alike as far as they are alike.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models.noise import column_hashes, mix64, noise_key, random_bits

DROPOUT = 0x44524F50  # makes it another stream than the sampling noise of the same seed


class TokenDropout:
    """One for a whole model: `see` is told the tokens of a forward whose gradient is taken, the layers then drop."""

    def __init__(self, rate: float, seed: int):
        self.rate, self.seed, self.step = rate, seed, 0
        self.keys: Tensor | None = None  # int64 [tokens], of the forward under way; None: nothing is dropped

    def see(self, input_ids: Tensor, position_ids: Tensor) -> None:
        """input_ids [B, T]; position_ids [1 or B, T], which begin at 0 with each document."""
        self.keys = None
        if not torch.is_grad_enabled():
            return
        positions = position_ids.expand_as(input_ids)
        sums = mix64(input_ids * 0x10001 + positions + 1).cumsum(dim=1)  # mod 2^64
        before = torch.arange(input_ids.shape[1], device=input_ids.device) - positions - 1  # the document's first is 0
        others = torch.where(before >= 0, sums.gather(1, before.clamp(min=0)), 0)
        self.keys = mix64(sums - others + noise_key(DROPOUT, self.seed, self.step)).flatten()

    def __call__(self, x: Tensor, layer_key: Tensor, tp: DeviceMesh | None) -> Tensor:
        """x [tokens, features] with some features 0 and the rest larger. layer_key: noise_key of the layer, an int64
        scalar; tp: where each rank has a part of the features."""
        if self.keys is None:
            return x
        K = x.shape[1]
        first = 0 if tp is None else tp.get_local_rank() * K
        hashes = column_hashes(first + K, x.device)[first:]
        bits = random_bits(layer_key, self.keys, hashes)
        kept = (bits & 0x7FFFFFFF) >= int(self.rate * 2**31)
        return torch.where(kept, x / (1 - self.rate), 0)


def new_dropout(model: nn.Module, step: int) -> None:
    """Other noise for another optimizer step, where the model drops anything."""
    if model.dropout is not None:
        model.dropout.step = step
