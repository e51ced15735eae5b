"""A task with a known optimum: all 111 answers to a prompt can be enumerated, so that the regret J* - J(pi) = beta
KL(pi || pi*) of a trained policy is exact, with pi* = pi_ref exp(r / beta) / Z. transformers computes the probabilities
from the exported folder."""

import itertools
import json
import random

import tokenizers
import torch
import transformers

from tests import tiny

LETTERS, MOST = "abcdefghij", 2  # answers of up to 2 letters; those of 2 letters end at the token limit, without EOS
ANSWERS = ["".join(word) for length in range(MOST + 1) for word in itertools.product(LETTERS, repeat=length)]
PROMPTS = ("bca",)
BETA, TEMPERATURE = 0.5, 0.7


def write_letters(folder, seed, head_scale=0.1, **shape):
    """Writes a random model whose vocabulary is the letters and EOS. head_scale scales its head, which must be able to
    give the optimum's logits even if it is frozen."""
    vocab = {piece: i for i, piece in enumerate([*LETTERS, "</s>"])}
    usual = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}  # width costs less than depth here
    shape = {**usual, **shape, "vocab_size": len(vocab), "bos_token_id": None}
    model = tiny.write_model(folder, seed=seed, std=0.3, eos_token_id=vocab["</s>"], **shape)
    model.lm_head.weight.data *= head_scale  # contexts differ, but no answer is too rare to ever be sampled
    model.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)


def write_task(root, seed, reward_scale=1.0, **model):
    """Writes the reference, the prompts and the reward function of a task: {prompt: {answer: reward}}."""
    write_letters(root / "ref", seed, **model)
    rng = random.Random(seed)
    table = {prompt: {answer: reward_scale * rng.gauss(0, 1) for answer in ANSWERS} for prompt in PROMPTS}
    (root / "table.json").write_text(json.dumps(table))
    (root / "reward.py").write_text(
        "import json\nfrom pathlib import Path\n\n"
        "TABLE = json.loads(Path(__file__).with_name('table.json').read_text())\n\n\n"
        "def reward(prompts, completions, examples):\n"
        "    return [TABLE[prompt][completion] for prompt, completion in zip(prompts, completions)]\n"
    )
    tiny.write_records(root / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return table


@torch.no_grad()
def log_probs(folder, temperature=TEMPERATURE):
    """Returns log pi(answer | prompt) in fp64: [prompts, answers]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    eos, found = len(LETTERS), []
    for prompt in PROMPTS:
        ids = [[LETTERS.index(letter) for letter in prompt + answer] for answer in ANSWERS]
        rows = torch.tensor([row + [eos] * (len(prompt) + MOST - len(row)) for row in ids])
        logps = (model(rows).logits.double() / temperature).log_softmax(-1)[:, len(prompt) - 1 : -1]
        logps = logps.gather(-1, rows[:, len(prompt) :, None])[..., 0]
        lengths = torch.tensor([min(len(answer) + 1, MOST) for answer in ANSWERS])  # EOS included where it fits
        found.append((logps * (torch.arange(MOST) < lengths[:, None])).sum(1))
    logps = torch.stack(found)
    assert torch.allclose(logps.exp().sum(1), torch.ones(len(PROMPTS), dtype=torch.float64), atol=1e-5)
    return logps


def optimum(reference, table):
    """Returns (log pi*, J*) of each prompt."""
    rewards = torch.tensor([[table[prompt][answer] for answer in ANSWERS] for prompt in PROMPTS], dtype=torch.float64)
    scores = log_probs(reference) + rewards / BETA
    return scores.log_softmax(1), BETA * scores.logsumexp(1)


def regret(folder, best):
    logps = log_probs(folder)
    return BETA * (logps.exp() * (logps - best)).sum(1).mean().item()


def relative_regret(root, out, table):
    best, _ = optimum(root / "ref", table)
    return regret(out, best) / regret(root / "ref", best)


def train(script, root, out, **settings):
    """Runs a trainer on the task of write_task; returns the lines of metrics.jsonl."""
    given = {"checkpoint_path": root / "ref", "prompt_file": root / "prompts.jsonl", "output_dir": out}
    given |= {"reward_fn": f"{root / 'reward.py'}:reward", "max_new_tokens": MOST, **settings}
    flags = [part for name, v in given.items() for part in ([f"--{name}"] if v is True else [f"--{name}", v])]
    result = tiny.run(script, *flags)
    assert result.code == 0, result.stderr
    return tiny.read_lines(out / "metrics.jsonl")
