"""The job `grpo` of scripts/benchmark.py: tokens/s of a policy update on answers of very different lengths.

- measures forward and backward of the clipped loss over the answers, as in train_ppo.py and train_grpo.py, with random
  weights: for padded rows in micro-batches of --micro_batch_size, and for rows packed end to end into micro-batches of
  --max_tokens_per_micro_batch
- the two alternate; rows of a padded micro-batch have similar lengths, as in training
"""

import random
import statistics
from dataclasses import dataclass, replace

import torch

from models.batches import Split
from models.common import Runtime, Stopwatch, at_least_one, flag, short_bar
from models.fsdp import init_mesh, reducing_gradients
from models.model import Transformer
from models.records import IGNORE_INDEX, Example
from scripts.benchmark_common import SpeedArgs, run_speed_job
from scripts.benchmark_training import RecomputeArgs, sharded_model
from scripts.workload import counted
from training.losses import ppo_policy_loss
from training.rollouts import answer_logps, rows_at

SHORTEST = 16  # tokens of an answer


@dataclass(frozen=True, kw_only=True)
class GrpoArgs(SpeedArgs, RecomputeArgs):
    """Measures a policy update on ragged answers of random tokens."""

    batch_size: int = flag(8, bounds=at_least_one, help="answers per update")
    prompt_len: int = flag(64, bounds=at_least_one, help="tokens of each prompt")
    seq_len: int = flag(512, bounds=at_least_one, help="tokens of the longest answer")
    micro_batch_size: int | None = flag(None, bounds=at_least_one, help="rows per padded batch; default: --batch_size")
    max_tokens_per_micro_batch: int | None = flag(
        None, bounds=at_least_one, help="tokens per packed forward; default: those of --micro_batch_size longest rows"
    )

    def filled(self) -> "GrpoArgs":
        """Returns these flags with defaults for the sizes that were not given."""
        size = self.micro_batch_size or self.batch_size
        budget = self.max_tokens_per_micro_batch or size * (self.prompt_len + self.seq_len)
        return replace(self, micro_batch_size=size, max_tokens_per_micro_batch=budget)


def main(args: GrpoArgs) -> None:
    args = args.filled()
    answers = f"{counted(args.batch_size, 'answer')} of {min(SHORTEST, args.seq_len)} to {args.seq_len} tokens"
    batches = f"{counted(args.micro_batch_size, 'row')} or {args.max_tokens_per_micro_batch} tokens"
    setting = f"{answers} to prompts of {args.prompt_len}, micro-batches of {batches}"
    run_speed_job(args, f"{setting}, recompute {args.activation_checkpointing}", measure_grpo)


def ragged_rows(args: GrpoArgs) -> list[Example]:
    generator, rows = random.Random(args.seed), []
    for _ in range(args.batch_size):
        length = generator.randint(min(SHORTEST, args.seq_len), args.seq_len)
        ids = [generator.randrange(3, args.config.vocab_size) for _ in range(args.prompt_len + length)]
        rows.append(Example(ids, [IGNORE_INDEX] * args.prompt_len + ids[args.prompt_len :]))
    return rows


def padding_share(rows: list[Example], split: Split) -> float:
    """Returns the share of padding among the tokens of this rank's padded forward passes."""
    lengths = [[len(rows[i].input_ids) for i in group] for group in split.numbers(rows)]
    return 1 - sum(map(sum, lengths)) / sum(len(group) * max(group) for group in lengths if group)


def update(model: Transformer, rows: list[Example], advantages: torch.Tensor, split: Split) -> None:
    """Runs forward and backward of the clipped loss, averaged over the tokens of all answers."""
    width = max(row.num_targets for row in rows)
    mask = torch.arange(width) < torch.tensor([row.num_targets for row in rows])[:, None]
    mask, count = mask.to(advantages.device), int(mask.sum())
    for part in reducing_gradients(model, split.numbers(rows), every=True):
        of_part = rows_at(part, mask.device)
        logps = answer_logps(model, [rows[i] for i in part], width, split, 1.0)[0]
        losses, _ = ppo_policy_loss(logps, logps.detach(), of_part(advantages)[:, None], cliprange=0.2)
        ((losses * of_part(mask)).sum() / count).backward()
    model.zero_grad(set_to_none=True)


def measure_grpo(args: GrpoArgs, runtime: Runtime) -> dict:
    config = args.config
    model, dp = sharded_model(config, args.parallel(), runtime), init_mesh(runtime.device, 1)["dp"]
    rows = ragged_rows(args)
    advantages = torch.randn(len(rows), device=runtime.device)
    splits = {
        "padded": Split(args.micro_batch_size, dp, 0),
        "packed": Split(args.micro_batch_size, dp, 0, args.max_tokens_per_micro_batch),
    }
    seconds, watch = {name: [] for name in splits}, Stopwatch(runtime.device)
    for _ in short_bar(range(args.repeats + 1), "measuring", "round"):
        for name, split in splits.items():
            watch.lap()
            update(model, rows, advantages, split)
            seconds[name].append(watch.lap())
    lengths = [len(row.input_ids) for row in rows]
    flops_of = config.training_flops_per_token
    flops = sum(n * flops_of(n, logits=row.num_targets / n) for n, row in zip(lengths, rows)) / sum(lengths)
    rates = {name: sum(lengths) / statistics.median(times[1:]) for name, times in seconds.items()}
    ratios = [padded / packed for padded, packed in list(zip(*seconds.values()))[1:]]
    padding = padding_share(rows, splits["padded"])
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return {
        "tokens_per_second": rates["packed"],
        "padded_tokens_per_second": rates["padded"],
        "flops_per_second": rates["packed"] * flops / dp.size(),  # per rank, to compare with the ceiling
        "ratios": ratios,
        "padding_share": padding,
        "rows": {
            "packed": f"{rates['packed']:,.1f} tok/s",
            "padded": f"{rates['padded']:,.1f} tok/s, {padding:.1%} of its tokens are padding",
            "ratio": f"{shown} packed / padded, alternating",
        },
    }
