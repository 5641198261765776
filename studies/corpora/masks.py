"""Writes sets of images with a class for each pixel, as PatchDis reads them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shared.errors import UserError
from shared.layout import png


def write_masks(folder: Path, classes: Sequence[str], samples: Iterable[tuple[str, bytes, np.ndarray]]) -> int:
    """Writes `classnames.txt`, `images/KEY.png` or `.jpg` and `masks/KEY.png`; returns the number of images.

    A sample is (name of its image file, the image's bytes, class of each pixel (H, W), -1 for none). UserError if two
    images have the same KEY.
    """
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    image_of: dict[str, str] = {}
    for name, image, labels in samples:
        mask = Path(name).with_suffix(".png").name
        if mask in image_of:
            raise UserError(f"the images {image_of[mask]} and {name} would share the mask {mask}: rename one of them")
        image_of[mask] = name
        (folder / "images" / name).write_bytes(image)
        (folder / "masks" / mask).write_bytes(mask_png(labels, len(classes)))
    return len(image_of)


def mask_png(labels: np.ndarray, classes: int) -> bytes:
    """PNG of labels (H, W): uint8 if the number of classes fits, else uint16; -1 becomes the dtype's largest value."""
    kind = np.uint8 if classes <= 255 else np.uint16
    return png(np.where(labels < 0, np.iinfo(kind).max, labels).astype(kind))
