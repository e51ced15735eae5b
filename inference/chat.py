"""A chat in the terminal: the answer streams as it is sampled.

    python inference/chat.py --checkpoint_path DIR --system "You are brief."

Lines can be edited and called back with the arrow keys. Conversations go through the folder's chat template; without a
template the model continues plain text. Ctrl-C cuts an answer short; at the prompt, and under torchrun, it ends the
chat, as Ctrl-D does.
"""

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

import torch

from inference.prompts import opening_of
from inference.settings import settings_not_taken
from models.adapters import AdapterArgs, weight_files
from models.chats import read_chat
from models.checkpoint import Folder, ModelArgs, open_folder
from models.common import at_least_one, choose_runtime, device_name, flag, is_main_rank, on_main, say
from models.decode import load_for_inference
from models.fsdp import data_parallel_size, init_mesh, parallel_of, start_ranks
from models.generation import Engine, PrefillArgs, Request
from models.quantize import QuantizeArgs, choose_scheme
from models.records import check_ids, encode_prompt
from models.sampling import SamplingArgs
from models.script import run_script
from models.streaming import StreamDecoder
from models.tokenizer import chat_day
from models.tp import TensorParallelArgs

HELP = (
    "/reset forgets the conversation, /system TEXT also sets the system message (none without TEXT), /help shows this; "
    "Ctrl-D ends the chat"
)


@dataclass(frozen=True, kw_only=True)
class ChatArgs(ModelArgs, AdapterArgs, SamplingArgs, PrefillArgs, QuantizeArgs, TensorParallelArgs):
    """Chats in the terminal with the model of a Hugging Face folder."""

    system: str | None = flag(None, help="system message")
    max_new_tokens: int = 512
    temperature: float = 0.7
    max_seq_len: int | None = flag(
        None, bounds=at_least_one, help="most tokens of the conversation; default: the context, at most 4096"
    )


@torch.inference_mode()
def main(args: ChatArgs) -> None:
    runtime = choose_runtime(args)
    if data_parallel_size(args.tensor_parallel_size) > 1:
        raise ValueError("a chat runs one copy of the model: --tensor_parallel_size must be the number of ranks")
    start_ranks(runtime.device)
    today = on_main(lambda: chat_day(args.chat_date))
    folder = open_folder(args.checkpoint_path, args.max_seq_len, args.tensor_parallel_size, frozen=True, today=today)
    scheme = choose_scheme(args.checkpoint_path, args.quantize, args.group_size, tp_size=args.tensor_parallel_size)
    files = weight_files(args.checkpoint_path, args.adapter_path)
    tokenizer = folder.tokenizer
    limit = args.max_seq_len or min(4096, folder.max_seq_len)
    params = args.params(args.seed, tokenizer, folder.eos_token_ids)
    opening = opening_of(args.system, tokenizer)
    tp = parallel_of(init_mesh(runtime.device, args.tensor_parallel_size)).tp
    model = load_for_inference(args.checkpoint_path, runtime, tp=tp, scheme=scheme, files=files)
    options = {"num_slots": 1, "max_seq_len": limit, "compile": runtime.compile, "prefill_tokens": args.prefill_tokens}
    engine = Engine(model, params, tokenizer=tokenizer, look_every=1, **options)
    unread = settings_not_taken(args.checkpoint_path, args)
    note = f"\n(ignored, from generation_config.json: {unread}; the flags apply)" if unread else ""
    say(f"{args.checkpoint_path} on {device_name(runtime.device)}{note}\n{HELP}")

    messages, turn = list(opening), 0
    while (text := on_main(read_line)) is not None:
        command, _, rest = text.strip().partition(" ")
        if command in ("/reset", "/system"):
            if command == "/system":
                opening = new_opening(rest.strip(), folder, opening)
            messages = list(opening)
            say("(the conversation begins anew)")
        elif command == "/help" or (command.startswith("/") and command[1:].isalpha()):
            say(HELP if command == "/help" else f"(there is no {command}: {HELP})")
        elif command:
            messages.append({"role": "user", "content": text})
            try:
                request = request_of(messages, turn, folder, args.max_new_tokens, limit)
            except ValueError as error:  # drop the line that was typed, keep the conversation
                say(f"({error})")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer(engine, request)})
            turn += 1


def read_line() -> str | None:
    """Returns the line that is typed; None at the end of input or after Ctrl-C."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 (makes input() edit and remember lines)
    print()
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def new_opening(system: str, folder: Folder, opening: list[dict]) -> list[dict]:
    """Returns the messages that conversations begin with from now on: the old ones if the template refuses `system`."""
    try:
        return opening_of(system or None, folder.tokenizer)
    except ValueError as error:
        say(f"({error})")
        return opening


def request_of(messages: list[dict], turn: int, folder: Folder, max_new_tokens: int, limit: int) -> Request:
    """Returns the request for the next answer. Raises ValueError if the conversation leaves no room for one, or cannot
    be tokenised."""
    tokenizer = folder.tokenizer
    plain = "".join(message["content"] for message in messages)
    prompt_ids = encode_prompt(read_chat(messages) if tokenizer.chat_template is not None else plain, tokenizer)
    check_ids(prompt_ids, folder.config.vocab_size, "this message")
    room = limit - len(prompt_ids)
    if room <= 0:
        longer = ", or start with a larger --max_seq_len" if limit < folder.config.max_position_embeddings else ""
        raise ValueError(f"the conversation fills the {limit} tokens: /reset it{longer}")
    return Request(turn, 0, prompt_ids, min(max_new_tokens, room))


def answer(engine: Engine, request: Request) -> str:
    """Prints the answer while it is sampled, and returns it. Ctrl-C cuts it short; under torchrun it ends the chat."""
    shown = Shown(engine.params.stop)
    decoder, ending = StreamDecoder(engine.tokenizer, request.prompt_ids), ""

    def on_token(_: Request, token: int) -> None:
        if token not in engine.params.stop_token_ids:
            shown.push(decoder.push(token))

    try:
        for completion in engine.generate([request], on_token):
            shown.end(completion.text)
            if completion.finish_reason == "length":
                ending = " [cut at the token limit]"
    except KeyboardInterrupt:
        if "RANK" in os.environ:  # torchrun got the Ctrl-C too, and waits for all ranks to end
            raise
        shown.end(shown.text + decoder.flush())
    say(ending)
    return shown.text


class Shown:
    """Prints an answer piece by piece, up to a stop string, or up to text that may be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop, self.text, self.num_printed = stop, "", 0

    def push(self, piece: str) -> None:
        self.text += piece
        stopping = [s[:k] for s in self.stop for k in range(1, len(s)) if self.text.endswith(s[:k])]
        places = [self.text.rfind(s) for s in stopping] + [self.text.find(s) for s in self.stop]
        self._print(min([place for place in places if place >= 0], default=len(self.text)))

    def end(self, text: str) -> None:
        self.text = text  # the whole answer
        self._print(len(text))

    def _print(self, end: int) -> None:
        if is_main_rank() and end > self.num_printed:
            print(self.text[self.num_printed : end], end="", flush=True)
        self.num_printed = max(self.num_printed, end)


if __name__ == "__main__":
    run_script(main, ChatArgs)
