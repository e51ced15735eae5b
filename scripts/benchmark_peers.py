"""Whom scripts/benchmark.py compares with, by job and name.

A peer is a function (args of the job, runtime, bandwidth of a copy) -> figures: `tokens_per_second`, and `ran`, what it
ran in words: package and version, path, precision, sampling, whether it was compiled. It does the job in the same
precision, with the same sampling and the same --compile, or raises ValueError. Packages are imported when they are
asked for.
"""

import torch

from models.common import Runtime
from scripts import peer_transformers, peer_trl, peer_vllm
from scripts.peer_transformers import required
from scripts.workload import random_ids


def llama_cpp(args, runtime: Runtime, bandwidth: float) -> dict:
    """A GGUF file of the same shape, on as many threads; its bits are the file's, so --quantize is left to who asks and
    both bits are said."""
    required("xllamacpp")
    if args.llama_cpp_gguf is None:
        raise ValueError("llama_cpp: give the file to run in --llama_cpp_gguf")
    from scripts.peer_llama_cpp import check_shape, measure_llama_cpp

    check_shape(args.llama_cpp_gguf, args.config)
    work = [(random_ids(args.config.vocab_size, prompt_len).tolist(), n) for prompt_len, n in args.work()]
    sizes = {"slots": args.batch_size, "threads": torch.get_num_threads(), "repeats": args.repeats}
    bits = 8 * args.llama_cpp_gguf.stat().st_size / args.config.num_parameters()
    return measure_llama_cpp(args.llama_cpp_gguf, work, **sizes) | {"bits": bits}


PEERS = {
    "generate": {
        "transformers": peer_transformers.generate,
        "generate_batch": peer_transformers.generate_batch,
        "vllm": peer_vllm.generate,
        "llama_cpp": llama_cpp,
    },
    "sft": {"transformers": peer_transformers.sft, "trl": peer_trl.sft},
    "dpo": {"trl": peer_trl.dpo},
}
