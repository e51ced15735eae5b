"""training/train_rm.py against a plain loop over transformers' LlamaForSequenceClassification, and its export in
transformers. Resumes, refusals: test_train_rm_runs.py; what it learns: test_rewards_learnt.py; ranks: test_parallel.py.

The reference tokenises with transformers, runs rows one by one without padding, and has its own formulas for losses.
"""

import json
import math
import shutil

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from models.checkpoint import load_model
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


# ------------------------------------------------------------------------------- the head, the export


def test_new_head(folder, files, tmp_path):
    """Catches a head of another scale than N(0, 1 / sqrt(E + 1)), one that is not a function of the seed, an export of
    --max_steps 0 without it or with other weights than the folder's, and an existing head that is replaced."""
    heads = {}
    for name, source, seed in (("a", folder, 1), ("b", folder, 1), ("c", folder, 2), ("d", tmp_path / "a", 5)):
        train(source, files["pairwise"], tmp_path / name, max_steps=0, seed=seed)
        weights = weights_of(tmp_path / name)
        heads[name] = weights.pop("score.weight")
        assert heads[name].shape == (1, 64) and heads[name].dtype == torch.float32
        assert all(torch.equal(w, weights_of(folder)[key]) for key, w in weights.items())
    assert torch.equal(heads["a"], heads["b"]) and torch.equal(heads["a"], heads["d"])
    assert not torch.equal(heads["a"], heads["c"])
    many = torch.cat([train_rm.initial_score(64, seed) for seed in range(200)])
    assert many.std().item() * math.sqrt(65) == pytest.approx(1, abs=0.02) and abs(many.mean()) < 0.005


def test_continues_a_reward_model(folder, files, tmp_path):
    """Catches a second stage that starts from a new head, or whose config.json describes the first."""
    train(folder, files["process"], tmp_path / "first", loss="process", max_steps=2, step_separator="\\n")
    result = train(
        tmp_path / "first", files["pointwise"], tmp_path / "out", loss="pointwise", max_steps=1, batch_size=11
    )
    assert "its own head, --loss" in result.stdout
    model = opened(tmp_path / "first").eval()
    with torch.no_grad():
        losses = torch.cat([r.losses(r.scores(model)) for r in judged(folder, "pointwise")])
    (line,) = tiny.read_lines(tmp_path / "out/metrics.jsonl")
    assert line["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    first, config = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("first", "out"))
    assert (first["reward_model_type"], first["step_separator"]) == ("process", "\n")
    assert config["reward_model_type"] == "pointwise" and "step_separator" not in config
    # a model from elsewhere, which pads with EOS
    shutil.copytree(tmp_path / "first", tmp_path / "other", ignore=shutil.ignore_patterns("checksums.json"))
    config = {name: value for name, value in first.items() if not name.startswith(("reward_", "step_"))}
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "pad_token_id": 2}))
    other = train(tmp_path / "other", files["pointwise"], tmp_path / "next", loss="pointwise", max_steps=1)
    assert "its own head (from a folder that pads with EOS" in other.stdout
    assert json.loads((tmp_path / "next/config.json").read_text())["pad_token_id"] == 0


def padded(rows, pad_token_id, side):
    length = max(map(len, rows))
    fill = [[pad_token_id] * (length - len(row)) for row in rows]
    ids = [row + pads if side == "right" else pads + row for row, pads in zip(rows, fill)]
    mask = [[1] * len(r) + [0] * len(p) if side == "right" else [0] * len(p) + [1] * len(r) for r, p in zip(rows, fill)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss", train_rm.FIELDS)
def test_export_in_transformers(loss, tied, files, tmp_path, monkeypatch):
    """Catches an export that transformers opens with warnings or with two outputs, or whose last token it does not find
    in a padded batch; other scores than those of the model in memory; and a reward_mean or reward_std of other rows
    than the evaluation's."""
    family = "Llama" if not tied else "Qwen2" if loss == "pairwise" else "Qwen3"
    config = {"Llama": {}, "Qwen2": tiny.QWEN2, "Qwen3": tiny.QWEN3}[family]
    tiny.write_model(tmp_path / "in", seed=4, tie_word_embeddings=tied, problem_type="regression", **config)
    rewards, real = [], train_rm.all_rewards
    monkeypatch.setattr(train_rm, "all_rewards", lambda *args: rewards.append(real(*args)) or rewards[-1])
    eval_file = tiny.write_records(tmp_path / "eval.jsonl", make_records(loss, 7))
    out, more = tmp_path / "out", {"loss": loss, "batch_size": 4, "micro_batch_size": 3}
    train(tmp_path / "in", files[loss], out, eval_file=eval_file, **more)
    assert len(rewards) == 1  # the export uses the last evaluation's
    ours, records = rewards[0], judged(out, loss, 7)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert (model.config.num_labels, model.config.id2label, model.config.problem_type) == (1, {0: "LABEL_0"}, None)
    with torch.no_grad():
        one_by_one = torch.cat([record.scores(model.eval()) for record in records])
        torch.testing.assert_close(ours, one_by_one, rtol=0, atol=1e-5)
        if loss != "process":
            rows = [row for record in records for row in record.rows]
            for side in ("right", "left"):
                logits = model(**padded(rows, model.config.pad_token_id, side)).logits
                torch.testing.assert_close(ours[:, None], logits, rtol=0, atol=1e-4)
        else:  # as in the README
            batch = padded([record.rows[0] for record in records], model.config.pad_token_id, "right")
            scores = model.score(model.model(**batch).last_hidden_state)[..., 0]
            found = [scores[i, record.positions[0]] for i, record in enumerate(records)]
            torch.testing.assert_close(ours, torch.cat(found), rtol=0, atol=1e-4)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [f"{family}ForSequenceClassification"] and config["reward_model_type"] == loss
    assert config["reward_mean"] == pytest.approx(ours.mean().item(), abs=1e-6)
    assert config["reward_std"] == pytest.approx(ours.std(correction=0).item(), abs=1e-6)
    assert config.get("step_separator") == ("\n" if loss == "process" else None)
    assert config["reward_position"] == "last_token" + "_of_step_and_separator" * (loss == "process")
    before = json.loads((tmp_path / "in/config.json").read_text())
    changed = {"architectures", "problem_type", "pad_token_id"}
    assert {k: v for k, v in before.items() if k not in changed} == {k: config[k] for k in before.keys() - changed}


def write_pad_tokenizer(folder, kind):
    """Writes a tokenizer that pads with EOS in all its files: sentencepiece, or byte-level with a reserved token (and a
    chat template), or with tokens of text only. Returns the token that should become the pad token."""
    if kind == "sentencepiece":
        tiny.write_tokenizer(folder, pad_token="</s>")
        eos, wanted = "</s>", "<unk>"
    else:
        special = ["<|bos|>", "<|eos|>"] + ["<|im_end|>", "<|reserved_7|>", "<|user|>"] * (kind == "reserved")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(["Question the answer is and so or more!! it seems"] * 8, trainer)
        wanted = next(t for t, i in sorted(backend.get_vocab().items(), key=lambda x: -x[1]) if t.startswith("Ġ"))
        backend.add_special_tokens(special)
        backend.enable_padding(pad_id=backend.token_to_id("<|eos|>"), pad_token="<|eos|>")
        names = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[1]}
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        fast.chat_template = "{{ messages }}<|im_end|>" if kind == "reserved" else None
        fast.save_pretrained(folder)
        eos, wanted = "<|eos|>", "<|reserved_7|>" if kind == "reserved" else wanted
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": eos}, "eos_token": eos}))
    eos_id = transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text()) | {"eos_token_id": eos_id, "pad_token_id": eos_id}
        (folder / name).write_text(json.dumps(content))
    return wanted


@pytest.mark.parametrize("kind", ["sentencepiece", "reserved", "plain"])
def test_one_pad_token(kind, tmp_path):
    """Catches scores that other pipelines read past the end of a row, because config.json and the tokenizer name
    different pad tokens or both name EOS; and a pad token that changes the ids of texts."""
    tiny.write_model(tmp_path / "in", seed=4)
    wanted = write_pad_tokenizer(tmp_path / "in", kind)
    records = make_records("pairwise", 7)
    for i, record in enumerate(records):
        record["chosen"] += "!" * i
    data, out = tiny.write_records(tmp_path / "data.jsonl", records), tmp_path / "out"
    train(tmp_path / "in", data, out, batch_size=4, max_steps=1)
    before, tokenizer = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "in", out))
    model, pad_id = opened(out).eval(), tokenizer.pad_token_id
    assert tokenizer.pad_token == wanted and pad_id not in (tokenizer.eos_token_id, None)
    assert model.config.pad_token_id == transformers.GenerationConfig.from_pretrained(out).pad_token_id == pad_id
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((out / name).read_text(encoding="utf-8"))["pad_token"] == wanted
    if kind != "sentencepiece":
        padding = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["padding"]
        assert (padding["pad_token"], padding["pad_id"]) == (wanted, pad_id)
    texts = [r["prompt"] + r[side] + tokenizer.eos_token for r in records for side in ("chosen", "rejected")]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    assert rows == [before(text)["input_ids"] for text in texts]
    assert kind == "plain" or not any(pad_id in row for row in rows)
    ours = tiny.run(
        "inference/score.py", "--checkpoint_path", out, "--data_file", data, "--output_file", tmp_path / "s"
    )
    assert ours.code == 0, ours.stderr
    names = ("chosen_reward", "rejected_reward")
    scores = torch.tensor([line[key] for line in tiny.read_lines(tmp_path / "s") for key in names])
    batches = [tokenizer(texts, padding=True, padding_side=side, return_tensors="pt") for side in ("right", "left")]
    batches.append(padded(rows, tokenizer.pad_token_id, "right"))  # as TRL's RewardTrainer collates
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(model(**batch).logits[:, 0], scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("most", "copies"), [(4, 1), (2048, 187)])
def test_statistics_of_the_training_set(most, copies, folder, files, tmp_path, monkeypatch):
    """Catches reward_mean and reward_std missing if there is no evaluation, and those of a large file's first records,
    of all, or of another number than the README's 2,048; with most = 4, a step's random records (those of the first
    step) are enough. To save time, the first 40 of them are scored."""
    if copies == 1:
        monkeypatch.setattr(train_rm, "MOST_STATISTICS", most)
    counts, real = [], train_rm.all_rewards
    of_some = lambda model, rows, split: (counts.append(len(rows)), real(model, rows[:40], split))[1]  # noqa: E731
    monkeypatch.setattr(train_rm, "all_rewards", of_some)
    (tmp_path / "data").write_bytes(files["pairwise"].read_bytes() * copies)
    train(folder, tmp_path / "data", tmp_path / "out", batch_size=4, max_steps=2)
    model, records = opened(tmp_path / "out").eval(), judged(folder, "pairwise")
    _, chosen = next(training_batches(11 * copies, most, seed=0, shuffle=True, first_step=1, last_step=1))
    assert counts == [most] and chosen != sorted(chosen)
    with torch.no_grad():
        scores = torch.cat([records[i % 11].scores(model) for i in chosen[:40]])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["reward_mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert config["reward_std"] == pytest.approx(scores.std(correction=0).item(), abs=1e-5)


def test_bfloat16(folder, files, reference, tmp_path, monkeypatch):
    """Catches a head that is kept, computed, stored or read in bf16 beside bf16 weights, and losses far from fp32's."""
    history = reference("pairwise")[1]
    trained, load = [], train_rm.load_for_training
    monkeypatch.setattr(train_rm, "load_for_training", lambda *a, **k: trained.append(load(*a, **k)) or trained[0])
    more = {"batch_size": 4, "weight_decay": 0.1, "seed": 7, "center_coef": CENTER}
    more |= {"export_dtype": "bfloat16", "export_steps": 2}
    train(folder, files["pairwise"], tmp_path / "out", dtype="bfloat16", param_dtype="bfloat16", **more)
    dtypes = {name: parameter.dtype for name, parameter in trained[0].named_parameters()}
    assert dtypes.pop("score.weight") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}
    hidden = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    assert trained[0].score(hidden).dtype == torch.float32
    for line, (loss, _, _) in zip(tiny.read_lines(tmp_path / "out/metrics.jsonl"), history):
        assert line["loss"] == pytest.approx(loss, rel=0.01 if line["step"] == 1 else 0.1) and line["loss"] != loss
    head = trained[0].score.weight.full_tensor()
    assert (head.bfloat16() != head).any() and torch.equal(opened(tmp_path / "out").score.weight, head)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16" and weights_of(tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16
    inferred = load_model(tmp_path / "out", param_dtype=torch.bfloat16, head="score")
    assert torch.equal(inferred.score.weight, head) and inferred.norm.weight.dtype == torch.bfloat16
    of_step = json.loads((tmp_path / "out/step-000002/config.json").read_text())
    assert of_step.keys() == config.keys() and of_step["reward_mean"] != config["reward_mean"]
    assert opened(tmp_path / "out/step-000002").num_labels == 1


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
