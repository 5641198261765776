"""Labelled images for pre-training, tuning and testing (`len`, `labels`, `classnames`, `read(row)`), and label noise.

A data set is given by a path:
    DIR:SPLIT                   CLIP-benchmark webdataset layout (DIR/classnames.txt, DIR/SPLIT/*.tar); DIR:train+val
    DIR                         image folder, DIR/CLASS/*.jpg; classes in the order of their folders' names
    FILE.txt                    lines `path label`, paths relative to the file's folder (DomainNet)
`benchmark` opens the paper's sets: the fourteen of in-domain transfer, DomainNet, ImageNet and its variants.
`flip_labels` and `swap_captions` make the paper's noise in supervision.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning, `U:` = @f249dce, `U0:` = its first, @e9c5fb1.
"""

import functools
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shared.data import BrokenSample, check_absent, decode_image
from shared.errors import UserError
from shared.evalsets import grouped
from shared.index import Strings, cached, fingerprint, forget
from shared.tars import IMAGE_EXTENSIONS, OpenFiles

SMALL = 2**25  # data sets whose files are below 32 MB are kept decoded
LARGE_FOLDERS = 2**22  # bytes of the class folders' directory entries from which on the file list is cached
LABEL_BYTES = 64  # bytes read of a .cls file


class LabelledImages:
    """Images as (file, offset, size), with size -1 for a whole file, and their labels (N,) int64.

    `read` is called by `shared.data.read_or_next`, which counts and replaces broken images.
    """

    def __init__(self, files: Sequence[str], spans: np.ndarray, labels: Sequence[int], classnames: Sequence[str]):
        if not len(labels):
            raise UserError(f"no labelled image in {files[0] if len(files) else 'an empty set'}")
        self.files, self.spans = files, np.asarray(spans, dtype=np.int64).reshape(-1, 3)
        self.labels, self.classnames = np.asarray(labels, dtype=np.int64), list(classnames)
        if not 0 <= self.labels.min() <= self.labels.max() < len(self.classnames):
            raise UserError(
                f"labels {self.labels.min()} to {self.labels.max()} of {files[0]} do not fit {len(classnames)} classes"
            )
        self.strict, self.border, self._files = False, 0, OpenFiles(self.files)
        sizes = self.spans[:, 2]
        self._kept: dict[int, Image.Image] | None = {} if sizes.min() >= 0 and sizes.sum() < SMALL else None

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def keys(self) -> Strings:
        """N strings: the location of each image."""
        return Strings.of(f"{self.files[file]}@{offset}" for file, offset, _ in map(np.ndarray.tolist, self.spans))

    @property
    def num_classes(self) -> int:
        return len(self.classnames)

    @property
    def fingerprint(self) -> str:
        """Hash of keys and labels."""
        return fingerprint(self.keys.text, self.keys.ends, self.labels.tobytes())

    def read(self, row: int) -> tuple[Image.Image, int]:
        """(RGB image, label) at position `row`. Raises BrokenSample."""
        if self._kept is not None and row in self._kept:
            return self._kept[row], int(self.labels[row])
        file, offset, size = self.spans[row].tolist()
        try:
            image = decode_image(self._files.read(file, offset, size) if size >= 0 else _whole_file(self.files[file]))
        except OSError as error:
            check_absent(error, self.files[file])
            raise BrokenSample("missing image") from error
        if self.border:
            image = image.crop((self.border, self.border, image.width - self.border, image.height - self.border))
        if self._kept is not None:
            self._kept[row] = image
        return image, int(self.labels[row])

    def subset(self, rows: np.ndarray) -> "LabelledImages":
        """The images at these positions."""
        return LabelledImages(self.files, self.spans[rows], self.labels[rows], self.classnames)

    def relabelled(self, labels: np.ndarray) -> "LabelledImages":
        """The same images with other labels (N,)."""
        return LabelledImages(self.files, self.spans, labels, self.classnames)


# --------------------------------------------------------------------------------------------- noise in supervision


def flip_labels(
    labels: np.ndarray,
    num_classes: int,
    ratio: float,
    rng: np.random.RandomState,
    exclude_true: bool = True,
    asymmetric: bool = False,
) -> np.ndarray:
    """Give the first ceil(ratio N) of N permuted labels a random class -> (N,) noisy labels.

    exclude_true: uniform over the other classes (the paper's pre-training noise), so that exactly this share is wrong.
    Otherwise over all classes (U:src/datasets/common.py:184-195), so that ratio (1 - 1/C) is wrong. asymmetric: the
    next class instead of a random one.
    """
    noisy = np.array(labels)
    selected = rng.permutation(len(noisy))
    selected = selected[np.arange(len(noisy)) < ratio * len(noisy)]
    if asymmetric:
        noisy[selected] = (noisy[selected] + 1) % num_classes
    elif exclude_true and num_classes > 1:
        noisy[selected] = (noisy[selected] + rng.randint(1, num_classes, size=len(selected))) % num_classes
    else:
        noisy[selected] = rng.randint(num_classes, size=len(selected), dtype=np.int32)
    return noisy


def swap_captions(n: int, num_swaps: int, rng: random.Random) -> np.ndarray:
    """Swap the captions of two random pairs, `num_swaps` times -> (n,) int64: whose caption each pair gets.

    U0:open_clip/shuffle_data.py:25-32. Captions are permuted, none is lost. Since some pairs are drawn twice, a share
    of 1 - exp(-2 num_swaps/n) moves, a little less than 2 num_swaps/n.
    """
    source = np.arange(n)
    for _ in range(num_swaps):
        a, b = rng.sample(range(n), 2)
        source[a], source[b] = source[b], source[a]
    return source


# ---------------------------------------------------------------------------------------------------------- layouts


def _image(files: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    return next((files[ending] for ending in IMAGE_EXTENSIONS if ending in files), None)


def clip_benchmark(folder: Path, split: str, cache: Path | None = None) -> LabelledImages:
    """One split of a classification set in the CLIP-benchmark webdataset layout, or several joined: train+val.

    `cache` stores the positions and labels of a large set's images, so that each machine reads them once.
    """
    tars = []
    for name in split.split("+"):
        found = sorted((folder / name).glob("*.tar"), key=lambda path: (len(path.name), path.name))
        if not found:
            raise UserError(f"{folder / name} holds no .tar file; a set is named DIR:test or DIR:train")
        stated = folder / name / "nshards.txt"
        if stated.is_file() and stated.read_text().strip() != str(len(found)):
            raise UserError(f"{stated} says {stated.read_text().strip()} shards, but there are {len(found)}")
        tars += found
    if not (folder / "classnames.txt").is_file():
        raise UserError(f"{folder} has no classnames.txt, which names the classes, one a line")
    names = (folder / "classnames.txt").read_text(encoding="utf-8").strip("\n").splitlines()
    files = [str(tar) for tar in tars]
    index, _ = cached(files, cache / "labelled" if cache else None, lambda: (labelled_index(files), {}))
    return LabelledImages(files, index["spans"], index["labels"], names)


def labelled_index(tars: Sequence[str]) -> dict[str, np.ndarray]:
    """`spans` (N, 3) and `labels` (N,) int64 of the images in tars; reads only headers and .cls files."""
    spans, labels, opened = [], [], OpenFiles(tars)
    for i, tar in enumerate(tars):
        for key, files in grouped(Path(tar)):
            image, span = _image(files), files.get("cls")
            if image is None or span is None:
                raise UserError(f"{tar}, sample {key!r} has no {'image' if image is None else '.cls file'}")
            text = opened.read(i, span[0], min(span[1], LABEL_BYTES))
            try:
                labels.append(int(text))
            except ValueError as error:
                raise UserError(f"{tar}, sample {key!r} has the label {text[:20]!r}, which is no integer") from error
            spans.append((i, *image))
    spans = np.array(spans, dtype=np.int64).reshape(-1, 3)
    return {"spans": spans, "labels": np.array(labels, dtype=np.int64)}


def image_folder(root: Path, cache: Path | None = None) -> LabelledImages:
    """DIR/CLASS/image; class folders named by numbers (ImageNet-V2) are ordered as such.

    `cache` keeps the file list of large folders, so that each machine walks them once, and again if one has changed.
    """
    folders = [path for path in root.iterdir() if path.is_dir()]
    numbers = all(path.name.isdecimal() for path in folders)
    folders.sort(key=lambda path: (int(path.name) if numbers else 0, path.name))
    names, cache = [str(root), *map(str, folders)], cache / "folders" if cache else None
    found, about = cached(names, cache, lambda: walked(folders), LARGE_FOLDERS)
    if cache and any(changed(folder, time) for folder, time in about["nested"]):
        forget(names, cache)
        found, about = cached(names, cache, lambda: walked(folders), LARGE_FOLDERS)
    files = Strings(found["files"], found["ends"])
    if not len(files):
        raise UserError(f"{root} holds no folder of a class with images, {root}/CLASS/*.jpg")
    return _whole(files, found["labels"], [folder.name for folder in folders])


def walked(folders: Sequence[Path]) -> tuple[dict[str, np.ndarray], dict]:
    """({`files` and `ends` of the images' paths, `labels` (N,) int64}, {`nested`: folders inside class folders, with
    their modification times in ns})."""
    files, labels, nested = [], [], []
    for label, folder in enumerate(folders):
        found = []
        for place, below, names in os.walk(folder):
            inside = [f"{place}/{name}" for name in below]
            nested += [(path, os.stat(path).st_mtime_ns) for path in inside if not os.path.islink(path)]
            endings = ((name, os.path.splitext(name)[1].lower().lstrip(".")) for name in names)
            found += [f"{place}/{name}" for name, ending in endings if ending in (*IMAGE_EXTENSIONS, "bmp")]
        files += sorted(found, key=lambda path: path.split("/"))
        labels += [label] * len(found)
    paths = Strings.of(files)
    return {"files": paths.text, "ends": paths.ends, "labels": np.array(labels, dtype=np.int64)}, {"nested": nested}


def changed(folder: str, time: int) -> bool:
    """Whether a folder is gone, or its modification time (ns) is not `time`."""
    try:
        return os.stat(folder).st_mtime_ns != time
    except OSError:
        return True


def image_list(path: Path) -> LabelledImages:
    """Lines `relative/path label`. Class names are the names of the images' folders, if these agree within a class."""
    try:
        rows = [line.rsplit(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        labels = [int(label) for _, label in rows]
    except ValueError as error:
        raise UserError(f"{path} has a line that is not `path label` ({error})") from error
    names = [str(i) for i in range(max(labels, default=-1) + 1)]
    folders: dict[int, str] = {}
    for (file, _), label in zip(rows, labels, strict=True):
        folders[label] = Path(file).parent.name
    if all(folders.values()) and len(set(folders.values())) == len(folders):  # else folders are no classes
        names = [folders.get(label, name) for label, name in enumerate(names)]
    return _whole([str(path.parent / file) for file, _ in rows], labels, names)


def _whole_file(path: str) -> bytes:
    with open(path, "rb", buffering=0) as stream:
        return stream.read()


def _whole(files: Sequence[str], labels: Sequence[int], names: list[str]) -> LabelledImages:
    spans = np.zeros((len(files), 3), dtype=np.int64)
    spans[:, 0], spans[:, 2] = np.arange(len(files)), -1
    return LabelledImages(files, spans, labels, names)


def open_labelled(spec: str, cache: Path = Path("data/cache")) -> LabelledImages:
    """Open a data set by its path (see the top of this file). FileNotFoundError or UserError if it cannot be used.

    `cache` stores the index of large tars, and the list of files in large folders.
    """
    path, colon, split = spec.partition(":")
    if not (Path(path).is_dir() if colon else Path(path).exists()):
        raise UserError(f"data set {path} does not exist")
    if colon:
        return clip_benchmark(Path(path), split, cache)
    return image_list(Path(path)) if path.endswith(".txt") else image_folder(Path(path), cache)


# ------------------------------------------------------------------------------------------------- the paper's sets

ID_SETS = {  # CLIP-benchmark's names; classes and sizes are read from the data
    "cifar10": "cifar10", "cifar100": "cifar100", "flowers102": "flowers", "food101": "food101", "oxford_pet": "pets",
    "stanford_cars": "cars", "fgvc_aircraft": "fgvc_aircraft", "svhn": "svhn", "dtd": "dtd", "caltech101": "caltech101",
    "eurosat": "eurosat", "pcam": "pcam", "resisc45": "resisc45", "rendered_sst2": "renderedsst2",
}  # fmt: skip
# tuned on trainval: U:src/datasets/vtab.py:56,141,170,199,227
VTAB = ("caltech101", "eurosat", "svhn", "resisc45", "pcam")
DOMAINS = ("real", "sketch", "painting", "clipart")
SIZES = {  # published numbers of training images and classes, only for --dry-run
    "cifar10": (50_000, 10), "cifar100": (50_000, 100), "flowers102": (1_020, 102), "food101": (75_750, 101),
    "oxford_pet": (3_680, 37), "stanford_cars": (8_144, 196), "fgvc_aircraft": (3_334, 100), "svhn": (73_257, 10),
    "dtd": (1_880, 47), "caltech101": (3_060, 102), "eurosat": (21_600, 10), "pcam": (294_912, 2),
    "resisc45": (25_200, 45), "rendered_sst2": (6_920, 2), "domainnet-real": (120_906, 345),
    "domainnet-sketch": (48_212, 345), "domainnet-painting": (50_416, 345), "domainnet-clipart": (33_525, 345),
    "imagenet": (1_281_167, 1000),
}  # fmt: skip
IMAGENET = {  # image folder, and CLIP-benchmark's webdataset that is used if the folder is missing
    "imagenet": ("imagenet/val", "wds_imagenet1k"),
    "imagenet_v2": ("imagenetv2", "wds_imagenetv2"),
    "imagenet_r": ("imagenet-r", "wds_imagenet-r"),
    "imagenet_a": ("imagenet-a", "wds_imagenet-a"),
    "imagenet_sketch": ("sketch", "wds_imagenet_sketch"),
    "objectnet": ("objectnet-1.0/images", "wds_objectnet"),
    "vid_robust": ("imagenet-vid-robust/val", ""),
}


def training_split(folder: Path, name: str) -> str:
    """The split of a webdataset to tune on: trainval, or else train and val, for VTAB's sets; train for others."""
    if name in VTAB and (folder / "trainval").is_dir():
        return "trainval"
    return "train+val" if name in VTAB and (folder / "val").is_dir() else "train"


def benchmark(name: str, root: str) -> tuple[str, dict[str, str]]:
    """(training set, {test name: test set}) of one of the paper's downstream tasks, below the folder `root`.

    cifar10 ... rendered_sst2: in-domain transfer. domainnet-real ...: tuned on one domain, tested on four.
    imagenet: tested on its validation set and on the variants that `root` has. UserError names what is missing.
    """
    base = Path(root)
    if name in ID_SETS:
        webdatasets = [base / f"wds_{prefix}{ID_SETS[name]}" for prefix in ("vtab-", "")]
        for folder in webdatasets:
            if folder.is_dir():
                return f"{folder}:{training_split(folder, name)}", {name: f"{folder}:test"}
        wanted = (
            f"a webdataset {' or '.join(map(str, webdatasets))}, or image folders {base / name}/(train|test)/CLASS/"
        )
        training, tests = f"{base / name}/train", {name: f"{base / name}/test"}
    elif name.startswith("domainnet-") and name.removeprefix("domainnet-") in DOMAINS:
        folder = base / "domainnet"
        wanted = f"DomainNet's folders and its lists {folder}/DOMAIN_(train|test).txt of lines `path label`"
        tests = {domain: f"{folder}/{domain}_test.txt" for domain in DOMAINS}
        training = f"{folder}/{name.removeprefix('domainnet-')}_train.txt"
    elif name == "imagenet":
        wanted = f"image folders {base}/imagenet/(train|val)/CLASS/, or a webdataset {base}/wds_imagenet1k"
        tests = {}
        for test, (images, webdataset) in IMAGENET.items():
            if (base / images).is_dir():
                tests[test] = f"{base / images}"
            elif webdataset and (base / webdataset).is_dir():
                tests[test] = f"{base / webdataset}:test"
        training = f"{base}/imagenet/train"
        if not Path(training).is_dir() and "imagenet" in tests:
            training = f"{base}/wds_imagenet1k:train"
    else:
        names = ", ".join([*ID_SETS, *(f"domainnet-{domain}" for domain in DOMAINS), "imagenet"])
        raise UserError(f"--benchmark is one of {names}, not {name!r}")
    missing = [path for path in (training, *tests.values()) if not Path(path.partition(":")[0]).exists()]
    if missing:
        raise UserError(f"{missing[0]} does not exist: --benchmark {name} --root {base} needs {wanted}")
    return training, tests


def open_test(spec: str, trained: Sequence[str]) -> tuple[LabelledImages, list[list[int]] | None]:
    """(test set, group of trained classes for each of its classes, or None if the classes are the same).

    Tries in this order: `groups.json` in the set's folder, a list of lists of trained class numbers; the mappings of
    Vid-Robust or ObjectNet; the order of the classes, if their number is the same but they are named in another way
    (words, WordNet ids or numbers, such as ImageNet-V2's folders); names that all occur among the trained ones
    (ImageNet-A and -R, by WordNet id in image folders and by name in webdatasets). UserError if none applies.
    """
    images = open_labelled(spec)
    folder = Path(spec.partition(":")[0])
    if (folder / "groups.json").is_file():
        groups = json.loads((folder / "groups.json").read_text())
        known = range(len(trained))
        if not isinstance(groups, list) or len(groups) != images.num_classes or not all(
            isinstance(group, list) and group and all(label in known for label in group) for group in groups
        ):  # fmt: skip
            raise UserError(
                f"{folder / 'groups.json'} should hold, for each of {images.num_classes} classes, a list of numbers of "
                f"trained classes, 0 to {len(trained) - 1}"
            )
        return images, groups
    if (folder.parent / "metadata/pmsets.json").is_file():
        return vid_robust(folder.parent)[:2]
    mappings = folder.parent / "mappings"
    if (mappings / "objectnet_to_imagenet_1k.json").is_file():
        return objectnet(images, mappings)
    comparable = kind_of_names(trained) == kind_of_names(images.classnames)
    if list(trained) == images.classnames or (len(trained) == images.num_classes and not comparable):
        return images, None
    index = {name: label for label, name in enumerate(trained)}
    unknown = [name for name in images.classnames if name not in index]
    if not unknown:
        return images, [[index[name]] for name in images.classnames]
    raise UserError(
        f"{spec} has the class {unknown[0]!r}, which was not trained; write {folder}/groups.json, "
        "a list with the corresponding trained class numbers for each of its classes"
    )


def kind_of_names(names: Sequence[str]) -> str:
    """How classes are named: by "numbers", by WordNet "ids" such as n01440764, or by "words"."""
    patterns = {"numbers": r"\d+", "ids": r"n\d+"}
    return next((kind for kind, form in patterns.items() if all(re.fullmatch(form, name) for name in names)), "words")


def objectnet(images: LabelledImages, mappings: Path) -> tuple[LabelledImages, list[list[int]]]:
    """ObjectNet's images of its 113 ImageNet classes, and their groups. U:src/datasets/objectnet.py:16-48,51-75."""
    folders = json.loads((mappings / "folder_to_objectnet_label.json").read_text())
    to_imagenet = json.loads((mappings / "objectnet_to_imagenet_1k.json").read_text())
    synsets = {v: int(k) for k, v in json.loads((mappings / "pytorch_to_imagenet_2012_id.json").read_text()).items()}
    lines = (mappings / "imagenet_to_label_2012_v2").read_text().splitlines()
    number = {line.strip(): synsets[i] for i, line in enumerate(lines)}
    groups = {name: [number[line] for line in to_imagenet[name].split("; ")] for name in to_imagenet}
    shown = sorted(folder for folder, name in folders.items() if name in groups)
    label = {folder: i for i, folder in enumerate(shown)}
    rows = np.array([images.classnames[i] in label for i in images.labels])
    labels = [label[images.classnames[i]] for i in images.labels[rows]]
    chosen = LabelledImages(images.files, images.spans[rows], labels, shown)
    chosen.border = 2
    return chosen, [groups[folders[folder]] for folder in shown]


def vid_robust(root: Path) -> tuple[LabelledImages, list[list[int]], list[list[int]], list[list[int]]]:
    """ImageNet-Vid-Robust: (frames, groups of ImageNet classes, accepted classes of each frame, frames of each set).

    U:src/datasets/imagenet_vid_robust.py:17-73. `root` holds val/, metadata/ and misc/.
    """

    def read(name: str) -> dict:
        return json.loads((root / name).read_text())

    accepted, sets = read("metadata/labels.json"), read("metadata/pmsets.json")
    imagenet = {synset: int(i) for i, (synset, _) in read("misc/imagenet_class_index.json").items()}
    classes = read("misc/imagenet_vid_class_index.json")
    members = read("misc/rev_wnid_map.json")
    groups = [[imagenet[synset] for synset in members[classes[str(i)][0]]] for i in range(len(classes))]
    frames = sorted({frame for anchor, others in sets.items() for frame in (anchor, *others)})
    row = {frame: i for i, frame in enumerate(frames)}
    labels = [accepted[frame][0] for frame in frames]
    images = _whole([str(root / frame) for frame in frames], labels, [classes[str(i)][1] for i in range(len(classes))])
    return images, groups, [accepted[frame] for frame in frames], [[row[a], *map(row.get, b)] for a, b in sets.items()]
