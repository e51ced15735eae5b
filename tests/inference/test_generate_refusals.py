"""inference/generate.py with bad prompts, flags and folders: refused in one line, before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.forked import Forked
from tests.inference.test_generate import SCRIPT, generate

FILE_CASES = {  # name: (content of the prompt file, what the message names)
    "a tab in a text": (b'{"prompt": "a\tb"}\n', ("p.jsonl:1", "Invalid control character at column 14")),
    "empty": (b"", ("p.jsonl", "no records")),
    "blank": (b"\n \n", ("p.jsonl", "no records")),
    "empty list": (b"[]", ("p.jsonl", "no records")),
    "malformed line": (b'{"prompt": "a"}\n{"prompt": \n', ("p.jsonl:2",)),
    "malformed list": (b'[{"prompt": "a"},', ("p.jsonl", "JSON list")),
    "not an object": (b'{"prompt": "a"}\n\n5\n', ("p.jsonl:3", "a number")),
    "no prompt": (b'{"prompt": "a"}\n{"question": "b"}\n', ("p.jsonl:2", "'prompt'", "question")),
    "prompt of a wrong type": (b'{"prompt": 5}\n', ("p.jsonl:1", "prompt", "a number")),
    "no message": (b'{"prompt": [5]}\n', ("p.jsonl:1",)),
    "messages without a template": (b'{"prompt": [{"role": "user", "content": "a"}]}\n', ("p.jsonl:1", "template")),
    "half a surrogate pair": (b'{"prompt": "a\\ud800"}\n', ("p.jsonl:1", "surrogate")),
    "not UTF-8": (b'{"prompt": "\xff"}\n', ("p.jsonl", "UTF-8")),
    "longer than the context": (
        b'{"prompt": "a"}\n{"prompt": "' + b"1 plus 2 " * 200 + b'"}\n',
        ("p.jsonl:2", "256", "--overlong"),
    ),
}


@pytest.mark.parametrize("case", FILE_CASES)
def test_bad_prompt_files(folder, tmp_path, case):
    """Catches a bad record that is skipped, read as something else, or noticed only after the model is loaded."""
    content, parts = FILE_CASES[case]
    (tmp_path / "p.jsonl").write_bytes(content)
    result = generate(folder, "--prompt_file", tmp_path / "p.jsonl", "--output_file", tmp_path / "new" / "out.jsonl")
    tiny.assert_refused(result, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


FLAG_CASES = {  # name: (flags, what the message names)
    "no prompt": ((), ("--prompt", "--prompt_file")),
    "two prompts": (("--prompt", "a", "--prompt_file", "b"), ("--prompt", "--prompt_file")),
    "missing file": (("--prompt_file", "nowhere.jsonl"), ("nowhere.jsonl",)),
    "a folder as file": (("--prompt_file", "."), (".: is a folder; name a file",)),
    "no GPU": (("--prompt", "a", "--device", "cuda:9"), ("--device cuda:9",)),
    "no device": (("--prompt", "a", "--device", "abacus"), ("abacus",)),
    "temperature": (("--prompt", "a", "--temperature", "-1"), ("--temperature", "-1")),
    "temperature too small": (("--prompt", "a", "--temperature", "1e-40"), ("--temperature 1e-40",)),
    "temperature NaN": (("--prompt", "a", "--temperature", "nan"), ("--temperature", "nan")),
    "top_p": (("--prompt", "a", "--top_p", "2"), ("--top_p", "2")),
    "top_k": (("--prompt", "a", "--top_k", "-5"), ("--top_k", "-5")),
    "no new tokens": (("--prompt", "a", "--max_new_tokens", "0"), ("--max_new_tokens",)),
    "no slots": (("--prompt", "a", "--batch_size", "0"), ("--batch_size",)),
    "no samples": (("--prompt", "a", "--num_samples", "0"), ("--num_samples",)),
    "more samples than memory": (("--prompt", "a", "--num_samples", "1" + "0" * 15), ("--num_samples", "too many")),
    "more samples than numpy": (("--prompt", "a", "--num_samples", "1" + "0" * 20), ("--num_samples", "too many")),
    "max_seq_len": (("--prompt", "a", "--max_seq_len", "257"), ("--max_seq_len 257", "256")),
    "no room at all": (("--prompt", "a", "--max_seq_len", "1", "--overlong", "truncate"), ("no room",)),
    "nothing left": (("--prompt", "a", "--max_seq_len", "1", "--overlong", "skip"), ("no room",)),
    "no template": (("--prompt", "a", "--chat"), ("template",)),
    "empty stop": (("--prompt", "a", "--stop", ""), ("--stop",)),
    "no chat": (("--prompt", "a", "--system", "b"), ("--system", "--chat")),
    "repetition_penalty": (("--prompt", "a", "--repetition_penalty", "0"), ("--repetition_penalty", "> 0")),
    "unknown flag": (("--prompt", "a", "--beam_size", "4"), ("--beam_size",)),
    "abbreviated flag": (("--prompt", "a", "--temp", "0"), ("--temp",)),
    "fp8 on a CPU": (("--prompt_file", "nowhere.jsonl", "--quantize", "fp8"), (": --quantize fp8 needs", "int8")),
    "int4 groups": (
        ("--prompt", "a", "--quantize", "int4"),
        ("no group size divides", "intermediate_size 112", "take int8"),
    ),
    "int4 groups of the MLP": (
        ("--prompt", "a", "--quantize", "int4", "--group_size", "64"),
        ("intermediate_size 112", "take int8"),
    ),
    "group size": (("--prompt", "a", "--quantize", "int4", "--group_size", "48"), ("--group_size", "48")),
    "group size of int8": (("--prompt", "a", "--quantize", "int8", "--group_size", "64"), ("--group_size",)),
    "groups of nothing": (("--prompt", "a", "--group_size", "64"), ("--group_size",)),
    "tensor parallel": (("--prompt", "a", "--tensor_parallel_size", "2"), ("--tensor_parallel_size",)),
}


@pytest.mark.parametrize("case", FLAG_CASES)
def test_bad_flags(folder, tmp_path, case):
    """Catches a flag that is ignored, clamped, or answered with a traceback."""
    flags, parts = FLAG_CASES[case]
    result = tiny.run(SCRIPT, "--checkpoint_path", folder, "--output_file", tmp_path / "out.jsonl", *flags)
    tiny.assert_refused(result, *parts)
    assert not any(tmp_path.iterdir())


def test_replicas_without_an_output_file(folder, monkeypatch):
    """Catches long lines of several processes that are written into each other on one pipe."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    tiny.assert_refused(generate(folder, "--prompt", "a"), "2 replicas would write into each other's lines")


def test_an_occupied_output_file_is_left_alone(folder, tmp_path):
    """Catches a second run that appends to, or overwrites, the first one's samples."""
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    result = generate(folder, "--prompt", "a", "--output_file", out)
    tiny.assert_refused(result, "--output_file", str(out), "--resume")
    assert out.read_text() == "precious\n" and len(list(tmp_path.iterdir())) == 1
    tiny.assert_refused(generate(folder, "--prompt", "a", "--output_file", tmp_path), str(tmp_path))
    tiny.assert_refused(generate(folder, "--prompt", "a", "--resume"), "--resume", "--output_file")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "remove"}
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def lose_a_shard(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard = "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FOLDER_CASES = {  # name: (what is done to a good folder, what the message names)
    "no folder": (shutil.rmtree, ("model", "no such file or folder")),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json",)),
    "broken config": (lambda f: (f / "config.json").write_text('{"model_type": '), ("config.json", "JSON")),
    "model type": (lambda f: edit_config(f, model_type="mamba"), ("config.json", "'mamba'")),
    "no hidden size": (lambda f: edit_config(f, hidden_size="remove"), ("config.json", "'hidden_size'")),
    "rope type": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}),
        ("config.json", "'longrope'"),
    ),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), ("hidden_act", "'gelu'")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("no weights",)),
    "missing shard": (lose_a_shard, ("model-00002-of-00002.safetensors", "missing")),
    "truncated weights": (cut_the_weights, ("model.safetensors", "truncated")),
    "extra tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.0.self_attn.sink": torch.zeros(4)})),
        ("unexpected", "model.layers.0.self_attn.sink"),
    ),
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        ("missing", "model.layers.1.mlp.up_proj.weight"),
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(63)})),
        ("model.norm.weight", "[63]", "[64]"),
    ),
    "a reward model": (
        lambda f: edit_tensors(f, lambda t: t.update({"score.weight": t.pop("lm_head.weight")[:1]})),
        ("a reward model", "give a language model"),
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), ("tokenizer.model", "tokenizer.json")),
    "broken tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"nonsense"), ("tokenizer.model",)),
    "tokenizer of another model": (lambda f: edit_config(f, vocab_size=300), ("does not fit", "384", "300")),
    "EOS of a wrong type": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        ("generation_config.json", "eos_token_id"),
    ),
    "EOS of no vocabulary": (
        lambda f: (f / "generation_config.json").write_text(json.dumps({"eos_token_id": 2**63})),
        ("generation_config.json", "eos_token_id"),
    ),
    "a token's id in words": (
        lambda f: (f / "added_tokens.json").write_text('{"<|u|>": "384"}'),
        ("added_tokens.json", "the id of '<|u|>' is '384'"),
    ),
    "a token's id of no vocabulary": (
        lambda f: (f / "added_tokens.json").write_text(json.dumps({"<|u|>": 2**63})),
        ("added_tokens.json", f"the id of '<|u|>' is {2**63}"),
    ),
    "a token's id below 0": (
        lambda f: (f / "added_tokens.json").write_text('{"<|u|>": -3}'),
        ("added_tokens.json", "the id of '<|u|>' is -3"),
    ),
}


@pytest.mark.parametrize("case", FOLDER_CASES)
def test_bad_folders(folder, tmp_path, case):
    """Catches a broken folder that runs with wrong results, and an error that does not name the file, key or tensor, or
    that comes only after the prompts were read."""
    model = shutil.copytree(folder, tmp_path / "model")
    damage, parts = FOLDER_CASES[case]
    damage(model)
    result = generate(model, "--prompt_file", "nowhere.jsonl", "--output_file", tmp_path / "new" / "out.jsonl")
    tiny.assert_refused(result, *parts)
    assert not (tmp_path / "new").exists()


def test_broken_weights(folder, tmp_path):
    """Catches NaN log-probs written as if they were results."""
    model = shutil.copytree(folder, tmp_path / "model")
    edit_tensors(model, lambda t: t["model.norm.weight"].fill_(float("nan")))
    result = generate(model, "--prompt", "a")
    assert result.code == 2 and result.stdout == "" and "--prompt 1: the log-probability" in result.stderr


def test_bad_input_in_a_process_of_its_own(tmp_path):
    """Catches a refusal that is right only inside the tests' process: elsewhere a traceback, or another exit code."""
    out = tmp_path / "out.jsonl"
    process = Forked(SCRIPT, "--checkpoint_path", tmp_path / "nowhere", "--prompt", "a", "--output_file", out)
    stdout, stderr = process.communicate()
    tiny.assert_refused(tiny.Result(process.returncode, stdout, stderr), "nowhere")
    assert stdout == "" and not out.exists()
