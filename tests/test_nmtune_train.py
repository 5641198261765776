"""Tuning a head, and the script end to end on real emoji images.

Every arm, a features file, kill -9 and resume, two processes against one.
"""

import re
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from nmtune_runs import assert_equal_runs, corpus, features_file, images, in_process, one_sentence, start, two  # noqa: F401
from scripts import ended, finished, kill_at, metrics, same

from nmtune import config, features, train
from nmtune import eval as nmtune_eval
from nmtune.model import NMTuneHead, head_from, nmtune_loss, transformed
from nmtune.train import cosine_lr, make_optimizer, train_step, tune
from shared import checkpoints, pictures, run
from shared.errors import UserError

SCRIPT = "nmtune.train"
TUNE = "--encoder timm:resnet_emoji --epochs 2 --batch-size 20 --workers 0 --log-every 1 --precision fp32".split()


# ---------------------------------------------------------------------------------------------------------- properties


def test_batch_norm_trains_and_the_optimizer_decays_everything():
    head = NMTuneHead(8, 3)
    optimizer = make_optimizer(head, 1e-3, 1e-4)
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["weight_decay"] == 1e-4
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in head.parameters()}
    before = head.mlp_after[1].running_var.clone()
    head.eval()
    train_step(head, torch.randn(6, 8), torch.tensor([0, 1, 2]).repeat(2), optimizer)
    assert head.training and not torch.equal(before, head.mlp_after[1].running_var)
    assert head.scale_after.shape == (1, 8) and NMTuneHead(8, 3, residual=False).scale_after is None


def test_the_papers_head_and_schedule():
    """Figure 17's MLP has no BatchNorm and no residual, and is read back so; app. B.3's schedule is a line to 0."""
    cfg = config.PRESETS["nmtune-paper"][1]
    head = train.make_head(cfg, 8, 3)
    assert [type(layer).__name__ for layer in head.mlp_after] == ["Linear", "ReLU", "Linear"]
    assert head.mlp_after[0].out_features == 32 and head.scale_after is None
    feats = torch.randn(5, 8)
    z, logits = transformed(head_from(head.state_dict()), feats)
    torch.testing.assert_close(logits, head(feats))
    torch.testing.assert_close(z, head.mlp_after(feats))
    assert cfg.loss_weights(8) == (0.08, 0.01, 0.01) and cfg.svd_k == 1
    linear = config.Config(lr=1.0, schedule="linear", warmup=2)
    rates = [train.learning_rate(linear, 6, step) for step in range(6)]
    assert rates == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert train.learning_rate(config.Config(lr=1.0), 6, 2) == cosine_lr(1.0, 0, 6, 2)


def test_each_regulariser_alone_changes_the_spectrum_as_intended():
    """Spectra of z after tuning with one loss term are compared with tuning without, from the same weights and
    batches."""
    torch.manual_seed(0)
    feats, labels = torch.randn(64, 24).relu(), torch.arange(64) % 3
    start, parts = NMTuneHead(24, 3).state_dict(), {}
    for name, weights in {"none": (0, 0, 0), "mse": (10, 0, 0), "cov": (0, 1, 0), "svd": (0, 0, 20)}.items():
        head = NMTuneHead(24, 3)
        head.load_state_dict(start)
        cfg = config.Config(epochs=40, w_mse=weights[0], w_cov=weights[1], w_svd=weights[2])
        tune(cfg, head, [(feats, labels)], views=2)
        with torch.no_grad():
            z, logits = transformed(head.eval(), feats)
            parts[name] = nmtune_loss(logits, labels, z, feats, (1, 1, 1))[1]
    for name in ("mse", "cov", "svd"):
        assert parts[name][name] < parts["none"][name] - 0.05 * abs(parts["none"][name]), name


# -------------------------------------------------------------------------------------------------- features file, arms


@pytest.mark.parametrize("preset", config.METHODS)
def test_every_method_tunes_on_a_bank_of_views(in_process, tmp_path, preset):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 70)
    x = (rng.standard_normal((3, 16))[labels] + 0.3 * rng.standard_normal((4, 70, 16))).astype(np.float32)
    np.savez(tmp_path / "f.npz", features=x, labels=labels, ood_features=x[0] + 0.1, ood_labels=labels)
    options = ["--features", tmp_path / "f.npz", "--epochs", "2", "--log-every", "1", "--label-noise", "0.1"]
    code, out, err = in_process("nmtune.train", preset, *options, "--out", tmp_path / "run")
    assert code == 0 and "labels wrong" in out and "ood/top1" in out, err
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines[:-1]] == [1, 2, 3, 4]  # 64 and 6 images an epoch, the short batch kept
    assert all({"mse", "cov", "svd"} <= set(line) for line in lines[:-1]) == preset.startswith("nmtune")
    assert lines[0]["lr"] == pytest.approx(config.METHODS[preset][1].lr)
    state = checkpoints.load_checkpoint(tmp_path / "run/checkpoint.pt")
    settings = checkpoints.config_in(state, config.Config, tmp_path)
    source = features.RunFeatures(settings, run.Process(0, 1, torch.device("cpu")))
    assert source.views == (1 if preset == "lp" or preset.endswith("-paper") else 2)


def test_run_folders_of_other_runs_are_refused(in_process, features_file, tmp_path):
    command = ["--features", features_file, "--epochs", "1", "--out", tmp_path / "run"]
    assert in_process("nmtune.train", *command)[0] == 0
    code, _, err = in_process("nmtune.train", *command, "--lr", "1e-4")
    assert code == 2 and "lr (was 0.001, now 0.0001)" in err and one_sentence(err)


def test_rates_of_ones_own_features(in_process, monkeypatch, tmp_path):
    """The authors' learning rates overfit few samples of many dimensions; chosen rates do as well as logistic
    regression. The choice is printed and saved, and a resumed run does not choose again."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    centres, labels, test = rng.standard_normal((8, 200)), np.arange(240) % 8, np.arange(800) % 8
    x, x2 = (4 * centres[y] + 12 * rng.standard_normal((len(y), 200)) + 5 for y in (labels, test))
    np.savez(tmp_path / "f.npz", features=x, labels=labels, ood_features=x2, ood_labels=test)
    best = 100 * linear_model.LogisticRegression(max_iter=1000).fit(x, labels).score(x2, test)
    found = {}
    for preset in ("lp", "own-lp"):
        code, out, err = in_process(
            "nmtune.train", preset, "--features", tmp_path / "f.npz", "--out", tmp_path / preset
        )
        assert code == 0, err
        found[preset] = float(re.search(r"ood/top1 ([\d.]+) %", out)[1])
    assert re.search(r"--lr [\d.e-]+ .*48 held-out .*0\.0001 [\d.]+ %", out)
    assert found["own-lp"] > found["lp"] and found["own-lp"] > best - 2, (found, best)
    state = checkpoints.load_checkpoint(tmp_path / "own-lp/checkpoint.pt")
    assert set(state["chosen"]) == {"lr", "weight_decay"} and state["config"]["lr"] == 0.01
    command = ["--features", tmp_path / "f.npz", "--epochs", "2", "--out", tmp_path / "n"]
    with monkeypatch.context() as killed:
        killed.setattr(run.RunFolder, "log", Mock(side_effect=UserError("killed")))
        code, out, _ = in_process("nmtune.train", *command)
    assert code == 2 and "--select: 8 heads, 2 epochs each, on 192 samples" in out  # without a preset, too
    code, out, err = in_process("nmtune.train", *command)
    assert code == 0 and "--select" not in out, err
    code, out, err = in_process(
        "nmtune.train", "--features", tmp_path / "f.npz", "--epochs", "2", "--lr", "1e-3", "--out", tmp_path / "given"
    )
    assert code == 0 and "chosen" not in out, err


@pytest.mark.parametrize("preset", ["lp", "nmtune"])
def test_heads_are_those_of_runs_with_their_seeds(in_process, tmp_path, preset):
    """The accuracies of a run with three heads are the means over three runs with one; the first head is kept."""
    rng = np.random.default_rng(0)
    labels, centres = rng.integers(0, 3, 90), rng.standard_normal((3, 12))
    x, x1 = (centres[labels] + noise * rng.standard_normal((90, 12)) for noise in (1, 2))
    np.savez(tmp_path / "f.npz", features=x, labels=labels, ood_features=x1, ood_labels=labels)
    options = [preset, "--features", tmp_path / "f.npz", "--epochs", "2", "--batch-size", "32"]
    for name, more in {"30": [], "31": [], "32": [], "three": ["--seed", "30", "--heads", "3"]}.items():
        code, _, err = in_process("nmtune.train", *options, "--seed", name, *more, "--out", tmp_path / name)
        assert code == 0, err
    *alone, mean = ([metrics(tmp_path / name)[-1]["ood/top1"]] for name in ("30", "31", "32", "three"))
    assert mean[0] == pytest.approx(np.mean(alone)) and len(np.unique(alone)) > 1
    scores = pictures.unpacked(metrics(tmp_path / "three")[-1]["ood/top1 by picture"])
    assert scores.mean() == pytest.approx(mean[0]) and len(np.unique(scores)) > 2  # a head in three may be right
    first, kept = (checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt")["head"] for name in ("30", "three"))
    assert same(first, kept)


def test_a_rate_that_diverges_is_not_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "RATES", (1e30, 1e-3))
    generator = torch.Generator().manual_seed(0)
    bank = features.Bank(torch.randn(1, 60, 8, generator=generator), torch.arange(60) % 3)
    source = SimpleNamespace(
        bank=bank, process=run.Process(0, 1, torch.device("cpu")), dim=8, classnames=["a", "b", "c"], views=1
    )
    assert train.choose(config.Config(epochs=3, batch_size=20), source)["lr"] == 1e-3


def test_the_papers_consistency_term_is_d_times_the_authors():
    torch.manual_seed(0)
    z, logits = torch.randn(8, 6), torch.randn(8, 3)
    found = {}
    for mse_sum in (False, True):
        cfg = config.Config(w_mse=0.5, mse_sum=mse_sum, w_cov=0.0, w_svd=0.0)
        found[mse_sum], parts = nmtune_loss(logits, torch.arange(8) % 3, z, z.flip(0), cfg.loss_weights(6))
    assert (found[True] - parts["ce"]).item() == pytest.approx(6 * (found[False] - parts["ce"]).item(), rel=1e-4)
    assert config.Config(method="mlp").loss_weights(6) == (0.0, 0.0, 0.0)


def test_one_view_is_two_equal_ones():
    """A features file of one view uses each sample once per step, with the loss and gradients of two equal views."""
    torch.manual_seed(0)
    head = NMTuneHead(6, 3).train()
    feats, labels = torch.randn(40, 6), torch.arange(40) % 3
    found = []
    for times in (1, 2):
        x, y = feats.repeat(times, 1), labels.repeat(times)
        z, logits = transformed(head, x)
        head.zero_grad()
        loss, parts = nmtune_loss(logits, y, z, x, (1.0, 0.0, 0.001), views=times)
        loss.backward()
        found.append([loss, *parts.values(), *(p.grad.clone() for p in head.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------- images, kill and resume


def test_fresh_views_kill_and_resume(in_process, start, tmp_path, images):
    """Encoder and images with new views in every step, killed twice and resumed."""
    sets = ["--data", images, "--tests", f"id={images}"]
    command = ["nmtune", *TUNE, *sets, "--epochs", "4", "--save-every", "2", "--out"]
    code, out, err = in_process("nmtune.train", *command, tmp_path / "whole")
    assert code == 0 and "id/top1" in out, err
    for line in (3, 8):
        kill_at(start("nmtune.train", *command, tmp_path / "killed"), tmp_path / "killed", line)
    finished(ended(start("nmtune.train", *command, tmp_path / "killed")))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    states = [checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("killed", "whole")]
    assert all(same(states[0][part], states[1][part]) for part in ("head", "optimizer", "epoch"))


@pytest.mark.parametrize("script", ["train mlp", "finetune full"])
def test_a_failing_test_loses_no_training(in_process, tmp_path, images, monkeypatch, script):
    module, *words = f"nmtune.{script}".split()
    command = [module, *words, *TUNE, "--data", images, "--tests", f"id={images}", "--epochs", "1", "--out"]

    def damaged(*arguments):
        raise UserError("a damaged test set")

    with monkeypatch.context() as patch:
        patch.setattr(nmtune_eval, "accuracies", damaged)
        code, _, err = in_process(*command, tmp_path / "failed")
    assert code == 2 and "a damaged test set" in err, err
    for name in ("failed", "whole"):
        if name == "failed":  # only tests are left to do
            monkeypatch.setattr(torch.Tensor, "backward", damaged)
        code, _, err = in_process(*command, tmp_path / name)
        assert code == 0, err
        monkeypatch.undo()
    failed, whole = (checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("failed", "whole"))
    assert metrics(tmp_path / "failed") == metrics(tmp_path / "whole")
    assert all(same(failed[part], whole[part]) for part in ("optimizer", "epoch", "batch"))


@pytest.mark.parametrize("preset, views", [("lp", "eval"), ("lp", "train"), ("mlp", "train")])
def test_other_arms_on_images(in_process, tmp_path, preset, views, images):
    command = [preset, "--views", views, *TUNE, "--data", images, "--tests", f"id={images}", "--bank", "2"]
    code, out, err = in_process("nmtune.train", *command, "--out", tmp_path / "run")
    assert code == 0 and "id/top1" in out, err
    rows = 32 if views == "eval" else 64
    cfg = config.Config(encoder="timm:resnet_emoji", data=str(images), views=views, batch_size=32, bank=2, workers=0)
    source = features.RunFeatures(cfg, run.Process(0, 1, torch.device("cpu")))
    source.encode_training_set()
    assert len(next(source.batches(range(1)))[0]) == rows


# ------------------------------------------------------------------------------------------------------- two processes


@pytest.mark.parametrize("count", [3])
def test_processes_equal_one_in_tuning(in_process, two, tmp_path, images, count: int):
    """With 48 images in batches of 30, the last batch is short, and a third process gets none of it."""
    command = ["nmtune", *TUNE, "--batch-size", "30", "--data", images, "--tests", f"id={images}", "--out"]
    assert in_process("nmtune.train", *command, tmp_path / "one")[0] == 0
    two("nmtune.train", *command, tmp_path / "two", count=count)
    assert_equal_runs(tmp_path / "one", tmp_path / "two", "head")
