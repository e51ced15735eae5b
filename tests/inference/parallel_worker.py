"""Runs a script for several settings in the ranks of one torchrun launch; for generate.py, also holds sampling from
parts of the vocabulary against sampling from the whole.

    torchrun --nproc-per-node 2 tests/inference/parallel_worker.py inference.generate JOBS.json

JOBS.json: a list of argument lists.
"""

import importlib
import json
import os
import sys
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from models.common import end_process, parse_args
from models.fsdp import init_mesh
from models.generation import SamplingParams, sample
from models.noise import column_hashes, noise_key
from models.tp import chunk_range

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


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1])
    for job in json.loads(Path(sys.argv[2]).read_text()):
        script.main(parse_args(typing.get_type_hints(script.main)["args"], job))
    if sys.argv[1] == "inference.generate":
        check_sampling()
    end_process(0)
