"""Converts downloaded photograph data sets to training shards and evaluation sets; downloads nothing.

    python -m studies.corpora.photos flickr8k --root PATH [--multi30k PATH] --out data/flickr8k
    python -m studies.corpora.photos pacs --root PATH --out data/pacs          (also: cifar10, coco)

    train/{00000..}.tar    img2dataset layout: the photograph's file, .txt, .json (file, all captions)
    eval/<set>/            CLIP-benchmark webdataset layout
    manifest.json          setting, counts, broken photographs, licence note, sha256 of every shard

The input layouts are in the docstrings of the classes. Unreadable photographs are left out, counted and reported.
"""

import gzip
import io
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.path import Path as Outline
from PIL import Image
from tqdm import tqdm

from shared import checkpoints, cli, data, layout
from shared.errors import UserError
from shared.settings import Count, check_limits
from shared.tars import IMAGE_EXTENSIONS, write_split
from studies.corpora.masks import write_masks

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which UTF-8 cannot hold
SUFFIXES = (".jpg", ".jpeg", ".png")
LANGUAGES = ("en", "de", "fr", "cs")  # of Multi30k
MULTI30K = [f"multi30k_{language}" for language in LANGUAGES]
# Lists of COCO's files, and the keys of their items with their types
IMAGES = {"images": {"id": int, "file_name": str, "height": int, "width": int}}
CAPTIONS = IMAGES | {"annotations": {"id": int, "image_id": int, "caption": str}}
INSTANCES = IMAGES | {
    "annotations": {"id": int, "image_id": int, "category_id": int, "iscrowd": int}
    | {"segmentation": (list, dict), "area": (int, float)},
    "categories": {"id": int, "name": str},
}
HELD_OUT = 5  # 1 / HELD_OUT of the photographs of each class and domain of PACS is held out, at random


@dataclass
class Photographs:
    """Options that all data sets share."""

    root: Path
    """Folder of the data set."""
    out: Path
    """Output folder. It appears only when it is complete."""
    image_size: Count | None = None
    """Resize larger photographs to this shorter side in pixels; None: no resizing."""
    strict: bool = False
    """Stop at the first broken image instead of counting it."""

    recipe = 1  # version; increased when the output for the same photographs and setting changes

    def __post_init__(self):
        self.broken: list[data.Broken] = []
        self.used: list[Path] = []

    def find(self, path: Path, layout_says: str) -> Path:
        """`path`; records its files as sources of the corpus. UserError if it does not exist or a name is not UTF-8."""
        if not path.exists():
            raise UserError(f"{path} is missing: {layout_says}")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        if odd := next((file for file in files if SURROGATE.search(str(file))), None):
            raise UserError(f"the name of {str(odd)!r} is not UTF-8: rename the file")
        self.used += files
        return path

    def read(self, file: Path) -> dict[str, bytes] | None:
        """{file ending: bytes} of a photograph; None if it cannot be read, which is recorded."""
        kind = file.suffix.lower().removeprefix(".")
        try:
            if kind not in IMAGE_EXTENSIONS:
                raise data.BrokenSample(f"its name ends in none of {', '.join(IMAGE_EXTENSIONS)}")
            content = data.read_file(file)
            picture = data.decode_image(content)
        except data.BrokenSample as error:
            if self.strict:
                raise UserError(f"--strict: {file}: {error}") from error
            self.broken.append(data.Broken(file.relative_to(self.root).as_posix(), str(error)))
            return None
        if self.image_size and min(picture.size) > self.image_size:
            scale = self.image_size / min(picture.size)
            target = io.BytesIO()
            size = tuple(max(round(side * scale), self.image_size) for side in picture.size)
            picture.resize(size, Image.BICUBIC).save(target, "png" if kind == "png" else "jpeg", quality=95)
            content = target.getvalue()
        return {kind: content}

    def read_all(self, files: Iterable, label: str) -> Iterator[tuple]:
        """(file, content, ...) for each readable (file, ...). UserError if there are none."""
        files, found = list(files), False
        for file, *rest in tqdm(files, label, unit="image", disable=None):
            if (content := self.read(file)) is not None:
                found = True
                yield file, content, *rest
        if not found:
            raise UserError(f"none of the {len(files)} photographs of {self.root} ({label}) can be read")

    def build(self) -> None:
        """Writes shards, evaluation sets and manifest; a finished folder is left unchanged."""
        check_limits(self)
        listing = self.plan()
        sizes = [f"{file.parent.name}/{file.name} {file.stat().st_size}" for file in self.used if file.is_file()]
        setting = layout.setting_of(self, self.recipe) | {"files": data.fingerprint("\n".join(sizes).encode())}

        def write(folder: Path) -> dict:
            counts = self.write(folder, listing)
            broken = dict(sorted(self.broken))
            return {"counts": counts | {"broken": len(broken)}, "broken": broken, "licence": self.licence}

        layout.build(self.out, setting, write)
        if line := data.broken_report(self.broken, "left out"):
            print(line)

    def write_captioned(self, folder: Path, captioned: dict[Path, dict], every_caption: bool) -> dict[str, int]:
        """Writes training shards of {photograph: its .json, with "captions"}; returns the numbers of photographs and
        samples that were written."""
        photographs = 0

        def samples() -> Iterator[dict]:
            nonlocal photographs
            for file, content, about in self.read_all(captioned.items(), "train"):
                photographs += 1
                for text in about["captions"] if every_caption else about["captions"][:1]:
                    yield content | {"txt": text, "json": {"file": file.name} | about}

        count = layout.write_pairs(folder, samples())
        return {"photographs": photographs, "train": count}

    def write_retrieval(self, folder: Path, captions: dict[Path, list[str]]) -> int:
        pairs = self.read_all(captions.items(), folder.name)
        return layout.write_retrieval(folder, (content | {"txt": "\n".join(texts)} for _, content, texts in pairs))

    def write_labelled(self, folder: Path, files: list[tuple[Path, int]]) -> int:
        found = self.read_all(files, f"{folder.parent.name}/{folder.name}")
        return write_split(folder, (content | {"cls": str(label)} for _, content, label in found))


def one_line(text: str) -> str:
    return " ".join(text.split())


def check_names(names: list[str], file: Path) -> None:
    """UserError if `file` names a photograph twice, or by something else than the name of a file in its folder."""
    if odd := next((name for name in names if name != Path(name).name), None):
        raise UserError(f"{file} names the photograph {odd!r}: it should be the name of a file, without folders")
    if len(set(names)) < len(names):
        raise UserError(f"{file} names the photograph {Counter(names).most_common(1)[0][0]} twice")


def read_lines(file: Path) -> list[str]:
    """Lines of a UTF-8 text file, gzipped if its name ends in .gz. UserError if it is not such a file."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return content.decode("utf-8-sig").rstrip("\n").split("\n")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file} is no {'gzipped ' if file.suffix == '.gz' else ''}UTF-8 text ({error})") from error


# ----------------------------------------------------------------------------------------------------------- Flickr8k


@dataclass
class Flickr8k(Photographs):
    """Flickr8k: retrieval in English, Arabic and, with Multi30k, German, French and Czech.

    Layout: Images/*.jpg, Flickr8k.token.txt (name.jpg#k<tab>caption), Flickr_8k.{train,dev,test}Images.txt; optional
    Flickr8k.arabic.full.txt. Sets: retrieval_en, retrieval_ar, and retrieval_multi30k_{en,de,fr,cs} of the photographs
    that have a translation; retrieval_long_en, with one text per photograph, its captions joined; retrieval_dev_*, the
    same sets from the development split.
    """

    multi30k: Path | None = None
    """Multi30k's folder: image_splits/{train,val,test_2016_flickr}.txt, raw/{same}.{en,de,fr,cs}.gz."""
    every_caption: bool = False
    """Write one sample per caption instead of one sample with the first caption."""
    joined_lines = 0
    recipe = 2
    licence = (
        "Photographs belong to their authors on Flickr; Flickr8k is for non-commercial research and education. "
        "Translations are Multi30k's and of the Arabic Flickr8k, under the terms of these."
    )

    def plan(self) -> dict[str, dict[Path, dict]]:
        """{split: {photograph: {"captions": [...], "captions_de": [...], ...}}}."""
        says = "Flickr8k has Images/, Flickr8k.token.txt and Flickr_8k.{train,dev,test}Images.txt"
        images = self.find(self.root / "Images", says)
        texts = {"captions": self.captions(self.find(self.root / "Flickr8k.token.txt", says))}
        if (arabic := self.root / "Flickr8k.arabic.full.txt").exists():
            texts["captions_ar"] = self.captions(self.find(arabic, says))
        translations = self.translations() if self.multi30k else {}
        splits: dict[str, dict[Path, dict]] = {}
        for split in ("train", "dev", "test"):
            splits[split] = {}
            file = self.find(self.root / f"Flickr_8k.{split}Images.txt", says)
            names = [name for line in read_lines(file) if (name := line.strip())]
            check_names(names, file)
            if not names:
                raise UserError(f"{file} names no photographs: {says}")
            for other in splits:
                if both := [name for name in names if images / name in splits[other]]:
                    raise UserError(
                        f"{file} puts the photograph {both[0]} into the {split} split, but the {other} split has it too"
                    )
            for name in names:
                about = {kind: of[name] for kind, of in texts.items() if name in of}
                if "captions" not in about:
                    raise UserError(f"{self.root}/Flickr8k.token.txt has no caption of {name} of the {split} split")
                splits[split][images / name] = about | translations.get(name.partition("_")[0], {})
        return splits

    def captions(self, file: Path) -> dict[str, list[str]]:
        """{file name: captions} from lines name#k<tab>caption; a line without a name continues the line before."""
        entries: list[list[str]] = []
        for line in read_lines(file):
            name, tab, text = line.partition("\t")
            if tab and "#" in name:
                entries.append([name, text])
            elif not entries:
                raise UserError(f"{file} does not begin with name.jpg#k<tab>caption")
            else:  # the Arabic file has a line break within a caption
                entries[-1][1] += line
                self.joined_lines += 1
        found = defaultdict(list)
        for name, text in entries:
            if text := one_line(text):
                found[name.rpartition("#")[0]].append(text)
            else:
                self.broken.append(data.Broken(name, "empty caption"))
        return found

    def translations(self) -> dict[str, dict[str, list[str]]]:
        """{photograph's number, which begins its file name in Flickr8k: {"captions_multi30k_de": [...], ...}}."""
        says = (
            "Multi30k has image_splits/{train,val,test_2016_flickr}.txt and raw/{same}.{en,de,fr,cs}.gz, line by line"
        )
        found: dict[str, dict[str, list[str]]] = defaultdict(dict)
        for split in ("train", "val", "test_2016_flickr"):
            names = read_lines(self.find(self.multi30k / f"image_splits/{split}.txt", says))
            for language in LANGUAGES:
                lines = read_lines(file := self.find(self.multi30k / f"raw/{split}.{language}.gz", says))
                if len(lines) != len(names):
                    raise UserError(f"{file} has {len(lines)} lines for the {len(names)} names of {split}.txt")
                for name, text in zip(names, lines, strict=True):
                    if text := one_line(text):
                        found[name.strip().removesuffix(".jpg")][f"captions_multi30k_{language}"] = [text]
        return found

    def write(self, folder: Path, splits: dict[str, dict[Path, dict]]) -> dict[str, int]:
        counts = self.write_captioned(folder / "train", splits["train"], self.every_caption)
        counts["joined_lines"] = self.joined_lines
        kinds = {"captions": "en", "joined": "long_en", "captions_ar": "ar"}
        kinds |= {f"captions_{name}": name for name in MULTI30K}
        for split, start in (("test", "retrieval_"), ("dev", "retrieval_dev_")):
            for about in splits[split].values():
                about["joined"] = [" ".join(text.rstrip(" .") + "." for text in about["captions"])]
            for kind, name in kinds.items():
                texts = {file: about[kind] for file, about in splits[split].items() if kind in about}
                if texts:
                    counts[start + name] = self.write_retrieval(folder / "eval" / (start + name), texts)
        return counts


# ------------------------------------------------------------------------------------------------------ PACS, CIFAR-10


class Labelled(Photographs):
    """Photographs in one folder per class."""

    def classes_in(self, folder: Path, layout_says: str) -> dict[str, list[Path]]:
        """{class: its photographs}. UserError if a class has none."""
        self.find(folder, layout_says)
        found = {
            one_line(home.name): [file for file in sorted(home.iterdir()) if file.suffix.lower() in SUFFIXES]
            for home in sorted(folder.iterdir())
            if home.is_dir()
        }
        if not any(found.values()):
            raise UserError(f"{folder} holds no <class>/*.jpg: {layout_says}")
        if empty := [name for name, files in found.items() if not files]:
            raise UserError(f"{folder / empty[0]} holds no photographs: {layout_says}")
        return found

    def write_train(self, folder: Path, files: list[tuple[Path, int]], classes: list[str], prefix: str = "") -> int:
        """Writes shuffled training shards with class names as captions; returns the number of samples."""
        files = random.Random(0).sample(files, len(files))
        samples = (
            content | {"txt": classes[label], "json": {"file": file.name, "name": classes[label], "label": label}}
            for file, content, label in self.read_all(files, f"train {prefix}")
        )
        return layout.write_pairs(folder, samples, prefix)


@dataclass
class PACS(Labelled):
    """PACS: 7 classes in 4 domains, with an evaluation set for each domain.

    Layout: PACS/<domain>/<class>/*.jpg, domains photo, art_painting, cartoon, sketch. A fifth of each class and domain
    is held out. Shards: train/<domain>-{00000..}.tar, so that a domain can be left out. Sets: <domain> with `test` (the
    held-out fifth) and `train` (the rest, for probes); <domain>_all: the whole domain, for models not trained on it.
    """

    licence = "PACS states no licence; its pictures come from Caltech256, Sketchy, TU-Berlin and Google Images."
    domains = ("photo", "art_painting", "cartoon", "sketch")
    templates = ("a photo of a {c}.", "a painting of a {c}.", "a cartoon of a {c}.", "a sketch of a {c}.")

    def plan(self) -> dict[str, dict[str, list[Path]]]:
        says = "PACS has PACS/{photo,art_painting,cartoon,sketch}/<class>/*.jpg"
        found = {domain: self.classes_in(self.root / "PACS" / domain, says) for domain in self.domains}
        for domain, classes in found.items():
            if odd := classes.keys() ^ found["photo"].keys():
                which = f"only one of photo and {domain} has {min(odd)}"
                raise UserError(f"the domains of {self.root}/PACS do not have the same classes, {which}: {says}")
        return found

    def write(self, folder: Path, domains: dict[str, dict[str, list[Path]]]) -> dict[str, int]:
        counts = {}
        for domain, classes in domains.items():
            names, splits = list(classes), {"test": [], "train": []}
            for label, files in enumerate(classes.values()):
                order = random.Random(f"{domain} {label}").sample(files, len(files))
                cut = len(files) // HELD_OUT
                splits["test"] += [(file, label) for file in sorted(order[:cut])]
                splits["train"] += [(file, label) for file in sorted(order[cut:])]
            counts[f"train/{domain}"] = self.write_train(folder / "train", splits["train"], names, f"{domain}-")
            for split in ("test", "train"):
                counts[f"{domain}/{split}"] = self.write_labelled(folder / "eval" / domain / split, splits[split])
            everything = folder / "eval" / f"{domain}_all"
            counts[f"{domain}_all/test"] = self.write_labelled(everything / "test", splits["test"] + splits["train"])
            for home in (folder / "eval" / domain, everything):
                layout.write_classes(home, [name.replace("_", " ") for name in names], self.templates)
        return counts


@dataclass
class CIFAR10(Labelled):
    """CIFAR-10 as folders of pictures: {train,test}/<class>/*.jpg or .png, classes airplane to truck.

    Set: cifar10, with the test pictures as `test` and the training pictures as `train`, for probes.
    """

    licence = "CIFAR-10 states no licence; its photographs were collected from the web for research."
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    kinds = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
    templates = [f"a {kind}photo of {article} {{c}}." for kind in kinds for article in ("a", "the")]

    def plan(self) -> dict[str, list[tuple[Path, int]]]:
        says = f"CIFAR-10 has {{train,test}}/<class>/*.jpg with the classes {', '.join(self.classes)}"
        found = {}
        for split in ("train", "test"):
            classes = self.classes_in(self.root / split, says)
            if tuple(classes) != self.classes:
                raise UserError(f"{self.root / split} has the classes {', '.join(classes)}: {says}")
            found[split] = [(file, label) for label, files in enumerate(classes.values()) for file in files]
        return found

    def write(self, folder: Path, splits: dict[str, list[tuple[Path, int]]]) -> dict[str, int]:
        counts = {"train": self.write_train(folder / "train", splits["train"], list(self.classes))}
        home = folder / "eval/cifar10"
        for split, files in splits.items():
            counts[f"cifar10/{split}"] = self.write_labelled(home / split, files)
        layout.write_classes(home, self.classes, self.templates)
        return counts


# --------------------------------------------------------------------------------------------------------------- COCO


@dataclass
class COCO(Photographs):
    """COCO 2017: captions and instance masks.

    Layout: {train,val}2017/*.jpg, annotations/{captions,instances}_{train,val}2017.json. Photographs may be smaller
    than the annotations say; masks have the annotations' size. Sets: retrieval_val (photographs of val2017, which is
    not Karpathy's test split) and patchdis_val: classnames.txt, images/, masks/ (class of each pixel; 255: no instance,
    or only a crowd). Smaller instances are in front of larger ones.
    """

    every_caption: bool = False
    """Write one sample per caption instead of one sample with the first caption."""
    train_masks: bool = False
    """Also write patchdis_train, the masks of train2017."""
    licence = "COCO's annotations are CC-BY 4.0; its photographs belong to their authors on Flickr."

    def plan(self) -> dict[str, tuple[dict, dict]]:
        """{split: (captions, instances)}, from the JSON files."""
        says = "COCO has {train,val}2017/*.jpg and annotations/{captions,instances}_{train,val}2017.json"
        found = {}
        for split in ("train", "val"):
            self.find(self.root / f"{split}2017", says)
            files = [
                self.find(self.root / f"annotations/{k}_{split}2017.json", says) for k in ("captions", "instances")
            ]
            found[split] = tuple(checkpoints.read_json(file, says) for file in files)
            for file, content, lists in zip(files, found[split], (CAPTIONS, INSTANCES), strict=True):
                check_lists(content, lists, file, says)
            known, instances = {one["id"] for one in found[split][1]["categories"]}, found[split][1]["annotations"]
            if unknown := {one["category_id"] for one in instances} - known:
                raise UserError(
                    f"{files[1]} has instances of category {min(unknown)}, which its categories lack: {says}"
                )
        return found

    def write(self, folder: Path, splits: dict[str, tuple[dict, dict]]) -> dict[str, int]:
        captioned = {}
        for split, (captions, _) in splits.items():
            texts = defaultdict(list)
            for one in sorted(captions["annotations"], key=lambda one: one["id"]):
                texts[one["image_id"]].append(one_line(one["caption"]))
            home, images = self.root / f"{split}2017", sorted(captions["images"], key=lambda image: image["id"])
            captioned[split] = {
                home / image["file_name"]: {"captions": texts[image["id"]], "image_id": image["id"]}
                for image in images
                if texts[image["id"]]
            }
        counts = self.write_captioned(folder / "train", captioned["train"], self.every_caption)
        texts = {file: about["captions"] for file, about in captioned["val"].items()}
        counts["retrieval_val"] = self.write_retrieval(folder / "eval/retrieval_val", texts)
        for split in ("val", "train")[: 1 + self.train_masks]:
            counts[f"patchdis_{split}"] = self.write_masks(folder / f"eval/patchdis_{split}", split, splits[split][1])
        return counts

    def write_masks(self, folder: Path, split: str, instances: dict) -> int:
        """Writes photographs that have instances, with masks of classes; returns the number of images."""
        categories = sorted(instances["categories"], key=lambda category: category["id"])
        label = {category["id"]: i for i, category in enumerate(categories)}
        of_image = defaultdict(list)
        for one in instances["annotations"]:
            of_image[one["image_id"]].append(one)
        images = sorted(instances["images"], key=lambda image: image["id"])
        files = [(self.root / f"{split}2017" / i["file_name"], i) for i in images if of_image[i["id"]]]

        def samples() -> Iterator[tuple[str, bytes, np.ndarray]]:
            for file, content, image in self.read_all(files, folder.name):
                labels = draw_instances(of_image[image["id"]], label, image["height"], image["width"])
                yield file.name, next(iter(content.values())), labels

        return write_masks(folder, [one_line(category["name"]) for category in categories], samples())


def check_lists(content: dict, lists: dict[str, dict[str, Any]], file: Path, layout_says: str) -> None:
    """UserError if COCO's `file` lacks one of `lists` (see IMAGES), or has wrong texts, names or sizes."""
    for name, keys in lists.items():
        rows = content.get(name)
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in keys.items()) for row in rows
        ):
            kinds = ", ".join(sorted(keys))
            raise UserError(f"{file} lacks {name} with {kinds}, or one of these has a wrong type: {layout_says}")
        texts = [row[key] for row in rows for key, kind in keys.items() if kind is str]
        if odd := next((text for text in texts if SURROGATE.search(text)), None):
            raise UserError(f"{file} has the text {odd[:80]!r}, half of a surrogate pair: correct it in the file")
    check_names([image["file_name"] for image in content["images"]], file)
    for image in content["images"]:
        height, width = image["height"], image["width"]
        if min(height, width) < 1 or height * width > data.MAX_PIXELS:
            raise UserError(f"{file} has a photograph of {width} x {height} pixels, {image['file_name']}")


def draw_instances(instances: list[dict], label: dict[int, int], height: int, width: int) -> np.ndarray:
    """(H, W) int16: class of the smallest instance at each pixel, -1 for none or only a crowd."""
    labels = np.full((height, width), -1, np.int16)
    for one in sorted(instances, key=lambda one: (-one["area"], one["id"])):
        if not one["iscrowd"]:
            try:
                labels[instance_mask(one["segmentation"], height, width)] = label[one["category_id"]]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"COCO's instance {one['id']} has no mask for an image of {width} x {height} pixels: {error}"
                ) from error
    return labels


def instance_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """COCO's run lengths, or polygons [x, y, x, y, ...], -> mask (H, W) bool of the pixels whose centres are inside.
    UserError for compressed run lengths.
    """
    mask = np.zeros((height, width), bool)
    if isinstance(segmentation, dict):
        if not isinstance(segmentation["counts"], list):
            raise UserError("an instance has compressed run lengths, which COCO's own annotation files do not have")
        runs = segmentation["counts"]
        if sum(runs) != height * width:
            raise UserError(f"its run lengths have {sum(runs)} pixels")
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    for polygon in segmentation:
        points = np.array(polygon, float).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise UserError("a polygon has a corner that is no number")
        (left, top), (right, bottom) = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int)
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        x, y = np.meshgrid(np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5)
        inside = Outline(points).contains_points(np.stack([x.ravel(), y.ravel()], 1)) if x.size else np.zeros(0, bool)
        mask[top:bottom, left:right] |= inside.reshape(x.shape)
    return mask


BUILDERS = {"flickr8k": Flickr8k, "pacs": PACS, "cifar10": CIFAR10, "coco": COCO}


def main() -> None:
    tyro.extras.subcommand_cli_from_dict(BUILDERS).build()


if __name__ == "__main__":
    cli.command_line(main)
