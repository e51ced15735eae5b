"""The device's side of the generation engine: the rows' state, the KV cache, prefill and decode steps.

- a decode step computes a token and its log-prob for each row, and decides which rows have ended; an ended row repeats
  its last step, at the same position, until another sample takes it
- nothing here waits for a GPU: copies from the host are non-blocking, results for the host are a Download
- samples do not depend on row numbers: rows in use are moved to the front, and a step may compute only these

Dimensions: B rows, n of them in a step, V vocabulary, V' this rank's part of it, L decode steps per look of the host.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple
from weakref import WeakMethod

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
from models.transfer import Download, index_on, to_device


class Start(NamedTuple):
    """The initial state of a row."""

    slot: int
    key: int  # of its noise
    position: int  # of the next token to draw, or of `token`; not in the cache yet
    remaining: int  # tokens that it may still draw
    token: int  # the sample's last one, which the next step reads; start() draws another first


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
    """Draws from logits [n, V'] and updates the rows' state [n] in place: (tokens int64, logprobs fp32), [n] each."""
    drawn, logprobs = sample(logits, keys, positions + 1, hashes, params, tp, seen)
    going = active.clone()
    tokens.copy_(torch.where(going, drawn, tokens))
    positions.add_(going)
    remaining.sub_(going.long())
    stops = (drawn[:, None] == stop_ids).any(dim=-1)
    active.copy_(going & ~stops & (remaining > 0))
    return drawn, logprobs


class DecodeRows:
    """num_rows rows of up to max_seq_len tokens, a KV cache of num_pages pages, and the inference copy of a model.
    compile: torch.compile, and on a GPU CUDA graphs of steps. look_every: L."""

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
        if device.type == "cpu" and not compile:  # the implementations for CPUs
            self.cache, self.draw = CPUCache(model, **shape), sampling_cpu.sample
            self.layers = DecodeLayers(model, num_rows, max_seq_len)
        else:
            self.cache, self.draw = PagedCache(model, **shape), sample
            self.layers = self.network
        # the rows' state stays on the device, at fixed addresses
        zeros = partial(torch.zeros, num_rows, dtype=torch.int64, device=device)
        self.state = zeros(), zeros(), zeros(), zeros(), zeros(dtype=torch.bool)
        self.tokens, self.positions, self.keys, self.remaining, self.active = self.state
        self.drawn_tokens, self.drawn_logprobs = zeros(look_every), zeros(look_every, dtype=torch.float32)
        self.hashes = column_hashes(config.vocab_size, device)
        self.stop_ids = torch.tensor(params.stop_token_ids or (-1,), dtype=torch.int64, device=device)
        is_penalised = params.repetition_penalty != 1
        self.seen = SeenTokens(num_rows, config.vocab_size, device, self.tp) if is_penalised else None
        self.sample, self.advance = self.network.compiled(self.draw), self.network.compiled(advance)
        # the tensors that a step changes, and that are copied when a row moves
        self.all_state = [*self.state, *([self.seen.table] if is_penalised else [])]
        self.runner = None
        if compile and device.type == "cuda":
            # a weak reference: a dropped engine in a cycle would keep its memory until Python collects garbage
            step = WeakMethod(self.step)
            self.runner = StepRunner(lambda size: step()(size), num_rows, self.all_state)

    def begin(self) -> None:
        """Called before requests are served: rereads the model's weights, which may have changed."""
        self.layers.take_weights()
        self.active.zero_()

    # ------------------------------------------------------------------------------------ prefill

    def prefill(self, batch: Prefill) -> Tensor:
        """Computes the tokens of a batch and caches their keys and values; returns their final hidden states [N, E]."""
        # positions come first, at offset 0: code that is compiled for them depends on the storage offset
        positions, ids = to_device([batch.positions, batch.ids], self.device)
        return self.network.hidden(ids[None], positions[None], self.cache.prefill(batch.chunks))[0]

    def logits(self, hidden: Tensor, places: list[int]) -> Tensor:
        """Returns next-token logits at these indices of hidden [N, E]: [len(places), V']"""
        return self.model.lm_head(hidden[index_on(places, self.device)])

    def start(self, starts: Sequence[Start], logits: list[Tensor], copies: list[tuple[int, int]]) -> Download:
        """Starts rows for new samples: each draws its first token from its logits [V']. copies: pages (from, to) that
        are copied first. Returns the tokens and their log-probs, [len(starts), 1] each."""
        if copies:
            self.cache.copy_pages(*to_device(copies, self.device).unbind(1))
        slots, keys, positions, remaining, _ = to_device(list(zip(*starts)), self.device)
        seen = [] if self.seen is None else [self.seen.table[slots]]
        logits, keys, positions, *seen = self.network.any_number(0, torch.stack(logits), keys, positions, *seen)
        tokens, logprobs = self.sample(logits, keys, positions, self.hashes, self.params, self.tp, *seen)
        if self.seen is not None:
            self.seen.add(tokens, slots)
        going = ~(tokens[:, None] == self.stop_ids).any(dim=-1) & (remaining > 1)
        self._put(slots, tokens, positions, keys, remaining - 1, going)
        return Download(tokens[:, None], logprobs[:, None])

    def resume(self, starts: Sequence[Start]) -> None:
        """Starts rows for preempted samples that are in the cache again."""
        slots, keys, positions, remaining, tokens = to_device(list(zip(*starts)), self.device)
        self._put(slots, tokens, positions, keys, remaining, torch.ones_like(slots, dtype=torch.bool))

    def _put(self, slots: Tensor, *columns: Tensor) -> None:
        for buffer, column in zip(self.state, columns, strict=True):
            buffer.index_copy_(0, slots, column)

    def remember(self, slot: int, ids: list[int]) -> None:
        """Records the tokens that a row has seen, if there is a repetition penalty."""
        if self.seen is not None:
            self.seen.begin(slot, ids)

    def clear(self, slots: Sequence[int]) -> None:
        """Deactivates rows that belong to no sample."""
        slots = index_on(slots, self.device)
        self.active.index_fill_(0, slots, False)
        self.positions.index_fill_(0, slots, 0)

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copies the state of rows `sources` to rows `targets`."""
        sources, targets = to_device([sources, targets], self.device)
        for buffer in self.all_state:
            buffer.index_copy_(0, targets, buffer[sources])

    # ------------------------------------------------------------------------------------- decode

    @property
    def capture_seconds(self) -> float:
        return 0.0 if self.runner is None else self.runner.seconds

    def size_for(self, num_rows: int) -> int:
        """Returns the number of rows that a step computes if the first num_rows are in use."""
        return self.num_rows if self.runner is None else self.runner.size_for(num_rows)

    def look(self, size: int, table: Tensor) -> Download:
        """Runs L steps of the first `size` rows, whose pages are in table int32 [size, pages in use]. Returns tokens
        and log-probs, [size, L] each; ended rows repeat themselves."""
        self.cache.set_table(table)
        for i in range(self.look_every):
            tokens, logprobs = self.step(size, table.shape[1]) if self.runner is None else self.runner(size)
            self.drawn_tokens[:size, i], self.drawn_logprobs[:size, i] = tokens, logprobs
        return Download(self.drawn_tokens[:size], self.drawn_logprobs[:size])

    def step(self, size: int, most_pages: int | None = None) -> tuple[Tensor, Tensor]:
        """Computes one token for each of the first `size` rows. most_pages: the largest number of pages of a row, for
        operations that read as many for every row; None for a step with fixed shapes, which can be captured."""
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
