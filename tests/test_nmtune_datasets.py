"""Label and caption noise, layouts of image sets, and the paper's sets."""

import io
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from nmtune_runs import corpus, images, in_process, one_sentence  # noqa: F401
from scripts import SHARDS

from nmtune import datasets
from nmtune.datasets import swap_captions
from shared import index


def test_swapping_never_loses_a_caption_and_moves_fewer_than_twice_the_swaps():
    source = swap_captions(2000, 300, random.Random(0))
    assert sorted(source) == list(range(2000))
    assert (source != np.arange(2000)).mean() == pytest.approx(1 - np.exp(-0.3), abs=0.02)


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
    with pytest.raises(ValueError, match="not trained"):
        datasets.open_test(str(images), ["class0", "class1"])
    for trained in (list("abcd"), [f"class{i}" for i in (1, 2, 3, 4)]):  # as many other classes: the order says nothing
        with pytest.raises(ValueError, match="'class0'"):
            datasets.open_test(str(images), trained)
    for trained in ([f"n0{i}" for i in range(4)], list("0123")):  # names of another kind are in the same order
        assert datasets.open_test(str(images), trained)[1] is None
    (images / "groups.json").write_text("[[0, 1], [1], [0], [1]]")
    assert datasets.open_test(str(images), ["a", "b"])[1][0] == [0, 1]
    for wrong in ("[[0], [1]]", "[[0], [1], [9], [0]]", "[[0], [1], [], [0]]", "{}"):
        (images / "groups.json").write_text(wrong)
        with pytest.raises(ValueError, match="groups.json .*4 classes"):
            datasets.open_test(str(images), ["a", "b"])
    (images / "groups.json").unlink()


def test_a_missing_shard_is_named(tmp_path):
    folder = tmp_path / "set"
    shutil.copytree("data/emoji/eval/groups_id", folder)
    (folder / "test/nshards.txt").write_text("3\n")
    with pytest.raises(ValueError, match="nshards.txt says 3"):
        datasets.open_labelled(f"{folder}:test")


def test_folders_that_are_no_classes_give_no_names(tmp_path, images):
    pictures = sorted((images / "class0").iterdir())[:4]
    (images / "list.txt").write_text("".join(f"class0/{p.name} {i % 2}\n" for i, p in enumerate(pictures)))
    assert datasets.open_labelled(str(images / "list.txt")).classnames == ["0", "1"]
    (images / "list.txt").unlink()


def test_objectnet_and_vid_robust(tmp_path):
    picture = datasets.open_labelled("data/emoji/eval/groups_ood:test").read(0)[0]
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


def test_the_index_of_tars_is_kept_and_images_are_read_alone(tmp_path, images, monkeypatch):
    """The index is built once per machine, and again after a tar changes; a sample costs one read of its bytes."""
    source = datasets.open_labelled(str(images))
    pictures, labels = zip(*(source.read(row) for row in range(len(source))), strict=True)
    webdataset(tmp_path / "set", pictures, labels, source.classnames, "train")
    monkeypatch.setattr(index, "LARGE", 1)
    monkeypatch.setattr(datasets, "SMALL", 0)
    made, whole = [], datasets.labelled_index
    monkeypatch.setattr(datasets, "labelled_index", lambda tars: made.append(1) or whole(tars))
    first = datasets.open_labelled(f"{tmp_path}/set:train", tmp_path / "cache")
    again = datasets.open_labelled(f"{tmp_path}/set:train", tmp_path / "cache")
    assert len(made) == 1 and again.labels.tolist() == list(labels) and again.fingerprint == first.fingerprint
    rchar = lambda: int(Path("/proc/thread-self/io").read_text().split("rchar: ")[1].split()[0])  # noqa: E731
    again.read(0)
    before, nothing = rchar(), rchar()
    for row in range(len(again)):
        assert list(again.read(row)[0].getdata()) == list(pictures[row].getdata())
    used = again.spans[:, 2].sum()
    assert used <= rchar() - nothing <= used + 2 * (nothing - before)  # the file that counts is read, too
    webdataset(tmp_path / "new", pictures[:5], labels[:5], source.classnames, "train")
    (tmp_path / "new/train/0.tar").replace(tmp_path / "set/train/0.tar")
    assert len(datasets.open_labelled(f"{tmp_path}/set:train", tmp_path / "cache")) == 5 and len(made) == 2


def test_image_folders_are_walked_once_a_machine(tmp_path, images, monkeypatch):
    """The list is built once per machine, and again when a class folder gets a new file, at any depth."""
    root, cache = tmp_path / "set", tmp_path / "cache"
    shutil.copytree(images, root)
    (root / "class1/deeper").mkdir()
    shutil.copy(next((root / "class1").glob("*.png")), root / "class1/deeper/z.png")
    plain = datasets.image_folder(root)
    monkeypatch.setattr(datasets, "LARGE_FOLDERS", 0)
    made, whole = [], datasets.walked
    monkeypatch.setattr(datasets, "walked", lambda folders: made.append(1) or whole(folders))
    for _ in range(3):
        found = datasets.open_labelled(str(root), cache)
        assert list(found.files) == list(plain.files) and found.fingerprint == plain.fingerprint
        assert found.labels.tolist() == plain.labels.tolist() and found.read(5)[0].size == plain.read(5)[0].size
    assert len(made) == 1 and isinstance(found.files.text, np.memmap) and len(found.subset(np.arange(3))) == 3
    for place in ("class1/deeper", "class2"):
        shutil.copy(root / "class1/deeper/z.png", root / place / "new.png")
        assert len(datasets.open_labelled(str(root), cache)) == len(plain) + len(made) - 1
    assert len(made) == 3


@pytest.mark.parametrize("name", datasets.ID_SETS)
@pytest.mark.parametrize("layout", ["vtab-", "", "folders"])
def test_the_fourteen_sets_of_in_domain_transfer(tmp_path, images, name, layout):
    with pytest.raises(ValueError, match=f"{name} --root .*wds_.*image folders"):
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
        ("imagenet", "CLASS/.* webdataset"),
    ):
        with pytest.raises(ValueError, match=f"--benchmark {name} --root .*{wanted}"):
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
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/class0/aaa.png").write_bytes(b"?")
    options = ["--encoder", "timm:resnet_emoji", "--data", tmp_path / "images", "--epochs", "1", "--workers", "0"]
    code, out, err = in_process("nmtune.train", *options, "--out", tmp_path / "run")
    assert code == 0 and "1 broken sample, left out or replaced: 1 unreadable image" in out, err
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


def test_training_splits_of_vtabs_sets(tmp_path, images):
    """VTAB's sets are tuned on trainval, or on train and val; other sets on train."""
    source = datasets.open_labelled(str(images))
    pictures, names = [source.read(row)[0] for row in (0, 13, 40)], ["a", "b", "c"]
    for name in ("eurosat", "cifar10"):
        folder = tmp_path / f"wds_vtab-{name}"
        for split in ("train", "val", "test"):
            webdataset(folder, pictures, [0, 1, 2], names, split)
        training, tests = datasets.benchmark(name, str(tmp_path))
        assert training == f"{folder}:{'train+val' if name == 'eurosat' else 'train'}" and tests == {
            name: f"{folder}:test"
        }
        found = datasets.open_labelled(training)
        assert len(found) == (6 if name == "eurosat" else 3) and len(set(found.keys.tolist())) == len(found)
    assert found.read(2)[1] == 2
    webdataset(tmp_path / "wds_vtab-eurosat", pictures, [0, 1, 2], names, "trainval")
    assert datasets.benchmark("eurosat", str(tmp_path))[0].endswith("wds_vtab-eurosat:trainval")
    with pytest.raises(ValueError, match="nothing holds no .tar file"):
        datasets.open_labelled(f"{tmp_path}/wds_vtab-eurosat:train+nothing")


def test_asymmetric_noise_agrees():
    labels = np.arange(600) % 6
    noisy = datasets.flip_labels(labels, 6, 0.3, np.random.RandomState(0), asymmetric=True)
    wrong = noisy != labels
    assert wrong.sum() == 180 and (noisy[wrong] == (labels[wrong] + 1) % 6).all()
    symmetric = datasets.flip_labels(labels, 6, 0.3, np.random.RandomState(0))
    assert ((symmetric != labels) == wrong).all()  # the same samples
