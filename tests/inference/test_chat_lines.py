"""Chats that generate.py writes and score.py reads, and message contents in parts."""

import json

import pytest

from inference.choosing import answer_of, choose_best, final_answer
from models.record_files import Record
from models.reward import encode_to_score
from models.tokenizer import Tokenizer
from tests import tiny

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"
GRADER = tiny.ROOT / "training/graders.py"


@pytest.mark.parametrize("prompt", ("1 plus 2", [{"role": "user", "content": "1 plus 2"}]))
def test_lines_are_scored_as_they_were_asked(tmp_path, prompt):
    """Catches answers of --chat --system that are scored after the plain prompt, or without the system message."""
    folder, out = tmp_path / "model", tmp_path / "out.jsonl"
    tiny.write_model(folder, max_position_embeddings=512)
    tiny.write_tokenizer(folder, chat_template=TEMPLATE)
    prompts = tiny.write_records(tmp_path / "p.jsonl", [{"prompt": prompt, "tag": 1}])
    flags = ("--prompt_file", prompts, "--output_file", out, "--max_new_tokens", 4, "--chat", "--system", "The answer")
    assert tiny.run("inference/generate.py", "--checkpoint_path", folder, *flags).code == 0
    [line], tokenizer = tiny.read_lines(out), Tokenizer(folder)
    asked = tokenizer.encode("<s>[system] The answer\n[user] 1 plus 2\n[assistant] ", add_special_tokens=False)
    [row], _ = encode_to_score(Record("line", line), None, tokenizer)
    assert row.input_ids[: len(asked)] == asked and row.prompt_length == len(asked)
    assert line["tag"] == 1


def test_contents_in_parts_are_read(tmp_path):
    """Catches contents in parts that a grader or a vote does not get as text, and an image part that is not refused."""
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "42"}]
    records = [
        {"prompt": [{"role": "user", "content": content}], "completion": [{"role": "assistant", "content": content}]}
        for content in (parts, "It is 42")
    ]
    data = tiny.write_records(tmp_path / "d.jsonl", [{**record, "answer": "42"} for record in records])
    flags = ("--grader", f"{GRADER}:last_number", "--data_file", data, "--output_file", tmp_path / "out.jsonl")
    assert tiny.run("inference/score.py", *flags).code == 0
    assert [line["grade"] for line in tiny.read_lines(tmp_path / "out.jsonl")] == [1.0, 1.0]
    assert [answer_of(Record("d", record), None, final_answer) for record in records] == ["It is 42"] * 2
    data.write_text(json.dumps({**records[0], "completion": [{"role": "assistant", "content": [{"type": "image"}]}]}))
    tiny.assert_refused(tiny.run("inference/score.py", *flags[:-1], tmp_path / "new.jsonl"), "d.jsonl:1", "image")


def test_alpaca_prompts_are_told_apart():
    """Catches best-of-n groups that merge prompts because each has an empty `input`, or because one text stands under
    two system messages, so that one sample is kept for all of them."""
    alpaca = [{"instruction": text, "input": "", "output": "x", "reward": 1.0} for text in ("a", "b", "a")]
    chats = [{"prompt": "a", "system": text, "completion": "x", "reward": 1.0} for text in ("S", "T")]
    assert choose_best(alpaca) == alpaca[:2] and choose_best(chats) == chats
