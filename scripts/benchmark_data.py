"""The job `data` of scripts/benchmark.py: time and memory of tokenising chats of 1, 4 and 16 turns."""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers

from models.common import card, flag, say
from models.records import Limits
from models.rows import Store
from models.tokenizer import Tokenizer
from scripts.benchmark_common import JobArgs, RepeatArgs
from training.data import encode_sft_file

TURNS, WORDS_OF_A_TURN, WORDS = (1, 4, 16), 60, 150_000
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class DataArgs(JobArgs, RepeatArgs):
    """Measures the time and memory of tokenising chats."""

    tokenizer: Path | None = flag(None, help="folder with a tokenizer and its chat template; default: a small one")


def main(args: DataArgs) -> None:
    """Prints CPU microseconds and bytes per token, from the file to its rows, in one process."""
    limits, result = Limits(2**31, 2**31), {}
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.parent.glob("*/README.md"))]
        words = " ".join(texts).split(" ")
        if args.tokenizer is None:
            _write_tokenizer(folder, words)
        tokenizer = Tokenizer(args.tokenizer or folder)
        for turns in TURNS:
            path = _write_chats(folder / f"{turns}.jsonl", words, turns, random.Random(0))
            times = []
            for _ in range(args.repeats):
                begin = time.process_time()
                rows, _ = encode_sft_file(path, tokenizer, limits, Store(None, 1))
                times.append(time.process_time() - begin)
            count, num_bytes = rows.num_tokens, sum(column.nbytes for column in rows.columns)
            figures = {"us_per_token": 1e6 * min(times) / count, "bytes_per_token": num_bytes / count}
            result[f"{turns} turns"] = {**figures, "num_tokens": count}
    shown = {
        name: f"{each['us_per_token']:.2f} us, {each['bytes_per_token']:.2f} bytes a token ({each['num_tokens']:,})"
        for name, each in result.items()
    }
    say(card(f"data, {args.tokenizer or 'a tokenizer of 8,192 tokens'}, least of {args.repeats}", shown))
    say(json.dumps({"job": "data", **result}))


def _write_chats(path: Path, words: list[str], turns: int, rng: random.Random) -> Path:
    def said(role: str) -> dict:
        first = rng.randrange(len(words) - WORDS_OF_A_TURN)
        return {"role": role, "content": " ".join(words[first : first + WORDS_OF_A_TURN]).strip() or "yes"}

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(WORDS // (2 * turns * WORDS_OF_A_TURN)):
            chat = [said(role) for _ in range(turns) for role in ("user", "assistant")]
            file.write(json.dumps({"messages": chat}) + "\n")
    return path


def _write_tokenizer(folder: Path, words: list[str]) -> None:
    """Writes a byte-level tokenizer that splits words as GPT-2 does, and a chat template."""
    file = tokenizers.Tokenizer(tokenizers.models.BPE())
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    file.train_from_iterator([" ".join(words)], trainer)
    file.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|im_start|>", "<|im_end|>")])
    file.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
