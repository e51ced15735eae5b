"""training/train_rm.py on tasks whose truth is known: the rewards of all 121 answers to a prompt, from pairs and from
labels, and which steps of a count are right. transformers computes the scores from the exported folder."""

import itertools
import math
import random

import pytest
import torch
import transformers

from tests import tiny

SCRIPT = "training/train_rm.py"
PROMPT = "is"
LETTERS = "bcdfghjklmn"
ANSWERS = [a + b for a, b in itertools.product(LETTERS, repeat=2)]


def train(folder, train_file, out, loss, *more):
    flags = ["--checkpoint_path", folder, "--train_file", train_file, "--output_dir", out, "--loss", loss]
    result = tiny.run(SCRIPT, *flags, "--batch_size", 64, "--learning_rate", 3e-3, *more)
    assert result.code == 0, result.stderr
    return tiny.read_lines(out / "metrics.jsonl")[-1]


@pytest.fixture(scope="module")
def task():
    """Returns (reference probabilities, true rewards) of ANSWERS, in one order."""
    rng = random.Random(0)
    logits = [rng.gauss(0, 1) for _ in ANSWERS]
    total = sum(map(math.exp, logits))
    return [math.exp(logit) / total for logit in logits], [rng.gauss(0, 1.5) for _ in ANSWERS]


def correlation(probs, x, y):
    """Returns Pearson's correlation, weighted by probs."""
    probs, x, y = (torch.tensor(v, dtype=torch.float64) for v in (probs, x, y))
    x, y = x - (probs * x).sum(), y - (probs * y).sum()
    return ((probs * x * y).sum() / ((probs * x * x).sum() * (probs * y * y).sum()).sqrt()).item()


def learnt_rewards(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [tokenizer(PROMPT + " " + answer)["input_ids"] + [tokenizer.eos_token_id] for answer in ANSWERS]
    length = max(map(len, rows))
    ids = torch.tensor([row + [model.config.pad_token_id] * (length - len(row)) for row in rows])
    with torch.no_grad():
        return model(ids).logits[:, 0].tolist()


def test_pairwise(folder, task, tmp_path):
    """Catches a reward of the wrong sign, at another position or of half the answer, a loss that is not
    Bradley-Terry's, and a head or a network that does not learn."""
    probs, truth = task
    rng, records = random.Random(1), []
    while len(records) < 4000:
        a, b = rng.choices(range(len(ANSWERS)), probs, k=2)
        if a != b:
            a, b = (a, b) if rng.random() < 1 / (1 + math.exp(truth[b] - truth[a])) else (b, a)
            records.append({"prompt": PROMPT, "chosen": " " + ANSWERS[a], "rejected": " " + ANSWERS[b]})
    train_file = tiny.write_records(tmp_path / "pairs.jsonl", records)
    train(folder, train_file, tmp_path / "out", "pairwise", "--num_epochs", 2)
    assert correlation(probs, learnt_rewards(tmp_path / "out"), truth) >= 0.9


def test_pointwise(folder, task, tmp_path):
    """Catches the same mistakes for labels, which are the true probabilities: a label that is thresholded, or not
    compared with the sigmoid of the score."""
    probs, truth = task
    rng, records = random.Random(1), []
    for i in rng.choices(range(len(ANSWERS)), probs, k=8000):
        label = 1 / (1 + math.exp(-truth[i]))
        records.append({"prompt": PROMPT, "completion": " " + ANSWERS[i], "label": label})
    train_file = tiny.write_records(tmp_path / "labels.jsonl", records)
    train(folder, train_file, tmp_path / "out", "pointwise", "--num_epochs", 2)
    rewards = learnt_rewards(tmp_path / "out")
    assert correlation(probs, rewards, truth) >= 0.9
    assert sum(p * abs(a - b) for p, a, b in zip(probs, rewards, truth)) < 0.1


def counts(number, seed):
    """Returns counts by one, modulo 10; a step is right, or with equal chance another digit, which the next
    continues."""
    rng, records = random.Random(seed), []
    for _ in range(number):
        last = first = rng.randrange(10)
        steps, labels = [], []
        for _ in range(5):
            right = (last + 1) % 10
            last = right if rng.random() < 0.5 else rng.choice([digit for digit in range(10) if digit != right])
            steps.append(str(last))
            labels.append(int(last == right))
        records.append({"prompt": f"{first}\n", "completions": steps, "labels": labels})
    return records


def test_process(folder, tmp_path):
    """Catches scores that sit on other tokens than the ends of their steps, or that ignore the step."""
    train_file = tiny.write_records(tmp_path / "steps.jsonl", counts(4000, 0))
    eval_file = tiny.write_records(tmp_path / "heldout.jsonl", counts(300, 1))
    line = train(folder, train_file, tmp_path / "out", "process", "--eval_file", eval_file)
    assert line["eval_auc"] >= 0.95
