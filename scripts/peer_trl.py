"""TRL as a peer of scripts/benchmark.py: its DPOTrainer."""

import statistics
import tempfile

import torch

from models.common import Runtime, Stopwatch, dtype_name
from scripts.peer_transformers import build, required


def dpo(args, runtime: Runtime, bandwidth: float) -> dict:
    """DPOTrainer on fp32 weights, in bf16 where --dtype says so, with its own AdamW."""
    version = required("trl", "transformers", "datasets")
    if args.param_dtype != "float32" or args.optim != "adamw":
        raise ValueError("--param_dtype, --optim: TRL is compared on fp32 weights with AdamW")
    import datasets
    import tokenizers
    import transformers
    import trl

    config = args.config

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
        for prompt, (chosen, rejected) in args.pairs()
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=len(pairs),
            max_steps=args.repeats + 1,
            learning_rate=1e-5,
            max_length=None,
            bf16=runtime.dtype == torch.bfloat16,
            use_cpu=runtime.device.type == "cpu",
            gradient_checkpointing=args.activation_checkpointing != "none",
            precompute_ref_log_probs=args.precompute_ref,
            torch_compile=runtime.compile,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        model = build(config, torch.float32, runtime.device)
        more = {"train_dataset": datasets.Dataset.from_list(pairs), "callbacks": [Clock]}
        if not args.precompute_ref:
            more["ref_model"] = build(config, torch.float32, runtime.device)
        Trainer(model, args=settings, processing_class=tokenizer, **more).train()
    tokens = 2 * len(pairs) * (args.prompt_len + args.new_tokens)
    how = "compiled" if runtime.compile else "eager"
    return {
        "tokens_per_second": tokens / statistics.median(Clock.times[1:]),
        "ran": f"{version} DPOTrainer, {how}, {dtype_name(runtime.dtype)} on fp32 weights",
    }
