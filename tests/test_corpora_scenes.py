"""Scenes are a function of (settings, split, index), with exact masks, disjoint styles, and layouts that other tools
read."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scene_corpora import SETTING, bank, built, config, corpus  # noqa: F401
from torch.utils.data import DataLoader

from shared import data, evalsets, tars
from studies.corpora import captions, emoji, emoji_sources, scenes, sprites


def equal(one: scenes.Scene, other: scenes.Scene) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_scene_is_a_function_of_setting_split_and_index(bank: sprites.Sprites) -> None:
    first, again = (scenes.Scenes(SETTING, sprites=bank) for _ in range(2))
    drawn = [first.draw(index) for index in range(20)]
    assert all(equal(again.draw(index), drawn[index]) for index in reversed(range(20)))
    assert len({scene.pixels.tobytes() for scene in drawn}) == 20
    other = scenes.Scenes(dataclasses.replace(SETTING, seed=1), sprites=bank)
    assert not equal(other.draw(3), drawn[3]) and not equal(
        scenes.Scenes(SETTING, "id", sprites=bank).draw(3), drawn[3]
    )


def test_a_mask_is_where_leaving_the_emoji_out_changes_the_picture(bank: sprites.Sprites) -> None:
    shown = scenes.Scenes(SETTING, "ood", sprites=bank)
    pixels, changed_pixels = 0, 0
    for index in range(60):
        scene = shown.draw(index)
        for i, concept in enumerate(scene.concepts):
            without = shown.draw(index, without=i)
            mask, changed = scene.labels == concept, (scene.pixels != without.pixels).any(-1)
            assert not (changed & ~mask).any() and mask.any(), "only what the mask says may change"
            assert np.array_equal(without.labels, np.where(mask, -1, scene.labels))
            pixels, changed_pixels = pixels + mask.sum(), changed_pixels + (mask & changed).sum()
            top, left, side = scene.boxes[i]
            box = np.zeros_like(mask)
            box[top : top + side, left : left + side] = True
            assert not (mask & ~box).any()
    assert changed_pixels > 0.98 * pixels, "the rest has the colour of what is under it"


def test_captioned_emoji_do_not_overlap_however_many(bank: sprites.Sprites) -> None:
    crowded = scenes.Setting(captioned=(4, 4), captioned_size=(0.4, 0.5), concepts=10, image_size=40)
    shown = scenes.Scenes(crowded, sprites=bank)
    for index in range(40):
        cover = np.zeros((40, 40), int)
        for top, left, side in shown.draw(index).boxes:
            assert min(top, left) >= 0 and max(top, left) + side <= 40
            cover[top : top + side, left : left + side] += 1
        assert cover.max() == 1


def test_styles_and_drawings_are_apart(bank: sprites.Sprites) -> None:
    styles = ("noto", "twemoji", "openmoji", "emojione")
    setting = dataclasses.replace(SETTING, styles=styles, min_drawings=3)
    of_concept, clutter = scenes.choose(setting, bank)
    for of in [*of_concept.values(), clutter]:
        found = {split: {bank.styles[row] for row in of[split]} for split in scenes.SPLITS}
        assert found["ood"] == {emoji_sources.OOD_STYLE}
        assert found["train"] | found["id"] <= set(styles) and found["train"] and found["id"]
        assert not set(of["train"]) & set(of["id"])
    names = [one.name for one in of_concept]
    assert not {one.name for one in bank.emoji if one.group == "symbols"} & set(names)
    fewer, _ = scenes.choose(dataclasses.replace(setting, concepts=6), bank)
    assert list(fewer) == list(of_concept)[:6], "fewer concepts are a subset"


def test_clutter_and_ground_can_be_none(bank: sprites.Sprites) -> None:
    plain = scenes.Setting(clutter=(0, 0), ground=0.0, concepts=10)
    share = []
    for count in (0, 3, 9):
        shown = scenes.Scenes(dataclasses.replace(plain, clutter=(count, count)), sprites=bank)
        drawn = [shown.draw(index) for index in range(20)]
        share.append(np.mean([(scene.pixels[scene.labels < 0] < 255).any(-1).mean() for scene in drawn]))
    assert share[0] == 0 < share[1] < share[2]
    strength = []
    for ground in (0.0, 0.2, 1.0):
        shown = scenes.Scenes(dataclasses.replace(plain, ground=ground), sprites=bank)
        strength.append(shown.draw_ground(np.random.default_rng(0)).std())
    assert strength[0] == 0 < strength[1] < strength[2]


def test_noise_and_near_copies(bank: sprites.Sprites) -> None:
    setting = dataclasses.replace(SETTING, captioned=(2, 2), noise=0.25)
    clean, noisy = (scenes.Scenes(s, sprites=bank) for s in (dataclasses.replace(setting, noise=0.0), setting))
    drawn = [noisy.draw(index) for index in range(200)]
    wrong = [scene for scene in drawn if scene.said != scene.concepts]
    assert 25 < len(wrong) < 75 and not any(set(scene.said) & set(scene.concepts) for scene in wrong)
    assert np.array_equal(drawn[7].pixels, clean.draw(7).pixels), "noise changes captions alone"
    names = [noisy.classnames[c] for c in wrong[0].said]
    assert noisy.caption(wrong[0], 0) == " and ".join(names)

    copied = scenes.Scenes(dataclasses.replace(SETTING, distinct=5, skew=1.5), sprites=bank)
    originals = [copied.draw(index).original for index in range(300)]
    counts = np.bincount(originals)
    assert originals[:5] == list(range(5)) and len(counts) == 5 and counts[0] > counts[4]
    one, copy = (copied.draw(index) for index in (0, originals.index(0, 5)))
    assert one.concepts == copy.concepts and not np.array_equal(one.pixels, copy.pixels)
    offset = np.array(copy.boxes) - np.array(one.boxes)
    assert (offset == offset[0]).all() and abs(offset).max() <= SETTING.image_size // 16


def test_items_make_batches(bank: sprites.Sprites) -> None:
    shown = scenes.Scenes(SETTING, samples=6, sprites=bank)
    pixels, labels, texts = next(iter(DataLoader(shown, 4)))
    assert pixels.shape == (4, 3, 48, 48) and pixels.dtype == torch.uint8 and labels.shape == (4, 48, 48)
    assert len(texts) == 4 and len(shown) == 6
    with pytest.raises(IndexError):
        shown[6]


def test_milliseconds_a_scene(bank: sprites.Sprites) -> None:
    shown = scenes.Scenes(scenes.Setting(concepts=10), sprites=bank)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        for index in range(100):
            shown.draw(index)
        seconds.append(time.process_time() - start)
    print(f"\n{10 * min(seconds):.2f} ms a scene of 48 pixels")
    assert min(seconds) < 0.5, "5 ms a scene"


def test_shards_and_sets_are_read_back(built: Path, config: scenes.Config, bank: sprites.Sprites) -> None:
    train = scenes.Scenes(SETTING, sprites=bank)
    pairs = data.open_pairs(str(built / "train"))
    assert len(pairs) == 12 and not pairs.broken
    for index, (_, about) in enumerate(tars.descriptions([str(built / "train/00000.tar")])):
        scene, pair = train.draw(index), pairs.read(index)
        assert np.array_equal(np.asarray(pair.image), scene.pixels) and pair.caption == train.caption(scene, index)
        assert about["names"] == [train.classnames[c] for c in scene.concepts] and about["caption"] == pair.caption
        assert set(about["captions"]) == set(captions.FORMS)
    content = dict(tars.read_tar(built / "train/00000.tar", []))
    (built.parent / "mask.png").write_bytes(content["000000003.mask.png"])
    mask = np.asarray(Image.open(built.parent / "mask.png"))
    assert np.array_equal(np.where(mask == 255, -1, mask.astype(int)), train.draw(3).labels)

    for split in ("id", "ood"):
        names = evalsets.EvalSet(built / f"eval/names_{split}", np.asarray)
        assert [label for _, _, label in names] == [index % 10 for index in range(11)]
        assert names.classnames == train.classnames
        assert sum(1 for _ in evalsets.EvalSet(built / f"eval/names_{split}", np.asarray, "train")) == 11
        for name in (f"retrieval_{split}", f"retrieval_long_{split}"):
            texts = [texts for _, _, texts in evalsets.EvalSet(built / "eval" / name, np.asarray)]
            assert len(texts) == 11 == len({tuple(text) for text in texts})
        folder = built / f"eval/patchdis_{split}"
        assert (folder / "classnames.txt").read_text().splitlines() == train.classnames
        shown = scenes.Scenes(SETTING, split, sprites=bank)
        for file in (folder / "masks").iterdir():
            found = {shown.classnames[c] for c in np.unique(np.asarray(Image.open(file))) if c != 255}
            assert 2 <= len(found) <= 3 and (folder / "images" / file.name).is_file()


def test_manifest_says_what_was_made(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["counts"]["train"] == 12 and manifest["counts"]["concepts"] == 10
    assert manifest["packages"]["@iconify-json/noto"]["licence"] == "Apache-2.0"
    assert manifest["packages"]["@iconify-json/fluent-emoji-flat"]["author"]
    shards = {path.relative_to(built).as_posix() for path in built.rglob("*.tar")}
    assert shards == set(manifest["sha256"]) and manifest["setting"]["captioned"] == [2, 3]
    assert emoji.sha256(built / "train/00000.tar") == manifest["sha256"]["train/00000.tar"]


def test_building_again(built: Path, config: scenes.Config, tmp_path: Path, monkeypatch, capsys) -> None:
    scenes.main(dataclasses.replace(config, out=tmp_path / "again"))
    for file in [path.relative_to(built) for path in built.rglob("*") if path.is_file()]:
        assert (built / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    monkeypatch.setattr(scenes, "write", lambda *_: pytest.fail("built again"))
    scenes.main(config)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"ground \(was 1.0, now 0.5\)"):
        scenes.main(dataclasses.replace(config, ground=0.5))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a corpus"):
        scenes.main(dataclasses.replace(config, out=tmp_path / "other"))


def test_an_interrupted_build_leaves_nothing(config: scenes.Config, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "write_masks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scenes.main(dataclasses.replace(config, out=tmp_path / "scenes"))
    assert {path.name for path in tmp_path.iterdir()} <= {".scenes.lock"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"captioned": (0, 1)}, "--captioned must"),
        ({"clutter": (3, 2)}, "--clutter must be two numbers"),
        ({"captioned_size": (0.01, 0.5)}, "--captioned-size must be two shares"),
        ({"captioned": (1, 9)}, "48 x 48"),
        ({"noise": 1.5}, "--noise must lie between 0 and 1"),
        ({"styles": ("noto", "fluent-emoji-flat")}, "--styles .*not fluent-emoji-flat"),
        ({"image_size": 4}, "--image-size must be at least 8"),
        ({"concepts": 500}, "4 drawings"),
        ({"clutter_groups": ("flags",)}, "--clutter-groups flags"),
    ],
)
def test_settings_that_cannot_be_drawn(bank: sprites.Sprites, change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        scenes.Scenes(dataclasses.replace(SETTING, **change), sprites=bank)


def test_errors_of_the_command_line(config: scenes.Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make data"):
        scenes.main(dataclasses.replace(config, out=tmp_path / "a", corpus=tmp_path))
    with pytest.raises(ValueError, match="--samples must be at least 1"):
        scenes.main(dataclasses.replace(config, out=tmp_path / "a", samples=0))
    assert list(tmp_path.iterdir()) == []
