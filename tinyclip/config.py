"""TinyCLIP's settings and presets.

Presets auto-* and manual-* are the scripts of wkcn/TinyCLIP@ad981bf, with the epochs of the paper's section 4.1;
resnet-* and yfcc-* are other rows of table 1, which have no scripts; `emoji*` and `small*` are ours.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from shared import export
from shared.errors import UserError
from shared.evaluation import named
from shared.settings import Beta, Count, Limits, Positive, Rate, RunConfig, Share, Whole
from tinyclip.geometry import CONFIGS, WEIGHTS, weights_file

Negative = Annotated[float, Limits(below=0)]


@dataclass
class Config(RunConfig):
    """One stage of distillation. Defaults are the authors' manual stages."""

    model: str = "TinyCLIP-ViT-61M-32-Text-29M"
    """The student's geometry, a name in tinyclip.geometry.CONFIGS; with masks, the geometry before pruning."""
    image_size: Count | None = None
    """Image side in pixels; None is the model's own."""
    teacher: str | None = "ViT-B-32@laion2b_e16"
    """A run folder of any paper, a checkpoint in the authors' layout, a folder of transformers or open_clip
    (local-dir:DIR), or MODEL@WEIGHTS of open_clip. The same in all stages. Its image size may differ."""
    init: str | None = "ViT-B-32@laion2b_e16"
    """Source of the initial weights, named as in `teacher`: the teacher or the stage before. None: random weights."""
    inherit: Literal["manual", "random"] = "manual"
    """What a student of another geometry inherits. manual: front channels and every k-th layer. random (a control):
    random channels and layers. With masks all weights are inherited, and a pruned network is expanded to full size."""
    inherit_only: Literal["image", "text"] | None = None
    """Inherit only this tower, and start the other from random weights (a control). None: inherit both."""

    alpha: Share = 1.0
    """Share of affinity mimicking in the loss; the rest is the contrastive loss. 0 needs no teacher."""
    weight: Rate = 1.0
    """Factor on both losses."""
    ignore_equal_captions: bool = False
    """Leave a batch's other samples with the same caption out of a sample's softmax, in both losses. Off: as upstream,
    they count as wrong in the contrastive loss."""
    logit_scale: Positive | None = 50.0
    """Fixed temperature multiplier of teacher and student. None: the student's is learned, the teacher keeps its
    own."""

    masks: bool = False
    """Automatic inheritance: learn masks on both towers until `prune_step`."""
    start_sparsity: Share = 0.0
    """Target at step 0; in a later stage, the target of the stage before."""
    target_sparsity: Share = 0.25
    """Share of the towers' block parameters to be pruned."""
    sparsity_warmup: Whole = 1_000
    """Steps in which the target rises from `start_sparsity` to `target_sparsity`."""
    prune_step: Count = 3_000
    """Step at which the masks are cut out; the smaller network gets a new optimizer."""
    mask_lr: Positive = 0.02
    """Learning rate of the masks."""
    lambda_lr: Negative = -0.02
    """Learning rate of the constraint's multipliers; negative, since they follow gradient ascent."""
    two_sided: bool = False
    """Constrain sparsity from both sides, as the paper's equation 7: too much sparsity is reduced. Off: upstream's
    hinge."""

    augmentation: Literal["crop", "small", "none"] = "crop"
    """crop: a random crop of 0.9 to 1 of the image. small: ours, for small pictures on white (shared/views.py). none:
    the evaluation transform; with --keep-in-memory, the teacher's features are then computed once."""

    steps: Count = 73_242
    """Optimizer steps: 6 epochs of 400M pairs at batch 32,768."""
    epochs: Whole = 0
    """Passes over the data: replaces `steps`, and scales `warmup`, `sparsity_warmup` and `prune_step` in proportion.
    0: `steps` as given."""
    batch_size: Count = 32_768
    """Pairs per step, over all processes together."""
    lr: Rate = 1e-4
    """Peak learning rate."""
    warmup: Whole = 2_000
    """Steps of linear warm-up; a stage with masks warms up until `prune_step` instead."""
    weight_decay: Rate = 0.2
    """AdamW's weight decay of matrices and embeddings; gains, biases and the temperature have none."""
    beta1: Beta = 0.9
    """AdamW's beta1."""
    beta2: Beta = 0.98
    """AdamW's beta2; upstream: 0.98 for a ViT student, 0.999 for a ResNet."""
    eps: Rate = 1e-6
    """AdamW's epsilon; upstream: 1e-6 for a ViT student, 1e-8 for a ResNet."""
    max_grad_norm: Positive | None = 5.0
    """Gradients of all parameters together, masks included, are clipped to this norm; None: no clipping."""
    eval_every: Whole = 0
    """Steps between zero-shot evaluations on `eval_set`, with class names as prompts; 0: never during training."""

    def check(self, world_size: int) -> None:
        super().check(world_size)
        if self.model not in CONFIGS:
            raise UserError(f"--model {self.model!r} is none of {', '.join(CONFIGS)}")
        vision = CONFIGS[self.model]["vision"]
        convolutional = not isinstance(vision["layers"], int)
        if convolutional and "block" not in vision and self.image_size is not None and self.image_size < 32:
            raise UserError(f"--image-size {self.image_size} is too small for the ResNet of {self.model}: at least 32")
        if self.inherit_only is not None and (self.masks or self.inherit != "manual" or self.init is None):
            raise UserError("--inherit-only is a control of manual inheritance: it needs --init without --masks")
        if self.inherit == "random" and self.init is None:
            raise UserError("--inherit random takes random channels of --init: pass that, or --inherit manual")
        if self.inherit == "random" and self.masks:
            raise UserError("--inherit random is a control without masks")
        if self.masks and convolutional:
            raise UserError(f"--masks act on transformers, not on the ResNet of {self.model}")
        if self.masks and not self.start_sparsity <= self.target_sparsity < 1:
            raise UserError(
                f"--start-sparsity {self.start_sparsity} and --target-sparsity {self.target_sparsity} must satisfy "
                "start <= target < 1"
            )
        self.check_prune_step()
        if self.dry_run:
            return
        if self.alpha > 0 and self.teacher is None:
            raise UserError(
                "affinity mimicking needs --teacher, which 'python -m tinyclip.train small-teacher' trains; without "
                "one pass --alpha 0"
            )
        if self.alpha > 0:
            check_source(self, "teacher")
        if not (Path(self.out) / "checkpoint.pt").exists():  # else it resumes, without --init
            check_source(self, "init")

    def check_prune_step(self) -> None:
        if self.masks and not self.prune_step < self.steps:
            raise UserError(f"--prune-step {self.prune_step} is not within the {self.steps} steps")

    def in_steps(self, per_epoch: int) -> "Config":
        """The settings with `steps` scaled to `epochs`; UserError if they leave too few steps for the masks."""
        if not self.epochs:
            return self
        steps = self.epochs * per_epoch
        names = "warmup", "sparsity_warmup", "prune_step"
        scaled = {name: max(1, round(getattr(self, name) * steps / self.steps)) for name in names}
        cfg = replace(self, steps=steps, **scaled)
        cfg.check_prune_step()
        return cfg


def check_source(cfg: Config, name: Literal["teacher", "init"]) -> None:
    """Raise UserError if --teacher or --init is a path that does not exist or holds no weights of a finished run."""
    source = getattr(cfg, name)
    if source is None or named(source):
        return
    path = Path(source.removeprefix(export.LOCAL))
    own = export.trained_by(path) in (None, "tinyclip")  # other papers' runs need no model.pt
    if own and path.is_dir() and weights_file(path) == path / "checkpoint.pt":
        raise UserError(f"--{name} {source} has no model.pt: its run is not finished; run its command again")
    if own and path.is_dir() and weights_file(path) == path:
        raise UserError(f"--{name} {source} is a folder without weights: it has none of {', '.join(WEIGHTS)}")
    if not path.exists():
        hint = ""
        if "emoji" in cfg.model and "teacher" in path.name:
            preset = "emoji-convnet-teacher" if "convnet" in cfg.model else "emoji-teacher"
            hint = f"; 'python -m tinyclip.train {preset} --out PATH' trains the emoji one"
        raise UserError(
            f"--{name} {source} does not exist: it takes a run folder, a checkpoint or MODEL@WEIGHTS of open_clip{hint}"
        )


def _preset(row: str, base: Config, **settings) -> tuple[str, Config]:
    """(row of the paper, `base` with these `settings` replaced) of a preset."""
    return row, replace(base, **settings)


FIRST = "runs/tinyclip/{}"  # where a second stage finds the first, unless --init says otherwise
MANUAL = Config(grad_checkpointing=True)
AUTO = replace(MANUAL, model="TinyCLIP-auto-ViT-63M-32-Text-31M", masks=True)
LONGER = 195_312  # steps of a second or third stage on LAION-400M: 16 epochs (section 4.1; the scripts have 6)
RESNET = replace(MANUAL, model="TinyCLIP-ResNet-30M-Text-29M", init="RN50@openai", beta2=0.999, eps=1e-8)
# No script upstream. Section 4.1: two stages of 25 epochs; 4.2: teacher and first weights are OpenCLIP's ViT-B/16 with
# 70.2 % on ImageNet. The batch is unverified; the authors used 16 V100s for the 39M (microsoft/Cream issue 244).
YFCC = replace(
    MANUAL,
    model="TinyCLIP-ViT-39M-16-Text-19M",
    teacher="ViT-B-16@laion2b_s34b_b88k",
    init="ViT-B-16@laion2b_s34b_b88k",
    batch_size=4_096,
    steps=91_550,
)
SECOND_AUTO = dict(
    model="TinyCLIP-auto-ViT-45M-32-Text-18M",
    start_sparsity=0.25,
    target_sparsity=0.5,
    prune_step=5_000,
    steps=LONGER,
)

SMALL = Config(  # numbers of steps are scaled to the epochs
    model="emoji-50",
    teacher=None,
    init=None,
    image_size=64,
    epochs=12,
    steps=300,
    batch_size=256,
    lr=2e-3,
    warmup=30,
    weight_decay=0.1,
    max_grad_norm=1.0,
    logit_scale=None,
    augmentation="none",
    keep_in_memory=True,
    workers=0,
    save_every=50,
)
# A gate moves from 4.6 towards -4.6 by about the mask learning rate per step, so that few steps need a larger rate.
# The hinge overshoots: with a target of 0.42 the student ends near the size of the one cut by hand.
MASKS = dict(
    model="emoji-100",
    masks=True,
    target_sparsity=0.42,
    prune_step=120,
    sparsity_warmup=60,
    mask_lr=0.2,
    lambda_lr=-0.2,
)
# a CLIP trained from scratch
SMALL_TEACHER = replace(SMALL, model="emoji-100", alpha=0.0, augmentation="crop", epochs=20, steps=1200, warmup=90)
# Scenes are plentiful: students see them without crops, so that the teacher's features are computed once. A batch holds
# each of their thirty captions several times.
SCENES = dict(
    data="data/scenes-near/train",
    image_size=None,
    ignore_equal_captions=True,
    epochs=0,
    eval_every=75,
    eval_set="data/scenes-near/eval/names_ood",
)
EMOJI = replace(SMALL, **SCENES, **dict.fromkeys(("teacher", "init"), FIRST.format("vit-teacher-seed0")))
EMOJI_CONVNET = replace(
    EMOJI,
    data="data/emoji/train_names",
    model="emoji-convnet-50",
    teacher=FIRST.format("teacher-seed0"),
    init=FIRST.format("teacher-seed0"),
    ignore_equal_captions=False,
    steps=170,
    batch_size=512,
    lr=5e-3,
    weight_decay=0.2,
    eps=1e-8,
    augmentation="small",
    distinct_captions=True,
    eval_every=17,
    eval_set="data/emoji/eval/bare_names_ood",
)
CONTRASTIVE = dict(teacher=None, alpha=0.0)

# name: (row of the authors' model zoo with ImageNet's zero-shot accuracy, settings); theirs are trained on 32 GPUs
PRESETS = {
    "small-teacher": ("ours: a teacher for `small`: a CLIP from scratch on your own --data", SMALL_TEACHER),
    "small": ("ours: half of --teacher, inherited by hand (--init), affinity mimicking, on your own --data", SMALL),
    "small-contrastive": _preset("ours: student of `small`, contrastive loss", SMALL, alpha=0.0),
    "small-auto": _preset("ours: as small as `small`, by learned masks", SMALL, **MASKS),
    "emoji": ("ours: half a ViT, inherited by hand, affinity mimicking, on scenes; a minute on a CPU core", EMOJI),
    "emoji-teacher": _preset("ours: the teacher of `emoji`: a CLIP from scratch", SMALL_TEACHER, **SCENES),
    "emoji-contrastive": _preset(
        "ours: student and initial weights of `emoji`, contrastive loss", EMOJI, **CONTRASTIVE
    ),
    "emoji-auto": _preset("ours: as small as `emoji`, by learned masks", EMOJI, **MASKS),
    "emoji-convnet": (
        "ours: half a convolutional tower, inherited by hand, affinity mimicking, on names",
        EMOJI_CONVNET,
    ),
    "emoji-convnet-teacher": _preset(
        "ours: the teacher of `emoji-convnet`: a CLIP from scratch",
        EMOJI_CONVNET,
        **CONTRASTIVE,
        model="emoji-convnet-100",
        init=None,
        steps=510,
        warmup=80,
        eval_every=51,
    ),
    "emoji-convnet-contrastive": _preset(
        "ours: student and initial weights of `emoji-convnet`, contrastive loss", EMOJI_CONVNET, **CONTRASTIVE
    ),
    "auto-63M-31M": ("model zoo, auto, ViT-63M/32 Text-31M, LAION-400M, 100 -> 75 %: 63.9", AUTO),
    "auto-45M-18M": _preset(
        "model zoo, auto, ViT-45M/32 Text-18M, LAION-400M, from auto-63M-31M, 75 -> 50 %: 61.4",
        AUTO,
        **SECOND_AUTO,
        init=FIRST.format("auto-63M-31M"),
    ),
    "auto-22M-10M": _preset(
        "model zoo, auto, ViT-22M/32 Text-10M, LAION-400M, from auto-45M-18M, 50 -> 25 %: 53.7",
        AUTO,
        model="TinyCLIP-auto-ViT-22M-32-Text-10M",
        init=FIRST.format("auto-45M-18M"),
        start_sparsity=0.5,
        target_sparsity=0.75,
        prune_step=8_000,
        steps=LONGER,
    ),
    "manual-61M-29M": ("model zoo, manual, ViT-61M/32 Text-29M, LAION-400M, 100 -> 75 %: 62.4", MANUAL),
    "manual-40M-19M": _preset(
        "model zoo, manual, ViT-40M/32 Text-19M, LAION-400M, from manual-61M-29M, 75 -> 50 %: 59.8",
        MANUAL,
        model="TinyCLIP-ViT-40M-32-Text-19M",
        init=FIRST.format("manual-61M-29M"),
        steps=LONGER,
    ),
    "resnet-30M-29M": _preset(
        "model zoo, manual, ResNet-30M Text-29M, LAION-400M, from RN50, 100 -> 75 %: 59.1; 4 epochs",
        RESNET,
        steps=48_828,
    ),
    "resnet-19M-19M": _preset(
        "model zoo, manual, ResNet-19M Text-19M, LAION-400M, from resnet-30M-29M, 75 -> 50 %: 56.4; 12 epochs",
        RESNET,
        model="TinyCLIP-ResNet-19M-Text-19M",
        init=FIRST.format("resnet-30M-29M"),
        steps=146_484,
    ),
    "yfcc-39M-19M": (
        "model zoo, manual, ViT-39M/16 Text-19M, YFCC-15M, 100 -> 50 %, 25 epochs: 63.5; batch unverified",
        YFCC,
    ),
    "yfcc-8M-3M": _preset(
        "model zoo, manual, ViT-8M/16 Text-3M, YFCC-15M, from yfcc-39M-19M, 50 -> 10 %, 25 epochs: 41.1; batch "
        "unverified",
        YFCC,
        model="TinyCLIP-ViT-8M-16-Text-3M",
        init=FIRST.format("yfcc-39M-19M"),
    ),
    "auto-63M-31M-laion-yfcc": ("model zoo, auto, ViT-63M/32 Text-31M, LAION+YFCC-400M, 100 -> 75 %: 64.5", AUTO),
    "auto-45M-18M-laion-yfcc": _preset(
        "model zoo, auto, ViT-45M/32 Text-18M, LAION+YFCC-400M, from auto-63M-31M-laion-yfcc, 75 -> 50 %: 62.7",
        AUTO,
        **SECOND_AUTO,
        init=FIRST.format("auto-63M-31M-laion-yfcc"),
    ),
}
SCRIPTS = {"train": PRESETS}
