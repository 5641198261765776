"""Features of any model: files and their errors, banks of views, subsets of the training set."""

import re
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from nmtune_runs import features_file, in_process, one_sentence  # noqa: F401
from torchvision.transforms import RandAugment, RandomResizedCrop

from nmtune import features, train
from nmtune.encoders import timm_transforms
from nmtune.features import subset_per_class
from shared import checkpoints, run


@pytest.mark.slow
def test_an_array_and_labels_are_enough(in_process, features_file, tmp_path):
    code, out, err = in_process(
        "nmtune.train", "--features", features_file, "--batch-size", "16", "--out", tmp_path / "run"
    )
    assert code == 0, err
    assert float(re.search(r"test/top1 ([\d.]+) %", out)[1]) > 90
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoint.pt",
    }
    state = checkpoints.load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert state["classnames"] == [f"class {i}" for i in range(6)] and "classification_head.weight" in state["head"]
    code, out, _ = in_process(
        "nmtune.train", "--features", features_file, "--batch-size", "16", "--out", tmp_path / "run"
    )
    assert code == 0 and "nothing to do" in out
    code, out, err = in_process("nmtune.eval", tmp_path / "run")
    assert code == 0 and re.search(r"\| test/top1 +\| [\d.]+", out), out
    results = checkpoints.read_json(tmp_path / "run/results.json")["metrics"]
    assert {"test/top1", "test/mean_per_class", "test/sve_F", "test/lsvr_z"} <= set(results)
    assert (tmp_path / "run/spectra.png").is_file()


@pytest.mark.parametrize("flag", ("--weight-decay=0.1", "--weight_decay=0.1"))
def test_a_given_rate_or_decay_is_not_selected(monkeypatch, flag):
    for words, chosen in ((["--features", "x.npz"], True), (["--features", "x.npz", flag], False)):
        monkeypatch.setattr("sys.argv", ["nmtune.train", *words])
        assert train.command().select is chosen


def test_views_of_a_batch_are_two_different_ones():
    x = torch.arange(3.0)[:, None, None].expand(3, 10, 2)  # a view's number is its feature
    bank = features.Bank(x, torch.arange(10))
    feats, labels = next(iter(features.bank_batches(bank, 8, seed=0, epoch=0)))
    assert feats.shape == (16, 2) and torch.equal(labels[:8], labels[8:]) and (feats[:8] != feats[8:]).all()
    again, _ = next(iter(features.bank_batches(bank, 8, seed=0, epoch=0)))
    assert torch.equal(feats, again)
    single = features.Bank(x[:1], torch.arange(10))
    feats, labels = next(iter(features.bank_batches(single, 8, seed=0, epoch=0)))
    assert feats.shape == (8, 2) and labels.shape == (8,)
    *_, last = features.bank_batches(single, 9, seed=0, epoch=0)
    assert last[0].shape == (2, 2) and torch.equal(last[0][0], last[0][1])  # for a batch norm


@pytest.mark.parametrize(("n", "batch_size", "world_size"), [(48, 30, 3), (48, 16, 2), (5, 6, 3), (12, 12, 1)])
def test_shares_equal_the_loaders_batches(n: int, batch_size: int, world_size: int):
    cfg, ranks, first = SimpleNamespace(batch_size=batch_size, seed=0), [], int(n > batch_size)
    for rank in range(world_size):
        process = run.Process(rank, world_size, torch.device("cpu"))
        ranks.append([len(rows) for rows in features.training_order(n, cfg, process, range(1, 3), first)])
    found = list(features.shares(n, batch_size, range(1, 3), first, world_size))
    assert found == [list(each) for each in zip(*ranks, strict=True)] and sum(found[-1]) in (n % batch_size, batch_size)


def test_views_of_ranks_are_gathered_without_waiting_for_the_gpu(watch, monkeypatch: pytest.MonkeyPatch):
    others = [torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)]
    given = iter([others, [torch.arange(3), torch.arange(3), torch.arange(3)]])
    filled = lambda parts, own: [part.copy_(x) for part, x in zip(parts, next(given), strict=True)]  # noqa: E731
    monkeypatch.setattr(features.dist, "all_gather", filled)
    views, labels = watch.within(features.gather_views)(others[0][:, :2], torch.arange(2), [2, 3, 0])
    assert torch.equal(views, torch.cat([others[0][:, :2], others[1]], dim=1)) and labels.tolist() == [0, 1, 0, 1, 2]


def test_subset_of_absent_classes_and_empty_sets():
    rng = np.random.RandomState(0)
    assert len(subset_per_class(np.zeros(0, dtype=np.int64), 0.5, rng)) == 0
    rows = subset_per_class(np.array([5, 5, 5, 5, 2, 2]), 0.5, rng)
    assert sorted(np.array([5, 5, 5, 5, 2, 2])[rows]) == [2, 5, 5]


X, Y = np.zeros((4, 2)), np.arange(4) % 2
BROKEN_FILES = {
    "no labels": ({"features": X}, "needs the arrays `features`"),
    "rows": ({"features": X, "labels": Y[:3]}, "one that fits 3 labels"),
    "one number a row": ({"features": X[:, 0], "labels": Y}, "has the shape (4,)"),
    "no columns": ({"features": X[:, :0], "labels": Y}, "has the shape (4, 0)"),
    "nan": ({"features": np.where(np.arange(8).reshape(4, 2) == 5, np.nan, X), "labels": Y}, "first in row 2"),
    "beyond fp32": ({"features": X + 1e200, "labels": Y}, "not finite in 32 bits"),
    "complex": ({"features": X * 1j, "labels": Y}, "complex128"),
    "text": ({"features": X.astype(str), "labels": Y}, "not <U"),
    "one-hot labels": ({"features": X, "labels": np.eye(4)}, "one label per row"),
    "fractions": ({"features": X, "labels": Y + 0.5}, "float64 like 0.5"),
    "nan labels": ({"features": X, "labels": Y + np.nan}, "whole numbers or names"),
    "objects": ({"features": X, "labels": np.array(["a", "b", "a", "b"], dtype=object)}, "write it by np.savez"),
    "one class": ({"features": X, "labels": Y * 0}, "has 1 class"),
    "no rows": ({"features": X[:0], "labels": Y[:0]}, "one label per row"),
    "test without labels": ({"features": X, "labels": Y, "ood_features": X}, "ood_features without ood_labels"),
    "labels without test": ({"features": X, "labels": Y, "ood_labels": Y}, "ood_labels without ood_features"),
    "empty test": ({"features": X, "labels": Y, "t_features": X[:0], "t_labels": Y[:0]}, "`t_labels`"),
    "test of other width": ({"features": X, "labels": Y, "t_features": np.zeros((4, 3)), "t_labels": Y}, "3 columns"),
    "unknown test label": (
        {"features": X, "labels": Y, "t_features": X, "t_labels": Y + 1},
        "label 2",
    ),
    "too few rows": ({"features": X[:2], "labels": Y[:2]}, "too few rows"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_features_files(in_process, tmp_path, case):
    arrays, message = BROKEN_FILES[case]
    np.savez(tmp_path / "f.npz", **arrays)
    code, _, err = in_process("nmtune.train", "--features", tmp_path / "f.npz", "--out", tmp_path / "run")
    assert code == 2 and message in err and one_sentence(err), err


@pytest.mark.parametrize("labels", [Y, Y * 1000, Y.astype(float), 2 * Y - 1, Y == 1, np.array(["no", "yes"])[Y]])
def test_labels_may_be_any_whole_numbers_or_names(tmp_path, labels):
    np.savez(tmp_path / "f.npz", features=X, labels=labels, t_features=X[:2], t_labels=labels[[1, 0]])
    sets = features.read_features(tmp_path / "f.npz")
    assert sets.train.labels.tolist() == Y.tolist() and sets.tests["t"][1].tolist() == [1, 0]
    assert sets.classnames == [str(name) for name in (labels.astype(int) if labels.dtype == float else labels)[:2]]


def test_features_that_blow_up_end_in_a_sentence(in_process, tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 8)) * 1e30
    np.savez(tmp_path / "f.npz", features=x, labels=np.arange(40) % 2)
    for method in ("lp", "mlp", "nmtune"):
        command = [method, "--features", tmp_path / "f.npz", "--lr", "1e30", "--out", tmp_path / method]
        code, _, err = in_process("nmtune.train", *command)
        assert code == 2 and "lower" in err and one_sentence(err), err


def test_rand_augment_follows_the_crop():
    sizes = {
        "input_size": (3, 32, 32),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    for view in (timm_transforms(sizes)[0], open_clip.image_transform(32, is_train=True)):
        crop, augment, *rest = features.with_rand_augment(view).transforms
        assert isinstance(crop, RandomResizedCrop) and isinstance(augment, RandAugment)
        assert rest == view.transforms[1:]
