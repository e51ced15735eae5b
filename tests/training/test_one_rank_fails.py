"""A failure that only one of the data-parallel ranks sees, in the rollout that they share."""

import torch

from tests import tiny
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
