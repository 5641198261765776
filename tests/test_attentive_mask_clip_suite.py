"""The 26 sets of the paper's suite and SLIP's prompts for them, from a made-up clone of SLIP."""

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import one_sentence

from attentive_mask_clip import eval as evaluation
from attentive_mask_clip import suite
from attentive_mask_clip.config import Config as TrainConfig
from attentive_mask_clip.model import create_model
from attentive_mask_clip.suite import SUITE, averages, in_order_of, plain, read_prompts, reported, suite_name
from shared import run, tars
from shared.evalsets import EvalSet

SCRIPT = "attentive_mask_clip.eval"
ALONE = run.Process(0, 1, torch.device("cpu"))
PETS = ["Abyssinian", "Bengal", "american bulldog", "beagle"]  # SLIP's order: cats first


def make_set(folder: Path, classnames: list[str], labels: list[int]) -> Path:
    """Write an evaluation set with one picture per label."""

    def image(label: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (20, 20), (90 * label % 256, 40, 200)).save(file, "PNG")
        return file.getvalue()

    tars.write_split(folder / "test", [{"png": image(label), "cls": str(label)} for label in labels])
    (folder / "classnames.txt").write_text("\n".join(classnames) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    return folder


def make_clone(folder: Path, labels: dict, templates: dict) -> Path:
    folder.mkdir()
    for name, content in (("labels.json", labels), ("templates.json", templates)):
        (folder / name).write_text(json.dumps(content))
    return folder


# -------------------------------------------------------------------------------------------------------------- names


def test_sets_are_known_by_either_name():
    assert len(SUITE) == 26 and [name for name in SUITE if SUITE[name] is None] == [
        "ucf101_frames", "kinetics700_frames", "hateful_memes",
    ]  # fmt: skip
    for slip, benchmark in SUITE.items():
        names = {slip} if benchmark is None else {slip, *(x + benchmark.replace("/", "-") for x in ("", "wds_"))}
        names |= {benchmark.rpartition("/")[2]} if benchmark else set()
        assert {suite_name(name) for name in names} == {slip}
    assert suite_name("wds_vtab-svhn") is suite_name("names_ood") is suite_name("wds_imagenetv2") is None
    kinds = {reported(name): name for name in reversed(SUITE)}
    assert kinds == {
        "top1": "food101", "mean_per_class": "aircraft", "top1_top5": "kinetics700_frames", "roc_auc": "hateful_memes",
    }  # fmt: skip


def test_class_names_are_compared_without_their_spelling():
    for one, other in {
        "001.Black_footed_Albatross": "Black footed Albatross",
        "ApplyEyeMakeup": "Apply Eye Makeup",
        "three": "3",
        "Ram C/V Van": "ram c-v van",
    }.items():
        assert plain(one) == plain(other)
    assert plain("707-320") != plain("320") and plain("seventeen") == "seventeen"


# -------------------------------------------------------------------------------------------------------------- order


def test_names_decide_the_order():
    entries = [[name] for name in PETS]
    assert in_order_of(["abyssinian", "American_Bulldog", "Beagle", "bengal"], entries, "x") == [
        ["Abyssinian"], ["american bulldog"], ["beagle"], ["Bengal"],
    ]  # fmt: skip
    clevr = in_order_of(["three", "nine", "ten"], [["10"], ["3"], ["9"]], "x")
    assert clevr == [["3"], ["9"], ["10"]]
    faces = [["angry"], ["happy", "smiling"], ["sad", "depressed"]]
    assert in_order_of(["sad", "angry", "smiling"], faces, "x") == [faces[2], faces[0], faces[1]]


def test_differently_worded_names_keep_an_equal_order():
    entries = [["tench"], ["missile"], ["sunglasses"], ["missile"], ["sunglasses"]]
    for ours in (["tench", "missile", "dark glasses", "missile", "sunglasses"], [e for [e] in entries]):
        assert in_order_of(ours, entries, "x") == entries


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (
            ["Bengal", "Abyssinian", "bulldog", "beagle"],
            "'Bengal'",
        ),
        (["Abyssinian", "cat", "dog", "hound"], "'cat'"),
        (["Abyssinian", "Abyssinian", "american bulldog", "beagle"], "'Abyssinian'"),
        (["Abyssinian"], "x has 1 classes"),
    ],
)
def test_an_ambiguous_order_is_refused(ours: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        in_order_of(ours, [[name] for name in PETS], "x")


# ------------------------------------------------------------------------------------------------------------ prompts


def test_prompts_of_a_clone(tmp_path: Path):
    clone = make_clone(tmp_path / "SLIP", {"pets": PETS}, {"pets": ["a photo of a {}.", "{}, a pet"], "mnist": ["x"]})
    pets = make_set(tmp_path / "wds_vtab-pets", sorted(PETS, key=str.lower), [0, 1])
    found = read_prompts(clone, [EvalSet(pets, lambda image: image)])
    assert list(found) == ["wds_vtab-pets"] and found["wds_vtab-pets"].templates == ["a photo of a {c}.", "{c}, a pet"]
    assert found["wds_vtab-pets"].classnames == [["Abyssinian"], ["american bulldog"], ["beagle"], ["Bengal"]]
    twice = make_set(tmp_path / "pets", PETS, [0])
    svhn, digits = (make_set(tmp_path / name, ["0", "1"], [0]) for name in ("wds_vtab-svhn", "mnist"))
    for folders, message in {
        (pets, twice): "wds_vtab-pets and .*pets",
        (svhn,): "wds_vtab-svhn",
        (digits,): "mnist",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_prompts(clone, [EvalSet(folder, lambda image: image) for folder in folders])
    for number, (labels, templates) in enumerate((([1, 2], ["{}"]), (["a", None], ["{}"]), (["a", "b"], [3]))):
        wrong = make_clone(tmp_path / f"wrong{number}", {"mnist": labels}, {"mnist": templates})
        with pytest.raises(ValueError, match="mnist"):
            read_prompts(wrong, [EvalSet(digits, lambda image: image)])
    with pytest.raises(ValueError, match="labels.json"):
        read_prompts(tmp_path, [])


def test_flags_that_need_each_other(in_process, tmp_path: Path):
    for flags in (["--prompts", "slip"], ["--slip", tmp_path]):
        result = in_process(tmp_path, *flags)
        assert result.code == 2 and "--slip" in result.err and one_sentence(result.err)


# -------------------------------------------------------------------------------------------------------------- suite


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small A-CLIP in training's format; its EMA towers differ from the online towers."""
    cfg = TrainConfig(model="emoji", image_size=20)
    torch.manual_seed(0)
    model = create_model(cfg.method, cfg.model, **cfg.model_settings())
    with torch.no_grad():
        for _, online in model._pairs():
            online += 0.02 * torch.randn_like(online)
    path = tmp_path_factory.mktemp("suite") / "checkpoint-best.pt"
    torch.save({"state_dict": model.state_dict(), "config": dataclasses.asdict(cfg)}, path)
    return path


def test_the_average_of_26_is_that_of_each_sets_own_metric(checkpoint: Path, tmp_path: Path, monkeypatch, capsys):
    classes = dict.fromkeys(SUITE, ["one", "two", "three"])
    classes |= {"kinetics700_frames": list("abcdefg"), "hateful_memes": ["meme", "hatespeech meme"]}
    clone = make_clone(
        tmp_path / "SLIP",
        classes | {"fer2013": [["one", "1"], "two", "three"]},
        dict.fromkeys(SUITE, ["a {}", "the {}"]),
    )
    sets = [
        make_set(tmp_path / f"sets/{name}", classes[name], [i % len(classes[name]) for i in range(9)]) for name in SUITE
    ]
    seen = []
    spied = evaluation.class_prompts
    monkeypatch.setattr(evaluation, "class_prompts", lambda *args: seen.append(args[1:]) or spied(*args))
    options = dict(runs=(str(checkpoint),), prompts="slip", slip=str(clone), probe=None, foreground=None, device="cpu")
    options |= dict(precision="fp32", sets=tuple(map(str, sets)))
    (measured,) = evaluation.main(evaluation.Config(**options))
    assert all(templates == ["a {c}", "the {c}"] for _, templates in seen) and ["one", "1"] in seen[12][0]
    for prefix in ("", "online/"):
        values = {name: measured[f"{prefix}{name}/{reported(name)}"] for name in SUITE}
        assert all(measured[f"{prefix}{name}/metric"] == value for name, value in values.items())
        assert measured[f"{prefix}average_26"] == measured[f"{prefix}average_measured"]
        assert math.isclose(measured[f"{prefix}average_26"], sum(values.values()) / 26)
    shown = capsys.readouterr().out
    assert all(f"| {name} " in shown for name in (*SUITE, "average_26")) and shown.count("mean of 26 sets") == 2

    few = evaluation.evaluate_run(str(checkpoint), evaluation.Config(**options | {"sets": options["sets"][:3]}), ALONE)
    assert "average_26" not in few and few["food101/metric"] == measured["food101/metric"]
    assert math.isclose(few["average_measured"], sum(few[f"{name}/metric"] for name in list(SUITE)[:3]) / 3)


def test_sets_are_opened_before_any_is_evaluated(checkpoint: Path, tmp_path: Path, monkeypatch):
    """What is wrong with the last set, the probe's or the masks' is said before the first image is encoded."""
    first, twin = (make_set(tmp_path / name / "cifar10", ["a", "b"], [0, 1]) for name in ("one", "other"))
    kinds = make_set(tmp_path / "kinds", ["a", "b"], [0, 1])
    (kinds / "dataset_type.txt").write_text("multilabel")
    shutil.copytree(kinds / "test", kinds / "train")
    monkeypatch.setattr(evaluation, "zero_shot", lambda *_: pytest.fail("evaluated"))
    wrong = {
        "named twice": dict(sets=(str(first), str(twin), str(first))),
        "multilabel set": dict(sets=(str(first), str(kinds))),
        "absent does not exist": dict(sets=(str(first),), probe=str(tmp_path / "absent")),
        "--probe .*kinds": dict(sets=(str(first),), probe=str(kinds)),
        "gone does not exist": dict(sets=(str(first),), foreground=str(tmp_path / "gone")),
    }
    for message, options in wrong.items():
        cfg = evaluation.Config((str(checkpoint),), **dict(probe=None, foreground=None) | options)
        with pytest.raises(ValueError, match=message):
            evaluation.evaluate_run(str(checkpoint), cfg, ALONE)


def test_other_options_that_are_refused(in_process, tmp_path: Path):
    wrong = {
        "--keep-ratio must be above 0": ["--keep-ratio", "-0.3"],
        "--batch-size must be at least 1": ["--batch-size", "0"],
        "--probe-lr must be finite": ["--probe-lr", "nan"],
        "pass --sets": [],
    }
    for message, flags in wrong.items():
        result = in_process(tmp_path, *flags)
        assert result.code == 2 and message in result.err and one_sentence(result.err), (message, result.err)


def test_the_average_of_26_needs_slips_prompts_and_all_sets():
    values = dict.fromkeys(SUITE, 50.0)
    assert averages(values, "slip") == {"average_measured": 50.0, "average_26": 50.0}
    assert averages(values, "set") == averages({"names_ood": 50.0}, "slip") == {"average_measured": 50.0}
    assert averages({}, "slip") == {}
    assert suite.rows({"names_ood/metric": 1.0, "average_measured": 1.0})[0]["reported"] == "mean of 0 sets"
