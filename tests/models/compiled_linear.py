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
    options = kernels.launch_options(element_size, on_amd)
    constants |= {"BLOCK_M": rows, "BLOCK_K": size, "UPCAST": False}
    constants |= {"ARRIVALS": kernels.num_arrivals(options["num_warps"], on_amd)}
    types = {"x": "*" + dtype, "weight": "*i32", "scales": "*bf16", "zeros": "*u8"}
    types |= {"out": "*" + dtype, "parts": "*fp32", "arrivals": "*i32"}
    types |= dict.fromkeys(("M", "N", "K", "num_columns", "steps", "share", "magic"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    # what a launch tells the compiler: addresses and numbers are divisible by 16 and, on AMD, tensors below 2 GB
    known = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 5, 6, 8, 9, 10)}
    for i in range(7) if on_amd else ():
        known[i,].append(["tt.pointer_range", 32])
    source = ASTSource(kernels.multiply_few_rows, types, constants, known)
    compiled = triton.compile(source, target=target, options=options)
    used = resources_of(compiled, target.backend)
    return used | {"arrives": all_arrive(compiled.asm["amdgcn"])} if on_amd else used


def all_arrive(code: str) -> bool:
    """Whether all wavefronts wait for their own stores before the first atomic: behind the barrier one mask, that of a
    wavefront's first thread; if one thread of all arrived, there would be another around it. The wait, of the whole
    wavefront, may stand before the mask or behind it."""
    arriving = code[: code.index("_atomic_add")].rpartition("s_barrier")[2]
    return arriving.count("saveexec") == 1 and "s_waitcnt vmcnt(0)" in arriving


if __name__ == "__main__":
    backend, arch, warp, cases = sys.argv[1:]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
    print(json.dumps([used_by(target, *case) for case in json.loads(cases)]))
