"""Text to token ids and back, by the tokenizer files of a Hugging Face folder as they are.

- `tokenizer.json` is run by tokenizers, otherwise `tokenizer.model` by sentencepiece; nothing is converted
- a special or added token written in a text becomes its id; the stretches between them are encoded separately
- BOS and EOS are added by the file's post-processor, else by add_bos_token / add_eos_token; in chats by the template
"""

import json
import os
from datetime import date, datetime
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path

import tokenizers
from tokenizers import AddedToken
from tokenizers.models import WordLevel

from models.chat_template import ChatTemplate, read_chat_template
from models.files import TOOL_USE, read_json_object
from models.functions import short
from models.record_files import unreadable
from models.streaming import StreamDecoder

# forked processes, one for each core, tokenise files faster, and threads do not survive a fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", TOOL_USE)
FILES = ("tokenizer.json", "tokenizer.model", *SETTINGS)
# normalizer_spec { add_dummy_prefix: false } of sentencepiece_model.proto: appended to a model, it overrides the field
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def not_encodable(text: object) -> ValueError:
    """Returns the error of a text that is not a string, or has no UTF-8 encoding."""
    place = next((i for i, letter in enumerate(str(text)) if "\ud800" <= letter < "\ue000"), 0)
    found = ascii(text[max(0, place - 40) : place + 1]) if isinstance(text, str) else ascii(text)[:60]
    return ValueError(f"must be a string without lone surrogates: {found}")


class Tokenizer:
    """The tokenizer of a Hugging Face folder.

    bos_token_id, eos_token_id: int, or None where the folder names no such token.
    pad_token_id: int, never EOS: the folder's own pad token, else `<unk>`, else the first id that is neither EOS nor
        BOS. It fills masked positions; no mask is ever derived from it.
    base_vocab_size: the largest id of the vocabulary, without added tokens, + 1.
    special_ids: ids that decoding leaves out; added_texts: id -> text of all added tokens; byte_ids: tokens of single
        bytes, which the decoder joins.
    adds_bos: whether encode() puts a BOS first; chat_template: a ChatTemplate, or None; today: the day it is told.
    Raises FileNotFoundError (no tokenizer files) and ValueError (a file that cannot be used), naming the file.
    """

    def __init__(self, folder: str | Path, today: date | None = None):
        folder = Path(folder)
        self.config_path = folder / "tokenizer_config.json"
        config = read_json_object(self.config_path, missing_ok=True)
        path = next((p for p in (folder / "tokenizer.json", folder / "tokenizer.model") if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{folder}: neither tokenizer.json nor tokenizer.model is in this folder")
        if config.get("split_special_tokens"):
            raise ValueError(f"{self.config_path}: split_special_tokens is not supported")
        no_space = config.get("add_prefix_space") is False and _is_llama(config)
        try:
            self._file = (_Fast if path.suffix == ".json" else _SentencePiece)(path, no_space)
        except ModuleNotFoundError:
            raise ValueError(f"{path}: is read by sentencepiece, which is missing; pip install sentencepiece") from None
        except Exception as error:  # both libraries raise bare ones
            raise ValueError(f"{path}: {unreadable(path, f'not a usable {path.name}: {short(error)}')}") from error
        try:
            names = _add_tokens(self._file, folder, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.config_path}: token entries cannot be used: {short(error)}") from error
        ids = {name: self._file.token_to_id(token) for name, token in names.items()}
        self.bos_token_id, self.eos_token_id = ids.get("bos_token"), ids.get("eos_token")
        unk = ids.get("unk_token", self._file.token_to_id("<unk>"))
        fillers = (ids.get("pad_token"), unk, *(i for i in range(3) if i != self.bos_token_id))
        self.pad_token_id = next(i for i in fillers if i not in (None, self.eos_token_id))

        self.base_vocab_size, added = self._file.size, self._file.added_tokens()
        self.added_texts, self.byte_ids = {i: token.content for i, token in added.items()}, self._file.byte_ids
        named = names.values()
        self.special_ids = frozenset(i for i, token in added.items() if token.special or token.content in named)
        self._before, self._behind = self._file.around
        if self.bos_token_id not in (None, *self._before) and config.get("add_bos_token", self._file.bos_by_default):
            self._before = [self.bos_token_id, *self._before]
        if self.eos_token_id not in (None, *self._behind) and config.get("add_eos_token"):
            self._behind = [*self._behind, self.eos_token_id]
        self.adds_bos = self.bos_token_id is not None and self._before[:1] == [self.bos_token_id]
        self.today, sources = today or chat_day(None), read_chat_template(folder, config)
        self.chat_template = ChatTemplate(sources, folder, names, self.today) if sources else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. add_special_tokens: with the BOS and EOS that the folder asks for."""
        try:
            ids = self._file.encode(text)
        except (TypeError, UnicodeEncodeError) as error:
            raise not_encodable(text) from error
        return [*self._before, *ids, *self._behind] if add_special_tokens else ids

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text without added BOS or EOS, such as a rendered chat, which contains its BOS."""
        return self.encode(text, add_special_tokens=False)

    def encoding(self, text: str) -> tokenizers.Encoding | None:
        """The ids of encode_plain() with places in the text; None with sentencepiece, or where encode() would raise."""
        try:
            return self._file.encoding(text)
        except (TypeError, UnicodeEncodeError):
            return None

    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens, added ones among them."""
        return self._file.vocabulary()

    def files(self) -> list[Path]:
        """All files that the ids and the chat template may depend on."""
        return [path for name in FILES if (path := self.config_path.parent / name).is_file()]

    def encode_prefix(self, text: str) -> list[int]:
        """The ids of a text to be continued: one BOS if the folder wants it (also if the text spells it), no EOS."""
        ids = self._before + self.encode_plain(text)
        while self.adds_bos and ids[1:2] == [self.bos_token_id]:
            ids = ids[1:]
        return ids

    @cached_property
    def puts_a_space(self) -> bool:
        """Whether a text has other ids where no text precedes it: sentencepiece models put a space before it."""
        alone, behind = map(self.encode_plain, ("yes", "\nyes"))
        return behind[-len(alone) :] != alone

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids` by the file's decoder; no clean-up of spaces. Ids beyond the vocabulary are left out."""
        skipped = self.special_ids if skip_special_tokens else ()
        return self._file.decode([i for i in ids if i not in skipped])

    def decode_continuation(self, prompt_ids: list[int], ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text that `ids` add to that of `prompt_ids`, with any character that the prompt holds only a part of."""
        return StreamDecoder(self, prompt_ids, skip_special_tokens).flush(ids)

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The id of the token that the chat template puts at the end of an assistant's turn; None if there is none."""
        behind = "" if self.chat_template is None else self.chat_template.behind_an_answer
        return next((i for i in self.encode_plain(behind) if i in self.added_texts), None)

    @property
    def ends_of_turn(self) -> list[int]:
        """The ids that may end an assistant's turn, as far as there are any: the chat template's own, then EOS."""
        return [i for i in (self.end_of_turn_id, self.eos_token_id) if i is not None]


class _Fast:
    """tokenizer.json, run by tokenizers. size: of the vocabulary; around: ids that it adds before and after a text."""

    bos_by_default, named = False, {}

    def __init__(self, path: Path, no_space: bool):
        """no_space: puts no space before a text, whatever the file says."""
        content = path.read_text(encoding="utf-8")
        file = tokenizers.Tokenizer.from_str(_without_prefix(content) if no_space else content)
        file.no_truncation()
        file.no_padding()
        vocab = file.get_vocab(with_added_tokens=False)
        self.size = max(vocab.values(), default=-1) + 1
        falls_back = file.decoder is not None and b"ByteFallback" in file.decoder.__getstate__()
        self.byte_ids = {vocab.get(f"<0x{byte:02X}>") for byte in range(256)} if falls_back else set()
        self.around = _around(file)
        self.token_to_id, self.vocabulary = file.token_to_id, file.get_vocab
        self.encoding = partial(file.encode, add_special_tokens=False)
        self.encode = lambda text: file.encode_batch_fast([text], add_special_tokens=False)[0].ids
        self.decode = lambda ids: file.decode(ids, skip_special_tokens=False)
        self.added_tokens = file.get_added_tokens_decoder
        self.add = lambda token, _: file.add_tokens([token])


class _SentencePiece:
    """tokenizer.model, run by sentencepiece; added tokens are found in a text by tokenizers."""

    bos_by_default, around = True, ([], [])  # as in LLaMA's own code
    byte_ids = frozenset()  # sentencepiece keeps the characters next to an invalid byte

    def __init__(self, path: Path, no_space: bool):
        """no_space: puts no space before a text, whatever the file says."""
        if not (data := path.read_bytes()):
            raise ValueError("the file is empty")
        from sentencepiece import SentencePieceProcessor  # folders with a tokenizer.json do not need it

        data += NO_DUMMY_PREFIX * no_space
        self._processor = SentencePieceProcessor(model_proto=data)
        self.size = self._processor.get_piece_size()
        self._ids = {self._processor.id_to_piece(i): i for i in range(self.size)}
        self.added, self._found = {}, {}  # id -> AddedToken; the finder's id -> ours
        self.token_to_id, self.vocabulary, self.added_tokens = self._ids.get, self._ids.copy, lambda: self.added
        self._finder = tokenizers.Tokenizer(WordLevel({"": 0}, unk_token=""))  # all other text is one unknown word
        for i in range(self.size):
            if self._processor.is_control(i) or self._processor.is_unknown(i):
                self.add(AddedToken(self._processor.id_to_piece(i), special=True, normalized=False), i)
        ids = {name: getattr(self._processor, f"{name[:3]}_id")() for name in NAMED_TOKENS[:3]}
        self.named = {name: self._processor.id_to_piece(i) for name, i in ids.items() if i >= 0}

    def add(self, token: AddedToken, declared: int | None) -> None:
        i = self._ids.setdefault(token.content, declared or max([self.size - 1, *self.added]) + 1)
        self._finder.add_tokens([token])
        self.added[i], self._found[self._finder.token_to_id(token.content)] = token, i

    def encoding(self, text: str) -> None:
        pass  # sentencepiece gives places in the normalised text, not in this one

    def encode(self, text: str) -> list[int]:
        found, ids = self._finder.encode(text), []
        for i, (start, end) in zip(found.ids, found.offsets, strict=True):
            ids += [self._found[i]] if i else self._processor.encode(text[start:end])
        return ids

    def decode(self, ids: list[int]) -> str:
        texts = []
        for is_added, run in groupby(ids, self.added.__contains__):
            known = [i for i in run if is_added or i < self.size]
            texts += [self.added[i].content for i in known] if is_added else [self._processor.decode(known)]
        return "".join(texts)


def _around(file: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a post-processor adds before and after a text, seen around any text that has ids: a vocabulary of
    digits has none for a letter."""
    for texts in (lambda: "a", file.get_vocab):  # the vocabulary takes a while
        for text in texts():
            encoding = file.encode(text)
            if 0 in (is_put := encoding.special_tokens_mask):
                return encoding.ids[: is_put.index(0)], encoding.ids[len(is_put) - is_put[::-1].index(0) :]
    return [], []


def _is_llama(config: dict) -> bool:
    return str(config.get("tokenizer_class")).startswith(("Llama", "CodeLlama"))


def _without_prefix(content: str) -> str:
    """Changes the content of a tokenizer.json so that it puts no space before a text and strips none."""
    state = json.loads(content)
    for name, steps in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")):
        part = state.get(name) or {"type": "Sequence", steps: []}
        kept = [step for step in part.get(steps, [part]) if step["type"] not in ("Prepend", "Strip")]
        kept = [{**step, "prepend_scheme": "never"} if step["type"] == "Metaspace" else step for step in kept]
        state[name] = {"type": "Sequence", steps: kept} if kept else None
    return json.dumps(state)


def _add_tokens(file: _Fast | _SentencePiece, folder: Path, config: dict) -> dict[str, str]:
    """Adds tokens that the folder's other files declare; returns the named ones, {"bos_token": "<s>", ...}."""
    files = (folder / "special_tokens_map.json", folder / "added_tokens.json")
    older, added = (read_json_object(path, missing_ok=True) for path in files)
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} if _is_llama(config) else file.named
    settings = {name: token for name, token in defaults.items() if file.token_to_id(token) is not None}
    # transformers reads special_tokens_map.json only without an added_tokens_decoder, and then it takes precedence
    stated = {**older, **config} if "added_tokens_decoder" in config else {**config, **older}
    settings |= {name: value for name, value in stated.items() if value != ""}  # the first LLaMA folders have ""
    for name in NAMED_TOKENS:  # with an EOS token that is not read, no answer would end
        if not isinstance(settings.get(name), str | dict | None):
            raise ValueError(f"{name} must be a string or an object, not {settings[name]!r}")
    names = [*NAMED_TOKENS, *(key for key in settings if key.endswith("_token") and key not in NAMED_TOKENS)]
    named = {name: _token(settings[name], True) for name in names if isinstance(settings.get(name), str | dict)}
    extra, more = settings.get("extra_special_tokens") or [], settings.get("additional_special_tokens") or []
    if isinstance(extra, dict):  # {name: token}, and additional_special_tokens may list more; a list has them all
        extra = [*extra.values(), *more]
    more = [_token(entry, True) for entry in extra or more]
    special = {token.content for token in (*named.values(), *more)}
    listed = {i: AddedToken(content, normalized=content not in special) for content, i in added.items()}
    decoder = {int(i): _token(entry) for i, entry in config.get("added_tokens_decoder", {}).items()}
    listed |= decoder
    wrong = next((i for i in listed if type(i) is not int or not 0 <= i < 2**31), None)
    if wrong is not None:
        raise ValueError(f"the id of {listed[wrong].content!r} is {wrong!r}, not an id (here or in {files[1].name})")
    known = {token.content: token for token in file.added_tokens().values()}
    for i, token in (*sorted(listed.items()), *((None, token) for token in (*named.values(), *more))):
        if token.content and token.content not in known:
            token.special = token.special or token.content in special
            file.add(token, i)
            known[token.content] = token
            if i not in (None, file.token_to_id(token.content)):
                raise ValueError(f"{token.content!r} has the id {i}, which is not the next free one")
        elif i in decoder and i == file.token_to_id(token.content):  # its flags count, as in transformers
            token.special = token.special or known[token.content].special
            if token.__getstate__() != known[token.content].__getstate__():
                file.add(token, i)
    return {name: token.content for name, token in named.items()}


def _token(entry: str | dict, special: bool = False) -> AddedToken:
    if isinstance(entry, str):
        return AddedToken(entry, special=special, normalized=False)
    flags = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in entry}
    return AddedToken(entry["content"], special=special or entry.get("special", False), **flags)


def chat_day(stated: str | None, earlier: str | None = None) -> date:
    """The date that chat templates are told: the stated one, else that of the resumed run, else today. Raises
    ValueError if it is not a date."""
    if stated is None and earlier is None:
        return datetime.now().date()
    try:
        return date.fromisoformat(stated or earlier)
    except ValueError:
        raise ValueError(f"--chat_date {stated or earlier}: not a day, YYYY-MM-DD") from None
