"""Micro-batches of all trainers on a fake GPU (tests/models/fake_gpu.py) run without a host sync."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.batches import Split
from models.model import Transformer
from models.records import IGNORE_INDEX, Example
from models.reward import Pair, Scored
from models.transfer import index_on, to_device
from tests.models.fake_gpu import CONFIG, CPU, GPU, gpu, on_gpu  # noqa: F401 (a fixture)
from training import finetune_sft, rollouts, train_dpo, train_grpo, train_ppo, train_rm

ANSWERS = [Example([1, *range(3, 3 + n)], [IGNORE_INDEX] * 3 + list(range(5, 3 + n))) for n in (4, 7, 5)]
PAIRS = [Pair(3, ANSWERS[0], ANSWERS[1], 0.5, (-3.0, -4.0)), Pair(3, ANSWERS[1], ANSWERS[2], None, (-2.0, -5.0))]
STEPS = [Scored([1, 4, 5, 6, 7], [2, 4], [0.0, 1.0]), Scored([1, 4, 5], [2], [0.5])]
ONE_RANK = SimpleNamespace(size=lambda: 1, get_local_rank=lambda: 0)
SPLITS = {"padded": Split(2, ONE_RANK, 0), "packed": Split(2, ONE_RANK, 0, 40)}


def flags_of_run(Args: type, **given):
    """Returns Args with the paths that must be given."""
    paths = {
        "checkpoint_path": Path("in"),
        "output_dir": Path("out"),
        "train_file": Path("t"),
        "prompt_file": Path("p"),
    }
    names = {field.name for field in fields(Args)}
    return Args(**{name: path for name, path in paths.items() if name in names}, **given)


def sft(model, critic, split):
    (finetune_sft.summed_loss(model, ANSWERS, split) * 2.0**-3).backward()


def dpo(model, critic, split):
    args = flags_of_run(train_dpo.DpoArgs, micro_batch_size=2)
    loss, sums = train_dpo.summed_loss(model, None, PAIRS, args, split)
    (loss * 2.0**-1).backward()
    sums += sums


def reward_model(model, critic, split):
    for kind, rows in (("pairwise", PAIRS), ("process", STEPS)):
        args = flags_of_run(train_rm.RmArgs, loss=kind)
        rewards = train_rm.rewards_of(critic, rows, split)
        targets = train_rm.targets_of(rows, rewards.device)
        (train_rm.losses_of(args, rewards, targets).sum() * 0.5).backward()
        all_rewards = torch.zeros(8, device=rewards.device)
        all_rewards.index_copy_(0, index_on(range(len(rewards)), rewards.device), rewards.detach())


def rollout_of(device):
    mask = to_device([[True] * 2 + [False] * 3, [True] * 5, [True] * 3 + [False] * 2], device)
    values = torch.zeros(3, 5, device=device)
    return mask, values, train_ppo.Rollout(ANSWERS, [], [], mask, values, values, values, None, {}, values)


def ppo(model, critic, split):
    mask, values, rollout = rollout_of(model.inv_freq.device)
    ones = torch.ones_like(values)
    update = train_ppo.Update(rollout, mask, values, ones, ones, values[0, 0], 0.1, [2, 5, 3])
    for more in ({}, {"tis_cap": 2.0, "entropy_coef": 0.1, "kl_in": "loss", "dual_clip": 3.0}):
        args, sums = flags_of_run(train_ppo.PpoArgs, **more), rollouts.TokenSums(values.device)
        train_ppo.policy_backward(model, update, [2, 0, 1], args, split, sums)
        train_ppo.value_backward(critic, update, [2, 0, 1], args, split, sums)


def grpo(model, critic, split):
    mask, values, _ = rollout_of(model.inv_freq.device)
    for kind in ("dapo", "gspo", "cispo", "rloo"):
        for logps in (None, values):
            args, sums = flags_of_run(train_grpo.GrpoArgs, loss_type=kind, beta=0.1), rollouts.TokenSums(values.device)
            advantages, clipped = values[:, 0] + 1, torch.zeros(2, 3, device=values.device)
            made = (advantages, 0.0, values, logps, values, values.clone(), clipped)
            groups = train_grpo.Groups(ANSWERS, mask, mask, [2, 5, 3], *made)
            train_grpo.backward(model, groups, [1, 0, 2], args, split, sums)


TRAINERS = [sft, dpo, reward_model, ppo, grpo]


class NothingWaits(TorchDispatchMode):
    """Refuses host syncs: reading a value, a shape that depends on values, and a copy between host and GPU that is not
    non-blocking."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward", "is_nonzero", "equal")

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operator.overloadpacket.__name__
        assert name not in self.WAITS and not name.startswith("unique"), f"{name} waits"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as an index waits"
        found = operator(*args, **kwargs)
        devices = {tensor.device.type for tensor in tree_leaves((args, found)) if isinstance(tensor, torch.Tensor)}
        if len(devices) > 1 and not any(isinstance(t, torch.Tensor) and not t.dim() for t in tree_leaves(args)):
            does_not_block = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
            assert does_not_block, f"{name} between {devices} waits"
        return found


@pytest.fixture
def plain(monkeypatch):
    """Lets the trainers take models without FSDP."""
    for script in (train_ppo, train_grpo):
        monkeypatch.setattr(script, "reducing_gradients", lambda model, parts, every: parts)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_micro_batches_wait_for_nobody(gpu, plain, trainer, monkeypatch):
    """Catches a batch, an index or a number that is sent with a blocking copy, and a read of a result: each would leave
    the GPU idle until the host has it. The backward pass, which needs a GPU, is left out."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    policy, critic = on_gpu(torch.bfloat16), on_gpu(torch.bfloat16, head="score")
    for split in SPLITS.values():
        with NothingWaits():
            trainer(policy, critic, split)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_backwards_wait_for_nobody(plain, trainer):
    """Catches a host sync in an operation's gradient: masked_scatter's, for example, reads how much was chosen."""
    models = [Transformer(CONFIG, head=head) for head in ("lm", "score")]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(0))
        model.reset_buffers(CPU)
    for split in SPLITS.values():
        with NothingWaits():
            trainer(*models, split)
    assert any(p.grad is not None and p.grad.any() for model in models for p in model.parameters())


def test_waits_are_seen(gpu):
    """Catches a NothingWaits that does not notice host syncs."""
    x = torch.empty(3, 4, device=GPU)
    for wait in (
        lambda: torch.tensor([1, 2], device=GPU),
        lambda: torch.arange(3).to(GPU),
        lambda: x[x > 0],
        lambda: x[[0, 1]],
        lambda: x.cpu(),
        lambda: x.sum().item(),
        lambda: (x > 0).nonzero(),
    ):
        with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)), NothingWaits():
            wait()
