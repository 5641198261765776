"""Scenes with a label for each pixel: exact masks; a finished folder is as asked for, or is refused."""

from pathlib import Path

import pytest
from scripts import ROOT
from test_lexvla_train import SCRIPT, SECONDS, SHARDS, folder  # noqa: F401

from lexvla import eval as evaluation
from lexvla import scenes


def test_finished_scenes_are_what_is_asked_for_or_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    out, corpus = folder / "scenes", ROOT / "data/emoji"
    (folder / "scenes.tmp/images").mkdir(parents=True)
    (folder / "scenes.tmp/images/00009.png").write_text("of a run that was killed")
    scenes.main(out, corpus, 3)
    assert sorted(path.name for path in (out / "images").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    scenes.main(out, corpus, 3)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings: scenes \(was 3, now 4\)"):
        scenes.main(out, corpus, 4)
    monkeypatch.setattr(scenes.emoji, "SEED", 1)
    with pytest.raises(ValueError, match=r"other settings: seed \(was 0, now 1\)"):
        scenes.main(out, corpus, 3)
    (out / "scenes.json").unlink()  # an older folder, which has so many
    scenes.main(out, corpus, 3)
    with pytest.raises(ValueError, match=r"scenes \(was 3, now 4\)"):
        scenes.main(out, corpus, 4)


@pytest.fixture(scope="module")
def small_scenes(folder: Path) -> Path:
    scenes.main(folder / "four-scenes", ROOT / "data/emoji", 4)
    return folder / "four-scenes"


def test_scenes_have_exact_masks(small_scenes: Path):
    names = (small_scenes / "classnames.txt").read_text().splitlines()
    found = set()
    for pixels, mask, ignore in evaluation.labelled_images(str(small_scenes), 96, "x.pt"):
        labels = set(mask.unique().tolist()) - {ignore}
        assert 2 <= len(labels) <= 4 and pixels.shape == (1, 3, 96, 96) and mask.shape == (1, 96, 96)
        drawn = (pixels[0] < -0.1).any(0)  # covered by more than half, so with a label
        assert not (drawn & (mask[0] == ignore)).any()
        found |= labels
    assert found == set(range(len(names)))
