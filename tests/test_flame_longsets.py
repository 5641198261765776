"""Reading sets of long or multilingual captions in their authors' format."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from flame import longsets


def test_long_sets_are_read_as_upstream_does(tmp_path: Path):
    root = tmp_path / "urban"
    (root / "caption").mkdir(parents=True)
    for name, text in (("1", "one\u2028line\nmore"), ("10", "ten"), ("2", "two")):  # U+2028 ends no line
        (root / "caption" / f"{name}.txt").write_text(text, encoding="utf-8")
    pairs = longsets.urban1k(root)
    assert [text for _, text in pairs] == ["one\u2028line\n", "two", "ten"] and pairs[2][0] == root / "image/10.jpg"

    record = {"image": "coco/1.jpg", "conversations": [{"value": "?"}, {"value": "a\nb"}]}
    (tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json").write_text(json.dumps([record] * 1002))
    pairs = longsets.sharegpt4v(tmp_path)
    assert len(pairs) == 1000 and pairs[0] == (tmp_path / "coco/1.jpg", "a b")

    lines = [{"split": split, "image_file": f"{split}.jpg", "description": "x\ny\u2028"} for split in ("train", "test")]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    (tmp_path / "docci_descriptions.jsonlines").write_text(text, encoding="utf-8")
    assert longsets.docci(tmp_path) == [(tmp_path / "images/test.jpg", "x y\u2028")]

    home = tmp_path / "densely_captioned_images"
    (home / "annotations").mkdir(parents=True)
    (home / "splits.json").write_text(json.dumps({"train": ["a.json"], "test": ["b.json"]}))
    for name in "ab":
        about = {"image": f"{name}.jpg", "short_caption": "Short. one", "extra_caption": " extra</s>two\n"}
        (home / "annotations" / f"{name}.json").write_text(json.dumps(about))
    assert longsets.dci(tmp_path) == [(home / "photos" / f"{n}.jpg", "Short. one. extra. two") for n in "ab"]

    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/k.jpg")
    about = [{"image/key": key, "sw": {"caption": ["mo\u0085ja", "mbili"]}} for key in ("k", "gone")]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in about)
    (tmp_path / "captions.jsonl").write_text(text, encoding="utf-8")
    assert longsets.crossmodal3600(tmp_path, "sw") == [(tmp_path / "images/k.jpg", "mo\u0085ja")]
    assert longsets.read_image(tmp_path / "images/k.jpg").size == (4, 4)
    for reader in longsets.LONG_SET_READERS.values():
        with pytest.raises(ValueError, match="is missing"):
            longsets.read_set(reader, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not crossmodal3600"):
        longsets.read_set(longsets.crossmodal3600, tmp_path, "quz")
    (tmp_path / "images/k.jpg").unlink()
    with pytest.raises(ValueError, match="crossmodal3600 sw"):
        longsets.read_set(longsets.crossmodal3600, tmp_path, "sw")
    (root / "caption/1.txt").write_text("")
    assert longsets.read_set(longsets.urban1k, root)[0][1] == ""


def test_class_names_of_imagenet_in_five_languages(tmp_path: Path):
    """The files of CLIP_benchmark are read unchanged."""
    folder = Path(importlib.util.find_spec("clip_benchmark").submodule_search_locations[0]) / "datasets"
    found = longsets.imagenet_names(folder)
    assert {language: len(templates) for language, (_, templates) in found.items()} == {
        "ar": 55, "en": 80, "jp": 37, "it": 49, "cn": 80
    }  # fmt: skip
    assert all(len(names) == 1000 and all("{c}" in one for one in of) for names, of in found.values())
    with pytest.raises(ValueError, match="ar_classnames.json is missing"):
        longsets.imagenet_names(tmp_path)
    for kind in ("classnames", "zeroshot_classification_templates"):
        (tmp_path / f"ar_{kind}.json").write_text("{}")
    with pytest.raises(ValueError, match="no class names of imagenet1k"):
        longsets.imagenet_names(tmp_path)
