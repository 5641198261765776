"""Models to evaluate, and the foreground among kept patches."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import small_models  # noqa: F401  (the models named test)
import torch
from attentive_mask_clip_runs import attention_as_in_training  # noqa: F401
from PIL import Image
from scene_corpora import SETTING, bank, built, config, corpus  # noqa: F401

from attentive_mask_clip import kept
from attentive_mask_clip.eval import load_model
from attentive_mask_clip.kept import images_and_objects, object_masks
from attentive_mask_clip.model import create_model
from shared import tars
from shared.evalsets import EvalSet
from studies.corpora import scenes


def test_masks_of_scenes(built: Path, bank):  # noqa: F811
    """The mask of each sample shows where the captioned emoji is."""
    eval_set = EvalSet(built / "eval/names_ood", np.asarray)
    one = dataclasses.replace(SETTING, captioned=(1, 1))
    masks, shown = object_masks(eval_set), scenes.Scenes(one, "ood", sprites=bank)
    assert masks.shape == (11, SETTING.image_size, SETTING.image_size) and masks.dtype == torch.float32
    for index, (mask, (_, pixels, _)) in enumerate(zip(masks, eval_set, strict=True)):
        scene = shown.draw(index, (index % 10,))
        assert np.array_equal(pixels, scene.pixels) and np.array_equal(mask.numpy() > 0, scene.labels >= 0)


def test_masks_that_do_not_fit_are_refused(tmp_path: Path):
    """One size for each sample, in pixels of the images; 0: the file is damaged, None: there is none."""
    model = create_model("aclip", "test")

    def png(side: int) -> bytes:
        file = io.BytesIO()
        Image.new("L", (side, side), 255).save(file, "PNG")
        return file.getvalue()

    def shown(*sides: int | None, model=model) -> tuple[torch.Tensor, torch.Tensor]:
        masks = [{} if side is None else {"mask.png": png(side) if side else b"?"} for side in sides]
        tars.write_split(tmp_path / "test", [{"png": png(40), "cls": "0"} | mask for mask in masks])
        return images_and_objects(str(tmp_path), model, 2)

    (tmp_path / "classnames.txt").write_text("a\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}\n")
    assert [each.shape for each in shown(40, 40)] == [(2, 3, 40, 40), (2, 40, 40)]
    assert shown(None, None)[1].shape == (2, 40, 40)
    for sides, message in {
        (48, 48): r"\(2, 48, 48\) .*\(2, 40, 40\)",
        (40, None): r"\(1, 40, 40\) .*\(2, 40, 40\)",
        (40, 48): r"0.tar .*\(48, 48\).*\(40, 40\)",
        (40, 0): "0.tar is no mask",
    }.items():
        with pytest.raises(ValueError, match=message):
            shown(*sides)
    with pytest.raises(ValueError, match="2x2"):
        shown(40, model=create_model("clip", "test", image_size=25))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    model = create_model("clip", "test")
    model.logit_scale.data.fill_(float("nan"))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="nan.pt .*logit_scale"):
        load_model(tmp_path / "nan.pt", "clip", "test")


def test_kept_foreground_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Three images of 4 x 4 patches of 2 x 2 pixels, of which masks keep 5; the last image has no foreground."""
    covered = {0: {1: 1, 2: 2, 5: 4, 15: 3}, 1: {0: 2}}  # image: {patch: foreground pixels}
    alpha, model = torch.zeros(3, 8, 8), torch.nn.Identity()
    for image, pixels in covered.items():
        for patch, count in pixels.items():
            y, x = 2 * (patch // 4), 2 * (patch % 4)
            alpha[image, y : y + 2, x : x + 2] = torch.tensor([[0.1, 3.0], [1.0, 0.5]]) * (
                torch.arange(4).view(2, 2) < count
            )
    scores = torch.arange(16.0).repeat(3, 1)
    scores[0, 5] = 99
    model.block, model.patch_size = 1, 2
    monkeypatch.setattr(kept, "attention_scores", lambda *_: scores)
    # kept: attentive {5, 12 to 15} and twice {11 to 15}; high_drop {0 to 4}; centre {5, 6, 9, 10 and, of equals, 1}
    expected = {
        "attentive_share": 100 * 2 / 15, "attentive_recall": 100 * 2 / 5, "attentive_pixels": 100 * (7 / 10 + 0) / 2,
        "high_drop_share": 100 * 3 / 15, "high_drop_recall": 100 * 3 / 5, "high_drop_pixels": 100 * (3 / 10 + 1) / 2,
        "centre_share": 100 * 2 / 15, "centre_recall": 100 * 2 / 5, "centre_pixels": 100 * (5 / 10 + 0) / 2,
        "random_share": 100 * 5 / 48, "random_recall": 100 * 5 / 16, "random_pixels": 100 * 5 / 16,
    }  # fmt: skip
    assert kept.kept_foreground(model, torch.zeros(3, 3, 8, 8), alpha, 0.25) == pytest.approx(expected)
    assert model.training


def test_scores_are_of_the_tower_that_scores_in_training():
    model, images = create_model("aclip", "test").eval(), torch.randn(257, 3, 40, 40)
    torch.nn.init.normal_(model.visual_ema.blocks[0].attn.qkv.weight)
    found = kept.attention_scores(model, images)
    with torch.no_grad():
        expected = model.visual_ema(images, return_scores=True)[1]
        assert not torch.allclose(model.visual(images, return_scores=True)[1], expected, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_foreground_is_what_is_not_white():
    pixels = torch.ones(1, 3, 1, 3)
    pixels[0, 1, 0, 1], pixels[0, :, 0, 2] = 0.97, 0.99
    mean, std = (torch.tensor(each)[:, None, None] for each in (kept.MEAN, kept.STD))
    assert kept.foreground((pixels - mean) / std).tolist() == [[[0, 1, 0]]]
