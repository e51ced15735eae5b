"""TRL as a peer of scripts/benchmark.py: SFTTrainer, with or without PEFT's adapters, and DPOTrainer."""

import statistics
import tempfile

import torch

from models.common import Runtime, Stopwatch
from scripts.peer_transformers import build, mode, required
from scripts.workload import random_ids


def step_clock(runtime: Runtime):
    """Returns a callback whose `times` are the seconds of each step, including the update."""
    import transformers

    class Clock(transformers.TrainerCallback):
        watch, times = Stopwatch(runtime.device), []

        def on_step_begin(self, *args, **kwargs):
            self.watch.lap()

        def on_step_end(self, *args, **kwargs):
            self.times.append(self.watch.lap())

    return Clock()


def word_tokenizer(vocab_size: int):
    """Returns a tokenizer that TRL accepts as the model's."""
    import tokenizers
    import transformers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def dataset_of(records: list[dict]):
    """Returns a data set with a fixed fingerprint: computing one fails in dill with some versions of pyarrow."""
    import datasets
    import pyarrow

    return datasets.Dataset(pyarrow.Table.from_pylist(records), fingerprint="benchmark")


def check_comparable(args) -> None:
    """Raises ValueError for settings that cannot be compared with TRL."""
    if args.param_dtype != "float32" or args.optim != "adamw" or getattr(args, "quantize_base", "none") != "none":
        raise ValueError("--param_dtype, --optim, --quantize_base: TRL is compared on fp32 weights with AdamW")
    if args.activation_checkpointing == "selective":
        raise ValueError("--activation_checkpointing selective: TRL knows none and full")


def settings_of(args, runtime: Runtime, folder: str) -> dict:
    """Settings that both trainers share."""
    return {
        "output_dir": folder,
        "max_steps": args.repeats + 1,
        "learning_rate": 1e-5,
        "max_length": None,
        "bf16": runtime.dtype == torch.bfloat16,
        "use_cpu": runtime.device.type == "cpu",
        "gradient_checkpointing": args.activation_checkpointing != "none",
        "torch_compile": runtime.compile,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def sft(args, runtime: Runtime) -> dict:
    """Runs SFTTrainer on fp32 weights, in bf16 if --dtype says so, with its own AdamW, on rows of ids, all learnt.
    By default it recomputes activations; --activation_checkpointing none turns that off."""
    check_comparable(args)
    version = required("trl", "transformers", "datasets", *["peft"] * (args.lora_r is not None))
    import trl

    clock, ids, more = step_clock(runtime), random_ids(args.config.vocab_size, args.batch_size, args.seq_len), {}
    if args.lora_r is not None:
        import peft

        more["peft_config"] = peft.LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.SFTConfig(
            per_device_train_batch_size=len(ids),
            dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokenised already
            **settings_of(args, runtime, folder),
        )
        more |= {"processing_class": word_tokenizer(args.config.vocab_size), "callbacks": [clock]}
        rows = dataset_of([{"input_ids": row, "labels": row} for row in ids.tolist()])
        model = build(args.config, torch.float32, runtime.device)
        trl.SFTTrainer(model, args=settings, train_dataset=rows, **more).train()
    recompute = "activations recomputed" if settings.gradient_checkpointing else "activations kept"
    return {
        "tokens_per_second": ids.numel() / statistics.median(clock.times[1:]),
        "ran": f"{version} SFTTrainer, {mode(runtime)} on fp32 weights, {recompute}",
    }


def dpo(args, runtime: Runtime) -> dict:
    """Runs DPOTrainer on fp32 weights, in bf16 if --dtype says so, with its own AdamW."""
    check_comparable(args)
    version = required("trl", "transformers", "datasets")
    import trl

    config = args.config

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):  # pairs are tokenised already
            return dataset

    clock, tokenizer = step_clock(runtime), word_tokenizer(config.vocab_size)
    pairs = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, (chosen, rejected) in args.pairs()
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            per_device_train_batch_size=len(pairs),
            precompute_ref_log_probs=args.precompute_ref,
            **settings_of(args, runtime, folder),
        )
        model = build(config, torch.float32, runtime.device)
        more = {"train_dataset": dataset_of(pairs), "callbacks": [clock]}
        if not args.precompute_ref:
            more["ref_model"] = build(config, torch.float32, runtime.device)
        Trainer(model, args=settings, processing_class=tokenizer, **more).train()
    tokens = 2 * len(pairs) * (args.prompt_len + args.new_tokens)
    return {
        "tokens_per_second": tokens / statistics.median(clock.times[1:]),
        "ran": f"{version} DPOTrainer, {mode(runtime)} on fp32 weights",
    }
