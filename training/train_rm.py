"""Reward models: one number for an answer or for each of its steps, learnt from judgements.

- pairwise: the chosen answer scores higher than the rejected one (Bradley-Terry); pointwise: the score is the logit of
  the answer's label; process: the score at the end of each step is the logit of the step's label
- a score is read at the last real token (process: of each step and its separator) and computed in fp32
- a language model's folder gets a new head, the folder of a reward model goes on learning
- the loss of a step is the mean over all its pairs (answers, steps), whatever the micro-batches
- the export opens as transformers' AutoModelForSequenceClassification; its config.json says how to read it

    python training/train_rm.py --checkpoint_path DIR --train_file pairs.jsonl --output_dir runs/rm
"""

import math
import sys
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.checkpoint import DTYPES, has_score_head, save_folder, stored_dtype
from models.fsdp import clip_grad_norm, full_tensors, init_mesh, load_for_training, reducing_gradients
from models.model import Transformer, read_hf_config
from models.tokenizer import Tokenizer
from models.tp import is_main_rank, size_of
from training.common import (
    ArgumentParser,
    Stopwatch,
    add_model_arguments,
    add_training_arguments,
    card,
    check_finite,
    choose_runtime,
    device_name,
    non_negative_float,
    non_negative_int,
    open_folder,
    pad_id,
    peak_memory,
    progress_bar,
    run_script,
    say,
    split_batch,
    throughput,
)
from training.data import epoch_order, micro_batches, read_records, training_batches
from training.losses import auc, calibration_error, pairwise_loss, pointwise_loss
from training.optim import learning_rate_at, make_optimizer
from training.preferences import (
    Pair,
    PreferenceCounts,
    Scored,
    collate_pairs,
    collate_scored,
    encode_pair_file,
    encode_scored_file,
)
from training.rewards import scalar_head_config
from training.run_dir import (
    CheckpointWriter,
    Metrics,
    StopSignal,
    begin_or_resume,
    check_installed,
    prepare_output_dir,
)
from training.samples import visible

FIELDS = {  # of a record, by the --loss that learns from it
    "pairwise": ("chosen", "rejected"),
    "pointwise": ("label",),
    "process": ("completions", "labels"),
}
MOST_STATISTICS = 2048  # training records whose rewards give reward_mean and reward_std where there is no --eval_file


def parser() -> ArgumentParser:
    parser = ArgumentParser("Trains a reward model from the model in a Hugging Face folder.")
    add_model_arguments(parser)
    add_training_arguments(parser)
    add = parser.add_argument
    add("--loss", choices=list(FIELDS), default="pairwise", help="what the records judge: pairs, answers, or steps")
    add(
        "--center_coef",
        type=non_negative_float,
        default=0.0,
        help="weight of the squared sum of a pair's rewards, which keeps them around 0; pairwise only",
    )
    add(
        "--step_separator",
        type=lambda text: text.replace("\\n", "\n"),
        default="\\n",
        help=r"what follows each step, kept in config.json; \n is a newline; process only",
    )
    add("--num_eval_samples", type=non_negative_int, default=2, help="records of --eval_file shown with their rewards")
    return parser


def main(
    *,
    checkpoint_path: Path,
    device: str | None,
    dtype: str | None,
    seed: int,
    compile: bool | None,
    output_dir: Path,
    resume: bool,
    train_file: Path,
    eval_file: Path | None,
    max_seq_len: int | None,
    overlong: str,
    batch_size: int,
    micro_batch_size: int | None,
    learning_rate: float,
    lr_schedule: str,
    warmup_ratio: float,
    weight_decay: float,
    adam_beta1: float,
    adam_beta2: float,
    adam_eps: float,
    param_dtype: str,
    optim: str,
    max_grad_norm: float,
    num_epochs: int,
    max_steps: int | None,
    shuffle: bool,
    eval_steps: int | None,
    save_steps: int | None,
    save_total_limit: int,
    log_steps: int,
    report_to: str,
    tensor_parallel_size: int,
    dp_replicate: int,
    sequence_parallel: bool,
    activation_checkpointing: str,
    sync_every_micro_batch: bool,
    cpu_offload: bool,
    export_dtype: str | None,
    loss: str,
    center_coef: float,
    step_separator: str,
    num_eval_samples: int,
) -> None:
    args = dict(locals())
    stop = StopSignal()
    dp_size, micro_batch_size = split_batch(batch_size, micro_batch_size, tensor_parallel_size, dp_replicate)
    if eval_steps is not None and eval_file is None:
        raise ValueError("--eval_steps needs an --eval_file")
    if center_coef and loss != "pairwise":
        raise ValueError(f"--center_coef {center_coef} is for --loss pairwise, not {loss}")
    check_installed(report_to)
    prepare_output_dir(output_dir, resume, args)

    # load: the data first, since it is quick to be wrong
    runtime = choose_runtime(device, dtype, compile)
    config, tokenizer, max_seq_len = open_folder(checkpoint_path, max_seq_len, tensor_parallel_size)
    hf_config = read_hf_config(checkpoint_path)[0]
    saved_dtype = DTYPES[export_dtype] if export_dtype else stored_dtype(checkpoint_path)
    limits = {"vocab_size": config.vocab_size, "max_seq_len": max_seq_len, "overlong": overlong}
    train, counts = encode_file(train_file, tokenizer, loss, step_separator, **limits)
    evaluation, eval_notes = [], "none"
    if eval_file:
        evaluation, eval_counts = encode_file(eval_file, tokenizer, loss, step_separator, **limits)
        eval_notes = describe(evaluation, eval_counts)
    pad_token_id = pad_id(tokenizer, config)
    has_head = has_score_head(checkpoint_path)

    mesh = init_mesh(runtime.device, tensor_parallel_size, dp_replicate)
    model = load_for_training(
        checkpoint_path,
        mesh,
        device=runtime.device,
        compute_dtype=runtime.dtype,
        param_dtype=DTYPES[param_dtype],
        sequence_parallel=sequence_parallel,
        recompute=activation_checkpointing,
        compile=runtime.compile,
        cpu_offload=cpu_offload,
        head="score",
        new_score=None if has_head else initial_score(config.hidden_size, seed),
    )
    optimizer = make_optimizer(
        model,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        betas=(adam_beta1, adam_beta2),
        eps=adam_eps,
        optim=optim,
        seed=seed,
        compile=runtime.compile,
    )
    total_steps = num_epochs * -(-len(train) // batch_size) if max_steps is None else max_steps
    first_step = begin_or_resume(output_dir, args, model, optimizer, total_steps=total_steps, resume=resume)
    metrics = Metrics(output_dir, after_step=first_step - 1, report_to=report_to)
    in_background = runtime.device.type == "cuda" and not cpu_offload  # which would hold the state in memory twice
    checkpoints = CheckpointWriter(output_dir, model, optimizer, limit=save_total_limit, asynchronous=in_background)
    compute = str(runtime.dtype).removeprefix("torch.")
    rows = {
        "model": f"{checkpoint_path}, {config.num_parameters() / 1e6:,.1f} M parameters",
        "head": "the folder's own" if has_head else "new",
        "device": f"{device_name(runtime.device)}, {compute} on {param_dtype} weights",
        "optimizer": optim,
        "ranks": f"dp {dp_size}{f' ({dp_replicate} replicas)' * (dp_replicate > 1)} x tp {tensor_parallel_size}",
        "loss": loss,
        "train": describe(train, counts),
        "eval": eval_notes,
        "steps": f"{first_step} to {total_steps}, {batch_size} records each in micro-batches of {micro_batch_size}",
    }
    say(card("train_rm", rows))

    # loop
    order = {"seed": seed, "shuffle": shuffle}
    before = training_batches(len(train), batch_size, **order, first_step=1, last_step=first_step - 1)
    num_tokens = sum(sum(lengths_of(train[i])) for _, numbers in before for i in numbers)
    watch = Stopwatch(runtime.device)
    eval_rewards = None
    bar = progress_bar(total=total_steps, initial=first_step - 1, desc="training", unit="step")
    for step, numbers in training_batches(
        len(train), batch_size, **order, first_step=first_step, last_step=total_steps
    ):
        batch = [train[i] for i in numbers]
        places = reward_places(batch)
        targets = targets_of(batch, runtime.device)
        rewards = torch.zeros(places[-1].stop, device=runtime.device)
        mean_loss = torch.zeros((), device=runtime.device)
        shares = shares_of(batch, micro_batch_size, mesh["dp"])
        for mine in reducing_gradients(model, shares, every=sync_every_micro_batch):
            micro_rewards, micro_targets = rewards_of(model, [batch[i] for i in mine], pad_token_id)
            micro_loss = losses_of(loss, micro_rewards, micro_targets, center_coef).sum() / len(targets)
            (micro_loss * dp_size).backward()  # FSDP averages gradients over dp
            mean_loss += micro_loss.detach()
            rewards[[place for i in mine for place in places[i]]] = micro_rewards.detach()
        dist.all_reduce(mean_loss, group=mesh["dp"].get_group())
        dist.all_reduce(rewards, group=mesh["dp"].get_group())  # the other ranks' are 0
        grad_norm = clip_grad_norm(model, max_grad_norm)
        check_finite(step, numbers, loss=mean_loss, grad_norm=grad_norm)
        lr = learning_rate_at(
            step, peak=learning_rate, schedule=lr_schedule, total_steps=total_steps, warmup_ratio=warmup_ratio
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # log
        lengths = [length for row in batch for length in lengths_of(row)]
        num_tokens += sum(lengths)
        line = {
            "step": step,
            "loss": mean_loss.item(),
            **judgement(loss, rewards, targets),
            "learning_rate": lr,
            "grad_norm": grad_norm.item(),
            "num_tokens": num_tokens,
            **throughput(config, runtime.device, lengths, watch.lap()),
        }
        evaluate_now = evaluation and (step == total_steps or (eval_steps and step % eval_steps == 0))
        if evaluate_now:
            eval_rewards = all_rewards(model, evaluation, micro_batch_size, pad_token_id, mesh["dp"])
            found = evaluate(loss, eval_rewards, targets_of(evaluation, runtime.device), center_coef)
            check_finite(step, numbers, **found)
            line |= found
            if is_main_rank():
                bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
                bar.write(samples(evaluation[:num_eval_samples], eval_rewards.tolist(), tokenizer))
            watch.lap()
        if evaluate_now or step % log_steps == 0 or step == total_steps:
            metrics.write(line)
        bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tok/s", refresh=False)
        bar.update(1)

        # save
        stopping = stop.agreed(runtime.device)
        if stopping or (save_steps and (step % save_steps == 0 or step == total_steps)):
            checkpoints.save(step)
            watch.lap()
        if stopping:
            checkpoints.finish()
            bar.close()
            metrics.close()
            say(f"stopped by a signal after step {step}; go on with --resume")
            return
    checkpoints.finish()
    bar.close()
    metrics.close()

    if eval_rewards is None:  # nothing to evaluate on, or no step was taken
        chosen = epoch_order(len(train), seed=seed, epoch=0, shuffle=True)[:MOST_STATISTICS]
        rows = evaluation or [train[i] for i in chosen]
        eval_rewards = all_rewards(model, rows, micro_batch_size, pad_token_id, mesh["dp"])
    save_folder(
        output_dir,
        full_tensors(model),
        config=reward_config(hf_config, loss, eval_rewards, pad_token_id, step_separator),
        copy_from=checkpoint_path,
        dtype=saved_dtype,
    )
    say(f"{output_dir}: reward model written; peak memory {peak_memory(runtime.device) / 1e9:,.2f} GB")


# ------------------------------------------------------------------------------------------ records


def encode_file(
    path: Path, tokenizer: Tokenizer, loss: str, step_separator: str, **limits
) -> tuple[list[Pair] | list[Scored], PreferenceCounts]:
    """All records of a file as rows. Raises ValueError that names the --loss for records of another kind."""
    for record in read_records(path):
        missing = [name for name in FIELDS[loss] if name not in record.fields]
        fitting = [kind for kind, names in FIELDS.items() if all(name in record.fields for name in names)]
        if missing and fitting:
            raise ValueError(
                f"{record.where}: --loss {loss} needs the field {missing[0]!r}; this record has "
                f"{' and '.join(map(repr, FIELDS[fitting[0]]))}, as --loss {fitting[0]} takes it"
            )
    if loss == "pairwise":
        return encode_pair_file(path, tokenizer, **limits)
    return encode_scored_file(path, tokenizer, kind=loss, step_separator=step_separator, **limits)


def lengths_of(row: Pair | Scored) -> list[int]:
    """The lengths in tokens of what a row puts through the model."""
    if isinstance(row, Pair):
        return [len(row.chosen.input_ids), len(row.rejected.input_ids)]
    return [len(row.input_ids)]


def reward_places(rows: list[Pair] | list[Scored]) -> list[range]:
    """Where the rewards of each row stand among those of all: a pair has two, chosen and rejected; other rows one for
    each label."""
    counts = [2 if isinstance(row, Pair) else len(row.labels) for row in rows]
    return [range(end - count, end) for end, count in zip(accumulate(counts), counts)]


def targets_of(rows: list[Pair] | list[Scored], device: torch.device) -> Tensor:
    """What the rewards are held against, fp32: the margin of each pair, or all labels of the rows."""
    values = [v for row in rows for v in ([row.margin or 0.0] if isinstance(row, Pair) else row.labels)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def shares_of(rows: list[Pair] | list[Scored], micro_batch_size: int, dp: DeviceMesh):
    """The numbers of this rank's rows, in micro-batches."""
    numbers = list(range(len(rows)))
    return micro_batches(
        numbers, micro_batch_size, dp.get_local_rank(), dp.size(), key=lambda i: max(lengths_of(rows[i]))
    )


def describe(rows: list[Pair] | list[Scored], counts: PreferenceCounts) -> str:
    tokens = sum(sum(lengths_of(row)) for row in rows)
    parts = [f"{len(rows):,} records, {tokens:,} tokens, {reward_places(rows)[-1].stop:,} rewards"]
    parts += [f"{count:,} {name.replace('_', ' ')}" for name, count in counts._asdict().items() if count]
    return "; ".join(parts)


# ------------------------------------------------------------------------------------------ rewards


def initial_score(hidden_size: int, seed: int) -> Tensor:
    """The weight [1, E] of a new head, N(0, 1 / sqrt(E + 1)) (Stiennon et al. 2020, arXiv 2009.01325): rewards of about
    unit size. Drawn on the CPU, so it is the same on every rank and device."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)


def rewards_of(model: Transformer, rows: list[Pair] | list[Scored], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """(rewards, targets) of this rank's rows in one forward, fp32, in the order of reward_places and targets_of. No
    rows: none of either, but the gradient's collectives stay."""
    multiple_of = size_of(model.parallel.tp) if model.parallel.sequence_parallel else 1
    device = model.inv_freq.device
    if rows and isinstance(rows[0], Pair):
        batch = collate_pairs(rows, pad_token_id, device, multiple_of)
        hidden = model(batch.input_ids)
        scores = model.score(hidden[torch.arange(len(batch.last), device=device), batch.last])
        return torch.stack(scores.chunk(2), dim=1).flatten(), batch.margin
    batch = collate_scored(rows, pad_token_id, device, multiple_of)
    return model.score(model(batch.input_ids)[batch.rows, batch.positions]), batch.labels


@torch.no_grad()
def all_rewards(
    model: Transformer, rows: list[Pair] | list[Scored], micro_batch_size: int, pad_token_id: int, dp: DeviceMesh
) -> Tensor:
    """The rewards of rows that are spread over all ranks, on every rank."""
    places = reward_places(rows)
    rewards = torch.zeros(places[-1].stop, device=model.inv_freq.device)
    for mine in shares_of(rows, micro_batch_size, dp):
        rewards[[place for i in mine for place in places[i]]] = rewards_of(
            model, [rows[i] for i in mine], pad_token_id
        )[0]
    dist.all_reduce(rewards, group=dp.get_group())
    return rewards


def losses_of(loss: str, rewards: Tensor, targets: Tensor, center_coef: float) -> Tensor:
    """The loss of each pair or label, fp32."""
    if loss == "pairwise":
        return pairwise_loss(rewards[0::2], rewards[1::2], targets, center_coef)
    return pointwise_loss(rewards, targets)


def judgement(loss: str, rewards: Tensor, targets: Tensor) -> dict[str, float]:
    """What can be said of rewards in few numbers, under the names of TRL's RewardTrainer. A reward of 0 and a label of
    0.5 are taken for right; of a pair with equal rewards neither is."""
    rewards = rewards.double()
    if loss == "pairwise":
        margins = rewards[0::2] - rewards[1::2]
        found = {"accuracy": (margins > 0).double().mean().item(), "margin": margins.mean().item()}
    else:
        agree = (rewards >= 0) == (targets >= 0.5)
        found = {"step_accuracy" if loss == "process" else "accuracy": agree.double().mean().item()}
    return found | {
        "mean_reward": rewards.mean().item(),
        "min_reward": rewards.min().item(),
        "max_reward": rewards.max().item(),
    }


def evaluate(loss: str, rewards: Tensor, targets: Tensor, center_coef: float) -> dict[str, float]:
    """The metrics of an evaluation. The calibration error of pairs is that of the claim to have the better one, made
    with the probability sigmoid(|difference|); of labels that of sigmoid(reward)."""
    found = {"loss": losses_of(loss, rewards, targets, center_coef).double().mean().item()}
    found |= judgement(loss, rewards, targets)
    if loss == "pairwise":
        margins = rewards[0::2] - rewards[1::2]
        right = (margins.sign() + 1) / 2  # half, where the claim is for both
        found["calibration_error"] = calibration_error(margins.abs().sigmoid(), right)
    else:
        found["calibration_error"] = calibration_error(rewards.sigmoid(), targets)
        found["auc"] = auc(rewards, targets)
    return {f"eval_{name}": value for name, value in found.items() if not math.isnan(value)}  # no AUC of one kind alone


def samples(rows: list[Pair] | list[Scored], rewards: list[float], tokenizer: Tokenizer) -> str:
    """Rows with their rewards, for people. rewards: of these rows, and maybe of others after them."""

    def text(ids: list[int], start: int, end: int) -> str:
        shown = visible(tokenizer.decode_continuation(ids[:start], ids[start:end]))
        return shown if len(shown) <= 100 else f"{shown[:100]} ..."

    lines = []
    for row, places in zip(rows, reward_places(rows)):
        ids, start = row.chosen.input_ids if isinstance(row, Pair) else row.input_ids, row.prompt_length
        prompt = visible(tokenizer.decode(ids[:start]))
        lines.append(f"  prompt    {prompt if len(prompt) <= 100 else f'... {prompt[-100:]}'}")
        if isinstance(row, Pair):
            parts = [("chosen", text(ids, start, len(ids)))]
            parts.append(("rejected", text(row.rejected.input_ids, start, len(row.rejected.input_ids))))
        else:
            ends = [position + 1 for position in row.positions]
            parts = [
                (f"label {label:g}", text(ids, begin, end))
                for label, begin, end in zip(row.labels, [start, *ends], ends)
            ]
        lines += [f"  {name:<8}  {rewards[place]:+.3f}  {part}" for place, (name, part) in zip(places, parts)]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------- export


def reward_config(hf_config: dict, loss: str, rewards: Tensor, pad_token_id: int, step_separator: str) -> dict:
    """The config.json of a reward model, with what others need to read the reward. Raises ValueError if a reward is not
    finite."""
    mean, std = rewards.double().mean().item(), rewards.double().std(correction=0).item()
    if not math.isfinite(mean + std):
        raise ValueError(f"the model's rewards are not finite: mean {mean}, standard deviation {std}")
    reading = {"reward_model_type": loss, "reward_position": "last_token"}
    if loss == "process":
        reading |= {"reward_position": "last_token_of_step_and_separator", "step_separator": step_separator}
    return scalar_head_config(hf_config, pad_token_id) | reading | {"reward_mean": mean, "reward_std": std}


if __name__ == "__main__":
    run_script(main, parser())
