"""training/stop.py in the five trainers: signals at any time, and through torchrun. A run that is stopped and resumed
equals one that is not interrupted: weights bitwise, and all lines."""

import importlib
import os
import re
import select
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.generation import Engine
from tests import tiny
from tests.forked import Forked
from tests.ranks import start_torchrun
from tests.training.test_train_rm import make_records

TIMED = ("time/", "tokens_per_second", "rollout_tokens", "update_tokens", "mfu")
FUNCTIONS = """
import os, signal, time

def stop_here(where):
    if os.environ.get("STOP_IN") == where and not os.path.exists(os.environ["STOPPED"]):
        open(os.environ["STOPPED"], "w").close()
        time.sleep(1)  # until all answers are drawn, and nothing is left but to wait for this one
        os.kill(int(os.environ["PID_OF_THE_RUN"]), signal.SIGTERM)
        time.sleep(1000)

def whole(prompts, completions, examples):
    stop_here("whole")
    return [float(len(c)) for c in completions]

def each(prompt, completion, example):
    stop_here("each")
    return float(completion.count("e"))

def slow(prompts, completions, examples):
    if os.environ.get("STOP_IN") == "slow" and len(calls):
        open(os.environ["STOPPED"], "w").close()
        time.sleep(1000)
    calls.append(1)
    return [float(len(c)) for c in completions]

calls = []
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("stop")
    tiny.write_model(root / "lm", num_hidden_layers=1)
    tiny.write_records(root / "prompts.jsonl", [{"prompt": f"Question {i}:" + " and so" * (i % 3)} for i in range(5)])
    tiny.write_records(
        root / "text.jsonl", [{"text": f"{i} plus {i} is {2 * i}" + " or so" * (i % 3)} for i in range(9)]
    )
    tiny.write_records(root / "pairs.jsonl", make_records("pairwise", 9))
    (root / "fn.py").write_text(FUNCTIONS)
    return root


def flags(world, script, out, **more):
    given = {"checkpoint_path": world / "lm", "output_dir": out, "device": "cpu", "save_steps": 0, "eval_steps": 2}
    given["learning_rate"] = 1e-3
    if "po.py" in script and "dpo" not in script:
        given |= {"prompt_file": world / "prompts.jsonl", "eval_prompt_file": world / "prompts.jsonl"}
        given |= {"total_steps": 4, "rollout_batch_size": 4, "micro_batch_size": 2}
        given |= {"max_new_tokens": 5, "reward_timeout": 500}
        given |= {"reward_fn": [f"{world / 'fn.py'}:whole", f"{world / 'fn.py'}:each"], "reward_workers": 1}
    else:
        data = world / ("text.jsonl" if "sft" in script else "pairs.jsonl")
        given |= {"train_file": data, "eval_file": data, "max_steps": 4, "batch_size": 4, "num_eval_samples": 2}
        given |= {"micro_batch_size": 1}  # a step of two is never left half-way
        given |= {} if "rm" in script else {"eval_max_new_tokens": 3}
    given |= {"num_iterations": 2, "beta": 0.1, "num_generations": 2} if "grpo" in script else {}
    given |= {"ppo_epochs": 1} if "ppo" in script else {}
    words = []
    for name, value in (given | more).items():
        for each in value if isinstance(value, list) else [value]:
            words += [f"--{name}"] if value is True else [f"--{name}", each]
    return words


def run(world, script, out, code=0, **more):
    result = tiny.run(f"training/{script}", *flags(world, script, out, **more))
    assert result.code == code, result.stderr
    return result


def lines_of(out, name="metrics.jsonl"):
    lines = tiny.read_lines(out / name)
    return [{key: x for key, x in line.items() if not key.startswith(TIMED)} for line in lines]


def assert_same_run(out, whole):
    for path in whole.rglob("*.safetensors"):
        ours, theirs = load_file(out / path.relative_to(whole)), load_file(path)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), path
    assert lines_of(out) == lines_of(whole)
    if (whole / "samples.jsonl").exists():
        assert lines_of(out, "samples.jsonl") == lines_of(whole, "samples.jsonl")
    assert not (out / "unfinished.json").exists()


def stop_at(patch, script, name, number):
    """Sends SIGTERM at the start of a given call of a script's function; returns the list of calls."""
    module, calls = importlib.import_module(f"training.{script.removesuffix('.py')}"), []
    real = getattr(module, name)

    def function(*args, **options):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    patch.setattr(module, name, function)
    return calls


# (the script's function in which the signal comes, which of its calls since the resume, where the run stops)
STOPS = {
    "train_ppo.py": [
        ("draw", 1, "before the first step"),  # the evaluation before the first update
        ("draw", 2, "before the first update"),
        ("draw", 4, "after update 2"),  # the evaluation of update 2: its state is saved, its line is written later
        ("all_logps", 3, "after update 2"),  # two calls are the evaluation's
        ("policy_backward", 1, "after update 2"),
        ("value_backward", 1, "after update 3"),  # the policy has stepped already, so the update is completed
    ],
    "train_grpo.py": [
        ("answers_to", 1, "before the first step"),
        ("all_logps", 4, "after update 1"),  # two in each update
        ("sample_groups", 1, "after update 1"),
        ("backward", 1, "after update 1"),
        ("answers_to", 2, "after update 2"),
    ],
    "finetune_sft.py": [("summed_loss", 4 + 2, "after step 1"), ("summed_loss", 4 + 2, "after step 2")],
    "train_rm.py": [("rewards_of", 4 + 2, "after step 1"), ("rewards_of", 4 + 2, "after step 2")],
    "train_dpo.py": [("summed_loss", 4 + 2, "after step 1"), ("summed_loss", 4 + 2, "after step 2")],
}


@pytest.mark.parametrize("script", STOPS)
def test_stop_anywhere(script, world, tmp_path, monkeypatch):
    """Catches a stop that waits for the end of a rollout, of log-probs, of a gradient accumulation or of an evaluation,
    or that comes in the middle of an update; traces of half a step or rollout; an evaluation that is missing from its
    line or done twice; the step before lost; and tokens of steps without a line not counted."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    more = {"log_steps": 2} if "--train_file" in flags(world, script, out) else {}
    run(world, script, whole, **more)
    for n, (name, number, said) in enumerate(STOPS[script]):
        with monkeypatch.context() as patch:
            calls = stop_at(patch, script, name, number)
            result = run(world, script, out, **more, **({"resume": True} if n else {}))
        assert f"stopped by a signal {said}; go on with --resume" in result.stdout, (name, result.stdout)
        assert len(calls) == number or said == "after update 3", (name, calls)
        assert not (out / "config.json").exists()
        if (out / "unfinished.json").exists():  # as if killed between writing the line and removing this file
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"step": 2, "loss": 0}\n')
    run(world, script, out, resume=True, **more)
    assert_same_run(out, whole)


def test_stop_while_samples_are_drawn(world, tmp_path, monkeypatch):
    """Catches a stop that waits for an evaluation's samples, and a step with half of its samples or with all twice."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(world, "finetune_sft.py", whole)
    with monkeypatch.context() as patch:
        stop_at(patch, "samples.py", "draw_together", 1)
        result = run(world, "finetune_sft.py", out)
    assert "stopped by a signal after step 2; go on with --resume" in result.stdout
    assert (out / "unfinished.json").exists() and not (out / "samples.jsonl").read_text()
    run(world, "finetune_sft.py", out, resume=True)
    assert_same_run(out, whole)


def test_statistics_of_an_export(world, tmp_path, monkeypatch):
    """Catches a reward model of --export_steps that is never written because a signal came while the rewards that it is
    normalised by were computed, or because the resumed run was killed before it had written it."""
    more = {"export_steps": 2, "eval_steps": 3}
    run(world, "train_rm.py", tmp_path / "whole", **more)
    with monkeypatch.context() as patch:
        calls = stop_at(patch, "train_rm.py", "all_rewards", 1)
        result = run(world, "train_rm.py", tmp_path / "out", **more)
    assert "stopped by a signal after step 2" in result.stdout and len(calls) == 1
    with monkeypatch.context() as patch:
        patch.setattr("training.run_dir.save_folder", lambda *args, **options: os.read(-1, 1))
        run(world, "train_rm.py", tmp_path / "out", code=2, resume=True, **more)
    run(world, "train_rm.py", tmp_path / "out", resume=True, **more)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("lora", [{}, {"lora_r": 2}], ids=["all weights", "LoRA"])
def test_an_export_that_cannot_be_written(lora, world, tmp_path):
    """Catches a run that loses its training because --export_dtype cannot hold its weights, those of a merged model
    too, and the model of --export_steps that is never written because the export failed."""
    large = tiny.copy_to_edit(world / "lm", tmp_path / "lm")
    weights = load_file(large / "model.safetensors")
    weights["model.embed_tokens.weight"][tiny.VOCAB_SIZE - 1, 0] = 1e6
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    more = {"checkpoint_path": large, "export_steps": 2, "eval_steps": 3, "max_steps": 3, **lora}
    run(world, "finetune_sft.py", tmp_path / "whole", **more)
    out, more["export_dtype"] = tmp_path / "out", "float16"
    for resume in ({}, {"resume": True}):
        result = run(world, "finetune_sft.py", out, code=2, **more, **resume)
        what = "model.embed_tokens.weight" if lora else "weights of the model"
        assert f"float16 cannot hold {what}; --resume with --export_dtype float32" in result.stderr
        assert os.listdir(out / "checkpoints") == ["step-000002"] and not list(out.rglob("model.safetensors"))
    more["export_dtype"] = "float32"
    assert "resuming after step 2" in run(world, "finetune_sft.py", out, resume=True, **more).stdout
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize(("script", "update"), [("train_ppo.py", 2), ("train_grpo.py", 1)])
def test_stop_kl_after_a_signal(script, update, world, tmp_path, monkeypatch):
    """Catches a bound on the KL that is not looked at for the update whose evaluation a signal interrupted."""
    more = {"stop_kl": 1e-6, "eval_steps": 1}
    with monkeypatch.context() as patch:
        stop_at(patch, script, "draw", 1 + 2 * update)  # the one before the first update, and two in each
        result = run(world, script, tmp_path / "out", **more)
    assert f"stopped by a signal after update {update};" in result.stdout
    result = run(world, script, tmp_path / "out", code=2, resume=True, **more)
    assert f"--stop_kl 1e-06: the KL of update {update} is " in result.stderr
    run(world, script, tmp_path / "out", resume=True, **more | {"stop_kl": 1e6})
    assert not (tmp_path / "out/unfinished.json").exists()


def test_stop_kl_then_a_signal(world, tmp_path, monkeypatch):
    """Catches a run that a bound on the KL has ended, resumed to end there, that can never export its model once a
    signal has interrupted the evaluation before it."""
    out, last = tmp_path / "out", {"stop_kl": 1e-6, "resume": True, "total_steps": 1, "accept_changed": "total_steps"}
    result = run(world, "train_grpo.py", out, code=2, stop_kl=1e-6, total_steps=9)
    assert "--stop_kl 1e-06: the KL of update 1 is " in result.stderr
    with monkeypatch.context() as patch:
        stop_at(patch, "train_grpo.py", "draw", 1)
        assert "stopped by a signal after step 1;" in run(world, "train_grpo.py", out, **last).stdout
    run(world, "train_grpo.py", out, **last)
    assert (out / "config.json").exists() and not (out / "unfinished.json").exists()


RUDE = """
import os, signal, torch

def disturb():
    os.chdir("elsewhere" if os.path.exists("elsewhere") else ".")
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(3)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)

disturb()

def whole(prompts, completions, examples):
    disturb()
    return [float(len(c)) for c in completions]
"""


def test_functions_that_disturb(world, tmp_path, monkeypatch):
    """Catches a run that writes its files elsewhere, trains in another dtype or not at all, or is no longer saved at a
    signal, because a reward function, or its file, changes settings of the whole process."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "rude.py").write_text(RUDE)
    monkeypatch.chdir(tmp_path)
    run(world, "train_grpo.py", tmp_path / "calm", total_steps=2)
    functions = ["rude.py:whole", f"{world / 'fn.py'}:each"]  # a worker that imports torch takes seconds
    before = torch.get_num_threads()
    run(world, "train_grpo.py", "rude", total_steps=2, reward_fn=functions, reward_timeout=500)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == before and torch.get_default_device().type == "cpu"
    assert_same_run(tmp_path / "rude", tmp_path / "calm")
    assert not list((tmp_path / "elsewhere").iterdir())
    process = Forked("training/train_grpo.py", *flags(world, "train_grpo.py", "more", reward_fn=functions[:1]))
    while not (tmp_path / "more/metrics.jsonl").exists() or len(tiny.read_lines(tmp_path / "more/metrics.jsonl")) < 2:
        assert process.poll() is None, process.read("stderr")
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert "stopped by a signal after update" in process.communicate()[0] and process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_other_signals(number, world, tmp_path):
    """Catches a run that a lost terminal, or a scheduler's signal, ends without saving."""
    more = {"max_steps": 9999, "log_steps": 1, "eval_steps": 99999}
    process = Forked("training/finetune_sft.py", *flags(world, "finetune_sft.py", tmp_path / "out", **more))
    while not (tmp_path / "out/metrics.jsonl").exists() or not tiny.read_lines(tmp_path / "out/metrics.jsonl"):
        assert process.poll() is None, process.read("stderr")
        time.sleep(0.005)
    process.send_signal(number)
    assert "stopped by a signal after step" in process.communicate()[0] and process.returncode == 0
    assert list((tmp_path / "out/checkpoints").iterdir())


def has_writer(pipe):
    try:
        return os.read(pipe, 1) != b""
    except BlockingIOError:
        return True


@pytest.mark.parametrize("at_once", [True, False])
def test_nobody_reads(at_once, world, tmp_path):
    """Catches a run that ends early, or writes no model, after the reader of its output has gone (`| head`)."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    flagged = flags(world, "finetune_sft.py", tmp_path / "out", max_steps=30, eval_steps=10)
    process = Forked("training/finetune_sft.py", *flagged, stdout=tmp_path / "pipe")
    lines = tmp_path / "out/metrics.jsonl"
    while not (has_writer(reader) if at_once else lines.exists() and tiny.read_lines(lines)):
        assert process.poll() is None, process.read("stderr")
        time.sleep(0.005)
    os.close(reader)
    while process.poll() is None:
        time.sleep(0.005)
    assert process.returncode == 0 and (tmp_path / "out/config.json").exists(), process.read("stderr")


@pytest.mark.parametrize("script", ["finetune_sft.py", "train_rm.py", "train_dpo.py", "train_ppo.py", "train_grpo.py"])
def test_run_that_ends_sooner(script, world, tmp_path):
    """Catches a run shortened to a step already taken that is exported without the last step's evaluation."""
    total = "total_steps" if script[6:] in ("ppo.py", "grpo.py") else "max_steps"
    run(world, script, tmp_path / "whole", save_steps=3, eval_steps=3)
    for log_steps in (1, 2):
        out = tmp_path / f"out-{log_steps}"
        shutil.copytree(tmp_path / "whole", out)
        shutil.rmtree(out / "checkpoints/step-000004")
        lines = [line for line in tiny.read_lines(out / "metrics.jsonl") if line["step"] != 3 or log_steps == 1]
        short = [{name: x for name, x in line.items() if not name.startswith("eval_")} for line in lines]
        tiny.write_records(out / "metrics.jsonl", short)
        (out / "samples.jsonl").unlink(missing_ok=True)
        whole = next(line for line in lines_of(tmp_path / "whole") if line["step"] == 3)
        wanted = {name: x for name, x in whole.items() if log_steps == 1 or name.startswith("eval_")}
        assert any(name.startswith("eval_") for name in wanted)
        for attempt in range(2):  # the second time, the evaluation is there
            more = {total: 3, "accept_changed": [total], "resume": True, "log_steps": log_steps}
            said = run(world, script, out, **more).stdout
            assert ("step 3: " in said) == (attempt == 0)
            assert wanted.items() <= lines_of(out)[-1].items()
            assert not (out / "unfinished.json").exists()


@pytest.mark.parametrize("where", ["whole", "each"])
def test_stop_while_answers_are_graded(where, world, tmp_path, monkeypatch):
    """Catches a stop that waits for a user's function, of either form, and an engine that goes on decoding."""
    for name, value in (("STOP_IN", where), ("STOPPED", tmp_path / "stopped"), ("PID_OF_THE_RUN", os.getpid())):
        monkeypatch.setenv(name, str(value))
    result = run(world, "train_grpo.py", tmp_path / "out", total_steps=1, eval_steps=1)
    assert "stopped by a signal before the first step" in result.stdout
    run(world, "train_grpo.py", tmp_path / "out", total_steps=1, eval_steps=1, resume=True)
    decoded, real = [], Engine._look
    monkeypatch.setattr(Engine, "_look", lambda *args: decoded.append(1) or real(*args))
    stop_at(monkeypatch, "train_grpo.py", "answers_to", 1)
    run(world, "train_grpo.py", tmp_path / "more")
    assert not decoded


def test_through_torchrun(world, tmp_path):
    """Catches ranks that torchrun's own SIGTERM kills, that wait for each other or that end with an error: of two
    ranks, the first is in a batch function, and the second waits for it."""
    script, out = "train_grpo.py", tmp_path / "out"
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(tiny.ROOT)!r})\n"
        "from models import script\n"
        "end = script.end_process\n"
        f"script.end_process = lambda code: (open({str(tmp_path)!r} + '/code' + os.environ['RANK'], 'w')"
        ".write(str(code)), end(code))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    more = {"reward_fn": [f"{world / 'fn.py'}:slow"], "eval_steps": 4}
    words = [wrapper, tiny.ROOT / "training" / script, *flags(world, script, out, **more)]
    process = start_torchrun(2, *words, STOP_IN="slow", STOPPED=tmp_path / "stopped")
    while process.poll() is None and not (tmp_path / "stopped").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = "".join(process.communicate())
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == ["0", "0"], said
    assert "stopped by a signal before the first update; go on with --resume" in said
    assert process.returncode == 1  # torchrun's own code, with its own traceback
    run(world, script, out, resume=True, **more)


def test_ctrl_c(world, tmp_path):
    """Catches a first Ctrl-C that breaks off a step, a second one that does not end it at once, a traceback, a
    process of the user's function that goes on, and one that is deaf to its own end."""
    script, out = "train_grpo.py", tmp_path / "out"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "deaf.py").write_text(
        "import multiprocessing, os, time\n"
        "def deaf(prompts, completions, examples):\n"
        f"    os.open({str(tmp_path / 'pipe')!r}, os.O_WRONLY)\n"
        "    ended, kept = [multiprocessing.Process(target=time.sleep, args=(100,)) for _ in range(2)]\n"
        "    ended.start(), kept.start(), ended.terminate(), ended.join(20)\n"
        "    assert ended.exitcode == -15, ended.exitcode\n"
        "    try: print('asked', flush=True); time.sleep(1000)\n"
        "    except BaseException: print('again', flush=True); time.sleep(1000)\n"
    )
    words = flags(world, script, out, reward_fn=[f"{tmp_path / 'deaf.py'}:deaf"])
    process = Forked(f"training/{script}", *words)
    for said in ("asked\n", "again\n"):
        while not process.read("stdout").endswith(said):
            assert process.poll() is None, process.read("stderr")
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors
    assert select.select([reader], [], [], 20)[0]  # the end of the pipe: nobody holds it any more
    assert re.sub(r"\x1b.*|.*\r", "", errors).strip().startswith("stopping at the next place"), errors
