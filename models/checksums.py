"""checksums.json: verifies an exported Hugging Face folder when it is opened.

- it holds a SHA-256 of every small file, of each weight file's header and of each tensor. Headers and tensors are all
  the bytes of a weight file, so damage is found anywhere, and the error names the damaged tensor or file
- each rank checks small files and headers when it opens a folder; tensors are checked when weights are loaded, divided
  over threads and over the ranks of a node, since each node may have its own copy
- a folder without checksums.json, such as a download, is not checked; nor is a small file without an entry: whoever
  edits one knowingly removes its entry
"""

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from models.common import progress_bar
from models.files import read_json_object

CHECKSUMS = "checksums.json"
# key of config.json: the weight file or index, which takes precedence over the usual names (transformers 5)
WEIGHTS_KEY = "transformers_weights"
DIGESTS = "digests"  # key of an adapter file's metadata: PEFT drops it when it saves the file again
THREADS = 4  # hashlib releases the GIL
READ_BYTES = 1 << 20  # read at a time
MAX_HEADER_BYTES, METADATA = 100_000_000, "__metadata__"  # safetensors' values
NO_HEADER = "truncated or not a weight file: its header is damaged"


def digest(path: Path, start: int = 0, size: float = math.inf, bar: tqdm | None = None) -> str:
    """Returns the SHA-256, in hex, of `size` bytes of a file from `start` on, and updates `bar`. Raises OSError if the
    file cannot be read."""
    hasher, piece = hashlib.sha256(), memoryview(bytearray(min(READ_BYTES, max(1, size))))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size > 0 and (count := file.readinto(piece[: min(size, READ_BYTES)])):
            hasher.update(piece[:count])
            size -= count
            if bar is not None:
                bar.update(count)
    return hasher.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Returns the SHA-256, in hex, of a contiguous CPU tensor as safetensors stores it."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()


def digests_of(tensors: dict[str, Tensor]) -> str:
    """Returns the digests of an adapter's tensors, as fp32, as JSON for the metadata of its file."""
    return json.dumps({name: tensor_digest(tensor.float()) for name, tensor in tensors.items()})


def bytes_bar(total: int, desc: str = "checking", *, shown: bool | None = None) -> tqdm:
    """Returns a progress bar over bytes read, shown after a second. shown: None shows it on the main rank only."""
    return progress_bar(total=total, desc=desc, unit="B", unit_scale=True, delay=1, leave=False, shown=shown)


def agreed(problem: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """Returns, on all ranks, the problem of the first rank that has one: all go on, or all end. A collective."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return problem
    problems = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    return next((each for each in problems if each is not None), None)


# ----------------------------------------------------------------------------------------- writing


def write_checksums(folder: Path, tensors_of: dict[str, dict[str, str]]) -> None:
    """Writes checksums.json of a folder. tensors_of: {weight file: {tensor: its digest, taken while writing}}."""
    weights = {}
    for name, tensors in tensors_of.items():
        header_digest = digest(folder / name, size=header_bytes(folder / name))
        weights[name] = {"header": header_digest, "tensors": tensors}
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in weights]
    files = {path.relative_to(folder).as_posix(): digest(path) for path in paths}
    content = json.dumps({"files": files, "weights": weights}, indent=1, ensure_ascii=False)
    (folder / CHECKSUMS).write_text(content, encoding="utf-8")


def header_bytes(path: Path) -> int:
    """Returns the number of bytes before the tensors of a safetensors file. Raises ValueError if it is no such file."""
    with open(path, "rb") as file:
        begin = file.read(8)
    size = 8 + int.from_bytes(begin, "little")
    if len(begin) < 8 or size > min(path.stat().st_size, MAX_HEADER_BYTES):
        raise ValueError(f"{path}: {NO_HEADER}")
    return size


def tensor_spans(path: Path) -> dict[str, tuple[int, int]]:
    """Returns {tensor: (start, end)}, in bytes, of a safetensors file. Raises ValueError if it is no such file."""
    begin = header_bytes(path)
    with open(path, "rb") as file:
        content = file.read(begin)
    try:
        offsets = {name: entry["data_offsets"] for name, entry in json.loads(content[8:]).items() if name != METADATA}
        return {name: (begin + first, begin + last) for name, (first, last) in offsets.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: {NO_HEADER}") from None


# ---------------------------------------------------------------------------------------- checking


def check_files(folder: Path) -> None:
    """Raises ValueError that names the first small file or weight file's header that differs from the export."""
    place, checksums = _checksums_of(folder)
    if checksums is None:
        return
    # After a kill during an export's switch, small files may be of the old export or the new: only weights are checked.
    for name, wanted in checksums["files"].items() if place == folder else ():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: is missing, but {CHECKSUMS} lists it; {_way_on(name)}")
        if digest(path) != wanted:
            raise ValueError(f"{path}: is damaged or was edited: it is not the file that was exported; {_way_on(name)}")
    for name, wanted in checksums["weights"].items():
        path = place / name
        if not path.is_file():
            raise ValueError(f"{path}: is missing, but {CHECKSUMS} lists it; {_way_on()}")
        if digest(path, size=header_bytes(path)) != wanted["header"]:
            raise ValueError(f"{path}: its header is damaged: it is not the one that was exported; {_way_on()}")


def check_tensors(path: Path, tensors: dict[str, Tensor], digests: str | None) -> None:
    """Raises ValueError that names a tensor of an adapter's file that differs from what was written. digests: of
    digests_of(), or None for a file without them."""
    if digests is None:
        return
    try:
        wanted = dict(json.loads(digests))
    except (TypeError, ValueError):
        raise ValueError(f"{path}: {NO_HEADER}") from None
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in wanted or name not in tensors or tensor_digest(tensors[name].float()) != wanted[name]:
            why = "its values differ from the export; copy the file again from its source"
            raise ValueError(f"{path}: the tensor {name} is damaged: {why}")


def _way_on(name: str | None = None) -> str:
    entry = f"the entry {name} from {CHECKSUMS}" if name else CHECKSUMS
    return f"copy the folder again from its source, or remove {entry} to go on knowingly"


def _checksums_of(folder: Path) -> tuple[Path, dict | None]:
    """Returns (the folder of the weights, which is the staging folder during an export's switch; its checksums)."""
    named = read_json_object(folder / "config.json", missing_ok=True).get(WEIGHTS_KEY)
    place = (folder / named).parent if isinstance(named, str) else folder
    path = place / CHECKSUMS
    if not path.is_file():
        return place, None
    content = read_json_object(path)
    try:
        weights = {
            name: {"header": str(each["header"]), "tensors": dict(each["tensors"])}
            for name, each in dict(content["weights"]).items()
        }
        return place, {"files": dict(content["files"]), "weights": weights}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: damaged, or not the checksums of an export; {_way_on()}") from None


def check_weights(folder: Path, paths: list[Path]) -> None:
    """Raises ValueError on all ranks that names a tensor that differs from the export, or a file among `paths`, the
    weight files that are about to be read, that is not part of the export. A collective."""
    problem = agreed(_problem_of(folder, paths))
    if problem is not None:
        raise ValueError(problem)


def _problem_of(folder: Path, paths: list[Path]) -> str | None:
    try:
        place, checksums = _checksums_of(folder)
        if checksums is None:
            return None
        for path in paths:
            if path.name not in checksums["weights"]:
                return f"{path}: is not of this export: {CHECKSUMS} does not list it; remove it, or {CHECKSUMS}"
        # key of the result's cache, so that a folder opened twice, as policy and as reference, is hashed once
        stats = [path.stat() for path in (*paths, folder / "config.json", place / CHECKSUMS)]
        stamp = tuple((s.st_size, s.st_mtime_ns, s.st_ino) for s in stats)
        rank, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return _damaged_tensor(folder, stamp, rank, ranks)
    except (OSError, ValueError) as error:
        return str(error)


@lru_cache
def _damaged_tensor(folder: Path, stamp: tuple, rank: int, ranks: int) -> str | None:
    """Checks a rank's share of the node's tensors; returns a problem, or None. stamp: changes when a file does."""
    check_files(folder)
    place, checksums = _checksums_of(folder)
    tensors = []
    for name, weights in checksums["weights"].items():
        tensors += _tensors_in(place / name, weights["tensors"])
    tensors.sort(key=lambda each: (-each[0], each[1], each[2]))  # the same order on all ranks, and even shares
    share = tensors[rank::ranks]

    def problem_of(tensor: tuple[int, Path, int, str, str]) -> str | None:
        size, path, start, name, wanted = tensor
        try:
            if digest(path, start, size) != wanted:
                return f"{path}: the tensor {name} is damaged: its values differ from the export; {_way_on()}"
        except OSError as error:
            return f"{path}: cannot be read: {error.strerror or error}"
        return None

    problems = []
    with ThreadPoolExecutor(THREADS) as pool, bytes_bar(sum(each[0] for each in share)) as bar:
        for each, problem in zip(share, pool.map(problem_of, share)):
            problems.append(problem)
            bar.update(each[0])
    return min(filter(None, problems), default=None)


def _tensors_in(path: Path, digests: dict[str, str]) -> list[tuple[int, Path, int, str, str]]:
    """Returns (bytes, file, first byte, name, digest) of each tensor of a weight file with a valid header. Raises
    ValueError if checksums.json lists other tensors. safetensors has checked that they cover the whole file."""
    spans = tensor_spans(path)
    for name in spans.keys() ^ digests.keys():
        raise ValueError(f"{path.parent / CHECKSUMS}: damaged: {name} is either not in it or not in {path.name}")
    return [(end - start, path, start, name, digests[name]) for name, (start, end) in spans.items()]
