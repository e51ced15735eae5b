"""Corner cases of training/train_ppo.py: answers of one token, one answer, equal prompts, few slots, a context that is
too short. The world is that of test_train_ppo.py."""

import math
import shutil

import pytest
import torch
import transformers

from tests import tiny
from tests.training.test_train_ppo import (  # noqa: F401 (fixtures)
    SCRIPT,
    TIMED,
    flags,
    ppo,
    shorten,
    with_another_tokenizer,
    world,
)
from training import train_ppo


@pytest.fixture
def drawn(monkeypatch):
    """Records the answers of each update."""
    found, real = [], train_ppo.draw

    def draw(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(train_ppo, "draw", draw)
    return found


def finite(lines):
    return all(math.isfinite(value) for line in lines for value in line.values())


def test_all_answers_stop_at_once(folder, world, tmp_path, drawn):
    """Catches an empty answer without a token to score or to train on, for either source of scores."""
    policy = shutil.copytree(folder, tmp_path / "policy")
    model = transformers.AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():  # every hidden state starts with a large number, and EOS's logit grows with it
        model.model.embed_tokens.weight[:, 0] = 30
        model.lm_head.weight[2, 0] = 30
    model.save_pretrained(policy)
    more = {"reward_checkpoint_path": world / "rm", "missing_eos_penalty": 5, "learning_rate": 0, "debug_checks": True}
    lines = ppo(policy, world, tmp_path / "out", total_steps=2, **more)
    assert all(answer.text == "" and answer.ids == [2] and answer.finished for answers in drawn for answer in answers)
    assert finite(lines) and all(line["completion_length"] == 1 for line in lines)
    assert all(line["val/num_eos_tokens"] == 6 and line["value_grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_one_answer(kl_in, tokens, folder, world, tmp_path):
    """Catches a variance of one number that becomes NaN, and a minibatch without a row on any rank."""
    sizes = {
        "rollout_batch_size": 1,
        "minibatch_size": 1,
        "micro_batch_size": 1,
        "max_new_tokens": tokens,
        "ppo_epochs": 1,
    }
    lines = ppo(folder, world, tmp_path / "out", **sizes, kl_in=kl_in, debug_checks=True)
    assert finite(lines) and [line["episode"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["value_grad_norm"] > 0 and (lines[0]["grad_norm"] > 0) == (tokens > 1)


def test_answers_of_one_token(folder, world, tmp_path, drawn):
    """Catches a value read at the wrong token if the first is the last, and an estimate that needs two tokens."""
    [line] = ppo(folder, world, tmp_path / "out", max_new_tokens=1, total_steps=1, ppo_epochs=1, minibatch_size=6)
    assert line["completion_length"] == 1 and finite([line])
    scores = [len(answer.text) / 10 for answer in drawn[0]]
    numbers = train_ppo.prompt_numbers(7, 0, 6, seed=0)
    wanted = sum((score + number) ** 2 for score, number in zip(scores, numbers)) / 2 / 6  # the zero head predicts 0
    assert line["loss/value_avg"] == pytest.approx(wanted, rel=1e-5)


def test_equal_prompts_and_few_slots(folder, world, tmp_path, drawn):
    """Catches samples of one prompt that share their noise, in an update, between updates or with an evaluation, and
    answers that depend on the number of slots or on other records."""
    records = [{"prompt": "Question 1:", "bonus": 1}] * 3
    prompts = tiny.write_records(tmp_path / "prompts.jsonl", records)
    more = {"prompt_file": prompts, "eval_prompt_file": prompts, "eval_steps": 1, "learning_rate": 0, "total_steps": 2}
    more |= {"ppo_epochs": 1}
    lines = [ppo(folder, world, tmp_path / f"slots-{n}", **more, rollout_slots=n) for n in (6, 2)]
    first, second = drawn[:5], drawn[5:]
    assert [[a.ids for a in answers] for answers in first] == [[a.ids for a in answers] for answers in second]
    before, training, evaluation, later, again = first
    assert len({tuple(answer.ids) for answer in [*training, *evaluation, *later]}) == 6 + 3 + 6
    assert all([a.ids for a in answers] == [a.ids for a in evaluation] for answers in (before, again))
    for one, other in zip(*lines):
        for key in one:
            assert key.startswith(TIMED) or one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


def test_stored_in_bf16(folder, world, tmp_path):
    """Catches a reference with other weights than the policy starts with, which are rounded to be stored."""
    more = {"param_dtype": "bfloat16", "dtype": "float32", "debug_checks": True, "total_steps": 2}
    lines = ppo(folder, world, tmp_path / "out", **more)
    assert lines[0]["objective/kl"] == 0 and lines[-1]["objective/kl"] != 0


def test_rows_too_long_for_the_reward_model(folder, world, tmp_path):
    """Catches answers that are truncated to be scored, but not counted; and the warning of them taken for that of a
    function called "cut"."""
    other = shorten(with_another_tokenizer(world / "rm", tmp_path / "rm"))
    (tmp_path / "fn.py").write_text("def cut(prompts, completions, examples): return [None] * len(prompts)")
    given = {"reward_checkpoint_path": other, "reward_fn": f"{tmp_path / 'fn.py'}:cut", "reward_error": "zero"}
    result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out", **given, total_steps=2))
    assert "longer than the reward model's context" in result.stdout and "cut returned None for" in result.stdout
    lines = tiny.read_lines(tmp_path / "out/metrics.jsonl")
    assert all(0 < line["val/num_cut_for_reward"] <= 6 for line in lines)
    lines = ppo(folder, world, tmp_path / "whole", reward_checkpoint_path=world / "rm", total_steps=2)
    assert all(line["val/num_cut_for_reward"] == 0 for line in lines)
