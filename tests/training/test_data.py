"""training/data.py: the tokens that a record is encoded to, and which of them are trained on."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers, processors

from models.chats import read_chat
from models.checkpoint import open_folder
from models.records import (
    EncodingCounts,
    Example,
    Limits,
    Record,
    encode_prompt,
    read_records,
)
from models.tokenizer import Tokenizer
from tests import tiny
from tests.models.test_chat_templates import LLAMA2_CHAT, LLAMA3_CHAT
from training.data import encode_sft_file, encode_sft_record

BOS, EOS = 1, 2  # of tiny's sentencepiece tokenizer
LIMITS = Limits(tiny.VOCAB_SIZE, 100)


@pytest.fixture
def oracle(opened):
    return opened("sentencepiece")[1]


def encode(tokenizer, **fields):
    return encode_sft_record(Record("train.jsonl:7", fields), tokenizer)[0]


def learnt(example):
    """Returns the token ids that have a label; asserts that each label is the id at its position."""
    assert len(example.input_ids) == len(example.labels)
    assert all(label in (-100, i) for i, label in zip(example.input_ids, example.labels))
    return [label for label in example.labels if label != -100]


def spans(example, tokenizer):
    """Returns the text of each run of consecutive tokens that have a label."""
    found, run = [], []
    for label in [*example.labels, -100]:
        if label != -100:
            run.append(label)
        elif run:
            found.append(
                tokenizer.decode_continuation([tokenizer.bos_token_id or 0, 40], run, skip_special_tokens=False)
            )
            run = []
    return found


# ---------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_formats_by_content(name, bom, tmp_path):
    """Catches a format chosen by the file's suffix, and a byte order mark, CRLF, blank lines or U+2028 (a line end to
    str.splitlines) that break a record or shift its line number."""
    path = tmp_path / name
    lines = '\r\n{"text": "a\u2028b\u0085c"}\r\n\r\n  \n{"text": "2"}'
    path.write_bytes(bom + lines.encode())
    assert read_records(path) == [
        Record(f"{path}:2", {"text": "a\u2028b\u0085c"}),
        Record(f"{path}:5", {"text": "2"}),
    ]
    path.write_bytes(bom + b' \n[{"text": "1"},\n\n {"text": "2"}]\n')
    assert read_records(path) == [Record(f"{path}: item 0", {"text": "1"}), Record(f"{path}: item 1", {"text": "2"})]


@pytest.mark.parametrize(
    "content, where",
    [
        (b'{"a": 1}\n\n{"a": \n', ":3: not valid JSON"),
        (b'{"a": 1}\n{"a": 1} {"a": 2}\n', ":2: not valid JSON"),
        (b'{"a": 1}\n{"a": {"b": 1, "b": 2}}\n', ":2: not valid JSON: an object has 'b' twice"),
        (b'{"a": 1}\n"text"\n', ":2: must be an object with named fields, not text"),
        (b'[{"a": 1}, 5]', ": item 1: must be an object with named fields, not a number"),
        (b'[{"a": 1}', ": not a valid JSON list"),
        (b'[{"a": 1, "a": 2}]', ": not a valid JSON list: an object has 'a' twice"),
        (b'{"a": ' + b"[" * 100_000, ":1: not valid JSON"),
        (b"[" * 100_000, ": not a valid JSON list"),
        (b'{"a": "caf\xe9"}', ": not UTF-8"),
        (b" \n\n", ": holds no records"),
        (b"[]", ": holds no records"),
    ],
)
def test_broken_files(content, where, tmp_path):
    """Catches an error without the file and line, and an exception of a library that gets through."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}{where}")
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=missing.name):
            read_records(missing)


# --------------------------------------------------------------------------- prompt and completion


def test_prompt_and_completion(tokenizer, oracle):
    """Catches the prompt in the loss, EOS missing or left out of the loss, BOS missing or doubled, and a prompt encoded
    differently from a prompt for generation."""
    prompt, completion = "Question: what is 3 plus 4?", " The answer is 7."
    example, counts = encode_sft_record(Record("x", {"prompt": prompt, "completion": completion}), tokenizer)
    prompt_ids = oracle(prompt)["input_ids"]
    assert example.input_ids == [*oracle(prompt + completion)["input_ids"], EOS]
    assert example.input_ids[: len(prompt_ids)] == prompt_ids == encode_prompt(prompt, tokenizer)
    assert learnt(example) == example.input_ids[len(prompt_ids) :]
    assert example.labels[: len(prompt_ids)] == [-100] * len(prompt_ids)
    assert example.input_ids.count(BOS) == 1 and example.input_ids.count(EOS) == 1 and not any(counts)
    assert example.num_targets == len(learnt(example))


def test_aliases_and_empty_parts(tokenizer):
    """Catches `input` and `output` not read, and a crash or a lost EOS if the completion (or the prompt) is empty."""
    assert encode(tokenizer, input="a b", output=" c") == encode(tokenizer, prompt="a b", completion=" c")
    empty = encode(tokenizer, prompt="a b", completion="")
    assert empty.input_ids[-1] == EOS and learnt(empty) == [EOS]
    no_prompt = encode(tokenizer, prompt="", completion="a b")
    assert no_prompt.input_ids[0] == BOS and learnt(no_prompt) == no_prompt.input_ids[1:]


@pytest.mark.parametrize("prompt, completion", [("The ans", "wer is 5"), ("so: <", "/s> it"), ("It ", " is")])
def test_prompt_that_merges_with_its_completion(prompt, completion, tokenizer):
    """Catches a prompt encoded differently from generation because the tokenizer splits prompt and completion
    differently when they are joined, and a space added between a prompt that ends in one and its completion."""
    prompt_ids = encode_prompt(prompt, tokenizer)
    whole = tokenizer.encode_prefix(prompt + completion)
    example, counts = encode_sft_record(Record("x", {"prompt": prompt, "completion": completion}), tokenizer)
    differs = counts == EncodingCounts(split_differently=1)
    assert differs == (whole[: len(prompt_ids)] != prompt_ids)
    assert differs or "ans" not in prompt
    assert example.input_ids[: len(prompt_ids)] == prompt_ids
    assert learnt(example) == example.input_ids[len(prompt_ids) :] and example.input_ids[-1] == EOS
    assert differs or example.input_ids[len(prompt_ids) : -1] == whole[len(prompt_ids) :]
    assert tokenizer.decode_continuation(prompt_ids, example.input_ids[len(prompt_ids) : -1], False) == completion


def test_text(tokenizer, oracle):
    """Catches a plain text without EOS or with two, and its first token (BOS) counted as a target."""
    example = encode(tokenizer, text="The answer is 7.")
    assert example.input_ids == [*oracle("The answer is 7.")["input_ids"], EOS] == learnt(example)
    assert example.num_targets == len(example.input_ids) - 1
    assert encode(tokenizer, text="The answer is 7.</s>") == example


def test_bos_spelled_in_the_text(tokenizer):
    """Catches a second BOS before a text that already spells one."""
    for fields in ({"text": "<s>The"}, {"prompt": "<s>The", "completion": " answer"}):
        example = encode(tokenizer, **fields)
        assert example.input_ids[0] == BOS and example.input_ids.count(BOS) == 1
    assert encode_prompt("<s>The", tokenizer).count(BOS) == 1


@pytest.mark.parametrize("bos, eos", [(False, False), (False, True), (True, True)])
def test_tokenizers_that_add_other_tokens(bos, eos, tmp_path):
    """Catches EOS between prompt and completion, two of them at the end, and a BOS that the tokenizer does not add."""
    tiny.write_tokenizer(tmp_path, add_bos_token=bos, add_eos_token=eos)
    example = encode(Tokenizer(tmp_path), prompt="The", completion=" answer")
    assert example.input_ids.count(BOS) == bos and example.input_ids.count(EOS) == 1
    assert example.input_ids[-1] == EOS and len(learnt(example)) == 1 + len(
        Tokenizer(tmp_path).encode("The answer", add_special_tokens=False)
    ) - len(Tokenizer(tmp_path).encode("The", add_special_tokens=False))


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({}, "'prompt' is missing (found: none)"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "(found: conversations); give messages with role and c"),
        ({"prompt": "a", "answer": "b"}, "'completion' is missing (found: prompt, answer)"),
        ({"completion": "b"}, "'prompt' is missing"),
        ({"prompt": 5, "completion": "b"}, "prompt must be text or a list of messages, not a number"),
        ({"prompt": None, "completion": "b"}, "the field 'prompt' is null"),
        ({"prompt": "a", "completion": 5}, "completion must be text where prompt is text"),
        ({"prompt": "a", "completion": [{"role": "assistant"}]}, "completion must be text where prompt is text"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": 5}, "completion must be text or a list"),
        ({"text": ["a"]}, "text must be a string"),
        ({"text": "[{'role': 'user', 'content': 'a'}]"}, "text is a list of messages as text; give the list itself"),
        ({"text": "a\ud83d"}, "surrogate"),
        ({"messages": "hello"}, "messages must be a non-empty list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no chat template"),
    ],
    ids=str,
)
def test_records_that_cannot_be_used(fields, complaint, tokenizer):
    """Catches an error that does not name the record, or that names another cause than the real one."""
    with pytest.raises(ValueError) as caught:
        encode(tokenizer, **fields)
    assert str(caught.value).startswith("train.jsonl:7: ") and complaint in str(caught.value)


# ------------------------------------------------------------------------------------------- chats

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWRITES = CHATML.replace(
    "message['content']",
    "(message['content'] if loop.last or message['role'] == 'user' else '(earlier)')",
)
PLAIN = "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] + '\n' }}{% endfor %}"
PLAIN += "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
TEMPLATES = {"llama3": LLAMA3_CHAT, "chatml": CHATML, "chatml_added": CHATML, "rewrites": REWRITES, "plain": PLAIN}
END_OF_TURN = {
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
    "chatml": "<|im_end|>",
    "chatml_added": "<|im_end|>",  # its end-of-turn token is an added one, not a special one
    "plain": "\n",  # text, not a token
}


def write_chat_tokenizer(folder, kind):
    """Writes a tokenizer: sentencepiece for Llama 2, else byte-level with the special tokens of its kind."""
    if kind.startswith("llama2"):
        tiny.write_tokenizer(folder, chat_template=LLAMA2_CHAT)
        return
    special = ["<|begin|>", "<|end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|im_start|>", "<|im_end|>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["user assistant system\n\nthe answer is yes. the question is no."] * 8, trainer)
    backend.add_special_tokens(special[:5] if kind == "chatml_added" else special)
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    backend.post_processor = processors.TemplateProcessing(
        single=["<|begin|>:0", "$A:0"], special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
    )
    end = {"llama3": "<|eot_id|>", "chatml_added": "<|end|>"}.get(kind, "<|im_end|>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token=end)
    fast.chat_template = TEMPLATES[kind]
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


CHAT = [
    {"role": "user", "content": "what is the question?"},
    {"role": "assistant", "content": "the answer\nis yes."},
    {"role": "user", "content": "and the next one?"},
    {"role": "assistant", "content": "no. 🙂"},
]
SYSTEM = {"role": "system", "content": "the assistant is assistant"}


def answers(kind, *contents):
    space = " " if kind.startswith("llama2") else ""
    return [space + content + END_OF_TURN[kind] for content in contents]


@pytest.mark.parametrize("kind", END_OF_TURN)
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
def test_chat_learns_the_assistants_turns(kind, system, opened):
    """Catches the assistant's header, the user's turns or the template's text after the end-of-turn token in the loss;
    the end-of-turn token, or all assistant turns but one, left out of it; and BOS or EOS added to the template."""
    tokenizer, oracle = opened(kind)
    messages = system + CHAT
    example, counts = encode_sft_record(Record("x", {"messages": messages}), tokenizer)
    assert example.input_ids == oracle.apply_chat_template(messages)["input_ids"]
    assert spans(example, tokenizer) == answers(kind, "the answer\nis yes.", "no. 🙂")
    assert not any(counts) and example.num_targets == len(learnt(example))
    for i, message in enumerate(messages):  # each turn starts where generation would start
        if message["role"] == "assistant":
            header = encode_prompt(read_chat(messages[:i]), tokenizer)
            assert example.input_ids[: len(header)] == header and example.labels[len(header) - 1] == -100
            assert example.labels[len(header)] == example.input_ids[len(header)]


@pytest.mark.parametrize("kind", END_OF_TURN)
def test_prompt_as_messages(kind, opened):
    """Catches assistant turns of the prompt in the loss, a completion given as text treated differently from one given
    as a message, and a prompt encoded differently from generation."""
    tokenizer, _ = opened(kind)
    prompt = [SYSTEM, *CHAT[:3]]
    as_text, counts = encode_sft_record(Record("x", {"prompt": prompt, "completion": "no. 🙂"}), tokenizer)
    assert as_text == encode(tokenizer, prompt=prompt, completion=CHAT[3:]) and not any(counts)
    assert as_text.input_ids == encode(tokenizer, messages=[SYSTEM, *CHAT]).input_ids
    assert spans(as_text, tokenizer) == answers(kind, "no. 🙂")
    prompt_ids = encode_prompt(read_chat(prompt), tokenizer)
    assert as_text.input_ids[: len(prompt_ids)] == prompt_ids
    assert as_text.labels[: len(prompt_ids)] == [-100] * len(prompt_ids)
    several = encode(tokenizer, prompt=CHAT[:1], completion=CHAT[1:])
    assert spans(several, tokenizer) == answers(kind, "the answer\nis yes.", "no. 🙂")


def test_special_token_within_an_answer(opened):
    """Catches an answer whose loss ends at a special token that the answer quotes."""
    for kind in ("plain", "chatml"):
        tokenizer, _ = opened(kind)
        answer = {"role": "assistant", "content": "it says <|im_start|> there"}
        example = encode(tokenizer, messages=[CHAT[0], answer])
        assert spans(example, tokenizer) == answers(kind, answer["content"])


def test_chat_without_an_answer(opened):
    """Catches a conversation without an assistant turn that is trained on its user turns."""
    tokenizer, _ = opened("llama3")
    assert encode(tokenizer, messages=CHAT[:1]).num_targets == 0


def test_template_that_rewrites_earlier_turns(opened):
    """Catches misplaced labels under a template that renders a turn differently once others follow it."""
    tokenizer, _ = opened("rewrites")
    with pytest.raises(
        ValueError, match=r"^train.jsonl:7: the chat template leaves out message 1, of the role 'assistant'"
    ):
        encode(tokenizer, messages=CHAT)
    assert spans(encode(tokenizer, messages=CHAT[:2]), tokenizer) == ["the answer\nis yes.<|im_end|>"]


@pytest.mark.parametrize("messages", [[], ["hello"], [{"content": "a"}], [{"role": "user", "content": None}], {}, None])
def test_bad_messages(messages, opened):
    """Catches a traceback, or an error without the record, for malformed messages."""
    tokenizer, _ = opened("llama3")
    with pytest.raises(ValueError, match=r"^train.jsonl:7: .*message"):
        encode(tokenizer, messages=messages)
    if messages:
        with pytest.raises(ValueError, match=r"^train.jsonl:7: "):
            encode(tokenizer, prompt=CHAT[:1], completion=messages)


# ------------------------------------------------------------------------------------ whole files


def test_overlong_records(tokenizer, tmp_path):
    """Catches an EOS after a truncated answer (it would teach to stop in the middle), an off-by-one limit, and records
    that were skipped, truncated or left without targets but not counted."""
    records = [
        {"prompt": "a b c", "completion": " d e f g"},
        {"prompt": "a", "completion": " b"},
        {"prompt": "a b c d e f g h i j k l m n o p", "completion": " q"},
    ]
    path = tiny.write_records(tmp_path / "train.jsonl", records)
    whole, counts = encode_sft_file(path, tokenizer, LIMITS)
    assert counts == EncodingCounts(0, 0, 0, 0)
    limit = len(whole[0].input_ids)
    assert len(whole[2].input_ids) > limit
    with pytest.raises(ValueError, match=f"^{path}:3: {len(whole[2].input_ids)} tokens, the limit is {limit}"):
        encode_sft_file(path, tokenizer, LIMITS._replace(max_seq_len=limit))
    skipped, counts = encode_sft_file(path, tokenizer, LIMITS._replace(max_seq_len=limit, overlong="skip"))
    assert list(skipped) == whole[:2] and counts == EncodingCounts(0, 1, 0, 0)
    limits = LIMITS._replace(max_seq_len=limit - 1, overlong="truncate")
    cut, counts = encode_sft_file(path, tokenizer, limits)
    assert counts == EncodingCounts(2, 0, 1, 0) and cut[1] == whole[1]
    for before, after in zip(whole, cut):
        assert after == Example(before.input_ids[: limit - 1], before.labels[: limit - 1])
    assert cut[0].input_ids[-1] != EOS and cut[0].num_targets == whole[0].num_targets - 1 and not cut[2].num_targets


def test_counts_and_nothing_to_learn(tokenizer, tmp_path):
    """Catches a record without targets that is not reported, a file of only such records (its loss would be 0 at every
    step), and uncounted records whose prompt and completion are split differently when joined."""
    tiny.write_tokenizer(tmp_path / "bare", add_bos_token=False)
    bare = Tokenizer(tmp_path / "bare")
    nothing = {"text": ""}  # EOS alone: no token before it to predict it from
    records = [{"prompt": "The ans", "completion": "wer"}, nothing, nothing]
    examples, counts = encode_sft_file(tiny.write_records(tmp_path / "a", records), bare, LIMITS)
    assert counts == EncodingCounts(0, 0, 2, 1) and len(examples) == 3
    path = tiny.write_records(tmp_path / "b", [nothing, nothing])
    with pytest.raises(ValueError, match=f"^{path}: no record has a token to learn .*in chats only the turns"):
        encode_sft_file(path, bare, LIMITS)
    path = tiny.write_records(tmp_path / "c", [{"text": "a b c d e f"}])
    with pytest.raises(ValueError, match=f"^{path}: no record has a token to learn .0 records kept, 1 too long"):
        encode_sft_file(path, bare, LIMITS._replace(max_seq_len=3, overlong="skip"))


def test_ids_beyond_the_model(tmp_path):
    """Catches an index out of range inside the model if the tokenizer has more tokens than the model, and a folder
    refused for an added token (such as a pad token) that has no embedding but is never used."""
    extra = {str(tiny.VOCAB_SIZE): {"content": "<|extra|>", "special": True}}
    tiny.write_model(tmp_path, vocab_size=tiny.VOCAB_SIZE - 1)
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer does not fit: it has 384 tokens"):
        open_folder(tmp_path)
    tiny.write_model(tmp_path)
    tiny.write_tokenizer(tmp_path, added_tokens_decoder=extra)
    tokenizer = open_folder(tmp_path).tokenizer
    path = tiny.write_records(tmp_path / "train.jsonl", [{"text": "a"}, {"text": "a <|extra|>"}])
    with pytest.raises(ValueError, match=f"{path}:2: holds token id 384"):
        encode_sft_file(path, tokenizer, LIMITS)
