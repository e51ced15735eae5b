"""A long-lived rank: it runs the lists of jobs that tests/ranks.py sends.

A job is [MODULE, *arguments], a script's command line (training.finetune_sft, ...). A training script saves the
gradients of every step to OUT.gradients.pt beside its --output_dir; checkpoints are asynchronous, as on GPUs. Others:
["refused", *job] prints the ValueError that a job ends with;
["elsewhere", FOLDER, *job] runs the job with a working folder for each rank inside FOLDER, like the disks of nodes;
["stopped", RANK, STEP, *job] sends SIGTERM to one rank during that step;
["broken off", RANK, LOOK, *job] sends SIGTERM to one rank at that look of its engine;
["traced", *job] traces with torch.compile but runs the graphs eagerly, since generating their code takes a minute; rows
have one length, since each trace of a block takes seconds (test_compiled.py has many lengths);
["rewind", RUN, COPY, STEP] copies a finished run to its state after the save of that step;
["sampling"] compares sampling from a sharded vocabulary with sampling from the whole;
["recomputing", FOLDER] counts the collectives of a step.
"""

import contextlib
import gc
import importlib
import io
import itertools
import json
import os
import shutil
import signal
import sys
import typing
from contextlib import ExitStack, redirect_stdout, suppress
from functools import cache, partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from models import forward, fsdp, shared
from models.common import Runtime, parse_args
from models.fsdp import ParallelArgs, clip_grad_norm, init_mesh, load_for_training
from models.generation import Engine
from models.noise import column_hashes, noise_key
from models.repetition import SeenTokens
from models.sampling import SamplingParams, sample
from models.script import Stopped, end_process
from models.tp import chunk_range
from tests.faults import planted
from training import run_dir

FILTERS = [{}, {"top_k": 1}, {"top_k": 5}, {"top_k": 40, "top_p": 0.8}, {"top_p": 0.6}, {"top_p": 0.0}, {"top_k": 9999}]
SETTINGS = [SamplingParams(0.0), SamplingParams(1.0), *(SamplingParams(0.7, **filters) for filters in FILTERS)]
SETTINGS += [
    SamplingParams(t, top_k=k, repetition_penalty=p) for t, k, p in ((0.0, 0, 1.6), (0.7, 0, 1.6), (1.0, 9, 0.8))
]


def run_job(name: str, *arguments: str) -> None:
    if name == "refused":
        print_refusal(*arguments)
    elif name == "elsewhere":
        run_elsewhere(*arguments)
    elif name == "stopped":
        stop_one(*arguments)
    elif name == "broken off":
        break_off(*arguments)
    elif name == "traced":
        trace = mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager"))
        with trace, mock.patch.object(forward, "length_multiple", lambda *_: 64):
            run_job(*arguments)
    elif name == "rewind":
        rewind(*arguments)
    elif name == "sampling":
        check_sampling()
    elif name == "recomputing":
        check_recomputing(*arguments)
    elif name.startswith("training."):
        train(importlib.import_module(name), arguments)
    else:
        main = importlib.import_module(name).main
        main(parse_args(typing.get_type_hints(main)["args"], arguments))


def train(script, arguments: tuple[str, ...]) -> None:
    steps, writer = [], run_dir.CheckpointWriter

    def recording_clip(model, max_norm, scale):
        trained = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        steps.append({name: scale * p.grad.full_tensor() for name, p in trained})
        return clip_grad_norm(model, max_norm, scale)

    def asynchronous(*args, **options):
        return writer(*args, **{**options, "asynchronous": True})

    args = parse_args(typing.get_type_hints(script.main)["args"], arguments)
    with (
        mock.patch.object(script, "clip_grad_norm", recording_clip),
        mock.patch.object(run_dir, "CheckpointWriter", asynchronous),
    ):
        script.main(args)
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(steps, f"{args.output_dir}.gradients.pt")


def print_refusal(*job: str) -> None:
    try:
        run_job(*job)
    except ValueError as error:
        print("refused:", error)


def run_elsewhere(folder: str, *job: str) -> None:
    rank = os.environ["RANK"]
    own, job = Path(folder, f"node-{rank}"), [word.replace("{rank}", rank) for word in job]
    own.mkdir(exist_ok=True)
    node = mock.patch.dict(os.environ, GROUP_RANK=rank)
    with node, contextlib.chdir(own), mock.patch.object(shared, "SEEN_WITHIN", 0.5):  # one host's files show at once
        run_job(*job)


def stop_one(rank: str, step: str, *job: str) -> None:
    steps, real = itertools.count(1), clip_grad_norm

    def clip_and_stop(*args):
        if next(steps) == int(step) and dist.get_rank() == int(rank):
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with mock.patch(f"{__name__}.clip_grad_norm", clip_and_stop), suppress(Stopped):
        run_job(*job)


def break_off(rank: str, look: str, *job: str) -> None:
    looks, real = itertools.count(1), Engine._look

    def look_and_stop(*args):
        if next(looks) == int(look) and dist.get_rank() == int(rank):
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with mock.patch.object(Engine, "_look", look_and_stop), suppress(Stopped):
        run_job(*job)


def rewind(run: str, copy: str, step: str) -> None:
    if dist.get_rank() == 0:
        for name in ("args.json", "metrics.jsonl", f"checkpoints/step-{int(step):06d}"):
            target = Path(copy) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if target.name.startswith("step-") else shutil.copyfile)(Path(run) / name, target)
    dist.barrier()


def check_sampling() -> None:
    """Checks that every rank draws the tokens that one process draws from the whole logits, also if many logits are
    equal, if the ranks do not divide the vocabulary, and if some ranks hold none of it."""
    tp = init_mesh(torch.device("cpu"), int(os.environ["WORLD_SIZE"]))["tp"]
    generator = torch.Generator().manual_seed(0)
    keys = torch.tensor([noise_key(0, idx, 0) for idx in range(8)])
    positions = torch.arange(8)
    for V in (5, 385, 1500):
        smooth = 3 * torch.randn(8, V, generator=generator)
        tables = [SeenTokens(8, V, tp.device_type, mesh) for mesh in (None, tp)]
        for slot, ids in enumerate(torch.randint(V, (8, V // 4), generator=generator).tolist()):
            for table in tables:
                table.begin(slot, ids)
                table.add(torch.tensor([slot % V]), torch.tensor([slot]))
        for logits in (smooth, smooth.round(), smooth.bfloat16()):
            start, end = chunk_range(V, tp.get_local_rank(), tp.size())
            for params in SETTINGS:
                seen, own_seen = (None if params.repetition_penalty == 1 else table.table for table in tables)
                wanted, wanted_logprobs = sample(logits, keys, positions, column_hashes(V), params, None, seen)
                own = logits[:, start:end]
                tokens, logprobs = sample(own, keys, positions, column_hashes(V), params, tp, own_seen)
                assert torch.equal(tokens, wanted), (V, logits.dtype, params)
                torch.testing.assert_close(logprobs, wanted_logprobs, atol=1e-5, rtol=1e-5)


def check_recomputing(folder: str) -> None:
    """Checks that a step with selective recomputation sums over the ranks as often as one without, with bitwise equal
    gradients. Only the tokens of sequence parallelism are gathered again, once for each half of a block. Full
    recomputation sums again, which shows that the count detects it."""
    tp_size, runtime = int(os.environ["WORLD_SIZE"]), Runtime(torch.device("cpu"), torch.float32, False)
    mesh = init_mesh(runtime.device, tp_size)
    input_ids = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    for sequence_parallel in (False, True):
        sums, gathers, gradients = {}, {}, {}
        for recompute in ("none", "selective", "full"):
            args = ParallelArgs(
                tensor_parallel_size=tp_size,
                sequence_parallel=sequence_parallel,
                activation_checkpointing=recompute,
            )
            model = load_for_training(folder, mesh, args, runtime)
            with CommDebugMode() as counter:
                model(input_ids).square().sum().backward()
            counts = {str(operation): count for operation, count in counter.get_comm_counts().items()}
            sums[recompute] = sum(n for name, n in counts.items() if "all_reduce" in name or "reduce_scatter" in name)
            gathers[recompute] = sum(n for name, n in counts.items() if "all_gather" in name)
            gradients[recompute] = {n: p.grad.to_local() for n, p in model.named_parameters() if p.grad is not None}
        print(sequence_parallel, sums, gathers)
        assert 0 < sums["selective"] == sums["none"] < sums["full"], sums
        repeated = 2 * model.config.num_hidden_layers if sequence_parallel else 0
        assert gathers["selective"] == gathers["none"] + repeated, gathers
        for name, wanted in gradients["none"].items():
            assert torch.equal(gradients["selective"][name], wanted), name


def serve(folder: Path) -> None:
    """Runs requests until the pipe closes, when the tests' process ends."""
    rank = int(os.environ["RANK"])
    with open(folder / f"requests.{rank}", encoding="utf-8") as requests:
        for number, line in enumerate(requests):
            request = json.loads(line)
            with ExitStack() as stack:
                if request["fault"]:
                    stack.enter_context(planted(request["fault"]))
                stdin = None if rank else io.StringIO(request["stdin"])  # only the first rank has a terminal
                stack.enter_context(mock.patch.object(sys, "stdin", stdin))
                stack.enter_context(redirect_stdout(stack.enter_context(open(folder / f"{number}.{rank}.out", "w"))))
                for job in request["jobs"]:
                    run_job(*job)
            for number_of_signal in (signal.SIGTERM, signal.SIGINT):  # their handlers hold the last run, and its lock
                signal.signal(number_of_signal, signal.SIG_DFL)
            gc.collect()
            (folder / f"{number}.{rank}.done").touch()


if __name__ == "__main__":
    # runs share process groups, which are never destroyed: the gloo threads of each wake up 100 times a second
    groups, meshes = cache(dist.new_group), cache(fsdp.init_device_mesh)
    with mock.patch.object(dist, "new_group", groups), mock.patch.object(fsdp, "init_device_mesh", meshes):
        serve(Path(sys.argv[1]))
    end_process(0)
