"""training/train_grpo.py against the known optimum of the task in optimum.py."""

from tests.training import optimum as optimum_task
from tests.training.optimum import ANSWERS, BETA, PROMPTS, TEMPERATURE, log_probs, relative_regret, write_task

SCRIPT = "training/train_grpo.py"
SETTINGS = {"temperature": TEMPERATURE, "total_steps": 60, "rollout_batch_size": 384, "learning_rate": 3e-3}
SETTINGS |= {"adam_beta2": 0.99, "num_iterations": 4, "minibatch_size": 384}
SMALL = {"total_steps": 40, "rollout_batch_size": 256, "minibatch_size": 256, "learning_rate": 4e-3}
RLOO = {"loss_type": "rloo", "beta": BETA}


def train(root, out, **more):
    return optimum_task.train(SCRIPT, root, out, **SETTINGS | more)


def test_rloo_reaches_the_optimum(tmp_path):
    """Catches mistakes that lead to another policy than pi*: in the baseline, in the KL's place, sign or units, in the
    EOS action, in temperatures, or in ratios to another policy than the one that sampled."""
    table = write_task(tmp_path, 0)
    train(tmp_path, tmp_path / "out", **RLOO, **SMALL)
    found = relative_regret(tmp_path, tmp_path / "out", table)
    print(f"regret {found:.4f}")
    assert found < 0.01


def test_dr_grpo_ends_on_the_best_answer(tmp_path):
    """Catches advantages of the wrong sign or of another answer: without a KL, only the best answer must be left."""
    table = write_task(tmp_path, 0)
    small = {"total_steps": 30, "rollout_batch_size": 192, "minibatch_size": 96, "learning_rate": 1e-2}
    train(tmp_path, tmp_path / "out", loss_type="dr_grpo", num_iterations=1, **small)
    best = max(ANSWERS, key=table[PROMPTS[0]].get)
    chance = log_probs(tmp_path / "out")[0, ANSWERS.index(best)].exp().item()
    print(f"best answer {chance:.4f}")
    assert chance > 0.9


def test_adapters_reach_the_optimum(tmp_path):
    """Catches adapters that do not reach the sampler, a reference with the adapters on, an export that is not what was
    trained, and a loss that changes the base. Of rank 8, below a frozen head, they end at 2.7 % of the reference's
    regret on this seed, at 4.1 and 2.0 % on seeds 1 and 2; after 40 updates at 0.9, 2.0 and 0.9 %."""
    table = write_task(tmp_path, 0, head_scale=0.5, reward_scale=0.5, hidden_size=32, intermediate_size=64)
    train(tmp_path, tmp_path / "out", **RLOO, lora_r=8, learning_rate=1e-2, total_steps=24)
    found = relative_regret(tmp_path, tmp_path / "out", table)
    print(f"regret {found:.4f}")
    assert found < 0.05
