"""inference/score.py after kills and with --resume: the output of an uninterrupted run, or a refusal."""

import json
import random
import shutil
import time

import pytest

from tests import tiny
from tests.forked import Forked
from tests.inference.test_score import SCRIPT, edit_config, rm, score, scored, write_reward_model  # noqa: F401 (a fixture)


def ragged(count):
    return [{"prompt": f"{i} plus", "completion": "so it " * (i * 7 % 19), "idx": i} for i in range(count)]


def test_two_kills_then_resume_equals_an_uninterrupted_run(rm, tmp_path):
    """Catches records that are lost, doubled, torn, out of order, or scored otherwise than in an uninterrupted run."""
    folder = tmp_path / "model"
    write_reward_model(folder, num_hidden_layers=8)  # slow enough to be killed midway
    data = tiny.write_records(tmp_path / "data.jsonl", ragged(120))
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    rng, seen = random.Random(), 0  # unseeded: kills at other moments in each run, and none may matter
    command = ("--checkpoint_path", folder, "--data_file", data, "--output_file", out, "--batch_size", 1, "--resume")
    for _ in range(2):
        process = Forked(SCRIPT, *command)
        wanted, deadline = seen + rng.randint(1, 40), time.monotonic() + 60
        while (not out.exists() or out.read_bytes().count(b"\n") < wanted) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.kill()
        _, stderr = process.communicate()
        assert process.returncode == -9, f"ended before it was killed: {stderr}"
        before, seen = seen, out.read_bytes().count(b"\n")
        assert before < seen < 120, "the kill lands inside the run"
    result = tiny.run(SCRIPT, *command)
    assert result.code == 0 and f"{seen} done before" in result.stdout, result
    assert score(folder, data, whole, "--batch_size", 1).code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert [line["idx"] for line in tiny.read_lines(out)] == list(range(120))


def test_a_torn_line_and_another_batch_size(rm, tmp_path):
    """Catches a torn line that is kept or joined to the next one, and a resume that needs the first run's windows."""
    data, out = tiny.write_records(tmp_path / "data.jsonl", ragged(40)), tmp_path / "out.jsonl"
    assert score(rm, data, out, "--batch_size", 1).code == 0
    wanted = out.read_bytes().splitlines(keepends=True)
    for kept in (b"".join(wanted[:7]) + wanted[7][:25], wanted[0][:-1], b"".join(wanted[:33]), b"".join(wanted)):
        out.write_bytes(kept)
        result = score(rm, data, out, "--batch_size", 2, "--resume")
        assert result.code == 0, result
        lines = tiny.read_lines(out)
        assert [line["idx"] for line in lines] == list(range(40))
        for line, want in zip(lines, map(json.loads, wanted)):
            assert line["reward"] == pytest.approx(want["reward"], abs=1e-4)
    assert out.read_bytes() == b"".join(wanted)  # nothing was left to do


def test_resume_with_something_else_is_refused(rm, tmp_path):
    """Catches an output file that mixes scores of different records, models or flags, and a refusal only
    after the records were read."""
    data, out = tiny.write_records(tmp_path / "data.jsonl", ragged(4)), tmp_path / "out.jsonl"
    assert score(rm, data, out).code == 0
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:2]))
    before = out.read_bytes()
    (other := tmp_path / "other.jsonl").write_text("{")
    copy = shutil.copytree(rm, tmp_path / "copy")
    edit_config(copy, reward_mean=0.0, reward_std=1.0)
    tiny.assert_refused(score(rm, other, out, "--resume"), str(out), "--data_file: other content")
    tiny.assert_refused(score(copy, data, out, "--resume"), "--checkpoint_path: other content")
    tiny.assert_refused(score(copy, data, out, "--resume", "--normalize"), "normalize")
    tiny.assert_refused(score(rm, data, out, "--resume", "--dtype", "bfloat16"), "dtype")
    tiny.assert_refused(score(rm, data, out, "--resume", "--max_seq_len", 200), "max_seq_len")
    tiny.assert_refused(score(rm, data, out, "--resume", "--best_of_n"), str(out), "was not begun with --best_of_n")
    tiny.assert_refused(score(rm, other, out), "--output_file", "--resume")
    assert out.read_bytes() == before
    (tmp_path / "out.jsonl.args.json").unlink()
    tiny.assert_refused(score(rm, data, out, "--resume"), "out.jsonl.args.json", "missing")


def test_a_resume_whose_records_have_moved_is_refused(rm, tmp_path):
    """Catches records that are scored twice or never, since an accepted change has moved them to other places."""
    records = ragged(6)
    records[1]["completion"] *= 40
    records[2] |= {"note": float("nan"), "reward": None}  # a null counts as missing
    data, out = tiny.write_records(tmp_path / "data.jsonl", records), tmp_path / "out.jsonl"
    limit, accept = ("--max_seq_len", 64), ("--resume", "--accept_changed", "overlong", "data_file")
    assert score(rm, data, out, *limit, "--overlong", "skip").code == 0
    assert [line["idx"] for line in tiny.read_lines(out)] == [0, 2, 3, 4, 5]
    out.write_bytes(begun := b"".join(out.read_bytes().splitlines(keepends=True)[:3]))
    truncated = score(rm, data, out, *limit, "--overlong", "truncate", *accept)
    tiny.assert_refused(truncated, f"{out}:2: is not of the record at its place, {data}:2")
    tiny.write_records(data, records[:3])
    tiny.assert_refused(score(rm, data, out, *limit, "--overlong", "skip", *accept), f"{out}:3: this run has 2 records")
    assert out.read_bytes() == begun
    tiny.write_records(data, [*records, *records[2:3]])
    assert score(rm, data, out, *limit, "--overlong", "skip", *accept).code == 0
    assert [line["idx"] for line in tiny.read_lines(out)] == [0, 2, 3, 4, 5, 2]


def test_resume_without_a_file_starts_from_the_beginning(rm, tmp_path):
    """Catches a job killed before its first line that cannot be restarted with the same command."""
    lines = scored(rm, tmp_path, ragged(3), "--resume", name="new/deep/out.jsonl")
    assert len(lines) == 3
