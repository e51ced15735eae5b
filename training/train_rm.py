"""Reward model training: a scalar score for each answer, or for each step of an answer, from preference data or labels.

- pairwise: the chosen answer scores higher than the rejected one (Bradley-Terry); pointwise: the score is the logit of
  the answer's label; process: the score at the end of each step is the logit of the step's label
- the score is read at the last non-padding token (process: the last token of each step and its separator), in fp32
- a language model's folder gets a new score head; a reward model's folder continues with its own
- the loss of a training step is the mean over all its pairs (answers, answer steps), whatever the micro-batch size
- the export loads as transformers' AutoModelForSequenceClassification; its config.json says how to read the score

    python training/train_rm.py --checkpoint_path DIR --train_file pairs.jsonl --output_dir runs/rm
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

import torch
from torch import Tensor

from models.adapters import SCORE
from models.batches import Split
from models.checkpoint import Folder, has_score_head, open_folder
from models.common import card, flag, non_negative, refuse_idle, say, with_newlines
from models.dropout import new_dropout
from models.export import scalar_head_files
from models.forward import forward_rows
from models.fsdp import (
    ParallelArgs,
    check_loadable,
    clip_grad_norm,
    init_mesh,
    load_for_training,
    loss_scale,
    reducing_gradients,
    split_batch,
)
from models.model import Transformer
from models.record_files import Record
from models.records import EncodingCounts, Limits
from models.reward import Pair, Scored, read_reward_kind, rows_to_score, sides_are_equal
from models.rows import Rows, Store
from models.script import run_script
from models.tokenizer import Tokenizer
from models.trained_adapters import choose_lora
from models.transfer import index_on, to_device
from training.data import DataArgs, check_evaluation, epoch_order, load_rows, training_batches
from training.losses import auc, calibration_error, pairwise_loss, pointwise_loss
from training.optim import OptimArgs, check_optimizer, make_optimizer, set_learning_rate
from training.preferences import encode_pair_file, encode_scored_file
from training.run_dir import Run, RunArgs
from training.samples import end_of, start_of, visible

SomeRows = Rows | list[Pair] | list[Scored]
# the fields that a record needs for each --loss
FIELDS = {"pairwise": ("chosen", "rejected"), "pointwise": ("label",), "process": ("completions", "labels")}
MOST_STATISTICS = 2048  # training records used for reward_mean and reward_std if there is no --eval_file


@dataclass(frozen=True, kw_only=True)
class RmArgs(RunArgs, DataArgs, OptimArgs, ParallelArgs):
    """Trains a reward model from the model in a Hugging Face folder."""

    loss: str = flag("pairwise", choices=FIELDS, help="kind of records: pairs, labelled answers, labelled steps")
    center_coef: float = flag(
        0.0,
        bounds=non_negative,
        help="weight of the squared sum of a pair's rewards, which centres rewards at 0; pairwise only",
    )
    step_separator: str = flag(
        "\n",
        type=with_newlines,
        help=r"text that ends each step, recorded in config.json; \n is a newline, the default; process only",
    )
    num_eval_samples: int = flag(
        2, bounds=non_negative, help="records of --eval_file printed with their rewards", may_change=True
    )


def main(args: RmArgs) -> None:
    check_flags(args)
    dp_size, micro_batch_size = split_batch(args, args.batch_size)
    run = Run(args)

    # load: the data first, so that a mistake in it shows before the model is loaded
    runtime = run.runtime
    folder = open_folder(args.checkpoint_path, args.max_seq_len, args.tensor_parallel_size, today=run.today)
    lora = choose_lora(args, args.checkpoint_path, runtime)
    has_head = has_score_head(args.checkpoint_path) or (lora is not None and SCORE in lora.values)
    new_score = None if has_head else initial_score(folder.config.hidden_size, args.seed)
    check_loadable(args.checkpoint_path, args, runtime, head="score", new_score=new_score, lora=lora)
    config, changes = scalar_head_files(folder, args.checkpoint_path)
    train, evaluation, notes = load_rows(args, folder, partial(encode_file, args), describe)
    total_steps = args.total_steps(len(train))
    batches = partial(training_batches, len(train), args.batch_size, seed=args.seed, shuffle=args.shuffle)

    mesh = init_mesh(runtime.device, args.tensor_parallel_size, args.dp_replicate)
    split = Split(micro_batch_size, mesh["dp"], folder.pad_token_id, args.max_tokens_per_micro_batch, run.stop.check)
    model = load_for_training(args.checkpoint_path, mesh, args, runtime, head="score", new_score=new_score, lora=lora)
    optimizer = make_optimizer(model, args, seed=args.seed, compile=runtime.compile)
    run.begin(model, optimizer, total_steps=total_steps)
    about = {
        "model": f"{folder}, {'its own' if has_head else 'a new'} head{moved(args, folder)}, --loss {args.loss}"
        + (f"; {lora}" if lora else ""),
        "device": f"{runtime} on {args.param_dtype} weights, {args.optim}",
        "ranks": args.ranks(),
        **notes,
        "stop tokens": folder.stop_tokens(),
        "steps": f"{run.span()}, {args.batch_size} records, {split.note()}",
    }
    say(card("train_rm", about))

    order = epoch_order(len(train), seed=args.seed, epoch=0)
    statistics_rows = evaluation or [train[i] for i in order[:MOST_STATISTICS]]

    def finish(metrics: dict[str, float]) -> Tensor | None:
        """Evaluates, logs and exports if due. Returns the rewards of statistics_rows if it computed them, else None."""
        eval_rewards = None
        if evaluation and run.eval_due:
            with run.evaluating(metrics):
                eval_rewards = all_rewards(model, evaluation, split)
                run.check_finite(eval_rewards=eval_rewards.double().sum())
                found = eval_metrics(args, eval_rewards, targets_of(evaluation, runtime.device))
                run.check_finite(**found)
                metrics |= found
                run.show(f"step {run.step}: " + ", ".join(f"{name} {x:.4f}" for name, x in found.items()))
                run.show(samples(evaluation[: args.num_eval_samples], eval_rewards.tolist(), folder.tokenizer))
        if run.export_due and eval_rewards is None:
            with run.evaluating(metrics):  # a run that a signal ends here computes and exports them when it goes on
                eval_rewards = all_rewards(model, statistics_rows, split)
        run.log(metrics)
        if run.export_due:
            export(run, model, config, changes, eval_rewards, run.step_folder)
        return eval_rewards

    eval_rewards = finish(run.unfinished) if run.unfinished else None

    # loop
    for step, numbers in run.steps(batches, train.lengths):
        new_dropout(model, step)
        batch = [train[i] for i in numbers]
        places, targets = reward_places(batch), targets_of(batch, runtime.device)
        rewards = torch.zeros(places[-1].stop, device=runtime.device)
        scale, loss = loss_scale(len(targets), dp_size), torch.zeros((), device=runtime.device)
        for share in reducing_gradients(model, split.numbers(batch), every=args.sync_every_micro_batch):
            rows = [batch[i] for i in share]
            micro_rewards = rewards_of(model, rows, split)
            micro_loss = losses_of(args, micro_rewards, targets_of(rows, runtime.device)).sum()
            (micro_loss * scale.loss).backward()
            loss += micro_loss.detach() / len(targets)
            index = index_on([place for i in share for place in places[i]], runtime.device)
            rewards.index_copy_(0, index, micro_rewards.detach())
        split.sum(loss)
        split.sum(rewards)  # each rank filled in those of its rows; the rest are 0
        grad_norm = clip_grad_norm(model, args.max_grad_norm, scale.gradients)
        run.check_finite(loss=loss, grad_norm=grad_norm)
        run.begin_update()
        learning_rate = set_learning_rate(optimizer, args, step, total_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        metrics = {"loss": loss.item(), **reward_metrics(args.loss, rewards, targets)}
        metrics.update(learning_rate=learning_rate, grad_norm=grad_norm.item())
        metrics.update(run.speed(model, [len(ids) for row in batch for ids in row.sequences], 0))
        eval_rewards = finish(metrics)

    if eval_rewards is None:  # no --eval_file, or no step was taken
        eval_rewards = all_rewards(model, statistics_rows, split)
    export(run, model, config, changes, eval_rewards)


def check_flags(args: RmArgs) -> None:
    """Raises ValueError for flags that contradict each other."""
    check_evaluation(args)
    check_optimizer(args)
    if args.loss != "pairwise":
        refuse_idle(args, f"for --loss {args.loss}; it is for pairwise", "center_coef")
    if args.loss != "process":
        refuse_idle(args, f"for --loss {args.loss}, whose answers have no steps", "step_separator")
    elif not args.step_separator:
        raise ValueError("--step_separator '': an answer cannot be split into steps without a text that ends each one")


# ------------------------------------------------------------------------------------------ records


def encode_file(
    args: RmArgs, path: Path, tokenizer: Tokenizer, limits: Limits, store: Store
) -> tuple[Rows, EncodingCounts]:
    """Encodes all records of a file. Raises ValueError, naming the right --loss, for records that fit another one."""

    def check(record: Record) -> None:
        missing = [name for name in FIELDS[args.loss] if name not in record.given]
        fitting = [kind for kind, names in FIELDS.items() if all(name in record.given for name in names)]
        if missing and fitting:
            raise ValueError(
                f"{record.where}: --loss {args.loss} needs the field {missing[0]!r}; this record has "
                f"{' and '.join(map(repr, FIELDS[fitting[0]]))}: take --loss {fitting[0]}"
            )

    if args.loss == "pairwise":
        return encode_pair_file(path, tokenizer, limits, store, check)
    return encode_scored_file(path, tokenizer, limits, store, check, kind=args.loss, step_separator=args.step_separator)


def reward_places(rows: SomeRows) -> list[range]:
    """Returns the indices of each row's rewards among all rewards: chosen, rejected of a pair; else one per label."""
    counts = [2 if isinstance(row, Pair) else len(row.labels) for row in rows]
    return [range(end - count, end) for end, count in zip(accumulate(counts), counts)]


def targets_of(rows: SomeRows, device: torch.device) -> Tensor:
    """Returns what the loss compares the rewards with, fp32: the margin of each pair, or the labels of all rows."""
    values = [v for row in rows for v in ([row.margin or 0.0] if isinstance(row, Pair) else row.labels)]
    return to_device(values, device, torch.float32)


def describe(rows: Rows) -> str:
    num_rewards = rows.lengths.size if rows.kind is Pair else len(rows.columns.values)
    return f"{len(rows):,} records, {rows.num_tokens:,} tokens, {num_rewards:,} rewards"


# ------------------------------------------------------------------------------------------ rewards


def moved(args: RmArgs, folder: Folder) -> str:
    """Returns a note if the head was trained on the token before EOS (see place_of_score), else an empty string."""
    if args.loss == "process" or not has_score_head(folder.path):
        return ""
    pad = read_reward_kind(folder.path).pad_token_id
    pads_with_eos = pad is not None and pad == folder.tokenizer.eos_token_id
    return " (from a folder that pads with EOS: trained on the token before EOS until now, now on EOS)" * pads_with_eos


def initial_score(hidden_size: int, seed: int) -> Tensor:
    """Returns the weight [1, E] of a new head, N(0, 1 / sqrt(E + 1)) (Stiennon et al. 2020, arXiv 2009.01325), which
    gives rewards of about unit size. Drawn on the CPU, so that it is the same on every rank and device."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)


def rewards_of(model: Transformer, rows: SomeRows, split: Split) -> Tensor:
    """Returns the rewards of this rank's rows from one forward pass, fp32, in the order of reward_places and
    targets_of. Without rows it returns an empty tensor, still attached to the graph, so that the collectives run."""
    examples, places = rows_to_score(rows)
    rewards = model.score(forward_rows(model, examples, split).at(places))
    if rows and isinstance(rows[0], Pair):
        sides = rewards.view(-1, 2)
        rewards = torch.where(sides_are_equal(rows, rewards.device)[:, None], sides[:, :1], sides).flatten()
    return rewards


@torch.no_grad()
def all_rewards(model: Transformer, rows: SomeRows, split: Split) -> Tensor:
    """Computes the rewards of the rows, which the ranks share; returns all of them on every rank. A collective."""
    places = reward_places(rows)
    rewards = torch.zeros(places[-1].stop, device=model.inv_freq.device)
    for share in split.numbers(rows):
        index = index_on([place for i in share for place in places[i]], rewards.device)
        rewards.index_copy_(0, index, rewards_of(model, [rows[i] for i in share], split))
    return split.sum(rewards)


def losses_of(args: RmArgs, rewards: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of each pair or label, fp32."""
    if args.loss == "pairwise":
        return pairwise_loss(rewards[0::2], rewards[1::2], targets, args.center_coef)
    return pointwise_loss(rewards, targets)


def reward_metrics(loss: str, rewards: Tensor, targets: Tensor) -> dict[str, float]:
    """Returns accuracy and summary statistics of rewards, under the names of TRL's RewardTrainer. A reward of 0 and a
    label of 0.5 count as positive; a pair with equal rewards counts as wrong."""
    rewards = rewards.double()
    if loss == "pairwise":
        margins = rewards[0::2] - rewards[1::2]
        metrics = {"accuracy": (margins > 0).double().mean().item(), "margin": margins.mean().item()}
    else:
        agree = (rewards >= 0) == (targets >= 0.5)
        metrics = {"step_accuracy" if loss == "process" else "accuracy": agree.double().mean().item()}
    metrics.update(mean_reward=rewards.mean().item(), min_reward=rewards.min().item(), max_reward=rewards.max().item())
    return metrics


def eval_metrics(args: RmArgs, rewards: Tensor, targets: Tensor) -> dict[str, float]:
    """Returns evaluation metrics, without AUC if all labels are of one class. The calibration error of pairs is that of
    predicting the better answer, with probability sigmoid(|difference|); of labels, that of sigmoid(reward)."""
    loss = losses_of(args, rewards, targets).double().mean().item()
    metrics = {"loss": loss, **reward_metrics(args.loss, rewards, targets)}
    if args.loss == "pairwise":
        margins = rewards[0::2] - rewards[1::2]
        right = (margins.sign() + 1) / 2  # a tie is half right
        metrics["calibration_error"] = calibration_error(margins.abs().sigmoid(), right)
    else:
        metrics["calibration_error"] = calibration_error(rewards.sigmoid(), targets)
        metrics["auc"] = auc(rewards, targets)
    return {f"eval_{name}": value for name, value in metrics.items() if not math.isnan(value)}


def samples(rows: SomeRows, rewards: list[float], tokenizer: Tokenizer) -> str:
    """Formats rows with their rewards for printing. rewards: of these rows; more may follow."""

    def text(ids: list[int], start: int, end: int | None) -> str:
        return start_of(visible(tokenizer.decode_continuation(ids[:start], ids[start:end])), 100)

    lines = []
    for row, places in zip(rows, reward_places(rows)):
        ids, start = row.chosen.input_ids if isinstance(row, Pair) else row.input_ids, row.prompt_length
        prompt = visible(tokenizer.decode(ids[:start], skip_special_tokens=False))
        lines.append(f"  prompt    {end_of(prompt, 100)}")
        if isinstance(row, Pair):
            parts = [("chosen", text(ids, start, None)), ("rejected", text(row.rejected.input_ids, start, None))]
        else:
            ends = [position + 1 for position in row.positions]
            spans = zip(row.labels, [start, *ends], ends)
            parts = [(f"label {label:g}", text(ids, begin, end)) for label, begin, end in spans]
        lines += [f"  {name:<8}  {rewards[place]:+.3f}  {part}" for place, (name, part) in zip(places, parts)]
    return "\n".join(lines) + "\n"


def export(
    run: Run, model: Transformer, config: dict, changes: dict[str, dict], rewards: Tensor, subfolder: str = ""
) -> None:
    """Writes the reward model, with a config.json that says where the reward is read, with its mean and std. Ends the
    run if they are not finite. config, changes: of scalar_head_files; rewards: of the statistics."""
    args = run.args
    mean, std = rewards.double().mean().item(), rewards.double().std(correction=0).item()
    if not math.isfinite(mean + std):
        run.fail_export(f"the model's rewards are not finite: mean {mean}, standard deviation {std}")
    config = config | {"reward_model_type": args.loss, "reward_position": "last_token"}
    if args.loss == "process":
        config |= {"reward_position": "last_token_of_step_and_separator", "step_separator": args.step_separator}
    config |= {"reward_mean": mean, "reward_std": std}
    run.export(model, config, json_changes=changes, what="reward model", subfolder=subfolder)


if __name__ == "__main__":
    run_script(main, RmArgs)
