"""From the host's memory to a device's without a wait: a copy from pageable memory holds the host until the GPU has
done all that it was given before."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the values on the device. An array on the CPU is not copied."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def index_on(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n], for index_select and index_copy_: a list as an index would be sent with a wait."""
    return to_device(numbers, device, torch.int64)
