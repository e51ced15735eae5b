"""inference/settings.py: reports settings of generation_config.json that a run does not follow."""

import json

import pytest
import transformers

from inference.settings import FLAGS, OTHERS, settings_not_taken
from models.sampling import SamplingArgs
from tests import tiny

QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("config", "args", "said"),
    [
        (QWEN, {}, "temperature 0.7, top_k 20, top_p 0.8, repetition_penalty 1.05"),
        (QWEN, {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}, ""),
        (QWEN, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}, "repetition_penalty 1.05"),
        ({"do_sample": False, "temperature": 0.7}, {}, "do_sample False"),
        ({**QWEN, "do_sample": False}, {}, "do_sample False, repetition_penalty 1.05"),
        ({"do_sample": False, "temperature": None}, {"temperature": 0.0}, ""),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}, ""),
        ({"suppress_tokens": [5], "bad_words_ids": [], "min_p": 0.0, "max_length": 4096}, {}, "suppress_tokens [5]"),
        ({"token_healing": True, "encoder_no_repeat_ngram_size": 0, "dola_layers": []}, {}, "token_healing True"),
    ],
)
def test_what_is_not_taken(tmp_path, config, args, said):
    """Catches settings that a run ignores silently, and a report of some that would change nothing."""
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert settings_not_taken(tmp_path, SamplingArgs(**args)) == said


def test_a_config_of_defaults_says_nothing(tmp_path):
    """Catches a report of transformers' own defaults, and setting names that transformers does not know."""
    config = transformers.GenerationConfig()
    config.save_pretrained(tmp_path)
    assert settings_not_taken(tmp_path, SamplingArgs()) == ""
    assert settings_not_taken(tmp_path / "absent", SamplingArgs()) == ""
    assert [name for name in (*FLAGS, *OTHERS) if not hasattr(config, name)] == []


def test_scripts_say_it(tmp_path):
    """Catches a card of generate.py without the report."""
    tiny.write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN))
    args = ("--checkpoint_path", tmp_path, "--prompt", "a", "--max_new_tokens", 1)
    assert "temperature 0.7, top_k 20" in tiny.run("inference/generate.py", *args).stderr
