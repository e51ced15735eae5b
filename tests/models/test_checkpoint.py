"""Reading and writing Hugging Face folders."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models import checkpoint
from models.checkpoint import WeightFiles, generation_eos_ids, load_model, save_folder, stored_dtype
from models.model import read_hf_config
from tests import tiny


def same_weights(folder, model) -> None:
    theirs = {name.removeprefix("model."): p for name, p in model.named_parameters()}
    ours = dict(load_model(folder).named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name


def rewrite_as_bin(folder, num_shards: int) -> None:
    """Turns model.safetensors into pytorch_model.bin, whole or in shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if num_shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = sorted(tensors)
    weight_map = {name: f"pytorch_model-{i % num_shards + 1:05d}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({n: tensors[n] for n in names if weight_map[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["one", "sharded", "bin", "bin sharded"])
def test_reads_every_form(tmp_path, form, tied):
    """Catches: a format that is not found, a shard that is skipped, tied weights that get lost."""
    model = tiny.write_model(tmp_path, tie_word_embeddings=tied)
    if form == "sharded":
        (tmp_path / "model.safetensors").unlink()
        model.save_pretrained(tmp_path, max_shard_size="60KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    elif form.startswith("bin"):
        rewrite_as_bin(tmp_path, 1 if form == "bin" else 3)
    same_weights(tmp_path, model)
    loaded = load_model(tmp_path)
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied


def test_slices(folder):
    """Catches: slices that a rank would read from the wrong place, in either format."""
    files = WeightFiles(folder)
    name = "layers.1.mlp.down_proj.weight"
    whole = files.read(name)
    assert files.shape(name) == tuple(whole.shape)
    assert torch.equal(files.read(name, (slice(8, 24), slice(4, 100, 1))), whole[8:24, 4:100])


def test_index_decides_which_files_count(tmp_path):
    """Catches: a consolidated copy beside the shards being read as well."""
    model = tiny.write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    save_file({"norm.weight": torch.zeros(3)}, tmp_path / "consolidated.safetensors")
    same_weights(tmp_path, model)


def test_names_without_prefix_and_old_buffers(tmp_path):
    """Catches: folders of the bare LlamaModel and old files with rotary_emb.inv_freq being refused."""
    model = tiny.write_model(tmp_path, tie_word_embeddings=True)
    tensors = {n.removeprefix("model."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    same_weights(tmp_path, model)


@pytest.mark.parametrize(
    ("damage", "culprits"),
    [
        (lambda t: t.pop("model.norm.weight"), ["missing", "model.norm.weight"]),
        (lambda t: t.update({"model.extra.weight": torch.zeros(2)}), ["unexpected", "model.extra.weight"]),
        (lambda t: t.update({"score.weight": torch.zeros(1, 64)}), ["unexpected", "score.weight"]),
        (lambda t: t.update({"model.norm.weight": torch.zeros(63)}), ["wrong shapes", "[63]", "[64]"]),
    ],
)
def test_weights_that_do_not_fit(tmp_path, damage, culprits):
    """Catches: a model left partly uninitialised, or a tensor silently dropped or broadcast."""
    tiny.write_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    assert all(culprit in str(error.value) for culprit in culprits), error.value


def test_damaged_files_are_named(tmp_path):
    """Catches: a truncated or missing shard, or a pickle that runs code, ending in a traceback or worse."""
    model = tiny.write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:20], b"", b"\x00" * 200):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            load_model(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_model(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    os.rename(shard, tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_model(tmp_path)
    save_file({"nothing": torch.zeros(1)}, shard)
    with pytest.raises(ValueError, match=shard.name):
        load_model(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    torch.save({"model.norm.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_model(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_export_opens_in_transformers(tmp_path, tied, max_shard_bytes):
    """Catches: wrong names, a lost tensor, a stale dtype or index, tokenizer files that are not carried along."""
    theirs = tiny.write_model(tmp_path / "in", tie_word_embeddings=tied, attention_bias=True)
    ours = load_model(tmp_path / "in")
    out = tmp_path / "deep" / "out"
    config = read_hf_config(tmp_path / "in")[0]
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


def test_export_dtype(tmp_path, folder):
    """Catches: config.json that names another dtype than the files hold."""
    out = tmp_path / "out"
    config = read_hf_config(folder)[0]
    save_folder(out, load_model(folder).state_dict().items(), config=config, dtype=torch.bfloat16)
    assert stored_dtype(out) == torch.bfloat16
    assert transformers.AutoConfig.from_pretrained(out).dtype == torch.bfloat16


def test_export_into_a_run_directory(tmp_path, folder, monkeypatch):
    """Catches: a half-replaced model that has a config.json, old shards that stay, a run's own files lost."""
    model, config = load_model(folder), read_hf_config(folder)[0]
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}\n")
    save_folder(out, model.state_dict().items(), config=config, max_shard_bytes=50_000)
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError):
        save_folder(out, model.state_dict().items(), config=config)
    assert not (out / "config.json").exists()
    monkeypatch.undo()
    save_folder(out, model.state_dict().items(), config=config)
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl", "config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_killed_export_leaves_nothing(tmp_path, folder):
    """Catches: a folder that looks whole while tensors were still being written."""

    def tensors():
        yield from list(load_model(folder).state_dict().items())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_folder(tmp_path / "out", tensors(), config=read_hf_config(folder)[0], max_shard_bytes=10_000)
    assert not (tmp_path / "out").exists()


def test_eos_ids(tmp_path, folder):
    """Catches: a list of EOS ids cut to one, generation_config.json overlooked."""
    assert generation_eos_ids(folder) == (2,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert generation_eos_ids(tmp_path) == (5, 6)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert generation_eos_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert generation_eos_ids(tmp_path) == (5, 6)
    (tmp_path / "config.json").write_text("{}")
    assert generation_eos_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(ValueError, match="eos_token_id"):
        generation_eos_ids(tmp_path)
