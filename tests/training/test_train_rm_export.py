"""training/train_rm.py: a reward model's head, its export in transformers, and the statistics in its config.json."""

import json
import math
import shutil

import pytest
import tokenizers
import torch
import transformers

from models.checkpoint import load_model
from tests import tiny
from tests.training.test_train_rm import (  # noqa: F401 (fixtures)
    CENTER,
    files,
    judged,
    make_records,
    opened,
    reference,
    train,
    weights_of,
)
from training import train_rm
from training.data import training_batches


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
