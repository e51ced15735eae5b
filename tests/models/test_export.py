"""Writing Hugging Face folders (models/export.py): other programs open them, and no failure loses an export."""

import errno
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import threading
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from models import export
from models.checkpoint import WeightFiles, folder_config, load_model, stored_dtype
from models.config import read_hf_config
from models.export import CannotHold, complete_export, save_folder
from models.files import write_whole
from models.fsdp import start_ranks
from tests import tiny
from tests.forked import fork
from tests.models.test_checkpoint import same_weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_export_opens_in_transformers(tmp_path, tied, max_shard_bytes):
    """Catches: wrong names, a lost tensor, a stale dtype or index, tokenizer files that are not carried along."""
    theirs = tiny.write_model(tmp_path / "in", tie_word_embeddings=tied, attention_bias=True)
    ours = load_model(tmp_path / "in")
    out = tmp_path / "deep" / "out"
    config = read_hf_config(tmp_path / "in")
    save_folder(
        out, ours.state_dict().items(), config=config, copy_from=tmp_path / "in", max_shard_bytes=max_shard_bytes
    )
    shards = list(out.glob("model*.safetensors"))
    assert (len(shards) == 1) == (max_shard_bytes == 10**9)
    assert sum(path.stat().st_size for path in shards) < 1.1 * sum(p.nbytes for p in theirs.parameters()) + 20_000
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    input_ids = torch.randint(tiny.VOCAB_SIZE, (2, 20))
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, theirs(input_ids).logits)
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    same_weights(out, theirs)


@pytest.mark.parametrize("named", [("torch_dtype",), ("dtype",), ("dtype", "torch_dtype"), ()], ids=str)
def test_export_dtype(tmp_path, folder, named):
    """Catches: a config.json that names another dtype than the files hold, under the key of today's transformers or of
    version 4; and one that names a weight file that the export does not have."""
    out = tmp_path / "out"
    config = {name: value for name, value in folder_config(folder).items() if "dtype" not in name}
    config |= {**dict.fromkeys(named, "float32"), "transformers_weights": "gone.safetensors"}
    save_folder(out, load_model(folder).state_dict().items(), config=config, dtype=torch.bfloat16)
    assert stored_dtype(out) == torch.bfloat16
    assert transformers.AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    written = read_hf_config(out)
    assert {written[name] for name in {*named, "dtype"}} == {"bfloat16"} and "transformers_weights" not in written


def test_what_fp16_cannot_hold(tmp_path, folder):
    """Catches a weight beyond 65504 written as infinity in fp16: no earlier step checks a merged adapter."""
    tensors = dict(load_model(folder).state_dict())
    for weight, fits in ((65504.0, True), (65520.0, False)):
        tensors["layers.1.mlp.up_proj.weight"][3, 4] = weight
        config, out = folder_config(folder), tmp_path / str(fits)
        told = nullcontext() if fits else pytest.raises(CannotHold, match=r"cannot hold .*1\.mlp.up_proj")
        with told:
            save_folder(out, tensors.items(), config=config, dtype=torch.float16)
        assert [path.name for path in tmp_path.iterdir()] == ["True"]


def test_json_changes(tmp_path, folder):
    """Catches: keys of a copied file lost, a file rewritten though nothing changes, and a missing file not made."""
    changes = {"generation_config.json": {"eos_token_id": [2, 5]}, "tokenizer_config.json": {"eos_token": "</s>"}}
    changes["special_tokens_map.json"] = {"pad_token": "é"}
    save_folder(
        tmp_path / "out",
        load_model(folder).state_dict().items(),
        config=folder_config(folder),
        copy_from=folder,
        json_changes=changes,
    )
    before, after = (json.loads((path / "generation_config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert after == before | {"eos_token_id": [2, 5]} and len(before) > 2
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 5]
    assert json.loads((tmp_path / "out/special_tokens_map.json").read_text(encoding="utf-8")) == {"pad_token": "é"}
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()


# ------------------------------------------------------------------------------------- never lost

SHARDED, WHOLE = 12_000, 10**9  # bytes of a file
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
# {name: (bytes of the old export's files, of the new one's)}
TRANSITIONS = {
    "first": (None, SHARDED),
    "whole to whole": (WHOLE, WHOLE),
    "whole to shards": (WHOLE, SHARDED),
    "shards to whole": (SHARDED, WHOLE),
    "shards to shards": (SHARDED, SHARDED + 4_000),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two folders that differ in weights, dtype, and a number in config.json that belongs to the weights."""
    folders = []
    for seed, dtype in ((1, torch.float32), (2, torch.bfloat16)):
        folder = tmp_path_factory.mktemp("model")
        tiny.write_model(folder, seed=seed, dtype=dtype, reward_mean=seed, **SHAPE)
        folders.append(folder)
    return folders


def save(out, model, max_shard_bytes, tensors=None):
    tensors = tensors or load_model(model).state_dict().items()
    save_folder(out, tensors, config=folder_config(model), copy_from=model, max_shard_bytes=max_shard_bytes)


def has_weights_of(found, model, prefix="") -> bool:
    wanted = load_file(model / "model.safetensors")
    names = {name: name if name == "lm_head.weight" else prefix + name for name in dict(found.named_parameters())}
    assert sorted(names.values()) == sorted(wanted)
    pairs = [(p, wanted[names[name]]) for name, p in found.named_parameters()]
    return all(torch.equal(p, want) and p.dtype == want.dtype for p, want in pairs)


def theirs_holds(out, model) -> bool:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    return has_weights_of(theirs, model) and theirs.config.reward_mean == read_hf_config(model)["reward_mean"]


def ours_holds(out, model) -> bool:
    assert list(out.rglob("checksums.json"))
    same = read_hf_config(out)["reward_mean"] == read_hf_config(model)["reward_mean"]
    return has_weights_of(load_model(out), model, prefix="model.") and same


def holds(out, model) -> bool:
    """Whether transformers and our loader, which verifies the checksums, read this model and its config.json from a
    folder."""
    return theirs_holds(out, model) and ours_holds(out, model)


CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir")


def run_aside(action) -> None:
    """Runs action in a forked process."""
    assert os.waitpid(fork(action), 0)[1] == 0


def copy(source: Path, target: Path) -> None:
    """Copies a folder, keeping the hard links within it."""
    copied = {}

    def link_or_copy(path, other):
        inode = os.stat(path).st_ino
        os.link(copied[inode], other) if inode in copied else shutil.copy2(path, other)
        copied.setdefault(inode, other)

    shutil.copytree(source, target, copy_function=link_or_copy)


def states_of_kills(action, folder: Path, kept: Path) -> list[Path]:
    """Runs action, and copies the folder before each of its changes of the file system, and at its end, as a kill would
    leave it. Audit events tell of all changes but the bytes that safetensors writes."""

    def observed():
        lock, copying = threading.RLock(), []

        def keep(event, arguments):
            with lock:
                is_change = event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
                if is_change and not copying:
                    copying.append(True)
                    copy(folder, kept / str(len(list(kept.iterdir()))))
                    copying.clear()

        kept.mkdir()
        sys.addaudithook(keep)
        action()
        keep(CHANGES[0], ())

    run_aside(observed)
    return sorted(kept.iterdir(), key=lambda path: int(path.name))


def state(folder: Path, staged: bool = True) -> str:
    """Digest of a folder's files. staged: also of those staged for the switch, which no config.json names yet."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not staged and export.STAGING not in (folder / "config.json").read_text():
        files = [path for path in files if path.parent.name != export.STAGING]
    return hashlib.sha256(repr([(str(f), f.read_bytes()) for f in files]).encode()).hexdigest()


def is_quiet(reader) -> bool:
    """Whether all tensors are still those whose headers the reader has read."""
    try:
        return [reader.read(name).shape for name in reader.names()] and True
    except ValueError as error:
        assert "while it was being read; run it again" in str(error)
        return False


@pytest.mark.parametrize("name", [name for name in TRANSITIONS if TRANSITIONS[name][0]])
def test_replaced_while_it_is_read(name, models, tmp_path):
    """Catches a model of two exports: the rest of its tensors read from the one that replaced the first."""
    (old, new), (old_bytes, new_bytes) = models, TRANSITIONS[name]
    save(tmp_path, old, old_bytes)
    for _ in range(2):  # the second time by files of the same size
        reader = WeightFiles(tmp_path)
        assert is_quiet(reader)
        save(tmp_path, new, new_bytes)
        assert not is_quiet(reader)


@pytest.mark.parametrize("name", TRANSITIONS)
def test_killed_before_every_change(name, models, tmp_path, monkeypatch):
    """Catches an old export removed before the new one is complete, weights beside the config.json or the shards of
    another export, a chat template that no longer is the model's, a folder that cannot be opened for a moment, and
    leftovers of a kill that stay or spoil the next save. Every state that a kill can leave is opened with transformers
    and with our loader."""
    (old, new), (old_bytes, new_bytes) = models, TRANSITIONS[name]
    begin, out = tmp_path / "begin", tmp_path / "out"
    begin.mkdir()
    (begin / "metrics.jsonl").write_text("{}\n")
    if old_bytes:
        save(begin, old, old_bytes)
    stale = "chat_template.jinja"  # of an older base
    (begin / stale).write_text("{{ 'x' }}")
    tensors = list(load_model(new).state_dict().items())
    theirs, ours = cache(lambda _, model: theirs_holds(out, model)), cache(lambda _, model: ours_holds(out, model))

    def opened(now, model):
        return theirs(state(out, staged=False), model) and ours(now, model)

    shutil.copytree(begin, out)
    kills = states_of_kills(lambda: save(out, new, new_bytes, tensors), out, tmp_path / "kills")
    is_new = {}  # of each state that a kill leaves, in their order
    for kill in kills:
        shutil.rmtree(out)
        kill.rename(out)
        now = state(out)
        if now in is_new:
            continue
        has_model = (out / "config.json").exists()
        is_new[now] = has_model and opened(now, new)
        assert is_new[now] or (opened(now, old) if old_bytes else not has_model)
        reader = WeightFiles(out) if has_model else None
        complete_export(out)  # as a resumed run does
        assert not has_model or is_quiet(reader) == (export.STAGING not in str(reader.paths()))
        assert not list(out.glob(".*")) and (not has_model or opened(state(out), new) == is_new[now])
        assert not has_model or (out / stale).exists() == (not is_new[now])
        if len(is_new) % 2:
            continue
        save(out, new, new_bytes, tensors)
        assert opened(state(out), new) and not list(out.glob(".*")) and (out / "metrics.jsonl").exists()
        files = {path.name for path in WeightFiles(out).paths()}
        assert {path.name for path in out.glob("*.safetensors")} == files and (len(files) > 1) == (new_bytes != WHOLE)
    assert len(kills) > 20 and is_new[now] and list(is_new.values()) == sorted(is_new.values())


def test_disk_full(models, tmp_path, monkeypatch):
    """Catches a full disk, at any of the writes, that destroys the old export, leaves behind what fills the disk, or is
    reported without the folder's name."""
    old, new = models
    out, left = tmp_path / "out", [0]
    save(out, old, SHARDED)
    before = state(out)

    def until_full(real):
        def write(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return write

    monkeypatch.setattr(export, "save_file", until_full(export.save_file))
    monkeypatch.setattr(Path, "write_text", until_full(Path.write_text))
    monkeypatch.setattr(shutil, "copyfile", until_full(shutil.copyfile))
    monkeypatch.setattr(os, "fsync", until_full(os.fsync))  # network mounts report a full disk here
    for k in itertools.count():
        left[0] = k
        try:
            save(out, new, SHARDED)
        except OSError as error:
            assert str(error) == f"{out}: cannot be written: No space left on device"
            assert state(out) == before
        else:
            break
    assert k > 15 and holds(out, new)


def test_disk_full_within_a_shard(models, tmp_path):
    """Catches a traceback from writing shards, a message that names another folder, and a collective on one rank, which
    hangs in a process that was forked from one with collectives. A limit on the size of files stands in for the end of
    the disk."""
    old, new = models
    start_ranks(torch.device("cpu"))
    save(tmp_path / "out", old, WHOLE)

    def action():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
        for name in ("out", "first"):  # over an export, and where there is no folder yet
            with pytest.raises(OSError, match=rf"{name}: cannot be written: .*File too large"):
                save(tmp_path / name, new, WHOLE)

    run_aside(action)
    assert holds(tmp_path / "out", old) and not list((tmp_path / "out").glob(".*"))


def test_without_hard_links(models, tmp_path, monkeypatch):
    """Catches an export that cannot replace another on a file system without hard links, such as FAT."""
    old, new = models
    save(tmp_path / "out", old, WHOLE)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    save(tmp_path / "out", new, WHOLE)
    assert holds(tmp_path / "out", new) and not list((tmp_path / "out").glob(".*"))


def test_a_small_file_is_synced(tmp_path, monkeypatch):
    """Catches an adapter that is empty after a power loss: renamed before its bytes are on the disk."""
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), replace(*paths)))
    write_whole(tmp_path / "file", b"content")
    assert events == [(tmp_path / "file").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_tensors_that_end_in_an_error(tmp_path, folder):
    """Catches a folder that looks complete while tensors are still being written, and partial files left behind."""

    def tensors():
        yield from list(load_model(folder).state_dict().items())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_folder(tmp_path / "out", tensors(), config=folder_config(folder), max_shard_bytes=10_000)
    assert not list(tmp_path.iterdir())
