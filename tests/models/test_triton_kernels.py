"""The Triton kernels of a decode step without a GPU: in Triton's interpreter against SDPA, and compiled to machine code
for the GPUs they are meant for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.forked import Forked
from tests.models.interpreted_kernels import CASES, TOP_P
from tests.tiny import ROOT


def interpret(*arguments: str) -> str:
    """Output of a Python whose Triton interprets kernels, which must be set before Triton is imported."""
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": os.environ | {"TRITON_INTERPRET": "1"}}
    result = subprocess.run([sys.executable, "-W", "ignore", *arguments], **options, timeout=300)
    if "only 0-dimensional arrays can be converted" in result.stderr:
        pytest.skip("Triton before 3.7 does not interpret with numpy 2.4")
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def run(code: str, folder: Path, *arguments: str) -> str:
    """Output of code in a process of its own, since a compiler may crash it."""
    (folder / "code.py").write_text(code)
    process = Forked(folder / "code.py", *arguments)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return printed


@pytest.fixture(scope="module")
def interpreted():
    return json.loads(interpret("-m", "tests.models.interpreted_kernels"))


def test_paged_decode(interpreted):
    """Catches a key too many or too few at the end of a page, of a split or of a row, heads mixed up, splits joined
    with wrong weights, a read of another row's places, and a new key or value that is written elsewhere or not at
    all."""
    for case, found in zip(CASES, interpreted["distances"], strict=True):
        assert found < {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[case[-1]], case  # NaN is not


def test_top_p(interpreted):
    """Catches a token too many or too few at the threshold, split ties, and a block or a bit that is left out."""
    assert interpreted["same"] == [True] * len(TOP_P)


TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models import triton_attention as kernels
from tests.compiled import resources_of

backend, arch, warp, dtype, D, splits = sys.argv[1:]
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
size = 4 if dtype == "fp32" else 2
splits = int(splits)
constants = kernels.shape_of(G=4, K=8, D=int(D), N=64, splits=splits, element_size=size)
options = {"num_warps": kernels.num_warps(size), "num_stages": kernels.NUM_STAGES}
types = dict.fromkeys(("q", "new_k", "new_v", "k", "v"), "*" + dtype) | {"table": "*i32", "lengths": "*i32"}
types |= {"sums": "*fp32" if splits > 1 else "*" + dtype, "maxima": "*fp32"}
types |= dict.fromkeys(("q_stride", "new_k_stride", "new_v_stride"), "i32")
types |= {"scale": "fp32", "num_table_columns": "i32", **dict.fromkeys(constants, "constexpr")}
source = ASTSource(kernels.attend_splits, types, constants, {(i,): [["tt.divisibility", 16]] for i in range(12)})
compiled = triton.compile(source, target=target, options=options)
print(json.dumps(resources_of(compiled, backend)))
"""


@pytest.mark.parametrize(
    "target, dtype, D, splits",
    [("sm_80", "fp32", 128, 8), ("sm_90", "bf16", 128, 1), ("gfx942", "bf16", 256, 8), ("sm_90", "bf16", 4, 2)],
)
def test_compiles_for_gpus(target, dtype, D, splits, tmp_path):
    """Catches code that only the compiler refuses, more shared memory than a processor has (MI300: 64 KiB), and spilled
    registers."""
    arguments = [*map(str, TARGETS[target]), dtype, str(D), str(splits)]
    used = json.loads(run(COMPILE, tmp_path, *arguments))
    print(target, dtype, D, used)
    assert used["shared"] <= 64 * 1024
    spilled = [name for name in used if name == "STACK" or name.endswith("spill_count")]
    assert spilled and not any(used[name] for name in spilled), used
