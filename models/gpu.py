"""Peak rates and features of NVIDIA's and AMD's GPUs, what MFU needs beside them, and which compilers work."""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Sequence
from functools import cache

import torch

# Peak dense bf16 rate (FLOP/s) and memory bandwidth (bytes/s) from the vendors' datasheets, by words of the device's
# name. Other devices print no MFU or MBU. An MI250X is two devices, each with half of the datasheet's values.
PEAKS = {
    "H200 NVL": (835e12, 4.8e12),
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4?-80GB": (312e12, 2.04e12),
    "A100 80GB PCIe": (312e12, 1.94e12),
    "A100": (312e12, 1.56e12),
    "MI300X": (1307e12, 5.3e12),
    "MI250X": (191.5e12, 1.64e12),
    "L40S": (362e12, 0.864e12),
    "RTX 4090": (165e12, 1.01e12),
    "RTX 3090": (71e12, 0.936e12),
}


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device, tried once. Triton comes with torch's GPU builds on most platforms;
    where it does not work, a warning on stderr says so, and the scripts run without it."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        from models.triton_probe import fault_on

        fault = fault_on(device)
    except Exception as error:  # of the import, the driver, the compiler, an assertion: callers can do without Triton
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if fault is not None and os.environ.get("RANK", "0") == "0":
        print(f"Triton does not work here, so its kernels and torch.compile are not used: {fault}", file=sys.stderr)
    return fault is None


def compiles_for_cpu() -> bool:
    """Whether torch.compile finds its compiler for CPUs."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def has_bf16_cores(device: torch.device) -> bool:
    """Whether a GPU multiplies bf16 in hardware: AMD's, and NVIDIA's from compute capability 8.0 (A100) on."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def peaks(device: torch.device) -> tuple[float, float] | None:
    """Returns the peak (FLOP/s in bf16, bytes/s) of a known GPU, else None."""
    if device.type != "cuda":
        return None
    # cards of their own, and slices of one
    name, other = torch.cuda.get_device_name(device), r"(?! (Ti|SUPER|D|Laptop)\b)(?!.*\bMIG\b)"
    return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b{other}", name)), None)


def mean_length(lengths: Sequence[int]) -> float:
    """Returns the sequence length of the average token, to which attention's FLOPs per token are proportional."""
    return sum(n * n for n in lengths) / sum(lengths)
