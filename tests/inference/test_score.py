"""inference/score.py from its command line: scores and records. Others: test_score_refusals.py and _resume.py."""

import json
import math
import random
import shutil
from dataclasses import replace

import pytest
import torch
import transformers

from models.chats import read_chat
from models.checkpoint import open_folder
from models.parts import encode_continuation
from models.records import Record, encode_answer, encode_prompt
from models.reward import split_steps
from models.tokenizer import Tokenizer
from tests import tiny
from tests.file_tokenizer import FileTokenizer
from tests.ranks import launch
from training.frozen import open_reward_folder
from training.preferences import encode_process_record
from training.rewards import rows_it_reads

SCRIPT = "inference/score.py"
PROCESS = {"reward_model_type": "process", "step_separator": "\n"}
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}"
TEMPLATE += "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
HOSTILE = [
    "",
    " ",
    "\n\n",
    "3 plus 17 is 20.",
    "é ü \u4f60\u597d \U0001f600 \u200b e\u0301",
    "<s> </s> <unk>",
    "The answer to question 3 is 17, or so it seems. " * 8,
    "\ttab\x00null\r\n",
    "x" * 150,
]


def write_reward_model(folder, *, num_labels=1, settings=None, **config):
    """Writes a random reward model with transformers, and our tokenizer; returns transformers' model. settings: what
    train_rm.py adds to config.json."""
    shape = {
        "vocab_size": tiny.VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "num_labels": num_labels,
    }
    torch.manual_seed(5)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**(shape | config))).eval()
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    edit_config(folder, **(settings or {}))
    return model


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def rm(tmp_path_factory):
    """An outcome model as transformers writes it."""
    path = tmp_path_factory.mktemp("rm") / "model"
    write_reward_model(path)
    return path


@pytest.fixture(scope="module")
def hf(rm):
    return transformers.AutoModelForSequenceClassification.from_pretrained(rm).eval()


@pytest.fixture(scope="module")
def prm(rm, tmp_path_factory):
    """The same weights as a process model."""
    path = tmp_path_factory.mktemp("prm") / "model"
    shutil.copytree(rm, path)
    edit_config(path, **PROCESS, reward_mean=0.5, reward_std=2.0)
    return path


@pytest.fixture(scope="module")
def chat_rm(rm, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(rm, path)
    tiny.write_tokenizer(path, chat_template=TEMPLATE)
    return path


def score(folder, data, out, *flags):
    return tiny.run(SCRIPT, "--checkpoint_path", folder, "--data_file", data, "--output_file", out, *flags)


def scored(folder, tmp_path, records, *flags, name="out.jsonl"):
    """Scores these records; returns the lines written."""
    data, out = tiny.write_records(tmp_path / "data.jsonl", records), tmp_path / name
    result = score(folder, data, out, *flags)
    assert result.code == 0, result.stderr
    return tiny.read_lines(out)


def hf_scores(hf, ids):
    """transformers' score at every position of a row."""
    with torch.no_grad():
        hidden = hf.model(torch.tensor([ids])).last_hidden_state
        return hf.score(hidden)[0, :, 0].tolist()


def rows_of(lines, *names):
    return [[line[name] for name in names] for line in lines]


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_equal_transformers(rm, hf, tmp_path, batch_size):
    """Catches a score taken at the padding or before the EOS; an EOS or BOS that is missing or doubled; scores in order
    of length instead of the records' order; padding that is attended to; and a record that loses or changes a field."""
    random_order = random.Random(0).sample(range(len(HOSTILE)), len(HOSTILE))
    records = [
        {"prompt": f"{i} plus", "completion": HOSTILE[i], "tag": [i, None], "idx": "mine"} for i in random_order * 3
    ]
    lines = scored(rm, tmp_path, records, "--batch_size", batch_size)
    assert len({round(line["reward"], 3) for line in lines}) == len(HOSTILE)
    theirs = FileTokenizer(rm)
    for record, line in zip(records, lines, strict=True):
        assert {name: value for name, value in line.items() if name != "reward"} == record
        ids = [*theirs(record["prompt"] + record["completion"])["input_ids"], 2]
        with torch.no_grad():  # transformers' model finds the last token that is not the pad token
            assert hf(torch.tensor([ids])).logits.item() == pytest.approx(line["reward"], abs=1e-4)


def test_scores_do_not_depend_on_windows(rm, tmp_path, monkeypatch):
    """Catches records that are lost or mixed up at the end of a window."""
    records = [{"prompt": f"{i} plus", "completion": "so " * (i * 7 % 23)} for i in range(37)]
    wanted = scored(rm, tmp_path, records)
    monkeypatch.setattr("inference.score.WINDOW", 2)
    lines = scored(rm, tmp_path, records, "--batch_size", 3, name="small.jsonl")
    assert rows_of(lines, "prompt", "completion") == rows_of(wanted, "prompt", "completion")
    for line, want in zip(lines, wanted):
        assert line["reward"] == pytest.approx(want["reward"], abs=1e-4)


def test_a_model_with_tied_embeddings(tmp_path):
    """Catches a search for the language model's head, which a reward model lacks, where its config ties embeddings."""
    model = write_reward_model(tmp_path / "tied", tie_word_embeddings=True)
    [line] = scored(tmp_path / "tied", tmp_path, [{"prompt": "1 plus", "completion": " 2"}])
    ids = [*Tokenizer(tmp_path / "tied").encode("1 plus 2"), 2]
    assert line["reward"] == pytest.approx(hf_scores(model, ids)[-1], abs=1e-4)


def test_a_model_that_pads_with_eos(tmp_path):
    """Catches a score read at the EOS where pad and EOS are one token: transformers reads, and TRL's trainer read, the
    one before. For finished, unfinished and cut answers, both sides of a pair, and a policy's answers in PPO."""
    folder = tmp_path / "trl"
    model = write_reward_model(folder, pad_token_id=2)
    tokenizer, common = Tokenizer(folder), {"prompt": "1 plus", "output": " 2 is 3", "idx": 0}

    def wanted(ids):
        return model(torch.tensor([ids])).logits.item()

    records = [{"prompt": "1 plus", "completion": " 2 is 3"}, {**common, "sample_idx": 0, "finish_reason": "length"}]
    records += [{**common, "sample_idx": 1, "finish_reason": "stop"}, {"prompt": "1", "completion": " so" * 90}]
    lines = scored(folder, tmp_path, records, "--max_seq_len", 40, "--overlong", "truncate")
    ids, long = tokenizer.encode("1 plus 2 is 3"), tokenizer.encode("1" + " so" * 90)
    expected = [wanted([*ids, 2]), wanted(ids), wanted([*ids, 2]), wanted(long[:40])]
    assert [line["reward"] for line in lines] == pytest.approx(expected, abs=1e-4)
    [pair] = scored(folder, tmp_path, [{"prompt": "1 plus", "chosen": " 2", "rejected": " 3 so"}], name="pairs.jsonl")
    sides = [wanted([*tokenizer.encode(text), 2]) for text in ("1 plus 2", "1 plus 3 so")]
    assert [pair["chosen_reward"], pair["rejected_reward"]] == pytest.approx(sides, abs=1e-4)
    reward = open_reward_folder(folder, open_folder(folder, None, 1), 1)
    rows = [encode_answer("1 plus", " 2 is 3", tokenizer)[0]]
    rows.append(replace(rows[0], input_ids=rows[0].input_ids[:-1]))
    found, _ = rows_it_reads(reward, ["1 plus"] * 2, rows, [" 2 is 3"] * 2, [True, False])
    assert [row.positions for row in found] == [[len(ids) - 1]] * 2


def test_bfloat16_is_near(rm, tmp_path):
    """Catches a --dtype that is ignored, and bfloat16 scores far from those in fp32."""
    records = [{"prompt": f"{i} plus", "completion": " so it seems"} for i in range(8)]
    exact = scored(rm, tmp_path, records)
    near = scored(rm, tmp_path, records, "--dtype", "bfloat16", name="near.jsonl")
    for a, b in zip(exact, near):
        assert a["reward"] != b["reward"] == pytest.approx(a["reward"], abs=0.25)


def test_generated_lines_are_scored_as_they_ended(rm, hf, tmp_path):
    """Catches an EOS after an answer that ran out of tokens, none after one that stopped, a reference answer of the
    data file that is scored in the place of the sample, and another engine's sample refused for its name."""
    common = {"idx": 0, "prompt": "3 plus", "output": " 4 is 7", "num_tokens": 4, "logprob": -1.0}
    records = [
        {**common, "sample_idx": 0, "finish_reason": "stop", "completion": "the reference", "chosen": "carried along"},
        {**common, "sample_idx": 1, "finish_reason": "length", "completion": "the reference"},
        {"input": "3 plus", "output": " 4 is 7"},
        {"prompt": "3 plus", "completion": " 4 is 7", "finish_reason": "max_tokens"},
    ]
    lines = scored(rm, tmp_path, records)
    ids = Tokenizer(rm).encode("3 plus 4 is 7")
    unfinished, finished = hf_scores(hf, [*ids, 2])[-2:]
    wanted = [finished, unfinished, finished, unfinished]
    assert [line["reward"] for line in lines] == pytest.approx(wanted, abs=1e-4)
    assert abs(finished - unfinished) > 1e-2


def test_chats_are_scored_as_trained(chat_rm, hf, tmp_path):
    """Catches a chat template that is not applied, an end of turn that is missing or not the scored token, and an end
    of turn after an answer that ran out of tokens, and a record refused for a setting of the policy's template."""
    prompt = [{"role": "user", "content": "3 plus 4"}]
    answer = [{"role": "assistant", "content": "is 7"}]
    sample = {"prompt": prompt, "output": "is 7", "idx": 0, "sample_idx": 0}
    records = [
        {"prompt": prompt, "completion": answer, "chat_template_kwargs": {"enable_thinking": False}},
        {**sample, "finish_reason": "stop"},
        {**sample, "finish_reason": "length"},
    ]
    lines = scored(chat_rm, tmp_path, records)
    tokenizer = Tokenizer(chat_rm)
    row, _ = encode_answer(read_chat(prompt), answer, tokenizer)
    prompt_ids = encode_prompt(read_chat(prompt), tokenizer)
    unfinished = [*prompt_ids, *encode_continuation("is 7", prompt_ids, tokenizer)]
    assert row.input_ids[-1] == 2 and row.input_ids[:-1] != row.input_ids
    wanted = [hf_scores(hf, ids)[-1] for ids in (row.input_ids, [*unfinished, 2], unfinished)]
    assert [line["reward"] for line in lines] == pytest.approx(wanted, abs=1e-4)


def test_pairs(rm, hf, tmp_path):
    """Catches swapped scores of chosen and rejected, and an accuracy that is not the share of pairs ranked right."""
    sides = [(f" {i} is", " so " * i)[:: (-1) ** i] for i in range(1, 8)]
    records = [{"prompt": f"{i} plus", "chosen": a, "rejected": b} for i, (a, b) in enumerate(sides)]
    data, out = tiny.write_records(tmp_path / "pairs.jsonl", records), tmp_path / "out.jsonl"
    result = score(rm, data, out, "--batch_size", 3)
    tokenizer, right = Tokenizer(rm), 0
    for record, line in zip(records, tiny.read_lines(out), strict=True):
        assert list(line) == [*record, "chosen_reward", "rejected_reward"]
        for side in ("chosen", "rejected"):
            ids = [*tokenizer.encode(record["prompt"] + record[side]), 2]
            assert line[f"{side}_reward"] == pytest.approx(hf_scores(hf, ids)[-1], abs=1e-4)
        right += line["chosen_reward"] > line["rejected_reward"]
    assert 0 < right < 7 and f"{right / 7:.1%} of 7 pairs" in result.stdout


def test_normalize(rm, tmp_path):
    """Catches reward_mean and reward_std that are applied without --normalize, or the wrong way round."""
    model = shutil.copytree(rm, tmp_path / "model")
    edit_config(model, reward_model_type="pairwise", reward_mean=1.5, reward_std=0.25)
    records = [{"prompt": "1", "completion": c} for c in "abc"]
    raw = scored(rm, tmp_path, records)
    assert scored(model, tmp_path, records, name="unasked.jsonl") == raw
    normal = scored(model, tmp_path, records, "--normalize", name="normal.jsonl")
    assert [x["reward"] for x in normal] == pytest.approx([(x["reward"] - 1.5) / 0.25 for x in raw])


# ----------------------------------------------------------------------------------- process models


def test_steps_are_scored_where_they_were_trained(prm, hf, tmp_path):
    """Catches scores read before the separator, an EOS at the end, and a text split into other steps than the list."""
    steps = ["3 plus 17 is 20.", " so é \U0001f600", "it seems"]
    text = "\n".join(steps)
    prompt = "The question\n"
    sample = {"prompt": prompt, "output": text, "idx": 0, "sample_idx": 0, "completions": ["not this"]}
    records = [
        {"prompt": prompt, "completions": steps, "labels": [1, 0, 1]},
        {"prompt": prompt, "completion": text},
        {"prompt": prompt, "completion": text + "\n"},
        {**sample, "finish_reason": "stop"},
        {**sample, "finish_reason": "length"},
        {"prompt": prompt, "completions": steps[:2]},
        {"prompt": prompt, "completion": ""},
    ]
    lines = scored(prm, tmp_path, records, "--batch_size", 2)
    row, _ = encode_process_record(Record("x", records[0]), "\n", Tokenizer(prm))
    everywhere = hf_scores(hf, row.input_ids)
    wanted = [everywhere[position] for position in row.positions]
    for line in lines[:5]:
        assert line["step_rewards"] == pytest.approx(wanted, abs=1e-4) and "reward" not in line
    assert lines[5]["step_rewards"] == pytest.approx(wanted[:2], abs=1e-4)
    assert len(lines[6]["step_rewards"]) == 1  # of the separator alone


@pytest.mark.parametrize(
    "text, steps",
    [
        ("a\nb", ["a", "b"]),
        ("a\nb\n", ["a", "b"]),
        ("a\n\nb\n\n \n", ["a", "\nb"]),
        ("\n a \n", ["\n a "]),
        ("", [""]),
        (" \n\n", [""]),
    ],
)
def test_split_steps(text, steps):
    """Catches text that is lost between two steps, and blank lines that count as steps."""
    assert split_steps(text, "\n") == steps
    assert not steps[0] or "".join(step + "\n" for step in steps).rstrip() == text.rstrip()


def test_aggregates(prm, tmp_path):
    """Catches aggregates of logits instead of probabilities, and the first step taken for the last."""
    records = [{"prompt": "1 plus", "completions": ["2 is", "3", "so it"]}, {"prompt": "1", "completions": ["2"]}]
    wanted = {"min": min, "prod": math.prod, "last": lambda p: p[-1], "mean": lambda p: sum(p) / len(p)}
    for how, function in wanted.items():
        for line in scored(prm, tmp_path, records, "--aggregate", how, name=f"{how}.jsonl"):
            probabilities = [1 / (1 + math.exp(-s)) for s in line["step_rewards"]]
            assert line["reward"] == pytest.approx(function(probabilities))


# ----------------------------------------------------------------------------------------- long records


def test_overlong_records(rm, prm, hf, tmp_path):
    """Catches a record that is cut silently, an EOS after the cut, and a skipped record that shifts the others."""
    long = "so it seems " * 30
    records = [{"prompt": "1 plus", "completion": c} for c in ("2", long, "3")]
    records.append({"prompt": long, "completion": "4"})
    data = tiny.write_records(tmp_path / "data.jsonl", records)
    limit = ("--max_seq_len", 24)
    tiny.assert_refused(score(rm, data, tmp_path / "out.jsonl", *limit), f"{data}:2", "24", "--overlong")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]

    result = score(rm, data, tmp_path / "skip.jsonl", *limit, "--overlong", "skip")
    skipped = tiny.read_lines(tmp_path / "skip.jsonl")
    assert [line["completion"] for line in skipped] == ["2", "3"] and "; 2 skipped" in result.stdout

    result = score(rm, data, tmp_path / "cut.jsonl", *limit, "--overlong", "truncate")
    lines = tiny.read_lines(tmp_path / "cut.jsonl")
    assert [line["completion"] for line in lines] == ["2", long, "3"]
    assert "; 1 truncated; 1 skipped" in result.stdout
    ids = Tokenizer(rm).encode("1 plus" + long)[:24]
    assert lines[1]["reward"] == pytest.approx(hf_scores(hf, ids)[-1], abs=1e-4)
    assert lines[0]["reward"] == pytest.approx(skipped[0]["reward"], abs=1e-4)

    steps = {"prompt": "1 plus", "completions": ["2 is", "3", long]}
    [line] = scored(prm, tmp_path, [steps], *limit, "--overlong", "truncate", name="steps.jsonl")
    [whole] = scored(prm, tmp_path, [steps], name="whole.jsonl")
    assert line["step_rewards"] == pytest.approx(whole["step_rewards"][:2], abs=1e-4)
    data = tiny.write_records(tmp_path / "data.jsonl", records)
    result = score(rm, data, tmp_path / "no.jsonl", "--max_seq_len", 2, "--overlong", "skip")
    tiny.assert_refused(result, "all 4 records")


def sampled(count=4):
    """Shuffled lines as generate.py writes them: 3 prompts, `count` samples each."""
    lines = [
        {
            "idx": i,
            "sample_idx": s,
            "prompt": f"{i} plus",
            "output": f"so it is\n{(i + s) % 2}",
            "finish_reason": "stop",
        }
        for i in range(3)
        for s in range(count)
    ]
    return random.Random(1).sample(lines, len(lines))


def test_ranks_agree_with_one_process(tmp_path):
    """Catches records that a rank leaves out or scores in another's place, a head's output summed over tp ranks, ranks
    that all write, a choice among a part of the samples, and a resume that needs the first run's windows."""
    folder = tmp_path / "model"
    write_reward_model(folder, num_key_value_heads=4, attention_bias=True, vocab_size=tiny.VOCAB_SIZE + 1)
    edit_config(folder, **PROCESS)
    records = [{**record, "output": f"so\n{'it is ' * (i % 9)}\n{i}"} for i, record in enumerate(sampled(9))]
    data = tiny.write_records(tmp_path / "data.jsonl", records)
    flags = ("--aggregate", "mean", "--best_of_n", "--batch_size", 1)
    assert score(folder, data, tmp_path / "one.jsonl", *flags).code == 0
    wanted, best = (tiny.read_lines(tmp_path / name) for name in ("one.scored.jsonl", "one.jsonl"))
    jobs = []
    for tp_size in (1, 2, 4):  # dp 4, 2 x 2 and tp 4
        common = ["--checkpoint_path", folder, "--data_file", data, "--output_file", tmp_path / f"{tp_size}.jsonl"]
        jobs.append(["inference.score", *common, *flags, "--tensor_parallel_size", tp_size])
    shutil.copyfile(tmp_path / "one.scored.jsonl.args.json", tmp_path / "2.scored.jsonl.args.json")
    kept = (tmp_path / "one.scored.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "2.scored.jsonl").write_bytes(b"".join(kept[:20]) + kept[20][:30])
    jobs[1].append("--resume")
    printed = launch(4, jobs)
    assert printed.count("27 records to score") == 2 and printed.count("20 done before") == 1
    for tp_size in (1, 2, 4):
        for name, expected in ((f"{tp_size}.scored.jsonl", wanted), (f"{tp_size}.jsonl", best)):
            for line, want in zip(tiny.read_lines(tmp_path / name), expected, strict=True):
                assert line["step_rewards"] == pytest.approx(want["step_rewards"], abs=1e-4)
                assert line["reward"] == pytest.approx(want["reward"], abs=1e-4)
                assert line["output"] == want["output"] and list(line) == list(want)
