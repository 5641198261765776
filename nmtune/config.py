"""Every setting of pre-training, tuning and fine-tuning; presets and their checks.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning@f249dce. Pre-training presets of CLIPs are read
from the names of the authors' checkpoints, tuning presets from the commands in their README; `*-paper` and `*-language`
have the settings that the paper states (app. A.2, B.1, B.3). `in1k-rn50-LEVEL` (the paper does not say which recipe of
another paper it uses), `small*` and `own*` are ours.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from shared.errors import UserError
from shared.settings import BaseConfig, Beta, Count, Number, Positive, Rate, Share, Whole, check_limits

# -------------------------------------------------------------------------------------------------------- pre-training

NOISE = (0, 5, 10, 20, 30)  # per cent


@dataclasses.dataclass
class PretrainConfig(BaseConfig):
    """Pre-training on noisy supervision: an image classifier on labels, or a CLIP on captions.

    `data` of supervised: labelled images, a folder DIR/CLASS/*.jpg or DIR:train of webdatasets with classnames.txt; of
    clip: shards or a .tsv.
    """

    kind: Literal["supervised", "clip"] = "supervised"
    """supervised: a timm model on labels. clip: an open_clip model on image-text pairs."""
    noise: Share = 0.0
    """Noise ratio gamma: this share of the labels is flipped, or int(N gamma/2) swaps exchange captions of random
    pairs. The share that really changed is printed, and stored in the checkpoint."""
    exclude_true: bool = True
    """Flip labels only to other classes (the paper). Off: to any class, including the true one (upstream's routine)."""
    asymmetric: bool = False
    """Flip a label to the next class instead of a random one: all wrong labels of a class are then the same."""
    noise_seed: Whole | None = None
    """Seed of the noise; None: `seed`."""
    model: str = "resnet50"
    """timm or open_clip model."""
    epochs: Count = 90
    """Passes over the data."""
    batch_size: Count = 1024
    """Images per step, over all processes together."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has Nesterov momentum 0.9. Biases and gains have no weight decay with either."""
    lr: Rate = 0.5
    """Peak learning rate; it falls to 0 along a cosine."""
    warmup: Whole = 5000
    """Steps of linear warm-up."""
    weight_decay: Rate = 5e-5
    """Decay of matrices."""
    beta2: Beta = 0.999
    """AdamW's beta2; open_clip's default is 0.98 for a ViT."""
    eps: Rate = 1e-8
    """AdamW's epsilon; open_clip's default is 1e-6 for a ViT."""
    crop_scale: Share = 0.08
    """Smallest share of an image that a training crop covers (supervised; clip has open_clip's 0.9)."""

    def check(self, world_size: int) -> None:
        super().check(world_size)
        if self.kind == "supervised" and self.dataset_size is not None:
            raise UserError("--dataset-size is for --kind clip, not for labelled images")
        if self.kind == "clip" and self.asymmetric:
            raise UserError("--asymmetric applies to labels: leave it out with --kind clip, which swaps captions")
        if self.stream:
            raise UserError("--stream has no rows whose labels or captions could be changed: leave it out")


SMALL_SUPERVISED = PretrainConfig(  # little decay and weak crops, so that it memorises some of the wrong labels
    keep_in_memory=True,
    model="resnet_emoji",
    epochs=14,
    batch_size=128,
    optimizer="adamw",
    lr=3e-3,
    warmup=60,
    weight_decay=0.05,
    crop_scale=0.7,
    workers=0,
    save_every=1000,
)
SMALL_CLIP = dataclasses.replace(SMALL_SUPERVISED, kind="clip", model="ConvNet-emoji", lr=1e-3, weight_decay=0.2)
IN1K = PretrainConfig()
YFCC = PretrainConfig(
    kind="clip", model="RN50", epochs=32, optimizer="adamw", lr=5e-4, warmup=10_000, weight_decay=0.2, batch_size=2048
)
JOURNAL = dataclasses.replace(YFCC, model="ViT-B-16", batch_size=8192, weight_decay=0.1, beta2=0.98, eps=1e-6)


def noise_levels(name: str, what: str, base: PretrainConfig, **by_level) -> dict[str, tuple[str, PretrainConfig]]:
    """{NAME-LEVEL: `base` with this noise} for each level of NOISE. by_level: further fields as {level: value}."""
    return {
        f"{name}-{level:02d}": (
            f"{what}, {level} % noise",
            dataclasses.replace(base, noise=level / 100, **{k: v[level] for k, v in by_level.items()}),
        )
        for level in NOISE
    }


PRETRAIN_PRESETS = {
    "small-sup": ("ours: small ResNet on your own labelled --data; --noise flips labels", SMALL_SUPERVISED),
    "small-clip": ("ours: small CLIP on your own --data; --noise swaps captions", SMALL_CLIP),
    **noise_levels("in1k-rn50", "figures 1 to 3, table 3: ResNet-50 on ImageNet-1K labels, by a plain recipe", IN1K),
    # upstream's run names state the batch per GPU (256 or 512) but not the number of GPUs; 8 are assumed here
    **noise_levels(
        "yfcc15m-rn50",
        "figures 1 to 3, table 3: CLIP RN50 on YFCC15M captions",
        YFCC,
        batch_size={0: 2048, 5: 2048, 10: 4096, 20: 4096, 30: 2048},
    ),
    **noise_levels("cc12m-yfcc15m-vit-b-16", "journal: CLIP ViT-B/16 on CC12M + YFCC15M captions", JOURNAL),
}


# -------------------------------------------------------------------------------------------------------------- tuning


@dataclasses.dataclass
class TuningConfig:
    """Settings that tuning a head and tuning an encoder share. The defaults are those of the authors' README."""

    encoder: str = ""
    """Encoder: timm:NAME, open_clip:NAME, or the run folder of `python -m nmtune.pretrain`."""
    checkpoint: str = ""
    """The encoder's weights: a file in timm's or open_clip's layout, an open_clip tag, or `pretrained` (timm's own)."""
    benchmark: str = ""
    """One of the paper's downstream tasks, found below `root`: cifar10 ... rendered_sst2, domainnet-real, imagenet."""
    root: str = "/data"
    """Folder of the benchmarks' data sets."""
    data: str = ""
    """Training images without `benchmark`: a folder DIR/CLASS/*.jpg, DIR:train of a webdataset, or a list FILE.txt."""
    tests: tuple[str, ...] = ()
    """Test sets as NAME=PATH, paths as in `data`."""

    w_cov: Rate = 0.04
    """Weight of L_COV."""
    w_svd: Rate = 0.001
    """Weight of L_SVD."""
    svd_k: Count = 5
    """Number of leading singular values in L_SVD; 1 in the paper (eq. 5)."""
    epochs: Count = 30
    """Passes over the training set."""
    batch_size: Count = 64
    """Images per step, over all processes together; with two views, a batch has both views of each image."""
    lr: Rate = 1e-3
    """AdamW's learning rate; `schedule` takes it to 0."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls, step by step; linear for language in the paper (app. B.3)."""
    warmup: Whole = 0
    """Steps of linear warm-up."""
    weight_decay: Rate = 1e-4
    """AdamW's decay of all trained parameters, gains and biases included."""

    seed: Whole = 3907
    """Seed of initial weights, shuffles and views; 3907 is the authors'."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Autocast of the encoder; heads and losses are always in fp32."""
    workers: Whole = 4
    """Loader processes per training process; they do not change the order of samples."""
    strict: bool = False
    """Stop at the first broken image instead of counting and replacing it."""
    save_every: Count = 500
    """Steps between checkpoints; there is one at the end, too."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    dry_run: bool = False
    """Print sizes, schedule and a memory estimate, and stop; needs no data."""


@dataclasses.dataclass
class Config(TuningConfig):
    """Tuning of a head on the features of a frozen encoder."""

    out: str = "runs/nmtune/tune"
    """Run folder: config.json, metrics.jsonl, tensorboard/, checkpoint.pt. With a checkpoint in it, the run resumes."""
    features: str = ""
    """A features file (.npz) instead of encoder and images: `features` (N, D), or (V, N, D) for V views of each image,
    and `labels` (N,); optionally test sets as `NAME_features` (M, D), `NAME_labels` (M,). Any model, any modality."""
    train_fraction: Share = 1.0
    """Keep this share of every class of the training set."""
    label_noise: Share = 0.0
    """Flip this share of the training labels to any class (upstream's noise of the *downstream* set)."""

    method: Literal["lp", "mlp", "nmtune"] = "nmtune"
    """lp: linear classifier. mlp: NMTune's head with only cross-entropy. nmtune: with its three regularisers."""
    zero_shot: bool = False
    """Initialise the linear probe of a CLIP with text embeddings of the class names; features have length 1."""
    w_mse: Rate = 1.0
    """Weight of L_MSE."""
    mse_sum: bool = False
    """L_MSE sums over the D dimensions, as in the paper (eq. 3). Off: it is their mean, as in the authors' code."""
    ratio: Positive = 4.0
    """Hidden width of the MLP divided by the feature dimension D."""
    layers: Whole = 1
    """Hidden layers of the MLP."""
    residual: bool = True
    """z = scale * MLP(f) + f; off: z = MLP(f), as in the paper (figure 17)."""
    scale_init: Number = 1.0
    """Initial scale of the MLP's output in the residual connection."""
    batch_norm: bool = True
    """BatchNorm before every ReLU of the MLP; off in the paper (figure 17)."""
    views: Literal["eval", "train", "train+rand"] = "train"
    """eval: one view of each image by the evaluation transform, encoded once (upstream's LP; of a features file, its
    first view). train: two training views, new in every step (upstream's MLP, NMTune). train+rand: the second with
    RandAugment (--use-weak-strong)."""
    bank: int = 0
    """V: encode V training views of each image once, and draw two of them in every step. 0: encode new views."""
    select: bool = False
    """Select learning rate and weight decay on a held-out fifth of every class, then tune on the whole training set.
    For your own features."""
    heads: Count = 1
    """Number of heads, with the seed and those that follow it: their mean accuracy is the run's. The first is kept."""

    def loss_weights(self, dim: int) -> tuple[float, float, float]:
        """Weights (mse, cov, svd) of the loss terms in model.py, for features of `dim` dimensions."""
        if self.method != "nmtune":
            return 0.0, 0.0, 0.0
        return self.w_mse * (dim if self.mse_sum else 1), self.w_cov, self.w_svd


LP = Config(method="lp", lr=1e-2, views="eval")
ONE_LAMBDA = dict(w_mse=0.01, mse_sum=True, w_cov=0.01, w_svd=0.01, svd_k=1)  # equations 3, 5 and 6
FIGURE_17 = dict(residual=False, batch_norm=False)
PAPER = {  # app. B.1; the paper does not mention training views, so there is one view of each image
    "lp": Config(method="lp", lr=0.1, weight_decay=0.0, views="eval", heads=3),
    "mlp": Config(method="mlp", views="eval", heads=3, **FIGURE_17),
    "nmtune": Config(views="eval", heads=3, **FIGURE_17, **ONE_LAMBDA),
}
LANGUAGE = {  # app. B.3
    method: dataclasses.replace(cfg, epochs=10, schedule="linear", heads=1, lr=0.01 if method == "lp" else 1e-3)
    for method, cfg in PAPER.items()
}
METHODS = {
    "lp": ("authors' README, any encoder: linear probe, evaluation view", LP),
    "mlp": ("the authors' code: NMTune's head and views, cross-entropy alone", Config(method="mlp")),
    "nmtune": ("authors' README, any encoder: NMTune with the authors' weights", Config()),
    "lp-paper": ("tables 1, 7, 8, figures 1, 2: linear probe as in the paper", PAPER["lp"]),
    "mlp-paper": ("tables 1, 7, 8, row 0 0 0 of table 16: the MLP as in the paper", PAPER["mlp"]),
    "nmtune-paper": ("tables 1, 7, 8, figure 1, first row of table 16: NMTune as in the paper", PAPER["nmtune"]),
}
# Name, weights, checkpoint, and the paper's top-1 on the 14 ID sets / OOD: figure 1 without noise, then table 1, whose
# weights are inferred from the names and parameters in table 6
ENCODERS = {
    "in1k-rn50": (
        "ResNet-50, noisy ImageNet-1K", "timm:resnet50", "",
        {"lp-paper": "73.54 / 31.32", "nmtune-paper": "75.06 / 36.27"},
    ),
    "yfcc15m-rn50": (
        "CLIP RN50, noisy YFCC15M", "open_clip:RN50", "",
        {"lp-paper": "65.24 / 22.12", "nmtune-paper": "67.34 / 26.11"},
    ),
    "swin-l": (
        "Swin-L, ImageNet-21K", "timm:swin_large_patch4_window7_224.ms_in22k", "pretrained",
        {"lp-paper": "81.91 / 50.88", "mlp-paper": "82.51 / 51.21", "nmtune-paper": "84.16 / 52.35"},
    ),
    "convnext-l": (
        "ConvNeXt-L, LAION-2B", "timm:convnext_large_mlp.clip_laion2b_augreg", "pretrained",
        {"lp-paper": "88.86 / 66.86", "mlp-paper": "88.53 / 68.43", "nmtune-paper": "89.48 / 70.30"},
    ),
    "vit-l": (
        "ViT-L, LAION-2B", "timm:vit_large_patch14_clip_224.laion2b", "pretrained",
        {"lp-paper": "86.85 / 66.89", "mlp-paper": "87.23 / 69.50", "nmtune-paper": "88.57 / 70.47"},
    ),
    "efficientnet-b3": (
        "EfficientNet-B3, JFT-300M", "timm:tf_efficientnet_b3.ns_jft_in1k", "pretrained",
        {"lp-paper": "76.72 / 44.13", "mlp-paper": "76.87 / 45.95", "nmtune-paper": "77.63 / 46.84"},
    ),
    "bit-m": (
        "ResNetv2-152x2, BiT-M", "timm:resnetv2_152x2_bit.goog_in21k", "pretrained",
        {"lp-paper": "77.51 / 40.82", "mlp-paper": "77.58 / 41.73", "nmtune-paper": "78.43 / 42.42"},
    ),
}  # fmt: skip
PRESETS = {
    **METHODS,
    **{
        f"{name}-{method}": (
            f"{what}: {METHODS[method][0]}" + (f"; ID / OOD {top1[method]}" if method in top1 else ""),
            dataclasses.replace(METHODS[method][1], encoder=encoder, checkpoint=checkpoint),
        )
        for name, (what, encoder, checkpoint, top1) in ENCODERS.items()
        for method in METHODS
    },
    **{
        f"{method}-language": (f"tables 2, 9 to 13, for a file of nmtune.extract: {method} as in the paper", cfg)
        for method, cfg in LANGUAGE.items()
    },
    **{
        f"own-{method}": (
            f"ours, your own features, learning rate and weight decay selected: {METHODS[method][0]}",
            dataclasses.replace(METHODS[method][1], select=True),
        )
        for method in ("lp", "mlp", "nmtune")
    },
}  # fmt: skip


def named_tests(tests: Sequence[str]) -> dict[str, str]:
    """{name: path} of --tests NAME=PATH. UserError for other words, and for a name twice or with another meaning."""
    found: dict[str, str] = {}
    for test in tests:
        name, given, path = test.partition("=")
        if not (name and given and path):
            raise UserError(f"--tests takes NAME=PATH, not {test!r}")
        if name in found:
            raise UserError(f"--tests names {name} twice")
        if name in ("features", "labels", "about", "classnames") or name.endswith(("_features", "_labels")):
            raise UserError(f"--tests {test}: {name} has a meaning of its own in a features file; choose another name")
        found[name] = path
    return found


def check_numbers(cfg: TuningConfig, world_size: int) -> None:
    """UserError on numbers that are out of range; a dry run checks only these."""
    check_limits(cfg)
    if getattr(cfg, "train_fraction", 1) == 0:
        raise UserError("--train-fraction must be above 0, not 0")
    if cfg.batch_size % world_size:
        raise UserError(f"--batch-size {cfg.batch_size} cannot be divided evenly among {world_size} processes")


def check(cfg: Config, world_size: int = 1) -> None:
    """UserError on invalid settings, before work starts."""
    sources = [name for name in ("features", "benchmark", "data") if getattr(cfg, name)]
    if len(sources) != 1:
        given = " and ".join(f"--{name}" for name in sources) or "none"
        raise UserError(
            f"name one source of training data, not {given}: --features FILE.npz, --benchmark NAME --root DIR, or "
            "--data PATH, a folder DIR/CLASS/*.jpg, DIR:train of a webdataset or a list FILE.txt"
        )
    if cfg.features and cfg.encoder:
        raise UserError("--features replaces the encoder: leave out --encoder, or name images with --data")
    if not cfg.features and not cfg.encoder:
        raise UserError(
            "--encoder is missing: timm:NAME, open_clip:NAME, or a run folder of `python -m nmtune.pretrain`"
        )
    named_tests(cfg.tests)
    if cfg.zero_shot and (cfg.method != "lp" or cfg.features):
        raise UserError("--zero-shot needs a linear probe of a CLIP: --method lp and --encoder")
    if (cfg.select or cfg.heads > 1) and not (cfg.features or cfg.bank or cfg.views == "eval"):
        raise UserError("--select and --heads need features in memory: pass --features, --bank V or --views eval")
    if cfg.bank == 1 or cfg.bank < 0:
        raise UserError(f"--bank {cfg.bank} must be 0, or at least 2, because each step draws two views")
    check_numbers(cfg, world_size)


# --------------------------------------------------------------------------------------------------------- fine-tuning


@dataclasses.dataclass
class FinetuneConfig(TuningConfig):
    """The journal extension: tune the encoder, fully or by LoRA, with two of the regularisers on its features."""

    out: str = "runs/nmtune/finetune"
    """Run folder: config.json, metrics.jsonl, tensorboard/, checkpoint.pt. With a checkpoint in it, the run resumes."""
    lora: bool = False
    """Train only rank-8 adapters of the blocks' MLPs and the classifier."""
    lr: Rate = 1e-4
    """AdamW's learning rate; `schedule` takes it to 0."""
    grad_checkpointing: bool = False
    """Recompute the encoder's activations in the backward pass: less memory, one more forward pass."""


FINETUNE_PRESETS = {
    "full": ("journal: all of the encoder, with both regularisers", FinetuneConfig()),
    "full-plain": ("journal: all of the encoder, cross-entropy alone", FinetuneConfig(w_cov=0.0, w_svd=0.0)),
    "lora": ("journal: rank-8 adapters, with both regularisers", FinetuneConfig(lora=True, lr=1e-3)),
    "lora-plain": (
        "journal: rank-8 adapters, cross-entropy alone",
        FinetuneConfig(lora=True, lr=1e-3, w_cov=0.0, w_svd=0.0),
    ),
}


def check_finetune(cfg: FinetuneConfig, world_size: int = 1) -> None:
    """UserError on invalid settings, before work starts."""
    if world_size > 1:
        raise UserError(
            "fine-tuning computes its regularisers on the whole batch of one process: start it without torchrun"
        )
    if not cfg.encoder:
        raise UserError("--encoder is missing: timm:NAME, open_clip:NAME, or a run folder of nmtune.pretrain")
    if bool(cfg.data) == bool(cfg.benchmark):
        raise UserError("name one source of training images: --benchmark NAME --root DIR, or --data PATH")
    check_numbers(cfg, world_size)


SCRIPTS = {"pretrain": PRETRAIN_PRESETS, "train": PRESETS, "finetune": FINETUNE_PRESETS}
