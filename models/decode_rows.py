"""The device's side of the generation engine: the state of the rows of a decode step, the cache, prefill and steps.

- a step computes a token and its log-prob for each row, and decides which rows have ended; rows that have repeat their
  last step at its place until they are given to another sample
- nothing here waits for a GPU: what comes from the host is copied by the way, what goes to it is a Download
- samples depend on no row's number: the first rows are those in use, and a step may be of these alone

Dimensions: B rows, n of them in a step, V vocabulary, V' this rank's part of it, L steps between two looks of the host.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models import sampling_cpu
from models.decode_cpu import CPUCache, DecodeLayers
from models.graphs import Network, StepRunner
from models.model import Transformer
from models.noise import column_hashes
from models.paged_cache import PagedCache
from models.repetition import SeenTokens
from models.sampling import SamplingParams, sample
from models.scheduler import Prefill
from models.transfer import Download, to_device


class Start(NamedTuple):
    """What a row begins with."""

    slot: int
    key: int  # of its noise
    position: int  # of its first or its last token, which is not in the cache
    remaining: int  # tokens that it may still draw
    token: int = 0  # its last one


def advance(
    sample: Callable[..., tuple[Tensor, Tensor]],
    params: SamplingParams,
    tp: DeviceMesh | None,
    hashes: Tensor,
    stop_ids: Tensor,
    logits: Tensor,
    tokens: Tensor,
    positions: Tensor,
    keys: Tensor,
    remaining: Tensor,
    active: Tensor,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws from logits [n, V'] and moves the state of the rows [n] on: (tokens int64, logprobs fp32), [n] each."""
    drawn, logprobs = sample(logits, keys, positions + 1, hashes, params, tp, seen)
    going = active.clone()
    tokens.copy_(torch.where(going, drawn, tokens))
    positions.add_(going)
    remaining.sub_(going.long())
    stops = (drawn[:, None] == stop_ids).any(dim=-1)
    active.copy_(going & ~stops & (remaining > 0))
    return drawn, logprobs


class DecodeRows:
    """num_rows rows of up to max_seq_len tokens over a cache of num_pages pages, and the inference copy of a model.
    compile: torch.compile, and on a GPU steps as CUDA graphs. look_every: L."""

    def __init__(
        self,
        model: Transformer,
        params: SamplingParams,
        *,
        num_rows: int,
        num_pages: int,
        max_seq_len: int,
        look_every: int,
        compile: bool,
    ):
        self.model, self.params, self.look_every = model, params, look_every
        self.tp, device = model.parallel.tp, model.embed_tokens.weight.device
        self.device, self.num_rows, config = device, num_rows, model.config
        shape = {"num_rows": num_rows, "num_pages": num_pages, "max_seq_len": max_seq_len}
        self.network = Network(model, compile=compile)
        if device.type == "cpu" and not compile:  # all that exists for CPUs alone
            self.cache, self.draw = CPUCache(model, **shape), sampling_cpu.sample
            self.layers = DecodeLayers(model, num_rows, max_seq_len)
        else:
            self.cache, self.draw = PagedCache(model, **shape), sample
            self.layers = self.network
        # the state of the rows lives on the device, at fixed addresses
        zeros = partial(torch.zeros, num_rows, dtype=torch.int64, device=device)
        self.state = zeros(), zeros(), zeros(), zeros(), zeros(dtype=torch.bool)
        self.tokens, self.positions, self.keys, self.remaining, self.active = self.state
        self.drawn_tokens, self.drawn_logprobs = zeros(look_every), zeros(look_every, dtype=torch.float32)
        self.hashes = column_hashes(config.vocab_size, device)
        self.stop_ids = torch.tensor(params.stop_token_ids or (-1,), dtype=torch.int64, device=device)
        is_penalised = params.repetition_penalty != 1
        self.seen = SeenTokens(num_rows, config.vocab_size, device, self.tp) if is_penalised else None
        self.sample, self.advance = self.network.compiled(self.draw), self.network.compiled(advance)
        # what a step changes, and a row takes along
        self.all_state = [*self.state, *([self.seen.table] if is_penalised else [])]
        self.runner = StepRunner(self.step, num_rows, self.all_state) if compile and device.type == "cuda" else None

    def begin(self) -> None:
        """Before requests are served: the model may have other weights than before."""
        self.layers.take_weights()
        self.active.zero_()

    def forget_graphs(self) -> None:
        """Where the cache or the weights may have moved; steps are captured anew."""
        if self.runner is not None:
            self.runner.forget()

    # ------------------------------------------------------------------------------------ prefill

    def prefill(self, batch: Prefill) -> Tensor:
        """Computes the tokens of a batch, into the cache: their final hidden states [N, E]."""
        # positions first: what is compiled for them knows whether they stand at the beginning of their memory
        positions, ids = to_device(torch.tensor([batch.positions, batch.ids]), self.device)
        return self.network.hidden(ids[None], positions[None], self.cache.prefill(batch.chunks))[0]

    def logits(self, hidden: Tensor, places: list[int]) -> Tensor:
        """What follows the tokens at these places of hidden [N, E]: [len(places), V']"""
        return self.model.lm_head(hidden[to_device(torch.tensor(places), self.device)])

    def start(self, starts: Sequence[Start], logits: list[Tensor], copies: list[tuple[int, int]]) -> Download:
        """Rows for new samples: each draws its first token from its logits [V']. copies: pages (from, to) to be copied
        first. The tokens and their log-probs, [len(starts), 1] each."""
        if copies:
            self.cache.copy_pages(*to_device(torch.tensor(copies), self.device).unbind(1))
        slots, keys, positions, remaining, _ = to_device(torch.tensor(starts).T.contiguous(), self.device)
        seen = [] if self.seen is None else [self.seen.table[slots]]
        logits, keys, positions, *seen = self.network.any_number(0, torch.stack(logits), keys, positions, *seen)
        tokens, logprobs = self.sample(logits, keys, positions, self.hashes, self.params, self.tp, *seen)
        if self.seen is not None:
            self.seen.add(tokens, slots)
        going = ~(tokens[:, None] == self.stop_ids).any(dim=-1) & (remaining > 1)
        self._put(slots, tokens, positions, keys, remaining - 1, going)
        return Download(tokens[:, None], logprobs[:, None])

    def resume(self, starts: Sequence[Start]) -> None:
        """Rows for samples that are in the cache again and go on."""
        slots, keys, positions, remaining, tokens = to_device(torch.tensor(starts).T.contiguous(), self.device)
        self._put(slots, tokens, positions, keys, remaining, torch.ones_like(slots, dtype=torch.bool))

    def _put(self, slots: Tensor, *columns: Tensor) -> None:
        for buffer, column in zip(self.state, columns, strict=True):
            buffer.index_copy_(0, slots, column)

    def remember(self, slot: int, ids: list[int]) -> None:
        """What a row has seen, where the repetition penalty wants it."""
        if self.seen is not None:
            self.seen.begin(slot, ids)

    def clear(self, slots: Sequence[int]) -> None:
        """Rows that are nobody's."""
        slots = to_device(torch.tensor(slots), self.device)
        self.active.index_fill_(0, slots, False)
        self.positions.index_fill_(0, slots, 0)

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Rows that go on in others."""
        sources, targets = to_device(torch.tensor([sources, targets]), self.device)
        for buffer in self.all_state:
            buffer.index_copy_(0, targets, buffer[sources])

    # ------------------------------------------------------------------------------------- decode

    def size_for(self, num_rows: int) -> int:
        """How many rows a step computes where the first num_rows are in use."""
        return self.num_rows if self.runner is None else self.runner.size_for(num_rows)

    def look(self, size: int, table: Tensor) -> Download:
        """L steps of the first `size` rows, whose pages are in table int32 [size, pages in use]: the tokens and their
        log-probs, [size, L] each; rows that have ended repeat themselves."""
        self.cache.set_table(table)
        for i in range(self.look_every):
            tokens, logprobs = self.step(size, table.shape[1]) if self.runner is None else self.runner(size)
            self.drawn_tokens[:size, i], self.drawn_logprobs[:size, i] = tokens, logprobs
        return Download(self.drawn_tokens[:size], self.drawn_logprobs[:size])

    def step(self, size: int, most_pages: int | None = None) -> tuple[Tensor, Tensor]:
        """One token for each of the first rows. most_pages: as many as a row uses, for operations that read all of
        them; None for a step that is always the same."""
        tokens, positions, keys, remaining, active = (buffer[:size] for buffer in self.state)
        attend = self.cache.decode(positions, most_pages)
        hidden = self.layers(tokens, positions, attend)
        seen = [] if self.seen is None else [self.seen.table[:size]]
        inputs = self.model.lm_head(hidden), tokens, positions, keys, remaining, active, *seen
        inputs = self.network.any_number(0, *inputs)
        drawn, logprobs = self.advance(self.draw, self.params, self.tp, self.hashes, self.stop_ids, *inputs)
        if self.seen is not None:
            self.seen.add(drawn, self.seen.slots[:size])
        return drawn, logprobs
