"""Group relative policy optimisation: a policy learns from verifiable rewards of its own answers, without a critic:
each answer is compared with the other answers to its prompt.

- each update: sample --num_generations answers to each prompt (they share its prefill), score them, compute advantages
  within each group; then take --num_iterations passes of clipped steps over the answers
- --loss_type grpo, gspo, bnpo, dapo, cispo, dr_grpo or rloo: see the table in training/grpo_losses.py
- the KL to a reference is in the loss (k3), for rloo in the reward; with --beta 0 there is no reference
- a group whose rewards are all equal has advantages of 0: --max_resamples replaces it by answers to the next prompt
- token in, token out, as in PPO, and every number of an update is the same on all ranks, whatever the layout

Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300).

    python training/train_grpo.py --checkpoint_path checkpoints/Qwen2.5-0.5B-Instruct --prompt_file gsm8k.jsonl \\
        --reward_fn training/graders.py:math_answer --output_dir runs/grpo
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
    non_negative,
    refuse_idle,
    say,
)
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
from models.generation import Engine
from models.model import Transformer
from models.records import Example
from models.resting import resting
from models.script import run_script
from models.shared_base import as_reference
from models.trained_adapters import choose_lora
from models.transfer import index_on
from training.data import order_flags
from training.divergence import Divergence, DivergenceArgs
from training.frozen import ReferenceArgs, check_rl_flags, open_frozen
from training.grpo_losses import (
    GrpoLossArgs,
    all_alike,
    group_advantages,
    group_spread,
    grpo_losses,
    leave_one_out_advantages,
    loss_divisor,
    soft_overlong_punishment,
)
from training.optim import OptimArgs, make_optimizer, set_learning_rate
from training.prompts import Prompt, RolloutArgs, load_prompt_files, prompt_numbers
from training.rewards import RewardArgs, Scorer, Scores, load_reward_functions, source_metrics
from training.rollouts import (
    Answer,
    TokenSums,
    all_logps,
    answer_logps,
    as_rows,
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
class GrpoArgs(RunArgs, RolloutArgs, RewardArgs, ReferenceArgs, GrpoLossArgs, DivergenceArgs, OptimArgs, ParallelArgs):
    """Group relative policy optimisation of the model in a Hugging Face folder."""

    learning_rate: float = 1e-6
    lr_schedule: str = "linear"
    num_generations: int = flag(8, bounds=Bounds(least=2), help="answers to each prompt, which form a group")
    num_iterations: int = flag(1, bounds=at_least_one, help="passes over the answers of an update")
    max_resamples: int = flag(
        0, bounds=non_negative, help="how many times groups with equal rewards are resampled in an update"
    )
    soft_punish_cache: int | None = flag(
        None, bounds=at_least_one, help="penalty of up to 1 for the last N tokens of --max_new_tokens; default: none"
    )


def main(args: GrpoArgs) -> None:
    check_flags(args)
    dp_size, micro_batch_size = split_batch(args, args.step_size, "--minibatch_size")
    run = Run(args)

    # load: files and settings first, so that a mistake in them shows before the models are loaded
    runtime = run.runtime
    folder = open_folder(args.checkpoint_path, None, args.tensor_parallel_size, today=run.today)
    own_reference = args.beta > 0 and args.ref_checkpoint_path is None
    lora = choose_lora(args, args.checkpoint_path, runtime, with_reference=own_reference)
    check_loadable(args.checkpoint_path, args, runtime, lora=lora)
    functions = load_reward_functions(args)
    frozen = open_frozen(args, folder, runtime, reference=args.beta > 0)
    data = load_prompt_files(args, folder)
    frozen.check_prompts(data)

    mesh = init_mesh(runtime.device, args.tensor_parallel_size, args.dp_replicate)
    split = Split(micro_batch_size, mesh["dp"], folder.pad_token_id, args.max_tokens_per_micro_batch, run.stop.check)
    policy = load_for_training(args.checkpoint_path, mesh, args, runtime, lora=lora)
    reference, reward_model = frozen.load(args, mesh, runtime, policy)
    scorer = Scorer(args, folder.tokenizer, frozen.reward, reward_model, functions, split, run.stop)
    divergence = Divergence(args, folder.config.vocab_size, "a higher --beta", run.stop)
    optimizer = make_optimizer(policy, args, seed=args.seed, compile=runtime.compile)
    trained = nn.ModuleDict({"policy": policy})  # one checkpoint holds the policy and two counters
    for name in ("num_prompts", "num_tokens"):
        trained.register_buffer(name, torch.zeros((), dtype=torch.int64))
    order = order_flags(args) - {"rollout_batch_size"}  # of any size, an update goes on after num_prompts
    run.begin(trained, optimizer, total_steps=args.total_steps, order=order)
    if run.first_step > 1 and "reward_fn" not in run.changed:  # without grades no update is completed
        scorer.graded.update(scorer.pooled)
    engine = make_engine(policy, folder, args, max_seq_len=data.longest, dp_size=dp_size, runtime=runtime)
    sample_log = SampleLog(run, folder.tokenizer)
    about = {
        "policy": folder if lora is None else f"{folder}; {lora}",
        **frozen.notes(args),
        "stop tokens": folder.stop_tokens(),
        "device": f"{runtime} on {args.param_dtype} weights, {args.optim}",
        "ranks": args.ranks(),
        **data.notes,
        "rollouts": f"{engine.num_slots} slots of {engine.cache_len} tokens over {engine.pool.num_pages:,} pages on "
        "each dp rank",
        "updates": f"{run.span()}, {args.rollout_batch_size // args.num_generations} prompts "
        f"x {args.num_generations} answers each, {args.num_iterations} x {args.rollout_batch_size // args.step_size} "
        f"steps of {args.loss_type}, {split.note()}",
    }
    say(card("train_grpo", about))

    def evaluate() -> dict[str, float]:
        G = args.num_generations_eval
        asked = [prompt for prompt in data.held_out for _ in range(G)]
        sampled = answers_to(engine, scorer, asked, 0, 1)  # the same noise each time, not training's
        sample_log.show(asked, [each.text for each in sampled.answers], sampled.finished, reward=sampled.rewards)
        metrics = group_metrics([sampled], G) | pass_rates(sampled.scores.checked, G)
        return {f"eval_{name}": x for name, x in metrics.items()}

    def finish(metrics: dict[str, float]) -> None:
        if data.held_out and run.eval_due:
            with run.evaluating(metrics):
                metrics |= evaluate()
        run.log(metrics, "reward", due=divergence.ends(metrics.get("kl", 0.0)))
        if run.export_due:
            run.export(policy, what="policy", subfolder=run.step_folder)
        if run.step >= run.first_step or run.interrupted:
            of_token = {"kl": metrics.get("kl", 0.0), "entropy": metrics.get("entropy", 0.0)}
            num_answers = args.rollout_batch_size + metrics.get("num_resampled_groups", 0) * args.num_generations
            some = metrics.get("rewards/num_skipped", 0) < num_answers  # have a reward
            divergence.look(run.step, **of_token, all_alike=some and metrics.get("frac_reward_zero_std") == 1)

    if data.held_out and run.first_step == 1 and args.total_steps:
        run.log_start(evaluate())
    if run.unfinished:
        finish(run.unfinished)

    # loop
    for step in run.updates():
        first = int(trained.num_prompts)
        sampled = sample_groups(engine, scorer, data.train, first)
        num_asked = sum(len(part.rewards) for part in sampled) // args.num_generations
        run.numbers = prompt_numbers(len(data.train), first, num_asked, seed=args.seed)
        seconds = {name: sum(part.seconds[name] for part in sampled) for name in ("rollout", "score")}
        watch = Stopwatch(runtime.device)
        learning_rate = set_learning_rate(optimizer, args, step, args.total_steps)
        sums, loss, num_steps = TokenSums(runtime.device), torch.zeros((), device=runtime.device), 0
        with resting(engine, args.sleep):
            groups = groups_of(sampled, policy, reference, args, split)
            run.check_finite(advantages=groups.advantages.sum(), kl=groups.kl)  # a NaN KL has advantages of 0
            seconds["logprobs"] = watch.lap()
            for minibatch in minibatches(args, step, args.num_iterations):
                scale, step_loss = backward(policy, groups, minibatch, args, split, sums)
                grad_norm = clip_grad_norm(policy, args.max_grad_norm, scale)
                run.check_finite(grad_norm=grad_norm)
                run.begin_update()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                loss, num_steps = loss + step_loss, num_steps + 1
        seconds["update"] = watch.lap()
        engine.refresh(policy)
        seconds["refresh"] = watch.lap()

        trained.num_prompts += num_asked
        num_tokens = sum(int(part.mask.sum()) for part in sampled)
        trained.num_tokens += num_tokens
        metrics = {"loss": split.sum(loss).item() / num_steps, "learning_rate": learning_rate}
        metrics |= {"grad_norm": grad_norm.item(), "num_tokens": int(trained.num_tokens)}
        metrics |= group_metrics(sampled, args.num_generations) | step_metrics(groups, sums, num_steps, args, split)
        metrics |= {"tokens_per_second": num_tokens / sum(seconds.values())}
        metrics |= {f"time/{name}": value for name, value in seconds.items()}
        finish(metrics)

    scorer.close()
    run.export(policy, what="policy")


def check_flags(args: GrpoArgs) -> None:
    """Raises ValueError for flags that contradict each other."""
    check_rl_flags(args)
    if args.rollout_batch_size % args.num_generations:
        raise ValueError(
            f"--num_generations {args.num_generations} does not divide --rollout_batch_size {args.rollout_batch_size}"
        )
    if not args.beta:
        names = ("ref_checkpoint_path", "quantize_ref", "use_bias_correction_kl", "stop_kl")
        refuse_idle(args, "without a --beta (1e-6 loads the reference, with a negligible weight)", *names)
    if args.loss_type == "rloo":
        names = ("scale_rewards", "importance_sampling_level", "use_bias_correction_kl")
        refuse_idle(args, "for --loss_type rloo", *names)
    if args.missing_eos_penalty is not None and args.mask_truncated_completions:
        raise ValueError(
            f"--missing_eos_penalty {args.missing_eos_penalty}: --mask_truncated_completions does not train on the "
            "answers that it punishes, so it would only raise the others' advantages; leave one of them out"
        )
    if args.process_reward == "steps":
        raise ValueError("--process_reward steps rewards single tokens, and GRPO compares whole answers; take another")
    if args.loss_type == "cispo":
        refuse_idle(args, "for --loss_type cispo, whose ratios --epsilon_high bounds", "delta")
        if args.epsilon_high is not None:
            refuse_idle(args, "for --loss_type cispo beside --epsilon_high, which bounds its ratios", "epsilon")
        else:
            say(f"--loss_type cispo: ratios are capped at --epsilon {args.epsilon}; --epsilon_high 5 is usual")
    else:
        say_what_is_not_clipped(args, args.num_iterations, "epsilon", "epsilon_high", "delta")
    if args.soft_punish_cache is not None and args.soft_punish_cache > args.max_new_tokens:
        raise ValueError(
            f"--soft_punish_cache {args.soft_punish_cache} is more than --max_new_tokens {args.max_new_tokens}"
        )


# ------------------------------------------------------------------------------------------ the answers


class Sampled(NamedTuple):
    """Answers with their rewards, the same on all ranks; answers to one prompt are adjacent."""

    prompts: list[Prompt]
    answers: list[Answer]
    mask: Tensor  # bool [A, R]: the tokens of the answers, EOS included
    scores: Scores
    seconds: dict[str, float]  # time of sampling and of scoring

    @property
    def rewards(self) -> Tensor:
        """With all penalties, without the KL, fp32 [A]; NaN for an answer to be skipped."""
        return self.scores.total

    @property
    def finished(self) -> list[bool]:
        return [answer.finished for answer in self.answers]


def sample_groups(engine: Engine, scorer: Scorer, train: list[Prompt], num_done: int) -> list[Sampled]:
    """Samples groups of answers to the prompts after the first num_done of the run, then up to --max_resamples times
    groups for further prompts in place of those whose rewards are all equal (Yu et al. 2025, DAPO, arXiv 2503.14476,
    section 3.2, which has no limit)."""
    args, sampled = scorer.args, []
    G, missing = args.num_generations, args.rollout_batch_size // args.num_generations
    for _ in range(1 + args.max_resamples):
        numbers = prompt_numbers(len(train), num_done, missing, seed=args.seed)
        asked = [train[i] for i in numbers for _ in range(G)]
        sampled.append(answers_to(engine, scorer, asked, num_done * G, 0, again=bool(sampled)))
        num_done += missing
        missing = int(all_alike(sampled[-1].rewards, G).sum())
        if not missing:
            break
    return sampled


def answers_to(
    engine: Engine, scorer: Scorer, prompts: list[Prompt], first: int, sample_idx: int, *, again: bool = False
) -> Sampled:
    """Samples (see draw) and scores an answer to each prompt. again: for the update of the call before. A
    collective."""
    args, watch = scorer.args, Stopwatch(engine.device)
    answers = draw(engine, scorer, prompts, first, sample_idx)
    rows, mask, _ = as_rows(prompts, answers, engine.device)
    seconds = {"rollout": watch.lap()}
    texts, finished = [answer.text for answer in answers], [answer.finished for answer in answers]
    punishment = 0.0
    if args.soft_punish_cache:
        punishment = soft_overlong_punishment(mask.sum(1).cpu(), args.max_new_tokens, args.soft_punish_cache)
        if args.mask_truncated_completions:  # punishing a masked answer would only raise the others' advantages
            punishment = punishment * torch.tensor(finished)
    with resting(engine, min(args.sleep, 1) if scorer.model else 0):  # not its weights, which no refresh may follow
        scores = scorer.score(prompts, rows, texts, finished, punishment, again=again)
    seconds["score"] = watch.lap()
    return Sampled(prompts, answers, mask, scores, seconds)


# ------------------------------------------------------------------------------------------ an update


class Groups(NamedTuple):
    """The training data of an update, the same on all ranks."""

    rows: list[Example]  # prompt and answer, with labels on the answer
    mask: Tensor  # bool [A, R]: the tokens of the answers
    learnt: Tensor  # bool [A, R]: the tokens that are trained on
    num_learnt: list[int]  # learnt tokens of each answer
    advantages: Tensor  # fp32 [A]
    kl: float  # nats per token; 0 unless the KL is in the reward
    engine_logps: Tensor  # log-probs of the engine, fp32 [A, R]
    logps: Tensor | None  # of the policy before the update; None if the update is one step, which computes them itself
    ref_logps: Tensor | None  # of the reference
    drawn_logps: Tensor  # fp32 [A, R]: buffer for the log-probs that such a single step computes
    clipped: Tensor  # fp32 [2, A]: buffer to which steps add the share of an answer's ratios clipped below and above


def groups_of(
    sampled: list[Sampled], policy: Transformer, reference: Transformer | None, args: GrpoArgs, split: Split
) -> Groups:
    """Collects groups whose rewards differ and all of the last round, with log-probs and advantages. A collective."""
    kept = [~all_alike(part.rewards, args.num_generations) | (part is sampled[-1]) for part in sampled]
    kept = [mask.repeat_interleave(args.num_generations) for mask in kept]
    chosen = [(part, i) for part, mask in zip(sampled, kept) for i in mask.nonzero()[:, 0].tolist()]
    answers = [part.answers[i] for part, i in chosen]
    device = sampled[0].rewards.device
    rows, mask, engine_logps = as_rows([part.prompts[i] for part, i in chosen], answers, device)
    rewards = torch.cat([part.rewards[mask] for part, mask in zip(sampled, kept)])
    learnt = mask & ~rewards.isnan()[:, None]
    if args.mask_truncated_completions:
        learnt = learnt & torch.tensor([answer.finished for answer in answers], device=device)[:, None]

    several = args.num_iterations * args.rollout_batch_size > args.step_size
    others = mask.shape[1], split, args.temperature
    logps = all_logps(policy, rows, *others) if several or args.kl_in_reward else None
    ref_logps = None
    if reference is not None:
        with as_reference(reference):
            ref_logps = all_logps(reference, rows, *others)
    kl = torch.zeros(())
    if args.kl_in_reward:
        log_ratios = (logps - ref_logps) * learnt
        rewards, kl = rewards - args.beta * log_ratios.sum(1), log_ratios.sum() / learnt.sum().clamp(min=1)
    if args.loss_type == "rloo":
        advantages = leave_one_out_advantages(rewards, args.num_generations)
    else:
        advantages = group_advantages(rewards, args.num_generations, args.scale_rewards)
    drawn, clipped = torch.zeros_like(engine_logps), torch.zeros(2, len(rows), device=device)
    num_learnt = learnt.sum(dim=1).tolist()
    logps = logps if several else None  # also if the KL has them: those of another pass are rounded otherwise
    return Groups(rows, mask, learnt, num_learnt, advantages, kl.item(), engine_logps, logps, ref_logps, drawn, clipped)


def backward(
    policy: Transformer, groups: Groups, minibatch: list[int], args: GrpoArgs, split: Split, sums: TokenSums
) -> tuple[float, Tensor]:
    """Accumulates the gradient of an optimizer step's loss on these answers. Returns the factor that the gradients must
    still be multiplied by (see loss_scale), and this rank's part of the loss."""
    width, device = groups.learnt.shape[1], groups.learnt.device
    divisor = loss_divisor(args, [groups.num_learnt[i] for i in minibatch], groups.num_learnt, args.max_new_tokens)
    scale, total = loss_scale(divisor, split.dp.size()), torch.zeros((), device=device)
    parts = split.numbers(groups.rows, minibatch)
    for part in reducing_gradients(policy, parts, every=args.sync_every_micro_batch):
        rows, index, of_part = [groups.rows[i] for i in part], index_on(part, device), rows_at(part, device)
        m = of_part(groups.learnt)
        logps, entropies = answer_logps(policy, rows, width, split, args.temperature, entropy=True)
        old_logps = logps.detach() if groups.logps is None else of_part(groups.logps)
        others = {"engine_logps": of_part(groups.engine_logps)}
        others |= {} if groups.ref_logps is None else {"ref_logps": of_part(groups.ref_logps)}
        losses, stats = grpo_losses(args, logps, old_logps, of_part(groups.advantages), m, **others)
        (losses.sum() * scale.loss).backward()
        total += losses.detach().sum() / divisor
        groups.drawn_logps.index_copy_(0, index, old_logps)  # used if this is the update's only step
        clipped = torch.stack((stats.low_clipped, stats.high_clipped)) / stats.num_ratios
        groups.clipped.index_add_(1, index, clipped)
        sums.add(m.sum(), entropy=entropies * m, kl=stats.kl)
        sums.add(stats.num_ratios.sum(), low=stats.low_clipped, high=stats.high_clipped)
    return scale.gradients, total


# ------------------------------------------------------------------------------------------ metrics


def group_metrics(sampled: list[Sampled], num_generations: int) -> dict[str, float]:
    """Returns metrics of all sampled answers, also of the replaced groups, under TRL's names."""
    rewards = torch.cat([part.rewards for part in sampled])
    graded = rewards[~rewards.isnan()]
    lengths = torch.cat([part.mask.sum(1) for part in sampled])
    return {
        "reward": graded.mean().item() if len(graded) else 0.0,
        "reward_std": group_spread(rewards, len(rewards)).item(),
        "rewards/num_skipped": len(rewards) - len(graded),
        "rewards/num_cut": sum(part.scores.num_cut for part in sampled),
        "frac_reward_zero_std": all_alike(rewards, num_generations).double().mean().item(),
        "num_resampled_groups": sum(len(part.rewards) for part in sampled[1:]) // num_generations,
        **source_metrics([part.scores for part in sampled]),
        **completion_metrics(lengths, [ended for part in sampled for ended in part.finished]),
    }


def completion_metrics(lengths: Tensor, finished: list[bool]) -> dict[str, float]:
    """Returns statistics of answer lengths under TRL's names; unfinished answers are "clipped". lengths [A]: tokens."""
    lengths, ended = lengths.double(), torch.tensor(finished, device=lengths.device)
    metrics = {"completions/clipped_ratio": 1 - ended.double().mean().item()}
    for name, chosen in (("", lengths), ("_terminated", lengths[ended])):
        chosen = chosen if len(chosen) else lengths.new_zeros(1)
        for kind, value in (("mean", chosen.mean()), ("min", chosen.min()), ("max", chosen.max())):
            metrics[f"completions/{kind}{name}_length"] = value.item()
    return metrics


def step_metrics(groups: Groups, sums: TokenSums, num_steps: int, args: GrpoArgs, split: Split) -> dict[str, float]:
    """Returns metrics of the steps of an update, and the KL, under TRL's names. A collective."""
    means = sums.means(split)
    logps = split.sum(groups.drawn_logps) if groups.logps is None else groups.logps
    gaps = (logps - groups.engine_logps)[groups.mask].abs()
    clipped = split.sum(groups.clipped) * len(groups.rows) / (num_steps * args.step_size)
    low, high = clipped[:, ~clipped[0].isnan()]  # NaN: an answer without learnt tokens
    metrics = {
        "entropy": means["entropy"],
        "sampling/sampling_logp_difference/mean": gaps.mean().item(),
        "sampling/sampling_logp_difference/max": gaps.max().item(),
    }
    if args.beta:
        metrics["kl"] = groups.kl if args.kl_in_reward else means["kl"]
    if args.loss_type == "cispo":
        return metrics | {"cispo_clip_ratio": means["high"]}
    return metrics | {
        "clip_ratio/low_mean": means["low"],
        "clip_ratio/low_min": low.min().item() if len(low) else 0.0,
        "clip_ratio/high_mean": means["high"],
        "clip_ratio/high_max": high.max().item() if len(high) else 0.0,
        "clip_ratio/region_mean": means["low"] + means["high"],
    }


if __name__ == "__main__":
    run_script(main, GrpoArgs)
