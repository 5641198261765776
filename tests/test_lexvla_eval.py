"""Retrieval, PatchDis and the words' usage, compared with golden numbers and measured on small runs."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import one_sentence
from test_corpora_scenes import bank, corpus  # noqa: F401
from test_lexvla_model import check, something_was_compared  # noqa: F401
from test_lexvla_scenes import small_corpus, small_scenes  # noqa: F401
from test_lexvla_train import (  # noqa: F401
    ARMS,
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

from lexvla import eval as evaluation
from lexvla.checkpoints import load_run
from lexvla.eval import named_recalls, retrieval_recall, sparsity_sweep, sweep_levels, usage
from lexvla.model import sparsify
from lexvla.patchdis import labelled_images, patchdis, present_classes
from lexvla.text import encode_texts
from lexvla.towers import normalize
from shared import data, run


# sweep_recall1_optimistic: ties count as hits there; ours count as misses only
@pytest.mark.golden("lexvla", "retrieval", unused=("sweep_recall1_optimistic",))
def test_retrieval(case):
    image_of_text, ks = case["image_of_text"], torch.as_tensor(case["ks"]).view(-1).tolist() if "ks" in case else [1]
    s_img, s_txt = case.get("s_img"), case.get("s_txt")
    sim = case["sim"] if "sim" in case else s_img @ s_txt.T
    if "i2t_recall" in case:
        i2t, t2i = retrieval_recall(sim, image_of_text, ks)
        case.close("i2t_recall", i2t, rtol=1e-6)
        case.close("t2i_recall", t2i, rtol=1e-6)
    for k in range(int(max(sim.shape))):  # ranks, through the recall at every cut-off
        i2t, t2i = retrieval_recall(sim, image_of_text, [k + 1])
        for recall, rank in ((i2t, "i2t_rank"), (t2i, "t2i_rank")):
            if rank in case:
                expected = (case[rank] <= k).double().mean().item()
                assert abs(float(recall[0]) - expected) < 1e-6
    if "sweep_topk" in case:
        sweep = sparsity_sweep(s_img, s_txt, image_of_text, case["sweep_topk"].tolist())
        case.close("sweep_recall1", sweep, rtol=1e-6)
    if "threshold_i2t_recall" in case:
        img, txt = sparsify(s_img), sparsify(s_txt)
        i2t, t2i = retrieval_recall(img @ txt.T, image_of_text, ks)
        check(case, rtol=1e-6, threshold_i2t_recall=i2t, threshold_t2i_recall=t2i)
        check(case, threshold_active_img=(img > 0).sum(1), threshold_active_txt=(txt > 0).sum(1))


@pytest.mark.golden("lexvla", "patchdis")
def test_patchdis(case):
    s_patch, s_class, masks = case["s_patch"], case["s_class"], case["masks"]
    grid = tuple(case["grid"].tolist())
    ignore = {"ignore": case["ignore"]} if "ignore" in case else {}
    assert len(s_class) == case.get("num_classes", len(s_class))
    for suffix, options in (("", {}), ("_present", {"present_only": True}), ("_bg", {"background": True})):
        if f"intersection{suffix}" in case:
            intersection, union, miou = patchdis(s_patch, s_class, grid, masks, **ignore, **options)
            case.close(f"intersection{suffix}", intersection)
            case.close(f"union{suffix}", union)
            case.close(f"miou{suffix}", miou, rtol=1e-6)
            if not suffix and "iou" in case:
                case.close("iou", intersection / union, rtol=1e-6)
    if "sim" in case:
        sim = s_patch @ s_class.T
        case.close("sim", sim, rtol=1e-5, atol=1e-6)
        check(case, pred=sim.argmax(-1).view(len(sim), *grid))
        absent = ~present_classes(masks, len(s_class), ignore.get("ignore", 255))
        check(case, pred_present=sim.masked_fill(absent[:, None], -math.inf).argmax(-1).view(len(sim), *grid))


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


@pytest.mark.golden("lexvla", "usage")
def test_usage(case):
    result = usage(case["s"], case["topk"])
    check(
        case,
        rtol=1e-5,
        document_frequency=result["document_frequency"],
        max_document_frequency=result["max_document_frequency"],
        mean_activation=result["mean_activation"],
        usage_entropy=result["entropy"],
    )


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
    """Predictions on unlabelled pixels count as false; sparse representations have as many words as top-k says."""
    process = run.Process(0, 1, torch.device("cpu"))
    cfg = evaluation.Config((), (), str(small_scenes), 32, background=True)
    flat = evaluation.evaluate_run(str(arms["overuse"]), cfg, process)
    assert 0 <= flat["patchdis/miou"] <= flat["patchdis/miou_present"] <= 100
    assert (arms["overuse"] / "classes.png").stat().st_size > 5_000
    found = []
    for topk in (None, 1, 10_000):
        sparse = dataclasses.replace(cfg, patchdis_sparse=True, topk=topk)
        found.append(evaluation.evaluate_run(str(arms["overuse"]), sparse, process))
        assert found[-1]["patchdis/random_miou"] == flat["patchdis/random_miou"]
    assert found[2]["patchdis/miou"] == flat["patchdis/miou"] != found[1]["patchdis/miou"]


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
        ((arms["none"],), "name --sets"),
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
