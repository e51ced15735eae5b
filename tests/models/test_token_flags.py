"""Flags of a token on which tokenizer.json and tokenizer_config.json disagree, and special tokens put around a text: as
transformers reads both files."""

import json

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from models.tokenizer import Tokenizer
from tests.models.test_tokenizer import byte_level_folder

TOKEN = "<|eot_id|>"
TEXTS = (f"x {TOKEN} y", f"x{TOKEN}y")


def edited(folder, in_file, in_config, **settings):
    """Returns the folder's tokenizer: (ours, transformers'). in_file, in_config: flags of the token; in_config None:
    the config lists no tokens."""
    byte_level_folder(folder, "llama3", eos_token="<|end_of_text|>")
    path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    file, config = json.loads(path.read_text()), json.loads(config_path.read_text())
    for token in file["added_tokens"]:
        token.update(in_file if token["content"] == TOKEN else {})
    listed = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in file["added_tokens"]}
    if in_config is not None:
        for token in listed.values():
            token.update(in_config if token["content"] == TOKEN else {})
        config["added_tokens_decoder"] = listed
    path.write_text(json.dumps(file))
    config_path.write_text(json.dumps({**config, **settings}))
    return Tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("flag", ("lstrip", "rstrip", "single_word"))
@pytest.mark.parametrize("in_file", (True, False))
def test_flags_of_the_config_count(tmp_path, flag, in_file):
    """Catches flags of a token, as for spaces around it, taken against added_tokens_decoder: other ids."""
    ours, oracle = edited(tmp_path, {flag: in_file}, {flag: not in_file})
    assert [ours.encode(text, False) for text in TEXTS] == oracle(list(TEXTS), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("in_file", (True, False))
@pytest.mark.parametrize("in_config", (True, False, None))
@pytest.mark.parametrize("settings", ({}, {"sep_token": TOKEN}, {"image_token": TOKEN}))
def test_special_tokens_are_no_text(tmp_path, in_file, in_config, settings):
    """Catches a token in an answer's text that either file marks special, or that a setting names."""
    in_config = None if in_config is None else {"special": in_config}
    ours, oracle = edited(tmp_path, {"special": in_file}, in_config, **settings)
    ids = oracle(f"x{TOKEN}y", add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("named", ({"image_token": "<img>"}, {}, ["<|a|>", "<|b|>"]), ids=str)
def test_two_lists_of_special_tokens(tmp_path, named):
    """Catches special tokens missed that only one of the keys of two transformers versions names, and another order."""
    ours, oracle = edited(tmp_path, {}, None, additional_special_tokens=["<|a|>", "<img>"], extra_special_tokens=named)
    text = "x<|a|>y<|b|>z<img>"
    assert ours.encode(text, False) == oracle(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text)) == oracle.decode(oracle(text)["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("form", ("<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A"))
@pytest.mark.parametrize("model", ("BPE", "WordLevel", "two for a"))
def test_around_texts_of_a_small_vocabulary(tmp_path, model, form):
    """Catches a BOS put behind the text where the vocabulary, of digits here, lacks the letters of the text tried, or
    where a letter is the unknown token, which is BOS too; and a part of the text tried taken for an EOS."""
    vocab = {text: i for i, text in enumerate(["<s>", "</s>", *"0123456789+="])}
    model, normalizer = ("BPE", normalizers.Replace("a", "12")) if model == "two for a" else (model, None)
    of_model = {"merges": []} if model == "BPE" else {"unk_token": "<s>"}
    file = tokenizers.Tokenizer(getattr(tokenizers.models, model)(vocab, **of_model))
    file.normalizer = normalizer
    file.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    file.add_special_tokens(["<s>", "</s>"])
    file.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 0), ("</s>", 1)])
    file.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, oracle = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("1+2=") == oracle("1+2=")["input_ids"] and ours.adds_bos == form.startswith("<s>")
