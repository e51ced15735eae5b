"""training/train_ppo.py: scores by hand, what it measures, kills and resumes, refusals. What it learns is in
test_ppo_optimum.py, the parts of its losses in test_losses_ppo.py, several ranks in test_parallel_ppo.py.
"""

import json
import math
import os
import re
import signal
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.checkpoint import open_folder
from models.common import Runtime
from models.fsdp import ParallelArgs, init_mesh, load_frozen
from models.records import IGNORE_INDEX, Example, Split, encode_prompt
from models.tokenizer import Tokenizer
from tests import tiny
from tests.training.test_train_rm import make_records
from training import rewards, rollouts, run_dir, train_ppo
from training.rewards import RewardArgs, Scorer
from training.rollouts import Prompt

SCRIPT = "training/train_ppo.py"
REWARDS = """
import math

def reward(prompts, completions, examples):
    return [len(c) / 10 + example["bonus"] for c, example in zip(completions, examples)]

def raises(prompts, completions, examples):
    raise KeyError("no such thing")

def short(prompts, completions, examples):
    return [1.0] * (len(completions) - 1)

def nan(prompts, completions, examples):
    return [math.nan for _ in completions]

def words(prompts, completions, examples):
    return ["good" for _ in completions]

def two(prompts, completions):
    return [0.0 for _ in completions]

def generator(prompts, completions, examples):
    for example in examples:
        yield example["no such field"]

def leaves(prompts, completions, examples):
    raise SystemExit(0)

def digits(prompts, completions, examples):
    return "1" * len(completions)

def each(prompt, completion, example):
    if "more" in completion:
        raise KeyError("more")
    return len(completion)

async def soon(prompt, completion, example):
    return len(prompt)

async def all_soon(prompts, completions, examples):
    return [example["bonus"] for example in examples]

def hangs(prompt, completion, example):
    print("a protocol that is not only ours")
    while example["bonus"] == 2:
        pass
    return 1

calls = []

def nan_later(prompts, completions, examples):
    calls.append(1)
    return [math.inf if len(calls) == 3 else 0.0 for _ in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prompts of different lengths, reward functions, and a pairwise reward model of another size."""
    root = tmp_path_factory.mktemp("ppo")
    records = [{"prompt": f"Question {i}:" + " and so" * (i % 4), "bonus": i} for i in range(7)]
    tiny.write_records(root / "prompts.jsonl", records)
    tiny.write_records(root / "held_out.jsonl", records[:3])
    (root / "fn.py").write_text(REWARDS)
    (root / "leaves.py").write_text("raise SystemExit(0)\n")
    (root / "more.py").write_text("def each(prompt, completion, example):\n    return 7\n")
    only_here = "import os\nassert os.getpid() == int(os.environ['PID_OF_THIS_TEST'])\n"
    (root / "only_here.py").write_text(only_here + "def reward(prompt, completion, example):\n    return 1\n")
    tiny.write_model(root / "lm", seed=7, num_hidden_layers=1)
    pairs = tiny.write_records(root / "pairs.jsonl", make_records("pairwise", 4))
    flags = ["--checkpoint_path", root / "lm", "--train_file", pairs, "--output_dir", root / "rm", "--max_steps", 0]
    assert tiny.run("training/train_rm.py", *flags).code == 0
    return root


def flags(folder, world, out, **more):
    given = {"checkpoint_path": folder, "prompt_file": world / "prompts.jsonl", "output_dir": out, "save_steps": 0}
    given |= {"reward_fn": f"{world / 'fn.py'}:reward", "device": "cpu", "max_new_tokens": 6, "total_steps": 4}
    given |= {"rollout_batch_size": 6, "minibatch_size": 3, "micro_batch_size": 2, "ppo_epochs": 2}
    given |= {"learning_rate": 1e-3, "value_learning_rate": 1e-3, **more}
    kept = {name: value for name, value in given.items() if value is not None}
    each = [(name, v) for name, value in kept.items() for v in (value if isinstance(value, list) else [value])]
    return [part for name, v in each for part in ([f"--{name}"] if v is True else [f"--{name}", v])]


def ppo(*args, **more):
    result = tiny.run(SCRIPT, *flags(*args, **more))
    assert result.code == 0, result.stderr
    return tiny.read_lines(args[2] / "metrics.jsonl")


# ------------------------------------------------------------------------------------ what is drawn and measured


def test_metrics_and_samples(folder, world, tmp_path):
    """Catches engine and trainer that differ in the log-probs of the same tokens, first-minibatch identities that do
    not hold, packed answers that see each other, an evaluation that moves the training by a bit, metrics that are not
    of the answers, and a folder of a step without one of the models."""
    constant = {"lr_schedule": "constant", "warmup_ratio": 0}
    lines = ppo(folder, world, tmp_path / "plain", debug_checks=True, export_steps=3, **constant)
    more = {"eval_prompt_file": world / "held_out.jsonl", "eval_steps": 2, "log_steps": 3}
    more |= {"reward_fn": [f"{world / 'fn.py'}:{name}" for name in ("reward", "hangs")], "reward_fn_weight": [1, 0]}
    more |= {"reward_timeout": 0.3, "reward_workers": 1}  # the second hangs for one record, and weighs nothing
    watched = ppo(folder, world, tmp_path / "watched", **constant, **more)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [line["step"] for line in watched] == [0, 2, 3, 4]
    assert lines[0]["objective/kl"] == 0 and lines[1]["objective/kl"] != 0
    for line in lines:
        assert line["engine/logprob_gap_max"] < 1e-5 and line["grad_norm"] > 0 and line["value_grad_norm"] > 0
        wanted = line["objective/scores"] - line["kl_coef"] * line["objective/kl"]
        assert line["objective/rlhf_reward"] == pytest.approx(wanted)
        assert line["loss"] == pytest.approx(line["loss/policy_avg"] + line["loss/value_avg"])
        assert 0 < line["completion_length"] <= 6 and line["episode"] == 6 * line["step"]
    assert lines[-1]["num_tokens"] == pytest.approx(6 * sum(line["completion_length"] for line in lines))
    assert [line["step"] for line in watched if "eval_objective/scores" in line] == [0, 2, 4]
    for line in watched[1:]:  # a busy machine may take too long for more than those that hang
        hung = train_ppo.prompt_numbers(7, 6 * (line["step"] - 1), 6, seed=0).count(2)
        assert line["rewards/hangs/timeouts"] >= hung and line["rewards/hangs/mean"] == 1
        assert line["rewards/reward/mean"] == pytest.approx(line["objective/scores"])
    assert [line["step"] for line in watched if line.get("eval_rewards/hangs/timeouts", 0) >= 1] == [0, 2, 4]
    samples = tiny.read_lines(tmp_path / "watched/samples.jsonl")
    assert [sample["step"] for sample in samples] == [0] * 3 + [2] * 3 + [4] * 3
    for sample, bonus in zip(samples, [0, 1, 2] * 3):
        assert sample["score"] == pytest.approx(len(sample["output"]) / 10 + bonus)
    assert_same_weights(tmp_path / "plain", tmp_path / "watched")
    size = {"micro_batch_size": None, "max_tokens_per_micro_batch": 40}
    [packed] = ppo(folder, world, tmp_path / "packed", **constant, **size, total_steps=1)
    for name in packed.keys() - {name for name in packed if name.startswith(TIMED)}:
        assert packed[name] == pytest.approx(lines[0][name], rel=1e-4, abs=1e-6), name
    for out in (tmp_path / "plain", tmp_path / "plain/step-000003"):  # both models, in the folder of a step too
        opened = transformers.AutoModelForSequenceClassification.from_pretrained(out / "critic")
        tokenizer = transformers.AutoTokenizer.from_pretrained(out / "critic")
        assert opened.score.weight.abs().max() > 0 and opened.config.pad_token_id == tokenizer.pad_token_id == 0
        transformers.AutoModelForCausalLM.from_pretrained(out)


def assert_same_weights(a, b):
    for part in ("model.safetensors", "critic/model.safetensors"):
        ours, theirs = load_file(a / part), load_file(b / part)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (part, name)


def test_prompts_that_are_too_long(folder, world, tmp_path):
    """Catches a limit that does not reach the cache or the held-out prompts, and a truncated prompt that loses its end,
    its BOS or its place in the count."""
    runs = {"all": {}, "skip": {}, "truncate": {"prompt_file": world / "one.jsonl"}}
    long = "never seen" + " and so" * 30 + " Question 1:"
    tiny.write_records(world / "one.jsonl", [{"prompt": long, "bonus": 0}])
    tiny.write_records(world / "mixed.jsonl", [{"prompt": "Question 1:", "bonus": 0}, {"prompt": long, "bonus": 0}])
    shown = {}
    for how, more in runs.items():
        given = {"prompt_file": world / "mixed.jsonl", "eval_prompt_file": world / "mixed.jsonl", **more}
        given |= {} if how == "all" else {"max_prompt_len": 8, "overlong": how}
        result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / how, total_steps=1, eval_steps=1, **given))
        assert result.code == 0, result.stderr
        shown[how] = result.stdout
    tokenizer = Tokenizer(folder)
    ids = encode_prompt(long, tokenizer)
    slots = {how: int(re.search(r"slots of (\d+) tokens", text)[1]) for how, text in shown.items()}
    assert slots["all"] >= len(ids) + 6 > 2 * slots["skip"] and slots["skip"] == slots["truncate"] >= 8 + 6
    assert re.search(r"prompts +1; 1 skipped\n *held out +1; 1 skipped\n", shown["skip"]), shown["skip"]
    assert re.search(r"prompts +1; 1 truncated\n *held out +2; 1 truncated\n", shown["truncate"]), shown["truncate"]
    kept = tokenizer.decode([*ids[:1], *ids[-7:]], skip_special_tokens=False)
    assert tiny.read_lines(tmp_path / "truncate/samples.jsonl")[1]["prompt"] == kept


def test_debug_checks_see_another_temperature(folder, world, tmp_path, monkeypatch):
    """Catches a sampler of another temperature than the log-probs': the ratio is 1 all the same."""
    real = rollouts.SamplingParams
    monkeypatch.setattr(rollouts, "SamplingParams", lambda temperature, **more: real(0.7 * temperature, **more))
    with pytest.raises(RuntimeError, match="away from those of the engine"):
        ppo(folder, world, tmp_path / "out", debug_checks=True)
    assert not (tmp_path / "out/config.json").exists()


def test_export_only(folder, world, tmp_path):
    """Catches weights changed by loading and saving, and a critic without its zero head."""
    assert ppo(folder, world, tmp_path / "out", total_steps=0) == []
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not load_file(tmp_path / "out/critic/model.safetensors")["score.weight"].any()


def test_critic_warmup(folder, world, tmp_path):
    """Catches a policy that moves while the critic warms up, and a critic that does not."""
    lines = ppo(folder, world, tmp_path / "out", total_steps=2, critic_warmup_steps=2, reward_checkpoint_path=None)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_file(tmp_path / "out/critic/model.safetensors")["score.weight"].any()
    assert [line["objective/kl"] for line in lines] == [0, 0]


# ------------------------------------------------------------------------------------------- scores


class Scores:
    """Scorer.score on given answers to "Question 1:", with a reward model's folder."""

    def __init__(self, policy, folder):
        self.tokenizer = Tokenizer(policy)
        self.reward = rewards.open_reward_folder(folder, open_folder(policy), 1)
        mesh = init_mesh(torch.device("cpu"), 1)
        self.split = Split(2, mesh["dp"], 0)
        runtime = Runtime(torch.device("cpu"), torch.float32, False)
        self.model = load_frozen(folder, mesh, None, ParallelArgs(), runtime, head="score")

    def __call__(self, texts, finished, functions=(), **flags):
        ids = encode_prompt("Question 1:", self.tokenizer)
        prompts = [Prompt(ids, {"prompt": "Question 1:", "bonus": 5}, "Question 1:", "Question 1:")] * len(texts)
        rows = []
        for text, ended in zip(texts, finished):
            answer = self.tokenizer.encode("Question 1:" + text)[len(ids) :] + [self.tokenizer.eos_token_id] * ended
            rows.append(Example(ids + answer, [IGNORE_INDEX] * len(ids) + answer))
        scorer = Scorer(RewardArgs(**flags), self.tokenizer, self.reward, self.model, list(functions), self.split)
        for i in range(0, len(texts), 2):  # the others are graded when they are scored
            scorer.submit(i, prompts[i], texts[i])
        self.given = scorer.score(prompts, rows, texts, finished)
        scorer.close()
        return rows, self.given.total, self.given.step_rewards


@torch.no_grad()
def hf_scores(folder, ids):
    """transformers' score of every token."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, :, 0]


TEXTS, FINISHED = [" it is 3", " so 4 or more", ""], [True, False, True]


def test_scores_of_all_sources(folder, world, capsys):
    """Catches a score beside the last token, an EOS added to an answer that has none, normalisation after a penalty or
    of the functions' part, weights swapped, a penalty of the wrong sign or count, two functions of one name in one
    metric, a function that fails and moves the score or the mean, and an async one that is not awaited."""
    scores_of = Scores(folder, world / "rm")
    assert scores_of.reward.same_tokenizer
    places = [f"{world / 'fn.py'}:reward", f"{world / 'fn.py'}:each", f"{world / 'more.py'}:each"]
    places += [f"{world / 'fn.py'}:soon", f"{world / 'fn.py'}:all_soon"]
    args = {
        "reward_fn": places,
        "reward_fn_weight": [0.5, 0.25, 2.0, 3.0, 4.0],
        "reward_model_weight": 2.0,
        "normalize_reward": True,
        "missing_eos_penalty": 3.0,
        "length_penalty": 0.25,
        "reward_workers": 1,
        "reward_error": "zero",
    }
    functions = rewards.load_reward_functions(RewardArgs(**args))
    rows, scores, steps = scores_of(TEXTS, FINISHED, functions, **args)
    config = json.loads((world / "rm/config.json").read_text())
    assert not steps.any()
    raws = []
    for row, text, ended, score in zip(rows, TEXTS, FINISHED, scores.tolist()):
        raws.append((hf_scores(world / "rm", row.input_ids)[-1].item() - config["reward_mean"]) / config["reward_std"])
        wanted = 2 * raws[-1] + 0.5 * (len(text) / 10 + 5) + 0.25 * (len(text) if ended else 0) + 2.0 * 7
        wanted += 3.0 * len("Question 1:") + 4.0 * 5 - 3.0 * (not ended) - 0.25 * row.num_targets
        assert score == pytest.approx(wanted, abs=1e-4)
    sources, metrics = scores_of.given.sources, rewards.source_metrics([scores_of.given])
    assert list(sources) == ["reward_model", "reward", "each", "each_2", "soon", "all_soon"]
    assert sources["reward_model"].tolist() == pytest.approx(raws, abs=1e-4)
    assert sources["each"].isnan().tolist() == [False, True, False]  # it raises for the second
    assert metrics["rewards/each/mean"] == (len(TEXTS[0]) + len(TEXTS[2])) / 2
    assert metrics["rewards/each/std"] == pytest.approx(torch.tensor([len(TEXTS[0]), 0.0]).std().item())
    assert (metrics["rewards/each/errors"], metrics["rewards/each/timeouts"]) == (1, 0)
    assert (metrics["rewards/each_2/mean"], metrics["rewards/each_2/std"], metrics["rewards/each_2/errors"]) == (
        7,
        0,
        0,
    )
    assert "--reward_fn: each gave an answer no grade: KeyError: 'more'" in capsys.readouterr().out
    assert set(metrics) == {f"rewards/{a}/{b}" for a in sources for b in ("mean", "std", "timeouts", "errors")}
    unset = {name: value for name, value in args.items() if name != "reward_error"}
    _, others, _ = scores_of(TEXTS, FINISHED, functions, **unset)
    assert others.isnan().tolist() == [False, True, False] and others[[0, 2]].equal(scores[[0, 2]])
    with pytest.raises(ValueError, match="--reward_fn: each gave an answer no grade: KeyError: 'more'; --reward_error"):
        scores_of(TEXTS, FINISHED, functions, **{**args, "reward_error": "refuse"})


def with_another_tokenizer(folder, copy):
    tiny.copy_to_edit(folder, copy)
    path = copy / "tokenizer.model"  # the same pieces, another file: only the comparison tells
    path.write_bytes(path.read_bytes() + b"\x1a\x00")  # an empty trainer_spec more
    return copy


def test_another_tokenizer_gets_the_text(folder, world, tmp_path):
    """Catches the policy's ids given to a reward model whose ids mean something else."""
    other = with_another_tokenizer(world / "rm", tmp_path / "rm")
    scores_of = Scores(folder, other)
    assert not scores_of.reward.same_tokenizer
    _, scores, _ = scores_of(TEXTS, FINISHED)
    hf = Tokenizer(other)
    for text, ended, score in zip(TEXTS, FINISHED, scores.tolist()):
        ids = hf.encode("Question 1:" + text) + [hf.eos_token_id] * ended
        assert score == pytest.approx(hf_scores(other, ids)[-1].item(), abs=1e-5)


@pytest.mark.parametrize("how", ["min", "prod", "last", "mean", "steps"])
def test_process_rewards(how, folder, world, tmp_path):
    """Catches steps scored or rewarded at other tokens than those that end them, logits taken for probabilities, and
    another aggregate."""
    process = tmp_path / "rm"
    tiny.copy_to_edit(world / "rm", process)
    path = process / "config.json"
    process_keys = {"reward_model_type": "process", "step_separator": "\n"}
    path.write_text(json.dumps(json.loads(path.read_text()) | process_keys))
    scores_of = Scores(folder, process)
    texts, finished = [" it is 3\n so 4\n or more", " it is 3\n"], [True, False]
    rows, scores, steps = scores_of(texts, finished, process_reward=how, reward_model_weight=2.0)
    prompt_ids = encode_prompt("Question 1:", scores_of.tokenizer)
    newline = scores_of.tokenizer.encode("a\n")[-1]
    for i, (row, text) in enumerate(zip(rows, texts)):
        answer = row.input_ids[len(prompt_ids) :]
        ends = [j for j, token in enumerate(answer) if token == newline]
        ids = row.input_ids[: len(row.input_ids) - finished[i]]
        ids = ids if text.endswith("\n") else [*ids, newline]
        probs = hf_scores(process, ids)[[j for j, token in enumerate(ids) if token == newline]].sigmoid()
        if how == "steps":
            wanted = torch.zeros(steps.shape[1])
            places = ends if text.endswith("\n") else [*ends, len(answer) - 1 - finished[i]]
            wanted[places] = 2 * probs
            torch.testing.assert_close(steps[i], wanted, rtol=1e-5, atol=1e-6)
            assert scores[i] == 0
        else:
            wanted = {"min": probs.min(), "prod": probs.prod(), "last": probs[-1], "mean": probs.mean()}[how]
            assert scores[i].item() == pytest.approx(2 * wanted.item(), rel=1e-5) and not steps.any()


# ---------------------------------------------------------------------------------- kill and resume

RUN = {"total_steps": 6, "kl_target": 0.01, "kl_horizon": 20, "save_steps": 3, "kl_coef": 0.2}
TIMED = ("time/", "tokens_per_second", "rollout_tokens", "update_tokens")


@pytest.fixture(scope="module")
def whole(folder, world, tmp_path_factory):
    """The run that nobody interrupts, with a KL coefficient that adapts; read it only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ppo(folder, world, out, **RUN)
    return out


def assert_same_run(resumed, whole):
    assert_same_weights(resumed, whole)
    ours, theirs = (tiny.read_lines(d / "metrics.jsonl") for d in (resumed, whole))
    untimed = lambda lines: [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]  # noqa: E731
    assert untimed(ours) == untimed(theirs) and [line["step"] for line in ours] == list(range(1, 7))


def test_kill_and_resume(whole, folder, world, tmp_path):
    """Catches an optimizer, the KL coefficient, the count of tokens or the order of the prompts that starts anew, noise
    of the sampler that is drawn twice, and a step twice in metrics.jsonl."""
    coefs = [line["kl_coef"] for line in tiny.read_lines(whole / "metrics.jsonl")]
    assert len(set(coefs)) == 6
    run, out = {**RUN, "save_steps": 1}, tmp_path / "out"
    process = tiny.start(SCRIPT, *flags(folder, world, out, **run))
    while process.poll() is None and not (out / "checkpoints/step-000002").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode in (-signal.SIGKILL, 0), errors
    result = tiny.run(SCRIPT, *flags(folder, world, out, **run, resume=True))
    assert result.code == 0 and "resuming after step" in result.stdout, result.stderr
    assert_same_run(out, whole)


def test_stop_and_resume(whole, folder, world, tmp_path, monkeypatch):
    """Catches SIGTERM that saves nothing, or a policy exported before its end; a flag that changes unseen, one that is
    accepted and has no effect, and a run of before --reward_fn became a list that may not go on."""
    out, write = tmp_path / "out", run_dir.Metrics.write

    def write_and_stop(self, values):
        write(self, values)
        if values["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run_dir.Metrics, "write", write_and_stop)
        result = tiny.run(SCRIPT, *flags(folder, world, out, **RUN))
    assert result.code == 0 and "stopped by a signal after update 2;" in result.stdout
    assert not (out / "config.json").exists() and not (out / "critic").exists()
    others = {"temperature": 0.5, "kl_coef": 0.3, "rollout_batch_size": 3, "length_penalty": 1.0, "cliprange": 0.3}
    for name, value in (others | {"lam": 0.5, "weight_decay": 10}).items():
        other = tiny.run(SCRIPT, *flags(folder, world, out, **{**RUN, name: value}, resume=True))
        tiny.assert_refused(other, f"--resume {out}: the run was begun with other --{name}")
    tiny.copy_to_edit(out, tmp_path / "other")
    ppo(folder, world, out, **RUN, resume=True)
    assert_same_run(out, whole)
    older = json.loads((tmp_path / "other/args.json").read_text())
    older |= {"reward_fn": older["reward_fn"][0], "reward_fn_weight": 1.0}
    del older["content_digests"]
    (tmp_path / "other/args.json").write_text(json.dumps(older))
    accepting = {**RUN, "kl_coef": 0.3, "accept_changed": "kl_coef", "resume": True}
    coefs = {line["step"]: line["kl_coef"] for line in ppo(folder, world, tmp_path / "other", **accepting)}
    assert coefs[3] == 0.3 and 0.3 not in (coefs[2], coefs[4])  # from where it adapts on


def test_infinite_reward_later(folder, world, tmp_path):
    """Catches a run that goes on with what is not a number, or saves it, one that loses the updates before, or the
    checkpoint before those, and one that cannot go on with another --reward_error, or learns then from what has no
    reward."""
    given = {"reward_fn": f"{world / 'fn.py'}:nan_later", "save_total_limit": 1, "total_steps": 6}
    for more, kept in (({}, ["step-000002"]), ({"resume": True}, ["step-000002", "step-000004"])):
        result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out", **given, **more))
        tiny.assert_refused(result, "--reward_fn: nan_later returned inf for the completion", "--reward_error zero or")
        assert f"the state after update {kept[-1][-1]} is saved" in result.stdout
        assert sorted(os.listdir(tmp_path / "out/checkpoints")) == kept
        assert not (tmp_path / "out/config.json").exists()
    skipping = ppo(folder, world, tmp_path / "out", **given, resume=True, reward_error="skip")
    assert [line["step"] for line in skipping] == [1, 2, 3, 4, 5, 6]
    whole = ppo(folder, world, tmp_path / "whole", **given, reward_error="skip")
    assert [line["rewards/num_skipped"] for line in whole] == [0, 0, 6, 0, 0, 0] and whole[2]["grad_norm"] == 0
    assert [line["rewards/nan_later/errors"] for line in whole] == [0, 0, 6, 0, 0, 0]


def test_gradient_not_finite(folder, world, tmp_path, monkeypatch):
    """Catches a broken gradient stepped with, and a complaint without the prompts' numbers."""
    real, calls = train_ppo.clip_grad_norm, []

    def norm(model, most, scale):
        calls.append(1)
        return real(model, most, scale) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(train_ppo, "clip_grad_norm", norm)
    result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out"))
    numbers = train_ppo.prompt_numbers(7, 0, 6, seed=0)
    tiny.assert_refused(result, "step 1: grad_norm is nan", ", ".join(map(str, numbers)) + "\n")


# ---------------------------------------------------------------------------------------- bad input

FN = "{world}/fn.py"
BAD_FLAGS = {
    "no reward": ({"reward_fn": None}, ["nothing to learn from", "--reward_fn"]),
    "no such file": ({"reward_fn": "nowhere.py:reward"}, ["--reward_fn nowhere.py:reward", "no file"]),
    "no name": ({"reward_fn": FN}, ["--reward_fn", "must be FILE.py:NAME"]),
    "no such function": ({"reward_fn": FN + ":magic"}, ["has no function magic"]),
    "two parameters": (
        {"reward_fn": FN + ":two"},
        ["fn.py:two: must take (prompts, completions, examples)", "or (prompt, completion, example) and"],
    ),
    "weights": ({"reward_fn_weight": [1, 2]}, ["--reward_fn_weight: 2 for 1 of --reward_fn"]),
    "not in a worker": (
        {"reward_fn": "{world}/only_here.py:reward"},
        ["only_here.py cannot be imported: AssertionError"],
    ),
    "no time": ({"reward_timeout": 0}, ["--reward_timeout", "> 0"]),
    "no workers": ({"reward_workers": 0}, ["--reward_workers", ">= 1"]),
    "no memory": ({"reward_memory": 0}, ["--reward_memory", "> 0"]),
    "no score head": ({"reward_checkpoint_path": "{world}/lm"}, ["not a reward model", "no score.weight"]),
    "no statistics": ({"normalize_reward": True}, ["--normalize_reward needs a reward model"]),
    "minibatch": ({"minibatch_size": 4}, ["--minibatch_size 4 does not divide --rollout_batch_size 6"]),
    "micro batch": ({"micro_batch_size": 5}, ["--micro_batch_size 5", "--minibatch_size 3"]),
    "int4 groups of the reference": ({"quantize_ref": "int4"}, ["no group size divides", "intermediate_size 112"]),
    "int4 groups of the reward": (
        {"quantize_reward": "int4", "reward_checkpoint_path": "{world}/rm"},
        ["no group size divides", "intermediate_size 112"],
    ),
    "quantised nothing": (
        {"quantize_reward": "int8"},
        ["--quantize_reward int8 does nothing without a --reward_checkpoint_path"],
    ),
    "eval steps": ({"eval_steps": 2}, ["--eval_steps needs an --eval_prompt_file"]),
    "no room": ({"max_new_tokens": 256}, ["--max_new_tokens 256", "256 tokens"]),
    "prompts too long": (
        {"max_new_tokens": 250},
        ["prompts.jsonl:", "the limit is 6 (", "--overlong skip or truncate"],
    ),
    "longer than allowed": ({"max_prompt_len": 5}, ["prompts.jsonl:", "the limit is 5 (--max_prompt_len"]),
    "no prompt left": (
        {"max_prompt_len": 1, "overlong": "skip"},
        ["no prompt is left: all 7 are longer"],
    ),
    "prompts beside answers": (
        {"max_prompt_len": 251},
        ["--max_prompt_len 251 and --max_new_tokens 6 are more"],
    ),
    "two sizes": ({"max_tokens_per_micro_batch": 9}, ["--max_tokens_per_micro_batch", "place of --micro_batch_size"]),
    "leaves at once": ({"reward_fn": "{world}/leaves.py:reward"}, ["leaves.py cannot be imported: SystemExit"]),
    "no weight": ({"reward_fn_weight": "nan"}, ["--reward_fn_weight", "'nan' is not a float"]),
    "temperature 0": ({"temperature": 0}, ["--temperature"]),
    "dual clip": ({"dual_clip": 0.5}, ["--dual_clip"]),
    "nothing to adapt": ({"kl_target": 1, "kl_coef": 0}, ["--kl_target 1.0", "--kl_coef of 0"]),
    "whitened beside the KL": ({"kl_in": "loss", "whiten_rewards": True}, ["--whiten_rewards", "--kl_in loss"]),
    "other reference": ({"ref_checkpoint_path": "{world}/odd"}, ["odd: a reference", "another vocabulary"]),
    "other critic": ({"value_checkpoint_path": "{world}/odd"}, ["odd: a critic", "another vocabulary"]),
    "short critic": ({"value_checkpoint_path": "{world}/short"}, ["short: a critic reads rows of", "context is 16"]),
    "short reward model": (
        {"reward_checkpoint_path": "{world}/short_rm", "value_checkpoint_path": "{world}/rm"},
        ["short_rm: a reward model reads rows of", "context is 16"],
    ),
}


def shorten(folder):
    """Gives a model's folder a context of 16 tokens."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 16}))
    return folder


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(name, folder, world, tmp_path, monkeypatch):
    """Catches a mistake found only after an update, a traceback, and output for nothing."""
    given, parts = BAD_FLAGS[name]
    monkeypatch.setenv("PID_OF_THIS_TEST", str(os.getpid()))
    if "other" in name and not (world / "odd").exists():
        tiny.write_model(world / "odd", vocab_size=400)
    if name == "short critic":
        tiny.write_model(world / "short", max_position_embeddings=16)
    if name == "short reward model":
        shorten(tiny.copy_to_edit(world / "rm", world / "short_rm"))
    given = {k: v.replace("{world}", str(world)) if isinstance(v, str) else v for k, v in given.items()}
    tiny.assert_refused(tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out", **given)), *parts)
    assert not (tmp_path / "out").exists()


BAD_REWARDS = {
    "raises": "--reward_fn: raises raised KeyError",
    "short": "--reward_fn: short returned 5 rewards for 6 completions",
    "nan": "--reward_fn: nan returned nan for the completion",
    "words": "--reward_fn: words must return a list of numbers",
    "digits": "--reward_fn: digits must return a list of numbers: TypeError: it is a str",
    "generator": "--reward_fn: generator raised KeyError: 'no such field'",
    "leaves": "--reward_fn: leaves raised SystemExit",
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_bad_reward_functions(name, folder, world, tmp_path):
    """Catches somebody's function trusted, or its traceback shown instead of its name."""
    result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out", reward_fn=f"{world / 'fn.py'}:{name}"))
    tiny.assert_refused(result, BAD_REWARDS[name])
    assert not (tmp_path / "out/config.json").exists() and not (tmp_path / "out/checkpoints").exists()


BAD_PROMPTS = {
    "empty": ("", "prompts.jsonl: holds no records"),
    "no prompt": ('{"prompt": "a"}\n{"text": "b"}\n', "prompts.jsonl:2: the field 'prompt' is missing"),
    "not text": ('{"prompt": 5}\n', "prompts.jsonl:1: prompt must be text"),
    "malformed": ('{"prompt": "a"\n', "prompts.jsonl:1: not valid JSON"),
    "no template": ('{"prompt": [{"role": "user", "content": "a"}]}\n', "prompts.jsonl:1: "),
}


@pytest.mark.parametrize("which", ["prompt_file", "eval_prompt_file"])
@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts(name, which, folder, world, tmp_path):
    """Catches a complaint without file and line."""
    content, complaint = BAD_PROMPTS[name]
    (tmp_path / "prompts.jsonl").write_text(content)
    given = {which: tmp_path / "prompts.jsonl"}
    tiny.assert_refused(tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out", **given)), complaint)
    assert not (tmp_path / "out").exists()


def test_occupied_output_dir(folder, world, tmp_path):
    """Catches somebody's files overwritten."""
    (tmp_path / "notes.txt").write_text("mine")
    tiny.assert_refused(tiny.run(SCRIPT, *flags(folder, world, tmp_path)), "is not empty")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_statistics_are_needed(folder, world, tmp_path):
    """Catches --normalize_reward that divides by nothing."""
    tiny.copy_to_edit(world / "rm", tmp_path / "rm")
    path = tmp_path / "rm/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "reward_std"}))
    given = {"reward_checkpoint_path": tmp_path / "rm", "normalize_reward": True}
    result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out", **given))
    tiny.assert_refused(result, "--normalize_reward needs a reward model whose config.json has")


@pytest.mark.parametrize("held_out", [False, True])
def test_broken_reward_model(held_out, folder, world, tmp_path):
    """Catches scores that are not numbers learnt from, or measured."""
    tiny.copy_to_edit(world / "rm", tmp_path / "rm")
    weights = load_file(tmp_path / "rm/model.safetensors")
    weights["score.weight"][0, 3] = math.inf
    save_file(weights, tmp_path / "rm/model.safetensors", metadata={"format": "pt"})
    given = {"reward_checkpoint_path": tmp_path / "rm", "value_checkpoint_path": folder}
    given |= {"eval_prompt_file": world / "held_out.jsonl"} if held_out else {}
    result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out", **given))
    complaint = "the reward model's score is not finite; its weights are broken"
    tiny.assert_refused(
        result, "--reward_checkpoint_path: ", f"{'held_out' if held_out else 'prompts'}.jsonl:", complaint
    )
