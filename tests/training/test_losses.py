"""training/losses.py against torch's cross_entropy over transformers' logits, and against what TRL's trainers compute
(fixtures/losses.json): values and gradients."""

import json
import math
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

from models import vocab_parallel
from models.batches import collate
from models.records import Example
from models.reward import Pair, pair_rows
from tests.training.fixtures import make_loss_fixtures as made
from training.losses import (
    DPO_LOSSES,
    REFERENCE_FREE,
    SMOOTHED,
    DpoLossArgs,
    auc,
    calibration_error,
    dpo_loss,
    pairwise_loss,
    pointwise_loss,
    sequence_logps,
    token_cross_entropy,
    token_logps,
)


def make_batch(rows=3, length=9, width=16, vocab=37, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    labels = torch.randint(vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    labels[1] = -100
    return hidden, weight, labels


def reference(hidden, weight, labels):
    """Returns the summed cross entropy of the shifted labels, from all logits at once, in fp32."""
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
    """Catches a chunk lost, counted twice or written to the wrong place, and a scale of the output's gradient lost."""
    hidden, weight, labels = make_batch()
    wanted = reference(hidden, weight, labels)
    grads = torch.autograd.grad(wanted * 0.3, (hidden, weight))
    monkeypatch.setattr(vocab_parallel, "CHUNK_TOKENS", chunk)
    loss = token_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss * 0.3, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_tied_weights():
    """Catches the gradient of one use of a tied embedding overwritten by the other's."""
    _, weight, labels = make_batch()
    input_ids = labels.clamp(min=0)
    grads = []
    for loss_of in (token_cross_entropy, reference):
        loss = loss_of(F.embedding(input_ids, weight).tanh(), weight, labels)
        grads += torch.autograd.grad(loss, weight)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1, 6])
def test_nothing_to_learn(length):
    """Catches NaN, or a missing gradient, for a batch without labels (its rank must still join the collectives)."""
    hidden, weight, labels = make_batch(length=length)
    loss = token_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_the_first_token_is_never_predicted():
    """Catches the first label used as a target although no hidden state predicts it."""
    hidden, weight, labels = make_batch()
    labels[:] = -100
    labels[:, 0] = 5
    assert token_cross_entropy(hidden, weight, labels).item() == 0


def test_bfloat16():
    """Catches a reduction in bf16, or gradients whose dtype is not their tensor's."""
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
    """Catches gradients computed in evaluation, and a loss that differs without them."""
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


# ------------------------------------------------------------------------------------ against TRL

FIXTURES = json.loads(made.FILE.read_text())
CLOSE = {"rtol": 1e-6, "atol": 5e-6}  # CPUs differ in the order of sums; an ulp of log-probs near -30 is 2e-6


class PairBatch(NamedTuple):
    input_ids: torch.Tensor  # [2B, T]: chosen, then rejected
    labels: torch.Tensor
    last: torch.Tensor  # [2B], the position of each row's last token
    margin: torch.Tensor  # [B]


def fixture_batch():
    """Returns the fixture's pairs as our own batch: four pairs of ragged rows in one forward pass."""

    def row(prompt_ids, completion_ids):
        return Example(prompt_ids + completion_ids, [-100] * len(prompt_ids) + completion_ids)

    pairs = [
        Pair(len(p["prompt_ids"]), row(p["prompt_ids"], p["chosen_ids"]), row(p["prompt_ids"], p["rejected_ids"]), m)
        for p, m in zip(FIXTURES["pairs"], FIXTURES["margins"], strict=True)
    ]
    rows = pair_rows(pairs)
    batch, last = collate(rows, made.PAD, torch.device("cpu")), [len(row.input_ids) - 1 for row in rows]
    return PairBatch(batch.input_ids, batch.labels, torch.tensor(last), torch.tensor(FIXTURES["margins"]))


def model_logps(model, batch):
    hidden = model.model(batch.input_ids)[0]
    return sequence_logps(token_logps(hidden, model.lm_head.weight, batch.labels)[0], batch.labels)


def fixture_loss(case, batch, policy):
    sums, lengths = model_logps(policy, batch)
    with torch.no_grad():
        reference, _ = model_logps(made.tiny_model(1.0), batch)
    options = {key: case[key] for key in ("beta", "label_smoothing", "simpo_gamma", "rpo_alpha") if key in case}
    reference = None if case["kind"] in REFERENCE_FREE else reference.view(2, -1)
    args = DpoLossArgs(loss=case["kind"], **options)
    return dpo_loss(args, sums.view(2, -1), reference, lengths.view(2, -1))


def check_gradient(model, weight, case):
    torch.testing.assert_close(weight.grad.flatten(), torch.tensor(case["grad"]), **CLOSE)
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert norm == pytest.approx(case["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("case", FIXTURES["dpo"], ids=lambda case: "-".join(map(str, list(case.values())[:3])))
def test_dpo_equals_trl(case):
    """Catches any deviation from TRL's losses, rewards and gradients: a sign, a scale, a term, a length without its
    EOS, the padding of ragged rows."""
    policy = made.tiny_model(0.0)
    result = fixture_loss(case, fixture_batch(), policy)
    for name, value in result._asdict().items():
        torch.testing.assert_close(value, torch.tensor(case[name]), **CLOSE, msg=lambda text, n=name: f"{n}: {text}")
    assert not result.chosen_rewards.requires_grad and not result.rejected_rewards.requires_grad
    result.losses.mean().backward()
    check_gradient(policy, policy.lm_head.weight, case)


def drop_eos(case, batch):
    labels = batch.labels.clone()
    labels[torch.arange(len(labels)), batch.last] = -100
    return case, batch._replace(labels=labels)


def shift_labels(case, batch):
    return case, batch._replace(labels=batch.labels.roll(1, dims=1))


def shift_input(case, batch):
    return case, batch._replace(input_ids=batch.input_ids.roll(1, dims=1))


def swap_sides(case, batch):
    halves = [torch.cat(x.chunk(2)[::-1]) for x in (batch.input_ids, batch.labels, batch.last)]
    return case, batch._replace(input_ids=halves[0], labels=halves[1], last=halves[2])


def learn_the_prompt(case, batch):
    learnt = torch.arange(batch.labels.shape[1]) <= batch.last[:, None]
    return case, batch._replace(labels=torch.where(learnt, batch.input_ids, -100))


def no_smoothing(case, batch):
    return {key: value for key, value in case.items() if key != "label_smoothing"}, batch


def other_beta(case, batch):
    return case | {"beta": 1.1 * case["beta"]}, batch


@pytest.mark.parametrize(
    "fault", [drop_eos, shift_labels, shift_input, swap_sides, learn_the_prompt, no_smoothing, other_beta]
)
def test_fixtures_show_faults(fault):
    """Catches fixtures too weak to show a mistake: with each of these faults, test_dpo_equals_trl must fail by far."""
    for case in FIXTURES["dpo"]:
        if fault is no_smoothing and "label_smoothing" not in case:
            continue
        if fault is learn_the_prompt and case["kind"] not in ("ipo_avg", "simpo", "rpo"):
            continue  # without lengths the prompt's log-prob is the same on both sides and cancels
        losses = fixture_loss(*fault(case, fixture_batch()), made.tiny_model(0.0)).losses
        assert (losses - torch.tensor(case["losses"])).abs().max() > 5e-3, case["kind"]


@pytest.mark.parametrize("case", FIXTURES["reward"], ids=lambda case: "-".join(list(case)[:-3]) or "plain")
def test_pairwise_equals_trl(case):
    """Catches chosen and rejected swapped, a margin added instead of subtracted, a wrong scale of the centring term,
    and a score read from padding or from the token before the last."""
    model, batch = made.tiny_reward_model(), fixture_batch()
    scores = model.score(model.model(batch.input_ids).last_hidden_state)[..., 0]
    scores = scores[torch.arange(len(scores)), batch.last]
    margin = batch.margin if "margin" in case else torch.zeros(())
    losses = pairwise_loss(*scores.chunk(2), margin, case.get("center_coef", 0.0))
    torch.testing.assert_close(losses, torch.tensor(case["losses"]), **CLOSE)
    losses.mean().backward()
    check_gradient(model, model.score.weight, case)
    swapped = pairwise_loss(*scores.chunk(2)[::-1], margin, case.get("center_coef", 0.0))
    assert (swapped - torch.tensor(case["losses"])).abs().max() > 0.05


def test_pointwise_equals_transformers():
    """Catches probabilities taken for logits, support for hard labels only, and a mean instead of one loss per row."""
    model, batch = made.tiny_reward_model(), fixture_batch()
    model.config.problem_type = "multi_label_classification"  # transformers' BCE with logits
    labels = torch.tensor([0.0, 1.0, 0.3, 0.9, 1.0, 0.0, 0.5, 0.25])
    output = model(input_ids=batch.input_ids, labels=labels[:, None])
    losses = pointwise_loss(output.logits[:, 0], labels)
    assert losses.shape == (8,)
    torch.testing.assert_close(losses.mean(), output.loss, **CLOSE)
    scores = torch.linspace(-6, 6, 8).requires_grad_()
    pointwise_loss(scores, labels).sum().backward()
    torch.testing.assert_close(scores.grad, scores.detach().sigmoid() - labels, **CLOSE)


# ------------------------------------------------------------------------------- their properties


def random_logps(rows=64, scale=40.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (2, rows), generator=generator)
    logps = -torch.rand(2, rows, generator=generator) * scale
    return logps, lengths


def test_first_loss():
    """Catches a reference that is not subtracted exactly: if it is the policy itself, log-ratios must be 0."""
    logps, lengths = random_logps(scale=900.0)
    first = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 6.25, "ipo_avg": 6.25}
    for kind, value in first.items():
        for smoothing in (0.0, 0.3)[: 1 + (kind in SMOOTHED)]:
            result = dpo_loss(DpoLossArgs(loss=kind, beta=0.2, label_smoothing=smoothing), logps, logps, lengths)
            assert (result.losses - value).abs().max() <= 1e-6
            assert not result.chosen_rewards.any() and not result.rejected_rewards.any()
    rpo = dpo_loss(DpoLossArgs(loss="rpo", beta=0.2, rpo_alpha=0.5), logps, logps, lengths)
    torch.testing.assert_close(rpo.losses, math.log(2) - 0.5 * logps[0] / lengths[0], **CLOSE)


@pytest.mark.parametrize("kind", DPO_LOSSES)
def test_dpo_numbers(kind):
    """Catches overflow on log-probs of long answers, NaN for an empty completion, arithmetic in bf16, and pairs that
    affect each other's loss."""
    logps, lengths = random_logps(scale=1e5)
    lengths[:, 0] = logps[:, 0] = 0
    reference = logps.flip(0, 1)
    logps.requires_grad_()
    args = DpoLossArgs(loss=kind, beta=0.3, label_smoothing=0.1 * (kind in SMOOTHED))
    losses = dpo_loss(args, logps, reference, lengths).losses
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    assert losses.shape == (64,) and losses.isfinite().all() and grad.isfinite().all()
    one = dpo_loss(args, *(x[:, 5:6] for x in (logps, reference, lengths)))
    assert torch.equal(one.losses, losses[5:6])
    low = [x.detach().bfloat16() for x in (logps, reference)]
    result = dpo_loss(args, *low, lengths)
    assert torch.equal(result.losses, dpo_loss(args, *(x.float() for x in low), lengths).losses)
    assert {x.dtype for x in result} == {torch.float32}


def test_sequence_logps():
    """Catches a row without a label that shifts the others, the first label counted, and a lost gradient."""
    labels = torch.tensor([[-100, 5, 6, -100], [-100] * 4, [7, -100, -100, 8]])
    logps = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    sums, lengths = sequence_logps(logps, labels)
    assert sums.tolist() == [-3.0, 0.0, -4.0] and lengths.tolist() == [2, 0, 1]
    (sums * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert logps.grad.tolist() == [1.0, 1.0, 3.0]
    hidden, weight, labels = make_batch()
    sums, lengths = sequence_logps(token_logps(hidden, weight, labels)[0], labels)
    torch.testing.assert_close(-sums.sum(), reference(hidden, weight, labels), rtol=1e-6, atol=1e-6)
    assert lengths.tolist() == (labels[:, 1:] != -100).sum(dim=1).tolist() and not sums[1]


def test_no_pairs():
    """Catches a rank without pairs whose backward pass misses the collectives (no graph), or gives NaN."""
    hidden, weight, _ = make_batch(rows=2, length=2)
    batch = collate([], 0, torch.device("cpu"))
    sums, lengths = sequence_logps(token_logps(hidden[:1], weight, batch.labels)[0], batch.labels[:0])
    for kind in DPO_LOSSES:
        logps, counts = sums.view(2, 0), lengths.view(2, 0)
        dpo_loss(DpoLossArgs(loss=kind), logps, logps.detach(), counts).losses.sum().backward(retain_graph=True)
    assert not hidden.grad.any() and not weight.grad.any()


# ----------------------------------------------------------------------------------------- metrics


def test_auc():
    """Catches ties counted as right or as wrong (a constant score must give 0.5), soft labels, and one class only."""
    generator = torch.Generator().manual_seed(0)
    for size in (2, 5, 40, 300):
        scores = torch.randint(-4, 5, (size,), generator=generator) / 4
        labels = (torch.rand(size, generator=generator) < 0.4).float()
        labels[:2] = torch.tensor([0.2, 0.7])
        right, wrong = scores[labels >= 0.5], scores[labels < 0.5]
        wins = (right[:, None] > wrong).float() + 0.5 * (right[:, None] == wrong).float()
        assert auc(scores, labels) == pytest.approx(wins.mean().item(), abs=1e-6)
    assert auc(torch.zeros(10), torch.arange(10) % 2) == 0.5
    assert auc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1])) == 1.0
    assert math.isnan(auc(torch.zeros(3), torch.ones(3)))


def test_calibration_error():
    """Catches signed gaps that cancel between intervals, unweighted intervals, and a probability of 1 out of range."""
    probs = torch.tensor([0.05, 0.15, 0.15, 0.95, 1.0])
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    assert calibration_error(probs, labels) == pytest.approx((0.95 + 0.3 + 0.05) / 5)
    assert calibration_error(probs, probs) == 0
    draw = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    outcome = (torch.rand(200_000, generator=torch.Generator().manual_seed(1)) < draw).float()
    assert calibration_error(draw, outcome) < 0.01 < 0.2 < calibration_error(1 - draw, outcome)
