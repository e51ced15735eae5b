"""scripts/venv.sh and the seeds of quickstart.sh: the first steps of a newcomer's command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny


def stub(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "there, made",
    [("nothing", "-m venv --clear .venv"), ("no pip", "-m venv .venv"), ("gone", "-m venv --clear .venv"), ("all", "")],
)
def test_venv(there, made, tmp_path):
    """Catches a .venv that is used though its creation was interrupted before pip, or though its Python is gone; a
    complete one that is created again; pip for another Python than that of the .venv; and a Python too old or too new,
    on which the packages would fail later."""
    home = tmp_path / "a house"
    (home / "scripts").mkdir(parents=True)
    script = shutil.copy(tiny.ROOT / "scripts/venv.sh", home / "scripts")

    def of(version: str) -> str:
        """Returns a stub that takes itself for a Python of this version, and prints what else it is asked to do."""
        asked = f'exec {sys.executable} -c "import sys; sys.version_info = ({version}); $2"'
        pip = "exit 1" if there == "no pip" else "exit 0"
        return stub(
            tmp_path / f"python {version}",
            f'[ "$1" = -c ] || exec echo "$@"\n[ "$2" != "import pip" ] || {pip}\n{asked}',
        )

    if there in ("all", "no pip"):
        (home / ".venv/bin").mkdir(parents=True)
        shutil.copy(of("3, 12, 0"), home / ".venv/bin/python")
    if there == "gone":
        (home / ".venv/bin").mkdir(parents=True)
        (home / ".venv/bin/python").symlink_to("/nowhere/python")

    def run(PYTHON: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", script], env=os.environ | {"PYTHON": PYTHON}, capture_output=True, text=True)

    for good in ("3, 11, 0", "3, 14, 9"):
        done = run(of(good))
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, made, "")
    for bad in (of("3, 10, 20"), of("3, 15, 0"), str(tmp_path / "missing")):
        refused = run(bad)
        if there in ("nothing", "gone"):
            assert refused.returncode == 2 and not refused.stdout
            assert refused.stderr.count("\n") == 1 and "needs Python 3.11 to 3.14" in refused.stderr
    if there in ("all", "no pip"):
        shutil.copy(of("3, 15, 0"), home / ".venv/bin/python")
        refused = run("python3")
        assert refused.returncode == 2 and ".venv/bin/python is not" in refused.stderr


@pytest.mark.parametrize("seeds", [("0", "0"), ("0", "00"), ("7", "x"), ("-1",), ("1 2",)])
def test_seeds_of_the_quickstart(seeds, tmp_path):
    """Catches equal seeds, whose spread is 0, and a word that is no seed, noticed only after packages are installed."""
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(tiny.ROOT / "scripts/quickstart.sh", tmp_path / "scripts")
    refused = subprocess.run(["bash", script, *seeds], capture_output=True, text=True)
    assert refused.returncode == 2 and not refused.stdout and "different whole numbers" in refused.stderr


def test_padded_counts(tmp_path):
    """Catches seeds that are refused where wc pads its number, as on macOS."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "wc").write_text('#!/bin/sh\nprintf "%8d\\n" "$(/usr/bin/env -i /usr/bin/wc "$@")"\n')
    (tmp_path / "wc").chmod(0o755)
    script = shutil.copy(tiny.ROOT / "scripts/quickstart.sh", tmp_path / "scripts")
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    went_on = subprocess.run(["bash", script, "3", "4"], env=path, capture_output=True, text=True)
    assert "Python environment" in went_on.stdout and "different whole numbers" not in went_on.stderr
