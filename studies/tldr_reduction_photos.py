"""The study of TL;DR on photographs: `python -m studies.tldr_reduction --corpus photos --photos DIR`.

The pool is Flickr8k with one sample per caption: 30,000 pairs of 6,000 photographs, a stand-in for CC3M. MLPs on two
pretrained, locked networks, EfficientNet-Lite0 and the sentence encoder MiniLM, are trained as a CLIP on the whole pool
or on a quarter of it (the paper keeps 24 %), for equal steps. Two more arms train on half. T_g is another person's
caption of the same photograph, so it is never wrong. The text tower is pretrained because towers from scratch retrieved
worse than a canonical correlation, which takes no training step: the bag of words of the study on
scenes even with all pairs, a transformer with a quarter of them.
`python -m studies.tldr_reduction_photos --data SHARDS --out RUN` trains one such model.

Copies of a photograph stay in the pool when it is reduced (`--no-drop-duplicates`, as upstream). If they were dropped,
a reduction would keep one caption of each photograph that it keeps.

Why the effect can appear: each photograph is in the pool five times, and its copies fall into one cluster, of which
every fourth member is kept. So codes keep every photograph, and a random quarter misses some. A random half
misses fewer, so the effect should be smaller there. The captions are nearly all correct, so refinement can only add
words, and the effect of matching scores cannot appear.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from shared import checkpoints, cli, data, run, zeroshot
from shared.pretrained import minilm
from shared.tars import descriptions
from studies import tldr_reduction as study
from studies.harness import locked_clip, photos, verdicts
from studies.harness.floors import Floor
from studies.harness.lite0 import in_order, keep_features, known_features
from studies.harness.report import Comparison
from studies.harness.runner import Arm, Once, Stage, Study
from studies.harness.verdicts import Claim
from tldr_reduction.codebook import text_embedder
from tldr_reduction.reduce import refined

POOL, PREDICTIONS = photos.SINGLE, "data/tldr-photos/captions.json"
RUNS = "runs/photos/tldr_reduction"
REDUCE = f"reduce {POOL} --no-check --work {RUNS}/work-seed{{seed}}"
CLUSTERED = "--clusters 300 --no-drop-duplicates"  # a cluster holds some twenty photographs with all their copies
QUARTER, AS_MANY = f"{CLUSTERED} --keep 0.25", "--select random --match {reduced/codes}"  # the paper keeps 24 %
REDUCTIONS = {
    "codes": f"{QUARTER} --captions original",
    "random": f"{AS_MANY} --captions original",
    "random-refined": f"{AS_MANY} --predictions {PREDICTIONS}",
    "tldr": f"{QUARTER} --predictions {PREDICTIONS}",
    "full-refined": f"--select all --predictions {PREDICTIONS}",
    "image": f"{QUARTER} --features image --predictions {PREDICTIONS}",
    "generated": f"{QUARTER} --captions generated --predictions {PREDICTIONS}",
    "codes-half": f"{CLUSTERED} --keep 0.5 --captions original",
    "random-half": "--select random --match {reduced/codes-half} --captions original",
}
HEADINGS = {
    "random": "quarter at random, T_o",
    "codes": "quarter by codes, T_o",
    "random-refined": "quarter at random, T_o; T_g",
    "tldr": "quarter by codes, T_o; T_g = TL;DR",
    "full-refined": "full, T_o; T_g",
    "image": "quarter by image features, T_o; T_g",
    "generated": "quarter by codes, T_g only",
    "random-half": "half at random, T_o",
    "codes-half": "half by codes, T_o",
}
CORE = ("random", "codes", "random-refined", "tldr", "full-refined")


def reductions() -> Iterator[Stage]:
    """Stages that reduce the pool, one after the other, because the reductions of a seed share a work folder."""
    before: tuple[str, ...] = ()
    for name, flags in REDUCTIONS.items():
        yield Stage(f"reduced/{name}", f"{REDUCE} --seed {{seed}} --out {{out}} {flags}", after=before)
        before += (f"reduced/{name}",)


ARMS = (
    Arm("full", f"studies.tldr_reduction_photos --data {POOL}", heading="full, T_o"),
    *(
        Arm(
            name,
            f"studies.tldr_reduction_photos --data {{reduced/{name}}}/shards",
            heading=heading,
            core=name in CORE,
        )
        for name, heading in HEADINGS.items()
    ),
)

# ----------------------------------------------------------------------------------------------- training, measurement


MINILM = 384  # width of its features


@dataclasses.dataclass
class Config(locked_clip.Settings):
    """A CLIP on a reduction of the pool, or on all of it."""

    data: str = POOL
    """Shards of photographs with one caption per sample."""
    weight_decay: float = 0.2
    """AdamW's decay of matrices."""
    hidden_dim: int = 1024
    """Hidden units of each MLP."""
    embed_dim: int = 256
    """Dimensions of the joint space."""
    dropout: float = 0.3
    """Dropout of hidden units."""
    noise: float = 0.5
    """Standard deviation of the noise that training adds to standardised features."""
    predictions: str | None = None
    """Write this file of T_g for --data and MiniLM's features of T_o and T_o; T_g, and train nothing."""


class Noise(nn.Module):
    """Adds Gaussian noise in training: the augmentation of features that are computed once."""

    def __init__(self, std: float):
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x) if self.training else x


class LockedTowers(nn.Module):
    """MLPs from features of EfficientNet-Lite0 (B, 1280) and of MiniLM (B, 384) to a joint space (B, E)."""

    def __init__(self, hidden_dim: int, embed_dim: int, dropout: float, noise: float):
        super().__init__()

        def mlp(inputs: int) -> nn.Module:
            standardised = nn.BatchNorm1d(inputs, affine=False)
            hidden = nn.Linear(inputs, hidden_dim), nn.GELU(), nn.Dropout(dropout)
            return nn.Sequential(standardised, Noise(noise), *hidden, nn.Linear(hidden_dim, embed_dim))

        self.image, self.text = mlp(1280), mlp(MINILM)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, features: Tensor) -> Tensor:
        return self.image(features)

    def encode_text(self, features: Tensor) -> Tensor:
        return self.text(features)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normalised = (F.normalize(tower, dim=-1) for tower in (self.image(image), self.text(text)))
        return *normalised, self.logit_scale.exp()


def minilm_features(texts: Sequence[str]) -> Tensor:
    """MiniLM's features (N, 384) of texts, means of its last hidden states; computed once and kept in data/cache."""
    cpu = torch.device("cpu")
    precision = run.resolve_precision("auto", cpu)
    store = Path(f"data/cache/minilm-{precision}.npz")
    order, known = [data.file_hash(text.encode()) for text in texts], known_features(store)
    unseen = {digest: text for digest, text in zip(order, texts, strict=True) if digest not in known}
    by_length = sorted(unseen, key=lambda digest: len(unseen[digest]))  # batches then need little padding
    if unseen:
        with run.autocast(precision, cpu):
            features = text_embedder(str(minilm()), MINILM)([unseen[digest] for digest in by_length]).float()
        keep_features(store, new := dict(zip(by_length, features.numpy(), strict=True)))
        known |= new
    return in_order(order, known)


def create_towers(settings: dict) -> LockedTowers:
    return LockedTowers(*(settings[name] for name in ("hidden_dim", "embed_dim", "dropout", "noise")))


TOWERS = locked_clip.Towers(create_towers, lambda settings: minilm_features)


def write_predictions(source: str, path: str) -> None:
    """Write T_g for `source`: for each sample, another caption of the same photograph."""
    spoken, texts = [], []
    for key, about in descriptions(data.expand_shards(source)):
        others = [text for text in about["captions"] if text != about["caption"]] or about["captions"]
        place = about["captions"].index(about["caption"]) if about["caption"] in about["captions"] else 0
        spoken.append({"image_id": key, "caption": others[place % len(others)]})
        texts += [about["caption"], refined(about["caption"], spoken[-1]["caption"])]
    if not Path(path).is_file() or json.loads(Path(path).read_text(encoding="utf-8")) != spoken:
        checkpoints.write_json(path, spoken)
    print(f"{path}: {len(spoken):,} captions")
    print(f"MiniLM's features of {len(minilm_features(texts)):,} texts are in data/cache")


def measure_run(folder: Path) -> dict[str, float]:
    """Recalls on Flickr8k's 1,000 test photographs, and the number of photographs the run was trained on."""
    features, captions, found = photos.test_set(photos.RETRIEVAL)
    texts = [text for of_image in captions for text in of_image]
    embeddings = locked_clip.encode(folder, features, texts, TOWERS)
    recalls = zeroshot.retrieval_metrics(*embeddings, zeroshot.owners(captions))
    source = json.loads((folder / "config.json").read_text())["data"]
    shown = [about["file"] for _, about in descriptions(data.expand_shards(source))]
    numbers = {f"{found.name}/{metric}": value for metric, value in recalls.items()}
    numbers |= {"data/pairs": len(shown), "data/photographs": len(set(shown))}
    return numbers | {"seconds": run.read_metrics(folder)[-1]["seconds"]}


def evaluate(runs: Sequence[str]) -> list[dict[str, float]]:
    return photos.evaluated("tldr_reduction", runs, measure_run)


# ---------------------------------------------------------------------------------------------------------------- study

SCORE, KEPT = "retrieval_en/mean_recall", "data/photographs"
HALVES = {"codes-half", "random-half"}
COPIES = "each photograph is there five times, by nature; nearly all captions are true"
CLAIMS = (  # claims on scenes whose arms this study has, too; codes-half and random-half are others there
    *(
        claim._replace(metric=SCORE, where=COPIES)
        for claim in study.CLAIMS
        if claim.metric == study.SCORE and {claim.method, claim.baseline} <= {arm.name for arm in ARMS} - HALVES
    ),
    Claim("selection above random, T_o, a half", None, SCORE, "codes-half", "random-half"),
    Claim("distinct photographs kept, codes above random", None, KEPT, "codes", "random"),
    Claim("distinct photographs kept, codes above random, a half", None, KEPT, "codes-half", "random-half"),
)


def correlation_of(arm: str, seed: int | None = None) -> dict[str, float]:
    """The floor of an arm: canonical correlation of its photographs with MiniLM's features of its captions, refined or
    not. Without a seed, the arm is trained on the whole pool."""
    shards = POOL if seed is None else f"{PHOTOS.out(f'reduced/{arm}', seed)}/shards"
    return photos.by_correlation((photos.RETRIEVAL,), train=shards, own=True, of_texts=minilm_features)


WITH_MINILM = "canonical correlation of EfficientNet-Lite0 with MiniLM"
CHANCE, *WITH_WORDS = photos.floors_on(photos.RETRIEVAL)
FLOORS = (
    CHANCE,
    *(dataclasses.replace(floor, arms=("full", "full-refined")) for floor in WITH_WORDS),
    *(
        Floor(
            f"{WITH_MINILM}, {arm.heading}",
            functools.partial(correlation_of, arm.name),
            arms=(arm.name,),
            by_seed=arm.name in REDUCTIONS,
        )
        for arm in ARMS
    ),
)


def more_rows(found: Comparison) -> list[dict]:
    """Table rows of the paper's claims that cannot be tested on these data."""
    mended = "captions are people's: there is little to mend"
    return [
        verdicts.not_testable("lowest self-scores dropped, above random", "+4.4", mended),
        verdicts.not_testable("absolute COCO, Flickr30K and ImageNet numbers", "72.8 TR@1", "needs CC3M and COCO"),
    ]


PHOTOS = Study(
    folder="tldr_reduction",
    on="photos",
    paper="TL;DR (arXiv 2305.20087)",
    stands_for="CC3M",
    corpus=f"Flickr8k, {photos.RESIZED}, a sample for each English caption; T_g is another person's caption; codes and "
    "the locked image tower are of EfficientNet-Lite0, pretrained on ImageNet-1k, the locked text tower is "
    "all-MiniLM-L6-v2; an MLP on each is trained",
    before=(
        photos.FLICKR8K,
        photos.CAPTIONS,
        photos.FEATURES,
        Once(f"studies.tldr_reduction_photos --predictions {PREDICTIONS}"),
    ),
    stages=tuple(reductions()),
    arms=ARMS,
    minutes={"core": 5, "all": 8},
    evaluate=evaluate,
    alone=True,
    metrics={
        SCORE: "mean recall",
        "retrieval_en/image_to_text_R@1": "I2T R@1",
        "retrieval_en/text_to_image_R@1": "T2I R@1",
        "data/pairs": "pairs",
        KEPT: "photographs",
        "seconds": "training seconds",
    },
    sets=(photos.RETRIEVAL,),
    floors=FLOORS,
    floor_files=functools.partial(study.reduced, runs=RUNS),
    claims=CLAIMS,
    more_rows=more_rows,
)


def main(cfg: Config) -> None:
    if cfg.predictions:
        write_predictions(cfg.data, cfg.predictions)
    else:
        locked_clip.train(cfg, towers=TOWERS)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
