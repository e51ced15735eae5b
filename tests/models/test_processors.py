"""CPUs with and without instructions for bf16, and one without FBGEMM, compute the same numbers."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import cpu_linear, decode_cpu, qlinear
from tests import tiny
from tests.models.processors import report

ROOT = Path(__file__).parents[2]
FP32, BF16 = str(torch.float32), str(torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose sizes are divisible by groups of 32."""
    path = tmp_path_factory.mktemp("processors")
    tiny.write_model(path, intermediate_size=128)
    return path


@pytest.fixture(scope="module")
def here(folder):
    """What this processor computes with all its instructions."""
    return report(folder)


def check_errors(found: dict) -> None:
    for name, error in found["errors"][FP32].items():
        assert error < 2e-6, (name, error)
    for name, error in found["errors"][BF16].items():  # activations and results are rounded
        assert error < (1e-2 if found["bf16"] else 4e-3), (name, error)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86 processor")
def test_avx2_computes_what_this_processor_does(folder, here):
    """Catches a path chosen by the dtype or the processor's own instructions, rather than by those that torch was told
    to use; a form of weights that only AVX2 takes and that computes something else; and AVX-512's widths on AVX2."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.models.processors", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    old = json.loads(done.stdout.strip().splitlines()[-1])
    assert old["capability"] == "AVX2" and not old["bf16"] and old["width"] == 96
    assert old["fbgemm"] == here["fbgemm"] != ("no kernel here" in done.stderr)
    for found in (here, old):
        check_errors(found)
    assert old["ids"][FP32] == here["ids"][FP32]
    if not here["bf16"]:
        assert old["ids"][BF16] == here["ids"][BF16]


def test_without_fbgemm(folder, here, monkeypatch, capsys):
    """Catches code that needs FBGEMM: without it, as on ARM and in builds for Windows, other kernels compute the same
    numbers; and a slow path taken silently."""
    for module in (cpu_linear, qlinear, decode_cpu):
        monkeypatch.setattr(module, "has_fbgemm", lambda: False)
    found = report(folder)
    assert not found["fbgemm"] and "int4, groups of 32: no kernel here" in capsys.readouterr().err
    check_errors(found)
    assert found["ids"][FP32] == here["ids"][FP32]
