"""Protocols with their hash, pilots, logs and what is made from them again."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shared import checkpoints, pictures
from shared.errors import UserError
from studies.harness import __main__ as everything
from studies.harness import logs, protocol, report, runner
from studies.harness.floors import Floor
from studies.harness.runner import Arm, Study, compare, study_of
from studies.harness.verdicts import Claim, not_testable

SEEDS = tuple(range(1000, 1010))


def study(**changes) -> Study:
    about = dict(
        folder="paper", paper="A paper", stands_for="CC3M", minutes={"core": 1}, evaluate=list,
        metrics={"top1": "top-1"},
        arms=(Arm("base", "train plain", heading="Baseline"), Arm("method", "train best --lr 1", heading="Method")),
        claims=(Claim("higher", "+4", "top1", "method", "base", 1, 4.0, True, 1.0, where="here"),),
        floors=(Floor("chance", lambda: {"top1": 1.0}),),
        more_rows=lambda found: [not_testable("ImageNet", "55", "needs CC3M")],
    )  # fmt: skip
    return Study(**(about | changes))


def finished(of: Study, seeds: tuple[int, ...], settings: dict | None = None) -> tuple[list[str], list[dict]]:
    """Run folders with checkpoints and learning curves, and their metrics."""
    runs, results = [], []
    rng = np.random.default_rng(seeds[0])
    for arm, mean in (("base", 40.0), ("method", 45.0)):
        for seed in seeds:
            folder = Path(of.out(arm, seed))
            folder.mkdir(parents=True)
            config = {"lr": 1e-3, "seed": seed} | (settings or {})
            checkpoints.save_checkpoint(folder / "checkpoint.pt", {"config": config, "commit": "abc"})
            lines = [{"step": s, "loss": 9 / s, "zero_shot_top1": mean - 30 / s} for s in range(1, 61)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            runs.append(str(folder))
            results.append({"top1": mean + rng.normal() / 3, "not in a table": 3.0, "concepts": {"a": 1}})
    return runs, results


def test_what_a_protocol_fixes_changes_its_hash():
    before = protocol.digest(study())
    claim = study().claims[0]
    assert protocol.digest(study(claims=(claim._replace(where="said otherwise"),))) == before
    for change in (
        {"claims": (claim._replace(negligible=2.0),)}, {"claims": (claim._replace(metric="top5"),)},
        {"arms": (Arm("base", "train plain --lr 2"), study().arms[1])}, {"seeds": SEEDS[:5]}, {"floors": ()},
    ):  # fmt: skip
        assert protocol.digest(study(**change)) != before, change
    emoji, photographs = (study_of("protoclip", on) for on in ("emoji", "photos"))
    page = protocol.page([emoji, photographs])
    assert protocol.digest(emoji) in page and protocol.digest(photographs) in page and "linear probe above CLIP" in page
    assert "train emoji-clip [" in page  # the hash of the preset's settings


def test_a_changed_preset_changes_the_hash(monkeypatch: pytest.MonkeyPatch):
    real = study_of("protoclip")
    before, scripts = protocol.digest(real), protocol.presets.scripts("protoclip")
    row, settings = scripts["train"]["emoji"]
    changed = scripts | {"train": scripts["train"] | {"emoji": (row, dataclasses.replace(settings, lr=9.0))}}
    monkeypatch.setattr(protocol.presets, "scripts", lambda folder: changed)
    assert protocol.digest(real) != before


def test_only_results_of_the_protocol_and_its_seeds_are_verdicts():
    of = study()
    assert protocol.standing(of, {"seeds": list(SEEDS)}) == "exploratory"
    summary = {"seeds": list(SEEDS), "protocol": protocol.digest(of)}
    assert protocol.standing(of, summary) == "verdict"
    assert protocol.standing(of, summary | {"seeds": [0, 1, 2]}) == "replication"
    assert protocol.standing(study(seeds=SEEDS[:3]), summary) == "exploratory"


def test_tables_are_made_again_from_logs_to_the_digit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)

    def rounds(found: report.Comparison) -> None:
        found.arms["rounds"] = [{"ratio": -0.5 + 0.01 * i} for i in range(20)]  # more than seeds, and without folders

    faster = Claim("faster", "2x", "ratio", "rounds", "0", -1, -0.5, True, 0.2, where="here")
    of, file = study(derive=rounds, claims=(*study().claims, faster)), Path("results/paper.json")
    compare(of, *finished(of, SEEDS), file)
    assert checkpoints.read_json(file)["protocol"] == protocol.digest(of)
    kept = logs.read(logs.beside(file))
    assert sorted(kept) == ["base", "method", "rounds"] and len(kept["rounds"]) == 20
    assert [run["seed"] for run in kept["base"]] == list(SEEDS)
    first, run = (json.loads(line) for line in Path("results/logs/paper/base.jsonl").read_text().splitlines()[:2])
    assert first["settings"] == {"lr": 1e-3, "seed": 1000} and set(run["metrics"]) == {"top1"}
    assert len(run["curve"]["loss"]) == len(run["curve"]["zero_shot_top1"]) == logs.POINTS
    assert run["curve"]["loss"][0] == [1, 9.0] and run["curve"]["loss"][-1] == [60, 0.15]
    capsys.readouterr()
    everything.recompute([of])
    summary = checkpoints.read_json(file)
    assert [row["seeds"] for row in summary["claims"][:2]] == [10, 20] and report.seeds_of(summary).endswith("1009")
    assert report.claims_table(summary) in capsys.readouterr().out
    line = json.loads(Path("results/logs/paper/base.jsonl").read_text().splitlines()[3])
    line["metrics"]["top1"] += 0.2
    lines = Path("results/logs/paper/base.jsonl").read_text().splitlines()
    Path("results/logs/paper/base.jsonl").write_text("\n".join([*lines[:3], json.dumps(line), *lines[4:]]) + "\n")
    with pytest.raises(UserError, match="differs from its logs"):
        everything.recompute([of])


def test_an_interval_over_pictures_is_the_same_from_results_and_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Scores of pictures are kept for primary claims alone."""
    monkeypatch.chdir(tmp_path)
    rest = study().claims[0]._replace(claim="rest", metric="top5", primary=False)
    of, file = study(claims=(*study().claims, rest), small=("top1", "top5")), Path("results/paper.json")
    runs, results = finished(of, SEEDS)
    rng = np.random.default_rng(0)
    for found in results:
        hits = torch.from_numpy(100 * (rng.random(500) < found["top1"] / 100))
        for metric in ("top1", "top5"):
            found |= {metric: hits.double().mean().item()} | pictures.by_picture(metric, hits)
    compare(of, runs, results, file)
    summary = checkpoints.read_json(file)
    assert [row["scatter"] for row in summary["claims"] if row.get("scatter")] == ["seeds and pictures", "seeds"]
    assert {arm: set(kept) for arm, kept in summary["by_picture"].items()} == {
        arm: {"top1 by picture"} for arm in ("base", "method")
    }
    assert runner.judged_again(of, summary) is summary
    again = report.rows_again(of, summary, {arm: [run["metrics"] for run in kept]
                                            for arm, kept in logs.read(logs.beside(file)).items()})  # fmt: skip
    assert again[0] == summary["claims"][0]
    everything.recompute([of])
    assert file.stat().st_size < 12_000  # twenty runs
    without = runner.judged_again(of, {key: value for key, value in summary.items() if key != "by_picture"})["claims"][
        0
    ]
    assert without["scatter"] == "seeds alone" and without["resolves"] < again[0]["resolves"]


def test_a_users_runs_lie_in_the_band_of_the_committed_ones_or_not(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    of = study()
    compare(of, *finished(of, SEEDS), Path("results/paper.json"))
    capsys.readouterr()
    compare(of, *finished(of, (0, 1, 2)), Path("runs/paper/results.json"))
    assert "2 of 2 lie in the band" in capsys.readouterr().out
    assert Path("runs/paper/paper_band.png").stat().st_size > 10_000
    runs, results = finished(of, (3, 4))
    compare(of, runs, [found | {"top1": found["top1"] + 3 * ("method" in run)} for run, found in
                       zip(runs, results, strict=True)], Path("runs/paper/results.json"))  # fmt: skip
    assert "1 of 2 lie in the band" in capsys.readouterr().out
    compare(of, *finished(of, (5, 6), {"lr": 2.0}), Path("runs/paper/results.json"))
    assert "no runs with these settings" in capsys.readouterr().out


def test_predictions_hold_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        low, high = logs.interval(rng.normal(size=10), 3, 0.05)
        inside += low <= rng.normal(size=3).mean() <= high
    assert 0.935 < inside / 2000 < 0.965


def test_pilots_are_kept_with_their_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    for settings in ("", "--lr 2", "--lr 2"):
        of = protocol.pilot_of(study(), settings)
        assert of.arms[1].commands == (f"train best --lr 1 {settings}".strip(),)
        assert (of.runs == study().runs) == (settings == "")
        if not Path(of.runs).exists():
            compare(of, *finished(of, (100, 101), {"lr": len(settings)}), Path(of.runs, "results.json"))
        protocol.record(of, Path(of.runs, "results.json"), settings)
    lines = [json.loads(line) for line in Path("results/pilots/paper.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and {line["seed"] for line in lines} == {100, 101}
    assert lines[0]["scores"].keys() == {"top1"} and {line["settings"] for line in lines} == {"", "--lr 2"}
    assert protocol.pilots(study()) == {"base": 2, "method": 2}
    assert protocol.is_pilot((100, 199)) and not protocol.is_pilot((0, 100))
