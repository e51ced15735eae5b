"""Rotary position embeddings: their settings in config.json, their frequencies, the rotation.

Dimensions: B batch, T tokens, H heads, D head dim.
"""

import math

import torch
from torch import Tensor

ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_settings(config: dict, where: str) -> tuple[float, dict | None]:
    """(theta, scaling) from either spelling: transformers 5 nests both in rope_parameters, older folders have
    rope_theta and rope_scaling at the top, with "type" or "rope_type". An original_max_position_embeddings at the top
    goes before the nested one, as in transformers."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # of both, transformers takes this
    settings = config.get(key) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: {key} must be an object, not {settings!r}")
    theta = settings.get("rope_theta", config.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"{where}: rope_theta must be a positive number, not {theta!r}")
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
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{where}: {key}.{name} must be a positive number for type {rope_type!r}, not {value!r}")
        scaling[name] = value
    return float(theta), scaling


def rope_inv_freq(head_dim: int, theta: float, scaling: dict | None) -> Tensor:
    """Inverse frequencies of the rotary embedding (Su et al. 2021, arXiv 2104.09864), fp32 [D/2] on the CPU.

    linear: positions shrink by `factor` (Chen et al. 2023, arXiv 2306.15595). llama3: only wavelengths that are long
    beside the original context are stretched, with a ramp in between (Llama 3.1, arXiv 2407.21783).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    inv_freq = 1.0 / theta**exponents
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    keep = (context / wavelength - low) / (high - low)  # 1: untouched, 0: fully stretched, between: the ramp
    ramped = (1 - keep) * inv_freq / scaling["factor"] + keep * inv_freq
    stretched = torch.where(wavelength > context / low, inv_freq / scaling["factor"], ramped)
    return torch.where(wavelength < context / high, inv_freq, stretched)


def rope_tables(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotations at position_ids [B, T], fp32 [B, T, 1, D]; sin carries the sign of its half."""
    angles = (position_ids[..., None].float() * inv_freq).unsqueeze(2)  # [B, T, 1, D/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [B, T, H, D], the halves of D being the two coordinates (Hugging Face's layout), in fp32; returns x's
    dtype. cos, sin: fp32 [B, T, 1, D] from rope_tables."""
    y = x.float()
    first, second = y.chunk(2, dim=-1)
    return torch.addcmul(y * cos, torch.cat((second, first), dim=-1), sin).to(x.dtype)
