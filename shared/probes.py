"""Probes of frozen features: nearest neighbour, and the linear SGD probe of ProtoCLIP, SLIP and A-CLIP.

FLAME's AdamW probe is in flame/eval.py, ProtoCLIP's L-BFGS probe in protoclip/eval.py.

Functions take features (N, D) and labels (N,) int64; accuracies are in percent.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.zeroshot import chunks, percent


class Probe(NamedTuple):
    """A linear probe; its logits `x @ weight.T + bias` can be passed to `classification_metrics` for other metrics."""

    best: float  # test top-1 of the best epoch, in percent; selected on the test set, as in some papers
    final: float  # test top-1 after the last epoch, in percent
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    hits: Tensor  # (N,) bool: test samples that the best epoch gets right
    weight_decay: float


def nearest_neighbour(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Top-1 in percent when the prediction is the label of the training sample with the highest cosine similarity."""
    train_x, test_x = F.normalize(train_x, dim=-1), F.normalize(test_x, dim=-1)
    nearest = torch.cat([(test_x[rows] @ train_x.T).argmax(dim=1) for rows in chunks(len(test_x), len(train_x))])
    return percent(train_y[nearest] == test_y)


def sgd_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    epochs: int = 100,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-6,
    batch_size: int = 1024,
    shuffle: bool = False,
    init: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> Probe:
    """Linear probe by SGD with momentum, on unnormalised features; the learning rate is a cosine by epoch to 0.

    The defaults are ProtoCLIP's recipe (megvii-research/protoclip@fde1933 src/training/evaluations/linear_eval.py:12);
    SLIP and A-CLIP use weight decay 0, 90 epochs and shuffling. init: weight (C, D) and bias (C,), by default
    N(0, 0.01) and 0.
    """
    if init is None:
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(int(train_y.max()) + 1, train_x.shape[1], generator=generator)
        init = weight, torch.zeros(len(weight))

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)

    data = train_x, train_y, test_x, test_y
    return Probe(*fit(*data, optimizer, init, epochs, batch_size, shuffle, seed, by_step=False), weight_decay)


def fit(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    init: tuple[Tensor, Tensor],
    epochs: int,
    batch_size: int,
    shuffle: bool,
    seed: int,
    by_step: bool,
) -> tuple[float, float, Tensor, Tensor, Tensor]:
    """Train with cross-entropy, also on a short last batch -> best and final test top-1, weight (C, D), bias (C,), and
    the hits (N,) of the best epoch.

    The learning rate is a cosine to 0, by step or by epoch. Test labels that are not in the training set are misses.
    """
    weight, bias = (tensor.detach().clone().to(train_x).requires_grad_() for tensor in init)
    optimizer = make_optimizer([weight, bias])
    base_lr = optimizer.param_groups[0]["lr"]
    generator = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(train_x) / batch_size)
    best = final = 0.0
    hits = torch.zeros(len(test_y), dtype=torch.bool)
    for epoch in range(epochs):
        order = torch.randperm(len(train_x), generator=generator).to(train_x.device) if shuffle else None
        for step in range(steps):
            progress = (epoch * steps + step) / (epochs * steps) if by_step else epoch / epochs
            optimizer.param_groups[0]["lr"] = base_lr * (1 + math.cos(math.pi * progress)) / 2
            batch = slice(step * batch_size, (step + 1) * batch_size)
            batch = batch if order is None else order[batch]
            optimizer.zero_grad()
            F.cross_entropy(F.linear(train_x[batch], weight, bias), train_y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            parts = chunks(len(test_x), len(bias))
            predictions = torch.cat([F.linear(test_x[rows], weight, bias).argmax(dim=1) for rows in parts])
        final = percent(predictions == test_y)
        if final > best:
            best, hits = final, predictions == test_y
    return best, final, weight.detach(), bias.detach(), hits
