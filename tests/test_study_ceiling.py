"""The ceiling of a table of arms: an image tower trained on labels learns them."""

import io
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from shared.tars import write_split
from studies.harness.ceiling import open_clip_tower, trained_on_labels


def picture(rng: np.random.Generator, label: int) -> bytes:
    """Noise with a darker upper or lower half."""
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
    tower, recipe = partial(open_clip_tower, "ResNet-emoji"), {"epochs": 6, "batch_size": 16, "lr": 1e-3}
    found = trained_on_labels(tower, [folder], ("top1", "probe"), **recipe)
    assert found["halves/top1"] == found["halves/probe"] > 90

    # The labels of training pairs are the classes that their captions name
    pairs = [{"jpg": picture(rng, i % 2), "txt": ("above", "below")[i % 2]} for i in range(64)]
    write_split(tmp_path / "pairs", pairs)
    assert (
        trained_on_labels(tower, [folder], shards=str(tmp_path / "pairs"), **recipe | {"epochs": 20})["halves/top1"]
        > 90
    )
