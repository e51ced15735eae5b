"""Batched generation from the command line: prompts in, one JSON line for each sample out.

- all slots of the batch stay busy: when a sample is finished, its slot takes the next prompt at once
  (models/generation.py), and no rank idles while another still has samples to begin (models/sharing.py)
- a line is written to disk as soon as its sample is finished; after a kill, --resume draws the missing samples, and
  they are the same ones as without the kill, whatever the batch size

    python inference/generate.py --checkpoint_path DIR --prompt "The capital of France is"
    python inference/generate.py --checkpoint_path DIR --prompt_file prompts.jsonl --output_file out.jsonl
"""

import dataclasses
import hashlib
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from inference.lines import LineWriter, begin, begun_on, encode_line, read_begun
from inference.prompts import PromptArgs, PromptSource, carried_fields, stamp_of
from inference.settings import settings_not_taken
from models.adapters import AdapterArgs, weight_files
from models.checkpoint import ModelArgs, open_folder
from models.common import (
    Runtime,
    at_least_one,
    card,
    choose_runtime,
    count_or_auto,
    flag,
    is_main_rank,
    on_main,
    peak_memory,
    progress_bar,
)
from models.decode import load_for_inference, rounding_of, weight_bytes
from models.fsdp import data_parallel_size, init_mesh, parallel_of, start_ranks
from models.generation import Completion, Engine, PrefillArgs, Request
from models.gpu import peaks
from models.identity import AcceptArgs, check_ranks_agree
from models.memory import plan_cache
from models.quantize import QuantizeArgs, check_runnable, choose_scheme
from models.record_files import Record
from models.sampling import SamplingArgs
from models.script import run_script
from models.shared import check_shared
from models.sharing import shared_work, wait_for_all_ranks
from models.tokenizer import chat_day
from models.tp import TensorParallelArgs


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(
    ModelArgs, AdapterArgs, PromptArgs, SamplingArgs, PrefillArgs, QuantizeArgs, TensorParallelArgs, AcceptArgs
):
    """Generates completions for prompts, in batches, from a Hugging Face folder."""

    output_file: Path | None = flag(
        None, help="JSONL file for the samples; default: standard output", may_change=True, written=True
    )
    resume: bool = flag(False, help="draw the samples that --output_file does not have yet", may_change=True)
    batch_size: int | None = flag(
        None,
        type=count_or_auto,
        metavar="N|auto",
        help="number of slots: the most sequences decoded together on each data-parallel rank; default: auto, as many "
        "as memory holds, up to 256 on a GPU and 16 on a CPU",
        may_change=True,
    )
    max_seq_len: int | None = flag(
        None, bounds=at_least_one, help="most tokens of a prompt and its completion; default: as many as the run needs"
    )
    return_token_ids: bool = flag(False, help="add token_ids, the ids of the output, to each line")


@torch.inference_mode()
def main(args: GenerateArgs) -> None:
    check_flags(args)
    runtime, in_file = choose_runtime(args), args.output_file is not None
    start_ranks(runtime.device)
    today = on_main(lambda: chat_day(args.chat_date, begun_on(args.output_file) if args.resume else None))
    folder = open_folder(args.checkpoint_path, args.max_seq_len, args.tensor_parallel_size, frozen=True, today=today)
    scheme = choose_scheme(args.checkpoint_path, args.quantize, args.group_size, tp_size=args.tensor_parallel_size)
    resolved = dataclasses.replace(
        args,
        chat_date=today.isoformat(),
        max_seq_len=folder.max_seq_len,
        dtype=str(runtime.dtype),
        quantize=rounding_of(scheme, runtime),
    )
    stamp = stamp_of(args.prompt_file)  # before the file is hashed
    begun = on_main(lambda: begin(args.output_file, resolved) if in_file else {})
    check_ranks_agree(resolved, begun)  # before collectives that depend on flags
    files = weight_files(args.checkpoint_path, args.adapter_path)
    check_runnable(files, folder.config, scheme, runtime, args.tensor_parallel_size)
    params = args.params(args.seed, folder.tokenizer, folder.eos_token_ids)
    source = PromptSource(args, folder, args.max_new_tokens, stamp)
    done, num_lines = on_main(lambda: samples_done(args, source.num_records))
    on_main(lambda: check_prompts_of_samples(args, source))

    mesh = init_mesh(runtime.device, args.tensor_parallel_size)
    active = mesh["tp"].get_local_rank() == 0  # one rank writes for all ranks that share a model
    if in_file:
        check_shared(args.output_file.parent, f"--output_file {args.output_file}", writes=active)
    model = load_for_inference(args.checkpoint_path, runtime, tp=parallel_of(mesh).tp, scheme=scheme, files=files)
    if runtime.device.type == "cpu":
        wait_for_all_ranks()  # what a rank has yet to read would count as free in another's plan
    numbers, counts = source.missing(done)
    work, num_done = shared_work("generate", counts, mesh["dp"]), int(done.sum())
    plan = plan_cache(
        model,
        num_slots=args.batch_size,
        num_requests=work.share,
        usual_tokens=source.usual_tokens,
        known_tokens=source.most_tokens if work.total else 1,
        most_tokens=folder.max_seq_len if source.is_large else 0,  # a large file's prompts are not all tokenised yet
        prefill_tokens=args.prefill_tokens,
        compile=runtime.compile,
    )
    if runtime.device.type == "cpu":
        wait_for_all_ranks()  # and the cache of one that is early would count as taken
    engine = Engine(
        model,
        params,
        num_slots=plan.num_slots,
        num_pages=plan.num_pages,
        max_seq_len=plan.max_seq_len,
        tokenizer=folder.tokenizer,
        compile=runtime.compile,
        prefill_tokens=args.prefill_tokens,
    )
    stream = sys.stdout if in_file else sys.stderr  # without an output file, stdout holds only samples
    say = partial(print, file=stream) if is_main_rank() else lambda _: None
    unread = settings_not_taken(args.checkpoint_path, args)
    are_equal = args.num_samples > 1 and args.temperature == 0
    rows = {
        "model": f"{folder}, {scheme}" if scheme else folder,
        "device": runtime,
        "ranks": f"dp {mesh['dp'].size()} x tp {mesh['tp'].size()}",
        "work": f"{work.total:,} samples to draw"
        + f", {num_done:,} done before" * bool(num_done)
        + ", those of a prompt are equal at --temperature 0" * are_equal,
        "stop tokens": folder.stop_tokens(),
        **({"ignored": f"{unread}, from generation_config.json; the flags apply"} if unread else {}),
        "batch": plan.note + ", on each dp rank" * (mesh["dp"].size() > 1),
        **source.notes(),
    }
    say(card("generate", rows))
    output = LineWriter(args.output_file, begun, active, num_lines) if in_file else nullcontext(LinePrinter(active))
    with output as writer, TokenCounter(work.total) as counter:
        for completion in engine.generate(source.requests(numbers, done, work), counter.count):
            record = completion.request.source
            writer.write(line_of(completion, source.asked(record), record, args.return_token_ids))
            counter.bar.update(work.done() - counter.bar.n)
        work.close()
        counter.bar.update(work.num_done - counter.bar.n)
    say(end_card(engine, model, runtime, mesh["dp"], source))


def check_flags(args: GenerateArgs) -> None:
    """Raises ValueError for flags that contradict each other, or a tp size that does not divide the ranks."""
    num_replicas = data_parallel_size(args.tensor_parallel_size)
    if num_replicas > 1 and args.output_file is None and not sys.stdout.isatty():
        raise ValueError(f"{num_replicas} replicas would write into each other's lines; give an --output_file")
    if (args.prompt is None) == (args.prompt_file is None):
        raise ValueError("give either --prompt or --prompt_file")
    if args.resume and args.output_file is None:
        raise ValueError("--resume needs --output_file, the file to continue")
    if args.accept_changed and not args.resume:
        raise ValueError("--accept_changed is for a run that goes on with --resume")
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat, which puts prompts through the chat template")


def samples_done(args: GenerateArgs, num_records: int) -> tuple[np.ndarray, int]:
    """Returns (a mask [num_records, num_samples] of the samples that the output file holds, its number of lines).
    Raises ValueError for a line whose sample is not part of this run."""
    num_samples = args.num_samples
    try:
        done, num_lines = np.zeros((num_records, num_samples), dtype=bool), 0
    except (MemoryError, ValueError):  # more than memory holds, or numpy can address
        raise ValueError(f"--num_samples {num_samples}: too many for {num_records} prompts; lower it") from None
    for line in read_begun(args.output_file, "generate.py", ("idx", "sample_idx")) if args.resume else ():
        idx, sample_idx = line["idx"], line["sample_idx"]
        if idx not in range(num_records) or sample_idx not in range(num_samples):
            raise ValueError(f"--resume: sample {sample_idx} of prompt {idx}, in the file, is not part of this run")
        done[idx, sample_idx], num_lines = True, num_lines + 1
    return done, num_lines


def check_prompts_of_samples(args: GenerateArgs, source: PromptSource) -> None:
    """Raises ValueError if a sample in the output file is of another prompt than the one at its place, which
    --accept_changed admits: other prompts would have no sample, or those of a neighbour. What --system and --chat add
    is not compared where it admits these, too."""
    accepted = set(args.accept_changed or ()) if args.resume else set()
    if not accepted & {"prompt", "prompt_file"}:
        return
    form = _as_given if accepted & {"system", "chat"} else lambda prompt: prompt
    of_idx: dict[int, dict[str, int]] = {}  # {idx: {digest of its prompt: number of a line}}
    for number, line in enumerate(read_begun(args.output_file, "generate.py", ("idx", "prompt")), start=1):
        of_idx.setdefault(line["idx"], {})[text_digest(form(line["prompt"]))] = number
    for idx, (where, prompt) in enumerate(source.all_asked()):
        for digest, number in of_idx.get(idx, {}).items():
            if digest != text_digest(form(prompt)):
                place = f"{args.output_file}:{number}"
                raise ValueError(f"{place}: is not of the prompt at its place, {where}; begin another file")


def _as_given(prompt: str | list[dict]) -> str | list[dict]:
    """Returns a prompt without a system message, and a chat that is only the user's text as this text."""
    if isinstance(prompt, str):
        return prompt
    rest = [message for message in prompt if message.get("role") != "system"]
    is_text = len(rest) == 1 and rest[0].get("role") == "user" and isinstance(rest[0].get("content"), str)
    return rest[0]["content"] if is_text else rest


def text_digest(prompt: str | list[dict]) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()


class LinePrinter:
    """Replaces LineWriter when there is no output file: prints readable text to a terminal, JSON lines elsewhere."""

    def __init__(self, active: bool):
        self.active = active

    def write(self, line: dict) -> None:
        if self.active and sys.stdout.isatty():
            prompt = line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][-1].get("content")
            tqdm.write(f"[{line['idx']}.{line['sample_idx']}] {prompt}\033[1m{line['output']}\033[0m\n")
        elif self.active:
            encoding = sys.stdout.encoding or "utf-8"
            print(encode_line(line, encoding).decode(encoding), end="", flush=True)


def line_of(completion: Completion, prompt: str | list[dict], record: Record, return_token_ids: bool) -> dict:
    """Returns a sample's line: the prompt as the model got it, the output, and the record's other fields."""
    line = {
        "idx": completion.request.idx,
        "sample_idx": completion.request.sample_idx,
        "prompt": prompt,
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


def end_card(engine: Engine, model: nn.Module, runtime: Runtime, dp: DeviceMesh, source: PromptSource) -> str:
    """Returns the closing card: tokens/s and counts over all dp ranks, and this one's MBU = bytes read per second (the
    weights once a step, and the part of the cache that attention reads) / the memory bandwidth of the datasheet, where
    that is known."""
    rows = {}
    decoded = engine.num_decoded / max(engine.decode_seconds, 1e-9)
    prefilled = engine.num_prompt_tokens / max(engine.prefill_seconds, 1e-9)
    if dp.size() > 1:  # on the CPU: NCCL would start here, and needs memory that the cache has taken
        totals = [decoded, prefilled, *(source.counts.values() if source.is_large else ())]
        totals = torch.tensor(totals, dtype=torch.float64)
        dist.all_reduce(totals, group=dp.get_group())
        decoded, prefilled, *counts = totals.tolist()
        source.counts.update(zip(source.counts, map(int, counts)))
    if decoded or engine.num_steps:
        rows["decoding"] = f"{decoded:,.1f} tok/s"
    if engine.num_steps:  # other ranks may have drawn all samples
        seconds = engine.decode_seconds
        slots = f"{engine.num_slots} slot{'s' * (engine.num_slots > 1)}"
        rows["decoding"] += f", {1e3 * seconds / engine.num_steps:.2f} ms a step of {slots}"
        bandwidth = (engine.num_steps * weight_bytes(model) + engine.cache_bytes_read) / max(seconds, 1e-9)
        peak = peaks(runtime.device)
        rows["bandwidth"] = f"{bandwidth / 1e9:,.1f} GB/s" + (f", MBU {bandwidth / peak[1]:.1%}" if peak else "")
    if engine.compile_seconds:
        rows["compiling"] = f"{engine.compile_seconds:,.1f} s, not counted above"
    if prefilled:
        rows["prefill"] = f"{prefilled:,.1f} tok/s"
    if source.is_large and source.remarks():  # those of a smaller file are in the first card
        rows["note"] = source.remarks()
    rows["memory"] = f"{peak_memory(runtime.device) / 1e9:,.2f} GB peak"
    return card("done", rows)


if __name__ == "__main__":
    run_script(main, GenerateArgs)
