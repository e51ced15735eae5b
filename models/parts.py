"""The ids of a text in parts, where what comes before a part never depends on it.

- a part's ids are those that follow its predecessors' when all are encoded together. Where a token of the whole text
  would span the boundary, the part is encoded as what goes on from its predecessors
- an added token, as those around the turns of a chat, parts a text: what is before a boundary is encoded once more from
  the last such token on alone, mostly a header
"""

from bisect import bisect
from itertools import pairwise

from models.tokenizer import Tokenizer


def ids_of_parts(texts: list[str], tokenizer: Tokenizer, *, is_chat: bool) -> tuple[list[list[int]], bool]:
    """(the ids of each part, whether they are the ids of the whole text). is_chat: the text has its BOS."""
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
    """The ids of the whole text, cut where the parts begin. None where what is before a boundary has other ids alone,
    or the part before it has no added token to tell that from."""
    text = "".join(texts)
    encoding = tokenizer.encoding(text)
    if encoding is None:
        return None
    ids, added = encoding.ids, tokenizer.added_texts
    spans = ((i, *encoding.token_to_chars(i)) for i, each in enumerate(ids) if each in added)
    # (its place in the text, in the ids) of each added token; not of an unknown word, which has an added token's id
    places = [(0, 0), *((begin, i) for i, begin, behind in spans if text[begin:behind] == added[ids[i]])]
    cuts, end = [0], 0
    for part in texts[:-1]:
        start, end = end, end + len(part)
        place, first = places[bisect(places, (end, len(ids))) - 1]
        before = tokenizer.encode_plain(text[place:end])
        cut = first + len(before)
        if place < start or ids[first:cut] != before:
            return None
        if cut and encoding.token_to_chars(cut - 1)[1] > end:  # as a written <unk> that spans it, after unknown words
            return None
        cuts.append(cut)
    return [ids[begin:end] for begin, end in pairwise([*cuts, len(ids)])]


def encode_continuation(text: str, ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids of a text that goes on from `ids`: without the space that sentencepiece models put first, and behind an
    added token as the file wants it there."""
    contexts = "\n.a0" if tokenizer.puts_a_space else ""
    if ids and ids[-1] in tokenizer.added_texts:
        contexts = (tokenizer.decode(ids[-1:], skip_special_tokens=False),)
    for context in contexts:
        before, both = map(tokenizer.encode_plain, (context, context + text))
        if before and both[: len(before)] == before:
            return both[len(before) :]
    return tokenizer.encode_plain(text)
