"""training/train_ppo.py on modular addition, with --reward_fn: 1 for a right answer, 0 for a wrong one.

With this reward, pi* = pi_ref exp(r / beta) / Z needs only the reference's probability of being right: the optimum is
right with probability acc e^(1/beta) / (acc e^(1/beta) + 1 - acc) on a prompt where the reference is right with acc. An
answer is one token and EOS, so transformers computes both probabilities exactly, without sampling.
"""

import math

import tokenizers
import torch
import transformers

from tests import tiny

MODULUS = 7
DIGITS = "0123456"
PIECES = {piece: i for i, piece in enumerate([*DIGITS, "+", "=", "</s>", "<s>"])}
PROMPTS = [f"{a}+{b}=" for a in range(MODULUS) for b in range(MODULUS)]
BETA = 0.5
REWARD = f"""
def right(prompts, completions, examples):
    sums = [sum(map(int, prompt[:-1].split("+"))) % {MODULUS} for prompt in prompts]
    return [float(completion == str(total)) for completion, total in zip(completions, sums)]
"""


def answer(prompt):
    return str(sum(map(int, prompt[:-1].split("+"))) % MODULUS)


def write_reference(root, seed):
    """Writes a model that was briefly fine-tuned on the sums."""
    shape = {"vocab_size": len(PIECES), "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 16}
    shape |= {"num_hidden_layers": 1}
    tokens = {"bos_token_id": PIECES["<s>"], "eos_token_id": PIECES["</s>"]}
    tiny.write_model(root / "model", seed=seed, std=0.1, **shape, **tokens)
    (root / "model/tokenizer.model").unlink()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=PIECES, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    fast.save_pretrained(root / "model")
    records = [{"prompt": prompt, "completion": answer(prompt)} for prompt in PROMPTS]
    tiny.write_records(root / "sums.jsonl", records)
    flags = {"checkpoint_path": root / "model", "train_file": root / "sums.jsonl", "output_dir": root / "ref"}
    flags |= {"batch_size": 49, "learning_rate": 3e-3, "num_epochs": 40, "max_steps": 11, "seed": seed}
    run("training/finetune_sft.py", flags)


def run(script, flags):
    result = tiny.run(script, *(part for name, value in flags.items() for part in (f"--{name}", value)))
    assert result.code == 0, result.stderr


@torch.no_grad()
def accuracy(folder):
    """Returns the probability of the right answer and EOS for each prompt, in fp64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = torch.tensor([[PIECES[c] for c in prompt + answer(prompt)] + [PIECES["</s>"]] for prompt in PROMPTS])
    logps = model(rows).logits.double().log_softmax(-1)[:, -3:-1].gather(-1, rows[:, -2:, None])
    return logps[..., 0].sum(1).exp()


def test_predicted_accuracy(tmp_path):
    """Catches a reward, a KL or a weight that differs from the flags: each leads to another accuracy, however well the
    policy learns, and learning too well ends at 1."""
    write_reference(tmp_path, 0)
    (tmp_path / "reward.py").write_text(REWARD)
    flags = {"checkpoint_path": tmp_path / "ref", "prompt_file": tmp_path / "sums.jsonl", "seed": 0}
    flags |= {"reward_fn": f"{tmp_path / 'reward.py'}:right", "output_dir": tmp_path / "out", "kl_coef": BETA}
    flags |= {"max_new_tokens": 2, "total_steps": 18, "rollout_batch_size": 245, "lam": 1, "cliprange_value": 0}
    flags |= {"learning_rate": 1.5e-3, "value_learning_rate": 3e-3, "adam_beta2": 0.99}
    run("training/train_ppo.py", flags)

    before, found = accuracy(tmp_path / "ref"), accuracy(tmp_path / "out")
    assert 0.2 < before.mean() < 0.6 and before.min() < 0.15 and before.max() > 0.7
    tilted = before * math.exp(1 / BETA)
    wanted = tilted / (tilted + 1 - before)
    off = (found - wanted).abs()
    print(f"reference {before.mean():.4f}, predicted {wanted.mean():.4f}, found {found.mean():.4f}", end=", ")
    print(f"a prompt off by {off.mean():.4f}, at most {off.max():.4f}")
    assert abs(found.mean() - wanted.mean()) < 0.04 and off.mean() < 0.06  # with half or twice the KL it is 0.15 away
