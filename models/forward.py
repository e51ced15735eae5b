"""Runs rows of any length through a model in one forward pass: padded side by side, or packed end to end.

Dimensions: n rows of the forward (1 where rows are packed), T their tokens, E model dim.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.attention import causal_attention, document_attention, length_multiple
from models.batches import Split, collate, pack_row
from models.model import Transformer
from models.records import IGNORE_INDEX, Example
from models.transfer import index_on, to_device


class Forward(NamedTuple):
    """The results of a forward pass over some rows."""

    hidden: Tensor  # [n, T, E], the final hidden states
    labels: Tensor  # int64 [n, T], not shifted; in packed rows no token predicts the next row's first
    row_labels: Tensor  # int64 [rows, longest], the labels by row, right-padded
    starts: list[int]  # index of each row's first token in hidden.flatten(0, 1)
    learnt: Tensor  # int64 [N]: indices there of the tokens that predict a label, row by row

    def at(self, places: list[tuple[int, int]]) -> Tensor:
        """Returns the hidden states [N, E] of tokens, each given as (row, position in it)."""
        index = [self.starts[row] + position for row, position in places]
        return self.hidden.flatten(0, 1).index_select(0, index_on(index, self.hidden.device))


def forward_rows(model: Transformer, rows: list[Example], split: Split) -> Forward:
    """Runs the rows in one forward pass. With a token budget they are packed into one row, where they do not attend to
    each other and each has its own positions. Without rows it runs a row of padding, so that the collectives of forward
    and backward run; row_labels is then [0, T], and a loss summed over the rows is 0."""
    device, packed = model.inv_freq.device, split.max_tokens is not None and len(rows) > 1
    dtype = model.dtype
    multiple = math.lcm(model.row_multiple, length_multiple(device, dtype, model.config.head_dim))
    batch = collate([pack_row(rows)] if packed else rows, split.pad_token_id, device, multiple)
    width, attend = batch.input_ids.shape[1], causal_attention
    if batch.lengths is not None:
        options = {"head_dim": model.config.head_dim, "compiled": model.layers[0].compiled}
        attend = document_attention(batch.lengths, width, device, dtype, **options)
    hidden = model(batch.input_ids, batch.position_ids, attend)
    if not packed:
        starts = [i * width for i in range(len(rows))]
        return Forward(hidden, batch.labels, batch.labels[: len(rows)], starts, batch.learnt)
    row_labels = pad_sequence([torch.as_tensor(row.labels) for row in rows], True, padding_value=IGNORE_INDEX)
    *starts, _ = accumulate((len(row.input_ids) for row in rows), initial=0)
    return Forward(hidden, batch.labels, to_device(row_labels, device, torch.int64), starts, batch.learnt)
