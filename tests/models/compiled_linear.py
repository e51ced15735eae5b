"""Compiles the kernel of models/triton_linear.py to machine code for a GPU that need not be there, and prints what each
case takes of it. Arguments: backend, architecture, threads of a warp, cases as JSON."""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models import triton_linear as kernels
from tests.compiled import resources_of


def used_by(target: GPUTarget, dtype: str, bits: int, group_size: int, rows: int) -> dict[str, int]:
    constants = {"GROUP": group_size, "BITS": bits, "HAS_ZEROS": bits == 4}
    constants |= {"BLOCK_M": rows, "BLOCK_K": kernels.block_k(group_size or None), "UPCAST": False}
    types = {"x": "*" + dtype, "weight": "*i8", "scales": "*bf16", "zeros": "*u8", "out": "*fp32"}
    types["weight"] = "*i32" if bits == 4 else "*i8"
    types |= dict.fromkeys(("M", "N", "K", "num_columns", "share", "magic"), "i32") | dict.fromkeys(
        constants, "constexpr"
    )
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 6, 7, 8)}
    options = kernels.launch_options(rows, 4 if dtype == "fp32" else 2, on_amd=target.backend == "hip")
    source = ASTSource(kernels.multiply_few_rows, types, constants, aligned)
    compiled = triton.compile(source, target=target, options=options)
    return resources_of(compiled, target.backend)


if __name__ == "__main__":
    backend, arch, warp, cases = sys.argv[1:]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
    print(json.dumps([used_by(target, *case) for case in json.loads(cases)]))
