"""Counting a corpus: all kinds of files and partitions, processes, machines, kill and resume."""

import dataclasses
import functools
import http.server
import io
import multiprocessing
import re
import threading
import tracemalloc
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from concept_frequency_runs import EVAL, PIPELINE, shards, write_captions, write_shard  # noqa: F401
from scripts import SHARDS, ended, held, kill_when, one_sentence
from short_runs import small_corpus
from tqdm import tqdm

from concept_frequency import captions, count
from concept_frequency.concepts import load_json
from concept_frequency.config import CountConfig
from concept_frequency.model import InvertedIndex, known_terms, query_terms
from shared import run

SCRIPT, SECONDS = "concept_frequency.count", 240


CAPTIONS = [
    "two dogs on the beach", "a bald eagle", "Eagles of Alaska", "", "dog house", "a house for a dog", "§ 12",
    "tree frog",
    "frogs in a tree", "red t-shirt", "an apple and a banana",
] * 30  # fmt: skip
NAMES = ["dog", "dog_house", "tree frog", "unicorn dog", "T-shirt", "bald eagle", "apple", "nothing here"]


def counted(folder: Path, name: str, **settings) -> count.Counted:
    base = {"spacy": PIPELINE, "query_spacy": PIPELINE, "workers": 1, "out": str(folder / name)}
    return count.count_corpus(CountConfig(**base | settings), NAMES)


def test_plurals_in_titles_are_found_by_the_corrected_search():
    """A tagger takes words of Title Case for names, which have no singular."""
    titles = ["A Black Square Shirt For Men", "Nike Boys Black Shoes", "Puma Women White T-shirts"]
    found = list(captions.tag_captions(titles, PIPELINE, corrected=True))
    assert [{"man", "shirt"} <= found[0], {"boy", "shoe"} <= found[1], {"woman", "shirt"} <= found[2]] == [True] * 3


def test_count_is_the_same_from_any_file_in_any_partitions(tmp_path):
    files = write_captions(tmp_path, CAPTIONS)
    index, lemmas = InvertedIndex.build(captions.tag_captions(CAPTIONS, PIPELINE)), captions.lemmas_of(PIPELINE)
    queries = [known_terms(query_terms(name, lemmas), index.place) for name in NAMES]
    truth = np.array([len(index.search(terms)) for terms in queries])
    assert truth[0] == truth[3] == 90 and truth[1] == 60 and truth[-1] == 0  # `unicorn` is dropped
    for kind, column in (("parquet", "caption"), ("tsv", "1"), ("txt", "0")):
        for size in (100_000, 100):
            found = counted(tmp_path, f"{kind}{size}", data=(files[kind],), caption_column=column, partition=size)
            assert found.text.tolist() == truth.tolist() and found.documents == len(CAPTIONS)
    twice = counted(tmp_path, "twice", data=(files["txt"], files["txt"]))
    assert twice.text.tolist() == (2 * truth).tolist()
    corrected = counted(tmp_path, "corrected", data=(files["txt"],), corrected=True)
    assert corrected.text[3] == 0 and corrected.text[0] == truth[0] and corrected.missing[3] == ("unicorn",)
    dropped = counted(tmp_path, "also", data=(files["parquet"],), also="url")
    assert dropped.documents == len(CAPTIONS) - 30 and dropped.text.tolist() == truth.tolist()


def test_the_table_says_what_was_searched(tmp_path):
    (tmp_path / "captions.txt").write_text("a dog\na dog and a cat\na red t-shirt\n")
    (tmp_path / "names.txt").write_text("dog\nunicorn dog\nt-shirt\n")
    base = dict(data=(str(tmp_path / "captions.txt"),), concepts=(str(tmp_path / "names.txt"),), workers=1)
    base |= dict(spacy=PIPELINE, query_spacy=PIPELINE)
    count.main(CountConfig(**base, out=str(tmp_path / "out")))
    table = pq.read_table(tmp_path / "out/counts.parquet").to_pydict()
    assert table["text"] == [2, 2, 1]
    assert table["searched_as"] == ["dog", "dog", "shirt"] and table["dropped"] == ["", "unicorn", ""]
    count.main(CountConfig(**base, corrected=True, out=str(tmp_path / "corrected")))
    table = pq.read_table(tmp_path / "corrected/counts.parquet").to_pydict()
    assert table["text"] == [2, 0, 1] and table["unknown"] == ["", "unicorn", ""]


@pytest.mark.parametrize(("file", "settings", "message"), [
    ("page.tar", {}, "page.tar holds no caption"),
    ("captions.txt", {"also": "url"}, "pass --also ''"),
    ("empty.txt", {}, "empty.txt holds no caption"),
    ("captions.txt", {"spacy": "en_core_web_xl"}, "spacy download en_core_web_xl"),
])  # fmt: skip
def test_counts_of_nothing_are_refused(tmp_path, file, settings, message):
    (tmp_path / "page.tar").write_text("<!DOCTYPE html><html><body>404</body></html>" * 100)
    (tmp_path / "captions.txt").write_text("a dog\n")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=re.escape(message)):
        counted(tmp_path, "refused", data=(str(tmp_path / file),), **settings)


@pytest.fixture
def server(tmp_path):
    """A web server of tmp_path/web: (address, requested paths)."""
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
    monkeypatch.setattr(captions.tempfile, "tempdir", str(temporary))
    for name, column in (("a.parquet", "caption"), ("a.tsv?download=true", "1"), ("{0..1}.tar", "caption")):
        local = str(tmp_path / "web" / name.partition("?")[0])
        truth = counted(tmp_path, f"local{name[:3]}", data=(local,), caption_column=column, partition=500)
        found = counted(
            tmp_path, f"remote{name[:3]}", data=(f"{address}/{name}",), caption_column=column, partition=500
        )
        assert found.text.tolist() == truth.text.tolist() and found.documents == truth.documents > 0
    before = len(asked)
    assert before == 4 and not list(temporary.iterdir())  # each file was asked for once; tars leave nothing
    counted(tmp_path, "remote{0.", data=(f"{address}/{{0..1}}.tar",), partition=500)  # there already
    assert len(asked) == before
    monkeypatch.setattr("shared.fetch.PAUSE", 0)
    with pytest.raises(ValueError, match="could not be fetched"):
        counted(tmp_path, "missing", data=(f"{address}/none.tar",))


def test_progress_shows_rate_and_time_left(tmp_path, monkeypatch):
    shown = io.StringIO()

    class Shown(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(
                *arguments, **options | {"disable": False, "file": shown, "ncols": 120, "mininterval": 0, "delay": 0}
            )

    monkeypatch.setattr(run, "Bar", Shown)
    files = write_captions(tmp_path, CAPTIONS * 4)
    counted(tmp_path, "out", data=(files["txt"],), partition=500)
    lines = re.split(r"[\r\n]", shown.getvalue())
    assert any(re.search(r"1/3 .*[\d,]+ captions/s", line) for line in lines)


@pytest.fixture
def forks(monkeypatch):
    """The processes of a count are forks of the tests' server, which start fast; jobs are still pickled."""
    server = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(count, "multiprocessing", SimpleNamespace(get_context={"spawn": server}.get))


def test_counts_do_not_depend_on_the_number_of_processes(tmp_path, forks):
    files = write_captions(tmp_path, CAPTIONS)
    settings = {"data": (files["txt"], files["tsv"]), "caption_column": "1"}
    one = counted(tmp_path, "one", **settings)
    two = counted(tmp_path, "two", **settings | {"workers": 2})
    assert one.text.tolist() == two.text.tolist()


COLOURS = """
import os
import torch
from torchvision.transforms.functional import pil_to_tensor

def red_blue(names, device):
    \"\"\"Is the image red, is it blue; a dark image ends the process as long as there is a file `stop`.\"\"\"
    def probabilities(images):
        dark = (images.amax((1, 2, 3)) < 0.5).any()
        if dark and os.path.exists(os.path.join(os.path.dirname(__file__), "stop")):
            os._exit(9)
        return torch.stack([images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))], 1)
    return lambda image: pil_to_tensor(image).float() / 255, probabilities
"""


def test_two_devices_tag_like_one_and_resume(tmp_path, forks, monkeypatch):
    """Two processes, each with a device and decoders, tag shards; after one dies, finished files are kept."""
    for i in range(6):
        colors = [(255, 0, 0), (0, 0, 255), (99, 0, 99) if i == 3 else (255, 0, 255)] * 3
        write_shard(tmp_path / f"{i}.tar", [(f"{row:03}", "a dog", color) for row, color in enumerate(colors)])
    (tmp_path / "colours.py").write_text(COLOURS)
    monkeypatch.syspath_prepend(tmp_path)
    partitions = captions.list_partitions([str(tmp_path / "{0..5}.tar")], 1000, tmp_path)
    cfg = CountConfig(out=str(tmp_path / "one"), tagger="colours:red_blue", workers=1)

    def tags(done) -> list[dict]:
        return [{name: values.tolist() for name, values in np.load(each.target).items()} for each in done]

    truth = count.tag_stage(cfg, ("red", "blue"), partitions)
    assert sum(map(len, (each["document"] for each in tags(truth)))) == 5 * 12 + 6
    monkeypatch.setattr(count, "gpus", lambda: ["cpu", "cpu"])
    two = dataclasses.replace(cfg, out=str(tmp_path / "two"), workers=4)
    (tmp_path / "stop").touch()
    with pytest.raises(BrokenProcessPool):
        count.tag_stage(two, ("red", "blue"), partitions)
    finished = {path: path.stat().st_mtime_ns for path in Path(two.out).glob("partitions/*/*.npz")}
    assert len(finished) < 6 and not [path for path in finished if path.name.startswith("3-")]
    (tmp_path / "stop").unlink()
    found = count.tag_stage(two, ("red", "blue"), partitions)
    assert tags(found) == tags(truth) and [each[1:] for each in found] == [each[1:] for each in truth]
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())


def test_a_killed_count_resumes(tmp_path, start):
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(NAMES))
    corpus, out = small_corpus(tmp_path / "corpus", pairs=900, shards=9), tmp_path / "out"
    arguments = ["shards", "--data", corpus, "--concepts", listed, "--out", out, "--workers", 1]
    arguments += ["--spacy", PIPELINE, "--query-spacy", PIPELINE]
    kill_when(start(*arguments), lambda: list(out.glob("partitions/text-*/*.npz")), timeout=100)
    finished = {
        path: path.stat().st_mtime_ns
        for path in out.glob("partitions/text-*/*.json")
        if path.with_suffix(".npz").exists()
    }
    assert 0 < len(finished) < 9
    code, printed, err = ended(start(*arguments))
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    truth = counted(tmp_path, "whole", data=(str(corpus),), corrected=True)
    assert load_json(out / "names_corpus_lemmatized_search_counts.json") == dict(
        zip(NAMES, truth.text.tolist(), strict=True)
    )
    assert f"{truth.documents:,} captions" in printed


def test_parts_on_several_machines_add_up(tmp_path, capsys):
    """Each part writes the files of its partitions; the command without --part reads them."""
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    files = write_captions(tmp_path, CAPTIONS)
    cfg = CountConfig(
        data=(files["txt"],), concepts=(str(tmp_path / "names.txt"),), out=str(tmp_path / "out"), partition=50,
        spacy=PIPELINE, query_spacy=PIPELINE, workers=1,
    )  # fmt: skip
    for part in ("2/3", "0/3", "1/3", "9/10"):  # of seven partitions; the last part has none
        count.main(dataclasses.replace(cfg, part=part))
        assert f"part {part}: " in capsys.readouterr().out
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("partitions/*/*.npz")}
    assert len(finished) == 7 and not (tmp_path / "out/counts.parquet").exists()
    count.main(cfg)
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    found = pq.read_table(tmp_path / "out/counts.parquet").to_pydict()
    assert found["text"] == counted(tmp_path, "whole", data=(files["txt"],)).text.tolist()
    for part in ("3/3", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="--part is i/n"):
            count.main(dataclasses.replace(cfg, part=part))


def test_memory_is_bounded_by_the_size_of_partitions(tmp_path, monkeypatch):
    """Memory of reading and indexing 30,000 captions depends on the size of partitions; spaCy is replaced."""
    path = tmp_path / "a.tsv"
    path.write_text(
        "".join(f"word{i % 5000} thing{i % 7} place{i % 900} of captions number {i}\n" for i in range(30_000))
    )
    monkeypatch.setattr(count, "tag_captions", lambda texts, *_: (set(text.split()) for text in texts))

    def peak(size: int) -> tuple[int, int]:
        cfg = CountConfig(data=(str(path),), caption_column="0", partition=size)
        jobs = captions.list_partitions(cfg.data, cfg.partition, tmp_path)
        largest = 0
        for partition in jobs:
            tracemalloc.start()
            count.index_partition(count.Job(partition, cfg, str(tmp_path / f"{size}-{partition.start}.npz")))
            largest = max(largest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return len(jobs), largest

    (many, small), (one, large) = peak(2_000), peak(30_000)
    assert (many, one) == (15, 1)
    assert small < 2_000 * 2_500 < large < 30_000 * 2_000


def test_a_count_has_one_writer(tmp_path):
    (tmp_path / "names.txt").write_text("dog")
    cfg = CountConfig((str(SHARDS),), (str(tmp_path / "names.txt"),), str(tmp_path / "out"))
    with held(tmp_path / "out"), pytest.raises(ValueError, match="still going"):
        count.main(cfg)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["shards"], "--data is missing"),
    (["shards", "--data", "none.tar", "--concepts", EVAL], "shard none.tar does not exist"),
])  # fmt: skip
def test_command_lines_end_in_one_sentence(in_process, arguments, message):
    result = in_process(*arguments, module="concept_frequency.count")
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
