"""Counting a corpus: all kinds of files and partitions, processes, machines, kill and resume."""

import dataclasses
import functools
import http.server
import io
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from scripts import ROOT, ended, finished, held, kill_when, one_sentence
from short_runs import small_corpus
from test_concept_frequency_corpus import write_captions, write_shard
from test_concept_frequency_train import EVAL, PIPELINE, SHARDS, shards  # noqa: F401
from tqdm import tqdm

from concept_frequency import corpus, count, search, tagging
from concept_frequency.concepts import load_counts
from concept_frequency.config import CountConfig
from concept_frequency.model import InvertedIndex, query_terms
from shared import run

SCRIPT, SECONDS = "concept_frequency.count", 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("concept_frequency_count")


CAPTIONS = [
    "two dogs on the beach", "a bald eagle", "Eagles of Alaska", "", "dog house", "a house for a dog", "§ 12",
    "tree frog",
    "frogs in a tree", "red t-shirt", "an apple and a banana",
] * 30  # fmt: skip
NAMES = ["dog", "dog_house", "tree frog", "unicorn dog", "T-shirt", "bald eagle", "apple", "nothing here"]


def counted(folder: Path, name: str, **settings) -> count.Counted:
    base = {"spacy": PIPELINE, "query_spacy": PIPELINE, "workers": 1, "out": str(folder / name)}
    return count.count_corpus(CountConfig(**base | settings), NAMES)


def test_count_is_the_same_from_any_file_in_any_partitions(tmp_path):
    files = write_captions(tmp_path, CAPTIONS)
    index = InvertedIndex.build(count.tag_captions(CAPTIONS, PIPELINE))
    truth = index.counts([query_terms(name, tagging.lemmas_of(PIPELINE)) for name in NAMES])
    assert truth[0] == truth[3] == 90 and truth[1] == 60 and truth[-1] == 0  # `unicorn` is dropped
    for kind, column in (("parquet", "caption"), ("tsv", "1"), ("txt", "0")):
        for memory in (256, 1):  # 1 MiB: partitions of 524 captions
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


def test_search_terms_and_phrase_counts(tmp_path):
    """`hot dog` is found if both words are nouns, `t-shirt` as `shirt`; literal occurrences are counted separately."""
    captions = [
        "a hot dog on a plate",
        "the dog has a shirt",
        "a red T-shirt",
        "Hot dog! And a hot_dog.",
        "t-shirts",
        "",
    ]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    names = ["hot dog", "t-shirt", "unicorn dog", "plate"]
    base = dict(data=(str(tmp_path / "captions.txt"),), spacy=PIPELINE, query_spacy=PIPELINE, workers=1)
    found = count.count_corpus(CountConfig(**base, out=str(tmp_path / "a")), names)
    assert found.phrase.tolist() == [2, 1, 0, 1]
    assert found.searched[1] == ("shirt",) and found.searched[2] == ("dog",) and found.missing[2] == ("unicorn",)
    again = count.count_corpus(CountConfig(**base, out=str(tmp_path / "a")), ["t-shirt"])  # the index is there already
    assert again.phrase.tolist() == [1] and again.text.tolist() == [found.text[1]]
    plain = count.count_corpus(CountConfig(**base, out=str(tmp_path / "b"), phrases=False), names)
    assert isinstance(plain.phrase, int) and plain.text.tolist() == found.text.tolist()


def test_the_table_says_what_was_searched(tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a dog\na dog and a cat\na red t-shirt\n")
    (tmp_path / "names.txt").write_text("dog\nunicorn dog\nt-shirt\n")
    base = dict(data=(str(tmp_path / "captions.txt"),), concepts=(str(tmp_path / "names.txt"),), workers=1)
    base |= dict(spacy=PIPELINE, query_spacy=PIPELINE)
    count.main(CountConfig(**base, out=str(tmp_path / "out")))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    assert rows[0] == ["concept", "searched as", "dropped", "captions", "phrase"]
    assert ["unicorn dog", "dog", "unicorn", "2", "0"] in rows and ["t-shirt", "shirt", "", "1", "1"] in rows
    table = pq.read_table(tmp_path / "out/counts.parquet").to_pydict()
    assert table["searched_as"] == ["dog", "dog", "shirt"] and table["dropped"] == ["", "unicorn", ""]
    odd = dict(unknown="zero", casefold=True, lemmatize=False, last_token=False)
    count.main(CountConfig(**base, **odd, out=str(tmp_path / "odd")))
    said = capsys.readouterr().out
    assert "1 concepts, such as 't-shirt', have a term with other signs than letters" in said and "--lemmatize" in said
    assert "| unknown" in said


@pytest.mark.parametrize(("file", "settings", "message"), [
    ("page.tar", {}, "page.tar holds no caption: truncated or damaged tar"),
    ("captions.txt", {"also": "url"}, "no column 'url' because it holds lines of text: pass --also ''"),
    ("empty.txt", {}, "empty.txt holds no caption"),
    ("captions.txt", {"spacy": "en_core_web_xl"}, "python -m spacy download en_core_web_xl, or name en_core_web_sm"),
])  # fmt: skip
def test_counts_of_nothing_are_refused(tmp_path, file, settings, message):
    (tmp_path / "page.tar").write_text("<!DOCTYPE html><html><body>404</body></html>" * 100)
    (tmp_path / "captions.txt").write_text("a dog\n")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=re.escape(message)):
        counted(tmp_path, "refused", data=(str(tmp_path / file),), **settings)


def test_a_truncated_tar_is_reported_with_the_expected_number_of_captions(tmp_path, capsys):
    for i in range(2):
        write_shard(tmp_path / f"{i}.tar", [(f"{j:03}", f"a dog and {j} cats", (j, 0, 0)) for j in range(20)])
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    found = counted(tmp_path, "cut", data=(str(tmp_path / "{0..1}.tar"),))
    said, kept = capsys.readouterr().out, found.documents - 20
    assert 0 < kept < 20 and "1.tar is truncated or damaged: read up to byte " in said
    assert f" of {len(whole) // 2:,}, {kept} pairs; undamaged shards have 20" in said


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
    monkeypatch.setattr("shared.fetch.PAUSE", 0)
    with pytest.raises(ValueError, match="could not be fetched"):
        counted(tmp_path, "missing", data=(f"{address}/none.tar",))


def test_progress_shows_rate_and_time_left(tmp_path, monkeypatch):
    shown = io.StringIO()

    class Shown(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"disable": False, "file": shown, "ncols": 120})

    monkeypatch.setattr(run, "tqdm", Shown)
    files = write_captions(tmp_path, CAPTIONS * 4)
    counted(tmp_path, "out", data=(files["txt"],), memory=1)
    lines = re.split(r"[\r\n]", shown.getvalue())
    assert any(re.search(r"captions: .*1/3 \[\d\d:\d\d<\d\d:\d\d, .*[\d,]+ captions/s\]", line) for line in lines)
    assert any(line.startswith("counts: ") for line in lines)


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


def test_images_are_tagged_by_one_process_per_gpu(monkeypatch):
    """Image jobs get one process per GPU, other jobs one per core."""

    def laid_out(work, workers: int, jobs: int) -> list[tuple[int, dict]]:
        return [(size, getattr(call, "keywords", {})) for size, call in count.processes(work, workers, jobs)]

    monkeypatch.setattr(count, "gpus", lambda: ["cuda:0", "cuda:1"])
    zero, one = ({"device": f"cuda:{i}", "decoders": 4} for i in (0, 1))
    assert laid_out(search.tag_partition, 8, 100) == [(1, zero), (1, one)]
    assert laid_out(search.tag_partition, 8, 1) == [(1, {"device": "cuda:0", "decoders": 8})]
    assert [about["decoders"] for _, about in laid_out(search.tag_partition, 2, 100)] == [0, 0]
    assert laid_out(search.tag_partition, 1, 100) == [(1, {"device": "cuda:0", "decoders": 0})]
    assert laid_out(search.index_partition, 8, 100) == [(8, {})] and laid_out(search.index_partition, 8, 3) == [(3, {})]
    monkeypatch.setattr(count, "gpus", list)
    assert laid_out(search.tag_partition, 8, 100) == [(8, {})]
    node = lambda cpu, gpu, alive=True: {"Alive": alive, "Resources": {"CPU": cpu} | ({"GPU": gpu} if gpu else {})}  # noqa: E731
    assert count.cores_of_a_gpu([node(64.0, 8.0), node(96.0, 4.0), node(128.0, 0), node(1.0, 8.0, False)]) == 8
    assert count.cores_of_a_gpu([node(64.0, 0)]) is None


def test_jobs_are_given_to_free_workers():
    """Each worker holds at most twice as many jobs as it runs; a slow worker gets no more."""
    started: dict[str, list[int]] = {"slow": [], "fast": []}

    def place(name: str):
        return lambda job: started[name].append(job) or (name, job)

    quickest = lambda running: min(running)  # noqa: E731  ("fast", ..) before ("slow", ..)
    found = list(
        count.as_they_come(range(9), [(place("slow"), 1), (place("fast"), 2)], quickest, lambda done: done[1] ** 2)
    )
    assert started == {"slow": [0, 3], "fast": [1, 2, 4, 5, 6, 7, 8]}
    assert sorted(found) == [(i, i * i) for i in range(9)] and found[-1] == (3, 9)


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
    partitions = corpus.list_partitions([str(tmp_path / "{0..5}.tar")], 1000, tmp_path)
    cfg = CountConfig(out=str(tmp_path / "one"), tagger="colours:red_blue", workers=1)

    def tags(done) -> list[dict]:
        return [{name: values.tolist() for name, values in np.load(each.target).items()} for each in done]

    truth, _ = count.tag_stage(cfg, ("red", "blue"), partitions, Path(cfg.out))
    assert sum(map(len, (each["document"] for each in tags(truth)))) == 5 * 12 + 6
    monkeypatch.setattr(count, "gpus", lambda: ["cpu", "cpu"])
    two = dataclasses.replace(cfg, out=str(tmp_path / "two"), workers=4)
    (tmp_path / "stop").touch()
    with pytest.raises(BrokenProcessPool):
        count.tag_stage(two, ("red", "blue"), partitions, Path(two.out))
    finished = {path: path.stat().st_mtime_ns for path in Path(two.out).glob("partitions/*/*.npz")}
    assert len(finished) < 6 and not [path for path in finished if path.name.startswith("3-")]
    (tmp_path / "stop").unlink()
    found, _ = count.tag_stage(two, ("red", "blue"), partitions, Path(two.out))
    assert tags(found) == tags(truth) and [each[1:] for each in found] == [each[1:] for each in truth]
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())


def test_wrong_address_fails_at_once(server):
    with socket.socket() as bound:  # nobody listens
        bound.bind(("127.0.0.1", 0))
        port, start = bound.getsockname()[1], time.monotonic()
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(ValueError, match=f"--address {address}: no answer"):
                count.check_head(address)
    for address in ("nowhere", "host:", "host:port", "host:99999"):
        with pytest.raises(ValueError, match="--address is auto, local, HOST:PORT or ray://HOST:PORT"):
            count.check_head(address)
    with pytest.raises(ValueError, match="this is not a Ray head"):
        count.check_head(server[0].removeprefix("http://"))
    assert time.monotonic() - start < 2 * count.CONNECT_SECONDS


def test_counts_on_ray_do_not_depend_on_the_folder(tmp_path, start, monkeypatch):
    """Captions and images are counted from another folder with relative paths, by a cluster that was started in a third
    folder and claims to have a GPU."""
    pytest.importorskip("ray")
    (tmp_path / "elsewhere").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
    head = [*ray, "start", "--head", "--block", "--num-cpus", "1", "--num-gpus", "1", "--include-dashboard", "false"]
    cluster = subprocess.Popen(
        [*head, "--disable-usage-stats", "--port", address.rpartition(":")[2]], cwd=tmp_path / "elsewhere", env=plain,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        write_captions(tmp_path, CAPTIONS)
        colors = [((255, 0, 0), (0, 0, 255), (255, 0, 255))[row % 3] for row in range(20)]
        write_shard(tmp_path / "images.tar", [(f"{row:05}", "?", color) for row, color in enumerate(colors)])
        (tmp_path / "names.txt").write_text("\n".join(NAMES))
        (tmp_path / "colours.py").write_text(COLOURS)
        monkeypatch.syspath_prepend(tmp_path)
        images = {"images": (str(tmp_path / "images.tar"),), "ids": "cc3m", "tagger": "colours:red_blue"}
        truth = counted(tmp_path, "here", data=(str(tmp_path / "a.txt"),), **images)  # while the cluster starts
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                count.check_head(address)
                break
            except ValueError:
                time.sleep(0.2)
        command = ["shards", "--data", "a.txt", "--out", "out", "--concepts", "names.txt", "--images", "images.tar"]
        command += ["--ids", "cc3m", "--tagger", "colours:red_blue", "--spacy", PIPELINE, "--query-spacy", PIPELINE]
        monkeypatch.chdir(tmp_path)
        finished(ended(start(*command, "--address", address, PYTHONPATH=str(ROOT))))
    finally:
        cluster.terminate()
        cluster.wait(30)
    found = pq.read_table(tmp_path / "out/counts.parquet").to_pydict()
    assert found["concept"] == NAMES and found["text"] == truth.text.tolist()
    assert found["image"] == truth.image.tolist() and truth.image.sum() == 26


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
    truth = counted(tmp_path, "whole", data=(str(corpus),))
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


@pytest.mark.parametrize(("arguments", "message"), [
    (["shards"], "--data is missing"),
    (["shards", "--data", "none.tar", "--concepts", EVAL], "shard none.tar does not exist"),
])  # fmt: skip
def test_command_lines_end_in_one_sentence(in_process, arguments, message):
    result = in_process(*arguments, module="concept_frequency.count")
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err


def test_contract_is_importable():
    """The names of the contract can be imported from the file that it states."""
    names = "tag_captions tag_images sample_id"
    assert all(hasattr(count, name) for name in names.split())
