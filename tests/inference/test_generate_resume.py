"""inference/generate.py --resume: after kills, with other flags, prompts or models, and lines of several ranks."""

import contextlib
import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

from inference import generate as script
from inference import lines
from inference.lines import LineWriter
from models import shared
from tests import tiny
from tests.forked import Forked, fork
from tests.inference.test_generate import SCRIPT, generate, records
from tests.models.test_shared import answer_of, end, in_child

# -------------------------------------------------------------------------------------------- resume


def run_flags(prompts, out, *more):
    sampling = ("--temperature", 0.9, "--top_p", 0.95, "--seed", 3)
    return ("--prompt_file", prompts, "--output_file", out, *sampling, *more)


def test_two_kills_then_resume_equals_an_uninterrupted_run(tmp_path):
    """Catches samples that are lost, drawn twice, torn, or different from an uninterrupted run's at another batch
    size."""
    folder = tmp_path / "model"
    tiny.write_model(folder, num_hidden_layers=8)  # slow enough to be killed midway
    prompts = tiny.write_records(tmp_path / "p.jsonl", records(70, level=1))
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    rng = random.Random()  # unseeded: kills at other moments in each run, and none may matter
    seen = 0
    for slots, target in ((3, 15), (4, 40)):
        flags = run_flags(prompts, out, "--max_new_tokens", 30, "--batch_size", slots, "--resume")
        process = Forked(SCRIPT, "--checkpoint_path", folder, *flags)
        wanted, deadline = max(seen + 1, target - rng.randrange(10)), time.monotonic() + 60
        while (not out.exists() or out.read_bytes().count(b"\n") < wanted) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.kill()
        _, stderr = process.communicate()
        assert process.returncode == -9, f"ended before it was killed: {stderr}"
        before, seen = seen, out.read_bytes().count(b"\n")
        assert before < seen < 70, "the kill lands inside the run"
    result = generate(folder, *run_flags(prompts, out, "--resume", "--batch_size", 16), new=30)
    assert result.code == 0 and f"{seen} done before" in result.stdout, result
    assert generate(folder, *run_flags(prompts, whole, "--batch_size", 8), new=30).code == 0

    lines, expected = ({(x["idx"], x["sample_idx"]): x for x in tiny.read_lines(path)} for path in (out, whole))
    assert len(tiny.read_lines(out)) == 70 and lines.keys() == expected.keys() == {(i, 0) for i in range(70)}
    for key, line in expected.items():  # the rounding of log-prob sums depends on the batch
        assert lines[key].pop("logprob") == pytest.approx(line.pop("logprob"), abs=1e-3)
    assert lines == expected


def test_a_torn_last_line_is_drawn_again(folder, tmp_path):
    """Catches a torn line that is kept, joined to the next one, or dropped together with its neighbours."""
    prompts = tiny.write_records(tmp_path / "p.jsonl", records(3))
    out = tmp_path / "out.jsonl"
    flags = run_flags(prompts, out, "--num_samples", 3)
    assert generate(folder, *flags).code == 0
    expected = out.read_bytes().splitlines(keepends=True)
    for kept in (b"".join(expected[:4]) + expected[4][:25], expected[0][:-1]):
        out.write_bytes(kept)
        assert generate(folder, *flags, "--resume", "--batch_size", 1).code == 0
        found = {(x["idx"], x["sample_idx"]): x["output"] for x in tiny.read_lines(out)}
        assert found == {(x["idx"], x["sample_idx"]): x["output"] for x in map(json.loads, expected)}
        assert out.read_bytes().count(b"\n") == len(expected)


def test_prompts_replaced_meanwhile(folder, tmp_path, monkeypatch):
    """Catches the tokens of one file's prompts beside the text and the fields of another's, which has taken its place
    while the weights were read; a traceback where that one is shorter; and a run that cannot be resumed after it."""
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    load = script.load_for_inference

    def load_slowly(other, *args, **options):
        prompts.write_text(other)
        return load(*args, **options)

    for other in ('{"prompt": "x"}\n' * 3, '{"prompt": "x"}\n', "{\n" * 3):
        tiny.write_records(prompts, records(3))
        out.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(script, "load_for_inference", functools.partial(load_slowly, other))
            result = generate(folder, *run_flags(prompts, out))
        assert result.code == 2 and f"error: {prompts}: was replaced while it was being read" in result.stderr
        assert "Traceback" not in result.stderr and not out.read_text()
    tiny.write_records(prompts, records(3))
    assert generate(folder, *run_flags(prompts, out, "--resume")).code == 0 and len(tiny.read_lines(out)) == 3


def test_a_line_is_on_disk_at_once(tmp_path):
    """Catches lines that wait in a buffer, where a kill takes them."""
    out = tmp_path / "out.jsonl"
    with LineWriter(out, {}, active=True, num_lines=0) as writer:
        for count in (1, 2):
            writer.write({"idx": count})
            assert len(tiny.read_lines(out)) == count


def test_ranks_take_turns(tmp_path):
    """Catches mixed lines of several ranks on a file system without locks; a rank that waits forever for one that was
    killed during its turn, or appends to the torn line it left; a part of a line that a full disk leaves before another
    rank's; and a turn that still blocks the next run."""
    out = tmp_path / "out.jsonl"
    writer = LineWriter(out, {}, active=True, num_lines=0)

    def write_all(rank):
        with mock.patch.object(lines, "several_ranks", lambda: True):
            for i in range(50):
                writer.write({"rank": rank, "i": i, "text": "x" * 20_000})

    children = [fork(partial(write_all, rank)) for rank in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert {(line["rank"], line["i"]) for line in tiny.read_lines(out)} == set(itertools.product(range(4), range(50)))
    size = out.stat().st_size
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
        with mock.patch.object(lines, "several_ranks", lambda: True), contextlib.suppress(Exception):
            writer.write({"text": "x" * 20_000})
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and out.stat().st_size == size
    assert not list(tmp_path.glob(".*"))
    writer.turn.touch()
    with (
        pytest.raises(OSError, match=r"out\.jsonl\.turn: another rank has had its turn"),
        lines.in_turn(writer.turn, 0.1),
    ):
        pass
    nothing = os.open(os.devnull, os.O_RDONLY)
    with (
        mock.patch.object(lines.time, "monotonic", side_effect=[0, 0, 90, 90.1]),  # the disk stalls for 90 s
        mock.patch.object(os, "open", side_effect=[FileExistsError, nothing]),
        lines.in_turn(writer.turn),
    ):
        pass
    writer.turn.touch()
    with LineWriter(out, {}, active=True, num_lines=200):
        assert not writer.turn.exists()


def test_resuming_a_complete_run_changes_nothing(folder, tmp_path):
    """Catches samples that are appended again."""
    prompts = tiny.write_records(tmp_path / "p.jsonl", records(3))
    out = tmp_path / "out.jsonl"
    flags = run_flags(prompts, out, "--num_samples", 2)
    assert generate(folder, *flags).code == 0
    before = out.read_bytes()
    result = generate(folder, *flags, "--resume")
    assert result.code == 0 and out.read_bytes() == before, result


def test_resume_without_a_file_starts_from_the_beginning(folder, tmp_path):
    """Catches a job killed before its first line that cannot be restarted with the same command."""
    prompts = tiny.write_records(tmp_path / "p.jsonl", records(3))
    out = tmp_path / "new" / "out.jsonl"
    result = generate(folder, *run_flags(prompts, out, "--resume"))
    assert result.code == 0 and "nothing to resume" in result.stdout
    assert len(tiny.read_lines(out)) == 3


@pytest.mark.parametrize(
    "flags, culprit",
    [
        (("--temperature", 0.5), "temperature"),
        (("--top_p", 0.5), "top_p"),
        (("--top_k", 7), "top_k"),
        (("--seed", 4), "seed"),
        (("--max_new_tokens", 9), "max_new_tokens"),
        (("--max_seq_len", 100), "max_seq_len"),
        (("--num_samples", 2), "num_samples"),
        (("--stop", "x"), "stop"),
        (("--repetition_penalty", 1.2), "repetition_penalty"),
        (("--dtype", "bfloat16"), "dtype"),
        (("--return_token_ids",), "return_token_ids"),
        (("--quantize", "int8"), "quantize"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resume_with_other_flags_is_refused(half_done, tmp_path, flags, culprit):
    """Catches an output file in which a part of the samples was drawn with other settings."""
    folder, prompts, out = half_done
    before = out.read_bytes(), sidecar(out).read_bytes()
    result = generate(folder, *run_flags(prompts, out, "--resume"), *flags)
    tiny.assert_refused(result, str(out), culprit)
    assert (out.read_bytes(), sidecar(out).read_bytes()) == before


def sidecar(out):
    return out.with_name(out.name + ".args.json")


@pytest.fixture(scope="module")
def half_done(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("half")
    prompts, out = tiny.write_records(path / "p.jsonl", records(4)), path / "out.jsonl"
    assert generate(folder, *run_flags(prompts, out)).code == 0
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:2]))
    return folder, prompts, out


def test_resume_with_other_prompts_or_another_model_is_refused(half_done, tmp_path):
    """Catches an output file that mixes lines of different prompts or models, or is refused only after the prompts were
    read; a prompt file or folder with the same content that is refused since it has moved; and an accepted change that
    is refused all the same, or forgotten."""
    folder, prompts, begun = half_done
    out = tmp_path / "out.jsonl"
    for source, target in ((begun, out), (sidecar(begun), sidecar(out))):
        shutil.copy(source, target)
    (other := tmp_path / "other.jsonl").write_text("{")
    way_on = "go on knowingly with --accept_changed"
    refused = generate(folder, *run_flags(other, out, "--resume"))
    tiny.assert_refused(
        refused, f"{out}: --prompt_file: other content than the run was begun with; {way_on} prompt_file"
    )
    copy, moved = shutil.copytree(folder, tmp_path / "copy"), shutil.copy(prompts, tmp_path / "moved.jsonl")
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 2}, copy / "model.safetensors")
    refused = generate(copy, *run_flags(moved, out, "--resume"))
    tiny.assert_refused(refused, f"{out}: --checkpoint_path: other content", f"{way_on} checkpoint_path")
    assert out.read_bytes() == begun.read_bytes()

    accepted = generate(copy, *run_flags(moved, out, "--resume", "--accept_changed", "checkpoint_path"))
    assert accepted.code == 0 and len(tiny.read_lines(out)) == 4, accepted
    tiny.assert_refused(generate(folder, *run_flags(moved, out, "--resume")), "--checkpoint_path: other content")
    assert generate(copy, *run_flags(moved, out, "--resume")).code == 0


def test_resume_with_a_prompt_inserted(half_done, tmp_path):
    """Catches a prompt without a sample, and one with a neighbour's, after an accepted edit of the prompt file; and a
    correction of prompts that have no sample yet refused, or of a flag that alters all prompts."""
    folder, _, begun = half_done
    out, corrected, inserted = (tmp_path / name for name in ("out.jsonl", "corrected.jsonl", "inserted.jsonl"))
    for source, target in ((begun, out), (sidecar(begun), sidecar(out))):
        shutil.copy(source, target)
    done = [line["idx"] for line in tiny.read_lines(out)]
    tiny.write_records(inserted, [{"prompt": "new"}, *records(4)])
    other = [{"prompt": f"{i}: "} if i not in done else record for i, record in enumerate(records(4, level=2))]
    tiny.write_records(corrected, [*other, {"prompt": "last"}])
    accept = ("--resume", "--accept_changed", "prompt_file")
    refused = generate(folder, *run_flags(inserted, out, *accept))
    tiny.assert_refused(refused, "is not of the prompt at its place, ", f"{out}:", f"{inserted}:", "begin another file")
    assert out.read_bytes() == begun.read_bytes()
    assert generate(folder, *run_flags(corrected, out, *accept)).code == 0
    prompts_of = {line["idx"]: line["prompt"] for line in tiny.read_lines(out)}
    assert [prompts_of[i] for i in range(5)] == [*(record["prompt"] for record in other), "last"]
    templated = shutil.copytree(folder, tmp_path / "templated")
    tiny.write_tokenizer(templated, chat_template="{{ messages[0].content }}")
    accept = (*accept, "checkpoint_path", "chat", "--chat")
    both = generate(templated, *run_flags(corrected, out, *accept))
    assert both.code == 0, both.stderr
    tiny.assert_refused(generate(templated, *run_flags(inserted, out, *accept)), "is not of the prompt at its place, ")


def test_resume_of_a_run_that_has_not_ended(half_done, tmp_path, monkeypatch):
    """Catches a second run on an output file that is refused only after it has read prompts and loaded the model."""
    folder, prompts, begun = half_done
    out = tmp_path / "out.jsonl"
    for source, target in ((begun, out), (sidecar(begun), sidecar(out))):
        shutil.copy(source, target)
    child, reads = in_child(lambda: shared.hold(tmp_path / ".out.jsonl.lock", "x"))
    assert answer_of(reads) == "done"
    monkeypatch.setattr(shared, "GRACE", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(script, "PromptSource", None)
        refused = generate(folder, *run_flags(prompts, out, "--resume"))
    tiny.assert_refused(refused, f"--output_file {out}: another run is writing there (process {child} on ")
    end(child)
    assert generate(folder, *run_flags(prompts, out, "--resume")).code == 0 and len(tiny.read_lines(out)) == 4


def test_resume_of_a_strange_file_is_refused(half_done, tmp_path):
    """Catches a foreign file that is taken for samples: without a sidecar, with a broken one, or beside a valid one."""
    folder, prompts, begun = half_done
    out = tmp_path / "out.jsonl"
    out.write_bytes(begun.read_bytes())
    tiny.assert_refused(generate(folder, *run_flags(prompts, out, "--resume")), sidecar(out).name, "missing")
    sidecar(out).write_text("{")
    tiny.assert_refused(generate(folder, *run_flags(prompts, out, "--resume")), sidecar(out).name)
    sidecar(out).write_bytes(sidecar(begun).read_bytes())
    out.write_text('{"idx": 0, "sample_idx": 0}\nhello\n')
    tiny.assert_refused(generate(folder, *run_flags(prompts, out, "--resume")), f"{out}:2")
    assert out.read_text() == '{"idx": 0, "sample_idx": 0}\nhello\n'
