"""The Triton kernels of training without a GPU: in Triton's interpreter against autograd on whole logits and AdamW in
plain operations, and compiled to machine code for the GPUs that they are meant for."""

import json

import pytest

pytest.importorskip("triton")
from tests.models.test_triton_kernels import TARGETS, interpret, run

INTERPRETED = """
from tests.models import interpreted_head
from tests.training import interpreted_adamw

interpreted_head.check_all()
interpreted_adamw.check_all()
"""


def test_interpreted():
    """Catches, in the head, a column past the last one that counts, a normaliser not rescaled to a larger maximum, a
    target of another row, a temperature left out of a gradient, a gradient of the entropy of the wrong sign or of an
    entropy that is only measured, chunks that overwrite each other, a factor of the loss lost, a second backward pass
    that takes the gradient for the logits; on several ranks, parts joined without their common maximum, and a target
    that two ranks have.

    In AdamW, a column, row or block left out or taken twice, noise of another position in the whole tensor, levels or
    midpoints of the other moment, a scale that is not its block's largest number, and factors in another order."""
    interpret("-c", INTERPRETED)


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models import triton_head, triton_sampling
from tests.compiled import resources_of
from training import triton_adamw

NUMBERS = {"targets": "*i64", "column_hashes": "*i32", "key": "i64", "first_row": "i32", "start": "i32"}
NUMBERS |= dict.fromkeys(("num_rows", "num_columns", "num_blocks", "blocks_of_row", "block", "row_stride"), "i32")
FACTORS = "scale", "decay", "beta1", "rest1", "beta2", "rest2", "step_size", "correction2", "eps", "top_p"
NUMBERS |= dict.fromkeys(FACTORS, "fp32")
BF16 = {"logits": "*bf16", "weight": "*bf16", "grad": "*bf16", "exp_avg": "*u8", "exp_avg_sq": "*u8"}
of_adamw = {"QUANTIZED": True, "ROUNDED": True, "NUM_SIGNED": 255, "NUM_LEVELS": 256}
kernels = [
    (triton_head.row_statistics_kernel, {"BLOCK": triton_head.BLOCK}, triton_head.NUM_WARPS),
    (triton_head.gradients_kernel, {"BLOCK": triton_head.BLOCK, "ENTROPY": True}, triton_head.NUM_WARPS),
    (triton_sampling.find_thresholds, {"BLOCK": triton_sampling.BLOCK}, triton_sampling.NUM_WARPS),
    (triton_adamw.adamw_kernel, {**of_adamw, **triton_adamw.shape_of(4096, 256)}, triton_adamw.NUM_WARPS),
]
found = {}
for kernel, constants, num_warps in kernels:
    numbers = NUMBERS if kernel is triton_sampling.find_thresholds else NUMBERS | BF16  # whose logits are fp32
    types = {name: "constexpr" if name in constants else numbers.get(name, "*fp32") for name in kernel.arg_names}
    whole = ("num_columns", "num_blocks", "blocks_of_row", "block", "row_stride")  # numbers of real models
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types) if types[n][0] == "*" or n in whole}
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    for name, target in json.loads(sys.argv[1]).items():
        source = ASTSource(kernel, types, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget(*target), options=options)
        found[f"{kernel.__name__}, {name}"] = resources_of(compiled, target[0])
print(json.dumps(found))
"""


def test_nothing_is_spilled(tmp_path):
    """Catches code that only the compiler refuses, kernels that spill registers, and kernels that leave no room for
    others on a processor: a program of the optimizer may use 128 registers per thread, with which four run side by
    side."""
    found = json.loads(run(COMPILE, tmp_path, json.dumps(TARGETS)))
    assert len(found) == 12
    for name, used in found.items():
        print(name, used)
        spilled = [key for key in used if key == "STACK" or key.endswith("spill_count")]
        assert spilled and not any(used[key] for key in spilled), (name, used)
        assert used.get("REG", used.get("vgpr_count")) <= 128, (name, used)
