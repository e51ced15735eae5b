"""Runs a script for several settings in the ranks of one torchrun launch; for generate.py, also holds sampling from
parts of the vocabulary against sampling from the whole.

    torchrun --nproc-per-node 2 tests/inference/parallel_worker.py inference.generate JOBS.json [shared]

JOBS.json: a list of argument lists. shared: the last of them sums as GPUs that share memory do.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist

from models import tp as tensor_parallel
from models.fsdp import init_mesh
from models.generation import SamplingParams, sample
from models.noise import column_hashes, noise_key
from models.tp import chunk_range
from training.common import end_process

torch.set_num_threads(1)
FILTERS = [{}, {"top_k": 1}, {"top_k": 5}, {"top_k": 40, "top_p": 0.8}, {"top_p": 0.6}, {"top_p": 0.0}, {"top_k": 9999}]
SETTINGS = [SamplingParams(0.0), *(SamplingParams(t, **filters) for t in (0.7, 1.0) for filters in FILTERS)]


def check_sampling() -> None:
    """Every rank draws what one process draws from the whole logits, also where many are equal, where the ranks do not
    divide the vocabulary, and where some have nothing of it."""
    tp = init_mesh(torch.device("cpu"), int(os.environ["WORLD_SIZE"]))["tp"]
    generator = torch.Generator().manual_seed(0)
    keys = torch.tensor([noise_key(0, idx, 0) for idx in range(64)])
    positions = torch.arange(64)
    for V in (5, 385, 3000):
        smooth = 3 * torch.randn(64, V, generator=generator)
        for logits in (smooth, smooth.round(), smooth.bfloat16()):
            start, end = chunk_range(V, tp.get_local_rank(), tp.size())
            for params in SETTINGS:
                wanted, wanted_logprobs = sample(logits, keys, positions, column_hashes(V), params)
                tokens, logprobs = sample(logits[:, start:end], keys, positions, column_hashes(V), params, tp)
                assert torch.equal(tokens, wanted), (V, logits.dtype, params)
                torch.testing.assert_close(logprobs, wanted_logprobs, atol=1e-5, rtol=1e-5)


def share_memory_on_cpu() -> list[int]:
    """Gives CPUs memory for quick sums of up to 700 numbers, and the operator, over gloo, that only GPUs have. Returns
    the list to which each such sum adds its size."""
    sizes = []

    def sum_copy(memory: torch.Tensor, x: torch.Tensor, operation: str, group_name: str) -> torch.Tensor:
        assert memory.shape == x.shape and memory.data_ptr() == shared.memory.data_ptr() and operation == "sum"
        memory.copy_(x)
        dist.all_reduce(memory, group=dist.distributed_c10d._resolve_process_group(group_name))
        sizes.append(x.numel())
        return memory.clone()

    def share(tp, device, dtype) -> tensor_parallel.SharedMemory:
        nonlocal shared
        shared = tensor_parallel.SharedMemory(torch.full((700,), torch.nan, dtype=dtype), tp.get_group().group_name)
        return shared

    shared, share_memory_on_cpu.library = None, torch.library.Library("symm_mem", "IMPL", "CPU")
    share_memory_on_cpu.library.impl("one_shot_all_reduce_copy", sum_copy)
    tensor_parallel.share_memory = share
    return sizes


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1])
    *jobs, last = json.loads(Path(sys.argv[2]).read_text())
    run = lambda arguments: script.main(**vars(script.parser().parse_args(arguments)))  # noqa: E731
    for job in jobs:
        run(job)
    sizes = share_memory_on_cpu() if "shared" in sys.argv else None
    run(last)
    assert sizes is None or (len(sizes) > 100 and max(sizes) <= 700)
    if sys.argv[1] == "inference.generate":
        check_sampling()
    end_process(0)
