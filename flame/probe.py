"""clip-benchmark's linear probe with AdamW, with which FLAME (arXiv 2411.11927) measures features of the image tower.

LAION-AI/CLIP_benchmark@48de38c, `B:`. The features are unit rows; `eval.linear_probe` makes them so.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from shared.probes import Probe, fit


def adamw_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    epochs: int = 20,
    lr: float = 0.1,
    batch_size: int = 512,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> Probe:
    """AdamW on features (N, D), labels (N,), cosine by step to 0 without warm-up. B:metrics/linear_probe.py.

    validation: features and labels on which the weight decay is chosen from 1e-6..1e2 (`log_sweep`) before the probe is
    fitted to training and validation split together; without, there is no weight decay.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(train_x.shape[1], int(train_y.max()) + 1)
    init = layer.weight.detach(), layer.bias.detach()

    def probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, decay: float) -> Probe:
        def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)

        return Probe(*fit(x, y, test_x, test_y, optimizer, init, epochs, batch_size, True, seed, by_step=True), decay)

    if validation is None:
        return probe(train_x, train_y, test_x, test_y, 0.0)
    best = log_sweep(lambda decay: probe(train_x, train_y, *validation, decay).final, -6, 2)
    return probe(torch.cat([train_x, validation[0]]), torch.cat([train_y, validation[1]]), test_x, test_y, best)


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
