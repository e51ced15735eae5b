import ctypes

import pytest
import torch

from models.malloc import LARGE, keep_freed_memory, with_room


class Info(ctypes.Structure):
    """mallinfo2's result, of malloc.h. arena: the bytes that malloc holds from the system."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", *"bcdefghij")]


def test_holes():
    """Catches freed blocks into which the next tensor of their size does not fit: each turn keeps one of two tensors,
    so the memory that malloc holds, by its own count, should grow by the kept tensors and one more."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("not glibc 2.33 or later")
    library.mallinfo2.restype = Info
    keep_freed_memory()
    like, staying = torch.empty(2**23), []
    before = library.mallinfo2().arena
    with torch.no_grad():
        for _ in range(12):
            passing = with_room(like)
            staying += [torch.empty_like(like), torch.empty(1)]
            del passing
    assert library.mallinfo2().arena - before < 13.5 * like.nbytes


def test_where_there_is_room():
    """Catches a block of another shape or dtype, and a block offered under autograd, which would not see what is
    written to it, or for few numbers, where it saves nothing."""
    like = torch.empty(3, LARGE, dtype=torch.bfloat16)
    with torch.no_grad():
        for shape in (None, (7, LARGE)):
            out = with_room(like, shape)
            assert out.shape == (shape or like.shape) and out.dtype == like.dtype and out.is_contiguous()
            assert not out._is_view()  # FSDP warns of views that a module returns
            end = out.untyped_storage().nbytes() + 16  # behind its header
            assert end % 64 == 0 and end - 16 - out.nbytes >= 96
        assert with_room(torch.empty(4)) is None and with_room(like.to("meta")) is None
    assert with_room(like) is None
