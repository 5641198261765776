"""Episodes: drawn samples, captions and views, compared with the numbers of the authors' code."""

import csv
import random
from types import SimpleNamespace

import numpy as np
import open_clip
import PIL
import pytest
import torch
import torchvision
from PIL import Image

from protoclip.config import Config
from protoclip.train import sample_episode
from protoclip.views import ascii_caption, training_view, whole_image
from shared import clip, data
from shared.corpus import Samples


@pytest.mark.golden("protoclip", "episode_sampling")
def test_episode_sampling(case):
    rng = np.random.RandomState(case["seed"])
    episodes = [sample_episode(case["dataset_size"], case["episode_size"], rng) for _ in case["index_mapping"]]
    case.close("index_mapping", np.stack(episodes))


@pytest.mark.golden("protoclip", "csv_dataset")
def test_csv_dataset(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("pairs.tsv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["title", "filepath"], delimiter="\t")
        table.writeheader()
        table.writerows(case["rows"])
    colours = {row["filepath"]: (number // 256, number % 256, 0) for number, row in enumerate(case["rows"])}
    for filepath, colour in colours.items():
        (tmp_path / filepath).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), colour).save(filepath, "png")

    pairs = data.open_pairs("pairs.tsv", case["dataset_size"])
    assert list(pairs.keys) == case["filepaths"]
    assert [ascii_caption(pairs.caption(row)) for row in range(len(pairs))] == case["captions"]
    tokenizer = open_clip.get_tokenizer("RN50")
    samples = Samples(pairs, lambda pair: tokenizer([ascii_caption(pair.caption)])[0])
    view, _ = samples.number(lambda image: image.getpixel((0, 0)))
    assert len(case["index_mapping"]) == case["length"]
    for i, row in enumerate(case["index_mapping"]):
        index, colour, tokens, broken = samples[view, (0,), i, row]
        assert (index, colour, broken) == (i, colours[case["filepaths"][row]], [])
        assert torch.equal(tokens, tokenizer(case["caption_of_episodic_index"][i])[0])


@pytest.mark.golden("protoclip", "tokenizer")
def test_tokenizer(case):
    expected, whole = case["tokens"], case["truncated"] == 0
    tokens = open_clip.get_tokenizer("RN50", context_length=expected.shape[1])(case.json)
    assert torch.equal(tokens[whole], expected[whole])
    assert torch.equal(tokens.argmax(1)[whole], case["pool_position"][whole])
    # Where a caption is cut, ours differs on purpose in one id: the last is the end token, where the text tower pools.
    assert torch.equal(tokens[~whole, :-1], expected[~whole, :-1])
    assert (tokens[~whole].argmax(1) == expected.shape[1] - 1).all()


def seeing(size: int) -> SimpleNamespace:
    """A model that sees images of `size` pixels with CLIP's statistics."""
    mean, std = clip.STATISTICS
    return SimpleNamespace(visual=SimpleNamespace(image_size=size, image_mean=mean, image_std=std))


@pytest.mark.golden("protoclip", "image_transforms")
def test_image_transforms(case):
    size = case["image_size"]
    numbers = sorted(key.removesuffix("/rgb") for key in case if key.endswith("/rgb"))
    same_libraries = torchvision.__version__.startswith("0.28.") and PIL.__version__.startswith("13.")
    for image in numbers:
        pil = Image.fromarray(case[f"{image}/rgb"].numpy().astype(np.uint8))
        case.close(f"{image}/eval", whole_image(seeing(size))(pil), atol=1e-6)
        for view, augmentation in (("train_default", "default"), ("train_light", "light")):
            torch.manual_seed(case[f"{image}/torch_seed"])
            random.seed(case[f"{image}/torch_seed"])
            out = training_view(Config(augmentation=augmentation), seeing(size))(pil)
            if same_libraries:
                case.close(f"{image}/{view}", out)
            else:  # random views are the same only with the same libraries
                assert out.shape == case[f"{image}/{view}"].shape
                assert out.abs().max() < 3
