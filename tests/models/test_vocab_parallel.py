"""models/vocab_parallel.py in one process: log-probs and entropies in chunks, against torch's own. The tests of the
training scripts compare several ranks with one process."""

import pytest
import torch
import torch.nn.functional as F

from models import vocab_parallel


@pytest.mark.parametrize("num_tokens", [0, 1, 20])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy", [False, True])
def test_logprobs_and_gradients(num_tokens, temperature, entropy, monkeypatch):
    """Catches a chunk lost or computed with another's numbers, a temperature missing in the gradient, an entropy of the
    wrong sign, and upstream gradients that are summed before they are used."""
    monkeypatch.setattr(vocab_parallel, "CHUNK_TOKENS", 7)
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 16, dtype=torch.float64).float().requires_grad_()
    weight, targets = torch.randn(50, 16).requires_grad_(), torch.randint(50, (num_tokens,))
    above = torch.randn(2, num_tokens)
    logprobs, entropies = vocab_parallel.linear_logprobs(
        hidden, weight, targets, temperature=temperature, entropy=entropy
    )
    found = torch.autograd.grad((logprobs * above[0]).sum() + (entropies * above[1]).sum(), (hidden, weight))

    whole = F.log_softmax(hidden @ weight.T / temperature, dim=-1)
    expected = whole.gather(1, targets[:, None])[:, 0]
    expected_entropies = -(whole.exp() * whole).sum(-1) if entropy else torch.zeros(num_tokens)
    total = (expected * above[0]).sum() + (expected_entropies * above[1]).sum()
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(total, (hidden, weight))):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_logprobs_in_bf16():
    """Catches a softmax taken in bf16: log-probs are those of the bf16 logits, in fp32 arithmetic; and logits returned
    in place of their gradient."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 16).bfloat16(), torch.randn(50, 16), torch.randint(50, (9,))
    tensors = hidden.requires_grad_(), weight.requires_grad_()
    logprobs, _ = vocab_parallel.linear_logprobs(hidden, weight, targets)
    expected = F.log_softmax((hidden @ weight.bfloat16().T).float(), dim=-1).gather(1, targets[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(-expected.sum(), tensors)
    for loss in (-logprobs.sum(), vocab_parallel.linear_cross_entropy(hidden, weight, targets)):
        torch.testing.assert_close(torch.autograd.grad(loss, tensors), wanted, atol=3e-2, rtol=3e-2)


def test_a_second_backward():
    """Catches gradients that a second backward scales once more, or a crash that does not say why."""
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = vocab_parallel.linear_cross_entropy(hidden, weight, torch.tensor([0, 4, 2]))
    torch.autograd.grad(loss, weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        torch.autograd.grad(loss, weight)
