"""Contrastive training in micro-batches, exactly: the gradients of a large batch with the activations of a small one.

The loss needs the features of all pairs at once, but not the activations that made them, which are far larger. So, as
in GradCache (arXiv 2101.06983):
  1. each micro-batch is embedded without gradient, and the random state before it is remembered;
  2. the loss of all features, gathered from all processes if need be, gives the gradients of the features and of the
     loss's own parameters (temperature, bias), which a model returns beside its features;
  3. each micro-batch is embedded again, by the same random numbers, and its features' gradients go back through it.
The towers' forward pass is computed twice, and processes share gradients once.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared import run


def forward(model: nn.Module, inputs: Sequence[Any], cfg: Any, precision: str) -> tuple[Any, Callable[..., None]]:
    """(What `model(*inputs)` returns, its backward pass), in `cfg.accumulate` micro-batches.

        (image, text, scale), backward = accumulate.forward(model, (images, tokens), cfg, precision)
        loss = clip_loss(image, text, scale)
        optimizer.zero_grad()
        backward(scaler.scale(loss))

    Inputs that are tensors have a row for each sample; others go to every micro-batch as they are. Of the outputs,
    tensors of two or more dimensions have a row for each sample; others are the loss's own parameters. What of the
    loss depends on parameters alone, not on features, is the second argument of `backward`.
    """
    device = next(x.device for x in inputs if torch.is_tensor(x))
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    recomputing = frozen_statistics if getattr(cfg, "grad_checkpointing", False) else contextlib.nullcontext

    def embed(network: nn.Module, batch: Sequence[Any]) -> Any:
        with run.autocast(precision, device):
            return network(*batch)

    if cfg.accumulate == 1:

        def backward_at_once(loss: Tensor, others: Tensor | None = None) -> None:
            with recomputing(bare):
                (loss if others is None else loss + others).backward()

        return embed(model, inputs), backward_at_once

    batches = list(zip(*(x.chunk(cfg.accumulate) if torch.is_tensor(x) else repeat(x) for x in inputs), strict=False))
    states, outputs = [], []
    with torch.no_grad(), frozen_statistics(bare):
        for batch in batches:
            states.append(random_state(device))
            outputs.append(embed(bare, batch))
    leaves = [leaf(parts) for parts in zip(*map(values, outputs), strict=True)]

    def backward(loss: Tensor, others: Tensor | None = None) -> None:
        loss.backward()
        gradients = [parts_of_gradient(x, cfg.accumulate, len(batches)) for x in leaves]
        for batch, state, *of_outputs in zip(batches, states, *gradients, strict=True):
            last = batch is batches[-1]
            set_random_state(state, device)
            with contextlib.nullcontext() if last or bare is model else model.no_sync():
                again = zip(values(embed(model, batch)), of_outputs, strict=True)
                terms = [(x, gradient) for x, gradient in again if gradient is not None and x.requires_grad]
                terms += [(others, None)] if last and others is not None else []
                with recomputing(bare):
                    torch.autograd.backward(*zip(*terms, strict=True))

    return like(outputs[0], leaves), backward


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training normalise as ever, but their running statistics stay as they are.

    For every further time that a step computes a forward pass: statistics count a batch once.
    """
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    norms = [m for m in norms if m.training and m.track_running_stats]
    kept = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


# --------------------------------------------------------------------------------------------------- a model's output


def values(output: Any) -> list[Any]:
    """The parts of a model's output: a tensor, or a tuple or dict of them."""
    if torch.is_tensor(output):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)


def like(output: Any, parts: list[Any]) -> Any:
    """An output like this one, of such parts."""
    if torch.is_tensor(output):
        return parts[0]
    if isinstance(output, dict):
        return dict(zip(output, parts, strict=True))
    return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)


def leaf(parts: Sequence[Any]) -> Any:
    """One part of all micro-batches' outputs, for its gradient: rows as a whole, other tensors as in the first."""
    if not torch.is_tensor(parts[0]):
        return parts[0]
    whole = torch.cat(parts) if parts[0].ndim > 1 else parts[0].detach()
    return whole.requires_grad_(whole.is_floating_point())


def parts_of_gradient(whole: Any, chunks: int, count: int) -> Sequence[Tensor | None]:
    """The gradient of a `leaf` for each of `count` micro-batches: of its rows, or in the last one, of a parameter."""
    gradient = whole.grad if torch.is_tensor(whole) else None
    if gradient is not None and whole.ndim > 1:
        return gradient.chunk(chunks)
    return [*[None] * (count - 1), gradient]


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """States of the generators that a forward pass draws from, the CPU's and the device's."""
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))


def set_random_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
