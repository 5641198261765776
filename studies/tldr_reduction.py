"""The small-scale study of TL;DR: `python -m studies.tldr_reduction` (`make reproduce-tldr-reduction`).

Scenes of one emoji stand in for CC3M: near copies of a thousand scenes, many of a few and few of most, with a known
share of bad captions (tldr_reduction_pool.py). Two towers are trained from random weights on the whole pool or on a
reduction of it (tldr_reduction_learner.py); in the paper they start from ImageNet and BERT, and here floors can then be
of the same pixels and words. A third of the pool is trained for 20 epochs; the whole pool for as many steps, and for as
many epochs, as in the paper, where a reduction thus saves steps.

Why the effect can appear: most pictures of the pool are copies, so a selection from more clusters than there are
distinct scenes keeps more distinct scenes than a random selection. Bad captions name the wrong emoji or none, and
refinement appends a caption that is mostly right. The gain of selection would vanish without copies; the gain of
refinement would vanish with true captions, or with a captioner that is never right. The study varies these shares, and
the kinds of bad captions.
"""

import csv
import functools
import json
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score, roc_auc_score
from torch import Tensor

from shared import checkpoints, data, evaluation, probes, run, tars
from shared.errors import UserError
from shared.evalsets import EvalSet
from studies.harness import floors, photos, runner, verdicts
from studies.harness.floors import Floor
from studies.harness.lite0 import cached_lite0_features
from studies.harness.report import Comparison
from studies.harness.runner import Arm, Once, Stage, Study
from studies.harness.verdicts import Claim
from studies.tldr_reduction_learner import load_run
from tldr_reduction import eval as tldr
from tldr_reduction.config import Common, total_steps
from tldr_reduction.datasets import eval_transform, local_pairs, of_lite0, open_pairs, view_of

# ------------------------------------------------------------------------------------------------------------- corpora

SCENES = "--concepts 100 --clutter 0 0 --captioned-size 0.7 0.9 --samples 8000 --eval-samples 2000 --caption tags"
POOLS = {  # name: folder of its scenes, its own folder, percent of bad captions
    "": ("data/tldr-scenes", "data/tldr", 30),
    "-clean": ("data/tldr-scenes", "data/tldr", 0),
    "-noisy": ("data/tldr-scenes", "data/tldr", 60),
    "-half": ("data/tldr-scenes-half", "data/tldr-half", 30),
    "-distinct": ("data/tldr-scenes-distinct", "data/tldr-distinct", 30),
    "-other": ("data/tldr-scenes", "data/tldr-other", 30),
    "-generic": ("data/tldr-scenes", "data/tldr-generic", 30),
    "-mixed": ("data/tldr-scenes", "data/tldr-mixed", 30),
}
WHERE = {  # what differs from the main pool
    "-clean": "all captions true",
    "-noisy": "60 % bad captions",
    "-half": "half of the pictures are copies",
    "-distinct": "no copies",
}
IN_EACH = ("random", "codes", "random-refined", "tldr", "full-refined")  # reductions of each pool in WHERE
KINDS = {  # pools of the main pool's pictures with bad captions of one kind; each has two arms
    "-other": "30 % name another emoji",
    "-generic": "30 % are generic",
    "-mixed": "30 % name another emoji, too",
}
OF_KINDS = ("random", "random-refined")
SETS = tuple(f"data/tldr-scenes/eval/names_{split}" for split in ("id", "ood"))
BEFORE = (
    Once(f"studies.corpora.scenes --out data/tldr-scenes {SCENES} --distinct 1000 --skew 1.3"),
    Once("studies.tldr_reduction_pool"),
    *(
        Once(command, arms=tuple(f"{name}{pool}" for name in ("full", *IN_EACH)))
        for pool, copies in (("-half", "--distinct 4000 --skew 1.3"), ("-distinct", ""))
        for command in (
            f"studies.corpora.scenes --out data/tldr-scenes{pool} {SCENES} {copies}",
            f"studies.tldr_reduction_pool --source data/tldr-scenes{pool} --out data/tldr{pool}",
        )
    ),
    *(
        Once(
            f"studies.tldr_reduction_pool --bad {pool[1:]} --noise 30 --oracle 20 --out data/tldr{pool}",
            arms=tuple(f"{name}{pool}" for name in OF_KINDS),
        )
        for pool in KINDS
    ),
)


def shards(pool: str) -> str:
    """Folder of the shards of a pool, by its name in POOLS."""
    _, folder, percent = POOLS[pool]
    return f"{folder}/noise-{percent:02}"


def oracle(pool: str, wrong: int = 20) -> str:
    """File of captions by the oracle that names the wrong emoji in `wrong` % of a pool's samples."""
    return f"{POOLS[pool][1]}/oracle-{wrong}.json"


# ---------------------------------------------------------------------------------------------------------- reductions

AS_MANY = "--select random --match {reduced/codes%s}"  # as many pairs as selected by codes from the same pictures
REDUCTIONS = {  # name: (pool, flags)
    "codes": ("", "--captions original --check"),
    "random": ("", f"{AS_MANY % ''} --captions original"),
    "random-refined": ("", f"{AS_MANY % ''} --predictions data/tldr/oracle-20.json"),
    "tldr": ("", "--predictions data/tldr/oracle-20.json"),
    "scored": ("", "--predictions data/tldr/oracle-20.json --scorer {full}"),
    "full-refined": ("", "--select all --predictions data/tldr/oracle-20.json"),
    "image": ("", "--features image --predictions data/tldr/oracle-20.json"),
    "generated": ("", "--captions generated --predictions data/tldr/oracle-20.json"),
    "random-refined-50": ("", f"{AS_MANY % ''} --predictions data/tldr/oracle-50.json"),
    "random-refined-80": ("", f"{AS_MANY % ''} --predictions data/tldr/oracle-80.json"),
    "dropped-random": ("", "--select random --keep 0.5 --captions original"),
    "dropped-low": ("", "--select itm --keep 0.5 --captions original --scorer {full}"),
    **{
        f"{name}{pool}": (pool, flags)
        for pool in WHERE
        for name, flags in (
            ("codes", "--captions original"),
            ("random", f"{AS_MANY % pool} --captions original"),
            ("random-refined", f"{AS_MANY % pool} --predictions {oracle(pool)}"),
            ("tldr", f"--predictions {oracle(pool)}"),
            ("full-refined", f"--select all --predictions {oracle(pool)}"),
        )
    },
    **{
        f"{name}{pool}": (pool, f"{AS_MANY % ''} {captions}")
        for pool in KINDS
        for name, captions in zip(OF_KINDS, ("--captions original", f"--predictions {oracle(pool)}"), strict=True)
    },
}
# There are more clusters than distinct scenes in the main pool, so that a cluster is a scene with its copies, a quarter
# of which is kept, but at least one. The paper's shares for CC3M and YFCC15M (24 and 16.7 %) are not used: all pools
# have the same share, so that they differ in captions or copies alone; a smaller one would still keep a sample of each
# cluster.
WORK = "runs/tldr_reduction/work{name}-seed{{seed}}"
REDUCE = f"studies.tldr_reduction_learner reduce {{pool}} --keep 0.25 --clusters 1500 --work {WORK}"


def reductions() -> Iterator[Stage]:
    """Stages that reduce the pools. Stages of one pool run one after the other, because they share a work folder: each
    computes only the codes and scores that are missing there."""
    before: dict[str, tuple[str, ...]] = {pool: () for pool in POOLS}
    for name, (pool, flags) in REDUCTIONS.items():
        checked = "" if "--check" in flags else " --no-check"
        command = f"{REDUCE.format(pool=shards(pool), name=pool)} --seed {{seed}} --out {{out}} {flags}{checked}"
        yield Stage(f"reduced/{name}", command, after=before[pool])
        before[pool] += (f"reduced/{name}",)


# ---------------------------------------------------------------------------------------------------------------- arms

# A third of the pool has 21 batches, so 20 epochs, as in the paper. The whole pool has as many steps, or epochs.
STEPS, LONG = 420, 1240
TRAIN = "studies.tldr_reduction_learner train"


def on(reduction: str, heading: str, core: bool = False) -> Arm:
    """The arm that trains on a reduction and has its name."""
    command = f"{TRAIN} --data {{reduced/{reduction}}}/shards --steps {STEPS}"
    return Arm(reduction, command, heading=heading, core=core)


ARMS = (  # T_o: original captions; T_g: captions by an oracle, wrong in 20 % unless a heading says otherwise
    Arm("full", f"{TRAIN} --steps {STEPS}", heading="full, T_o; equal steps"),
    Arm("full-epochs", f"{TRAIN} --steps {LONG}", heading="full, T_o; equal epochs"),
    on("random", "third at random, T_o", core=True),
    on("codes", "third by codes, T_o", core=True),
    on("tldr", "third by codes, T_o; T_g = TL;DR", core=True),
    on("random-refined", "third at random, T_o; T_g"),
    on("full-refined", "full, T_o; T_g; equal steps"),
    on("scored", "TL;DR, captions scored by the full data's arm"),
    on("image", "third by image features, T_o; T_g"),
    on("generated", "third by codes, T_g only"),
    on("random-refined-50", "third at random, T_g wrong in 50 %"),
    on("random-refined-80", "third at random, T_g wrong in 80 %"),
    on("dropped-random", "half dropped at random, T_o"),
    on("dropped-low", "half of lowest self-score dropped, T_o"),  # a model's scores of the captions that it learned
    *(
        on(f"{name}{pool}", f"{heading}; {where}")
        for pool, where in WHERE.items()
        for name, heading in (
            ("random", "third at random, T_o"),
            ("codes", "third by codes, T_o"),
            ("random-refined", "third at random, T_o; T_g"),
            ("tldr", "third by codes, T_o; T_g"),
            ("full-refined", "full, T_o; T_g"),
        )
    ),
    *(
        on(f"{name}{pool}", f"{heading}; {where}")
        for pool, where in KINDS.items()
        for name, heading in zip(OF_KINDS, ("third at random, T_o", "third at random, T_o; T_g"), strict=True)
    ),
    *(
        Arm(
            f"full{pool}",
            f"{TRAIN} --data {shards(pool)} --steps {STEPS}",
            heading=f"full, T_o; {WHERE[pool]}",
            core=False,
        )
        for pool in WHERE
    ),
)

# ------------------------------------------------------------------------------------------------------- measurement

METRICS = {  # metrics shown for a run, and their headings
    "names_ood/top1": "names OOD",
    "names_ood/top5": "names OOD, top-5",
    "names_id/top1": "names ID",
    "data/pairs": "pairs",
    "steps": "steps",
    "data/scenes": "distinct scenes",
    "data/named": "true T_o",
    "itm/before_mean": "score before (kept pairs)",
    "itm/after_mean": "score after",
    "itm/before_below_cut": "scores below the cut, before",
    "itm/after_below_cut": "scores below the cut, after",
    "itm/auc": "ITM AUC, true names against others'",
    "data/generated_right": "T_g is the name",
    "data/ami": "adjusted mutual information of clusters and scenes",
    "pixels/cohesion": "cohesion of clusters on pixels",
    "pixels/coverage": "coverage on pixels",
    "codes/codes_used": "codes used",
    "early_loss_ita": "ITC loss, epochs 0-2",
    "seconds": "training seconds",
}


def plain(text: str) -> str:
    """The text's letters and digits, in lower case and without accents, for comparison with captions from WordPiece,
    which drops accents and puts spaces around hyphens."""
    return "".join(character for character in unicodedata.normalize("NFKD", text.lower()) if character.isalnum())


CHECKED_ON = {"images at 8 x 8 pixels": "pixels", "captions": "captions"}  # features of a reduction's checks


def quality_metrics(summary: dict) -> dict[str, float]:
    """Cohesion and coverage of a reduction and of random ones as cosines times 100; `summary` is its report.json."""
    metrics = {}
    for features, short in CHECKED_ON.items():
        for name, value in summary.get("checks", {}).get(features, {}).items():
            if name != "samples":
                metrics[f"{short}/{name}"] = 100 * float(np.mean(value))
    return metrics


def score_metrics(summary: dict, lines: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Mean scores of the kept pairs with their captions before and after, and percent below the cut.

    summary: report.json, whose cut is 0.5 for probabilities of a match, and for cosines the median of all pairs before.
    lines: report.csv.
    """
    kept = [line for line in lines if line.get("itm") and line.get("itm_after")]
    if "itm" not in summary or not kept:
        return {}
    metrics, cut = {}, summary["itm"]["before"]["cut"]
    for when, column in (("before", "itm"), ("after", "itm_after")):
        scores = np.array([float(line[column]) for line in kept])
        metrics |= {f"itm/{when}_mean": 100 * scores.mean(), f"itm/{when}_below_cut": 100 * (scores < cut).mean()}
    return {name: float(value) for name, value in metrics.items()}


def descriptions(spec: str) -> dict[str, dict]:
    """{key: content of its .json} of the samples of shards. If the shards are remote, missing or damaged: {}, and the
    reason is printed."""
    try:
        shards = data.expand_shards(spec)
        if any(map(data.is_remote, shards)):
            raise UserError("they are remote")
        return dict(tars.descriptions(shards))
    except (OSError, ValueError) as error:
        print(f"metrics of the samples in {spec} are left out: {error}")
        return {}


def data_metrics(cfg: Common) -> dict[str, float]:
    """Metrics of a run's training data: pairs, distinct scenes, scores before and after, cohesion and coverage;
    agreement of clusters with scenes, of generated captions with true names, and of scores with the kind of caption.
    {} if the data are not on this machine."""
    pairs = local_pairs(cfg.data, cfg.image_root, cfg.dataset_size, cfg.cache)
    metrics = {} if pairs is None else {"data/pairs": len(pairs)}
    if not isinstance(pairs, data.Shards):
        return metrics
    everything = descriptions(cfg.data)
    samples = [everything[key] for key in pairs.keys if key in everything]
    metrics["data/scenes"] = len({d["original"] for d in samples})
    metrics["data/named"] = 100 * sum(d["noise"] == "name" for d in samples) / len(samples)
    folder = Path(pairs.paths[0]).parent.parent
    whole = list(map(Path, pairs.paths)) == sorted((folder / "shards").glob("*.tar"))
    return metrics | reduction_metrics(folder) if whole and (folder / "report.json").is_file() else metrics


def reduction_metrics(folder: Path) -> dict[str, float]:
    """The `data_metrics` of a reduction, from its report.json, config.json and report.csv."""
    summary, settings = (checkpoints.read_json(folder / name) for name in ("report.json", "config.json"))
    metrics = quality_metrics(summary)
    metrics |= {f"codes/{name}": summary[name] for name in ("codes_used", "perplexity") if name in summary}
    everything = descriptions(settings["data"])
    with open(folder / "report.csv", newline="", encoding="utf-8") as file:
        lines = [everything.get(line["key"], {}) | line for line in csv.DictReader(file)]
    metrics |= score_metrics(summary, lines)
    if clustered := [line for line in lines if line.get("cluster") and "original" in line]:
        labels = ([line[name] for line in clustered] for name in ("original", "cluster"))
        metrics["data/ami"] = 100 * adjusted_mutual_info_score(*labels)
    if settings["captions"] != "original":  # T_g that is the emoji's true name
        written = [line for line in lines if line["kept"] == "1" and "name" in line]
        right = sum(plain(line["name"]) == plain(line["generated"]) for line in written)
        metrics |= {"data/generated_right": 100 * right / len(written)} if written else {}
    scored = [line for line in lines if line.get("itm") and line.get("noise") in ("name", "other")]
    if len({line["noise"] for line in scored}) == 2:  # do scores separate true names from those of other emoji?
        labels, scores = zip(*((line["noise"] == "name", float(line["itm"])) for line in scored), strict=True)
        metrics["itm/auc"] = 100 * roc_auc_score(labels, scores)
    return metrics


def training_metrics(folder: Path, cfg: Common) -> dict[str, float]:
    """`data_metrics` of a run, its number of steps (without --steps, its data must be on this machine), and the mean
    contrastive loss of its first three epochs, if it was logged."""
    metrics = data_metrics(cfg)
    if steps := total_steps(cfg, metrics.get("data/pairs", 0) // cfg.batch_size):
        metrics["steps"] = steps
    if early := [line["loss_ita"] for line in run.read_metrics(folder, "loss_ita") if line["epoch"] < 3]:
        metrics["early_loss_ita"] = sum(early) / len(early)
    return metrics


def measure(path: str, cfg: tldr.Config, process: run.Process) -> dict[str, float]:
    """All measurements of an arm's run, saved beside its checkpoint; reused while nothing has changed."""

    def found(folder: Path) -> dict[str, float]:
        model, settings, tokenizer = load_run(path)
        named = tldr.measure_model(cfg, process, model, settings, tokenizer, view_of(model, settings))
        return named | training_metrics(folder, settings)

    return evaluation.measured_run(path, cfg, cfg.sets, found)


def evaluate(runs: Sequence[str]) -> list[dict[str, float]]:
    cfg, process = tldr.Config(runs=tuple(runs), sets=SETS), run.setup(0, "cpu")
    return evaluation.evaluate_runs(cfg, lambda path: measure(path, cfg, process), METRICS)


# --------------------------------------------------------------------------------------------------------------- claims

SCORE, KEPT = "names_ood/top1", "data/scenes"
COVERED, COHERENT = "pixels/coverage", "pixels/cohesion"  # cosines times 100
D = 1.0  # points of top-1; a difference whose whole interval is within +-D is negligible. Smaller for small effects
PLANTED = "copies of scenes and wrong captions are planted; ARMS=all varies both, from none on (copies: not measured)"
ALIKE = "arms have equally many pairs, steps and epochs; " + PLANTED
# The paper's numbers are points of text recall at 1 (TR@1) on COCO: of BLIP, fine-tuned, in table 2a; of CLIP,
# zero-shot, in table 3. Ours are points of naming, which is text recall at 1 among all names.
CLAIMS = (
    Claim("selection above random, T_o", "+3.2 TR@1, table 2a", SCORE, "codes", "random", 1, 3.2, True, D,
          where=ALIKE),
    Claim("refinement above T_o, selection by codes", "+4.3 TR@1, table 2a", SCORE, "tldr", "codes", 1, 4.3, True, D,
          where=ALIKE),
    Claim("TL;DR above random, T_o", "+7.5 TR@1, table 2a", SCORE, "tldr", "random", 1, 7.5, True, D, where=ALIKE),
    Claim("TL;DR above full data, T_o; equal epochs", "+1.5 TR@1, table 3", SCORE, "tldr", "full-epochs", 1, 1.5, True,
          0.75, where=f"as in the paper, the full data take three times the steps; {PLANTED}"),
    Claim("TL;DR above full data, T_o; equal steps", "+1.5 TR@1, table 3", SCORE, "tldr", "full", 1, 1.5, True, 0.75,
          where=f"easier than in the paper, where arms take equal epochs; {PLANTED}"),
    Claim("refinement above T_o, random sample", "+4.1", SCORE, "random-refined", "random", 1, 4.1, negligible=D),
    Claim("more epochs of the full data", None, SCORE, "full-epochs", "full"),
    Claim("TL;DR above random, refined", "+3.4", SCORE, "tldr", "random-refined", negligible=D),
    Claim("selection alone below full data, T_o", "-2.3", SCORE, "codes", "full", -1, negligible=D),
    Claim("TL;DR below full data, refined", "-2.3", SCORE, "tldr", "full-refined", -1, negligible=D),
    Claim("refinement above T_o, full data", "+4.5", SCORE, "full-refined", "full", negligible=D),
    Claim("codes above image features", "+2.2", SCORE, "tldr", "image", negligible=D),
    Claim("T_g alone below T_o; T_g", "collapses", SCORE, "generated", "tldr", -1, negligible=D),
    Claim("lowest self-scores dropped, above random", "+4.4", SCORE, "dropped-low", "dropped-random", negligible=D),
    # scores of the pairs that TL;DR keeps, by one scorer; the paper compares CC3M with its reduction
    Claim(
        "share of scores below the cut, after refinement below before",
        "37 % to 16 % below 0.5",
        "itm/after_below_cut",
        "scored",
        "scored:itm/before_below_cut",
        -1,
        learned_by="itm/auc",
    ),
    Claim("distinct scenes kept, codes above random", None, KEPT, "codes", "random"),
    Claim("coverage on pixels, codes above random", None, COVERED, "codes", f"codes:{COVERED}_random"),
    Claim("cohesion on pixels, codes above shuffled clusters", None, COHERENT, "codes", f"codes:{COHERENT}_shuffled"),
    Claim("refinement, T_g wrong in 50 %", None, SCORE, "random-refined-50", "random"),
    Claim("refinement, T_g wrong in 80 %", None, SCORE, "random-refined-80", "random"),
    *(
        Claim(f"{what}; {where}", None, SCORE, f"{method}{pool}", f"random{pool}")
        for pool, where in WHERE.items()
        for what, method in (("selection above random", "codes"), ("refinement above T_o", "random-refined"))
    ),
    *(
        Claim(f"refinement above T_o; {where}", None, SCORE, f"random-refined{pool}", f"random{pool}")
        for pool, where in KINDS.items()
    ),
    *(
        Claim(f"TL;DR below full data, refined; {where}", None, SCORE, f"tldr{pool}", f"full-refined{pool}", -1)
        for pool, where in WHERE.items()
    ),
    *(
        Claim(f"TL;DR above full data, T_o; {where}", None, SCORE, f"tldr{pool}", f"full{pool}")
        for pool, where in WHERE.items()
        if pool != "-noisy"
    ),
    Claim(
        f"TL;DR above full data, T_o; {WHERE['-noisy']}",
        "+0.8, YFCC15M",
        SCORE,
        "tldr-noisy",
        "full-noisy",
        negligible=0.4,
    ),
)  # fmt: skip


def more_rows(found: Comparison) -> list[dict]:
    """The paper's claims that cannot be tested at this scale."""
    return [
        verdicts.not_testable("absolute COCO, Flickr30K and ImageNet numbers", "72.8 TR@1", "needs CC3M and COCO"),
        verdicts.not_testable("training time at 25 %", "19 h to 4.7 h", "follows from the number of steps"),
    ]


def raw_pixels(pairs: Any) -> tuple[Tensor, list[str]]:
    """Raw pixels (N, 3 * 24 * 24) of pictures, and their captions."""
    read = [data.read_or_next(pairs, row, []) for row in range(len(pairs))]
    return torch.stack([floors.raw_pixels(pair.image) for pair in read]), [pair.caption for pair in read]


@functools.cache
def pool_of(pool: str) -> tuple[Tensor, list[str], list[str]]:
    """Raw pixels of all pictures of a pool of POOLS, the names in their captions ("" if a caption names no concept),
    and the names in the oracle's captions T_g."""
    everything = dict(tars.descriptions(data.expand_shards(shards(pool))))
    pairs = open_pairs(shards(pool))
    pixels, captions = raw_pixels(pairs)
    about = [everything[str(key)] for key in pairs.keys]
    called = [
        {"name": each["name"], "other": text, "generic": ""}[each["noise"]]
        for each, text in zip(about, captions, strict=True)
    ]
    by_oracle = json.loads(Path(oracle(pool)).read_text(encoding="utf-8"))
    generated = {each["image_id"]: each["caption"] for each in by_oracle}
    return pixels, called, [generated[str(key)] for key in pairs.keys]


def reduced(seeds: Sequence[int], runs: str = "runs/tldr_reduction") -> list[Path]:
    """Tables of the finished reductions with these seeds."""
    return sorted(table for seed in seeds for table in Path(runs, "reduced").glob(f"*-seed{seed}/report.csv"))


def kept(reduction: str, seed: int) -> Tensor:
    """Indices of the samples that a finished reduction keeps."""
    path = Path("runs/tldr_reduction/reduced", f"{reduction}-seed{seed}", "report.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return torch.tensor([line["kept"] == "1" for line in csv.DictReader(file)]).nonzero()[:, 0]


def nearest_caption(
    reduction: str | None = None, pool: str = "", seed: int | None = None, refined: bool = False
) -> dict[str, float]:
    """Top-1 in percent, by set, of naming each test picture by the caption of the nearest picture that a reduction
    with this seed keeps, or of the whole pool.

    `refined`: the name in T_g is used, which is true more often than the name in T_o.
    """
    pixels, called, generated = pool_of(pool)
    names = EvalSet(SETS[0], None).classnames
    labels = torch.tensor([names.index(name) if name else -1 for name in (generated if refined else called)])
    rows, found = kept(reduction, seed) if reduction else torch.arange(len(labels)), {}
    for path in SETS:
        test = floors.read(path, "test")
        found[f"{Path(path).name}/top1"] = probes.nearest_neighbour(pixels[rows], labels[rows], *test)
    return found


LITE0 = eval_transform(128, of_lite0)  # one object, since `floors.read` caches by it


def on_labels() -> dict[str, float]:
    """Top-1 in percent, by set, of a linear layer on EfficientNet-Lite0's features, trained on the true names of the
    set's training pictures. It is no floor: the features have been learned on ImageNet, which an arm has not seen."""
    found = {}
    for path in SETS:
        train, test = (floors.read(path, split, cached_lite0_features, LITE0) for split in ("train", "test"))
        found[f"{Path(path).name}/top1"] = 100 * LogisticRegression(C=0.01, max_iter=200).fit(*train).score(*test)
    return found


NEAREST, REFINED = "nearest caption by raw pixels", "nearest refined caption by raw pixels"
TRAINED_ON = {  # reduction, "" for the whole pool: (its name in floors, arms that are trained on its pictures)
    "": ("all", ("full", "full-epochs", "full-refined")),
    "random": ("the random third", ("random", "random-refined", "random-refined-50", "random-refined-80")),
    "codes": ("the third by codes", ("codes", "tldr", "scored", "generated")),
    "image": ("the third by image features", ("image",)),
    "dropped-random": ("half at random", ("dropped-random",)),
    "dropped-low": ("the half of higher scores", ("dropped-low",)),
}
WITH_T_G = (
    "random-refined",
    "tldr",
    "scored",
    "full-refined",
    "image",
    "generated",
)  # trained on the better oracle's T_g


def nearest_captions(pool: str = "", where: str = "") -> Iterator[Floor]:
    """Yield a pool's floors: naming by the nearest original or refined caption of an arm's training pictures."""
    there = {arm.name for arm in ARMS}
    for refined, name in ((False, NEAREST), (True, REFINED)):
        for reduction, (which, trained) in TRAINED_ON.items():
            arms = [f"{arm}{pool}" for arm in trained if (arm in WITH_T_G if refined else arm != "generated")]
            arms = tuple(arm for arm in arms if arm in there)
            if arms and (not pool or reduction in ("", "codes")):
                kept_by = f"{reduction}{pool}" if reduction else None
                measure = functools.partial(nearest_caption, kept_by, pool, refined=refined)
                yield Floor(f"{name}, {which}{where}", measure, arms=arms, by_seed=bool(reduction))


def correlation(arm: str, seed: int | None = None) -> dict[str, float]:
    """Top-1 in percent, by set, of a canonical correlation of the raw pixels of an arm's pictures with the words of its
    captions, in closed form. Without a seed, the arm is trained on a whole pool with original captions."""
    trained_on = shards(arm.removeprefix("full")) if seed is None else f"{STUDY.out(f'reduced/{arm}', seed)}/shards"
    fitted, found = photos.correlate(*raw_pixels(open_pairs(trained_on))), {}
    for path in SETS:
        pixels, labels = floors.read(path, "test")
        found[f"{Path(path).name}/top1"] = fitted.top1(pixels, labels, EvalSet(path, None).classnames)
    return found


FLOORS = (
    Floor("chance", lambda: floors.chance(SETS) | {"itm/auc": 50.0}),
    Floor("nearest neighbour on raw pixels", lambda: floors.nearest_neighbour(SETS)),
    *nearest_captions(),
    *(floor for pool, where in WHERE.items() for floor in nearest_captions(pool, f"; {where}")),
    *(
        Floor(
            f"canonical correlation of raw pixels with words, {arm.heading}",
            functools.partial(correlation, arm.name),
            arms=("full", "full-epochs") if arm.name == "full" else (arm.name,),
            by_seed=arm.name in REDUCTIONS,
        )
        for arm in ARMS
        if arm.name != "full-epochs"
    ),
    Floor("linear layer on EfficientNet-Lite0, true names", on_labels, ceiling=True),
)

# ---------------------------------------------------------------------------------------------------------------- plots


def plot(found: Comparison, out: Path) -> None:
    """Write plots, tldr_reduction_*.png: accuracy of the arms; gains in accuracy by pool; for the first seed of arm
    scored, or else of tldr, scores of captions and members of clusters."""
    plot_arms(found.arms, out)
    plot_fractions(found.arms, out)
    if shown := [arm for arm in ("scored", "tldr") if arm in found.folders]:
        reduction = Path(json.loads((found.folders[shown[0]][0] / "config.json").read_text())["data"]).parent
        if (reduction / "report.json").is_file():
            plot_itm(reduction, out)
            plot_clusters(reduction, out)


def plot_arms(arms: dict[str, list[dict]], out: Path) -> None:
    """tldr_reduction_arms.png: names in the unseen style, of each seed and on average, of the arms on the main pool."""
    main = (arm for arm in ARMS if arm.name in arms and not arm.name.endswith((*WHERE, *KINDS)))
    shown = {arm.name: arm.heading for arm in main if all(SCORE in run for run in arms[arm.name])}
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(shown) + 1))
    for y, arm in enumerate(shown):
        values = [run[SCORE] for run in arms[arm]]
        axis.plot(values, [y] * len(values), ".", color="tab:blue", alpha=0.4)
        axis.plot(np.mean(values), y, "|", color="black", ms=14, mew=2)
    axis.set(yticks=range(len(shown)), yticklabels=shown.values(), xlabel="names, unseen style (%)")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "tldr_reduction_arms.png", dpi=110)
    plt.close(figure)


def plot_fractions(arms: dict[str, list[dict]], out: Path) -> None:
    """tldr_reduction_fractions.png: points that selection and refinement add to a random sample of each pool.

    arms: {arm: metrics of each seed}. Nothing is drawn of one pool alone.
    """
    pools = {
        "-clean": "true captions",
        "": "30 % bad",
        "-noisy": "60 % bad",
        "-half": "30 % bad,\nhalf copies",
        "-distinct": "30 % bad,\nno copies",
        "-other": "30 %\nanother",
        "-generic": "30 %\ngeneric",
        "-mixed": "30 %\nmixed",
    }
    pools = {pool: label for pool, label in pools.items() if f"random{pool}" in arms}
    if len(pools) < 2:
        return
    figure, axis = plt.subplots(figsize=(9, 3.8))
    for shift, (method, label) in enumerate((("codes", "selection by codes"), ("random-refined", "refined captions"))):
        shown = [pool for pool in pools if {f"{method}{pool}", f"random{pool}"} <= arms.keys()]
        added = [
            np.array([run[SCORE] for run in arms[f"{method}{pool}"]])
            - np.array([run[SCORE] for run in arms[f"random{pool}"]])
            for pool in shown
        ]
        places = [list(pools).index(pool) + 0.4 * shift for pool in shown]
        axis.bar(places, [each.mean() for each in added], 0.38, label=label)
        for place, each in zip(places, added, strict=True):
            axis.scatter([place] * len(each), each, color="black", s=8, zorder=3)
    axis.set_xticks(np.arange(len(pools)) + 0.2, pools.values())
    axis.set_ylabel("names, unseen style, added (points)")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.legend()
    figure.tight_layout()
    figure.savefig(out / "tldr_reduction_fractions.png", dpi=110)
    plt.close(figure)


def plot_itm(reduction: Path, out: Path) -> None:
    """tldr_reduction_itm.png: histogram of matching scores of all pairs before, and of the kept ones after."""
    itm = json.loads((reduction / "report.json").read_text()).get("itm")
    if itm is None:
        return
    low, high = itm["before"]["span"]
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for shift, (when, label) in enumerate((("before", "pool, T_o"), ("after", "TL;DR, T_o; T_g"))):
        density = np.array(itm[when]["histogram"])
        places = low + (high - low) * (np.arange(len(density)) + 0.3 + 0.4 * shift) / len(density)
        axis.bar(places, density, 0.4 * (high - low) / len(density), label=label)
    axis.set(xlabel="score of image and caption", ylabel="density")
    axis.legend()
    figure.tight_layout()
    figure.savefig(out / "tldr_reduction_itm.png", dpi=110)
    plt.close(figure)


def plot_clusters(reduction: Path, out: Path, clusters: int = 6, columns: int = 8) -> None:
    """tldr_reduction_clusters.png: members of some clusters; kept ones framed, with T_o; T_g, dropped ones with T_o."""
    source = json.loads((reduction / "config.json").read_text())["data"]
    if any(map(data.is_remote, source.split("::"))):  # a plot neither fetches shards nor runs a pipe:COMMAND
        return
    pairs = open_pairs(source)
    row_of = {str(key): row for row, key in enumerate(pairs.keys)}
    members: dict[str, list[dict]] = {}
    with open(reduction / "report.csv", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line.get("cluster"):
                members.setdefault(line["cluster"], []).append(line)
    fitting = sorted((c for c in members if len(members[c]) >= columns), key=int)
    chosen = [fitting[i] for i in np.linspace(0, len(fitting) - 1, min(clusters, len(fitting))).astype(int)]
    if not chosen:
        return
    figure, axes = plt.subplots(len(chosen), columns, figsize=(1.7 * columns, 1.9 * len(chosen)), squeeze=False)
    for axis_row, cluster in zip(axes, chosen, strict=True):
        for axis, line in zip(axis_row, members[cluster], strict=False):
            pair = pairs.read(row_of[line["key"]])
            axis.imshow(pair.image)
            axis.set(xticks=[], yticks=[])
            is_kept = line["kept"] == "1"
            for spine in axis.spines.values():
                spine.set(color="tab:green" if is_kept else "lightgrey", linewidth=3 if is_kept else 1)
            text = textwrap.fill(line["caption"] if is_kept else f"dropped: {pair.caption}", 24, max_lines=3)
            axis.set_xlabel(text, fontsize=6, color="black" if is_kept else "grey")
        axis_row[0].set_ylabel(f"cluster {cluster}", fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "tldr_reduction_clusters.png", dpi=110)
    plt.close(figure)


STUDY = Study(
    folder="tldr_reduction",
    paper="TL;DR (arXiv 2305.20087)",
    stands_for="CC3M",
    corpus="Scenes of one emoji: 8,000 pictures, of which 1,000 are not near copies of others, 30 % of the captions "
    "exchanged or generic; T_g is an oracle's, wrong in 20 %; codes are of EfficientNet-Lite0, pretrained on "
    "ImageNet-1k; both towers of the arms are from scratch",
    before=BEFORE,
    stages=tuple(reductions()),
    arms=ARMS,
    minutes={"core": 3, "all": 17},
    terms="T_o: the original captions. Selection: a share of each cluster of similar pictures is kept (a third here, "
    "a quarter on photographs), against as many at random. Refinement: a generated caption is appended to T_o. TL;DR: "
    "both. The paper's numbers are of text recall, those on scenes of naming.",
    evaluate=evaluate,
    metrics=METRICS,
    seeds=tuple(range(1000, 1030)),
    sets=SETS,
    floor_files=reduced,
    floors=FLOORS,
    claims=CLAIMS,
    more_rows=more_rows,
    plot=plot,
)

if __name__ == "__main__":
    runner.main(STUDY)
