"""What the jobs of scripts/benchmark.py share: the shapes, the clock and the machine's ceilings."""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from models.adapters import base_scheme
from models.common import RuntimeArgs, Stopwatch, at_least_one, flag
from models.compressed import linear_layers
from models.lora import Lora
from models.model import ModelConfig
from models.presets import PRESETS
from models.qlinear import MODES
from models.quantize import QuantizeArgs
from models.tp import TensorParallelArgs
from training.optim import OptimArgs

SIZES = {
    "23m": ModelConfig(4000, 512, 1376, 6, 8, 8, 64, 4096),
    "134m": ModelConfig(32000, 768, 2048, 12, 12, 12, 64, 4096),
    "0.5b": PRESETS["Qwen/Qwen2.5-0.5B"],
    "1b": PRESETS["meta-llama/Llama-3.2-1B"],
    "1.5b": PRESETS["Qwen/Qwen2.5-1.5B"],
    "7b": PRESETS["meta-llama/Llama-2-7b-chat-hf"],
    "8b": PRESETS["meta-llama/Llama-3.1-8B"],
    "qwen3-8b": PRESETS["Qwen/Qwen3-8B"],
}


def layout(text: str) -> tuple[int, int]:
    """dp x tp, as 4x2."""
    dp, _, tp = text.partition("x")
    if not (dp.isdigit() and tp.isdigit() and int(dp) and int(tp)):
        raise ValueError(text)
    return int(dp), int(tp)


@dataclass(frozen=True, kw_only=True)
class BenchmarkArgs(RuntimeArgs, QuantizeArgs, TensorParallelArgs):
    """Speed beside the physical limit, with random weights."""

    job: str = flag(
        choices=("generate", "sft", "dpo", "ppo", "grpo", "memory", "data"), help="what to measure", positional=True
    )
    preset: str = flag("134m", choices=SIZES, help="shape of the model")
    batch_size: int = flag(
        8, bounds=at_least_one, help="slots, rows of a step, its pairs or answers; memory: micro-batch"
    )
    prompt_len: int = flag(64, bounds=at_least_one, help="generate, dpo, ppo, grpo: tokens of each prompt")
    new_tokens: int = flag(128, bounds=at_least_one, help="generate, dpo, ppo: tokens of each completion")
    sweep: list[int] = flag((), nargs="*", bounds=at_least_one, help="generate: batch sizes to measure in turn")
    ragged: int | None = flag(
        None, bounds=at_least_one, help="generate: so many prompts, lengths and ends around the flags'"
    )
    precisions: list[str] = flag(
        (),
        choices=("none", *MODES),
        help="generate: values of --quantize to measure in turns, with their speeds as ratios to the first's",
    )
    seq_len: int = flag(512, bounds=at_least_one, help="sft, memory: tokens of each row; grpo: of the longest answer")
    activation_checkpointing: str = flag("none", choices=("none", "full", "selective"), help="recompute in steps")
    precompute_ref: bool = flag(True, help="dpo: the reference's log-probs once before training, else in each step")
    repeats: int = flag(3, bounds=at_least_one, help="timed runs (generate) or steps, after one to warm up")
    engine: str = flag("ours", choices=("ours", "peer"), help="what to run; the peer is transformers, or trl")
    reward_preset: str | None = flag(None, choices=SIZES, help="ppo: shape of reward model and critic; --preset")
    slots: int | None = flag(None, bounds=at_least_one, help="ppo: answers drawn at a time; --batch_size, up to 128")
    micro_batch_size: int | None = flag(None, bounds=at_least_one, help="ppo, grpo: answers of a forward; --batch_size")
    max_tokens_per_micro_batch: int | None = flag(
        None, bounds=at_least_one, help="grpo: tokens of a packed forward; those of the longest --micro_batch_size rows"
    )
    ppo_epochs: int = flag(1, bounds=at_least_one, help="ppo: passes over the answers of an update")
    param_dtype: str = flag("float32", choices=("float32", "bfloat16"), help="ppo: of the trained weights")
    optim: str = flag("adamw", choices=("adamw", "adamw_8bit"), help="ppo: the optimizer")
    plan: bool = flag(False, help="ppo: print the memory on paper, and run nothing")
    layouts: list[layout] = flag((), metavar="DPxTP", help="memory, ppo --plan: dp x tp, as 1x1 8x1 4x2; one")
    tokenizer: Path | None = flag(
        None, help="data: folder with the tokenizer and its chat template; a small one is made"
    )
    measure: bool = flag(False, help="memory: do it with random weights and print the measured bytes beside")
    lora_r: int | None = flag(None, bounds=at_least_one, help="sft, memory: adapters of this rank in all linear layers")
    quantize_base: str = flag("none", choices=("none", "int8", "int4"), help="sft, memory: of the base below them")
    compare: int | None = flag(None, bounds=at_least_one, help="alternate ours and the peer so many times")
    peer_python: Path = flag(Path(sys.executable), help="--compare: interpreter that has the peer")

    @property
    def config(self) -> ModelConfig:
        return SIZES[self.preset]

    def lora(self) -> Lora | None:
        """The adapters of --lora_r, of random numbers."""
        if self.lora_r is None:
            return None
        layers, scheme = (
            frozenset(linear_layers(self.config.num_hidden_layers)),
            base_scheme(self.quantize_base, self.config),
        )
        return Lora(self.lora_r, 2.0 * self.lora_r, False, 0.0, layers, scheme, {}, Path(), "", self.seed)

    def optimizer(self) -> OptimArgs:
        """That of the jobs which train by themselves."""
        return OptimArgs(learning_rate=1e-5)


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a call, after one that does not count."""
    function()
    watch, times = Stopwatch(device), []
    for _ in range(repeats):
        function()
        times.append(watch.lap())
    return statistics.median(times)


def product_dtype(device: torch.device) -> torch.dtype:
    """What the device multiplies fastest: bf16, or fp32 on a processor that only emulates bf16 (a small product
    tells)."""
    if device.type == "cuda":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(128, 128).to(dtype)
        seconds[dtype] = seconds_of(lambda a=a: a @ a, device, 7)
    return min(seconds, key=seconds.get)


def ceilings(device: torch.device) -> tuple[float, float, torch.dtype]:
    """(FLOP/s of a matrix product, bytes/s of a copy, read and written, the product's dtype), measured."""
    dtype = product_dtype(device)
    size, length = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(length, device=device)
    target = torch.empty_like(source)
    product = seconds_of(lambda: a @ b, device, 7)
    copy = seconds_of(lambda: target.copy_(source), device, 7)
    return 2 * size**3 / product, 2 * source.nbytes / copy, dtype
