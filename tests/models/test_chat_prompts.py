"""Chats that a model answers, as transformers (5.23) renders them: begun answers, templates for tools, thoughts."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from models.chats import learnt_turns, read_chat, text_of_chat
from models.export import save_folder
from models.records import cut_prompt, encode_answer, encode_generated, encode_prompt
from models.tokenizer import Tokenizer
from tests.models.test_tokenizer import byte_level_folder

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRIMS = PLAIN.replace("m.content", "m.content | trim")
DROPS = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
TOOLS = "{{ tools | tojson }}" + PLAIN
THOUGHTS = PLAIN.replace("{{ m.content }}", "{{ m.NAME or '' }}|{{ m.content }}")
USER = {"role": "user", "content": "1 plus 2"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def opened(folder, template, files=None):
    """Returns the folder's tokenizer: (ours, transformers'). template: as in tokenizer_config.json."""
    byte_level_folder(folder, "llama3", eos_token="<|end_of_text|>")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return Tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", (PLAIN, TRIMS))
@pytest.mark.parametrize("begun", ("It is", " It is ", "It\nis\n"))
def test_an_answer_that_has_begun_goes_on(tmp_path, template, begun):
    """Catches a begun answer that is ended and followed by another's header; in training and scoring too."""
    tokenizer, oracle = opened(tmp_path, template)
    messages = [USER, {"role": "assistant", "content": begun}]
    text = oracle.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    chat = read_chat(messages)
    assert text_of_chat(chat, tokenizer) == text
    row, _ = encode_answer(chat, "3", tokenizer)
    assert row.input_ids == encode_generated(chat, "3", tokenizer, finished=True)
    assert tokenizer.decode(row.input_ids, skip_special_tokens=False) == text + "3<|eot_id|>"


def test_an_answer_of_which_only_the_thought_has_begun(tmp_path):
    """Catches a begun thought whose turn is ended and followed by another's header, and one that is left out."""
    tokenizer, oracle = opened(tmp_path / "thinks", THOUGHTS.replace("NAME", "reasoning_content"))
    messages = [USER, {"role": "assistant", "content": "", "reasoning_content": "hm"}]
    text = oracle.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    chat = read_chat(messages)
    assert text_of_chat(chat, tokenizer) == text and text.endswith("<|assistant|>hm|")
    row, _ = encode_answer(chat, "3", tokenizer)
    assert tokenizer.decode(row.input_ids, skip_special_tokens=False) == text + "3<|eot_id|>"
    with pytest.raises(ValueError, match="leaves out a part of the last message"):
        text_of_chat(chat, opened(tmp_path / "plain", PLAIN)[0])


def test_a_cut_prompt_begins_with_bos(tmp_path):
    """Catches a BOS that only the chat template writes cut off with the beginning of a prompt that is too long."""
    byte_level_folder(tmp_path, "llama3")
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**file, "post_processor": None}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}" + PLAIN, encoding="utf-8")
    tokenizer = Tokenizer(tmp_path)
    for prompt, bos in (
        (read_chat([{**USER, "content": "1 plus 2 " * 9}]), [tokenizer.bos_token_id]),
        ("a b " * 9, []),
    ):
        ids = encode_prompt(prompt, tokenizer)
        assert not tokenizer.adds_bos and cut_prompt(ids, 8, tokenizer) == bos + ids[len(ids) - 8 + len(bos) :]


def test_a_begun_answer_is_whole(tmp_path):
    """Catches an answer continued without its begun thoughts, because the template drops them."""
    tokenizer, _ = opened(tmp_path, DROPS)
    with pytest.raises(ValueError, match="leaves out a part of the last message"):
        text_of_chat(read_chat([USER, {"role": "assistant", "content": "<think>hm</think>It is"}]), tokenizer)


LISTED = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TOOLS}]
BESIDE = {"chat_template.jinja": PLAIN, "additional_chat_templates/tool_use.jinja": TOOLS}


@pytest.mark.parametrize(("template", "files"), ((LISTED, {}), (TOOLS, BESIDE)))
def test_a_template_for_tools(tmp_path, template, files):
    """Catches tools that are refused, or rendered by the default template, where the folder has a template for tools;
    and an export without that template."""
    tokenizer, oracle = opened(tmp_path / "in", template, files)
    save_folder(tmp_path / "out", [("norm.weight", torch.ones(1))], config={}, copy_from=tmp_path / "in")
    exported = Tokenizer(tmp_path / "out")
    for tools in (None, [TOOL]):
        text = oracle.apply_chat_template([USER], tools=tools, tokenize=False, add_generation_prompt=True)
        chat = read_chat([USER], {"tools": tools})
        assert text_of_chat(chat, tokenizer) == text_of_chat(chat, exported) == text
    assert json.dumps(TOOL) in text
    assert tokenizer.files() and {path.name for path in tokenizer.files()} == {path.name for path in exported.files()}


def test_the_file_counts_alone(tmp_path):
    """Catches a template for tools read from tokenizer_config.json though the folder has a chat_template.jinja."""
    tokenizer, _ = opened(tmp_path, LISTED, {"chat_template.jinja": PLAIN})
    with pytest.raises(ValueError, match="tools: the chat template has no place"):
        text_of_chat(read_chat([USER], {"tools": [TOOL]}), tokenizer)


@pytest.mark.parametrize("read", ("reasoning_content", "thinking"))
@pytest.mark.parametrize("stated", ("reasoning_content", "reasoning", "thinking"))
def test_thoughts_have_one_name_or_another(tmp_path, read, stated):
    """Catches thoughts left out of a prompt because the template reads them under another key."""
    tokenizer, oracle = opened(tmp_path, THOUGHTS.replace("NAME", read))
    messages = [USER, {"role": "assistant", "content": "3", stated: "hm"}, USER]
    text = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text_of_chat(read_chat(messages), tokenizer) == text and "hm|3" in text


@pytest.mark.parametrize("value", (True, False))
def test_settings_of_a_template(tmp_path, value):
    """Catches chat_template_kwargs (TRL's name) of a record without effect, such as thinking turned off, in prompts,
    begun answers and learnt turns; and keys accepted that the template does not read or that override other fields."""
    source = "{% set hm = hm | default(true) %}{% if hm %}<think>{% endif %}" + PLAIN
    tokenizer, oracle = opened(tmp_path, source)
    messages = [USER, {"role": "assistant", "content": "3"}]
    for kwargs in ({"hm": value, "x": None}, json.dumps({"hm": value})):
        fields = {"chat_template_kwargs": kwargs}
        text = oracle.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, hm=value)
        assert text_of_chat(read_chat([USER], fields), tokenizer) == text and text.startswith("<think>") == value
        text = oracle.apply_chat_template(messages, tokenize=False, continue_final_message=True, hm=value)
        assert text_of_chat(read_chat(messages, fields), tokenizer) == text
        text = oracle.apply_chat_template(messages, tokenize=False, hm=value)
        assert learnt_turns(read_chat(messages, fields), tokenizer).text == text
    for name, message in (("thinking", "does not read 'thinking'"), ("text", "read 'text'"), ("tools", "field or")):
        with pytest.raises(ValueError, match=message):
            text_of_chat(read_chat([USER], {"chat_template_kwargs": {name: [value]}}), tokenizer)
    with pytest.raises(ValueError, match="must be an object"):
        read_chat([USER], {"chat_template_kwargs": "hm"})
    assert read_chat([USER], {"chat_template_kwargs": {}}) == read_chat([USER])
