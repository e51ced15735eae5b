"""The inference copy of a Transformer, which the generation engine runs, on a cache of models/paged_cache.py.

- q/k/v and gate/up are fused into one matrix product each; on a CPU every weight is reordered once for oneDNN's
  kernels, which makes a decode step of a small model 1.5 to 4 times faster than F.linear (only the reordered copy of
  the weights is kept)
- if the blocks are quantised, so is the head, to int8, where kernels exist for it (CPUs in bf16): at one row a
  head of 32000 x 768 takes half as long as a small model's int4 blocks
- copy_for_inference() makes such a copy beside a model in training, and refresh() updates it in place, one block at a
  time: generating through FSDP itself would gather the model for every token
- the copy of a LoRA model is merged, base + s B A, in the compute dtype even if the base is quantised: plain products
  are faster than quantised ones plus a low-rank product, and no adapter can be left out of sampling by mistake
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
    """Whether prepacked products (models/cpu_linear.py) support this device and dtype; not with torch.compile."""
    device, dtype, compile = runtime
    return device.type == "cpu" and not compile and can_pack_weights(dtype)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Concatenates along dim 0; a single tensor is not copied."""
    return tensors[0].detach() if len(tensors) == 1 else torch.cat(tensors).detach()


def weight_of(linear: Linear | LoraLinear) -> Tensor:
    """Returns this tp rank's part of a layer's weight, with LoRA adapters merged; parameters must be gathered."""
    return linear.merged() if isinstance(linear, LoraLinear) else local(linear.weight)


class InferenceLinear(nn.Module):
    """Linear layers that share an input, fused into one matrix product; their outputs are concatenated."""

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
        """Copies new values of the same linear layers in place: no tensor changes its address, except a packed one."""
        if self.packed is None:
            for part, linear in zip(self.weight.split(self.sizes), linears):
                part.copy_(weight_of(linear))
        else:
            self.packed = self._pack(linears)
        if self.bias is not None:
            for part, linear in zip(self.bias.split(self.sizes), linears):
                part.copy_(local(linear.bias))

    def for_rows(self, num_rows: int) -> Callable[[Tensor], Tensor]:
        """Returns a function that computes forward() of [num_rows, K]; the packed product directly where possible."""
        if self.packed is None or self.parallel is not None:
            return self
        bias = self.bias
        return lambda x: self.packed(x, bias)  # looks self.packed up at each call, since refresh() replaces it

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.parallel is None else None
        y = F.linear(x, self.weight, bias) if self.packed is None else self.packed(x, bias)
        return y if self.parallel is None else sum_parts(y, self.bias, self.parallel)


def to_inference(model: Transformer, *, pack: bool) -> Transformer:
    """Turns a model into its inference copy, in place and block by block, so that memory holds one copy of the weights.

    pack: reorder the weights for oneDNN (see can_pack); not with torch.compile, which cannot trace packed tensors.
    Raises ValueError if a head to be quantised is not finite.
    """
    model.requires_grad_(False)
    for block in model.layers:
        if block.self_attn.qkv_proj is None:  # else the block is quantised, and quantising has fused it
            _fuse(block, pack)
    if hasattr(model, "lm_head"):  # a scalar head, fp32 and one row, stays as it is
        weight, is_quantized = model.lm_head.weight, isinstance(model.layers[0].self_attn.qkv_proj, QuantizedLinear)
        if pack and is_quantized and decode_cpu.quantizes_head(weight.dtype):
            model.lm_head = decode_cpu.QuantizedHead(weight)
        else:
            model.lm_head = InferenceLinear([model.lm_head], pack=pack)
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
    """Loads the inference copy of a Hugging Face folder's model, or this tp rank's part of it. head: "lm" or "score".
    scheme: of the quantised blocks, see load_quantized. files: see load_model."""
    device, dtype, _ = runtime
    options = {"device": device, "tp": tp, "head": head, "files": files}
    if scheme is None:
        model = load_model(folder, param_dtype=dtype, **options)
    else:
        model = load_quantized(folder, scheme, dtype=dtype, **options)
        if head == "lm":
            _say_what_is_slow(model)
    return to_inference(model, pack=can_pack(runtime))


def rounding_of(scheme: Schemes | None, runtime: Runtime) -> str | None:
    """What load_for_inference rounds a language model's weights to, in words; None: it does not round them."""
    if scheme is None:
        return None
    return str(scheme) + ", int8 head" * (can_pack(runtime) and decode_cpu.quantizes_head(runtime.dtype))


def _say_what_is_slow(model: Transformer) -> None:
    """Warns on stderr, since stdout may be for samples only."""
    layers = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    schemes = sorted({str(layer.scheme) for layer in layers if layer.kernel is None})
    if schemes and is_main_rank():
        what = "no kernel here multiplies with such weights, so they are dequantised for every product"
        print(f"{', '.join(schemes)}: {what}: a token takes longer than without quantising", file=sys.stderr)


def weight_bytes(model: Transformer) -> int:
    """Returns the bytes of weights that one decode step reads: of all products, without the embedding's few rows."""
    products = (InferenceLinear, QuantizedLinear, decode_cpu.QuantizedHead)
    return sum(module.num_bytes for module in model.modules() if isinstance(module, products))


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Context in which FSDP's parameters of a module are gathered: this tp rank's whole part. A collective over dp;
    submodules with an FSDP wrapper of their own stay sharded."""
    sharded = hasattr(module, "unshard")  # FSDP's method, which a model on a shared base has too
    if sharded:
        module.unshard()
    yield
    if sharded:
        module.reshard()


@torch.no_grad()
def copy_for_inference(source: Transformer, *, pack: bool) -> Transformer:
    """Makes an inference copy beside a model in training, on the same tp ranks, in its compute dtype; refresh() updates
    it. A collective over dp. pack: as for to_inference."""
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
        values = values.to(dtype=dtype, copy=True)  # FSDP frees the gathered storage
        setattr(module.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=False))


@torch.no_grad()
def refresh(copy: Transformer, source: Transformer) -> None:
    """Copies the weights of a model of the same shape into an inference copy, in place, one block at a time; a
    collective over dp if the source is FSDP's."""
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
