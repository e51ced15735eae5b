"""Memory of an engine that is given back while the model trains whose answers it draws."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from models.decode import InferenceLinear
from models.generation import Engine


def _weights(engine: Engine) -> list[Tensor]:
    """What models.decode.refresh writes, less what oneDNN has packed."""
    linears = (module for module in engine.model.modules() if isinstance(module, InferenceLinear))
    return [*engine.model.parameters(), *(buffer for linear in linears for buffer in linear.buffers())]


@contextmanager
def resting(engine: Engine, level: int) -> Iterator[None]:
    """While it lasts, the engine holds all it has (level 0), not its cache (1), or neither cache nor weights (2). As
    vLLM's sleep mode, but that the weights need not go to the host, since a refresh must follow, which writes them all.
    Tensors stay the same objects; their addresses may change, so CUDA graphs are captured again."""
    tensors = [*engine.rows.cache.tensors()] * (level >= 1) + (_weights(engine) if level >= 2 else [])
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    sizes = [(storage, storage.nbytes()) for storage in storages.values()]
    if level:
        engine.pool.forget()
        engine.rows.forget_graphs()
    for storage, _ in sizes:
        storage.resize_(0)
    try:
        yield
    finally:
        for storage, size in sizes:
            storage.resize_(size)
        for tensor in engine.rows.cache.tensors() if level else ():
            tensor.zero_()  # a place that is masked still counts with weight 0, and 0 * NaN is NaN
