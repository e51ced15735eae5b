"""Prompts of reinforcement learning: loading, length limits, and an order that a run can resume."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from models.chats import Chat
from models.checkpoint import Folder
from models.common import Bounds, at_least_one, count_or_auto, flag, non_negative
from models.config import ModelConfig
from models.generation import PrefillArgs
from models.records import (
    EncodingCounts,
    Limits,
    check_ids,
    cut_prompt,
    encode_prompt,
    get_prompt,
    naming,
    require,
    tokenising,
)
from models.sampling import StopArgs
from models.tokenizer import Tokenizer
from training.data import epoch_order
from training.optim import constant_rate


@dataclass(frozen=True, kw_only=True)
class RolloutArgs(StopArgs, PrefillArgs):
    """Prompts and rollouts."""

    prompt_file: Path = flag(help="records with a prompt; their other fields are passed to --reward_fn")
    eval_prompt_file: Path | None = flag(
        None, help="held-out prompts, evaluated also before the first update", may_change=True
    )
    num_generations_eval: int = flag(
        1, bounds=at_least_one, help="answers to each held-out prompt, for pass@1 to pass@N", may_change=True
    )
    num_eval_samples: int = flag(4, bounds=non_negative, help="answers printed at each evaluation", may_change=True)
    max_prompt_len: int | None = flag(
        None, bounds=at_least_one, help="most tokens of a prompt; default: the context less --max_new_tokens"
    )
    overlong: str = flag(
        "refuse", choices=("refuse", "skip", "truncate"), help="what to do with longer prompts; truncate keeps the end"
    )
    total_steps: int = flag(100, bounds=non_negative, help="updates; 0 only exports", may_change=constant_rate)
    rollout_batch_size: int = flag(64, bounds=at_least_one, help="answers per update, over all ranks")
    minibatch_size: int | None = flag(
        None, bounds=at_least_one, help="answers per optimizer step; default: --rollout_batch_size"
    )
    rollout_slots: int | None = flag(
        None,
        type=count_or_auto,
        metavar="N|auto",
        help="answers generated at a time on a rank; default: auto, up to 256 on a GPU, as memory beside training "
        "allows, and up to 128 on a CPU",
        may_change=True,
    )
    sleep: int = flag(
        0,
        choices=(0, 1, 2),
        help="memory that the engine releases while answers are scored and the policy trains: 0 none, 1 its KV cache, "
        "2 in an update its weights too",
        may_change=True,
    )
    max_new_tokens: int = flag(256, bounds=at_least_one, help="most tokens of an answer")
    temperature: float = flag(1.0, bounds=Bounds(least=1e-4, most=1e4), help="temperature of sampling and log-probs")

    @property
    def step_size(self) -> int:
        """Answers per optimizer step, over all ranks."""
        return self.minibatch_size or self.rollout_batch_size


class Prompt(NamedTuple):
    ids: list[int]  # if truncated, the end of the prompt
    fields: dict  # the whole record
    asked: str | Chat  # the record's prompt, never truncated
    text: str  # passed to reward functions: the record's text, or for a chat or truncated prompt that of ids
    where: str = ""  # file and line


class Prompts(NamedTuple):
    """Training and held-out prompts."""

    train: list[Prompt]
    held_out: list[Prompt]
    longest: int  # most tokens of a prompt and its answer, in both lists
    notes: dict[str, str]  # printable


def load_prompt_files(args: RolloutArgs, folder: Folder) -> Prompts:
    """Loads the prompts of both files. Raises ValueError if answers could not end, or do not fit into the context."""
    args.stops(folder.tokenizer, folder.eos_token_ids)  # raises for a --stop that could never match
    if not folder.eos_token_ids:
        raise ValueError(f"{folder.path}: no EOS token, so no answer would ever end")
    limits, found, notes = prompt_limits(args, folder.config), {}, {"prompts": ""}
    for name, path in (("held out", args.eval_prompt_file), ("prompts", args.prompt_file)):  # the shorter first
        found[name], counts = load_prompts(path, folder.tokenizer, limits) if path else ([], EncodingCounts())
        notes[name] = f"{len(found[name]):,}{counts}"
    longest = max(len(prompt.ids) for prompts in found.values() for prompt in prompts) + args.max_new_tokens
    return Prompts(found["prompts"], found["held out"], longest, notes)


def prompt_limits(args: RolloutArgs, config: ModelConfig) -> Limits:
    """Returns the limits of a prompt. Raises ValueError unless the context has room for a prompt and its answer."""
    room = config.max_position_embeddings - args.max_new_tokens
    if room < 1:
        context = config.describe_context()
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: the context is {context}"
        )
    if args.max_prompt_len is not None and args.max_prompt_len > room:
        raise ValueError(
            f"--max_prompt_len {args.max_prompt_len} and --max_new_tokens {args.max_new_tokens} are more than the "
            f"context of {config.describe_context()}; lower one of them"
        )
    limit = args.max_prompt_len or room
    more = "raise --max_prompt_len" if limit < room else "lower --max_new_tokens"
    return Limits(config.vocab_size, limit, args.overlong, more)


def load_prompts(path: Path, tokenizer: Tokenizer, limits: Limits) -> tuple[list[Prompt], EncodingCounts]:
    """Returns (the prompts of a file, counts of skipped and truncated ones)."""
    prompts, counts, limit = [], EncodingCounts(), limits.max_seq_len
    for record in tokenising(path):
        prompt = get_prompt(record)
        with naming(record):
            ids = encode_prompt(prompt, tokenizer)
            check_ids(ids, limits.vocab_size, record.where)
            require(ids, "the prompt has no tokens, so there is nothing to go on from")
        too_long = len(ids) > limit
        if too_long and limits.overlong == "refuse":
            raise ValueError(f"{record.where}: the prompt has {len(ids)} tokens, the limit is {limit}; {limits.advice}")
        if too_long and limits.overlong == "skip":
            counts = counts.plus(EncodingCounts(skipped=1))
            continue
        if too_long:
            ids, counts = cut_prompt(ids, limit, tokenizer), counts.plus(EncodingCounts(truncated=1))
        text = prompt if isinstance(prompt, str) and not too_long else tokenizer.decode(ids)
        prompts.append(Prompt(ids, record.fields, prompt, text, record.where))
    if not prompts:
        raise ValueError(f"{path}: no prompt is left: all {counts.skipped} are longer than {limit} tokens")
    return prompts, counts


def prompt_numbers(num_prompts: int, first: int, count: int, *, seed: int) -> list[int]:
    """Returns the indices of the next `count` prompts after the first `first` of a run; each epoch has a new order."""
    numbers, epoch = [], first // num_prompts
    while len(numbers) < first % num_prompts + count:
        numbers += epoch_order(num_prompts, seed=seed, epoch=epoch)
        epoch += 1
    return numbers[first % num_prompts :][:count]
