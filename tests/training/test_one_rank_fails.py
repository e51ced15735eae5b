"""A failure that only one of the data-parallel ranks sees, in the rollout that they share, and ranks whose flags or
files differ."""

import shutil

import torch

from tests import tiny
from tests.inference.test_score import write_reward_model
from tests.ranks import launch


def test_a_policy_that_breaks_on_one_rank(tmp_path):
    """Catches a rank that ends alone because its answers are NaN: the other one waited for it forever, or ended with
    the traceback of a lost connection, and both lost the training since the last checkpoint."""
    model = tiny.write_model(tmp_path / "lm", num_hidden_layers=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[3 + ord("Z")] = torch.nan  # the byte's token, after <unk>, <s> and </s>
    model.save_pretrained(tmp_path / "lm")
    tiny.write_records(tmp_path / "prompts.jsonl", [{"prompt": f"{i} plus" + "Z" * (i == 2)} for i in range(4)])
    (tmp_path / "fn.py").write_text("def fn(prompts, completions, examples): return [0.0] * len(prompts)\n")
    flags = ["--checkpoint_path", tmp_path / "lm", "--prompt_file", tmp_path / "prompts.jsonl", "--max_new_tokens", 3]
    flags += ["--reward_fn", f"{tmp_path / 'fn.py'}:fn", "--rollout_batch_size", 8, "--num_generations", 2]
    flags += ["--output_dir", tmp_path / "out", "--total_steps", 2]
    printed = launch(2, [["refused", "training.train_grpo", *flags]])
    assert printed.count("prompts.jsonl:3: the log-probability of a token is nan") == 2, printed


def test_nodes_that_differ(tmp_path):
    """Catches nodes that train, sample or score together from other models, data or flags, of which the saved model or
    the output says nothing; and a refusal of a path that differs from node to node and holds the same content, or of
    another cache or number of processes."""
    tiny.write_model(tmp_path / "lm", num_hidden_layers=1)
    write_reward_model(tmp_path / "rm", num_hidden_layers=1)
    for rank in (0, 1):
        node = tmp_path / f"node-{rank}"
        node.mkdir()
        shutil.copytree(tmp_path / "lm", node / f"lm-{rank}")
        tiny.write_records(node / "same.jsonl", [{"prompt": "a", "completion": "b"}])
        tiny.write_records(node / "other.jsonl", [{"prompt": f"{rank}", "completion": "b"}])
    shared = ["--max_new_tokens", 2, "--output_file", tmp_path / "out.jsonl"]
    sft = ["training.finetune_sft", "--checkpoint_path", "lm-{rank}", "--output_dir", tmp_path / "run"]
    sft += ["--data_cache", "cache-{rank}", "--data_workers", "{rank}1"]
    jobs = {
        "other content of --train_file": [*sft, "--train_file", "other.jsonl"],
        "another --learning_rate": [*sft, "--train_file", "same.jsonl", "--learning_rate", "0.{rank}1"],
        "other content of --prompt_file": ["inference.generate", "--prompt_file", "other.jsonl", *shared],
        "other content of --data_file": ["inference.score", "--data_file", "other.jsonl", *shared[2:]],
    }
    jobs["other content of --prompt_file"] += ["--checkpoint_path", "lm-{rank}"]
    jobs["other content of --data_file"] += ["--checkpoint_path", tmp_path / "rm"]
    printed = launch(2, [["refused", "elsewhere", tmp_path, *job] for job in jobs.values()]).splitlines()
    for what in jobs:
        assert (
            sum(line.startswith("refused: rank 1 on ") and f" has {what} than rank 0" in line for line in printed) == 2
        )
    assert not list(tmp_path.glob("run/*")) and not (tmp_path / "out.jsonl").exists()
