"""Every setting of a ProtoCLIP run, its presets, and the checks before a run starts.

Presets named cc3m-* are the commands in the README of megvii-research/protoclip@fde1933; `emoji*` and `small*` are
ours.
"""

import dataclasses
import math
from typing import Literal

from shared import cli, export
from shared.errors import UserError
from shared.presets import EMBEDDED, OWN, Row
from shared.pretrained import LITE0


@dataclasses.dataclass
class Config:
    """Fields have the names of upstream's flags where those are clear; upstream's "epoch" is called an episode here."""

    out: str = "runs/protoclip/run"
    """Run folder: config.json, metrics.jsonl, tensorboard/, checkpoint.pt. With a checkpoint in it, the run resumes."""
    data: str = ""
    """Training pairs: shards 'cc3m/{00000..00331}.tar', a folder of them, or a .tsv with columns title and filepath."""
    dataset_size: int | None = None
    """Number of samples to use, from the start of the data; None uses all."""
    episode_shards: int = 0
    """0: an episode samples from all of the data. S: it samples from the next S shards of an endlessly reshuffled list.
    Remote shards are copied to `cache` for the episode, so that the data may be larger than the disk."""
    cache: str = "data/cache"
    """Folder for copies of remote shards, in a subfolder for each run, and for features of a locked trunk."""

    model: str = "RN50"
    """Any open_clip config with a plain text tower. As upstream, QuickGELU is forced on, but not with a timm image
    tower."""
    lock_image: bool = False
    """Freeze the pretrained image trunk and train only its projection; only for EfficientNet-Lite0 (--model
    Lite0-emoji). With --keep-in-memory the trunk's features of the uncropped images are computed once and stored in
    `cache`."""
    image_size: int | None = None
    """Image side in pixels; None is the model's own."""
    hidden_dim: int = 2048
    """Width of the projection heads' hidden layers."""
    projection_dim: int = 128
    """Width P of the projected features."""
    num_layers: int = 1
    """Hidden blocks of the projection heads; 0 makes them linear."""

    w_clip: float = 1.0
    """Weight of L_CLIP."""
    w_proto: float = 1.0
    """Weight of L_Proto. With w_proto = w_external = 0 plain CLIP is trained, without heads and clustering."""
    w_external: float = 1.0
    """Weight of the external teacher's prototypical loss."""
    external_teacher: str | None = None
    """Teacher features: .npz of `python -m protoclip.teacher` (found by sample key), or upstream's .npy (in the order
    of the data)."""
    back_translate: bool = True
    """Prototypical Back Translation. Off: prototypes are the other modality's centroids; excludes an external
    teacher."""
    k: int = 20_000
    """Number of prototypes K."""
    niter: int = 20
    """K-means iterations."""
    nredo: int = 3
    """K-means restarts; the best is kept."""
    target_temperature: float = 0.01
    """Temperature of the soft targets; 0 or less: hard labels."""
    extraction_view: Literal["train", "eval"] = "train"
    """Image view whose features are clustered: a random training view (upstream), or the evaluation transform."""
    keep_in_memory: bool = False
    """Decode a small corpus once and augment whole batches. Off: decode every sample at every step."""
    distinct_captions: bool = False
    """With --keep-in-memory: no batch holds a caption twice, as far as an episode allows."""
    crop: tuple[float, float] | None = None
    """Smallest and largest area of a random crop as a share of the image's; None is the augmentation's own. With
    --keep-in-memory up to 4: pixels outside the image repeat its edge."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width/height ratio of a random crop."""
    augmentation: Literal["default", "light"] = "light"
    """default: crop of scale 0.9-1 (upstream's CLIP). light: scale 0.5-1, flip, jitter, grey, blur (its ProtoCLIP)."""

    episodes: int = 400
    """Number of episodes."""
    episode_size: int = 200_000
    """Samples N of an episode, drawn with replacement."""
    infonce_warmup: int = 1
    """Number of episodes at the start with L_CLIP alone."""
    lit_start: int | None = None
    """Upstream's --lit-start-epoch: from episode lit_start-1 on the image tower's learning rate is 0 and L = L_CLIP."""
    batch_size: int = 512
    """Pairs per step, over all processes together."""
    accumulate: int = 1
    """Micro-batches a step, to save memory. Gradients equal those of one batch, except that batch norms (of a ResNet,
    and of heads with hidden layers) normalise each micro-batch separately; the towers' forward pass runs twice."""
    grad_checkpointing: bool = False
    """Recompute the towers' activations in the backward pass: less memory, one more forward pass."""
    gather_with_grad: bool = True
    """Gradients of gathered features flow to all processes, so that W processes equal one. Off: only to the process's
    own features; encoders' gradients are W times smaller (upstream's default, with a clipping norm of 10)."""
    lr: float = 5e-4
    """Peak learning rate."""
    lr_text: float | None = None
    """Peak learning rate of text tower, heads and scales; None: as `lr`."""
    text_start: int = 0
    """Episode at which the training of text tower, heads and scales starts."""
    text_end: int | None = None
    """Episode at which the learning rate of text tower, heads and scales reaches 0; None: the end of training."""
    warmup: int = 15_625
    """Steps of linear warm-up."""
    weight_decay: float = 0.5
    """AdamW's weight decay of matrices; gains, biases, scales and projection heads have none."""
    beta1: float = 0.9
    """AdamW's beta1."""
    beta2: float | None = None
    """AdamW's beta2; None: upstream's, 0.98 for a model with "vit" in its name, else 0.999."""
    eps: float | None = None
    """AdamW's epsilon; None: upstream's, 1e-6 for a model with "vit" in its name, else 1e-8."""
    max_grad_norm: float = 10.0
    """Gradients of all parameters together are clipped to this norm."""

    seed: int = 0
    """Seed of initial weights, episodes, shuffles and views."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the processor supports it. Losses are always in fp32."""
    workers: int = 8
    """Loader processes per training process; they do not change the order of samples."""
    strict: bool = False
    """Stop at the first broken sample instead of counting and replacing it."""
    save_every: int = 1000
    """Steps between checkpoints; there is one at the end, too."""
    keep_every: int = 0
    """Keep the checkpoint of every N-th step as checkpoint-STEP.pt; 0 keeps none."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Episodes between zero-shot evaluations on `eval_set`, with class names as prompts; 0: never during training."""
    eval_set: str = ""
    """Classification set in the CLIP-benchmark webdataset layout, for `eval_every`."""
    dry_run: bool = False
    """Print sizes, schedule and a memory estimate, and stop; needs no data."""

    @property
    def heads(self) -> bool:
        return self.w_proto != 0 or self.w_external != 0

    def adamw(self) -> dict:
        """AdamW's betas and eps; values that are not set depend on the model name (U:training/params.py)."""
        beta2, eps = (0.98, 1e-6) if "vit" in self.model.lower() else (0.999, 1e-8)
        beta2, eps = (beta2 if self.beta2 is None else self.beta2), (eps if self.eps is None else self.eps)
        return {"betas": (self.beta1, beta2), "eps": eps}

    def steps_per_episode(self) -> int:
        """Includes the short last batch: training skips it but counts its step (U:training/train.py:109)."""
        return math.ceil(self.episode_size / self.batch_size)


PAPER = Config(dataset_size=2_500_000, lit_start=399, gather_with_grad=False)
CLIP = dict(w_proto=0.0, w_external=0.0, infonce_warmup=0, lit_start=None, episode_size=2_500_000)
ONE_GPU = dict(batch_size=64, lr=5e-5, warmup=2_000)
SMALL = Config(
    model="RN-emoji",
    image_size=64,
    hidden_dim=512,
    projection_dim=64,
    w_external=0.0,
    keep_in_memory=True,
    distinct_captions=True,
    augmentation="default",
    k=200,
    episodes=30,
    episode_size=8_912,
    batch_size=512,
    lr=5e-3,
    warmup=80,
    weight_decay=0.2,
    beta2=0.98,
    max_grad_norm=1.0,
    workers=0,
    save_every=200,
)
EMOJI = dataclasses.replace(
    SMALL,
    data="data/emoji/train_names",
    model="ResNet-emoji",
    image_size=None,
    w_external=1.0,
    external_teacher="data/emoji/teacher.npz",
    crop=(0.7, 1.4),
    crop_ratio=(0.85, 1.18),
    eval_every=4,
    eval_set="data/emoji/eval/bare_names_ood",
)
PRESETS = {
    "small": ("ProtoCLIP on your own --data, without a teacher, small", SMALL),
    "small-clip": ("CLIP baseline of small", dataclasses.replace(SMALL, w_proto=0.0)),
    "emoji": ("ProtoCLIP on the embedded corpus, minutes on two CPU cores", EMOJI),
    "emoji-clip": (
        "CLIP baseline of emoji: the same samples, augmentation and steps",
        dataclasses.replace(EMOJI, w_proto=0.0, w_external=0.0),
    ),
    "cc3m-rn50": ("authors' README: ProtoCLIP, RN50, 2.5M pairs, 8 GPUs, 400 episodes", PAPER),
    "cc3m-rn50-clip": (
        "authors' README: CLIP, 8 GPUs, 32 epochs",
        dataclasses.replace(PAPER, **CLIP, episodes=32, augmentation="default"),
    ),
    "cc3m-rn50-clip-light": (
        "control: CLIP with ProtoCLIP's augmentation, 8 GPUs",
        dataclasses.replace(PAPER, **CLIP, episodes=32),
    ),
    "cc3m-rn50-1gpu": (
        "authors' README: ProtoCLIP, 1 GPU, 100 episodes",
        dataclasses.replace(PAPER, **ONE_GPU, episodes=100, lit_start=99),
    ),
    "cc3m-rn50-1gpu-clip": (
        "authors' README: CLIP, 1 GPU, 8 epochs",
        dataclasses.replace(PAPER, **{**CLIP, **ONE_GPU}, episodes=8, augmentation="default"),
    ),
}


def check(cfg: Config, world_size: int) -> None:
    """Raise ValueError on invalid settings, and if data are missing, before work starts."""
    cli.check_data(cfg, "cc3m/{00000..00331}.tar")
    cli.check_zero_shot_set(cfg)
    if cfg.w_external != 0 and not cfg.external_teacher:
        raise UserError(
            "--w-external is not 0 but --external-teacher is missing: make the file with "
            "'python -m protoclip.teacher roberta-large --data ... --out teacher.npz', or pass --w-external 0"
        )
    check_settings(cfg, world_size)


def check_settings(cfg: Config, world_size: int) -> None:
    """Raise ValueError on invalid settings; reads no files, as a dry run needs."""
    if cfg.lock_image and export.open_clip_config(cfg.model)["vision_cfg"].get("timm_model_name") != LITE0:
        raise UserError(f"--lock-image has weights of EfficientNet-Lite0 only: --model Lite0-emoji, not {cfg.model}")
    if cfg.w_external != 0 and not cfg.back_translate:
        raise UserError("the external teacher needs back translation: pass --back-translate, or --w-external 0")
    cli.check_counts(cfg, "episodes", "episode_size", "batch_size", "k", "niter", "nredo", "save_every", "log_every")
    cli.check_counts(cfg, "dataset_size", "image_size", "hidden_dim", "projection_dim")
    cli.check_counts(cfg, "num_layers", "text_start", "text_end", "infonce_warmup", "warmup", "workers", least=0)
    cli.check_counts(cfg, "episode_shards", "keep_every", "eval_every", least=0)
    cli.check_rates(cfg, "lr", "lr_text", "weight_decay", "w_clip", "w_proto", "w_external")
    cli.check_positive(cfg, "max_grad_norm")
    cli.check_finite(cfg, "target_temperature")
    cli.check_adam(cfg)
    cli.check_batch(cfg, world_size)
    if cfg.episode_size < cfg.batch_size:
        raise UserError(f"--episode-size {cfg.episode_size} is less than one batch of {cfg.batch_size}")
    if cfg.heads and cfg.k > cfg.episode_size:
        raise UserError(f"--k {cfg.k} prototypes cannot be made from --episode-size {cfg.episode_size} samples")
    if cfg.lit_start is not None and not 1 < cfg.lit_start <= cfg.episodes:
        raise UserError(f"--lit-start {cfg.lit_start} is not in 2..{cfg.episodes} (the number of episodes)")
    if cfg.episode_shards and cfg.dataset_size:
        raise UserError("--dataset-size cannot be combined with --episode-shards: pass --dataset-size None")
    if cfg.episode_shards and cfg.w_external != 0 and str(cfg.external_teacher).endswith(".npy"):
        raise UserError(
            f"--external-teacher {cfg.external_teacher} has features in the order of the data, but --episode-shards "
            "reads shards in random order: make a .npz, which has the samples' keys, with 'python -m protoclip.teacher'"
        )
    cli.check_in_memory(cfg, "episode_shards")
    cli.check_crop(cfg)
    if cfg.lock_image and cfg.keep_in_memory and cfg.augmentation == "light":
        raise UserError("--lock-image with --keep-in-memory sees whole images: --augmentation light has no effect")
    if cfg.image_size is not None and cfg.augmentation == "light" and cfg.image_size <= 10:
        raise UserError(
            f"--augmentation light blurs over 21 pixels and needs --image-size above 10, not {cfg.image_size}"
        )


README = "authors' README, results: "
CC3M, ONE, EIGHT = "CC3M, 2.5M pairs", "1", "8 x 2080 Ti"
NUMBERS = "ImageNet zero-shot {}, linear probe {} %; COCO mean recall {} %"
LEFT_OUT = {  # rows of the paper's tables without a preset, and why
    "abstract, YFCC-15M": "no command is published: use a cc3m preset with `--data` and `--dataset-size`",
    "ablations of components, K, temperatures, teacher": "the paper's body was not read; `--help` has a flag for each",
    "modality gap": "an evaluation of the same runs: `protoclip.eval`",
    "authors' README, mean of 10 zero-shot sets": "an evaluation of the same runs: `protoclip.eval --sets`",
}
PAPER_ROWS = {
    "train": {
        **dict.fromkeys(("small", "small-clip"), OWN),
        "emoji": EMBEDDED,
        "emoji-clip": EMBEDDED,
        "cc3m-rn50": Row(README + "ProtoCLIP, 8 GPUs", CC3M, EIGHT, NUMBERS.format(21.47, 55.22, 35.69)),
        "cc3m-rn50-clip": Row(README + "CLIP, 8 GPUs", CC3M, EIGHT, NUMBERS.format(19.46, 49.41, 36.48)),
        "cc3m-rn50-clip-light": Row("ours: control of the augmentation", CC3M, EIGHT, "none: not in the paper"),
        "cc3m-rn50-1gpu": Row(README + "ProtoCLIP, 1 GPU", CC3M, ONE, NUMBERS.format(14.50, 44.55, 28.26)),
        "cc3m-rn50-1gpu-clip": Row(README + "CLIP, 1 GPU", CC3M, ONE, NUMBERS.format(12.29, 38.95, 26.20)),
    },
    "teacher": {"roberta-large": Row("external teacher of ProtoCLIP", CC3M + " (captions)"), "minilm": EMBEDDED},
}
