"""Attentive Mask CLIP, A-CLIP (arXiv 2212.08653, ICCV 2023), and the paper's baselines CLIP and SLIP.

Authors' code: microsoft/A-CLIP@0e51942, cited as `U:<path>:<line>`; its base facebookresearch/SLIP@c6faf5d, as `S:`.
The paper's contribution:
  - an EMA image tower scores patches by its [CLS] attention          `MaskedViT.forward(return_scores=True)`
  - scores are mapped from the EMA view into each crop of the image   `crop_scores`
  - the 2x2 blocks of high score are kept, the other tokens dropped   `attentive_keep_ids`
  - CLIP loss per masked view, SimCLR between the views, BYOL from    `ACLIP`, `aclip_loss`
    each masked view to the EMA tower's unmasked one

Shapes: B batch, V views, g patches a side, N = g*g patches, K kept patches, L image tokens, T text tokens, D tower
width, E joint width, S SSL width.
"""

import copy
import math
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, Transformer
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from shared import checkpoints, loss
from shared.errors import UserError
from shared.run import gather, own_columns

# Keyword arguments of `create_model`; U:models.py:717-780. Text tower of all three: 12 layers of width 512.
PRESETS = {
    "vit_s16": dict(vision_width=384, vision_layers=12, vision_heads=12),
    "vit_b16": dict(vision_width=768, vision_layers=12, vision_heads=12),
    "vit_l16": dict(vision_width=1024, vision_layers=24, vision_heads=16),
    "emoji": dict(
        embed_dim=128,
        image_size=40,
        patch_size=5,
        vision_width=128,
        vision_layers=3,
        vision_heads=4,
        context_length=24,
        text_width=128,
        text_heads=4,
        text_layers=2,
        ssl_hidden=256,
        ssl_dim=64,
    ),
    "scenes": dict(
        embed_dim=128,
        image_size=48,
        patch_size=8,
        block=1,
        vision_width=128,
        vision_layers=3,
        vision_heads=4,
        context_length=16,
        text_width=64,
        text_heads=2,
        text_layers=1,
        ssl_hidden=256,
        ssl_dim=64,
    ),
}

# --------------------------------------------------------------------------------------------------------- image tower


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
        self.grad_checkpointing, norm = False, partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(image_size, patch_size, embed_dim=width, strict_img_size=False)
        if any(side % patch_size for side in self.patch_embed.img_size):
            raise UserError(f"patches of {patch_size} pixels do not tile an image of {image_size}")
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

        Without keep_ids, and in eval mode (U:models.py:580), all N patches are kept. For H, W other than image_size,
        position embeddings are resized. With `cls_only` tokens are (B, 1, D), only [CLS], and the last block computes
        only what [CLS] needs.
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
            elif self.grad_checkpointing:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x), torch.stack(rows).mean((0, 2))[:, 1:] if return_scores else None


def block_with_cls_attention(block: Block, x: Tensor, cls_only: bool = False) -> tuple[Tensor, Tensor]:
    """Output of a ViT block on (B, L, D), and its [CLS] attention (B, heads, L), softmax in float32. U:models.py:505.

    Only the [CLS] row is computed beside the fused attention; upstream keeps the (B, heads, L, L) map of every layer.
    `cls_only`: the output is that of [CLS], (B, 1, D), which still attends to all tokens.
    """
    attn, D, h = block.attn, x.shape[2], block.norm1(x)
    if cls_only:
        x, weight, bias = x[:, :1], attn.qkv.weight, attn.qkv.bias
        q = F.linear(h[:, :1], weight[:D], bias[:D])
        k, v = F.linear(h, weight[D:], bias[D:]).chunk(2, dim=-1)
    else:
        q, k, v = attn.qkv(h).chunk(3, dim=-1)
    q, k, v = (each.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for each in (q, k, v))
    row = ((q[:, :, :1] * attn.scale) @ k.mT).float().softmax(dim=-1)
    y = row @ v if cls_only else F.scaled_dot_product_attention(q, k, v)
    x = x + attn.proj(y.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x)), row[:, :, 0].detach()


# ----------------------------------------------------------------------------------------------------- token selection


def crop_scores(scores: Tensor, boxes: Tensor, ref_boxes: Tensor, grid: int) -> Tensor:
    """Scores (B, n*n) of patches of `ref_boxes` -> scores (B, grid*grid) of patches of `boxes`. U:models.py:448.

    Boxes (B, 4) int64 are (top, left, height, width) in pixels of the original image. For each image upstream enlarges
    the map bilinearly to its box, cuts out the other box (zero outside), and shrinks it bilinearly (no antialias) to
    the grid. The three steps are linear and separable, so that a map S becomes R_y S R_x^T for all images at once, with
    R_y, R_x (B, grid, n) from `_resample`.
    """
    n = math.isqrt(scores.shape[1])
    offset = boxes - ref_boxes  # the first two columns are the offset of the top left corners
    with torch.autocast(scores.device.type, enabled=False):
        rows = _resample(n, ref_boxes[:, 2], offset[:, 0], boxes[:, 2], grid)
        columns = _resample(n, ref_boxes[:, 3], offset[:, 1], boxes[:, 3], grid)
        return (rows @ scores.float().unflatten(1, (n, n)) @ columns.mT).flatten(1)


def _resample(n: int, ref_length: Tensor, offset: Tensor, length: Tensor, grid: int) -> Tensor:
    """(B, grid, n) bilinear weights along one side. The n cells cover `ref_length` pixels; the `grid` cells cover
    `length` pixels from pixel `offset` on. All arguments are (B,) except n and grid. Source positions are rounded to
    float32 where torch's resize, which upstream uses, rounds them."""
    ref_length, offset, length = (x[:, None].double() for x in (ref_length, offset, length))
    cells, positions = (torch.arange(k, dtype=torch.double, device=length.device) for k in (n, grid))

    def source(position: Tensor, scale: Tensor) -> Tensor:
        return ((position + 0.5) * scale.float().double() - 0.5).float().double().clamp(min=0)

    def enlarged(pixel: Tensor) -> Tensor:  # pixels (B, grid) of the enlarged map -> weights (B, grid, n)
        cell = source(pixel, n / ref_length).clamp(max=n - 1)
        inside = (pixel >= 0) & (pixel < ref_length)
        return (1 - (cell[..., None] - cells).abs()).clamp(min=0) * inside[..., None]

    pixel = source(positions, length / grid)  # (B, grid), of the crop
    first = pixel.floor()
    second = torch.minimum(first + 1, length - 1)
    weight = (pixel - first)[..., None]
    return ((1 - weight) * enlarged(first + offset) + weight * enlarged(second + offset)).float()


def attentive_keep_ids(scores: Tensor, keep_ratio: float = 0.5, block: int = 2, drop: str = "low") -> Tensor:
    """Scores (B, N) -> patches (B, K) int64, ascending, of the blocks with the highest mean score. U:models.py:24.

    int(blocks * keep_ratio) + 1 blocks of `block` x `block` patches are kept, at most all. `drop="high"`, the paper's
    counter-test, keeps the blocks with the lowest scores instead. Of equal scores the earlier block ranks higher.
    """
    grid = math.isqrt(scores.shape[1])
    if grid * grid != scores.shape[1] or grid % block:
        raise UserError(f"{scores.shape[1]} patches do not form a square grid that blocks of {block} x {block} tile")
    side = grid // block
    blocks = F.avg_pool2d(scores.unflatten(1, (1, grid, grid)), block).flatten(1)  # rounds like upstream's resize
    order = blocks.argsort(dim=1, descending=drop == "low", stable=True)
    kept = order[:, : int(side * side * keep_ratio) + 1]
    within = torch.arange(block, device=scores.device)
    within = (within[:, None] * grid + within).flatten()  # a block's patches, relative to its top left patch
    first = kept // side * block * grid + kept % side * block
    return (first[:, :, None] + within).flatten(1).sort(dim=1).values


def random_keep_ids(noise: Tensor, keep_ratio: float = 0.5) -> Tensor:
    """Noise (B, N) -> the int(N * keep_ratio) patches (B, K) with the lowest noise, in ascending order of noise.

    Source: U:models.py:538.
    """
    return noise.argsort(dim=1)[:, : int(noise.shape[1] * keep_ratio)]


# ---------------------------------------------------------------------------------------------------------- text tower


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


# ----------------------------------------------------------------------------------------------------------- SSL heads


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the samples of all processes, on any device (torch's needs GPUs). U:main.py:105."""

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
    """BYOL's projector (B, D) -> (B, S); its predictor (B, S) -> (B, S) has the same form. U:models.py:379."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        SyncBatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
    )


# -------------------------------------------------------------------------------------------------------------- models


class CLIP(nn.Module):
    """A ViT and CLIP's text transformer: the paper's first baseline and A-CLIP's base. S:models.py:67.

    `block`: attention selects blocks of `block` x `block` patches, in A-CLIP's masks and in evaluation.
    """

    def __init__(
        self,
        embed_dim: int = 512,
        image_size: int = 224,
        patch_size: int = 16,
        vision_width: int = 768,
        vision_layers: int = 12,
        vision_heads: int = 12,
        context_length: int = 77,
        vocab_size: int = 49408,
        text_width: int = 512,
        text_heads: int = 8,
        text_layers: int = 12,
        freeze_patch_proj: bool = False,
        block: int = 2,
    ):
        super().__init__()
        self.image_size, self.patch_size, self.context_length = image_size, patch_size, context_length
        self.block = block
        self.visual = MaskedViT(
            image_size, patch_size, vision_width, vision_layers, vision_heads, freeze_patch_proj=freeze_patch_proj
        )
        self.transformer = TextTransformer(text_width, text_layers, text_heads, context_length)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.image_projection = nn.Parameter(torch.empty(vision_width, embed_dim))
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.image_projection, std=vision_width**-0.5)
        nn.init.normal_(self.text_projection, std=text_width**-0.5)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E), not normalised; all patches."""
        return self.visual(images, cls_only=True)[0][:, 0] @ self.image_projection

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T <= context_length) -> (B, E), not normalised."""
        return self._encode_text(tokens, self.transformer, self.text_projection)

    def _encode_text(self, tokens: Tensor, transformer: TextTransformer, projection: Tensor) -> Tensor:
        end = tokens.argmax(dim=1)  # the end token has the highest id
        if not (tokens.is_cuda and self.training):  # else `cut_padding` has cut them, without a GPU synchronisation
            tokens = tokens[:, : end.max() + 1]  # attention is causal: end tokens ignore what follows
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(transformer(x))
        return x[torch.arange(len(x), device=x.device), end] @ projection

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """-> image_embed, text_embed (B, E), logit_scale ()."""
        return {
            "image_embed": self.encode_image(images),
            "text_embed": self.encode_text(tokens),
            "logit_scale": self.logit_scale.exp(),
        }

    def inputs(self, views: list[Tensor], boxes: Tensor, tokens: Tensor) -> tuple:
        """The inputs of `forward` from a batch of crops.py's views."""
        return views[0], tokens

    def loss(self, outputs: dict[str, Tensor], cfg) -> dict[str, Tensor]:
        return baseline_loss(outputs)

    def update_ema(self, momentum: float) -> None:
        """Only A-CLIP has EMA towers."""

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp exp(logit_scale) to [1, 100], after every step. U:main.py:346."""
        self.logit_scale.clamp_(0, 4.6052)


class SLIP(CLIP):
    """CLIP on one view plus SimCLR on two others, the paper's second baseline. S:models.py:203."""

    def __init__(self, ssl_hidden: int = 4096, ssl_dim: int = 256, **towers):
        super().__init__(**towers)
        self.image_mlp = simclr_head(self.image_projection.shape[0], ssl_hidden, ssl_dim)

    def forward(self, images: Tensor, tokens: Tensor, aug1: Tensor, aug2: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> CLIP's outputs and aug1_embed, aug2_embed (B, S); BatchNorm per view."""
        cls = self.visual(torch.cat([images, aug1, aug2]), cls_only=True)[0][:, 0]
        cls_image, cls_1, cls_2 = cls.chunk(3)
        return {
            "image_embed": cls_image @ self.image_projection,
            "text_embed": self.encode_text(tokens),
            "logit_scale": self.logit_scale.exp(),
            "aug1_embed": self.image_mlp(cls_1),
            "aug2_embed": self.image_mlp(cls_2),
        }

    def inputs(self, views: list[Tensor], boxes: Tensor, tokens: Tensor) -> tuple:
        return views[0], tokens, *views[1:]

    def loss(self, outputs: dict[str, Tensor], cfg) -> dict[str, Tensor]:
        return baseline_loss(outputs, cfg.temperature, cfg.simclr_weight)


class ACLIP(CLIP):
    """A-CLIP. U:models.py:314.

    `mask` selects the patches that an online view keeps in training. attentive: high EMA scores. high: low EMA scores
    (the high ones are dropped). random. none: all patches. In eval mode all are kept. Without `ssl` there are no SimCLR
    and BYOL heads, as in the paper's ablation of masking.
    """

    def __init__(
        self,
        mask: str = "attentive",
        keep_ratio: float = 0.5,
        ssl: bool = True,
        ssl_hidden: int = 4096,
        ssl_dim: int = 256,
        freeze_patch_proj: bool = True,
        **towers,
    ):
        super().__init__(freeze_patch_proj=freeze_patch_proj, **towers)
        if mask not in ("attentive", "high", "random", "none"):
            raise UserError(f"mask is attentive, high, random or none, not {mask!r}")
        self.mask, self.keep_ratio, self.ssl = mask, keep_ratio, ssl
        if ssl:
            width = self.image_projection.shape[0]
            self.image_mlp = simclr_head(width, ssl_hidden, ssl_dim)
            self.im_proj_byol = byol_head(width, ssl_hidden, ssl_dim)
            self.im_pred_byol = byol_head(ssl_dim, ssl_hidden, ssl_dim)
            self.im_proj_byol_e = copy.deepcopy(self.im_proj_byol)
        self.visual_ema = copy.deepcopy(self.visual)  # the copies start equal
        self.transformer_e = copy.deepcopy(self.transformer)
        self.image_projection_e = copy.deepcopy(self.image_projection)
        self.text_projection_e = copy.deepcopy(self.text_projection)
        for ema, _ in self._pairs():
            ema.requires_grad_(False)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(EMA, online) parameters. The EMA text tower uses the online embeddings (token, position) and final norm."""
        modules = [(self.visual_ema, self.visual), (self.transformer_e, self.transformer)]
        if self.ssl:
            modules.append((self.im_proj_byol_e, self.im_proj_byol))
        pairs = [pair for ema, online in modules for pair in zip(ema.parameters(), online.parameters(), strict=True)]
        return [
            *pairs,
            (self.image_projection_e, self.image_projection),
            (self.text_projection_e, self.text_projection),
        ]

    @torch.no_grad()
    def update_ema(self, momentum: float) -> None:
        """e <- m e + (1 - m) o for every EMA parameter, no buffer. Call it before the forward pass. U:models.py:360."""
        ema, online = map(list, zip(*self._pairs(), strict=True))
        get_ema_multi_avg_fn(momentum)(ema, online, None)

    def encode_image(self, images: Tensor, keep_ids: Tensor | None = None, ema: bool = False) -> Tensor:
        """(B, 3, H, W) -> (B, E), not normalised; online or EMA tower."""
        if ema:
            return self.visual_ema(images, cls_only=True)[0][:, 0] @ self.image_projection_e  # never masked
        return self.visual(images, keep_ids, cls_only=True)[0][:, 0] @ self.image_projection

    def encode_text(self, tokens: Tensor, ema: bool = False) -> Tensor:
        if ema:
            return self._encode_text(tokens, self.transformer_e, self.text_projection_e)
        return super().encode_text(tokens)

    @property
    def needs_ema_view(self) -> bool:
        """Whether a training step runs the EMA tower."""
        return self.ssl or self.mask in ("attentive", "high")

    def keep_ids(self, scores: Tensor | None, boxes: Tensor, noise: Tensor) -> Tensor | None:
        """Patches (V*B, K) that the views keep. scores (B, n*n) of the EMA view; boxes (B, V+1, 4), the EMA view's box
        last; noise (V*B, N) for random masks. U:models.py:479-484."""
        if self.mask == "none":
            return None
        if self.mask == "random":
            return random_keep_ids(noise, self.keep_ratio)
        views, grid = boxes.shape[1] - 1, math.isqrt(noise.shape[1])
        boxes = boxes.transpose(0, 1)  # (V+1, B, 4)
        of_views = crop_scores(
            scores.repeat(views, 1), boxes[:-1].flatten(0, 1), boxes[-1].repeat(views, 1), grid
        )  # (V*B, N)
        return attentive_keep_ids(of_views, self.keep_ratio, self.block, "low" if self.mask == "attentive" else "high")

    def inputs(self, views: list[Tensor], boxes: Tensor, tokens: Tensor) -> tuple:
        masked = views[: boxes.shape[1] - 1]
        return torch.cat(masked), views[len(masked)] if self.needs_ema_view else None, tokens, boxes

    def loss(self, outputs: dict[str, Tensor], cfg) -> dict[str, Tensor]:
        return aclip_loss(outputs, cfg.simclr_weight, cfg.byol_weight, cfg.temperature, cfg.simclr_pair)

    def forward(self, views: Tensor, ema_view: Tensor | None, tokens: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """views (V*B, 3, H, W), all first views first; ema_view (B, 3, h, w); tokens (B, T); boxes (B, V+1, 4) int64.

        -> image_embed (V*B, E), text_embed (B, E), logit_scale (), and with ssl image_ssl_embed, byol_feats (V*B, S),
        byol_feats_e (B, S). Call `update_ema` first. `ema_view` may be None where `needs_ema_view` is False.
        """
        outputs, scores, keep_ids = {}, None, None
        if self.needs_ema_view:
            with torch.no_grad():  # the stop-gradient of BYOL's target
                scored = self.mask in ("attentive", "high")
                cls_e, scores = self.visual_ema(ema_view, return_scores=scored, cls_only=True)
                if self.ssl:
                    outputs["byol_feats_e"] = self.im_proj_byol_e(cls_e[:, 0])
        if self.training:
            patches = (views.shape[2] // self.patch_size) * (views.shape[3] // self.patch_size)
            keep_ids = self.keep_ids(scores, boxes, torch.rand(len(views), patches, device=views.device))
        cls = self.visual(views, keep_ids, cls_only=True)[0][:, 0]  # (V*B, D)
        if self.ssl:
            outputs["image_ssl_embed"] = self.image_mlp(cls)
            outputs["byol_feats"] = self.im_pred_byol(self.im_proj_byol(cls))
        return outputs | {
            "image_embed": cls @ self.image_projection,
            "text_embed": self.encode_text(tokens),
            "logit_scale": self.logit_scale.exp(),
        }


class Towers(nn.Module):
    """The towers to evaluate: the model's EMA towers if it has them and `ema` is set, else the online ones."""

    def __init__(self, model: CLIP, ema: bool = True):
        super().__init__()
        self.model, self.which = model, {"ema": True} if ema and isinstance(model, ACLIP) else {}

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images, **self.which)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens, **self.which)


def create_model(method: str = "aclip", preset: str = "vit_b16", **settings) -> CLIP | SLIP | ACLIP:
    """The model of a preset, as `method` aclip, clip or slip; `settings` override the preset's.

    UserError if there is no such preset or method.
    """
    if preset not in PRESETS:
        raise UserError(f"model {preset!r} is none of {', '.join(PRESETS)}")
    methods = {"aclip": ACLIP, "clip": CLIP, "slip": SLIP}
    if method not in methods:
        raise UserError(f"method {method!r} is none of {', '.join(methods)}")
    settings = {**PRESETS[preset], **settings}
    if method == "clip":
        settings = {name: value for name, value in settings.items() if not name.startswith("ssl_")}
    return methods[method](**settings)


# -------------------------------------------------------------------------------------------------------------- losses

# Losses are in float32 and over the global batch: each rank compares its own samples with those of all ranks, gathered
# with gradient. The mean over ranks is the loss of the global batch, and DDP's mean of the gradients its gradient.


def clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """(CE(rows) + CE(columns)) / 2 of scale * cosines; image, text (B, E) of any norm. U:losses.py:70-97."""
    return loss.clip_loss(F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), scale)


def simclr_loss(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent of embeddings (B, S): find b_i among all of b and the other embeddings of a, given a_i; and vice versa.

    Source: U:losses.py:141.
    """
    a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
    all_a, all_b = gather(a), gather(b)
    targets = own_columns(a)
    own = F.one_hot(targets, len(all_a)) * 1e9

    def direction(x: Tensor, same: Tensor, other: Tensor) -> Tensor:
        logits = torch.cat([x @ other.T / temperature, x @ same.T / temperature - own], dim=1)
        return F.cross_entropy(logits, targets)

    return (direction(a, all_a, all_b) + direction(b, all_b, all_a)) / 2


def byol_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean of 2 - 2 cos(pred, target) over pairs (M, S). `ACLIP` stops the target's gradient. U:losses.py:52."""
    pred, target = F.normalize(pred.float(), dim=-1), F.normalize(target.float(), dim=-1)
    return (2 - 2 * (pred * target).sum(-1)).mean()


def accuracy(image: Tensor, text: Tensor) -> Tensor:
    """Percent of images whose own caption is the nearest in the batch."""
    with torch.no_grad():
        cosine = F.normalize(image.float(), dim=-1) @ gather(F.normalize(text.float(), dim=-1), with_grad=False).T
        return 100 * (cosine.argmax(dim=1) == own_columns(image)).float().mean()


def aclip_loss(
    outputs: dict[str, Tensor],
    simclr_weight: float = 1.0,
    byol_weight: float = 2.0,
    temperature: float = 0.1,
    simclr_pair: str = "cross",
) -> dict[str, Tensor]:
    """L = mean_v L_CLIP(view v) + SimCLR(view 1, view 2) + 2 BYOL(views, EMA view). U:losses.py:39.

    `simclr_pair="same"` gives SimCLR the first view twice, as the released code does (the term then only pushes samples
    apart). SimCLR is 0 with one view, and SimCLR and BYOL are 0 without SSL heads. Returns loss, its unweighted terms
    and clip_acc, by name.
    """
    text, scale = outputs["text_embed"], outputs["logit_scale"].float()
    views = outputs["image_embed"].split(len(text))
    losses = {f"contra_loss_{v}": clip_loss(view, text, scale) for v, view in enumerate(views, 1)}
    loss = sum(losses.values()) / len(views)
    losses["simclr_loss"] = losses["im_byol_loss"] = scale.new_zeros(())
    if "image_ssl_embed" in outputs:
        ssl = outputs["image_ssl_embed"].split(len(text))
        if len(views) == 1:
            # adds 0 and gives the SimCLR head zero gradients: DistributedDataParallel needs gradients of all parameters
            losses["simclr_loss"] = 0.0 * ssl[0].float().sum()
        else:
            losses["simclr_loss"] = simclr_loss(ssl[0], ssl[0 if simclr_pair == "same" else 1], temperature)
        losses["im_byol_loss"] = byol_loss(outputs["byol_feats"], outputs["byol_feats_e"].repeat(len(views), 1))
    loss = loss + simclr_weight * losses["simclr_loss"] + byol_weight * losses["im_byol_loss"]
    return {"loss": loss, **losses, "clip_acc": accuracy(views[-1], text)}


def baseline_loss(outputs: dict[str, Tensor], temperature: float = 0.1, ssl_scale: float = 1.0) -> dict[str, Tensor]:
    """CLIP's loss, or SLIP's (S:losses.py:112) if the outputs contain its two augmented views.

    SLIP's own code gathers CLIP's features without gradient; ours gathers with gradient, as A-CLIP.
    """
    image, text = outputs["image_embed"], outputs["text_embed"]
    losses = {"clip_loss": clip_loss(image, text, outputs["logit_scale"].float())}
    loss = losses["clip_loss"]
    if "aug1_embed" in outputs:
        losses["ssl_loss"] = simclr_loss(outputs["aug1_embed"], outputs["aug2_embed"], temperature)
        loss = loss + ssl_scale * losses["ssl_loss"]
    return {"loss": loss, **losses, "clip_acc": accuracy(image, text)}


# --------------------------------------------------------------------------------------------------------- checkpoints


def load_checkpoint(model: nn.Module, path_or_dict: str | Path | dict) -> None:
    """Load a checkpoint of the authors, of SLIP or of ours, strictly, with or without DDP's prefix `module.`.

    The authors' files contain an argparse.Namespace and NumPy numbers; these and plain values are unpickled, nothing
    else. A CLIP model loads the towers of a SLIP file, without its SimCLR head. UserError if the weights do not fit.
    """
    state = path_or_dict
    if not isinstance(state, dict):
        state = checkpoints.load_checkpoint(state)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        where = "the checkpoint" if isinstance(path_or_dict, dict) else path_or_dict
        raise UserError(f"{where} holds no weights")
    weights = {key.removeprefix("module."): value for key, value in state.items()}
    if type(model) is CLIP:
        weights = {key: value for key, value in weights.items() if not key.startswith("image_mlp.")}
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        reason = checkpoints.one_line(error, 300)
        raise UserError(f"the checkpoint does not hold the weights of this {type(model).__name__}: {reason}") from error
