"""Stress test: runs that are killed at random and resumed must end like runs that were never interrupted.

- kills the five trainers, generate.py and score.py (launcher and ranks) several times each, or lets the disk run full;
  resumes them each time, sometimes on another number of ranks; and compares the results with an uninterrupted run of
  the same command: weights, rewards, metrics bit by bit (on another layout to 1e-4, in bf16 to 1e-3), lines one by one
- a kill waits for a phase, drawn uniformly, and then a few milliseconds; the phase it hit is read from files on disk
- a full disk is simulated by a limit on file sizes, which any write may reach
- one rank is forked from this process, several are started by torchrun (torture_attempt.py). Linux only

    python scripts/torture.py --kills 200 --output_dir runs/torture
"""

import importlib
import itertools
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

import torch
from safetensors.torch import load_file

from inference.lines import write_lines
from models.common import at_least_one, flag
from models.config import ModelConfig
from models.export import save_folder
from models.model import Transformer
from models.script import run_script
from scripts.torture_attempt import ROOT, Attempt, Job, fork
from scripts.workload import counted

PRELOADED = (
    "torch._dynamo",
    "torch.onnx",
    "torch.distributed.checkpoint",
    "training.rollouts",
    "training.run_dir",
    "training.samples",
    "training.frozen",
)
OTHER_LAYOUT, FULL_DISK = 0.2, 0.15  # shares of the attempts
MANY_RANKS = 0.25  # share of the runs, if --ranks has both numbers
TIMING = ("tokens_per_second", "mfu", "time/")
TOLERANCE = 1e-4  # after a resume on another layout
BF16_TOLERANCE = 1e-3  # the same for bf16 parameters: if a sum's last digit changes the rounding, one is off by 2^-8
DISK_FULL = "full disk"

REWARD = """
import os, time

def reward(prompts, completions, examples):
    open(os.environ["TORTURE_MARK"], "w").write("begin")
    time.sleep(0.02)
    open(os.environ["TORTURE_MARK"], "w").write("end")
    return [len(completion.split()) / 4 for completion in completions]
"""


SUPERVISED = ("start", "step", "save", "export")
REINFORCED = (*SUPERVISED, "rollout", "score")
STEPS = "--save_steps 1 --batch_size 8 --max_steps 9 --export_steps 4 --learning_rate 1e-3"
UPDATES = "--save_steps 1 --rollout_batch_size 8 --minibatch_size 4 --total_steps 6 --export_steps 4"
UPDATES += " --max_new_tokens 12 --learning_rate 1e-4 --prompt_file {world}/prompts.jsonl"
UPDATES += " --reward_fn {world}/reward.py:reward"
MODEL = "--checkpoint_path {world}/small"
SFT = f"{MODEL} --train_file {{world}}/train.jsonl --eval_file {{world}}/heldout.jsonl --eval_steps 4"
PAIRS = f"{MODEL} --train_file {{world}}/pairs.jsonl"
CRITIC = "--reward_checkpoint_path {world}/rm --critic_warmup_steps 2"
JOBS = {
    "sft": Job("training/finetune_sft.py", SUPERVISED, f"{SFT} {STEPS} --eval_max_new_tokens 8"),
    "rm": Job("training/train_rm.py", SUPERVISED, f"{PAIRS} {STEPS} --optim adamw_8bit"),
    "dpo": Job("training/train_dpo.py", SUPERVISED, f"{PAIRS} {STEPS} --param_dtype bfloat16 --dtype float32"),
    "ppo": Job("training/train_ppo.py", REINFORCED, f"{MODEL} {CRITIC} {UPDATES}"),
    "grpo": Job("training/train_grpo.py", REINFORCED, f"{MODEL} {UPDATES} --num_generations 4"),
    "generate": Job(
        "inference/generate.py",
        ("start", "rollout"),
        f"{MODEL} --prompt_file {{world}}/prompts.jsonl --num_samples 4 --max_new_tokens 24 --batch_size 16",
        "lines.jsonl",
    ),
    "score": Job(
        "inference/score.py",
        ("start", "score"),
        "--checkpoint_path {world}/rm --data_file {world}/samples.jsonl --batch_size 1",
        "lines.jsonl",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TortureArgs:
    """Kills runs at random, resumes them, and compares them with uninterrupted runs."""

    output_dir: Path = flag(Path("runs/torture"), help="folder for the runs and the report, torture.md")
    kills: int = flag(200, bounds=at_least_one, help="number of SIGKILLs")
    seed: int = flag(0, help="seed of the choice of runs and kills")
    jobs: list[str] = flag(tuple(JOBS), choices=JOBS, help="jobs to kill")
    ranks: list[int] = flag((1, 4), choices=(1, 4), help="numbers of ranks; 4 means dp 2 x tp 2")
    keep: bool = flag(False, help="keep the folders of runs that came out equal")


@dataclass
class Row:
    """A row of the table: counts for the runs of a job that began on the same number of ranks."""

    runs: int = 0
    landed: Counter = field(default_factory=Counter)  # kills and full disks by phase
    other_layout: int = 0
    resumed: int = 0
    unequal: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------ comparing


def differences(job: Job, out: Path, reference: Path, tolerance: float) -> list[str]:
    """Lists the differences between the results of a run and of the uninterrupted one."""
    found = []
    if job.lines:
        return compare_lines(read_lines(out / job.lines), read_lines(reference / job.lines), tolerance)
    names = [sorted(p.relative_to(root) for p in root.rglob("model*.safetensors")) for root in (out, reference)]
    if names[0] != names[1]:
        return [f"weight files {names[0]}, not {names[1]}"]
    bound = BF16_TOLERANCE if tolerance and "--param_dtype bfloat16" in job.flags else tolerance
    for name in names[0]:
        ours, theirs = load_file(out / name), load_file(reference / name)
        shapes = [{key: (tensor.shape, tensor.dtype) for key, tensor in each.items()} for each in (ours, theirs)]
        if shapes[0] != shapes[1]:
            found.append(f"{name}: other tensors")
            continue
        for key, wanted in theirs.items():
            error = (ours[key].double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9)
            if not (torch.equal(ours[key], wanted) or error <= bound):
                found.append(f"{name}: {key} differs by {error:.1e}")
                break
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (reference / name).exists():
            lines = compare_lines(read_lines(out / name), read_lines(reference / name), 100 * tolerance)
            found += [f"{name}: {text}" for text in lines]
    return found


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare_lines(lines: list[dict], wanted: list[dict], tolerance: float) -> list[str]:
    def key(line: dict) -> tuple:
        return line.get("step", -1), line.get("idx", -1), line.get("sample_idx", -1), line.get("prompt", "")

    keys = [Counter(map(key, each)) for each in (lines, wanted)]
    if keys[0] != keys[1]:
        return [f"{(keys[1] - keys[0]).total()} lines lost, {(keys[0] - keys[1]).total()} doubled or foreign"]
    for line, other in zip(sorted(lines, key=key), sorted(wanted, key=key)):
        if line.keys() != other.keys():
            return [f"line {key(line)[:3]}: {', '.join(sorted(line.keys() ^ other.keys()))} on one side alone"]
        for name, value in other.items():
            # the last digit of a sum over tokens depends on the batch, which a resume changes
            bound = max(tolerance, 1e-5) if name == "logprob" else tolerance
            if not any(word in name for word in TIMING) and not alike(line.get(name), value, bound):
                return [f"line {key(line)[:3]}: {name} is {line.get(name)!r}, not {value!r}"]
    return []


def alike(value: object, wanted: object, tolerance: float) -> bool:
    if isinstance(value, float) and isinstance(wanted, float):
        return value == wanted or math.isclose(value, wanted, rel_tol=tolerance, abs_tol=tolerance)
    return value == wanted


# -------------------------------------------------------------------------------------- torture


class Torture:
    """Draws runs, kills and compares them, until there are enough kills."""

    def __init__(self, args: TortureArgs):
        self.args, self.rng, self.rows, self.num_kills = args, random.Random(args.seed), {}, 0
        self.world, self.seconds, self.start_seconds = args.output_dir / "world", [], {}

    def run_all(self) -> None:
        """Writes the world, and then runs the jobs in random order, again and again."""
        write_world(self.world, self.args.seed)
        while self.num_kills < self.args.kills:
            for name in self.rng.sample(self.args.jobs, len(self.args.jobs)):
                if self.num_kills < self.args.kills:
                    is_many = 4 in self.args.ranks and self.rng.random() < MANY_RANKS
                    self.one_run(name, 4 if is_many else min(self.args.ranks))

    def reference(self, name: str, ranks: int) -> Path:
        """Returns the folder of an uninterrupted run, which it runs at the first call."""
        out = self.args.output_dir / f"{name}-{ranks}-whole"
        if (name, ranks) not in self.start_seconds:
            attempt, began = Attempt(JOBS[name], out, self.world, ranks, resume=False), time.monotonic()
            while attempt.phase() == "start" and not attempt.ended():
                time.sleep(0.005)
            self.start_seconds[name, ranks] = time.monotonic() - began
            if attempt.wait():
                raise ValueError(f"{name} on {counted(ranks, 'rank')} fails without a kill: {attempt.close()[-1000:]}")
            attempt.close()
        return out

    def one_run(self, name: str, ranks: int) -> None:
        """Starts a job, kills and resumes it a few times, lets it finish, and compares the results."""
        row, reference = self.rows.setdefault((name, ranks), Row()), self.reference(name, ranks)
        out, began, kills_before = self.args.output_dir / f"{name}-{ranks}-{row.runs}", time.monotonic(), self.num_kills
        row.runs += 1
        try:
            tolerance = self.attempts(name, ranks, out, row)
            problems = differences(JOBS[name], out, reference, tolerance)
        except (OSError, ValueError) as error:
            problems = [str(error)]
        row.unequal += [f"{out.name}: {problem}" for problem in problems]
        print(f"{out.name}: " + ("; ".join(problems) or "equal"), flush=True)
        self.seconds.append((ranks, time.monotonic() - began, self.num_kills - kills_before))
        if not problems and not self.args.keep:
            shutil.rmtree(out, ignore_errors=True)

    def attempts(self, name: str, ranks: int, out: Path, row: Row) -> float:
        """Kills and resumes a job until it finishes. Returns the tolerance to compare it with. Raises ValueError if an
        attempt fails for another reason than a kill or a full disk."""
        tolerance, num_kills = 0.0, self.rng.randint(2, 5) if ranks == 1 else 2
        for i in range(num_kills + 1):
            other = i > 0 and len(self.args.ranks) > 1 and self.rng.random() < OTHER_LAYOUT
            now = next(n for n in self.args.ranks if n != ranks) if other else ranks
            spared = i == num_kills or self.num_kills >= self.args.kills
            full = now == 1 and not spared and self.rng.random() < FULL_DISK
            most_bytes = int(10 ** self.rng.uniform(2, 6.3)) if full else None
            attempt = Attempt(JOBS[name], out, self.world, now, resume=i > 0, most_bytes=most_bytes)
            tolerance = TOLERANCE if other else tolerance
            row.other_layout, row.resumed = row.other_layout + other, row.resumed + (i > 0)
            try:
                killed = not spared and not full and self.strike(name, attempt, row)
                code, log = attempt.wait(), attempt.close()
            except KeyboardInterrupt:
                attempt.kill()
                raise
            if full and code == 2 and "Traceback" not in log:
                row.landed[DISK_FULL] += 1
            elif code and not killed:
                raise ValueError(f"ended with exit code {code}: {log[-300:]!r}")
            elif not killed:
                break
        return tolerance

    def strike(self, name: str, attempt: Attempt, row: Row) -> bool:
        """Waits for a random moment in a random phase and kills the attempt. Returns False if it ended before."""
        phase = self.rng.choice(attempt.job.phases)
        start_seconds = self.start_seconds.get((name, attempt.ranks), 1.0)
        wait = self.rng.uniform(0, start_seconds) if phase == "start" else 10 ** self.rng.uniform(-4, -1.5)
        goal = attempt.progress() + self.rng.randint(0, 60 if attempt.job.lines else 3)
        while phase not in ("start", attempt.phase()) or (phase in ("step", "save") and attempt.progress() < goal):
            if attempt.ended():
                return False
            time.sleep(0.0005)
        time.sleep(wait)
        if attempt.ended():
            return False
        attempt.kill()
        landed = attempt.phase()
        row.landed[landed] += 1
        self.num_kills += 1
        print(f"kill {self.num_kills} of {self.args.kills}: {name} on {attempt.ranks}, {landed}", flush=True)
        return True


def write_world(world: Path, seed: int) -> None:
    """Writes the toy's records, a smaller model, pairs and samples made from the records, a reward model and a reward
    function."""
    run_to_end(world, "scripts/toy.py", "--num_train", 160, "--num_heldout", 6, "--num_prompts", 24, "--seed", seed)
    config = json.loads((world / "model/config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}  # saved in milliseconds
    model = Transformer(ModelConfig.from_hf(config))
    model.init_weights(torch.Generator().manual_seed(seed % 2**63))
    save_folder(world / "small", model.state_dict().items(), config=config, copy_from=world / "model")
    records = read_lines(world / "train.jsonl")
    pairs = [
        {"prompt": record["prompt"], "chosen": record["completion"], "rejected": other["completion"]}
        for record, other in itertools.pairwise(records)
    ]
    for name, lines in (("pairs", pairs), ("samples", records)):
        write_lines(world / f"{name}.jsonl", lines)
    (world / "reward.py").write_text(REWARD)
    flags = JOBS["rm"].flags.format(world=world).split()
    run_to_end(world / "rm", JOBS["rm"].script, *flags, "--device", "cpu")


def run_to_end(output_dir: Path, script: str, *flags: object) -> None:
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    path = output_dir.with_name(f"{output_dir.name}.log")
    with open(path, "wb") as log:
        words = [ROOT / script, "--output_dir", output_dir, *flags]
        _, status = os.waitpid(fork(list(map(str, words)), {"OMP_NUM_THREADS": "1"}, log.fileno(), None), 0)
    if status:
        raise ValueError(f"{script} failed: {path.read_text()[-1000:]}")


def table(torture: Torture) -> str:
    """Returns the table as Markdown."""
    phases = [*REINFORCED, DISK_FULL]
    titles = ["job", "ranks", "runs", *(f"in {phase}" for phase in phases[:-1]), DISK_FULL, "resumed"]
    titles += ["on another layout", "equal"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for (name, ranks), row in sorted(torture.rows.items(), key=lambda item: (list(JOBS).index(item[0][0]), item[0][1])):
        equal = row.runs - len({text.partition(":")[0] for text in row.unequal})
        cells = [name, "2 x 2" if ranks == 4 else 1, row.runs, *(row.landed[phase] or "" for phase in phases)]
        lines.append(f"| {' | '.join(map(str, [*cells, row.resumed, row.other_layout, equal]))} |")
    return "\n".join(lines)


def report(torture: Torture, seconds: float) -> str:
    args, rows = torture.args, torture.rows.values()
    git = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    commit = found or "unknown"
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, torch {torch.__version__}"
    command = f"python scripts/torture.py --kills {args.kills} --seed {args.seed} --jobs {' '.join(args.jobs)}"
    costs = []
    for ranks in args.ranks:
        spent = [each[1:] for each in torture.seconds if each[0] == ranks]
        if kills := sum(number for _, number in spent):
            costs.append(f"{sum(cost for cost, _ in spent) / kills:.1f} s per kill on {counted(ranks, 'rank')}")
    num_runs, unequal = sum(row.runs for row in rows), [text for row in rows for text in row.unequal]
    parts = [
        f"`{command} --ranks {' '.join(map(str, args.ranks))}`, {date.today()}, commit {commit}, {machine}.",
        f"{torture.num_kills} SIGKILLs and {sum(row.landed[DISK_FULL] for row in rows)} full disks in {num_runs} runs, "
        f"{seconds / 60:.1f} minutes; {', '.join(costs)}, resuming and comparing included.",
        table(torture),
        "All runs came out equal." if not unequal else "Not equal:\n\n" + "\n".join(f"* {text}" for text in unequal),
    ]
    return "\n\n".join(parts) + "\n"


def main(args: TortureArgs) -> None:
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise ValueError(f"--output_dir {args.output_dir}: is not empty; take another")
    if not Path("/proc/self/stat").exists():
        raise ValueError("torture.py needs Linux: it finds the processes to kill in /proc")
    torch.set_num_threads(1)  # a fork of a process with OpenMP threads may hang
    for name in PRELOADED:
        importlib.import_module(name)
    torture, began = Torture(args), time.monotonic()
    torture.run_all()
    text = report(torture, time.monotonic() - began)
    (args.output_dir / "torture.md").write_text(text, encoding="utf-8")
    print(text)
    if any(row.unequal for row in torture.rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, TortureArgs)
