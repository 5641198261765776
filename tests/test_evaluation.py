"""Tables, and measurements kept beside a checkpoint."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared import evaluation


def test_tables_are_markdown():
    lines = evaluation.table([{"a": 1, "b": "x"}, {"a": 22, "b": "y"}]).splitlines()
    assert lines == ["| a  | b |", "| -- | - |", "| 1  | x |", "| 22 | y |"]


@dataclass
class Config:
    runs: tuple[str, ...]
    report: str | None = None
    batch_size: int = 8
    device: str = "cpu"


def test_a_run_is_measured_once_until_it_or_the_settings_change(tmp_path: Path):
    run, calls = tmp_path / "arm-seed0", []
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(b"weights")
    (run / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.5}\n')
    os.utime(run / "checkpoint.pt", (1, 1))

    def measure(folder: Path) -> dict[str, float]:
        calls.append(folder)
        return {"top1": 12.5}

    for cfg in (Config((str(run),)), Config((str(run),), device="cuda"), Config((str(run),), batch_size=9)):
        assert evaluation.measured_run(run, cfg, (), measure) == {"top1": 12.5, "seconds": 2.5}
    assert calls == [run, run]  # another device changes no number, another batch size might
    assert json.loads((run / "results.json").read_text())["metrics"]["top1"] == 12.5
    assert "| top1" in (run / "results.md").read_text()
    os.utime(run / "checkpoint.pt")
    evaluation.measured_run(run, Config((str(run),), batch_size=9), (), measure)
    assert len(calls) == 3


def test_runs_are_named_and_reports_replace_nothing_else(tmp_path: Path):
    with pytest.raises(ValueError, match="name at least one checkpoint"):
        evaluation.evaluate_runs(Config(()), lambda path: {}, {}, "checkpoint")
    with pytest.raises(ValueError, match=r"notes\.md should end in \.json"):
        evaluation.evaluate_runs(Config(("run",), report="notes.md"), lambda path: {}, {})


def test_a_report_without_its_study_is_one_sentence():
    with pytest.raises(ValueError, match="--report compares arms as no_paper/study.py says"):
        evaluation.compare("no_paper", ["run"], [{}], "results.json")
