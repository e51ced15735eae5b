"""llama.cpp as a peer of the job `generate`, where the package xllamacpp, its prebuilt wheel, is installed.

Runs a GGUF file in a server of this process, without HTTP: the prompts are token ids, sent at once, `slots` of them are
decoded at a time, and ends are ignored, so that each answer has as many tokens as it is told. What it ran stands beside
its rate: the file, whose name and size tell the quantisation, threads and slots.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def measure_llama_cpp(
    gguf: Path, work: list[tuple[list[int], int]], *, slots: int, threads: int, repeats: int
) -> dict[str, float | str]:
    """The median tokens/s of `repeats` runs, prefill and decode, after one that does not count, as
    {"tokens_per_second", "ran"}. work: (ids of the prompt, tokens to generate) of each row. Raises ValueError without
    xllamacpp, or for a file that it does not take."""
    try:
        import xllamacpp
    except ImportError:
        raise ValueError("--llama_cpp_gguf needs xllamacpp: pip install it") from None
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_parallel, params.warmup = slots, False
    params.n_ctx = slots * (max(len(ids) + new for ids, new in work) + 8)
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

    rates = []
    with ThreadPoolExecutor(slots) as pool:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            list(pool.map(complete, work))
            rates.append(sum(new for _, new in work) / (time.perf_counter() - start))
    rate = sorted(rates[1:])[repeats // 2]
    ran = f"llama.cpp, {gguf.name}, {gguf.stat().st_size / 1e6:,.0f} MB, {threads} threads, {slots} slots"
    return {"tokens_per_second": rate, "ran": ran}
