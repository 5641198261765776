"""NMTune: Understanding and Mitigating the Label Noise in Pre-training on Downstream Tasks (arXiv 2309.17002), and its
journal extension (arXiv 2403.06869).

Authors' code: Hhhhhhao/Noisy-Model-Learning@f249dce, cited below as `U:<path>:<line>`.
The paper's contribution in this file:
  - a light MLP that reshapes the features of a frozen, noisily pre-trained encoder     `NMTuneHead`
  - L_MSE (eq. 3) preserves the encoder's features                                      `consistency_loss`
  - L_COV (eq. 4) spreads the feature dimensions (high SVE, for in-domain transfer)     `covariance_loss`
  - L_SVD (eq. 5) makes the leading singular values dominate (low LSVR, out of domain)  `dominant_singular_value_loss`
  - the objective (eq. 6); gram_losses.py computes the last two from a Gram matrix      `nmtune_loss`
Used by every arm: the linear classifier (LP). Encoders are in encoders.py.

Shapes: B images, n = 2B rows [view w; view s], D feature dimensions, C classes. f = encoder features, z = transformed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmtune import gram_losses

# ----------------------------------------------------------------------------------------------------------- losses


def consistency_loss(z: Tensor, feats: Tensor) -> Tensor:
    """L_MSE = mean over B*D of (norm(z_s) - norm(f_w))^2, z of view s (B, D) against f of view w (B, D) -> ().

    Equals the mean over images of (2 - 2 cos)/D. No gradient flows into `feats`. U:src/models/nml_tune.py:152-157.
    The paper's squared distance (eq. 3, read row by row) is D times this value, and of the same view.
    """
    return F.mse_loss(F.normalize(z.float(), dim=1), F.normalize(feats.detach().float(), dim=1))


def covariance_loss(z: Tensor) -> Tensor:
    """L_COV = (1/D) sum_{i != j} C_ij^2, C the covariance (D, D) of z (n, D) -> (). U:src/models/nml_tune.py:34,164.

    Equation 4; training uses gram_losses.py, equal to rounding. A single row has no covariance: its loss is 0.
    """
    x = z.float() - z.float().mean(dim=0)
    c = x.T @ x / max(len(z) - 1, 1)
    return (c - c.diagonal().diag()).square().sum() / z.shape[1]


def dominant_singular_value_loss(z: Tensor, k: int = 5) -> Tensor:
    """L_SVD = -(1/k) sum_{i <= k} sigma_i / sum_j sigma_j of the raw z (n, D) -> (), negative: it is added to the loss.

    In equation 5 k = 1; U:src/models/nml_tune.py:159-162 has k = 5. Training uses gram_losses.py, equal to rounding.
    z is neither centred nor normalised. With fewer than k singular values the mean is over all of them, and constant.
    """
    s = torch.linalg.svdvals(z.float())
    return -(s[:k] / s.sum()).mean()


EQUATIONS = covariance_loss, dominant_singular_value_loss
FROM_GRAM_MATRIX = gram_losses.covariance_loss, gram_losses.dominant_singular_value_loss  # equal to rounding


def nmtune_loss(
    logits: Tensor,
    labels: Tensor,
    z: Tensor,
    feats: Tensor,
    weights: tuple[float, float, float] = (1.0, 0.04, 0.001),
    k: int = 5,
    views: int = 2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = CE + w_mse L_MSE + w_cov L_COV + w_svd L_SVD, of rows [view w; view s], or of one view with views=1.

    logits (n, C), labels (n,) int64, z and feats (n, D). `weights` = (mse, cov, svd), by default those of the authors'
    README; equation 6 has one lambda = 0.01. Terms of weight 0 are not computed; with all three 0, it is the MLP
    baseline.
    Returns (loss, {"ce", "mse", "cov", "svd"}) with unweighted terms. U:src/models/nml_tune.py:139-171.
    """
    w_mse, w_cov, w_svd = (float(weight) for weight in weights)
    l_cov, l_svd = FROM_GRAM_MATRIX if z.device.type != "mps" else EQUATIONS  # the former need fp64, which mps lacks
    images = len(z) // views
    terms = {"ce": F.cross_entropy(logits.float(), labels)}
    loss = terms["ce"]
    if w_mse:
        terms["mse"] = consistency_loss(z[-images:], feats[:images])
        loss = loss + w_mse * terms["mse"]
    if w_cov:
        terms["cov"] = l_cov(z)
        loss = loss + w_cov * terms["cov"]
    if w_svd:
        terms["svd"] = l_svd(z, k)
        loss = loss + w_svd * terms["svd"]
    return loss, terms


def finetune_loss(
    logits: Tensor, labels: Tensor, feats: Tensor, weights: tuple[float, float] = (0.04, 0.001), k: int = 5
) -> tuple[Tensor, dict[str, Tensor]]:
    """The journal's objective on the features of a tuned encoder: CE + w_cov L_COV + w_svd L_SVD.

    One view, no L_MSE, no MLP; logits (B, C), labels (B,), feats (B, D). U:src/models/nml_finetune.py:144-166.
    """
    return nmtune_loss(logits, labels, feats, feats, (0.0, *weights), k)


# ------------------------------------------------------------------------------------------------------------ heads


def make_classifier(dim: int, num_classes: int) -> nn.Linear:
    """The linear classifier (the LP arm): kaiming-uniform weight (a = 0, bound sqrt(6/D)), zero bias.

    U:src/models/modeling.py:109-124, init U:src/models/nml_tune.py:54-59.
    """
    classifier = nn.Linear(dim, num_classes)
    nn.init.kaiming_uniform_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    return classifier


class NMTuneHead(nn.Module):
    """z = scale * MLP(f) + f, logits = W z + b, on frozen features f (n, D). U:src/models/modeling.py:172-202.

    MLP: `layers` blocks of Linear-BatchNorm-ReLU of width ratio*D, then a Linear back to D. `residual=False` is
    z = MLP(f); with `batch_norm=False`, too, it is the paper's (figure 17). Parameter names are upstream's.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        ratio: float = 4,
        layers: int = 1,
        residual: bool = True,
        scale_init: float = 1.0,
        batch_norm: bool = True,
    ):
        super().__init__()
        widths = [dim] + [int(dim * ratio)] * layers
        blocks: list[nn.Module] = []
        for width, hidden in zip(widths, widths[1:], strict=False):
            blocks.append(nn.Linear(width, hidden))
            if batch_norm:
                blocks.append(nn.BatchNorm1d(hidden))
            blocks.append(nn.ReLU())
        self.mlp_after = nn.Sequential(*blocks, nn.Linear(widths[-1], dim))
        self.scale_after = nn.Parameter(torch.full((1, dim), float(scale_init))) if residual else None
        self.classification_head = make_classifier(dim, num_classes)

    def transform(self, feats: Tensor) -> Tensor:
        """f (n, D) -> z (n, D)."""
        z = self.mlp_after(feats)
        return z if self.scale_after is None else self.scale_after * z + feats

    def forward(self, feats: Tensor) -> Tensor:
        """f (n, D) -> logits (n, C)."""
        return self.classification_head(self.transform(feats))


def transformed(head: nn.Module, feats: Tensor) -> tuple[Tensor, Tensor]:
    """(z (n, D), logits (n, C)) of a head; for a linear probe z = f."""
    if isinstance(head, NMTuneHead):
        z = head.transform(feats)
        return z, head.classification_head(z)
    return feats, head(feats)


def head_from(weights: dict[str, Tensor]) -> nn.Module:
    """The head with the given weights (our names): NMTuneHead, or nn.Linear if they are those of a linear probe."""
    if not any(key.startswith("mlp_after.") for key in weights):
        weights = {key.removeprefix("classification_head."): value for key, value in weights.items()}
        head = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
    else:
        linears = [value for key, value in weights.items() if key.startswith("mlp_after.") and value.ndim == 2]
        hidden, dim = linears[0].shape
        classes = len(weights["classification_head.bias"])
        parts = {"residual": "scale_after" in weights, "batch_norm": "mlp_after.1.running_mean" in weights}
        head = NMTuneHead(dim, classes, hidden / dim, len(linears) - 1, **parts)
    head.load_state_dict(weights)
    return head.eval()
