"""Messages about files that cannot be read or written name the file and say what is wrong with it."""

import errno
from types import SimpleNamespace
from unittest import mock

import pytest

from inference.lines import LineWriter, begin, write_lines
from models.checkpoint import open_folder
from models.config import ModelConfig
from tests import tiny
from tests.forked import Forked


def test_a_full_disk_names_the_file(tmp_path):
    """Catches the operating system's bare message, which does not say which of a run's files is meant."""
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(OSError, match=r"out\.jsonl: cannot be written: No space left"),
        LineWriter(tmp_path / "out.jsonl", {}, active=True, num_lines=0) as writer,
    ):
        writer.file = open("/dev/full", "ab")  # noqa: SIM115 (the writer closes it, and meets the full disk again)
        with pytest.raises(OSError, match=r"out\.jsonl: cannot be written: No space left"):
            writer.write({"a": 1})
    with mock.patch("os.replace", side_effect=full), pytest.raises(OSError, match=r"best\.jsonl: cannot be written"):
        write_lines(tmp_path / "best.jsonl", [{"a": 1}])


def test_an_output_that_cannot_be_written(tmp_path):
    """Catches a new or resumed run that finds out only after loading its model that its output cannot be written, and
    then prints the operating system's bare message."""
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out.jsonl"
    for resume in (False, True):
        with pytest.raises(OSError, match=r"^--output_file .*out\.jsonl: .*file is a file, where a folder is needed$"):
            begin(out, SimpleNamespace(resume=resume))
    denied = mock.patch("tempfile.TemporaryFile", side_effect=PermissionError(errno.EACCES, "Permission denied"))
    with denied, pytest.raises(OSError, match=r"out\.jsonl: .* cannot be written: Permission denied$"):
        begin(tmp_path / "out.jsonl", SimpleNamespace(resume=False))


def test_lines_where_standard_output_goes(folder, tmp_path):
    """Catches an output file that also receives standard output: lines that overwrite the run's messages, or a refusal
    only after the model is loaded, which blames another run."""
    process = Forked(
        "inference/generate.py", "--checkpoint_path", folder, "--prompt", "a", "--output_file", "/dev/stdout"
    )
    printed, errors = process.communicate()
    result = tiny.Result(process.returncode, printed, errors)
    tiny.assert_refused(
        result, "--output_file /dev/stdout: is where standard output goes, which has the run's messages too"
    )
    assert printed == ""


def test_what_is_no_folder(folder, tmp_path, monkeypatch):
    """Catches a message about JSON or a tokenizer when a file is given instead of a folder, and a Hub name taken for a
    path without advice on how to download it."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\xc3\x28")
    with pytest.raises(ValueError, match=r"model\.gguf: is a file; give a Hugging Face folder"):
        ModelConfig.from_hf(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"config\.json: is a file; give its folder$"):
        open_folder(folder / "config.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"^org/name: no such file or folder; python scripts/download.py org/name "):
        ModelConfig.from_hf("org/name")
    (tmp_path / "runs").mkdir()
    for name in ("runs/sft", tmp_path / "sft", "sft", "a/b/c"):
        with pytest.raises(OSError, match=f"^{name}: no such file or folder$"):
            ModelConfig.from_hf(name)
