"""docs/tour.ipynb: its code runs from top to bottom, here with a training of a few steps."""

import dataclasses
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import small_models  # noqa: F401  (the models named test)

from protoclip import config

ROOT = Path(__file__).parent.parent
CELLS = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))["cells"]
SHORT = dict(image_size=16, episodes=2, episode_size=128, batch_size=64, warmup=2, eval_every=1)


def test_the_notebook_runs(embedded_corpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for folder in ("data", "results"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    row, settings = config.PRESETS["emoji-clip"]
    monkeypatch.setitem(config.PRESETS, "emoji-clip", (row, dataclasses.replace(settings, **SHORT)))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    grid, curve, study = map(plt.figure, plt.get_fignums()[-3:])
    plt.close("all")
    assert len(grid.axes) == 8 and all(axis.images and axis.get_title() for axis in grid.axes)
    assert len(curve.axes[0].lines[0].get_xdata()) == 2 and study.axes[0].images
    claims = json.loads((ROOT / "results/protoclip.json").read_text())["claims"]
    assert claims[0]["primary"] and claims[0]["verdict"] in capsys.readouterr().out


def test_no_outputs_are_stored() -> None:
    assert all(not cell.get("outputs") for cell in CELLS)
