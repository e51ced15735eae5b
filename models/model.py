"""The LLaMA decoder and its close relatives: Qwen2 / 2.5 (biases of q, k and v) and Qwen3 (normed q and k).

- the shape comes from a Hugging Face config.json (models/config.py), never from a folder's name
- parameters carry Hugging Face's names without the leading "model.", so nothing is ever converted
- attention is an argument: forward() takes `attend(layer, q, k, v)`; training uses the default (causal), the generation
  engine passes a function that writes and reads its KV cache, so the same layers serve both
- RMSNorm and RoPE compute in fp32 whatever the dtype of the weights; Linear casts its weight to the input's dtype, so
  fp32 master weights compute in bf16 without autocast

Dimensions: B batch, T query tokens, H query heads, K key/value heads, D head dim, E model dim, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.attention import Attend, causal_attention
from models.config import ModelConfig
from models.products import Kept, Term, gated, keeps_less, norm, product, products
from models.rope import apply_rope, rope_tables
from models.tp import Parallel, enter_parallel, leave_parallel, local, size_of, sum_parts, whole_sequence
from models.vocab_parallel import embed

# Linear layers that the inference copy of a block computes as one product: (the part of the block, the names of its
# Linear layers, the name of the product that replaces them).
FUSIONS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    ("self_attn", ("o_proj",), "o_proj"),
    ("mlp", ("gate_proj", "up_proj"), "gate_up_proj"),
    ("mlp", ("down_proj",), "down_proj"),
)


class Linear(nn.Linear):
    """nn.Linear that casts its weight to the input's dtype, so that fp32 master weights compute in bf16.
    Column-parallel: a rank that holds some rows of the weight computes those outputs."""

    def term(self, dtype: torch.dtype) -> Term:
        """This rank's weight and bias, for products() and for forward."""
        return Term(local(self.weight), bias=None if self.bias is None else local(self.bias).to(dtype))

    def finish(self, y: Tensor) -> Tensor:
        """The layer's output, from the result of its term()."""
        return y

    def forward(self, x: Tensor) -> Tensor:
        term = self.term(x.dtype)
        return self.finish(F.linear(x, term.matrix(x.dtype), term.bias))


class RowLinear(Linear):
    """Row-parallel: a rank holds some columns of the weight and the same part of x; the sum gets the bias once."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, parallel: Parallel):
        super().__init__(in_features, out_features, bias=bias)
        self.parallel = parallel

    def term(self, dtype: torch.dtype) -> Term:
        return super().term(dtype) if size_of(self.parallel.tp) == 1 else Term(local(self.weight))

    def finish(self, y: Tensor) -> Tensor:
        return y if size_of(self.parallel.tp) == 1 else sum_parts(y, self.bias, self.parallel)


class RMSNorm(nn.Module):
    """partial_grad: each tensor-parallel rank norms only some tokens or heads, so the weight's gradients are summed."""

    def __init__(self, size: int, eps: float, *, partial_grad: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.partial_grad = eps, partial_grad

    def forward(self, x: Tensor) -> Tensor:
        return self.keeping(x)[0]

    def keeping(self, x: Tensor) -> tuple[Tensor, Kept | None]:
        """The norm of x, and how products() recomputes it in the backward; None if it is saved as it is."""
        weight = local(self.weight, self.partial_grad).float()
        if keeps_less():
            return norm(x, weight, self.eps)
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype), None


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, parallel: Parallel):
        super().__init__()
        self.head_dim, self.parallel = config.head_dim, parallel
        # a tensor works as an index, too; torch.compile would specialise its code on the first int that it meets
        self.layer = torch.tensor(layer, device="cpu")
        self.group_size = config.num_attention_heads // config.num_key_value_heads
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = RowLinear(q_size, config.hidden_size, bias=config.attention_bias, parallel=parallel)
        head_norm = partial(RMSNorm, config.head_dim, config.rms_norm_eps, partial_grad=size_of(parallel.tp) > 1)
        self.q_norm, self.k_norm = (head_norm(), head_norm()) if config.qk_norm else (None, None)
        self.qkv_proj = None  # the inference copy has it instead of q_proj, k_proj and v_proj: models/decode.py

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, kept: Kept | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [B, T, H, D] and k [B, T, K, D], and v [B, T, K, D], of x [B, T, E]. kept: for products()."""
        x = enter_parallel(x, self.parallel)
        B, T, _ = x.shape
        if self.qkv_proj is None:
            layers = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (y.view(B, T, -1, self.head_dim) for y in products(x, layers, kept))
            if self.q_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)  # H query, K key, K value heads; q and k rotate together
        K = qkv.shape[2] // (self.group_size + 2)
        qk, v = qkv.tensor_split((qkv.shape[2] - K,), dim=2)
        if self.q_norm is not None:
            q, k = qk.tensor_split((qk.shape[2] - K,), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        q, k = apply_rope(qk, cos, sin).tensor_split((qk.shape[2] - K,), dim=2)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return self.o_proj(attend(self.layer, *self.project(x, cos, sin)).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, parallel: Parallel):
        super().__init__()
        self.parallel = parallel
        E, ffn = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(E, ffn, bias=config.mlp_bias)
        self.up_proj = Linear(E, ffn, bias=config.mlp_bias)
        self.down_proj = RowLinear(ffn, E, bias=config.mlp_bias, parallel=parallel)
        self.gate_up_proj = None  # the inference copy has it instead of gate_proj and up_proj: models/decode.py

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        """kept: for products() of x."""
        x = enter_parallel(x, self.parallel)
        if self.gate_up_proj is None:
            gate, up = products(x, (self.gate_proj, self.up_proj), kept)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        if keeps_less():
            hidden, kept = gated(gate, up)
            return products(hidden, [self.down_proj], kept)[0]
        return self.down_proj(F.silu(gate) * up)


def _save_products(context, operation, *args, **kwargs) -> CheckpointPolicy:
    """Selective activation checkpointing: saves the results of matrix products, attention and sums over ranks, and
    recomputes the rest, including sequence parallelism's gathered tokens: saving only a rank's part is its purpose."""
    costly = ("mm", "addmm", "bmm", "linear", "attention", "varlen_attn", "all_reduce", "reduce_scatter")
    name = str(operation).partition(".")[2]
    return CheckpointPolicy.MUST_SAVE if any(c in name for c in costly) else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, parallel: Parallel):
        super().__init__()
        self.recompute = "none"  # activation checkpointing: none, full or selective
        self.compiled = False
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, partial_grad=parallel.sequence_parallel)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer, parallel)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, parallel)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._forward(x, cos, sin, attend)
        options = {}
        if self.recompute == "selective":
            # LoRA's updates are added in place to saved products; the updated values are the right ones to save
            contexts = partial(create_selective_checkpoint_contexts, _save_products, allow_cache_entry_mutation=True)
            options["context_fn"] = contexts
        return checkpoint(self._forward, x, cos, sin, attend, use_reentrant=False, **options)

    def _forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        attended = attend(self.self_attn.layer, *self.before_attention(x, cos, sin))
        x, update = self.before_last_sum(x, attended)
        return x + update

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs of attention, q [B, T, H, D], k and v [B, T, K, D], from the residual stream x [B, T, E]."""
        normed, kept = self._normed(self.input_layernorm, x)
        return self.self_attn.project(normed, cos, sin, kept)

    def before_last_sum(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The two summands of the residual stream after the block. attended: the output of attention, [B, T, H, D]."""
        x = x + product(attended.flatten(2), self.self_attn.o_proj)
        return x, self.mlp(*self._normed(self.post_attention_layernorm, x))

    def _normed(self, layer: RMSNorm, x: Tensor) -> tuple[Tensor, Kept | None]:
        """The norm of x, and how it is recomputed; None under sequence parallelism, whose products take gathered x."""
        normed, kept = layer.keeping(x)
        return normed, None if self.self_attn.parallel.sequence_parallel else kept

    def fuse(self, product_of: Callable[[list[str]], nn.Module]) -> None:
        """Replaces Linear layers that share an input by one product: product_of(their names in the block)."""
        for part_name, names, fused_name in FUSIONS:
            part = getattr(self, part_name)
            fused = product_of([f"{part_name}.{name}" for name in names])
            for name in names:
                setattr(part, name, None)
            setattr(part, fused_name, fused)


class Embedding(nn.Embedding):
    """Vocabulary-parallel: each rank holds some rows of the table."""

    def __init__(self, vocab_size: int, hidden_size: int, parallel: Parallel):
        super().__init__(vocab_size, hidden_size)
        self.parallel = parallel

    def forward(self, ids: Tensor) -> Tensor:
        return leave_parallel(embed(ids, local(self.weight), self.num_embeddings, self.parallel.tp), self.parallel)


class ScoreHead(nn.Linear):
    """One number for each token, in fp32, for reward models and critics. Its weight is whole on every rank."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        # [B, T, E] -> [B, T]; not a view, since FSDP's hooks warn of a view
        return torch.matmul(hidden.float(), local(self.weight)[0].float())


class Transformer(nn.Module):
    """A decoder with a language-model head, `lm_head`, or a scalar head, `score`.

    compute_dtype: the dtype of the activations; None for the weights'. parallel: how the model is sharded over ranks.
    head: "lm" or "score".
    """

    lora, dropout, adapter = None, None, ""  # set on models with adapters: models/lora.py, models/dropout.py

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype | None = None,
        parallel: Parallel = Parallel(),
        head: str = "lm",
    ):
        super().__init__()
        self.config, self.compute_dtype, self.parallel = config, compute_dtype, parallel
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, parallel)
        self.layers = nn.ModuleList(Block(config, layer, parallel) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, partial_grad=parallel.sequence_parallel)
        if head == "score":
            self.score = ScoreHead(config.hidden_size)
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.register_buffer("inv_freq", config.inv_freq(), persistent=False)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attend: Attend = causal_attention
    ) -> Tensor:
        """input_ids [B, T] -> the final normed hidden states [B, T, E], whole on every rank. Callers apply `lm_head` or
        `score` to the positions whose logits or scores they need. position_ids [B, T] default to 0..T-1. Under sequence
        parallelism T must be divisible by the number of tensor-parallel ranks."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if self.dropout is not None:
            self.dropout.see(input_ids, position_ids)
        cos, sin = rope_tables(position_ids, self.inv_freq, self.config.attention_factor)
        x = self.embed_tokens(input_ids).to(dtype=self.compute_dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        return whole_sequence(self.norm(x), self.parallel)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.compute_dtype or self.embed_tokens.weight.dtype

    @property
    def row_multiple(self) -> int:
        """Row lengths must be a multiple of this number: sequence parallelism shards rows over the ranks."""
        return size_of(self.parallel.tp) if self.parallel.sequence_parallel else 1

    def tie_weights(self) -> None:
        """Makes the head share the embedding's weight if the config says so."""
        if self.config.tie_word_embeddings and hasattr(self, "lm_head"):
            self.lm_head.weight = self.embed_tokens.weight

    def reset_buffers(self, device: torch.device | str) -> None:
        """Computes the buffers, which no checkpoint holds; needed after to_empty or a build on meta."""
        self.inv_freq = self.config.inv_freq().to(device)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights, N(0, 0.02) with norms 1 and biases 0, as Hugging Face initialises them."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
