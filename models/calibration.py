"""Quantises a model block by block with calibration records, and measures the cost of quantisation.

- the stored model and the partly quantised one process the calibration tokens side by side; memory holds one block of
  each at a time, and the tokens' hidden states
- a layer's weights are chosen to turn the inputs that it will get, from quantised layers, into the outputs of the
  stored layer in the stored model, so they compensate for errors of earlier layers (as in GPTAQ, Li et al. 2025, arXiv
  2504.02692); o_proj and down_proj aim at the stored model's residual stream
- weights of large inputs get a finer grid (as in AWQ, Lin et al. 2023, arXiv 2306.00978): they are multiplied by
  factors, and the source of the inputs, a norm's weight or the scales of v_proj and up_proj, is divided by them
- on held-out tokens three models run side by side (stored, rounded to nearest, chosen), to measure the gain

Dimensions: N output features, K input features; B rows, T tokens, E model dim.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import causal_attention
from models.checkpoint import WeightFiles
from models.common import Runtime, short_bar
from models.compressed import packed_tensors
from models.config import ModelConfig
from models.gptq import Curvature, gptq
from models.model import Block, RMSNorm
from models.qlinear import Quantized, Scheme, Schemes, dequantize, quantize
from models.rope import rope_tables
from models.tp import Parallel
from models.vocab_parallel import CHUNK_TOKENS

BALANCE = 0.3  # weights are multiplied by this power of (size of an input / size of its weights)

# A block is two steps, x + part(norm(x)), each given as (the norm, the layers that read its output, the last layer, the
# source of its inputs: the layer whose outputs, mixed over tokens or multiplied by others, are the inputs of the last).
STEPS = (
    (
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        "self_attn.v_proj",
    ),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "mlp.up_proj"),
)


class Rows(NamedTuple):
    """Right-padded tokens for calibration or evaluation."""

    input_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T]: the token itself if it is to be predicted, else -100
    mask: Tensor  # bool [B, T]: False is padding


class Cost(NamedTuple):
    """The quality of a model's predictions on the evaluation tokens."""

    perplexity: float  # exp of the mean cross entropy in nats
    kl: float  # mean KL(stored model's predictions || these), in nats


class Inputs(NamedTuple):
    """Sums over tokens of a layer's inputs, x in the quantised model and y in the stored one."""

    moments: Tensor  # of x x^T, fp32 [K, K]
    cross: Tensor  # of y x^T, fp32 [K, K]
    missing: Tensor | None = None  # of d x^T, fp32 [E, K]; d: stored residual stream minus the quantised one

    def divided(self, factors: Tensor) -> "Inputs":
        """Returns the sums for x / factors and y / factors."""
        moments, cross = (sums / factors / factors[:, None] for sums in self[:2])
        return Inputs(moments, cross, None if self.missing is None else self.missing / factors)


def input_sums(batches: Iterable[tuple[Tensor, ...]]) -> Inputs:
    """Sums over batches of (x, y) or (x, y, d), each [tokens, features]."""
    total = None
    for x, *others in batches:
        x = x.float()
        sums = [other.float().T @ x for other in (x, *others)]
        total = sums if total is None else [a.add_(b) for a, b in zip(total, sums)]
    return Inputs(*total)


def balancing_factors(moments: Tensor, weights: list[Tensor], shared: tuple[int, int]) -> Tensor:
    """Returns factors for the columns of weights [N, K], so that columns with large inputs get a finer grid: fp32 [K],
    geometric mean 1. moments: of the inputs, [K, K]. shared (n, D): every n runs of D inputs share D factors."""
    sizes = moments.diagonal(), torch.stack([weight.square().sum(dim=0) for weight in weights]).sum(dim=0)
    inputs, columns = ((size + 1e-6 * size.mean() + 1e-30).log().view(-1, *shared) for size in sizes)
    powers = (BALANCE / 2 * (inputs - columns)).mean(dim=1, keepdim=True)
    return (powers - powers.mean()).exp().expand_as(inputs).flatten()


class BlockPair:
    """A stored block, and a copy with quantised layers, which are first rounded to nearest."""

    def __init__(
        self, stored: Block, read: Callable[[str], Tensor], scheme_of: Callable[[str], Scheme], config: ModelConfig
    ):
        """read(name): a tensor of the folder, on the block's device. scheme_of(name): a layer's scheme. Both take names
        within the block. config: of the model."""
        self.stored, self.small, self.read, self.scheme_of = stored, copy.deepcopy(stored), read, scheme_of
        self.config, self.inv_freq = config, config.inv_freq().to(stored.input_layernorm.weight.device)
        self.weights: dict[str, Quantized] = {}  # by the layer's name in the block
        self.changed: dict[str, Tensor] = {}  # other parameters that differ from the stored ones, by name
        for _, readers, last, _ in STEPS:
            for name in (*readers, last):
                self._put(name, quantize(read(f"{name}.weight"), scheme_of(name)))

    def _put(self, name: str, weight: Quantized) -> None:
        self.weights[name] = weight
        parameter = self.small.get_parameter(f"{name}.weight")
        parameter.copy_(dequantize(weight))  # in the block's dtype, in which the layer computes

    def _rope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return rope_tables(positions, self.inv_freq, self.config.attention_factor)

    def forward(self, block: Block, states: list[Tensor]) -> list[Tensor]:
        return [block(x, *self._rope(x), causal_attention) for x in states]

    def calibrate(self, before: list[Tensor], own: list[Tensor], masks: list[Tensor]) -> None:
        """Chooses all weights of the block. before, own: the tokens' hidden states in the stored and in the quantised
        model, batches of [B, T, E], replaced by those after the block. masks: bool [B, T], False is padding."""
        for norm, readers, last, source in STEPS:
            batches = zip(own, before, masks)
            normed = [block.get_submodule(norm) for block in (self.small, self.stored)]
            inputs = input_sums((normed[0](x)[mask], normed[1](y)[mask]) for x, y, mask in batches)
            self._choose(readers, inputs, (1, 1), partial(self.divide_norm, norm))
            inputs = input_sums(self._last_inputs(norm, last, before, own, masks))
            attention = self.stored.self_attn
            shared = (attention.group_size, attention.head_dim) if last == "self_attn.o_proj" else (1, 1)
            self._choose((last,), inputs, shared, partial(self.divide_layer, source, shared))
            own[:] = [self._step(self.small, norm, x) for x in own]

    def _step(self, block: Block, norm: str, x: Tensor) -> Tensor:
        normed = block.get_submodule(norm)(x)
        if norm == "input_layernorm":
            return x + block.self_attn(normed, *self._rope(x), causal_attention)
        return x + block.mlp(normed)

    def _last_inputs(
        self, norm: str, last: str, before: list[Tensor], own: list[Tensor], masks: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields (x, y, d) of a step's last layer for each batch. Replaces `before` by the states after the step."""
        for i, mask in enumerate(masks):
            missing = before[i] - own[i]
            given, _ = self._watched(self.small, norm, last, own[i])
            aimed, before[i] = self._watched(self.stored, norm, last, before[i])
            yield given[mask], aimed[mask], missing[mask]

    def _watched(self, block: Block, norm: str, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (the inputs of a layer during a step, the step's outputs)."""
        seen = []
        hook = block.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        after = self._step(block, norm, x)
        hook.remove()
        return seen[0], after

    def _choose(
        self, names: tuple[str, ...], inputs: Inputs, shared: tuple[int, int], divide: Callable[[Tensor], Tensor]
    ) -> None:
        """Chooses the weights of layers that share their inputs. divide(factors): divides these inputs at their source,
        and returns the factors after rounding."""
        weights = [self.read(f"{name}.weight").float() for name in names]
        schemes = [self.scheme_of(name) for name in names]
        if schemes[0].mode == "int4":
            factors = divide(balancing_factors(inputs.moments, weights, shared))
            inputs, weights = inputs.divided(factors), [weight * factors for weight in weights]
        curvature = Curvature.of(inputs.moments)
        for name, scheme, weight in zip(names, schemes, weights):
            # least squares for the stored model's outputs, damped towards the stored weights rather than 0
            aim = weight @ (inputs.cross + curvature.matrix - inputs.moments)
            aim = curvature.solve(aim if inputs.missing is None else aim + inputs.missing)
            self._put(name, gptq(aim, curvature, scheme) if scheme.mode == "int4" else quantize(aim, scheme))

    def divide_norm(self, norm: str, factors: Tensor) -> Tensor:
        """Divides the output of a norm by factors [K], through its weight; returns the factors after rounding."""
        name = f"{norm}.weight"
        weight = self.read(name)
        self.changed[name] = (weight / factors).to(weight.dtype)
        self.small.get_parameter(name).copy_(self.changed[name])
        left = self.changed[name].float()
        return torch.where(left == 0, 1.0, weight.float() / left)

    def divide_layer(self, layer: str, shared: tuple[int, int], factors: Tensor) -> Tensor:
        """Divides the outputs of a quantised layer by factors [K], through its scales and bias."""
        rows = factors.view(-1, *shared)[:, 0].flatten()
        weight, bias = self.weights[layer], f"{layer}.bias"
        self._put(layer, weight._replace(scale=(weight.scale.float() / rows[:, None]).to(weight.scale.dtype)))
        if self.stored.get_submodule(layer).bias is not None:
            stored = self.read(bias)
            self.changed[bias] = (stored / rows).to(stored.dtype)
            self.small.get_parameter(bias).copy_(self.changed[bias])
        return factors


@torch.no_grad()
def quantize_blocks(
    files: WeightFiles,
    config: ModelConfig,
    scheme: Schemes,
    runtime: Runtime,
    *,
    calibration: list[Rows],
    evaluation: list[Rows],
    report: Callable[[dict[str, Cost]], None],
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of a folder's blocks with quantised weights, one block after the other. At the end calls
    report({"stored": Cost, "rounded": Cost, "chosen": Cost}) for the evaluation rows, if there are any.

    calibration: rows for choosing int4; without any, weights are rounded to nearest. Raises ValueError if a layer's
    inputs are not finite.
    """
    device, dtype, _ = runtime
    table = files.read("embed_tokens.weight")
    own = [table[rows.input_ids].to(device, dtype) for rows in calibration]
    before, masks = list(own), [rows.mask.to(device) for rows in calibration]
    embedded = [table[rows.input_ids].to(device, dtype) for rows in evaluation]
    states = dict.fromkeys(("stored", "rounded", "chosen"), embedded)
    for i in short_bar(range(config.num_hidden_layers), "quantising", "block"):
        prefix = f"layers.{i}."
        pair = BlockPair(
            _load_block(files, config, i, device, dtype),
            lambda name, prefix=prefix: files.read(prefix + name).to(device),
            lambda name, prefix=prefix: scheme.of(prefix + name),
            config,
        )
        states["stored"] = pair.forward(pair.stored, states["stored"])
        states["rounded"] = pair.forward(pair.small, states["rounded"])
        if calibration:
            pair.calibrate(before, own, masks)
        states["chosen"] = pair.forward(pair.small, states["chosen"])
        yield from _tensors_of(pair, files, prefix)
    if evaluation:
        report(_costs(files, config, states, evaluation))


def _tensors_of(pair: BlockPair, files: WeightFiles, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name in files.names():
        if name.startswith(prefix):
            parameter = name.removeprefix(prefix)
            layer = parameter.removesuffix(".weight")
            if layer in pair.weights:
                yield from packed_tensors(name, pair.weights[layer])
            else:
                yield name, pair.changed[parameter] if parameter in pair.changed else files.read(name)


def _load_block(files: WeightFiles, config: ModelConfig, i: int, device: torch.device, dtype: torch.dtype) -> Block:
    with torch.device("meta"):
        block = Block(config, i, Parallel())
    tensors = {name: files.read(f"layers.{i}.{name}") for name, _ in block.named_parameters()}
    block.load_state_dict({name: x.to(device, dtype, copy=True) for name, x in tensors.items()}, assign=True)
    return block


def _costs(
    files: WeightFiles, config: ModelConfig, states: dict[str, list[Tensor]], evaluation: list[Rows]
) -> dict[str, Cost]:
    # all models use the stored head; whether generation quantises it depends on device and dtype (models/decode.py)
    first = states["stored"][0]
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps).to(first.device)
    norm.weight.copy_(files.read("norm.weight"))
    head = files.read("embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight").to(first)
    sums, count = {name: [0.0, 0.0] for name in states}, 0
    for i, rows in enumerate(evaluation):
        targets = rows.labels[:, 1:].to(first.device)
        learnt = targets >= 0
        count += int(learnt.sum())
        hidden = {name: norm(batches[i])[:, :-1][learnt].split(CHUNK_TOKENS) for name, batches in states.items()}
        for chunk, ids in enumerate(targets[learnt].split(CHUNK_TOKENS)):
            logprobs = {name: (x[chunk] @ head.T).float().log_softmax(dim=-1) for name, x in hidden.items()}
            for name, each in logprobs.items():
                sums[name][0] -= each.gather(1, ids[:, None]).sum().item()
                sums[name][1] += F.kl_div(each, logprobs["stored"], reduction="sum", log_target=True).item()
    return {name: Cost(math.exp(loss / count), kl / count) for name, (loss, kl) in sums.items()}
