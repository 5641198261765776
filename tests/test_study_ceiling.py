"""The ceiling of a table of arms: an image tower trained on labels learns them."""

import io
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shared import layout
from shared.tars import write_split
from studies.harness.ceiling import STATISTICS, Tower, open_clip_tower, trained_on_labels, view_of, whole


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


def test_views_have_clips_statistics():
    """The whole picture; a crop of all of its area is the whole picture, too, and small views of white are white."""
    pixels = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    mean, std = (torch.tensor(each)[:, None, None] for each in STATISTICS)
    normalised = (pixels / 255 - mean) / std
    torch.testing.assert_close(whole(pixels, 4), normalised, atol=1e-5, rtol=0)
    torch.manual_seed(0)
    crop, small = view_of(4, (1.0, 1.0)), view_of(4, None)
    assert any(torch.allclose(crop(pixels), normalised, atol=1e-5) for _ in range(20))  # of some other aspect ratios
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    torch.testing.assert_close(small(white), ((1 - mean) / std).expand(1, 3, 4, 4), atol=1e-5, rtol=0)
    assert not torch.allclose(small(pixels), small(pixels))


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
