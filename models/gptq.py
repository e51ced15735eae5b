"""int4 quantisation of one weight that minimises the error of the layer's outputs on calibration inputs.

- GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, and later columns compensate
  for the error of each, by the second moments of the layer's inputs; columns with large moments come first (act-order,
  though a group holds neighbouring columns), and ranges are clipped for the least error of the weights
- then, alternately, the best scales for the integers (least squares over all groups of a row) and the best integers for
  the scales, one column after the other (coordinate descent: Behdin et al. 2023, arXiv 2309.01885)

All reduce the error of the layer's outputs, tr((W - D) H (W - D)^T), where D are the dequantised weights and H the
damped second moments.

Dimensions: N output features, K input features, G groups of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.qlinear import ELEMENTS, Quantized, Scheme, dequantize, int4_scale, round_int4

COLUMNS = 128  # columns whose errors are applied to the rest of the row together
CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8)  # fractions of a group's range that are tried
RIDGE = 1e-6  # keeps the scale of a group whose integers do not determine it


class Curvature(NamedTuple):
    """Curvature of the squared error of a layer's outputs as a function of its weights."""

    matrix: Tensor  # H, fp32 [K, K]
    order: Tensor  # int64 [K]: the inputs by moment, largest first
    lower: Tensor  # the Cholesky factor of H in this order
    spread: Tensor  # the upper Cholesky factor of H^-1, so ordered: row i spreads column i's error over later ones

    @classmethod
    def of(cls, moments: Tensor, damping: float = 0.01) -> "Curvature":
        """moments: fp32 [K, K], the sum of x x^T over a layer's inputs x. damping: fraction of the mean moment that is
        added to the diagonal; multiplied by ten until H has an inverse in fp32. Raises ValueError if moments are not
        finite."""
        if not moments.isfinite().all():
            raise ValueError("inputs of a layer are not finite; use --dtype float32, or other calibration records")
        order = moments.diagonal().argsort(descending=True)
        mean = moments.diagonal().mean().clamp(min=1e-12)  # without any token: rounding to nearest
        while True:
            matrix = moments + damping * mean * torch.eye(len(moments), device=moments.device)
            lower, failed = torch.linalg.cholesky_ex(matrix[order][:, order])
            if not failed:
                spread, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return cls(matrix, order, lower, spread)
            damping *= 10

    def solve(self, right: Tensor) -> Tensor:
        """Returns right H^-1, for right [N, K]."""
        return torch.cholesky_solve(right[:, self.order].T, self.lower).T[:, self.order.argsort()]


def gptq(weight: Tensor, curvature: Curvature, scheme: Scheme, rounds: int = 2) -> Quantized:
    """Quantises a weight, fp32 [N, K], to int4 so that the layer's outputs, rather than its weights, change little.
    rounds: how often scales and integers are refitted after GPTQ."""
    found = _round_in_order(weight, curvature, clipped_scale(weight, scheme.group_size))
    for _ in range(rounds):
        found = refit_integers(weight, curvature.matrix, refit_scales(weight, curvature.matrix, found))
    return found


def clipped_scale(weight: Tensor, group_size: int | None) -> Tensor:
    """Returns int4_scale() for the fraction of each group's range with the least squared error of the weights."""
    least, best = torch.inf, int4_scale(weight, group_size)
    for ratio in (*CLIPPED, *(-ratio for ratio in CLIPPED)):
        scale = int4_scale(ratio * weight, group_size)
        errors = _group_sums((weight - dequantize(round_int4(weight, scale))).square_(), scale.shape[1])
        smaller = errors < least
        least, best = torch.where(smaller, errors, least), torch.where(smaller, scale, best)
    return best


def _round_in_order(weight: Tensor, curvature: Curvature, scale: Tensor) -> Quantized:
    K, order, spread = weight.shape[1], curvature.order, curvature.spread
    groups = (order // (K // scale.shape[1])).tolist()
    left = weight[:, order]  # columns still to be rounded
    values = torch.empty_like(left, dtype=torch.uint8)
    for start in range(0, K, COLUMNS):
        end = min(start + COLUMNS, K)
        block = left[:, start:end].T.contiguous()  # [columns, N]
        errors = torch.empty_like(block)
        for i in range(start, end):
            rounded = round_int4(block[i - start, :, None], scale[:, groups[i], None])
            values[:, i] = rounded.values[:, 0]
            errors[i - start] = (block[i - start] - dequantize(rounded)[:, 0]) / spread[i, i]
            block[i - start + 1 :].addr_(spread[i, i + 1 : end], errors[i - start], alpha=-1)
        left[:, end:] -= errors.T @ spread[start:end, end:]
    return Quantized(values[:, order.argsort()], scale)


def refit_scales(weight: Tensor, matrix: Tensor, found: Quantized) -> Quantized:
    """Returns the same integers with the best scales for them, in bf16; matrix: H, fp32 [K, K]."""
    (N, K), G = weight.shape, found.scale.shape[1]
    steps = dequantize(found._replace(scale=torch.ones_like(found.scale)))  # q - 8
    gradient = (weight - dequantize(found)) @ matrix  # the negative gradient of half the outputs' squared error
    scales = []
    for rows in torch.arange(N, device=weight.device).split(max(1, 4 * ELEMENTS // (G * G + K))):
        right = _group_sums(gradient[rows] * steps[rows], G)
        parts = steps[rows].split(K // G, dim=1), matrix.split(K // G)
        normal = torch.stack([_group_sums((mine @ h) * steps[rows], G) for mine, h in zip(*parts)], dim=1)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += (RIDGE * diagonal.mean(dim=1, keepdim=True)).clamp(min=1e-12)
        scales.append(found.scale[rows].float() + torch.linalg.solve(normal, right))
    return found._replace(scale=torch.cat(scales).bfloat16())


def _group_sums(columns: Tensor, num_groups: int) -> Tensor:
    return columns.unflatten(1, (num_groups, -1)).sum(dim=-1)


def refit_integers(weight: Tensor, matrix: Tensor, found: Quantized) -> Quantized:
    """Returns the same scales with better integers: each column in turn gets the best ones, given all other columns;
    matrix: H, fp32 [K, K]."""
    K, G = weight.shape[1], found.scale.shape[1]
    scale = found.scale.float().T.repeat_interleave(K // G, dim=0)  # [K, N], like all tensors below
    divisor = scale.masked_fill(scale == 0, 1.0)
    values = found.values.T.float()
    errors = weight.T - dequantize(found).T
    for start in range(0, K, COLUMNS):
        end = min(start + COLUMNS, K)
        gradient = matrix[start:end] @ errors
        for i in range(start, end):
            better = (values[i] + gradient[i - start] / (matrix[i, i] * divisor[i])).round_().clamp_(0, 15)
            moved = (better - values[i]) * scale[i]
            values[i] = better
            errors[i] -= moved
            gradient.addr_(matrix[start:end, i], moved, alpha=-1)
    return found._replace(values=values.T.to(torch.uint8).contiguous())
