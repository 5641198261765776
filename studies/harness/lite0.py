"""Features of EfficientNet-Lite0, a locked tower of studies and a floor, computed once and stored by a hash."""

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from shared import data, run
from shared.checkpoints import replaced
from shared.pretrained import efficientnet_lite0, fold_batch_norms

CACHED = 200_000  # most features in a file of cached features, 1 GB


@torch.no_grad()
def lite0_features(
    images: Tensor | Iterable[Tensor],
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
) -> Tensor:
    """Images (N, 3, H, W), or batches of images -> pooled features (N, 1280), float32, on the CPU.

    Images are uint8 pixels, or normalised floats. The network runs on `batch_size` images at a time: 32 images of 128
    pixels fit in a CPU's cache; a GPU is faster with more.
    """
    device = torch.device(device)
    model = fold_batch_norms(efficientnet_lite0()).to(device, memory_format=torch.channels_last)
    features = [torch.empty(0, 1280)]
    with run.autocast(run.resolve_precision(precision, device), device):
        for batch in [images] if isinstance(images, Tensor) else images:
            for part in batch.split(batch_size):
                part = part.to(device, memory_format=torch.channels_last)
                if part.dtype == torch.uint8:
                    part = part.float().sub_(127).div_(128)
                features.append(model(part).float().cpu())
    return torch.cat(features)


def known_features(store: Path) -> dict[bytes, np.ndarray]:
    """{hash: feature (D,)} of a file of features; empty if it is missing or cannot be read."""
    try:
        with np.load(store, allow_pickle=False) as file:
            return dict(zip((row.tobytes() for row in file["digests"]), file["features"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def keep_features(store: Path, new: dict[bytes, np.ndarray]) -> None:
    """Add features to a file of features, unless more than CACHED would be in it. The file is replaced as a whole.

    Runs that write at the same time take turns, by a lock file beside it.
    """
    if not new:
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(store.with_suffix(".lock")):
        known = known_features(store) | new  # read again: another run may have written since
        if len(known) <= CACHED:
            keys = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, 16)
            with replaced(store) as file:
                np.savez(file, digests=keys, features=np.stack(list(known.values())))


def in_order(digests: Sequence[bytes], known: dict[bytes, np.ndarray]) -> Tensor:
    """Features (N, D) for N hashes, in their order; (0, 1280) for none."""
    return torch.from_numpy(np.stack([known[digest] for digest in digests])) if digests else torch.empty(0, 1280)


def cached_lite0_features(batches: Iterable[Tensor], cache: str | Path = "data/cache") -> Tensor:
    """`lite0_features` of batches (B, 3, H, W) of uint8 pixels on the CPU, stored in `cache` by a hash of the pixels.

    Each distinct image is computed once.
    """
    precision = run.resolve_precision("auto", torch.device("cpu"))
    store, order, fresh = Path(cache) / f"lite0-features-{precision}.npz", [], []
    known = known_features(store)
    seen = set(known)

    def unseen() -> Iterator[Tensor]:
        for batch in batches:
            digests = [data.file_hash(image.numpy().tobytes()) for image in batch]
            rows = [row for row, digest in enumerate(digests) if not (digest in seen or seen.add(digest))]
            order.extend(digests)
            fresh.extend(digests[row] for row in rows)
            if rows:
                yield batch[rows]

    new = dict(zip(fresh, lite0_features(unseen(), precision=precision).numpy(), strict=True))
    keep_features(store, new)
    return in_order(order, known | new)
