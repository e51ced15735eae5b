"""Runs the kernels of models/triton_head.py, which models/fused_head.py calls, in Triton's interpreter, which must be
enabled before Triton is imported, and compares them with autograd on whole logits."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import fused_head, triton_head, vocab_parallel
from models.vocab_parallel import linear_cross_entropy, linear_logprobs


def made(dtype: torch.dtype, N: int = 5, V: int = 110, E: int = 16):  # two blocks of columns
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, E, generator=generator).to(dtype).requires_grad_() for n in (N, V))
    return hidden, weight, torch.randint(V, (N,), generator=generator), torch.randn(2, N, generator=generator)


def oracle(hidden, weight, targets, temperature):
    """Log-probs and entropies for autograd, from whole logits rounded as the products are."""
    logp = ((hidden @ weight.T).float() / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator is torch.ops.aten.mm.default
        return operator(*args, **(kwargs or {}))


def check_against_autograd(dtype: torch.dtype, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "rows_at_once", lambda hidden, num_columns: 2 if chunked else 1000)
    monkeypatch.setattr(fused_head, "WEIGHT_ROWS", 40)
    hidden, weight, targets, factors = made(dtype)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    wanted = oracle(hidden, weight, targets, 0.7)
    found = linear_logprobs(hidden, weight, targets, temperature=0.7, entropy=True)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for loss_of in (lambda logp, entropy: (logp * factors[0] - entropy * factors[1]).sum(), lambda *x: x[0].mean()):
        of_both = (torch.autograd.grad(loss_of(*x), (hidden, weight), retain_graph=True) for x in (found, wanted))
        for ours, theirs in zip(*of_both):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, theirs, **tolerance)
    of_entropy = (torch.autograd.grad(x[1].sum(), weight, retain_graph=True)[0] for x in (found, wanted))
    torch.testing.assert_close(*of_entropy, **tolerance)
    losses = linear_cross_entropy(hidden, weight, targets), -oracle(hidden, weight, targets, 1.0)[0].sum()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(0.3 * loss, (hidden, weight)) for loss in losses)):
        torch.testing.assert_close(ours, theirs, **tolerance)
    frozen = weight.detach()
    for loss_of in (
        lambda weight: linear_cross_entropy(hidden, weight, targets),
        lambda weight: linear_logprobs(hidden, weight, targets, temperature=0.7)[0].sum(),
    ):
        with Products() as learnt:
            wanted = torch.autograd.grad(loss_of(weight), (hidden, weight))[0]
        with Products() as of_frozen:
            found = torch.autograd.grad(loss_of(frozen), hidden)[0]
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        chunks = -(-len(hidden) // 2) if chunked else 1
        assert of_frozen.count <= learnt.count - chunks, (of_frozen.count, learnt.count)
    nothing = linear_cross_entropy(hidden[:0], weight, targets[:0])
    assert nothing == 0 and not any(g.any() for g in torch.autograd.grad(nothing, (hidden, weight)))


def check_parts_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the vocabulary shards of three ranks, of which the last is empty."""
    hidden, weight, targets, _ = made(torch.float32)
    parts = weight.split([70, 40, 0])
    starts = [0, 70, 110]
    statistics = [
        triton_head.row_statistics(hidden.detach() @ part.detach().T, targets, start, 0.7)
        for part, start in zip(parts, starts)
    ]
    largest = torch.stack([each[0] for each in statistics]).amax(0)

    def all_reduce(x, tp, operation="sum"):
        if operation == "max":
            return largest
        scaled = [
            torch.stack((each[1] * (f := (each[0] - largest).exp()), each[2] * f, each[3])) for each in statistics
        ]
        assert any(torch.equal(x, each) for each in scaled)
        return sum(scaled)

    monkeypatch.setattr(fused_head, "all_reduce", all_reduce)
    monkeypatch.setattr(fused_head, "size_of", lambda tp: 3)
    wanted = oracle(hidden, weight, targets, 0.7)
    wanted_gradient = torch.autograd.grad(sum(x.sum() for x in wanted), weight)[0]
    for part, start, gradient in zip(parts, starts, wanted_gradient.split([70, 40, 0])):
        part = part.detach().requires_grad_()
        found = fused_head.FusedLogprobs.apply(hidden.detach(), part, targets, start, None, 0.7, 1000)
        for ours, theirs in zip(found, wanted):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(sum(x.sum() for x in found), part)[0], gradient)


def check_all() -> None:
    triton_head.BLOCK = 64
    vocab_parallel.fused_head = lambda device_type: fused_head  # for the CPU too
    for dtype, chunked in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        with pytest.MonkeyPatch.context() as patch:
            check_against_autograd(dtype, chunked, patch)
    with pytest.MonkeyPatch.context() as patch:
        check_parts_of_the_vocabulary(patch)
