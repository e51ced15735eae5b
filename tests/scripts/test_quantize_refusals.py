"""scripts/quantize.py: what it refuses."""

import pytest
import torch

from models.checkpoint import WeightFiles
from models.common import Runtime
from models.config import ModelConfig
from models.quantize import check_runnable, choose_scheme
from tests import tiny


def test_a_quantised_folder(tmp_path):
    """Catches a refusal to quantise a quantised folder again that speaks of training, one to repeat the command
    after a kill, and flags without effect."""
    tiny.write_model(tmp_path / "model")
    flags = ("--mode", "int8", "--output_dir")
    (tmp_path / "int8/.export.partial").mkdir(parents=True)  # of a run that was killed
    first = tiny.run("scripts/quantize.py", "--checkpoint_path", tmp_path / "model", *flags, tmp_path / "int8")
    assert first.code == 0, first
    again = tiny.run("scripts/quantize.py", "--checkpoint_path", tmp_path / "int8", *flags, tmp_path / "again")
    tiny.assert_refused(again, f"{tmp_path / 'int8'}: its quantised weights are frozen, and cannot be quantised again")
    onto = tiny.run("scripts/quantize.py", "--checkpoint_path", tmp_path / "model", *flags, tmp_path / "model")
    tiny.assert_refused(onto, f"--output_dir {tmp_path / 'model'}: exists; take another\n")  # not "or remove it"
    for given, complaint in (
        (
            ("--eval_file", "x", "--calibration_tokens", 9),
            "--calibration_tokens 9 does nothing without a --calibration_",
        ),
        (("--max_seq_len", 64), "--max_seq_len 64 does nothing without a --calibration_file or an --eval_file"),
        (("--compile",), "--compile does nothing here"),
    ):
        flags = ("--checkpoint_path", tmp_path / "model", "--output_dir", tmp_path / "idle", *given)
        tiny.assert_refused(tiny.run("scripts/quantize.py", *flags), complaint)


def test_groups_that_ranks_would_divide(tmp_path):
    """Catches advice to read a quantised folder in smaller groups, which --group_size then refuses, and an error that
    names neither the folder nor the flag."""
    tiny.write_model(tmp_path / "model", intermediate_size=128)
    flags = ("--checkpoint_path", tmp_path / "model", "--output_dir", tmp_path / "int4", "--group_size", 64)
    assert tiny.run("scripts/quantize.py", *flags).code == 0
    runtime = Runtime(torch.device("cpu"), torch.float32, False)
    for name, mode, group_size, named, advice in (
        ("int4", "none", None, "int4", "take fewer ranks or quantise the original again in groups of 32"),
        ("model", "int4", 64, "--quantize int4", "groups of 32 are possible"),
    ):
        folder = tmp_path / name
        scheme = choose_scheme(folder, mode, group_size)
        why = f"{folder}: {named}: .* / 2 ranks is not divisible by groups of 64; {advice}"
        with pytest.raises(ValueError, match=why):
            check_runnable(WeightFiles(folder), ModelConfig.from_hf(folder), scheme, runtime, 2)
