"""The device mesh and fully sharded training (FSDP2), on top of tensor parallelism.

- world = dp x tp, tp ranks adjacent; one process without torchrun is the same code on a mesh of 1 x 1
- every parameter of a trained model is a DTensor on the whole mesh: cut over tp where models/tp.py says so, then by
  rows over dp; norms are whole over tp
- weights are stored in fp32, or in bf16 for an optimizer that rounds stochastically, and gathered in the compute dtype;
  gradients are reduced in fp32 and then take the weights' dtype

Order: build on meta -> tensor-parallel -> activation checkpointing -> compile each block -> fully_shard ->
materialise -> buffers -> load.
"""

import logging
import os
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from models.checkpoint import WeightFiles, load_weights
from models.model import ModelConfig, Parallel, Transformer
from models.tp import chunk_range, shard_dim, tensor_parallel_part

# DTensor says at every norm and export that two mesh dimensions take two collectives; they are meant to.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

TIMEOUT = timedelta(minutes=30)  # the default of 10 is short for loading and saving large models on a slow disk


def data_parallel_size(tensor_parallel_size: int) -> int:
    """Ranks that share the data, from torchrun's environment. Raises ValueError if tp does not divide the ranks."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world % tensor_parallel_size:
        raise ValueError(f"--tensor_parallel_size {tensor_parallel_size} does not divide the {world} ranks of this run")
    return world // tensor_parallel_size


def init_mesh(device: torch.device, tensor_parallel_size: int) -> DeviceMesh:
    """Starts torch.distributed, from torchrun's environment or as a single process, and returns the ("dp", "tp") mesh.
    Raises ValueError if tp does not divide the ranks."""
    shape = (data_parallel_size(tensor_parallel_size), tensor_parallel_size)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, shape, mesh_dim_names=("dp", "tp"))


def check_divisible(config: ModelConfig, tensor_parallel_size: int) -> None:
    """Raises ValueError, naming the key, if the model cannot be cut into so many ranks."""
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, key) % tensor_parallel_size:
            raise ValueError(
                f"--tensor_parallel_size {tensor_parallel_size} does not divide {key} = {getattr(config, key)}"
            )


def parallel_of(mesh: DeviceMesh, sequence_parallel: bool = False) -> Parallel:
    """What the layers need to know of a mesh."""
    split = mesh["tp"].size() > 1
    return Parallel(mesh["tp"] if split else None, sequence_parallel and split)


def sharded_part(name: str, shape: tuple[int, ...], mesh: DeviceMesh) -> tuple[slice, ...]:
    """The part of the whole parameter `name` that this rank holds: a chunk over tp, and of that the rows of its dp
    rank."""
    first, *rest = tensor_parallel_part(name, shape, mesh["tp"])
    start, end = chunk_range(first.stop - first.start, mesh["dp"].get_local_rank(), mesh["dp"].size())
    return (slice(first.start + start, first.start + end), *rest)


def load_for_training(
    folder: str | Path,
    mesh: DeviceMesh,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    param_dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    recompute: str = "none",
    compile: bool = False,
    head: str = "lm",
    new_score: Tensor | None = None,
) -> Transformer:
    """The model of a Hugging Face folder, sharded over the mesh, each rank having read only its part.

    head: "lm" or "score"; new_score: see load_weights, alike on all ranks."""
    config, files = ModelConfig.from_hf(folder), WeightFiles(folder)
    with torch.device("meta"):
        model = Transformer(config, compute_dtype, parallel_of(mesh, sequence_parallel), head)
    dtypes = {"compute_dtype": compute_dtype, "param_dtype": param_dtype}
    shard_model(model, mesh, **dtypes, recompute=recompute, compile=compile)
    model.to_empty(device=device)
    load_weights(model, files, device=device, part_of=partial(sharded_part, mesh=mesh), new_score=new_score)
    return model


def shard_model(
    model: Transformer,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    param_dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    compile: bool = False,
) -> None:
    """Makes a model built on meta ready for training on the mesh, in place; its values are still to be loaded.

    param_dtype: of the stored weights, norms included, since FSDP2 wants one dtype in a group. Gradients arrive in it.
    """
    _to_dtensors(model, mesh["tp"], param_dtype)
    for block in model.layers:
        block.recompute = recompute
        if compile:
            block.compile()
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32 if mesh["dp"].size() > 1 else None,  # one rank reduces nothing: the cast can wait
        cast_forward_inputs=False,  # the RoPE tables stay fp32
    )
    for block in model.layers:
        fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
    if hasattr(model, "score"):  # a scalar head computes in fp32
        fully_shard(model.score, mesh=mesh["dp"], mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy, reshard_after_forward=False)


def _to_dtensors(model: nn.Module, tp: DeviceMesh, dtype: torch.dtype) -> None:
    """Replaces each parameter by this rank's part as a DTensor of that dtype (a scalar head's is fp32); tied parameters
    stay tied."""
    replaced: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in replaced:
                name = f"{prefix}.{attribute}"
                shape, dim = tuple(parameter.shape), shard_dim(name)
                part = parameter[tensor_parallel_part(name, shape, tp)]
                placement = Replicate() if dim is None else Shard(dim)
                whole = DTensor.from_local(
                    part.detach().to(torch.float32 if name == "score.weight" else dtype).contiguous(),
                    tp,
                    [placement],
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
                replaced[id(parameter)] = nn.Parameter(whole)
            setattr(module, attribute, replaced[id(parameter)])


def full_tensors(model: nn.Module):
    """(name, whole tensor) of each parameter, gathered one at a time; a collective on all ranks."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().full_tensor()


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Clips the gradients to a global norm over all ranks and returns the norm before, a plain scalar tensor."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if all(p.grad.dtype == torch.float32 for p in parameters):
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    else:  # torch would round the norm of bf16 gradients to bf16, three digits
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
