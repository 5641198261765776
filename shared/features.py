"""A head that reads features: a timm "network" whose images are features of a locked tower, computed beforehand.

open_clip configs name it in a tower's place (model_configs/Lite0-features.json). Its corpora are shards whose images
are KEY.npy files; studies/harness/features.py writes them.
"""

import torch
from timm.models import register_model
from torch import Tensor, nn


class PrecomputedFeatures(nn.Module):
    """(B, C, 1, 1) or (B, C) -> (B, C), unchanged."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features, self.default_cfg = width, {}

    def reset_classifier(self, num_classes: int, **options: str) -> None:
        """timm's interface; there is no classifier."""

    def forward(self, features: Tensor) -> Tensor:
        return features.flatten(1).to(torch.get_default_dtype())


@register_model
def precomputed_features(pretrained: bool = False, width: int = 1280, **options) -> PrecomputedFeatures:
    """Features of `width` numbers, by default EfficientNet-Lite0's."""
    return PrecomputedFeatures(width)
