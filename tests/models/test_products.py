"""models/products.py against autograd on the same layers."""

from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._decomp import decomposition_table

from models import malloc, products
from models.config import ModelConfig
from models.lora import Lora, add_adapters
from models.model import Transformer
from models.qlinear import Scheme, quantize
from models.shared_base import lora_layers

E, FFN, B, T, LAYERS = 32, 48, 2, 7, 2
IDS = torch.randint(0, 64, (B, T), generator=torch.Generator().manual_seed(0))
ADAPTED = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")  # k and gate share inputs with these, without adapters
KINDS = {  # name: (model, adapters in, how the base is quantised)
    "llama with biases": ({"attention_bias": True, "mlp_bias": True}, (), None),
    "qwen3, its heads normed": ({"model_type": "qwen3"}, (), None),
    "adapters in some layers": ({"model_type": "qwen2"}, ADAPTED, None),
    "adapters on integers": ({}, ADAPTED, Scheme("int4", 16, has_minima=True)),
    "adapters on bf16": ({}, ADAPTED, None, torch.bfloat16),
}


def random_model(config=(), adapted=(), scheme=None, dtype=None, dropout=0.0):
    torch.manual_seed(1)
    shape = {"vocab_size": 64, "hidden_size": E, "intermediate_size": FFN, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = Transformer(ModelConfig(**shape, **heads, **dict(config)))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if adapted:
        names = (n.removesuffix(".weight") for n in shapes)
        layers = frozenset(name for name in names if name.rpartition(".")[2] in adapted)
        add_adapters(model, Lora(3, 6.0, False, dropout, layers, scheme, {}, Path(), "", 0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for name, module in model.named_modules():
        if scheme is not None and module in lora_layers(model):
            module.set_quantized(quantize(torch.randn(shapes[f"{name}.weight"]) / 8, scheme))
        if dtype is not None and name.endswith("_proj"):
            module.weight.data = module.weight.to(dtype)
    return model


def step(model, recompute="none"):
    """(the output, the gradient of each parameter) of a step."""
    for block in model.layers:
        block.recompute = recompute
    model.zero_grad()
    output = model(IDS)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_autograds(kind, monkeypatch):
    """Catches a wrong formula of a gradient (norm, gate, rotation, low-rank update, bias), an input recomputed
    otherwise than it was, gradients of another layer's adapters, and recomputation that changes a bit or hands out
    memory that was never written."""
    monkeypatch.setattr(malloc, "LARGE", 0)  # treats small tensors as large ones
    model = random_model(*KINDS[kind])
    with ExitStack() as plain:
        for module in ("model", "rope", "products"):
            plain.enter_context(mock.patch(f"models.{module}.keeps_less", lambda: False))
        wanted_output, wanted = step(model)
    for recompute in ("none", "full", "selective"):
        output, gradients = step(model, recompute)
        torch.testing.assert_close(output, wanted_output, atol=1e-5, rtol=1e-5)
        assert gradients.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(gradients[name], wanted[name], atol=1e-4, rtol=1e-4, msg=f"{recompute} {name}")
        if recompute == "none":
            first = gradients
        assert all(torch.equal(first[name], gradients[name]) for name in first), recompute
    with torch.no_grad():  # an evaluation, and what a rollout is scored with
        assert torch.equal(model(IDS), output) or model.lora is not None  # updates are added in another order there


def kept_by(model):
    """Returns (output, tensors kept for its backward beside the model's own: one for each storage)."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(IDS)
    return output, list(kept.values())


@pytest.mark.parametrize("kind", ["llama with biases", "adapters in some layers", "adapters on bf16"])
def test_what_a_step_keeps(kind):
    """Catches values kept for the backward that can be computed from others: of each token a block should keep two
    residual states, q, k, v, attention's output, gate and up, and little beside."""
    model = random_model(*KINDS[kind])
    output, kept = kept_by(model)
    numbers = sum(tensor.untyped_storage().nbytes() for tensor in kept) / 4 / (B * T)
    q, kv = 4 * 8, 2 * 8
    low = 3 * 5 * bool(model.lora)  # r values of each adapter
    block = 2 * E + 2 * q + 2 * kv + 2 * FFN + low + 2 + 4  # and 1 / RMS of two norms, logsumexp of 4 heads
    outside = E + 1 + 2 * 8 / B  # the last norm, and cos and sin, which rows share
    assert numbers == pytest.approx(LAYERS * block + outside, rel=0.03), (numbers, LAYERS * block + outside)
    assert output.requires_grad


@pytest.mark.parametrize("kind", ["adapters on integers", "adapters on bf16"])
def test_a_frozen_weight_is_kept_as_it_is_stored(kind):
    """Catches a base kept a second time, in the dtype of the products, from the forward until the backward; with
    dropout, which has a path of its own."""
    config, adapted, scheme, *dtype = KINDS[kind]
    model = random_model(config, adapted, scheme, *dtype or [None], dropout=0.1)
    _, kept = kept_by(model)
    assert kept and not [t.shape for t in kept if {*t.shape[-2:]} <= {E, FFN, 2 * 8}]


@pytest.mark.parametrize("needs", [[True, True], [True, False], [False, True]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_a_gpu(needs, dtype):
    """Catches arguments that the GPU's kernel for a norm's gradients understands otherwise: torch's own decomposition
    of the kernel, which runs anywhere, stands in for it. The oracle is autograd."""
    x, grad = torch.randn(2, B, T, E).to(dtype)
    x, weight = x.requires_grad_(), torch.randn(E, requires_grad=True)
    torch.nn.functional.rms_norm(x.float(), (E,), weight, 1e-5).to(dtype).backward(grad)
    rstd = (x.detach().float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    kernel = torch.ops.aten._fused_rms_norm_backward
    with mock.patch.object(torch.ops.aten, "_fused_rms_norm_backward", decomposition_table[kernel.default]):
        of = products._norm_gradients_by_kernel(grad, x.detach(), rstd, weight.detach(), needs)
    for found, wanted, needed in zip(of, (x.grad, weight.grad), needs):
        if needed:
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert needed or found is None
