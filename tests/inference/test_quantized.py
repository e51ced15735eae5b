"""Generation, chat and scoring with quantised weights: the same guarantees as with unquantised ones."""

import json

import pytest
import torch
import transformers

from models import decode_cpu
from models.cpu_linear import has_fbgemm
from models.qlinear import Scheme, dequantize, quantize
from tests import tiny
from tests.forked import Forked
from tests.inference.test_parallel import by_sample
from tests.inference.test_score import scored, write_reward_model
from tests.ranks import launch

FLAGS = {"int8": ["--quantize", "int8"], "int4": ["--quantize", "int4", "--group_size", "32"]}
SCHEMES = {"int8": Scheme("int8"), "int4": Scheme("int4", 32)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A GQA model with biases whose shards on two ranks divide into groups of 32, too, and 13 ragged prompts."""
    root = tmp_path_factory.mktemp("quantized")
    tiny.write_model(root / "model", attention_bias=True, mlp_bias=True, intermediate_size=128)
    records = [{"prompt": f"{i} plus" + " so" * (i % 7)} for i in range(13)]
    return root, tiny.write_records(root / "prompts.jsonl", records)


def flags_for(world, mode, out, *more):
    root, prompts = world
    flags = ["--checkpoint_path", root / "model", "--prompt_file", prompts, "--num_samples", 2, "--output_file", out]
    return [*flags, "--max_new_tokens", 20, "--return_token_ids", *FLAGS[mode], *more]


@pytest.fixture(scope="module")
def wanted(world):
    """The lines that one process writes in the default number of slots."""
    found = {}
    for mode in FLAGS:
        out = world[0] / f"wanted-{mode}.jsonl"
        result = tiny.run("inference/generate.py", *flags_for(world, mode, out))
        assert result.code == 0 and mode in result.stdout, result
        found[mode] = by_sample(out)
    assert found["int8"] != found["int4"]
    return found


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys() and len(found) == 26
    for key, line in found.items():
        assert line["logprob"] == pytest.approx(wanted[key]["logprob"], abs=1e-3)
        assert {**line, "logprob": 0} == {**wanted[key], "logprob": 0}, key


def dequantised(model, scheme):
    """Returns transformers' model with its blocks' weights replaced by their dequantised values."""
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data = dequantize(quantize(parameter.data, scheme))
    return model.eval()


@pytest.mark.parametrize("mode", FLAGS)
def test_greedy_equals_transformers(world, tmp_path, mode):
    """Catches a prefill or a decode step with other weights than the quantised ones, and a flag that is ignored: the
    ids are those of transformers' generate with the dequantised weights."""
    root, _ = world
    model = dequantised(transformers.AutoModelForCausalLM.from_pretrained(root / "model"), SCHEMES[mode])
    out = tmp_path / "out.jsonl"
    flags = flags_for(world, mode, out, "--temperature", 0, "--num_samples", 1)
    assert tiny.run("inference/generate.py", *flags).code == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "model")
    for line in tiny.read_lines(out):
        ids = tokenizer(line["prompt"], return_tensors="pt").input_ids
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        assert line["token_ids"] == [token for token in theirs if token != 2]


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("mode", FLAGS)
def test_slots_and_resume(world, wanted, tmp_path, mode, slots):
    """Catches samples that depend on the number of slots, and a resume that draws other samples or accepts another
    quantisation."""
    out = tmp_path / "out.jsonl"
    flags = flags_for(world, mode, out, "--batch_size", slots)
    assert tiny.run("inference/generate.py", *flags).code == 0
    assert_same(by_sample(out), wanted[mode])
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[3:11]) + lines[11][:20])
    plain = [flag for flag in flags if flag not in FLAGS[mode]]
    for other in (plain, [*plain, *FLAGS["int8" if mode == "int4" else "int4"]]):
        tiny.assert_refused(tiny.run("inference/generate.py", *other, "--resume"), str(out), "quantize")
    result = tiny.run("inference/generate.py", *flags, "--resume")
    assert result.code == 0, result
    assert_same(by_sample(out), wanted[mode])


@pytest.mark.skipif(not has_fbgemm(), reason="no int8 head on this CPU")
def test_resume_where_the_head_is_not_int8(world, tmp_path, monkeypatch):
    """Catches a file whose first samples are drawn with an int8 head, and the others, on another machine, without."""
    out = tmp_path / "out.jsonl"
    flags = flags_for(world, "int8", out, "--dtype", "bfloat16")
    assert tiny.run("inference/generate.py", *flags).code == 0
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:3]))
    with monkeypatch.context() as patch:
        patch.setattr(decode_cpu, "has_fbgemm", lambda: False)
        tiny.assert_refused(tiny.run("inference/generate.py", *flags, "--resume"), str(out), "quantize")
    assert tiny.run("inference/generate.py", *flags, "--resume").code == 0 and len(tiny.read_lines(out)) == 26


def test_two_ranks(world, wanted, tmp_path):
    """Catches scales that are not sharded with their weights, a row-parallel layer whose ranks compute scales from
    their own shards, and a bias that each rank adds: tp 2 draws what one process draws."""
    jobs = {mode: flags_for(world, mode, tmp_path / f"{mode}.jsonl", "--tensor_parallel_size", 2) for mode in FLAGS}
    for mode, flags in FLAGS.items():  # the same from stored quantised weights
        folder = tmp_path / f"model-{mode}"
        written = ["--checkpoint_path", world[0] / "model", "--output_dir", folder, "--mode", *flags[1:]]
        assert tiny.run("scripts/quantize.py", *written).code == 0
        stored = [flag for flag in jobs[mode] if flag not in FLAGS[mode]]
        stored[stored.index("--checkpoint_path") + 1] = folder
        stored[stored.index("--output_file") + 1] = tmp_path / f"stored-{mode}.jsonl"
        jobs[f"stored-{mode}"] = stored
    launch(2, [["inference.generate", *job] for job in jobs.values()])
    for name in jobs:
        assert_same(by_sample(tmp_path / f"{name}.jsonl"), wanted[name.removeprefix("stored-")])


@pytest.mark.parametrize("mode", FLAGS)
def test_scores(tmp_path, mode):
    """Catches a scalar head that is quantised or lost: scores are those of transformers with dequantised blocks."""
    model = dequantised(write_reward_model(tmp_path / "rm", intermediate_size=128), SCHEMES[mode])
    write_reward_model(tmp_path / "rm", intermediate_size=128)
    records = [{"prompt": f"{i} plus", "completion": " so" * i} for i in range(1, 8)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "rm")
    for line in scored(tmp_path / "rm", tmp_path, records, *FLAGS[mode]):
        ids = [*tokenizer(line["prompt"] + line["completion"]).input_ids, 2]
        with torch.no_grad():
            assert model(torch.tensor([ids])).logits.item() == pytest.approx(line["reward"], abs=1e-4)


def test_chat(world):
    """Catches a chat that ignores --quantize: its greedy answer is generate.py's."""
    flags = ["--checkpoint_path", world[0] / "model", "--temperature", 0, "--max_new_tokens", 12, *FLAGS["int8"]]
    line = json.loads(tiny.run("inference/generate.py", *flags, "--prompt", "3 plus so").stdout)
    done = Forked("inference/chat.py", *flags, stdin="3 plus so\n\n")
    printed, errors = done.communicate()
    assert done.returncode == 0 and line["output"] in printed, errors
