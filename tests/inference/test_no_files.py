"""Paths that are not regular files: folders, devices, missing ones."""

import pytest

from models.records import read_records
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path)
    return path


@pytest.mark.parametrize("place", ["/dev/null", "/dev/full", "folder"])
def test_outputs(model, tmp_path, place):
    """Catches a device as --output_file that is read without end, or refused as an invalid argument after loading."""
    place = tmp_path if place == "folder" else place
    args = ("--checkpoint_path", model, "--prompt", "a", "--max_new_tokens", 1, "--output_file", place)
    for more in ((), ("--resume",)):
        tiny.assert_refused(
            tiny.run("inference/generate.py", *args, *more), f"--output_file {place}: is ", "name a file"
        )


def test_inputs(tmp_path):
    """Catches a folder or a device that is called missing."""
    for place, kind in (
        (tmp_path, "is a folder; name a file"),
        ("/dev/null", "is not a regular file, and records are read more than once; name a file"),
        (tmp_path / "x", "no such file"),
    ):
        with pytest.raises(FileNotFoundError, match=f"^{place}: {kind}$"):
            read_records(place)
