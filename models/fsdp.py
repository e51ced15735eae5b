"""The device mesh and fully sharded training (FSDP2), on top of tensor parallelism.

- world = dp x tp, tp ranks adjacent; one process without torchrun is the same code on a mesh of 1 x 1
- hybrid sharding: dp = dp_replicate x dp_shard, and only dp_shard adjacent ranks (a node, say) share the parameters
- every parameter of a trained model is a DTensor on the whole mesh: cut over tp where models/tp.py says so, then by
  rows over dp (or dp_shard); norms are whole over tp
- weights are stored in fp32, or in bf16 for an optimizer that rounds stochastically, and gathered in the compute dtype;
  gradients are reduced in fp32 and then take the weights' dtype

Order: build on meta -> tensor-parallel -> activation checkpointing -> compile each block -> fully_shard ->
materialise -> buffers -> load.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from models.checkpoint import WeightFiles, load_weights, refuse_quantized
from models.model import ModelConfig, Transformer
from models.qlinear import Scheme
from models.quantize import load_quantized
from models.tp import Parallel, chunk_range, shard_dim, tensor_parallel_part

# DTensor says at every norm and export that two mesh dimensions take two collectives; they are meant to.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

# There is no other way yet to look up the flattened "dp" of a mesh by its name (torch 2.11 to 2.13).
warnings.filterwarnings("ignore", message="Slicing a flattened dim from root mesh")

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # the default of 10 is short for loading and saving large models on a slow disk


def data_parallel_size(tensor_parallel_size: int, dp_replicate: int = 1) -> int:
    """Ranks that share the data, from torchrun's environment. Raises ValueError if tp does not divide the ranks, or
    dp_replicate what is left."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world % tensor_parallel_size:
        raise ValueError(f"--tensor_parallel_size {tensor_parallel_size} does not divide the {world} ranks of this run")
    dp_size = world // tensor_parallel_size
    if dp_size % dp_replicate:
        raise ValueError(f"--dp_replicate {dp_replicate} does not divide the {dp_size} data-parallel ranks of this run")
    return dp_size


def init_mesh(device: torch.device, tensor_parallel_size: int, dp_replicate: int = 1) -> DeviceMesh:
    """Starts torch.distributed, from torchrun's environment or as a single process, and returns the ("dp", "tp") mesh;
    with dp_replicate > 1 it is ("dp_replicate", "dp_shard", "tp"), and mesh["dp"] are the ranks of the first two.
    Raises ValueError if the sizes do not divide the ranks."""
    dp_size = data_parallel_size(tensor_parallel_size, dp_replicate)
    if not dist.is_initialized():
        # gloo beside nccl: parameters in the CPU's memory have their norm there, and checkpoints exchange their plans
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dp_replicate == 1:
        return init_device_mesh(device.type, (dp_size, tensor_parallel_size), mesh_dim_names=("dp", "tp"))
    shape = (dp_replicate, dp_size // dp_replicate, tensor_parallel_size)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    mesh["dp_replicate", "dp_shard"]._flatten("dp")
    return mesh


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


def _is_hybrid(mesh: DeviceMesh) -> bool:
    return "dp_shard" in mesh.mesh_dim_names


def sharded_part(name: str, shape: tuple[int, ...], mesh: DeviceMesh) -> tuple[slice, ...]:
    """The part of the whole parameter `name` that this rank holds: a chunk over tp, and of that the rows of its dp (or
    dp_shard) rank."""
    first, *rest = tensor_parallel_part(name, shape, mesh["tp"])
    shard = mesh["dp_shard" if _is_hybrid(mesh) else "dp"]
    start, end = chunk_range(first.stop - first.start, shard.get_local_rank(), shard.size())
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
    cpu_offload: bool = False,
    head: str = "lm",
    new_score: Tensor | None = None,
) -> Transformer:
    """The model of a Hugging Face folder, sharded over the mesh, each rank having read only its part.

    head: "lm" or "score"; new_score: see load_weights, alike on all ranks. cpu_offload: parameters and gradients live
    in the CPU's memory, and so does the state of an optimizer over them, which steps there; the device holds what it
    is computing with. Raises ValueError where the device is the CPU."""
    if cpu_offload and device.type == "cpu":
        raise ValueError("--cpu_offload moves parameters out of a GPU's memory, and this run is on the CPU")
    config = ModelConfig.from_hf(folder)
    refuse_quantized(folder)
    files = WeightFiles(folder)
    with torch.device("meta"):
        model = Transformer(config, compute_dtype, parallel_of(mesh, sequence_parallel), head)
    dtypes = {"compute_dtype": compute_dtype, "param_dtype": param_dtype}
    shard_model(model, mesh, **dtypes, recompute=recompute, compile=compile, cpu_offload=cpu_offload)
    model.to_empty(device="cpu" if cpu_offload else device)
    load_weights(model, files, device=device, part_of=partial(sharded_part, mesh=mesh), new_score=new_score)
    return model


def load_frozen(
    folder: str | Path,
    mesh: DeviceMesh,
    scheme: Scheme | None,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    compile: bool = False,
    head: str = "lm",
    **sharding,
) -> Transformer:
    """A model of a folder beside one in training, without gradients: sharded like that one, or with quantised weights,
    which are plain tensors, cut over tp and the same on all dp ranks. sharding: more arguments of load_for_training,
    for the former."""
    options = {"device": device, "head": head}
    if scheme is None:
        options |= {"compute_dtype": compute_dtype, "compile": compile, **sharding}
        return load_for_training(folder, mesh, **options).requires_grad_(False)
    model = load_quantized(folder, scheme, dtype=compute_dtype, tp=parallel_of(mesh).tp, **options)
    for block in model.layers if compile else ():
        block.compile()
    return model


def shard_model(
    model: Transformer,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    param_dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    compile: bool = False,
    cpu_offload: bool = False,
) -> None:
    """Makes a model built on meta ready for training on the mesh, in place; its values are still to be loaded.

    param_dtype: of the stored weights, norms included, since FSDP2 wants one dtype in a group. Gradients arrive in it.
    """
    _to_dtensors(model, mesh["tp"], param_dtype)
    for block in model.layers:
        block.recompute = recompute
        if compile and recompute == "full":  # torch 2.13 cannot compile a checkpoint of DTensors' local parts
            block._forward = torch.compile(block._forward)
        elif compile:
            block.compile()
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32 if mesh["dp"].size() > 1 else None,  # one rank reduces nothing: the cast can wait
        cast_forward_inputs=False,  # the RoPE tables stay fp32
    )
    options = {
        "mesh": mesh["dp_replicate", "dp_shard"] if _is_hybrid(mesh) else mesh["dp"],
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy(),
    }
    for block in model.layers:
        fully_shard(block, **options)
    if hasattr(model, "score"):  # a scalar head computes in fp32
        fully_shard(model.score, **{**options, "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)})
    fully_shard(model, **options, reshard_after_forward=False)


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
        device = parameter.device_mesh.device_type  # an offloaded shard is gathered by the GPUs, not by the CPUs
        yield name, parameter.detach().to(device).full_tensor()


def reducing_gradients(model: nn.Module, micro_batches: Iterable[T], *, every: bool) -> Iterator[T]:
    """Yields the micro-batches of an optimizer step and sets what the backward of each one does with its gradients.

    every: they are summed over the dp ranks and sharded each time, so that a rank never holds more than its shard (of
    hybrid sharding the sum over the replicas, across nodes, waits for the last). Otherwise they stay whole and are
    communicated once, with the last micro-batch: 4 bytes per parameter of the tp rank, 28 GB / tp at 7B.
    """
    set_sync = model.set_requires_all_reduce if every else model.set_requires_gradient_sync
    remaining = iter(micro_batches)
    current = next(remaining)
    for following in remaining:
        set_sync(False)
        yield current
        current = following
    set_sync(True)
    yield current


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
