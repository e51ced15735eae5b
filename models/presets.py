"""The shapes of real models, as in their public config.json: for benchmarks with random weights, and for reference.

Loading a folder reads its own config.json, and nothing here.
"""

import math
from dataclasses import replace
from functools import partial

from models.config import ModelConfig

_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_32_ROPE = {**_LLAMA_3_ROPE, "factor": 32.0}
_LLAMA_31_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5, 5e5, _LLAMA_3_ROPE)
_LLAMA_31_70B = ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, 131072, 1e-5, 5e5, _LLAMA_3_ROPE)
_QWEN2, _QWEN3 = partial(ModelConfig, model_type="qwen2"), partial(ModelConfig, model_type="qwen3")
_QWEN25_15B = _QWEN2(151936, 1536, 8960, 28, 12, 2, 128, 131072, 1e-6, 1e6, tie_word_embeddings=True)
_QWEN25_7B = _QWEN2(152064, 3584, 18944, 28, 28, 4, 128, 131072, 1e-6, 1e6)
_QWEN3_8B = _QWEN3(151936, 4096, 12288, 36, 32, 8, 128, 40960, 1e-6, 1e6)
_R1_0528_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": 0.1 * math.log(4.0) + 1,
    "truncate": True,
}
# An -Instruct model with the numbers of its base is not listed again.
# vocabulary, hidden, ffn, layers, heads, key/value heads, head dim, context, eps of the norms, theta, scaling of RoPE
PRESETS = {
    "meta-llama/Llama-2-7b-chat-hf": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5),
    "meta-llama/Llama-2-13b-chat-hf": ModelConfig(32000, 5120, 13824, 40, 40, 40, 128, 4096, 1e-5),
    "meta-llama/Llama-2-70b-chat-hf": ModelConfig(32000, 8192, 28672, 80, 64, 8, 128, 4096, 1e-5),
    "codellama/CodeLlama-7b-Python-hf": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 16384, 1e-5, 1e6),
    "codellama/CodeLlama-34b-Python-hf": ModelConfig(32000, 8192, 22016, 48, 64, 8, 128, 16384, 1e-5, 1e6),
    "EleutherAI/llemma_7b": ModelConfig(32016, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5),
    "EleutherAI/llemma_34b": ModelConfig(32000, 8192, 22016, 48, 64, 8, 128, 4096, 1e-5, 1e6),
    "deepseek-ai/deepseek-llm-7b-base": ModelConfig(102400, 4096, 11008, 30, 32, 32, 128, 4096, 1e-6),
    "deepseek-ai/deepseek-math-7b-base": ModelConfig(102400, 4096, 11008, 30, 32, 32, 128, 4096, 1e-6),
    "deepseek-ai/deepseek-coder-6.7b-base": ModelConfig(
        32256, 4096, 11008, 32, 32, 32, 128, 16384, 1e-6, 1e5, {"rope_type": "linear", "factor": 4.0}
    ),
    "meta-llama/Meta-Llama-3-8B": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, 5e5),
    "meta-llama/Meta-Llama-3-70B": ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, 8192, 1e-5, 5e5),
    "meta-llama/Llama-3.1-8B": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_31_70B,
    "meta-llama/Llama-3.2-1B": ModelConfig(
        128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, 5e5, _LLAMA_32_ROPE, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.2-3B": ModelConfig(
        128256, 3072, 8192, 28, 24, 8, 128, 131072, 1e-5, 5e5, _LLAMA_32_ROPE, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_31_70B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA_31_8B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _LLAMA_31_70B,
    "Qwen/Qwen2.5-0.5B": _QWEN2(151936, 896, 4864, 24, 14, 2, 64, 32768, 1e-6, 1e6, tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B": _QWEN25_15B,
    "Qwen/Qwen2.5-1.5B-Instruct": replace(_QWEN25_15B, max_position_embeddings=32768),
    "Qwen/Qwen2.5-3B": _QWEN2(151936, 2048, 11008, 36, 16, 2, 128, 32768, 1e-6, 1e6, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B": _QWEN25_7B,
    "Qwen/Qwen2.5-7B-Instruct": replace(_QWEN25_7B, max_position_embeddings=32768),
    "Qwen/Qwen3-0.6B": _QWEN3(151936, 1024, 3072, 28, 16, 8, 128, 40960, 1e-6, 1e6, tie_word_embeddings=True),
    "Qwen/Qwen3-1.7B": _QWEN3(151936, 2048, 6144, 28, 16, 8, 128, 40960, 1e-6, 1e6, tie_word_embeddings=True),
    "Qwen/Qwen3-4B": _QWEN3(151936, 2560, 9728, 36, 32, 8, 128, 40960, 1e-6, 1e6, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": replace(_QWEN25_15B, rope_theta=1e4, tie_word_embeddings=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": replace(_QWEN25_7B, rope_theta=1e4),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _QWEN2(152064, 5120, 13824, 48, 40, 8, 128, 131072, 1e-5, 1e6),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _QWEN2(152064, 5120, 27648, 64, 40, 8, 128, 131072, 1e-5, 1e6),
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": replace(
        _QWEN3_8B, max_position_embeddings=131072, rope_scaling=_R1_0528_ROPE
    ),
}
