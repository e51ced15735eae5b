"""The losses of training/grpo_losses.py against what TRL's GRPOTrainer and RLOOTrainer compute for the same answers
(fixtures/grpo.json): advantages, losses, gradients and metrics. Closed forms of the papers: test_grpo_formulas.py.

Where TRL and the papers differ, we follow TRL; where TRL has a switch, the fixture has both:
- TRL multiplies the KL of the loss by the probability ratio, which makes its gradient that of the KL; the GRPO paper
  does not (use_bias_correction_kl)
- cispo's epsilon_high bounds the ratio itself; in its paper 1 + epsilon_high does
- rloo clips the ratio of the whole answer; its paper takes one step on policy, where nothing is clipped
- bnpo is a mean of micro-batches' means in TRL; ours is the mean over the tokens of the step, however it is split
"""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from tests.training.fixtures import make_grpo_fixtures as made
from training.grpo_losses import (
    GrpoLossArgs,
    group_advantages,
    group_spread,
    grpo_losses,
    leave_one_out_advantages,
    loss_divisor,
    soft_overlong_punishment,
)

FIXTURES = json.loads(made.FILE.read_text())
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
CASES = FIXTURES["cases"]
DROPPED = ("num_iterations", "use_vllm", "vllm_importance_sampling_mode")


def name_of(case):
    return f"{case['name']} ({case['batch']})"


# ----------------------------------------------------------------------------------- inputs and results


def args_of(case) -> GrpoLossArgs:
    """Converts TRL's options to ours."""
    options = {name: x for name, x in case["options"].items() if name not in DROPPED}
    if case["trainer"] == "rloo":
        options = {"loss_type": "rloo", "beta": FIXTURES["defaults"]["rloo"]["beta"]} | options
    if "vllm_importance_sampling_clip_max" in options:
        options["tis_cap"] = options.pop("vllm_importance_sampling_clip_max")
    if isinstance(options.get("scale_rewards"), bool):
        options["scale_rewards"] = "group" if options["scale_rewards"] else "none"
    return GrpoLossArgs(**options)


def inputs_of(case) -> SimpleNamespace:
    """Returns a case's numbers, [A] and [A, R]; they are NaN outside the mask, so that any use of them shows."""
    batch, args = FIXTURES["batches"][case["batch"]], args_of(case)
    lengths = torch.tensor(batch["lengths"])
    answer = torch.arange(lengths.max()) < lengths[:, None]

    def padded(name):
        return torch.full(answer.shape, math.nan).masked_scatter(answer, torch.tensor(batch[name]))

    finished = torch.ones(len(lengths), dtype=torch.bool).index_fill(0, torch.tensor(batch["truncated"]), False)
    mask = answer & finished[:, None] if args.mask_truncated_completions else answer
    old, ref, sampler = padded("old"), padded("ref"), padded("sampler")
    rewards = sum(w * torch.tensor(r) for w, r in zip(FIXTURES["weights"], batch["rewards"].values(), strict=True))

    def advantages(rewards):
        if args.loss_type == "rloo":
            return leave_one_out_advantages(rewards, batch["num_generations"])
        return group_advantages(rewards, batch["num_generations"], args.scale_rewards)

    return SimpleNamespace(
        args=args,
        num_generations=batch["num_generations"],
        max_completion_length=FIXTURES["max_completion_length"],
        rewards=rewards,
        advantages=advantages,
        divisor=divisor_of,
        steps=case["steps"],
        answer=answer,
        finished=finished,
        mask=mask,
        old=old,
        new=padded("new") if in_the_second_pass(case) else old,
        ref=ref if args.beta > 0 else None,
        sampler=sampler,
    )


def divisor_of(args, step, update, limit):
    """Calls loss_divisor on masks [n, R]."""
    return loss_divisor(args, *(mask.sum(dim=1).tolist() for mask in (step, update)), limit)


def results_of(x: SimpleNamespace) -> dict:
    """Returns a trainer's results on these inputs, under the fixture's names; metrics cover all rows at once."""
    rewards = x.rewards
    if x.args.kl_in_reward:
        rewards = rewards - x.args.beta * torch.where(x.mask, x.old - x.ref, 0.0).sum(dim=1)
    advantages = x.advantages(rewards)
    new, losses, parts = x.new.clone().requires_grad_(), [], []
    for rows in x.steps:
        others = {"ref_logps": None if x.ref is None else x.ref[rows], "engine_logps": x.sampler[rows]}
        each, stats = grpo_losses(x.args, new[rows], x.old[rows], advantages[rows], x.mask[rows], **others)
        assert each.shape == (len(rows),) and each.dtype == torch.float32
        assert not any(value.requires_grad for value in stats)
        losses.append(each.sum() / x.divisor(x.args, x.mask[rows], x.mask, x.max_completion_length))
        parts.append(stats)
    (grad,) = torch.autograd.grad(sum(losses), new)
    low, high, count, kl = (torch.cat(values) for values in zip(*parts, strict=True))
    clip = {"low_mean": low.sum() / count.sum(), "high_mean": high.sum() / count.sum()}
    metrics = {f"clip_ratio/{name}": value for name, value in clip.items()}
    metrics |= {"clip_ratio/region_mean": sum(clip.values()), "cispo_clip_ratio": clip["high_mean"]}
    metrics |= {"kl": kl.sum() / x.mask.sum()}
    return {
        "advantages": advantages,
        "loss": torch.stack(losses).detach(),
        "grad": grad[x.answer],
        "metrics": {name: float(value) for name, value in metrics.items()},
    }


def off_by(case, x: SimpleNamespace) -> float:
    """Returns the largest difference of a loss, a gradient or an advantage from TRL's."""
    results = results_of(x)
    return max((results[name] - torch.tensor(case[name])).abs().max().item() for name in ("advantages", "loss", "grad"))


def comparable(case) -> bool:
    """Tells whether TRL's loss is that of its optimizer steps, whatever their micro-batches."""
    return case["micro_batches"] == 1 or case["options"].get("loss_type") != "bnpo"


# ------------------------------------------------------------------------------------------ against TRL


@pytest.mark.parametrize("case", filter(comparable, CASES), ids=name_of)
def test_losses_equal_trl(case):
    """Catches a wrong advantage, ratio, clip, KL or divisor of any loss type; a gradient through the old policy, the
    reference, or the weights of the engine or of cispo; masked tokens or padding counted; and micro-batches or the
    steps of an update that weight answers or tokens differently."""
    x = inputs_of(case)
    results = results_of(x)
    for name in ("advantages", "loss", "grad"):
        theirs = torch.tensor(case[name])
        message = f"{name}: off by up to {(results[name] - theirs).abs().max()}"
        torch.testing.assert_close(results[name], theirs, **CLOSE, msg=message)
    assert not results["grad"][~x.mask[x.answer]].any()
    if case["cut"] == "whole":
        shared = {name: value for name, value in case["metrics"].items() if name in results["metrics"]}
        shared = {name: value for name, value in shared.items() if name != "kl" or not x.args.kl_in_reward}
        assert shared == pytest.approx({name: results["metrics"][name] for name in shared}, rel=1e-6, abs=1e-6)
        assert len(shared) >= (1 if x.args.loss_type == "cispo" else 3) + (
            x.ref is not None and not x.args.kl_in_reward
        )


@pytest.mark.parametrize("case", [case for case in CASES if case["name"].startswith("gspo (grpo)")], ids=name_of)
def test_gspo_is_grpo_with_ratios_of_answers(case):
    """Catches a loss_type gspo that differs from the two options that make it in TRL."""
    x = inputs_of(case)
    x.args = dataclasses.replace(x.args, loss_type="gspo", importance_sampling_level="token")
    assert off_by(case, x) < 1e-6


def test_bnpo_does_not_depend_on_micro_batches():
    """Catches the mean of micro-batches' means, TRL's loss for several micro-batches; ours is TRL's loss for one."""
    for cut in (case for case in CASES if case["name"] == "bnpo, micro-batches"):
        whole = next(c for c in CASES if (c["name"], c["batch"]) == ("bnpo, truncated masked", cut["batch"]))
        x = inputs_of(cut)
        assert off_by(whole, x) < 1e-6 and off_by(cut, x) > 0.01
    elsewhere = [x for name, x in FIXTURES["micro_batch_differences"].items() if name != "bnpo"]
    assert len(elsewhere) == 6 and max(elsewhere) < 1e-6


def test_fixtures_clip_on_both_sides():
    """Catches fixtures in which a side is never clipped, or every group has a spread of rewards."""
    for case in CASES:
        if case["trainer"] == "grpo" and "clip_ratio/low_mean" in case["metrics"] and "on policy" not in case["name"]:
            assert min(case["metrics"][f"clip_ratio/{side}_mean"] for side in ("low", "high")) > 0.03, name_of(case)
    batch = FIXTURES["batches"]["fours"]
    rewards = inputs_of(CASES[0]).rewards
    assert (group_spread(rewards, batch["num_generations"]) == 0).double().mean() == 0.25
    assert CASES[0]["metrics"]["frac_reward_zero_std"] == 0.25
    assert rewards.mean().item() == pytest.approx(batch["metrics"]["reward"], rel=1e-6)
    assert rewards.std().item() == pytest.approx(batch["metrics"]["reward_std"], rel=1e-6)


def test_defaults_are_trls():
    """Catches a default that is not what a user of TRL expects."""
    ours = dataclasses.asdict(GrpoLossArgs())
    theirs = {name: x for name, x in FIXTURES["defaults"]["grpo"].items() if name in ours}
    assert len(theirs) == 9 and {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize("setting", FIXTURES["overlong"], ids=lambda x: f"{x['max_length']}-{x['cache']}")
def test_soft_overlong_punishment_equals_trl(setting):
    """Catches a ramp that starts or ends one token early, and a punishment beyond -1."""
    ours = soft_overlong_punishment(torch.tensor(setting["lengths"]), setting["max_length"], setting["cache"])
    torch.testing.assert_close(ours.float(), torch.tensor(setting["rewards"]), **CLOSE)


# ---------------------------------------------------------------------------------------- planted faults


def divided_by_g(x):
    right = x.advantages
    x.advantages = lambda rewards: right(rewards) * (x.num_generations - 1) / x.num_generations


def biased_deviation(x):
    right, factor = x.advantages, (x.num_generations / (x.num_generations - 1)) ** 0.5
    x.advantages = lambda rewards: right(rewards) * factor


def groups_mixed_over_prompts(x):
    right, shape = x.advantages, (-1, x.num_generations)
    x.advantages = lambda rewards: right(rewards.view(shape).T.flatten()).view(shape[::-1]).T.flatten()


def eos_out_of_the_mask(x):
    last = torch.arange(x.mask.shape[1]).where(x.answer, -1).amax(dim=1, keepdim=True)
    x.mask = x.mask & ~(x.finished[:, None] & (torch.arange(x.mask.shape[1]) == last))


def truncated_learnt(x):
    x.mask = x.answer


def masked_answers_not_counted(x):
    right = x.divisor
    x.divisor = lambda args, step, update, length: right(args, step[step.any(dim=1)], update, length)


def old_after_the_first_step(x):
    x.old = x.new


def length_normalisation_swapped(x):
    swapped = {"grpo": "dapo", "dapo": "grpo", "bnpo": "dr_grpo", "dr_grpo": "bnpo"}
    x.args = dataclasses.replace(x.args, loss_type=swapped[x.args.loss_type])


def divided_by_the_longest_answer(x):
    x.max_completion_length = x.mask.shape[1]


def clip_sides_swapped(x):
    x.args = dataclasses.replace(x.args, epsilon=x.args.epsilon_high, epsilon_high=x.args.epsilon)


def ratio_left_out_of_the_kl(x):
    x.args = dataclasses.replace(x.args, use_bias_correction_kl=not x.args.use_bias_correction_kl)


def old_and_reference_swapped(x):
    x.old, x.ref = x.ref, x.old


def ratio_of_tokens(x):
    x.args = dataclasses.replace(x.args, importance_sampling_level="token")


def engine_and_trainer_swapped(x):
    x.sampler = 2 * x.old - x.sampler


def tokens_of_the_step_alone(x):
    right = x.divisor
    x.divisor = lambda args, step, update, length: right(args, step, step, length)


def tokens_of_the_update(x):
    right = x.divisor
    x.divisor = lambda args, step, update, length: right(args, update, update, length) * len(step) / len(update)


def in_the_second_pass(case):
    return case["options"].get("num_iterations") == 2


def divided_by_answers(case):
    return case["name"].startswith(("grpo", "gspo (grpo)", "dr_grpo", "rloo"))


FAULTS = [
    (divided_by_g, lambda case: case["trainer"] == "rloo"),
    (biased_deviation, lambda case: case["name"] == "grpo"),
    (groups_mixed_over_prompts, lambda case: case["name"] in ("dapo", "dapo, scale_rewards none", "rloo", "rloo, kl")),
    (eos_out_of_the_mask, lambda case: True),
    (truncated_learnt, lambda case: case["options"].get("mask_truncated_completions")),
    (masked_answers_not_counted, lambda case: divided_by_answers(case) and case["name"].endswith("truncated masked")),
    # with cispo's default every weight is at the cap, whatever the old policy
    (old_after_the_first_step, lambda case: in_the_second_pass(case) and case["name"] != "cispo, default epsilon_high"),
    (length_normalisation_swapped, lambda case: case["name"] in ("grpo", "dapo", "bnpo", "dr_grpo", "gspo (dapo)")),
    (divided_by_the_longest_answer, lambda case: case["options"].get("loss_type") == "dr_grpo"),
    (clip_sides_swapped, lambda case: case["name"] in ("grpo, kl", "bnpo, kl", "dr_grpo, kl", "dapo, kl")),
    (ratio_left_out_of_the_kl, lambda case: case["name"].startswith(("grpo, kl", "dapo, on", "gspo (grpo), kl"))),
    (old_and_reference_swapped, lambda case: case["trainer"] == "rloo" and case["options"].get("beta") != 0),
    (ratio_of_tokens, lambda case: case["name"].startswith("gspo") and "on policy" not in case["name"]),
    (engine_and_trainer_swapped, lambda case: case["name"].endswith("token_truncate")),
    (tokens_of_the_step_alone, lambda case: case["name"] in ("dapo, steps", "cispo, steps")),
    (tokens_of_the_update, lambda case: case["name"] == "bnpo, steps"),
]


@pytest.mark.parametrize(("fault", "shows"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_fixtures_show_faults(fault, shows):
    """Catches fixtures too weak to show a mistake: each of these faults, of a caller or a formula, puts a loss, a
    gradient or an advantage far off in every case concerned; without faults none is off (test_losses_equal_trl)."""
    cases = [case for case in CASES if shows(case) and comparable(case)]
    cases = [case for case in cases if case["cut"] == "whole"] or cases
    assert cases
    for case in cases:
        x = inputs_of(case)
        fault(x)
        assert off_by(case, x) > 3e-4, name_of(case)
