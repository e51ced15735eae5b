"""models/rows.py, parts.py and forked.py: the rows of a file in flat arrays, encoded once and kept. The oracles are
each record encoded by itself, and the whole text encoded by transformers."""

import fcntl
import gc
import json
import os
import random
import shutil
import socket
import subprocess
import threading
import time
import weakref
from datetime import date
from functools import partial
from itertools import chain
from unittest import mock

import numpy as np
import pytest
from transformers import AutoTokenizer

from models import common, forked, record_files, rows
from models.forked import map_in_processes
from models.functions import ASK_TO_END
from models.parts import cut_whole
from models.records import EncodingCounts, Limits, Record
from models.reward import encode_pair_record
from models.rows import Store
from models.tokenizer import Tokenizer
from tests import tiny
from tests.forked import fork
from tests.models.test_tokenizer import byte_level_folder, json_folder, word_json
from training.data import encode_sft_file, encode_sft_record
from training.preferences import encode_pair_file, encode_pointwise_record, encode_scored_file

LIMITS = Limits(10**6, 200)
WORDS = [
    "the",
    "list",
    "is",
    "12345",
    "don't",
    "你好",
    "🙂",
    "...",
    "\n",
    "\n\n",
    "  ",
    "<s",
    "</s>",
    "a_b",
    "é",
    "e\u0301",
]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|eot_id|>\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}]


def text(rng, most=12):
    return rng.choice(["", " "]).join(rng.choices(WORDS, k=rng.randint(1, most)))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    byte_level_folder(folder, "llama3", eos_token="<|eot_id|>", additional_special_tokens=["<|user|>", "<|assistant|>"])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def big(monkeypatch):
    """Every file counts as big, and has many parts."""
    monkeypatch.setattr(rows, "BIG_FILE", 1)
    monkeypatch.setattr(record_files, "CHUNK_BYTES", 300)


@pytest.fixture
def files(tmp_path, chat_folder):
    """{kind: (the function that encodes a file, its records encoded by themselves, the file)}"""
    rng, tokenizer = random.Random(0), Tokenizer(chat_folder)
    made = {
        "sft": [
            *({"messages": CHAT * rng.randint(1, 3)} for _ in range(9)),
            *({"prompt": text(rng), "completion": text(rng)} for _ in range(9)),
            *({"text": text(rng, 40)} for _ in range(9)),
        ],
        "pairs": [{"prompt": text(rng), "chosen": text(rng), "rejected": text(rng)} for _ in range(20)],
        "pointwise": [{"prompt": text(rng), "completion": text(rng), "label": rng.random()} for _ in range(20)],
    }
    for i in range(0, 20, 3):
        made["pairs"][i]["margin"] = rng.random()
    encoders = {
        "sft": (encode_sft_file, encode_sft_record),
        "pairs": (encode_pair_file, encode_pair_record),
        "pointwise": (partial(encode_scored_file, kind="pointwise"), encode_pointwise_record),
    }
    return {
        kind: (
            partial(encoders[kind][0], tiny.write_records(tmp_path / kind, records), tokenizer, LIMITS),
            [encoders[kind][1](Record("x", record), tokenizer) for record in records],
            tmp_path / kind,
        )
        for kind, records in made.items()
    }


def test_one_rank_shows_a_bar(files, tmp_path, monkeypatch):
    """Catches a progress bar of each rank, or of none: where every rank tokenises for itself, the main rank shows it;
    where one rank of each node does, that of the first node."""
    encode, shown = files["sft"][0], []
    real = common.tqdm
    monkeypatch.setattr(common, "tqdm", lambda **options: shown.append(not options["disable"]) or real(**options))
    for rank, node, store in (
        ("0", "0", Store()),
        ("3", "0", Store()),
        ("3", "0", Store(tmp_path)),
        ("4", "1", Store()),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("GROUP_RANK", node)
        monkeypatch.setattr(rows, "BIG_FILE", 1 if store.folder else 2**23)
        encode(store)
    assert shown == [True, False, True, False]


@pytest.mark.parametrize("kind", ["sft", "pairs", "pointwise"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_is_its_records(kind, workers, big, files, tmp_path):
    """Catches a label, a margin or a position moved to another token or row, parts of a file in another order than the
    file's (they come from several processes), lost counts, and more than 5 bytes per token; in memory, written and read
    again."""
    encode, wanted, _ = files[kind]
    counts = EncodingCounts()
    for row, happened in wanted:
        counts = counts.plus(happened._replace(nothing_to_learn=int(row.nothing_to_learn)))
    for store in (Store(None, workers), *[Store(tmp_path / "cache", workers)] * 2):
        found, found_counts = encode(store)
        assert list(found) == [row for row, _ in wanted] and found_counts == counts
        assert found.lengths.tolist() == [[len(ids) for ids in row.sequences] for row, _ in wanted]
        assert found[-1] == wanted[-1][0] and found[2:4] == [row for row, _ in wanted[2:4]]
        assert found.columns.ids.itemsize + found.columns.marks.itemsize <= 5
        if kind == "sft":
            assert found.num_targets == sum(row.num_targets for row, _ in wanted)
    assert isinstance(found.columns.ids, np.memmap) and not found.columns.ids.flags.writeable


def test_the_cache_is_used_and_knows_what_it_depends_on(big, files, chat_folder, tmp_path, monkeypatch):
    """Catches a cache that is never read, and one that is used for other data, another template, tokenizer, limit, day,
    kind of rows, end of a step, or another version of the code."""
    path = files["sft"][2]
    store, calls = Store(tmp_path / "cache", 1), []
    original = rows._encode_chunk
    monkeypatch.setattr(rows, "_encode_chunk", lambda *args: (calls.append(1), original(*args))[1])

    def made(tokenizer=None, limits=LIMITS):
        calls.clear()
        encode_sft_file(path, tokenizer or Tokenizer(chat_folder), limits, store)
        return bool(calls)

    assert made() and not made()
    assert made(limits=LIMITS._replace(overlong="skip")) and made(limits=LIMITS._replace(max_seq_len=199))
    other = tmp_path / "other"
    shutil.copytree(chat_folder, other)
    assert not made(Tokenizer(other))
    (other / "chat_template.jinja").write_text(TEMPLATE.replace("|>\n", "|>"))
    assert made(Tokenizer(other)) and not made()
    (other / "chat_template.jinja").write_text(TEMPLATE + "{{ strftime_now('%Y') if false }}")
    assert made(Tokenizer(other, date(2024, 1, 1))) and made(Tokenizer(other, date(2024, 1, 2)))
    assert not made(Tokenizer(other, date(2024, 1, 1)))
    code = tmp_path / "code.py"
    code.write_text("1")
    monkeypatch.setattr(rows, "_CODE", [*rows._CODE, code])
    assert made() and not made()
    code.write_text("2")
    assert made() and not made()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[1:], lines[0]]))
    assert made()
    record = {"prompt": "2+2?", "completion": "4", "label": 1, "completions": ["4"], "labels": [1]}
    path = tiny.write_records(tmp_path / "scored", [record])
    assert made() and not made()
    for kind in ({"kind": "pointwise"}, {"kind": "process"}, {"kind": "process", "step_separator": ";"}):
        calls.clear()
        for _ in range(2):
            encode_scored_file(path, Tokenizer(chat_folder), LIMITS, store, **kind)
        assert len(calls) == 1, kind


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "delete", "swap", "note"])
def test_a_damaged_cache_is_made_anew(damage, big, files, tmp_path, capsys):
    """Catches training on a torn or flipped file of the cache, a flipped count that is reported, and a crash."""
    encode, wanted, _ = files["pairs"]
    store = Store(tmp_path / "cache", 1)
    _, counts = encode(store)
    [folder] = [path for path in store.folder.iterdir() if path.is_dir()]
    for name in ("rows.json",) if damage == "note" else (*rows.Columns._fields, "rows.json"):
        path = folder / name
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[len(content) // 2] ^= 1
        elif damage == "zero":
            content = bytes(len(content))
        elif damage == "note":
            content = content.replace(b'"counts": [0', b'"counts": [7')
        path.write_bytes(content[:-1] if damage == "truncate" else content)
        if damage == "delete":
            path.unlink()
        elif damage == "swap":
            path.write_bytes((folder / "lengths").read_bytes() if name == "ids" else b"[]")
        found, found_counts = encode(store)
        assert list(found) == [row for row, _ in wanted] and found_counts == counts
        assert "damaged" in capsys.readouterr().out
    encode(store)
    assert "damaged" not in capsys.readouterr().out and len(list(store.folder.iterdir())) == 2  # with the lock


def test_a_cache_that_cannot_be_written(big, files, tmp_path, monkeypatch, capsys):
    """Catches a run that ends, or goes on with a part of the rows, where the cache's disk is full or read-only."""
    encode, wanted, _ = files["sft"]
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    found, _ = encode(Store(in_the_way, 1))
    assert list(found) == [row for row, _ in wanted] and "File exists" in capsys.readouterr().out

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rows.os, "rename", full)
        found, _ = encode(Store(tmp_path / "full", 1))
    assert list(found) == [row for row, _ in wanted] and "No space left on device" in capsys.readouterr().out
    assert len(list((tmp_path / "full").iterdir())) == 1  # the lock, and nothing unfinished


def test_processes_without_locks(big, files, tmp_path, monkeypatch):
    """Catches processes that delete each other's unfinished cache, or the finished one, where the file system has no
    locks or each host its own, and leftovers of a killed writer that stay."""
    encode, wanted, _ = files["sft"]
    store, real = Store(tmp_path / "cache", 1), rows._encode_chunk
    encode(store)
    [folder] = [path for path in store.folder.iterdir() if path.is_dir()]
    made = folder.rename(tmp_path / "made")
    ended = subprocess.Popen("true")
    ended.wait()
    here, yesterday = socket.gethostname(), time.time() - 90_000
    names = (f"{here}.{ended.pid}", f"{here}.{os.getpid()}", "old.host.1", f"{here}.{os.getppid()}", "a.host.1")
    unfinished = [folder.with_name(f".{folder.name}.{name}") for name in names]
    for each in unfinished:
        each.mkdir()
        (each / "ids").write_bytes(b"1")
    for path in (unfinished[2] / "ids", unfinished[2]):
        os.utime(path, (yesterday, yesterday))

    def encode_while_another_ends(encoder, chunk):
        if made.exists():
            made.rename(folder)
        return real(encoder, chunk)

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(rows, "_encode_chunk", encode_while_another_ends)
    monkeypatch.setattr(rows.fcntl, "flock", no_locks)
    written = (made / "rows.json").stat().st_ino
    assert list(encode(store)[0]) == [row for row, _ in wanted]
    assert (folder / "rows.json").stat().st_ino == written
    assert [each.exists() for each in unfinished] == [False, False, False, True, True]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_written_meanwhile(replaced, big, files, tmp_path, monkeypatch):
    """Catches rows of a file that was replaced or rewritten during encoding, kept under the digest of the first
    content, where every later run would find them."""
    encode, wanted, path = files["sft"]
    store, content, other = Store(tmp_path / "cache", 1), path.read_bytes(), tmp_path / "other"
    real = rows._encode_chunk

    def write_and_encode(encoder, chunk):
        other.write_bytes(content + content)
        other.replace(path) if replaced else path.write_bytes(other.read_bytes())
        return real(encoder, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(rows, "_encode_chunk", write_and_encode)
        tiny.refused(partial(encode, store), path, "run this again")
    assert not [each for each in store.folder.iterdir() if each.is_dir()]
    path.write_bytes(content)
    assert list(encode(store)[0]) == [row for row, _ in wanted]


def test_others_wait_for_the_one_that_encodes(big, files, tmp_path, capsys):
    """Catches ranks of a node that each encode the file, or that read a half-written cache."""
    encode, wanted, _ = files["sft"]
    store, found = Store(tmp_path / "cache", 1), []
    encode(store)
    [folder] = [path for path in store.folder.iterdir() if path.is_dir()]
    kept = folder.rename(tmp_path / "kept")
    with open(folder.with_name(f".{folder.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: found.append(encode(store)))
        waiting.start()
        while "waiting for another process" not in capsys.readouterr().out:
            time.sleep(0.01)
        assert not found
        kept.rename(folder)
        written = (folder / "rows.json").stat().st_mtime_ns
    waiting.join()
    assert list(found[0][0]) == [row for row, _ in wanted]
    assert (folder / "rows.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_bad_line_is_named(workers, big, chat_folder, tmp_path):
    """Catches a later line named because its process was quicker, a line number that counts from the part's beginning,
    and a cache of half a file."""
    records = [{"text": f"{i} is a number"} for i in range(60)]
    lines = [json.dumps(record) for record in records]
    lines[41], lines[25] = '{"text": 5}', '{"txt": "a"}'
    path, store = tmp_path / "train", Store(tmp_path / "cache", workers)
    encode = partial(encode_sft_file, path, Tokenizer(chat_folder), LIMITS, store)
    path.write_text("\n".join(lines))
    tiny.refused(encode, f"{path}:26: ", "is missing")
    lines[25] = lines[0]
    path.write_text("\n\n" + "\n".join(lines))
    tiny.refused(encode, f"{path}:44: ", "text must be a string")
    path.write_text("\n" * 1000)
    tiny.refused(encode, path, "holds no records")
    assert not [each for each in store.folder.iterdir() if each.is_dir()]


def test_a_worker_that_is_killed(monkeypatch):
    """Catches an endless wait for a process that the system killed for its memory, or for one that is busy meanwhile;
    processes that die of a signal to the whole group, and results out of order."""
    found = map_in_processes(lambda x: (time.sleep(0.02 * (x == 0)), x)[1], range(20), 3, fewer="")
    assert list(found) == list(range(20))
    found = map_in_processes(lambda x: os.kill(os.getpid(), ASK_TO_END[x]), range(len(ASK_TO_END)), 2, fewer="")
    assert list(found) == [None] * len(ASK_TO_END)
    fate, began = [partial(time.sleep, 60), lambda: os.kill(os.getpid(), 9)], time.monotonic()
    with pytest.raises(ValueError, match=r"killed.*lower --flag$"):
        list(map_in_processes(lambda x: fate[x](), range(2), 2, fewer="lower --flag"))
    assert time.monotonic() - began < 30


def test_no_semaphores(monkeypatch):
    """Catches large files that are not tokenised, for a reason in no words, where /dev/shm is missing or read-only."""
    monkeypatch.setattr(forked, "ProcessPoolExecutor", mock.Mock(side_effect=OSError(30, "Read-only file system")))
    assert list(map_in_processes(lambda x: x + 1, range(3), 2, fewer="")) == [1, 2, 3]


def test_forks_leave_garbage_to_their_parent(tmp_path, monkeypatch):
    """Catches a forked process that finalises garbage of its parent, such as a process group, whose destructor joins
    threads that the fork does not have, and one that loads a library, for which it may wait without end."""
    monkeypatch.setattr("ctypes.CDLL", None)
    log, enabled = tmp_path / "finalised", gc.isenabled()
    log.touch()
    gc.disable()  # else the garbage might be gone before the fork
    try:
        thing = type("Thing", (), {})()
        thing.itself = thing
        weakref.finalize(thing, lambda: log.write_text(str(os.getpid())))
        del thing
        assert list(map_in_processes(lambda x: (gc.collect(), gc.isenabled())[1], range(4), 2, fewer="")) == 4 * [True]
        assert os.waitpid(fork(gc.collect), 0)[1] == 0 and log.read_text() == ""
        gc.collect()
        assert log.read_text() == str(os.getpid())
    finally:
        if enabled:
            gc.enable()


def test_parts_of_a_text_are_the_whole(chat_folder):
    """Catches a boundary taken for clean where a token spans it, or where a word is split otherwise beside its
    neighbours (spaces before a word, newlines, digits in threes), also near the ends of the text examined; and a
    shortcut that is never taken. The oracle is the whole text in transformers."""
    ours, hf, rng, clean = Tokenizer(chat_folder), AutoTokenizer.from_pretrained(chat_folder), random.Random(1), 0
    encode = partial(hf.encode, add_special_tokens=False)
    for _ in range(600):
        parts = [text(rng, rng.choice([2, 8, 90])) for _ in range(rng.randint(2, 4))]
        if rng.random() < 0.5:
            parts.insert(1, rng.choice(["<|eot_id|>\n", "<|user|>", "\n<|assistant|>\n"]))
        if (cut := cut_whole(parts, ours)) is not None:
            for count in range(1, len(parts) + 1):
                assert [*chain(*cut[:count])] == encode("".join(parts[:count])), parts
            clean += 1
    assert clean > 100


def test_unknown_words_and_tokenizers_without_places(tmp_path):
    """Catches a boundary inside a written "<unk>" taken for clean, since unknown words before it have the same id; and
    offsets into another text than the given one."""
    ours = Tokenizer(json_folder(tmp_path / "words", word_json("level", None)))
    assert cut_whole(["<u", "nk>", "<unk> hello"], ours) is None and cut_whole(["hello<unk>", "nk"], ours) is not None
    tiny.write_tokenizer(tmp_path)
    assert cut_whole(["a", "b"], Tokenizer(tmp_path)) is None
