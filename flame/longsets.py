"""The paper's evaluation sets that are no webdataset shards, read as their authors ship them.

Long captions as FLAME reads them (MIV-XJTU/FLAME@4d2b9a9:src/training/eval_{urban_1k,sharegpt4v,docci,dci}.py).
Crossmodal-3600, Winoground, SugarCrepe and ImageNet's class names in five languages as LAION-AI/CLIP_benchmark@48de38c
reads them, cited as `B:` with paths under clip_benchmark/. Long captions and Crossmodal-3600: one caption per image.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from shared.data import BrokenSample, decode_image
from shared.errors import UserError

Pairs = list[tuple[Path, str]]


def urban1k(root: Path) -> Pairs:
    """image/N.jpg and the first line of caption/N.txt, in the order of N."""
    files = sorted(_folder(root / "caption").glob("*.txt"), key=lambda file: (len(file.stem), file.stem))
    return [(root / "image" / f"{file.stem}.jpg", re.match(r"[^\n]*\n?", _text(file))[0]) for file in files]


def sharegpt4v(root: Path) -> Pairs:
    """The first 1000 records of share-captioner_coco_lcs_sam_1246k_1107.json; images below `root`."""
    records = json.loads(_text(root / "share-captioner_coco_lcs_sam_1246k_1107.json"))[:1000]
    return [(root / one["image"], one["conversations"][1]["value"].replace("\n", " ")) for one in records]


def docci(root: Path) -> Pairs:
    """The test split of docci_descriptions.jsonlines; images in images/."""
    records = [json.loads(line) for line in _lines(root / "docci_descriptions.jsonlines")]
    tests = [one for one in records if one["split"] == "test"]
    return [(root / "images" / one["image_file"], one["description"].replace("\n", " ")) for one in tests]


def dci(root: Path) -> Pairs:
    """All splits of DCI: short and extra caption, split at line ends, </s> and full stops, and joined again."""
    home = root / "densely_captioned_images"
    pairs = []
    for files in json.loads(_text(home / "splits.json")).values():
        for name in files:
            about = json.loads(_text(home / "annotations" / name))
            text = f"{about['short_caption']}\n{about['extra_caption']}"
            sentences = (sentence.strip() for sentence in re.split(r"\n|</s>|[.]", text))
            pairs.append((home / "photos" / about["image"], ". ".join(filter(None, sentences))))
    return pairs


def crossmodal3600(root: Path, language: str) -> Pairs:
    """captions.jsonl and images/KEY.jpg; the first caption of an image. Images without a file are skipped, as
    in B:datasets/crossmodal3600.py."""
    pairs, images = [], 0
    for line in _lines(root / "captions.jsonl"):
        about, images = json.loads(line), images + 1
        path = root / "images" / f"{about['image/key']}.jpg"
        if path.exists():
            pairs.append((path, about[language]["caption"][0]))
    if language == "en" and len(pairs) < images:
        print(f"{images - len(pairs):,} of {images:,} images are missing in {root / 'images'}: they are left out")
    return pairs


LONG_SET_READERS = {"urban1k": urban1k, "sharegpt4v": sharegpt4v, "docci": docci, "dci": dci}


IMAGENET_LANGUAGES = ("ar", "en", "jp", "it", "cn")  # as the files are named


def imagenet_names(root: str | Path) -> dict[str, tuple[list[str], list[str]]]:
    """{language: (1,000 class names, templates with {c})} of clip_benchmark/datasets; B:datasets/builder.py:53-66."""
    found = {}
    for language in IMAGENET_LANGUAGES:
        names, templates = (
            Path(root) / f"{language}_{kind}.json" for kind in ("classnames", "zeroshot_classification_templates")
        )
        try:
            found[language] = tuple(json.loads(_text(path))["imagenet1k"] for path in (names, templates))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{names} and {templates.name} hold no class names of imagenet1k ({error!r})") from error
    return found


def read_set(reader: Callable[..., Pairs], root: str | Path, *more: str) -> Pairs:
    """Read pairs below `root`. UserError if there are none or the files have another format."""
    try:
        pairs = reader(Path(root), *more)
    except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{root} is not {reader.__name__} in its authors' format ({error!r})") from error
    if not pairs:
        raise UserError(f"{root} holds no image with a caption for {' '.join((reader.__name__, *more))}")
    return pairs


# ---------------------------------------------------------------------------------------------- Winoground, SugarCrepe


class Instance(NamedTuple):
    """Images and captions to be matched: caption i belongs to image i, and further captions are wrong."""

    images: tuple[Path, ...]
    captions: tuple[str, ...]


def winoground(root: Path) -> dict[str, list[Instance]]:
    """Read the hub's folder facebook/winoground with data/images.zip unpacked in place: two images, two captions per
    instance.

    B:datasets/winoground.py.
    """
    found = []
    for line in _text(root / "data/examples.jsonl").splitlines():
        about = json.loads(line)
        images = tuple(root / "data/images" / f"{about[f'image_{i}']}.png" for i in range(2))
        found.append(Instance(images, (about["caption_0"], about["caption_1"])))
    return {"winoground": found}


SUGAR_CREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def sugar_crepe(root: Path) -> dict[str, list[Instance]]:
    """Read COCO's val2017/ and SugarCrepe's seven files beside it: an image, its caption and a wrong one per instance.

    B:datasets/sugar_crepe.py, B:datasets/builder.py:228-244.
    """
    found = {}
    for kind in SUGAR_CREPE:
        entries = json.loads(_text(root / f"{kind}.json")).values()
        found[f"sugar_crepe_{kind}"] = [
            Instance((root / "val2017" / one["filename"],), (one["caption"], one["negative_caption"]))
            for one in entries
        ]
    return found


COMPOSITIONAL_READERS = {"winoground": winoground, "sugar_crepe": sugar_crepe}


def read_instances(name: str, root: str | Path) -> dict[str, list[Instance]]:
    """Read the instances of `name`, a key of COMPOSITIONAL_READERS, in the folder `root` -> {set: instances}.

    UserError if the files have another format.
    """
    try:
        found = COMPOSITIONAL_READERS[name](Path(root))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{root} is not {name} in its authors' format ({error!r})") from error
    if empty := [kind for kind, instances in found.items() if not instances]:
        raise UserError(f"{root} holds no instance of {empty[0]}")
    return found


# --------------------------------------------------------------------------------------------------------------- files


def read_image(path: Path) -> Image.Image:
    """RGB image. UserError if the file is missing or unreadable."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        return decode_image(path.read_bytes())
    except BrokenSample as error:
        raise UserError(f"{path}: {error}") from error


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path} is missing")
    return path


def _lines(path: Path) -> list[str]:
    """Lines of a file, split only at newlines, because captions contain Unicode line separators."""
    return _text(path).removesuffix("\n").split("\n")


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} is missing")
    return path.read_text(encoding="utf-8")
