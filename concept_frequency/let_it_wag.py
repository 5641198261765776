"""Build a benchmark of the concepts that are rarest in pretraining sets: `python -m concept_frequency.let_it_wag`.

Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:let_it_wag_datasets/`. Steps (appendix H): select
the least frequent concepts and collect their images; remove outliers and duplicates by features of an ImageNet network;
check by hand (left to you); remove near-duplicates by perceptual hash; balance the classes. Writes a set in the
CLIP-benchmark layout with the paper's 80 templates, which `concept_frequency.evaluate`, clip-benchmark and all folders
here can evaluate. datasets.py converts the set that the authors released.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
import tyro
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.fft import dctn
from scipy.spatial.distance import cdist

from concept_frequency.curve import read_counts
from concept_frequency.datasets import png, write_set
from shared import cli, data, tars
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.settings import Count, Whole, check_limits


def select_tail(counts: Sequence[dict[str, int]], n: int = 290, zeros: bool = True) -> list[str]:
    """The n concepts with the lowest total count over all pretraining sets, among concepts counted in all sets.

    Ties are sorted by name. `zeros=False` leaves out concepts with a total of 0. Appendix H.1 has this rule, for counts
    of LAION-400M only, but lists three concepts with a count of 0; section 6 uses all pretraining sets.
    """
    names = set.intersection(*(set(each) for each in counts))
    total = {name: sum(each[name] for each in counts) for name in names}
    return sorted((name for name in names if zeros or total[name]), key=lambda name: (total[name], name))[:n]


def unit(features: ArrayLike) -> NDArray[np.float32]:
    """Features (n, D) normalised to length 1."""
    x = np.asarray(features, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nearest(features: ArrayLike, batch_size: int = 1024) -> NDArray[np.float32]:
    """(n,) cosine similarity of each image to the most similar other one, from features (n, D)."""
    x, found = unit(features), []
    for start in range(0, len(x), batch_size):
        similarity = x[start : start + batch_size] @ x.T
        similarity[np.arange(len(similarity)), start + np.arange(len(similarity))] = -1  # itself
        found.append(similarity.max(axis=1))
    return np.concatenate(found)


def outliers(features: ArrayLike, share: float = 0.05) -> list[int]:
    """Indices of the `share` of images that are least similar to their nearest image, from features (n, D).

    Source: appendix H.2, step 3. The paper removes the images in the lowest 5 % of all pairwise cosine similarities
    (with fastdup, which uses each image's most similar one).
    """
    similarity = nearest(features)
    return np.sort(np.argsort(similarity, kind="stable")[: int(share * len(similarity))]).tolist()


def feature_duplicates(features: ArrayLike, threshold: float = 0.9) -> list[int]:
    """Indices of images to remove so that no two have a cosine similarity above `threshold`. Appendix H.2, step 4.

    The paper uses 0.9 for common classes and 0.95 for fine-grained ones. An image is removed if it is too similar to an
    earlier image that is kept.
    """
    x = unit(features)
    close = x @ x.T > threshold
    np.fill_diagonal(close, False)
    return removed(close, range(len(close)))


def phash(image: Image.Image | ArrayLike) -> NDArray[np.bool_]:
    """Perceptual hash, (64,) bits, of an image or an array (H, W, 3) of 0..255.

    The image is resized to 32x32 (Lanczos), converted to grey and transformed by a 2D cosine transform; each of the
    lowest 8x8 coefficients is compared with their median, which excludes the constant term. imagededup's PHash, used in
    U:let_it_wag_datasets/deduplicate_let_it_wag_datasets.py:12.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image).astype(np.uint8))
    grey = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS).convert("L"), dtype=np.float64)
    low = dctn(grey)[:8, :8].flatten()
    return low >= np.median(low[1:])


def hamming_distances(bits: ArrayLike) -> NDArray[np.int64]:
    """(n, n) number of differing bits of hashes (n, 64)."""
    return cdist(bits, bits, "cityblock").astype(np.int64)


def deduplicate(hamming: ArrayLike, order: Sequence[int], max_distance: int = 10) -> list[int]:
    """Sorted indices of near-duplicates to remove, from Hamming distances (n, n).

    Source: U:let_it_wag_datasets/deduplicate_let_it_wag_datasets.py:22. Images are visited in `order`; each one that is
    not removed yet removes all others within `max_distance`. The order decides which images stay: upstream uses that of
    the file system, ours is by name.
    """
    close = np.asarray(hamming) <= max_distance
    np.fill_diagonal(close, False)
    return removed(close, order)


def removed(close: NDArray[np.bool_], order: Sequence[int]) -> list[int]:
    """Indices that are removed if each remaining image, visited in `order`, removes all images close (n, n) to it."""
    gone = np.zeros(len(close), dtype=bool)
    for image in order:
        if not gone[image]:
            gone |= close[image]
    return np.flatnonzero(gone).tolist()


def balance_classes(
    files: dict[str, Sequence[str]],
    per_class: int = 450,
    generator: torch.Generator | None = None,
    suffix: str = ".jpg",
) -> dict[str, list[str]]:
    """Draw `per_class` files of each class with *more than* `per_class` images; classes with most images come first.

    Source: U:let_it_wag_datasets/class_balance_let_it_wag_datasets.py:14. Upstream counts `.jpg` files but draws from
    all files, without a seed; here only images are drawn.
    """
    images = {name: sorted(file for file in rows if suffix in file) for name, rows in files.items()}
    kept = sorted((name for name in images if len(images[name]) > per_class), key=lambda name: -len(images[name]))
    draw = {name: torch.randperm(len(images[name]), generator=generator)[:per_class].tolist() for name in kept}
    return {name: [images[name][i] for i in draw[name]] for name in kept}


# ------------------------------------------------------------------------------------------------------------ the build


@dataclasses.dataclass
class Config:
    """Build a tail benchmark from counts and images."""

    counts: tuple[str, ...]
    """Files of counts, one for each pretraining set, all counted by the same method: JSON name -> number, or parquet or
    CSV as for `concept_frequency.curve`."""
    images: tuple[str, ...]
    """Sources of images: folders with one subfolder per concept, or sets in the CLIP-benchmark layout."""
    out: str = "data/let_it_wag"
    """Folder of the benchmark."""
    n: Count = 290
    """Number of least frequent concepts."""
    per_class: Count = 450
    """Images per class; classes without more images than that are left out."""
    zeros: bool = True
    """Include concepts with a count of 0 in all pretraining sets."""
    network: str = ""
    """timm network with ImageNet weights that finds outliers and duplicates (`inception_v3`); empty: keep them."""
    similarity: float = 0.9
    """Cosine similarity of features above which images are duplicates: 0.9, or 0.95 for fine-grained classes."""
    max_distance: int = 10
    """Images are near-duplicates if their hashes differ in at most this number of the 64 bits."""
    seed: Whole = 0
    """Seed of the draw of each class's images."""


def collect(folders: Sequence[str], names: set[str]) -> dict[str, list[Image.Image]]:
    """{concept: its images} from class folders or evaluation sets; underscores in names are read as spaces."""
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
            raise UserError(f"{folder} is not a folder: --images takes class folders or evaluation sets")
        for place in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
            if (name := plain.get(place.name.replace("_", " "))) is not None:
                for file in sorted(place.iterdir()):
                    if file.suffix.lower().lstrip(".") in tars.IMAGE_EXTENSIONS:
                        found[name].append(data.decode_image(file.read_bytes()))
    return found


@torch.inference_mode()
def embed(images: Sequence[Image.Image], network: str) -> NDArray[np.float32]:
    """Features (n, D) of a timm network with ImageNet weights."""
    model = timm.create_model(network, pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return torch.cat([model(transform(image)[None]) for image in images]).numpy()


def clean(images: dict[str, list[Image.Image]], network: str, similarity: float) -> dict[str, list[Image.Image]]:
    """Remove outliers of all images, then duplicates within each concept, by features of a network."""
    names = [name for name, of in images.items() for _ in of]
    pool = [image for of in images.values() for image in of]
    if not pool:
        return images
    features = embed(pool, network)
    outlying = set(outliers(features))
    found: dict[str, list[Image.Image]] = {name: [] for name in images}
    for name in images:
        rows = [i for i, own in enumerate(names) if own == name and i not in outlying]
        duplicates = set(feature_duplicates(features[rows], similarity)) if rows else set()
        found[name] = [pool[i] for k, i in enumerate(rows) if k not in duplicates]
    return found


def build(cfg: Config) -> dict[str, int]:
    """Write the benchmark. Returns {concept: number of its images without near-duplicates}. UserError for a number out
    of range."""
    check_limits(cfg)
    if not -1 <= cfg.similarity <= 1:
        raise UserError(f"--similarity {cfg.similarity} should be a cosine, from -1 to 1")
    if not 0 <= cfg.max_distance <= 64:
        raise UserError(f"--max-distance {cfg.max_distance} should be a number of bits, from 0 to 64")
    tail = select_tail([read_counts(path) for path in cfg.counts], cfg.n, cfg.zeros)
    if len(tail) < cfg.n:
        raise UserError(f"--n {cfg.n} is more than the {len(tail)} concepts in all of --counts: lower it")
    images = collect(cfg.images, set(tail))
    if cfg.network:
        images = clean(images, cfg.network, cfg.similarity)
    kept: dict[str, list[str]] = {}
    for name in tail:
        hashes = np.array([phash(image) for image in images[name]], dtype=np.int64).reshape(-1, 64)
        duplicates = set(deduplicate(hamming_distances(hashes), range(len(hashes)), cfg.max_distance))
        kept[name] = [f"{i}.jpg" for i in range(len(hashes)) if i not in duplicates]
    chosen = balance_classes(kept, cfg.per_class, torch.Generator().manual_seed(cfg.seed))
    if not chosen:
        most = max(map(len, kept.values()), default=0)
        raise UserError(f"no concept has more than --per-class {cfg.per_class} images (at most {most}): lower it")
    classes = [name for name in tail if name in chosen]
    rows = ((c, images[name][int(file.partition(".")[0])]) for c, name in enumerate(classes) for file in chosen[name])
    write_set(Path(cfg.out), classes, ((label, {"png": png(image)}) for label, image in rows))
    return {name: len(kept[name]) for name in tail}


def main(cfg: Config) -> None:
    """Build the benchmark and print its number of classes."""
    left = build(cfg)
    print(
        f"{cfg.out}: {sum(n > cfg.per_class for n in left.values())} of {len(left)} least frequent concepts, "
        f"{cfg.per_class} images each"
    )


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
