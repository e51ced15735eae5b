"""The closing cards of inference/generate.py and score.py: their speeds are counted tokens over the seconds of a
patched clock, so that no time is measured."""

import json
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

from inference import score
from inference.generate import end_card
from models import generation
from models.common import Runtime
from models.tokenizer import Tokenizer
from models.transfer import Download
from tests import tiny
from tests.inference.test_generate import generate, lines_of
from tests.inference.test_score import rm  # noqa: F401 (a fixture)


def test_speeds_of_generate(folder, monkeypatch):
    """Catches tokens counted other than once, a time in place of a rate, and --prefill_tokens that does not reach the
    engine: each prefill and each decode step takes one second."""
    seconds, wait = [], Download.wait
    monkeypatch.setattr(Download, "wait", lambda numbers: seconds.append(1) or wait(numbers))
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=lambda: len(seconds)))
    flags = ("--prompt", "12 plus 17 is", "--num_samples", 4, "--batch_size", 4, "--prefill_tokens", 3)
    result = generate(folder, *flags, new=9)
    lines = lines_of(result)
    drawn = [line["num_tokens"] + (line["finish_reason"] == "stop") for line in lines]
    steps = max(drawn) - 1  # the prefill draws the first tokens
    num_prompt_tokens = len(Tokenizer(folder).encode("12 plus 17 is"))
    assert num_prompt_tokens % 3 and num_prompt_tokens > 3
    found = re.search(r"decoding +([\d.]+) tok/s, 1000.00 ms a step of 4 slots\n", result.stderr)
    assert found[1] == f"{sum(count - 1 for count in drawn) / steps:.1f}"
    found = re.search(r"prefill +([\d.]+) tok/s\n", result.stderr)
    assert found[1] == f"{num_prompt_tokens / -(-num_prompt_tokens // 3):.1f}"


def test_a_card_without_decoded_tokens(folder, tmp_path, monkeypatch):
    """Catches a traceback after the answers are written, where a look was launched behind the last answer: on a GPU the
    host is one look behind."""
    monkeypatch.setattr(generation, "looks_on", lambda device: (4, 1))
    flags = ("--prompt", "12 plus 17 is", "--temperature", 0, "--return_token_ids")
    first = lines_of(generate(folder, *flags))[0]["token_ids"][0]
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first]}))
    result = generate(other, *flags)
    assert lines_of(result)[0]["finish_reason"] == "stop"
    assert re.search(r"decoding +0\.0 tok/s, ", result.stderr)


def test_ranks_add_their_counts_on_the_cpu(monkeypatch):
    """Catches NCCL started for the closing card: tensors of a GPU, here a device without values, are not exchanged."""
    engine = mock.Mock(num_decoded=6, decode_seconds=2.0, num_prompt_tokens=8, prefill_seconds=2.0, num_steps=0)
    engine.compile_seconds, source = 0.0, mock.Mock(is_large=True, counts={"skipped": 3}, remarks=lambda: "")
    monkeypatch.setattr(dist, "all_reduce", lambda totals, group: totals.mul_(2))
    runtime = Runtime(torch.device("meta"), torch.float32, False)
    card = end_card(engine, None, runtime, mock.Mock(**{"size.return_value": 2}), source)
    assert re.search(r"decoding +6.0 tok/s\n", card) and re.search(r"prefill +8.0 tok/s\n", card)
    assert source.counts == {"skipped": 6}


def test_speed_of_score(rm, tmp_path, monkeypatch):
    """Catches seconds over tokens, padding or the tokens of other records in the speed, and FLOPs of rows whose score
    is an equal row's, of a head or of a backward in MFU. The oracle is torch's FLOP counter on transformers' model."""
    monkeypatch.setattr(score, "Stopwatch", lambda device: SimpleNamespace(lap=lambda: 8.0))
    monkeypatch.setattr(score, "peaks", lambda device: (1e6, 1e6))
    records = [{"prompt": f"{i} plus", "completion": " so" * i} for i in range(9)]
    data, tokenizer = tiny.write_records(tmp_path / "data.jsonl", records + records[-1:] * 7), Tokenizer(rm)
    flags = ("--checkpoint_path", rm, "--data_file", data, "--output_file", tmp_path / "out.jsonl")
    result = tiny.run("inference/score.py", *flags)
    rows = [[*tokenizer.encode(each["prompt"] + each["completion"]), tokenizer.eos_token_id] for each in records]
    theirs = AutoModelForSequenceClassification.from_pretrained(rm)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for row in rows:
            theirs(torch.tensor([row]))
    speed, mfu = re.search(r"speed +([\d.]+) tok/s, MFU ([\d.]+)%\n", result.stdout).groups()
    assert speed == f"{sum(map(len, rows + rows[-1:] * 7)) / 8:.1f}", result
    assert float(mfu) == pytest.approx(100 * counter.get_total_flops() / 8 / 1e6, rel=0.04), result
