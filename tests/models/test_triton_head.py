"""The Triton kernels of a head and its loss without a GPU: in Triton's interpreter against autograd on whole logits,
and compiled to machine code for the GPUs they are meant for."""

import json

import pytest

pytest.importorskip("triton")
from tests.models.test_triton_attention import TARGETS, run


def test_fused_head():
    """Catches a column beyond the last that counts, a normaliser that is not shrunk with a larger maximum, a target of
    another row, a temperature left out of a gradient, an entropy's gradient of the wrong sign or of what is only looked
    at, chunks that overwrite each other, a loss whose factor is lost, a second backward that takes the gradient for the
    logits; and of several ranks parts that are joined without their common maximum, and a target that two have."""
    run("-m", "tests.models.interpreted_head", interpret=True)


COMPILE = """
import itertools, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models import triton_head as kernels

pointers = {"logits": "*bf16", "targets": "*i64"}
rows = ("logsumexp", "of_logprobs", "entropies", "of_entropies")
signatures = {
    "row_statistics_kernel": {"found": "*fp32", "scale": "fp32", "num_rows": "i32", "num_columns": "i32"},
    "gradients_kernel": {**dict.fromkeys(rows, "*fp32"), "scale": "fp32", "num_columns": "i32"},
}
sizes = []
for (name, more), target in itertools.product(signatures.items(), map(tuple, json.loads(sys.argv[1]))):
    constants = {"BLOCK": kernels.BLOCK} | ({"ENTROPY": True} if name == "gradients_kernel" else {})
    types = {**pointers, **more, "start": "i32"}
    order = [*types, *(["ENTROPY"] if "ENTROPY" in constants else []), "BLOCK"]
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(getattr(kernels, name), {each: types[each] for each in order}, constants, {})
    compiled = triton.compile(source, target=GPUTarget(*target), options={"num_warps": kernels.NUM_WARPS})
    sizes.append(len(compiled.asm["cubin" if target[0] == "cuda" else "hsaco"]))
print(json.dumps(sizes))
"""


def test_head_compiles_for_gpus():
    """Catches what only the compiler refuses."""
    sizes = json.loads(run("-c", COMPILE, json.dumps(list(TARGETS.values())), interpret=False))
    assert len(sizes) == 6 and all(sizes)
