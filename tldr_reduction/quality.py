"""Compare a reduction with random ones: similarity within clusters, and how well kept samples cover dropped ones, on
features that were not used for the clusters.

Shapes: n samples, D features, k clusters.
"""

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from tldr_reduction.cluster import nearest, train_kmeans

CHECKED = 10_000  # maximum number of samples to compare; from larger data, this many are drawn
DRAWS = 3  # number of random selections that coverage is compared with
WORDS = 2000  # size of the vocabulary to compare captions


def sampled(rows: np.ndarray, labels: np.ndarray | None, seed: int) -> np.ndarray:
    """Draw at most CHECKED of the rows (n,), ascending: whole clusters in random order, except the last, which is cut.

    So a sample is compared together with its copies, which draws of single samples from millions would miss. labels
    (n,): clusters of the rows, or None to draw single samples.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    if labels is not None:
        order = order[np.argsort(rng.permutation(int(labels.max()) + 1)[labels[order]], kind="stable")]
    return np.sort(rows[order[:CHECKED]])


def cohesion(features: Tensor, labels: Tensor) -> float:
    """Mean cosine of two members of one cluster, over all such pairs, 0 if there are none.

    features (n, D), labels (n,) int64.
    """
    unit = F.normalize(features, dim=-1)
    k = int(labels.max()) + 1
    sums = unit.new_zeros(k, unit.shape[1]).index_add_(0, labels, unit)
    sizes = torch.bincount(labels, minlength=k).double()
    pairs = (sizes * (sizes - 1)).sum().item()
    return ((sums.double().square().sum(1) - sizes).sum().item() / pairs) if pairs else 0.0


def coverage(features: Tensor, kept: Tensor) -> float:
    """Mean over the dropped samples of the best cosine with a kept one; features (n, D), kept (n,) bool, True
    for at least one sample and False for at least one."""
    unit = F.normalize(features, dim=-1)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit[kept].contiguous().numpy())
    best, _ = index.search(unit[~kept].contiguous().numpy(), 1)
    return float(best.mean())


def measured(features: Tensor, labels: Tensor | None, kept: Tensor, seed: int) -> dict[str, float | list[float]]:
    """Cohesion of the clusters `labels`, of shuffled clusters and of k-means on the features (no cohesion without
    labels); coverage by the samples `kept`, and by as many random samples, DRAWS times."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, float | list[float]] = {}
    if labels is not None:
        _, labels = labels.unique(return_inverse=True)
        own, _ = train_kmeans(F.normalize(features, dim=-1), int(labels.max()) + 1, seed, niter=5)
        found["cohesion"] = cohesion(features, labels)
        found["cohesion_shuffled"] = cohesion(features, labels[torch.randperm(len(labels), generator=generator)])
        found["cohesion_kmeans"] = cohesion(features, nearest(F.normalize(features, dim=-1), own)[0])
    found["coverage"] = coverage(features, kept)
    draws = [kept[torch.randperm(len(kept), generator=generator)] for _ in range(DRAWS)]
    found["coverage_random"] = [coverage(features, draw) for draw in draws]
    return found


def caption_features(captions: list[str]) -> Tensor | None:
    """Captions as (n, at most WORDS) tf-idf weights of their frequent words; None if they have no words."""
    try:
        weights = TfidfVectorizer(max_features=WORDS, sublinear_tf=True).fit_transform(captions)
    except ValueError:  # empty vocabulary
        return None
    return torch.from_numpy(weights.toarray().astype(np.float32))


def thumbnails(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) at 8 x 8 pixels, less their mean over the image: (B, 192) float32."""
    small = F.adaptive_avg_pool2d(images.float(), 8)
    return (small - small.mean((2, 3), keepdim=True)).flatten(1).cpu()
