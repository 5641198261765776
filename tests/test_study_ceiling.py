"""The ceiling of a table of arms: an image tower that is trained on labels learns them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from shared.study.ceiling import trained_on_labels
from shared.tars import write_split


def picture(rng: np.random.Generator, label: int) -> bytes:
    """Noise, darker in its upper or its lower half."""
    pixels = rng.integers(100, 256, (40, 40, 3), dtype=np.uint8)
    pixels[:20] //= 1 if label else 3
    pixels[20:] //= 3 if label else 1
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_a_tower_learns_the_labels_of_its_set(tmp_path: Path):
    rng, folder = np.random.default_rng(0), tmp_path / "halves"
    for split, count in (("train", 64), ("test", 20)):
        write_split(folder / split, [{"png": picture(rng, i % 2), "cls": str(i % 2)} for i in range(count)])
    (folder / "classnames.txt").write_text("above\nbelow\n")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    found = trained_on_labels("ResNet-emoji", [folder], ("top1", "probe"), epochs=6, batch_size=16, lr=1e-3)
    assert found["halves/top1"] == found["halves/probe"] > 90
