"""What the model in training says: answers that all ranks draw together, and those of an evaluation in samples.jsonl.

- SFT and DPO (EvalSamples) answer a few prompts, the first of the evaluation's, the same each time, so that a person
  sees the answers change. They go through the generation engine and an inference copy that is refreshed in place
  (models/decode.py): built once, not compiled, which would take longer than a few answers do, and never through FSDP
- PPO and GRPO (SampleLog) answer all held-out prompts with the engine that they have
- training does not notice: no weight moves, and the engine's noise takes nothing from a random state
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.chats import Chat, content_of
from models.checkpoint import Folder
from models.common import Runtime, at_least_one, flag, is_main_rank, non_negative
from models.decode import can_pack, copy_for_inference
from models.generation import Completion, Engine, Request
from models.model import Transformer
from models.records import IGNORE_INDEX, Example
from models.sampling import SamplingParams
from models.sharing import gather_parts, shared_work
from models.tokenizer import Tokenizer
from training.metrics import Log
from training.prompts import Prompt, RolloutArgs
from training.run_dir import Run
from training.stop import Stop

T = TypeVar("T")
MAX_SLOTS = 8  # answers drawn together; the cache of more would be missing in training


@dataclass(frozen=True, kw_only=True)
class SampleArgs:
    """What the model says at an evaluation."""

    num_eval_samples: int = flag(
        2, bounds=non_negative, help="answers to --eval_file shown at each evaluation", may_change=True
    )
    eval_max_new_tokens: int = flag(128, bounds=at_least_one, help="most tokens of such an answer", may_change=True)
    eval_temperature: float = flag(
        0.0, bounds=non_negative, help="temperature of such answers; 0 is greedy", may_change=True
    )


def draw_together(
    engine: Engine, requests: list[Request], dp: DeviceMesh, stop: Stop, result_of: Callable[[Completion], T]
) -> dict[int, T]:
    """{idx of a request: result_of(what was drawn), on the rank that drew it}, the same on all ranks, whose replicas
    draw what they have room for; answers to one prompt, next to each other, share its prefill. A collective. Leaves the
    run when it is asked to end; a rank without a signal draws what it has begun first. So does one without an error,
    where a replica's model gives NaN: then all end alike."""
    sizes = [len(list(same)) for _, same in groupby(requests, key=lambda request: id(request.prompt_ids))]
    work, own, failed, tp = shared_work("answers", sizes, dp), {}, {}, engine.model.parallel.tp

    def should_stop() -> bool:
        asked = stop.asked(tp)
        if asked:
            work.end()
        return asked

    try:
        for done in engine.generate((requests[i] for taken in work for i in taken), should_stop=should_stop):
            own[done.request.idx] = result_of(done)
    except ValueError as error:
        failed[dp.get_local_rank()] = str(error)
        work.end()
    work.close()
    stop.check()
    for _, why in sorted(gather_parts(failed, dp).items()):
        stop.fail(why)
    return gather_parts(own, dp)


# ------------------------------------------------------------------- of supervised fine-tuning and DPO


class EvalPrompt(NamedTuple):
    ids: list[int]
    reference: list[int]  # what the record says next


def prompts_of(examples: Iterable[Example], count: int) -> list[EvalPrompt]:
    """The prompts of the first `count` rows with something to learn. A row's last learnt stretch (the completion, or
    the last turn of the assistant) is its reference, and the tokens before it are its prompt; a row that is learnt from
    its beginning is cut in the middle."""
    prompts = []
    for example in islice((example for example in examples if example.num_targets), count):
        learnt, ids = [label != IGNORE_INDEX for label in example.labels], list(map(int, example.input_ids))
        end = max(i for i, is_learnt in enumerate(learnt) if is_learnt) + 1
        start = max((i + 1 for i in range(end) if not learnt[i]), default=0) or max(1, end // 2)
        prompts.append(EvalPrompt(ids[:start], ids[start:end]))
    return prompts


def lesson(rows: Iterable[Example], tokenizer: Tokenizer) -> str:
    """The last stretch of the first row that is learnt, with the token that ends it, for people."""
    for prompt in prompts_of(rows, 1):
        text = visible(tokenizer.decode_continuation(prompt.ids, prompt.reference, skip_special_tokens=False))
        return text if len(text) <= 80 else f"{text[:20]} ... {text[-50:]}"
    return "nothing"


class EvalSamples:
    """Draws answers to the same prompts at each evaluation, which the data-parallel replicas share. A collective: every
    rank calls it at the same steps.

    Memory is taken when it is built, so that what does not fit shows before the first step and not after the last.
    Without rows of an evaluation, or where none is to be shown, nothing is built.
    """

    def __init__(
        self,
        model: Transformer,
        folder: Folder,
        rows: Iterable[Example],
        args: SampleArgs,
        runtime: Runtime,
        run: Run,
        dp: DeviceMesh,
    ):
        self.run, self.dp = run, dp
        self.model, self.tokenizer, self.prompts = model, folder.tokenizer, prompts_of(rows, args.num_eval_samples)
        if not self.prompts:
            return
        context = folder.config.max_position_embeddings
        self.requests = [
            Request(idx, 0, prompt.ids, min(args.eval_max_new_tokens, context - len(prompt.ids)))
            for idx, prompt in enumerate(self.prompts)
        ]
        try:
            copy = copy_for_inference(model, pack=can_pack(runtime))
        except torch.OutOfMemoryError as error:
            what = (
                "for samples at evaluations each rank has a copy of the model, or of its part of --tensor_parallel_size"
            )
            raise torch.OutOfMemoryError(f"{what}; --num_eval_samples 0 goes without; {error}") from None
        self.engine = Engine(
            copy,
            SamplingParams(args.eval_temperature, seed=run.args.seed, stop_token_ids=folder.eos_token_ids),
            num_slots=min(MAX_SLOTS, -(-len(self.prompts) // dp.size())),
            max_seq_len=max(len(request.prompt_ids) + request.max_new_tokens for request in self.requests),
            tokenizer=folder.tokenizer,
        )
        self.log = Log(run.args.output_dir / "samples.jsonl", run.last_line)

    def show(self) -> None:
        """Draws answers of the current weights; the main rank prints them and appends them to samples.jsonl."""
        if not self.prompts:
            return
        self.engine.refresh(self.model)
        answers = draw_together(self.engine, self.requests, self.dp, self.run.stop, lambda done: done)
        if not is_main_rank():
            return
        lines = [
            {
                "step": self.run.step,
                "prompt": self.tokenizer.decode(prompt.ids, skip_special_tokens=False),
                "output": answers[idx].text,
                "reference": self.tokenizer.decode_continuation(prompt.ids, prompt.reference),
                "finish_reason": answers[idx].finish_reason,
            }
            for idx, prompt in enumerate(self.prompts)
        ]
        self.log.write(*lines)
        self.run.show("\n".join(map(block, lines)))


def visible(text: str) -> str:
    """One line that any terminal takes: line breaks and control characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def end_of(text: str, length: int) -> str:
    """The end of a text, and a mark if that is not all."""
    return text if len(text) <= length else f"... {text[-length:]}"


def start_of(text: str, length: int) -> str:
    """As end_of, the start."""
    return text if len(text) <= length else f"{text[:length]} ..."


def question(asked: str | Chat, text: str) -> str:
    """What a prompt asks, in short: how a chat's last message begins, whose end is the instruction and the header; how
    text ends, since examples may come before. text: the prompt, rendered."""
    if isinstance(asked, str):
        return end_of(visible(text), 60)
    return start_of(visible(content_of(asked.messages[-1])), 100)


def block(line: dict) -> str:
    """A sample in three short lines for a terminal: the end of the prompt, and the beginning of both answers."""
    prompt, answer, wanted = (visible(line[name]) for name in ("prompt", "output", "reference"))
    unfinished = " (not finished)" if line["finish_reason"] == "length" else ""
    prompt, answer, wanted = end_of(prompt, 100), start_of(answer, 300), start_of(wanted, 300)
    return f"  prompt  {prompt}\n  answer  {answer}{unfinished}\n  wanted  {wanted}\n"


# ----------------------------------------------------------------------------- of PPO and GRPO


class SampleLog:
    """All held-out answers of each evaluation go to samples.jsonl, and a few to people."""

    def __init__(self, args: RolloutArgs, run: Run, tokenizer: Tokenizer):
        self.run, self.tokenizer, self.count = run, tokenizer, args.num_eval_samples
        if args.eval_prompt_file:
            self.log = Log(run.args.output_dir / "samples.jsonl", run.last_line)

    def show(self, prompts: list[Prompt], texts: list[str], finished: list[bool], **columns: Tensor) -> None:
        """columns: one value for each answer, fp32 [A], NaN where it has none; the first stands before it."""
        if not is_main_rank():
            return
        means = ", ".join(f"{name} {values.nanmean():.4f}" for name, values in columns.items())
        columns = {name: values.tolist() for name, values in columns.items()}
        lines, shown = [], [f"step {self.run.step}: held-out {means}"]
        for i, prompt in enumerate(prompts):
            asked = self.tokenizer.decode(prompt.ids, skip_special_tokens=False)
            values = {name: None if math.isnan(column[i]) else column[i] for name, column in columns.items()}
            line = {"step": self.run.step, "prompt": asked, "output": texts[i], **values, "finished": finished[i]}
            lines.append(line)
            is_first = i == 0 or prompt is not prompts[i - 1]  # of several answers to a prompt
            if is_first and len(shown) <= self.count:
                end = "" if finished[i] else " (not finished)"
                value = next(iter(columns.values()))[i]
                shown.append(f"  {value:8.3f}  {question(prompt.asked, asked)} -> {visible(texts[i])[:160]}{end}")
        self.log.write(*lines)
        self.run.show("\n".join(shown))
