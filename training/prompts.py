"""The prompts of reinforcement learning, in an order that a run can resume."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from models.chats import Chat
from models.checkpoint import Folder
from models.common import Bounds, at_least_one, flag, non_negative
from models.generation import StopArgs, stops_of
from models.records import Limits, check_ids, encode_prompt, get_prompt, naming, tokenising
from models.tokenizer import Tokenizer
from training.data import epoch_order
from training.optim import constant_rate


@dataclass(frozen=True, kw_only=True)
class RolloutArgs(StopArgs):
    """Prompts, and the answers that are drawn to them."""

    prompt_file: Path = flag(help="records with a prompt; other fields go to --reward_fn")
    eval_prompt_file: Path | None = flag(
        None, help="held-out prompts, to be answered also before the first update", may_change=True
    )
    num_generations_eval: int = flag(
        1, bounds=at_least_one, help="answers to each of them, for pass@1 to pass@N", may_change=True
    )
    num_eval_samples: int = flag(4, bounds=non_negative, help="answers shown at each evaluation", may_change=True)
    overlong: str = flag("refuse", choices=("refuse", "skip"), help="what to do with prompts that leave no room")
    total_steps: int = flag(100, bounds=non_negative, help="updates; 0 only exports", may_change=constant_rate)
    rollout_batch_size: int = flag(64, bounds=at_least_one, help="answers per update, over all ranks")
    minibatch_size: int | None = flag(
        None, bounds=at_least_one, help="answers per optimizer step; --rollout_batch_size"
    )
    rollout_slots: int | None = flag(
        None, bounds=at_least_one, help="answers drawn at a time on a rank; up to 128", may_change=True
    )
    max_new_tokens: int = flag(256, bounds=at_least_one, help="most tokens of an answer")
    temperature: float = flag(1.0, bounds=Bounds(least=1e-4, most=1e4), help="of the sampler and all log-probs")

    @property
    def step_size(self) -> int:
        """Answers per optimizer step, over all ranks."""
        return self.minibatch_size or self.rollout_batch_size


class Prompt(NamedTuple):
    ids: list[int]
    fields: dict  # the whole record
    asked: str | Chat
    text: str  # what a reward function is given


class Prompts(NamedTuple):
    """Those to learn from and those held out."""

    train: list[Prompt]
    held_out: list[Prompt]
    longest: int  # tokens of a prompt and its answer, of both
    note: str  # for people


def load_prompt_files(args: RolloutArgs, folder: Folder) -> Prompts:
    """The prompts of both files. Raises ValueError if answers could not end, or have no room."""
    stops_of(args.stop or (), folder.tokenizer)
    if not folder.eos_token_ids:
        raise ValueError(f"{folder.path}: no EOS token, so no answer would ever end")
    context = folder.config.max_position_embeddings
    if args.max_new_tokens >= context:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: the context is {context} tokens"
        )
    limits = Limits(folder.config.vocab_size, context - args.max_new_tokens, args.overlong)
    train, skipped = load_prompts(args.prompt_file, folder.tokenizer, limits)
    held_out, held_out_skipped = [], 0
    if args.eval_prompt_file:
        held_out, held_out_skipped = load_prompts(args.eval_prompt_file, folder.tokenizer, limits)
    longest = max(len(prompt.ids) for prompt in [*train, *held_out]) + args.max_new_tokens
    note = f"{len(train):,}, {skipped:,} too long; held out {len(held_out):,}, {held_out_skipped:,} too long"
    return Prompts(train, held_out, longest, note)


def load_prompts(path: Path, tokenizer: Tokenizer, limits: Limits) -> tuple[list[Prompt], int]:
    """(the prompts of a file, how many were skipped as too long)"""
    prompts, skipped = [], 0
    for record in tokenising(path):
        prompt = get_prompt(record)
        with naming(record):
            ids = encode_prompt(prompt, tokenizer)
            check_ids(ids, limits.vocab_size, record.where)
        if 0 < len(ids) <= limits.max_seq_len:
            text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
            prompts.append(Prompt(ids, record.fields, prompt, text))
        elif ids and limits.overlong == "skip":
            skipped += 1
        else:
            raise ValueError(
                f"{record.where}: the prompt has {len(ids)} tokens, and between 1 and {limits.max_seq_len} leave "
                "room for --max_new_tokens in the model's context; lower that or choose --overlong skip"
            )
    if not prompts:
        raise ValueError(f"{path}: no prompt is left: all {skipped} leave no room for --max_new_tokens")
    return prompts, skipped


def prompt_numbers(num_prompts: int, first: int, count: int, *, seed: int) -> list[int]:
    """The prompts of the answers first..first + count - 1 of a run: a new order each epoch, without gaps in between."""
    numbers, epoch = [], first // num_prompts
    while len(numbers) < first % num_prompts + count:
        numbers += epoch_order(num_prompts, seed=seed, epoch=epoch, shuffle=True)
        epoch += 1
    return numbers[first % num_prompts :][:count]
