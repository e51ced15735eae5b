"""Numbers between host and GPU without either waiting for the other; on a CPU they are simply there."""

import torch
from torch import Tensor


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. To a GPU it goes by way of pinned memory, so that the host does not wait;
    torch keeps that memory from being used again before the copy is done."""
    if device.type == "cpu":
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)


class Download:
    """Tensors of the device on their way to the host, as they are when all has run that the device was given before."""

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
        """The numbers, as lists."""
        if self.event is None:
            return self.numbers
        self.event.synchronize()
        return [tensor.tolist() for tensor in self.host]
