"""PARITY.md: a row for each part of the READMEs' maps, with the differences that tests have measured."""

import json
import re
from pathlib import Path

import pytest
from scripts import ROOT

from shared import presets
from studies.harness import companion, parity


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def rows_of(page: str, folder: str) -> dict[str, list[str]]:
    """{part: cells of its row} in a paper's section."""
    lines = companion.section(page, folder).splitlines()
    rows = [companion.split_row(line) for line in lines if line.startswith("| ")][2:]
    return {part: cells for part, *cells in rows}


def test_the_page_is_that_of_the_committed_differences_and_maps():
    assert Path("PARITY.md").read_text(encoding="utf-8") == parity.page(), "run `make readme`"


@pytest.mark.parametrize("folder", presets.folders())
def test_each_part_has_a_row_that_links_to_the_authors_lines(folder: str):
    rows, readme = rows_of(parity.page(), folder), companion.read(folder)
    assert list(rows) == [row.part for row in readme.rows]
    for row in readme.rows:
        assert rows[row.part][0].count("](https://github.com/") == len(row.places)


def record(test: str, against: str, values: float, gradients: float | None, *names: str, **more) -> dict:
    about = {"functions": [f"protoclip.{name}" for name in names], "date": "2030-01-02", "commit": "abc1234"}
    return about | {"test": test, "against": against, "values": values, "gradients": gradients} | more


def test_the_largest_difference_of_a_row_is_shown(tmp_path: Path):
    """Of values and gradients, golden and live apart; training runs stand in a line of their own."""
    tests = [
        record("small", "golden data", 1e-9, 2e-8, "model.clip_loss"),
        record("large", "golden data", 3e-7, None, "model.clip_loss"),
        record("live", "the authors' code", 0.0, 5e-6, "model.clip_loss"),
        record("trajectory: 200 steps, float64", "the authors' code", 7e-11, None, "train.train_step"),
        record("elsewhere", "golden data", 0.125, None, "model.none", arrays={"values": ["logits", 62.5]}),
        record("elsewhere", "the authors' code", 0.0, None, "model.none"),
    ]
    (tmp_path / "protoclip.json").write_text(json.dumps({"tests": tests}))
    page = parity.page(tmp_path)
    rows = rows_of(page, "protoclip")
    assert rows["InfoNCE"][4:] == ["3.0e-07", "2.0e-08", "0", "5.0e-06", "2030-01-02 abc1234"]
    assert rows["training step"][4:8] == ["-", "-", "200 steps", "-"] and rows["retrieval"][4:] == ["-"] * 5
    section = companion.section(page, "protoclip")
    assert "7.0e-11 (200 steps, float64)" in section and "elsewhere: 1.2e-01 (golden), 0 (live)" in section
    assert re.search(r"^\| \[protoclip\].*\| 1\.2e-01 \(elsewhere, logits, 2e-03 .*\| 5\.0e-06 \(live\) \|", page, re.M)


def test_what_of_a_part_is_compared(tmp_path: Path):
    """Functions that no test of values calls are named, and what of a function is compared if it is not all of it."""
    tests = [
        record("head", "golden data", 0.0, None, "model.projection_head", gradient_left=True),
        record(
            "training", "the authors' code", 0.0, None, "train.train_step", only={"protoclip.train.train_step": "it"}
        ),
        record("rates", "golden data", 0.0, None, "train.learning_rates"),
        record("trajectory: 200 steps, float64", "the authors' code", 0.0, None, "model.ProtoCLIP"),
    ]
    (tmp_path / "protoclip.json").write_text(json.dumps({"tests": tests}))
    rows = rows_of(parity.page(tmp_path), "protoclip")
    heads, step, rates = (
        rows[part] for part in ("projection heads, prototype temperature", "training step", "learning rates")
    )
    assert heads[2] == "1 of 2; without `ProtoCLIP`" and heads[4:6] == ["0", "-"]
    assert step[2] == "1 of 1; `train_step`: only it" and rates[2] == "1 of 1" and rates[4:6] == ["0", "none"]
    readme = companion.read("protoclip")
    how = {row["part"]: row["how"] for row in (parity.shown(row, readme, tests) for row in readme.rows)}
    assert [how[part] for part in ("learning rates", "training step", "K-means")] == [
        "whole",
        "in part",
        "not compared",
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    parity.main(repositories=True)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = {folder: name for folder, name, _ in reversed(printed)}
    assert first["attentive_mask_clip"] == "microsoft/A-CLIP" and first["tldr_reduction"] == "showlab/datacentric.vlp"
    for name in ("RUNS", "KEPT"):
        monkeypatch.setattr(parity, name, tmp_path / name)
    with pytest.raises(ValueError, match="holds no differences"):
        parity.main()
    monkeypatch.chdir(tmp_path)
    for name in ("RUNS/nmtune.json", "RUNS/nmtune_trajectory.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"tests": []}')
    monkeypatch.setattr(parity, "page", lambda: "")
    parity.main()
    assert sorted(path.name for path in (tmp_path / "KEPT").iterdir()) == ["nmtune.json", "nmtune_trajectory.png"]
