"""Packs your pictures into training shards and evaluation sets: `python -m shared.pack KIND SOURCE --out DIR`.

    python -m shared.pack pairs photos/captions.csv --hold-out 0.1 --out data/mine
    python -m shared.pack retrieval photos/test.jsonl --out data/my_test
    python -m shared.pack classes photos/labels.csv --hold-out 0.2 --out data/my_classes

SOURCE names the pictures, and their captions or labels:
    table        .csv (commas) or .tsv (tabs) with the columns `image` and `caption`, or `image` and `label`; in a .csv,
                 a caption with commas stands in quotation marks
    JSON lines   .jsonl, a line {"image": "a.jpg", "caption": "a dog"} or {"image": "a.jpg", "caption": ["a dog", ...]}
    folder       SOURCE/CLASS/picture.jpg, for classes
A picture with several captions has several rows or, in JSON lines, a list. Further columns go into the samples' .json.

Paths are relative to the folder of SOURCE or to --image-root, and must not leave it. Picture files are copied
unchanged, except pictures whose EXIF data ask for a rotation, pictures larger than --max-side, and GIF, BMP, TIFF,
AVIF and grey pictures of 16 bits, which become PNG. Unreadable pictures are left out, counted and named. The same
source gives the same bytes. DIR appears when it is complete.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO

import tyro
from PIL import Image, ImageOps

from shared import checkpoints, cli, data, layout, run
from shared.errors import UserError
from shared.evalsets import read_lines
from shared.run import stable_hash
from shared.settings import Count, check_limits
from shared.tars import Broken, write_split

RECIPE = 2  # version; increased when the output for the same pictures and setting changes
TABLES, LINES = (".csv", ".tsv"), (".jsonl", ".ndjson")
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
)  # of the pictures in a folder of classes
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that are not converted
ORIENTATION = 274  # EXIF tag
TEMPLATES = ("{c}", "a photo of a {c}.")


class Picture(NamedTuple):
    file: str  # real path (links resolved), inside the root folder of the paths
    name: str  # path relative to this folder

    def size(self) -> int:
        """Size of the file in bytes, or -1 if it is not a file."""
        try:
            return os.path.getsize(self.file) if os.path.isfile(self.file) else -1
        except (OSError, ValueError):
            return -1


# ------------------------------------------------------------------------------------------------------------ sources


def read_rows(
    path: Path, columns: Mapping[str, Sequence[str]], broken: list[Broken]
) -> Iterator[tuple[str, str, list, dict[str, Any]]]:
    """(place in the file, picture's path, captions or label, further columns) of the rows of a table or JSON lines.

    columns: {flag: names of its columns} for the picture and for the texts. A row without a picture is recorded in
    `broken`. UserError if the file is not a table or JSON lines.
    """
    suffix = path.suffix.lower()
    if suffix not in (*TABLES, *LINES):
        raise UserError(f"{path} must end in one of {', '.join((*TABLES, *LINES))}")
    (image,), texts = columns.values()
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for place, row in json_rows(file, path) if suffix in LINES else table_rows(file, path, columns):
                if not isinstance(row, dict):
                    broken.append(Broken(place, "no JSON object"))
                elif not isinstance(name := row.pop(image, None), str) or not name.strip():
                    broken.append(Broken(place, f"row without {image!r}"))
                else:
                    found = [row.pop(text, None) for text in texts]
                    found = [value for value in found if value not in (None, "")] or [None]
                    every = [each for value in found for each in (value if isinstance(value, list) else [value])]
                    yield place, name.strip(), every, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as such") from error


def table_rows(file: TextIO, path: Path, columns: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, {column: cell}) of the rows that are not blank. In tab-separated files only whole cells can be quoted.

    UserError names the line of a row that has more cells than the header, which an unquoted comma in a caption makes,
    or whose quotation mark is not closed, which would swallow the following rows.
    """
    csv.field_size_limit(2**31 - 1)
    tabs = path.suffix.lower() == ".tsv"
    how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.reader(file, strict=True, **how)
    header, line, named = None, 1, [name for names in columns.values() for name in names]
    try:
        for row in reader:
            begun, line = line, reader.line_num + 1
            cells = [unquoted(cell) for cell in row] if tabs else row
            if header is None:
                header = [name.strip() for name in cells]
                if not set(named) <= set(header):
                    flags = " and ".join(f"--{flag}" for flag in columns)
                    raise UserError(
                        f"{path} has the columns {', '.join(header)}, not {' and '.join(named)}: {flags} "
                        f"select others; the first line must name them, with {'tabs' if tabs else 'commas'} between"
                    )
                if twice := [name for name in named if header.count(name) > 1]:
                    raise UserError(f"{path} has two columns {twice[0]}: rename one, and name both in --caption-column")
            elif len(cells) > len(header):
                advice = "JSON lines (.jsonl)" if tabs else 'put a caption with commas in "", or use tabs or JSON lines'
                raise UserError(f"{path}, line {begun} has {len(cells)} cells for {len(header)} columns: {advice}")
            elif cells:
                yield f"{path.name}, line {begun}", dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {line} cannot be read as cells ({error}): close a quotation mark, and write one within a "
            'quoted cell as ""'
        ) from error
    if header is None:
        raise UserError(f"{path} is empty")


def unquoted(cell: str) -> str:
    """The content of a quoted cell; other cells unchanged."""
    inside = cell[1:-1].replace('""', "")
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside
    return cell[1:-1].replace('""', '"') if quoted else cell


def json_rows(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of the lines that are not blank."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{path.name}, line {number}", parsed(line)


def parsed(text: str) -> Any:
    """The value of a JSON text, with valid Unicode in its strings; None if it is no JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8", "replace"))
    return None


def class_folders(root: Path) -> Iterator[tuple[str, str]]:
    """(picture's path relative to `root`, its class folder). Prints what was skipped. UserError without pictures."""
    found, others, empty = False, Counter(), []
    for home in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = [path for path in sorted(home.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
        others.update(
            "linked folder (cp -rL copies what links lead to)"
            for path in home.rglob("*")
            if path.is_symlink() and path.is_dir()
        )
        others.update(path.suffix.lower() or path.name for path in files if path.suffix.lower() not in SUFFIXES)
        found |= bool(pictures)
        empty += [] if pictures else [home.name]
        yield from ((path.relative_to(root).as_posix(), home.name) for path in pictures)
    if not found:
        raise UserError(f"{root} holds no folder of a class with pictures, {root}/CLASS/picture.jpg")
    if empty or others:
        kinds = [f"{count} {kind}" for kind, count in others.most_common(5)]
        folders = [f"folder{'s' * (len(empty) > 1)} without pictures {', '.join(empty[:5])}"] * bool(empty)
        print(f"{root}: skipped {', '.join(kinds + folders)}")


def text_of(value: Any) -> str:
    """A caption or label with single spaces, from a string or a number; "" for other values."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return " ".join(str(value).split()) if numeric or isinstance(value, str) else ""


def existing(root: str, path: str) -> str:
    """The real path of a picture; `path` may have Windows' backslashes, or accents in another Unicode form than the
    disk's (macOS takes letter and accent apart)."""
    ways = [path, path.replace("\\", "/")]
    ways += [unicodedata.normalize(form, way) for form in ("NFC", "NFD") for way in ways]
    files = (os.path.realpath(os.path.join(root, way)) for way in ways)
    return next(filter(os.path.isfile, files), os.path.realpath(os.path.join(root, path)))


# ------------------------------------------------------------------------------------------------------------ pictures


def encoded(content: bytes, picture: Image.Image, max_side: int | None) -> dict[str, bytes]:
    """{file ending: bytes} of a picture: `content`, or encoded again if it is rotated, too large or not in ENDINGS.

    picture: `content` decoded to RGB.
    """
    turned = False
    with Image.open(io.BytesIO(content), formats=data.FORMATS) as opened:
        ending = None if opened.mode.startswith(data.DEEP) else ENDINGS.get(opened.format)
        with contextlib.suppress(Exception):  # damaged EXIF is ignored
            if opened.getexif().get(ORIENTATION) in range(2, 9):
                picture.info["exif"] = opened.info["exif"]
                picture, turned = ImageOps.exif_transpose(picture), True
    scale = min(1.0, (max_side or max(picture.size)) / max(picture.size))
    if not turned and scale == 1 and ending is not None:
        return {ending: content}
    if scale < 1:
        picture = picture.resize([max(round(side * scale), 1) for side in picture.size], Image.Resampling.BICUBIC)
    picture.info.pop("exif", None)  # its orientation is no longer valid
    target, ending = io.BytesIO(), "jpg" if ending in ("jpg", "webp") else "png"
    picture.save(target, "jpeg" if ending == "jpg" else "png", quality=95)
    return {ending: target.getvalue()}


def content_hash(picture: Picture) -> bytes:
    """Hash of the bytes of a picture; of its name if it cannot be read."""
    try:
        return data.file_hash(data.read_file(picture.file))
    except data.BrokenSample:
        return picture.file.encode("utf-8", "replace")


def held_out(pictures: Iterable[Picture], share: float) -> set[Picture]:
    """`share` of the pictures, at least one but not all, chosen by a hash of their names.

    Copies of a picture stay together, so that no picture is in both splits.
    """
    copies, chosen = defaultdict(list), set()
    for picture in pictures:
        copies[content_hash(picture)].append(picture)
    order = sorted(copies.values(), key=lambda some: stable_hash("hold out", min(each.name for each in some)))
    wanted = max(round(share * sum(map(len, order))), 1)
    for some in order[:-1]:
        if len(chosen) < wanted:
            chosen.update(some)
    return chosen


# --------------------------------------------------------------------------------------------------------------- kinds


@dataclasses.dataclass
class Pictures:
    """Options that all kinds of output share."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Table (.csv, .tsv) or JSON lines (.jsonl) that name the pictures; for classes also a folder of class folders."""
    out: Path
    """Output folder. It appears only when it is complete."""
    image_root: Path | None = None
    """Folder that the image paths are relative to; None: the folder of SOURCE."""
    image_column: str = "image"
    """Column or key of the pictures' paths."""
    max_side: Count | None = None
    """Resize pictures whose longer side has more pixels than this; None: no resizing."""
    strict: bool = False
    """Stop at the first broken picture instead of counting it."""

    own = ()  # names that the samples' .json has itself

    def __post_init__(self):
        self.broken: list[Broken] = []
        self.replaced: set[str] = set()
        self.classes: list[str] = []
        self.prompts: Sequence[str] = ()

    def picture(self, root: str, path: str, place: str) -> Picture:
        """The picture of a path. UserError if the path leaves `root`, directly or by links, or is an address."""
        if "\0" in path:
            return Picture(path, path)  # no file has such a name
        if "://" in path:
            raise UserError(f"{place}: {path} is an address: download the pictures first; img2dataset does, and its "
                            "shards are what --data takes, so that they need no packing")  # fmt: skip
        file = existing(root, path)
        if not Path(file).is_relative_to(root):
            linked = Path(os.path.normpath(os.path.join(root, path))).is_relative_to(root)
            advice = (
                "copy what its link leads to (cp -rL)" if linked else "set --image-root to a folder with all pictures"
            )
            raise UserError(f"{place}: {path} is outside of {root}; {advice}")
        name = os.fsencode(Path(file).relative_to(root).as_posix())
        return Picture(file, name.decode("utf-8", "replace"))

    def further(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The columns of a row that go into the sample's .json."""
        self.replaced |= columns.keys() & set(self.own)
        return {name: value for name, value in columns.items() if name and name not in self.own}

    def lacking(self, place: str, reason: str) -> None:
        """Record a broken picture or row; with --strict, UserError."""
        if self.strict:
            raise UserError(f"--strict: {place}: {reason}")
        self.broken.append(Broken(place, reason))

    def check_any(self, splits: Mapping[str, Mapping]) -> None:
        """UserError if a split has no picture."""
        if empty := [name for name, pictures in splits.items() if not pictures]:
            why = f", for example {self.broken[0].key}: {self.broken[0].reason}" if self.broken else ""
            raise UserError(f"{self.source} has no picture left for {empty[0]}{why}")

    def rows(self, source: Path, flag: str, *texts: str) -> Iterator[tuple[Picture, str, list, dict[str, Any]]]:
        """(picture, place, captions or label, further columns) of a table's rows; `texts` is the value of --`flag`."""
        if not source.is_file():
            what = "a folder" if source.is_dir() else "no file"
            raise UserError(f"{source} is {what}: name a table (.csv, .tsv) or JSON lines (.jsonl)")
        root, known, broken = self.image_root or source.parent, {}, []
        if not root.is_dir():
            raise UserError(f"{root} is not a folder: set --image-root to the folder that image paths start from")
        root = os.path.realpath(root)
        columns = {"image-column": (self.image_column,), flag: texts}
        for place, path, found, more in read_rows(source, columns, broken):
            if path not in known:
                known[path] = self.picture(root, path, place)
            yield known[path], place, found, more
        for one in broken:
            self.lacking(*one)

    def captioned(self, columns: Sequence[str]) -> dict[Picture, list[tuple[str, dict]]]:
        """{picture: [(caption, further columns), ...]} in the order of the source."""
        found = defaultdict(list)
        for picture, place, texts, more in self.rows(self.source, "caption-column", *columns):
            captions = [text_of(each) for each in texts]
            if not all(captions or [""]):
                self.lacking(place, f"row without {' or '.join(map(repr, columns))}")
            found[picture] += [(caption, self.further(more)) for caption in captions if caption]
        return {picture: entries for picture, entries in found.items() if entries}

    def read_all(self, pictures: Mapping[Picture, Any], label: str) -> Iterator[tuple[Picture, dict[str, bytes], Any]]:
        """(picture, {file ending: bytes}, value in `pictures`) of readable pictures. UserError if there are none."""
        found = False
        for picture, what in run.progress(pictures.items(), len(pictures), label):
            try:
                content = data.read_file(picture.file)
                files = encoded(content, data.decode_image(content), self.max_side)
            except data.BrokenSample as error:
                self.lacking(picture.name, str(error))
            else:
                found = True
                yield picture, files, what
        if not found:
            raise UserError(
                f"none of the {len(pictures):,} pictures of {self.source} ({label}) can be read, such as "
                f"{self.broken[-1].key} ({self.broken[-1].reason}): --image-root is the folder that paths start from"
            )

    def write_retrieval(self, folder: Path, captions: Mapping[Picture, list[str]]) -> tuple[int, int]:
        """Writes a retrieval set; returns the numbers of pictures and captions."""
        counts = []

        def samples() -> Iterator[dict]:
            for _, content, texts in self.read_all(captions, folder.name):
                counts.append(len(texts))
                yield content | {"txt": "\n".join(texts)}

        return layout.write_retrieval(folder, samples(), layout.SHARD), sum(counts)

    def build(self) -> None:
        """Writes the folder and its manifest, and prints how to use it; a finished folder is left unchanged."""
        check_limits(self)
        if not 0 <= (share := getattr(self, "hold_out", 0)) < 1:
            raise UserError(f"--hold-out must be a share of at least 0 and less than 1, not {share}")
        plan = self.plan()
        self.check_any(plan)
        listed = {name: [(p.name, p.size(), what) for p, what in split.items()] for name, split in plan.items()}
        files = data.fingerprint(json.dumps([listed, self.classes, self.prompts]).encode())

        def write(folder: Path) -> dict:
            counts = self.write(folder, plan)
            broken = dict(sorted(self.broken))
            return {"counts": counts | {"broken": len(broken)}, "broken": broken}

        layout.build(self.out, layout.setting_of(self, RECIPE) | {"files": files}, write)
        broken = checkpoints.read_json(self.out / "manifest.json")["broken"]
        if line := data.broken_report((Broken(*each) for each in broken.items()), "left out"):
            print(f"{line}; all: {self.out}/manifest.json")
        if self.replaced:
            print(f"not kept: {', '.join(sorted(self.replaced))}, columns whose names the samples' .json has itself; "
                  "rename them to keep them")  # fmt: skip
        print(self.used_as())


@dataclasses.dataclass
class Pairs(Pictures):
    """Training shards of pictures and captions, DIR/train/{00000..}.tar in img2dataset layout; with --hold-out also a
    retrieval set of held-out pictures, DIR/eval/held_out."""

    own = ("key", "caption", "captions", "file")

    caption_column: tuple[str, ...] = ("caption",)
    """Columns or keys of the captions."""
    every_caption: bool = True
    """Write one sample per caption instead of one sample with the first caption."""
    hold_out: float = 0.0
    """Share of the pictures to hold out for testing, with all of their captions."""

    def plan(self) -> dict[str, dict[Picture, list[tuple[str, dict]]]]:
        found = self.captioned(self.caption_column)
        if not self.hold_out:
            return {"train": found}
        kept = held_out(found, self.hold_out)
        return {
            "train": {p: entries for p, entries in found.items() if p not in kept},
            "held_out": {p: entries for p, entries in found.items() if p in kept},
        }

    def write(self, folder: Path, plan: dict[str, dict[Picture, list[tuple[str, dict]]]]) -> dict[str, int]:
        counts: Counter[str] = Counter()

        def samples() -> Iterator[dict]:
            for picture, content, entries in self.read_all(plan["train"], "train"):
                counts.update(pictures=1, captions=len(entries))
                about = {"file": picture.name, "captions": [caption for caption, _ in entries]}
                for caption, more in entries if self.every_caption else entries[:1]:
                    yield content | {"txt": caption, "json": more | about}

        samples_written = layout.write_pairs(folder / "train", samples())
        found = {"pictures": counts["pictures"], "captions": counts["captions"], "samples": samples_written}
        if "held_out" in plan:
            captions = {p: [caption for caption, _ in entries] for p, entries in plan["held_out"].items()}
            images, texts = self.write_retrieval(folder / "eval/held_out", captions)
            found |= {"held_out": images, "held_out_captions": texts}
        return found

    def used_as(self) -> str:
        held = f", evaluate with --sets {self.out}/eval/held_out" if self.hold_out else ""
        return f"train with --data {self.out}/train{held}"


@dataclasses.dataclass
class Retrieval(Pictures):
    """A retrieval set, DIR, of all pictures with all their captions."""

    caption_column: tuple[str, ...] = ("caption",)
    """Columns or keys of the captions."""

    def plan(self) -> dict[str, dict[Picture, list[str]]]:
        found = self.captioned(self.caption_column)
        return {"test": {picture: [caption for caption, _ in entries] for picture, entries in found.items()}}

    def write(self, folder: Path, plan: dict[str, dict[Picture, list[str]]]) -> dict[str, int]:
        return dict(zip(("pictures", "captions"), self.write_retrieval(folder, plan["test"]), strict=True))

    def used_as(self) -> str:
        return f"evaluate with --sets {self.out}"


@dataclasses.dataclass
class Classes(Pictures):
    """A classification set, DIR, of labelled pictures; with --hold-out or --train also a train split for probes. Its
    samples have class names as captions, so that DIR/train can also be used as training data."""

    own = ("key", "caption", "file", "name", "label")

    label_column: str = "label"
    """Column or key of the labels."""
    hold_out: float = 0.0
    """Share of each class's pictures to hold out for testing; the others are the train split. 0: all pictures are for
    testing."""
    train: Path | None = None
    """Pictures of the train split, in the same formats as SOURCE."""
    classnames: Path | None = None
    """File of class names, one a line. Labels are these names, or line numbers from 0. None: names of folders, with
    spaces for `_`, or the labels themselves."""
    templates: Path | None = None
    """Prompts, one a line, with {c} for the class name; None: `{c}` and `a photo of a {c}.`"""

    def labelled(self, source: Path) -> dict[Picture, tuple[str, dict]]:
        """{picture: (label, further columns)}. UserError if a picture has two labels."""
        found: dict[Picture, tuple[str, dict]] = {}
        if source.is_dir():
            root = os.path.realpath(source)
            if self.out.resolve().is_relative_to(root):
                raise UserError(f"--out {self.out} lies in the folder of classes: choose another --out")
            for path, name in class_folders(Path(root)):
                self.label(found, self.picture(root, path, str(source)), name, {}, str(source))
            return found
        for picture, place, texts, more in self.rows(source, "label-column", self.label_column):
            if not (label := text_of(texts[0] if len(texts) == 1 else None)):
                self.lacking(place, f"row without {self.label_column!r}")
            else:
                self.label(found, picture, label, self.further(more), place)
        return found

    @staticmethod
    def label(found: dict[Picture, tuple[str, dict]], picture: Picture, label: str, more: dict, place: str) -> None:
        """Add a labelled picture to `found`. UserError if it has another label there."""
        if found.setdefault(picture, (label, more))[0] != label:
            raise UserError(f"{place}: {picture.name} has the label {label!r} here, but {found[picture][0]!r} before")

    def plan(self) -> dict[str, dict[Picture, tuple[int, dict]]]:
        """{split: {picture: (class index, further columns)}}; sets `classes` and `prompts`."""
        if self.train and self.hold_out:
            raise UserError("--train and --hold-out exclude each other: pass only one")
        splits = {"test": self.labelled(self.source)} | ({"train": self.labelled(self.train)} if self.train else {})
        self.check_any(splits)
        labels = sorted({label for split in splits.values() for label, _ in split.values()})
        numbers, self.classes = self.number(labels)
        self.prompts = read_lines(self.templates) if self.templates else TEMPLATES
        if lacking := [prompt for prompt in self.prompts if "{c}" not in prompt]:
            raise UserError(f"{self.templates} has the line {lacking[0]!r}, which lacks {{c}} for the class name")
        if self.hold_out:
            whole, of_label = splits["test"], defaultdict(list)
            for picture, (label, _) in whole.items():
                of_label[label].append(picture)
            kept = set().union(*(held_out(pictures, self.hold_out) for pictures in of_label.values()))
            splits = {
                "test": {p: about for p, about in whole.items() if p in kept},
                "train": {p: about for p, about in whole.items() if p not in kept},
            }
            if untested := [label for label in labels if kept.isdisjoint(of_label[label])]:
                print(f"classes too small for a test split, all in the train split: {', '.join(untested[:5])}")
        if both := splits["test"].keys() & splits.get("train", {}).keys():
            raise UserError(f"{min(both).name} is in both splits")
        return {
            name: {p: (numbers[label], more) for p, (label, more) in split.items()} for name, split in splits.items()
        }

    def number(self, labels: list[str]) -> tuple[dict[str, int], list[str]]:
        """({label: class index}, class names)."""
        decimal = all(label.isdecimal() for label in labels)
        order = sorted(labels, key=int) if decimal else labels
        if self.classnames is None:
            names = [label.replace("_", " ") for label in order] if self.source.is_dir() else order
            numbers = {label: number for number, label in enumerate(order)}
            if decimal:
                print(f"classes are called {', '.join(order[:3])}, ...: pass --classnames to name them")
        else:
            names = read_lines(self.classnames)
            numbers = {name: number for number, name in enumerate(names)}
            if decimal and not set(labels) <= set(names) and int(order[-1]) < len(names):
                numbers = {label: int(label) for label in labels}
            elif lacking := [label for label in order if label not in names]:
                raise UserError(
                    f"{self.classnames} lacks the label {lacking[-1]!r}: labels are its lines, or their numbers from 0"
                )
        if len(names) < 2:
            raise UserError(f"{self.source} has one class, {names[0]}: at least two are needed")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"two classes are called {twice[0]!r}")
        return numbers, names

    def write(self, folder: Path, plan: dict[str, dict[Picture, tuple[int, dict]]]) -> dict[str, int]:
        layout.write_classes(folder, self.classes, self.prompts)
        counts = {"classes": len(self.classes)}
        for split, labels in plan.items():
            counts[split] = write_split(folder / split, self.samples(split, labels), layout.SHARD)
        return counts

    def samples(self, split: str, labels: dict[Picture, tuple[int, dict]]) -> Iterator[dict]:
        """Samples of a split in the order of the source; those for training are shuffled and have captions."""
        if split == "train":
            labels = dict(random.Random(0).sample(list(labels.items()), len(labels)))
        for picture, content, (label, more) in self.read_all(labels, split):
            sample = content | {"cls": str(label)}
            if split == "train":
                name = self.classes[label]
                about = more | {"file": picture.name, "name": name, "label": label}
                sample |= {"txt": name, "json": json.dumps(about, sort_keys=True, ensure_ascii=False)}
            yield sample

    def used_as(self) -> str:
        trained = self.train or self.hold_out
        return f"evaluate with --sets {self.out}" + f", train with --data {self.out}/train" * bool(trained)


KINDS = {"pairs": Pairs, "retrieval": Retrieval, "classes": Classes}


def main() -> None:
    tyro.extras.subcommand_cli_from_dict(KINDS).build()


if __name__ == "__main__":
    cli.command_line(main)
