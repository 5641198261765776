"""Scores of single pictures, with which an interval can also cover the choice of a small set's pictures.

Beside a metric that is a mean over fewer than SMALL pictures, metrics have "METRIC by picture", a text with the score
of each picture in percent, in the order of the set; the mean of the scores is the metric.
"""

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALL = 1000
SUFFIX = " by picture"


def packed(scores: Any) -> str:
    """Scores (N,) as text: their different values, then the index of each picture's value, compressed."""
    values, index = np.unique(np.round(np.asarray(scores, dtype=float), 9), return_inverse=True)
    content = base64.b64encode(zlib.compress(index.astype("<u2").tobytes(), 9)).decode()
    return " ".join([*map(repr, values.tolist()), content])


def unpacked(text: str) -> np.ndarray:
    """The scores (N,) in a text of `packed`."""
    *values, content = text.split()
    return np.array(values, dtype=float)[np.frombuffer(zlib.decompress(base64.b64decode(content)), dtype="<u2")]


def by_picture(metric: str, scores: Tensor) -> dict[str, str]:
    """{"METRIC by picture": scores (N,) as text}; {} from SMALL pictures on."""
    return {metric + SUFFIX: packed(scores.cpu())} if len(scores) < SMALL else {}


def of_pictures(of_captions: Tensor, owners: Tensor, pictures: int) -> Tensor:
    """Scores (T,) of captions -> (I,) of their pictures, with the same mean; owners: the picture (T,) of each."""
    total = torch.zeros(pictures, dtype=torch.float64).index_add_(0, owners, of_captions.double())
    return total * pictures / len(owners)


def mean(values: Sequence[float | str]) -> float | str:
    """The mean of numbers; of texts, which are about the same pictures, the mean of each picture's scores as text."""
    if isinstance(values[0], str):
        return packed(np.mean([unpacked(text) for text in values], axis=0))
    return float(np.mean(values))


def joined(texts: Sequence[str]) -> str:
    """Scores of several sets as those of one, whose mean is the mean of the sets' means."""
    sets = [unpacked(text) for text in texts]
    total = sum(map(len, sets))
    return packed(np.concatenate([scores * total / (len(sets) * len(scores)) for scores in sets]))


def renamed(found: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """A metric of `found` under another name, with the scores of pictures that it may have."""
    return {new + end: found[old + end] for end in ("", SUFFIX) if old + end in found}
