"""Small corpora in memory: images are decoded once, and random views are computed for a whole batch at a time.

A view is a function of (seed, item), independent of the order of batches, the number of processes and resuming:
`uniforms` draws one row of random numbers per item in advance.

Shapes: N items, B batch, H stored side, S side of a view, L tokens.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from shared import clip, data, run
from shared.errors import UserError
from shared.tars import Broken

CLIP_STATISTICS = clip.STATISTICS


class InMemory(NamedTuple):
    """All pairs of a small corpus, in the order of its samples."""

    pixels: Tensor  # (N, 3, H, H) uint8, or features (N, D) of a frozen network
    tokens: Tensor  # (N, L) int64
    labels: np.ndarray  # (N,) int64, the same for equal captions
    broken: list[Broken]  # samples that were replaced by a neighbour

    def to(self, device: torch.device) -> "InMemory":
        """Copy with pixels on the device. Tokens stay on the CPU, where `clip.trimmed` reads their length."""
        return self._replace(pixels=self.pixels.to(device))


def square_pixels(image: Image.Image, side: int) -> Tensor:
    """RGB image -> its centre square (3, side, side) uint8, as open_clip's transform and clip-benchmark take it."""
    resized = functional.resize(image, side, functional.InterpolationMode.BICUBIC)
    return data.to_pixels(functional.center_crop(resized, side))


def check_size(count: int, side: int, process: run.Process | None = None) -> None:
    """UserError if `count` images of `side` pixels in each process of this machine exceed half of its memory."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size if process else 1))
    needed, there = 3 * side**2 * count * processes, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there / 2:
        raise UserError(
            f"{count:,} images of {side} pixels take {needed / 2**30:.0f} GiB in {processes} processes, "
            f"more than half of the machine's {there / 2**30:.0f} GiB: pass --no-keep-in-memory"
        )


def read(
    pairs: data.Shards | data.TSV,
    side: int,
    tokenize: Callable[[list[str]], Tensor],
    process: run.Process | None = None,
) -> InMemory:
    """Decode every pair: images as centre squares of `side` pixels, captions as tokens.

    An image with several captions is decoded once. UserError if the images exceed half of the machine's memory (see
    `check_size`).
    """
    check_size(len(pairs), side, process)
    pixels, captions, broken = torch.empty(len(pairs), 3, side, side, dtype=torch.uint8), [], []
    decoded: dict[bytes, int] = {}  # hash of an image's file -> index of its first sample

    def decode(content: bytes) -> tuple[bytes, Tensor]:
        key = data.file_hash(content)
        if key in decoded:
            return key, pixels[decoded[key]]
        return key, square_pixels(data.decode_image(content), side)

    for row in run.progress(range(len(pairs)), len(pairs), "reading", 1, process):
        pair = data.read_or_next(pairs, row, broken, decode)
        key, pixels[row] = pair.image
        decoded.setdefault(key, row)
        captions.append(pair.caption)
    tokens = torch.cat([tokenize(captions[i : i + 1024]) for i in range(0, len(captions), 1024)])
    return InMemory(pixels, tokens, np.unique(captions, return_inverse=True)[1], broken)


# ------------------------------------------------------------------------------------------------------------- views


def uniforms(seed: Sequence[int], n: int, count: int) -> Tensor:
    """(n, count) random numbers in [0, 1); row i is for item i."""
    return torch.from_numpy(np.random.default_rng(seed).random((n, count), dtype=np.float32))


def random_crops(u: Tensor, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Tensor:
    """Random numbers (B, 4) -> boxes (B, 4) left, top, width, height in units of the image's side.

    Area and aspect ratio are drawn as in torchvision's RandomResizedCrop. A box that does not fit is cut to the image;
    torchvision draws it again. With areas above 1, boxes reach beyond the image.
    """
    area = scale[0] + (scale[1] - scale[0]) * u[:, 0]
    log_ratio = math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[:, 1]
    size = torch.stack([(area * log_ratio.exp()).sqrt(), (area / log_ratio.exp()).sqrt()], dim=1)
    size = size.clamp(max=max(1.0, math.sqrt(scale[1])))
    return torch.cat([u[:, 2:4] * (1 - size), size], dim=1)


def bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, as in PIL; x: distances in pixels, >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros(())))


def resampling(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Weights (B, target, source) that resize [start, start + length) of a line of `source` pixels to `target` pixels.

    This is PIL's antialiased bicubic filter: its unit is a target pixel if the image shrinks, else a source pixel.
    start, length (B,) are in source pixels. Positions beyond the line take the value at its nearest end.
    """
    step = (length / target)[:, None, None]  # source pixels per target pixel
    centre = start[:, None, None] + (torch.arange(target, device=start.device)[None, :, None] + 0.5) * step
    centre = centre.clamp(0, source)
    distance = (torch.arange(source, device=start.device) + 0.5 - centre).abs()
    weights = bicubic(distance / step.clamp(min=1))
    return weights / weights.sum(dim=2, keepdim=True)


def crop_and_resize(pixels: Tensor, boxes: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """pixels (B, 3, H, H) uint8, boxes (B, 4) of `random_crops`, flip (B,) bool -> (B, 3, S, S) float, 0 to 255."""
    batch, _, height, width = pixels.shape
    across = resampling(boxes[:, 0] * width, boxes[:, 2] * width, width, size)  # (B, S, H)
    down = resampling(boxes[:, 1] * height, boxes[:, 3] * height, height, size)
    if flip is not None:
        across = torch.where(flip[:, None, None], across.flip(1), across)
    x = torch.bmm(pixels.view(batch, 3 * height, width).float(), across.transpose(1, 2)).clamp_(0, 255)
    return torch.matmul(down[:, None], x.view(batch, 3, height, size)).clamp_(0, 255)  # bicubic overshoots at edges


def distinct_batches(order: np.ndarray, labels: np.ndarray, size: int) -> list[np.ndarray]:
    """Split the items of `order` into batches of `size`, with distinct labels where possible.

    An item whose label is already in the batch is moved to the next batch. The last batch may be short.
    """
    waiting, cut = list(order), []
    while waiting:
        seen, batch, later = set(), [], []
        for item in waiting:
            label = labels[item]
            if len(batch) < size and label not in seen:
                seen.add(label)
                batch.append(item)
            else:
                later.append(item)
        missing = min(size - len(batch), len(later))
        cut.append(np.array(batch + later[:missing]))
        waiting = later[missing:]
    return cut


class Views:
    """Batches (index, images (B, 3, S, S), tokens (B, L), broken samples) of the samples `rows` of a corpus in memory.

    `transform(pixels (B, 3, H, H) uint8, u (B, count))` returns the images; u are the `uniforms` of the items.
    `batches` are item indices from `data.batches`. Index and images are on the device of the pixels, tokens on the CPU.
    """

    def __init__(
        self,
        memory: InMemory,
        rows: np.ndarray,
        transform: Callable[[Tensor, Tensor], Tensor],
        count: int,
        seed: Sequence[int],
        batches: list[np.ndarray],
    ):
        self.memory, self.rows, self.transform, self.batches = (
            memory,
            torch.from_numpy(np.asarray(rows)),
            transform,
            batches,
        )
        self.uniforms = uniforms((*seed, 1), len(rows), count)  # another stream than that of the shuffled order

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, list[Broken]]]:
        device = self.memory.pixels.device
        rows, uniforms = self.rows.to(device), self.uniforms.to(device)
        for batch in self.batches:
            items = torch.from_numpy(batch)
            index = run.pinned(items, device).to(device, non_blocking=True)
            images = self.transform(self.memory.pixels[rows[index]], uniforms[index])
            yield index, images, run.pinned(self.memory.tokens[self.rows[items]], device), []


@functools.cache
def statistics_on(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of channels, (3, 1, 1) each, on a device; cached."""
    return tuple(torch.tensor(values, device=device)[:, None, None] for values in (mean, std))


def normalized(images: Tensor, statistics: tuple[Sequence[float], Sequence[float]] = CLIP_STATISTICS) -> Tensor:
    """images (B, 3, S, S), 0 to 255 -> normalised, channels last; changes `images`. statistics: of values 0 to 1."""
    mean, std = (255 * x for x in statistics_on(images.device, *map(tuple, statistics)))
    return images.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
