"""The split of the embedded corpus by names: known ones to train on, new ones to name."""

import json
from pathlib import Path

import numpy as np
import pytest

from shared import checkpoints, data, layout, tars
from shared.evalsets import EvalSet
from studies import flame_new_names as new_names

NAMES = [f"name {i}" for i in range(40)]


def png(colour: int) -> bytes:
    return layout.png(np.full((8, 8, 3), colour, np.uint8))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two drawings of every name for training, one held out in each set."""
    out = tmp_path / "emoji"
    pairs = [
        {"__key__": f"{i:03}", "png": png(i), "txt": name, "json": json.dumps({"name": name})}
        for i, name in enumerate(NAMES * 2)
    ]
    tars.write_tar(out / "train/00000.tar", pairs)
    for split in ("id", "ood"):
        folder = out / f"eval/bare_names_{split}"
        layout.write_classes(folder, NAMES, ["{c}"])
        tars.write_split(folder / "test", ({"png": png(100 + i), "cls": str(i)} for i in range(len(NAMES))))
    checkpoints.write_json(out / "manifest.json", {})
    return out


def test_no_training_sample_has_a_new_name(corpus: Path, tmp_path: Path, in_process):
    out = tmp_path / "known"
    assert in_process("--corpus", corpus, "--out", out, module="studies.flame_new_names").code == 0
    new = {name for name in NAMES if new_names.is_new(name, 5)}
    trained = dict(tars.descriptions(data.expand_shards(str(out / "train"))))
    assert new and {about["name"] for about in trained.values()} == set(NAMES) - new
    assert all(about["name"] == (NAMES * 2)[int(key)] for key, about in trained.items())  # keys are the corpus' own
    for split, drawings in (("id", 3), ("ood", 1)):
        found = EvalSet(out / f"eval/new_names_{split}", lambda image: image.getpixel((0, 0))[0])
        assert set(found.classnames) == new and found.templates == ["{c}"]
        seen = [(found.classnames[label], NAMES[pixel % 100 % 40]) for _, pixel, label in found]
        assert len(seen) == drawings * len(new) and all(label == drawn for label, drawn in seen)
    again = in_process("--corpus", corpus, "--out", out, module="studies.flame_new_names")
    assert again.code == 0 and "complete" in again.out


def test_a_missing_corpus_ends_in_one_sentence(tmp_path: Path, in_process):
    refused = in_process("--corpus", tmp_path, "--out", tmp_path / "known", module="studies.flame_new_names")
    assert refused.code == 2 and "make data" in refused.err and not (tmp_path / "known").exists()
