"""EfficientNet-Lite0's feature maps in the form of a timm ViT, `--backbone efficientnet_lite0_maps`: ours, for small
experiments, instead of DINOv2. Importing this module registers it with timm."""

from types import SimpleNamespace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from shared import pretrained as installed
from shared.errors import UserError

NAME = "efficientnet_lite0_maps"
default_cfgs = generate_default_cfgs({f"{NAME}.in1k": {"mean": installed.LITE0_MEAN, "std": installed.LITE0_STD}})


class Lite0Maps(nn.Module):
    """EfficientNet-Lite0's feature maps as the tokens of a ViT: the mean patch instead of [CLS], patches of 16 pixels.

    (B, 3, H, W) -> (B, 1 + H W / 256, 432); H and W are multiples of 32. A patch concatenates the map of stride 16 (112
    channels) and the last one (320, interpolated from stride 32), each normalised over its channels.
    """

    num_features, num_prefix_tokens, patch_embed = 432, 1, SimpleNamespace(patch_size=(16, 16))  # as timm's ViTs
    middle = 4  # the stage whose map has stride 16
    chunk = 16  # images that a CPU sees at a time: it takes twice as long if a layer's map exceeds its cache (32 MB)

    def __init__(self, network: nn.Module):
        super().__init__()
        network = installed.fold_batch_norms(network)
        self.stem, self.stages = nn.Sequential(network.conv_stem, network.bn1), network.blocks

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Tokens of images; UserError for other sides."""
        if any(side % 32 for side in pixels.shape[2:]):
            raise UserError(f"{NAME} takes images whose sides are multiples of 32 pixels, not {pixels.shape[-1]}")
        size = self.chunk if pixels.device.type == "cpu" else len(pixels)
        return torch.cat([self.tokens(some) for some in pixels.split(size)])

    def tokens(self, pixels: Tensor) -> Tensor:
        """Tokens of all these images at once."""
        x = self.stem(pixels)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number == self.middle:
                middle = x
        last = F.interpolate(x, scale_factor=2, mode="bilinear")
        maps = [each.flatten(2).transpose(1, 2) for each in (middle, last)]
        patches = torch.cat([F.layer_norm(each, each.shape[-1:]) for each in maps], dim=-1)
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)


@register_model
def efficientnet_lite0_maps(pretrained: bool = False, **_: Any) -> Lite0Maps:
    """With weights of ImageNet-1k from an installed package (shared.pretrained), or random ones."""
    network = installed.efficientnet_lite0() if pretrained else timm.create_model(installed.LITE0, num_classes=0)
    return Lite0Maps(network)
