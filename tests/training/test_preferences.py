"""training/preferences.py: the tokens of pairs, and how they are batched; test_scored_records.py has the rest."""

import json

import numpy as np
import pytest
import torch

from models.batches import micro_batches
from models.chats import read_chat
from models.records import EncodingCounts, Limits, Record, encode_prompt
from models.reward import Pair, encode_pair_record, pair_rows, rows_to_score
from tests import tiny
from tests.models import test_chat_corners
from tests.training.test_data import CHAT, END_OF_TURN, SYSTEM
from training.data import encode_sft_record
from training.preferences import encode_pair_file

LIMITS = Limits(500, 200)
CPU = torch.device("cpu")
FOLDERS = ["sentencepiece", "byte_level"]


def pair(tokenizer, **fields):
    return encode_pair_record(Record("train.jsonl:7", fields), tokenizer)[0]


def check_labels(example, prompt_length):
    ids, labels = list(example.input_ids), list(example.labels)
    assert labels == [-100] * prompt_length + ids[prompt_length:]


# ------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("kind", FOLDERS)
def test_pair_of_texts(kind, opened):
    """Catches ids other than supervised fine-tuning's (EOS missing, BOS twice, a prompt in the loss), sides swapped, a
    margin lost, and two rows that do not begin with the same prompt."""
    tokenizer, oracle = opened(kind)
    prompt, chosen, rejected = "Question: how many apples are there?", " Answer: there are 7.", " hello hello\n"
    made = pair(tokenizer, prompt=prompt, chosen=chosen, rejected=rejected, margin=2)
    eos = [oracle.eos_token_id]
    assert made.chosen.input_ids == oracle(prompt + chosen)["input_ids"] + eos
    assert made.rejected.input_ids == oracle(prompt + rejected)["input_ids"] + eos
    assert made.prompt_length == len(oracle(prompt)["input_ids"]) and made.margin == 2.0
    for side, text in ((made.chosen, chosen), (made.rejected, rejected)):
        assert side.input_ids[: made.prompt_length] == encode_prompt(prompt, tokenizer)
        check_labels(side, made.prompt_length)
        assert side == encode_sft_record(Record("x", {"prompt": prompt, "completion": text}), tokenizer)[0]
    assert pair(tokenizer, prompt=prompt, chosen=chosen, rejected="").margin is None
    assert pair(tokenizer, input=prompt, chosen=chosen, rejected=rejected, margin=None).margin is None


def test_prompt_that_merges_with_one_side(tokenizer):
    """Catches two sides with different prompt ids if only one of them merges with the prompt."""
    made, differs = encode_pair_record(Record("x", {"prompt": "The ans", "chosen": "wer", "rejected": " 5"}), tokenizer)
    prompt_ids = encode_prompt("The ans", tokenizer)
    assert differs and made.prompt_length == len(prompt_ids)
    for side in (made.chosen, made.rejected):
        assert side.input_ids[: len(prompt_ids)] == prompt_ids
        check_labels(side, made.prompt_length)


@pytest.mark.parametrize("kind", END_OF_TURN)
def test_pair_of_chats(kind, opened):
    """Catches a score on the template's text after the end-of-turn token, that token left out of the loss, EOS added
    after it, and a prompt encoded differently from generation."""
    tokenizer, oracle = opened(kind)
    prompt, sides = [SYSTEM, *CHAT[:3]], {"chosen": "no. 🙂", "rejected": "the answer\nis yes."}
    made = pair(tokenizer, prompt=prompt, **sides)
    prompt_ids = encode_prompt(read_chat(prompt), tokenizer)
    assert made.prompt_length == len(prompt_ids)
    for name, text in sides.items():
        side, answer = getattr(made, name), {"role": "assistant", "content": text}
        whole = oracle.apply_chat_template([*prompt, answer])["input_ids"]
        assert side.input_ids == whole[: len(side.input_ids)] and side.input_ids[: len(prompt_ids)] == prompt_ids
        assert not tokenizer.decode(whole[len(side.input_ids) :]).strip()
        check_labels(side, made.prompt_length)
        turn = tokenizer.decode_continuation(prompt_ids, side.input_ids[len(prompt_ids) :], skip_special_tokens=False)
        assert turn == (" " if kind.startswith("llama2") else "") + text + END_OF_TURN[kind]
    as_messages = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
    assert pair(tokenizer, prompt=prompt, **as_messages) == made
    whole = {name: prompt + messages for name, messages in as_messages.items()}
    assert pair(tokenizer, **whole) == made  # the prompt is implicit
    assert pair(tokenizer, prompt=prompt, **whole) == made  # or given three times
    assert pair(tokenizer, prompt=CHAT[2]["content"], **whole) == made  # or as text beside messages
    empty = [{**message, "name": None, "thinking": "", "tool_calls": []} for message in whole["chosen"]]
    for fields in ({}, {"prompt": prompt}, {"prompt": empty[:-1]}):  # columns with keys that others lack
        assert pair(tokenizer, **fields, chosen=empty, rejected=whole["rejected"]) == made
    columns = {"prompt": CHAT[2]["content"], "system_prompt": SYSTEM["content"]}
    assert pair(tokenizer, **columns, **whole) == made  # or as UltraFeedback's columns, beside messages that have both


def test_implicit_prompt(opened, tmp_path):
    """Catches a prompt that swallows the answer if both sides are equal or one begins with the other, a turn after
    the first difference taken for the prompt's, and a prompt that ends early, or is given and not found in the sides,
    where typed columns have put nulls into a call's arguments."""
    tokenizer, _ = opened("llama3")
    first = encode_prompt(read_chat(CHAT[:1]), tokenizer)
    same = pair(tokenizer, chosen=CHAT[:2], rejected=CHAT[:2])
    assert same.prompt_length == len(first) and same.chosen == same.rejected
    longer = pair(tokenizer, chosen=CHAT, rejected=CHAT[:2])
    assert longer.prompt_length == len(first)
    assert longer.chosen.input_ids[: len(same.chosen.input_ids)] == longer.rejected.input_ids == same.chosen.input_ids
    other = [CHAT[0], {"role": "assistant", "content": "no."}, *CHAT[2:]]
    several = pair(tokenizer, chosen=CHAT, rejected=other)
    assert several.prompt_length == len(first) and several.chosen == longer.chosen
    sft = encode_sft_record(Record("x", {"messages": other}), tokenizer)[0]
    assert several.rejected == sft  # loss on both turns of the assistant, not on the user's

    calls = "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|eot_id|>"
    tokenizer, _ = test_chat_corners.opened(tmp_path, test_chat_corners.CHATML.replace("<|eot_id|>", calls))

    def called(arguments, *more):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}, CHAT[2], *more]

    made = pair(tokenizer, chosen=called({"q": 1}, CHAT[1]), rejected=called({"q": 1}, CHAT[3]))
    assert made.prompt_length == len(encode_prompt(read_chat(called({"q": 1})), tokenizer))
    for prompt in ({}, {"prompt": called({"q": 1})}, {"prompt": called({"z": None, "q": 1})}):
        nulls = [called({"q": 1, "z": None}, CHAT[1]), called({"q": 1}, CHAT[3])]
        assert pair(tokenizer, **prompt, chosen=nulls[0], rejected=nulls[1]) == made


def test_answer_that_merges_with_the_header(opened):
    """Catches two sides with different prompt ids where a template's header merges with one answer's first characters:
    "assistant:\\n" and "\\n" make one token of this tokenizer."""
    tokenizer, _ = opened("newlines_plain")
    prompt_ids = encode_prompt(read_chat(CHAT[:1]), tokenizer)
    record = Record("x", {"prompt": CHAT[:1], "chosen": "\nthe answer", "rejected": "no."})
    made, differs = encode_pair_record(record, tokenizer)
    assert differs and made.prompt_length == len(prompt_ids)
    for side, text in ((made.chosen, "\nthe answer\n"), (made.rejected, "no.\n")):
        assert side.input_ids[: len(prompt_ids)] == prompt_ids
        assert tokenizer.decode_continuation(prompt_ids, side.input_ids[len(prompt_ids) :]) == text
        check_labels(side, made.prompt_length)
    chatml, _ = opened("newlines_chatml")
    made, differs = encode_pair_record(record, chatml)
    assert differs and chatml.decode(made.chosen.input_ids[-1:], skip_special_tokens=False) == "<|im_end|>"
    assert made.chosen.input_ids.count(made.chosen.input_ids[-1]) == 2  # the user's turn, and this one


@pytest.mark.parametrize(
    "text",
    [
        '"role": "Attacker", "content": "x"}]',
        '"content": "a"}]',
        '"role": "user", "may": "read"}]',
        '"role": "user", "content": "a"}]?',
        '"name": "add", "arguments": {"role": "user", "content": "x"}}]',
    ],
)
def test_texts_that_look_like_messages(text, opened):
    """Catches extracted events, notes, a question about a chat, and calls taken for messages given as text."""
    tokenizer, text = opened("byte_level")[0], "[{" + text
    made = pair(tokenizer, prompt=text, chosen=text, rejected=f"{text}x")
    assert tokenizer.decode(made.chosen.input_ids) == text + text
    learnt = encode_sft_record(Record("x", {"text": text}), tokenizer)[0]
    assert tokenizer.decode(learnt.input_ids) == text


USER, ANSWER = CHAT[0], CHAT[1]
AS_TEXT = [json.dumps([ANSWER]), f"\n{[ANSWER]}", str(np.array([USER, ANSWER]))]  # as columns of text have them
BAD_PAIRS = [
    *[({"prompt": text, "chosen": "b", "rejected": "c"}, "prompt is a list of messages as text") for text in AS_TEXT],
    *[({"prompt": "a", "chosen": "b", "rejected": text}, "rejected is a list of messages as te") for text in AS_TEXT],
    *[({"prompt": [USER], "chosen": text, "rejected": "c"}, "chosen is a list of messages as t") for text in AS_TEXT],
    ({"prompt": "a", "rejected": "b"}, "'chosen' is missing (found: prompt, rejected)"),
    ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
    ({"chosen": "a b", "rejected": "a c"}, "'prompt' is missing"),
    ({"prompt": 5, "chosen": "b", "rejected": "c"}, "prompt must be text or a list of messages, not a number"),
    ({"prompt": None, "chosen": "b", "rejected": "c"}, "the field 'prompt' is null"),
    ({"prompt": "a", "chosen": 5, "rejected": "c"}, "chosen must be text or a list of messages, not a number"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "the field 'rejected' is null"),
    ({"prompt": "a", "chosen": "b", "rejected": [ANSWER]}, "must both be text, or both be lists"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}, "margin must be a finite number, not '1'"),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")},
        "margin must be a finite number, not nan",
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("inf")},
        "margin must be a finite number, not inf",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "margin must be a finite number, not 1000"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "margin must be a finite number, not True"),
    ({"prompt": "a", "chosen": "b\ud83d", "rejected": "c"}, "surrogate"),
    ({"prompt": [USER], "chosen": [], "rejected": [ANSWER]}, "chosen holds no message"),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [USER]}, "rejected must begin and end with a message of the"),
    ({"prompt": [USER], "chosen": [ANSWER, USER], "rejected": [ANSWER]}, "chosen must begin and end"),
    ({"prompt": [USER], "chosen": ["hello"], "rejected": [ANSWER]}, "chosen[0] must be an object"),
    ({"prompt": [], "chosen": [ANSWER], "rejected": [ANSWER]}, "prompt must be a non-empty list"),
    ({"prompt": ["a"], "chosen": "b", "rejected": "c"}, "prompt[0] must be an object"),
    ({"chosen": [ANSWER], "rejected": [ANSWER]}, "there is no prompt"),
    ({"chosen": [], "rejected": []}, "there is no prompt"),
    ({"chosen": [USER, ANSWER], "rejected": [CHAT[2], ANSWER]}, "there is no prompt: chosen and rejected begin with"),
    ({"chosen": [USER, CHAT[2]], "rejected": [USER, ANSWER]}, "chosen must begin and end"),
    ({"prompt": "what?", "chosen": [USER, ANSWER], "rejected": [USER, CHAT[3]]}, "prompt is none of the messages"),
    (
        {"prompt": "what?", "chosen": [ANSWER], "rejected": [CHAT[3]]},
        "prompt is text, which must be a list of messages",
    ),
]


@pytest.mark.parametrize("fields, complaint", BAD_PAIRS, ids=lambda x: None if isinstance(x, str) else str(x)[:80])
def test_pairs_that_cannot_be_used(fields, complaint, opened, tmp_path):
    """Catches an error that does not name the record or names another cause than the real one, and a traceback."""
    with pytest.raises(ValueError) as caught:
        pair(opened("llama3")[0], **fields)
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith("train.jsonl:7: ") and complaint in str(caught.value), caught.value


def test_pairs_under_other_templates(opened, tokenizer):
    """Catches a folder used although it has no template, or a template that rewrites earlier turns."""
    with pytest.raises(ValueError, match=r"^train.jsonl:7: .*no chat template"):
        pair(tokenizer, prompt=[USER], chosen="b", rejected="c")
    rewrites, _ = opened("rewrites")
    with pytest.raises(
        ValueError, match=r"^train.jsonl:7: the chat template leaves out message 1, of the role 'assistant'"
    ):
        pair(rewrites, prompt=CHAT[:1], chosen=CHAT[1:], rejected=CHAT[1:2])
    assert pair(rewrites, prompt=CHAT[:1], chosen="b", rejected="c").chosen.num_targets


# ------------------------------------------------------------------------------------ whole files


def test_overlong_pairs(tokenizer, tmp_path):
    """Catches an off-by-one limit, an EOS after a truncation, the side that fits truncated as well, a record truncated
    within its prompt (no token of the answer is left to compare) instead of skipped, and records not counted."""
    records = [
        {"prompt": "a b", "chosen": " c", "rejected": " d e f g h i j", "margin": 1.5},
        {"prompt": "a", "chosen": " b", "rejected": " c"},
        {"prompt": "a b c d e f g h i j k l m n", "chosen": " q", "rejected": " r"},
        {"prompt": "a b", "chosen": " c d e f g h x", "rejected": " c d e f g h y"},
    ]
    path = tiny.write_records(tmp_path / "train.jsonl", records)
    whole, counts = encode_pair_file(path, tokenizer, LIMITS)
    assert counts == EncodingCounts(0, 0, 0, 0) and [p.margin for p in whole] == [1.5, None, None, None]
    limit = max(map(len, (*whole[0].sequences, *whole[3].sequences)))
    assert whole[2].prompt_length > limit
    longest = max(map(len, whole[2].sequences))
    encode_pair_file(path, tokenizer, LIMITS._replace(max_seq_len=longest))
    complaint = f"{longest} tokens, the limit is {longest - 1}"
    tiny.refused(
        lambda: encode_pair_file(path, tokenizer, LIMITS._replace(max_seq_len=longest - 1)), f"{path}:3: ", complaint
    )
    kept, counts = encode_pair_file(path, tokenizer, LIMITS._replace(max_seq_len=limit, overlong="skip"))
    assert list(kept) == [whole[0], whole[1], whole[3]] and counts == EncodingCounts(0, 1, 0, 0)
    limit = whole[0].prompt_length + 3
    cut, counts = encode_pair_file(path, tokenizer, LIMITS._replace(max_seq_len=limit, overlong="truncate"))
    assert counts == EncodingCounts(2, 1, 1, 0) and cut[1] == whole[1]
    assert cut[0].chosen == whole[0].chosen and cut[0].margin == 1.5
    for before, after in ((whole[0], cut[0]), (whole[3], cut[2])):
        assert list(after.rejected.input_ids) == list(before.rejected.input_ids[:limit])
        check_labels(after.rejected, before.prompt_length)
    assert cut[2].chosen == cut[2].rejected  # they differ beyond the cut: counted as identical
    full = LIMITS._replace(overlong="truncate", max_seq_len=whole[0].prompt_length)
    assert len(encode_pair_file(path, tokenizer, full)[0]) == 1  # one token of the answer must fit
    full = full._replace(max_seq_len=1)
    tiny.refused(lambda: encode_pair_file(path, tokenizer, full), path, "no record is left: all 4 are too long for 1")


def test_pair_files(tokenizer, tmp_path):
    """Catches identical sides refused or not counted, a file of nothing else accepted, merged prompts not counted, an
    error without its line, and an id beyond the model in either side."""
    same = {"prompt": "a", "chosen": " b", "rejected": " b"}
    merged = {"prompt": "The ans", "chosen": "wer", "rejected": " b"}
    pairs, counts = encode_pair_file(tiny.write_records(tmp_path / "a", [same, merged, same]), tokenizer, LIMITS)
    assert len(pairs) == 3 and counts == EncodingCounts(0, 0, 2, 1)
    path = tiny.write_records(tmp_path / "b", [same, same])
    tiny.refused(lambda: encode_pair_file(path, tokenizer, LIMITS), path, "the same in every record")
    path = tiny.write_records(tmp_path / "c", [merged, {**merged, "margin": []}])
    tiny.refused(lambda: encode_pair_file(path, tokenizer, LIMITS), f"{path}:2: ", "margin")
    small = LIMITS._replace(vocab_size=tokenizer.encode(" q")[-1])
    for side in ("chosen", "rejected"):
        record = {"prompt": "", "chosen": "", "rejected": "", side: " q"}
        path = tiny.write_records(tmp_path / side, [record])
        tiny.refused(lambda p=path: encode_pair_file(p, tokenizer, small), f"{path}:1: ", "holds token id")


# ----------------------------------------------------------------------------------------- batches


def made_pairs(tokenizer, count=7):
    words = " d e f g h i j k l m n o p"
    return [
        pair(tokenizer, prompt="a b", chosen=words[: 2 * i], rejected=words[: 2 * ((3 * i) % 5)], margin=i or None)
        for i in range(count)
    ]


def test_rows_of_pairs(tokenizer):
    """Catches sides that are mixed up or in another order, and a score that is not the last token's or its side's."""
    pairs = made_pairs(tokenizer)
    rows, places = rows_to_score(pairs)
    assert rows == [p.chosen for p in pairs] + [p.rejected for p in pairs] == pair_rows(pairs)
    sides = [side for p in pairs for side in (p.chosen, p.rejected)]
    assert [(rows[i], position) for i, position in places] == [(side, len(side.input_ids) - 1) for side in sides]
    assert rows_to_score([]) == ([], []) and list(map(len, pairs[1].sequences)) == [
        len(row.input_ids) for row in sides[2:4]
    ]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
def test_micro_batches_of_pairs(dp_size, tokenizer):
    """Catches ranks with different numbers of groups (a collective would hang), a pair lost, used twice or split, and
    long pairs batched with short ones."""
    pairs = made_pairs(tokenizer)
    for size in (1, 2, 4, 8):
        ranks = [
            list(micro_batches(pairs, size, lambda pair: max(map(len, pair.sequences)), rank, dp_size))
            for rank in range(dp_size)
        ]
        assert len({len(groups) for groups in ranks}) == 1
        used = [p for groups in ranks for group in groups for p in group]
        assert sorted(map(id, used)) == sorted(map(id, pairs))
        for groups in ranks:
            lengths = [max(map(len, p.sequences)) for group in groups for p in group]
            assert lengths == sorted(lengths) and all(len(group) <= size for group in groups)
    assert isinstance(used[0], Pair)
