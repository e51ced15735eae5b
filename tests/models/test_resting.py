"""models/resting.py: an engine that has released its memory draws the same afterwards."""

import pytest
import torch

from models.decode import copy_for_inference
from models.generation import Engine, Request
from models.graphs import StepRunner
from models.model import Transformer
from models.resting import resting
from models.sampling import SamplingParams
from tests.models.test_packing import CONFIG
from tests.stand_ins import Graph


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("compiled", [False, True], ids=["bags", "pages"])
def test_resting(level, compiled, monkeypatch):
    """Catches memory that is kept, a released weight that no refresh writes (RoPE's frequencies, say), a prefix found
    in a released cache, a CUDA graph with old addresses, and a cache that is not as it was when new; and after an error
    memory that is taken again, for which there may be no room: that would be the error which the user sees."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    policy = Transformer(CONFIG)
    policy.init_weights(torch.Generator().manual_seed(0))
    policy.reset_buffers("cpu")
    engine = Engine(
        copy_for_inference(policy, pack=False),
        SamplingParams(1.0),
        num_slots=2,
        max_seq_len=160,
        compile=compiled,  # which has the GPU's cache
    )
    rows = engine.rows
    if compiled:
        rows.runner = StepRunner(rows.step, 2, [rows.tokens, rows.positions, rows.remaining, rows.active], Graph)
    ids = [(7 * i) % 40 + 3 for i in range(130)]
    requests = [Request(i, 0, ids[i:], 20) for i in (0, 0, 1, 2)]

    def drawn():
        return sorted((done.request.idx, done.token_ids) for done in engine.generate(requests))

    wanted, held = drawn(), [*rows.cache.tensors(), *engine.model.parameters(), engine.model.lm_head.weight]
    with resting(engine, level):
        for number, tensor in enumerate(held):
            is_cache = number < len(rows.cache.tensors())
            assert (tensor.untyped_storage().nbytes() == 0) == (level >= (1 if is_cache else 2))
    assert not compiled or bool(rows.runner.graphs) == (level == 0)  # they hold addresses
    if level == 2:
        for parameter in engine.model.parameters():
            parameter.data.fill_(torch.nan)
    engine.refresh(policy)
    assert drawn() == wanted
    if level == 1:  # the weights are still there
        with resting(engine, level):
            pass
        assert drawn() == wanted
    with pytest.raises(KeyError), resting(engine, level):
        raise KeyError
    assert all((tensor.untyped_storage().nbytes() == 0) == (level >= 1) for tensor in rows.cache.tensors())
