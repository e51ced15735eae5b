"""Simulates generation on a GPU that is not at hand: the engine's scheduler draws many samples of MATH-like problems.

- the engine is the real one (models/generation.py): admission, pages, shared prefixes, prefill, preemption. It runs a
  tiny model without attention, which takes the same steps as the large model would
- the clock is a roofline: a decode step or prefill takes the time to read its weights and cache, or that of its matrix
  products if longer, plus an overhead
- the shares of the datasheet's peaks that kernels reach are assumed, and printed; nothing about the scheduler is

    python scripts/simulate.py --gpus H100 H200 MI300X
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

import torch
from torch import Tensor

from models.attention import Attend
from models.common import (
    Bounds,
    Runtime,
    at_least_one,
    card,
    flag,
    fraction,
    non_negative,
    progress_bar,
    say,
)
from models.config import ModelConfig
from models.generation import PREFILL_TOKENS, Engine, Request
from models.gpu import PEAKS
from models.paged_cache import Chunk
from models.pages import PAGE, pages_for
from models.sampling import SamplingParams
from models.script import run_script
from scripts.benchmark_common import PresetArgs
from scripts.benchmark_generate import num_product_weights, random_inference_model
from scripts.workload import MathArgs, counted, math_requests, token_bytes

MEMORY = {"H100": 80e9, "H200": 141e9, "MI300X": 192e9, "A100": 80e9}  # bytes; A100: 80 GB at the 40 GB card's speed
STAND_IN = ModelConfig(16, 8, 8, 1, 1, 1, 8, 2**20)  # the model that the engine runs
BYTES = 2  # bytes of a weight and of an element of the cache: bf16


@dataclass(frozen=True, kw_only=True)
class SimulateArgs(MathArgs, PresetArgs):
    """Runs a MATH-shaped workload through the real scheduler, with a clock made from a GPU's datasheet."""

    preset: str = "math-7b"
    gpus: list[str] = flag(("H100", "H200", "MI300X"), choices=MEMORY, help="GPUs to simulate")
    batch_size: int = flag(512, bounds=at_least_one, help="number of slots: the most sequences decoded together")
    num_pages: int | None = flag(None, bounds=at_least_one, help=f"pages of {PAGE} tokens; default: as memory allows")
    memory_share: float = flag(0.9, bounds=fraction, help="share of the GPU's memory for weights and pages")
    look_every: int = flag(4, bounds=at_least_one, help="decode steps after which the host reads tokens")
    prefill_tokens: int = flag(PREFILL_TOKENS, bounds=at_least_one, help="most tokens of one prefill")
    bandwidth_share: float = flag(0.7, bounds=Bounds(above=0, most=1), help="share of peak bandwidth in decode steps")
    flops_share: float = flag(0.5, bounds=Bounds(above=0, most=1), help="share of the peak bf16 FLOP/s in products")
    host_us: float = flag(
        4.7,
        bounds=non_negative,
        help="host time in microseconds for each row whenever it reads tokens, overlapped with the device",
    )
    step_us: float = flag(100.0, bounds=non_negative, help="overhead of a step in microseconds, such as launches")


class Clock:
    """Replaces an engine's cache, and counts the bytes and FLOPs of each step of the large model.

    Every row of a step reads the cache of its context, also a row that has ended and waits for the host to read its
    tokens; an empty row reads one token.
    """

    def __init__(self, engine: Engine, config: ModelConfig, args: SimulateArgs, gpu: str):
        self.engine, self.pool, self.config, self.args = engine, engine.pool, config, args
        flops, bandwidth = PEAKS[gpu]
        self.flops, self.bandwidth = flops * args.flops_share, bandwidth * args.bandwidth_share
        self.overhead = args.step_us / 1e6
        self.weights = num_product_weights(config)  # of the embedding, a step reads one row for each slot
        self.seconds, self.steps, self.prefills, self.prompt_tokens, self.cached = 0.0, 0, 0, 0, 0
        self.look_began, self.longest_pause, self.host_waits = 0.0, 0.0, 0.0
        self.pages: list[int] = []
        cache = engine.rows.cache
        cache.prefill, cache.decode, cache.copy_pages = self.prefill, self.decode, lambda *pages: None

    def _add(self, tokens: int, contexts: float, read: float) -> None:
        """Adds a step of `tokens` tokens that attend to `contexts` tokens in all and read `read` from the cache."""
        config = self.config
        flops = 2 * self.weights * tokens
        flops += 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * contexts
        seconds = max((BYTES * self.weights + read * token_bytes(config, BYTES)) / self.bandwidth, flops / self.flops)
        self.seconds += seconds + self.overhead

    def _look(self) -> None:
        """Begins the next look_every steps, once the host has processed the tokens of the last ones."""
        host = len(self.engine.scheduler.running) * self.args.host_us / 1e6
        wait = max(0.0, self.look_began + host - self.seconds)
        self.host_waits += wait
        self.seconds += wait
        self.look_began = self.seconds

    def prefill(self, chunks: list[Chunk]) -> Attend:
        contexts = sum(chunk.length * (chunk.start + chunk.length / 2) for chunk in chunks)
        count = sum(chunk.length for chunk in chunks)
        before = self.seconds
        self._add(count, contexts, sum(chunk.start + chunk.length for chunk in chunks))
        if self.engine.scheduler.running:
            self.longest_pause = max(self.longest_pause, self.seconds - before)
        self.prefills += 1
        self.prompt_tokens += count
        return no_attention

    def decode(self, positions: Tensor, most_pages: int | None) -> Attend:
        if self.steps % self.args.look_every == 0:
            self._look()
        read = int(positions.sum()) + len(positions)
        self._add(len(positions), read, read)
        self.steps += 1
        self.cached += read
        self.pages.append(self.pool.num_pages - self.pool.num_free)
        return no_attention


def no_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.zeros_like(q)


def pages_that_fit(config: ModelConfig, args: SimulateArgs, gpu: str) -> int:
    """Number of pages that fit beside the weights."""
    free = args.memory_share * MEMORY[gpu] - BYTES * config.num_parameters()
    return max(0, int(free // (PAGE * token_bytes(config, BYTES))))


def simulate(args: SimulateArgs, requests: Iterable[Request], num_pages: int, gpu: str) -> dict:
    """Returns the figures of one GPU. Every request runs to its max_new_tokens; the scheduler uses this number only at
    an answer's last page. Raises ValueError if the pages do not hold the longest request."""
    requests = list(requests)
    runtime = Runtime(torch.device("cpu"), torch.float32, False)
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    needed = pages_for(-(-longest // 8) * 8)
    if num_pages < needed:
        source = f"--preset {args.preset}: beside its weights {gpu} holds" if args.num_pages is None else "--num_pages:"
        raise ValueError(f"{source} {num_pages} pages of {PAGE} tokens; the longest answer takes {needed}")
    engine = Engine(
        random_inference_model(STAND_IN, runtime),
        SamplingParams(),
        num_slots=args.batch_size,
        max_seq_len=longest,
        num_pages=num_pages,
        look_every=args.look_every,
        prefill_tokens=args.prefill_tokens,
    )
    engine.looks_ahead = 1  # as on a GPU: the host processes tokens while the next steps run
    clock, drawn, full = Clock(engine, args.config, args, gpu), 0, None

    def waiting() -> Iterator[Request]:
        nonlocal full
        yield from requests
        full = (drawn, clock.seconds)  # from now on rows stay empty

    def count(request: Request, token: int) -> None:
        nonlocal drawn
        drawn += 1

    answers = progress_bar(iterable=engine.generate(waiting(), count), total=len(requests), desc=gpu, leave=False)
    num_done = sum(1 for _ in answers)
    if num_done != len(requests) or drawn != sum(request.max_new_tokens for request in requests):
        raise RuntimeError(f"of {len(requests)} answers the scheduler finished {num_done}, with {drawn} tokens")
    return figures(args.config, clock, requests, full or (drawn, clock.seconds), engine)


def figures(config: ModelConfig, clock: Clock, requests: list[Request], full: tuple, engine: Engine) -> dict:
    """full: (tokens, seconds) up to the moment when the last request got a row."""
    tokens = sum(request.max_new_tokens for request in requests)
    steps = tokens - len(requests)  # the prefill gives the first token of an answer
    needed = sum((n - 1) * len(r.prompt_ids) + n * (n - 1) // 2 for r in requests for n in [r.max_new_tokens])
    weights = BYTES * clock.weights * clock.steps
    read, least = (weights + count * token_bytes(config, BYTES) for count in (clock.cached, needed))
    return {
        "tokens": tokens,
        "seconds": clock.seconds,
        "tokens_per_second": tokens / clock.seconds,
        "tokens_per_second_full": full[0] / full[1] if full[1] else None,
        "steps": clock.steps,
        "mean_rows": steps / max(1, clock.steps),
        "num_pages": engine.pool.num_pages,
        "mean_pages": sum(clock.pages) / max(1, len(clock.pages)),
        "most_pages": max(clock.pages, default=0),
        "bytes_read": read,
        "bytes_needed": least,
        "read_to_needed": read / max(1, least),
        "cached_tokens_read": clock.cached,
        "cached_tokens_needed": needed,
        "prompt_tokens": clock.prompt_tokens,
        "prefills": clock.prefills,
        "preempted": engine.scheduler.num_preempted,
        "host_waits": clock.host_waits,
        "longest_pause": clock.longest_pause,
    }


def rows_of(found: dict, args: SimulateArgs, gpu: str) -> dict[str, str]:
    """Formats the figures of one GPU as rows of the card."""
    flops, bandwidth = PEAKS[gpu]
    tokens = found["tokens"] / (args.num_prompts * args.num_samples)
    full = found["tokens_per_second_full"]
    waiting = f", {full:,.0f} while answers wait for a row" if full else ""
    return {
        "work": f"{counted(args.num_prompts, 'prompt')} x {counted(args.num_samples, 'answer')} of {tokens:,.0f} "
        f"tokens, at most {args.answer_most:,}",
        "clock": f"{args.bandwidth_share:.0%} of {bandwidth / 1e12:.2f} TB/s, {args.flops_share:.0%} of "
        f"{flops / 1e12:,.0f} TFLOP/s, {args.step_us:.0f} us a step, {args.host_us:g} us of the host "
        "for each row whose tokens it reads",
        "speed": f"{found['tokens_per_second']:,.0f} tok/s" + waiting,
        "rows": f"{found['mean_rows']:,.0f} of {args.batch_size} on average, {found['steps']:,} steps",
        "pages": f"{found['mean_pages']:,.0f} of {found['num_pages']:,} on average, {found['most_pages']:,} at most",
        "bytes": f"{found['bytes_read'] / 1e12:,.2f} TB read, {found['read_to_needed']:.3f} times the needed bytes",
        "prefill": f"{found['prompt_tokens']:,} tokens in {counted(found['prefills'], 'step')}, "
        f"{counted(found['preempted'], 'answer')} computed again; "
        f"running answers wait for it {1e3 * found['longest_pause']:.0f} ms at most",
        "host": f"the device waits for it {found['host_waits']:.2f} s of {found['seconds']:,.1f} s",
    }


def main(args: SimulateArgs) -> None:
    requests, result = list(math_requests(args, STAND_IN.vocab_size)), {}
    for gpu in args.gpus:
        result[gpu] = simulate(args, requests, args.num_pages or pages_that_fit(args.config, args, gpu), gpu)
        say(card(f"{args.preset} on {gpu}, simulated", rows_of(result[gpu], args, gpu)))
    say(json.dumps({"job": "simulate", "preset": args.preset, "gpus": result}))


if __name__ == "__main__":
    run_script(main, SimulateArgs)
