"""models/products.py beside what autograd makes of the same layers."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.attention import causal_attention
from models.lora import Lora, add_adapters
from models.model import ModelConfig, Transformer
from models.qlinear import Scheme, quantize
from models import products
from pathlib import Path

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
LAYERS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")  # k_proj and gate_proj share an input, and have none


def random_model(kind, *, adapted=(), scheme=None):
    torch.manual_seed(1)
    model = Transformer(ModelConfig(**SHAPE, **HEADS, attention_bias=True, mlp_bias=True, model_type=kind))
    if adapted or scheme:
        parts = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
        names = frozenset(f"layers.{i}.{parts.get(n[0], 'mlp')}.{n}" for i in range(2) for n in adapted)
        add_adapters(model, Lora(3, 6.0, False, 0.0, names, scheme, {}, Path(), "", 0))
        for layer in products_layers(model) if scheme else ():
            layer.set_quantized(quantize(torch.randn(layer_shape(layer)), scheme))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model
