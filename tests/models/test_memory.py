"""Rows and pages that fit into memory."""

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
    """Catches a page whose bytes are counted wrongly, rows that are more than the pages can feed or than there are
    requests, a cache beyond memory, one that cannot hold its longest sequence, memory for more tokens of prompts than
    rows can have, and a model refused since its whole context, which nobody has to have, would be much to gather."""
    model = to_inference(load_model(folder), pack=False)
    of_page = page_bytes(model)
    cache = Engine(model, SamplingParams(), num_slots=1, max_seq_len=64).rows.cache
    assert of_page == 64 * cache.bytes_per_token
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
    assert memory.free_memory(torch.device("cpu")) > 2**20


def test_memory_of_a_container(tmp_path, monkeypatch):
    """Catches slots planned by the memory of the host where a container or a job may have less, and is killed for more:
    both versions of control groups, the group itself or one above it, a path that only the host knows."""

    def group(path: str, version: int, limit: int | str, used: int, idle: int) -> None:
        folder = tmp_path / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for name, value in zip(names, (limit, used)):
            (folder / name).write_text(f"{value}\n")
        name = "inactive_file" if version == 2 else "total_inactive_file"
        (folder / "memory.stat").write_text(f"anon 7\nactive_file 5\n{name} {idle}\n")

    def left(groups: str) -> list[int]:
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        return memory.limited_memory(tmp_path)

    assert memory.limited_memory(tmp_path) == []  # another system
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text("inactive_file 9\n")  # the host's own group has no limit
    group("slurm/job 1/step", 2, "max", 100, 10)
    group("slurm/job 1", 2, 1000, 300, 50)
    assert left("0::/slurm/job 1/step\n") == [750]
    assert left("0::/elsewhere\n") == left("0::/\n") == []
    group("slurm/job 1/step", 2, 400, 500, 10)
    assert left("0::/slurm/job 1/step\n") == [0, 750]
    group("", 2, 600, 100, 0)  # within a container, whose group is all there is
    assert left("0::/\n") == left("0::/../elsewhere\n") == [500]
    group("memory/docker/abc", 1, 2000, 700, 100)
    group("memory", 1, 2**63 - 4096, 900, 0)
    version_1 = "9:cpu,cpuacct:/docker/abc\n4:hugetlb,memory:/docker/abc\n"
    assert left(version_1) == [1400, 2**63 - 4096 - 900]
    assert left(version_1.replace("abc", "of the host")) == [2**63 - 4096 - 900]
    free = memory.free_memory(torch.device("cpu"))
    monkeypatch.setattr(memory, "limited_memory", lambda: [free // 2, 3 * free])
    assert memory.free_memory(torch.device("cpu")) == free // 2
