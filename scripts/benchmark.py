"""Measures speed, next to the machine's limits, with random weights: scripts/benchmark.py JOB.

- the ceilings (rate of a matrix product, bandwidth of a copy) are measured in the same run, so MFU and MBU are
  meaningful on any machine
- generate: tokens/s, time to the first token and MBU of the engine, for one batch size, several, or ragged requests in
  few slots; in any precision, over tensor-parallel ranks. sft, dpo: tokens/s of whole optimizer steps
- ppo: time of each phase of a train_ppo.py update, its rollouts compared with the engine alone, computed memory
- grpo: a policy update on ragged answers, alternately padded and packed
- memory: computed memory of a training run on each rank, for any layout; --measure compares it with this machine
- data: time and memory of tokenising chats of 1, 4 and 16 turns
- generate, sft and dpo have peers (scripts/peer_*.py): --compare alternates with --peer, in separate processes
  with the same shape, precision, sampling and compile mode, and prints ratios, since single timings tell little on a
  shared machine
- the last line is JSON; each job is a file with its own flags: benchmark.py JOB --help

    python scripts/benchmark.py generate --preset 134m --dtype bfloat16 --batch_size 8 --prompt_len 64 --new_tokens 128
    python scripts/benchmark.py memory --preset 7b --layouts 1x1 8x1 4x2
"""

import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from models.common import flag
from models.script import run_script
from scripts import (
    benchmark_data,
    benchmark_dpo,
    benchmark_generate,
    benchmark_grpo,
    benchmark_memory,
    benchmark_ppo,
    benchmark_sft,
)

JOBS = {
    "generate": benchmark_generate.main,
    "sft": benchmark_sft.main,
    "dpo": benchmark_dpo.main,
    "ppo": benchmark_ppo.main,
    "grpo": benchmark_grpo.main,
    "memory": benchmark_memory.main,
    "data": benchmark_data.main,
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkArgs:
    """Measures speed, next to the machine's limits, with random weights. The job is the first argument;
    benchmark.py JOB --help shows its flags."""

    job: str = flag(choices=JOBS, help="what to measure", positional=True)


def main(args: BenchmarkArgs) -> None:
    raise ValueError(f"the job must be the first argument: benchmark.py {args.job} ...")


def main_of(arguments: Sequence[str]) -> Callable:
    """Returns the main function of the job that a command line begins with, else `main`, which raises ValueError."""
    return JOBS.get(arguments[0], main) if arguments else main


if __name__ == "__main__":
    chosen = main_of(sys.argv[1:])
    run_script(chosen, typing.get_type_hints(chosen)["args"])
