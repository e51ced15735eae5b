"""Files that cannot be read or written are named, with what is wrong with them."""

import errno
from unittest import mock

import pytest

from inference.lines import LineWriter, write_lines
from models.model import ModelConfig


def test_a_full_disk_names_the_file(tmp_path):
    """Catches a message of the system's alone, which does not say which of a run's files is meant."""
    full = OSError(errno.ENOSPC, "No space left on device")
    file = mock.Mock(write=mock.Mock(side_effect=full))
    with (
        LineWriter(tmp_path / "out.jsonl", {}, active=True, num_lines=0) as writer,
        mock.patch.object(writer, "file", file),
        pytest.raises(OSError, match=r"out\.jsonl: cannot be written: No space left"),
    ):
        writer.write({"a": 1})
    with mock.patch("os.replace", side_effect=full), pytest.raises(OSError, match=r"best\.jsonl: cannot be written"):
        write_lines(tmp_path / "best.jsonl", [{"a": 1}])


def test_a_gguf_file_is_no_broken_json(tmp_path):
    """Catches a complaint about JSON where the path of a single weight file is given for a folder."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\xc3\x28")
    with pytest.raises(ValueError, match=r"model\.gguf: is a file; what is read is a Hugging Face folder"):
        ModelConfig.from_hf(tmp_path / "model.gguf")
