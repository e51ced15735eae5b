"""training/losses.py against torch's cross_entropy over transformers' logits: values and every gradient."""

import pytest
import torch
from torch.nn import functional as F

from models import tp
from training.losses import token_cross_entropy


def make_batch(rows=3, length=9, width=16, vocab=37, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    labels = torch.randint(vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    labels[1] = -100
    return hidden, weight, labels


def reference(hidden, weight, labels):
    """Summed cross entropy of the shifted labels, all logits at once, in fp32."""
    logits = hidden.float() @ weight.float().T
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)


def test_equals_transformers_loss_and_gradients(folder, hf_model):
    """Catches labels not shifted or shifted twice, masked tokens counted, and a gradient that does not reach the
    network below the head or the head itself."""
    input_ids = torch.randint(3, 384, (3, 11), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[0, :5] = labels[2, 7:] = -100
    hf_model.zero_grad()
    expected = hf_model(input_ids=input_ids, labels=labels).loss  # transformers shifts by itself, and takes the mean
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in hf_model.named_parameters()}
    hf_model.zero_grad()
    loss = token_cross_entropy(hf_model.model(input_ids)[0], hf_model.lm_head.weight, labels)
    num_targets = (labels[:, 1:] != -100).sum()
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss / num_targets, expected, rtol=1e-6, atol=1e-6)
    (loss / num_targets).backward()
    for name, p in hf_model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    hf_model.zero_grad()


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_chunks(chunk, monkeypatch):
    """Catches a chunk lost, counted twice, or written to the wrong place; and a scale of the output's gradient lost."""
    hidden, weight, labels = make_batch()
    wanted = reference(hidden, weight, labels)
    grads = torch.autograd.grad(wanted * 0.3, (hidden, weight))
    monkeypatch.setattr(tp, "CHUNK_TOKENS", chunk)
    loss = token_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss * 0.3, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_tied_weights():
    """Catches the gradient of one of the two uses of a tied embedding replaced by the other's."""
    _, weight, labels = make_batch()
    input_ids = labels.clamp(min=0)
    grads = []
    for loss_of in (token_cross_entropy, reference):
        loss = loss_of(F.embedding(input_ids, weight).tanh(), weight, labels)
        grads += torch.autograd.grad(loss, weight)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1, 6])
def test_nothing_to_learn(length):
    """Catches NaN, or a missing gradient, for a batch without labels (its ranks must still join the collectives)."""
    hidden, weight, labels = make_batch(length=length)
    loss = token_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_the_first_token_is_never_predicted():
    """Catches the first label taken for a target, whose prediction no hidden state stands for."""
    hidden, weight, labels = make_batch()
    labels[:] = -100
    labels[:, 0] = 5
    assert token_cross_entropy(hidden, weight, labels).item() == 0


def test_bfloat16():
    """Catches the reduction done in bf16, or gradients in another dtype than their tensors'."""
    hidden, weight, labels = make_batch(rows=40, length=40, dtype=torch.bfloat16)
    wanted = reference(hidden, weight, labels)
    grads = torch.autograd.grad(wanted, (hidden, weight))
    loss = token_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    # rounding of single logits (relative 2^-9 of about 10) averages out over a thousand tokens; a bf16 sum would not
    assert abs(loss - wanted) / wanted < 5e-4
    for ours, theirs in zip((hidden.grad, weight.grad), grads, strict=True):
        assert (ours.float() - theirs.float()).norm() / theirs.float().norm() < 0.02


def test_without_gradients(monkeypatch):
    """Catches the evaluation paying for gradients that nobody asked for, and its value differing."""
    hidden, weight, labels = make_batch()
    wanted = token_cross_entropy(hidden, weight, labels)
    assert wanted.requires_grad

    def no_gradients(*_):
        raise AssertionError("the softmax's gradient was computed")

    monkeypatch.setattr(torch.Tensor, "scatter_add_", no_gradients)
    with torch.no_grad():
        loss = token_cross_entropy(hidden, weight, labels)
    assert loss == wanted.detach() and not loss.requires_grad
    frozen = token_cross_entropy(hidden.detach(), weight.detach(), labels)
    assert frozen == wanted.detach() and not frozen.requires_grad


def test_extreme_logits():
    """Catches an overflow in the softmax: exp(1000) is inf."""
    hidden = torch.tensor([[[1000.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    loss = token_cross_entropy(hidden, weight, torch.tensor([[0, 1]]))
    loss.backward()
    assert loss.item() == 1000 and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
