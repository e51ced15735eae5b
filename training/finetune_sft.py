"""Supervised fine-tuning: next-token cross entropy on completions, from one Hugging Face folder to another.

- records: prompt + completion, chat messages (loss on the assistant's turns), or plain text; see training/data.py
- the loss of a step is the mean over all its target tokens (tokens with a label), whatever the micro-batch size
- fp32 master weights, or bf16 weights with stochastic rounding; computation in bf16 or fp32

    python training/finetune_sft.py --checkpoint_path DIR --train_file train.jsonl --output_dir runs/sft
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

import torch

from models.batches import Split
from models.checkpoint import open_folder
from models.common import card, flag, say
from models.dropout import new_dropout
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
from models.records import Example
from models.rows import Rows
from models.script import run_script
from models.trained_adapters import choose_lora
from training.data import DataArgs, PackedRows, check_evaluation, encode_sft_file, load_rows, training_batches
from training.losses import token_cross_entropy
from training.optim import OptimArgs, check_optimizer, make_optimizer, set_learning_rate
from training.run_dir import Run, RunArgs
from training.samples import EvalSamples, SampleArgs, lesson


@dataclass(frozen=True, kw_only=True)
class SftArgs(RunArgs, DataArgs, OptimArgs, ParallelArgs, SampleArgs):
    """Supervised fine-tuning of the model in a Hugging Face folder."""

    pack: bool = flag(
        False, help="pack several records into each row of --max_seq_len tokens; they do not attend to each other"
    )


def main(args: SftArgs) -> None:
    check_evaluation(args)
    check_optimizer(args)
    if args.pack and not args.shuffle:
        why = "--pack puts records of the whole file into each row, so their order is lost"
        raise ValueError(f"--no-shuffle: {why}; leave one of them out")
    dp_size, micro_batch_size = split_batch(args, args.batch_size)
    run = Run(args)

    # load: the data first, so that a mistake in it shows before the model is loaded
    runtime = run.runtime
    folder = open_folder(args.checkpoint_path, args.max_seq_len, args.tensor_parallel_size, today=run.today)
    lora = choose_lora(args, args.checkpoint_path, runtime)
    check_loadable(args.checkpoint_path, args, runtime, lora=lora)
    train, evaluation, notes = load_rows(args, folder, encode_sft_file, describe)
    if args.pack:
        train = PackedRows(train, folder.max_seq_len)
        filled = train.lengths.sum() / (len(train) * folder.max_seq_len)
        notes["train"] += f"; packed into {len(train):,} rows, {filled:.1%} full"
    eval_rows = PackedRows(evaluation, folder.max_seq_len) if args.pack and evaluation else evaluation
    total_steps = args.total_steps(len(train))
    batches = partial(training_batches, len(train), args.batch_size, seed=args.seed, shuffle=args.shuffle)

    mesh = init_mesh(runtime.device, args.tensor_parallel_size, args.dp_replicate)
    split = Split(micro_batch_size, mesh["dp"], folder.pad_token_id, args.max_tokens_per_micro_batch, run.stop.check)
    model = load_for_training(args.checkpoint_path, mesh, args, runtime, lora=lora)
    optimizer = make_optimizer(model, args, seed=args.seed, compile=runtime.compile)
    run.begin(model, optimizer, total_steps=total_steps)
    samples = EvalSamples(model, folder, evaluation, run, mesh["dp"])
    about = {
        "model": folder if lora is None else f"{folder}; {lora}",
        "device": f"{runtime} on {args.param_dtype} weights, {args.optim}",
        "ranks": args.ranks(),
        **notes,
        "first target": lesson(train, folder.tokenizer),
        "stop tokens": folder.stop_tokens(),
        "steps": f"{run.span()}, {args.batch_size} rows each, {split.note()}",
    }
    say(card("finetune_sft", about))

    def finish(metrics: dict[str, float]) -> None:
        if evaluation and run.eval_due:
            with run.evaluating(metrics):
                metrics["eval_loss"] = evaluate(model, eval_rows, split)
                run.check_finite(eval_loss=metrics["eval_loss"])
                run.show(f"step {run.step}: eval_loss {metrics['eval_loss']:.4f}")
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
        run.numbers = train.records_in(numbers) if args.pack else numbers
        num_targets = max(1, sum(example.num_targets for example in batch))
        scale, loss = loss_scale(num_targets, dp_size), torch.zeros((), device=runtime.device)
        for examples in reducing_gradients(model, split.shares(batch), every=args.sync_every_micro_batch):
            micro_loss = summed_loss(model, examples, split)
            (micro_loss * scale.loss).backward()
            loss += micro_loss.detach() / num_targets
        split.sum(loss)
        grad_norm = clip_grad_norm(model, args.max_grad_norm, scale.gradients)
        run.check_finite(loss=loss, grad_norm=grad_norm)
        run.begin_update()
        learning_rate = set_learning_rate(optimizer, args, step, total_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        lengths = [n for example in batch for n in example.lengths or [len(example.input_ids)]]
        metrics = {"loss": loss.item(), "learning_rate": learning_rate, "grad_norm": grad_norm.item()}
        finish(metrics | run.speed(model, lengths, num_targets))

    run.export(model)


def summed_loss(model: Transformer, examples: list[Example], split: Split) -> torch.Tensor:
    """Returns the loss of this rank's rows, summed over their target tokens."""
    rows = forward_rows(model, examples, split)
    vocabulary = {"vocab_size": model.config.vocab_size, "tp": model.parallel.tp}
    return token_cross_entropy(rows.hidden, model.lm_head.weight, rows.labels, learnt=rows.learnt, **vocabulary)


@torch.no_grad()
def evaluate(model: Transformer, examples: Rows | PackedRows, split: Split) -> float:
    """Returns the mean loss over the target tokens of all rows, on all ranks. A collective."""
    total = torch.zeros((), device=model.inv_freq.device)
    for rows in split.shares(examples):
        total += summed_loss(model, rows, split)
    return split.sum(total).item() / examples.num_targets


def describe(examples: Rows) -> str:
    return f"{len(examples):,} records, {examples.num_tokens:,} tokens, {examples.num_targets:,} of them targets"


if __name__ == "__main__":
    run_script(main, SftArgs)
