"""The device mesh and fully sharded training (FSDP2), on top of tensor parallelism.

- world = dp x tp, tp ranks adjacent; one process without torchrun runs the same code on a 1 x 1 mesh
- hybrid sharding: dp = dp_replicate x dp_shard; parameters are sharded only over dp_shard adjacent ranks (e.g. a node)
- every parameter of a trained model is a DTensor: sharded over tp as models/tp.py says, then by rows over dp (or
  dp_shard); norms are replicated over tp. With one tp rank its mesh is dp alone, and the model computes on plain
  tensors: DTensor's overhead would take a third of the host's time in a small backward
- weights are stored in fp32, or in bf16 for an optimizer that rounds stochastically, and gathered in the compute dtype;
  gradients are reduced in fp32 and then cast to the weights' dtype

Order: build on meta -> tensor parallelism -> activation checkpointing -> compile each block -> fully_shard ->
materialise -> load the weights -> buffers.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from models.checkpoint import WeightFiles, fill_parameters, model_config, refuse_quantized
from models.checksums import check_weights
from models.common import DTYPES, Runtime, at_least_one, flag, is_main_rank, short_bar
from models.limits import num_cores
from models.lora import Lora, LoraLinear, add_adapters
from models.model import Block, Transformer
from models.qlinear import Schemes
from models.quantize import load_quantized, quantized_part
from models.shared_base import OnSharedBase
from models.sharing import agreed_name, begin_waiting
from models.tp import Parallel, TensorParallelArgs, local, own_chunk, shard_dim, tensor_parallel_part, whole

# DTensor warns at every norm and export that two mesh dimensions take two collectives, as intended.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

# There is no other way yet to look up a mesh's flattened "dp" by name (torch 2.11 to 2.13).
warnings.filterwarnings("ignore", message="Slicing a flattened dim from root mesh")

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # 10, the default, is too short for loading and saving large models on a slow disk


@dataclass(frozen=True, kw_only=True)
class ParallelArgs(TensorParallelArgs):
    """Parallelism, micro-batches and memory."""

    micro_batch_size: int | None = flag(
        None,
        bounds=at_least_one,
        help="rows per forward on one rank; default: all of its rows of a step",
        may_change=True,
    )
    max_tokens_per_micro_batch: int | None = flag(
        None,
        bounds=at_least_one,
        help="in place of --micro_batch_size: most tokens per forward on one rank; rows are packed end to end without "
        "attending to each other, and a longer row is alone; default: off",
        may_change=True,
    )
    dp_replicate: int = flag(
        1,
        bounds=at_least_one,
        help="hybrid sharding: copies of the model, each sharded over its own ranks; usually the number of nodes",
        may_change=True,
    )
    sequence_parallel: bool = flag(
        False,
        help="with tensor parallelism: shard activations by tokens between the parallel layers, which saves memory",
        may_change=True,
    )
    activation_checkpointing: str = flag(
        "none",
        choices=("none", "full", "selective"),
        help="what the backward recomputes: nothing, whole blocks, or all but matrix products and attention",
        may_change=True,
    )
    sync_every_micro_batch: bool = flag(
        True,
        help="reduce the gradients over the ranks after each micro-batch; --no-sync_every_micro_batch: after the last, "
        "with less communication, but every rank holds whole gradients",
        may_change=True,
    )
    cpu_offload: bool = flag(
        False,
        help="on GPUs: keep weights, gradients and optimizer state in CPU memory, and run the optimizer step there; "
        "the frozen models and the inference copy of PPO and GRPO stay on the GPU",
        may_change=True,
    )
    param_dtype: str = flag(
        "float32",
        choices=("float32", "bfloat16"),
        help="dtype of the stored weights and gradients; bfloat16 weights get fp32 updates, rounded stochastically "
        "(bytes per parameter, with its gradient and AdamW's moments: 16 or 12, with adamw_8bit 10 or 6)",
    )

    def ranks(self) -> str:
        """Describes the layout of the ranks, for a script's output."""
        replicas = f" ({self.dp_replicate} replicas)" if self.dp_replicate > 1 else ""
        idle = self.sequence_parallel and self.tensor_parallel_size == 1
        note = "; --sequence_parallel has no effect" * idle
        return f"dp {data_parallel_size(self.tensor_parallel_size)}{replicas} x tp {self.tensor_parallel_size}{note}"


def split_batch(args: ParallelArgs, batch_size: int, name: str = "--batch_size") -> tuple[int, int]:
    """Returns (data-parallel ranks, rows per forward on one rank; ignored if --max_tokens_per_micro_batch is given).
    Raises ValueError for sizes that do not fit together. name: the flag that batch_size comes from."""
    dp_size = data_parallel_size(args.tensor_parallel_size, args.dp_replicate)
    if batch_size % dp_size:
        raise ValueError(f"{name} {batch_size} does not divide over {dp_size} data-parallel ranks")
    if args.micro_batch_size is not None and args.max_tokens_per_micro_batch is not None:
        raise ValueError("--max_tokens_per_micro_batch replaces --micro_batch_size; give only one of them")
    micro_batch_size = args.micro_batch_size or batch_size // dp_size
    if micro_batch_size * dp_size > batch_size:
        ranks = "" if dp_size == 1 else f" over {dp_size} data-parallel ranks"
        raise ValueError(f"--micro_batch_size {micro_batch_size}{ranks} is larger than {name} {batch_size}")
    return dp_size, micro_batch_size


def data_parallel_size(tensor_parallel_size: int, dp_replicate: int = 1) -> int:
    """Returns the number of data-parallel ranks in torchrun's world. Raises ValueError if sizes do not divide it."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not world.isdecimal():
        raise ValueError(
            f"the environment has WORLD_SIZE {world!r}, which is no number; torchrun sets it; for one rank unset it"
        )
    world = int(world)
    if world % tensor_parallel_size:
        raise ValueError(f"--tensor_parallel_size {tensor_parallel_size} does not divide the {world} ranks of this run")
    dp_size = world // tensor_parallel_size
    if dp_size % dp_replicate:
        raise ValueError(f"--dp_replicate {dp_replicate} does not divide the {dp_size} data-parallel ranks of this run")
    return dp_size


def start_ranks(device: torch.device) -> None:
    """Starts torch.distributed, from torchrun's environment or as a single process, unless it has started."""
    if dist.is_initialized():
        return
    # gloo beside nccl: for gradient norms of parameters offloaded to the CPU, and to exchange checkpoint plans
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    world = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ:
        for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(f"the environment has RANK but no {name}; torchrun sets both; for one rank unset RANK")
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        store.set_timeout(TIMEOUT)
        store = dist.PrefixStore(agreed_name(store, rank, size, TIMEOUT), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        begin_waiting()
    elif world != "1":
        raise ValueError(
            f"the environment has WORLD_SIZE {world} but no RANK; torchrun sets both; for one rank unset WORLD_SIZE"
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def init_mesh(device: torch.device, tensor_parallel_size: int, dp_replicate: int = 1) -> DeviceMesh:
    """Starts torch.distributed if needed and returns the ("dp", "tp") mesh, or with dp_replicate > 1 the mesh
    ("dp_replicate", "dp_shard", "tp"), whose first two dimensions are flattened as mesh["dp"]. Raises ValueError if the
    sizes do not divide the ranks."""
    dp_size = data_parallel_size(tensor_parallel_size, dp_replicate)
    start_ranks(device)
    if dp_replicate == 1:
        return init_device_mesh(device.type, (dp_size, tensor_parallel_size), mesh_dim_names=("dp", "tp"))
    shape = (dp_replicate, dp_size // dp_replicate, tensor_parallel_size)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    mesh["dp_replicate", "dp_shard"]._flatten("dp")
    return mesh


def parallel_of(mesh: DeviceMesh, sequence_parallel: bool = False) -> Parallel:
    """Returns a mesh's tensor parallelism in the form that the layers take."""
    split = mesh["tp"].size() > 1
    return Parallel(mesh["tp"] if split else None, sequence_parallel and split)


def _is_hybrid(mesh: DeviceMesh) -> bool:
    return "dp_shard" in mesh.mesh_dim_names


def sharding_meshes(mesh: DeviceMesh) -> tuple[DeviceMesh | None, DeviceMesh]:
    """Returns the meshes that shard a parameter: tp, then dp (or dp_shard). mesh: of a run, or of a parameter. Slicing
    a mesh takes torch a millisecond."""
    tp = mesh["tp"] if "tp" in mesh.mesh_dim_names else None
    return tp, mesh["dp_shard" if _is_hybrid(mesh) else "dp"]


def sharded_part(name: str, shape: tuple[int, ...], tp: DeviceMesh | None, shard: DeviceMesh) -> tuple[slice, ...]:
    """Returns this rank's slices of the whole parameter `name`: its chunk over tp, and of that its rows over shard."""
    first, *rest = tensor_parallel_part(name, shape, tp)
    start, end = own_chunk(first.stop - first.start, shard)
    return (slice(first.start + start, first.start + end), *rest)


def load_for_training(
    folder: str | Path,
    mesh: DeviceMesh,
    args: ParallelArgs,
    runtime: Runtime,
    *,
    head: str = "lm",
    new_score: Tensor | None = None,
    param_dtype: torch.dtype | None = None,
    lora: Lora | None = None,
) -> Transformer:
    """Loads a Hugging Face folder's model, sharded over the mesh; each rank reads only its part.

    head: "lm" or "score"; new_score: the weight of a new scalar head, equal on all ranks. param_dtype: of the weights,
    instead of args.param_dtype. lora: adapters, and how the frozen base is quantised. Raises ValueError as
    check_loadable does."""
    if args.cpu_offload and torch.get_num_threads() == 1:  # torchrun's default, with which AdamW would use one core
        torch.set_num_threads(num_cores(of_rank=True))
    parallel = parallel_of(mesh, args.sequence_parallel)
    built = check_loadable(folder, args, runtime, parallel, head=head, new_score=new_score, lora=lora)
    model, files, given, integers = built
    shard_model(model, mesh, args, runtime, param_dtype if lora is None else frozen_dtype(args, runtime))
    tp, shard = sharding_meshes(mesh)
    part_of = partial(sharded_part, tp=tp, shard=shard)
    check_weights(files.folder, files.paths())
    fill_parameters(model, files, device=runtime.device, part_of=part_of, without_file=given)
    for name, shape in short_bar(integers.items(), "rounding", "tensor"):
        part = quantized_part(files, name, shape, lora.scheme, model.parallel.tp, runtime.device)
        model.get_submodule(name.removesuffix(".weight")).set_quantized(part)
    return model


def check_loadable(
    folder: str | Path,
    args: ParallelArgs,
    runtime: Runtime,
    parallel: Parallel = Parallel(),
    *,
    head: str = "lm",
    new_score: Tensor | None = None,
    lora: Lora | None = None,
) -> tuple[Transformer, WeightFiles, dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Builds the model of load_for_training on meta, and raises its errors, early if called before data are tokenised:
    ValueError for args.cpu_offload on a CPU, for a folder with the tensors of another kind of model (such as a reward
    model in place of a language model), and for a reward model's adapters on a language model. Reads only the headers
    of the weight files. Returns (the model, the files, parameters that they do not hold, shapes of quantised weights).
    """
    if args.cpu_offload and runtime.device.type == "cpu":
        raise ValueError("--cpu_offload moves parameters out of a GPU's memory, and this run is on the CPU")
    if lora is not None and head != "score" and "score.weight" in lora.values:
        raise ValueError(f"--adapter_path {args.adapter_path}: the adapter of a reward model, whose head would be lost")
    config, files = model_config(folder), WeightFiles(folder)
    refuse_quantized(folder)
    with torch.device("meta"):
        model = Transformer(config, runtime.dtype, parallel, head)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if lora is not None:
            add_adapters(model, lora)
    given = ({} if new_score is None else {"score.weight": new_score}) | ({} if lora is None else lora.values)
    layers = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, LoraLinear) and m.weight is None]
    integers = {name: shapes[name] for name in layers}
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in given}
    ignored = ["lm_head.weight"] if config.tie_word_embeddings else []
    if "score.weight" in given:  # instead of the files' head, of either kind
        ignored = ["lm_head.weight", "score.weight"]
    files.check(expected | integers, allowed=ignored)
    return model, files, given, integers


def load_frozen(
    folder: str | Path,
    mesh: DeviceMesh,
    scheme: Schemes | None,
    args: ParallelArgs,
    runtime: Runtime,
    *,
    head: str = "lm",
) -> Transformer:
    """Loads a frozen model beside one in training: sharded like that one, or with quantised weights, which are plain
    tensors, sharded over tp and replicated over dp. Its weights are rounded to the same dtype as those in training, so
    that equal folders compute equal numbers."""
    if scheme is None:
        param_dtype = frozen_dtype(args, runtime)
        return load_for_training(folder, mesh, args, runtime, head=head, param_dtype=param_dtype).requires_grad_(False)
    tp = parallel_of(mesh).tp
    model = load_quantized(folder, scheme, device=runtime.device, dtype=runtime.dtype, tp=tp, head=head)
    for block in model.layers if runtime.compile else ():
        _compile(block)
    return model


def frozen_dtype(args: ParallelArgs, runtime: Runtime) -> torch.dtype:
    """Returns the dtype that the weights in training are rounded to, when stored or when gathered for computation."""
    return torch.bfloat16 if args.param_dtype == "bfloat16" else runtime.dtype


def _compile(block: Block) -> None:
    """Compiles a block. All blocks of all models of a process share one function, of which torch makes versions: with
    gradients or without, for policy and reference, one row and several, ... More than 8 of them would run eagerly."""
    torch._dynamo.config.recompile_limit = 64
    block.compiled = True
    if block.recompute == "full":  # torch 2.13 cannot compile checkpoint() with DTensors' local parts
        block._forward = torch.compile(block._forward)
    else:
        block.compile()


def shard_model(
    model: Transformer, mesh: DeviceMesh, args: ParallelArgs, runtime: Runtime, param_dtype: torch.dtype | None = None
) -> None:
    """Prepares a model built on meta for training on the mesh, in place; weights and buffers are still to be loaded.

    param_dtype: of the stored weights and of their gradients, instead of args.param_dtype; norms included, since FSDP2
    requires one dtype per group.
    """
    _store(model, mesh["tp"], param_dtype or DTYPES[args.param_dtype])
    for block in model.layers:
        block.recompute = args.activation_checkpointing
        if runtime.compile:
            _compile(block)
    # a single rank reduces nothing and needs no cast, but gradients that accumulate unsharded do so in this dtype, too
    in_fp32 = mesh["dp"].size() > 1 or not args.sync_every_micro_batch
    policy = MixedPrecisionPolicy(
        param_dtype=runtime.dtype,
        reduce_dtype=torch.float32 if in_fp32 else None,
        cast_forward_inputs=False,  # the RoPE tables stay fp32
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if args.cpu_offload else OffloadPolicy()
    dp = mesh["dp_replicate", "dp_shard"] if _is_hybrid(mesh) else mesh["dp"]
    shard = partial(fully_shard, mesh=dp, mp_policy=policy, offload_policy=offload)
    if mesh["dp"].size() == 1 and not args.cpu_offload:  # frozen unsharded weights need no copy by an all-gather
        shard = partial(shard, ignored_params={p for p in model.parameters() if not p.requires_grad})
    for block in model.layers:
        shard(block)
    if hasattr(model, "score"):  # a scalar head computes in fp32
        shard(model.score, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    shard(model, reshard_after_forward=False)
    model.to_empty(device="cpu" if args.cpu_offload else runtime.device)
    model.tie_weights()  # to_empty untied the parameters that are not sharded


def reshard(model: nn.Module) -> None:
    """Frees what a forward pass without a backward leaves gathered: the embedding and the head."""
    if hasattr(model, "reshard"):  # FSDP's method, which a model on a shared base has too
        model.reshard()


def _store(model: nn.Module, tp: DeviceMesh, dtype: torch.dtype) -> None:
    """Casts each parameter to dtype (scalar head and adapters: fp32) and, if there are several tp ranks, makes it a
    DTensor of this rank's part; tied parameters stay tied."""
    replaced: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in replaced:
                name = f"{prefix}.{attribute}"
                in_fp32 = name == "score.weight" or attribute.startswith("lora_")
                tensor = parameter.detach().to(torch.float32 if in_fp32 else dtype)
                if tp.size() > 1:
                    dim = shard_dim(name)
                    placement = Replicate() if dim is None else Shard(dim)
                    tensor = distribute_tensor(tensor, tp, [placement], src_data_rank=None)  # no communication
                replaced[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            setattr(module, attribute, replaced[id(parameter)])


def full_tensors(model: nn.Module, adapter_name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields (name, whole tensor) of each parameter as stored, gathered one at a time; a collective on all ranks. With
    LoRA, frozen weights are read from the base's folder, unrounded, unless they are quantised, and the adapters of this
    name are merged in fp32; both on the main rank only, which writes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):  # after a forward without a backward the root still holds gathered weights
            module.reshard()
    if isinstance(model, OnSharedBase):
        yield from (each for each in full_tensors(model.base, model.adapter) if model.owns(each[0]))
        return
    base = WeightFiles(model.lora.base) if model.lora is not None and is_main_rank() else None
    seen = set()  # tied weights appear once
    for prefix, module in model.named_modules():
        is_adapted = isinstance(module, LoraLinear)
        if is_adapted:
            weight = module.merged_whole(adapter_name, lambda prefix=prefix: base.read(f"{prefix}.weight"))
            if weight is not None:
                yield f"{prefix}.weight", weight
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and not (is_adapted and name != "bias"):
                seen.add(id(parameter))
                if model.lora is None or parameter.requires_grad:
                    yield f"{prefix}.{name}", whole(parameter)
                elif base is not None:
                    yield f"{prefix}.{name}", base.read(f"{prefix}.{name}")


def reducing_gradients(model: nn.Module, micro_batches: Iterable[T], *, every: bool) -> Iterator[T]:
    """Yields the micro-batches of an optimizer step and sets how each one's backward synchronises its gradients.

    every: each backward reduce-scatters them over the dp ranks, so that a rank holds only its shard (with hybrid
    sharding the all-reduce over the replicas, across nodes, waits for the last). Otherwise they accumulate unsharded,
    4 bytes per parameter of the tp rank (28 GB / tp at 7B), and are reduced once, with the last micro-batch.
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


class LossScale(NamedTuple):
    """Factors that make a mean of a summed loss: of the loss before the backward, of the gradients after it."""

    loss: float
    gradients: float


def loss_scale(count: float, dp_size: int) -> LossScale:
    """Splits dp_size / count (FSDP averages gradients over dp) into two factors: a power of two for the loss, which is
    exact in every tensor of a bf16 backward, where 1 / count would be rounded (by up to 0.4 %, and differently for the
    gradients of body and head), and the rest, in [0.5, 1), for clip_grad_norm."""
    rest, exponent = math.frexp(dp_size / count)
    return LossScale(2.0**exponent, rest)


def clip_grad_norm(model: nn.Module, max_norm: float, scale: float = 1.0) -> Tensor:
    """Multiplies the gradients by scale and clips them to a global norm over all ranks; returns the norm before
    clipping, a plain scalar tensor."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    in_fp32 = all(gradient.dtype == torch.float32 for gradient in gradients)
    if in_fp32:
        norm = nn.utils.get_total_norm(gradients)
    else:  # torch would round the norm of bf16 gradients to bf16, which has three digits
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
    norm = scale * (norm.full_tensor() if isinstance(norm, DTensor) else norm)
    factor = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if in_fp32:
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
    else:  # in fp32, so that the factor is not rounded to bf16
        for gradient in map(local, gradients):
            gradient.copy_(gradient.float() * factor)
    return norm
