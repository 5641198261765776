"""The study: arms and their commands, compared and reported."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from test_lexvla_scenes import small_scenes  # noqa: F401
from test_lexvla_train import (  # noqa: F401
    ARMS,
    GROUPS,
    SCRIPT,
    SECONDS,
    SHARDS,
    arms,
    backbone,
    folder,
    lm,
    small_set,
    states,
    tiny,
)

from lexvla import config, study
from lexvla import eval as evaluation
from shared import checkpoints


def test_arms_differ_in_what_they_are_named_after():
    """Presets against LexVLA's, and the weights that study.py gives against the preset's."""
    base = dataclasses.asdict(config.EMOJI)
    allowed = {
        "emoji-none": {"penalty"},
        "emoji-flops": {"penalty", "lambda_image", "lambda_text"},
        "emoji-bow": {"text", "states", "lora_rank", "bias"},
        "emoji-dense": {"head", "penalty", "bias"},
    }
    for preset, names in allowed.items():
        other = dataclasses.asdict(config.PRESETS[preset][1])
        assert {name for name in base if base[name] != other[name]} == names
    commands = {arm.name: arm.command for arm in study.ARMS}
    for arm, preset, factor in (("flops-strong", "emoji-flops", 10), ("overuse-weak", "emoji", 0.1),
                                ("overuse-strong", "emoji", 10)):  # fmt: skip
        cfg = config.PRESETS[preset][1]
        given = re.fullmatch(rf"train {preset} --lambda-image (\S+) --lambda-text (\S+)", commands[arm])
        assert given, f"{arm} is not there"
        assert [float(x) for x in given.groups()] == pytest.approx(
            [factor * cfg.lambda_image, factor * cfg.lambda_text]
        )


@pytest.fixture(scope="module")
def measured(arms: dict[str, Path], folder: Path, small_set: Path, small_scenes: Path):
    """Two arms, copied as two seeds each, evaluated and compared."""
    runs = []
    for arm in ("overuse", "dense"):
        for seed in (0, 1):
            runs.append(str(folder / "eval" / f"{arm}-seed{seed}"))
            shutil.copytree(arms[arm], runs[-1])
    sets = (str(small_set), str(GROUPS))
    cfg = evaluation.Config(
        runs=tuple(runs), sets=sets, patchdis=str(small_scenes), report=str(folder / "eval/results.json"), device="cpu"
    )
    evaluation.main(cfg)
    return cfg


def test_report(measured: evaluation.Config, capsys):
    summary = checkpoints.read_json(measured.report)
    assert summary["seeds"] == [0, 1] and set(summary["arms"]) == {"overuse", "dense"}
    overuse = summary["arms"]["overuse"]
    for name in ("retrieval_ood/top16/text_to_image_R@1", "retrieval_ood/image/active", "patchdis/random_miou_present",
                 "groups_id/top1", "retrieval_ood/top5_in_caption"):  # fmt: skip
        assert name in overuse
    assert any("PatchDis above random" in row["claim"] for row in summary["claims"])
    for name in ("lexvla_sparsity.png", "lexvla_words.png", "lexvla_clouds.png", "lexvla_patches.png"):
        assert (Path(measured.report).parent / name).stat().st_size > 5_000
    first = Path(measured.runs[0])
    assert (first / "patches.png").is_file() and (first / "words_retrieval_ood.png").is_file()
    assert json.loads((first / "words_retrieval_ood.json").read_text())["image"]
    with pytest.MonkeyPatch.context() as patch:  # what has been measured is not measured again
        patch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("evaluated twice"))
        evaluation.main(measured)
    with pytest.raises(ValueError, match="ARM-seedN"):
        study.STUDY.compare(["runs/other"], [{}], Path(measured.report))
