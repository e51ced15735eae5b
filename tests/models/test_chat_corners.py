"""models/chats.py and models/chat_template.py: contents and calls as real records have them. The oracle is
transformers' rendering of the same template."""

import json

import pytest
from transformers import AutoTokenizer

from models.chats import learnt_turns, read_chat, text_of_chat
from models.records import Record, encode_answer, get_prompt
from models.tokenizer import Tokenizer
from tests.models.test_tokenizer import byte_level_folder

CHATML = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|eot_id|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
# As DeepSeek's: the arguments of calls are text, and calls are written only where the content is None.
DEEPSEEK = "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
DEEPSEEK += "{% for c in m['tool_calls'] %}{% set f = c['function'] %}"
DEEPSEEK += "{{ '<|assistant|>' + f['name'] + ' ' + f['arguments'] + '<|eot_id|>' }}{% endfor %}"
DEEPSEEK += "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|eot_id|>' }}{% endif %}{% endfor %}"


def opened(folder, template):
    byte_level_folder(folder, "llama3", eos_token="<|eot_id|>")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("content", ["\n", " \t", ""])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_white_space_alone(tmp_path, role, content):
    """Catches a message of white space, or of nothing, that ends the run with str.partition's "empty separator"."""
    tokenizer, theirs = opened(tmp_path, CHATML)
    messages = [{"role": each, "content": each} for each in ("system", "user", "assistant")]
    messages = [{**message, "content": content} if message["role"] == role else message for message in messages]
    text, spans, _ = learnt_turns(read_chat(messages), tokenizer)
    assert text == theirs.apply_chat_template(messages, tokenize=False)
    assert [text[slice(*span)] for span in spans] == [messages[-1]["content"] + "<|eot_id|>"]
    prompt = theirs.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert text_of_chat(read_chat(messages[:-1]), tokenizer) == prompt


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("arguments", [{"city": "K\u00f6ln", "days": [1, 2]}, {}])
def test_arguments_that_a_template_wants_as_text(tmp_path, arguments, content):
    """Catches a call silently left out of the row: a template that wants its arguments as text fails on an object, and
    writes an empty turn if it is then given an empty content."""
    tokenizer, theirs = opened(tmp_path, DEEPSEEK)

    def chat(arguments, content=None):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        called = {"role": "assistant", "content": content, "tool_calls": [call]}
        return [{"role": "user", "content": "w?"}, called, {"role": "tool", "content": "5"}]

    text = text_of_chat(read_chat(chat(arguments, content)), tokenizer)
    as_text = json.dumps(arguments, ensure_ascii=False)
    kept_none = "{% for m in messages %}{% set m = dict({'content': none}, **m) %}"  # transformers drops None
    wanted = theirs.apply_chat_template(
        chat(as_text), chat_template=DEEPSEEK.replace("{% for m in messages %}", kept_none), tokenize=False
    )
    assert text == wanted and f"weather {as_text}<|eot_id|>" in text


def test_calls_beside_a_content_that_hides_them(tmp_path):
    """Catches a call taken for written because the text differs without it: the template writes something else then."""
    tokenizer, _ = opened(tmp_path, DEEPSEEK)
    call = {"type": "function", "function": {"name": "weather", "arguments": 5}}  # neither an object nor text
    messages = [{"role": "user", "content": "w?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(ValueError, match="message 1: the chat template has no place for its tool_calls"):
        learnt_turns(read_chat(messages), tokenizer)


@pytest.mark.parametrize("begun", [[], [{"role": "assistant", "content": "It is "}]])
@pytest.mark.parametrize("end", ["<|eot_id|>", "<|eot_id|>\n", " <|eot_id|>"])
def test_an_answer_that_has_its_end(tmp_path, begun, end):
    """Catches a second, learnt end of turn behind an answer whose text ends with one already, as in many data sets."""
    tokenizer, _ = opened(tmp_path, CHATML)
    chat = read_chat([{"role": "user", "content": "2+2?"}, *begun])
    row, _ = encode_answer(chat, "4" + end, tokenizer)
    assert row == encode_answer(chat, "4" + end.partition("<")[0], tokenizer)[0]
    assert row.input_ids.count(tokenizer.eos_token_id) == 2  # the user's and the assistant's


def test_columns_of_json_text(tmp_path):
    """Catches calls given as JSON text, through which a template would iterate by characters, and the empty calls of a
    text column ("[]", "null") taken for calls."""
    tokenizer, _ = opened(tmp_path, DEEPSEEK)
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    user = {"role": "user", "content": "w?"}

    def text(calls, content=""):
        messages = [user, {"role": "assistant", "content": content, "tool_calls": calls}]
        return learnt_turns(read_chat(messages), tokenizer).text

    assert text(json.dumps([call])) == text([call]) and "weather" in text([call])
    assert text("[]", "5") == text("null", "5") == text([], "5") == text(None, "5")
    for calls in ("weather()", {"name": "weather"}, ["weather"], 5):
        with pytest.raises(ValueError, match=r"messages\[1\]: tool_calls must be a list of objects"):
            text(calls)
    fields = {"prompt": "a", "tools": "[]", "chat_template_kwargs": "{}"}
    assert get_prompt(Record("x:1", fields)) == "a"


def test_keys_of_other_records(tmp_path):
    """Catches nulls written into the text, which typed columns put into a record's tools and calls for keys of other
    records; and parameters given as JSON text written as a quoted string."""
    calls = "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
    template = "{{ tools | tojson }}" + CHATML.replace("{{ m.content }}", "{{ m.content }}" + calls)
    tokenizer, theirs = opened(tmp_path, template)
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

    def record(**more):
        properties = {**parameters["properties"], **({"days": None} if more else {})}
        tool = {"type": "function", "function": {"name": "f", "parameters": {**parameters, "properties": properties}}}
        call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome", **more}}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [{"role": "user", "content": "w?"}, said], [tool]

    messages, tools = record(days=None)
    text = learnt_turns(read_chat(messages, {"tools": tools}), tokenizer).text
    messages, tools = record()
    assert text == theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    [tool] = tools
    function = {**tool["function"], "parameters": json.dumps(parameters)}
    assert text == learnt_turns(read_chat(messages, {"tools": [{**tool, "function": function}]}), tokenizer).text
    as_text = json.dumps([tool | {"function": function}])
    assert text == learnt_turns(read_chat(messages, {"tools": as_text}), tokenizer).text
    for none in ("{}", ""):
        texts = [
            learnt_turns(read_chat(messages, {"tools": [{"name": "f", "parameters": each}]}), tokenizer).text
            for each in (none, {})
        ]
        assert texts[0] == texts[1]
    as_text = json.dumps(record(days=None)[1])  # deliberate in JSON text
    assert '"days": null' in learnt_turns(read_chat(messages, {"tools": as_text}), tokenizer).text


def test_an_empty_content_beside_calls(tmp_path):
    """Catches an empty content turned into None for a template that writes the calls anyway, and would write the word
    "None" with them; DeepSeek's, which leaves calls out beside a content, does get None."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [{"role": "user", "content": "w?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    calls = "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
    for content in ("{{ m.content }}", "{{ '' + m.content }}"):
        folder = tmp_path / str(len(content))
        folder.mkdir()
        tokenizer, theirs = opened(folder, CHATML.replace("{{ m.content }}", content + calls))
        text = learnt_turns(read_chat(messages), tokenizer).text
        assert text == theirs.apply_chat_template(messages, tokenize=False) and "weather" in text and "None" not in text
    (tmp_path / "deepseek").mkdir()
    tokenizer, _ = opened(tmp_path / "deepseek", DEEPSEEK)
    with_none = [messages[0], {**messages[1], "content": None}]
    assert learnt_turns(read_chat(messages), tokenizer) == learnt_turns(read_chat(with_none), tokenizer)


def test_keys_without_content(tmp_path):
    """Catches empty calls and thoughts, which typed columns put into each message, kept for templates that test whether
    the key is there: Llama 3's refused the chat, Qwen3's wrote a second, empty thought."""
    llama = CHATML.replace(
        "<|eot_id|>", "{% if 'tool_calls' in m %}{{ raise_exception('one call') }}{% endif %}<|eot_id|>"
    )
    tokenizer, theirs = opened(
        tmp_path,
        llama.replace(
            "{{ m.content }}",
            "{% if m.reasoning_content is string %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}",
        ),
    )
    messages = [{"role": "user", "content": "w?"}, {"role": "assistant", "content": "<think>hm</think>5"}]
    wanted = theirs.apply_chat_template(messages, tokenize=False)
    empty = {"tool_calls": [], "reasoning_content": "", "thinking": None}
    assert learnt_turns(read_chat([{**each, **empty} for each in messages]), tokenizer).text == wanted
    thinks = [messages[0], {"role": "assistant", "content": "5", **empty, "thinking": "hm"}]
    assert learnt_turns(read_chat(thinks), tokenizer).text == wanted


def test_arguments_as_python_writes_them(tmp_path):
    """Catches arguments that are Python's repr of a dictionary, or the empty text of a call without arguments, learnt
    as a quoted string."""
    calls = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    tokenizer, _ = opened(tmp_path, CHATML.replace("{{ m.content }}", "{{ m.content }}" + calls))

    def text(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "user", "content": "w?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return learnt_turns(read_chat(messages), tokenizer).text

    assert text("") == text("{}") == text({}) == text(None) and '"arguments": {}' in text("")
    assert '"arguments": "print(1)"' in text("print(1)")  # of a tool that takes code
    assert '\\"city\\":' in text('{"city":')  # text that is no JSON stays as it is
    with pytest.raises(ValueError, match=r"messages\[1\]: the arguments of a call are a Python literal, not JSON: ."):
        text("{'city': 'Rome'}")
