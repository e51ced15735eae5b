"""Chats as people have them, to the text that a folder's chat template makes of them and the stretches of it that are
learnt.

- `messages` (or a prompt of messages) with roles of any name; contents are text, parts of type text, or none beside
  tool_calls; beside them `tools` and `system`. What the template has no place for is refused by name
- an assistant's turn runs from the end of its header (what the template writes as the generation prompt) to the first
  end-of-turn token behind its content; what comes after that, often a newline, is not the assistant's. Where the
  template marks the turns itself, with {% generation %}, its marks count
- a message with `weight` 0 or `train` false is not learnt
- a template that leaves a part of a learnt message out, as those of reasoning models do: the last turn is then what is
  generated, the generation prompt followed by the content as it stands; earlier turns are not learnt, which is counted
"""

import json
import re
from functools import cache
from typing import NamedTuple

from models.chat_template import REASONING, ChatTemplate, Rendering, functions_of, with_other_calls
from models.record_files import kind_of
from models.tokenizer import Tokenizer

TAG_BEGUN, LONGEST_TAG = re.compile(r"[<\[][^<>\[\]\s]*$"), 80
BEGUN_THOUGHT = re.compile(r"<(\w+)>\s*(?:</\1>\s*)?$")  # of a header, which earlier turns may be without
CLOSED_THOUGHT, EMPTY_THOUGHT = re.compile(r"<(\w+)>\s*</\1>\s*$"), re.compile(r"<(\w+)>\s*</\1>")
MEDIA = ("images", "videos", "audios")
# Fields beside a prompt or messages that people have, and what to do instead: who has them wants them learnt.
NOT_READ = {
    "history": "put its turns into the messages",
    "system_prompt": "call it system",
    "functions": "give tools, and tool_calls in the messages",
    "documents": "put them into the messages, or into chat_template_kwargs where the template reads them",
    **dict.fromkeys(MEDIA, "only text can be read"),
}
OWN_VALUES = {"messages", "tools", "add_generation_prompt", "_generation"}  # of a template: no settings of a record's


class Chat(NamedTuple):
    """Messages as a chat template takes them, and the record's tools and chat_template_kwargs (TRL's name); learnt:
    whether a message may be learnt."""

    messages: list[dict]
    learnt: list[bool]
    tools: list | None = None
    kwargs: dict | None = None

    @property
    def values(self) -> dict:
        """What the template is given beside the messages."""
        return {"tools": self.tools, **(self.kwargs or {})}

    @property
    def is_open(self) -> bool:
        """Whether the last message is the beginning of the assistant's answer, which goes on from there."""
        last = self.messages[-1]
        begun = content_of(last).strip() or any(last.get(name) for name in REASONING)
        return last["role"] == "assistant" and bool(begun) and not last.get("tool_calls")

    @property
    def ends_in_silence(self) -> bool:
        """Whether the last message is the assistant's and says nothing: the template would end it, and open another."""
        last = self.messages[-1]
        return last["role"] == "assistant" and not self.is_open and not last.get("tool_calls")

    def before(self, answer: "Chat") -> "Chat":
        """The chat in which `answer` follows this one, which is not learnt."""
        learnt = [False] * len(self.messages) + answer.learnt
        return Chat(self.messages + answer.messages, learnt, self.tools or answer.tools, self.kwargs or answer.kwargs)


def read_chat(messages: object, fields: dict | None = None, what: str = "messages") -> Chat:
    """The messages of a record, and its `tools`, `system` and `chat_template_kwargs`. Raises ValueError that says what
    cannot be used."""
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
    tools, kwargs = parsed(_without_nulls(fields.get("tools"))), parsed(fields.get("chat_template_kwargs"))
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools must be a list of objects, or its JSON text")
    for function in (tool.get("function", tool) for tool in tools or ()):
        if isinstance(function, dict) and isinstance(function.get("parameters"), str):
            function["parameters"] = parsed(function["parameters"]) or {}  # or it would be written as a quoted string
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError("chat_template_kwargs must be an object, or its JSON text")
    kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None} or None
    for name in OWN_VALUES & (kwargs or {}).keys():
        raise ValueError(f"chat_template_kwargs: {name!r} has a field, or a flag, of its own")
    return Chat([message for message, _ in read], [learnt for _, learnt in read], tools, kwargs)


def not_read(fields: dict) -> list[str]:
    """The fields of NOT_READ that hold anything."""
    found = {name: parsed(_without_nulls(fields.get(name))) for name in NOT_READ}
    for name in ("functions", "documents"):
        if not (isinstance(found[name], list) and all(isinstance(each, dict) for each in found[name])):
            del found[name]  # of another kind
    return [name for name, value in found.items() if _has_content(value)]


def parsed(value: object) -> object:
    """A field that data sets whose columns have types keep as JSON's text; None where it is empty."""
    try:
        return (json.loads(value) if isinstance(value, str) and value else value) or None
    except ValueError:
        return value


def _without_nulls(value: object) -> object:
    """Objects without what is null in them: where columns have types, each object has the keys of all records'. JSON's
    text stays as it is."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _has_content(value: object) -> bool:
    """Whether there is anything but nulls and emptiness in it."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return bool(value) if parts is None else any(map(_has_content, parts))


def _read_message(message: object, name: str) -> tuple[dict, bool]:
    """(the message for a template, whether it is learnt)"""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f'{name} must be an object with the string "role"')
    message, learnt = dict(message), message["role"] == "assistant"
    for key in ("weight", "train"):
        value = message.pop(key, None)
        if value not in (None, 0, 1):
            raise ValueError(f"{name}: {key} must be 0 or 1, false or true, not {ascii(value)[:60]}")
        learnt = learnt and value != 0
    if _has_content(message.get("function_call")):
        raise ValueError(f"{name}: function_call is not read; give tool_calls")
    # Templates ask whether a message has such a key; where columns have types, each has all of them.
    message = {key: value for key, value in message.items() if value or key not in ("tool_calls", *REASONING)}
    calls = message.get("tool_calls")
    if calls:
        calls = message["tool_calls"] = parsed(_without_nulls(calls))
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"{name}: tool_calls must be a list of objects, or its JSON text")
    for function in (each for each in functions_of(message) if "name" in each):
        arguments = function.get("arguments")
        if arguments in (None, ""):
            function["arguments"] = {}  # of a call without any
        elif isinstance(arguments, str) and arguments.lstrip().startswith("{'"):
            raise ValueError(f"{name}: the arguments of a call are Python's text, not JSON's: {ascii(arguments)[:60]}")
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
    """The text of a prompt, up to the assistant's header, or to the end of what the assistant has begun to say;
    ValueError if the template leaves any of it out."""
    _checked_rendering(chat, tokenizer)
    if not chat.is_open:
        return tokenizer.apply_chat_template(chat.messages, add_generation_prompt=True, **chat.values)
    begun = tokenizer.chat_template.render_open(chat.messages, **chat.values)
    if not _holds(begun, chat.messages[-1]):
        raise ValueError("the chat template leaves out a part of the last message, which the answer goes on from")
    return begun


class Turns(NamedTuple):
    """text: of a chat; spans: the stretches that are learnt. cut: how many are not, since the template
    leaves out a part of them once others follow."""

    text: str
    spans: list[tuple[int, int]]
    cut: int


def learnt_turns(chat: Chat, tokenizer: Tokenizer, *, as_generated: bool = False) -> Turns:
    """The text of a chat and where the turns are that may be learnt.

    as_generated: the last message is what follows the generation prompt, even where the template writes such a message
    otherwise. Raises ValueError for what the template leaves out.
    """
    rendering = _checked_rendering(chat, tokenizer)
    finder = _TurnFinder(chat, tokenizer.chat_template, rendering, _end_tokens(tokenizer))
    text, spans, cut, last = rendering.text, [], 0, len(chat.messages) - 1
    if rendering.generated:
        before = finder.rendered(last, add_generation_prompt=True) if as_generated else ""
        if text.startswith(before) or _thinks_anew(chat.messages[last], before):
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
            # the template's own stays where the prompt is that, and where behind the prompt it were a second thought
            if not complete or not (text[:start] == before or _thinks_anew(chat.messages[i], before)):
                spans = [span for span in spans if before.startswith(text[: span[1]])]
                return _as_it_stands(finder, before, spans, cut, tokenizer)
        if complete:
            spans.append((start, end))
        cut += not complete
    return Turns(text, spans, cut)


@cache
def _end_tokens(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The texts that end a turn: those known to, and any special token where there is none of them."""
    known = [i for i in (tokenizer.end_of_turn_id, tokenizer.eos_token_id) if i is not None]
    texts = [[tokenizer.decode([i], skip_special_tokens=False) for i in ids] for ids in (known, tokenizer.special_ids)]
    return tuple([text for text in each if text.strip()] for each in texts)


class _TurnFinder:
    """Where an assistant's turn begins and ends in the text of a chat. The messages before it are rendered once more
    only where that does not show, so the time goes with the length of the chat."""

    def __init__(self, chat: Chat, template: ChatTemplate, rendering: Rendering, end_tokens: tuple[list[str], ...]):
        self.chat, self.template, self.end_tokens = chat, template, end_tokens
        self.text, self.begins, self.ends, self.calls, _ = rendering
        self.leads: dict[tuple, str] = {}  # what stands between the content of a message and the turn that answers it
        self.last_end = 0  # of the turns found so far

    def rendered(self, count: int, *, add_generation_prompt: bool) -> str:
        """The text of the first messages."""
        first = self.chat.messages[:count]
        return self.template.render(first, add_generation_prompt=add_generation_prompt, **self.chat.values)

    def find(self, i: int) -> tuple[int, int]:
        start, end = self._start(i), self.ends.get(i, self.calls.get(i, 0))
        if end < start:
            content = content_of(self.chat.messages[i]).strip()
            end = max(start, self.text.find(content, start, self._block_end(i)) + len(content))
        self.last_end = self._end(i, end)
        return start, self.last_end

    def _shown_before(self, i: int) -> int:
        """Where what is shown of the messages before this one ends, as far as that is known: not of one without
        content, such as the output of a tool that printed nothing."""
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
            content_of(message).lstrip()[:1] == "<",  # a thought, maybe, that the header may have opened
        )
        lead = self.leads.get(kind)
        if lead and led_by is not None and self.text.startswith(lead, led_by):
            return led_by + len(lead)
        before = self.rendered(i, add_generation_prompt=True)
        start = _common_prefix(before, self.text)
        if start < behind:  # it writes the message before otherwise once others follow
            header = before[len(self.rendered(i, add_generation_prompt=False)) :]
            headers, limit = [header, BEGUN_THOUGHT.sub("", header)], self.begins.get(i)
            found = [(self.text.find(each, behind, limit), len(each)) for each in headers if each.strip()]
            found = sorted((at, -length) for at, length in found if at >= 0)
            if not found and limit is None:
                raise ValueError(f"the chat template does not show where message {i} begins")
            start = found[0][0] - found[0][1] if found else limit
        elif start < len(before):  # it writes another header once there is an answer
            closed = CLOSED_THOUGHT.search(before)
            start = start if closed is None else min(start, closed.start())
            start = min(_before_tag(self.text, start), self.begins.get(i, start))
            start = max(start, behind)
        if led_by is not None:
            self.leads[kind] = self.text[led_by:start]
        return start

    def _block_end(self, i: int) -> int:
        """Where what the template writes for message i ends, but for what it writes once others follow."""
        if i == len(self.chat.messages) - 1:
            return len(self.text)
        return _before_tag(self.text, _common_prefix(self.rendered(i + 1, add_generation_prompt=False), self.text))

    def _end(self, i: int, content_end: int) -> int:
        """One past the first end token behind the content, of those before the next message's."""
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
    if len(assistants) != len(generated):
        raise ValueError("the chat template does not mark one stretch for each message of the assistant")
    spans = {i: span for i, span in zip(assistants, generated) if chat.learnt[i]}
    whole = [span for i, span in spans.items() if _holds(text[slice(*span)], chat.messages[i])]
    last = len(chat.messages) - 1
    if last in spans and spans[last] not in whole:
        raise ValueError(f"the chat template leaves out a part of message {last}")
    return Turns(text, whole, len(spans) - len(whole))


def _as_it_stands(finder: _TurnFinder, before: str, spans: list, cut: int, tokenizer: Tokenizer) -> Turns:
    """The last turn as the generation prompt, which `before` ends with, the content as it is written, and the end of
    the turn; behind the spans and the cut of earlier turns."""
    *earlier, message = finder.chat.messages
    for name in (*REASONING, "tool_calls"):
        if message.get(name):
            raise ValueError(f"the chat template leaves out {name} of the last message; write it into the content")
    header = before[len(finder.rendered(len(earlier), add_generation_prompt=False)) :]
    content = content_of(message)
    content = content[_opened(content, header) :]
    end = tokenizer.end_of_turn_id if tokenizer.end_of_turn_id is not None else tokenizer.eos_token_id
    end = "" if end is None else tokenizer.decode([end], skip_special_tokens=False)
    text = before + content + end
    return Turns(text, [*spans, (len(before), len(text))], cut)


def _opened(content: str, header: str) -> int:
    """How many characters at the beginning of a content the header has opened already, as "<think>\\n", or closed too,
    as an empty thought: white space may be otherwise."""
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
    """Whether a content begins with a thought though the prompt has closed an empty one."""
    closed = CLOSED_THOUGHT.search(before)
    return closed is not None and content_of(message).lstrip().startswith(f"<{closed[1]}>")


def _checked_rendering(chat: Chat, tokenizer: Tokenizer) -> Rendering:
    """A chat's text, and where its messages are in it. Raises ValueError that names what the template leaves out, but
    for parts of the assistant's messages: those of reasoning models drop the thoughts of earlier turns, and learnt
    turns are looked at later."""
    template = tokenizer.needed_chat_template
    rendering = template.locate(chat.messages, **chat.values)

    def same(messages: list[dict], **changes) -> bool:
        return template.render(messages, add_generation_prompt=False, **{**chat.values, **changes}) == rendering.text

    def same_with(i: int, message: dict) -> bool:
        return same([*chat.messages[:i], message, *chat.messages[i + 1 :]])

    if chat.tools and same(chat.messages, tools=None):
        raise ValueError("tools: the chat template has no place for them")
    for name in chat.kwargs or ():
        if name not in template.variables(bool(chat.tools)):
            raise ValueError(f"chat_template_kwargs: the chat template does not read {name!r}")
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
    """Whether a turn's text holds all of a message: white space and the tags of thoughts may be otherwise."""
    texts = (content_of(message), *(message[name] for name in REASONING if isinstance(message.get(name), str)))
    whole = "".join(text.split())
    return all("".join(each.split()) in whole for each in texts)


def _before_tag(text: str, at: int) -> int:
    """`at`, or where the tag begins that it falls into: "<think>" and "<tool_call>" begin alike, and a token is not to
    be torn."""
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
