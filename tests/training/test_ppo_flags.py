"""Flags of training/train_ppo.py given to the script, each checked by an effect that can be predicted. The task is that
of test_ppo_optimum.py: answers of up to two letters with a reward each."""

import math

import pytest
import torch

from tests.training.test_ppo_optimum import LETTERS, SETTINGS, train, write_task
from training import train_ppo
from training.losses import adapted_kl_coef

ONCE = {"total_steps": 1, "ppo_epochs": 1, "rollout_batch_size": 64, "learning_rate": 0, "value_learning_rate": 0}


@pytest.fixture
def root(tmp_path):
    write_task(tmp_path, 0)
    return tmp_path


def engine_says(patch, shift):
    """Shifts the engine's log-probs by `shift`."""
    real = train_ppo.draw
    moved = lambda answer: answer._replace(logps=[logp + shift for logp in answer.logps])  # noqa: E731
    patch.setattr(train_ppo, "draw", lambda *args: [moved(answer) for answer in real(*args)])


@pytest.mark.parametrize(
    "shift, cap, weight", [(-1, 2, 2), (-1, 100, math.e), (1, 2, math.exp(-1)), (-1, None, 1), (0, 2, 1)]
)
def test_tis_cap(shift, cap, weight, root, monkeypatch):
    """Catches engine and trainer swapped in the weight, a cap from below or without effect, weights to another update's
    policy, and weights without the flag: an engine off by one nat on every token scales the policy's gradient by min(e,
    cap) or 1 / e, but not the critic's."""
    [plain] = train(root, root / "plain", **ONCE)
    engine_says(monkeypatch, shift)
    [line] = train(root, root / "out", **ONCE, **({} if cap is None else {"tis_cap": cap}))
    assert line["engine/logprob_gap_mean"] == pytest.approx(abs(shift), abs=1e-4)
    assert line["grad_norm"] == pytest.approx(weight * plain["grad_norm"], rel=1e-4)
    assert line["value_grad_norm"] == pytest.approx(plain["value_grad_norm"], rel=1e-4)
    assert line["objective/rlhf_reward"] == pytest.approx(plain["objective/rlhf_reward"], abs=1e-6)


def test_dual_clip(root, monkeypatch):
    """Catches a bound that does not reach the loss, or that also holds for positive advantages: steps are so long that
    bad tokens become several times as likely, with and without the flag."""
    seen, real = [], train_ppo.ppo_policy_loss

    def ppo_policy_loss(logps, old_logps, advantages, **more):
        losses, stats = real(logps, old_logps, advantages, **more)
        tokens = advantages != 0  # 0 outside the answers
        seen.append(torch.stack((advantages, losses.detach(), stats.ratio))[:, tokens])
        return losses, stats

    monkeypatch.setattr(train_ppo, "ppo_policy_loss", ppo_policy_loss)
    long = {"total_steps": 1, "ppo_epochs": 2, "rollout_batch_size": 64, "minibatch_size": 8, "learning_rate": 0.03}
    weights = []
    for more in ({}, {"dual_clip": 1.5}):
        seen.clear()
        [line] = train(root, root / f"out{len(weights)}", **long, lr_schedule="constant", warmup_ratio=0, **more)
        advantages, losses, ratios = torch.cat(seen, dim=1)
        beyond = (advantages < 0) & (ratios > 1.6)
        assert beyond.sum() > 5
        wanted = torch.where(beyond, -advantages * (1.5 if more else ratios), losses)
        torch.testing.assert_close(losses, wanted)
        assert line["loss/policy_avg"] == pytest.approx(losses.mean().item(), rel=1e-4)
        weights.append(line["grad_norm"])
    assert weights[0] != weights[1]


def test_entropy_bonus(root):
    """Catches a bonus that is a penalty, or that sums the entropy of all positions: with nothing else to learn from,
    the policy ends at the uniform distribution, whose entropy is log V, and without a bonus it does not move."""
    (root / "reward.py").write_text("def reward(prompts, completions, examples):\n    return [0.0] * len(prompts)\n")
    alone = {"kl_coef": 0, "value_learning_rate": 0, "rollout_batch_size": 64, "total_steps": 25, "ppo_epochs": 2}
    alone |= {"temperature": 0.3, "max_grad_norm": 100, "learning_rate": 3e-3}
    first, *_, last = train(root, root / "bonus", **alone, entropy_coef=1)
    uniform = math.log(len(LETTERS) + 1)
    assert first["policy/entropy_avg"] < uniform - 0.05 and last["policy/entropy_avg"] > uniform - 0.005
    assert last["loss"] == pytest.approx(-last["policy/entropy_avg"], abs=1e-4)
    still = train(root, root / "still", **alone | {"total_steps": 2})
    assert all(line["grad_norm"] == 0 and line["objective/kl"] == 0 for line in still)


def test_whiten_rewards(root, monkeypatch):
    """Catches rewards whitened over padding, or without the mean that TRL keeps, and a flag that changes the rewards
    before they are whitened."""
    seen, real = [], train_ppo.gae

    def gae(rewards, values, mask, *more):
        seen.append(rewards[mask].double())
        assert not rewards[~mask].any()
        return real(rewards, values, mask, *more)

    monkeypatch.setattr(train_ppo, "gae", gae)
    for name in ("plain", "whitened"):
        train(root, root / name, **ONCE, **({} if name == "plain" else {"whiten_rewards": True}))
    plain, whitened = seen
    assert plain.std() < 0.9 and abs(plain.mean()) > 0.01
    torch.testing.assert_close(whitened, (plain - plain.mean()) / plain.std() + plain.mean(), rtol=1e-4, atol=1e-4)


def test_kl_target(root):
    """Catches a controller with the wrong sign, another number of answers or the KL of tokens instead of answers, an
    update weighted with the coefficient of the next one, and an evaluation weighted with that of the first."""
    evaluated = {"eval_prompt_file": root / "prompts.jsonl", "eval_steps": 3, "num_eval_samples": 0}
    start, *lines = train(root, root / "out", total_steps=6, kl_target=0.05, kl_horizon=2000, **evaluated)
    coefs, kls = ([line[key] for line in lines] for key in ("kl_coef", "objective/kl"))
    assert coefs[0] == 0.5 and max(kls) > 0.06
    for before, after, kl in zip(coefs, coefs[1:], kls):
        assert after == pytest.approx(adapted_kl_coef(before, kl, 0.05, SETTINGS["rollout_batch_size"], 2000), rel=1e-6)
    for line in lines:
        wanted = line["objective/scores"] - line["kl_coef"] * line["objective/kl"]
        assert line["objective/rlhf_reward"] == pytest.approx(wanted, abs=1e-6)
    for line, coef in ((start, coefs[0]), (lines[2], coefs[3])):
        assert line["eval_objective/non_score_reward"] == pytest.approx(-coef * line["eval_objective/kl"], abs=1e-6)


def test_coefficients_of_losses(root):
    """Catches a weight of the value loss that is squared or lost, and one that reaches the policy."""
    [one], [three] = (train(root, root / str(c), **ONCE, vf_coef=c) for c in (1, 3))
    assert three["value_grad_norm"] == pytest.approx(3 * one["value_grad_norm"], rel=1e-4)
    assert three["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6)
    assert three["loss/value_avg"] == pytest.approx(one["loss/value_avg"], rel=1e-6)
    assert three["loss"] == pytest.approx(one["loss/policy_avg"] + 3 * one["loss/value_avg"], abs=1e-6)
