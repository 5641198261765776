"""The losses of A-CLIP (arXiv 2212.08653) and of its baselines CLIP and SLIP.

Authors' code: microsoft/A-CLIP@0e51942, cited as `U:`, and facebookresearch/SLIP@c6faf5d, cited as `S:`.

In float32 and over the batch of all processes: each rank has the rows of its own samples, against everyone's columns,
gathered with gradient. The mean over ranks is the loss of the global batch, and so are DDP's averaged gradients.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shared.run import gather


def _targets(rows: Tensor) -> Tensor:
    """Column (B,) of the own sample of each of this rank's rows."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.arange(len(rows), device=rows.device) + len(rows) * rank


def clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """(CE(rows) + CE(columns)) / 2 of scale * cosines; image, text (B, E) of any norm. U:losses.py:70-97."""
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    targets = _targets(image)
    image_to_text = F.cross_entropy(scale * image @ gather(text).T, targets)
    text_to_image = F.cross_entropy(scale * text @ gather(image).T, targets)
    return (image_to_text + text_to_image) / 2


def simclr_loss(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent: row i of a (B, S) finds row i of b among b and the rest of a; the same for b. U:losses.py:141."""
    a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
    all_a, all_b = gather(a), gather(b)
    targets = _targets(a)
    own = F.one_hot(targets, len(all_a)) * 1e9

    def direction(x: Tensor, same: Tensor, other: Tensor) -> Tensor:
        logits = torch.cat([x @ other.T / temperature, x @ same.T / temperature - own], dim=1)
        return F.cross_entropy(logits, targets)

    return (direction(a, all_a, all_b) + direction(b, all_b, all_a)) / 2


def byol_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean of 2 - 2 cos(pred, target) over rows (M, S). `ACLIP` stops the target's gradient. U:losses.py:52."""
    pred, target = F.normalize(pred.float(), dim=-1), F.normalize(target.float(), dim=-1)
    return (2 - 2 * (pred * target).sum(-1)).mean()


def accuracy(image: Tensor, text: Tensor) -> Tensor:
    """Percent of images whose caption is the nearest of the batch."""
    with torch.no_grad():
        cosine = F.normalize(image.float(), dim=-1) @ gather(F.normalize(text.float(), dim=-1), with_grad=False).T
        return 100 * (cosine.argmax(dim=1) == _targets(image)).float().mean()


def aclip_loss(
    outputs: dict[str, Tensor],
    simclr_weight: float = 1.0,
    byol_weight: float = 2.0,
    temperature: float = 0.1,
    simclr_pair: str = "cross",
) -> dict[str, Tensor]:
    """L = mean_v L_CLIP(view v) + SimCLR(view 1, view 2) + 2 BYOL(views, EMA view). U:losses.py:39.

    `simclr_pair="same"` gives SimCLR the first view twice, as the released code does (it then only repels). One view
    leaves no pair for SimCLR, and a model without SSL heads neither term: 0. -> loss, its unweighted parts, clip_acc.
    """
    text, scale = outputs["text_embed"], outputs["logit_scale"].float()
    views = outputs["image_embed"].split(len(text))
    losses = {f"contra_loss_{v}": clip_loss(view, text, scale) for v, view in enumerate(views, 1)}
    loss = sum(losses.values()) / len(views)
    losses["simclr_loss"] = losses["im_byol_loss"] = scale.new_zeros(())
    if "image_ssl_embed" in outputs:
        ssl = outputs["image_ssl_embed"].split(len(text))
        if len(views) == 1:
            losses["simclr_loss"] = (
                0.0 * ssl[0].float().sum()
            )  # DistributedDataParallel wants gradients, if zero, of all
        else:
            losses["simclr_loss"] = simclr_loss(ssl[0], ssl[0 if simclr_pair == "same" else 1], temperature)
        losses["im_byol_loss"] = byol_loss(outputs["byol_feats"], outputs["byol_feats_e"].repeat(len(views), 1))
    loss = loss + simclr_weight * losses["simclr_loss"] + byol_weight * losses["im_byol_loss"]
    return {"loss": loss, **losses, "clip_acc": accuracy(views[-1], text)}


def baseline_loss(outputs: dict[str, Tensor], temperature: float = 0.1, ssl_scale: float = 1.0) -> dict[str, Tensor]:
    """CLIP's loss, or SLIP's (S:losses.py:112) where the outputs have its two augmented views.

    SLIP's own code gathers CLIP's features without gradient; here they have it, as in A-CLIP.
    """
    image, text = outputs["image_embed"], outputs["text_embed"]
    losses = {"clip_loss": clip_loss(image, text, outputs["logit_scale"].float())}
    loss = losses["clip_loss"]
    if "aug1_embed" in outputs:
        losses["ssl_loss"] = simclr_loss(outputs["aug1_embed"], outputs["aug2_embed"], temperature)
        loss = loss + ssl_scale * losses["ssl_loss"]
    return {"loss": loss, **losses, "clip_acc": accuracy(image, text)}
