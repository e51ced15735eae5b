"""The shape of a model, from a folder's config.json; models/presets.py lists those of real models."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from models.files import read_json_object
from models.rope import rope_inv_freq, rope_settings, scaled_context

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


def read_hf_config(folder: str | Path) -> dict:
    """Returns the contents of a model folder's config.json. Raises ValueError or FileNotFoundError if it is none."""
    folder = Path(folder)
    config = folder / "config.json"
    if config.is_file():
        return read_json_object(config)
    if (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: holds an adapter and no merged model; merge it (its run with --resume --merge, or "
            "PEFT's merge_and_unload) or, for --checkpoint_path only, give its base there and it as --adapter_path"
        )
    if folder.is_dir():
        raise FileNotFoundError(f"{folder}: no config.json here, so this is not a Hugging Face model folder")
    if folder.is_file():
        other = "a Hugging Face folder with safetensors (GGUF is not supported)"
        raise ValueError(f"{folder}: is a file; give {'its folder' if folder.suffix == '.json' else other}")
    parts = folder.parts[folder.parts[:1] == ("checkpoints",) :]  # where download.py puts models of the Hub
    is_name = len(parts) == 2 and not Path(parts[0]).exists() and parts[0] not in ("runs", "..")
    fetched = f"; python scripts/download.py {'/'.join(parts)} fetches it, if that is a name on the Hub"
    raise FileNotFoundError(f"{folder}: no such file or folder{fetched * is_name}")


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
        context = scaled_context(number("max_position_embeddings"), rope_scaling)
        _refuse_window(config, where, context)
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
            max_position_embeddings=context,
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


def _refuse_window(config: dict, where: str, context: int) -> None:
    """Raises ValueError for a window shorter than the context: where layer_types is left out, transformers' cache of a
    llama keeps no more than the window, which its mask of a whole row ignores."""
    if config["model_type"] != "llama" or config.get("layer_types"):
        return
    for key in ("sliding_window", "attention_chunk_size"):
        window = config.get(key)
        if window is not None and (type(window) is not int or window < context):
            raise ValueError(f"{where}: {key} {window!r} is not supported, only the context's {context} or more")


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
