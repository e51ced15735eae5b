"""models/pad_token.py: which token pads an exported folder. Its effect on scores: training/test_train_rm_export.py."""

import json

import pytest
import tokenizers

from models.checkpoint import open_folder
from models.pad_token import PadToken, choose_pad_token, named_pad_token, pad_changes
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    tiny.write_model(tmp_path, vocab_size=tiny.VOCAB_SIZE + 1)
    return tmp_path


@pytest.mark.parametrize(
    ("named", "added", "wanted"),
    [
        ("<pad>", {"<pad>": tiny.VOCAB_SIZE}, PadToken("<pad>", tiny.VOCAB_SIZE)),
        ("<pad>", {"<pad>": tiny.VOCAB_SIZE + 1}, PadToken("<unk>", 0)),  # has no embedding
        ("<s>", {}, PadToken("<unk>", 0)),
        ({"content": "</s>"}, {}, PadToken("<unk>", 0)),
        (None, {}, PadToken("<unk>", 0)),
        ("<turn>", {"<turn>": tiny.VOCAB_SIZE}, PadToken("<unk>", 0)),  # ends an answer, as generation_config.json says
    ],
)
def test_choice(folder, named, added, wanted):
    """Catches a pad token that ends or begins rows, one beyond the embedding, and the folder's own one ignored."""
    tiny.write_tokenizer(folder, pad_token=named)
    (folder / "added_tokens.json").write_text(json.dumps(added))
    if "<turn>" in added:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tiny.VOCAB_SIZE]}))
    assert choose_pad_token(open_folder(folder)) == wanted


def test_unknown_as_a_piece_of_texts(folder):
    """Catches `<unk>` chosen where it is an ordinary entry of a byte-level vocabulary, which as the pad token would be
    cut out of texts (Qwen's has one, beside added tokens); and added tokens not counted as part of the vocabulary."""
    (folder / "tokenizer.model").unlink()
    vocab = {text: i for i, text in enumerate(["<unk>", "a"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>", "<|fim_pad|>"])
    backend.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    assert choose_pad_token(open_folder(folder)) == PadToken("<|fim_pad|>", 4)
    assert named_pad_token(open_folder(folder)) == PadToken("<|endoftext|>", 2)


def test_changes(folder):
    """Catches files rewritten that agree already, and a pad token reported that no file names."""
    assert named_pad_token(open_folder(folder)) is None
    tiny.write_tokenizer(folder, pad_token="<unk>")
    pad = named_pad_token(open_folder(folder))
    assert pad == PadToken("<unk>", 0) and pad_changes(folder, pad) == {}
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": 2}))
    assert pad_changes(folder, pad) == {"generation_config.json": {"pad_token_id": 0}}
    assert pad_changes(folder, PadToken("</s>", 2)) == {"tokenizer_config.json": {"pad_token": "</s>"}}
