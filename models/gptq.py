"""int4 that knows what the weights are multiplied with, and what quantisation costs.

- GPTQ (Frantar et al. 2022, arXiv 2210.17323): a layer's columns are rounded one after the other, and each one's error
  is made up for by those to come, as the second moments of the layer's inputs say; large moments first (act-order, with
  the groups and the ranges that rounding to nearest has)
- the model goes by block by block: one block is in memory at a time, the tokens' hidden states beside it, and the
  inputs of a block are what the quantised blocks before it give
- on held-out tokens three models run side by side (as stored, rounded to nearest, as chosen), so the gain is measured

Dimensions: N output features, K input features, G groups of a row; B rows, T tokens, E model dim.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import causal_attention
from models.checkpoint import WeightFiles
from models.common import Runtime, short_bar
from models.compressed import packed_tensors
from models.model import FUSIONS, Block, ModelConfig, RMSNorm
from models.qlinear import Quantized, Scheme, Schemes, dequantize, int4_grid, quantize, round_int4
from models.rope import rope_tables
from models.tp import Parallel
from models.vocab_parallel import CHUNK_TOKENS

COLUMNS = 128  # whose errors reach the rest of the row together


class Rows(NamedTuple):
    """Tokens to calibrate with or to measure on, right-padded."""

    input_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T]: the token itself where it is to be predicted, -100 elsewhere
    mask: Tensor  # bool [B, T]: False is padding


def gptq(weight: Tensor, moments: Tensor, group_size: int, damping: float = 0.01) -> Quantized:
    """int4 of a weight fp32 [N, K] that keeps the layer's outputs, rather than its weights, near what they were.

    moments: fp32 [K, K], the sum of x x^T over the inputs x. damping: of the mean moment, added to the diagonal.
    """
    K = weight.shape[1]
    diagonal = moments.diagonal()
    scale, _ = int4_grid(weight, group_size)
    order = diagonal.argsort(descending=True)
    mean = diagonal.mean().clamp(min=1e-12)  # no token at all: rounding to nearest
    damped = moments[order][:, order] + damping * mean * torch.eye(K, device=weight.device)
    # rows of the upper Cholesky factor of the inverse say how the error of a column is spread over the later ones
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    left = weight[:, order].clone()  # what is left to be rounded
    values = torch.empty_like(left, dtype=torch.uint8)
    for start in range(0, K, COLUMNS):
        end = min(start + COLUMNS, K)
        errors = torch.empty(len(weight), end - start, device=weight.device)
        for i in range(start, end):
            group = order[i] // group_size
            rounded = round_int4(left[:, i, None], scale[:, group, None])
            values[:, i] = rounded.values[:, 0]
            errors[:, i - start] = (left[:, i] - dequantize(rounded)[:, 0]) / spread[i, i]
            left[:, i:end] -= errors[:, i - start, None] * spread[i, i:end]
        left[:, end:] -= errors @ spread[start:end, end:]
    return Quantized(values[:, order.argsort()], scale)


class Cost(NamedTuple):
    """What quantisation does to the predictions of some tokens."""

    perplexity: float  # exp of the mean cross entropy in nats
    kl: float  # mean KL divergence of the stored model's predictions from these, in nats


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
    """The tensors of the blocks of a folder with quantised weights, (name, tensor), one block after the other; and at
    the end report() is told what that costs on the evaluation rows, if there are any: "stored", "rounded", "chosen".

    calibration: rows for GPTQ; none rounds to nearest.
    """
    device, dtype, _ = runtime

    def forward(block: Block, states: list[Tensor]) -> list[Tensor]:
        places = (torch.arange(x.shape[1], device=device)[None] for x in states)
        return [block(x, *rope_tables(place, inv_freq), causal_attention) for x, place in zip(states, places)]

    inv_freq = config.inv_freq().to(device)
    table = files.read("embed_tokens.weight")
    inputs = [table[rows.input_ids].to(device, dtype) for rows in calibration]
    embedded = [table[rows.input_ids].to(device, dtype) for rows in evaluation]
    states = dict.fromkeys(("stored", "rounded", "chosen"), embedded)
    for i in short_bar(range(config.num_hidden_layers), "quantising", "block"):
        block = _load_block(files, config, i, device, dtype)
        states["stored"] = forward(block, states["stored"])
        moments: dict[str, Tensor] = {}
        for x, rows in zip(inputs, calibration):
            with _adding_moments(block, rows.mask.to(device), moments):
                forward(block, [x])
        rounded, chosen = {}, {}
        for part_name, names, product in FUSIONS:
            for name in names:
                stem = f"{part_name}.{name}.weight"
                weight = files.read(f"layers.{i}.{stem}").to(device).float()
                each = scheme.of(f"layers.{i}.{part_name}.{name}")
                rounded[stem] = chosen[stem] = quantize(weight, each)
                if calibration and each.mode == "int4":
                    chosen[stem] = gptq(weight, moments[product], each.group_size)
        for name, weights in (("rounded", rounded), ("chosen", chosen)):
            for stem, weight in weights.items():
                block.get_parameter(stem).copy_(dequantize(weight))  # in dtype, as the layer itself computes
            states[name] = forward(block, states[name])
        inputs = forward(block, inputs)
        for name in files.names():
            stem = name.removeprefix(f"layers.{i}.")
            if stem in chosen:
                yield from packed_tensors(name, chosen[stem])
            elif stem != name:
                yield name, files.read(name)
    if evaluation:
        report(_costs(files, config, states, evaluation))


def _load_block(files: WeightFiles, config: ModelConfig, i: int, device: torch.device, dtype: torch.dtype) -> Block:
    with torch.device("meta"):
        block = Block(config, i, Parallel())
    tensors = {name: files.read(f"layers.{i}.{name}") for name, _ in block.named_parameters()}
    block.load_state_dict({name: x.to(device, dtype, copy=True) for name, x in tensors.items()}, assign=True)
    return block


@contextmanager
def _adding_moments(block: Block, mask: Tensor, moments: dict[str, Tensor]) -> Iterator[None]:
    """While it lasts, a forward adds to moments the second moments of each product's input, fp32 [K, K]; mask [B, T] is
    False for padding. Layers with one input are watched at the first of them."""

    def add(product: str, _: nn.Module, args: tuple[Tensor]) -> None:
        rows = args[0][mask].float()
        added = rows.T @ rows
        moments[product] = moments[product].add_(added) if product in moments else added

    watched = [(getattr(block, part).get_submodule(names[0]), product) for part, names, product in FUSIONS]
    hooks = [linear.register_forward_pre_hook(partial(add, product)) for linear, product in watched]
    yield
    for hook in hooks:
        hook.remove()


def _costs(
    files: WeightFiles, config: ModelConfig, states: dict[str, list[Tensor]], evaluation: list[Rows]
) -> dict[str, Cost]:
    first = states["stored"][0]
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps, Parallel()).to(first.device)
    norm.weight.copy_(files.read("norm.weight"))
    head = files.read("embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight").to(first)
    small_head = dequantize(quantize(head, Scheme("int8"))).to(first)  # as models.decode.to_inference has it on CPUs
    heads = {name: head if name == "stored" else small_head for name in states}
    sums, count = {name: [0.0, 0.0] for name in states}, 0
    for i, rows in enumerate(evaluation):
        targets = rows.labels[:, 1:].to(first.device)
        learnt = targets >= 0
        count += int(learnt.sum())
        hidden = {name: norm(batches[i])[:, :-1][learnt].split(CHUNK_TOKENS) for name, batches in states.items()}
        for chunk, ids in enumerate(targets[learnt].split(CHUNK_TOKENS)):
            logprobs = {name: (x[chunk] @ heads[name].T).float().log_softmax(dim=-1) for name, x in hidden.items()}
            for name, each in logprobs.items():
                sums[name][0] -= each.gather(1, ids[:, None]).sum().item()
                sums[name][1] += F.kl_div(each, logprobs["stored"], reduction="sum", log_target=True).item()
    return {name: Cost(math.exp(loss / count), kl / count) for name, (loss, kl) in sums.items()}
