"""Rotary position embeddings: their settings in config.json, their frequencies, the rotation.

Dimensions: B batch, T tokens, H heads, D head dim.
"""

import math

import torch
from torch import Tensor

from models.malloc import with_room
from models.products import keeps_less

# The numbers that each type of scaling takes from config.json.
ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
}
YARN_BETAS = {"beta_fast": 32, "beta_slow": 1}  # the paper's, where config.json says nothing


def rope_settings(config: dict, where: str) -> tuple[float, dict | None]:
    """(theta, scaling) from either spelling: transformers 5 nests both in rope_parameters, older folders have
    rope_theta and rope_scaling at the top, with "type" or "rope_type". An original_max_position_embeddings at the top
    takes precedence over the nested one. Missing or null keys get the defaults of transformers (5.23); yarn's
    attention_factor is computed where it is not given. Raises ValueError that names the key."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # as transformers, given both
    settings = config.get(key) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: {key} must be an object, not {settings!r}")
    theta = _positive(settings.get("rope_theta", config.get("rope_theta", 10000.0)), f"{where}: rope_theta")
    nested = next((name for name, value in settings.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise ValueError(f"{where}: {key}.{nested} is not supported, only one setting for all layers")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: {key}.partial_rotary_factor {settings['partial_rotary_factor']!r} is not supported")
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if rope_type == "default":
        return float(theta), None
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        raise ValueError(f"{where}: {key} of type {rope_type!r} is not supported, only default, {', '.join(ROPE_KEYS)}")
    scaling = {"rope_type": rope_type}
    for name in ROPE_KEYS[rope_type]:
        value = settings.get(name)
        if name == "original_max_position_embeddings":
            places = (config.get(name), value, config.get("max_position_embeddings"))
            value = next((number for number in places if number is not None), None)
        elif rope_type == "yarn" and not value:
            value = YARN_BETAS.get(name, value)
        scaling[name] = _positive(value, f"{where}: {key}.{name}", rope_type)
    if rope_type == "yarn":
        scaling |= _yarn_switches(settings, scaling["factor"], f"{where}: {key}")
    return float(theta), scaling


def scaled_context(stated: int, scaling: dict | None) -> int:
    """Returns a model's context. stated: config.json's max_position_embeddings. With yarn it is at least the original
    context times the factor, as in vLLM, since Qwen's model cards add yarn and leave max_position_embeddings."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return stated
    return max(stated, int(scaling["original_max_position_embeddings"] * scaling["factor"]))


def _positive(value: object, name: str, rope_type: str | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        of_type = "" if rope_type is None else f" for type {rope_type!r}"
        raise ValueError(f"{name} must be a positive number{of_type}, not {value!r}")
    return value


def _yarn_switches(settings: dict, factor: float, where: str) -> dict:
    """yarn's attention_factor, given or computed from mscale and mscale_all_dim, and truncate."""
    truncate, given = settings.get("truncate", True), settings.get("attention_factor")
    if not isinstance(truncate, bool):
        raise ValueError(f"{where}.truncate must be true or false, not {truncate!r}")
    if given is None:
        scales = [settings.get(name) for name in ("mscale", "mscale_all_dim")]
        scales = [_positive(scale, f"{where}.mscale", "yarn") for scale in scales] if all(scales) else (1, 0)
        logarithm = 0.1 * math.log(max(1, factor))
        given = (scales[0] * logarithm + 1) / (scales[1] * logarithm + 1)
    return {"attention_factor": _positive(given, f"{where}.attention_factor", "yarn"), "truncate": truncate}


def rope_inv_freq(head_dim: int, theta: float, scaling: dict | None) -> Tensor:
    """Inverse frequencies of the rotary embedding (Su et al. 2021, arXiv 2104.09864), fp32 [D/2] on the CPU.

    linear: positions shrink by `factor` (Chen et al. 2023, arXiv 2306.15595). llama3: stretches only wavelengths that
    are long relative to the original context, with a ramp in between (Llama 3.1, arXiv 2407.21783). yarn: the same with
    a ramp over dimensions, from those that turn beta_fast times in the original context to those that turn beta_slow
    times (Peng et al. 2023, arXiv 2309.00071). dynamic: raises theta only for sequences longer than
    max_position_embeddings, which are refused here, so it changes nothing.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    inv_freq = 1.0 / theta**exponents
    if scaling is None or scaling["rope_type"] == "dynamic":
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    if scaling["rope_type"] == "yarn":
        stretched = _yarn_ramp(head_dim, theta, scaling)
        return inv_freq / scaling["factor"] * stretched + inv_freq * (1 - stretched)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    keep = (context / wavelength - low) / (high - low)  # 1: untouched, 0: fully stretched, between: the ramp
    ramped = (1 - keep) * inv_freq / scaling["factor"] + keep * inv_freq
    kept = torch.where(wavelength < context / high, inv_freq, ramped)
    return torch.where(wavelength > context / low, inv_freq / scaling["factor"], kept)  # also where low is above high


def _yarn_ramp(head_dim: int, theta: float, scaling: dict) -> Tensor:
    """[D/2]: how far each frequency is stretched, from 0, untouched, to 1."""
    context, half = scaling["original_max_position_embeddings"], head_dim // 2

    def dimension(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(half, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)


def rope_tables(position_ids: Tensor, inv_freq: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin, times factor, of the rotations at position_ids [B, T], fp32 [B, T, 1, D]; the first half of sin is
    negated."""
    angles = (position_ids[..., None].float() * inv_freq).unsqueeze(2)  # [B, T, 1, D/2]
    cos, sin = angles.cos(), angles.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [B, T, H, D], the halves of D being the two coordinates (Hugging Face's layout), in fp32; returns x's
    dtype. cos, sin: fp32 [B, T, 1, D] from rope_tables."""
    if x.requires_grad and keeps_less():
        return _Rotated.apply(x, cos, sin)
    return _rotate(x, cos, sin)


class _Rotated(torch.autograd.Function):
    """apply_rope(), whose backward rotates the gradient back in one call."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.float()
    first, second = y.chunk(2, dim=-1)
    exchanged = torch.cat((second, first), dim=-1, out=with_room(y))
    return torch.mul(y, cos, out=with_room(y)).addcmul_(exchanged, sin).to(x.dtype)
