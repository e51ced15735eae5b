"""inference/chat.py as a conversation on a terminal, scripted on stdin."""

import io
import subprocess
import sys
from unittest import mock

import pytest
import torch

from models.tokenizer import Tokenizer
from tests import tiny

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"
GREEDY = ("--temperature", 0)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.write_model(folder, max_position_embeddings=512)
    tiny.write_tokenizer(folder, chat_template=TEMPLATE)
    return folder


def chat(folder, *said, **options):
    """Says each line to a chat; returns its result with the answers alone as stdout."""
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    with mock.patch.object(sys, "stdin", io.StringIO("".join(line + "\n" for line in said))):
        result = tiny.run("inference/chat.py", "--checkpoint_path", folder, *GREEDY, *flags)
    return result, [part.removesuffix("\n") for part in result.stdout.split("\n> ")[1:]]


def expected_answer(folder, messages, num_tokens):
    """transformers' greedy answer to a conversation."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = Tokenizer(folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
    said = [token for token in out[0, len(ids) :].tolist() if token != 2]
    return tokenizer.decode_continuation(ids, said)


def test_a_conversation_remembers_and_clear_forgets(chat_folder):
    """Catches a history that loses a turn or the system message, and a /clear that keeps one."""
    result, answers = chat(
        chat_folder, "1 plus 2", "and 3?", "/clear", "and 3?", system="The answer is", max_new_tokens=9
    )
    assert result.code == 0 and not result.stderr.count("Traceback")
    cut = " [cut at the token limit]"
    said = [answer.removesuffix(cut) for answer in answers]
    opening = [{"role": "system", "content": "The answer is"}]
    first = [*opening, {"role": "user", "content": "1 plus 2"}]
    assert said[0] == expected_answer(chat_folder, first, 9)
    second = [*first, {"role": "assistant", "content": said[0]}, {"role": "user", "content": "and 3?"}]
    assert said[1] == expected_answer(chat_folder, second, 9)
    assert said[2] == "", "/clear has no answer"
    assert said[3] == expected_answer(chat_folder, [*opening, {"role": "user", "content": "and 3?"}], 9)
    assert said[3] != said[1]


def test_answers_stream(chat_folder):
    """Catches an answer that is held back until it is complete."""
    pieces = []

    class Terminal(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return super().write(text)

    with mock.patch.object(sys, "stdin", io.StringIO("1 plus 2\n")), mock.patch("io.StringIO", Terminal):
        tiny.run("inference/chat.py", "--checkpoint_path", chat_folder, *GREEDY, "--max_new_tokens", 12)
    answer = pieces[pieces.index("\n> ") + 1 :]
    assert sum(bool(piece.strip()) for piece in answer) >= 4, pieces


def test_a_full_context_is_said_and_the_chat_goes_on(chat_folder):
    """Catches a conversation that outgrows its cache: a crash, a silent cut, or a message that stays in the way."""
    long = "The answer to question 3 is 17. " * 8
    result, answers = chat(chat_folder, long, "1", long, "/clear", "2", max_seq_len=48, max_new_tokens=4)
    assert result.code == 0, result
    assert "fills the 48 tokens" in answers[0] and "fills the 48 tokens" in answers[2]
    assert "fills" not in answers[1] and "fills" not in answers[4]


def test_an_empty_line_ends_the_chat(chat_folder):
    """Catches a chat that answers an empty line, and one that fails at its end."""
    result, answers = chat(chat_folder, "", "1 plus 2", max_new_tokens=3)
    assert result.code == 0 and answers == [""]


def test_a_folder_without_a_template_continues_text(folder):
    """Catches a chat that insists on a template."""
    result, answers = chat(folder, "1 plus", "2", max_new_tokens=3)
    assert result.code == 0 and len(answers) == 3


def test_a_chat_in_a_process_of_its_own_ends_at_eof(chat_folder):
    """Catches a script that only works from the tests' process, or that takes the end of stdin for a mistake."""
    command = [
        sys.executable,
        tiny.ROOT / "inference/chat.py",
        "--checkpoint_path",
        chat_folder,
        "--max_new_tokens",
        "5",
    ]
    result = subprocess.run(command, input="1 plus 2\n", capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.count("\n> ") == 2 and result.stderr == "", result


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
    """Catches a traceback, or a chat that starts with something else than was asked."""
    result = tiny.run("inference/chat.py", "--checkpoint_path", chat_folder, *flags)
    tiny.assert_refused(result, culprit)
