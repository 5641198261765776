"""Noise in supervision: flipped labels and swapped captions, on numbers alone.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning, `U:` = @f249dce, `U0:` = its first, @e9c5fb1.
"""

import random

import numpy as np


def flip_labels(
    labels: np.ndarray, num_classes: int, ratio: float, rng: np.random.RandomState, exclude_true: bool = True
) -> np.ndarray:
    """Give the first ceil(ratio N) of N permuted labels a random class -> (N,) noisy labels.

    exclude_true: uniform on the other classes (the paper's pre-training noise), so that exactly that share is wrong.
    Otherwise on all classes (U:src/datasets/common.py:184-195), which leaves ratio (1 - 1/C) wrong.
    """
    noisy = np.array(labels)
    selected = rng.permutation(len(noisy))
    selected = selected[np.arange(len(noisy)) < ratio * len(noisy)]
    if exclude_true and num_classes > 1:
        noisy[selected] = (noisy[selected] + rng.randint(1, num_classes, size=len(selected))) % num_classes
    else:
        noisy[selected] = rng.randint(num_classes, size=len(selected), dtype=np.int32)
    return noisy


def flip_labels_per_sample(labels: np.ndarray, num_classes: int, p: float, rng: random.Random) -> np.ndarray:
    """Each label, with probability p, becomes any class -> (N,). U:src/datasets/common.py:27-40."""
    return np.array([rng.randint(0, num_classes - 1) if rng.random() < p else label for label in labels])


def swap_captions(n: int, num_swaps: int, rng: random.Random) -> np.ndarray:
    """Swap the captions of two random pairs, `num_swaps` times -> (n,) int64: whose caption each pair ends with.

    U0:open_clip/shuffle_data.py:24-34. Captions are permuted, none is lost; pairs hit twice make the share that moved
    1 - exp(-2 num_swaps/n), a little less than 2 num_swaps/n.
    """
    source = np.arange(n)
    for _ in range(num_swaps):
        a, b = rng.sample(range(n), 2)
        source[a], source[b] = source[b], source[a]
    return source
