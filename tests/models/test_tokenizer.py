"""models/tokenizer.py against the folder's own file, as sentencepiece and tokenizers read it: ids, texts, streams.
Where transformers 5.23 has other ids, the second test says why."""

import io
import json
import random
import shutil

import pytest
import sentencepiece
import tokenizers
import transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.parts import encode_continuation
from models.streaming import StreamDecoder
from models.tokenizer import Tokenizer
from tests.file_tokenizer import FileTokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog says: 12 + 34 = 46.",
    "def add(x, y):\n    return x + y  # naïve café, hello hello",
    "Question: how many apples are there?  Answer: there are 7 apples; hello there.",
    "user assistant system the and of to in is that it for on with as are this by",
] * 8
ALPHABET = [
    *"abc AB 01 .,\n\t  ",
    *("\u2581", "é", "ß", "日本", "🙂", "👩\u200d👩\u200d👧", "e\u0301", "ﬁ", "①"),
    *("\u00a0", "\u2028", "\ufffd", "\x00"),
    *("\r\n", "</s>", "<s>", "<unk>", "<|im_end|>", "<pad>", "[X]", "hello", " the", "<0x41>", "<|eot_id|>"),
]
EDGES = ["", " ", "  ", "\n", " a", "a ", "a  b", "</s>", "<s>a", " <s> a", "<s>\na </s> b", "\t\n a", "🙂"]
EDGES.append("a</s>b <s> c")


def hostile_texts(count, seed=0):
    draw = random.Random(seed)
    return EDGES + ["".join(draw.choices(ALPHABET, k=draw.randrange(1, 14))) for _ in range(count)]


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}


def write(folder, **files):
    """A tokenizer folder: `name=dict` becomes name.json; files already there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config": {"model_type": "llama"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def sentencepiece_folder(folder, config, model="identity", **files):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(MODELS[model], folder / "tokenizer.model")
    files["tokenizer_config"] = {"tokenizer_class": "LlamaTokenizer", "add_eos_token": False, **config}
    return write(folder, **files)


MODELS = {}


@pytest.fixture(scope="session", autouse=True)
def trained_models(tmp_path_factory):
    """sentencepiece models like Llama-2's (identity), with sentencepiece's defaults, without the space before a text,
    with own symbols, and unigram."""
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    kinds = {
        "identity": identity,
        "nmt_nfkc": {},
        "no_prefix": {**identity, "add_dummy_prefix": False},
        "symbols": {**identity, "user_defined_symbols": ["0", "<|im_end|>"], "control_symbols": ["<pad>"]},
        "unigram": {"model_type": "unigram"},
    }
    for name, options in kinds.items():
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_writer=written,
            **{"model_type": "bpe", **options},
            **{"vocab_size": 420, "byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
            **{"hard_vocab_limit": False, "character_coverage": 0.98, "minloglevel": 2, "num_threads": 1},
        )
        MODELS[name] = tmp_path_factory.mktemp("spm") / f"{name}.model"
        MODELS[name].write_bytes(written.getvalue())


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_folder(folder, kind, class_name="PreTrainedTokenizerFast", **names):
    """Llama-3-like (split by regex, TemplateProcessing puts BOS) or DeepSeek-like (normalizer, several splits)."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
        splits = [pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")]
    else:
        special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|im_end|>"]
        backend.normalizer = normalizers.Sequence([])
        patterns = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+"]
        splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
        splits.append(pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    backend.add_special_tokens(special)
    bos = [(special[0], backend.token_to_id(special[0]))]
    template = processors.TemplateProcessing(single=[f"{special[0]}:0", "$A:0"], special_tokens=bos)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    names = {"bos_token": special[0], "eos_token": special[1], **names}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    # the flag contradicts the file's post-processor on purpose: transformers goes by the latter
    return write(folder, tokenizer_config={**config, "tokenizer_class": class_name, "add_bos_token": False})


def json_folder(folder, backend, **config):
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return write(folder, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", **config})


def llama2_json():
    """As Llama-2's tokenizer.json: a normaliser puts U+2581 before every stretch, the decoder takes one away."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(MODELS["identity"]))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    pairs = [(p[:i], p[i:]) for p in vocab for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def word_json(model, decoder):
    """WordLevel, WordPiece or Unigram over words, with any decoder or none."""
    words = ["<unk>", "<s>", "</s>", "[UNK]", *dict.fromkeys(" ".join(LINES).split()), *"abchelo", "##l", "##lo", "##s"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    made = {
        "level": lambda: models.WordLevel(vocab, unk_token="<unk>"),
        "piece": lambda: models.WordPiece(vocab, unk_token="<unk>"),
        "unigram": lambda: models.Unigram([(word, -float(i)) for word, i in vocab.items()], unk_id=0),
    }
    backend = tokenizers.Tokenizer(made[model]())
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if decoder is not None:
        backend.decoder = decoder
    return backend


FOLDERS = {
    "sentencepiece": lambda f: sentencepiece_folder(f, {"add_bos_token": True, "legacy": False}),
    "bos_by_default": lambda f: sentencepiece_folder(f, {}),
    "no_bos": lambda f: sentencepiece_folder(f, {"add_bos_token": False, "add_eos_token": True}),
    "no_prefix": lambda f: sentencepiece_folder(f, {}, "no_prefix"),
    "nmt_nfkc": lambda f: sentencepiece_folder(f, {}, "nmt_nfkc"),
    "unigram": lambda f: sentencepiece_folder(f, {"tokenizer_class": None}, "unigram"),
    "llama2_json": lambda f: json_folder(f, llama2_json(), tokenizer_class="LlamaTokenizer", legacy=False),
    "llama3": lambda f: byte_level_folder(f, "llama3"),
    "deepseek": lambda f: byte_level_folder(f, "deepseek", "LlamaTokenizerFast"),
    "word_level": lambda f: json_folder(f, word_json("level", None)),
    "fuse": lambda f: json_folder(f, word_json("level", decoders.Fuse())),
    "word_piece": lambda f: json_folder(f, word_json("piece", decoders.WordPiece(cleanup=True))),
    "bpe_suffix": lambda f: json_folder(f, word_json("level", decoders.BPEDecoder())),
    "metaspace": lambda f: json_folder(f, word_json("unigram", decoders.Metaspace())),
}


@pytest.fixture(scope="module", params=FOLDERS)
def files(request, tmp_path_factory):
    folder = FOLDERS[request.param](tmp_path_factory.mktemp(request.param))
    return request.param, Tokenizer(folder), FileTokenizer(folder)


def test_ids_are_those_of_the_file(files):
    """Catches a file that is rebuilt instead of read: its normaliser, pre-tokeniser or decoder replaced, the space
    before a text added or dropped, BOS or EOS lost or doubled, a decoder refused; text that changes on the way back."""
    name, ours, file = files
    draw, lossless = random.Random(3), name in ("llama3", "deepseek")
    for text in hostile_texts(100):
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == file(text, special)["input_ids"], (text, special)
        ids = ours.encode(text, add_special_tokens=False)
        if isinstance(file.file, tokenizers.Tokenizer):
            for skip in (True, False):
                assert ours.decode(ids, skip) == file.file.decode(ids, skip_special_tokens=skip), (text, skip)
        if lossless or (name in ("sentencepiece", "bos_by_default", "no_prefix") and "\u2581" not in text):
            assert ours.decode(ids, skip_special_tokens=False) == text
        cut = draw.randrange(len(ids) + 1)
        for prompt, rest in (([], ids), (ids[:cut], ids[cut:])):
            stream = StreamDecoder(ours, prompt, skip_special_tokens=False)
            joined = "".join(map(stream.push, rest)) + stream.flush()
            assert joined == ours.decode_continuation(prompt, rest, skip_special_tokens=False)
            if not ours.decode(prompt, False).endswith("\ufffd"):
                assert ours.decode(prompt, False) + joined == ours.decode(ids, False)
    assert ours.adds_bos == (file("")["input_ids"][:1] == [file.bos_token_id])


def test_where_transformers_differs(tmp_path):
    """Catches transformers 5.23's own ids copied: LLaMA's normaliser rebuilt, so that "<s>[" and " a" lose a space, and
    BOS dropped where a post-processor without it is there; and a BOS lost because its name is empty. Right is what the
    weights saw: LLaMA's own code encodes each stretch of a chat by itself with sentencepiece, and DeepSeek trained with
    add_bos_token's BOS."""
    ours = Tokenizer(json_folder(tmp_path / "l", llama2_json(), tokenizer_class="LlamaTokenizer", legacy=False))
    model = sentencepiece.SentencePieceProcessor(model_file=str(MODELS["identity"]))
    assert ours.encode("<s>[INST] a", add_special_tokens=False) == [1, *model.encode("[INST] a")]
    assert ours.encode(" a") == [1, *model.encode(" a")]
    folder = json_folder(tmp_path / "d", word_json("level", None), add_bos_token=True)
    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.post_processor = processors.ByteLevel(trim_offsets=False)
    file.save(str(folder / "tokenizer.json"))
    deepseek = Tokenizer(folder)
    assert deepseek.encode("hello")[0] == deepseek.bos_token_id == 1 and deepseek.adds_bos
    assert deepseek.encode_prefix("<s> hello").count(1) == 1
    unnamed = {"bos_token": "", "eos_token": "", "unk_token": ""}  # of the first LLaMA folders; transformers recurses
    first = Tokenizer(sentencepiece_folder(tmp_path / "f", {**unnamed, "tokenizer_class": "LLaMATokenizer"}))
    assert first.encode("a b") == [1, *model.encode("a b")] and first.eos_token_id == 2
    if transformers.__version__ == "5.23.0":
        assert AutoTokenizer.from_pretrained(tmp_path / "l")("<s>[INST] a")["input_ids"][2:] != model.encode("[INST] a")
        assert 1 not in AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]


@pytest.mark.parametrize("kind", ["model", "legacy", "metaspace"])
def test_no_space_before_a_text(kind, tmp_path):
    """Catches "add_prefix_space": false ignored: against transformers, and sentencepiece's own model without it."""
    config = {"add_prefix_space": False, "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    if kind == "model":
        folder = sentencepiece_folder(tmp_path, config)
    else:
        backend = llama2_json()
        if kind == "metaspace":
            backend.normalizer, backend.pre_tokenizer = (
                None,
                pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            )
        folder = json_folder(tmp_path, backend, **config)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    proto = sentencepiece_model_pb2.ModelProto.FromString(MODELS["identity"].read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    alone = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in ("hello world", " hello", "a</s>b c", "<s> y\nz", "na\u00efve \U0001f642 x"):
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text), False) == "<s>" + text
        assert ours.decode(ours.encode(text)[1:], False) == text
        if "<" not in text:
            assert ours.encode(text) == [1, *alone.encode(text)]
    assert not ours.puts_a_space and Tokenizer(FOLDERS["sentencepiece"](tmp_path / "with")).puts_a_space


def test_a_text_goes_on_from_another(files):
    """Catches a second space between a prompt that ends in one and its completion, and the loss of a space that the
    file puts after a special token."""
    name, ours, _ = files
    if name not in ("sentencepiece", "no_prefix", "llama2_json", "llama3", "deepseek"):
        return
    for before, text in (("Answer: ", "yes"), ("Answer:", " yes"), ("a\n", "\n b"), ("The an", "swer"), ("", "x y")):
        ids = ours.encode(before, add_special_tokens=False)
        whole = ids + encode_continuation(text, ids, ours)
        assert ours.decode(whole) == before + text, (before, text)
    end = [ours.eos_token_id]
    both = ours.encode(ours.decode(end, False) + "hello", add_special_tokens=False)
    assert end + encode_continuation("hello", end, ours) == both


@pytest.mark.parametrize("kind", ["model", "json"])
def test_tokens_declared_beside_the_file(kind, tmp_path):
    """Catches added_tokens_decoder, special_tokens_map.json and added_tokens.json unread beside either file, one of
    them read where another wins, and an id other than the declared one, which would be another embedding."""

    def make(name, config, **files):
        if kind == "model":
            return sentencepiece_folder(tmp_path / name, config, **files)
        folder = json_folder(tmp_path / name, llama2_json(), tokenizer_class="LlamaTokenizer", **config)
        return write(folder, **files)

    size = sentencepiece.SentencePieceProcessor(model_file=str(MODELS["identity"])).get_piece_size()
    older = {
        "special_tokens_map": {"bos_token": token("<s>"), "eos_token": "<|im_end|>", "pad_token": "<pad>"},
        "added_tokens": {"<|im_end|>": size, "[X]": size + 1},
    }
    ours = Tokenizer(make("a", {}, **older))
    assert (ours.eos_token_id, ours.pad_token_id, max(ours.added_texts)) == (size, size + 2, size + 2)
    assert (
        ours.encode("a<|im_end|>", False)[-1] == size
        and ours.encode("[X]", False)[-1] == size + 1
        and ours.base_vocab_size == size
    )
    assert ours.decode([size, size + 1]) == "[X]", "a named token is special, an added one is not"
    declared = {str(size): token("<|im_end|>", special=True), str(size + 1): token("[X]", lstrip=True, rstrip=True)}
    ours = Tokenizer(make("b", {"added_tokens_decoder": declared, "eos_token": "</s>"}, **older))
    a, b = (ours.encode(text, add_special_tokens=False) for text in "ab")
    assert ours.eos_token_id == 2 and ours.encode("a [X] b", False) == [*a, size + 1, *b]
    gap = make("c", {"added_tokens_decoder": {str(size + 5): token("<|im_end|>")}})
    if kind == "model":
        assert Tokenizer(gap).encode("<|im_end|>", False) == [size + 5]
    else:
        with pytest.raises(ValueError, match=r"tokenizer_config.json: .*'<\|im_end\|>' has the id"):
            Tokenizer(gap)


def test_symbols_of_a_sentencepiece_model(tmp_path):
    """Catches a control symbol of the model taken for text, and one of its own symbols not found in a text."""
    ours = Tokenizer(sentencepiece_folder(tmp_path, {}, "symbols"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(MODELS["symbols"]))
    assert ours.encode("a<|im_end|><pad>", False) == [*model.encode("a<|im_end|>"), model.piece_to_id("<pad>")]
    assert ours.decode([model.piece_to_id("<pad>")]) == "" and "<pad>" in ours.decode(ours.encode("<pad>"), False)


def test_tiktoken_model_beside_tokenizer_json(tmp_path):
    """Catches Llama 3's tiktoken file tokenizer.model taken for a sentencepiece model."""
    byte_level_folder(tmp_path, "llama3")
    wanted = Tokenizer(tmp_path).encode("hello")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert Tokenizer(tmp_path).encode("hello") == wanted


@pytest.fixture(params=["sentencepiece", "llama2_json", "llama3"])
def folder(request, tmp_path):
    return FOLDERS[request.param](tmp_path)


def random_ids(ours, draw, length):
    """Ids of a text, three in ten replaced by any ids: characters cut everywhere, broken ones, special tokens."""
    text_ids = ours.encode("".join(draw.choices(ALPHABET, k=length)), add_special_tokens=draw.random() < 0.5)
    return [i if draw.random() < 0.7 else draw.randrange(len(ours.vocabulary())) for i in text_ids][:length]


def test_streaming_loses_nothing(folder):
    """Catches a stream that differs from the whole text, and a continuation that does not continue its prompt."""
    ours, draw = Tokenizer(folder), random.Random(1)
    for _ in range(300):
        prompt, ids = random_ids(ours, draw, draw.randrange(6)), random_ids(ours, draw, draw.randrange(20))
        if prompt and prompt[-1] in ours.byte_ids:
            continue  # a run of bytes is decoded as one: an invalid byte undoes those before it
        stream = StreamDecoder(ours, prompt)
        parts = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(parts) == ours.decode_continuation(prompt, ids)
        before = ours.decode(prompt)  # maybe with a part of a character, which these ids complete
        if before.strip():
            wholes = {begin + "".join(parts) for begin in (before, before.rstrip("\ufffd"))}
            assert ours.decode(prompt + ids) in wholes
    assert ours.decode_continuation(ours.encode("a"), [len(ours.vocabulary()) + 5]) == ""
    if ours.byte_ids:  # a special token within a run of bytes, of which the second undoes the first
        letter, wrong = map(ours.vocabulary().get, ("<0x41>", "<0xFF>"))
        prompt, ids = ours.encode("a"), [letter, ours.eos_token_id, wrong]
        stream = StreamDecoder(ours, prompt)
        assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode_continuation(prompt, ids)


def test_stream_holds_back_half_characters(folder):
    """Catches U+FFFD shown for an emoji whose bytes are still arriving, and whole characters held back needlessly."""
    ours = Tokenizer(folder)
    text = "né 日本🙂, 👩\u200d👩\u200d👧 done"
    prompt, ids = ours.encode("say"), ours.encode("x" + text, add_special_tokens=False)
    stream, shown = StreamDecoder(ours, prompt), ""
    for i, token_id in enumerate(ids):
        shown += stream.push(token_id)
        assert "\ufffd" not in shown
        # nothing more is held back, but for a run of byte tokens, which tokenizers decodes as one
        assert ids[i] in ours.byte_ids or shown == ours.decode_continuation(prompt, ids[: i + 1]).rstrip("\ufffd")
    assert shown.endswith(text) and stream.flush() == ""
    cut = next(i for i in range(len(ids)) if ours.decode(ids[: i + 1]).endswith("\ufffd"))
    stream = StreamDecoder(ours, prompt)
    assert "\ufffd" not in "".join(map(stream.push, ids[: cut + 1])) and stream.flush() == "\ufffd"
    # a prompt cut by force within a character: its bytes are not lost
    assert ours.decode_continuation(prompt + ids[: cut + 1], ids[cut + 1 :])[0] in "é日本🙂"


def test_leading_space_of_a_continuation(tmp_path):
    """Catches the space before an answer's first word dropped behind a text, or kept at the start of a text."""
    for ours in (Tokenizer(FOLDERS[name](tmp_path / name)) for name in ("sentencepiece", "llama2_json")):
        word = ours.encode("hello", add_special_tokens=False)
        assert ours.decode_continuation(ours.encode("the"), word) == " hello"
        assert ours.decode_continuation([ours.bos_token_id], word) == "hello"
        assert ours.decode_continuation([], ours.encode("  two")) == "  two"
        assert ours.decode_continuation(ours.encode("🙂" * 9), encode_continuation("🙂", [], ours)).endswith("🙂")


def test_pad_is_never_eos(tmp_path):
    """Catches pad = EOS, which would hide every EOS from the loss."""
    ours = Tokenizer(sentencepiece_folder(tmp_path / "a", {"pad_token": "</s>"}))
    assert (ours.eos_token_id, ours.pad_token_id) == (2, 0)
    ours = Tokenizer(sentencepiece_folder(tmp_path / "b", {"pad_token": "<s>", "eos_token": "<unk>"}))
    assert (ours.eos_token_id, ours.pad_token_id) == (0, 1)
    ours = Tokenizer(sentencepiece_folder(tmp_path / "c", {"eos_token": "<unk>"}))
    assert (ours.eos_token_id, ours.pad_token_id) == (0, 2)
