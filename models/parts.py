"""The ids of a text in parts, where what comes before a part never depends on it.

- a part's ids are those that follow its predecessors' when all are encoded together. Where a token of the whole text
  would span the boundary, the part is encoded as what goes on from its predecessors
- the whole text need not be encoded for that where the words around the boundaries tell, which takes up to half the
  time: for byte-pair encodings of words that a pattern like GPT-2's finds, from left to right and without looking back.
  The words on either side of a boundary depend on few characters around it (a word never goes on over a space behind
  another character), no token spans two of them, and added tokens part a text as well
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import lru_cache

import tokenizers
from tokenizers import AddedToken


def ids_of_parts(texts: list[str], encode: Callable[[str], list[int]], tokenizer) -> tuple[list[list[int]], bool]:
    """(the ids of each part, whether they are the ids of the whole text); `encode` gives those of the first part."""
    if tokenizer.joins is not None and texts[0] and tokenizer.joins.are_clean(texts):
        return [encode(texts[0]), *tokenizer.encode_each(texts[1:])], True
    whole, ids = encode("".join(texts)), encode(texts[0])
    parts = [ids]
    for place, text in enumerate(texts[1:], start=2):
        if place == len(texts) and whole[: len(ids)] == ids:
            parts.append(whole[len(ids) :])
        else:
            parts.append(encode_continuation(text, ids, tokenizer))
        ids = ids + parts[-1]
    return parts, ids == whole


def encode_continuation(text: str, ids: list[int], tokenizer) -> list[int]:
    """The ids of a text that goes on from `ids`: without the space that sentencepiece models put first, and behind an
    added token as the file wants it there."""
    contexts = "\n.a0" if tokenizer.puts_a_space else ""
    if ids and ids[-1] in tokenizer.added_ids:
        contexts = (tokenizer.decode(ids[-1:], skip_special_tokens=False),)
    for context in contexts:
        before, both = (tokenizer.encode(each, add_special_tokens=False) for each in (context, context + text))
        if before and both[: len(before)] == before:
            return both[len(before) :]
    return tokenizer.encode(text, add_special_tokens=False)


# --------------------------------------------------------------------------------- seen from the words

TAIL, HEAD, MEMORY = 256, 16, 2**16  # characters looked at before a boundary, and behind it; boundaries remembered
GPT_PATTERN = r"\s+(?!\S)"  # of GPT-2's pattern and those that came of it


def splits_words(file: tokenizers.Tokenizer, added: Iterable[AddedToken]) -> bool:
    """Whether a tokenizer is of the kind for which words tell."""
    if type(file.model).__name__ != "BPE" or file.model.dropout:
        return False
    if any(step["type"] != "NFC" for step in _steps(file.normalizer, "normalizers")):
        return False
    finds_words = False
    for step in _steps(file.pre_tokenizer, "pretokenizers"):
        pattern = step.get("pattern", {}).get("Regex", "")
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            finds_words |= step["use_regex"]
        elif step["type"] == "Split" and pattern and step["behavior"] == "Isolated" and not step["invert"]:
            finds_words |= GPT_PATTERN in pattern
            outside = re.sub(r"\[(\\.|[^]\\])*\]", "", pattern)  # of sets of characters
            if re.search(r"\(\?<|[$^]|\\[ABGZbz]", outside):  # looks back, or at the ends
                return False
        elif step["type"] != "Digits":
            return False
    firsts = {token.content[:1] for token in added}
    plain = not any(token.lstrip or token.rstrip or token.single_word for token in added)
    return finds_words and plain and not any(firsts & {*token.content[1:], " "} for token in added)


def _steps(component: object | None, of_sequence: str) -> list[dict]:
    """Of a part of a tokenizer, which may be missing, one step, or a sequence of them."""
    state = {of_sequence: []} if component is None else json.loads(component.__getstate__())
    return state.get(of_sequence, [state])


class Joins:
    """encode_each: ids of texts without special tokens. added: the contents of the added tokens."""

    def __init__(self, encode_each: Callable[[list[str]], list[list[int]]], added: Iterable[str]):
        self._encode_each = encode_each
        added = sorted(added, key=len, reverse=True)
        self._firsts, self._added = {token[0] for token in added}, re.compile("|".join(map(re.escape, added)) or "(?!)")

    def are_clean(self, texts: list[str]) -> bool:
        """Whether the ids of the texts end to end are those of all together; False also where it is not known."""
        before = texts[0][-TAIL:]
        is_all = len(texts[0]) <= TAIL
        for text in texts[1:]:
            if text:
                tail, head = self._tail(before, is_all), self._head(text)
                if tail is None or head is None or not self._is_clean(tail, head):
                    return False
            is_all = is_all and len(before) + len(text) <= TAIL
            before = (before + text)[-TAIL:]
        return True

    @lru_cache(MEMORY)  # noqa: B019 (a process has one or two tokenizers, for as long as it runs)
    def _is_clean(self, tail: str, head: str) -> bool:
        first, second, both = self._encode_each([tail, head, tail + head])
        return first + second == both

    def _tail(self, text: str, is_all: bool) -> str | None:
        """The end of a text, from an added token on, or from a place that no word spans."""
        begin = max(map(text.rfind, self._firsts), default=-1)
        if begin >= 0 and self._added.match(text, begin):
            return text[begin:]
        begin = len(text) - HEAD
        while (begin := text.rfind(" ", 0, max(0, begin))) > 0:
            if not text[begin - 1].isspace():
                return text[begin:]
        return text if is_all else None

    def _head(self, text: str) -> str | None:
        """The beginning of a text, up to an added token, or to a place that no word spans."""
        end, places = HEAD, [place for place in (text.find(first, 0, TAIL) for first in self._firsts) if place >= 0]
        first = min(places, default=-1)
        found = self._added.match(text, first) if first >= 0 else None
        if found:
            return text[: first or found.end()]
        while (end := text.find(" ", end + 1, 4 * TAIL)) > 0:
            if not text[end - 1].isspace():
                return text[:end]
        return text if len(text) <= 4 * TAIL else None
