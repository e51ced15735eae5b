"""Shared by the tests: tiny Hugging Face folders written by transformers, records, and ways to run a script."""

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import sentencepiece
import torch
import transformers

from models.common import close_bars
from models.script import run_main

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 384


@cache
def sentencepiece_model() -> bytes:
    """Returns a tokenizer.model like LLaMA's: BPE with byte fallback, <unk> 0, <s> 1, </s> 2, VOCAB_SIZE pieces."""
    text = [
        f"{a} plus {b} is {a + b}. The answer to question {a} is {b}, or so it seems."
        for a in range(40)
        for b in (3, 17)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=True,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, **config) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **names, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


QWEN2 = {"model_type": "qwen2"}
QWEN3 = {"model_type": "qwen3", "head_dim": 24}
YARN = {  # its ramp lies within the 8 frequencies of 16 dimensions
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
}


def write_model(
    folder: Path,
    *,
    model_type: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    std: float = 0.15,
    **config,
):
    """Writes a folder with a random model, by transformers, and a tokenizer; returns transformers' model."""
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": std,  # wide enough that the logits of a random model differ clearly
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **(shape | config))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # transformers sets them to 0, which would hide a dropped bias
        elif name.endswith("norm.weight") and model_type != "llama":
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # and these to 1
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def copy_to_edit(source: Path, target: Path) -> Path:
    """Copies an export that a test will change, without its checksums, which would reveal the change."""
    return shutil.copytree(source, target, ignore=shutil.ignore_patterns("checksums.json"))


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str


def main_of(module, arguments: Sequence[str] = ()) -> Callable:
    """Returns a script's main function, or the one of the job that its first argument names."""
    return module.main_of(arguments) if hasattr(module, "main_of") else module.main


def args_of(module, arguments: Sequence[str] = ()) -> type:
    """Returns the dataclass of a script's flags, or of the flags of the job that its first argument names."""
    return typing.get_type_hints(main_of(module, arguments))["args"]


def run(script: str, *args: object) -> Result:
    """Runs a script's command line (`inference/generate.py`) in this process: the same path as from a shell, without
    the seconds of a new interpreter."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    close_bars()  # a fixture's open bar would put the script's bar on a second line
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = list(map(str, args))
    with mock.patch.object(sys, "argv", [script, *words]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = run_main(main_of(module, words), args_of(module, words))
        except SystemExit as exit:  # argparse
            code = exit.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def start(script: str, *args: object) -> subprocess.Popen:
    """Starts a script in its own process, with one thread and captured output."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def assert_refused(result: Result, *parts: str) -> None:
    """Asserts that a user's mistake was refused: exit code 2, and one line on stderr that has all `parts`."""
    assert result.code == 2, result
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in result.stderr, (part, result.stderr)


def refused(call, where, complaint):
    """Asserts that call() raises a ValueError that begins with `where` and has the complaint."""
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(str(where)) and complaint in str(caught.value), caught.value
