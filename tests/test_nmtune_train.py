"""The scripts of nmtune, end to end on real emoji images: pretrain, train, finetune, encoder_study, eval.

Every arm, the features file, kill -9 and resume, two processes against one, broken images, command-line errors.
"""

import ast
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import metrics, same, start_two

from nmtune import config, datasets, encoder_study, features, finetune, model, pretrain, study
from nmtune import eval as evaluation
from shared import checkpoints, run

ROOT = Path(__file__).parent.parent
SHARDS = ROOT / "data/emoji/train"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TINY_ENCODER = ["--model", "resnet_emoji", "--precision", "fp32", "--workers", "0", "--log-every", "1"]
SUPERVISED = ["emoji-sup-30", *TINY_ENCODER, "--epochs", "2", "--batch-size", "32", "--warmup", "2"]
CLIP = [
    "emoji-clip-30",
    "--precision",
    "fp32",
    "--log-every",
    "1",
    "--epochs",
    "2",
    "--batch-size",
    "32",
    "--warmup",
    "2",
]
TUNE = "--encoder timm:resnet_emoji --epochs 2 --batch-size 20 --workers 0 --log-every 1 --precision fp32".split()


@pytest.fixture(scope="module", autouse=True)
def corpus():
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: `make data` makes it", pytrace=False)
    os.chdir(ROOT)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """48 real drawings of four groups as image folders."""
    root, chosen = tmp_path_factory.mktemp("images"), datasets.open_labelled("data/emoji:group:tune")
    for label in range(4):
        folder = root / f"class{label}"
        folder.mkdir()
        for row in np.flatnonzero(chosen.labels == label)[:12]:
            chosen.read(row)[0].save(folder / f"{row}.png")
    return root


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A shard of 80 real pairs."""
    path = tmp_path_factory.mktemp("pairs") / "0.tar"
    with tarfile.open(SHARDS / "00001.tar") as source, tarfile.open(path, "w") as target:
        members = sorted((m for m in source if m.name.endswith((".png", ".txt"))), key=lambda m: m.name)
        for member in members[:160]:
            target.addfile(member, source.extractfile(member))
    return path


@pytest.fixture
def in_process(in_process):
    """A script's command line in this process -> (exit code, stdout, stderr)."""
    return lambda module, *arguments: in_process(*arguments, module=module)


def start(module: str, *arguments, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | environment, **streams)


def finished(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def kill_at(process: subprocess.Popen, out: Path, line: int) -> None:
    log, deadline = out / "metrics.jsonl", time.monotonic() + 90
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= line):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stdout.read()


def one_sentence(err: str) -> bool:
    lines = [line for line in err.splitlines() if "WARNING" not in line]
    return len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err


# -------------------------------------------------------------------------------------------------- features file, arms


@pytest.fixture(scope="module")
def features_file(tmp_path_factory) -> Path:
    """Six separable classes, one view, no test set: an array and labels are all."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 300)
    x = rng.standard_normal((6, 24))[labels] + 0.5 * rng.standard_normal((300, 24))
    path = tmp_path_factory.mktemp("features") / "my_features.npz"
    np.savez(path, features=x, labels=np.array([f"class {label}" for label in labels]))
    return path


def test_an_array_and_labels_are_enough(in_process, features_file, tmp_path):
    code, out, err = in_process(
        "nmtune.train", "--features", features_file, "--batch-size", "16", "--out", tmp_path / "run"
    )
    assert code == 0, err
    assert float(re.search(r"test/top1 ([\d.]+) %", out)[1]) > 90
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
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
    assert code == 0 and "is finished (30 epochs); nothing to do" in out
    code, out, err = in_process("nmtune.eval", tmp_path / "run")
    assert code == 0 and "test/top1" in out, err
    results = checkpoints.read_json(tmp_path / "run/results.json")["metrics"]
    assert {"test/top1", "test/balanced", "test/sve_F", "test/lsvr_z"} <= set(results)
    assert (tmp_path / "run/spectra.png").is_file()


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


def test_views_of_a_batch_are_two_different_ones():
    x = torch.arange(3.0)[:, None, None].expand(3, 10, 2)  # a view's number is its feature
    bank = features.Bank(x, torch.arange(10))
    feats, labels = next(iter(features.bank_batches(bank, 8, seed=0, epoch=0)))
    assert feats.shape == (16, 2) and torch.equal(labels[:8], labels[8:]) and (feats[:8] != feats[8:]).all()
    again, _ = next(iter(features.bank_batches(bank, 8, seed=0, epoch=0)))
    assert torch.equal(feats, again)
    single = features.Bank(x[:1], torch.arange(10))
    feats, _ = next(iter(features.bank_batches(single, 8, seed=0, epoch=0)))
    assert torch.equal(feats[:8], feats[8:])


X, Y = np.zeros((4, 2)), np.arange(4) % 2
BROKEN_FILES = {
    "no labels": ({"features": X}, "needs the arrays `features`"),
    "rows": ({"features": X, "labels": Y[:3]}, "one that fits 3 labels"),
    "one number a row": ({"features": X[:, 0], "labels": Y}, "has the shape (4,), not one that fits 4 labels"),
    "no columns": ({"features": X[:, :0], "labels": Y}, "has the shape (4, 0)"),
    "nan": ({"features": np.where(np.arange(8).reshape(4, 2) == 5, np.nan, X), "labels": Y}, "first in row 2"),
    "beyond fp32": ({"features": X + 1e200, "labels": Y}, "no finite 32-bit numbers"),
    "complex": ({"features": X * 1j, "labels": Y}, "real numbers, not complex128"),
    "text": ({"features": X.astype(str), "labels": Y}, "real numbers, not <U"),
    "one-hot labels": ({"features": X, "labels": np.eye(4)}, "one label a row"),
    "fractions": ({"features": X, "labels": Y + 0.5}, "whole numbers or names, not float64 like 0.5"),
    "nan labels": ({"features": X, "labels": Y + np.nan}, "whole numbers or names"),
    "objects": ({"features": X, "labels": np.array(["a", "b", "a", "b"], dtype=object)}, "write it by np.savez"),
    "one class": ({"features": X, "labels": Y * 0}, "has 1 class: at least 2"),
    "no rows": ({"features": X[:0], "labels": Y[:0]}, "one label a row"),
    "test without labels": ({"features": X, "labels": Y, "ood_features": X}, "ood_features without ood_labels"),
    "labels without test": ({"features": X, "labels": Y, "ood_labels": Y}, "ood_labels without ood_features"),
    "empty test": ({"features": X, "labels": Y, "t_features": X[:0], "t_labels": Y[:0]}, "`t_labels`"),
    "test of other width": ({"features": X, "labels": Y, "t_features": np.zeros((4, 3)), "t_labels": Y}, "3 columns"),
    "unknown test label": ({"features": X, "labels": Y, "t_features": X, "t_labels": Y + 1}, "label 2, which `labels`"),
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


# --------------------------------------------------------------------------------------------- images, kill and resume


def test_fresh_views_kill_and_resume(in_process, tmp_path, images):
    """Encoder and images, new views in every step; killed twice on the way."""
    sets = ["--data", images, "--tests", f"id={images}"]
    command = ["nmtune", *TUNE, *sets, "--epochs", "4", "--save-every", "2", "--out"]
    code, out, err = in_process("nmtune.train", *command, tmp_path / "whole")
    assert code == 0 and "id/top1" in out, err
    for line in (3, 8):
        kill_at(start("nmtune.train", *command, tmp_path / "killed"), tmp_path / "killed", line)
    finished(start("nmtune.train", *command, tmp_path / "killed"))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    states = [checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("killed", "whole")]
    assert all(same(states[0][part], states[1][part]) for part in ("head", "optimizer", "epoch"))


@pytest.mark.parametrize("preset", ["emoji-lp", "emoji-lp-views", "emoji-mlp"])
def test_other_arms_on_images(in_process, tmp_path, preset, images):
    sets = ["--data", images, "--tests", f"id={images}"]
    code, out, err = in_process("nmtune.train", preset, *TUNE, *sets, "--bank", "2", "--out", tmp_path / "run")
    assert code == 0 and "id/top1" in out, err
    rows = 32 if preset == "emoji-lp" else 64
    cfg = dataclasses.replace(config.PRESETS[preset][1], encoder="timm:resnet_emoji", data=str(images), tests=())
    process = run.Process(0, 1, torch.device("cpu"))
    source = features.RunFeatures(dataclasses.replace(cfg, batch_size=32, bank=2), process, "fp32")
    source.encode_training_set()
    assert len(next(iter(source.batches(0)))[0]) == rows


def test_pretraining_on_labels_kill_and_resume(in_process, tmp_path, images):
    command = [*SUPERVISED, "--data", images, "--batch-size", "16", "--save-every", "2", "--out"]
    code, out, err = in_process("nmtune.pretrain", *command, tmp_path / "whole")
    assert code == 0 and re.search(r"noise ratio 0.3: 31.25 % of 48 labels wrong", out), err
    kill_at(start("nmtune.pretrain", *command, tmp_path / "killed"), tmp_path / "killed", 3)
    finished(start("nmtune.pretrain", *command, tmp_path / "killed"))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    states = [checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("killed", "whole")]
    assert all(same(states[0][part], states[1][part]) for part in ("state_dict", "optimizer", "epoch", "noise"))
    # the encoder loads where it is wanted: in timm, in nmtune.train and in nmtune.finetune
    code, out, err = in_process(
        "nmtune.finetune", "full", "--encoder", tmp_path / "whole", "--data", images, "--tests", f"again={images}",
        "--epochs", "2", "--batch-size", "16", "--workers", "0", "--log-every", "1", "--out", tmp_path / "tuned",
    )  # fmt: skip
    assert code == 0 and "again/top1" in out, err
    assert {"ce", "cov", "svd"} <= set(metrics(tmp_path / "tuned")[0]) and "mse" not in metrics(tmp_path / "tuned")[0]
    state = checkpoints.load_checkpoint(tmp_path / "tuned/checkpoint.pt")["state_dict"]
    before = checkpoints.load_checkpoint(tmp_path / "whole/checkpoint.pt")["state_dict"]
    assert not torch.equal(state["image_encoder.conv1.weight"], before["conv1.weight"])


@pytest.mark.parametrize("preset", ["full", "emoji-lora"])
def test_fine_tuning_kill_and_resume(in_process, tmp_path, images, preset):
    encoder = {"full": "timm:resnet_emoji", "emoji-lora": "open_clip:ViT-emoji"}[preset]
    command = [
        preset, "--encoder", encoder, "--data", images, "--tests", f"again={images}", "--epochs", "2", "--batch-size",
        "16", "--workers", "0", "--log-every", "1", "--save-every", "2", "--out",
    ]  # fmt: skip
    code, _, err = in_process("nmtune.finetune", *command, tmp_path / "whole")
    assert code == 0, err
    kill_at(start("nmtune.finetune", *command, tmp_path / "killed"), tmp_path / "killed", 4)
    finished(start("nmtune.finetune", *command, tmp_path / "killed"))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    states = [checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("killed", "whole")]
    assert all(same(states[0][part], states[1][part]) for part in ("state_dict", "optimizer", "epoch"))


def test_pretraining_on_captions_and_lora(in_process, tmp_path, pairs, images):
    pytest.importorskip("peft")
    code, out, err = in_process("nmtune.pretrain", *CLIP, "--data", pairs, "--out", tmp_path / "clip")
    assert code == 0 and re.search(r"noise ratio 0.3: [\d.]+ % of 80 captions displaced", out), err
    options = ["--data", images, "--tests", f"again={images}", "--epochs", "1", "--batch-size", "16"]
    code, out, err = in_process(
        "nmtune.finetune", "emoji-lora", "--encoder", tmp_path / "clip", *options, "--log-every", "1", "--out",
        tmp_path / "lora",
    )  # fmt: skip
    assert code == 0 and "again/top1" in out, err
    tuned, whole = (int(n.replace(",", "")) for n in re.search(r"([\d,]+) of ([\d,]+) parameters", out).groups())
    assert tuned < 0.2 * whole
    state = checkpoints.load_checkpoint(tmp_path / "lora/checkpoint.pt")["state_dict"]
    assert any("lora_A" in key and "c_fc" in key for key in state)


def test_swapped_captions_are_those_of_other_pairs(pairs):
    cfg = dataclasses.replace(config.EMOJI_CLIP, data=str(pairs), noise=0.5)
    samples = pretrain.SwappedCaptions(cfg, lambda image: torch.zeros(1), lambda texts: [texts[0]])
    captions = [samples.pairs.caption(row) for row in range(len(samples))]
    for row, source in enumerate(samples.source):
        assert samples[row][1] == captions[source]
    assert samples.noisy.any() and samples.noisy.mean() < 0.5


# ------------------------------------------------------------------------------------------------------- two processes


def two(module: str, *arguments) -> None:
    for process in start_two(start, module, *arguments):
        finished(process)


def assert_equal_runs(one: Path, other: Path, part: str) -> None:
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for name in a.keys() - {"accuracy_clean", "accuracy_noisy"}:  # of the local batch
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=2e-5, err_msg=f"{name} in step {a['step']}")
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt")[part] for path in (one, other))
    for name in a:
        if name in ("mlp_after.0.bias", "mlp_after.1.running_mean"):
            continue  # true gradient 0, of which AdamW makes steps from rounding
        x, y = b[name], a[name]
        if name.endswith("in_proj_bias"):  # so is that of the keys' bias
            x, y = (bias.unflatten(0, (3, -1))[[0, 2]] for bias in (x, y))
        apart = (x - y).abs() > 1e-4 * (1 + y.abs())  # one weight in ten thousand may have such a gradient, too
        assert apart.float().mean() <= 1e-4, f"{name}: {apart.sum()} of {apart.numel()} differ"
        torch.testing.assert_close(x, y, rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_two_processes_equal_one_in_tuning(in_process, tmp_path, images):
    """The last batch of 8 is short, and the second process has none of it."""
    command = ["nmtune", *TUNE, "--data", images, "--tests", f"id={images}", "--out"]
    assert in_process("nmtune.train", *command, tmp_path / "one")[0] == 0
    two("nmtune.train", *command, tmp_path / "two")
    assert_equal_runs(tmp_path / "one", tmp_path / "two", "head")


def test_two_processes_equal_one_in_pretraining(in_process, tmp_path, pairs):
    command = [*CLIP, "--data", pairs, "--out"]
    assert in_process("nmtune.pretrain", *command, tmp_path / "one")[0] == 0
    two("nmtune.pretrain", *command, tmp_path / "two")
    assert_equal_runs(tmp_path / "one", tmp_path / "two", "state_dict")


# ----------------------------------------------------------------------------------------------------------- data sets


def test_emoji_parts_do_not_share_what_they_must_not():
    parts = {part: datasets.open_labelled(f"data/emoji:name:{part}") for part in ("pretrain", "tune", "id", "ood")}
    names = {part: {images.classnames[label] for label in images.labels} for part, images in parts.items()}
    assert not names["pretrain"] & names["tune"] and names["id"] <= names["tune"] and names["ood"] <= names["tune"]
    assert not set(parts["tune"].keys) & set(parts["id"].keys)
    groups = [datasets.open_labelled(f"data/emoji:group:{part}").classnames for part in parts]
    assert all(len(names) == 9 and names == groups[0] for names in groups)


def test_layouts(tmp_path, images):
    folder = datasets.open_labelled(str(images))
    assert folder.classnames == [f"class{i}" for i in range(4)] and len(folder) == 48
    (images / "real_test.txt").write_text(
        "".join(f"class{i}/{p.name} {i}\n" for i in range(4) for p in (images / f"class{i}").iterdir())
    )
    listed = datasets.open_labelled(str(images / "real_test.txt"))
    assert listed.classnames == folder.classnames and sorted(listed.labels) == sorted(folder.labels)
    (images / "real_test.txt").unlink()
    benchmark = datasets.open_labelled("data/emoji/eval/groups_id:test")
    assert len(benchmark) == 990 and benchmark.num_classes == 9 and benchmark.read(0)[0].size == (64, 64)
    for name in ("10", "9", "100"):  # ImageNet-V2's folders are numbers
        (tmp_path / "v2" / name).mkdir(parents=True)
        listed.read(0)[0].save(tmp_path / "v2" / name / "a.png")
    numbered, groups = datasets.open_test(str(tmp_path / "v2"), ["a", "b", "c"])
    assert numbered.classnames == ["9", "10", "100"] and groups is None


def test_groups_of_other_class_lists(tmp_path, images):
    trained = ["other", *[f"class{i}" for i in range(4)]]
    assert datasets.open_test(str(images), trained)[1] == [[1], [2], [3], [4]]
    with pytest.raises(ValueError, match="was not trained; write"):
        datasets.open_test(str(images), ["class0", "class1"])
    (images / "groups.json").write_text("[[0, 1], [1], [0], [1]]")
    assert datasets.open_test(str(images), ["a", "b"])[1][0] == [0, 1]
    (images / "groups.json").unlink()


def test_objectnet_and_vid_robust(tmp_path):
    picture = datasets.open_labelled("data/emoji:group:ood").read(0)[0]
    mappings = tmp_path / "objectnet-1.0/mappings"
    mappings.mkdir(parents=True)
    for folder in ("air_freshener", "alarm_clock", "banana"):
        (tmp_path / "objectnet-1.0/images" / folder).mkdir(parents=True)
        picture.save(tmp_path / "objectnet-1.0/images" / folder / "a.png")
    write = {
        "folder_to_objectnet_label.json": {
            "air_freshener": "Air freshener",
            "alarm_clock": "Alarm clock",
            "banana": "Banana",
        },
        "objectnet_to_imagenet_1k.json": {"Alarm clock": "analog clock; digital clock", "Banana": "banana"},
        "pytorch_to_imagenet_2012_id.json": {"5": 2, "7": 0, "9": 1},
    }
    for name, value in write.items():
        (mappings / name).write_text(json.dumps(value))
    (mappings / "imagenet_to_label_2012_v2").write_text("digital clock\nbanana\nanalog clock\n")
    found, groups = datasets.open_test(str(tmp_path / "objectnet-1.0/images"), [str(i) for i in range(1000)])
    assert groups == [[5, 7], [9]] and found.labels.tolist() == [0, 1] and found.read(0)[0].size == (60, 60)

    root = tmp_path / "imagenet-vid-robust"
    for folder in ("val/x", "metadata", "misc"):
        (root / folder).mkdir(parents=True)
    for name in "ab":
        picture.save(root / f"val/x/{name}.png")
    (root / "metadata/labels.json").write_text(json.dumps({"val/x/a.png": [1], "val/x/b.png": [0, 1]}))
    (root / "metadata/pmsets.json").write_text(json.dumps({"val/x/b.png": ["val/x/a.png"]}))
    (root / "misc/imagenet_class_index.json").write_text(
        json.dumps({"0": ["n1", "x"], "1": ["n2", "y"], "2": ["n3", "z"]})
    )
    (root / "misc/imagenet_vid_class_index.json").write_text(json.dumps({"0": ["v0", "p"], "1": ["v1", "q"]}))
    (root / "misc/rev_wnid_map.json").write_text(json.dumps({"v0": ["n1", "n3"], "v1": ["n2"]}))
    frames, groups, accepted, sets = datasets.vid_robust(root)
    assert datasets.open_test(str(root / "val"), [str(i) for i in range(1000)])[1] == groups
    assert groups == [[0, 2], [1]] and accepted == [[1], [0, 1]] and sets == [[1, 0]] and len(frames) == 2


def webdataset(folder: Path, pictures: list, labels: list[int], names: list[str], split: str) -> None:
    (folder / split).mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    with tarfile.open(folder / split / "0.tar", "w") as tar:
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            content = io.BytesIO()
            picture.save(content, "webp", lossless=True)
            for ending, value in (("webp", content.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"s{i:05d}.{ending}")
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))


@pytest.mark.parametrize("name", datasets.ID_SETS)
@pytest.mark.parametrize("layout", ["vtab-", "", "folders"])
def test_the_fourteen_sets_of_in_domain_transfer(tmp_path, images, name, layout):
    with pytest.raises(FileNotFoundError, match=f"{name} --root .* wants a webdataset .*wds_.*, or image folders"):
        datasets.benchmark(name, str(tmp_path))
    source = datasets.open_labelled(str(images))
    pictures, rows = [source.read(row)[0].convert("L") for row in (0, 13, 40)], source.labels[[0, 13, 40]]
    for split in ("train", "test"):
        if layout == "folders":
            for picture, label in zip(pictures, rows, strict=True):
                (tmp_path / name / split / f"class{label}").mkdir(parents=True)
                picture.save(tmp_path / name / split / f"class{label}" / "a.png")
        else:
            folder = tmp_path / f"wds_{layout}{datasets.ID_SETS[name]}"
            webdataset(folder, pictures, [0, 1, 2], [f"class{label}" for label in rows], split)
    training, tests = datasets.benchmark(name, str(tmp_path))
    found = datasets.open_labelled(training)
    test, groups = datasets.open_test(tests[name], found.classnames)
    assert found.classnames == ["class0", "class1", "class3"] and len(test) == 3 and groups is None
    assert found.read(1)[0].mode == "RGB" and found.read(1)[1] == 1  # grey images, which upstream fails on


def test_domainnet_and_imagenet(tmp_path, images):
    for name, wanted in (
        ("domainnet-sketch", "lists .*DOMAIN_"),
        ("imagenet", "image folders .*CLASS/, or a webdataset"),
    ):
        with pytest.raises(FileNotFoundError, match=f"is not there: --benchmark {name} --root .* wants .*{wanted}"):
            datasets.benchmark(name, str(tmp_path))
    with pytest.raises(ValueError, match="--benchmark is one of cifar10"):
        datasets.benchmark("mnist", str(tmp_path))
    source = datasets.open_labelled(str(images))
    pictures = [source.read(row)[0] for row in (0, 13, 40)]
    for domain in datasets.DOMAINS:
        for picture, label in zip(pictures, "xyz", strict=True):
            (tmp_path / "domainnet" / domain / label).mkdir(parents=True)
            picture.save(tmp_path / "domainnet" / domain / label / "a b.png")
        lines = "".join(f"{domain}/{label}/a b.png {i}\n" for i, label in enumerate("xyz"))
        for split in ("train", "test"):
            (tmp_path / "domainnet" / f"{domain}_{split}.txt").write_text(lines)
    training, tests = datasets.benchmark("domainnet-sketch", str(tmp_path))
    names = datasets.open_labelled(training).classnames
    assert training.endswith("sketch_train.txt") and list(tests) == list(datasets.DOMAINS) and names == ["x", "y", "z"]
    assert all(datasets.open_test(test, names)[1] is None for test in tests.values())
    for split, name in (("train", "imagenet"), ("val", "imagenet"), ("", "imagenet-a")):
        for i, synset in enumerate(("n1", "n2", "n3")):
            if name == "imagenet" or synset != "n1":
                (tmp_path / name / split / synset).mkdir(parents=True)
                pictures[i].save(tmp_path / name / split / synset / "a.png")
    webdataset(tmp_path / "wds_imagenetv2", pictures, [0, 1, 2], ["tench", "goldfish", "shark"], "test")
    training, tests = datasets.benchmark("imagenet", str(tmp_path))
    names = datasets.open_labelled(training).classnames
    groups = {name: datasets.open_test(path, names)[1] for name, path in tests.items()}
    assert groups == {"imagenet": None, "imagenet_v2": None, "imagenet_a": [[1], [2]]}


def test_broken_images_are_counted_and_replaced(in_process, tmp_path, images):
    import shutil

    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/class0/aaa.png").write_bytes(b"?")
    options = ["--encoder", "timm:resnet_emoji", "--data", tmp_path / "images", "--epochs", "1", "--workers", "0"]
    code, out, err = in_process("nmtune.train", *options, "--out", tmp_path / "run")
    assert code == 0 and "1 broken samples, replaced by their neighbours: 1 unreadable image" in out, err
    code, _, err = in_process("nmtune.train", *options, "--strict", "--out", tmp_path / "strict")
    assert code == 2 and "aaa.png" in err and one_sentence(err)
    for broken in ("cut", "no label"):
        folder = tmp_path / broken / "test"
        folder.mkdir(parents=True)
        (tmp_path / broken / "classnames.txt").write_text("a\n")
        if broken == "cut":
            (folder / "0.tar").write_bytes((SHARDS / "00000.tar").read_bytes()[:700])
        else:
            with tarfile.open(folder / "0.tar", "w") as tar:
                member = tarfile.TarInfo("x.png")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"?"))
        with pytest.raises(ValueError, match="cannot be read|no .cls|has no"):
            datasets.open_labelled(f"{tmp_path / broken}:test")


# -------------------------------------------------------------------------------------------------------------- study


def test_study_and_report(tmp_path, monkeypatch, capsys):
    """Two encoders of two seeds with random weights: what stands in the report was measured on them."""
    whole = encoder_study.open_labelled
    monkeypatch.setattr(encoder_study, "open_labelled", lambda spec: whole(spec).subset(np.arange(150)))
    for arm, noise in (("sup-00", 0.0), ("sup-30", 0.3)):
        for seed in (0, 1):
            cfg = dataclasses.replace(config.EMOJI_SUPERVISED, noise=noise, seed=seed)
            torch.manual_seed(seed + int(noise * 10))
            encoder, *_ = model.create_model(cfg, 98)
            folder = tmp_path / f"{arm}-seed{seed}"
            folder.mkdir()
            state = {
                "epoch": cfg.epochs,
                "seconds": 1.0,
                "noise": noise,
                "commit": "x",
                "config": dataclasses.asdict(cfg),
            }
            torch.save(state | {"state_dict": encoder.state_dict()}, folder / "checkpoint.pt")
            small = config.StudyConfig(encoder=str(folder), tasks=("group",), seeds=1, bank=2, epochs=1, batch_size=512)
            encoder_study.main(dataclasses.replace(small, device="cpu"))
    encoder_study.main(dataclasses.replace(small, device="cpu"))
    assert "nothing to do" in capsys.readouterr().out
    runs = tuple(str(path) for path in sorted(tmp_path.glob("sup-*")))
    evaluation.main(evaluation.Config(runs=runs, report=str(tmp_path / "results.json"), device="cpu"))
    shown, summary = capsys.readouterr().out, checkpoints.read_json(tmp_path / "results.json")
    assert summary["seeds"] == [0, 1] and list(summary["arms"]) == ["sup-00", "sup-30"]
    kept = checkpoints.read_json(tmp_path / "sup-30-seed1/study.json")["tasks"]["group"]
    assert summary["arms"]["sup-30"]["nmtune/ood"]["values"][1] == kept["nmtune/ood"][0]
    assert summary["arms"]["sup-30"]["noise"]["mean"] == pytest.approx(30)
    assert {"mlp/cov_id", "nmtune/top5_id", "sve_id@none", "lsvr_ood@sample+feature"} <= set(kept)
    c2 = next(claim for claim in summary["claims"] if claim["claim"] == "C2 30 % noise lowers LP OOD")
    difference = np.subtract(*(summary["arms"][arm]["lp/ood"]["values"] for arm in ("sup-30", "sup-00"))).mean()
    assert c2["here"].startswith(f"{difference:+.2f}") and "C4 NMTune above MLP, OOD (4 encoders)" in shown
    assert (tmp_path / "nmtune_noise.png").is_file() and (tmp_path / "nmtune_spectra.png").is_file()


def made_up(level: int, seed: int) -> dict[str, float]:
    """An encoder's numbers: accuracy falls with noise, spectra rise; NMTune is a point above MLP, MLP two above LP."""
    numbers = {"sve_id": 4 + 0.01 * level, "sve_ood": 4 + 0.02 * level, "lsvr_id": 3 + 0.01 * level, "noise": level}
    numbers["lsvr_ood"] = 3 + 0.02 * level + 0.001 * seed * level
    for part in ("id", "ood"):
        lp = 50 - 0.2 * level - 0.01 * seed * level
        numbers |= {f"lp/{part}": lp, f"mlp/{part}": lp + 2, f"nmtune/{part}": lp + 3 + 0.01 * seed}
    return numbers | {"mlp/cov_id": 9.0, "nmtune/cov_id": 8.0 + 0.1 * seed, "mlp/top5_id": 1.0, "nmtune/top5_id": 1.0}


def compared(arms: dict[str, list[dict[str, float]]]) -> study.Comparison:
    return study.Comparison(arms=arms, seeds=[0, 1, 2], folders={}, commits={"x"}, settings={})


def test_claims_are_differences_of_encoders_and_of_heads():
    arms = {f"sup-{level:02d}": [made_up(level, seed) for seed in (0, 1, 2)] for level in config.NOISE}
    rows = {row["claim"]: row for row in study.more_rows(compared(arms))}
    assert not [claim for claim in rows if "captions" in claim or "same views" in claim or "lambda" in claim]
    c1 = rows["C1 5-10 % noise raises LP ID over 0 %"]
    assert c1["here"].startswith("-1.58") and c1["verdict"] == "not reproduced"  # mean of 5 and 10 %: 7.5 * 0.21
    c2 = rows["C2 any noise (mean of 5-30 %) lowers LP OOD"]
    assert c2["here"].startswith("-3.41") and c2["verdict"] == "reproduced"
    assert rows["C3 30 % noise raises LSVR, OOD features"]["here"].startswith("+0.63")
    assert rows["C3 higher SVE goes with higher LP ID (correlation over levels)"]["here"].startswith("-1.00")
    c4 = rows["C4 NMTune above MLP, OOD (15 encoders)"]
    assert c4["here"].startswith("+1.01") and c4["verdict"] == "reproduced" and c4["paper"] == "about +1"
    assert rows["C4 the same at 30 % noise, ID (3 encoders)"]["here"].startswith("+1.010 ± ")
    covariance = rows["mechanism: NMTune's z has lower L_COV than MLP's, ID (15 encoders)"]
    assert covariance["here"].startswith("-0.90") and covariance["verdict"] == "reproduced"
    few = {arm: arms[arm] for arm in ("sup-05", "sup-30")}
    claims = [row["claim"] for row in study.more_rows(compared(few))]
    assert not [claim for claim in claims if claim.startswith(("C1", "C2", "C3"))] and len(claims) == 9
    with pytest.raises(ValueError, match="encoder folders such as sup-30-seed0, not vit-seedN"):
        study.more_rows(compared(arms | {"vit": arms["sup-00"]}))


def test_arms_are_encoders_at_each_noise_ratio():
    arms = [arm.name for arm in study.STUDY.chosen("core")]
    assert arms == ["sup-00", "sup-05", "sup-10", "sup-20", "sup-30", "clip-00", "clip-30"]
    assert len(study.STUDY.chosen("all")) == 10
    pretraining, tuning = (words[2:] for words in study.STUDY.words(study.STUDY.arms[-1], 1))
    out = "runs/nmtune/clip-30-seed1"
    assert pretraining == ["nmtune.pretrain", "emoji-clip-30", "--seed", "1", "--out", out]
    assert tuning == ["nmtune.encoder_study", "--encoder", out]


# ------------------------------------------------------------------------------------------------------- command lines

ERRORS = {
    "no data": ("train", ["nmtune"], "name one source of training data"),
    "paper preset without data": ("train", ["swin-l-nmtune"], "name one source of training data"),
    "two sources": ("train", ["--features", "x.npz", "--data", "y"], "--features and --data"),
    "missing features": ("train", ["--features", "no.npz"], "features file no.npz does not exist"),
    "no encoder": ("train", ["--data", "data/emoji:group:tune"], "--encoder is missing"),
    "missing data": ("train", ["--encoder", "timm:resnet_emoji", "--data", "/nowhere"], "/nowhere does not exist"),
    "unknown model": ("train", ["--encoder", "timm:resnet51", "--data", "data/emoji:group:tune"], "timm has no model"),
    "unknown source": ("train", ["--encoder", "clip:RN50", "--data", "data/emoji:group:tune"], "is neither timm:NAME"),
    "wrong part": ("train", ["--encoder", "timm:resnet_emoji", "--data", "data/emoji:group:val"], "the emoji sets are"),
    "a test without name": ("train", ["emoji-lp", "--tests", "x"], "--tests takes NAME=PATH"),
    "one view in a bank": ("train", ["emoji-mlp", "--bank", "1"], "--bank 1 has to be 0"),
    "a share of nothing": ("train", ["emoji-mlp", "--train-fraction", "0"], "--train-fraction 0.0 is a share"),
    "unknown benchmark": ("train", ["in1k-rn50-lp", "--benchmark", "mnist"], "--benchmark is one of cifar10"),
    "pre-training without data": ("pretrain", ["in1k-rn50-30"], "--data is missing: it takes labelled images"),
    "CLIP without data": ("pretrain", ["yfcc15m-rn50-30"], "--data is missing: it takes image-text shards"),
    "missing shard": ("pretrain", ["yfcc15m-rn50-30", "--data", "/nowhere/{0..3}.tar"], "shard /nowhere/0.tar does"),
    "noise above one": ("pretrain", ["emoji-sup-30", "--noise", "30"], "--noise 30.0 is a share"),
    "unknown CLIP": ("pretrain", ["emoji-clip-30", "--model", "RN51"], "open_clip has no model 'RN51'"),
    "fine-tuning without encoder": ("finetune", ["full"], "--encoder is missing"),
    "LoRA without blocks": (
        "finetune",
        ["emoji-lora", "--encoder", "timm:resnet_emoji"],
        "has no MLP blocks for LoRA",
    ),
    "study of nothing": ("encoder_study", ["--encoder", "/nowhere"], "no checkpoint at /nowhere/checkpoint.pt"),
    "report of other runs": ("eval", ["/nowhere/x", "--report", "r.json"], "encoder folders such as sup-30-seed0"),
    "nothing to evaluate": ("eval", [], "name at least one run folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tmp_path, case):
    script, arguments, message = ERRORS[case]
    out = ["--out", tmp_path / "run"] if script not in ("encoder_study", "eval") else []
    code, _, err = in_process(f"nmtune.{script}", *arguments, *out)
    assert code == 2 and message in err and one_sentence(err), err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("arguments", [["nmtune", "--lerning-rate", "1"], ["nmtune", "--lr", "fast"], ["imagenet"], []])
def test_wrong_flags(in_process, arguments):
    code, _, err = in_process("nmtune.train", *arguments)
    assert code == 2 and "Traceback" not in err


def test_run_folders_of_other_runs_are_refused(in_process, features_file, tmp_path):
    command = ["--features", features_file, "--epochs", "1", "--out", tmp_path / "run"]
    assert in_process("nmtune.train", *command)[0] == 0
    code, _, err = in_process("nmtune.train", *command, "--lr", "1e-4")
    assert code == 2 and "lr (was 0.001, now 0.0001)" in err and one_sentence(err)


@pytest.mark.parametrize("script, presets", [("train", config.PRESETS), ("finetune", config.FINETUNE_PRESETS)])
def test_dry_runs(in_process, script, presets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    for preset in presets:
        if (
            script == "train"
            and preset.partition("-")[0] in ("convnext", "efficientnet", "bit", "vit")
            or preset.startswith("swin-l-m")
        ):
            continue  # their heads are those of swin-l
        code, out, err = in_process(f"nmtune.{script}", preset, "--dry-run")
        assert code == 0 and err == "" and not list(tmp_path.iterdir())
        assert re.search(r"^steps +[\d,]+ ", out, re.MULTILINE) and re.search(r"^samples +[\d,]+ an epoch", out, re.M)
        assert re.search(r"^parameters +[\d,]+ tuned", out, re.M) and re.search(r"memory estimate +\d.*GiB", out)
        assert len(re.findall("learning rate", out)) == 3


@pytest.mark.parametrize("preset", ["emoji-sup-30", "emoji-clip-05", "in1k-rn50-20", "yfcc15m-rn50-10"])
def test_dry_runs_of_pretraining(in_process, preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = in_process("nmtune.pretrain", preset, "--dry-run")
    assert code == 0 and not list(tmp_path.iterdir())
    assert all(word in out for word in ("parameters", "learning rate", "memory estimate", "noise"))
    if preset == "yfcc15m-rn50-10":
        assert re.search(r"steps +120,256 \(3,758 an epoch\)", out) and "769,442 swaps" in out


def test_five_noise_levels_are_presets():
    for name in ("emoji-sup", "emoji-clip", "in1k-rn50", "yfcc15m-rn50"):
        levels = [config.PRETRAIN_PRESETS[f"{name}-{level:02d}"][1].noise for level in (0, 5, 10, 20, 30)]
        assert levels == [0, 0.05, 0.1, 0.2, 0.3]


@pytest.mark.parametrize("name", ["PretrainConfig", "Config", "FinetuneConfig", "StudyConfig"])
def test_every_field_has_a_docstring(name):
    tree = ast.parse(Path(config.__file__).read_text())
    assert any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name):
        for field, text in zip(cls.body, cls.body[1:] + [None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), (
                    f"{cls.name}.{field.target.id}"
                )
    assert finetune.LORA_TARGETS.keys() == {"timm", "open_clip"}
