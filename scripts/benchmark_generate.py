"""The job `generate` of scripts/benchmark.py: decode and prefill rates of the engine."""

import statistics
import time

import torch

from models.decode import can_pack, to_inference, weight_bytes
from models.generation import Engine, Request, SamplingParams
from models.model import ModelConfig, Transformer


def generate_setting(options: dict) -> str:
    return "{batch_size} slots, {prompt_len} + {new_tokens} tokens".format(**options)


@torch.inference_mode()
def measure_generate(config: ModelConfig, runtime, repeats: int, options: dict) -> dict:
    with torch.device("meta"):
        model = Transformer(config).to(runtime.dtype)
    model.to_empty(device=runtime.device).init_weights()
    model.reset_buffers(runtime.device)
    to_inference(model, pack=not runtime.compile and can_pack(runtime.device, runtime.dtype))
    batch, prompt_len, new_tokens = (options[name] for name in ("batch_size", "prompt_len", "new_tokens"))
    engine = Engine(
        model,
        SamplingParams(),
        num_slots=batch,
        max_seq_len=prompt_len + new_tokens,
        compile=runtime.compile,
    )
    prompts = torch.randint(3, config.vocab_size, (batch, prompt_len)).tolist()
    results = []
    for _ in range(repeats + 1):
        engine.reset_stats()
        start = time.perf_counter()
        for _ in engine.generate([Request(i, 0, prompt, new_tokens) for i, prompt in enumerate(prompts)]):
            pass
        seconds = time.perf_counter() - start
        read = engine.num_steps * weight_bytes(model) + engine.cache_bytes_read
        results.append((batch * new_tokens / seconds, read / max(engine.decode_seconds, 1e-9), engine.decode_seconds))
    rate, bandwidth, decode = (statistics.median(column) for column in zip(*results[1:]))
    return {
        "tokens_per_second": rate,
        "bytes_per_second": bandwidth,
        "ms_per_step": 1e3 * decode / engine.num_steps,
    }
