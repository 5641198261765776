"""Towers and heads of A-CLIP and its baselines: a ViT on any subset of its patches, CLIP's text transformer, SSL heads.

Attentive Mask CLIP (arXiv 2212.08653); authors' code microsoft/A-CLIP@0e51942, cited as `U:<path>:<line>`. The paper's
own are the scores that the EMA tower gives patches by its [CLS] attention (`MaskedViT.forward`); the rest is stock.

Shapes: B batch, N patches, K kept patches, L tokens, T text tokens, D tower width, S SSL width.
"""

import math
from collections import OrderedDict
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, Transformer
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------- image tower


def resize_pos_embed(pos_embed: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings (1, 1+n*n, D), [CLS] first, -> (1, 1+height*width, D), bicubic. U:utils.py:331."""
    n = math.isqrt(pos_embed.shape[1] - 1)
    if height == width == n:
        return pos_embed
    patches = pos_embed[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).mT.to(pos_embed)], dim=1)


class MaskedViT(nn.Module):
    """A pre-norm ViT that runs on any subset of its patches; parameters are named as timm's. U:models.py:531.

    The patch projection is frozen at its random initialisation (MoCo v3), unless `freeze_patch_proj` is False.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        freeze_patch_proj: bool = True,
    ):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(image_size, patch_size, embed_dim=width, strict_img_size=False)
        if any(side % patch_size for side in self.patch_embed.img_size):
            raise ValueError(f"patches of {patch_size} pixels do not tile an image of {image_size}")
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(width)
        for x in (self.cls_token, self.pos_embed, *(m.weight for m in self.blocks.modules() if type(m) is nn.Linear)):
            nn.init.trunc_normal_(x, std=0.02)
        for m in self.blocks.modules():
            if type(m) is nn.Linear:
                nn.init.zeros_(m.bias)
        self.patch_embed.proj.requires_grad_(not freeze_patch_proj)

    def forward(
        self, images: Tensor, keep_ids: Tensor | None = None, return_scores: bool = False, cls_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """images (B, 3, H, W), keep_ids (B, K) -> tokens (B, 1+K, D) after the last LayerNorm, scores (B, N) or None.

        In eval mode keep_ids are ignored (U:models.py:580), as without them all N patches are kept. For H, W other than
        image_size, position embeddings are resized. With `cls_only` tokens are (B, 1, D), [CLS] alone, and the last
        block leaves out what only the others would need.
        """
        x = self.patch_embed(images)  # (B, N, D)
        grid, pos_embed = self.patch_embed.dynamic_feat_size(images.shape[2:]), self.pos_embed
        if grid != self.patch_embed.grid_size:
            pos_embed = resize_pos_embed(pos_embed, *grid)
        x = x + pos_embed[:, 1:]
        if keep_ids is not None and self.training:
            x = x.gather(1, keep_ids[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([(self.cls_token + pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        rows = []
        for i, block in enumerate(self.blocks, 1):
            last = cls_only and i == len(self.blocks)
            if return_scores or last:
                x, row = block_with_cls_attention(block, x, last)
                rows.append(row)
            else:
                x = block(x)
        return self.norm(x), torch.stack(rows).mean((0, 2))[:, 1:] if return_scores else None


def block_with_cls_attention(block: Block, x: Tensor, cls_only: bool = False) -> tuple[Tensor, Tensor]:
    """A ViT block on (B, L, D), and how its [CLS] attends: (B, heads, L) float32, softmaxed. U:models.py:505.

    The row alone is computed beside the fused attention; upstream keeps the whole (B, heads, L, L) map of every layer.
    `cls_only`: the block's output for [CLS], (B, 1, D); the other tokens give it their keys and values.
    """
    attn, D, h = block.attn, x.shape[2], block.norm1(x)
    if cls_only:
        x, weight, bias = x[:, :1], attn.qkv.weight, attn.qkv.bias
        q = F.linear(h[:, :1], weight[:D], bias[:D])
        k, v = F.linear(h, weight[D:], bias[D:]).chunk(2, dim=-1)
    else:
        q, k, v = attn.qkv(h).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for part in (q, k, v))
    row = ((q[:, :, :1] * attn.scale) @ k.mT).float().softmax(dim=-1)
    y = row @ v if cls_only else F.scaled_dot_product_attention(q, k, v)
    x = x + attn.proj(y.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x)), row[:, :, 0].detach()


# ----------------------------------------------------------------------------------------------------------- text tower


class TextTransformer(Transformer):
    """CLIP's causal text transformer without embeddings and final norm: (B, T, D) -> (B, T, D). U:models.py:95."""

    def __init__(self, width: int, layers: int, heads: int, context_length: int):
        super().__init__(width, layers, heads, act_layer=QuickGELU)
        self.register_buffer("mask", torch.full((context_length, context_length), -math.inf).triu(1), persistent=False)
        for block in self.resblocks:  # U:models.py:152
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, attn_mask=self.mask[: x.shape[1], : x.shape[1]])


# ---------------------------------------------------------------------------------------------------------------- heads


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the rows of all processes, on any device (torch's own knows GPUs only). U:main.py:105."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        x = x.float()
        all_reduce, n = torch.distributed.nn.all_reduce, len(x) * dist.get_world_size()
        mean = all_reduce(x.sum(0)) / n
        var = all_reduce((x - mean).square().sum(0)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


def simclr_head(width: int, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """(B, D) -> (B, S). U:models.py:398."""
    return nn.Sequential(
        OrderedDict(
            layer1=nn.Linear(width, hidden),
            bn1=SyncBatchNorm1d(hidden),
            relu1=nn.ReLU(inplace=True),
            layer2=nn.Linear(hidden, hidden),
            bn2=SyncBatchNorm1d(hidden),
            relu2=nn.ReLU(inplace=True),
            layer3=nn.Linear(hidden, out),
        )
    )


def byol_head(width: int, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """BYOL's projector (B, D) -> (B, S), and of the same form its predictor (B, S) -> (B, S). U:models.py:379."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        SyncBatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
    )
