"""training/metrics.py: metrics.jsonl after a resume, and dashboards; and the MFU of training/run_dir.py."""

import json
import sys
import types
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from models.common import Runtime
from models.compressed import linear_layers
from models.config import ModelConfig
from models.lora import Lora, add_adapters
from models.model import Transformer
from tests import tiny
from training import run_dir
from training.metrics import Metrics, check_installed


def test_metrics_resume(tmp_path):
    """Catches a step twice in metrics.jsonl after a resume, and a torn last line that makes the file unreadable."""
    metrics = Metrics(tmp_path)
    for step in (1, 2, 3, 4):
        metrics.write({"step": step, "loss": step / 2})
        assert tiny.read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == step  # flushed at once
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    metrics = Metrics(tmp_path, after_step=2)
    metrics.write({"step": 3, "loss": -1})
    assert [(line["step"], line["loss"]) for line in tiny.read_lines(tmp_path / "metrics.jsonl")] == [
        (1, 0.5),
        (2, 1.0),
        (3, -1),
    ]
    Metrics(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_report_to(tmp_path, monkeypatch):
    """Catches metrics that do not reach the dashboard, or reach it without their step, and a package that is missing,
    or lacks a dependency, noticed late or with a traceback."""
    with pytest.raises(ValueError, match="pip install not_there"):
        check_installed("not_there")
    (tmp_path / "half_there.py").write_text("import not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"^--report_to half_there: .*'not_there'; pip install half_there$"):
        check_installed("half_there")
    for module, there in (("tensorboard", types.ModuleType("tensorboard")), ("torch.utils.tensorboard", None)):
        monkeypatch.setitem(sys.modules, module, there)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        check_installed("tensorboard")
    check_installed("none")
    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    metrics = Metrics(tmp_path, report_to="wandb")
    metrics.write({"step": 3, "loss": 1.5})
    metrics.close()
    assert logged == [(3, {"loss": 1.5}), "end"]
    boards = []

    class SummaryWriter:
        def __init__(self, path, purge_step):
            boards.append((path, purge_step))

        def add_scalar(self, name, value, step):
            boards.append((name, value, step))

        def close(self):
            boards.append("end")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    metrics = Metrics(tmp_path, after_step=3, report_to="tensorboard")
    metrics.write({"step": 4, "loss": 1.25})
    metrics.close()
    assert boards == [(tmp_path / "tensorboard", 4), ("loss", 1.25, 4), "end"]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [3, 4]


MODELS = {  # transformers' class; our head; whether it has adapters
    "all weights": (transformers.AutoModelForCausalLM, "lm", False),
    "adapters": (transformers.AutoModelForCausalLM, "lm", True),
    "reward model": (transformers.AutoModelForSequenceClassification, "score", False),
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_mfu(kind, beside, folder, monkeypatch):
    """Catches the rate of all ranks divided by the peak of one, and FLOPs that are counted but not computed (gradients
    of frozen weights, logits of a prompt or of a reward model). The oracle is torch's FLOP counter on transformers'
    model, whose logits are those of the last 4 tokens."""
    made_by, head, adapted = MODELS[kind]
    theirs = made_by.from_pretrained(folder, pad_token_id=0)
    ids = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    kept = {"logits_to_keep": 4} if head == "lm" else {}
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        theirs(ids, **kept)
    if adapted:
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=1, target_modules="all-linear"))
    with FlopCounterMode(display=False) as counter:
        theirs(ids, **kept).logits.sum().backward()

    config = ModelConfig.from_hf(folder)
    with torch.device("meta"):
        ours = Transformer(config, head=head)
        if adapted:
            layers = frozenset(linear_layers(config.num_hidden_layers))
            add_adapters(ours, Lora(1, 2.0, False, 0.0, layers, None, {}, Path(), "", 0))
    monkeypatch.setattr(run_dir, "peaks", lambda device: (1e9, 1e9))
    monkeypatch.setattr(run_dir.dist, "get_world_size", lambda: 8)
    run = types.SimpleNamespace(num_tokens=0, runtime=Runtime(None, None, False))
    run._watch = types.SimpleNamespace(lap=lambda: 2.0)
    metrics = run_dir.Run.speed(run, ours, [16] * 4, 4 * 4 if kept else 0, beside=beside)
    flops = counter.get_total_flops() + beside * forward.get_total_flops()
    assert metrics["tokens_per_second"] == 4 * 16 / 2 and run.num_tokens == 4 * 16
    # with adapters, the first layer's q, k and v need no gradient of their input: 6 % of so small a model
    assert metrics["mfu"] == pytest.approx(flops / 2 / (8 * 1e9), rel=0.07)
