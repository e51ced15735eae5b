"""Stateless noise: random bits that are a pure function of (key, row, column).

- no generator and no state: a resumed run, another batch or another layout over ranks draws the same bits
- integer arithmetic mod 2^32 and 2^64 only, so every device draws the same bits
- key, row and column are (sample, position, token) in sampling, and (parameter and step, row, column) in the
  optimizer's stochastic rounding
"""

import torch
from torch import Tensor

MASK64 = (1 << 64) - 1


def _mix64(x: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def _signed(x: int, bits: int = 64) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def mix64(x: Tensor) -> Tensor:
    """_mix64 on int64 tensors; torch's >> is arithmetic, so the sign's copies are masked off."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def noise_key(*parts: int) -> int:
    """The key of one stream of noise, a signed 64-bit integer."""
    key = 0
    for part in parts:
        key = _mix64((key + part + 0x9E3779B97F4A7C15) & MASK64)
    return _signed(key)


def column_hashes(num_columns: int, device: torch.device | str = "cpu") -> Tensor:
    """One well-mixed int32 for each column, [C]."""
    columns = torch.arange(1, num_columns + 1, dtype=torch.int64, device=device)
    return ((mix64(columns) & 0xFFFFFFFF) - 2**31).to(torch.int32)


def random_bits(keys: Tensor, rows: Tensor, hashes: Tensor) -> Tensor:
    """Independent random int32, [R, C]: one for each (key, row, column).

    keys: int64 [R] or a scalar; rows: int64 [R]. hashes: int32 [C] or [R, C] from column_hashes.
    """
    mixed = mix64(keys + rows * _signed(0x9E3779B97F4A7C15))
    low = ((mixed & 0xFFFFFFFF) - 2**31).to(torch.int32)[:, None]
    high = (((mixed >> 32) & 0xFFFFFFFF) - 2**31).to(torch.int32)[:, None]
    x = (hashes ^ low).mul_(_signed(0x85EBCA6B, 32))
    x = x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x = x.add_(high).mul_(_signed(0xC2B2AE35, 32))
    x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    x = x.mul_(_signed(0x9E3779B1, 32))
    return x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))


def exponential(bits: Tensor) -> Tensor:
    """Exp(1) variables, fp32, finite and above 0, from int32 bits (of which it takes 31, in place).

    31 bits make a uniform whose small values keep full relative precision, and with them the tail that decides rare
    tokens. The largest 64 uniforms round to 1 in fp32, which would give infinity: they are set to the number below 1.
    """
    uniforms = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(-(2.0**-31))
    return uniforms.clamp_(min=2.0**-24 - 1).log1p_().neg_()


def exponential_noise(keys: Tensor, positions: Tensor, hashes: Tensor) -> Tensor:
    """Independent Exp(1) variables, fp32 [B, V']: one for each (row key, position, token).

    keys, positions: int64 [B], the sample's key and the position of the token to draw. hashes: int32 [V'] or [B, V'],
    the column hashes of the tokens.
    """
    return exponential(random_bits(keys, positions, hashes))
