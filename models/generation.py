"""The batched generation engine: continuous batching over a paged KV cache.

- ragged prompts: every row has its own position, nothing is left-padded; a finished row takes the next prompt at once
- samples of one prompt share one prefill and its pages; a prompt that begins like an earlier one takes what is still
  there of it; the vocabulary projection is computed for a prompt's last position only
- prefill takes at most `prefill_tokens` tokens at a time and alternates with decode steps, so a long prompt holds up
  nobody for long; when pages run out the youngest sample gives its own back, and is computed again later: the noise is
  stateless (models/sampling.py), so its tokens stay the same
- stopping is decided on the device, and the host looks every `look_every` steps. A GPU is one look ahead: it is given
  the next steps before the host takes the tokens of the last ones, so scheduling and texts cost no time of its own.
  What a row computes after its sample has ended is dropped
- who has rows and pages is in models/scheduler.py, what the device does in models/decode_rows.py
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.common import at_least_one, flag
from models.decode import refresh
from models.decode_rows import DecodeRows, Start
from models.model import Transformer
from models.noise import noise_key
from models.pages import PAGE, PagePool, pages_for
from models.sampling import SamplingParams
from models.scheduler import Prefill, Scheduler
from models.sequences import Completion, OnToken, Prompt, Request, Sample
from models.tokenizer import Tokenizer
from models.transfer import Download, looks_on

PREFILL_TOKENS = 2048  # some ten steps' time of a GPU with few rows, about two with many


@dataclass(frozen=True, kw_only=True)
class PrefillArgs:
    """How prompts are computed."""

    prefill_tokens: int = flag(
        PREFILL_TOKENS,
        bounds=at_least_one,
        help="most tokens of prompts that are computed between two steps of those that are answered",
        may_change=True,
    )


class Flight(NamedTuple):
    """What the device was given and the host has not looked at yet."""

    samples: list[tuple[Sample, int]]  # with their places in the numbers
    numbers: Download  # tokens and log-probs, a list for each sample
    num_steps: int  # decode steps, 0 of a prefill
    tokens_read: int  # of the cache
    launched: float
    compile_seconds: float  # of these; None where all of it was compiling


class Engine:
    """Draws samples with the inference copy of a model (models.decode.to_inference).

    num_slots: rows of every decode step. max_seq_len: most tokens of a prompt with its completion. num_pages: of the
    cache, PAGE tokens each; as many as all rows need at once. look_every: decode steps between two looks of the host, 1
    where looking costs nothing. prefill_tokens: most tokens of one prefill. compile: torch.compile; with CUDA graphs on
    a GPU. tokenizer: for texts and stop strings; without it completions hold ids only.
    """

    def __init__(
        self,
        model: Transformer,
        params: SamplingParams,
        *,
        num_slots: int,
        max_seq_len: int,
        num_pages: int | None = None,
        tokenizer: Tokenizer | None = None,
        compile: bool = False,
        look_every: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ):
        if params.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self.model, self.params, self.tokenizer, self.num_slots = model, params, tokenizer, num_slots
        self.device = model.embed_tokens.weight.device
        usual, self.looks_ahead = looks_on(self.device)
        look_every = look_every or usual
        self.cache_len = -(-max_seq_len // 8) * 8
        num_pages = num_pages or num_slots * pages_for(self.cache_len)
        if num_pages < pages_for(self.cache_len):
            raise ValueError(f"{num_pages} pages of {PAGE} tokens do not hold one sequence of {self.cache_len} tokens")
        self.pool = PagePool(num_pages)
        limits = {"max_seq_len": self.cache_len, "look_every": look_every}
        self.rows = DecodeRows(model, params, num_rows=num_slots, num_pages=num_pages, compile=compile, **limits)
        self.scheduler = Scheduler(self.pool, num_slots=num_slots, prefill_tokens=prefill_tokens, **limits)
        self._is_cold = {"prefill": compile, "look": compile}
        self.reset_stats()

    def reset_stats(self) -> None:
        self.num_prompt_tokens = self.num_decoded = self.num_steps = self.cache_bytes_read = 0
        self.prefill_seconds = self.decode_seconds = self.compile_seconds = 0.0
        self.scheduler.num_preempted = 0

    def refresh(self, source: Transformer) -> None:
        """Takes the weights of a model in training, see models.decode.refresh; what the cache holds is of the old."""
        refresh(self.model, source)
        self.pool.forget()

    @torch.no_grad()
    def generate(
        self,
        requests: Iterable[Request],
        on_token: OnToken | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Completion]:
        """Yields completions in the order of finishing. on_token is called for every sampled token, stop tokens too.
        should_stop is asked at each look of the host, in step on all tp ranks, and ends it before all are finished.

        Requests are taken when there is a row for them. Those with equal prompts share a prefill.
        """
        samples = (self._sample(request) for request in requests)
        self.scheduler.begin()
        self.rows.begin()
        self.on_token, self.landed_at = on_token, 0.0
        self.flights: deque[Flight] = deque()
        self.finished: deque[Completion] = deque()
        while self.scheduler.admit(samples) or self.scheduler.running or self.flights:
            if should_stop is not None and should_stop():
                return
            self._prefill()
            if not self.looks_ahead:
                self._land()
                yield from self._take_finished()
            goes_on = self._look() or self.scheduler.filling
            self._land(self.looks_ahead if goes_on else 0)
            yield from self._take_finished()
        assert not self.scheduler.waiting  # one alone always has room
        self.scheduler.remember(None)

    def _sample(self, request: Request) -> Sample:
        if not request.prompt_ids or request.max_new_tokens < 1:
            raise ValueError(f"{request}: needs at least one prompt token and one token to generate")
        if len(request.prompt_ids) + request.max_new_tokens > self.cache_len:
            raise ValueError(f"{request}: prompt and completion exceed max_seq_len")
        return Sample(request, self.params, self.tokenizer)

    def _take_finished(self) -> Iterator[Completion]:
        while self.finished:
            yield self.finished.popleft()

    # ------------------------------------------------------------------------------------ prefill

    def _prefill(self) -> None:
        """Computes at most prefill_tokens tokens of those that have pages, puts back into rows those that had given
        them up, and draws the first tokens of those whose prompts are there."""
        scheduler, launched = self.scheduler, time.perf_counter()
        begun, scheduler.ready = [(sample, scheduler.newest) for sample in scheduler.ready], []
        batch, numbers = scheduler.next_prefill(), None
        if batch.chunks:
            self.num_prompt_tokens += len(batch.ids)
            hidden = self.rows.prefill(batch)
            scheduler.publish(batch)
            begun += self._computed(batch, hidden)
            numbers = Download(hidden[:0, :1], hidden[:0, :1])
        if begun:
            numbers = self._first_tokens(begun)
        if numbers is not None:
            samples = [(sample, i) for i, (sample, _) in enumerate(begun)]
            self._launched("prefill", Flight(samples, numbers, 0, 0, launched, 0.0))

    def _computed(self, batch: Prefill, hidden: Tensor) -> list[tuple[Sample, Prompt]]:
        """What becomes of samples that are in the cache: those that go on take rows; those of new prompts are returned
        with them. hidden [N, E]"""
        scheduler, starts = self.scheduler, []
        for sample in batch.done:
            if sample.num_drawn:
                scheduler.place(sample)
                self.rows.remember(sample.slot, sample.ids)
                key, left = self._key(sample), sample.num_left
                starts.append(Start(sample.slot, key, sample.num_cached, left, sample.ids[-1]))
        if starts:
            self.rows.resume(starts)
        leaders = [(sample, place) for sample, place in zip(batch.done, batch.last) if not sample.num_drawn]
        if not leaders:
            return []
        begun = []
        for (leader, _), row in zip(leaders, self.rows.logits(hidden, [place for _, place in leaders])):
            prompt = Prompt(leader.request.prompt_ids, leader.pages[: pages_for(leader.num_cached)], row)
            begun += [(sample, prompt) for sample in (leader, *leader.followers)]
            leader.followers = []
        scheduler.remember(prompt)
        return begun

    def _first_tokens(self, begun: list[tuple[Sample, Prompt]]) -> Download:
        """The first token of each sample, in a row; it gets a copy of the page that its prompt ends in, unless that is
        full, or its own."""
        copies, starts = [], []
        for sample, prompt in begun:
            full, rest = divmod(len(prompt.ids), PAGE)
            if rest and sample.pages[full] != prompt.pages[full]:
                copies.append((prompt.pages[full], sample.pages[full]))
            sample.num_cached = len(prompt.ids)
            self.scheduler.place(sample)
            self.rows.remember(sample.slot, sample.ids)
            starts.append(Start(sample.slot, self._key(sample), len(prompt.ids), sample.request.max_new_tokens))
        return self.rows.start(starts, [prompt.logits for _, prompt in begun], copies)

    def _key(self, sample: Sample) -> int:
        return noise_key(self.params.seed, sample.request.idx, sample.request.sample_idx)

    # ------------------------------------------------------------------------------------- decode

    def _look(self) -> bool:
        """Gives the device look_every decode steps of all that run, unless they will all have ended by then; whether it
        did."""
        scheduler, rows = self.scheduler, self.rows
        if not scheduler.reserve():
            self._land()  # may make room, and who gives way must be known to its last token
            scheduler.make_room()
        if all(sample.is_exhausted for sample in scheduler.running):
            return False
        launched, captured = time.perf_counter(), 0.0 if rows.runner is None else rows.runner.seconds
        size = rows.size_for(len(scheduler.running))
        sources, targets = scheduler.compact(size)
        if sources:
            rows.move(sources, targets)
        if scheduler.stale_slots:
            rows.clear(sorted(scheduler.stale_slots))
            scheduler.stale_slots.clear()
        samples, steps = [(sample, sample.slot) for sample in scheduler.running], rows.look_every
        lengths = [sample.num_launched for sample in scheduler.running]
        for sample in scheduler.running:
            sample.num_launched += steps
        most_pages = pages_for(min(max(lengths) + steps, self.cache_len))
        numbers = rows.look(size, torch.from_numpy(scheduler.table[:size, :most_pages].copy()))
        tokens_read = steps * sum(lengths) + len(samples) * steps * (steps + 1) // 2
        seconds = 0.0 if rows.runner is None else rows.runner.seconds - captured
        self._launched("look", Flight(samples, numbers, steps, tokens_read, launched, seconds))
        return True

    def _launched(self, kind: str, flight: Flight) -> None:
        """The first of each kind is mostly the compiler's time."""
        self.flights.append(flight._replace(compile_seconds=None) if self._is_cold[kind] else flight)
        self._is_cold[kind] = False

    # ------------------------------------------------------------------------------ what has run

    def _land(self, keep: int = 0) -> None:
        """Takes the tokens of all that the device was given but for the last `keep`."""
        while len(self.flights) > keep:
            flight = self.flights.popleft()
            tokens, logprobs = flight.numbers.wait()
            self._count(flight)
            is_finite = math.isfinite(sum(map(sum, logprobs)))
            ended, total, on_token = [], 0, self.on_token
            for order, (sample, place) in enumerate(flight.samples):
                if sample.has_ended:
                    continue
                if not is_finite:
                    sample.check(logprobs[place])
                count = sample.take(tokens[place], logprobs[place], on_token)
                if flight.num_steps:
                    sample.num_cached += count
                    total += count
                if sample.has_ended:
                    ended.append((count, order, sample))
            self.num_decoded += total if flight.compile_seconds is not None else 0
            for *_, sample in sorted(ended):  # by the step that ended them
                self.scheduler.release(sample)
                self.finished.append(sample.completion)

    def _count(self, flight: Flight) -> None:
        """The device began it when it was given it, or was done with what came before."""
        now = time.perf_counter()
        seconds, self.landed_at = now - max(flight.launched, self.landed_at), now
        if flight.compile_seconds is None:
            self.compile_seconds += seconds
            return
        self.compile_seconds += flight.compile_seconds
        seconds = max(0.0, seconds - flight.compile_seconds)
        if not flight.num_steps:
            self.prefill_seconds += seconds
            return
        self.decode_seconds += seconds
        self.num_steps += flight.num_steps
        self.cache_bytes_read += flight.tokens_read * self.rows.cache.bytes_per_token
