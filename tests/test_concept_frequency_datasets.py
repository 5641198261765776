"""The authors' test sets are converted to the CLIP-benchmark layout."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scripts import one_sentence

from concept_frequency import datasets
from shared.evalsets import EvalSet


def picture(seed: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def labels(folder) -> list[int]:
    return [label for _, _, label in EvalSet(folder, lambda image: np.asarray(image).mean())]


def test_a_set_with_a_file_of_splits(tmp_path, capsys):
    root = tmp_path / "caltech256"
    for i, name in enumerate(("001.ak47", "002.american-flag-101")):
        (root / "256_ObjectCategories" / name).mkdir(parents=True)
        for k in range(3):
            (root / f"256_ObjectCategories/{name}/{k}.jpg").write_bytes(picture(10 * i + k))
    rows = [
        [f"{name}/{k}.jpg", i, name] for i, name in enumerate(("001.ak47", "002.american-flag-101")) for k in range(3)
    ]
    (root / "split_Caltech256.json").write_text(json.dumps({"train": rows[:1], "val": rows[1:2], "test": rows[2:]}))
    datasets.main(datasets.Config("caltech256", str(root), str(tmp_path / "wds")))
    assert "9,076 of 257" in capsys.readouterr().out
    made = EvalSet(tmp_path / "wds", lambda image: image.size)
    assert made.classnames == ["ak47", "american-flag"] and labels(tmp_path / "wds") == [0, 1, 1, 1]
    assert made.templates == list(datasets.TEMPLATES) and len(set(made.templates)) == 80
    (tmp_path / "own.txt").write_text("a {c}\n")
    cfg = datasets.Config("caltech256", str(root), str(tmp_path / "wds"), str(tmp_path / "own.txt"))
    datasets.main(cfg)
    assert EvalSet(tmp_path / "wds", lambda image: image).templates == ["a {c}"]
    (root / "split_Caltech256.json").write_text(json.dumps({"train": [], "val": [], "test": rows[3:]}))
    with pytest.raises(ValueError, match="labels other than 0 to 0"):
        datasets.read_split(root, "caltech256")


@pytest.mark.parametrize(
    ("name", "split", "folder", "images", "classes", "theirs"),
    [
        ("birdsnap", "split_Birdsnap.json", "images", ("Wood_Duck/1.jpg", "Acorn_Woodpecker/2.jpg"),
         ["Wood_Duck", "Acorn_Woodpecker"], "11,747 of 500"),
        ("cub", "split_CUB.json", "images", ("002.Laysan_Albatross/1.jpg", "008.Crested_Auklet/2.jpg"),
         ["Laysan_Albatross", "Crested_Auklet"], "5,794 of 200"),
        ("ucf101", "split_zhou_UCF101.json", "UCF-101-midframes", ("Archery/1.jpg", "Apply_Lipstick/2.jpg"),
         ["Archery", "Apply_Lipstick"], "3,783 of 101"),
    ],
)  # fmt: skip
def test_sets_that_are_not_published_in_the_layout(tmp_path, capsys, name, split, folder, images, classes, theirs):
    """Classes are named as in the file of splits, by label; test images are read from the set's folder of images."""
    root = tmp_path / name
    for i, path in enumerate(images):
        (root / folder / path).parent.mkdir(parents=True)
        (root / folder / path).write_bytes(picture(i))
    first, second = ([path, i, title] for i, (path, title) in enumerate(zip(images, classes, strict=True)))
    (root / split).write_text(json.dumps({"train": [first], "val": [], "test": [second]}))
    found = datasets.read_split(root, name)
    assert found.classnames == classes and list(found.images) == [(1, picture(1))]
    datasets.main(datasets.Config(name, str(root), str(tmp_path / "wds")))
    assert theirs in capsys.readouterr().out
    made = EvalSet(tmp_path / "wds", lambda image: image.size)
    assert made.classnames == classes and [(image, label) for _, image, label in made] == [((12, 12), 1)]
    (root / folder / images[1]).unlink()
    with pytest.raises(ValueError, match=Path(images[1]).name):
        datasets.main(datasets.Config(name, str(root), str(tmp_path / "again")))


def write_release(folder, described: bool) -> None:
    """Write two parquet files in the format of the library `datasets`."""
    folder.mkdir(parents=True)
    for k in range(2):
        rows = [{"bytes": picture(2 * k + i, "PNG" if i else "JPEG"), "path": f"{i}.jpg"} for i in range(2)]
        table = pa.table({"image": rows, "label": [k, 1]})
        names = {"names": ["Zone_tailed_Hawk_bird", "A300B4_aircraft"], "_type": "ClassLabel"}
        about = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
        if described:
            table = table.replace_schema_metadata({b"huggingface": json.dumps(about).encode()})
        pq.write_table(table, folder / f"train-{k:05d}-of-00002.parquet")


@pytest.mark.parametrize("described", [True, False])
def test_let_it_wag_as_released(tmp_path, described):
    root = tmp_path / "Let-It-Wag"
    write_release(root / "data", described)
    if not described:
        with pytest.raises(ValueError, match="put README.md beside"):
            datasets.read_let_it_wag(root)
        page = "dataset_info:\n  features:\n    class_label:\n      names:\n"
        page += "        '0': Zone_tailed_Hawk_bird\n        '1': A300B4_aircraft\n"
        (root / "README.md").write_text(page)
    datasets.main(datasets.Config("let_it_wag", str(root), str(tmp_path / "wds")))
    made = EvalSet(tmp_path / "wds", lambda image: image.size)
    assert made.classnames == ["Zone_tailed_Hawk", "A300B4"] and labels(tmp_path / "wds") == [0, 1, 1, 1]


def test_labels_without_a_class_name_and_empty_templates_are_refused(tmp_path):
    write_release(tmp_path / "set/data", described=True)
    (tmp_path / "none.txt").write_text("")
    cfg = datasets.Config("let_it_wag", str(tmp_path / "set"), str(tmp_path / "out"), str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="none.txt: '' lacks {c}"):
        datasets.main(cfg)
    table = pa.table({"image": [{"bytes": picture(0), "path": "a.jpg"}], "label": [2]})
    pq.write_table(table, tmp_path / "set/data/train-00009-of-00010.parquet")
    with pytest.raises(ValueError, match="label 2"):
        datasets.main(datasets.Config("let_it_wag", str(tmp_path / "set"), str(tmp_path / "out")))
    assert not (tmp_path / "out/classnames.txt").exists()


def test_let_it_wag_in_folders(tmp_path):
    for name in ("B_bird", "A_food", "C"):  # sorted anew after the cut, B would be A's
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / f"images/{name}/1.png").write_bytes(picture(ord(name[0]), "PNG"))
    found = datasets.read_let_it_wag(tmp_path / "images")
    assert found.classnames == ["A", "B", "C"] and [label for label, _ in found.images] == [0, 1, 2]


def test_images_of_other_kinds():
    assert set(datasets.encoded(picture(0, "WEBP"))) == {"webp"}
    assert set(datasets.encoded(picture(0, "GIF"))) == {"png"}
    with pytest.raises(ValueError, match="cannot be read"):
        datasets.encoded(b"nothing")


def test_command_lines_end_in_one_sentence(in_process, tmp_path):
    for arguments, words in (
        (["ucf101", "--root", tmp_path], "split_zhou_UCF101.json"),
        (["ucf102", "--root", tmp_path], "'ucf102'"),
        (["let_it_wag", "--root", tmp_path / "none"], "Let It Wag!"),
    ):
        result = in_process(*arguments, "--out", tmp_path / "out", module="concept_frequency.datasets")
        assert result.code == 2 and words in result.err and one_sentence(result.err), result.err
