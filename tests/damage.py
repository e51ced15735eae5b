"""Damages files as disks, copies and people do, for tests of files with checksums: checkpoints and exports."""

import os
from pathlib import Path


def flip(path: Path, share: float = 0.5) -> None:
    """Flips a bit, at this share of the file's size."""
    content = bytearray(path.read_bytes())
    at = min(int(share * len(content)), len(content) - 1)
    content[at] ^= 1 << (at % 8)
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def delete(path: Path) -> None:
    path.unlink()


DAMAGES = {each.__name__: each for each in (flip, cut, cut_half, empty, zero, grow, delete)}


def swap_files(other: Path, path: Path) -> None:
    """Replaces a file by one of the same name from elsewhere, or deletes it if there is none."""
    path.unlink()
    if other.exists():
        path.write_bytes(other.read_bytes())
