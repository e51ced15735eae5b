"""Supervised fine-tuning: next-token cross entropy on completions, from one Hugging Face folder to another.

- records: prompt + completion, chat messages (loss on the assistant's turns), or plain text; training/data.py
- the loss of a step is the mean over all its learnt tokens, whatever the micro-batches
- fp32 master weights, or bf16 ones rounded stochastically; bf16 or fp32 computation

    python training/finetune_sft.py --checkpoint_path DIR --train_file train.jsonl --output_dir runs/sft
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from models.checkpoint import DTYPES, generation_eos_ids, save_folder, stored_dtype
from models.fsdp import clip_grad_norm, full_tensors, init_mesh, load_for_training, reducing_gradients
from models.generation import SamplingParams
from models.model import Transformer, causal_attention, document_attention, read_hf_config
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
    open_folder,
    pad_id,
    peak_memory,
    progress_bar,
    run_script,
    say,
    split_batch,
    throughput,
)
from training.data import (
    EncodingCounts,
    Example,
    collate,
    encode_sft_file,
    micro_batches,
    training_batches,
)
from training.data import (
    pack as pack_rows,
)
from training.losses import token_cross_entropy
from training.optim import learning_rate_at, make_optimizer
from training.run_dir import (
    CheckpointWriter,
    Metrics,
    StopSignal,
    begin_or_resume,
    check_installed,
    prepare_output_dir,
)
from training.samples import EvalSamples, add_sample_arguments, prompts_of


def parser() -> ArgumentParser:
    parser = ArgumentParser("Supervised fine-tuning of the model in a Hugging Face folder.")
    add_model_arguments(parser)
    add_training_arguments(parser)
    add_sample_arguments(parser)
    parser.add_argument(
        "--pack",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="put several records into each row of --max_seq_len tokens; they do not see each other",
    )
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
    num_eval_samples: int,
    eval_max_new_tokens: int,
    eval_temperature: float,
    pack: bool,
) -> None:
    args = dict(locals())
    stop = StopSignal()
    dp_size, micro_batch_size = split_batch(batch_size, micro_batch_size, tensor_parallel_size, dp_replicate)
    if eval_steps is not None and eval_file is None:
        raise ValueError("--eval_steps needs an --eval_file")
    check_installed(report_to)
    prepare_output_dir(output_dir, resume, args)

    # load: the data first, since it is quick to be wrong
    runtime = choose_runtime(device, dtype, compile)
    config, tokenizer, max_seq_len = open_folder(checkpoint_path, max_seq_len, tensor_parallel_size)
    hf_config = read_hf_config(checkpoint_path)[0]
    saved_dtype = DTYPES[export_dtype] if export_dtype else stored_dtype(checkpoint_path)
    limits = {"vocab_size": config.vocab_size, "max_seq_len": max_seq_len, "overlong": overlong}
    train, counts = encode_sft_file(train_file, tokenizer, **limits)
    evaluation, eval_counts = encode_sft_file(eval_file, tokenizer, **limits) if eval_file else ([], None)
    train_notes = describe(train, counts)
    if pack:
        train = pack_rows(train, max_seq_len)
        filled = sum(len(row.input_ids) for row in train) / (len(train) * max_seq_len)
        train_notes += f"; packed into {len(train):,} rows, {filled:.1%} full"
    pad_token_id = pad_id(tokenizer, config)
    eos_ids = generation_eos_ids(checkpoint_path, default=tokenizer.eos_token_id)
    sampling = SamplingParams(eval_temperature, seed=seed, stop_token_ids=eos_ids)

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
    samples = None
    if evaluation and num_eval_samples:
        samples = EvalSamples(
            model,
            tokenizer,
            prompts_of(evaluation, num_eval_samples),
            sampling,
            max_new_tokens=eval_max_new_tokens,
            runtime=runtime,
            output_dir=output_dir,
            after_step=first_step - 1,
        )
    compute = str(runtime.dtype).removeprefix("torch.")
    rows = {
        "model": f"{checkpoint_path}, {config.num_parameters() / 1e6:,.1f} M parameters",
        "device": f"{device_name(runtime.device)}, {compute} on {param_dtype} weights",
        "optimizer": optim,
        "ranks": f"dp {dp_size}{f' ({dp_replicate} replicas)' * (dp_replicate > 1)} x tp {tensor_parallel_size}",
        "train": train_notes,
        "steps": f"{first_step} to {total_steps}, {batch_size} rows each in micro-batches of {micro_batch_size}",
    }
    say(card("finetune_sft", rows | ({"eval": describe(evaluation, eval_counts)} if evaluation else {})))

    # loop
    order = {"seed": seed, "shuffle": shuffle}
    before = training_batches(len(train), batch_size, **order, first_step=1, last_step=first_step - 1)
    num_tokens = sum(len(train[i].input_ids) for _, numbers in before for i in numbers)
    watch = Stopwatch(runtime.device)
    bar = progress_bar(total=total_steps, initial=first_step - 1, desc="training", unit="step")
    for step, numbers in training_batches(
        len(train), batch_size, **order, first_step=first_step, last_step=total_steps
    ):
        batch = [train[i] for i in numbers]
        num_targets = max(1, sum(example.num_targets for example in batch))
        loss = torch.zeros((), device=runtime.device)
        mine = micro_batches(batch, micro_batch_size, mesh["dp"].get_local_rank(), dp_size)
        for examples in reducing_gradients(model, mine, every=sync_every_micro_batch):
            micro_loss = summed_loss(model, examples, pad_token_id) / num_targets
            (micro_loss * dp_size).backward()  # FSDP averages gradients over dp
            loss += micro_loss.detach()
        dist.all_reduce(loss, group=mesh["dp"].get_group())
        grad_norm = clip_grad_norm(model, max_grad_norm)
        check_finite(step, numbers, loss=loss, grad_norm=grad_norm)
        lr = learning_rate_at(
            step, peak=learning_rate, schedule=lr_schedule, total_steps=total_steps, warmup_ratio=warmup_ratio
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # log
        lengths = [n for example in batch for n in example.lengths or [len(example.input_ids)]]
        num_tokens += sum(lengths)
        line = {
            "step": step,
            "loss": loss.item(),
            "learning_rate": lr,
            "grad_norm": grad_norm.item(),
            "num_tokens": num_tokens,
            **throughput(config, runtime.device, lengths, watch.lap()),
        }
        evaluate_now = evaluation and (step == total_steps or (eval_steps and step % eval_steps == 0))
        if evaluate_now:
            line["eval_loss"] = evaluate(model, evaluation, micro_batch_size, pad_token_id, mesh["dp"])
            check_finite(step, numbers, eval_loss=line["eval_loss"])
            if is_main_rank():
                bar.write(f"step {step}: eval_loss {line['eval_loss']:.4f}")
            if samples is not None:
                samples.show(step, bar.write)
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

    save_folder(
        output_dir,
        full_tensors(model),
        config=hf_config,
        copy_from=checkpoint_path,
        dtype=saved_dtype,
    )
    say(f"{output_dir}: model written; peak memory {peak_memory(runtime.device) / 1e9:,.2f} GB")


def summed_loss(model: Transformer, examples: list[Example], pad_token_id: int) -> torch.Tensor:
    """The loss of this rank's rows, summed over their learnt tokens."""
    multiple_of = size_of(model.parallel.tp) if model.parallel.sequence_parallel else 1
    device = model.inv_freq.device
    batch = collate(examples, pad_token_id, device, multiple_of)
    attend = causal_attention
    if batch.lengths is not None:
        dtype = model.compute_dtype or model.embed_tokens.weight.dtype
        attend = document_attention(batch.lengths, batch.input_ids.shape[1], device, dtype, model.config.head_dim)
    hidden = model(batch.input_ids, batch.position_ids, attend)
    vocabulary = {"vocab_size": model.config.vocab_size, "tp": model.parallel.tp}
    return token_cross_entropy(hidden, model.lm_head.weight, batch.labels, **vocabulary)


@torch.no_grad()
def evaluate(
    model: Transformer, examples: list[Example], micro_batch_size: int, pad_token_id: int, dp: DeviceMesh
) -> float:
    """The mean loss over all learnt tokens, over all ranks."""
    total = torch.zeros((), device=model.inv_freq.device)
    for rows in micro_batches(examples, micro_batch_size, dp.get_local_rank(), dp.size()):
        total += summed_loss(model, rows, pad_token_id)
    dist.all_reduce(total, group=dp.get_group())
    return total.item() / sum(example.num_targets for example in examples)


def describe(examples: list[Example], counts: EncodingCounts) -> str:
    tokens = sum(len(example.input_ids) for example in examples)
    learnt = sum(example.num_targets for example in examples)
    parts = [f"{len(examples):,} records, {tokens:,} tokens, {learnt:,} of them learnt"]
    parts += [f"{count:,} {name.replace('_', ' ')}" for name, count in counts._asdict().items() if count]
    return "; ".join(parts)


if __name__ == "__main__":
    run_script(main, parser())
