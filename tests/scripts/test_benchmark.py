"""scripts/benchmark.py: a training run's memory by arithmetic, the split of a PPO update, the work of generation."""

import json
import math
import re
import subprocess
from importlib.util import find_spec
from unittest import mock

import pytest
import torch

from models.common import Runtime
from models.config import ModelConfig
from models.cpu_linear import has_bf16_products, has_fbgemm
from models.decode import can_pack
from models.fsdp import ParallelArgs
from models.generation import Engine, Request
from models.qlinear import Scheme
from models.sampling import SamplingParams
from scripts import benchmark_common, benchmark_generate, benchmark_grpo
from scripts.benchmark_common import SIZES
from scripts.benchmark_memory import measure_memory, quantized_memory, training_memory
from scripts.benchmark_sft import SftArgs
from scripts.workload import ragged_sizes
from tests import tiny

ON_CPU = Runtime(torch.device("cpu"), torch.bfloat16, False)
SMALL = ModelConfig(1000, 256, 688, 4, 8, 4, 32, 4096)  # GQA
NARROW = ModelConfig(500, 128, 344, 4, 4, 2, 32, 4096)
WIDE = ModelConfig(1000, 128, 344, 4, 8, 8, 64, 4096, model_type="qwen3")  # the heads' norms weigh most of all


@pytest.mark.parametrize("config, recompute", [(NARROW, "none"), (NARROW, "full"), (WIDE, "none")])
def test_arithmetic_against_a_measured_step(config, recompute):
    """Catches a memory table that omits something allocated, or counts something that never is: an activation kept
    twice, unsharded gradients, logits of all tokens."""
    measured = measure_memory(config, ON_CPU, ParallelArgs(activation_checkpointing=recompute), (2, 128))
    sizes = training_memory(config, dp=1, tp=1, tokens=256, recompute=recompute, on_cpu=True)
    assert sum(sizes.values()) == pytest.approx(measured, rel=0.1), sizes


def test_state_by_hand():
    """Catches a layout whose ranks do not shard their state: 16 bytes for each parameter, divided by dp x tp."""
    config = SIZES["7b"]
    state = ("parameters", "gradients", "AdamW moments")
    for dp, tp in ((1, 1), (8, 1), (4, 2)):
        sizes = training_memory(config, dp=dp, tp=tp, tokens=4096)
        wanted = 16 * config.num_parameters() / (dp * tp)
        assert sum(sizes[name] for name in state) == pytest.approx(wanted, rel=1e-3)  # norms are replicated over tp
    one, two = (training_memory(config, dp=1, tp=tp, tokens=4096)["activations"] for tp in (1, 2))
    assert one / 2 < two < one  # the norms' activations are replicated
    assert training_memory(config, dp=8, tp=1, tokens=8192)["activations"] == 2 * one


def test_memory_on_paper():
    """Catches a table without its layouts or its last line of JSON, and a layout that the model cannot have."""
    result = tiny.run("scripts/benchmark.py", "memory", "--preset", "7b", "--layouts", "1x1", "4x2")
    assert result.code == 0 and "dp 4 x tp 2" in result.stdout, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])["bytes"]
    assert len(found) == 2 and all(math.isclose(sum(b.values()), 2 * b["sum"]) for b in found)
    refused = tiny.run("scripts/benchmark.py", "memory", "--preset", "7b", "--layouts", "1x3")
    tiny.assert_refused(refused, "--tensor_parallel_size 3", "num_attention_heads")
    tiny.assert_refused(tiny.run("scripts/benchmark.py", "memory", "--layouts", "eight"), "--layouts")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    refused = tiny.run("scripts/benchmark.py", "memory", "--device", device, "--layouts", "1x2", "--measure")
    tiny.assert_refused(refused, "--measure", "1 rank")


def generate(*flags):
    sizes = ["--preset", "23m", "--device", "cpu", "--prompt_len", 8, "--new_tokens", 4, "--repeats", 1]
    result = tiny.run("scripts/benchmark.py", "generate", *sizes, *flags)
    assert result.code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_sweep_of_generate():
    """Catches a sweep that measures one batch size only, a rate per row that is not the rate divided by the rows, and
    bytes read that are not those of the weights' precision."""
    found = generate("--sweep", 1, 3)
    assert [batch["batch_size"] for batch in found["batches"]] == [1, 3]
    for batch in found["batches"]:
        assert batch["tokens_per_second"] == pytest.approx(batch["batch_size"] * batch["tokens_per_second_per_row"])
        assert batch["first_token_ms"] > 0 and batch["products_ms"] > 0
    read = {"float32": found["batches"][0]}
    read["int4"] = generate("--batch_size", 1, "--quantize", "int4", "--group_size", 32, "--dtype", "bfloat16")
    sizes = {name: b["bytes_per_second"] * b["ms_per_step"] / 1e3 for name, b in read.items()}
    head, blocks = 4000 * 512, 6 * (4 * 512 * 512 + 3 * 512 * 1376)
    assert sizes["float32"] == pytest.approx(4 * (head + blocks), rel=0.05)  # and the cache's
    of_head = 1 if can_pack(ON_CPU) and has_fbgemm() else 2  # bytes: int8 where there are kernels for it
    of_int4 = 0.5 if has_bf16_products() or not has_fbgemm() else 1  # FBGEMM's bags hold bytes
    wanted = of_head * head + (of_int4 + 4 / 32) * blocks
    assert wanted * 0.95 <= sizes["int4"] <= wanted * (1.05 if has_bf16_products() else 1.15)  # bags: see below


def test_precisions_in_turns():
    """Catches a precision measured with another's weights, an inverted ratio, and --precisions accepted beside
    --quantize or --compare."""
    found = generate("--precisions", "none", "int8", "--batch_size", 2, "--dtype", "bfloat16")
    plain, int8 = found["batches"]
    assert (plain["quantize"], int8["quantize"]) == ("none", "int8") and plain["speed_ratios"] == [1]
    assert int8["speed_ratios"] == [pytest.approx(int8["tokens_per_second"] / plain["tokens_per_second"])]
    read = [batch["bytes_per_second"] * batch["ms_per_step"] for batch in (plain, int8)]
    assert read[1] < 0.8 * read[0]
    for more in (["--quantize", "int8"], ["--compare", 1]):
        refused = tiny.run("scripts/benchmark.py", "generate", "--precisions", "none", "int8", *more)
        tiny.assert_refused(refused, "--precisions")


def test_ragged_work_of_generate():
    """Catches a rate that counts tokens nobody asked for (a static batch runs to its longest row), other work for the
    peer, and a cache bandwidth that counts tokens no row attends to."""
    sizes = ragged_sizes(5, 8, 4)
    assert len(sizes) == 5 and len(set(sizes)) > 3 and all(2 <= p <= 14 and 1 <= n <= 7 for p, n in sizes)
    assert generate("--ragged", 5, "--batch_size", 2)["tokens_per_second"] > 0
    seconds, tokens = [], sum(n for _, n in sizes)
    with mock.patch("scripts.peer_transformers.seconds_of", lambda run, *_: seconds.append(run()) or 2.0):
        found = generate("--ragged", 5, "--batch_size", 2, "--engine", "transformers")
        assert found["tokens_per_second"] == tokens / 2 and "dynamic cache, eager, float32" in found["ran"]
        found = generate("--ragged", 5, "--batch_size", 2, "--engine", "generate_batch")
        assert found["tokens_per_second"] == tokens / 2 and "continuous batching" in found["ran"]
    assert len(seconds) == 2
    model = benchmark_generate.random_inference_model(SMALL, ON_CPU._replace(dtype=torch.float32))
    engine = Engine(model, SamplingParams(), num_slots=2, max_seq_len=32)
    list(engine.generate([Request(i, 0, [1] * p, n) for i, (p, n) in enumerate(sizes)]))
    needed = sum(p + i for p, n in sizes for i in range(1, n))
    assert engine.cache_bytes_read == needed * SMALL.num_hidden_layers * 2 * 4 * 32 * 4  # 4 heads of 32, fp32


def test_every_run_computes_its_prompts():
    """Catches repeats that reuse the prompts' KV cache from the run before."""
    model = benchmark_generate.random_inference_model(SMALL, ON_CPU._replace(dtype=torch.float32))
    engine = Engine(model, SamplingParams(), num_slots=1, max_seq_len=160)
    for _ in range(2):
        benchmark_generate.run_once(engine, [Request(0, 0, [1] * 150, 2)])
        assert engine.num_prompt_tokens == 150


def test_jobs_and_peers():
    """Catches a flag that a job accepts and ignores; an unknown job; a peer that is reported as compiled because
    --compile was given; and a peer that is not installed or cannot do what its flags ask."""
    for words, parts in (
        (["sft", "--new_tokens", 3], ["--new_tokens"]),
        (["memory", "--compare", 1], ["--compare"]),
        (["train"], ["train", "generate"]),
        (["--preset", "23m", "sft"], ["job", "sft"]),
        (["generate", "--engine", "trl"], ["--engine", "vllm"]),
        (["generate", "--preset", "tiny", "--engine", "transformers", "--quantize", "int8"], ["--quantize"]),
        (
            ["generate", "--preset", "tiny", "--engine", "transformers", "--precisions", "none", "int8"],
            ["--precisions"],
        ),
        (["generate", "--preset", "tiny", "--engine", "transformers", "--sweep", 1, 2], ["--sweep"]),
        (["generate", "--preset", "tiny", "--quantize", "int8", "--group_size", 32], ["--group_size 32", "int4"]),
        (["memory", "--quantize", "int8", "--layouts", "2x1"], ["--layouts", "--quantize"]),
        (["memory", "--quantize", "int4", "--lora_r", 8], ["--lora_r 8", "--quantize"]),
        (["memory", "--slots", 3], ["--slots 3", "--lora_r"]),
        (["memory", "--group_size", 32], ["--group_size 32", "int4"]),
        (["memory", "--lora_r", 8, "--activation_checkpointing", "selective"], ["for none and full only"]),
        (["dpo", "--engine", "trl", "--activation_checkpointing", "selective"], ["knows none and full"]),
        (["ppo", "--preset", "tiny", "--profile", 3], ["--profile"]),
        (["sft", "--documents", 3, "--engine", "transformers"], ["--documents"]),
        (["sft", "--compare", 1, "--peer_python", "nowhere/python"], ["--peer_python nowhere/python: there is no"]),
    ):
        tiny.assert_refused(tiny.run("scripts/benchmark.py", *words), *parts)
    for job, package in (("generate", "vllm"), ("dpo", "trl")):
        if find_spec(package) is None:
            refused = tiny.run("scripts/benchmark.py", job, "--preset", "tiny", "--engine", package, "--device", "cpu")
            tiny.assert_refused(refused, package, "pip install")
    with mock.patch("scripts.peer_transformers.seconds_of", lambda run, *_: 2.0):  # nothing is run, so nothing compiled
        assert "eager" in generate("--engine", "transformers", "--compile", "--batch_size", 1)["ran"]
    rows = SftArgs(job="sft", seq_len=64, documents=6).lengths()
    assert sum(rows) == 64 and len(rows) == 6 and min(rows) >= 4


@pytest.mark.parametrize("words, peak", [(["--compare", 2], 2e9), (["--compare=2"], 0)])
def test_a_comparison_runs_the_rest_of_its_command(words, peak):
    """Catches a comparison whose runs compare again, a spelling of --compare that ends in an error, an inverted ratio,
    and a peer that ends the comparison since it reports no peak memory."""
    commands = []

    def run(command, **_):
        commands.append(list(map(str, command)))
        speed = 6.0 if command[-1] == "ours" else 4.0
        line = json.dumps({"tokens_per_second": speed, "peak_memory": peak, "ran": command[-1]})
        return subprocess.CompletedProcess(command, 0, stdout=line)

    with mock.patch("subprocess.run", run):
        result = tiny.run("scripts/benchmark.py", "sft", "--preset", "tiny", *words, "--peer", "trl")
    memory = "; memory 1.00" if peak else ""
    assert result.code == 0 and f"ours / trl: speed 1.50, 1.50{memory}\n" in result.stdout, result
    rest = ["sft", "--preset", "tiny", "--peer", "trl", "--engine"]
    assert [command[2:] for command in commands] == [[*rest, "trl"], [*rest, "ours"]] * 2


def test_several_ranks(monkeypatch):
    """Catches one rank's rate that passes for that of all ranks, and a PPO benchmark that runs on several ranks."""
    sizes = ["--device", "cpu", "--preset", "tiny", "--batch_size", 2, "--repeats", 1]
    with mock.patch("scripts.benchmark_training.dist", mock.Mock(get_world_size=lambda: 2)):
        result = tiny.run("scripts/benchmark.py", "sft", *sizes, "--seq_len", 16)
    assert "tok/s (median of 1; of each of 2 ranks)" in result.stdout, result
    monkeypatch.setenv("WORLD_SIZE", "2")
    tiny.assert_refused(tiny.run("scripts/benchmark.py", "ppo", *sizes), "one rank")


def test_longest_operations():
    """Catches wrong counts of operations, shares that do not add up to the whole, and a --profile that is not shown."""
    a, device = torch.randn(200, 200), torch.device("cpu")
    result, text = benchmark_common.profiled(lambda: sum((a @ a).sum() for _ in range(7)), device, 99)
    counts = dict(re.findall(r"(aten::\w+) [\d.,]+ us x (\d+)", text))
    assert result.isfinite() and counts["aten::mm"] == counts["aten::sum"] == "7"
    assert sum(map(float, re.findall(r"\(([\d.]+)%\)", text))) == pytest.approx(100, abs=2)  # rounded
    sizes = ["--device", "cpu", "--preset", "tiny", "--batch_size", 2, "--repeats", 1, "--profile", 5]
    result = tiny.run("scripts/benchmark.py", "sft", *sizes, "--seq_len", 16)
    assert result.code == 0 and json.loads(result.stdout.splitlines()[-1])["operations"].count(" us x ") == 5
    tiny.assert_refused(tiny.run("scripts/benchmark.py", "sft", *sizes, "--compare", 1), "--profile")


def test_update_of_ppo():
    """Catches a split whose parts are not the whole update, a rollout rate over other tokens than the engine's, FLOPs
    of logits that nobody computes (a critic's, a prompt's), and a folder of random weights that the script refuses."""
    sizes = ["--preset", "tiny", "--batch_size", 2, "--prompt_len", 8, "--new_tokens", 4, "--repeats", 1]
    result = tiny.run("scripts/benchmark.py", "ppo", "--device", "cpu", *sizes)
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found["seconds"]) == {"rollout", "score", "logprobs", "update", "refresh"}
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert sum(found["shares"].values()) == pytest.approx(1)
    whole = sum(found["seconds"].values())
    assert found["rollout_tokens_per_second"] * found["seconds"]["rollout"] == pytest.approx(8)  # no random EOS
    assert found["tokens_per_second"] * whole == pytest.approx(8)
    flops = sum(SIZES["tiny"].training_flops_per_token(12, logits=share) for share in (4 / 12, 0))
    assert found["flops_per_second"] * found["seconds"]["update"] == pytest.approx(2 * 12 * flops)
    assert found["rollout_ratio"] * found["engine_tokens_per_second"] == pytest.approx(
        found["rollout_tokens_per_second"]
    )


def test_update_of_grpo():
    """Catches a padding share that is not that of the padded forward passes, an inverted ratio, and packed
    micro-batches that are not measured."""
    sizes = ["--preset", "tiny", "--batch_size", 5, "--prompt_len", 4, "--seq_len", 24, "--repeats", 1]
    taken, real = [], benchmark_grpo.answer_logps

    def answer_logps(model, rows, width, split, temperature):
        taken.append((split.max_tokens, [len(row.input_ids) for row in rows]))
        return real(model, rows, width, split, temperature)

    with mock.patch.object(benchmark_grpo, "answer_logps", answer_logps):
        result = tiny.run("scripts/benchmark.py", "grpo", "--device", "cpu", "--micro_batch_size", 2, *sizes)
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["ratios"] == [pytest.approx(found["tokens_per_second"] / found["padded_tokens_per_second"])]
    padded, packed = ([lengths for budget, lengths in taken if budget == size] for size in (None, 2 * 28))
    assert len(padded) == 2 * 3 and all(len(lengths) <= 2 for lengths in padded) and max(map(sum, packed)) <= 2 * 28
    assert all(20 <= length <= 28 for lengths in (*padded, *packed) for length in lengths)
    assert sum(map(sum, padded)) == sum(map(sum, packed))
    slots = sum(len(lengths) * max(lengths) for lengths in padded)
    assert found["padding_share"] == pytest.approx(1 - sum(map(sum, padded)) / slots)


def test_memory_of_ppo_on_paper():
    """Catches a model that is omitted, or counted with a wrong number of bytes: a 7B policy with a 7B reward model fits
    one GPU of 141 GB."""
    lean = ["--param_dtype", "bfloat16", "--optim", "adamw_8bit", "--activation_checkpointing", "full"]
    sizes = ["--batch_size", 64, "--slots", 32, "--micro_batch_size", 4, "--prompt_len", 256, "--new_tokens", 256]
    layouts = ["--layouts", "1x1", "4x2"]
    result = tiny.run("scripts/benchmark.py", "ppo", "--plan", "--preset", "7b", *layouts, *sizes, *lean)
    assert result.code == 0, result.stderr
    plan, cut = json.loads(result.stdout.splitlines()[-1])["memory_plans"]
    assert cut["policy, weights and moments"] == plan["policy, weights and moments"] / 8
    assert cut["inference copy"] == plan["inference copy"] / 2  # whole on each dp rank
    billions = SIZES["7b"].num_parameters()
    models = sum(size for name, size in plan.items() if name not in ("KV cache", "gathered", "activations"))
    assert models == (4 + 4 + 2 + 2 + 2 + 2) * billions  # policy, critic, gradients of one, three frozen ones
    assert plan["KV cache"] == 32 * 512 * 2 * 2 * 32 * 4096
    assert sum(plan.values()) < 130e9
    tiny.assert_refused(tiny.run("scripts/benchmark.py", "ppo", "--layouts", "4x2"), "--plan")
    refused = tiny.run("scripts/benchmark.py", "memory", "--activation_checkpointing", "selective")
    tiny.assert_refused(refused, "for none and full only")


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 32), Scheme("int4", 128)], ids=str)
def test_quantised_arithmetic(scheme):
    """Catches original weights kept beside their integers, unpacked integers, and scales or a head not counted."""
    config = ModelConfig(1000, 256, 768, 4, 8, 4, 32, 4096)
    model = benchmark_generate.random_model(config, ON_CPU, scheme)
    tensors = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
    on_paper = sum(quantized_memory(config, scheme, torch.bfloat16).values())
    # in FBGEMM's bags int4 takes a byte, a scale and an offset follow up to 96 integers, and blocks are padded
    most = 1.01 if has_bf16_products() or not has_fbgemm() else 1.25 * 8 / scheme.bits
    assert on_paper / 1.01 <= sum(tensors.values()) <= on_paper * most


def test_quantised_memory_of_7b():
    """Catches a wrong sum for a quantised Llama-2-7b: 6.48e9 weights in blocks, 0.26e9 outside."""
    for flags, wanted in ((("int8",), 7.0e9), (("int4",), 3.97e9), (("int4", "--group_size", 32), 4.57e9)):
        result = tiny.run("scripts/benchmark.py", "memory", "--preset", "7b", "--quantize", *flags)
        assert result.code == 0, result.stderr
        found = json.loads(result.stdout.splitlines()[-1])["bytes"]
        assert found["sum"] == pytest.approx(wanted, rel=0.005)
