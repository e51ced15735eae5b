"""What scripts/benchmark.py compares with: the same jobs, done by the peer."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict

import torch

from models.common import Runtime, Stopwatch
from models.model import ModelConfig
from scripts.benchmark_common import BenchmarkArgs, seconds_of
from scripts.benchmark_generate import work
from scripts.benchmark_training import random_pairs
from training.optim import make_optimizer

PEERS = {"generate": "transformers", "sft": "transformers", "dpo": "trl"}


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
        theirs = transformers.AutoConfig.for_model(**asdict(config))
        return transformers.AutoModelForCausalLM.from_config(theirs).to(device, dtype)

    def generate(args: BenchmarkArgs, runtime: Runtime, bandwidth: float) -> dict:
        config = args.config
        model = build(config, runtime.dtype, runtime.device).eval()
        sizes, batch_size = sorted(work(args)), args.batch_size  # static batches, by the prompts' lengths
        batches = []
        for start in range(0, len(sizes), batch_size):
            rows = sizes[start : start + batch_size]
            longest, new_tokens = (max(column) for column in zip(*rows))
            ids = torch.randint(3, config.vocab_size, (len(rows), longest), device=runtime.device)
            padding = longest - torch.tensor([prompt_len for prompt_len, _ in rows], device=runtime.device)
            mask = (torch.arange(longest, device=runtime.device) >= padding[:, None]).long()
            lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0, "do_sample": True}
            batches.append({"inputs": ids, "attention_mask": mask, **lengths})

        def run() -> None:
            for batch in batches:
                model.generate(**batch)

        rate = sum(new_tokens for _, new_tokens in sizes) / seconds_of(run, runtime.device, args.repeats)
        return {"tokens_per_second": rate}

    def sft(args: BenchmarkArgs, runtime: Runtime, bandwidth: float) -> dict:
        config = args.config
        if args.lora_r is None:
            model = build(config, torch.float32, runtime.device).train()
        else:  # the base in the dtype of the computation, the adapters in fp32, as TRL has it
            import peft

            settings = peft.LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear")
            model = peft.get_peft_model(build(config, runtime.dtype, runtime.device), settings).train()
        optimizer = make_optimizer(model, args.optimizer())
        shape = (args.batch_size, args.seq_len)
        ids = torch.randint(3, config.vocab_size, shape, device=runtime.device)

        def step() -> None:
            with torch.autocast(runtime.device.type, runtime.dtype, enabled=runtime.dtype != torch.float32):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return {"tokens_per_second": ids.numel() / seconds_of(step, runtime.device, args.repeats)}

    def dpo(args: BenchmarkArgs, runtime: Runtime, bandwidth: float) -> dict:
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
            for prompt, (chosen, rejected) in zip(*(ids.tolist() for ids in random_pairs(args)))
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
        return {"tokens_per_second": tokens / statistics.median(Clock.times[1:])}

    return {"generate": generate, "sft": sft, "dpo": dpo}[job]
