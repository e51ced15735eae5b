"""What the generation engine is asked for, what it gives back, and a sample while it is under way on the host."""

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
    source: what it is of, a record or the place of one, which messages name."""

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
    """A prompt that has been computed, which its samples go on from."""

    ids: list[int]
    pages: list[int]
    logits: Tensor  # this rank's part of what follows it, [V']


OnToken = Callable[[Request, int], None]


class Sample:
    """A sample under way: collects tokens, decides when it has ended, and has pages.

    The host learns tokens after the device has gone on: num_cached are in the cache as far as is known here,
    num_launched when all has run that the device was given.
    """

    def __init__(self, request: Request, params: SamplingParams, tokenizer: Tokenizer | None):
        self.request, self.completion = request, Completion(request)
        self.params, self.tokenizer = params, tokenizer
        self.stop_ids = frozenset(params.stop_token_ids)
        self.decoder = StreamDecoder(tokenizer, request.prompt_ids) if params.stop else None
        self.streamed = ""
        self.ids = list(request.prompt_ids)  # and what was drawn, what ended it included
        self.num_left, self.has_ended = request.max_new_tokens, False  # tokens that it may still draw
        self.most_tokens = len(request.prompt_ids) + request.max_new_tokens
        self.slot, self.pages, self.num_cached, self.num_launched = -1, [], 0, 0
        self.published = (0, 0)  # of PagePool.publish, for its pages
        self.followers: list[Sample] = []  # samples of the same prompt that wait for its prefill

    @property
    def num_to_cache(self) -> int:
        """Tokens that are in the cache before it can decode: the last that was drawn is what the next step reads."""
        return max(len(self.request.prompt_ids), len(self.ids) - 1)

    @property
    def num_drawn(self) -> int:
        return self.request.max_new_tokens - self.num_left

    @property
    def is_exhausted(self) -> bool:
        """Whether all its tokens are drawn once the device has run what it was given."""
        return self.num_launched >= self.most_tokens - 1

    def take(self, tokens: Sequence[int], logprobs: Sequence[float], on_token: OnToken | None) -> int:
        """Takes tokens that were drawn one after the other, up to the one that ends it: how many it took."""
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
        """(how many tokens there are until a stop string, the text before that); all and None without one. stopped:
        whether the last is a stop token, which has no text."""
        longest = max(map(len, self.params.stop))
        for count, token in enumerate(tokens, 1):
            is_last = count == len(tokens) and (stopped or count == self.num_left)
            old, ids = len(self.streamed), [] if stopped and is_last else [token]
            self.streamed += self.decoder.flush(ids) if is_last else self.decoder.push(token)
            # what is held back counts, a newline that is a byte's token, say: what would follow cannot undo it any more
            text = self.streamed if is_last else self.streamed + self.decoder.held_back()
            places = [text.find(stop, max(0, old - longest + 1)) for stop in self.params.stop]
            places = [place for place in places if place >= 0]
            if places:
                return count, text[: min(places)]
        return len(tokens), None

    def _end(self, stopped: bool, text: str | None) -> None:
        """stopped: by its last token. text: up to a stop string."""
        done, prompt_ids, self.has_ended = self.completion, self.request.prompt_ids, True
        drawn = self.ids[len(prompt_ids) :]
        count = len(drawn) - stopped  # tokens of the text
        if text is not None:  # without those at the end that lie wholly in the stop string
            while count and self.tokenizer.decode_continuation(prompt_ids, drawn[: count - 1]).startswith(text):
                count -= 1
        done.finish_reason = "length" if text is None and not stopped else "stop"
        done.token_ids, done.stop_ids = drawn[:count], drawn[count:]
        if self.tokenizer is not None:
            done.text = self.tokenizer.decode_continuation(prompt_ids, done.token_ids) if text is None else text
