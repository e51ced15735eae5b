"""Runs training scripts for several settings in the ranks of one torchrun launch, and keeps each run's gradients.
Checkpoints are asynchronous, as on GPUs.

    torchrun --nproc-per-node 4 tests/training/parallel_worker.py JOBS.json

JOBS.json: a list of [SCRIPT, *arguments], SCRIPT being finetune_sft or another module of training/. Beside each
--output_dir, OUT.gradients.pt holds the gradients of every step.
["rewind", RUN, COPY, STEP] copies a finished run as it was when it had saved that step.
"""

import importlib
import json
import os
import shutil
import sys
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist

from models.common import end_process, parse_args
from models.fsdp import clip_grad_norm
from training import run_dir
from training.run_dir import CheckpointWriter

torch.set_num_threads(1)
if os.environ.get("FAULT"):  # tests/training/test_parallel.py plants these to see that it notices
    from tests.training import faults

    faults.plant(os.environ["FAULT"])


def rewind(run: str, copy: str, step: str) -> None:
    if dist.get_rank() == 0:
        for name in ("args.json", "metrics.jsonl", f"checkpoints/step-{int(step):06d}"):
            target = Path(copy) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if target.name.startswith("step-") else shutil.copyfile)(Path(run) / name, target)
    dist.barrier()


def asynchronous_writer(*args, **options) -> CheckpointWriter:
    return CheckpointWriter(*args, **{**options, "asynchronous": True})


def main(jobs: list[list[str]]) -> None:
    for name, *arguments in jobs:
        if name == "rewind":
            rewind(*arguments)
            continue
        script = importlib.import_module(f"training.{name}")
        steps = []

        def recording_clip(model, max_norm, steps=steps):
            steps.append({name: p.grad.full_tensor().clone() for name, p in model.named_parameters()})
            return clip_grad_norm(model, max_norm)

        script.clip_grad_norm = recording_clip
        run_dir.CheckpointWriter = asynchronous_writer
        args = parse_args(typing.get_type_hints(script.main)["args"], arguments)
        script.main(args)
        if dist.get_rank() == 0:
            torch.save(steps, f"{args.output_dir}.gradients.pt")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    end_process(0)
