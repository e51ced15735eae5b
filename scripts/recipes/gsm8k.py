r"""Turns the public GSM8K files (Cobbe et al. 2021, arXiv 2110.14168) into prompts with checkable answers.

The files: github.com/openai/grade-school-math, grade_school_math/data/{train,test}.jsonl; or the Hub's openai/gsm8k,
whose parquet files need pyarrow. Each record becomes {"prompt": ..., "answer": "42"}, for train_grpo.py or train_ppo.py
with --reward_fn training/graders.py:math_answer, and for generate.py with score.py --grader.

    python scripts/recipes/gsm8k.py --input_file train.jsonl --output_file runs/gsm8k/train.jsonl
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent.parent), *(path for path in sys.path if path != str(HERE))]

from inference.lines import write_lines
from models.common import at_least_one, flag, with_newlines
from models.files import naming_file
from models.records import Record, get_field, naming, read_records, require
from models.script import run_script

IN_A_BOX = r"Reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True, kw_only=True)
class Gsm8kArgs:
    """Turns GSM8K's questions into prompts with answers."""

    input_file: Path = flag(help="JSONL or .parquet file with question and answer, as published")
    output_file: Path = flag(help="JSONL file to write, with prompt and answer")
    plain: bool = flag(False, help="write prompts as text, for a base model, instead of chat messages")
    instruction: str = flag(IN_A_BOX, type=with_newlines, help="text after the question; may be empty")
    max_records: int | None = flag(None, bounds=at_least_one, help="number of records to use; default: all")


def main(args: Gsm8kArgs) -> None:
    records = read_parquet(args.input_file) if args.input_file.suffix == ".parquet" else read_records(args.input_file)
    lines = [to_prompt(record, args) for record in records[: args.max_records]]
    if args.output_file.exists():
        raise ValueError(f"--output_file {args.output_file}: exists; take another")
    with naming_file(args.output_file):
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
    write_lines(args.output_file, lines)  # at once: the recipes take an existing file for complete
    print(f"{args.output_file}: {len(lines):,} prompts of {len(records):,} records")


def read_parquet(path: Path) -> list[Record]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"--input_file {path}: reading parquet needs pyarrow (pip install pyarrow)") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"--input_file {path}: not a parquet file: {error}") from None
    return [Record(f"{path}: row {i}", row) for i, row in enumerate(rows)]


def to_prompt(record: Record, args: Gsm8kArgs) -> dict:
    """Returns a prompt with the number that follows #### in the answer. Raises ValueError with the record's place."""
    with naming(record):
        question, answer = (get_field(record, name) for name in ("question", "answer"))
        require(isinstance(question, str) and question.strip(), "question must be text")
        require(isinstance(answer, str) and "####" in answer, "answer must be text that ends in #### and a number")
        number = answer.rpartition("####")[2].strip().replace(",", "")
        require(re.fullmatch(r"-?\d+(\.\d+)?", number), f"no number follows ####, but {number[:40]!r}")
    question = question.strip()
    if args.plain:
        parts = (f"Question: {question}", args.instruction, "Answer:")
        return {"prompt": "\n".join(part for part in parts if part), "answer": number}
    content = f"{question}\n{args.instruction}" if args.instruction else question
    return {"prompt": [{"role": "user", "content": content}], "answer": number}


if __name__ == "__main__":
    run_script(main, Gsm8kArgs)
