"""scripts/benchmark_memory.py: the arithmetic of LoRA's memory beside a measured step."""

from pathlib import Path

import pytest
import torch

from models.common import Runtime
from models.compressed import linear_layers
from models.config import ModelConfig
from models.fsdp import ParallelArgs
from models.lora import Lora
from scripts.benchmark_memory import lora_memory, measure_memory

CONFIG = ModelConfig(1000, 256, 688, 4, 8, 4, 32, 4096)


def test_arithmetic_of_adapters():
    """Catches a frozen base that a single rank copies to use it, activations that are kept twice, and optimizer state
    of the base: the sum has none of these, and is within 5 % of what two steps allocate."""
    lora = Lora(8, 16.0, False, 0.0, frozenset(linear_layers(4)), None, {}, Path(), "", 0)
    measured = measure_memory(
        CONFIG, Runtime(torch.device("cpu"), torch.bfloat16, False), ParallelArgs(), (2, 64), lora
    )
    sizes = lora_memory(CONFIG, lora, dp=1, tp=1, tokens=128)
    assert sum(sizes.values()) == pytest.approx(measured, rel=0.05), sizes
