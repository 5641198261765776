"""Contrastive training in micro-batches: the gradients of a large batch in the memory of a small one.

The loss needs the features of all pairs at once, but not the activations behind them. Each micro-batch is embedded,
its activations are forgotten, and the backward pass computes them again: GradCache (arXiv 2101.06983) by torch's own
checkpointing. Training calls the wrapped model as it would call the model; `loss.backward()` stays where it is.
"""

import contextlib
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared.clip import frozen_statistics, recomputed


class MicroBatches(nn.Module):
    """A model that computes its forward pass in `count` micro-batches.

    Tensor inputs have a row for each sample; other inputs are passed to every micro-batch. Of the outputs (a tensor,
    named tuple, tuple or dict), tensors of two or more dimensions have a row for each sample and are concatenated;
    others are parameters of the loss, such as a temperature, and are taken from the first micro-batch.
    """

    def __init__(self, model: nn.Module, count: int):
        super().__init__()
        self.model, self.count = model, count

    def forward(self, *inputs: Any) -> Any:
        chunks = zip(*(x.chunk(self.count) if torch.is_tensor(x) else repeat(x) for x in inputs), strict=False)
        outputs = []
        for chunk in chunks:
            torch.clear_autocast_cache()  # else gradients of micro-batches would be summed in half precision
            outputs.append(recomputed(self.model, self.model, *chunk))
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


def forward(model: nn.Module, inputs: Sequence[Any], cfg: Any, precision: str) -> tuple[Any, Callable[..., None]]:
    """Compute `model(*inputs)` in `cfg.accumulate` micro-batches -> (its output, a function for the backward pass).

        (image, text, scale), backward = accumulate.forward(model, (images, tokens), cfg, precision)
        loss = clip_loss(image, text, scale)
        optimizer.zero_grad()
        backward(scaler.scale(loss))

    Tensor inputs have one row per sample; other inputs are passed to every micro-batch unchanged. Output tensors of two
    or more dimensions have one row per sample; other outputs are the loss's own parameters. Pass loss terms that depend
    on parameters only, not on features, as the second argument of `backward`.
    """
    device = next(x.device for x in inputs if torch.is_tensor(x))
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    recomputing = frozen_statistics if getattr(cfg, "grad_checkpointing", False) else contextlib.nullcontext

    def embed(network: nn.Module, batch: Sequence[Any]) -> Any:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
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
    leaves = [leaf(of_batches) for of_batches in zip(*map(values, outputs), strict=True)]

    def backward(loss: Tensor, others: Tensor | None = None) -> None:
        loss.backward()
        gradients = [split_gradient(x, cfg.accumulate, len(batches)) for x in leaves]
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


# --------------------------------------------------------------------------------------------------- a model's output


def values(output: Any) -> list[Any]:
    """List of a model's outputs; `output` is a tensor, or a tuple or dict of outputs."""
    if torch.is_tensor(output):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)


def like(output: Any, found: list[Any]) -> Any:
    """Put a list of values into the container type of `output` (tensor, tuple, named tuple or dict)."""
    if torch.is_tensor(output):
        return found[0]
    if isinstance(output, dict):
        return dict(zip(output, found, strict=True))
    return type(output)(*found) if hasattr(output, "_fields") else tuple(found)


def leaf(of_batches: Sequence[Any]) -> Any:
    """An output of each micro-batch -> a leaf tensor of the batch: features are concatenated; a parameter of the loss
    is the same in all of them, and taken from the first."""
    first = of_batches[0]
    if not torch.is_tensor(first):
        return first
    whole = torch.cat(of_batches) if first.ndim > 1 else first.detach()
    return whole.requires_grad_(whole.is_floating_point())


def split_gradient(whole: Any, chunks: int, count: int) -> Sequence[Tensor | None]:
    """Split a `leaf`'s gradient into those of the micro-batches; a parameter's gradient goes to the last of them."""
    gradient = whole.grad if torch.is_tensor(whole) else None
    if gradient is not None and whole.ndim > 1:
        return gradient.chunk(chunks)
    return [*[None] * (count - 1), gradient]


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """States of the random generators of the CPU and of the device."""
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))


def set_random_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
