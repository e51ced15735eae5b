"""scripts/torture.py: a small round of kills, and planted differences that its comparison must report."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.torture import JOBS, compare_lines, differences, read_lines
from tests.forked import Forked


@pytest.fixture(scope="module")
def tortured(tmp_path_factory):
    """The output folder of two jobs killed a few times, with their uninterrupted runs, and the printed output."""
    out = tmp_path_factory.mktemp("torture") / "out"
    flags = ["--kills", "4", "--ranks", "1", "--jobs", "sft", "generate", "--output_dir", out, "--keep"]
    done = Forked("scripts/torture.py", *flags)
    printed, errors = done.communicate(timeout=300)
    assert done.returncode == 0, printed[-2000:] + errors[-2000:]
    return out, printed


def test_a_round(tortured):
    """Catches a kill that is not counted or not resumed, a table that differs from what happened or lacks a job, and a
    trainer or generate.py whose results differ after a kill."""
    out, printed = tortured
    text = (out / "torture.md").read_text()
    assert "All runs came out equal." in text and text in printed
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| sft", "| generate"))]
    kills = re.findall(r"^kill (\d) of 4: (\w+) on 1, (\w+)$", printed, re.MULTILINE)
    assert [number for number, _, _ in kills] == ["1", "2", "3", "4"] and "4 SIGKILLs" in text
    head = next(line for line in text.splitlines() if line.startswith("| job")).strip("| ").split(" | ")
    table = [dict(zip(head, cells, strict=True)) for cells in rows]
    runs = Counter(re.findall(r"^(\w+)-1-\d: equal$", printed, re.MULTILINE))
    assert runs and {row["job"]: int(row["runs"]) for row in table} == runs
    for row in table:
        for phase in ("start", "step", "save", "export", "rollout"):
            assert int(row[f"in {phase}"] or 0) == sum(each[1:] == (row["job"], phase) for each in kills)
        killed = sum(job == row["job"] for _, job, _ in kills)
        assert int(row["resumed"]) == killed + int(row["full disk"] or 0)  # after each of them
        assert (row["ranks"], row["on another layout"], row["equal"]) == ("1", "0", row["runs"])


def test_differences_are_seen(tortured, tmp_path):
    """Catches a comparison that overlooks a difference: one weight in its last bit, a step twice or lost, another loss,
    and a sample lost, doubled or changed."""
    out, _ = tortured
    whole, copy = out / "sft-1-whole", tmp_path / "copy"
    shutil.copytree(whole, copy)
    assert differences(JOBS["sft"], copy, whole, 0.0) == []
    path = copy / "step-000004/model.safetensors"
    weights = load_file(path)
    one = next(iter(weights.values())).view(-1)
    one[0] = torch.nextafter(one[0], torch.tensor(9.0))
    save_file(weights, path)
    assert "step-000004/model.safetensors: " in differences(JOBS["sft"], copy, whole, 0.0)[0]
    assert differences(JOBS["sft"], copy, whole, 1e-4) == []
    one[0] += 5e-4 * one.norm()  # as much as bf16 parameters may differ by on another layout, and only there
    save_file(weights, path)
    assert differences(JOBS["dpo"], copy, whole, 1e-4) == []
    assert all(differences(JOBS[job], copy, whole, bound) for job, bound in (("sft", 1e-4), ("dpo", 0.0)))

    lines = read_lines(whole / "metrics.jsonl")
    assert compare_lines(lines, lines, 0.0) == []
    assert compare_lines([{**lines[0], "tokens_per_second": 1.0}, *lines[1:]], lines, 0.0) == []
    assert compare_lines(lines[1:], lines, 0.0) == ["1 lines lost, 0 doubled or foreign"]
    assert compare_lines([*lines, lines[-1]], lines, 0.0) == ["0 lines lost, 1 doubled or foreign"]
    assert "loss is" in compare_lines([{**lines[0], "loss": lines[0]["loss"] + 1e-6}, *lines[1:]], lines, 0.0)[0]
    assert compare_lines([{**lines[0], "eval_loss": 1.0}, *lines[1:]], lines, 0.0)[0].endswith(
        "eval_loss on one side alone"
    )
    samples = read_lines(out / "generate-1-whole/lines.jsonl")
    assert compare_lines(samples[::-1], samples, 0.0) == []
    assert compare_lines([{**samples[0], "output": "x"}, *samples[1:]], samples, 0.0)[0].endswith(
        f"output is 'x', not {samples[0]['output']!r}"
    )
    assert compare_lines([{**samples[0], "idx": 99}, *samples[1:]], samples, 0.0) == [
        "1 lines lost, 1 doubled or foreign"
    ]
    assert json.loads((whole / "args.json").read_text())["save_steps"] == 1
