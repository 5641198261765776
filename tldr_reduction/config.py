"""TL;DR's settings, presets and recipes.

TL;DR (arXiv 2305.20087); authors' code showlab/datacentric.vlp@a488102, BLIP's salesforce/BLIP@056a169. train.py has a
class of settings for each stage; reduce.py has `ReduceConfig`.
"""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shared import checkpoints
from shared.errors import UserError
from shared.settings import Count, Rate, RunConfig, Share, Whole, check_limits

# -------------------------------------------------------------------------------------------------------- training runs


@dataclass
class Common(RunConfig):
    """Settings of all stages."""

    stage: Annotated[str, tyro.conf.Suppress] = ""
    """Which of the models is trained: captioner, finetune, retrieval, blip or clip."""
    image_root: str | None = None
    """Folder that the image paths of an annotation .json start from; None: the folder of that file."""
    vocab: str = "bert-base-uncased"
    """WordPiece vocabulary: a vocab.txt, or the name of a tokenizer on the Hugging Face hub."""
    init: str | None = None
    """Run folder or checkpoint to start from: ours, the authors' or BLIP's."""

    image_size: Count = 224
    """Image side S in pixels."""
    patch_size: Count = 16
    """Patch side in pixels."""
    width: Count = 768
    """Width D of the image tower."""
    layers: Count = 12
    """Layers of the image tower."""
    heads: Count = 12
    """Attention heads of the image tower."""
    text_width: Count = 768
    """Width C of the text tower."""
    text_layers: Count = 12
    """Layers of the text tower."""
    text_heads: Count = 12
    """Attention heads of the text tower."""
    max_positions: Count = 512
    """Number of learned text positions."""
    dropout: Share = 0.1
    """Dropout of the text tower."""
    max_length: Count = 30
    """Maximum number of tokens of a caption in training, after the cut to 30 words; the rest is cut."""

    epochs: Count = 20
    """Passes over the data."""
    batch_size: Count = 1260
    """Pairs per step, over all processes together."""
    lr: Rate = 3e-4
    """Peak learning rate."""
    min_lr: Rate = 1e-6
    """Floor of the learning rate."""
    weight_decay: Rate = 0.05
    """AdamW's weight decay of all parameters, including biases, norms, positions and the codebook."""
    crop_scale: Share = 0.2
    """Smallest share of the image's area in a training crop."""
    flip: bool = True
    """Random horizontal flips."""
    augment: bool = True
    """BLIP's RandAugment."""

    def check(self, world_size: int) -> None:
        super().check(world_size)
        if self.image_size % self.patch_size:
            raise UserError(f"--image-size {self.image_size} is no multiple of --patch-size {self.patch_size}")
        for width, heads, what in ((self.width, self.heads, ""), (self.text_width, self.text_heads, "text-")):
            if width % heads:
                raise UserError(f"--{what}width {width} is no multiple of --{what}heads {heads}")
        if not 2 <= self.max_length <= self.max_positions:
            raise UserError(f"--max-length {self.max_length} is not in 2..{self.max_positions} (--max-positions)")
        if self.crop_scale == 0:
            raise UserError("--crop-scale must be above 0")
        if self.accumulate > 1 and self.stage != "clip":
            raise UserError(
                "--accumulate is for clip presets: the other losses need more of a pair than its features; "
                "--grad-checkpointing saves memory, too"
            )
        if self.stage in ("blip", "retrieval") and self.queue_size < self.batch_size:
            raise UserError(f"--queue-size {self.queue_size} is smaller than --batch-size {self.batch_size}")
        if self.init and not self.dry_run and not Path(self.init).exists():
            raise UserError(f"--init {self.init} does not exist")
        if self.stage in ("finetune", "retrieval") and not self.init and not self.dry_run:
            what = "a captioner" if self.stage == "finetune" else "a blip"
            raise UserError(f"--init is missing: {self.stage} starts from the run folder or checkpoint of {what}")


@dataclass
class Warm(Common):
    """Settings of the stages that start from DeiT and BERT, with a warm-up and a factor per epoch."""

    vision_init: str | None = None
    """timm model whose weights the image tower starts from."""
    text_init: str | None = None
    """BERT on the Hugging Face hub that the text tower starts from."""
    warmup: Whole = 3000
    """Steps of linear warm-up from 1e-6; it ends with epoch 0, even if unfinished."""
    lr_decay_rate: Rate = 0.85
    """Factor of the learning rate per epoch."""


@dataclass
class CaptionerConfig(Warm):
    """The codebook captioner."""

    stage: Annotated[str, tyro.conf.Suppress] = "captioner"
    num_codes: Count = 1024
    """Codes K."""
    code_dim: Count = 768
    """Code dimension c; a token of width D becomes D/c codes."""
    beta: Rate = 0.25
    """Weight of the codebook term (legacy) or of the commitment term."""
    legacy: bool = True
    """beta weights the codebook term, as upstream. Off: it weights the commitment term, as in VQ-VAE's paper."""
    codebook_init: Literal["uniform", "xavier", "keywords", "data"] = "uniform"
    """uniform: U(-1/K, 1/K) (upstream). xavier: Xavier's (the paper's ablation). keywords: embeddings of the K most
    frequent keywords (paper), moved to the tokens' mean and scaled by one factor. data: tokens of images."""
    keywords: str | None = None
    """Text file of K keywords, one per line, instead of the captions' most frequent (paper: object tags)."""
    restart_codes: bool = False
    """Replace codes not used in an epoch by random tokens, against collapse; not upstream."""

    def check(self, world_size: int) -> None:
        super().check(world_size)
        if self.width % self.code_dim:
            raise UserError(f"--width {self.width} cannot be cut into codes of --code-dim {self.code_dim}")
        if self.stream and self.codebook_init in ("data", "keywords"):
            raise UserError(f"--codebook-init {self.codebook_init} reads chosen samples, which --stream cannot")
        if self.keywords is not None and self.codebook_init == "keywords" and not self.dry_run:
            if not Path(self.keywords).is_file():
                raise UserError(f"--keywords {self.keywords} does not exist: a text file with one keyword a line")
            if (lines := len(read_lines(self.keywords, "--keywords"))) < self.num_codes:
                raise UserError(
                    f"--keywords {self.keywords} holds {lines} keywords, fewer than --num-codes {self.num_codes}"
                )


@dataclass
class FinetuneConfig(Common):
    """Fine-tuning of the captioner, without its codebook, on clean captions."""

    stage: Annotated[str, tyro.conf.Suppress] = "finetune"


@dataclass
class RetrievalConfig(Common):
    """Fine-tuning of a BLIP for retrieval."""

    stage: Annotated[str, tyro.conf.Suppress] = "retrieval"
    embed_dim: Count = 256
    """Width E of BLIP's contrastive embedding."""
    queue_size: Count = 57600
    """Keys in BLIP's queues."""


@dataclass
class Config(Warm):
    """Pre-training of a BLIP or CLIP on the full or the reduced data."""

    stage: Annotated[Literal["blip", "clip"], tyro.conf.Suppress] = "blip"
    clip_model: str = "ViT-B-16"
    """Any open_clip config with a plain text tower, for a clip, which starts from random weights."""
    steps: Count | None = None
    """Number of training steps, in place of --epochs; the last epoch may end early. The learning rate then falls by the
    same total factor as with --epochs and --lr-decay-rate, and warms up for one epoch at most."""
    embed_dim: Count = 256
    """Width E of BLIP's contrastive embedding."""
    queue_size: Count = 57600
    """Keys in BLIP's queues."""


STAGES = {  # class of the settings of a stage
    "captioner": CaptionerConfig,
    "finetune": FinetuneConfig,
    "retrieval": RetrievalConfig,
    "blip": Config,
    "clip": Config,
}


def for_steps(cfg: Common, per_epoch: int) -> Common:
    """Settings with the epochs, decay and warm-up of a run of `cfg.steps` steps, `per_epoch` an epoch.

    `epochs` includes the last epoch, which may end early. Without `steps`, `cfg` is returned unchanged.
    """
    if not isinstance(cfg, Config) or cfg.steps is None or not per_epoch:
        return cfg
    epochs = -(-cfg.steps // per_epoch)
    decay = cfg.lr_decay_rate ** (cfg.epochs * per_epoch / cfg.steps)
    return replace(cfg, epochs=epochs, lr_decay_rate=decay, warmup=min(cfg.warmup, per_epoch))


def total_steps(cfg: Common, per_epoch: int) -> int:
    """Steps of a run with `per_epoch` steps an epoch."""
    return getattr(cfg, "steps", None) or cfg.epochs * per_epoch


def read_lines(path: str | Path, what: str) -> list[str]:
    """Lines of a text file. UserError that names the file, as `what`, if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text") from error


# -------------------------------------------------------------------------------------------------------------- presets

SETS = {  # pairs in the data set and in its reduction (the authors' readme.md; CC3M as their annotation files have it)
    "cc3m": (2_690_757, 672_689, 224),
    "cc12m": (10_800_000, 2_400_000, 224),
    "yfcc15m": (14_900_000, 2_500_000, 224),
    "laion40m": (40_000_000, 8_040_000, 128),
}
PRETRAINED = dict(vision_init="deit_base_patch16_224", text_init="bert-base-uncased", seed=42)
CAPTIONER = CaptionerConfig(batch_size=2400, lr_decay_rate=0.9, **PRETRAINED)
K3000 = replace(CAPTIONER, num_codes=3000, lr_decay_rate=0.85)
FINETUNE = FinetuneConfig(
    image_size=384, epochs=5, batch_size=256, lr=1e-5, min_lr=0.0, max_length=40, crop_scale=0.5, seed=42
)
RETRIEVAL = RetrievalConfig(
    image_size=384, epochs=6, batch_size=256, lr=1e-5, min_lr=0.0, max_length=35, crop_scale=0.5,
    grad_checkpointing=True, seed=42,
)  # fmt: skip
BLIP = Config(**PRETRAINED)
CLIP = Config(stage="clip")
SMALL = dict(
    image_size=64, width=128, layers=4, heads=4, text_width=128, text_layers=2, text_heads=4,
    max_positions=40, dropout=0.0, batch_size=64, lr=1e-3, min_lr=1e-5, crop_scale=0.8, flip=False, augment=False,
    workers=0, save_every=100, log_every=20,
)  # fmt: skip
SMALL_VLP = dict(epochs=7, lr_decay_rate=0.6, warmup=15, embed_dim=128, queue_size=256, **SMALL | {"batch_size": 128})
TUNED = "BLIP fine-tuned on COCO, TR/IR@1 {} %"  # of the whole method with this setting
ZERO_SHOT = "zero-shot TR/IR@1 COCO {}, Flickr30K {} %"
OTHER = "ImageNet zero-shot {}; Flickr30K TR/IR@1 {} % (fine-tuned or not is not said)"


def on(name: str, reduced: bool, base: Config, row: str) -> tuple[str, Config]:
    """A preset of pre-training on a data set of SETS."""
    pairs, size = SETS[name][reduced], SETS[name][2]
    what = f"{base.stage.upper()} on {'the reduction of ' * reduced}{name.upper()}, {pairs / 1e6:.2f}M pairs, {size} px"
    return f"{what}; {row}", replace(base, image_size=size)


PRESETS = {
    "small-captioner": (
        "ours: a small captioner on noisy pairs, your own --data",
        CaptionerConfig(
            code_dim=64, num_codes=256, legacy=False, beta=0.1, codebook_init="data", restart_codes=True, epochs=30,
            lr_decay_rate=0.94, warmup=200, **SMALL | {"lr": 1.5e-3},
        ),
    ),
    "small-finetune": (
        "ours: a small captioner on clean pairs, your own --data; writes the refined captions",
        FinetuneConfig(epochs=12, **SMALL | {"lr": 5e-4, "min_lr": 0.0}),
    ),
    "small-scorer": (
        "ours: a small BLIP on clean pairs, your own --data; scores image-text matching",
        Config(epochs=14, lr_decay_rate=0.82, warmup=100, embed_dim=128, queue_size=256, **SMALL),
    ),
    "small-clip": (
        "ours: a small CLIP on all pairs, or on any reduction, your own --data",
        Config(stage="clip", clip_model="ViT-emoji-32", **SMALL_VLP),
    ),
    "small-blip": (
        "ours: a small BLIP on all pairs, or on any reduction, your own --data",
        Config(**SMALL_VLP | {"layers": 3, "text_layers": 1}),
    ),
    "captioner-released": ("the released config on CC3M: K=1024, uniform start, decay 0.9; 4 nodes of 8", CAPTIONER),
    "captioner-paper": (
        f"table 2c, keywords: K=3000, decay 0.85, CC3M; {TUNED.format('72.8/54.8')}",
        replace(K3000, codebook_init="keywords"),
    ),
    "captioner-xavier": (
        f"table 2c, xavier: K=3000, CC3M; {TUNED.format('72.0/54.1')}",
        replace(K3000, codebook_init="xavier"),
    ),
    "captioner-tags": (
        f"table 2c, 1600 object tags of Visual Genome (--keywords FILE), CC3M; {TUNED.format('72.5/54.4')}",
        replace(K3000, num_codes=1600, codebook_init="keywords", keywords="tags.txt"),
    ),
    "finetune-coco": ("BLIP's captioning of COCO, 567k captions, 384 px; 8 GPUs", FINETUNE),
    "finetune-coco-vg": (
        "sec. 3.1, COCO and Visual Genome: --data 'coco/{00000..00059}.tar::vg/{00000..00099}.tar'",
        FINETUNE,
    ),
    "retrieval-coco": (
        "table 3, BLIP fine-tuned on COCO: TR/IR@1 70.9/54.3 % from all of CC3M, 72.8/54.8 % from TL;DR's; 8 A100",
        RETRIEVAL,
    ),
    "retrieval-flickr": (
        "table 3, BLIP fine-tuned on Flickr30K: TR/IR@1 86.3/74.8 % from all of CC3M, 87.5/75.7 % from TL;DR's",
        RETRIEVAL,
    ),
    "blip-cc3m": on("cc3m", False, BLIP, "table 3, " + ZERO_SHOT.format("42.3/31.5", "75.1/60.6")),
    "blip-cc3m-tldr": on("cc3m", True, BLIP, "table 3, " + ZERO_SHOT.format("48.7/36.7", "76.3/61.0")),
    "clip-cc3m": on(
        "cc3m", False, CLIP, f"table 3, {ZERO_SHOT.format('36.2/29.9', '67.4/54.3')} from ImageNet and BERT"
    ),
    "clip-cc3m-tldr": on(
        "cc3m", True, CLIP, f"table 3, {ZERO_SHOT.format('37.7/30.7', '68.5/55.6')} from ImageNet and BERT"
    ),
    "blip-cc12m": on("cc12m", False, BLIP, "table 8, " + OTHER.format(65.3, "84.7/75.3")),
    "blip-cc12m-tldr": on("cc12m", True, BLIP, "table 8, " + OTHER.format(63.8, "85.5/76.3")),
    "blip-yfcc15m": on("yfcc15m", False, BLIP, "table 8, " + OTHER.format(67.8, "81.5/72.4")),
    "blip-yfcc15m-tldr": on("yfcc15m", True, BLIP, "table 8, " + OTHER.format(67.3, "82.3/74.3")),
    "blip-laion40m": on("laion40m", False, BLIP, "table 8, " + OTHER.format(71.3, "83.2/74.9")),
    "blip-laion40m-tldr": on("laion40m", True, BLIP, "table 8, " + OTHER.format(70.4, "82.8/76.1")),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------- reductions

RECIPES = {  # name: (row of the paper, settings); flags override them
    "paper": (
        f"table 3, TL;DR of CC3M, 2.82M -> 0.67M pairs; {TUNED.format('72.8/54.8')}",
        dict(keep=0.25, clusters=3000),
    ),
    "release_comment": (
        'released script, its comment "select_5_10_half_itm_1K_clusters"',
        dict(keep=0.5, clusters=1000, itm_keep=0.5),
    ),
    "release_script": ("released script, its values", dict(keep=0.2, clusters=1000, itm_keep=0.5)),
    "cc12m": ("table 8, TL;DR of CC12M, 10.8M -> 2.4M pairs", dict(keep=0.22, clusters=3000)),
    "yfcc15m": ("table 8, TL;DR of YFCC15M, 14.9M -> 2.5M pairs", dict(keep=0.167, clusters=3000)),
    "laion40m": ("table 8, TL;DR of LAION-40M, 40M -> 8.04M pairs", dict(keep=0.2, clusters=3000)),
    **{
        f"ratio-{percent}": (f"table 2e, {percent} %; {TUNED.format(recall)}", dict(keep=percent / 100, clusters=3000))
        for percent, recall in ((10, "68.9/52.3"), (25, "72.8/54.8"), (50, "74.8/55.2"), (100, "75.1/57.7"))
    },
    **{
        f"clusters-{k}": (f"table 2f, {k:,} clusters; {TUNED.format(recall)}", dict(keep=0.25, clusters=k))
        for k, recall in (
            (100, "71.8/53.9"), (1000, "72.4/54.5"), (3000, "72.8/54.8"), (5000, "72.9/54.4"), (10000, "72.3/54.2"),
        )
    },
}  # fmt: skip


@dataclass
class ReduceConfig:
    """Reduce image-text data: select samples, refine their captions, and write shards and reports."""

    data: Annotated[str, tyro.conf.Positional]
    """Shards 'cc3m/{00000..00331}.tar', a folder of them, or an annotation .json."""
    out: str
    """Folder for the result; an interrupted reduction resumes there."""
    recipe: str = "paper"
    """Values for keep, clusters and itm_keep if these are not given: paper (CC3M), release_comment, release_script,
    cc12m, yfcc15m, laion40m, ratio-{10,25,50,100}, clusters-{100,1000,3000,5000,10000}."""
    keep: Share | None = None
    """Share to keep of each cluster, or of all samples."""
    clusters: Count | None = None
    """Clusters k. None: the recipe's number, but at most one per 30 samples."""
    itm_keep: Share | None = None
    """Of the selected samples, keep only those that are in this top share of all samples by score (of --scorer)."""
    select: Literal["stride", "farthest", "random", "first", "itm", "all"] = "stride"
    """By clusters: stride, every n-th member (paper); farthest from the centroid. Without clusters: random; first, the
    first samples of the file; itm, those with the highest scores; all."""
    features: Literal["codes", "image", "blip", "text"] = "codes"
    """What is clustered. codes: code vectors. image: continuous features of the captioner or encoder. blip, text: the
    scorer's contrastive embeddings of images or of captions."""
    captions: Literal["original", "refined", "generated"] | None = None
    """original: T_o, the data's captions. refined: "T_o; T_g", where T_g is a generated caption. generated: T_g. None:
    refined if --caption-model or --predictions is given, else original."""
    start: Literal["seed", "first"] = "seed"
    """Where the stride of a cluster starts: at a member drawn by --seed, or at the first in the file, as upstream,
    which favours the beginning of the file."""
    drop_duplicates: bool = True
    """Of identical images, selection by clusters can keep only the first; other images fill up --keep. Off: copies are
    ordinary members of clusters, as upstream."""
    captioner: str | None = None
    """Run folder of a captioner, whose codes are clustered. None: the codes of --encoder are clustered."""
    encoder: str = "efficientnet_lite0"
    """Pretrained image encoder whose tokens are quantised if there is no --captioner: efficientnet_lite0, timm:NAME,
    MODEL@TAG of open_clip, another paper's run folder, local-dir:DIR written by --export."""
    check: bool = True
    """Compare the selection with a random one on thumbnails, on captions and, unless it made the clusters, on features
    of EfficientNet-Lite0."""
    caption_model: str | None = None
    """Model that writes T_g: a run folder of a fine-tuned captioner, or transformers' BLIP, a folder or a name on the
    Hugging Face hub (Salesforce/blip-image-captioning-base)."""
    predictions: str | None = None
    """T_g of any captioner instead of --caption-model: a JSON list of {"image_id", "caption"}, where image_id is a
    sample's key, or its row number as in the authors' files. A sample without an entry keeps its caption."""
    scorer: str | None = None
    """Model that scores image-text matching: a run folder of a BLIP, or transformers' BLIP
    (Salesforce/blip-itm-base-coco). A dual encoder scores by its cosine: a run folder of any paper, local-dir:DIR
    written by --export, MODEL@TAG of open_clip."""
    match: str | None = None
    """For random, first, itm: keep as many samples as the reduction in this folder; overrides --keep."""
    image_root: str | None = None
    """Folder that the image paths of an annotation .json start from."""
    extract_images: bool = False
    """Also write the kept images of shards as the files that annotation.json names, for stock BLIP with --out as its
    image_root."""
    work: str | None = None
    """Folder for code vectors, scores and generated captions; reductions of the same data may share it. None: work/ in
    --out."""
    cache: str = "data/cache"
    """Folder for copies of remote shards, and for the index of large data."""
    seed: Whole = 0
    """Seed of k-means, of the members where strides start, and of random selection."""
    batch_size: Count = 256
    """Images per forward pass."""
    workers: Whole = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Autocast of the forward passes; codes are comparable only within one precision."""
    strict: bool = False
    """Stop at the first broken sample instead of leaving it out."""
    dry_run: bool = False
    """Print what would be kept and the resources needed, and stop; without data, for the recipe's data set."""

    @property
    def coded_by(self) -> str | None:
        """The encoder whose codes or features are clustered, or None."""
        return self.encoder if self.clustered and not self.captioner and self.features in ("codes", "image") else None

    @property
    def clustered(self) -> bool:
        """Whether samples are selected by clusters."""
        return self.select in ("stride", "farthest")


def complete(cfg: ReduceConfig, n: int) -> ReduceConfig:
    """The settings of a reduction of n samples, completed by the recipe. UserError on invalid settings."""
    check_limits(cfg)
    if cfg.recipe not in RECIPES:
        raise UserError(f"--recipe {cfg.recipe} is none of {', '.join(RECIPES)}")
    _, recipe = RECIPES[cfg.recipe]
    clusters = cfg.clusters or max(1, min(recipe["clusters"], n // 30))
    keep = recipe["keep"] if cfg.keep is None else cfg.keep
    itm_keep = recipe.get("itm_keep") if cfg.itm_keep is None else cfg.itm_keep
    written = cfg.caption_model or cfg.predictions
    captions = cfg.captions or ("refined" if written else "original")
    if clusters > n:
        raise UserError(f"--clusters {clusters} is more than the {n} samples")
    if cfg.caption_model and cfg.predictions:
        raise UserError("--caption-model and --predictions are two captioners: choose one")
    if captions != "original" and not written:
        raise UserError(
            f"--captions {captions} needs --caption-model, a run folder of a fine-tuned captioner or transformers' "
            "BLIP, or --predictions, a file of captions"
        )
    if (itm_keep is not None or cfg.select == "itm" or cfg.features in ("blip", "text")) and not cfg.scorer:
        raise UserError("ITM scores, blip and text features need --scorer, a run, transformers' BLIP or a dual encoder")
    for name, folder in (("out", cfg.out), ("work", cfg.work)):
        if folder and Path(folder).exists() and not Path(folder).is_dir():
            raise UserError(f"--{name} {folder} is a file: name a folder")
    if Path(cfg.data).resolve() in (Path(cfg.out).resolve(), Path(cfg.out, "annotation.json").resolve()):
        raise UserError(f"--out {cfg.out} is the folder of the data: choose another")
    if cfg.extract_images and cfg.data.endswith(".json"):
        raise UserError(f"--extract-images is for shards: the images of {cfg.data} are files already")
    if cfg.match and not 0 < kept_by(cfg.match) <= n:
        raise UserError(f"--match {cfg.match} kept {kept_by(cfg.match):,} samples, but {cfg.data} has only {n:,}")
    if cfg.match and (cfg.select not in ("random", "first", "itm") or itm_keep is not None):
        raise UserError("--match goes with --select random, first or itm, and without an ITM filter")
    return dataclasses.replace(cfg, clusters=clusters, keep=keep, itm_keep=itm_keep, captions=captions)


def kept_by(folder: str) -> int:
    """Samples that a finished reduction kept."""
    path = Path(folder) / "report.json"
    kept = checkpoints.read_json(path).get("kept") if path.is_file() else None
    if kept is None:
        raise UserError(f"--match {folder} holds no report.json of a finished reduction")
    return kept


SCRIPTS = {"train": PRESETS, "reduce --recipe": RECIPES}
