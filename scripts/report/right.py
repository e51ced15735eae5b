"""Section `right` of scripts/gpu_report.py: checks the device's results."""

import math
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import vocab_parallel
from models.attention import causal_attention, document_attention, varlen_works
from models.common import Runtime, dtype_name
from models.decode import load_for_inference
from models.generation import Engine, Request
from models.gpu import has_triton
from models.qlinear import Quantized, QuantizedLinear, Scheme, dequantize, quantize, triton_products
from models.quantize import check_scheme
from models.resting import resting
from models.sampling import SamplingParams, top_p_threshold
from models.vocab_parallel import fused_head, linear_cross_entropy, linear_logprobs
from scripts.benchmark_common import SIZES
from scripts.report.record import Item, Section, largest
from scripts.report.trained import check_training, start_training
from scripts.workload import counted, random_ids
from training import optim

# (dtype, head dim, kv heads, query heads per kv head): shapes in which the kernels differ
ATTENTION = [
    (torch.bfloat16, 128, 8, 4),
    (torch.bfloat16, 64, 2, 8),
    (torch.float16, 128, 4, 1),
    (torch.float32, 128, 2, 4),
    (torch.bfloat16, 256, 2, 2),
]
ATTENTION_BOUNDS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
KINDS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32},
    "deepseek": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
    },
}
SCHEMES = [Scheme("int8"), Scheme("int4", 32), Scheme("int4", 128), Scheme("fp8")]
KERNELS = [  # scheme (a scale for a whole row, zero points), programs that share a row of the weight, dtype
    (Scheme("int8"), 1, torch.float32),
    (Scheme("int4", 128, symmetric=False), 3, torch.float32),
    (Scheme("int8", 64, symmetric=False), 1, torch.bfloat16),
    (Scheme("int4"), 2, torch.bfloat16),
]
VOCAB_SIZE = 500


def check_triton(section: Section) -> None:
    """Checks that Triton's kernels run: they do not without a C compiler, for instance, and then all else is slower."""
    device = section.runtime.device
    if device.type == "cuda":
        section.check("Triton", 0 if has_triton(device) else 1, 0, "kernels and torch.compile; log.txt has the reason")
        varlen = varlen_works(device, torch.bfloat16, 128)
        section.note("variable-length attention", "works" if varlen else "does not work here, SDPA replaces it")


def check_attention(section: Section) -> None:
    """Compares the Triton kernel of a decode step with SDPA in fp32, on shuffled pages, with NaN in unused places."""
    if not has_triton(section.runtime.device):
        section.note("decode attention", "its kernel needs a GPU; tests run it in Triton's interpreter")
        return
    from models.triton_attention import paged_decode

    for dtype, D, K, groups in ATTENTION:
        for splits in (1, 8):
            distance = attention_distance(paged_decode, section.runtime.device, dtype, D, K, groups, splits)
            name = f"decode attention, {dtype_name(dtype)}, head dim {D}, {counted(groups, 'query head')} a key, "
            name += counted(splits, "split")
            section.check(name, distance, ATTENTION_BOUNDS[dtype], "against SDPA in fp32, lengths 1 to 3,000")


def attention_distance(
    kernel, device: torch.device, dtype: torch.dtype, D: int, K: int, groups: int, splits: int
) -> float:
    generator, lengths, page = torch.Generator().manual_seed(D), [1, 63, 64, 65, 700, 3000], 64
    counts = [-(-n // page) for n in lengths]
    order = (torch.randperm(sum(counts), generator=generator) + 1).split(counts)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, pages in enumerate(order):
        table[row, : len(pages)] = pages
    k, v = (torch.randn(sum(counts) + 1, page, K, D, generator=generator).to(dtype) for _ in range(2))
    for row, n in enumerate(lengths):
        for tensor in (k, v):
            tensor[0] = math.nan
            tensor[order[row][-1], (n - 1) % page :] = math.nan  # the kernel writes the last place
    rows = torch.randn(len(lengths), K * (groups + 2), D, generator=generator).to(dtype).to(device)
    q, new_k, new_v = rows.split([K * groups, K, K], dim=1)  # views of one tensor, as the fused product gives
    k, v, *of_rows = (t.to(device) for t in (k, v, table, torch.tensor(lengths, dtype=torch.int32)))
    found, wanted = kernel(q, new_k, new_v, k, v, *of_rows, splits).float().cpu(), []
    q, k, v = (t.cpu() for t in (q, k, v))  # k and v now have the new keys and values
    for row, n in enumerate(lengths):
        keys, values = (t[order[row]].flatten(0, 1)[:n].transpose(0, 1).float() for t in (k, v))
        wanted.append(F.scaled_dot_product_attention(q[row, :, None].float(), keys, values, enable_gqa=True)[:, 0])
    return (found - torch.stack(wanted)).abs().max().item()


def check_top_p(section: Section) -> None:
    """Compares the probability of the tokens that top-p keeps with that of the fewest that reach it, sorted in fp64."""
    rows, width = (3, 300) if section.small else (8, 128256)
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(5))
    probs, distances = logits.double().softmax(dim=-1), []
    ordered = probs.sort(dim=-1, descending=True).values
    above = ordered.cumsum(dim=-1) - ordered
    for top_p in (0.0, 0.5, 0.95, 0.999):
        kept = logits >= top_p_threshold(logits.to(section.runtime.device), top_p).cpu()
        wanted = torch.where(above < max(top_p, 1e-9), ordered, 0).sum(dim=-1)  # 0 keeps the likeliest
        distances.append((torch.where(kept, probs, 0).sum(dim=-1) - wanted).abs().max().item())
    section.check(f"top-p of {width:,} tokens", largest(distances), 1e-4, "probability that is kept, top_p 0 to 0.999")


# ---------------------------------------------------------------------------------- whole models


def write_folder(folder: Path, kind: dict):
    """Writes a folder with a random model of transformers, and returns the model."""
    import transformers

    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,  # wide, so that the likeliest token stands out
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**(shape | kind))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def greedy_by_transformers(model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    options = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    return found


def share_of_equal(found: list[list[int]], wanted: list[list[int]]) -> float:
    pairs = [(a, b) for row, other in zip(found, wanted, strict=True) for a, b in zip(row, other, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def drawn_ids(engine: Engine, requests: list[Request]) -> list[list[int]]:
    done = {(c.request.idx, c.request.sample_idx): c.token_ids for c in engine.generate(requests)}
    return [done[r.idx, r.sample_idx] for r in requests]


@torch.inference_mode()
def check_greedy(section: Section) -> None:
    """Compares greedy answers with transformers' on the CPU, in fp32; some prompts are longer than a prefill."""
    lengths, new_tokens = ([3, 70] if section.small else [1, 3, 70, 200]), 8 if section.small else 24
    torch.manual_seed(1)
    prompts = [random_ids(VOCAB_SIZE, n).tolist() for n in lengths]
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            theirs = write_folder(Path(folder), kind)
            wanted = greedy_by_transformers(theirs, prompts, new_tokens)
            model = load_for_inference(folder, section.runtime._replace(dtype=torch.float32, compile=False))
        limits = {"num_slots": 3, "max_seq_len": max(lengths) + new_tokens, "prefill_tokens": 64}
        engine = Engine(model, SamplingParams(0.0), **limits)
        found = drawn_ids(engine, [Request(i, 0, prompt, new_tokens) for i, prompt in enumerate(prompts)])
        different = 1 - share_of_equal(found, wanted)
        section.check(f"greedy ids, {name}, eager", different, 0, "share that differs from transformers, fp32")
        if name == "llama":
            section.kept["llama"] = (theirs, prompts, wanted, new_tokens)


def llama_engine(
    section: Section, dtype: torch.dtype, params: SamplingParams, scheme: Scheme | None = None, **options
) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), KINDS["llama"])
        runtime = section.runtime._replace(dtype=dtype)
        model = load_for_inference(folder, runtime, scheme=scheme)
        return Engine(model, params, **{"compile": runtime.compile, **options})


@torch.inference_mode()
def check_compiled(section: Section) -> None:
    """Compares greedy answers of compiled and captured decode steps, in fp32, where the ids must be equal: with
    transformers, for int4 weights with the engine without the compiler, and with those of the engine when it has
    released its cache and captures its steps again."""
    _, prompts, wanted, new_tokens = section.kept["llama"]
    limits = {"num_slots": 3, "max_seq_len": max(map(len, prompts)) + new_tokens}
    requests = [Request(i, 0, prompt, new_tokens) for i, prompt in enumerate(prompts)]
    how = "share that differs, " + ("as the engine runs" if section.runtime.compile else "not compiled here")
    for name, scheme in (("llama", None), ("llama in int4", Scheme("int4", 32))):
        engine_of = partial(llama_engine, section, torch.float32, SamplingParams(0.0), scheme, **limits)
        wanted = wanted if scheme is None else drawn_ids(engine_of(compile=False), requests)
        engine = engine_of()
        found = drawn_ids(engine, requests)
        section.check(f"greedy ids, {name}, compiled", 1 - share_of_equal(found, wanted), 0, how)
        with resting(engine, 1):  # the cache moves to other addresses, and graphs that read the old ones find NaN
            taken = [torch.full_like(tensor, math.nan) for tensor in engine.rows.cache.tensors()]
        different = 1 - share_of_equal(drawn_ids(engine, requests), found)
        del taken
        section.check(f"greedy ids, {name}, compiled, after --sleep 1", different, 0, "share that differs from before")


@torch.inference_mode()
def check_slots(section: Section) -> None:
    """Compares samples drawn with 1 and 64 slots: equal in fp32; in bf16, other rounding may change some."""
    num_prompts, num_samples, new_tokens = (2, 3, 6) if section.small else (8, 8, 24)
    torch.manual_seed(2)
    prompts = [random_ids(VOCAB_SIZE, 5 + 9 * i).tolist() for i in range(num_prompts)]
    requests = [Request(i, j, prompts[i], new_tokens) for i in range(num_prompts) for j in range(num_samples)]
    for dtype in (torch.float32, torch.bfloat16):
        found = {}
        for slots in (1, 64):
            limits = {"num_slots": slots, "max_seq_len": len(prompts[-1]) + new_tokens}
            few = requests[:8] if slots == 1 else requests
            found[slots] = drawn_ids(llama_engine(section, dtype, SamplingParams(1.0), **limits), few)
        equal = share_of_equal(found[1], found[64][: len(found[1])])
        name = f"samples of 1 and 64 slots, {dtype_name(dtype)}"
        if dtype == torch.float32:
            section.check(name, 1 - equal, 0, "share that differs")
        else:
            section.figure(name, equal, "equal", None, "products of other shapes round differently")


@torch.inference_mode()
def check_chunks(section: Section) -> None:
    """Compares log-probs of first tokens, in bf16, of prompts computed in pieces of 64 tokens and at once."""
    torch.manual_seed(3)
    prompts = [random_ids(VOCAB_SIZE, n).tolist() for n in (40, 150, 300)]
    found = []
    for prefill_tokens in (64, 4096):
        limits = {"num_slots": 3, "max_seq_len": 304, "prefill_tokens": prefill_tokens, "compile": False}
        engine = llama_engine(section, torch.bfloat16, SamplingParams(0.0), **limits)
        done = sorted(
            engine.generate([Request(i, 0, p, 1) for i, p in enumerate(prompts)]), key=lambda c: c.request.idx
        )
        found.append(torch.tensor([completion.logprobs[0] for completion in done]))
    distance = (found[0] - found[1]).abs().max().item()
    section.check("prefill in pieces and at once, bfloat16", distance, 0.1, "largest difference of a log-prob")


# -------------------------------------------------------------------------------------- products


def check_products(section: Section) -> None:
    """Compares products of quantised weights with products of the dequantised weights in fp64, relatively."""
    runtime, (N, K) = section.runtime, (64, 128) if section.small else (1008, 1024)  # 1008: 7 blocks of 128 and a part
    torch.manual_seed(4)
    weight = torch.randn(N, K, device=runtime.device) * 0.05
    for scheme in SCHEMES:
        if (refusal := refusal_of(scheme, runtime)) is not None:
            section.note(f"product of {scheme}", f"not here: {refusal}")
            continue
        small = quantize(weight.to(torch.bfloat16), scheme)
        layer = QuantizedLinear([small], None, scheme, runtime.dtype)
        for rows in (1, 5, 64, 200):
            x = torch.randn(rows, K, device=runtime.device).to(runtime.dtype)
            with torch.inference_mode():
                distance = product_distance(layer(x), x, dequantize(small))
            # fp8 also rounds activations, to 3 mantissa bits
            bound = 0.06 if scheme.mode == "fp8" else 0.02
            name = f"product of {scheme}, {counted(rows, 'row')}, {dtype_name(runtime.dtype)}"
            section.check(name, distance, bound, "relative")
        if layer.kernel == "triton":
            x = torch.randn(64, K, device=runtime.device).to(runtime.dtype)
            with torch.inference_mode():
                apart = largest((layer(x[:rows])[0] - layer(x[:1])[0]).abs().max().item() for rows in (5, 17, 33, 64))
            section.check(f"product of {scheme}, a row alone and among others", apart, 0, "largest difference")


def check_kernels(section: Section) -> None:
    """Compares products of random integers in the kernel's other forms with products of their values."""
    device, (N, K) = section.runtime.device, (72, 256) if section.small else (1000, 1152)
    torch.manual_seed(8)
    for scheme, splits, dtype in KERNELS:
        small = random_weight(N, K, scheme, device)
        if has_triton(device):
            product, how = triton_products(small, scheme, splits), counted(splits, "split")
        else:
            product, how = QuantizedLinear([small], None, scheme, dtype), "as layers compute it here"
        inputs = [torch.randn(rows, K, device=device).to(dtype) for rows in (1, 7, 64)]
        with torch.inference_mode():
            distance = largest(product_distance(product(x), x, dequantize(small)) for x in inputs)
        name = f"product of {scheme}, 1 to 64 rows, {dtype_name(dtype)}, {how}"
        section.check(name, distance, 1e-5 if dtype == torch.float32 else 0.01, "relative")


def random_weight(N: int, K: int, scheme: Scheme, device: torch.device) -> Quantized:
    low, high, dtype = (0, 16, torch.uint8) if scheme.mode == "int4" else (-127, 128, torch.int8)
    groups, options = (N, scheme.num_groups(K)), {"dtype": dtype, "device": device}
    values, scale = torch.randint(low, high, (N, K), **options), torch.rand(groups, device=device).bfloat16()
    return Quantized(values, scale, None if scheme.symmetric else torch.randint(low, high, groups, **options))


def refusal_of(scheme: Scheme, runtime: Runtime) -> str | None:
    """Returns why this device cannot compute with such weights, or None."""
    if runtime.device.type == "cpu" and scheme.mode == "fp8":
        return "fp8 is for GPUs"
    try:
        check_scheme(scheme, SIZES["1b"], runtime.device, runtime.dtype, 1)
    except ValueError as error:
        return str(error)
    return None


def product_distance(found: Tensor, x: Tensor, weight: Tensor) -> float:
    wanted = F.linear(x.double(), weight.double())
    return ((found.double() - wanted).norm() / wanted.norm()).item()


# --------------------------------------------------------------------------------------- training


def check_gradients(section: Section) -> None:
    """Compares gradients of the training kernels, in the compute dtype, with gradients in fp32 on the CPU."""
    runtime, (H, K, D, T) = section.runtime, (8, 2, 64, 192)  # cuDNN's have been wrong for T % 128 = 64
    torch.manual_seed(6)
    heads, rows = [torch.randn(2, T, n, D) for n in (H, K, K)], [torch.randn(300, D), 0.2 * torch.randn(700, D)]
    targets = torch.randint(700, (300,))

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return document_attention([[100, 60, 32], [192]], T, q.device, q.dtype, D)(0, q, k, v)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets.to(hidden.device)) / 300

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.stack(linear_logprobs(hidden, weight, targets.to(hidden.device), temperature=0.7, entropy=True))

    whole, chunked = nullcontext(), few_tokens_at_once(runtime.device)
    for name, function, inputs, how in (
        ("attention", partial(causal_attention, 0), heads, whole),
        ("packed attention", packed, heads, whole),
        ("the head's loss", loss, rows, whole),
        ("the head's loss in chunks", loss, rows, chunked),
        ("log-probs and entropies", logprobs, rows, whole),
        ("log-probs and entropies in chunks", logprobs, rows, chunked),
    ):
        inputs = [x.to(runtime.dtype) for x in inputs]
        with how:
            found = gradients(function, [x.to(runtime.device) for x in inputs])
        wanted = gradients(function, [x.float() for x in inputs])
        distance = largest(((a.float().cpu() - b).norm() / b.norm()).item() for a, b in zip(found, wanted))
        section.check(f"gradients of {name}, {dtype_name(runtime.dtype)}", distance, 0.03, "relative")


def few_tokens_at_once(device: torch.device) -> AbstractContextManager:
    """Context in which the head computes 128 tokens at a time, as it does with more when their logits are large."""
    fused = fused_head(device)
    if fused is None:
        return mock.patch.object(vocab_parallel, "CHUNK_TOKENS", 128)
    return mock.patch.object(fused, "rows_at_once", lambda *sizes: 128)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs).float().square().sum(), inputs)


def check_optimizer(section: Section) -> None:
    """Compares AdamW's kernel for bf16 weights with plain operations; the last bit may differ, since plain operations
    divide by a number by multiplying by its reciprocal."""
    device = section.runtime.device
    if optim.gpu_kernel(device) is None:
        section.note("AdamW", "its kernel needs a GPU; tests run it in Triton's interpreter")
        return
    for kind in ("adamw", "adamw_8bit"):
        ends = []
        for has_kernel in (True, False):
            torch.manual_seed(7)
            layer = nn.Linear(512, 300, device=device, dtype=torch.bfloat16)
            update = optim.make_optimizer(layer, optim.OptimArgs(optim=kind, learning_rate=1e-2, weight_decay=0.1))
            update.kernel = update.kernel if has_kernel else None
            for _ in range(3):
                for parameter in layer.parameters():
                    parameter.grad = torch.randn_like(parameter)
                update.step()
            ends.append(torch.cat([parameter.detach().flatten() for parameter in layer.parameters()]))
        share = (ends[0] != ends[1]).float().mean().item()
        section.check(f"{kind}, bf16 weights", share, 1e-3, "share that differs from plain operations'")


ITEMS = [
    Item("training begins", 0, start_training),  # in the background, since it takes longest
    Item("Triton", 0, check_triton),
    Item("decode attention", 10, check_attention),
    Item("greedy ids", 10, check_greedy),
    Item("products", 10, check_products),
    Item("top-p", 1, check_top_p),
    Item("gradients", 5, check_gradients),
    Item("AdamW", 5, check_optimizer),
    Item("compiled", 27, check_compiled),
    Item("kernels of products", 6, check_kernels),
    Item("prefill", 5, check_chunks),
    Item("training", 3, check_training),
    Item("slots", 38, check_slots),
]
