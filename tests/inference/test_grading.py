"""inference/score.py --grader: grades by a function, and pass@k."""

import itertools
import json
import statistics
import time

import pytest

from inference.grading import summary
from models.checkpoint import open_folder
from models.checksums import CHECKSUMS
from models.records import Limits
from models.reward import pass_at_k
from tests import tiny
from tests.forked import Forked
from training.prompts import load_prompts

SCRIPT = "inference/score.py"
MATH = tiny.ROOT / "training/graders.py:math_answer"
GRADERS = """
import time

def one(prompt, completion, example):
    if completion == "hang": time.sleep(1000)
    if completion == "raise": raise KeyError("a\\nb")
    return len(completion) / len(prompt) + example["n"]

def slow(prompt, completion, example):
    time.sleep(0.03)
    return 1

def batch(prompts, completions, examples):
    return [len(completion) for completion in completions]

def two(prompt, completion):
    return 1
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "graders.py"
    path.write_text(GRADERS)
    return path


def grade(grader, data, out, *more):
    return tiny.run(SCRIPT, "--grader", grader, "--data_file", data, "--output_file", out, "--reward_workers", 1, *more)


def samples(*verdicts):
    """Shuffled lines as generate.py writes them: for each prompt, a sample for each verdict (right or wrong)."""
    lines = [
        {"idx": i, "sample_idx": s, "prompt": "6 * 7?", "output": f"It is \\boxed{{4{2 * right}}}.", "answer": 42}
        | {"finish_reason": "stop"}
        for i, prompt in enumerate(verdicts)
        for s, right in enumerate(prompt)
    ]
    return lines[::2] + lines[1::2]


def test_pass_at_k_is_the_share_of_all_choices():
    """Catches the biased estimator 1 - (1 - c / n)^k, which draws with replacement."""
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            choices = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(statistics.fmean(map(max, choices)), abs=1e-15)
    assert pass_at_k(10**5, 1, 1) == 1e-5 and pass_at_k(2000, 1000, 1000) == 1
    for n, c, k in ((3, 4, 1), (3, 1, 4), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="is not defined"):
            pass_at_k(n, c, k)


def test_a_grade_of_parts():
    """Catches a full grade that its function has added up, here to 0.9999999999999999, and that passes in training."""
    rows = summary([{"grade": 0.7 + 0.2 + 0.1}, {"grade": 0.9}], ["a", "b"], [1])
    assert rows["pass@1"] == "50.00%"


def test_grades_and_pass_at(tmp_path):
    """Catches samples of two prompts in one group; a mean over samples instead of one over prompts; a line that loses a
    field or its place; and a resume that grades lines again or forgets them."""
    lines = samples([1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0, 0])
    data, out = tiny.write_records(tmp_path / "data.jsonl", lines), tmp_path / "new/out.jsonl"
    result = grade(MATH, data, out, "--pass_at", 1, 2, 4)
    assert result.code == 0, result.stderr
    written = tiny.read_lines(out)
    assert written == [{**line, "grade": float("42" in line["output"])} for line in lines]
    wanted = {1: (1 / 2 + 0 + 1 + 1 / 5) / 4, 2: (5 / 6 + 0 + 1 + 2 / 5) / 4, 4: (1 + 0 + 1 + 4 / 5) / 4}  # by hand
    for k, value in wanted.items():
        assert f"pass@{k}    {value:.2%}" in result.stdout, result.stdout
    assert "17 to 4 prompts" in result.stdout and f"mean {7 / 17:.4f}" in result.stdout

    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    again = grade(MATH, data, out, "--resume", "--pass_at", 1)
    assert again.code == 0 and out.read_bytes() == whole and "8 done before" in again.stdout, again.stdout
    assert f"pass@1    {wanted[1]:.2%}" in grade(MATH, data, out, "--resume", "--pass_at", 1).stdout
    other = grade(f"{MATH.parent}/graders.py:last_number", data, out, "--resume")
    tiny.assert_refused(other, "--grader: other content than the run was begun with;")
    for other in (b'"x"', b"null", b"true"):
        out.write_bytes(whole.replace(b'"grade": 0.0', b'"grade": ' + other, 1))
        tiny.assert_refused(grade(MATH, data, out, "--resume"), "out.jsonl:3: not a line that score.py wrote")
    tiny.assert_refused(grade(MATH, data, out), "exists")
    advice = "take another, or go on with --resume\n"  # not "or remove it": it is the data here
    tiny.assert_refused(grade(MATH, data, data), f"--output_file {data}: exists; {advice}")


def test_failures_and_forms(file, tmp_path):
    """Catches a hanging grader that stops the run, a failure that shifts the other grades or is not reported, and a
    batch grader that is called for each answer."""
    records = [{"prompt": "ab", "completion": text, "n": i} for i, text in enumerate(["a", "hang", "raise", "abcd"])]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records.append({"prompt": messages, "completion": [{"role": "assistant", "content": "abc"}], "n": 4})
    data = tiny.write_records(tmp_path / "data.jsonl", records)
    result = grade(f"{file}:one", data, tmp_path / "one.jsonl", "--reward_timeout", 0.5, "--pass_at", 1)
    assert result.code == 0 and "1 timeouts, 1 errors" in result.stdout, result
    assert f"pass@1    {(1 / 4 + 1) / 2:.2%}" in result.stdout  # 0.5 does not pass
    got = tiny.read_lines(tmp_path / "one.jsonl")
    assert [line["grade"] for line in got] == [0.5, 0, 0, 5, 5]  # "a\nb" has three characters
    assert [line.get("grade_error") for line in got] == [None, "timeout", "KeyError: 'a\\nb'", None, None]
    assert grade(f"{file}:batch", data, tmp_path / "batch.jsonl").code == 0
    assert [line["grade"] for line in tiny.read_lines(tmp_path / "batch.jsonl")] == [1, 4, 5, 4, 3]


def test_prompts_are_those_of_training(tmp_path):
    """Catches a chat that a function gets otherwise than in training, so that a thought which the template opens has no
    beginning; a text prompt that is rendered; weights that are asked for, where only a template is used; and a chat
    template that was damaged since the folder's export."""
    folder, out = tmp_path / "lm", tmp_path / "out.jsonl"
    tiny.write_model(folder)
    tiny.write_tokenizer(folder, chat_template="{{ bos_token }}{{ messages[0].content }} assistant:<think>\n")
    lines = [{"prompt": [{"role": "user", "content": "2+2?"}]}, {"prompt": "2+2? <think>\n"}, {"prompt": "2+2?"}]
    lines = [{**line, "output": "so\n</think>\n\\boxed{4}", "finish_reason": "stop"} for line in lines]
    data, opened = tiny.write_records(tmp_path / "data.jsonl", lines), open_folder(folder)
    prompts, _ = load_prompts(data, opened.tokenizer, Limits(opened.config.vocab_size, 50))
    (tmp_path / "g.py").write_text("def same(prompt, completion, example): return prompt == example['seen']")
    seen = [{**line, "seen": prompt.text} for line, prompt in zip(lines, prompts)]
    seen = tiny.write_records(tmp_path / "seen.jsonl", seen)
    given, form = ("--checkpoint_path", folder), tiny.ROOT / "training/graders.py:format_reward"
    result = grade(f"{tmp_path}/g.py:same", seen, out, *given)
    assert result.code == 0 and [line["grade"] for line in tiny.read_lines(out)] == [1, 1, 1], result.stderr
    for name, flags, wanted in (("with", given, [1, 1, 0]), ("without", (), [0, 1, 0])):
        assert grade(form, data, tmp_path / name, *flags).code == 0
        assert [line["grade"] for line in tiny.read_lines(tmp_path / name)] == wanted
    assert grade(form, data, tmp_path / "with", *given, "--resume").code == 0
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert grade(form, data, tmp_path / "cloned", *given).code == 0
    (folder / "model.safetensors").unlink()
    assert grade(form, data, tmp_path / "laptop", *given).code == 0
    (folder / CHECKSUMS).write_text(json.dumps({"files": {"tokenizer_config.json": "0" * 64}, "weights": {}}))
    result = grade(form, data, tmp_path / "damaged", *given)
    tiny.assert_refused(result, f"{folder / 'tokenizer_config.json'}: is damaged or was edited")


def test_a_kill_then_resume(file, tmp_path):
    """Catches lines held back until the end, workers that outlive a killed run, and a resume with another grader."""
    records = [{"prompt": "ab", "grade": None, "completion": str(i)} for i in range(60)]  # a null counts as missing
    data, out = tiny.write_records(tmp_path / "data.jsonl", records), tmp_path / "out.jsonl"
    flags = ["--grader", f"{file}:slow", "--data_file", data, "--output_file", out, "--reward_workers", 1]
    process = Forked(SCRIPT, *flags)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert 3 < out.read_bytes().count(b"\n") < 60
    (tmp_path / "graders.py").write_text(GRADERS + "# changed\n")
    tiny.assert_refused(
        grade(f"{file}:slow", data, out, "--resume"), "--grader: other content than the run was begun with;"
    )
    (tmp_path / "graders.py").write_text(GRADERS)
    assert grade(f"{file}:slow", data, out, "--resume").code == 0
    assert tiny.read_lines(out) == [{**record, "grade": 1} for record in records]


GOOD = '{"prompt": "a", "completion": "b", "n": 1}\n'
BAD = {  # name: (content of the data file, flags, what the message names)
    "no source": (GOOD, ("--grader", None), ("--checkpoint_path", "--grader")),
    "no folder": (GOOD, ("--checkpoint_path", "nowhere"), ("nowhere",)),
    "best of n": (GOOD, ("--best_of_n",), ("--best_of_n does nothing beside a --grader",)),
    "quantize": (GOOD, ("--quantize", "int8"), ("--quantize int8 does nothing beside a --grader",)),
    "overlong": (GOOD, ("--overlong", "skip"), ("--overlong skip does nothing beside a --grader",)),
    "dtype": (GOOD, ("--dtype", "bfloat16"), ("--dtype bfloat16 does nothing beside a --grader",)),
    "compile": (GOOD, ("--no-compile",), ("--no-compile does nothing beside a --grader",)),
    "device": (GOOD, ("--device", "cpu"), ("--device cpu does nothing beside a --grader",)),
    "no file": (GOOD, ("--grader", "nowhere.py:one"), ("--grader nowhere.py:one", "no file")),
    "no name": (GOOD, ("--grader", "graders.py"), ("must be FILE.py:NAME",)),
    "parameters": (GOOD, ("--grader", "TMP/graders.py:two"), ("must take (prompts,", "(prompt, completion, example)")),
    "too few samples": (GOOD * 3, ("--pass_at", "2", "4"), ("data.jsonl:1: --pass_at 4 needs", "has 3")),
    "pass at 0": (GOOD, ("--pass_at", "0"), ("--pass_at", ">= 1")),
    "timeout": (GOOD, ("--reward_timeout", "0"), ("--reward_timeout", "> 0")),
    "graded already": (GOOD + '{"prompt": "a", "completion": "b", "grade": 1}\n', (), ("data.jsonl:2", "'grade'")),
    "no completion": (GOOD + '{"prompt": "a"}\n', (), ("data.jsonl:2", "'completion'")),
    "prompt of a wrong type": ('{"prompt": 5, "completion": "b"}\n', (), ("data.jsonl:1", "prompt", "a number")),
    "steps": ('{"prompt": "a", "completions": ["b"]}\n', (), ("data.jsonl:1", "'completion'")),
    "empty": ("", (), ("data.jsonl", "no records")),
    "batch raises": ('{"prompt": "a", "completion": 5}\n', (), ("data.jsonl:1", "completion", "number")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, file, tmp_path):
    """Catches bad input that is noticed only after grading, or answered with a traceback."""
    content, flags, parts = BAD[case]
    (tmp_path / "data.jsonl").write_text(content)
    given = {"--grader": [f"{file}:one"], "--data_file": [tmp_path / "data.jsonl"]}
    given |= {"--output_file": [tmp_path / "new/out.jsonl"]}
    if flags:
        given[flags[0]] = [str(value).replace("TMP", str(tmp_path)) for value in flags[1:] if value is not None]
    words = [word for name, values in given.items() if values != [] or name != "--grader" for word in (name, *values)]
    tiny.assert_refused(tiny.run(SCRIPT, *words), *parts)
    assert not (tmp_path / "new").exists()


def test_what_needs_a_grader(tmp_path):
    """Catches a pass@k made up of a reward model's scores, and a --reward_timeout that has no effect."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    flags = ("--checkpoint_path", "rm", "--data_file", tmp_path / "data.jsonl", "--output_file", tmp_path / "o.jsonl")
    tiny.assert_refused(tiny.run(SCRIPT, *flags, "--pass_at", 1), "--pass_at needs a --grader")
    tiny.assert_refused(tiny.run(SCRIPT, *flags, "--reward_timeout", 3), "--reward_timeout 3.0 does nothing without a")


def test_a_rank_that_comes_late(tmp_path, monkeypatch):
    """Catches a late rank that takes the file begun by rank 0 for another run's, and ends the run."""
    data, out = tiny.write_records(tmp_path / "d.jsonl", samples([1])), tmp_path / "out.jsonl"
    out.write_text("begun")
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert grade(MATH, data, out).code == 0 and out.read_text() == "begun"
    monkeypatch.setenv("RANK", "0")
    tiny.assert_refused(grade(MATH, data, out), "out.jsonl")
