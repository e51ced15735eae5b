"""Writes models as Hugging Face folders, atomically: a folder holds the whole new export, or the old one.

- everything is written and synced inside the folder, in `.export.partial`. So a mounted or symlinked folder works, its
  parent need not be writable, and a full disk leaves the old export untouched
- one rename of config.json then switches from the old export to the new one: the new config.json names the staged
  weights by transformers' key for an explicit weight file. Then the new files take their usual names, and a second
  rename drops the key. What readers see in between, and after a kill: models/README.md
- a switch that a kill interrupted is completed by the next save or the resumed run
- checksums.json is written with the weights it describes; tensors are hashed while they are in memory
"""

import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoint import Folder, folder_config, hf_name, open_folder
from models.checksums import THREADS, WEIGHTS_KEY, tensor_digest, write_checksums
from models.common import dtype_name, is_main_rank
from models.files import COPIED_FILES, naming_file, read_json_object, sync
from models.pad_token import choose_pad_token, named_pad_token, pad_changes
from models.reward import scalar_head_config

MAX_SHARD_BYTES = 5_000_000_000
STAGING = ".export.partial"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Staged for the switch only: the config.json that names the staged weights, their index, an empty file if small files
# of an older export are to go, a hard link before its rename.
SWITCH_CONFIG, SWITCH_INDEX, ALL_SMALL, LINK = "switch.json", "switch.safetensors.index.json", "all_small", "link"


class CannotHold(ValueError):
    """A tensor that does not fit the dtype it is written in; raised once all tensors are consumed."""


def save_folder(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config: dict,
    copy_from: str | Path | None = None,
    json_changes: dict[str, dict] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a Hugging Face folder that transformers opens; an existing folder keeps files that no export has.

    tensors: (our name, tensor) pairs, consumed one by one; a tied lm_head is left out. config: the contents of
    config.json; its dtype is updated, and its torch_dtype, which transformers 4 reads, if it has one.
    copy_from: a folder whose tokenizer and generation files are copied, byte for byte except for json_changes, {file
    name: keys to set}, which creates a missing file; an older export's that are not among them are removed. dtype: of
    the tensors, None keeps theirs; a scalar head is stored in fp32. Only the main rank writes. Raises OSError that
    names the folder if it cannot be written, CannotHold that names a tensor that fp16 cannot hold, once all are
    consumed; the old export then stays as it was.
    """
    if not is_main_rank():
        for _ in tensors:  # gathering them is a collective
            pass
        return
    folder = Path(folder)
    complete_export(folder)
    staging = folder / STAGING if folder.is_dir() else folder.parent / f".{folder.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with naming_file(folder):
            staging.mkdir(parents=True)
        tied = config.get("tie_word_embeddings", False)
        # outside naming_file: errors of the generator that makes the tensors are not about this folder
        saved_dtype, digests = _write_shards(folder, staging, tensors, tied, dtype, max_shard_bytes)
        with naming_file(folder):
            _copy_files(staging, copy_from, json_changes or {})
            config = {name: value for name, value in config.items() if name != WEIGHTS_KEY}
            names = ["dtype"] + ["torch_dtype"] * ("torch_dtype" in config)
            config.update(dict.fromkeys(names, dtype_name(saved_dtype)))
            _write_json(staging / "config.json", config)
            write_checksums(staging, digests)
            _write_switch(staging, config)
            if copy_from is not None:
                (staging / ALL_SMALL).touch()
            for path in _files_in(staging):
                shutil.copymode(staging / "config.json", path)  # safetensors makes its files private
                sync(path)
            sync(staging)
    except BaseException:  # also errors of the generator that gathers or quantises the tensors
        shutil.rmtree(staging, ignore_errors=True)
        raise
    with naming_file(folder):
        _publish(staging, folder)


def files_of_export(start: Path, config: dict | None, json_changes: dict[str, dict]) -> dict:
    """Returns what save_folder writes beside the weights of a model that began in the folder `start`; see Run.export.
    Raises ValueError or OSError if the folder has lost its files since."""
    changes, began = dict(json_changes), open_folder(start, frozen=True)
    if config is None:
        config, pad = folder_config(start), named_pad_token(began)
        if pad is not None and pad.id < config["vocab_size"]:  # many folders' pad token has no embedding
            config |= {} if config.get("pad_token_id") is None else {"pad_token_id": pad.id}
            changes |= pad_changes(start, pad)
        changes["generation_config.json"] = changes.get("generation_config.json", {}) | began.generation_changes()
    return {"config": config, "copy_from": start, "json_changes": changes}


def scalar_head_files(folder: Folder, start: Path) -> tuple[dict, dict[str, dict]]:
    """Returns (config.json, json_changes of save_folder) for a model with a scalar head that begins in the folder
    `start`, with a pad token that no row of the tokenizer's folder ends in. Read at the start of a run, since the
    folders may be gone at its end."""
    pad = choose_pad_token(folder)
    return scalar_head_config(folder_config(start), pad.id), pad_changes(folder.path, pad)


def complete_export(folder: Path) -> None:
    """Completes a switch that a kill interrupted, and removes an unfinished staging folder; main rank only."""
    config = folder / "config.json"
    named = read_json_object(config, missing_ok=True).get(WEIGHTS_KEY)
    with naming_file(folder):
        if isinstance(named, str) and named.startswith(f"{STAGING}/"):
            _take_names(folder)
        elif (folder / STAGING).exists():
            shutil.rmtree(folder / STAGING)


# ------------------------------------------------------------------------------------------ staging


def _write_shards(
    target: Path, folder: Path, tensors, tied: bool, dtype: torch.dtype | None, max_bytes: int
) -> tuple[torch.dtype, dict[str, dict[str, str]]]:
    """Streams the tensors into model-0000x-of-0000y.safetensors (one file: model.safetensors). Returns the embedding's
    dtype, which config.json names, and {file: {tensor: its digest}}. target: the folder that errors name."""
    shards: list[dict[str, str]] = []
    total, pending, saved_dtype, lost = 0, {}, None, None

    def flush():
        with ThreadPoolExecutor(THREADS) as pool:
            digests = pool.map(tensor_digest, pending.values())  # in threads, during the writing
            with naming_file(target):
                save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(dict(zip(pending, digests)))

    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        own_dtype = torch.float32 if name == "score.weight" else dtype
        whole, tensor = tensor, tensor.detach().to(device="cpu", dtype=own_dtype).contiguous()
        if tensor.dtype == torch.float16 != whole.dtype and not tensor.isfinite().all():
            lost = lost or name
        if lost:  # the other ranks still take part in gathering what follows
            continue
        if saved_dtype is None or name == "embed_tokens.weight":
            saved_dtype = tensor.dtype
        if pending and sum(x.nbytes for x in pending.values()) + tensor.nbytes > max_bytes:
            flush()
            pending = {}
        pending[hf_name(name)] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        total += tensor.nbytes
    if lost:
        raise CannotHold(f"{target}: float16 cannot hold {hf_name(lost)}; --resume with --export_dtype float32")
    flush()
    if len(shards) == 1:
        os.rename(folder / "shard-0", folder / WEIGHTS)
        return saved_dtype, {WEIGHTS: shards[0]}
    weight_map, digests = {}, {}
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"shard-{i}", folder / file_name)
        weight_map.update(dict.fromkeys(shard, file_name))
        digests[file_name] = shard
    with naming_file(target):
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return saved_dtype, digests


def _copy_files(staging: Path, source: str | Path | None, json_changes: dict[str, dict]) -> None:
    for name in COPIED_FILES if source is not None else ():
        if (Path(source) / name).is_file():
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(source) / name, staging / name)
    for name, changes in json_changes.items():
        content = read_json_object(staging / name, missing_ok=True)
        if {**content, **changes} != content:
            _write_json(staging / name, {**content, **changes})


def _write_switch(staging: Path, config: dict) -> None:
    """Writes the config.json that names the staged weights, and for shards an index of their staged paths."""
    weights = WEIGHTS
    if not (staging / WEIGHTS).exists():
        weights, index = SWITCH_INDEX, read_json_object(staging / INDEX)
        index["weight_map"] = {tensor: f"{STAGING}/{file}" for tensor, file in index["weight_map"].items()}
        _write_json(staging / SWITCH_INDEX, index)
    _write_json(staging / SWITCH_CONFIG, {**config, WEIGHTS_KEY: f"{STAGING}/{weights}"})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------- the switch


def _publish(staging: Path, folder: Path) -> None:
    if staging.parent != folder:  # the folder did not exist
        for name in (SWITCH_CONFIG, SWITCH_INDEX, ALL_SMALL):
            (staging / name).unlink(missing_ok=True)
        os.rename(staging, folder)
        sync(folder.parent)
        return
    if (folder / "config.json").exists():
        os.replace(staging / SWITCH_CONFIG, folder / "config.json")
        sync(folder)
    _take_names(folder)


def _take_names(folder: Path) -> None:
    """Gives the staged files their usual names, config.json last. They keep their staged names until then, so after a
    kill this can be repeated from the start."""
    staging = folder / STAGING
    others = ("config.json", SWITCH_CONFIG, SWITCH_INDEX, ALL_SMALL, LINK)
    paths = [path for path in _files_in(staging) if path.name not in others]
    paths.sort(key=lambda path: path.name == INDEX)  # after the shards that it lists
    (folder / INDEX).unlink(missing_ok=True)
    for old in [folder / WEIGHTS, *folder.glob("model-*-of-*.safetensors")]:
        if old.name not in {path.name for path in paths}:
            old.unlink(missing_ok=True)
    for path in paths:
        target = folder / path.relative_to(staging)
        target.parent.mkdir(exist_ok=True)
        _link(path, target)
    for name in COPIED_FILES if (staging / ALL_SMALL).exists() else ():
        if not (staging / name).exists():  # an old chat_template.jinja would take precedence over the new template
            (folder / name).unlink(missing_ok=True)
    sync(folder)
    _link(staging / "config.json", folder / "config.json")
    sync(folder)
    shutil.rmtree(staging)


def _files_in(staging: Path) -> list[Path]:
    return [path for path in staging.rglob("*") if path.is_file()]


def _link(path: Path, target: Path) -> None:
    """Gives a staged file a second name, atomically even if the target exists."""
    beside = path.parent / LINK
    beside.unlink(missing_ok=True)  # left by a kill, or by a rename onto the same file, which does nothing
    try:
        os.link(path, beside)
    except OSError:  # FAT and some network mounts have no hard links
        shutil.copyfile(path, beside)
        sync(beside)
    os.replace(beside, target)
