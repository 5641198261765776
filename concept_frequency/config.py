"""Settings of the controlled experiment and of the count, their presets, and the paper's models and corpora.

The authors train nothing: their models and pretraining sets are the tables at the end. The experiment is ours: it tests
whether accuracy follows frequency when frequency is *assigned*, on the embedded corpus.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from concept_frequency.published.numbers import CURVE_MODELS, DERIVED, PRINTED, TABLE9
from shared import cli
from shared.errors import UserError
from shared.presets import EMBEDDED, OWN, Row

# ------------------------------------------------------------------------------------------- the controlled experiment


@dataclasses.dataclass
class Config:
    """One arm: a corpus with chosen concept frequencies, and a small CLIP trained on it."""

    out: str = "runs/concept_frequency/run"
    """Run folder: config.json, pairs.parquet, metrics.jsonl, tensorboard/, checkpoint.pt. With a checkpoint in it, the
    run resumes."""
    data: str = ""
    """Shards in img2dataset layout whose .json names each image's concept ("name") and other words for it ("tags")."""
    eval_set: str = ""
    """Classification set with the concepts' names among its classes; its images are never trained on."""
    groups: tuple[str, ...] = ("animals-nature", "food-drink", "travel-places", "objects", "activities")
    """Only concepts of these groups ("group" in .json); none given: all groups."""
    num_concepts: int | None = 400
    """Concepts K, drawn with a fixed seed from those with an evaluation image; None: all of these."""
    total: int = 8_000
    """Pairs N of the corpus."""
    law: Literal["zipf", "log-uniform"] = "zipf"
    """zipf: frequencies are proportional to 1 / rank**exponent. log-uniform: their logarithms are evenly spaced."""
    exponent: float = 1.0
    """Exponent of --law zipf: 1 is Zipf's law, 0 makes all equal."""
    assignment: int = 0
    """Index of the random assignment of ranks to concepts, which also depends on the seed."""
    misaligned: float = 0.0
    """Share of pairs that get another pair's caption."""

    model: str = "ResNet-emoji"
    """Any open_clip config."""
    image_size: int | None = None
    """Image side in pixels; None is the model's own."""
    epochs: int = 7
    """Passes over the corpus."""
    batch_size: int = 128
    """Pairs per step, over all processes together."""
    accumulate: int = 1
    """Micro-batches a step, to save memory. Gradients equal those of one batch; the towers' forward pass runs twice.
    Batch norms (of a ResNet) normalise each micro-batch separately."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup: int = 64
    """Steps of linear warm-up, before half a cosine to 0."""
    weight_decay: float = 0.2
    """AdamW's decay of matrices; gains, biases and the temperature have none."""
    max_grad_norm: float = 1.0
    """Gradients of all parameters together are clipped to this norm."""

    seed: int = 0
    """Seed of assignment, pairs, initial weights, order and views."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 if the processor supports it. The loss is always fp32."""
    strict: bool = False
    """Stop at the first broken sample instead of counting and skipping it."""
    save_every: int = 200
    """Steps between checkpoints; there is one at the end, too."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Epochs between zero-shot evaluations; 0: never during training."""
    dry_run: bool = False
    """Print sizes, schedule and a memory estimate, and stop; needs no data."""

    def steps_per_epoch(self) -> int:
        """Number of full batches in an epoch; the short last batch is left out."""
        return self.total // self.batch_size


SMALL = Config(groups=(), num_concepts=None, epochs=24, batch_size=256, lr=3e-3, warmup=46)
EMOJI = dataclasses.replace(
    SMALL,
    data="data/emoji/train",
    eval_set="data/emoji/eval/names_ood",
    groups=Config.groups,
    num_concepts=400,
)
PRESETS = {
    "small": ("Zipf frequencies over the classes of your own --data and --eval-set, small", SMALL),
    "emoji": ("Zipf frequencies over 400 emoji", EMOJI),
    "emoji-uniform": (
        "the same concepts and number of pairs, all equally frequent",
        dataclasses.replace(EMOJI, exponent=0.0),
    ),
    "emoji-log-uniform": (
        "the same, frequencies evenly spread over their logarithm",
        dataclasses.replace(EMOJI, law="log-uniform"),
    ),
    "emoji-reassigned": ("Zipf again, ranks given to other concepts", dataclasses.replace(EMOJI, assignment=1)),
    "shards": (
        "the experiment on shards of your own, with concepts named in their .json",
        Config(
            groups=(),
            total=1_000_000,
            model="ViT-B-32",
            epochs=32,
            batch_size=1024,
            lr=5e-4,
            warmup=2_000,
            max_grad_norm=1e9,
        ),
    ),
}


def check(cfg: Config, world_size: int) -> None:
    """Raise ValueError on invalid settings before work starts."""
    if not cfg.data:
        raise UserError(
            "--data is missing: it takes image-text shards in img2dataset layout whose .json has the fields name and "
            "tags, e.g. --data 'data/emoji/train'; 'python -m shared.pack classes' makes them of your own "
            "pictures"
        )
    cli.check_embedded(cfg.data)
    if not cfg.eval_set:
        raise UserError("--eval-set is missing: it takes a classification set in the CLIP-benchmark layout")
    if not Path(cfg.eval_set).is_dir():
        raise UserError(f"--eval-set {cfg.eval_set} does not exist: name a folder in the CLIP-benchmark layout")
    check_sizes(cfg, world_size)


def check_sizes(cfg: Config, world_size: int) -> None:
    """Raise ValueError on settings that need no data to be checked, as in a dry run."""
    cli.check_counts(cfg, "num_concepts", "total", "epochs", "batch_size", "save_every", "log_every", "image_size")
    cli.check_counts(cfg, "warmup", "eval_every", least=0)
    cli.check_batch(cfg, world_size)
    if cfg.num_concepts and cfg.total < cfg.num_concepts:
        raise UserError(f"--total {cfg.total} pairs cannot hold each of --num-concepts {cfg.num_concepts}")
    if cfg.total < cfg.batch_size:
        raise UserError(f"--total {cfg.total} is less than one batch of {cfg.batch_size}")
    cli.check_rates(cfg, "lr", "weight_decay", "exponent")
    cli.check_positive(cfg, "max_grad_norm")
    if not 0 <= cfg.misaligned <= 1:
        raise UserError(f"--misaligned is a share of 0 to 1, not {cfg.misaligned}")
    if cfg.law != "zipf" and cfg.exponent != 1:
        raise UserError(f"--exponent belongs to --law zipf: leave it out with --law {cfg.law}")


# ------------------------------------------------------------------------------------------------------------ the count


@dataclasses.dataclass(frozen=True)
class CountConfig:
    """Settings of a count. The paper's are the defaults, and what a preset sets; `data` to `out`, `corrected`,
    `label_column`, `partition` and the settings after it are ours."""

    data: tuple[str, ...] = ()
    """Captions: .tar shards (img2dataset layout), .parquet, .tsv or .txt (one a line), folders of them, or URLs; braces
    {00000..00331} expand."""
    concepts: tuple[str, ...] = ()
    """Lists of concepts: folders with classnames.txt, .txt (one a line), .json. Each gets its own files of counts."""
    out: str = "runs/count"
    """Folder of the partitions and of the counts."""
    corpus: str = "corpus"
    """Name of the corpus in file names."""
    caption_column: str = "caption"
    """Column of the captions: a name in parquet, a number from 0 in tsv."""
    also: str = ""
    """A second column: rows without a caption or without a value in this column are dropped before rows are numbered
    (upstream: LAION's url). Empty: no row is dropped."""

    spacy: str = "en_core_web_lg"
    """Pipeline that tags captions; `python -m spacy download NAME` installs one."""
    query_spacy: str = "en_core_web_sm"
    """Pipeline that lemmatises the words of concepts, one by one."""
    lemmatize: bool = True
    """Lemmatise the words of concepts. --no-lemmatize: use them in lower case (upstream's method `lowercased`)."""
    corrected: bool = False
    """Search what the paper's text says. Otherwise, as upstream, proper nouns are never found (`Eagles`), only the last
    token of a word counts (`t-shirt` is searched as `shirt`), signs and accents are never found (`crème`), and words in
    no caption are ignored (`unicorn dog` counts as `dog`)."""

    label_column: str = ""
    """Parquet column with the concept in each image, instead of a tagger."""
    tagger: str = ""
    """Tagger of the images, for .tar shards: clip, ram++ or package.module:function. Empty: only captions are
    counted."""
    model: str = "ViT-B-16"
    """open_clip model: the CLIP tagger's, or the one that embeds RAM++'s descriptions."""
    pretrained: str = "openai"
    """The open_clip model's weights: open_clip's tag, or a file."""
    checkpoint: str = ""
    """RAM++'s weights."""
    descriptions: str = ""
    """Descriptions of the concepts: JSON {concept: texts}, or the authors' list of such dictionaries; empty: `a photo
    of a {c}.`"""
    threshold: float = 0.7
    """A concept is in an image if its probability exceeds this (compared in half precision, as upstream)."""
    images: tuple[str, ...] = ()
    """Image shards, if captions come from other files; `ids` then finds the caption row of an image."""
    ids: Literal["row", "cc3m", "cc12m", "yfcc15m", "synthci30m", "laion400m", "laion_aesthetics"] = "row"
    """row: image and caption are in one shard. Other values: see `sample_id`; captions are then numbered over all
    files."""
    keep: str = ""
    """Similarity control: .npy of the ids to keep; adds counts of only these images."""
    size: int | None = None
    """Size of the corpus for the misalignment degree; None: the number of captions counted."""

    partition: int = 100_000
    """Captions of a partition of a table; a worker needs about 2 KB for each, beside its spaCy pipeline. A tar is one
    partition."""
    part: str = ""
    """i/n, with i from 0: only index and tag every n-th partition from the i-th on, as one of n jobs that share --out.
    When all have ended, the same command without it adds up."""
    workers: int = 0
    """Processes on this machine; 0: one per core. With GPUs, one process per GPU tags images, and the others decode
    them."""
    strict: bool = False
    """Stop at the first broken sample instead of counting and skipping it."""

    def part_of(self) -> tuple[int, int]:
        """(i, n) of `part`. UserError unless it is two numbers with i below n."""
        number, slash, parts = self.part.partition("/")
        if not (slash and number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
            raise UserError(f"--part is i/n with i from 0 to n - 1, not {self.part!r}")
        return int(number), int(parts)


COUNT_PRESETS = {
    "shards": ("image-text shards in img2dataset layout", CountConfig()),
    "cc3m": ("CC-3M: tsv (caption, url)", CountConfig(corpus="cc3m", caption_column="0", size=3_318_333)),
    "cc12m": ("CC-12M: tsv (url, caption)", CountConfig(corpus="cc12m", caption_column="1", size=12_423_374)),
    "yfcc15m": ("YFCC-15M: tsv (url, caption)", CountConfig(corpus="yfcc15m", caption_column="1", size=14_825_236)),
    "laion400m": (
        "LAION-400M: parquet (caption, url)",
        CountConfig(corpus="laion400m", caption_column="caption", also="url", size=414_080_000),
    ),
    "laion2b": ("LAION-2B: parquet (TEXT, URL)", CountConfig(corpus="laion2b", caption_column="TEXT", also="URL")),
    "laion-aesthetics": ("LAION-Aesthetics shards", CountConfig(corpus="laion_aesthetics", size=161_100_000)),
    "synthci30m": ("SynthCI-30M shards", CountConfig(corpus="synthci30m")),
    "emoji": (
        "the embedded corpus, names of its evaluation set",
        CountConfig(
            data=("data/emoji/train",), concepts=("data/emoji/eval/names_ood",), corpus="emoji", spacy="en_core_web_sm"
        ),
    ),
}


def check_count(cfg: CountConfig) -> None:
    """Raise ValueError on invalid settings before work starts."""
    if not cfg.data:
        raise UserError(
            "--data is missing: it takes captions, e.g. --data 'cc3m/{00000..00331}.tar' or 'part-*.parquet'"
        )
    if not cfg.concepts:
        raise UserError("--concepts is missing: name lists of concepts (.txt, .json, or a folder with classnames.txt)")
    if cfg.partition < 1:
        raise UserError(f"--partition is at least 1 caption, not {cfg.partition}")
    if cfg.part:
        cfg.part_of()
    if not 0 <= cfg.threshold <= 1:
        raise UserError(f"--threshold is a probability, not {cfg.threshold}")
    if cfg.tagger and cfg.label_column:
        raise UserError("--tagger and --label-column exclude each other: pass only one")
    if cfg.keep and not cfg.tagger:
        raise UserError("--keep needs a --tagger")
    if cfg.images and not cfg.tagger:
        raise UserError("--images needs a --tagger")
    if cfg.also and cfg.ids in ("cc12m", "yfcc15m"):
        raise UserError(f"--also drops rows, but --ids {cfg.ids} numbers all rows: leave --also out")
    if bool(cfg.images) != (cfg.ids != "row"):
        raise UserError("pass --images (image shards) and --ids (how an image's row of the captions is found) together")


# ------------------------------------------------------------------------------------------ the paper's models and rows

# BACKBONE|CORPUS: open_clip's model and weights. If weights are empty, open_clip has none and the user names a file.
# Activations are those of the authors' evaluation, not always those of training (README, detail 24).
MODELS = {
    # the twelve of the curves
    "RN50|cc3m": ("RN50-quickgelu", ""),  # CyCLIP's checkpoint
    "RN50|cc12m": ("hf-hub:thaottn/OpenCLIP-resnet50-CC12M", "hf"),
    "RN50|yfcc15m": ("hf-hub:thaottn/OpenCLIP-resnet50-YFCC15M", "hf"),
    "RN101|yfcc15m": ("RN101", "yfcc15m"),
    "ViT-B-16|cc3m": ("ViT-B-16", ""),  # these four: SLIP's layout
    "ViT-B-16|cc12m": ("ViT-B-16", ""),
    "ViT-B-16|yfcc15m": ("ViT-B-16", ""),
    "ViT-B-16|synthci30m": ("ViT-B-16", ""),
    "ViT-B-32|laion400m": ("ViT-B-32", "laion400m_e32"),
    "ViT-B-16|laion400m": ("ViT-B-16", "laion400m_e32"),
    "ViT-L-14|laion400m": ("ViT-L-14", "laion400m_e32"),
    "ViT-B-32|laion200m_train_test_sim_normalized": ("ViT-B-32-quickgelu", ""),  # of Mayilvahanan et al.
    # the others of Let It Wag!
    "RN50|openai": ("RN50-quickgelu", "openai"),
    "RN101|openai": ("RN101-quickgelu", "openai"),
    "ViT-B-32|openai": ("ViT-B-32-quickgelu", "openai"),
    "ViT-B-16|openai": ("ViT-B-16-quickgelu", "openai"),
    "ViT-L-14|openai": ("ViT-L-14-quickgelu", "openai"),
    "ViT-B-32|laion2b": ("ViT-B-32", "laion2b_s34b_b79k"),
    "ViT-B-16|laion2b": ("ViT-B-16", "laion2b_s34b_b88k"),
    "ViT-L-14|laion2b": ("ViT-L-14", "laion2b_s32b_b82k"),
    "ViT-H-14|laion2b": ("ViT-H-14", "laion2b_s32b_b79k"),
    "ViT-g-14|laion2b": ("ViT-g-14", "laion2b_s34b_b88k"),
    "ViT-bigG-14|laion2b": ("ViT-bigG-14", "laion2b_s39b_b160k"),
    "ViT-B-32|datacomp": ("ViT-B-32", "datacomp_xl_s13b_b90k"),
    "ViT-B-16|datacomp": ("ViT-B-16", "datacomp_xl_s13b_b90k"),
    "ViT-L-14|datacomp": ("ViT-L-14", "datacomp_xl_s13b_b90k"),
    "ViT-B-32|commonpool": ("ViT-B-32", "commonpool_m_laion_s128m_b4k"),
    "ViT-B-16|commonpool": ("ViT-B-16", "commonpool_l_laion_s1b_b8k"),
    "ViT-L-14|commonpool": ("ViT-L-14", "commonpool_xl_laion_s13b_b90k"),
    "ViT-B-32|metaclip400m": ("ViT-B-32-quickgelu", "metaclip_400m"),
    "ViT-B-16|metaclip400m": ("ViT-B-16-quickgelu", "metaclip_400m"),
    "ViT-L-14|metaclip400m": ("ViT-L-14-quickgelu", "metaclip_400m"),
    "ViT-B-32|metaclip2.5b": ("ViT-B-32-quickgelu", "metaclip_fullcc"),
    "ViT-B-16|metaclip2.5b": ("ViT-B-16-quickgelu", "metaclip_fullcc"),
    "ViT-L-14|metaclip2.5b": ("ViT-L-14-quickgelu", "metaclip_fullcc"),
    "ViT-H-14|metaclip2.5b": ("ViT-H-14-quickgelu", "metaclip_fullcc"),
    "ViT-B-16|dfn": ("ViT-B-16", "dfn2b"),
    "ViT-H-14|dfn": ("ViT-H-14-quickgelu", "dfn5b"),
    "ViT-B-16|siglip": ("ViT-B-16-SigLIP", "webli"),
    "ViT-L-16|siglip": ("ViT-L-16-SigLIP-256", "webli"),
    "SO400M|siglip": ("ViT-SO400M-14-SigLIP", "webli"),
}

# Legends of figures 2 and 4: Pearson's r of log frequency and zero-shot accuracy with the bare class name
CURVES = dict(zip(CURVE_MODELS, PRINTED["classification", "integrated", "class"], strict=True)) | DERIVED
CURVES["ViT-B-32|laion200m_train_test_sim_normalized"] = PRINTED["classification", "image", "class"][-1]
CONTROLS = {  # corpora of figure 4: the control, and the data
    "synthci30m": ("synthetic data", "synthci30m"),
    "laion200m_train_test_sim_normalized": ("similarity control, image counts", "150M pairs of LAION"),
}
MISALIGNED = {"cc3m": 16.81, "cc12m": 17.25, "yfcc15m": 36.48, "laion400m": 5.31, "laion-aesthetics": 14.34}  # table 3
LEFT_OUT = {  # rows of the paper's tables without a preset, and why
    "tables 4 and 6, figures 3, 5, 6, 8 to 15, 17 to 19, 24, 25, 27": "no runs: `replay` reads the authors' files",
    "tables 7, 8 and 10, figures 7, 16, 21 to 23, 26, 28 to 31": "no data in the repository",
    "fig. 20, SLIP and CyCLIP": "no data in the repository; `measure` takes checkpoints of both",
    "table 2, text-to-image models": "no images are generated in this project; `replay` reads the authors' scores",
    "RAM++ with GPT-4's descriptions (examples in table 5)": "users supply both: `count --tagger ram++`",
}


def of_model(model: str) -> Row:
    """The figure with a model's curve, its row of table 9, and their numbers."""
    backbone, _, corpus = model.partition("|")
    control, data = CONTROLS.get(corpus, ("", corpus))
    sources, numbers = [], []
    if model in CURVES:
        sources.append(f"fig. 4 ({control})" if control else "fig. 2")
        numbers.append(f"r = {CURVES[model]}" + " (recomputed)" * (model in DERIVED))
    if model in TABLE9:
        sources.append("table 9")
        numbers.append("ImageNet {:.2f} %, Let It Wag! {:.2f} %".format(*TABLE9[model]))
    return Row(f"{' and '.join(sources)}, {backbone}, {data}", data, number="; ".join(numbers))


PAPER_ROWS = {
    "train": {"small": OWN}
    | dict.fromkeys(("emoji", "emoji-uniform", "emoji-log-uniform", "emoji-reassigned"), EMBEDDED)
    | {
        "shards": Row("ours: the experiment on other data", "any shards with concepts", number="none: not in the paper")
    },
    "count": {
        "shards": Row("the search, on other data", "any shards", number="none: not in the paper"),
        **{
            name: Row("table 3, " + name, name, number=f"misalignment degree {degree} %")
            for name, degree in MISALIGNED.items()
        },
        "laion2b": Row("the search", "laion2b"),
        "synthci30m": Row("synthetic pretraining data", "synthci30m"),
        "emoji": EMBEDDED,
    },
    "measure": {f"'{model}'": of_model(model) for model in MODELS},
}
