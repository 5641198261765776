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


def test_sets_of_a_run(tmp_path: Path):
    """Those that are named, else the run's eval_set, else what was held out from its data; a file has none."""
    run, held_out = tmp_path / "run", tmp_path / "mine/eval/held_out"
    run.mkdir()
    for shards in ("train", "train/{00000..00003}.tar"):
        (run / "config.json").write_text(json.dumps({"data": f"{tmp_path}/mine/{shards}", "eval_set": ""}))
        assert evaluation.sets_of(run) == ()
        held_out.mkdir(parents=True)
        assert evaluation.sets_of(run) == evaluation.needed(run, ()) == (str(held_out),)
        assert evaluation.sets_of(run, ["named"]) == ("named",)
        held_out.rmdir()
    held_out.mkdir()
    for exists in (False, True):
        (run / "config.json").write_text(json.dumps({"data": f"{tmp_path}/mine/train", "eval_set": f"{tmp_path}/cars"}))
        assert evaluation.sets_of(run) == ((f"{tmp_path}/cars" if exists else str(held_out)),)
        (tmp_path / "cars").mkdir(exist_ok=True)
    (run / "model.pt").touch()
    for name, words in (("model.pt", "model.pt .* pass --sets"), ("absent.pt", "no checkpoint at .*absent.pt")):
        with pytest.raises(ValueError, match=words):
            evaluation.needed(run / name, ())


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


CODE = {
    "paper/eval.py": "import torch\n\nfrom paper.model import Model\nfrom shared import cli, zeroshot",
    "paper/model.py": "class Model:\n    width = 1",
    "paper/train.py": "from paper.model import Model",
    "shared/cli.py": "def main():\n    import shared.run",
    "shared/run.py": "SEED = 1",
    "shared/zeroshot.py": "def top1(x):\n    return x",
    "shared/presets.py": "LIST = []",
    "studies/paper.py": "from paper import eval",
}


@pytest.mark.parametrize(
    ("file", "content", "again"),
    [
        ("paper/eval.py", "from paper.model import Model\nfrom shared import cli, zeroshot", True),
        ("paper/model.py", "class Model:\n    width = 2", True),
        ("shared/zeroshot.py", "def top1(x):\n    return 100 * x", True),
        ("shared/run.py", "SEED = 2", True),  # which cli.py imports
        ("shared/run.py", None, True),
        ("shared/__init__.py", "import os", True),
        ("shared/presets.py", "LIST = [1]", False),  # which nothing imports
        ("paper/train.py", "from paper.model import Model as Trained", False),
        ("studies/paper.py", "from paper import model", False),
        ("shared/run.py", "# The seed of every run.\nSEED = (\n    1\n)", False),
        ("shared/cli.py", '"""Map."""\ndef main():\n    """Run it."""\n    import shared.run  # late', False),
        ("paper/model.py", 'class Model:\n    """Towers."""\n\n    width = 1', False),
    ],
)
def test_a_run_is_measured_again_if_what_computes_its_metrics_changes(
    file: str, content: str | None, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The paper's eval.py and model.py and what they import, but not comments, docstrings, layout and other modules."""
    monkeypatch.setattr(evaluation, "ROOT", tmp_path)
    calls: list[int] = []

    def measured() -> None:
        evaluation.measured("paper", tmp_path / "results.json", {}, [], lambda: calls.append(1) or {})

    for name, code in CODE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    measured()
    measured()
    assert len(calls) == 1
    (tmp_path / file).write_text(content) if content is not None else (tmp_path / file).unlink()
    measured()
    assert len(calls) == 1 + again


def test_a_study_is_measured_again_if_its_own_code_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluation, "ROOT", tmp_path)
    found = set()
    for name, code in [*CODE.items(), ("studies/paper.py", "from paper import eval\nD = 1"), ("paper/model.py", "")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
        found.add(evaluation.code_of("studies.paper"))
    assert len(found) == 4  # none, as it was written, and after the two changes


def test_code_of_an_installed_project_has_no_module_of_the_packages_beside_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(evaluation, "ROOT", tmp_path)
    found = set()
    for name, code in {
        "paper/model.py": "import other.part",
        "paper/eval.py": "",
        "other/part.py": "from . import x",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
        found.add(evaluation.code_of("paper"))
    assert len(found) == 1 + 1  # without eval.py, with it


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


def test_runs_are_named():
    with pytest.raises(ValueError, match="at least one checkpoint"):
        evaluation.evaluate_runs(Config(()), lambda path: {}, {}, "checkpoint")


def test_runs_of_another_paper_are_refused(tmp_path: Path):
    """The error says which script evaluates them; papers that compare with others accept them."""
    torch.save({"paper": "tinyclip"}, tmp_path / "checkpoint.pt")
    cfg = Config((str(tmp_path),))
    with pytest.raises(ValueError, match="python -m tinyclip.eval"):
        evaluation.evaluate_runs(cfg, lambda path: {}, {})
    with pytest.raises(ValueError, match="run of tinyclip"):
        export.single(cfg)
    assert evaluation.evaluate_runs(cfg, lambda path: {"top1": 1.0}, {}, foreign=True) == [{"top1": 1.0}]


def test_what_was_measured_is_shown_as_a_table():
    """Metrics with headings come first; others of the sets of headings, and of single languages, are left out."""
    metrics = {"names_ood/top1": 3.0, "names_ood/top5": 9.0, "average": 4.5, "flickr/R@1": 37.6}
    metrics |= {"cars/top1": 50.25, "language_de/R@1": 1.0, "concepts": {"a": 1}}
    shown = evaluation.tables(metrics, {"names_ood/top1": "names OOD", "seconds": "seconds"})
    assert shown.replace(" ", "").splitlines()[2:] == [
        "|namesOOD|3.00|", "|average|4.50|", "|flickr/R@1|37.60|", "|cars/top1|50.25|"
    ]  # fmt: skip


def test_weights_by_name_are_kept_in_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    measure = lambda folder: calls.append(folder) or {"top1": 12.5}  # noqa: E731
    for _ in range(2):
        assert evaluation.measured_run("RN50@openai", Config(("RN50@openai",)), (), measure) == {"top1": 12.5}
    kept = Path("runs/tests/RN50@openai")
    assert calls == [kept] and "| top1" in (kept / "results.md").read_text()
    assert json.loads((kept / "results.json").read_text())["metrics"] == {"top1": 12.5}
