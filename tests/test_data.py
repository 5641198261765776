"""shared/data.py: order, resume and workers; counts of all kinds of broken input; shard lists, remote shards, TSV."""

import copy
import errno
import os
import pickle
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from server import serving
from shards import pair, png, read_all, three, write_tar
from torchvision import transforms

from shared import data, fetch, run, tars
from shared.clip import RememberingTokenizer
from shared.run import stable_hash

# ------------------------------------------------------------------------------------------------------------ order


def test_a_passing_fault_is_no_missing_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A drive that is gone for a moment ends the command; its images are not left out."""
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(data.BrokenSample, match="missing image"):
        data.read_file(tmp_path / "b.png")

    def gone(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.open", gone)
    with pytest.raises(ValueError, match="a.png could not be read"):
        data.read_file(tmp_path / "a.png")


def test_order_is_a_function_of_the_seed():
    first, again, other = (np.concatenate(data.batches(1000, 32, seed)) for seed in [(3, 1), (3, 1), (3, 2)])
    assert (first == again).all() and (first != other).any()
    assert (first != np.arange(1000)).any()
    torch.manual_seed(5)
    np.random.seed(5)
    assert (np.concatenate(data.batches(1000, 32, (3, 1))) == first).all()  # global generators play no part


@pytest.mark.parametrize("n", [7, 64, 97, 103])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_out_every_row_once_and_equal_one_process(n: int, world_size: int):
    ranks = [data.batches(n, 8, (0, 4), rank, world_size) for rank in range(world_size)]
    whole = data.batches(n, 8 * world_size, (0, 4))
    assert {len(batches) for batches in ranks} == {len(whole)}  # no rank runs out before another
    for b, expected in enumerate(whole):
        assert np.concatenate([batches[b] for batches in ranks]).tolist() == expected.tolist()
    assert sorted(np.concatenate(whole)) == list(range(n))


@pytest.mark.parametrize("start", [0, 1, 5, 6, 9])
def test_start_gives_the_tail(start: int):
    whole = data.batches(90, 8, (1,), rank=1, world_size=2)
    tail = data.batches(90, 8, (1,), rank=1, world_size=2, start=start)
    assert [b.tolist() for b in tail] == [b.tolist() for b in whole[start:]]


def test_stable_hash():
    assert stable_hash(0, 1, "a") == stable_hash(0, 1, "a") != stable_hash(0, "1", "a")
    assert 0 <= stable_hash(7) < 2**63


# ---------------------------------------------------------------------------------------------------- broken samples

BROKEN = {
    "missing image": [("x.txt", "x")],
    "missing caption": [("x.png", png())],
    "empty caption": [("x.png", png()), ("x.txt", " \n")],
    "caption is not UTF-8": [("x.png", png()), ("x.txt", "é".encode("latin-1"))],
    data.NO_PICTURE: [("x.png", b"no image"), ("x.txt", "x")],
    "unreadable image: OSError": [("x.png", png(size=(50, 50))[:60]), ("x.txt", "x")],
    "key occurs twice in its shard": [*pair("a", "again"), *pair("x")],
}


@pytest.mark.parametrize("reason", BROKEN)
def test_broken_samples_are_counted_and_replaced(tmp_path: Path, reason: str):
    shard = write_tar(tmp_path / "0.tar", *pair("a"), *BROKEN[reason], *pair("b"))
    pairs, broken = read_all(data.Shards([str(shard)]))
    assert {pair.key for pair in pairs} >= {"a", "b"}
    key = "a" if "twice" in reason else "x"
    assert {(b.key, b.reason) for b in broken} == {(key, reason)}
    report = data.broken_report(broken)
    assert report.startswith("1 broken sample,") and f"1 {reason}" in report and f"({key})" in report
    with pytest.raises(ValueError, match=f"--strict: sample {key}: {reason}"):
        read_all(data.Shards([str(shard)], strict=True))


def test_too_large_an_image_is_refused_before_decoding(tmp_path: Path):
    large = png("1", (9000, 9000), 0)  # 81 megapixels in a few kilobytes
    shard = write_tar(tmp_path / "0.tar", *pair("a"), ("x.png", large), ("x.txt", "x"))
    _, broken = read_all(data.Shards([str(shard)]))
    assert broken == [data.Broken("x", f"9000x9000 pixels are more than the {data.MAX_PIXELS} allowed")]


def test_all_samples_unreadable_ends_in_a_sentence(tmp_path: Path):
    shard = write_tar(tmp_path / "0.tar", ("x.png", b"?"), ("x.txt", "x"))
    with pytest.raises(ValueError, match="unreadable"):
        data.read_or_next(data.Shards([str(shard)]), 0, [])


def test_report_counts_distinct_samples():
    assert data.broken_report([]) is None
    one = data.broken_report([data.Broken("a", "unreadable image")] * 2, "left out")
    assert one == "1 broken sample, left out: 1 unreadable image (a)"
    broken = [data.Broken(f"k{i % 5}", "empty caption" if i % 5 else "missing image") for i in range(50)]
    report = data.broken_report(broken)
    assert report.startswith("5 broken samples") and "4 empty caption, 1 missing image (k0, k1, k2, ...)" in report


# ------------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    "image",
    [
        png("RGBA", colour=(255, 0, 0, 0)),
        png("LA", colour=(0, 0)),
        png("P", colour=0, transparency=0),
        png("RGB", colour=(1, 2, 3), transparency=(1, 2, 3)),
    ],
    ids=["RGBA", "LA", "palette", "RGB with a transparent colour"],
)
def test_transparency_is_composited_on_white(image: bytes):
    decoded = data.decode_image(image)
    assert decoded.mode == "RGB" and decoded.getpixel((0, 0)) == (255, 255, 255)


def test_opaque_images_keep_their_colour():
    assert data.decode_image(png("RGBA", colour=(255, 0, 0, 255))).getpixel((0, 0)) == (255, 0, 0)
    assert data.decode_image(png("L", colour=7)).getpixel((0, 0)) == (7, 7, 7)
    half = data.decode_image(png("RGBA", colour=(255, 0, 0, 128))).getpixel((0, 0))
    assert half[0] == 255 and abs(half[1] - 127) <= 1


# ------------------------------------------------------------------------------------------------- keys, shard lists


def test_a_key_in_two_shards_is_two_samples(tmp_path: Path):
    shards = [write_tar(tmp_path / f"{i}.tar", *pair("a", f"number {i}")) for i in range(2)]
    pairs = data.Shards([str(shard) for shard in shards])
    assert [(p.key, p.caption) for p in read_all(pairs)[0]] == [("a", "number 0"), ("a", "number 1")]
    assert not pairs.broken


def test_limit_and_caption(tmp_path: Path):
    shards = [str(three(tmp_path / "0.tar")), str(three(tmp_path / "1.tar"))]
    pairs = data.Shards(shards, limit=4)
    assert len(pairs) == 4 and pairs.keys.tolist() == ["a", "b", "c", "a"]
    assert pairs.caption(3) == "caption of a"
    latin = data.Shards([str(write_tar(tmp_path / "2.tar", ("x.png", png()), ("x.txt", b"caf\xe9")))])
    assert latin.caption(0) == "caf\ufffd"


def test_many_shards_are_indexed_in_order(tmp_path: Path):
    shards = [str(write_tar(tmp_path / f"{i}.tar", *pair(f"{i}"))) for i in range(64)]  # enough for the process pool
    assert data.Shards(shards).keys.tolist() == [str(i) for i in range(64)]


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")
def test_a_sample_costs_a_read_of_its_own_bytes(tmp_path: Path):
    """At any block size of the file system, although Python's buffers have the size of a block."""
    files = [(f"{i:04d}.{kind}", png() if kind == "png" else b"a cat") for i in range(200) for kind in ("png", "txt")]
    path, headers = write_tar(tmp_path / "0.tar", *files), 512 * (len(files) + 3)
    before = bytes_read()
    pairs = data.Shards([str(path)])
    assert bytes_read() - before <= 1.1 * headers + 4096  # a reading of /proc/self/io is itself read
    used, before = sum(pairs._spans[:, 1]) + sum(pairs._spans[:, 3]), bytes_read()
    for row in np.random.default_rng(0).permutation(len(pairs)):
        pairs.read(int(row))
    assert bytes_read() - before <= 1.1 * used + 4096


def test_identical_images_are_encoded_once():
    images, hashes, seen = torch.tensor([[5.0], [7.0], [5.0], [6.0]]), [2**63 + 1, 3, 2**63 + 1, 4], []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return 2 * batch

    assert torch.equal(data.encode_distinct(encode, images, hashes), 2 * images) and seen == [3]
    codes = data.encode_distinct(lambda batch: encode(batch).numpy().astype(np.uint16), images, hashes)
    assert codes.dtype == np.uint16 and codes.tolist() == [[10], [14], [10], [12]]


def test_few_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tars, "open_files", lambda: 3)
    paths = [write_tar(tmp_path / f"{i}.tar", (f"{i}.png", png()), (f"{i}.txt", b"a cat")) for i in range(8)]
    pairs = data.Shards([str(path) for path in paths])
    for row in (*range(8), *range(8)):
        assert pairs.read(row).key == str(row) and len(pairs._files._descriptors) <= 3
    again, elsewhere = copy.copy(pairs), pickle.loads(pickle.dumps(pairs))
    assert not elsewhere._files._descriptors and elsewhere.read(5).key == "5"
    open_ones = list(pairs._files._descriptors.values())
    del pairs
    assert again.read(5).key == "5" and len(open_ones) == 3
    del again
    for descriptor in open_ones:
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_shard_lists(tmp_path: Path):
    names = [str(three(tmp_path / f"{i}.tar")) for i in range(3)]
    assert data.expand_shards(f"{tmp_path}/{{0..2}}.tar") == names
    assert data.expand_shards(str(tmp_path)) == names
    assert data.expand_shards(f"{names[2]}::{tmp_path}/{{0,1}}.tar") == [names[2], *names[:2]]
    assert data.expand_shards(names[1:]) == names[1:]
    assert data.expand_shards("pipe:cat {0..1}.tar::http://host/{a,b}.tar") == [
        "pipe:cat 0.tar", "pipe:cat 1.tar", "http://host/a.tar", "http://host/b.tar",
    ]  # fmt: skip
    typed = f"{tmp_path}/{{0..3}}.tar"
    with pytest.raises(ValueError, match=f"{tmp_path}/3.tar does not exist") as error:
        data.expand_shards(typed)
    assert f"from '{typed}')" in str(error.value) and "--data" not in str(error.value)  # it may be positional
    with pytest.raises(ValueError, match="none.tar does not exist"):
        data.expand_shards("none.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no .tar shard"):
        data.expand_shards(str(tmp_path / "empty"))
    (tmp_path / "empty/train").mkdir()
    three(tmp_path / "empty/train/0.tar")
    with pytest.raises(ValueError, match="empty holds no .tar shard; .*empty/train"):
        data.expand_shards(str(tmp_path / "empty"))


def test_remote_shards_are_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shard, cache = three(tmp_path / "0.tar"), tmp_path / "cache"
    url = f"pipe:cat {shard}"
    pairs = data.open_pairs(url, cache=cache)
    assert len(pairs) == 3 and pairs.read(1).key == "b"
    copy = fetch.cached_path(url, cache)
    assert list(cache.glob("*.tar")) == [copy] and copy.read_bytes() == shard.read_bytes()
    shard.unlink()
    assert len(data.open_pairs(url, cache=cache)) == 3  # from the copy
    missing = f"pipe:cat {tmp_path}/missing.tar"
    monkeypatch.setattr(fetch, "PAUSE", 0)
    with pytest.raises(ValueError, match="missing.tar could not be fetched"):
        data.open_pairs(missing, cache=cache)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == [copy]  # no half a copy is left behind


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_download_that_fails_half_way_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str):
    """Bytes of the first attempt do not stand in front of those of the second; half a copy is not kept."""
    monkeypatch.setattr(fetch, "PAUSE", 0)
    monkeypatch.setattr(fetch, "STALLED", 0.5)
    shard, cache = three(tmp_path / "0.tar"), tmp_path / "cache"
    with serving(tmp_path, fault) as server:
        path = Path(fetch.fetch(f"{server.url}/0.tar", cache))
        assert path.read_bytes() == shard.read_bytes() and server.asked["0.tar"] == 2
        server.asked.clear()
        server.faulty = fetch.ATTEMPTS
        with pytest.raises(ValueError, match="0.tar\\?2 could not be fetched"):
            fetch.fetch(f"{server.url}/0.tar?2", cache)
    assert list(cache.glob("*.tar")) == [path] and not list(cache.glob("*.part"))


def test_a_shard_that_no_server_has_is_asked_for_once(tmp_path: Path):
    with serving(tmp_path) as server:
        with pytest.raises(ValueError, match="none.tar could not be fetched \\(FileNotFoundError"):
            fetch.fetch(f"{server.url}/none.tar", tmp_path)
    assert server.asked["none.tar"] == 1
    with pytest.raises(ValueError, match="nowhere://0.tar could not be fetched"):
        fetch.fetch("nowhere://0.tar", tmp_path)


def test_a_copy_of_another_length_than_stated_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file system that ends a file early without an error."""

    class Early:
        def get_file(self, name: str, path: str, callback) -> None:
            callback.set_size(10)
            Path(path).write_bytes(b"1234")

    monkeypatch.setattr(fetch, "url_to_fs", lambda url: (Early(), url))
    monkeypatch.setattr(fetch, "PAUSE", 0)
    with pytest.raises(ValueError, match="4 bytes came of 10"):
        fetch.fetch("memory://0.tar", tmp_path)
    assert not list(tmp_path.glob("*.tar"))


def test_copies_of_different_urls_have_different_names():
    urls = ["s3://b/x/0.tar", "s3://b/x_0.tar", "s3://c/x/0.tar", "http://h/" + "y" * 300, "https://h/" + "y" * 300]
    names = {fetch.cached_path(url, Path("cache")).name for url in urls}
    assert len(names) == len(urls) and all(len(name) < 200 and name.endswith(".tar") for name in names)


# --------------------------------------------------------------------------------------------------------------- TSV


def test_tsv(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(b"?")
    rows = [
        f"first\t{tmp_path}/a.png",
        f'say "hi"\t{tmp_path}/none.png',
        f"\t{tmp_path}/a.png",
        f"x\t{tmp_path}/bad.png",
    ]
    (tmp_path / "t.tsv").write_text("title\tfilepath\n" + "\n".join(rows) + "\n")
    pairs = data.open_pairs(str(tmp_path / "t.tsv"))
    samples, broken = read_all(pairs)
    assert len(pairs) == 4 and {sample.caption for sample in samples} == {"first"}
    assert {b.reason for b in broken} == {"missing image", "empty caption", data.NO_PICTURE}
    assert len(data.open_pairs(str(tmp_path / "t.tsv"), limit=2)) == 2
    with pytest.raises(ValueError, match="--strict: sample .*none.png: missing image"):
        read_all(data.open_pairs(str(tmp_path / "t.tsv"), strict=True))


def test_another_size_than_the_datas_is_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    shard, main = str(three(tmp_path / "0.tar")), run.Process(0, 2, torch.device("cpu"))
    for size, told in ((2, True), (3, False), (None, False), (4, True)):
        cfg = SimpleNamespace(data=shard, dataset_size=size, batch_size=1, out="run")
        data.say_size(data.open_pairs(shard, size), cfg, main)
        said = capsys.readouterr().out
        assert ("--dataset-size" in said and "3 pairs" in said and str(size) in said) if told else said == ""
        data.say_size(data.open_pairs(shard, size), cfg, main._replace(rank=1))
        assert not capsys.readouterr().out


def test_quotes_of_a_tsv_are_as_pandas_writes_them(tmp_path: Path):
    rows = ['"a ""red"" ball"\ta.png', 'a 12" plate\tb.png', '"tab\there"\tc.png', '"plain"\t"d.png"\r', "", "e\te.png"]
    (tmp_path / "t.tsv").write_text("title\tfilepath\n" + "\n".join(rows) + "\n", newline="")
    pairs = data.open_pairs(str(tmp_path / "t.tsv"))
    captions = [pairs.caption(row) for row in range(len(pairs))]
    assert captions == ['a "red" ball', 'a 12" plate', "tab\there", "plain", "e"]
    assert pairs.keys.tolist() == [f"{name}.png" for name in "abcde"]


@pytest.mark.parametrize(
    "row", ['"an unclosed quote\tb.png', '"one" quote\tb.png', "a caption\twith a tab\tb.png", '"two lines\n"\tb.png']
)
def test_a_row_of_a_tsv_never_swallows_another(tmp_path: Path, row: str):
    rows = ["first\ta.png", row, "third\tc.png", 'a quote at the "end"\td.png', 'end"\te.png']
    (tmp_path / "t.tsv").write_text("title\tfilepath\n" + "\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="t.tsv, line 3: "):
        data.open_pairs(str(tmp_path / "t.tsv"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("title\tpath\na\tb\n", "lacks the column filepath"),
        ("", "lacks the column"),
        ("title\tfilepath\n", "has no row"),
    ],
)
def test_unusable_tsv(tmp_path: Path, content: str, message: str):
    (tmp_path / "t.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        data.open_pairs(str(tmp_path / "t.tsv"))
    with pytest.raises(ValueError, match="none.tsv does not exist"):
        data.open_pairs(str(tmp_path / "none.tsv"))


def test_tsv_row_without_a_path_is_broken(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "t.tsv").write_text(f"title\tfilepath\nonly a title\na\t{tmp_path}/a.png\n")
    samples, broken = read_all(data.open_pairs(str(tmp_path / "t.tsv")))
    assert [sample.caption for sample in samples] == ["a", "a"]
    assert [b.reason for b in broken] == ["missing image"]


# -------------------------------------------------------------------------------------------------- hostile headers


def test_images_of_other_formats_start_no_interpreter(monkeypatch: pytest.MonkeyPatch):
    """PostScript is refused, because PIL passes it to Ghostscript."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(data.BrokenSample, match="none of the formats"):
        data.decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")


# ------------------------------------------------------------------------------------------- pixels, tokens, text tower


def test_normalized_pixels_are_torchvisions_bit_for_bit():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    for width, height in ((1, 1), (7, 5), (64, 48)):
        image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
        ours = data.ToNormalizedTensor(mean, std)(image)
        assert ours.is_contiguous() and torch.equal(ours, theirs(image))


def test_normalising_a_batch_is_normalising_each_image(tmp_path: Path):
    """Equal bit for bit, in both memory formats, and also with torchvision's own transforms."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    crop, random = transforms.CenterCrop(20), np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (24, 28, 3), dtype=np.uint8)) for _ in range(5)]
    theirs = transforms.Compose([crop, transforms.ToTensor(), transforms.Normalize(mean, std)])
    for transform in (transforms.Compose([crop, data.ToNormalizedTensor(mean, std)]), theirs):
        pixels, normalise = data.split_normalisation(transform)
        batch = torch.stack([pixels(image) for image in images])
        assert batch.dtype == torch.uint8 and batch.shape == (5, 3, 20, 20)
        expected = torch.stack([theirs(image) for image in images])
        assert torch.equal(normalise(batch), expected)
        last = normalise(batch.contiguous(memory_format=torch.channels_last))
        assert torch.equal(last, expected) and last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(normalise(batch[None]), expected[None])
    alone, nothing = data.split_normalisation(transforms.ToTensor())
    assert isinstance(alone, transforms.ToTensor) and nothing(batch) is batch


def test_texts_are_tokenised_once():
    calls = []

    def tokenizer(texts: list[str]) -> torch.Tensor:
        calls.append(texts)
        return torch.tensor([[len(text), ord(text[0])] for text in texts])

    remembering = RememberingTokenizer(tokenizer, size=3)
    for texts in (["ab", "c", "ab"], ["c", "def"], ["g"], ["ab"], "c"):
        expected = [[len(text), ord(text[0])] for text in ([texts] if isinstance(texts, str) else texts)]
        assert remembering(texts).tolist() == expected
    assert calls == [["ab", "c"], ["def"], ["g"], ["ab"], ["c"]]  # "g" was one too many
