"""inference/chat.py: conversations with the user's lines scripted on stdin, and one on a pseudo-terminal."""

import contextlib
import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from unittest import mock

import pytest
import torch

from inference import chat as script
from inference.chat import Shown
from models import common
from models.scheduler import Scheduler
from models.tokenizer import Tokenizer
from tests import tiny

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"
GREEDY = ("--temperature", 0)
CUT = " [cut at the token limit]"


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.write_model(folder, max_position_embeddings=512)
    tiny.write_tokenizer(folder, chat_template=TEMPLATE)
    return folder


def chat(folder, *said, **options):
    """Runs a chat in which the user types these lines; returns its result and its answers."""
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    with mock.patch.object(sys, "stdin", io.StringIO("".join(line + "\n" for line in said))):
        result = tiny.run("inference/chat.py", "--checkpoint_path", folder, *GREEDY, *flags)
    return result, [part.removesuffix("\n") for part in result.stdout.split("\n> ")[1:]]


def expected_answer(folder, messages, num_tokens):
    """transformers' greedy answer to a conversation."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = Tokenizer(folder)
    text = tokenizer.chat_template.render(messages, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
    said = [token for token in out[0, len(ids) :].tolist() if token != 2]
    return tokenizer.decode_continuation(ids, said)


def test_a_conversation_remembers_and_commands_forget(chat_folder, monkeypatch):
    """Catches a history that loses a turn or the system message; a /reset that keeps a turn; a /system that keeps the
    old message or the conversation; an empty line or an unknown command that goes to the model or ends the chat; and
    --prefill_tokens without effect."""
    sizes, next_prefill = [], Scheduler.next_prefill

    def measured(self):
        batch = next_prefill(self)
        sizes.append(len(batch.ids))
        return batch

    monkeypatch.setattr(Scheduler, "next_prefill", measured)
    said = ["1 plus 2", "and 3?", "/reset", "and 3?", "", "  ", "/help", "/clear", "/system It is", "and 3?", "/system"]
    flags = {"system": "The answer is", "max_new_tokens": 9, "prefill_tokens": 5}
    result, answers = chat(chat_folder, *said, "and 3?", **flags)
    assert result.code == 0 and not result.stderr.count("Traceback") and max(sizes) == 5
    said = [answer.removesuffix(CUT) for answer in answers]
    opening = [{"role": "system", "content": "The answer is"}]
    first = [*opening, {"role": "user", "content": "1 plus 2"}]
    assert said[0] == expected_answer(chat_folder, first, 9)
    second = [*first, {"role": "assistant", "content": said[0]}, {"role": "user", "content": "and 3?"}]
    assert said[1] == expected_answer(chat_folder, second, 9)
    assert said[2] == said[8] == said[10] == "(the conversation begins anew)"
    again = {"role": "user", "content": "and 3?"}
    assert said[3] == expected_answer(chat_folder, [*opening, again], 9)
    assert said[3] != said[1]
    assert said[4:6] == ["", ""] and "/system TEXT" in said[6] and "there is no /clear" in said[7]
    assert said[9] == expected_answer(chat_folder, [{"role": "system", "content": "It is"}, again], 9)
    assert said[11] == expected_answer(chat_folder, [again], 9)
    assert len({*said[1::2], said[9]}) >= 5 and len(said) == 13, "the end of the input ends it"


@pytest.mark.parametrize("template", ["raises", "ignores"])
def test_a_template_without_a_system_role(chat_folder, tmp_path, template):
    """Catches a system message that the template drops without an error from chat.py or generate.py, and a chat that
    ends because its template refuses a /system."""
    folder = shutil.copytree(chat_folder, tmp_path / "model")
    guard = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    of_users = TEMPLATE.replace("messages %}", "messages if m.role == 'user' %}")
    tiny.write_tokenizer(folder, chat_template=guard + TEMPLATE if template == "raises" else of_users)
    reason = "no system role" if template == "raises" else "leave the system message out"
    result, answers = chat(folder, "/system Be brief", "1 plus", max_new_tokens=3)
    assert result.code == 0 and reason in answers[0] and answers[1]
    tiny.assert_refused(chat(folder, "1 plus", system="Be brief")[0], reason)
    flags = ("--checkpoint_path", folder, "--prompt", "1 plus", "--chat", "--system", "Be brief")
    tiny.assert_refused(tiny.run("inference/generate.py", *flags), reason)


def test_a_stop_string_is_not_shown(chat_folder):
    """Catches a chat that ignores --stop, prints the beginning of a stop string before the rest of it has come, or
    keeps the stop string in its history; and a --repetition_penalty that has no effect."""
    (free,) = [answer.removesuffix(CUT) for answer in chat(chat_folder, "1 plus 2", max_new_tokens=12)[1][:1]]
    stop = free[4:7]
    result, answers = chat(chat_folder, "1 plus 2", "and 3?", max_new_tokens=12, stop=stop)
    assert answers[0] == free[: free.index(stop)] and result.code == 0
    first = [{"role": "user", "content": "1 plus 2"}, {"role": "assistant", "content": answers[0]}]
    wanted = expected_answer(chat_folder, [*first, {"role": "user", "content": "and 3?"}], 12)
    assert answers[1].removesuffix(CUT) == wanted.partition(stop)[0]
    shown = Shown(("</a>", "\n\n"))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        printed = [shown.push(piece) or out.getvalue() for piece in ("x<", "/b", "<</", "a>y", "\n\n")]
    assert printed == ["x", "x</b", "x</b<", "x</b<", "x</b<"]
    penalised = chat(chat_folder, "1 plus 2", max_new_tokens=12, repetition_penalty=3)[1][0]
    assert penalised.removesuffix(CUT) != free


def test_ctrl_c(chat_folder, monkeypatch):
    """Catches a Ctrl-C that ends the chat during an answer, loses what was printed, or is an error at the prompt."""
    pushed = []

    def push(self, piece):
        pushed.append(piece)
        if len(pushed) == 4:
            raise KeyboardInterrupt
        return real(self, piece)

    real = Shown.push
    monkeypatch.setattr(Shown, "push", push)
    result, answers = chat(chat_folder, "1 plus 2", "and 3?", max_new_tokens=9)
    assert result.code == 0 and answers[0].rstrip("\ufffd") == "".join(pushed[:3])
    first = [{"role": "user", "content": "1 plus 2"}, {"role": "assistant", "content": answers[0]}]
    assert answers[1].removesuffix(CUT) == expected_answer(
        chat_folder, [*first, {"role": "user", "content": "and 3?"}], 9
    )
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=KeyboardInterrupt))
    assert chat(chat_folder)[0].code == 0


def test_who_types_may_take_hours(chat_folder, monkeypatch):
    """Catches ranks that wait for the user's line inside a collective, which fails at its timeout."""
    order, asked = [], []
    with monkeypatch.context() as patch:
        patch.setattr(script, "on_main", asked.append)  # which returns None: today, and no more lines
        tiny.run("inference/chat.py", "--checkpoint_path", chat_folder, *GREEDY)
    assert asked[1:] == [script.read_line]
    monkeypatch.setattr("builtins.input", lambda prompt: order.append("typed") or "hello")
    monkeypatch.setattr(common, "several_ranks", lambda: True)
    monkeypatch.setattr(common, "wait_for_all_ranks", lambda: order.append("waited"))
    monkeypatch.setattr(common.dist, "broadcast_object_list", lambda line, src: order.append("told"))
    assert common.on_main(script.read_line) == "hello" and order == ["typed", "waited", "told"]


def test_answers_stream(chat_folder):
    """Catches an answer that is held back until it is complete."""
    pieces = []

    class Terminal(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return super().write(text)

    with mock.patch.object(sys, "stdin", io.StringIO("1 plus 2\n")), mock.patch("io.StringIO", Terminal):
        tiny.run("inference/chat.py", "--checkpoint_path", chat_folder, *GREEDY, "--max_new_tokens", 12)
    answer = pieces[pieces.index("> ") + 1 :]
    assert sum(bool(piece.strip()) for piece in answer) >= 4, pieces


def test_a_full_context_is_said_and_the_chat_goes_on(chat_folder):
    """Catches a crash, a silent cut or a message that stays in the history when a conversation outgrows its cache; an
    answer that asks for more tokens than fit; and advice to raise --max_seq_len beyond the model's context."""
    long = "The answer to question 3 is 17. " * 8
    result, answers = chat(chat_folder, long, "1", long, "/reset", "2", max_seq_len=48, max_new_tokens=64)
    assert result.code == 0, result
    assert "fills the 48 tokens" in answers[0] and "fills the 48 tokens" in answers[2]
    assert "fills" not in answers[1] and "fills" not in answers[4] and "larger --max_seq_len" in answers[0]
    _, answers = chat(chat_folder, long * 20)
    assert "fills the 512 tokens: /reset it)" in answers[0]


def test_a_folder_without_a_template_continues_text(folder):
    """Catches a chat that requires a chat template."""
    result, answers = chat(folder, "1 plus", "2", max_new_tokens=3)
    assert result.code == 0 and len(answers) == 3


def test_a_chat_on_a_terminal(chat_folder):
    """Catches a script that only works in the tests' process or prints its imports' warnings; earlier lines that arrow
    up does not recall; a typed or generated letter outside the terminal's encoding that ends the chat; and a Ctrl-C at
    the prompt that is an error."""
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        tiny.ROOT / "inference/chat.py",
        "--checkpoint_path",
        chat_folder,
        "--max_new_tokens",
        "5",
    ]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore SIGINT
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, env=env, preexec_fn=interruptible, **streams)
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + 300  # the machine may be busy
    for typed in ("1 plus é 2\n".encode(), b"\x1b[A!\n", None):
        prompts = shown.count(b"\n> ")
        while shown.count(b"\n> ") == prompts and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 4096)
        if typed:
            os.write(ours, typed)
    while time.monotonic() < deadline:  # readline may miss a SIGINT right after the prompt: then no line ends
        process.send_signal(signal.SIGINT)
        if select.select([ours], [], [], 1)[0]:
            break
    code = process.wait(timeout=60)
    os.close(ours)
    assert code == 0 and not any(word in shown for word in (b"Traceback", b"error", b"Warning")), shown
    assert shown.count(b" 2!") == 1 and shown.count(b"\n> ") == 3, shown


@pytest.mark.parametrize(
    "flags, culprit",
    [
        (("--temperature", "-1"), "--temperature"),
        (("--top_p", "2"), "--top_p"),
        (("--device", "tpu"), "tpu"),
        (("--checkpoint_path", "nowhere"), "nowhere"),
        (("--loud",), "--loud"),
    ],
    ids=str,
)
def test_bad_input(chat_folder, flags, culprit):
    """Catches a traceback, or a chat that starts with other settings than its flags'."""
    result = tiny.run("inference/chat.py", "--checkpoint_path", chat_folder, *flags)
    tiny.assert_refused(result, culprit)
