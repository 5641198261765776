"""Retrieval, PatchDis and the words' usage on small runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lexvla_runs import ARMS, arms, backbone, lm, small_set, states, tiny  # noqa: F401
from PIL import Image
from scene_corpora import bank, corpus, small_corpus, small_scenes  # noqa: F401
from scripts import one_sentence

from lexvla import eval as evaluation
from lexvla.checkpoints import load_run
from lexvla.eval import named_recalls, retrieval_recall, sparsity_sweep, sweep_levels
from lexvla.patchdis import labelled_images
from lexvla.text import encode_texts
from lexvla.towers import normalize
from shared import data, run

SCRIPT = "lexvla.train"


def test_the_sweep_goes_from_one_word_to_all():
    assert sweep_levels(5) == [1, 2, 4, 5] and sweep_levels(8) == [1, 2, 4, 8] and sweep_levels(2) == [1, 2]
    torch.manual_seed(0)
    s_img, s_txt, owners = torch.rand(6, 9), torch.rand(12, 9), torch.arange(6).repeat_interleave(2)
    whole = sparsity_sweep(s_img, s_txt, owners, sweep_levels(9), (1, 5, 10))
    assert whole.shape == (5, 6)
    torch.testing.assert_close(whole[-1], torch.cat(retrieval_recall(s_img @ s_txt.T, owners, (1, 5, 10))))
    torch.testing.assert_close(whole[:, [0, 3]], sparsity_sweep(s_img, s_txt, owners, sweep_levels(9)))
    names = named_recalls(whole[-1])
    assert names["text_to_image_R@5"] == pytest.approx(100 * whole[-1, 4].item())
    assert names["mean_recall"] == pytest.approx(100 * whole[-1].mean().item())


@pytest.mark.parametrize("part", ["images", "masks"])
def test_broken_or_too_large_files_of_a_patchdis_folder_are_refused(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "images/0.png")
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "masks/0.png")
    ((pixels, mask, ignore),) = labelled_images(str(tmp_path), 8, normalize(""))
    assert pixels.shape == (1, 3, 8, 8) and torch.equal(mask[0], torch.eye(8).long()) and ignore == 255
    bad = tmp_path / part / "0.png"
    Image.new("L", (8, 8)).save(bad, "EPS")
    with pytest.raises(ValueError, match=f"{part}/0.png"):
        list(labelled_images(str(tmp_path), 8, normalize("")))
    Image.new("L", (8, 8)).save(bad, "PNG")
    monkeypatch.setattr(data, "MAX_PIXELS", 63)
    with pytest.raises(ValueError, match="/0.png.* 63 "):
        list(labelled_images(str(tmp_path), 8, normalize("")))


def test_patchdis_of_a_run(arms: dict[str, Path], small_scenes: Path):
    """Predictions on unlabelled pixels count as false."""
    process = run.Process(0, 1, torch.device("cpu"))
    cfg = evaluation.Config((), (), str(small_scenes), 32, background=True)
    flat = evaluation.evaluate_run(str(arms["overuse"]), cfg, process)
    assert 0 <= flat["patchdis/miou"] <= flat["patchdis/miou_present"] <= 100
    assert (arms["overuse"] / "classes.png").stat().st_size > 5_000


def test_all_words_kept_is_dense(arms: dict[str, Path], small_set: Path):
    process, found = run.Process(0, 1, torch.device("cpu")), []
    for topk in (None, 10_000):
        cfg = evaluation.Config((), (str(small_set),), topk=topk)
        found.append(evaluation.evaluate_run(str(arms["overuse"]), cfg, process))
    assert found[0]["retrieval_known/image/active"] < found[1]["retrieval_known/image/active"]
    assert found[1]["retrieval_known/mean_recall"] == found[1]["retrieval_known/dense/mean_recall"]


def test_a_run_is_measured_without_its_states(arms: dict[str, Path], states: Path, tmp_path: Path):
    """The language model computes them again."""
    captions, found = ["a red apple", "lab, magnifying", "flag: japan"], []
    for there in (True, False):
        if not there:
            states.rename(tmp_path / "states.pt")
        model, _, _, read = load_run(arms["overuse"])
        found.append(encode_texts(model, read, captions))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    assert states.is_file()


def test_evaluation_errors(in_process, arms: dict[str, Path], tmp_path: Path):
    few = tmp_path / "few"
    for part in ("images", "masks"):
        (few / part).mkdir(parents=True)
        Image.new("L", (16, 16), 1).save(few / part / "0.png")
    (few / "classnames.txt").write_text("cat\n")
    for arguments, words in (
        ((tmp_path / "nowhere", "--sets", tmp_path), "checkpoint.pt does not exist"),
        ((arms["none"],), "pass --sets"),
        ((arms["none"], "--sets", tmp_path), str(tmp_path)),
        ((arms["none"], "--patchdis", tmp_path), "classnames.txt does not exist"),
        ((arms["none"], "--topk", "0"), "--topk must be at least 1"),
        ((arms["none"], "--batch-size", "0"), "--batch-size must be at least 1"),
        ((arms["none"], "--patchdis", few, "--patchdis-side", "97"), "no multiple of"),
        ((arms["none"], "--patchdis", few, "--sets", tmp_path), "class 1, but"),  # before sets
        (("--sets", tmp_path), "at least one run folder"),
    ):
        result = in_process(*arguments, module="lexvla.eval")
        assert result.code == 2 and words in result.err and one_sentence(result.err), result.err
