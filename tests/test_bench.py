"""Tables of the benches: merging rows of several thread settings, measuring under each setting, seconds to a floor."""

import ast
import collections
import contextlib
import dataclasses
import importlib
import json
import math
import multiprocessing
import re
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from scripts import finished

from protoclip.config import PRESETS
from shared import run
from studies import bench
from studies.bench import __main__ as every
from studies.bench import baselines
from studies.bench import concept_frequency as frequency
from studies.bench import data as reading
from studies.harness import runner

ROOT = Path(__file__).parents[1]
SCRIPT = "slow"
BENCH = """
    import os, time
    import torch
    import studies.bench
    from studies.bench import arguments, bench, print_row, race

    SETTINGS = {"passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}, "one": {"OMP_NUM_THREADS": "1"}}
    studies.bench.thread_settings = lambda: SETTINGS

    def measure(options):
        print("a library talks")
        seconds = 1.0 if os.environ.get("OMP_WAIT_POLICY") else 3.0
        print_row("alone", [(seconds * torch.get_num_threads(), None)], "bounded", os.environ["OMP_NUM_THREADS"])
        print_row(*race("pair", lambda: time.sleep(0.01), lambda: time.sleep(0.03), options.repetitions), "> 1")

    if __name__ == "__main__":
        options = arguments("A bench.", 2, ("authors/code", "abc", "src")).parse_args()
        bench(measure, options, "theirs", lambda options: f"then {options.repetitions}")
"""


def row(ours: list[float], theirs: list[float] = (), name: str = "step", note: str = "", unit: str = "s") -> dict:
    return {"row": name, "ours": ours, "theirs": list(theirs), "target": ">= 1", "note": note, "unit": unit}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_side_counts_at_its_best_setting():
    lines = bench.merged({
        "2 threads": [row([0.2, 0.3, 0.4], [0.9, 1.0, 1.2], note="slow"), row([5.0], name="alone")],
        "2 threads, passive": [row([0.1, 0.2, 0.25], [2.0, 2.0, 2.0], note="best of ours"), row([7.0], name="alone")],
        "1 thread": [row([0.4, 0.5, 0.6], [1.0, 1.1, 1.5], note="slower"), row([4.0], name="alone")],
    })  # fmt: skip
    step, alone = map(cells, lines)
    assert step[:6] == ["step", "200.0 ms", "1.00 s", "5.00", "3.60 .. 12.00", "3"]
    assert step[6] == ">= 1" and step[8] == "best of ours" and step[7].index("2 threads, passive") < step[7].index(";")
    assert alone == ["alone", "4.00 s", "", "", "", "1", ">= 1", "ours: 1 thread", ""]
    assert {len(cells(line)) for line in lines} == {len(cells(head)) for head in bench.HEAD.split("\n")}


def test_the_first_setting_counts_where_settings_are_equal():
    found = cells(bench.best_of("memory", {"2 threads": row([8.0], [24], unit="bytes"), "1 thread": row([8.0], [24])}))
    assert found[1:5] == ["8.0 bytes", "24.0 bytes", "3.00", "3.00 .. 3.00"]
    assert found[7].count("2 threads") == 2


def test_what_was_not_reached():
    found = cells(bench.best_of("seconds", {"1 thread": row([math.inf, 50.0, math.inf])}))
    assert found[1:6] == ["not reached", "", "", "", "3"]


def test_seconds_to_a_goal(capsys: pytest.CaptureFixture):
    """The time until the first evaluation above the goal counts, including set-up; the note describes the schedule."""
    curve = [(10.0, 20.0), (20.0, 32.0), (30.0, 31.0), (40.0, 35.0)]
    points = [{"step": int(seconds), "seconds": seconds, "zero_shot_top1": top1} for seconds, top1 in curve]
    lines = [{"step": 1, "seconds": 1.4, "loss": 3.0}, *points]
    cfg = PRESETS["emoji-clip"][1]
    goals = {"the floor": (31.0, "<= 60 s"), "40 %": (40.0, "")}
    baselines.floor_rows("names", goals, [baselines.Training(cfg, 5.0, lines), baselines.Training(cfg, 6.0, lines[:2])])
    floor, far = map(json.loads, capsys.readouterr().out.splitlines())
    assert floor["row"] == "seconds to the floor, names" and floor["target"] == "<= 60 s"
    assert floor["ours"] == [25.0, math.inf]
    goal, first, second, *_ = re.split("[:;]", floor["note"])
    assert [re.findall(r"[\d.]+", part) for part in (goal, first, second)] == [
        ["31.0"], ["20", "32.0", "35.0", "45"], ["20.0", "16"]
    ]  # fmt: skip
    assert far["ours"] == [math.inf, math.inf]


@dataclasses.dataclass
class Settings:
    out: str
    seed: int = 0
    device: str = "auto"
    batch_size: int = 64
    save_every: int = 10
    data: str = ""
    precision: str = "fp32"


def test_checkpoints_are_measured_until_the_goal_and_at_the_end(tmp_path: Path):
    folder, asked = run.RunFolder(Settings(str(tmp_path)), bench.CPU, step=0), []

    def measure(path: str) -> float:
        asked.append(folder.clock.read())
        assert (Path(path) / "checkpoint.pt").is_file()
        return 4.0 * len(asked)

    with baselines.evaluated(measure, "recall", 7.0):
        folder.start(0, 50)
        for step in (10, 20, 30, 40, 50, 50):  # some trainings save the last step twice
            folder.save(step, step=step)
    folder.save(50, step=50)
    folder.close()
    found = [(line["step"], line["recall"]) for line in run.read_metrics(tmp_path, "recall")]
    assert found == [(10, 4.0), (20, 8.0), (50, 12.0)] and len(asked) == 3


def test_an_arm_is_trained_with_empty_caches(tmp_path: Path):
    study = runner.Study(
        "paper", "A paper", "CC3M", (runner.Arm("base", "train small --batch-size 32"),), {}, lambda runs: [], {}
    )

    def train(cfg: Settings) -> None:
        assert (cfg.batch_size, cfg.seed, cfg.save_every, cfg.device) == (32, 3, 5, "cpu")
        assert not Path(cfg.out).exists()
        folder = run.RunFolder(cfg, bench.CPU, step=0)
        time.sleep(0.05)
        folder.start(0, 5)
        folder.write(1, loss=2.0)
        folder.close()

    presets = {"small": ("", Settings("runs/x")), "large": ("", Settings("runs/y"))}
    found = baselines.trained(study, "base", presets, train, 3, save_every=5)
    assert 0.04 < found.before < 60 and [line["loss"] for line in found.lines] == [2.0]
    assert not Path(found.cfg.out).exists()


@pytest.mark.parametrize("name", sorted(every.CLONES))
def test_baselines_of_the_studies(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Each bench trains an arm of its study, with evaluations, to a floor of its table; the training is a stub."""

    def evaluated(measure, metric: str, *_: Any) -> contextlib.AbstractContextManager:
        """Measure a run once, with all metrics that eval.py can give, before its training is replaced by a stub."""
        if name == "attentive_mask_clip":
            given = {f"{towers}{each}/top1": 7.0 for towers in ("", "online/") for each in module.study.SETS}
            monkeypatch.setattr(module.evaluation, "evaluate_run", lambda *about: given)
            assert measure("run") == 7.0
        return contextlib.nullcontext(measured.append(metric))

    module, built = importlib.import_module(f"studies.bench.{name}"), []
    study, goal = module.study.STUDY, collections.defaultdict(lambda: 55.0)
    floors = [dataclasses.replace(floor, measure=lambda: goal) for floor in study.floors]
    monkeypatch.setattr(module.study, "STUDY", dataclasses.replace(study, floors=tuple(floors)))
    monkeypatch.setattr(runner, "prepare", lambda study, arms: built.extend(study.before))
    monkeypatch.setattr(baselines, "evaluated", evaluated)
    measured, whole, arms = [], baselines.trained, {arm.name for arm in study.arms}
    if name == "protoclip":  # measures floors of the sets that it trains on alone
        monkeypatch.setattr(module.floors, "nearest_neighbour", lambda sets: goal)

    def trained(
        study: runner.Study, arm: str, presets: dict, train: Any, seed: int, **settings: Any
    ) -> baselines.Training:
        assert callable(train) and train.__module__.startswith((f"{name}.", f"studies.{name}_")) and arm in arms

        def stub(cfg: Any) -> None:
            assert cfg.data.startswith("data/") and (measured and cfg.save_every or cfg.eval_every)
            folder = run.RunFolder(cfg, bench.CPU, step=0)
            folder.start(0, 20)
            for step, percent in ((1, 0.0), (10, 99.0), (20, 50.0)):
                folder.write(step, **dict.fromkeys(measured or ["zero_shot_top1"], percent))
            folder.close()

        return whole(study, arm, presets, stub, seed, **settings)

    monkeypatch.setattr(baselines, "trained", trained)
    if hasattr(module, "trained"):
        monkeypatch.setattr(module, "trained", trained)
    module.to_the_floor(1)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"row": ')]
    assert rows and all(len(row["ours"]) == 1 and row["ours"][0] < 60 for row in rows)
    assert len({row["row"] for row in rows}) == len(rows) and all("step 10 (99.0 %)" in row["note"] for row in rows)
    assert any(row["note"].startswith("goal 55.0 %:") for row in rows)
    assert not any(word in once.command for once in built for word in ("flame.embed", "timing"))


def test_rows_that_some_settings_lack():
    lines = bench.merged({"2 threads": [row([1.0])], "1 thread": [row([2.0], [3.0]), row([1.0], name="more")]})
    assert cells(lines[0])[1:4] == ["1.00 s", "3.00 s", "3.00"] and cells(lines[1])[0] == "more"
    with pytest.raises(ValueError, match="two rows are called 'step'"):
        bench.merged({"1 thread": [row([1.0]), row([2.0])]})


def test_settings_of_one_core(monkeypatch: pytest.MonkeyPatch):
    assert bench.thread_settings()["1 thread"] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(bench.run, "cores", lambda: 1)
    assert list(bench.thread_settings()) == ["1 thread"]
    monkeypatch.setattr(bench.run, "cores", lambda: 8)
    settings = bench.thread_settings()
    assert list(settings) == ["8 threads", "8 threads, passive", "1 thread"]
    assert [settings[name].get("OMP_WAIT_POLICY") for name in settings] == [None, "PASSIVE", None]


def test_long_repetitions_count_from_the_first_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "gc", SimpleNamespace(collect=lambda: None))  # all of this process, each time
    calls: list[str] = []
    functions = (lambda: calls.append("ours")), (lambda: calls.append("theirs"))
    name, seconds = bench.race("x", *functions, 2, per=2)
    assert name == "x" and len(seconds) == 2 and calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    monkeypatch.setattr(bench, "LONG", -1.0)
    calls.clear()
    assert len(bench.race("x", *functions, 2)[1]) == 2 and len(calls) == 4


def test_a_bench_runs_under_each_setting(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The bench itself is a fork of the tests' server; those that measure are processes of their own."""
    (tmp_path / "slow.py").write_text(textwrap.dedent(BENCH))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    environment = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "ACTIVE"}
    done = finished(cli("--repetitions", "1", "--results", "kept/slow.md", **environment))
    assert done.err.count("a library talks") == 2 and "a library talks" not in done.out
    lines = done.out.splitlines()
    alone, pair = (cells(line) for line in lines[4:6])
    assert lines[2:4] == bench.HEAD.split("\n")
    assert (alone[1], alone[2], alone[7], alone[8]) == ("2.00 s", "", "ours: passive", "2")
    assert 1 < float(pair[3]) and pair[5] == "1" and re.fullmatch("ours: .*; theirs: .*", pair[7])
    kept = (tmp_path / "kept/slow.md").read_text()  # what a README takes over
    assert kept.split("\n")[-7:] == [*lines[2:6], "", "then 1", ""]
    assert "--upstream" in lines[-3] and lines[-1] == "then 1"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--upstream", "."], "--upstream: . is no clone"),
        (["--repetitions", "0"], "--repetitions: 0"),
        (["--repetitions", "1.5"], "--repetitions: 1.5"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit, match="2"):
        bench.arguments("A bench.", 2, ("authors/code", "abc", "src")).parse_args(flags)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_bench_of_reading_measures_all_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """All rows at a small size, and with a cached index."""
    fork = multiprocessing.get_context("fork")  # a new process would import for seconds
    monkeypatch.setattr(reading.multiprocessing, "get_context", lambda method: fork)
    sizes = "--sparse 2000 --real 128 --seconds 0.1 --repetitions 1"
    (tmp_path / "shards").mkdir()
    places = ["--folder", str(tmp_path / "shards"), "--results", str(tmp_path / "results/data.md")]
    monkeypatch.setattr(sys, "argv", ["bench", *sizes.split(), *places])
    reading.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert (tmp_path / "results/data.md").read_text().splitlines()[2:] == lines and not any(
        (tmp_path / "shards").iterdir()
    )
    rows = [cells(line) for line in lines[2:]]
    assert len(rows) == 2 + 4 * len(reading.READERS)
    for reader in reading.READERS:
        of_reader = {name.partition(",")[0]: (value, aim) for name, value, aim in rows if name.endswith(f", {reader}")}
        ratio, aim = of_reader["bytes read / bytes used"]
        assert len(of_reader) == 4 and 1 <= float(ratio) < 2 and (float(ratio) <= 1.1 or not aim)


def test_hours_of_a_count(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """The note's rate, hours and core-hours follow from the seconds of the row."""
    monkeypatch.setattr(frequency.run, "cores", lambda: 1)
    frequency.counting([f"a red bus number {i}" for i in range(20)], "en_core_web_sm", partitions=4)
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    ((seconds,), note) = row["ours"], row["note"]
    hours = 414.08e6 / 1000 * seconds / 3600
    assert 0 < seconds < 60 and not row["theirs"]
    assert all(found in note for found in (f"{1000 / seconds:,.0f} captions/s", "5.0 words", f"{hours:,.1f} hours"))


@pytest.mark.parametrize("folder", every.CLONES)
def test_a_bench_names_what_its_modules_have(folder: str):
    """Most of a bench runs only beside a clone; here, `module.name` must exist for each module that it imports."""
    module = importlib.import_module(f"studies.bench.{folder}")
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = getattr(module, node.value.id, None)
            assert not isinstance(owner, ModuleType) or hasattr(owner, node.attr), ast.unparse(node)


def test_all_folders_have_a_bench():
    assert {path.parent.name for path in ROOT.glob("*/model.py")} == set(every.CLONES)
    assert all((ROOT / f"studies/bench/{folder}.py").is_file() for folder in every.CLONES)
