"""The order in which training takes rows, and rows in batches: training/data.py, models/packing.py and batches.py."""

from collections import Counter

import pytest
import torch

from models.batches import collate, micro_batches
from models.records import Example
from models.rows import Rows, flatten
from training.data import PackedRows, epoch_order, training_batches


def steps(num_rows, batch_size, first, last, *, seed=0, shuffle=True):
    return list(training_batches(num_rows, batch_size, seed=seed, shuffle=shuffle, first_step=first, last_step=last))


@pytest.mark.parametrize("num_rows, batch_size", [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_every_row_once_per_epoch(num_rows, batch_size):
    """Catches rows repeated or dropped (those of the last, incomplete batch included), and steps counted wrongly."""
    per_epoch = -(-num_rows // batch_size)
    batches = steps(num_rows, batch_size, 1, 3 * per_epoch)
    assert [step for step, _ in batches] == list(range(1, 3 * per_epoch + 1))
    for epoch in range(3):
        rows = [rows for _, rows in batches[epoch * per_epoch : (epoch + 1) * per_epoch]]
        assert Counter(i for batch in rows for i in batch) == Counter(range(num_rows))
        assert all(len(r) == batch_size for r in rows[:-1])


def test_order_can_be_resumed_anywhere():
    """Catches an order that depends on where the run started or on the global random state: a resumed run would repeat
    some rows and skip others."""
    whole = steps(23, 4, 1, 20)
    state = torch.get_rng_state()
    for first in range(1, 22):
        torch.rand(first)
        assert steps(23, 4, first, 20) == whole[first - 1 :]
    torch.set_rng_state(state)
    steps(23, 4, 1, 20)
    assert torch.equal(torch.get_rng_state(), state)


def test_shuffle():
    """Catches the same order in each epoch or for each seed, and shuffling despite --no-shuffle."""
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16 and tuple(range(50)) not in orders
    assert [rows for _, rows in steps(5, 2, 1, 6, shuffle=False)] == [[0, 1], [2, 3], [4]] * 2


def test_shuffle_is_uniform():
    """Catches a biased shuffle: over 600 seeds every row comes first about equally often."""
    first = Counter(epoch_order(6, seed=seed, epoch=0)[0] for seed in range(600))
    assert sum((first[i] - 100) ** 2 / 100 for i in range(6)) < 20.5  # chi-square, 5 degrees, p = 0.001


def row(length, start=10):
    return Example(list(range(start, start + length)), [-100, *range(start + 1, start + length)])


def test_micro_batches():
    """Catches a row lost or used twice, a micro-batch larger than asked for, and long rows batched with short ones."""
    rows = [row(n) for n in (3, 9, 4, 8, 5)]
    for size in range(1, 7):
        groups = list(micro_batches(rows, size, lambda row: len(row.input_ids)))
        assert all(1 <= len(group) <= size for group in groups) and len(groups) == -(-len(rows) // size)
        assert [len(r.input_ids) for group in groups for r in group] == [3, 4, 5, 8, 9]
        assert all(any(r is other for other in rows) for group in groups for r in group)


def test_pack():
    """Catches a record that is split, lost, repeated or predicts its neighbour, and rows left needlessly empty."""
    sizes = [3, 9, 1, 7, 2, 8, 10, 4, 6, 5, 10]
    rows = [row(size, 100 * i) for i, size in enumerate(sizes)]
    packed = PackedRows(Rows(Example, 1, flatten(rows)), 10)
    assert sorted(n for p in packed for n in p.lengths) == sorted(sizes) and len(packed) == 7  # 65 tokens
    for p in packed:
        assert len(p.input_ids) == len(p.labels) == sum(p.lengths) <= 10
        start = 0
        for length in p.lengths:
            ids, labels = (list(each[start : start + length]) for each in (p.input_ids, p.labels))
            assert ids == rows[ids[0] // 100].input_ids
            assert labels == [-100, *rows[ids[0] // 100].labels[1:]]
            start += length
    assert packed.lengths.tolist() == [len(p.input_ids) for p in packed]
    assert sum(p.num_targets for p in packed) == sum(r.num_targets for r in rows)
    batch = collate([Example([5] * 5, [5] * 5, [2, 3]), Example([6] * 3, [6] * 3, [3])], 0, torch.device("cpu"), 4)
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert batch.lengths == [[2, 3], [3]]


def test_collate():
    """Catches padding on the left or in the loss."""
    input_ids, labels, position_ids, lengths, learnt = collate([row(2), row(4, 20)], 7, torch.device("cpu"))
    assert position_ids is None and lengths is None
    assert input_ids.tolist() == [[10, 11, 7, 7], [20, 21, 22, 23]]
    assert labels.tolist() == [[-100, 11, -100, -100], [-100, 21, 22, 23]]
    assert learnt.tolist() == [0, 4, 5, 6]  # the positions before those labels, in the flattened batch
    assert input_ids.dtype == labels.dtype == torch.int64
