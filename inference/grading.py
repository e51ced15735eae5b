"""Grades answers with a function that checks them, in place of a reward model's scores, and computes pass@k.

- a function of one answer runs in worker processes, as in training; if it fails or takes too long, the answer's grade
  is 0, and the line says why
- lines are written in the order of the file, each as soon as it and all lines before it are graded
- a sample passes if its grade is at least 1
- a function gets a chat as the folder of the model that answered renders it, as in training; without a folder, the
  contents of the messages
"""

import contextlib
import itertools
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from inference.choosing import group_of
from inference.lines import LineWriter, begin, day_of, day_told, lines_of, with_room_for
from models.chats import content_of, read_chat
from models.checkpoint import has_score_head
from models.checksums import check_files
from models.common import card, progress_bar, say
from models.functions import Grade, Grader, call_batch, load_grader, undisturbed
from models.record_files import kind_of
from models.records import (
    Record,
    encode_prompt,
    get_answer,
    get_prompt,
    naming,
    read_records,
    require,
    stated_prompt,
)
from models.reward import pass_at_k
from models.tokenizer import Tokenizer
from models.workers import Pool, grade_of

AHEAD = 4096  # most answers that are submitted to the workers and not yet written


def grade_file(args) -> None:
    """Writes the records of --data_file with a `grade` from the function --grader, and prints a summary. args: the
    ScoreArgs of score.py. Only the main rank calls this. Raises ValueError or OSError for unusable files or records."""
    tokenizer = None
    if args.checkpoint_path is not None:
        check_files(args.checkpoint_path)
        is_reward_model = False
        with contextlib.suppress(FileNotFoundError, ValueError):  # no model runs: weights may be missing or incomplete
            is_reward_model = has_score_head(args.checkpoint_path)
        if is_reward_model:
            why = "beside a --grader it is the model that answered; a reward model scores in a run of its own"
            raise ValueError(f"--checkpoint_path {args.checkpoint_path}: {why}")
        today = day_of(args)
        args = replace(args, chat_date=today.isoformat())
        tokenizer = Tokenizer(args.checkpoint_path, today)
    begun = begin(args.output_file, args)
    grader = undisturbed()(load_grader)("--grader", args.grader)
    records = [with_room_for(("grade", "grade_error"), record) for record in read_records(args.data_file)]
    answers = [_answer_of(record, tokenizer) for record in records]
    groups, pass_at = [group_of(record.fields) for record in records], args.pass_at or []
    check_pass_at(pass_at, records, groups)
    lines = lines_of(records, args.output_file, ("grade",)) if args.resume else []
    num_done = len(lines)
    pool = Pool([grader], args) if grader.per_answer and num_done < len(records) else None
    rows = {"grader": args.grader, "work": f"{len(records) - num_done:,} answers to grade; {num_done:,} done before"}
    rows |= day_told(tokenizer.today, tokenizer.chat_template) if tokenizer is not None else {}
    say(card("score", rows))
    with (
        LineWriter(args.output_file, begun, active=True, num_lines=num_done) as writer,
        progress_bar(total=len(records), initial=num_done, desc="grading", unit="answer") as bar,
    ):
        grades = _grades(grader, pool, answers[num_done:])
        for record, grade in zip(records[num_done:], grades, strict=True):
            added = {"grade": grade.value} if grade.failure is None else {"grade": 0.0, "grade_error": grade.failure}
            lines.append({**record.fields, **added})
            writer.write(lines[-1])
            bar.update()
    if pool is not None:
        pool.close()
    say(card("done", summary(lines, groups, pass_at)))


def _answer_of(record: Record, tokenizer: Tokenizer | None) -> tuple[str, str, dict]:
    """Returns a grader's arguments: (prompt text, answer text, the record's fields). Messages become their contents, a
    prompt of messages what the tokenizer's chat template makes of it."""
    with naming(record):
        prompt, answer = stated_prompt(record), get_answer(record, steps=False)
        if isinstance(prompt, list) and tokenizer is not None:
            prompt = tokenizer.decode(encode_prompt(get_prompt(record), tokenizer))
        texts = []
        for name, text in (("prompt", prompt), ("completion", answer)):
            if isinstance(text, list):
                text = "\n".join(map(content_of, read_chat(text, what=name).messages))
            require(isinstance(text, str), f"{name} must be text or a list of messages, not {kind_of(text)}")
            texts.append(text)
    return *texts, record.fields


def _grades(grader: Grader, pool: Pool | None, answers: list[tuple[str, str, dict]]) -> Iterator[Grade]:
    """Yields the grades of (prompt, completion, record) tuples, in their order."""
    if pool is None and answers:
        yield from call_batch(grader, *map(list, zip(*answers)))
        return
    waiting = iter(answers)
    queue = [pool.submit(0, *answer) for answer in itertools.islice(waiting, AHEAD)] if answers else []
    for future in queue:  # the loop itself extends the queue
        yield grade_of(future)
        queue += [pool.submit(0, *answer) for answer in itertools.islice(waiting, 1)]


def check_pass_at(pass_at: list[int], records: list[Record], groups: list[str]) -> None:
    """Raises ValueError if a prompt has fewer samples than the largest k."""
    counts, most = Counter(groups), max(pass_at, default=0)
    for record, group in zip(records, groups):
        if counts[group] < most:
            raise ValueError(
                f"{record.where}: --pass_at {most} needs as many samples of each prompt, this one has {counts[group]}"
            )


def summary(lines: list[dict], groups: list[str], pass_at: list[int]) -> dict[str, str]:
    """Rows of the card: the mean grade, the number of failed gradings, and pass@k averaged over prompts."""
    right: dict[str, list[bool]] = {}
    for line, group in zip(lines, groups, strict=True):
        right.setdefault(group, []).append(bool(np.float32(line["grade"]) >= 1))  # 0.7 + 0.2 + 0.1, too, as in training
    errors = [line["grade_error"] for line in lines if "grade_error" in line]
    rows = {
        "answers": f"{len(lines):,} to {len(right):,} prompts",
        "grade": f"mean {statistics.fmean(line['grade'] for line in lines):.4f}",
        "no grade": f"{errors.count('timeout'):,} timeouts, {len(errors) - errors.count('timeout'):,} errors",
    }
    for k in pass_at:
        passed = [pass_at_k(len(samples), sum(samples), k) for samples in right.values()]
        rows[f"pass@{k}"] = f"{statistics.fmean(passed):.2%}"
    return rows
