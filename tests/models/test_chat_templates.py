"""models/chat_template.py against transformers; and errors for folders, texts and chats that cannot be read."""

import json
from datetime import date
from functools import partial

import pytest
import transformers
from packaging.version import Version
from transformers import AutoTokenizer

import models.chat_template
from models.chat_template import ChatTemplate
from models.chats import read_chat, text_of_chat
from models.tokenizer import Tokenizer
from tests.file_tokenizer import FileTokenizer
from tests.models.test_tokenizer import (
    byte_level_folder,
    sentencepiece_folder,
    trained_models,  # noqa: F401 (a fixture of all tests)
    write,
)

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
{{ message.content }}{{ message.get('extra') | tojson }}{{ '<ä>' | tojson(true, 1) }}<|im_end|>
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


@pytest.mark.parametrize("name", ["llama2", "llama3", "chatml"])
@pytest.mark.parametrize("place", ["config", "list", "file"])
def test_chat_templates(name, place, tmp_path):
    """Catches a doubled BOS, `</s>` in a template encoded as text, escaped HTML, positional options of tojson misread,
    lost newlines, and a template file that is not read."""
    template = {"llama3": LLAMA3_CHAT, "chatml": CHATML}.get(name, LLAMA2_CHAT)
    if Version(transformers.__version__) < Version("5.23"):  # 5.17 treats "tool_calls": None otherwise
        template = template.replace("{{ 'tool_calls' in message }}", "")
    if name == "llama3":
        byte_level_folder(tmp_path, "llama3", additional_special_tokens=["<|eot_id|>"])
    else:
        sentencepiece_folder(tmp_path, {"add_bos_token": True, "pad_token": "<pad>"})
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
            assert ours.chat_template.render(messages, add_generation_prompt=prompt) == wanted
            ids = ours.encode(wanted, add_special_tokens=False)
            if name != "chatml":
                assert ids == FileTokenizer(tmp_path)(wanted, add_special_tokens=False)["input_ids"]
                assert ids[0] == ours.bos_token_id and ids[1] != ours.bos_token_id


def error_of(call, *parts):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) in (ValueError, FileNotFoundError)
    assert "\n" not in message and all(str(part) in message for part in parts), message


def test_broken_folders(tmp_path):
    """Catches a bare exception of a library, a message that does not name the file, and a malformed EOS ignored."""
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
    wrong = [("extra_special_tokens", 5), ("chat_template", 5), ("eos_token", ["</s>"])]
    wrong += [("chat_template", [{"name": name, "template": "x"}]) for name in (["default"], 5)]
    for name, value in (*wrong, ("bos_token", {}), ("bos_token", {"content": 5})):
        config = {name: value}
        error_of(lambda c=config: Tokenizer(sentencepiece_folder(folder, c)), folder / "tokenizer_config.json")
    (folder / "special_tokens_map.json").write_text("nonsense")
    error_of(lambda: Tokenizer(sentencepiece_folder(folder, {})), folder / "special_tokens_map.json")
    for content in ("{", "{}", '{"model": {"type": "BPE"}}', "\udcff"):
        (folder / "tokenizer.json").write_bytes(content.encode(errors="surrogateescape"))
        error_of(lambda: Tokenizer(folder), folder / "tokenizer.json")


def test_bad_texts_and_chats(tmp_path):
    """Catches a traceback for a text, a chat or a template that cannot work, and a template that leaves the sandbox."""
    folder = sentencepiece_folder(tmp_path / "a", {"chat_template": LLAMA2_CHAT})
    ours = Tokenizer(folder)
    error_of(lambda: ours.encode("a\ud83d"), "surrogate")
    error_of(lambda: ours.encode(None), "string")
    for messages in ("hi", [], {}, ["hi"], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 5}]):
        error_of(lambda m=messages: read_chat(m), "messages")
    error_of(lambda: ours.chat_template.render(CHAT[2:], add_generation_prompt=True), folder, "roles must alternate")
    plain = Tokenizer(sentencepiece_folder(tmp_path / "b", {}))
    assert plain.chat_template is None
    error_of(lambda: text_of_chat(read_chat(CHAT[:1]), plain), tmp_path / "b", "no chat template")
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
        error_of(
            lambda h=hostile: h.chat_template.render(CHAT, add_generation_prompt=True), tmp_path / "c", "chat template"
        )


@pytest.mark.parametrize("version", ["3.0.3", "3.1.5", "3.1.6", "3.2.0", "3.2.dev0", "4"])
def test_jinja_whose_sandbox_has_holes(version, tmp_path, monkeypatch):
    """Catches a template that runs in a sandbox with known holes, or is said to end no turn since it may not run there,
    and a newer version taken for an older one."""
    monkeypatch.setattr(models.chat_template, "version", lambda package: {"jinja2": version}[package])
    monkeypatch.setattr(models.chat_template, "_unsafe_jinja", models.chat_template._unsafe_jinja.__wrapped__)
    folder = sentencepiece_folder(tmp_path, {"chat_template": LLAMA2_CHAT})
    tokenizer = Tokenizer(folder)
    render = partial(tokenizer.chat_template.render, CHAT, add_generation_prompt=True)
    if version in ("3.0.3", "3.1.5"):
        for call in (render, lambda: tokenizer.end_of_turn_id):
            error_of(call, folder, f"jinja2 {version}", "install jinja2>=3.1.6")
    else:
        assert render() and tokenizer.end_of_turn_id == tokenizer.eos_token_id


@pytest.mark.parametrize("mark", ["\ufdd0", "\ufdd00\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4", "\ufdd5"])
def test_marks_in_the_chat(mark, tmp_path):
    """Catches a traceback, and another text, for a chat that holds the characters that mark places in renderings."""
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    for source in (template, template.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        chat = [{"role": "user", "content": f"hi{mark}"}, {"role": "assistant", "content": f"so{mark} it is"}]
        found = ChatTemplate({"default": source}, tmp_path, {}, date(2026, 1, 1)).locate(chat)
        assert found.text == f"hi{mark};so{mark} it is;"


def test_marks_that_change_what_is_written(tmp_path):
    """Catches positions reported though the template writes other text around marks, and positions of contents lost
    because it does so for the marks of calls alone."""
    lengths = "{% for m in messages %}{{ m.content | length }}:{{ m.content }}{% endfor %}"
    calls = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.name | length }}{% endfor %}"
    calls += "{% endfor %}"
    chat = [{"role": "user", "content": "hello"}]
    answer = {"role": "assistant", "content": "so", "tool_calls": [{"name": "f", "arguments": {}}]}
    lengths, calls = (ChatTemplate({"default": each}, tmp_path, {}, date(2026, 1, 1)) for each in (lengths, calls))
    found = lengths.locate(chat)
    assert found.text == "5:hello" and not any(found[1:])
    found = calls.locate([*chat, answer])
    assert found.text == "helloso1" and found.ends == {0: 5, 1: 7}
