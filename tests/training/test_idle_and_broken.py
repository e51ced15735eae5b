"""Runs that would look sound but are not: flags without effect, answers without rewards, weights that are not finite.
Each ends with one line on stderr and exit code 2."""

import asyncio
import json
import re
import shutil
import sys
import types

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from models.checkpoint import open_folder
from models.fsdp import full_tensors
from models.functions import Grade, Grader, call_batch
from models.record_files import Record
from models.reward import encode_steps, split_steps
from models.tokenizer import Tokenizer
from tests import tiny
from training import train_grpo, train_ppo
from training.frozen import check_reader
from training.graders import exact_match, math_answer, multiple_choice
from training.metrics import Metrics
from training.preferences import encode_process_record
from training.prompts import prompt_numbers

REWARDS = """
def each(prompt, completion, example): return float(len(completion))
def none(prompt, completion, example): return None
def no_so(prompt, completion, example): return None if "so" in prompt else float(len(completion))
def one_or_so(prompt, completion, example): return None if "so" in prompt else 1.0
def whole(prompts, completions, examples): return [float(len(c)) for c in completions]
"""
FIRST_STEPS = ["--lr_schedule", "constant", "--warmup_ratio", 0, "--batch_size", 2, "--save_steps", 1]


@pytest.fixture(scope="module")
def world(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("idle")
    (root / "fn.py").write_text(REWARDS)
    answers = [{"prompt": f"Question {i}:", "completion": "Is it so?"} for i in range(4)]
    tiny.write_records(root / "answers.jsonl", answers)
    tiny.write_records(root / "pairs.jsonl", [{**each, "chosen": "so", "rejected": "yes"} for each in answers])
    tiny.write_records(root / "prompts.jsonl", [{"prompt": "Is it so"}, {"prompt": "or not"}])
    return root


def run(script, folder, world, out, *more):
    """Runs a script on the world's records; a reward function is given as fn.py:NAME."""
    more = [f"{world}/{word}" if str(word).startswith("fn.py:") else word for word in more]
    if script in ("train_ppo", "train_grpo"):
        given = ["--prompt_file", world / "prompts.jsonl", "--max_new_tokens", 4, "--rollout_batch_size", 4]
        given += ["--total_steps", 1] + ["--num_generations", 2] * (script == "train_grpo")
    else:
        given = ["--train_file", world / ("answers.jsonl" if script == "finetune_sft" else "pairs.jsonl")]
    return tiny.run(f"training/{script}.py", "--checkpoint_path", folder, "--output_dir", out, *given, *more)


def assert_ended(result, *parts):
    """Asserts exit code 2, and that the last line of stderr has all parts; a run may have printed others before it."""
    assert result.code == 2 and "Traceback" not in result.stderr, result.stderr
    last = result.stderr.splitlines()[-1]
    assert all(part in last for part in parts), last


def idle(script, *flags):
    return pytest.param(script, flags, id=f"{script} {flags[-2]}")


@pytest.mark.parametrize(
    "script, flags",
    [
        idle("finetune_sft", "--eval_temperature", 1),
        idle("finetune_sft", "--num_eval_samples", 7),
        idle("train_dpo", "--eval_max_new_tokens", 3),
        idle("train_dpo", "--eval_file", "no.jsonl", "--num_eval_samples", 0, "--eval_max_new_tokens", 3),
        idle("finetune_sft", "--eval_file", "no.jsonl", "--num_eval_samples", 0, "--eval_temperature", 1),
        idle("train_rm", "--num_eval_samples", 7),
        idle("train_rm", "--step_separator", "#"),
        idle("finetune_sft", "--lora_r", 2, "--no-merge", "--export_dtype", "float16"),
        idle("train_ppo", "--reward_fn", "fn.py:each", "--num_eval_samples", 7),
        idle("train_ppo", "--reward_fn", "fn.py:each", "--kl_horizon", 5),
        idle("train_ppo", "--reward_fn", "fn.py:each", "--kl_coef", 0, "--kl_in", "loss"),
        idle("train_grpo", "--reward_fn", "fn.py:each", "--loss_type", "cispo", "--epsilon_high", 5, "--epsilon", 0.1),
    ],
)
def test_idle_flags(script, flags, folder, world, tmp_path):
    """Catches a flag that is accepted but does nothing."""
    result = run(script, folder, world, tmp_path / "out", *flags)
    tiny.assert_refused(result, f"error: {flags[-2]} {flags[-1]}", " does nothing ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script, flags",
    [("train_dpo", ["--ref_checkpoint_path"]), ("train_ppo", ["--reward_fn", "fn.py:each", "--value_checkpoint_path"])],
)
def test_another_vocabulary_of_the_same_size(script, flags, folder, world, tmp_path, capsys):
    """Catches a reference or critic whose ids stand for other text, as those of Llama-2 and OpenLLaMA do, which both
    have 32,000; and one refused for the name of a reserved token, or since its tokenizer has another file."""
    other = tiny.copy_to_edit(folder, tmp_path / "other")
    model = tiny.sentencepiece_model()
    (other / "tokenizer.model").write_bytes(model.replace(b"question", b"noitseuq"))
    result = run(script, folder, world, tmp_path / "out", *flags, other)
    number = Tokenizer(folder).vocabulary()["▁question"]
    tiny.assert_refused(result, f"error: {other}: a ", f"token {number} is '▁noitseuq' instead of '▁question'")
    for same, said in ((model + b"\x1a\x00", ""), (model.replace(b"<s>", b"<b>"), "token 1 is '<b>' instead of '<s>'")):
        (other / "tokenizer.model").write_bytes(same)
        check_reader("critic", other, open_folder(folder), types.SimpleNamespace(tensor_parallel_size=1))
        found = capsys.readouterr().out
        assert said in found and bool(found) == bool(said)


@pytest.mark.parametrize("script", ["finetune_sft", "train_dpo"])
def test_temperature_too_low(script, folder, world, tmp_path):
    """Catches a temperature of sample answers that is refused only after data and model are loaded."""
    flags = ["--eval_temperature", 1e-5, "--eval_file", world / "missing.jsonl"]
    result = run(script, folder, world, tmp_path / "out", *flags)
    tiny.assert_refused(result, "error: --eval_temperature 1e-05: must be 0 (greedy) or at least 0.0001")
    assert not (tmp_path / "out").exists()


def test_a_horizon_within_one_update(folder, world, tmp_path):
    """Catches a --kl_horizon so short that one update makes --kl_coef negative, and the policy is paid for its KL."""
    flags = ["--reward_fn", "fn.py:each", "--kl_target", 6]
    result = run("train_ppo", folder, world, tmp_path / "out", *flags, "--kl_horizon", 0.5)
    tiny.assert_refused(result, "error: --kl_horizon 0.5 counts answers: one update of ")


def test_no_time_out(folder, world, tmp_path):
    """Catches --reward_timeout accepted silently for a batch function, which is called once and has no timeout."""
    result = run("train_ppo", folder, world, tmp_path / "out", "--reward_fn", "fn.py:whole", "--reward_timeout", 5)
    assert result.code == 0 and "--reward_timeout has no effect without a --reward_fn of the form" in result.stdout


PPO, GRPO = (train_ppo, train_ppo.PpoArgs), (train_grpo, train_grpo.GrpoArgs)
CLIPS = {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0}
NOT_CLIPPED = "nothing is clipped, since an update is one step, from the model that answered\n"


@pytest.mark.parametrize(
    "script, given, said",
    [
        (PPO, {"critic_warmup_steps": 3, "total_steps": 3}, "in all 3 updates; the policy will not learn\n"),
        (PPO, {"critic_warmup_steps": 2, "total_steps": 3}, ""),
        (PPO, {"critic_warmup_steps": 2, "total_steps": 0}, ""),
        (
            PPO,
            {"ppo_epochs": 1, "cliprange": 0.1, "cliprange_value": 0.0},
            f"0.1, --cliprange_value 0.0: {NOT_CLIPPED}",
        ),
        (PPO, {"ppo_epochs": 1, "dual_clip": 3.0, "minibatch_size": 64}, f"--dual_clip 3.0: {NOT_CLIPPED}"),
        (PPO, {"ppo_epochs": 1, "dual_clip": 3.0, "minibatch_size": 32}, ""),
        (PPO, {"ppo_epochs": 2, "cliprange": 0.1}, ""),
        (PPO, {"ppo_epochs": 1}, ""),
        (GRPO, CLIPS, f"--epsilon 0.1, --epsilon_high 0.3, --delta 2.0: {NOT_CLIPPED}"),
        (GRPO, {"loss_type": "gspo", "epsilon": 3e-4}, f"--epsilon 0.0003: {NOT_CLIPPED}"),
        (GRPO, {"loss_type": "rloo", "epsilon": 0.1, "beta": 0.1}, f"--epsilon 0.1: {NOT_CLIPPED}"),
        (GRPO, {"loss_type": "cispo", "epsilon_high": 0.3}, ""),
        (GRPO, {**CLIPS, "num_iterations": 2}, ""),
        (GRPO, {**CLIPS, "minibatch_size": 32}, ""),
        (GRPO, {}, ""),
    ],
)
def test_what_is_said_of_flags(script, given, said, tmp_path, capsys):
    """Catches a run that looks as if it learnt, or a flag that looks as if it did something, without a word; and a word
    where nothing is wrong."""
    module, Args = script
    folders = {"checkpoint_path": tmp_path, "output_dir": tmp_path, "prompt_file": tmp_path}
    module.check_flags(Args(**folders, reward_fn=["f.py:f"], **given))
    printed = capsys.readouterr().out
    assert printed.endswith(said) and bool(printed) == bool(said)


def test_rewards_without_weight(folder, world, tmp_path):
    """Catches a run whose rewards are all 0 because their weights are."""
    flags = ["--reward_fn", "fn.py:each", "--reward_fn_weight", 0]
    tiny.assert_refused(run("train_grpo", folder, world, tmp_path / "a", *flags), "nothing to learn from", "weights")
    assert run("train_grpo", folder, world, tmp_path / "b", *flags, "--length_penalty", 0.1).code == 0


def test_process_reward_of_whole_answers(folder, world, tmp_path):
    """Catches --process_reward with a reward model of whole answers, and a process reward model trained without a step
    separator: train_rm.py wrote one, and everything that reads reward models refused it."""
    rm = tmp_path / "rm"
    assert run("train_rm", folder, world, rm, "--max_steps", 0).code == 0
    scored = run(
        "train_ppo", folder, world, tmp_path / "ppo", "--reward_checkpoint_path", rm, "--process_reward", "last"
    )
    tiny.assert_refused(scored, "--process_reward last does nothing ", "whole answers")
    steps = run("train_rm", folder, world, tmp_path / "prm", "--loss", "process", "--step_separator", "")
    tiny.assert_refused(steps, "--step_separator")


@pytest.mark.parametrize(
    "name, flags, code", [("none", [], 2), ("none", ["--reward_error", "skip"], 0), ("no_so", [], 0)]
)
@pytest.mark.parametrize("script", ["train_ppo", "train_grpo"])
def test_a_function_that_grades_nothing(script, name, flags, code, folder, world, tmp_path):
    """Catches a run that goes on although it has to leave out every answer of an update; and one that ends although
    some answers have a grade, or although the user chose to skip errors."""
    result = run(script, folder, world, tmp_path / "out", "--reward_fn", f"fn.py:{name}", "--reward_workers", 1, *flags)
    assert result.code == code, result.stderr
    if code:
        assert_ended(result, "none gave none of 4 answers a grade", "NoneType", "--reward_error skip")


@pytest.mark.parametrize("script", ["train_ppo", "train_grpo"])
def test_a_record_that_cannot_be_graded(script, folder, world, tmp_path):
    """Catches a resumed run that ends at an update of one prompt without a grade, as a run does whose function has not
    graded anything yet, where an uninterrupted run goes on; and one that goes on with another function, whose every
    update might be skipped."""
    seed = next(seed for seed in range(9) if prompt_numbers(2, 0, 1, seed=seed) == [1])  # the one with a grade is first
    flags = ["--reward_fn", "fn.py:no_so", "--reward_workers", 1, "--lr_schedule", "constant", "--warmup_ratio", 0]
    flags += ["--rollout_batch_size", 2 if script == "train_grpo" else 1, "--seed", seed]
    assert run(script, folder, world, tmp_path / "out", *flags).code == 0
    flags += ["--total_steps", 2, "--resume"]
    other = [*flags[2:], "--reward_fn", "fn.py:none", "--accept_changed", "reward_fn"]
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    assert_ended(run(script, folder, world, tmp_path / "other", *other), "none gave none of ")
    result = run(script, folder, world, tmp_path / "out", *flags)
    assert result.code == 0, result.stderr
    lines = tiny.read_lines(tmp_path / "out/metrics.jsonl")
    assert [line["rewards/num_skipped"] for line in lines] == [0, flags[flags.index("--rollout_batch_size") + 1]]


def test_a_round_that_cannot_be_graded(folder, world, tmp_path):
    """Catches a run that ends because --max_resamples draws a round of bad records, although the function has graded
    others in this update; and one that goes on although it has graded none, since each round is of one record."""
    records = [{"prompt": text} for text in ("or not", "it is", "Is it so", "so it is")]
    data = tiny.write_records(tmp_path / "prompts.jsonl", records)
    seed = next(seed for seed in range(99) if set(prompt_numbers(4, 0, 2, seed=seed)) == {0, 1})
    flags = ["--prompt_file", data, "--seed", seed, "--reward_fn", "fn.py:one_or_so", "--reward_workers", 1]
    flags += ["--max_resamples", 1]  # all rewards are 1
    result = run("train_grpo", folder, world, tmp_path / "a", *flags)
    assert result.code == 0, result.stderr
    [line] = tiny.read_lines(tmp_path / "a/metrics.jsonl")
    assert line["rewards/one_or_so/errors"] == 4 and line["rewards/one_or_so/mean"] == 1
    result = run("train_grpo", folder, world, tmp_path / "b", *flags, "--rollout_batch_size", 2, "--total_steps", 2)
    assert_ended(result, "one_or_so gave none of 4 answers a grade")
    assert len(tiny.read_lines(tmp_path / "b/metrics.jsonl")) == 1


def test_weights_that_are_not_finite(folder, world, tmp_path):
    """Catches an update to infinite weights that is saved as the newest checkpoint, from which every resume would begin
    with a NaN loss, or exported: the run must end, and resume from the step before as if nothing had happened."""
    steps, broken = [*FIRST_STEPS, "--learning_rate", 1e-3], [*FIRST_STEPS, "--learning_rate", 1e38]
    assert run("finetune_sft", folder, world, tmp_path / "a", *steps, "--max_steps", 2).code == 0
    out = tmp_path / "b"
    assert run("finetune_sft", folder, world, out, *steps, "--max_steps", 1).code == 0
    again = ["--max_steps", 2, "--weight_decay", 100, "--resume", "--accept_changed", "learning_rate", "weight_decay"]
    result = run("finetune_sft", folder, world, out, *broken, *again)
    assert_ended(result, "step 2: the weights are not finite", "--learning_rate")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]
    result = run("finetune_sft", folder, world, out, *steps, *again[:2], *again[4:])
    assert result.code == 0, result.stderr
    wanted, got = (load_file(tmp_path / each / "model.safetensors") for each in "ab")
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)

    never_saved = [*broken, "--save_steps", 0, "--max_steps", 1, "--weight_decay", 100]
    assert_ended(run("finetune_sft", folder, world, tmp_path / "c", *never_saved), "the weights are not finite")
    assert not (tmp_path / "c/model.safetensors").exists()
    critic = ["--reward_fn", "fn.py:whole", "--value_learning_rate", 1e38, "--weight_decay", 100, "--ppo_epochs", 1]
    critic += FIRST_STEPS[:4]
    result = run("train_ppo", folder, world, tmp_path / "d", *critic)
    assert_ended(result, "weights are not finite; take a lower --learning_rate or --value_learning_rate and --resume")


def test_weights_that_the_export_cannot_hold(folder, world, tmp_path):
    """Catches weights of 1e6 exported in float16, as infinities."""
    flags, out = [*FIRST_STEPS, "--learning_rate", 1e6, "--max_steps", 1], tmp_path / "out"
    result = run("finetune_sft", folder, world, out, *flags, "--export_dtype", "float16")
    assert_ended(result, "float16 cannot hold weights of the model", "--export_dtype")
    assert run("finetune_sft", folder, world, out, *flags, "--export_dtype", "float32", "--resume").code == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    "script, flags",
    [
        ("finetune_sft", ["--max_steps", 1]),
        ("train_rm", ["--max_steps", 1, "--lora_r", 1]),
        ("train_ppo", ["--reward_fn", "fn.py:whole", "--ppo_epochs", 1]),
    ],
    ids=["all weights", "LoRA", "PPO"],
)
def test_a_folder_that_is_gone_at_the_end(script, flags, folder, world, tmp_path, monkeypatch):
    """Catches a run that loses its training, the adapters too, because the folder it began with has been moved away or
    cannot be read when the model is exported."""
    base, away, out, write = tmp_path / "base", tmp_path / "away", tmp_path / "out", Metrics.write
    shutil.copytree(folder, base)
    flags = [*flags, "--checkpoint_path", base, "--save_steps", 0]
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", lambda self, line: write(self, line) or base.rename(away))
        assert_ended(run(script, folder, world, out, *flags), str(base))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]
    assert (out / "adapter_model.safetensors").exists() == ("--lora_r" in flags)
    away.rename(base)
    result = run(script, folder, world, out, *flags, "--resume")
    assert result.code == 0 and next(out.rglob("tokenizer.model")), result.stderr


def test_a_base_that_cannot_be_read_while_it_is_merged(folder, world, tmp_path, monkeypatch):
    """Catches a main rank that saves the state after an error in the middle of the tensors: a collective, in which it
    is alone, since the other ranks gather the tensors that follow: they would wait for half an hour. And an earlier
    merged model left beside the new adapter."""
    out = tmp_path / "out"

    def cut(model):
        (out / "merged").mkdir()
        yield next(full_tensors(model))
        raise ValueError("the base's file is cut")

    monkeypatch.setattr("training.run_dir.full_tensors", cut)
    flags = ["--max_steps", 1, "--lora_r", 1, "--save_steps", 0]
    assert_ended(run("finetune_sft", folder, world, out, *flags), "the base's file is cut")
    assert (out / "adapter_config.json").exists() and not any((out / x).exists() for x in ("checkpoints", "merged"))


NAN = float("nan")


@pytest.mark.parametrize(
    "given, wanted",
    [([], None), ("", None), ([None, ""], None), (NAN, None), (["", 5], 1.0), ([NAN, 5], 1.0), (5, 1.0)],
)
def test_no_right_answer(given, wanted):
    """Catches a record whose list of gold answers is empty, or holds pandas' value for a missing one: every answer
    would count as wrong."""
    if wanted is None:
        with pytest.raises(ValueError, match="no right answer"):
            math_answer("", "5", {"answer": given})
        assert math_answer("", "5", {"answer": given, "solution": "#### 5"}) == 1
    else:
        assert math_answer("", "5", {"answer": given}) == wanted


@pytest.mark.parametrize("given", [{"value": "5", "aliases": ["five"]}, [{"value": "5"}], [["5"]]])
def test_right_answers_that_are_no_text(given):
    """Catches an object, or a list in a list, compared as Python prints it: no answer would be right."""
    for grader in (math_answer, exact_match, multiple_choice):
        with pytest.raises(ValueError, match="right answer in solution is neither text nor a number"):
            grader("", "5", {"answer": None, "solution": given})


def test_right_answers_of_a_column_of_floats():
    """Catches integers that became floats, as in any column of pandas with a value missing, so that no answer matches
    exactly or is the choice; and true, which is no choice, taken for the second one."""
    assert exact_match("", "18", {"answer": 18.0}) == exact_match("", "18.0", {"answer": 18.0}) == 1
    assert exact_match("", "18", {"answer": 18.5}) == 0
    assert multiple_choice("", "C", {"answer": 2.0}) == 1 and multiple_choice("", "B", {"answer": 2.0}) == 0
    with pytest.raises(ValueError, match="no letter"):
        multiple_choice("", "B", {"answer": True})


@pytest.mark.parametrize("world_size, complaint", [("2", "but no RANK"), ("", "no number"), ("two", "no number")])
def test_half_an_environment(world_size, complaint, folder, world, tmp_path, monkeypatch):
    """Catches a traceback of the device mesh if a container sets WORLD_SIZE but no launcher has started the ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.delenv("RANK", raising=False)
    result = run("finetune_sft", folder, world, tmp_path / "out", "--max_steps", 1)
    tiny.assert_refused(result, "WORLD_SIZE", complaint, "torchrun")


def test_a_rank_without_the_rest(folder, world, tmp_path, monkeypatch):
    """Catches torch's error, which does not say what to do, if the environment has a RANK left by another program."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    for missing, value in (("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        result = run("finetune_sft", folder, world, tmp_path / "out", "--max_steps", 1)
        tiny.assert_refused(result, f"the environment has RANK but no {missing}; torchrun sets both; for one rank")
        monkeypatch.setenv(missing, value)


@pytest.mark.parametrize("kind", ["sentencepiece", "newlines_chatml"])
def test_steps_that_end_with_their_separator(kind, opened):
    """Catches a second separator after steps that already end with theirs: a label would sit on a token of two
    newlines, which scoring, where answers are split at their separators, never sees."""
    tokenizer, steps = opened(kind)[0], ["the no\n", "yes", "is er\n"]
    record = Record("x:1", {"prompt": "plus", "completions": steps, "labels": [1, 0, 1]})
    row, _ = encode_process_record(record, "\n", tokenizer)
    ids, positions = encode_steps("plus", split_steps("the no\nyes\nis er\n", "\n"), "\n", tokenizer)
    assert (row.input_ids, row.positions, row.labels) == (ids, positions, [1, 0, 1])
    assert tokenizer.decode(ids).endswith("plusthe no\nyes\nis er\n")


def test_a_broken_record_among_packed_ones(tmp_path):
    """Catches the index of a packed row reported as a record's: the broken record, whose token has a NaN embedding,
    must be among those named, counted without the skipped ones."""
    model = tiny.write_model(tmp_path / "lm", num_hidden_layers=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[3 + ord("Z")] = torch.nan  # the byte's token, after <unk>, <s> and </s>
    model.save_pretrained(tmp_path / "lm")
    texts = ["so it is " * 20, *[f"{i} plus {i}" for i in range(5)], "Z", "yes"]
    tiny.write_records(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    flags = ["--checkpoint_path", tmp_path / "lm", "--train_file", tmp_path / "train.jsonl", "--batch_size", 1]
    flags += ["--output_dir", tmp_path / "out", "--pack", "--max_seq_len", 40, "--overlong", "skip"]
    result = tiny.run("training/finetune_sft.py", *flags)
    assert_ended(result, "loss is nan; records of the step (from 0): ", "; skipped records are not counted")
    numbers = re.search(r"\(from 0\): ([\d, ]+);", result.stderr)[1].split(", ")
    assert "5" in numbers and len(numbers) > 1


def test_wandb_without_a_key(tmp_path, monkeypatch):
    """Catches a traceback, after everything is loaded, if nobody has logged in to the dashboard."""

    def init(**_):
        raise RuntimeError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(ValueError, match="--report_to wandb: RuntimeError: api_key not configured"):
        Metrics(tmp_path, report_to="wandb")


def test_a_function_that_changes_what_it_is_given():
    """Catches a batch function's changes to its records, at any depth, seen by its next call or by other functions."""

    def uses_up(prompts, completions, examples):
        prompts.clear()
        return [example["tests"].pop() + example.setdefault("more", 1) for example in examples]

    grader, prompts, examples = Grader("--reward_fn", "f.py:uses_up", uses_up, False, False), ["a"], [{"tests": [1, 2]}]
    for _ in range(3):
        assert call_batch(grader, prompts, ["b"], examples) == [Grade(3.0)]
    assert (prompts, examples) == (["a"], [{"tests": [1, 2]}])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_are_no_numbers(kind):
    """Catches bytes taken for a list of the numbers of their characters, or a bytearray for the number it spells."""
    for rewards, why in ((kind(b"12"), "it is a"), ([kind(b"1"), kind(b"2")], "returned a")):
        grader = Grader("--reward_fn", "f.py:f", lambda rewards=rewards, **_: rewards, False, False)
        with pytest.raises(ValueError, match=f"must return a list of numbers: TypeError: {why} {kind.__name__}"):
            call_batch(grader, ["a"] * 2, ["b"] * 2, [{}] * 2)


async def cancelled(prompts, completions, examples):
    waiting = asyncio.ensure_future(asyncio.sleep(60))
    waiting.cancel()
    await waiting


def gives_up(prompts, completions, examples):
    raise GeneratorExit


def interrupted(prompts, completions, examples):
    raise KeyboardInterrupt


@pytest.mark.parametrize("function, named", [(cancelled, "CancelledError"), (gives_up, "GeneratorExit")])
def test_what_is_no_exception(function, named):
    """Catches an error that is no Exception, such as that of a request which an async client cancels: the run ended
    with a traceback on all ranks and saved nothing. Ctrl-C, however, is not an error of the function."""
    with pytest.raises(ValueError, match=f"--reward_fn: f raised {named}"):
        call_batch(Grader("--reward_fn", "f.py:f", function, False, False), ["a"], ["b"], [{}])
    with pytest.raises(KeyboardInterrupt):
        call_batch(Grader("--reward_fn", "f.py:f", interrupted, False, False), ["a"], ["b"], [{}])
