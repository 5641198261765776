"""What studies on photographs share: the commands that build their corpora, floors that need no training, and cached
measurements of runs.

The folder --photos holds the user's copies of flickr8k, multi30k, pacs, cifar10 and coco, each in its authors' layout
(see studies/corpora/photos.py). Shards are written to data/photos-*; the folder --photos is not changed.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor

from shared import cli, data, evaluation, zeroshot
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.tars import IMAGE_EXTENSIONS, Broken, descriptions, read_tar
from studies.harness import floors
from studies.harness.ceiling import square_pixels
from studies.harness.floors import Floor
from studies.harness.lite0 import in_order, keep_features, known_features, lite0_features
from studies.harness.runner import Once

BUILD, BOTH = "studies.corpora.photos", "--root {photos}/flickr8k --multi30k {photos}/multi30k"
FLICKR8K = Once(f"{BUILD} flickr8k {BOTH} --out data/photos-flickr8k")  # one sample per photograph
CAPTIONS = Once(f"{BUILD} flickr8k {BOTH} --every-caption --out data/photos-captions")  # one sample per caption
PACS = Once(f"{BUILD} pacs --root {{photos}}/pacs --out data/photos-pacs")
CIFAR10 = Once(f"{BUILD} cifar10 --root {{photos}}/cifar10 --out data/photos-cifar10")
SETS = "data/photos-flickr8k/eval"
RETRIEVAL = f"{SETS}/retrieval_en"  # 1,000 photographs, five captions each
JOINED, SINGLE = "data/photos-flickr8k/train", "data/photos-captions/train"  # shards that FLICKR8K and CAPTIONS write
SIDE = 224  # pixels of a photograph for EfficientNet-Lite0
# Computes the features of all these images before parallel runs read them
FEATURES = Once(f"studies.harness.photos {SINGLE} {RETRIEVAL}/test")
FEW = tuple(range(1000, 1005))  # seeds of studies whose runs take longer than a minute
RESIZED = "photographs that (in results/photos) had been squeezed to 128 x 128 pixels"

# ----------------------------------------------------------------------------------------------- features of pictures


def view(image: Image.Image) -> Tensor:
    """PIL image -> its centre square (3, SIDE, SIDE) uint8."""
    return square_pixels(image, SIDE)


def pictures(files: Iterable[Path]) -> list[bytes]:
    """The encoded images of tars, in order."""
    broken: list[Broken] = []
    found = [content for file in files for _, content in read_tar(file, broken, IMAGE_EXTENSIONS)]
    if broken:
        raise UserError(
            f"the shards of photographs have a damaged sample, {broken[0].key} ({broken[0].reason}): build them again"
        )
    return found


def features_of(files: Sequence[Path], pixels: bool = False, side: int | None = None) -> Tensor:
    """EfficientNet-Lite0's features (N, 1280) of the images of tars, resized to `side` (by default SIDE) pixels, cached
    in data/cache; with `pixels`, raw pixels instead."""
    images = pictures(files)
    if pixels:
        return torch.stack([floors.raw_pixels(data.decode_image(image)) for image in images])
    return lite0_features_of_files(images, side or SIDE)


def lite0_features_of_files(files: Sequence[bytes], side: int, cache: str | Path = "data/cache") -> Tensor:
    """`lite0_features` (N, 1280) in fp32 of the `square_pixels` of N encoded images (JPEG, PNG, ...).

    Stored in `cache` by a hash of the file, so that known images are not even decoded. BrokenSample for an image that
    cannot be read.
    """
    store = Path(cache) / f"lite0-files-{side}.npz"
    order, known = [data.file_hash(content) for content in files], known_features(store)
    unseen = {digest: content for digest, content in zip(order, files, strict=True) if digest not in known}
    images = (square_pixels(data.decode_image(content), side) for content in unseen.values())
    batches = iter(lambda: list(itertools.islice(images, 256)), [])
    features = lite0_features(map(torch.stack, batches), precision="fp32")
    new = dict(zip(unseen, features.numpy(), strict=True))
    keep_features(store, new)
    return in_order(order, known | new)


def training_set(
    folder: str | Path, pixels: bool = False, side: int | None = None, own: bool = False
) -> tuple[Tensor, list[list[str]]]:
    """`features_of` training shards, and all captions of each sample's photograph; with `own`, only the text that the
    sample is trained with."""
    files = sorted(Path(folder).glob("*.tar"))
    if own:
        pairs = data.open_pairs(str(folder))
        captions = [[pairs.caption(row)] for row in range(len(pairs))]
    else:
        captions = [about["captions"] for _, about in descriptions(map(str, files))]
    return features_of(files, pixels, side), captions


def test_set(
    folder: str | Path, pixels: bool = False, split: str = "test", side: int | None = None
) -> tuple[Tensor, Tensor | list[list[str]], EvalSet]:
    """`features_of` a split of an evaluation set, labels (N,) or captions of each image, and the set."""
    found = EvalSet(folder, view, split)
    targets = [target for _, target in found.targets()]
    return (
        features_of(found.shards, pixels, side),
        targets if found.kind == "retrieval" else torch.tensor(targets),
        found,
    )


# ------------------------------------------------------------------------------- closed-form canonical correlation


COMMON = 1500  # most common words that are correlated with features
DIRECTIONS = 256  # directions of highest correlation that are kept
RIDGE = 0.1  # of the mean variance, added to the diagonal of each covariance
POWER = 4.0  # each direction is weighted by correlation ** POWER, half of the power in each map


class Correlation(NamedTuple):
    """Linear maps of features (N, D) of images and (N, V) of texts that maximise the correlation of their outputs."""

    x_mean: Tensor
    x_map: Tensor  # (D, at most DIRECTIONS)
    y_mean: Tensor
    y_map: Tensor  # (V, at most DIRECTIONS)
    of_texts: Callable[[Sequence[str]], Tensor]

    def image(self, features: Tensor) -> Tensor:
        return ((features.double() - self.x_mean) @ self.x_map).float()

    def text(self, texts: Sequence[str]) -> Tensor:
        return ((self.of_texts(texts).double() - self.y_mean) @ self.y_map).float()

    def recalls(self, features: Tensor, captions: Sequence[Sequence[str]]) -> dict[str, float]:
        """Retrieval metrics of images with features (N, D) and the captions of each of these images."""
        texts = self.text([text for of_image in captions for text in of_image])
        return zeroshot.retrieval_metrics(self.image(features), texts, zeroshot.owners(captions))

    def top1(self, features: Tensor, labels: Tensor, names: Sequence[str]) -> float:
        """Percent of images with features (N, D) whose label (N,) is that of the name with the largest cosine."""
        images, texts = (F.normalize(each, dim=-1) for each in (self.image(features), self.text(names)))
        return zeroshot.percent((images @ texts.T).argmax(1) == labels)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def bags(texts: Sequence[str], vocabulary: dict[str, int]) -> Tensor:
    """Words of each text -> (N, V) 0/1; words without a column are left out."""
    found = torch.zeros(len(texts), len(vocabulary))
    for row, text in enumerate(texts):
        found[row, [vocabulary[word] for word in words(text) if word in vocabulary]] = 1
    return found


def bags_of_common(texts: Sequence[str]) -> Callable[[Sequence[str]], Tensor]:
    """The function from texts to bags of COMMON words, those that occur in most of these texts."""
    common = Counter(word for text in texts for word in words(text)).most_common(COMMON)
    return functools.partial(bags, vocabulary={word: column for column, (word, _) in enumerate(common)})


def correlate(
    x: Tensor, texts: Sequence[str], of_texts: Callable[[Sequence[str]], Tensor] | None = None
) -> Correlation:
    """Canonical correlation of features (N, D) with those of N texts, by default bags of common words, in float64."""
    of_texts = of_texts or bags_of_common(texts)
    x, y = x.double(), of_texts(texts).double()
    means = x.mean(0), y.mean(0)
    x, y = x - means[0], y - means[1]
    roots = []
    for each in (x, y):
        covariance = each.T @ each / len(each)
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
        variance, directions = torch.linalg.eigh(covariance)
        roots.append(directions * variance.rsqrt() @ directions.T)
    u, correlations, vh = torch.linalg.svd(roots[0] @ (x.T @ y / len(x)) @ roots[1], full_matrices=False)
    weights = correlations[:DIRECTIONS].clamp(0, 1) ** (POWER / 2)
    x_map, y_map = roots[0] @ u[:, :DIRECTIONS] * weights, roots[1] @ vh[:DIRECTIONS].T * weights
    return Correlation(means[0], x_map, means[1], y_map, of_texts)


def by_correlation(
    sets: Sequence[str],
    pixels: bool = False,
    train: str = JOINED,
    side: int | None = None,
    own: bool = False,
    of_texts: Callable[[Sequence[str]], Tensor] | None = None,
) -> dict[str, float]:
    """{"SET/METRIC": percent} of the canonical correlation of EfficientNet-Lite0's features (with `pixels`, of raw
    pixels) with `of_texts`, by default with bags of words. `side`: pixels of the images for EfficientNet-Lite0.

    The text of a training sample is all captions of its photograph, joined; with `own`, its own caption. No gradient
    step is taken. Retrieval sets give recalls, classification sets zero-shot accuracy with their templates.
    """
    features, captions = training_set(train, pixels, side, own)
    found = correlate(features, [" ".join(texts) for texts in captions], of_texts)
    numbers: dict[str, float] = {}
    for folder in sets:
        features, targets, of_set = test_set(folder, pixels, side=side)
        if of_set.kind == "retrieval":
            metrics = found.recalls(features, targets)
        else:
            prompts = [text.replace("{c}", name) for name in of_set.classnames for text in of_set.templates]
            counts = torch.full((len(of_set.classnames),), len(of_set.templates))
            classifier = zeroshot.mean_prompts(found.text(prompts), counts)
            metrics = zeroshot.classification_metrics(F.normalize(found.image(features), dim=-1), targets, classifier)
        numbers |= {f"{of_set.name}/{metric}": value for metric, value in metrics.items()}
    return numbers


def floors_on(
    *sets: str, of: str = "EfficientNet-Lite0", pixels: bool = False, side: int | None = None
) -> tuple[Floor, Floor, Floor]:
    """Chance, and two canonical correlations on these sets, with all captions of a photograph and with single captions.

    of: name of the features in the table; `pixels` and `side` are those of `by_correlation`.
    """
    name = f"canonical correlation of {of} with words"
    return (
        Floor("chance", lambda: floors.chance(sets)),
        Floor(name, lambda: by_correlation(sets, pixels, side=side)),
        Floor(f"{name}, each caption alone", lambda: by_correlation(sets, pixels, SINGLE, side=side, own=True)),
    )


def evaluated(
    paper: str, runs: Sequence[str], measure: Callable[[Path], dict[str, Any]], sets: Sequence[str] = (RETRIEVAL,)
) -> list[dict[str, Any]]:
    """`measure` of each run of the paper on these sets, cached beside its checkpoint."""
    found, files = [], [file for folder in sets for file in evaluation.files_of(folder)]
    for folder in map(Path, runs):
        of_run = functools.partial(measure, folder)
        sources = [folder / "checkpoint.pt", *files]
        found.append(
            evaluation.measured(f"studies.{paper}", folder / "results.json", {"sets": list(sets)}, sources, of_run)
        )
    return found


# ------------------------------------------------------------------------------------------------------ command line


def main(folders: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Compute EfficientNet-Lite0's features of photographs and cache them in data/cache, where runs read them.

    Args:
        folders: Folders of shards.
    """
    for folder in folders:
        if not (files := sorted(folder.glob("*.tar"))):
            raise UserError(f"{folder} holds no shards")
        print(f"{folder}: features of {len(features_of(files)):,} images are in data/cache")


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main))
