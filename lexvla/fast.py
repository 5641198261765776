"""Equations 4 and 5 in less memory and to more digits; model.py has them as the paper prints them, and selects here.

tests/test_lexvla_model.py compares both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**26  # numbers in the largest block of logits that exists at a time: 256 MB of float32


class MaxLogits(torch.autograd.Function):
    """max_i z_i Z^T: (B, n, d), (V, d) -> (B, V), keeping only the arg-max for the backward pass.

    The (B, n, V) logits are computed in blocks of words with at most CHUNK numbers. In the backward pass, the gradient
    of word v of image b goes only to its arg-max token. So both gradients are weighted sums of vectors, which take
    B * V * d operations; the gradients of the matrix product take n times as many.
    """

    @staticmethod
    def forward(ctx, z: Tensor, codebook: Tensor) -> Tensor:
        step = max(1, CHUNK // max(z.shape[0] * z.shape[1], 1))
        blocks = [(z @ words.T).max(dim=1) for words in codebook.split(step)]
        winner = torch.cat([block.indices for block in blocks], dim=1)  # (B, V) token of each word's maximum
        ctx.save_for_backward(z, codebook, winner)
        return torch.cat([block.values for block in blocks], dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, codebook, winner = ctx.saved_tensors
        (B, n, d), grad_z, grad_codebook = z.shape, None, None
        token = winner + n * torch.arange(B, device=z.device)[:, None]  # (B, V) row of z.view(B * n, d)
        if ctx.needs_input_grad[0]:  # token i sums the codebook rows of the words whose maximum it is
            order = token.flatten().argsort(stable=True)
            counts = torch.zeros(B * n, dtype=torch.long, device=z.device)
            counts.scatter_add_(0, token.flatten(), torch.ones_like(order))  # `bincount` would wait for a GPU
            weights = grad.flatten()[order].to(codebook.dtype)
            starts = counts.cumsum(0) - counts
            rows = order % winner.shape[1]
            grad_z = F.embedding_bag(rows, codebook, starts, mode="sum", per_sample_weights=weights)
            grad_z = grad_z.view(B, n, d).to(z.dtype)
        if ctx.needs_input_grad[1]:  # word v sums its arg-max tokens
            weights = grad.T.contiguous().to(z.dtype)
            rows = token.T.contiguous()
            grad_codebook = F.embedding_bag(rows, z.reshape(B * n, d), mode="sum", per_sample_weights=weights)
            grad_codebook = grad_codebook.to(codebook.dtype)
        return grad_z, grad_codebook


def info_nce(logits: Tensor, own: Tensor) -> Tensor:
    """Mean over rows of -log softmax(logits (B, N)) at column own (B,), as log(1 + sum_(j != own) e^(l_j - l_own)).

    For well-separated pairs, float32 represents this sum exactly enough, but not the difference of two large numbers.
    """
    own = own[:, None]
    others = logits.scatter(1, own, torch.finfo(logits.dtype).min).logsumexp(1)
    return F.softplus(others - logits.gather(1, own)[:, 0]).mean()
