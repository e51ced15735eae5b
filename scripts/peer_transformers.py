"""transformers as a peer of scripts/benchmark.py: generate(), continuous batching, and a plain training loop."""

import importlib.metadata
import time
from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import nn

from models.common import DTYPES, Runtime, dtype_name
from models.config import ModelConfig
from scripts.benchmark_common import seconds_of
from scripts.workload import random_ids
from training.optim import make_optimizer


def required(*packages: str) -> str:
    """Returns names and versions of these packages, as text. Raises ValueError if one is missing."""
    try:
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"this peer needs {error.name}: pip install it here or for --peer_python") from None


def mode(runtime: Runtime) -> str:
    """Returns "compiled, bfloat16" or the like, for a peer's description of what it ran."""
    return f"{'compiled' if runtime.compile else 'eager'}, {dtype_name(runtime.dtype)}"


def build(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Builds transformers' model of this shape on the device, with random weights."""
    import transformers

    theirs = transformers.AutoConfig.for_model(**asdict(config))
    with device:
        return transformers.AutoModelForCausalLM.from_config(theirs, dtype=dtype)


def plain_sampling(new_tokens: int) -> dict:
    """Settings of generate() that equal our SamplingParams(): the whole softmax at temperature 1, no EOS."""
    whole = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0, **whole}


def refuse_quantized(args) -> None:
    if args.quantize != "none":
        raise ValueError("--quantize: this peer runs unquantised weights, so compare it without")


@torch.inference_mode()
def generate(args, runtime: Runtime) -> dict:
    """Runs generate() in static batches, sorted by the lengths of prompts; --compile uses a static cache, with which
    transformers compiles its forward."""
    version = required("transformers")
    refuse_quantized(args)
    config, device = args.config, runtime.device
    model = build(config, runtime.dtype, device).eval()
    options = {"cache_implementation": "static", "compile_config": compile_config()} if runtime.compile else {}
    sizes, batches = sorted(args.work()), []
    for start in range(0, len(sizes), args.batch_size):
        rows = sizes[start : start + args.batch_size]
        longest, new_tokens = (max(column) for column in zip(*rows))
        padding = longest - torch.tensor([prompt_len for prompt_len, _ in rows], device=device)
        mask = (torch.arange(longest, device=device) >= padding[:, None]).long()
        ids = random_ids(config.vocab_size, len(rows), longest).to(device)
        batches.append({"inputs": ids, "attention_mask": mask, **plain_sampling(new_tokens), **options})

    def run() -> None:
        for batch in batches:
            model.generate(**batch)

    rate = sum(new_tokens for _, new_tokens in sizes) / seconds_of(run, device, args.repeats)
    # generate() does not say whether it compiled; this attribute shows it
    how = "static cache, compiled" if hasattr(model, "_compiled_call") else "dynamic cache, eager"
    return {"tokens_per_second": rate, "ran": f"{version} generate(), {how}, {dtype_name(runtime.dtype)}"}


def compile_config():
    import transformers

    config = transformers.CompileConfig()
    config._compile_all_devices = True  # else it does not compile on a CPU
    return config


def generate_batch(args, runtime: Runtime) -> dict:
    """Runs transformers' continuous batching, as generate_batch() does, with a length for each request."""
    version = required("transformers")
    refuse_quantized(args)
    import transformers

    config = args.config
    model = build(config, runtime.dtype, runtime.device).eval()
    most = max(new_tokens for _, new_tokens in args.work())
    settings = transformers.GenerationConfig(**(plain_sampling(most) | {"eos_token_id": -1}))
    batching = transformers.ContinuousBatchingConfig(max_requests_per_batch=args.batch_size)
    batching.allow_block_sharing = False  # runs repeat the same prompts
    if runtime.compile:
        batching.default_compile_level = 1
    if runtime.device.type == "cpu":  # else the cache takes most of the machine's memory
        page = getattr(batching, "page_size", None) or batching.block_size  # its name until transformers 5.17
        batching.num_blocks = max(64, sum(-(-sum(sizes) // page) for sizes in args.work()))
        batching.max_batch_tokens = max(512, *(prompt_len for prompt_len, _ in args.work()))
    options = {"generation_config": settings, "continuous_batching_config": batching}
    requests = [(random_ids(config.vocab_size, prompt_len).tolist(), n) for prompt_len, n in args.work()]
    with model.continuous_batching_context_manager(**options) as manager:

        def run() -> None:
            for ids, new_tokens in requests:
                manager.add_request(ids, max_new_tokens=new_tokens)
            drawn, end = 0, time.monotonic() + 600
            while drawn < len(requests):
                result = manager.get_result(timeout=1)
                if result is not None and result.error:
                    raise ValueError(f"generate_batch: {result.error}")
                if result is None and (not manager.is_running() or time.monotonic() > end):
                    raise ValueError("generate_batch ended before its requests")
                drawn += result is not None and result.is_finished()

        rate = sum(n for _, n in requests) / seconds_of(run, runtime.device, args.repeats)
    return {"tokens_per_second": rate, "ran": f"{version} continuous batching (generate_batch), {mode(runtime)}"}


def sft(args, runtime: Runtime) -> dict:
    """Plain loop, transformers' loss, our optimizer: fp32 weights with autocast, or --param_dtype bfloat16 without."""
    version = required("transformers")
    device, param_dtype = runtime.device, DTYPES[args.param_dtype]
    model = build(args.config, param_dtype, device).train()
    if args.lora_r is not None:  # as in TRL: the base in the compute dtype, adapters in fp32
        version += f", {required('peft')}"
        if args.quantize_base != "none":
            raise ValueError("--quantize_base: PEFT has other formats, so it cannot be compared")
        import peft

        settings = peft.LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear")
        model = peft.get_peft_model(model.to(runtime.dtype), settings).train()
    if args.activation_checkpointing == "selective":
        raise ValueError("--activation_checkpointing selective: transformers knows none and full")
    if args.activation_checkpointing == "full":
        model.gradient_checkpointing_enable()
    if runtime.compile:
        model.compile()
    optimizer = make_optimizer(model, args.optimizer(), compile=runtime.compile)
    ids = random_ids(args.config.vocab_size, args.batch_size, args.seq_len).to(device)
    casting = runtime.dtype != param_dtype

    def step() -> None:
        with torch.autocast(device.type, runtime.dtype) if casting else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    precision = f"{mode(runtime)}{' autocast' if casting else ''} on {args.param_dtype} weights"
    return {
        "tokens_per_second": ids.numel() / seconds_of(step, device, args.repeats),
        "ran": f"{version} model in a plain loop with our {args.optim}, {precision}",
    }
