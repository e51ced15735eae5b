"""CPU memory: settings of glibc's malloc, and tensors whose blocks leave no holes in the heap.

- freed memory is kept for the next step
- torch aligns tensors to 64 bytes, and malloc (of glibc 2.36, for example) takes an aligned block only from a hole that
  is larger by 96 bytes: the hole of a freed tensor never serves the next tensor of its size, and small objects soon
  occupy the slivers between blocks. A LoRA step held a third more memory than its live tensors. So short-lived tensors
  have room behind them
"""

import ctypes
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT, HEADER = 64, 16  # bytes
ROOM = ALIGNMENT + 64 - HEADER  # at least 96, and with its header the block ends where the next aligned one may begin
LARGE = 2**17  # bytes: smaller ones leave no holes worth a call


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory, also blocks above 32 MB, for the next step: a fresh page costs the CPU more than
    the arithmetic on it (an SFT step of the 134M model takes a sixth less time). glibc only."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def with_room(like: Tensor, shape: Sequence[int] | None = None) -> Tensor | None:
    """An uninitialised tensor of like's dtype, and of its shape unless another is given, with room behind it: for the
    `out=` of an operation. None, as if there were no `out=`, where it would not help or not work: for small tensors, on
    GPUs, in compiled code, where autograd records, and in selective activation checkpointing, which returns the saved
    result of an operation and leaves this tensor unwritten."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or like.device.type != "cpu":
        return None  # checked before the size, so that compiled code does not depend on it
    shape = like.shape if shape is None else shape
    size = math.prod(shape) * like.itemsize
    if size < LARGE or torch._C._len_torch_dispatch_stack():
        return None
    room = (-size % ALIGNMENT + ROOM) // like.itemsize
    return like.new_empty(math.prod(shape) + room).resize_(shape)  # not a view: FSDP warns if a module returns one
