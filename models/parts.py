"""The ids of a text in parts, where the ids before a part never depend on it.

- a part's ids are those that follow its predecessors' when all are encoded together. Where a token of the whole text
  would span the boundary, the part is encoded as a continuation of its predecessors
- added tokens, such as those around the turns of a chat, separate a text: to check a boundary, the text before it is
  encoded again only from the last added token on, which is mostly a header
"""

from bisect import bisect
from itertools import pairwise

from models.tokenizer import Tokenizer


def ids_of_parts(texts: list[str], tokenizer: Tokenizer, *, is_chat: bool) -> tuple[list[list[int]], bool]:
    """(the ids of each part, whether they are the ids of the whole text). is_chat: the text contains its BOS."""
    if is_chat and (parts := cut_whole(texts, tokenizer)) is not None:
        return parts, True
    encode = tokenizer.encode_plain if is_chat else tokenizer.encode_prefix
    whole, ids = encode("".join(texts)), encode(texts[0])
    parts = [ids]
    for place, text in enumerate(texts[1:], start=2):
        if place == len(texts) and whole[: len(ids)] == ids:
            parts.append(whole[len(ids) :])
        else:
            parts.append(encode_continuation(text, ids, tokenizer))
        ids = ids + parts[-1]
    return parts, ids == whole


def cut_whole(texts: list[str], tokenizer: Tokenizer) -> list[list[int]] | None:
    """The ids of the whole text, cut where the parts begin. None if the text before a boundary has other ids when it is
    encoded alone, or the part before a boundary has no added token to check that from."""
    text = "".join(texts)
    encoding = tokenizer.encoding(text)
    if encoding is None:
        return None
    ids, added = encoding.ids, tokenizer.added_texts
    spans = ((i, *encoding.token_to_chars(i)) for i, each in enumerate(ids) if each in added)
    # (place in the text, index in ids) of each added token; not of an unknown word, which has an added token's id
    places = [(0, 0), *((begin, i) for i, begin, behind in spans if text[begin:behind] == added[ids[i]])]
    cuts, end = [0], 0
    for part in texts[:-1]:
        start, end = end, end + len(part)
        place, first = places[bisect(places, (end, len(ids))) - 1]
        before = tokenizer.encode_plain(text[place:end])
        cut = first + len(before)
        if place < start or ids[first:cut] != before:
            return None
        if cut and encoding.token_to_chars(cut - 1)[1] > end:  # such as a written <unk> across it, after unknown words
            return None
        cuts.append(cut)
    return [ids[begin:end] for begin, end in pairwise([*cuts, len(ids)])]


def encode_continuation(text: str, ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids of a text that continues `ids`: without the space that sentencepiece models put first, and after an added
    token as the tokenizer encodes text there."""
    contexts = "\n.a0" if tokenizer.puts_a_space else ""
    if ids and ids[-1] in tokenizer.added_texts:
        contexts = (tokenizer.decode(ids[-1:], skip_special_tokens=False),)
    for context in contexts:
        before, both = map(tokenizer.encode_plain, (context, context + text))
        if before and both[: len(before)] == before:
            return both[len(before) :]
    return tokenizer.encode_plain(text)
