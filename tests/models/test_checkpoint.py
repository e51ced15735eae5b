"""Reading Hugging Face folders."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model

from models.checkpoint import (
    WeightFiles,
    folder_config,
    generation_eos_ids,
    load_model,
    open_folder,
    stored_dtype,
)
from models.config import read_hf_config
from models.export import save_folder
from models.qlinear import Scheme
from models.quantize import load_quantized
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
    for content in ({"model.norm.weight": print}, {"model.norm.weight": 1}, {0: torch.ones(2)}, [torch.ones(2)]):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            load_model(tmp_path)


def test_the_files_decide_about_the_head(tmp_path):
    """Catches a stored head silently left out because config.json says tied: in the loader, beside a quantised body or
    in an export; and a head equal to the embedding that is kept apart from it."""
    tiny.write_model(tmp_path / "in")
    path = tmp_path / "in/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").eval()
    input_ids = torch.randint(tiny.VOCAB_SIZE, (2, 20))
    with torch.no_grad():
        wanted = theirs(input_ids).logits
        ours = load_model(tmp_path / "in")
        torch.testing.assert_close(ours.lm_head(ours(input_ids)), wanted, atol=1e-4, rtol=0)
    assert not open_folder(tmp_path / "in").config.tie_word_embeddings
    quantized = load_quantized(tmp_path / "in", Scheme("int8"), device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(quantized.lm_head.weight, theirs.lm_head.weight)
    save_folder(tmp_path / "out", ours.state_dict().items(), config=folder_config(tmp_path / "in"))
    same_weights(tmp_path / "out", theirs)
    assert read_hf_config(tmp_path / "out")["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "in/model.safetensors")
    tied = load_model(tmp_path / "in")
    assert tied.lm_head.weight is tied.embed_tokens.weight and folder_config(tmp_path / "in")["tie_word_embeddings"]


def test_tied_with_the_head_alone(tmp_path):
    """Catches a refused folder of safetensors.torch.save_model, which stores tied weights under one of two names."""
    theirs = tiny.write_model(tmp_path, tie_word_embeddings=True)
    save_model(theirs, str(tmp_path / "model.safetensors"))
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    same_weights(tmp_path, theirs)
    assert stored_dtype(tmp_path) == torch.float32


def test_named_weight_file(tmp_path):
    """Catches the weight file that config.json names, as for transformers 5, ignored; and a wrong name accepted."""
    tiny.write_model(tmp_path, seed=1)
    (tmp_path / "other").mkdir()
    os.rename(tmp_path / "model.safetensors", tmp_path / "other/weights.safetensors")
    tiny.write_model(tmp_path)
    config = read_hf_config(tmp_path)
    for name in ("other/weights.safetensors", "other/gone.safetensors", "other/weights.bin", 3):
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        if name == "other/weights.safetensors":
            same_weights(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
            assert not torch.equal(
                load_model(tmp_path).lm_head.weight, load_file(tmp_path / "model.safetensors")["lm_head.weight"]
            )
        else:
            with pytest.raises((ValueError, FileNotFoundError), match="transformers_weights"):
                load_model(tmp_path)


def test_attention_dropout(tmp_path, capsys):
    """Catches no notice that training has no dropout where transformers' has it, and one without reason."""
    for rate in (0.0, 0.1):
        tiny.write_model(tmp_path, attention_dropout=rate)
        open_folder(tmp_path, frozen=True)
        assert not capsys.readouterr().out
        open_folder(tmp_path)
        assert ("its attention_dropout 0.1 is not applied" in capsys.readouterr().out) == (rate > 0)


def test_eos_ids(tmp_path, folder):
    """Catches: a list of EOS ids cut to one, an id listed twice that makes it another list, and generation_config.json
    overlooked."""
    assert generation_eos_ids(folder) == (2,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5, 6, 5]}))
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
