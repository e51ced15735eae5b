"""training/train_ppo.py: scores by hand, metrics and samples. Kills, resumes, refusals are in test_train_ppo_runs.py,
what it learns in test_ppo_optimum.py, the parts of its losses in test_losses_ppo.py, ranks in test_parallel_ppo.py."""

import json
import re
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from tokenizers.models import WordLevel

from models.batches import Split
from models.chats import read_chat
from models.checkpoint import open_folder
from models.common import Runtime
from models.fsdp import ParallelArgs, init_mesh, load_frozen
from models.record_files import Record
from models.records import IGNORE_INDEX, Example, encode_generated, encode_prompt
from models.reward import encode_to_score
from models.tokenizer import Tokenizer
from tests import tiny
from tests.training.test_train_rm import make_records
from training import frozen, rewards, rollouts, train_ppo
from training.rewards import RewardArgs, Scorer
from training.rollouts import Prompt
from training.stop import Stop

SCRIPT = "training/train_ppo.py"
TIMED = ("time/", "tokens_per_second", "rollout_tokens", "update_tokens")
REWARDS = """
import math

def reward(prompts, completions, examples):
    return [len(c) / 10 + example["bonus"] for c, example in zip(completions, examples)]

def raises(prompts, completions, examples):
    raise KeyError("no such thing")

def short(prompts, completions, examples):
    return [1.0] * (len(completions) - 1)

def nan(prompts, completions, examples):
    return [math.nan for _ in completions]

def words(prompts, completions, examples):
    return ["good" for _ in completions]

def two(prompts, completions):
    return [0.0 for _ in completions]

def generator(prompts, completions, examples):
    for example in examples:
        yield example["no such field"]

def leaves(prompts, completions, examples):
    raise SystemExit(0)

def digits(prompts, completions, examples):
    return "1" * len(completions)

def each(prompt, completion, example):
    if "more" in completion:
        raise KeyError("more")
    return len(completion)

async def soon(prompt, completion, example):
    return len(prompt)

async def all_soon(prompts, completions, examples):
    return [example["bonus"] for example in examples]

def hangs(prompt, completion, example):
    print("a protocol that is not only ours")
    while example["bonus"] == 2:
        pass
    return 1

calls = []

def nan_later(prompts, completions, examples):
    calls.append(1)
    return [math.inf if len(calls) == 2 else 0.0 for _ in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Writes prompts of different lengths, reward functions, and a pairwise reward model of another size."""
    root = tmp_path_factory.mktemp("ppo")
    records = [{"prompt": f"Question {i}:" + " and so" * (i % 4), "bonus": i} for i in range(7)]
    tiny.write_records(root / "prompts.jsonl", records)
    tiny.write_records(root / "held_out.jsonl", records[:3])
    (root / "fn.py").write_text(REWARDS)
    (root / "leaves.py").write_text("raise SystemExit(0)\n")
    (root / "more.py").write_text("def each(prompt, completion, example):\n    return 7\n")
    only_here = "import os\nassert os.getpid() == int(os.environ['PID_OF_THIS_TEST'])\n"
    (root / "only_here.py").write_text(only_here + "def reward(prompt, completion, example):\n    return 1\n")
    tiny.write_model(root / "lm", seed=7, num_hidden_layers=1)
    pairs = tiny.write_records(root / "pairs.jsonl", make_records("pairwise", 4))
    flags = ["--checkpoint_path", root / "lm", "--train_file", pairs, "--output_dir", root / "rm", "--max_steps", 0]
    assert tiny.run("training/train_rm.py", *flags).code == 0
    return root


def flags(folder, world, out, **more):
    given = {"checkpoint_path": folder, "prompt_file": world / "prompts.jsonl", "output_dir": out, "save_steps": 0}
    given |= {"reward_fn": f"{world / 'fn.py'}:reward", "device": "cpu", "max_new_tokens": 6, "total_steps": 4}
    given |= {"rollout_batch_size": 6, "minibatch_size": 3, "micro_batch_size": 3, "ppo_epochs": 1}
    given |= {"learning_rate": 1e-3, "value_learning_rate": 1e-3, **more}
    kept = {name: value for name, value in given.items() if value is not None}
    each = [(name, v) for name, value in kept.items() for v in (value if isinstance(value, list) else [value])]
    return [part for name, v in each for part in ([f"--{name}"] if v is True else [f"--{name}", v])]


def ppo(*args, **more):
    result = tiny.run(SCRIPT, *flags(*args, **more))
    assert result.code == 0, result.stderr
    return tiny.read_lines(args[2] / "metrics.jsonl")


# ------------------------------------------------------------------------------------ what is drawn and measured


def test_metrics_and_samples(folder, world, tmp_path):
    """Catches engine and trainer that differ in the log-probs of the same tokens, first-minibatch identities that do
    not hold, packed answers that attend to each other, an evaluation that changes the training by a bit, metrics of
    other answers, and the export of a step without one of the models."""
    constant = {"lr_schedule": "constant", "warmup_ratio": 0, "ppo_epochs": 2, "micro_batch_size": 2}
    lines = ppo(folder, world, tmp_path / "plain", debug_checks=True, export_steps=3, **constant)
    more = {"eval_prompt_file": world / "held_out.jsonl", "eval_steps": 2, "log_steps": 3}
    more |= {"reward_fn": [f"{world / 'fn.py'}:{name}" for name in ("reward", "hangs")], "reward_fn_weight": [1, 0]}
    more |= {"reward_timeout": 0.3, "reward_workers": 1}  # the second hangs for one record, and has weight 0
    watched = ppo(folder, world, tmp_path / "watched", **constant, **more)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [line["step"] for line in watched] == [0, 2, 3, 4]
    assert lines[0]["objective/kl"] == 0 and lines[1]["objective/kl"] != 0
    for line in lines:
        assert line["engine/logprob_gap_max"] < 1e-5 and line["grad_norm"] > 0 and line["value_grad_norm"] > 0
        wanted = line["objective/scores"] - line["kl_coef"] * line["objective/kl"]
        assert line["objective/rlhf_reward"] == pytest.approx(wanted)
        assert line["loss"] == pytest.approx(line["loss/policy_avg"] + line["loss/value_avg"])
        assert 0 < line["completion_length"] <= 6 and line["episode"] == 6 * line["step"]
    assert lines[-1]["num_tokens"] == pytest.approx(6 * sum(line["completion_length"] for line in lines))
    assert [line["step"] for line in watched if "eval_objective/scores" in line] == [0, 2, 4]
    for line in watched[1:]:  # a busy machine may time out on more than those that hang
        hung = train_ppo.prompt_numbers(7, 6 * (line["step"] - 1), 6, seed=0).count(2)
        assert line["rewards/hangs/timeouts"] >= hung and line["rewards/hangs/mean"] == 1
        assert line["rewards/reward/mean"] == pytest.approx(line["objective/scores"])
    assert [line["step"] for line in watched if line.get("eval_rewards/hangs/timeouts", 0) >= 1] == [0, 2, 4]
    samples = tiny.read_lines(tmp_path / "watched/samples.jsonl")
    assert [sample["step"] for sample in samples] == [0] * 3 + [2] * 3 + [4] * 3
    for sample, bonus in zip(samples, [0, 1, 2] * 3):
        assert sample["score"] == pytest.approx(len(sample["output"]) / 10 + bonus)
    assert_same_weights(tmp_path / "plain", tmp_path / "watched")
    size = {**constant, "micro_batch_size": None, "max_tokens_per_micro_batch": 40}
    [packed] = ppo(folder, world, tmp_path / "packed", **size, total_steps=1)
    for name in packed.keys() - {name for name in packed if name.startswith(TIMED)}:
        assert packed[name] == pytest.approx(lines[0][name], rel=1e-4, abs=1e-6), name
    for out in (tmp_path / "plain", tmp_path / "plain/step-000003"):  # both models, in the folder of a step too
        opened = transformers.AutoModelForSequenceClassification.from_pretrained(out / "critic")
        tokenizer = transformers.AutoTokenizer.from_pretrained(out / "critic")
        assert opened.score.weight.abs().max() > 0 and opened.config.pad_token_id == tokenizer.pad_token_id == 0
        transformers.AutoModelForCausalLM.from_pretrained(out)


def assert_same_weights(a, b):
    for part in ("model.safetensors", "critic/model.safetensors"):
        ours, theirs = load_file(a / part), load_file(b / part)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (part, name)


def test_prompts_that_are_too_long(folder, world, tmp_path):
    """Catches a limit that does not reach the cache or the held-out prompts, and a truncated prompt that loses its end
    or its BOS or is not counted."""
    runs = {"all": {}, "skip": {}, "truncate": {"prompt_file": world / "one.jsonl"}}
    long = "never seen" + " and so" * 30 + " Question 1:"
    tiny.write_records(world / "one.jsonl", [{"prompt": long, "bonus": 0}])
    tiny.write_records(world / "mixed.jsonl", [{"prompt": "Question 1:", "bonus": 0}, {"prompt": long, "bonus": 0}])
    shown = {}
    for how, more in runs.items():
        given = {"prompt_file": world / "mixed.jsonl", "eval_prompt_file": world / "mixed.jsonl", **more}
        given |= {} if how == "all" else {"max_prompt_len": 8, "overlong": how}
        result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / how, total_steps=1, eval_steps=1, **given))
        assert result.code == 0, result.stderr
        shown[how] = result.stdout
    tokenizer = Tokenizer(folder)
    ids = encode_prompt(long, tokenizer)
    slots = {how: int(re.search(r"slots of (\d+) tokens", text)[1]) for how, text in shown.items()}
    assert slots["all"] >= len(ids) + 6 > 2 * slots["skip"] and slots["skip"] == slots["truncate"] >= 8 + 6
    assert re.search(r"prompts +1; 1 skipped\n *held out +1; 1 skipped\n", shown["skip"]), shown["skip"]
    assert re.search(r"prompts +1; 1 truncated\n *held out +2; 1 truncated\n", shown["truncate"]), shown["truncate"]
    kept = tokenizer.decode([*ids[:1], *ids[-7:]], skip_special_tokens=False)
    assert tiny.read_lines(tmp_path / "truncate/samples.jsonl")[1]["prompt"] == kept


def test_debug_checks_see_another_temperature(folder, world, tmp_path, monkeypatch):
    """Catches a sampler with another temperature than the log-probs': the ratio, still 1, does not show it."""
    real = rollouts.SamplingParams
    monkeypatch.setattr(rollouts, "SamplingParams", lambda temperature, **more: real(0.7 * temperature, **more))
    with pytest.raises(RuntimeError, match="away from those of the engine"):
        ppo(folder, world, tmp_path / "out", debug_checks=True)
    assert not (tmp_path / "out/config.json").exists()


def test_export_only(folder, world, tmp_path):
    """Catches weights changed by loading and saving, a critic whose head is not 0, and one whose own attention_dropout
    is left out without a word."""
    tiny.write_model(tmp_path / "lm", attention_dropout=0.1)
    settings = {"total_steps": 0, "value_checkpoint_path": tmp_path / "lm"}
    result = tiny.run(SCRIPT, *flags(folder, world, tmp_path / "out", **settings))
    assert result.code == 0 and tiny.read_lines(tmp_path / "out/metrics.jsonl") == [], result.stderr
    assert f"{tmp_path / 'lm'}: its attention_dropout 0.1 is not applied" in result.stdout
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not load_file(tmp_path / "out/critic/model.safetensors")["score.weight"].any()


def test_critic_warmup(folder, world, tmp_path):
    """Catches a policy that changes while the critic warms up, a critic that does not, and one that learns at the
    policy's learning rate."""
    lines = ppo(folder, world, tmp_path / "out", total_steps=2, critic_warmup_steps=2, reward_checkpoint_path=None)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_file(tmp_path / "out/critic/model.safetensors")["score.weight"].any()
    assert [line["objective/kl"] for line in lines] == [0, 0]
    ppo(folder, world, tmp_path / "still", total_steps=1, value_learning_rate=0, reward_checkpoint_path=None)
    assert not load_file(tmp_path / "still/critic/model.safetensors")["score.weight"].any()


# ------------------------------------------------------------------------------------------- scores


class Scores:
    """Runs Scorer.score on given answers to "Question 1:", with a reward model's folder."""

    def __init__(self, policy, folder):
        self.tokenizer = Tokenizer(policy)
        self.reward = frozen.open_reward_folder(folder, open_folder(policy), 1)
        mesh = init_mesh(torch.device("cpu"), 1)
        self.split = Split(2, mesh["dp"], 0)
        runtime = Runtime(torch.device("cpu"), torch.float32, False)
        self.model = load_frozen(folder, mesh, None, ParallelArgs(), runtime, head="score")

    def __call__(self, texts, finished, functions=(), **flags):
        ids = encode_prompt("Question 1:", self.tokenizer)
        record = {"prompt": "Question 1:", "bonus": 5}
        prompts = [Prompt(ids, record, "Question 1:", "Question 1:", "a.jsonl:1")] * len(texts)
        rows = []
        for text, ended in zip(texts, finished):
            answer = self.tokenizer.encode("Question 1:" + text)[len(ids) :] + [self.tokenizer.eos_token_id] * ended
            rows.append(Example(ids + answer, [IGNORE_INDEX] * len(ids) + answer))
        models = self.tokenizer, self.reward, self.model
        scorer = Scorer(RewardArgs(**flags), *models, list(functions), self.split, Stop())
        for i, (prompt, text) in enumerate(zip(prompts, texts)):
            scorer.submit(i, prompt, text)
        self.given = scorer.score(prompts, rows, texts, finished)
        scorer.close()
        return rows, self.given.total, self.given.step_rewards


@torch.no_grad()
def hf_scores(folder, ids):
    """Returns transformers' score of every token."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, :, 0]


TEXTS, FINISHED = [" it is 3", " so 4 or more", ""], [True, False, True]


def test_scores_of_all_sources(folder, world, capsys):
    """Catches a score that is not the last token's, an EOS added to an answer that has none, normalisation after a
    penalty or of the functions' part, weights swapped, a penalty of the wrong sign or count, two functions of one name
    in one metric, a failed function that changes the score or the mean, and an async one that is not awaited."""
    scores_of = Scores(folder, world / "rm")
    assert scores_of.reward.same_tokenizer
    places = [f"{world / 'fn.py'}:reward", f"{world / 'fn.py'}:each", f"{world / 'more.py'}:each"]
    places += [f"{world / 'fn.py'}:soon", f"{world / 'fn.py'}:all_soon"]
    args = {
        "reward_fn": places,
        "reward_fn_weight": [0.5, 0.25, 2.0, 3.0, 4.0],
        "reward_model_weight": 2.0,
        "normalize_reward": True,
        "missing_eos_penalty": 3.0,
        "length_penalty": 0.25,
        "reward_workers": 1,
        "reward_error": "zero",
    }
    functions = rewards.load_reward_functions(RewardArgs(**args))
    rows, scores, steps = scores_of(TEXTS, FINISHED, functions, **args)
    config = json.loads((world / "rm/config.json").read_text())
    assert not steps.any()
    raws = []
    for row, text, ended, score in zip(rows, TEXTS, FINISHED, scores.tolist()):
        raws.append((hf_scores(world / "rm", row.input_ids)[-1].item() - config["reward_mean"]) / config["reward_std"])
        wanted = 2 * raws[-1] + 0.5 * (len(text) / 10 + 5) + 0.25 * (len(text) if ended else 0) + 2.0 * 7
        wanted += 3.0 * len("Question 1:") + 4.0 * 5 - 3.0 * (not ended) - 0.25 * row.num_targets
        assert score == pytest.approx(wanted, abs=1e-4)
    sources, metrics = scores_of.given.sources, rewards.source_metrics([scores_of.given])
    assert list(sources) == ["reward_model", "reward", "each", "each_2", "soon", "all_soon"]
    assert sources["reward_model"].tolist() == pytest.approx(raws, abs=1e-4)
    assert sources["each"].isnan().tolist() == [False, True, False]  # it raises for the second
    assert metrics["rewards/each/mean"] == (len(TEXTS[0]) + len(TEXTS[2])) / 2
    assert metrics["rewards/each/std"] == pytest.approx(torch.tensor([len(TEXTS[0]), 0.0]).std().item())
    assert (metrics["rewards/each/errors"], metrics["rewards/each/timeouts"]) == (1, 0)
    assert (metrics["rewards/each_2/mean"], metrics["rewards/each_2/std"], metrics["rewards/each_2/errors"]) == (
        7,
        0,
        0,
    )
    assert "--reward_fn: each gave an answer no grade: KeyError: 'more'" in capsys.readouterr().out
    assert set(metrics) == {f"rewards/{a}/{b}" for a in sources for b in ("mean", "std", "timeouts", "errors")}
    unset = {name: value for name, value in args.items() if name != "reward_error"}
    _, others, _ = scores_of(TEXTS, FINISHED, functions, **unset)
    assert others.isnan().tolist() == [False, True, False] and others[[0, 2]].equal(scores[[0, 2]])
    with pytest.raises(ValueError, match="--reward_fn: each gave an answer no grade: KeyError: 'more'; --reward_error"):
        scores_of(TEXTS, FINISHED, functions, **{**args, "reward_error": "refuse"})


def with_another_tokenizer(folder, copy):
    tiny.copy_to_edit(folder, copy)
    path = copy / "tokenizer.model"  # the same pieces, another file: only the comparison tells
    path.write_bytes(path.read_bytes() + b"\x1a\x00")  # an empty trainer_spec more
    return copy


def test_tokenizers_with_other_lengths(folder, world, tmp_path):
    """Catches a reward model that reads the text, and no critic made of it, only since its tokenizer.json was saved
    after training on padded, truncated rows; and another vocabulary taken for the policy's."""
    policy, rm = (tiny.copy_to_edit(path, tmp_path / path.name) for path in (folder, world / "rm"))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "it": 3, "is": 4}
    tokenizer = tokenizers.Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.save(str(policy / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    for _ in range(2):
        tokenizer.save(str(rm / "tokenizer.json"))
        assert frozen.open_reward_folder(rm, open_folder(policy), 1).same_tokenizer
        tokenizer.enable_padding(pad_token="</s>", pad_id=2)
    tokenizers.Tokenizer(WordLevel({**vocab, "is": 5}, unk_token="<unk>")).save(str(rm / "tokenizer.json"))
    assert not frozen.open_reward_folder(rm, open_folder(policy), 1).same_tokenizer


def shorten(folder):
    """Gives a model's folder a context of 16 tokens."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 16}))
    return folder


def test_another_tokenizer_gets_the_text(folder, world, tmp_path):
    """Catches the policy's ids given to a reward model whose ids mean something else."""
    other = with_another_tokenizer(world / "rm", tmp_path / "rm")
    scores_of = Scores(folder, other)
    assert not scores_of.reward.same_tokenizer
    _, scores, _ = scores_of(TEXTS, FINISHED)
    hf = Tokenizer(other)
    for text, ended, score in zip(TEXTS, FINISHED, scores.tolist()):
        ids = hf.encode("Question 1:" + text) + [hf.eos_token_id] * ended
        assert score == pytest.approx(hf_scores(other, ids)[-1].item(), abs=1e-5)


def test_another_format_gets_the_text(folder, world, tmp_path, capsys):
    """Catches the policy's ids given to a reward model that was trained on another chat template, or on texts with
    another beginning, though its tokenizer is the same; a model without a template that no chat can reach; and one
    refused for settings that are meant for the policy's template, or settings dropped without a word."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant:"
    other = template.replace(": ", "> ")
    policy = tiny.copy_to_edit(folder, tmp_path / "lm")
    tiny.write_tokenizer(policy, chat_template=template)
    prompts, texts = ["Question 1:", read_chat([{"role": "user", "content": "1"}])], [" it is 3"] * 2
    rows = [encode_generated(prompt, " it is 3", Tokenizer(policy), finished=True) for prompt in prompts]
    rows = [Example(ids, [IGNORE_INDEX] * (len(ids) - 1) + ids[-1:]) for ids in rows]
    formats = {"same": {"chat_template": template}, "none": {}, "other": {"chat_template": other}}
    formats["no_bos"] = {"chat_template": template, "add_bos_token": False}
    for name, config in formats.items():
        tiny.write_tokenizer(tiny.copy_to_edit(world / "rm", tmp_path / name), **config)
        reward = frozen.open_reward_folder(tmp_path / name, open_folder(policy), 1)
        found, _ = rewards.rows_it_reads(reward, prompts, rows, texts, [True, True])
        wanted, own = [row.input_ids for row in rows], Tokenizer(tmp_path / name)
        if name == "other":
            wanted[1] = [*own.encode("user> 1\nassistant: it is 3", False), own.eos_token_id]
        if name == "no_bos":
            wanted[0] = wanted[0][1:]
        assert [row.input_ids for row in found] == wanted, name
        data = SimpleNamespace(train=[SimpleNamespace(asked=prompt, where="x:1") for prompt in prompts], held_out=())
        frozen.check_readable(reward, data)
        if name == "other":
            chat = prompts[1].messages
            data.train[1].asked = read_chat(chat, {"chat_template_kwargs": {"a": 1}})
            for _ in range(2):
                frozen.check_readable(reward, data)
            assert (
                capsys.readouterr().out.count("'a' of chat_template_kwargs is ignored, which the reward model's") == 1
            )
            again, _ = rewards.rows_it_reads(reward, [data.train[1].asked], rows[1:], texts[1:], [True])
            assert again[0].input_ids == wanted[1]
            with pytest.raises(ValueError, match="does not read 'a'"):  # the policy
                encode_prompt(data.train[1].asked, Tokenizer(policy))
            data.train[1].asked = read_chat(chat, {"tools": [{"name": "f"}]})
            with pytest.raises(ValueError, match="the reward model cannot read the chat of x:1: tools: the chat"):
                frozen.check_readable(reward, data)


def test_the_end_that_a_reward_model_reads(folder, world, tmp_path):
    """Catches a reward model that reads the policy's end in place of the token that ended the answers of its training,
    two rows for one text because two tokens, or a --stop, ended it, and equal templates taken for one format though
    they write different tokens. score.py's rows decide; in a chat without own template those of the policy."""
    turn = "{% for m in messages %}{{ m.role + ': ' + m.content }}END{% endfor %}"
    turn += "{% if add_generation_prompt %}assistant:{% endif %}"
    policy, text = tiny.copy_to_edit(folder, tmp_path / "lm"), " it is 3"
    (policy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 300]}))
    chat = [{"role": "user", "content": "1"}]
    cases = {"own": ("</s>", True), "none": ("</s>", False), "mentioned": ("{{ eos_token }}", True)}
    for name, (end, has_own) in cases.items():
        template = {"chat_template": turn.replace("END", end)}
        tiny.write_tokenizer(policy, **template)
        rm = tiny.copy_to_edit(world / "rm", tmp_path / name)
        tiny.write_tokenizer(rm, eos_token="<s>", **(template if has_own else {}))
        reward = frozen.open_reward_folder(rm, open_folder(policy), 1)
        assert reward.same_tokenizer and reward.same_bos and reward.same_template == (name != "mentioned")
        for asked in ("Question 1:", chat):
            prompt, theirs = asked if isinstance(asked, str) else read_chat(asked), reward.policy
            ids = encode_prompt(prompt, theirs)
            drawn = [[*encode_generated(prompt, text, theirs, finished=False), i] for i in (2, 300)]
            drawn.append(encode_generated(prompt, text + " so", theirs, finished=False))  # --stop " so"
            rows = [Example(row, [IGNORE_INDEX] * len(ids) + row[len(ids) :]) for row in drawn]
            found, _ = rewards.rows_it_reads(reward, [prompt] * 3, rows, [text] * 3, [True] * 3)
            record = Record("", {"prompt": asked, "output": text, "finish_reason": "stop"})
            [wanted], _ = encode_to_score(record, None, Tokenizer(rm if has_own or asked != chat else policy))
            assert [row.input_ids for row in found] == [wanted.input_ids] * 3, (name, asked)


@pytest.mark.parametrize("how", ["min", "prod", "last", "mean", "steps"])
def test_process_rewards(how, folder, world, tmp_path):
    """Catches steps scored or rewarded at other tokens than those that end them, logits taken for probabilities,
    another aggregate, and a reward function that is ignored beside them."""
    process = tmp_path / "rm"
    tiny.copy_to_edit(world / "rm", process)
    path = process / "config.json"
    process_keys = {"reward_model_type": "process", "step_separator": "\n"}
    path.write_text(json.dumps(json.loads(path.read_text()) | process_keys))
    scores_of = Scores(folder, process)
    texts, finished = [" it is 3\n so 4\n or more", " it is 3\n"], [True, False]
    rows, scores, steps = scores_of(texts, finished, process_reward=how, reward_model_weight=2.0)
    prompt_ids = encode_prompt("Question 1:", scores_of.tokenizer)
    newline = scores_of.tokenizer.encode("a\n")[-1]
    for i, (row, text) in enumerate(zip(rows, texts)):
        answer = row.input_ids[len(prompt_ids) :]
        ends = [j for j, token in enumerate(answer) if token == newline]
        ids = row.input_ids[: len(row.input_ids) - finished[i]]
        ids = ids if text.endswith("\n") else [*ids, newline]
        probs = hf_scores(process, ids)[[j for j, token in enumerate(ids) if token == newline]].sigmoid()
        if how == "steps":
            wanted = torch.zeros(steps.shape[1])
            places = ends if text.endswith("\n") else [*ends, len(answer) - 1 - finished[i]]
            wanted[places] = 2 * probs
            torch.testing.assert_close(steps[i], wanted, rtol=1e-5, atol=1e-6)
            assert scores[i] == 0
        else:
            wanted = {"min": probs.min(), "prod": probs.prod(), "last": probs[-1], "mean": probs.mean()}[how]
            assert scores[i].item() == pytest.approx(2 * wanted.item(), rel=1e-5) and not steps.any()
    args = {"reward_fn": [f"{world / 'more.py'}:each"], "reward_fn_weight": [0.5], "reward_workers": 1}
    args |= {"process_reward": how, "reward_model_weight": 2.0}
    _, beside, _ = scores_of(texts, finished, rewards.load_reward_functions(RewardArgs(**args)), **args)
    torch.testing.assert_close(beside, scores + 0.5 * 7, rtol=1e-5, atol=1e-6)
