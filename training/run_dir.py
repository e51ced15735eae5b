"""A run directory, and what every trainer does around its steps.

- args.json, metrics.jsonl, checkpoints/step-000100/ (checkpoints.py), and at the end the model itself;
  with --export_steps the model of earlier steps in step-000100/
- a resumed run has the flags and the data that it was begun with: models/identity.py
- what is decided by looking at the disk is decided on the main rank, and all ranks hear of it
- Run holds the cadence: what is resumed, logged, evaluated, saved and ended when. A script calls it and keeps its loop
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from models.adapters import LoraArgs, adapter_tensors, check_base_is_the_same, remove_merged, write_adapter
from models.checkpoint import MERGED, ModelArgs, folder_config, open_folder, stored_dtype
from models.checksums import CHECKSUMS
from models.common import (
    DTYPES,
    Stopwatch,
    at_least_one,
    choose_runtime,
    close_bars,
    dtype_name,
    flag,
    is_main_rank,
    non_negative,
    on_main,
    peak_memory,
    progress_bar,
    refuse_idle,
    say,
)
from models.export import COPIED_FILES, INDEX, WEIGHTS, complete_export, save_folder
from models.files import read_json_object, write_json
from models.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from models.fsdp import full_tensors, start_ranks
from models.gpu import peaks
from models.identity import AcceptArgs, begun_with, changed_flags
from models.model import Transformer
from models.pad_token import named_pad_token, pad_changes
from models.shared import check_shared, check_writable, hold
from models.tokenizer import chat_day
from training.checkpoints import CheckpointWriter, all_fit, load_newest_checkpoint
from training.metrics import UNFINISHED, Metrics, check_installed, logged, read_unfinished
from training.stop import Stop, any_rank, drop_what_nobody_reads

# Between checkpoints where --save_steps says nothing. A time, since a step takes from milliseconds to minutes: whatever
# the model, a failure costs a quarter of an hour at most, and a 7B model's 80 GB are written for less than a twentieth.
SAVE_SECONDS = 15 * 60
# Flags that decide which records a step takes.
ORDER = {"batch_size", "rollout_batch_size", "train_file", "prompt_file", "seed", "shuffle"}
ORDER |= {"pack", "overlong", "max_seq_len"}
Batches = Iterator[tuple[int, list[int]]]  # (step, numbers of its records)
CHANGED_AFTER = "changed_after_step"  # in args.json: {flag that was accepted otherwise: step of the checkpoint then}


@dataclass(frozen=True, kw_only=True)
class RunArgs(ModelArgs, AcceptArgs, LoraArgs):
    """A run directory, and what goes into it when."""

    output_dir: Path = flag(
        help="run directory: metrics, checkpoints and at the end the model", may_change=True, written=True
    )
    resume: bool = flag(False, help="go on from the newest checkpoint in --output_dir", may_change=True)
    eval_steps: int | None = flag(
        None, bounds=at_least_one, help="evaluate every so many steps; at the end only", may_change=True
    )
    save_steps: int | None = flag(
        None,
        bounds=non_negative,
        help="save every so many steps and after the last, or with 0 never; every 15 minutes and after the last",
        may_change=True,
    )
    save_total_limit: int = flag(2, bounds=at_least_one, help="checkpoints to keep", may_change=True)
    export_steps: int | None = flag(
        None,
        bounds=at_least_one,
        help="write the model every so many steps, into step-000100 and so on of --output_dir; at the end only",
        may_change=True,
    )
    log_steps: int = flag(1, bounds=at_least_one, help="write metrics every so many steps", may_change=True)
    report_to: str = flag(
        "none",
        choices=("none", "tensorboard", "wandb"),
        help="where else metrics go; the package must be installed",
        may_change=True,
    )
    export_dtype: str | None = flag(
        None, choices=DTYPES, help="dtype of the exported model; the input folder's", may_change=True
    )


class Run:
    """A training run around its steps. It is called, in this order:

    run = Run(args)                                 refuses what cannot go on, before anything is loaded
    run.begin(model, optimizer, ...)                puts both back to the newest checkpoint; first_step, total_steps
    if run.first_step == 1:
        run.log_start(metrics)
    if run.unfinished:                              the metrics of a step whose evaluation a signal broke off
        ...                                         evaluates, logs and exports as below
    for step, numbers in run.steps(batches, ...):   saves, and ends early for a signal, after the loop's body;
        run.check_finite(...)                       for step in run.updates(): in reinforcement learning
        run.begin_update()                          before the optimizer's first step
        if run.eval_due:
            with run.evaluating(metrics): ...
        run.log(metrics)                            the state is that of this step from here on
        if run.export_due:
            run.export(model, subfolder=run.step_folder)
    run.export(model)

    A signal or an error that all ranks have found ends the run at one of these calls, or in run.stop.check; the state
    is saved first. step, numbers: of the step under way; first_step: the one to begin with, from 1. last_line: the step
    up to which logs are kept; a run that begins anew keeps not even step 0. num_tokens: taken so far; speed() adds to
    it. changed: the flags that a resumed run has otherwise than its checkpoint, as --accept_changed allows.
    """

    def __init__(self, args: RunArgs):
        """Raises ValueError if the run would mix with an earlier one, or go on as another. A collective."""
        self.stop = Stop()
        self.stop.listen()
        start_ranks(choose_runtime(args).device)
        on_main(lambda: check_installed(args.report_to))
        check_shared(args.output_dir, f"--output_dir {args.output_dir}")
        self.today, self._begun_with, self.changed = on_main(lambda: prepare_output_dir(args))
        self.args, self.num_tokens = replace(args, chat_date=self.today.isoformat()), 0

    def begin(self, model: nn.Module, optimizer, *, total_steps: int, device: torch.device) -> None:
        """With --resume model and optimizer (or a list of them) are put back to what they were; their settings remain
        those of the flags. Writes args.json. ValueError if the run has gone further than it is asked to. A
        collective."""
        args = self.args
        on_main(self._take_output_dir)
        done = load_newest_checkpoint(args.output_dir, model, optimizer) if args.resume else 0
        if done > total_steps:
            raise ValueError(f"--resume: the run has done {done} steps already, and only {total_steps} are asked for")
        changed_after = self._begun_with.get(CHANGED_AFTER, {}) | dict.fromkeys(self.changed, done)
        if changed_after:  # until there is a later checkpoint the next --resume goes on from what is changed here
            self._begun_with[CHANGED_AFTER] = changed_after
        self.changed = frozenset(name for name, step in changed_after.items() if step >= done)
        for name in sorted(self.changed & ORDER) if done else ():  # where a step is among the records is its number's
            say(f"--{name}: steps count records otherwise now, so some of this epoch come again, or not at all")
        self.first_step, self.total_steps, self.device = done + 1, total_steps, device
        self.step, self.numbers, self._unit, self._bar = done, [], "step", None
        self.unfinished = on_main(lambda: read_unfinished(args.output_dir, done, total_steps))
        self.last_line = done - bool(self.unfinished) if done else -1
        on_main(self._write_args)
        self._metrics = Metrics(args.output_dir, after_step=self.last_line, report_to=args.report_to)
        # in the background on a GPU; of an offloaded model that would hold the state in the CPU's memory twice
        in_background = next(model.parameters()).is_cuda
        self._checkpoints = CheckpointWriter(
            args.output_dir, model, optimizer, limit=args.save_total_limit, asynchronous=in_background
        )
        self._export_dtype = DTYPES[args.export_dtype] if args.export_dtype else stored_dtype(args.checkpoint_path)
        self._saved, self._saved_at, self._evaluated = done, time.monotonic(), None
        self.stop.state_of, self.stop.keep = done, self._keep
        self.stop.check()
        drop_what_nobody_reads()

    def _take_output_dir(self) -> None:
        folder = self.args.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = hold(folder / ".lock", f"--output_dir {folder}")
        if not self.args.resume and (folder / "args.json").exists():  # it began at the same time, and has ended
            raise ValueError(f"--output_dir {folder}: another run has written it in the meantime")

    def _write_args(self) -> None:
        for folder in (self.args.output_dir, self.args.output_dir / MERGED):
            complete_export(folder)
        write_json(self.args.output_dir / "args.json", self._begun_with)

    def steps(self, batches: Callable[..., Batches], lengths: np.ndarray) -> Batches:
        """Yields (step, numbers of its records), from first_step on; after each step the checkpoint that is due. A run
        that is asked to end does so between two of them; see Stop. batches(first_step=, last_step=): those of some
        steps; lengths: tokens of the records."""
        self._count_tokens(batches(first_step=1, last_step=self.first_step - 1), lengths)
        yield from self._loop(batches(first_step=self.first_step, last_step=self.total_steps), "step")

    def updates(self) -> Iterator[int]:
        """steps() of reinforcement learning, whose records are not known before: they go into `numbers`."""
        batches = ((step, []) for step in range(self.first_step, self.total_steps + 1))
        yield from (step for step, _ in self._loop(batches, "update"))

    def _loop(self, batches: Batches, unit: str) -> Batches:
        self._watch, self._unit = Stopwatch(self.device), unit
        self._bar = progress_bar(total=self.total_steps, initial=self.first_step - 1, desc="training", unit=unit)
        for self.step, self.numbers in batches:
            drop_what_nobody_reads()
            self._watch.lap()
            yield self.step, self.numbers
            self._bar.update(1)
            self._end_update()
            stopped, save_due = any_rank([self.stop.received, self._save_due()])
            if stopped:
                self.stop.leave()
            if save_due:
                self.check_weights(self._checkpoints.model)
                self._save()
        self._close()

    def _count_tokens(self, batches: Batches, lengths: np.ndarray) -> None:
        """num_tokens of the steps before first_step: as logged, and behind that of the rows of these batches."""
        path, done = self.args.output_dir / "metrics.jsonl", self.first_step - 1
        known = on_main(lambda: [(x["step"], x["num_tokens"]) for x, _ in logged(path) if "num_tokens" in x][-1:])
        last, self.num_tokens = known[0] if known else (0, 0)
        self.num_tokens += sum(int(lengths[numbers].sum()) for step, numbers in batches if last < step <= done)

    def begin_update(self) -> None:
        """From here to the step's evaluation, or to log(), the state is that of no step: the run goes on."""
        self.stop.state_of = None

    def _end_update(self) -> None:
        self.stop.state_of = self.step

    @contextmanager
    def evaluating(self, metrics: dict[str, float]) -> Iterator[None]:
        """The evaluation of a step, whose metrics are these so far. A signal may break it off; then they are kept, and
        the resumed run begins with the evaluation (unfinished), so that it writes the same line."""
        self._end_update()
        self._evaluated = dict(metrics)
        self.stop.check()
        yield
        self._evaluated = None

    def _save(self) -> None:
        self._checkpoints.save(self.stop.state_of)
        self._saved, self._saved_at = self.stop.state_of, time.monotonic()

    def _keep(self, failed: bool) -> str:
        """Saves the state if it is that of a step and not saved yet, and the metrics of a step that is evaluated; says
        which it is. failed: the run ends by an error, so that no older checkpoint makes room for this one."""
        if self._evaluated is not None and is_main_rank():
            write_json(self.args.output_dir / UNFINISHED, {"step": self.step, **self._evaluated})
        done = self.stop.state_of
        when = f"after {self._unit} {done}" if done else f"before the first {self._unit}"
        if done is None:
            when = f"in {self._unit} {self.step}"
        elif done != self._saved and not all_fit(self._checkpoints.model):
            say(f"the state {when} is not saved, since it has weights that are not finite")
        elif done != self._saved:
            self._checkpoints.limit += failed
            self._checkpoints.model.zero_grad(set_to_none=True)  # of a step that is given up
            self._save()
            if failed:
                say(f"the state {when} is saved")
        if failed:
            close_bars()
        self._close()
        return when

    def _close(self) -> None:
        self._checkpoints.finish()
        if self._bar is not None:
            self._bar.close()
        self._metrics.close()

    @property
    def eval_due(self) -> bool:
        """Whether this step ends with an evaluation."""
        every = self.args.eval_steps
        return self.step == self.total_steps or (every is not None and self.step % every == 0)

    @property
    def export_due(self) -> bool:
        """Whether the model of this step is to be written into step_folder."""
        every = self.args.export_steps
        return every is not None and self.step % every == 0

    @property
    def step_folder(self) -> str:
        return f"step-{self.step:06d}"

    def _save_due(self) -> bool:
        every = self.args.save_steps
        if every is None:
            return self.step == self.total_steps or time.monotonic() - self._saved_at >= SAVE_SECONDS
        return every > 0 and (self.step == self.total_steps or self.step % every == 0)

    def check_finite(self, **values: float | Tensor) -> None:
        """Raises ValueError that names the step and its records if a value, the same on all ranks, is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                numbers = ", ".join(map(str, self.numbers[:64])) + (", ..." if len(self.numbers) > 64 else "")
                numbers += "; skipped ones are not counted" * (vars(self.args).get("overlong") == "skip")
                message = f"{name} is {float(value)}; records of the step (from 0): {numbers}"
                self.stop.fail(f"step {self.step}: {message}")

    def check_weights(self, model: nn.Module) -> None:
        """Raises ValueError, before they replace sound ones, if weights of the model are not finite. A collective."""
        if not all_fit(model):
            advice = "take a lower --learning_rate; --resume goes on from the checkpoint before with --accept_changed"
            self.stop.fail(f"{self._unit} {self.step}: the weights are not finite; {advice} learning_rate")

    def speed(self, model: Transformer, lengths: list[int], *, beside: bool = False) -> dict[str, float]:
        """The metrics num_tokens, tokens_per_second, and mfu where the device's peak is known, of the time since the
        step began, on all ranks. model: that learns; lengths: of the sequences in the step; beside: whether another of
        its size has seen them, without a backward."""
        self.num_tokens += sum(lengths)
        rate = sum(lengths) / self._watch.lap()
        metrics = {"num_tokens": self.num_tokens, "tokens_per_second": rate}
        peak = peaks(self.device)
        if peak is not None:
            mean_len = sum(n * n for n in lengths) / sum(lengths)  # the length of its sequence, for the average token
            kind = {"frozen": model.lora is not None, "has_lm_head": hasattr(model, "lm_head")}
            flops = model.config.training_flops_per_token(mean_len, **kind)
            flops += beside * model.config.training_flops_per_token(mean_len) / 3
            metrics["mfu"] = rate * flops / (peak[0] * dist.get_world_size())
        return metrics

    def log(self, metrics: dict[str, float], *shown: str) -> None:
        """Writes the metrics of this step, under any names, if they are due. shown: those that the progress bar says,
        beside the speed; the loss."""
        self._end_update()
        if self.eval_due or self.step % self.args.log_steps == 0:
            self._metrics.write({"step": self.step, **metrics})
        if self.unfinished and is_main_rank():
            (self.args.output_dir / UNFINISHED).unlink(missing_ok=True)
        self.unfinished = {}
        if self._bar is None:  # before the first step of a resumed run
            return
        parts = [f"{name.split('/')[-1]} {metrics[name]:.4f}" for name in shown or ("loss",) if name in metrics]
        parts += [f"{metrics[name]:,.0f} tok/s" for name in ("tokens_per_second",) if name in metrics]
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def span(self) -> str:
        """Which steps this process takes, for people."""
        left = self.first_step <= self.total_steps
        return f"{self.first_step} to {self.total_steps}" if left else f"none left of {self.total_steps}"

    def log_start(self, metrics: dict[str, float]) -> None:
        """Writes what was measured before the first step, as step 0."""
        self._metrics.write({"step": 0, **metrics})

    def show(self, text: str) -> None:
        """Prints on the main rank, above the progress bar."""
        drop_what_nobody_reads()
        if is_main_rank():
            tqdm.write(text)

    def export(
        self,
        model: nn.Module,
        config: dict | None = None,
        *,
        json_changes: dict[str, dict] | None = None,
        what: str = "model",
        subfolder: str = "",
    ) -> None:
        """Writes the model as a Hugging Face folder into the run directory. A collective. config: of its config.json;
        that of the folder the run began with, and with it the pad token that the folder's tokenizer has, and all stop
        tokens. json_changes: to the other files of that folder, see save_folder."""
        folder, start = self.args.output_dir / subfolder, self.args.checkpoint_path
        size = f"peak memory {peak_memory(self.device) / 1e9:,.2f} GB"
        drop_what_nobody_reads()
        self.check_weights(model)
        if model.lora is None and not all_fit(model, self._export_dtype):
            why = f"{self._export_dtype} cannot hold weights of the {what}"
            raise ValueError(f"{folder}: {why}; --resume with --export_dtype float32")
        if model.lora is not None:
            base = folder_config(model.lora.base)
            told = {name: value for name, value in (config or base).items() if base.get(name) != value}
            if not self.args.merge:
                on_main(lambda: remove_merged(folder))
            write_adapter(folder, adapter_tensors(model), model.lora, told)
            say(f"{folder}: adapter of the {what} written; {size}")
            if not self.args.merge:
                return
            on_main(lambda: check_base_is_the_same(model.lora))
            folder = folder / MERGED
        changes = dict(json_changes or {})
        if config is None:
            config, began = folder_config(start), open_folder(start, frozen=True)
            pad = named_pad_token(began)
            if pad is not None and pad.id < config["vocab_size"]:  # many folders name one without an embedding
                config |= {} if config.get("pad_token_id") is None else {"pad_token_id": pad.id}
                changes |= pad_changes(start, pad)
            changes["generation_config.json"] = changes.get("generation_config.json", {}) | began.generation_changes()
        save_folder(
            folder, full_tensors(model), config=config, copy_from=start, json_changes=changes, dtype=self._export_dtype
        )
        say(f"{folder}: {what} written; {size}")


# ------------------------------------------------------------------------------------------- flags


def prepare_output_dir(args: RunArgs) -> tuple[date, dict, frozenset[str]]:
    """(the day of the run, what it is begun with, the flags that it has otherwise than it was begun with). Raises
    ValueError if the run would mix with an earlier one, or go on with what makes it another."""
    folder = args.output_dir
    if args.uses_lora and not args.merge:
        refuse_idle(args, "with --no-merge: adapters are float32", "export_dtype")
    earlier = read_json_object(folder / "args.json", missing_ok=True) if args.resume else {}
    today = chat_day(args.chat_date, earlier.get("chat_date"))
    check_output_dir(folder)
    if not args.resume and args.accept_changed:
        raise ValueError("--accept_changed is for a run that goes on with --resume")
    if not args.resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--output_dir {folder}: is not empty; take another, or go on with --resume")
    if (folder / "config.json").exists() and not (folder / "args.json").exists():
        raise ValueError(f"--output_dir {folder}: holds a model and no run to --resume; it would be overwritten")
    dtype = dtype_name(choose_runtime(replace(args, dtype=None)).dtype)  # of this device
    args = replace(args, chat_date=today.isoformat(), dtype=args.dtype or dtype)
    now = begun_with(args)
    if not earlier:
        return today, now, frozenset()
    now |= {CHANGED_AFTER: earlier[CHANGED_AFTER]} if CHANGED_AFTER in earlier else {}
    for name, default in (("chat_date", args.chat_date), ("dtype", dtype)):  # older runs did not say
        earlier[name] = earlier.get(name) or default
    return today, now, changed_flags(args, now, earlier, f"--resume {folder}")


def check_output_dir(folder: Path) -> None:
    """Raises ValueError or OSError where a run could not write at its end, though it has not begun."""
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"--output_dir {folder}: is a symbolic link to nothing")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder}: is a file")
    exported = ("config.json", WEIGHTS, INDEX, CHECKSUMS, ADAPTER_CONFIG, ADAPTER_WEIGHTS, *COPIED_FILES)
    for name in ("args.json", "metrics.jsonl", "samples.jsonl", *exported):
        if (folder / name).is_dir():
            raise ValueError(f"--output_dir {folder}: {name} is a folder, where the run writes a file")
    subfolders = [folder / name for name in ("checkpoints", "critic", MERGED, f"critic/{MERGED}")]
    subfolders += folder.glob("step-*")
    for path in (folder, *subfolders):
        check_writable(path, f"--output_dir {folder}")
