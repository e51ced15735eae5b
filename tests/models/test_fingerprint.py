"""models/fingerprint.py: data files and model folders that differ have different fingerprints."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.generate import GenerateArgs
from models import checksums
from models import fingerprint as module
from models.fingerprint import digest, fingerprint
from models.identity import CONTENTS, begun_with
from tests import tiny


def test_digest(tmp_path, monkeypatch):
    """Catches a file of which only the first chunk is hashed."""
    monkeypatch.setattr(checksums, "READ_BYTES", 16)
    content = bytes(range(100))
    (tmp_path / "a").write_bytes(content)
    assert digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fingerprint") / "base"
    tiny.write_model(folder)
    (folder / "metrics.jsonl").write_text("of the run that made it")
    return folder


def edited(base, folder, edit):
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return fingerprint(folder)


EDITS = {
    "another training": lambda weights, _: [w.add_(1e-4 * torch.randn_like(w)) for w in weights.values()],
    "one merged adapter": lambda weights, _: weights["model.layers.1.self_attn.v_proj.weight"].mul_(1.01),
    "one norm": lambda weights, _: weights["model.layers.0.input_layernorm.weight"].mul_(1.01),
    "the last tensor": lambda weights, _: weights[sorted(weights)[-1]].mul_(1.01),
    "another config": lambda _, folder: (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "rope_theta": 5e5})
    ),
    "another template": lambda _, folder: (folder / "chat_template.jinja").write_text("x"),
    "another tokenizer": lambda _, folder: (folder / "tokenizer_config.json").write_text("{}"),
}


@pytest.mark.parametrize("whole", [True, False])
def test_models_that_differ(base, tmp_path, whole, monkeypatch):
    """Catches weights compared by the file's size or first block, a tensor that is not read, and a tokenizer, config or
    template left out; and a fingerprint that changes because a folder lies elsewhere, its files were copied, or a run
    has left its log there."""
    if not whole:
        monkeypatch.setattr(module, "WHOLE", 1 << 14)
        monkeypatch.setattr(module, "BLOCK", 64)
        monkeypatch.setattr(module, "BLOCKS", 1)
    same = edited(base, tmp_path / "same", lambda _, folder: (folder / "metrics.jsonl").unlink())
    assert same == fingerprint(base)
    found = {name: edited(base, tmp_path / name, edit) for name, edit in EDITS.items()}
    assert len({same, *found.values()}) == 1 + len(EDITS), found


def test_shards_and_other_folders(base, tmp_path, monkeypatch):
    """Catches a shard that is not read, and `.bin` files or folders without a model that get equal fingerprints."""
    monkeypatch.setattr(module, "WHOLE", 1 << 10)
    weights = load_file(base / "model.safetensors")
    found = set()
    for i, changed in enumerate((None, *sorted(weights)[::7])):
        copy = {name: w + (name == changed) for name, w in weights.items()}
        folder = tmp_path / f"sharded-{i}"
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        names = sorted(copy)
        parts = {f"model-0000{n + 1}-of-00003.safetensors": names[n::3] for n in range(3)}
        for file, part in parts.items():
            save_file({name: copy[name] for name in part}, folder / file, metadata={"format": "pt"})
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        found.add(fingerprint(folder))
        pickled = tmp_path / f"bin-{i}"
        shutil.copytree(base, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save({name: w + i for name, w in weights.items()}, pickled / "pytorch_model.bin")
        found.add(fingerprint(pickled))
        (folder / "config.json").unlink()  # now a folder of files
        found.add(fingerprint(folder))
    assert len(found) == 3 * (1 + len(sorted(weights)[::7]))


@pytest.mark.parametrize("beside", [{}, {"config.json": "{}"}, {"config.json": "{}", "model.safetensors": ""}], ids=len)
def test_adapters_that_differ(tmp_path, beside):
    """Catches another adapter at --adapter_path that --resume does not notice since its folder has a model's config
    too, as some trainers leave it, and one refused for what lies beside it."""
    files = {"adapter_config.json": "{}", "adapter_model.safetensors": "one", **beside}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    args = GenerateArgs(checkpoint_path=tmp_path / "none", adapter_path=tmp_path)
    found = [begun_with(args)[CONTENTS]["adapter_path"]]
    for name, text in {"README.md": "two", "config.json": "[]", "adapter_model.safetensors": "two"}.items():
        (tmp_path / name).write_text(text)
        found.append(begun_with(args)[CONTENTS]["adapter_path"])
    assert found[0] == found[1] == found[2] != found[3]
