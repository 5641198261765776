"""Every setting of a reduction (reduce.py), the paper's recipes, and what is refused before a reduction starts.

TL;DR (arXiv 2305.20087); authors' code showlab/datacentric.vlp@a488102.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shared import cli
from tldr_reduction.config import SETS
from tldr_reduction.views import open_pairs

RECIPES = {  # what the paper or the release says of each data set (CC3M where it is not named); flags override
    "paper": dict(keep=0.25, clusters=3000),
    "release_comment": dict(keep=0.5, clusters=1000, itm_keep=0.5),  # "select_5_10_half_itm_1K_clusters"
    "release_script": dict(keep=0.2, clusters=1000, itm_keep=0.5),  # the values as the script has them
    "cc12m": dict(keep=0.22, clusters=3000),
    "yfcc15m": dict(keep=0.167, clusters=3000),
    "laion40m": dict(keep=0.2, clusters=3000),
    **{f"ratio-{percent}": dict(keep=percent / 100, clusters=3000) for percent in (10, 25, 50, 100)},
    **{f"clusters-{k}": dict(keep=0.25, clusters=k) for k in (100, 1000, 3000, 5000, 10000)},
}


@dataclasses.dataclass
class Config:
    data: Annotated[str, tyro.conf.Positional]
    """Shards 'cc3m/{00000..00331}.tar', a folder of them, or an annotation .json."""
    out: str
    """Folder for the result; run again, the tool goes on where it stopped."""
    recipe: str = "paper"
    """Values for keep, clusters and itm_keep where those are not given: paper (CC3M), release_comment, release_script,
    cc12m, yfcc15m, laion40m, ratio-{10,25,50,100}, clusters-{100,1000,3000,5000,10000}."""
    keep: float | None = None
    """Share of each cluster that is kept."""
    clusters: int | None = None
    """Clusters k; at most one for 30 samples, unless given here."""
    itm_keep: float | None = None
    """Of the selected samples only those stay that are in this top share of all by ITM score."""
    select: Literal["stride", "nearest", "farthest", "random", "first", "itm", "all"] = "stride"
    """stride: every n-th of a cluster (paper). nearest, farthest: by distance to centroids. Without clusters: random;
    first, of the file; itm, the highest scores; all."""
    features: Literal["codes", "image", "blip", "text"] = "codes"
    """What is clustered: codes; image, the captioner's continuous image tokens, averaged; blip, text, the scorer's
    contrastive embeddings of images, of captions."""
    captions: Literal["original", "refined", "generated"] | None = None
    """T_o, "T_o; T_g", or T_g; None: refined where --caption-model is given, else original."""
    captioner: str | None = None
    """Run folder of stage captioner. None: a small one is trained on the shards first, in DIR/captioner."""
    caption_model: str | None = None
    """Run folder of stage finetune, which writes T_g."""
    scorer: str | None = None
    """Run folder of stage blip, which scores image-text matching."""
    cls_scores: bool = False
    """Score with [CLS] at position 0, as upstream does, instead of [ENC], with which BLIP trains."""
    match: str | None = None
    """For random, first, itm: keep as many samples as the reduction in this folder did, whatever --keep says."""
    image_root: str | None = None
    """Folder that the image paths of an annotation .json start from."""
    work: str | None = None
    """Folder for code vectors, scores and generated captions, which reductions of the same data may share; None:
    DIR/work."""
    cache: str = "data/cache"
    """Folder for copies of remote shards."""
    whiten_dim: int = 256
    """Axes of the whitened code vectors."""
    niter: int = 20
    """K-means iterations."""
    points_per_centroid: int = 256
    """K-means is trained on at most so many rows a cluster; 10000000 is all, as upstream."""
    num_beams: int = 3
    """Beams of caption generation."""
    max_length: int = 20
    """Tokens of a generated caption, prompt included."""
    min_length: int = 5
    """Least tokens of a generated caption, prompt included."""
    captioner_epochs: int = 12
    """Epochs of the captioner that is trained where --captioner is not given."""
    seed: int = 0
    """Seed of k-means and random selection."""
    batch_size: int = 256
    """Images per forward pass."""
    chunk: int = 4096
    """Rows that are worked on and saved together."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Of the forward passes; codes are comparable only within one precision."""
    strict: bool = False
    """Stop at the first broken sample instead of leaving it out."""
    dry_run: bool = False
    """Print what would be kept, and what it takes, and stop; where there is no such data, for the recipe's data set."""


def check(cfg: Config, n: int) -> Config:
    """The recipe's values filled in; what cannot work is refused in a sentence."""
    if cfg.recipe not in RECIPES:
        raise ValueError(f"--recipe {cfg.recipe} is none of {', '.join(RECIPES)}")
    recipe = RECIPES[cfg.recipe]
    clusters = cfg.clusters if cfg.clusters is not None else max(1, min(recipe["clusters"], n // 30))
    keep = recipe["keep"] if cfg.keep is None else cfg.keep
    itm_keep = recipe.get("itm_keep") if cfg.itm_keep is None else cfg.itm_keep
    captions = cfg.captions or ("refined" if cfg.caption_model else "original")
    for name, value in (("keep", keep), ("itm-keep", itm_keep)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"--{name} {value} is not in (0, 1]")
    if not 1 <= clusters <= n:
        raise ValueError(f"--clusters {clusters} is not in 1..{n}, the number of samples")
    cli.check_counts(cfg, "chunk", "batch_size", "niter", "whiten_dim", "num_beams")
    if cfg.max_length < max(5, cfg.min_length):  # [CLS] a picture of
        raise ValueError(
            f"--max-length {cfg.max_length} must exceed the prompt's 4 tokens and reach --min-length {cfg.min_length}"
        )
    if captions != "original" and not cfg.caption_model:
        raise ValueError(f"--captions {captions} needs --caption-model, a run folder of stage finetune")
    if (itm_keep is not None or cfg.select == "itm" or cfg.features in ("blip", "text")) and not cfg.scorer:
        raise ValueError("ITM scores, blip and text features need --scorer, a run folder of stage blip")
    if Path(cfg.out).exists() and not Path(cfg.out).is_dir():
        raise NotADirectoryError(f"--out {cfg.out} is a file, where a folder is wanted")
    if cfg.match and not 0 < kept_by(cfg.match) <= n:
        raise ValueError(f"--match {cfg.match} kept {kept_by(cfg.match):,} samples, which {cfg.data} has not: {n:,}")
    if cfg.match and cfg.select not in ("random", "first", "itm"):
        raise ValueError(f"--match goes with --select random, first or itm, not {cfg.select}")
    if cfg.match and itm_keep is not None:
        raise ValueError("--match says how many samples are kept, of which an ITM filter would drop some: choose one")
    return dataclasses.replace(cfg, clusters=clusters, keep=keep, itm_keep=itm_keep, captions=captions)


def kept_by(folder: str) -> int:
    """Samples that a finished reduction kept."""
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"--match {folder} holds no report.json of a finished reduction")
    return json.loads(path.read_text())["kept"]


def dry_run(cfg: Config) -> None:
    """What would be kept and what that takes, without reading an image: of the data, or the recipe's where it lacks."""
    try:
        n, what = len(open_pairs(cfg.data, cfg.image_root, None, False, cfg.cache)), cfg.data
    except FileNotFoundError:
        name = cfg.recipe if cfg.recipe in SETS else "cc3m"
        n, what = SETS[name][0], f"{name}, as {cfg.data} does not exist"
    cfg = check(cfg, n)
    clustered = cfg.select in ("stride", "nearest", "farthest")
    kept = n if cfg.select == "all" else round(n * cfg.keep)
    rows = min(n, cfg.clusters * cfg.points_per_centroid)
    print(f"samples            {n:,} ({what})")
    print(f"kept               {kept:,}" + (f", and up to one more in each of {cfg.clusters:,} clusters" * clustered))
    if cfg.itm_keep is not None:
        print(f"ITM filter         of those only the ones in the upper {100 * cfg.itm_keep:g} % by score")
    if clustered and cfg.features == "codes":
        gib = 2**30
        print(
            f"code vectors       {n * 197 * 2 / gib:.2f} GiB in work/ (197 codes of ViT-B/16 at 224 px), memory-mapped"
        )
        memory = rows * cfg.whiten_dim * 4 / gib
        print(f"k-means            {rows:,} rows of at most {cfg.whiten_dim} axes, {memory:.2f} GiB")
    print(f"captions           {cfg.captions}" + (f", {kept:,} to generate" if cfg.captions != "original" else ""))
