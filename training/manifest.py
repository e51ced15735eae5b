"""manifest.json: verifies a checkpoint's files before they are loaded, and keeps a checkpoint from running code.

- the manifest holds the step, and for every other file in the folder its size and the SHA-256 of each 256 MiB piece, so
  that threads share a large file. It is written last, after each rank has hashed the files that it wrote
- before loading, the ranks share the pieces to verify, however many ranks wrote them
- .metadata is a pickle: only the classes that torch writes there are allowed, so a foreign checkpoint can call nothing
- only tensors are read from the tensor files, which torch loads with weights_only=True
"""

import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta

from models.checksums import THREADS, agreed, bytes_bar, digest
from models.common import is_main_rank
from models.files import read_json_object

MANIFEST, METADATA = "manifest.json", ".metadata"
PIECE_BYTES = 1 << 28


def _rank(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


# ----------------------------------------------------------------------------------------- writing


def write_manifest(folder: Path, step: int, group: dist.ProcessGroup | None = None) -> None:
    """Writes the manifest of a folder that torch.distributed.checkpoint has written. A collective: each rank hashes its
    own files. Raises OSError on all ranks if it fails on one."""
    files, problem = {}, None
    try:
        # torch's file names; the page cache still holds them
        paths = [*folder.glob(f"__{_rank(group)}_*"), *([folder / METADATA] if _rank(group) == 0 else [])]
        with ThreadPoolExecutor(THREADS) as pool:
            pieces = {path: [(path, *piece) for piece in _pieces(path.stat().st_size)] for path in paths}
            digests = {path: pool.map(lambda piece: digest(*piece), pieces[path]) for path in paths}
            files = {path.name: {"bytes": path.stat().st_size, "sha256": list(digests[path])} for path in paths}
    except OSError as error:
        problem = str(error)
    of_all = [files]
    if dist.is_initialized():
        of_all = [None] * dist.get_world_size(group)
        dist.all_gather_object(of_all, files, group=group)
    if _rank(group) == 0 and problem is None:
        merged = {name: entry for each in of_all for name, entry in sorted(each.items())}
        try:
            unseen = merged.keys() ^ _names(folder)
            if unseen:
                raise OSError(f"{folder}: the ranks do not see each other's files ({min(unseen)})")
            with open(folder / MANIFEST, "w", encoding="utf-8") as file:
                file.write(json.dumps(_sealed({"step": step, "files": merged}), indent=1))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            problem = str(error)
    problem = agreed(problem, group)
    if problem is not None:
        raise OSError(problem)


def _pieces(size: int) -> list[tuple[int, int]]:
    """Returns (first byte, number of bytes) of each piece of a file; an empty file has one piece."""
    return [(start, min(PIECE_BYTES, size - start)) for start in range(0, max(1, size), PIECE_BYTES)]


def _sealed(content: dict) -> dict:
    """Returns a manifest with its own hash, so that damage to it is not taken for damage to a file."""
    content = {key: content[key] for key in ("step", "files")}
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def _names(folder: Path) -> set[str]:
    """Returns a checkpoint's files without its manifest, and without .nfs*: deleted files that NFS keeps while open."""
    return {path.name for path in folder.iterdir() if path.name != MANIFEST and not path.name.startswith(".nfs")}


# ---------------------------------------------------------------------------------------- checking


def open_checkpoint(folder: Path, step: int) -> Metadata:
    """Verifies this rank's share of the folder and returns the checkpoint's metadata. Raises ValueError or OSError that
    names a bad file; other ranks may not raise, so the ranks must then agree on the result."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{MANIFEST} is missing")
    files = _read_manifest(folder, step)
    if is_main_rank():
        _check_sizes(folder, files)
    _check_digests(folder, files)
    metadata = read_metadata(folder)
    unknown = {info.relative_path for info in metadata.storage_data.values()} - files.keys()
    if unknown:
        raise ValueError(f"{METADATA} names {min(unknown)}, which does not belong to this checkpoint")
    return metadata


def _read_manifest(folder: Path, step: int) -> dict[str, tuple[int, list[str]]]:
    """Returns {file: (bytes, digests of its pieces)}."""
    content = read_json_object(folder / MANIFEST)
    try:
        is_whole = content == _sealed(content)
    except KeyError:
        is_whole = False
    if not is_whole:
        raise ValueError(f"{MANIFEST} is damaged")
    if content["step"] != step:
        raise ValueError(f"{MANIFEST} is that of step {content['step']}")
    return {name: (each["bytes"], each["sha256"]) for name, each in content["files"].items()}


def _check_sizes(folder: Path, files: dict[str, tuple[int, list[str]]]) -> None:
    present = _names(folder)
    for name in sorted(files.keys() - present):
        raise ValueError(f"{name} is missing")
    for name in sorted(present - files.keys()):
        raise ValueError(f"{name} does not belong to this checkpoint")
    for name, (size, _) in files.items():
        found = (folder / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found:,} bytes instead of {size:,}")


def _check_digests(folder: Path, files: dict[str, tuple[int, list[str]]]) -> None:
    """Verifies the digests of this rank's share of the pieces."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    pieces = [(name, *piece, wanted) for name, (size, of) in files.items() for piece, wanted in zip(_pieces(size), of)]
    pieces.sort(key=lambda piece: (-piece[2], piece))
    share = pieces[_rank() :: world]
    with bytes_bar(sum(size for _, _, size, _ in share)) as bar, ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda piece: digest(folder / piece[0], piece[1], piece[2]), share)
        for (name, _, size, wanted), sha256 in zip(share, found):
            bar.update(size)
            if sha256 != wanted:
                raise ValueError(f"{name} is damaged: its content is not what was saved")


# --------------------------------------------------------------------- reading without running code

# The classes that torch 2.11 to 2.13 write into .metadata.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},  # a function: a layout by its name
    "torch": {"Size"} | {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
    "collections": {"OrderedDict"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(
                f"{METADATA} asks for {module}.{name}, which no checkpoint needs: it is damaged, or made to run code"
            )
        return super().find_class("pathlib" if module == "pathlib._local" else module, name)  # earlier ones lack it


def _member(of: object, name: object) -> object:
    """getattr() for what Python 3.11.0 to 3.11.4 pickle with it: the member of an Enum."""
    if of is not _MEM_FORMAT_ENCODING or name not in of.__members__:
        raise pickle.UnpicklingError(
            f"{METADATA} asks for builtins.getattr of what no checkpoint needs: it is damaged, or made to run code"
        )
    return of[name]


def read_metadata(folder: Path) -> Metadata:
    """Reads a checkpoint's .metadata. Raises ValueError that names the file if it is not what torch writes there."""
    try:
        with open(folder / METADATA, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may call an allowed class with any arguments and raise anything
        told = isinstance(error, pickle.UnpicklingError) and METADATA in str(error)
        raise ValueError(str(error) if told else f"{METADATA} is damaged: {error!r}") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{METADATA} holds a {type(metadata).__name__}, not a checkpoint's metadata")
    return metadata


class Reader(FileSystemReader):
    """torch's reader of a checkpoint folder, given metadata that was already read."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self) -> Metadata:
        if getattr(self.metadata, "storage_meta", None) is None:
            self.metadata.storage_meta = StorageMeta()
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


class TensorPlanner(DefaultLoadPlanner):
    """torch's planner, restricted to tensors: it would unpickle anything else without restriction."""

    def load_bytes(self, read_item, value) -> None:
        raise ValueError(f"{read_item.storage_index.fqn} is a pickle where a tensor should be")
