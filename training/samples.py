"""What the model in training says at an evaluation: a few answers, printed and kept in samples.jsonl.

- the prompts are the first of the evaluation's, the same each time, so that a person sees the answers change
- they go through the generation engine and an inference copy that is refreshed in place (models/decode.py): built once,
  compiled once, and never generating through FSDP
- training does not notice: no weight moves, and the engine's noise takes nothing from a random state
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from models.decode import can_pack, copy_for_inference, refresh
from models.generation import Completion, Engine, Request, SamplingParams
from models.model import Transformer
from models.tokenizer import Tokenizer
from models.tp import is_main_rank
from training.common import ArgumentParser, Runtime, non_negative_float, non_negative_int, positive_int
from training.data import IGNORE_INDEX, Example
from training.run_dir import open_log

MAX_SLOTS = 8  # answers drawn together; the cache of more would be missing in training


def add_sample_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--num_eval_samples", type=non_negative_int, default=2, help="answers to --eval_file shown at each evaluation")
    add("--eval_max_new_tokens", type=positive_int, default=128, help="most tokens of such an answer")
    add("--eval_temperature", type=non_negative_float, default=0.0, help="temperature of such answers; 0 is greedy")


class EvalPrompt(NamedTuple):
    ids: list[int]
    reference: list[int]  # what the record says next


def prompts_of(examples: list[Example], count: int) -> list[EvalPrompt]:
    """The prompts of the first `count` rows with something to learn. A row's last learnt stretch (the completion, or
    the last turn of the assistant) is its reference, and the tokens before it are its prompt; a row that is learnt from
    its beginning is cut in the middle."""
    prompts = []
    for example in examples:
        if len(prompts) == count:
            break
        if example.num_targets:
            learnt = [label != IGNORE_INDEX for label in example.labels]
            end = max(i for i, is_learnt in enumerate(learnt) if is_learnt) + 1
            start = max((i for i in range(end) if not learnt[i]), default=-1) + 1
            start = start or max(1, end // 2)
            prompts.append(EvalPrompt(example.input_ids[:start], example.input_ids[start:end]))
    return prompts


class EvalSamples:
    """Draws answers to the same prompts at each evaluation. A collective: every rank calls it at the same steps, and
    all data-parallel ranks draw the same answers, in the time that one of them would take.

    Memory is taken when it is built, so that what does not fit shows before the first step and not after the last.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        prompts: list[EvalPrompt],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        runtime: Runtime,
        output_dir: Path,
        after_step: int,
    ):
        """after_step: when resuming, the step of the checkpoint; later lines of samples.jsonl are dropped."""
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        context = model.config.max_position_embeddings
        self.requests = [
            Request(idx, 0, prompt.ids, min(max_new_tokens, context - len(prompt.ids)))
            for idx, prompt in enumerate(prompts)
        ]
        pack = not runtime.compile and can_pack(runtime.device, runtime.dtype)
        self.copy = copy_for_inference(model, pack=pack)
        self.engine = Engine(
            self.copy,
            params,
            num_slots=min(MAX_SLOTS, len(prompts)),
            max_seq_len=max(len(request.prompt_ids) + request.max_new_tokens for request in self.requests),
            tokenizer=tokenizer,
            compile=runtime.compile,
        )
        self.log = open_log(output_dir / "samples.jsonl", after_step) if is_main_rank() else None

    def show(self, step: int, write: Callable[[str], None]) -> None:
        """Draws the answers of the current weights; the main rank hands a block of text to `write` and appends a line
        for each to samples.jsonl."""
        refresh(self.copy, self.model)
        answers: list[Completion] = sorted(self.engine.generate(self.requests), key=lambda answer: answer.request.idx)
        if self.log is None:
            return
        blocks = []
        for prompt, answer in zip(self.prompts, answers):
            line = {
                "step": step,
                "prompt": self._text(prompt.ids),
                "output": answer.text,
                "reference": self.tokenizer.decode_continuation(prompt.ids, prompt.reference),
                "finish_reason": answer.finish_reason,
            }
            self.log.write(json.dumps(line, ensure_ascii=False) + "\n")
            blocks.append(block(line))
        self.log.flush()
        write("\n".join(blocks))

    def _text(self, prompt_ids: list[int]) -> str:
        """A prompt for people: its special tokens tell whose turn a chat is at, but the BOS tells nothing."""
        begins_with_bos = prompt_ids[0] == self.tokenizer.bos_token_id
        return self.tokenizer.decode(prompt_ids[begins_with_bos:], skip_special_tokens=False)


def block(line: dict) -> str:
    """A sample in three short lines for a terminal: the end of the prompt, and the beginning of both answers."""
    prompt, answer, wanted = (visible(line[name]) for name in ("prompt", "output", "reference"))
    unfinished = " (not finished)" if line["finish_reason"] == "length" else ""
    prompt = prompt if len(prompt) <= 100 else f"... {prompt[-100:]}"
    answer, wanted = (text if len(text) <= 300 else f"{text[:300]} ..." for text in (answer, wanted))
    return f"  prompt  {prompt}\n  answer  {answer}{unfinished}\n  wanted  {wanted}\n"


def visible(text: str) -> str:
    """One line that any terminal takes: line breaks and control characters as escapes, and what standard output cannot
    encode too, since a run must not end by what its model says."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
