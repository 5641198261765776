"""Attentive Mask CLIP, A-CLIP (arXiv 2212.08653, ICCV 2023).

Authors' code: microsoft/A-CLIP@0e51942, cited as `U:<path>:<line>`; its base facebookresearch/SLIP@c6faf5d, as `S:`.
The paper's contribution:
  - an EMA image tower scores patches by its [CLS] attention          `MaskedViT.forward(return_scores=True)`
                                                                    (towers.py)
  - scores are carried from the EMA view into each crop of the image  `crop_scores`
  - the 2x2 blocks of high score are kept, the other tokens dropped   `attentive_keep_ids`
  - CLIP loss per masked view, SimCLR between the views, BYOL from    `ACLIP`, `aclip_loss`
    each masked view to the EMA tower's unmasked one                (losses.py)
The paper's baselines, CLIP and SLIP, are here too; towers and heads of all three are in towers.py.

Shapes: B batch, V views, g patches a side, N = g*g patches, K kept patches, D tower width, E joint width, S SSL width.
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from attentive_mask_clip.losses import aclip_loss, baseline_loss, byol_loss, clip_loss, simclr_loss  # noqa: F401
from attentive_mask_clip.towers import MaskedViT, TextTransformer, byol_head, simclr_head
from shared import checkpoints

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
}

# ----------------------------------------------------------------------------------------------- token selection


def crop_scores(scores: Tensor, boxes: Tensor, ref_boxes: Tensor, grid: int) -> Tensor:
    """Scores (B, n*n) of the patches of `ref_boxes` -> scores (B, grid*grid) of those of `boxes`. U:models.py:448.

    Boxes (B, 4) int64 are (top, left, height, width) in pixels of the original image. As upstream does image by image:
    enlarge the map bilinearly to its box, cut out the other box (zero outside), shrink bilinearly (no antialias) to
    the grid. The three are linear and act on rows and columns apart, so a map S becomes R_y S R_x^T for all images at
    once, with R_y, R_x (B, grid, n) from `_resample`.
    """
    n = math.isqrt(scores.shape[1])
    offset = boxes - ref_boxes  # of the top left corners, in its first two columns
    with torch.autocast(scores.device.type, enabled=False):
        rows = _resample(n, ref_boxes[:, 2], offset[:, 0], boxes[:, 2], grid)
        columns = _resample(n, ref_boxes[:, 3], offset[:, 1], boxes[:, 3], grid)
        return (rows @ scores.float().unflatten(1, (n, n)) @ columns.mT).flatten(1)


def _resample(n: int, ref_length: Tensor, offset: Tensor, length: Tensor, grid: int) -> Tensor:
    """(B, grid, n): weight of each of n cells, stretched over `ref_length` pixels, in each of `grid` cells stretched
    over the `length` pixels that start at pixel `offset`; bilinear both ways, all arguments (B,) but n and grid.
    Sources are rounded to float32 where torch's own resize rounds them, which upstream uses."""
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
    """Patches (B, K) int64, ascending, of the blocks with the highest mean score (B, N). U:models.py:24.

    int(blocks * keep_ratio) + 1 blocks of `block` x `block` patches are kept, at most all. `drop="high"` keeps those
    of the lowest score instead, the paper's counter-test. Of equal scores the earlier block counts as the higher.
    """
    grid = math.isqrt(scores.shape[1])
    if grid * grid != scores.shape[1] or grid % block:
        raise ValueError(f"{scores.shape[1]} patches are no square grid that blocks of {block} x {block} tile")
    side = grid // block
    blocks = F.avg_pool2d(scores.unflatten(1, (1, grid, grid)), block).flatten(1)  # rounds as upstream's resize
    order = blocks.argsort(dim=1, descending=drop == "low", stable=True)
    kept = order[:, : int(side * side * keep_ratio) + 1]
    within = torch.arange(block, device=scores.device)
    within = (within[:, None] * grid + within).flatten()  # patches of a block, from its top left one
    first = kept // side * block * grid + kept % side * block
    return (first[:, :, None] + within).flatten(1).sort(dim=1).values


def random_keep_ids(noise: Tensor, keep_ratio: float = 0.5) -> Tensor:
    """The int(N * keep_ratio) patches (B, K) of the lowest noise (B, N), in rising order of it. U:models.py:538."""
    return noise.argsort(dim=1)[:, : int(noise.shape[1] * keep_ratio)]


# ---------------------------------------------------------------------------------------------------------- models


class CLIP(nn.Module):
    """Dual encoder of the paper's base, and its first baseline (S:models.py:67): a ViT and CLIP's text transformer."""

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
    ):
        super().__init__()
        self.image_size, self.patch_size, self.context_length = image_size, patch_size, context_length
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
        tokens = tokens[:, : end.max() + 1]  # no caption of the batch reads further: attention is causal
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

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """After every step, the temperature's inverse stays in [1, 100]. U:main.py:346."""
        self.logit_scale.clamp_(0, 4.6052)


class SLIP(CLIP):
    """CLIP on one view plus SimCLR on two others, the paper's second baseline. S:models.py:203."""

    def __init__(self, ssl_hidden: int = 4096, ssl_dim: int = 256, **towers):
        super().__init__(**towers)
        self.image_mlp = simclr_head(self.image_projection.shape[0], ssl_hidden, ssl_dim)

    def forward(self, images: Tensor, tokens: Tensor, aug1: Tensor, aug2: Tensor) -> dict[str, Tensor]:
        """All images (B, 3, H, W) -> CLIP's outputs and aug1_embed, aug2_embed (B, S); one BatchNorm batch a view."""
        cls = self.visual(torch.cat([images, aug1, aug2]), cls_only=True)[0][:, 0]
        cls_image, cls_1, cls_2 = cls.chunk(3)
        return {
            "image_embed": cls_image @ self.image_projection,
            "text_embed": self.encode_text(tokens),
            "logit_scale": self.logit_scale.exp(),
            "aug1_embed": self.image_mlp(cls_1),
            "aug2_embed": self.image_mlp(cls_2),
        }


class ACLIP(CLIP):
    """A-CLIP. U:models.py:314.

    mask says which patches an online view keeps in training: those of high EMA score (attentive), of low (high: the
    high scores are dropped), chosen at random, or all (none). In eval mode all are kept. Without `ssl` there are
    neither SimCLR nor BYOL heads, as in the paper's ablation of masking.
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
            raise ValueError(f"mask is attentive, high, random or none, not {mask!r}")
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
        """(EMA, online) parameters. The EMA text tower borrows token and position embeddings and the final norm."""
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
        """Whether the training pass reads the EMA tower."""
        return self.ssl or self.mask in ("attentive", "high")

    def keep_ids(self, scores: Tensor | None, boxes: Tensor, noise: Tensor) -> Tensor | None:
        """Patches (V*B, K) that the views keep. scores (B, n*n) of the EMA view, boxes (B, V+1, 4) with the EMA view's
        last, noise (V*B, N) for random masks. U:models.py:479-484."""
        if self.mask == "none":
            return None
        if self.mask == "random":
            return random_keep_ids(noise, self.keep_ratio)
        views, grid = boxes.shape[1] - 1, math.isqrt(noise.shape[1])
        boxes = boxes.transpose(0, 1)  # (V+1, B, 4)
        of_views = crop_scores(
            scores.repeat(views, 1), boxes[:-1].flatten(0, 1), boxes[-1].repeat(views, 1), grid
        )  # (V*B, N)
        return attentive_keep_ids(of_views, self.keep_ratio, drop="low" if self.mask == "attentive" else "high")

    def forward(self, views: Tensor, ema_view: Tensor | None, tokens: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """views (V*B, 3, H, W), view by view; ema_view (B, 3, h, w); tokens (B, T); boxes (B, V+1, 4) int64.

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


def create_model(method: str = "aclip", preset: str = "vit_b16", **settings) -> CLIP | SLIP | ACLIP:
    """The towers of a preset as `method` aclip, clip or slip; settings override the preset's and reach the class."""
    if preset not in PRESETS:
        raise ValueError(f"model {preset!r} is none of {', '.join(PRESETS)}")
    settings = {**PRESETS[preset], **settings}
    if method == "clip":
        settings = {name: value for name, value in settings.items() if not name.startswith("ssl_")}
    return {"aclip": ACLIP, "clip": CLIP, "slip": SLIP}[method](**settings)


def load_checkpoint(model: nn.Module, path_or_dict: str | Path | dict) -> None:
    """Load the authors' checkpoints, SLIP's, or ours, strictly, with DDP's `module.` prefix or without.

    The authors' files hold their argparse.Namespace and learning rates that are NumPy numbers; both are allowed beside
    plain values, nothing else is unpickled.
    A CLIP model takes a SLIP file's towers and leaves its SimCLR head.
    """
    state = path_or_dict
    if not isinstance(state, dict):
        if not Path(state).is_file():
            raise FileNotFoundError(f"no checkpoint at {state}")
        try:
            with torch.serialization.safe_globals(checkpoints.AUTHORS_GLOBALS):
                state = torch.load(state, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path_or_dict} does not load with weights_only=True ({type(error).__name__})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path_or_dict} holds no weights")
    weights = {key.removeprefix("module."): value for key, value in state.items()}
    if type(model) is CLIP:
        weights = {key: value for key, value in weights.items() if not key.startswith("image_mlp.")}
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the checkpoint does not hold the weights of this {type(model).__name__}: {reason}"
        ) from error
