"""training/train_ppo.py: kills and resumes, and refusals. The world is that of test_train_ppo.py."""

import json
import math
import os
import signal
import time

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.forked import Forked
from tests.training.test_train_ppo import (  # noqa: F401 (fixtures)
    SCRIPT,
    TIMED,
    assert_same_weights,
    flags,
    ppo,
    shorten,
    world,
)
from training import train_ppo
from training.metrics import Metrics

# ---------------------------------------------------------------------------------- kill and resume

RUN = {"total_steps": 4, "kl_target": 0.01, "kl_horizon": 20, "save_steps": 3, "kl_coef": 0.2}


@pytest.fixture(scope="module")
def whole(folder, world, tmp_path_factory):
    """The run that is not interrupted, with a KL coefficient that adapts; read it only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ppo(folder, world, out, **RUN)
    return out


def assert_same_run(resumed, whole):
    assert_same_weights(resumed, whole)
    ours, theirs = (tiny.read_lines(d / "metrics.jsonl") for d in (resumed, whole))
    untimed = lambda lines: [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]  # noqa: E731
    assert untimed(ours) == untimed(theirs) and [line["step"] for line in ours] == [1, 2, 3, 4]


def test_kill_and_resume(whole, folder, world, tmp_path):
    """Catches an optimizer, a KL coefficient, a token count or a prompt order that restarts, sampling noise that is
    used twice, and a step twice in metrics.jsonl."""
    coefs = [line["kl_coef"] for line in tiny.read_lines(whole / "metrics.jsonl")]
    assert len(set(coefs)) == 4
    run, out = {**RUN, "save_steps": 1}, tmp_path / "out"
    process = Forked(SCRIPT, *flags(folder, world, out, **run))
    while process.poll() is None and not (out / "checkpoints/step-000002").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode in (-signal.SIGKILL, 0), errors
    result = tiny.run(SCRIPT, *flags(folder, world, out, **run, resume=True))
    assert result.code == 0 and "resuming after step" in result.stdout, result.stderr
    assert_same_run(out, whole)


def test_stop_and_resume(whole, folder, world, tmp_path, monkeypatch):
    """Catches a SIGTERM that saves nothing, or a policy exported before the end; a flag that changes unnoticed; and an
    accepted change without effect, lost in a stop before the next checkpoint, or made again after that."""
    out, write, draw, last = tmp_path / "out", Metrics.write, train_ppo.draw, 2

    def write_and_stop(self, values):
        write(self, values)
        if values["step"] == last:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", write_and_stop)
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
    accepting = {**RUN, "kl_coef": 0.3, "accept_changed": "kl_coef", "resume": True}
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "draw", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or draw(*args))
        result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / "other", **accepting))
    assert result.code == 0 and "stopped by a signal after update 2;" in result.stdout, result.stderr
    last = 3
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", write_and_stop)
        assert tiny.run(SCRIPT, *flags(folder, world, tmp_path / "other", **accepting)).code == 0
    coefs = {line["step"]: line["kl_coef"] for line in ppo(folder, world, tmp_path / "other", **accepting)}
    assert coefs[3] == 0.3 and 0.3 not in (coefs[2], coefs[4])  # from there it adapts on


def test_infinite_reward_later(folder, world, tmp_path):
    """Catches a run that goes on with an infinite reward, or saves what it led to; one that loses the updates before,
    or the checkpoint before those; and one that cannot resume with another --reward_error, or then trains on answers
    without a reward."""
    given = {"reward_fn": f"{world / 'fn.py'}:nan_later", "save_total_limit": 1, "total_steps": 3}
    for more, kept in (({}, ["step-000001"]), ({"resume": True}, ["step-000001", "step-000002"])):
        result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out", **given, **more))
        tiny.assert_refused(result, "--reward_fn: nan_later returned inf for the completion", "--reward_error zero or")
        assert f"the state after update {kept[-1][-1]} is saved" in result.stdout
        assert sorted(os.listdir(tmp_path / "out/checkpoints")) == kept
        assert not (tmp_path / "out/config.json").exists()
    skipping = ppo(folder, world, tmp_path / "out", **given, resume=True, reward_error="skip")
    assert [line["step"] for line in skipping] == [1, 2, 3]
    whole = ppo(folder, world, tmp_path / "whole", **given, reward_error="skip")
    assert [line["rewards/num_skipped"] for line in whole] == [0, 6, 0] and whole[1]["grad_norm"] == 0
    assert [line["rewards/nan_later/errors"] for line in whole] == [0, 6, 0]


def test_gradient_not_finite(folder, world, tmp_path, monkeypatch):
    """Catches an optimizer step with a broken gradient, and an error without the prompts' numbers."""
    real, calls = train_ppo.clip_grad_norm, []

    def norm(model, most, scale):
        calls.append(1)
        return real(model, most, scale) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(train_ppo, "clip_grad_norm", norm)
    result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out"))
    numbers = train_ppo.prompt_numbers(7, 0, 6, seed=0)
    tiny.assert_refused(result, "step 1: grad_norm is nan", ", ".join(map(str, numbers)) + "\n")


# ---------------------------------------------------------------------------------------- bad input

FN = "{world}/fn.py"
UNREAD = {"prompt_file": "nowhere.jsonl"}  # what is found before the prompts are read
BAD_FLAGS = {
    "no reward": ({"reward_fn": None}, ["nothing to learn from", "--reward_fn"]),
    "no such file": ({"reward_fn": "nowhere.py:reward"}, ["--reward_fn nowhere.py:reward", "no file"]),
    "no name": ({"reward_fn": FN}, ["--reward_fn", "must be FILE.py:NAME"]),
    "no such function": ({"reward_fn": FN + ":magic"}, ["has no function magic"]),
    "two parameters": (
        {"reward_fn": FN + ":two"},
        ["fn.py:two: must take (prompts, completions, examples)", "or (prompt, completion, example) and"],
    ),
    "weights": ({"reward_fn_weight": [1, 2]}, ["--reward_fn_weight: 2 weights for 1 --reward_fn"]),
    "not in a worker": (
        {"reward_fn": "{world}/only_here.py:reward"},
        ["only_here.py cannot be imported: AssertionError"],
    ),
    "no time": ({"reward_timeout": 0}, ["--reward_timeout", "> 0"]),
    "no workers": ({"reward_workers": 0}, ["--reward_workers", ">= 1"]),
    "no memory": ({"reward_memory": 0}, ["--reward_memory", "> 0"]),
    "more memory than a limit can name": ({"reward_memory": 1e11}, ["--reward_memory", "<= 1000000000"]),
    "no score head": ({"reward_checkpoint_path": "{world}/lm", **UNREAD}, ["not a reward model", "no score.weight"]),
    "no statistics": ({"normalize_reward": True}, ["--normalize_reward needs a reward model"]),
    "minibatch": ({"minibatch_size": 4}, ["--minibatch_size 4 does not divide --rollout_batch_size 6"]),
    "micro batch": ({"micro_batch_size": 5}, ["--micro_batch_size 5", "--minibatch_size 3"]),
    "int4 groups of the reference": (
        {"quantize_ref": "int4", **UNREAD},
        ["--quantize_ref int4: no group size divides", "intermediate_size 112"],
    ),
    "int4 groups of the reward": (
        {"quantize_reward": "int4", "reward_checkpoint_path": "{world}/rm"},
        ["--quantize_reward int4: no group size divides", "intermediate_size 112"],
    ),
    "quantised nothing": (
        {"quantize_reward": "int8"},
        ["--quantize_reward int8 does nothing without a --reward_checkpoint_path"],
    ),
    "eval steps": ({"eval_steps": 2}, ["--eval_steps needs an --eval_prompt_file"]),
    "no room": ({"max_new_tokens": 256}, ["--max_new_tokens 256", "256 tokens"]),
    "prompts too long": (
        {"max_new_tokens": 250},
        ["prompts.jsonl:", "the limit is 6; lower --max_new_tokens or choose ", "--overlong skip or truncate"],
    ),
    "longer than allowed": ({"max_prompt_len": 5}, ["prompts.jsonl:", "the limit is 5; raise --max_prompt_len"]),
    "no prompt left": (
        {"max_prompt_len": 1, "overlong": "skip"},
        ["no prompt is left: all 7 are longer"],
    ),
    "prompts beside answers": (
        {"max_prompt_len": 251},
        ["--max_prompt_len 251 and --max_new_tokens 6 are more"],
    ),
    "two sizes": ({"max_tokens_per_micro_batch": 9}, ["--max_tokens_per_micro_batch replaces --micro_batch_size"]),
    "leaves at once": ({"reward_fn": "{world}/leaves.py:reward"}, ["leaves.py cannot be imported: SystemExit"]),
    "no weight": ({"reward_fn_weight": "nan"}, ["--reward_fn_weight", "'nan' is not a float"]),
    "temperature 0": ({"temperature": 0}, ["--temperature"]),
    "dual clip": ({"dual_clip": 0.5}, ["--dual_clip"]),
    "nothing to adapt": ({"kl_target": 1, "kl_coef": 0}, ["--kl_target 1.0", "--kl_coef of 0"]),
    "whitened beside the KL": ({"kl_in": "loss", "whiten_rewards": True}, ["--whiten_rewards", "--kl_in loss"]),
    "other reference": ({"ref_checkpoint_path": "{world}/odd", **UNREAD}, ["odd: a reference", "another vocabulary"]),
    "other critic": ({"value_checkpoint_path": "{world}/odd", **UNREAD}, ["odd: a critic", "another vocabulary"]),
    "reference with a score": (
        {"ref_checkpoint_path": "{world}/rm", **UNREAD},
        ["rm: a reward model (it has score.weight)"],
    ),
    "offload to itself": ({"cpu_offload": True, **UNREAD}, ["--cpu_offload", "this run is on the CPU"]),
    "short critic": ({"value_checkpoint_path": "{world}/short"}, ["short: a critic reads rows of", "context is 16"]),
    "short reward model": (
        {"reward_checkpoint_path": "{world}/short_rm", "value_checkpoint_path": "{world}/rm"},
        ["short_rm: a reward model reads rows of", "context is 16"],
    ),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(name, folder, world, tmp_path, monkeypatch):
    """Catches a mistake found only after an update, a traceback, and output left behind."""
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
    """Catches a user's function trusted, or its traceback shown instead of its name."""
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
    """Catches an error without file and line, and one about held-out prompts that comes after the others were read."""
    content, complaint = BAD_PROMPTS[name]
    (tmp_path / "prompts.jsonl").write_text(content)
    given = {**UNREAD, which: tmp_path / "prompts.jsonl"}
    tiny.assert_refused(tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out", **given)), complaint)
    assert not (tmp_path / "out").exists()


def test_occupied_output_dir(folder, world, tmp_path):
    """Catches a user's files overwritten."""
    (tmp_path / "notes.txt").write_text("mine")
    tiny.assert_refused(tiny.run(SCRIPT, *flags(folder, world, tmp_path)), "is not empty")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_statistics_are_needed(folder, world, tmp_path):
    """Catches --normalize_reward without the statistics to normalise with."""
    tiny.copy_to_edit(world / "rm", tmp_path / "rm")
    path = tmp_path / "rm/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "reward_std"}))
    given = {"reward_checkpoint_path": tmp_path / "rm", "normalize_reward": True}
    result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out", **given))
    tiny.assert_refused(result, "--normalize_reward needs a reward model whose config.json has")


@pytest.mark.parametrize("held_out", [False, True])
def test_broken_reward_model(held_out, folder, world, tmp_path):
    """Catches scores that are not finite trained on, or measured."""
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
