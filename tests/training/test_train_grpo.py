"""training/train_grpo.py: the inputs of its steps, resampled groups, metrics, kills and resumes, refusals. What it
learns is in test_grpo_optimum.py, its losses in test_losses_grpo.py, several ranks in test_parallel_grpo.py."""

import math
import os
import shutil
import signal
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.forked import Forked
from tests.training.optimum import LETTERS, write_letters
from training import samples, train_grpo
from training.data import ORDER, epoch_order, order_flags
from training.finetune_sft import SftArgs
from training.grpo_losses import LOSS_TYPES, group_advantages, group_spread, leave_one_out_advantages
from training.metrics import Metrics
from training.train_dpo import DpoArgs
from training.train_grpo import GrpoArgs
from training.train_rm import RmArgs

SCRIPT = "training/train_grpo.py"
REWARDS = """
def length(prompts, completions, examples):
    return [len(c) + example["bonus"] for c, example in zip(completions, examples)]

def tenth(prompts, completions, examples):
    return [0.1 for _ in completions]

def odd(prompts, completions, examples):
    return [float(len(c) % 2) for c in completions]

def same(prompts, completions, examples):
    return [float(example["bonus"]) for example in examples]

def some_same(prompts, completions, examples):
    return [float(example["bonus"] if example["bonus"] % 2 else len(c)) for c, example in zip(completions, examples)]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Writes a model of letters, which ends some of its answers, ragged prompts and reward functions."""
    root = tmp_path_factory.mktemp("grpo")
    write_letters(root / "lm", 0)
    records = [{"prompt": "abcdefg"[: 1 + i % 4], "bonus": i} for i in range(6)]
    tiny.write_records(root / "prompts.jsonl", records)
    tiny.write_records(root / "held_out.jsonl", records[:3])
    (root / "fn.py").write_text(REWARDS)
    return root


def flags(world, out, **more):
    given = {"checkpoint_path": world / "lm", "prompt_file": world / "prompts.jsonl", "output_dir": out}
    given |= {"reward_fn": f"{world / 'fn.py'}:length", "device": "cpu", "max_new_tokens": 6, "total_steps": 2}
    given |= {"rollout_batch_size": 12, "num_generations": 4, "learning_rate": 1e-2, "save_steps": 0, **more}
    kept = {name: value for name, value in given.items() if value is not None}
    return [part for name, v in kept.items() for part in ([f"--{name}"] if v is True else [f"--{name}", v])]


def grpo(world, out, **more):
    result = tiny.run(SCRIPT, *flags(world, out, **more))
    assert result.code == 0, result.stderr
    return tiny.read_lines(out / "metrics.jsonl")


@torch.no_grad()
def hf_logps(folder, rows, prompt_lengths):
    """Returns transformers' log-probs of the answers' tokens, a tensor for each row."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for ids, length in zip(rows, prompt_lengths):
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)[length - 1 : -1]
        found.append(logps.gather(-1, torch.tensor(ids[length:])[:, None])[:, 0])
    return found


# ------------------------------------------------------------------------------------ inputs of the steps


@pytest.fixture
def seen(monkeypatch):
    """Records the groups of each update, and the arguments of grpo_losses in it."""
    record, real_groups, real_losses = [], train_grpo.groups_of, train_grpo.grpo_losses

    def groups_of(sampled, *more):
        record.append((sampled, real_groups(sampled, *more), []))
        return record[-1][1]

    def grpo_losses(args, logps, old_logps, advantages, mask, **more):
        record[-1][2].append((logps.detach(), old_logps, advantages, mask, more))
        return real_losses(args, logps, old_logps, advantages, mask, **more)

    monkeypatch.setattr(train_grpo, "groups_of", groups_of)
    monkeypatch.setattr(train_grpo, "grpo_losses", grpo_losses)
    return record


@pytest.mark.parametrize("loss_type", ["grpo", "rloo"])
def test_what_steps_learn_from(loss_type, world, tmp_path, seen):
    """Catches a group mixed over prompts, an advantage of another answer, the EOS out of the mask, truncated answers
    trained on although masked, a KL of other tokens than those trained on, and log-probs of the sampling policy taken
    after the first step. Everything is recomputed from texts, with transformers' log-probs."""
    more = {"beta": 0.3, "num_iterations": 2, "mask_truncated_completions": True, "total_steps": 1}
    grpo(world, tmp_path / "out", loss_type=loss_type, micro_batch_size=5, **more)
    [([sampled], found, calls)] = seen
    eos = len(LETTERS)
    prompts = [prompt.ids for prompt in sampled.prompts]
    assert all(prompts[i] == prompts[i - i % 4] for i in range(12)) and len({tuple(ids) for ids in prompts}) == 3
    rewards = torch.tensor([float(len(a.text) + p.fields["bonus"]) for a, p in zip(sampled.answers, sampled.prompts)])
    rows = [row.input_ids for row in found.rows]
    logps = hf_logps(world / "lm", rows, [len(ids) for ids in prompts])
    assert 0 < sum(sampled.finished) < 12
    for i, (row, answer) in enumerate(zip(rows, sampled.answers)):
        assert row[: len(prompts[i])] == prompts[i]
        letters = row[len(prompts[i]) :]
        assert answer.text == "".join(LETTERS[k] for k in letters if k != eos)
        assert answer.finished == (letters[-1] == eos) and (answer.finished or len(letters) == 6)
        assert found.learnt[i].sum() == (len(letters) if answer.finished else 0)
        torch.testing.assert_close(found.logps[i, : len(letters)], logps[i], rtol=1e-4, atol=1e-5)
    # the reference is the model itself, so the KL is 0 and rewards do not change
    by_group = rewards.view(3, 4)
    if loss_type == "rloo":
        wanted = by_group - (by_group.sum(1, keepdim=True) - by_group) / 3
    else:
        wanted = (by_group - by_group.mean(1, keepdim=True)) / (by_group.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(found.advantages, wanted.flatten(), rtol=1e-4, atol=1e-4)
    first, second = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    for part, moved in ((first, False), (second, True)):
        gaps = torch.cat([((logps - old) * mask).abs().flatten() for logps, old, _, mask, _ in part])
        assert (gaps.max() > 1e-3) == moved
    for _, old, _, mask, others in first:
        torch.testing.assert_close(others["ref_logps"] * mask, old * mask, rtol=1e-4, atol=1e-5)


def test_kl_in_the_reward(world, tmp_path, seen):
    """Catches a KL of the wrong sign, of one token or over padding: with another reference, rloo's rewards are lower by
    beta times the log-ratio of the answer, in advantages that leave the answer itself out."""
    write_letters(tmp_path / "ref", 1)
    more = {"loss_type": "rloo", "beta": 0.3, "ref_checkpoint_path": tmp_path / "ref", "total_steps": 1}
    [line] = grpo(world, tmp_path / "out", **more)
    [([sampled], found, _)] = seen
    rows, lengths = [row.input_ids for row in found.rows], [len(prompt.ids) for prompt in sampled.prompts]
    policy, reference = (hf_logps(folder, rows, lengths) for folder in (world / "lm", tmp_path / "ref"))
    ratios = torch.stack([(p - r).sum() for p, r in zip(policy, reference)])
    rewards = sampled.rewards - 0.3 * ratios
    wanted = (rewards.view(3, 4) - rewards.view(3, 4).mean(1, keepdim=True)) * 4 / 3
    torch.testing.assert_close(found.advantages, wanted.flatten(), rtol=1e-4, atol=1e-4)
    assert line["kl"] == pytest.approx((ratios.sum() / sum(map(len, policy))).item(), rel=1e-4)
    assert line["reward"] == pytest.approx(sampled.rewards.mean().item())


def test_tis_cap(world, tmp_path, monkeypatch):
    """Catches --tis_cap without effect, and engine and trainer swapped in the weight: an engine off by one nat on every
    token scales the gradient by min(e, cap) or 1 / e."""
    [plain] = grpo(world, tmp_path / "plain", total_steps=1)
    real = train_grpo.as_rows
    for shift, weight in ((-1, 2), (1, math.exp(-1))):

        def as_rows(*args, shift=shift):
            rows, mask, engine_logps = real(*args)
            return rows, mask, engine_logps + shift * mask

        monkeypatch.setattr(train_grpo, "as_rows", as_rows)
        [line] = grpo(world, tmp_path / str(shift), total_steps=1, tis_cap=2)
        assert line["sampling/sampling_logp_difference/mean"] == pytest.approx(1, abs=1e-4)
        assert line["grad_norm"] == pytest.approx(weight * plain["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches(loss_type, world, tmp_path):
    """Catches a mean of micro-batches, for every loss type: weights must be those of whole steps."""
    run = {"loss_type": loss_type, "minibatch_size": 6, "num_iterations": 2, "mask_truncated_completions": True}
    run |= {"adam_eps": 1e-3, "learning_rate": 1e-3, "beta": 0.1, "epsilon_high": 5.0 if loss_type == "cispo" else 0.3}
    run |= {"total_steps": 1, "lr_schedule": "constant", "warmup_ratio": 0}
    lines = [grpo(world, tmp_path / str(size), micro_batch_size=size, **run) for size in (6, 2)]
    for ours, theirs in zip(*lines):
        for key in ours:
            if not key.startswith((*TIMED, "sampling/")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
    weights, wanted = (load_file(tmp_path / size / "model.safetensors") for size in ("6", "2"))
    for name in wanted:
        assert (weights[name] - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name


def test_one_step_on_policy(world, tmp_path, seen, monkeypatch):
    """Catches ratios other than 1 in an update of one step, to log-probs of another pass: over rloo's whole answers
    their rounding adds up, and is clipped in bf16."""
    real = train_grpo.all_logps
    monkeypatch.setattr(train_grpo, "all_logps", lambda *args: real(*args) * (1 + 1e-3))
    grpo(world, tmp_path / "out", loss_type="rloo", beta=0.3, total_steps=1, micro_batch_size=5)
    [(_, _, steps)] = seen
    assert len(steps) == 3 and all(torch.equal(logps, old_logps) for logps, old_logps, *_ in steps)


@pytest.mark.parametrize("scale", ["group", "batch", "none", "rloo"])
def test_equal_rewards_move_nothing(scale, world, tmp_path):
    """Catches a mean of equal rewards that is rounded to another number: the advantages' sign would then be that of the
    rounding, and AdamW takes a whole step for a gradient of any size. Where no group has a spread, weights stay."""
    loss = {"loss_type": "rloo"} if scale == "rloo" else {"scale_rewards": scale}
    more = {"reward_fn": f"{world / 'fn.py'}:tenth", "num_generations": 7, "rollout_batch_size": 14, **loss}
    result = tiny.run(SCRIPT, *flags(world, tmp_path / "out", **more))
    assert result.code == 0 and result.stdout.count("the rewards of each group are equal") == 1, result.stderr
    lines = tiny.read_lines(tmp_path / "out/metrics.jsonl")
    assert [line["grad_norm"] for line in lines] == [0.0, 0.0] and [line["reward_std"] for line in lines] == [0.0, 0.0]
    weights, start = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", world / "lm"))
    assert all(weights[name].equal(start[name]) for name in start)
    for count in range(2, 30):
        rewards = torch.arange(-20, 21).div(10).repeat_interleave(count)
        advantages = (leave_one_out_advantages(rewards, count), group_advantages(rewards, count, "group"))
        assert not any(each.any() for each in advantages) and not group_spread(rewards, count).any(), count


# ---------------------------------------------------------------------------------- resampled groups


def test_resamples(world, tmp_path, seen, monkeypatch):
    """Catches training on groups without a spread while others could be drawn, prompts that are skipped or taken twice,
    answers to one prompt that do not share its prefill, resampling that never ends, and a count of resampled groups
    that has the first ones too."""
    shared, real = [], samples.shared_work
    monkeypatch.setattr(samples, "shared_work", lambda name, sizes, dp: shared.extend(sizes) or real(name, sizes, dp))
    more = {"reward_fn": f"{world / 'fn.py'}:some_same", "max_resamples": 4, "total_steps": 3, "beta": 0}
    lines = grpo(world, tmp_path / "out", **more)
    taken = []
    for (sampled, found, _), line in zip(seen, lines):
        assert len(sampled) > 1 and len(found.rows) == 12
        alike = [train_grpo.all_alike(part.rewards, 4) for part in sampled]
        missing = [3, *[int(each.sum()) for each in alike]]
        assert [len(each) for each in alike] == missing[:-1] and (missing[-1] == 0 or len(sampled) == 5)
        assert (found.advantages.view(3, 4).abs().sum(1) > 0).sum() == 3 - missing[-1]
        taken += [prompt.fields["bonus"] for part in sampled for prompt in part.prompts[::4]]
        assert line["frac_reward_zero_std"] == pytest.approx(torch.cat(alike).double().mean().item())
        assert line["num_resampled_groups"] == sum(len(part.prompts) for part in sampled) / 4 - 3
    wanted = [i for epoch in range(9) for i in epoch_order(6, seed=0, epoch=epoch)]
    assert taken == wanted[: len(taken)]
    assert sum(shared) == 4 * len(taken) and not any(size % 4 for size in shared)
    texts = [[a.text for part in sampled for a in part.answers] for sampled, _, _ in seen]
    assert texts[0] != texts[1]  # other noise
    same = grpo(world, tmp_path / "same", reward_fn=f"{world / 'fn.py'}:same", max_resamples=1, total_steps=1)
    assert same[0]["frac_reward_zero_std"] == 1 and same[0]["grad_norm"] == 0


# ----------------------------------------------------------------------------- metrics and samples


def test_metrics_and_samples(world, tmp_path, monkeypatch):
    """Catches a baseline that is not measured, or changes the training by a bit, metrics of other answers, another
    estimate of pass@k, an answer ended by a --stop string taken for unfinished or trained on without its end, and NCCL
    started for one GPU, which has nothing to reduce."""
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    plain = grpo(world, tmp_path / "plain", stop="b")
    more = {"eval_prompt_file": world / "held_out.jsonl", "eval_steps": 1, "num_generations_eval": 4}
    more["reward_fn"] = f"{world / 'fn.py'}:odd"
    less = dict.fromkeys(("eval_prompt_file", "eval_steps", "num_generations_eval"))
    grpo(world, tmp_path / "odd", stop="b", **{**more, **less})
    lines = grpo(world, tmp_path / "watched", stop="b", **more)
    assert [line["step"] for line in lines] == [0, 1, 2] and [line["step"] for line in plain] == [1, 2]
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("watched", "odd"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    samples = tiny.read_lines(tmp_path / "watched/samples.jsonl")
    assert [sample["step"] for sample in samples] == [0] * 12 + [1] * 12 + [2] * 12
    assert samples[0]["output"] != samples[1]["output"] or samples[0]["output"] != samples[2]["output"]
    for line in lines:
        drawn = [sample for sample in samples if sample["step"] == line["step"]]
        assert not any("b" in sample["output"] for sample in drawn)
        right = [[len(s["output"]) % 2 for s in drawn[i : i + 4]] for i in (0, 4, 8)]
        assert line["eval_pass@1"] == pytest.approx(sum(map(sum, right)) / 12)
        assert line["eval_pass@4"] == pytest.approx(sum(map(any, right)) / 3)
        assert line["eval_reward"] == pytest.approx(sum(s["reward"] for s in drawn) / 12)
        unfinished = sum(not sample["finished"] for sample in drawn) / 12
        assert line["eval_completions/clipped_ratio"] == pytest.approx(unfinished)
        assert all(len(sample["output"]) == 6 for sample in drawn if not sample["finished"])
    for line in plain:
        assert line["sampling/sampling_logp_difference/max"] < 1e-5 and line["grad_norm"] > 0
        assert line["completions/min_length"] >= 1 and line["completions/max_length"] <= 6
        assert line["clip_ratio/region_mean"] == 0 and "kl" not in line


def test_gradient_not_finite(world, tmp_path, monkeypatch):
    """Catches an optimizer step with a broken gradient, and an error without the prompts' numbers."""
    real, calls = train_grpo.clip_grad_norm, []

    def norm(model, most, scale):
        calls.append(1)
        return real(model, most, scale) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(train_grpo, "clip_grad_norm", norm)
    result = tiny.run(SCRIPT, *flags(world, tmp_path / "out"))
    numbers = train_grpo.prompt_numbers(6, 3, 3, seed=0)
    tiny.assert_refused(result, "step 2: grad_norm is nan", ", ".join(map(str, numbers)) + "\n")
    assert not (tmp_path / "out/config.json").exists()


def test_a_reference_that_is_not_finite(world, tmp_path):
    """Catches a NaN that rloo's KL puts into the rewards and that is taken for the mark of skipped answers: all
    advantages were 0, and a policy that had learnt nothing was written."""
    broken = shutil.copytree(world / "lm", tmp_path / "ref")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    more = {"loss_type": "rloo", "beta": 0.1, "ref_checkpoint_path": broken}
    result = tiny.run(SCRIPT, *flags(world, tmp_path / "out", **more))
    tiny.assert_refused(result, "step 1: kl is nan; records of the step (from 0): ")


def test_soft_overlong(world, tmp_path, seen):
    """Catches a penalty that rewards length or has another limit, and one for masked answers, which would lift the
    others of their group, wrong ones too."""
    more = {"soft_punish_cache": 4, "reward_fn": f"{world / 'fn.py'}:same", "total_steps": 1}
    grpo(world, tmp_path / "out", **more)
    grpo(world, tmp_path / "masked", **more, mask_truncated_completions=True)
    for masked, ([sampled], _, _) in zip((False, True), seen, strict=True):
        assert 0 < sum(sampled.finished) < 12
        for answer, prompt, reward in zip(sampled.answers, sampled.prompts, sampled.rewards.tolist()):
            spared = masked and not answer.finished
            assert reward == pytest.approx(prompt.fields["bonus"] - (0 if spared else max(0, len(answer.ids) - 2) / 4))


# ---------------------------------------------------------------------------------- kill and resume

RUN = {
    "total_steps": 4,
    "save_steps": 3,
    "max_resamples": 2,
    "num_iterations": 2,
    "beta": 0.1,
}
TIMED = ("time/", "tokens_per_second")


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The run that is not interrupted; read it only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    grpo(world, out, **resumable(world))
    return out


def resumable(world, **more):
    return {**RUN, "reward_fn": f"{world / 'fn.py'}:some_same", **more, "eval_prompt_file": world / "held_out.jsonl"}


def assert_same_run(resumed, whole):
    ours, theirs = (load_file(d / "model.safetensors") for d in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines, wanted = (tiny.read_lines(d / "metrics.jsonl") for d in (resumed, whole))
    untimed = lambda lines: [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]  # noqa: E731
    assert untimed(lines) == untimed(wanted) and [line["step"] for line in lines] == list(range(5))
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_kill_and_resume(whole, world, tmp_path):
    """Catches prompts repeated or skipped after groups were resampled, noise drawn twice, an optimizer that restarts,
    and a baseline measured once more."""
    run, out = resumable(world, save_steps=1), tmp_path / "out"
    process = Forked(SCRIPT, *flags(world, out, **run))
    while process.poll() is None and not (out / "checkpoints/step-000002").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode in (-signal.SIGKILL, 0), errors
    result = tiny.run(SCRIPT, *flags(world, out, **run, resume=True))
    assert result.code == 0 and "resuming after step" in result.stdout, result.stderr
    assert_same_run(out, whole)


def test_stop_and_resume(whole, world, tmp_path, monkeypatch):
    """Catches a SIGTERM that saves nothing, a resume as another run, a baseline written twice when a run starts again,
    and a warning of repeated prompts where none are."""
    out, write, run, begins = tmp_path / "out", Metrics.write, resumable(world), []

    def write_and_stop(self, values):
        write(self, values)
        if values["step"] == 0 and not begins:
            raise RuntimeError("ended before the first update")
        if values["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", write_and_stop)
        with pytest.raises(RuntimeError):
            tiny.run(SCRIPT, *flags(world, out, **run))
        begins.append("once more")
        result = tiny.run(SCRIPT, *flags(world, out, **run, resume=True))
    assert result.code == 0 and "stopped by a signal after update 2;" in result.stdout
    for name, value in (("beta", 0.2), ("loss_type", "grpo"), ("num_generations", 6), ("epsilon_high", 0.3)):
        other = tiny.run(SCRIPT, *flags(world, out, **{**run, name: value}, resume=True))
        tiny.assert_refused(other, f"--resume {out}: the run was begun with other --{name}")
    shutil.copytree(out, tmp_path / "larger")
    more = {"rollout_batch_size": 24, "accept_changed": "rollout_batch_size", "resume": True}
    result = tiny.run(SCRIPT, *flags(world, tmp_path / "larger", **{**run, **more}))
    assert result.code == 0 and "some of this epoch are repeated" not in result.stdout
    grpo(world, out, **run, resume=True)
    assert_same_run(out, whole)


@pytest.mark.parametrize(
    "Trainer, settings, named",
    [
        (SftArgs, {"pack": True}, {"checkpoint_path", "chat_date", "max_seq_len"}),
        (SftArgs, {"overlong": "skip"}, {"checkpoint_path", "chat_date", "max_seq_len"}),
        (DpoArgs, {"overlong": "truncate"}, {"checkpoint_path", "chat_date", "max_seq_len"}),
        (GrpoArgs, {"overlong": "skip"}, {"checkpoint_path", "chat_date", "max_prompt_len", "max_new_tokens"}),
        (GrpoArgs, {"overlong": "skip", "max_prompt_len": 9}, {"checkpoint_path", "chat_date", "max_prompt_len"}),
        (GrpoArgs, {"overlong": "truncate"}, set()),
        (RmArgs, {}, set()),
    ],
)
def test_flags_that_change_the_order(Trainer, settings, named, tmp_path):
    """Catches a resumed run that repeats or leaves out records without a word, since an accepted flag changes how long
    records are or may be; and a word where that changes none of the records."""
    data = {"prompt_file" if Trainer is GrpoArgs else "train_file": tmp_path / "a"}
    args = Trainer(checkpoint_path=tmp_path / "in", output_dir=tmp_path, **data, **settings)
    assert (order_flags(args) - ORDER) & vars(args).keys() == named


# ---------------------------------------------------------------------------------------- bad input

FN = "{world}/fn.py"
BAD_FLAGS = {
    "no reward": ({"reward_fn": None}, ["nothing to learn from", "--reward_fn"]),
    "no such file": ({"reward_fn": "nowhere.py:reward"}, ["--reward_fn nowhere.py:reward", "no file"]),
    "no such function": ({"reward_fn": FN + ":magic"}, ["has no function magic"]),
    "groups of one": ({"num_generations": 1}, ["--num_generations"]),
    "groups that do not fit": ({"num_generations": 5}, ["--num_generations 5 does not divide", "size 12"]),
    "minibatch": ({"minibatch_size": 5}, ["--minibatch_size 5 does not divide --rollout_batch_size 12"]),
    "micro batch": ({"micro_batch_size": 13}, ["--micro_batch_size 13"]),
    "no such loss": ({"loss_type": "ppo"}, ["--loss_type", "'ppo'"]),
    "negative KL": ({"beta": -0.1}, ["--beta"]),
    "reference without a KL": ({"ref_checkpoint_path": "{world}/lm"}, ["--ref_checkpoint_path", "without a --beta"]),
    "quantised reference without a KL": ({"quantize_ref": "int8"}, ["--quantize_ref int8", "without a --beta"]),
    "other reference": (
        {"ref_checkpoint_path": "{world}/odd", "beta": 1, "prompt_file": "nowhere.jsonl"},
        ["odd: a reference", "another vocabulary"],
    ),
    "offload to itself": ({"cpu_offload": True, "prompt_file": "nowhere.jsonl"}, ["--cpu_offload", "on the CPU"]),
    "offload what is small": ({"cpu_offload": True, "optim": "adamw_8bit"}, ["--optim adamw_8bit", "--cpu_offload"]),
    "delta": ({"delta": 0.9}, ["--delta"]),
    "delta of cispo": ({"delta": 2, "loss_type": "cispo"}, ["--delta", "cispo"]),
    "epsilon": ({"epsilon": 0}, ["--epsilon"]),
    "scale of rloo": ({"scale_rewards": "none", "loss_type": "rloo"}, ["--scale_rewards none", "--loss_type rloo"]),
    "KL's factor without a KL": (
        {"no-use_bias_correction_kl": True},
        ["--no-use_bias_correction_kl", "without a --beta"],
    ),
    "weight without a function": (
        {"reward_fn": None, "reward_checkpoint_path": "{world}/lm", "reward_fn_weight": 2},
        ["--reward_fn_weight 2.0 does nothing without a --reward_fn"],
    ),
    "generations without prompts": ({"num_generations_eval": 4}, ["--num_generations_eval 4", "--eval_prompt_file"]),
    "rewards of steps": ({"process_reward": "steps"}, ["--process_reward steps"]),
    "overlong": ({"soft_punish_cache": 7}, ["--soft_punish_cache 7 is more than --max_new_tokens 6"]),
    "punished and masked": (
        {"missing_eos_penalty": 1, "mask_truncated_completions": True},
        ["--missing_eos_penalty 1.0: --mask_truncated_completions does not train on the answers that it punishes"],
    ),
    "eval steps": ({"eval_steps": 2}, ["--eval_steps needs an --eval_prompt_file"]),
    "no room": ({"max_new_tokens": 256}, ["--max_new_tokens 256", "256 tokens"]),
    "prompts too long": ({"max_new_tokens": 254}, ["prompts.jsonl:", "the limit is 2", "--overlong skip"]),
    "normalised nothing": ({"normalize_reward": True}, ["--normalize_reward needs a reward model"]),
    "tis below one": ({"tis_cap": 0.5}, ["--tis_cap"]),
    "empty stop": ({"stop": ""}, ["--stop must not be empty"]),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(name, world, tmp_path):
    """Catches a mistake found only after an update, a traceback, and output left behind."""
    given, parts = BAD_FLAGS[name]
    if "other" in name and not (world / "odd").exists():
        tiny.write_model(world / "odd", vocab_size=400)
    given = {k: v.replace("{world}", str(world)) if isinstance(v, str) else v for k, v in given.items()}
    tiny.assert_refused(tiny.run(SCRIPT, *flags(world, tmp_path / "out", **given)), *parts)
    assert not (tmp_path / "out").exists()
