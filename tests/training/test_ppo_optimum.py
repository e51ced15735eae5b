"""training/train_ppo.py against the known optimum of the task in optimum.py."""

import pytest
import torch
import transformers

from tests.training import optimum as optimum_task
from tests.training.optimum import BETA, LETTERS, MOST, PROMPTS, TEMPERATURE, optimum, relative_regret, write_task
from training import rollouts, train_ppo

SCRIPT = "training/train_ppo.py"


@torch.no_grad()
def prompt_values(folder):
    """Returns the critic's values before the first token of an answer."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [torch.tensor([[LETTERS.index(letter) for letter in prompt]]) for prompt in PROMPTS]
    return torch.stack([model.score(model.model(row).last_hidden_state[0, -1])[0] for row in rows]).double()


SETTINGS = {
    "temperature": TEMPERATURE,
    "kl_coef": BETA,
    "total_steps": 40,
    "rollout_batch_size": 256,
    "ppo_epochs": 4,
    "learning_rate": 4e-3,
    "value_learning_rate": 4e-3,
    "cliprange_value": 0,
    "adam_beta2": 0.99,
}
DEEPER = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}  # learns sooner
QUICK = {"total_steps": 9, "learning_rate": 8e-3, "value_learning_rate": 8e-3}


def train(root, out, **more):
    return optimum_task.train(SCRIPT, root, out, **SETTINGS | more)


def test_optimum(tmp_path):
    """Catches mistakes that lead to another policy than pi* or another value than beta log Z: in the signs and places
    of scores and KL, in the EOS action, in temperatures, or in the position at which the critic is read."""
    table = write_task(tmp_path, 0)
    train(tmp_path, tmp_path / "out", total_steps=36, learning_rate=5e-3, value_learning_rate=6e-3)
    found = relative_regret(tmp_path, tmp_path / "out", table)
    print(f"regret {found:.4f}")
    assert found < 0.01
    _, best_value = optimum(tmp_path / "ref", table)
    assert (prompt_values(tmp_path / "out/critic") - best_value).abs().max() < 0.02


def test_kl_in_the_loss(tmp_path):
    """Catches a KL in the loss that is not in the units of the whitened advantages, or that is taken per token: both
    have another optimum."""
    table = write_task(tmp_path, 0, **DEEPER)
    small = {"total_steps": 30, "rollout_batch_size": 192, "minibatch_size": 48, "ppo_epochs": 1, "learning_rate": 6e-3}
    train(tmp_path, tmp_path / "out", kl_in="loss", **small)
    found = relative_regret(tmp_path, tmp_path / "out", table)
    print(f"regret {found:.4f}")
    assert found < 0.04  # 0.03; taken per token 0.06, in units of its own 0.14


# ----------------------------------------------------------------------------------- planted faults


def _kl_clamped(patch):
    real = train_ppo.shaped_rewards
    patch.setattr(train_ppo, "shaped_rewards", lambda s, logps, ref, *more: real(s, logps.maximum(ref), ref, *more))


def _eos_out_of_the_mask(patch):
    def cut(answer):
        return answer._replace(ids=answer.ids[:-1], logps=answer.logps[:-1]) if answer.finished else answer

    real = train_ppo.draw
    patch.setattr(train_ppo, "draw", lambda *args: [cut(answer) for answer in real(*args)])


def _bootstrap_past_the_end(patch):
    def gae(rewards, values, mask, gamma, lam):
        last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
        return real(rewards + gamma * values * last, values, mask, gamma, lam)

    real = train_ppo.gae
    patch.setattr(train_ppo, "gae", gae)


def _top_k(patch):
    real = rollouts.SamplingParams
    patch.setattr(rollouts, "SamplingParams", lambda temperature, **more: real(temperature, top_k=5, **more))


FAULTS = [_kl_clamped, _eos_out_of_the_mask, _bootstrap_past_the_end, _top_k]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(fault, tmp_path, monkeypatch):
    """Catches a task that forgives mistakes: on the same small budget each of these costs several times the regret of
    the correct script, or, for the bootstrap, which adds much the same to all answers, spoils the critic's value."""
    table = write_task(tmp_path, 0, **DEEPER)
    fault(monkeypatch)
    train(tmp_path, tmp_path / "out", **QUICK)
    found = relative_regret(tmp_path, tmp_path / "out", table)
    value = (prompt_values(tmp_path / "out/critic") - optimum(tmp_path / "ref", table)[1]).abs().max().item()
    print(fault, f"regret {found:.4f}, value {value:.3f} from its optimum")
    assert found > 0.06 or value > 0.15  # 0.030 and 0.057 without a fault; the clamped KL has 0.087


@pytest.mark.parametrize("padding", [False, True])
def test_advantages_are_whitened_over_tokens(padding, tmp_path, monkeypatch):
    """Catches padding in the whitening, which no regret shows: advantages must have mean 0 and variance 1 over the
    tokens of an update, not over the padded rectangle."""
    seen, real_loss, real_whiten = [], train_ppo.ppo_policy_loss, train_ppo.whiten

    def ppo_policy_loss(logps, old_logps, advantages, **more):
        seen.append(advantages[advantages != 0])  # 0 outside the answers
        return real_loss(logps, old_logps, advantages, **more)

    if padding:
        monkeypatch.setattr(train_ppo, "whiten", lambda x, mask: real_whiten(x, torch.ones_like(mask)) * mask)
    monkeypatch.setattr(train_ppo, "ppo_policy_loss", ppo_policy_loss)
    write_task(tmp_path, 0)
    train(tmp_path, tmp_path / "out", total_steps=1, ppo_epochs=1, rollout_batch_size=64, micro_batch_size=16)
    advantages = torch.cat(seen).double()
    assert 64 < len(advantages) < 64 * MOST
    white = abs(advantages.mean().item()) < 1e-5 and abs(advantages.var().item() - 1) < 1e-5
    assert white != padding
