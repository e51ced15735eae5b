"""Reads the chats of data records, renders them with a folder's chat template, and finds the learnt spans of the text.

- `messages` (or a prompt of messages) with roles of any name; a content is text, parts of type text, or missing beside
  tool_calls; a record may also have `tools` and `system`. An error names those that the template has no place for
- an assistant's turn runs from the end of its header (which the template writes as the generation prompt) to the first
  end-of-turn token after its content; text after that token, often a newline, is not learnt. If the template marks the
  turns itself, with {% generation %}, its marks decide
- a message with `weight` 0, or with `train` or `loss` false, is not learnt
- templates of reasoning models leave out parts of messages. A last turn that would lose a part is learnt as it would be
  generated: the generation prompt followed by the unchanged content. Earlier ones are not learnt, but counted
"""

import json
import re
from functools import cache
from typing import NamedTuple

from models.chat_template import REASONING, ChatTemplate, Rendering, functions_of, with_other_calls
from models.record_files import kind_of
from models.tokenizer import Tokenizer

TAG_BEGUN, LONGEST_TAG = re.compile(r"[<\[][^<>\[\]\s]*$"), 80
BEGUN_THOUGHT = re.compile(r"<(\w+)>\s*(?:</\1>\s*)?$")  # at a header's end; headers of earlier turns may lack it
CLOSED_THOUGHT, EMPTY_THOUGHT = re.compile(r"<(\w+)>\s*</\1>\s*$"), re.compile(r"<(\w+)>\s*</\1>")
MEDIA = ("images", "videos", "audios")
ONE_MEDIUM = ("image", "video", "audio")  # TRL reads image as it reads images; beside a text it may be anything
# Fields of records that are an error, since ignoring them would lose data; and what to do instead.
NOT_READ = {
    "history": "put its turns into the messages",
    "system_prompt": "call it system",
    "functions": "give tools, and tool_calls in the messages",
    "documents": "put them into the messages, or into chat_template_kwargs where the template reads them",
    **dict.fromkeys((*MEDIA, *ONE_MEDIUM), "only text can be read"),
}
OWN_VALUES = {"messages", "tools", "add_generation_prompt", "_generation"}  # not allowed in chat_template_kwargs


class Chat(NamedTuple):
    """Messages as a chat template takes them, and the record's tools and chat_template_kwargs (TRL's name); learnt[i]:
    whether message i may be learnt."""

    messages: list[dict]
    learnt: list[bool]
    tools: list | None = None
    kwargs: dict | None = None

    @property
    def values(self) -> dict:
        """The template's variables, except the messages."""
        return {"tools": self.tools, **(self.kwargs or {})}

    @property
    def is_open(self) -> bool:
        """Whether the last message is the beginning of an assistant's answer, to be continued."""
        last = self.messages[-1]
        begun = content_of(last).strip() or any(last.get(name) for name in REASONING)
        return last["role"] == "assistant" and bool(begun) and not last.get("tool_calls")

    @property
    def ends_in_silence(self) -> bool:
        """Whether the last message is the assistant's and empty: the template would end it, and open another."""
        last = self.messages[-1]
        return last["role"] == "assistant" and not self.is_open and not last.get("tool_calls")

    def before(self, answer: "Chat") -> "Chat":
        """Returns this chat, none of it learnt, continued by `answer`."""
        learnt = [False] * len(self.messages) + answer.learnt
        return Chat(self.messages + answer.messages, learnt, self.tools or answer.tools, self.kwargs or answer.kwargs)


def read_chat(messages: object, fields: dict | None = None, what: str = "messages") -> Chat:
    """Reads the messages of a record, and its `tools`, `system` and `chat_template_kwargs`. Raises ValueError for parts
    that cannot be used."""
    fields = fields or {}
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f'{what} must be a non-empty list of {{"role", "content"}}, not '
            + ("an empty list" if isinstance(messages, list) else kind_of(messages))
        )
    read = [_read_message(message, f"{what}[{i}]") for i, message in enumerate(messages)]
    has_system = fields.get("system") or read[0][0]["role"] in ("system", "developer")
    for name in not_read(fields):
        if name != "system_prompt" or not has_system:
            raise ValueError(f'"{name}" is not read; {NOT_READ[name]}')
    system = fields.get("system")
    if system:
        if not isinstance(system, str):
            raise ValueError(f"system must be text, not {kind_of(system)}")
        if read[0][0]["role"] == "system":
            raise ValueError(f"system, and {what}[0] is a system message too; leave one out")
        read.insert(0, ({"role": "system", "content": system}, False))
    tools, kwargs = parsed(without_nulls(fields.get("tools"))), parsed(fields.get("chat_template_kwargs"))
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools must be a list of objects, or its JSON text")
    for function in (tool.get("function", tool) for tool in tools or ()):
        if isinstance(function, dict) and isinstance(function.get("parameters"), str):
            function["parameters"] = parsed(function["parameters"]) or {}  # templates would quote a string
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError("chat_template_kwargs must be an object, or its JSON text")
    kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None} or None
    for name in OWN_VALUES & (kwargs or {}).keys():
        raise ValueError(f"chat_template_kwargs: {name!r} cannot be set here; it has a field or a flag of its own")
    return Chat([message for message, _ in read], [learnt for _, learnt in read], tools, kwargs)


def not_read(fields: dict) -> list[str]:
    """Returns the fields of NOT_READ that are not empty."""
    found = {name: parsed(without_nulls(fields[name])) for name in NOT_READ if name in fields}
    for name in {"functions", "documents"} & found.keys():
        if not (isinstance(found[name], list) and all(isinstance(each, dict) for each in found[name])):
            del found[name]  # another kind of field that has this name
    return [name for name, value in found.items() if _has_content(value)]


def parsed(value: object) -> object:
    """Parses a field that is JSON text, as in data sets with typed columns; returns None for an empty field."""
    try:
        return (json.loads(value) if isinstance(value, str) and value else value) or None
    except ValueError:
        return value


def without_nulls(value: object) -> object:
    """Removes null entries from objects: with typed columns, each object has the keys of all records. JSON text is not
    parsed."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _has_content(value: object) -> bool:
    """Whether a value is or contains anything but nulls and empty values."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return bool(value) if parts is None else any(map(_has_content, parts))


def _read_message(message: object, name: str) -> tuple[dict, bool]:
    """Returns (the message for a template, whether it is learnt)."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f'{name} must be an object with the string "role"')
    message, learnt = dict(message), message["role"] == "assistant"
    for key in ("weight", "train", "loss"):
        value = message.pop(key, None)
        if value not in (None, 0, 1):
            raise ValueError(f"{name}: {key} must be 0 or 1, false or true, not {ascii(value)[:60]}")
        learnt = learnt and value != 0
    if _has_content(message.get("function_call")):
        raise ValueError(f"{name}: function_call is not read; give tool_calls")
    # Templates test whether a message has these keys; with typed columns every message has them, empty.
    message = {key: value for key, value in message.items() if value or key not in ("tool_calls", *REASONING)}
    calls = message.get("tool_calls")
    if calls:
        calls = message["tool_calls"] = parsed(without_nulls(calls))
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"{name}: tool_calls must be a list of objects, or its JSON text")
    for function in (each for each in functions_of(message) if "name" in each):
        arguments = function.get("arguments")
        if arguments in (None, ""):
            function["arguments"] = {}
        elif isinstance(arguments, str) and arguments.lstrip().startswith("{'"):
            raise ValueError(f"{name}: the arguments of a call are a Python literal, not JSON: {ascii(arguments)[:60]}")
    thoughts = [key for key in REASONING if message.get(key)] if message["role"] == "assistant" else []
    for key in ("content", *thoughts):
        if isinstance(message.get(key), list):
            message[key] = _text_of(message[key], f"{name}: a part of its {key}")
    for key in thoughts:
        if not isinstance(message[key], str):
            raise ValueError(f"{name}: {key} must be text, or parts of type text, not {kind_of(message[key])}")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f'{name} must have the string "content", or parts of type text, or tool_calls')
    return message, learnt


def _text_of(parts: list, what: str) -> str:
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            kind = f"of type {ascii(part.get('type'))[:60]}" if isinstance(part, dict) else kind_of(part)
            raise ValueError(f"{what} is {kind}; only parts of type text can be read")
    return "".join(part["text"] for part in parts)


def content_of(message: dict) -> str:
    return message.get("content") or ""


def text_of_chat(chat: Chat, tokenizer: Tokenizer) -> str:
    """Returns the text of a prompt, up to and including the generation prompt, or to the end of an answer that its last
    message begins. Raises ValueError if the template leaves out a part."""
    _checked_rendering(chat, tokenizer)
    if not chat.is_open:
        return tokenizer.chat_template.render(chat.messages, add_generation_prompt=True, **chat.values)
    begun = tokenizer.chat_template.render_open(chat.messages, **chat.values)
    if not _holds(begun, chat.messages[-1]):
        raise ValueError("the chat template leaves out a part of the last message, which the answer continues")
    return begun


class Turns(NamedTuple):
    """text: of a chat. spans: (start, end) of the learnt turns in it. cut: number of turns that are not learnt, since
    the template leaves out a part of them when others follow."""

    text: str
    spans: list[tuple[int, int]]
    cut: int


def learnt_turns(chat: Chat, tokenizer: Tokenizer, *, as_generated: bool = False) -> Turns:
    """Returns the text of a chat and the spans of its turns that may be learnt.

    as_generated: the last message directly follows the generation prompt, even if the template formats a finished
    message differently. Raises ValueError if the template leaves out more than the module's docstring allows.
    """
    rendering = _checked_rendering(chat, tokenizer)
    finder = _TurnFinder(chat, tokenizer.chat_template, rendering, _end_tokens(tokenizer))
    text, spans, cut, last = rendering.text, [], 0, len(chat.messages) - 1
    if rendering.generated:
        before = finder.rendered(last, add_generation_prompt=True) if as_generated else ""
        own = text.startswith(before) and not (as_generated and finder.is_led(text[len(before) :], chat.messages[last]))
        if own or _thinks_anew(chat.messages[last], before):
            return _marked_turns(chat, rendering)
        return _as_it_stands(finder, before, spans, cut, tokenizer)
    for i, learnt in enumerate(chat.learnt):
        if not learnt:
            continue
        if i == 0:
            raise ValueError("message 0 is the assistant's, so there is nothing it answers")
        start, end = finder.find(i)
        if spans and start < spans[-1][1]:
            raise ValueError(f"the chat template does not show where message {i} begins")
        complete = _holds(text[start:end], chat.messages[i])
        if i == last and (as_generated or not complete):
            before = finder.rendered(i, add_generation_prompt=True)
            # keep the template's text if only white space differs, or if a thought would follow the prompt's empty one
            own = text[:start] == before and not (as_generated and finder.is_led(text[start:end], chat.messages[i]))
            if not complete or not (own or _thinks_anew(chat.messages[i], before)):
                spans = [span for span in spans if before.startswith(text[: span[1]])]
                return _as_it_stands(finder, before, spans, cut, tokenizer)
        if complete:
            spans.append((start, end))
        cut += not complete
    return Turns(text, spans, cut)


@cache
def _end_tokens(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Returns two lists of texts that end a turn: end of turn and EOS, and, if none of them is found, any special."""
    kinds = (tokenizer.ends_of_turn, tokenizer.special_ids)
    texts = [[tokenizer.decode([i], skip_special_tokens=False) for i in ids] for ids in kinds]
    return tuple([text for text in each if text.strip()] for each in texts)


class _TurnFinder:
    """Finds where assistant turns begin and end in the text of a chat. Renders the messages before a turn again only if
    the located contents do not show this, so that the time is linear in the length of the chat."""

    def __init__(self, chat: Chat, template: ChatTemplate, rendering: Rendering, end_tokens: tuple[list[str], ...]):
        self.chat, self.template, self.end_tokens = chat, template, end_tokens
        self.text, self.begins, self.ends, self.calls, _ = rendering
        # kind of turn -> texts between the content before it and its beginning: the generation prompt's, whose opened
        # thought a turn without thoughts lacks, and that turn's
        self.leads: dict[tuple, tuple[str, str]] = {}
        self.last_end = 0  # of the turns found so far

    def rendered(self, count: int, *, add_generation_prompt: bool) -> str:
        """Renders the first `count` messages."""
        first = self.chat.messages[:count]
        return self.template.render(first, add_generation_prompt=add_generation_prompt, **self.chat.values)

    def find(self, i: int) -> tuple[int, int]:
        start, end = self._start(i), self.ends.get(i, self.calls.get(i, 0))
        if end < start:
            content = content_of(self.chat.messages[i]).strip()
            end = max(start, self.text.find(content, start, self._block_end(i)) + len(content))
        self.last_end = self._end(i, end)
        return start, self.last_end

    def is_led(self, turn: str, message: dict) -> bool:
        """Whether the template puts anything but white space before a turn's content, such as Qwen3's empty thought."""
        content = "".join(content_of(message).split())
        return not "".join(turn.split()).startswith(content or tuple(self.end_tokens[0]))

    def _shown_before(self, i: int) -> int:
        """Returns the end of the located text of the messages before message i. An empty one, such as a tool's empty
        output, cannot be located."""
        shown = (self.ends.get(j, self.calls.get(j)) for j in range(i - 1, -1, -1))
        return max(self.last_end, next((end for end in shown if end is not None), 0))

    def _start(self, i: int) -> int:
        led_by = self.ends.get(i - 1)
        behind = self._shown_before(i) if led_by is None else led_by
        message = self.chat.messages[i]
        kind = (
            self.chat.messages[i - 1]["role"],
            i == len(self.chat.messages) - 1,
            *(bool(message.get(name)) for name in ("tool_calls", *REASONING)),
            content_of(message).lstrip()[:1] == "<",  # may be a thought, whose tag the header may have opened
        )
        for lead in self.leads.get(kind, ()):  # white space alone may be the end of the content before it
            if lead.strip() and led_by is not None and self.text.startswith(lead, led_by):
                return led_by + len(lead)
        before = self.rendered(i, add_generation_prompt=True)
        start, prompted = _common_prefix(before, self.text), before[behind:]
        if start < len(before):
            shown = len(self.rendered(i, add_generation_prompt=False))
            header, found = before[shown:], None
            if start < behind or not before[shown : _before_tag(before, start)].strip():
                found = self._header_of(i, header, max(behind, min(start, shown)))
            if found is not None:  # the template formats the preceding message differently when others follow
                start, prompted = found[1], self.text[behind : found[0]] + header
            elif start >= behind:  # the header before an answer differs from the generation prompt
                closed = CLOSED_THOUGHT.search(before)
                start = start if closed is None else min(start, closed.start())
                start = min(_before_tag(self.text, start), self.begins.get(i, start))
                start = max(start, behind)
            elif i in self.begins:
                start, prompted = self.begins[i], self.text[behind : self.begins[i]] + header
            else:
                raise ValueError(f"the chat template does not show where message {i} begins")
        if led_by is not None:
            self.leads[kind] = prompted, self.text[led_by:start]
        return start

    def _header_of(self, i: int, header: str, behind: int) -> tuple[int, int] | None:
        """Returns (start, end) of message i's header, perhaps without the thought that it begins; None if the text does
        not have it."""
        limit = self.begins.get(i, self.calls.get(i))
        headers = [each for each in (header, BEGUN_THOUGHT.sub("", header)) if each.strip()]
        found = [(self.text.find(each, behind, limit), -len(each)) for each in headers]
        start, length = min((each for each in found if each[0] >= 0), default=(-1, 0))
        return (start, start - length) if length else None

    def _block_end(self, i: int) -> int:
        """Returns the end of the text that the template writes for message i, as far as it is the same when others
        follow."""
        if i == len(self.chat.messages) - 1:
            return len(self.text)
        return _before_tag(self.text, _common_prefix(self.rendered(i + 1, add_generation_prompt=False), self.text))

    def _end(self, i: int, content_end: int) -> int:
        """Returns the end of the first end token between this content and the next message's, else the block's end."""
        limit = next(
            (self.begins[j] for j in range(i + 1, len(self.chat.messages)) if j in self.begins), len(self.text)
        )
        for tokens in self.end_tokens:
            found = [(at, -len(token)) for token in tokens if (at := self.text.find(token, content_end, limit)) >= 0]
            if found:
                at, length = min(found)
                return at - length
        return self._block_end(i)


def _marked_turns(chat: Chat, rendering: Rendering) -> Turns:
    text, generated = rendering.text, rendering.generated
    assistants = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if len(generated) == len(assistants) + 1:  # TRL's phi3_training.jinja marks the final EOS by itself
        *generated, (start, end) = generated
        if generated and not text[generated[-1][1] : start].strip():  # it ends an assistant's turn
            generated[-1] = (generated[-1][0], end)
    if len(assistants) != len(generated):
        raise ValueError("the chat template does not mark one span per assistant message")
    spans = {i: span for i, span in zip(assistants, generated) if chat.learnt[i]}
    whole = [span for i, span in spans.items() if _holds(text[slice(*span)], chat.messages[i])]
    last = len(chat.messages) - 1
    if last in spans and spans[last] not in whole:
        raise ValueError(f"the chat template leaves out a part of message {last}")
    return Turns(text, whole, len(spans) - len(whole))


def _as_it_stands(finder: _TurnFinder, before: str, spans: list, cut: int, tokenizer: Tokenizer) -> Turns:
    """Returns the chat with its last turn as it would be generated: `before`, which ends with the generation prompt,
    the unchanged content, and the end of turn. spans, cut: of earlier turns."""
    *earlier, message = finder.chat.messages
    for name in (*REASONING, "tool_calls"):
        if message.get(name):
            raise ValueError(f"the chat template leaves out {name} of the last message; write it into the content")
    header = before[len(finder.rendered(len(earlier), add_generation_prompt=False)) :]
    content = content_of(message)
    content = content[_opened(content, header) :]
    text = before + content + tokenizer.decode(tokenizer.ends_of_turn[:1], skip_special_tokens=False)
    return Turns(text, [*spans, (len(before), len(text))], cut)


def _opened(content: str, header: str) -> int:
    """Returns how many leading characters of a content repeat the header's end: an opened thought, "<think>\\n", or an
    empty one that is closed, too; its white space may differ."""
    body, stem = content.lstrip(), header.rstrip()
    closed, empty = CLOSED_THOUGHT.search(stem), EMPTY_THOUGHT.match(body)
    if closed is not None and empty is not None and closed[1] == empty[1]:
        length = empty.end()
    else:
        tags = (n for n in range(min(len(body), len(stem)), 2, -1) if not (body[0].isalnum() or body[n - 1].isalnum()))
        length = next((n for n in tags if stem.endswith(body[:n])), 0)
    if not length:
        return 0
    return len(content) - len(body) + length + _common_prefix(body[length:], header[len(stem) :])


def _thinks_anew(message: dict, before: str) -> bool:
    """Whether a content begins with a thought although the prompt `before` ends with a closed empty one."""
    closed = CLOSED_THOUGHT.search(before)
    return closed is not None and content_of(message).lstrip().startswith(f"<{closed[1]}>")


def _checked_rendering(chat: Chat, tokenizer: Tokenizer) -> Rendering:
    """Renders a chat and locates its messages. Raises ValueError that names a part that the template leaves out, except
    parts of the assistant's messages: templates of reasoning models drop the thoughts of earlier turns, and
    learnt_turns checks the learnt ones."""
    template = tokenizer.chat_template
    if template is None:
        folder = tokenizer.config_path.parent
        raise ValueError(f"{folder}: no chat template; add chat_template.jinja, or use plain text")
    rendering = template.locate(chat.messages, **chat.values)

    def same(messages: list[dict], **changes) -> bool:
        return template.render(messages, add_generation_prompt=False, **{**chat.values, **changes}) == rendering.text

    def same_with(i: int, message: dict) -> bool:
        return same([*chat.messages[:i], message, *chat.messages[i + 1 :]])

    if chat.tools and same(chat.messages, tools=None):
        raise ValueError("tools: the chat template has no place for them")
    for name in chat.kwargs or ():
        template.check_read(name, bool(chat.tools))
    for i, message in enumerate(chat.messages):
        seen = i in rendering.ends and (i in rendering.begins or message["role"] == "assistant")
        content = content_of(message)
        if not seen and content.strip() and same_with(i, {**message, "content": content + "x"}):
            raise ValueError(f"the chat template leaves out message {i}, of the role {message['role']!r}")
        called = i in rendering.calls
        if message.get("tool_calls") and not called and same_with(i, with_other_calls(message)):
            raise ValueError(f"message {i}: the chat template has no place for its tool_calls")
    return rendering


def _holds(text: str, message: dict) -> bool:
    """Whether a turn's text holds all of a message; white space and the tags of thoughts may differ."""
    texts = (content_of(message), *(message[name] for name in REASONING if isinstance(message.get(name), str)))
    whole = "".join(text.split())
    return all("".join(each.split()) in whole for each in texts)


def _before_tag(text: str, at: int) -> int:
    """Returns `at`, or the start of a tag that it falls into: "<think>" and "<tool_call>" begin alike, and a token must
    not be split."""
    tag = TAG_BEGUN.search(text, max(0, at - LONGEST_TAG), at)
    return at if tag is None else tag.start()


def _common_prefix(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:  # a[:low] == b[:low]
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
