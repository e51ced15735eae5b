"""The repetition penalty: which tokens each slot of the engine has seen, and how it changes their logits.

- seen tokens are a table over the vocabulary for each slot, on the device and at a fixed address, so that a decode step
  keeps its shape and costs the same for every length; the table exists only if the penalty is on
- each of the ranks that share a model keeps the table of its part of the vocabulary

Dimensions: B slots, V' this rank's part of the vocabulary, as wide as the first rank's.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.tp import own_chunk
from models.transfer import index_on
from models.vocab_parallel import most_columns


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """The logits [B, V'], those of seen tokens (bool [B, V']) divided by the penalty where positive, and multiplied by
    it where negative: Keskar et al. 2019 (arXiv 1909.05858, section 4.1) in the form of transformers."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


class SeenTokens:
    """The tokens in each slot's prompt and answer so far, `table` bool [B, V']."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, tp: DeviceMesh | None):
        self.first, self.width = own_chunk(vocab_size, tp)[0], most_columns(vocab_size, tp)
        self.table = torch.zeros(num_slots, self.width, dtype=torch.bool, device=device)
        self.slots = torch.arange(num_slots, device=device)

    def begin(self, slot: int, prompt_ids: list[int]) -> None:
        """Resets a slot to the tokens of its new prompt."""
        own = [token - self.first for token in prompt_ids if 0 <= token - self.first < self.width]
        self.table[slot] = False
        self.table[slot, index_on(own, self.table.device)] = True

    def add(self, tokens: Tensor, slots: Tensor) -> None:
        """Marks the token that each of these slots has drawn as seen; int64 [B] each."""
        columns = tokens - self.first
        own = (columns >= 0) & (columns < self.width)
        columns = torch.where(own, columns, 0)
        self.table[slots, columns] = self.table[slots, columns] | own
