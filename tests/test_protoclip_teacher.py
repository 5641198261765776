"""The external teacher: its features, its file, its command line."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from protoclip_runs import TEACHER, TINY
from scripts import SHARDS, finished, metrics, one_sentence

from protoclip.teacher import embed_captions, on_disk, pca
from protoclip.teacher_file import Teacher, all_captions, captions_digest
from shared import data
from shared.index import Strings

SCRIPT = "protoclip.train"


def write(file: Path, keys: Iterable[str], features: np.ndarray, save=np.savez, **about) -> None:
    """A file of features by sample key, as the script writes it."""
    keys = Strings.of(keys)
    save(file, keys=keys.text, ends=keys.ends, features=features, **about)


def test_teacher_script(cli, folder: Path):
    out = folder / "made.npz"
    command = ["minilm", "--data", SHARDS / "00000.tar", "--dataset-size", "200", "--dim", "8", "--out", out]
    assert "200 captions" in finished(cli(*command, module="protoclip.teacher")).out
    before = out.stat().st_mtime_ns
    assert "nothing to do" in finished(cli(*command, module="protoclip.teacher")).out
    assert out.stat().st_mtime_ns == before
    pairs = data.open_pairs(str(SHARDS / "00000.tar"), 200)
    rows = Teacher(str(out)).features_of(pairs, np.array([3, 3, 199]))
    assert rows.shape == (3, 8) and torch.equal(rows[0], rows[1])
    grown = cli(*command[:3], "--dataset-size", "201", "--out", out, module="protoclip.teacher")
    assert grown.code == 2 and "has no features of sample" in grown.err and one_sentence(grown.err)


def test_row_aligned_teacher(cli, folder: Path):
    pairs = data.open_pairs(str(SHARDS / "00000.tar"), 300)
    features = Teacher(str(TEACHER)).features_of(pairs, np.arange(300)).numpy()
    np.save(folder / "upstream.npy", np.concatenate([features, features[:50] + 1]))  # of the whole CSV: the first count
    write(folder / "by_key.npz", pairs.keys[::-1], features[::-1])
    options = [*TINY, "--episodes", "2", "--dataset-size", "300", "--episode-size", "64"]
    for name in ("upstream.npy", "by_key.npz"):
        out = folder / name.replace(".", "-")
        result = finished(cli("emoji", *options, "--external-teacher", folder / name, "--out", out))
        assert ("in the order of" in result.out) == (name == "upstream.npy")
    assert metrics(folder / "upstream-npy") == metrics(folder / "by_key-npz")
    result = cli("emoji", *TINY, "--external-teacher", folder / "upstream.npy", "--out", folder / "wrong")
    assert result.code == 2 and "350 rows" in result.err and one_sentence(result.err)


def test_teachers_that_do_not_fit_are_refused(tmp_path: Path):
    def saved(features: np.ndarray) -> str:
        np.save(tmp_path / "t.npy", features)
        return str(tmp_path / "t.npy")

    with pytest.raises(ValueError, match="a row of features"):
        Teacher(saved(np.zeros(3)))
    pairs = type("Pairs", (), {"broken": ["one"], "__len__": lambda self: 3})()
    with pytest.raises(ValueError, match="1 samples were left out"):
        Teacher(saved(np.zeros((4, 2)))).find(pairs, np.arange(3))
    with pytest.raises(ValueError, match="not finite"):
        Teacher(saved(np.full((4, 2), np.nan))).find(pairs, np.arange(3))


def test_teacher_rows_of_repeated_keys(tmp_path: Path):
    class Pairs:
        broken = ()
        keys = Strings.of(["a", "b", "a"])

        def __len__(self):
            return 3

    write(tmp_path / "t.npz", Pairs.keys, np.arange(3.0)[:, None])
    teacher = Teacher(str(tmp_path / "t.npz"))
    assert teacher.features_of(Pairs(), np.array([2, 0, 1])).flatten().tolist() == [2, 0, 1]  # same rows, same order
    other = Pairs()
    other.keys = Strings.of(["b", "a", "a"])
    with pytest.raises(ValueError, match="has features of sample a twice"):
        teacher.features_of(other, np.array([0]))


def test_a_teacher_of_other_captions_is_refused(tmp_path: Path):
    """Captions that have changed under the same keys; data that have changed otherwise are not refused."""

    def pairs_of(*captions: str) -> data.TSV:
        rows = "".join(f"{caption}\t{i}.png\n" for i, caption in enumerate(captions))
        (tmp_path / "pairs.tsv").write_text("title\tfilepath\n" + rows)
        return data.open_pairs(str(tmp_path / "pairs.tsv"))

    pairs = pairs_of("a cat", "a dog")
    made = json.dumps({"captions": captions_digest(all_captions(pairs))})
    for data_of_file in (pairs.fingerprint, "another"):
        write(tmp_path / "t.npz", pairs.keys, np.ones((2, 3), np.float32), made=made, data=data_of_file)
        teacher = Teacher(str(tmp_path / "t.npz"))
        assert teacher.find(pairs_of("a cat", "a dog"), np.arange(2)).tolist() == [0, 1]
        with pytest.raises(ValueError, match="t.npz .*other captions"):
            teacher.find(pairs_of("a cat", "a fox"), np.arange(2))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_features_stay_on_the_disk(tmp_path: Path, dtype: type):
    """Files of the script and of upstream are mapped. Rows are float32, also those of a file in half precision."""
    rng, keys = np.random.default_rng(0), Strings.of(f"key{i}" for i in range(300))
    features = rng.standard_normal((300, 5)).astype(dtype)
    write(tmp_path / "t.npz", keys, features)
    np.save(tmp_path / "t.npy", features)
    rows = rng.integers(0, 300, 40)
    for name in ("t.npz", "t.npy"):
        pairs = keys_alone(keys)
        teacher = Teacher(str(tmp_path / name))
        assert isinstance(teacher.features, np.memmap)
        found = teacher.features_of(pairs, rows)
        assert found.dtype == torch.float32 and np.array_equal(found.numpy(), features[rows])
    shuffled = keys_alone(Strings.of(f"key{i}" for i in reversed(range(300))))
    assert np.array_equal(Teacher(str(tmp_path / "t.npz")).features_of(shuffled, rows).numpy(), features[::-1][rows])


def keys_alone(keys: Strings):
    """Pairs with keys only; anything else cannot be read."""
    return type("Pairs", (), {"keys": keys, "broken": (), "__len__": lambda self: len(keys)})()


def test_files_that_are_no_teacher_files_are_refused(tmp_path: Path):
    write(tmp_path / "pickled.npz", ["a"], np.array([[{}]]))
    write(tmp_path / "compressed.npz", ["a"], np.zeros((1, 9)), np.savez_compressed)
    np.savez(tmp_path / "keyless.npz", features=np.zeros((1, 1)))
    (tmp_path / "text.npz").write_text("features")
    write(tmp_path / "whole.npz", ["a"], np.zeros((1, 9)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    for name in ("pickled", "compressed", "keyless", "text", "cut"):
        with pytest.raises(ValueError, match=f"{name}.npz is no teacher file"):
            Teacher(str(tmp_path / f"{name}.npz"))


@pytest.mark.parametrize("attend_padding", [False, True])
def test_captions_are_embedded_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attend_padding: bool):
    """Rows go through a temporary file; blockwise tokenisation gives the same features."""

    class Encoder(torch.nn.Embedding):
        config = SimpleNamespace(hidden_size=6)

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=super().forward(input_ids))

    def tokenizer(texts: list[str], truncation: bool) -> dict:
        sizes.append(len(texts))
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    torch.manual_seed(0)
    encoder, sizes = Encoder(128, 6), []
    captions = ["x" * (i % 7 + 1) + chr(97 + i % 26) for i in range(50)]
    whole = embed_captions(captions, encoder, tokenizer, 6, attend_padding, 8)
    assert sizes == [50] and whole.norm(dim=1).allclose(torch.ones(50))
    monkeypatch.setattr("protoclip.teacher.BLOCK", 16)
    with on_disk(tmp_path, 50, 6) as rows:
        embed_captions(Strings.of(captions), encoder, tokenizer, 6, attend_padding, 8, rows)
        torch.testing.assert_close(rows, whole)
        reduced = pca(rows, 3)
    assert sizes == [50, 16, 16, 16, 2] and not list(tmp_path.iterdir())
    monkeypatch.undo()
    torch.testing.assert_close(reduced, pca(whole, 3), rtol=1e-4, atol=1e-5)


def test_no_room_for_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ValueError, match="0.2 GB .*No space left"), on_disk(tmp_path, 10**5, 512):
        pass


def test_teacher_that_does_not_cover_the_data(in_process, tmp_path: Path):
    pairs = data.open_pairs(f"{SHARDS}/00000.tar")
    write(tmp_path / "t.npz", pairs.keys[:-1], np.zeros((len(pairs) - 1, 4), np.float32))
    result = in_process("emoji", *TINY, "--external-teacher", tmp_path / "t.npz", "--out", tmp_path / "run")
    assert result.code == 2 and f"has no features of sample {pairs.keys[-1]}" in result.err and one_sentence(result.err)
    assert not (tmp_path / "run/metrics.jsonl").exists()  # before the first episode, not after it


def test_teacher_command_line_errors(in_process, tmp_path: Path):
    cases = {
        "--data is missing": ["roberta-large"],
        ".npz": ["minilm", "--data", f"{SHARDS}/00000.tar", "--out", tmp_path / "t.npy"],
        "does not exist": ["minilm", "--data", "/nowhere/0.tar", "--out", tmp_path / "t.npz"],
    }
    for message, arguments in cases.items():
        result = in_process(*arguments, module="protoclip.teacher")
        assert result.code == 2 and message in result.err and one_sentence(result.err)
