"""The study of TL;DR on photographs: `python -m tldr_reduction.study --corpus photos --photos DIR`.

The pool is Flickr8k with one sample per caption: 30,000 pairs of 6,000 photographs, a stand-in for CC3M. A CLIP with a
locked EfficientNet-Lite0 trains on the whole pool or on a tenth of it, for equal steps. T_g is another person's caption
of the same photograph, so it is never wrong.
`python -m tldr_reduction.photos_study --data SHARDS --out RUN` trains one such model.

Why the effect can appear: each photograph is in the pool five times, so a random tenth holds fewer photographs than a
tenth by codes. The captions are nearly all correct, so refinement can only add words, and the effect of matching scores
cannot appear.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro

from shared import checkpoints, cli, data, run, zeroshot
from shared.study import locked_clip, photos, verdicts
from shared.study.report import Comparison
from shared.study.runner import Arm, Once, Stage, Study
from shared.study.verdicts import Claim
from shared.tars import descriptions
from tldr_reduction import study

POOL, PREDICTIONS = "data/photos-captions/train", "data/tldr-photos/captions.json"
# A cluster holds a few photographs with all their copies; about half of the photographs are kept, each once
REDUCE = f"reduce {POOL} --keep 0.1 --clusters 1500 --check none --work runs/photos/tldr_reduction/work-seed{{seed}}"
AS_MANY = "--select random --match {reduced/codes}"
REDUCTIONS = {
    "codes": "--captions original",
    "random": f"{AS_MANY} --captions original",
    "random-refined": f"{AS_MANY} --predictions {PREDICTIONS}",
    "tldr": f"--predictions {PREDICTIONS}",
    "full-refined": f"--select all --predictions {PREDICTIONS}",
    "image": f"--features image --predictions {PREDICTIONS}",
    "generated": f"--captions generated --predictions {PREDICTIONS}",
}
HEADINGS = {
    "random": "tenth at random, T_o",
    "codes": "tenth by codes, T_o",
    "random-refined": "tenth at random, T_o; T_g",
    "tldr": "tenth by codes, T_o; T_g = TL;DR",
    "full-refined": "full, T_o; T_g",
    "image": "tenth by image features, T_o; T_g",
    "generated": "tenth by codes, T_g only",
}


def reductions() -> Iterator[Stage]:
    """Stages that reduce the pool, one after the other, because the reductions of a seed share a work folder."""
    before: tuple[str, ...] = ()
    for name, flags in REDUCTIONS.items():
        yield Stage(f"reduced/{name}", f"{REDUCE} --seed {{seed}} --out {{out}} {flags}", after=before)
        before += (f"reduced/{name}",)


ARMS = (
    Arm("full", f"photos_study --data {POOL}", heading="full, T_o"),
    *(
        Arm(
            name,
            f"photos_study --data {{reduced/{name}}}/shards",
            heading=heading,
            core=name not in ("image", "generated"),
        )
        for name, heading in HEADINGS.items()
    ),
)

# ----------------------------------------------------------------------------------------------- training, measurement


@dataclasses.dataclass
class Config(locked_clip.Config):
    """A CLIP on a reduction of the pool, or on all of it."""

    data: str = POOL
    """Shards of photographs with one caption per sample."""
    max_length: int = 48
    """Tokens of a caption, start and end included; longer ones are cut."""
    predictions: str | None = None
    """Write this file of T_g for --data, and train nothing."""


def write_predictions(source: str, path: str) -> None:
    """Write T_g for `source`: for each sample, another caption of the same photograph."""
    spoken = []
    for key, about in descriptions(data.expand_shards(source)):
        others = [text for text in about["captions"] if text != about["caption"]] or about["captions"]
        place = about["captions"].index(about["caption"]) if about["caption"] in about["captions"] else 0
        spoken.append({"image_id": key, "caption": others[place % len(others)]})
    if not Path(path).is_file() or json.loads(Path(path).read_text(encoding="utf-8")) != spoken:
        checkpoints.write_json(path, spoken)
    print(f"{path}: {len(spoken):,} captions")


def measure_run(folder: Path) -> dict[str, float]:
    """Recalls on Flickr8k's 1,000 test photographs, and the number of photographs the run was trained on."""
    features, captions, found = photos.test_set(photos.RETRIEVAL)
    texts = [text for of_image in captions for text in of_image]
    recalls = zeroshot.retrieval_metrics(*locked_clip.encode(folder, features, texts), zeroshot.owners(captions))
    source = json.loads((folder / "config.json").read_text())["data"]
    shown = [about["file"] for _, about in descriptions(data.expand_shards(source))]
    numbers = {f"{found.name}/{metric}": value for metric, value in recalls.items()}
    numbers |= {"data/pairs": len(shown), "data/photographs": len(set(shown))}
    return numbers | {"seconds": run.read_metrics(folder)[-1]["seconds"]}


def evaluate(runs: Sequence[str]) -> list[dict[str, float]]:
    return locked_clip.evaluated("tldr_reduction", runs, measure_run)


# ---------------------------------------------------------------------------------------------------------------- study

SCORE, KEPT = "retrieval_en/mean_recall", "data/photographs"
CLAIMS = (  # claims of study.py whose arms this study has, too
    *(
        claim._replace(metric=SCORE)
        for claim in study.CLAIMS
        if claim.metric == study.SCORE and {claim.method, claim.baseline} <= {arm.name for arm in ARMS}
    ),
    Claim("distinct photographs kept, codes above random", None, KEPT, "codes", "random"),
)


def more_rows(found: Comparison) -> list[dict]:
    """Table rows of the paper's claims that cannot be tested on these data."""
    mended = "captions are people's: there is little to mend"
    return [
        verdicts.not_testable("lowest self-scores dropped, above random", "+4.4", mended),
        verdicts.not_testable("absolute COCO, Flickr30K and ImageNet numbers", "72.8 TR@1", "needs CC3M and COCO"),
    ]


STUDY = Study(
    folder="tldr_reduction",
    on="photos",
    paper="TL;DR (arXiv 2305.20087)",
    stands_for="CC3M",
    corpus=f"Flickr8k, {photos.RESIZED}, a sample for each English caption; T_g is another person's caption; codes and "
    "the locked image tower are of EfficientNet-Lite0, pretrained on ImageNet-1k; projection and text tower are from "
    "scratch",
    before=(
        photos.FLICKR8K,
        photos.CAPTIONS,
        Once(f"tldr_reduction.photos_study --predictions {PREDICTIONS}"),
    ),
    stages=tuple(reductions()),
    arms=ARMS,
    minutes={"core": 8, "all": 11},
    evaluate=evaluate,
    alone=True,
    metrics={
        SCORE: "mean recall",
        "retrieval_en/image_to_text_R@1": "I2T R@1",
        "retrieval_en/text_to_image_R@1": "T2I R@1",
        "data/pairs": "pairs",
        KEPT: "photographs",
        "seconds": "seconds",
    },
    sets=(photos.RETRIEVAL,),
    floors=photos.floors_on(photos.RETRIEVAL),
    claims=CLAIMS,
    more_rows=more_rows,
)


def main(cfg: Config) -> None:
    if cfg.predictions:
        write_predictions(cfg.data, cfg.predictions)
    else:
        locked_clip.train(cfg)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
