"""Speed beside the physical limit, with random weights.

- the ceilings (a matrix product, a copy) are measured in the same run, so MFU and MBU mean something on any machine
- generate: decode and prefill rates of the engine; sft, dpo: tokens/s of whole optimizer steps
- memory: what a training run needs on each rank, on paper for any layout, and with --measure held against this machine
- --compare runs the peer (transformers; dpo: TRL's DPOTrainer) on the same shape in alternating processes and prints
  the ratios; one process's timing alone says little on a shared machine
- the last line is JSON

    python scripts/benchmark.py generate --preset 134m --dtype bfloat16 --batch_size 8 --prompt_len 64 --new_tokens 128
    python scripts/benchmark.py sft --preset 134m --dtype bfloat16 --batch_size 4 --seq_len 512
    python scripts/benchmark.py dpo --preset 134m --dtype bfloat16 --batch_size 4 --prompt_len 128 --new_tokens 128
    python scripts/benchmark.py memory --preset 7b --layouts 1x1 8x1 4x2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from models.decode import can_pack, to_inference, weight_bytes
from models.fsdp import check_divisible, clip_grad_norm, init_mesh, parallel_of, reducing_gradients, shard_model
from models.generation import Engine, Request, SamplingParams
from models.model import PRESETS, ModelConfig, Transformer
from models.tp import CHUNK_TOKENS
from training.common import (
    ArgumentParser,
    Runtime,
    Stopwatch,
    add_runtime_arguments,
    card,
    choose_runtime,
    device_name,
    peak_memory,
    positive_int,
    run_script,
    say,
    training_flops_per_token,
)
from training.data import IGNORE_INDEX, Example
from training.losses import dpo_loss, sequence_logps, token_cross_entropy, token_logps
from training.optim import make_optimizer
from training.preferences import Pair, collate_pairs

SIZES = {
    "23m": ModelConfig(4000, 512, 1376, 6, 8, 8, 64, 4096),
    "134m": ModelConfig(32000, 768, 2048, 12, 12, 12, 64, 4096),
    "1b": PRESETS["meta-llama/Llama-3.2-1B"],
    "7b": PRESETS["meta-llama/Llama-2-7b-chat-hf"],
    "8b": PRESETS["meta-llama/Llama-3.1-8B"],
}
PEERS = {"generate": "transformers", "sft": "transformers", "dpo": "trl"}


def parser() -> ArgumentParser:
    parser = ArgumentParser("Speed beside the physical limit, with random weights.")
    add_runtime_arguments(parser)
    add = parser.add_argument
    add("job", choices=[*PEERS, "memory"], help="what to measure")
    add("--preset", choices=list(SIZES), default="134m", help="shape of the model")
    add("--batch_size", type=positive_int, default=8, help="slots, rows of a step, or its pairs (memory: micro-batch)")
    add("--prompt_len", type=positive_int, default=64, help="generate, dpo: tokens of each prompt")
    add("--new_tokens", type=positive_int, default=128, help="generate, dpo: tokens of each completion")
    add("--seq_len", type=positive_int, default=512, help="sft, memory: tokens of each row")
    add("--activation_checkpointing", choices=["none", "full", "selective"], default="none", help="recompute in steps")
    add(
        "--precompute_ref",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="dpo: the reference's log-probs once before training, else in each step",
    )
    add("--repeats", type=positive_int, default=3, help="timed runs (generate) or steps, after one to warm up")
    add("--engine", choices=["ours", "peer"], default="ours", help="what to run; the peer is transformers, or trl")
    add("--layouts", nargs="+", type=layout, default=None, help="memory: dp x tp, as 1x1 8x1 4x2; this run's ranks")
    add("--measure", action="store_true", help="memory: train with random weights and print the measured peak beside")
    add("--compare", type=positive_int, default=None, help="alternate ours and the peer so many times")
    add("--peer_python", type=Path, default=Path(sys.executable), help="--compare: interpreter that has the peer")
    return parser


def layout(text: str) -> tuple[int, int]:
    dp, _, tp = text.partition("x")
    return positive_int(dp), positive_int(tp)


def main(*, job: str, compare: int | None, engine: str, preset: str, repeats: int, seed: int, **options) -> None:
    if compare:
        compare_engines(job, compare, options["peer_python"])
        return
    if job == "memory":
        report_memory(preset, options)
        return
    runtime = choose_runtime(options["device"], options["dtype"], options["compile"])
    config = SIZES[preset]
    torch.manual_seed(seed)
    flops, bandwidth = ceilings(runtime.device)
    ours = {"generate": measure_generate, "sft": measure_sft, "dpo": measure_dpo}
    measure = ours[job] if engine == "ours" else peer(job)
    result = measure(config, runtime, repeats, options)
    rows = {
        "model": f"{preset}, {config.num_parameters() / 1e6:,.1f} M parameters, random",
        "device": f"{device_name(runtime.device)}, {str(runtime.dtype).removeprefix('torch.')}"
        + ", compiled" * runtime.compile,
        "versions": f"torch {torch.__version__}, engine {engine if engine == 'ours' else PEERS[job]}",
        "ceilings": f"{flops / 1e12:,.2f} TFLOP/s (matrix product), {bandwidth / 1e9:,.1f} GB/s (copy)",
        "speed": f"{result['tokens_per_second']:,.1f} tok/s (median of {repeats})",
    }
    if "bytes_per_second" in result:
        result["mbu"] = result["bytes_per_second"] / bandwidth
        rows["bandwidth"] = f"{result['bytes_per_second'] / 1e9:,.1f} GB/s, {result['mbu']:.1%} of the copy"
    if "flops_per_second" in result:
        result["mfu"] = result["flops_per_second"] / flops
        rows["rate"] = f"{result['flops_per_second'] / 1e12:,.2f} TFLOP/s, {result['mfu']:.1%} of the matrix product"
    result["peak_memory"] = peak_memory(runtime.device)
    rows["memory"] = f"{result['peak_memory'] / 1e9:,.2f} GB peak"
    print(card(f"{job}, {setting(job, options)}", rows))
    print(json.dumps({"job": job, "preset": preset, "engine": engine, **rows, **result}))


def setting(job: str, options: dict) -> str:
    if job == "generate":
        return "{batch_size} slots, {prompt_len} + {new_tokens} tokens".format(**options)
    recompute = f"recompute {options['activation_checkpointing']}"
    if job == "sft":
        return "{batch_size} x {seq_len} tokens, ".format(**options) + recompute
    when = "before training" if options["precompute_ref"] else "in each step"
    return (
        "{batch_size} x 2 x ({prompt_len} + {new_tokens}) tokens, ".format(**options) + f"reference {when}, {recompute}"
    )


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a call, after one that does not count."""
    function()
    watch, times = Stopwatch(device), []
    for _ in range(repeats):
        function()
        times.append(watch.lap())
    return statistics.median(times)


def ceilings(device: torch.device) -> tuple[float, float]:
    """(FLOP/s of a bf16 matrix product, bytes/s of a copy, read and written), measured."""
    size, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.randn(length, device=device)
    target = torch.empty_like(source)
    product = seconds_of(lambda: a @ b, device, 7)
    copy = seconds_of(lambda: target.copy_(source), device, 7)
    return 2 * size**3 / product, 2 * source.nbytes / copy


@torch.inference_mode()
def measure_generate(config: ModelConfig, runtime, repeats: int, options: dict) -> dict:
    with torch.device("meta"):
        model = Transformer(config).to(runtime.dtype)
    model.to_empty(device=runtime.device).init_weights()
    model.reset_buffers(runtime.device)
    to_inference(model, pack=not runtime.compile and can_pack(runtime.device, runtime.dtype))
    batch, prompt_len, new_tokens = (options[name] for name in ("batch_size", "prompt_len", "new_tokens"))
    engine = Engine(
        model,
        SamplingParams(),
        num_slots=batch,
        max_seq_len=prompt_len + new_tokens,
        compile=runtime.compile,
    )
    prompts = torch.randint(3, config.vocab_size, (batch, prompt_len)).tolist()
    results = []
    for _ in range(repeats + 1):
        engine.reset_stats()
        start = time.perf_counter()
        for _ in engine.generate([Request(i, 0, prompt, new_tokens) for i, prompt in enumerate(prompts)]):
            pass
        seconds = time.perf_counter() - start
        read = engine.num_steps * weight_bytes(model) + engine.cache_bytes_read
        results.append((batch * new_tokens / seconds, read / max(engine.decode_seconds, 1e-9), engine.decode_seconds))
    rate, bandwidth, decode = (statistics.median(column) for column in zip(*results[1:]))
    return {
        "tokens_per_second": rate,
        "bytes_per_second": bandwidth,
        "ms_per_step": 1e3 * decode / engine.num_steps,
    }


def sharded_model(config: ModelConfig, runtime: Runtime, tensor_parallel_size: int = 1, **options) -> Transformer:
    """A model of random weights on the ranks of this run, as the training scripts have it. options: of shard_model."""
    mesh = init_mesh(runtime.device, tensor_parallel_size)
    with torch.device("meta"):
        model = Transformer(config, runtime.dtype, parallel_of(mesh))
    shard_model(model, mesh, compute_dtype=runtime.dtype, compile=runtime.compile, **options)
    model.to_empty(device=runtime.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(0.0, 0.02)
    model.reset_buffers(runtime.device)
    return model


def random_model(config: ModelConfig, runtime: Runtime, recompute: str, tensor_parallel_size: int):
    """(a model of random weights, its optimizer), ready for training on the ranks of this run."""
    model = sharded_model(config, runtime, tensor_parallel_size, recompute=recompute)
    return model, make_optimizer(model, learning_rate=1e-5, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)


def seconds_of_step(model, optimizer, loss_of: Callable[[], torch.Tensor], runtime: Runtime, repeats: int) -> float:
    def step() -> None:
        loss_of().backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return seconds_of(step, runtime.device, repeats)


def measure_sft(config: ModelConfig, runtime, repeats: int, options: dict) -> dict:
    model, optimizer = random_model(config, runtime, options["activation_checkpointing"], tensor_parallel_size=1)
    shape = (options["batch_size"], options["seq_len"])
    ids = torch.randint(3, config.vocab_size, shape, device=runtime.device)
    tokens = ids.numel()

    def loss_of() -> torch.Tensor:
        return token_cross_entropy(model(ids), model.lm_head.weight, ids) / tokens

    rate = tokens / seconds_of_step(model, optimizer, loss_of, runtime, repeats)
    return {"tokens_per_second": rate, "flops_per_second": rate * training_flops_per_token(config, shape[1])}


def random_pairs(config: ModelConfig, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompts [B, T], chosen and rejected completions [B, 2, T])"""
    batch, prompt_len, new_tokens = (options[name] for name in ("batch_size", "prompt_len", "new_tokens"))
    prompts = torch.randint(3, config.vocab_size, (batch, prompt_len))
    return prompts, torch.randint(3, config.vocab_size, (batch, 2, new_tokens))


def measure_dpo(config: ModelConfig, runtime, repeats: int, options: dict) -> dict:
    pairs = []
    for prompt, sides in zip(*(ids.tolist() for ids in random_pairs(config, options))):
        rows = [Example(prompt + side, [IGNORE_INDEX] * len(prompt) + side) for side in sides]
        pairs.append(Pair(len(prompt), *rows))
    model, optimizer = random_model(config, runtime, options["activation_checkpointing"], tensor_parallel_size=1)
    reference = sharded_model(config, runtime, param_dtype=runtime.dtype).requires_grad_(False)

    def logps_of(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate_pairs(pairs, 0, runtime.device)
        logps, _ = token_logps(model(batch.input_ids), model.lm_head.weight, batch.labels)
        return sequence_logps(logps, batch.labels)

    @torch.no_grad()
    def reference_logps() -> torch.Tensor:
        return logps_of(reference)[0]

    known = None
    if options["precompute_ref"]:
        known, reference = reference_logps(), None

    def loss_of() -> torch.Tensor:
        logps, lengths = logps_of(model)
        ref_logps = reference_logps() if known is None else known
        return dpo_loss("sigmoid", *logps.chunk(2), *ref_logps.chunk(2), *lengths.chunk(2), beta=0.1).losses.mean()

    length = options["prompt_len"] + options["new_tokens"]
    rate = 2 * len(pairs) * length / seconds_of_step(model, optimizer, loss_of, runtime, repeats)
    flops = training_flops_per_token(config, length) * (1 if options["precompute_ref"] else 4 / 3)
    return {"tokens_per_second": rate, "flops_per_second": rate * flops}


def training_memory(
    config: ModelConfig,
    *,
    dp: int,
    tp: int,
    tokens: int,
    recompute: str = "none",
    compute_bytes: int = 2,
    on_cpu: bool = False,
) -> dict[str, float]:
    """Bytes on each rank at the peak of an optimizer step of several micro-batches of `tokens` tokens, by purpose.

    fp32 weights, gradients and AdamW moments; embedding and head gathered throughout, a block and the next one at a
    time; the activations that autograd keeps of the eager layers with a fused attention. The peak is in the loss, in
    the backward of the last block, or where the gradients of embedding and head are reduced. on_cpu: RMSNorm keeps two
    fp32 copies of its input instead of one, and no block's backward overlaps with the reduction of the one before.
    """
    E, F, H, c = config.hidden_size, config.intermediate_size, config.num_attention_heads, compute_bytes
    q, kv = H * config.head_dim, config.num_key_value_heads * config.head_dim
    table = config.vocab_size * E / tp
    root = (2 - config.tie_word_embeddings) * table + E
    block = (2 * E * (q + kv) + 3 * E * F) / tp + 2 * E
    shard = (config.num_hidden_layers * block + root) / dp

    norm = (4 * (2 if on_cpu else 1) + c) * E  # a token's fp32 input of a norm, and the output
    whole = 2 * norm + (2 * c * (q + kv) + 4 * H + 4 * c * F) / tp  # and q, k, v, attention with its log-sums; the MLP
    kept = tokens * (config.num_hidden_layers * {"none": whole, "full": c * E}[recompute] + norm)

    logits = min(tokens, CHUNK_TOKENS) * config.vocab_size / tp * (c if c == 4 else c + 4)
    loss = logits + (4 + c) * table + 2 * c * tokens * E  # with the head's gradient
    widest = tokens * (3 * c * F / tp + 2 * c * E + (whole if recompute == "full" else 0))
    reduction = c + (4 if dp > 1 else c) + 4 / dp  # a gradient whole, in fp32 to be reduced, and reduced
    overlapping = (widest, reduction * block)
    backward = (max if on_cpu else sum)(overlapping) + 2 * c * block + c * table
    return {
        "parameters": 4 * shard,
        "gradients": 4 * shard,
        "AdamW moments": 8 * shard,
        "embedding and head, gathered": c * root,
        "activations": kept,
        "at the peak": max(loss, backward, reduction * root - kept),
    }


def report_memory(preset: str, options: dict) -> None:
    """Prints training_memory for each layout, and what this run's ranks took."""
    config, recompute = SIZES[preset], options["activation_checkpointing"]
    world = int(os.environ.get("WORLD_SIZE", 1))
    layouts = options["layouts"] or [(world, 1)]
    runtime = choose_runtime(options["device"], options["dtype"] or "bfloat16", False)
    shape = (options["batch_size"], options["seq_len"])
    tables = []
    for dp, tp in layouts:
        check_divisible(config, tp)
        sizes = {"dp": dp, "tp": tp, "tokens": shape[0] * shape[1], "recompute": recompute}
        on_cpu = options["measure"] and runtime.device.type == "cpu"
        found = training_memory(config, **sizes, compute_bytes=runtime.dtype.itemsize, on_cpu=on_cpu)
        found["sum"] = sum(found.values())
        if options["measure"]:
            if dp * tp != world:
                raise ValueError(f"--measure takes one layout, of the {world} ranks of this run")
            if on_cpu and dp > 1:  # gloo frees what it has reduced in a thread that the profiler does not see
                raise ValueError("--measure on the CPU counts right with dp 1 only")
            found["measured"] = measure_memory(config, runtime, recompute, tp, shape)
        tables.append(found)
        rows = {name: f"{size / 1e9:8.2f} GB" for name, size in found.items()}
        if options["measure"]:
            rows["measured"] += f", the sum is {found['sum'] / found['measured'] - 1:+.1%} off"
        title = f"memory of {preset}, dp {dp} x tp {tp}, {setting('sft', options)}"
        say(card(title, rows))
    say(json.dumps({"job": "memory", "preset": preset, "layouts": layouts, "bytes": tables}))


def measure_memory(
    config: ModelConfig, runtime: Runtime, recompute: str, tensor_parallel_size: int, shape: tuple[int, int]
) -> int:
    """The most bytes that were allocated on this rank in two optimizer steps of two micro-batches each."""

    def train() -> None:
        model, optimizer = random_model(config, runtime, recompute, tensor_parallel_size)
        ids = torch.randint(3, config.vocab_size, shape, device=runtime.device)
        vocabulary = {"vocab_size": config.vocab_size, "tp": model.parallel.tp}
        for _ in range(2):
            for rows in reducing_gradients(model, [ids, ids], every=True):
                token_cross_entropy(model(rows), model.lm_head.weight, rows, **vocabulary).backward()
            clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    if runtime.device.type == "cuda":
        train()
        return torch.cuda.max_memory_allocated(runtime.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def peer(job: str) -> Callable:
    """The same job with transformers' generate(), a plain loop of its model with bf16 autocast and AdamW, or TRL's
    DPOTrainer."""
    try:
        import transformers

        if job == "dpo":
            import datasets
            import tokenizers
            import trl
    except ImportError:
        raise ValueError(f"--engine peer needs {PEERS[job]}: pip install it here or in --peer_python") from None

    def build(config: ModelConfig, dtype: torch.dtype, device: torch.device):
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
        shape = {name: getattr(config, name) for name in names}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(device, dtype)

    def generate(config: ModelConfig, runtime, repeats: int, options: dict) -> dict:
        model = build(config, runtime.dtype, runtime.device).eval()
        batch, prompt_len, new_tokens = (options[name] for name in ("batch_size", "prompt_len", "new_tokens"))
        ids = torch.randint(3, config.vocab_size, (batch, prompt_len), device=runtime.device)
        lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0, "do_sample": True}
        run = lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **lengths)  # noqa: E731
        return {"tokens_per_second": batch * new_tokens / seconds_of(run, runtime.device, repeats)}

    def sft(config: ModelConfig, runtime, repeats: int, options: dict) -> dict:
        model = build(config, torch.float32, runtime.device).train()
        optimizer = make_optimizer(model, learning_rate=1e-5, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
        shape = (options["batch_size"], options["seq_len"])
        ids = torch.randint(3, config.vocab_size, shape, device=runtime.device)

        def step() -> None:
            with torch.autocast(runtime.device.type, runtime.dtype, enabled=runtime.dtype != torch.float32):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return {"tokens_per_second": ids.numel() / seconds_of(step, runtime.device, repeats)}

    def dpo(config: ModelConfig, runtime, repeats: int, options: dict) -> dict:
        class Trainer(trl.DPOTrainer):
            def _prepare_dataset(self, dataset, *args, **kwargs):  # tokens already
                return dataset

        class Clock(transformers.TrainerCallback):
            watch, times = Stopwatch(runtime.device), []

            def on_step_begin(self, *args, **kwargs):
                self.watch.lap()

            def on_step_end(self, *args, **kwargs):
                self.times.append(self.watch.lap())

        words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, config.vocab_size)}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        pairs = [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for prompt, (chosen, rejected) in zip(*(ids.tolist() for ids in random_pairs(config, options)))
        ]
        with tempfile.TemporaryDirectory() as folder:
            settings = trl.DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=len(pairs),
                max_steps=repeats + 1,
                learning_rate=1e-5,
                max_length=None,
                bf16=runtime.dtype == torch.bfloat16,
                use_cpu=runtime.device.type == "cpu",
                gradient_checkpointing=options["activation_checkpointing"] != "none",
                precompute_ref_log_probs=options["precompute_ref"],
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            )
            model = build(config, torch.float32, runtime.device)
            more = {"train_dataset": datasets.Dataset.from_list(pairs), "callbacks": [Clock]}
            if not options["precompute_ref"]:
                more["ref_model"] = build(config, torch.float32, runtime.device)
            Trainer(model, args=settings, processing_class=tokenizer, **more).train()
        tokens = 2 * len(pairs) * (options["prompt_len"] + options["new_tokens"])
        return {"tokens_per_second": tokens / statistics.median(Clock.times[1:])}

    return {"generate": generate, "sft": sft, "dpo": dpo}[job]


def compare_engines(job: str, rounds: int, peer_python: Path) -> None:
    """Runs this command with either engine in turn, each in a process of its own, and prints the ratios."""
    arguments = sys.argv[1:]
    at = arguments.index("--compare")
    del arguments[at : at + 2]
    found = {"ours": [], "peer": []}
    for i in range(rounds):
        for engine, results in found.items():
            python = sys.executable if engine == "ours" else peer_python
            command = [python, __file__, *arguments, "--engine", engine]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"--engine {engine} failed: {done.stderr.strip().splitlines()[-1]}")
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
            name = engine if engine == "ours" else PEERS[job]
            speed, memory = results[-1]["tokens_per_second"], results[-1]["peak_memory"] / 1e9
            print(f"round {i + 1}: {name:12} {speed:10,.1f} tok/s, {memory:,.2f} GB peak", flush=True)
    pairs = list(zip(found["ours"], found["peer"]))
    speed = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
    memory = [ours["peak_memory"] / theirs["peak_memory"] for ours, theirs in pairs]
    print(f"ours / {PEERS[job]}: speed {', '.join(f'{x:.2f}' for x in speed)}; memory {statistics.median(memory):.2f}")
    print(json.dumps({"speed_ratios": speed, "memory_ratios": memory, "ours": found["ours"][-1]}))


if __name__ == "__main__":
    run_script(main, parser())
