"""Contrastive training in micro-batches: the gradients of a large batch in the memory of a small one.

The loss needs the features of all pairs at once, but not the activations behind them. Each micro-batch is embedded,
its activations are forgotten, and the backward pass computes them again: GradCache (arXiv 2101.06983) by torch's own
checkpointing. Training calls the wrapped model as it would call the model; `loss.backward()` stays where it is.
"""

import contextlib
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d)


class MicroBatches(nn.Module):
    """A model that computes its forward pass in `count` micro-batches.

    Tensor inputs have a row for each sample; other inputs are passed to every micro-batch. Of the outputs (a tensor,
    named tuple, tuple or dict), tensors of two or more dimensions have a row for each sample and are concatenated;
    others are parameters of the loss, such as a temperature, and are taken from the first micro-batch.
    """

    def __init__(self, model: nn.Module, count: int):
        super().__init__()
        self.module, self.count = model, count  # named as in torch's wrappers

    def forward(self, *inputs: Any) -> Any:
        chunks = zip(*(x.chunk(self.count) if torch.is_tensor(x) else repeat(x) for x in inputs), strict=False)
        outputs = []
        for chunk in chunks:
            torch.clear_autocast_cache()  # else gradients of micro-batches would be summed in half precision
            outputs.append(recomputed(self.module, self.module, *chunk))
        first = outputs[0]
        if torch.is_tensor(first):
            return torch.cat(outputs)
        if isinstance(first, dict):
            return {name: joined([output[name] for output in outputs]) for name in first}
        parts = map(joined, zip(*outputs, strict=True))
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def joined(parts: tuple[Any, ...] | list[Any]) -> Any:
    whole = torch.is_tensor(parts[0]) and parts[0].ndim > 1
    return torch.cat(list[Tensor](parts)) if whole else parts[0]


def micro_batches(model: nn.Module, count: int) -> nn.Module:
    """The model itself for one micro-batch a step, else the model in `MicroBatches`."""
    return model if count == 1 else MicroBatches(model, count)


def recomputed(model: nn.Module, function: Callable, *inputs: Any) -> Any:
    """`function(*inputs)`, whose activations the backward pass computes again instead of keeping them.

    In the second pass, batch norms of `model` do not update their running statistics: each batch counts once.
    """
    contexts = lambda: (contextlib.nullcontext(), frozen_statistics(model))  # noqa: E731
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which batch norms in training mode do not update their running statistics."""
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.training and m.track_running_stats]
    kept = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
