"""scripts/recipes/gsm8k.py: GSM8K's files as prompts with answers."""

import json
import subprocess
import sys

import pytest

from tests import tiny
from training.graders import math_answer

SCRIPT = "scripts/recipes/gsm8k.py"
RECORDS = [
    {"question": "How many are 9 * 2?\n", "answer": "It is <<9*2=18>>18.\n#### 18"},
    {"question": "What is left of \u00a35,000?", "answer": "#### 1 is no answer.\n#### 1,234"},
    {"question": "And below 0?", "answer": "So\n#### -3"},
]


def convert(source, out, *flags):
    return tiny.run(SCRIPT, "--input_file", source, "--output_file", out, *flags)


def test_prompts_and_answers(tmp_path):
    """Catches an answer with its working, with a number's comma or from an earlier ####, and a prompt that lost its
    question or instruction."""
    source = tiny.write_records(tmp_path / "train.jsonl", RECORDS)
    result = convert(source, tmp_path / "new/chat.jsonl")
    assert result.code == 0 and "3 prompts of 3 records" in result.stdout, result.stderr
    lines = tiny.read_lines(tmp_path / "new/chat.jsonl")
    assert [line["answer"] for line in lines] == ["18", "1234", "-3"]
    for line, record in zip(lines, RECORDS):
        [message] = line["prompt"]
        assert message["role"] == "user" and message["content"].startswith(record["question"].strip() + "\n")
        assert message["content"].endswith("within \\boxed{}.")
        assert math_answer("", record["answer"], line) == math_answer("", f"\\boxed{{{line['answer']}}}", record) == 1
    flags = ("--plain", "--instruction", "", "--max_records", 2)
    assert convert(source, tmp_path / "plain.jsonl", *flags).code == 0
    assert tiny.read_lines(tmp_path / "plain.jsonl") == [
        {"prompt": "Question: How many are 9 * 2?\nAnswer:", "answer": "18"},
        {"prompt": "Question: What is left of \u00a35,000?\nAnswer:", "answer": "1234"},
    ]
    tiny.assert_refused(convert(source, tmp_path / "plain.jsonl"), "exists")


def test_a_disk_that_is_full(tmp_path):
    """Catches a partly written prompt file under its final name, with which a recipe would go on."""
    source = tiny.write_records(tmp_path / "train.jsonl", RECORDS * 1000)
    words = [sys.executable, tiny.ROOT / SCRIPT, "--input_file", source, "--output_file", tmp_path / "out.jsonl"]
    command = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "out.jsonl: cannot be written: File too large" in result.stderr, result
    assert not (tmp_path / "out.jsonl").exists()


BAD = {
    "no question": ({"answer": "#### 1"}, "'question'"),
    "empty question": ({"question": " ", "answer": "#### 1"}, "question must be text"),
    "no answer": ({"question": "a"}, "'answer'"),
    "answer of a wrong type": ({"question": "a", "answer": 1}, "answer must be text"),
    "no mark": ({"question": "a", "answer": "It is 1"}, "####"),
    "no number": ({"question": "a", "answer": "#### one"}, "no number follows ####, but 'one'"),
    "nothing": ({"question": "a", "answer": "####"}, "no number follows ####"),
    "formula": ({"question": "a", "answer": "#### 1/2"}, "no number follows ####"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines(case, tmp_path):
    """Catches a broken line that is guessed at or left out."""
    record, part = BAD[case]
    source = tmp_path / "train.jsonl"
    source.write_text(json.dumps(RECORDS[0]) + "\n\n" + json.dumps(record) + "\n")
    tiny.assert_refused(convert(source, tmp_path / "new/out.jsonl"), "train.jsonl:3: ", part)
    assert not (tmp_path / "new").exists()


def test_parquet(tmp_path):
    """Catches the Hub's parquet file read otherwise than the published JSONL, and no advice to install pyarrow."""
    path = tmp_path / "train-00000-of-00001.parquet"
    path.write_bytes(b"PAR1")
    try:
        import pyarrow.parquet
    except ImportError:
        tiny.assert_refused(convert(path, tmp_path / "out.jsonl"), "needs pyarrow (pip install pyarrow)")
        return
    tiny.assert_refused(convert(path, tmp_path / "out.jsonl"), "not a parquet file")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    source = tiny.write_records(tmp_path / "train.jsonl", RECORDS)
    assert convert(path, tmp_path / "a.jsonl").code == convert(source, tmp_path / "b.jsonl").code == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
