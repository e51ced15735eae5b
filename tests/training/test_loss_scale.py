"""The mean over a step's tokens (pairs, answers) as a factor on the gradients, in bf16."""

import pytest
import torch

from models.common import Runtime
from models.fsdp import (
    LossScale,
    ParallelArgs,
    clip_grad_norm,
    init_mesh,
    load_for_training,
    reducing_gradients,
)
from tests import tiny
from tests.training.test_train_ppo import flags, world  # noqa: F401 (a fixture)
from tests.training.test_train_rm import make_records
from training import finetune_sft, train_dpo, train_ppo, train_rm

PAIR = {"prompt": "3 plus 4 is", "chosen": " 7, or so it seems.", "rejected": " 12."}
RECORDS = {
    finetune_sft: [{"prompt": f"{i} plus", "completion": " The answer" * (1 + i % 3)} for i in range(7)],
    train_dpo: [{**PAIR, "prompt": f"{i} plus" + " so" * (i % 4)} for i in range(7)],
    train_rm: make_records("pairwise", 7),
}


@pytest.mark.parametrize("script", [*RECORDS, train_ppo], ids=lambda script: script.__name__.rpartition(".")[2])
def test_a_mean_is_the_sum_over_the_count(script, folder, world, tmp_path, monkeypatch):
    """Catches 1 / count rounded to bf16 in the backward pass, or in some of its tensors only (the body's gradients were
    off by up to 0.4 % from the head's): gradients of the mean must be those of the sum divided by the count."""
    real_scale, real_clip, counts, gradients = script.loss_scale, script.clip_grad_norm, [], []

    def recording_scale(count, dp_size):
        counts.append(count)
        return real_scale(count, dp_size)

    def recording_clip(model, max_norm, scale):
        norm = real_clip(model, 1e9, scale)
        gradients.append({name: p.grad.full_tensor().clone() for name, p in model.named_parameters()})
        return norm

    monkeypatch.setattr(script, "clip_grad_norm", recording_clip)
    for name, scale in (("mean", recording_scale), ("sum", lambda count, dp_size: LossScale(1.0, 1.0))):
        monkeypatch.setattr(script, "loss_scale", scale)
        if script is train_ppo:
            one = {"total_steps": 1, "ppo_epochs": 1, "minibatch_size": 6, "dtype": "bfloat16"}
            one["value_checkpoint_path"] = world / "rm"  # a head that is not 0
            arguments = flags(folder, world, tmp_path / name, **one)
        else:
            train_file = tiny.write_records(tmp_path / "train.jsonl", RECORDS[script])
            arguments = ["--checkpoint_path", folder, "--train_file", train_file, "--output_dir", tmp_path / name]
            arguments += ["--batch_size", 7, "--micro_batch_size", 3, "--max_steps", 1, "--dtype", "bfloat16"]
        result = tiny.run(script.__name__.replace(".", "/") + ".py", *arguments)
        assert result.code == 0, result.stderr
    means, sums = gradients[: len(counts)], gradients[len(counts) :]
    assert len(means) == len(sums) == len(counts) == (2 if script is train_ppo else 1)
    for count, mean, total in zip(counts, means, sums):
        assert count & (count - 1), f"{count} is a power of two, whose fraction bf16 holds"
        for name, wanted in total.items():
            assert wanted.norm() > 0, name
            assert (mean[name] * count - wanted).norm() <= 1e-6 * wanted.norm(), name


def test_the_norm_and_the_clipped_gradients_are_scaled(folder):
    """Catches a factor missing in the norm that is reported and used to clip, and a factor rounded to bf16."""
    runtime = Runtime(torch.device("cpu"), torch.float32, False)
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 2**-8)):
        args = ParallelArgs(param_dtype=dtype)
        model = load_for_training(folder, init_mesh(runtime.device, 1), args, runtime)
        for scale, max_norm in ((1 / 1.7, 1e9), (1 / 1.7, 0.01), (1.0, 1.0)):
            model.zero_grad()
            model(torch.tensor([[1, 5, 9, 7]])).square().sum().backward()
            wanted = {
                n: scale * p.grad.full_tensor().double() for n, p in model.named_parameters() if p.grad is not None
            }
            total = torch.stack([g.norm() for g in wanted.values()]).norm()
            norm = clip_grad_norm(model, max_norm, scale)
            torch.testing.assert_close(norm.double(), total, rtol=1e-5, atol=0)
            for name, gradient in wanted.items():
                gradient = gradient * min(1, max_norm / total)
                found = model.get_parameter(name).grad.full_tensor().double()
                torch.testing.assert_close(found, gradient, rtol=tolerance, atol=1e-12)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("every", [True, False], ids=["each", "once"])
def test_micro_batches_add_up_in_fp32(every, folder):
    """Catches gradients of bf16 micro-batches that are summed in bf16, where a sum of 200 equal ones is percents off,
    on a single data-parallel rank, which reduces nothing."""
    runtime, norms = Runtime(torch.device("cpu"), torch.bfloat16, False), []
    args = ParallelArgs(sync_every_micro_batch=every)
    model = load_for_training(folder, init_mesh(runtime.device, 1), args, runtime)
    for count in (1, 200):
        model.zero_grad()
        for row in reducing_gradients(model, [torch.tensor([[1, 5, 9, 7]])] * count, every=every):
            model(row).float().square().sum().backward()
        norms.append(clip_grad_norm(model, 1e9, 1 / count))
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)
    torch.distributed.destroy_process_group()
