"""What Triton's kernels that are not products take of the GPUs they are meant for, where the compiler is."""

import json

import pytest

pytest.importorskip("triton")
from tests.models.test_triton_kernels import TARGETS, run

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models import triton_sampling
from tests.compiled import resources_of
from training import triton_adamw

NUMBERS = {"column_hashes": "*i32", "weight": "*bf16", "grad": "*bf16", "exp_avg": "*u8", "exp_avg_sq": "*u8"}
NUMBERS |= {"key": "i64", "first_row": "i32", "top_p": "fp32", "row_stride": "i32"}
NUMBERS |= dict.fromkeys(("num_columns", "num_blocks", "blocks_of_row", "block"), "i32")
NUMBERS |= dict.fromkeys(("decay", "beta1", "rest1", "beta2", "rest2", "step_size", "correction2", "eps"), "fp32")
of_adamw = {"QUANTIZED": True, "ROUNDED": True, "NUM_SIGNED": 255, "NUM_LEVELS": 256}
kernels = [
    (triton_sampling.find_thresholds, {"BLOCK": triton_sampling.BLOCK}, triton_sampling.NUM_WARPS),
    (triton_adamw.adamw_kernel, {**of_adamw, **triton_adamw.shape_of(4096, 256)}, triton_adamw.NUM_WARPS),
]
found = {}
for kernel, constants, num_warps in kernels:
    types = {name: "constexpr" if name in constants else NUMBERS.get(name, "*fp32") for name in kernel.arg_names}
    whole = ("num_columns", "num_blocks", "blocks_of_row", "block", "row_stride")  # numbers of real models
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types) if types[n][0] == "*" or n in whole}
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    for name, target in json.loads(sys.argv[1]).items():
        source = ASTSource(kernel, types, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget(*target), options=options)
        found[f"{kernel.__name__}, {name}"] = resources_of(compiled, target[0])
print(json.dumps(found))
"""


def test_nothing_is_spilled():
    """Catches kernels whose registers do not suffice, or that leave no room for others on a processor: a program of the
    optimizer may take 128 registers a thread, with which four of them run side by side."""
    found = json.loads(run("-c", COMPILE, json.dumps(TARGETS), interpret=False))
    assert len(found) == 6
    for name, used in found.items():
        print(name, used)
        spilled = [key for key in used if key == "STACK" or key.endswith("spill_count")]
        assert spilled and not any(used[key] for key in spilled), (name, used)
        assert used.get("REG", used.get("vgpr_count")) <= 128, (name, used)
