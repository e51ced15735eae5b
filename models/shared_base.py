"""Several models on one frozen base: a policy with its adapters on, its reference without them, and its critic with
adapters and a head of its own."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from models.lora import CRITIC, REFERENCE, LoraLinear
from models.model import Transformer


def lora_layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def switch(model: nn.Module, name: str | None) -> None:
    """Switches on the adapters of this name, and the others off; None: all off."""
    for layer in lora_layers(model):
        layer.adapter = name


@contextmanager
def adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """switch(), within the context; does nothing on a model without adapters."""
    before = next((layer.adapter for layer in lora_layers(model)), None)
    switch(model, name)
    try:
        yield
    finally:
        switch(model, before)


def as_reference(model: Transformer) -> AbstractContextManager[None]:
    """Within the context, a policy with adapters is its reference: those that the run began with are on, or none."""
    return adapter(model, REFERENCE if model.lora is not None and model.lora.with_reference else None)


class OnSharedBase(nn.Module):
    """One of these models: its forward runs the base with its adapters on, and its parameters are those of the base
    that are not another model's. In all else it is the base."""

    def __init__(self, base: Transformer, adapter: str):
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, *inputs) -> Tensor:
        switch(self.base, self.adapter)  # not switched back, since the backward may recompute the forward
        return self.base(*inputs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def owns(self, name: str) -> bool:
        """Whether a parameter of the base belongs to this model, or to all."""
        of_critic = name.endswith(CRITIC) or name.startswith("score")
        return of_critic == (self.adapter == CRITIC) or (
            not of_critic and "lora_" not in name and "lm_head" not in name
        )

    def named_parameters(self, *args, **options) -> Iterator[tuple[str, nn.Parameter]]:
        return (each for each in self.base.named_parameters(*args, **options) if self.owns(each[0]))
