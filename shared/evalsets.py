"""Reads evaluation sets in the CLIP-benchmark webdataset layout; every public `wds_*` set works unchanged.

    <folder>/classnames.txt                         one class name a line; line c names label c
             zeroshot_classification_templates.txt  one prompt template a line, `{c}` stands for the class name
             dataset_type.txt                       optional: `classification` (default), `multilabel` or `retrieval`
             <split>/nshards.txt                    number of shards
             <split>/0.tar, 1.tar, ...              `KEY.{webp,png,jpg,jpeg}` with `KEY.cls` (label), `KEY.npy` (0/1 per
                                                    class, multilabel) or `KEY.txt` (captions, one a line, retrieval)

An evaluation set must be complete: a missing or unreadable file is an error that names file and key.
"""

import copy
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shared.data import BrokenSample, decode_image, split_normalisation
from shared.errors import UserError
from shared.tars import IMAGE_EXTENSIONS, MAX_BYTES, Broken, key_of, tar_files

KINDS = ("classification", "multilabel", "retrieval")


class EvalSet(IterableDataset):
    """One split of an evaluation set; iterating gives `(key, image, target)` in shard order.

    image: `transform` of an RGB PIL image; it may be None if only names or `targets` are read. target: int label, (C,)
    float 0/1 vector or list of captions. `classnames` and `templates` are empty for retrieval sets.
    """

    def __init__(
        self, folder: str | Path, transform: Callable[[Image.Image], torch.Tensor] | None, split: str = "test"
    ):
        self.folder, self.split, self.transform = Path(folder), split, transform
        self.name = self.folder.name
        self.kind = "classification"
        if (self.folder / "dataset_type.txt").exists():
            self.kind = _read(self.folder / "dataset_type.txt").strip().lower()
        if self.kind not in KINDS:
            raise UserError(f"{self.folder / 'dataset_type.txt'} says {self.kind!r}, which is not one of {KINDS}.")
        self.shards = self._shards()
        self.classnames: list[str] = []
        self.templates: list[str] = []
        if self.kind != "retrieval":
            self.classnames = read_lines(self.folder / "classnames.txt")
            self.templates = read_lines(path := self.folder / "zeroshot_classification_templates.txt")
            if wrong := [template for template in self.templates if "{c}" not in template]:
                raise UserError(f"{path} has the template {wrong[0]!r}, which lacks {{c}} for the class name.")

    def _shards(self) -> list[Path]:
        if not self.folder.is_dir():
            ours = self.folder.is_relative_to("data/emoji")
            hint = " 'make data' builds the embedded corpus; --help shows which flags name sets of your own." * ours
            raise UserError(f"evaluation set {self.folder} does not exist.{hint}")
        path = self.folder / self.split / "nshards.txt"
        text = _read(path).strip()
        if not text.isdecimal() or int(text) == 0:
            raise UserError(f"{path} says {text!r} instead of a number of shards, at least 1.")
        shards = [self.folder / self.split / f"{i}.tar" for i in range(int(text))]
        if missing := [shard for shard in shards if not shard.is_file()]:
            raise UserError(f"{missing[0]} is missing, but {path} counts {text} shard(s).")
        return shards

    def _samples(self) -> Iterator[tuple[str, str, dict[str, bytes]]]:
        """(key, "SHARD, sample KEY", files by extension) of this worker's samples, undecoded.

        Workers divide the shards. If there are fewer shards than workers, each of n workers takes every n-th sample,
        and reads only the headers of the others.
        """
        worker = get_worker_info()
        rank, count = (worker.id, worker.num_workers) if worker else (0, 1)
        shards, step, first = self.shards, count, rank
        if len(shards) >= count:
            shards, step, first = shards[rank::count], 1, 0
        index = 0
        for shard in shards:
            with open(shard, "rb", buffering=0) as file:  # no read-ahead
                for key, files in grouped(shard):
                    if index % step == first:
                        yield key, f"{shard}, sample {key!r}", _contents(file, files)
                    index += 1
        if index == 0 and worker is None:
            raise UserError(f"{self.folder / self.split} holds no samples.")

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor, int | torch.Tensor | list[str]]]:
        for key, where, files in self._samples():
            image = _image(files, where)
            seen = image if isinstance(image, torch.Tensor) else self.transform(image)  # features have no views
            yield key, seen, self._target(files, where)

    def targets(self) -> Iterator[tuple[str, int | torch.Tensor | list[str]]]:
        """(key, target) of each sample, in the order of iteration, without decoding images."""
        for key, where, files in self._samples():
            yield key, self._target(files, where)

    def _target(self, files: dict[str, bytes], where: str) -> int | torch.Tensor | list[str]:
        extension = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}[self.kind]
        if extension not in files:
            raise UserError(f"{where} has no .{extension} file.")
        content, num_classes = files[extension], len(self.classnames)
        try:
            if self.kind == "retrieval":
                target = [line for line in content.decode().splitlines() if line.strip()]
            elif self.kind == "multilabel":
                target = torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False)).float()
            else:
                target = int(content)
        except (ValueError, EOFError, OSError, TypeError) as error:
            needed = {"cls": "an integer", "npy": "an array of numbers", "txt": "UTF-8 text"}[extension]
            raise UserError(
                f"{where} has a .{extension} file that cannot be read as {needed}: {content[:20]}."
            ) from error
        if self.kind == "retrieval" and not target:
            raise UserError(f"{where} has no caption.")
        if self.kind == "multilabel" and target.shape != (num_classes,):
            raise UserError(f"{where} has labels of shape {tuple(target.shape)} for {num_classes} classes.")
        if self.kind == "classification" and not 0 <= target < num_classes:
            raise UserError(f"{where} has label {target}, outside of the {num_classes} classes of classnames.txt.")
        return target

    def batches(
        self, batch_size: int, num_workers: int = 0, device: str | torch.device = "cpu"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | list]]:
        """Yields `(images (B, ...) on the device, labels (B,) int64 | (B, C) float32 | list of B caption lists)`.

        With workers the order differs from shard order, but is the same on every run. Workers' errors are raised here.
        """
        pixels, normalise = split_normalisation(self.transform)
        own, empty = copy.copy(self), True
        own.transform = pixels
        pin = torch.device(device).type == "cuda"
        loader = DataLoader(own, batch_size, num_workers=num_workers, collate_fn=_collate, pin_memory=pin)
        try:
            for images, targets in loader:
                images = images.to(device, non_blocking=True)
                yield images if images.is_floating_point() else normalise(images), targets
                empty = False
        except UserError as error:  # DataLoader puts a worker's traceback before the message
            raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None
        if empty:
            raise UserError(f"{self.folder / self.split} holds no samples.")


def set_names(folders: Iterable[str | Path]) -> list[str]:
    """Names of evaluation sets in results: the last part of each path or, if others have the same, as many last parts
    as tell them apart, joined by hyphens. UserError for a folder that is named twice."""
    paths = [(folder, Path(os.path.abspath(folder)).parts[::-1]) for folder in folders]
    names = []
    for folder, path in paths:
        others = [other for _, other in paths if other != path]
        if len(others) < len(paths) - 1:
            raise UserError(f"the evaluation set {folder} is named twice: name it once")
        parts = 1
        while any(other[:parts] == path[:parts] for other in others):
            parts += 1
        names.append("-".join(path[:parts][::-1]))
    return names


def _collate(items: list) -> tuple[torch.Tensor, torch.Tensor | list]:
    _, images, targets = zip(*items, strict=True)
    if isinstance(targets[0], list):
        return torch.stack(images), list(targets)
    return torch.stack(images), torch.stack(targets) if torch.is_tensor(targets[0]) else torch.tensor(targets)


def grouped(shard: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {extension: (offset, size)}) of a tar's samples; files of a sample are adjacent. UserError if damaged."""
    broken: list[Broken] = []
    key, files = None, {}
    for member in tar_files(shard, broken):
        found, extension = key_of(member.name)
        if not os.path.basename(found) or not extension:  # hidden files, and files of no sample
            continue
        if found != key and files:
            yield key, files
            files = {}
        if extension in files:
            raise UserError(f"{shard}, sample {found!r} has two .{extension} files.")
        key, files[extension] = found, (member.offset_data, member.size)
    if broken:
        raise UserError(f"{shard} cannot be read as a tar file ({broken[0].reason}).")
    if files:
        yield key, files


def _contents(file: BinaryIO, files: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """{extension: bytes} of a sample: its image (the first of IMAGE_EXTENSIONS that it has) and its targets."""
    image = next((extension for extension in IMAGE_EXTENSIONS if extension in files), None)
    contents = {}
    for extension in {image, "cls", "npy", "txt"} & files.keys():
        offset, size = files[extension]
        if size > MAX_BYTES:
            raise UserError(f"{file.name} holds a file of more than {MAX_BYTES} bytes.")
        contents[extension] = os.pread(file.fileno(), size, offset)
        if len(contents[extension]) < size:
            raise UserError(f"{file.name} cannot be read as a tar file (truncated or damaged tar).")
    return contents


def _image(files: dict[str, bytes], where: str) -> Image.Image:
    """RGB image; transparency is composited on white. Features of a locked tower (.npy) -> float32 tensor."""
    extension = next((extension for extension in (*IMAGE_EXTENSIONS, "npy") if extension in files), None)
    if extension is None:
        raise UserError(f"{where} has no image (.{', .'.join(IMAGE_EXTENSIONS)}).")
    try:
        return decode_image(files[extension])
    except BrokenSample as error:
        raise UserError(f"{where} has a .{extension} image that cannot be read ({error}).") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors begin UTF-8 files with a mark
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text.") from error


def read_lines(path: Path) -> list[str]:
    """Stripped lines of a file of class names or prompts. UserError if a line is empty or not UTF-8."""
    lines = [line.strip() for line in _read(path).rstrip().splitlines()]
    if not lines or "" in lines:
        raise UserError(f"{path} has an empty line where every line must hold one entry.")
    return lines
