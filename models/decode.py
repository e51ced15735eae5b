"""The inference copy of a Transformer: what the generation engine runs, on a cache of models/paged_cache.py.

- q/k/v and gate/up become one matrix product each; on the CPU every weight is reordered once for oneDNN's kernels,
  which makes a decode step of a small model 1.5 to 4 times faster than F.linear (one copy of the weights is kept, not
  two)
- beside quantised blocks the head is int8 as well where there are kernels for it, bf16 on CPUs: at one row a head of
  32000 x 768 takes as long as half of a small model's int4 blocks
- copy_for_inference() makes such a copy beside a model in training, and refresh() brings it up to date in place, one
  block at a time: nobody generates through FSDP, which would gather the model for every token
- it holds a LoRA model merged, base + s B A, in the compute dtype also where the base is quantised: the plain products
  are faster than integers with a low-rank product beside them, and no adapter can fail to reach the sampler
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models import decode_cpu
from models.checkpoint import WeightFiles, load_model
from models.common import Runtime, is_main_rank
from models.cpu_linear import PackedMatrix, can_pack_weights, pack_weight
from models.lora import LoraLinear
from models.model import FUSIONS, Block, Linear, RMSNorm, RowLinear, Transformer
from models.qlinear import QuantizedLinear, Schemes
from models.quantize import load_quantized
from models.shared_base import adapter
from models.tp import Parallel, local, size_of, sum_parts


def can_pack(runtime: Runtime) -> bool:
    """Whether prepacked products serve this device and dtype (models/cpu_linear.py); not for torch.compile."""
    device, dtype, compile = runtime
    return device.type == "cpu" and not compile and can_pack_weights(dtype)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Side by side as one tensor; one alone is not copied."""
    return tensors[0].detach() if len(tensors) == 1 else torch.cat(tensors).detach()


def weight_of(linear: Linear | LoraLinear) -> Tensor:
    """What a layer multiplies by, adapters and all: this tp rank's part, while its parameters are gathered."""
    return linear.merged() if isinstance(linear, LoraLinear) else local(linear.weight)


class InferenceLinear(nn.Module):
    """Linear layers that share an input, as one matrix product; their outputs stand side by side in one tensor."""

    def __init__(self, linears: list[Linear], *, pack: bool):
        super().__init__()
        self.sizes = [len(linear.weight) for linear in linears]  # of this tp rank, unlike out_features
        first = linears[0]
        self.parallel = first.parallel if isinstance(first, RowLinear) and size_of(first.parallel.tp) > 1 else None
        self.dtype = first.weight.dtype
        self.register_buffer("weight", None if pack else _joined([linear.weight for linear in linears]))
        self.register_buffer("bias", None if first.bias is None else _joined([linear.bias for linear in linears]))
        self.packed = self._pack(linears) if pack else None

    @property
    def num_bytes(self) -> int:
        return (self.weight if self.packed is None else self.packed).nbytes

    @torch.no_grad()
    def _pack(self, linears: list[Linear]) -> PackedMatrix:
        return pack_weight(_joined([weight_of(linear) for linear in linears]).to(self.dtype))

    @torch.no_grad()
    def refresh(self, linears: list[Linear | LoraLinear]) -> None:
        """Takes new values of the same linear layers, without changing any tensor's address (but the packed one's)."""
        if self.packed is None:
            for part, linear in zip(self.weight.split(self.sizes), linears):
                part.copy_(weight_of(linear))
        else:
            self.packed = self._pack(linears)
        if self.bias is not None:
            for part, linear in zip(self.bias.split(self.sizes), linears):
                part.copy_(local(linear.bias))

    def for_rows(self, num_rows: int) -> Callable[[Tensor], Tensor]:
        """forward() of [num_rows, K], with fewer steps on the way where the packed product is all there is to do."""
        if self.packed is None or self.parallel is not None:
            return self
        bias = self.bias
        return lambda x: self.packed(x, bias)  # not bound to the packed weight, which a refresh replaces

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.parallel is None else None
        y = F.linear(x, self.weight, bias) if self.packed is None else self.packed(x, bias)
        return y if self.parallel is None else sum_parts(y, self.bias, self.parallel)


def to_inference(model: Transformer, *, pack: bool) -> Transformer:
    """Turns a model into its inference copy, in place and block by block, so that memory holds one copy of the weights.
    The head becomes int8 where the blocks are quantised (int8, int4) and the CPU has kernels for it.

    pack: reorder the weights for oneDNN (see can_pack); not with torch.compile, which cannot trace such tensors. Raises
    ValueError if a head to be quantised is not finite.
    """
    model.requires_grad_(False)
    for block in model.layers:
        if block.self_attn.qkv_proj is None:  # else the block is quantised, and fused by that
            _fuse(block, pack)
    if hasattr(model, "lm_head"):  # a scalar head, fp32 and one row, stays as it is
        head = decode_cpu.quantized_head(model) if pack else None
        model.lm_head = head or InferenceLinear([model.lm_head], pack=pack)
    return model.eval()


def _fuse(block: Block, pack: bool) -> None:
    block.fuse(lambda names: InferenceLinear([block.get_submodule(name) for name in names], pack=pack))


def load_for_inference(
    folder: str | Path,
    runtime: Runtime,
    *,
    tp: DeviceMesh | None = None,
    head: str = "lm",
    scheme: Schemes | None = None,
    files: WeightFiles | None = None,
) -> Transformer:
    """The inference copy of the model in a Hugging Face folder, or of this tp rank's part of it. head: "lm" or "score".
    scheme: how its blocks are quantised, see load_quantized. files: see load_model."""
    device, dtype, _ = runtime
    options = {"device": device, "tp": tp, "head": head, "files": files}
    if scheme is None:
        model = load_model(folder, param_dtype=dtype, **options)
    else:
        model = load_quantized(folder, scheme, dtype=dtype, **options)
        if head == "lm":
            _say_what_is_slow(model)
    return to_inference(model, pack=can_pack(runtime))


def _say_what_is_slow(model: Transformer) -> None:
    """On stderr, since stdout may be for samples alone."""
    layers = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    schemes = sorted({str(layer.scheme) for layer in layers if layer.kernel is None})
    if schemes and is_main_rank():
        what = "no kernel here multiplies with such weights, which are expanded for every product instead"
        print(f"{', '.join(schemes)}: {what}: a token takes longer than without quantising", file=sys.stderr)


def weight_bytes(model: Transformer) -> int:
    """Bytes of weights that one decode step reads: all products; of the embedding it reads a row for each slot."""
    products = (InferenceLinear, QuantizedLinear, decode_cpu.QuantizedHead)
    return sum(module.num_bytes for module in model.modules() if isinstance(module, products))


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """While it lasts, the parameters of a module are this tp rank's whole part, also those of FSDP (a collective over
    dp; not of the modules in it that are wrapped themselves)."""
    sharded = hasattr(module, "unshard")  # FSDP's, also of a model on a shared base
    if sharded:
        module.unshard()
    yield
    if sharded:
        module.reshard()


@torch.no_grad()
def copy_for_inference(source: Transformer, *, pack: bool) -> Transformer:
    """An inference copy beside a model in training, on the same tp ranks, in its compute dtype; refresh() keeps it up
    to date. A collective over dp. pack: as for to_inference."""
    with torch.device("meta"):
        copy = Transformer(source.config, source.compute_dtype, Parallel(source.parallel.tp))
    for block, trained in zip(copy.layers, source.layers):
        with _gathered(trained), adapter(trained, source.adapter):
            _take_parameters(block, trained, source.compute_dtype)
        _fuse(block, pack)
    with _gathered(source):
        names = ("embed_tokens", "norm") if source.config.tie_word_embeddings else ("embed_tokens", "norm", "lm_head")
        for name in names:
            _take_parameters(getattr(copy, name), getattr(source, name), source.compute_dtype)
    copy.tie_weights()
    copy.lm_head = InferenceLinear([copy.lm_head], pack=pack)
    copy.reset_buffers(source.inv_freq.device)
    return copy.requires_grad_(False).eval()


def _take_parameters(module: nn.Module, source: nn.Module, dtype: torch.dtype | None) -> None:
    for name, _ in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        of = source.get_submodule(owner)
        values = weight_of(of) if attribute == "weight" else local(getattr(of, attribute))
        values = values.to(dtype=dtype, copy=True)  # FSDP takes its storage back
        setattr(module.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=False))


@torch.no_grad()
def refresh(copy: Transformer, source: Transformer) -> None:
    """Brings an inference copy up to date with a model of the same shape, in place, one block at a time; where FSDP
    holds the source, a collective over dp."""
    for block, trained in zip(copy.layers, source.layers):
        with _gathered(trained), adapter(trained, source.adapter):
            for part_name, names, product in FUSIONS:
                part = getattr(trained, part_name)
                getattr(getattr(block, part_name), product).refresh([getattr(part, name) for name in names])
            for name, norm in trained.named_modules():
                if isinstance(norm, RMSNorm):
                    block.get_submodule(name).weight.copy_(local(norm.weight))
    with _gathered(source):
        copy.embed_tokens.weight.copy_(local(source.embed_tokens.weight))
        copy.norm.weight.copy_(local(source.norm.weight))
        copy.lm_head.refresh([source.lm_head])
