"""Linear probes on frozen features: SGD and AdamW recipes of the papers, and L-BFGS logistic regression.

Functions take features (N, D) and labels (N,) int64, and return accuracies in percent.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from shared.zeroshot import chunks, per_class_accuracy, percent


class Probe(NamedTuple):
    """A linear probe; logits are `x @ weight.T + bias`, to be given to `classification_metrics` for more than top-1."""

    best: float  # test top-1 of the best epoch, in percent: chosen on the test set, as some papers report it
    final: float  # test top-1 after the last epoch, in percent
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    weight_decay: float


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
    """SGD with momentum on features as they come; the learning rate falls by epoch along a cosine to 0.

    The defaults are ProtoCLIP's recipe (megvii-research/protoclip@fde1933 src/training/evaluations/linear_eval.py:12);
    SLIP's and A-CLIP's has weight decay 0, 90 epochs and shuffling. init: weight (C, D) and bias (C,), by default
    N(0, 0.01) and 0.
    """
    if init is None:
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(int(train_y.max()) + 1, train_x.shape[1], generator=generator)
        init = weight, torch.zeros(len(weight))

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)

    data = train_x, train_y, test_x, test_y
    return Probe(*_fit(*data, optimizer, init, epochs, batch_size, shuffle, seed, by_step=False), weight_decay)


def adamw_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    epochs: int = 20,
    lr: float = 0.1,
    weight_decay: float = 0.0,
    batch_size: int = 512,
    shuffle: bool = True,
    init: tuple[Tensor, Tensor] | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> Probe:
    """clip-benchmark's probe: AdamW, cosine by step to 0 without warm-up; it is given unit features there.

    init: by default that of nn.Linear. validation: features and labels on which the weight decay is chosen from
    1e-6..1e2 (`log_sweep`) before the probe is fitted to training and validation split together.
    """
    if init is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = torch.nn.Linear(train_x.shape[1], int(train_y.max()) + 1)
        init = layer.weight.detach(), layer.bias.detach()

    def fit(x, y, test_x, test_y, decay):
        def optimizer(parameters):
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)

        return Probe(*_fit(x, y, test_x, test_y, optimizer, init, epochs, batch_size, shuffle, seed, True), decay)

    if validation is None:
        return fit(train_x, train_y, test_x, test_y, weight_decay)
    best = log_sweep(lambda decay: fit(train_x, train_y, *validation, decay).final, -6, 2)
    return fit(torch.cat([train_x, validation[0]]), torch.cat([train_y, validation[1]]), test_x, test_y, best)


def _fit(
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
) -> tuple[float, float, Tensor, Tensor]:
    """Cross-entropy on (x, y), the last short batch included -> best and final test top-1, weight (C, D), bias (C,)."""
    weight, bias = (tensor.detach().clone().to(train_x).requires_grad_() for tensor in init)
    optimizer = make_optimizer([weight, bias])
    base_lr = optimizer.param_groups[0]["lr"]
    generator = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(train_x) / batch_size)
    best = final = 0.0
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
        with torch.no_grad():  # a label that training never showed cannot be hit
            parts = chunks(len(test_x), len(bias))
            predictions = torch.cat([F.linear(test_x[rows], weight, bias).argmax(dim=1) for rows in parts])
        final = percent(predictions == test_y)
        best = max(best, final)
    return best, final, weight.detach(), bias.detach()


def logistic_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    C: float = 0.316,
    max_iter: int = 1000,
    validation: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """CLIP's linear probe: scikit-learn's L-BFGS logistic regression -> {"top1", "mean_per_class", "C"}, in percent.

    C: inverse L2 strength (CLIP's example: 0.316). validation: features and labels on which C is chosen from 1e-6..1e6
    as in CLIP's appendix A.3 (`log_sweep`) before the probe is fitted to training and validation split together.
    """

    def hits(C, x, y, test_x, test_y):
        model = LogisticRegression(C=C, max_iter=max_iter, random_state=0).fit(x.cpu().numpy(), y.cpu().numpy())
        return torch.from_numpy(model.predict(test_x.cpu().numpy())) == test_y.cpu()

    if validation is not None:
        C = log_sweep(lambda C: percent(hits(C, train_x, train_y, *validation)), -6, 6)
        train_x, train_y = torch.cat([train_x, validation[0]]), torch.cat([train_y, validation[1]])
    hit = hits(C, train_x, train_y, test_x, test_y)
    per_class = per_class_accuracy(hit, test_y.cpu(), int(test_y.max()) + 1)
    return {"top1": percent(hit), "mean_per_class": per_class.nanmean().item(), "C": C}


def log_sweep(score: Callable[[float], float], low: int, high: int) -> float:
    """The best of 97 log-spaced values from 10^low to 10^high, by CLIP's parametric binary search (appendix A.3).

    Scores 7 of them, then twice as finely around the peak, four times over. Of equal scores the smaller value wins.
    """
    values = np.logspace(low, high, 97).tolist()
    scores: dict[int, float] = {}

    def peak(candidates: Iterable[int]) -> int:
        for i in candidates:
            if i not in scores:
                scores[i] = score(values[i])
        return max(candidates, key=scores.__getitem__)

    best = peak(range(0, 97, 16))
    for span in (8, 4, 2, 1):
        best = peak([max(best - span, 0), best, min(best + span, 96)])
    return values[best]
