"""scripts/plot_metrics.py: what it reads, what it draws, and what it refuses."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from scripts import plot_metrics
from tests import tiny


def write_run(folder, lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    ours = [
        {"step": i, "loss": 2.0 / i, "grad_norm": float("nan") if i == 2 else 1.0, "time/x": 3} for i in range(1, 5)
    ]
    return write_run(tmp_path / "a", ours), write_run(tmp_path / "b", [{"step": 7, "objective/kl": 0.5}])


def test_read_and_smooth(runs):
    """Catches a value at another step, a NaN that empties a panel, a torn last line that hides the others, and a
    smoothing window that looks ahead."""
    series = plot_metrics.read_metrics(runs[0])
    assert series["loss"] == [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)]
    assert [step for step, _ in series["grad_norm"]] == [1, 3, 4]
    with open(runs[1] / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "objec')  # torn, as by a full disk
    assert plot_metrics.read_metrics(runs[1] / "metrics.jsonl") == {"objective/kl": [(7, 0.5)]}
    assert plot_metrics.smoothed([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]


def test_picture(runs, tmp_path):
    """Catches a file that is no picture, a picture without a trainer's main metrics, and timings drawn unasked."""
    out = tmp_path / "new" / "curves.png"
    result = tiny.run("scripts/plot_metrics.py", *runs, "--output_file", out, "--window", 2)
    assert result.code == 0 and out.read_bytes().startswith(b"\x89PNG")
    assert result.stdout.strip().endswith("curves.png: loss, objective/kl, grad_norm")
    lines = [{"step": i, "loss": 0.0, "reward": 0.1 * i, "eval_pass@1": 0.2, "step_accuracy": 0.5} for i in range(3)]
    result = tiny.run("scripts/plot_metrics.py", write_run(tmp_path / "c", lines), "--output_file", out)
    assert result.stdout.strip().endswith("curves.png: loss, step_accuracy, reward, eval_pass@1")
    result = tiny.run("scripts/plot_metrics.py", runs[0], "--metrics", "time/x", "--output_file", out)
    assert result.stdout.strip().endswith("curves.png: time/x")


@pytest.fixture
def legend(monkeypatch):
    """(names in the legend of the last picture, its left and right end as shares of the picture's width)"""
    drawn, real = [], Figure.legend

    def draw(figure, *args, **options):
        made = real(figure, *args, **options)
        extent = made.get_window_extent()
        ends = extent.x0 / figure.bbox.width, extent.x1 / figure.bbox.width
        drawn[:] = [text.get_text().strip() for text in made.get_texts()], ends

    monkeypatch.setattr(Figure, "legend", draw)
    return drawn


def test_names_that_mean_something_to_matplotlib(tmp_path, legend):
    """Catches a run that the legend leaves out, and a picture that fails since a name is taken for a formula."""
    runs = [write_run(tmp_path / name, [{"step": 1, "loss": 1.0, r"$\no$": 2.0}]) for name in ("_old", r"a$\no$")]
    metrics = ("--metrics", "loss", r"$\no$")
    result = tiny.run("scripts/plot_metrics.py", *runs, *metrics, "--output_file", tmp_path / "curves.png")
    assert result.code == 0, result.stderr
    assert legend[0] == ["_old", r"a$\no$"]


def test_many_runs(tmp_path, legend):
    """Catches a legend that is wider than the picture."""
    runs = [write_run(tmp_path / f"llama-8b-lr-1e-{i}-{'x' * i}", [{"step": 1, "loss": 1.0}]) for i in range(12)]
    assert tiny.run("scripts/plot_metrics.py", *runs, "--output_file", tmp_path / "curves.png").code == 0
    names, (left, right) = legend
    assert names == [run.name for run in runs] and 0 <= left < right <= 1


def test_runs_that_have_not_logged(runs, tmp_path, legend):
    """Catches a picture of several runs that fails, or is wrong, because one of them has just begun."""
    early, begun = write_run(tmp_path / "early", []), tmp_path / "begun"
    begun.mkdir()
    (begun / "args.json").write_text("{}")
    result = tiny.run("scripts/plot_metrics.py", early, *runs, begun, "--output_file", tmp_path / "curves.png")
    assert result.code == 0 and legend[0] == ["a", "b"], result.stderr
    assert result.stderr.splitlines() == [f"{run}: holds no metrics yet, and is left out" for run in (early, begun)]


def test_refusals(runs, tmp_path):
    """Catches tracebacks, and messages that do not say what is wrong."""
    out = ("--output_file", tmp_path / "x.png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    write_run(tmp_path / "early", [])
    for args, word in (
        ((tmp_path / "none", *out), "none"),
        ((tmp_path / "bad", *out), "metrics.jsonl:2"),
        ((tmp_path / "early", *out), f"{tmp_path / 'early'}: holds no metrics"),
        ((runs[0], "--metrics", "loss", "lost", *out), "lost"),
        ((runs[0], "--output_file", tmp_path / "x.pdf"), "x.pdf"),
        ((runs[0], "--window", 0, *out), "--window"),
    ):
        tiny.assert_refused(tiny.run("scripts/plot_metrics.py", *args), word)
    assert not (tmp_path / "x.png").exists()


def test_runs_of_one_name_have_labels_of_their_own(tmp_path, monkeypatch):
    """Catches a legend in which two runs have one label, since their folders or their files have the same name."""
    monkeypatch.chdir(tmp_path)
    runs = [Path("a/ppo"), tmp_path / "b/ppo/metrics.jsonl"]
    assert plot_metrics.labels_of(runs) == ["a/ppo", "b/ppo"]
    assert plot_metrics.labels_of([*runs[:1], Path("c/metrics.jsonl"), Path("c")]) == ["ppo", "c", "c"]
    assert plot_metrics.labels_of([Path("x.jsonl"), Path("y.jsonl")]) == ["x.jsonl", "y.jsonl"]
