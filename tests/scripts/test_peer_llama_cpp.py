"""scripts/peer_llama_cpp.py: the checks of a GGUF file, which need no llama.cpp."""

import struct

import pytest

from scripts.benchmark_common import SIZES
from scripts.peer_llama_cpp import check_shape, metadata


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(layers: int = 30) -> bytes:
    """The header of a GGUF file of the preset 135m: strings, an array of strings, and numbers of several widths."""
    keys = {"block_count": layers, "embedding_length": 576, "feed_forward_length": 1536, "attention.head_count": 9}
    parts = [string("general.architecture") + struct.pack("<I", 8) + string("llama")]
    parts += [string(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in keys.items()]
    parts.append(string("llama.attention.head_count_kv") + struct.pack("<IQ", 10, 3))
    parts.append(string("llama.rope.freq_base") + struct.pack("<If", 6, 1e5))
    tokens = b"".join(string(str(token)) for token in range(49152))
    parts.append(string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 49152) + tokens)
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(parts)) + b"".join(parts)


def test_the_peer_has_our_shape(tmp_path):
    """Catches a rate of llama.cpp that is compared with a model of another shape, and a file that is not GGUF."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf())
    assert metadata(path)["llama.rope.freq_base"] == 1e5
    check_shape(path, SIZES["135m"])
    with pytest.raises(
        ValueError, match=r"does not have the shape of --preset: num_hidden_layers 30, not 12; hidden_size 576"
    ):
        check_shape(path, SIZES["134m"])
    path.write_bytes(gguf(layers=29))
    with pytest.raises(ValueError, match=r"--preset: num_hidden_layers 29, not 30$"):
        check_shape(path, SIZES["135m"])
    for content in (b"GGUF", b"{}" * 50, gguf()[:500]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a GGUF file"):
            check_shape(path, SIZES["135m"])
