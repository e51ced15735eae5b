"""vLLM as a peer of scripts/benchmark.py, if it is installed."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from models.common import Runtime, dtype_name
from scripts.benchmark_common import seconds_of
from scripts.peer_transformers import mode, refuse_quantized, required
from scripts.workload import random_ids

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def generate(args, runtime: Runtime) -> dict:
    """Runs LLM.generate() with vLLM's own random weights; in eager mode with --no-compile."""
    version = required("vllm")
    refuse_quantized(args)
    import vllm

    config, sizes = args.config, args.work()
    prompts = [{"prompt_token_ids": random_ids(config.vocab_size, prompt_len).tolist()} for prompt_len, _ in sizes]
    params = [vllm.SamplingParams(max_tokens=n, ignore_eos=True, detokenize=False) for _, n in sizes]
    with tempfile.TemporaryDirectory() as folder:
        named = {**asdict(config), "architectures": [ARCHITECTURES[config.model_type]]}
        (Path(folder) / "config.json").write_text(json.dumps(named))
        llm = vllm.LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=dtype_name(runtime.dtype),
            enforce_eager=not runtime.compile,
            max_num_seqs=args.batch_size,
            enable_prefix_caching=False,  # runs repeat the same prompts
            max_model_len=max(map(sum, sizes)),
        )
        seconds = seconds_of(lambda: llm.generate(prompts, params, use_tqdm=False), runtime.device, args.repeats)
    return {
        "tokens_per_second": sum(n for _, n in sizes) / seconds,
        "ran": f"{version} LLM.generate(), {mode(runtime)}",
        "peak_memory": 0,  # unknown: vLLM's own process reserves all memory
    }
