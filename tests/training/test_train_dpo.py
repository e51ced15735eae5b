"""training/train_dpo.py against a plain computation over transformers' model, and its reference. Kills, resumes and bad
input: test_train_dpo_runs.py; what it learns: test_dpo_learns.py; ranks: test_parallel_dpo.py.

The plain computation runs rows one by one without padding, and has its own formulas for the losses.
"""

import math
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from models.records import Example, Record
from models.reward import encode_pair_record
from models.tokenizer import Tokenizer
from tests import tiny
from tests.training.test_finetune_sft import _flag, assert_same_weights, weights_of
from training import train_dpo
from training.data import training_batches

SCRIPT = "training/train_dpo.py"
BETA = 0.3
RECORDS = [
    {
        "prompt": f"Question {i}:" + " and so" * (i % 4),
        "chosen": f" the answer is {i + 3}" + " or more" * (i % 3),
        "rejected": f" it seems {i}" + " so" * (i * 5 % 7),
    }
    for i in range(10)
]
RECORDS[2]["rejected"] = ""  # an EOS alone
RECORDS[5]["chosen"] = " the question" * 20  # truncated to --max_seq_len 40, so without EOS
RECORDS[6]["chosen"] = RECORDS[6]["rejected"]
MEANS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
KEYS = {"step", "loss", *MEANS, "learning_rate", "grad_norm", "num_tokens", "tokens_per_second"}


@pytest.fixture(scope="module")
def train_file(tmp_path_factory):
    return tiny.write_records(tmp_path_factory.mktemp("data") / "train.jsonl", RECORDS)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """A reference that is not the policy."""
    path = tmp_path_factory.mktemp("reference") / "other"
    tiny.write_model(path, seed=7)
    return path


def flags(checkpoint_path, train_file, output_dir, **more):
    given = {"max_seq_len": 40, "overlong": "truncate", "learning_rate": 1e-3, "adam_eps": 1e-4, "device": "cpu"}
    given |= {"num_eval_samples": 0, "save_steps": 0, "beta": BETA, "lr_schedule": "constant"}
    given |= {"checkpoint_path": checkpoint_path, "train_file": train_file, "output_dir": output_dir, **more}
    return [part for name, value in given.items() for part in _flag(name, value)]


def train(*args, **more):
    result = tiny.run(SCRIPT, *flags(*args, **more))
    assert result.code == 0, result.stderr
    return result


def metrics_of(out):
    return tiny.read_lines(out / "metrics.jsonl")


# ---------------------------------------------------------------------- against transformers' model


def encoded(folder, records, max_seq_len=40):
    """Returns ((ids, prompt length) of chosen, of rejected) of each record; test_preferences.py checks the ids."""
    tokenizer = Tokenizer(folder)
    pairs = [encode_pair_record(Record(str(i), fields), tokenizer)[0] for i, fields in enumerate(records)]
    return [
        tuple((side.input_ids[:max_seq_len], pair.prompt_length) for side in (pair.chosen, pair.rejected))
        for pair in pairs
    ]


def completion_logp(model, ids, prompt_length):
    logps = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
    return sum(logps[t - 1, ids[t]] for t in range(prompt_length, len(ids)))


def pair_of(model, sides):
    return [completion_logp(model, *side) for side in sides]


def plain_loss(kind, policy, reference, lengths):
    """Returns the loss of one pair as in the papers; log-probs are (chosen, rejected) of policy and reference."""
    (c, r), (ref_c, ref_r), (len_c, len_r) = policy, reference, lengths
    x = BETA * ((c - ref_c) - (r - ref_r))
    nll, nll_wrong = torch.log1p(torch.exp(-x)), torch.log1p(torch.exp(x))
    return {
        "sigmoid": lambda: nll,
        "cdpo": lambda: 0.9 * nll + 0.1 * nll_wrong,
        "robust": lambda: (0.9 * nll - 0.1 * nll_wrong) / 0.8,
        "hinge": lambda: (1 - x).clamp(min=0),
        "ipo": lambda: (x / BETA - 1 / (2 * BETA)) ** 2,
        "ipo_avg": lambda: ((c - ref_c) / len_c - (r - ref_r) / len_r - 1 / (2 * BETA)) ** 2,
        "simpo": lambda: torch.log1p(torch.exp(-(BETA * (c / len_c - r / len_r) - 0.4))),
        "rpo": lambda: nll - 0.7 * c / len_c,
    }[kind]()


LOSS_FLAGS = {
    "cdpo": {"loss": "sigmoid", "label_smoothing": 0.1},
    "robust": {"loss": "robust", "label_smoothing": 0.1},
    "simpo": {"loss": "simpo", "simpo_gamma": 0.4},
    "rpo": {"loss": "rpo", "rpo_alpha": 0.7},
}


def loss_flags(kind, other_folder):
    reference = {} if kind == "simpo" else {"ref_checkpoint_path": other_folder}
    return LOSS_FLAGS.get(kind, {"loss": kind}) | reference


@pytest.fixture(scope="module")
def plain_step(folder, other_folder):
    """Returns a function: loss -> (metrics, gradients, weights) of the first step over all pairs, computed plainly."""
    made = {}

    def make(kind):
        if kind in made:
            return made[kind]
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        reference = transformers.AutoModelForCausalLM.from_pretrained(other_folder, dtype=torch.float32).eval()
        losses, rewards, logps = [], [], []
        for sides in encoded(folder, RECORDS):
            policy, lengths = pair_of(model, sides), [len(ids) - prompt_length for ids, prompt_length in sides]
            with torch.no_grad():
                ref = pair_of(reference, sides)
            losses.append(plain_loss(kind, policy, ref, lengths))
            ratios = [lp / n if kind == "simpo" else lp - r for lp, r, n in zip(policy, ref, lengths)]
            rewards.append([BETA * ratio.item() for ratio in ratios])
            logps.append([lp.item() for lp in policy])
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad *= min(1.0, 1 / norm.item())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
        optimizer.step()
        (chosen, rejected), (lp_chosen, lp_rejected) = (torch.tensor(x).double().T for x in (rewards, logps))
        margins = chosen - rejected
        means = [x.mean().item() for x in (chosen, rejected, (margins > 0).double(), margins, lp_chosen, lp_rejected)]
        metrics = {"loss": loss.item(), "grad_norm": norm.item(), **dict(zip(MEANS, means))}
        made[kind] = metrics, gradients, {name: p.detach() for name, p in model.named_parameters()}
        return made[kind]

    return make


def assert_equals_plain(out, gradients, wanted):
    """Checks the run's only step. Losses are O(1) and log-probs O(100), in fp32."""
    metrics, wanted_gradients, weights = wanted
    (line,) = metrics_of(out)
    assert line.keys() == KEYS
    for name, value in metrics.items():
        assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    (ours,) = gradients
    assert ours.keys() == {name.removeprefix("model.") for name in wanted_gradients}
    for name, gradient in wanted_gradients.items():
        error = (ours[name.removeprefix("model.")] - gradient).norm()
        assert error < 1e-5 * metrics["grad_norm"], (name, error)
    exported = weights_of(out)
    for name, weight in weights.items():
        torch.testing.assert_close(exported[name], weight, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def recorded_gradients(monkeypatch):
    """Records the gradients of each step, before clipping."""
    steps, clip = [], train_dpo.clip_grad_norm

    def recording_clip(model, max_norm, scale):
        steps.append({name: scale * p.grad.full_tensor() for name, p in model.named_parameters()})
        return clip(model, max_norm, scale)

    monkeypatch.setattr(train_dpo, "clip_grad_norm", recording_clip)
    return steps


ONE_STEP = {"batch_size": 10, "max_grad_norm": 1.0}
KINDS = ["sigmoid", "cdpo", "robust", "hinge", "ipo", "ipo_avg", "simpo", "rpo"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_step(kind, plain_step, folder, other_folder, train_file, tmp_path, recorded_gradients):
    """Catches a loss, a gradient or a metric that is not that of the papers and TRL; a flag of the loss that is not
    passed on; padding that is attended to or counted; a reference that is trained or is not the one given."""
    train(folder, train_file, tmp_path / "out", **ONE_STEP, micro_batch_size=4, **loss_flags(kind, other_folder))
    assert_equals_plain(tmp_path / "out", recorded_gradients, plain_step(kind))


@pytest.mark.parametrize("kind", ["sigmoid", "rpo"])
@pytest.mark.parametrize(
    "more",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 3, "precompute_ref": False},
        {"micro_batch_size": 10},
        {"max_tokens_per_micro_batch": 60},
    ],
    ids=str,
)
def test_micro_batches(kind, more, plain_step, folder, other_folder, train_file, tmp_path, recorded_gradients):
    """Catches a mean of micro-batches instead of the mean over pairs, a reference's log-prob assigned to another pair,
    packed sides that attend to each other, and a reference in each step that differs from the precomputed one."""
    more = {**more, **loss_flags(kind, other_folder)}
    train(folder, train_file, tmp_path / "out", **ONE_STEP, **more)
    assert_equals_plain(tmp_path / "out", recorded_gradients, plain_step(kind))


def faulty_rows(change):
    real = train_dpo.pair_rows
    return lambda pairs: change(real(pairs))


def with_labels(labels_of):
    return lambda rows: [Example(row.input_ids, labels_of(row)) for row in rows]


FAULTS = {
    "EOS dropped": with_labels(lambda row: [*row.labels[:-1], -100]),
    "labels shifted": with_labels(lambda row: [*row.labels[1:], -100]),
    "sides swapped": lambda rows: rows[len(rows) // 2 :] + rows[: len(rows) // 2],
    "prompt summed": with_labels(lambda row: row.input_ids),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(
    fault, plain_step, folder, other_folder, train_file, tmp_path, recorded_gradients, monkeypatch
):
    """Catches a comparison too weak to see the mistakes it is made for."""
    monkeypatch.setattr(train_dpo, "pair_rows", faulty_rows(FAULTS[fault]))
    train(folder, train_file, tmp_path / "out", **ONE_STEP, **loss_flags("sigmoid", other_folder))
    with pytest.raises(AssertionError):
        assert_equals_plain(tmp_path / "out", recorded_gradients, plain_step("sigmoid"))


# --------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("dtype, param_dtype", [("float32", "float32"), ("bfloat16", "float32"), (None, "bfloat16")])
@pytest.mark.parametrize("how", ["precomputed", "in each step", "precomputed from a copy"])
def test_first_loss_is_ln_2(how, dtype, param_dtype, train_file, tmp_path):
    """Catches a reference rounded differently from the policy, log-probs of other batches or another padding than in
    training (in bf16 they differ by tenths of a nat), and a policy that is not its own reference at the start."""
    tiny.write_model(tmp_path / "in", hidden_size=128)
    more = {"precompute_ref": how != "in each step", "param_dtype": param_dtype} | ({"dtype": dtype} if dtype else {})
    if how == "precomputed from a copy":
        more["ref_checkpoint_path"] = shutil.copytree(tmp_path / "in", tmp_path / "copy")
    train(tmp_path / "in", train_file, tmp_path / "out", batch_size=4, micro_batch_size=3, **more)
    first, second = metrics_of(tmp_path / "out")[:2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margins"] == 0
    assert abs(second["rewards/margins"]) > 1e-4


def test_both_ways_agree_over_epochs(folder, other_folder, train_file, tmp_path):
    """Catches log-probs of the reference in the first epoch's order, or a reference that changes with the policy."""
    more = {"batch_size": 4, "micro_batch_size": 3, "num_epochs": 2, "eval_file": train_file, "eval_steps": 4}
    for name, reference in (("own", {}), ("other", {"ref_checkpoint_path": other_folder})):
        outs = tmp_path / f"{name}-before", tmp_path / f"{name}-step"
        for out, before in zip(outs, (True, False)):
            train(folder, train_file, out, precompute_ref=before, **more, **reference)
        before, step = map(metrics_of, outs)
        assert len(before) == len(step) == 6
        for ours, theirs in zip(before, step):
            for key in ours.keys() - {"tokens_per_second"}:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (name, key)
        assert sorted(p.name for p in outs[0].glob("reference/*")) == ["eval.safetensors", "train.safetensors"]
        assert [p.name for p in outs[0].glob("*.safetensors")] == ["model.safetensors"]  # vLLM reads all as weights
        assert not (outs[1] / "reference").exists()


def test_no_reference_where_none_is_wanted(folder, train_file, tmp_path, monkeypatch):
    """Catches memory and time spent on a reference that a loss does not use, or for an export alone."""
    loads, load = [], train_dpo.load_for_training
    monkeypatch.setattr(train_dpo, "load_for_training", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(train_dpo, "precompute", None)
    train(folder, train_file, tmp_path / "simpo", loss="simpo")
    assert len(loads) == 1
    train(folder, train_file, tmp_path / "export", max_steps=0, precompute_ref=False)
    assert len(loads) == 2 and metrics_of(tmp_path / "export") == []
    assert_same_weights(tmp_path / "export", folder)


def test_a_short_run_computes_what_it_needs(folder, other_folder, train_file, tmp_path):
    """Catches the reference's log-probs of a whole file computed for two steps, and log-probs that are missing when the
    run resumes with more steps."""
    more = {"batch_size": 2, "ref_checkpoint_path": other_folder, "save_steps": 2, "warmup_ratio": 0}
    train(folder, train_file, tmp_path / "out", max_steps=2, **more)
    known = load_file(tmp_path / "out/reference/train.safetensors")["logps"]
    assert known.shape == (10, 2) and known.isfinite().all(dim=1).sum() == 4
    train(folder, train_file, tmp_path / "out", max_steps=7, resume=True, **more)
    train(folder, train_file, tmp_path / "whole", max_steps=7, **more)
    assert_same_weights(tmp_path / "out", tmp_path / "whole")


# ------------------------------------------------------------------------------- metrics and variants


def test_metrics_and_evaluation(folder, other_folder, train_file, tmp_path):
    """Catches an evaluation that is a mean of means or of the wrong pairs, --eval_steps ignored, keys that dashboards
    know renamed, and tokens counted on one side only."""
    eval_file = tiny.write_records(tmp_path / "eval.jsonl", RECORDS[:7])
    more = {"eval_file": eval_file, "eval_steps": 2, "max_steps": 5, "batch_size": 4, "num_eval_samples": 2}
    more |= {"ref_checkpoint_path": other_folder, "eval_max_new_tokens": 5, "export_steps": 3}
    result = train(folder, train_file, tmp_path / "out", micro_batch_size=3, **more)
    lines = metrics_of(tmp_path / "out")
    evaluated = {"eval_loss", *(f"eval_{name}" for name in MEANS)}
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 5]
    assert all(line.keys() - evaluated == KEYS for line in lines)
    assert lines[-1].keys() == KEYS | evaluated
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/step-000003")
    model, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(f).eval() for f in (tmp_path / "out", other_folder)
    )
    with torch.no_grad():
        rows = [(pair_of(model, sides), pair_of(reference, sides)) for sides in encoded(folder, RECORDS[:7])]
    losses = torch.stack([plain_loss("sigmoid", policy, ref, (1, 1)) for policy, ref in rows])
    policy, ref = (torch.tensor(x) for x in zip(*rows))
    rewards = BETA * (policy - ref)
    wanted = [*rewards.T, (rewards[:, 0] > rewards[:, 1]).float(), rewards[:, 0] - rewards[:, 1], *policy.T]
    for name, values in {"loss": losses, **dict(zip(MEANS, wanted))}.items():
        assert lines[-1][f"eval_{name}"] == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-5), name
    lengths = [sum(len(ids) for ids, _ in sides) for sides in encoded(folder, RECORDS)]
    order = [numbers for _, numbers in training_batches(10, 4, seed=0, shuffle=True, first_step=1, last_step=5)]
    assert [line["num_tokens"] for line in lines] == [
        sum(lengths[i] for numbers in order[:n] for i in numbers) for n in range(1, 6)
    ]
    assert "1 truncated; 1 nothing to learn" in result.stdout and "of the pairs in the right order" in result.stdout
    samples = tiny.read_lines(tmp_path / "out/samples.jsonl")
    assert [sample["step"] for sample in samples] == [2, 2, 4, 4, 5, 5]
    assert samples[0]["reference"] == RECORDS[0]["chosen"]


def test_equal_sides_are_a_tie(folder, other_folder, tmp_path):
    """Catches a pair of equal answers that counts as right, or changes a weight, through rounding of its two rows."""
    equal = [{"prompt": "so", "chosen": text, "rejected": text} for text in (" and so" * n for n in range(1, 9))]
    path = tiny.write_records(tmp_path / "some.jsonl", [*equal, RECORDS[0]])
    for name, split in (("padded", {}), ("packed", {"max_tokens_per_micro_batch": 64})):
        more = {"ref_checkpoint_path": other_folder, "batch_size": 1, "max_steps": 9, "shuffle": False, **split}
        train(folder, path, tmp_path / name, **more)
        for line in metrics_of(tmp_path / name)[:8]:
            assert line["rewards/margins"] == line["rewards/accuracies"] == line["grad_norm"] == 0
            assert line["loss"] == pytest.approx(math.log(2)) and line["rewards/chosen"] != 0


@pytest.mark.parametrize(
    "more",
    [{"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}],
    ids=str,
)
def test_variants_agree(more, folder, train_file, tmp_path):
    """Catches activation checkpointing that changes the loss or the gradient."""
    for out, flag in (("plain", {}), ("variant", more)):
        train(folder, train_file, tmp_path / out, batch_size=5, max_steps=3, **flag)
    plain, variant = (metrics_of(tmp_path / out) for out in ("plain", "variant"))
    for ours, theirs in zip(variant, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
