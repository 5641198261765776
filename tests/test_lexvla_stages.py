"""What lexvla.backbone, .scenes and .text write, later scripts read: a finished one is as asked for, or is refused.

Kill and resume, broken samples, folders and images that are not what they should be.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, finished, held, kill_when, same
from tiny import add_sample, language_model, small_corpus

from lexvla import backbone, scenes, text
from lexvla import eval as evaluation
from shared import checkpoints, data

SCRIPT, SECONDS = "lexvla.backbone", 120
PRELOAD = ["lexvla.train", "timm"]
FLAGS = "--image-size 16 --epochs 3 --batch-size 32 --device cpu --precision fp32".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    if not (ROOT / "data/emoji/train/00000.tar").is_file():
        pytest.fail("data/emoji is missing: `make data` makes it", pytrace=False)
    path = tmp_path_factory.mktemp("stages")
    small_corpus(path / "corpus")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def cfg(folder: Path) -> backbone.Config:
    """Of a backbone that is there, which nothing disturbed."""
    sizes = dict(image_size=16, epochs=3, batch_size=32, device="cpu", precision="fp32")
    cfg = backbone.Config(str(folder / "corpus"), out=str(folder / "backbone.pt"), **sizes)
    backbone.main(cfg)
    return cfg


# ------------------------------------------------------------------------------------------------------------ backbone


def test_a_finished_backbone_is_what_is_asked_for_or_refused(cfg: backbone.Config, folder: Path, capsys):
    before = Path(cfg.out).read_bytes()
    backbone.main(cfg)
    backbone.main(dataclasses.replace(cfg, workers=2, device="auto", dataset_size=160))  # the same weights
    assert capsys.readouterr().out.count("is there already") == 2
    with pytest.raises(ValueError, match=r"made with other settings: lr \(was 0.001, now 0.1\), seed \(was 0, now 1\)"):
        backbone.main(dataclasses.replace(cfg, lr=0.1, seed=1))
    with pytest.raises(ValueError, match="was made from other data"):
        backbone.main(dataclasses.replace(cfg, dataset_size=150))
    assert Path(cfg.out).read_bytes() == before and not (folder / "backbone.work").exists()


def test_an_older_backbone_says_no_more_than_its_settings(cfg: backbone.Config, tmp_path: Path, capsys):
    state = checkpoints.load_checkpoint(cfg.out)
    state.pop("data")
    older = dataclasses.replace(cfg, out=str(tmp_path / "older.pt"))
    checkpoints.save_checkpoint(Path(older.out), state)
    backbone.main(older)
    assert "is there already" in capsys.readouterr().out
    for change in ({"data": "elsewhere"}, {"dataset_size": 150}, {"epochs": 4}):
        with pytest.raises(ValueError, match=f"other settings: {next(iter(change))} "):
            backbone.main(dataclasses.replace(older, **change))
    checkpoints.save_checkpoint(Path(older.out), {"step": 1})
    with pytest.raises(ValueError, match="is no file of this script"):
        backbone.main(older)


def test_a_killed_backbone_goes_on(cfg: backbone.Config, folder: Path, start, cli):
    out = folder / "killed.pt"
    command, checkpoint = ["--data", cfg.data, "--out", out, *FLAGS], folder / "killed.work/checkpoint.pt"
    kill_when(start(*command), checkpoint.exists)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"another configuration: seed \(was 0, now 1\)"):
        backbone.main(dataclasses.replace(cfg, out=str(out), seed=1))
    with held(folder / "killed.work"), pytest.raises(ValueError, match="belongs to a run that is still going"):
        backbone.main(dataclasses.replace(cfg, out=str(out)))
    assert "going on after epoch" in finished(cli(*command)).out
    assert same(checkpoints.load_checkpoint(out)["weights"], checkpoints.load_checkpoint(cfg.out)["weights"])
    assert not (folder / "killed.work").exists()


def test_broken_drawings_are_reported(cfg: backbone.Config, tmp_path: Path, capsys):
    small_corpus(tmp_path / "corpus", 80, 1)
    add_sample(tmp_path / "corpus/00000.tar", "broken", b"no image", b"caption")
    bad = dataclasses.replace(cfg, data=str(tmp_path / "corpus"), out=str(tmp_path / "b.pt"), epochs=1, batch_size=1)
    backbone.main(bad)
    assert "backbone epoch 1: 1 broken samples, replaced by their neighbours: 1 unreadable" in capsys.readouterr().out


def test_a_backbone_that_diverges_is_not_written(cfg: backbone.Config, tmp_path: Path):
    with pytest.raises(ValueError, match="the loss is nan at step"):
        backbone.main(dataclasses.replace(cfg, out=str(tmp_path / "nan.pt"), temperature=float("nan")))
    assert not (tmp_path / "nan.pt").exists() and not (tmp_path / "nan.work/checkpoint.pt").exists()


# -------------------------------------------------------------------------------------------------------------- scenes


def test_finished_scenes_are_what_is_asked_for_or_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    out, corpus = folder / "scenes", ROOT / "data/emoji"
    (folder / "scenes.tmp/images").mkdir(parents=True)
    (folder / "scenes.tmp/images/00009.png").write_text("of a run that was killed")
    scenes.main(out, corpus, 3)
    assert sorted(path.name for path in (out / "images").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    scenes.main(out, corpus, 3)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings: scenes \(was 3, now 4\)"):
        scenes.main(out, corpus, 4)
    monkeypatch.setattr(scenes.emoji, "SEED", 1)
    with pytest.raises(ValueError, match=r"other settings: seed \(was 0, now 1\)"):
        scenes.main(out, corpus, 3)
    (out / "scenes.json").unlink()  # an older folder, which has so many
    scenes.main(out, corpus, 3)
    with pytest.raises(ValueError, match=r"scenes \(was 3, now 4\)"):
        scenes.main(out, corpus, 4)


@pytest.mark.parametrize("part", ["images", "masks"])
def test_scenes_of_others_are_read_with_care(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "images/0.png")
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "masks/0.png")
    ((pixels, mask, ignore),) = evaluation.labelled_images(str(tmp_path), 8, "x.pt")
    assert pixels.shape == (1, 3, 8, 8) and torch.equal(mask[0], torch.eye(8).long()) and ignore == 255
    bad = tmp_path / part / "0.png"
    Image.new("L", (8, 8)).save(bad, "EPS")
    with pytest.raises(ValueError, match=f"{part}/0.png"):
        list(evaluation.labelled_images(str(tmp_path), 8, "x.pt"))
    Image.new("L", (8, 8)).save(bad, "PNG")
    monkeypatch.setattr(data, "MAX_PIXELS", 63)
    with pytest.raises(ValueError, match="/0.png.* 63 "):
        list(evaluation.labelled_images(str(tmp_path), 8, "x.pt"))


# ---------------------------------------------------------------------------------------------------------------- text


def test_finished_states_are_what_is_asked_for_or_refused(folder: Path, capsys):
    lm = language_model(folder / "lm", folder / "corpus")
    kept = text.Config(str(lm), str(folder / "corpus/00000.tar"), (), str(folder / "states.pt"), device="cpu")
    text.main(kept)
    text.main(kept)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was made with max_length 128, this run has 64"):
        text.main(dataclasses.replace(kept, max_length=64))
    with pytest.raises(ValueError, match="was made with precision 'auto', not 'fp32'"):
        text.main(dataclasses.replace(kept, precision="fp32"))
    with pytest.raises(ValueError, match=r"lacks \d+ captions of --data and --sets, such as .+ made from other data"):
        text.main(dataclasses.replace(kept, data=str(folder / "corpus")))
