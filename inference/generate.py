"""Batched generation from the command line: prompts in, one JSON line for each sample out.

- all slots of the batch stay busy: a finished sample's slot takes the next prompt at once (models/generation.py)
- each line is on disk when its sample is finished; after a kill, --resume goes on with the samples that are missing and
  draws the very same ones, whatever the batch size

    python inference/generate.py --checkpoint_path DIR --prompt "The capital of France is"
    python inference/generate.py --checkpoint_path DIR --prompt_file prompts.jsonl --output_file out.jsonl
"""

import dataclasses
import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from models.checkpoint import generation_eos_ids
from models.decode import load_for_inference, weight_bytes
from models.fsdp import check_divisible, data_parallel_size, init_mesh, parallel_of
from models.generation import Completion, Engine, Request, SamplingParams
from models.model import ModelConfig
from models.quantize import choose_scheme
from models.tokenizer import Tokenizer
from models.tp import is_main_rank
from training.common import (
    ArgumentParser,
    Runtime,
    add_model_arguments,
    add_quantize_arguments,
    card,
    choose_runtime,
    device_name,
    fraction,
    non_negative_float,
    non_negative_int,
    peak_memory,
    peaks,
    positive_int,
    progress_bar,
    run_script,
)
from training.data import Record, check_ids, check_vocabulary, encode_prompt, get_prompt, read_records
from training.lines import LineWriter, encode_line, read_begun, refuse_occupied


def parser() -> ArgumentParser:
    parser = ArgumentParser("Generates completions for prompts, in batches, from a Hugging Face folder.")
    add_model_arguments(parser)
    add = parser.add_argument
    add("--prompt", action="append", default=None, help="a prompt; may be given several times")
    add("--prompt_file", type=Path, default=None, help="JSON or JSONL records with a prompt each")
    add("--output_file", type=Path, default=None, help="JSONL file for the samples; standard output if absent")
    add("--resume", action="store_true", help="go on with the samples that --output_file does not have yet")
    add("--max_new_tokens", type=positive_int, default=256, help="most tokens of a completion")
    add("--temperature", type=non_negative_float, default=1.0, help="0 is greedy")
    add("--top_k", type=non_negative_int, default=0, help="sample among the k likeliest tokens; 0 is off")
    add("--top_p", type=fraction, default=1.0, help="sample among the likeliest tokens of this total probability")
    add("--num_samples", type=positive_int, default=1, help="samples for each prompt")
    add("--batch_size", type=positive_int, default=8, help="slots: sequences decoded together on each dp rank")
    add(
        "--max_seq_len",
        type=positive_int,
        default=None,
        help="most tokens of prompt and completion; what the run needs",
    )
    add("--overlong", choices=["refuse", "skip", "truncate"], default="refuse", help="prompts that leave no room")
    add("--stop", action="append", default=None, help="a text that ends a completion; may be given several times")
    add("--chat", action="store_true", help="put text prompts through the chat template, as the user's message")
    add("--return_token_ids", action="store_true", help="add token_ids to each line")
    add_quantize_arguments(parser)
    add(
        "--tensor_parallel_size",
        type=positive_int,
        default=1,
        help="ranks that share the model, adjacent under torchrun",
    )
    return parser


class Prompt(NamedTuple):
    idx: int
    record: Record
    ids: list[int]


@torch.inference_mode()
def main(
    *,
    checkpoint_path: Path,
    device: str | None,
    dtype: str | None,
    seed: int,
    compile: bool | None,
    prompt: list[str] | None,
    prompt_file: Path | None,
    output_file: Path | None,
    resume: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    num_samples: int,
    batch_size: int,
    max_seq_len: int | None,
    overlong: str,
    stop: list[str] | None,
    chat: bool,
    return_token_ids: bool,
    quantize: str,
    group_size: int | None,
    tensor_parallel_size: int,
) -> None:
    data_parallel_size(tensor_parallel_size)  # raises if it does not divide the ranks
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give either --prompt or --prompt_file")
    if resume and output_file is None:
        raise ValueError("--resume needs the --output_file to go on with")
    if stop and not all(stop):
        raise ValueError("--stop must not be empty")
    if output_file is not None and not resume:
        refuse_occupied(output_file)

    runtime = choose_runtime(device, dtype, compile)
    config = ModelConfig.from_hf(checkpoint_path)
    check_divisible(config, tensor_parallel_size)
    scheme = choose_scheme(checkpoint_path, quantize, group_size)
    context = config.max_position_embeddings
    if max_seq_len is not None and max_seq_len > context:
        raise ValueError(f"--max_seq_len {max_seq_len}: the model's context is {context} tokens")
    tokenizer = Tokenizer(checkpoint_path)
    check_vocabulary(tokenizer, config.vocab_size, checkpoint_path)
    records = (
        read_records(prompt_file)
        if prompt_file is not None
        else [Record(f"--prompt {i + 1}", {"prompt": text}) for i, text in enumerate(prompt)]
    )
    limit = max_seq_len or context
    prompts, notes = encode_prompts(
        records, tokenizer, config.vocab_size, limit=limit, max_new_tokens=max_new_tokens, overlong=overlong, chat=chat
    )
    eos_ids = generation_eos_ids(checkpoint_path, default=tokenizer.eos_token_id)
    params = SamplingParams(temperature, top_k, top_p, seed, eos_ids, tuple(stop or ()))
    requests = [
        Request(p.idx, sample_idx, p.ids, min(max_new_tokens, limit - len(p.ids)))
        for p in prompts
        for sample_idx in range(num_samples)
    ]
    begun_with = {
        "checkpoint_path": str(checkpoint_path.resolve()),
        "prompts": hashlib.sha256(json.dumps([[p.idx, p.ids] for p in prompts]).encode()).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "max_seq_len": limit,
        "num_samples": num_samples,
        "return_token_ids": return_token_ids,
        "dtype": str(runtime.dtype),
        "quantize": None if scheme is None else str(scheme),
        **dataclasses.asdict(params),
    }
    finished = read_begun(output_file, begun_with, "generate.py", ("idx", "sample_idx")) if resume else []
    done = {(line["idx"], line["sample_idx"]) for line in finished}
    requests = [request for request in requests if (request.idx, request.sample_idx) not in done]

    mesh = init_mesh(runtime.device, tensor_parallel_size)  # all ranks have looked at the files by now
    requests = requests_of_rank(requests, mesh["dp"])
    model = load_for_inference(
        checkpoint_path,
        device=runtime.device,
        dtype=runtime.dtype,
        compile=runtime.compile,
        tp=parallel_of(mesh).tp,
        scheme=scheme,
    )
    engine = Engine(
        model,
        params,
        num_slots=max(1, min(batch_size, len(requests))),
        max_seq_len=max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=1),
        tokenizer=tokenizer,
        compile=runtime.compile,
    )
    stream = sys.stdout if output_file is not None else sys.stderr  # stdout is for the samples, if nothing else
    say = partial(print, file=stream) if is_main_rank() else lambda _: None
    counts = (len(prompts) * num_samples, len(done))
    say(start_card(checkpoint_path, config, scheme, runtime, engine, mesh, *counts, notes))
    record_of = {p.idx: p.record for p in prompts}
    active = mesh["tp"].get_local_rank() == 0  # of the ranks that share a model
    writer = LinePrinter(active) if output_file is None else LineWriter(output_file, begun_with, active)
    with writer, TokenCounter(len(requests)) as counter:
        for completion in engine.generate(requests, on_token=counter.count):
            writer.write(line_of(completion, record_of[completion.request.idx], return_token_ids))
            counter.finish_sample()
    say(end_card(engine, model, runtime, mesh["dp"]))


def requests_of_rank(requests: list[Request], dp: DeviceMesh) -> list[Request]:
    """One data-parallel rank's share: whole prompts in turn, so that a prompt's samples share its prefill."""
    order = {idx: place for place, idx in enumerate(dict.fromkeys(request.idx for request in requests))}
    return [request for request in requests if order[request.idx] % dp.size() == dp.get_local_rank()]


def encode_prompts(
    records: list[Record],
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    limit: int,
    max_new_tokens: int,
    overlong: str,
    chat: bool,
) -> tuple[list[Prompt], list[str]]:
    """(prompts with their ids, remarks for the card). A prompt is overlong if it leaves no room for one token;
    truncating cuts its beginning, but for the BOS, so that the completion fits or has half of the room."""
    prompts, skipped, truncated, short = [], 0, 0, 0
    for idx, record in enumerate(
        tqdm(records, desc="tokenising", unit="prompt", delay=1, leave=False, disable=not is_main_rank())
    ):
        prompt = get_prompt(record)
        if chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        try:
            ids = encode_prompt(prompt, tokenizer)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None
        if not ids:
            raise ValueError(f"{record.where}: the prompt has no tokens, so there is nothing to go on from")
        check_ids(ids, vocab_size, record.where)
        if len(ids) >= limit:
            if overlong == "refuse" or limit < 2:
                raise ValueError(
                    f"{record.where}: the prompt has {len(ids)} tokens, which leaves no room in {limit}; raise "
                    "--max_seq_len or choose --overlong skip or truncate"
                )
            if overlong == "skip":
                skipped += 1
                continue
            truncated += 1
            bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []
            keep = max(limit - max_new_tokens, limit // 2) - len(bos)  # at least half of the room is the prompt's
            ids = bos + ids[len(ids) - keep :]
        short += len(ids) + max_new_tokens > limit
        prompts.append(Prompt(idx, record, ids))
    if not prompts:
        raise ValueError(f"all {skipped} prompts leave no room in {limit} tokens")
    remarks = (
        (skipped, "prompts skipped as too long"),
        (truncated, "prompts truncated"),
        (short, f"prompts with room for fewer than {max_new_tokens} new tokens"),
    )
    return prompts, [f"{count} {what}" for count, what in remarks if count]


# -------------------------------------------------------------------------------------- the output


class LinePrinter:
    """Stands where a LineWriter does when there is no output file: for people, if standard output is a terminal."""

    def __init__(self, active: bool):
        self.active = active

    def write(self, line: dict) -> None:
        if self.active and sys.stdout.isatty():
            prompt = line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][-1]["content"]
            tqdm.write(f"[{line['idx']}.{line['sample_idx']}] {prompt}\033[1m{line['output']}\033[0m\n")
        elif self.active:
            print(encode_line(line).decode(), end="", flush=True)

    def __enter__(self) -> "LinePrinter":
        return self

    def __exit__(self, *_) -> None:
        pass


def line_of(completion: Completion, record: Record, return_token_ids: bool) -> dict:
    """A sample as it is written; the record's other fields follow."""
    line = {
        "idx": completion.request.idx,
        "sample_idx": completion.request.sample_idx,
        "prompt": get_prompt(record),
        "output": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
        "logprob": sum(completion.logprobs),
    }
    if return_token_ids:
        line["token_ids"] = completion.token_ids
    said = {*line, "prompt" if "prompt" in record.fields else "input"}
    return line | {name: value for name, value in record.fields.items() if name not in said}


# --------------------------------------------------------------------------------- what people see


class TokenCounter:
    """A progress bar over samples that shows tokens/s."""

    def __init__(self, num_samples: int):
        self.bar = progress_bar(total=num_samples, desc="generating", unit="sample")
        self.num_tokens = 0

    def count(self, request: Request, token: int) -> None:
        self.num_tokens += 1
        if self.num_tokens % 64 == 0:
            self.show()

    def finish_sample(self) -> None:
        self.bar.update(1)

    def show(self) -> None:
        rate = self.num_tokens / max(self.bar.format_dict["elapsed"], 1e-9)
        self.bar.set_postfix_str(f"{rate:,.0f} tok/s", refresh=False)
        self.bar.update(0)

    def __enter__(self) -> "TokenCounter":
        return self

    def __exit__(self, *_) -> None:
        self.show()
        self.bar.close()


def start_card(path, config, scheme, runtime, engine, mesh, num_samples, num_done, notes) -> str:
    rows = {
        "model": f"{path}, {config.num_parameters() / 1e6:,.1f} M parameters" + (f", {scheme}" if scheme else ""),
        "device": f"{device_name(runtime.device)}, {str(runtime.dtype).removeprefix('torch.')}"
        + (", compiled" if runtime.compile else ""),
        "ranks": f"dp {mesh['dp'].size()} x tp {mesh['tp'].size()}",
        "work": f"{num_samples - num_done:,} samples to draw" + (f", {num_done:,} done before" * bool(num_done)),
        "batch": f"{engine.num_slots} slots of {engine.cache_len} tokens"
        + " on each dp rank" * (mesh["dp"].size() > 1),
    }
    return card("generate", rows | ({"note": "; ".join(notes)} if notes else {}))


def end_card(engine: Engine, model: nn.Module, runtime: Runtime, dp: DeviceMesh) -> str:
    """Rates of the decode steps, of all data-parallel ranks together. MBU = bytes read a second (weights once a step,
    and the cache as far as attention reads it) over the memory bandwidth of the datasheet, where that is known."""
    rows = {}
    decoded = torch.tensor(engine.num_decoded / max(engine.decode_seconds, 1e-9), device=runtime.device)
    prefilled = torch.tensor(engine.num_prompt_tokens / max(engine.prefill_seconds, 1e-9), device=runtime.device)
    for total in (decoded, prefilled):
        dist.all_reduce(total, group=dp.get_group())
    if engine.num_steps:
        seconds = engine.decode_seconds
        rate, step = decoded.item(), 1e3 * seconds / engine.num_steps
        rows["decoding"] = f"{rate:,.1f} tok/s, {step:.2f} ms a step of {engine.num_slots} slots"
        bandwidth = (engine.num_steps * weight_bytes(model) + engine.cache_bytes_read) / seconds
        peak = peaks(runtime.device)
        rows["bandwidth"] = f"{bandwidth / 1e9:,.1f} GB/s" + (f", MBU {bandwidth / peak[1]:.1%}" if peak else "")
    if engine.compile_seconds:
        rows["compiling"] = f"{engine.compile_seconds:,.1f} s, not counted above"
    if engine.prefill_seconds:
        rows["prefill"] = f"{prefilled.item():,.1f} tok/s"
    rows["memory"] = f"{peak_memory(runtime.device) / 1e9:,.2f} GB peak"
    return card("done", rows)


if __name__ == "__main__":
    run_script(main, parser())
