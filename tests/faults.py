"""Mistakes of parallel training, planted one at a time by tests/training/test_parallel.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F

from models import batches, lora, model, tp
from training import finetune_sft


@contextmanager
def planted(name: str) -> Iterator[None]:
    with FAULTS[name]():
        yield


def _norm_gradient_not_summed():
    return mock.patch.object(model, "local", lambda parameter, partial_grad=False: tp.local(parameter))


def _key_norm_gradient_not_summed():
    real = model.Attention.__init__

    def init(self, *args):
        real(self, *args)
        self.k_norm.partial_grad = False

    return mock.patch.object(model.Attention, "__init__", init)


def _bias_added_by_every_rank():
    def forward(self, x):
        return tp.leave_parallel(F.linear(x, tp.local(self.weight), tp.local(self.bias)), self.parallel)

    return mock.patch.object(model.RowLinear, "forward", forward)


def _mean_of_micro_batches():
    real = finetune_sft.summed_loss

    def summed_loss(model, examples, split):
        return real(model, examples, split) / max(1, sum(e.num_targets for e in examples))

    return mock.patch.object(finetune_sft, "summed_loss", summed_loss)


def _dp_factor_missing():
    real = finetune_sft.summed_loss

    def summed_loss(model, examples, split):
        loss = real(model, examples, split)
        if loss.requires_grad:
            loss.register_hook(lambda grad: grad / int(torch.distributed.get_world_size()))
        return loss

    return mock.patch.object(finetune_sft, "summed_loss", summed_loss)


def _input_gradient_not_summed():
    return mock.patch.object(tp._Copy, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def _rows_repeated():
    real = batches.micro_batches
    return mock.patch.object(
        batches, "micro_batches", lambda rows, size, length, rank, dp_size: real(rows, size, length, 0, dp_size)
    )


def _replicas_not_averaged():
    real = torch.distributed.all_reduce  # called for FSDP's gradients and for the loss, a scalar

    def all_reduce(tensor, *args, **kwargs):
        return real(tensor, *args, **kwargs) if tensor.dim() == 0 else None

    return mock.patch.object(torch.distributed, "all_reduce", all_reduce)


def _adapter_gradient_not_summed():
    return mock.patch.object(lora, "local", lambda parameter, partial_grad=False: tp.local(parameter))


def _update_counted_by_every_rank():
    real = lora.LoraLinear._factors

    def factors(self, dtype):
        A, B = real(self, dtype)
        return A, B * (2 if self.is_row else 1)

    return mock.patch.object(lora.LoraLinear, "_factors", factors)


FAULTS = {
    "adapter's gradient not summed": _adapter_gradient_not_summed,
    "update counted by every rank": _update_counted_by_every_rank,
    "norm gradient not summed": _norm_gradient_not_summed,
    "gradient of the heads' norm not summed": _key_norm_gradient_not_summed,
    "bias added by every rank": _bias_added_by_every_rank,
    "mean of micro-batches": _mean_of_micro_batches,
    "dp factor missing": _dp_factor_missing,
    "input gradient not summed": _input_gradient_not_summed,
    "padding row learnt twice": _rows_repeated,
    "replicas not averaged": _replicas_not_averaged,
}
