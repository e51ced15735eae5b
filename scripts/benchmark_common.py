"""What the jobs of scripts/benchmark.py share: the shapes, the clock and the machine's ceilings."""

import statistics
from collections.abc import Callable

import torch

from models.model import PRESETS, ModelConfig
from training.common import Stopwatch

SIZES = {
    "23m": ModelConfig(4000, 512, 1376, 6, 8, 8, 64, 4096),
    "134m": ModelConfig(32000, 768, 2048, 12, 12, 12, 64, 4096),
    "1b": PRESETS["meta-llama/Llama-3.2-1B"],
    "7b": PRESETS["meta-llama/Llama-2-7b-chat-hf"],
    "8b": PRESETS["meta-llama/Llama-3.1-8B"],
}


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a call, after one that does not count."""
    function()
    watch, times = Stopwatch(device), []
    for _ in range(repeats):
        function()
        times.append(watch.lap())
    return statistics.median(times)


def ceilings(device: torch.device) -> tuple[float, float]:
    """(FLOP/s of a bf16 matrix product, bytes/s of a copy, read and written), measured."""
    size, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.randn(length, device=device)
    target = torch.empty_like(source)
    product = seconds_of(lambda: a @ b, device, 7)
    copy = seconds_of(lambda: target.copy_(source), device, 7)
    return 2 * size**3 / product, 2 * source.nbytes / copy
