"""training/finetune_sft.py: input that is refused, with a line that names the flag, the file or the record."""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.training.test_finetune_sft import SCRIPT, flags, train_file, weights_of  # noqa: F401 (fixture)


def test_infinite_weight(folder, train_file, tmp_path):
    """Catches training on an input model with an infinite weight."""
    broken = copy_with(folder, tmp_path / "in", lambda w: w["model.norm.weight"].__setitem__(3, math.inf))
    result = tiny.run(SCRIPT, *flags(broken, train_file, tmp_path / "out"))
    tiny.assert_refused(result, "step 1: loss is nan; records of the step (from 0): ")
    assert tiny.read_lines(tmp_path / "out/metrics.jsonl") == []


def copy_with(folder, target, change_weights=None, **config):
    """Copies a model folder with other weights or config values."""
    shutil.copytree(folder, target)
    if change_weights is not None:
        weights = weights_of(target)
        change_weights(weights)
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


GOOD = '{"prompt": "a", "completion": " b"}\n'
LONG = json.dumps({"prompt": "word " * 40, "completion": " b"}) + "\n"
BAD_RECORDS = {
    "empty": ("", "train.jsonl: holds no records"),
    "malformed": (
        GOOD + '{"prompt": "a", \n',
        "train.jsonl:2: not valid JSON: Expecting property name",
        "at column 17\n",
    ),
    "an object in lines": ('{\n"prompt": "a"}\n', "train.jsonl:1: not valid JSON: ", "; put each object on one line\n"),
    "null": (GOOD + '{"prompt": "a", "completion": null}\n', "train.jsonl:2: the field 'completion' is null\n"),
    "not an object": (GOOD + "5\n", "train.jsonl:2: must be an object with named fields, not a number\n"),
    "missing field": (GOOD + '{"prompt": "a"}\n', "train.jsonl:2: the field 'completion' is missing"),
    "wrong type": (
        GOOD * 2 + '{"prompt": 5, "completion": "b"}\n',
        "train.jsonl:3: prompt must be text or a list of messages, not a number\n",
    ),
    "not UTF-8": (GOOD.encode() + b'{"text": "\xff"}', "train.jsonl: not UTF-8"),
    "too long": (GOOD + LONG, "train.jsonl:2: ", " tokens, the limit is 30; raise --max_seq_len"),
    "no template": (GOOD + '{"messages": [{"role": "user", "content": "a"}]}\n', "train.jsonl:2: "),
    "messages not a list": (GOOD + '{"messages": "hello"}\n', "train.jsonl:2: messages must be a non-empty list"),
    "surrogate": ('{"text": "\\ud83d"}\n', "train.jsonl:1: must be a string without lone surrogates"),
    "surrogate later": ('{"text": "' + "word " * 30 + 'here\\ud83d"}\n', "word word here\\ud83d'\n"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
@pytest.mark.parametrize("which", ["train_file", "eval_file"])
def test_bad_records(name, which, folder, tmp_path):
    """Catches an error without file and line, a traceback, and an output folder left behind."""
    content, *complaints = BAD_RECORDS[name]
    bad, good = tmp_path / "train.jsonl", tmp_path / "good.jsonl"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    good.write_text(GOOD)
    files = {"train_file": good, which: bad}
    result = tiny.run(SCRIPT, *flags(folder, output_dir=tmp_path / "out", overlong="refuse", **files))
    tiny.assert_refused(result, str(bad), *complaints)
    assert not (tmp_path / "out").exists()


def test_only_records_with_nothing_to_learn(folder, tmp_path):
    """Catches a run that trains on nothing."""
    path = tiny.write_records(tmp_path / "train.jsonl", [{"prompt": "word " * 40, "completion": " b"}] * 2)
    for overlong in ("truncate", "skip"):
        result = tiny.run(SCRIPT, *flags(folder, path, tmp_path / "out", overlong=overlong))
        tiny.assert_refused(result, f"{path}: no record has a token to learn")
    assert not (tmp_path / "out").exists()


def test_bad_chats(folder, tmp_path):
    """Catches an error that does not name the record if its messages are malformed or the template fails on them."""
    chatty = tmp_path / "in"
    shutil.copytree(folder, chatty)
    template = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}{{ nothing.x if false }}"
    tiny.write_tokenizer(chatty, chat_template=template)
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for bad in ({"messages": [{"content": "a"}]}, {"messages": []}, {"prompt": [], "completion": "a"}):
        path = tiny.write_records(tmp_path / "train.jsonl", [good, bad])
        result = tiny.run(SCRIPT, *flags(chatty, path, tmp_path / "out"))
        tiny.assert_refused(result, f"{path}:2: ", "must be")
    tiny.write_tokenizer(chatty, chat_template="{{ raise_exception('only\n tools') }}")
    tiny.assert_refused(tiny.run(SCRIPT, *flags(chatty, path, tmp_path / "out")), f"{path}:1: ", "only tools")
    assert not (tmp_path / "out").exists()


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


BAD_FOLDERS = {
    "no folder": (shutil.rmtree, ["no such file or folder"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ["config.json: not valid JSON"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no weights here"]),
    "truncated weights": (lambda f: cut(f / "model.safetensors", 5000), ["model.safetensors: truncated"]),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), ["neither tokenizer.json nor tokenizer.model"]),
    "EOS": (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ""}'), ["eos_token_id must be"]),
    "broken tokenizer": (lambda f: cut(f / "tokenizer.model", 999), ["tokenizer.model: not a usable tokenizer.model"]),
}
BAD_CONFIGS = {
    "model type": ({"model_type": "mamba"}, ["config.json", "mamba"]),
    "rope type": (
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        ["config.json", "'longrope' is not supported"],
    ),
    "heads": ({"num_key_value_heads": 3}, ["config.json", "num_key_value_heads 3"]),
    "vocabulary": ({"vocab_size": 300}, ["the tokenizer does not fit: it has 384 tokens", "300"]),
    "activation": ({"hidden_act": "gelu"}, ["config.json", "gelu"]),
}
BAD_WEIGHTS = {
    "missing": (lambda w: w.pop("model.norm.weight"), ["missing tensors: model.norm.weight"]),
    "extra": (lambda w: w.update(extra=torch.ones(1)), ["unexpected tensors", "extra"]),
    "shape": (
        lambda w: w.update({"lm_head.weight": torch.ones(384, 63)}),
        ["lm_head.weight is [384, 63], should be [384, 64]"],
    ),
    "a reward model's": (
        lambda w: w.update({"score.weight": w.pop("lm_head.weight")[:1]}),
        ["a reward model (it has score.weight); give a language model's folder"],
    ),
}


@pytest.mark.parametrize("name", [*BAD_FOLDERS, *BAD_CONFIGS, *BAD_WEIGHTS])
def test_bad_model_folders(name, folder, tmp_path):
    """Catches a library's traceback, an error that does not name the file, key or tensor, or that comes only after the
    records were read, and output left behind."""
    source, change_weights, config = tmp_path / "in", None, {}
    if name in BAD_CONFIGS:
        config, parts = BAD_CONFIGS[name]
    elif name in BAD_WEIGHTS:
        change_weights, parts = BAD_WEIGHTS[name]
    copy_with(folder, source, change_weights, **config)
    if name in BAD_FOLDERS:
        damage, parts = BAD_FOLDERS[name]
        damage(source)
    result = tiny.run(SCRIPT, *flags(source, tmp_path / "nowhere.jsonl", tmp_path / "out"))
    tiny.assert_refused(result, str(source), *parts)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


BAD_FLAGS = {
    "micro batch": ({"micro_batch_size": 5, "batch_size": 4}, ["--micro_batch_size 5", "--batch_size 4"]),
    "eval steps": ({"eval_steps": 3}, ["--eval_steps needs an --eval_file"]),
    "rate below 0": ({"learning_rate": -1}, ["--learning_rate", "-1"]),
    "rate nan": ({"learning_rate": "nan"}, ["--learning_rate", "nan"]),
    "warm-up": ({"warmup_ratio": 2}, ["--warmup_ratio", "'2'"]),
    "max_grad_norm": ({"max_grad_norm": 0}, ["--max_grad_norm", "'0'"]),
    "beyond the context": ({"max_seq_len": 257}, ["--max_seq_len 257", "context is 256"]),
    "batch size": ({"batch_size": 0}, ["--batch_size", "'0'"]),
    "no train file": ({"train_file": "nowhere.jsonl"}, ["nowhere.jsonl: no such file"]),
    "no eval file": ({"eval_file": "nowhere.jsonl"}, ["nowhere.jsonl: no such file"]),
    "device": ({"device": "cuda:99"}, ["--device cuda:99: there is no such GPU"]),
    "replicas": ({"dp_replicate": 2}, ["--dp_replicate 2 does not divide the 1 data-parallel ranks"]),
    "offload to itself": (
        {"cpu_offload": True, "train_file": "nowhere.jsonl"},
        ["--cpu_offload", "this run is on the CPU"],
    ),
    "offload what is small": ({"cpu_offload": True, "optim": "adamw_8bit"}, ["--optim adamw_8bit", "--cpu_offload"]),
    "device name": ({"device": "abacus"}, ["--device abacus: not a device name"]),
    "dtype": ({"dtype": "float8"}, ["--dtype", "float8"]),
    "schedule": ({"lr_schedule": "magic"}, ["--lr_schedule", "magic"]),
    "lost order": ({"pack": True, "shuffle": False}, ["--no-shuffle: --pack puts", "leave one of them out"]),
    "unknown": ({"gradient_magic": 1}, ["--gradient_magic"]),
    "abbreviated": ({"learning": 1}, ["--learning"]),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(name, folder, train_file, tmp_path):
    """Catches an out-of-range value that is found only after the model was loaded, or never."""
    given, parts = BAD_FLAGS[name]
    result = tiny.run(
        SCRIPT, *flags(**{"checkpoint_path": folder, "train_file": train_file, **given}, output_dir=tmp_path / "out")
    )
    tiny.assert_refused(result, *parts)
    assert not (tmp_path / "out").exists()


def test_occupied_output_dir(folder, train_file, tmp_path):
    """Catches an earlier run, a file or a user's model overwritten, and advice to empty what may be the input."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    tiny.assert_refused(tiny.run(SCRIPT, *flags(folder, train_file, out)), f"--output_dir {out}: is not empty")
    result = tiny.run(SCRIPT, *flags(folder, train_file, out / "notes.txt"))
    tiny.assert_refused(result, f"--output_dir {out / 'notes.txt'}: is a file")
    result = tiny.run(SCRIPT, *flags(folder, train_file, folder))
    tiny.assert_refused(result, f"--output_dir {folder}: is not empty; take another, or go on with --resume\n")
    tiny.assert_refused(
        tiny.run(SCRIPT, *flags(folder, train_file, folder, resume=True)), f"--output_dir {folder}: holds"
    )
    assert os.listdir(out) == ["notes.txt"] and (out / "notes.txt").read_text() == "mine"


def test_from_the_shell(folder, train_file, tmp_path):
    """Catches a script that only works when imported: one clean line and exit code 2 from a process of its own."""
    process = tiny.start(SCRIPT, *flags(folder, tmp_path / "nowhere.jsonl", tmp_path / "out"))
    printed, errors = process.communicate(timeout=240)
    tiny.assert_refused(tiny.Result(process.returncode, printed, errors), "finetune_sft.py: error: ", "nowhere.jsonl")
