"""The job `ppo` of scripts/benchmark.py: time of each phase of an update of training/train_ppo.py, with random weights.

- writes policy and reward model as Hugging Face folders, and runs the unmodified training script on them in its own
  process; its first update is a warm-up
- the generation engine alone answers the same prompts before and after, which shows the overhead of PPO's rollouts
- also computes the memory of one rank; --plan prints only that, for models that do not fit on this machine
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from inference.lines import write_lines
from models.common import Runtime, at_least_one, card, dtype_name, flag, say, short_bar
from models.config import ModelConfig
from models.decode import load_for_inference
from models.export import save_folder
from models.generation import Engine, Request
from models.model import Transformer
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer
from scripts.benchmark_common import SIZES, AnswerArgs, LayoutArgs, SpeedArgs, run_speed_job, why_it_failed
from scripts.benchmark_memory import training_memory
from scripts.benchmark_training import TrainedArgs
from scripts.workload import counted, random_ids, sized, token_bytes

SCRIPT = Path(__file__).resolve().parent.parent / "training" / "train_ppo.py"
EOS = 2
FIRST_CHARACTER = 0x10000  # token i is written as the character FIRST_CHARACTER + i


@dataclass(frozen=True, kw_only=True)
class PpoArgs(SpeedArgs, AnswerArgs, TrainedArgs, LayoutArgs):
    """Measures updates of PPO, with random weights."""

    batch_size: int = flag(8, bounds=at_least_one, help="answers per update")
    reward_preset: str | None = flag(None, choices=SIZES, help="shape of reward model and critic; default: --preset")
    slots: int | None = flag(None, bounds=at_least_one, help="answers drawn at once; default: --batch_size, up to 128")
    micro_batch_size: int | None = flag(None, bounds=at_least_one, help="answers per forward; default: --batch_size")
    ppo_epochs: int = flag(1, bounds=at_least_one, help="passes over the answers of an update")
    plan: bool = flag(False, help="print the computed memory, for each of --layouts, and run nothing")

    def filled(self) -> "PpoArgs":
        """Returns these flags with defaults for the sizes that were not given."""
        batch = self.batch_size
        return replace(self, micro_batch_size=self.micro_batch_size or batch, slots=self.slots or min(128, batch))


def main(args: PpoArgs) -> None:
    args = args.filled()
    if args.profile:
        raise ValueError("--profile: an update runs in its own process, whose operations cannot be profiled here")
    if args.plan:
        report_plan(args)
    elif args.layouts or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("an update is measured on one rank; --layouts is for --plan")
    else:
        run_speed_job(args, ppo_setting(args, counted(args.batch_size, "answer")), measure_ppo)


def ppo_setting(args: PpoArgs, answers: str) -> str:
    sizes = f"{args.prompt_len} + {args.new_tokens} tokens, {counted(args.ppo_epochs, 'epoch')}"
    return f"{answers}, {sizes}, micro-batches of {args.micro_batch_size}, {args.setting}"


def measure_ppo(args: PpoArgs, runtime: Runtime) -> dict:
    config, reward = args.config, reward_config(args)
    with tempfile.TemporaryDirectory() as root:
        folders = Path(root) / "policy", Path(root) / "reward"
        write_policy(folders[0], config, runtime)
        write_reward_model(folders[1], reward, runtime, None if reward != config else folders[0])
        ids = random_ids(config.vocab_size, args.batch_size, args.prompt_len).tolist()
        prompts = Path(root) / "prompts.jsonl"
        write_lines(prompts, [{"prompt": text_of(row)} for row in ids])
        alone = engine_rates(folders[0], ids, runtime, args)
        lines, memory = train(folders, prompts, Path(root) / "out", runtime, args)
        alone += engine_rates(folders[0], ids, runtime, args)
    median = {name: statistics.median(line[name] for line in lines[1:]) for name in lines[0]}
    return {**split(median, statistics.median(alone), reward, args), "peak_memory": memory}


def text_of(ids: list[int]) -> str:
    """Returns the text that write_policy's tokenizer encodes as these tokens; none of them may be EOS."""
    return "".join(chr(FIRST_CHARACTER + token) for token in ids)


def reward_config(args: PpoArgs) -> ModelConfig:
    """Returns the shape of the reward model, with the policy's vocabulary."""
    config = args.config
    reward = SIZES[args.reward_preset] if args.reward_preset else config
    return config if reward == config else replace(reward, vocab_size=config.vocab_size, tie_word_embeddings=False)


# -------------------------------------------------------------------------- folders with random weights


def random_tensors(config: ModelConfig, runtime: Runtime, head: str) -> Iterator[tuple[str, Tensor]]:
    with torch.device("meta"):
        model = Transformer(config, head=head)
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=runtime.device)
        yield name, tensor.fill_(1.0) if name.endswith("norm.weight") else tensor.normal_(0.0, 0.02)


def write_policy(folder: Path, config: ModelConfig, runtime: Runtime) -> None:
    save_folder(folder, random_tensors(config, runtime, "lm"), config=_hf_config(config))
    _write_tokenizer(folder, config.vocab_size)


def _hf_config(config: ModelConfig) -> dict:
    return {"eos_token_id": EOS, **asdict(config)}


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a tokenizer with one character for each token but EOS: every id can be written, and none are merged."""
    pieces = {chr(FIRST_CHARACTER + i): i for i in range(vocab_size) if i != EOS} | {"</s>": EOS}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=pieces, merges=[]))
    backend.decoder = tokenizers.decoders.Replace("\u2581", " ")
    backend.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def write_reward_model(folder: Path, config: ModelConfig, runtime: Runtime, body: Path | None) -> None:
    """body: a folder of the same shape whose weights are linked, so that the disk holds them once."""
    hf_config = _hf_config(config) | {"num_labels": 1}
    if body is None:
        save_folder(folder, random_tensors(config, runtime, "score"), config=hf_config)
        _write_tokenizer(folder, config.vocab_size)
        return
    folder.mkdir()
    weight_map = {}
    for path in body.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
    weight_map.pop("lm_head.weight", None)
    for file in {*weight_map.values(), "tokenizer.json", "tokenizer_config.json"}:
        (folder / f"body-{file}" if file.startswith("model") else folder / file).symlink_to(body / file)
    score = torch.empty(1, config.hidden_size, dtype=torch.bfloat16).normal_(0.0, 0.02)
    save_file({"score.weight": score}, folder / "score.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"body-{file}" for name, file in weight_map.items()} | {"score.weight": "score.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hf_config))


# ---------------------------------------------------------------------------------------------- runs


def engine_rates(folder: Path, prompts: list[list[int]], runtime: Runtime, args: PpoArgs) -> list[float]:
    """Measures tokens/s of the engine as inference/generate.py runs it, after a warm-up run."""
    engine = Engine(
        load_for_inference(folder, runtime),
        SamplingParams(stop_token_ids=(EOS,)),
        num_slots=args.slots,
        max_seq_len=args.prompt_len + args.new_tokens,
        tokenizer=Tokenizer(folder),
        compile=runtime.compile,
    )
    rates = []
    for _ in short_bar(range(args.repeats + 1), "generating", "round"):
        requests = [Request(i, 0, prompt, args.new_tokens) for i, prompt in enumerate(prompts)]
        engine.pool.forget()  # prompts are computed anew in each round, as after each update
        start = time.perf_counter()
        drawn = sum(len(done.logprobs) for done in engine.generate(requests))
        rates.append(drawn / (time.perf_counter() - start))
    del engine
    if runtime.device.type == "cuda":  # leave the memory to the training process
        torch.cuda.empty_cache()
    return rates[1:]


def train(
    folders: tuple[Path, Path], prompts: Path, out: Path, runtime: Runtime, args: PpoArgs
) -> tuple[list[dict], float]:
    """Runs the training script. Returns (metrics of each update, peak memory in bytes)."""
    given = {
        "checkpoint_path": folders[0],
        "reward_checkpoint_path": folders[1],
        "prompt_file": prompts,
        "output_dir": out,
        "device": runtime.device,
        "dtype": dtype_name(runtime.dtype),
        "total_steps": args.repeats + 1,
        "rollout_batch_size": args.batch_size,
        "rollout_slots": args.slots,
        "max_new_tokens": args.new_tokens,
        "cliprange_value": 0,
        "micro_batch_size": args.micro_batch_size,
        "ppo_epochs": args.ppo_epochs,
        "param_dtype": args.param_dtype,
        "optim": args.optim,
        "activation_checkpointing": args.activation_checkpointing,
        "save_steps": 0,
    }
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(SCRIPT), *flags, "--compile" if runtime.compile else "--no-compile"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"training/train_ppo.py failed: {why_it_failed(done)}")
    peak = float(re.search(r"peak memory ([\d,.]+) GB", done.stdout)[1].replace(",", "")) * 1e9
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], peak


def split(median: dict, engine_rate: float, reward: ModelConfig, args: PpoArgs) -> dict:
    """Returns the figures of an update, from the medians of its metrics. reward: shape of reward model and critic."""
    seconds = {name: median[f"time/{name}"] for name in ("rollout", "score", "logprobs", "update", "refresh")}
    whole = sum(seconds.values())
    answers, length = args.batch_size, args.prompt_len + median["completion_length"]
    of_policy = args.config.training_flops_per_token(length, logits=median["completion_length"] / length) / 3
    of_reward = reward.training_flops_per_token(length, logits=0.0) / 3
    flops = {  # per token; the critic has the reward model's shape
        "score": of_reward,
        "logprobs": 2 * of_policy + of_reward,
        "update": 3 * args.ppo_epochs * (of_policy + of_reward),
    }
    tokens = {"rollout": answers * median["completion_length"], "update": answers * length * args.ppo_epochs}
    tokens.update(score=answers * length, logprobs=answers * length)
    ratio = median["rollout_tokens_per_second"] / engine_rate
    titles = {"rollout": "rollout", "score": "scores", "logprobs": "log-probs and values", "update": "training"}
    rows = {}
    for name, title in titles.items():
        shown = f"{seconds[name]:8.3f} s, {seconds[name] / whole:5.1%}, {tokens[name] / seconds[name]:,.0f} tok/s"
        if name in flops:
            shown += f", {answers * length * flops[name] / seconds[name] / 1e12:,.2f} TFLOP/s"
        rows[title] = shown
    rows["rollout"] += f", {ratio:.2f} of the engine alone ({engine_rate:,.0f} tok/s)"
    rows["refresh"] = f"{seconds['refresh']:8.3f} s, {seconds['refresh'] / whole:5.1%}"
    rows["update"] = f"{whole:8.3f} s"
    figures = {
        "tokens_per_second": median["tokens_per_second"],
        "flops_per_second": answers * length * flops["update"] / seconds["update"],
        "seconds": seconds,
        "shares": {name: value / whole for name, value in seconds.items()},
        "rollout_tokens_per_second": median["rollout_tokens_per_second"],
        "engine_tokens_per_second": engine_rate,
        "rollout_ratio": ratio,
        "rows": rows,
    }
    if args.activation_checkpointing != "selective":  # which memory_plan does not cover
        figures["memory_plan"] = memory_plan(args)
        rows["memory on paper"] = sized(sum(figures["memory_plan"].values()))
    return figures


# -------------------------------------------------------------------------------------------- memory


def memory_plan(args: PpoArgs, dp: int = 1, tp: int = 1) -> dict[str, float]:
    """Computes bytes on each rank at the peak of a step, by purpose, for bf16 computation; slots and micro-batches are
    per rank. Policy and critic step in turn, so only one has gradients at a time. The inference copy is sharded over tp
    only, and so are the embedding and head of each trained model, which stay gathered beside its shards."""
    config, reward = args.config, reward_config(args)
    weights = {"float32": 4, "bfloat16": 2}[args.param_dtype]
    moments = {"adamw": 8, "adamw_8bit": 2}[args.optim]
    sizes = {"policy": config.num_parameters(), "critic": reward.num_parameters()}
    length = args.prompt_len + args.new_tokens
    tokens, recompute = args.micro_batch_size * length, args.activation_checkpointing
    steps = [training_memory(shape, dp=dp, tp=tp, tokens=tokens, recompute=recompute) for shape in (config, reward)]
    cut = dp * tp
    return {
        "policy, weights and moments": (weights + moments) * sizes["policy"] / cut,
        "critic, weights and moments": (weights + moments) * sizes["critic"] / cut,
        "gradients of one": weights * max(sizes.values()) / cut,
        "reference": 2 * sizes["policy"] / cut,
        "reward model": 2 * sizes["critic"] / cut,
        "inference copy": 2 * sizes["policy"] / tp,
        "KV cache": args.slots * length * token_bytes(config, 2, tp),
        "gathered": 2 * sum(step["embedding and head, gathered"] for step in steps),
        "activations": max(step["activations"] + step["at the peak"] for step in steps),
    }


def report_plan(args: PpoArgs) -> None:
    """Prints memory_plan for each layout."""
    reward, layouts, plans = args.reward_preset or args.preset, args.layouts or [(1, 1)], []
    for dp, tp in layouts:
        args.config.check_divisible(tp)
        plans.append(memory_plan(args, dp, tp))
        rows = {name: sized(size) for name, size in {**plans[-1], "sum": sum(plans[-1].values())}.items()}
        setting = ppo_setting(args, f"{counted(args.slots, 'answer')} at a time")
        say(card(f"memory of ppo, {args.preset} with reward model {reward}, dp {dp} x tp {tp}, {setting}", rows))
    names = {"job": "ppo", "preset": args.preset, "reward_preset": reward}
    say(json.dumps({**names, "layouts": layouts, "memory_plans": plans}))
