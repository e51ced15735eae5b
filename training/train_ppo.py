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

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models.adapters import choose_lora
from models.checkpoint import Folder, folder_config, has_score_head, model_folder, open_folder, refuse_quantized
from models.common import (
    Bounds,
    Runtime,
    Stopwatch,
    at_least_one,
    card,
    choose_runtime,
    flag,
    fraction,
    non_negative,
    positive,
    refuse_idle,
    run_script,
    say,
)
from models.fsdp import (
    ParallelArgs,
    clip_grad_norm,
    init_mesh,
    load_for_training,
    loss_scale,
    reducing_gradients,
    split_batch,
)
from models.generation import Engine
from models.lora import CRITIC, Lora
from models.model import ModelConfig, Transformer, is_quantized, read_hf_config
from models.pad_token import choose_pad_token, pad_changes
from models.records import Split
from models.resting import resting
from models.reward import scalar_head_config
from models.shared_base import OnSharedBase, as_reference
from training.data import epoch_order
from training.divergence import Divergence, DivergenceArgs
from training.frozen import Frozen, ReferenceArgs, check_reader, check_rl_flags, open_frozen
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
from training.optim import OptimArgs, make_optimizer, set_learning_rate
from training.prompts import Prompt, RolloutArgs, load_prompt_files, prompt_numbers
from training.rewards import RewardArgs, RewardFolder, Scorer, load_reward_functions
from training.rollouts import (
    Rollout,
    TokenSums,
    all_logps,
    answer_logps,
    answer_values,
    as_rows,
    check_first_minibatch,
    draw,
    make_engine,
    objectives,
    over_ranks,
    pass_rates,
    rows_at,
    shares,
)
from training.run_dir import Run, RunArgs
from training.samples import SampleLog


@dataclass(frozen=True, kw_only=True)
class PpoArgs(RunArgs, RolloutArgs, RewardArgs, ReferenceArgs, DivergenceArgs, OptimArgs, ParallelArgs):
    """Proximal policy optimisation of the model in a Hugging Face folder."""

    learning_rate: float = 1e-6
    lr_schedule: str = "linear"
    adam_eps: float = 1e-5
    ppo_epochs: int = flag(4, bounds=at_least_one, help="passes over the answers of an update")
    value_checkpoint_path: Path | None = flag(
        None, type=model_folder, help="where the critic starts; the reward model, or the policy with a zero head"
    )
    shared_base: bool = flag(False, help="with LoRA: the critic is adapters and a head of its own on the policy's base")
    value_learning_rate: float = flag(1e-5, bounds=non_negative, help="peak learning rate of the critic")
    kl_coef: float = flag(0.05, bounds=non_negative, help="weight of the KL to the reference, in nats")
    kl_in: str = flag("reward", choices=("reward", "loss"), help="where the KL stands")
    kl_target: float | None = flag(None, bounds=positive, help="adapt --kl_coef to this KL of an answer; fixed")
    kl_horizon: float = flag(10000.0, bounds=positive, help="answers over which it adapts")
    gamma: float = flag(1.0, bounds=fraction, help="discount")
    lam: float = flag(0.95, bounds=fraction, help="lambda of the generalised advantage estimate")
    cliprange: float = flag(0.2, bounds=positive, help="how far a token's probability ratio may leave 1")
    dual_clip: float | None = flag(None, bounds=Bounds(above=1), help="bound on the ratio of bad tokens; none")
    cliprange_value: float = flag(0.2, bounds=non_negative, help="how far a value may move; 0 is any distance")
    vf_coef: float = flag(1.0, bounds=positive, help="weight of the value loss")
    entropy_coef: float = flag(0.0, bounds=non_negative, help="bonus for the entropy of a token")
    critic_warmup_steps: int = flag(0, bounds=non_negative, help="updates in which the critic alone learns")
    whiten_rewards: bool = flag(False, help="rewards of deviation 1, their mean kept, as in TRL")
    tis_cap: float | None = flag(
        None,
        bounds=at_least_one,
        help="weigh tokens by trainer / engine probability, at most this much (truncated importance sampling); off",
    )
    debug_checks: bool = flag(False, help="stop unless sampler and policy agree at first", may_change=True)


def main(args: PpoArgs) -> None:
    check_flags(args)
    dp_size, micro_batch_size = split_batch(args, args.step_size, "--minibatch_size")
    run = Run(args)

    # load: files and settings first, since they are quick to be wrong
    runtime = choose_runtime(args)
    folder = open_folder(args.checkpoint_path, None, args.tensor_parallel_size, today=run.today)
    own_reference = args.ref_checkpoint_path is None
    lora = choose_lora(args, args.checkpoint_path, runtime, with_critic=args.shared_base, with_reference=own_reference)
    functions = load_reward_functions(args)
    data = load_prompt_files(args, folder)
    frozen = open_frozen(args, folder, data, runtime)
    value_path = choose_critic(args, folder, frozen, data.longest)

    mesh = init_mesh(runtime.device, args.tensor_parallel_size, args.dp_replicate)
    split = Split(micro_batch_size, mesh["dp"], folder.pad_token_id, args.max_tokens_per_micro_batch, run.stop.check)
    models = load_models(args, mesh, runtime, lora, frozen, value_path)
    policy, critic = models.policy, models.critic
    scorer = Scorer(args, folder.tokenizer, frozen.reward, models.reward_model, functions, split, run.stop)
    divergence = Divergence(args, folder.config.vocab_size, "a higher --kl_coef, --kl_target", run.stop)
    optimizer = make_optimizer(policy, args, seed=args.seed, compile=runtime.compile)
    value_optimizer = make_optimizer(
        critic, args, learning_rate=args.value_learning_rate, seed=args.seed, compile=runtime.compile
    )
    trained = nn.ModuleDict({"policy": policy, "critic": critic})  # one checkpoint holds both,
    trained.register_buffer("kl_coef", torch.tensor(args.kl_coef, dtype=torch.float64))  # what adapts, and a count
    trained.register_buffer("num_tokens", torch.zeros((), dtype=torch.int64))
    run.begin(trained, [optimizer, value_optimizer], total_steps=args.total_steps, device=runtime.device)
    if args.kl_target is None or "kl_coef" in run.changed:
        trained.kl_coef.fill_(args.kl_coef)
    engine = make_engine(policy, folder, args, max_seq_len=data.longest, dp_size=dp_size, runtime=runtime)
    sample_log = SampleLog(args, run, folder.tokenizer)
    about = {
        "policy": folder if lora is None else f"{folder}; {lora}",
        "critic": f"{value_path}{'' if has_score_head(value_path) else ', with a zero head'}"
        + ", adapters on the policy's base" * args.shared_base,
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
        run.log(metrics, "objective/scores", "objective/kl")
        if run.export_due:
            export(run, models, folder, value_path, Path(run.step_folder))

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
        is_first = step == args.critic_warmup_steps + 1  # of the policy
        with resting(engine, args.sleep):
            for epoch in range(args.ppo_epochs):
                number = (step - 1) * args.ppo_epochs + epoch
                order = epoch_order(args.rollout_batch_size, seed=args.seed, epoch=number, shuffle=True)
                for start in range(0, args.rollout_batch_size, args.step_size):
                    minibatch = order[start : start + args.step_size]
                    if step > args.critic_warmup_steps:
                        scale = policy_backward(policy, update, minibatch, args, split, sums)
                        if args.debug_checks and epoch == start == 0:
                            is_reference = is_first and frozen.ref_is_start(args)
                            means = sums.means(split.dp)
                            check_first_minibatch(means, rollout, runtime.dtype, is_reference=is_reference)
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
        metrics = update_metrics(rollout, update, sums.means(split.dp), args, seconds)
        metrics.update(learning_rate=learning_rate, grad_norm=grad_norm.item(), value_grad_norm=value_grad_norm.item())
        metrics.update(episode=first + args.rollout_batch_size, num_tokens=int(trained.num_tokens))
        if args.kl_target is not None:
            kl, answers = metrics["objective/kl"], args.rollout_batch_size
            trained.kl_coef.fill_(adapted_kl_coef(update.kl_coef, kl, args.kl_target, answers, args.kl_horizon))
        finish(metrics)
        of_token = {"entropy": metrics["policy/entropy_avg"], "approx_kl": metrics["policy/approxkl_avg"]}
        divergence.look(step, kl=metrics["objective/kl"], tokens=metrics["completion_length"], **of_token)

    scorer.close()
    export(run, models, folder, value_path)


def export(run: Run, models: "Models", folder: Folder, value_path: Path, subfolder: Path = Path()) -> None:
    """Writes policy and critic, which has a pad token that ends no row. value_path: where the critic began."""
    pad = choose_pad_token(folder)
    config, changes = scalar_head_config(folder_config(value_path), pad.id), pad_changes(folder.path, pad)
    run.export(models.critic, config, json_changes=changes, what="critic", subfolder=str(subfolder / "critic"))
    run.export(models.policy, what="policy", subfolder=str(subfolder))


# ------------------------------------------------------------------------------------------ an update


class Update(NamedTuple):
    """What the minibatches of an update learn from."""

    rollout: Rollout
    learnt: Tensor  # bool [A, R]: the tokens of the answers that have a reward
    rewards: Tensor  # fp32 [A, R] each, 0 outside them: shaped and maybe whitened,
    advantages: Tensor  # whitened,
    returns: Tensor  # of the critic
    spread: Tensor  # deviation of the advantages before they were whitened
    kl_coef: float
    num_learnt: list[int]  # of each answer


def collect(
    models: "Models", engine: Engine, scorer: Scorer, prompts: list[Prompt], first: int, sample_idx: int
) -> Rollout:
    """Answers to the prompts (see draw), scored, with the log-probs and values of the weights as they are now."""
    args, split, device = scorer.args, scorer.split, engine.device
    watch = Stopwatch(device)
    answers = draw(engine, scorer, prompts, first, sample_idx)
    rows, mask, engine_logps = as_rows(prompts, answers, device)
    texts, finished, width = [a.text for a in answers], [a.finished for a in answers], mask.shape[1]
    seconds = {"rollout": watch.lap()}
    scores = scorer.score(prompts, rows, texts, finished)
    seconds["score"] = watch.lap()

    logps = all_logps(models.policy, rows, width, split, args.temperature)
    with as_reference(models.reference):
        ref_logps = all_logps(models.reference, rows, width, split, args.temperature)
    with torch.no_grad():
        values = over_ranks(rows, lambda part: answer_values(models.critic, part, width, split), split)
    seconds["logprobs"] = watch.lap()
    return Rollout(rows, texts, finished, mask, engine_logps, logps, ref_logps, scores, seconds, values)


def targets_of(rollout: Rollout, args: PpoArgs, kl_coef: float) -> Update:
    """Rewards, advantages and returns of all answers that have a reward, so the same on all ranks."""
    scores, shaping = rollout.scores.total, kl_coef if args.kl_in == "reward" else 0.0
    mask = rollout.mask & ~scores.isnan()[:, None]
    rewards = shaped_rewards(scores, rollout.logps, rollout.ref_logps, mask, shaping) + rollout.scores.step_rewards
    if args.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.values, mask, args.gamma, args.lam)
    num_learnt = mask.sum(dim=1).tolist()
    total = sum(num_learnt)  # none, where every answer is skipped
    spread = advantages[mask].std(correction=min(1, total - 1)) if total else advantages.new_ones(())
    spread = spread.clamp(min=1e-4)
    return Update(rollout, mask, rewards, whiten(advantages, mask), returns, spread, kl_coef, num_learnt)


def policy_backward(
    policy: Transformer, update: Update, minibatch: list[int], args: PpoArgs, split: Split, sums: TokenSums
) -> float:
    """The gradient of the clipped policy loss of a minibatch, a mean over its tokens on all ranks, but for the factor
    that it returns (see loss_scale)."""
    rollout, width = update.rollout, update.learnt.shape[1]
    scale = loss_scale(max(1, sum(update.num_learnt[i] for i in minibatch)), split.dp.size())
    parts = shares(minibatch, rollout.rows, split)
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
        if args.kl_in == "loss":  # in the units of the advantages, which are whitened
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
    """The gradient of the clipped value loss of a minibatch, a mean over its tokens on all ranks, but for the factor
    that it returns (see loss_scale)."""
    rollout, width = update.rollout, update.learnt.shape[1]
    scale = loss_scale(max(1, sum(update.num_learnt[i] for i in minibatch)), split.dp.size())
    parts = shares(minibatch, rollout.rows, split)
    for part in reducing_gradients(critic, parts, every=args.sync_every_micro_batch):
        answers, of_part = [rollout.rows[i] for i in part], rows_at(part, rollout.mask.device)
        mask, old_values, returns = of_part(update.learnt), of_part(rollout.values), of_part(update.returns)  # [n, R]
        values = answer_values(critic, answers, width, split)
        losses, clipped = ppo_value_loss(values, old_values, returns, cliprange_value=args.cliprange_value)
        losses = losses * mask
        (args.vf_coef * losses.sum() * scale.loss).backward()
        sums.add(sum(update.num_learnt[i] for i in part), value=losses, value_clipped=clipped * mask)
    return scale.gradients


def update_metrics(
    rollout: Rollout, update: Update, means: dict[str, float], args: PpoArgs, seconds: dict[str, float]
) -> dict[str, float]:
    """The metrics of an update, under TRL's names. means: of TokenSums, 0 of what did not learn."""
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


# ------------------------------------------------------------------------------------------ the models


class Models(NamedTuple):
    policy: Transformer
    critic: Transformer
    reference: Transformer
    reward_model: Transformer | None


def check_flags(args: PpoArgs) -> None:
    """Raises ValueError for flags that do not go together."""
    check_rl_flags(args)
    if args.shared_base and not args.uses_lora:
        raise ValueError("--shared_base is for LoRA: give --lora_r or --adapter_path")
    if args.shared_base and args.value_checkpoint_path is not None:
        raise ValueError("--shared_base: the critic stands on the policy's base; leave --value_checkpoint_path out")
    if args.kl_target is not None and not args.kl_coef:
        raise ValueError(
            f"--kl_target {args.kl_target}: a --kl_coef of 0 is multiplied and stays 0; begin with another"
        )
    if args.kl_target is None:
        refuse_idle(args, "without a --kl_target, to which --kl_coef adapts", "kl_horizon")
    if args.whiten_rewards and args.kl_in == "loss":
        raise ValueError("--whiten_rewards scales the rewards, and not the KL that --kl_in loss holds against them")


def choose_critic(args: PpoArgs, policy: Folder, frozen: Frozen, longest: int) -> Path:
    """The folder where the critic starts. Raises ValueError for one that cannot be trained, or read the policy's rows.
    longest: tokens of a prompt and its answer."""
    start = args.reward_checkpoint_path if frozen.reward and frozen.reward.same_tokenizer else args.checkpoint_path
    path = args.checkpoint_path if args.shared_base else args.value_checkpoint_path or start
    if args.value_checkpoint_path is None and is_quantized(read_hf_config(path)[0]):
        raise ValueError(
            f"--reward_checkpoint_path {path}: holds quantised weights, which are frozen, so the critic cannot start "
            "there; give the folder it was made from, or the policy's, as --value_checkpoint_path"
        )
    refuse_quantized(path)
    check_reader("critic", path, policy, longest, args, lower="--max_new_tokens")
    return path


def load_models(
    args: PpoArgs, mesh: DeviceMesh, runtime: Runtime, lora: Lora | None, frozen: Frozen, value_path: Path
) -> Models:
    zero_head = None
    if not has_score_head(value_path):
        zero_head = torch.zeros(1, ModelConfig.from_hf(value_path).hidden_size)
    if args.shared_base:
        base = load_for_training(args.checkpoint_path, mesh, args, runtime, new_score=zero_head, lora=lora)
        policy, critic = OnSharedBase(base, ""), OnSharedBase(base, CRITIC)
    else:
        policy = base = load_for_training(args.checkpoint_path, mesh, args, runtime, lora=lora)
        own = None if lora is None else choose_lora(args, value_path, runtime, is_critic=True)
        options = {"head": "score", "new_score": zero_head, "lora": own}
        critic = load_for_training(value_path, mesh, args, runtime, **options)
    with torch.no_grad():
        critic.score.weight.mul_(value_scale(args, frozen.reward, value_path))
    return Models(policy, critic, *frozen.load(args, mesh, runtime, base))


def value_scale(args: PpoArgs, reward: RewardFolder | None, value_path: Path) -> float:
    """What makes of the scores of the model where the critic starts values of the rewards: for the reward model itself
    --reward_model_weight, over its reward_std with --normalize_reward. (What is subtracted, reward_mean over
    reward_std, the critic learns: its head has no bias.)"""
    if reward is None or reward.kind.separator is not None or not value_path.samefile(reward.folder.path):
        return 1.0
    return args.reward_model_weight / (reward.kind.std if args.normalize_reward else 1.0)


if __name__ == "__main__":
    run_script(main, PpoArgs)
