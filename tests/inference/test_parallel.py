"""generate.py under torchrun on gloo: the same samples as one process, one line for each."""

import json
import re

import pytest

from models.tokenizer import Tokenizer
from tests import tiny
from tests.ranks import launch

SAMPLING = {
    "top-p": ["--top_p", 0.95],
    "greedy": ["--temperature", 0, "--num_samples", 1],
    "temperature": ["--temperature", 0.8],
    "top-k": ["--top_k", 9],
    "both": ["--top_k", 20, "--top_p", 0.9, "--repetition_penalty", 1.5],
}
LAYOUTS = {"dp 2": (2, 1), "tp 2": (2, 2), "dp 2 x tp 2": (4, 2)}  # name: (ranks, tensor_parallel_size)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A GQA model with biases, normed heads and a vocabulary that 2 does not divide, and 13 ragged prompts."""
    root = tmp_path_factory.mktemp("parallel")
    tiny.write_model(root / "model", **tiny.QWEN3, attention_bias=True, vocab_size=tiny.VOCAB_SIZE + 1)
    records = [{"prompt": f"{i} plus" + " so" * (i % 7), "answer": i} for i in range(13)]
    return root, tiny.write_records(root / "prompts.jsonl", records)


def by_sample(path) -> dict:
    lines = tiny.read_lines(path)
    found = {(line["idx"], line["sample_idx"]): line for line in lines}
    assert len(found) == len(lines)  # one line for each sample
    return found


def flags_for(world, kind: str, out) -> list[object]:
    root, prompts = world
    flags = ["--checkpoint_path", root / "model", "--prompt_file", prompts, "--num_samples", 3, "--batch_size", 8]
    return [*flags, "--max_new_tokens", 12, "--return_token_ids", "--output_file", out, *SAMPLING[kind]]


@pytest.fixture(scope="module")
def wanted(world):
    """The lines that one process writes, for each kind of sampling."""
    found = {}
    for kind in SAMPLING:
        out = world[0] / f"single-{kind}.jsonl"
        assert tiny.run("inference/generate.py", *flags_for(world, kind, out)).code == 0
        found[kind] = by_sample(out)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(world, wanted, layout):
    """Catches prompts that a rank leaves out or repeats; tensor-parallel ranks that draw different tokens; a bias added
    twice; ids, candidates or penalised tokens of one vocabulary shard taken for the whole vocabulary's; a log-prob
    under the softmax of one shard; mixed lines of two ranks; and a resume that misses another rank's lines."""
    root, _ = world
    ranks, tp_size = LAYOUTS[layout]
    jobs, kinds = {}, SAMPLING if layout == "tp 2" else ("top-p", "both")  # kinds concern the vocabulary's shards
    for kind in kinds:
        out = root / f"{ranks}-{tp_size}-{kind}.jsonl"
        jobs[kind] = ["inference.generate", *flags_for(world, kind, out), "--tensor_parallel_size", tp_size]
    if layout == "tp 2":
        # all rows at once: sampling is compiled for every number of rows that take a free slot together
        jobs["both"] = ["traced", *jobs["both"], "--compile", "--batch_size", 39]
    launch(ranks, [*jobs.values(), *([["sampling"]] if ranks == 4 else [])])

    def check(kind):
        found = by_sample(root / f"{ranks}-{tp_size}-{kind}.jsonl")
        assert found.keys() == wanted[kind].keys() and len(found) == (13 if kind == "greedy" else 39)
        for key, line in found.items():
            want = wanted[kind][key]
            assert line["logprob"] == pytest.approx(want["logprob"], abs=1e-3)
            assert {**line, "logprob": 0} == {**want, "logprob": 0}, (kind, key)

    for kind in kinds:
        check(kind)
    if layout == "dp 2 x tp 2":  # as after a kill: lines of both ranks are lost, one is torn
        out = root / f"{ranks}-{tp_size}-top-p.jsonl"
        lines = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join(lines[5:20]) + lines[20][:30])
        launch(ranks, [[*jobs["top-p"], "--resume"]])
        check("top-p")


def test_counts_of_a_large_file(world, tmp_path):
    """Catches a closing card with the skipped and shortened prompts of the main rank alone, with those of a prompt
    whose samples two ranks draw counted twice, and one without speeds where the other rank has drawn everything."""
    lines = [json.dumps({"prompt": "#" * n}).replace(":", ":" + " " * 2**18) for n in [*range(9, 41), 40]]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(lines))
    flags = ["--checkpoint_path", world[0] / "model", "--prompt_file", prompts, "--overlong", "skip"]
    flags += ["--max_seq_len", 36, "--max_new_tokens", 8, "--num_samples", 5, "--output_file", tmp_path / "out.jsonl"]
    printed = launch(2, [["inference.generate", *flags, "--batch_size", 2]])
    _, card = printed.split("done\n")
    lengths = [len(Tokenizer(world[0] / "model").encode("#" * n)) for n in [*range(9, 41), 40]]
    skipped, short = sum(n >= 36 for n in lengths), sum(36 > n > 28 for n in lengths)
    assert skipped > 3 and short > 3 and f"{skipped} prompts skipped as too long; {short} prompts with room" in card
    assert len(by_sample(tmp_path / "out.jsonl")) == 5 * (33 - skipped)
    drawn = by_sample(tmp_path / "out.jsonl")
    assert drawn.pop((0, 0))["num_tokens"] > 1  # there is something to decode
    tiny.write_records(tmp_path / "out.jsonl", drawn.values())
    printed = launch(2, [["inference.generate", *flags, "--resume"]])
    assert re.search(r"decoding +\d.* tok/s", printed) and re.search(r"prefill +\d.* tok/s", printed)


def test_chat_on_two_ranks(world):
    """Catches a rank that waits for input of its own, and an answer that every rank prints."""
    flags = ["--checkpoint_path", world[0] / "model", "--temperature", 0, "--max_new_tokens", 12]
    printed = launch(2, [["inference.chat", *flags, "--tensor_parallel_size", 2]], stdin="3 plus so\n\n")
    line = json.loads(tiny.run("inference/generate.py", *flags, "--prompt", "3 plus so").stdout)
    assert printed.count(line["output"]) == 1 and printed.count("/reset forgets") == 1


def test_nodes_that_do_not_share_the_output(world, tmp_path):
    """Catches nodes that each write a part of the samples to a disk of their own, a check of this that leaves a file
    behind, and a rank that goes on after rank 0 was refused."""
    flags = [*flags_for(world, "greedy", "out/samples.jsonl"), "--max_new_tokens", 2]
    job = ["inference.generate", *flags]
    printed = launch(2, [["refused", "elsewhere", tmp_path, *job]])
    assert (
        len(
            re.findall(
                "^refused: --output_file out/samples.jsonl: rank 1 on .* does not see what rank 0 ", printed, re.M
            )
        )
        == 2
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "node-0").rename(tmp_path / "before")
    (tmp_path / "node-1").rmdir()
    launch(2, [["elsewhere", tmp_path, *job, "--tensor_parallel_size", 2]])  # tensor parallel: rank 0 alone writes
    written = tmp_path / "node-0/out/samples.jsonl"
    assert len(tiny.read_lines(written)) == 13
    printed = launch(2, [["refused", "inference.generate", *flags_for(world, "greedy", written)]])
    assert printed.count(f"refused: --output_file {written}: exists") == 2  # rank 0 checks, and tells all


def test_ranks_that_do_not_fit(world):
    """Catches attention heads split between ranks, and a world size that --tensor_parallel_size does not divide."""
    root, prompts = world
    flags = ["--prompt_file", prompts, "--output_file", root / "none.jsonl", "--tensor_parallel_size", 2]
    result = tiny.run("inference/generate.py", *flags, "--checkpoint_path", root / "model")
    tiny.assert_refused(result, "--tensor_parallel_size 2", "1 ranks")
    tiny.write_model(root / "odd", hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    printed = launch(2, [["refused", "inference.generate", *flags, "--checkpoint_path", root / "odd"]])
    assert len(re.findall("^refused: .*num_attention_heads = 3", printed, re.MULTILINE)) == 2, printed
    assert not (root / "none.jsonl").exists()
