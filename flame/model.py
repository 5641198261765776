"""The image tower and the two losses of FLAME, and the baseline with a trained text tower.

FLAME: Frozen Large Language Models Enable Data-Efficient Language-Image Pre-training (arXiv 2411.11927). Authors' code:
MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/. The image tower's MLP maps every patch token into the
space of the language model (`FLAME`); the losses have several texts per image (`mp_sigmoid_loss`, `mp_nce_loss`).
`TrainedText` is the baseline. Letters: B or N images, K facets (texts of an image), P patches, D width of the language
model, W of the ViT.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from shared import checkpoints
from shared.clip import average_at_start, open_clip_config
from shared.errors import UserError
from shared.run import gather, own_columns

# -------------------------------------------------------------------------------------------------------- image tower


class Output(NamedTuple):
    """What a loss needs of a batch: unit features float32, t = exp(logit_scale), b = logit_bias."""

    image_features: Tensor  # (B, D)
    text_features: Tensor | None  # (B, D) of the baseline; FLAME's texts come from the bank
    logit_scale: Tensor
    logit_bias: Tensor | None  # for the sigmoid loss


class FLAME(nn.Module):
    """ViT -> MLP on every patch -> mean of patches, in the space of the LLM; U:open_clip/model.py:191-206,442-448.

    visual, width: a tower of `image_tower`. The hidden width is at least 4096 upstream, for any LLM. Weights have
    upstream's names. `bias`: whether there is a logit_bias, which only the sigmoid loss uses.
    """

    def __init__(self, visual: nn.Module, width: int, text_dim: int, hidden_dim: int | None = None, bias: bool = True):
        super().__init__()
        hidden_dim = max(text_dim, 4096) if hidden_dim is None else hidden_dim
        self.visual = visual
        self.mm = nn.Sequential(
            nn.Linear(width, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, text_dim), nn.LayerNorm(text_dim)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if bias else None

    def patch_tokens(self, image: Tensor) -> Tensor:
        """(B, 3, H, H) -> patch tokens (B, P, W) of the last block: no class token, no final norm."""
        if not isinstance(self.visual, VisionTransformer):  # a timm network: its last map (B, W, h, w)
            return self.visual.forward_features(image).flatten(2).transpose(1, 2)
        output = self.visual.forward_intermediates(image, indices=1, intermediates_only=True, output_fmt="NLC")
        return output["image_intermediates"][-1]

    def encode_image(self, image: Tensor, visual_only: bool = False, normalize: bool = False) -> Tensor:
        """(B, D); `visual_only`: the mean of raw patch tokens (B, W), the input of the linear probe."""
        tokens = self.patch_tokens(image)
        features = (tokens if visual_only else self.mm(tokens)).mean(dim=1)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def forward(self, image: Tensor) -> Output:
        # a clone, because DistributedDataParallel counts a returned parameter as unused
        bias = None if self.logit_bias is None else self.logit_bias.clone()
        return Output(self.encode_image(image, normalize=True), None, self.logit_scale.exp(), bias)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp t to [1, 100]; called after each step. U:training/train.py:205."""
        self.logit_scale.clamp_(0, math.log(100))


class TrainedText(FLAME):
    """The baseline: the same image tower, and a text transformer that is trained with it, as in CLIP.

    text: open_clip's text_cfg.
    """

    def __init__(self, visual: nn.Module, width: int, embed_dim: int, hidden_dim: int | None, text: dict[str, int]):
        super().__init__(visual, width, embed_dim, hidden_dim, bias=False)
        self.text = TextTransformer(output_dim=embed_dim, **text)
        self.logit_scale.data.fill_(math.log(1 / 0.07))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """CLIP tokens (B, T) -> (B, E), in four groups of similar length, each cut to its longest text.

        In training on a GPU there is one group, because finding the lengths would wait for the GPU; the corpus has cut
        the batch before.
        """
        ends = tokens.argmax(dim=1)  # the end token has the highest id
        waits = not (tokens.is_cuda and self.training)
        embedded, _ = self.text._embeds(tokens[:, : int(ends.max()) + 1] if waits else tokens)
        order, groups = ends.argsort(), []
        for group in order.chunk(4 if waits else 1):
            length = int(ends[group].max()) + 1 if waits else tokens.shape[1]
            hidden = self.text.transformer(embedded[group, :length], attn_mask=self.text.attn_mask[:length, :length])
            groups.append(hidden[torch.arange(len(group), device=group.device), ends[group]])
        return self.text.ln_final(torch.cat(groups)[order.argsort()]) @ self.text.text_projection

    def forward(self, image: Tensor, tokens: Tensor) -> Output:
        text = F.normalize(self.encode_text(tokens).float(), dim=-1)
        return Output(self.encode_image(image, normalize=True), text, self.logit_scale.exp(), None)


def image_tower(config: dict[str, Any], image_size: int | None = None) -> tuple[nn.Module, int]:
    """(image tower, width of its tokens) of an open_clip config: open_clip's ViT, or a network of timm.

    `image_size` replaces the config's. A ViT's final norm and projection exist, as upstream, but are not used.
    """
    vision = config["vision_cfg"] | ({} if image_size is None else {"image_size": image_size})
    side, width = vision["image_size"], vision.get("width")
    if name := vision.get("timm_model_name"):
        if not timm.is_model(name):
            raise UserError(f"timm has no network {name!r}: runs on a tower of the study are measured by the study")
        tower = timm.create_model(name, num_classes=0, drop_rate=vision.get("timm_drop", 0.0))
        tower.image_size = (side, side)
        return tower, tower.num_features
    if side % vision["patch_size"]:
        raise UserError(f"patches of {vision['patch_size']} pixels do not tile an image of {side}")
    tower = VisionTransformer(
        image_size=side,
        patch_size=vision["patch_size"],
        width=width,
        layers=vision["layers"],
        heads=width // vision.get("head_width", 64),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        output_dim=config["embed_dim"],
        pool_type="avg",
    )
    return tower, width


def create_model(cfg: Any, text_dim: int | None) -> FLAME:
    """The model of a configuration; `text_dim`: width of the bank, None for the clip method, which has its config's."""
    config = open_clip_config(cfg.model)
    visual, width = image_tower(config, cfg.image_size)
    if cfg.method == "clip":
        model = TrainedText(visual, width, config["embed_dim"], cfg.hidden_dim, config["text_cfg"])
        average_at_start(model.text)
        return model
    model = FLAME(visual, width, text_dim, cfg.hidden_dim, bias=cfg.loss == "mp-sigmoid")
    model.logit_scale.data.fill_(math.log(cfg.logit_scale))
    if model.logit_bias is not None:
        model.logit_bias.data.fill_(cfg.logit_bias)
    return model


# ------------------------------------------------------------------------------------------------------------ losses


def mp_sigmoid_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """L = -1/(N K) sum_ij log sigmoid(s_ij (t x_i . y_j + b)), s_ij = 1 if text j is of image i, else -1.

    image (N, D) and text (N*K, D) have unit length; text i*K + k is facet k of image i. K = 1 is SigLIP. With several
    processes, each compares its own images with all processes' texts and divides by its own N K: the mean over
    processes equals the loss of one process. U:open_clip/loss.py:417-545.
    """
    texts, facets = len(text), len(text) // len(image)
    logits = logit_scale * image.float() @ gather(text).float().T + logit_bias
    sign = torch.full_like(logits, -1.0)
    first = dist.get_rank() * texts if dist.is_initialized() else 0
    sign[:, first : first + texts].unflatten(1, (len(image), facets)).diagonal().fill_(1.0)
    return -F.logsigmoid(sign * logits).sum() / texts


def mp_nce_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean of two cross-entropies: (a) image to text, among the k-th texts of all images, averaged over k; (b) text to
    image.

    image (N, D), text (N*K, D) as above; K = 1 is CLIP's loss. Each process compares its own images and texts with
    those of all R processes. U:open_clip/loss.py:548-635.
    """
    n, facets = len(image), len(text) // len(image)
    image, text = image.float(), text.float()
    target = own_columns(image)
    to_text = logit_scale * image @ gather(text).T  # (N, R*N*K)
    to_text = to_text.unflatten(1, (-1, facets))  # cross-entropy over dimension 1, for each facet
    to_image = logit_scale * text @ gather(image).T  # (N*K, R*N)
    image_finds = F.cross_entropy(to_text, target[:, None].expand(n, facets))
    text_finds = F.cross_entropy(to_image, target.repeat_interleave(facets))
    return (image_finds + text_finds) / 2


# ------------------------------------------------------------------------------------------------------- checkpoints


def load_checkpoint(model: FLAME, source: str | Path | dict) -> None:
    """Load the weights of one of our runs or of the authors' file, without the prefix `module.` and the LLM (`text.*`).

    UserError if the other weights do not match the model. Upstream loads with strict=False, and its evaluation models
    have no logit_bias; here only logit_bias may be missing.
    """
    state = source if isinstance(source, dict) else checkpoints.load_checkpoint(source)
    state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{'this' if isinstance(source, dict) else source} holds no weights")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if not isinstance(model, TrainedText):
        state = {name: value for name, value in state.items() if not name.startswith("text.")}
        if model.logit_bias is not None:
            state.setdefault("logit_bias", model.logit_bias.detach())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        what = checkpoints.one_line(error, 300)
        raise UserError(f"the file does not hold the weights of this {type(model).__name__}: {what}") from error
