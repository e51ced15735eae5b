"""training/preferences.py: labelled completions and labelled steps, and the tokens that their scores sit on."""

import json
import random

import pytest
import torch

from models.chats import read_chat
from models.records import EncodingCounts, Limits, Record, encode_answer, encode_prompt
from models.reward import Scored, encode_steps, encode_to_score, rows_to_score
from tests import tiny
from tests.training.test_data import CHAT, END_OF_TURN, SYSTEM
from training.preferences import encode_pointwise_record, encode_process_record, encode_scored_file

LIMITS = Limits(500, 200)
CPU = torch.device("cpu")
USER, ANSWER = CHAT[0], CHAT[1]
FOLDERS = ["sentencepiece", "byte_level"]


# ---------------------------------------------------------------------------- labelled completions


@pytest.mark.parametrize("kind", FOLDERS)
def test_pointwise(kind, opened):
    """Catches a score that is not on the EOS, and labels other than those given."""
    tokenizer, oracle = opened(kind)
    for label, value in ((0, 0.0), (1, 1.0), (True, 1.0), (False, 0.0), (0.25, 0.25)):
        fields = {"prompt": "the answer is", "completion": " 7, hello.", "label": label}
        row, differs = encode_pointwise_record(Record("x", fields), tokenizer)
        assert row.input_ids == [*oracle("the answer is 7, hello.")["input_ids"], oracle.eos_token_id]
        assert row.positions == [len(row.input_ids) - 1] and row.labels == [value] and not differs
        assert type(row.labels[0]) is float and row.prompt_length == len(oracle("the answer is")["input_ids"])


@pytest.mark.parametrize("kind", END_OF_TURN)
def test_pointwise_chat(kind, opened):
    """Catches a score on a token after the end of the turn, which generation never reaches."""
    tokenizer, _ = opened(kind)
    fields = {"prompt": CHAT[:1], "completion": ANSWER["content"], "label": 1}
    row, _ = encode_pointwise_record(Record("x", fields), tokenizer)
    answer, _ = encode_answer(read_chat(CHAT[:1]), [ANSWER], tokenizer)
    assert row.input_ids == answer.input_ids and row.positions == [len(row.input_ids) - 1]
    assert answer.labels[-1] == row.input_ids[-1]
    tail = tokenizer.decode_continuation([40], row.input_ids[row.prompt_length :], skip_special_tokens=False)
    assert tail.endswith(END_OF_TURN[kind])


GOOD = {"prompt": "a", "completion": " b", "label": 1}
BAD_POINTS = [
    ({"completion": "b", "label": 1}, "'prompt' is missing (found: completion, label)"),
    ({"prompt": "a", "label": 1}, "'completion' is missing"),
    ({"prompt": "a", "completion": "b"}, "'label' is missing"),
    ({**GOOD, "prompt": 5}, "prompt must be text or a list of messages, not a number"),
    ({**GOOD, "prompt": []}, "prompt must be a non-empty list"),
    ({**GOOD, "completion": 5}, "completion must be text where prompt is text"),
    ({**GOOD, "completion": [ANSWER]}, "completion must be text where prompt is text"),
    ({**GOOD, "prompt": [USER], "completion": 5}, "completion must be text or a list of messages, not a number"),
    ({**GOOD, "prompt": [USER], "completion": [USER]}, "completion must begin and end with a message of the assistant"),
    ({**GOOD, "label": 2}, "label must be 0, 1 or a probability between them, not 2"),
    ({**GOOD, "label": -0.1}, "label must be 0, 1 or a probability between them, not -0.1"),
    ({**GOOD, "label": "1"}, "label must be a finite number, not '1'"),
    ({**GOOD, "label": None}, "the field 'label' is null"),
    ({**GOOD, "label": [1]}, "label must be a finite number, not [1]"),
    ({**GOOD, "label": float("nan")}, "label must be a finite number, not nan"),
    ({**GOOD, "completion": "b\ud83d"}, "surrogate"),
]


@pytest.mark.parametrize("fields, complaint", BAD_POINTS, ids=lambda x: None if isinstance(x, str) else str(x)[:80])
def test_points_that_cannot_be_used(fields, complaint, opened, tmp_path):
    """Catches an error that does not name the line or names another cause than the real one, and a traceback."""
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(fields)}\n")
    call = lambda: encode_scored_file(path, opened("llama3")[0], LIMITS, kind="pointwise")  # noqa: E731
    tiny.refused(call, f"{path}:2: ", complaint)


# ------------------------------------------------------------------------------------------- steps

STEPS = ["12 + 34 = 46.", "The answer is 46, hello there.", " and so\nit is"]


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("separator", ["\n", "\n\n", " ;", "<|eot_id|>", ""])
def test_steps(kind, separator, opened):
    """Catches a label that is not on the last token of step + separator, an EOS, BOS twice, and steps encoded one by
    one, where a sentencepiece tokenizer puts a space before each that generated text does not have."""
    tokenizer, oracle = opened(kind)
    record = {"prompt": "Question: how many?\n", "completions": STEPS, "labels": [1, True, 0.25]}
    row, counts = encode_process_record(Record("x", record), separator, tokenizer)
    differs = counts.split_differently
    assert counts.with_the_separator_inside_a_step == (separator == "\n")  # the last of STEPS
    assert (row.input_ids, row.positions) == encode_steps(record["prompt"], STEPS, separator, tokenizer)
    text = record["prompt"] + "".join(step + separator for step in STEPS)
    assert bool(differs) == (row.input_ids != oracle(text)["input_ids"])
    assert not differs or separator == ""
    assert row.labels == [1.0, 1.0, 0.25] and row.prompt_length == len(oracle(record["prompt"])["input_ids"])
    assert row.positions[-1] == len(row.input_ids) - 1
    if not differs:
        for i, position in enumerate(row.positions):
            upto = record["prompt"] + "".join(step + separator for step in STEPS[: i + 1])
            assert tokenizer.decode(row.input_ids[: position + 1], skip_special_tokens=False).endswith(upto)
            assert row.input_ids[: position + 1] == oracle(upto)["input_ids"]


def test_steps_whose_tokens_would_merge(opened):
    """Catches a token that spans two steps, or the prompt and a step, so that a label sits on another step's text."""
    tokenizer, oracle = opened("sentencepiece")
    ids, positions = encode_steps("The ans", ["wer is 7 pl", "us"], "", tokenizer)
    newline = oracle("\n", add_special_tokens=False)["input_ids"]  # no token spans it, no space is added after it
    parts = [oracle("\n" + text, False)["input_ids"][len(newline) :] for text in ("wer is 7 pl", "us")]
    assert ids == oracle("The ans")["input_ids"] + parts[0] + parts[1]
    assert (
        positions == [len(ids) - len(parts[1]) - 1, len(ids) - 1] and ids != oracle("The answer is 7 plus")["input_ids"]
    )
    record = Record("x", {"prompt": "The ans", "completions": ["wer is 7 pl", "us"], "labels": [1, 0]})
    assert encode_process_record(record, "", tokenizer)[1]
    tokenizer, _ = opened("newlines_plain")
    assert len(tokenizer.encode("\n\n")) == 1
    ids, positions = encode_steps("the answer\n", ["\nis", "\nyes"], "\n", tokenizer)
    assert [tokenizer.decode(ids[: p + 1]) for p in positions] == ["the answer\n\nis\n", "the answer\n\nis\n\nyes\n"]


@pytest.mark.parametrize("separator", ["\n", "\n\n", " ;"])
def test_steps_that_scoring_would_cut(separator, tokenizer):
    """Catches steps that are trained at other places than score.py finds in their text, and are not counted; and steps
    counted though they are found."""
    steps = ["a", "a\n", "b\nc", "\n\nd", "e\n\n", "f\n\ng", " h ;", "i ; j", " ; k", "l"]
    for first in steps:
        for last in steps:
            record = {"prompt": "a", "completions": [first, last], "labels": [1, 0]}
            row, counts = encode_process_record(Record("x", record), separator, tokenizer)
            output = "".join(step.removesuffix(separator) + separator for step in (first, last))
            [scored], _ = encode_to_score(Record("x", {"prompt": "a", "output": output}), separator, tokenizer)
            assert counts.with_the_separator_inside_a_step == (scored.positions != row.positions), (first, last)
    told = str(EncodingCounts(1, with_the_separator_inside_a_step=2))
    assert told.startswith("; 1 truncated; 2 with the separator inside a step, at which") and "--step_sep" in told


@pytest.mark.parametrize("kind", [*FOLDERS, "newlines_plain"])
def test_any_steps(kind, opened):
    """Catches a step's ids or position that depend on the steps after it (scores of partial solutions would differ),
    and tokens that span a boundary, for texts whose tokens could merge there."""
    tokenizer, _ = opened(kind)
    draw = random.Random(0)
    for _ in range(150):
        texts = [
            "".join(draw.choices(["a", " ", "\n", "the", "7", ".", "é", "🙂", "plus", "er"], k=6)) for _ in range(5)
        ]
        separator = draw.choice(["\n", "\n\n", "", " ", "."])
        ids, positions = encode_steps(texts[0], texts[1:], separator, tokenizer)
        assert len(positions) == 4 and positions == sorted(set(positions)) and positions[-1] == len(ids) - 1
        for k in range(5):
            some, places = encode_steps(texts[0], texts[1 : 1 + k], separator, tokenizer)
            assert some == ids[: len(some)] and places == positions[:k]
            text = texts[0] + "".join(step + separator for step in texts[1 : 1 + k])
            assert tokenizer.decode(some) == text


@pytest.mark.parametrize("kind", ["llama2", "llama3", "chatml"])
def test_steps_after_a_chat(kind, opened):
    """Catches the template's header missing, or an end of turn between the steps."""
    tokenizer, oracle = opened(kind)
    record = {"prompt": [SYSTEM, USER], "completions": ["the answer", "is yes."], "labels": [1, 0]}
    row, differs = encode_process_record(Record("x", record), "\n", tokenizer)
    header = oracle.apply_chat_template([SYSTEM, USER], tokenize=False, add_generation_prompt=True)
    assert row.input_ids == oracle(header + "the answer\nis yes.\n", add_special_tokens=False)["input_ids"]
    assert row.input_ids[: row.prompt_length] == encode_prompt(read_chat([SYSTEM, USER]), tokenizer) and not differs
    first = oracle(header + "the answer\n", add_special_tokens=False)["input_ids"]
    assert row.positions == [len(first) - 1, len(row.input_ids) - 1]


def test_overlong_scored_rows(tokenizer, tmp_path):
    """Catches the label of a truncated step kept (or moved to another), a row with no label left, a truncated
    completion's label lost, an EOS after a truncation, and rows not counted."""
    steps = {"prompt": "a b", "completions": ["c d", "e", "f g h"], "labels": [1, 0.5, 0]}
    path = tiny.write_records(tmp_path / "steps", [steps, {**steps, "prompt": "a b c d e f g h i j k l m n o"}])
    (whole, long), counts = encode_scored_file(path, tokenizer, LIMITS, kind="process")
    assert counts == EncodingCounts(0, 0, 0, 0)

    def encode(limit, overlong, kind="process", file=path):
        limits = LIMITS._replace(max_seq_len=limit, overlong=overlong)
        rows, counts = encode_scored_file(file, tokenizer, limits, kind=kind)
        return list(rows), counts

    tiny.refused(
        lambda: encode(len(whole.input_ids), "refuse"), f"{path}:2: ", f"{len(long.input_ids)} tokens, the limit is"
    )
    assert encode(len(whole.input_ids), "skip") == ([whole], EncodingCounts(0, 1, 0, 0))
    for limit in range(1, len(whole.input_ids)):
        kept = [position for position in whole.positions if position < limit]
        if not kept:
            tiny.refused(lambda n=limit: encode(n, "truncate"), path, "no record is left: all 2 are too long")
            continue
        (cut,), counts = encode(limit, "truncate")
        assert cut == Scored(whole.input_ids[: kept[-1] + 1], kept, whole.labels[: len(kept)], whole.prompt_length)
        assert counts == EncodingCounts(1, 1, 0, 0)

    path = tiny.write_records(tmp_path / "points", [{"prompt": "a b", "completion": " c d e", "label": 0.25}])
    (whole,), _ = encode_scored_file(path, tokenizer, LIMITS, kind="pointwise")
    size = len(whole.input_ids)
    tiny.refused(
        lambda: encode(size - 1, "refuse", "pointwise", path), f"{path}:1: ", f"{size} tokens, the limit is {size - 1}"
    )
    for limit in range(whole.prompt_length + 1, size):
        (cut,), counts = encode(limit, "truncate", "pointwise", path)
        assert (
            cut == Scored(whole.input_ids[:limit], [limit - 1], [0.25], whole.prompt_length) and counts.truncated == 1
        )
    tiny.refused(lambda: encode(whole.prompt_length, "truncate", "pointwise", path), path, "no record is left")


RIGHT = {"prompt": "a", "completions": ["b", "c"], "labels": [1, 0]}
BAD_STEPS = [
    ({"completions": ["b"], "labels": [1]}, "'prompt' is missing (found: completions, labels)"),
    ({"prompt": "a", "labels": [1]}, "'completions' is missing"),
    ({"prompt": "a", "completions": ["b"]}, "'labels' is missing"),
    ({**RIGHT, "prompt": 5}, "prompt must be text or a list of messages, not a number"),
    ({**RIGHT, "prompt": []}, "prompt must be a non-empty list"),
    ({**RIGHT, "completions": "b\nc"}, "completions must be a list of steps, not text"),
    ({**RIGHT, "completions": [], "labels": []}, "completions holds no step"),
    ({**RIGHT, "completions": ["b", ""]}, "completions[1] is an empty step"),
    ({**RIGHT, "completions": [" \n", "c"]}, "completions[0] is an empty step"),
    ({**RIGHT, "completions": ["b", 5]}, "completions[1] must be text, not a number"),
    ({**RIGHT, "completions": ["b", ["c"]]}, "completions[1] must be text, not a list"),
    ({**RIGHT, "completions": ["b", "c\ud83d"]}, "surrogate"),
    ({**RIGHT, "labels": [1]}, "2 completions but 1 labels"),
    ({**RIGHT, "labels": [1, 0, 1]}, "2 completions but 3 labels"),
    ({**RIGHT, "labels": 1}, "labels must be a list, one for each step, not a number"),
    ({**RIGHT, "labels": [1, 2]}, "labels[1] must be 0, 1 or a probability between them, not 2"),
    ({**RIGHT, "labels": [-1, 1]}, "labels[0] must be 0, 1 or a probability"),
    ({**RIGHT, "labels": [1, None]}, "labels[1] must be a finite number, not None"),
    ({**RIGHT, "labels": ["good", 1]}, "labels[0] must be a finite number, not 'good'"),
    ({**RIGHT, "labels": [float("nan"), 1]}, "labels[0] must be a finite number, not nan"),
]


@pytest.mark.parametrize("fields, complaint", BAD_STEPS, ids=lambda x: None if isinstance(x, str) else str(x)[:80])
def test_steps_that_cannot_be_used(fields, complaint, opened, tmp_path):
    """Catches an error that does not name the line or names another cause than the real one, and a traceback."""
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(RIGHT)}\n{json.dumps(fields)}\n")
    call = lambda: encode_scored_file(path, opened("llama3")[0], LIMITS, kind="process")  # noqa: E731
    tiny.refused(call, f"{path}:2: ", complaint)


def test_step_without_a_token(tokenizer):
    """Catches two steps that share one position because one has no text and the separator is empty."""
    with pytest.raises(ValueError, match="step 1 with its separator has no token"):
        encode_steps("a", ["b", ""], "", tokenizer)
    assert len(set(encode_steps("a", ["b", "", "", "c"], "\n", tokenizer)[1])) == 4


def test_rows_to_score():
    """Catches a score at another position than its own, or read from another row."""
    rows, places = rows_to_score([Scored([1, 2, 3, 4], [1, 3], [1.0, 0.5]), Scored([5, 6], [1], [0.0])])
    assert [row.input_ids for row in rows] == [[1, 2, 3, 4], [5, 6]] and not any(row.num_targets for row in rows)
    assert [rows[i].input_ids[position] for i, position in places] == [2, 4, 6]
