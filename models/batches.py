"""Rows in batches: their shares of the ranks and forward passes, packed end to end, or padded side by side.

Dimensions: B rows, T tokens of a row with its padding, N tokens that predict a label.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.packing import groups_of_ranks
from models.records import IGNORE_INDEX, Example
from models.transfer import to_device

Row = TypeVar("Row")


def micro_batches(
    rows: list[Row], size: int, length: Callable[[Row], int], dp_rank: int = 0, dp_size: int = 1
) -> Iterator[list[Row]]:
    """One rank's share of a batch in groups of at most `size` rows, of similar length to keep padding small. Every rank
    yields the same number of groups, since each runs collectives; a group may be empty."""
    share = sorted(rows, key=length)[dp_rank::dp_size]
    for start in range(0, -(-len(rows) // dp_size), size):
        yield share[start : start + size]


class Split(NamedTuple):
    """How the rows of a step are divided over the data-parallel ranks, and on each rank over forward passes."""

    micro_batch_size: int  # rows of a forward on one rank
    dp: DeviceMesh
    pad_token_id: int
    max_tokens: int | None = None  # of a forward over packed rows, whatever their number; None: rows are not packed
    check: Callable[[], None] | None = None  # called by all ranks before each forward; may raise to end the run

    def shares(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """This rank's rows, one group for each forward pass."""
        for numbers in self.numbers(rows):
            yield [rows[i] for i in numbers]

    def numbers(self, rows: Sequence[Row], chosen: list[int] | None = None) -> Iterator[list[int]]:
        """Indices of this rank's rows, among the chosen or all, one group for each forward pass: see micro_batches, and
        for packed rows groups_of_ranks. A row's `sequences` are the token ids that it puts through the model."""
        chosen = list(range(len(rows))) if chosen is None else chosen
        lengths = {i: list(map(len, rows[i].sequences)) for i in chosen}
        rank, size = self.dp.get_local_rank(), self.dp.size()
        if self.max_tokens is None:
            shares = micro_batches(chosen, self.micro_batch_size, lambda i: max(lengths[i]), rank, size)
        else:
            groups = groups_of_ranks([sum(lengths[i]) for i in chosen], self.max_tokens, size)[rank]
            shares = ([chosen[j] for j in group] for group in groups)
        for share in shares:
            if self.check is not None:
                self.check()
            yield share

    def note(self) -> str:
        """A text for progress messages."""
        size = self.micro_batch_size if self.max_tokens is None else f"{self.max_tokens:,} tokens, packed"
        return f"micro-batches of {size}"

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the data-parallel ranks, in place. A collective."""
        if self.dp.size() > 1:  # a single rank never starts NCCL
            dist.all_reduce(values, group=self.dp.get_group())
        return values


def pack_row(rows: list[Example]) -> Example:
    """Packs rows end to end into one row, in which none of them learns to predict the next one's first token."""
    return Example(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([part for row in rows for part in ([IGNORE_INDEX], row.labels[1:])]),
        [length for row in rows for length in row.lengths or [len(row.input_ids)]],
    )


class Batch(NamedTuple):
    """int64 [B, T], on the device. position_ids and lengths (of the records in each row) only if rows are packed.
    learnt: int64 [N], the positions in the flattened rows whose next token is learnt, found on the host: on a GPU,
    nonzero() would be a host sync."""

    input_ids: Tensor
    labels: Tensor  # not shifted
    position_ids: Tensor | None
    lengths: list[list[int]] | None
    learnt: Tensor


def collate(examples: list[Example], pad_token_id: int, device: torch.device, multiple_of: int = 1) -> Batch:
    """Pads rows on the right to a multiple of `multiple_of`; without examples, returns one row of padding."""
    rows = examples or [Example([pad_token_id] * 2, [IGNORE_INDEX] * 2)]
    width = -(-max(len(row.input_ids) for row in rows) // multiple_of) * multiple_of

    def padded(values: list[Sequence[int]], fill: int) -> np.ndarray:
        table = np.full((len(rows), width), fill)
        for place, row in zip(table, values):
            place[: len(row)] = row
        return table

    labels = padded([row.labels for row in rows], IGNORE_INDEX)
    learnt = np.flatnonzero(np.append(labels.ravel()[1:], IGNORE_INDEX) != IGNORE_INDEX)
    learnt = learnt[learnt % width != width - 1]  # a row's last token predicts nothing
    tables, lengths = [padded([row.input_ids for row in rows], pad_token_id), labels, learnt], None
    if any(row.lengths is not None and len(row.lengths) > 1 for row in rows):
        lengths = [row.lengths or [len(row.input_ids)] for row in rows]
        tables.append(padded([np.concatenate([np.arange(length) for length in row]) for row in lengths], 0))
    input_ids, labels, learnt, *positions = (to_device(table, device) for table in tables)
    return Batch(input_ids, labels, positions[0] if positions else None, lengths, learnt)
