"""Training of the small ViT: its pairs and loss; finished files of other settings are refused; kill and resume."""

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from scripts import SHARDS, finished, held, kill_when, same
from short_runs import add_sample, small_corpus

from lexvla import backbone, towers
from shared import checkpoints, data

SCRIPT, SECONDS = "lexvla.backbone", 120
FLAGS = "--image-size 16 --epochs 3 --batch-size 32 --device cpu --precision fp32".split()


@pytest.fixture(scope="module")
def folder(embedded_corpus: None, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("stages")
    small_corpus(path / "corpus")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def cfg(folder: Path) -> backbone.Config:
    """Configuration of a finished backbone, trained without interruption."""
    sizes = dict(image_size=16, epochs=3, batch_size=32, device="cpu", precision="fp32")
    cfg = backbone.Config(str(folder / "corpus"), out=str(folder / "backbone.pt"), **sizes)
    backbone.main(cfg)
    return cfg


def test_a_finished_backbone_of_other_settings_or_data_is_refused(cfg: backbone.Config, folder: Path, capsys):
    before = Path(cfg.out).read_bytes()
    backbone.main(cfg)
    backbone.main(dataclasses.replace(cfg, workers=2, device="auto", dataset_size=160))  # the same weights
    assert capsys.readouterr().out.count("is there already") == 2
    with pytest.raises(ValueError, match=r"made with other settings: lr \(was 0.001, now 0.1\), seed \(was 0, now 1\)"):
        backbone.main(dataclasses.replace(cfg, lr=0.1, seed=1))
    with pytest.raises(ValueError, match="was made from other data"):
        backbone.main(dataclasses.replace(cfg, dataset_size=150))
    assert Path(cfg.out).read_bytes() == before and not (folder / "backbone.work").exists()


def test_an_older_file_without_a_fingerprint_is_compared_by_its_settings(cfg: backbone.Config, tmp_path: Path, capsys):
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


def test_a_killed_backbone_resumes(cfg: backbone.Config, folder: Path, start, cli):
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
    assert "backbone epoch 1: 1 broken sample, left out or replaced: 1 unreadable" in capsys.readouterr().out


def test_a_backbone_that_diverges_is_not_written(cfg: backbone.Config, tmp_path: Path):
    with pytest.raises(ValueError, match="the loss is nan at step"):
        backbone.main(dataclasses.replace(cfg, out=str(tmp_path / "nan.pt"), lr=1e30))
    assert not (tmp_path / "nan.pt").exists() and not (tmp_path / "nan.work/checkpoint.pt").exists()


def test_drawings_are_grouped_by_emoji_and_attract_each_other(folder: Path):
    with tarfile.open(SHARDS / "00000.tar") as tar:
        names = {m.name: json.load(tar.extractfile(m))["hexcode"] for m in tar if m.name.endswith(".json")}
    pairs = data.open_pairs(f"{SHARDS}/00000.tar")
    rows = backbone.drawings(f"{SHARDS}/00000.tar", list(pairs.keys))
    assert sorted(row for of_one in rows for row in of_one) == list(range(len(pairs)))
    assert all(len({names[f"{pairs.keys[row]}.json"] for row in of_one}) == 1 for of_one in rows)
    assert len(rows) == len(set(names.values()))
    views = backbone.Views(pairs, [[0], [1, 2]], towers.train_transform("x.pt", 16, 0.5), 0)
    assert views[0][0].shape == (2, 3, 16, 16) and torch.equal(views[1][0], views[1][0])
    tokens = torch.randn(2, 8, 5, 64)
    equal = torch.stack([tokens[0], tokens[0]])
    assert backbone.drawing_loss(equal, 0.01) < 1e-3 < backbone.drawing_loss(tokens, 0.01)
    with pytest.raises(ValueError, match="must end in .pt"):
        backbone.main(backbone.Config(out="backbone"))
    with pytest.raises(ValueError, match="--image-size 20 cannot be cut into patches of 8 pixels"):
        backbone.main(backbone.Config(out=str(folder / "other.pt"), image_size=20))
    with pytest.raises(ValueError, match="--temperature must be at least 0, not nan"):
        backbone.main(backbone.Config(out=str(folder / "other.pt"), temperature=float("nan")))
    assert backbone.drawings(f"{SHARDS}/00000.tar", ["another", "one"]) == [[0], [1]]  # each its own positive
    keys = list(data.open_pairs(f"{SHARDS}/00000.tar").keys)
    groups = backbone.drawings(f"{SHARDS}/00000.tar", keys, same="group")
    assert len(groups) < len(backbone.drawings(f"{SHARDS}/00000.tar", keys)) < len(keys) == sum(map(len, groups))
