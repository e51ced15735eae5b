"""Sampling: its flags, and one token for each row of logits.

- noise is a pure function of (seed, prompt index, sample index, position, token id): the same seed gives the same
  samples whatever the number of rows, the order of the prompts, the ranks or a restart, and no two samples share noise
- ranks that share a model draw from their parts of the vocabulary and agree on a winner; only top-p without
  top-k gathers logits

Dimensions: B rows, V vocabulary, V' a rank's part of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.common import at_least_one, flag, fraction, non_negative, positive, with_newlines
from models.gpu import has_triton
from models.noise import exponential_noise
from models.repetition import penalised
from models.tokenizer import Tokenizer
from models.tp import gather_ranks, own_chunk, size_of
from models.vocab_parallel import pad_vocabulary


@dataclass(frozen=True, kw_only=True)
class StopArgs:
    """Ends of answers, besides the model's own stop tokens."""

    stop: list[str] | None = flag(
        None,
        action="append",
        type=with_newlines,
        help=r"a text or a special token that ends an answer; \n is a newline; may be given several times",
    )

    def stops(self, tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """(stop tokens, stop strings): decoded text leaves special tokens out, so a --stop that is one is found by its
        id. Raises ValueError for a --stop that could never match."""
        special = {tokenizer.decode([i], skip_special_tokens=False): i for i in tokenizer.special_ids}
        texts = self.stop or ()
        for text in texts:
            if not text:
                raise ValueError("--stop must not be empty")
            inside = next((name for name in special if name and name in text), None)
            if inside is not None and text not in special:
                raise ValueError(
                    f"--stop {text!r}: decoded text never holds the special token {inside}; "
                    "give it as a separate --stop"
                )
        stop_ids = (*eos_token_ids, *(special[text] for text in texts if text in special))
        return tuple(dict.fromkeys(stop_ids)), tuple(text for text in texts if text not in special)


@dataclass(frozen=True, kw_only=True)
class SamplingArgs(StopArgs):
    """How answers are sampled."""

    max_new_tokens: int = flag(256, bounds=at_least_one, help="most tokens of an answer")
    temperature: float = flag(1.0, bounds=non_negative, help="0 is greedy")
    top_k: int = flag(0, bounds=non_negative, help="sample among the k likeliest tokens; 0 is off")
    top_p: float = flag(
        1.0, bounds=fraction, help="sample among the likeliest tokens that together have this probability; 1 is off"
    )
    repetition_penalty: float = flag(
        1.0,
        bounds=positive,
        help="divides positive logits of tokens that the prompt or the answer already has, and multiplies negative "
        "ones, before the temperature; 1 is off",
    )

    def params(self, seed: int, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]) -> "SamplingParams":
        """These flags as the engine takes them. Raises ValueError for a --stop that could never match, or a
        --temperature that is too low."""
        check_temperature(self.temperature, "--temperature")
        stops = self.stops(tokenizer, eos_token_ids)
        return SamplingParams(self.temperature, self.top_k, self.top_p, seed, *stops, self.repetition_penalty)


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0 and top_p 1 are off. Filters apply in that order, and the token that crosses
    top_p is kept, as in transformers; so are tokens exactly as likely as the last one that a filter keeps. stop:
    strings that end a completion; they are not part of it. repetition_penalty: see penalised; 1 is off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0

    def __post_init__(self):
        check_temperature(self.temperature, "temperature")


def check_temperature(temperature: float, name: str) -> None:
    """Raises ValueError, with the setting's name, if logits / temperature might not be finite."""
    if 0 < temperature < 1e-4:
        raise ValueError(f"{name} {temperature}: must be 0 (greedy) or at least 0.0001")


def all_filtered(logits: Tensor, params: SamplingParams, V: int, tp: DeviceMesh | None) -> tuple[Tensor, None]:
    """(this rank's logits, -inf where a filter drops a token; None, since they are those of all ids). No full sort."""
    if params.top_k:
        top = logits.topk(min(params.top_k, logits.shape[-1]), dim=-1).values
        if size_of(tp) > 1:
            top = gather_ranks(top, tp).flatten(1).topk(min(params.top_k, V), dim=-1).values
        threshold = last_kept(top, top, params.top_p)  # top-p is a share of what top-k leaves
    else:
        # gathers whole rows: summing the ranks' probabilities would take 32 all-reduces, whose latency costs more
        row = logits if size_of(tp) == 1 else gather_ranks(logits, tp).flatten(1)
        threshold = top_p_threshold(row, params.top_p)  # a separate statement: torch 2.11 cannot resume within a call
    return logits.masked_fill(logits < threshold, float("-inf")), None


def last_kept(top: Tensor, within: Tensor, top_p: float) -> Tensor:
    """The smallest logit that top-p keeps, [B, 1]. top: the largest logits in descending order [B, n], at least all
    that it keeps; within: the logits whose probabilities sum to 1."""
    if top_p >= 1:
        return top[:, -1:]
    probs = (top - within.logsumexp(dim=-1, keepdim=True)).exp()
    mass_before = probs.cumsum(dim=-1) - probs
    mass_before[:, :1].fill_(-1.0)  # the best token stays, also for top_p 0; `= -1.0` would make a tensor on the CPU
    return top.masked_fill(mass_before >= top_p, float("inf")).amin(dim=-1, keepdim=True)


def in_parts(rows: Tensor) -> Tensor:
    """[B, V'] -> [B, parts, V' / parts]: reducing the last dimension and then the parts keeps a whole GPU busy with few
    rows; a reduction over V' would use a single processor for each row."""
    count = next(n for n in (32, 16, 8, 4, 2, 1) if rows.shape[-1] % n == 0)
    return rows.unflatten(-1, (count, -1))


def largest_of_rows(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest score of each row, the first index that has it), [B, 1] each"""
    parts = in_parts(scores)
    best, places = parts.max(dim=-1)
    best, part = best.max(dim=-1, keepdim=True)
    return best, part * parts.shape[-1] + places.gather(-1, part)


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probs of tokens [B, 1], fp32 [B, 1]: log_softmax, reduced in parts."""
    parts = in_parts(logits)
    largest = parts.amax(dim=-1).amax(dim=-1, keepdim=True)
    total = (parts - largest[..., None]).exp().sum(dim=-1).sum(dim=-1, keepdim=True)
    return logits.gather(-1, tokens) - largest - total.log()


def sample(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    hashes: Tensor,
    params: SamplingParams,
    tp: DeviceMesh | None = None,
    seen: Tensor | None = None,
    *,
    filtered: Callable[..., tuple[Tensor, Tensor | None]] = all_filtered,
    largest: Callable[[Tensor], tuple[Tensor, Tensor]] = largest_of_rows,
    logprobs: Callable[[Tensor, Tensor], Tensor] = logprobs_of,
) -> tuple[Tensor, Tensor]:
    """Draws one token for each row: (tokens int64 [B], logprobs fp32 [B]), the same on all tp ranks.

    logits [B, V'], this rank's part of the vocabulary; keys, positions int64 [B]; hashes int32 [V]; seen: a table of
    SeenTokens, whose tokens get the repetition penalty. The token with the largest logit - log Exp(1) has distribution
    softmax(logits) (the Gumbel-max trick), so a token's noise does not depend on the other tokens, and a rank does not
    need the other ranks' logits. A tie goes to the lowest id. filtered, largest, logprobs: functions for these steps,
    of which a device may have its own.
    """
    V, offset = len(hashes), 0
    logits = logits.float()
    if size_of(tp) > 1:
        offset, end = own_chunk(V, tp)
        logits = pad_vocabulary(logits, V, tp, -torch.inf)
        hashes = pad_vocabulary(hashes[offset:end], V, tp, 0)
    scores, ids = logits if seen is None else penalised(logits, seen, params.repetition_penalty), None
    if params.temperature:
        kept = scores if params.temperature == 1 else scores / params.temperature
        logits = kept if seen is None else logits / params.temperature
        if params.top_k or params.top_p < 1:
            kept, ids = filtered(kept, params, V, tp)
        noise = exponential_noise(keys, positions, hashes if ids is None else hashes[ids])
        scores = torch.sub(kept, noise.log_(), out=noise)
    best, tokens = largest(scores)
    tokens = tokens if ids is None else ids.gather(-1, tokens)
    if size_of(tp) == 1:
        return tokens[:, 0], logprobs(logits, tokens)[:, 0]
    chosen, normaliser = logits.gather(-1, tokens), logits.logsumexp(dim=-1, keepdim=True)
    # ids are exact in fp32 up to 2^24
    candidates = torch.cat((best, (tokens + offset).float(), chosen, normaliser), dim=-1)
    best, tokens, chosen, normaliser = gather_ranks(candidates, tp).unbind(-1)  # [B, tp] each
    winner = best.argmax(dim=-1, keepdim=True)
    tokens, chosen = tokens.gather(-1, winner).long(), chosen.gather(-1, winner)
    normaliser = normaliser.logsumexp(dim=-1, keepdim=True)
    return tokens[:, 0], (chosen - normaliser)[:, 0]


@torch.compiler.disable  # 32 rounds would be a hundred kernels to compile
def top_p_threshold(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit that top-p keeps, [B, 1] of logits fp32 [B, V], without sorting.

    A token is kept if the tokens above it have a total probability below top_p; the lower a logit, the larger this
    total. So bisection finds the lowest number with that property, which is a logit: over the bits of fp32 numbers,
    mapped to integers in their order, 32 rounds decide all bits. On GPUs it is one kernel: models/triton_sampling.py.
    """
    if has_triton(logits.device):
        from models import triton_sampling

        return triton_sampling.top_p_threshold(logits.contiguous(), top_p)
    largest = logits.amax(dim=-1, keepdim=True)
    probs = (logits - logits.logsumexp(dim=-1, keepdim=True)).exp()
    high = _ordered(largest.view(torch.int32)).long()  # the largest is kept in any case
    low = torch.full_like(high, -(2**31) + 2**23 - 1)  # -inf
    for _ in range(32):
        middle = (low + high) >> 1
        above = torch.where(logits > _ordered(middle.int()).view(torch.float32), probs, 0.0).sum(dim=-1, keepdim=True)
        has_less = above < top_p
        low, high = torch.where(has_less, low, middle + 1), torch.where(has_less, middle, high)
    return _ordered(high.int()).view(torch.float32)


def _ordered(bits: Tensor) -> Tensor:
    """Maps the bits of fp32 numbers to int32 of the same order, and back: it is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
