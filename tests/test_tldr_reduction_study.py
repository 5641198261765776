"""Arms, reductions and pools that the study declares."""

import itertools

import tyro

from shared.study.runner import Stage, in_order
from tldr_reduction import config
from tldr_reduction.study import POOLS, REDUCTIONS, STUDY, shards


def test_reductions_of_a_pool_take_turns():
    """They write into one work folder; and an arm makes no reduction that comes after its own."""

    def reductions(arms: str) -> list[Stage]:
        return [job for job in STUDY.jobs(STUDY.chosen(arms)) if job.name.startswith("reduced/")]

    everything = in_order(reductions("all"))
    assert len(everything) == len({job.name for job in everything}) == len(REDUCTIONS)
    for pool in POOLS:
        own = [job for job in everything if REDUCTIONS[job.name.removeprefix("reduced/")][0] == pool]
        for before, job in itertools.pairwise(own):
            assert before.name in job.after
    core = {job.name.removeprefix("reduced/") for job in reductions("core")}
    assert core == {"codes", "random", "random-refined", "tldr", "full-refined"}
    assert not reductions("full")


def test_arms_are_trained_on_the_reduction_they_are_named_after():
    runs = "runs/tldr_reduction"
    for arm in STUDY.arms:
        (words,) = STUDY.words(arm, 7)
        parsed = tyro.extras.overridable_config_cli(config.PRESETS, args=words[1:])
        whole = {"full": "", "full-clean": "-clean", "full-noisy": "-noisy"}.get(arm.name)
        assert parsed.data == (f"{runs}/reduced/{arm.name}-seed7/shards" if whole is None else shards(whole))
        assert words[-4:] == ["--seed", "7", "--out", f"{runs}/{arm.name}-seed7"] and parsed.lock_image


def test_reductions_are_of_their_pool_and_equal_in_number():
    runs = "runs/tldr_reduction"
    for stage in STUDY.stages:
        (words,) = STUDY.words(stage, 7)
        name = stage.name.removeprefix("reduced/")
        pool, _ = REDUCTIONS[name]
        parsed = tyro.cli(config.ReduceConfig, args=words[1:])
        assert parsed.data == shards(pool) and parsed.seed == 7 and parsed.out == f"{runs}/{stage.name}-seed7"
        assert parsed.work == f"{runs}/work{pool}-seed7" and parsed.clusters > 1000
        assert parsed.match in (None, f"{runs}/reduced/codes{pool}-seed7")
        assert (parsed.match is not None) == name.startswith("random")
        assert parsed.predictions is None or parsed.predictions.startswith(POOLS[pool][1])
