"""Runs the kernels of models/triton_linear.py in Triton's interpreter, which must be enabled before Triton is imported,
on each of CASES, and prints how far they are from the product of the dequantised weights."""

import json
from unittest import mock

import numpy
import torch

from models import qlinear, triton_linear
from models.qlinear import Quantized, Scheme, dequantize

# rows, output features, input features, mode, group size, zero points, splits, dtype
CASES = [
    (1, 40, 256, "int8", None, False, 1, "float32"),
    (17, 300, 200, "int8", None, False, 3, "float16"),  # neither blocks nor splits divide 200
    (5, 130, 192, "int8", 96, True, 2, "float32"),
    (4, 128, 256, "int8", 64, True, 3, "bfloat16"),
    (64, 256, 256, "int4", 32, False, 4, "bfloat16"),
    (3, 129, 512, "int4", 128, True, 2, "float32"),
    (2, 64, 512, "int4", 256, False, 1, "float16"),
    (50, 100, 72, "int4", None, True, 2, "float32"),
]


def product(a, b, dtype):
    """What the interpreter calls for tl.dot, [M, K] x [K, N], summed in the order of K whatever the shape. The BLAS of
    numpy.matmul chooses the order by the shape on some CPUs, so that a row would depend on the number of rows."""
    total = numpy.zeros((len(a), b.shape[1]), dtype)
    for column, row in zip(a.astype(dtype).T, b.astype(dtype)):
        total += column[:, None] * row
    return total


def case(M, N, K, mode, group_size, has_zeros, splits, dtype) -> dict[str, float]:
    """Relative errors, and how far a row is from the same row computed alone. Memory behind the rows of x is NaN."""
    dtype, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    scheme, (low, high) = Scheme(mode, group_size, not has_zeros), {"int8": (-128, 128), "int4": (0, 16)}[mode]
    integers = {"dtype": torch.int8 if mode == "int8" else torch.uint8, "generator": generator}
    groups = (N, scheme.num_groups(K))
    zero = torch.randint(low, high, groups, **integers) if has_zeros else None
    scale = torch.rand(groups, generator=generator).bfloat16()
    scale[:, : groups[1] - 1 : 2] = 0  # groups of zeros
    small = Quantized(torch.randint(low, high, (N, K), **integers), scale, zero)
    products = qlinear.triton_products(small, scheme, splits)
    backing = torch.full((M + 8, K), torch.nan, dtype=dtype)
    backing[:M] = torch.randn(M, K, generator=generator)
    x, upcast = backing[:M], dtype == torch.bfloat16
    wanted = x.float() @ dequantize(small).T
    numbers = (*products.tensors, products.shape)
    found = triton_linear.few_rows(x, *numbers, upcast=upcast)
    assert found.dtype == dtype and found.shape == (M, N)
    if splits == 3:  # as on AMD's processors
        with mock.patch.object(triton_linear, "num_arrivals", lambda num_warps: 64 * num_warps):
            assert torch.equal(triton_linear.few_rows(x, *numbers, upcast=upcast), found)
    alone = triton_linear.few_rows(x[M - 1 :], *numbers, upcast=upcast)
    expanded = triton_linear.expanded(*products.tensors[:3], products.shape, dtype).float()
    return {
        "product": ((found.float() - wanted).norm() / wanted.norm()).item(),
        "weights": ((expanded - dequantize(small)).norm() / dequantize(small).norm()).item(),
        "a row alone": (alone - found[M - 1 :]).abs().max().item(),
    }


def compilations(counts: list[int]) -> int:
    """How many graphs torch.compile makes for these numbers of rows. The results must be those of eager code."""
    graphs = []

    def take(graph, inputs):
        graphs.append(graph)
        return graph.forward

    products = qlinear.triton_products(qlinear.quantize(torch.randn(40, 64), Scheme("int4", 32)), Scheme("int4", 32), 1)
    compiled = torch.compile(lambda x: 2 * products(x), backend=take)
    for M in counts:
        x = torch.randn(M, 64)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        assert torch.equal(compiled(x), 2 * products(x))
    return len(graphs)


if __name__ == "__main__":
    numpy.matmul = product
    found = {"distances": [case(*each) for each in CASES], "compilations": compilations([3, 17, 40, 70])}
    print(json.dumps(found))
