"""Batched generation from the command line: prompts in, one JSON line for each sample out.

- all slots of the batch stay busy: a finished sample's slot takes the next prompt at once (models/generation.py)
- each line is on disk when its sample is finished; after a kill, --resume goes on with the samples that are missing and
  draws the very same ones, whatever the batch size

    python inference/generate.py --checkpoint_path DIR --prompt "The capital of France is"
    python inference/generate.py --checkpoint_path DIR --prompt_file prompts.jsonl --output_file out.jsonl
"""

import dataclasses
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from inference.lines import LineWriter, begun_on, encode_line, read_begun, refuse_occupied
from inference.system import opening_of
from models.chats import Chat, read_chat
from models.checkpoint import Folder, ModelArgs, open_folder
from models.common import (
    Runtime,
    at_least_one,
    card,
    chat_day,
    choose_runtime,
    flag,
    is_main_rank,
    on_main,
    peak_memory,
    peaks,
    progress_bar,
    run_script,
    short_bar,
)
from models.decode import load_for_inference, weight_bytes
from models.fsdp import data_parallel_size, init_mesh, parallel_of, start_ranks
from models.generation import Completion, Engine, Request, SamplingArgs
from models.identity import AcceptArgs, begun_with
from models.quantize import QuantizeArgs, choose_scheme
from models.records import (
    Record,
    check_ids,
    cut_prompt,
    encode_prompt,
    get_prompt,
    naming,
    read_records,
    require,
    stated_prompt,
)
from models.shared import check_shared
from models.tp import TensorParallelArgs


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(ModelArgs, SamplingArgs, QuantizeArgs, TensorParallelArgs, AcceptArgs):
    """Generates completions for prompts, in batches, from a Hugging Face folder."""

    prompt: list[str] | None = flag(None, action="append", help="a prompt; may be given several times")
    prompt_file: Path | None = flag(None, help="JSON or JSONL records with a prompt each")
    output_file: Path | None = flag(
        None, help="JSONL file for the samples; standard output if absent", may_change=True, written=True
    )
    resume: bool = flag(False, help="go on with the samples that --output_file does not have yet", may_change=True)
    num_samples: int = flag(1, bounds=at_least_one, help="samples for each prompt")
    batch_size: int = flag(
        8, bounds=at_least_one, help="slots: sequences decoded together on each dp rank", may_change=True
    )
    max_seq_len: int | None = flag(
        None, bounds=at_least_one, help="most tokens of prompt and completion; what the run needs"
    )
    overlong: str = flag("refuse", choices=("refuse", "skip", "truncate"), help="prompts that leave no room")
    chat: bool = flag(False, help="put text prompts through the chat template, as the user's message")
    system: str | None = flag(None, help="with --chat: a system message before each prompt")
    return_token_ids: bool = flag(False, help="add token_ids to each line")


# What a line says of its sample; a record's own field of such a name is carried along as reference_NAME.
WRITTEN = ("idx", "sample_idx", "output", "finish_reason", "num_tokens", "logprob", "token_ids")


class Prompt(NamedTuple):
    idx: int
    record: Record
    ids: list[int]


@torch.inference_mode()
def main(args: GenerateArgs) -> None:
    check_flags(args)
    runtime, in_file = choose_runtime(args), args.output_file is not None
    start_ranks(runtime.device)
    today = on_main(lambda: chat_day(args.chat_date, begun_on(args.output_file) if args.resume else None))
    folder = open_folder(args.checkpoint_path, args.max_seq_len, args.tensor_parallel_size, frozen=True, today=today)
    scheme = choose_scheme(args.checkpoint_path, args.quantize, args.group_size, tp_size=args.tensor_parallel_size)
    limit = folder.max_seq_len
    resolved = dataclasses.replace(
        args,
        chat_date=today.isoformat(),
        max_seq_len=limit,
        dtype=str(runtime.dtype),
        quantize=None if scheme is None else str(scheme),
    )
    begun, done = on_main(lambda: begin_file(resolved)) if in_file else ({}, set())
    if args.prompt_file is not None:
        records = read_records(args.prompt_file)
    else:
        records = [Record(f"--prompt {i + 1}", {"prompt": text}) for i, text in enumerate(args.prompt)]
    prompts, notes = encode_prompts(records, folder, args)
    renamed = [name for name in WRITTEN if any(name in record.fields for record in records)]
    notes += (
        [f"the records' own {', '.join(renamed)} kept as reference_{', reference_'.join(renamed)}"] if renamed else []
    )
    params = args.params(args.seed, folder.tokenizer, folder.eos_token_ids)
    requests = [
        Request(p.idx, sample_idx, p.ids, min(args.max_new_tokens, limit - len(p.ids)), p.record.where)
        for p in prompts
        for sample_idx in range(args.num_samples)
        if (p.idx, sample_idx) not in done
    ]

    mesh = init_mesh(runtime.device, args.tensor_parallel_size)
    active = mesh["tp"].get_local_rank() == 0  # of the ranks that share a model
    if in_file:
        check_shared(args.output_file.parent, f"--output_file {args.output_file}", writes=active)
    requests = requests_of_rank(requests, mesh["dp"])
    model = load_for_inference(args.checkpoint_path, runtime, tp=parallel_of(mesh).tp, scheme=scheme)
    engine = Engine(
        model,
        params,
        num_slots=max(1, min(args.batch_size, len(requests))),
        max_seq_len=max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=1),
        tokenizer=folder.tokenizer,
        compile=runtime.compile,
    )
    stream = sys.stdout if in_file else sys.stderr  # stdout is for the samples, if nothing else
    say = partial(print, file=stream) if is_main_rank() else lambda _: None
    num_samples = len(prompts) * args.num_samples
    rows = {
        "model": f"{folder}, {scheme}" if scheme else folder,
        "device": runtime,
        "ranks": f"dp {mesh['dp'].size()} x tp {mesh['tp'].size()}",
        "work": f"{num_samples - len(done):,} samples to draw" + (f", {len(done):,} done before" * bool(done)),
        "stop tokens": folder.stop_tokens(),
        "batch": f"{engine.num_slots} slots of {engine.cache_len} tokens"
        + " on each dp rank" * (mesh["dp"].size() > 1),
        **({"note": "; ".join(notes)} if notes else {}),
    }
    say(card("generate", rows))
    record_of = {p.idx: p.record for p in prompts}
    output = LineWriter(args.output_file, begun, active, len(done)) if in_file else nullcontext(LinePrinter(active))
    with output as writer, TokenCounter(len(requests)) as counter:
        for completion in engine.generate(requests, on_token=counter.count):
            writer.write(line_of(completion, record_of[completion.request.idx], args.return_token_ids))
            counter.bar.update(1)
    say(end_card(engine, model, runtime, mesh["dp"]))


def begin_file(args: GenerateArgs) -> tuple[dict, set[tuple[int, int]]]:
    """(what the output file is begun with, the samples that it has): what the main rank finds there."""
    if not args.resume:
        refuse_occupied(args.output_file)
    begun = begun_with(args)
    lines = read_begun(args.output_file, args, begun, "generate.py", ("idx", "sample_idx")) if args.resume else []
    return begun, {(line["idx"], line["sample_idx"]) for line in lines}


def check_flags(args: GenerateArgs) -> None:
    """Raises ValueError for flags that do not go together, and for an output file that is there already."""
    data_parallel_size(args.tensor_parallel_size)  # raises if it does not divide the ranks
    if (args.prompt is None) == (args.prompt_file is None):
        raise ValueError("give either --prompt or --prompt_file")
    if args.resume and args.output_file is None:
        raise ValueError("--resume needs the --output_file to go on with")
    if args.accept_changed and not args.resume:
        raise ValueError("--accept_changed is for a run that goes on with --resume")
    if args.system is not None and not args.chat:
        raise ValueError("--system is for --chat, which puts prompts through the chat template")


def requests_of_rank(requests: list[Request], dp: DeviceMesh) -> list[Request]:
    """One data-parallel rank's share: whole prompts in turn, so that a prompt's samples share its prefill."""
    order = {idx: place for place, idx in enumerate(dict.fromkeys(request.idx for request in requests))}
    return [request for request in requests if order[request.idx] % dp.size() == dp.get_local_rank()]


def encode_prompts(records: list[Record], folder: Folder, args: GenerateArgs) -> tuple[list[Prompt], list[str]]:
    """(prompts with their ids, remarks for the card). A prompt is overlong if it leaves no room for one token;
    truncating cuts its beginning, but for the BOS, so that the completion fits or has half of the room."""
    prompts, skipped, truncated, short, limit = [], 0, 0, 0, folder.max_seq_len
    opening = opening_of(args.system, folder.tokenizer)
    for idx, record in enumerate(short_bar(records, "tokenising", "prompt")):
        with naming(record):
            carried_fields(record)
            ids = encode_prompt(prompt_of(record, opening, args.chat), folder.tokenizer)
            require(ids, "the prompt has no tokens, so there is nothing to go on from")
        check_ids(ids, folder.config.vocab_size, record.where)
        if len(ids) >= limit:
            if args.overlong == "refuse" or limit < 2:
                raise ValueError(
                    f"{record.where}: the prompt has {len(ids)} tokens, which leaves no room in {limit}; raise "
                    "--max_seq_len or choose --overlong skip or truncate"
                )
            if args.overlong == "skip":
                skipped += 1
                continue
            truncated += 1
            # at least half of the room is the prompt's
            ids = cut_prompt(ids, max(limit - args.max_new_tokens, limit // 2), folder.tokenizer)
        short += len(ids) + args.max_new_tokens > limit
        prompts.append(Prompt(idx, record, ids))
    if not prompts:
        raise ValueError(f"all {skipped} prompts leave no room in {limit} tokens")
    remarks = (
        (skipped, "prompts skipped as too long"),
        (truncated, "prompts truncated"),
        (short, f"prompts with room for fewer than {args.max_new_tokens} new tokens"),
    )
    return prompts, [f"{count} {what}" for count, what in remarks if count]


def prompt_of(record: Record, opening: list[dict], chat: bool) -> str | Chat:
    """The record's prompt, with --chat as a chat, behind the opening. Raises ValueError for two system messages."""
    prompt = get_prompt(record, as_chat=chat)
    if not opening:
        return prompt
    roles = [message["role"] for message in prompt.messages]
    require("system" not in roles, "the prompt has a system message of its own; take it out, or leave out --system")
    return read_chat(opening).before(prompt)


def carried_fields(record: Record) -> dict[str, object]:
    """The fields of a record that its samples' lines carry along, those of the names in WRITTEN as reference_NAME.
    Raises ValueError where that name is taken as well."""
    read, carried = next((name for name in ("prompt", "instruction", "input") if name in record.fields), None), {}
    for name, value in record.fields.items():
        new = f"reference_{name}" if name in WRITTEN else name
        require(
            new == name or new not in record.fields,
            f"{name!r} would be written as {new!r}, which is there too; rename one",
        )
        if name != read:
            carried[new] = value
    return carried


class LinePrinter:
    """Stands where a LineWriter does when there is no output file: for people, if standard output is a terminal."""

    def __init__(self, active: bool):
        self.active = active

    def write(self, line: dict) -> None:
        if self.active and sys.stdout.isatty():
            prompt = line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][-1].get("content")
            tqdm.write(f"[{line['idx']}.{line['sample_idx']}] {prompt}\033[1m{line['output']}\033[0m\n")
        elif self.active:
            encoding = sys.stdout.encoding or "utf-8"
            print(encode_line(line, encoding).decode(encoding), end="", flush=True)


def line_of(completion: Completion, record: Record, return_token_ids: bool) -> dict:
    """A sample as it is written; the record's other fields follow (carried_fields)."""
    line = {
        "idx": completion.request.idx,
        "sample_idx": completion.request.sample_idx,
        "prompt": stated_prompt(record),
        "output": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
        "logprob": sum(completion.logprobs),
    }
    if return_token_ids:
        line["token_ids"] = completion.token_ids
    return {**line, **carried_fields(record)}


class TokenCounter:
    """A progress bar over samples that shows tokens/s."""

    def __init__(self, num_samples: int):
        self.bar = progress_bar(total=num_samples, desc="generating", unit="sample")
        self.num_tokens = 0

    def count(self, request: Request, token: int) -> None:
        self.num_tokens += 1
        if self.num_tokens % 64 == 0:
            self.show()

    def show(self) -> None:
        rate = self.num_tokens / max(self.bar.format_dict["elapsed"], 1e-9)
        self.bar.set_postfix_str(f"{rate:,.0f} tok/s", refresh=False)
        self.bar.update(0)

    def __enter__(self) -> "TokenCounter":
        return self

    def __exit__(self, *_) -> None:
        self.show()
        self.bar.close()


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
        step = 1e3 * seconds / engine.num_steps
        rows["decoding"] = f"{decoded.item():,.1f} tok/s, {step:.2f} ms a step of {engine.num_slots} slots"
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
    run_script(main, GenerateArgs)
