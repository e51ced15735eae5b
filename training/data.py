"""Turns records into the rows of supervised fine-tuning, and defines the order in which training takes rows.

The order is a pure function of (seed, epoch), the same on every layout of ranks: to resume, the step number suffices.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from models.batches import pack_row
from models.caches import cache_folder
from models.chats import read_chat
from models.checkpoint import Folder
from models.common import at_least_one, flag, non_negative, refuse_idle
from models.packing import best_fit
from models.record_files import Record, refuse_messages_as_text
from models.records import (
    Encoder,
    EncodingCounts,
    Example,
    Limits,
    encode_answered,
    encode_chat,
    encode_sample,
    end_of_text,
    folder_limits,
    get_field,
    get_prompt,
    is_sample,
    naming,
    require,
)
from models.rows import IN_MEMORY, Rows, Store, encode_file
from models.sampling import check_temperature
from models.sharing import wait_for_all_ranks
from models.tokenizer import Tokenizer
from training.optim import constant_rate


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """Training data."""

    train_file: Path = flag(help="JSON or JSONL records to train on")
    eval_file: Path | None = flag(None, help="records to evaluate on", may_change=True)
    max_seq_len: int | None = flag(None, bounds=at_least_one, help="most tokens of a row; default: the model's context")
    overlong: str = flag("refuse", choices=("refuse", "skip", "truncate"), help="what to do with longer records")
    batch_size: int = flag(32, bounds=at_least_one, help="rows per optimizer step, over all ranks")
    num_epochs: int = flag(1, bounds=at_least_one, help="passes over the training file", may_change=constant_rate)
    max_steps: int | None = flag(
        None,
        bounds=non_negative,
        help="optimizer steps, instead of --num_epochs; 0 only exports",
        may_change=constant_rate,
    )
    shuffle: bool = flag(True, help="shuffle the rows anew in each epoch; else keep the file's order")
    data_cache: str | None = flag(
        None,
        help="folder that caches the tokens of files of 8 MiB and more, for all ranks of a node and later runs, or "
        "off for none; default: gpt-accelera in $XDG_CACHE_HOME or ~/.cache",
        may_change=True,
    )
    data_workers: int | None = flag(
        None, bounds=at_least_one, help="processes that tokenise a large file; default: one per core", may_change=True
    )

    @property
    def store(self) -> Store:
        folder = Path(self.data_cache) if self.data_cache is not None else cache_folder()
        return Store(None if self.data_cache == "off" else folder, self.data_workers)

    def total_steps(self, num_rows: int) -> int:
        return self.num_epochs * -(-num_rows // self.batch_size) if self.max_steps is None else self.max_steps


def check_evaluation(args: DataArgs) -> None:
    """Raises ValueError if evaluation flags are given without an --eval_file, flags of sample answers where there are
    none, or an --eval_temperature that is too low."""
    check_temperature(getattr(args, "eval_temperature", 0.0), "--eval_temperature")  # train_rm.py has none
    if args.eval_file is None:
        if args.eval_steps is not None:
            raise ValueError("--eval_steps needs an --eval_file")
        samples = ["num_eval_samples"] * bool(vars(args).get("num_eval_samples"))
        names = ["eval_max_new_tokens", "eval_temperature", *samples]
        refuse_idle(args, "without an --eval_file", *names)
    elif not vars(args).get("num_eval_samples", 1):
        refuse_idle(args, "with --num_eval_samples 0", "eval_max_new_tokens", "eval_temperature")


def load_rows(
    args: DataArgs, folder: Folder, encode: Callable[..., tuple[Rows, EncodingCounts]], describe: Callable[[Rows], str]
) -> tuple[Rows, Rows | list, dict[str, str]]:
    """Returns (training rows, evaluation rows or [], a printable note on each file). encode(path, tokenizer, limits,
    store) encodes a file, describe(rows) summarises its rows. A collective."""
    limits = folder_limits(folder, args.overlong)
    rows, notes = {"train": [], "eval": []}, {"train": ""}
    for name, path in (("eval", args.eval_file), ("train", args.train_file)):  # shorter file first, to fail early
        if path is not None:
            rows[name], counts = encode(path, folder.tokenizer, limits, args.store)
            notes[name] = f"{describe(rows[name])}{counts}"
    wait_for_all_ranks()  # some ranks may tokenise while others find the tokens in the cache
    return rows["train"], rows["eval"], notes


class PackedRows(Sequence):
    """Records packed into rows of at most max_seq_len tokens without splitting any, in as few rows as best_fit finds.
    Rows are assembled on access. lengths: tokens of each row, [rows]."""

    def __init__(self, rows: Rows, max_seq_len: int):
        sizes, self.rows = rows.lengths[:, 0], rows
        groups = best_fit(sizes.tolist(), max_seq_len)
        self.lengths = np.array([sizes[group].sum() for group in groups])
        self._numbers = np.concatenate(groups)
        self._starts = np.cumsum([0, *map(len, groups)])

    @property
    def num_targets(self) -> int:
        return self.rows.num_targets

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Example:
        i = range(len(self))[i]
        return pack_row([self.rows[j] for j in self.records_in([i])])

    def records_in(self, numbers: list[int]) -> list[int]:
        """Returns the indices of the records in these rows."""
        return [int(j) for i in numbers for j in self._numbers[self._starts[i] : self._starts[i + 1]]]


def encode_sft_file(
    path: Path, tokenizer: Tokenizer, limits: Limits, store: Store = IN_MEMORY
) -> tuple[Rows, EncodingCounts]:
    """Encodes all records of a file as rows. --overlong truncate cuts the end of a record and adds no EOS."""

    def cut(row: Example) -> Example:
        return Example(row.input_ids[: limits.max_seq_len], row.labels[: limits.max_seq_len])

    encoder = Encoder(partial(encode_sft_record, tokenizer=tokenizer), cut, limits)
    rows, counts = encode_file(path, Example, 1, encoder, tokenizer, "sft", store)
    if counts.nothing_to_learn == len(rows):
        raise ValueError(
            f"{path}: no record has a token to learn ({len(rows)} records kept, {counts.skipped} too long); "
            "in chats only the turns of the role assistant are learnt"
        )
    return rows, counts


def encode_sft_record(record: Record, tokenizer: Tokenizer) -> tuple[Example, EncodingCounts]:
    """Returns (row, counts of notable events in encoding it).

    `prompt` + `completion`: loss on the completion and EOS. `messages`, or a prompt in messages: loss on the
    assistant's turns and their end-of-turn tokens. `text`: loss on the whole text and EOS. An output line of
    generate.py: loss on the generated answer, whatever form its prompt's record had.
    """
    given = record.given or record.fields
    with naming(record):
        if is_sample(record):
            return encode_sample(record, tokenizer)
        if "messages" in given:
            return encode_chat(read_chat(given["messages"], given), tokenizer)
        if "text" in given and "completion" not in given and "output" not in given:
            require(isinstance(given["text"], str), "text must be a string")
            refuse_messages_as_text("text", given["text"])
            ids = tokenizer.encode_prefix(given["text"])
            return Example(ids, list(ids)).ended(end_of_text(tokenizer)), EncodingCounts()
        return encode_answered(get_prompt(record), get_field(record, "completion", "output"), tokenizer)


# ------------------------------------------------------------------------------- order and batches

# Flags that determine which records a step takes, and those that do where records are packed or left out by length.
ORDER = {"batch_size", "rollout_batch_size", "train_file", "prompt_file", "seed", "shuffle", "pack", "overlong"}
LENGTHS = {"max_seq_len", "max_prompt_len", "max_new_tokens", "step_separator", "checkpoint_path", "chat_date"}


def order_flags(args) -> set[str]:
    """Returns the flags that determine which records a step takes. args: of any trainer."""
    flags = vars(args)
    by_length = flags.get("pack") or flags["overlong"] == "skip"
    by_length |= flags["overlong"] == "truncate" and "train_file" in flags  # an answer of which nothing is left
    unused = {"max_new_tokens"} if flags.get("max_prompt_len") else set()
    return ORDER | (LENGTHS - unused) if by_length else ORDER


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> list[int]:
    """Returns the shuffled order of the rows in an epoch: a pure function of its arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_rows, generator=generator).tolist()


def training_batches(
    num_rows: int, batch_size: int, *, seed: int, shuffle: bool, first_step: int, last_step: int
) -> Iterator[tuple[int, list[int]]]:
    """Yields (optimizer step, row indices) of first_step..last_step, from 1; an epoch's last batch may be smaller."""
    per_epoch = -(-num_rows // batch_size)
    for step in range(first_step, last_step + 1):
        epoch, batch = divmod(step - 1, per_epoch)
        if batch == 0 or step == first_step:
            order = epoch_order(num_rows, seed=seed, epoch=epoch) if shuffle else list(range(num_rows))
        yield step, order[batch * batch_size : (batch + 1) * batch_size]
