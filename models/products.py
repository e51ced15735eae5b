"""Products, norms and gates of the blocks in training: the results of eager autograd, with fewer saved activations.

- autograd saves the input of every product and the intermediate results of norms and gates: 6 E + 4 F numbers per
  token and block, not counting attention. An input that is the norm of x, or silu(gate) * up, is elementwise work: the
  backward recomputes it, and 2 E + 2 F numbers are saved. No matrix product is computed twice
- layers that share an input share one backward, which sums the input's gradient in place; LoRA's low-rank updates
  (models/lora.py) are added in place to their layer's output, and the A factors of these layers are one product
- torch.compile decides by itself what to save, so it gets the plain operations; without gradients nothing is saved

Dimensions: M tokens, K input and N output features of a layer, r the rank of its update, E model dim, F of the MLP.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.malloc import with_room


class Term(NamedTuple):
    """The product of a layer, x W^T + bias + scaling (x A^T) B^T, all in the dtype of x."""

    weight: Tensor  # [N, K] as stored: of any dtype, or packed integers if there is an unpack
    scale: Tensor | None = None  # of the integers
    bias: Tensor | None = None  # [N]
    A: Tensor | None = None  # [r, K]
    B: Tensor | None = None  # [N, r]
    scaling: float = 1.0
    unpack: Callable[[Tensor, Tensor, torch.dtype], Tensor] | None = None  # (weight, scale, dtype) -> [N, K]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W in the dtype of a product; a cast or unpacked copy should not outlive that product."""
        return self.weight.to(dtype) if self.unpack is None else self.unpack(self.weight, self.scale, dtype)


TENSORS = 5  # the first fields of a Term are its tensors


class Kept(NamedTuple):
    """How the backward recomputes the input of layers: again(*sources). Only the sources are saved."""

    again: Callable[..., Tensor]
    sources: tuple[Tensor, ...]


def keeps_less() -> bool:
    """Whether code runs eagerly and with gradients, so that the functions of this file save memory."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def products(x: Tensor, layers: Sequence[nn.Module], kept: Kept | None) -> list[Tensor]:
    """[layer(x) for layer in layers] for x [..., K]. If all have a term(), `kept`, if given, is saved instead of x.
    In eager mode, layers with adapters compute the same bits with and without gradients: a policy is its reference."""
    is_adapted = any(getattr(layer, "has_adapters", False) for layer in layers)
    if kept is None and is_adapted and not torch.compiler.is_compiling():
        kept = Kept(_itself, (x.detach(),))
    terms = [layer.term(x.dtype) if kept and hasattr(layer, "term") else None for layer in layers]
    if any(term is None for term in terms):
        return [layer(x) for layer in layers]
    tensors = [tensor for term in terms for tensor in term[:TENSORS]]
    settings = [term[TENSORS:] for term in terms]
    outputs = _Products.apply(x, kept.again, settings, *kept.sources, *tensors)
    return [layer.finish(y) for layer, y in zip(layers, outputs)]


def product(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x), for an x that something else saves, too, or that cannot be recomputed."""
    return products(x, [layer], Kept(_itself, (x.detach(),)) if keeps_less() else None)[0]


def frozen_product(x: Tensor, term: Term) -> Tensor:
    """Computes a term without factors, where only x [M, K] has a gradient: x is not saved, and a cast or unpacked W
    exists only during its product, in the forward and again in the backward."""
    return _Products.apply(x, None, [term[TENSORS:]], *term[:TENSORS])[0]


def _itself(x: Tensor) -> Tensor:
    return x


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, again: Callable | None, settings: list[tuple], *tensors: Tensor | None):
        rows, terms = x.flatten(0, -2), _terms(tensors, settings)
        factors = [term.A for term in terms if term.A is not None]
        low = F.linear(rows, torch.cat(factors)) if factors else None
        outputs = []
        for term, part in zip(terms, _by_term(low, terms, dim=1)):
            y = _linear(rows, term.matrix(x.dtype), term.bias)
            if part is not None:
                y.addmm_(part, term.B.T, alpha=term.scaling)
            outputs.append(y.view(*x.shape[:-1], -1))
        ctx.save_for_backward(low, *tensors)
        ctx.again, ctx.settings = again, settings
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        low, *tensors = ctx.saved_tensors
        terms, num_sources = _terms(tensors, ctx.settings), len(tensors) - TENSORS * len(ctx.settings)
        needs_x, needed = ctx.needs_input_grad[0], _terms(ctx.needs_input_grad, ctx.settings)
        shape, grads = grads[0].shape[:-1], [grad.flatten(0, -2) for grad in grads]
        low_grad = None  # [M, all r], of x A^T
        if low is not None:
            adapted = [(grad, term) for grad, term in zip(grads, terms) if term.A is not None]
            low_grad = torch.cat([(grad @ term.B).mul_(term.scaling) for grad, term in adapted], dim=1)

        of_weights = of_A = [None] * len(terms)
        if any(need.weight or need.A for need in needed):
            rows = ctx.again(*tensors[:num_sources]).flatten(0, -2)
            of_weights = [grad.T @ rows if need.weight else None for grad, need in zip(grads, needed)]
            of_A = _by_term(None if low_grad is None else low_grad.T @ rows, terms, dim=0)
            del rows
        results = []
        for grad, term, part, need, *found in zip(grads, terms, _by_term(low, terms, dim=1), needed, of_weights, of_A):
            of_B = (grad.T @ part).mul_(term.scaling) if need.B else None
            results += [found[0], None, grad.sum(0) if need.bias else None, found[1], of_B]
        of_x = _input_gradient(grads, terms, low_grad).view(*shape, -1) if needs_x else None
        return of_x, None, None, *[None] * num_sources, *results


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[M, K] -> [M, N]"""
    out = with_room(x, (len(x), len(weight)))
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def _terms(tensors: Sequence, settings: list[tuple]) -> list[Term]:
    """The terms whose tensors are at the end of `tensors`."""
    first = len(tensors) - TENSORS * len(settings)
    return [Term(*tensors[first + TENSORS * i :][:TENSORS], *rest) for i, rest in enumerate(settings)]


def _by_term(together: Tensor | None, terms: list[Term], dim: int) -> list[Tensor | None]:
    """Splits a tensor along dim into parts of size r, one for each term with factors; None for the other terms."""
    if together is None:
        return [None] * len(terms)
    parts = iter(together.split([len(term.A) for term in terms if term.A is not None], dim))
    return [None if term.A is None else next(parts) for term in terms]


def _input_gradient(grads: list[Tensor], terms: list[Term], low_grad: Tensor | None) -> Tensor:
    """[M, K]"""
    weight = terms[0].matrix(grads[0].dtype)
    total = torch.mm(grads[0], weight, out=with_room(weight, (len(grads[0]), weight.shape[1])))
    for grad, term in zip(grads[1:], terms[1:]):
        total.addmm_(grad, term.matrix(grad.dtype))
    if low_grad is not None:
        total.addmm_(low_grad, torch.cat([term.A for term in terms if term.A is not None]))
    return total


# ----------------------------------------------------------------------------------- inputs of products


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Kept]:
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) of x [..., E] in fp32, times weight, fp32 [E]; in x's dtype."""
    y, rstd = _Norm.apply(x, weight, eps)
    return y, Kept(_normed, (x.detach(), rstd, weight.detach()))


def _normed(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    return torch.mul(x, rstd, out=with_room(rstd, x.shape)).mul_(weight).to(x.dtype)


class _Norm(torch.autograd.Function):
    """Returns (y, rstd), y = x rstd weight, rstd = 1 / root mean square [..., 1]; of x and y it saves only x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float):
        if x.device.type == "cuda":
            y, rstd = torch._fused_rms_norm(x.float(), weight.shape, weight, eps)
            y = y.to(x.dtype)
        else:  # a CPU's fused operation consists of these, with one more tensor
            rstd = (x.float().square().mean(dim=-1, keepdim=True) + eps).rsqrt()
            y = _normed(x, rstd, weight)
        ctx.save_for_backward(x, rstd, weight)
        ctx.mark_non_differentiable(rstd)
        return y, rstd

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        x, rstd, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        if x.device.type == "cuda":  # CPUs lack this kernel
            return *_norm_gradients_by_kernel(grad, x, rstd, weight, [needs_x, needs_weight]), None
        unit = torch.mul(x, rstd, out=with_room(rstd, x.shape))
        weighted = torch.mul(grad, unit, out=with_room(unit))
        of_weight = weighted.flatten(0, -2).sum(0) if needs_weight else None
        if not needs_x:
            return None, of_weight, None
        mean = (weighted @ weight).div_(len(weight))[..., None]
        of_x = torch.mul(grad, weight, out=with_room(unit)).addcmul_(unit, mean, value=-1).mul_(rstd)
        return of_x.to(x.dtype), of_weight, None


def _norm_gradients_by_kernel(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, needs: list[bool]) -> tuple:
    """The gradients (of x, of weight), each None if not needed."""
    given = (grad.float().contiguous(), x.float(), weight.shape, rstd, weight, needs)
    of_x, of_weight = torch.ops.aten._fused_rms_norm_backward(*given)
    return of_x.to(x.dtype) if needs[0] else None, of_weight if needs[1] else None


def gated(gate: Tensor, up: Tensor) -> tuple[Tensor, Kept]:
    """silu(gate) * up: SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
    return _Gated.apply(gate, up), Kept(_gate, (gate.detach(), up.detach()))


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return _silu(gate).mul_(up)


def _silu(x: Tensor) -> Tensor:
    out = with_room(x)
    return F.silu(x) if out is None else torch.ops.aten.silu.out(x, out=out)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gate(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        of_gate = torch.mul(grad, up, out=with_room(grad))
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return of_gate, _silu(gate).mul_(grad)
