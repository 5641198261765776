"""Studies: which commands they run, in which order, what is left, and what becomes of failures."""

import dataclasses
import json
import textwrap
from pathlib import Path

import pytest
import torch

from shared.study import runner
from shared.study.runner import Arm, Once, Stage, Study
from shared.study.statistics import Claim

SCRIPT = """
    import sys, pathlib, shutil
    words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    out = pathlib.Path(words["--out"])
    with open("order.txt", "a") as file:
        print(sys.argv[1], out, words.get("--init", ""), file=file)
    if words.get("--init") and not (pathlib.Path(words["--init"]) / "checkpoint.pt").exists():
        sys.exit("started before what it starts from")
    if sys.argv[1] == "bad":
        sys.exit(3)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy("finished.pt", out / "checkpoint.pt")
"""
METRICS = {"top1": "top-1"}


def measured(runs: list[str]) -> list[dict]:
    """A method that is 5 points above its baseline, and a table that no results file can hold."""
    return [{"top1": 10.0 + 5 * ("method" in run) + int(run[-1]) / 10, "table": [run]} for run in runs]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A paper's folder with one script, in an empty place."""
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper/train.py").write_text(textwrap.dedent(SCRIPT))
    torch.save({"epoch": 2, "config": {"epochs": 2}, "commit": "abc"}, tmp_path / "finished.pt")
    monkeypatch.chdir(tmp_path)
    return Study(
        folder="paper",
        paper="A paper (arXiv 0000.00000)",
        stands_for="CC3M",
        stages=(Stage("teacher", "train big"), Stage("part", "train small --init {teacher}")),
        arms=(
            Arm("base", "train plain", heading="Baseline"),
            Arm("method", "train best --init {part}", heading="Method"),
            Arm("late", "train late --init {method}", heading="Late", core=False),
        ),
        minutes={"core": 1, "all": 2},
        evaluate=measured,
        metrics=METRICS,
        claims=(Claim("higher", "+4", "top1", "method", "base", 1, 4.0),),
    )


def order() -> list[str]:
    return [line.split()[1] for line in Path("order.txt").read_text().splitlines()]


def test_arms_wait_for_what_they_start_from(study: Study, capfd: pytest.CaptureFixture):
    runner.run(study, runner.Options(seeds=(0, 1), jobs=2))
    ran = order()
    assert sorted(ran) == sorted(
        f"runs/paper/{n}-seed{s}" for n in ("base", "teacher", "part", "method") for s in (0, 1)
    )
    for seed in (0, 1):
        places = [ran.index(f"runs/paper/{name}-seed{seed}") for name in ("teacher", "part", "method")]
        assert places == sorted(places)
    summary = json.loads(Path("runs/paper/results.json").read_text())
    assert summary["seeds"] == [0, 1] and set(summary["arms"]) == {"base", "method"}
    assert summary["arms"]["method"] == {
        "top1": {"mean": 15.05, "std": pytest.approx(0.0707, abs=1e-4), "values": [15.0, 15.1]}
    }
    assert summary["claims"][0]["verdict"] == "reproduced"
    shown = capfd.readouterr().out
    assert "8 runs, 2 side by side; about 2 minutes on two cores" in shown and "[8/8] runs/paper/method" in shown
    assert "| method" in shown and "written to runs/paper/results.json" in shown


def test_arms_are_chosen_by_name_and_bring_what_they_need(study: Study):
    assert [arm.name for arm in study.chosen("core")] == ["base", "method"]
    assert [arm.name for arm in study.chosen("late base")] == ["base", "late"]
    runner.run(dataclasses.replace(study, claims=()), runner.Options(seeds=(3,), arms="late", results="there.json"))
    assert order() == [f"runs/paper/{name}-seed3" for name in ("teacher", "part", "method", "late")]
    assert list(json.loads(Path("there.json").read_text())["arms"]) == ["method", "late"]
    with pytest.raises(ValueError, match="there is no arm 'ptoto': --arms is core, all, or some of base, method, late"):
        study.chosen("base ptoto")


def test_commands_are_words(study: Study):
    several = Stage("both", ("pretrain emoji-{seed}", "measure --encoder {out}"), after=("teacher",))
    study = dataclasses.replace(study, stages=(*study.stages, several))
    lines = [words[2:] for words in study.words(several, 5)]
    assert lines == [
        ["paper.pretrain", "emoji-5", "--seed", "5", "--out", "runs/paper/both-seed5"],
        ["paper.measure", "--encoder", "runs/paper/both-seed5"],
    ]
    assert several.needs == {"teacher"} and [job.name for job in study.jobs([several])] == ["teacher", "both"]


def test_a_failed_command_is_named_and_stops_what_waits_for_it(study: Study):
    arms = (Arm("base", "train bad", heading="Baseline"), Arm("method", "train best --init {base}", heading="Method"))
    with pytest.raises(ValueError, match="'python -m paper.train bad --seed 0 --out runs/paper/base-seed0' failed"):
        runner.run(dataclasses.replace(study, arms=arms), runner.Options(jobs=1))
    assert order() == ["runs/paper/base-seed0"] and not Path("runs/paper/results.json").exists()


def test_what_runs_once_runs_first_and_only_where_it_is_needed(study: Study):
    once = (Once("paper.train corpus --out data"), Once("paper.train other --out data", arms=("late",)))
    runner.run(dataclasses.replace(study, before=once, claims=()), runner.Options(arms="base"))
    assert order() == ["data", "runs/paper/base-seed0"]
    with pytest.raises(ValueError, match="'python -m paper.train bad --out data' failed"):
        runner.run(dataclasses.replace(study, before=(Once("paper.train bad --out data"),)), runner.Options())


def test_results_and_clones(study: Study):
    with pytest.raises(ValueError, match=r"--results notes.md should end in \.json"):
        runner.run(study, runner.Options(results="notes.md"))
    with pytest.raises(ValueError, match="reads no clone"):
        runner.run(study, runner.Options(upstream="clone"))
    assert not Path("order.txt").exists()
    rows = lambda found, said="": [{"claim": said, "paper": "-", "here": "-", "verdict": "no claim"}]  # noqa: E731
    reading = dataclasses.replace(study, upstream=lambda clone: {"said": f"read {clone}"}, more_rows=rows)
    runner.run(reading, runner.Options(results="clone"))
    assert json.loads(Path("runs/paper/results.json").read_text())["claims"][-1]["claim"] == "read clone"


def test_claims_about_what_was_not_measured_are_left_out_where_the_study_says_so(study: Study):
    claims = (*study.claims, Claim("elsewhere", None, "other/top1", "method", "base"))
    study = dataclasses.replace(study, claims=claims, skip_unmeasured=True)
    runner.run(study, runner.Options())
    rows = json.loads(Path("runs/paper/results.json").read_text())["claims"]
    assert [row["claim"] for row in rows] == ["higher"]


def test_a_run_that_is_not_finished_is_not_compared(study: Study):
    Path("runs/paper/base-seed0").mkdir(parents=True)
    torch.save({"epoch": 1, "config": {"epochs": 2}}, "runs/paper/base-seed0/checkpoint.pt")
    with pytest.raises(ValueError, match="base-seed0 is not finished: 1 of 2 epochs"):
        study.compare(["runs/paper/base-seed0"], [{"top1": 1.0}], Path("results.json"))
