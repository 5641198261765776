"""Arms, reductions, pools and floors of the study."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro

from shared import tars
from studies import tldr_reduction as study
from studies import tldr_reduction_learner as learner
from studies.harness import verdicts
from studies.harness.runner import Stage, in_order
from studies.tldr_reduction import IN_EACH, KINDS, POOLS, REDUCTIONS, STUDY, WHERE, shards
from tldr_reduction import config


def test_reductions_of_a_pool_take_turns():
    """Each waits for those before it, with which it shares a work folder; core arms need no other reductions."""

    def reductions(arms: str) -> list[Stage]:
        return [job for job in STUDY.jobs(STUDY.chosen(arms)) if job.name.startswith("reduced/")]

    everything = in_order(reductions("all"))
    assert len(everything) == len({job.name for job in everything}) == len(REDUCTIONS)
    for pool in POOLS:
        own = [job for job in everything if REDUCTIONS[job.name.removeprefix("reduced/")][0] == pool]
        for before, job in itertools.pairwise(own):
            assert before.name in job.after
    core = {job.name.removeprefix("reduced/") for job in reductions("core")}
    assert core == {"codes", "random", "tldr"}
    assert not reductions("full full-epochs")


def test_arms_are_trained_on_the_reduction_they_are_named_after():
    runs = "runs/tldr_reduction"
    for arm in STUDY.arms:
        (words,) = STUDY.words(arm, 7)
        parsed = tyro.cli(learner.COMMANDS, args=words[1:])
        whole = {"full-epochs": ""} | {f"full{pool}": pool for pool in ("", *WHERE)}
        whole = whole.get(arm.name)
        assert parsed.data == (f"{runs}/reduced/{arm.name}-seed7/shards" if whole is None else shards(whole))
        assert words[-4:] == ["--seed", "7", "--out", f"{runs}/{arm.name}-seed7"] and words[1] == "train"


def test_reductions_are_of_their_pool_and_equal_in_number():
    runs = "runs/tldr_reduction"
    for stage in STUDY.stages:
        (words,) = STUDY.words(stage, 7)
        name = stage.name.removeprefix("reduced/")
        pool, _ = REDUCTIONS[name]
        parsed = tyro.cli(learner.COMMANDS, args=words[1:])
        assert parsed.data == shards(pool) and parsed.seed == 7 and parsed.out == f"{runs}/{stage.name}-seed7"
        assert parsed.work == f"{runs}/work{pool}-seed7" and parsed.clusters > 1000
        pictures = "" if pool in KINDS else pool
        assert parsed.match in (None, f"{runs}/reduced/codes{pictures}-seed7")
        assert (parsed.match is not None) == name.startswith("random")
        assert parsed.predictions is None or parsed.predictions.startswith(POOLS[pool][1])
        assert parsed.check == (name == "codes")  # only this one measures cohesion and coverage
        assert (parsed.select == "all") == name.startswith("full-refined")


def test_arms_have_equal_steps_and_one_has_the_epochs_of_a_third():
    """8,000 pairs are 62 batches, and a third of them are 21."""
    assert study.LONG / 62 == study.STEPS / 21 == 20
    for arm in STUDY.arms:
        (words,) = STUDY.words(arm, 7)
        parsed = tyro.cli(learner.COMMANDS, args=words[1:])
        assert parsed.steps == (study.LONG if arm.name == "full-epochs" else study.STEPS)
        assert parsed.epochs == 20 and parsed.batch_size == 128


def test_pools_have_the_same_arms_and_are_built_for_each_of_them():
    names = {arm.name: arm for arm in STUDY.arms}
    for pool in WHERE:
        assert all(not names[f"{name}{pool}"].core for name in IN_EACH)
        for name in IN_EACH:
            built = [once.command for once in STUDY.before if not once.arms or f"{name}{pool}" in once.arms]
            scenes, folder, _ = POOLS[pool]
            assert any(f"--out {scenes} " in command for command in built)
            assert any(command.endswith(f"pool --source {scenes} --out {folder}") for command in built) or (
                folder == "data/tldr" and "studies.tldr_reduction_pool" in built
            )


def test_arms_have_the_floors_of_their_captions():
    """Of the floors by neighbours, that of an arm with refined captions is the nearest refined caption, of an arm
    without, the nearest original one; of a random third, or of all. Each arm has one floor by correlation."""
    names = [floor.name for floor in STUDY.floors]
    by_neighbours = [i for i, name in enumerate(names) if name.startswith(("chance", "nearest"))]
    bars = [(STUDY.floors[i].arms, {study.SCORE: float(i)}) for i in by_neighbours]
    correlated = [arm for floor in STUDY.floors for arm in floor.arms if floor.name.startswith("canonical")]
    assert sorted(correlated) == sorted(arm.name for arm in STUDY.arms)

    def highest(arm: str) -> str:
        return names[int(verdicts.floor_of(study.SCORE, bars, arm))]

    plain, refined = "nearest caption by raw pixels, ", "nearest refined caption by raw pixels, "
    assert highest("full") == highest("full-epochs") == plain + "all" and highest("full-refined") == refined + "all"
    assert highest("random") == plain + "the random third" == highest("random-refined-80")
    assert highest("random-refined") == refined + "the random third"
    assert highest("codes") == plain + "the third by codes" and highest("image").startswith(refined)
    assert highest("tldr") == highest("generated") == refined + "the third by codes"
    assert highest("dropped-low") == plain + "the half of higher scores"
    for pool, where in WHERE.items():
        assert highest(f"full-refined{pool}") == f"{refined}all; {where}"
        assert highest(f"tldr{pool}") == f"{refined}the third by codes; {where}"
        assert highest(f"codes{pool}") == f"{plain}the third by codes; {where}"
    arms = {arm.name for arm in STUDY.arms}
    assert all(set(floor.arms) <= arms for floor in STUDY.floors)
    assert all({claim.method, claim.baseline.partition(":")[0]} <= arms for claim in STUDY.claims)


def test_the_nearest_refined_caption_is_the_oracles(monkeypatch):
    """Two pictures with a generic and a wrong caption; the oracle is right about the first."""
    pictures = torch.eye(2)
    monkeypatch.setattr(study, "pool_of", lambda pool: (pictures, ["", "a"], ["a", "a"]))
    monkeypatch.setattr(study, "EvalSet", lambda path, transform: SimpleNamespace(classnames=["a", "b"]))
    monkeypatch.setattr(study.floors, "read", lambda *_: (pictures, torch.tensor([0, 1])))
    assert study.nearest_caption()["names_ood/top1"] == 0
    assert study.nearest_caption(refined=True)["names_ood/top1"] == 50


def test_the_reference_is_trained_on_true_names(monkeypatch):
    """Three of the four test pictures show what their labels say."""
    pictures, labels = torch.tensor([[9.0, 0.0], [0.0, 9.0]] * 10), torch.tensor([1, 0] * 10)
    splits = {"train": (pictures, labels), "test": (pictures[:4], torch.tensor([1, 0, 1, 1]))}
    monkeypatch.setattr(study.floors, "read", lambda path, split, *_: splits[split])
    assert study.on_labels() == {f"{Path(folder).name}/top1": 75.0 for folder in study.SETS}


def test_the_nearest_caption_is_of_the_samples_that_a_reduction_keeps(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for seed, lines in enumerate(("a,1\nb,0\n", "a,0\nb,1\n")):
        folder = tmp_path / f"runs/tldr_reduction/reduced/codes-seed{seed}"
        folder.mkdir(parents=True)
        (folder / "report.csv").write_text(f"key,kept\n{lines}")
    assert [study.kept("codes", seed).tolist() for seed in (0, 1)] == [[0], [1]]
    assert [path.parent.name for path in STUDY.floor_files([1, 2])] == ["codes-seed1"]
    pictures = torch.eye(2)
    monkeypatch.setattr(study, "pool_of", lambda pool: (pictures, ["a", "a"], ["a", "b"]))
    monkeypatch.setattr(study, "EvalSet", lambda path, transform: SimpleNamespace(classnames=["a", "b"]))
    monkeypatch.setattr(study.floors, "read", lambda *_: (pictures, torch.tensor([0, 1])))
    assert study.nearest_caption(refined=True)["names_ood/top1"] == 100
    assert study.nearest_caption("codes", seed=0, refined=True)["names_ood/top1"] == 50
    with pytest.raises(FileNotFoundError, match="reduced/image-seed0/report.csv"):
        study.kept("image", 0)


ABOUT = json.dumps({"original": 1, "noise": "name"})


def test_scores_are_of_the_kept_pairs_before_and_after():
    lines = [{"itm": "0.1", "itm_after": "0.3"}, {"itm": "0.6", "itm_after": "0.8"}, {"itm": "0.0", "itm_after": ""}]
    found = study.score_metrics({"itm": {"before": {"cut": 0.5}}}, lines)
    assert found == pytest.approx(
        {"itm/before_mean": 35, "itm/before_below_cut": 50, "itm/after_mean": 55, "itm/after_below_cut": 50}
    )
    median = study.score_metrics({"itm": {"before": {"cut": 0.2}}}, lines)  # a median, as of cosines
    assert (median["itm/before_below_cut"], median["itm/after_below_cut"]) == (50, 0)
    assert study.score_metrics({}, [{"key": "a"}]) == {}


def test_quality_of_a_reduction_is_in_percent_of_cosines():
    checks = {"captions": {"samples": 9, "coverage": 0.5, "coverage_random": [0.4, 0.45]}, "another encoder": {}}
    assert study.quality_metrics({"checks": checks}) == pytest.approx(
        {"captions/coverage": 50, "captions/coverage_random": 42.5}
    )
    assert study.quality_metrics({"checks": {}}) == {}


def test_metrics_of_data_are_of_the_samples_that_a_run_reads(tmp_path, capsys):
    """Data may be a list of shards, of which --dataset-size uses the first samples; steps follow from their number."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "seconds": 0.0}\n')
    for shard in range(2):
        samples = []
        for row in range(64 * shard, 64 * shard + 64):
            about = json.dumps({"original": row // 2, "noise": ("name", "other")[row % 2]})
            samples.append({"__key__": f"{row:03}", "png": b"?", "txt": "a", "json": about})
        tars.write_tar(tmp_path / f"pool/{shard:05}.tar", samples)
    cfg = config.Config(data=f"{tmp_path}/pool/{{00000..00001}}.tar", batch_size=32, epochs=3)
    for size, pairs in ((None, 128), (70, 70)):
        found = study.training_metrics(tmp_path, dataclasses.replace(cfg, dataset_size=size))
        assert found["data/pairs"] == pairs and found["data/scenes"] == pairs / 2 and found["data/named"] == 50
        assert found["steps"] == 3 * (pairs // 32) and "early_loss_ita" not in found
    assert study.training_metrics(tmp_path, dataclasses.replace(cfg, data="gone/{0..9}.tar")) == {}
    assert capsys.readouterr().out == ""


def test_a_reduction_is_measured_without_the_data_that_it_reduced(tmp_path, capsys):
    """They may be gone by then."""
    shard = tmp_path / "shards/00000.tar"
    tars.write_tar(shard, [{"__key__": key, "png": b"?", "txt": "a", "json": ABOUT} for key in ("b", "c")])
    cfg = config.Config(data=str(tmp_path / "shards"))
    known = {"data/pairs": 2, "data/scenes": 1, "data/named": 100.0}
    assert study.data_metrics(cfg) == known
    checks = {"captions": {"samples": 9, "coverage": 0.5}}
    (tmp_path / "report.json").write_text(json.dumps({"checks": checks}))
    (tmp_path / "config.json").write_text('{"data": "gone.tar", "captions": "original"}')
    (tmp_path / "report.csv").write_text("key,kept,cluster\nb,1,0\nc,1,1\n")
    measured = known | {"captions/coverage": 50.0}
    assert study.data_metrics(cfg) == measured
    assert "gone.tar does not exist" in capsys.readouterr().out
    tars.write_tar(tmp_path / "shards/00001.tar", [{"__key__": "d", "png": b"?", "txt": "a", "json": ABOUT}])
    assert study.data_metrics(dataclasses.replace(cfg, data=str(shard))) == known  # not of all shards
