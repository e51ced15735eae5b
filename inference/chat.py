"""A chat in the terminal: the answer streams as it is sampled.

    python inference/chat.py --checkpoint_path DIR --system "You are brief."

An empty line or Ctrl-D ends the chat, Ctrl-C an answer; /clear forgets the conversation. Conversations go through the
folder's chat template; a folder without one continues plain text.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from models.checkpoint import ModelArgs, open_folder
from models.common import at_least_one, choose_runtime, device_name, flag, is_main_rank, run_script, say
from models.decode import load_for_inference
from models.fsdp import data_parallel_size, init_mesh, parallel_of
from models.generation import Engine, Request, SamplingArgs, SamplingParams
from models.quantize import QuantizeArgs, choose_scheme
from models.records import check_ids, encode_prompt
from models.tokenizer import StreamDecoder, Tokenizer
from models.tp import TensorParallelArgs


@dataclass(frozen=True, kw_only=True)
class ChatArgs(ModelArgs, SamplingArgs, QuantizeArgs, TensorParallelArgs):
    """A chat in the terminal with the model of a Hugging Face folder."""

    system: str | None = flag(None, help="system message")
    max_new_tokens: int = 512
    temperature: float = 0.7
    max_seq_len: int | None = flag(
        None, bounds=at_least_one, help="most tokens of the conversation; the context, 4096 at most"
    )


@torch.inference_mode()
def main(args: ChatArgs) -> None:
    runtime = choose_runtime(args)
    if data_parallel_size(args.tensor_parallel_size) > 1:
        raise ValueError("a chat has one model: --tensor_parallel_size must be the number of ranks")
    folder = open_folder(args.checkpoint_path, args.max_seq_len, args.tensor_parallel_size, frozen=True)
    scheme = choose_scheme(args.checkpoint_path, args.quantize, args.group_size, tp_size=args.tensor_parallel_size)
    tokenizer = folder.tokenizer
    limit = args.max_seq_len or min(4096, folder.max_seq_len)
    params = SamplingParams(args.temperature, args.top_k, args.top_p, args.seed, folder.eos_token_ids)
    tp = parallel_of(init_mesh(runtime.device, args.tensor_parallel_size)).tp
    model = load_for_inference(args.checkpoint_path, runtime, tp=tp, scheme=scheme)
    engine = Engine(model, params, num_slots=1, max_seq_len=limit, compile=runtime.compile, look_every=1)
    say(f"{args.checkpoint_path} on {device_name(runtime.device)}; an empty line ends the chat, /clear starts anew")

    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages, turn = list(opening), 0
    while True:
        text = read_line()
        if not text.strip():
            break
        if text.strip() == "/clear":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": text})
        plain = "".join(message["content"] for message in messages)
        prompt = messages if tokenizer.chat_template is not None else plain
        prompt_ids = encode_prompt(prompt, tokenizer)
        check_ids(prompt_ids, folder.config.vocab_size, "this message")
        room = limit - len(prompt_ids)
        if room < 1:
            say(f"(the conversation fills the {limit} tokens: /clear it, or start with a larger --max_seq_len)")
            messages.pop()
            continue
        request = Request(turn, 0, prompt_ids, min(args.max_new_tokens, room))
        messages.append({"role": "assistant", "content": answer(engine, tokenizer, request)})
        turn += 1


def read_line() -> str:
    """What the user types at the main rank, on every rank; "" at the end of input."""
    line = [""]
    if is_main_rank():
        with contextlib.suppress(EOFError):
            line = [input("\n> ")]
    dist.broadcast_object_list(line, src=0)
    return line[0]


def answer(engine: Engine, tokenizer: Tokenizer, request: Request) -> str:
    """Prints the answer as it comes and returns it; Ctrl-C cuts it short."""
    decoder, pieces, ending = StreamDecoder(tokenizer, request.prompt_ids), [], ""

    def show(text: str) -> None:
        pieces.append(text)
        if is_main_rank():
            print(text, end="", flush=True)

    def on_token(_: Request, token: int) -> None:
        if token not in engine.params.stop_token_ids:
            show(decoder.push(token))

    try:
        for completion in engine.generate([request], on_token):
            show(decoder.flush())
            if completion.finish_reason == "length":
                ending = " [cut at the token limit]"
    except KeyboardInterrupt:
        show(decoder.flush())
    say(ending)
    return "".join(pieces)


if __name__ == "__main__":
    run_script(main, ChatArgs)
