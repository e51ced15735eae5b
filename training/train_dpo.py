"""Direct preference optimisation: pairs of answers, without a reward model, from one Hugging Face folder to another.

- records: prompt, chosen, rejected, as text or chat messages; training/preferences.py
- losses: sigmoid (DPO, cDPO), ipo, ipo_avg, hinge, robust, simpo, rpo; training/losses.py has formulae and sources
- chosen and rejected go through one forward; the loss of a step is the mean over all its pairs, whatever the
  micro-batches
- the reference is frozen: its log-probs are computed once before training (training/reference.py), or in each step

    python training/train_dpo.py --checkpoint_path DIR --train_file pairs.jsonl --output_dir runs/dpo

Dimensions: B pairs.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from models.checkpoint import DTYPES, generation_eos_ids, save_folder, stored_dtype
from models.fsdp import (
    check_divisible,
    clip_grad_norm,
    full_tensors,
    init_mesh,
    load_for_training,
    load_frozen,
    reducing_gradients,
)
from models.generation import SamplingParams
from models.model import ModelConfig, Transformer, read_hf_config
from models.quantize import check_scheme, choose_scheme
from models.tp import is_main_rank, size_of
from training.common import (
    ArgumentParser,
    Stopwatch,
    add_group_size_argument,
    add_model_arguments,
    add_training_arguments,
    card,
    check_finite,
    choose_runtime,
    device_name,
    non_negative_float,
    number,
    open_folder,
    pad_id,
    peak_memory,
    positive_float,
    progress_bar,
    run_script,
    say,
    split_batch,
    throughput,
)
from training.data import micro_batches, training_batches
from training.losses import DPO_LOSSES, REFERENCE_FREE, SMOOTHED, DPOLoss, dpo_loss, sequence_logps, token_logps
from training.optim import learning_rate_at, make_optimizer
from training.preferences import Pair, PreferenceCounts, collate_pairs, encode_pair_file, pair_length
from training.reference import precompute, weights_digest
from training.run_dir import (
    CheckpointWriter,
    Metrics,
    StopSignal,
    begin_or_resume,
    check_installed,
    prepare_output_dir,
)
from training.samples import EvalSamples, add_sample_arguments, prompts_of

# means over pairs, by TRL's names
REFERENCE_TOLERANCE = {False: 1e-4, True: 2e-2}
MEANS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def parser() -> ArgumentParser:
    parser = ArgumentParser("Direct preference optimisation of the model in a Hugging Face folder.")
    add_model_arguments(parser)
    add_training_arguments(parser)
    add_sample_arguments(parser)
    parser.set_defaults(learning_rate=1e-6)
    add = parser.add_argument
    add("--loss", choices=DPO_LOSSES, default="sigmoid", help="what is minimised over pairs")
    add("--beta", type=positive_float, default=0.1, help="how near to the reference to stay; with simpo: the scale")
    add(
        "--label_smoothing",
        type=number(float, least=0, most=0.5),
        default=0.0,
        help="the share of pairs believed to be the wrong way round; not for ipo, ipo_avg and hinge",
    )
    add("--simpo_gamma", type=non_negative_float, default=None, help="simpo: the margin wanted; 0.5")
    add("--rpo_alpha", type=non_negative_float, default=None, help="rpo: weight of the chosen side's likelihood; 1")
    add(
        "--ref_checkpoint_path",
        type=Path,
        default=None,
        help="folder of the reference; the model that training starts at",
    )
    add(
        "--precompute_ref",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the reference's log-probs once before training; else in each step, with a second model in memory",
    )
    add("--quantize_ref", choices=["none", "int8", "int4"], default="none", help="round the reference's weights")
    add_group_size_argument(parser)
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
    loss: str,
    beta: float,
    label_smoothing: float,
    simpo_gamma: float | None,
    rpo_alpha: float | None,
    ref_checkpoint_path: Path | None,
    precompute_ref: bool,
    quantize_ref: str,
    group_size: int | None,
) -> None:
    args = dict(locals())
    stop = StopSignal()
    dp_size, micro_batch_size = split_batch(batch_size, micro_batch_size, tensor_parallel_size, dp_replicate)
    if eval_steps is not None and eval_file is None:
        raise ValueError("--eval_steps needs an --eval_file")
    check_loss(loss, label_smoothing, simpo_gamma, rpo_alpha, ref_checkpoint_path, quantize_ref)
    check_installed(report_to)
    prepare_output_dir(output_dir, resume, args)

    # load: the data first, since it is quick to be wrong
    runtime = choose_runtime(device, dtype, compile)
    config, tokenizer, max_seq_len = open_folder(checkpoint_path, max_seq_len, tensor_parallel_size)
    ref_folder = ref_checkpoint_path or checkpoint_path
    if ref_checkpoint_path is not None:
        check_reference(ref_checkpoint_path, config, max_seq_len, tensor_parallel_size)
    ref_scheme = choose_scheme(ref_folder, quantize_ref, group_size, flag="--quantize_ref")
    if ref_scheme is not None:
        shape = ModelConfig.from_hf(ref_folder)
        check_scheme(ref_scheme, shape, runtime.device, runtime.dtype, tensor_parallel_size)
    hf_config = read_hf_config(checkpoint_path)[0]
    saved_dtype = DTYPES[export_dtype] if export_dtype else stored_dtype(checkpoint_path)
    limits = {"vocab_size": config.vocab_size, "max_seq_len": max_seq_len, "overlong": overlong}
    train, counts = encode_pair_file(train_file, tokenizer, **limits)
    evaluation, eval_counts = encode_pair_file(eval_file, tokenizer, **limits) if eval_file else ([], None)
    pad_token_id = pad_id(tokenizer, config)
    eos_ids = generation_eos_ids(checkpoint_path, default=tokenizer.eos_token_id)
    sampling = SamplingParams(eval_temperature, seed=seed, stop_token_ids=eos_ids)
    steps_per_epoch = -(-len(train) // batch_size)
    total_steps = num_epochs * steps_per_epoch if max_steps is None else max_steps
    order = {"seed": seed, "shuffle": shuffle}

    mesh = init_mesh(runtime.device, tensor_parallel_size, dp_replicate)
    placing = {"device": runtime.device, "compute_dtype": runtime.dtype, "compile": runtime.compile}
    placing |= {"sequence_parallel": sequence_parallel, "cpu_offload": cpu_offload}
    # the reference: rounded as the policy is, so that equal weights give equal log-probs, or quantised
    ref_dtype = torch.bfloat16 if param_dtype == "bfloat16" else runtime.dtype
    load_reference = partial(load_frozen, ref_folder, mesh, ref_scheme, **placing, param_dtype=ref_dtype)
    is_start = ref_checkpoint_path is None and ref_scheme is None
    uses_reference = loss not in REFERENCE_FREE and total_steps > 0

    def precompute_with(reference: Transformer) -> None:
        key = {"weights": weights_digest(ref_folder, runtime.device), "dtypes": f"{ref_dtype}, {runtime.dtype}"}
        key |= {} if ref_scheme is None else {"quantised": str(ref_scheme)}
        options = {"micro_batch_size": micro_batch_size, "dp": mesh["dp"], "device": runtime.device, "key": key}
        options["tolerance"] = REFERENCE_TOLERANCE[torch.bfloat16 in (runtime.dtype, ref_dtype)]
        first_epoch = training_batches(
            len(train), batch_size, **order, first_step=1, last_step=min(total_steps, steps_per_epoch)
        )
        splits = {"train": (train, [numbers for _, numbers in first_epoch])}
        splits |= {"eval": (evaluation, eval_batches(evaluation, batch_size))} if evaluation else {}
        for name, (pairs, batches) in splits.items():
            path = output_dir / f"ref_logps_{name}.safetensors"
            with torch.no_grad():
                precompute(lambda rows: pair_logps(reference, rows, pad_token_id)[0], pairs, batches, path, **options)
        if isinstance(reference, FSDPModule):
            reference.reshard()  # else the next forward would use the head and the embedding gathered here

    if uses_reference and precompute_ref and not is_start:
        precompute_with(load_reference())
    learning = {"param_dtype": DTYPES[param_dtype], "recompute": activation_checkpointing}
    model = load_for_training(checkpoint_path, mesh, **placing, **learning)
    if uses_reference and precompute_ref and is_start:
        precompute_with(model)  # which it is until its first step, and until a checkpoint is read
    reference = load_reference() if uses_reference and not precompute_ref else None

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
    first_step = begin_or_resume(output_dir, args, model, optimizer, total_steps=total_steps, resume=resume)
    metrics = Metrics(output_dir, after_step=first_step - 1, report_to=report_to)
    in_background = runtime.device.type == "cuda" and not cpu_offload  # which would hold the state in memory twice
    checkpoints = CheckpointWriter(output_dir, model, optimizer, limit=save_total_limit, asynchronous=in_background)
    samples = None
    if evaluation and num_eval_samples:
        samples = EvalSamples(
            model,
            tokenizer,
            prompts_of([pair.chosen for pair in evaluation], num_eval_samples),
            sampling,
            max_new_tokens=eval_max_new_tokens,
            runtime=runtime,
            output_dir=output_dir,
            after_step=first_step - 1,
        )
    loss_of = partial(
        dpo_loss,
        loss,
        beta=beta,
        label_smoothing=label_smoothing,
        simpo_gamma=0.5 if simpo_gamma is None else simpo_gamma,
        rpo_alpha=1.0 if rpo_alpha is None else rpo_alpha,
    )
    compute = str(runtime.dtype).removeprefix("torch.")
    rows = {
        "model": f"{checkpoint_path}, {config.num_parameters() / 1e6:,.1f} M parameters",
        "reference": f"{ref_folder}, {f'{ref_scheme}, ' * (ref_scheme is not None)}"
        f"{'before training' if precompute_ref else 'in each step'}"
        if uses_reference
        else "none",
        "loss": f"{loss}, beta {beta}",
        "device": f"{device_name(runtime.device)}, {compute} on {param_dtype} weights",
        "optimizer": optim,
        "ranks": f"dp {dp_size}{f' ({dp_replicate} replicas)' * (dp_replicate > 1)} x tp {tensor_parallel_size}",
        "train": describe(train, counts),
        "steps": f"{first_step} to {total_steps}, {batch_size} pairs each in micro-batches of {micro_batch_size}",
    }
    say(card("train_dpo", rows | ({"eval": describe(evaluation, eval_counts)} if evaluation else {})))

    # loop
    before = training_batches(len(train), batch_size, **order, first_step=1, last_step=first_step - 1)
    num_tokens = sum(sum(row_lengths([train[i] for i in numbers])) for _, numbers in before)
    watch = Stopwatch(runtime.device)
    bar = progress_bar(total=total_steps, initial=first_step - 1, desc="training", unit="step")
    for step, numbers in training_batches(
        len(train), batch_size, **order, first_step=first_step, last_step=total_steps
    ):
        batch = [train[i] for i in numbers]
        sums = torch.zeros(1 + len(MEANS), device=runtime.device)
        mine = micro_batches(batch, micro_batch_size, mesh["dp"].get_local_rank(), dp_size, key=pair_length)
        for pairs in reducing_gradients(model, mine, every=sync_every_micro_batch):
            micro_loss, micro_sums = summed_loss(model, reference, pairs, loss_of, pad_token_id)
            (micro_loss / len(batch) * dp_size).backward()  # FSDP averages gradients over dp
            sums += micro_sums
        dist.all_reduce(sums, group=mesh["dp"].get_group())
        means = named_means(sums, len(batch))
        grad_norm = clip_grad_norm(model, max_grad_norm)
        check_finite(step, numbers, loss=means["loss"], grad_norm=grad_norm)
        lr = learning_rate_at(
            step, peak=learning_rate, schedule=lr_schedule, total_steps=total_steps, warmup_ratio=warmup_ratio
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # log
        lengths = row_lengths(batch)
        num_tokens += sum(lengths)
        speed = throughput(config, runtime.device, lengths, watch.lap())
        if "mfu" in speed and reference is not None:
            speed["mfu"] *= 4 / 3  # its forward costs a third of the policy's forward and backward
        line = {
            "step": step,
            **means,
            "learning_rate": lr,
            "grad_norm": grad_norm.item(),
            "num_tokens": num_tokens,
            **speed,
        }
        evaluate_now = evaluation and (step == total_steps or (eval_steps and step % eval_steps == 0))
        if evaluate_now:
            batches = eval_batches(evaluation, batch_size)
            found = evaluate(model, reference, evaluation, batches, micro_batch_size, loss_of, pad_token_id, mesh["dp"])
            check_finite(step, numbers, eval_loss=found["loss"])
            line |= {f"eval_{name}": value for name, value in found.items()}
            if is_main_rank():
                right = found["rewards/accuracies"]
                bar.write(f"step {step}: eval_loss {found['loss']:.4f}, {right:.1%} of the pairs in the right order")
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


def check_loss(
    loss: str,
    label_smoothing: float,
    simpo_gamma: float | None,
    rpo_alpha: float | None,
    ref_checkpoint_path: Path | None,
    quantize_ref: str,
) -> None:
    """Raises ValueError for flags that do not go together."""
    if label_smoothing and loss not in SMOOTHED:
        raise ValueError(f"--label_smoothing has no meaning for --loss {loss}; it is for {', '.join(SMOOTHED)}")
    if loss == "robust" and label_smoothing == 0.5:
        raise ValueError("--label_smoothing 0.5: --loss robust needs less, since it divides by 1 - 2 * label_smoothing")
    for name, value, wanted in (("simpo_gamma", simpo_gamma, "simpo"), ("rpo_alpha", rpo_alpha, "rpo")):
        if value is not None and loss != wanted:
            raise ValueError(f"--{name} is for --loss {wanted}, not for {loss}")
    if ref_checkpoint_path is not None and loss in REFERENCE_FREE:
        raise ValueError(f"--ref_checkpoint_path: --loss {loss} has no reference; leave one of them out")
    if quantize_ref != "none" and loss in REFERENCE_FREE:
        raise ValueError(f"--quantize_ref: --loss {loss} has no reference; leave one of them out")


def check_reference(folder: Path, config: ModelConfig, max_seq_len: int, tensor_parallel_size: int) -> None:
    """Raises ValueError if a folder's model cannot judge the policy's tokens."""
    reference = ModelConfig.from_hf(folder)
    check_divisible(reference, tensor_parallel_size)
    if reference.vocab_size != config.vocab_size:
        raise ValueError(
            f"--ref_checkpoint_path {folder}: has a vocabulary of {reference.vocab_size}, the policy one of "
            f"{config.vocab_size}; they must share a tokenizer"
        )
    if reference.max_position_embeddings < max_seq_len:
        raise ValueError(
            f"--ref_checkpoint_path {folder}: its context is {reference.max_position_embeddings} tokens, the longest "
            f"row may have {max_seq_len}; lower --max_seq_len"
        )


def pair_logps(model: Transformer, pairs: list[Pair], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """(log-probability of each completion, number of its tokens), [2, B] each: the chosen ones, then the rejected
    ones. EOS is one of the tokens."""
    multiple_of = size_of(model.parallel.tp) if model.parallel.sequence_parallel else 1
    batch = collate_pairs(pairs, pad_token_id, model.inv_freq.device, multiple_of)
    vocabulary = {"vocab_size": model.config.vocab_size, "tp": model.parallel.tp}
    logps, _ = token_logps(model(batch.input_ids), model.lm_head.weight, batch.labels, **vocabulary)
    logps, lengths = sequence_logps(logps, batch.labels)
    return logps.view(2, -1)[:, : len(pairs)], lengths.view(2, -1)[:, : len(pairs)]


def summed_loss(
    model: Transformer,
    reference: Transformer | None,
    pairs: list[Pair],
    loss_of: Callable[..., DPOLoss],
    pad_token_id: int,
) -> tuple[Tensor, Tensor]:
    """(the loss of this rank's pairs, summed; the sums of it and of MEANS over the pairs, without a gradient).

    reference: None where the pairs hold its log-probs, or the loss wants none."""
    logps, lengths = pair_logps(model, pairs, pad_token_id)
    if reference is None:
        ref_logps = torch.tensor([pair.reference for pair in pairs], device=logps.device).view(-1, 2).T
    else:
        with torch.no_grad():
            ref_logps, _ = pair_logps(reference, pairs, pad_token_id)
    found = loss_of(*logps, *ref_logps, *lengths)
    margins = found.chosen_rewards - found.rejected_rewards
    rewards = (found.chosen_rewards, found.rejected_rewards, (margins > 0).float(), margins)
    sums = torch.stack([found.losses.detach(), *rewards, *logps.detach()]).sum(dim=1)
    return found.losses.sum(), sums


def named_means(sums: Tensor, num_pairs: int) -> dict[str, float]:
    return dict(zip(("loss", *MEANS), (sums / num_pairs).tolist()))


def eval_batches(pairs: list[Pair], batch_size: int) -> list[list[int]]:
    """The rows of an evaluation, by length: the same for each evaluation and for the reference."""
    rows = sorted(range(len(pairs)), key=lambda i: pair_length(pairs[i]))
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


@torch.no_grad()
def evaluate(
    model: Transformer,
    reference: Transformer | None,
    pairs: list[Pair],
    batches: list[list[int]],
    micro_batch_size: int,
    loss_of: Callable[..., DPOLoss],
    pad_token_id: int,
    dp: DeviceMesh,
) -> dict[str, float]:
    """The mean loss and MEANS over all pairs, over all ranks."""
    sums = torch.zeros(1 + len(MEANS), device=model.inv_freq.device)
    for numbers in batches:
        batch = [pairs[i] for i in numbers]
        for rows in micro_batches(batch, micro_batch_size, dp.get_local_rank(), dp.size(), key=pair_length):
            sums += summed_loss(model, reference, rows, loss_of, pad_token_id)[1]
    dist.all_reduce(sums, group=dp.get_group())
    return named_means(sums, len(pairs))


def row_lengths(pairs: list[Pair]) -> list[int]:
    return [len(side.input_ids) for pair in pairs for side in (pair.chosen, pair.rejected)]


def describe(pairs: list[Pair], counts: PreferenceCounts) -> str:
    parts = [f"{len(pairs):,} pairs, {sum(row_lengths(pairs)):,} tokens"]
    parts += [f"{count:,} {name.replace('_', ' ')}" for name, count in counts._asdict().items() if count]
    return "; ".join(parts)


if __name__ == "__main__":
    run_script(main, parser())
