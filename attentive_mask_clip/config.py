"""Every setting of an A-CLIP, SLIP or CLIP run, its presets, and the checks before a run starts.

Presets yfcc15m-* are rows of the paper's tables (README of microsoft/A-CLIP@0e51942), except ViT-S/16, which only the
authors' code has. cc3m-* and cc12m-* are runs of SLIP's README, and A-CLIP with the same epochs. The others are ours.
"""

import dataclasses
import math
from typing import Literal

from attentive_mask_clip.model import PRESETS as MODELS
from shared import cli
from shared.errors import UserError
from shared.presets import EMBEDDED, OWN, Row


@dataclasses.dataclass
class Config:
    """Defaults are A-CLIP's with ViT-B/16 on YFCC15M, 25 epochs."""

    data: str = ""
    """Shards in img2dataset layout ('a/{00000..00331}.tar', several lists joined by '::', a folder), or one .tsv."""
    out: str = "runs/attentive_mask_clip/run"
    """Run folder: config.json, metrics.jsonl, tensorboard/, checkpoint.pt. With a checkpoint in it, the run resumes."""
    dataset_size: int | None = None
    """Number of samples to use, from the start of the data; None uses all."""
    window_shards: int = 0
    """0: all shards are on disk, and samples are shuffled over all of them. S: each process reads its shards S at a
    time, fetched ahead and removed afterwards, so that the data may be larger than the disk. --dataset-size is then the
    number of samples per epoch: if the shards hold more, each epoch leaves out different ones; if fewer, samples
    repeat."""
    cache: str = "data/cache"
    """Folder for copies of remote shards, and for the index of large data."""
    caption_lines: bool = False
    """The first line of a caption file is a title, the other lines are a description (YFCC15M). One of the two is drawn
    each time the sample is read, never a blank one."""

    method: Literal["aclip", "slip", "clip"] = "aclip"
    """aclip, or one of the paper's baselines."""
    model: str = "vit_b16"
    """Towers: vit_s16, vit_b16, vit_l16, emoji or scenes."""
    image_size: int | None = None
    """Image side in pixels; None is the model's own."""
    freeze_patch_proj: bool | None = None
    """Freeze the patch projection at its random initialisation; None: A-CLIP does, its baselines do not."""
    mask: Literal["attentive", "high", "random", "none"] = "attentive"
    """Patches that A-CLIP keeps. attentive: blocks with high EMA scores. high: blocks with low EMA scores (the
    counter-test, which drops the high ones). random: random patches. none: all."""
    keep_ratio: float = 0.5
    """Share r of patches to keep: int(r * blocks) + 1 blocks of 2x2 (`scenes` towers: single patches), or
    int(r * patches) random patches."""
    views: Literal[1, 2] = 2
    """A-CLIP's masked views of an image."""
    ssl: bool = True
    """A-CLIP's SimCLR (with two views) and BYOL losses; off for the ablation of masking."""
    ema_image_size: int | None = None
    """Side of the EMA view in pixels; None: as the other views. A-CLIP-eff uses half of their side."""
    ema_momentum: float = 0.996
    """First momentum of the EMA towers; it rises along a cosine to 1."""
    simclr_weight: float = 1.0
    """Weight of SimCLR, in A-CLIP and SLIP."""
    byol_weight: float = 2.0
    """Weight of BYOL."""
    temperature: float = 0.1
    """Temperature of SimCLR."""
    simclr_pair: Literal["cross", "same"] = "cross"
    """cross: SimCLR between the two views. same: view 1 with itself, as in the released code."""
    released_boxes: bool = False
    """Compute EMA boxes by the released formula, so that views may extend beyond them; off: they cover both views."""
    crop_scale: float = 0.5
    """Smallest share of the image's area in a crop, except SLIP's crops for SimCLR."""
    ssl_crop_scale: float | None = None
    """SLIP's crops for SimCLR: their smallest share of the image's area; None: 0.08."""
    augmentation: Literal["paper", "crop"] = "paper"
    """paper: each method's own. crop: only crops, for classes that differ in colour or direction, as emoji do."""

    epochs: int = 25
    """Passes over the data."""
    batch_size: int = 4096
    """Pairs per step, over all processes together."""
    accumulate: int = 1
    """Micro-batches a step (the authors' --update-freq), each with its own softmax and batch norms. Unlike in the other
    folders, gradients differ from those of one batch."""
    grad_checkpointing: bool = False
    """Recompute the towers' activations in the backward pass: less memory, one more forward pass."""
    lr: float = 5e-4
    """Peak learning rate."""
    text_lr: float = 1.0
    """Learning rate of the text tower, as a multiple of all other parameters' rate."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    min_lr: float = 1e-5
    """Learning rate towards which the cosine falls."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    weight_decay: float = 0.5
    """AdamW's weight decay of matrices and embeddings; gains, biases and the temperature have none."""
    beta1: float = 0.9
    """AdamW's beta1."""
    beta2: float = 0.98
    """AdamW's beta2."""
    eps: float = 1e-8
    """AdamW's epsilon."""

    seed: int = 0
    """Seed of initial weights, shuffles, views and random masks."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the processor supports it. The scores' softmax, logits and losses are always in fp32."""
    workers: int = 8
    """Loader processes per training process; they do not change the order of samples."""
    keep_in_memory: bool = False
    """Keep decoded images in memory, for a small corpus; with `--workers 0`."""
    strict: bool = False
    """Stop at the first broken sample instead of counting and replacing it."""
    save_every: int = 1000
    """Steps between checkpoints; there is one at the end, too."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Epochs between zero-shot evaluations of the online towers, and of A-CLIP's EMA towers, on `eval_set` with plain
    class names as prompts; 0: never during training."""
    eval_set: str = ""
    """Classification set in the CLIP-benchmark webdataset layout, for `eval_every`."""
    keep_best: bool = False
    """Also keep checkpoint-best.pt: the evaluated checkpoint (`eval_every`) with the best top-1 of online towers."""
    dry_run: bool = False
    """Print sizes, schedule and a memory estimate, and stop; needs no data."""

    def model_settings(self) -> dict:
        """Keyword arguments of `model.create_model` beside method and preset."""
        frozen = self.method == "aclip" if self.freeze_patch_proj is None else self.freeze_patch_proj
        settings: dict = {"freeze_patch_proj": frozen}
        if self.image_size is not None:
            settings["image_size"] = self.image_size
        if self.method == "aclip":
            settings |= {"mask": self.mask, "keep_ratio": self.keep_ratio, "ssl": self.ssl}
        return settings


YFCC = Config(dataset_size=14_689_580, caption_lines=True)
# an author of SLIP writes that accuracy on CC3M peaks well before the last epoch (SLIP's issue 9)
CC3M = Config(epochs=40, eval_every=1, eval_set="data/wds_imagenet1k", keep_best=True)
CC12M = dataclasses.replace(CC3M, epochs=35)
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
    save_every=200,
)
EMOJI = dataclasses.replace(
    SMALL,
    data="data/emoji/train",
    image_size=None,
    crop_scale=0.8,
    augmentation="crop",
    eval_every=2,
    eval_set="data/emoji/eval/names_ood",
)
SCENES = dataclasses.replace(
    EMOJI,
    data="data/scenes-one/train",
    model="scenes",
    dataset_size=32_000,
    simclr_weight=0.1,
    epochs=1,
    batch_size=64,
    text_lr=0.1,
    weight_decay=0.05,
    warmup_epochs=0.15,
    eval_every=1,
    eval_set="data/scenes-one/eval/names_ood",
)


def _preset(about: str, base: Config = YFCC, **settings) -> tuple[str, Config]:
    """(description, `base` with these `settings` replaced) of a preset."""
    return about, dataclasses.replace(base, **settings)


PRESETS = {
    "small": ("A-CLIP on your own --data, small", SMALL),
    "small-slip": _preset("its SLIP baseline: same samples and steps", SMALL, method="slip"),
    "small-clip": _preset("its CLIP baseline: same samples and steps", SMALL, method="clip"),
    "emoji": ("A-CLIP on the embedded corpus, minutes on two CPU cores", EMOJI),
    "emoji-slip": _preset("its SLIP baseline: same samples and steps", EMOJI, method="slip"),
    "emoji-clip": _preset("its CLIP baseline: same samples and steps", EMOJI, method="clip"),
    "scenes": ("A-CLIP on scenes of emoji with clutter, minutes on a CPU core", SCENES),
    "scenes-slip": _preset("its SLIP baseline: same samples and steps", SCENES, method="slip"),
    "scenes-clip": _preset("its CLIP baseline: same samples and steps", SCENES, method="clip"),
    "yfcc15m-vitb16": _preset("A-CLIP, 25 epochs: 43.9 ImageNet zero-shot"),
    "yfcc15m-vitb16-eff": _preset("A-CLIP-eff, 25 epochs: 42.9", ema_image_size=112),
    "yfcc15m-vitb16-50ep": _preset("A-CLIP, 50 epochs: 46.3", epochs=50),
    "yfcc15m-vitb16-100ep": _preset("A-CLIP, 100 epochs: 48.0", epochs=100),
    "yfcc15m-vitl16": _preset("A-CLIP, ViT-L, 25 epochs: 48.9", model="vit_l16"),
    "yfcc15m-vits16": _preset("A-CLIP, ViT-S, 25 epochs: not in the paper", model="vit_s16"),
    "yfcc15m-vitb16-random-1x50": _preset("masking alone: 35.0", mask="random", views=1, **ABLATION),
    "yfcc15m-vitb16-random-2x50": _preset("masking alone: 38.0", mask="random", **ABLATION),
    "yfcc15m-vitb16-attentive-1x50": _preset("masking alone: 39.5", views=1, **ABLATION),
    "yfcc15m-vitb16-attentive-2x50": _preset("masking alone: 41.3", **ABLATION),
    "yfcc15m-vitb16-high-2x50": _preset("masking alone, high scores dropped: 28.5", mask="high", **ABLATION),
    "yfcc15m-vitb16-clip": _preset("CLIP, 25 epochs: 37.6", **CLIP),
    "yfcc15m-vitb16-clip-50ep": _preset("CLIP, 50 epochs: 39.4", **CLIP, epochs=50),
    "yfcc15m-vitb16-clip-100ep": _preset("CLIP, 100 epochs: 42.7", **CLIP, epochs=100),
    "yfcc15m-vitl16-clip": _preset("CLIP, ViT-L, 25 epochs: 40.4", **CLIP, model="vit_l16"),
    "yfcc15m-vitb16-slip": _preset("SLIP, 25 epochs: 42.8", **SLIP),
    "yfcc15m-vitb16-slip-50ep": _preset("SLIP, 50 epochs: 44.1", **SLIP, epochs=50),
    "yfcc15m-vitb16-slip-100ep": _preset("SLIP, 100 epochs: 45.0", **SLIP, epochs=100),
    "yfcc15m-vitl16-slip": _preset("SLIP, ViT-L, 25 epochs: 46.2", **SLIP, model="vit_l16"),
    "cc3m-vitb16": _preset("A-CLIP, 40 epochs: no number is published", CC3M),
    "cc3m-vitb16-clip": _preset("CLIP, 40 epochs: 17.1, by SLIP's authors", CC3M, **CLIP),
    "cc3m-vitb16-slip": _preset("SLIP, 40 epochs: 23.0, by SLIP's authors", CC3M, **SLIP),
    "cc12m-vitb16": _preset("A-CLIP, 35 epochs: no number is published", CC12M),
    "cc12m-vitb16-clip": _preset("CLIP, 35 epochs: 36.5, by SLIP's authors", CC12M, **CLIP),
    "cc12m-vitb16-slip": _preset("SLIP, 35 epochs: 40.7, by SLIP's authors", CC12M, **SLIP),
}


def check(cfg: Config, world_size: int) -> None:
    """Raise ValueError on invalid settings before work starts."""
    cli.check_data(cfg, "yfcc/{00000..01468}.tar")
    cli.check_zero_shot_set(cfg)
    cli.check_counts(cfg, "save_every", "log_every")
    cli.check_counts(cfg, "workers", "window_shards", "eval_every", least=0)
    cli.check_batch(cfg, world_size)
    if cfg.keep_best and not cfg.eval_every:
        raise UserError("--keep-best needs the evaluations of --eval-every: pass that, or --no-keep-best")
    if cfg.batch_size == world_size * cfg.accumulate and cfg.method != "clip" and (cfg.ssl or cfg.method == "slip"):
        raise UserError("BatchNorm needs more than one pair per process and micro-batch: raise --batch-size")
    if cfg.keep_in_memory and (cfg.window_shards or cfg.workers):
        raise UserError("--keep-in-memory needs a corpus that fits into memory, --workers 0 and no --window-shards")
    check_model(cfg)


def check_model(cfg: Config) -> None:
    """Raise ValueError on invalid settings of model, masks and schedule; reads no files, as a dry run needs."""
    cli.check_counts(cfg, "epochs", "batch_size", "dataset_size", "accumulate", "image_size", "ema_image_size")
    if cfg.model not in MODELS:
        raise UserError(f"--model is one of {', '.join(MODELS)}, not {cfg.model!r}")
    if not 0 < cfg.keep_ratio <= 1:
        raise UserError(f"--keep-ratio must be above 0 and at most 1, not {cfg.keep_ratio}")
    if cfg.released_boxes and cfg.views == 1:
        raise UserError("--released-boxes needs two views: pass --views 2, or --no-released-boxes")
    for name in ("crop_scale", "ssl_crop_scale"):
        scale = getattr(cfg, name)
        if scale is not None and not 0 < scale <= 1:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and at most 1, not {scale}")
    cli.check_rates(cfg, "lr", "text_lr", "warmup_lr", "min_lr", "weight_decay", "simclr_weight", "byol_weight")
    cli.check_adam(cfg)
    if not 0 < cfg.temperature < math.inf:
        raise UserError(f"--temperature must be above 0, not {cfg.temperature}")
    if not 0 <= cfg.ema_momentum <= 1:
        raise UserError(f"--ema-momentum must be in 0..1, not {cfg.ema_momentum}")
    if not 0 <= cfg.warmup_epochs <= cfg.epochs:
        raise UserError(f"--warmup-epochs {cfg.warmup_epochs} must be in 0..{cfg.epochs}, the number of epochs")
    patch, size = MODELS[cfg.model].get("patch_size", 16), cfg.image_size or MODELS[cfg.model].get("image_size", 224)
    if size < patch or size % patch:
        raise UserError(f"--image-size {size} cannot be cut into patches of {patch} pixels")
    ema = cfg.ema_image_size or size
    if ema < patch or ema % patch:
        raise UserError(f"--ema-image-size {ema} cannot be cut into patches of {patch} pixels")
    if cfg.mask == "random" and int((size // patch) ** 2 * cfg.keep_ratio) == 0:
        raise UserError(f"--keep-ratio {cfg.keep_ratio} keeps none of {(size // patch) ** 2} patches")
    block = MODELS[cfg.model].get("block", 2)
    if cfg.method == "aclip" and cfg.mask in ("attentive", "high") and size // patch % block:
        raise UserError(
            f"blocks of {block}x{block} patches do not tile {size // patch} patches a side: choose another --image-size"
        )


def _paper(source: str, imagenet: float, flickr: str, coco: str) -> Row:
    number = f"ImageNet zero-shot {imagenet} %; R@1 (I2T/T2I) Flickr30K {flickr}, COCO {coco} %"
    return Row(source, "YFCC15M", "64", number)


MASKING = "masking (README; Table 2a second hand), "
SLIP_README = "SLIP's README, additional data sets, "

LEFT_OUT = {  # rows of the paper's tables without a preset, and why
    "main table, MaskCLIP": "neither code nor setting is released",
    "SimSiam in SimCLR's place (second hand)": "neither code nor setting is released",
    "the mixed rule of selection": "we found no description of it",
    "26 zero-shot sets": "an evaluation of the same runs: `attentive_mask_clip.eval --prompts slip`",
    "main table, training time": "`studies.attentive_mask_clip_timing` times the steps of all arms but MaskCLIP",
    "main table, GPU memory": "not a run of its own: `attentive_mask_clip.train PRESET --dry-run` estimates it",
}
PAPER_ROWS = {
    "train": {
        **dict.fromkeys(("small", "small-slip", "small-clip"), OWN),
        **dict.fromkeys(("emoji", "emoji-slip", "emoji-clip", "scenes", "scenes-slip", "scenes-clip"), EMBEDDED),
        "yfcc15m-vitb16": _paper("main table, A-CLIP", 43.9, "62.7/42.1", "38.0/23.2"),
        "yfcc15m-vitb16-eff": _paper("main table, A-CLIP-eff", 42.9, "62.7/40.6", "37.4/22.5"),
        "yfcc15m-vitb16-50ep": _paper("longer training, A-CLIP, 50 epochs", 46.3, "66.7/43.2", "39.8/24.4"),
        "yfcc15m-vitb16-100ep": _paper("longer training, A-CLIP, 100 epochs", 48.0, "66.3/45.7", "40.7/25.1"),
        "yfcc15m-vitl16": _paper("larger model, A-CLIP, ViT-L", 48.9, "64.1/48.2", "39.1/26.9"),
        "yfcc15m-vits16": Row("released code, ViT-S; not in the paper", "YFCC15M"),
        "yfcc15m-vitb16-random-1x50": _paper(MASKING + "random 1x50 %", 35.0, "48.8/32.5", "28.9/16.6"),
        "yfcc15m-vitb16-random-2x50": _paper(MASKING + "random 2x50 %", 38.0, "54.6/34.4", "31.1/18.7"),
        "yfcc15m-vitb16-attentive-1x50": _paper(MASKING + "attentive 1x50 %", 39.5, "57.6/36.6", "34.2/19.8"),
        "yfcc15m-vitb16-attentive-2x50": _paper(MASKING + "attentive 2x50 %", 41.3, "59.3/38.4", "35.1/21.3"),
        "yfcc15m-vitb16-high-2x50": _paper("Table 2b (second hand), high dropped", 28.5, "42.6/29.0", "23.5/13.6"),
        "yfcc15m-vitb16-clip": _paper("main table, CLIP; masking, none", 37.6, "51.4/32.6", "27.9/17.6"),
        "yfcc15m-vitb16-clip-50ep": _paper("longer training, CLIP, 50 epochs", 39.4, "53.9/35.8", "30.2/19.2"),
        "yfcc15m-vitb16-clip-100ep": _paper("longer training, CLIP, 100 epochs", 42.7, "61.0/37.9", "34.4/20.9"),
        "yfcc15m-vitl16-clip": _paper("larger model, CLIP, ViT-L", 40.4, "51.4/35.2", "28.9/18.5"),
        "yfcc15m-vitb16-slip": _paper("main table, SLIP", 42.8, "57.2/41.2", "33.6/21.9"),
        "yfcc15m-vitb16-slip-50ep": _paper("longer training, SLIP, 50 epochs", 44.1, "60.6/41.1", "33.2/22.3"),
        "yfcc15m-vitb16-slip-100ep": _paper("longer training, SLIP, 100 epochs", 45.0, "59.3/41.4", "34.6/22.7"),
        "yfcc15m-vitl16-slip": _paper("larger model, SLIP, ViT-L", 46.2, "60.6/43.7", "35.3/23.5"),
        "cc3m-vitb16": Row("released code, --dataset cc3m", "CC3M"),
        "cc3m-vitb16-clip": Row(SLIP_README + "CLIP, CC3M", "CC3M", number="ImageNet zero-shot 17.1 %"),
        "cc3m-vitb16-slip": Row(SLIP_README + "SLIP, CC3M", "CC3M", number="ImageNet zero-shot 23.0 %"),
        "cc12m-vitb16": Row("released code, --dataset cc12m", "CC12M"),
        "cc12m-vitb16-clip": Row(SLIP_README + "CLIP, CC12M", "CC12M", number="ImageNet zero-shot 36.5 %"),
        "cc12m-vitb16-slip": Row(SLIP_README + "SLIP, CC12M", "CC12M", number="ImageNet zero-shot 40.7 %"),
    }
}
