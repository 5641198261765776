"""Convert the authors' test sets to the CLIP-benchmark layout: `python -m concept_frequency.datasets SET`

    python -m concept_frequency.datasets ucf101 --root /data/ucf101 --out data/wds_ucf101
    python -m concept_frequency.datasets let_it_wag --root Let-It-Wag/data --out data/let_it_wag

Twelve classification sets have a JSON file of splits, {train, val, test: [image, label, class name]}, most of them by
Zhou et al. (CoOp). Birdsnap, UCF101, Caltech-256 and CUB are not published in the CLIP-benchmark layout, the others
with different test images. Let It Wag! is read from its released parquet files (bethgelab/Let-It-Wag on the Hugging
Face Hub) or from one folder per class. Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:`,
U:src/downstream_dataloader.py.
"""

import dataclasses
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import open_clip
import pyarrow.parquet as pq
import tyro
from PIL import Image

from concept_frequency.concepts import load_json
from shared import cli, data, tars
from shared.errors import UserError

TEMPLATES = tuple(template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)  # the paper's ensemble of 80
WAG_ENDINGS = ("_bird", "_flowers", "_aircraft", "_food")  # of folder names in Let It Wag!; not part of the class names


class Layout(NamedTuple):
    """Paths of a set's file of splits and of its images, and the authors' numbers of test images and classes."""

    split: str
    images: str
    test_images: int
    classes: int


LAYOUTS = {
    "birdsnap": Layout("split_Birdsnap.json", "images", 11_747, 500),
    "caltech101": Layout("split_zhou_Caltech101.json", "101_ObjectCategories", 2_465, 100),
    "caltech256": Layout("split_Caltech256.json", "256_ObjectCategories", 9_076, 257),
    "cub": Layout("split_CUB.json", "images", 5_794, 200),
    "dtd": Layout("split_zhou_DescribableTextures.json", "images", 1_692, 47),
    "eurosat": Layout("split_zhou_EuroSAT.json", "2750", 8_100, 10),
    "flowers102": Layout("split_zhou_OxfordFlowers.json", "jpg", 2_463, 102),
    "food101": Layout("split_zhou_Food101.json", "images", 30_300, 101),
    "oxfordpets": Layout("split_zhou_OxfordPets.json", "images", 3_669, 37),
    "stanfordcars": Layout("split_zhou_StanfordCars.json", "", 8_041, 196),
    "sun397": Layout("split_zhou_SUN397.json", "SUN397", 19_850, 397),
    "ucf101": Layout("split_zhou_UCF101.json", "UCF-101-midframes", 3_783, 101),
}
WAG = Layout("", "", 290 * 450, 290)


class LabelledImages(NamedTuple):
    """Class names, and (label, encoded image) of each test image."""

    classnames: list[str]
    images: Iterable[tuple[int, bytes]]


# -------------------------------------------------------------------------------------------------------------- readers


def read_split(root: Path, name: str) -> LabelledImages:
    """The test images of a set in LAYOUTS. U:src/downstream_dataloader.py:73-111, 306-352.

    Class names are collected from all splits and sorted by label. For Caltech-256, the prefix up to the dot and `-101`
    are removed. UserError if the file of splits is missing; UserError if labels are not 0, 1, 2, ...
    """
    layout = LAYOUTS[name]
    file = root / layout.split
    if not file.is_file():
        raise UserError(f"{file} does not exist: --root is the folder with {layout.split} and the images")
    splits = load_json(file)
    by_label = {label: title for split in ("train", "val", "test") for _, label, title in splits[split]}
    if sorted(by_label) != list(range(len(by_label))):
        raise UserError(f"{file} has labels other than 0 to {len(by_label) - 1}")
    titles = [by_label[label] for label in range(len(by_label))]
    if name == "caltech256":
        titles = [title.split(".")[1].replace("-101", "") for title in titles]
    return LabelledImages(titles, ((label, read(root / layout.images / path)) for path, label, _ in splits["test"]))


def read(path: Path) -> bytes:
    """The content of an image file; UserError if it does not exist."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return path.read_bytes()


def read_let_it_wag(root: Path) -> LabelledImages:
    """Read Let It Wag! from its released parquet files (columns image and label) or from one folder per class.

    Class names are read from the parquet metadata, or from README.md in the same folder or its parent. Endings that
    mark fine-grained classes are removed, like in U:src/downstream_dataloader.py:266. That loader then sorts the names
    again; here an image keeps the name of its folder.
    """
    files = sorted(root.glob("*.parquet")) or sorted(root.glob("data/*.parquet"))
    if files:
        titles = parquet_classes(files)
        images: Iterator[tuple[int, bytes]] = parquet_images(files)
    else:
        folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        if not folders:
            raise UserError(f"{root} has neither parquet files nor folders of images, so it is not Let It Wag!")
        titles = [folder.name for folder in folders]
        images = (
            (label, file.read_bytes())
            for label, folder in enumerate(folders)
            for file in sorted(folder.iterdir())
            if file.suffix.lower().lstrip(".") in tars.IMAGE_EXTENSIONS
        )
    return LabelledImages([re.sub(f"({'|'.join(WAG_ENDINGS)})$", "", title) for title in titles], images)


def parquet_classes(files: Sequence[Path]) -> list[str]:
    """Class names, sorted by label, of an image set that was written by the library `datasets`."""
    described = (pq.read_schema(files[0]).metadata or {}).get(b"huggingface")
    features = json.loads(described)["info"]["features"] if described else {}
    if names := features.get("label", {}).get("names"):
        return names
    for page in (files[0].parent / "README.md", files[0].parent.parent / "README.md"):
        if page.is_file() and (found := re.findall(r"^ +'(\d+)': (.+)$", page.read_text(encoding="utf-8"), re.M)):
            return [title.strip().strip("'\"") for _, title in sorted(found, key=lambda each: int(each[0]))]
    raise UserError(f"{files[0]} does not name its classes: put README.md beside the parquet files")


def parquet_images(files: Sequence[Path]) -> Iterator[tuple[int, bytes]]:
    """(label, encoded image) of each row. Only one batch of rows is in memory."""
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(256, columns=["image", "label"]):
            for image, label in zip(batch["image"].to_pylist(), batch["label"].to_pylist(), strict=True):
                yield label, image["bytes"]


# --------------------------------------------------------------------------------------------------------------- writer


def encoded(image: bytes) -> dict[str, bytes]:
    """{file ending: bytes} of an encoded image; unchanged if it is JPEG, PNG or WebP, otherwise converted to PNG."""
    kinds = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}
    for start, ending in kinds.items():
        if image.startswith(start):
            return {ending: image}
    try:
        return {"png": png(data.decode_image(image))}
    except data.BrokenSample as error:
        raise UserError(f"an image of {len(image)} bytes cannot be read ({error})") from error


def png(image: Image.Image) -> bytes:
    """The bytes of an image as PNG."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def write_set(
    folder: Path,
    classnames: Sequence[str],
    images: Iterable[tuple[int, dict[str, bytes]]],
    templates: Sequence[str] = TEMPLATES,
) -> int:
    """Write a classification set of (label, {file ending: bytes}). Returns the number of images."""
    number = tars.write_split(folder / "test", (image | {"cls": str(label)} for label, image in images))
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classnames), encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in templates))
    return number


# ----------------------------------------------------------------------------------------------------------- the script


@dataclasses.dataclass
class Config:
    """Convert one test set to the CLIP-benchmark layout."""

    name: Annotated[str, tyro.conf.Positional]
    """birdsnap, caltech101, caltech256, cub, dtd, eurosat, flowers102, food101, oxfordpets, stanfordcars, sun397,
    ucf101 or let_it_wag."""
    root: str
    """Folder with the JSON file of splits and the images; for Let It Wag!, parquet files or one folder per class."""
    out: str
    """Folder to write."""
    templates: str = ""
    """File of prompt templates, one per line, with `{c}` for the class; empty: ImageNet's 80, the paper's choice."""


def checked_images(test: LabelledImages, root: Path) -> Iterator[tuple[int, bytes]]:
    """The images of a set; UserError for a label without a class name."""
    for label, image in test.images:
        if not 0 <= label < len(test.classnames):
            raise UserError(f"{root} has an image with label {label}, but {len(test.classnames)} class names")
        yield label, image


def main(cfg: Config) -> None:
    """Write the set; print its numbers of images and classes beside the authors'."""
    if cfg.name not in (*LAYOUTS, "let_it_wag"):
        raise UserError(f"there is no set {cfg.name!r}: choose {', '.join(LAYOUTS)} or let_it_wag")
    root, layout = Path(cfg.root), LAYOUTS.get(cfg.name, WAG)
    test = read_let_it_wag(root) if cfg.name == "let_it_wag" else read_split(root, cfg.name)
    templates = Path(cfg.templates).read_text(encoding="utf-8").splitlines() if cfg.templates else TEMPLATES
    if wrong := [template for template in templates or [""] if "{c}" not in template]:
        raise UserError(f"--templates {cfg.templates}: {wrong[0]!r} lacks {{c}} for the class")
    images = ((label, encoded(image)) for label, image in checked_images(test, root))
    number = write_set(Path(cfg.out), test.classnames, images, templates)
    print(
        f"{cfg.out}: {number:,} images of {len(test.classnames)} classes; "
        f"the authors have {layout.test_images:,} of {layout.classes}"
    )


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
