"""A paged KV cache and attention over it. models/pages.py decides which pages hold what.

- a layer has one tensor of pages for its keys and one for its values; a table lists the pages of each row of a step
- prefill takes chunks of several sequences packed end to end without padding, each of which also attends to the cached
  tokens of its sequence; decode takes one token for each row
- prefill is one call of variable-length attention or, where that kernel does not work, models/padded_prefill.py
- a GPU decodes with the Triton kernel of models/triton_attention.py, each row over its own length; other devices, and
  compiled steps on a CPU, use plain operations, the kernel's oracle. Eager CPU steps use models/decode_cpu.py

Dimensions: B rows, N packed tokens, P pages, M pages of a row at most, H query heads, K key/value heads, D head dim.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Attend, varlen_kernel, varlen_works
from models.gpu import has_bf16_cores, has_triton
from models.model import Transformer
from models.padded_prefill import attend_batches, batches_of
from models.pages import PAGE, pages_for
from models.tp import size_of
from models.transfer import to_device


class Chunk(NamedTuple):
    """The tokens start to start + length - 1 of a sequence, to be prefilled."""

    pages: list[int]  # all pages of the sequence
    start: int
    length: int


def token_places(pages: list[int], start: int, end: int) -> np.ndarray:
    """The places of the tokens start to end - 1 of a sequence in a cache's flattened pages, int64."""
    numbers = np.arange(start, end)
    return np.asarray(pages, dtype=np.int64)[numbers // PAGE] * PAGE + numbers % PAGE


def places_of(chunks: list[Chunk], device: torch.device) -> Tensor:
    """The places in the flattened pages to which packed tokens are written, int64 [N]."""
    return to_device(np.concatenate([token_places(c.pages, c.start, c.start + c.length) for c in chunks]), device)


def gpu_kernel(device: torch.device) -> Callable | None:
    """The attention kernel of a decode step on a GPU; None without Triton."""
    if not has_triton(device):
        return None
    from models.triton_attention import paged_decode

    return paged_decode if has_bf16_cores(device) else partial(paged_decode, upcast=True)


def num_splits(num_pairs: int, most_keys: int, device: torch.device) -> int:
    """How many programs share the keys of a row and head, a power of two: about four programs in total for each of the
    device's processors, since short rows end early, but at least 4 pages of the longest row for each program.
    num_pairs: rows times heads."""
    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count / num_pairs
    splits = 1
    while splits * 2 <= min(wanted, most_keys // (4 * PAGE), 64):
        splits *= 2
    return splits


class Cache:
    """Pages of keys and of values, one tensor of each for every layer, whose first dimension is the page; and `table`,
    int32 [B, M]: the pages of each row, at a fixed address. New pages hold zeros, since a masked position still enters
    sums with weight 0, and 0 * NaN is NaN."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], num_rows: int, max_seq_len: int):
        self.keys, self.values = keys, values
        self.table = torch.zeros(num_rows, pages_for(max_seq_len), dtype=torch.int32, device=keys[0].device)

    def set_table(self, table: Tensor) -> None:
        """table: int32 [n, m], the pages of the first n rows as far as they are in use."""
        n, m = table.shape
        self.table[:n, :m].copy_(to_device(table, self.table.device))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one cached token takes, over all layers."""
        return sum(pages[0].nbytes for pages in self.tensors()) // PAGE

    def tensors(self) -> list[Tensor]:
        """All tensors of keys and values."""
        return [*self.keys, *self.values]

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        for pages in self.tensors():
            pages[targets] = pages[sources]


class PagedCache(Cache):
    """A model's cache of num_pages pages, with the tables of num_rows rows of up to max_seq_len tokens.

    On a CPU it is in fp32, whose attention kernels are 3 to 8 times faster than bf16's at one query token a row.
    """

    def __init__(self, model: Transformer, *, num_rows: int, num_pages: int, max_seq_len: int):
        config, device = model.config, model.embed_tokens.weight.device
        self.dtype = torch.float32 if device.type == "cpu" else model.dtype
        K, layers = config.num_key_value_heads // size_of(model.parallel.tp), range(config.num_hidden_layers)
        shape = (num_pages + 1, PAGE, K, config.head_dim)  # page 0 belongs to no sequence
        pages = ([torch.zeros(shape, dtype=self.dtype, device=device) for _ in layers] for _ in ("keys", "values"))
        super().__init__(*pages, num_rows, max_seq_len)
        self.heads, self.max_seq_len = (K, config.head_dim), max_seq_len
        self.kernel = gpu_kernel(device)
        self.is_copied_by_words = device.type == "cuda" and config.head_dim * self.dtype.itemsize % 8 == 0

    def _write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v [N, K, D] to places [N], int64, of the flattened pages; returns the layer's pages of keys and
        of values."""
        cache = self.keys[layer], self.values[layer]
        for pages, values in zip(cache, (k, v)):
            tokens, values = pages.flatten(0, 1), values.to(self.dtype)
            if self.is_copied_by_words:  # index_copy_ copies element by element: here 8 bytes at a time
                tokens, values = tokens.view(torch.int64), values.view(torch.int64)
            tokens.index_copy_(0, places, values)
        return cache

    def prefill(self, chunks: list[Chunk]) -> Attend:
        """Attention for chunks packed end to end in one row, whose keys and values it writes to their pages."""
        device, places = self.table.device, places_of(chunks, self.table.device)
        has_kernel = varlen_works(device, self.dtype, self.heads[1])
        return self._varlen_prefill(chunks, places) if has_kernel else self._padded_prefill(chunks, places)

    def _varlen_prefill(self, chunks: list[Chunk], places: Tensor) -> Attend:
        device, contexts = places.device, [chunk.start + chunk.length for chunk in chunks]
        lengths, before = [chunk.length for chunk in chunks], None
        ends = to_device([[0, *accumulate(lengths)], [0, *accumulate(contexts)]], device, torch.int32)
        longest = max(lengths), max(contexts)
        if lengths != contexts:  # reads cached and new tokens from the pages
            before = np.concatenate([token_places(c.pages, 0, context) for c, context in zip(chunks, contexts)])
            before = to_device(before, device)
        kernel = varlen_kernel()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = self._write(layer, places, k[0], v[0])
            if before is None:
                keys, values = (t[0].to(self.dtype) for t in (k, v))
            else:
                keys, values = (t.flatten(0, 1).index_select(0, before) for t in cache)
            return kernel(q[0].to(self.dtype), keys, values, *ends, *longest)[None].to(q.dtype)

        return attend

    def _padded_prefill(self, chunks: list[Chunk], places: Tensor) -> Attend:
        read = [token_places(c.pages, 0, c.start + c.length) for c in chunks]
        starts, lengths = [chunk.start for chunk in chunks], [chunk.length for chunk in chunks]
        batches = batches_of(starts, lengths, read, places.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = (t.flatten(0, 1) for t in self._write(layer, places, k[0], v[0]))
            return attend_batches(layer, q[0].to(self.dtype), keys, values, *batches)[None].to(q.dtype)

        return attend

    def decode(self, positions: Tensor, most_pages: int | None) -> Attend:
        """Attention of one new token for each of the first n rows, q [1, n, H, D], whose keys and values it writes at
        positions [n]. most_pages: the plain operations read this many pages of each row; None for all, so that a step
        always has the same shapes."""
        n, device = len(positions), positions.device
        if self.kernel is not None:
            table, lengths = self.table[:n], (positions + 1).int()
            splits = num_splits(n * self.heads[0], self.max_seq_len, device)

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                rows = (t[0].to(self.dtype) for t in (q, k, v))
                pages = self.keys[layer], self.values[layer]
                return self.kernel(*rows, *pages, table, lengths, splits)[None].to(q.dtype)

            return attend

        page = self.table[:n].gather(1, (positions // PAGE)[:, None])[:, 0]
        places = page.long() * PAGE + positions % PAGE
        table = self.table[:n, :most_pages]
        visible = torch.arange(table.shape[1] * PAGE, device=device) <= positions[:, None]
        bias = torch.zeros_like(visible, dtype=self.dtype).masked_fill_(~visible, float("-inf"))[:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = self._write(layer, places, k[0], v[0])
            return plain_paged_decode(q[0].to(self.dtype), *cache, table, bias)[None].to(q.dtype)

        return attend


def plain_paged_decode(q: Tensor, k: Tensor, v: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    """Attention as in models.triton_attention.paged_decode, by plain operations: [B, H, D]. bias [B, 1, 1, M * PAGE]: 0
    at places of its pages that a row attends to, else -inf."""
    B, H, D = q.shape
    keys, values = (t[table].flatten(1, 2).transpose(1, 2) for t in (k, v))  # [B, K, M * PAGE, D]
    # the H / K query heads of a key head take the place of query tokens, so that keys and values are not repeated
    grouped = q.view(B, keys.shape[1], -1, D)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias).reshape(B, H, D)
