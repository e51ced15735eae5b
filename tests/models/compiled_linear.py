"""Compiles the kernel of models/triton_linear.py to machine code for a GPU, which need not be present, and prints the
resources that each case uses. Arguments: backend, architecture, threads of a warp, cases as JSON."""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models import triton_linear as kernels
from tests.compiled import resources_of


def used_by(target: GPUTarget, dtype: str, bits: int, group_size: int, rows: int) -> dict[str, int]:
    constants = {"GROUP": group_size, "BITS": bits, "HAS_ZEROS": bits == 4}
    element_size, on_amd = 4 if dtype == "fp32" else 2, target.backend == "hip"
    most = 32 if element_size == 4 else 128 if target.arch == 90 and bits == 4 else 64
    size = kernels.block_k(group_size, 4096, most)
    constants |= {"BLOCK_M": rows, "BLOCK_K": size, "UPCAST": False}
    types = {"x": "*" + dtype, "weight": "*i32", "scales": "*bf16", "zeros": "*u8"}
    types |= {"out": "*" + dtype, "parts": "*fp32", "arrivals": "*i32"}
    types |= dict.fromkeys(("M", "N", "K", "num_columns", "steps", "share", "magic"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 5, 6, 8, 9, 10)}
    options = kernels.launch_options(element_size, on_amd)
    source = ASTSource(kernels.multiply_few_rows, types, constants, aligned)
    compiled = triton.compile(source, target=target, options=options)
    return resources_of(compiled, target.backend)


if __name__ == "__main__":
    backend, arch, warp, cases = sys.argv[1:]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
    print(json.dumps([used_by(target, *case) for case in json.loads(cases)]))
