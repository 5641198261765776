"""Turns images, or a features file, into batches of frozen features, with the rows [view w; view s].

NMTune (arXiv 2309.17002) treats the encoder as a black box. Tuning takes the features of two views of each image
(`TwoViews`, `Bank`), of one view (LP), or features that another program wrote to a file (`read_features`);
`RunFeatures` makes a run's batches from one of these. Authors' code Hhhhhhao/Noisy-Model-Learning@f249dce, `U:`.
"""

import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from nmtune.config import Config, PretrainConfig, TuningConfig, named_tests
from nmtune.datasets import LabelledImages, benchmark, flip_labels, open_labelled, open_test
from nmtune.encoders import load_encoder
from shared import checkpoints, data, run
from shared.errors import UserError


def subset_per_class(labels: np.ndarray, ratio: float, rng: np.random.RandomState) -> np.ndarray:
    """Positions of int(n_c ratio) samples of each class c, drawn without replacement, class by class -> (K,) int64.

    U:src/datasets/common.py:155-181. Classes without samples are skipped.
    """
    labels = np.asarray(labels)
    chosen = []
    for label in range(int(labels.max(initial=-1)) + 1):
        rows = np.flatnonzero(labels == label)
        if len(rows):
            chosen.append(rows[rng.choice(len(rows), int(len(rows) * ratio), replace=False)])
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


def hold_out(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions (kept samples, held-out samples): a fifth of every class, rounded up, is held out at random."""
    kept = np.sort(subset_per_class(labels, 0.8, np.random.RandomState(seed)))
    return kept, np.setdiff1d(np.arange(len(labels)), kept)


# --------------------------------------------------------------------------------------------------------------- views


class TwoViews:
    """An image as (view w, view s), each by its own transform. U:src/models/nml_tune.py:23-31."""

    def __init__(self, transform_w: Callable, transform_s: Callable):
        self.transform_w, self.transform_s = transform_w, transform_s

    def __call__(self, image):
        return self.transform_w(image), self.transform_s(image)


def with_rand_augment(transform: transforms.Compose) -> transforms.Compose:
    """Insert RandAugment (3 operations, magnitude 5) after the crop: upstream's strong view.

    U:src/models/nml_tune.py:72-76 inserts it third from last, which is after the crop, too: upstream's transforms end
    in two steps (to a tensor, normalise) that are one step here.
    """
    steps = list(transform.transforms)
    bicubic = transforms.InterpolationMode.BICUBIC
    steps.insert(1, transforms.RandAugment(3, 5, interpolation=bicubic))
    return transforms.Compose(steps)


class Views(Dataset):
    """Item (epoch, row) -> (views of the image as one tensor (V, 3, S, S), label, broken samples skipped).

    The views depend on (seed, epoch, row) only. `transform` returns a tensor or a tuple of tensors.
    """

    def __init__(self, images: LabelledImages, transform: Callable, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, list]:
        epoch, row = item
        broken: list[data.Broken] = []
        image, label = data.read_or_next(self.images, row, broken)
        torch.default_generator.manual_seed(run.stable_hash(self.seed, epoch, row))
        views = self.transform(image)
        return torch.stack(views if isinstance(views, tuple) else (views,)), label, broken


def collate(items: list) -> tuple[Tensor, Tensor, list]:
    """-> views (V, B, 3, S, S), labels (B,), broken samples. In a short last batch a rank may have no images."""
    if not items:
        return torch.zeros(2, 0), torch.zeros(0, dtype=torch.long), []
    views, labels, broken = zip(*items, strict=True)
    return torch.stack(views, dim=1), torch.tensor(labels), [one for each in broken for one in each]


def load(views: Views, order: Iterable[list[tuple[int, int]]], workers: int, process: run.Process) -> DataLoader:
    """Batches of the items in `order`, by `collate`."""
    return DataLoader(
        views, batch_sampler=order, num_workers=workers, collate_fn=collate, pin_memory=process.device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # so that the loader does not use the global generator
    )  # fmt: skip


def training_order(
    n: int, cfg: TuningConfig, process: run.Process, epochs: range, start: int = 0
) -> Iterator[list[tuple[int, int]]]:
    """This rank's batches of (epoch, row), from batch `start` of the first epoch on.

    Each epoch is a shuffled pass over n samples, whose last batch may be short, and empty for some ranks.
    """
    size = cfg.batch_size // process.world_size
    for epoch in epochs:
        first = start if epoch == epochs[0] else 0
        for rows in data.batches(n, size, (cfg.seed, epoch), process.rank, process.world_size, first):
            yield [(epoch, int(row)) for row in rows]


# ------------------------------------------------------------------------------------------------------------ encoding


@torch.no_grad()
def encode(encoder: nn.Module, images: Tensor, device: torch.device | str = "cpu", precision: str = "fp32") -> Tensor:
    """images (..., 3, S, S) -> features (..., D) fp32 on the device; the encoder in eval mode, without gradients."""
    device = torch.device(device)
    flat = images.flatten(0, -4).to(device, non_blocking=True, memory_format=torch.channels_last)
    with run.autocast(precision, device):
        return encoder(flat).float().unflatten(0, images.shape[:-3])


def encode_set(
    encoder: nn.Module,
    images: LabelledImages,
    transform: Callable,
    process: run.Process,
    *,
    views: int = 1,
    seed: int = 0,
    precision: str = "fp32",
    workers: int = 0,
    batch_size: int = 256,
    label: str = "features",
) -> tuple[Tensor, Tensor]:
    """Features (V, N, D) of V views of every image, and labels (N,); images are split over ranks. Reports broken
    images; `label` names the set in progress and reports."""
    pixels, normalise = data.split_normalisation(transform)
    many = pixels if views == 1 else lambda image: tuple(pixels(image) for _ in range(views))
    rows = np.array_split(np.arange(len(images)), process.world_size)[process.rank].tolist()
    step = max(1, batch_size // views)
    order = [[(0, row) for row in rows[i : i + step]] for i in range(0, len(rows), step)]
    loader = load(Views(images, many, seed), order, workers, process)
    features, labels, broken = [], [], []
    for batch, batch_labels, skipped in run.progress(loader, len(order), label, step * views, process):
        batch = normalise(batch.to(process.device, non_blocking=True))
        features.append(encode(encoder, batch, process.device, precision).cpu())
        labels.append(batch_labels)
        broken += skipped
    data.report_broken(broken, process, label)
    features = run.gather_lists(features, process)
    return torch.cat(features, dim=1), torch.cat(run.gather_lists(labels, process))


# ------------------------------------------------------------------------------------------------- batches of features


class Bank(NamedTuple):
    """Features of V views of N images, (V, N, D), and labels (N,): the training set of a frozen encoder."""

    features: Tensor
    labels: Tensor

    def batch(self, rows: Tensor, generator: torch.Generator, two: bool = True) -> tuple[Tensor, Tensor]:
        """Rows [view w; view s] (2B, D) and labels (2B,), two different views of each image.

        With a bank of one view, or `two=False`: one view (B, D) and (B,). A single row is repeated, since BatchNorm
        needs two.
        """
        count = len(self.features)
        if not two or count == 1:
            rows = rows.repeat(2) if len(rows) == 1 else rows
            return self.features[0, rows], self.labels[rows]
        w = torch.randint(count, rows.shape, generator=generator)
        s = (w + torch.randint(1, count, rows.shape, generator=generator)) % count
        return self.features[torch.cat([w, s]), rows.repeat(2)], self.labels[rows].repeat(2)


def bank_batches(
    bank: Bank, batch_size: int, seed: int, epoch: int, start: int = 0, two: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """A shuffled pass over a bank from batch `start` on, with the short last batch; depends only on (seed, epoch)."""
    for i, rows in enumerate(data.batches(len(bank.labels), batch_size, (seed, epoch), start=start), start):
        generator = torch.Generator().manual_seed(run.stable_hash(seed, epoch, i))
        yield bank.batch(torch.from_numpy(rows), generator, two)


class BankLoader:
    """A loader for `tune`: each pass over it is the next epoch's `bank_batches`."""

    def __init__(self, bank: Bank, batch_size: int, seed: int, two: bool = True):
        self.bank, self.batch_size, self.seed, self.two, self.epoch = bank, batch_size, seed, two, 0

    def __len__(self) -> int:
        return -(-len(self.bank.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        return bank_batches(self.bank, self.batch_size, self.seed, self.epoch - 1, two=self.two)


def shares(n: int, batch_size: int, epochs: range, start: int, world_size: int) -> Iterator[list[int]]:
    """Number of samples per rank in each global batch of `training_order`."""
    size = batch_size // world_size
    for epoch in epochs:
        first = start if epoch == epochs[0] else 0
        for begin in range(first * size * world_size, n, size * world_size):
            yield [min(max(n - begin - rank * size, 0), size) for rank in range(world_size)]


def gather_views(views: Tensor, labels: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Features (V, B, D) and labels (B,) of all ranks, in rank order; the encoder is frozen, so no gradient is needed.

    `counts`: images of each rank, unequal in a short last batch; passed in to avoid a GPU synchronisation.
    """
    if len(counts) == 1:
        return views, labels
    most = max(counts)
    padded = views.new_zeros(views.shape[0], most, views.shape[2])
    padded[:, : len(labels)] = views
    padded_labels = labels.new_zeros(most)
    padded_labels[: len(labels)] = labels
    all_views = [torch.empty_like(padded) for _ in counts]
    all_labels = [torch.empty_like(padded_labels) for _ in counts]
    dist.all_gather(all_views, padded)
    dist.all_gather(all_labels, padded_labels)
    kept = [(v[:, :n], y[:n]) for v, y, n in zip(all_views, all_labels, counts, strict=True)]
    return torch.cat([v for v, _ in kept], dim=1), torch.cat([y for _, y in kept])


# --------------------------------------------------------------------------------------------------- features files


class FeatureSets(NamedTuple):
    """A training bank, test sets {name: (features (M, D), labels (M,))}, and names of the classes."""

    train: Bank
    tests: dict[str, tuple[Tensor, Tensor]]
    classnames: list[str]


def read_features(path: str | Path, seed: int = 0) -> FeatureSets:
    """Read a features file: `features` (N, D) or (V, N, D), `labels` (N,) integers or names, and test sets
    `NAME_features`, `NAME_labels`. Classes are the sorted values of `labels`; test sets have no others. Without a test
    set, `hold_out` makes the test set `test`. UserError on an unusable file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"features file {path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is no .npz file of plain arrays: write it by np.savez, names as np.array(names, dtype=str)"
        ) from error
    if "features" not in arrays or "labels" not in arrays:
        found = ", ".join(arrays) or "nothing"
        raise UserError(f"{path} needs the arrays `features` (N, D) and `labels` (N,); it holds {found}")
    names = {key.removesuffix("_features").removesuffix("_labels") for key in arrays} - {"features", "labels"}
    tests = sorted(name for name in names if f"{name}_features" in arrays or f"{name}_labels" in arrays)
    for name in tests:
        for have, lack in (("features", "labels"), ("labels", "features")):
            if f"{name}_{lack}" not in arrays:
                raise UserError(f"{path} has {name}_{have} without {name}_{lack}")
    classnames, labels = np.unique(checked_labels(path, "labels", arrays["labels"]), return_inverse=True)
    if len(classnames) < 2:
        raise UserError(f"`labels` of {path} has {len(classnames)} class: at least 2 are needed")
    known = {name: i for i, name in enumerate(classnames.tolist())}
    features = arrays["features"]
    features = checked_features(path, "features", features[None] if features.ndim == 2 else features, labels)
    train, sets = Bank(features, torch.from_numpy(labels.astype(np.int64))), {}
    for name in tests:
        given = checked_labels(path, f"{name}_labels", arrays[f"{name}_labels"]).tolist()
        unknown = [label for label in given if label not in known]
        if unknown:
            raise UserError(f"{name}_labels of {path} has the label {unknown[0]!r}, which is not in `labels`")
        rows = checked_features(path, f"{name}_features", arrays[f"{name}_features"][None], given)[0]
        if rows.shape[1] != features.shape[2]:
            raise UserError(
                f"{name}_features of {path} has {rows.shape[1]} columns, `features` has {features.shape[2]}"
            )
        sets[name] = rows, torch.tensor([known[label] for label in given])
    if not sets:
        kept, rest = hold_out(labels, seed)
        if not len(kept):
            raise UserError(f"{path} has too few rows to hold some out for testing; add test_features and test_labels")
        sets["test"] = train.features[0, rest], train.labels[rest]
        run.say(f"{path} has no test set: {len(rest):,} of {len(labels):,} rows, 20% of each class, are held out")
        train = Bank(train.features[:, kept], train.labels[kept])
    return FeatureSets(train, sets, [str(name) for name in classnames])


def checked_labels(path: Path, name: str, labels: np.ndarray) -> np.ndarray:
    """Check labels (N,): names or integers; whole floats become integers."""
    if labels.ndim != 1 or not len(labels):
        raise UserError(f"`{name}` of {path} has the shape {labels.shape}: it must have one label per row, (rows,)")
    if labels.dtype.kind == "f" and np.isfinite(labels).all() and (labels == np.round(labels)).all():
        return labels.astype(np.int64)
    if labels.dtype.kind not in "iubUS":
        raise UserError(f"`{name}` of {path} must hold whole numbers or names, not {labels.dtype} like {labels[0]}")
    return labels


def checked_features(path: Path, name: str, features: np.ndarray, labels: Sequence) -> Tensor:
    """Check shape and values of features and return them as (V, N, D) fp32."""
    if features.ndim != 3 or features.shape[1] != len(labels) or not features.size:
        raise UserError(
            f"`{name}` of {path} has the shape {features.shape[1:] if len(features) == 1 else features.shape}, not "
            f"one that fits {len(labels)} labels: (rows, dimensions), or of several views (views, rows, dimensions)"
        )
    if features.dtype.kind not in "fiu":
        raise UserError(f"`{name}` of {path} must hold real numbers, not {features.dtype}")
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(features, dtype=np.float32)
    if not np.isfinite(features).all():
        row = np.argwhere(~np.isfinite(features))[0][1]
        raise UserError(f"`{name}` of {path} has values that are not finite in 32 bits, first in row {row}")
    return torch.from_numpy(features)


# ----------------------------------------------------------------------------------------------------- data of a run


def split_encoder(name: str, checkpoint: str | None) -> tuple[str, str, str | None]:
    """`timm:NAME`, `open_clip:NAME`, `lite0:SIDE` or a run folder of pretrain -> (source, name, checkpoint)."""
    if (Path(name) / "checkpoint.pt").is_file():
        pretrained = checkpoints.config_in(
            checkpoints.load_checkpoint(Path(name) / "checkpoint.pt"), PretrainConfig, name
        )
        return "open_clip" if pretrained.kind == "clip" else "timm", pretrained.model, name
    source, _, model = name.partition(":")
    if source not in ("timm", "open_clip", "lite0") or not model:
        raise UserError(
            f"encoder {name!r} is neither timm:NAME, open_clip:NAME, lite0:SIDE nor a run folder with a checkpoint.pt"
        )
    return source, model, checkpoint or None


def data_sets(cfg: TuningConfig) -> tuple[str, dict[str, str]]:
    """Paths (training set, {name: test set}) of a configuration."""
    tests = named_tests(cfg.tests)
    if cfg.benchmark:
        training, own = benchmark(cfg.benchmark, cfg.root)
        return training, own | tests
    return cfg.data, tests


def reduced(labels: np.ndarray, cfg: Config) -> np.ndarray:
    """Positions of the samples that `train_fraction` keeps."""
    if cfg.train_fraction == 1:
        return np.arange(len(labels))
    rows = subset_per_class(labels, cfg.train_fraction, np.random.RandomState(cfg.seed))
    if not len(rows):
        raise UserError(f"--train-fraction {cfg.train_fraction} keeps no image: every class has too few for it")
    return rows


def noisy(labels: np.ndarray, num_classes: int, cfg: Config) -> np.ndarray:
    """Labels after `label_noise`; prints the measured share of wrong labels."""
    if not cfg.label_noise:
        return labels
    flipped = flip_labels(labels, num_classes, cfg.label_noise, np.random.RandomState(cfg.seed), exclude_true=False)
    print(f"label noise {cfg.label_noise:g}: {100 * (flipped != labels).mean():.2f} % of {len(labels):,} labels wrong")
    return flipped


class RunFeatures:
    """A run's training features, batch by batch, and its test sets, from a features file or a frozen encoder.

    batch_size: images per forward pass for features that are encoded once.
    """

    def __init__(self, cfg: Config, process: run.Process, batch_size: int = 256):
        self.cfg, self.process, self.batch_size = cfg, process, batch_size
        self.broken: list[data.Broken] = []
        self.encoder, self.images, self.bank = None, None, None
        if cfg.features:
            self._from_file()
        else:
            self._from_images()

    @property
    def views(self) -> int:
        """Views of an image in a batch: one if the bank has only one or the settings use one, else two."""
        several = self.bank is None or len(self.bank.features) > 1
        return 2 if several and self.cfg.views != "eval" else 1

    def _from_file(self) -> None:
        if self.cfg.tests:
            raise UserError(f"--tests cannot be added to --features: {self.cfg.features} has its own test sets")
        sets = read_features(self.cfg.features, seed=self.cfg.seed)
        rows = reduced(sets.train.labels.numpy(), self.cfg)
        labels = noisy(sets.train.labels.numpy()[rows], len(sets.classnames), self.cfg)
        self.bank = Bank(sets.train.features[:, rows], torch.from_numpy(np.asarray(labels, dtype=np.int64)))
        self.tests, self.classnames = sets.tests, sets.classnames
        self.dim, self.size = self.bank.features.shape[2], len(rows)
        self.fingerprint = data.fingerprint(self.bank.features.numpy().tobytes(), self.bank.labels.numpy().tobytes())

    def _from_images(self) -> None:
        cfg = self.cfg
        self.model = source, name, checkpoint = split_encoder(cfg.encoder, cfg.checkpoint)
        if cfg.zero_shot and source != "open_clip":
            raise UserError(f"--zero-shot needs an encoder with a text tower, but {cfg.encoder} has none")
        training, self.tests = data_sets(cfg)
        images = open_labelled(training)
        images = images.subset(reduced(images.labels, cfg))
        images = images.relabelled(noisy(images.labels, images.num_classes, cfg))
        images.strict = cfg.strict
        self.images, self.classnames, self.size = images, images.classnames, len(images)
        for test in self.tests.values():  # errors in test sets are reported before training
            open_test(test, self.classnames)
        self.encoder, self.dim, self.train_view, self.eval_view = load_encoder(source, name, checkpoint)
        weights = (value.detach().numpy().tobytes() for value in self.encoder.state_dict().values())
        self.fingerprint = data.fingerprint(images.fingerprint.encode(), *weights)
        self.encoder.to(self.process.device, memory_format=torch.channels_last)

    def encode_training_set(self) -> None:
        """Encode the evaluation view or the bank of training views, if the settings use one and it is not encoded
        yet."""
        if self.bank is not None or (self.cfg.views != "eval" and not self.cfg.bank):
            return
        one = self.cfg.views == "eval"
        transform, views = (self.eval_view, 1) if one else (self.train_view, self.cfg.bank)
        if self.cfg.views == "train+rand":
            raise UserError("--views train+rand draws new views in every step: leave --bank 0")
        self.bank = Bank(*self.encoded(self.images, transform, views, "training set"))

    def encoded(self, images: LabelledImages, transform: Callable, views: int, label: str) -> tuple[Tensor, Tensor]:
        """`encode_set` with the run's settings; with `zero_shot`, features have length 1."""
        features, labels = encode_set(
            self.encoder, images, transform, self.process, views=views, seed=self.cfg.seed, label=label,
            precision=self.cfg.precision, workers=self.cfg.workers, batch_size=self.batch_size,
        )  # fmt: skip
        return (F.normalize(features, dim=-1) if self.cfg.zero_shot else features), labels

    def batches(self, epochs: range, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Global batches of features (n, D), labels (n,) on the device, from batch `start` of the first epoch on."""
        cfg, process = self.cfg, self.process
        if self.bank is not None:
            for epoch in epochs:
                first = start if epoch == epochs[0] else 0
                for chosen in bank_batches(self.bank, cfg.batch_size, cfg.seed, epoch, first, self.views == 2):
                    yield tuple(run.pinned(x, process.device).to(process.device, non_blocking=True) for x in chosen)
            return
        strong = with_rand_augment(self.train_view) if cfg.views == "train+rand" else self.train_view
        (pixels_w, normalise), (pixels_s, _) = map(data.split_normalisation, (self.train_view, strong))
        views = Views(self.images, TwoViews(pixels_w, pixels_s), cfg.seed)
        loader = load(views, training_order(self.size, cfg, process, epochs, start), cfg.workers, process)
        sizes = shares(self.size, cfg.batch_size, epochs, start, process.world_size)
        for counts, (images, labels, skipped) in zip(sizes, loader, strict=True):
            self.broken += skipped
            feats = torch.zeros(2, 0, self.dim, device=process.device)
            if len(labels):
                images = normalise(images.to(process.device, non_blocking=True))
                feats = encode(self.encoder, images, process.device, cfg.precision)
                feats = F.normalize(feats, dim=-1) if cfg.zero_shot else feats
            feats, labels = gather_views(feats, labels.to(process.device, non_blocking=True), counts)
            yield feats.flatten(0, 1), labels.repeat(2)

    def test_set(self, name: str) -> tuple[Tensor, Tensor, list[list[int]] | None]:
        """(features (M, D), labels (M,), groups of trained classes or None) of one test set."""
        if self.images is None:
            return *self.tests[name], None
        images, groups = open_test(self.tests[name], self.classnames)
        features, labels = self.encoded(images, self.eval_view, 1, name)
        return features[0], labels, groups
