"""A chat in the terminal: the answer streams as it is sampled.

    python inference/chat.py --checkpoint_path DIR --system "You are brief."

An empty line or Ctrl-D ends the chat, Ctrl-C an answer; /clear forgets the conversation. Conversations go through the
folder's chat template; a folder without one continues plain text.
"""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from models.checkpoint import generation_eos_ids
from models.decode import load_for_inference
from models.fsdp import check_divisible, data_parallel_size, init_mesh, parallel_of
from models.generation import Engine, Request, SamplingParams
from models.model import ModelConfig
from models.quantize import choose_scheme
from models.tokenizer import StreamDecoder, Tokenizer
from models.tp import is_main_rank
from training.common import (
    ArgumentParser,
    add_model_arguments,
    add_quantize_arguments,
    choose_runtime,
    device_name,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_int,
    run_script,
)
from training.data import check_ids, check_vocabulary, encode_prompt


def parser() -> ArgumentParser:
    parser = ArgumentParser("A chat in the terminal with the model of a Hugging Face folder.")
    add_model_arguments(parser)
    add = parser.add_argument
    add("--system", default=None, help="system message")
    add("--max_new_tokens", type=positive_int, default=512, help="most tokens of an answer")
    add("--temperature", type=non_negative_float, default=0.7, help="0 is greedy")
    add("--top_k", type=non_negative_int, default=0, help="sample among the k likeliest tokens; 0 is off")
    add("--top_p", type=fraction, default=1.0, help="sample among the likeliest tokens of this total probability")
    add_quantize_arguments(parser)
    add("--tensor_parallel_size", type=positive_int, default=1, help="ranks that share the model: all of torchrun's")
    add(
        "--max_seq_len",
        type=positive_int,
        default=None,
        help="most tokens of the conversation; the context, 4096 at most",
    )
    return parser


@torch.inference_mode()
def main(
    *,
    checkpoint_path: Path,
    device: str | None,
    dtype: str | None,
    seed: int,
    compile: bool | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    quantize: str,
    group_size: int | None,
    tensor_parallel_size: int,
    max_seq_len: int | None,
) -> None:
    runtime = choose_runtime(device, dtype, compile)
    config = ModelConfig.from_hf(checkpoint_path)
    check_divisible(config, tensor_parallel_size)
    scheme = choose_scheme(checkpoint_path, quantize, group_size)
    if data_parallel_size(tensor_parallel_size) > 1:
        raise ValueError("a chat has one model: --tensor_parallel_size must be the number of ranks")
    tokenizer = Tokenizer(checkpoint_path)
    check_vocabulary(tokenizer, config.vocab_size, checkpoint_path)
    context = config.max_position_embeddings
    if max_seq_len is not None and max_seq_len > context:
        raise ValueError(f"--max_seq_len {max_seq_len}: the model's context is {context} tokens")
    limit = max_seq_len or min(4096, context)
    eos_ids = generation_eos_ids(checkpoint_path, default=tokenizer.eos_token_id)
    params = SamplingParams(temperature, top_k, top_p, seed, eos_ids)
    tp = parallel_of(init_mesh(runtime.device, tensor_parallel_size)).tp
    model = load_for_inference(
        checkpoint_path, device=runtime.device, dtype=runtime.dtype, compile=runtime.compile, tp=tp, scheme=scheme
    )
    engine = Engine(model, params, num_slots=1, max_seq_len=limit, compile=runtime.compile, look_every=1)
    say(f"{checkpoint_path} on {device_name(runtime.device)}; an empty line ends the chat, /clear starts anew")

    opening = [{"role": "system", "content": system}] if system else []
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
        check_ids(prompt_ids, config.vocab_size, "this message")
        room = limit - len(prompt_ids)
        if room < 1:
            say(f"(the conversation fills the {limit} tokens: /clear it, or start with a larger --max_seq_len)")
            messages.pop()
            continue
        request = Request(turn, 0, prompt_ids, min(max_new_tokens, room))
        messages.append({"role": "assistant", "content": answer(engine, tokenizer, request)})
        turn += 1


def say(text: str, end: str = "\n") -> None:
    """Prints on the main rank."""
    if is_main_rank():
        print(text, end=end, flush=True)


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
    decoder, said = StreamDecoder(tokenizer, request.prompt_ids), []

    def show(text: str) -> None:
        said.append(text)
        say(text, end="")

    def on_token(_: Request, token: int) -> None:
        if token not in engine.params.stop_token_ids:
            show(decoder.push(token))

    try:
        for completion in engine.generate([request], on_token):
            show(decoder.flush())
            if completion.finish_reason == "length":
                say(" [cut at the token limit]", end="")
    except KeyboardInterrupt:
        show(decoder.flush())
    say("")
    return "".join(said)


if __name__ == "__main__":
    run_script(main, parser())
