"""FLAME and its baseline on the study's image towers: `python -m studies.flame_towers PRESET [--overrides]`.

A preset trains as flame.train does, with the same settings, on one of two towers: a small convolutional
network from scratch, or a locked EfficientNet-Lite0. Of the locked tower, only the MLP behind it is trained: its corpus
(`Cells`) has the mean of the tower's last map instead of images, one cell, which is computed once, on whole images, and
kept in --cache. The floors have the same features. In evaluation the tower stands before the MLP (`WholeTower`).
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn

from flame import train
from flame.config import PRESETS as PAPER_PRESETS
from flame.config import Config
from flame.model import FLAME
from shared import checkpoints, cli, data, evaluation, run
from shared.pretrained import LITE0_MEAN, LITE0_STD, efficientnet_lite0, fold_batch_norms
from studies.harness.ceiling import square_pixels

GRID, WIDTH = 1, 1280  # cells a side, channels
LOCKED = "FLAME-lite0"  # open_clip config of the head on cells
KNOWN = replace(
    PAPER_PRESETS["emoji"][1], data="data/flame/known/train", bank="data/flame/bank-smollm2-centred", eval_every=0,
    distinct_captions=True, hidden_dim=512, loss="mp-nce", logit_scale=1 / 0.07,
)  # fmt: skip
CONVNET = replace(KNOWN, model="FLAME-convnet", keep_in_memory=True, augmentation="small", epochs=30, batch_size=512)
LITE0 = replace(KNOWN, model=LOCKED, hidden_dim=4096, epochs=20, batch_size=256, lr=2e-3)
LITE0_CLIP = replace(LITE0, method="clip", captions=(*KNOWN.captions, KNOWN.captions[-1]))  # half of them long ones
PRESETS = {
    "emoji-convnet": ("ours: FLAME with a small convolutional network from scratch", CONVNET),
    "emoji-convnet-clip": ("ours: CLIP, baseline of emoji-convnet", replace(CONVNET, method="clip")),
    "emoji-lite0": ("ours: FLAME on a locked EfficientNet-Lite0", LITE0),
    "emoji-lite0-clip": ("ours: CLIP, baseline of emoji-lite0", LITE0_CLIP),
}

# --------------------------------------------------------------------------------------------------------------- cells


@functools.cache
def whole_image(side: int) -> Callable[[Image.Image], Tensor]:
    """`square_pixels` of this side; the same object in each call, so that floors can share cached images."""
    return functools.partial(square_pixels, side=side)


@functools.cache
def trunk(device: torch.device) -> nn.Module:
    return fold_batch_norms(efficientnet_lite0()).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def cells_of(pixels: Iterable[Tensor], device: torch.device, precision: str = "auto", batch_size: int = 32) -> Tensor:
    """uint8 images (3, H, H) -> cells (N, 1280, 1, 1), float16, on the CPU; 32 images of 128 pixels fit a processor's
    cache."""
    normalise, source = data.ToNormalizedTensor(LITE0_MEAN, LITE0_STD).normalise, iter(pixels)
    found = [np.empty((0, WIDTH, GRID, GRID), dtype=np.float16)]
    with run.autocast(precision, device):
        while batch := list(itertools.islice(source, batch_size)):
            images = normalise(torch.stack(batch).to(device)).contiguous(memory_format=torch.channels_last)
            found.append(F.adaptive_avg_pool2d(trunk(device).forward_features(images), GRID).half().cpu().numpy())
    return torch.from_numpy(np.concatenate(found))


class Cells:
    """Pairs whose images are cells (1280, 1, 1) float32 of the locked tower, with the captions of --data."""

    def __init__(self, cfg: Config, side: int):
        pairs = data.open_pairs(cfg.data, None, cfg.strict, Path(cfg.cache))
        self.cells = self.kept(cfg, pairs, side)
        self.pairs = data.open_pairs(cfg.data, cfg.dataset_size, cfg.strict, Path(cfg.cache))
        self.keys, self.strict, self.broken = self.pairs.keys, self.pairs.strict, self.pairs.broken
        self.fingerprint, self.caption = self.pairs.fingerprint, self.pairs.caption

    @staticmethod
    def kept(cfg: Config, pairs: data.Shards | data.TSV, side: int) -> Tensor:
        """Cells of all pairs, from --cache; if it has none, they are computed. Cells of a neighbour stand in for
        those of a broken image, and are then not kept."""
        device = torch.device("cuda" if cfg.device == "auto" and torch.cuda.is_available() else "cpu")
        precision = run.resolve_precision(cfg.precision, device)
        path = Path(cfg.cache) / f"cells-{GRID}-{evaluation.images_of(pairs)}-{side}-{precision}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path))
        broken: list[data.Broken] = []

        def images(tick: Callable[[int], object]) -> Iterator[Tensor]:
            for row in range(len(pairs)):
                yield square_pixels(data.read_or_next(pairs, row, broken).image, side)
                tick(1)

        with run.counting(len(pairs), f"cells of {cfg.data}", "image") as tick:
            found = cells_of(images(tick), device, precision)
        if line := data.broken_report(broken):
            print(line)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoints.save_array(path, found.numpy(), f".{os.getpid()}.tmp")  # several runs may start together
        return found

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, row: int) -> data.Pair:
        return data.Pair(self.keys[row], self.cells[row].float(), self.caption(row))


class CellTower(nn.Module):
    """In the locked tower's place: its cells, with dropout."""

    input_shape, num_features = (WIDTH, GRID, GRID), WIDTH

    def __init__(self, drop_rate: float):
        super().__init__()
        self.drop = nn.Dropout(drop_rate)

    def forward_features(self, cells: Tensor) -> Tensor:
        return self.drop(cells)


@register_model
def lite0_cells(pretrained: bool = False, drop_rate: float = 0.0, **options) -> CellTower:
    """timm's entry for `CellTower`."""
    return CellTower(drop_rate)


class WholeTower(nn.Module):
    """A trained head on cells as a model of images: the locked tower before it. Cells of an image are computed once."""

    known: dict[bytes, Tensor] = {}  # of all models in this process

    def __init__(self, head: FLAME, side: int):
        super().__init__()
        self.head, self.transform = head, whole_image(side)

    def encode_image(self, images: Tensor, visual_only: bool = False) -> Tensor:
        """uint8 images (B, 3, H, H) -> (B, D)."""
        keys = [data.file_hash(image.cpu().numpy().tobytes()) for image in images]
        new = {key: image for key, image in zip(keys, images.cpu(), strict=True) if key not in self.known}
        if new:
            self.known.update(zip(new, cells_of(new.values(), images.device), strict=True))
        cells = torch.stack([self.known[key].float() for key in keys]).to(images.device)
        return self.head.encode_image(cells, visual_only)


def side_of(cfg: Config) -> int:
    """Side of the images that the locked tower sees."""
    return cfg.image_size or 128


# -------------------------------------------------------------------------------------------------------------- script


def main(cfg: Config) -> Path | None:
    """Train a preset."""
    cells = cfg.model == LOCKED and not cfg.dry_run
    return train.main(cfg, Cells(cfg, side_of(cfg)) if cells else None)


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
