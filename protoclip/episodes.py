"""ProtoCLIP's episodes: the samples of an episode, the views of each sample, and the order of a pass.

Authors' code megvii-research/protoclip@fde1933, cited as `U:` (its `src/`). An episode is N samples drawn with
replacement; its cached features and pseudo-labels are indexed by the position i in 0..N-1.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from shared import data, memory, run, windows
from shared.errors import UserError


def image_transform(
    size: int, train: bool, light: bool = False, crop=None, ratio=(3 / 4, 4 / 3), statistics=memory.CLIP_STATISTICS
) -> transforms.Compose:
    """PIL RGB -> (3, size, size), normalised with `statistics` (mean, std). U:open_clip/transform.py:13.

    `crop` replaces the augmentation's own range of areas.
    """
    bicubic = InterpolationMode.BICUBIC
    if not train:
        steps = [transforms.Resize(size, bicubic), transforms.CenterCrop(size)]
    elif not light:
        steps = [transforms.RandomResizedCrop(size, scale=crop or (0.9, 1.0), ratio=ratio, interpolation=bicubic)]
    else:
        steps = [
            transforms.RandomResizedCrop(size, scale=crop or (0.5, 1.0), ratio=ratio, interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.2),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.GaussianBlur(kernel_size=21)], p=0.2),
        ]
    return transforms.Compose([*steps, data.ToNormalizedTensor(*statistics)])


class BatchTransform:
    """`image_transform` for a whole batch: takes (B, 3, H, H) uint8 images and (B, COUNT) numbers in [0, 1)."""

    COUNT = 13  # random numbers per image

    def __init__(
        self,
        size: int,
        train: bool,
        light: bool = False,
        crop=None,
        ratio=(3 / 4, 4 / 3),
        statistics=memory.CLIP_STATISTICS,
    ):
        self.size, self.light = size, train and light
        self.scale = (crop or ((0.5, 1.0) if light else (0.9, 1.0))) if train else (1.0, 1.0)
        self.ratio = ratio if train else (1.0, 1.0)
        self.statistics = statistics

    def __call__(self, pixels: Tensor, u: Tensor) -> Tensor:
        flip = u[:, 4] < 0.5 if self.light else None
        images = memory.crop_and_resize(pixels, memory.random_crops(u, self.scale, self.ratio), self.size, flip)
        if self.light:
            images = light_colours(images.div_(255), u[:, 5:]).mul_(255)
        return memory.normalized(images, self.statistics)


def identity(features: Tensor, u: Tensor) -> Tensor:
    """Return the features (B, C) of a locked trunk unchanged: features are not augmented."""
    return features


def light_colours(images: Tensor, u: Tensor) -> Tensor:
    """Colour jitter, grey and blur of the light augmentation, each with probability 0.2. images in 0..1, u (B, 8)."""
    jittered = [  # torchvision draws a random order for each image; here half of the images get the reverse order
        lambda x, u: functional.adjust_brightness(x, 0.2 + 1.6 * u[1]),
        lambda x, u: functional.adjust_contrast(x, 0.2 + 1.6 * u[2]),
        lambda x, u: functional.adjust_saturation(x, 0.2 + 1.6 * u[3]),
        lambda x, u: functional.adjust_hue(x, -0.2 + 0.4 * u[4]),
    ]
    for i, draws in enumerate(u.tolist()):
        x = images[i]
        if draws[0] < 0.2:
            for change in jittered if draws[0] < 0.1 else reversed(jittered):
                x = change(x, draws)
        if draws[5] < 0.2:
            x = functional.rgb_to_grayscale(x, 3)
        if draws[6] < 0.2:
            x = functional.gaussian_blur(x, 21, 0.1 + 1.9 * draws[7])
        images[i] = x
    return images


def ascii_caption(caption: str) -> str:
    """The student's caption: without non-ASCII characters (U:training/data.py:41). The teacher gets all characters."""
    return caption.encode("ascii", errors="ignore").decode()


def sample_episode(dataset_size: int, episode_size: int, rng: np.random.RandomState) -> np.ndarray:
    """(N,) int64 indices of an episode's samples in the data, drawn with replacement. U:training/main.py:357.

    Successive calls with one `np.random.RandomState(seed)` give upstream's episodes.
    """
    return rng.choice(dataset_size, episode_size, replace=True)


class EpisodeDataset(Dataset):
    """Item i is (i, image (3, S, S), tokens (L,), list of skipped broken samples), of sample `samples[i]` of `pairs`.
    U:training/data.py:24.

    Pseudo-labels and cached features are indexed by the episodic index i. A view is a function of (seed, i) alone.
    If `transform` ends with normalisation, items have uint8 images, and `normalise` normalises a batch of them.
    """

    def __init__(self, pairs, samples: np.ndarray, transform, tokenizer, seed: tuple[int, ...] = (0,)):
        self.pairs, self.samples, self.tokenizer, self.seed = pairs, samples, tokenizer, seed
        self.transform, self.normalise = data.split_normalisation(transform)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor, list[data.Broken]]:
        broken: list[data.Broken] = []
        pair = data.read_or_next(self.pairs, int(self.samples[i]), broken)
        torch.default_generator.manual_seed(data.stable_hash(*self.seed, int(i)))  # CPU only: cheap
        return int(i), self.transform(pair.image), self.tokenizer(ascii_caption(pair.caption))[0], broken


def collate(items: list) -> tuple[Tensor, Tensor, Tensor, list[data.Broken]]:
    index, images, tokens, broken = zip(*items, strict=True)
    return torch.tensor(index), torch.stack(images), torch.stack(tokens), [b for each in broken for b in each]


def pass_order(cfg, process: run.Process, dataset: EpisodeDataset, start: int = 0) -> list[np.ndarray]:
    """This rank's batches of one shuffled pass, from batch `start` on."""
    size = cfg.batch_size // process.world_size
    if cfg.distinct_captions:
        order = np.random.default_rng(dataset.seed).permutation(len(dataset))
        whole = memory.distinct_batches(order, dataset.pairs.labels[dataset.samples], cfg.batch_size)
        batches = [batch[process.rank * size : (process.rank + 1) * size] for batch in whole[start:]]
    else:
        batches = data.batches(len(dataset), size, dataset.seed, process.rank, process.world_size, start)
    return [batch for batch in batches if len(batch)]


def episode_batches(
    cfg, process: run.Process, passes: Sequence[EpisodeDataset], start: int = 0
) -> tuple[list[int], Iterator]:
    """(this rank's number of batches in each pass over an episode, iterator over the batches of all passes in turn).

    The last pass starts at batch `start`. The same workers read all passes, and start when this is called.
    """
    orders = [pass_order(cfg, process, dataset, start if dataset is passes[-1] else 0) for dataset in passes]
    counts = list(map(len, orders))
    if isinstance(passes[0].pairs, memory.InMemory):
        count, each = BatchTransform.COUNT, zip(passes, orders, strict=True)
        views = (memory.Views(of.pairs, of.samples, of.transform, count, of.seed, order) for of, order in each)
        return counts, itertools.chain.from_iterable(views)
    items = [number * len(passes[0]) + batch for number, order in enumerate(orders) for batch in order]
    return counts, iter(data.loader_of(ConcatDataset(passes), items, collate, cfg, process))


class EpisodeSampler:
    """Opens the data (with --episode-shards, an episode's shards) and draws the samples of each episode."""

    def __init__(self, cfg):
        self.cfg, self.rng, self.drawn = cfg, np.random.RandomState(cfg.seed), 0
        if cfg.episode_shards:
            self.shards = data.expand_shards(cfg.data)
            if not 0 < cfg.episode_shards <= len(self.shards):
                raise UserError(
                    f"--episode-shards must be in 1..{len(self.shards)}, the number of shards, not {cfg.episode_shards}"
                )
            self.pairs, self.fetcher = None, windows.Fetcher(windows.own_cache(cfg))
        else:
            self.pairs = data.open_pairs(cfg.data, cfg.dataset_size, cfg.strict, Path(cfg.cache))

    def shards_of(self, episode: int) -> list[str]:
        """The next `episode_shards` shards of a list that is reshuffled after each pass over it."""
        n, chosen = len(self.shards), []
        for position in range(episode * self.cfg.episode_shards, (episode + 1) * self.cfg.episode_shards):
            order = np.random.default_rng((self.cfg.seed, position // n)).permutation(n)
            chosen.append(self.shards[order[position % n]])
        return sorted(set(chosen))

    def episode(self, episode: int):
        """(pairs, indices (N,) of the episode's samples in them). Draws skipped episodes, too: a resumed run gets the
        same samples."""
        pairs = self.pairs
        if pairs is None:
            folder = windows.own_cache(self.cfg)
            wanted = self.shards_of(episode)
            if episode > 1:  # keep the last episode's copies: another rank may still be reading them
                self.fetcher.evict(self.shards_of(episode - 2), {*wanted, *self.shards_of(episode - 1)})
            self.fetcher.start(wanted)
            self.fetcher.wait(wanted)
            pairs = data.Shards([data.fetch(shard, folder) for shard in wanted], strict=self.cfg.strict, cache=folder)
            rng = np.random.RandomState(data.stable_hash(self.cfg.seed, episode) % 2**32)
            return pairs, sample_episode(len(pairs), self.cfg.episode_size, rng)
        while self.drawn < episode:
            sample_episode(len(pairs), self.cfg.episode_size, self.rng)
            self.drawn += 1
        self.drawn += 1
        return pairs, sample_episode(len(pairs), self.cfg.episode_size, self.rng)

    def fetch(self, episode: int) -> None:
        """Start to fetch the shards of an episode, if it exists. Fork no process meanwhile (see `windows.Fetcher`)."""
        if self.pairs is None and episode < self.cfg.episodes:
            self.fetcher.start(self.shards_of(episode))
