"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank updates of the blocks' Linear layers beside a frozen base.

- y = x W^T + s (x A^T) B^T, with A [r, K] and B [N, r] in fp32; s = alpha / r, or alpha / sqrt(r) (rsLoRA, 2312.03732)
- one wrapper replaces any Linear, column- or row-parallel, and keeps its parameters: q_proj.weight keeps its name, and
  has q_proj.lora_A and q_proj.lora_B beside it. Where W is sharded, a column-parallel layer shards B, a row-parallel
  one A; the other factor is whole on every tp rank, and its gradient is summed over the ranks
- W is a frozen parameter, or integers (QLoRA, 2305.14314), dequantised for the forward and again for the backward
- adapters can be switched off, which makes a policy its own reference; a base may carry more sets of adapters: a
  critic's, and a frozen copy of those that the run began with, if they belong to the reference

Dimensions: M tokens, K input and N output features, both of this tp rank; r the rank of the update.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import is_main_rank
from models.compressed import linear_layers, pack_int32, unpack_int32
from models.dropout import TokenDropout
from models.model import RowLinear, ScoreHead, Transformer
from models.noise import noise_key
from models.products import Term, frozen_product
from models.qlinear import Quantized, Schemes, dequantize
from models.tp import all_gather, local, size_of, sum_parts, whole

CRITIC, REFERENCE = "_critic", "_reference"  # the suffixes of the names of their adapters


class Lora(NamedTuple):
    """The adapters of a model in training."""

    r: int
    alpha: float
    use_rslora: bool
    dropout: float
    layers: frozenset[str]  # "layers.0.self_attn.q_proj"
    scheme: Schemes | None  # how the base is quantised
    values: dict[str, Tensor]  # initial values, not sharded: "layers.0.self_attn.q_proj.lora_A", "score.weight"
    base: Path
    base_fingerprint: str
    seed: int
    with_critic: bool = False  # a second set of adapters, with a scalar head
    with_reference: bool = False  # a frozen copy of the adapters that the run begins with
    base_config: dict | None = None  # the contents of the base's config.json, see folder_config

    @property
    def names(self) -> list[str]:
        """The suffixes of its sets of adapters."""
        return ["", *[CRITIC] * self.with_critic, *[REFERENCE] * self.with_reference]

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def __str__(self) -> str:
        count, scale = len(self.layers), f"alpha {self.alpha:g}" + ", rank-stabilised" * self.use_rslora
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"LoRA of rank {self.r}, {scale}{dropout}, in {count} layers; base {self.scheme or 'frozen'}"


def _dequantized(bits: int, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    scale, minimum = scale if scale.dim() == 3 else (scale, None)
    return dequantize(Quantized(unpack_int32(packed, bits), scale, minimum=minimum), dtype)


class LoraLinear(nn.Module):
    """A Linear or RowLinear whose weight is frozen, with adapters or without."""

    def __init__(self, model: Transformer, name: str, number: int):
        """Replaces the layer of that name in a model with `lora` and `dropout`. number: of the layer, for dropout."""
        super().__init__()
        linear, lora = model.get_submodule(name), model.lora
        self.weight, self.bias = (None if lora.scheme else linear.weight), linear.bias
        self.parallel, self.scaling = model.parallel, lora.scaling
        self.is_row, self.is_split = isinstance(linear, RowLinear), size_of(model.parallel.tp) > 1
        self.is_part = self.is_row and self.is_split  # outputs are summed over the ranks, and the sum gets the bias
        # a tensor, since compiled code would be specialised on a number: one graph serves all blocks
        self.dropout, self.layer_key = model.dropout, torch.tensor(noise_key(number), device="cpu")
        self.has_adapters, self.adapter = name in lora.layers, ""  # the suffix of the adapters that are on; None: off
        N, K = linear.out_features, linear.in_features
        for suffix in lora.names if self.has_adapters else ():
            for factor, shape in (("lora_A", (lora.r, K)), ("lora_B", (N, lora.r))):
                values = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=suffix != REFERENCE)
                self.register_parameter(factor + suffix, values)

    def set_quantized(self, weight: Quantized) -> None:
        """Takes this tp rank's part of the weight."""
        self.bits = 4 if weight.values.dtype == torch.uint8 else 8
        scale = weight.scale if weight.minimum is None else torch.stack((weight.scale, weight.minimum))
        self.register_buffer("packed", pack_int32(weight.values), persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(A, B) of the adapter that is on, this tp rank's parts."""
        if not self.has_adapters or self.adapter is None:
            return None, None
        A, B = (getattr(self, f"lora_{factor}{self.adapter}") for factor in "AB")
        A, B = local(A, partial_grad=self.is_split and not self.is_row), local(B, partial_grad=self.is_part)
        return A.to(dtype), B.to(dtype)

    def term(self, dtype: torch.dtype) -> Term | None:
        """The Term for products(); None with dropout, since the update then has another input than the weight."""
        if self.dropout is not None and self.has_adapters and self.adapter is not None:
            return None
        A, B = self._factors(dtype)
        return self._frozen(dtype)._replace(A=A, B=B, scaling=self.scaling)

    def _frozen(self, dtype: torch.dtype) -> Term:
        """The Term without an update."""
        bias = None if self.bias is None or self.is_part else local(self.bias).to(dtype)
        if self.weight is None:
            return Term(self.packed, self.scale, bias, unpack=partial(_dequantized, self.bits))
        return Term(local(self.weight), bias=bias)

    def finish(self, y: Tensor) -> Tensor:
        return sum_parts(y, self.bias, self.parallel) if self.is_part else y

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        rows = x.flatten(0, -2)
        y = frozen_product(rows, self._frozen(x.dtype))
        A, B = self._factors(x.dtype)
        if A is not None:
            if self.dropout is not None:
                rows = self.dropout(rows, self.layer_key, self.parallel.tp if self.is_row else None)
            y = torch.addmm(y, F.linear(rows, A), B.T, alpha=self.scaling)
        return self.finish(y.view(*x.shape[:-1], -1))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + s B A, fp32, this tp rank's part; FSDP must hold the parameters gathered."""
        weight = self._base() if self.weight is None else local(self.weight).float()
        A, B = self._factors(torch.float32)
        return weight if A is None else torch.addmm(weight, B, A, alpha=self.scaling)

    @torch.no_grad()
    def merged_whole(self, adapter: str, stored: Callable[[], Tensor]) -> Tensor | None:
        """W + s B A, fp32, whole, with the adapters of that suffix: on the main rank, None on others. A collective.
        stored(): W as the base's folder holds it, used unless the base is quantised."""
        weight = self._base() if self.weight is None else None
        if weight is not None and size_of(self.parallel.tp) > 1:
            weight = all_gather(weight, 1 if self.is_row else 0, self.parallel.tp)
        factors = [whole(getattr(self, f"lora_{factor}{adapter}")) for factor in "BA"] if self.has_adapters else []
        if not is_main_rank():
            return None
        if weight is None:
            weight = stored().to(factors[0].device if factors else "cpu").float()
        return torch.addmm(weight, *factors, alpha=self.scaling) if factors else weight

    def _base(self) -> Tensor:
        return _dequantized(self.bits, self.packed, self.scale, torch.float32)


def add_adapters(model: Transformer, lora: Lora) -> None:
    """Freezes a model that is being built on meta, except a scalar head, and adds adapters, in place."""
    model.requires_grad_(False)
    model.lora = lora
    model.dropout = TokenDropout(lora.dropout, lora.seed) if lora.dropout else None
    for number, name in enumerate(linear_layers(len(model.layers))):
        model.set_submodule(name, LoraLinear(model, name, number))
    if lora.with_critic:
        model.score = ScoreHead(model.config.hidden_size)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
