"""The settings of a TinyCLIP stage and run, their presets, and the checks before a run starts.

`Stage` has the settings of one distillation stage; `Config` adds data, models and the run. The presets auto-* and
manual-* are the scripts of wkcn/TinyCLIP@ad981bf; resnet-* and yfcc-* are other rows of its model zoo, which have no
scripts; `emoji*` and `small*` are ours.
"""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

from shared import cli, export
from shared.errors import UserError
from shared.evaluation import named
from shared.presets import EMBEDDED, NOT_STATED, OWN, Row
from tinyclip.geometry import CONFIGS, WEIGHTS, weights_file


@dataclasses.dataclass
class Stage:
    """One stage: loss, optimizer, masks, and the step at which masks are cut out."""

    steps: int = 73_242
    """Optimizer steps: 6 epochs of 400M pairs at batch 32,768."""
    lr: float = 1e-4
    """Peak learning rate."""
    warmup: int = 2_000
    """Steps of linear warm-up; a stage with masks warms up until `prune_step` instead."""
    weight_decay: float = 0.2
    """AdamW's weight decay of matrices and embeddings; gains, biases and the temperature have none."""
    beta1: float = 0.9
    """AdamW's beta1."""
    beta2: float = 0.98
    """AdamW's beta2; upstream: 0.98 for a ViT student, 0.999 for a ResNet."""
    eps: float = 1e-6
    """AdamW's epsilon; upstream: 1e-6 for a ViT student, 1e-8 for a ResNet."""
    max_grad_norm: float | None = 5.0
    """Gradients of all parameters together, masks included, are clipped to this norm; None: no clipping."""
    alpha: float = 1.0
    """Share of affinity mimicking in the loss; the rest is the contrastive loss. 0 needs no teacher."""
    weight: float = 1.0
    """Factor on both losses."""
    ignore_equal_captions: bool = False
    """Leave a batch's other samples with the same caption out of a sample's softmax, in both losses. Off: as upstream,
    they count as wrong in the contrastive loss."""
    logit_scale: float | None = 50.0
    """Fixed temperature multiplier of teacher and student. None: the student's is learned, the teacher keeps its
    own."""
    accumulate: int = 1
    """Micro-batches a step, to save memory. Gradients equal those of one batch, except that batch norms (of a ResNet)
    normalise each micro-batch separately; the towers' forward pass runs twice."""

    masks: bool = False
    """Automatic inheritance: learn masks on both towers until `prune_step`."""
    mask_types: tuple[Literal["hidden", "heads", "intermediate", "mha", "ffn"], ...] = (
        "hidden",
        "heads",
        "intermediate",
    )
    """What masks act on; mha and ffn are gates on whole blocks, which upstream does not use."""
    start_sparsity: float = 0.0
    """Target at step 0; in a later stage, the target of the stage before."""
    target_sparsity: float = 0.25
    """Share of the towers' block parameters to be pruned."""
    sparsity_warmup: int = 1_000
    """Steps in which the target rises from `start_sparsity` to `target_sparsity`."""
    prune_step: int = 3_000
    """Step at which the masks are cut out; the smaller network gets a new optimizer."""
    mask_lr: float = 0.02
    """Learning rate of the masks."""
    lambda_lr: float = -0.02
    """Learning rate of the constraint's multipliers; negative, since they follow gradient ascent."""
    joint: bool = True
    """On: one sparsity constraint over both towers (upstream's --total-loss-flag). Off: one for each tower."""
    two_sided: bool = False
    """Constrain sparsity from both sides, as the paper: too much sparsity is reduced. Off: upstream's hinge."""
    exact_prune: bool = False
    """Prune without changing the masked network's outputs. Off: as upstream, which also scales the projections."""

    lock_image: bool = False
    """Freeze the image tower and its projection; train only the text tower."""
    lock_text: bool = False
    """Freeze the text tower; train only the image tower."""
    use_teacher_image: bool = False
    """Distil only the text tower; the student's image tower is the teacher's, frozen."""
    use_teacher_text: bool = False
    """Distil only the image tower; the student's text tower is the teacher's, frozen."""


@dataclasses.dataclass
class Config(Stage):
    """A stage, its data and models, and the settings of its run."""

    out: str = "runs/tinyclip/run"
    """Run folder: config.json, metrics.jsonl, tensorboard/, checkpoint.pt, at `prune_step` masks.pt, and at the end
    model.pt (only the weights). With a checkpoint in it, the run resumes."""
    data: str = ""
    """Training pairs: shards 'laion/{0000..4140}.tar', a folder of them, or a .tsv with columns title and filepath."""
    dataset_size: int | None = None
    """Number of samples to use, from the start of the data; None uses all."""
    window_shards: int = 0
    """0: all shards are on disk, and samples are shuffled over all of them. S: each process reads its shards S at a
    time, fetched ahead and removed afterwards, so that the data may be larger than the disk. --dataset-size is then the
    number of samples per epoch: if the shards hold more, each epoch leaves out different ones; if fewer, samples
    repeat."""
    cache: str = "data/cache"
    """Folder for copies of remote shards, and for the index of large data."""

    model: str = "TinyCLIP-ViT-61M-32-Text-29M"
    """The student's geometry, a name in tinyclip.model.CONFIGS; with masks, the geometry before pruning."""
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
    depth_rule: Literal["interval_front", "uniform"] = "interval_front"
    """Inherited layers. interval_front: every (12 // depth)-th from the front (upstream). uniform: evenly spaced."""
    head_width: int = 64
    """Width of an attention head, for checkpoint files that do not contain it."""
    quick_gelu: bool = False
    """The student's activation is QuickGELU. Weights of OpenAI need it; upstream's configs have GELU nevertheless."""
    teacher_quick_gelu: bool | None = None
    """Activation (True: QuickGELU, False: GELU) of a teacher whose file does not state it."""
    image_size: int | None = None
    """Image side in pixels; None is the model's own."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, one more forward pass."""
    augmentation: Literal["crop", "none"] = "crop"
    """crop: a random crop. none: the evaluation transform."""
    crop: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest area of a random crop as a share of the image's. With --keep-in-memory it may be up to 4:
    beyond the image, its edge pixels are repeated."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width/height ratio of a random crop."""
    keep_in_memory: bool = False
    """Decode the centre squares of a small corpus once and augment whole batches; without crops the teacher's features
    are also computed once. Off: decode every sample at every step."""
    distinct_captions: bool = False
    """With --keep-in-memory: no batch holds a caption twice, as far as an epoch allows."""

    epochs: int = 0
    """Passes over the data: replaces `steps`, and scales `warmup`, `sparsity_warmup` and `prune_step` in proportion.
    0: `steps` as given."""
    batch_size: int = 32_768
    """Pairs per step, over all processes together."""
    seed: int = 0
    """Seed of initial weights, shuffles, views and mask samples."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the processor supports it. Losses are always in fp32."""
    workers: int = 8
    """Loader processes per training process; they do not change the order of samples."""
    strict: bool = False
    """Stop at the first broken sample instead of counting and replacing it."""
    save_every: int = 1_000
    """Steps between checkpoints; there is one at the end, too."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between zero-shot evaluations on `eval_set`, with class names as prompts; 0: never during training."""
    eval_set: str = ""
    """Classification set in the CLIP-benchmark webdataset layout, for `eval_every`."""
    dry_run: bool = False
    """Print sizes, schedule and a memory estimate, and stop; needs no data and downloads nothing."""


MANUAL = Config(grad_checkpointing=True)
AUTO = replace(MANUAL, model="TinyCLIP-auto-ViT-63M-32-Text-31M", masks=True)
RESNET = replace(MANUAL, model="TinyCLIP-ResNet-30M-Text-29M", init="RN50@openai", beta2=0.999, eps=1e-8)
# There is no script upstream. The authors' answer: the 39M had 25 epochs of YFCC-15M on 16 V100s (microsoft/Cream
# issue 244). Teacher, initial weights, batch, and all settings of the 8M are unverified.
YFCC = replace(
    MANUAL, model="TinyCLIP-ViT-39M-16-Text-19M", teacher="ViT-B-16@openai", init="ViT-B-16@openai",
    batch_size=4_096, steps=91_550,
)  # fmt: skip
FIRST = "runs/tinyclip/{}"  # where a second stage finds the first, unless --init says otherwise

SMALL = Config(  # numbers of steps are scaled to the epochs
    model="emoji-50", teacher=None, init=None, image_size=64, epochs=12, steps=300, batch_size=256, lr=2e-3, warmup=30,
    weight_decay=0.1, max_grad_norm=1.0, logit_scale=None, augmentation="none", keep_in_memory=True, workers=0,
    save_every=200,
)  # fmt: skip
# A gate moves from 4.6 towards -4.6 by about the mask learning rate per step, so that few steps need a larger rate.
# The hinge overshoots: with a target of 0.42 the student ends near the size of the one cut by hand.
SMALL_AUTO = replace(
    SMALL, model="emoji-100", masks=True, target_sparsity=0.42, prune_step=120, sparsity_warmup=60, mask_lr=0.2,
    lambda_lr=-0.2,
)  # fmt: skip
# a CLIP trained from scratch
SMALL_TEACHER = replace(SMALL, model="emoji-100", alpha=0.0, augmentation="crop", epochs=20, steps=1200, warmup=90)
# Scenes are plentiful: students see them without crops, so that the teacher's features are computed once. A batch holds
# each of their thirty captions several times.
SCENES = dict(
    data="data/scenes-near/train", image_size=None, ignore_equal_captions=True, epochs=0, eval_every=75,
    eval_set="data/scenes-near/eval/names_ood",
)  # fmt: skip
STUDENT = SCENES | dict.fromkeys(("teacher", "init"), FIRST.format("vit-teacher-seed0"))
EMOJI, EMOJI_AUTO = replace(SMALL, **STUDENT), replace(SMALL_AUTO, **STUDENT)
EMOJI_RESNET = replace(
    EMOJI, data="data/emoji/train_names", model="emoji-resnet-50", teacher=FIRST.format("teacher-seed0"),
    init=FIRST.format("teacher-seed0"), ignore_equal_captions=False, steps=170, batch_size=512, lr=5e-3, warmup=30,
    weight_decay=0.2, eps=1e-8, augmentation="crop", crop=(0.7, 1.4), crop_ratio=(0.85, 1.18), distinct_captions=True,
    eval_every=17, eval_set="data/emoji/eval/bare_names_ood",
)  # fmt: skip
CONTRASTIVE = dict(teacher=None, alpha=0.0)
PRESETS = {
    "small-teacher": ("a teacher for `small`: a CLIP trained from scratch on your own --data", SMALL_TEACHER),
    "small": ("half of --teacher, inherited by hand with --init, affinity mimicking, on your own --data", SMALL),
    "small-contrastive": ("student of `small`, contrastive loss", replace(SMALL, alpha=0.0)),
    "small-auto": ("as small as `small`, by learned masks", SMALL_AUTO),
    "emoji": ("half a ViT, inherited by hand, affinity mimicking, on scenes; a minute on a CPU core", EMOJI),
    "emoji-teacher": (
        "the teacher of `emoji`: a CLIP trained from scratch with the contrastive loss",
        replace(SMALL_TEACHER, **SCENES),
    ),
    "emoji-contrastive": ("student and initial weights of `emoji`, contrastive loss", replace(EMOJI, **CONTRASTIVE)),
    "emoji-auto": ("as small as `emoji`, by learned masks", EMOJI_AUTO),
    "emoji-resnet": ("half a ResNet, inherited by hand, affinity mimicking, on emoji names", EMOJI_RESNET),
    "emoji-resnet-teacher": (
        "the teacher of `emoji-resnet`: a CLIP trained from scratch with the contrastive loss",
        replace(
            EMOJI_RESNET, **CONTRASTIVE, model="emoji-resnet-100", init=None, steps=510, warmup=80, eval_every=51
        ),
    ),
    "emoji-resnet-contrastive": (
        "student and initial weights of `emoji-resnet`, contrastive loss", replace(EMOJI_RESNET, **CONTRASTIVE)
    ),
    "auto-63M-31M": ("ViT-B/32 100 -> 75 %, LAION-400M", AUTO),
    "auto-45M-18M": (
        "from auto-63M-31M, 75 -> 50 %",
        replace(
            AUTO, model="TinyCLIP-auto-ViT-45M-32-Text-18M", init=FIRST.format("auto-63M-31M"), start_sparsity=0.25,
            target_sparsity=0.5, prune_step=5_000,
        ),
    ),
    "auto-22M-10M": (
        "from auto-45M-18M, 50 -> 25 %",
        replace(
            AUTO, model="TinyCLIP-auto-ViT-22M-32-Text-10M", init=FIRST.format("auto-45M-18M"), start_sparsity=0.5,
            target_sparsity=0.75, prune_step=8_000,
        ),
    ),
    "manual-61M-29M": ("ViT-B/32 by hand 100 -> 75 %, LAION-400M", MANUAL),
    "manual-40M-19M": (
        "from manual-61M-29M, 75 -> 50 %, 6 epochs as in the script (the released file was named epoch 16)",
        replace(MANUAL, model="TinyCLIP-ViT-40M-32-Text-19M", init=FIRST.format("manual-61M-29M")),
    ),
    "resnet-30M-29M": ("RN50 by hand 100 -> 75 %, LAION-400M", RESNET),
    "resnet-19M-19M": (
        "from resnet-30M-29M, 75 -> 50 %, 12 epochs as in the name of the released file",
        replace(RESNET, model="TinyCLIP-ResNet-19M-Text-19M", init=FIRST.format("resnet-30M-29M"), steps=146_484),
    ),
    "yfcc-39M-19M": ("ViT-B/16 by hand, YFCC-15M, 25 epochs; teacher, first weights and batch unverified", YFCC),
    "yfcc-8M-3M": (
        "from 39M-19M, YFCC-15M; all but the data unverified",
        replace(YFCC, model="TinyCLIP-ViT-8M-16-Text-3M", init=FIRST.format("yfcc-39M-19M")),
    ),
}  # fmt: skip
PRESETS |= {  # the zoo's second data set has the same recipe
    f"{name}-laion-yfcc": (f"{name} on LAION+YFCC-400M", replace(PRESETS[name][1], init=init))
    for name, init in (("auto-63M-31M", AUTO.init), ("auto-45M-18M", FIRST.format("auto-63M-31M-laion-yfcc")))
}
STAGES: dict[str, Stage] = {name: cfg for name, (_, cfg) in PRESETS.items()}


def check(cfg: Config, world_size: int) -> None:
    """Raise ValueError on invalid settings before work starts."""
    cli.check_data(cfg, "laion/{0000..4140}.tar")
    cli.check_zero_shot_set(cfg)
    check_stage(cfg)
    if cfg.alpha > 0 and cfg.teacher is None:
        raise UserError(
            "affinity mimicking needs --teacher, which 'python -m tinyclip.train small-teacher' trains; without one "
            "pass --alpha 0"
        )
    if cfg.alpha > 0 or cfg.use_teacher_image or cfg.use_teacher_text:
        check_source(cfg, "teacher")
    if not (Path(cfg.out) / "checkpoint.pt").exists():  # else the run resumes, without --init
        check_source(cfg, "init")
    cli.check_batch(cfg, world_size)
    cli.check_in_memory(cfg)
    cli.check_crop(cfg)


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
            preset = "emoji-resnet-teacher" if "resnet" in cfg.model else "emoji-teacher"
            hint = f"; 'python -m tinyclip.train {preset} --out PATH' trains the emoji one"
        raise UserError(
            f"--{name} {source} does not exist: it takes a run folder, a checkpoint or MODEL@WEIGHTS of open_clip{hint}"
        )


def check_stage(cfg: Config) -> None:
    """Raise ValueError on invalid settings of a stage; reads no files."""
    if cfg.model not in CONFIGS:
        raise UserError(f"--model {cfg.model!r} is none of {', '.join(CONFIGS)}")
    cli.check_counts(cfg, "steps", "batch_size", "dataset_size", "accumulate", "save_every", "log_every")
    cli.check_counts(cfg, "epochs", "warmup", "workers", "window_shards", least=0)
    cli.check_rates(cfg, "lr", "weight_decay", "weight")
    cli.check_adam(cfg)
    cli.check_positive(cfg, "max_grad_norm")
    if not 0 <= cfg.alpha <= 1:
        raise UserError(f"--alpha {cfg.alpha} is not between 0 (contrastive) and 1 (affinity mimicking)")
    if cfg.image_size is not None and cfg.image_size < 1:
        raise UserError(f"--image-size must be at least 1 pixel, or None for the model's own, not {cfg.image_size}")
    vision = CONFIGS[cfg.model]["vision"]
    convolutional = not isinstance(vision["layers"], int)
    if cfg.logit_scale is not None and not 0 < cfg.logit_scale < math.inf:
        raise UserError(f"--logit-scale {cfg.logit_scale} must be above 0, or None to learn it")
    check_locked(cfg)
    if cfg.inherit_only is not None and (cfg.masks or cfg.inherit != "manual" or cfg.init is None):
        raise UserError("--inherit-only is a control of manual inheritance: it needs --init without --masks")
    if cfg.inherit == "random" and cfg.init is None:
        raise UserError("--inherit random takes random channels of --init: pass that, or --inherit manual")
    if convolutional and "block" not in vision and cfg.image_size is not None and cfg.image_size < 32:
        raise UserError(f"--image-size {cfg.image_size} is too small for the ResNet of {cfg.model}: at least 32")
    if not cfg.masks:
        return
    if convolutional:
        raise UserError(f"--masks act on transformers, not on the ResNet of {cfg.model}")
    if not 0 < cfg.prune_step < cfg.steps:
        raise UserError(f"--prune-step {cfg.prune_step} is not within the {cfg.steps} steps")
    if not 0 <= cfg.start_sparsity <= cfg.target_sparsity < 1:
        raise UserError(
            f"--start-sparsity {cfg.start_sparsity} and --target-sparsity {cfg.target_sparsity} must satisfy "
            "0 <= start <= target < 1"
        )
    if not cfg.mask_lr > 0 > cfg.lambda_lr:
        raise UserError(
            f"--mask-lr {cfg.mask_lr} must be above 0, and --lambda-lr {cfg.lambda_lr} below, since it ascends"
        )
    if not {"heads", "intermediate"} <= set(cfg.mask_types):
        raise UserError("--mask-types needs both heads and intermediate: the sparsity counts the parameters of both")
    if cfg.inherit == "random":
        raise UserError("--inherit random is a control without masks")


def in_steps(cfg: Config, per_epoch: int) -> Config:
    """The settings with `steps` scaled to `epochs`; UserError if they leave too few steps for the masks."""
    if not cfg.epochs:
        return cfg
    steps = cfg.epochs * per_epoch
    names = "warmup", "sparsity_warmup", "prune_step"
    cfg = replace(cfg, steps=steps, **{name: max(1, round(getattr(cfg, name) * steps / cfg.steps)) for name in names})
    check_stage(cfg)
    return cfg


def check_locked(cfg: Config) -> None:
    """Raise UserError if both towers are locked, or if one is locked that cannot be."""
    image, text = cfg.lock_image or cfg.use_teacher_image, cfg.lock_text or cfg.use_teacher_text
    if image and text:
        raise UserError(
            "--lock-image or --use-teacher-image with --lock-text or --use-teacher-text leave no tower to train"
        )
    if (image or text) and cfg.masks:
        raise UserError("--masks train both towers: leave out --lock-image, --lock-text and --use-teacher-*")
    if (cfg.use_teacher_image or cfg.use_teacher_text) and cfg.teacher is None:
        raise UserError("--use-teacher-image and --use-teacher-text need --teacher")
    if (cfg.lock_image or cfg.lock_text) and cfg.init is None:
        raise UserError("--lock-image and --lock-text would lock random weights: pass --init")
    if (cfg.lock_image and cfg.inherit_only == "text") or (cfg.lock_text and cfg.inherit_only == "image"):
        raise UserError(f"--inherit-only {cfg.inherit_only} leaves the other tower random, which would be locked")


def _zoo(row: str, imagenet: float, data: str = "LAION-400M", gpus: str = "32") -> Row:
    return Row(f"model zoo, {row}", data, gpus, f"ImageNet zero-shot {imagenet} %")


BOTH = "LAION+YFCC-400M"
LEFT_OUT = {  # rows of the paper's tables without a preset, and why
    "ablations of affinity, inheritance, stages; from scratch": (
        "the paper's body could not be read; there are flags, and arms of the study"
    ),
    "retrieval, transfer, robustness and linear probe": "no command is published; `tinyclip.eval --sets`, `--probe`",
    "fig. 1 and abstract, ViT-B/32, RN50, ViT-B/16": "models of other papers, not trained by the authors",
    "model zoo, MACs and throughput": "measured by `tinyclip.eval`",
}
PAPER_ROWS = {
    "train": {
        **dict.fromkeys(("small-teacher", "small", "small-contrastive", "small-auto"), OWN),
        **dict.fromkeys(("emoji", "emoji-teacher", "emoji-contrastive", "emoji-auto"), EMBEDDED),
        **dict.fromkeys(("emoji-resnet", "emoji-resnet-teacher", "emoji-resnet-contrastive"), EMBEDDED),
        "auto-63M-31M": _zoo("auto, ViT-63M/32 Text-31M", 63.9),
        "auto-45M-18M": _zoo("auto, ViT-45M/32 Text-18M", 61.4),
        "auto-22M-10M": _zoo("auto, ViT-22M/32 Text-10M", 53.7),
        "manual-61M-29M": _zoo("manual, ViT-61M/32 Text-29M", 62.4),
        "manual-40M-19M": _zoo("manual, ViT-40M/32 Text-19M", 59.8),
        "resnet-30M-29M": _zoo("manual, ResNet-30M Text-29M", 59.1),
        "resnet-19M-19M": _zoo("manual, ResNet-19M Text-19M", 56.4),
        "yfcc-39M-19M": _zoo("manual, ViT-39M/16 Text-19M", 63.5, "YFCC-15M", "16"),
        "yfcc-8M-3M": _zoo("manual, ViT-8M/16 Text-3M", 41.1, "YFCC-15M", NOT_STATED),
        "auto-63M-31M-laion-yfcc": _zoo("auto, ViT-63M/32 Text-31M, LAION+YFCC-400M", 64.5, BOTH),
        "auto-45M-18M-laion-yfcc": _zoo("auto, ViT-45M/32 Text-18M, LAION+YFCC-400M", 62.7, BOTH),
    }
}
