"""L_COV and L_SVD of model.py, computed from the smaller Gram matrix: equal to rounding, and several times faster.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning@f249dce, `U:`. Both take z (n, D); fp64 is used
where fp32 would lose digits. `model.nmtune_loss` uses these functions.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.errors import UserError


def covariance_loss(z: Tensor) -> Tensor:
    """L_COV of z (n, D) -> (). Where n < D the D x D covariance is not formed.

    With X = z - mean, the squares of X^T X and of the n x n matrix X X^T have the same sum, so that sum_{i != j} C_ij^2
    is (|X X^T|^2 - sum_j |X_j|^4) / (n-1)^2 with columns X_j. For nearly uncorrelated features this is a difference of
    large numbers, so it is computed in fp64. A single row has no covariance: its loss is 0.
    """
    n, dim = z.shape
    with torch.autocast(z.device.type, enabled=False):
        if n < dim:
            x = z.double() - z.double().mean(dim=0)
            off_diagonal = (x @ x.T).square().sum() - x.square().sum(dim=0).square().sum()
        else:
            x = z.float() - z.float().mean(dim=0)
            scatter = x.T @ x
            off_diagonal = (scatter - scatter.diagonal().diag()).square().sum()
    return (off_diagonal / (max(n - 1, 1) ** 2 * dim)).float()


def dominant_singular_value_loss(z: Tensor, k: int = 5) -> Tensor:
    """L_SVD of z (n, D) -> (), by `DominantShare`."""
    return -DominantShare.apply(z, k)


class DominantShare(torch.autograd.Function):
    """Mean share (1/k) sum_{i <= k} sigma_i / sum_j sigma_j of the k largest singular values of z (n, D) -> () fp32.

    d sigma_i = u_i^T dz v_i and v_i = z^T u_i / sigma_i give the gradient U diag(w / sigma) U^T z, where w_i is the
    share's derivative by sigma_i. Right singular vectors do not occur in it, so an eigendecomposition of the smaller
    Gram matrix suffices. If z is rank-deficient, u_i and v_i are not unique; then an SVD chooses them, as upstream.
    """

    @staticmethod
    def forward(ctx, z: Tensor, k: int) -> Tensor:
        ctx.tall = z.shape[0] > z.shape[1]
        wide = (z.T if ctx.tall else z).float()
        eigenvalues, u, full_rank = gram_eigh(wide)
        if full_rank:
            sigma = eigenvalues.sqrt()
        else:
            u, sigma, vh = torch.linalg.svd(z.float(), full_matrices=False)
            u, sigma, vh = (vh.T, sigma, u.T) if ctx.tall else (u, sigma, vh)
            u, sigma, vh = u.flip(1), sigma.flip(0), vh.flip(0)
        k = min(k, len(sigma))
        total = sigma.sum()
        share = sigma[-k:].sum() / total
        w = (-share / (k * total)).repeat(len(sigma))  # ascending, as sigma
        w[-k:] += 1 / (k * total)
        ctx.save_for_backward(*(u * (w / sigma) @ u.T, wide) if full_rank else (u * w, vh))
        return (share / k).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None]:
        left, right = ctx.saved_tensors  # left is fp64 if small singular values would lose digits in the product
        gradient = slope * (left @ right.to(left.dtype)).float()
        return gradient.T if ctx.tall else gradient, None


def gram_eigh(z: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) of z z^T, of a wide z (n, D) fp32; and whether z has full
    rank.

    Squaring halves the digits of small singular values. fp32 is accurate enough if the eigenvalues span less than a
    factor of 300. It is tried only if D >= 4 n, where this is typical; otherwise the product is in fp64. The gradient
    of L_SVD has a relative error below 1e-4, or below that of an SVD in fp32.
    """
    with torch.autocast(z.device.type, enabled=False):
        if z.shape[1] >= 4 * len(z) and (product := z @ z.T).isfinite().all():
            eigenvalues, vectors = torch.linalg.eigh(product)
            if eigenvalues[-1] < 300 * eigenvalues[0]:
                return eigenvalues, vectors, True
        product = z.double() @ z.double().T
        if not product.isfinite().all():
            raise UserError("L_SVD got features that are not finite: lower the learning rate")
        eigenvalues, vectors = torch.linalg.eigh(product)
        return eigenvalues, vectors, bool(eigenvalues[0] > 1e-10 * eigenvalues[-1])
