"""The pad token of an exported folder: the same in all its files.

Scores of a padded batch are read at the last token that is not config.json's pad, and tokenizer(texts, padding=True)
pads with the tokenizer's. So a reward model's folder needs one pad token in all its files, and one that ends no row:
with EOS, as in many folders, the score would be read after or before the end. It is chosen from the existing
vocabulary, so that no weight changes shape and every text keeps its ids.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from models.checkpoint import Folder
from models.files import read_json_object

_read = partial(read_json_object, missing_ok=True)


class PadToken(NamedTuple):
    text: str
    id: int


def named_pad_token(folder: Folder) -> PadToken | None:
    """The pad token that a folder's tokenizer files name; None if they name none, or one not in the vocabulary."""
    text = stated_token(folder.path, "pad_token")
    token_id = folder.tokenizer.vocabulary().get(text)
    return None if token_id is None else PadToken(text, token_id)


def choose_pad_token(folder: Folder) -> PadToken:
    """A pad token for rows that end in EOS or an end of turn: the folder's own if it ends nothing; else `<unk>`, unless
    it is a piece of ordinary texts, as in Qwen's vocabulary; else an added token that the chat template does not use,
    preferably a reserved one; else the last entry of the vocabulary, its rarest, that no text spells (byte-level
    vocabularies write a space as another character)."""
    path, tokenizer = folder.path, folder.tokenizer
    ids = tokenizer.vocabulary()
    added_texts = {*tokenizer.added_texts.values()}
    template = "" if tokenizer.chat_template is None else tokenizer.chat_template.source
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, *folder.eos_token_ids}
    usable = {text: i for text, i in ids.items() if i not in ends and i < folder.config.vocab_size}
    unknown = ("<unk>",) if "<unk>" in added_texts else ()
    for text in (stated_token(path, "pad_token"), stated_token(path, "unk_token"), *unknown):
        if text in usable:
            return PadToken(text, usable[text])
    added = [text for text in added_texts if text in usable and text not in template]
    kinds = ("pad", "reserved", "unused", "")
    added.sort(key=lambda text: (next(i for i, kind in enumerate(kinds) if kind in text.lower()), -usable[text]))
    spaced = [text for text in usable if text.startswith("\u0120") and text not in added_texts]
    text = added[0] if added else max(spaced or usable, key=usable.get)
    return PadToken(text, usable[text])


def pad_changes(path: Path, pad: PadToken) -> dict[str, dict]:
    """The changes, {file name: keys to set}, that make this the pad token of all files of a folder but config.json;
    files that agree, or that name none and need not, are left out."""
    changes: dict[str, dict] = {}
    if stated_token(path, "pad_token", ("tokenizer_config.json",)) != pad.text:
        changes["tokenizer_config.json"] = {"pad_token": pad.text}
    if stated_token(path, "pad_token", ("special_tokens_map.json",)) not in (None, pad.text):
        changes["special_tokens_map.json"] = {"pad_token": pad.text}
    padding = _read(path / "tokenizer.json").get("padding")
    if isinstance(padding, dict) and (padding.get("pad_token"), padding.get("pad_id")) != pad:
        changes["tokenizer.json"] = {"padding": {**padding, "pad_token": pad.text, "pad_id": pad.id}}
    if _read(path / "generation_config.json").get("pad_token_id") not in (None, pad.id):
        changes["generation_config.json"] = {"pad_token_id": pad.id}
    return changes


def stated_token(path: Path, key: str, files: tuple[str, ...] = ("tokenizer_config.json", "special_tokens_map.json")):
    """The text of a token that the first of these files names, as such or as an object with its content, or None."""
    for file in files:
        value = _read(path / file).get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return None
