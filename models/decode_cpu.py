"""The decode step on a CPU, where the overhead beside a small model's matrix products must be small.

- attention of one query token is two weighted sums of cache rows, computed at memory bandwidth by two embedding_bags:
  keys are stored transposed in the cache's pages, and scores sum rows of a page weighted by the query; the output sums
  value rows weighted by the softmax. SDPA and batched products take 2.5 to 4 times as long
- a row reads its own positions only: in a ragged batch, indices behind its end point at cache rows that were just read
- DecodeLayers is Transformer.forward for one token per row, with as few operations as possible

Dimensions: B rows, H query heads, K key/value heads, D head dim, S positions, P pages.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attend, causal_attention
from models.cpu_linear import FloatProducts, has_fbgemm
from models.model import Attention, Transformer
from models.paged_cache import Cache, Chunk, places_of
from models.pages import PAGE, pages_for
from models.qlinear import Scheme, quantize
from models.rope import rope_tables
from models.tp import size_of


def weighted_rows(table: Tensor, rows: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
    """Computes a weighted sum of table rows for each bag of `rows`. table [R, C]; rows int32 and weights [n], bags end
    to end; ends int32 [bags + 1], beginning with 0. Returns [bags, C]."""
    return torch.embedding_bag(table, rows, ends, False, 0, False, weights, True)[0]


class CPUCache(Cache):
    """A cache with the methods and arguments of models.paged_cache.PagedCache.

    Keys are stored in fp32, since a bag's result has its table's dtype and scores must not be rounded; values and their
    weights are in `dtype`.
    """

    def __init__(self, model: Transformer, *, num_rows: int, num_pages: int, max_seq_len: int):
        config, tp = model.config, size_of(model.parallel.tp)
        B, H, K = num_rows, config.num_attention_heads // tp, config.num_key_value_heads // tp
        D, P = config.head_dim, num_pages + 1  # page 0 belongs to no sequence
        self.shape, self.dtype = (B, H, K, D), model.dtype
        layers = range(config.num_hidden_layers)
        keys = [torch.zeros(P, K, D, PAGE) for _ in layers]
        values = [torch.zeros(P, K, PAGE, D, dtype=self.dtype) for _ in layers]
        super().__init__(keys, values, num_rows, max_seq_len)
        heads, dims = torch.arange(K), torch.arange(D)
        heads_read = heads.repeat_interleave(H // K)[:, None]  # [H, 1]
        self.key_rows = (heads_read * D + dims)[:, None].int()  # [H, 1, D]
        self.value_rows = (heads_read * PAGE).int()  # [H, 1]
        self.first_places, self.first_values = (heads[:, None] * D + dims) * PAGE, heads * PAGE  # [K, D], [K]
        self.constants: dict[int, tuple[Tensor, ...]] = {}

    def _read(self, layer: int, pages: list[int]) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of pages, [tokens, K, D] each, in fp32."""
        keys, values = self.keys[layer][pages], self.values[layer][pages]  # [n, K, D, PAGE], [n, K, PAGE, D]
        return keys.permute(0, 3, 1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1).float()

    def prefill(self, chunks: list[Chunk]) -> Attend:
        places = places_of(chunks, self.table.device)
        pages, offsets, lengths = places // PAGE, places % PAGE, [chunk.length for chunk in chunks]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """Each chunk attends to itself, causally, and to the earlier tokens in its pages."""
            self.keys[layer][pages, :, :, offsets] = k[0].float()
            self.values[layer][pages, :, offsets] = v[0].to(self.dtype)
            outputs = []
            for chunk, queries, *new in zip(chunks, *(t[0].float().split(lengths) for t in (q, k, v))):
                mask = None
                if chunk.start:
                    before = self._read(layer, chunk.pages[: pages_for(chunk.start)])
                    new = [torch.cat((old[: chunk.start], each)) for old, each in zip(before, new)]
                    mask = torch.ones(chunk.length, len(new[0]), dtype=torch.bool).tril(chunk.start)
                outputs.append(causal_attention(layer, queries[None], *(t[None] for t in new), mask)[0])
            return torch.cat(outputs)[None].to(q.dtype)

        return attend

    def decode(self, positions: Tensor, most_pages: int) -> Attend:
        (B, H, K, D), P = self.shape, most_pages
        places, pages, page_ends, value_ends, scale = self._constants(P)
        bias = torch.zeros(B, 1, P * PAGE).masked_fill_(places > positions[:, None, None], float("-inf"))
        last = positions[:, None].int()
        # indices behind a row's end point at places that were just read
        pages_read = self.table.gather(1, pages.clamp(max=last // PAGE).long())  # [B, P]
        page_rows = (self.key_rows + (pages_read * (K * D))[:, None, :, None]).view(-1)  # of [B, H, P, D]
        places = places.clamp(max=last)  # [B, P * PAGE]
        starts = pages_read.repeat_interleave(PAGE, dim=1) * (K * PAGE)
        value_rows = (self.value_rows + (starts + places % PAGE)[:, None]).view(-1)  # of [B, H, P * PAGE]
        page = self.table.gather(1, (positions // PAGE)[:, None]).long()
        key_places = self.first_places + (page * (K * D * PAGE) + positions[:, None] % PAGE)[..., None]  # [B, K, D]
        value_places = (self.first_values + page * (K * PAGE) + positions[:, None] % PAGE).view(-1)  # [B * K]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer].view(-1, D)
            keys.put_(key_places, k.float())
            values.index_copy_(0, value_places, v.to(self.dtype).reshape(-1, D))
            weights = (q.float().view(B, H, 1, D) * scale).view(-1)
            scores = weighted_rows(keys.view(-1, PAGE), page_rows, page_ends, weights).view(B, H, P * PAGE)
            weights = scores.add_(bias).softmax(dim=-1).to(self.dtype).view(-1)
            return weighted_rows(values, value_rows, value_ends, weights).view(B, 1, H, D)

        return attend

    def _constants(self, P: int) -> tuple[Tensor, ...]:
        """Returns the tensors of decode() that depend only on the number of pages; they are cached."""
        if P not in self.constants:
            B, H, _, D = self.shape
            places, pages = (torch.arange(n, dtype=torch.int32) for n in (P * PAGE, P))
            page_ends = torch.arange(0, B * H * P * D + 1, D, dtype=torch.int32)
            value_ends = torch.arange(0, B * H * P * PAGE + 1, P * PAGE, dtype=torch.int32)
            self.constants[P] = (places, pages, page_ends, value_ends, torch.full((P, 1), D**-0.5))
        return self.constants[P]


class DecodeLayers:
    """Computes the hidden states of one new token for each slot as Transformer.forward does, but with an fp32 residual
    stream. Buffers, and views of them, are allocated once and reused by each step."""

    def __init__(self, model: Transformer, num_slots: int, max_seq_len: int):
        config, tp = model.config, size_of(model.parallel.tp)
        self.model, self.dtype = model, model.dtype
        positions = torch.arange(max_seq_len)[None]
        # [S, 1, D] each
        self.cos, self.sin = (t[0] for t in rope_tables(positions, model.inv_freq, config.attention_factor))
        B, E, D = num_slots, config.hidden_size, config.head_dim
        H, K = config.num_attention_heads // tp, config.num_key_value_heads // tp
        # the last column makes the norm of a row of the stream sqrt(sum x^2 + E eps), which is sqrt(E) times RMSNorm's
        self.stream = torch.full((B, E + 1), math.sqrt(E * config.rms_norm_eps))
        self.x, self.normed = self.stream[:, :E], torch.empty(B, E, dtype=self.dtype)
        self.qk, self.rotated = torch.empty(B, H + K, D), torch.empty(B, H + K, D)
        if config.qk_norm:  # a last column as in the stream
            self.heads = torch.full((B, H + K, D + 1), math.sqrt(D * config.rms_norm_eps))
            self.qk = self.heads[..., :D]
        self.halves = [*self.qk.chunk(2, dim=-1), *self.rotated.chunk(2, dim=-1)]
        self.q, self.k = self.rotated[:, None, :H], self.rotated[:, None, H:]

    def take_weights(self) -> None:
        """Rereads the norms' weights and the products, which a refresh of the model may have changed."""
        scale = math.sqrt(self.model.config.hidden_size)
        self.last_norm = self.model.norm.weight.float() * scale
        self.blocks = []
        for block in self.model.layers:
            attention, mlp = block.self_attn, block.mlp
            layers = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
            norms = (block.input_layernorm, block.post_attention_layernorm)
            products = [layer.for_rows(len(self.stream)) for layer in layers]
            weights = [norm.weight.float() * scale for norm in norms]
            self.blocks.append((*products, *weights, self._head_norm(attention)))

    def _head_norm(self, attention: Attention) -> Tensor | None:
        """Returns the weights of the norms of q and k, [H + K, D]; None without such norms."""
        if attention.q_norm is None:
            return None
        H, K = self.q.shape[2], self.k.shape[2]
        weights = [norm.weight.expand(n, -1) for norm, n in ((attention.q_norm, H), (attention.k_norm, K))]
        return torch.cat(weights).float() * math.sqrt(attention.head_dim)

    def _norm(self, weight: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(self.stream, dim=-1, keepdim=True)
        return torch.mul(self.x / size, weight, out=self.normed)

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens, positions int64 [B] -> [B, E], which the next call overwrites."""
        model, x, B = self.model, self.x, len(tokens)
        cos, sin = self.cos[positions], self.sin[positions]  # [B, 1, D]
        sin_first, sin_second = sin.chunk(2, dim=-1)
        first, second, rotated_first, rotated_second = self.halves
        x.copy_(model.embed_tokens(tokens[:, None])[:, 0])
        rotated_heads, D = self.qk.shape[1:]
        for layer, (qkv, o, gate_up, down, input_norm, post_norm, head_norm) in enumerate(self.blocks):
            heads = qkv(self._norm(input_norm)).view(B, -1, D)
            self.qk.copy_(heads[:, :rotated_heads])
            if head_norm is not None:
                size = torch.linalg.vector_norm(self.heads, dim=-1, keepdim=True)
                self.qk.div_(size).mul_(head_norm)
            torch.mul(self.qk, cos, out=self.rotated)
            rotated_first.addcmul_(second, sin_first)
            rotated_second.addcmul_(first, sin_second)
            x.add_(o(attend(layer, self.q, self.k, heads[:, None, rotated_heads:]).view(B, -1)))
            gate, up = gate_up(self._norm(post_norm)).chunk(2, dim=-1)
            x.add_(down(F.silu(gate).mul_(up)))
        return self._norm(self.last_norm)


class QuantizedHead(nn.Module):
    """A language-model head in int8 on a CPU. 32000 x 768 takes as bags, as HalfMatrix: 0.46, 0.93 ms at one row; 0.63,
    1.0 at two; 1.08, 0.99 at four."""

    def __init__(self, weight: Tensor):
        """weight: [V, E] bf16, or this tp rank's rows of it. Raises ValueError if it is not finite."""
        super().__init__()
        try:
            small = quantize(weight, Scheme("int8"))
        except ValueError as error:
            raise ValueError(f"lm_head.weight: {error}") from None
        self.products = FloatProducts(small.values, small.scale)

    @property
    def num_bytes(self) -> int:
        return self.products.num_bytes

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., V], fp32"""
        rows = x.reshape(-1, x.shape[-1]).float()
        return self.products.for_rows(len(rows))(rows).view(*x.shape[:-1], -1)


def quantizes_head(dtype: torch.dtype) -> bool:
    """Whether the head of a model whose blocks are quantised, and which is not compiled, is quantised on this CPU."""
    return dtype == torch.bfloat16 and has_fbgemm()
