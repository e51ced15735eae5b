"""Runs finetune_sft.main for several settings in the ranks of one torchrun launch, and keeps each run's gradients.
Checkpoints are asynchronous, as on GPUs.

    torchrun --nproc-per-node 4 tests/training/parallel_worker.py JOBS.json

JOBS.json: a list of argument lists. Beside each --output_dir, OUT.gradients.pt holds the gradients of every step.
["rewind", RUN, COPY, STEP] copies a finished run as it was when it had saved that step.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist

from training import finetune_sft
from training.common import end_process

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


def main(jobs: list[list[str]]) -> None:
    clip, writer = finetune_sft.clip_grad_norm, finetune_sft.CheckpointWriter
    finetune_sft.CheckpointWriter = lambda *args, **options: writer(*args, **{**options, "asynchronous": True})
    for arguments in jobs:
        if arguments[0] == "rewind":
            rewind(*arguments[1:])
            continue
        steps = []

        def recording_clip(model, max_norm, steps=steps):
            steps.append({name: p.grad.full_tensor().clone() for name, p in model.named_parameters()})
            return clip(model, max_norm)

        finetune_sft.clip_grad_norm = recording_clip
        args = finetune_sft.parser().parse_args(arguments)
        finetune_sft.main(**vars(args))
        if dist.get_rank() == 0:
            torch.save(steps, f"{args.output_dir}.gradients.pt")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    end_process(0)
