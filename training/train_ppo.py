"""Proximal policy optimisation: a policy learns from scores of its own answers; a KL term keeps it near a reference.

- each update: sample answers with the generation engine (on an inference copy, refreshed in place), score them, compute
  the log-probs of policy and reference and the critic's values with the training models, then take --ppo_epochs passes
  over shuffled minibatches with clipped losses
- token in, token out: the sampled token ids are trained on, EOS included; nothing is decoded and encoded again
- the KL is in the reward, k1 and unclamped (--kl_in reward), or in the loss, as half the square of the sequence's
  log-ratio (--kl_in loss): both have the optimum pi_ref exp(r / kl_coef) / Z
- every number of an update is the same on all ranks, whatever the layout: ranks exchange answers and log-probs, so
  that each rank computes and whitens the advantages of all answers

Schulman et al. 2017 (arXiv 1707.06347); from human feedback: Ziegler et al. 2019 (1909.08593).

    python training/train_ppo.py --checkpoint_path runs/sft --reward_checkpoint_path runs/rm \\
        --prompt_file prompts.jsonl --output_dir runs/ppo
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

import torch
from torch import Tensor, nn

from models.batches import Split
from models.checkpoint import open_folder
from models.common import (
    Bounds,
    Stopwatch,
    at_least_one,
    card,
    flag,
    fraction,
    non_negative,
    positive,
    refuse_idle,
    say,
)
from models.export import scalar_head_files
from models.fsdp import ParallelArgs, clip_grad_norm, init_mesh, loss_scale, reducing_gradients, split_batch
from models.generation import Engine
from models.model import Transformer
from models.records import Example
from models.resting import resting
from models.script import run_script
from models.shared_base import as_reference
from models.trained_adapters import choose_lora
from training.critic import CriticArgs, choose_critic, critic_note, load_with_critic
from training.divergence import Divergence, DivergenceArgs
from training.frozen import ReferenceArgs, check_context, check_rl_flags, open_frozen
from training.losses import (
    adapted_kl_coef,
    gae,
    importance_weights,
    kl_k3,
    ppo_policy_loss,
    ppo_value_loss,
    sequence_kl_loss,
    shaped_rewards,
    whiten,
)
from training.optim import OptimArgs, make_optimizer, set_learning_rate
from training.prompts import Prompt, RolloutArgs, load_prompt_files, prompt_numbers
from training.rewards import RewardArgs, Scorer, Scores, load_reward_functions, source_metrics
from training.rollouts import (
    TokenSums,
    all_logps,
    all_values,
    answer_logps,
    answer_values,
    as_rows,
    check_first_minibatch,
    draw,
    make_engine,
    minibatches,
    pass_rates,
    rows_at,
    say_what_is_not_clipped,
)
from training.run_dir import Run, RunArgs
from training.samples import SampleLog


@dataclass(frozen=True, kw_only=True)
class PpoArgs(RunArgs, RolloutArgs, RewardArgs, ReferenceArgs, CriticArgs, DivergenceArgs, OptimArgs, ParallelArgs):
    """Proximal policy optimisation of the model in a Hugging Face folder."""

    learning_rate: float = 1e-6
    lr_schedule: str = "linear"
    adam_eps: float = 1e-5
    ppo_epochs: int = flag(4, bounds=at_least_one, help="passes over the answers of an update")
    kl_coef: float = flag(0.05, bounds=non_negative, help="weight of the KL to the reference, in nats")
    kl_in: str = flag("reward", choices=("reward", "loss"), help="add the KL to the reward or to the loss")
    kl_target: float | None = flag(None, bounds=positive, help="adapt --kl_coef to this KL per answer; default: off")
    kl_horizon: float = flag(10000.0, bounds=positive, help="with --kl_target: answers over which --kl_coef adapts")
    gamma: float = flag(1.0, bounds=fraction, help="discount factor")
    lam: float = flag(0.95, bounds=fraction, help="lambda of generalised advantage estimation")
    cliprange: float = flag(0.2, bounds=positive, help="clip a token's probability ratio to 1 +- this")
    dual_clip: float | None = flag(None, bounds=Bounds(above=1), help="cap on ratios with advantage < 0; default: none")
    cliprange_value: float = flag(0.2, bounds=non_negative, help="clip a value to its old value +- this; 0: unclipped")
    vf_coef: float = flag(1.0, bounds=positive, help="weight of the value loss")
    entropy_coef: float = flag(0.0, bounds=non_negative, help="weight of the entropy bonus")
    critic_warmup_steps: int = flag(0, bounds=non_negative, help="updates at the start that train only the critic")
    whiten_rewards: bool = flag(False, help="scale rewards to standard deviation 1, keeping their mean, as TRL does")
    tis_cap: float | None = flag(
        None,
        bounds=at_least_one,
        help="truncated importance sampling: weight tokens by min(p_trainer / p_engine, this); default: off",
    )
    debug_checks: bool = flag(
        False, help="stop unless engine and policy agree before each update of the policy", may_change=True
    )


def main(args: PpoArgs) -> None:
    check_flags(args)
    dp_size, micro_batch_size = split_batch(args, args.step_size, "--minibatch_size")
    run = Run(args)

    # load: files and settings first, so that a mistake in them shows before the models are loaded
    runtime = run.runtime
    folder = open_folder(args.checkpoint_path, None, args.tensor_parallel_size, today=run.today)
    own_reference = args.ref_checkpoint_path is None
    lora = choose_lora(args, args.checkpoint_path, runtime, with_critic=args.shared_base, with_reference=own_reference)
    functions = load_reward_functions(args)
    frozen = open_frozen(args, folder, runtime)
    value_path = choose_critic(args, folder, runtime, lora, frozen.reward)
    critic_files = scalar_head_files(folder, value_path)
    data = load_prompt_files(args, folder)
    frozen.check_prompts(data)
    check_context("critic", value_path, data.longest, lower="--max_new_tokens")

    mesh = init_mesh(runtime.device, args.tensor_parallel_size, args.dp_replicate)
    split = Split(micro_batch_size, mesh["dp"], folder.pad_token_id, args.max_tokens_per_micro_batch, run.stop.check)
    base, policy, critic = load_with_critic(args, mesh, runtime, lora, frozen.reward, value_path)
    reference, reward_model = frozen.load(args, mesh, runtime, base)
    models = Models(policy, critic, reference)
    scorer = Scorer(args, folder.tokenizer, frozen.reward, reward_model, functions, split, run.stop)
    divergence = Divergence(args, folder.config.vocab_size, "a higher --kl_coef, --kl_target", run.stop)
    optimizer = make_optimizer(policy, args, seed=args.seed, compile=runtime.compile)
    value_optimizer = make_optimizer(critic, args, seed=args.seed, compile=runtime.compile)
    trained = nn.ModuleDict({"policy": policy, "critic": critic})  # one checkpoint holds both and these buffers
    trained.register_buffer("kl_coef", torch.tensor(args.kl_coef, dtype=torch.float64))
    trained.register_buffer("num_tokens", torch.zeros((), dtype=torch.int64))
    run.begin(trained, [optimizer, value_optimizer], total_steps=args.total_steps)
    if args.kl_target is None or "kl_coef" in run.changed:
        trained.kl_coef.fill_(args.kl_coef)
    if run.first_step > 1 and "reward_fn" not in run.changed:  # without grades no update is completed
        scorer.graded.update(scorer.pooled)
    sizes = {"max_seq_len": data.longest, "dp_size": dp_size}
    engine = make_engine(policy, folder, args, **sizes, runtime=runtime, critic=critic)
    sample_log = SampleLog(run, folder.tokenizer)
    about = {
        "policy": folder if lora is None else f"{folder}; {lora}",
        "critic": critic_note(args, value_path),
        **frozen.notes(args),
        "stop tokens": folder.stop_tokens(),
        "device": f"{runtime} on {args.param_dtype} weights, {args.optim}",
        "ranks": args.ranks(),
        **data.notes,
        "rollouts": f"{engine.num_slots} slots of {engine.cache_len} tokens over {engine.pool.num_pages:,} pages on "
        "each dp rank",
        "updates": f"{run.span()}, {args.rollout_batch_size} answers each in "
        f"{args.ppo_epochs} epochs of minibatches of {args.step_size}, {split.note()}"
        + (f"; in the first {args.critic_warmup_steps} the critic alone learns" if args.critic_warmup_steps else ""),
    }
    say(card("train_ppo", about))

    def evaluate() -> dict[str, float]:
        G = args.num_generations_eval
        asked = [prompt for prompt in data.held_out for _ in range(G)]
        rollout = collect(models, engine, scorer, asked, 0, sample_idx=1)  # the same noise each time, not training's
        sample_log.show(asked, rollout.texts, rollout.finished, score=rollout.all_scores(), KL=rollout.kls())
        metrics = objectives(rollout, float(trained.kl_coef)) | pass_rates(rollout.scores.checked, G)
        return {f"eval_{name}": x for name, x in metrics.items()}

    def finish(metrics: dict[str, float]) -> None:
        if data.held_out and run.eval_due:
            with run.evaluating(metrics):
                metrics |= evaluate()
        run.log(metrics, "objective/scores", "objective/kl", due=divergence.ends(metrics.get("objective/kl", 0.0)))
        if run.export_due:
            export(run, policy, critic, critic_files, Path(run.step_folder))
        if run.step >= run.first_step or run.interrupted:
            kl, tokens = metrics.get("objective/kl", 0.0), metrics.get("completion_length", 1.0)
            of_token = {"entropy": "policy/entropy_avg", "approx_kl": "policy/approxkl_avg"}
            divergence.look(run.step, kl=kl, tokens=tokens, **{key: metrics.get(x, 0.0) for key, x in of_token.items()})

    if data.held_out and run.first_step == 1 and args.total_steps:
        run.log_start(evaluate())
    if run.unfinished:
        finish(run.unfinished)

    # loop
    for step in run.updates():
        first = (step - 1) * args.rollout_batch_size
        run.numbers = prompt_numbers(len(data.train), first, args.rollout_batch_size, seed=args.seed)
        rollout = collect(models, engine, scorer, [data.train[i] for i in run.numbers], first, sample_idx=0)
        update = targets_of(rollout, args, float(trained.kl_coef))
        run.check_finite(rewards=update.rewards.sum(), advantages=update.advantages.sum())

        learning_rate = set_learning_rate(optimizer, args, step, args.total_steps)
        set_learning_rate(value_optimizer, args, step, args.total_steps, peak=args.value_learning_rate)
        watch, sums = Stopwatch(runtime.device), TokenSums(runtime.device)
        grad_norm = value_grad_norm = torch.zeros(())
        with resting(engine, args.sleep):
            for i, minibatch in enumerate(minibatches(args, step, args.ppo_epochs)):
                if step > args.critic_warmup_steps:
                    scale = policy_backward(policy, update, minibatch, args, split, sums)
                    if args.debug_checks and i == 0 and any(update.num_learnt[j] for j in minibatch):
                        others = {"engine": rollout.engine_logps}
                        if step == args.critic_warmup_steps + 1 and args.ref_is_start(frozen.ref_scheme):
                            others["reference"] = rollout.ref_logps
                        check_first_minibatch(sums.means(split), rollout.logps, others, rollout.mask, runtime.dtype)
                    grad_norm = clip_grad_norm(policy, args.max_grad_norm, scale)
                    run.check_finite(grad_norm=grad_norm)
                    run.begin_update()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

                scale = value_backward(critic, update, minibatch, args, split, sums)
                value_grad_norm = clip_grad_norm(critic, args.max_grad_norm, scale)
                run.check_finite(value_grad_norm=value_grad_norm)
                run.begin_update()
                value_optimizer.step()
                value_optimizer.zero_grad(set_to_none=True)
        seconds = {**rollout.seconds, "update": watch.lap()}
        engine.refresh(policy)
        seconds["refresh"] = watch.lap()

        trained.num_tokens += int(rollout.mask.sum())
        metrics = update_metrics(rollout, update, sums.means(split), args, seconds)
        metrics.update(learning_rate=learning_rate, grad_norm=grad_norm.item(), value_grad_norm=value_grad_norm.item())
        metrics.update(episode=first + args.rollout_batch_size, num_tokens=int(trained.num_tokens))
        if args.kl_target is not None and step > args.critic_warmup_steps:  # before, the KL is 0
            kl, answers = metrics["objective/kl"], args.rollout_batch_size
            trained.kl_coef.fill_(adapted_kl_coef(update.kl_coef, kl, args.kl_target, answers, args.kl_horizon))
        finish(metrics)

    scorer.close()
    export(run, policy, critic, critic_files)


def check_flags(args: PpoArgs) -> None:
    """Raises ValueError for flags that contradict each other."""
    check_rl_flags(args)
    if args.shared_base and not args.uses_lora:
        raise ValueError("--shared_base is for LoRA: give --lora_r or --adapter_path")
    if args.shared_base and args.value_checkpoint_path is not None:
        raise ValueError("--shared_base: the critic uses the policy's base; leave --value_checkpoint_path out")
    if args.kl_target is not None and not args.kl_coef:
        raise ValueError(
            f"--kl_target {args.kl_target} scales --kl_coef, and a --kl_coef of 0 would stay 0; take a positive one"
        )
    if args.kl_target is not None and args.kl_horizon <= 0.2 * args.rollout_batch_size:
        raise ValueError(
            f"--kl_horizon {args.kl_horizon} counts answers: one update of {args.rollout_batch_size} could take "
            "--kl_coef to 0 or below it; take more than a fifth of --rollout_batch_size"
        )
    if args.kl_target is None:
        refuse_idle(args, "without a --kl_target, to which --kl_coef adapts", "kl_horizon")
    if not args.kl_coef:
        refuse_idle(args, "with --kl_coef 0", "kl_in")
    if args.whiten_rewards and args.kl_in == "loss":
        raise ValueError("--whiten_rewards would not scale the KL of --kl_in loss; take --kl_in reward")
    say_what_is_not_clipped(args, args.ppo_epochs, "cliprange", "dual_clip", "cliprange_value")
    if 0 < args.total_steps <= args.critic_warmup_steps:
        warmup = f"--critic_warmup_steps {args.critic_warmup_steps}"
        say(f"{warmup}: the critic alone learns in all {args.total_steps} updates; the policy will not learn")


def export(
    run: Run,
    policy: Transformer,
    critic: Transformer,
    critic_files: tuple[dict, dict[str, dict]],
    subfolder: Path = Path(),
) -> None:
    """Writes the policy and the critic. critic_files: of scalar_head_files."""
    config, changes = critic_files
    run.export(critic, config, json_changes=changes, what="critic", subfolder=str(subfolder / "critic"))
    run.export(policy, what="policy", subfolder=str(subfolder))


# ------------------------------------------------------------------------------------------ the answers


class Models(NamedTuple):
    policy: Transformer
    critic: Transformer
    reference: Transformer


class Rollout(NamedTuple):
    """The answers of an update, the same on all ranks. A answers, R tokens of the longest one."""

    rows: list[Example]  # prompt and answer, with labels on the answer, its EOS included
    texts: list[str]
    finished: list[bool]  # whether the answer ended by itself, rather than at --max_new_tokens
    mask: Tensor  # bool [A, R]: the tokens of the answers
    engine_logps: Tensor  # log-probs of the engine, fp32 [A, R], 0 outside the mask
    logps: Tensor  # the same of the policy in training
    ref_logps: Tensor  # the same of the reference
    scores: Scores
    seconds: dict[str, float]
    values: Tensor  # the critic's values, fp32 [A, R]

    def kls(self) -> Tensor:
        """Returns the log-ratio to the reference of each answer, fp32 [A]; their mean estimates the KL."""
        return ((self.logps - self.ref_logps) * self.mask).sum(1)

    def all_scores(self) -> Tensor:
        """Returns the score of each answer, step rewards included, fp32 [A]; NaN for a skipped answer."""
        return self.scores.total + self.scores.step_rewards.sum(1)


def collect(
    models: Models, engine: Engine, scorer: Scorer, prompts: list[Prompt], first: int, sample_idx: int
) -> Rollout:
    """Samples answers to the prompts (see draw), scores them, and adds log-probs and values of the current weights."""
    args, split, device = scorer.args, scorer.split, engine.device
    watch = Stopwatch(device)
    answers = draw(engine, scorer, prompts, first, sample_idx)
    rows, mask, engine_logps = as_rows(prompts, answers, device)
    texts, finished, width = [a.text for a in answers], [a.finished for a in answers], mask.shape[1]
    seconds = {"rollout": watch.lap()}
    with resting(engine, min(args.sleep, 1)):  # not its weights, which no refresh may follow
        scores = scorer.score(prompts, rows, texts, finished)
        seconds["score"] = watch.lap()
        logps = all_logps(models.policy, rows, width, split, args.temperature)
        with as_reference(models.reference):
            ref_logps = all_logps(models.reference, rows, width, split, args.temperature)
        values = all_values(models.critic, rows, width, split)
        seconds["logprobs"] = watch.lap()
    return Rollout(rows, texts, finished, mask, engine_logps, logps, ref_logps, scores, seconds, values)


# ------------------------------------------------------------------------------------------ an update


class Update(NamedTuple):
    """The training targets of an update. Token tensors are fp32 [A, R], 0 outside `learnt`."""

    rollout: Rollout
    learnt: Tensor  # bool [A, R]: the tokens of answers that have a reward
    rewards: Tensor  # shaped, and whitened with --whiten_rewards
    advantages: Tensor  # whitened
    returns: Tensor  # what the critic is trained towards
    spread: Tensor  # standard deviation of the advantages before whitening
    kl_coef: float
    num_learnt: list[int]  # learnt tokens of each answer


def targets_of(rollout: Rollout, args: PpoArgs, kl_coef: float) -> Update:
    """Computes rewards, advantages and returns of all answers that have a reward; the same on all ranks."""
    scores, shaping = rollout.scores.total, kl_coef if args.kl_in == "reward" else 0.0
    mask = rollout.mask & ~scores.isnan()[:, None]
    rewards = shaped_rewards(scores, rollout.logps, rollout.ref_logps, mask, shaping) + rollout.scores.step_rewards
    if args.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.values, mask, args.gamma, args.lam)
    num_learnt = mask.sum(dim=1).tolist()
    total = sum(num_learnt)  # 0 if every answer is skipped
    spread = advantages[mask].std(correction=min(1, total - 1)) if total else advantages.new_ones(())
    spread = spread.clamp(min=1e-4)
    return Update(rollout, mask, rewards, whiten(advantages, mask), returns, spread, kl_coef, num_learnt)


def policy_backward(
    policy: Transformer, update: Update, minibatch: list[int], args: PpoArgs, split: Split, sums: TokenSums
) -> float:
    """Accumulates the gradient of a minibatch's clipped policy loss, a mean over its tokens on all ranks. Returns the
    factor that the gradients must still be multiplied by (see loss_scale)."""
    rollout, width = update.rollout, update.learnt.shape[1]
    scale = loss_scale(max(1, sum(update.num_learnt[i] for i in minibatch)), split.dp.size())
    parts = split.numbers(rollout.rows, minibatch)
    for part in reducing_gradients(policy, parts, every=args.sync_every_micro_batch):
        answers, of_part = [rollout.rows[i] for i in part], rows_at(part, rollout.mask.device)
        mask, old_logps = of_part(update.learnt), of_part(rollout.logps)  # [n, R]
        logps, entropies = answer_logps(policy, answers, width, split, args.temperature, entropy=True)
        losses, stats = ppo_policy_loss(
            logps, old_logps, of_part(update.advantages), cliprange=args.cliprange, dual_clip=args.dual_clip
        )
        if args.tis_cap is not None:
            losses = losses * importance_weights(old_logps - of_part(rollout.engine_logps), args.tis_cap)
        losses = losses * mask
        loss = losses.sum()
        if args.entropy_coef:
            loss = loss - args.entropy_coef * (entropies * mask).sum()
        if args.kl_in == "loss":  # divided by the factor that whitening divided the advantages by
            log_ratios = (logps - of_part(rollout.ref_logps)) * mask
            loss = loss + update.kl_coef / update.spread * sequence_kl_loss(log_ratios).sum()
        (loss * scale.loss).backward()
        clipped, ratio, approx_kl = stats.clipped * mask, stats.ratio * mask, stats.approx_kl * mask
        num_tokens = sum(update.num_learnt[i] for i in part)
        sums.add(num_tokens, loss=loss, policy=losses, entropy=entropies * mask, clipped=clipped)
        sums.add(num_tokens, ratio=ratio, ratio_square=ratio.square(), approx_kl=approx_kl)
    return scale.gradients


def value_backward(
    critic: Transformer, update: Update, minibatch: list[int], args: PpoArgs, split: Split, sums: TokenSums
) -> float:
    """As policy_backward, for the clipped value loss of the critic."""
    rollout, width = update.rollout, update.learnt.shape[1]
    scale = loss_scale(max(1, sum(update.num_learnt[i] for i in minibatch)), split.dp.size())
    parts = split.numbers(rollout.rows, minibatch)
    for part in reducing_gradients(critic, parts, every=args.sync_every_micro_batch):
        answers, of_part = [rollout.rows[i] for i in part], rows_at(part, rollout.mask.device)
        mask, old_values, returns = of_part(update.learnt), of_part(rollout.values), of_part(update.returns)  # [n, R]
        values = answer_values(critic, answers, width, split)
        losses, clipped = ppo_value_loss(values, old_values, returns, cliprange_value=args.cliprange_value)
        losses = losses * mask
        (args.vf_coef * losses.sum() * scale.loss).backward()
        sums.add(sum(update.num_learnt[i] for i in part), value=losses, value_clipped=clipped * mask)
    return scale.gradients


# ------------------------------------------------------------------------------------------ metrics


def update_metrics(
    rollout: Rollout, update: Update, means: dict[str, float], args: PpoArgs, seconds: dict[str, float]
) -> dict[str, float]:
    """Returns the metrics of an update, under TRL's names. means: from TokenSums; those of a policy that did not train
    yet are missing and logged as 0."""
    policy = {name: means.get(name, 0.0) for name in ("loss", "policy", "entropy", "clipped", "approx_kl")}
    ratio, ratio_square = means.get("ratio", 0.0), means.get("ratio_square", 0.0)
    num_tokens = int(rollout.mask.sum())
    return {
        "loss": policy["loss"] + args.vf_coef * means["value"],
        **objectives(rollout, update.kl_coef),
        "policy/approxkl_avg": policy["approx_kl"],
        "policy/clipfrac_avg": policy["clipped"],
        "policy/entropy_avg": policy["entropy"],
        "loss/policy_avg": policy["policy"],
        "loss/value_avg": means["value"],
        "val/clipfrac_avg": means["value_clipped"],
        "val/ratio": ratio,
        "val/ratio_var": ratio_square - ratio**2,
        "kl_coef": update.kl_coef,
        "tokens_per_second": num_tokens / sum(seconds.values()),
        "rollout_tokens_per_second": num_tokens / seconds["rollout"],
        "update_tokens_per_second": args.ppo_epochs * num_tokens / seconds["update"],
        **{f"time/{name}": value for name, value in seconds.items()},
    }


def objectives(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """Returns the metrics of a rollout, under TRL's names. An answer's KL and entropy are sums over its tokens."""
    mask, kl, scores = rollout.mask, rollout.kls().mean().item(), rollout.all_scores()
    graded = scores[~scores.isnan()]
    score = graded.mean().item() if len(graded) else 0.0
    gap = (rollout.logps - rollout.engine_logps)[mask].abs()
    return {
        "objective/kl": kl,
        "objective/k3": (kl_k3(rollout.logps, rollout.ref_logps) * mask).sum(1).mean().item(),
        "objective/entropy": -(rollout.logps * mask).sum(1).mean().item(),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": score - kl_coef * kl,
        "objective/scores": score,
        "val/num_eos_tokens": sum(rollout.finished),
        "val/num_cut_for_reward": rollout.scores.num_cut,
        "rewards/num_skipped": len(scores) - len(graded),
        "completion_length": mask.sum(1).double().mean().item(),
        "engine/logprob_gap_mean": gap.mean().item(),
        "engine/logprob_gap_max": gap.max().item(),
        **source_metrics([rollout.scores]),
    }


if __name__ == "__main__":
    run_script(main, PpoArgs)
