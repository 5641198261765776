"""Image-text pairs as the stages read them: views of the images, and data sets of shards or annotations.

BLIP's code: salesforce/BLIP@056a169, cited as `B:`; authors' code showlab/datacentric.vlp@a488102, `V:` for its
`vq_compress_model/`.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as vision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from shared import data
from shared.clip import RememberingTokenizer
from shared.errors import UserError
from shared.index import Strings, cached
from shared.pretrained import LITE0_MEAN, LITE0_STD
from tldr_reduction.config import Common
from tldr_reduction.model import image_side
from tldr_reduction.tokenizer import PROMPT, pre_caption

# ------------------------------------------------------------------------------------------------------- transforms

normalised = data.ToNormalizedTensor(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
of_lite0 = data.ToNormalizedTensor(LITE0_MEAN, LITE0_STD)


def eval_transform(size: int, normalise: Callable[[Image.Image], Tensor] = normalised) -> transforms.Compose:
    """PIL RGB -> normalised (3, S, S): bicubic to a square, aspect ratio not kept. B:data/__init__.py:26."""
    return transforms.Compose([transforms.Resize((size, size), InterpolationMode.BICUBIC), normalise])


def view_of(model: nn.Module, cfg: Common) -> transforms.Compose:
    """`eval_transform` with the image size of a run's model."""
    return eval_transform(image_side(model, cfg))


def no_pixels(image: Image.Image) -> Tensor:
    """Empty tensor, for a pass that only finds out which images are readable."""
    return torch.empty(0)


def train_transform(size: int, min_scale: float = 0.2, flip: bool = True, augment: bool = True) -> transforms.Compose:
    """Random crop (scale 0.2-1 in pre-training, 0.5-1 otherwise), flip, `RandomAugment`. B:data/__init__.py:18."""
    steps = [transforms.RandomResizedCrop(size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC)]
    steps += [transforms.RandomHorizontalFlip()] * flip + [RandomAugment()] * augment
    return transforms.Compose([*steps, normalised])


class RandomAugment:
    """Two operations of BLIP's ten at level 5 of 10, each carried out with probability 0.5; grey fill.

    V:transform/randaugment.py. BLIP leaves out operations such as colour inversion, because captions mention colours.
    At this level brightness and sharpness have factor 1.0, so here they are the identity.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        for operation in torch.randint(0, 10, (2,)).tolist():
            if torch.rand(1) > 0.5:
                continue
            sign = 1 if torch.rand(1) < 0.5 else -1
            if operation == 0:
                image = vision.autocontrast(image)
            elif operation == 1:
                image = vision.equalize(image)
            elif operation == 2:
                image = vision.rotate(image, sign * 15, fill=[128] * 3)
            elif operation in (3, 4):  # shear by 0.15, pixels per pixel
                affine = (1, sign * 0.15, 0, 0, 1, 0) if operation == 3 else (1, 0, 0, sign * 0.15, 1, 0)
                image = image.transform(image.size, Image.Transform.AFFINE, affine, fillcolor=(128,) * 3)
            elif operation in (5, 6):  # shift by 5 pixels
                affine = (1, 0, sign * 5, 0, 1, 0) if operation == 5 else (1, 0, 0, 0, 1, sign * 5)
                image = image.transform(image.size, Image.Transform.AFFINE, affine, fillcolor=(128,) * 3)
        return image


# -------------------------------------------------------------------------------------------------------- data sets


def read_annotations(path: str) -> tuple[dict[str, np.ndarray], dict]:
    """Image paths and captions of an annotation file, each as joined bytes with the end of each text, and a digest.

    UserError if the file is not a list of annotations.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        files, texts = Strings.of(str(entry["image"]) for entry in entries), [entry["caption"] for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is no annotation file, a JSON list of {{"image": ..., "caption": ...}}') from error
    if not texts:
        raise UserError(f"{path} has no entry")
    if other := [row for row, text in enumerate(texts) if not isinstance(text, str)]:
        raise UserError(f"{path}: the caption of {files[other[0]]} is no text (entry {other[0]})")
    captions = Strings.of(text.encode(errors="replace") for text in texts)
    arrays = {"files": files.text, "file_ends": files.ends, "captions": captions.text, "caption_ends": captions.ends}
    return arrays, {"digest": data.fingerprint(*(array.tobytes() for array in arrays.values()))}


class Annotations:
    """Pairs of a JSON list of {"image": path below `root`, "caption": text}, the authors' form of a data set.

    A large file is parsed once per machine and kept in `cache`, as memory-mapped bytes that all processes share.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        limit: int | None = None,
        strict: bool = False,
        cache: Path | None = None,
    ):
        self.path, self.strict, self.broken = path, strict, []
        self.root = Path(root) if root else Path(path).parent
        arrays, about = cached([path], cache, lambda: read_annotations(path))
        self.total = len(arrays["file_ends"])
        self.keys = Strings(arrays["files"], arrays["file_ends"]).head(limit)
        self._captions = Strings(arrays["captions"], arrays["caption_ends"]).head(limit)
        self.fingerprint = data.fingerprint(repr((len(self.keys), about["digest"])).encode())

    def __len__(self) -> int:
        return len(self.keys)

    def caption(self, row: int) -> str:
        """Caption of pair number `row`."""
        return self._captions[row]

    def read(self, row: int) -> data.Pair:
        """Pair number `row`. Raises BrokenSample."""
        caption = data.decode_caption(self._captions.bytes_of(row))
        return data.Pair(self.keys[row], data.decode_image(data.read_file(self.root / self.keys[row])), caption)


def open_pairs(spec: str, root: str | None = None, limit: int | None = None, strict: bool = False, cache: str = ""):
    """Open an annotation .json, or shards or a .tsv by `shared.data.open_pairs`."""
    if spec.endswith(".json"):
        if not os.path.isfile(spec):
            raise UserError(f"{spec} does not exist")
        return Annotations(spec, root, limit, strict, Path(cache or "data/cache"))
    return data.open_pairs(spec, limit, strict, Path(cache or "data/cache"))


def local_pairs(spec: str, root: str | None = None, limit: int | None = None, cache: str = ""):
    """`open_pairs` of data on this machine; None if the data are missing or remote (nothing is fetched)."""
    try:
        if not any(map(data.is_remote, data.expand_shards(spec))):
            return open_pairs(spec, root, limit, False, cache)
    except UserError:
        pass
    return None


def pixel_hash(image: Image.Image) -> int:
    """A 64-bit hash that identifies images with equal pixels."""
    return int(data.fingerprint(repr(image.size).encode(), image.tobytes()), 16)


class TextOf:
    """Makes the text of a pair for training, in a loader process: token ids (T,), in retrieval with a number of the
    image, which is equal for all pairs with the same pixels.

    WordPiece's ids are padded to `max_length`; in fine-tuning, the prompt is put before the caption.
    """

    def __init__(self, tokenizer, cfg: Common):
        self.stage, self.max_length = cfg.stage, cfg.max_length
        self.tokenizer = RememberingTokenizer(tokenizer) if cfg.stage == "clip" else tokenizer

    def __call__(self, pair: data.Pair) -> Tensor | tuple[Tensor, Tensor]:
        caption = pre_caption(pair.caption)
        if self.stage == "clip":
            return self.tokenizer([caption])[0]
        ids, _ = self.tokenizer([PROMPT * (self.stage == "finetune") + caption], self.max_length)
        ids = F.pad(ids[0], (0, self.max_length - ids.shape[1]))
        return (ids, torch.tensor(pixel_hash(pair.image) >> 1)) if self.stage == "retrieval" else ids  # fits int64


class Ordered(Dataset):
    """Samples `rows` in order: (row, image by the evaluation transform, caption, pixel hash, whether it is readable).

    A broken sample is not replaced: it has a blank image. `normalise` turns batches of images into input of the model.
    """

    def __init__(self, pairs, rows: np.ndarray, transform):
        self.pairs, self.rows = pairs, rows
        self.transform, self.normalise = data.split_normalisation(transform)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[int, Tensor, str, int, bool]:
        row = int(self.rows[i])
        try:
            pair = self.pairs.read(row)
        except data.BrokenSample as error:
            if self.pairs.strict:
                raise UserError(f"--strict: sample {self.pairs.keys[row]}: {error}") from error
            return row, self.transform(Image.new("RGB", (8, 8))), "", 0, False
        return row, self.transform(pair.image), pair.caption, pixel_hash(pair.image), True


class Batch(NamedTuple):
    """Samples in order."""

    rows: np.ndarray  # (b,) indices in the data
    images: Tensor  # (b, 3, S, S) normalised, on the device
    captions: list[str]
    pixels: np.ndarray  # (b,) uint64 hashes of the images
    readable: np.ndarray  # (b,) bool


def in_order(
    pairs, rows: np.ndarray, transform, batch_size: int, workers: int = 0, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Batches of the samples `rows`, in their order."""
    dataset, device = Ordered(pairs, rows, transform), torch.device(device)
    pin = device.type == "cuda"
    for items in DataLoader(dataset, batch_size, num_workers=workers, collate_fn=columns, pin_memory=pin):
        numbers, images, captions, pixels, readable = items
        images = dataset.normalise(images.to(device, non_blocking=True))
        yield Batch(numbers, images, captions, pixels, readable)


def columns(items: list) -> tuple:
    """Items of `Ordered` as a batch."""
    rows, images, captions, pixels, readable = zip(*items, strict=True)
    return np.array(rows), torch.stack(images), list(captions), np.array(pixels, np.uint64), np.array(readable)
