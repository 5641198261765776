"""Somebody else's data: coloured shapes and their captions, packed, and all commands of the READMEs' "Your own data".

The commands are read from the READMEs and run as printed, in a folder that holds `photos/` alone; behind them stand
shorter schedules and smaller models, and random stand-ins for what would be downloaded.
"""

import csv
import itertools
import json
import math
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import clip_benchmark.cli as their_cli
import open_clip
import pytest
import torch
from in_python import authors_weights, lines_of
from in_python import execute as execute_lines
from PIL import Image, ImageDraw
from scripts import ROOT, finished
from short_runs import dinov2, language_model  # noqa: F401

import shared.convnet  # noqa: F401  (exports of the small towers load after it)
from flame.config import Config as FlameConfig
from flame.model import create_model as flame_model
from shared import checkpoints, data
from shared.evalsets import EvalSet

SCRIPT, SECONDS = "shared.pack", 300
COLOURS, FORMS = ("red", "green", "blue", "yellow", "black"), ("circle", "square", "triangle", "cross")
SIZES, PLACES = ("small", "large"), ("top left", "top right", "middle", "bottom left", "bottom right")
SHORT = {  # what is appended to a command
    "protoclip.train": """--model ResNet-test --image-size 32 --episodes 2 --episode-size 320 --batch-size 64 --k 8
        --niter 5 --nredo 1 --hidden-dim 32 --projection-dim 16 --warmup 2""",
    "attentive_mask_clip.train": "--model test --image-size 20 --epochs 1 --warmup-epochs 0.5 --batch-size 64",
    "tinyclip.train": "--image-size 32 --epochs 3 --batch-size 64",
    "flame.embed": "--llm parts/lm",
    "flame.train": "--model ViT-test --image-size 16 --hidden-dim 32 --epochs 2 --batch-size 64 --warmup 2",
    "lexvla.train": """--lm parts/lm --max-length 192 --backbone parts/dinov2 --image-size 16 --adapter-hidden 32
        --min-count 1 --epochs 2 --batch-size 64 --warmup 2""",
    "tldr_reduction.reduce": "--clusters 4 --workers 0",
    "tldr_reduction.train": "--clip-model ViT-test --epochs 2 --batch-size 32 --warmup 2",
    "nmtune.pretrain": "--model ViT-test --epochs 1 --batch-size 64 --warmup 2",
    "nmtune.train": "--epochs 1 --workers 0",
    "concept_frequency.count": "--workers 1",
    "concept_frequency.train": """--model ViT-test --image-size 16 --dataset-size 300 --epochs 2 --batch-size 64
        --warmup 2""",
}
SKIPPED = {"shared.pretrained"}  # needs a package; another takes its place
PRECISE = ("train", "eval", "embed", "reduce", "pretrain")  # scripts that get --precision fp32
FOLDERS = {  # folder: (scores that its evaluation gives, what is exported)
    "protoclip": ({"held_out/mean_recall", "modality_gap"}, "mine-protoclip"),
    "attentive_mask_clip": ({"held_out/image_to_text_R@1", "online/held_out/text_to_image_R@1"}, "mine-aclip"),
    "tinyclip": ({"held_out/mean_recall", "parameters_m"}, "mine-tinyclip"),
    "flame": ({"held_out/image_to_text_R@1", "held_out/text_to_image_R@10"}, None),
    "lexvla": ({"held_out/mean_recall", "held_out/image/active"}, None),
    "tldr_reduction": ({"held_out/mean_recall"}, "mine-tldr"),
    "nmtune": ({"test/top1", "test/sve_z"}, "mine-nmtune"),
    "concept_frequency": ({"mean_per_class", "counted_both"}, "mine-frequency"),
}


def draw(colour: str, form: str, size: str, place: str) -> Image.Image:
    """A coloured shape on white, 48 pixels wide."""
    picture = Image.new("RGB", (48, 48), "white")
    half = 7 if size == "small" else 11
    x = 14 if "left" in place else 34 if "right" in place else 24
    y = 14 if "top" in place else 34 if "bottom" in place else 24
    pen, box = ImageDraw.Draw(picture), (x - half, y - half, x + half, y + half)
    if form == "circle":
        pen.ellipse(box, fill=colour)
    elif form == "square":
        pen.rectangle(box, fill=colour)
    elif form == "triangle":
        pen.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=colour)
    else:
        pen.line((x - half, y, x + half, y), fill=colour, width=5)
        pen.line((x, y - half, x, y + half), fill=colour, width=5)
    return picture


def shapes(folder: Path) -> None:
    """200 pictures; captions.csv with two captions of each, all different; labels.csv with 20 classes, and tags."""
    folder.mkdir()
    captions, labels = [("image", "caption")], [("image", "label", "tags")]
    for i, (colour, form, size, place) in enumerate(itertools.product(COLOURS, FORMS, SIZES, PLACES)):
        draw(colour, form, size, place).save(folder / (name := f"{i:03}.png"))
        captions.append((name, f"a {size} {colour} {form}, {place}"))
        captions.append((name, f"{place}: {form} in {colour}, {size}"))
        labels.append((name, f"{colour} {form}", f"drawing, {form}"))
    for table, rows in (("captions.csv", captions), ("labels.csv", labels)):
        with open(folder / table, "w", newline="") as file:
            csv.writer(file).writerows(rows)


def section(page: Path) -> str:
    return re.search(r"^## Your own data\n(.*?)(?=^## )", page.read_text(encoding="utf-8"), re.M | re.S)[1]


def commands(text: str) -> list[list[str]]:
    """Words of each command, from the module name on."""
    lines = re.findall(r"^ {4}(?:python -m )?((?:[\w.]+\.\w+|clip_benchmark) .*)$", text.replace("\\\n", " "), re.M)
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """The working folder of all scripts."""
    path = tmp_path_factory.mktemp("own")
    shapes(path / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def execute(cli, folder: Path):
    """execute(words, more) -> what the command printed."""

    def execute(words: list[str], more: str = "") -> str:
        module, *rest = words
        rest = [*rest, *shlex.split(SHORT.get(module, ""))]
        if module.partition(".")[2] in PRECISE:
            rest += ["--precision", "fp32"]
        return finished(cli(*rest, *more.split(), module=module)).out

    return execute


@pytest.fixture(scope="module")
def packed(execute, folder: Path) -> dict[str, str]:
    """The output of packing data/mine and data/my_classes with the commands of the READMEs."""
    pairs, *_ = commands(section(ROOT / "README.md"))
    classes, *_ = commands(section(ROOT / "concept_frequency/README.md"))
    return {"pairs": execute(pairs), "classes": execute(classes)}


@pytest.fixture(scope="module")
def parts(packed, folder: Path) -> Path:
    """Random replacements of a language model and an image backbone from the Hugging Face hub."""
    language_model(folder / "parts/lm", folder / "data/mine/train")
    dinov2(folder / "parts/dinov2")
    return folder / "parts"


def measured(run: str) -> dict[str, float]:
    """The saved metrics of a run; all are finite unless they are undefined."""
    found = checkpoints.read_json(Path(run) / "results.json")["metrics"]
    found = found.get("metrics", found)  # beside a table of concepts
    found = {name: value for name, value in found.items() if not isinstance(value, str)}  # scores by picture
    assert (Path(run) / "results.md").read_text().count("\n") >= len(found)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def test_what_is_packed(packed: dict[str, str], folder: Path) -> None:
    assert "--data data/mine/train" in packed["pairs"] and "--sets data/mine/eval/held_out" in packed["pairs"]
    counts = {name: checkpoints.read_json(f"data/{name}/manifest.json")["counts"] for name in ("mine", "my_classes")}
    assert counts["mine"] == {
        "pictures": 180, "captions": 360, "samples": 360, "held_out": 20, "held_out_captions": 40, "broken": 0,
    }  # fmt: skip
    assert counts["my_classes"] == {"classes": 20, "test": 40, "train": 160, "broken": 0}
    pairs = data.open_pairs("data/mine/train")
    assert len({pairs.caption(row) for row in range(len(pairs))}) == 360
    held_out = EvalSet("data/mine/eval/held_out", lambda image: image.size)
    assert all(size == (48, 48) and len(captions) == 2 for _, size, captions in held_out)


def test_the_five_commands_of_the_root_readme(packed, execute, folder: Path, monkeypatch) -> None:
    """The model has learned, and clip-benchmark's command line reproduces its metrics."""
    _, train, evaluate, export, benchmark = commands(section(ROOT / "README.md"))
    assert execute(train, "--epochs 12").rstrip().endswith(f".eval {evaluate[1]}")  # the held-out set is its own
    said = execute(evaluate)
    assert evaluate[1] in said
    scores = measured(evaluate[1])
    recalls = {name: value for name, value in scores.items() if name.startswith("held_out/")}
    assert recalls["held_out/mean_recall"] > 60, recalls  # of 20 pictures; chance is 25
    execute(export)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{export[-1]}")
    assert model.visual.image_size == (32, 32)
    monkeypatch.setattr(sys, "argv", benchmark)
    their_cli.main()
    theirs = json.loads((folder / "held_out.json").read_text())["metrics"]
    for ours, name in (("image_to_text", "text_retrieval"), ("text_to_image", "image_retrieval")):
        for k in (1, 5, 10):
            assert abs(recalls[f"held_out/{ours}_R@{k}"] - 100 * theirs[f"{name}_recall@{k}"]) < 1e-3, (ours, k)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_commands_of_a_folder(packed, parts, execute, folder: Path, name: str) -> None:
    text = section(ROOT / name / "README.md")
    for code in re.findall(r"^ {4}import .*\n(?:^ {4}.*\n)+", text, re.M):
        exec(textwrap.dedent(code), {})
    expected, exported = FOLDERS[name]
    scored: dict[str, str] = {}  # run -> what its evaluation has printed
    for words in commands(text):
        if words[0] in SKIPPED or words[:2] == ["shared.pack", "classes"]:
            continue
        said = execute(words)
        if words[0].endswith(".eval") and "--export" not in words:
            runs = list(itertools.takewhile(lambda word: not word.startswith("--"), words[1:]))
            assert all(run in said for run in runs), said
            scored |= dict.fromkeys(runs, said)
        elif words[0].endswith((".train", ".pretrain")):
            assert all(word in said for word in ("samples", "steps", "finished", "loss", "python -m ")), said
    assert scored
    for run, said in scored.items():
        found = measured(run)
        assert expected <= found.keys(), (run, sorted(found))
        assert all(f"{found[score]:.2f}" in said for score in expected), said
        assert all(0 <= value <= 100 for key, value in found.items() if re.search("_R@|top1|mean_per", key))
    for path in [f"exported/{exported}"] * bool(exported):
        assert open_clip.create_model_and_transforms(f"local-dir:{path}")[0].logit_scale.isfinite()
    run = f"runs/mine-{name}"
    if name in ("tinyclip", "flame", "lexvla"):
        execute_lines(lines_of(run))
    else:  # the models named test cannot be exported by another process
        execute_lines(lines_of("runs/mine-tinyclip").replace("runs/mine-tinyclip", f"local-dir:exported/{exported}"))
    if name == "flame":  # a file of the authors' trainer, of the bank's width
        width = checkpoints.load_checkpoint(Path(run) / "checkpoint.pt")["text_dim"]
        model = flame_model(FlameConfig(model="ViT-test"), width)
        torch.save(authors_weights(model), "epoch_32.pt")
        lines = lines_of("epoch_32.pt").replace("Config(())", 'Config((), model="ViT-test")')
        execute_lines(lines.replace('"bank"', '"data/mine/bank"'))
