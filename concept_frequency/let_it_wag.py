"""Let It Wag!: a benchmark of the concepts that pretraining sets hold least. `python -m concept_frequency.let_it_wag`.

Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:let_it_wag_datasets/`. Steps: the least frequent
concepts, images of them, near-duplicates out (per class, perceptual hash), classes balanced. The authors' outlier
removal by a network and their check by hand come before; there is no rule in them to follow. Writes a set in the
CLIP-benchmark layout that `concept_frequency.measure`, clip-benchmark and all folders here evaluate.
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.fft import dct

from concept_frequency.concepts import load_counts
from shared import cli, data, tars
from shared.evalsets import EvalSet
from shared.tars import write_split


def select_tail(counts: Sequence[dict[str, int]], n: int = 290) -> list[str]:
    """The n concepts with the lowest total count over all pretraining sets, of those that every set counted; by name
    where totals are equal.
    """
    names = set.intersection(*(set(each) for each in counts))
    return sorted(names, key=lambda name: (sum(each[name] for each in counts), name))[:n]


def phash(image: Image.Image | ArrayLike) -> NDArray[np.bool_]:
    """(64,) bits: 32x32 by Lanczos, grey, cosine transform of columns and rows, its first 8x8 against their median.

    The rule of imagededup's PHash, which U:let_it_wag_datasets/deduplicate_let_it_wag_datasets.py:12 uses. The median
    leaves out the constant term. An array is (H, W, 3) of 0..255.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image).astype(np.uint8))
    grey = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS).convert("L"), dtype=np.float64)
    low = dct(dct(grey, axis=0), axis=1)[:8, :8].flatten()
    return low >= np.median(low[1:])


def hamming_distances(bits: ArrayLike) -> NDArray[np.int64]:
    """(n, n) number of differing bits of hashes (n, 64)."""
    x = np.asarray(bits, dtype=np.int64)
    return x @ (1 - x).T + (1 - x) @ x.T


def deduplicate(hamming: ArrayLike, order: Sequence[int], max_distance: int = 10) -> list[int]:
    """The images to remove, sorted, from distances (n, n) walked in `order`.

    Source: U:let_it_wag_datasets/deduplicate_let_it_wag_datasets.py:22. An image that is removed already is passed
    over; any other removes all within `max_distance` of it. So the order decides which images stay: upstream's is
    that of the file system, ours is by name.
    """
    close = np.asarray(hamming) <= max_distance
    np.fill_diagonal(close, False)
    removed = np.zeros(len(close), dtype=bool)
    for image in order:
        if not removed[image]:
            removed |= close[image]
    return np.flatnonzero(removed).tolist()


def balance_classes(
    files: dict[str, Sequence[str]],
    per_class: int = 450,
    generator: torch.Generator | None = None,
    suffix: str = ".jpg",
) -> dict[str, list[str]]:
    """{class: per_class files} of the classes with *more than* per_class images, most images first, drawn at random.

    Source: U:let_it_wag_datasets/class_balance_let_it_wag_datasets.py:14, which counts `.jpg` but draws from all files,
    without a seed; here only images are drawn.
    """
    images = {name: sorted(file for file in rows if suffix in file) for name, rows in files.items()}
    kept = sorted((name for name in images if len(images[name]) > per_class), key=lambda name: -len(images[name]))
    draw = {name: torch.randperm(len(images[name]), generator=generator)[:per_class].tolist() for name in kept}
    return {name: [images[name][i] for i in draw[name]] for name in kept}


# ------------------------------------------------------------------------------------------------------------ the build


@dataclasses.dataclass
class Config:
    """Counts and images in, a tail benchmark out."""

    counts: tuple[str, ...]
    """Files of counts, name -> number, one for each pretraining set (all of one method)."""
    images: tuple[str, ...]
    """Where images are: folders with one folder of images a concept, or sets in the CLIP-benchmark layout."""
    out: str = "data/let_it_wag"
    """Folder of the benchmark."""
    n: int = 290
    """How many of the least frequent concepts."""
    per_class: int = 450
    """Images of a class; classes need more than that."""
    max_distance: int = 10
    """Images whose hashes differ in at most so many of 64 bits are near-duplicates."""
    seed: int = 0
    """Which images of a class are drawn."""


def collect(folders: Sequence[str], names: set[str]) -> dict[str, list[Image.Image]]:
    """{concept: its images} from class folders or evaluation sets; spaces and underscores in names are one."""
    plain = {name.replace("_", " "): name for name in names}
    found: dict[str, list[Image.Image]] = {name: [] for name in names}
    for folder in folders:
        if (Path(folder) / "classnames.txt").is_file():
            evaluation = EvalSet(folder, lambda image: image)
            for _, image, label in evaluation:
                if (name := plain.get(evaluation.classnames[label].replace("_", " "))) is not None:
                    found[name].append(image)
            continue
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder} is no folder: --images takes class folders, or an evaluation set")
        for place in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
            if (name := plain.get(place.name.replace("_", " "))) is not None:
                for file in sorted(place.iterdir()):
                    if file.suffix.lower().lstrip(".") in tars.IMAGE_EXTENSIONS:
                        found[name].append(data.decode_image(file.read_bytes()))
    return found


def build(cfg: Config) -> dict[str, int]:
    """Write the benchmark; -> {concept: images it had, near-duplicates left out}."""
    tail = select_tail([load_counts(path) for path in cfg.counts], cfg.n)
    images = collect(cfg.images, set(tail))
    kept: dict[str, list[str]] = {}
    for name in tail:
        hashes = np.array([phash(image) for image in images[name]], dtype=np.int64).reshape(-1, 64)
        removed = set(deduplicate(hamming_distances(hashes), range(len(hashes)), cfg.max_distance))
        kept[name] = [f"{i}.jpg" for i in range(len(hashes)) if i not in removed]
    chosen = balance_classes(kept, cfg.per_class, torch.Generator().manual_seed(cfg.seed))
    if not chosen:
        most = max(map(len, kept.values()), default=0)
        raise ValueError(f"no concept has more than --per-class {cfg.per_class} images; the most is {most}")
    classes = [name for name in tail if name in chosen]
    rows = [(c, images[name][int(file.partition(".")[0])]) for c, name in enumerate(classes) for file in chosen[name]]
    write_set(Path(cfg.out), classes, rows)
    return {name: len(kept[name]) for name in tail}


def write_set(folder: Path, classes: Sequence[str], rows: Sequence[tuple[int, Image.Image]]) -> None:
    """An evaluation set with the plain class name as its prompt; rows are (label, image)."""
    write_split(folder / "test", ({"png": png(image), "cls": str(label)} for label, image in rows))
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def main(cfg: Config) -> None:
    left = build(cfg)
    print(
        f"{cfg.out}: {sum(n > cfg.per_class for n in left.values())} of {len(left)} least frequent concepts, "
        f"{cfg.per_class} images each"
    )


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
