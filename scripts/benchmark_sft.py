"""The job `sft` of scripts/benchmark.py: tokens/s of whole optimizer steps, on rows of one text or packed rows."""

from dataclasses import dataclass

import torch

from models.batches import Split, pack_row
from models.common import Bounds, Runtime, at_least_one, flag
from models.forward import forward_rows
from models.fsdp import init_mesh
from models.records import Example
from scripts import peer_transformers, peer_trl
from scripts.benchmark_common import PeerArgs, SpeedArgs, run_speed_job
from scripts.benchmark_training import AdapterArgs, TrainedArgs, figures_of_steps, sharded_model
from scripts.workload import random_ids
from training.losses import token_cross_entropy

PEERS = {"transformers": peer_transformers.sft, "trl": peer_trl.sft}


@dataclass(frozen=True, kw_only=True)
class SftArgs(SpeedArgs, TrainedArgs, AdapterArgs, PeerArgs):
    """Measures optimizer steps of supervised fine-tuning, with random weights."""

    batch_size: int = flag(8, bounds=at_least_one, help="rows per step, on each rank")
    seq_len: int = flag(512, bounds=Bounds(least=2), help="tokens of each row")
    documents: int = flag(1, bounds=at_least_one, help="texts packed into each row; attention does not cross texts")
    engine: str = flag("ours", choices=("ours", *PEERS), help="engine to run")
    peer: str = flag("transformers", choices=PEERS, help="with --compare: engine to alternate with")

    def lengths(self) -> list[int]:
        """Returns the lengths of a row's texts, in the ratio 1 : 2 : 3 : 4 : 1 : 2 ..., seq_len tokens in all."""
        weights = [1 + i % 4 for i in range(self.documents)]
        ends = [self.seq_len * sum(weights[: i + 1]) // sum(weights) for i in range(self.documents)]
        return [end - start for start, end in zip([0, *ends], ends)]


def main(args: SftArgs) -> None:
    if args.seq_len < 4 * args.documents:
        raise ValueError(f"--documents {args.documents}: each text needs 4 tokens, and a row has {args.seq_len}")
    if args.documents > 1 and (args.compare or args.engine != "ours"):
        raise ValueError("--documents: the peers do not pack")
    args.lora(args.config)  # refuses flags that do not go together before a peer has run
    packed = f" packed from {args.documents} texts" if args.documents > 1 else ""
    adapters = "" if args.lora_r is None else f", LoRA of rank {args.lora_r}, base {args.quantize_base}"
    setting = f"{args.batch_size} x {args.seq_len} tokens{packed}, {args.setting}{adapters}"
    run_speed_job(args, setting, measure_sft, PEERS)


def measure_sft(args: SftArgs, runtime: Runtime) -> dict:
    config, lengths = args.config, args.lengths()
    model = sharded_model(config, args.parallel(), runtime, lora=args.lora(config))
    split = Split(args.batch_size, init_mesh(runtime.device, 1)["dp"], 0)
    rows = []
    for row in random_ids(config.vocab_size, args.batch_size, args.seq_len):
        texts = [Example(ids, ids) for ids in map(torch.Tensor.numpy, row.split(lengths))]
        rows.append(pack_row(texts) if len(texts) > 1 else texts[0])
    num_targets = sum(row.num_targets for row in rows)

    def loss_of() -> torch.Tensor:
        forward = forward_rows(model, rows, split)
        weight, learnt = model.lm_head.weight, forward.learnt
        return token_cross_entropy(forward.hidden, weight, forward.labels, learnt=learnt) / num_targets

    frozen = args.lora_r is not None
    flops = sum(n * config.training_flops_per_token(n, frozen=frozen, logits=1 - 1 / n) for n in lengths) / args.seq_len
    tokens = args.batch_size * args.seq_len
    return figures_of_steps(model, args, runtime, loss_of, tokens=tokens, flops_per_token=flops)
