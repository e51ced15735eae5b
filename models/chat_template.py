"""A folder's chat template: the text of a chat, and where each message went in it.

- templates are untrusted code: sandboxed Jinja, with what transformers gives them
- a template that asks for the date is told one day for the whole run
- a template may leave a message out, or a part of one. Each content is rendered once more between marks, which tell
  where it went: characters that Unicode reserves for no text
"""

import copy
import json
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import date, datetime, time
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.meta
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.functions import short

REASONING = ("reasoning_content", "thinking", "reasoning")  # an assistant's thoughts, beside its content
OPEN, BEGIN, END, LEARN, LEARNT, CALL = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4", "\ufdd5"
TOOL_USE = "additional_chat_templates/tool_use.jinja"  # of a folder
MARK = re.compile(f"{OPEN}(\\d+)([{BEGIN}{END}{CALL}])|[{LEARN}{LEARNT}]")


class Rendering(NamedTuple):
    """The text of a chat without a generation prompt, and where in it the content of each message begins and ends, as
    far as it is there. calls: a place in what stands for the last of its calls. generated: the stretches that the
    template marks as the assistant's, with {% generation %}."""

    text: str
    begins: dict[int, int]
    ends: dict[int, int]
    calls: dict[int, int]
    generated: list[tuple[int, int]]


class ChatTemplate:
    """sources: in Jinja, the "default" and maybe another for chats with tools, "tool_use"; folder: for messages;
    tokens: {"bos_token": ...}; today: what it is told."""

    def __init__(self, sources: dict[str, str], folder: Path, tokens: dict[str, str], today: date):
        self.sources, self.folder, self._tokens, self.today = sources, folder, tokens, today
        self.source = "".join(sources.values())  # to look for a word in

    def render(self, messages: list[dict], /, *, add_generation_prompt: bool, **values) -> str:
        """values: "tools", and what else the template reads (variables()). Raises ValueError if the template is none,
        or refuses these messages."""
        return self._render(messages, add_generation_prompt, values, ("", ""))

    def render_open(self, messages: list[dict], /, **values) -> str:
        """The text of a chat up to where the content of its last message ends, which an answer goes on from; white
        space there stays if the template keeps it. Raises ValueError as render does, and if the content is not in the
        text."""
        marked = {**messages[-1], "content": f"{messages[-1]['content']}{END} "}
        text = self.render([*messages[:-1], marked], add_generation_prompt=False, **values)
        before, mark, behind = text.rpartition(END)
        if not mark:
            raise ValueError(f"{self.folder}: the chat template leaves out what the answer goes on from")
        return before if behind.startswith(" ") else before.rstrip()

    def locate(self, messages: list[dict], /, **values) -> Rendering:
        """The text of a chat and where its messages are: nowhere if the template does not write the same around marks.
        Raises ValueError as render does."""
        text = self.render(messages, add_generation_prompt=False, **values)
        if any(map(functions_of, messages)):
            with suppress(ValueError):  # it refuses a function of another name
                found = self._locate(text, [_marked_calls(i, message) for i, message in enumerate(messages)], values)
                if any(found[1:]):
                    return found
        return self._locate(text, messages, values)

    def _locate(self, text: str, messages: list[dict], values: dict) -> Rendering:
        marked = [
            {**message, "content": _between_marks(i, message["content"])} if message.get("content") else message
            for i, message in enumerate(messages)
        ]
        begins, ends, calls, generated, parts, length, end = {}, {}, {}, [], [], 0, 0
        rendered = self._render(marked, False, values, (LEARN, LEARNT))
        for mark in MARK.finditer(rendered):
            parts.append(rendered[end : mark.start()])
            length, end = length + len(parts[-1]), mark.end()
            if mark[0] == LEARN:
                generated.append((length, length))
            elif mark[0] == LEARNT:
                generated[-1] = (generated[-1][0], length)
            elif mark[2] == CALL:
                calls[int(mark[1])] = length
            else:
                (begins if mark[2] == BEGIN else ends).setdefault(int(mark[1]), length)
        if "".join(parts) + rendered[end:] != text:
            return Rendering(text, {}, {}, {}, [])
        return Rendering(text, begins, ends, calls, generated)

    @cached_property
    def behind_an_answer(self) -> str:
        """What it writes behind the content of an assistant's message; "" if it refuses the simplest of chats."""
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        try:
            found = self.locate(chat)
        except ValueError:
            return ""
        return found.text[found.ends[1] :] if 1 in found.ends else ""

    def _render(self, messages, add_generation_prompt: bool, values: dict, marks: tuple[str, str]) -> str:
        usual = {"tools": None, "documents": None, **self._tokens}
        values = {**usual, **values, "add_generation_prompt": add_generation_prompt, "_generation": marks}
        failure = None
        # Keys without a value are hidden from the template, as in transformers. Beside tool_calls, which may have no
        # content, DeepSeek's asks for None, and others for text.
        for content in ({}, {"content": None}, {"content": ""}):
            shown = [{**content, **_with_reasoning(message)} for message in messages]
            try:
                return _written(self._compiled(bool(values["tools"])), shown, values)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"{self.folder}: chat template, line {error.lineno}: {short(error)}") from error
            except Exception as error:  # the template is a program of its own: it can fail in any way
                failure = failure or error
        raise ValueError(f"{self.folder}: chat template failed: {short(failure)}") from failure

    @cache  # noqa: B019 (a process has one or two templates, for as long as it runs)
    def _compiled(self, has_tools: bool) -> jinja2.Template:
        def raise_exception(message):
            raise jinja2.TemplateError(message)

        def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # as transformers has it
            options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = datetime.combine(self.today, time()).strftime
        return environment.from_string(self._source(has_tools))

    def _source(self, has_tools: bool) -> str:
        return self.sources["tool_use" if has_tools and "tool_use" in self.sources else "default"]

    @cache  # noqa: B019 (as above)
    def variables(self, has_tools: bool) -> frozenset[str]:
        """What it reads of its surroundings, for chats with tools or without. Raises jinja2.TemplateSyntaxError."""
        parsed = self._compiled(has_tools).environment.parse(self._source(has_tools))
        return frozenset(jinja2.meta.find_undeclared_variables(parsed))


def _with_reasoning(message: dict) -> dict:
    """What a message has, its thoughts under the names that templates read, whichever the record has: as transformers
    (5.23), which prefers them in this order."""
    message = {key: value for key, value in message.items() if value is not None}
    thoughts = next((message[name] for name in REASONING if name in message), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, transformers' mark around an assistant's turn: its body between the
    two texts of the variable _generation."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(i):
            name = jinja2.nodes.Name("_generation", "load")
            return jinja2.nodes.Output([jinja2.nodes.Getitem(name, jinja2.nodes.Const(i), "load")])

        return jinja2.nodes.Scope([mark(0), *body, mark(1)], lineno=line)


def _written(template: jinja2.Template, messages: list[dict], values: dict) -> str:
    """The text of a chat. An empty content beside calls is none to templates that write calls beside none alone, as
    DeepSeek's; others fail on none, or write the word."""
    text = _with_calls(template, messages, values)
    silent = [message.get("content") == "" and bool(functions_of(message)) for message in messages]
    if not any(silent):
        return text
    others = [with_other_calls(message) if is_silent else message for message, is_silent in zip(messages, silent)]
    if _with_calls(template, others, values) != text:
        return text
    messages = [message | {"content": None} if is_silent else message for message, is_silent in zip(messages, silent)]
    try:
        return _with_calls(template, messages, values)
    except Exception:  # it has no place for these calls
        return text


def _with_calls(template: jinja2.Template, messages: list[dict], values: dict) -> str:
    """The text of a chat. OpenAI's format has the arguments of calls as the text of an object; most templates write an
    object, and of its text a JSON string, which nobody who reads the answer would take for arguments, or fail. Others,
    as DeepSeek's, fail on objects."""
    arguments = [function.get("arguments") for message in messages for function in functions_of(message)]
    texts = [each for each in arguments if _object_in(each) is not None]
    try:
        text = template.render(messages=messages, **values)
        if not any(json.dumps(each, ensure_ascii=False) in text for each in texts):
            return text
    except Exception:
        if not texts and not any(isinstance(each, dict) for each in arguments):
            raise
    other_form = _object_in if texts else _text_of
    return template.render(messages=[_with_arguments(message, other_form) for message in messages], **values)


def functions_of(message: dict) -> list[dict]:
    """What a message calls, {"name", "arguments"} each, as far as it is what OpenAI's format says."""
    calls = message.get("tool_calls")
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    functions = [call.get("function", call) for call in calls]
    return [function for function in functions if isinstance(function, dict)]


def _object_in(text: object) -> dict | None:
    """The JSON object that a text is."""
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _text_of(value: object) -> str | None:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None


def _with_arguments(message: dict, other_form: Callable[[object], object | None]) -> dict:
    """A message whose calls have their arguments in another form, where they have one."""
    message = copy.deepcopy(message)
    for function in functions_of(message):
        value = other_form(function.get("arguments"))
        function |= {} if value is None else {"arguments": value}
    return message


def with_other_calls(message: dict) -> dict:
    """A message that calls functions of other names, with other arguments; it calls nothing if it names neither."""
    message, changed = copy.deepcopy(message), False
    for function in functions_of(message):
        for key in ("name", "arguments"):
            value = function.get(key)
            if isinstance(value, str | dict):
                entries = value if isinstance(value, dict) else _object_in(value)
                other = f"{value}x" if entries is None else {**entries, "x": "x"}
                function[key] = other if entries is None or entries is value else _text_of(other)
                changed = True
    return message if changed else {**message, "tool_calls": None}


def _marked_calls(i: int, message: dict) -> dict:
    """A message with marks in the names of what it calls, and in the arguments."""
    message, mark = copy.deepcopy(message), f"{OPEN}{i}{CALL}"
    for function in functions_of(message):
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(name, str):
            function["name"] = name + mark
        if isinstance(arguments, dict):
            function["arguments"] = {key + mark * (j == 0): value for j, (key, value) in enumerate(arguments.items())}
        elif isinstance(arguments, str):  # behind a quotation mark, where it leaves JSON what it is
            function["arguments"] = arguments.replace('"', '"' + mark, 1)
    return message


def _between_marks(i: int, content: str) -> str:
    """White space stays outside, since templates strip it."""
    core = content.strip()
    if not core:
        return content
    before, _, behind = content.partition(core)
    return f"{before}{OPEN}{i}{BEGIN}{core}{OPEN}{i}{END}{behind}"


def read_chat_template(folder: Path, config: dict) -> dict[str, str]:
    """The sources of the folder's templates by name, {} if it has no "default": from tokenizer_config.json, and before
    that chat_template.jinja, and additional_chat_templates beside it."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if not isinstance(template, dict):
        template = {} if template is None else {"default": template}
    paths = {"default": folder / "chat_template.jinja", "tool_use": folder / TOOL_USE}
    if paths["default"].is_file():
        template = {}
    try:
        template |= {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: its chat templates are not readable: {short(error)}") from error
    if not all(isinstance(source, str) for source in template.values()):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is neither a string nor a list of them")
    return template if "default" in template else {}
