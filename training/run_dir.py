"""The run directory, and everything that a trainer does around its steps.

- it holds args.json, metrics.jsonl, checkpoints/step-000100/ (checkpoints.py), and at the end the model itself; with
  --export_steps also the models of earlier steps, in step-000100/
- a resumed run must have the flags and data that it was started with: models/identity.py
- the main rank makes every decision that depends on the disk, and broadcasts it to all ranks
- Run decides when to resume, log, evaluate, save and stop; the script keeps its training loop and calls Run
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from models.checkpoint import MERGED, ModelArgs, stored_dtype
from models.common import (
    DTYPES,
    Stopwatch,
    at_least_one,
    choose_runtime,
    close_bars,
    flag,
    is_main_rank,
    non_negative,
    on_main,
    peak_memory,
    progress_bar,
    say,
)
from models.export import CannotHold, complete_export, files_of_export, save_folder
from models.files import write_json
from models.fingerprint import small_fingerprint
from models.fsdp import full_tensors, start_ranks
from models.gpu import mean_length, peaks
from models.identity import AcceptArgs, check_ranks_agree
from models.model import Transformer
from models.shared import check_free, check_shared, hold
from models.trained_adapters import LoraArgs, adapter_tensors, check_base_is_the_same, remove_merged, write_adapter
from training.checkpoints import CheckpointWriter, all_fit, load_newest_checkpoint
from training.data import ORDER, order_flags
from training.metrics import HAS_LINE, UNFINISHED, Metrics, check_installed, logged, read_unfinished
from training.output_dir import CHANGED_AFTER, prepare_output_dir
from training.stop import Stop, any_rank, drop_what_nobody_reads

# Time between checkpoints without --save_steps. Not a number of steps, since a step takes from milliseconds to minutes:
# whatever the model, a failure costs at most 15 minutes, and writing a 7B model's 80 GB takes under 5 % of that time.
SAVE_SECONDS = 15 * 60
Batches = Iterator[tuple[int, list[int]]]  # (step, indices of its records)


@dataclass(frozen=True, kw_only=True)
class RunArgs(ModelArgs, AcceptArgs, LoraArgs):
    """Run directory: logging, evaluation, checkpoints and export."""

    output_dir: Path = flag(
        help="run directory, for metrics, checkpoints and the final model", may_change=True, written=True
    )
    resume: bool = flag(False, help="resume from the newest checkpoint in --output_dir", may_change=True)
    eval_steps: int | None = flag(
        None, bounds=at_least_one, help="evaluate every N steps; default: at the end only", may_change=True
    )
    save_steps: int | None = flag(
        None,
        bounds=non_negative,
        help="save every N steps and after the last, or never if 0; default: every 15 minutes and after the last",
        may_change=True,
    )
    save_total_limit: int = flag(2, bounds=at_least_one, help="number of checkpoints to keep", may_change=True)
    export_steps: int | None = flag(
        None,
        bounds=at_least_one,
        help="export the model every N steps, to step-000100 etc. in --output_dir; default: at the end only",
        may_change=True,
    )
    log_steps: int = flag(1, bounds=at_least_one, help="write metrics every N steps", may_change=True)
    report_to: str = flag(
        "none",
        choices=("none", "tensorboard", "wandb"),
        help="dashboard that gets the metrics too; its package must be installed",
        may_change=True,
    )
    export_dtype: str | None = flag(
        None, choices=DTYPES, help="dtype of the exported model; default: that of --checkpoint_path", may_change=True
    )


class Run:
    """Everything around the steps of a training run; "How to add a stage" in training/README.md has the calls in order.

    A signal, or an error that all ranks raise, ends the run at one of these calls or in run.stop.check, which save the
    state first. runtime: the device, dtype and compilation that the flags choose; today: the date for chat templates.
    step, numbers: the current step and its records; first_step: the one to start with, counted from 1.
    unfinished: the metrics of a step whose evaluation a signal interrupted, or whose export failed, to be evaluated,
    logged and exported first; {} otherwise. interrupted: whether that step has no line yet, rather than one without an
    evaluation. last_line: the step up to which logs are kept, -1 for a new run. num_tokens: processed so far; speed()
    adds to it. changed: the flags in which a resumed run differs from its checkpoint, as --accept_changed allows.
    """

    def __init__(self, args: RunArgs):
        """Raises ValueError if the output folder holds another run, a resumed run has other flags, or a rank has others
        than rank 0. A collective."""
        self.stop = Stop()
        self.stop.listen()
        self.runtime = choose_runtime(args)
        start_ranks(self.runtime.device)
        on_main(lambda: check_installed(args.report_to))
        check_shared(args.output_dir, f"--output_dir {args.output_dir}")
        self.today, self._begun_with, self.changed = on_main(lambda: prepare_output_dir(args))
        check_ranks_agree(args, self._begun_with)
        on_main(lambda: check_free(args.output_dir / ".lock", f"--output_dir {args.output_dir}"))
        self._copied = on_main(lambda: small_fingerprint(args.checkpoint_path))  # exports copy these files from there
        self._evaluated, self._line = None, None  # metrics of a step in evaluation, and of one that may export
        self.args, self.num_tokens = replace(args, chat_date=self.today.isoformat()), 0

    def begin(self, model: nn.Module, optimizer, *, total_steps: int, order: set[str] | None = None) -> None:
        """With --resume restores model and optimizer (or a list of optimizers) from the newest checkpoint, except for
        settings such as the learning rate, which come from the flags. Writes args.json. order: the flags that determine
        which records a step takes; default: order_flags. Raises ValueError if the run has already taken more than
        total_steps. A collective."""
        args = self.args
        on_main(self._take_output_dir)
        done = load_newest_checkpoint(args.output_dir, model, optimizer) if args.resume else 0
        if done > total_steps:
            raise ValueError(f"--resume: the run has taken {done} steps already, more than the {total_steps} asked for")
        changed_after = self._begun_with.get(CHANGED_AFTER, {}) | dict.fromkeys(self.changed, done)
        if changed_after:  # kept until there is a later checkpoint: the next --resume starts from this one, too
            self._begun_with[CHANGED_AFTER] = changed_after
        self.changed = frozenset(name for name, step in changed_after.items() if step >= done)
        for name in sorted(self.changed & (order or order_flags(args))) if done else ():
            how = "changed" if name in ORDER else "may have changed"
            say(f"--{name} {how} which records a step takes: some of this epoch are repeated or left out")
        self.first_step, self.total_steps = done + 1, total_steps
        self.step, self.numbers, self._unit, self._bar = done, [], "step", None
        self.unfinished, self.interrupted = on_main(lambda: read_unfinished(args.output_dir, done, total_steps))
        self.last_line = done - bool(self.unfinished) if done else -1
        on_main(self._write_args)
        self._metrics = Metrics(args.output_dir, after_step=self.last_line, report_to=args.report_to)
        # save in the background on a GPU; with an offloaded model the CPU's memory would hold the state twice
        in_background = next(model.parameters()).is_cuda
        self._checkpoints = CheckpointWriter(
            args.output_dir, model, optimizer, limit=args.save_total_limit, asynchronous=in_background
        )
        self._export_dtype = DTYPES[args.export_dtype] if args.export_dtype else stored_dtype(args.checkpoint_path)
        self._saved, self._saved_at = done, time.monotonic()
        self.stop.state_of, self.stop.keep = done, self._keep
        self.stop.check()
        drop_what_nobody_reads()

    def _take_output_dir(self) -> None:
        folder = self.args.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = hold(folder / ".lock", f"--output_dir {folder}")
        if not self.args.resume and (folder / "args.json").exists():  # it started at the same time, and has ended
            raise ValueError(f"--output_dir {folder}: another run has written it in the meantime")

    def _write_args(self) -> None:
        for folder in (self.args.output_dir, self.args.output_dir / MERGED):
            complete_export(folder)
        write_json(self.args.output_dir / "args.json", self._begun_with)

    def steps(self, batches: Callable[..., Batches], lengths: np.ndarray) -> Batches:
        """Yields (step, indices of its records) from first_step on. After each step saves a checkpoint if one is due,
        or ends the run after a signal; see Stop. batches(first_step=, last_step=): yields the same for a range of
        steps. lengths: tokens of each record."""
        self._count_tokens(batches(first_step=1, last_step=self.first_step - 1), lengths)
        yield from self._loop(batches(first_step=self.first_step, last_step=self.total_steps), "step")

    def updates(self) -> Iterator[int]:
        """As steps(), for reinforcement learning, which sets `numbers` itself: its records are not known in advance."""
        batches = ((step, []) for step in range(self.first_step, self.total_steps + 1))
        yield from (step for step, _ in self._loop(batches, "update"))

    def _loop(self, batches: Batches, unit: str) -> Batches:
        self._forget_unfinished()
        self._line = None
        self._watch, self._unit = Stopwatch(self.runtime.device), unit
        self._bar = progress_bar(total=self.total_steps, initial=self.first_step - 1, desc="training", unit=unit)
        for self.step, self.numbers in batches:
            drop_what_nobody_reads()
            self._watch.lap()
            yield self.step, self.numbers
            self._line = None
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
        """Sets num_tokens of the steps before first_step: the last logged one, plus the tokens of later batches."""
        path, done = self.args.output_dir / "metrics.jsonl", self.first_step - 1
        known = on_main(lambda: [(x["step"], x["num_tokens"]) for x, _ in logged(path) if "num_tokens" in x][-1:])
        last, self.num_tokens = known[0] if known else (0, 0)
        self.num_tokens += sum(int(lengths[numbers].sum()) for step, numbers in batches if last < step <= done)

    def begin_update(self) -> None:
        """Marks the state as mid-update, until evaluating() or log(): it cannot be saved, and signals wait."""
        self.stop.state_of = None

    def _end_update(self) -> None:
        self.stop.state_of = self.step

    @contextmanager
    def evaluating(self, metrics: dict[str, float]) -> Iterator[None]:
        """Wraps the evaluation of a step. If a signal interrupts it, the metrics so far are saved, and the resumed run
        starts with this evaluation (see unfinished), so that it writes the same line."""
        self._end_update()
        self._evaluated = dict(metrics)
        self.stop.check()
        yield
        self._evaluated = None

    def _save(self) -> None:
        self._checkpoints.save(self.stop.state_of)
        self._saved, self._saved_at = self.stop.state_of, time.monotonic()

    def _keep(self, failed: bool) -> str:
        """Saves the state, unless it is mid-update or saved already, and the metrics of an interrupted evaluation.
        Returns where the run ended ("after step 3"). failed: after an error; then no older checkpoint is deleted."""
        if self._evaluated is not None and is_main_rank():
            has_line = self.step < self.first_step and not self.interrupted
            values = {"step": self.step, **self._evaluated, HAS_LINE: has_line}
            write_json(self.args.output_dir / UNFINISHED, values)
        done = self.stop.state_of
        when = f"after {self._unit} {done}" if done else f"before the first {self._unit}"
        if done is None:
            when = f"in {self._unit} {self.step}"
        elif done != self._saved and not all_fit(self._checkpoints.model):
            say(f"the state {when} is not saved: its weights are not finite")
        elif done != self._saved:
            self._checkpoints.limit += failed
            self._checkpoints.model.zero_grad(set_to_none=True)  # those of an abandoned step
            self._save()
            if failed:
                say(f"the state {when} is saved")
        if failed:
            close_bars()
        self._close()
        return when

    def _forget_unfinished(self) -> None:
        """Removes the metrics of an interrupted evaluation once the step's line is written and its model exported."""
        if is_main_rank() and not self.unfinished and self._evaluated is None:
            (self.args.output_dir / UNFINISHED).unlink(missing_ok=True)

    def _close(self) -> None:
        self._checkpoints.finish()
        self._forget_unfinished()
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
        """Whether the model of this step should be exported to step_folder."""
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
        """Raises ValueError, naming the step and its records, if a value is not finite. Values: equal on all ranks."""
        for name, value in values.items():
            if not math.isfinite(value):
                numbers = ", ".join(map(str, self.numbers[:64])) + (", ..." if len(self.numbers) > 64 else "")
                numbers += "; skipped records are not counted" * (vars(self.args).get("overlong") == "skip")
                where = f"records of the step (from 0): {numbers}"
                if self._evaluated is not None:
                    where = "in its evaluation, with which --resume begins"
                self.stop.fail(f"step {self.step}: {name} is {float(value)}; {where}")

    def check_weights(self, model: nn.Module) -> None:
        """Raises ValueError if weights are not finite, before they are saved over finite ones. A collective."""
        if not all_fit(model):
            names = [name for name in ("learning_rate", "value_learning_rate") if hasattr(self.args, name)]
            lower = " or ".join(f"--{name}" for name in names)
            self.stop.fail(
                f"{self._unit} {self.step}: the weights are not finite; take a lower {lower} and --resume from the "
                f"last checkpoint with --accept_changed {' '.join(names)}"
            )

    def fail_export(self, message: str) -> NoReturn:
        """Ends the run with a ValueError. The state is saved; if a step's model was to be exported, the resumed run
        evaluates, logs and exports that step first. A collective: all ranks must call it."""
        self._evaluated = self._line
        self.stop.fail(message)

    def _check_start(self, model: nn.Module) -> None:
        """Ends the run if the files that an export takes from --checkpoint_path are not those that it began with. For a
        LoRA base check_base_is_the_same does this, once the adapter is written. A collective."""
        start = self.args.checkpoint_path
        if model.lora is None and on_main(lambda: small_fingerprint(start) != self._copied):
            self.fail_export(f"{start}: other content than when the run began; restore it and --resume")

    def speed(
        self, model: Transformer, lengths: list[int], num_targets: int, *, beside: bool = False
    ) -> dict[str, float]:
        """Returns num_tokens, tokens_per_second, and mfu if the device's peak is known, over all ranks and the time
        since the step began. model: the one that trains; lengths: of the step's sequences; num_targets: their tokens
        with logits; beside: whether another model of its size ran a forward pass (no backward), such as a reference."""
        self.num_tokens += sum(lengths)
        rate = sum(lengths) / self._watch.lap()
        metrics = {"num_tokens": self.num_tokens, "tokens_per_second": rate}
        peak = peaks(self.runtime.device)
        if peak is not None:
            flops_of = partial(model.config.training_flops_per_token, mean_length(lengths))
            logits = num_targets / sum(lengths)
            flops = flops_of(frozen=model.lora is not None, logits=logits) + beside * flops_of(logits=logits) / 3
            metrics["mfu"] = rate * flops / (peak[0] * dist.get_world_size())
        return metrics

    def log(self, metrics: dict[str, float], *shown: str, due: bool = False) -> None:
        """Writes the metrics of this step, under any names, if a line is due. shown: the metrics that the progress bar
        shows beside the speed; default: the loss. due: whatever --log_steps says, since the run ends here."""
        self._end_update()
        if due or self.eval_due or self.step % self.args.log_steps == 0:
            self._metrics.write({"step": self.step, **metrics})
        self.unfinished, self._line = {}, dict(metrics)
        if self._bar is None:  # before the first step of a resumed run
            return
        parts = [f"{name.split('/')[-1]} {metrics[name]:.4f}" for name in shown or ("loss",) if name in metrics]
        parts += [f"{metrics[name]:,.0f} tok/s" for name in ("tokens_per_second",) if name in metrics]
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def span(self) -> str:
        """Returns which steps this process takes, for printing."""
        left = self.first_step <= self.total_steps
        return f"{self.first_step} to {self.total_steps}" if left else f"none left of {self.total_steps}"

    def log_start(self, metrics: dict[str, float]) -> None:
        """Writes metrics measured before the first step, as step 0."""
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
        """Writes the model as a Hugging Face folder into the run directory. A collective. config: the contents of
        config.json; default: those of --checkpoint_path, with its tokenizer's pad token and all stop tokens filled in.
        json_changes: changes to the other files copied from there, see save_folder."""
        folder, start = self.args.output_dir / subfolder, self.args.checkpoint_path
        size = f"peak memory {peak_memory(self.runtime.device) / 1e9:,.2f} GB"
        drop_what_nobody_reads()
        self.check_weights(model)
        self._check_start(model)
        if model.lora is None and not all_fit(model, self._export_dtype):
            why = f"{self._export_dtype} cannot hold weights of the {what}"
            self.fail_export(f"{folder}: {why}; --resume with --export_dtype float32")
        if model.lora is not None:
            base = model.lora.base_config  # not read again: the adapter is written whatever became of the folder
            merged = config or base
            told = {name: merged.get(name) for name in base | merged if base.get(name) != merged.get(name)}
            if not self.args.merge:
                on_main(lambda: remove_merged(folder))
            write_adapter(folder, adapter_tensors(model), model.lora, told)
            say(f"{folder}: adapter of the {what} written; {size}")
            if not self.args.merge:
                return

        def fail(message: str) -> NoReturn:
            if model.lora is not None:
                on_main(lambda: remove_merged(folder))
            self.fail_export(message)

        try:
            if model.lora is not None:
                on_main(lambda: check_base_is_the_same(model.lora))
            files = on_main(lambda: files_of_export(start, config, json_changes or {}))
        except (ValueError, OSError) as error:
            fail(str(error))
        target, failure = folder if model.lora is None else folder / MERGED, None
        try:
            save_folder(target, full_tensors(model), **files, dtype=self._export_dtype)
        except CannotHold as error:  # on the main rank, like other errors
            failure = str(error)
        except (ValueError, OSError):  # the other ranks still gather tensors, and would not join a collective
            if model.lora is not None:
                remove_merged(folder)
            raise
        if failure := on_main(lambda: failure):
            fail(failure)
        say(f"{target}: {what} written; {size}")
