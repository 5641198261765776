"""What ProtoCLIP sees of the data: captions, views of images, and with --episode-shards an episode's shards.

U: is megvii-research/protoclip@fde1933, src/.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from protoclip.config import Config
from protoclip.model import ProtoCLIP, image_statistics
from shared import data
from shared.clip import image_side
from shared.data import ToNormalizedTensor
from shared.views import SmallView

BICUBIC = InterpolationMode.BICUBIC


def training_view(cfg: Config, model: ProtoCLIP) -> Callable[[Image.Image], Tensor]:
    """PIL RGB -> random view (3, S, S), normalised; `default` or `light`: U:open_clip/transform.py:13."""
    if cfg.augmentation == "small":
        return SmallView(image_side(model), *image_statistics(model))
    light = cfg.augmentation == "light"
    area = (0.5, 1.0) if light else (0.9, 1.0)
    steps = [transforms.RandomResizedCrop(image_side(model), area, interpolation=BICUBIC)]
    if light:
        steps += [
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.2),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.GaussianBlur(kernel_size=21)], p=0.2),
        ]
    return transforms.Compose([*steps, ToNormalizedTensor(*image_statistics(model))])


def whole_image(model: ProtoCLIP) -> transforms.Compose:
    """PIL RGB -> its centre square (3, S, S), normalised, for evaluation."""
    side = image_side(model)
    steps = [transforms.Resize(side, BICUBIC), transforms.CenterCrop(side)]
    return transforms.Compose([*steps, ToNormalizedTensor(*image_statistics(model))])


def ascii_caption(caption: str) -> str:
    """The student's caption: without non-ASCII characters (U:training/data.py:42). The external teacher gets all."""
    return caption.encode("ascii", errors="ignore").decode()


def episode_pairs(cfg: Config, episode: int) -> data.Shards:
    """With --episode-shards, the pairs of an episode: those of the next shards of an endlessly reshuffled list."""
    shards, chosen = data.expand_shards(cfg.data), []
    for place in range(episode * cfg.episode_shards, (episode + 1) * cfg.episode_shards):
        order = np.random.default_rng((cfg.seed, place // len(shards))).permutation(len(shards))
        chosen.append(shards[order[place % len(shards)]])
    return data.open_pairs("::".join(sorted(set(chosen))), None, cfg.strict, Path(cfg.cache))
