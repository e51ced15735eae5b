"""Fingerprints of the content of a data file or a model folder, in 64 hexadecimal digits.

- a data file is hashed whole
- so are a folder's config.json and tokenizer files. A large weight file is sampled: its size, its header, a block of
  each tensor and some more blocks at fixed positions, 11 MB of 140 GB, in less than a second
- two fine-tunes of one base differ nearly everywhere, merged adapters at least throughout some tensors: both are
  detected. A change of a few bytes of a large weight file, by hand or by a failing disk, is not
"""

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models import checksums
from models.checkpoint import WeightFiles
from models.files import COPIED_FILES

WHOLE = 64 << 20  # files of up to so many bytes are hashed whole
BLOCK = 4096
BLOCKS = 64  # of a larger file, beside one for each of its tensors
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
PICKLED_ADAPTER = "adapter_model.bin"  # written by older versions


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file, with a progress bar after a second. Raises OSError if it cannot be read."""
    with checksums.bytes_bar(path.stat().st_size, f"hashing {path.name}") as bar:
        return checksums.digest(path, bar=bar)


def adapter_files(folder: Path) -> list[Path]:
    """Returns the config and weight files of an adapter's folder."""
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_ADAPTER)
    return [path for name in names if (path := folder / name).is_file()]


def small_files(folder: Path) -> list[Path]:
    """Returns the files of a model's folder beside its weights: config, tokenizer, templates, generation settings."""
    return [path for name in ("config.json", *COPIED_FILES) if (path := folder / name).is_file()]


def small_fingerprint(folder: Path) -> str | None:
    """Returns a SHA-256 of small_files(); None if they cannot be read."""
    with contextlib.suppress(OSError):
        listing = [(path.name, checksums.digest(path)) for path in small_files(folder)]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return None


def fingerprint(folder: Path, *, of_adapter: bool = False) -> str:
    """Returns a SHA-256 of a folder's content: of a model's files as described above, of an adapter's config and
    weights, or of all files in any other folder; large ones are sampled. of_adapter: of its adapter, also if it has a
    model's files, too, as some trainers leave it. Raises OSError or ValueError if they cannot be read."""
    if of_adapter or ((folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()):
        paths = adapter_files(folder)
    elif (folder / "config.json").is_file():
        paths = small_files(folder) + WeightFiles(folder).paths()
    else:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(8) as pool:  # a network disk serves several reads at once
        files = zip(paths, pool.map(_sample, paths))
        listing = [(str(path.relative_to(folder)), path.stat().st_size, sample) for path, sample in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _sample(path: Path) -> str:
    size = path.stat().st_size
    if size <= WHOLE:
        return checksums.digest(path)
    sha = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # read-ahead would fetch the whole file
        spans = []
        if path.suffix == ".safetensors":
            spans = sorted(checksums.tensor_spans(path).values())
            sha.update(os.pread(file.fileno(), checksums.header_bytes(path) - 8, 8))
        for offset, length in _blocks(size, spans):
            sha.update(os.pread(file.fileno(), length, offset))
    return sha.hexdigest()


def _blocks(size: int, tensors: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields (offset, length) of the blocks to hash in a file of this size; tensors: (start, end) of each."""
    random_of_size = random.Random(size)
    for start, end in [*tensors, *[(0, size)] * BLOCKS]:
        length = min(BLOCK, end - start)
        yield start + int(random_of_size.random() * (end - start - length + 1)), length
