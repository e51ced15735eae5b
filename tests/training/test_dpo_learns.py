"""training/train_dpo.py on a task whose optimal policy is known.

The answers to the one prompt are all strings of at most two of six letters, each with a reward r. The Bradley-Terry
model picks the preferred answer of a pair. The optimum is pi* = ref exp(r / beta) / Z, and the regret of a policy pi,
J(pi*) - J(pi) with J(pi) = E r - beta KL(pi | ref), is beta KL(pi | pi*) (Rafailov et al. 2023), however pairs are
sampled. Here sampling is uniform: of 24,576 pairs from the reference, so few hold rare answers that their best fit, all
log-ratios free, is farther from pi* than the reference; the best fit of 8,192 uniform pairs has 0.6 to 2.1 % of its
regret (three seeds).
"""

import itertools

import pytest
import tokenizers
import torch
import transformers

from models.records import Example
from tests import tiny
from training import train_dpo

LETTERS = "abcdef"
ANSWERS = ["".join(letters) for n in range(3) for letters in itertools.product(LETTERS, repeat=n)]
BETA = 0.5
NUM_PAIRS = 8192


def write_letters(folder, seed):
    """Writes a tokenizer with a token for each letter, and a random model."""
    pieces = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", "?", *LETTERS])}
    shape = {"vocab_size": len(pieces), "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1}
    shape |= {"max_position_embeddings": 8}
    tiny.write_model(folder, seed=seed, std=0.08, **shape)
    (folder / "tokenizer.model").unlink()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=pieces, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return pieces


def answer_logps(folder, pieces):
    """Returns the log-prob of each answer, EOS included, from transformers; normalised over the answers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [[pieces["?"], *(pieces[letter] for letter in answer), pieces["</s>"]] for answer in ANSWERS]
    ids = torch.tensor([row + [0] * (4 - len(row)) for row in rows])
    with torch.no_grad():
        logps = model(ids).logits[:, :-1].log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    places = torch.arange(3) < torch.tensor([len(row) - 1 for row in rows])[:, None]
    return (logps * places).double().sum(dim=1).log_softmax(dim=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("letters"), 0)


def make_world(root, seed):
    """Returns (a random model, reference and start; its letters; a file of pairs; log pi*; the reference's regret)."""
    pieces = write_letters(root / "model", seed)
    reference = answer_logps(root / "model", pieces)
    generator = torch.Generator().manual_seed(1 + seed)
    rewards = torch.randn(len(ANSWERS), generator=generator).double()
    pairs = torch.randint(len(ANSWERS), (NUM_PAIRS, 2), generator=generator)
    wins = torch.rand(NUM_PAIRS, generator=generator) < (rewards[pairs[:, 0]] - rewards[pairs[:, 1]]).sigmoid()
    pairs = torch.where(wins[:, None], pairs, pairs.flip(1))
    records = [{"prompt": "?", "chosen": ANSWERS[c], "rejected": ANSWERS[r]} for c, r in pairs.tolist()]
    best = (reference + rewards / BETA).log_softmax(dim=0)
    return root / "model", pieces, tiny.write_records(root / "pairs.jsonl", records), best, regret(reference, best)


def regret(policy, best):
    return BETA * (policy.exp() * (policy - best)).sum().item()


def regret_of_training(world, out, *more):
    """Returns the trained policy's regret as a share of the reference's."""
    folder, pieces, train_file, best, of_reference = world
    flags = ["--checkpoint_path", folder, "--train_file", train_file, "--output_dir", out, "--beta", BETA]
    flags += ["--batch_size", 128, "--learning_rate", 2e-3, "--num_epochs", 3, "--max_grad_norm", 10, *more]
    result = tiny.run("training/train_dpo.py", *flags)
    assert result.code == 0, result.stderr
    found = regret(answer_logps(out, pieces), best) / of_reference
    print(f"regret {found:.4f}")
    return found


def test_it_reaches_the_optimum(world, tmp_path):
    """Catches mistakes that leave the loss curve good but the policy bad: a wrong beta, a reference that changes,
    tokens left out of the log-prob sums."""
    assert regret_of_training(world, tmp_path / "out") < 0.05


def test_eos_must_be_in_the_sum(world, tmp_path, monkeypatch):
    """Catches a regret that does not show the classic mistake, EOS left out of the sums (the loss looks as good): after
    one epoch of half of the pairs it is 0.84, and 0.21 without the mistake."""
    folder, pieces, train_file, *more = world
    half = tiny.write_records(tmp_path / "pairs.jsonl", tiny.read_lines(train_file)[: NUM_PAIRS // 2])
    real = train_dpo.pair_rows
    without_eos = lambda pairs: [Example(row.input_ids, [*row.labels[:-1], -100]) for row in real(pairs)]  # noqa: E731
    monkeypatch.setattr(train_dpo, "pair_rows", without_eos)
    assert regret_of_training((folder, pieces, half, *more), tmp_path / "out", "--num_epochs", 1) > 0.3


def test_adapters_reach_the_optimum(world, tmp_path):
    """Catches a reference with the adapters on, and adapters exported differently from how they were trained. Of rank
    8, below a frozen head, they end at 1.9 % of the reference's regret on this seed, at 5.8 and 18 % on seeds 1 and 2;
    with 24 epochs in batches of 512 at 1.9, 1.1 and 4.5 %."""
    flags = ["--lora_r", 8, "--learning_rate", 5e-3, "--adam_beta2", 0.99]
    assert regret_of_training(world, tmp_path / "out", *flags) < 0.05
