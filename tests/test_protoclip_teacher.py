"""The external teacher: its features, its file, its command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import finished, metrics, one_sentence
from test_protoclip_train import SCRIPT, SECONDS, SHARDS, TEACHER, TINY, folder  # noqa: F401

from protoclip.teacher import Teacher, pca
from shared import data
from shared.index import Strings


@pytest.mark.golden("protoclip", "pca")
def test_pca(case):
    out = pca(case["features"], case["dim"])
    signs = (out * case["out"]).sum(0).sign()  # a component's sign is arbitrary
    case.close("out", out * signs, atol=1e-4)


def test_teacher_script(cli, folder: Path):
    out = folder / "made.npz"
    command = ["minilm", "--data", SHARDS / "00000.tar", "--dataset-size", "200", "--dim", "8", "--out", out]
    assert "200 captions, 384 -> 8 dimensions" in finished(cli(*command, module="protoclip.teacher")).out
    before = out.stat().st_mtime_ns
    assert "nothing to do" in finished(cli(*command, module="protoclip.teacher")).out
    assert out.stat().st_mtime_ns == before
    pairs = data.open_pairs(str(SHARDS / "00000.tar"), 200)
    rows = Teacher(str(out)).rows(pairs, np.array([3, 3, 199]))
    assert rows.shape == (3, 8) and torch.equal(rows[0], rows[1])
    grown = cli(*command[:3], "--dataset-size", "201", "--out", out, module="protoclip.teacher")
    assert grown.code == 2 and "has no row for sample" in grown.err and one_sentence(grown.err)


def test_row_aligned_teacher(cli, folder: Path):
    pairs = data.open_pairs(str(SHARDS / "00000.tar"), 300)
    features = Teacher(str(TEACHER)).rows(pairs, np.arange(300)).numpy()
    np.save(folder / "upstream.npy", np.concatenate([features, features[:50] + 1]))  # of the whole CSV: the first count
    np.savez(folder / "by_key.npz", keys=pairs.keys[::-1], features=features[::-1])
    options = [*TINY, "--episodes", "2", "--dataset-size", "300", "--episode-size", "64"]
    for name in ("upstream.npy", "by_key.npz"):
        out = folder / name.replace(".", "-")
        finished(cli("emoji", *options, "--external-teacher", folder / name, "--out", out))
    assert metrics(folder / "upstream-npy") == metrics(folder / "by_key-npz")
    result = cli("emoji", *TINY, "--external-teacher", folder / "upstream.npy", "--out", folder / "wrong")
    assert result.code == 2 and "has 350 rows, the data" in result.err and one_sentence(result.err)


def test_teacher_rows_of_repeated_keys(tmp_path: Path):
    class Pairs:
        keys = Strings.of(["a", "b", "a"])

        def __len__(self):
            return 3

    features = np.arange(3.0)[:, None]
    np.savez(tmp_path / "t.npz", keys=Pairs.keys.text, ends=Pairs.keys.ends, features=features)
    teacher = Teacher(str(tmp_path / "t.npz"))
    assert teacher.rows(Pairs(), np.array([2, 0, 1])).flatten().tolist() == [2, 0, 1]  # same rows, same order
    other = Pairs()
    other.keys = Strings.of(["b", "a", "a"])
    with pytest.raises(ValueError, match="two rows for sample a"):
        teacher.rows(other, np.array([0]))


def test_teacher_that_does_not_cover_the_data(in_process, tmp_path: Path):
    pairs = data.open_pairs(f"{SHARDS}/00000.tar")
    np.savez(tmp_path / "t.npz", keys=pairs.keys[:-1], features=np.zeros((len(pairs) - 1, 4), np.float32))
    result = in_process("emoji", *TINY, "--external-teacher", tmp_path / "t.npz", "--out", tmp_path / "run")
    assert result.code == 2 and f"has no row for sample {pairs.keys[-1]}" in result.err and one_sentence(result.err)
    assert not (tmp_path / "run").exists()  # before the first episode, not after it


def test_teacher_command_line_errors(in_process, tmp_path: Path):
    cases = {
        "--data is missing": ["roberta-large"],
        "should end in .npz": ["minilm", "--data", f"{SHARDS}/00000.tar", "--out", tmp_path / "t.npy"],
        "does not exist": ["minilm", "--data", "/nowhere/0.tar", "--out", tmp_path / "t.npz"],
    }
    for message, arguments in cases.items():
        result = in_process(*arguments, module="protoclip.teacher")
        assert result.code == 2 and message in result.err and one_sentence(result.err)
