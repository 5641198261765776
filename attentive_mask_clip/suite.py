"""The paper's zero-shot suite: names of its 26 sets, and their class names and templates from a clone of SLIP.

SLIP (facebookresearch/SLIP@c6faf5d, cited as `S:`) has names and templates in labels.json and templates.json, which
the suite of A-CLIP (microsoft/A-CLIP@0e51942, cited as `U:`) reads. This project contains no copy: `--slip PATH` is the
path of a clone.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shared import checkpoints
from shared.errors import UserError
from shared.evalsets import EvalSet

# SLIP's name of a set (S:dataset_catalog.json) and CLIP-benchmark's; None: CLIP-benchmark does not have the set.
# CLIP-benchmark's code supports food101 and cub, but none of its lists of sets includes them.
SUITE: dict[str, str | None] = {
    "food101": "food101",
    "cifar10": "vtab/cifar10",
    "cifar100": "vtab/cifar100",
    "cub200": "vtab/cub",
    "sun397": "sun397",
    "cars": "cars",
    "aircraft": "fgvc_aircraft",
    "dtd": "vtab/dtd",
    "pets": "vtab/pets",
    "caltech101": "vtab/caltech101",
    "flowers": "vtab/flowers",
    "mnist": "mnist",
    "fer2013": "fer2013",
    "stl10": "stl10",
    "eurosat": "vtab/eurosat",
    "resisc45": "vtab/resisc45",
    "gtsrb": "gtsrb",
    "kitti_distance": "vtab/kitti_closest_vehicle_distance",
    "country211": "country211",
    "patch_camelyon": "vtab/pcam",
    "ucf101_frames": None,
    "kinetics700_frames": None,
    "clevr_counts": "vtab/clevr_count_all",
    "hateful_memes": None,
    "rendered_sst2": "renderedsst2",
    "imagenet": "imagenet1k",
}
NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
FILES = ("labels.json", "templates.json")  # of SLIP: class names, templates


class Prompts(NamedTuple):
    """A set's class names, by label, each with its synonyms; and its templates, in which `{c}` is the class name."""

    classnames: list[list[str]]
    templates: list[str]


def suite_name(folder: str) -> str | None:
    """Folder name -> SLIP's name of the set; None if it is not one of the 26.

    The folder has SLIP's or CLIP-benchmark's name of the set: cifar10, vtab-cifar10, wds_vtab-cifar10.
    """
    name = folder.lower().removeprefix("wds_").removeprefix("vtab-")
    known = {benchmark.rpartition("/")[2]: slip for slip, benchmark in SUITE.items() if benchmark}
    return name if name in SUITE else known.get(name)


def reported(name: str) -> str:
    """The metric that the suite reports for a set, by its name. U:eval_zeroshot.py:89-102.

    Mean per class for aircraft, pets, caltech101 and flowers; mean of top-1 and top-5 for kinetics; ROC AUC for hateful
    memes; top-1 for all others.
    """
    name = name.lower()
    if any(part in name for part in ("aircraft", "pets", "caltech101", "flowers")):
        return "mean_per_class"
    return "top1_top5" if "kinetics" in name else "roc_auc" if "hateful" in name else "top1"


def plain(name: str) -> str:
    """A class name for matching: lower case, numbers up to ten as digits, no numbering, punctuation or spaces."""
    words = re.sub(r"^\d+\.", "", name.lower()).replace("_", " ").split()  # 001.Black_footed_Albatross
    return re.sub(r"[\W_]", "", "".join(NUMBERS.get(word, word) for word in words))


def in_order_of(classnames: Sequence[str], entries: Sequence[list[str]], where: str) -> list[list[str]]:
    """SLIP's `entries`, each a class with its synonyms, in the order of a set's own `classnames`.

    Label numbers differ: SLIP's pets start with the cats, CLIP-benchmark's are alphabetical. If every class is found by
    name, classes are matched by name. Otherwise both orders are assumed to be equal if at least half of the names are
    found, each at the same position in both lists; the others are worded differently, or occur twice (ImageNet's
    missile). UserError in any other case.
    """
    if len(classnames) != len(entries):
        raise UserError(f"{where} has {len(classnames)} classes, but SLIP's labels.json has {len(entries)}")
    places: dict[str, set[int]] = {}
    for i, synonyms in enumerate(entries):
        for name in synonyms:
            places.setdefault(plain(name), set()).add(i)
    found = [places.get(plain(name), set()) for name in classnames]
    if all(len(at) == 1 for at in found) and len(set().union(*found)) == len(entries):
        return [list(entries[i]) for at in found for i in at]
    if 2 * sum(map(bool, found)) >= len(entries) and all(i in at for i, at in enumerate(found) if at):
        return [list(synonyms) for synonyms in entries]
    other = next(name for i, (name, at) in enumerate(zip(classnames, found, strict=True)) if i not in at)
    raise UserError(f"the classes of {where} do not match SLIP's labels.json, which has no {other!r} at that position")


def read_prompts(clone: str | Path, sets: Sequence[EvalSet]) -> dict[str, Prompts]:
    """Prompts of evaluation sets from a clone of SLIP, by folder name. UserError if a set is not one of the 26."""
    files = [Path(clone) / name for name in FILES]
    for file in files:
        if not file.is_file():
            raise UserError(f"--slip {clone} is not a clone of facebookresearch/SLIP: it has no {file.name}")
    labels, templates = map(checkpoints.read_json, files)
    found: dict[str, Prompts] = {}
    seen: dict[str, str] = {}
    for each in sets:
        name = suite_name(each.name)
        if name is None:
            raise UserError(f"--prompts slip: {each.folder} is not one of the suite's sets: {', '.join(SUITE)}")
        if name in seen:
            raise UserError(f"--prompts slip: {seen[name]} and {each.folder} are both the suite's {name}")
        seen[name] = str(each.folder)
        entries = [[entry] if isinstance(entry, str) else entry for entry in labels.get(name) or []]
        theirs = templates.get(name)
        if not entries or not all(map(are_texts, (theirs, *entries))) or not all("{}" in text for text in theirs):
            raise UserError(f"{clone} has no class names or no templates of {name}")
        ours = [template.replace("{}", "{c}") for template in theirs]
        found[each.name] = Prompts(in_order_of(each.classnames, entries, str(each.folder)), ours)
    return found


def are_texts(value: Any) -> bool:
    """Whether a JSON value is a list of one or more strings."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)


def averages(values: Mapping[str, float], prompts: str) -> dict[str, float]:
    """Means over sets. `average_measured`: over all evaluated sets. `average_26`, the paper's mean: only if SLIP's
    prompts are used and all 26 sets are evaluated. Input: the reported metric of each set, by folder name."""
    if not values:
        return {}
    mean = sum(values.values()) / len(values)
    whole = prompts == "slip" and {suite_name(name) for name in values} == set(SUITE) and len(values) == len(SUITE)
    return {"average_measured": mean} | ({"average_26": mean} if whole else {})


def rows(measured: Mapping[str, float]) -> list[dict[str, str]]:
    """Table rows of a checkpoint's metrics, {"FOLDER/metric": percent}, in the suite's order, with averages below."""
    folders = {suite_name(key.removesuffix("/metric")): key for key in measured if key.count("/") == 1}
    found = []
    for name in SUITE:
        value = measured.get(folders.get(name, ""), math.nan)
        if not math.isnan(value):
            found.append({"set": name, "reported": reported(name), "%": f"{value:.1f}"})
    mean = f"mean of {len(found)} sets"
    for name in ("average_measured", "average_26"):
        if name in measured:
            found.append({"set": name, "reported": mean, "%": f"{measured[name]:.1f}"})
    return found
