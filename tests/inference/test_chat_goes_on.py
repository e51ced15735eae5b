"""inference/chat.py: a message that cannot be encoded does not end the conversation; Ctrl-C ends it on all ranks."""

import json
import signal
import time

import pytest

from tests import ranks, tiny
from tests.inference.test_chat import CUT, chat, chat_folder, expected_answer  # noqa: F401 (fixture)


def test_after_a_message_that_cannot_be_read(chat_folder, tmp_path):
    """Catches a chat that ends, losing its history, at half a surrogate pair or at a token without an embedding."""
    folder = tiny.copy_to_edit(chat_folder, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    pad = {str(tiny.VOCAB_SIZE): {"content": "<pad>", "special": True}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": pad}))
    result, answers = chat(folder, "1 plus 2", "x <pad>", "\ud83d", "and 3?", max_new_tokens=5)
    assert result.code == 0, result
    assert f"token id {tiny.VOCAB_SIZE}" in answers[1] and "surrogates" in answers[2]
    first = {"role": "user", "content": "1 plus 2"}, {"role": "assistant", "content": answers[0].removesuffix(CUT)}
    wanted = expected_answer(folder, [*first, {"role": "user", "content": "and 3?"}], 5)
    assert answers[3].removesuffix(CUT) == wanted


@pytest.mark.parametrize("size", [1, 2])
def test_ctrl_c_under_torchrun(chat_folder, size):
    """Catches ranks that read another message after the Ctrl-C with which torchrun ends them: they would wait for each
    other and be killed after 30 seconds."""
    flags = ("--checkpoint_path", chat_folder, "--tensor_parallel_size", size, "--max_new_tokens", 480)
    started = ranks.start_nodes([chat_folder] * size, "inference/chat.py", *flags, stdin="1 plus 2\n" * 9)
    deadline = time.monotonic() + 120
    while len(started[0].read("stdout").partition("> ")[2]) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    for rank in started:
        rank.send_signal(signal.SIGINT)
    printed = [rank.communicate(timeout=20) for rank in started]
    assert [rank.poll() for rank in started] == [130] * size, printed
    assert "interrupted" in printed[0][1]
