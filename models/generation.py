"""The batched generation engine: continuous batching over a paged KV cache.

- ragged prompts: every row has its own position, nothing is left-padded; a finished row takes the next prompt at once
- samples of one prompt share one prefill and its pages; a prompt reuses the cached pages of an earlier one that begins
  alike (prefix caching); the vocabulary projection is computed for a prompt's last position only
- prefill takes at most `prefill_tokens` tokens at a time and alternates with decode steps, so a long prompt does not
  block the running samples; when pages run out the youngest sample is preempted and computed again later: the noise is
  stateless (models/sampling.py), so its tokens stay the same
- the device checks stop tokens and lengths, and the host reads the tokens of `look_every` decode steps at once: a look.
  A GPU runs one look ahead: the host launches the next steps before it reads the tokens of the last ones, so scheduling
  and detokenisation overlap with them. Tokens that a row draws after the end of its sample are dropped
- models/scheduler.py assigns rows and pages, models/decode_rows.py is the device's side
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

PREFILL_TOKENS = 2048  # on a GPU about ten decode steps' time with few rows, two with many


@dataclass(frozen=True, kw_only=True)
class PrefillArgs:
    """Prefill of prompts."""

    prefill_tokens: int = flag(
        PREFILL_TOKENS,
        bounds=at_least_one,
        help="most prompt tokens in one prefill, during which running samples do not decode",
        may_change=True,
    )


class Flight(NamedTuple):
    """Work that was launched on the device, and whose results the host has not read yet."""

    samples: list[tuple[Sample, int]]  # each with its index in the numbers
    numbers: Download  # tokens and log-probs, a list for each sample
    num_steps: int  # decode steps; 0 for a prefill
    tokens_read: int  # from the KV cache
    launched: float  # Engine._clock() at launch
    num_prompt_tokens: int = 0  # that a prefill computes
    is_cold: bool = False  # the first of its kind, which counts as compiling


class Engine:
    """Draws samples with the inference copy of a model (models.decode.to_inference).

    num_slots: rows of every decode step. max_seq_len: most tokens of a prompt with its completion. num_pages: of the
    cache, PAGE tokens each; by default as many as all rows can fill. look_every: decode steps per look, by default 1 on
    a CPU, 4 on a GPU. prefill_tokens: most tokens of one prefill. compile: torch.compile, and CUDA graphs on a GPU.
    tokenizer: for texts and stop strings; without it completions hold ids only.
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
        self._is_cold, self._stood_still = {"prefill": compile, "look": compile}, 0.0
        self.reset_stats()

    def reset_stats(self) -> None:
        self.num_prompt_tokens = self.num_decoded = self.num_steps = self.cache_bytes_read = 0
        self.prefill_seconds = self.decode_seconds = self.compile_seconds = 0.0
        self.scheduler.num_preempted = 0

    def refresh(self, source: Transformer) -> None:
        """Copies the weights of a model in training (models.decode.refresh), and drops the now stale cache."""
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
        should_stop is called once per look, in step on all tp ranks; if it returns true, generation ends early.

        A request is taken from the iterable when a row is free for it. Requests with equal prompts share a prefill.
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
        assert not self.scheduler.waiting  # a single sample always fits into the cache
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
        """Prefills at most prefill_tokens tokens of samples that have pages, resumes preempted samples that are in the
        cache again, and draws the first token of samples whose prompt is complete."""
        scheduler, launched = self.scheduler, self._clock()
        begun, scheduler.ready = [(sample, scheduler.newest) for sample in scheduler.ready], []
        batch, numbers = scheduler.next_prefill(), None
        if batch.chunks:
            hidden = self.rows.prefill(batch)
            scheduler.publish(batch)
            begun += self._computed(batch, hidden)
            numbers = Download(hidden[:0, :1], hidden[:0, :1])
        if begun:
            numbers = self._first_tokens(begun)
        if numbers is not None:
            samples = [(sample, i) for i, (sample, _) in enumerate(begun)]
            self._launched("prefill", Flight(samples, numbers, 0, 0, launched, len(batch.ids)))

    def _computed(self, batch: Prefill, hidden: Tensor) -> list[tuple[Sample, Prompt]]:
        """Handles samples whose prefill is complete: gives rows to those that were preempted, and returns those of new
        prompts with their prompts. hidden [N, E]"""
        starts = [self._start(sample) for sample in batch.done if sample.num_drawn]
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
        self.scheduler.remember(prompt)
        return begun

    def _first_tokens(self, begun: list[tuple[Sample, Prompt]]) -> Download:
        """Gives each sample a row and draws its first token. The page in which its prompt ends is copied for it, unless
        that page is full or already the sample's own."""
        copies, starts = [], []
        for sample, prompt in begun:
            full, rest = divmod(len(prompt.ids), PAGE)
            if rest and sample.pages[full] != prompt.pages[full]:
                copies.append((prompt.pages[full], sample.pages[full]))
            sample.num_cached = len(prompt.ids)
            starts.append(self._start(sample))
        return self.rows.start(starts, [prompt.logits for _, prompt in begun], copies)

    def _start(self, sample: Sample) -> Start:
        """Gives a row to a sample whose tokens are in the cache; returns the row's initial state."""
        self.scheduler.place(sample)
        self.rows.remember(sample.slot, sample.ids)
        key = noise_key(self.params.seed, sample.request.idx, sample.request.sample_idx)
        return Start(sample.slot, key, sample.num_cached, sample.num_left, sample.ids[-1])

    # ------------------------------------------------------------------------------------- decode

    def _look(self) -> bool:
        """Launches look_every decode steps of the running samples and returns True; returns False if the steps already
        launched draw all their tokens."""
        scheduler, rows = self.scheduler, self.rows
        if not scheduler.reserve():
            self._land()  # may free pages, and to preempt a sample all its tokens must be known
            scheduler.make_room()
        if all(sample.is_exhausted for sample in scheduler.running):
            return False
        launched, captured = self._clock(), rows.capture_seconds
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
        captured = rows.capture_seconds - captured
        self._launched("look", Flight(samples, numbers, steps, tokens_read, launched), captured)
        return True

    def _launched(self, kind: str, flight: Flight, captured: float = 0.0) -> None:
        """Queues a flight. Capturing counts as compiling, and so does the whole launch of each kind's first flight."""
        is_cold, self._is_cold[kind] = self._is_cold[kind], False
        seconds = self._clock() - flight.launched if is_cold else captured
        self._stood_still += seconds
        self.compile_seconds += seconds
        self.flights.append(flight._replace(is_cold=is_cold))

    def _clock(self) -> float:
        """Seconds on a clock that stands still while the host compiles: flights ahead of a new one end meanwhile."""
        return time.perf_counter() - self._stood_still

    # ----------------------------------------------------------------------------------- results

    def _land(self, keep: int = 0) -> None:
        """Waits for all flights but the last `keep`, and takes their tokens."""
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
            self.num_decoded += 0 if flight.is_cold else total
            for *_, sample in sorted(ended):  # by the step in which they ended
                self.scheduler.release(sample)
                self.finished.append(sample.completion)

    def _count(self, flight: Flight) -> None:
        """Adds a flight to the statistics; the device began it at its launch, or when the flight before it ended."""
        now = self._clock()
        seconds, self.landed_at = now - max(flight.launched, self.landed_at), now
        if flight.is_cold:
            self.compile_seconds += seconds
            return
        if not flight.num_steps:
            self.prefill_seconds += seconds
            self.num_prompt_tokens += flight.num_prompt_tokens
            return
        self.decode_seconds += seconds
        self.num_steps += flight.num_steps
        self.cache_bytes_read += flight.tokens_read * self.rows.cache.bytes_per_token
