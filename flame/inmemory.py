"""Small corpora in memory: all images and texts are loaded once, and whole batches are made at a time.

Images are pixels, or a locked trunk's tokens of whole images, which are stored in --cache for later runs. Order, crops
and drawn facets are functions of (seed, epoch, sample): neither the number of processes nor a resume changes them.
Letters: N images, T facets per image in the bank, C captions per image, M tokens per image.
"""

import copy
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flame.bank import Bank, centred
from flame.config import Config
from flame.embed import evenly_spaced, read_images
from flame.model import Convolutional
from shared import checkpoints, data, evaluation, memory, run
from shared.evalsets import EvalSet
from shared.pretrained import fold_batch_norms

# ---------------------------------------------------------------------------------------------- a locked trunk's tokens


@torch.no_grad()
def trunk_tokens(
    pixels: Iterable[Tensor], tower: Convolutional, device: torch.device, precision: torch.dtype, batch_size: int = 32
) -> Tensor:
    """uint8 images (3, H, H) -> tokens (N, M, W), float16, on the CPU; 32 images of 128 pixels fit a processor's
    cache."""
    folded = copy.deepcopy(tower).eval()
    folded.trunk = fold_batch_norms(tower.trunk)
    folded.to(device, memory_format=torch.channels_last)
    found, source = [], iter(pixels)
    with run.autocast(precision, device):
        while batch := list(itertools.islice(source, batch_size)):
            images = memory.normalized(torch.stack(batch).to(device).float(), tower.statistics)
            found.append(folded.tokens(images).half().cpu())
    return torch.cat(found)


def whole_image(side: int) -> Callable[[Image.Image], Tensor]:
    """PIL image -> its centre square (3, side, side), uint8."""
    return functools.partial(memory.square_pixels, side=side)


def training_tokens(cfg: Config, tower: Convolutional, process: run.Process) -> Tensor:
    """Tokens (N, M, W) of all samples of --data, from --cache; if it has none, the first process computes them."""
    pairs = data.open_pairs(cfg.data, None, cfg.strict, Path(cfg.cache))
    precision, side = run.resolve_precision(cfg.precision, process.device), tower.image_size[0]
    path = Path(cfg.cache) / f"tokens-{evaluation.images_of(pairs)}-{side}-{precision}.npy"
    broken: list[data.Broken] = []
    if process.main and not path.exists():
        view = whole_image(side)

        def images(tick: Callable[[int], object]) -> Iterator[Tensor]:
            for row in range(len(pairs)):
                yield view(data.read_or_next(pairs, row, broken).image)
                tick(1)

        with run.counting(len(pairs), f"tokens of {cfg.data}", "image", process) as tick:
            tokens = trunk_tokens(images(tick), tower, process.device, run.DTYPES[precision])
        if line := data.broken_report(broken):
            print(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.save_array(path, tokens.numpy(), f".{os.getpid()}.tmp")  # several runs may start together
    run.wait()
    tokens = torch.from_numpy(np.load(path))
    run.wait()
    if process.main and broken:  # a neighbour's tokens stand in for those of a broken image, which may be mended
        path.unlink(missing_ok=True)
    return tokens


_kept: dict[tuple, tuple[Tensor, Tensor | list]] = {}  # results of `set_tokens` in this process


def set_tokens(
    eval_set: EvalSet, tower: Convolutional, device: torch.device, precision: torch.dtype, limit: int | None = None
) -> tuple[Tensor, Tensor | list]:
    """Tokens (N, M, W), and labels (N,) or captions of each image, of an evaluation set, computed once per process.

    At most `limit` images, evenly spaced.
    """
    key = (str(eval_set.folder), eval_set.split, tower.image_size, precision, limit)
    if key not in _kept:
        whole = copy.copy(eval_set)
        whole.transform = whole_image(tower.image_size[0])
        targets = evenly_spaced([target for _, target in whole.targets()], limit)
        images = read_images(whole, limit)
        tokens = trunk_tokens(run.progress(images, len(images), eval_set.name), tower, device, precision)
        _kept[key] = tokens, torch.tensor(targets) if isinstance(targets[0], int) else targets
    return _kept[key]


# ------------------------------------------------------------------------------------------------------------- training


def distinct_texts(bank: Bank, keys: Sequence[str], cfg: Config) -> tuple[Tensor, np.ndarray]:
    """Distinct embeddings (U, T, D) of these samples, centred if `cfg.centre` is set, and each sample's index into them
    (N,)."""
    ids = [bank.embedding_ids[bank.lookup.row(key)] for key in keys]
    _, firsts, text_ids = np.unique(ids, return_index=True, return_inverse=True)
    texts = torch.stack([bank[keys[first]] for first in firsts])
    texts = centred(texts, bank.centres[: bank.facets]) if cfg.centre else texts
    return texts[:, list(cfg.facet_ids)] if cfg.facet_ids else texts, text_ids


class InMemory:
    """The training data, read in whole batches, with the same settings as `train.FacetDataset`.

    `images` are pixels (N, 3, H, H) uint8 or tokens (N, M, W) float16. `texts` are embeddings (U, T, D) of the bank,
    where image i has texts[text_ids[i]], or for the clip method CLIP tokens (N, C, L).
    """

    def __init__(
        self,
        pairs: data.Shards | data.TSV,
        cfg: Config,
        tower,
        process: run.Process,
        bank: Bank | None = None,
        captions: Sequence[dict[str, str]] = (),
        tokenizer: Callable | None = None,
    ):
        self.pairs, self.cfg, self.process, self.side = pairs, cfg, process, tower.image_size[0]
        self.statistics = getattr(tower, "statistics", memory.CLIP_STATISTICS)
        keys = [str(key) for key in pairs.keys.tolist()]
        if cfg.lock_image:
            self.images = training_tokens(cfg, tower, process)[: len(pairs)]
        else:
            nothing = lambda captions: torch.zeros(len(captions), 1)  # noqa: E731
            read = memory.read(pairs, 2 * self.side, nothing, process)
            self.images = read.pixels
            pairs.broken = [*pairs.broken, *read.broken]
        if bank is not None:
            self.texts, self.text_ids = distinct_texts(bank, keys, cfg)
            self.labels, self.draws = self.text_ids, self.texts.shape[1]
        else:
            read = [[found[key] for found in captions] for key in keys] if captions else [
                [pairs.caption(row)] for row in range(len(pairs))
            ]  # fmt: skip
            self.texts, self.draws = torch.stack([tokenizer(each) for each in read]), len(read[0])
            self.labels = np.unique(["\n".join(each) for each in read], return_inverse=True)[1]

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        """Batches are normalised already."""
        return images

    def batches(self, epochs: range, start: int = 0) -> Iterator[tuple[Tensor, Tensor, list[data.Broken]]]:
        """This process's (images, texts, []) of these epochs, starting at batch `start` of the first epoch."""
        cfg, size = self.cfg, self.cfg.batch_size // self.process.world_size
        own = slice(self.process.rank * size, (self.process.rank + 1) * size)
        for epoch in epochs:
            order = np.random.default_rng((cfg.seed, epoch)).permutation(len(self.images))
            if cfg.distinct_captions:
                cut = memory.distinct_batches(order, self.labels, cfg.batch_size)
            else:
                cut = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
            u = memory.uniforms((cfg.seed, epoch, 1), len(order), 4 + self.draws)
            for batch in cut[start if epoch == epochs[0] else 0 : len(order) // cfg.batch_size]:
                samples = torch.from_numpy(batch[own])
                inputs = self.pictures(samples, u[samples, :4]), self.drawn(samples, u[samples, 4:])
                yield *(run.pinned(x, self.process.device) for x in inputs), []

    def pictures(self, samples: Tensor, u: Tensor) -> Tensor:
        """Tokens (B, M, W), or random crops (B, 3, S, S), normalised; u (B, 4) random numbers."""
        if self.cfg.lock_image:
            return self.images[samples].float()
        boxes = memory.random_crops(u, (self.cfg.crop_scale, 1.0))
        return memory.normalized(memory.crop_and_resize(self.images[samples], boxes, self.side), self.statistics)

    def drawn(self, samples: Tensor, u: Tensor) -> Tensor:
        """K facets (B, K, D) without replacement, or the tokens of one caption (B, L); u (B, T) random numbers."""
        if self.cfg.method == "clip":
            return self.texts[samples, (u[:, 0] * self.draws).long()]
        chosen = u.argsort(dim=1)[:, : self.cfg.facets]
        return self.texts[torch.from_numpy(self.text_ids)[samples][:, None], chosen]
