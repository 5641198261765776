"""Split the embedded corpus by names, for the study: `python -m studies.flame_new_names`.

    OUT/train/                  training shards without the drawings of about a fifth of the names; captions are names
    OUT/eval/new_names_id/      the drawings of the left-out names in the styles of training
    OUT/eval/new_names_ood/     the drawings of the left-out names in the unseen style
    OUT/manifest.json           settings, counts, sha256 of every shard

No training sample shows an emoji of a left-out name, but captions may contain words of it. Samples keep their
keys, so captions and banks of the whole corpus also serve these shards. Classes of the sets are bare names.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from shared import cli, data, layout, tars
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.run import stable_hash
from shared.settings import Limits, check_limits


@dataclasses.dataclass
class Config:
    corpus: str = "data/emoji"
    """The embedded corpus, as `make data` builds it."""
    out: str = "data/flame/known"
    """Folder to write; it appears only when complete, and a finished one is not changed."""
    every: Annotated[int, Limits(least=2)] = 5
    """Leave about one name in N out of training."""


def is_new(name: str, every: int) -> bool:
    """Whether training leaves out the name: about one name in `every`, by a hash of the name."""
    return stable_hash("new name", name) % every == 0


def write(folder: Path, cfg: Config) -> dict[str, int]:
    """Write shards and evaluation sets; returns the number of samples of each, and of new names."""
    corpus = Path(cfg.corpus)
    known, new = [], []
    for key, files in tars.samples(data.expand_shards(str(corpus / "train")), ("png", "txt", "json")):
        name = json.loads(files["json"])["name"]
        (new if is_new(name, cfg.every) else known).append((name, {"__key__": key} | files | {"txt": name}))
    for number, first in enumerate(range(0, len(known), layout.SHARD)):
        some = [sample for _, sample in known[first : first + layout.SHARD]]
        tars.write_tar(folder / "train" / f"{number:05}.tar", some)
    counts = {"train": len(known)}
    for split in ("id", "ood"):
        whole = EvalSet(corpus / f"eval/bare_names_{split}", None)
        classes = [name for name in whole.classnames if is_new(name, cfg.every)]
        drawings = [(name, sample["png"]) for name, sample in new] if split == "id" else []
        for _, files in tars.samples(map(str, whole.shards), ("png", "cls")):
            drawings.append((whole.classnames[int(files["cls"])], files["png"]))
        labelled = [(classes.index(name), png) for name, png in drawings if name in classes]
        target = folder / f"eval/new_names_{split}"
        layout.write_classes(target, classes, whole.templates)
        samples = ({"png": png, "cls": str(label)} for label, png in labelled)
        counts[target.name] = tars.write_split(target / "test", samples)
        counts[f"names_{split}"] = len(classes)
    return counts


def main(cfg: Config) -> None:
    check_limits(cfg)
    manifest = Path(cfg.corpus) / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{cfg.corpus} holds no corpus: 'make data' builds it")
    setting = {"every": cfg.every, "captions": "names", "corpus": data.fingerprint(manifest.read_bytes())}
    layout.build(Path(cfg.out), setting, lambda folder: {"counts": write(folder, cfg)})


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config, description=__doc__)))
