"""Feature-space analysis and accuracy: pure functions on tensors, all offered by `nmtune.eval`, too.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning@f249dce, `U:`. The paper's contribution here
is to read the effect of pre-training noise off the singular values of a test set's features F (M, D):
`feature_spectrum`, `singular_value_entropy` (SVE), `largest_singular_value_ratio` (LSVR).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CENTRES = ("none", "sample", "sample+feature")


def feature_spectrum(features: Tensor, normalize: bool = True, center: str = "sample") -> Tensor:
    """Singular values of F (M, D), descending, fp64: (min(M, D),).

    `normalize` scales each row to length 1 first. `center`: "none" (the paper's words); "sample" takes off each row
    its own mean over D (U:src/models/svd.py:38-58); "sample+feature" the mean over rows, too (U:src/models/pca.py:38).
    """
    if center not in CENTRES:
        raise ValueError(f"center is one of {', '.join(CENTRES)}, not {center!r}")
    x = features.double()
    if normalize:
        x = F.normalize(x, dim=1)
    if center != "none":
        x = x - x.mean(dim=1, keepdim=True)
    if center == "sample+feature":
        x = x - x.mean(dim=0)
    return torch.linalg.svdvals(x)


def singular_value_entropy(s: Tensor) -> Tensor:
    """SVE = -sum_i p_i ln p_i with p = s / sum(s), of singular values (K,) -> () in [0, ln K]. Zeros count 0."""
    p = s / s.sum()
    return torch.special.entr(p).sum()


def largest_singular_value_ratio(s: Tensor) -> Tensor:
    """LSVR = -ln(s_1 / sum(s)) of singular values (K,) -> () >= 0; larger: the largest has less share."""
    return -torch.log(s.max() / s.sum())


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 of logits (N, C) and labels (N,), a fraction in [0, 1]. U:src/models/eval.py:14-60."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the recall of each, a fraction. U:src/datasets/flowers102.py."""
    hits = torch.bincount(labels, (logits.argmax(dim=1) == labels).double())
    counts = torch.bincount(labels)
    return (hits / counts)[counts > 0].mean().item()


def project_logits(logits: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """(N, K) -> (N, G): the maximum over each group of classes; single-member groups select columns.

    ImageNet-A/-R: U:src/datasets/imagenet.py:105-111; ObjectNet: U:src/datasets/objectnet.py:110-120; Vid-Robust:
    U:src/datasets/imagenet_vid_robust.py:54-73.
    """
    members = torch.tensor([member for group in groups for member in group], device=logits.device)
    group_of = torch.repeat_interleave(torch.tensor([len(group) for group in groups])).to(logits.device)
    projected = logits.new_full((len(logits), len(groups)), -torch.inf)
    return projected.scatter_reduce_(1, group_of.expand(len(logits), -1), logits[:, members], "amax")


def pmk_accuracy(
    logits: Tensor, accepted: Sequence[Sequence[int]], sets: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """ImageNet-Vid-Robust's (pm-0, pm-k), fractions. U:src/datasets/imagenet_vid_robust.py:113-136.

    logits (frames, C); accepted[j] holds the right classes of frame j; a set lists frames, its anchor first.
    pm-0 counts right anchors, pm-k sets of which every frame is right.
    """
    right = torch.tensor([p in ok for p, ok in zip(logits.argmax(dim=1).tolist(), accepted, strict=True)])
    anchors = right[torch.tensor([frames[0] for frames in sets])]
    every = torch.stack([right[torch.as_tensor(frames)].all() for frames in sets])
    return anchors.double().mean().item(), every.double().mean().item()
