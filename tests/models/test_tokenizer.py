"""models/tokenizer.py against transformers 5.23.0, on folders written here: ids, texts, streams, chats, errors.

Other versions treat some of these folders otherwise (5.24 those without a tokenizer_class), so what compares ids with
them is skipped there.
"""

import io
import json
import random
import shutil

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.tokenizer import StreamDecoder, Tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog says: 12 + 34 = 46.",
    "def add(x, y):\n    return x + y  # naïve café, hello hello",
    "Question: how many apples are there?  Answer: there are 7 apples; hello there.",
    "user assistant system the and of to in is that it for on with as are this by",
] * 8
ALPHABET = [
    *"abc AB 01 .,\n\t  ",
    *(
        "\u2581",
        "é",
        "ß",
        "日本",
        "🙂",
        "👩\u200d👩\u200d👧",
        "e\u0301",
        "ﬁ",
        "①",
        "\u00a0",
        "\u2028",
        "\ufffd",
        "\x00",
        "\r\n",
    ),
    *("</s>", "<s>", "<unk>", "<|im_end|>", "<pad>", "[X]", "hello", " the", "<0x41>", "<|eot_id|>"),
]
EDGES = [
    "",
    " ",
    "  ",
    "\n",
    " a",
    "a ",
    "a  b",
    "</s>",
    "<s>a",
    " <s> a",
    "<s>\na </s> b",
    "\t\n a",
    "🙂",
    "a</s>b <s> c",
]


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
    if config is not None:
        files["tokenizer_config"] = {"tokenizer_class": "LlamaTokenizer", **config}
    return write(folder, **files)


MODELS = {}


@pytest.fixture(scope="session", autouse=True)
def trained_models(tmp_path_factory):
    """sentencepiece models like Llama-2's (identity), with sentencepiece's defaults, with own symbols, and unigram."""
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    kinds = {
        "identity": identity,
        "nmt_nfkc": {},
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


def same_as_transformers(folder, count=60):
    if transformers.__version__ != "5.23.0":
        pytest.skip(f"compares with transformers 5.23.0, this is {transformers.__version__}")
    oracle, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for text in hostile_texts(count):
        for special in (True, False):
            expected = oracle(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == expected, (text, special)
            for skip in (True, False):
                ids = [i for i in expected if i != oracle.unk_token_id]
                assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip), (text, skip)
    assert (ours.bos_token_id, ours.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert ours.vocab_size == max(oracle.get_vocab().values()) + 1
    assert ours.adds_bos == (oracle.bos_token_id in oracle("")["input_ids"])
    assert ours.pad_token_id is not None and ours.pad_token_id != ours.eos_token_id
    if oracle.pad_token_id not in (None, oracle.eos_token_id):
        assert ours.pad_token_id == oracle.pad_token_id
    return ours


BOS = {"add_bos_token": True}
DECODER = {
    **{str(i): token(content, special=True) for i, content in enumerate(["<unk>", "<s>", "</s>"])},
    **{"420": token("<|im_end|>"), "421": token("[X]", lstrip=True, rstrip=True, special=True)},
    "422": token("hello", single_word=True, normalized=True),
}
LLAMA_CONFIGS = {
    "bare": {},
    "legacy": {**BOS, "legacy": True},
    "not_legacy": {**BOS, "legacy": False, "tokenizer_class": "LlamaTokenizerFast"},
    "legacy_null": {**BOS, "legacy": None, "add_eos_token": True},
    "no_prefix_space": {**BOS, "add_prefix_space": False},
    "prefix_space_legacy": {"add_prefix_space": True, "legacy": True},
    "added_tokens": {**BOS, "added_tokens_decoder": DECODER, "eos_token": "<|im_end|>", "pad_token": "<pad>"},
    "added_tokens_legacy": {**BOS, "legacy": True, "added_tokens_decoder": DECODER, "pad_token": "</s>"},
    "token_objects": {
        **BOS,
        "bos_token": {"__type": "AddedToken", **token("<s>", normalized=True, rstrip=True)},
        "pad_token": None,
        "extra_special_tokens": ["[X]"],
    },
    "no_bos_token": {**BOS, "bos_token": None, "additional_special_tokens": ["[X]", "<|im_end|>"]},
    "no_class": {**BOS, "tokenizer_class": "PreTrainedTokenizerFast"},
}


@pytest.mark.parametrize("name", LLAMA_CONFIGS)
def test_llama_folders(name, tmp_path):
    """Catches a wrong dummy prefix (start, leading spaces, after special tokens), BOS/EOS flags, and added tokens."""
    same_as_transformers(sentencepiece_folder(tmp_path, LLAMA_CONFIGS[name]))


@pytest.mark.parametrize("model", ["nmt_nfkc", "symbols", "unigram"])
@pytest.mark.parametrize("config", [None, {**BOS, "legacy": True}, {**BOS, "legacy": False}], ids=str)
def test_other_sentencepiece_models(model, config, tmp_path):
    """Catches the normaliser applied where transformers drops it, or dropped; user-defined pieces taken as text."""
    same_as_transformers(sentencepiece_folder(tmp_path, config, model))


def test_code_llama_folder(tmp_path):
    """Catches CodeLlamaTokenizer's own defaults missed: BOS without a flag, `legacy` without effect."""
    folder = sentencepiece_folder(tmp_path, {"tokenizer_class": "CodeLlamaTokenizer", "legacy": True})
    oracle, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for text in hostile_texts(40):
        assert ours.encode(text) == oracle(text)["input_ids"], text
    oracle.save_pretrained(tmp_path)
    config = {"tokenizer_class": "CodeLlamaTokenizer", "add_bos_token": False}
    same_as_transformers(write(tmp_path, tokenizer_config=config))


def test_older_files(tmp_path):
    """Catches special_tokens_map.json and added_tokens.json unread, or read where tokenizer_config.json wins."""
    older = {
        "special_tokens_map": {"bos_token": token("<s>"), "eos_token": "<|im_end|>", "pad_token": "<pad>"},
        "added_tokens": {"<|im_end|>": 420, "[X]": 421},
    }
    ours = same_as_transformers(sentencepiece_folder(tmp_path / "a", BOS, **older))
    assert ours.eos_token_id == 420
    ours = same_as_transformers(sentencepiece_folder(tmp_path / "b", {**BOS, "added_tokens_decoder": DECODER}, **older))
    assert ours.eos_token_id == 2


@pytest.mark.parametrize("name", ["legacy", "added_tokens", "no_class"])
@pytest.mark.parametrize("keep_model", [False, True])
def test_saved_by_transformers(name, keep_model, tmp_path):
    """Catches a saved tokenizer.json, maybe with a tokenizer.model beside it, read otherwise than by transformers."""
    source = sentencepiece_folder(tmp_path / "source", LLAMA_CONFIGS[name])
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "saved")
    write(tmp_path / "saved")
    if keep_model:
        shutil.copy(source / "tokenizer.model", tmp_path / "saved")
    same_as_transformers(tmp_path / "saved")
    # the source's settings again, which contradict the post-processor: transformers lets the latter win
    config = {"tokenizer_class": "LlamaTokenizer", **LLAMA_CONFIGS[name], "add_bos_token": False}
    same_as_transformers(write(tmp_path / "saved", tokenizer_config=config), count=20)


@pytest.mark.parametrize("kind", ["llama3", "deepseek"])
@pytest.mark.parametrize("class_name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
def test_byte_level_folders(kind, class_name, tmp_path):
    """Catches byte-level files under Llama's rules (DeepSeek's say LlamaTokenizerFast), and a BOS lost or doubled."""
    pad = {"pad_token": "<|eot_id|>"} if kind == "llama3" else {"pad_token": "<｜end▁of▁sentence｜>"}
    ours = same_as_transformers(byte_level_folder(tmp_path, kind, class_name, **pad), count=120)
    assert ours.adds_bos and not ours.adds_eos


def test_tiktoken_model_beside_tokenizer_json(tmp_path):
    """Catches Llama 3's tiktoken file tokenizer.model taken for a sentencepiece model."""
    byte_level_folder(tmp_path, "llama3")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    same_as_transformers(tmp_path, count=10)


@pytest.fixture(params=["legacy", "no_prefix_space", "llama3"])
def folder(request, tmp_path):
    if request.param == "llama3":
        return byte_level_folder(tmp_path, "llama3")
    return sentencepiece_folder(tmp_path, LLAMA_CONFIGS[request.param])


def random_ids(ours, draw, length):
    """Half of it the ids of a text, half any ids: characters cut everywhere, broken ones, special tokens within."""
    text_ids = ours.encode("".join(draw.choices(ALPHABET, k=length)), add_special_tokens=draw.random() < 0.5)
    return [i if draw.random() < 0.7 else draw.randrange(ours.vocab_size) for i in text_ids][:length]


def test_streaming_loses_nothing(folder):
    """Catches a stream that differs from the whole text, and a continuation that does not continue its prompt."""
    ours, draw = Tokenizer(folder), random.Random(1)
    for _ in range(300):
        prompt, ids = random_ids(ours, draw, draw.randrange(6)), random_ids(ours, draw, draw.randrange(20))
        stream = StreamDecoder(ours, prompt)
        parts = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(parts) == ours.decode_continuation(prompt, ids)
        before = StreamDecoder(ours, [])
        whole = "".join(map(before.push, prompt))  # without the bytes of a character still arriving
        if whole:
            assert whole + "".join(parts) == ours.decode(prompt + ids)
    assert ours.decode_continuation(ours.encode("a"), [ours.vocab_size + 5]) == ""


def test_stream_holds_back_half_characters(folder):
    """Catches U+FFFD shown for an emoji whose bytes are still arriving, and whole characters held back needlessly."""
    ours = Tokenizer(folder)
    text = "né 日本🙂, 👩\u200d👩\u200d👧 done"
    prompt, ids = ours.encode("say"), ours.encode("x" + text, add_special_tokens=False)
    stream, shown = StreamDecoder(ours, prompt), ""
    for i, token_id in enumerate(ids):
        shown += stream.push(token_id)
        assert "\ufffd" not in shown
        assert shown == ours.decode_continuation(prompt, ids[: i + 1]).rstrip("\ufffd")
    assert shown.endswith(text) and stream.flush() == ""
    cut = next(i for i in range(len(ids)) if ours.decode(ids[: i + 1]).endswith("\ufffd"))
    stream = StreamDecoder(ours, prompt)
    assert "\ufffd" not in "".join(map(stream.push, ids[: cut + 1])) and stream.flush() == "\ufffd"
    # a prompt cut by force within a character: its bytes are not lost
    assert ours.decode_continuation(prompt + ids[: cut + 1], ids[cut + 1 :])[0] in "é日本🙂"


def test_decode_of_any_bytes(tmp_path):
    """Catches broken UTF-8 decoded otherwise than transformers' byte-level decoder, and valid neighbours lost."""
    folder = byte_level_folder(tmp_path / "b", "llama3")
    oracle, ours, draw = AutoTokenizer.from_pretrained(folder), Tokenizer(folder), random.Random(2)
    for _ in range(200):
        ids = [draw.randrange(ours.vocab_size) for _ in range(12)]
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    ours = Tokenizer(sentencepiece_folder(tmp_path / "s", BOS))
    broken = ours.encode("é🙂")[:-1]
    assert ours.decode(broken) == "é\ufffd"


def test_leading_space_of_a_continuation(tmp_path):
    """Catches the space before an answer's first word dropped behind a text, or kept at the start of a text."""
    ours = Tokenizer(sentencepiece_folder(tmp_path, BOS))
    word = ours.encode("hello", add_special_tokens=False)
    assert ours.decode_continuation(ours.encode("the"), word) == " hello"
    assert ours.decode_continuation([ours.bos_token_id], word) == "hello"
    assert ours.decode_continuation([], ours.encode("  two")) == " two"


def test_pad_is_never_eos(tmp_path):
    """Catches pad = EOS, which would hide every EOS from the loss."""
    ours = Tokenizer(sentencepiece_folder(tmp_path / "a", {"pad_token": "</s>"}))
    assert (ours.eos_token_id, ours.pad_token_id) == (2, 0)
    ours = Tokenizer(sentencepiece_folder(tmp_path / "b", {"pad_token": "<s>", "eos_token": "<unk>"}))
    assert (ours.eos_token_id, ours.pad_token_id) == (0, 1)
    ours = Tokenizer(sentencepiece_folder(tmp_path / "c", {"eos_token": "<unk>"}))
    assert (ours.eos_token_id, ours.pad_token_id) == (0, 2)


LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must\n alternate') }}{% endif %}"
    "{% set content = system_message + message['content'] if loop.index0 == 0 else message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{{- bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = """{# blocks on lines of their own: trim_blocks and lstrip_blocks matter #}
{% for message in messages %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {% if message.role == 'assistant' %}
<|im_start|>assistant
        {% generation %}
{{ message.content }}{{ 'tool_calls' in message }}<|im_end|>
        {% endgeneration %}
    {% else %}
<|im_start|>{{ message.role }}
{{ message.content }}{{ message.get('extra') | tojson }}{{ '<b>' | tojson }}<|im_end|>
    {% endif %}
{% endfor %}
{{ strftime_now('%Y')[:2] }}{{ documents is none }}{{ tools is none }}{{ pad_token }}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
CHAT = [
    {"role": "system", "content": "Be <b>brief</b>. 🙂"},
    {"role": "user", "content": "  hello </s> there\n", "extra": {"ä": [1, None]}},
    {"role": "assistant", "content": "Yes.", "tool_calls": None},
    {"role": "user", "content": "the end"},
]


@pytest.mark.parametrize("name", ["llama2", "llama2_legacy", "llama3", "chatml"])
@pytest.mark.parametrize("place", ["config", "list", "file"])
def test_chat_templates(name, place, tmp_path):
    """Catches a doubled BOS, `</s>` of a template read as text, escaped HTML, lost newlines, an unread file."""
    template = {"llama3": LLAMA3_CHAT, "chatml": CHATML}.get(name, LLAMA2_CHAT)
    if name == "llama3":
        byte_level_folder(tmp_path, "llama3", additional_special_tokens=["<|eot_id|>"])
    else:
        extra = {"added_tokens_decoder": DECODER, "pad_token": "<pad>"} if name == "chatml" else {}
        sentencepiece_folder(tmp_path, {**BOS, "legacy": name == "llama2_legacy", **extra})
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        template = "not this one"
    config["chat_template"] = template
    if place == "list":
        config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    path.write_text(json.dumps(config))
    oracle, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    for messages in (CHAT, CHAT[:2], CHAT[1:]):
        for prompt in (True, False):
            wanted = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == wanted
            ids = oracle.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            assert ours.encode_chat(messages, add_generation_prompt=prompt) == ids
            if name != "chatml":
                assert ids[0] == ours.bos_token_id and ids[1] != ours.bos_token_id


def error_of(call, *parts):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) in (ValueError, FileNotFoundError)
    assert "\n" not in message and all(str(part) in message for part in parts), message


def test_broken_folders(tmp_path):
    """Catches a bare exception of a library, and a message that does not name the file."""
    error_of(lambda: Tokenizer(tmp_path / "nowhere"), tmp_path / "nowhere", "tokenizer.json")
    error_of(lambda: Tokenizer(write(tmp_path / "empty")), tmp_path / "empty", "tokenizer.model")
    folder = sentencepiece_folder(tmp_path / "a", {})
    whole = (folder / "tokenizer.model").read_bytes()
    for content in (b"", b"IQ== 0\n", whole[: len(whole) // 2], bytes(100)):
        (folder / "tokenizer.model").write_bytes(content)
        error_of(lambda: Tokenizer(folder), folder / "tokenizer.model")
    (folder / "tokenizer.model").write_bytes(whole)
    for content in ("{", "[]", "\udcff", '{"added_tokens_decoder": {"x": {}}}', '{"added_tokens_decoder": []}'):
        (folder / "tokenizer_config.json").write_bytes(content.encode(errors="surrogateescape"))
        error_of(lambda: Tokenizer(folder), folder / "tokenizer_config.json")
    for content in (
        {"extra_special_tokens": 5},
        {"bos_token": {}},
        {"chat_template": 5},
        {"bos_token": {"content": 5}},
    ):
        error_of(lambda c=content: Tokenizer(sentencepiece_folder(folder, c)), folder / "tokenizer_config.json")
    error_of(lambda: Tokenizer(sentencepiece_folder(folder, {"tokenizer_class": "T5Tokenizer"})), "T5Tokenizer")
    (folder / "special_tokens_map.json").write_text("nonsense")
    error_of(lambda: Tokenizer(sentencepiece_folder(folder, {})), folder / "special_tokens_map.json")
    for content in ("{", "{}", '{"model": {"type": "BPE"}}', "\udcff"):
        (folder / "tokenizer.json").write_bytes(content.encode(errors="surrogateescape"))
        error_of(lambda: Tokenizer(folder), folder / "tokenizer.json")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "empty" / "tokenizer.json"))
    error_of(lambda: Tokenizer(tmp_path / "empty"), tmp_path / "empty" / "tokenizer.json", "decoder")


def test_bad_texts_and_chats(tmp_path):
    """Catches a traceback for a text, a message list or a template that cannot work, and a template that breaks out."""
    folder = sentencepiece_folder(tmp_path / "a", {"chat_template": LLAMA2_CHAT})
    ours = Tokenizer(folder)
    error_of(lambda: ours.encode("a\ud83d"), "surrogate")
    error_of(lambda: ours.encode(None), "string")
    for messages in ("hi", [], {}, ["hi"], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 5}]):
        error_of(lambda m=messages: ours.apply_chat_template(m, add_generation_prompt=True), "role")
    error_of(lambda: ours.encode_chat(CHAT[2:], add_generation_prompt=True), folder, "roles must alternate")
    plain = Tokenizer(sentencepiece_folder(tmp_path / "b", {}))
    assert plain.chat_template is None
    error_of(lambda: plain.encode_chat(CHAT, add_generation_prompt=True), tmp_path / "b", "no chat template")
    for template in (
        "{% for %}",
        "{{ messages[0]['role'] + 1 }}",
        "{{ nothing.at.all }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
        "{% generation %}",
    ):
        hostile = Tokenizer(sentencepiece_folder(tmp_path / "c", {"chat_template": template}))
        error_of(lambda h=hostile: h.encode_chat(CHAT, add_generation_prompt=True), tmp_path / "c", "chat template")
