"""An oracle for tokenisation: a folder's tokenizer file, read by sentencepiece or tokenizers; chats by transformers."""

import json
import re
from pathlib import Path

import tokenizers
import transformers
from sentencepiece import SentencePieceProcessor


class FileTokenizer:
    """Is called like transformers' tokenizers. With a tokenizer.model it encodes as LLaMA's own code: BOS first, and
    texts between the special tokens of a chat separately."""

    def __init__(self, folder: Path):
        self.hf = transformers.AutoTokenizer.from_pretrained(folder)
        self.eos_token_id, self.bos_token_id = self.hf.eos_token_id, self.hf.bos_token_id
        self.config = json.loads((folder / "tokenizer_config.json").read_text())
        if (folder / "tokenizer.json").is_file():
            self.file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            self.file = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            self.bos_token_id, self.eos_token_id = self.file.bos_id(), self.file.eos_id()

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        if isinstance(self.file, tokenizers.Tokenizer):
            return {"input_ids": self.file.encode(text, add_special_tokens=add_special_tokens).ids}
        parts = re.split("(<s>|</s>|<unk>)", text)
        ids = [self.file.piece_to_id(x) if i % 2 else self.file.encode(x) for i, x in enumerate(parts)]
        flat = [x for each in ids for x in (each if isinstance(each, list) else [each])]
        first = [self.bos_token_id] * (add_special_tokens and self.config.get("add_bos_token", True))
        return {"input_ids": first + flat + [self.eos_token_id] * (add_special_tokens and self.config["add_eos_token"])}

    def apply_chat_template(self, messages: list[dict], *, tokenize: bool = True, **options):
        text = self.hf.apply_chat_template(messages, tokenize=False, **options)
        return self(text, add_special_tokens=False) if tokenize else text
