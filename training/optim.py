"""Optimizers and learning rate schedule.

- fp32 weights with fp32 moments use torch's fused AdamW; the class AdamW below is for bf16 weights and 8-bit moments,
  on a GPU with one kernel launch per parameter (training/triton_adamw.py)
- bf16 weights are updated in fp32 and rounded back stochastically: with rounding to nearest, a weight of 0.01 would
  never move at a learning rate of 2e-5
- the rounding noise is a pure function of (seed, step, parameter, position in the full tensor): exact resume needs no
  saved state, all layouts over ranks round alike, and replicas stay equal
- 8-bit moments have the shape and placements of their parameter, so a checkpoint can be resumed on another layout

Bytes per parameter, over all ranks: weight + gradient + both moments

|           | float32          | bfloat16         |
|-----------|------------------|------------------|
| adamw     | 4 + 4 + 8   = 16 | 2 + 2 + 8   = 12 |
| adamw_8bit| 4 + 4 + 2.1 = 10 | 2 + 2 + 2.1 =  6 |

Gradients of bf16 weights are reduced over ranks in fp32, but stored and accumulated over micro-batches in bf16.

Dimensions: R rows, C columns of this rank's part of a parameter; a vector is a single column.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.common import Bounds, flag, fraction, non_negative, positive, say
from models.fsdp import sharded_part, sharding_meshes
from models.gpu import compiles_for_cpu, has_triton
from models.noise import column_hashes, noise_key, random_bits
from models.tp import local

below_one = Bounds(least=0, below=1)
BLOCK = 256  # most columns that share a scale
FEWEST_QUANTIZED = 4096  # a parameter with fewer elements keeps fp32 moments, as in Dettmers et al. 2022
CHUNK_ELEMENTS = 1 << 24  # elements updated at a time, which bounds the fp32 copies (64 MB each)
ROUNDING = 0x524E44  # keeps the rounding noise apart from the sampling noise of the same seed


@dataclass(frozen=True, kw_only=True)
class OptimArgs:
    """Optimizer and learning rate schedule."""

    learning_rate: float = flag(2e-5, bounds=non_negative, help="peak learning rate")
    lr_schedule: str = flag("cosine", choices=("constant", "linear", "cosine"), help="schedule after the warm-up")
    warmup_ratio: float = flag(0.03, bounds=fraction, help="share of the steps used for linear warm-up")
    weight_decay: float = flag(0.0, bounds=non_negative, help="AdamW's weight decay of matrices, not norms and biases")
    adam_beta1: float = flag(0.9, bounds=below_one, help="decay of AdamW's first moment")
    adam_beta2: float = flag(0.95, bounds=below_one, help="decay of AdamW's second moment")
    adam_eps: float = flag(1e-8, bounds=positive, help="AdamW's epsilon")
    optim: str = flag(
        "adamw",
        choices=("adamw", "adamw_8bit"),
        help="AdamW with fp32 moments (8 bytes per parameter), or with block-wise 8-bit moments (2 bytes)",
    )
    max_grad_norm: float = flag(1.0, bounds=positive, help="clip gradients to this global norm")


def constant_rate(args: OptimArgs) -> bool:
    """Whether a step's learning rate is independent of the number of steps, so that a run may be made longer."""
    return args.lr_schedule == "constant" and not args.warmup_ratio


def check_optimizer(args) -> None:
    """Raises ValueError for 8-bit moments with --cpu_offload: the mesh's device, not the CPU, would hold their scales.
    Says if the weight decay is too weak for fp32. args: of a trainer, with ParallelArgs."""
    if args.optim == "adamw_8bit" and args.cpu_offload:
        raise ValueError("--optim adamw_8bit saves GPU memory, which --cpu_offload does already; take --optim adamw")
    for name in ("learning_rate", "value_learning_rate"):
        decay, rate = args.weight_decay, vars(args).get(name, 0.0)
        if decay * rate and torch.tensor(1 - decay * rate, dtype=torch.float32) == 1:
            say(f"--weight_decay {decay} at --{name} {rate} changes no weight: 1 - {decay} * {rate} is 1 in fp32")


def make_optimizer(model: nn.Module, args: OptimArgs, *, seed: int = 0, compile: bool = False) -> torch.optim.Optimizer:
    """Returns AdamW (Loshchilov & Hutter, arXiv 1711.05101), with weight decay for matrices, not for norms and biases.

    seed: of stochastic rounding. compile: torch.compile the update if it is not torch's own, where that works. Raises
    ValueError if tensor parallelism cuts through blocks of 8-bit moments.
    """
    settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    if args.optim == "adamw" and all(p.dtype == torch.float32 for _, p in named):
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
        # torch would create the state in the first step: a checkpoint saved before that would lack it
        optimizer.state.update({p: _new_state(p, block=0, step_device=p.device) for _, p in named})
        return optimizer
    places = {p: _place(i, name, p, quantize=args.optim == "adamw_8bit") for i, (name, p) in enumerate(named)}
    return AdamW(groups, settings, places=places, seed=seed, compile=compile)


# ------------------------------------------------------------------------------ stochastic rounding


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """Rounds fp32 x to one of its two bf16 neighbours, with probabilities such that the mean is x.

    bits: int32 of x's shape; the low 16 bits are the noise. They are added to the 16 bits that bf16 lacks, and a carry
    moves the magnitude to the next bf16 number. Exact bf16 numbers, infinities and NaN are unchanged.
    """
    rounded = (x.view(torch.int32) + (bits & 0xFFFF)) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)  # a NaN's carry would overflow


# ---------------------------------------------------------------------------------- 8-bit moments


def dynamic_levels(signed: bool) -> Tensor:
    """Returns the levels of 8-bit dynamic quantisation (Dettmers et al. 2022, arXiv 2110.02861), ascending, fp32.

    Each decade below 1 has half as many levels, evenly spaced, as the one above it. signed: 255 levels, of both signs
    and 0. They include -1; the paper ends at -0.993, which would shrink a block's largest moment at each step if it is
    negative. Unsigned: 256 levels, without the paper's 0: a second moment of 0 would divide by eps.
    """
    decades, most = (6, 64) if signed else (8, 128)
    values = [torch.ones(1, dtype=torch.float64)]
    for decade in range(decades):
        edges = torch.linspace(0.1, 1, (most >> decade) + 1, dtype=torch.float64)
        values.append((edges[1:] + edges[:-1]) / 2 * 10.0**-decade)
    positive = torch.cat(values)
    return (torch.cat((-positive, positive.new_zeros(1), positive)) if signed else positive).sort().values.float()


def middles_of(levels: Tensor) -> Tensor:
    """Returns the midpoints between neighbouring levels."""
    return (levels[1:] + levels[:-1]) / 2


def quantize_blocks(x: Tensor, num_blocks: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises fp32 [R, C]; returns (codes, uint8 [R, C]; each block's largest magnitude, fp32 [R, num_blocks])."""
    blocks = x.view(x.shape[0], num_blocks, -1)
    scale = blocks.abs().amax(dim=-1, keepdim=True)
    relative = torch.where(scale > 0, blocks / scale, 0.0)
    codes = torch.bucketize(relative, middles_of(levels), out_int32=True)
    return codes.to(torch.uint8).view(x.shape), scale.squeeze(-1)


def dequantize_blocks(codes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Inverts quantize_blocks; returns fp32 [R, C]."""
    values = levels[codes.to(torch.int32)].view(*scale.shape, -1)
    return (values * scale[..., None]).view(codes.shape)


# ------------------------------------------------------------------------------------------- AdamW


class Place(NamedTuple):
    """index: the parameter's number in the model. row, column: where this rank's part begins in the full tensor. block:
    number of columns that share a scale of 8-bit moments; 0: fp32 moments."""

    index: int
    row: int
    column: int
    block: int


def _place(index: int, name: str, parameter: Tensor, *, quantize: bool) -> Place:
    shape = tuple(parameter.shape)
    assert 1 <= len(shape) <= 2, (name, shape)
    whole = tuple(slice(0, size) for size in shape)
    is_sharded = isinstance(parameter, DTensor)
    part = sharded_part(name, shape, *sharding_meshes(parameter.device_mesh)) if is_sharded else whole
    column, block = part[1].start if len(shape) == 2 else 0, 0
    if quantize and len(shape) == 2 and parameter.numel() >= FEWEST_QUANTIZED:
        # The same on every layout, and not cut by tensor parallelism of up to 8 ranks.
        cut = shape[1] // math.gcd(shape[1], 8)
        block = max(size for size in range(1, BLOCK + 1) if cut % size == 0)
        if block < 8:  # no larger divisor: the scales would take too much memory
            block = 0
        elif column % block or part[1].stop % block:
            raise ValueError(
                f"--optim adamw_8bit: tensor parallelism cuts {name} ({shape[1]} columns) within its blocks of {block};"
                " take --tensor_parallel_size 1, 2, 4 or 8, or --optim adamw"
            )
    return Place(index, part[0].start, column, block)


class AdamW(torch.optim.Optimizer):
    """AdamW with fp32 arithmetic, for bf16 weights (rounded stochastically) and for 8-bit moments.

    settings: lr, betas, eps. A parameter's state is `step`, `exp_avg` and `exp_avg_sq`, as in torch. 8-bit moments are
    uint8 codes, with scales `exp_avg_scale` and `exp_avg_sq_scale`, [rows, columns / block]. All but `step` are
    DTensors if the parameter is one.
    """

    def __init__(self, groups: list[dict], settings: dict, *, places: dict[Tensor, Place], seed: int, compile: bool):
        super().__init__(groups, settings)
        self.places, self.seed = places, seed
        device = next(iter(places)).device
        self.kernel = gpu_kernel(device)
        compile = compile and self.kernel is None and (device.type != "cpu" or compiles_for_cpu())  # --cpu_offload
        self.update = torch.compile(_update, dynamic=True) if compile else _update
        self.levels = {name: dynamic_levels(name == "exp_avg").to(device) for name in ("exp_avg", "exp_avg_sq")}
        self.middles = {name: middles_of(levels) for name, levels in self.levels.items()}
        self.hashes = cache(lambda start, end: column_hashes(end, device)[start:])
        self.state.update({p: _new_state(p, place.block, step_device="cpu") for p, place in places.items()})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            factors = cache(partial(factors_of, group))
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of(parameter, factors)

    def _step_of(self, parameter: Tensor, factors_at: Callable[[int], tuple[dict, dict]]) -> None:
        state, place = self.state[parameter], self.places[parameter]
        state["step"] += 1
        step = int(state["step"])
        tensors = {name: _matrix(t) for name, t in {**state, "grad": parameter.grad}.items() if name != "step"}
        weight = _matrix(parameter)
        num_rows, num_columns = weight.shape
        key = noise_key(ROUNDING, self.seed, step, place.index)
        hashes = self.hashes(place.column, place.column + num_columns)
        numbers, factors = factors_at(step)
        if self.kernel is not None:
            noise = (key, place.row, hashes)
            self.kernel.adamw_(weight, tensors, self.levels, self.middles, noise, numbers, place.block)
            return
        rows = torch.arange(place.row, place.row + num_rows, device=weight.device)
        keys = torch.full_like(rows, key)
        chunk = max(1, CHUNK_ELEMENTS // max(1, num_columns))
        for i in range(0, num_rows, chunk):
            part = slice(i, i + chunk)
            tensors_part = {name: t[part] for name, t in tensors.items()}
            self.update(weight[part], tensors_part, self.levels, (keys[part], rows[part], hashes), factors)


def gpu_kernel(device: torch.device) -> ModuleType | None:
    """Returns the module training/triton_adamw.py, or None where Triton does not work."""
    if not has_triton(device):
        return None
    from training import triton_adamw

    return triton_adamw


def factors_of(group: dict, step: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Returns a step's factors as numbers and as tensors, since torch.compile would recompile for new numbers."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    factors = {
        "decay": 1 - lr * group["weight_decay"],
        "beta1": beta1,
        "rest1": 1 - beta1,
        "beta2": beta2,
        "rest2": 1 - beta2,
        "step_size": lr / (1 - beta1**step),
        "correction2": math.sqrt(1 - beta2**step),
        "eps": group["eps"],
    }
    return factors, {name: torch.tensor(value, dtype=torch.float32) for name, value in factors.items()}


def _matrix(tensor: Tensor) -> Tensor:
    """Returns a view of this rank's part as [R, C]."""
    part = local(tensor.detach())
    return part[:, None] if part.dim() == 1 else part


def _new_state(parameter: Tensor, block: int, step_device: torch.device | str) -> dict[str, Tensor]:
    state = {"step": torch.zeros((), dtype=torch.float32, device=step_device)}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(parameter, dtype=torch.uint8 if block else torch.float32)
        if block:
            state[f"{name}_scale"] = _new_scale(parameter, block)
    return state


def _new_scale(parameter: Tensor, block: int) -> Tensor:
    rows, columns = local(parameter).shape
    part = torch.zeros(rows, columns // block, device=parameter.device)
    if not isinstance(parameter, DTensor):
        return part
    shape, mesh = torch.Size((parameter.shape[0], parameter.shape[1] // block)), parameter.device_mesh
    return DTensor.from_local(part, mesh, parameter.placements, run_check=False, shape=shape, stride=(shape[1], 1))


def _update(
    weight: Tensor,
    tensors: dict[str, Tensor],
    levels: dict[str, Tensor],
    noise: tuple[Tensor, Tensor, Tensor],
    factors: dict[str, Tensor],
) -> None:
    """Updates some rows of a parameter in place, with the operations of torch's AdamW in their order."""
    moments = dict(tensors)
    for name in levels:
        if f"{name}_scale" in tensors:
            moments[name] = dequantize_blocks(tensors[name], tensors[f"{name}_scale"], levels[name])
    f, grad = factors, tensors["grad"].float()
    exp_avg = moments["exp_avg"] * f["beta1"] + grad * f["rest1"]
    exp_avg_sq = moments["exp_avg_sq"] * f["beta2"] + grad * grad * f["rest2"]
    denominator = exp_avg_sq.sqrt() / f["correction2"] + f["eps"]
    new = weight.float() * f["decay"] - exp_avg / denominator * f["step_size"]
    weight.copy_(stochastic_round(new, random_bits(*noise)) if weight.dtype == torch.bfloat16 else new)
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if (scale := tensors.get(f"{name}_scale")) is not None:
            moment, largest = quantize_blocks(moment, scale.shape[1], levels[name])
            scale.copy_(largest)
        tensors[name].copy_(moment)


# ---------------------------------------------------------------------------------------- schedule


def set_learning_rate(
    optimizer: torch.optim.Optimizer, args: OptimArgs, step: int, total_steps: int, *, peak: float | None = None
) -> float:
    """Sets and returns the learning rate of a step, counted from 1. It rises linearly over the first
    ceil(warmup_ratio * total_steps) steps, reaches the peak in the last of them, then stays, or falls such that it
    would be 0 one step after the last. peak: args.learning_rate by default."""
    rate = args.learning_rate if peak is None else peak
    warmup_steps = math.ceil(args.warmup_ratio * total_steps - 1e-9)  # 0.07 * 100 in floats is above 7
    if step <= warmup_steps:
        rate = rate * step / warmup_steps
    else:
        progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
        factors = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        rate = rate * factors[args.lr_schedule]
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
