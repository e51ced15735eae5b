"""What a file or a model folder holds, in 64 hexadecimal digits.

- a data file is read whole
- so are a folder's config.json and tokenizer files. Of a large weight file it is the size, the header, a block of each
  tensor and some blocks more, at places that are the same each time: 11 MB of 140 GB, in less than a second
- two trainings of one base differ nearly everywhere, and merged adapters at least all over some tensors: both are seen.
  Not seen is a change of a few bytes somewhere in a large weight file, be it by hand or by a failing disk
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models import checksums
from models.checkpoint import WeightFiles
from models.export import COPIED_FILES

WHOLE = 64 << 20  # bytes of a file that is read whole
BLOCK = 4096
BLOCKS = 64  # of a larger one, beside those of its tensors
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
PICKLED_ADAPTER = "adapter_model.bin"  # of older versions


def digest(path: Path) -> str:
    """SHA-256 of a file, with a progress bar if it takes more than a second. OSError if it cannot be read."""
    with checksums.bytes_bar(path.stat().st_size, f"hashing {path.name}") as bar:
        return checksums.digest(path, bar=bar)


def adapter_files(folder: Path) -> list[Path]:
    """Those of an adapter's folder that say what it is."""
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_ADAPTER)
    return [path for name in names if (path := folder / name).is_file()]


def fingerprint(folder: Path) -> str:
    """SHA-256 of what tells a folder's content: of a model what it says at the top of this file, of an adapter its
    files, of any other folder all that are in it, large ones as weights. OSError or ValueError if they cannot be
    read."""
    if (folder / "config.json").is_file():
        paths = [path for name in ("config.json", *COPIED_FILES) if (path := folder / name).is_file()]
        paths += WeightFiles(folder).paths()
    elif (folder / ADAPTER_CONFIG).is_file():
        paths = adapter_files(folder)
    else:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(8) as pool:  # a network's disk has many reads on the way
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
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # reading ahead would fetch all of it
        spans = []
        if path.suffix == ".safetensors":
            spans = sorted(checksums.tensor_spans(path).values())
            sha.update(os.pread(file.fileno(), checksums.header_bytes(path) - 8, 8))
        for offset, length in _blocks(size, spans):
            sha.update(os.pread(file.fileno(), length, offset))
    return sha.hexdigest()


def _blocks(size: int, tensors: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(offset, length) of the blocks to look at, in a file of this size."""
    random_of_size = random.Random(size)
    for start, end in [*tensors, *[(0, size)] * BLOCKS]:
        length = min(BLOCK, end - start)
        yield start + int(random_of_size.random() * (end - start - length + 1)), length
