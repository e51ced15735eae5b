"""The Triton kernels of quantised products without a GPU: in Triton's interpreter against the dequantised product, and
compiled to machine code for the GPUs they are meant for."""

import json

import pytest

pytest.importorskip("triton")
from tests.models.interpreted_linear import CASES
from tests.models.test_triton_kernels import TARGETS, interpret, run
from tests.tiny import ROOT


def test_products():
    """Catches halves of bytes or of blocks swapped, a scale or zero point of another group, features lost where blocks
    or splits do not divide, padding that reaches a result, a row whose result depends on how many others there are, and
    code that torch.compile makes anew for each number of rows."""
    interpreted = json.loads(interpret("-m", "tests.models.interpreted_linear"))
    assert interpreted["compilations"] == 1
    for each, found in zip(CASES, interpreted["distances"], strict=True):
        rounding = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}[each[-1]]
        assert found["product"] < rounding and found["weights"] < rounding and found["a row alone"] == 0, (each, found)


COMPILED = [  # target, dtype, bits, group size, rows
    ("sm_80", "fp16", 8, 0, 16),
    ("sm_80", "fp32", 8, 0, 16),
    ("sm_80", "bf16", 4, 128, 64),
    ("sm_90", "bf16", 4, 32, 16),
    ("sm_90", "bf16", 8, 128, 64),
    ("sm_90", "bf16", 4, 128, 64),
    ("gfx942", "bf16", 4, 32, 64),
    ("gfx942", "bf16", 8, 0, 16),
]


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for_gpus(target, tmp_path):
    """Catches code that only the compiler refuses, more shared memory than a processor has (MI300 64 KiB, the smallest
    of NVIDIA's 99), spilled registers, and parts of a product that AMD's processors add before they are written."""
    cases = [each for each in COMPILED if each[0] == target]
    arguments = [*map(str, TARGETS[target]), json.dumps([each[1:] for each in cases])]
    code = (ROOT / "tests/models/compiled_linear.py").read_text()
    for case, used in zip(cases, json.loads(run(code, tmp_path, *arguments))):
        print(*case, used)
        assert used["shared"] <= (64 if target == "gfx942" else 99) * 1024
        spilled = [name for name in used if name == "STACK" or name.endswith("spill_count")]
        assert spilled and not any(used[name] for name in spilled), (case, used)
        assert used.get("arrives", True), case
