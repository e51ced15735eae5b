"""What a GPU has, NVIDIA's or AMD's, and whether Triton works on it."""

import importlib.util
import os
import sys
from functools import cache

import torch


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device, tried once. It comes with torch's builds for GPUs, but for some
    platforms; where it does not work, that is said, on stderr, and all else goes on."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    from models.triton_probe import fault_on

    fault = fault_on(device)
    if fault is not None and os.environ.get("RANK", "0") == "0":
        print(f"Triton does not work here, so its kernels and torch.compile are not used: {fault}", file=sys.stderr)
    return fault is None


def has_bf16_cores(device: torch.device) -> bool:
    """Whether a GPU multiplies bf16 by itself: AMD's, and NVIDIA's from compute capability 8.0 (A100) on."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
