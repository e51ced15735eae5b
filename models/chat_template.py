"""A folder's chat template: renders the text of a chat, and locates each message in it.

- templates are untrusted code: they run in Jinja's sandbox, with the functions and variables that transformers provides
- a template that asks for the date gets the same day during the whole run
- a template may leave out a message or a part of one. To locate contents, the chat is rendered a second time with marks
  around each content: noncharacters, which Unicode keeps out of texts
"""

import copy
import json
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import date, datetime, time
from functools import cache, cached_property
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.meta
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.common import say
from models.files import TOOL_USE
from models.functions import short

SAFE_JINJA = (3, 1, 6)  # older ones: CVE-2024-56326, CVE-2025-27516
REASONING = ("reasoning_content", "thinking", "reasoning")  # an assistant's thoughts, beside its content
OPEN, BEGIN, END, LEARN, LEARNT, CALL = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4", "\ufdd5"
MARK = re.compile(f"{OPEN}(\\d+)(?:{OPEN}\\d+)?([{BEGIN}{END}{CALL}])|[{LEARN}{LEARNT}]")


class Rendering(NamedTuple):
    """The text of a chat without a generation prompt. begins, ends: {i: where the content of message i begins and ends
    in it}, for contents that it shows. calls: {i: a position within message i's last tool call}. generated: the spans
    that the template marks as the assistant's, with {% generation %}."""

    text: str
    begins: dict[int, int]
    ends: dict[int, int]
    calls: dict[int, int]
    generated: list[tuple[int, int]]


@cache
def _unsafe_jinja() -> str | None:
    """The version of jinja2, if its sandbox has known holes."""
    found = version("jinja2")
    return found if tuple(map(int, re.findall(r"\d+", found)[:3])) < SAFE_JINJA else None


class ChatTemplate:
    """sources: Jinja source of the "default" template, and maybe of "tool_use", for chats with tools; folder: for error
    messages; tokens: {"bos_token": ...}; today: the date for strftime_now."""

    def __init__(self, sources: dict[str, str], folder: Path, tokens: dict[str, str], today: date):
        self.sources, self.folder, self._tokens, self.today = sources, folder, tokens, today
        self.source = "".join(sources.values())  # of all templates, to search for a word
        # templates of equal format write equal texts
        self.format = sources, {name: token for name, token in tokens.items() if name in self.source}
        self.ignored: set[str] | None = None  # see ignore_unread

    @property
    def asks_for_date(self) -> bool:
        return "strftime_now" in self.source

    def render(self, messages: list[dict], /, *, add_generation_prompt: bool, **values) -> str:
        """Renders a chat. values: "tools", and other variables of the template (see variables()). Raises ValueError if
        the template is not valid, or fails on these messages."""
        return self._render(messages, add_generation_prompt, values, ("", ""))

    def render_open(self, messages: list[dict], /, **values) -> str:
        """Renders a chat up to the end of its last message's content, which an answer continues; trailing white space
        stays if the template keeps it. Raises ValueError as render does, and if the content is not in the text."""
        marked = {**messages[-1], "content": f"{messages[-1]['content']}{END} "}
        text = self.render([*messages[:-1], marked], add_generation_prompt=False, **values)
        before, mark, behind = text.rpartition(END)
        if not mark:
            raise ValueError(f"{self.folder}: the chat template leaves out the message that the answer continues")
        return before if behind.startswith(" ") else before.rstrip()

    def locate(self, messages: list[dict], /, **values) -> Rendering:
        """Renders a chat and locates its messages; finds none if marks change the text that the template writes around
        them. Raises ValueError as render does."""
        text = self.render(messages, add_generation_prompt=False, **values)
        if any(map(functions_of, messages)):
            with suppress(ValueError):  # the template may fail on a function name with a mark
                found = self._locate(text, [_marked_calls(i, message) for i, message in enumerate(messages)], values)
                if any(found[1:]):
                    return found
        return self._locate(text, messages, values)

    def _locate(self, text: str, messages: list[dict], values: dict) -> Rendering:
        marked = [
            {**message, "content": _between_marks(i, message["content"])} if message.get("content") else message
            for i, message in enumerate(messages)
        ]
        begins, ends, calls, generated, parts, length, end, seen = {}, {}, {}, [], [], 0, 0, set()
        rendered = self._render(marked, False, values, (LEARN, LEARNT))
        for mark in MARK.finditer(rendered):
            parts.append(rendered[end : mark.start()])
            length, end = length + len(parts[-1]), mark.end()
            if mark[0] == LEARN:
                generated.append((length, length))
            elif mark[0] == LEARNT:
                if not generated:  # the character stands in the chat
                    return Rendering(text, {}, {}, {}, [])
                generated[-1] = (generated[-1][0], length)
            elif mark[2] == CALL:
                if mark[0] not in seen:  # gpt-oss's template repeats a function's name before the tool's output
                    calls[int(mark[1])] = length
                seen.add(mark[0])
            else:
                (begins if mark[2] == BEGIN else ends).setdefault(int(mark[1]), length)
        if "".join(parts) + rendered[end:] != text:
            return Rendering(text, {}, {}, {}, [])
        return Rendering(text, begins, ends, calls, generated)

    @cached_property
    def behind_an_answer(self) -> str:
        """The text after the content of an assistant's message; "" if the template fails on the simplest chat."""
        self._check_sandbox()  # whose refusal is not a failure of the template
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        try:
            found = self.locate(chat)
        except ValueError:
            return ""
        return found.text[found.ends[1] :] if 1 in found.ends else ""

    def ignore_unread(self) -> None:
        """For a reward model: lets check_read ignore variables, since those of a record are meant for the policy's
        template."""
        self.ignored = set()

    def check_read(self, name: str, has_tools: bool) -> None:
        """Raises ValueError for a variable that the template does not read, or says once that it is ignored."""
        if name in self.variables(has_tools):
            return
        if self.ignored is None:
            raise ValueError(f"chat_template_kwargs: the chat template does not read {name!r}")
        if name not in self.ignored:
            self.ignored.add(name)
            say(f"{self.folder}: {name!r} of chat_template_kwargs is ignored, which the reward model's template lacks")

    def _check_sandbox(self) -> None:
        if found := _unsafe_jinja():
            why = f"a chat template can leave the sandbox of jinja2 {found}; install jinja2>=3.1.6"
            raise ValueError(f"{self.folder}: {why}")

    def _render(self, messages, add_generation_prompt: bool, values: dict, marks: tuple[str, str]) -> str:
        self._check_sandbox()
        usual = {"tools": None, "documents": None, **self._tokens}
        values = {**usual, **values, "add_generation_prompt": add_generation_prompt, "_generation": marks}
        failure = None
        # Keys with the value None are hidden from the template, as in transformers. If a message with tool_calls has no
        # content, DeepSeek's template expects None, others expect text: each is tried.
        for content in ({}, {"content": None}, {"content": ""}):
            shown = [{**content, **_with_reasoning(message)} for message in messages]
            try:
                return _written(self._compiled(bool(values["tools"])), shown, values)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"{self.folder}: chat template, line {error.lineno}: {short(error)}") from error
            except Exception as error:  # a template can fail in any way
                failure = failure or error
        raise ValueError(f"{self.folder}: chat template failed: {short(failure)}") from failure

    @cache  # noqa: B019 (a process has one or two templates, until its end)
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
        """Returns the names of the variables that the template for chats with tools, or without, reads. Raises
        jinja2.TemplateSyntaxError."""
        parsed = self._compiled(has_tools).environment.parse(self._source(has_tools))
        return frozenset(jinja2.meta.find_undeclared_variables(parsed))


def _with_reasoning(message: dict) -> dict:
    """Returns a message without its None values, and with its thoughts under the names that templates read, whichever
    of REASONING the record has; the first one counts, as in transformers (5.23)."""
    message = {key: value for key, value in message.items() if value is not None}
    thoughts = next((message[name] for name in REASONING if name in message), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


class _Generation(Extension):
    """Jinja extension for transformers' `{% generation %} ... {% endgeneration %}` around an assistant's turn: writes
    the two texts of the variable _generation around the body."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(i):
            name = jinja2.nodes.Name("_generation", "load")
            return jinja2.nodes.Output([jinja2.nodes.Getitem(name, jinja2.nodes.Const(i), "load")])

        return jinja2.nodes.Scope([mark(0), *body, mark(1)], lineno=line)


def _written(template: jinja2.Template, messages: list[dict], values: dict) -> str:
    """Renders a chat. An empty content beside calls becomes None for templates that write calls only beside None, such
    as DeepSeek's; others fail on None, or write the word."""
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
    except Exception:  # the template does not support these calls
        return text


def _with_calls(template: jinja2.Template, messages: list[dict], values: dict) -> str:
    """Renders a chat. In OpenAI's format the arguments of a call are the JSON text of an object. Most templates expect
    the object, and fail on the text or write it as a quoted JSON string, which no parser of answers takes for
    arguments. Others, such as DeepSeek's, fail on objects."""
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
    """Returns the {"name", "arguments"} of a message's calls that have OpenAI's format."""
    calls = message.get("tool_calls")
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    functions = [call.get("function", call) for call in calls]
    return [function for function in functions if isinstance(function, dict)]


def _object_in(text: object) -> dict | None:
    """Parses a text that is a JSON object; None for anything else."""
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _text_of(value: object) -> str | None:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None


def _with_arguments(message: dict, other_form: Callable[[object], object | None]) -> dict:
    """Returns a message with the arguments of its calls in another form, where they have one."""
    message = copy.deepcopy(message)
    for function in functions_of(message):
        value = other_form(function.get("arguments"))
        function |= {} if value is None else {"arguments": value}
    return message


def with_other_calls(message: dict) -> dict:
    """Returns a message with changed names and arguments in its calls; without calls if they have neither."""
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
    """Returns a message with marks in the function names and arguments of its calls, each name and each arguments with
    a mark of its own."""
    message, marks = copy.deepcopy(message), (f"{OPEN}{i}{OPEN}{n}{CALL}" for n in count())
    for function in functions_of(message):
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(name, str):
            function["name"] = name + next(marks)
        mark = next(marks)
        if isinstance(arguments, dict):
            function["arguments"] = {key + mark * (j == 0): value for j, (key, value) in enumerate(arguments.items())}
        elif isinstance(arguments, str):  # after a quotation mark, where it keeps JSON valid
            function["arguments"] = arguments.replace('"', '"' + mark, 1)
    return message


def _between_marks(i: int, content: str) -> str:
    """Puts marks around a content. White space stays outside, since templates strip it."""
    core = content.strip()
    if not core:
        return content
    before, _, behind = content.partition(core)
    return f"{before}{OPEN}{i}{BEGIN}{core}{OPEN}{i}{END}{behind}"


def read_chat_template(folder: Path, config: dict) -> dict[str, str]:
    """Returns the sources of the folder's templates by name, {} if there is no "default". chat_template.jinja, and
    tool_use.jinja in additional_chat_templates, take precedence over tokenizer_config.json."""
    paths = {"default": folder / "chat_template.jinja", "tool_use": folder / TOOL_USE}
    template, where = config.get("chat_template"), folder / "tokenizer_config.json"
    if template is None or paths["default"].is_file():
        template = {}
    if isinstance(template, list):
        pairs = [(entry.get("name"), entry.get("template")) for entry in template if isinstance(entry, dict)]
        if not all(isinstance(name, str) for name, _ in pairs):
            raise ValueError(f"{where}: a template in the list chat_template has no name, or one that is no string")
        template = dict(pairs)
    if not isinstance(template, dict):
        template = {"default": template}
    try:
        template |= {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: cannot read its chat templates: {short(error)}") from error
    if not all(isinstance(source, str) for source in template.values()):
        raise ValueError(f"{where}: chat_template is neither a string nor a list of them")
    return template if "default" in template else {}
