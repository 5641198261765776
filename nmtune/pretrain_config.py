"""Every setting of pre-training, its presets, and what is refused early. `pretrain.py` trains.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning@f249dce. Presets are what its checkpoint names
tell; `emoji*` are ours.
"""

import dataclasses
from typing import Literal

from shared import cli

NOISE = (0, 5, 10, 20, 30)  # per cent


@dataclasses.dataclass
class PretrainConfig:
    """Pre-training on noisy supervision: of an image classifier on labels, or of a CLIP on captions."""

    out: str = "runs/nmtune/pretrain"
    """Run folder: config.json, metrics.jsonl, tensorboard/, checkpoint.pt. With a checkpoint in it, the run resumes."""
    kind: Literal["supervised", "clip"] = "supervised"
    """supervised: a timm model on labels. clip: an open_clip model on image-text pairs."""
    data: str = ""
    """supervised: labelled images, a folder DIR/CLASS/*.jpg or DIR:train of webdatasets with classnames.txt. clip:
    shards 'yfcc15m/{00000..01538}.tar' or a .tsv. Both: data/emoji:TASK:pretrain."""
    noise: float = 0.0
    """Noise ratio gamma: this share of the labels is flipped, or int(N gamma/2) random pairs swap their captions. The
    share that really changed is printed, and kept in the checkpoint."""
    exclude_true: bool = True
    """A flipped label becomes another class (the paper). Off: any class, the true one included (upstream's routine)."""
    noise_seed: int | None = None
    """Seed of the noise; None: `seed`."""
    model: str = "resnet50"
    """timm or open_clip model."""
    epochs: int = 90
    """Passes over the data."""
    batch_size: int = 1024
    """Images per step, over all processes together."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has Nesterov momentum 0.9; neither decays biases and gains."""
    lr: float = 0.5
    """Peak learning rate; a cosine by step takes it to 0."""
    warmup: int = 5000
    """Steps of linear warm-up."""
    weight_decay: float = 5e-5
    """Decay of matrices."""
    label_smoothing: float = 0.0
    """Of the supervised cross-entropy."""
    crop_scale: float = 0.08
    """Smallest share of an image that a training crop covers (supervised; clip has open_clip's 0.9)."""

    seed: int = 0
    """Seed of initial weights, noise, shuffles and views."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the processor computes in it. Losses are in fp32 always."""
    workers: int = 8
    """Loader processes per training process; they do not change the order of samples."""
    strict: bool = False
    """Stop at the first broken sample instead of counting and replacing it."""
    save_every: int = 1000
    """Steps between checkpoints; there is one at the end, too."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    dry_run: bool = False
    """Print sizes, schedule and a memory estimate, and stop; needs no data."""


EMOJI_SUPERVISED = PretrainConfig(  # little augmentation and decay: it is to memorise a part of the wrong labels
    data="data/emoji:subgroup:pretrain",
    model="resnet_emoji",
    epochs=20,
    batch_size=128,
    optimizer="adamw",
    lr=3e-3,
    warmup=50,
    weight_decay=0.01,
    crop_scale=0.95,
    workers=0,
    save_every=200,
)
EMOJI_CLIP = dataclasses.replace(
    EMOJI_SUPERVISED, kind="clip", model="ViT-emoji", epochs=18, lr=1e-3, warmup=64, weight_decay=0.2
)
IN1K = PretrainConfig()
YFCC = PretrainConfig(
    kind="clip", model="RN50", epochs=32, optimizer="adamw", lr=5e-4, warmup=10_000, weight_decay=0.2, batch_size=2048
)
JOURNAL = dataclasses.replace(YFCC, model="ViT-B-16", batch_size=8192, weight_decay=0.1)


def _levels(name: str, what: str, base: PretrainConfig, **by_level) -> dict[str, tuple[str, PretrainConfig]]:
    return {
        f"{name}-{level:02d}": (
            f"{what}, {level} % noise",
            dataclasses.replace(base, noise=level / 100, **{k: v[level] for k, v in by_level.items()}),
        )
        for level in NOISE
    }


PRETRAIN_PRESETS = {
    **_levels("emoji-sup", "small ResNet on emoji subgroups, minutes on one CPU core", EMOJI_SUPERVISED),
    **_levels("emoji-clip", "small CLIP on emoji captions, minutes on one CPU core", EMOJI_CLIP),
    **_levels("in1k-rn50", "ResNet-50 on ImageNet-1K labels", IN1K),
    # upstream's run names tell the batch a GPU (256 or 512) but not the number of GPUs; 8 are assumed here
    **_levels(
        "yfcc15m-rn50",
        "CLIP RN50 on YFCC15M captions",
        YFCC,
        batch_size={0: 2048, 5: 2048, 10: 4096, 20: 4096, 30: 2048},
    ),
    **_levels("cc12m-yfcc15m-vit-b-16", "journal: CLIP ViT-B/16 on CC12M + YFCC15M captions", JOURNAL),
}


def check_pretrain(cfg: PretrainConfig, world_size: int) -> None:
    """What would fail late or train something else than asked for fails here, in a sentence."""
    if not cfg.data:
        wanted = (
            "image-text shards in img2dataset layout, e.g. --data 'yfcc15m/{00000..01538}.tar'"
            if cfg.kind == "clip"
            else "labelled images, e.g. --data /data/imagenet/train or --data /data/wds_imagenet1k:train"
        )
        raise ValueError(f"--data is missing: it takes {wanted}")
    if not 0 <= cfg.noise <= 1:
        raise ValueError(f"--noise {cfg.noise} is a share between 0 and 1")
    cli.check_counts(cfg, "epochs", "batch_size", "save_every", "log_every")
    cli.check_batch(cfg, world_size)
