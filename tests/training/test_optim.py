"""training/optim.py: schedule and optimizers, against hand-computed values and torch's AdamW in fp32."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.noise import column_hashes, noise_key, random_bits
from tests import tiny
from training.checkpoints import CheckpointWriter, load_newest_checkpoint
from training.optim import (
    OptimArgs,
    check_optimizer,
    dequantize_blocks,
    dynamic_levels,
    make_optimizer,
    quantize_blocks,
    set_learning_rate,
    stochastic_round,
)


def rates(schedule, total, warmup, last=None, peak=None):
    args = OptimArgs(learning_rate=8.0, lr_schedule=schedule, warmup_ratio=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)])
    found = [set_learning_rate(optimizer, args, step, total, peak=peak) for step in range(1, (last or total) + 1)]
    assert optimizer.param_groups[0]["lr"] == found[-1]
    return found


def test_schedules_by_hand():
    """Catches a schedule one step early or late, a warm-up that starts at 0 or misses the peak (--learning_rate or
    another one), and a wrong formula."""
    assert rates("constant", 5, 0.4) == [4, 8, 8, 8, 8]
    assert rates("linear", 6, 0.3) == [4, 8, 8, 6, 4, 2]  # ceil(1.8) = 2 steps up, then 4 steps to 0 at step 7
    assert rates("linear", 4, 0) == [8, 6, 4, 2]
    assert rates("linear", 6, 0.3, peak=4.0) == [2, 4, 4, 3, 2, 1]
    half = math.sqrt(0.5)
    expected = [8, 8, 4 * (1 + half), 4, 4 * (1 - half)]
    assert rates("cosine", 5, 0.2) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_at_its_edges(schedule):
    """Catches a division by zero, and a rate of 0, which learns nothing, for one step, all warm-up or none."""
    assert rates(schedule, 1, 0.0) == rates(schedule, 1, 0.03) == rates(schedule, 1, 1.0) == [8]
    assert rates(schedule, 4, 1.0) == [2, 4, 6, 8]
    assert all(rate > 0 for rate in rates(schedule, 7, 0.0))
    # a run resumed with fewer --max_steps than it has done needs no rate, but must not fail
    rates(schedule, 4, 0.0, last=9)


def test_optimizer_decays_matrices_only(folder):
    """Catches weight decay on norms and biases, parameters left out, and flags that do not reach AdamW."""
    model = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.RMSNorm(3), "embedding": nn.Embedding(4, 3)})
    model["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(
        model, OptimArgs(learning_rate=0.1, weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.7, adam_eps=1e-3)
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():
        decays = p.dim() == 2 and not name.startswith("frozen")
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 if decays else 1), msg=name)
    assert {(g["betas"], g["eps"], g["lr"]) for g in optimizer.param_groups} == {((0.8, 0.7), 1e-3, 0.1)}


# ------------------------------------------------------------------------ bf16 weights, 8-bit moments


def noise(rows: int, columns: int) -> torch.Tensor:
    keys = torch.tensor([noise_key(7, step) for step in range(rows)])
    return random_bits(keys, torch.zeros_like(keys), column_hashes(columns))


def test_stochastic_rounding():
    """Catches a bias, a probability that is not the distance, a wrong direction for negative numbers, exact numbers
    that change, and infinities or NaN that become numbers; subnormals are rounded like the rest."""
    rows = 4096
    step = torch.tensor([2.0**-7, -(2.0**-7), 2.0**-20, 2.0**90, 2.0**-133, -(2.0**-133)])  # an ulp of bf16
    base = torch.tensor([1.0, -1.0, 2.0**-13, 2.0**97, 2.0**-126, -3 * 2.0**-133])
    fractions = torch.tensor([0.0, 2.0**-12, 0.1, 0.25, 0.5, 0.75, 0.9, 1 - 2.0**-12])
    x = (base[:, None] + step[:, None] * fractions).flatten()
    exact = ((x.double() - base.double().repeat_interleave(8)) / step.double().repeat_interleave(8)).float()
    rounded = stochastic_round(x.expand(rows, -1), noise(rows, len(x))).float()
    away = (rounded - base.repeat_interleave(8)) / step.repeat_interleave(8)
    assert ((away == 0) | (away == 1)).all()  # one of the two neighbours
    assert (away[:, exact == 0] == 0).all()
    sigma = (exact * (1 - exact) / rows).sqrt()
    scores = ((away.mean(0) - exact) / sigma)[(exact > 0.01) & (exact < 0.99)]
    assert scores.abs().max() < 4 and 0.4 < scores.square().mean() < 1.8, scores  # 30 independent normal numbers
    assert away[:, (exact > 0) & (exact < 0.01)].mean() < 2e-3 and away[:, exact > 0.99].mean() > 0.998

    special = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 0.0, 3.3895313892515355e38])
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    special = torch.cat((special, nans))
    rounded = stochastic_round(special.expand(rows, -1), noise(rows, len(special))).float()
    torch.testing.assert_close(rounded, special.expand(rows, -1), rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(rounded[:, 3]).all() and not torch.signbit(rounded[:, 4]).any()


def moved(dtype, optim, steps=20, lr=2e-5, seed=0):
    """Returns how far two matrices of 0.01 move under a constant gradient, which moves fp32 weights by lr per step."""
    model = nn.ParameterList([nn.Parameter(torch.full((64, 64), 0.01, dtype=dtype)) for _ in range(2)])
    if optim == "torch":
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    else:
        optimizer = make_optimizer(model, OptimArgs(learning_rate=lr, optim=optim), seed=seed)
    for _ in range(steps):
        for p in model:
            p.grad = torch.full_like(p, -0.25)
        optimizer.step()
    start = torch.tensor(0.01, dtype=dtype).float()
    return torch.stack([p.detach().float() - start for p in model])


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_bf16_weights_follow_small_updates(optim):
    """Catches rounding to nearest, with which no weight ever moves, and noise that is the same at every step, for every
    parameter or under every seed: the mean would be right, and the weights far apart."""
    assert (moved(torch.bfloat16, "torch") == 0).all()  # the trap
    distances = moved(torch.bfloat16, optim)
    wanted = moved(torch.float32, "adamw").mean()
    assert wanted.item() == pytest.approx(20 * 2e-5, rel=1e-3)
    ulp = 2.0**-14
    p = 2e-5 / ulp
    spread = ulp * math.sqrt(20 * p * (1 - p))  # of a binomial number of ulps
    assert abs(distances.mean() - wanted) < 4 * spread / math.sqrt(distances.numel())
    assert distances.std().item() == pytest.approx(spread, rel=0.05)
    for other in (distances[1], moved(torch.bfloat16, optim, seed=1)[0]):
        assert abs(torch.corrcoef(torch.stack((distances[0].flatten(), other.flatten())))[0, 1]) < 4 / 64
    assert torch.equal(distances, moved(torch.bfloat16, optim))


class Regression(nn.Module):
    """Fits y = x @ weight.T to a teacher that is at most 0.004 away in each weight."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = 0.01 + 0.01 * torch.rand(64, 64, generator=generator)
        self.target = weight + 0.008 * torch.rand(64, 64, generator=generator) - 0.004
        self.x = torch.randn(256, 64, generator=generator)
        self.weight = nn.Parameter(weight.to(dtype))

    def loss(self) -> torch.Tensor:
        return (self.x @ (self.weight.float() - self.target).T).square().mean()

    def fit(self, optimizer: torch.optim.Optimizer, steps: int = 400) -> tuple[float, float]:
        first = self.loss().item()
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        return first, self.loss().item()


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_learns_like_fp32(betas):
    """Catches an optimizer that learns, but less than AdamW in fp32: rounding to nearest, a lost bias correction, and
    second moments that quantisation keeps from decaying."""
    args = OptimArgs(learning_rate=2e-5, adam_beta1=betas[0], adam_beta2=betas[1])
    model = Regression(torch.float32)
    first, wanted = model.fit(make_optimizer(model, args))
    assert wanted < 0.002 * first
    for dtype in (torch.float32, torch.bfloat16):
        for optim in ("adamw", "adamw_8bit"):
            model = Regression(dtype)
            last = model.fit(make_optimizer(model, replace(args, optim=optim)))[1]
            assert last < wanted + 0.003 * first, (dtype, optim)  # rounding leaves each weight about an ulp away
    model = Regression(torch.bfloat16)
    nearest = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=betas, weight_decay=0.0)
    assert model.fit(nearest)[1] > 0.7 * first


def test_trains_a_model_like_fp32(folder, tmp_path):
    """Catches mistakes that the regression above does not show: in norms, embeddings and small matrices of a LLaMA in
    bf16, flags that do not reach the optimizer, and activations in the weights' dtype."""
    sums = [{"prompt": f"{i} plus {i % 7} is", "completion": f" {i + i % 7}"} for i in range(64)]
    train_file = tiny.write_records(tmp_path / "train.jsonl", sums)
    losses = {}
    for name, flags in (("fp32", []), ("lean", ["--param_dtype", "bfloat16", "--optim", "adamw_8bit"])):
        args = ["--checkpoint_path", folder, "--train_file", train_file, "--output_dir", tmp_path / name]
        args += ["--batch_size", 8, "--max_steps", 40, "--learning_rate", 1e-3, "--dtype", "float32"]
        result = tiny.run("training/finetune_sft.py", *args, *flags)
        assert result.code == 0, result.stderr
        assert ("float32 on bfloat16 weights" in result.stdout) == (name == "lean")
        losses[name] = [line["loss"] for line in tiny.read_lines(tmp_path / name / "metrics.jsonl")]
    first, wanted, found = losses["fp32"][0], sum(losses["fp32"][-8:]) / 8, sum(losses["lean"][-8:]) / 8
    assert wanted < first / 2 and found == pytest.approx(wanted, rel=0.01)
    refused = tiny.run("training/finetune_sft.py", *args, "--resume")
    tiny.assert_refused(refused, "begun with other --optim, --param_dtype")


def mixed_model(dtype: torch.dtype) -> nn.ModuleDict:
    torch.manual_seed(0)
    parts = {"big": nn.Linear(80, 64), "small": nn.Linear(8, 8), "norm": nn.RMSNorm(64)}
    return nn.ModuleDict(parts).to(dtype)


@pytest.mark.parametrize(
    ("rate", "decay", "works"), [(1e-6, 0.01, False), (2.0**-20, 2.0**-5, False), (1e-6, 0.1, True), (1e-6, 0.0, None)]
)
def test_decay_too_weak_for_fp32(rate, decay, works, capsys):
    """Catches a weight decay that does nothing without a word, and a warning of one that works, or that is not asked
    for. A step without gradients shows which it is."""
    args = OptimArgs(learning_rate=rate, weight_decay=decay)
    check_optimizer(SimpleNamespace(**vars(args), value_learning_rate=1e-3, cpu_offload=False))
    why = f"changes no weight: 1 - {decay} * {rate} is 1 in fp32\n"
    wanted = f"--weight_decay {decay} at --learning_rate {rate} {why}" if works is False else ""
    assert capsys.readouterr().out == wanted
    for optim in ("adamw", "adamw_8bit"):
        model = mixed_model(torch.float32)
        before, optimizer = model.big.weight.detach().clone(), make_optimizer(model, replace(args, optim=optim))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(model.big.weight, before) == (not works)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_one_step_is_adamw_in_fp32(optim):
    """Catches arithmetic in bf16, a wrong formula or bias correction, and decay of norms and biases: from equal weights
    and moments, each new bf16 weight is a neighbour of the one that torch's AdamW computes in fp32."""
    args = OptimArgs(learning_rate=3e-3, weight_decay=0.5)
    model = mixed_model(torch.bfloat16)
    optimizer = make_optimizer(model, replace(args, optim=optim))
    reference = mixed_model(torch.float32)
    expected = make_optimizer(reference, args)
    for step in range(4 if optim == "adamw" else 1):  # later, 8-bit moments are no longer equal
        for p, q in zip(model.parameters(), reference.parameters()):
            p.grad = torch.randn_like(p) * 10.0**-step
            q.grad, q.data = p.grad.float(), p.detach().float()
        optimizer.step()
        expected.step()
        for (name, p), q in zip(model.named_parameters(), reference.parameters()):
            lower = (q.data.view(torch.int32) & -0x10000).view(torch.float32)
            ulp = (lower.view(torch.int32) + 0x10000).view(torch.float32) - lower
            away = (p.detach().float() - lower) / ulp
            # an fp32 number within its last bit of a bf16 one may end up on its other side
            near = (away == 0) | (away == 1) | ((p.detach() - q).abs() < 1.01 * ulp.abs())
            assert near.all() and 0 < away.mean() < 1, (step, name)
            if optim == "adamw":
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert optimizer.state[p][moment].dtype == torch.float32
                    torch.testing.assert_close(optimizer.state[p][moment], expected.state[q][moment], msg=name)


def test_fp32_weights_with_8_bit_moments_start_as_adamw():
    """Catches rounding noise on fp32 weights, and moments that are quantised before they are used."""
    models, args = [mixed_model(torch.float32) for _ in range(2)], OptimArgs(learning_rate=3e-3)
    for model, optim in zip(models, ("adamw", "adamw_8bit")):
        optimizer = make_optimizer(model, replace(args, optim=optim))
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    for p, q in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_quantisation_error(signed):
    """Catches levels that are not those of the paper, a scale shared beyond its block, and a positive second moment
    that becomes 0."""
    levels = dynamic_levels(signed)
    assert len(levels.unique()) == (255 if signed else 256) and levels.max() == 1
    assert torch.equal(levels, -levels.flip(0)) if signed else levels.min() > 0
    torch.manual_seed(0)
    x = 10.0 ** (-7 * torch.rand(32, 8 * 64))
    x = x * torch.randn_like(x).sign() if signed else x
    x.view(32, 8, 64)[:, :4] *= 1e-3
    x[0, :64], x[1, 7] = 0, 1e4  # a block of zeros, and a spike that may spoil its own block only
    codes, scale = quantize_blocks(x, 8, levels)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and scale.shape == (32, 8)
    blocks, back = x.view(32, 8, 64), dequantize_blocks(codes, scale, levels).view(32, 8, 64)
    assert torch.equal(scale, blocks.abs().amax(-1)) and (back[0, 0] == 0).all()
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    relative = (blocks / largest).abs()
    for decade in range(5):  # half the distance of two levels, relative to the smallest number of the decade
        inside = (relative <= 10.0**-decade) & (relative > 10.0 ** -(decade + 1))
        error = ((back - blocks) / blocks)[inside].abs().max()
        assert error < 1.01 * 4.5 / 2 ** ((6 if signed else 7) - decade), (decade, error)
    if not signed:
        assert (back[blocks > 0] > 0).all()


def test_state_size_and_what_is_quantised():
    """Catches moments that are not 8-bit, scales that cost as much as the codes, and a norm or small matrix that is
    quantised."""
    model = nn.ModuleDict({"big": nn.Linear(2048, 64), "small": nn.Linear(8, 8), "norm": nn.RMSNorm(8192)})
    model = model.to(torch.bfloat16)
    optimizer = make_optimizer(model, OptimArgs(learning_rate=1e-3, optim="adamw_8bit"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        size = sum(t.nbytes for key, t in optimizer.state[p].items() if key != "step") / p.numel()
        assert size == (2 + 2 * 4 / 256 if name == "big.weight" else 8), name


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_state_survives_a_checkpoint(optim, tmp_path):
    """Catches moments converted to the weights' dtype, as torch's load_state_dict does with every state, and a step
    count, a scale or the position of the rounding noise lost."""
    models = [mixed_model(torch.bfloat16) for _ in range(2)]
    optimizers = [make_optimizer(model, OptimArgs(learning_rate=1e-3, optim=optim)) for model in models]
    for step in range(4):
        torch.manual_seed(step)
        gradients = [torch.randn_like(p) for p in models[0].parameters()]
        if step == 2:
            CheckpointWriter(tmp_path, models[0], optimizers[0], limit=1).save(step)
            assert load_newest_checkpoint(tmp_path, models[1], optimizers[1]) == step
        for model, optimizer in list(zip(models, optimizers))[: 1 if step < 2 else 2]:
            for p, gradient in zip(model.parameters(), gradients):
                p.grad = gradient.clone()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models)))


def test_the_state_is_there_before_the_first_step():
    """Catches an optimizer state that depends on whether it was read before the first step: it must start as torch's
    own, and the steps from it must be bitwise equal."""
    models = [mixed_model(torch.float32) for _ in range(2)]
    ours, theirs = make_optimizer(models[0], OptimArgs(learning_rate=1e-3)), None
    groups = [{**group, "params": []} for group in ours.param_groups]
    by_name = {id(p): q for p, q in zip(*(model.parameters() for model in models))}
    for group, own in zip(groups, ours.param_groups):
        group["params"] = [by_name[id(p)] for p in own["params"]]
    theirs = torch.optim.AdamW(groups, fused=True)
    begun = {id(p): {name: (t.clone(), t.dtype, t.device) for name, t in ours.state[p].items()} for p in ours.state}
    for step in range(3):
        torch.manual_seed(step)
        for p, q in zip(*(model.parameters() for model in models)):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(*(model.parameters() for model in models)):
        assert torch.equal(p, q) and ours.state[p].keys() == theirs.state[q].keys()
        for name, tensor in theirs.state[q].items():
            zeros, dtype, device = begun[id(p)][name]
            assert not zeros.any() and (dtype, device) == (tensor.dtype, tensor.device), name
            assert torch.equal(ours.state[p][name], tensor), name
