"""Requests to the generation engine, its completions, and the host's state of a sample in progress."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from models.sampling import SamplingParams
from models.streaming import StreamDecoder
from models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """One sample to draw. idx and sample_idx number the prompt and the sample, and with the seed they fix its noise.
    source: the record of the prompt, or its place, for messages."""

    idx: int
    sample_idx: int
    prompt_ids: list[int]
    max_new_tokens: int
    source: object = None

    def __str__(self) -> str:
        return str(self.source or f"prompt {self.idx}")


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


class Prompt(NamedTuple):
    """A prefilled prompt, from which its samples start."""

    ids: list[int]
    pages: list[int]
    logits: Tensor  # of its last token, this rank's part, [V']


OnToken = Callable[[Request, int], None]


class Sample:
    """A sample in progress: collects tokens, decides when it has ended, and holds pages.

    The device runs ahead of the host: num_cached tokens are in the cache as far as the host knows, num_launched once
    all launched steps have run.
    """

    def __init__(self, request: Request, params: SamplingParams, tokenizer: Tokenizer | None):
        self.request, self.completion = request, Completion(request)
        self.params, self.tokenizer = params, tokenizer
        self.stop_ids = frozenset(params.stop_token_ids)
        self.decoder = StreamDecoder(tokenizer, request.prompt_ids) if params.stop else None
        self.streamed = ""
        self.ids = list(request.prompt_ids)  # and all drawn tokens, a stop token included
        self.num_left, self.has_ended = request.max_new_tokens, False  # tokens that it may still draw
        self.most_tokens = len(request.prompt_ids) + request.max_new_tokens
        self.slot, self.pages, self.num_cached, self.num_launched = -1, [], 0, 0
        self.published = (0, 0)  # the result of PagePool.publish() of its pages
        self.followers: list[Sample] = []  # samples of the same prompt that wait for its prefill

    @property
    def num_to_cache(self) -> int:
        """Number of tokens to cache before it can decode: all but the last drawn token, which the next step reads."""
        return max(len(self.request.prompt_ids), len(self.ids) - 1)

    @property
    def num_drawn(self) -> int:
        return self.request.max_new_tokens - self.num_left

    @property
    def is_exhausted(self) -> bool:
        """Whether the steps launched so far draw all its tokens."""
        return self.num_launched >= self.most_tokens - 1

    def take(self, tokens: Sequence[int], logprobs: Sequence[float], on_token: OnToken | None) -> int:
        """Takes drawn tokens in order, up to the one that ends the sample; returns how many it took."""
        count, stopped, text = min(self.num_left, len(tokens)), False, None
        if not self.stop_ids.isdisjoint(tokens):
            place = next(i for i, token in enumerate(tokens) if token in self.stop_ids)
            count, stopped = min(count, place + 1), place < count
        if self.decoder is not None:
            most, (count, text) = count, self._watch(tokens[:count], stopped)
            stopped = stopped and count == most
        if count < len(tokens):
            tokens, logprobs = tokens[:count], logprobs[:count]
        self.num_left -= count
        self.ids += tokens
        self.completion.logprobs += logprobs
        if on_token is not None:
            for token in tokens:
                on_token(self.request, token)
        if stopped or not self.num_left or text is not None:
            self._end(stopped, text)
        return count

    def check(self, logprobs: Sequence[float]) -> None:
        """Raises ValueError if a log-probability of a token that it may still draw is not finite."""
        for logprob in logprobs[: self.num_left]:
            if not math.isfinite(logprob):
                broken = "the weights are broken, or overflow in this dtype"
                raise ValueError(f"{self.request}: the log-probability of a token is {logprob}; {broken}")

    def _watch(self, tokens: Sequence[int], stopped: bool) -> tuple[int, str | None]:
        """(number of tokens up to a stop string, the text before it), or (all, None) without one. stopped: whether the
        last token is a stop token, which has no text."""
        longest = max(map(len, self.params.stop))
        for count, token in enumerate(tokens, 1):
            is_last = count == len(tokens) and (stopped or count == self.num_left)
            old, ids = len(self.streamed), [] if stopped and is_last else [token]
            self.streamed += self.decoder.flush(ids) if is_last else self.decoder.push(token)
            # held-back text counts, such as a byte token's newline: if the sample ends here, nothing can change it
            text = self.streamed if is_last else self.streamed + self.decoder.held_back()
            places = [text.find(stop, max(0, old - longest + 1)) for stop in self.params.stop]
            places = [place for place in places if place >= 0]
            if places:
                return count, text[: min(places)]
        return len(tokens), None

    def _end(self, stopped: bool, text: str | None) -> None:
        """stopped: whether its last token is a stop token. text: the text before a stop string, None without one."""
        done, prompt_ids, self.has_ended = self.completion, self.request.prompt_ids, True
        drawn = self.ids[len(prompt_ids) :]
        count = len(drawn) - stopped  # tokens of the text
        if text is not None:  # drops tokens at the end that lie wholly in the stop string
            while count and self.tokenizer.decode_continuation(prompt_ids, drawn[: count - 1]).startswith(text):
                count -= 1
        done.finish_reason = "length" if text is None and not stopped else "stop"
        done.token_ids, done.stop_ids = drawn[:count], drawn[count:]
        if self.tokenizer is not None:
            done.text = self.tokenizer.decode_continuation(prompt_ids, done.token_ids) if text is None else text
