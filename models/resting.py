"""Releases the KV cache, and the weights, of an engine while its answers are scored and its model trains."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from models.decode import InferenceLinear
from models.generation import Engine


def _weights(engine: Engine) -> list[Tensor]:
    """The tensors that models.decode.refresh writes, without those that oneDNN has packed."""
    linears = (module for module in engine.model.modules() if isinstance(module, InferenceLinear))
    return [*engine.model.parameters(), *(buffer for linear in linears for buffer in linear.buffers())]


@contextmanager
def resting(engine: Engine, level: int) -> Iterator[None]:
    """Within the context, the engine keeps all memory (level 0), or releases its cache (1), or cache and weights (2).
    Like vLLM's sleep mode, but the weights need not go to the host, since a refresh must follow, which writes them all.
    Tensors stay the same objects; their addresses may change, so CUDA graphs are captured again."""
    tensors = [*engine.rows.cache.tensors()] * (level >= 1) + (_weights(engine) if level >= 2 else [])
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    sizes = [(storage, storage.nbytes()) for storage in storages.values()]
    if level:
        engine.pool.forget()
        if engine.rows.runner is not None:
            engine.rows.runner.forget()
    for storage, _ in sizes:
        storage.resize_(0)
    yield
    # not after an error, which ends the run: without room for the cache, another error would take its place
    for storage, size in sizes:
        storage.resize_(size)
    for tensor in engine.rows.cache.tensors() if level else ():
        tensor.zero_()  # as in a new Cache
