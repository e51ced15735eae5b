"""models/padded_prefill.py, a GPU's prefill by SDPA: the same operations on the CPU."""

import pytest
import torch
import torch.nn.functional as F

from models.padded_prefill import attend_batches, batches_of, padded_length
from models.paged_cache import token_places
from models.pages import PAGE, pages_for

CPU = torch.device("cpu")
CHUNKS = [(0, 1), (0, 64), (70, 5), (0, 65), (130, 64), (63, 1), (0, 200), (0, 3)]  # start and length of each


@pytest.mark.parametrize("K, groups", [(2, 1), (1, 4)])
def test_padded_prefill(K, groups):
    """Catches a key too many or too few, chunks mixed up or put back in the wrong place, and a read of a place that no
    chunk owns (NaN): against SDPA of one chunk after the other."""
    generator, D = torch.Generator().manual_seed(0), 16
    contexts = [start + length for start, length in CHUNKS]
    counts = [pages_for(context) for context in contexts]
    order = (torch.randperm(sum(counts), generator=generator) + 1).split(counts)
    places = [token_places(pages.tolist(), 0, n) for pages, n in zip(order, contexts)]
    k, v = torch.full((2, (sum(counts) + 1) * PAGE, K, D), torch.nan)
    for own in places:
        for cache in (k, v):
            cache[own] = torch.randn(len(own), K, D, generator=generator)
    starts, lengths = map(list, zip(*CHUNKS))
    q = torch.randn(sum(lengths), K * groups, D, generator=generator)
    batches, back = batches_of(starts, lengths, places, CPU)
    found = attend_batches(0, q, k, v, batches, back)
    assert len(batches) == len({(padded_length(n), padded_length(context)) for n, context in zip(lengths, contexts)})
    for (start, length), own, queries, ours in zip(CHUNKS, places, q.split(lengths), found.split(lengths)):
        keys, values = (cache[own].transpose(0, 1) for cache in (k, v))
        mask = torch.ones(length, start + length, dtype=torch.bool).tril(start)
        options = {"attn_mask": mask, "enable_gqa": groups > 1}
        wanted = F.scaled_dot_product_attention(queries.transpose(0, 1), keys, values, **options)
        torch.testing.assert_close(ours, wanted.transpose(0, 1))


def test_sizes():
    """Catches so many padded sizes that SDPA plans for each one."""
    assert [padded_length(n) for n in (1, 64, 65, 128, 129, 300, 2048)] == [64, 64, 128, 128, 256, 512, 2048]
