"""Packing a user's own pictures: small made-up folders and tables, read back like in training and evaluation."""

import json
import os
import re
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from photographs import contents, photograph, read_manifest, read_set
from PIL import Image
from scripts import one_sentence

from shared import cli, data, evalsets, layout, pack, tars


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten pictures, two of them in a subfolder, and captions.csv with two captions for each of the first three."""
    root = tmp_path / "photos"
    names = [*(f"{i}.jpg" for i in range(8)), "more/8.png", "more/9.JPEG"]
    for name in names:
        photograph(root / name)
    rows = [f"{name},picture {i},of {i}" for i, name in enumerate(names)]
    rows[2:2] = [f'{name}," the  same ""picture"", {i} ",and {i}' for i, name in enumerate(names[:2])]
    rows.append("./more/../2.jpg,2 again,and 2")
    write(root / "captions.csv", "image,caption,source", *rows)
    return root


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def samples(folder: Path) -> list[dict[str, bytes]]:
    """Samples of a folder's shards in order, as {ending: content} with the key as `key`."""
    found: dict[str, dict] = {}
    for shard in sorted(folder.glob("*.tar")):
        for name, content in tars.read_tar(shard, []):
            key, ending = tars.key_of(name)
            found.setdefault(key, {"key": key})[ending] = content
    return list(found.values())


def about(folder: Path) -> list[dict]:
    return [json.loads(sample["json"]) for sample in samples(folder)]


# -------------------------------------------------------------------------------------------------------------- pairs


def test_every_caption_of_a_table_is_a_sample(photos: Path, capsys) -> None:
    out = photos.parent / "out"
    pack.Pairs(photos / "captions.csv", out).build()
    assert read_manifest(out)["counts"] == {"pictures": 10, "captions": 13, "samples": 13, "broken": 0}
    assert f"--data {out}/train" in capsys.readouterr().out
    pairs = data.open_pairs(str(out / "train"))
    first = [pairs.caption(row) for row in range(6)]
    assert first == ["picture 0", 'the same "picture", 0', "picture 1", 'the same "picture", 1', "picture 2", "2 again"]
    kept = samples(out / "train")
    assert kept[1]["jpg"] == (photos / "0.jpg").read_bytes(), "bytes as they are"
    assert [set(sample) for sample in kept[-2:]] == [{"key", "png", "txt", "json"}, {"key", "jpg", "txt", "json"}]
    assert about(out / "train")[5] == {
        "key": "000000005", "caption": "2 again", "file": "2.jpg", "captions": ["picture 2", "2 again"],
        "source": "and 2",
    }  # fmt: skip
    assert about(out / "train")[-2]["file"] == "more/8.png"


def test_the_first_caption_alone(photos: Path) -> None:
    pack.Pairs(photos / "captions.csv", photos.parent / "out", every_caption=False).build()
    found = about(photos.parent / "out/train")
    assert [each["caption"] for each in found] == [f"picture {i}" for i in range(10)]
    assert found[2]["captions"] == ["picture 2", "2 again"]
    counts = read_manifest(photos.parent / "out")["counts"]
    assert counts == {"pictures": 10, "captions": 13, "samples": 10, "broken": 0}


def test_other_tables(photos: Path) -> None:
    """JSON lines, tabs, other column names, another folder."""
    texts = {"0.jpg": ["a", "b"], "1.jpg": ["c"]}
    lines = [json.dumps({"image": name, "caption": some, "tags": ["x", 1]}) for name, some in texts.items()]
    write(photos / "a.jsonl", lines[0], "", lines[1])
    write(photos / "c.tsv", "path\ttitle", '0.jpg\t"a "b', '"0.jpg"\t"b"', '1.jpg\t"say ""c"""')
    write(photos.parent / "elsewhere/d.csv", "n,image,caption", "x,0.jpg,a", "y,0.jpg,b", "z,1.jpg,c")
    (photos / "e.csv").write_bytes("\ufeffcaption,image\r\na,0.jpg\r\nb,0.jpg\r\nc,1.jpg\r\n".encode())
    write(photos / "f.jsonl", '{"path": "0.jpg", "text": "a"}', '{"path": "1.jpg", "text": ["b", "c"]}')

    def captions(name: str, **options) -> list[str]:
        out = photos.parent / f"out-{name.replace('/', '-')}"
        pack.Pairs((photos / name).resolve(), out, **options).build()
        pairs = data.open_pairs(str(out / "train"))
        return [pairs.caption(row) for row in range(len(pairs))]

    assert captions("a.jsonl") == captions("e.csv") == ["a", "b", "c"]
    assert about(photos.parent / "out-a.jsonl/train")[0]["tags"] == ["x", 1]
    assert captions("c.tsv", image_column="path", caption_column=("title",)) == ['"a "b', "b", 'say "c"']
    assert captions("../elsewhere/d.csv", image_root=photos) == ["a", "b", "c"]
    assert captions("f.jsonl", image_column="path", caption_column=("text",)) == ["a", "b", "c"]
    write(photos / "g.csv", "image,first,second", "0.jpg,a,b", "1.jpg,,c")
    assert captions("g.csv", caption_column=("first", "second")) == ["a", "b", "c"]
    assert about(photos.parent / "out-g.csv/train")[0]["captions"] == ["a", "b"]


def test_held_out_pictures_are_a_retrieval_set(photos: Path, capsys) -> None:
    out = photos.parent / "out"
    photograph(photos / "copy.jpg")
    (photos / "copy.jpg").write_bytes((photos / "3.jpg").read_bytes())
    with open(photos / "captions.csv", "a") as file:
        file.write("copy.jpg,a copy,of 3\n")
    shares = {}
    for share in (0.1, 0.3, 0.6, 0.9):
        pack.Pairs(photos / "captions.csv", out / str(share), hold_out=share).build()
        trained = {each["file"] for each in about(out / f"{share}/train")}
        tested = read_set(out / f"{share}/eval/held_out")
        counts = read_manifest(out / str(share))["counts"]
        assert counts["held_out"] == len(tested) and counts["pictures"] == len(trained)
        assert counts["held_out"] + counts["pictures"] == 11 and abs(len(tested) - 11 * share) <= 1
        said = [caption for _, _, captions in tested for caption in captions]
        assert counts["held_out_captions"] == len(said) and len(said) + counts["captions"] == 14
        assert ("picture 3" in said) == ("a copy" in said) == ("3.jpg" not in trained), "copies stay together"
        for _, _, captions in tested:
            assert ("picture 2" in captions) == ("2 again" in captions), "with all of its captions"
        shares[share] = set(said)
    assert shares[0.1] < shares[0.3] < shares[0.6] < shares[0.9], "a larger share holds out more pictures, no others"
    assert f"--sets {out}/0.9/eval/held_out" in capsys.readouterr().out
    assert evalsets.EvalSet(out / "0.1/eval/held_out", np.asarray).kind == "retrieval"


def test_a_retrieval_set_of_everything(photos: Path, capsys) -> None:
    out = photos.parent / "out"
    pack.Retrieval(photos / "captions.csv", out).build()
    found = [captions for _, _, captions in read_set(out)]
    assert found[:3] == [
        ["picture 0", 'the same "picture", 0'], ["picture 1", 'the same "picture", 1'], ["picture 2", "2 again"]
    ]  # fmt: skip
    assert len(found) == 10 and f"--sets {out}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- classes


@pytest.fixture
def labelled(photos: Path) -> Path:
    rows = [f"{i}.jpg,{('red fox', 'cat')[i % 2]},{i}" for i in range(8)]
    write(photos / "labels.csv", "image,label,tags", *rows, rows[0])
    return photos


def test_classes_of_a_table(labelled: Path, capsys) -> None:
    out = labelled.parent / "out"
    pack.Classes(labelled / "labels.csv", out).build()
    assert read_manifest(out)["counts"] == {"classes": 2, "test": 8, "broken": 0}
    assert f"--sets {out}" in capsys.readouterr().out
    known = evalsets.EvalSet(out, np.asarray)
    assert known.classnames == ["cat", "red fox"] and known.templates == ["{c}", "a photo of a {c}."]
    assert [label for _, _, label in known] == [1, 0] * 4 and not (out / "train").exists()
    assert all(set(sample) == {"key", "jpg", "cls"} for sample in samples(out / "test"))


def test_the_train_split_is_training_data(labelled: Path, capsys) -> None:
    out = labelled.parent / "out"
    pack.Classes(labelled / "labels.csv", out, hold_out=0.3).build()
    assert read_manifest(out)["counts"] == {"classes": 2, "test": 2, "train": 6, "broken": 0}
    said = capsys.readouterr().out
    assert f"--sets {out}" in said and f"--data {out}/train" in said
    test, train = (read_set(out, split) for split in ("test", "train"))
    assert sorted(label for _, _, label in test) == [0, 1] and len(train) == 6
    pairs = data.open_pairs(str(out / "train"), strict=True)
    said = [pairs.caption(row) for row in range(6)]
    assert sorted(said) == ["cat"] * 3 + ["red fox"] * 3 and said not in (sorted(said), sorted(said, reverse=True))
    for each in about(out / "train"):
        assert each["name"] == ["cat", "red fox"][each["label"]] and each["tags"] == each["file"][0]


def test_classes_of_folders(tmp_path: Path, capsys) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for name in ("10", "9", "hot_dog"):
            for i in range(count):
                photograph(tmp_path / split / name / f"deep/{split}{i}.png")
    write(tmp_path / "test/9/notes.txt", "none")
    write(tmp_path / "test/9/.hidden.png", "none")
    write(tmp_path / "test/9/phone.HEIC", "none")
    (tmp_path / "test/empty").mkdir()
    pack.Classes(tmp_path / "test", tmp_path / "out", train=tmp_path / "train").build()
    said = capsys.readouterr().out
    assert all(word in said for word in ("1 .txt", "1 .heic", "empty"))
    assert read_manifest(tmp_path / "out")["counts"] == {"classes": 3, "test": 6, "train": 9, "broken": 0}
    assert (tmp_path / "out/classnames.txt").read_text().splitlines() == ["10", "9", "hot dog"]
    assert [label for _, _, label in read_set(tmp_path / "out")] == [0, 0, 1, 1, 2, 2]
    for split in ("train", "test"):
        (tmp_path / split / "hot_dog").rename(tmp_path / split / "8")
    pack.Classes(tmp_path / "test", tmp_path / "numbers").build()
    assert (tmp_path / "numbers/classnames.txt").read_text().splitlines() == ["8", "9", "10"]
    assert "--classnames" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--out .*test/8/out"):
        pack.Classes(tmp_path / "test", tmp_path / "test/8/out").build()
    with pytest.raises(ValueError, match=r"/CLASS/picture\.jpg"):
        pack.Classes(tmp_path / "test/9/deep", tmp_path / "other").build()


def test_class_names_from_a_file(labelled: Path) -> None:
    def named(*lines: str, labels: str = "labels.csv", **options) -> tuple[list[str], list[int]]:
        out = labelled.parent / f"out{len(list(labelled.parent.iterdir()))}"
        names = write(labelled / "names.txt", *lines)
        pack.Classes(labelled / labels, out, classnames=names, **options).build()
        found = evalsets.EvalSet(out, np.asarray)
        return found.classnames, [label for _, _, label in found]

    assert named("red fox", "bear", "cat") == (["red fox", "bear", "cat"], [0, 2] * 4), "labels are names"
    write(labelled / "numbers.csv", "image,label", *(f"{i}.jpg,{2 * (i % 2)}" for i in range(8)))
    assert named("a", "b", "c", labels="numbers.csv") == (["a", "b", "c"], [0, 2] * 4), "labels are numbers of lines"
    with pytest.raises(ValueError, match=r"names\.txt lacks the label 'red fox'"):
        named("cat", "bear")
    with pytest.raises(ValueError, match=r"names\.txt lacks the label '2'"):
        named("a", "b", labels="numbers.csv")
    with pytest.raises(ValueError, match="'a'"):
        named("a", "a", "a", labels="numbers.csv")
    with pytest.raises(ValueError, match=r"names\.txt has an empty line"):
        named("cat", "", "red fox")


def test_prompts_from_a_file(labelled: Path) -> None:
    prompts = write(labelled / "prompts.txt", "ein Bild: {c}", "größer: {c}.")
    pack.Classes(labelled / "labels.csv", labelled.parent / "out", templates=prompts).build()
    assert evalsets.EvalSet(labelled.parent / "out", np.asarray).templates == ["ein Bild: {c}", "größer: {c}."]
    write(prompts, "a {c}", "b {}")
    with pytest.raises(ValueError, match=r"prompts\.txt .*'b \{\}', .*\{c\}"):
        pack.Classes(labelled / "labels.csv", labelled.parent / "other", templates=prompts).build()


# -------------------------------------------------------------------------------------------------------- broken input


def png_of(width: int, height: int) -> bytes:
    """A PNG header that states a size, without pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 10) + b"IDAT" + bytes(14)


def test_what_cannot_be_read_is_left_out_counted_and_named(photos: Path, capsys) -> None:
    whole = (photos / "0.jpg").read_bytes()
    (photos / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "1.jpg").unlink()
    (photos / "2.jpg").write_bytes(b"")
    (photos / "3.jpg").write_text("<html>404</html>")
    (photos / "4.jpg").write_bytes(png_of(10_000, 10_000))
    (photos / "5.jpg").unlink()
    os.mkfifo(photos / "5.jpg")
    with open(photos / "captions.csv", "a") as file:
        file.write("7.jpg,  ,x\n,nothing,x\n6.jpg\n")
    out = photos.parent / "out"
    pack.Pairs(photos / "captions.csv", out).build()
    manifest = read_manifest(out)
    assert manifest["counts"] == {"pictures": 4, "captions": 4, "samples": 4, "broken": 9}
    reasons = {key.rpartition("line")[2].strip(): reason for key, reason in manifest["broken"].items()}
    assert reasons == {
        "0.jpg": "unreadable image: OSError", "1.jpg": "missing image", "2.jpg": reasons["3.jpg"],
        "3.jpg": data.NO_PICTURE, "5.jpg": "missing image",
        "4.jpg": f"10000x10000 pixels are more than the {data.MAX_PIXELS} allowed",
        "15": "row without 'caption'", "16": "row without 'image'", "17": "row without 'caption'",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "9 broken samples" in said and "2 missing image" in said and "0.jpg, 1.jpg, 2.jpg" in said
    with pytest.raises(ValueError, match=r"--strict: captions\.csv, line 15"):
        pack.Pairs(photos / "captions.csv", photos.parent / "strict", strict=True).build()
    assert not (photos.parent / "strict").exists()


def test_json_that_is_none(photos: Path) -> None:
    good = '{"image": "0.jpg", "caption": "a"}'
    deep = "[" * 100_000
    bad = ['{"image": ', "7", f'{{"image": {deep}}}', '{"image": 5, "caption": "a"}', '{"image": "1.jpg"}']
    worse = ['{"image": "1.jpg", "caption": [true, "b"]}', '{"image": "1.jpg", "caption": []}']
    write(photos / "a.jsonl", good, *bad, *worse, '{"image": "2.jpg", "caption": "\\ud800 c", "x": "\\udfff"}')
    pack.Pairs(photos / "a.jsonl", photos.parent / "out").build()
    assert [each["caption"] for each in about(photos.parent / "out/train")] == ["a", "b", "? c"]
    broken = read_manifest(photos.parent / "out")["broken"]
    assert [(key.rpartition(" ")[2], reason) for key, reason in broken.items()] == [
        *((str(line), "no JSON object") for line in (2, 3, 4)),
        ("5", "row without 'image'"),
        *((str(line), "row without 'caption'") for line in (6, 7, 8)),
    ]


@pytest.mark.parametrize("way", ["up", "absolute", "a link to a file", "a link to a folder"])
def test_paths_that_lead_out_are_refused(photos: Path, way: str, capsys, monkeypatch) -> None:
    photograph(photos.parent / "secret/key.jpg")
    path = "../secret/key.jpg" if way == "up" else str(photos.parent / "secret/key.jpg")
    if way == "a link to a file":
        (photos / (path := "link.jpg")).symlink_to("../secret/key.jpg")
    elif way == "a link to a folder":
        (photos / "link").symlink_to(photos.parent / "secret")
        path = "link/key.jpg"
    write(photos / "hostile.csv", "image,caption", "0.jpg,a", f"{path},b")
    write(photos / "hostile-labels.csv", "image,label", "0.jpg,a", f"{path},b")
    for kind, table in (("pairs", "hostile"), ("retrieval", "hostile"), ("classes", "hostile-labels")):
        code, said = called(monkeypatch, capsys, kind, photos / f"{table}.csv", "--out", photos.parent / "out")
        assert code == 2 and one_sentence(said) and f"line 3: {path} " in said
    assert not (photos.parent / "out").exists()


def test_links_and_paths_within_the_folder_are_fine(photos: Path) -> None:
    (photos / "link.jpg").symlink_to("more/8.png")
    (photos.parent / "photos2").symlink_to(photos)
    names = [f"{photos}/0.jpg", "link.jpg", "more/../1.jpg", "nul\0.jpg", "n" * 3000]
    write(photos / "a.jsonl", *(json.dumps({"image": name, "caption": "a"}) for name in names))
    pack.Pairs(photos.parent / "photos2/a.jsonl", photos.parent / "out").build()
    assert read_manifest(photos.parent / "out")["counts"]["broken"] == 2
    assert [each["file"] for each in about(photos.parent / "out/train")] == ["0.jpg", "more/8.png", "1.jpg"]


def test_a_link_out_of_a_folder_of_classes_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        photograph(tmp_path / f"in/{name}/1.png")
    photograph(tmp_path / "secret.png")
    (tmp_path / "in/a/2.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=r"a/2\.png is outside of"):
        pack.Classes(tmp_path / "in", tmp_path / "out").build()


def called(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """(exit code, stderr) of the command line."""
    monkeypatch.setattr(sys, "argv", ["pack", *map(str, arguments)])
    code = 0
    try:
        cli.command_line(pack.main)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def test_the_command_line(photos: Path, monkeypatch, capsys) -> None:
    arguments = ["pairs", photos / "captions.csv", "--hold-out", "0.2", "--out", photos.parent / "out"]
    assert called(monkeypatch, capsys, *arguments)[0] == 0
    assert len(read_set(photos.parent / "out/eval/held_out")) == 2


WRONG = {  # what is called -> what is said
    "pairs missing.csv": r"missing\.csv is no file",
    "pairs .": r". is a folder",
    "pairs 0.jpg": r"0\.jpg must end in",
    "pairs empty.csv": r"empty\.csv is empty",
    "pairs header.csv": r"header\.csv has no picture",
    "pairs labels.csv": r"labels\.csv .*image, label, tags.* --image-column",
    "classes captions.csv": r"captions\.csv .*image, caption, source.*--label-col",
    "pairs semicolons.csv": r"semicolons\.csv .*commas",
    "pairs double.csv": r"double\.csv has two columns caption",
    "pairs latin.csv": r"latin\.csv is not UTF-8 text",
    "pairs quotes.csv": r"quotes\.csv, line 4",
    "pairs inner.csv": r"inner\.csv, line 2",
    "pairs commas.csv": r"commas\.csv, line 5 has 4 cells",
    "pairs tabs.tsv": r"tabs\.tsv, line 2 has 3 cells",
    "pairs list.json": r"list\.json must end in",
    "pairs web.csv": r"web\.csv, line 3: https://.* download",
    "pairs captions.csv --image-root more": r"none of the 10 pictures .*--image",
    "pairs captions.csv --image-root nowhere": r"nowhere .*--image-root",
    "pairs captions.csv --hold-out 1": r"--hold-out must be",
    "pairs captions.csv --max-side 0": r"--max-side must be at least 1",
    "pairs one.csv --hold-out 0.5": r"one\.csv .*held_out",
    "classes labels.csv --train labels.csv": r"0\.jpg .*both splits",
    "classes labels.csv --train labels.csv --hold-out 0.5": r"--train and --hold-out",
    "classes twice.csv": r"twice\.csv, line 3: 0\.jpg .*'b' .*'a'",
    "classes oneclass.csv": r"oneclass\.csv has one class",
    "classes labels.csv --classnames nowhere.txt": r"nowhere\.txt is missing",
    "classes header-labels.csv": r"header-labels\.csv has no picture",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_calls_exit_2_with_one_sentence(labelled: Path, arguments: str, monkeypatch, capsys) -> None:
    write(labelled / "empty.csv")
    write(labelled / "header.csv", "image,caption")
    write(labelled / "semicolons.csv", "image;caption", "0.jpg;a")
    write(labelled / "double.csv", "image,caption,caption", "0.jpg,a,b")
    write(labelled / "header-labels.csv", "image,label")
    (labelled / "latin.csv").write_bytes("image,caption\n0.jpg,größer\n".encode("latin-1"))
    write(labelled / "list.json", "[1, 2]")
    write(labelled / "web.csv", "image,caption", "0.jpg,a", "https://example.org/a.jpg,b")
    write(labelled / "quotes.csv", "image,caption", '0.jpg,"a', 'b"', '1.jpg,"red, green', "2.jpg,b", "3.jpg,c")
    write(labelled / "inner.csv", "image,caption", '0.jpg,"a', '1.jpg,"b"', "2.jpg,c")
    write(labelled / "commas.csv", "image,caption", '0.jpg,"a, b', 'c"', "", "1.jpg,red, green, blue shirt", "2.jpg,c")
    write(labelled / "tabs.tsv", "image\tcaption", "0.jpg\ta\tb")
    write(labelled / "one.csv", "image,caption", "0.jpg,a", "0.jpg,b")
    write(labelled / "twice.csv", "image,label", "0.jpg,a", "0.jpg,b")
    write(labelled / "oneclass.csv", "image,label", "0.jpg,a", "1.jpg,a")
    monkeypatch.chdir(labelled)
    code, said = called(monkeypatch, capsys, *arguments.split(), "--out", "out")
    assert code == 2 and one_sentence(said), said
    assert re.search(WRONG[arguments], said), said
    assert not (labelled / "out").exists() and not list(labelled.glob(".out-*"))


# ------------------------------------------------------------------------------------------------- bytes, sizes, shards


def test_pictures_are_upright_and_of_kinds_that_shards_hold(photos: Path) -> None:
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("red", (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[pack.ORIENTATION] = 6  # the camera was turned: what is left is stored above
    picture.transpose(Image.Transpose.ROTATE_90).save(photos / "0.jpg", exif=exif, quality=95)
    picture.save(photos / "1.jpg", "gif")
    picture.save(photos / "2.jpg", "bmp")
    picture.save(photos / "3.jpg", "webp")
    Image.new("RGBA", (8, 8)).save(photos / "4.jpg", "png")
    pack.Pairs(photos / "captions.csv", photos.parent / "out", every_caption=False).build()
    found = samples(photos.parent / "out/train")[:5]
    endings = [next(ending for ending in sample if ending in tars.IMAGE_EXTENSIONS) for sample in found]
    assert endings == ["jpg", "png", "png", "webp", "png"]
    for i, (sample, ending) in enumerate(zip(found, endings, strict=True)):
        kept = (photos / f"{i}.jpg").read_bytes() == sample[ending]
        assert kept == (i in (3, 4)), i
    shown = data.decode_image(found[0]["jpg"])
    assert shown.size == (40, 20) and not Image.open(photos / "0.jpg").size == (40, 20)
    assert np.abs(np.asarray(shown, float)[:, 4:16] - (254, 0, 0)).max() < 30
    assert Image.open(pack.io.BytesIO(found[0]["jpg"])).getexif().get(pack.ORIENTATION) is None


GREY = np.linspace(0, 65535, 40 * 20).reshape(20, 40).astype(np.uint16)  # from black to white
KINDS = {  # file: (its picture, what is packed: its ending and mean grey)
    "a.tif": (Image.new("RGB", (8, 8), (200, 200, 200)), ("png", 200)),
    "b.avif": (Image.new("RGB", (8, 8), (200, 200, 200)), ("png", 200)),
    "c.png": (Image.fromarray(GREY), ("png", 127.5)),
    "d.tiff": (Image.fromarray(GREY), ("png", 127.5)),
    "e.png": (Image.new("L", (8, 8), 200), ("png", 200)),
    "f.jpg": (Image.new("CMYK", (8, 8), (0, 0, 0, 55)), ("jpg", 200)),
    "g.tif": (Image.new("F", (8, 8), 0.5), None),
    "h.tif": (Image.new("I", (8, 8), 70_000), None),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_pictures(tmp_path: Path, name: str, capsys) -> None:
    picture, expected = KINDS[name]
    try:
        picture.save(tmp_path / name)
    except (KeyError, ValueError):
        pytest.skip(f"this Pillow writes no {name}")
    photograph(tmp_path / "other.png")
    write(tmp_path / "table.csv", "image,caption", "other.png,b", f"{name},a")
    pack.Pairs(tmp_path / "table.csv", tmp_path / "out").build()
    found = samples(tmp_path / "out/train")[1:]
    if expected is None:
        assert not found and "16 bits" in capsys.readouterr().out
        return
    ending, grey = expected
    shown = Image.open(pack.io.BytesIO(found[0][ending]))
    assert shown.mode in ("RGB", "L", "CMYK") and abs(np.asarray(shown.convert("RGB"), float).mean() - grey) < 2
    assert name in ("e.png", "f.jpg") if found[0][ending] == (tmp_path / name).read_bytes() else True


NFC, NFD = (unicodedata.normalize(form, "größe/é.jpg") for form in ("NFC", "NFD"))
PATHS = [("more/8.jpg", "more\\8.jpg"), (NFC, NFD), (NFD, NFC), (NFD, NFC.replace("/", "\\"))]


@pytest.mark.parametrize("on_disk, in_table", PATHS)
def test_paths_as_other_systems_write_them(tmp_path: Path, on_disk: str, in_table: str) -> None:
    photograph(tmp_path / on_disk)
    write(tmp_path / "table.csv", "image,caption", f"{in_table},a")
    pack.Pairs(tmp_path / "table.csv", tmp_path / "out").build()
    assert [each["file"] for each in about(tmp_path / "out/train")] == [on_disk]


def test_columns_that_cannot_be_kept_are_named(photos: Path, capsys) -> None:
    write(photos / "a.csv", "image,caption,file,captions,key,size", "0.jpg,a,F,C,K,9")
    write(photos / "b.csv", "image,label,name,size", "0.jpg,x,N,9", "1.jpg,y,N,9", "2.jpg,x,N,9", "3.jpg,y,N,9")
    out = photos.parent
    pack.Pairs(photos / "a.csv", out / "a").build()
    assert "captions, file, key" in capsys.readouterr().out
    assert about(out / "a/train") == [
        {"key": "000000000", "caption": "a", "file": "0.jpg", "captions": ["a"], "size": "9"}
    ]  # fmt: skip
    pack.Classes(photos / "b.csv", out / "b", hold_out=0.5).build()
    assert "not kept: name" in capsys.readouterr().out
    assert {each["name"] for each in about(out / "b/train")} == {"x", "y"}


def test_captions_may_be_numbers(photos: Path) -> None:
    lines = [f'{{"image": "{i}.jpg", "caption": {value}}}' for i, value in enumerate(["7", '[1.5, "b"]', "NaN"])]
    pack.Pairs(write(photos / "a.jsonl", *lines), photos.parent / "out").build()
    assert [each["caption"] for each in about(photos.parent / "out/train")] == ["7", "1.5", "b"]
    assert read_manifest(photos.parent / "out")["counts"]["broken"] == 1


def test_linked_folders_are_named(tmp_path: Path, capsys) -> None:
    """Links are not followed within a class; one to a folder elsewhere is refused."""
    for name in ("a", "b", "away"):
        photograph(tmp_path / f"{name}/1.png")
    root = tmp_path / "in"
    root.mkdir()
    for name in ("a", "b"):
        (tmp_path / name).rename(root / name)
    (root / "a/more").symlink_to(tmp_path / "away")
    pack.Classes(root, tmp_path / "out").build()
    assert "1 linked folder" in capsys.readouterr().out
    assert read_manifest(tmp_path / "out")["counts"]["test"] == 2
    (root / "c").symlink_to(tmp_path / "away")
    with pytest.raises(ValueError, match=r"c/1\.png is outside of .*cp -rL"):
        pack.Classes(root, tmp_path / "other").build()
    (root / "c").unlink()
    (root / "c").symlink_to(root / "b")
    with pytest.raises(ValueError, match="'c' here, but 'b' before"):
        pack.Classes(root, tmp_path / "other").build()


def test_resized_to_the_longer_side(photos: Path) -> None:
    photograph(photos / "3.jpg", 6, 8)
    pack.Pairs(photos / "captions.csv", photos.parent / "out", max_side=10, every_caption=False).build()
    pairs = data.open_pairs(str(photos.parent / "out/train"))
    assert [pairs.read(row).image.size for row in (2, 3, 8)] == [(10, 8), (6, 8), (10, 8)]
    assert samples(photos.parent / "out/train")[3]["jpg"] == (photos / "3.jpg").read_bytes()


def test_several_shards(labelled: Path, monkeypatch) -> None:
    out = labelled.parent
    monkeypatch.setattr(layout, "SHARD", 5)
    pack.Pairs(labelled / "captions.csv", out / "pairs", hold_out=0.3).build()
    train = sorted(path.name for path in (out / "pairs/train").iterdir())
    assert train == ["00000.tar", "00001.tar"] and [s["key"] for s in samples(out / "pairs/train")][5] == "000010000"
    monkeypatch.setattr(layout, "SHARD", 4)
    pack.Classes(labelled / "labels.csv", out / "classes").build()
    assert sorted(path.name for path in (out / "classes/test").iterdir()) == ["0.tar", "1.tar", "nshards.txt"]
    monkeypatch.setattr(layout, "SHARD", 3)
    pack.Classes(labelled / "labels.csv", out / "others").build()
    for name, count in (("classes", 2), ("others", 3)):
        assert (out / f"{name}/test/nshards.txt").read_text() == f"{count}\n"
        found = read_set(out / name)
        assert [key for key, _, _ in found] == [f"s{i:07d}" for i in range(8)]
        assert [label for _, _, label in found] == [1, 0] * 4


def test_the_same_bytes_again_and_a_finished_folder_is_left(labelled: Path, monkeypatch, capsys) -> None:
    out = labelled.parent
    for kind, table in ((pack.Pairs, "captions.csv"), (pack.Classes, "labels.csv")):
        for name in ("one", "two"):
            kind(labelled / table, out / f"{name}-{table}", hold_out=0.3).build()
        assert contents(out / f"one-{table}") == contents(out / f"two-{table}")
    monkeypatch.setattr(pack.Pairs, "write", lambda *_: pytest.fail("packed again"))
    (labelled / "0.jpg").rename(labelled / "away.jpg")
    (labelled / "away.jpg").rename(labelled / "0.jpg")
    pack.Pairs(labelled / "captions.csv", out / "one-captions.csv", hold_out=0.3).build()
    assert "is complete" in capsys.readouterr().out
    for options in ({"hold_out": 0.2}, {"hold_out": 0.3, "max_side": 5}, {"hold_out": 0.3, "every_caption": False}):
        with pytest.raises(ValueError, match="other settings"):
            pack.Pairs(labelled / "captions.csv", out / "one-captions.csv", **options).build()
    photograph(labelled / "0.jpg", 30, 30)
    with pytest.raises(ValueError, match="other settings: files"):
        pack.Pairs(labelled / "captions.csv", out / "one-captions.csv", hold_out=0.3).build()
