"""models/lora.py and models/adapters.py against PEFT."""

from pathlib import Path

import peft
import pytest
import torch
import transformers

from models.adapters import LoraArgs, choose_lora, weight_files
from models.checkpoint import load_model
from models.common import Runtime
from models.decode import copy_for_inference
from models.fsdp import ParallelArgs, init_mesh, load_for_training
from models.lora import adapter
from tests import tiny

CPU = Runtime(torch.device("cpu"), torch.float32, False)
IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))
KINDS = {  # name: (model, settings of PEFT)
    "llama, all-linear": ({}, {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}),
    "qwen2, q and v, rslora": (tiny.QWEN2, {"r": 5, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "reward model": (
        {"attention_bias": True},
        {"r": 2, "target_modules": ["down_proj", "k_proj"], "task_type": "SEQ_CLS"},
    ),
}


class Args(LoraArgs, ParallelArgs):
    """What choose_lora asks of a trainer's flags."""

    checkpoint_path: Path
    seed = 0

    def __init__(self, folder, **flags):
        super().__init__(**flags)
        object.__setattr__(self, "checkpoint_path", folder)


def made_by_peft(root, model, settings, seed=0):
    """(a base, PEFT's adapter for it, PEFT's model): every factor is random."""
    base, out = root / "base", root / "adapter"
    hf = tiny.write_model(base, **model)
    if settings.get("task_type") == "SEQ_CLS":
        hf = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(hf, peft.LoraConfig(**settings)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(out)
    return base, out, adapted


def trainable(folder, dtype=torch.float32, **flags):
    """A model of the flags, as a trainer has it."""
    args, runtime = Args(folder, **flags), CPU._replace(dtype=dtype)
    lora = choose_lora(args, folder, runtime)
    head = {"head": "score", "new_score": torch.zeros(1, 64)} if "score.weight" in lora.values else {}
    return load_for_training(folder, init_mesh(CPU.device, 1), args, runtime, lora=lora, **head)


def output_of(model):
    return model.score(model(IDS)) if hasattr(model, "score") else model.lm_head(model(IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft(kind, tmp_path):
    """Catches a factor transposed, a wrong scale (rank-stabilised), layers matched wrongly, a score head that is lost:
    merged while the base is read, in a model that goes on with it, and in the copy that draws samples."""
    base, folder, oracle = made_by_peft(tmp_path, *KINDS[kind])
    is_reward = "SEQ_CLS" in KINDS[kind][1].values()
    with torch.no_grad():
        if is_reward:  # of the last token alone
            score = oracle.base_model.model.score
            wanted = score(oracle.base_model.model.model(IDS).last_hidden_state)[..., 0]
        else:
            wanted = oracle(IDS).logits
        files, head = weight_files(base, folder), "score" if is_reward else "lm"
        merged = load_model(base, files=files, param_dtype=torch.float32, head=head)
        torch.testing.assert_close(output_of(merged), wanted, atol=1e-5, rtol=1e-5)
        model = trainable(base, adapter_path=folder)
        torch.testing.assert_close(output_of(model), wanted, atol=1e-5, rtol=1e-5)
        if not is_reward:
            copy = copy_for_inference(model, pack=False)
            torch.testing.assert_close(output_of(copy), wanted, atol=1e-5, rtol=1e-5)
            plain = load_model(base)
            assert (output_of(plain) - wanted).abs().max() > 0.05
            with adapter(model, None):
                assert torch.equal(output_of(model), output_of(plain))
