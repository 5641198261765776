"""Episodes: drawn samples, captions and views, compared with the numbers of the authors' code."""

import csv
import dataclasses
import random
from pathlib import Path

import numpy as np
import open_clip
import PIL
import pytest
import torch
import torchvision
from PIL import Image
from test_protoclip_model import tiny_model
from test_windows import forks, shards  # noqa: F401

from protoclip import config, train
from protoclip.episodes import EpisodeDataset, ascii_caption, image_transform, sample_episode
from shared import data, memory, run


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
    dataset = EpisodeDataset(pairs, np.array(case["index_mapping"]), lambda image: image.getpixel((0, 0)), tokenizer)
    assert len(dataset) == case["length"]
    for i, row in enumerate(case["index_mapping"]):
        index, colour, tokens, broken = dataset[i]
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


@pytest.mark.golden("protoclip", "image_transforms")
def test_image_transforms(case):
    size = case["image_size"]
    numbers = sorted(key.removesuffix("/rgb") for key in case if key.endswith("/rgb"))
    same_libraries = torchvision.__version__.startswith("0.28.") and PIL.__version__.startswith("13.")
    for image in numbers:
        pil = Image.fromarray(case[f"{image}/rgb"].numpy().astype(np.uint8))
        case.close(f"{image}/eval", image_transform(size, train=False)(pil), atol=1e-6)
        for view, light in (("train_default", False), ("train_light", True)):
            torch.manual_seed(case[f"{image}/torch_seed"])
            random.seed(case[f"{image}/torch_seed"])
            out = image_transform(size, train=True, light=light)(pil)
            if same_libraries:
                case.close(f"{image}/{view}", out)
            else:  # random views are the same only with the same libraries
                assert out.shape == case[f"{image}/{view}"].shape
                assert out.abs().max() < 3


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_both_passes_and_start_while_no_shard_is_fetched(
    shards: Path, forks: list[int], tmp_path: Path, workers: int
):
    sizes = {"episodes": 4, "episode_shards": 2, "episode_size": 14, "batch_size": 4, "dataset_size": None}
    losses = {"w_external": 0.0, "infonce_warmup": 1, "keep_in_memory": False, "distinct_captions": False}
    urls = "::".join(f"pipe:cat {shards}/{i}.tar" for i in range(8))
    cfg = dataclasses.replace(config.PRESETS["emoji"][1], data=urls, cache=str(tmp_path), workers=workers, **sizes)
    cfg, process = dataclasses.replace(cfg, **losses), run.Process(0, 1, torch.device("cpu"))
    model = tiny_model()
    model.visual.image_mean, model.visual.image_std = memory.CLIP_STATISTICS
    episodes = train.EpisodicData(cfg, process, model, lambda text: torch.tensor([[len(text)]]))
    for episode in range(4):
        episodes.draw(episode, start=1 if episode == 3 else 0, known=episode == 2)
        passes = {what: list(episodes.loader(what)) for what in episodes.count}
        assert list(passes) == (["train"] if episode in (0, 2) else ["extract", "train"])  # warm-up; a resumed run
        assert len(passes["train"]) == (3 if episode == 3 else 4)  # and a short one
        for what, batches in passes.items():
            seen = torch.cat([index for index, *_ in batches]).tolist()
            assert len(set(seen)) == len(seen) == (10 if episode == 3 and what == "train" else 14)
            assert all(images.dtype == torch.float32 and images.shape[1:] == (3, 16, 16) for _, images, *_ in batches)
    assert len(forks) == 4 * workers and not any(forks)
