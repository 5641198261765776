"""--export: open_clip loads exported models, and clip-benchmark's command line reproduces the numbers of eval.py."""

import importlib
import json
import re
import shutil
import sys
import tarfile
from pathlib import Path

import clip_benchmark.cli as their_cli
import clip_benchmark.metrics.zeroshot_classification as their_classification
import numpy as np
import open_clip
import pytest
import torch
from scripts import finished, one_sentence  # noqa: F401
from short_runs import EVAL, SCRIPTS, commands, small_corpus

from concept_frequency import clip_models
from lexvla import patchdis
from nmtune.encoders import create_clip
from protoclip.model import create_model as model_of_features
from shared import checkpoints, export, run
from tldr_reduction.checkpoints import load_run
from tldr_reduction.tokenizer import eval_tokenizer

SCRIPT = "protoclip.train"
TOLERANCES = {  # of image features, text features, a preprocessed image; 0 where it is the very model of open_clip
    "attentive_mask_clip": (1e-6, 1e-6, 0),
    "concept_frequency": (0, 0, 1.0),  # of noise in -1..1, by another kernel
    "nmtune": (0, 0, 0),
    "protoclip": (1e-7, 0, 0),  # convolutions over channels that lie last
    "tinyclip": (1e-6, 1e-6, 0),
    "tldr_reduction": (0, 0, 1e-6),
}
SETS = ("subgroups_ood", "retrieval_ood")
WITHOUT = {  # measurements that clip-benchmark has not
    "attentive_mask_clip": {},
    "protoclip": {},
    "tinyclip": {"throughput": False},
    "tldr_reduction": {},
}


@pytest.fixture(scope="module")
def runs(cli, folder: Path) -> dict[str, Path]:
    """One run of each folder with an open_clip model, and a TinyCLIP pruned by masks."""
    (folder / "parts").mkdir()
    given = commands(small_corpus(folder / "corpus"), folder / "parts")
    given["protoclip"] += ["--model", "ConvNet-emoji"]  # which processes that are no forks of the server know as well
    given["tldr_reduction"] = [*given["tldr_reduction-clip"], "--lr", "1e-3"]
    scripts = SCRIPTS | {"tldr_reduction": SCRIPTS["tldr_reduction-clip"]}
    done = {name: folder / name for name in (*TOLERANCES, "pruned")}
    for name in TOLERANCES:
        finished(cli(*given[name], "--out", done[name], module=scripts[name]))
    first = ["--teacher", done["tinyclip"], "--init", done["tinyclip"], "--mask-lr", "1.0", "--lambda-lr", "-1.0"]
    masks = ["emoji-auto", *given["tinyclip"][1:], *first, "--prune-step", "4", "--sparsity-warmup", "2"]
    finished(cli(*masks, "--out", done["pruned"], module="tinyclip.train"))
    return done


@pytest.fixture(scope="module")
def small_sets(folder: Path) -> Path:
    """The first 60 images of `SETS`."""
    for name in SETS:
        shutil.copytree(EVAL / name, folder / "sets" / name, ignore=shutil.ignore_patterns("*.tar", "train"))
        with (
            tarfile.open(EVAL / name / "test/0.tar") as source,
            tarfile.open(folder / "sets" / name / "test/0.tar", "w") as target,
        ):
            for member in source.getmembers()[:120]:
                target.addfile(member, source.extractfile(member))
    return folder / "sets"


@pytest.fixture(scope="module")
def exported(cli, folder: Path, runs: dict[str, Path]) -> dict[str, tuple[Path, str]]:
    """Folder and printed text of each export."""
    out = {name: folder / f"{name}-exported" for name in TOLERANCES}
    return {n: (path, finished(cli(runs[n], "--export", path, module=f"{n}.eval")).out) for n, path in out.items()}


@pytest.mark.parametrize("name", TOLERANCES)
def test_open_clip_loads_it(exported: dict, runs: dict[str, Path], name: str):
    path, printed = exported[name]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{path}")
    trained = checkpoints.load_checkpoint(runs[name] / "checkpoint.pt")["state_dict"]
    assert torch.equal(model.logit_scale, trained["logit_scale"])
    measured = re.search(r"image features (\S+), text features (\S+), preprocessing (\S+)", printed).groups()
    for value, bound in zip(map(float, measured), TOLERANCES[name], strict=True):
        assert value <= bound


def test_a_run_of_another_paper_is_a_model(runs: dict[str, Path], cli, small_sets: Path, folder: Path, monkeypatch):
    """A run is exported once by its paper, then used as TinyCLIP's teacher and measured by other papers' scripts."""
    monkeypatch.chdir(folder)
    theirs, mine = runs["protoclip"], runs["tinyclip"]
    sets = [str(small_sets / name) for name in SETS]
    assert checkpoints.trained_by(theirs) == "protoclip"
    model, _, tokenizer = export.load_model(str(theirs))
    trained = checkpoints.load_checkpoint(theirs / "checkpoint.pt")["state_dict"]
    assert torch.equal(model.logit_scale, trained["logit_scale"]) and (theirs / "open_clip").is_dir()
    words = f"emoji --model test-50 --data {folder}/corpus --teacher {theirs} --init {mine} --image-size 16 --steps 4"
    words = f"{words} --batch-size 32 --eval-every 0 --precision fp32 --out {folder}/taught".split()
    finished(cli(*words, module="tinyclip.train"))
    plain = ["--sets", *sets, "--precision", "fp32"]
    said = finished(cli(theirs, *plain, module="flame.eval")).out
    assert "image_to_text_R@1" in said and "runs/flame/protoclip-protoclip/results.md" in said
    said = finished(cli(f"local-dir:{theirs}/open_clip", *plain, "--patchdis", "None", module="lexvla.eval")).out
    assert "mean_recall" in said and "runs/lexvla/open_clip/results.md" in said
    out = folder / "scores"
    finished(cli(theirs, "--sets", sets[0], "--prompts", "class", "--out", out, module="concept_frequency.evaluate"))
    assert list(json.loads((out / "subgroups_ood_class_results.json").read_text())) == ["protoclip"]
    words = [folder / "corpus", "--select", "itm", "--keep", "0.5", "--scorer", theirs, "--out", folder / "reduced"]
    finished(cli(*words, "--precision", "fp32", module="tldr_reduction.reduce"))
    monkeypatch.setattr(export.subprocess, "run", None)  # what is kept is not made again
    assert export.exported(theirs) == theirs / "open_clip"


@pytest.mark.usefixtures("forked_exports")
def test_models_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for source in ("nowhere", "ViT-B-32@nothing", "local-dir:nowhere", str(tmp_path)):
        with pytest.raises(ValueError, match="name a run folder, local-dir:DIR"):
            export.load_model(source)
    torch.save({"paper": "tinyclip"}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="run of tinyclip.* no weights"):
        export.load_model(str(tmp_path))
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper/eval.py").write_text("class Config:\n    runs: tuple[str, ...]\n")
    torch.save({"paper": "paper"}, tmp_path / "checkpoint.pt")
    for module in (checkpoints, export):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(export, "subprocess", None)  # it is refused before a process starts
    with pytest.raises(ValueError, match="run of paper.*open_clip"):
        export.load_model(str(tmp_path))


@pytest.mark.parametrize("name", TOLERANCES)
def test_texts_are_read_alike(exported: dict, runs: dict[str, Path], name: str):
    """Tokens equal open_clip's up to the first end token (TL;DR's after its own preparation)."""
    path, _ = exported[name]
    theirs = open_clip.get_tokenizer(f"local-dir:{path}")
    ours = open_clip.SimpleTokenizer(context_length=theirs.context_length)
    if name == "tldr_reduction":
        _, settings, tokenizer = load_run(runs[name])
        ours = eval_tokenizer(tokenizer, settings)
    texts = ["A cat, (drawn): #1!  ~", "café's 12 déjà-vu", "ça va? 中文 🎉 é", "wow!!! *really*", "x " * 60, "..."]
    a, b = ours(texts), theirs(texts)
    for mine, other in zip(a, b, strict=True):
        end = int(mine.argmax())
        assert int(other.argmax()) == end and torch.equal(mine[: end + 1], other[: end + 1])


@pytest.mark.parametrize("name", WITHOUT)
def test_clip_benchmark_gives_the_same_numbers(exported, runs, small_sets, name: str, tmp_path: Path, monkeypatch):
    evaluation, (path, _) = importlib.import_module(f"{name}.eval"), exported[name]
    sets = tuple(str(small_sets / each) for each in SETS)
    cfg = evaluation.Config((str(runs[name]),), sets=sets, precision="fp32", batch_size=256, **WITHOUT[name])
    ours = evaluation.evaluate_run(str(runs[name]), cfg, run.Process(0, 1, torch.device("cpu")))
    ours = ours[0] if isinstance(ours, tuple) else ours

    # clip-benchmark 1.6.2 takes float() of one-element arrays, which numpy 2.4 refuses; nothing else is changed
    one_element = lambda value: value.item() if isinstance(value, np.ndarray) else float(value)  # noqa: E731
    monkeypatch.setattr(their_classification, "float", one_element, raising=False)
    theirs = {}
    for each, task in zip(SETS, ("zeroshot_classification", "zeroshot_retrieval"), strict=True):
        command = f"""clip_benchmark eval --model local-dir:{path} --dataset wds/{each} --task {task}
            --dataset_root {small_sets}/{{dataset}} --no_amp --batch_size 256 --num_workers 0 --recall_k 1 5 10
            --output {tmp_path}/{each}.json"""
        monkeypatch.setattr(sys, "argv", [*command.split(), "--pretrained", ""])
        their_cli.main()
        theirs |= json.loads((tmp_path / f"{each}.json").read_text())["metrics"]
    names = {f"{SETS[0]}/top1": "acc1", f"{SETS[0]}/top5": "acc5"}
    for k in (1, 5, 10):
        names[f"{SETS[1]}/image_to_text_R@{k}"] = f"text_retrieval_recall@{k}"
        names[f"{SETS[1]}/text_to_image_R@{k}"] = f"image_retrieval_recall@{k}"
    one = 0.11 if TOLERANCES[name][0] else 0.0  # a sample in a thousand: near ties
    for mine, other in names.items():
        assert ours[mine] == pytest.approx(100 * theirs[other], rel=1e-6, abs=one), (mine, name)
    assert ours[f"{SETS[1]}/text_to_image_R@10"] > 0


# ------------------------------------------------------------------------------------------------------- what cannot be


def test_what_open_clip_has_not_is_refused(in_process, runs: dict[str, Path], tmp_path: Path):
    cases = {
        "tinyclip": (runs["pruned"], "different widths"),
    }
    for name, (path, words) in cases.items():
        result = in_process(path, "--export", tmp_path / "out", module=f"{name}.eval")
        assert result.code == 2 and words in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "out").exists()


def test_wrong_places(in_process, runs: dict[str, Path], tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    two = [runs["protoclip"], runs["protoclip"]]
    for paths, out, words in (
        (two, tmp_path / "out", "--export takes one"),
        (two[:1], tmp_path / "file", "is a file"),
        (two[:1], runs["tinyclip"], "is a run folder"),
    ):
        result = in_process(*paths, "--export", out, module="protoclip.eval")
        assert result.code == 2 and words in result.err and one_sentence(result.err), result.err
    assert (tmp_path / "file").read_text() == "mine" and not (runs["tinyclip"] / "open_clip_config.json").exists()


def test_other_features_are_an_error(tmp_path: Path, exported: dict):
    """Exporting a wrong architecture is an error."""
    path, _ = exported["protoclip"]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
    config = json.loads((path / "open_clip_config.json").read_text())["model_cfg"] | {"quick_gelu": True}
    with pytest.raises(RuntimeError, match="differ"):
        export.write(tmp_path / "out", model.eval(), config, model.state_dict(), transform)


def test_models_of_features_are_not_exported(tmp_path: Path):
    """They have no image tower, and open_clip's transform gives pictures."""
    model, config = model_of_features("Lite0-features").eval(), export.named_config("Lite0-features")
    with pytest.raises(ValueError, match="no image tower"):
        export.write(tmp_path / "out", model, config, model.state_dict(), lambda picture: picture)
    assert not (tmp_path / "out").exists()


def test_weights_have_the_activation_of_their_training():
    for source, quick in (("ViT-B-32@openai", True), ("ViT-B-32@metaclip_400m", True), ("ViT-B-32@laion2b_e16", False)):
        assert export.quick_gelu(*source.split("@")) == quick
    assert not export.quick_gelu("local-dir:exported", "")


def test_weights_of_openai_have_quick_gelu(monkeypatch: pytest.MonkeyPatch):
    """Under the name of a config with GELU, too, of which open_clip only warns."""
    asked = {}

    def create(name: str, pretrained: str | None = None, force_quick_gelu: bool = False, **_):
        asked[pretrained] = force_quick_gelu
        raise OSError("offline")

    for name in ("create_model", "create_model_and_transforms"):
        monkeypatch.setattr(open_clip, name, create)
    for tag, quick in (("openai", True), ("laion2b_e16", False)):
        for load in (
            lambda tag=tag: export.load_model(f"ViT-B-32@{tag}"),
            lambda tag=tag: patchdis.open_clip_encoder(f"ViT-B-32@{tag}", "cpu"),
            lambda tag=tag: clip_models.load_model("ViT-B-32", tag, "cpu"),
            lambda tag=tag: create_clip("ViT-B-32", tag),
        ):
            asked.clear()
            with pytest.raises((ValueError, OSError)):
                load()
            assert asked == {tag: quick}
