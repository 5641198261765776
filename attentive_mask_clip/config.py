"""A-CLIP's, SLIP's and CLIP's settings and presets.

Presets yfcc15m-* are rows of the paper's tables, as in the README of microsoft/A-CLIP@0e51942, except the row with high
scores dropped, which we have from others' notes, and ViT-S/16, which only the authors' code has. cc3m-* and cc12m-* are
runs of SLIP's README, and A-CLIP with the same epochs. The others are ours.
"""

from dataclasses import dataclass, replace
from typing import Literal

from attentive_mask_clip.model import PRESETS as MODELS
from shared.errors import UserError
from shared.settings import Beta, Count, Positive, Rate, RunConfig, Share


@dataclass
class Config(RunConfig):
    """Defaults are A-CLIP's with ViT-B/16 on YFCC15M, 25 epochs."""

    method: Literal["aclip", "slip", "clip"] = "aclip"
    """aclip, or one of the paper's baselines."""
    model: str = "vit_b16"
    """Towers: vit_s16, vit_b16, vit_l16, emoji or scenes."""
    image_size: Count | None = None
    """Image side in pixels; None is the model's own."""
    mask: Literal["attentive", "high", "random", "none"] = "attentive"
    """Patches that A-CLIP keeps. attentive: blocks with high EMA scores. high: blocks with low EMA scores (the
    counter-test, which drops the high ones). random: random patches. none: all."""
    keep_ratio: Share = 0.5
    """Share r of patches to keep: int(r * blocks) + 1 blocks of 2x2 (`scenes` towers: single patches), or
    int(r * patches) random patches."""
    views: Literal[1, 2] = 2
    """A-CLIP's masked views of an image."""
    ssl: bool = True
    """A-CLIP's SimCLR (with two views) and BYOL losses; off for the ablation of masking."""
    ema_image_size: Count | None = None
    """Side of the EMA view in pixels; None: as the other views. A-CLIP-eff uses half of their side."""
    ema_momentum: Share = 0.996
    """First momentum of the EMA towers; it rises along a cosine to 1."""
    simclr_weight: Rate = 1.0
    """Weight of SimCLR, in A-CLIP and SLIP."""
    byol_weight: Rate = 2.0
    """Weight of BYOL."""
    temperature: Positive = 0.1
    """Temperature of SimCLR."""
    simclr_pair: Literal["cross", "same"] = "cross"
    """cross: SimCLR between the two views. same: view 1 with itself, as in the released code."""
    released_boxes: bool = False
    """Compute EMA boxes by the released formula, so that views may extend beyond them; off: they cover both views."""
    crop_scale: Share = 0.5
    """Smallest share of the image's area in a crop, except SLIP's crops for SimCLR."""
    ssl_crop_scale: Share = 0.08
    """SLIP's crops for SimCLR: their smallest share of the image's area."""
    augmentation: Literal["paper", "crop"] = "paper"
    """paper: each method's own. crop: only crops, for classes that differ in colour or direction, as emoji do."""

    epochs: Count = 25
    """Passes over the data."""
    batch_size: Count = 4096
    """Pairs per step, over all processes together."""
    accumulate: Count = 1
    """Micro-batches a step (the authors' --update-freq), each with its own softmax and batch norms. Unlike in the other
    folders, gradients differ from those of one batch."""
    lr: Rate = 5e-4
    """Peak learning rate."""
    text_lr: Rate = 1.0
    """Learning rate of the text tower, as a multiple of all other parameters' rate."""
    warmup_lr: Rate = 1e-6
    """Learning rate of the first step."""
    min_lr: Rate = 1e-5
    """Learning rate towards which the cosine falls."""
    warmup_epochs: Rate = 1.0
    """Epochs of linear warm-up."""
    weight_decay: Rate = 0.5
    """AdamW's weight decay of matrices and embeddings; gains, biases and the temperature have none."""
    beta2: Beta = 0.98
    """AdamW's beta2."""
    caption_lines: bool = False
    """The first line of a caption file is a title, the other lines are a description (YFCC15M). One of the two is drawn
    each time the sample is read, never a blank one."""
    keep_best: bool = False
    """Also keep checkpoint-best.pt: the evaluated checkpoint (`eval_every`) with the best top-1 of online towers."""

    @property
    def adamw(self) -> dict:
        return {"betas": (0.9, self.beta2), "eps": 1e-8}

    def model_settings(self) -> dict:
        """Keyword arguments of `model.create_model` beside method and preset. A-CLIP freezes its patch projection."""
        settings: dict = {"freeze_patch_proj": self.method == "aclip"}
        if self.image_size is not None:
            settings["image_size"] = self.image_size
        if self.method == "aclip":
            settings |= {"mask": self.mask, "keep_ratio": self.keep_ratio, "ssl": self.ssl}
        return settings

    def check(self, world_size: int) -> None:
        super().check(world_size)
        if self.keep_best and not self.eval_every:
            raise UserError("--keep-best needs the evaluations of --eval-every: pass that, or --no-keep-best")
        if (
            self.batch_size == world_size * self.accumulate
            and self.method != "clip"
            and (self.ssl or self.method == "slip")
        ):
            raise UserError("BatchNorm needs more than one pair per process and micro-batch: raise --batch-size")
        if self.model not in MODELS:
            raise UserError(f"--model is one of {', '.join(MODELS)}, not {self.model!r}")
        for name in ("keep_ratio", "crop_scale", "ssl_crop_scale"):
            if getattr(self, name) == 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not 0")
        if self.released_boxes and self.views == 1:
            raise UserError("--released-boxes needs two views: pass --views 2, or --no-released-boxes")
        if self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup-epochs {self.warmup_epochs} must be in 0..{self.epochs}, the number of epochs")
        self.check_patches()

    def check_patches(self) -> None:
        """UserError if images cannot be cut into patches, or masks leave none of them."""
        shape = MODELS[self.model]
        patch, size = shape.get("patch_size", 16), self.image_size or shape.get("image_size", 224)
        if size < patch or size % patch:
            raise UserError(f"--image-size {size} cannot be cut into patches of {patch} pixels")
        ema, block, side = self.ema_image_size or size, shape.get("block", 2), size // patch
        if ema < patch or ema % patch:
            raise UserError(f"--ema-image-size {ema} cannot be cut into patches of {patch} pixels")
        if self.mask == "random" and int(side**2 * self.keep_ratio) == 0:
            raise UserError(f"--keep-ratio {self.keep_ratio} keeps none of {side**2} patches")
        if self.method == "aclip" and self.mask in ("attentive", "high") and side % block:
            raise UserError(
                f"blocks of {block}x{block} patches do not tile {side} patches a side: choose another --image-size"
            )


YFCC = Config(dataset_size=14_689_580, caption_lines=True)
# an author of SLIP writes that accuracy on CC3M peaks well before the last epoch (SLIP's issue 9)
CC3M = Config(epochs=40, eval_every=1, eval_set="data/wds_imagenet1k", keep_best=True)
CC12M = replace(CC3M, epochs=35)
SLIP = dict(method="slip", lr=3e-3, weight_decay=0.1)
CLIP = dict(method="clip")
ABLATION = dict(ssl=False)  # masking alone, the first table of the authors' README
SMALL = Config(
    model="emoji",
    image_size=60,
    ema_momentum=0.95,
    epochs=8,
    batch_size=128,
    lr=1e-3,
    weight_decay=0.2,
    workers=0,
    save_every=50,
)
EMOJI = replace(
    SMALL,
    data="data/emoji/train",
    image_size=None,
    crop_scale=0.8,
    augmentation="crop",
    eval_every=2,
    eval_set="data/emoji/eval/names_ood",
)
SCENES = replace(
    EMOJI,
    data="data/scenes-one/train",
    keep_in_memory=True,
    model="scenes",
    dataset_size=2_000,
    simclr_weight=0.1,  # a tenth of the paper's weights, in its ratio: with the full ones, captions are learned worse
    byol_weight=0.2,
    ema_momentum=0.9,
    epochs=16,
    batch_size=64,
    text_lr=0.1,
    weight_decay=0.05,
    warmup_epochs=2,
    eval_every=4,
    eval_set="data/scenes-one/eval/names_ood",
)


def _preset(row: str, base: Config = YFCC, **settings) -> tuple[str, Config]:
    """(row of the paper, `base` with these `settings` replaced) of a preset."""
    return row, replace(base, **settings)


# name: (row of the paper with ImageNet's zero-shot accuracy and R@1 image to text/text to image in percent, settings);
# rows of the paper are on YFCC15M, with 64 GPUs
PRESETS = {
    "small": ("ours: A-CLIP on your own --data, small", SMALL),
    "small-slip": _preset("ours: its SLIP baseline: same samples and steps", SMALL, method="slip"),
    "small-clip": _preset("ours: its CLIP baseline: same samples and steps", SMALL, method="clip"),
    "emoji": ("ours: A-CLIP on the embedded corpus, minutes on two CPU cores", EMOJI),
    "emoji-slip": _preset("ours: its SLIP baseline: same samples and steps", EMOJI, method="slip"),
    "emoji-clip": _preset("ours: its CLIP baseline: same samples and steps", EMOJI, method="clip"),
    "scenes": ("ours: A-CLIP on scenes of one emoji on a textured ground, a minute on a CPU core", SCENES),
    "scenes-slip": _preset("ours: its SLIP baseline: same samples and steps", SCENES, method="slip"),
    "scenes-clip": _preset("ours: its CLIP baseline: same samples and steps", SCENES, method="clip"),
    "yfcc15m-vitb16": _preset("main table, A-CLIP: ImageNet 43.9, Flickr30K 62.7/42.1, COCO 38.0/23.2"),
    "yfcc15m-vitb16-eff": _preset(
        "main table, A-CLIP-eff: ImageNet 42.9, Flickr30K 62.7/40.6, COCO 37.4/22.5",
        ema_image_size=112,
    ),
    "yfcc15m-vitb16-50ep": _preset(
        "longer training, A-CLIP, 50 epochs: ImageNet 46.3, Flickr30K 66.7/43.2, COCO 39.8/24.4",
        epochs=50,
    ),
    "yfcc15m-vitb16-100ep": _preset(
        "longer training, A-CLIP, 100 epochs: ImageNet 48.0, Flickr30K 66.3/45.7, COCO 40.7/25.1",
        epochs=100,
    ),
    "yfcc15m-vitl16": _preset(
        "larger model, A-CLIP, ViT-L: ImageNet 48.9, Flickr30K 64.1/48.2, COCO 39.1/26.9",
        model="vit_l16",
    ),
    "yfcc15m-vits16": _preset("released code, ViT-S; not in the paper: no number is published", model="vit_s16"),
    "yfcc15m-vitb16-random-1x50": _preset(
        "Table 2a (second hand), random 1x50 %: ImageNet 35.0, Flickr30K 48.8/32.5, COCO 28.9/16.6",
        mask="random",
        views=1,
        **ABLATION,
    ),
    "yfcc15m-vitb16-random-2x50": _preset(
        "Table 2a (second hand), random 2x50 %: ImageNet 38.0, Flickr30K 54.6/34.4, COCO 31.1/18.7",
        mask="random",
        **ABLATION,
    ),
    "yfcc15m-vitb16-attentive-1x50": _preset(
        "Table 2a (second hand), attentive 1x50 %: ImageNet 39.5, Flickr30K 57.6/36.6, COCO 34.2/19.8",
        views=1,
        **ABLATION,
    ),
    "yfcc15m-vitb16-attentive-2x50": _preset(
        "Table 2a (second hand), attentive 2x50 %: ImageNet 41.3, Flickr30K 59.3/38.4, COCO 35.1/21.3",
        **ABLATION,
    ),
    "yfcc15m-vitb16-high-2x50": _preset(
        "Table 2b (second hand), high dropped: ImageNet 28.5, Flickr30K 42.6/29.0, COCO 23.5/13.6",
        mask="high",
        **ABLATION,
    ),
    "yfcc15m-vitb16-clip": _preset(
        "main table, CLIP; masking, none: ImageNet 37.6, Flickr30K 51.4/32.6, COCO 27.9/17.6",
        **CLIP,
    ),
    "yfcc15m-vitb16-clip-50ep": _preset(
        "longer training, CLIP, 50 epochs: ImageNet 39.4, Flickr30K 53.9/35.8, COCO 30.2/19.2",
        **CLIP,
        epochs=50,
    ),
    "yfcc15m-vitb16-clip-100ep": _preset(
        "longer training, CLIP, 100 epochs: ImageNet 42.7, Flickr30K 61.0/37.9, COCO 34.4/20.9",
        **CLIP,
        epochs=100,
    ),
    "yfcc15m-vitl16-clip": _preset(
        "larger model, CLIP, ViT-L: ImageNet 40.4, Flickr30K 51.4/35.2, COCO 28.9/18.5",
        **CLIP,
        model="vit_l16",
    ),
    "yfcc15m-vitb16-slip": _preset("main table, SLIP: ImageNet 42.8, Flickr30K 57.2/41.2, COCO 33.6/21.9", **SLIP),
    "yfcc15m-vitb16-slip-50ep": _preset(
        "longer training, SLIP, 50 epochs: ImageNet 44.1, Flickr30K 60.6/41.1, COCO 33.2/22.3",
        **SLIP,
        epochs=50,
    ),
    "yfcc15m-vitb16-slip-100ep": _preset(
        "longer training, SLIP, 100 epochs: ImageNet 45.0, Flickr30K 59.3/41.4, COCO 34.6/22.7",
        **SLIP,
        epochs=100,
    ),
    "yfcc15m-vitl16-slip": _preset(
        "larger model, SLIP, ViT-L: ImageNet 46.2, Flickr30K 60.6/43.7, COCO 35.3/23.5",
        **SLIP,
        model="vit_l16",
    ),
    "cc3m-vitb16": _preset("released code, --dataset cc3m: no number is published", CC3M),
    "cc3m-vitb16-clip": _preset("SLIP's README, CLIP, CC3M: ImageNet zero-shot 17.1 %", CC3M, **CLIP),
    "cc3m-vitb16-slip": _preset("SLIP's README, SLIP, CC3M: ImageNet zero-shot 23.0 %", CC3M, **SLIP),
    "cc12m-vitb16": _preset("released code, --dataset cc12m: no number is published", CC12M),
    "cc12m-vitb16-clip": _preset("SLIP's README, CLIP, CC12M: ImageNet zero-shot 36.5 %", CC12M, **CLIP),
    "cc12m-vitb16-slip": _preset("SLIP's README, SLIP, CC12M: ImageNet zero-shot 40.7 %", CC12M, **SLIP),
}
SCRIPTS = {"train": PRESETS}
