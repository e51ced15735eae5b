"""How the engine's step runs on a GPU: compiled block by block, and captured whole.

- torch.compile sees one block's two halves, before and after attention, as functions of the block, and sampling: all
  layers share the code, and so do all numbers of tokens, since a decode step's rows stand where a prompt's tokens do.
  So what is compiled does not grow with layers, lengths or batch sizes (one token alone is its own case). What a block
  adds to the residual stream last is added in the next one's first half, where it takes no kernel of its own
- a whole step, sampling included, is captured as a CUDA graph by hand (HIP's on AMD), for a few numbers of rows; the
  smallest that holds the rows in use is replayed. Attention is Triton's kernel, whose grid is fixed for a graph: rows
  end where their own lengths say
"""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from models.attention import Attend
from models.model import Block, RMSNorm, Transformer
from models.rope import rope_tables

# fp32 is asked for where it is wanted, and how a reduction is cut is the compiler's affair
warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores|\nOnline softmax is disabled")


def first_half(
    block: Block, x: Tensor, update: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The residual stream with what the block before adds to it, and what attention takes of it."""
    x = x + update
    return x, block.before_attention(x, cos, sin)


def last_norm(norm: RMSNorm, x: Tensor, update: Tensor) -> Tensor:
    """The final hidden states."""
    return norm(x + update)


class Network:
    """The hidden states of tokens, and functions of rows of them, compiled or as they are."""

    def __init__(self, model: Transformer, *, compile: bool):
        self.model, self.compile = model, compile
        self.tables, self.norm = self.compiled(rope_tables), self.compiled(last_norm)
        self.before, self.after = self.compiled(first_half), self.compiled(Block.before_last_sum)

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function) if self.compile else function

    def any_number(self, dim: int, *tensors: Tensor) -> list[Tensor]:
        """Tensors whose size in a dimension differs from call to call; what is compiled serves all sizes but 1."""
        for tensor in tensors if self.compile else ():
            if tensor.shape[dim] != 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return list(tensors)

    def take_weights(self) -> None:
        """Before steps, whose weights may be others than before; none are kept here."""

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The hidden states of one new token for each row: tokens, positions int64 [B] -> [B, E]."""
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
            attended = attend(layer, *inputs).contiguous()  # code is for one order of dimensions
            x, update = self.after(block, *self.any_number(1, x, attended))
        return self.norm(model.norm, *self.any_number(1, x, update))


def graph_sizes(num_rows: int) -> list[int]:
    """The numbers of rows that steps are captured for: powers of two, from 32 on also what lies midway, and all."""
    powers = [2**i for i in range(num_rows.bit_length())]
    return sorted({*(n for p in powers for n in (p, p + p // 2 if p >= 32 else p) if n < num_rows), num_rows})


class CudaGraph:
    """A function whose kernels were recorded once, and are launched together from then on. Its tensors keep their
    addresses; outputs are written over at the next replay of any graph of the pool."""

    def __init__(self, function: Callable[[], object], pool: object):
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog thread asks for events meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = function()

    def replay(self) -> object:
        self.graph.replay()
        return self.outputs

    @staticmethod
    def make_pool() -> object:
        """Memory that graphs share, of which one runs at a time."""
        return torch.cuda.graph_pool_handle()

    @staticmethod
    def warm_up(function: Callable[[], object]) -> None:
        """Runs it beside the stream in use, as capturing asks for: compiles kernels, and takes workspaces."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)


class StepRunner:
    """Runs step(n), which computes the first n rows and reads nothing on the host, as graphs of a few sizes, which are
    captured when they are first asked for. state: the tensors that a step changes and that say what the next one is;
    capturing leaves them as they were. seconds: spent on that so far."""

    def __init__(
        self, step: Callable[[int], object], num_rows: int, state: Sequence[Tensor], graph: type[CudaGraph] = CudaGraph
    ):
        self.step, self.sizes, self.state = step, graph_sizes(num_rows), list(state)
        self.graph, self.pool, self.graphs, self.seconds = graph, None, {}, 0.0

    def size_for(self, num_rows: int) -> int:
        return next(size for size in self.sizes if size >= num_rows)

    def prepare(self, size: int) -> None:
        """Captures the step of one of the sizes."""
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
        """For tensors that are elsewhere from here on: graphs hold addresses."""
        self.pool, self.graphs = None, {}

    def __call__(self, size: int) -> object:
        """What step(size) returns, until the next call."""
        if size not in self.graphs:
            self.prepare(size)
        return self.graphs[size].replay()
