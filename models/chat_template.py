"""A folder's chat template: the text of a chat, and where each message went in it.

- templates are untrusted code: sandboxed Jinja, with what transformers gives them
- a template that asks for the date is told one day for the whole run
- a template may leave a message out, or a part of one. Each content is rendered once more between marks, which tell
  where it went: characters that Unicode reserves for no text
"""

import copy
import json
import re
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.functions import short

OPEN, BEGIN, END, LEARN, LEARNT = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
MARK = re.compile(f"{OPEN}(\\d+)([{BEGIN}{END}])|[{LEARN}{LEARNT}]")


class Rendering(NamedTuple):
    """Where in the text of a chat the content of each message begins and ends, as far as it is there. generated: the
    stretches that the template marks as the assistant's, with {% generation %}."""

    begins: dict[int, int]
    ends: dict[int, int]
    generated: list[tuple[int, int]]


class ChatTemplate:
    """source: in Jinja; folder: for messages; tokens: {"bos_token": ...}; today: what it is told."""

    def __init__(self, source: str, folder: Path, tokens: dict[str, str], today: date):
        self.source, self.folder, self._tokens, self.today = source, folder, tokens, today
        self.leads: dict[tuple, str] = {}  # what it writes between a message and its answer, see models/chats.py

    def render(self, messages: list[dict], *, add_generation_prompt: bool, tools: list | None = None) -> str:
        """Raises ValueError if the template is none, or refuses these messages."""
        return self._render(messages, add_generation_prompt, tools, ("", ""))

    def locate(self, text: str, messages: list[dict], tools: list | None = None) -> Rendering | None:
        """Where the messages are in `text`, which is theirs without a generation prompt; None if the template does not
        write the same around marks."""
        marked = [
            {**message, "content": _between_marks(i, message["content"])} if message.get("content") else message
            for i, message in enumerate(messages)
        ]
        begins, ends, generated, parts, length, end = {}, {}, [], [], 0, 0
        rendered = self._render(marked, False, tools, (LEARN, LEARNT))
        for mark in MARK.finditer(rendered):
            parts.append(rendered[end : mark.start()])
            length, end = length + len(parts[-1]), mark.end()
            if mark[0] == LEARN:
                generated.append((length, length))
            elif mark[0] == LEARNT:
                generated[-1] = (generated[-1][0], length)
            else:
                (begins if mark[2] == BEGIN else ends).setdefault(int(mark[1]), length)
        if "".join(parts) + rendered[end:] != text:
            return None
        return Rendering(begins, ends, generated)

    @cached_property
    def behind_an_answer(self) -> str:
        """What it writes behind the content of an assistant's message; "" if it refuses the simplest of chats."""
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        try:
            text = self.render(chat, add_generation_prompt=False)
        except ValueError:
            return ""
        place = self.locate(text, chat)
        return "" if place is None or 1 not in place.ends else text[place.ends[1] :]

    def _render(self, messages, add_generation_prompt: bool, tools: list | None, marks: tuple[str, str]) -> str:
        values = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt, **self._tokens}
        failure = None
        # Keys without a value are hidden from the template, as in transformers. Beside tool_calls, which may have no
        # content, DeepSeek's asks for None, and others for text.
        for content in ({}, {"content": None}, {"content": ""}):
            shown = [{**content, **{key: value for key, value in m.items() if value is not None}} for m in messages]
            try:
                text = self._compiled.render(messages=shown, _generation=marks, **values)
                if any(json.dumps(each, ensure_ascii=False) in text for each in _texts_of_objects(shown)):
                    shown = [_with_objects(message) for message in shown]
                    text = self._compiled.render(messages=shown, _generation=marks, **values)
                return text
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"{self.folder}: chat template, line {error.lineno}: {short(error)}") from error
            except Exception as error:  # the template is a program of its own: it can fail in any way
                failure = failure or error
        raise ValueError(f"{self.folder}: chat template failed: {short(failure)}") from failure

    @cached_property
    def _compiled(self) -> jinja2.Template:
        def raise_exception(message):
            raise jinja2.TemplateError(message)

        def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            return json.dumps(
                value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
            )

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = datetime.combine(self.today, time()).strftime
        return environment.from_string(self.source)


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


def _functions_of(message: dict) -> list[dict]:
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


def _texts_of_objects(messages: list[dict]) -> list[str]:
    """The arguments of calls that are the text of an object. OpenAI's format has them so; most templates write an
    object, and of its text a JSON string, which nobody who reads the answer would take for arguments."""
    arguments = [function.get("arguments") for message in messages for function in _functions_of(message)]
    return [each for each in arguments if _object_in(each) is not None]


def _with_objects(message: dict) -> dict:
    """A message whose calls have objects in the place of their texts."""
    if not _texts_of_objects([message]):
        return message
    message = copy.deepcopy(message)
    for function in _functions_of(message):
        value = _object_in(function.get("arguments"))
        function |= {} if value is None else {"arguments": value}
    return message


def _between_marks(i: int, content: str) -> str:
    """White space stays outside, since templates strip it."""
    core = content.strip()
    before, _, behind = content.partition(core)
    return f"{before}{OPEN}{i}{BEGIN}{core}{OPEN}{i}{END}{behind}" if core else content


def read_chat_template(folder: Path, config: dict) -> str | None:
    """The template's source, from chat_template.jinja or the contents of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not readable: {short(error)}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is neither a string nor a list of them")
    return template
