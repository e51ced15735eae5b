"""models/chats.py: assistant turns that call functions without any text. The template writes the last turn otherwise
than earlier ones, as Qwen3's does."""

from unittest import mock

import pytest

from models.chat_template import ChatTemplate
from models.chats import learnt_turns, read_chat
from models.tokenizer import Tokenizer
from tests.models import test_chat_corners

TEMPLATE = "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
TEMPLATE += (
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content or '' }}"
)
TEMPLATE += (
    "{% for c in m.tool_calls or [] %}<tool>{{ c.function | tojson }}</tool>{% endfor %}<|eot_id|>\n{% endfor %}"
)
TEMPLATE += "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
USER = {"role": "user", "content": "w?"}


@pytest.fixture
def opened(tmp_path):
    return test_chat_corners.opened(tmp_path, TEMPLATE)


def calling(name, arguments, content=""):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def answer(content):
    return {"role": "assistant", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}', {}])
def test_turns_in_a_row(opened, arguments):
    """Catches a turn that begins in the middle of the call before it: a call and the thought that the template writes
    for the last turn alone begin with the same letters."""
    tokenizer, theirs = opened
    messages = [USER, calling("f", arguments), calling("g", arguments, "so"), tool("5"), answer("5"), USER]
    messages += [calling("f", arguments), answer("6")]
    text, spans, cut = learnt_turns(read_chat(messages), tokenizer)
    if not isinstance(arguments, str):
        assert text == theirs.apply_chat_template(messages, tokenize=False)
    written = '{"city": "Rome"}' if arguments else "{}"
    f, g = (f'<tool>{{"name": "{name}", "arguments": {written}}}</tool><|eot_id|>' for name in "fg")
    wanted = [f, "so" + g, "5<|eot_id|>", f, "<think>\n\n</think>\n\n6<|eot_id|>"]
    assert [text[slice(*span)] for span in spans] == wanted and not cut


def test_a_long_chat_of_calls_takes_the_time_of_its_tokens(opened):
    """Catches a rendering of the whole chat for each call or turn: 128 calls took 47 times as long per token as 2.
    Renderings are counted."""
    counts, render = [], ChatTemplate._render
    for turns in (2, 2, 40):  # the first learns the headers
        messages = [USER, calling("f", {"x": 1}), tool("5"), answer("5")] * turns
        with mock.patch.object(ChatTemplate, "_render", autospec=True, side_effect=render) as rendered:
            learnt_turns(read_chat(messages), opened[0])
        counts.append(rendered.call_count)
    assert counts[2] <= counts[0]


LAST_QUESTION = "{% set ns = namespace(last=0) %}{% for m in messages %}"
LAST_QUESTION += "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
THINKING = LAST_QUESTION + TEMPLATE.replace(
    "m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n'",
    "m.thinking and loop.index0 > ns.last %}{{ '<think>\n' + m.thinking + '\n</think>\n\n'",
)


@pytest.mark.parametrize("output", ["5", "", " \n"])
@pytest.mark.parametrize("opening", ["", "<think>\n\n</think>\n\n"])
def test_tools_that_print_nothing(opened, output, opening):
    """Catches learning a tool's output, or a turn whose thoughts the template drops: where the output is empty, so that
    its place is unknown, and where the generation prompt has a thought that earlier turns lack."""
    tokenizer, theirs = opened
    template = THINKING.replace("<|assistant|>\n", "<|assistant|>\n" + opening)
    (tokenizer.config_path.parent / "chat_template.jinja").write_text(template, encoding="utf-8")
    first = {**calling("f", {}), "reasoning_content": "hm"}
    messages = [USER, first, tool(output), answer("5"), USER, first, tool(output), calling("g", {}), tool(output)]
    messages += [answer("6"), USER, answer("7")]
    text, spans, cut = learnt_turns(read_chat(messages), Tokenizer(tokenizer.config_path.parent))
    shown = [message | {"thinking": message.get("reasoning_content")} for message in messages]
    assert text == theirs.apply_chat_template(shown, chat_template=template, tokenize=False)
    wanted = ["5<|eot_id|>", '<tool>{"name": "g", "arguments": {}}</tool><|eot_id|>', "6<|eot_id|>", "7<|eot_id|>"]
    assert [text[slice(*span)] for span in spans] == wanted and cut == 2


@pytest.mark.parametrize("thoughts", [("hm", "hm"), ("", "hm"), ("hm", ""), ("", "")])
def test_a_thought_that_the_prompt_opens(opened, thoughts):
    """Catches learning the "<think>" that the generation prompt has opened, where an earlier turn of the same kind lost
    its thought and so began before it."""
    tokenizer, _ = opened
    template = THINKING.replace("<|assistant|>\n", "<|assistant|>\n<think>\n")
    (tokenizer.config_path.parent / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = Tokenizer(tokenizer.config_path.parent)
    first, then = ({"reasoning_content": thought} for thought in thoughts)
    messages = [USER, calling("f", {}) | first, tool("5"), calling("g", {}) | then, tool("6"), answer("7") | then]

    def learnt(messages):
        text, spans, _ = learnt_turns(read_chat(messages), tokenizer)
        return [text[slice(*span)] for span in spans]

    alone = learnt(messages)
    assert [turn.startswith("hm\n</think>\n\n") for turn in alone] == [bool(each) for each in (*thoughts, thoughts[1])]
    assert learnt([*messages, *messages])[-3:] == alone
    assert learnt([{**each, "reasoning_content": "ho"} for each in messages] + messages)[-3:] == alone


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}', {}])
def test_a_tool_whose_header_has_its_name(opened, arguments):
    """Catches learning the header of a tool's output, in which a template such as gpt-oss's repeats the called name."""
    tokenizer, _ = opened
    name = "{% if m.role == 'tool' %}{{ messages[loop.index0 - 1].tool_calls[-1].function.name }}<|eot_id|>{% endif %}"
    template = TEMPLATE.replace("{{ m.content or '' }}", name + "{{ m.content or '' }}")
    (tokenizer.config_path.parent / "chat_template.jinja").write_text(template, encoding="utf-8")
    first = calling("f", arguments)
    first["tool_calls"] += calling("g", arguments)["tool_calls"]
    messages = [USER, first, tool("5"), calling("f", arguments), tool("6"), answer("7")]
    text, spans, _ = learnt_turns(read_chat(messages), Tokenizer(tokenizer.config_path.parent))
    written = '{"city": "Rome"}' if arguments else "{}"
    f, g = (f'<tool>{{"name": "{name}", "arguments": {written}}}</tool>' for name in "fg")
    wanted = [f"{f}{g}<|eot_id|>", f"{f}<|eot_id|>", "<think>\n\n</think>\n\n7<|eot_id|>"]
    assert [text[slice(*span)] for span in spans] == wanted and "g<|eot_id|>5" in text
