"""Reads and writes small files whole, with errors that name the file."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from models.record_files import kind_of, unreadable

TOOL_USE = "additional_chat_templates/tool_use.jinja"
# Files of a model folder, beside config.json and the weights, that an export copies and a download fetches.
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    TOOL_USE,
)


def read_json_object(path: Path, *, missing_ok: bool = False) -> dict:
    """Reads a small JSON file that holds an object. Raises ValueError that names the file if it does not. missing_ok:
    returns {} if there is no such file."""
    if missing_ok and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {unreadable(path, f'not valid JSON: {error}')}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {kind_of(value)}")
    return value


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file atomically, by a rename, and synced: a power loss leaves the old content or the new. Raises OSError
    that names the file if it cannot be written."""
    staging = path.with_name(f".{path.name}.partial")
    with naming_file(path):
        staging.write_bytes(content)
        sync(staging)
        os.replace(staging, path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Writes a file, or the names in a folder, through to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # some network mounts cannot sync a folder
            raise


def write_json(path: Path, value: object) -> None:
    """Writes a small JSON file with write_whole()."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Makes errors name the file or folder that could not be written; the system's message for a full disk does not."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
