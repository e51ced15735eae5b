"""training/finetune_sft.py against a plain loop over transformers' model. Kills and resumes: test_finetune_sft_runs.py;
refusals: test_finetune_sft_refusals.py.

The reference runs rows one by one without padding and takes one mean over all targets of an optimizer step.
"""

import json
import math
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from models.records import Record
from models.tokenizer import Tokenizer
from tests import tiny
from training import finetune_sft
from training.data import encode_sft_record, training_batches

SCRIPT = "training/finetune_sft.py"
KEYS = {"step", "loss", "learning_rate", "grad_norm", "num_tokens", "tokens_per_second"}


def make_records(count=11):
    records = [
        {
            "prompt": f"Question {i}:" + " and so" * (i % 4),
            "completion": f" the answer is {i + 3}" + " or more" * (i % 3),
        }
        for i in range(count - 1)
    ]
    # truncated to --max_seq_len 30, this record has no targets
    return [*records[:2], {"prompt": "very long " * 30, "completion": " never seen"}, *records[2:]]


@pytest.fixture(scope="module")
def train_file(tmp_path_factory):
    return tiny.write_records(tmp_path_factory.mktemp("data") / "train.jsonl", make_records())


def flags(checkpoint_path, train_file, output_dir, **more):
    given = {"max_seq_len": 30, "overlong": "truncate", "learning_rate": 1e-3, "adam_eps": 1e-6, "device": "cpu"}
    given |= {"checkpoint_path": checkpoint_path, "train_file": train_file, "output_dir": output_dir, "save_steps": 0}
    return [part for name, value in (given | more).items() if value is not None for part in _flag(name, value)]


def _flag(name, value):
    return [f"--{name}"] if value is True else [f"--no-{name}"] if value is False else [f"--{name}", str(value)]


def finetune(*args, **more):
    result = tiny.run(SCRIPT, *flags(*args, **more))
    assert result.code == 0, result.stderr
    return result


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype, name


# ---------------------------------------------------------------------- against transformers' model


def encoded(folder, records, max_seq_len=30):
    """Returns (input_ids, labels) of each record, cut to max_seq_len; test_data.py checks the encoding."""
    tokenizer = Tokenizer(folder)
    examples = [encode_sft_record(Record(str(i), fields), tokenizer)[0] for i, fields in enumerate(records)]
    return [(e.input_ids[:max_seq_len], e.labels[:max_seq_len]) for e in examples]


def summed_loss(model, rows):
    total = 0.0
    for input_ids, labels in rows:
        logits = model(input_ids=torch.tensor([input_ids])).logits[0]
        total = total + F.cross_entropy(logits[:-1].float(), torch.tensor(labels[1:]), reduction="sum")
    return total


def count_targets(rows):
    return sum(label != -100 for _, labels in rows for label in labels[1:])


def reference_run(folder, rows, batches, rates, *, weight_decay=0.0, max_grad_norm=1.0, betas=(0.9, 0.95)):
    """Trains in plain PyTorch; returns (model, [(loss, grad_norm)])."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    norms_and_biases = [p for n, p in model.named_parameters() if "norm" in n or n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if not ("norm" in n or n.endswith("bias"))]
    groups = [
        {"params": others, "weight_decay": weight_decay},
        {"params": norms_and_biases, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=1e-6, lr=1.0, foreach=False)
    history = []
    for numbers, rate in zip(batches, rates, strict=True):
        batch = [rows[i] for i in numbers]
        loss = summed_loss(model, batch) / count_targets(batch)
        loss.backward()
        norm = torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, max_grad_norm / (norm.item() + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    return model.eval(), history


def assert_equals_reference(output_dir, model, history):
    lines = tiny.read_lines(output_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(history) + 1))
    for line, (loss, norm) in zip(lines, history, strict=True):
        assert line["loss"] == pytest.approx(loss, abs=1e-5) and line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    ours = weights_of(output_dir)
    theirs = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=0, atol=1e-5, msg=name)


VARIANTS = {
    "gqa": {},
    "gqa, 1 layer": {"num_hidden_layers": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "qwen2": {**tiny.QWEN2, "tie_word_embeddings": True, "rope_parameters": tiny.YARN},
    "qwen3": tiny.QWEN3,
}


@pytest.fixture(scope="module")
def one_step(tmp_path_factory, train_file):
    """Returns a function: variant -> (folder, reference model, history) of a step on 11 records, one all masked."""
    made = {}

    def make(variant, weight_decay, max_grad_norm):
        key = (variant, weight_decay, max_grad_norm)
        if key not in made:
            folder = tmp_path_factory.mktemp(variant)
            tiny.write_model(folder, seed=3, **VARIANTS[variant])
            rows = encoded(folder, make_records())
            assert [count_targets([row]) for row in rows].count(0) == 1
            settings = {"weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
            made[key] = folder, *reference_run(folder, rows, [range(11)], [1e-3], **settings)
        return made[key]

    return make


ONE_STEP = [("gqa", 0.0, 0.05), ("tied", 0.3, 0.05), ("biases", 0.3, 1000.0)]
ONE_STEP = [(*settings, micro_batch_size) for settings in ONE_STEP for micro_batch_size in (1, 2, 3, 11)]


@pytest.mark.parametrize(
    "variant, weight_decay, max_grad_norm, micro_batch_size",
    [*ONE_STEP, ("qwen2", 0.3, 1000.0, 3), ("qwen3", 0.3, 0.05, 3)],
)
def test_one_step(variant, weight_decay, max_grad_norm, micro_batch_size, one_step, train_file, tmp_path):
    """Catches a mean of micro-batches' means instead of the mean over tokens, clipping per micro-batch or not at all,
    padding that is attended to or in the loss, prompts in the loss, labels not shifted, weight decay of norms and
    biases, a tied head that is not trained, and a record without targets that spoils the step."""
    folder, model, history = one_step(variant, weight_decay, max_grad_norm)
    assert (history[0][1] > max_grad_norm) == (max_grad_norm < 1)
    more = {"weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "micro_batch_size": micro_batch_size}
    finetune(folder, train_file, tmp_path / "out", batch_size=11, lr_schedule="constant", **more)
    assert_equals_reference(tmp_path / "out", model, history)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_step(one_step, train_file, tmp_path):
    """Catches a block or an optimizer that does not compile, or not to the same results; compiled collectives of
    several ranks are in test_parallel.py."""
    folder, model, history = one_step("gqa, 1 layer", 0.0, 0.05)
    more = {"lr_schedule": "constant", "max_grad_norm": 0.05, "compile": True}
    finetune(folder, train_file, tmp_path / "out", batch_size=11, **more)
    assert_equals_reference(tmp_path / "out", model, history)


def test_steps_with_a_schedule(folder, train_file, tmp_path):
    """Catches a learning rate one step late, gradients not reset, an order other than perm(seed, epoch), a loss not
    divided by the token count of the last, smaller batch, and Adam's flags not passed on."""
    rows = encoded(folder, make_records())
    batches = [numbers for _, numbers in training_batches(11, 4, seed=5, shuffle=True, first_step=1, last_step=6)]
    rates = [5e-4, 1e-3, *(5e-4 * (1 + math.cos(math.pi * i / 4)) for i in range(4))]
    model, history = reference_run(folder, rows, batches, rates, weight_decay=0.1, betas=(0.8, 0.9))
    more = {"adam_beta1": 0.8, "adam_beta2": 0.9, "weight_decay": 0.1, "seed": 5, "micro_batch_size": 3}
    schedule = {"num_epochs": 2, "warmup_ratio": 0.3, "lr_schedule": "cosine"}
    finetune(folder, train_file, tmp_path / "out", batch_size=4, **schedule, **more)
    assert_equals_reference(tmp_path / "out", model, history)
    assert [line["learning_rate"] for line in tiny.read_lines(tmp_path / "out/metrics.jsonl")] == pytest.approx(rates)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_packed_equals_unpacked(folder, train_file, tmp_path, recompute):
    """Catches records of one row that attend to each other, positions that do not restart, a record that predicts the
    next one's first token, and recomputation that changes the gradient."""
    one = {"batch_size": 11, "max_seq_len": 100, "lr_schedule": "constant", "max_grad_norm": 1e3, "adam_eps": 1e-3}
    finetune(folder, train_file, tmp_path / "rows", **one)
    result = finetune(folder, train_file, tmp_path / "packed", **one, pack=True, activation_checkpointing=recompute)
    assert int(re.search(r"packed into (\d+) rows", result.stdout)[1]) < 9
    (rows,), (packed,) = (tiny.read_lines(tmp_path / d / "metrics.jsonl") for d in ("rows", "packed"))
    for key in ("loss", "grad_norm", "num_tokens"):
        assert packed[key] == pytest.approx(rows[key], rel=1e-5), key
    rows, packed = weights_of(tmp_path / "rows"), weights_of(tmp_path / "packed")
    for name in rows:
        torch.testing.assert_close(packed[name], rows[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_bfloat16_computation(one_step, train_file, tmp_path):
    """Catches weights or moments kept in bf16 (a weight would not move by 1e-3), and results far from fp32's."""
    folder, model, history = one_step("gqa", 0.0, 0.05)
    finetune(
        folder,
        train_file,
        tmp_path / "out",
        batch_size=11,
        lr_schedule="constant",
        max_grad_norm=0.05,
        dtype="bfloat16",
    )
    (line,) = tiny.read_lines(tmp_path / "out/metrics.jsonl")
    assert line["loss"] == pytest.approx(history[0][0], rel=5e-3) and line["loss"] != history[0][0]
    assert line["grad_norm"] == pytest.approx(history[0][1], rel=5e-2)
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    ours = torch.cat([(after[name] - before[name]).flatten() for name in before])
    theirs = torch.cat([(model.get_parameter(name).detach() - before[name]).flatten() for name in before])
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95 and ours.abs().max() < 1.1e-3


# ------------------------------------------------------------------------------------ export and logs


LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}


@pytest.mark.parametrize("config", [LINEAR, {**tiny.QWEN3, "rope_parameters": tiny.YARN}, tiny.QWEN2], ids=str)
def test_the_export_is_what_was_trained(config, train_file, tmp_path, monkeypatch):
    """Catches exported weights that are not those in memory, an export that transformers cannot open or computes
    differently, and tokenizer or generation files that are not the input's byte for byte."""
    source = tmp_path / "in"
    tiny.write_model(source, seed=4, **config)
    (source / "generation_config.json").write_text('{"temperature":   0.25, "eos_token_id": [2, 7]}')
    (source / "chat_template.jinja").write_bytes("{{ messages }} é\r\n".encode())
    trained = []
    load = finetune_sft.load_for_training
    monkeypatch.setattr(finetune_sft, "load_for_training", lambda *a, **k: trained.append(load(*a, **k)) or trained[0])
    finetune(source, train_file, tmp_path / "out", batch_size=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    input_ids = torch.randint(3, tiny.VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = trained[0].lm_head(trained[0](input_ids))
        torch.testing.assert_close(ours, model(input_ids).logits, rtol=1e-5, atol=1e-5)
        before = transformers.AutoModelForCausalLM.from_pretrained(source).eval()(input_ids).logits
    assert (ours - before).abs().max() > 0.1
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    tokenizer = transformers.LlamaTokenizer.from_pretrained(tmp_path / "out")  # AutoTokenizer takes Qwen's for qwen2
    assert tokenizer("The answer")["input_ids"] == Tokenizer(source).encode("The answer")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_no_steps_only_export(dtype, tied, train_file, tmp_path):
    """Catches weights changed by loading and saving alone, and --max_steps 0 taken for "not given"."""
    tiny.write_model(tmp_path / "in", dtype=dtype, tie_word_embeddings=tied)
    finetune(tmp_path / "in", train_file, tmp_path / "out", max_steps=0, num_epochs=3)
    assert_same_weights(tmp_path / "in", tmp_path / "out")
    assert tiny.read_lines(tmp_path / "out/metrics.jsonl") == []


def test_export_dtype(train_file, tmp_path):
    """Catches a bf16 folder exported at twice its size, --export_dtype ignored, and a config.json with the wrong
    dtype."""
    tiny.write_model(tmp_path / "in", dtype=torch.bfloat16)
    for given, dtype in (({}, "bfloat16"), ({"export_dtype": "float32"}, "float32")):
        out = tmp_path / dtype
        finetune(tmp_path / "in", train_file, out, max_steps=1, **given)
        assert {tensor.dtype for tensor in weights_of(out).values()} == {getattr(torch, dtype)}
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert model.dtype == getattr(torch, dtype)
    changed = [name for name, w in weights_of(tmp_path / "float32").items() if not torch.equal(w, w.bfloat16().float())]
    assert changed  # the fp32 export holds the master weights, not their rounding


def test_metrics_and_evaluation(folder, hf_model, train_file, tmp_path):
    """Catches an eval_loss that is a mean of means or counts prompts, --num_epochs that overrides --max_steps, lines
    missing or doubled under --log_steps, --eval_steps ignored, and keys that dashboards know renamed."""
    eval_file = tiny.write_records(tmp_path / "eval.jsonl", make_records(7))
    more = {"eval_file": eval_file, "eval_steps": 2, "max_steps": 5, "num_epochs": 9, "batch_size": 4}
    result = finetune(folder, train_file, tmp_path / "out", micro_batch_size=3, **more)
    lines = tiny.read_lines(tmp_path / "out/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 5]
    assert all(line.keys() - {"eval_loss"} == KEYS for line in lines)
    rows = encoded(folder, make_records(7))
    with torch.no_grad():
        wanted = summed_loss(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), rows)
    assert lines[-1]["eval_loss"] == pytest.approx(wanted.item() / count_targets(rows), abs=1e-5)
    lengths = [len(input_ids) for input_ids, _ in encoded(folder, make_records())]
    order = [numbers for _, numbers in training_batches(11, 4, seed=0, shuffle=True, first_step=1, last_step=5)]
    seen = [sum(lengths[i] for numbers in order[:n] for i in numbers) for n in range(1, 6)]
    assert [line["num_tokens"] for line in lines] == seen
    assert "2 truncated" in result.stdout and "1 nothing to learn" in result.stdout
    assert re.search(r"\n  train .*\n  eval ", result.stdout)
    args = json.loads((tmp_path / "out/args.json").read_text())
    assert (args["adam_beta1"], args["adam_beta2"], args["adam_eps"], args["max_steps"]) == (0.9, 0.95, 1e-6, 5)
    # --log_steps 3: the same run, with lines for every third step, for evaluations and for the last step
    finetune(folder, train_file, tmp_path / "seldom", micro_batch_size=3, **more, log_steps=3)
    seldom = tiny.read_lines(tmp_path / "seldom/metrics.jsonl")
    assert [line["step"] for line in seldom] == [2, 3, 4, 5]
    timed = {"tokens_per_second"}
    for line in seldom:
        full = lines[line["step"] - 1]
        assert {k: line[k] for k in line.keys() - timed} == {k: full[k] for k in full.keys() - timed}


def test_order_of_the_file(folder, train_file, tmp_path):
    """Catches shuffling despite --no-shuffle, or --seed without effect."""

    def losses(name, **more):
        finetune(folder, train_file, tmp_path / name, batch_size=1, max_steps=2, learning_rate=0, **more)
        return [line["loss"] for line in tiny.read_lines(tmp_path / name / "metrics.jsonl")]

    rows = encoded(folder, make_records())
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = [summed_loss(hf_model, [row]).item() / count_targets([row]) for row in rows[:2]]
    assert losses("file", shuffle=False) == pytest.approx(wanted, abs=1e-5)
    assert losses("seed0") != losses("seed1", seed=1)


def test_the_held_out_file_is_read_first(folder, tmp_path):
    """Catches a mistake in --eval_file that is found only after the training file was tokenised, which can take
    minutes."""
    broken = tiny.write_records(tmp_path / "train.jsonl", [{"prompt": "never reached"}])
    held_out = tiny.write_records(tmp_path / "eval.jsonl", [{"question": "why?"}])
    result = tiny.run(SCRIPT, *flags(folder, broken, tmp_path / "out", eval_file=held_out))
    assert result.code == 2 and f"error: {held_out}:1: " in result.stderr
