"""A paged KV cache and attention over it. models/pages.py decides which pages hold what.

- one tensor of pages for the keys of a layer and one for the values; a row of a step has its pages in a table
- prefill takes chunks of several sequences packed end to end without padding, each of which sees what its pages hold
  from before; decode takes one token for each row
- a GPU attends with the Triton kernel of models/triton_attention.py, each row over what it holds; other devices, and a
  compiled step on a CPU, by the plain operations that are its oracle. An eager CPU has its own: models/decode_cpu.py

Dimensions: B rows, N packed tokens, P pages, M pages of a row at most, H query heads, K key/value heads, D head dim.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models.attention import Attend, causal_attention
from models.model import ModelConfig
from models.pages import PAGE, pages_for
from models.tp import size_of


class Chunk(NamedTuple):
    """The tokens start to start + length - 1 of a sequence, to be computed."""

    pages: list[int]  # of the sequence from its beginning on
    start: int
    length: int


class Places(NamedTuple):
    """Where packed tokens are written, int64 [N] each."""

    pages: Tensor
    offsets: Tensor


def places_of(chunks: list[Chunk], device: torch.device) -> Places:
    numbers = [n for chunk in chunks for n in range(chunk.start, chunk.start + chunk.length)]
    pages = [page for c in chunks for page in (c.pages[n // PAGE] for n in range(c.start, c.start + c.length))]
    pages, offsets = torch.tensor([pages, [n % PAGE for n in numbers]], device=device)
    return Places(pages, offsets)


def attend_chunks(q: Tensor, k: Tensor, v: Tensor, chunks: list[Chunk], cache: nn.Module, layer: int) -> Tensor:
    """Each chunk sees itself, causally, and what its pages hold from before. q [1, N, H, D], k and v [1, N, K, D], in
    the dtype to compute in; cache.read(layer, pages) gives what pages hold, [tokens, K, D] each."""
    outputs, lengths = [], [chunk.length for chunk in chunks]
    for chunk, queries, keys, values in zip(chunks, *(t[0].split(lengths) for t in (q, k, v))):
        mask = None
        if chunk.start:
            before = (t[: chunk.start].to(q.dtype) for t in cache.read(layer, chunk.pages[: pages_for(chunk.start)]))
            keys, values = (torch.cat(pair) for pair in zip(before, (keys, values)))
            mask = torch.ones(chunk.length, len(keys), dtype=torch.bool, device=q.device).tril(chunk.start)
        outputs.append(causal_attention(layer, queries[None], keys[None], values[None], mask)[0])
    return torch.cat(outputs)[None]


def gpu_kernel(device: torch.device) -> Callable | None:
    """Attention of a decode step on a GPU; Triton comes with torch's builds for them, but for some platforms."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from models.triton_attention import paged_decode

    return paged_decode


def num_splits(num_pairs: int, most_keys: int, device: torch.device) -> int:
    """How many programs share the keys of a row and head: about four for each of the device's processors in all, since
    short rows end early, and none with less than 4 pages of the longest row. A power of two. num_pairs: rows times
    heads."""
    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count / num_pairs
    splits = 1
    while splits * 2 <= min(wanted, most_keys // (4 * PAGE), 64):
        splits *= 2
    return splits


class LayerCache(nn.Module):
    """Keys and values of one layer, [P, PAGE, K, D] each. A buffer for each layer, written by plain index assignment,
    is what torch.compile can update in place; slices of one buffer for all layers might be copied whole."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        super().__init__()
        # zeros, because a masked position still enters the plain sum with weight 0, and 0 * NaN is NaN
        self.register_buffer("k", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v", torch.zeros(shape, dtype=dtype, device=device), persistent=False)


class Table(nn.Module):
    """`table`, int32 [B, M]: the pages of each row, at a fixed address."""

    def __init__(self, num_rows: int, max_seq_len: int, device: torch.device):
        super().__init__()
        table = torch.zeros(num_rows, pages_for(max_seq_len), dtype=torch.int32, device=device)
        self.register_buffer("table", table, persistent=False)

    def set_table(self, rows: list[list[int]]) -> None:
        """The pages of each row; of one that has none, and behind its last, page 0."""
        width = self.table.shape[1]
        self.table.copy_(torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32))


class PagedCache(Table):
    """Keys and values in num_pages pages, and the tables of num_rows rows of up to max_seq_len tokens.

    On a CPU they are in fp32, whose attention kernels are 3 to 8 times faster than bf16's at one query token a row.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_rows: int,
        num_pages: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        tp: DeviceMesh | None = None,
    ):
        super().__init__(num_rows, max_seq_len, device)
        self.dtype = torch.float32 if device.type == "cpu" else dtype
        K = config.num_key_value_heads // size_of(tp)
        shape = (num_pages + 1, PAGE, K, config.head_dim)  # page 0 is nobody's
        self.layers = nn.ModuleList(LayerCache(shape, self.dtype, device) for _ in range(config.num_hidden_layers))
        self.kernel = gpu_kernel(device)
        self.splits = num_splits(num_rows * K, max_seq_len, device) if self.kernel else 1

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one cached token takes, over all layers."""
        return sum(2 * layer.k[0, 0].nbytes for layer in self.layers)

    def tensors(self) -> list[Tensor]:
        """What holds keys and values."""
        return [tensor for layer in self.layers for tensor in (layer.k, layer.v)]

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        for cache in self.layers:
            cache.k[targets], cache.v[targets] = cache.k[sources], cache.v[sources]

    def read(self, layer: int, pages: list[int]) -> tuple[Tensor, Tensor]:
        cache = self.layers[layer]
        return cache.k[pages].flatten(0, 1), cache.v[pages].flatten(0, 1)

    def _write(self, layer: int, places: Places, k: Tensor, v: Tensor) -> LayerCache:
        cache = self.layers[layer]
        cache.k[places.pages, places.offsets] = k.to(self.dtype)
        cache.v[places.pages, places.offsets] = v.to(self.dtype)
        return cache

    def prefill(self, chunks: list[Chunk]) -> Attend:
        """Attention for chunks packed end to end in one row, which it writes to their pages."""
        places = places_of(chunks, self.table.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer, places, k[0], v[0])
            computed = (t.to(self.dtype) for t in (q, k, v))
            return attend_chunks(*computed, chunks, self, layer).to(q.dtype)

        return attend

    def decode(self, positions: Tensor, most_pages: int | None) -> Attend:
        """Attention of one new token for each row, written at positions [B]. most_pages: as many as a row uses, where
        the plain operations may read no more than that; None for a step that is always the same."""
        page = self.table.gather(1, (positions // PAGE)[:, None])[:, 0].long()
        places = Places(page, positions % PAGE)
        table, lengths = self.table[:, :most_pages], (positions + 1).int()
        if self.kernel is not None:

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                cache = self._write(layer, places, k[:, 0], v[:, 0])
                return self.kernel(q[:, 0].contiguous(), cache.k, cache.v, self.table, lengths, self.splits)[:, None]

            return attend

        visible = torch.arange(table.shape[1] * PAGE, device=positions.device) <= positions[:, None]
        bias = torch.zeros_like(visible, dtype=self.dtype).masked_fill_(~visible, float("-inf"))[:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = self._write(layer, places, k[:, 0], v[:, 0])
            return plain_paged_decode(q[:, 0].to(self.dtype), cache.k, cache.v, table, bias)[:, None].to(q.dtype)

        return attend


def plain_paged_decode(q: Tensor, k: Tensor, v: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    """models.triton_attention.paged_decode by plain operations: [B, H, D]. bias [B, 1, 1, M * PAGE]: 0 where a row sees
    a place of its pages, else -inf."""
    B, H, D = q.shape
    keys, values = (t[table].flatten(1, 2).transpose(1, 2) for t in (k, v))  # [B, K, M * PAGE, D]
    # the H / K query heads of one key head stand where query tokens would: no repetition of keys and values
    grouped = q.view(B, keys.shape[1], -1, D)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias).reshape(B, H, D)
