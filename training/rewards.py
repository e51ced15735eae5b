"""Where the scores of answers come from: a reward model's folder, functions in files, or both.

- a reward model with the policy's tokenizer reads the very ids that were drawn; one with another tokenizer reads the
  text, encoded as its own training did
- a process reward model scores every step; its numbers go to the steps' last tokens or, aggregated, to the answer's end
- a function sees texts and whole records. One that takes an answer runs in worker processes of its rank, from the
  moment when that is finished; whatever goes wrong there costs that answer's grade, which is then 0, and is counted

Dimensions: A answers, R tokens of the longest answer.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from models.chats import Chat
from models.checkpoint import Folder, open_folder
from models.common import Bounds, flag, is_main_rank, non_negative, positive, say
from models.functions import FunctionPlace, Grader, call_batch, load_grader
from models.model import Transformer
from models.packing import own_share
from models.records import Example, Split, encode_generated
from models.reward import (
    RewardKind,
    Scored,
    aggregate,
    encode_steps,
    read_reward_kind,
    sigmoid,
    split_steps,
    step_scores,
)
from models.tokenizer import StreamDecoder, Tokenizer
from models.workers import GradingArgs, Pool
from training.prompts import Prompt

finite = Bounds(least=-1e9, most=1e9)


@dataclass(frozen=True, kw_only=True)
class RewardArgs(GradingArgs):
    """Where the scores of answers come from."""

    reward_checkpoint_path: Path | None = flag(None, help="folder of a reward model")
    reward_fn: list[FunctionPlace] | None = flag(
        None,
        action="append",
        help="FILE.py:NAME, a function (prompt, completion, example) -> number, or (prompts, completions, examples) -> "
        "list of numbers; several times for several",
    )
    reward_model_weight: float = flag(1.0, bounds=finite, help="what the reward model's scores are multiplied by")
    reward_fn_weight: list[float] | None = flag(
        None,
        action="append",
        bounds=finite,
        formerly=1.0,
        help="what a function's numbers are multiplied by, once for all functions or for each in their order; 1",
    )
    normalize_reward: bool = flag(False, help="scores less reward_mean, by reward_std of the folder")
    process_reward: str = flag(
        "min",
        choices=("min", "prod", "last", "mean", "steps"),
        help="of a process reward model: one of the steps' probabilities at the end, or each at its step's last token",
    )
    missing_eos_penalty: float | None = flag(None, bounds=positive, help="subtracted where an answer has no end; none")
    length_penalty: float = flag(0.0, bounds=non_negative, help="subtracted for each token of an answer")
    quantize_reward: str = flag(
        "none", choices=("none", "int8", "int4"), help="round the weights of the reward model, replicated over dp"
    )


def load_reward_functions(args: RewardArgs) -> list[Grader]:
    """The functions that --reward_fn names. Raises ValueError or OSError; see load_grader."""
    functions, weights = args.reward_fn or [], args.reward_fn_weight or []
    if len(weights) > 1 and len(weights) != len(functions):
        raise ValueError(
            f"--reward_fn_weight: {len(weights)} for {len(functions)} of --reward_fn; give one for all, or one for each"
        )
    return [load_grader("--reward_fn", place) for place in functions]


class RewardFolder(NamedTuple):
    """A reward model's folder, beside that of the policy whose answers it scores."""

    folder: Folder
    same_tokenizer: bool  # as the policy's: it can read the policy's ids
    kind: RewardKind


def open_reward_folder(path: Path, policy: Folder, tensor_parallel_size: int) -> RewardFolder:
    """Raises ValueError if the folder holds no scalar head, or cannot be cut over so many ranks."""
    today = policy.tokenizer.today
    folder = open_folder(path, None, tensor_parallel_size, frozen=True, today=today)
    same_size = folder.config.vocab_size == policy.config.vocab_size  # any id can be drawn
    same_tokenizer = same_size and _text_to_ids(path) == _text_to_ids(policy.path)
    return RewardFolder(folder, same_tokenizer, read_reward_kind(path))


def _text_to_ids(folder: Path) -> dict[str, object]:
    """What decides how text becomes ids. Not padding: a reward model's pad token may be its own."""
    names = ("tokenizer.model", "tokenizer.json", "added_tokens.json")
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if b'"padding"' in files.get("tokenizer.json", b""):
        files["tokenizer.json"] = {**json.loads(files["tokenizer.json"]), "padding": None}
    return files


def rows_to_score(
    reward: RewardFolder, prompts: list[str | Chat], rows: list[Example], texts: list[str], finished: list[bool]
) -> tuple[list[Scored], int]:
    """(what the reward model reads of each answer: its row and the places of its scores; how many rows are cut since
    they are too long for the model). An answer that ran out of tokens has no EOS.

    prompts: as the records have them; rows: the policy's, prompt and answer; texts: the answers' alone.
    """
    to_score, num_cut = [], 0
    tokenizer, separator, max_seq_len = reward.folder.tokenizer, reward.kind.separator, reward.folder.max_seq_len
    for prompt, row, text, ended in zip(prompts, rows, texts, finished, strict=True):
        ends_of_steps = []
        if separator is not None:
            ids, ends_of_steps = encode_steps(prompt, split_steps(text, separator), separator, tokenizer)
        elif reward.same_tokenizer:
            ids = row.input_ids
        else:
            ids = encode_generated(prompt, text, tokenizer, finished=ended)
        num_cut += len(ids) > max_seq_len
        positions = [end for end in ends_of_steps if end < max_seq_len] or [min(len(ids), max_seq_len) - 1]
        to_score.append(Scored(ids[: positions[-1] + 1], positions, []))
    return to_score, num_cut


def place_of_steps(text: str, separator: str, prompt: Prompt, row: Example, tokenizer: Tokenizer) -> list[int]:
    """The token of an answer, counted from 0, that ends each of split_steps(text, separator): the first with which the
    text so far holds the whole step."""
    stream = StreamDecoder(tokenizer, prompt.ids)
    characters = (len(stream.push(token)) for token in row.input_ids[len(prompt.ids) :])
    lengths = list(itertools.accumulate(characters))  # of the text that the first 1, 2, ... tokens have completed
    places, end = [], 0
    for step in split_steps(text, separator):
        end = min(end + len(step) + len(separator), len(text))
        places.append(next((i for i, length in enumerate(lengths) if length >= end), len(lengths) - 1))
    return places


class Scores(NamedTuple):
    """What the sources gave to answers, the same on all ranks."""

    total: Tensor  # fp32 [A], the weighted sum of the sources less penalties, without step_rewards
    step_rewards: Tensor  # fp32 [A, R], process rewards of their own tokens
    num_cut: int  # rows that were cut for the reward model
    sources: dict[str, Tensor]  # fp32 [A] each: what each gave, unweighted; NaN where it failed for an answer
    failures: dict[str, list[str]]  # why one failed, once for each answer

    @property
    def checked(self) -> Tensor | None:
        """What the first reward function gave, fp32 [A]; None without one."""
        return next((values for name, values in self.sources.items() if name != "reward_model"), None)


class Scorer:
    """What gives answers their scores: a reward model, functions, or both. folder and model go together, or are None.

    Functions of the per-answer form run in worker processes of each rank, which grades the answers that it drew; the
    batch form is called on the main rank. Making it is what each rank does, or none.
    """

    def __init__(
        self,
        args: RewardArgs,
        tokenizer: Tokenizer,  # the policy's
        folder: RewardFolder | None,
        model: Transformer | None,
        functions: list[Grader],
        split: Split,
    ):
        self.args, self.tokenizer, self.folder, self.model, self.split = args, tokenizer, folder, model, split
        self.functions = dict(zip(_unique_names(functions), functions))
        weights = args.reward_fn_weight or [1.0]
        self.weights = dict(zip(self.functions, weights if len(weights) > 1 else weights * len(functions)))
        self.pooled = [name for name, function in self.functions.items() if function.per_answer]
        self.grading: dict[int, tuple[Prompt, str, list]] = {}  # answers that are being graded, by their numbers
        self.pool, self.warned = None, set()
        tp_size = dist.get_world_size() // split.dp.size()  # tensor-parallel ranks are adjacent and draw the same
        if self.pooled and dist.get_rank() % tp_size == 0:
            self.pool = Pool([self.functions[name] for name in self.pooled], args)

    def submit(self, i: int, prompt: Prompt, text: str) -> None:
        """Answer i of the batch that is drawn is finished on this rank: functions of the per-answer form begin."""
        if self.pool is not None:
            grades = [self.pool.submit(j, prompt.text, text, prompt.fields) for j in range(len(self.pooled))]
            self.grading[i] = (prompt, text, grades)

    def close(self) -> None:
        """Ends the worker processes."""
        if self.pool is not None:
            self.pool.close()

    def score(self, prompts: list[Prompt], rows: list[Example], texts: list[str], finished: list[bool]) -> Scores:
        """The scores of the answers to prompts, of which some may have been submitted. A collective.

        rows: the policy's, prompt and answer with labels on the answer; texts, finished: of the answers.
        """
        args, sources, failures, num_cut = self.args, {}, {}, 0
        num_tokens = torch.tensor([row.num_targets for row in rows])
        total, step_rewards = torch.zeros(len(rows)), torch.zeros(len(rows), int(num_tokens.max()))
        self._submit_the_rest(prompts, texts)  # they are graded while the reward model computes
        if self.folder is not None:
            sources["reward_model"], step_rewards, num_cut = self._ask_model(prompts, rows, texts, finished)
            if self.folder.kind.separator is None or args.process_reward != "steps":
                total += args.reward_model_weight * sources["reward_model"]
        columns = [prompt.text for prompt in prompts], texts, [prompt.fields for prompt in prompts]
        graded = self._collect(len(rows))
        for name, function in self.functions.items():
            if function.per_answer:
                values, failures[name] = graded[name]
                sources[name] = torch.tensor(values)
            else:
                sources[name] = torch.tensor(_on_main_rank(call_batch, function, *columns))
            total += self.weights[name] * sources[name].nan_to_num(nan=0.0)
        total -= args.length_penalty * num_tokens
        total -= (args.missing_eos_penalty or 0.0) * ~torch.tensor(finished)
        device = torch.device(self.split.dp.device_type)
        sources = {name: values.to(device) for name, values in sources.items()}
        return Scores(total.to(device), step_rewards.to(device), num_cut, sources, failures)

    def _ask_model(
        self, prompts: list[Prompt], rows: list[Example], texts: list[str], finished: list[bool]
    ) -> tuple[Tensor, Tensor, int]:
        """(what the reward model gives to each answer [A], of steps their sum; weighted rewards of steps at their own
        tokens [A, R]; how many rows were cut)"""
        args, kind = self.args, self.folder.kind
        given, step_rewards = torch.zeros(len(rows)), torch.zeros(len(rows), max(row.num_targets for row in rows))
        to_score, num_cut = rows_to_score(self.folder, [prompt.asked for prompt in prompts], rows, texts, finished)
        split = self.split._replace(pad_token_id=self.folder.folder.pad_token_id)
        mean, std = (kind.mean, kind.std) if args.normalize_reward else (0.0, 1.0)
        for i, values in enumerate(step_scores(self.model, to_score, split)):
            if kind.separator is None:
                given[i] = (values[0] - mean) / std
            elif args.process_reward != "steps":
                given[i] = aggregate(values, args.process_reward)
            else:
                places = place_of_steps(texts[i], kind.separator, prompts[i], rows[i], self.tokenizer)
                for place, value in zip(places, values, strict=False):  # a row cut for the model has fewer
                    step_rewards[i, place] += args.reward_model_weight * sigmoid(value)
                    given[i] += sigmoid(value)
        return given, step_rewards, num_cut

    def _submit_the_rest(self, prompts: list[Prompt], texts: list[str]) -> None:
        """Submits this rank's share of the answers, but for those that have been."""
        for i in own_share(len(prompts), self.split.dp) if self.pool is not None else ():
            if self.grading.get(i, ())[:2] != (prompts[i], texts[i]):
                self.submit(i, prompts[i], texts[i])

    def _collect(self, num_answers: int) -> dict[str, tuple[list[float], list[str]]]:
        """(a number for each answer, NaN where there is none; why there is none) by each function of the per-answer
        form. A collective."""
        if not self.pooled:
            return {}
        own = {}
        for i in own_share(num_answers, self.split.dp) if self.pool is not None else ():
            own[i] = [tuple(grade.result()) for grade in self.grading[i][2]]
        self.grading.clear()
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        grades = {i: grades for part in parts for i, grades in part.items()}
        collected = {}
        for j, name in enumerate(self.pooled):
            values, failures = zip(*(grades[i][j] for i in range(num_answers)))
            collected[name] = list(values), [failure for failure in failures if failure is not None]
            if collected[name][1] and name not in self.warned:
                self.warned.add(name)
                say(
                    f"--reward_fn: {name} gave an answer no grade: {collected[name][1][0]}; later ones are only counted"
                )
        return collected


def _unique_names(functions: list[Grader]) -> list[str]:
    """The functions' names, with a number where several have the same."""
    names = ["reward_model"]
    for function in functions:
        numbered = (f"{function.name}_{number}" for number in itertools.count(2))
        names.append(next(name for name in itertools.chain([function.name], numbered) if name not in names))
    return names[1:]


def source_metrics(scores: list[Scores]) -> dict[str, float]:
    """What is measured of each source, under TRL's names: mean and deviation of what it gave, unweighted, and to how
    many answers it gave nothing."""
    metrics = {}
    for name in scores[0].sources:
        values = torch.cat([each.sources[name] for each in scores]).double()
        given = values[~values.isnan()]
        metrics[f"rewards/{name}/mean"] = given.mean().item() if len(given) else 0.0
        metrics[f"rewards/{name}/std"] = given.std().item() if len(given) > 1 else 0.0
        failures = [failure for each in scores for failure in each.failures.get(name, [])]
        metrics[f"rewards/{name}/timeouts"] = failures.count("timeout")
        metrics[f"rewards/{name}/errors"] = len(failures) - failures.count("timeout")
    return metrics


def _on_main_rank(function: Callable, *args):
    """function(*args) of the main rank, on all ranks; a ValueError is raised on all of them."""
    outcome = [None, None]
    if is_main_rank():
        try:
            outcome[0] = function(*args)
        except ValueError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]
