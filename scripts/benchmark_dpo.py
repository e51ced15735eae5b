"""The job `dpo` of scripts/benchmark.py: tokens/s of whole optimizer steps on pairs."""

from dataclasses import dataclass

import torch

from models.batches import collate
from models.common import Runtime, at_least_one, flag
from models.fsdp import ParallelArgs
from models.model import Transformer
from models.records import IGNORE_INDEX, Example
from models.reward import Pair, pair_rows
from scripts import peer_trl
from scripts.benchmark_common import AnswerArgs, PeerArgs, SpeedArgs, run_speed_job
from scripts.benchmark_training import TrainedArgs, figures_of_steps, sharded_model
from scripts.workload import random_ids
from training.losses import DpoLossArgs, dpo_loss, sequence_logps, token_logps

PEERS = {"trl": peer_trl.dpo}


@dataclass(frozen=True, kw_only=True)
class DpoArgs(SpeedArgs, AnswerArgs, TrainedArgs, PeerArgs):
    """Measures optimizer steps of DPO, with random weights."""

    batch_size: int = flag(8, bounds=at_least_one, help="pairs per step, on each rank")
    precompute_ref: bool = flag(True, help="compute the reference's log-probs before training, not in each step")
    engine: str = flag("ours", choices=("ours", *PEERS), help="engine to run")
    peer: str = flag("trl", choices=PEERS, help="with --compare: engine to alternate with")

    def pairs(self) -> list[tuple[list[int], list[list[int]]]]:
        """Draws (prompt, [chosen, rejected]) of random tokens."""
        prompts = random_ids(self.config.vocab_size, self.batch_size, self.prompt_len)
        sides = random_ids(self.config.vocab_size, self.batch_size, 2, self.new_tokens)
        return list(zip(prompts.tolist(), sides.tolist()))


def main(args: DpoArgs) -> None:
    when = "before training" if args.precompute_ref else "in each step"
    rows = f"{args.batch_size} x 2 x ({args.prompt_len} + {args.new_tokens}) tokens"
    run_speed_job(args, f"{rows}, reference {when}, {args.setting}", measure_dpo, PEERS)


def measure_dpo(args: DpoArgs, runtime: Runtime) -> dict:
    config = args.config
    pairs = []
    for prompt, sides in args.pairs():
        rows = [Example(prompt + side, [IGNORE_INDEX] * len(prompt) + side) for side in sides]
        pairs.append(Pair(len(prompt), *rows))
    model = sharded_model(config, args.parallel(), runtime)
    reference = sharded_model(config, ParallelArgs(), runtime, runtime.dtype).requires_grad_(False)

    def logps_of(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate(pair_rows(pairs), 0, runtime.device)
        logps, _ = token_logps(model(batch.input_ids), model.lm_head.weight, batch.labels, learnt=batch.learnt)
        logps, lengths = sequence_logps(logps, batch.labels)
        return logps.view(2, -1), lengths.view(2, -1)

    @torch.no_grad()
    def reference_logps() -> torch.Tensor:
        return logps_of(reference)[0]

    known = None
    if args.precompute_ref:
        known, reference = reference_logps(), None

    def loss_of() -> torch.Tensor:
        logps, lengths = logps_of(model)
        return dpo_loss(DpoLossArgs(), logps, reference_logps() if known is None else known, lengths).losses.mean()

    length = args.prompt_len + args.new_tokens
    tokens = 2 * len(pairs) * length
    flops = config.training_flops_per_token(length, logits=args.new_tokens / length)
    flops *= 1 if args.precompute_ref else 4 / 3
    return figures_of_steps(model, args, runtime, loss_of, tokens=tokens, flops_per_token=flops)
