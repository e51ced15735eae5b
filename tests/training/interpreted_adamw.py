"""Compares the kernel of training/triton_adamw.py, run in Triton's interpreter (to be enabled before Triton is
imported), with AdamW in plain PyTorch operations: bf16 weights and all moments must be bitwise equal."""

import itertools

import torch
from torch import nn

from training import optim, triton_adamw

SHAPES = [(3, 344), (5, 256), (5, 300), (130,), (1, 1)]  # blocks of 43, 32 and 75 columns; the last two: none


def made(dtype: torch.dtype, mode: str, kernel) -> tuple[nn.ParameterList, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    parameters = nn.ParameterList(nn.Parameter(0.01 * torch.randn(s, generator=generator).to(dtype)) for s in SHAPES)
    optim.FEWEST_QUANTIZED, optim.gpu_kernel = 500, lambda device: kernel
    args = optim.OptimArgs(weight_decay=0.1, learning_rate=1e-3, optim=mode)
    named = dict(enumerate(parameters))
    places = {p: optim._place(i, str(i), p, quantize=mode == "adamw_8bit") for i, p in named.items()}
    places = {p: place._replace(row=7, column=place.block or 3) for p, place in places.items()}  # in a larger tensor
    settings = {"lr": 1e-3, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps}
    groups = [{"params": list(parameters), "weight_decay": args.weight_decay}]
    return parameters, optim.AdamW(groups, settings, places=places, seed=3, compile=False)


def check(dtype: torch.dtype, mode: str) -> None:
    both = [made(dtype, mode, kernel) for kernel in (triton_adamw, None)]
    assert mode == "adamw" or {place.block for place in both[0][1].places.values()} == {43, 32, 75, 0}
    generator = torch.Generator().manual_seed(1)
    for step in range(2):
        grads = [10.0 ** -(3 * step) * torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
        grads[1][2:4] = 0.0  # blocks of zero moments, whose scale is 0
        for parameters, optimizer in both:
            for parameter, grad in zip(parameters, grads):
                parameter.grad = grad.clone()
            optimizer.step()
        for ours, theirs in zip(*(parameters for parameters, _ in both)):
            if dtype == torch.float32:  # the interpreter's division may round the last bit differently
                torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=2e-9)
            else:
                assert torch.equal(ours, theirs), (mode, step, ours.shape)
            states = [optimizer.state[p] for (_, optimizer), p in zip(both, (ours, theirs))]
            for name, value in states[0].items():
                assert torch.equal(value, states[1][name]), (dtype, mode, step, name, ours.shape)


def check_all() -> None:
    for dtype, mode in itertools.product((torch.bfloat16, torch.float32), ("adamw", "adamw_8bit")):
        check(dtype, mode)
