"""Direct preference optimisation: preference pairs, without a reward model, from one Hugging Face folder to another.

- records: prompt, chosen, rejected, as text or chat messages; see training/preferences.py
- losses: sigmoid (DPO, cDPO), ipo, ipo_avg, hinge, robust, simpo, rpo; training/losses.py has formulae and sources
- chosen and rejected share a forward pass; the loss of a step is the mean over all its pairs, whatever the micro-batch
  size
- the frozen reference's log-probs are computed once before training (training/reference.py), or in each step

    python training/train_dpo.py --checkpoint_path DIR --train_file pairs.jsonl --output_dir runs/dpo

Dimensions: B pairs.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.batches import Split
from models.checkpoint import open_folder
from models.common import Runtime, card, flag, refuse_idle, say
from models.dropout import new_dropout
from models.forward import forward_rows
from models.fsdp import (
    ParallelArgs,
    check_loadable,
    clip_grad_norm,
    frozen_dtype,
    init_mesh,
    load_for_training,
    load_frozen,
    loss_scale,
    reducing_gradients,
    reshard,
    split_batch,
)
from models.lora import Lora
from models.model import Transformer
from models.qlinear import Schemes
from models.reward import Pair, pair_rows, sides_are_equal
from models.rows import Rows
from models.script import run_script
from models.shared_base import as_reference
from models.trained_adapters import choose_lora
from models.transfer import to_device
from training.data import DataArgs, check_evaluation, load_rows, training_batches
from training.frozen import ReferenceArgs, check_context, check_reader, check_reference_flags, frozen_scheme
from training.losses import REFERENCE_FREE, SMOOTHED, DpoLossArgs, dpo_loss, sequence_logps, token_logps
from training.optim import OptimArgs, check_optimizer, make_optimizer, set_learning_rate
from training.preferences import encode_pair_file
from training.reference import ReferenceCache, precompute, weights_digest
from training.run_dir import Run, RunArgs
from training.samples import EvalSamples, SampleArgs, lesson

# metrics averaged over pairs, under TRL's names
MEANS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
MEANS += ("logps/chosen", "logps/rejected")
Splits = dict[str, tuple[Rows, list[list[int]]]]  # {"train" or "eval": (pairs, the batches that the run will use)}


@dataclass(frozen=True, kw_only=True)
class DpoArgs(RunArgs, DataArgs, DpoLossArgs, OptimArgs, ParallelArgs, ReferenceArgs, SampleArgs):
    """Direct preference optimisation of the model in a Hugging Face folder."""

    learning_rate: float = 1e-6
    precompute_ref: bool = flag(
        True,
        help="compute the reference's log-probs once before training; else in each step, with a second model in memory",
        may_change=True,
    )


def main(args: DpoArgs) -> None:
    check_flags(args)
    dp_size, micro_batch_size = split_batch(args, args.batch_size)
    run = Run(args)

    # load: the data first, so that a mistake in it shows before the model is loaded
    runtime = run.runtime
    folder = open_folder(args.checkpoint_path, args.max_seq_len, args.tensor_parallel_size, today=run.today)
    own_reference = args.ref_checkpoint_path is None and args.loss not in REFERENCE_FREE and not args.precompute_ref
    lora = choose_lora(args, args.checkpoint_path, runtime, with_reference=own_reference)
    check_loadable(args.checkpoint_path, args, runtime, lora=lora)
    check_reader("reference", args.ref_path, folder, args)
    check_context("reference", args.ref_path, folder.max_seq_len, lower="--max_seq_len")
    ref_scheme = frozen_scheme(args.ref_path, "quantize_ref", args, runtime)
    train, evaluation, notes = load_rows(args, folder, encode_pair_file, describe)
    total_steps = args.total_steps(len(train))
    batches = partial(training_batches, len(train), args.batch_size, seed=args.seed, shuffle=args.shuffle)

    mesh = init_mesh(runtime.device, args.tensor_parallel_size, args.dp_replicate)
    split = Split(micro_batch_size, mesh["dp"], folder.pad_token_id, args.max_tokens_per_micro_batch, run.stop.check)
    first_epoch = batches(first_step=1, last_step=min(total_steps, -(-len(train) // args.batch_size)))
    splits = {"train": (train, [numbers for _, numbers in first_epoch])}
    if evaluation:
        splits["eval"] = (evaluation, eval_batches(evaluation, args.batch_size))
    model, reference = load_models(args, mesh, runtime, lora, ref_scheme, splits if total_steps else {}, split)
    optimizer = make_optimizer(model, args, seed=args.seed, compile=runtime.compile)
    run.begin(model, optimizer, total_steps=total_steps)
    samples = EvalSamples(model, folder, (pair.chosen for pair in evaluation), run, mesh["dp"])
    about = {
        "model": f"{folder}, --loss {args.loss}, --beta {args.beta}" + (f"; {lora}" if lora else ""),
        "reference": reference_note(args, ref_scheme),
        "device": f"{runtime} on {args.param_dtype} weights, {args.optim}",
        "ranks": args.ranks(),
        **notes,
        "first chosen": lesson((pair.chosen for pair in train), folder.tokenizer),
        "stop tokens": folder.stop_tokens(),
        "steps": f"{run.span()}, {args.batch_size} pairs, {split.note()}",
    }
    say(card("train_dpo", about))

    def finish(metrics: dict[str, float]) -> None:
        if evaluation and run.eval_due:
            with run.evaluating(metrics):
                means = evaluate(model, reference, evaluation, args, split)
                run.check_finite(eval_loss=means["loss"])
                metrics |= {f"eval_{name}": value for name, value in means.items()}
                right = f"{means['rewards/accuracies']:.1%} of the pairs in the right order"
                run.show(f"step {run.step}: eval_loss {means['loss']:.4f}, {right}")
                samples.show()
        run.log(metrics)
        if run.export_due:
            run.export(model, subfolder=run.step_folder)

    if run.unfinished:
        finish(run.unfinished)

    # loop
    for step, numbers in run.steps(batches, train.lengths):
        new_dropout(model, step)
        batch = [train[i] for i in numbers]
        scale, sums = loss_scale(len(batch), dp_size), torch.zeros(len(MEANS), device=runtime.device)
        for pairs in reducing_gradients(model, split.shares(batch), every=args.sync_every_micro_batch):
            loss, micro_sums = summed_loss(model, reference, pairs, args, split)
            (loss * scale.loss).backward()
            sums += micro_sums
        means = dict(zip(MEANS, (split.sum(sums) / len(batch)).tolist()))
        grad_norm = clip_grad_norm(model, args.max_grad_norm, scale.gradients)
        run.check_finite(loss=means["loss"], grad_norm=grad_norm)
        run.begin_update()
        learning_rate = set_learning_rate(optimizer, args, step, total_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        metrics = {**means, "learning_rate": learning_rate, "grad_norm": grad_norm.item()}
        lengths = train.lengths[numbers].flatten().tolist()
        num_targets = sum(row.num_targets for pair in batch for row in (pair.chosen, pair.rejected))
        finish(metrics | run.speed(model, lengths, num_targets, beside=reference is not None))

    run.export(model)


def check_flags(args: DpoArgs) -> None:
    """Raises ValueError for flags that contradict each other."""
    check_evaluation(args)
    check_optimizer(args)
    check_reference_flags(args)
    if args.loss not in SMOOTHED:
        refuse_idle(args, f"for --loss {args.loss}; it is for {', '.join(SMOOTHED)}", "label_smoothing")
    if args.loss == "robust" and args.label_smoothing == 0.5:
        raise ValueError("--label_smoothing 0.5: --loss robust divides by 1 - 2 * label_smoothing; take less than 0.5")
    for name, wanted in (("simpo_gamma", "simpo"), ("rpo_alpha", "rpo")):
        if args.loss != wanted:
            refuse_idle(args, f"for --loss {args.loss}; it is for {wanted}", name)
    if args.loss in REFERENCE_FREE:
        names = ("ref_checkpoint_path", "quantize_ref", "precompute_ref")
        refuse_idle(args, f"for --loss {args.loss}, which has no reference", *names)


# -------------------------------------------------------------------------------- the reference


def load_models(
    args: DpoArgs,
    mesh: DeviceMesh,
    runtime: Runtime,
    lora: Lora | None,
    ref_scheme: Schemes | None,
    splits: Splits,
    split: Split,
) -> tuple[Transformer, Transformer | None]:
    """Returns (policy, reference), with reference None unless it runs in each step. Otherwise this writes its log-probs
    into the pairs. If the reference is the model of --checkpoint_path, one model serves as both before training, and
    with adapters also during it (see as_reference). splits: empty if no step is taken."""
    load_policy = partial(load_for_training, args.checkpoint_path, mesh, args, runtime, lora=lora)
    load_reference = partial(load_frozen, args.ref_path, mesh, ref_scheme, args, runtime)
    on_base, begin_alike = lora is not None and args.ref_is_base(ref_scheme), args.ref_is_start(ref_scheme)
    if args.loss in REFERENCE_FREE or not splits:
        return load_policy(), None
    if not args.precompute_ref:
        policy = load_policy()
        return policy, policy if on_base else load_reference()
    dtypes = (frozen_dtype(args, runtime), runtime.dtype)
    weights = weights_digest(args.ref_path, args.adapter_path if begin_alike else None)
    key = {"weights": weights, "dtypes": f"{dtypes[0]}, {dtypes[1]}"}
    scheme = lora.scheme if on_base else ref_scheme
    if scheme is not None:
        key["quantised"] = str(scheme)
    cache = ReferenceCache(args.output_dir, key, tolerance=2e-2 if torch.bfloat16 in dtypes else 1e-4)
    if not on_base and not begin_alike:
        precompute_with(load_reference(), splits, cache, split)
        return load_policy(), None
    policy = load_policy()  # equals its start until its first step, or until a checkpoint is loaded
    with nullcontext() if begin_alike else as_reference(policy):
        precompute_with(policy, splits, cache, split)
    return policy, None


@torch.no_grad()
def precompute_with(reference: Transformer, splits: Splits, cache: ReferenceCache, split: Split) -> None:
    """Writes the reference's log-probs into the pairs of each split. A collective."""
    for name, (pairs, batches) in splits.items():
        precompute(lambda rows: pair_logps(reference, rows, split)[0], name, pairs, batches, cache, split)
    reshard(reference)  # else the next forward would use the head and the embedding that were gathered here


def reference_note(args: DpoArgs, scheme: Schemes | None) -> str:
    if args.loss in REFERENCE_FREE:
        return "none"
    quantised = "" if scheme is None else f"{scheme}, "
    return f"{args.reference_name}, {quantised}{'before training' if args.precompute_ref else 'in each step'}"


# --------------------------------------------------------------------------------------- the loss


def pair_logps(model: Transformer, pairs: list[Pair], split: Split) -> tuple[Tensor, Tensor]:
    """Returns (log-probability, number of tokens) of each completion, EOS included; [2, B] each: chosen, rejected."""
    rows = forward_rows(model, pair_rows(pairs), split)
    vocabulary = {"vocab_size": model.config.vocab_size, "tp": model.parallel.tp}
    logps, _ = token_logps(rows.hidden, model.lm_head.weight, rows.labels, learnt=rows.learnt, **vocabulary)
    logps, lengths = (each.view(2, len(pairs)) for each in sequence_logps(logps, rows.row_labels))
    return torch.where(sides_are_equal(pairs, logps.device), logps[0], logps), lengths


def summed_loss(
    model: Transformer, reference: Transformer | None, pairs: list[Pair], args: DpoArgs, split: Split
) -> tuple[Tensor, Tensor]:
    """Returns (the summed loss of this rank's pairs; the sums of MEANS over them, without gradient).

    reference: None if the pairs hold its log-probs, or if the loss needs none."""
    if reference is not None:  # first: with LoRA both may be one model, and backward needs the policy's state
        with torch.no_grad(), as_reference(reference):
            ref_logps, _ = pair_logps(reference, pairs, split)
    logps, lengths = pair_logps(model, pairs, split)
    if reference is None:
        ref_logps = to_device([pair.reference for pair in pairs], logps.device, torch.float32).view(-1, 2).T
    losses, chosen_rewards, rejected_rewards = dpo_loss(args, logps, ref_logps, lengths)
    margins = chosen_rewards - rejected_rewards
    rewards = (chosen_rewards, rejected_rewards, (margins > 0).float(), margins)
    return losses.sum(), torch.stack([losses.detach(), *rewards, *logps.detach()]).sum(dim=1)


def eval_batches(pairs: Rows, batch_size: int) -> list[list[int]]:
    """Returns batches of the pairs, sorted by length: the same ones for every evaluation and for the reference."""
    rows = np.argsort(pairs.lengths.max(axis=1), kind="stable").tolist()
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


@torch.no_grad()
def evaluate(
    model: Transformer, reference: Transformer | None, pairs: Rows, args: DpoArgs, split: Split
) -> dict[str, float]:
    """Returns MEANS over all pairs, on all ranks. A collective."""
    sums = torch.zeros(len(MEANS), device=model.inv_freq.device)
    for numbers in eval_batches(pairs, args.batch_size):
        for rows in split.shares([pairs[i] for i in numbers]):
            sums += summed_loss(model, reference, rows, args, split)[1]
    return dict(zip(MEANS, (split.sum(sums) / len(pairs)).tolist()))


def describe(pairs: Rows) -> str:
    return f"{len(pairs):,} pairs, {pairs.num_tokens:,} tokens"


if __name__ == "__main__":
    run_script(main, DpoArgs)
