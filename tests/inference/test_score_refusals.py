"""inference/score.py: bad records, flags and folders."""

import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.inference.test_score import PROCESS, SCRIPT, edit_config, prm, rm, score, write_reward_model  # noqa: F401 (fixtures)

# ----------------------------------------------------------------------------------------- bad input

OUTCOME_CASES = {  # name: (content of the data file, flags, what the message names)
    "empty": ("", (), ("data.jsonl", "no records")),
    "malformed": ('{"prompt": "a", "completion": "b"}\n{"prompt"\n', (), ("data.jsonl:2",)),
    "not an object": ("5\n", (), ("data.jsonl:1", "a number")),
    "no prompt": ('{"completion": "b"}\n', (), ("data.jsonl:1", "'prompt'")),
    "no completion": ('{"prompt": "a"}\n', (), ("data.jsonl:1", "'completion'")),
    "steps": ('{"prompt": "a", "completions": ["b"]}\n', (), ("data.jsonl:1", "'completion'")),
    "prompt of a wrong type": ('{"prompt": 5, "completion": "b"}\n', (), ("data.jsonl:1", "prompt", "a number")),
    "completion of a wrong type": ('{"prompt": "a", "completion": 5}\n', (), ("data.jsonl:1", "completion")),
    "half a pair": ('{"prompt": "a", "chosen": "b"}\n', (), ("data.jsonl:1", "'rejected'")),
    "pair of a wrong type": ('{"prompt": "a", "chosen": "b", "rejected": 1}\n', (), ("data.jsonl:1", "rejected")),
    "finish_reason": ('{"prompt": "a", "output": "b", "finish_reason": 1}\n', (), ("data.jsonl:1", "finish_reason")),
    "another": ('{"prompt": "a", "output": "b", "finish_reason": "done"}\n', (), ("be left out, not 'done'",)),
    "sample without output": ('{"prompt": "a", "finish_reason": "stop"}\n', (), ("data.jsonl:1", "'completion'")),
    "scored already": ('{"prompt": "a", "completion": "b", "reward": 1}\n', (), ("data.jsonl:1", "'reward'")),
    "no template": ('{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}\n', (), ("template",)),
    "surrogate": ('{"prompt": "a", "completion": "\\ud800"}\n', (), ("data.jsonl:1", "surrogate")),
    "too long": ('{"prompt": "a", "completion": "' + "1 plus " * 300 + '"}\n', (), ("data.jsonl:1", "256")),
    "pairs to choose from": ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', ("--best_of_n",), (":1", "a pair")),
}
GOOD = '{"prompt": "a", "completion": "b"}\n'
FLAG_CASES = {  # name: (flags, what the message names)
    "aggregate": (("--aggregate", "min"), ("--aggregate min", "not a process model")),
    "aggregate of what": (("--aggregate", "max"), ("--aggregate", "'max'")),
    "normalize": (("--normalize",), ("--normalize", "reward_mean")),
    "both choices": (("--best_of_n", "--weighted_vote"), ("--best_of_n", "--weighted_vote")),
    "answers for nothing": (("--answer_fn", "a.py:b"), ("--answer_fn", "--weighted_vote")),
    "no function": (("--weighted_vote", "--answer_fn", "f.py"), ("--answer_fn 'f.py'", "FILE.py:NAME")),
    "no such file": (("--weighted_vote", "--answer_fn", "no.py:f"), ("--answer_fn no.py",)),
    "no such function": (("--weighted_vote", "--answer_fn", "TMP/f.py:g"), ("--answer_fn", "no function g")),
    "broken file": (("--weighted_vote", "--answer_fn", "TMP/broken.py:g"), ("broken.py", "ZeroDivisionError")),
    "raising function": (("--weighted_vote", "--answer_fn", "TMP/f.py:f"), ("data.jsonl:1", "KeyError")),
    "answer of a wrong type": (("--weighted_vote", "--answer_fn", "TMP/f.py:h"), ("data.jsonl:1", "int")),
    "no rows": (("--batch_size", 0), ("--batch_size",)),
    "context": (("--max_seq_len", 257), ("--max_seq_len 257", "256")),
    "overlong": (("--overlong", "cut"), ("--overlong",)),
    "int4 groups": (("--quantize", "int4"), ("--quantize int4: no group size divides", "intermediate_size 112")),
    "ranks": (("--tensor_parallel_size", 2), ("--tensor_parallel_size 2",)),
    "device": (("--device", "abacus"), ("abacus",)),
    "no data": (("--data_file", "nowhere.jsonl"), ("nowhere.jsonl",)),
}


@pytest.mark.parametrize("case", [*OUTCOME_CASES, *FLAG_CASES])
def test_bad_records_and_flags(rm, tmp_path, case):
    """Catches bad input that is skipped, read as something else, noticed only after scoring, or answered with a
    traceback."""
    content, flags, parts = OUTCOME_CASES[case] if case in OUTCOME_CASES else (GOOD, *FLAG_CASES[case])
    (tmp_path / "data.jsonl").write_text(content)
    (tmp_path / "f.py").write_text("def f(text):\n    raise KeyError(text)\n\ndef h(text):\n    return 1\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    flags = [str(flag).replace("TMP", str(tmp_path)) for flag in flags]
    result = score(rm, tmp_path / "data.jsonl", tmp_path / "new" / "out.jsonl", *flags)
    tiny.assert_refused(result, *parts)
    assert not (tmp_path / "new").exists()


PROCESS_CASES = {  # name: (record, flags, what the message names)
    "no steps": ({"prompt": "a", "completions": []}, (), (":1", "no step")),
    "steps of a wrong type": ({"prompt": "a", "completions": "b"}, (), (":1", "list of steps")),
    "a step of a wrong type": ({"prompt": "a", "completions": ["b", 1]}, (), (":1", "completions[1]")),
    "an empty step": ({"prompt": "a", "completions": ["b", " "]}, (), (":1", "completions[1]")),
    "messages": ({"prompt": "a", "completion": [{}]}, (), (":1", "completion", "list")),
    "a pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, (), (":1", "pair", "steps")),
    "normalize": ({"prompt": "a", "completion": "b"}, ("--normalize",), ("--normalize", "steps")),
    "choosing": ({"prompt": "a", "completion": "b"}, ("--best_of_n",), ("--aggregate",)),
    "voting": ({"prompt": "a", "completion": "b"}, ("--weighted_vote",), ("--aggregate",)),
}


@pytest.mark.parametrize("case", PROCESS_CASES)
def test_bad_input_of_process_models(prm, tmp_path, case):
    """Catches steps that are guessed, and flags that are accepted though they mean nothing for steps."""
    record, flags, parts = PROCESS_CASES[case]
    data = tiny.write_records(tmp_path / "data.jsonl", [record])
    tiny.assert_refused(score(prm, data, tmp_path / "new" / "out.jsonl", *flags), *parts)
    assert not (tmp_path / "new").exists()


def broken_weights(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})


FOLDER_CASES = {  # name: (what is done to a good folder, flags, what the message names)
    "no folder": (shutil.rmtree, (), ("no such file or folder",)),
    "reward_model_type": (lambda f: edit_config(f, reward_model_type="elo"), (), ("reward_model_type", "'elo'")),
    "no separator": (lambda f: edit_config(f, reward_model_type="process"), (), ("step_separator", "None")),
    "empty separator": (lambda f: edit_config(f, **(PROCESS | {"step_separator": ""})), (), ("step_separator",)),
    "mean": (lambda f: edit_config(f, reward_mean="high"), (), ("reward_mean", "'high'")),
    "std without end": (lambda f: edit_config(f, reward_std=math.inf), (), ("reward_std must be a finite number",)),
    "std": (lambda f: edit_config(f, reward_mean=0, reward_std=0), ("--normalize",), ("--normalize", "reward_std")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), (), ("no weights",)),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), (), ("tokenizer.model",)),
}


@pytest.mark.parametrize("case", FOLDER_CASES)
def test_bad_folders(rm, tmp_path, case):
    """Catches a folder that is scored though a file is missing or a setting invalid."""
    damage, flags, parts = FOLDER_CASES[case]
    model = shutil.copytree(rm, tmp_path / "model")
    damage(model)
    (tmp_path / "data.jsonl").write_text(GOOD)
    tiny.assert_refused(score(model, tmp_path / "data.jsonl", tmp_path / "new" / "out.jsonl", *flags), *parts)
    assert not (tmp_path / "new").exists()


def test_models_without_one_score(folder, tmp_path):
    """Catches a language model scored by a random head, and a classifier scored by one of its classes."""
    (tmp_path / "data.jsonl").write_text(GOOD)
    out = tmp_path / "new" / "out.jsonl"
    tiny.assert_refused(score(folder, tmp_path / "data.jsonl", out), "no score head", "train_rm.py")
    write_reward_model(tmp_path / "two", num_labels=2)
    tiny.assert_refused(score(tmp_path / "two", tmp_path / "data.jsonl", out), "num_labels is 2")
    assert not (tmp_path / "new").exists()


def test_broken_weights(rm, tmp_path):
    """Catches NaN rewards written as if they were results."""
    model = shutil.copytree(rm, tmp_path / "model")
    broken_weights(model)
    (tmp_path / "data.jsonl").write_text(GOOD)
    result = score(model, tmp_path / "data.jsonl", tmp_path / "out.jsonl")
    assert result.code == 2 and "data.jsonl:1" in result.stderr and "nan" in result.stderr
    assert not (tmp_path / "out.jsonl").read_bytes()


def test_an_occupied_output_file_is_left_alone(rm, tmp_path):
    """Catches a run that overwrites an existing file."""
    (tmp_path / "data.jsonl").write_text(GOOD)
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    for flags in ((), ("--best_of_n",), ("--best_of_n", "--resume"), ("--resume",)):
        assert score(rm, tmp_path / "data.jsonl", out, *flags).code == 2
    tiny.assert_refused(score(rm, tmp_path / "data.jsonl", tmp_path / "data.jsonl"), "data.jsonl", "exists")
    assert out.read_text() == "precious\n" and (tmp_path / "data.jsonl").read_text() == GOOD
    assert len(list(tmp_path.iterdir())) == 2
