"""Flags of training/train_ppo.py given to the script, each checked by an effect that can be predicted. The task is that
of test_ppo_optimum.py: answers of up to two letters with a reward each."""

import math

import pytest
import torch

from tests.training.optimum import write_letters
from tests.training.test_ppo_optimum import LETTERS, SETTINGS, train, write_task
from training import divergence, train_ppo
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


def spy(patch, name, seen):
    """Makes a loss of train_ppo.py append its three tensors and its losses to `seen`, at the tokens of answers."""
    real = getattr(train_ppo, name)

    def loss(*tensors, **more):
        losses, stats = real(*tensors, **more)
        tokens = tensors[2] != 0  # advantages and returns are 0 outside the answers
        seen.append(torch.stack((*tensors, losses)).detach()[:, tokens])
        return losses, stats

    patch.setattr(train_ppo, name, loss)


def test_clipped_losses(root, monkeypatch):
    """Catches a range or bound that does not reach the loss, a bound that also holds for positive advantages, and a
    metric under another one's name: steps are so long that bad tokens become several times as likely, with and without
    the bound."""
    seen, seen_values = [], []
    spy(monkeypatch, "ppo_policy_loss", seen)
    spy(monkeypatch, "ppo_value_loss", seen_values)
    long = {"total_steps": 1, "ppo_epochs": 2, "rollout_batch_size": 64, "minibatch_size": 8, "learning_rate": 0.03}
    long |= {"cliprange": 0.4, "cliprange_value": 0.1, "lr_schedule": "constant", "warmup_ratio": 0}
    weights = []
    for more in ({}, {"dual_clip": 1.5}):
        seen.clear()
        seen_values.clear()
        [line] = train(root, root / f"out{len(weights)}", **long, **more)
        logps, old_logps, advantages, losses = torch.cat(seen, dim=1)
        ratios = (logps - old_logps).exp()
        plain, clipped = -advantages * ratios, -advantages * ratios.clamp(0.6, 1.4)
        wanted, beyond = torch.maximum(plain, clipped), (advantages < 0) & (ratios > 1.6)
        assert beyond.sum() > 5
        if more:
            wanted = torch.where(advantages < 0, torch.minimum(wanted, -1.5 * advantages), wanted)
        torch.testing.assert_close(losses, wanted)
        values, old_values, returns, _ = torch.cat(seen_values, dim=1)
        held = values.clamp(old_values - 0.1, old_values + 0.1)
        errors, held_errors = (values - returns).square(), (held - returns).square()
        metrics = {
            "loss/policy_avg": wanted,
            "policy/clipfrac_avg": (clipped > plain).float(),
            "policy/approxkl_avg": 0.5 * (logps - old_logps).square(),
            "val/ratio": ratios,
            "loss/value_avg": 0.5 * torch.maximum(errors, held_errors),
            "val/clipfrac_avg": (held_errors > errors).float(),
        }
        for name, of_tokens in metrics.items():
            assert line[name] == pytest.approx(of_tokens.mean().item(), rel=1e-4), name
        assert line["val/ratio_var"] == pytest.approx(ratios.var(correction=0).item(), rel=1e-3)
        assert 0.05 < line["policy/clipfrac_avg"] < 0.95 and 0.05 < line["val/clipfrac_avg"] < 0.95
        weights.append(line["grad_norm"])
    assert weights[0] != weights[1]


def test_returns_and_objectives(root, monkeypatch):
    """Catches --gamma or --lam without effect or one for the other, a KL estimate with policy and reference swapped,
    and a warning of the KL of an answer as if it were that of a token. Everything is recomputed, answer by answer, from
    the log-probs, values and scores of two updates; the critic's values are 0 in the first."""
    write_letters(root / "other", 1, head_scale=0.4)
    seen, said, real = [], [], train_ppo.targets_of
    monkeypatch.setattr(train_ppo, "targets_of", lambda rollout, *more: seen.append(rollout) or real(rollout, *more))
    monkeypatch.setattr(divergence, "say", said.append)
    run = ONCE | {"total_steps": 2, "value_learning_rate": 0.05, "ref_checkpoint_path": root / "other"}
    gamma, lam, beta = 0.7, 0.4, SETTINGS["kl_coef"]
    lines = train(root, root / "out", **run, gamma=gamma, lam=lam)
    for line, rollout in zip(lines, seen, strict=True):
        kls, k3s, entropies, errors = [], [], [], []
        for i, mask in enumerate(rollout.mask):
            logps, ref_logps, values = (t[i][mask].double() for t in (rollout.logps, rollout.ref_logps, rollout.values))
            rewards = -beta * (logps - ref_logps)
            rewards[-1] += rollout.scores.total[i]
            deltas = rewards + gamma * torch.cat((values[1:], values.new_zeros(1))) - values
            for t in range(len(deltas)):
                errors.append(sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:].tolist())))
            kls.append((logps - ref_logps).sum())
            k3s.append((ref_logps.exp() / logps.exp() - 1 + logps - ref_logps).sum())
            entropies.append(-logps.sum())
        for name, found in (("kl", kls), ("k3", k3s), ("entropy", entropies)):
            assert line[f"objective/{name}"] == pytest.approx(torch.stack(found).mean().item(), rel=1e-4), name
        assert line["loss/value_avg"] == pytest.approx(torch.tensor(errors).square().mean().item() / 2, rel=1e-4)
        assert 1 < line["objective/kl"] < line["completion_length"]
    assert seen[1].values.abs().max() > 0.1
    assert said and not any("KL of a token" in text for text in said)  # it does warn of the entropy


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
    """Catches a controller with the wrong sign, another number of answers or the KL of tokens instead of answers, one
    that adapts to the KL of 0 while only the critic learns, an update weighted with the coefficient of the next one,
    and an evaluation weighted with that of the first."""
    evaluated = {"eval_prompt_file": root / "prompts.jsonl", "eval_steps": 3, "num_eval_samples": 0}
    evaluated["critic_warmup_steps"] = 1
    start, *lines = train(root, root / "out", total_steps=6, kl_target=0.05, kl_horizon=2000, **evaluated)
    coefs, kls = ([line[key] for line in lines] for key in ("kl_coef", "objective/kl"))
    assert coefs[:2] == [0.5, 0.5] and max(kls) > 0.06
    for before, after, kl in zip(coefs[1:], coefs[2:], kls[1:]):
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
