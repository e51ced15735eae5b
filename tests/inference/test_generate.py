"""inference/generate.py from its command line: lines and prompts. Others: test_generate_refusals.py and _resume.py."""

import json
import os
import shutil
import time
from unittest import mock

import pytest
import torch

from models.tokenizer import Tokenizer
from tests import tiny
from tests.forked import Forked

SCRIPT = "inference/generate.py"
FIELDS = {
    "idx": int,
    "sample_idx": int,
    "prompt": str,
    "output": str,
    "finish_reason": str,
    "num_tokens": int,
    "logprob": float,
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"


def generate(folder, *flags, new=8):
    return tiny.run(SCRIPT, "--checkpoint_path", folder, "--max_new_tokens", new, *flags)


def lines_of(result):
    assert result.code == 0, result.stderr
    return sorted(map(json.loads, result.stdout.splitlines()), key=lambda line: (line["idx"], line["sample_idx"]))


def keys(lines):
    return [(line["idx"], line["sample_idx"]) for line in lines]


def records(count, **more):
    return [{"prompt": f"{i} plus {i % 7} is", **more} for i in range(count)]


@pytest.fixture(scope="module")
def chat_folder(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(folder, path)
    tiny.write_tokenizer(path, chat_template=TEMPLATE)
    return path


# -------------------------------------------------------------------------------------------- lines


def test_lines_have_the_pinned_fields(folder, hf_model, tmp_path):
    """Catches a field that is missing, renamed, of another type or counted from 1; token_ids that do not decode to the
    output; EOS ids other than generation_config.json's; an EOS in token_ids or num_tokens; and a logprob that is a
    mean, lacks the EOS or is taken at another temperature."""
    model = shutil.copytree(folder, tmp_path / "model")
    eos_ids = list(range(290, 320))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_ids}))
    prompts = tiny.write_records(tmp_path / "p.jsonl", records(4))
    out = tmp_path / "deep" / "er" / "out.jsonl"  # a missing output folder is made
    flags = ("--num_samples", 3, "--temperature", 0.8, "--return_token_ids")
    result = generate(model, "--prompt_file", prompts, "--output_file", out, *flags, new=12)
    assert result.code == 0, result
    tokenizer = Tokenizer(model)
    lines = tiny.read_lines(out)
    assert sorted(keys(lines)) == [(i, s) for i in range(4) for s in range(3)]
    assert {line["finish_reason"] for line in lines} == {"stop", "length"}
    for line in lines:
        assert list(line) == [*FIELDS, "token_ids"]
        assert all(type(line[name]) is kind for name, kind in FIELDS.items())
        prompt_ids, ids, stopped = tokenizer.encode(line["prompt"]), line["token_ids"], line["finish_reason"] == "stop"
        assert prompt_ids[0] == 1 and line["prompt"] == f"{line['idx']} plus {line['idx']} is"
        assert len(ids) == line["num_tokens"] and not set(ids) & set(eos_ids)
        assert stopped or line["num_tokens"] == 12
        assert tokenizer.decode_continuation(prompt_ids, ids) == line["output"]
        with torch.no_grad():
            logits = hf_model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 :]
        logprobs = (logits / 0.8).log_softmax(-1)
        total = logprobs[:-1].gather(1, torch.tensor(ids, dtype=torch.int64)[:, None]).sum()
        possible = total + logprobs[-1, eos_ids] if stopped else total[None]
        assert (possible - line["logprob"]).abs().min() < 1e-3


def rounded(lines: list[dict]) -> list[dict]:
    """Rounds log-probs: their last bits depend on the number of rows in a batch."""
    return [line | {"logprob": round(line["logprob"], 3)} for line in lines]


def test_fields_of_a_record_are_carried(folder, tmp_path):
    """Catches a record's field, such as a reference answer, that gets lost, overwrites a result field or is overwritten
    by one (an `output`, in records of `input` and `output`), after a resume too; and a null taken for a value."""
    rows = [
        {"prompt": "1 plus", "answer": {"value": 3, "text": "drei é"}, "idx": 77, "token_ids": [5], "logprob": None},
        {"prompt": "2 plus", "input": "kept beside a prompt", "completion": " 3"},
        {"input": "3 plus", "level": None, "output": "mine", "reference_output": None},
        {"prompt": None, "input": "4 plus", "output": None, "reference_output": "5"},
    ]
    prompts, out = tiny.write_records(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    result = generate(folder, "--prompt_file", prompts)
    lines = rounded(lines_of(result))
    assert [line["prompt"] for line in lines] == ["1 plus", "2 plus", "3 plus", "4 plus"]
    others = [{name: value for name, value in line.items() if name not in FIELDS} for line in lines]
    assert others == [
        {"answer": rows[0]["answer"], "reference_idx": 77, "reference_token_ids": [5], "reference_logprob": None},
        {"input": "kept beside a prompt", "completion": " 3"},
        {"level": None, "reference_output": "mine"},
        {"reference_output": "5"},
    ]
    assert all(type(line[name]) is kind for line in lines for name, kind in FIELDS.items())
    assert lines[0]["idx"] == 0 and lines[2]["output"] != "mine"
    assert "own idx, output, logprob, token_ids kept as reference_idx, " in result.stderr

    assert generate(folder, "--prompt_file", prompts, "--output_file", out).code == 0
    assert sorted(rounded(tiny.read_lines(out)), key=lambda line: line["idx"]) == lines
    out.write_bytes(out.read_bytes().splitlines(keepends=True)[0])
    assert generate(folder, "--prompt_file", prompts, "--output_file", out, "--resume").code == 0
    assert sorted(rounded(tiny.read_lines(out)), key=lambda line: line["idx"]) == lines
    tiny.assert_refused(generate(folder, "--prompt_file", out), f"{out}:1: ", "'reference_idx', which the record has")


def test_a_json_list_is_jsonl_is_a_flag(folder, tmp_path):
    """Catches a file format guessed from the file's suffix, and an idx that depends on how prompts are given."""
    rows = records(3)
    (tmp_path / "list.jsonl").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    from_list = lines_of(generate(folder, "--prompt_file", tmp_path / "list.jsonl"))
    tiny.write_records(tmp_path / "lines.json", rows)
    assert lines_of(generate(folder, "--prompt_file", tmp_path / "lines.json")) == from_list
    flags = [part for row in rows for part in ("--prompt", row["prompt"])]
    assert lines_of(generate(folder, *flags)) == from_list
    assert len({line["output"] for line in from_list}) == 3


def test_standard_output_is_clean_jsonl(folder):
    """Catches the run's card or progress bars on standard output, among the samples."""
    result = generate(folder, "--prompt", "1 plus 2", "--num_samples", 5)
    assert keys(lines_of(result)) == [(0, s) for s in range(5)]
    assert "tok/s" in result.stderr and "model" in result.stderr and "are equal" not in result.stderr
    greedy = generate(folder, "--prompt", "1 plus 2", "--num_samples", 2, "--temperature", 0)
    assert len({line["output"] for line in lines_of(greedy)}) == 1 and "are equal at --temperature 0" in greedy.stderr


def test_standard_output_of_another_encoding_that_is_closed(folder, tmp_path):
    """Catches a run that ends at a letter that standard output cannot encode, or escapes it otherwise than JSON does,
    and a traceback when the reader closes the pipe."""
    flags = ["--checkpoint_path", folder, "--prompt", "é 字 😀 1 plus", "--num_samples", 500, "--max_new_tokens", 9]
    os.mkfifo(tmp_path / "pipe")
    process = Forked(SCRIPT, *flags, stdout=tmp_path / "pipe", PYTHONIOENCODING="ascii")
    with open(tmp_path / "pipe", encoding="ascii") as stdout:
        assert json.loads(stdout.readline())["prompt"] == "é 字 😀 1 plus"
    while process.poll() is None:
        time.sleep(0.005)
    stderr = process.read("stderr")
    assert process.returncode == 0 and "Traceback" not in stderr and "error" not in stderr, stderr


def test_half_a_surrogate_pair_survives(folder, tmp_path):
    """Catches a run that ends half-way at half a surrogate pair, which json can read but UTF-8 cannot hold."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "1 plus", "tag": "x\\ud83d\\u00e9"}\n')
    out = tmp_path / "out.jsonl"
    assert generate(folder, "--prompt_file", prompts, "--output_file", out).code == 0
    assert tiny.read_lines(out)[0]["tag"] == "x\ud83dé"
    assert lines_of(generate(folder, "--prompt_file", prompts))[0]["tag"] == "x\ud83dé"


def test_chat_prompts_go_through_the_template(chat_folder, tmp_path):
    """Catches a chat template that is not applied or applied twice, a missing assistant header, and a doubled BOS."""
    text = "1 plus 2"
    messages = [{"role": "user", "content": text}]
    spelled = f"[user] {text}\n[assistant] "
    prompts = tiny.write_records(tmp_path / "p.jsonl", [{"prompt": messages}])
    as_messages = lines_of(generate(chat_folder, "--prompt_file", prompts))
    as_chat = lines_of(generate(chat_folder, "--prompt", text, "--chat"))
    as_text = lines_of(generate(chat_folder, "--prompt", "<s>" + spelled))
    plain = lines_of(generate(chat_folder, "--prompt", text))
    assert as_messages[0]["prompt"] == as_chat[0]["prompt"] == messages
    assert as_messages[0]["output"] == as_chat[0]["output"] == as_text[0]["output"] != plain[0]["output"]
    assert as_chat[0]["logprob"] == pytest.approx(as_text[0]["logprob"], abs=1e-4)


def test_a_system_message(chat_folder, tmp_path):
    """Catches a --system message that is left out, put after the prompt, or added to a prompt that has its own."""
    system, user = {"role": "system", "content": "The answer is"}, {"role": "user", "content": "1 plus 2"}
    spelled = lines_of(
        generate(chat_folder, "--prompt_file", tiny.write_records(tmp_path / "s.jsonl", [{"prompt": [system, user]}]))
    )
    flags = ("--chat", "--system", "The answer is")
    for prompt in ("1 plus 2", [user]):
        prompts = tiny.write_records(tmp_path / "p.jsonl", [{"prompt": prompt}])
        (line,) = lines_of(generate(chat_folder, "--prompt_file", prompts, *flags))
        assert line == spelled[0]
    tiny.assert_refused(generate(chat_folder, "--prompt_file", tmp_path / "s.jsonl", *flags), "s.jsonl:1", "system")


def test_stops_that_are_no_plain_text(folder):
    r"""Catches a \n in --stop that stays two characters, and a special token in --stop that never ends a sample."""
    flags = ("--prompt", "1 plus 2", "--num_samples", 60, "--temperature", 5, "--return_token_ids")
    free = lines_of(generate(folder, *flags, new=30))
    newline = lines_of(generate(folder, *flags, "--stop", "\\n", new=30))
    assert [line["output"] for line in newline] == [line["output"].split("\n")[0] for line in free]
    special = lines_of(generate(folder, *flags, "--stop", "<s>", new=30))
    for before, after in zip(free, special):
        ids = before["token_ids"]
        assert after["token_ids"] == (ids[: ids.index(1)] if 1 in ids else ids)
        assert after["finish_reason"] == ("stop" if 1 in ids else before["finish_reason"])
    assert newline != free and special != free
    tiny.assert_refused(generate(folder, *flags, "--stop", "<s>\\n"), "--stop '<s>\\n'", "special token <s>")


def test_stop_strings_end_samples(folder):
    """Catches a --stop that is ignored, or a stop string that stays in the output."""
    free = lines_of(generate(folder, "--prompt", "1 plus 2", "--num_samples", 8, new=30))
    letter = next(c for c in "aeinorst" if any(c in line["output"] for line in free))
    stopped = lines_of(
        generate(folder, "--prompt", "1 plus 2", "--num_samples", 8, "--stop", letter, "--stop", "zzz", new=30)
    )
    for before, after in zip(free, stopped):
        assert after["output"] == before["output"].split(letter)[0]
        assert after["finish_reason"] == ("stop" if letter in before["output"] else before["finish_reason"])


def test_one_rank_asks_no_other(folder, monkeypatch):
    """Catches a collective on a single rank, which on a GPU would start NCCL: a second, and memory."""
    monkeypatch.setattr(torch.distributed, "all_reduce", mock.Mock(side_effect=AssertionError))
    result = tiny.run(SCRIPT, "--checkpoint_path", folder, "--prompt", "a b", "--max_new_tokens", 2)
    assert result.code == 0 and "tok/s" in result.stderr, result.stderr


def test_compute_dtype_is_a_flag(folder):
    """Catches --dtype bfloat16 that runs in fp32, or not at all."""
    flags = ("--prompt", "1 plus 2", "--temperature", 0)
    bf16 = generate(folder, *flags, "--dtype", "bfloat16")
    assert "bfloat16" in bf16.stderr
    fp32 = lines_of(generate(folder, *flags))
    assert lines_of(bf16)[0]["logprob"] != fp32[0]["logprob"]


# ----------------------------------------------------------------------------------------- long prompts


def test_overlong_prompts(folder, hf_model, tmp_path):
    """Catches prompts that are cut silently or lose their BOS or their end, and idx values that shift where a prompt is
    skipped."""
    long = "The answer to question 3 is 17, or so it seems. " * 4
    prompts = tiny.write_records(tmp_path / "p.jsonl", [{"prompt": p} for p in ("1 plus", long, "2 plus")])
    flags = ("--prompt_file", prompts, "--max_seq_len", 24, "--temperature", 0, "--return_token_ids")
    out = tmp_path / "out.jsonl"
    tiny.assert_refused(generate(folder, *flags, "--output_file", out), f"{prompts}:2", "24", "--overlong")
    assert not out.exists()

    skipped = generate(folder, *flags, "--overlong", "skip")
    assert keys(lines_of(skipped)) == [(0, 0), (2, 0)]
    assert "1 prompts skipped" in skipped.stderr

    truncated = generate(folder, *flags, "--overlong", "truncate")
    lines = lines_of(truncated)
    assert keys(lines) == [(0, 0), (1, 0), (2, 0)] and "1 prompts truncated" in truncated.stderr
    ids = Tokenizer(folder).encode(long)
    ids = [1, *ids[-(24 - 8 - 1) :]]
    with torch.no_grad():
        out = hf_model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert lines[1]["token_ids"] == [token for token in out[0, len(ids) :].tolist() if token != 2]


def test_truncation_leaves_the_prompt_half_of_the_room(folder):
    """Catches a prompt cut down to nothing because --max_new_tokens asks for all of the room."""
    flags = ("--prompt", "1 plus 2 is 3. " * 20, "--max_seq_len", 24, "--overlong", "truncate", "--num_samples", 4)
    assert max(line["num_tokens"] for line in lines_of(generate(folder, *flags, new=500))) == 12


def test_a_prompt_may_leave_room_for_less(folder):
    """Catches a completion that runs over --max_seq_len, or a prompt that is refused though a token fits."""
    num = len(Tokenizer(folder).encode("1 plus 2"))
    result = generate(folder, "--prompt", "1 plus 2", "--max_seq_len", num + 3, "--num_samples", 6, new=50)
    assert max(line["num_tokens"] for line in lines_of(result)) == 3
    assert "1 prompts with room for fewer than 50" in result.stderr
    tiny.assert_refused(generate(folder, "--prompt", "1 plus 2", "--max_seq_len", num), "no room")
