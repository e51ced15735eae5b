"""Proximal policy optimisation: a policy learns from scores of its own answers, held near a reference by their KL.

- each update: draw answers with the generation engine (from an inference copy, refreshed in place), score them, take
  log-probs of policy and reference and the critic's values with the training models, then --ppo_epochs over shuffled
  minibatches with clipped losses
- token in, token out: what was drawn is what is learnt, the EOS action included; nothing is decoded and encoded again
- the KL is in the reward, k1 and unclamped (--kl_in reward), or in the loss, as the half square of the sequence's
  log-ratio (--kl_in loss): both have pi_ref exp(r / kl_coef) / Z as their optimum
- every number of an update is the same on all ranks, whatever the layout: answers and their log-probs are exchanged,
  so advantages are computed and whitened on the whole of them

Schulman et al. 2017 (arXiv 1707.06347); from human feedback: Ziegler et al. 2019 (1909.08593).

    python training/train_ppo.py --checkpoint_path runs/sft --reward_checkpoint_path runs/rm \\
        --prompt_file prompts.jsonl --output_dir runs/ppo
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from models.checkpoint import DTYPES, generation_eos_ids, has_score_head, save_folder, stored_dtype
from models.decode import can_pack, copy_for_inference, refresh
from models.fsdp import clip_grad_norm, full_tensors, init_mesh, load_for_training, load_frozen, reducing_gradients
from models.generation import Engine, SamplingParams
from models.model import ModelConfig, is_quantized, read_hf_config
from models.quantize import check_scheme, choose_scheme
from models.tp import is_main_rank
from training.common import (
    ArgumentParser,
    Stopwatch,
    add_group_size_argument,
    add_model_arguments,
    add_optimizer_arguments,
    add_parallel_arguments,
    add_run_arguments,
    card,
    check_finite,
    choose_runtime,
    device_name,
    fraction,
    non_negative_float,
    non_negative_int,
    number,
    open_folder,
    pad_id,
    peak_memory,
    positive_float,
    positive_int,
    progress_bar,
    run_script,
    say,
    split_batch,
)
from training.data import epoch_order
from training.losses import (
    adapted_kl_coef,
    gae,
    importance_weights,
    ppo_policy_loss,
    ppo_value_loss,
    sequence_kl_loss,
    shaped_rewards,
    whiten,
)
from training.optim import learning_rate_at, make_optimizer
from training.rewards import load_reward_function, open_reward_folder, scalar_head_config, score_answers
from training.rollouts import (
    Prompt,
    Rollout,
    TokenSums,
    answer_logps,
    answer_values,
    as_rows,
    check_first_minibatch,
    draw,
    load_prompts,
    objectives,
    over_ranks,
    prompt_numbers,
    shares,
    show_samples,
)
from training.run_dir import (
    CheckpointWriter,
    Metrics,
    StopSignal,
    begin_or_resume,
    check_installed,
    open_log,
    prepare_output_dir,
)


def parser() -> ArgumentParser:
    parser = ArgumentParser("Proximal policy optimisation of the model in a Hugging Face folder.")
    add_model_arguments(parser)
    add_run_arguments(parser)
    add_optimizer_arguments(parser)
    add_parallel_arguments(parser)
    parser.set_defaults(learning_rate=1e-6, lr_schedule="linear", adam_eps=1e-5)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--prompt_file", type=Path, required=True, help="records with a prompt; other fields go to --reward_fn")
    add("--eval_prompt_file", type=Path, default=None, help="held-out prompts: their mean score and KL")
    add("--overlong", choices=["refuse", "skip"], default="refuse", help="what to do with prompts that leave no room")
    add("--reward_checkpoint_path", type=Path, default=None, help="folder of a reward model")
    add(
        "--reward_fn", default=None, help="FILE.py:NAME, a function (prompts, completions, examples) -> list of numbers"
    )
    weight = number(float, least=-1e9, most=1e9)
    add("--reward_model_weight", type=weight, default=1.0, help="what the reward model's scores are multiplied by")
    add("--reward_fn_weight", type=weight, default=1.0, help="what the function's numbers are multiplied by")
    add("--normalize_reward", action=switch, default=False, help="scores less reward_mean, by reward_std of the folder")
    add(
        "--process_reward",
        choices=["min", "prod", "last", "mean", "steps"],
        default="min",
        help="of a process reward model: one of the steps' probabilities at the end, or each at its step's last token",
    )
    add("--missing_eos_penalty", type=positive_float, default=None, help="subtracted where an answer has no end; none")
    add("--length_penalty", type=non_negative_float, default=0.0, help="subtracted for each token of an answer")
    add(
        "--value_checkpoint_path",
        type=Path,
        default=None,
        help="where the critic starts; the reward model, or the policy with a zero head",
    )
    add("--ref_checkpoint_path", type=Path, default=None, help="the frozen reference; --checkpoint_path")
    for name in ("ref", "reward"):
        more = {"choices": ["none", "int8", "int4"], "default": "none"}
        add(f"--quantize_{name}", **more, help=f"round the weights of the {name} model, replicated over dp")
    add_group_size_argument(parser)
    add("--total_steps", type=non_negative_int, default=100, help="updates; 0 only exports")
    add("--rollout_batch_size", type=positive_int, default=64, help="answers per update, over all ranks")
    add("--minibatch_size", type=positive_int, default=None, help="answers per optimizer step; --rollout_batch_size")
    add("--ppo_epochs", type=positive_int, default=4, help="passes over the answers of an update")
    add("--rollout_slots", type=positive_int, default=None, help="answers drawn at a time on a rank; up to 128")
    add("--max_new_tokens", type=positive_int, default=256, help="most tokens of an answer")
    add("--temperature", type=number(float, least=1e-4, most=1e4), default=1.0, help="of the sampler and all log-probs")
    add("--kl_coef", type=non_negative_float, default=0.05, help="weight of the KL to the reference, in nats")
    add("--kl_in", choices=["reward", "loss"], default="reward", help="where the KL stands")
    add("--kl_target", type=positive_float, default=None, help="adapt --kl_coef to this KL of an answer; fixed")
    add("--kl_horizon", type=positive_float, default=10000.0, help="answers over which it adapts")
    add("--gamma", type=fraction, default=1.0, help="discount")
    add("--lam", type=fraction, default=0.95, help="lambda of the generalised advantage estimate")
    add("--cliprange", type=positive_float, default=0.2, help="how far a token's probability ratio may leave 1")
    add("--dual_clip", type=number(float, above=1), default=None, help="bound on the ratio of bad tokens; none")
    add("--cliprange_value", type=non_negative_float, default=0.2, help="how far a value may move; 0 is any distance")
    add("--vf_coef", type=positive_float, default=1.0, help="weight of the value loss")
    add("--value_learning_rate", type=non_negative_float, default=1e-5, help="peak learning rate of the critic")
    add("--entropy_coef", type=non_negative_float, default=0.0, help="bonus for the entropy of a token")
    add("--critic_warmup_steps", type=non_negative_int, default=0, help="updates in which the critic alone learns")
    add("--whiten_rewards", action=switch, default=False, help="rewards of deviation 1, their mean kept, as in TRL")
    add(
        "--tis_cap",
        type=number(float, least=1),
        default=None,
        help="weigh tokens by trainer / engine probability, at most this much (truncated importance sampling); off",
    )
    add("--num_eval_samples", type=non_negative_int, default=4, help="answers shown at each evaluation")
    add(
        "--debug_checks",
        action=switch,
        default=False,
        help="stop unless sampler and policy agree at first",
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
    eval_steps: int | None,
    save_steps: int | None,
    save_total_limit: int,
    log_steps: int,
    report_to: str,
    export_dtype: str | None,
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
    micro_batch_size: int | None,
    tensor_parallel_size: int,
    dp_replicate: int,
    sequence_parallel: bool,
    activation_checkpointing: str,
    sync_every_micro_batch: bool,
    cpu_offload: bool,
    prompt_file: Path,
    eval_prompt_file: Path | None,
    overlong: str,
    reward_checkpoint_path: Path | None,
    reward_fn: str | None,
    reward_model_weight: float,
    reward_fn_weight: float,
    normalize_reward: bool,
    process_reward: str,
    missing_eos_penalty: float | None,
    length_penalty: float,
    value_checkpoint_path: Path | None,
    ref_checkpoint_path: Path | None,
    quantize_ref: str,
    quantize_reward: str,
    group_size: int | None,
    total_steps: int,
    rollout_batch_size: int,
    minibatch_size: int | None,
    ppo_epochs: int,
    rollout_slots: int | None,
    max_new_tokens: int,
    temperature: float,
    kl_coef: float,
    kl_in: str,
    kl_target: float | None,
    kl_horizon: float,
    gamma: float,
    lam: float,
    cliprange: float,
    dual_clip: float | None,
    cliprange_value: float,
    vf_coef: float,
    value_learning_rate: float,
    entropy_coef: float,
    critic_warmup_steps: int,
    whiten_rewards: bool,
    tis_cap: float | None,
    num_eval_samples: int,
    debug_checks: bool,
) -> None:
    args = dict(locals())
    stop = StopSignal()
    minibatch_size = minibatch_size or rollout_batch_size
    if rollout_batch_size % minibatch_size:
        raise ValueError(f"--minibatch_size {minibatch_size} does not divide --rollout_batch_size {rollout_batch_size}")
    sizes = (minibatch_size, micro_batch_size, tensor_parallel_size, dp_replicate)
    dp_size, micro_batch_size = split_batch(*sizes, flag="--minibatch_size")
    if reward_checkpoint_path is None and reward_fn is None:
        raise ValueError("nothing to learn from: give a --reward_checkpoint_path, a --reward_fn, or both")
    if quantize_reward != "none" and reward_checkpoint_path is None:
        raise ValueError(f"--quantize_reward {quantize_reward} needs a --reward_checkpoint_path")
    if group_size is not None and "int4" not in (quantize_ref, quantize_reward):
        raise ValueError("--group_size is for --quantize_ref int4 and --quantize_reward int4")
    if eval_steps is not None and eval_prompt_file is None:
        raise ValueError("--eval_steps needs an --eval_prompt_file")
    if kl_target is not None and not kl_coef:
        raise ValueError(f"--kl_target {kl_target}: a --kl_coef of 0 is multiplied and stays 0; begin with another")
    if whiten_rewards and kl_in == "loss":
        raise ValueError("--whiten_rewards scales the rewards, and not the KL that --kl_in loss holds against them")
    check_installed(report_to)
    prepare_output_dir(output_dir, resume, args)

    # load: files and settings first, since they are quick to be wrong
    runtime = choose_runtime(device, dtype, compile)
    config, tokenizer, context = open_folder(checkpoint_path, None, tensor_parallel_size)
    hf_config = read_hf_config(checkpoint_path)[0]
    saved_dtype = DTYPES[export_dtype] if export_dtype else stored_dtype(checkpoint_path)
    judge = None
    if reward_checkpoint_path:
        judge = open_reward_folder(reward_checkpoint_path, checkpoint_path, tensor_parallel_size)
    function = load_reward_function(reward_fn) if reward_fn else None
    if max_new_tokens >= context:
        raise ValueError(
            f"--max_new_tokens {max_new_tokens} leaves no room for a prompt: the context is {context} tokens"
        )
    room = {"most": context - max_new_tokens, "vocab_size": config.vocab_size, "overlong": overlong}
    prompts, skipped = load_prompts(prompt_file, tokenizer, **room)
    held_out, held_out_skipped = load_prompts(eval_prompt_file, tokenizer, **room) if eval_prompt_file else ([], 0)
    ref_path = ref_checkpoint_path or checkpoint_path
    group_sizes = {"int4": group_size}
    ref_scheme = choose_scheme(ref_path, quantize_ref, group_sizes.get(quantize_ref), "--quantize_ref")
    reward_scheme = None
    if judge:
        reward_scheme = choose_scheme(
            judge.path, quantize_reward, group_sizes.get(quantize_reward), "--quantize_reward"
        )
    for path, scheme in ((ref_path, ref_scheme), (reward_checkpoint_path, reward_scheme)):
        if scheme is not None:
            check_scheme(scheme, ModelConfig.from_hf(path), runtime.device, runtime.dtype, tensor_parallel_size)
    value_path = value_checkpoint_path or (
        reward_checkpoint_path if judge and judge.same_tokenizer else checkpoint_path
    )
    longest = max(len(prompt.ids) for prompt in [*prompts, *held_out]) + max_new_tokens
    if value_checkpoint_path is None and is_quantized(read_hf_config(value_path)[0]):
        raise ValueError(
            f"--reward_checkpoint_path {value_path}: holds quantised weights, which are frozen, so the critic cannot "
            "start there; give the folder it was made from, or the policy's, as --value_checkpoint_path"
        )
    readers = {"critic": value_path, "reference": ref_path}
    if judge and judge.same_tokenizer:
        readers["reward model"] = judge.path
    for name, path in readers.items():
        other, *_ = open_folder(path, None, tensor_parallel_size, frozen=name != "critic")
        check_reader(name, other, path, config.vocab_size, longest)
    kind = judge.kind if judge else None
    if normalize_reward and (kind is None or kind.separator is not None or not kind.can_normalize()):
        raise ValueError("--normalize_reward needs a reward model whose config.json has reward_mean and reward_std")
    pad_token_id = pad_id(tokenizer, config)
    eos_ids = generation_eos_ids(checkpoint_path, default=tokenizer.eos_token_id)
    if not eos_ids:
        raise ValueError(f"{checkpoint_path}: no EOS token, so no answer would ever end")

    mesh = init_mesh(runtime.device, tensor_parallel_size, dp_replicate)
    placing = {"device": runtime.device, "compute_dtype": runtime.dtype, "compile": runtime.compile}
    placing["sequence_parallel"] = sequence_parallel
    learning = {"param_dtype": DTYPES[param_dtype], "recompute": activation_checkpointing, "cpu_offload": cpu_offload}
    # what the trained weights are rounded to, when stored or for the computation: policy = reference is exact
    frozen = {**placing, "param_dtype": torch.bfloat16 if param_dtype == "bfloat16" else runtime.dtype}
    policy = load_for_training(checkpoint_path, mesh, **placing, **learning)
    zero_head = None
    if not has_score_head(value_path):
        zero_head = torch.zeros(1, ModelConfig.from_hf(value_path).hidden_size)
    critic = load_for_training(value_path, mesh, **placing, **learning, head="score", new_score=zero_head)
    reference = load_frozen(ref_path, mesh, ref_scheme, **frozen)
    reward_model = None
    if judge is not None:
        reward_model = load_frozen(judge.path, mesh, reward_scheme, **frozen, head="score")
    settings = {"weight_decay": weight_decay, "betas": (adam_beta1, adam_beta2), "eps": adam_eps, "optim": optim}
    settings |= {"seed": seed, "compile": runtime.compile}
    optimizer = make_optimizer(policy, learning_rate=learning_rate, **settings)
    value_optimizer = make_optimizer(critic, learning_rate=value_learning_rate, **settings)
    trained = nn.ModuleDict({"policy": policy, "critic": critic})  # one checkpoint holds both,
    trained.register_buffer("kl_coef", torch.tensor(kl_coef, dtype=torch.float64))  # what adapts, and a count
    trained.register_buffer("num_tokens", torch.zeros((), dtype=torch.int64))
    optimizers = [optimizer, value_optimizer]
    first_step = begin_or_resume(output_dir, args, trained, optimizers, total_steps=total_steps, resume=resume)
    metrics = Metrics(output_dir, after_step=first_step - 1, report_to=report_to)
    in_background = runtime.device.type == "cuda" and not cpu_offload  # which would hold the state in memory twice
    checkpoints = CheckpointWriter(output_dir, trained, optimizers, limit=save_total_limit, asynchronous=in_background)
    log = open_log(output_dir / "samples.jsonl", first_step - 1) if is_main_rank() and held_out else None
    copy = copy_for_inference(policy, pack=not runtime.compile and can_pack(runtime.device, runtime.dtype))
    engine = Engine(
        copy,
        SamplingParams(temperature, seed=seed, stop_token_ids=eos_ids),
        num_slots=rollout_slots or min(128, -(-rollout_batch_size // dp_size)),
        max_seq_len=longest,
        tokenizer=tokenizer,
        compile=runtime.compile,
    )
    compute = str(runtime.dtype).removeprefix("torch.")
    rows = {
        "policy": f"{checkpoint_path}, {config.num_parameters() / 1e6:,.1f} M parameters",
        "reference": f"{ref_path}{f', {ref_scheme}' * (ref_scheme is not None)}",
        "critic": f"{value_path}{'' if zero_head is None else ', with a zero head'}",
        "reward": " + ".join(str(part) for part in (reward_checkpoint_path, reward_fn) if part)
        + f", {reward_scheme}" * (reward_scheme is not None),
        "device": f"{device_name(runtime.device)}, {compute} on {param_dtype} weights",
        "ranks": f"dp {dp_size}{f' ({dp_replicate} replicas)' * (dp_replicate > 1)} x tp {tensor_parallel_size}",
        "prompts": f"{len(prompts):,}, {skipped:,} too long; held out {len(held_out):,}, {held_out_skipped:,} too long",
        "updates": f"{first_step} to {total_steps}, {rollout_batch_size} answers each in {ppo_epochs} epochs of "
        f"{rollout_batch_size // minibatch_size} minibatches",
    }
    say(card("train_ppo", rows))

    dp = mesh["dp"]
    over = {"micro_batch_size": micro_batch_size, "dp": dp}
    scoring = {"judge": judge, "reward_model": reward_model, "function": function, "tokenizer": tokenizer, **over}
    scoring |= {"reward_model_weight": reward_model_weight, "reward_fn_weight": reward_fn_weight}
    scoring |= {"normalize": normalize_reward, "process_reward": process_reward}
    scoring |= {"missing_eos_penalty": missing_eos_penalty or 0.0, "length_penalty": length_penalty}

    def collect(chosen: list[Prompt], first: int, sample_idx: int) -> Rollout:
        """Answers to the prompts, scored, with the log-probs and values of the weights as they are now. first: number
        of the first answer, which with sample_idx decides the sampler's noise."""
        watch.lap()
        drawn = draw(engine, chosen, first, sample_idx, max_new_tokens, dp)
        rows, mask, engine_logps = as_rows(chosen, drawn, runtime.device)
        texts, finished, width = [answer.text for answer in drawn], [answer.finished for answer in drawn], mask.shape[1]
        seconds = {"rollout": watch.lap()}
        scores, step_rewards, num_cut = score_answers(chosen, rows, texts, finished, width, **scoring)
        seconds["score"] = watch.lap()
        with torch.no_grad():
            logps_of = partial(answer_logps, width=width, pad_token_id=pad_token_id, temperature=temperature)
            logps = over_ranks(rows, lambda part: logps_of(policy, part)[0], **over)
            ref_logps = over_ranks(rows, lambda part: logps_of(reference, part)[0], **over)
            values = over_ranks(rows, lambda part: answer_values(critic, part, width, pad_token_id), **over)
        seconds["logprobs"] = watch.lap()
        return Rollout(
            rows, texts, finished, mask, engine_logps, logps, ref_logps, values, scores, step_rewards, num_cut, seconds
        )

    # loop
    watch = Stopwatch(runtime.device)
    bar = progress_bar(total=total_steps, initial=first_step - 1, desc="updates", unit="update")
    for step in range(first_step, total_steps + 1):
        first = (step - 1) * rollout_batch_size
        numbers = prompt_numbers(len(prompts), first, rollout_batch_size, seed=seed)
        rollout = collect([prompts[i] for i in numbers], first, sample_idx=0)
        mask, width, coef = rollout.mask, rollout.mask.shape[1], float(trained.kl_coef)
        shaping = coef if kl_in == "reward" else 0.0
        rewards = shaped_rewards(rollout.scores, rollout.logps, rollout.ref_logps, mask, shaping) + rollout.step_rewards
        if whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, gamma, lam)
        spread = advantages[mask].std(correction=min(1, int(mask.sum()) - 1)).clamp(min=1e-4)
        advantages = whiten(advantages, mask)
        check_finite(step, numbers, rewards=rewards.sum(), advantages=advantages.sum())

        schedule = {"schedule": lr_schedule, "total_steps": total_steps, "warmup_ratio": warmup_ratio}
        for each, peak in ((optimizer, learning_rate), (value_optimizer, value_learning_rate)):
            for group in each.param_groups:
                group["lr"] = learning_rate_at(step, peak=peak, **schedule)
        sums = TokenSums(runtime.device)
        grad_norm = value_grad_norm = torch.zeros(())
        for epoch in range(ppo_epochs):
            order = epoch_order(rollout_batch_size, seed=seed, epoch=(step - 1) * ppo_epochs + epoch, shuffle=True)
            for start in range(0, rollout_batch_size, minibatch_size):
                chosen = order[start : start + minibatch_size]
                num_tokens = int(mask[chosen].sum())

                if step > critic_warmup_steps:
                    for part in reducing_gradients(
                        policy, shares(chosen, rollout.rows, **over), every=sync_every_micro_batch
                    ):
                        answers, m, count = [rollout.rows[i] for i in part], mask[part], len(part)
                        said = answer_logps(policy, answers, width, pad_token_id, temperature, entropy=True)
                        logps, entropies = said[0][:count], said[1][:count]  # no answers: a row of padding
                        old_logps = rollout.logps[part]
                        losses, seen = ppo_policy_loss(
                            logps[m], old_logps[m], advantages[part][m], cliprange=cliprange, dual_clip=dual_clip
                        )
                        if tis_cap is not None:
                            losses = losses * importance_weights(old_logps[m], rollout.engine_logps[part][m], tis_cap)
                        loss = losses.sum() - entropy_coef * entropies[m].sum()
                        if kl_in == "loss":  # in the units of the advantages, which are whitened
                            loss = loss + coef / spread * sequence_kl_loss((logps - rollout.ref_logps[part]) * m).sum()
                        (loss / num_tokens * dp_size).backward()  # FSDP averages gradients over dp
                        sums.add(loss=loss, policy=losses, entropy=entropies[m], clipped=seen.clipped)
                        sums.add(ratio=seen.ratio, ratio_square=seen.ratio.square(), approx_kl=seen.approx_kl)
                        sums.add(policy_tokens=torch.ones_like(losses))
                    if debug_checks and epoch == start == 0:
                        is_reference = step == critic_warmup_steps + 1 and ref_path.samefile(checkpoint_path)
                        is_reference = is_reference and ref_scheme is None
                        check_first_minibatch(sums.means(dp), rollout, runtime.dtype, is_reference=is_reference)
                    grad_norm = clip_grad_norm(policy, max_grad_norm)
                    check_finite(step, numbers, grad_norm=grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

                for part in reducing_gradients(
                    critic, shares(chosen, rollout.rows, **over), every=sync_every_micro_batch
                ):
                    answers, m = [rollout.rows[i] for i in part], mask[part]
                    values = answer_values(critic, answers, width, pad_token_id)[: len(part)]
                    losses, clipped = ppo_value_loss(
                        values[m], rollout.values[part][m], returns[part][m], cliprange_value=cliprange_value
                    )
                    (vf_coef * losses.sum() / num_tokens * dp_size).backward()
                    sums.add(value=losses, value_clipped=clipped, value_tokens=torch.ones_like(losses))
                value_grad_norm = clip_grad_norm(critic, max_grad_norm)
                check_finite(step, numbers, value_grad_norm=value_grad_norm)
                value_optimizer.step()
                value_optimizer.zero_grad(set_to_none=True)
        update_seconds = watch.lap()
        refresh(copy, policy)
        refresh_seconds = watch.lap()

        # log
        means, found = sums.means(dp), objectives(rollout, coef)
        if kl_target is not None:
            kl = found["objective/kl"]
            trained.kl_coef.fill_(adapted_kl_coef(coef, kl, kl_target, rollout_batch_size, kl_horizon))
        drawn = int(mask.sum())
        trained.num_tokens += drawn
        seconds = {**rollout.seconds, "update": update_seconds, "refresh": refresh_seconds}
        line = {
            "step": step,
            "loss": means["loss"] + vf_coef * means["value"],
            "learning_rate": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm.item(),
            "value_grad_norm": value_grad_norm.item(),
            "episode": first + rollout_batch_size,
            **found,
            "policy/approxkl_avg": means["approx_kl"],
            "policy/clipfrac_avg": means["clipped"],
            "policy/entropy_avg": means["entropy"],
            "loss/policy_avg": means["policy"],
            "loss/value_avg": means["value"],
            "val/clipfrac_avg": means["value_clipped"],
            "val/ratio": means["ratio"],
            "val/ratio_var": means["ratio_square"] - means["ratio"] ** 2,
            "kl_coef": coef,
            "num_tokens": int(trained.num_tokens),
            "tokens_per_second": drawn / sum(seconds.values()),
            "rollout_tokens_per_second": drawn / seconds["rollout"],
            "update_tokens_per_second": ppo_epochs * drawn / seconds["update"],
            **{f"time/{name}": value for name, value in seconds.items()},
        }
        evaluate_now = held_out and (step == total_steps or (eval_steps and step % eval_steps == 0))
        if evaluate_now:
            evaluation = collect(held_out, 0, sample_idx=1)  # other noise than training's, the same each time
            line |= {f"eval_{name}": value for name, value in objectives(evaluation, coef).items()}
            if log is not None:
                bar.write(show_samples(step, held_out, evaluation, num_eval_samples, log))
            watch.lap()
        if evaluate_now or step % log_steps == 0 or step == total_steps:
            metrics.write(line)
        score, rate = line["objective/scores"], line["tokens_per_second"]
        bar.set_postfix_str(f"score {score:.3f}, KL {line['objective/kl']:.3f}, {rate:,.0f} tok/s", refresh=False)
        bar.update(1)

        # save
        stopping = stop.agreed(runtime.device)
        if stopping or (save_steps and (step % save_steps == 0 or step == total_steps)):
            checkpoints.save(step)
        if stopping:
            checkpoints.finish()
            bar.close()
            metrics.close()
            say(f"stopped by a signal after update {step}; go on with --resume")
            return
    checkpoints.finish()
    bar.close()
    metrics.close()

    exporting = {"copy_from": checkpoint_path, "dtype": saved_dtype}
    critic_config = scalar_head_config(read_hf_config(value_path)[0], pad_token_id)
    save_folder(output_dir / "critic", full_tensors(critic), config=critic_config, **exporting)
    save_folder(output_dir, full_tensors(policy), config=hf_config, **exporting)
    say(f"{output_dir}: policy written, its critic in critic/; peak memory {peak_memory(runtime.device) / 1e9:,.2f} GB")


def check_reader(name: str, config: ModelConfig, path: Path, vocab_size: int, longest: int) -> None:
    """Raises ValueError unless the model can read the policy's rows."""
    if config.vocab_size != vocab_size:
        raise ValueError(f"{path}: a {name} reads the policy's tokens, and this one has another vocabulary")
    if config.max_position_embeddings < longest:
        raise ValueError(
            f"{path}: a {name} reads rows of {longest} tokens, and this one's context is "
            f"{config.max_position_embeddings}; lower --max_new_tokens or take another folder"
        )


if __name__ == "__main__":
    run_script(main, parser())
