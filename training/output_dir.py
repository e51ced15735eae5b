"""The folder of --output_dir before a run begins: whether these flags may take it, and can write all results there."""

from dataclasses import replace
from datetime import date
from pathlib import Path

from models.checkpoint import MERGED
from models.checksums import CHECKSUMS
from models.common import choose_runtime, dtype_name, refuse_idle
from models.export import INDEX, WEIGHTS
from models.files import COPIED_FILES, read_json_object
from models.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from models.identity import begun_with, changed_flags
from models.shared import check_writable
from models.tokenizer import chat_day
from training.checkpoints import check_checkpoints_are_there

CHANGED_AFTER = "changed_after_step"  # in args.json: {flag changed with --accept_changed: step of the checkpoint then}


def prepare_output_dir(args) -> tuple[date, dict, frozenset[str]]:
    """Returns (the date of the run, the contents of its args.json, the flags in which a resumed run differs). Raises
    ValueError if the folder holds another run, or a flag differs that --accept_changed does not name."""
    folder = args.output_dir
    if args.uses_lora and not args.merge:
        refuse_idle(args, "with --no-merge: adapters are float32", "export_dtype")
    earlier = read_json_object(folder / "args.json", missing_ok=True) if args.resume else {}
    today = chat_day(args.chat_date, earlier.get("chat_date"))
    _check_can_be_written(folder)
    if not args.resume and args.accept_changed:
        raise ValueError("--accept_changed is for a run that goes on with --resume")
    if not args.resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--output_dir {folder}: is not empty; take another, or go on with --resume")
    models = ("config.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    if any((folder / name).exists() for name in models) and not (folder / "args.json").exists():
        raise ValueError(f"--output_dir {folder}: holds a model, which would be overwritten, and no run to --resume")
    args = replace(args, chat_date=today.isoformat(), dtype=dtype_name(choose_runtime(args).dtype))
    now = begun_with(args)
    if not earlier:
        return today, now, frozenset()
    check_checkpoints_are_there(folder, earlier.get("save_steps"))
    now |= {CHANGED_AFTER: earlier[CHANGED_AFTER]} if CHANGED_AFTER in earlier else {}
    return today, now, changed_flags(args, now, earlier, f"--resume {folder}")


def _check_can_be_written(folder: Path) -> None:
    """Raises ValueError or OSError before a run starts if it could not write its results at the end."""
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"--output_dir {folder}: is a symbolic link to nothing")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder}: is a file")
    exported = ("config.json", WEIGHTS, INDEX, CHECKSUMS, ADAPTER_CONFIG, ADAPTER_WEIGHTS, *COPIED_FILES)
    for name in ("args.json", "metrics.jsonl", "samples.jsonl", *exported):
        if (folder / name).is_dir():
            raise ValueError(f"--output_dir {folder}: {name} is a folder, where the run writes a file")
    subfolders = [folder / name for name in ("checkpoints", "critic", "reference", MERGED, f"critic/{MERGED}")]
    subfolders += folder.glob("step-*")
    for path in (folder, *subfolders):
        check_writable(path, f"--output_dir {folder}")
