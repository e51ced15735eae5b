"""models/memory.py: how many rows and pages fit into memory."""

import os
from types import SimpleNamespace

import pytest
import torch

from models import memory
from models.checkpoint import load_model
from models.decode import to_inference
from models.generation import Engine
from models.memory import page_bytes, plan_cache
from models.pages import pages_for
from models.sampling import SamplingParams


def test_rows_and_pages_fit(folder, monkeypatch):
    """Catches wrong bytes per page, more rows than the pages can serve or than there are requests, a cache that exceeds
    memory or cannot hold its longest sequence, memory reserved for more prompt tokens than rows can have, a model
    refused because its whole context, which no request must have, would take too much memory to gather, and another
    limit of rows on a GPU than the 256 of generate.py's help."""
    model = to_inference(load_model(folder), pack=False)
    of_page = page_bytes(model)
    for dtype in (torch.bfloat16, torch.float32):
        for compile in (False, True):
            engine = Engine(model.to(dtype), SamplingParams(), num_slots=1, max_seq_len=64, compile=compile)
            assert page_bytes(model, compile=compile) == 64 * engine.rows.cache.bytes_per_token
    config = model.config
    of_block = 4 * 128 * (8 * config.hidden_size + 4 * config.intermediate_size) + 6 * 4 * 16 * config.vocab_size
    of_token = of_page // 64 // config.num_hidden_layers  # keys and values, and their repetition for all heads
    of_token *= 1 + config.num_attention_heads // config.num_key_value_heads

    def plan(num_pages, num_slots=None, num_requests=100, **lengths):
        lengths = {"usual_tokens": 100, "known_tokens": 200, "most_tokens": 0, **lengths}
        longest = max(lengths["known_tokens"], min(lengths["most_tokens"], num_pages * 64))
        contexts = min(max(16 * 128, longest), longest * num_requests)
        free = 2 * (num_pages * of_page + of_block + of_token * contexts) + 2
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        found = plan_cache(model, num_slots=num_slots, num_requests=num_requests, prefill_tokens=128, **lengths)
        return found.num_slots, found.num_pages, found.max_seq_len

    assert plan(1000) == (16, 16 * pages_for(200), 200)  # all that 16 rows may need
    assert plan(20) == (10, 20, 200)  # two pages each as a rule, four at most
    assert plan(1000, num_requests=1) == (1, 4, 200)
    assert plan(1000, most_tokens=5000) == (16, pages_for(5000), 5000)
    assert plan(50, most_tokens=5000) == (16, 50, 50 * 64)
    assert plan(50, most_tokens=10**6) == (16, 50, 50 * 64)
    assert plan(5, most_tokens=10**6) == (2, 5, 5 * 64)
    assert plan(50, known_tokens=3000) == (16, 50, 3000)
    assert plan(4, num_requests=1) == (1, 4, 200)
    assert plan(1000, 16, most_tokens=0) == plan(1000)
    with pytest.raises(ValueError, match="does not fit into"):
        plan(3)
    few = {"usual_tokens": 4, "known_tokens": 8, "most_tokens": 0, "num_slots": None, "num_requests": 1}
    assert plan_cache(model, prefill_tokens=10**12, **few)[:3] == plan_cache(model, prefill_tokens=8, **few)[:3]
    with pytest.raises(ValueError, match=r"beside \d.*--prefill_tokens"):
        plan_cache(model, prefill_tokens=10**12, **{**few, "known_tokens": 10**12})
    on_gpu = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))
    on_gpu = SimpleNamespace(embed_tokens=on_gpu, config=config, dtype=model.dtype, parallel=model.parallel)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**12)
    assert plan_cache(on_gpu, prefill_tokens=8, **{**few, "num_requests": 1000}).num_slots == 256
    monkeypatch.undo()
    monkeypatch.setattr(memory, "available_memory", lambda: 10**9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of the host's memory, each rank plans a part
    assert memory.free_memory(torch.device("cpu")) == 10**9 // 4
    monkeypatch.undo()
    assert 2**20 < memory.free_memory(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
