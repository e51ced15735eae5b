"""The batched generation engine: continuous batching over a paged KV cache.

- ragged prompts: every row has its own position, nothing is left-padded; a finished row takes the next prompt at once
- samples of one prompt share one prefill and its pages; a prompt that begins like an earlier one takes what is still
  there of it; the vocabulary projection is computed for a prompt's last position only
- prefill takes at most `prefill_tokens` tokens at a time and alternates with decode steps, so a long prompt holds up
  nobody for long; when pages run out the youngest sample gives its own back, and is computed again later: the noise is
  stateless (models/sampling.py), so its tokens stay the same
- one decode step returns a token and its log-prob, [B] each; stopping is decided on the device, and the host looks
  every `look_every` steps; the step has one shape, so it is compiled (captured as a CUDA graph) once

Dimensions: B slots, the rows of a decode step, V vocabulary.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.decode import refresh
from models.decode_cpu import CPUCache, DecodeLayers
from models.model import Transformer
from models.noise import column_hashes, noise_key
from models.paged_cache import Chunk, PagedCache
from models.pages import PAGE, PagePool, pages_for
from models.repetition import SeenTokens
from models.sampling import SamplingParams, sample
from models.streaming import StreamDecoder
from models.tokenizer import Tokenizer

PREFILL_TOKENS = 8192  # most tokens of one prefill


@dataclass(frozen=True)
class Request:
    """One sample to draw. idx and sample_idx number the prompt and the sample, and with the seed they fix its noise.
    where: file and line of the record, for messages."""

    idx: int
    sample_idx: int
    prompt_ids: list[int]
    max_new_tokens: int
    where: str = ""

    def __str__(self) -> str:
        return self.where or f"prompt {self.idx}"


@dataclass
class Completion:
    """token_ids: without the EOS or the stop string that ended it. text: "" without a tokenizer. logprobs: one for
    each sampled token, EOS and stop included, under the full softmax at the sampling temperature (greedy: 1), before
    filters and penalty. stop_ids: the tokens that ended it, so token_ids + stop_ids are all that were sampled."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    stop_ids: list[int] = field(default_factory=list)


class _Prompt(NamedTuple):
    """A prompt that has been computed, which its samples go on from."""

    ids: list[int]
    pages: list[int]
    logits: Tensor  # this rank's part of what follows it, [V']


class _Sequence:
    """A sample under way on the host's side: collects tokens, decides when it has ended, and has pages."""

    def __init__(self, request: Request, params: SamplingParams, tokenizer: Tokenizer | None):
        self.request, self.completion = request, Completion(request)
        self.params, self.tokenizer = params, tokenizer
        self.decoder = StreamDecoder(tokenizer, request.prompt_ids) if params.stop else None
        self.streamed = ""
        self.ids = list(request.prompt_ids)  # and what was drawn, what ended it included
        self.slot, self.pages, self.num_cached = -1, [], 0  # its row; where its first num_cached tokens are
        self.followers: list[_Sequence] = []  # samples of the same prompt that wait for its prefill

    @property
    def num_to_cache(self) -> int:
        """Tokens that are in the cache before it can decode: the last that was drawn is what the next step reads."""
        return max(len(self.request.prompt_ids), len(self.ids) - 1)

    @property
    def num_drawn(self) -> int:
        return len(self.ids) - len(self.request.prompt_ids)

    def push(self, token: int, logprob: float) -> bool:
        """Takes a sampled token; True if it was the last."""
        done = self.completion
        if not math.isfinite(logprob):
            broken = "the weights are broken, or overflow in this dtype"
            raise ValueError(f"{done.request}: the log-probability of a token is {logprob}; {broken}")
        self.ids.append(token)
        done.logprobs.append(logprob)
        if token in self.params.stop_token_ids:
            done.finish_reason, done.stop_ids = "stop", [token]
        else:
            done.token_ids.append(token)
            last = len(done.token_ids) == done.request.max_new_tokens
            if self.decoder is not None and self._stop_string(token, last):
                return True
            done.finish_reason = "length" if last else ""
        if done.finish_reason and self.tokenizer is not None:
            done.text = self.tokenizer.decode_continuation(done.request.prompt_ids, done.token_ids)
        return bool(done.finish_reason)

    def _stop_string(self, token: int, last: bool) -> bool:
        old = len(self.streamed)
        self.streamed += self.decoder.push(token) + (self.decoder.flush() if last else "")
        longest = max(map(len, self.params.stop))
        places = [self.streamed.find(stop, max(0, old - longest + 1)) for stop in self.params.stop]
        places = [place for place in places if place >= 0]
        if not places:
            return False
        done, text = self.completion, self.streamed[: min(places)]
        # the tokens of the text: drop those at the end that lie wholly in the stop string
        ids, prompt_ids = done.token_ids, done.request.prompt_ids
        while ids and self.tokenizer.decode_continuation(prompt_ids, ids[:-1]).startswith(text):
            done.stop_ids.insert(0, ids.pop())
        done.text, done.finish_reason = text, "stop"
        return True


class Engine(nn.Module):
    """Draws samples with the inference copy of a model (models.decode.to_inference).

    num_slots: rows of every decode step. max_seq_len: most tokens of a prompt with its completion. num_pages: of the
    cache, PAGE tokens each; as many as all rows need at once. look_every: decode steps between two looks of the host, 1
    where looking costs nothing. prefill_tokens: most tokens of one prefill. compile: torch.compile the decode step;
    with CUDA graphs on a GPU. tokenizer: for texts and stop strings; without it completions hold ids only.
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
        super().__init__()
        if params.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self.model, self.params, self.tokenizer, self.num_slots = model, params, tokenizer, num_slots
        device, config = model.embed_tokens.weight.device, model.config
        self.device, self.compiled, self.prefill_tokens = device, compile, prefill_tokens
        self.look_every = look_every or (1 if device.type == "cpu" else 8)
        self.cache_len = -(-max_seq_len // 8) * 8
        num_pages = num_pages or num_slots * pages_for(self.cache_len)
        if num_pages < pages_for(self.cache_len):
            raise ValueError(f"{num_pages} pages of {PAGE} tokens do not hold one sequence of {self.cache_len} tokens")
        self.pool = PagePool(num_pages)
        shape = {"num_rows": num_slots, "num_pages": num_pages, "max_seq_len": self.cache_len}
        options = {"dtype": model.compute_dtype or model.embed_tokens.weight.dtype, "tp": model.parallel.tp}
        self.layers = None
        if device.type == "cpu" and not compile:
            self.cache = CPUCache(config, **shape, **options)
            self.layers = DecodeLayers(model, num_slots, self.cache_len)
        else:
            self.cache = PagedCache(config, device=device, **shape, **options)
        # the state of the rows lives on the device, at fixed addresses
        for name in ("tokens", "positions", "keys", "remaining"):
            self.register_buffer(name, torch.zeros(num_slots, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("active", torch.zeros(num_slots, dtype=torch.bool, device=device), persistent=False)
        self.register_buffer("hashes", column_hashes(config.vocab_size, device), persistent=False)
        stop_ids = torch.tensor(params.stop_token_ids or (-1,), dtype=torch.int64, device=device)
        self.register_buffer("stop_ids", stop_ids, persistent=False)
        penalty, tp = params.repetition_penalty, model.parallel.tp
        self.seen = None if penalty == 1 else SeenTokens(num_slots, config.vocab_size, device, tp)
        self._step, self._is_warm = self._decode_step, not compile
        if compile:
            options = {"mode": "reduce-overhead"} if device.type != "cpu" else {}
            self._step = torch.compile(self._decode_step, fullgraph=True, dynamic=False, **options)
        self.reset_stats()

    def reset_stats(self) -> None:
        self.num_prompt_tokens = self.num_decoded = self.num_steps = self.cache_bytes_read = self.num_preempted = 0
        self.prefill_seconds = self.decode_seconds = self.compile_seconds = 0.0

    def refresh(self, source: Transformer) -> None:
        """Takes the weights of a model in training, see models.decode.refresh; what the cache holds is of the old."""
        refresh(self.model, source)
        self.pool.forget()

    @torch.no_grad()
    def generate(
        self,
        requests: Iterable[Request],
        on_token: Callable[[Request, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Completion]:
        """Yields completions in the order of finishing. on_token is called for every sampled token, stop tokens too.
        should_stop is asked at each look of the host, in step on all tp ranks, and ends it before all are finished.

        Requests are taken when there is a row for them. Those with equal prompts share a prefill.
        """
        if self.layers is not None:
            self.layers.take_weights()
        sequences = (self._sequence(request) for request in requests)
        self.waiting, self.filling, self.ready, self.running = deque(), deque(), [], {}
        self.pool.release_all()  # what a call that was broken off has left
        self.newest: _Prompt | None = None
        self.active.zero_()
        while self._admit(sequences) or self.running:
            if should_stop is not None and should_stop():
                return
            drawn = self._timed("prefill_seconds", self._prefill)
            yield from self._take(drawn, on_token)
            self._place([sequence for sequence, *_ in drawn])
            if self.running:
                for drawn in self._look():
                    yield from self._take(drawn, on_token)
        assert not self.waiting  # one alone always has room
        self._remember(None)

    def _sequence(self, request: Request) -> _Sequence:
        if not request.prompt_ids or request.max_new_tokens < 1:
            raise ValueError(f"{request}: needs at least one prompt token and one token to generate")
        if len(request.prompt_ids) + request.max_new_tokens > self.cache_len:
            raise ValueError(f"{request}: prompt and completion exceed max_seq_len")
        return _Sequence(request, self.params, self.tokenizer)

    def _take(
        self, drawn: list[tuple[_Sequence, int, float]], on_token: Callable[[Request, int], None] | None
    ) -> Iterator[Completion]:
        """Gives each sequence the token that was drawn for it, unless it has ended meanwhile."""
        for sequence, token, logprob in drawn:
            if sequence.completion.finish_reason:
                continue
            if on_token is not None:
                on_token(sequence.request, token)
            if sequence.push(token, logprob):
                self._release(sequence)
                yield sequence.completion

    def _timed(self, counter: str, function: Callable, *args):
        start = time.perf_counter()
        result = function(*args)
        setattr(self, counter, getattr(self, counter) + time.perf_counter() - start)
        return result

    # ------------------------------------------------------------------------------ rows and pages

    def _admit(self, sequences: Iterator[_Sequence]) -> bool:
        """Gives free rows and pages to those that wait, in their order; whether somebody is to be prefilled."""
        begun = [each for leader in (*self.filling, *self.ready) for each in (leader, *leader.followers)]
        taken = {*self.running, *(sequence.slot for sequence in begun)}
        leaders = {tuple(s.request.prompt_ids): s for s in self.filling if not s.num_drawn}
        for slot in (slot for slot in range(self.num_slots) if slot not in taken):
            sequence = self.waiting.popleft() if self.waiting else next(sequences, None)
            if sequence is None:
                break
            prompt_ids = sequence.request.prompt_ids
            leader = None if sequence.num_drawn else leaders.get(tuple(prompt_ids))
            is_newest = not sequence.num_drawn and self.newest is not None and self.newest.ids == prompt_ids
            is_placed = self._find_pages(sequence, self.newest if is_newest else leader)
            if is_newest and not is_placed and not self.ready:  # the newest prompt holds what it needs
                self._remember(None)
                is_newest, is_placed = False, self._find_pages(sequence, None)
            if not is_placed:
                self.waiting.appendleft(sequence)
                break
            sequence.slot = slot
            if is_newest:
                self.ready.append(sequence)
            elif leader is not None:
                leader.followers.append(sequence)
            else:
                self.filling.append(sequence)
                if not sequence.num_drawn:  # one that goes on draws no first token, so nobody begins with it
                    leaders.setdefault(tuple(prompt_ids), sequence)
        return bool(self.filling or self.ready)

    def _find_pages(self, sequence: _Sequence, other: "_Sequence | _Prompt | None") -> bool:
        """Pages for what it has and the next look: the full ones of another with the same prompt, or some that hold its
        beginning, and new ones. Some are left for those that are running, so that nobody is turned out at once."""
        ids = sequence.ids[: sequence.num_to_cache]
        if other is not None:
            found = other.pages[: len(ids) // PAGE]
            self.pool.share(found)
        else:
            found = self.pool.find(ids)
        count = pages_for(self._most(sequence)) - len(found)
        if not self._has_room(count + len(self.running), may_forget=other is None or other is not self.newest):
            self.pool.release(found)
            return False
        sequence.pages, sequence.num_cached = found + self.pool.take(count), len(found) * PAGE
        return True

    def _has_room(self, count: int, *, may_forget: bool = True) -> bool:
        """Whether there are so many pages; the newest prompt's are given up for that, if nobody begins from it."""
        if may_forget and count > self.pool.num_free and not self.ready:
            self._remember(None)
        return count <= self.pool.num_free

    def _remember(self, prompt: _Prompt | None) -> None:
        """Keeps the pages of a prompt for samples of it that come later, instead of another's."""
        if prompt is not None:
            self.pool.share(prompt.pages)
        if self.newest is not None:
            self.pool.release(self.newest.pages)
        self.newest = prompt

    def _most(self, sequence: _Sequence) -> int:
        """Tokens that it may have in the cache after the next look."""
        request = sequence.request
        return min(sequence.num_to_cache + self.look_every, len(request.prompt_ids) + request.max_new_tokens)

    def _release(self, sequence: _Sequence) -> None:
        """Its row and its pages are free, and what is in them can be found."""
        self.pool.publish(sequence.ids[: sequence.num_cached], sequence.pages)
        for each in (sequence, *sequence.followers):
            self.pool.release(each.pages)
            each.pages, each.num_cached = [], 0
        if self.running.get(sequence.slot) is sequence:
            del self.running[sequence.slot]

    def _make_room(self) -> None:
        """Pages for the next look of all that run; where there are not enough, the youngest gives up its own."""
        for sequence in list(self.running.values()):  # from the oldest to the youngest
            count = pages_for(self._most(sequence)) - len(sequence.pages)
            while self.running.get(sequence.slot) is sequence and not self._has_room(count):
                youngest = self.filling.pop() if self.filling else next(reversed(self.running.values()))
                self._release(youngest)
                self.waiting.extendleft(reversed((youngest, *youngest.followers)))
                youngest.followers = []
                self.num_preempted += 1
            if self.running.get(sequence.slot) is sequence and count > 0:
                sequence.pages += self.pool.take(count)

    def _place(self, sequences: list[_Sequence]) -> None:
        """The rows of sequences that are ready to decode, on the device."""
        sequences = [sequence for sequence in sequences if not sequence.completion.finish_reason]
        if not sequences:
            return
        self.running |= {sequence.slot: sequence for sequence in sequences}
        values = []
        for s in sequences:
            key = noise_key(self.params.seed, s.request.idx, s.request.sample_idx)
            values.append((s.slot, s.ids[-1], s.num_cached, key, s.request.max_new_tokens - s.num_drawn))
        slots, *columns = torch.tensor(values, device=self.device).unbind(1)
        for buffer, column in zip((self.tokens, self.positions, self.keys, self.remaining), columns):
            buffer[slots] = column
        self.active[slots] = True

    # ------------------------------------------------------------------------------------ prefill

    def _prefill(self) -> list[tuple[_Sequence, int, float]]:
        """Computes at most prefill_tokens tokens of those that have rows, and puts back into their rows those that had
        given them up. (sequence, token, logprob) of the first tokens of those whose prompts are there."""
        begun, self.ready = [(sequence, self.newest) for sequence in self.ready], []
        chunks, ids, positions, done, last = [], [], [], [], []
        while self.filling and len(ids) < self.prefill_tokens:
            sequence = self.filling[0]
            start = sequence.num_cached
            end = min(sequence.num_to_cache, start + self.prefill_tokens - len(ids))
            ids += sequence.ids[start:end]
            positions += range(start, end)
            chunks.append(Chunk(sequence.pages, start, end - start))
            sequence.num_cached = end
            if end == sequence.num_to_cache:
                done.append(self.filling.popleft())
                last.append(len(ids) - 1)
        if chunks:
            self.num_prompt_tokens += len(ids)
            ids, positions = torch.tensor([ids, positions], device=self.device)
            hidden = self.model(ids[None], positions[None], self.cache.prefill(chunks))[0]
            begun += self._computed(hidden, done, last)
        return self._first_tokens(begun) if begun else []

    def _computed(self, hidden: Tensor, done: list[_Sequence], last: list[int]) -> list[tuple[_Sequence, _Prompt]]:
        """What becomes of sequences that are in the cache: those that go on take their rows; the samples of the others,
        with their prompts, are returned. hidden [N, E]; last: the places of the sequences' last tokens."""
        for sequence in done:
            self.pool.publish(sequence.ids[: sequence.num_cached], sequence.pages)
        going_on = [sequence for sequence in done if sequence.num_drawn]
        for sequence in going_on if self.seen is not None else ():
            self.seen.begin(sequence.slot, sequence.ids)
        self._place(going_on)
        leaders = [(sequence, place) for sequence, place in zip(done, last) if not sequence.num_drawn]
        if not leaders:
            return []
        logits = self.model.lm_head(hidden[torch.tensor([place for _, place in leaders], device=self.device)])
        begun = []
        for (leader, _), row in zip(leaders, logits):
            prompt = _Prompt(leader.request.prompt_ids, leader.pages[: pages_for(leader.num_cached)], row)
            begun += [(sequence, prompt) for sequence in (leader, *leader.followers)]
            leader.followers = []
        self._remember(prompt)
        return begun

    def _first_tokens(self, begun: list[tuple[_Sequence, _Prompt]]) -> list[tuple[_Sequence, int, float]]:
        """The first token of each sequence; it gets a copy of the page that its prompt ends in, unless that is full, or
        its own."""
        copies = []
        for sequence, prompt in begun:
            full, rest = divmod(len(prompt.ids), PAGE)
            if rest and sequence.pages[full] != prompt.pages[full]:
                copies.append((prompt.pages[full], sequence.pages[full]))
            sequence.num_cached = len(prompt.ids)
            if self.seen is not None:
                self.seen.begin(sequence.slot, sequence.ids)
        if copies:
            self.cache.copy_pages(*map(list, zip(*copies)))
        values = []
        for sequence, _ in begun:
            request = sequence.request
            key = noise_key(self.params.seed, request.idx, request.sample_idx)
            values.append((key, len(request.prompt_ids), sequence.slot))
        keys, lengths, slots = torch.tensor(values, device=self.device).unbind(1)
        tokens, logprobs = self._sample(torch.stack([prompt.logits for _, prompt in begun]), keys, lengths, slots)
        return [(sequence, *drawn) for (sequence, _), *drawn in zip(begun, tokens.tolist(), logprobs.tolist())]

    def _sample(
        self, logits: Tensor, keys: Tensor, positions: Tensor, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """sample() for these slots, by default all, which remember the tokens where the repetition penalty wants it."""
        tp, seen = self.model.parallel.tp, self.seen
        if seen is None:
            return sample(logits, keys, positions, self.hashes, self.params, tp)
        table = seen.table if slots is None else seen.table[slots]
        tokens, logprobs = sample(logits, keys, positions, self.hashes, self.params, tp, table)
        seen.add(tokens, slots)
        return tokens, logprobs

    # ------------------------------------------------------------------------------------- decode

    def _look(self) -> Iterator[list[tuple[_Sequence, int, float]]]:
        """look_every decode steps; of each (sequence, token, logprob) of the rows that were running."""
        self._make_room()
        running = dict(sorted(self.running.items()))
        lengths = [sequence.num_cached for sequence in running.values()]
        counter = "decode_seconds" if self._is_warm else "compile_seconds"  # the first time is mostly the compiler's
        tokens, logprobs = self._timed(counter, self._decode)
        for step in range(self.look_every):
            going = {slot: sequence for slot, sequence in running.items() if not sequence.completion.finish_reason}
            if self._is_warm:
                self.num_decoded += len(going)
                self.num_steps += 1
                self.cache_bytes_read += (sum(lengths) + (step + 1) * len(lengths)) * self.cache.bytes_per_token
            for sequence in going.values():
                sequence.num_cached += 1
            yield [(sequence, tokens[step][slot], logprobs[step][slot]) for slot, sequence in going.items()]
        self._is_warm = True

    def _decode(self) -> tuple[list[list[int]], list[list[float]]]:
        """look_every decode steps: (tokens, logprobs), [look_every][B]; rows that have stopped repeat themselves."""
        rows = [self.running[slot].pages if slot in self.running else [] for slot in range(self.num_slots)]
        self.cache.set_table(rows)
        idle = torch.tensor([slot not in self.running for slot in range(self.num_slots)], device=self.device)
        self.active.logical_and_(~idle)
        self.positions.masked_fill_(idle, 0)
        most_pages = None if self.compiled else max(map(len, rows))
        steps = (self._step(most_pages) for _ in range(self.look_every))
        outputs = [[x.clone() if self.compiled else x for x in step] for step in steps]  # CUDA graphs write over theirs
        return tuple(torch.stack(part).tolist() for part in zip(*outputs))

    def _decode_step(self, most_pages: int | None) -> tuple[Tensor, Tensor]:
        attend = self.cache.decode(self.positions, most_pages)
        if self.layers is None:
            hidden = self.model(self.tokens[:, None], self.positions[:, None], attend)[:, 0]
        else:
            hidden = self.layers(self.tokens, self.positions, attend)
        tokens, logprobs = self._sample(self.model.lm_head(hidden), self.keys, self.positions + 1)
        # a row that has ended repeats its last step at its last position until the host gives it a new prompt
        going = self.active
        self.tokens.copy_(torch.where(going, tokens, self.tokens))
        self.positions.add_(going)
        self.remaining.sub_(going.long())
        stops = (tokens[:, None] == self.stop_ids).any(dim=-1)
        self.active.copy_(going & ~stops & (self.remaining > 0))
        return tokens, logprobs
