"""training/rewards.py in the trainers: answers without a reward, the rows that a reward model reads, its scale, and
policies that diverge. The world is that of test_train_ppo.py."""

import json
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.batches import Split
from models.fsdp import init_mesh
from models.functions import call_batch, load_grader
from models.tokenizer import Tokenizer
from models.workers import GradingArgs, Pool, grade_of
from tests import tiny
from tests.training.test_train_ppo import (  # noqa: F401 (fixtures)
    TIMED,
    Scores,
    flags,
    hf_scores,
    ppo,
    with_another_tokenizer,
    world,
)
from training import train_grpo, train_ppo
from training.divergence import Divergence, DivergenceArgs
from training.prompts import Prompt
from training.rewards import Scorer, load_reward_functions
from training.rollouts import Answer
from training.stop import Stop

SOME_FAIL = """
def some(prompt, completion, example):
    if "so" in prompt: raise KeyError("so")
    return len(completion) % 3 - 1.0

def some_none(prompts, completions, examples):
    return [None if "so" in p else len(c) % 3 - 1.0 for p, c in zip(prompts, completions)]

def of_even(prompt, completion, example):
    return None if example["bonus"] % 2 else float(len(completion))

def of_odd(prompt, completion, example):
    return float(len(completion)) if example["bonus"] % 2 else None

def odd(prompt, completion, example):
    if len(completion) % 2: raise KeyError("odd")
    return len(completion) - 1.0
"""


@pytest.fixture(scope="module")
def fails(world):
    (world / "fails.py").write_text(SOME_FAIL)
    return world / "fails.py"


@pytest.mark.parametrize("name, more", [("some", {}), ("some_none", {"reward_error": "skip"})])
def test_skipped_answers_of_ppo(name, more, folder, world, fails, tmp_path, monkeypatch):
    """Catches an answer without a reward that the policy or critic is trained on, that is whitened with the others, or
    that counts as a reward of 0 in a metric; and functions of the two forms treated differently."""
    seen, real = [], train_ppo.targets_of
    monkeypatch.setattr(train_ppo, "targets_of", lambda *args: seen.append(real(*args)) or seen[-1])
    more = {"lam": 1, "kl_in": "loss", "debug_checks": True, **more}
    more |= {"minibatch_size": 1, "micro_batch_size": 1}
    lines = ppo(folder, world, tmp_path / "out", reward_fn=f"{fails}:{name}", reward_workers=1, total_steps=2, **more)
    for update, line in zip(seen, lines):
        mask, scores = update.rollout.mask, update.rollout.scores.total
        skipped = scores.isnan()
        assert 0 < skipped.sum() < 6 and line["rewards/num_skipped"] == line[f"rewards/{name}/errors"] == skipped.sum()
        assert update.learnt.equal(mask & ~skipped[:, None]) and not update.advantages[skipped].any()
        assert line["objective/scores"] == pytest.approx(scores[~skipped].mean().item())
        learnt = [(scores[i] - update.rollout.values[i, t]).item() for i, t in update.learnt.nonzero().tolist()]
        white = (torch.tensor(learnt) - torch.tensor(learnt).mean()) / torch.tensor(learnt).std()
        torch.testing.assert_close(update.advantages[update.learnt], white, rtol=1e-4, atol=1e-5)
    if name == "some":
        zero = ppo(
            folder, world, tmp_path / "zero", reward_fn=f"{fails}:some", reward_error="zero", total_steps=1, **more
        )
        assert zero[0]["rewards/num_skipped"] == 0 < zero[0]["rewards/some/errors"]


def test_skipped_answers_of_grpo(folder, world, fails, tmp_path, monkeypatch):
    """Catches a failed grade that counts as 0, which beats a wrong answer's -1, in a group's mean or deviation, or in
    what is trained on."""
    seen, real = [], train_grpo.groups_of
    monkeypatch.setattr(train_grpo, "groups_of", lambda *args: seen.append((args[0][0], real(*args))) or seen[-1][1])
    given = {"reward_fn": f"{fails}:odd", "total_steps": 1, "rollout_batch_size": 12, "num_generations": 6}
    words = flags(folder, world, tmp_path / "out", **given, value_learning_rate=None, ppo_epochs=None)
    result = tiny.run("training/train_grpo.py", *words)
    assert result.code == 0, result.stderr
    [(sampled, groups)] = seen
    texts = [answer.text for answer in sampled.answers]
    failed = torch.tensor([len(text) % 2 == 1 for text in texts])
    assert 0 < failed.sum() < 12 and sampled.rewards.isnan().equal(failed)
    assert groups.learnt.equal(groups.mask & ~failed[:, None])
    for start in (0, 6):
        graded = [i for i in range(start, start + 6) if not failed[i]]
        rewards = torch.tensor([len(texts[i]) - 1.0 for i in graded])
        wanted = (rewards - rewards.mean()) / (rewards.std() + 1e-4) if len(graded) > 1 else torch.zeros(len(graded))
        torch.testing.assert_close(groups.advantages[graded], wanted, rtol=1e-4, atol=1e-4)
    [line] = tiny.read_lines(tmp_path / "out/metrics.jsonl")
    assert line["rewards/num_skipped"] == failed.sum()
    assert line["reward"] == pytest.approx(sampled.rewards[~failed].mean().item())


def test_functions_of_other_answers_each(folder, world, fails, tmp_path):
    """Catches a run in which each function has no grade for another part of the answers, as TRL allows, that goes on
    without a reward for any, or without the state saved; and such answers taken for groups of equal rewards."""
    given = {"reward_fn": [f"{fails}:of_even", f"{fails}:of_odd"], "total_steps": 1, "num_generations": 2}
    given |= {"value_learning_rate": None, "ppo_epochs": None}
    words = flags(folder, world, tmp_path / "out", **given)
    ended = tiny.run("training/train_grpo.py", *words)
    assert ended.code == 2 and "none of 6 answers has a grade from every --reward_fn; return 0" in ended.stderr
    for how, skipped in (("skip", 6), ("zero", 0)):
        words = flags(folder, world, tmp_path / how, **given, reward_error=how)
        result = tiny.run("training/train_grpo.py", *words)
        assert result.code == 0 and "rewards of each group are equal" not in result.stdout, result
        [line] = tiny.read_lines(tmp_path / how / "metrics.jsonl")
        assert line["rewards/num_skipped"] == skipped and (line["reward"] > 0) == (how == "zero")


def test_numbers_that_are_none(fails, tmp_path):
    """Catches a reward accepted although its square overflows fp32, which would end the run later; a timeout that no
    poll can wait for; and a traceback after the pool has ended."""
    (tmp_path / "f.py").write_text(
        "def batch(prompts, completions, examples): return [1, None, 1e39, float('nan'), -1e9, 10**400]\n"
        "def one(prompt, completion, example): return float(completion)\n"
    )
    grades = call_batch(load_grader("--reward_fn", f"{tmp_path / 'f.py'}:batch"), ["p"] * 6, list("abcdef"), [{}] * 6)
    assert [grade.value for grade in grades if grade.failure is None] == [1, -1e9]
    said = ["returned None", "returned 1e+39, but a reward is at most 1e+09", "returned nan", "that no float can hold"]
    for grade, what in zip([grades[i] for i in (1, 2, 3, 5)], said):
        assert math.isnan(grade.value) and what in grade.failure and "for the completion" in grade.failure
    pool = Pool(
        [load_grader("--reward_fn", f"{tmp_path / 'f.py'}:one")], GradingArgs(reward_timeout=1e9, reward_workers=1)
    )
    assert grade_of(pool.submit(0, "p", "2.5", {})).value == 2.5
    assert "at most 1e+09" in grade_of(pool.submit(0, "p", "1e39", {})).failure
    pool.close()
    with pytest.raises(ValueError, match="not graded any more"):
        grade_of(pool.submit(0, "p", "1", {}))


def test_a_stop_in_what_the_reward_model_reads(folder, world, tmp_path, monkeypatch):
    """Catches a reward model that reads the --stop string instead of EOS, which it has not seen in its training, or the
    rest of a token in which the stop begins; and a change to answers that end by themselves or not at all. Scores of
    drawn answers must be transformers', of BOS, prompt, text and EOS."""
    seen, real = [], train_ppo.Rollout
    monkeypatch.setattr(train_ppo, "Rollout", lambda *args: seen.append(real(*args)) or seen[-1])
    given = {"reward_fn": None, "reward_checkpoint_path": world / "rm", "max_new_tokens": 12, "stop": "e"}
    ppo(folder, world, tmp_path / "out", **given, total_steps=3, value_checkpoint_path=folder)
    tokenizer, kinds = Tokenizer(folder), set()
    for rollout in seen:
        for row, text, ended, score in zip(
            rollout.rows, rollout.texts, rollout.finished, rollout.scores.total.tolist()
        ):
            ids = row.input_ids
            if ended and ids[-1] != 2:
                prompt = tokenizer.decode(ids[: row.prompt_length])
                ids = [*tokenizer.encode(prompt + text), 2]
            kinds.add((ended, row.input_ids[-1] == 2))
            assert score == pytest.approx(hf_scores(world / "rm", ids)[-1].item(), abs=1e-4), (text, row)
    assert (True, False) in kinds and (False, False) in kinds, kinds


def scaled(folder, copy, factor):
    """Copies a reward model, with its scores in other units."""
    tiny.copy_to_edit(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights["score.weight"] *= factor
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    changed = {name: factor * config[name] for name in ("reward_mean", "reward_std")}
    (copy / "config.json").write_text(json.dumps(config | changed))
    return copy


@pytest.mark.parametrize("normalize", [True, False])
def test_the_scale_of_the_reward_model(normalize, folder, world, tmp_path):
    """Catches a critic that starts in other units than the rewards: a reward model with scores ten times as large must
    give the same run, normalised or with a tenth of the weight."""
    other, lines = scaled(world / "rm", tmp_path / "rm", 10), []
    for path, weight in ((world / "rm", 1), (other, 1 if normalize else 0.1)):
        given = {"reward_fn": None, "reward_checkpoint_path": path, "normalize_reward": normalize or None}
        given |= {"total_steps": 2}
        lines.append(ppo(folder, world, tmp_path / str(path.parent.name + "-out"), reward_model_weight=weight, **given))
    for ours, theirs in zip(*lines, strict=True):
        for name in theirs:
            if not name.startswith((*TIMED, "rewards/reward_model")):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in weights_of_both(tmp_path, world))


def weights_of_both(tmp_path, world):
    one, two = (load_file(tmp_path / f"{d}-out/critic/model.safetensors") for d in (world.name, tmp_path.name))
    return [(one[name], two[name]) for name in one]


def test_a_reward_model_without_a_template(folder, world, tmp_path):
    """Catches a chat that the reward model cannot read, found only after the answers are drawn, and one refused
    although the reward model need not read it as text."""
    policy = shutil.copytree(folder, tmp_path / "policy")
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    tiny.write_tokenizer(policy, chat_template=template + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    chats = [{"prompt": [{"role": "user", "content": "hello"}], "bonus": 1}]
    prompts = tiny.write_records(tmp_path / "chats.jsonl", chats)
    given = {"reward_fn": None, "total_steps": 1, "value_checkpoint_path": policy}
    other = with_another_tokenizer(world / "rm", tmp_path / "rm")
    for files in ({"prompt_file": prompts}, {"eval_prompt_file": prompts}):
        words = flags(policy, world, tmp_path / "out", **given, **files, reward_checkpoint_path=other)
        result = tiny.run("training/train_ppo.py", *words)
        tiny.assert_refused(result, f"{other}: the reward model cannot read", "chats.jsonl:1")
        assert not (tmp_path / "out").exists()
    ppo(policy, world, tmp_path / "same", **given, prompt_file=prompts, reward_checkpoint_path=world / "rm")


@pytest.mark.parametrize("separator", [None, "\n"])
def test_a_token_that_the_reward_model_lacks(separator, folder, world, tmp_path):
    """Catches an answer or a prompt that spells an added token without an embedding, such as many folders' [PAD]: an
    index error hours into a run, or with tensor parallelism the score of another text; and other answers' scores that
    it changes."""
    rm, other = tiny.copy_to_edit(world / "rm", tmp_path / "rm"), tmp_path / "other"
    tiny.write_tokenizer(rm, pad_token="[PAD]", added_tokens_decoder={"384": {"content": "[PAD]", "special": True}})
    with_another_tokenizer(rm, other)
    config = json.loads((rm / "config.json").read_text())
    kind = {} if separator is None else {"reward_model_type": "process", "step_separator": separator}
    (other / "config.json").write_text(json.dumps(config | kind))
    scores_of, texts = Scores(folder, other), [" it is 3", " is it [PAD] 4", " so"]
    _, scores, _ = scores_of(texts, [True] * 3, reward_error="skip")
    _, others, _ = scores_of(texts[::2], [True] * 2)
    assert scores.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores[::2], others, rtol=1e-5, atol=1e-5)
    why = "--reward_checkpoint_path: a.jsonl:1: the answer holds token id 384, which the reward model does not have"
    with pytest.raises(ValueError, match=f"{why}; --reward_error zero or skip lets the run go on"):
        scores_of(texts, [True] * 3)
    prompts = tiny.write_records(tmp_path / "prompts.jsonl", [{"prompt": "So", "bonus": 1}, {"prompt": "[PAD]?"}])
    given = {"prompt_file": prompts, "reward_fn": None, "reward_checkpoint_path": other}
    result = tiny.run("training/train_ppo.py", *flags(folder, world, tmp_path / "out", **given))
    tiny.assert_refused(result, f"{other}: the prompt of {prompts}:2: holds token id 384, which the model")


def test_a_broken_policy_names_the_record(folder, world, tmp_path):
    """Catches an error with an answer's number instead of the record's file and line."""
    policy = shutil.copytree(folder, tmp_path / "policy")
    model = transformers.AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.inf)
    model.save_pretrained(policy)
    result = tiny.run("training/train_ppo.py", *flags(policy, world, tmp_path / "out"))
    tiny.assert_refused(result, "prompts.jsonl:", ": the log-probability of a token is nan")


@pytest.mark.parametrize(
    "grades, num_tokens, given, wanted",
    [
        (["0 0 1 1", "0 1 1 .5"], [3, 3], {"reward_fn_weight": [0.1, 0.2, 0.3, 0.4]}, 0.7),
        (["1", "0"], [12, 2], {"length_penalty": 0.1}, -0.2),
        (["0.1", "0.4"], [3, 16], {"missing_eos_penalty": 0.3}, 0.1),
        (["0.1", "0.35"], [16, 17], {"soft_punish_cache": 4}, 0.1),
        (["0.3", "0.2"], [3, 2], {"length_penalty": 0.1}, 0.0),
        (["nan", "0.3"], [3, 3], {"length_penalty": 0.1, "reward_error": "skip"}, 0.0),
    ],
)
def test_equal_sums_are_equal_rewards(grades, num_tokens, given, wanted, folder, tmp_path, monkeypatch):
    """Catches a total with a part in fp32, or rounded part by part: of two answers with the same reward one would be
    better than the other for GRPO, by a whole step where no group differs. And a 0 beside which a residue of the sum is
    better, unless it is the answer without a reward."""
    words = "def f{}(prompts, completions, examples): return [float(c.split()[{}]) for c in completions]\n"
    numbers = range(len(grades[0].split()))
    (tmp_path / "f.py").write_text("".join(words.format(i, i) for i in numbers))
    given |= {"reward_fn": [f"{tmp_path}/f.py:f{i}" for i in numbers], "max_new_tokens": 20}
    args = train_grpo.GrpoArgs(checkpoint_path=folder, prompt_file=None, output_dir=None, **given)
    split = Split(2, init_mesh(torch.device("cpu"), 1)["dp"], 0)
    scorer = Scorer(args, None, None, None, load_reward_functions(args), split, Stop())
    answers = [Answer([5] * n, [0.0] * n, text, n < 16) for text, n in zip(grades, num_tokens)]
    monkeypatch.setattr(train_grpo, "draw", lambda *args: answers)
    monkeypatch.setattr(train_grpo, "resting", lambda *args: nullcontext())
    engine, prompt = SimpleNamespace(device=torch.device("cpu")), Prompt([1], {}, "", "")
    rewards = train_grpo.answers_to(engine, scorer, [prompt] * 2, 0, 0).rewards
    assert rewards.dtype == torch.float32 and rewards.isnan().tolist() == ["nan" in text for text in grades]
    assert set(rewards[~rewards.isnan()].tolist()) == {torch.tensor(wanted).item()}


def test_stop_kl(folder, world, tmp_path):
    """Catches a run that goes on with a diverged policy or loses its state, a bound on another number than the logged
    KL, one that forbids the export of a run that is ended there, a last update without its line where --log_steps
    writes few, and a bound without a KL to measure."""
    first = {"stop_kl": 1e-6, "total_steps": 9, "log_steps": 9}
    result = tiny.run("training/train_ppo.py", *flags(folder, world, tmp_path / "out", **first))
    [line] = tiny.read_lines(tmp_path / "out/metrics.jsonl")
    tiny.assert_refused(result, f"--stop_kl 1e-06: the KL of update 2 is {line['objective/kl']:.4g}; ")
    assert line["step"] == 2 and line["objective/kl"] > 1e-6  # in the first update the policy is its reference
    last = {"total_steps": 2, "accept_changed": "total_steps", "resume": True}
    result = tiny.run("training/train_ppo.py", *flags(folder, world, tmp_path / "out", stop_kl=1e-6, **last))
    assert result.code == 0 and (tmp_path / "out/config.json").exists(), result.stderr
    groups = {"value_learning_rate": None, "ppo_epochs": None, "num_generations": 2}
    words = flags(folder, world, tmp_path / "groups", stop_kl=1e-6, beta=0.1, total_steps=9, log_steps=9, **groups)
    result = tiny.run("training/train_grpo.py", *words)
    [line] = tiny.read_lines(tmp_path / "groups/metrics.jsonl")
    tiny.assert_refused(result, f"--stop_kl 1e-06: the KL of update {line['step']} is {line['kl']:.4g}; ")
    assert (tmp_path / "out/checkpoints/step-000002").is_dir()
    words = flags(folder, world, tmp_path / "no", stop_kl=1, **groups)
    tiny.assert_refused(tiny.run("training/train_grpo.py", *words), "--stop_kl 1.0 does nothing without a --beta")


def test_what_is_said_of_a_diverging_policy(capsys):
    """Catches a warning at every update, about usual values, or with flags that the script does not have, and a run
    whose rewards teach nothing without a word."""
    divergence = Divergence(DivergenceArgs(), 1000, "a higher --kl_coef", Stop())
    for step in (1, 2):
        divergence.look(step, kl=3.0, tokens=60, entropy=2.0, approx_kl=0.01)
    assert capsys.readouterr().out == ""
    for step in (3, 4, 5):
        divergence.look(step, kl=300.0, tokens=100, entropy=6.0, approx_kl=2.0, all_alike=step > 3)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" is ")[0] for line in said[:3]] == [
        f"update 3: the {what} of a token" for what in ("KL", "approxkl", "entropy")
    ]
    assert "--kl_coef" in said[0] and "--ppo_epochs" in said[1]
    assert said[3].startswith("update 4: the rewards of each group are equal, so they teach nothing")
