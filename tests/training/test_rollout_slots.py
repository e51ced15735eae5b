"""How many answers a rank draws at once on a GPU: as many as memory holds beside the training."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from models import memory
from models.checkpoint import load_model, open_folder
from models.common import Runtime
from models.fsdp import ParallelArgs
from models.memory import page_bytes
from models.pages import pages_for
from tests import tiny
from tests.training.test_train_ppo import TIMED, flags, world  # noqa: F401 (fixtures)
from training import frozen, rewards, rollouts
from training.train_grpo import GrpoArgs

LONGEST, ANSWERS = 200, 12
ON_GPU = Runtime(torch.device("cuda"), torch.float32, False)  # the policy stays on the CPU: no GPU is needed
ON_CPU = ON_GPU._replace(device=torch.device("cpu"))


def engine_of(folder, pages, monkeypatch, **flags):
    """Returns (slots, pages) of an engine with memory for so many pages."""
    policy = load_model(folder)
    paths = {"checkpoint_path": folder, "prompt_file": Path("p"), "output_dir": Path("o")}
    args = GrpoArgs(**paths, rollout_batch_size=ANSWERS, prefill_tokens=64, **flags)
    config = policy.config
    slots = min(16, args.rollout_slots or 16, ANSWERS)
    beside = 4 * 64 * (8 * config.hidden_size + 4 * config.intermediate_size) + 6 * 4 * slots * config.vocab_size
    of_token = page_bytes(policy) // 64 // config.num_hidden_layers  # a prefill reads 16 x 64 tokens
    beside += 16 * 64 * of_token * (1 + config.num_attention_heads // config.num_key_value_heads)
    free = 2 * (pages * page_bytes(policy) + beside) + 2  # the cache of a CPU's model gets half
    for module in (memory, rollouts):
        monkeypatch.setattr(module, "free_memory", lambda device: free)
    options = {"max_seq_len": LONGEST, "dp_size": 1, "runtime": ON_GPU}
    engine = rollouts.make_engine(policy, open_folder(folder, None), args, **options)
    assert engine.scheduler.prefill_tokens == 64
    return engine.num_slots, engine.pool.num_pages


def test_slots_are_what_memory_holds(folder, monkeypatch):
    """Catches more slots than answers or than pages for them, a cache that takes the memory of gradients and
    activations without releasing it, requested slots that are reduced, memory too small for one answer, advice to
    use flags that train_ppo.py and train_grpo.py lack, and --prefill_tokens that do not reach the engine."""
    need = pages_for(LONGEST)
    assert engine_of(folder, 1000, monkeypatch, sleep=1) == (ANSWERS, ANSWERS * need)
    assert engine_of(folder, 5 * need, monkeypatch, sleep=1) == (5, 5 * need)
    slots, pages = engine_of(folder, 15 * need, monkeypatch)
    assert slots == pages // need < 7  # half of what is free at most
    assert engine_of(folder, 5 * need, monkeypatch, sleep=2, rollout_slots=8) == (8, 5 * need)  # some are preempted
    flags = "lower --max_prompt_len, --max_new_tokens or --prefill_tokens$"
    with pytest.raises(ValueError, match=rf"does not fit into .* that are free, beside .* computation; {flags}"):
        engine_of(folder, need - 1, monkeypatch, sleep=1)
    with pytest.raises(ValueError, match=rf"are left for it beside training, .*; give --sleep 1, or {flags}"):
        engine_of(folder, need - 1, monkeypatch)


def test_slots_on_a_cpu(folder):
    """Catches more or fewer slots than the 128 of --rollout_slots' help, or than a rank's answers, and a number that is
    not taken."""
    paths = {"checkpoint_path": folder, "prompt_file": Path("p"), "output_dir": Path("o")}
    for num_answers, slots, wanted in ((512, None, 128), (24, None, 12), (512, 200, 200), (24, 200, 12)):
        args = GrpoArgs(**paths, rollout_batch_size=num_answers, rollout_slots=slots)
        options = {"max_seq_len": 64, "dp_size": 2, "runtime": ON_CPU}
        engine = rollouts.make_engine(load_model(folder), open_folder(folder), args, **options)
        assert engine.num_slots == wanted and engine.pool.num_pages == wanted * pages_for(64)


def test_memory_of_training(monkeypatch):
    """Catches gradients that are not counted, those of a critic that is larger than the policy, say, or counted twice;
    gradients of frozen weights, or in the CPU's memory, that are counted; and shards where gradients accumulate
    whole."""
    shards, whole = ParallelArgs(), ParallelArgs(sync_every_micro_batch=False, tensor_parallel_size=2)
    with FakeTensorMode():
        model, critic = torch.nn.Module(), torch.nn.Module()
        for name, device, learns in (("a", "cuda", True), ("b", "cuda", False), ("c", "cpu", True)):
            tensor = torch.empty(100, dtype=torch.bfloat16, device=device)
            model.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=learns))
        critic.register_parameter("a", torch.nn.Parameter(torch.empty(60, device="cuda")))
        assert rollouts.memory_of_training([model, None], 1000, shards) == 200 + 400
        assert rollouts.memory_of_training([model, None], 100, shards) == 200
        assert rollouts.memory_of_training([model, critic], 1000, shards) == 240 + 380
        monkeypatch.setattr(rollouts, "local", lambda p: SimpleNamespace(nbytes=p.nbytes // 4))  # dp 4
        assert rollouts.memory_of_training([model, critic], 1000, shards) == 60 + 470
        assert rollouts.memory_of_training([model, critic], 1000, whole) == 4 * 200 // 2 + 300


WHILE_ASLEEP = ("score", "all_logps", "all_values", "policy_backward", "value_backward", "backward")


@pytest.mark.parametrize("script", ["train_ppo", "train_grpo"])
def test_the_cache_is_released(script, folder, world, tmp_path, monkeypatch):
    """Catches a cache that takes memory while answers are scored, or while log-probs and values are computed, and an
    embedding or a head that stays gathered beside it; and answers or metrics that --sleep changes."""
    module, engines, real = importlib.import_module(f"training.{script}"), [], rollouts.draw
    loaded, load = [], frozen.load_frozen
    monkeypatch.setattr(frozen, "load_frozen", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])

    def draw(engine, *rest):
        engines.append(engine)
        assert len(loaded) == 2 and all(isinstance(model.embed_tokens.weight, DTensor) for model in loaded)
        return real(engine, *rest)

    def asleep(function):
        def checked(*args, **options):
            sizes = {tensor.untyped_storage().nbytes() for tensor in engines[-1].rows.cache.tensors()}
            assert (sizes == {0}) == (sleep > 0)
            seen.add(function.__name__)
            return function(*args, **options)

        return checked

    seen, lines = set(), {}
    monkeypatch.setattr(module, "draw", draw)
    monkeypatch.setattr(rewards.Scorer, "score", asleep(rewards.Scorer.score))
    for name in set(WHILE_ASLEEP) & vars(module).keys():
        monkeypatch.setattr(module, name, asleep(vars(module)[name]))
    more = {"reward_checkpoint_path": world / "rm", "ref_checkpoint_path": folder, "total_steps": 2}
    more |= {"eval_prompt_file": world / "held_out.jsonl", "num_eval_samples": 0}
    if script == "train_grpo":
        more |= {"ppo_epochs": None, "value_learning_rate": None, "beta": 0.1, "num_generations": 3}
        more |= {"num_iterations": 2}
    for sleep in (0, 1):
        loaded.clear()
        words = flags(folder, world, tmp_path / f"{sleep}", **more, sleep=sleep)
        result = tiny.run(f"training/{script}.py", *words)
        assert result.code == 0, result.stderr
        lines[sleep] = tiny.read_lines(tmp_path / f"{sleep}/metrics.jsonl")
    assert len(seen) == (3 if script == "train_grpo" else 5)
    for one, other in zip(lines[0], lines[1], strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(TIMED)} == {
            k: v for k, v in other.items() if not k.startswith(TIMED)
        }
