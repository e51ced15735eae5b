"""Draws the metrics.jsonl of runs as one PNG: a panel for each metric, a line for each run.

python scripts/plot_metrics.py runs/toy/sft runs/toy/ppo --output_file curves.png
python scripts/plot_metrics.py runs/toy/ppo --metrics objective/scores objective/kl --output_file ppo.png
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]
from models.common import at_least_one, flag
from models.files import naming_file
from models.script import run_script
from training.metrics import logged

# Metrics drawn by default: those that show how well a run went, without its clock and counters.
SHOWN = (
    *("loss", "eval_loss", "accuracy", "eval_accuracy", "step_accuracy", "eval_step_accuracy", "eval_auc"),
    *("rewards/accuracies", "eval_rewards/accuracies", "rewards/margins", "eval_rewards/margins"),
    *("objective/scores", "eval_objective/scores", "reward", "eval_reward", "eval_pass@1"),
    *("objective/kl", "kl", "objective/entropy", "entropy", "completions/mean_length"),
    *("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "grad_norm", "learning_rate"),
)


def read_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns {metric: [(step, value), ...]} of a run directory or a metrics.jsonl; its last line may be torn, after a
    kill or on a full disk. {} for a run that has not logged yet. Raises FileNotFoundError, or ValueError that names the
    line."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    begun = path.name == "metrics.jsonl" and path.with_name("args.json").is_file()
    if not path.is_file() and not begun:
        raise FileNotFoundError(f"{path}: no such file")
    series: dict[str, list[tuple[int, float]]] = {}
    for line, _ in logged(path):
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, []).append((line["step"], float(value)))
    return series


def labels_of(runs: list[Path]) -> list[str]:
    """Returns each run's name in the legend: that of its folder, or of a file not called metrics.jsonl; equal names get
    as many parent folders as tell them apart."""
    places = [(run.parent if run.name == "metrics.jsonl" else run).resolve() for run in runs]
    names = [[Path(*place.parts[-n:]).as_posix() for place in places] for n in range(1, 20)]
    names = next((few for few in names if len(set(few)) == len(set(places))), names[-1])
    return [f" {name}" if name.startswith("_") else name for name in names]  # matplotlib hides labels that begin with _


def smoothed(values: list[float], window: int) -> list[float]:
    """Means of each value and the window - 1 values before it."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / (min(i + 1, window)) for i in range(len(values))]


@dataclass(frozen=True, kw_only=True)
class PlotArgs:
    """Draws the metrics of runs as a PNG."""

    runs: list[Path] = flag(help="run directories, or metrics.jsonl files", positional=True)
    output_file: Path = flag(Path("curves.png"), help="picture to write")
    metrics: list[str] | None = flag(None, help="metrics to draw; default: losses, rewards, accuracies and the like")
    window: int = flag(1, bounds=at_least_one, help="steps of the running mean to draw; single values are drawn pale")


def main(args: PlotArgs) -> None:
    runs, output_file, metrics, window = args.runs, args.output_file, args.metrics, args.window
    try:
        import matplotlib
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    matplotlib.rcParams["text.parse_math"] = False  # a name with two $ is no formula
    from matplotlib import pyplot

    if output_file.suffix.lower() != ".png":
        raise ValueError(f"--output_file {output_file}: must end in .png")
    found = [(run, read_metrics(run)) for run in runs]
    if not any(curves for _, curves in found):
        raise ValueError(f"{runs[0]}: holds no metrics")
    for run in (run for run, curves in found if not curves):
        print(f"{run}: holds no metrics yet, and is left out", file=sys.stderr)
    runs, series = zip(*((run, curves) for run, curves in found if curves))
    labels = labels_of(runs)
    known = {name for curves in series for name in curves}
    for name in metrics or ():
        if name not in known:
            raise ValueError(f"--metrics {name}: no run has it; there are {', '.join(sorted(known))}")
    drawn = metrics or [name for name in SHOWN if name in known]
    if not drawn:
        raise ValueError(f"{runs[0]}: no metric to draw by default; choose with --metrics: {', '.join(sorted(known))}")
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    in_a_line = max(1, int(4.2 * columns / (0.7 + 0.09 * max(map(len, labels)))))  # names, by width in inches
    legend = 0.25 * -(-len(set(labels)) // in_a_line)
    height = 2.8 * rows + 0.35 + legend  # inches; the 0.35 for the label of the x-axes
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, height), squeeze=False)
    for axis, name in zip(axes.flat, drawn):
        for i, (label, curves) in enumerate(zip(labels, series)):
            if name in curves:
                steps, values = zip(*curves[name])
                style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}
                style["marker"] = "." if len(steps) < 12 else None
                if window > 1:
                    axis.plot(steps, values, alpha=0.25, **style)
                axis.plot(steps, smoothed(values, window), label=label, **style)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    if len(runs) > 1:
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=in_a_line, frameon=False)
    figure.supxlabel("step", fontsize=9, y=(0.1 + legend) / height)
    figure.tight_layout(rect=(0, (legend - 0.05) / height, 1, 1))  # tight_layout leaves room for supxlabel itself
    with naming_file(output_file):
        output_file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output_file, dpi=120, bbox_inches="tight")  # includes a name that is wider than the panels
    pyplot.close(figure)
    print(f"{output_file}: {', '.join(drawn)}")


if __name__ == "__main__":
    run_script(main, PlotArgs)
