"""training/train_rm.py against a plain loop over transformers' LlamaForSequenceClassification. The head and the export:
test_train_rm_export.py; resumes, refusals: test_train_rm_runs.py; what it learns: test_rewards_learnt.py; ranks:
test_parallel.py.

The reference tokenises with transformers, runs rows one by one without padding, and has its own formulas for losses.
"""

import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests import tiny
from training import train_rm
from training.data import training_batches

SCRIPT = "training/train_rm.py"
CENTER = 0.1
FIXED = {"loss", "learning_rate", "grad_norm", "mean_reward", "min_reward", "max_reward"}
COUNTED = {"step", "num_tokens", "tokens_per_second"}


def make_records(loss, count=11):
    """Returns ragged records, with margins, soft labels and one to three steps."""
    records = []
    for i in range(count):
        prompt = f"Question {i}:" + " and so" * (i % 4)
        right, wrong = f" the answer is {i + 3}" + " or more" * (i % 3), f" it is {i}" + " so it seems" * (i % 5 == 2)
        if loss == "pairwise":
            records.append({"prompt": prompt, "chosen": right, "rejected": wrong, "margin": 0.5 * (i % 3)})
        elif loss == "pointwise":
            records.append({"prompt": prompt, "completion": [right, wrong][i % 2], "label": [1, 0, 0.7, True][i % 4]})
        else:
            steps = [right.strip(), wrong.strip(), f"{i} plus {i}"][: 1 + i % 3]
            records.append({"prompt": prompt + "\n", "completions": steps, "labels": [1, 0, 0.25][: len(steps)]})
    return records


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {loss: tiny.write_records(root / f"{loss}.jsonl", make_records(loss)) for loss in train_rm.FIELDS}


def flags(checkpoint_path, train_file, output_dir, **more):
    given = {"learning_rate": 1e-3, "adam_eps": 1e-4, "lr_schedule": "constant", "warmup_ratio": 0, "device": "cpu"}
    given |= {"save_steps": 0}
    given |= {"checkpoint_path": checkpoint_path, "train_file": train_file, "output_dir": output_dir, **more}
    return [part for name, value in given.items() for part in ([f"--{name}"] + [str(value)] * (value is not True))]


def train(*args, **more):
    result = tiny.run(SCRIPT, *flags(*args, **more))
    assert result.code == 0, result.stderr
    return result


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def opened(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


# ---------------------------------------------------------------------- against transformers' model


class Judged:
    """A record of the reference run: its token ids, the positions of its scores, and the loss of these scores."""

    def __init__(self, record, tokenizer):
        def ids(text):
            return tokenizer(text)["input_ids"]

        eos = [tokenizer.eos_token_id]
        self.labels, self.margin = None, record.get("margin", 0.0)
        if "chosen" in record:
            self.rows = [ids(record["prompt"] + record[side]) + eos for side in ("chosen", "rejected")]
            self.positions = [[len(row) - 1] for row in self.rows]
        elif "completion" in record:
            self.rows = [ids(record["prompt"] + record["completion"]) + eos]
            self.positions, self.labels = [[len(self.rows[0]) - 1]], [float(record["label"])]
        else:
            texts = [
                record["prompt"] + "".join(step + "\n" for step in record["completions"][:k])
                for k in range(1, 1 + len(record["completions"]))
            ]
            self.rows, self.positions = [ids(texts[-1])], [[len(ids(text)) - 1 for text in texts]]
            self.labels = list(map(float, record["labels"]))

    def scores(self, model):
        found = []
        for row, positions in zip(self.rows, self.positions):
            hidden = model.model(torch.tensor([row])).last_hidden_state
            found.append(model.score(hidden)[0, positions, 0])
        return torch.cat(found)

    def losses(self, scores):
        if self.labels is None:
            chosen, rejected = scores
            ranking = torch.log1p(torch.exp(-(chosen - rejected - self.margin)))
            return (ranking + CENTER * (chosen + rejected) ** 2)[None]
        p, labels = torch.sigmoid(scores), torch.tensor(self.labels)
        return -(labels * p.log() + (1 - labels) * (1 - p).log())


def judged(folder, loss, count=11):
    tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)  # AutoTokenizer takes Qwen's for qwen2
    return [Judged(record, tokenizer) for record in make_records(loss, count)]


def reference_run(folder, records, batches, weight_decay):
    """Trains in plain PyTorch; returns (model, [(loss, grad_norm, scores)])."""
    model = opened(folder).train()
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4, lr=1e-3, foreach=False)
    history = []
    for numbers in batches:
        scores = [records[i].scores(model) for i in numbers]
        losses = torch.cat([records[i].losses(s) for i, s in zip(numbers, scores)])
        losses.mean().backward()
        norm = torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, 1 / (norm.item() + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        history.append((losses.mean().item(), norm.item(), torch.cat(scores).detach()))
    return model.eval(), history


@pytest.fixture(scope="module")
def reference(folder, files, tmp_path_factory):
    """Returns a function: loss -> 3 reference steps over 11 records from the head that --max_steps 0 exports."""
    made = {}

    def make(loss):
        if loss not in made:
            start = tmp_path_factory.mktemp("start") / loss
            train(folder, files[loss], start, loss=loss, max_steps=0, seed=7)
            order = training_batches(11, 4, seed=7, shuffle=True, first_step=1, last_step=3)
            made[loss] = reference_run(start, judged(folder, loss), [numbers for _, numbers in order], 0.1)
        return made[loss]

    return make


def assert_equals_reference(out, loss, reference):
    model, history = reference(loss)
    lines = tiny.read_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line, (mean_loss, norm, scores) in zip(lines, history, strict=True):
        assert line["loss"] == pytest.approx(mean_loss, abs=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        wanted = {"mean_reward": scores.mean(), "min_reward": scores.min(), "max_reward": scores.max()}
        if loss == "pairwise":
            margins = scores[0::2] - scores[1::2]
            wanted |= {"margin": margins.mean(), "accuracy": (margins > 0).float().mean()}
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value.item(), abs=2e-5), name
    ours, theirs = weights_of(out), dict(model.named_parameters())
    assert ours.keys() == theirs.keys() and "score.weight" in ours and "lm_head.weight" not in ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "size",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 2},
        {"micro_batch_size": 4},
        {"max_tokens_per_micro_batch": 60},
    ],
    ids=str,
)
@pytest.mark.parametrize("loss", train_rm.FIELDS)
def test_steps_equal_transformers(loss, size, folder, files, reference, tmp_path):
    """Catches a score that is not the last token's (of the answer, of each step), or of a text without EOS; chosen and
    rejected swapped; a margin, a soft label or the centring lost; means of micro-batches or of rows instead of the mean
    over pairs or steps; packed rows that attend to each other; and a head that is not trained, or starts elsewhere than
    the exported one."""
    more = {"batch_size": 4, "weight_decay": 0.1, "seed": 7, **size}
    more |= {"center_coef": CENTER} if loss == "pairwise" else {}
    train(folder, files[loss], tmp_path / "out", loss=loss, **more)
    assert_equals_reference(tmp_path / "out", loss, reference)


FAULTS = {  # name: the fault, in (rows, positions of their scores) or in the margins
    "score at the first pad": lambda rows, places: (rows, [(i, min(p + 1, longest(rows))) for i, p in places]),
    "score before EOS": lambda rows, places: (rows, [(i, p - 1) for i, p in places]),
    "sides swapped": lambda rows, places: (rows, [places[i ^ 1] for i in range(len(places))]),
    "margin lost": lambda margins: 0 * margins,
}


def longest(rows):
    return max(len(row.input_ids) for row in rows) - 1


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(fault, folder, files, reference, tmp_path, monkeypatch):
    """Catches a comparison too weak to see the mistakes it is made for."""
    name = "targets_of" if fault == "margin lost" else "rows_to_score"
    real, change = getattr(train_rm, name), FAULTS[fault]
    faulty = lambda *args: change(real(*args)) if name == "targets_of" else change(*real(*args))  # noqa: E731
    monkeypatch.setattr(train_rm, name, faulty)
    more = {"batch_size": 4, "micro_batch_size": 4, "weight_decay": 0.1, "seed": 7, "center_coef": CENTER}
    train(folder, files["pairwise"], tmp_path / "out", **more)
    with pytest.raises(AssertionError):
        assert_equals_reference(tmp_path / "out", "pairwise", reference)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation(recompute, folder, files, reference, tmp_path):
    """Catches recomputation that changes the gradient."""
    more = {"batch_size": 4, "weight_decay": 0.1, "seed": 7, "activation_checkpointing": recompute}
    train(folder, files["process"], tmp_path / "out", loss="process", **more)
    assert_equals_reference(tmp_path / "out", "process", reference)


# ------------------------------------------------------------------------------- metrics and evaluation


def calibration(probabilities, truths):
    """Returns the expected calibration error in ten bins, by its definition."""
    total = 0.0
    for k in range(10):
        inside = [(p, t) for p, t in zip(probabilities, truths) if k / 10 <= p < (k + 1) / 10]
        total += abs(sum(p for p, _ in inside) - sum(t for _, t in inside))
    return total / len(probabilities)


@pytest.mark.parametrize("loss", train_rm.FIELDS)
def test_metrics_and_evaluation(loss, folder, files, tmp_path):
    """Catches an evaluation that is a mean of means, of rewards before the step, or with chosen and rejected swapped;
    keys that dashboards know renamed; and samples that are missing or show another reward."""
    eval_file = tiny.write_records(tmp_path / "eval.jsonl", make_records(loss, 7))
    more = {"eval_file": eval_file, "eval_steps": 2, "max_steps": 5, "batch_size": 4, "micro_batch_size": 3}
    more |= {"center_coef": CENTER} if loss == "pairwise" else {}
    result = train(folder, files[loss], tmp_path / "out", loss=loss, **more)
    lines = tiny.read_lines(tmp_path / "out/metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 5]
    own = {"pairwise": {"accuracy", "margin"}, "pointwise": {"accuracy"}, "process": {"step_accuracy"}}[loss]
    judging = own | {"mean_reward", "min_reward", "max_reward"}
    evaluating = judging | {"loss", "calibration_error"} | ({"auc"} if loss != "pairwise" else set())
    for line in lines:
        wanted = {f"eval_{name}" for name in evaluating} if "eval_loss" in line else set()
        assert line.keys() == FIXED | COUNTED | judging | wanted
    records, model = judged(folder, loss, 7), opened(tmp_path / "out").eval()
    with torch.no_grad():
        scores = [record.scores(model) for record in records]
        wanted = {"loss": torch.cat([r.losses(s) for r, s in zip(records, scores)]).mean().item()}
    flat = torch.cat(scores).tolist()
    wanted |= {"mean_reward": sum(flat) / len(flat), "min_reward": min(flat), "max_reward": max(flat)}
    if loss == "pairwise":
        margins = [c - r for c, r in zip(flat[0::2], flat[1::2])]
        sure = [1 / (1 + math.exp(-abs(m))) for m in margins]
        wanted |= {"accuracy": sum(m > 0 for m in margins) / 7, "margin": sum(margins) / 7}
        wanted["calibration_error"] = calibration(sure, [float(m > 0) for m in margins])
    else:
        labels = [label for record in records for label in record.labels]
        agree = [(s >= 0) == (label >= 0.5) for s, label in zip(flat, labels)]
        wanted["accuracy" if loss == "pointwise" else "step_accuracy"] = sum(agree) / len(agree)
        wanted["calibration_error"] = calibration([1 / (1 + math.exp(-s)) for s in flat], labels)
        pairs = [(a, b) for a, x in zip(flat, labels) for b, y in zip(flat, labels) if x >= 0.5 > y]
        wanted["auc"] = sum(a > b for a, b in pairs) / len(pairs)
    for name, value in wanted.items():
        assert lines[-1][f"eval_{name}"] == pytest.approx(value, abs=1e-4), name
    tokens = [sum(map(len, record.rows)) for record in judged(folder, loss)]
    order = [numbers for _, numbers in training_batches(11, 4, seed=0, shuffle=True, first_step=1, last_step=5)]
    assert lines[-1]["num_tokens"] == sum(tokens[i] for numbers in order for i in numbers)
    for text in ("Question 0:", "the answer is 3", f"{flat[0]:+.3f}"):
        assert text in result.stdout.split("step 5:")[1], text
