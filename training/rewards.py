"""Scores of answers, from a reward model, from functions in Python files, or from both.

- a reward model with the policy's tokenizer reads the sampled ids; one with another tokenizer reads the text, encoded
  as in its own training
- a process reward model scores every step; its scores go to the steps' last tokens or, aggregated, to the answer's end
- a function gets texts and whole records. The per-answer form runs in worker processes of the rank that sampled the
  answer, and starts as soon as the answer is finished
- a failing source leaves an answer without its grade, or all answers if a batch function fails. Failures are counted;
  --reward_error decides what happens to the answer and the run

Dimensions: A answers, R tokens of the longest answer.
"""

import concurrent.futures
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from models.batches import Split
from models.chats import Chat
from models.checkpoint import model_folder
from models.common import Bounds, flag, non_negative, on_main, positive, say
from models.fsdp import reshard
from models.functions import FunctionPlace, Grade, Grader, call_batch, load_grader, undisturbed
from models.model import Transformer
from models.parts import encode_continuation
from models.records import Example, encode_generated
from models.reward import (
    Scored,
    aggregate,
    encode_steps,
    place_of_score,
    sigmoid,
    split_steps,
    step_scores,
)
from models.sharing import wait_for_all_ranks
from models.streaming import StreamDecoder
from models.tokenizer import Tokenizer
from models.workers import GradingArgs, Pool, grade_of
from training.frozen import RewardFolder
from training.prompts import Prompt
from training.stop import Stop

finite = Bounds(least=-1e9, most=1e9)


@dataclass(frozen=True, kw_only=True)
class RewardArgs(GradingArgs):
    """Rewards."""

    reward_checkpoint_path: Path | None = flag(None, type=model_folder, help="folder of a reward model")
    reward_fn: list[FunctionPlace] | None = flag(
        None,
        action="append",
        help="FILE.py:NAME, a function (prompt, completion, example) -> number, or (prompts, completions, examples) -> "
        "list of numbers; repeat the flag for several functions",
    )
    reward_model_weight: float = flag(1.0, bounds=finite, help="factor of the reward model's scores")
    reward_fn_weight: list[float] | None = flag(
        None,
        action="append",
        bounds=finite,
        help="factor of a function's numbers: one for all, or repeat the flag for each in their order; default: 1",
    )
    normalize_reward: bool = flag(False, help="standardise the reward model's scores by its reward_mean and reward_std")
    process_reward: str = flag(
        "min",
        choices=("min", "prod", "last", "mean", "steps"),
        help="with a process reward model: how to combine the steps' probabilities into a reward at the answer's end; "
        "steps: reward each step's last token with its own",
    )
    reward_error: str | None = flag(
        None,
        choices=("refuse", "zero", "skip"),
        help="if a function or the reward model fails for an answer: end the run, take 0, or leave the answer out of "
        "the update; default: refuse, but skip if a per-answer function fails for some answers, not all",
        may_change=True,
    )
    missing_eos_penalty: float | None = flag(None, bounds=positive, help="penalty of unfinished answers; default: none")
    length_penalty: float = flag(0.0, bounds=non_negative, help="penalty per token of an answer")
    quantize_reward: str = flag(
        "none", choices=("none", "int8", "int4"), help="quantise the reward model, which is then replicated over dp"
    )


def load_reward_functions(args: RewardArgs) -> list[Grader]:
    """Loads the functions of --reward_fn. Raises ValueError or OSError; see load_grader."""
    functions, weights = args.reward_fn or [], args.reward_fn_weight or []
    if len(weights) > 1 and len(weights) != len(functions):
        raise ValueError(
            f"--reward_fn_weight: {len(weights)} weights for {len(functions)} --reward_fn; give one, or one for each"
        )
    graders = [undisturbed()(load_grader)("--reward_fn", place) for place in functions]
    idle = [name for name in ("reward_timeout", "reward_memory") if getattr(args, name) != getattr(GradingArgs, name)]
    if idle and not any(grader.per_answer for grader in graders):
        say(f"--{idle[0]} has no effect without a --reward_fn of the form (prompt, completion, example)")
    return graders


def rows_it_reads(
    reward: RewardFolder, prompts: list[str | Chat], rows: list[Example], texts: list[str], finished: list[bool]
) -> tuple[list[Scored], int]:
    """Returns (each answer's row for the reward model, with the positions of its scores; how many rows were cut to the
    model's context). An answer that ran out of tokens gets no EOS. Others end as in the model's training, whichever
    token or --stop ended them; after a --stop the text is encoded again: its last token may hold a part of the stop.

    prompts: as in the records; rows: the policy's, prompt and answer; texts: of the answers alone.
    """
    to_score, num_cut = [], 0
    tokenizer, separator, max_seq_len = reward.folder.tokenizer, reward.kind.separator, reward.folder.max_seq_len
    for prompt, row, text, ended in zip(prompts, rows, texts, finished, strict=True):
        ends_of_steps = []
        if separator is not None:
            ids, ends_of_steps = encode_steps(prompt, split_steps(text, separator), separator, tokenizer)
        elif reward.reads_ids_of(prompt):
            ids = row.input_ids
            if ended and ids[-1] in reward.policy_ends:
                ids = ids[:-1] + reward.end_of(prompt)
            elif ended:
                ids = ids[: row.prompt_length]
                ids = ids + encode_continuation(text, ids, tokenizer) + reward.end_of(prompt)
        else:
            ids = encode_generated(prompt, text, tokenizer, finished=ended)
        num_cut += len(ids) > max_seq_len
        positions = [end for end in ends_of_steps if end < max_seq_len]
        positions = positions or [place_of_score(ids[:max_seq_len], reward.kind.pad_token_id)]
        to_score.append(Scored(ids[: positions[-1] + 1], positions, []))
    return to_score, num_cut


def place_of_steps(text: str, separator: str, prompt: Prompt, row: Example, tokenizer: Tokenizer) -> list[int]:
    """Returns, for each of split_steps(text, separator), the index of the answer token that completes it: the first
    token after which the decoded text holds the whole step."""
    stream = StreamDecoder(tokenizer, prompt.ids)
    characters = (len(stream.push(token)) for token in row.input_ids[len(prompt.ids) :])
    lengths = list(itertools.accumulate(characters))  # of the text decoded from the first 1, 2, ... tokens
    places, end = [], 0
    for step in split_steps(text, separator):
        end = min(end + len(step) + len(separator), len(text))
        places.append(next((i for i, length in enumerate(lengths) if length >= end), len(lengths) - 1))
    return places


class Scores(NamedTuple):
    """The scores of answers, the same on all ranks."""

    total: Tensor  # fp32 [A], weighted sum of the sources minus penalties, without step_rewards; NaN: skip the answer
    step_rewards: Tensor  # fp32 [A, R], process rewards on single tokens
    num_cut: int  # rows that were cut to the reward model's context
    sources: dict[str, Tensor]  # {source: its unweighted grades, fp32 [A]; NaN where it failed for an answer}
    failures: dict[str, list[str]]  # {source: the reason of each failure}

    @property
    def checked(self) -> Tensor | None:
        """Returns the grades of the first reward function, fp32 [A]; None without one."""
        return next((values for name, values in self.sources.items() if name != "reward_model"), None)


class Scorer:
    """Scores answers with a reward model (folder and model, or None for both), functions, or both.

    Functions of the per-answer form run in worker processes of each rank, for the answers that the rank sampled; those
    of the batch form are called on the main rank. All ranks must construct a Scorer, or none.
    """

    def __init__(
        self,
        args: RewardArgs,
        tokenizer: Tokenizer,  # the policy's
        folder: RewardFolder | None,
        model: Transformer | None,
        functions: list[Grader],
        split: Split,
        stop: Stop,
    ):
        self.args, self.tokenizer, self.folder, self.model = args, tokenizer, folder, model
        self.split, self.stop = split, stop
        self.functions = dict(zip(_unique_names(functions), functions))
        weights = args.reward_fn_weight or [1.0]
        self.weights = dict(zip(self.functions, weights if len(weights) > 1 else weights * len(functions)))
        self.weights["reward_model"] = args.reward_model_weight
        self.pooled = [name for name, function in self.functions.items() if function.per_answer]
        self.grading: dict[int, list[concurrent.futures.Future]] = {}  # {index of an answer: its grades to come}
        self.pool, self.warned, self.graded = None, set(), set()
        self.asked: list[Prompt] = []  # of this update's answers so far
        self.gave: set[str] = set()  # the per-answer functions that have graded one of them
        self.any_rewarded = False  # whether one of them has a reward
        tp_size = dist.get_world_size() // split.dp.size()  # tensor-parallel ranks are adjacent, with the same answers
        if self.pooled and dist.get_rank() % tp_size == 0:
            self.pool = Pool([self.functions[name] for name in self.pooled], args)

    def submit(self, i: int, prompt: Prompt, text: str) -> None:
        """Starts the per-answer functions on answer i of the next call of score(), on the rank that has sampled it."""
        if self.pool is not None:
            self.grading[i] = [self.pool.submit(j, prompt.text, text, prompt.fields) for j in range(len(self.pooled))]

    def close(self) -> None:
        """Ends the worker processes."""
        if self.pool is not None:
            self.pool.close()

    def score(
        self,
        prompts: list[Prompt],
        rows: list[Example],
        texts: list[str],
        finished: list[bool],
        punishment: Tensor | float = 0.0,
        *,
        again: bool = False,
    ) -> Scores:
        """Returns the scores of the answers, all of which have been submitted. A collective. Ends the run if a source
        fails and --reward_error does not allow it, or after a signal.

        rows: the policy's, prompt and answer with labels on the answer; texts, finished: of the answers. punishment:
        a term of their rewards, fp64 [A] on the CPU. again: the answers belong to the update of the call before.
        """
        args, num_cut, grades = self.args, 0, {}
        num_tokens = torch.tensor([row.num_targets for row in rows])
        step_rewards = torch.zeros(len(rows), int(num_tokens.max()))
        if self.folder is not None:  # workers grade the answers while the reward model computes
            grades["reward_model"], step_rewards, num_cut = self._ask_model(prompts, rows, texts, finished)
        columns = [prompt.text for prompt in prompts], texts, [prompt.fields for prompt in prompts]
        of_workers = self._collect(len(rows))
        for name, function in self.functions.items():
            grades[name] = of_workers[name] if function.per_answer else self._ask_batch(function, *columns)
        if not again:
            self.asked, self.gave, self.any_rewarded = [], set(), False
        self.asked = self.asked + prompts
        for name in self.pooled:
            self._check_some_graded(name, grades[name])
        parts = [self._part_of_total(name, each) for name, each in grades.items()]
        parts += [-args.length_penalty * num_tokens.double(), punishment]
        parts.append(-(args.missing_eos_penalty or 0.0) * (~torch.tensor(finished)).double())
        total = sum(parts)
        total = total.masked_fill(total.abs() < 1e-12 * sum(map(abs, parts)), 0.0)  # 0.3 - 3 * 0.1 is -6e-17
        total = total.float()  # rounded once, so that other parts of the same sum are equal rewards
        device = torch.device(self.split.dp.device_type)
        sources = {name: torch.tensor([grade.value for grade in each]).to(device) for name, each in grades.items()}
        failures = {name: [grade.failure for grade in each if grade.failure] for name, each in grades.items()}
        self._check_some_rewarded(total)
        return Scores(total.to(device), step_rewards.to(device), num_cut, sources, failures)

    def _check_some_graded(self, name: str, grades: list[Grade]) -> None:
        """Ends the run if a per-answer function fails for all answers of an update and --reward_error is not given:
        otherwise the run would go on without learning. If all answers are to one prompt, its record may be the cause:
        then the run goes on, provided that the function has graded answers before."""
        several = len({id(prompt) for prompt in self.asked}) > 1 or name not in self.graded
        if not all(grade.failure for grade in grades):
            self.graded.add(name)
            self.gave.add(name)
        elif name not in self.gave and several and self.args.reward_error is None and self.weights[name]:
            self.stop.fail(
                f"--reward_fn: {name} gave none of {len(self.asked)} answers a grade, the first: {grades[0].failure}; "
                "--reward_error skip or zero lets the run go on"
            )

    def _check_some_rewarded(self, total: Tensor) -> None:
        """As _check_some_graded, for functions that each grade other answers and none of them all, as TRL allows."""
        self.any_rewarded |= not total.isnan().all()
        several = len({id(prompt) for prompt in self.asked}) > 1
        if not self.any_rewarded and several and self.args.reward_error is None:
            self.stop.fail(
                f"none of {len(self.asked)} answers has a grade from every --reward_fn; return 0 where a function does "
                "not apply, or give --reward_error zero; --reward_error skip lets the run go on"
            )

    def _part_of_total(self, name: str, grades: list[Grade]) -> Tensor:
        """Returns a source's weighted contribution to the rewards, fp64 [A]; NaN for an answer to be skipped. Ends the
        run if a grade is missing and must not be."""
        weight, per_answer = self.weights[name], name in self.pooled
        how = self.args.reward_error or ("skip" if per_answer else "refuse")
        failure = next((grade.failure for grade in grades if grade.failure), None)
        if failure is not None:
            failure = f"--reward_fn: {name} gave an answer no grade: {failure}" if per_answer else failure
            if how == "refuse":
                self.stop.fail(f"{failure}; --reward_error zero or skip lets the run go on")
            if name not in self.warned:
                self.warned.add(name)
                say(f"{failure}; later failures are only counted")
        values = torch.tensor([grade.value for grade in grades], dtype=torch.float64)
        of_steps = name == "reward_model" and self.folder.kind.separator is not None
        in_steps = of_steps and self.args.process_reward == "steps"
        part = values.new_zeros(len(values)) if in_steps else weight * values.nan_to_num(nan=0.0)
        return part.where(~values.isnan(), torch.nan) if how == "skip" and weight else part

    def _ask_model(
        self, prompts: list[Prompt], rows: list[Example], texts: list[str], finished: list[bool]
    ) -> tuple[list[Grade], Tensor, int]:
        """Returns (the reward model's grade of each answer, for step rewards their sum; weighted rewards of steps at
        their own tokens [A, R]; how many rows were cut)."""
        args, kind = self.args, self.folder.kind
        grades, step_rewards = [], torch.zeros(len(rows), max(row.num_targets for row in rows))
        to_score, num_cut = rows_it_reads(self.folder, [prompt.asked for prompt in prompts], rows, texts, finished)
        if num_cut and "rows cut" not in self.warned:  # no function's name
            self.warned.add("rows cut")
            read = f"the first {self.folder.folder.max_seq_len} tokens"
            say(f"{num_cut} answers are longer than the reward model's context: it scores {read}; see the metrics")
        split = self.split._replace(pad_token_id=self.folder.folder.pad_token_id)
        mean, std = (kind.mean, kind.std) if args.normalize_reward else (0.0, 1.0)
        highest, vocab_size = [max(row.input_ids) for row in to_score], self.folder.folder.config.vocab_size
        known = [i < vocab_size for i in highest]  # an answer can write an added token that has no embedding
        readable = [row if is_known else Scored([0], [0], []) for row, is_known in zip(to_score, known)]
        scores = step_scores(self.model, readable, split)
        reshard(self.model)
        for i, values in enumerate(scores):
            if not (known[i] and all(map(math.isfinite, values))):
                why = "the reward model's score is not finite; its weights are broken, or it overflows in this dtype"
                if not known[i]:
                    why = f"the answer holds token id {highest[i]}, which the reward model does not have"
                grades.append(Grade(math.nan, f"--reward_checkpoint_path: {prompts[i].where}: {why}"))
            elif kind.separator is None:
                grades.append(Grade((values[0] - mean) / std))
            elif args.process_reward != "steps":
                grades.append(Grade(aggregate(values, args.process_reward)))
            else:
                places = place_of_steps(texts[i], kind.separator, prompts[i], rows[i], self.tokenizer)
                for place, value in zip(places, values, strict=False):  # a row that was cut has fewer
                    step_rewards[i, place] += args.reward_model_weight * sigmoid(value)
                grades.append(Grade(sum(map(sigmoid, values[: len(places)]))))
        return grades, step_rewards, num_cut

    def _ask_batch(self, function: Grader, *columns: list) -> list[Grade]:
        """Calls a batch function on the main rank and returns its grades on all ranks; a signal interrupts the call."""
        grades = on_main(lambda: self.stop.call(_grades_of_batch, function, *columns))
        self.stop.check()
        return grades

    def _collect(self, num_answers: int) -> dict[str, list[Grade]]:
        """Waits for the per-answer functions and returns their grades of all answers, by function. A collective."""
        if not self.pooled:
            return {}
        parts, own = [None] * dist.get_world_size(), self._own_grades()
        wait_for_all_ranks()  # some ranks' answers take longer to grade
        dist.all_gather_object(parts, own)
        self.stop.check()
        broken = next((part for part in parts if isinstance(part, str)), None)
        if broken is not None:
            self.stop.fail(broken)
        grades = {i: each for part in parts for i, each in part.items()}
        columns = zip(*(grades[i] for i in range(num_answers)))
        return {name: [Grade(*each) for each in column] for name, column in zip(self.pooled, columns)}

    def _own_grades(self) -> dict[int, list[Grade]] | str:
        """Returns the grades of the answers that this rank submitted, {} after a signal, or an error message."""
        own, self.grading = self.grading, {}
        waiting = {future for futures in own.values() for future in futures}
        while waiting and not self.stop.received:
            waiting = concurrent.futures.wait(waiting, timeout=0.2).not_done
        try:
            return {} if waiting else {i: [grade_of(future) for future in futures] for i, futures in own.items()}
        except ValueError as error:
            return str(error)


def _grades_of_batch(function: Grader, *columns: list) -> list[Grade]:
    """Returns the grades of call_batch; if the function fails, a failure for every answer."""
    try:
        return call_batch(function, *columns)
    except ValueError as error:
        return [Grade(math.nan, str(error))] * len(columns[0])


def _unique_names(functions: list[Grader]) -> list[str]:
    """Returns the functions' names, with a number appended to repeated ones."""
    names = ["reward_model"]
    for function in functions:
        numbered = (f"{function.name}_{number}" for number in itertools.count(2))
        names.append(next(name for name in itertools.chain([function.name], numbered) if name not in names))
    return names[1:]


def source_metrics(scores: list[Scores]) -> dict[str, float]:
    """Returns the metrics of each source, under TRL's names: mean and standard deviation of its unweighted grades, and
    how many answers it failed for."""
    metrics = {}
    for name in scores[0].sources:
        values = torch.cat([each.sources[name] for each in scores]).double()
        given = values[~values.isnan()]
        metrics[f"rewards/{name}/mean"] = given.mean().item() if len(given) else 0.0
        metrics[f"rewards/{name}/std"] = given.std().item() if len(given) > 1 else 0.0
        failures = [failure for each in scores for failure in each.failures[name]]
        metrics[f"rewards/{name}/timeouts"] = failures.count("timeout")
        metrics[f"rewards/{name}/errors"] = len(failures) - failures.count("timeout")
    return metrics
