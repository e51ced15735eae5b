"""Scores from a reward model: records in, the same records with their rewards out, in the same order.

- outcome models (training/train_rm.py --loss pairwise or pointwise, or any LlamaForSequenceClassification with one
  label) give one number, at the last token of BOS + prompt + completion + EOS; process models give one at the end of
  each step. The ids are those of training: training/preferences.py makes both
- a window of records is sorted by length, so that little is padded, and written once it is scored; after a kill,
  --resume goes on behind the last whole line
- --best_of_n and --weighted_vote choose among the samples of a prompt once all are scored

    python inference/score.py --checkpoint_path RM --data_file samples.jsonl --output_file scored.jsonl
    python inference/score.py --checkpoint_path RM --data_file samples.jsonl --output_file best.jsonl --best_of_n
"""

import hashlib
import json
import math
import sys
from itertools import chain
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from models.decode import load_for_inference
from models.fsdp import data_parallel_size, init_mesh, parallel_of
from models.model import ModelConfig
from models.qlinear import Scheme
from models.quantize import choose_scheme
from models.tokenizer import Tokenizer
from models.tp import is_main_rank
from training.choosing import answer_of, choose_best, choose_by_vote, final_answer, sigmoid
from training.common import (
    ArgumentParser,
    Runtime,
    Stopwatch,
    add_model_arguments,
    add_quantize_arguments,
    card,
    choose_runtime,
    device_name,
    open_folder,
    pad_id,
    peak_memory,
    peaks,
    positive_int,
    progress_bar,
    run_script,
    say,
    training_flops_per_token,
)
from training.data import Record, check_ids, naming, read_records, require
from training.lines import LineWriter, read_begun, refuse_occupied, write_lines
from training.preferences import Scored, cut_completion, cut_steps, encode_to_score
from training.rewards import RewardKind, load_function, read_reward_kind, step_scores
from training.rewards import aggregate as aggregate_steps

WINDOW = 16  # batches that are sorted by length together; what a kill loses at most
ADDED_FIELDS = ("reward", "step_rewards", "chosen_reward", "rejected_reward", "voted_answer", "votes")


def parser() -> ArgumentParser:
    parser = ArgumentParser("Adds the rewards of a reward model to records, in batches.")
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--data_file",
        type=Path,
        required=True,
        help="JSON or JSONL records: prompt + completion; generate.py's lines (no EOS follows an output that ended for "
        "its length); prompt + chosen + rejected; for process models also prompt + completions, a list of steps. Lines "
        "get a reward (pairs: chosen_reward, rejected_reward), of process models step_rewards, logits",
    )
    add("--output_file", type=Path, required=True, help="JSONL file for the records, in the order of --data_file")
    add("--resume", action="store_true", help="go on with the records that --output_file does not have yet")
    add("--batch_size", type=positive_int, default=16, help="rows per forward, on each dp rank")
    add("--max_seq_len", type=positive_int, default=None, help="longest row in tokens; the model's context")
    add("--overlong", choices=["refuse", "skip", "truncate"], default="refuse", help="what to do with longer records")
    add("--normalize", action="store_true", help="(score - reward_mean) / reward_std, both from config.json")
    add(
        "--aggregate",
        choices=["min", "prod", "last", "mean"],
        default=None,
        help="process models: also write reward, from the steps' probabilities, the sigmoids of step_rewards",
    )
    add(
        "--best_of_n",
        action="store_true",
        help="keep only the sample with the highest reward of each prompt (idx, where records have one); all of them "
        "go to OUTPUT.scored.jsonl beside --output_file OUTPUT.jsonl",
    )
    add(
        "--weighted_vote",
        action="store_true",
        help="keep one sample of each prompt: the best of those with the answer for which the sum of sigmoid(reward), "
        "or of the aggregated reward of steps, is highest; adds voted_answer and votes; all go beside as above",
    )
    add(
        "--answer_fn",
        default=None,
        help="FILE.py:NAME, a function from a completion's text to its final answer, a string, or None for no answer; "
        "the last \\boxed{}, else the last line that is not blank",
    )
    add_quantize_arguments(parser)
    add(
        "--tensor_parallel_size",
        type=positive_int,
        default=1,
        help="ranks that share the model, adjacent under torchrun",
    )
    return parser


@torch.inference_mode()
def main(
    *,
    checkpoint_path: Path,
    device: str | None,
    dtype: str | None,
    seed: int,  # nothing here is random
    compile: bool | None,
    data_file: Path,
    output_file: Path,
    resume: bool,
    batch_size: int,
    max_seq_len: int | None,
    overlong: str,
    normalize: bool,
    aggregate: str | None,
    best_of_n: bool,
    weighted_vote: bool,
    answer_fn: str | None,
    quantize: str,
    group_size: int | None,
    tensor_parallel_size: int,
) -> None:
    dp_size = data_parallel_size(tensor_parallel_size)  # raises if it does not divide the ranks
    if best_of_n and weighted_vote:
        raise ValueError("give either --best_of_n or --weighted_vote")
    if answer_fn is not None and not weighted_vote:
        raise ValueError("--answer_fn is for --weighted_vote")
    choosing = best_of_n or weighted_vote
    scored_file = output_file.with_name(f"{output_file.stem}.scored{output_file.suffix}") if choosing else output_file
    for path in {output_file, scored_file} if not resume else ():
        refuse_occupied(path)
    if resume and output_file.exists() and not scored_file.exists():
        raise ValueError(f"{output_file}: was not begun with --best_of_n or --weighted_vote, so it is left alone")

    runtime = choose_runtime(device, dtype, compile)
    config, tokenizer, limit = open_folder(checkpoint_path, max_seq_len, tensor_parallel_size, frozen=True)
    scheme = choose_scheme(checkpoint_path, quantize, group_size)
    kind = read_reward_kind(checkpoint_path)
    check_flags(kind, checkpoint_path, normalize=normalize, aggregate=aggregate, choosing=choosing)
    find_answer = load_function("--answer_fn", answer_fn) if answer_fn is not None else final_answer
    records = read_records(data_file)
    items, notes = encode_items(records, tokenizer, config.vocab_size, kind.separator, limit=limit, overlong=overlong)
    if choosing:
        for item in items:
            require(len(item.rows) == 1, f"{item.record.where}: a pair, and not one of several samples to choose from")
    answers = [answer_of(item.record, kind.separator, find_answer) for item in items] if weighted_vote else []
    begun_with = {
        "checkpoint_path": str(checkpoint_path.resolve()),
        "data": hashlib.sha256(json.dumps([record.fields for record in records]).encode()).hexdigest(),
        "max_seq_len": limit,
        "overlong": overlong,
        "normalize": normalize,
        "aggregate": aggregate,
        "dtype": str(runtime.dtype),
        "quantize": None if scheme is None else str(scheme),
    }
    lines = read_begun(scored_file, begun_with, "score.py") if resume else []
    num_done = len(lines)
    # Windows are counted from the beginning of the file: a record meets the same neighbours after a resume.
    size = WINDOW * batch_size * dp_size
    first = num_done - num_done % size if num_done < len(items) else len(items)

    mesh = init_mesh(runtime.device, tensor_parallel_size)  # all ranks have looked at the files by now
    say(start_card(checkpoint_path, config, scheme, kind, runtime, mesh, len(items), num_done, notes))
    if first < len(items):
        model = load_for_inference(
            checkpoint_path,
            device=runtime.device,
            dtype=runtime.dtype,
            compile=runtime.compile,
            tp=parallel_of(mesh).tp,
            head="score",
            scheme=scheme,
        )
        if runtime.compile:
            model.compile(dynamic=True)
    padding = pad_id(tokenizer, config)
    num_tokens = sum(len(row.input_ids) for item in items[first:] for row in item.rows)
    clock = Stopwatch(runtime.device)
    with (
        LineWriter(scored_file, begun_with, active=is_main_rank()) as writer,
        progress_bar(total=num_tokens, desc="scoring", unit="tok", unit_scale=True) as bar,
    ):
        for start in range(first, len(items), size):
            window = items[start : start + size]
            rows = [row for item in window for row in item.rows]
            options = {"micro_batch_size": batch_size, "pad_token_id": padding, "dp": mesh["dp"], "bar": bar}
            scores = iter(step_scores(model, rows, **options))
            for i, item in enumerate(window, start=start):
                line = line_of(item, [next(scores) for _ in item.rows], kind, normalize=normalize, aggregate=aggregate)
                if i >= num_done:
                    writer.write(line)
                    lines.append(line)
    speed = speed_of(config, runtime.device, mesh.size(), items[first:], num_tokens, clock.lap())

    chosen = lines
    if best_of_n:
        chosen = choose_best(lines)
    elif weighted_vote:
        chosen = choose_by_vote(lines, answers, weight=sigmoid if kind.separator is None else float)
    if choosing and is_main_rank():
        write_lines(output_file, chosen)
    say(card("done", {"records": f"{len(lines):,}", **speed, **summary(lines)}))
    if choosing:
        prompts = f"{len(chosen):,}, {len(lines) / len(chosen):.1f} samples each"
        say(card("chosen", {"prompts": prompts, **summary(chosen)}))


# ------------------------------------------------------------------------------------------ the model


def check_flags(kind: RewardKind, folder: Path, *, normalize: bool, aggregate: str | None, choosing: bool) -> None:
    """Raises ValueError for flags that this kind of model does not go with."""
    process = kind.separator is not None
    if aggregate is not None and not process:
        raise ValueError(f"--aggregate {aggregate}: {folder} is not a process model, it gives one score as it is")
    if choosing and process and aggregate is None:
        raise ValueError("--best_of_n and --weighted_vote need one reward for each sample; choose --aggregate")
    if normalize and process:
        raise ValueError("--normalize: the scores of steps are logits of probabilities and stay as they are")
    if normalize and not kind.can_normalize():
        raise ValueError(f"--normalize: {folder / 'config.json'} has no reward_mean and positive reward_std")


# ---------------------------------------------------------------------------------------- the records


class Item(NamedTuple):
    record: Record
    rows: list[Scored]  # one; of a pair two, chosen and rejected


def encode_items(
    records: list[Record],
    tokenizer: Tokenizer,
    vocab_size: int,
    separator: str | None,
    *,
    limit: int,
    overlong: str,
) -> tuple[list[Item], list[str]]:
    """(records with their rows, remarks for the card). separator: what ends a step, None for an outcome model."""
    items, skipped, truncated = [], 0, 0
    cut = cut_completion if separator is None else cut_steps
    for record in tqdm(records, desc="tokenising", unit="record", delay=1, leave=False, disable=not is_main_rank()):
        with naming(record):
            rows = encode_to_score(record, separator, tokenizer)
            for name in ADDED_FIELDS:
                require(name not in record.fields, f"has a field {name!r} already, which this run would add; rename it")
        for row in rows:
            check_ids(row.input_ids, vocab_size, record.where)
        longest = max(len(row.input_ids) for row in rows)
        if longest > limit:
            if overlong == "refuse":
                raise ValueError(
                    f"{record.where}: {longest} tokens, the limit is {limit}; raise --max_seq_len or choose --overlong "
                    "skip or truncate"
                )
            rows = [cut(row, limit) if len(row.input_ids) > limit else row for row in rows]
            if overlong == "skip" or None in rows:
                skipped += 1
                continue
            truncated += 1
        items.append(Item(record, rows))
    if not items:
        raise ValueError(f"all {skipped} records are too long for {limit} tokens")
    remarks = ((skipped, "records skipped as too long"), (truncated, "records truncated"))
    return items, [f"{count} {what}" for count, what in remarks if count]


def line_of(
    item: Item, scores: list[list[float]], kind: RewardKind, *, normalize: bool, aggregate: str | None
) -> dict[str, object]:
    """The record with its rewards. scores: those of each row."""
    with naming(item.record):
        for score in chain(*scores):
            require(math.isfinite(score), f"the score is {score}; are the weights whole?")
    if kind.separator is not None:
        added = {"step_rewards": scores[0]}
        if aggregate is not None:
            added["reward"] = aggregate_steps(scores[0], aggregate)
    else:
        names = ("reward",) if len(item.rows) == 1 else ("chosen_reward", "rejected_reward")
        rewards = [(score - kind.mean) / kind.std if normalize else score for [score] in scores]
        added = dict(zip(names, rewards))
    return item.record.fields | added


# --------------------------------------------------------------------------------- what people see


def start_card(
    path: Path,
    config: ModelConfig,
    scheme: Scheme | None,
    kind: RewardKind,
    runtime: Runtime,
    mesh: DeviceMesh,
    num_items: int,
    num_done: int,
    notes: list[str],
) -> str:
    scores = "one for each record" if kind.separator is None else f"one for each step, ended by {kind.separator!r}"
    rows = {
        "model": f"{path}, {num_weights(config) / 1e6:,.1f} M parameters" + (f", {scheme}" if scheme else ""),
        "device": f"{device_name(runtime.device)}, {str(runtime.dtype).removeprefix('torch.')}"
        + (", compiled" if runtime.compile else ""),
        "ranks": f"dp {mesh['dp'].size()} x tp {mesh['tp'].size()}",
        "scores": scores,
        "work": f"{num_items - num_done:,} records to score" + (f", {num_done:,} done before" * bool(num_done)),
    }
    return card("score", rows | ({"note": "; ".join(notes)} if notes else {}))


def num_weights(config: ModelConfig) -> int:
    """Number of parameters of the model with a scalar head in the place of the language model's."""
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return config.num_parameters() - head + config.hidden_size


def speed_of(
    config: ModelConfig, device: torch.device, num_ranks: int, items: list[Item], num_tokens: int, seconds: float
) -> dict[str, str]:
    """Rows of the card: tokens/s without padding, and MFU: a third of training's FLOPs, less the language model's
    head, over the peak of the datasheet, where that is known."""
    if not num_tokens:
        return {}
    rate = num_tokens / seconds
    rows = {"speed": f"{rate:,.1f} tok/s", "memory": f"{peak_memory(device) / 1e9:,.2f} GB peak"}
    peak = peaks(device)
    if peak:
        mean_length = num_tokens / sum(len(item.rows) for item in items)
        head = 2 * config.vocab_size * config.hidden_size
        flops = training_flops_per_token(config, mean_length) / 3 - head
        rows["speed"] += f", MFU {rate * flops / peak[0] / num_ranks:.1%}"
    return rows


def summary(lines: list[dict]) -> dict[str, str]:
    """Mean, spread and range of each reward, and how often the chosen one of a pair has the higher one."""
    rows = {}
    for name in ("reward", "step_rewards", "chosen_reward", "rejected_reward"):
        found = [line[name] for line in lines if name in line]
        values = list(chain(*found)) if name == "step_rewards" else found
        if values:
            x = torch.tensor(values, dtype=torch.float64)
            spread = x.std(correction=0)
            rows[name] = f"mean {x.mean():.4f}, std {spread:.4f}, min {x.min():.4f}, max {x.max():.4f}"
    won = [line["chosen_reward"] > line["rejected_reward"] for line in lines if "chosen_reward" in line]
    if won:
        rows["accuracy"] = f"{sum(won) / len(won):.1%} of {len(won):,} pairs"
    return rows


if __name__ == "__main__":
    run_script(main, parser())
