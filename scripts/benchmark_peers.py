"""The peers of scripts/benchmark.py, by job and name.

A peer is a function (args of the job, runtime) -> figures: `tokens_per_second`, and `ran`, a text that names package,
version, path, precision, sampling and whether it was compiled. It does the job in the same precision, with the same
sampling and the same --compile, or raises ValueError. Its package is imported when it is called.
"""

from scripts import peer_llama_cpp, peer_transformers, peer_trl, peer_vllm

PEERS = {
    "generate": {
        "transformers": peer_transformers.generate,
        "generate_batch": peer_transformers.generate_batch,
        "vllm": peer_vllm.generate,
        "llama_cpp": peer_llama_cpp.generate,
    },
    "sft": {"transformers": peer_transformers.sft, "trl": peer_trl.sft},
    "dpo": {"trl": peer_trl.dpo},
}
