"""Networks with several members, whose raw outputs are [n, members, outputs]: the loss of a row is the mean of its members'."""

from __future__ import annotations

from torch import Tensor

from engine.training.loss import Loss


def row_losses(loss: Loss, logits: Tensor, target: Tensor) -> Tensor:
    """Loss of each row float32[n] from raw outputs [n, outputs] or [n, members, outputs] and targets [n]."""
    if logits.dim() == 2:
        return loss.row_losses(logits, target)
    rows, members, _ = logits.shape
    return loss.row_losses(logits.flatten(0, 1), target.repeat_interleave(members)).view(rows, members).mean(1)
