"""Text to token ids and back, from the tokenizer files of a Hugging Face folder.

- ids equal transformers' (5.23), special tokens written in the text included. `tokenizer.json` runs in `tokenizers`; a
  `tokenizer.model` is opened by sentencepiece and its pieces become the same kind of BPE, because transformers treats
  spaces otherwise than sentencepiece. Of two files transformers reads `tokenizer.json`, and so does this one
- a folder of class LlamaTokenizer gets transformers' Llama rules whatever its files say: no normalisation, spaces are
  U+2581, and one is prepended where the text has none (after each special token too, if `legacy` is true)
- BOS and EOS: from the post-processor of `tokenizer.json`, else from add_bos_token / add_eos_token (absent means no)
- decoding is bytes: an id stands for some bytes, a text is their UTF-8, so whole and streamed texts share one code path
- chat templates are untrusted code: sandboxed Jinja. The template alone decides about BOS
"""

import codecs
import json
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing

SPACE = "\u2581"  # how a sentencepiece vocabulary writes a space
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")
INFILLING = ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>", "<FILL_ME>")
GENERIC_CLASSES = (None, "PreTrainedTokenizer", "TokenizersBackend")


class Tokenizer:
    """The tokenizer of a Hugging Face folder.

    bos_token_id, eos_token_id: int, or None where the folder names no such token.
    pad_token_id: int, never EOS. The folder's own pad token; else `<unk>`, else the first id that is neither EOS nor
        BOS. The latter two are ordinary tokens: pad is filler for masked places, no text is ever recognised by it.
    vocab_size: the largest id + 1, added tokens included; base_vocab_size: without them.
    special_ids: the ids that decoding leaves out.
    adds_bos, adds_eos: whether encode() puts a BOS before, an EOS behind the text.
    chat_template: the Jinja source, or None.
    Raises FileNotFoundError (no tokenizer files) and ValueError (a file that cannot be used), naming the file.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.config_path = folder / "tokenizer_config.json"
        config = _read_json(self.config_path)
        model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
        kind = _class_name(config)
        llama_names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} if kind in LLAMA_CLASSES else {}
        pieces = []
        if fast.is_file():
            self._backend, follows_llama = _open_tokenizer_json(fast, config)
            named = llama_names if follows_llama else {}
        elif model.is_file():
            self._backend, own_names, pieces = _open_sentencepiece(model, config)
            named = llama_names or own_names
        else:
            raise FileNotFoundError(f"{folder}: neither tokenizer.json nor tokenizer.model is in this folder")
        try:
            named = _add_tokens(self._backend, folder, config, named, pieces)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.config_path}: token entries cannot be used: {_one_line(error)}") from error
        self._tokens = {name: token.content for name, token in named.items()}
        if not fast.is_file() or kind == "CodeLlamaTokenizer":
            # transformers disregards the flags beside a tokenizer.json, and CodeLlamaTokenizer has BOS by default
            flags = {} if fast.is_file() else config
            bos = self._tokens.get("bos_token") if flags.get("add_bos_token", kind == "CodeLlamaTokenizer") else None
            eos = self._tokens.get("eos_token") if flags.get("add_eos_token", False) else None
            self._backend.post_processor = TemplateProcessing(
                single=[f"{bos}:0"] * bool(bos) + ["$A:0"] + [f"{eos}:0"] * bool(eos),
                special_tokens=[(token, self._backend.token_to_id(token)) for token in (bos, eos) if token],
            )
        self._backend.no_truncation()
        self._backend.no_padding()

        self.bos_token_id, self.eos_token_id = self._id("bos_token"), self._id("eos_token")
        unk = self._id("unk_token")
        fillers = (self._id("pad_token"), self._backend.token_to_id("<unk>") if unk is None else unk)
        last_resort = (i for i in range(3) if i != self.bos_token_id)
        self.pad_token_id = next(i for i in (*fillers, *last_resort) if i not in (None, self.eos_token_id))
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.base_vocab_size = max(self._backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        nothing = self.encode("")
        self.adds_bos = self.bos_token_id is not None and nothing[:1] == [self.bos_token_id]
        self.adds_eos = self.eos_token_id is not None and nothing[self.adds_bos :][-1:] == [self.eos_token_id]
        self.chat_template = _read_chat_template(folder, config)

        added = self._backend.get_added_tokens_decoder()
        self.special_ids = {i for i, token in added.items() if token.special}
        self._byte_level, self._strips_space = _decoding_rules(self._backend, fast if fast.is_file() else model)
        self._bytes = {}  # id -> bytes, filled as ids come by

    def _id(self, name):
        return self._backend.token_to_id(self._tokens[name]) if name in self._tokens else None

    def encode(self, text, add_special_tokens=True):
        """The ids of `text`, a list. Special tokens written in the text become their ids, as in transformers.

        add_special_tokens: with the BOS / EOS that the folder asks for (see adds_bos, adds_eos).
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            fault = "holds a lone surrogate: no valid Unicode" if isinstance(text, str) else "must be a string"
            raise ValueError(f"the text to encode {fault}: {ascii(text)[:60]}") from error

    def token_bytes(self, token_id):
        """What one id stands for, as bytes: part of a character, if need be. Ids outside the vocabulary are empty."""
        if token_id not in self._bytes:
            piece = self._backend.id_to_token(token_id)
            self._bytes[token_id] = _piece_bytes(piece or "", self._byte_level)
        return self._bytes[token_id]

    def decode(self, ids, skip_special_tokens=True):
        """The text of `ids`; no clean-up of spaces. Bytes that are not UTF-8 become U+FFFD, valid neighbours stay."""
        return self.decode_continuation([], ids, skip_special_tokens)

    def decode_continuation(self, prompt_ids, ids, skip_special_tokens=True):
        """The text that `ids` add behind `prompt_ids`: decode(prompt_ids) + this = decode(prompt_ids + ids).

        A prompt that ends within a character (cut by force) hands the bytes of that character over to this text.
        """
        stream = StreamDecoder(self, prompt_ids, skip_special_tokens)
        return stream.push_all(ids) + stream.flush()

    def apply_chat_template(self, messages, *, add_generation_prompt):
        """The text of a chat, `messages` = [{"role": ..., "content": ...}, ...], by the folder's template."""
        if self.chat_template is None:
            raise ValueError(
                f"{self.config_path.parent}: no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); add one or use plain text prompts"
            )
        return _render(self.chat_template, _checked(messages), add_generation_prompt, self._tokens, self.config_path)

    def encode_chat(self, messages, *, add_generation_prompt):
        """The ids of a chat. Nothing is added to what the template writes, so a BOS comes from it or not at all."""
        text = self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)


class StreamDecoder:
    """The text of an answer, token by token, with whole characters only.

    push(token_id) returns the text that is certain by now, maybe ""; flush() what is left (U+FFFD for a character that
    never got complete). All of it together is tokenizer.decode_continuation(prompt_ids, all ids). The cost is constant.
    """

    def __init__(self, tokenizer, prompt_ids, skip_special_tokens=True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Two things about the prompt matter: has it any text (the first space of a text is dropped), and does it end
        # within a character: at most 3 bytes, so a short tail tells.
        self._strip = tokenizer._strips_space and not any(map(self._piece, prompt_ids))
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self._piece(token_id) + tail
            if len(tail) >= 4:
                break
        self._utf8.decode(tail)

    def _piece(self, token_id):
        return b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)

    def push(self, token_id):
        return self.push_all((token_id,))

    def push_all(self, token_ids):
        data = b"".join(map(self._piece, token_ids))
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self):
        return self._utf8.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------------------------------
# From files to a backend


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def _read_json(path):
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _class_name(config):
    name = config.get("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else None


def _open_tokenizer_json(path, config):
    """(backend, Llama's rules apply) from tokenizer.json; where they do, only the file's BPE is used."""
    try:
        text = path.read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
        if _class_name(config) not in LLAMA_CLASSES or '"ByteLevel"' in text or not isinstance(backend.model, BPE):
            return backend, False
        content = json.loads(text)
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in content["model"]["merges"]]
        llama = _llama_backend(content["model"]["vocab"], merges, config)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a usable tokenizer.json: {_one_line(error)}") from error
    llama.post_processor = backend.post_processor or TemplateProcessing(single=["$A:0"], special_tokens=[])
    config.setdefault("added_tokens_decoder", {token.pop("id"): token for token in content["added_tokens"]})
    return llama, True


def _open_sentencepiece(path, config):
    """(backend, named special tokens, added tokens) from a sentencepiece model, as transformers makes them."""
    kind = _class_name(config)
    if kind not in LLAMA_CLASSES and kind not in GENERIC_CLASSES:
        raise ValueError(f"{path}: tokenizer_class {kind} is not supported with tokenizer.model; add a tokenizer.json")
    try:
        data = path.read_bytes()
        if not data:
            raise ValueError("the file is empty")
        processor = SentencePieceProcessor(model_proto=data)
        model = list(_protobuf(data))  # for what the processor does not tell
    except Exception as error:
        raise ValueError(
            f"{path}: not a sentencepiece model, and there is no tokenizer.json to use instead: {_one_line(error)}"
        ) from error
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    # sentencepiece_model.proto: ModelProto 1 pieces, 2 trainer, 3 normalizer; SentencePiece.type 3: 3 control, 4 user
    # defined; TrainerSpec.model_type 3: 1 unigram; NormalizerSpec 2: precompiled_charsmap
    types = [dict(_protobuf(message)).get(3, 1) for field, message in model if field == 1]
    added = [
        AddedToken(piece, normalized=False, special=kind == 3)
        for piece, kind in zip(pieces, types, strict=True)
        if kind in (3, 4)
    ]
    if kind in LLAMA_CLASSES:
        vocab = {piece: i for i, piece in enumerate(pieces)}
        return _llama_backend(vocab, _merges(vocab), config), {}, added

    trainer, normalizer = dict(model).get(2, b""), dict(model).get(3, b"")
    byte_fallback = any(map(processor.is_byte, range(len(pieces))))
    unk = processor.unk_id()
    if dict(_protobuf(trainer)).get(3, 1) == 1:
        scored = [(piece, processor.get_score(i)) for i, piece in enumerate(pieces)]
        bpe = Unigram(scored, unk_id=unk, byte_fallback=byte_fallback)
    else:
        vocab = {piece: i for i, piece in enumerate(pieces)}
        bpe = BPE(vocab, _merges(vocab), unk_token=pieces[unk], fuse_unk=True, byte_fallback=byte_fallback)
    backend = tokenizers.Tokenizer(bpe)
    charsmap = dict(_protobuf(normalizer)).get(2)
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    backend.decoder = _sentencepiece_decoder(strip=False)
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": unk}
    return backend, {name: pieces[i] for name, i in ids.items() if i >= 0}, added


def _llama_backend(vocab, merges, config):
    code = _class_name(config) == "CodeLlamaTokenizer"
    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else prefix
    first = code or not config.get("legacy", False)
    unk = config.get("unk_token")
    unk = unk.get("content") if isinstance(unk, dict) else unk
    unk = {"unk_token": unk if isinstance(unk, str) else "<unk>"} if code else {}
    backend = tokenizers.Tokenizer(BPE(vocab, merges, fuse_unk=True, byte_fallback=True, **unk))
    scheme = ("first" if first else "always") if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    backend.decoder = _sentencepiece_decoder(strip=bool(prefix) or code)
    return backend


def _sentencepiece_decoder(*, strip):
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * strip)


def _merges(vocab):
    """The merges of a BPE vocabulary whose ids are in order of merging: every split of a piece into two pieces."""
    splits = ((piece[:cut], piece[cut:]) for piece in vocab for cut in range(1, len(piece)))
    return [(left, right) for left, right in splits if left in vocab and right in vocab]


def _protobuf(message):
    """The (field number, value) pairs of a protobuf message: int for a varint, bytes for everything else."""

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    at = 0
    while at < len(message):
        field, wire = divmod(varint(), 8)
        if wire == 0:
            yield field, varint()
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            yield field, message[at : at + size]
            at += size


def _added_token(entry, *, special):
    if isinstance(entry, AddedToken):
        return entry
    if isinstance(entry, str):
        return AddedToken(entry, special=special, normalized=False)
    flags = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in entry}
    return AddedToken(entry["content"], special=special or entry.get("special", False), **flags)


def _add_tokens(backend, folder, config, named, pieces):
    """Registers the folder's added and special tokens in `backend`; returns the named ones, {"bos_token": ...}."""
    declared = {
        int(i): _added_token(entry, special=False) for i, entry in config.get("added_tokens_decoder", {}).items()
    }
    settings = dict(config)
    if "added_tokens_decoder" not in config:  # the files that older versions of transformers wrote
        settings |= _read_json(folder / "special_tokens_map.json")
        older = _read_json(folder / "added_tokens.json")
        declared |= {int(i): AddedToken(token, normalized=True) for token, i in older.items()}
    more = settings.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not more and not pieces:
        more = settings.get("additional_special_tokens") or []
    if isinstance(more, dict) or not more:  # a list, in contrast, puts an end to a sentencepiece model's own symbols
        more = [*(more and more.values()), *pieces]
    more = [_added_token(entry, special=True) for entry in more]
    by_content = {token.content: token for token in (*declared.values(), *(t for t in pieces if t in more))}
    for name in (*NAMED_TOKENS, *(key for key in settings if key.endswith("_token") and key not in NAMED_TOKENS)):
        entry = settings.get(name, named.get(name))
        if isinstance(entry, str | dict):
            token = _added_token(entry, special=True)
            named[name] = by_content.get(token.content, token)
        else:
            named.pop(name, None)
    if _class_name(config) == "CodeLlamaTokenizer":  # transformers adds them to any vocabulary: ids that no model has
        more += [_added_token(t, special=True) for t in INFILLING if backend.token_to_id(t) is not None]

    special = {token.content for token in named.values()}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in (*(declared[i] for i in sorted(declared)), *named.values(), *more):
        if token.content and token.content not in known:
            known.add(token.content)
            token.special = token.special or token.content in special
            backend.add_tokens([token])
    return named


def _decoding_rules(backend, path):
    """(ids are byte-level, the first space of a text is dropped) from the backend's decoder."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    steps = {step["type"]: step for step in state.get("decoders", [state]) if step}
    if "ByteLevel" in steps:
        return True, False
    if not steps.keys() & {"ByteFallback", "Metaspace", "Replace"}:
        raise ValueError(
            f"{path}: decoder {sorted(steps)} is not supported, only ByteLevel and sentencepiece-like ones"
        )
    return False, "Strip" in steps or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never"


def _byte_of_char():
    """The inverse of GPT-2's table, which writes every byte as a visible character."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF_CHAR = _byte_of_char()


def _piece_bytes(piece, byte_level):
    if byte_level:
        if all(char in BYTE_OF_CHAR for char in piece):
            return bytes(BYTE_OF_CHAR[char] for char in piece)
        return piece.encode()  # an added token, as it is
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace(SPACE, " ").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates


def _read_chat_template(folder, config):
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not readable: {_one_line(error)}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is neither a string nor a list of them")
    return template


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, transformers' mark around an assistant's turn: its body, as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _checked(messages):
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f'chat messages must be a non-empty list of {{"role", "content"}}, not {type(messages).__name__}'
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'chat message {i} must be an object with the strings "role" and "content"')
    # transformers hides keys without a value from the template
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _render(template, messages, add_generation_prompt, tokens, path):
    try:
        return _compiled(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **tokens
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{path.parent}: chat template, line {error.lineno}: {_one_line(error)}") from error
    except Exception as error:  # the template is a program of its own: it can fail in any way
        raise ValueError(f"{path.parent}: chat template failed: {type(error).__name__}: {_one_line(error)}") from error


@lru_cache
def _compiled(template):
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
