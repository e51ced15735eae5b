"""Writes REPORT.md: the results of quickstart.sh's stages as one table; with several seeds, mean and deviation.

Computes the KL to the fine-tuned model, and reads the rest from these files of each world folder:

    samples/STAGE.greedy.jsonl     the greedy answer to every held-out problem
    samples/STAGE.scored.jsonl     answers sampled at temperature 1, with the reward model's rewards and token_ids
    samples/sft.best.jsonl         the best of the fine-tuned model's samples for each problem
    rm/metrics.jsonl               eval_accuracy: share of held-out pairs in the right order
    seconds.jsonl                  {"stage": ..., "seconds": ...}

    python scripts/toy_report.py runs/toy runs/toy-1 --output_file runs/toy/REPORT.md
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]
from models.batches import collate
from models.checkpoint import load_model
from models.common import flag
from models.files import naming_file
from models.functions import load_function
from models.model import Transformer
from models.records import IGNORE_INDEX, Example, Record, get_field, read_records
from models.script import run_script
from models.tokenizer import Tokenizer
from training.losses import sequence_logps, token_logps

STAGES = {
    "model": "random weights",
    "sft": "SFT",
    "best": "best of {n} SFT samples by the reward model",
    "dpo": "DPO",
    "ppo": "PPO, learned reward",
    "grpo": "GRPO, checked reward",
}
ROWS_PER_FORWARD = 256
correct = load_function("toy_report", f"{Path(__file__).with_name('toy.py')}:correct")


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Writes a report with the results of the quickstart's stages as one table."""

    worlds: list[Path] = flag(help="folders that quickstart.sh wrote, one for each seed", positional=True)
    output_file: Path = flag(Path("runs/toy/REPORT.md"), help="Markdown file to write")
    picture: str | None = flag(None, help="PNG to show in the report, as a path relative to the report's folder")


def verdicts(lines: list[Record]) -> list[float]:
    """Returns 1.0 for each of generate.py's lines with a right answer, else 0.0."""
    columns = ([get_field(line, name) for line in lines] for name in ("prompt", "output"))
    return correct(*columns, [line.fields for line in lines])


def accuracy(path: Path) -> float:
    """Percentage of right answers in a file of generate.py's lines."""
    return 100 * statistics.fmean(verdicts(read_records(path)))


@torch.no_grad()
def mean_kl(path: Path, reference: Transformer, tokenizer: Tokenizer) -> float:
    """Estimates KL(policy || reference) per answer, in nats: the mean of log policy - log reference over its samples.

    path: lines of generate.py at temperature 1 with `logprob` and `token_ids`.
    """
    lines = read_records(path)
    rows = []
    for line in lines:
        prompt, answer = tokenizer.encode(get_field(line, "prompt")), list(get_field(line, "token_ids"))
        answer += [tokenizer.eos_token_id] if line.fields["finish_reason"] == "stop" else []
        rows.append(Example([*prompt, *answer], [IGNORE_INDEX] * len(prompt) + answer))
    total = 0.0
    for i in range(0, len(rows), ROWS_PER_FORWARD):
        batch = collate(rows[i : i + ROWS_PER_FORWARD], tokenizer.pad_token_id, torch.device("cpu"))
        logps, _ = token_logps(reference(batch.input_ids), reference.lm_head.weight, batch.labels)
        total -= sequence_logps(logps, batch.labels)[0].double().sum().item()
    return (total + sum(get_field(line, "logprob") for line in lines)) / len(lines)


def measure(world: Path) -> dict[str, dict[str, float]]:
    """Returns {stage: {column: value}} of one world."""
    samples, reference, tokenizer = world / "samples", load_model(world / "sft"), Tokenizer(world / "sft")
    found = {"model": {"greedy": accuracy(samples / "model.greedy.jsonl")}}
    for stage in ("sft", "dpo", "ppo", "grpo"):
        sampled = samples / f"{stage}.scored.jsonl"
        found[stage] = {
            "greedy": accuracy(samples / f"{stage}.greedy.jsonl"),
            "sampled": accuracy(sampled),
            "reward": statistics.fmean(get_field(line, "reward") for line in read_records(sampled)),
            "kl": mean_kl(sampled, reference, tokenizer),
        }
    best = samples / "sft.best.jsonl"
    found["best"] = {
        "sampled": accuracy(best),
        "reward": statistics.fmean(get_field(line, "reward") for line in read_records(best)),
    }
    found["rm"] = {"pairs": 100 * get_field(read_records(world / "rm/metrics.jsonl")[-1], "eval_accuracy")}
    for line in read_records(world / "seconds.jsonl"):
        stage = found.setdefault(get_field(line, "stage"), {})
        stage["minutes"] = stage.get("minutes", 0.0) + get_field(line, "seconds") / 60
    return found


def spread(values: list[float | None], unit: str = "") -> str:
    """Formats one value as it is, several as mean ± standard deviation; "" if one was not measured."""
    if None in values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{round(statistics.fmean(values), 1) + 0.0:.1f}{deviation}{unit}"  # + 0.0: not -0.0


def report(worlds: list[Path], found: list[dict[str, dict[str, float]]], picture: str | None) -> str:
    each = lambda stage, column: [f[stage].get(column) for f in found]  # noqa: E731
    means = ": mean ± standard deviation" if len(worlds) > 1 else ""
    num_samples = len(read_records(worlds[0] / "samples/sft.scored.jsonl"))
    num_problems = len(read_records(worlds[0] / "samples/sft.best.jsonl"))
    text = [
        "# The toy, stage by stage",
        "",
        f"{num_problems} held-out problems, {len(worlds)} seed{'s' * (len(worlds) > 1)}{means}.",
        "",
        "| stage | most likely answer right | sampled answer right | reward | KL to SFT, nats | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for stage, name in STAGES.items():
        cells = [spread(each(stage, "greedy"), " %"), spread(each(stage, "sampled"), " %")]
        cells += [spread(each(stage, column)) for column in ("reward", "kl", "minutes")]
        text.append(f"| {name.format(n=num_samples // num_problems)} | {' | '.join(cells)} |")
    gains = []
    for stage, name in (("best", "best of n"), ("dpo", "DPO"), ("ppo", "PPO"), ("grpo", "GRPO")):
        more = [f[stage]["sampled"] - f["sft"]["sampled"] for f in found]
        gains.append(f"{name} {spread(more)}")
    text += [
        "",
        f"Percentage points above one sample of the fine-tuned model: {', '.join(gains)}. The reward model puts "
        f"{spread(each('rm', 'pairs'), ' %')} of the held-out pairs in the right order and took "
        f"{spread(each('rm', 'minutes'))} minutes, drawing its samples included. Samples are drawn at temperature 1; "
        "rewards are the reward model's, with mean 0 and deviation 1 on its held-out pairs; KL is per answer.",
        "",
    ]
    answers = {
        stage: read_records(worlds[0] / f"samples/{stage}.greedy.jsonl") for stage in ("sft", "dpo", "ppo", "grpo")
    }
    verdict = dict(zip((get_field(line, "prompt") for line in answers["sft"]), verdicts(answers["sft"])))
    prompt = min(verdict, key=lambda prompt: (verdict[prompt], -len(prompt)))
    which = " (SFT gets none wrong)" if verdict[prompt] else " that SFT gets wrong"
    text += [
        f"A problem{which}, with the most likely answer after each stage:",
        "",
        "```",
        f"{'problem':8s}{prompt.strip()}",
    ]
    for stage, lines in answers.items():
        line = next(line for line in lines if get_field(line, "prompt") == prompt)
        answer, right = "; ".join(get_field(line, "output").split()), verdicts([line])[0]
        text.append(f"{stage:8s}{answer} ({'right' if right else 'wrong'})")
    text += ["```", *(["", f"![curves]({picture})"] if picture else []), ""]
    return "\n".join(text)


def main(args: ReportArgs) -> None:
    text = report(args.worlds, [measure(world) for world in args.worlds], args.picture)
    with naming_file(args.output_file):
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        args.output_file.write_text(text, encoding="utf-8")
    print(f"{text}\n{args.output_file}: written")


if __name__ == "__main__":
    run_script(main, ReportArgs)
