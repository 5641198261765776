"""The ceiling of a table of arms: an image tower trained on labels learns them."""

import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared import layout
from shared.tars import write_split
from studies.harness.ceiling import STATISTICS, Tower, open_clip_tower, random_boxes, trained_on_labels, views


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
    tower, recipe = partial(open_clip_tower, "ConvNet-emoji"), {"epochs": 6, "batch_size": 16, "lr": 1e-3}
    found = trained_on_labels(tower, [folder], ("top1", "probe"), **recipe)
    assert found["halves/top1"] == found["halves/probe"] > 90

    # The labels of training pairs are the classes that their captions name
    pairs = [{"jpg": picture(rng, i % 2), "txt": ("above", "below")[i % 2]} for i in range(64)]
    write_split(tmp_path / "pairs", pairs)
    assert (
        trained_on_labels(tower, [folder], shards=str(tmp_path / "pairs"), **recipe | {"epochs": 20})["halves/top1"]
        > 90
    )


def test_views_are_boxes_of_the_image_with_clips_statistics():
    """The whole of a picture of 4 pixels a side, its lower right quarter, and a box that begins a side above it."""
    pixels = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    boxes = torch.tensor([[0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5], [0, -1, 1, 1]])
    whole, quarter, above = (views(pixels, box[None], side)[0] for box, side in zip(boxes, (4, 2, 4), strict=True))
    mean, std = (torch.tensor(each)[:, None, None] for each in STATISTICS)
    normalised = (pixels[0] / 255 - mean) / std
    torch.testing.assert_close(whole, normalised, atol=1e-5, rtol=0)
    torch.testing.assert_close(quarter, normalised[:, 2:, 2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(above, normalised[:, :1].expand(3, 4, 4), atol=1e-5, rtol=0)


def test_boxes_have_the_areas_and_shapes_asked_for():
    torch.manual_seed(0)
    left, top, width, height = random_boxes(20_000, (0.25, 0.81), (0.9, 1.1)).unbind(1)
    area, shape = width * height, width / height
    assert area.min() == pytest.approx(0.25, abs=1e-3) and area.max() == pytest.approx(0.81, abs=1e-3)
    assert area.mean() == pytest.approx(0.53, abs=0.01)  # uniform
    assert shape.min() == pytest.approx(0.9, abs=1e-3) and shape.log().mean() == pytest.approx(
        0.5 * np.log(0.99), abs=1e-2
    )
    assert left.min() >= 0 and (top + height).max() <= 1
    assert left.mean() == pytest.approx((1 - width.mean().item()) / 2, abs=0.01)
    beyond = random_boxes(1000, (1.44, 1.44), (1, 1))
    torch.testing.assert_close(beyond[:, 2:], torch.full((1000, 2), 1.2))
    assert -0.2 <= beyond[:, :2].min() < -0.19 and -0.01 < beyond[:, :2].max() <= 0


def test_top1_is_of_the_chosen_classes(tmp_path: Path):
    """Pictures of one colour, black to white: three of the four test pictures of the two chosen classes are right."""
    folder, grey = tmp_path / "greys", {"black": 0, "grey": 128, "white": 255}

    def sample(shown: str, label: str) -> dict:
        return {"png": layout.png(np.full((8, 8, 3), grey[shown], np.uint8)), "cls": str([*grey].index(label))}

    write_split(folder / "train", [sample(name, name) for name in grey] * 8)
    labelled = ["black white", "white white", "white white", "black black", "grey grey", "black grey"]
    write_split(folder / "test", [sample(*each.split()) for each in labelled])
    layout.write_classes(folder, [*grey], ["{c}"])

    def tower() -> Tower:
        return Tower(torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten()), 3, 4)

    found = trained_on_labels(tower, [folder], epochs=40, batch_size=16, lr=0.1, classes=["white", "black"])
    assert found == {"greys/top1": 75.0}
