"""Retrieval and linear probe on known numbers, and python -m flame.eval on small runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flame_runs import ARMS, EVAL, arms, bank, captions, embed_flags, tiny, tiny_llm  # noqa: F401
from PIL import Image
from scripts import one_sentence
from short_runs import small_set

from flame import config
from flame import eval as evaluation
from flame.eval import linear_probe, retrieval_recall

SCRIPT = "flame.train"


def test_recall_counts_any_caption_of_an_image():
    image, text = torch.eye(3), torch.tensor([[1.0, 0.1, 0], [0, 1, 0.9], [0, 0.1, 1], [0.8, 1, 0]])
    recall = retrieval_recall(image, text, [0, 1, 2, 1], (1, 2))
    assert recall["image_retrieval_recall@1"] == 1.0 and recall["text_retrieval_recall@1"] == 1.0
    assert retrieval_recall(image, text, [0, 1, 1, 2], (1,))["image_retrieval_recall@1"] == 0.5


def test_linear_probe_learns_and_normalises():
    torch.manual_seed(0)
    y = torch.arange(300) % 3
    x = 100 * (F.one_hot(y, 3) + 0.1 * torch.randn(300, 3))
    probe = linear_probe(x[:200], y[:200], x[200:], y[200:])
    assert probe.final > 95 and probe.weight_decay == 0.0


class Red(torch.nn.Module):
    """A tower that measures how red an image is, in seven steps."""

    visual = SimpleNamespace(image_size=(8, 8))

    def encode_image(self, images, visual_only=False):
        return F.one_hot((images[:, 0].mean((1, 2)) * 5.8).round().long() % 7, 7).float()


def test_crossmodal_images_are_encoded_once_and_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "images").mkdir()
    lines = []
    for i, key in enumerate("abcde"):
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / f"images/{key}.jpg")
        lines.append({"image/key": key} | {name: {"caption": [f"{name} {key}", "?"]} for name in config.LANGUAGES})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sizes, seen = [], {}

    class Counting(Red):
        def encode_image(self, images, visual_only=False):
            sizes.append(len(images))
            return super().encode_image(images)

    def texts(strings, multi):
        seen[strings[0].split()[0]] = strings, multi
        return torch.randn(len(strings), 7)

    cfg = evaluation.Config(runs=(), crossmodal=str(tmp_path), batch_size=2)
    flat = evaluation.languages(Counting(), texts, cfg, "cpu", torch.float32)
    assert sizes == [2, 2, 1] and set(seen) == set(config.LANGUAGES)
    assert seen["quz"] == ([f"quz {key}" for key in "abcde"], False)
    mean = np.mean([flat[f"language_{each}/image_to_text_R@1"] for each in config.LANGUAGES])
    assert flat["languages/image_to_text_R@1"] == pytest.approx(mean)


def test_imagenet_in_five_languages(tmp_path: Path):
    """Names and templates are from CLIP_benchmark's files; a set with another number of classes is refused."""
    classes = (EVAL / "groups_ood/classnames.txt").read_text().splitlines()
    for language in ("ar", "en", "jp", "it", "cn"):
        names = {"imagenet1k": [f"{language} {name}" for name in classes]}
        (tmp_path / f"{language}_classnames.json").write_text(json.dumps(names))
        templates = {"imagenet1k": ["{c}", f"a {{c}} {language}"]}
        (tmp_path / f"{language}_zeroshot_classification_templates.json").write_text(json.dumps(templates))
    asked = []

    def texts(strings, multi):
        asked.append((strings[:2], multi))
        return torch.randn(len(strings), 7)

    cfg = evaluation.Config(runs=(), multilingual=f"{EVAL / 'groups_ood'}:{tmp_path}")
    named = evaluation.check_sets(cfg)[cfg.multilingual]
    found = evaluation.multilingual_imagenet(Red(), texts, named, cfg, "cpu", torch.float32)
    assert {key.split("/")[0] for key in found} == {f"imagenet_{name}" for name in ("ar", "en", "jp", "it", "cn")}
    assert asked[0] == ([f"ar {classes[0]}", f"a ar {classes[0]} ar"], False) and len(asked) == 5
    (tmp_path / "it_classnames.json").write_text(json.dumps({"imagenet1k": classes[:3]}))
    with pytest.raises(ValueError, match="9 classes, .* 3"):
        evaluation.multilingual_imagenet(Red(), texts, evaluation.imagenet_names(tmp_path), cfg, "cpu", torch.float32)


def test_compositional_sets_are_embedded_with_the_long_prompt(tmp_path: Path):
    (tmp_path / "data/images").mkdir(parents=True)
    lines = []
    for i in range(3):
        for j in range(2):
            Image.new("RGB", (8, 8), (90 * i + 40 * j, 0, 0)).save(tmp_path / f"data/images/ex_{i}_{j}.png")
        lines.append({"image_0": f"ex_{i}_0", "image_1": f"ex_{i}_1", "caption_0": f"{i}0", "caption_1": f"{i}1"})
    (tmp_path / "data/examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen = []

    def texts(strings, multi):
        seen.append((list(strings), multi))
        return torch.randn(len(strings), 7)

    cfg = evaluation.Config(runs=(), batch_size=4, compositional=(f"winoground:{tmp_path}",))
    (instances,) = evaluation.check_sets(cfg).values()
    (tmp_path / "data/examples.jsonl").unlink()  # it is read once
    found = evaluation.compositional(Red(), texts, "winoground", instances, cfg, "cpu", torch.float32)
    assert set(found) == {"winoground/text_acc", "winoground/image_acc", "winoground/acc"}
    assert seen == [(["00", "01", "10", "11", "20", "21"], True)]


def test_results_are_measured_anew_when_a_long_or_multilingual_set_changes(tmp_path: Path, monkeypatch):
    for name in ("urban/caption/1.txt", "xm/captions.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("a cat")
    monkeypatch.setattr(evaluation.evaluation, "measured_run", lambda path, cfg, sets, measure, files: set(files))
    cfg = evaluation.Config(runs=(), long_sets=(f"urban1k:{tmp_path}/urban",), crossmodal=str(tmp_path / "xm"))
    assert evaluation.evaluated("run", cfg, None) == {tmp_path / "urban/caption/1.txt", tmp_path / "xm/captions.jsonl"}


def test_all_arms_are_evaluated(arms: dict[str, Path], in_process, folder: Path):
    classes, long, probe = (
        small_set(name, folder / "sets", every=16) for name in ("groups_ood", "retrieval_long_ood", "groups_id")
    )
    runs = [arms["clip"], arms["flame"], arms["summary"]]
    result = in_process(*runs, "--sets", classes, long, "--probe", probe, module="flame.eval")
    assert result.code == 0, result.err
    for path in runs:
        found = json.loads((path / "results.json").read_text())["metrics"]
        names = "groups_ood/top1 retrieval_long_ood/text_to_image_R@1 groups_id/probe_final seconds"
        assert all(np.isfinite(found[name]) for name in names.split())
    assert f"{runs[1]}/results.md" in result.out
    assert f" {found['retrieval_long_ood/text_to_image_R@1']:.2f} " in result.out


def test_evaluation_command_line_errors(in_process, arms: dict[str, Path], tmp_path: Path):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    (tmp_path / "other").mkdir()
    torch.save({"config": {"protos": 3}, "text_dim": 3}, tmp_path / "other/checkpoint.pt")
    flame = [arms["flame"]]
    classes, pairs = EVAL / "groups_ood", EVAL / "retrieval_ood"
    cases = {
        "not a run of flame": [tmp_path / "other", "--sets", classes],
        "retrieval_ood is a retrieval set": [*flame, "--probe", pairs],
        "--batch-size must be at least 1": [*flame, "--batch-size", "0"],
        "named twice": [*flame, "--sets", pairs, pairs],
        "photos:x should be one of urban1k": [*flame, "--long-sets", "photos:x"],
        "photos:x should be one of winoground": [*flame, "--compositional", "photos:x"],
        "ar_classnames.json is missing": [*flame, "--multilingual", f"{classes}:{tmp_path}"],
        "at least one run folder": [],
        "no checkpoint at": [tmp_path, "--sets", classes],
        "pass --sets": [tmp_path],
        "holds no weights of FLAME": [tmp_path / "other.pt", "--sets", classes],
    }
    for message, arguments in cases.items():
        result = in_process(*arguments, module="flame.eval")
        assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
