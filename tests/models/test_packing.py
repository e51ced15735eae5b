"""Rows packed to a budget of tokens: which rows share a forward, and that each gets the results it gets alone."""

import random
from itertools import pairwise

import pytest
import torch

from models import forward
from models.attention import document_attention
from models.batches import Split
from models.config import ModelConfig
from models.forward import forward_rows
from models.model import Transformer
from models.packing import best_fit, groups_of_ranks
from models.records import IGNORE_INDEX, Example
from training.rollouts import answer_logps, answer_values

CONFIG = ModelConfig(61, 48, 80, 2, 6, 2, 8, 64, 1e-5)
PADDED, PACKED = Split(9, None, 0), Split(9, None, 0, 100)


def made_sizes(seed):
    generator = random.Random(seed)
    return [generator.choice((1, 3, 17, generator.randint(16, 512), 700)) for _ in range(generator.randint(1, 60))]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_groups_of_ranks(num_ranks):
    """Catches a row lost or used twice, a group over the budget, or a longer row that is not alone; ranks with
    different numbers of groups (a collective would hang), ranks or neighbours with uneven work, and an order that is
    not a pure function of the sizes."""
    for seed in range(60):
        sizes = made_sizes(seed)
        ranks = groups_of_ranks(sizes, 600, num_ranks)
        assert ranks == groups_of_ranks(list(sizes), 600, num_ranks)
        assert len(ranks) == num_ranks and len({len(groups) for groups in ranks}) == 1
        groups = [group for turn in zip(*ranks) for group in turn]
        assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
        totals = [sum(sizes[i] for i in group) for group in groups]
        assert all(total <= 600 or len(group) == 1 for total, group in zip(totals, groups))
        fewest = len(best_fit(sizes, 600))
        assert fewest <= len(groups) < fewest + num_ranks and fewest <= -(-sum(sizes) // 600) * 2 + 1
        turns = [sorted(totals[i : i + num_ranks]) for i in range(0, len(totals), num_ranks)]
        assert all(later[-1] <= earlier[0] for earlier, later in pairwise(turns))  # similar groups at the same time
    sizes = [random.Random(seed).randint(16, 512) for seed in range(256)]
    work = [sum(sizes[i] for group in groups for i in group) for groups in groups_of_ranks(sizes, 4096, num_ranks)]
    assert max(work) < 1.02 * min(work)


def made_rows():
    """Ragged rows of one learnt token to eleven, with a prompt of one token and a row without labels."""
    generator = random.Random(1)
    rows = []
    for prompt, answer in ((3, 4), (1, 11), (6, 1), (2, 7), (4, 0)):
        ids = [generator.randint(3, 60) for _ in range(prompt + answer)]
        rows.append(Example(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
    return rows


def made_model(head, **parallel):
    model = Transformer(CONFIG, head=head, **parallel)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # attention that is far from uniform
    model.reset_buffers("cpu")
    return model


def gradients_of(model, outputs, weights):
    model.zero_grad()
    sum((output * weights[: len(output), : output.shape[1]]).sum() for output in outputs).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("compiled", [False, True], ids=["documents in turn", "mask"])
@pytest.mark.parametrize("head", ["lm", "score"])
def test_packed_equals_padded(head, compiled, monkeypatch):
    """Catches documents that attend to each other, positions that do not restart, a value given to another row or
    place, a first token predicted from the row before, and gradients with one of these faults: against padded rows,
    which are compared with each row alone."""
    model, rows, weights = made_model(head), made_rows(), torch.randn(5, 12)
    attention = lambda *args, **more: document_attention(*args, **{**more, "compiled": compiled})  # noqa: E731
    monkeypatch.setattr(forward, "document_attention", attention)

    def outputs(rows, split):
        if head == "lm":
            return answer_logps(model, rows, 12, split, 0.7, entropy=True)
        return (answer_values(model, rows, 12, split),)

    padded, packed = outputs(rows, PADDED), outputs(rows, PACKED)
    alone = [torch.cat(parts) for parts in zip(*(outputs([row], PACKED) for row in rows))]
    seen = []  # RoPE is relative, so positions that do not restart show in nothing but lost digits
    with model.register_forward_pre_hook(lambda module, args: seen.append(args[1])):
        hidden = forward_rows(model, rows, PACKED).hidden
    assert seen[0].tolist() == [[position for row in rows for position in range(len(row.input_ids))]]
    assert hidden.shape[:2] == seen[0].shape
    for ours, theirs, single in zip(packed, padded, alone):
        assert ours.shape == (5, 12) and not ours[4].any() and ours[1, :11].all() and not ours[1, 11]
        torch.testing.assert_close(theirs, single, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, single, rtol=1e-5, atol=1e-5)
    wanted, found = (gradients_of(model, each, weights) for each in (padded, packed))
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("split", [PADDED, PACKED], ids=["padded", "packed"])
def test_places_and_no_rows(split, multiple, monkeypatch):
    """Catches hidden states of another token, labels of another row, and a forward without rows that leaves a parameter
    out of the graph, so that its rank would miss the others' all-reduce; also with rows padded as on a GPU."""
    monkeypatch.setattr(forward, "length_multiple", lambda *shape: multiple)
    model, critic, rows = made_model("lm"), made_model("score"), made_rows()
    places = [(i, position) for i, row in enumerate(rows) for position in (len(row.input_ids) - 1, 0)]
    states = forward_rows(model, rows, split)
    assert states.hidden.shape[1] % multiple == 0
    single = [forward_rows(model, [rows[i]], PADDED).hidden[0, position] for i, position in places]
    torch.testing.assert_close(states.at(places), torch.stack(single), rtol=1e-5, atol=1e-5)
    assert [labels[: len(row.labels)] for labels, row in zip(states.row_labels.tolist(), rows)] == [
        row.labels for row in rows
    ]
    logps, entropies = answer_logps(model, [], 12, split, 0.7, entropy=True)
    values = answer_values(critic, [], 12, split)
    scores = critic.score(forward_rows(critic, [], split).at([]))
    assert logps.shape == entropies.shape == values.shape == (0, 12) and scores.shape == (0,)
    (logps.sum() + entropies.sum() + values.sum() + scores.sum()).backward()
    for parameter in (*model.parameters(), *critic.parameters()):
        assert parameter.grad is not None and not parameter.grad.any()
