"""TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance (ICCV 2023, arXiv 2309.12314).

Authors' code: wkcn/TinyCLIP@ad981bf, cited below as `U:<path>:<line>` with paths under its `src/`.
The paper's contribution:
  - affinity mimicking: the student's image-text similarities follow the teacher's    here, `affinity_mimicking_loss`
  - weight inheritance, by hand or by learned masks                                  inheritance.py, masks.py
  - progressive distillation in stages of moderate compression                       train.py, `STAGES`
The CLIP that is shrunk, and its gates, are in network.py. All of it can be imported from here.

Shapes: B pairs of a process, N pairs of all W processes, D and D' the student's and teacher's embedding.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tinyclip.checkpoints import (  # noqa: F401
    convert_state_dict,
    geometry,
    load_clip,
    open_clip_config,
    resize_positional_embedding,
)
from tinyclip.inheritance import depth_indices, inherit_weights, random_masks  # noqa: F401
from tinyclip.masks import (  # noqa: F401
    L0Mask,
    expand_pruned,
    expected_sparsity,
    hard_concrete,
    hard_concrete_cdf,
    prune,
    reached_sparsity,
    sparsity_loss,
    target_sparsity,
)
from tinyclip.network import CLIP, CONFIGS, Masks, create_model, parameter_counts  # noqa: F401

Gather = Callable[[Tensor], Tensor]


def affinity_logits(image: Tensor, text: Tensor, scale: Tensor | float, gather: Gather | None) -> tuple[Tensor, Tensor]:
    """A = s I T^T and s T I^T, (B, N) each in fp32: this process's rows against the columns of all."""
    image, text = image.float(), text.float()
    if gather is None:
        logits = scale * image @ text.T
        return logits, logits.T
    return scale * image @ gather(text).T, scale * text @ gather(image).T


def affinity_mimicking_loss(
    image: Tensor, text: Tensor, scale: Tensor | float,
    teacher_image: Tensor, teacher_text: Tensor, teacher_scale: Tensor | float, gather: Gather | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(L_i2t, L_t2i): cross entropy of the student's affinities with the teacher's as soft targets.
    U:open_clip/clip_soft_loss.py:54.

    L_i2t = -1/B sum_i sum_j softmax(A')_ij log softmax(A)_ij, A (B, N) of unit features (B, D), A' of the teacher's
    (B, D').
    The mean over processes is the loss on all N pairs. A cross entropy: a student like the teacher is left with the
    entropy.
    """
    to_text, to_image = affinity_logits(image, text, scale, gather)
    with torch.no_grad():
        targets = affinity_logits(teacher_image, teacher_text, teacher_scale, gather)
        text_targets, image_targets = (x.softmax(dim=1) for x in targets)
    return F.cross_entropy(to_text, text_targets), F.cross_entropy(to_image, image_targets)


def clip_loss(image: Tensor, text: Tensor, scale: Tensor | float, gather: Gather | None = None) -> Tensor:
    """L_CLIP, symmetric InfoNCE of unit features (B, D); the label of row i is rank B + i. U:open_clip/loss.py:109."""
    to_text, to_image = affinity_logits(image, text, scale, gather)
    rank = dist.get_rank() if gather is not None and dist.is_initialized() else 0
    labels = torch.arange(len(image), device=image.device) + rank * len(image)
    return (F.cross_entropy(to_text, labels) + F.cross_entropy(to_image, labels)) / 2


def distillation_loss(
    image: Tensor, text: Tensor, scale: Tensor | float,
    teacher_image: Tensor, teacher_text: Tensor, teacher_scale: Tensor | float,
    alpha: float = 1.0, weight: float = 1.0, gather: Gather | None = None,
) -> Tensor:  # fmt: skip
    """L = w alpha (L_i2t + L_t2i) / 2 + w (1 - alpha) L_CLIP, without parts of weight 0. U:training/train.py:161."""
    loss = image.new_zeros((), dtype=torch.float32)
    if alpha > 0:
        teacher = teacher_image, teacher_text, teacher_scale
        loss = loss + weight * alpha * sum(affinity_mimicking_loss(image, text, scale, *teacher, gather)) / 2
    if alpha < 1:
        loss = loss + weight * (1 - alpha) * clip_loss(image, text, scale, gather)
    return loss


class Student(nn.Module):
    """A CLIP with the masks of its towers while these are being learned, and without them afterwards."""

    def __init__(self, clip: CLIP, image_mask: L0Mask | None = None, text_mask: L0Mask | None = None):
        super().__init__()
        self.clip, self.image_mask, self.text_mask = clip, image_mask, text_mask

    @property
    def masks(self) -> list[L0Mask]:
        return [mask for mask in (self.image_mask, self.text_mask) if mask is not None]

    def tower_masks(self, u: dict[str, dict[str, Tensor]] | None = None) -> list[Masks | None]:
        """(image, text): sampled in training, from the uniform numbers u if they are given; rounded in evaluation."""
        towers = {"image": self.image_mask, "text": self.text_mask}
        return [
            None if mask is None else mask.sample(u and u[tower]) if self.training else mask.eval_masks()
            for tower, mask in towers.items()
        ]

    def forward(self, images: Tensor, tokens: Tensor, u: dict | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return self.clip(images, tokens, *self.tower_masks(u))

    def encode_image(self, images: Tensor) -> Tensor:
        return self.clip.encode_image(images, self.tower_masks()[0])

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens, self.tower_masks()[1])

    def eval_masks(self) -> list[Masks]:
        """(image, text): deterministic masks, as evaluation and pruning use them."""
        return [mask.eval_masks() for mask in (self.image_mask, self.text_mask)]

    def pruned(self, exact: bool = False) -> "Student":
        """The smaller network that the masks leave."""
        return Student(prune(self.clip, *self.eval_masks(), exact=exact))
