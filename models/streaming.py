"""The text of tokens that arrive one by one."""

from collections.abc import Sequence
from functools import partial

NO_CHARACTER = "\ufffd"  # decoders write it for bytes that are not, or not yet, a character


class StreamDecoder:
    """The text of an answer, token by token, with whole characters only.

    push(token_id) returns the text that has become certain, maybe ""; flush(more_ids) the rest, with that of more_ids.
    Together they are tokenizer.decode_continuation(prompt_ids, all ids), for every decoder, at a constant cost a token.
    """

    def __init__(self, tokenizer, prompt_ids: list[int], skip_special_tokens: bool = True):
        self._byte_ids = tokenizer.byte_ids
        self._left_out = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decode = partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        self._go_on_from(list(prompt_ids))

    def _go_on_from(self, ids: list[int]) -> None:
        """Keeps the last of the ids as context, from a token on that begins a character and whose text is not blank."""
        size = 4
        while size < len(ids) and (not (text := self._decode(ids[-size:])).strip() or text[0] == NO_CHARACTER):
            size *= 2
        self._ids = ids[-size:]
        self._shown = self._decode(self._ids)

    def push(self, token_id: int) -> str:
        if token_id in self._left_out:  # bytes around it are decoded as one
            return ""
        self._ids.append(token_id)
        # consecutive byte tokens are decoded together, and an invalid byte undoes the characters before it
        text = NO_CHARACTER if token_id in self._byte_ids else self._decode(self._ids)
        return "" if text.endswith(NO_CHARACTER) else self._show(text)

    def held_back(self) -> str:
        """The text that is not certain yet, as it would be if nothing followed; "" if it is not whole characters."""
        if self._ids[-1] not in self._byte_ids:
            return ""
        text = self._decode(self._ids)
        known = text.startswith(self._shown) and NO_CHARACTER not in text[len(self._shown) :]
        return text[len(self._shown) :] if known else ""

    def flush(self, more_ids: Sequence[int] = ()) -> str:
        self._ids.extend(more_ids)
        return self._show(self._decode(self._ids))

    def _show(self, text: str) -> str:
        # a prompt that was cut within a character ends in U+FFFD until these tokens complete it
        begin = self._shown if text.startswith(self._shown) else self._shown.rstrip(NO_CHARACTER)
        self._shown = text
        if len(self._ids) > 16:
            self._go_on_from(self._ids)
        return text[len(begin) :]
