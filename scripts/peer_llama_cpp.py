"""llama.cpp as a peer of the job `generate`, if xllamacpp, a package with a prebuilt wheel of it, is installed.

Runs a GGUF file in a server inside this process, without HTTP. The prompts are token ids, all sent at once, of which
--batch_size are decoded at a time; EOS is ignored, so that each answer has the length asked for. The report names the
file with its size, which tell the quantisation, and the numbers of threads and slots.
"""

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch

from models.common import Runtime
from models.config import ModelConfig
from scripts.benchmark_common import seconds_of
from scripts.peer_transformers import required
from scripts.workload import counted, random_ids

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SHAPE = {  # fields of ModelConfig, and the keys of a GGUF file after its architecture's name
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}


def check_shape(gguf: Path, config: ModelConfig) -> None:
    """Raises ValueError unless a GGUF file holds a model of this shape, since other speeds are not comparable."""
    found = metadata(gguf)
    architecture = found.get("general.architecture")
    sizes = {name: found.get(f"{architecture}.{key}") for name, key in SHAPE.items()}
    sizes["vocab_size"] = found.get("tokenizer.ggml.tokens")
    wanted = {name: getattr(config, name) for name in sizes}
    other = [f"{name} {size}, not {wanted[name]}" for name, size in sizes.items() if size != wanted[name]]
    if other:
        raise ValueError(f"{gguf}: does not have the shape of --preset: {'; '.join(other)}")


def metadata(gguf: Path) -> dict[str, str | float | int]:
    """Returns keys and values of a GGUF file, with the lengths of arrays. Format: github.com/ggml-org/ggml,
    docs/gguf.md. Raises ValueError for another kind of file, OSError for one that cannot be read."""
    with open(gguf, "rb") as file:
        try:
            magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version < 2:
                raise ValueError
            return {_string(file): _value(file, *_scalar(file, "I")) for _ in range(count)}
        except (ValueError, KeyError, struct.error):
            raise ValueError(f"{gguf}: not a GGUF file") from None


def _scalar(file: BinaryIO, code: str) -> tuple:
    return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))


def _string(file: BinaryIO) -> str:
    return file.read(*_scalar(file, "Q")).decode()


def _value(file: BinaryIO, kind: int) -> str | float | int:
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        of, length = _scalar(file, "IQ")
        for _ in range(length):
            _value(file, of)
        return length
    return _scalar(file, SCALARS[kind])[0]


def generate(args, runtime: Runtime) -> dict:
    """Runs prefill and decode of --llama_cpp_gguf, a file of the same shape, on as many threads as torch. Choosing a
    comparable --quantize is up to the user; the bits of both are reported. Raises ValueError for unusable files."""
    required("xllamacpp")
    gguf, slots, threads = args.llama_cpp_gguf, args.batch_size, torch.get_num_threads()
    if gguf is None:
        raise ValueError("llama_cpp: give the file to run in --llama_cpp_gguf")
    check_shape(gguf, args.config)
    import xllamacpp

    work = [(random_ids(args.config.vocab_size, prompt_len).tolist(), new) for prompt_len, new in args.work()]
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_parallel, params.warmup = slots, False
    params.n_ctx = slots * (max(map(sum, args.work())) + 8)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ValueError(f"{gguf}: llama.cpp does not run it: {error}") from None

    def complete(row: tuple[list[int], int]) -> None:
        ids, new = row
        request = {"prompt": ids, "n_predict": new, "ignore_eos": True, "cache_prompt": False, "temperature": 1.0}
        done = server.handle_completions(request)
        if done.get("tokens_predicted", done.get("usage", {}).get("completion_tokens")) != new:
            raise ValueError(f"{gguf}: llama.cpp answered {str(done)[:200]}")

    with ThreadPoolExecutor(slots) as pool:
        seconds = seconds_of(lambda: list(pool.map(complete, work)), torch.device("cpu"), args.repeats)
    num_bytes, sizes = gguf.stat().st_size, f"{counted(threads, 'thread')}, {counted(slots, 'slot')}"
    return {
        "tokens_per_second": sum(new for _, new in work) / seconds,
        "ran": f"llama.cpp, {gguf.name}, {num_bytes / 1e6:,.0f} MB, {sizes}",
        "bits": 8 * num_bytes / args.config.num_parameters(),
    }
