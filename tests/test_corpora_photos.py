"""Corpora of photographs: small made-up files in the published layouts, built, and read back like in training."""

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from photographs import contents, photograph, read_manifest, read_set
from PIL import Image

from shared import cli, data, evalsets, tars
from studies.corpora import photos

# ------------------------------------------------------------------------------------------------------------ Flickr8k


@pytest.fixture
def flickr8k(tmp_path: Path) -> Path:
    """Photographs 1_a to 9_a with 2 captions each: 5 for training, 2 for development, 2 for test; Multi30k lacks number
    9."""
    root = tmp_path / "flickr8k"
    names = [f"{i}_a.jpg" for i in range(1, 10)]
    for name in names:
        photograph(root / "Images" / name)
    english = [f"{name}#{k}\tA  photograph of {name[0]} , {k} .\n" for name in names for k in range(2)]
    (root / "Flickr8k.token.txt").write_text("".join(english))
    (root / "Flickr8k.arabic.full.txt").write_text("".join(f"{name}#0\tصورة {name[0]}\n" for name in names[:8]) + "ب\n")
    for split, some in (("train", names[:5]), ("dev", names[5:7]), ("test", names[7:])):
        (root / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{name}\n" for name in some))
    other = tmp_path / "multi30k"
    (other / "image_splits").mkdir(parents=True)
    (other / "raw").mkdir()
    for split, some in (("train", "1237"), ("val", "46"), ("test_2016_flickr", "58")):
        (other / f"image_splits/{split}.txt").write_text("".join(f"{number}.jpg\n" for number in some))
        for language in photos.LANGUAGES:
            lines = "".join(f"{language} {number}\n" for number in some)
            (other / f"raw/{split}.{language}.gz").write_bytes(gzip.compress(lines.encode()))
    return root


def build_flickr8k(root: Path, out: str = "out", **options) -> Path:
    photos.Flickr8k(root, root.parent / out, multi30k=root.parent / "multi30k", **options).build()
    return root.parent / out


def test_flickr8k(flickr8k: Path) -> None:
    out = build_flickr8k(flickr8k)
    pairs = data.open_pairs(str(out / "train"))
    assert [pairs.caption(row) for row in range(5)] == [f"A photograph of {i} , 0 ." for i in range(1, 6)]
    content = dict(tars.read_tar(out / "train/00000.tar", []))
    assert content["000000001.jpg"] == (flickr8k / "Images/2_a.jpg").read_bytes(), "bytes as they are"
    about = json.loads(content["000000001.json"])
    assert about["file"] == "2_a.jpg" and about["captions"] == ["A photograph of 2 , 0 .", "A photograph of 2 , 1 ."]
    assert about["captions_ar"] == ["صورة 2"] and about["captions_multi30k_de"] == ["de 2"]
    texts = {folder.name: [texts for _, _, texts in read_set(folder)] for folder in (out / "eval").iterdir()}
    assert texts["retrieval_en"] == [[f"A photograph of {i} , {k} ." for k in range(2)] for i in (8, 9)]
    assert texts["retrieval_long_en"][0] == ["A photograph of 8 , 0. A photograph of 8 , 1."]
    assert texts["retrieval_ar"] == [["صورة 8ب"]], "a line without a name goes on with the last caption"
    for language in photos.LANGUAGES:
        assert texts[f"retrieval_multi30k_{language}"] == [[f"{language} 8"]]
        assert texts[f"retrieval_dev_multi30k_{language}"] == [[f"{language} 6"], [f"{language} 7"]]
    counts = read_manifest(out)["counts"]
    assert counts["train"] == 5 and counts["joined_lines"] == 1 and counts["broken"] == 0
    assert "non-commercial" in read_manifest(out)["licence"]
    assert set(read_manifest(out)["sha256"]) == {name for name in contents(out) if name.endswith(".tar")}


def test_flickr8k_without_translations_and_with_every_caption(flickr8k: Path) -> None:
    (flickr8k / "Flickr8k.arabic.full.txt").unlink()
    out = flickr8k.parent / "out"
    photos.Flickr8k(flickr8k, out, every_caption=True).build()
    assert {folder.name for folder in (out / "eval").iterdir()} == {
        "retrieval_en", "retrieval_long_en", "retrieval_dev_en", "retrieval_dev_long_en",
    }  # fmt: skip
    pairs = data.open_pairs(str(out / "train"))
    assert len(pairs) == 10 and pairs.caption(3) == "A photograph of 2 , 1 ."
    assert read_manifest(out)["counts"]["photographs"] == 5


def test_the_same_bytes_again_and_a_finished_folder_is_left(flickr8k: Path, monkeypatch, capsys) -> None:
    first, second = (build_flickr8k(flickr8k, out) for out in ("one", "two"))
    assert contents(first) == contents(second)
    monkeypatch.setattr(photos.Flickr8k, "write", lambda *_: pytest.fail("built again"))
    build_flickr8k(flickr8k, "one")
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"image_size \(was None, now 8\)"):
        build_flickr8k(flickr8k, "one", image_size=8)
    photograph(flickr8k / "Images/1_a.jpg", 30, 30)
    with pytest.raises(ValueError, match="other settings: files"):
        build_flickr8k(flickr8k, "one")


def test_resized_to_the_shorter_side(flickr8k: Path) -> None:
    photograph(flickr8k / "Images/3_a.jpg", 6, 9)
    out = build_flickr8k(flickr8k, image_size=8)
    sizes = [data.open_pairs(str(out / "train")).read(row).image.size for row in range(5)]
    assert sizes == [(10, 8), (10, 8), (6, 9), (10, 8), (10, 8)], "smaller ones stay as they are"
    content = dict(tars.read_tar(out / "train/00000.tar", []))
    assert content["000000002.jpg"] == (flickr8k / "Images/3_a.jpg").read_bytes()


def test_broken_photographs_are_counted_and_reported(flickr8k: Path, capsys) -> None:
    whole = (flickr8k / "Images/2_a.jpg").read_bytes()
    (flickr8k / "Images/2_a.jpg").write_bytes(whole[: len(whole) // 2])
    (flickr8k / "Images/9_a.jpg").unlink()
    out = build_flickr8k(flickr8k, out="out")
    manifest = read_manifest(out)
    assert manifest["counts"]["broken"] == 2 and manifest["counts"]["train"] == 4
    assert manifest["counts"]["photographs"] == 4, "those that were written"
    assert manifest["broken"]["Images/9_a.jpg"] == "missing image" and "Images/2_a.jpg" in manifest["broken"]
    assert "2 broken samples, left out: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--strict: .*2_a\.jpg: unreadable image"):
        build_flickr8k(flickr8k, out="strict", strict=True)


def test_what_is_missing_is_named(flickr8k: Path) -> None:
    def refused(error: type, sentence: str, **options) -> None:
        with pytest.raises(error, match=sentence):
            photos.Flickr8k(flickr8k, flickr8k.parent / "out", **options).build()
        assert not (flickr8k.parent / "out").exists()

    refused(ValueError, "--image-size must be at least 1", image_size=0)
    other = flickr8k.parent / "multi30k"
    raw = other / "raw"
    (raw / "val.fr.gz").write_bytes(gzip.compress(b"one line\n"))
    refused(ValueError, r"val\.fr\.gz has 1 lines .* 2 names", multi30k=other)
    (raw / "val.fr.gz").write_bytes(b"plain text")
    refused(ValueError, r"val\.fr\.gz is no gzipped UTF-8 text", multi30k=other)
    damaged = bytearray(gzip.compress(np.random.default_rng(0).bytes(1000)))
    damaged[10] = 0xFF  # a reserved kind of block
    (raw / "val.fr.gz").write_bytes(damaged)
    refused(ValueError, r"val\.fr\.gz is no gzipped UTF-8 text", multi30k=other)
    (raw / "val.fr.gz").unlink()
    refused(ValueError, r"val\.fr\.gz is missing", multi30k=other)
    split = flickr8k / "Flickr_8k.testImages.txt"
    for text, sentence in {
        "\n\n": "names no photographs",
        f"8_a.jpg\n{flickr8k}/Images/9_a.jpg\n": "names the photograph '/.*9_a.jpg'",
        "../Images/9_a.jpg\n": r"names the photograph '\.\./Images/9_a\.jpg'",
        "9_a.jpg\n8_a.jpg\n9_a.jpg\n": r"names the photograph 9_a\.jpg twice",
    }.items():
        split.write_text(text)
        refused(ValueError, rf"Flickr_8k\.testImages\.txt {sentence}")
    split.write_text("8_a.jpg\n3_a.jpg\n")
    refused(ValueError, r"testImages\.txt .*3_a\.jpg .*train")
    split.write_text("77_a.jpg\n")
    refused(ValueError, r"no caption of 77_a\.jpg")
    (flickr8k / "Flickr8k.token.txt").write_text("1_a.jpg,A caption\n")
    refused(ValueError, r"Flickr8k\.token\.txt does not begin")
    (flickr8k / "Flickr8k.token.txt").unlink()
    refused(ValueError, r"Flickr8k\.token\.txt is missing")


def test_photographs_without_a_known_ending_are_broken(flickr8k: Path) -> None:
    Image.open(flickr8k / "Images/1_a.jpg").save(flickr8k / "Images/1_a.bmp")
    (flickr8k / "Images/2_a.jpg").rename(flickr8k / "Images/2_a")
    for file in flickr8k.glob("*.txt"):
        text = file.read_text(encoding="utf-8").replace("1_a.jpg", "1_a.bmp").replace("2_a.jpg", "2_a")
        file.write_text(text, encoding="utf-8")
    manifest = read_manifest(build_flickr8k(flickr8k))
    assert set(manifest["broken"]) == {"Images/1_a.bmp", "Images/2_a"} and manifest["counts"]["photographs"] == 3
    assert manifest["broken"]["Images/2_a"] == "its name ends in none of jpg, jpeg, png, webp"


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system refuses the name")
def test_a_name_that_is_not_utf8(flickr8k: Path) -> None:
    Path(os.fsdecode(os.fsencode(flickr8k / "Images") + b"/\xff.jpg")).write_bytes(b"")
    with pytest.raises(ValueError, match="udcff.jpg' is not UTF-8"):
        build_flickr8k(flickr8k)


# ------------------------------------------------------------------------------------------------------ PACS, CIFAR-10


def test_pacs(tmp_path: Path) -> None:
    for domain in photos.PACS.domains:
        for name, count in (("dog", 5), ("guitar", 11)):
            for i in range(count):
                photograph(tmp_path / f"PACS/{domain}/{name}/pic_{i:03d}.jpg")
    (tmp_path / "PACS/sketch/dog/pic_004.jpg").write_bytes(b"no image")
    photos.PACS(tmp_path, tmp_path / "out").build()
    out, counts = tmp_path / "out", read_manifest(tmp_path / "out")["counts"]
    assert counts["train/photo"] == 13 and counts["photo/test"] == 3 and counts["broken"] == 1
    assert list(read_manifest(out)["broken"]) == ["PACS/sketch/dog/pic_004.jpg"]
    for domain in photos.PACS.domains:
        parts = [read_set(out / f"eval/{domain}", split) for split in ("train", "test")]
        images = [{image.tobytes() for _, image, _ in part} for part in parts]
        assert not images[0] & images[1]
        everything = read_set(out / f"eval/{domain}_all")
        assert {image.tobytes() for _, image, _ in everything} == images[0] | images[1]
        known = evalsets.EvalSet(out / f"eval/{domain}_all", np.asarray)
        assert known.classnames == ["dog", "guitar"] and len(known.templates) == 4
    assert [label for _, _, label in read_set(out / "eval/photo")] == [0, 1, 1]
    pairs = data.open_pairs(str(out / "train/{photo,art_painting}-00000.tar"))
    assert len(pairs) == 26 and {pairs.caption(row) for row in range(26)} == {"dog", "guitar"}
    photograph(tmp_path / "PACS/photo/horse/pic_000.jpg")
    with pytest.raises(ValueError, match="photo and art_painting has horse"):
        photos.PACS(tmp_path, tmp_path / "other").build()
    with pytest.raises(ValueError, match="PACS/photo is missing"):
        photos.PACS(tmp_path / "PACS", tmp_path / "other").build()


def test_cifar10(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for name in photos.CIFAR10.classes:
            for i in range(count):
                photograph(tmp_path / f"{split}/{name}/{i:04d}.png")
    photos.CIFAR10(tmp_path, tmp_path / "out").build()
    test, train = (read_set(tmp_path / "out/eval/cifar10", split) for split in ("test", "train"))
    assert [label for _, _, label in test] == sorted(list(range(10)) * 2) and len(train) == 30
    known = evalsets.EvalSet(tmp_path / "out/eval/cifar10", np.asarray)
    assert known.classnames[:2] == ["airplane", "automobile"] and "a blurry photo of the {c}." in known.templates
    pairs = data.open_pairs(str(tmp_path / "out/train"))
    captions = [pairs.caption(row) for row in range(len(pairs))]
    assert sorted(captions) == sorted(list(photos.CIFAR10.classes) * 3) and captions != sorted(captions)
    (tmp_path / "train/cat").rename(tmp_path / "train/kitten")
    with pytest.raises(ValueError, match="airplane.*kitten"):
        photos.CIFAR10(tmp_path, tmp_path / "other").build()
    (tmp_path / "train/kitten").rename(tmp_path / "train/cat")
    (tmp_path / "test/dog").rename(tmp_path / "test/d\nog")
    with pytest.raises(ValueError, match="test has the classes .*d og, "):
        photos.CIFAR10(tmp_path, tmp_path / "other").build()
    (tmp_path / "test/d\nog").rename(tmp_path / "test/dog")
    for file in (tmp_path / "test/dog").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="test/dog holds no photographs"):
        photos.CIFAR10(tmp_path, tmp_path / "other").build()
    for file in (tmp_path / "test").rglob("*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"test holds no <class>/\*\.jpg"):
        photos.CIFAR10(tmp_path, tmp_path / "other").build()


# ---------------------------------------------------------------------------------------------------------------- COCO

SQUARE = [[2.0, 2.0, 10.0, 2.0, 10.0, 8.0, 2.0, 8.0]]  # columns 2 to 9, rows 2 to 7


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    categories = [{"id": 3, "name": "car"}, {"id": 1, "name": "per\nson"}, {"id": 17, "name": "cat"}]
    for split in ("train", "val"):
        images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 20, "height": 16} for i in (7, 8, 9)]
        for image in images:
            photograph(tmp_path / f"{split}2017/{image['file_name']}", 10, 8)
        texts = [{"id": 10 * i + k, "image_id": i, "caption": f"{i} in\n{split}, {k}"} for i in (9, 7) for k in (1, 0)]
        crowd = {"counts": [16 * 15, 16 * 5], "size": [16, 20]}  # the last five columns
        small = {"id": 1, "category_id": 17, "segmentation": [[4, 4, 6, 4, 6, 6, 4, 6]], "area": 4, "iscrowd": 0}
        large = {"id": 2, "category_id": 3, "segmentation": SQUARE, "area": 48, "iscrowd": 0}
        many = {"id": 3, "category_id": 1, "segmentation": crowd, "area": 80, "iscrowd": 1}
        instances = [one | {"image_id": 7} for one in (small, large, many)]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        captions = {"images": images, "annotations": texts}
        (tmp_path / f"annotations/captions_{split}2017.json").write_text(json.dumps(captions))
        objects = {"images": images, "annotations": instances, "categories": categories}
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(objects))
    return tmp_path


def test_coco(coco: Path) -> None:
    photos.COCO(coco, coco / "out", train_masks=True).build()
    pairs = data.open_pairs(str(coco / "out/train"))
    assert [pairs.caption(row) for row in range(len(pairs))] == ["7 in train, 0", "9 in train, 0"]
    (_, about), *_ = tars.descriptions([str(coco / "out/train/00000.tar")])
    assert about["captions"] == ["7 in train, 0", "7 in train, 1"] and about["image_id"] == 7
    assert [texts for _, _, texts in read_set(coco / "out/eval/retrieval_val")] == [
        ["7 in val, 0", "7 in val, 1"], ["9 in val, 0", "9 in val, 1"]
    ]  # fmt: skip
    for split in ("train", "val"):
        folder = coco / f"out/eval/patchdis_{split}"
        assert (folder / "classnames.txt").read_text() == "per son\ncar\ncat\n"
        assert [file.name for file in (folder / "masks").iterdir()] == ["000000000007.png"]
        mask = np.asarray(Image.open(folder / "masks/000000000007.png"))
        expected = np.full((16, 20), 255)
        expected[2:8, 2:10] = 1
        expected[4:6, 4:6] = 2
        assert mask.dtype == np.uint8 and np.array_equal(mask, expected), "smaller ones in front; a crowd has no class"
        image = folder / "images/000000000007.jpg"
        assert image.read_bytes() == (coco / f"{split}2017/000000000007.jpg").read_bytes()


def test_instance_masks() -> None:
    mask = photos.instance_mask(SQUARE, 16, 20)
    assert mask[2:8, 2:10].all() and mask.sum() == 48
    triangle = photos.instance_mask([[0, 0, 10, 0, 0, 10]], 10, 10)
    assert abs(triangle.sum() - 50) <= 5 and not triangle[9, 9]
    assert photos.instance_mask([[-5, -5, 30, -5, 30, 30, -5, 30]], 8, 9).all(), "cut at the border"
    lengths = photos.instance_mask({"counts": [1, 2, 3]}, 2, 3)
    assert np.array_equal(lengths, [[False, True, False], [True, False, False]])
    for segmentation, sentence in (
        ({"counts": "abc"}, "compressed run lengths"),
        ({"counts": [10**12, 10**12]}, "2000000000000 pixels"),
        ([[0, 0, 2, 0, 2, float("nan")]], "no number"),
    ):
        with pytest.raises(ValueError, match=sentence):
            photos.instance_mask(segmentation, 2, 3)


def test_coco_files_that_are_others(coco: Path) -> None:
    file = coco / "annotations/captions_val2017.json"
    file.write_text(json.dumps({"images": [], "annotations": [{"id": 1}]}))
    with pytest.raises(ValueError, match=r"captions_val2017\.json lacks annotations"):
        photos.COCO(coco, coco / "out").build()
    objects = coco / "annotations/instances_val2017.json"
    for old, new, sentence in (
        ('"category_id": 3', '"category_id": 4', r"instances_val2017\.json .*category 4"),
        ('"height"', '"hight"', r"instances_val2017\.json lacks images"),
        ("[[2.0, ", "[[", "instance 2 .*20 x 16"),
        ('"area": 48', '"area": "48"', r"instances_val2017\.json lacks annotations"),
        ('"height": 16', '"height": 1000000000', "20 x 1000000000 .*000000000007.jpg"),
        ('"000000000008.jpg"', '"000000000007.jpg"', "names the photograph 000000000007.jpg twice"),
        ('"000000000008.jpg"', '"../a.jpg"', r"'\.\./a\.jpg'"),
    ):
        texts = [path.read_text() for path in (file, objects)]
        file.write_text((coco / "annotations/captions_train2017.json").read_text())
        objects.write_text(texts[1].replace(old, new))
        with pytest.raises(ValueError, match=sentence):
            photos.COCO(coco, coco / "out").build()
        for path, text in zip((file, objects), texts, strict=True):
            path.write_text(text)
    captions = json.loads((coco / "annotations/captions_train2017.json").read_text())
    captions["annotations"][0]["caption"] = "half \ud800"
    file.write_text(json.dumps(captions))
    with pytest.raises(ValueError, match=r"captions_val2017\.json .*'half \\ud800'"):
        photos.COCO(coco, coco / "out").build()
    file.write_text("no JSON")
    with pytest.raises(ValueError, match=r"captions_val2017\.json holds no JSON"):
        photos.COCO(coco, coco / "out").build()
    file.unlink()
    with pytest.raises(ValueError, match=r"captions_val2017\.json is missing"):
        photos.COCO(coco, coco / "out").build()
    assert not (coco / "out").exists()


def test_wrong_calls_exit_2_with_one_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["photos", "pacs", "--root", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.command_line(photos.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1 and "PACS has" in said


def test_none_of_the_photographs_can_be_read(flickr8k: Path) -> None:
    for file in (flickr8k / "Images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 5 photographs"):
        build_flickr8k(flickr8k)
    assert not (flickr8k.parent / "out").exists()
