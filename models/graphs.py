"""How the engine's decode step runs on a GPU: compiled block by block, and captured as a whole.

- torch.compile compiles sampling and the two halves of a block, before and after attention, as functions of the block.
  All layers share the code, and so do all numbers of tokens: rows of a decode step take the place of a prompt's tokens.
  So compiled code does not grow with layers, lengths or batch sizes (a single token is a case of its own). A block's
  last update of the residual stream is added in the next block's first half, where it needs no kernel of its own
- a whole step, sampling included, is captured by hand as a CUDA graph (HIP's on AMD), for a few numbers of rows; the
  smallest graph that holds the rows in use is replayed. Attention is a Triton kernel with a fixed grid, in which each
  row stops at its own length
"""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from models.attention import Attend
from models.model import Block, RMSNorm, Transformer
from models.rope import rope_tables

# fp32 precision is intended where it is used, and how a reduction is split does not matter to the user
warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores|\nOnline softmax is disabled")


def first_half(
    block: Block, x: Tensor, update: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Adds the previous block's update to the residual stream; returns the stream, and attention's inputs (q, k, v)."""
    x = x + update
    return x, block.before_attention(x, cos, sin)


def last_norm(norm: RMSNorm, x: Tensor, update: Tensor) -> Tensor:
    """Returns the final hidden states."""
    return norm(x + update)


class Network:
    """Computes hidden states of tokens, compiled or eagerly."""

    def __init__(self, model: Transformer, *, compile: bool):
        self.model, self.compile = model, compile
        self.tables, self.norm = self.compiled(rope_tables), self.compiled(last_norm)
        self.before, self.after = self.compiled(first_half), self.compiled(Block.before_last_sum)

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function) if self.compile else function

    def any_number(self, dim: int, *tensors: Tensor) -> list[Tensor]:
        """Marks a dimension of tensors as dynamic, so that one compiled version serves all sizes but 1."""
        for tensor in tensors if self.compile else ():
            if tensor.shape[dim] != 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return list(tensors)

    def take_weights(self) -> None:
        """Called before steps, since weights may have changed; does nothing, since none are cached here."""

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Computes hidden states of one new token for each row: tokens, positions int64 [B] -> [B, E]."""
        return self.hidden(tokens[None], positions[None], attend)[0]

    def hidden(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Transformer.forward of packed tokens: input_ids, position_ids [1, N] -> [1, N, E]."""
        model = self.model
        if not self.compile:
            return model(input_ids, position_ids, attend)
        positions = self.any_number(1, position_ids)
        tables = self.any_number(1, *self.tables(*positions, model.inv_freq, model.config.attention_factor))
        x = model.embed_tokens(input_ids).to(dtype=model.compute_dtype)
        update = torch.zeros_like(x)
        for layer, block in enumerate(model.layers):
            x, inputs = self.before(block, *self.any_number(1, x, update), *tables)
            attended = attend(layer, *inputs).contiguous()  # other strides would be compiled anew
            x, update = self.after(block, *self.any_number(1, x, attended))
        return self.norm(model.norm, *self.any_number(1, x, update))


def graph_sizes(num_rows: int) -> list[int]:
    """Returns the numbers of rows that steps are captured for: powers of 2, 1.5 x those from 32 on, and num_rows."""
    powers = [2**i for i in range(num_rows.bit_length())]
    return sorted({*(n for p in powers for n in (p, p + p // 2 if p >= 32 else p) if n < num_rows), num_rows})


@cache
def side_stream(device: int) -> torch.cuda.Stream:
    """Returns a GPU's stream for warm-ups and captures. One for all, since torch never frees the workspace that its
    library for products has on a stream (33 MB on Hopper, 200 MB on AMD): with new streams, up to 32 of them."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """A captured function, whose kernels replay() launches together. Its tensors must keep their addresses; the next
    replay of any graph of the pool overwrites the outputs."""

    def __init__(self, function: Callable[[], object], pool: object):
        self.graph = torch.cuda.CUDAGraph()
        stream = side_stream(torch.cuda.current_device())
        # thread_local: NCCL's watchdog thread queries events during the capture
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.outputs = function()

    def replay(self) -> object:
        self.graph.replay()
        return self.outputs

    @staticmethod
    def make_pool() -> object:
        """Returns a memory pool for graphs of which only one runs at a time."""
        return torch.cuda.graph_pool_handle()

    @staticmethod
    def warm_up(function: Callable[[], object]) -> None:
        """Runs a function on a side stream, as capturing requires: compiles kernels and allocates workspaces."""
        stream = side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)


class StepRunner:
    """Runs step(n), which computes the first n rows without a host sync, as CUDA graphs of a few sizes, captured on
    first use. state: the tensors that a step changes and the next one reads; capturing restores them. seconds: spent on
    capturing so far."""

    def __init__(
        self, step: Callable[[int], object], num_rows: int, state: Sequence[Tensor], graph: type[CudaGraph] = CudaGraph
    ):
        self.step, self.sizes, self.state = step, graph_sizes(num_rows), list(state)
        self.graph, self.pool, self.graphs, self.seconds = graph, None, {}, 0.0

    def size_for(self, num_rows: int) -> int:
        return next(size for size in self.sizes if size >= num_rows)

    def prepare(self, size: int) -> None:
        """Captures the step for one of the sizes."""
        start = time.perf_counter()
        if self.pool is None:
            self.pool = self.graph.make_pool()
        function = partial(self.step, size)
        before = [tensor.clone() for tensor in self.state]
        self.graph.warm_up(function)
        for tensor, old in zip(self.state, before):
            tensor.copy_(old)
        self.graphs[size] = self.graph(function, self.pool)
        self.seconds += time.perf_counter() - start

    def forget(self) -> None:
        """Drops all graphs, which hold addresses, because tensors move in memory."""
        self.pool, self.graphs = None, {}

    def __call__(self, size: int) -> object:
        """Returns the outputs of step(size), which the next call overwrites."""
        if size not in self.graphs:
            self.prepare(size)
        return self.graphs[size].replay()
