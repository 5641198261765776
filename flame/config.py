"""Every setting of a training run, its presets, and the checks before a run starts.

Preset cc3m-vitb16 follows the published command (Training.md of MIV-XJTU/FLAME@4d2b9a9); PAPER_ROWS gives the sources
of the others. Only the paper's abstract and two figures on its authors' page were read, no tables. `emoji*` and
`small*` are ours.
"""

import dataclasses
from typing import Literal

from flame.model import TOWERS
from shared import cli
from shared.errors import UserError
from shared.presets import EMBEDDED, OWN, Row

EVAL = "data/emoji/eval/"
ZERO_SHOT_SETS = tuple(EVAL + name for name in ("bare_names_id", "bare_names_ood", "subgroups_id", "subgroups_ood"))
LONG_SETS = (EVAL + "retrieval_long_ood",)
LANGUAGES = (
    "ar bn cs da de el en es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt quz ro ru sv sw te th tr uk vi zh"
).split()  # of Crossmodal-3600
LANGUAGE_SETS = tuple(f"{EVAL}retrieval_xm_{language}" for language in LANGUAGES)
NO_EXPORT = "--export: open_clip has no image tower that averages an MLP of every patch, as FLAME's does"


@dataclasses.dataclass
class Config:
    """Defaults are FLAME's with ViT-B/16 on CC3M."""

    data: str = ""
    """Shards in img2dataset layout ('cc3m/{0000..0575}.tar', several lists joined by '::', a folder), or one .tsv."""
    bank: str = ""
    """Embeddings of the captions, for the flame method: a folder that `python -m flame.embed` made, or the authors'
    folder of .pth files."""
    out: str = "runs/flame/run"
    """Run folder: config.json, metrics.jsonl, tensorboard/, checkpoint.pt. With a checkpoint in it, the run resumes."""
    dataset_size: int | None = None
    """Number of samples to use, from the start of the data; None uses all."""
    window_shards: int = 0
    """0: all shards are available, and samples are shuffled over all of them. S: each process reads its share of the
    shards S at a time, fetched ahead and deleted afterwards, so the data may be larger than the disk. --dataset-size is
    then the number of samples per epoch: if the shards hold more, each epoch leaves out different samples; if fewer,
    samples repeat."""
    cache: str = "data/cache"
    """Folder for copies of remote shards, and for the index of large data."""

    method: Literal["flame", "clip"] = "flame"
    """flame, or clip: the same image tower and captions, with a trained text transformer. Only flame uses --bank,
    --facet-ids, --facets, --loss and --centre; only clip uses --captions, --text-width, --text-layers, --max-length and
    --embed-dim."""
    facet_ids: tuple[int, ...] = ()
    """Facets of the bank to draw from: 0 of the raw caption, 1-3 of the short, 4-10 of the long one; none given: all.
    Facets 0, 1 and 4 ask for a word about the whole image, one for each caption."""
    facets: int = 6
    """Number of facets drawn each time an image is loaded, without replacement: K."""
    loss: Literal["mp-sigmoid", "mp-nce"] = "mp-sigmoid"
    """Sigmoid loss on every pair, or InfoNCE over the batch; both with K texts per image."""
    logit_scale: float = 10.0
    """Initial scale t of the logits in the flame method; the clip method starts at 1 / 0.07."""
    logit_bias: float = -10.0
    """Initial bias b of the logits, for the sigmoid loss. At minus the log of the batch size, matching and other pairs
    have about equal weight."""
    centre: bool = False
    """Subtract from each facet its mean over the bank, in training and evaluation (not in the paper; for small LLMs,
    whose embeddings share one large direction)."""
    captions: tuple[str, ...] = ()
    """Caption files of the clip method; one caption is drawn each time an image is loaded. None given: the shards'
    captions."""

    model: str = "ViT-B-16"
    """Image tower: ViT-B-16, ViT-L-14, ViT-L-16, emoji (a small ViT), ResNet-emoji, or Lite0-emoji."""
    lock_image: bool = False
    """Freeze the pretrained image trunk and train only the MLP behind it. For EfficientNet-Lite0 (--model Lite0-emoji).
    With --keep-in-memory its tokens are computed once, on whole images without crops."""
    image_size: int | None = None
    """Image side in pixels; None is the model's own."""
    hidden_dim: int | None = None
    """Hidden width of the MLP; None: as wide as the LLM, and at least 4096."""
    crop_scale: float = 0.9
    """Smallest share of the image's area in a training crop; no other augmentation."""
    keep_in_memory: bool = False
    """Decode a small corpus once, and augment whole batches. Off: decode every sample at every step."""
    distinct_captions: bool = False
    """With --keep-in-memory: no two images of a batch have the same captions, as far as an epoch allows."""
    text_width: int = 512
    """Width of the clip method's text transformer."""
    text_layers: int = 12
    """Number of layers of the clip method's text transformer."""
    max_length: int = 77
    """Tokens of a caption in the clip method, including start and end; longer captions are cut."""
    embed_dim: int = 512
    """Width of the clip method's joint embedding."""

    epochs: int = 32
    """Passes over the data."""
    batch_size: int = 3072
    """Images per step, over all processes together."""
    accumulate: int = 1
    """Micro-batches a step, to save memory. Gradients equal those of one batch; the towers' forward pass runs twice."""
    lr: float = 5e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "const", "const-cooldown"] = "cosine"
    """After warm-up: half a cosine to 0, constant, or constant with a linear decay to 0 in the last `cooldown`
    steps."""
    warmup: int = 2000
    """Steps of linear warm-up."""
    cooldown: int = 0
    """Steps of the decay, for const-cooldown."""
    weight_decay: float = 0.5
    """AdamW's decay of matrices and position embeddings; vectors, biases and norms have none."""
    beta1: float = 0.9
    """AdamW's beta1."""
    beta2: float = 0.95
    """AdamW's beta2."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    grad_checkpointing: bool = False
    """Compute the ViT's activations again in the backward pass, to save memory."""

    seed: int = 0
    """Seed of initial weights, shuffles, crops and facets."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 if the processor supports it. Logits and losses are always fp32."""
    workers: int = 4
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
    """Epochs between zero-shot evaluations on `eval_set`; 0: never during training."""
    eval_set: str = ""
    """Classification set for `eval_every`; for the flame method, flame.embed must have embedded its class names."""
    dry_run: bool = False
    """Print sizes, schedule and a memory estimate, and stop; needs no data."""

    def adamw(self) -> dict:
        """Keyword arguments of AdamW other than groups and lr."""
        return {"betas": (self.beta1, self.beta2), "eps": self.eps}


CC3M = Config(dataset_size=2_905_954, precision="fp16", grad_checkpointing=True)
YFCC15M = dataclasses.replace(CC3M, dataset_size=15_061_521)
SMALL = Config(
    logit_scale=20.0,
    logit_bias=-5.0,
    centre=True,
    model="emoji",
    image_size=64,
    hidden_dim=256,
    text_width=128,
    text_layers=1,
    embed_dim=128,
    epochs=12,
    batch_size=128,
    lr=3e-3,
    warmup=100,
    weight_decay=0.2,
    workers=0,
    save_every=200,
)
EMOJI = dataclasses.replace(
    SMALL,
    data="data/emoji/train",
    bank="data/flame/bank",
    captions=tuple(f"data/flame/captions/{kind}.json" for kind in ("raw", "short", "long")),
    image_size=None,
    eval_every=3,
    eval_set=EVAL + "bare_names_ood",
)
KNOWN = dataclasses.replace(EMOJI, data="data/flame/known/train", eval_every=0)  # without the new names
SIZES = {EMOJI.data: 8_913, KNOWN.data: 7_146}  # samples, for a dry run without these data
RESNET = dataclasses.replace(
    KNOWN, model="ResNet-emoji", keep_in_memory=True, distinct_captions=True, hidden_dim=512, crop_scale=0.7, epochs=30,
    batch_size=512,
)  # fmt: skip
LITE0 = dataclasses.replace(
    KNOWN, model="Lite0-emoji", lock_image=True, keep_in_memory=True, distinct_captions=True, hidden_dim=512, epochs=20,
    batch_size=256, lr=2e-3,
)  # fmt: skip


def _preset(about: str, base: Config, **settings) -> tuple[str, Config]:
    """A preset: what it is, and `base` with other `settings`."""
    return about, dataclasses.replace(base, **settings)


PRESETS = {
    "small": ("small FLAME on your own --data, with the --bank made from it", SMALL),
    "small-clip": _preset(
        "baseline of `small`: a trained text encoder, --data's captions", SMALL, method="clip", lr=1e-3
    ),
    "emoji": ("FLAME on the embedded corpus, minutes on two CPU cores", EMOJI),
    "emoji-clip": _preset(
        "baseline of `emoji`: a trained text encoder, same captions, images and steps",
        EMOJI,
        method="clip",
        lr=1e-3,
    ),
    "emoji-resnet": ("FLAME with a small ResNet from scratch", RESNET),
    "emoji-resnet-clip": _preset("baseline of `emoji-resnet`: a trained text encoder", RESNET, method="clip"),
    "emoji-lite0": ("FLAME on a locked EfficientNet-Lite0", LITE0),
    "emoji-lite0-clip": _preset("baseline of `emoji-lite0`: a trained text encoder", LITE0, method="clip"),
    "cc3m-vitb16": ("FLAME, ViT-B/16, CC3M: +4.9 ImageNet over the previous best", CC3M),
    "cc3m-vitb16-nce": _preset("FLAME with InfoNCE over several positives", CC3M, loss="mp-nce", logit_scale=1 / 0.07),
    "cc3m-vitb16-raw": _preset("FLAME with raw captions, one facet", CC3M, facet_ids=(0,), facets=1),
    "cc3m-vitb16-summary": _preset("FLAME with three captions, one facet each", CC3M, facet_ids=(0, 1, 4), facets=3),
    "cc3m-vitb16-clip": _preset("CLIP with a trained text encoder", CC3M, method="clip", weight_decay=0.2),
    "cc3m-vitl14": _preset("FLAME, ViT-L/14 (a released config)", CC3M, model="ViT-L-14"),
    "cc3m-vitl16": _preset("FLAME, ViT-L/16", CC3M, model="ViT-L-16"),
    "yfcc15m-vitb16": ("FLAME, ViT-B/16, YFCC15M: R@1 84.0 / 87.9 on Urban-1k", YFCC15M),
    "yfcc15m-vitb16-clip": _preset("CLIP with a trained text encoder", YFCC15M, method="clip", weight_decay=0.2),
    "yfcc15m-vitl14": _preset("FLAME, ViT-L/14, YFCC15M", YFCC15M, model="ViT-L-14"),
    "yfcc15m-vitl16": _preset("FLAME, ViT-L/16, YFCC15M", YFCC15M, model="ViT-L-16"),
}


def check(cfg: Config, world_size: int) -> None:
    """Raise ValueError on invalid settings before work starts."""
    cli.check_counts(cfg, "epochs", "batch_size", "facets", "save_every", "log_every", "dataset_size", "image_size")
    cli.check_counts(cfg, "hidden_dim", "text_width", "text_layers", "embed_dim")
    cli.check_counts(cfg, "max_length", least=3)  # start, a token, end
    cli.check_counts(cfg, "warmup", "cooldown", "eval_every", "keep_every", "workers", "window_shards", least=0)
    cli.check_rates(cfg, "lr", "weight_decay")
    cli.check_positive(cfg, "lr")
    cli.check_finite(cfg, "logit_bias")
    cli.check_adam(cfg)
    cli.check_batch(cfg, world_size)
    if cfg.model not in TOWERS:
        raise UserError(f"--model is one of {', '.join(TOWERS)}, not {cfg.model!r}")
    if cfg.lock_image and cfg.model != "Lite0-emoji":
        raise UserError(f"--lock-image has weights of EfficientNet-Lite0 only: --model Lite0-emoji, not {cfg.model}")
    cli.check_in_memory(cfg)
    if not 1 <= cfg.logit_scale <= 100:
        raise UserError(f"--logit-scale must be in 1..100, its range during training, not {cfg.logit_scale}")
    if not 0 < cfg.crop_scale <= 1:
        raise UserError(f"--crop-scale must be above 0 and at most 1, not {cfg.crop_scale}")
    if len(set(cfg.facet_ids)) < len(cfg.facet_ids) or min(cfg.facet_ids, default=0) < 0:
        raise UserError(f"--facet-ids {' '.join(map(str, cfg.facet_ids))} should be different numbers from 0 on")
    if cfg.facet_ids and cfg.facets > len(cfg.facet_ids):
        raise UserError(f"--facets {cfg.facets} cannot be drawn from {len(cfg.facet_ids)} --facet-ids")
    if (cfg.cooldown > 0) != (cfg.schedule == "const-cooldown"):
        raise UserError("--cooldown and --schedule const-cooldown must be passed together")


def check_inputs(cfg: Config) -> None:
    """UserError if --data or --bank is not given, or the evaluation set is missing. A dry run needs none of them."""
    cli.check_data(cfg, "cc3m/{0000..0575}.tar")
    if cfg.method == "flame" and not cfg.bank:
        raise UserError("--bank is missing: it takes the folder that 'python -m flame.embed' makes from --data")


URBAN = "Urban-1k R@1 (I2T/T2I) "
COMMAND = "Training.md of the authors, with {}; no number was read"
LEFT_OUT = {  # rows of the paper's tables without a preset, and why
    "ablations": "the paper's body could not be read, and no setting is published",
    "linear probe and few-shot tables": "evaluations of the same runs: `flame.eval --probe`, `--few-shot`",
    "COCO, Flickr30k, ImageNet of YFCC15M": "evaluations of the same runs: `flame.eval --sets`",
    "words of image patches": "a function, `nearest_tokens` of flame/incontext.py; no command prints the words",
    "multilingual ImageNet, Winoground, SugarCrepe": "evaluations: `flame.eval --multilingual`, `--compositional`",
    "long-context figure, Long-CLIP, CC3M and YFCC15M, each with S4V": "another paper's method",
    "long-context and multilingual figures, CLIP of WIT-400M and mSigLIP": "released models of others",
}
PAPER_ROWS = {
    "train": {
        **dict.fromkeys(("small", "small-clip"), OWN),
        **dict.fromkeys(("emoji", "emoji-clip", "emoji-resnet", "emoji-resnet-clip"), EMBEDDED),
        **dict.fromkeys(("emoji-lite0", "emoji-lite0-clip"), EMBEDDED),
        "cc3m-vitb16": Row(
            "long-context figure, FLAME, CC3M", "CC3M", "8", f"{URBAN}65.3/66.6 %; ImageNet +4.9 (abstract)"
        ),
        "cc3m-vitb16-nce": Row(COMMAND.format("its option --mp-nce"), "CC3M", "8"),
        "cc3m-vitb16-raw": Row("ours: control of captions and facets", "CC3M", "8", "none: no table was read"),
        "cc3m-vitb16-summary": Row("ours: control of the facets", "CC3M", "8", "none: no table was read"),
        "cc3m-vitb16-clip": Row("long-context figure, CLIP, CC3M", "CC3M", number=f"{URBAN}10.7/9.6 %"),
        "cc3m-vitl14": Row(COMMAND.format("the released config of ViT-L/14"), "CC3M", "8"),
        "cc3m-vitl16": Row("ours: ViT-L/16", "CC3M", "8", "none: no table was read"),
        "yfcc15m-vitb16": Row(
            "long-context and multilingual figures, FLAME", "YFCC15M",
            number=f"{URBAN}84.0/87.9 %; Crossmodal-3600, 36 languages, R@1 (I2T/T2I) 51.72/49.00 %",
        ),
        "yfcc15m-vitb16-clip": Row("long-context figure, CLIP, YFCC15M", "YFCC15M", number=f"{URBAN}30.4/23.6 %"),
        "yfcc15m-vitl14": Row("the released config of ViT-L/14; no number was read", "YFCC15M"),
        "yfcc15m-vitl16": Row("ours: ViT-L/16", "YFCC15M", number="none: no table was read"),
    },
    "embed": {
        "small": OWN,
        "emoji": EMBEDDED,
        "cc3m-mistral-nemo": Row("bank of CC3M", "CC3M"),
        "yfcc15m-mistral-nemo": Row("bank of YFCC15M", "YFCC15M"),
    },
}  # fmt: skip
