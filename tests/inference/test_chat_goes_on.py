"""inference/chat.py: a conversation is not lost for one message that cannot be asked."""

import json

from tests import tiny
from tests.inference.test_chat import CUT, chat, chat_folder, expected_answer  # noqa: F401 (fixture)


def test_after_a_message_that_cannot_be_read(chat_folder, tmp_path):
    """Catches a chat that ends, with all that was said, for half a character, or for a token without an embedding."""
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
