"""Reading Winoground and SugarCrepe in their authors' format, and their matching accuracies."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flame.eval import caption_selection
from flame.longsets import COMPOSITIONAL_READERS, SUGAR_CREPE, read_instances


def test_accuracies_are_those_of_the_pairwise_definition():
    """Compared with a loop over instances, images and captions, and with CLIP_benchmark on random features without
    ties."""
    torch.manual_seed(0)
    for images_each, captions_each in ((2, 2), (1, 2)):
        images = F.normalize(torch.randn(200, images_each, 4), dim=-1)
        captions = F.normalize(torch.randn(200, captions_each, 4), dim=-1)
        k, text, image = min(images_each, captions_each), [], []
        for x, y in zip(images, captions, strict=True):
            scores = x @ y.T
            text.append(all(int(scores[i].argmax()) == i for i in range(k)))
            image.append(all(int(scores[:, j].argmax()) == j for j in range(k)))
        found = caption_selection(images, captions)
        assert found["text_acc"] == pytest.approx(100 * sum(text) / 200)
        assert found["image_acc"] == pytest.approx(100 * sum(image) / 200)
        assert found["acc"] == pytest.approx(100 * sum(a and b for a, b in zip(text, image, strict=True)) / 200)
    same = torch.ones(3, 2, 4) / 2
    assert caption_selection(same, same)["text_acc"] == 0  # a collapsed model knows nothing


def test_sets_are_read_as_clip_benchmark_reads_them(tmp_path: Path):
    (tmp_path / "data").mkdir()
    about = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "a b", "caption_1": "b a"}
    (tmp_path / "data/examples.jsonl").write_text(json.dumps(about) + "\n")
    ((image, other), captions) = read_instances("winoground", tmp_path)["winoground"][0]
    assert captions == ("a b", "b a") and image == tmp_path / "data/images/ex_0_img_0.png" and other != image
    for kind in SUGAR_CREPE:
        entry = {"filename": "1.jpg", "caption": f"{kind} right", "negative_caption": "wrong"}
        (tmp_path / f"{kind}.json").write_text(json.dumps({"7": entry}))
    found = read_instances("sugar_crepe", tmp_path)
    assert list(found) == [f"sugar_crepe_{kind}" for kind in SUGAR_CREPE]
    ((images, captions),) = found["sugar_crepe_swap_obj"]
    assert images == (tmp_path / "val2017/1.jpg",) and captions == ("swap_obj right", "wrong")


def test_files_that_are_missing_or_of_another_layout_are_refused(tmp_path: Path):
    for name in COMPOSITIONAL_READERS:
        with pytest.raises(ValueError, match="is missing"):
            read_instances(name, tmp_path)
    (tmp_path / "data").mkdir()
    for text, message in (
        ('{"image_0": "a"}\n', "is not winoground in its authors' format"),
        ("", "holds no instance"),
    ):
        (tmp_path / "data/examples.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_instances("winoground", tmp_path)
