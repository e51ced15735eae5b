"""The ids of a text in parts, where what comes before a part never depends on it.

- a part's ids are those that follow its predecessors' when all are encoded together. Where a token of the whole text
  would span the boundary, the part is encoded as what goes on from its predecessors
- the whole text need not be encoded for that where the words around the boundaries tell: models/joins.py
"""

from collections.abc import Callable

from models.tokenizer import Tokenizer


def ids_of_parts(
    texts: list[str], encode: Callable[[str], list[int]], tokenizer: Tokenizer
) -> tuple[list[list[int]], bool]:
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


def encode_continuation(text: str, ids: list[int], tokenizer: Tokenizer) -> list[int]:
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
