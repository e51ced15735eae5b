"""Writes a toy world to try everything on, without any download: a small model, a tokenizer, problems to learn from.

The task is to add up a row of digits: one line for each addition, with the running sum, then the answer alone:

    prompt      7+5+9+4          completion   7+5=12          the careless clerk's          7+5=2
                                              12+9=21                                       2+9=11
                                              21+4=25                                       11+4=15
                                              25                                            15

- demonstrations of mixed quality: most of train.jsonl is by a simulated clerk who hardly ever carries (CARELESS,
  FORGETS). A model fine-tuned on it mostly imitates him, which leaves room for the later stages: a reward model learns
  which answers are right, and best of n, DPO and PPO use it
- easy to hard: rows of 2 to 6 digits; long rows are rare in train.jsonl and common in heldout.jsonl
- each line can be checked by itself (`step_labels`), and so can the answer (`correct`, a reward function)
- the same seed writes the same bytes

    python scripts/toy.py --output_dir runs/toy               writes model/, train.jsonl, heldout.jsonl, prompts.jsonl
    python scripts/toy.py --output_dir runs/toy --score F     prints the accuracy of generate.py's samples F
    python scripts/toy.py --samples F --pairs_file P --steps_file S
                                                              writes records for reward models and DPO from samples F
"""

import io
import itertools
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]
from models.common import at_least_one, flag, non_negative, refuse_idle
from models.config import ModelConfig
from models.export import save_folder
from models.files import naming_file
from models.model import Transformer
from models.records import get_field, read_records
from models.script import run_script
from models.shared import check_writable

# {difficulty: share of the problems}; the difficulty is the number of terms
TRAIN_MIX = {2: 0.2, 3: 0.25, 4: 0.25, 5: 0.2, 6: 0.1}
HELDOUT_MIX = {4: 0.3, 5: 0.4, 6: 0.3}
CARELESS, FORGETS = 0.6, 0.9  # the careless clerk's share of the demonstrations; how often he forgets a carry
CHARACTERS = "0123456789+="  # the tokenizer also has every byte; a newline is the byte <0x0A>, as in LLaMA
UNK, BOS, EOS, PAD = range(4)


# --- the task: pure functions of text ---------------------------------------------------------------------------------


def make_problem(rng: random.Random, num_terms: int) -> tuple[int, ...]:
    return tuple(rng.randint(1, 9) for _ in range(num_terms))


def prompt_of(terms: Sequence[int]) -> str:
    return "+".join(map(str, terms)) + "\n"


def terms_of(prompt: str) -> tuple[int, ...]:
    """Returns the terms of a prompt. Raises ValueError if it is not one of this toy's prompts."""
    if not re.fullmatch(r"[1-9](\+[1-9])+\n?", prompt):
        raise ValueError(f"not a problem of this toy: {prompt!r}")
    return tuple(map(int, prompt.split("+")))


def solution_steps(terms: Sequence[int]) -> list[str]:
    """Returns the lines of the worked solution: one for each addition, then the sum."""
    sums = list(itertools.accumulate(terms))
    steps = [f"{before}+{term}={after}" for before, term, after in zip(sums, terms[1:], sums[1:], strict=False)]
    return [*steps, str(sums[-1])]


def solution(terms: Sequence[int]) -> str:
    return "\n".join(solution_steps(terms))


def careless_solution(terms: Sequence[int], rng: random.Random) -> str:
    """Returns the careless clerk's solution: he forgets most carries, which leaves the tens unchanged, and continues
    from the wrong sum."""
    total, steps = terms[0], []
    for term in terms[1:]:
        carries = total % 10 + term >= 10
        after = total + term - (10 if carries and rng.random() < FORGETS else 0)
        steps.append(f"{total}+{term}={after}")
        total = after
    return "\n".join([*steps, str(total)])


def final_answer(text: str) -> str | None:
    """Returns the number on the last line, as a string without leading zeros; None if that line is not a number."""
    line = text.strip().split("\n")[-1]
    return str(int(line)) if re.fullmatch(r"[0-9]+", line) else None


def is_correct(completion: str, answer: int | str) -> bool:
    """Whether the final answer is right, whatever the lines before it."""
    return final_answer(completion) == str(answer)


def step_labels(prompt: str, completion: str) -> list[int]:
    """Returns a 0/1 label for each line of a completion, for process rewards: 1 if the worked solution has the line at
    this place, whatever the lines before it."""
    right = solution_steps(terms_of(prompt))
    lines = completion.rstrip("\n").split("\n")
    return [int(i < len(right) and line == right[i]) for i, line in enumerate(lines)]


def correct(prompts: list[str], completions: list[str], examples: list[dict]) -> list[float]:
    """Reward function (--reward_fn scripts/toy.py:correct): 1.0 for a right final answer, else 0.0."""
    return [
        float(is_correct(completion, example["answer"]))
        for completion, example in zip(completions, examples, strict=True)
    ]


# --- writing the world ------------------------------------------------------------------------------------------------


def sample_problems(
    rng: random.Random, mix: dict[int, float], number: int, *, taken: set, repeats: bool
) -> list[tuple[int, ...]]:
    """Draws `number` problems in random order with the shares of `mix`, none of them in the set `taken`.

    repeats: whether a problem may be drawn twice; if not, the problems drawn are added to `taken`.
    """
    counts = {num_terms: int(share * number) for num_terms, share in mix.items()}
    counts[max(mix)] += number - sum(counts.values())
    problems = []
    for num_terms, count in counts.items():
        if not repeats and count > 9**num_terms // 2:
            raise ValueError(f"{number} problems: too few have {num_terms} terms; ask for fewer problems")
        while count:
            problem = make_problem(rng, num_terms)
            if problem not in taken:
                problems.append(problem)
                count -= 1
                if not repeats:
                    taken.add(problem)
    rng.shuffle(problems)
    return problems


def record(terms: Sequence[int], completion: str | None = None) -> dict:
    fields = {"prompt": prompt_of(terms)} | ({} if completion is None else {"completion": completion})
    return {**fields, "answer": str(sum(terms)), "difficulty": len(terms)}


def demonstration(terms: Sequence[int], rng: random.Random) -> str:
    return careless_solution(terms, rng) if rng.random() < CARELESS else solution(terms)


def write_jsonl(path: Path, records: list[dict]) -> None:
    with naming_file(path):
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def train_tokenizer() -> bytes:
    """Returns a sentencepiece model like LLaMA's, as bytes: BPE, no normalisation, single digits, byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(CHARACTERS)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=4 + 256 + len(CHARACTERS) + 1,  # specials, bytes, the characters, the space
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_model(folder: Path, seed: int) -> Transformer:
    """Writes and returns a randomly initialised LLaMA of 1.1 M parameters, with its tokenizer."""
    tokenizer = train_tokenizer()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sentencepiece.SentencePieceProcessor(model_proto=tokenizer).get_piece_size(),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
    }
    model = Transformer(ModelConfig.from_hf(config))
    model.init_weights(torch.Generator().manual_seed(seed % 2**63))
    save_folder(folder, model.state_dict().items(), config=config)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **tokens,
    }
    (folder / "tokenizer.model").write_bytes(tokenizer)
    for name, content in (
        ("tokenizer_config.json", tokenizer_config),
        ("special_tokens_map.json", tokens),
        ("generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return model


def write_world(folder: Path, *, seed: int, num_train: int, num_heldout: int, num_prompts: int) -> None:
    """Writes model/ and three files of problems. No problem is in two files; train.jsonl may repeat its own."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir {folder}: exists; take another")
    check_writable(folder, f"--output_dir {folder}")
    taken = set()
    rng = {name: random.Random(f"{name} {seed}") for name in ("heldout", "prompts", "train")}
    heldout = sample_problems(rng["heldout"], HELDOUT_MIX, num_heldout, taken=taken, repeats=False)
    prompts = sample_problems(rng["prompts"], HELDOUT_MIX, num_prompts, taken=taken, repeats=False)
    train = sample_problems(rng["train"], TRAIN_MIX, num_train, taken=taken, repeats=True)
    files = {
        "heldout": [record(terms, solution(terms)) for terms in heldout],
        "prompts": [record(terms) for terms in prompts],
        "train": [record(terms, demonstration(terms, rng["train"])) for terms in train],
    }

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "num_train": num_train, "num_heldout": num_heldout, "num_prompts": num_prompts}
    write_jsonl(folder / "toy.json", [settings])
    for name, records in files.items():
        write_jsonl(folder / f"{name}.jsonl", records)
        print(f"{folder}/{name}.jsonl: {len(records)} problems, e.g. {json.dumps(records[0])}")
    model = write_model(folder / "model", seed)
    print(f"{folder}/model: LLaMA with {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M random parameters")


# --- scoring samples of generate.py -----------------------------------------------------------------------------------


def score(output_file: Path, heldout_file: Path, *, num_shown: int) -> None:
    """Prints the accuracy of all samples, overall and by difficulty, and at most `num_shown` of them."""
    examples = {get_field(record, "prompt"): record.fields for record in read_records(heldout_file)}
    lines = read_records(output_file)
    for line in lines:
        get_field(line, "output")
        if get_field(line, "prompt") not in examples:
            raise ValueError(f"{line.where}: prompt {line.fields['prompt']!r} is not in {heldout_file}")
    samples = [line.fields for line in lines]
    matched = [examples[sample["prompt"]] for sample in samples]
    rewards = correct([s["prompt"] for s in samples], [s["output"] for s in samples], matched)
    by_difficulty = {}
    for reward, example in zip(rewards, matched, strict=True):
        by_difficulty.setdefault(example["difficulty"], []).append(reward)
    for i in range(0, len(samples), -(-len(samples) // num_shown)) if num_shown else ():
        verdict = "right" if rewards[i] else f"wrong, it is {matched[i]['answer']}"
        print(f"  {samples[i]['prompt'].strip()} -> {samples[i]['output'].strip()[:120]!r} ({verdict})")
    parts = ", ".join(f"{d} terms {sum(r) / len(r):.1%}" for d, r in sorted(by_difficulty.items()))
    print(f"accuracy {sum(rewards) / len(rewards):.1%} of {len(rewards)} samples ({parts})")


# --- records for reward models and DPO --------------------------------------------------------------------------------


def judged_samples(samples_file: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Returns {prompt: (right outputs, wrong outputs)} of generate.py's lines, without duplicates. A sample cut at the
    token limit is left out, since its end is missing."""
    judged = {}
    for line in read_records(samples_file):
        prompt, output = get_field(line, "prompt"), get_field(line, "output")
        right, wrong = judged.setdefault(prompt, ([], []))
        outputs = right if is_correct(output, sum(terms_of(prompt))) else wrong
        if line.fields.get("finish_reason") != "length" and output not in outputs:
            outputs.append(output)
    return judged


def pairs_of(judged: dict[str, tuple[list[str], list[str]]]) -> list[dict]:
    """Pairs right with wrong samples of the same prompt; a sample is in at most one pair."""
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, (right, wrong) in judged.items()
        for chosen, rejected in zip(right, wrong, strict=False)
    ]


def steps_of(judged: dict[str, tuple[list[str], list[str]]]) -> list[dict]:
    """Returns the lines of every sample, each with a 0/1 label."""
    return [
        {"prompt": prompt, "completions": output.rstrip("\n").split("\n"), "labels": step_labels(prompt, output)}
        for prompt, outputs in judged.items()
        for output in itertools.chain(*outputs)
        if all(line.strip() for line in output.rstrip("\n").split("\n"))
    ]


def write_judged(samples_file: Path, pairs_file: Path | None, steps_file: Path | None) -> None:
    judged = judged_samples(samples_file)
    for path, records in ((pairs_file, pairs_of(judged)), (steps_file, steps_of(judged))):
        if path is not None:
            if not records:
                raise ValueError(f"{samples_file}: no record for {path.name}: all samples are right, or all are wrong")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, records)
            print(f"{path}: {len(records)} records from {len(judged)} prompts")


@dataclass(frozen=True, kw_only=True)
class ToyArgs:
    """Writes a toy world without any download: a model, a tokenizer, problems to learn from."""

    output_dir: Path = flag(Path("runs/toy"), help="folder to write; with --score, folder with heldout.jsonl")
    seed: int = flag(0, help="seed of the weights and the problems")
    num_train: int = flag(25600, bounds=at_least_one, help="demonstrations in train.jsonl")
    num_heldout: int = flag(300, bounds=at_least_one, help="worked problems in heldout.jsonl, to measure with")
    num_prompts: int = flag(1000, bounds=at_least_one, help="unsolved problems in prompts.jsonl, for rewards, DPO, PPO")
    score: Path | None = flag(None, help="print the accuracy of this output file of generate.py, and write nothing")
    samples: Path | None = flag(None, help="output file of generate.py to make --pairs_file or --steps_file from")
    pairs_file: Path | None = flag(None, help="file to write: pairs of right and wrong samples, for train_rm and DPO")
    steps_file: Path | None = flag(None, help="file to write: lines of the samples with labels, for process models")
    num_shown: int = flag(6, bounds=non_negative, help="with --score: samples to print")


def main(args: ToyArgs) -> None:
    if args.score is None:
        refuse_idle(args, "without --score", "num_shown")
    if args.score is not None or args.samples is not None:
        refuse_idle(args, "with --score or --samples", "seed", "num_train", "num_heldout", "num_prompts")
    if args.samples is None:
        refuse_idle(args, "without --samples", "pairs_file", "steps_file")
    elif args.score is not None:
        raise ValueError("give either --score or --samples")
    elif args.pairs_file is None and args.steps_file is None:
        raise ValueError("--samples needs a --pairs_file or a --steps_file to write")
    if args.samples is not None:
        write_judged(args.samples, args.pairs_file, args.steps_file)
    elif args.score is not None:
        score(args.score, args.output_dir / "heldout.jsonl", num_shown=args.num_shown)
    else:
        sizes = {name: getattr(args, name) for name in ("num_train", "num_heldout", "num_prompts")}
        write_world(args.output_dir, seed=args.seed, **sizes)


if __name__ == "__main__":
    run_script(main, ToyArgs)
