"""Tests whether Triton works on a GPU: it compiles C code for each kernel, so images without a compiler or without
Python's headers have the package and cannot use it."""

import subprocess

import torch
import triton
import triton.language as tl


@triton.jit
def write_one(out):
    tl.store(out, 1)


def fault_on(device: torch.device) -> str | None:
    """Why a kernel does not run on a GPU, in a line; None if it does. Raises the errors of Triton and of the driver."""
    try:
        out = torch.zeros(1, dtype=torch.int32, device=device)
        write_one[(1,)](out)
        return None if out.item() == 1 else "a kernel computed nonsense"
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} could not compile its launcher; are Python's headers installed?"
