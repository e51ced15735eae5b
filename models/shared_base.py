"""Two models on one frozen base: a policy and its critic, each with adapters and a head of its own."""

from collections.abc import Iterator

from torch import Tensor, nn

from models.lora import CRITIC, switch
from models.model import Transformer

HEADS = {"": "lm_head", CRITIC: "score"}  # by the adapters


class OnSharedBase(nn.Module):
    """One of them: the base, as a forward finds it with these adapters on, and of its parameters those that are not the
    other's. In all else it is the Transformer that it stands on."""

    def __init__(self, base: Transformer, adapter: str):
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, *inputs) -> Tensor:
        switch(self.base, self.adapter)  # and not back: a backward may compute the forward again
        return self.base(*inputs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def owns(self, name: str) -> bool:
        """Whether a parameter of the base is this one's, or both have it."""
        of_critic = name.endswith(CRITIC) or name.startswith(HEADS[CRITIC])
        return of_critic == (self.adapter == CRITIC) or (
            not of_critic and "lora_" not in name and HEADS[""] not in name
        )

    def named_parameters(self, *args, **options) -> Iterator[tuple[str, nn.Parameter]]:
        return (each for each in self.base.named_parameters(*args, **options) if self.owns(each[0]))
