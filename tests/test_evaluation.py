"""Tables of metrics, and metrics cached beside a checkpoint."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shared import data, evaluation, export


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


def test_a_set_that_an_older_one_replaces_has_changed(tmp_path: Path):
    """As mv, rsync and tar leave it: the new file has the old time that it was made at."""
    source, calls = tmp_path / "0.tar", []
    for content, time in ((b"one", 9), (b"other", 3), (b"other", 3)):
        source.write_bytes(content)
        os.utime(source, (time, time))
        evaluation.measured("paper", tmp_path / "results.json", {}, [source], lambda: calls.append(1) or {})
    assert len(calls) == 2


def test_images_of_a_table_change_with_their_files(tmp_path: Path):
    """Its fingerprint has names and captions only; shards are compared by their own."""
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "pairs.tsv").write_text(f"title\tfilepath\none\t{tmp_path}/a.png\n")
    pairs = data.open_pairs(str(tmp_path / "pairs.tsv"))
    first = evaluation.images_of(pairs)
    assert first == evaluation.images_of(pairs) and first.startswith(pairs.fingerprint)
    (tmp_path / "a.png").write_bytes(b"another")
    assert evaluation.images_of(pairs) != first
    assert evaluation.images_of(SimpleNamespace(fingerprint="abc")) == "abc"


def test_folders_of_one_name_are_refused():
    evaluation.check_names("sets", ["a/x", "a/y"])
    with pytest.raises(ValueError, match="--sets a/x and b/x have the same name: evaluate one at a time"):
        evaluation.check_names("sets", ["a/x", "b/x"])


def test_a_run_is_measured_again_if_the_prompts_change(tmp_path: Path):
    """Class names and templates are files of a set; results with other prompts do not replace those with its own."""

    @dataclass
    class Prompted(Config):
        prompts: str = "set"

    run, sets, folders = tmp_path / "arm-seed0", tmp_path / "pets", []
    for folder in (run, sets):
        folder.mkdir()
    (run / "checkpoint.pt").write_bytes(b"weights")
    measure = lambda folder: folders.append(folder) or {"top1": 12.5}  # noqa: E731
    templates = sets / "zeroshot_classification_templates.txt"
    templates.write_text("{c}")
    for file in (templates, run / "checkpoint.pt"):
        os.utime(file, (1, 1))
    for _ in range(2):
        evaluation.measured_run(run, Prompted((str(run),)), (sets,), measure)
    os.utime(templates)
    evaluation.measured_run(run, Prompted((str(run),)), (sets,), measure)
    evaluation.measured_run(run, Prompted((str(run),), prompts="slip"), (sets,), measure)
    assert folders == [run, run, run / "slip-prompts"]


def test_a_run_is_measured_again_if_the_code_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The Python files of its paper and of shared/, but not those of other papers."""
    monkeypatch.setattr(evaluation, "ROOT", tmp_path)
    source, measured_after = tmp_path / "weights", []
    source.write_bytes(b"weights")
    os.utime(source, (1, 1))
    for name in ("paper/train.py", "other/train.py", "studies/harness/run.py", "paper/notes.md"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {name}")
        evaluation.measured(
            "paper", tmp_path / "results.json", {}, [source], lambda name=name: measured_after.append(name) or {}
        )
    assert measured_after == ["paper/train.py", "studies/harness/run.py"]


def test_results_name_the_model_that_was_trained(tmp_path: Path):
    """--model is for checkpoint files that do not name theirs; its default says nothing about a run folder."""

    @dataclass
    class OfFiles(Config):
        model: str = "RN50"

    (tmp_path / "checkpoint.pt").write_bytes(b"weights")
    for trained, named in ((None, "RN50"), ("ViT-emoji", "ViT-emoji")):
        if trained:
            (tmp_path / "config.json").write_text(json.dumps({"model": trained}))
        evaluation.measured_run(tmp_path, OfFiles((str(tmp_path),)), (), lambda folder: {"top1": 1.0})
        assert json.loads((tmp_path / "results.json").read_text())["setting"]["model"] == named


def test_runs_are_named_and_reports_replace_nothing_else(tmp_path: Path):
    with pytest.raises(ValueError, match="name at least one checkpoint"):
        evaluation.evaluate_runs(Config(()), lambda path: {}, {}, "checkpoint")
    with pytest.raises(ValueError, match=r"notes\.md should end in \.json"):
        evaluation.evaluate_runs(Config(("run",), report="notes.md"), lambda path: {}, {})


def test_runs_of_another_paper_are_refused(tmp_path: Path):
    """The error says which script evaluates them; papers that compare with others accept them."""
    torch.save({"paper": "tinyclip"}, tmp_path / "checkpoint.pt")
    cfg = Config((str(tmp_path),))
    with pytest.raises(ValueError, match="is a run of tinyclip: use 'python -m tinyclip.eval"):
        evaluation.evaluate_runs(cfg, lambda path: {}, {})
    with pytest.raises(ValueError, match="is a run of tinyclip"):
        export.single(cfg)
    assert evaluation.evaluate_runs(cfg, lambda path: {"top1": 1.0}, {}, foreign=True) == [{"top1": 1.0}]


def test_a_report_without_its_study_is_one_sentence():
    with pytest.raises(ValueError, match="--report needs no_paper/study.py"):
        evaluation.compare("no_paper", ["run"], [{}], "results.json")


def test_what_was_measured_is_shown_as_tables():
    """Metrics with headings come first; sets with the same metrics share a table along the longer side; other metrics
    of the embedded corpus are left out."""
    metrics = {"names_ood/top1": 3.0, "names_ood/top5": 9.0, "average": 4.5, "flickr/R@1": 37.6, "flickr/R@5": 60.0}
    metrics |= {f"{name}/top1": 50.25 for name in ("cars", "pets")} | {"language_de/R@1": 1.0, "concepts": {"a": 1}}
    shown = evaluation.tables(metrics, {"names_ood/top1": "names OOD", "seconds": "seconds"}, {"names_ood"})
    assert [part.replace(" ", "").splitlines() for part in shown.split("\n\n")] == [
        ["|metric|value|", "|---------|-----|", "|namesOOD|3.00|", "|average|4.50|"],
        ["|metric|flickr|", "|------|------|", "|R@1|37.60|", "|R@5|60.00|"],
        ["|set|top1|", "|----|-----|", "|cars|50.25|", "|pets|50.25|"],
    ]


@dataclass
class Sets(Config):
    sets: tuple[str, ...] = ("data/ours",)


def test_console_says_what_was_measured_and_where_it_is(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    """One run, or other sets than the embedded corpus: tables. Several runs on the embedded corpus: one line each."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data/ours", "imagenet", "run", "other"):
        Path(folder).mkdir(parents=True)
    measure = lambda path: {"ours/top1": 1.0, "ours/top5": 2.0, "imagenet/top1": 61.4}  # noqa: E731
    for cfg, lines in (
        (Sets(("run",)), ["run:", "| metric | value |", "| top-1  | 1.00  |", "all metrics: run/results.md"]),
        (Sets(("run", "other")), ["run: top-1 1.00; all metrics: run/results.md"]),
        (Sets(("a.pt", "other"), sets=("imagenet",)), ["| top1   | 61.40    |", "all metrics: a.eval/results.md"]),
        (Sets(("RN50@openai",), sets=("imagenet",)), ["all metrics: runs/tests/RN50@openai/results.md"]),
    ):
        evaluation.evaluate_runs(cfg, measure, {"ours/top1": "top-1"})
        printed = capsys.readouterr().out.splitlines()
        assert set(lines) <= set(printed), printed
        assert not any("top5" in line for line in printed) or cfg.sets == ("imagenet",)


def test_weights_by_name_are_kept_in_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    measure = lambda folder: calls.append(folder) or {"top1": 12.5}  # noqa: E731
    for _ in range(2):
        assert evaluation.measured_run("RN50@openai", Config(("RN50@openai",)), (), measure) == {"top1": 12.5}
    kept = Path("runs/tests/RN50@openai")
    assert calls == [kept] and "| top1" in (kept / "results.md").read_text()
    assert json.loads((kept / "results.json").read_text())["metrics"] == {"top1": 12.5}
