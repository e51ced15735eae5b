"""models/checksums.py: damage to an export is found when it is opened, and the error names what is damaged."""

import hashlib
import json
import os
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import WeightFiles, folder_config, load_model, open_folder
from models.checksums import CHECKSUMS
from models.export import save_folder
from models.qlinear import Scheme
from models.quantize import load_quantized
from models.reward import scalar_head_config
from tests import tiny
from tests.damage import DAMAGES, flip, swap_files

SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS = ("whole", "shards", "int8", "reward")


def export(root, kind, seed):
    """Exports a random model; int8 weights are those of scripts/quantize.py."""
    source, out = root / f"source-{seed}", root / f"{kind}-{seed}"
    if not source.exists():
        tiny.write_model(source, seed=seed, **SHAPE)
    if kind == "int8":
        flags = ["--checkpoint_path", source, "--output_dir", out, "--mode", "int8"]
        assert tiny.run("scripts/quantize.py", *flags).code == 0
        return out
    tensors, config = dict(load_model(source).state_dict()), folder_config(source)
    if kind == "reward":
        tensors["score.weight"] = torch.randn(1, 32)
        del tensors["lm_head.weight"]
        config = scalar_head_config(config, 0)
    size = 40_000 if kind == "shards" else 10**9
    save_folder(out, tensors.items(), config=config, copy_from=source, max_shard_bytes=size)
    return out


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{kind: (an export, one of another model)}"""
    root = tmp_path_factory.mktemp("exports")
    return {kind: tuple(export(root, kind, seed) for seed in (0, 1)) for kind in KINDS}


def load(folder, kind):
    """Opens and loads a folder, as scripts do."""
    open_folder(folder, frozen=True)
    if kind == "int8":
        return load_quantized(folder, Scheme("int8"), device=torch.device("cpu"), dtype=torch.float32)
    return load_model(folder, head="score" if kind == "reward" else "lm")


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_and_named(kind, exports, tmp_path):
    """Catches a damaged file or tensor that is loaded, a message that does not name the damaged file, a file without a
    checksum, and an undamaged export that is refused."""
    folder, other = tmp_path / "out", exports[kind][1]
    shutil.copytree(exports[kind][0], folder)
    load(folder, kind)
    names = sorted(path.name for path in folder.iterdir())
    assert {"config.json", "tokenizer.model", "tokenizer_config.json", CHECKSUMS} <= set(names) and len(names) >= 6
    for name in names:
        whole = (folder / name).read_bytes()
        damages = {**DAMAGES, "swap": partial(swap_files, other / name)}
        damages |= {f"flip at {share}": partial(flip, share=share) for share in (0.0, 0.2, 0.75, 1.0)}
        for how, damage in damages.items():
            if name == CHECKSUMS and how == "delete":  # without checksums any folder is opened
                continue
            damage(folder / name)
            if (folder / name).is_file() and (folder / name).read_bytes() == whole:
                continue  # tokenizer files of both exports are the same
            with pytest.raises((ValueError, OSError)) as caught:
                load(folder, kind)
            assert name in str(caught.value), (name, how, caught.value)
            (folder / name).write_bytes(whole)
    load(folder, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensor_is_named(kind, exports, tmp_path):
    """Catches a wrong tensor named, or none, wherever a weight file is damaged: the right one is what safetensors now
    reads differently; and two tensors of one shape that are swapped."""
    folder = tmp_path / "out"
    shutil.copytree(exports[kind][0], folder)
    for path in sorted(folder.glob("*.safetensors")):
        whole, tensors = path.read_bytes(), {name: t.clone() for name, t in load_file(path).items()}  # not the mmap
        begin = 8 + int.from_bytes(whole[:8], "little")
        for share in (0.01, 0.3, 0.6, 0.9, 0.99):
            flip(path, (begin + share * (len(whole) - begin)) / len(whole))
            hit = [name for name, tensor in load_file(path).items() if not same_bytes(tensor, tensors[name])]
            with pytest.raises(ValueError, match=rf"{path}: the tensor {hit[0]} is damaged"):
                load(folder, kind)
            path.write_bytes(whole)
        path.write_bytes(whole.replace(b'"F32"', b'"I32"', 1))  # the same bytes, read as other numbers
        with pytest.raises(ValueError, match=rf"{path}: its header is damaged"):
            load(folder, kind)
        path.write_bytes(whole)
        norms = [name for name in tensors if "layernorm" in name]
        if len(norms) == 2:
            tensors[norms[0]] = tensors[norms[0]] + 1  # norms are all initialised alike
            tensors[norms[0]], tensors[norms[1]] = tensors[norms[1]], tensors[norms[0]]
            save_file(tensors, path, metadata={"format": "pt"})
            with pytest.raises(ValueError, match=rf"{path}: the tensor .*layernorm.* is damaged"):
                load(folder, kind)
            path.write_bytes(whole)


def same_bytes(one, two):
    return torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def test_checksums_are_sha256_of_what_others_read(exports):
    """Catches a digest that others cannot recompute, of a file or of a tensor as safetensors loads it."""
    for kind in KINDS:
        folder = exports[kind][0]
        content = json.loads((folder / CHECKSUMS).read_text())
        weights = {path.name for path in folder.glob("*.safetensors")}
        assert content["weights"].keys() == weights and (len(weights) > 1) == (kind == "shards")
        assert content["files"].keys() == {path.name for path in folder.iterdir()} - weights - {CHECKSUMS}
        for name, wanted in content["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == wanted
        for name, each in content["weights"].items():
            tensors = load_file(folder / name)
            assert tensors.keys() == each["tensors"].keys()
            for key, tensor in tensors.items():
                numbers = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                assert hashlib.sha256(numbers).hexdigest() == each["tensors"][key]


def test_a_file_that_is_edited_knowingly(exports, tmp_path):
    """Catches an export that can never be edited: the message says how to go on, and following it works."""
    folder = tmp_path / "out"
    shutil.copytree(exports["whole"][0], folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.5}))
    way = f"remove the entry generation_config.json from {CHECKSUMS} to go on knowingly"
    tiny.refused(partial(open_folder, folder), path, way)
    content = json.loads((folder / CHECKSUMS).read_text())
    del content["files"]["generation_config.json"]
    (folder / CHECKSUMS).write_text(json.dumps(content))
    load(folder, "whole")
    flip(folder / "model.safetensors", 0.9)
    tiny.refused(partial(load, folder, "whole"), folder / "model.safetensors", f"or remove {CHECKSUMS}")
    (folder / CHECKSUMS).unlink()
    load(folder, "whole")


def test_a_weight_file_from_elsewhere(exports, tmp_path):
    """Catches a weight file of another export that is read first, because its name takes precedence over shards."""
    folder = tmp_path / "out"
    shutil.copytree(exports["shards"][0], folder)
    shutil.copyfile(exports["whole"][1] / "model.safetensors", folder / "model.safetensors")
    tiny.refused(partial(load, folder, "shards"), folder / "model.safetensors", "is not of this export")


def test_ranks_divide_the_tensors(exports, tmp_path, monkeypatch):
    """Catches a tensor that no rank of a node checks, or that several ranks check."""
    folder = tmp_path / "out"
    shutil.copytree(exports["whole"][0], folder)
    path, found = folder / "model.safetensors", []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    whole = path.read_bytes()
    for share in (0.3, 0.5, 0.7, 0.8, 0.97):
        flip(path, share)
        finders = []
        for rank in range(3):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            try:
                load(folder, "whole")
            except ValueError:
                finders.append(rank)
        assert len(finders) == 1, (share, finders)
        found += finders
        path.write_bytes(whole)
        os.utime(path)
    assert len(set(found)) > 1
    assert len(WeightFiles(folder).names()) > 5
