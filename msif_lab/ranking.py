"""Who comes first: rankings of examples, and the two ends of rankings too long to keep."""

import torch
from torch import Tensor

__all__ = ["detection"]


def detection(order: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of flagging the first 1, 2, ... N of a ranking, ``(N,)`` each.

    Args:
        order: all N positions, the most suspicious first.
        truth: ``(N,)`` mask of those that should be found.

    Raises:
        ValueError: not a ranking of all, or nothing to find.

    >>> detection(torch.tensor([2, 0, 1]), torch.tensor([False, True, True]))
    (tensor([1.0000, 0.5000, 0.6667]), tensor([0.5000, 0.5000, 1.0000]))
    """
    order, truth = torch.as_tensor(order).cpu(), torch.as_tensor(truth).cpu()
    if truth.dtype != torch.bool or truth.ndim != 1 or not bool(truth.any()):
        raise ValueError(
            f"truth is {truth.dtype} of shape {tuple(truth.shape)}: a mask with something to find is needed"
        )
    if not torch.equal(order.sort().values, torch.arange(len(truth))):
        raise ValueError(f"order of shape {tuple(order.shape)} must rank the {len(truth)} examples, each once")
    found = truth[order].cumsum(0).to(torch.get_default_dtype())
    return found / torch.arange(1, len(truth) + 1), found / int(truth.sum())
