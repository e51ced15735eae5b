"""Adds scores of a reward model, or grades of a function that checks answers, to records: records in, the same records
with their rewards out, in the same order.

- outcome models (of training/train_rm.py --loss pairwise or pointwise, or any ForSequenceClassification of Llama, Qwen2
  or Qwen3 with one label) give one score, at the last token of BOS + prompt + completion + EOS; process models give one
  at the end of each step. Training encodes the same token ids, with models/records.py and models/reward.py
- windows of records are sorted by length, so that there is little padding, and written once they are scored; after a
  kill, --resume continues after the last whole line
- --best_of_n and --weighted_vote choose one sample of each prompt after all samples are scored
- --grader runs no model: inference/grading.py

    python inference/score.py --checkpoint_path RM --data_file samples.jsonl --output_file scored.jsonl
    python inference/score.py --checkpoint_path RM --data_file samples.jsonl --output_file best.jsonl --best_of_n
    python inference/score.py --grader training/graders.py:math_answer --data_file samples.jsonl \\
        --output_file graded.jsonl --pass_at 1 8
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

import torch

from inference.choosing import answer_of, choose_best, choose_by_vote, final_answer
from inference.grading import grade_file
from inference.lines import (
    LineWriter,
    all_scored,
    begin,
    day_of,
    day_told,
    lines_of,
    refuse_occupied,
    with_room_for,
    write_lines,
)
from models.adapters import AdapterArgs, weight_files
from models.batches import Split
from models.checkpoint import Folder, ModelArgs, open_folder
from models.common import (
    Runtime,
    Stopwatch,
    at_least_one,
    card,
    choose_runtime,
    flag,
    is_main_rank,
    on_main,
    peak_memory,
    progress_bar,
    refuse_idle,
    say,
)
from models.config import ModelConfig
from models.decode import load_for_inference
from models.fsdp import data_parallel_size, init_mesh, parallel_of, start_ranks
from models.functions import FunctionPlace, load_function, undisturbed
from models.gpu import mean_length, peaks
from models.identity import AcceptArgs, check_ranks_agree
from models.quantize import QuantizeArgs, check_runnable, choose_scheme
from models.records import Encoder, EncodingCounts, Record, folder_limits, naming, require, tokenising
from models.reward import (
    RewardKind,
    Scored,
    cut_completion,
    cut_steps,
    distinct,
    encode_to_score,
    read_reward_kind,
    sigmoid,
    step_scores,
)
from models.reward import aggregate as aggregate_steps
from models.script import run_script
from models.tp import TensorParallelArgs
from models.workers import GradingArgs

WINDOW = 16  # number of batches that are sorted by length together; a kill loses at most one window
ADDED_FIELDS = ("reward", "step_rewards", "chosen_reward", "rejected_reward", "voted_answer", "votes")


@dataclass(frozen=True, kw_only=True)
class ScoreArgs(ModelArgs, AdapterArgs, QuantizeArgs, TensorParallelArgs, GradingArgs, AcceptArgs):
    """Adds the rewards of a reward model, or the grades of a function, to records."""

    checkpoint_path: Path | None = None
    grader: FunctionPlace | None = flag(
        None,
        help="FILE.py:NAME of a function (prompt, completion, example) -> number that grades the answers, in place of "
        "a reward model; for instance training/graders.py:math_answer. Beside it, --checkpoint_path is the model that "
        "answered, whose chat template renders the prompts",
    )
    pass_at: list[int] | None = flag(
        None,
        bounds=at_least_one,
        help="with --grader: values of k for pass@k, the probability that at least one of k samples of a prompt has a "
        "grade of at least 1",
        may_change=True,
    )

    data_file: Path = flag(
        help="JSON or JSONL records: prompt + completion; lines of generate.py (an output cut at the token limit gets "
        "no EOS); prompt + chosen + rejected; for process models also prompt + completions, a list of steps. Adds "
        "reward (to pairs chosen_reward and rejected_reward; with a process model step_rewards, as logits)"
    )
    output_file: Path = flag(
        help="JSONL file for the records, in the order of --data_file", may_change=True, written=True
    )
    resume: bool = flag(False, help="score the records that --output_file does not have yet", may_change=True)
    batch_size: int = flag(16, bounds=at_least_one, help="rows per forward pass on each dp rank", may_change=True)
    max_seq_len: int | None = flag(None, bounds=at_least_one, help="most tokens of a row; default: the model's context")
    overlong: str = flag("refuse", choices=("refuse", "skip", "truncate"), help="what to do with longer records")
    normalize: bool = flag(False, help="write (score - reward_mean) / reward_std, with both from config.json")
    aggregate: str | None = flag(
        None,
        choices=("min", "prod", "last", "mean"),
        help="process models: also write reward, aggregated from the steps' probabilities, sigmoid(step_rewards)",
    )
    best_of_n: bool = flag(
        False,
        help="keep only the sample with the highest reward of each prompt (same prompt, and same idx where "
        "records have one); all scored samples go to OUTPUT.scored.jsonl beside --output_file OUTPUT.jsonl",
        may_change=True,
    )
    weighted_vote: bool = flag(
        False,
        help="keep the best sample of each prompt's winning answer: samples vote for their answer with sigmoid(reward) "
        "or the --aggregate of their steps; adds voted_answer and votes; all samples go to OUTPUT.scored.jsonl",
        may_change=True,
    )
    answer_fn: FunctionPlace | None = flag(
        None,
        help="with --weighted_vote: FILE.py:NAME of a function from a completion's text to its final answer (str, "
        "or None if it has none); default: the last \\boxed{} that is not empty, else the last line that is not blank",
        may_change=True,
    )

    @property
    def choosing(self) -> bool:
        return self.best_of_n or self.weighted_vote

    @property
    def scored_file(self) -> Path:
        """The file for all scored records, chosen or not."""
        return all_scored(self.output_file) if self.choosing else self.output_file


@torch.inference_mode()
def main(args: ScoreArgs) -> None:
    check_flags(args)
    dp_size = data_parallel_size(args.tensor_parallel_size)  # raises if it does not divide the ranks
    if args.grader is not None:
        if is_main_rank():
            grade_file(args)
        return
    runtime = choose_runtime(args)
    start_ranks(runtime.device)
    today = on_main(lambda: day_of(args))
    folder = open_folder(args.checkpoint_path, args.max_seq_len, args.tensor_parallel_size, frozen=True, today=today)
    if folder.tokenizer.chat_template is not None:
        folder.tokenizer.chat_template.ignore_unread()
    scheme = choose_scheme(args.checkpoint_path, args.quantize, args.group_size, tp_size=args.tensor_parallel_size)
    resolved = replace(
        args,
        chat_date=today.isoformat(),
        max_seq_len=folder.max_seq_len,
        dtype=str(runtime.dtype),
        quantize=None if scheme is None else str(scheme),
    )
    begun = on_main(lambda: begin_outputs(resolved))
    check_ranks_agree(resolved, begun)  # before collectives that depend on flags
    files = weight_files(args.checkpoint_path, args.adapter_path)
    kind = read_reward_kind(args.checkpoint_path, files)
    check_kind(args, kind)
    check_runnable(files, folder.config, scheme, runtime, args.tensor_parallel_size, head="score")
    find_answer = final_answer
    if args.answer_fn is not None:
        with undisturbed():
            find_answer = undisturbed()(load_function("--answer_fn", args.answer_fn))
    items, counts = encode_items(folder, kind, args)
    answers = [answer_of(item.record, kind.separator, find_answer) for item in items] if args.weighted_vote else []
    needed = ("reward",) if args.choosing else ()
    records = [item.record for item in items]
    lines = on_main(lambda: lines_of(records, args.scored_file, needed)) if args.resume else []
    num_done = len(lines)
    # Windows are counted from the beginning of the file, so a record has the same neighbours after a resume.
    size = WINDOW * args.batch_size * dp_size
    first = num_done - num_done % size if num_done < len(items) else len(items)

    mesh = init_mesh(runtime.device, args.tensor_parallel_size)
    scores = "one for each record" if kind.separator is None else f"one for each step, ended by {kind.separator!r}"
    rows = {
        "model": f"{folder.path}, {num_weights(folder.config) / 1e6:,.1f} M parameters"
        + (f", {scheme}" if scheme else ""),
        "device": runtime,
        "ranks": f"dp {mesh['dp'].size()} x tp {mesh['tp'].size()}",
        "scores": scores,
        **day_told(today, folder.tokenizer.chat_template),
        "work": f"{len(items) - num_done:,} records to score{counts}" + f"; {num_done:,} done before" * bool(num_done),
    }
    say(card("score", rows))
    model = None
    if first < len(items):
        tp = parallel_of(mesh).tp
        model = load_for_inference(args.checkpoint_path, runtime, tp=tp, head="score", scheme=scheme, files=files)
        for block in model.layers if runtime.compile else ():
            block.compile(dynamic=True)  # blocks share compiled code; that of a whole model would grow with its layers
    split = Split(args.batch_size, mesh["dp"], folder.pad_token_id)
    num_tokens = sum(len(row.input_ids) for item in items[first:] for row in item.rows)
    computed = []  # lengths
    clock = Stopwatch(runtime.device)
    with (
        LineWriter(args.scored_file, begun, is_main_rank(), num_done) as writer,
        progress_bar(total=num_tokens, desc="scoring", unit="tok", unit_scale=True) as bar,
    ):
        for start in range(first, len(items), size):
            window = items[start : start + size]
            rows = [row for item in window for row in item.rows]
            scores = iter(step_scores(model, rows, split, bar, taken=True))
            computed += [len(row.input_ids) for row in distinct(rows)[0]]
            for i, item in enumerate(window, start=start):
                line = line_of(item, [next(scores) for _ in item.rows], kind, args)
                if i >= num_done:
                    writer.write(line)
                    lines.append(line)
    speed = speed_of(folder.config, runtime, mesh.size(), computed, num_tokens, clock.lap())

    chosen = lines
    if args.best_of_n:
        chosen = choose_best(lines)
    elif args.weighted_vote:
        chosen = choose_by_vote(lines, answers, weight=sigmoid if kind.separator is None else float)
    if args.choosing and is_main_rank():
        write_lines(args.output_file, chosen)
    say(card("done", {"records": f"{len(lines):,}", **speed, **summary(lines)}))
    if args.choosing:
        prompts = f"{len(chosen):,}, {len(lines) / len(chosen):.1f} samples each"
        say(card("chosen", {"prompts": prompts, **summary(chosen)}))


def check_flags(args: ScoreArgs) -> None:
    """Raises ValueError unless a model or a function gives the scores, only its own flags are set, and no two flags
    contradict each other."""
    if args.checkpoint_path is None and args.grader is None:
        raise ValueError("give a --checkpoint_path, a reward model, or a --grader, a function")
    if args.grader is None and args.pass_at is not None:
        raise ValueError("--pass_at needs a --grader: a reward model's score is neither right nor wrong")
    if args.grader is None:
        refuse_idle(args, "without a --grader", "reward_workers", "reward_timeout", "reward_memory")
    else:
        scores = ("normalize", "aggregate", "best_of_n", "weighted_vote", "answer_fn", "adapter_path", "quantize")
        limits = ("group_size", "batch_size", "max_seq_len", "overlong")
        of_model = ("device", "dtype", "compile", "tensor_parallel_size")
        refuse_idle(args, "beside a --grader, which gives grades and runs no model", *scores, *limits, *of_model)
    if args.accept_changed and not args.resume:
        raise ValueError("--accept_changed is for a run that goes on with --resume")
    if args.best_of_n and args.weighted_vote:
        raise ValueError("give either --best_of_n or --weighted_vote")
    if args.answer_fn is not None and not args.weighted_vote:
        raise ValueError("--answer_fn is for --weighted_vote")


def begin_outputs(args: ScoreArgs) -> dict:
    """Returns what the file of scores is begun with (inference.lines.begin). Raises ValueError if the file of chosen
    samples already exists, or on resume if it was begun without a choice of samples."""
    if args.choosing and not args.resume:
        refuse_occupied(args.output_file)
    if args.resume and args.output_file.exists() and not args.scored_file.exists():
        raise ValueError(f"{args.output_file}: was not begun with --best_of_n or --weighted_vote; name another file")
    return begin(args.scored_file, args)


def check_kind(args: ScoreArgs, kind: RewardKind) -> None:
    """Raises ValueError for flags that do not suit this kind of reward model."""
    process, path = kind.separator is not None, args.checkpoint_path
    if args.aggregate is not None and not process:
        raise ValueError(f"--aggregate {args.aggregate}: {path} is not a process model, it gives one score anyway")
    if args.choosing and process and args.aggregate is None:
        raise ValueError("--best_of_n and --weighted_vote need one reward for each sample; choose an --aggregate")
    if args.normalize and process:
        raise ValueError("--normalize: a process model's scores of steps are logits, which are not normalised")
    if args.normalize and not kind.can_normalize():
        raise ValueError(f"--normalize: {path / 'config.json'} has no reward_mean and positive reward_std")


class Item(NamedTuple):
    record: Record
    rows: list[Scored]  # one row, or two for a pair: chosen and rejected

    @property
    def sequences(self) -> list[Sequence[int]]:
        return [row.input_ids for row in self.rows]


def encode_items(folder: Folder, kind: RewardKind, args: ScoreArgs) -> tuple[list[Item], EncodingCounts]:
    """Encodes the records to rows. Returns (items, without skipped records; counts of what happened while encoding)."""
    limit, pad = folder.max_seq_len, kind.pad_token_id
    shorten = partial(cut_completion, pad_token_id=pad) if kind.separator is None else cut_steps

    def encode(record: Record) -> tuple[Item, EncodingCounts]:
        record = with_room_for(ADDED_FIELDS, record)
        with naming(record):
            rows, happened = encode_to_score(record, kind.separator, folder.tokenizer, pad)
            require(len(rows) == 1 or not args.choosing, "is a pair; --best_of_n and --weighted_vote need samples")
        return Item(record, rows), happened

    def cut(item: Item) -> Item | None:
        rows = [shorten(row, limit) if len(row.input_ids) > limit else row for row in item.rows]
        return None if None in rows else Item(item.record, rows)

    encoder = Encoder(encode, cut, folder_limits(folder, args.overlong))
    items, counts = [], EncodingCounts()
    for record in tokenising(args.data_file):
        item, happened = encoder.row_of(record)
        items += [item] if item is not None else []
        counts = counts.plus(happened)
    if not items:
        raise ValueError(f"all {counts.skipped} records are too long for {limit} tokens")
    return items, counts


def line_of(item: Item, scores: list[list[float]], kind: RewardKind, args: ScoreArgs) -> dict[str, object]:
    """Returns the record with its rewards added. scores: a list for each row; ValueError if one is not finite."""
    with naming(item.record):
        for score in chain(*scores):
            require(math.isfinite(score), f"the score is {score}; are the weights damaged?")
    if kind.separator is not None:
        added = {"step_rewards": scores[0]}
        if args.aggregate is not None:
            added["reward"] = aggregate_steps(scores[0], args.aggregate)
    else:
        names = ("reward",) if len(item.rows) == 1 else ("chosen_reward", "rejected_reward")
        rewards = [(score - kind.mean) / kind.std if args.normalize else score for [score] in scores]
        added = dict(zip(names, rewards))
    return {**item.record.fields, **added}


def num_weights(config: ModelConfig) -> int:
    """Number of parameters of the model with a scalar head in place of the language model's head."""
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return config.num_parameters() - head + config.hidden_size


def speed_of(
    config: ModelConfig, runtime: Runtime, num_ranks: int, computed: list[int], num_tokens: int, seconds: float
) -> dict[str, str]:
    """Rows of the card: tokens/s without padding, and MFU (a third of training's FLOPs, over the datasheet's peak),
    where that peak is known. computed: the lengths of the rows that the model computed: equal ones once in a window."""
    if not num_tokens:
        return {}
    rows = {
        "speed": f"{num_tokens / seconds:,.1f} tok/s",
        "memory": f"{peak_memory(runtime.device) / 1e9:,.2f} GB peak",
    }
    peak = peaks(runtime.device)
    if peak:
        flops = config.training_flops_per_token(mean_length(computed), logits=0.0) / 3 * sum(computed)
        rows["speed"] += f", MFU {flops / seconds / peak[0] / num_ranks:.1%}"
    return rows


def summary(lines: list[dict]) -> dict[str, str]:
    """Rows of the card: mean, spread and range of each reward, and how often chosen has a higher one than rejected."""
    rows = {}
    for name in ("reward", "step_rewards", "chosen_reward", "rejected_reward"):
        values = [line[name] for line in lines if name in line]
        values = list(chain(*values)) if name == "step_rewards" else values
        if values:
            x = torch.tensor(values, dtype=torch.float64)
            spread = x.std(correction=0)
            rows[name] = f"mean {x.mean():.4f}, std {spread:.4f}, min {x.min():.4f}, max {x.max():.4f}"
    won = [line["chosen_reward"] > line["rejected_reward"] for line in lines if "chosen_reward" in line]
    if won:
        rows["accuracy"] = f"{sum(won) / len(won):.1%} of {len(won):,} pairs"
    return rows


if __name__ == "__main__":
    run_script(main, ScoreArgs)
