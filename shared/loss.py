"""CLIP's loss, for the papers that use it as it is."""

import torch.nn.functional as F
from torch import Tensor

from shared import run


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of this rank's unit features (B, D) against those of all ranks, in fp32."""
    image, text, scale = image_features.float(), text_features.float(), logit_scale.float()
    labels = run.own_columns(image)
    to_text, to_image = scale * image @ run.gather(text).T, scale * text @ run.gather(image).T
    return (F.cross_entropy(to_text, labels) + F.cross_entropy(to_image, labels)) / 2
