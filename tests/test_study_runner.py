"""Studies: their commands, order, resuming, and failures."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import textwrap
import time
from pathlib import Path

import pytest
import torch
from scripts import ROOT, script

from studies.harness import report, runner
from studies.harness.floors import Floor
from studies.harness.runner import Arm, Once, Stage, Study
from studies.harness.verdicts import Claim, not_testable

SCRIPT = """
    import sys, pathlib, shutil
    words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    out = pathlib.Path(words["--out"])
    if (out / "checkpoint.pt").exists():
        sys.exit()
    with open("order.txt", "a") as file:
        print(sys.argv[1], out, words.get("--init", ""), file=file)
    if words.get("--init") and not (pathlib.Path(words["--init"]) / "checkpoint.pt").exists():
        sys.exit("started before what it starts from")
    if sys.argv[1] == "bad" and not pathlib.Path("mended").exists():
        sys.exit(3)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy("finished.pt", out / "checkpoint.pt")
"""
METRICS = {"top1": "top-1"}


def measured(runs: list[str]) -> list[dict]:
    """Metrics of a method 5 points above its baseline, and a table that does not belong into a results file."""
    return [
        {"top1": 10.0 + 5 * ("method" in run) + int(run[-1]) / (5 if "method" in run else 10), "table": [run]}
        for run in runs
    ]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The folder of a paper with one script, in an empty folder."""
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper/train.py").write_text(textwrap.dedent(SCRIPT))
    torch.save({"config": {"epochs": 2}, "commit": "abc"}, tmp_path / "finished.pt")
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


def own_studies() -> None:
    """A package of studies here, which scripts find before the project's."""
    Path("studies").mkdir()
    Path("studies/__init__.py").touch()


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
        "top1": {"mean": 15.1, "std": pytest.approx(0.1414, abs=1e-4), "values": [15.0, 15.2]}
    }
    assert summary["claims"][0]["verdict"] == "reproduced"
    shown = capfd.readouterr().out
    assert re.search(r"\[8/8\] runs/paper/method-seed[01]: ", shown)
    assert "| Method" in shown and "runs/paper/results.json" in shown


def test_the_time_of_all_runs_is_kept_until_they_have_finished_once(study: Study):
    study = dataclasses.replace(study, floors=(Floor("chance", lambda: {"top1": 1.0}),), more_rows=lambda found: [])
    minutes = lambda: json.loads(Path("runs/paper/results.json").read_text()).get("core_minutes")  # noqa: E731
    file = runner.clock(study, "base", 1)
    with pytest.raises(KeyError), runner.clocked(file, Path(study.out("base", 1)), 2):  # an attempt that failed
        raise KeyError
    tried = json.loads(file.read_text())
    file.write_text(json.dumps(tried | {"seconds": 100.0}))
    runner.run(study, runner.Options(seeds=(1,), jobs=1))
    kept = json.loads(file.read_text())
    first = minutes()
    assert not tried["finished"] and kept["finished"] and kept["seconds"] > 100
    assert sorted(path.name for path in file.parent.iterdir()) == [
        f"{name}-seed1.json" for name in ("base", "method", "part", "teacher")
    ]
    runner.run(study, runner.Options(seeds=(1,), jobs=1))  # nothing is left to do
    assert minutes() == first > 100 / 60
    file.unlink()  # a run of before times were kept
    runner.run(study, runner.Options(seeds=(1,), jobs=1))
    assert minutes() is None


def test_arms_are_chosen_by_name_and_bring_what_they_need(study: Study):
    assert [arm.name for arm in study.chosen("core")] == ["base", "method"]
    assert [arm.name for arm in study.chosen("late base")] == ["base", "late"]
    assert [arm.name for arm in study.chosen("core late")] == ["base", "method", "late"]
    runner.run(dataclasses.replace(study, claims=()), runner.Options(seeds=(3,), arms="late", results="there.json"))
    assert order() == [f"runs/paper/{name}-seed3" for name in ("teacher", "part", "method", "late")]
    assert list(json.loads(Path("there.json").read_text())["arms"]) == ["method", "late"]
    with pytest.raises(ValueError, match="'ptoto': .*base, method, late"):
        study.chosen("base ptoto")


def test_commands_are_words(study: Study):
    several = Stage("both", ("pretrain emoji-{seed}", "measure --encoder {out}"))
    study = dataclasses.replace(study, stages=(*study.stages, several))
    assert study.words(several, 5) == [
        ["paper.pretrain", "emoji-5", "--seed", "5", "--out", "runs/paper/both-seed5"],
        ["paper.measure", "--encoder", "runs/paper/both-seed5"],
    ]
    assert several.needs == set() and study.stages[1].needs == {"teacher"}


def test_what_comes_after_others_waits_for_them_but_does_not_bring_them(study: Study):
    shared = (Stage("a", "train a"), Stage("b", "train b", after=("a",)), Stage("c", "train c", after=("a", "b")))
    arms = (Arm("late", "train late --init {c}", heading="Late"), Arm("base", "train base --init {a}", heading="Base"))
    study = dataclasses.replace(study, stages=shared, arms=arms, claims=())
    runner.run(study, runner.Options(seeds=(0,), arms="late", jobs=2))
    assert order() == ["runs/paper/c-seed0", "runs/paper/late-seed0"]
    Path("order.txt").unlink()
    runner.run(study, runner.Options(seeds=(1,), arms="late base", jobs=2))
    ran = order()
    assert sorted(ran) == [f"runs/paper/{name}-seed1" for name in ("a", "base", "c", "late")]
    assert ran.index("runs/paper/a-seed1") < ran.index("runs/paper/c-seed1")


@pytest.mark.parametrize("needs", ["--init {base}", ""])
def test_a_failed_command_is_named_and_stops_what_has_not_begun(study: Study, needs: str):
    arms = (Arm("base", "train bad", heading="Baseline"), Arm("method", f"train best {needs}", heading="Method"))
    with pytest.raises(ValueError, match="bad --seed 0 --out runs/paper/base-seed0"):
        runner.run(dataclasses.replace(study, arms=arms), runner.Options(seeds=(0,), jobs=1))
    assert order() == ["runs/paper/base-seed0"] and not Path("runs/paper/results.json").exists()


def test_what_runs_once_runs_first_and_only_where_it_is_needed(study: Study):
    once = (Once("paper.train corpus --out data"), Once("paper.train other --out data", arms=("late",)))
    runner.run(dataclasses.replace(study, before=once, claims=()), runner.Options(seeds=(0,), arms="base"))
    assert order() == ["data", "runs/paper/base-seed0"]
    with pytest.raises(ValueError, match="bad --out other"):
        runner.run(dataclasses.replace(study, before=(Once("paper.train bad --out other"),)), runner.Options())


def test_results_and_clones(study: Study):
    with pytest.raises(ValueError, match=r"--results notes.md .*\.json"):
        runner.run(study, runner.Options(results="notes.md"))
    with pytest.raises(ValueError, match="clone"):
        runner.run(study, runner.Options(upstream="clone"))
    assert not Path("order.txt").exists()
    rows = lambda found, said="": [not_testable(said, "-", "-")]  # noqa: E731
    reading = dataclasses.replace(study, upstream=lambda clone: {"said": f"read {clone}"}, more_rows=rows)
    runner.run(reading, runner.Options(upstream="clone"))
    assert json.loads(Path("runs/paper/results.json").read_text())["claims"][-1]["claim"] == "read clone"


def test_only_results_of_the_same_paper_and_corpus_are_replaced(study: Study):
    for text, said in {
        json.dumps({"paper": "Another paper", "corpus": study.corpus}): "A paper",
        json.dumps({"paper": study.paper, "corpus": "Flickr8k"}): "Flickr8k",
        '{"name": "mine"}': "A paper",
        "[1]": "no JSON",
    }.items():
        Path("there.json").write_text(text)
        with pytest.raises(ValueError, match=f"there.json .*{said}"):
            runner.run(study, runner.Options(results="there.json"))
        assert Path("there.json").read_text() == text and not Path("order.txt").exists()
    Path("there.json").unlink()
    for seeds in ((0, 1), (0,)):
        runner.run(study, runner.Options(seeds=seeds, results="there.json"))
        assert json.loads(Path("there.json").read_text())["seeds"] == list(seeds)


def test_results_hold_floors_and_judged_claims(study: Study, capfd: pytest.CaptureFixture):
    floors = (Floor("chance", lambda: {"top1": 1.0}), Floor("labels", lambda: {"top1": 60.0}, ceiling=True))
    claims = (
        Claim("shown", None, "top1", "method", "base"),
        Claim("higher", "+4", "top1", "method", "base", 1, 4.0, True),
    )
    study = dataclasses.replace(
        study,
        floors=floors,
        claims=claims,
        more_rows=lambda found: [not_testable("ImageNet", "55", "needs CC3M", True)],
    )
    runner.run(study, runner.Options(seeds=(0, 1), jobs=2, results="results/paper.json"))
    summary = json.loads(Path("results/paper.json").read_text())
    assert summary["floors"] == {"chance": {"top1": 1.0}, "labels": {"top1": 60.0}}
    assert [row["verdict"] for row in summary["claims"]] == ["reproduced", "not testable here", "no claim"]
    assert set(summary["settings"]) == {"base", "method"} and summary["corpus"] == "Embedded emoji corpus"
    shown = capfd.readouterr().out
    assert "| chance" in shown and "★ higher" in shown
    higher = dataclasses.replace(study, floors=(Floor("pixels", lambda: {"top1": 16.0}),))
    runner.run(higher, runner.Options(seeds=(0, 1)))
    assert json.loads(Path("runs/paper/results.json").read_text())["claims"][0]["verdict"] == "has not learned"


def test_ceilings_come_from_committed_results_unless_these_are_made(study: Study):
    """Ceilings take as long as an arm; floors are measured each time."""
    measured = []
    measure = lambda name: lambda: measured.append(name) or {"top1": 60.0 + len(measured)}  # noqa: E731
    floors = (Floor("chance", measure("chance")), Floor("labels", measure("labels"), ceiling=True))
    study = dataclasses.replace(study, floors=floors, more_rows=lambda found: [])
    runner.run(study, runner.Options(seeds=(0, 1), jobs=1, results="results/paper.json"))
    assert measured == ["chance", "labels"]
    Path("runs/paper/floors.json").unlink()
    runner.run(study, runner.Options(seeds=(0, 1), jobs=1))
    assert measured == ["chance", "labels", "chance"]
    assert json.loads(Path("runs/paper/results.json").read_text())["floors"]["labels"] == {"top1": 62.0}


def test_floors_are_measured_again_after_their_files_change(study: Study):
    measured, file = [], Path("selected.csv")
    file.write_text("")
    floors = (Floor("chance", lambda: measured.append(1) or {"top1": 1.0}),)
    study = dataclasses.replace(study, floors=floors, floor_files=lambda seeds: [file], more_rows=lambda found: [])
    for _ in range(2):
        runner.run(study, runner.Options(seeds=(0, 1), jobs=1))
    assert len(measured) == 1
    later = Path("runs/paper/floors.json").stat().st_mtime + 10
    os.utime(file, (later, later))
    runner.run(study, runner.Options(seeds=(0, 1), jobs=1))
    assert len(measured) == 2


def test_floors_by_seed_are_of_the_seeds_of_their_arms(study: Study):
    by_seed = lambda arm: Floor(f"of {arm}", lambda seed: {"top1": float(seed)}, arms=(arm,), by_seed=True)  # noqa: E731
    floors = (Floor("chance", lambda: {"top1": 1.0}), by_seed("base"), by_seed("late"))
    study = dataclasses.replace(study, floors=floors)
    options = runner.Options(seeds=(0, 3), jobs=1, results="there.json")
    runner.run(study, options)
    first = json.loads(Path("there.json").read_text())
    assert first["floors"] == {"chance": {"top1": 1.0}, "of base": {"top1": 1.5}}
    assert first["floor_seeds"] == {"of base": [0, 3]}
    assert "seeds 0, 3" in report.provenance(first)


def test_metrics_of_several_runs_can_be_claimed(study: Study):
    def derive(found) -> None:
        for runs in found.arms.values():
            for values, base in zip(runs, found.arms["base"], strict=True):
                values["above"] = values["top1"] - base["top1"]

    claims = (Claim("above", "+4", "above", "method", "base", 1, 4.0),)
    runner.run(dataclasses.replace(study, derive=derive, claims=claims), runner.Options(seeds=(0, 1), jobs=1))
    assert json.loads(Path("runs/paper/results.json").read_text())["claims"][0]["difference"] == pytest.approx(5.05)


def test_runs_that_are_measured_alone_are_measured_once_trained(study: Study):
    """A separate process measures each run after its training, by the study's own command."""
    own_studies()
    Path("studies/paper.py").write_text("import sys\nopen('order.txt', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n")
    runner.run(dataclasses.replace(study, alone=True), runner.Options(seeds=(0,), arms="method", jobs=1))
    lines = [line.split() for line in Path("order.txt").read_text().splitlines()]
    assert [line[-1] for line in lines if line[0] == "--measure"] == ["runs/paper/method-seed0"]
    seen = []
    alone = dataclasses.replace(study, evaluate=lambda runs: seen.extend(runs))
    runner.run(alone, runner.Options(measure="runs/paper/method-seed0"))
    assert seen == ["runs/paper/method-seed0"]


def test_photographs_have_runs_and_results_of_their_own(study: Study, capfd: pytest.CaptureFixture):
    """Commands read photographs from --photos; runs that are measured alone use the study on photographs."""
    own_studies()
    Path("studies/paper.py").write_text("import sys\nopen('measured.txt', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n")
    once = Once("paper.train build --root {photos}/set --out data/set")
    study = dataclasses.replace(study, on="photos", alone=True, before=(once,), arms=study.arms[:1])
    with pytest.raises(ValueError, match="--photos"):
        runner.run(study, runner.Options(seeds=(0,)))
    with pytest.raises(ValueError, match="--corpus photos"):
        runner.run(dataclasses.replace(study, on="emoji"), runner.Options(seeds=(0,), photos="my photographs"))
    for photos in ("my photographs", ""):
        with pytest.raises(ValueError, match=f"--photos '{photos}' is no folder"):
            runner.run(study, runner.Options(seeds=(0,), photos=photos))
    Path("my photographs").mkdir()
    runner.run(study, runner.Options(seeds=(0,), photos="my photographs", jobs=1))
    assert order() == ["data/set", "runs/photos/paper/base-seed0"]
    assert Path("measured.txt").read_text() == "--corpus photos --measure runs/photos/paper/base-seed0\n"
    assert json.loads(Path("runs/photos/paper/results.json").read_text())["arms"].keys() == {"base"}


def test_papers_without_a_study_on_photographs_say_so():
    with pytest.raises(ValueError, match="leave out --corpus"):
        runner.study_of("attentive_mask_clip", "photos")
    assert runner.study_of("nmtune", "photos").on == "photos" and runner.study_of("nmtune").on == "emoji"


def test_a_floor_of_some_arms_counts_where_one_of_them_is_the_stronger(study: Study):
    def never() -> dict[str, float]:
        raise AssertionError("measured without its arms")

    floors = (
        Floor("pixels", lambda: {"top1": 1.0}),
        Floor("tower", lambda: {"top1": 16.0}, arms=("base", "late")),
        Floor("other tower", never, arms=("other",)),
    )
    claims = tuple(Claim(arm, "+", "top1", arm, "base", 1) for arm in ("method", "late"))
    study = dataclasses.replace(study, floors=floors, claims=claims)
    runner.run(study, runner.Options(seeds=(0, 1), arms="all", jobs=2))
    summary = json.loads(Path("runs/paper/results.json").read_text())
    assert summary["floors"] == {"pixels": {"top1": 1.0}, "tower": {"top1": 16.0}}
    assert [row["verdict"] for row in summary["claims"]] == ["direction only", "has not learned"]


def test_each_seed_runs_once(study: Study):
    runner.run(dataclasses.replace(study, claims=()), runner.Options(seeds=(2, 0, 2), arms="base", jobs=1))
    assert order() == [f"runs/paper/base-seed{seed}" for seed in (2, 0)]


def test_only_runs_of_several_threads_on_shared_cores_wait_passively(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(runner, "cores", lambda: 4)
    threads = {at_once: runner.environment_of(at_once) for at_once in (1, 2, 4, 8)}
    assert [found["OMP_NUM_THREADS"] for found in threads.values()] == ["4", "2", "1", "1"]
    assert [found.get("OMP_WAIT_POLICY") for found in threads.values()] == [None, "PASSIVE", None, None]
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert runner.environment_of(2)["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"arms": " "}, "--arms names no arm"),
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (0, -1)}, "--seeds"),
        ({"jobs": 0}, "--jobs must be at least 1"),
    ],
)
def test_what_names_nothing_is_refused(study: Study, wrong: dict, said: str):
    with pytest.raises(ValueError, match=said):
        runner.run(study, runner.Options(**wrong))
    assert not Path("order.txt").exists()


def test_results_with_floors_that_the_study_has_not_are_not_judged_again(study: Study):
    """Without these floors their claims would be judged more kindly."""
    study = dataclasses.replace(study, floors=(Floor("pixels", lambda: {"top1": 50.0}),))
    runner.run(study, runner.Options(seeds=(0, 1), results="there.json"))
    summary = json.loads(Path("there.json").read_text())
    assert summary["claims"][0]["verdict"] == "has not learned"
    renamed = dataclasses.replace(study, floors=(Floor("raw pixels", lambda: {"top1": 50.0}),))
    assert runner.judged_again(renamed, summary) is summary
    easy = runner.judged_again(study, summary | {"floors": {"pixels": {"top1": 1.0}}})
    assert easy["claims"][0]["verdict"] == "reproduced"


@pytest.mark.parametrize(("change", "kept"), [(1e-12, True), (1e-6, False)])
def test_results_are_not_judged_again_because_of_rounding(study: Study, change: float, kept: bool):
    runner.run(study, runner.Options(seeds=(0, 1), results="there.json"))
    judged = json.loads(Path("there.json").read_text())
    interval = [judged["claims"][0]["interval"][0] + change, judged["claims"][0]["interval"][1]]
    summary = judged | {"claims": [judged["claims"][0] | {"interval": interval}, *judged["claims"][1:]]}
    assert runner.judged_again(study, summary) == (summary if kept else judged)


def with_sigint(at_first: signal.Handlers, *given) -> None:
    """Run the study of the current folder, a fork of the tests' server, with this handler of SIGINT."""
    signal.signal(signal.SIGINT, at_first if at_first == signal.SIG_IGN else signal.default_int_handler)
    script("study", *given)


@pytest.mark.parametrize(
    ("by", "at_first"),
    [(signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_IGN)],
    ids=["SIGINT", "SIGTERM where SIGINT is ignored"],
)
def test_an_interrupted_study_ends_with_its_scripts(
    tmp_path: Path, by: signal.Signals, at_first: signal.Handlers, monkeypatch: pytest.MonkeyPatch
):
    """Although only the study gets the signal; a shell starts commands with & so that they ignore SIGINT."""
    (tmp_path / "paper").mkdir()
    (tmp_path / "study.py").write_text(
        "from studies.harness import runner\n"
        "from studies.harness.runner import Arm, Study, main\n"
        "runner.PATIENCE = 0.3\n"
        "arms = tuple(Arm(name, 'train', heading=name) for name in 'abc')\n"
        "main(Study('paper', 'A paper', 'CC3M', arms, minutes={'core': 1}, evaluate=list, metrics={}, claims=()))\n"
    )
    (tmp_path / "paper/train.py").write_text(
        "import os, time\nopen(str(os.getpid()), 'w').close()\ntry:\n    time.sleep(100)\n"
        "except KeyboardInterrupt:\n    open('ended', 'a').write(f'{os.getpid()} ')\n    raise\n"
    )
    log = tmp_path / "log"
    context, environment = multiprocessing.get_context("forkserver"), {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    monkeypatch.chdir(tmp_path)
    study = context.Process(target=with_sigint, args=(at_first, ["--seeds", "0", "--jobs", "2"], str(log), environment))
    study.start()
    begun = lambda: {path.name for path in tmp_path.iterdir() if path.name.isdigit()}  # noqa: E731
    try:
        until = time.monotonic() + 60
        while len(begun()) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(begun()) == 2
        os.kill(study.pid, by)
        study.join(60)
    finally:
        study.kill()
    said = log.with_suffix(".err").read_text()
    assert study.exitcode == 130 and said.startswith("interrupted"), said
    assert len(begun()) == 2 and not any(Path(f"/proc/{script}").exists() for script in begun())
    if at_first == signal.SIG_DFL:
        assert set((tmp_path / "ended").read_text().split()) == begun()


def test_a_study_that_failed_goes_on(study: Study):
    """Scripts that have finished are called again, and end at once."""
    study = dataclasses.replace(study, arms=(study.arms[0], Arm("method", "train bad --init {base}", heading="Method")))
    with pytest.raises(ValueError, match="paper.train bad .*exit code 3"):
        runner.run(study, runner.Options(seeds=(0,), jobs=1))
    Path("mended").touch()
    runner.run(study, runner.Options(seeds=(0,), jobs=1))
    assert order() == ["runs/paper/base-seed0", "runs/paper/method-seed0", "runs/paper/method-seed0"]
    assert set(json.loads(Path("runs/paper/results.json").read_text())["arms"]) == {"base", "method"}
