"""Chats that generate.py writes and score.py reads, and message contents in parts."""

import json
from datetime import date

import pytest

from inference.choosing import answer_of, choose_best, final_answer
from inference.lines import sidecar
from models.record_files import Record
from models.reward import encode_to_score
from models.tokenizer import Tokenizer
from tests import tiny
from tests.inference.test_score import write_reward_model

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


def test_lines_are_scored_on_the_day_they_were_drawn(tmp_path):
    """Catches a template that is told another date when the answer is scored or graded than when it was drawn; and
    lines that lie beside no record of their day, not scored with today's, or with a stated one; or that were graded
    without a folder in between."""
    folder, rm, lines = tmp_path / "model", tmp_path / "rm", tmp_path / "lines.jsonl"
    tiny.write_model(folder)
    write_reward_model(rm)
    for path in (folder, rm):
        tiny.write_tokenizer(path, chat_template="{{ strftime_now('%d %b %Y') }} " + TEMPLATE)
    given = ("--checkpoint_path", folder, "--output_file", lines, "--max_new_tokens", 4)
    result = tiny.run("inference/generate.py", *given, "--chat", "--prompt", "1 plus 2", "--chat_date", "2024-02-29")
    assert result.code == 0, result.stderr
    days = "def day(prompts, completions, examples): return [int(text.startswith('29 Feb 2024')) for text in prompts]"
    (tmp_path / "g.py").write_text(f"{days}\ndef number(prompts, completions, examples): return [0.5] * len(prompts)")
    copy, rewards, today = tiny.write_records(tmp_path / "copy.jsonl", tiny.read_lines(lines)), [], date.today()
    stated = ("--chat_date", "2024-02-29")
    best = tiny.write_records(tmp_path / "best.jsonl", tiny.read_lines(lines))  # as --best_of_n leaves it
    sidecar(lines.with_name("best.scored.jsonl")).write_bytes(sidecar(lines).read_bytes())
    for i, (data, more) in enumerate(((lines, ()), (copy, stated), (copy, ()), (best, ()))):
        flags = ("--data_file", data, *more, "--output_file")
        by_model = tiny.run("inference/score.py", "--checkpoint_path", rm, *flags, tmp_path / f"scored-{i}")
        by_function = ("--grader", tmp_path / "g.py:day", "--checkpoint_path", folder)
        by_function = tiny.run("inference/score.py", *by_function, *flags, tmp_path / f"graded-{i}")
        assert tiny.read_lines(tmp_path / f"graded-{i}")[0]["grade"] == int(i != 2)
        for result in (by_model, by_function):
            assert ["chat", "date", str(today) if i == 2 else "2024-02-29"] in map(
                str.split, result.stdout.splitlines()
            )
        rewards.append(tiny.read_lines(tmp_path / f"scored-{i}")[0]["reward"])
    assert rewards[0] == rewards[1] == rewards[3] != rewards[2]
    graded, again = tmp_path / "graded.jsonl", tmp_path / "again.jsonl"  # a grader alone knows no day
    number = tmp_path / "g.py:number"
    assert tiny.run("inference/score.py", "--grader", number, "--data_file", lines, "--output_file", graded).code == 0
    flags = ("--data_file", graded, "--output_file", again)
    assert tiny.run("inference/score.py", "--checkpoint_path", rm, *flags).code == 0
    assert tiny.read_lines(again)[0]["reward"] == rewards[0]


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
