"""Speed beside the physical limit, with random weights: scripts/benchmark.py JOB.

- the ceilings (a matrix product, a copy) are measured in the same run, so MFU and MBU mean something on any machine
- generate: tokens/s, time to the first token and MBU of the engine, for a batch size, a sweep of them, or ragged work
  in few slots; in any precision, over tensor-parallel ranks. sft, dpo: tokens/s of whole optimizer steps
- ppo: the split of an update of training/train_ppo.py, its rollouts beside the engine alone, its memory on paper
- grpo: a policy update on ragged answers, padded and packed in turns
- memory: what a training run needs on each rank, on paper for any layout, and with --measure held against this machine
- data: what tokenising costs for chats of 1, 4 and 16 turns
- generate, sft and dpo have peers (scripts/benchmark_peers.py): --compare runs --peer on the same shape, precision,
  sampling and compile mode in alternating processes and prints the ratios; one process's timing alone says little on a
  shared machine
- the last line is JSON; each job is a file of its own, with its own flags: benchmark.py JOB --help

    python scripts/benchmark.py generate --preset 134m --dtype bfloat16 --batch_size 8 --prompt_len 64 --new_tokens 128
    python scripts/benchmark.py memory --preset 7b --layouts 1x1 8x1 4x2
"""

import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.common import flag, run_script
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
    """Speed beside the physical limit, with random weights. The job comes first; benchmark.py JOB --help shows its
    flags."""

    job: str = flag(choices=JOBS, help="what to measure", positional=True)


def main(args: BenchmarkArgs) -> None:
    raise ValueError(f"the job comes first: benchmark.py {args.job} ...")


def main_of(arguments: Sequence[str]) -> Callable:
    """The main of the job that a command line names; where it names none, one that can only complain."""
    return JOBS.get(arguments[0], main) if arguments else main


if __name__ == "__main__":
    chosen = main_of(sys.argv[1:])
    run_script(chosen, typing.get_type_hints(chosen)["args"])
