"""scripts/toy.py: the rules of its task, the files it writes, and the score it prints."""

import errno
import json
import random
import re
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

from models.checkpoint import load_model
from models.tokenizer import Tokenizer
from scripts import toy
from tests import tiny

SIZES = ["--num_train", "600", "--num_heldout", "50", "--num_prompts", "100"]


def run(*args):
    return tiny.run("scripts/toy.py", *args)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "world"
    result = run("--output_dir", folder, "--seed", 3, *SIZES)
    assert result.code == 0, result.stderr
    return folder


def test_solution_by_hand():
    """Catches a wrong running sum or a changed format, against a solution written by hand."""
    assert toy.prompt_of((7, 5, 9, 4)) == "7+5+9+4\n"
    assert toy.solution((7, 5, 9, 4)) == "7+5=12\n12+9=21\n21+4=25\n25"
    assert toy.terms_of("7+5+9+4\n") == (7, 5, 9, 4)
    with pytest.raises(ValueError, match="12"):
        toy.terms_of("12+5\n")


def test_every_solution_is_right():
    """Catches a line that is not true arithmetic, and a checker that rejects the worked solution."""
    rng = random.Random(0)
    for num_terms in range(2, 9):
        for _ in range(50):
            terms = toy.make_problem(rng, num_terms)
            *steps, last = toy.solution(terms).split("\n")
            assert len(terms) == num_terms and len(steps) == num_terms - 1 and int(last) == sum(terms)
            for step in steps:
                left, right = step.split("=")
                assert sum(map(int, left.split("+"))) == int(right)
            assert toy.is_correct(toy.solution(terms), sum(terms))
            assert set(toy.step_labels(toy.prompt_of(terms), toy.solution(terms))) == {1}


@pytest.mark.parametrize(
    "completion, answer, labels",
    [
        ("7+5=12\n12+9=21\n21", "21", [1, 1, 1]),
        ("7+5=12\n12+9=21\n21\n", "21", [1, 1, 1]),
        ("7+5=13\n13+9=22\n22", "22", [0, 0, 0]),
        ("7+5=12\n12+9=20\n21", "21", [1, 0, 1]),
        ("7+5=12\n21", "21", [1, 0]),
        ("7+5=12\n12+9=21", None, [1, 1]),
        ("7+5=12\n12+9=21\n21\n21", "21", [1, 1, 1, 0]),
        ("021", "21", [0]),
        ("-21", None, [0]),
        ("²", None, [0]),
        ("", None, [0]),
        ("\n", None, [0]),
    ],
)
def test_checking_answers_and_steps(completion, answer, labels):
    """Catches labels that shift, an answer read from the wrong line, and a crash on an empty or odd completion."""
    assert toy.final_answer(completion) == answer
    assert toy.step_labels("7+5+9\n", completion) == labels
    assert toy.is_correct(completion, 21) == (answer == "21")


def test_reward_function():
    """Catches a reward that ignores the example, or breaks the contract (a float each, unequal lengths refused)."""
    examples = [{"answer": "12", "other": 1}, {"answer": "13"}, {"answer": "12"}]
    assert toy.correct(["7+5\n"] * 3, ["7+5=12\n12", "7+5=12\n12", ""], examples) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError):
        toy.correct(["7+5\n"], ["12"], examples)


def test_same_seed_same_bytes(world, tmp_path):
    """Catches randomness that the seed does not decide (weights, tokenizer, problems), and a seed without effect."""
    again, other = tmp_path / "again", tmp_path / "other"
    assert run("--output_dir", again, "--seed", 3, *SIZES).code == 0
    assert run("--output_dir", other, "--seed", 2**64 + 4, *SIZES).code == 0
    files = sorted(p.relative_to(world) for p in world.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((world / name).read_bytes() == (again / name).read_bytes() for name in files)
    for name in ("model/model.safetensors", "train.jsonl", "heldout.jsonl", "prompts.jsonl"):
        assert (world / name).read_bytes() != (other / name).read_bytes()


def test_files_are_disjoint_and_easy_to_hard(world):
    """Catches a held-out problem that was trained on, a wrong share of hard problems, and a missing field."""
    train, heldout, prompts = (records(world / f"{name}.jsonl") for name in ("train", "heldout", "prompts"))
    assert (len(train), len(heldout), len(prompts)) == (600, 50, 100)
    problems = [{r["prompt"] for r in file} for file in (train, heldout, prompts)]
    assert len(problems[1]) == 50 and len(problems[2]) == 100
    assert not problems[0] & problems[1] and not problems[0] & problems[2] and not problems[1] & problems[2]
    for record in heldout:
        assert record["completion"] == toy.solution(toy.terms_of(record["prompt"]))
    for record in train + heldout:
        terms = toy.terms_of(record["prompt"])
        assert (record["answer"], record["difficulty"]) == (str(sum(terms)), len(terms))
    assert all(set(record) == {"prompt", "answer", "difficulty"} for record in prompts)
    for file, mix in ((train, toy.TRAIN_MIX), (heldout, toy.HELDOUT_MIX), (prompts, toy.HELDOUT_MIX)):
        count = Counter(record["difficulty"] for record in file)
        assert set(count) == set(mix)
        assert all(abs(count[d] / len(file) - share) < 0.02 for d, share in mix.items())


def test_demonstrations_of_mixed_quality(world):
    """Catches a careless clerk who errs where nothing is carried, breaks off, or whose share of the file is wrong."""
    right, careless, with_carries = 0, 0, 0
    for record in records(world / "train.jsonl"):
        *steps, last = record["completion"].split("\n")
        terms = toy.terms_of(record["prompt"])
        total, forgot = terms[0], False
        for step, term in zip(steps, terms[1:], strict=True):
            left, after = step.split("=")
            assert left == f"{total}+{term}"
            off = total + term - int(after)
            assert off == 0 or (off == 10 and total % 10 + term >= 10)
            forgot, total = forgot or off > 0, int(after)
        assert last == str(total)
        assert forgot != toy.is_correct(record["completion"], record["answer"])
        right, careless = right + (not forgot), careless + forgot
        with_carries += sum(terms) >= 10
    expected = toy.CARELESS * toy.FORGETS  # for one carry; more where one of several is forgotten
    assert expected - 0.08 < careless / with_carries < expected + 0.14 and right > careless / 2


def test_model_folder_opens_in_transformers(world):
    """Catches a folder that transformers reads otherwise (logits, ids, special tokens), and a model without GQA."""
    transformers = pytest.importorskip("transformers")
    folder = world / "model"
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), load_model(folder)
    assert 1e6 <= sum(p.numel() for p in theirs.parameters()) <= 4e6
    assert theirs.config.num_key_value_heads < theirs.config.num_attention_heads
    tokenizer, own = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (own.bos_token_id, own.eos_token_id, own.pad_token_id) == (1, 2, 3)
    assert theirs.generation_config.eos_token_id == 2 and theirs.generation_config.pad_token_id == 3
    ids = torch.tensor([own.encode("7+5+9\n7+5=12")])
    with torch.no_grad():
        torch.testing.assert_close(ours.lm_head(ours(ids)), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", ["7+5+9\n7+5=12\n12+9=21\n21", "Größe:  🙂\tx\n\n y"])
def test_tokenizer(world, text):
    """Catches merged digits, characters that become <unk>, and prompt ids that a completion changes."""
    transformers = pytest.importorskip("transformers")
    own = Tokenizer(world / "model")
    ids = own.encode(text)
    assert ids == transformers.AutoTokenizer.from_pretrained(world / "model").encode(text)
    assert own.decode(ids) == text and toy.UNK not in ids and len(own.vocabulary()) == 273
    if text.isascii():
        assert len(ids) == 2 + len(text)  # BOS, the leading space of LLaMA tokenizers, one token a character
        prompt = own.encode("7+5+9\n")
        assert ids[: len(prompt)] == prompt


def test_score(world, tmp_path):
    """Catches samples matched to the wrong problem (lines come in any order, several for each) and wrong shares."""
    heldout = records(world / "heldout.jsonl")[:10]
    lines = [{"prompt": r["prompt"], "output": r["completion"], "sample_idx": 0} for r in heldout]
    lines += [{"prompt": r["prompt"], "output": "1+1=2", "sample_idx": 1} for r in heldout]
    random.Random(0).shuffle(lines)
    outputs = tmp_path / "out.jsonl"
    outputs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("--output_dir", world, "--score", outputs, "--num_shown", 3)
    assert result.code == 0, result.stderr
    *shown, last = result.stdout.splitlines()
    assert last.startswith("accuracy 50.0% of 20 samples (") and last.count("50.0%") == last.count("%")
    assert len(shown) == 3


def test_judged_samples(tmp_path):
    """Catches a right solution called rejected, a pair of two problems, a sample used twice or cut off before its end,
    and labels of other lines."""
    right, wrong, cut = "7+5=12\n12", "7+5=11\n11", "7+5=1"
    lines = [
        {"prompt": "7+5\n", "output": right, "finish_reason": "stop"},
        {"prompt": "7+5\n", "output": wrong, "finish_reason": "stop"},
        {"prompt": "7+5\n", "output": right, "finish_reason": "stop"},
        {"prompt": "7+5\n", "output": "7+5=12\n11", "finish_reason": "stop"},
        {"prompt": "2+2\n", "output": "2+2=5\n5", "finish_reason": "stop"},
        {"prompt": "7+5\n", "output": cut, "finish_reason": "length"},
    ]
    samples, pairs, steps = (tmp_path / name for name in ("samples.jsonl", "sub/pairs.jsonl", "sub/steps.jsonl"))
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("--samples", samples, "--pairs_file", pairs, "--steps_file", steps)
    assert result.code == 0, result.stderr
    assert records(pairs) == [{"prompt": "7+5\n", "chosen": right, "rejected": wrong}]
    labels = {tuple(r["completions"]): r["labels"] for r in records(steps)}
    assert labels == {
        ("7+5=12", "12"): [1, 1],
        ("7+5=11", "11"): [0, 0],
        ("7+5=12", "11"): [1, 0],
        ("2+2=5", "5"): [0, 0],
    }
    samples.write_text(json.dumps(lines[0]) + "\n")
    for args in (("--pairs_file", tmp_path / "new"), ()):
        result = run("--samples", samples, *args)
        assert result.code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_bad_input(world, tmp_path):
    """Catches tracebacks, messages that do not name the culprit, and a folder that is overwritten."""
    broken, foreign, empty = tmp_path / "broken.jsonl", tmp_path / "foreign.jsonl", tmp_path / "empty.jsonl"
    broken.write_text('{"prompt": "7+5\\n", "output": "12"}\n{"prompt"')
    foreign.write_text('{"prompt": "7+5\\n", "output": "12"}\n')
    empty.write_text("")
    new, before = tmp_path / "new", (world / "train.jsonl").read_bytes()
    for folder, change, word in (
        (world, {}, str(world)),
        (broken, {}, str(broken)),
        (new, {"num_heldout": 1_000_000}, "1000000"),
        (new, {"num_shown": 1}, "--num_shown 1 does nothing without --score"),
        (new, {"score": foreign, "num_train": 1}, "--num_train 1 does nothing with --score or --samples"),
        (new, {"score": foreign}, "heldout.jsonl"),
        (world, {"score": tmp_path / "none.jsonl"}, "none.jsonl"),
        (world, {"score": broken}, "broken.jsonl:2"),
        (world, {"score": foreign}, "foreign.jsonl:1"),
        (world, {"score": empty}, "empty.jsonl"),
        (new, {"pairs_file": new}, "--pairs_file"),
        (new, {"samples": foreign, "score": foreign}, "either --score or --samples"),
        (world / "train.jsonl" / "new", {}, "train.jsonl is a file"),
    ):
        with pytest.raises((ValueError, OSError), match=re.escape(word)):
            toy.main(toy.ToyArgs(output_dir=folder, **change))
    assert (world / "train.jsonl").read_bytes() == before and not new.exists()

    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(Path, "write_text", side_effect=full):
        tiny.assert_refused(run("--output_dir", new), "toy.json: cannot be written: No space left on device")
    tiny.assert_refused(
        run("--output_dir", world), f"--output_dir {world}: exists; take another\n"
    )  # not "or remove it"
