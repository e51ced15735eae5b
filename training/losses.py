"""Losses, as pure functions of tensors.

Dimensions: B batch, T tokens, E model dim, V vocabulary.
"""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.tp import linear_cross_entropy


def token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    tp: DeviceMesh | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The summed next-token cross entropy (nats, fp32 scalar) of a batch: divide by the number of targets of the whole
    optimizer step, over micro-batches and ranks, for its token mean.

    hidden [B, T, E] final hidden states; weight [V, E] of the language-model head, or this tp rank's rows of it (then
    with vocab_size, the V of all ranks); labels int64 [B, T], not shifted: the hidden state at t predicts labels[t +
    1]. Only positions with a label are projected. 0, with gradients 0, if there is none.
    """
    targets = labels[:, 1:].reshape(-1)
    learnt = (targets != ignore_index).nonzero()[:, 0]
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, learnt)
    return linear_cross_entropy(hidden, weight, targets.index_select(0, learnt), vocab_size=vocab_size, tp=tp)
