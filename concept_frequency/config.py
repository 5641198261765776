"""Settings of our experiment and of the count, their presets, and the paper's models.

The authors train nothing: their models and pretraining sets are the tables MODELS and COUNT_PRESETS. The experiment is
ours: it tests whether accuracy follows frequency when frequency is *assigned*, on the embedded corpus.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from concept_frequency.published.numbers import CURVE_MODELS, DERIVED, PRINTED, TABLE9
from shared.errors import UserError
from shared.settings import Count, Positive, Rate, RunConfig, Share, Whole, check_limits

# -------------------------------------------------------------------------------------- our experiment: all settings


@dataclass
class Config(RunConfig):
    """One arm: a corpus with chosen concept frequencies, and a small CLIP trained on it. No setting is the paper's."""

    data: str = ""
    """Shards in img2dataset layout whose .json names each image's concept ("name") and other words for it ("tags")."""
    eval_set: str = ""
    """Classification set with the concepts' names among its classes; its images are never trained on."""
    dataset_size: Count = 8_000
    """Pairs N that are drawn from the images."""
    keep_in_memory: bool = True
    """Images are drawn many times: they are always kept, at 64 pixels a side."""
    groups: tuple[str, ...] = ("animals-nature", "food-drink", "travel-places", "objects", "activities")
    """Only concepts of these groups ("group" in .json); none given: all groups."""
    num_concepts: Count | None = 400
    """Concepts K, drawn with a fixed seed from those with an evaluation image; None: all of these."""
    law: Literal["zipf", "log-uniform"] = "zipf"
    """zipf: frequencies are proportional to 1 / rank**exponent. log-uniform: their logarithms are evenly spaced."""
    exponent: Rate = 1.0
    """Exponent of --law zipf: 1 is Zipf's law, 0 makes all equal."""
    assignment: Whole = 0
    """Index of the random assignment of ranks to concepts, which also depends on the seed."""
    misaligned: Share = 0.0
    """Share of pairs that get another pair's caption."""

    model: str = "ConvNet-emoji"
    """Any open_clip config."""
    image_size: Count | None = None
    """Image side in pixels; None is the model's own."""
    epochs: Count = 7
    """Passes over the corpus."""
    lr: Rate = 1e-3
    """Peak learning rate of AdamW."""
    warmup: Whole = 64
    """Steps of linear warm-up, before half a cosine to 0."""
    weight_decay: Rate = 0.2
    """AdamW's decay of matrices; gains, biases and the temperature have none."""
    max_grad_norm: Positive = 1.0
    """Gradients of all parameters together are clipped to this norm."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in an epoch; the short last batch is left out."""
        return self.dataset_size // self.batch_size

    def check(self, world_size: int) -> None:
        if self.stream:
            raise UserError("--stream has no rows, from which an arm's pairs are drawn: leave it out")
        super().check(world_size)
        if not self.keep_in_memory:
            raise UserError("images of an arm are always kept in memory: leave out --no-keep-in-memory")
        if not self.dry_run and not self.eval_set:
            raise UserError("--eval-set is missing: it takes a classification set in the CLIP-benchmark layout")
        if not self.dry_run and not Path(self.eval_set).is_dir():
            raise UserError(f"--eval-set {self.eval_set} does not exist: name a folder in the CLIP-benchmark layout")
        if self.num_concepts and self.dataset_size < self.num_concepts:
            raise UserError(
                f"--dataset-size {self.dataset_size} pairs cannot hold each of --num-concepts {self.num_concepts}"
            )
        if self.dataset_size < self.batch_size:
            raise UserError(f"--dataset-size {self.dataset_size} is less than one batch of {self.batch_size}")
        if self.law != "zipf" and self.exponent != 1:
            raise UserError(f"--exponent belongs to --law zipf: leave it out with --law {self.law}")


SMALL = Config(
    groups=(), num_concepts=None, epochs=12, batch_size=256, lr=6e-3, warmup=30, workers=0, save_every=50,
)  # fmt: skip
EMOJI = replace(
    SMALL,
    data="data/emoji/train",
    eval_set="data/emoji/eval/names_ood",
    eval_every=12,
    groups=Config.groups,
    num_concepts=400,
)
PRESETS = {
    "small": ("ours: Zipf frequencies over the classes of your own --data and --eval-set, small", SMALL),
    "emoji": ("ours: Zipf frequencies over 400 emoji", EMOJI),
    "emoji-uniform": (
        "ours: the same concepts and number of pairs, all equally frequent",
        replace(EMOJI, exponent=0.0),
    ),
    "emoji-log-uniform": (
        "ours: the same, frequencies evenly spread over their logarithm",
        replace(EMOJI, law="log-uniform"),
    ),
    "emoji-reassigned": ("ours: Zipf again, ranks given to other concepts", replace(EMOJI, assignment=1)),
    "shards": (
        "ours: the experiment on shards of your own, with concepts named in their .json",
        Config(
            groups=(),
            dataset_size=1_000_000,
            model="ViT-B-32",
            epochs=32,
            batch_size=1024,
            lr=5e-4,
            warmup=2_000,
            max_grad_norm=1e9,
        ),
    ),
}


# ------------------------------------------------------------------------------------------------------------ the count


@dataclass(unsafe_hash=True)
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
    threshold: Share = 0.7
    """A concept is in an image if its probability exceeds this (compared in half precision, as upstream)."""
    images: tuple[str, ...] = ()
    """Image shards, if captions come from other files; `ids` then finds the caption row of an image."""
    ids: Literal["row", "cc3m", "cc12m", "yfcc15m", "synthci30m", "laion400m", "laion_aesthetics"] = "row"
    """row: image and caption are in one shard. Other values: see `sample_id`; captions are then numbered over all
    files."""
    keep: str = ""
    """Similarity control: .npy of the ids to keep; adds counts of only these images."""
    size: Count | None = None
    """Size of the corpus for the misalignment degree; None: the number of captions counted."""

    partition: Count = 100_000
    """Captions of a partition of a table; a worker needs about 2 KB for each, beside its spaCy pipeline. A tar is one
    partition."""
    part: str = ""
    """i/n, with i from 0: only index and tag every n-th partition from the i-th on, as one of n jobs that share --out.
    When all have ended, the same command without it adds up."""
    workers: Whole = 0
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

    def check(self) -> None:
        """UserError for settings that cannot work, before work starts."""
        check_limits(self)
        if not self.data:
            raise UserError(
                "--data is missing: it takes captions, e.g. --data 'cc3m/{00000..00331}.tar' or 'part-*.parquet'"
            )
        if not self.concepts:
            raise UserError(
                "--concepts is missing: name lists of concepts (.txt, .json, or a folder with classnames.txt)"
            )
        if self.part:
            self.part_of()
        if self.tagger and self.label_column:
            raise UserError("--tagger and --label-column exclude each other: pass only one")
        if self.keep and not self.tagger:
            raise UserError("--keep needs a --tagger")
        if self.images and not self.tagger:
            raise UserError("--images needs a --tagger")
        if self.also and self.ids in ("cc12m", "yfcc15m"):
            raise UserError(f"--also drops rows, but --ids {self.ids} numbers all rows: leave --also out")
        if bool(self.images) != (self.ids != "row"):
            raise UserError(
                "pass --images (image shards) and --ids (how an image's row of the captions is found) together"
            )


COUNT_PRESETS = {  # name: (row of the paper with its misalignment degree, settings)
    "shards": ("the search that the paper's text describes, on your image-text shards", CountConfig(corrected=True)),
    "cc3m": (
        "table 3, CC-3M, tsv (caption, url): 16.81 %",
        CountConfig(corpus="cc3m", caption_column="0", size=3_318_333),
    ),
    "cc12m": (
        "table 3, CC-12M, tsv (url, caption): 17.25 %",
        CountConfig(corpus="cc12m", caption_column="1", size=12_423_374),
    ),
    "yfcc15m": (
        "table 3, YFCC-15M, tsv (url, caption): 36.48 %",
        CountConfig(corpus="yfcc15m", caption_column="1", size=14_825_236),
    ),
    "laion400m": (
        "table 3, LAION-400M, parquet (caption, url): 5.31 %",
        CountConfig(corpus="laion400m", caption_column="caption", also="url", size=414_080_000),
    ),
    "laion2b": (
        "authors' code, LAION-2B, parquet (TEXT, URL): no number",
        CountConfig(corpus="laion2b", caption_column="TEXT", also="URL"),
    ),
    "laion-aesthetics": (
        "table 3, LAION-Aesthetics shards: 14.34 %",
        CountConfig(corpus="laion_aesthetics", size=161_100_000),
    ),
    "synthci30m": (
        "section 4.2, SynthCI-30M shards, synthetic pairs: no number",
        CountConfig(corpus="synthci30m"),
    ),
    "emoji": (
        "ours: the embedded corpus, names of its evaluation set",
        CountConfig(
            data=("data/emoji/train",), concepts=("data/emoji/eval/names_ood",), corpus="emoji", spacy="en_core_web_sm"
        ),
    ),
}


# ---------------------------------------------------------------------------------- the paper's models, of evaluate.py

# BACKBONE|CORPUS: open_clip's model and weights. If weights are empty, open_clip has none and the user names a file.
# Activations are those of the authors' evaluation, not always those of training (README, detail 18).
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


def row_of(model: str) -> str:
    """The figure with a model's curve, its row of table 9, and their numbers."""
    rows = []
    curves = dict(zip(CURVE_MODELS, PRINTED["classification", "integrated", "class"], strict=True)) | DERIVED
    controls = {  # of figure 4, the second with image counts
        "ViT-B-16|synthci30m": curves["ViT-B-16|synthci30m"],
        "ViT-B-32|laion200m_train_test_sim_normalized": PRINTED["classification", "image", "class"][-1],
    }
    if model in controls:
        rows.append(f"fig. 4: r = {controls[model]}")
    elif model in curves:
        rows.append(f"fig. 2: r = {curves[model]}" + " (recomputed)" * (model in DERIVED))
    if model in TABLE9:
        rows.append("table 9: ImageNet {:.2f} %, Let It Wag! {:.2f} %".format(*TABLE9[model]))
    return "; ".join(rows)


SCRIPTS = {
    "train": PRESETS,
    "count": COUNT_PRESETS,
    "evaluate": {f"'{model}'": (row_of(model), weights) for model, weights in MODELS.items()},
}
