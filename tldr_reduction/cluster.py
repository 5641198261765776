"""TL;DR's selection: code vectors -> whitened features -> clusters -> a fixed share of each; and baseline selections.

Authors' code: showlab/datacentric.vlp@a488102, cited as `U:`.

Shapes: N samples, L' codes a sample, d whitened dimensions, k clusters.
"""

from fractions import Fraction
from typing import NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError

POINTS = 256  # vectors per cluster that k-means is trained on, at most; upstream trains on all
CHUNK = 2**12  # code vectors per chunk of whitening and assignment, which fit the cache as float32

# --------------------------------------------------------------------------------------------------------- whitening


class Whitening(NamedTuple):
    """x -> norm((x - mean) axes); an axis is an eigenvector of the covariance divided by the root of its eigenvalue."""

    mean: Tensor  # (L',) float32
    axes: Tensor  # (L', d) float32

    def __call__(self, x) -> Tensor:
        """(n, L') of any type -> (n, d) float32, vectors of unit length; one that equals the mean becomes 0."""
        projected = torch.addmm(-(self.mean @ self.axes), as_float(x), self.axes)
        return projected / projected.norm(dim=1, keepdim=True).clamp(min=1e-12)


def as_float(x) -> Tensor:
    """A tensor or (memory-mapped) array as a float32 tensor."""
    return x.float() if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x, dtype=np.float32))


def fit_whitening(x, dim: int = 256) -> Whitening:
    """PCA-whitening of (n, L') to at most `dim` axes. U:fast_cluster.py:35-56 (faiss' PCAMatrix, eigen_power -0.5).

    Axes with an eigenvalue below 1e-6 of the largest are left out: constant positions would be divided by zero.
    """
    shift = as_float(x[:CHUNK]).mean(0)  # near the mean, so that fp32 is enough
    total, covariance = torch.zeros(x.shape[1]), torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for first in range(0, len(x), CHUNK):
        shifted = as_float(x[first : first + CHUNK]) - shift
        total += shifted.sum(0)
        covariance += shifted.T @ shifted
    rest = total / len(x)
    mean, covariance = shift + rest, covariance / len(x) - torch.outer(rest, rest)
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    values, vectors = values.flip(0)[:dim], vectors.flip(1)[:, :dim]
    good = values > 1e-6 * values[0].clamp(min=1e-12)
    if not bool(good.any()):  # all vectors are equal: one axis, on which all are 0
        return Whitening(mean, torch.zeros(x.shape[1], 1))
    return Whitening(mean, (vectors[:, good] / values[good].sqrt()).float())


def whitened(whitening: Whitening, x) -> Tensor:
    """`whitening` of (N, L') in chunks: (N, d)."""
    return torch.cat([whitening(x[first : first + CHUNK]) for first in range(0, len(x), CHUNK)])


# ----------------------------------------------------------------------------------------------------------- k-means


def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) int64 nearest centroid and (N,) float32 squared distance to it."""
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids.contiguous().numpy())
    distances, labels = index.search(x.contiguous().numpy(), 1)
    return torch.from_numpy(labels[:, 0]), torch.from_numpy(distances[:, 0])


def train_kmeans(x: Tensor, k: int, seed: int, niter: int = 20) -> tuple[Tensor, Tensor]:
    """Centroids (k, d), and the objective (iterations,), the sum of squared distances. U:fast_cluster.py:59-100.

    faiss' Lloyd iterations on all vectors x (N, d), starting from k random ones; an empty cluster takes half of a big
    one.
    """
    x = as_float(x).detach().cpu().contiguous()
    if not 1 <= k <= len(x):
        raise UserError(f"{len(x)} samples cannot make {k} clusters: choose --clusters between 1 and {len(x)}")
    clustering = faiss.Clustering(x.shape[1], k)
    clustering.seed, clustering.niter = seed, niter
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, 10_000_000
    clustering.train(x.numpy(), faiss.IndexFlatL2(x.shape[1]))
    centroids = torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(k, -1).copy())
    stats = clustering.iteration_stats
    objective = torch.tensor([stats.at(i).obj for i in range(stats.size())])
    still = ((objective[1:] == objective[:-1]) & (objective[1:] != 0)).nonzero().flatten()  # newer faiss stops here
    return centroids, objective[: int(still[0]) + 2] if len(still) else objective


class Clusters(NamedTuple):
    """Clusters of N samples."""

    assignment: Tensor  # (N,) int64
    dist2: Tensor  # (N,) float32 squared distance to the centroid
    objective: Tensor  # (iterations,) on the training vectors
    dim: int  # axes kept


def cluster_codes(codes, k: int, seed: int = 0, dim: int = 256) -> Clusters:
    """Code vectors (N, L'), in memory or memory-mapped -> clusters, in bounded memory.

    Whitening is trained on at most 1000 L' vectors and k-means on at most POINTS*k; all vectors are
    whitened and assigned in chunks, so that memory holds only the codes and (N,) results.
    """
    rng = np.random.default_rng(seed)
    n = len(codes)

    def sample(limit: int):
        return codes[:] if n <= limit else codes[np.sort(rng.choice(n, limit, replace=False))]

    whitening = fit_whitening(sample(1000 * codes.shape[1]), dim)
    features = whitened(whitening, sample(POINTS * k))
    centroids, objective = train_kmeans(features, k, seed)
    chunks = [nearest(whitening(codes[first : first + CHUNK]), centroids) for first in range(0, n, CHUNK)]
    assignment, dist2 = (torch.cat(of_chunks) for of_chunks in zip(*chunks, strict=True))
    return Clusters(assignment, dist2, objective, features.shape[1])


# --------------------------------------------------------------------------------------------------------- selection


def in_cluster(assignment: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples (N,) ordered by cluster, then by index; the position (N,) of each in its cluster; cluster sizes (k,)."""
    assignment = torch.as_tensor(assignment)
    order = torch.argsort(assignment, stable=True)
    sizes = torch.bincount(assignment, minlength=k)
    return order, torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[assignment[order]], sizes


def share_of(fraction: float) -> Fraction:
    """0.25 -> 1/4, the intended fraction, so that rounding errors do not add one to ceil(size * share)."""
    return Fraction(fraction).limit_denominator(10**6)


def select_fraction(assignment: Tensor, k: int, fraction: float, seed: int | None = None) -> Tensor:
    """ceil(size * fraction) samples of each cluster, evenly spaced, cluster by cluster. U:codebook_cluster.py:58-78.

    It uses no distance and no score ("uniform"). For a fraction of 1/n these are the positions 0, n, 2n... of each
    cluster. `seed` draws the member of each cluster where cyclic counting starts, so that all members are equally
    likely to be kept. None starts from the first member, as upstream, which favours the beginning of the file.
    """
    share = share_of(fraction)
    order, position, sizes = in_cluster(assignment, k)
    if seed is not None:
        first = (torch.rand(k, generator=torch.Generator().manual_seed(seed)) * sizes).long()
        cluster = torch.as_tensor(assignment)[order]
        position = (position - first[cluster]) % sizes[cluster]
    up_to = lambda p: -(-p * share.numerator // share.denominator)  # noqa: E731  number kept of the first p
    return order[up_to(position + 1) > up_to(position)]


def select_by_distance(assignment: Tensor, dist2: Tensor, k: int, fraction: float) -> Tensor:
    """The ceil(size * fraction) samples of each cluster farthest from its centroid; an ablation (table 2b)."""
    share = share_of(fraction)
    assignment, dist2 = torch.as_tensor(assignment), torch.as_tensor(dist2)
    by_distance = torch.argsort(-dist2, stable=True)
    order, position, sizes = in_cluster(assignment[by_distance], k)
    samples = by_distance[order]
    wanted = -(-sizes * share.numerator // share.denominator)
    kept = samples[position < wanted[assignment[samples]]]
    return kept[torch.argsort(assignment[kept] * len(assignment) + kept)]


def random_subset(n: int, fraction: float, seed: int) -> Tensor:
    """round(n * fraction) samples, ascending, by a seeded permutation (upstream's "random" is the first quarter)."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(n)[: round(n * fraction)]))


def keep_top(scores: Tensor, fraction: float) -> Tensor:
    """(N,) bool: the round(N * fraction) highest scores; ties in favour of earlier samples."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[torch.argsort(-torch.as_tensor(scores), stable=True)[: round(len(scores) * fraction)]] = True
    return kept
