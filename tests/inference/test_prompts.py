"""inference/prompts.py: a large file's prompts, read as slots get free. The oracle tokenises all prompts first."""

import pytest

from inference import generate as generate_script
from inference import prompts
from models import record_files
from models.tokenizer import Tokenizer
from tests import tiny
from tests.inference.test_generate import generate, keys


@pytest.fixture
def large(monkeypatch):
    """Every file counts as large, has several parts, and only its two longest prompts are tokenised first."""
    monkeypatch.setattr(prompts, "BIG_FILE", 1)
    monkeypatch.setattr(prompts, "NUM_LONGEST", 2)
    monkeypatch.setattr(record_files, "CHUNK_BYTES", 400)


def ragged(count):
    """Prompts: the longest in bytes (words of one token each) are not the longest in tokens (one for each byte)."""
    return [{"prompt": "answer " * 9 if i % 5 == 0 else "#" * (3 + i % 40), "output": i} for i in range(count)]


def run(folder, tmp_path, name, *flags, records=None):
    path = tiny.write_records(tmp_path / "p.jsonl", records or ragged(50))
    out = tmp_path / name
    result = generate(folder, "--prompt_file", path, "--output_file", out, "--num_samples", 2, *flags)
    lines = tiny.read_lines(out) if out.exists() else None
    for line in lines or ():
        line["logprob"] = round(line["logprob"], 3)  # another number of rows may round the last bit otherwise
    return result, None if lines is None else sorted(map(str, lines))


@pytest.mark.parametrize("overlong", ["refuse", "skip", "truncate"])
def test_a_large_file_gives_the_same_lines(overlong, folder, tmp_path, large, monkeypatch):
    """Catches prompts read one by one that are lost, answered twice or numbered otherwise; samples that change since
    not all lengths are known; skipped and truncated prompts that are not counted, or counted as work; a resume that
    draws anew; and other prompts than the longest tokenised first, from which the cache is planned."""
    known, plan_cache = [], generate_script.plan_cache

    def plan(*args, **sizes):
        known.append(sizes["known_tokens"])
        return plan_cache(*args, **sizes)

    monkeypatch.setattr(generate_script, "plan_cache", plan)
    flags = ["--overlong", overlong] + ([] if overlong == "refuse" else ["--max_seq_len", 40])
    result, lines = run(folder, tmp_path, "large", *flags)
    assert result.code == 0, result
    assert known == [len(Tokenizer(folder).encode(ragged(1)[0]["prompt"])) + 8]
    begun = (tmp_path / "large").read_bytes().splitlines(keepends=True)
    (tmp_path / "large").write_bytes(b"".join(begun[:31]) + begun[31][:9])
    resumed, after = run(folder, tmp_path, "large", *flags, "--resume")
    assert resumed.code == 0 and "31 done before" in resumed.stdout and after == lines
    monkeypatch.undo()
    small, wanted = run(folder, tmp_path, "small", *flags)
    assert small.code == 0 and lines == wanted and len(set(keys(tiny.read_lines(tmp_path / "large")))) == len(lines)
    assert f"{len(lines)} samples to draw" in small.stdout
    for part in ("prompts skipped as too long", "prompts truncated", "kept as reference_output"):
        count = [line for line in small.stdout.splitlines() if part in line]
        assert bool(count) == (part in result.stdout), part
    wanted_note = {"refuse": "kept as", "skip": "skipped as too long", "truncate": "truncated"}[overlong]
    assert wanted_note in result.stdout


def test_what_is_wrong_is_found_first_or_in_its_turn(folder, tmp_path, large):
    """Catches an output begun before a broken line far down the file is noticed, and a prompt without room that is
    skipped silently, or whose error loses the finished lines."""
    records = ragged(50)
    unread = {"prompt": "a", "history": [["b", "c"]]}
    as_text = {"prompt": ' [{"role": "user", "content": "a"}]'}
    wrong = [
        ({"prompt": 5}, "prompt must be text"),
        ({"prompt": "a\ud800"}, "lone surrogates"),
        (unread, '"history" is not read'),
        (as_text, "messages as text"),
    ]
    for broken, why in wrong:
        records[47] = broken
        result, lines = run(folder, tmp_path, "a", records=records)
        tiny.assert_refused(result, "p.jsonl:48: ", why)
        assert lines is None
    result, lines = run(folder, tmp_path, "b", "--max_seq_len", 39, "--batch_size", 1)
    assert result.code == 2 and lines
    assert "p.jsonl:35: the prompt has 39 tokens, which leaves no room in 39;" in result.stderr.splitlines()[-1]
    more = ("--overlong", "skip", "--resume", "--accept_changed", "overlong")
    result, after = run(folder, tmp_path, "b", "--max_seq_len", 39, *more)
    assert result.code == 0 and set(lines) < set(after)
