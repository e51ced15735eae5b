"""Chooses one of several samples of a prompt by their rewards: the best, or the best with the answer that wins a vote.

Lines have a `reward`, from inference/score.py; they are those of generate.py or any records with a prompt.
"""

import json
import math
from collections.abc import Callable
from operator import itemgetter

from models.boxes import closed_boxes
from models.chats import content_of, read_chat
from models.records import Record, get_answer, stated_prompt


def group_of(line: dict) -> str:
    """Returns a key that the samples of one prompt share: the prompt, the other fields that the model sees, and idx,
    generate.py's number of the prompt, where there is one."""
    beside = [line.get(name) or None for name in ("system", "tools", "chat_template_kwargs")]
    return json.dumps([line.get("idx"), stated_prompt(Record("line", line)), *beside])


def choose_best(lines: list[dict]) -> list[dict]:
    """Returns the line with the highest reward of each prompt (the first of equal ones), in the order of prompts."""
    groups: dict[str, list[dict]] = {}
    for line in lines:
        groups.setdefault(group_of(line), []).append(line)
    return [max(group, key=itemgetter("reward")) for group in groups.values()]


def choose_by_vote(lines: list[dict], answers: list[str | None], weight: Callable[[float], float]) -> list[dict]:
    """Returns the best line of each prompt's winning answer. Adds voted_answer and votes, {answer: sum of its samples'
    weights} (weighted majority voting, as in Easy-to-Hard Generalization, arXiv 2403.09472).

    Of answers with equal votes the first in the file wins. Samples without an answer (None) have no vote; if no sample
    has an answer, voted_answer is None and the line is the best of all.
    """
    groups: dict[str, list[tuple[dict, str | None]]] = {}
    for line, answer in zip(lines, answers, strict=True):
        groups.setdefault(group_of(line), []).append((line, answer))
    chosen = []
    for group in groups.values():
        weights: dict[str, list[float]] = {}
        for line, answer in group:
            if answer is not None:
                weights.setdefault(answer, []).append(weight(line["reward"]))
        votes = {answer: math.fsum(cast) for answer, cast in weights.items()}  # exact, so independent of the order
        winner = max(votes, key=votes.get, default=None)
        best = max((line for line, answer in group if answer == winner), key=itemgetter("reward"))
        chosen.append({**best, "voted_answer": winner, "votes": votes})
    return chosen


def answer_of(record: Record, separator: str | None, find_answer: Callable[[str], str | None]) -> str | None:
    """Returns the final answer in a record's completion, or None. Raises ValueError if find_answer fails."""
    text = get_answer(record, steps=separator is not None)
    if isinstance(text, list):  # messages, or steps
        is_chat = separator is None
        text = content_of(read_chat(text).messages[-1]) if is_chat else "".join(step + separator for step in text)
    try:
        answer = find_answer(text)
    except Exception as error:  # a function of the user's can fail in any way
        raise ValueError(f"{record.where}: --answer_fn failed: {type(error).__name__}: {error}") from error
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"{record.where}: --answer_fn returned a {type(answer).__name__}, not a string or None")
    return answer


def final_answer(text: str) -> str | None:
    """Returns the content of the last closed \\boxed{} that is not empty, None if all are empty; without a closed box,
    the last line that is not blank, or None."""
    boxes = closed_boxes(text)
    if boxes:  # (start, content) of each, so the maximum is the last, or the inner one of nested boxes
        return max((box for box in boxes if box[1]), default=(0, None))[1]
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)
