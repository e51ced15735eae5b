"""The system message that a flag puts before a conversation."""

from models.tokenizer import Tokenizer


def opening_of(system: str | None, tokenizer: Tokenizer) -> list[dict]:
    """The messages that a conversation begins with: the system message, or none. Raises ValueError where the chat
    template refuses it, or would leave it out without a word."""
    if system is None:
        return []
    opening = [{"role": "system", "content": system}]
    if tokenizer.chat_template is None:
        return opening
    question = [{"role": "user", "content": "?"}]
    without = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    try:
        text = tokenizer.apply_chat_template(opening + question, add_generation_prompt=True)
    except ValueError as error:
        raise ValueError(f"{error}; does it take a system message at all? Leave it out") from None
    if text == without:
        raise ValueError("the chat template would leave the system message out without a word; do without it")
    return opening
