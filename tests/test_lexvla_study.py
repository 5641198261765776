"""The study: arms and their commands, floors, comparison and report."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from lexvla_runs import ARMS, arms, backbone, lm, small_set, states, tiny, tiny_lm  # noqa: F401
from scene_corpora import bank, corpus, small_corpus, small_scenes  # noqa: F401

from lexvla import config, patchdis
from lexvla import eval as evaluation
from shared import checkpoints
from studies import lexvla as study
from studies import lexvla_scenes, lexvla_states
from studies.harness import runner
from studies.harness.floors import Floor
from studies.harness.report import Comparison

SCRIPT = "lexvla.train"


def test_arms_differ_only_in_the_settings_of_their_names():
    """Of the presets, compared with the preset of the overuse penalty, and of the flags that the study adds."""
    base = dataclasses.asdict(config.EMOJI)
    allowed = {
        "emoji-none": {"penalty"},
        "emoji-flops": {"penalty", "lambda_image", "lambda_text"},
        "emoji-bow": {"text", "lora_rank"},
        "emoji-dense": {"penalty", "bias"},
    }
    for preset, names in allowed.items():
        other = dataclasses.asdict((config.PRESETS | study.lexvla_dense.PRESETS)[preset][1])
        assert {name for name in base if base[name] != other[name]} == names
    commands = {arm.name: arm.command for arm in study.ARMS}
    for arm, preset, factor in (("flops-weak", "emoji-flops", 0.3), ("overuse-weak", "emoji", 0.3)):
        cfg = config.PRESETS[preset][1]
        given = re.fullmatch(rf"train {preset} --lambda-image (\S+) --lambda-text (\S+)", commands[arm])
        assert given, f"{arm} is not there"
        assert [float(x) for x in given.groups()] == pytest.approx(
            [factor * cfg.lambda_image, factor * cfg.lambda_text]
        )
    assert {name for of in study.PENALTIES.values() for name in of} <= set(commands)


@pytest.fixture(scope="module")
def measured(arms: dict[str, Path], folder: Path, small_set: Path, small_scenes: Path):
    """(runs, their measurements, report) of two arms, copied as two seeds each."""
    runs = []
    for arm in ("overuse", "dense"):
        for seed in (0, 1):
            runs.append(str(folder / "eval" / f"{arm}-seed{seed}"))
            shutil.copytree(arms[arm], runs[-1])
    floor, report = Floor("none", lambda: {study.RECALL: -1.0, study.ALL: 101.0}), folder / "eval/results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        results = study.evaluate(runs, (str(small_set),), str(small_scenes), 32)
        runner.compare(dataclasses.replace(study.STUDY, floors=(floor,)), runs, results, report)
        yield runs, results, report


def test_report(measured: tuple, small_set: Path, small_scenes: Path):
    runs, results, report = measured
    summary = checkpoints.read_json(report)
    assert summary["seeds"] == [0, 1] and set(summary["arms"]) == {"overuse", "dense"}
    overuse = summary["arms"]["overuse"]
    for name in ("retrieval_known/top16/text_to_image_R@10", "retrieval_known/image/active",
                 "patchdis/random_miou_present", "retrieval_known/top5_in_caption"):  # fmt: skip
        assert name in overuse
    rows = {row["claim"]: row for row in summary["claims"]}
    primary = rows["words retrieve better than 512 dimensions"]
    recall = {arm: values[study.RECALL]["mean"] for arm, values in summary["arms"].items()}
    assert primary["primary"] and primary["difference"] == pytest.approx(recall["overuse"] - recall["dense"])
    both = [f"PatchDis, {which} classes: words above latent dimensions" for which in ("all", "present")]
    assert all(rows[claim]["primary"] for claim in both) and rows[both[0]]["verdict"] == "has not learned"
    above = rows["PatchDis of words above random patches"]
    assert above["difference"] == pytest.approx(overuse[study.ALL]["mean"] - overuse["patchdis/random_miou"]["mean"])
    study.plot_patches(Path(runs[0]), report.parent / "lexvla_patches.png", str(small_scenes), 32)
    for name in ("sparsity", "words", "penalties", "clouds", "patches", "classes"):
        assert (report.parent / f"lexvla_{name}.png").stat().st_size > 5_000
    first = Path(runs[0])
    assert (first / "words_retrieval_known.png").is_file()
    assert json.loads((first / "words_retrieval_known.json").read_text())["image"]
    with pytest.MonkeyPatch.context() as patch:  # what has been measured is not measured again
        patch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("evaluated twice"))
        assert study.evaluate(runs, (str(small_set),), str(small_scenes), 32) == results


def test_latent_texts_start_around_zero():
    """`start` makes the mean over captions 0, which removes what all prompts have in common."""
    torch.manual_seed(0)
    encoder = study.lexvla_dense.DenseTextEncoder(tiny_lm(), torch.arange(64), torch.randn(8, 16))
    states = torch.randn(6, 16) + 3
    encoder.start(states)
    z = encoder.hidden(states) @ encoder.projection.T + encoder.offset
    torch.testing.assert_close(z.mean(0), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder(states), torch.nn.functional.normalize(z, dim=-1))
    assert {name for name, p in encoder.named_parameters() if p.requires_grad} == {"projection", "offset"}


def test_the_language_model_reads_the_studys_captions(
    lm: Path, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lexvla_states.EMOJI, "lm", str(lm))
    sets = tuple(str(small_corpus / "eval" / name) for name in ("retrieval_new", "patchdis"))
    cfg = lexvla_states.Config(str(small_corpus / "train"), sets, str(tmp_path / "states.pt"))
    texts = lexvla_states.texts_of(cfg)
    lexvla_states.main(cfg)
    assert checkpoints.load_checkpoint(tmp_path / "states.pt")["texts"] == texts
    assert set(patchdis.classnames(sets[1])) < set(texts) and len(texts) > 30


def test_flops_at_the_recall_of_overuse():
    """Interpolated between the two arms around it; beyond them, the nearest arm's. Other arms have no such metric."""
    recall, share = study.RECALL, study.SHARED
    values = {"none": (12.0, 90.0), "flops-weak": (10.0, 70.0), "flops": (6.0, 30.0), "overuse": (11.0, 40.0)}
    found = {arm: [{recall: r, share: s}, {recall: r + 100 * (arm == "overuse"), share: s}] for arm, (r, s) in
             values.items()}  # fmt: skip
    study.derive(Comparison(found, [0, 1], {}, set()))
    assert [run[study.EQUAL] for run in found["flops"]] == [80.0, 90.0]
    assert [run[study.EQUAL] for run in found["overuse"]] == [40.0, 40.0] and study.EQUAL not in found["none"][0]
    few = {"overuse": [{recall: 1.0}], "dense": [{recall: 2.0}]}
    study.derive(Comparison(few, [0], {}, set()))
    assert few == {"overuse": [{recall: 1.0}], "dense": [{recall: 2.0}]}


def test_penalties_rise_over_the_papers_share_of_the_steps():
    """2,000 of the 17,964 steps that 12 epochs of 9.2M pairs make."""
    paper, ours = config.PAPER, config.EMOJI
    steps = lexvla_scenes.Config.samples // ours.batch_size * ours.epochs
    assert paper.dataset_size // paper.batch_size * paper.epochs == 17_964
    assert ours.penalty_warmup / steps == pytest.approx(paper.penalty_warmup / 17_964, rel=0.02)


def test_an_image_is_encoded_once():
    seen = []
    encode = study.Remembering(lambda pixels: seen.extend(pixels) or pixels.mean((1, 2, 3))[:, None])
    images = torch.rand(5, 3, 4, 4)
    for batch in (images[[0, 1]], images[[1, 2, 3]], images[[4, 0]], images):
        torch.testing.assert_close(encode(batch), batch.mean((1, 2, 3))[:, None])
    assert len(seen) == 5


def test_a_patch_has_the_class_that_covers_half_of_it(small_corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study, "tokens", lambda pixels: torch.arange(65.0)[None, :, None].expand(len(pixels), 65, 3))
    images = small_corpus / "eval/patchdis_train"
    scenes = list(patchdis.labelled_images(str(images), 128, lambda image: torch.zeros(3, 128, 128)))
    for (_, mask, ignore), (tokens, labels) in zip(scenes, study.labelled_patches(str(images)), strict=True):
        side = mask.shape[-1] // 8
        for token, label in zip(tokens[:, 0].long() - 1, labels, strict=True):
            top, left = (int(token) // 8 * side, int(token) % 8 * side)
            cell = mask[0, top : top + side, left : left + side]
            assert label != ignore and (cell == label).float().mean() >= 0.5
