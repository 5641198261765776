"""The curve of a user's own counts and scores: all kinds of files, unmatched names, and errors."""

import csv
import dataclasses
import json
import math
import sys
from pathlib import Path

import clip_benchmark.cli as their_cli
import clip_benchmark.metrics.zeroshot_classification as their_classification
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripts import ROOT, one_sentence

from concept_frequency import curve, evaluate
from concept_frequency.concepts import numbered

NAMES = [f"thing {i}" for i in range(120)]
COUNTS = {name: int(10 ** (4 * i / 119)) for i, name in enumerate(NAMES)}


def scores(slope: float, seed: int = 0) -> dict[str, float]:
    noise = np.random.default_rng(seed).normal(0, 2, len(NAMES))
    return {name: 20 + slope * math.log10(n) + e for (name, n), e in zip(COUNTS.items(), noise, strict=True)}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Counts and scores of one data set as JSON, CSV and parquet."""
    (tmp_path / "counts.json").write_text(json.dumps(COUNTS))
    columns = {"concept": NAMES, "text": [1] * len(NAMES), "integrated": list(COUNTS.values())}
    pq.write_table(pa.table(columns), tmp_path / "counts.parquet")
    with open(tmp_path / "counts.csv", "w", newline="") as file:
        csv.writer(file).writerows([("class", "n"), *COUNTS.items()])
    models = {"backboneRN50_pretrainedcc3m": 5.0, "backboneViT-B-16_pretrainedcc3m": 0.0}
    value = {key: {"full": 1.0, "classwise": scores(slope)} for key, slope in models.items()}
    (tmp_path / "things_class_results.json").write_text(json.dumps(value))
    respelled = {name.replace(" ", "_").upper(): score for name, score in scores(5.0).items()}
    (tmp_path / "flat.json").write_text(json.dumps(respelled | {"nothing like it": 3.0}))
    with open(tmp_path / "scores.csv", "w", newline="") as file:
        rows = [(name, score, "mine") for name, score in scores(5.0).items()]
        csv.writer(file).writerows([("name", "accuracy", "model"), *rows])
    return tmp_path


def run(files: Path, counts: str, given: str, **more) -> list[dict[str, str]]:
    out = str(files / "out")
    return curve.main(curve.Config((str(files / counts),), (str(files / given),), out=out, **more))


def test_curve_of_every_kind_of_file(files, capsys):
    with_trend, without = run(files, "counts.json", "things_class_results.json")
    assert (with_trend["model"], without["model"]) == ("RN50, cc3m", "ViT-B-16, cc3m")
    assert float(with_trend["rho"]) > 0.95 > float(without["rho"])
    written = json.loads((files / "out/curve.json").read_text())
    low, slope, high = (written["RN50|cc3m"][f"decade_{key}"] for key in ("low", "slope", "high"))
    assert low < 5 < high and abs(slope - 5) < 0.5 and len(written["RN50|cc3m"]["bins"]["mean"]) == 12
    assert (files / "out/curve.png").is_file() and "rho" in (files / "out/results.md").read_text()
    for counts, given, more in (
        ("counts.parquet", "flat.json", {}),
        ("counts.csv", "scores.csv", {"count_column": "n", "score_column": "accuracy"}),
        ("counts.json", "things_class_results.json", {"models": ("RN50|cc3m",)}),
    ):
        (row,) = run(files, counts, given, **more)
        assert row["rho"] == with_trend["rho"] and row["concepts"] == "120"
    report = json.loads((files / "out/unjoined.json").read_text())
    assert report["things_class"]["joined"] == 120
    run(files, "counts.json", "flat.json")
    report = json.loads((files / "out/unjoined.json").read_text())["flat"]
    assert report["scores without a count"] == ["nothing like it"] and report["other spelling"] == 120
    assert "'nothing like it'" in capsys.readouterr().out
    with open(files / "out/pairs.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 120


def test_data_sets_are_pooled(files):
    """One file of counts for all data sets, or one for each; shuffling within data sets keeps the mean of each."""
    half = {name: count for name, count in list(COUNTS.items())[:60]}
    (files / "half.json").write_text(json.dumps(half))
    (files / "b.json").write_text(json.dumps({name: 90.0 for name in half}))
    cfg = curve.Config(
        (str(files / "counts.json"), str(files / "half.json")), (str(files / "flat.json"), str(files / "b.json")),
        out=str(files / "out"),
    )  # fmt: skip
    (row,) = curve.main(cfg)
    assert row["concepts"] == "180"
    assert json.loads((files / "out/unjoined.json").read_text())["b"]["counts without a score"] == []
    (files / "c.json").write_text(json.dumps({"x": 1.0, "y": 2.0}))  # of which no name has a count: reported only
    cfg = dataclasses.replace(cfg, counts=cfg.counts[:1], scores=(str(files / "flat.json"), str(files / "c.json")))
    (row,) = curve.main(cfg)
    assert row["concepts"] == "120"
    assert json.loads((files / "out/unjoined.json").read_text())["c"]["scores without a count"] == ["x", "y"]


def test_inputs_without_a_curve_end_in_one_sentence(files, in_process):
    (files / "other.json").write_text(json.dumps({"a": 1.0, "b": 2.0}))
    (files / "same.json").write_text(json.dumps(dict.fromkeys(NAMES, 7)))
    (files / "whole.json").write_text(json.dumps({"metrics": {"acc1": 0.5}, "task": "zeroshot_classification"}))
    (files / "empty.log").write_text("nothing here\n")
    (files / "twice.csv").write_text("concept,count\nant,1\nant,2\n")
    (files / "negative.json").write_text(json.dumps({"ant": 3, "bee": -1}))
    (files / "recall.json").write_text(json.dumps({name: i / len(NAMES) for i, name in enumerate(NAMES)}))
    (files / "nan.json").write_text(json.dumps(dict.fromkeys(NAMES, float("nan"))))
    (files / "nested.json").write_text(json.dumps({"setting": {"seed": 1}, "metrics": {"top1": 2.0}}))
    (files / "list.json").write_text("[1]")
    counts, given = files / "counts.json", files / "flat.json"
    for arguments, words in (
        (["--counts", counts, "--scores", files / "nested.json"], "no scores of concepts"),
        (["--counts", counts, "--scores", given, "--aliases", files / "list.json"], "list.json"),
        (["--counts", counts], "--scores"),
        (["--counts", counts, counts, "--scores", given], "2 files of counts"),
        (["--counts", counts, "--scores", files / "other.json"], "has a count in"),
        (["--counts", files / "same.json", "--scores", given], "have the count 7"),
        (["--counts", counts, "--scores", files / "whole.json"], "--dump_classnames"),
        (["--counts", files / "twice.csv", "--scores", given], "has two counts of ant"),
        (["--counts", files / "negative.json", "--scores", given], "holds no counts: bee has -1"),
        (["--counts", counts, "--scores", given, files / "recall.json"], "fractions (at most 0.99"),
        (["--counts", counts, "--scores", files / "nan.json"], "not finite"),
        (["--counts", counts, "--scores", files / "empty.log"], "no report by class"),
        (["--counts", files / "counts.csv", "--scores", given], "no column integrated or count"),
        (["--counts", counts, "--scores", given, "--bins", "2"], "--bins"),
        (["--counts", counts, "--scores", given, "--models", "RN50"], "model RN50"),
        (["--counts", files / "none.json", "--scores", given], "none.json"),
    ):
        result = in_process(*arguments, "--out", files / "out", module="concept_frequency.curve")
        assert result.code == 2 and words in result.err and one_sentence(result.err), (arguments, result.err)


@pytest.mark.parametrize("text", ["1:-1", "3:", ":", "2:-1", ":-4"])
def test_slices(text):
    bins = curve.parse_slice(text)
    assert list(range(12))[bins] == eval(f"list(range(12))[{text}]")


def test_files_of_clip_benchmark(tmp_path, monkeypatch, capsys):
    """The output of `clip_benchmark eval` gives recall by class, and with counts of these classes a curve."""
    sets = ROOT / "data/emoji/eval"
    if not (sets / "groups_id/classnames.txt").is_file():
        pytest.fail("data/emoji is missing: `make data` makes it", pytrace=False)
    one_element = lambda value: value.item() if isinstance(value, np.ndarray) else float(value)  # noqa: E731
    monkeypatch.setattr(their_classification, "float", one_element, raising=False)  # which numpy 2.4 refuses
    command = f"""clip_benchmark eval --model ViT-emoji --dataset wds/groups_id --task zeroshot_classification
        --dataset_root {sets / "groups_id"} --no_amp --batch_size 256 --num_workers 0 --dump_classnames
        --output {tmp_path}/groups.json"""
    monkeypatch.setattr(sys, "argv", [*command.split(), "--pretrained", ""])
    their_cli.main()
    printed = capsys.readouterr().out
    (tmp_path / "log.txt").write_text(printed)
    (found,) = curve.read_scores(tmp_path / "log.txt")
    about = json.loads((tmp_path / "groups.json").read_text())
    assert found.dataset == "wds/groups_id" and set(found.values) <= set(numbered(about["classnames"]))
    mean = np.mean(list(found.values.values()))
    assert mean == pytest.approx(100 * about["metrics"]["mean_per_class_recall"], abs=0.05)
    counts = {name: 10**i for i, name in enumerate(about["classnames"])}
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    (row,) = run(tmp_path, "counts.json", "log.txt", bins=":")
    decades, recalls = zip(*((np.log10(counts[name]), recall) for name, recall in found.values.items()), strict=True)
    assert row["model"].startswith("ViT-emoji") and row["concepts"] == str(len(recalls))
    assert row["no bins"] == f"{np.corrcoef(decades, recalls)[0, 1]:.3f}"
    assert json.loads((tmp_path / "out/unjoined.json").read_text())["wds/groups_id"]["scores without a count"] == []
    assert (tmp_path / "out/curve.png").is_file()
    for about["classnames"], words in (([], "--dump_classnames"), (["one"], "more classes than")):
        (tmp_path / "groups.json").write_text(json.dumps(about))
        with pytest.raises(ValueError, match=words):
            curve.read_scores(tmp_path / "log.txt")
    (tmp_path / "groups.json").unlink()
    with pytest.raises(ValueError, match="neither there nor beside"):
        curve.read_scores(tmp_path / "log.txt")


def test_names_of_evaluated_classes_are_keys():
    """Two classes with the same name have two scores."""
    import torch

    class Model(torch.nn.Module):
        def encode_text(self, tokens):
            return tokens.float()

    tokenizer = lambda texts: torch.tensor([[len(text), 1.0] for text in texts])  # noqa: E731
    features, labels = torch.eye(2).repeat(3, 1), torch.tensor([0, 1] * 3)
    found = evaluate.classify(
        Model(), tokenizer, features, labels, ["missile", "missile"], ["{c}"], 8, torch.device("cpu"), torch.float32
    )
    assert list(found["classwise"]) == ["missile (1)", "missile (2)"]
