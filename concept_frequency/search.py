"""Search one partition of a corpus (a tar, or a slice of a table): index captions, tag images, count concepts.

Each function takes a job that can be pickled, so any process or machine can run it; count.py distributes the jobs. Each
partition gets a file with the index of the nouns in its captions, and a file with the concepts in its images. Files are
written atomically: a count that is restarted computes only the missing ones, and a count of other concepts reuses the
index of captions.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from io import FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from concept_frequency.concepts import load_json
from concept_frequency.config import CountConfig
from concept_frequency.corpus import Partition, RowTable, read_captions, read_columns, row_keys, sample_id
from concept_frequency.model import InvertedIndex, controlled_counts, matched_counts, tag_presence
from concept_frequency.statistics import misalignment
from concept_frequency.tagging import Tagger, load_tagger, tag_captions, tag_images
from shared import checkpoints, data, tars
from shared.errors import UserError

BATCH = 64  # images per forward pass

# -------------------------------------------------------------------------------------- index and tags of one partition


class Job(NamedTuple):
    """A job that writes the index, the tags or the phrase counts of a partition."""

    partition: Partition
    cfg: CountConfig
    target: str  # file to write
    names: tuple[str, ...] = ()
    table: str = ""  # file of a RowTable
    phrases: str = ""  # file to write the phrase counts to, beside an index


class Done(NamedTuple):
    """The result of a Job: the index or tags are in the file `target`."""

    target: str
    documents: int
    broken: list[data.Broken]


def index_partition(job: Job) -> Done:
    """Tag the captions of a partition and write their index; with `job.phrases`, also write their phrase counts."""
    cfg, broken, phrases = job.cfg, [], Phrases(job.names if job.phrases else ())
    captions = phrases.watch(read_captions(job.partition, cfg.caption_column, cfg.also, broken))
    index = InvertedIndex.build(tag_captions(captions, cfg.spacy, cfg.exact, cfg.casefold, cfg.batch_captions))
    if job.phrases:
        Path(job.phrases).parent.mkdir(parents=True, exist_ok=True)
        finish(job.phrases, phrases.save, index.num_documents, [])
    return finish(job.target, index.save, index.num_documents, broken)


def phrase_partition(job: Job) -> Done:
    """Write the phrase counts of a partition that has an index already."""
    phrases = Phrases(job.names)
    captions = phrases.watch(read_captions(job.partition, job.cfg.caption_column, job.cfg.also, []))
    return finish(job.target, phrases.save, sum(1 for _ in captions), [])


def words_of(text: str) -> list[str]:
    """The lower-case words of a text: `A T-shirt, red` -> a, t-shirt, red."""
    return re.findall(r"\w+(?:[-'’]\w+)*", text.replace("_", " ").lower())


class Phrases:
    """Counts the captions that contain each name literally: its words in sequence, ignoring case."""

    def __init__(self, names: Sequence[str]):
        self.counts = np.zeros(len(names), dtype=np.int64)
        self.starts: dict[str, list[tuple[list[str], int]]] = {}  # first word -> (words, index of the name)
        for c, name in enumerate(names):
            if words := words_of(name):
                self.starts.setdefault(words[0], []).append((words, c))

    def watch(self, captions: Iterable[str]) -> Iterator[str]:
        """Pass the captions through and count the names in them."""
        for caption in captions:
            if self.starts:
                words = words_of(caption)
                first = ((i, each) for i, word in enumerate(words) for each in self.starts.get(word, ()))
                for c in {c for i, (wanted, c) in first if words[i : i + len(wanted)] == wanted}:
                    self.counts[c] += 1
            yield caption

    def save(self, file: BinaryIO) -> None:
        np.savez(file, counts=self.counts)


def read_phrases(path: str) -> NDArray[np.int64]:
    """(K,) number of captions with each name."""
    with np.load(path, allow_pickle=False) as file:
        return file["counts"]


def finish(target: str, save: Callable[[BinaryIO], None], documents: int, broken: list[data.Broken]) -> Done:
    """Write `target` atomically, and its number of documents and broken samples to a .json beside it."""
    checkpoints.write_json(Path(target).with_suffix(".json"), {"documents": documents, "broken": broken})
    own = f".{os.getpid()}.tmp"  # a worker left over from a killed run may write the same file
    with checkpoints.replaced(Path(target), own) as file:
        save(file)
    return Done(target, documents, broken)


def done_before(target: str) -> Done:
    """The Done of a file that an earlier run wrote."""
    about = load_json(Path(target).with_suffix(".json"))
    return Done(target, about["documents"], [data.Broken(*each) for each in about["broken"]])


def label_partition(job: Job) -> Done:
    """Write tags (document, concept, probability 1) from the label column instead of from images."""
    cfg, place = job.cfg, {name: c for c, name in enumerate(job.names)}
    columns = [cfg.caption_column, cfg.label_column] + ([cfg.also] if cfg.also else [])
    rows = (row for row in read_columns(job.partition, columns) if not cfg.also or (row[0] and row[2]))
    concepts = np.array([place.get(row[1], -1) for row in rows], dtype=np.int64)
    documents = np.flatnonzero(concepts >= 0)
    save = tags_writer(documents, concepts[documents], np.ones(len(documents)))
    return finish(job.target, save, len(concepts), [])


@cache
def tagger_of(settings: str, names: tuple[str, ...], device: str) -> Tagger:
    """The tagger of this process and device, loaded once. `settings` is a `CountConfig` as JSON."""
    cfg = CountConfig(**json.loads(settings))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # this process must not use another GPU
    return load_tagger(
        cfg.tagger, names, cfg.model, cfg.pretrained, cfg.checkpoint, cfg.descriptions or None, cfg.average, device
    )


def tag_partition(job: Job, device: str = "cpu", decoders: int = 0) -> Done:
    """Tag the images of a shard and write (document, concept, probability) above 0.5, or above a lower threshold.

    `decoders` processes decode the images and send uint8 to this process; with 0 this process decodes them.
    """
    cfg, broken, found = job.cfg, [], [(np.zeros(0),) * 3]
    if job.partition.kind != ".tar":
        raise UserError(f"--tagger needs image shards, but {job.partition.path} is not a .tar")
    tagger = tagger_of(json.dumps(dataclasses.asdict(cfg)), job.names, device)
    table = RowTable.load(job.table) if job.table else None
    pixels, normalise = data.split_normalisation(tagger.transform)
    with job.partition.local() as file, open(file, "rb", buffering=0) as tar:
        shard = ShardImages(tar, job.partition.number, cfg.ids, table, pixels)
        loader = DataLoader(
            shard, BATCH, num_workers=decoders, collate_fn=collate, pin_memory=device.startswith("cuda"),
            multiprocessing_context="fork" if decoders else None,
        )  # fmt: skip
        for documents, images, passed_over in loader:
            broken += passed_over
            if len(documents):
                images = normalise(images.to(device, non_blocking=True))
                probabilities = tag_images([images], tagger.probabilities)
                row, concept = np.nonzero(tag_presence(probabilities, min(0.5, cfg.threshold)))
                found.append((documents[row], concept, probabilities[row, concept]))
    save = tags_writer(*(np.concatenate(column) for column in zip(*found, strict=True)))
    return finish(job.target, save, len(shard), broken + shard.index.broken * bool(cfg.images))


class ShardImages(Dataset):
    """Row i of an image shard: (document, image (3, H, W)), or Broken. `tar` is the opened shard."""

    def __init__(self, tar: FileIO, number: int, ids: str, table: RowTable | None, transform: Callable):
        self.tar, self.number, self.ids, self.table, self.transform = tar, number, ids, table, transform
        self.index = tars.index_shard(tar.name)
        self.wanted = row_keys(tar.name, ids, self.index.keys)

    def __len__(self) -> int:
        return len(self.index.keys)

    def __getitem__(self, row: int) -> tuple[int, Tensor] | data.Broken:
        offset, size, *_ = self.index.spans[row].tolist()
        try:
            document = row if self.ids == "row" else sample_id(self.ids, self.wanted[row], self.number, self.table)
            return document, self.transform(data.decode_image(os.pread(self.tar.fileno(), size, offset)))
        except data.BrokenSample as error:
            return data.Broken(self.index.keys[row], str(error))
        except (KeyError, ValueError):
            return data.Broken(self.index.keys[row], "not among the captions")


def collate(items: list) -> tuple[NDArray[np.int64], Tensor | None, list[data.Broken]]:
    """(documents (B,), images (B, 3, H, W) or None if there are none, broken samples)."""
    broken = [item for item in items if isinstance(item, data.Broken)]
    whole = [item for item in items if not isinstance(item, data.Broken)]
    documents = np.array([document for document, _ in whole], dtype=np.int64)
    return documents, torch.stack([image for _, image in whole]) if whole else None, broken


class RayTagger:
    """A Ray actor that tags partitions on the GPU that Ray assigns to it."""

    def __init__(self, decoders: int):
        self.device, self.decoders = "cuda:0" if torch.cuda.is_available() else "cpu", decoders

    def tag(self, job: Job) -> Done:
        return tag_partition(job, self.device, self.decoders)


def tags_writer(documents: NDArray, concepts: NDArray, probabilities: NDArray) -> Callable[[BinaryIO], None]:
    """A function that writes these arrays, each (n,), to an open file."""
    columns = {
        "document": documents.astype(np.int64),
        "concept": concepts.astype(np.int32),
        "probability": probabilities.astype(np.float16),
    }
    return lambda file: np.savez(file, **columns)


def read_tags(path: str, threshold: float) -> NDArray[np.int64]:
    """(document, concept) pairs (n, 2) with a probability above the threshold."""
    with np.load(path, allow_pickle=False) as file:
        rows = tag_presence(file["probability"], threshold)
        return np.stack([file["document"][rows], file["concept"][rows]], axis=1).astype(np.int64)


# ---------------------------------------------------------------------------------------------- counts of one partition


def partitions_of_tags(job: tuple[str, tuple[int, ...]]) -> set[int]:
    """Indices of the partitions whose documents are in a file of tags; job: (this file, first document of each
    partition)."""
    path, bases = job
    with np.load(path, allow_pickle=False) as file:
        return set(np.unique(np.searchsorted(bases, file["document"], side="right") - 1).tolist())


class CountJob(NamedTuple):
    """A job that counts the concepts of a partition in captions, and in both caption and image."""

    index: str  # file of a partition's index
    base: int  # id of its first document in the corpus
    documents: int
    tags: tuple[tuple[str, int], ...]  # (file, id of its first document): may tag this partition's documents
    queries: tuple[tuple[str, ...], ...]  # known terms
    threshold: float


class Counted(NamedTuple):
    """Counts, summed over partitions. Arrays are (K,)."""

    text: NDArray[np.int64]
    both: NDArray[np.int64]
    documents: int
    with_text: int  # documents with a concept in the caption
    misaligned: int  # documents with concepts in caption and image, but none in both
    image: NDArray[np.int64]
    kept: NDArray[np.int64]  # images in the similarity control
    with_image: int
    phrase: NDArray[np.int64] | int = 0  # captions with the literal name; 0 if not counted
    searched: tuple[tuple[str, ...], ...] = ()  # only in the total: search terms of each concept
    missing: tuple[tuple[str, ...], ...] = ()  # only in the total: those terms that no caption has


def known_terms(job: tuple[str, frozenset[str]]) -> set[str]:
    """The terms that occur in an index; job: (file of the index, terms)."""
    return job[1] & InvertedIndex.load(job[0]).place.keys()


def count_partition(job: CountJob) -> Counted:
    """Count the concepts of one partition; a document has a concept if it has all of the concept's known terms."""
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
    """A job that counts the concepts of images in a file of tags."""

    tags: str
    base: int
    num_concepts: int
    threshold: float
    keep: str


def count_tags(job: TagJob) -> Counted:
    """Count the concepts of the images in one file of tags, and of the images that the similarity control keeps."""
    pairs = read_tags(job.tags, job.threshold) + (job.base, 0)
    nothing = np.zeros(job.num_concepts, dtype=np.int64)
    kept = controlled_counts(pairs, np.load(job.keep, allow_pickle=False), job.num_concepts) if job.keep else nothing
    image = np.bincount(pairs[:, 1], minlength=job.num_concepts)
    return Counted(nothing, nothing, 0, 0, 0, image, kept, len(np.unique(pairs[:, 0])))
