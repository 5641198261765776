"""Arms and reductions that the study declares."""

import itertools

import tyro

from shared.study.runner import Stage, in_order
from tldr_reduction import config
from tldr_reduction.study import EVALUATED, STUDY


def test_reductions_of_a_seed_take_turns():
    """They write into one work folder; and an arm makes no reduction that comes after its own."""

    def reductions(arms: str) -> list[Stage]:
        return [job for job in STUDY.jobs(STUDY.chosen(arms)) if job.name.startswith("reduced/")]

    everything = reductions("all")
    assert len(everything) == len({job.name for job in everything}) == 21
    for before, job in itertools.pairwise(in_order(everything)):
        assert before.name in job.after
    assert [job.name for job in reductions("core")] == [f"reduced/{n}" for n in ("tldr", "random", "random-refined")]
    assert not reductions("full")


def test_arms_are_trained_on_the_reduction_they_are_named_after():
    runs = "runs/tldr_reduction"
    for arm in STUDY.arms:
        (words,) = STUDY.words(arm, 7)
        reduction = arm.name.removeprefix("blip-").removesuffix("-steps")
        expected = None if reduction == "full" else f"{runs}/reduced/{reduction}-seed7/shards"
        assert (words[words.index("--data") + 1] if "--data" in words else None) == expected
        assert words[-4:] == ["--seed", "7", "--out", f"{runs}/{arm.name}-seed7"]
        assert ("--epochs" in words) == arm.name.endswith("-steps")
        parsed = tyro.extras.overridable_config_cli(config.PRESETS, args=words[3:])
        assert (parsed.stage, parsed.data) == ("blip" if "blip" in arm.name else "clip", expected or config.POOL)
        assert (parsed.eval_every > 0) == (arm.name in EVALUATED)
    for stage in STUDY.stages:
        (words,) = STUDY.words(stage, 7)
        if stage.name.startswith("reduced/"):
            parsed = tyro.cli(config.ReduceConfig, args=words[3:])
            assert parsed.out == f"{runs}/{stage.name}-seed7" and parsed.work == f"{runs}/work-seed7"
            assert parsed.match in (None, f"{runs}/reduced/tldr-seed7") and parsed.seed == 7
            assert parsed.captioner == f"{runs}/captioner-seed7" and parsed.caption_model == f"{runs}/finetune-seed7"
