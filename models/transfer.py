"""Copies between host and GPU without a host sync; on a CPU, the numbers are there already. A copy from pageable memory
would block the host until the GPU has done all work that was launched before."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def looks_on(device: torch.device) -> tuple[int, int]:
    """(device steps between two looks of the host at results, looks that are launched ahead): a CPU's results are there
    at once, and nothing runs beside it."""
    return (1, 0) if device.type == "cpu" else (4, 1)


def to_device(values: np.ndarray | Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the values on the device, by a non-blocking copy. An array on the CPU is not copied."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def index_on(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n], for index_select and index_copy_: indexing by a list would be a host sync."""
    return to_device(numbers, device, torch.int64)


class Download:
    """A non-blocking copy of device tensors to the host, with their values after all work launched before it."""

    def __init__(self, *tensors: Tensor):
        self.event = None
        if tensors[0].device.type == "cpu":
            self.numbers = [tensor.tolist() for tensor in tensors]
            return
        self.host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for host, tensor in zip(self.host, tensors):
            host.copy_(tensor, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def wait(self) -> list[list]:
        """Waits for the copy; returns the numbers, as lists."""
        if self.event is None:
            return self.numbers
        self.event.synchronize()
        return [tensor.tolist() for tensor in self.host]
