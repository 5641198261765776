"""A small residual network for small corpora, registered with timm so that open_clip configs can name it.

Its blocks have two 3x3 convolutions. On a CPU these compute more FLOPs per second than the bottlenecks of open_clip's
ModifiedResNet, whose 1x1 convolutions are memory-bound. For images of SIZE pixels the last maps have 2 x 2 pixels; on a
CPU they are convolved by one matrix product.

Shapes: B batch; C, H, W of the input; O, h, w of the output.
"""

from itertools import product

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import Tensor, nn

TINY = 2  # largest side of output maps for which a convolution is one matrix product
SIZE = 32  # default image side in pixels; any multiple of 16 works
ARCHITECTURE = ByoModelCfg(
    blocks=tuple(ByoBlockCfg(type="basic", d=1, c=width, s=2, gs=0, br=1.0) for width in (64, 128, 256)),
    stem_chs=32,
    stem_type="3x3",
    stem_pool="",
)
default_cfgs = generate_default_cfgs(
    {
        "resnet7_small": {
            "input_size": (3, SIZE, SIZE),
            "pool_size": (2, 2),
            "first_conv": "stem.conv",
            "classifier": "head.fc",
        }
    }
)


class ConvolutionMatrix(torch.autograd.Function):
    """Kernel (O, C, 3, 3) -> matrix (h w O, H W C) of the convolution of H x W maps with padding 1 and a stride."""

    @staticmethod
    def forward(ctx, kernel: Tensor, height: int, width: int, stride: int) -> Tensor:
        channels, C = kernel.shape[:2]
        ctx.shape = ((height - 1) // stride + 1, (width - 1) // stride + 1, channels, height, width, C)
        ctx.stride, by_place = stride, kernel.permute(2, 3, 0, 1).contiguous()
        matrix = kernel.new_zeros(ctx.shape)
        for y, x, i, j, down, right in places(*ctx.shape[:2], height, width, stride):
            matrix[y, x, :, down, right] = by_place[i, j]
        return matrix.view(-1, height * width * C)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h, w, channels, height, width, C = ctx.shape
        gradient, by_place = (
            gradient.view(ctx.shape),
            gradient.new_zeros(3, 3, channels, C, dtype=torch.promote_types(gradient.dtype, torch.float32)),
        )
        for y, x, i, j, down, right in places(h, w, height, width, ctx.stride):
            by_place[i, j] += gradient[y, x, :, down, right]
        return by_place.permute(2, 3, 0, 1).to(gradient.dtype), None, None, None


def places(h: int, w: int, height: int, width: int, stride: int) -> list[tuple[int, ...]]:
    """(y, x, i, j, Y, X): kernel entry (i, j) connects the input pixel (Y, X) to the output pixel (y, x)."""
    every = ((y, x, i, j, y * stride + i - 1, x * stride + j - 1) for y, x, i, j in product(*map(range, (h, w, 3, 3))))
    return [place for place in every if 0 <= place[4] < height and 0 <= place[5] < width]


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1, without bias; on a CPU and tiny maps, computed as one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        h, w = ((side - 1) // self.stride[0] + 1 for side in (height, width))
        if x.device.type != "cpu" or max(h, w) > TINY:
            return super().forward(x)
        kernel = self.weight
        if torch.is_autocast_enabled("cpu"):
            kernel = kernel.to(torch.get_autocast_dtype("cpu"))
        matrix = ConvolutionMatrix.apply(kernel, height, width, self.stride[0])
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix).view(batch, h, w, -1).permute(0, 3, 1, 2)


@register_model
def resnet7_small(pretrained: bool = False, **options) -> ByobNet:
    """Stem of 32 channels, then blocks of 64, 128 and 256, each halving the image: seven layers, 1.2 M parameters."""
    network = build_model_with_cfg(
        ByobNet,
        "resnet7_small",
        pretrained,
        model_cfg=ARCHITECTURE,
        feature_cfg={"flatten_sequential": True},
        **options,
    )
    for module in network.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (3, 3) and module.padding == (1, 1):
            module.__class__ = Conv3x3  # keeps the parameters and draws no random numbers
    return network
