"""Runs two kernels in Triton's interpreter, which must be enabled before Triton is imported, and prints as JSON: for
each of CASES how far models/triton_attention.py is from SDPA; for each of TOP_P whether models/triton_sampling.py keeps
the same tokens as the plain operations."""

import json

import torch
import torch.nn.functional as F

from models.pages import PAGE, pages_for

CASES = [  # lengths, query heads per key head, key heads, head dim, splits, dtype
    ([1, 63, 64, 65, 300], 1, 2, 64, 1, "float32"),
    ([5000, 1, 257], 8, 1, 128, 8, "float32"),
    ([77, 640], 4, 2, 80, 4, "float16"),
    ([130, 2], 3, 1, 256, 2, "bfloat16"),
    ([200, 64], 7, 1, 96, 16, "float32"),
]


TOP_P = [(0.0, 1.0), (0.5, 0.01), (0.9, 1.0), (0.97, 6.0)]  # top_p, spread of the logits


def wanted(q, k, v, table, lengths):
    """Attention by SDPA in fp32, one row at a time: [B, H, D]."""
    rows = []
    for row, pages, length in zip(q, table, lengths.tolist()):
        keys, values = (t[pages[: pages_for(length)]].flatten(0, 1)[:length].float().transpose(0, 1) for t in (k, v))
        rows.append(F.scaled_dot_product_attention(row[:, None].float(), keys, values, enable_gqa=True)[:, 0])
    return torch.stack(rows)


def distance(lengths, G, K, D, splits, dtype) -> float:
    """Largest difference from SDPA, over random pages; NaN in places of no row and in each row's last, yet to be
    written."""
    from models.triton_attention import paged_decode

    dtype, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    B, M = len(lengths), pages_for(max(lengths)) + 1
    num_pages = sum(map(pages_for, lengths))
    k, v = (torch.full((num_pages + 1, PAGE, K, D), torch.nan) for _ in "kv")
    table, order = torch.zeros(B, M, dtype=torch.int32), torch.randperm(num_pages, generator=generator) + 1
    for row, length, own in zip(table, lengths, order.split([pages_for(n) for n in lengths])):
        row[: len(own)] = own
        for t in (k, v):
            flat = torch.full((len(own) * PAGE, K, D), torch.nan)
            flat[:length] = torch.randn(length, K, D, generator=generator)
            t[own] = flat.unflatten(0, (-1, PAGE))
    rows = torch.randn(B, K * (G + 2), D, generator=generator).to(dtype)  # as views of one fused product
    (q, new_k, new_v), k, v = rows.split([K * G, K, K], dim=1), k.to(dtype), v.to(dtype)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    last = [(table[b, (n - 1) // PAGE], (n - 1) % PAGE) for b, n in enumerate(lengths.tolist())]
    before = [t.clone() for t in (k, v)]
    for t, old, new in zip((k, v), before, (new_k, new_v)):
        for place, row in zip(last, new):
            t[place], old[place] = torch.nan, row
    found = paged_decode(q, new_k, new_v, k, v, table, lengths, splits, upcast=dtype == torch.bfloat16)
    assert found.dtype == dtype and all(map(same_numbers, (k, v), before))
    return (found.float() - wanted(q, k, v, table, lengths)).abs().max().item()


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares two tensors; NaN equals NaN."""
    return torch.equal(a.nan_to_num(1e4), b.nan_to_num(1e4))


def keeps_the_same(top_p: float, spread: float) -> bool:
    """Whether both give equal thresholds: long rows, ties (rounded logits), tokens that cannot be drawn."""
    from models import sampling, triton_sampling

    logits = torch.randn(4, triton_sampling.BLOCK + 500, generator=torch.Generator().manual_seed(0)) * spread - 3
    logits[1] = (4 * logits[1]).round() / 4
    logits[2, ::2] = -torch.inf
    logits[3, 7] = 90.0
    return torch.equal(triton_sampling.top_p_threshold(logits, top_p), sampling.top_p_threshold(logits, top_p))


if __name__ == "__main__":
    distances, same = [distance(*case) for case in CASES], [keeps_the_same(*case) for case in TOP_P]
    print(json.dumps({"distances": distances, "same": same}))
