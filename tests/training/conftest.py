import signal

import pytest
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers

from models.tokenizer import Tokenizer
from tests import tiny
from tests.file_tokenizer import FileTokenizer
from tests.models.test_tokenizer import byte_level_folder
from tests.training.test_data import END_OF_TURN, TEMPLATES, write_chat_tokenizer


@pytest.fixture(autouse=True)
def keep_signal_handler():
    """Restores pytest's handlers of SIGTERM and SIGINT, which a training script in this process replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    """Returns a function: kind of folder -> (our Tokenizer, the reference FileTokenizer)."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            if kind.startswith("newlines"):
                write_newline_tokenizer(folder, TEMPLATES[kind.removeprefix("newlines_")])
            elif kind in END_OF_TURN or kind == "rewrites":
                write_chat_tokenizer(folder, kind)
            elif kind == "byte_level":
                byte_level_folder(folder, "llama3")
            else:
                tiny.write_tokenizer(folder)
            made[kind] = Tokenizer(folder), FileTokenizer(folder)
        return made[kind]

    return make


@pytest.fixture
def tokenizer(opened):
    return opened("sentencepiece")[0]


def write_newline_tokenizer(folder, template):
    """Writes a byte-level tokenizer whose merges cross words, so that several newlines can be one token."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    lines = [f"{a}\n\n{b}.\n" for a in ("the", "yes", "plus") for b in ("no", "er", "is")]
    backend.train_from_iterator(lines, trainer)
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], additional_special_tokens=special[1:]
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
