"""The LLaMA decoder and its close relatives: Qwen2 / 2.5 (biases of q, k and v) and Qwen3 (normed q and k).

- the shape comes from a Hugging Face config.json, never from a folder's name; models/presets.py lists the shapes of
  real models
- parameters carry Hugging Face's names without the leading "model.", so nothing is ever converted
- attention is an argument: forward() takes `attend(layer, q, k, v)`; training uses the default (causal), the generation
  engine passes a function that writes and reads its KV cache, so the same layers serve both
- RMSNorm and RoPE compute in fp32 whatever the dtype of the weights; Linear casts its weight to the input's dtype, so
  fp32 master weights compute in bf16 without autocast

Dimensions: B batch, T query tokens, H query heads, K key/value heads, D head dim, E model dim, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.attention import Attend, causal_attention
from models.files import read_hf_config
from models.products import Kept, Term, gated, keeps_less, norm, product, products
from models.rope import apply_rope, rope_inv_freq, rope_settings, rope_tables, scaled_context
from models.tp import Parallel, enter_parallel, leave_parallel, local, size_of, sum_parts, whole_sequence
from models.vocab_parallel import embed

# The default of a key that a config.json leaves out, for each model_type, as in transformers (5.23).
DEFAULTS = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
SWITCHES = {  # boolean keys of each model_type, besides tie_word_embeddings; qwen2's biases are fixed
    "llama": ("attention_bias", "mlp_bias"),
    "qwen2": (),
    "qwen3": ("attention_bias",),
}
QUANT_METHOD = "compressed-tensors"  # quant_method in the quantization_config of a folder with quantised weights

# Linear layers that the inference copy of a block computes as one product: (the part of the block, the names of its
# Linear layers, the name of the product that replaces them).
FUSIONS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    ("self_attn", ("o_proj",), "o_proj"),
    ("mlp", ("gate_proj", "up_proj"), "gate_up_proj"),
    ("mlp", ("down_proj",), "down_proj"),
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, under Hugging Face's key names.

    rope_scaling: None, or a dict with a "rope_type" of rope.ROPE_KEYS and the numbers of that type. attention_bias:
    biases of q, k, v and o; qwen2 always has those of q, k and v.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "llama"

    @classmethod
    def from_hf(cls, source: dict | str | Path) -> "ModelConfig":
        """Reads the contents of a Hugging Face config.json, or those of a folder's.

        Raises ValueError, naming the key, for anything that this Transformer would compute wrongly.
        """
        if isinstance(source, dict):
            config, where = source, "config"
        else:
            config, where = read_hf_config(source), f"{source}/config.json"
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in DEFAULTS:
            raise ValueError(f"{where}: model_type {model_type!r} is not supported, only {', '.join(DEFAULTS)}")
        config = DEFAULTS[model_type] | config
        _refuse_unsupported(config, where)
        number = partial(_number, config, where)
        hidden_size, heads = number("hidden_size"), number("num_attention_heads")
        kv_heads = number("num_key_value_heads", default=heads)
        if config.get("head_dim") is None and hidden_size % heads:
            raise ValueError(f"{where}: hidden_size {hidden_size} is not divisible by num_attention_heads {heads}")
        if heads % kv_heads:
            raise ValueError(f"{where}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")
        head_dim = number("head_dim", default=hidden_size // heads)
        if head_dim % 2:
            raise ValueError(f"{where}: head_dim {head_dim} must be even for rotary embeddings")
        rope_theta, rope_scaling = rope_settings(config, where)
        switches = {key: config.get(key) for key in ("tie_word_embeddings", *SWITCHES[model_type])}
        for key, value in switches.items():
            if value not in (None, True, False):
                raise ValueError(f"{where}: {key} must be true or false, not {value!r}")
        return cls(
            model_type=model_type,
            vocab_size=number("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=number("intermediate_size"),
            num_hidden_layers=number("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=scaled_context(number("max_position_embeddings"), rope_scaling),
            rms_norm_eps=number("rms_norm_eps", kind=float, default=1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            **{key: bool(value) for key, value in switches.items()},
        )

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether q and k of each head are normed before they are rotated."""
        return self.model_type == "qwen3"

    @property
    def attention_factor(self) -> float:
        """The factor of the rotary embedding's cos and sin, with which yarn sharpens the attention."""
        return (self.rope_scaling or {}).get("attention_factor", 1.0)

    def describe_context(self) -> str:
        """Describes the context, for an error about a longer row. Folders with linear scaling state either the scaled
        context or the one before."""
        text, scaling = f"{self.max_position_embeddings} tokens", self.rope_scaling
        if scaling is None or scaling["rope_type"] != "linear":
            return text
        advice = f"raise it {scaling['factor']:g} times if it leaves out the linear RoPE scaling"
        return f"{text} (max_position_embeddings in config.json; {advice})"

    def check_divisible(self, tensor_parallel_size: int) -> None:
        """Raises ValueError, naming the key, if the model cannot be sharded over this many ranks."""
        for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            size = getattr(self, key)
            if size % tensor_parallel_size:
                raise ValueError(f"--tensor_parallel_size {tensor_parallel_size} does not divide {key} = {size}")

    def inv_freq(self) -> Tensor:
        """The inverse frequencies of the rotary embedding, fp32 [D/2] on the CPU."""
        return rope_inv_freq(self.head_dim, self.rope_theta, self.rope_scaling)

    def num_parameters(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        E, ffn = self.hidden_size, self.intermediate_size
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        attention = 2 * E * (heads + kv_heads) * self.head_dim
        attention += self.qkv_bias * (heads + 2 * kv_heads) * self.head_dim + self.attention_bias * E
        attention += self.qk_norm * 2 * self.head_dim
        mlp = 3 * E * ffn + self.mlp_bias * (2 * ffn + E)
        embeddings = (2 - self.tie_word_embeddings) * self.vocab_size * E
        return self.num_hidden_layers * (attention + mlp + 2 * E) + E + embeddings

    def training_flops_per_token(self, seq_len: float, *, frozen: bool = False, logits: float = 1.0) -> float:
        """FLOPs of forward and backward per token of a row of seq_len tokens: 6 for each weight that multiplies it,
        and causal attention's two products over seq_len / 2 positions on average (PaLM, arXiv 2204.02311, appendix B).

        frozen: 4 for each weight, since a base under adapters has no weight gradients; the adapters are not counted.
        logits: the share of the tokens that have logits, 0 with a scalar head, whose product is not counted.
        """
        head = self.vocab_size * self.hidden_size  # and the embedding, which multiplies nothing
        weights = self.num_parameters() - (2 - self.tie_word_embeddings - logits) * head
        attention = self.num_hidden_layers * self.num_attention_heads * self.head_dim * seq_len
        return (4 if frozen else 6) * weights + 6 * attention


def _refuse_unsupported(config: dict, where: str) -> None:
    only = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "is_causal": True}  # encoders say false
    if config["model_type"] != "llama":
        only["use_sliding_window"] = False
    for key, supported in only.items():
        if config.get(key) not in (None, supported):
            raise ValueError(f"{where}: {key} {config[key]!r} is not supported, only {supported!r}")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"{where}: layer_types {layer_types!r} is not supported, only 'full_attention' in all layers")
    if layer_types and len(layer_types) != config.get("num_hidden_layers"):  # transformers does not open such a folder
        layers = f"num_hidden_layers is {config.get('num_hidden_layers')}"
        raise ValueError(f"{where}: layer_types lists {len(layer_types)} layers, {layers}; remove the key")
    if config.get("quantization_config") is not None and not is_quantized(config):
        raise ValueError(
            f"{where}: quantization_config {config['quantization_config']!r} is not supported, only the layout of "
            f"{QUANT_METHOD}; if an older scripts/quantize.py wrote the folder, run it again"
        )


def _number(config: dict, where: str, key: str, kind: type = int, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{where}: the key {key!r} is missing")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf or kind(value) != value:
        raise ValueError(f"{where}: {key} must be a positive {kind.__name__}, not {value!r}")
    return kind(value)


def is_quantized(config: dict) -> bool:
    """Whether a config.json says that the weights beside it are quantised, in the layout of compressed-tensors."""
    stored = config.get("quantization_config")
    return isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD


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
