"""scripts/toy_report.py: the table that the quickstart ends with."""

import json
import shutil

import pytest

from tests import tiny


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The quickstart's folder with planted answers: 1 of 4 right by SFT, 2 by DPO, 3 by PPO, 4 by GRPO."""
    out = tmp_path_factory.mktemp("toy") / "world"
    sizes = ("--num_train", 10, "--num_heldout", 20, "--num_prompts", 10)
    assert tiny.run("scripts/toy.py", "--output_dir", out, *sizes).code == 0
    shutil.copytree(out / "model", out / "sft")
    drawn = out / "drawn.jsonl"
    flags = ("--num_samples", 4, "--max_new_tokens", 8, "--batch_size", 16, "--return_token_ids")
    flags = ("--checkpoint_path", out / "sft", "--prompt_file", out / "heldout.jsonl", "--output_file", drawn, *flags)
    result = tiny.run("inference/generate.py", *flags)
    assert result.code == 0, result.stderr
    lines = sorted(map(json.loads, drawn.read_text().splitlines()), key=lambda line: (line["idx"], line["sample_idx"]))
    for stage, num_right, kl in (("sft", 1, 0.0), ("dpo", 2, 0.5), ("ppo", 3, 2.0), ("grpo", 4, 1.0)):
        judged = [
            {
                **line,
                "output": line["answer"] if line["sample_idx"] < num_right else "0",
                "logprob": line["logprob"] + kl,
                "reward": num_right + line["sample_idx"],
            }
            for line in lines
        ]
        write(out / f"samples/{stage}.scored.jsonl", judged)
        write(out / f"samples/{stage}.greedy.jsonl", [line for line in judged if line["sample_idx"] == num_right % 4])
    likely = list(map(json.loads, (out / "samples/sft.greedy.jsonl").read_text().splitlines()))
    longest = max(likely, key=lambda line: len(line["prompt"]))  # SFT gets this one right
    write(
        out / "samples/sft.greedy.jsonl",
        [line | ({"output": line["answer"]} if line is longest else {}) for line in likely],
    )
    write(out / "samples/model.greedy.jsonl", [{**line, "output": "?"} for line in lines if line["sample_idx"] == 0])
    write(out / "samples/sft.best.jsonl", [{**line, "output": line["answer"], "reward": 9} for line in lines[::4]])
    write(out / "rm/metrics.jsonl", [{"step": 1, "loss": 1.0}, {"step": 2, "eval_accuracy": 0.875}])
    write(
        out / "seconds.jsonl",
        [{"stage": s, "seconds": 30} for s in ("model", "sft", "rm", "best", "dpo", "ppo", "grpo")],
    )
    return out


def test_the_table(world):
    """Catches a column of another stage, gains over the wrong stage, a KL with the wrong sign, of other tokens or
    without the EOS (the samples are the reference's own, their log-probs raised by 0, 0.5, 2 and 1 nats), and a problem
    that SFT gets right shown as one that it gets wrong."""
    output = world / "REPORT.md"
    result = tiny.run("scripts/toy_report.py", world, "--output_file", output, "--picture", "curves.png")
    assert result.code == 0, result.stderr
    text = output.read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == [
        ["random weights", "0.0 %", "", "", "", "0.5"],
        ["SFT", "5.0 %", "25.0 %", "2.5", "0.0", "0.5"],
        ["best of 4 SFT samples by the reward model", "", "100.0 %", "9.0", "", "0.5"],
        ["DPO", "0.0 %", "50.0 %", "3.5", "0.5", "0.5"],
        ["PPO, learned reward", "0.0 %", "75.0 %", "4.5", "2.0", "0.5"],
        ["GRPO, checked reward", "100.0 %", "100.0 %", "5.5", "1.0", "0.5"],
    ]
    problem = text.partition("```\n")[2].splitlines()
    assert problem[0].split()[0] == "problem" and [line.split()[0] for line in problem[1:5]] == [
        "sft",
        "dpo",
        "ppo",
        "grpo",
    ]
    assert problem[1].endswith("(wrong)") and problem[4].endswith("(right)")
    assert (
        "best of n 75.0, DPO 25.0, PPO 50.0, GRPO 75.0" in text and "87.5 %" in text and "![curves](curves.png)" in text
    )


def test_several_seeds(world, tmp_path):
    """Catches a spread that is not the sample's standard deviation, and a seed's folder that is left out."""
    other = tmp_path / "other"
    shutil.copytree(world, other)
    scored = other / "samples/ppo.scored.jsonl"
    write(scored, [{**json.loads(line), "output": "0"} for line in scored.read_text().splitlines()])
    result = tiny.run("scripts/toy_report.py", world, other, "--output_file", tmp_path / "REPORT.md")
    assert result.code == 0, result.stderr
    assert "PPO 12.5 ± 53.0" in result.stdout and "| 37.5 ± 53.0 % |" in result.stdout and "2 seeds" in result.stdout


def test_no_problem_is_wrong(world, tmp_path):
    """Catches a report that shows a problem as one that SFT gets wrong where it gets none wrong."""
    other = tmp_path / "other"
    shutil.copytree(world, other)
    greedy = other / "samples/sft.greedy.jsonl"
    lines = list(map(json.loads, greedy.read_text().splitlines()))
    write(greedy, [line | {"output": line["answer"]} for line in lines])
    result = tiny.run("scripts/toy_report.py", other, "--output_file", tmp_path / "REPORT.md")
    assert "SFT gets none wrong" in result.stdout and "that SFT gets wrong" not in result.stdout, result


def test_missing_stage(world, tmp_path):
    """Catches a traceback, or a table with holes, where a stage has not run."""
    other = tmp_path / "other"
    shutil.copytree(world, other)
    (other / "samples/ppo.scored.jsonl").unlink()
    result = tiny.run("scripts/toy_report.py", other, "--output_file", tmp_path / "REPORT.md")
    assert result.code == 2 and "ppo.scored.jsonl" in result.stderr and not (tmp_path / "REPORT.md").exists()
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1
