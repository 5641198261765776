"""A small convolutional network for small corpora, registered with timm so that open_clip configs can name it.

On a CPU, a convolution whose output has 2 x 2 pixels is computed as one matrix product.

Shapes: B batch; C, H, W of the input; O, h, w of the output.
"""

from itertools import product

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

TINY = 2  # largest side of output maps for which a convolution is one matrix product
WIDTHS = (32, 64, 128, 256)  # channels of the four convolutions


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


class ConvNet(nn.Module):
    """Images (B, 3, S, S) -> features (B, D): four 3x3 convolutions, each halving the maps, with batch norm and GELU.

    The last maps are averaged to `grid` x `grid` cells and flattened, D = 256 grid^2. With S = 32 they have 2 x 2
    pixels, and a grid of 2 keeps them. `width` scales all channels.
    """

    def __init__(self, grid: int = 2, width: float = 1.0):
        super().__init__()
        widths = [3, *(int(width * channels) for channels in WIDTHS)]
        layers: list[nn.Module] = []
        for before, channels in zip(widths, widths[1:], strict=False):
            convolution = Conv3x3(before, channels, 3, 2, 1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            layers += [convolution, nn.BatchNorm2d(channels), nn.GELU()]
        self.features, self.grid = nn.Sequential(*layers), grid
        self.num_features = widths[-1] * grid**2
        self.default_cfg: dict = {}

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> the last maps (B, 256, S / 16, S / 16)."""
        return self.features(images)

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.features(images), self.grid).flatten(1)

    def reset_classifier(self, num_classes: int, **options: str) -> None:
        """timm's interface; there is no classifier."""


@register_model
def convnet_small(pretrained: bool = False, **options) -> ConvNet:
    """D = 1024, 0.4 M parameters."""
    return ConvNet()


@register_model
def convnet_small_pooled(pretrained: bool = False, **options) -> ConvNet:
    """The same with D = 256."""
    return ConvNet(grid=1)
