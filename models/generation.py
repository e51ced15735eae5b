"""The batched generation engine.

- a fixed number of slots over one static KV cache; a finished slot takes the next prompt at once
- ragged prompts: every row has its own position, nothing is left-padded
- samples of one prompt share one prefill, and the vocabulary projection is computed for its last position only
- sampling noise is a pure function of (seed, prompt index, sample index, position, token id): the same seed gives the
  same samples whatever the number of slots, the order of the prompts, the ranks or a restart, and no two share noise
- ranks that share a model draw from their parts of the vocabulary and agree on a winner, without gathering logits
- one decode step returns a token and its log-prob, [B] each; stopping is decided on the device, and the host looks
  every `look_every` steps; attention length comes in buckets, so a compiled step (CUDA graphs) serves a whole run

Dimensions: B slots, V vocabulary, P prompts prefilled together.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models.common import at_least_one, flag, fraction, non_negative, positive, with_newlines
from models.decode import KVCache
from models.decode_cpu import CPUCache, DecodeLayers
from models.model import Transformer
from models.noise import column_hashes, exponential_noise, noise_key
from models.repetition import SeenTokens, penalised
from models.streaming import StreamDecoder
from models.tokenizer import Tokenizer
from models.tp import chunk_range, gather_ranks, size_of
from models.vocab_parallel import gather_vocabulary, pad_vocabulary

PREFILL_TOKENS = 8192  # most tokens of one packed prefill, unless a single prompt is longer
CPU_NOISE = 2**18  # numbers of the vocabulary that a CPU samples from at a time: about what its caches hold


@dataclass(frozen=True, kw_only=True)
class StopArgs:
    """What ends an answer, beside the model's own stop tokens."""

    stop: list[str] | None = flag(
        None,
        action="append",
        type=with_newlines,
        help=r"a text that ends an answer, or a special token's; \n is a newline; may be given several times",
    )


@dataclass(frozen=True, kw_only=True)
class SamplingArgs(StopArgs):
    """How an answer is drawn."""

    max_new_tokens: int = flag(256, bounds=at_least_one, help="most tokens of an answer")
    temperature: float = flag(1.0, bounds=non_negative, help="0 is greedy")
    top_k: int = flag(0, bounds=non_negative, help="sample among the k likeliest tokens; 0 is off")
    top_p: float = flag(
        1.0, bounds=fraction, help="sample among the likeliest tokens of this total probability; 1 is off"
    )
    repetition_penalty: float = flag(
        1.0,
        bounds=positive,
        help="divides the positive logits of tokens of the prompt and the answer so far, and multiplies their negative "
        "ones, before the temperature; 1 is off",
    )

    def params(self, seed: int, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]) -> "SamplingParams":
        """What the engine needs of these flags. Raises ValueError for a --stop that could never be met."""
        stop_ids, stop = stops_of(self.stop or (), tokenizer)
        return SamplingParams(
            self.temperature,
            self.top_k,
            self.top_p,
            seed,
            tuple(dict.fromkeys((*eos_token_ids, *stop_ids))),
            stop,
            self.repetition_penalty,
        )


def stops_of(texts: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(ids of the texts that are special tokens, the other texts): decoded text has no special tokens to match."""
    special = {tokenizer.decode([i], skip_special_tokens=False): i for i in tokenizer.special_ids}
    for text in texts:
        if not text:
            raise ValueError("--stop must not be empty")
        inside = next((name for name in special if name and name in text), None)
        if inside is not None and text not in special:
            raise ValueError(
                f"--stop {text!r}: no text holds the special token {inside}; give it as a --stop of its own"
            )
    return tuple(special[text] for text in texts if text in special), tuple(t for t in texts if t not in special)


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0 and top_p 1 are off. Filters apply in that order, and the token that crosses
    top_p is kept, as in transformers; so is a token as likely as the last that a filter keeps. stop: strings that end
    a completion; they are not part of it. repetition_penalty: see penalised; 1 is off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if 0 < self.temperature < 1e-4:  # logits / temperature must stay finite
            raise ValueError(f"temperature {self.temperature}: must be 0 (greedy) or at least 0.0001")


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


# ---------------------------------------------------------------------------------------- sampling


def sample(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    hashes: Tensor,
    params: SamplingParams,
    tp: DeviceMesh | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one token for each row: (tokens int64 [B], logprobs fp32 [B]), the same on all tp ranks.

    logits [B, V'], this rank's part of the vocabulary; keys, positions int64 [B]; hashes int32 [V]; seen: a table of
    SeenTokens, whose tokens get the repetition penalty. The token with the largest logit - log Exp(1) has distribution
    softmax(logits) (the Gumbel-max trick), so a token's noise need not know the other tokens, and a rank need not know
    the other ranks' logits. A tie goes to the lowest id.
    """
    V, offset = len(hashes), 0
    few = max(1, CPU_NOISE // V)
    if logits.device.type == "cpu" and len(logits) > few and size_of(tp) == 1 and not torch.compiler.is_compiling():
        parts = zip(*(t.split(few) for t in (logits, keys, positions)))
        seen_parts = itertools.repeat(None) if seen is None else seen.split(few)
        tokens, logprobs = zip(*(sample(*part, hashes, params, tp, s) for part, s in zip(parts, seen_parts)))
        return torch.cat(tokens), torch.cat(logprobs)
    logits = logits.float()
    if size_of(tp) > 1:
        offset, end = chunk_range(V, tp.get_local_rank(), tp.size())
        logits = pad_vocabulary(logits, V, tp, -torch.inf)
        hashes = pad_vocabulary(hashes[offset:end], V, tp, 0)
    scores, ids = logits if seen is None else penalised(logits, seen, params.repetition_penalty), None
    if params.temperature:
        kept = scores if params.temperature == 1 else scores / params.temperature
        logits = kept if seen is None else logits / params.temperature
        if params.top_k or params.top_p < 1:
            kept, ids = _filter(kept, params, V, tp)
        noise = exponential_noise(keys, positions, hashes if ids is None else hashes[ids])
        scores = torch.sub(kept, noise.log_(), out=noise)
    best, tokens = _largest(scores)
    tokens = tokens if ids is None else ids.gather(-1, tokens)
    if size_of(tp) == 1:  # on the CPU in half the time of logsumexp
        return tokens[:, 0], logits.log_softmax(dim=-1).gather(-1, tokens)[:, 0]
    chosen, normaliser = logits.gather(-1, tokens), logits.logsumexp(dim=-1, keepdim=True)
    # ids are exact in fp32 up to 2^24
    candidates = torch.cat((best, (tokens + offset).float(), chosen, normaliser), dim=-1)
    best, tokens, chosen, normaliser = gather_ranks(candidates, tp).unbind(-1)  # [B, tp] each
    winner = best.argmax(dim=-1, keepdim=True)
    tokens, chosen = tokens.gather(-1, winner).long(), chosen.gather(-1, winner)
    normaliser = normaliser.logsumexp(dim=-1, keepdim=True)
    return tokens[:, 0], (chosen - normaliser)[:, 0]


def _largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest score of each row, the first index that has it), [B, 1] each. On the CPU a maximum with its index
    takes ten times as long as one without, so it is taken of a 64th of the columns, where they divide."""
    if scores.device.type != "cpu" or torch.compiler.is_compiling():
        return scores.max(dim=-1, keepdim=True)
    parts = scores.unflatten(-1, (math.gcd(scores.shape[-1], 64), -1))  # [B, parts, V' / parts]
    part = parts.amax(dim=-1).argmax(dim=-1)
    best, place = parts[torch.arange(len(part)), part].max(dim=-1, keepdim=True)
    return best, part[:, None] * parts.shape[-1] + place


def _filter(logits: Tensor, params: SamplingParams, V: int, tp: DeviceMesh | None) -> tuple[Tensor, Tensor | None]:
    """(this rank's logits, -inf where a filter drops one; None); or only some of them, with all that the filters keep
    among them, and their ids in rising order."""
    branching = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    if params.top_k:
        few, ids = logits.topk(min(params.top_k + 1, logits.shape[-1]), dim=-1)  # one more, to see a tie at the end
        top = few if size_of(tp) == 1 else gather_ranks(few, tp).flatten(1).topk(min(params.top_k, V), dim=-1).values
        top = within = top[:, : params.top_k]  # top-p is a share of what top-k has left
    else:  # top-p alone needs the order of the whole vocabulary
        within = gather_vocabulary(logits, V, tp)
        few, ids = within.topk(min(1024, V), dim=-1) if branching else within.sort(dim=-1, descending=True)
        # on the CPU a sort takes as long as a small model's layers, and the mass is nearly always at the top
        if branching and ((few - within.logsumexp(dim=-1, keepdim=True)).exp().sum(dim=-1) < params.top_p).any():
            few, ids = within.sort(dim=-1, descending=True)
        top = few
    threshold = top[:, -1:]
    if params.top_p < 1:
        probs = (top - within.logsumexp(dim=-1, keepdim=True)).exp()
        mass_before = probs.cumsum(dim=-1) - probs
        mass_before[:, :1].fill_(-1.0)  # the best token stays, also for top_p 0; `= -1.0` makes a tensor on the CPU
        threshold = top.masked_fill(mass_before >= params.top_p, float("inf")).amin(dim=-1, keepdim=True)
    # the noise of few tokens is cheaper than that of all; with top-p alone the few are those of all tp ranks
    fewer = branching and few.shape[-1] < logits.shape[-1] and (params.top_k or size_of(tp) == 1)
    if fewer and (few[:, -1:] < threshold).all():
        ids, order = ids.sort(dim=-1)
        few = few.gather(-1, order)
        return few.masked_fill(few < threshold, float("-inf")), ids
    return logits.masked_fill(logits < threshold, float("-inf")), None


# ------------------------------------------------------------------------------------------ engine


class _Running:
    """A sample under way on the host's side: collects tokens and decides when it has ended."""

    def __init__(self, request: Request, params: SamplingParams, tokenizer: Tokenizer | None):
        self.completion = Completion(request)
        self.params, self.tokenizer = params, tokenizer
        self.decoder = StreamDecoder(tokenizer, request.prompt_ids) if params.stop else None
        self.streamed = ""

    def push(self, token: int, logprob: float) -> bool:
        """Takes a sampled token; True if it was the last."""
        done = self.completion
        if not math.isfinite(logprob):
            broken = "the weights are broken, or overflow in this dtype"
            raise ValueError(f"{done.request}: the log-probability of a token is {logprob}; {broken}")
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

    num_slots: rows of every decode step. max_seq_len: most tokens of a prompt with its completion. look_every: decode
    steps between two looks of the host, 1 where looking costs nothing. compile: torch.compile the decode step; with
    CUDA graphs on a GPU. tokenizer: for texts and stop strings; without it completions hold ids only.
    """

    def __init__(
        self,
        model: Transformer,
        params: SamplingParams,
        *,
        num_slots: int,
        max_seq_len: int,
        tokenizer: Tokenizer | None = None,
        compile: bool = False,
        look_every: int | None = None,
    ):
        super().__init__()
        if params.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self.model, self.params, self.tokenizer, self.num_slots = model, params, tokenizer, num_slots
        device, config = model.embed_tokens.weight.device, model.config
        self.device, self.compiled = device, compile
        self.look_every = look_every or (1 if device.type == "cpu" else 8)
        self.cache_len = -(-max_seq_len // 8) * 8
        shape = {"num_slots": num_slots, "max_seq_len": self.cache_len, "tp": model.parallel.tp}
        dtype = model.compute_dtype or model.embed_tokens.weight.dtype
        self.layers = None
        if device.type == "cpu" and not compile:
            self.cache = CPUCache(config, dtype=dtype, **shape)
            self.layers = DecodeLayers(model, num_slots, self.cache_len)
        else:
            self.cache = KVCache(config, dtype=dtype, device=device, **shape)
        # the state of the slots lives on the device, at fixed addresses
        for name in ("tokens", "positions", "keys", "remaining"):
            self.register_buffer(name, torch.zeros(num_slots, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("active", torch.zeros(num_slots, dtype=torch.bool, device=device), persistent=False)
        self.register_buffer("hashes", column_hashes(config.vocab_size, device), persistent=False)
        stop_ids = torch.tensor(params.stop_token_ids or (-1,), dtype=torch.int64, device=device)
        self.register_buffer("stop_ids", stop_ids, persistent=False)
        penalty, tp = params.repetition_penalty, model.parallel.tp
        self.seen = None if penalty == 1 else SeenTokens(num_slots, config.vocab_size, device, tp)
        self._step, self._compiled_lengths = self._decode_step, set()
        if compile:
            # the limit counts the variants of all engines of a process together; 8 is one engine's buckets
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            options = {"mode": "reduce-overhead"} if device.type != "cpu" else {}
            self._step = torch.compile(self._decode_step, fullgraph=True, dynamic=False, **options)
        self.reset_stats()

    def reset_stats(self) -> None:
        self.num_prompt_tokens = self.num_decoded = self.num_steps = self.cache_bytes_read = 0
        self.prefill_seconds = self.decode_seconds = self.compile_seconds = 0.0

    @torch.no_grad()
    def generate(
        self,
        requests: Iterable[Request],
        on_token: Callable[[Request, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Completion]:
        """Yields completions in the order of finishing. on_token is called for every sampled token, stop tokens too.
        should_stop is asked at each look of the host, in step on all tp ranks, and ends it before all are finished.

        Requests are taken when there is a slot for them; equal prompts share a prefill when they follow one another.
        """
        waiting = map(self._checked, requests)
        if self.layers is not None:
            self.layers.take_weights()
        self._resident: tuple[tuple[int, ...], int, Tensor] | None = None  # newest prompt, a slot with it, its logits
        running: dict[int, _Running] = {}

        def take(slot: int, token: int, logprob: float) -> Iterator[Completion]:
            if on_token is not None:
                on_token(running[slot].completion.request, token)
            if running[slot].push(token, logprob):
                yield running.pop(slot).completion

        while not (should_stop is not None and should_stop()):
            free = [slot for slot in range(self.num_slots) if slot not in running]
            if placed := list(zip(free, waiting)):
                running |= {slot: _Running(request, self.params, self.tokenizer) for slot, request in placed}
                for (slot, _), token, logprob in zip(placed, *self._timed("prefill_seconds", self._admit, placed)):
                    yield from take(slot, token, logprob)
                continue  # a first token may have been the last
            if not running:
                return
            in_use = [len(r.completion.request.prompt_ids) + len(r.completion.token_ids) for r in running.values()]
            length = self._bucket(max(in_use) + self.look_every)
            first = self.compiled and length not in self._compiled_lengths  # its time is mostly the compiler's
            self._compiled_lengths.add(length)
            counter = "compile_seconds" if first else "decode_seconds"
            tokens, logprobs = self._timed(counter, self._decode, length)
            for step, (row_tokens, row_logprobs) in enumerate(zip(tokens, logprobs)):
                if not first:
                    self.num_decoded += len(running)
                    self.num_steps += 1
                    self.cache_bytes_read += (sum(in_use) + step * len(in_use)) * self.cache.bytes_per_token
                for slot in sorted(running):
                    yield from take(slot, row_tokens[slot], row_logprobs[slot])

    def _checked(self, request: Request) -> Request:
        if not request.prompt_ids or request.max_new_tokens < 1:
            raise ValueError(f"{request}: needs at least one prompt token and one token to generate")
        if len(request.prompt_ids) + request.max_new_tokens <= self.cache_len:
            return request
        raise ValueError(f"{request}: prompt and completion exceed max_seq_len")

    def _timed(self, counter: str, function: Callable, *args):
        start = time.perf_counter()
        result = function(*args)
        setattr(self, counter, getattr(self, counter) + time.perf_counter() - start)
        return result

    def _admit(self, placed: list[tuple[int, Request]]) -> tuple[list[int], list[float]]:
        """Prefills the slots with their prompts and draws the first token of each: (tokens, logprobs)."""
        prompts = [tuple(request.prompt_ids) for _, request in placed]
        slots_of: dict[tuple[int, ...], list[int]] = {}
        for (slot, _), prompt in zip(placed, prompts):
            slots_of.setdefault(prompt, []).append(slot)
        logits_of: dict[tuple[int, ...], Tensor] = {}  # this rank's part of the logits [V]
        if self._resident is not None and self._resident[0] in slots_of:
            prompt, holder, logits = self._resident
            self.cache.copy_prefix(holder, [slot for slot in slots_of.pop(prompt) if slot != holder], len(prompt))
            logits_of[prompt] = logits
        for group in _groups(slots_of, PREFILL_TOKENS):
            logits_of.update(zip(group, self._prefill(group, [slots_of[prompt][0] for prompt in group])))
        for prompt, (first, *others) in slots_of.items():
            self.cache.copy_prefix(first, others, len(prompt))

        self._resident = (prompts[-1], placed[-1][0], logits_of[prompts[-1]])
        tensor = lambda values: torch.tensor(values, dtype=torch.int64, device=self.device)  # noqa: E731
        slots, lengths = tensor([slot for slot, _ in placed]), tensor([len(prompt) for prompt in prompts])
        keys = tensor([noise_key(self.params.seed, request.idx, request.sample_idx) for _, request in placed])
        logits = torch.stack([logits_of[prompt] for prompt in prompts])
        for slot, request in placed if self.seen is not None else ():
            self.seen.begin(slot, request.prompt_ids)
        tokens, logprobs = self._sample(logits, keys, lengths, slots)
        remaining = tensor([request.max_new_tokens - 1 for _, request in placed])
        self.tokens[slots], self.positions[slots], self.keys[slots] = tokens, lengths, keys
        self.remaining[slots] = remaining
        self.active[slots] = ~self._stops(tokens) & (remaining > 0)
        return tokens.tolist(), logprobs.tolist()

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

    def _stops(self, tokens: Tensor) -> Tensor:
        return (tokens[:, None] == self.stop_ids).any(dim=-1)

    def _prefill(self, prompts: list[tuple[int, ...]], slots: list[int]) -> Tensor:
        """The logits that follow each prompt, [P, V], of which a tp rank has its part; the prompts run packed end to
        end, and fill the slots' caches."""
        lengths = [len(prompt) for prompt in prompts]
        self.num_prompt_tokens += sum(lengths)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        hidden = self.model(ids[None], positions[None], self.cache.prefill(slots, lengths))[0]
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return self.model.lm_head(hidden[last])

    def _decode(self, length: int) -> tuple[list[list[int]], list[list[float]]]:
        """look_every decode steps: (tokens, logprobs), [look_every][B]; rows that have stopped repeat themselves."""
        steps = (self._step(length) for _ in range(self.look_every))
        outputs = [[x.clone() if self.compiled else x for x in step] for step in steps]  # CUDA graphs write over theirs
        return tuple(torch.stack(part).tolist() for part in zip(*outputs))

    def _bucket(self, length: int) -> int:
        """The attention length for at least `length` positions: a compiled step must see few of them (torch.compile
        stops at 8 variants), an eager one can follow closely; where each row has its own, it does not matter."""
        if self.layers is None and self.cache.row_lengths:
            return self.cache_len
        step = 32 if not self.compiled else max(64, -(-self.cache_len // (7 * 64)) * 64)
        return min(-(-length // step) * step, self.cache_len)

    def _decode_step(self, length: int) -> tuple[Tensor, Tensor]:
        attend = self.cache.decode(self.positions, length)
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
        self.active.copy_(going & ~self._stops(tokens) & (self.remaining > 0))
        return tokens, logprobs


def _groups(prompts: Iterable[tuple[int, ...]], max_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive prompts in groups of at most max_tokens tokens; a longer prompt stands alone."""
    group, size = [], 0
    for prompt in prompts:
        if group and size + len(prompt) > max_tokens:
            yield group
            group, size = [], 0
        group.append(prompt)
        size += len(prompt)
    if group:
        yield group
