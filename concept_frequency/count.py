"""Count concepts in a corpus of image-text pairs: `python -m concept_frequency.count PRESET`

    python -m concept_frequency.count laion400m --data '/data/laion400m/part-{00000..00031}.parquet' --concepts a.txt
    python -m concept_frequency.count shards --data '/data/cc3m/{00000..00331}.tar' --concepts b.json --tagger clip

Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:`. A corpus is a list of partitions: tars, or
slices of tables (captions.py). Steps, each of them over all partitions in a pool of processes:
  1. index the nouns of the captions                                      `index_partition`
  2. tag the images, or take their labels                                 `tag_partition`, `label_partition`
  3. collect the concepts' terms that any caption has, and count          `sum_partitions`, `count_partition`
Steps 1 and 2 write a file for each partition, atomically: a count that is restarted computes the missing ones, a count
of other concepts reuses the index of captions, and `--part i/n` computes every n-th file, on any machine.
"""

import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse

from concept_frequency.captions import (
    Partition,
    lemmas_of,
    list_partitions,
    read_captions,
    read_columns,
    tag_captions,
)
from concept_frequency.concepts import load_json, read_concepts
from concept_frequency.config import COUNT_PRESETS, CountConfig
from concept_frequency.images import CaptionRows, Tagger, Tags, load_tagger, tag_shard
from concept_frequency.model import (
    InvertedIndex,
    controlled_counts,
    known_terms,
    matched_counts,
    query_terms,
    tag_presence,
)
from concept_frequency.statistics import misaligned, misalignment_degrees
from shared import checkpoints, cli, data, evaluation, run
from shared.errors import UserError
from shared.run import stable_hash

# -------------------------------------------------------------------------------------- index and tags of one partition


class Job(NamedTuple):
    """A job that writes the index or the tags of a partition."""

    partition: Partition
    cfg: CountConfig
    target: str  # file to write
    names: tuple[str, ...] = ()
    rows: str = ""  # file of CaptionRows


class Done(NamedTuple):
    """The result of a Job: the index or tags are in the file `target`."""

    target: str
    documents: int
    broken: list[data.Broken]


def index_partition(job: Job) -> Done:
    """Tag the captions of a partition and write their index."""
    broken: list[data.Broken] = []
    captions = read_captions(job.partition, job.cfg.caption_column, job.cfg.also, broken)
    index = InvertedIndex.build(tag_captions(captions, job.cfg.spacy, job.cfg.corrected))
    save = functools.partial(sparse.save_npz, matrix=index.matrix, compressed=False)
    return finish(job.target, save, index.matrix.shape[0], broken, terms=index.terms)


def read_index(target: str) -> InvertedIndex:
    """The index that `index_partition` wrote."""
    return InvertedIndex(terms_of(target), sparse.load_npz(target))


def terms_of(target: str) -> list[str]:
    """The words of an index."""
    return load_json(Path(target).with_suffix(".json"))["terms"]


def label_partition(job: Job) -> Done:
    """Write tags with probability 1 from the label column instead of from images."""
    cfg, place = job.cfg, {name: c for c, name in enumerate(job.names)}
    columns = [cfg.caption_column, cfg.label_column] + ([cfg.also] if cfg.also else [])
    rows = (row for row in read_columns(job.partition, columns) if not cfg.also or (row[0] and row[2]))
    concepts = np.array([place.get(row[1], -1) for row in rows], dtype=np.int32)
    documents = np.flatnonzero(concepts >= 0)
    tags = Tags(documents, concepts[documents], np.ones(len(documents), dtype=np.float16))
    return finish(job.target, functools.partial(np.savez, **tags._asdict()), len(concepts), [])


def tag_partition(job: Job) -> Done:
    """Write the tags of a shard's images."""
    tagger = loaded_tagger(job.cfg, job.names, Worker.device)
    rows = CaptionRows.load(job.rows) if job.rows else None
    tags, images, broken = tag_shard(job.partition, job.cfg, tagger, rows, Worker.device, Worker.decoders)
    return finish(job.target, functools.partial(np.savez, **tags._asdict()), images, broken)


@functools.cache
def loaded_tagger(cfg: CountConfig, names: tuple[str, ...], device: str) -> Tagger:
    """The tagger of this process, loaded once."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # this process must not use another GPU
    return load_tagger(cfg, names, device)


def finish(
    target: str, save: Callable[[BinaryIO], None], documents: int, broken: list[data.Broken], **about: Any
) -> Done:
    """Write `target` atomically, and its number of documents and broken samples to a .json beside it."""
    about |= {"documents": documents, "broken": broken}
    checkpoints.write_json(Path(target).with_suffix(".json"), about)
    own = f".{os.getpid()}.tmp"  # a worker left over from a killed run may write the same file
    with checkpoints.replaced(Path(target), own) as file:
        save(file)
    return Done(target, documents, broken)


def done_before(target: str) -> Done:
    """The Done of a file that an earlier run wrote."""
    about = load_json(Path(target).with_suffix(".json"))
    return Done(target, about["documents"], [data.Broken(*each) for each in about["broken"]])


# ------------------------------------------------------------------------------------------------------- all partitions


def count_corpus(cfg: CountConfig, names: Sequence[str]) -> "Counted":
    """Counts of the concepts `names` in the corpus of `cfg`; finished partitions are not repeated."""
    texts, tags = prepare(cfg, tuple(names))
    lemmas = lemmas_of(cfg.query_spacy) if cfg.lemmatize else None
    return sum_partitions(cfg, [query_terms(name, lemmas, cfg.corrected) for name in names], texts, tags)


def prepare(cfg: CountConfig, names: tuple[str, ...]) -> tuple[list[Done], list[Done]]:
    """(indexes, tags) of the partitions; of every n-th one with `--part`. Reports broken samples."""
    out = Path(cfg.out)
    partitions = list_partitions(cfg.data, cfg.partition, out / "cache")
    settings = (cfg.caption_column, cfg.also, cfg.spacy, cfg.corrected)
    texts = stage(index_partition, jobs_of(cfg, partitions, "text", settings), cfg, "captions")
    broken = [b for done in texts for b in done.broken]
    if not cfg.part and not sum(done.documents for done in texts):
        why = f": {broken[0].reason} ({broken[0].key})" if broken else ""
        raise UserError(f"{', '.join(cfg.data)} holds no caption{why}")
    tags = tag_stage(cfg, names, partitions) if cfg.tagger or cfg.label_column else []
    broken += [b for done in tags for b in done.broken]
    if line := data.broken_report(broken, "kept as documents without concepts"):
        print(line)
    return texts, tags


def jobs_of(
    cfg: CountConfig, partitions: list[Partition], kind: str, settings: tuple, names: tuple[str, ...] = ()
) -> list[Job]:
    """A job for each partition; its file is in a folder whose name changes with the settings."""
    folder = Path(cfg.out) / "partitions" / f"{kind}-{stable_hash(*map(str, settings)):016x}"
    folder.mkdir(parents=True, exist_ok=True)
    return [Job(partition, cfg, str(folder / f"{partition.name()}.npz"), names) for partition in partitions]


def tag_stage(cfg: CountConfig, names: tuple[str, ...], partitions: list[Partition]) -> list[Done]:
    """The tags of every partition, or of every image shard."""
    files = (cfg.model, cfg.pretrained, cfg.checkpoint, cfg.descriptions)
    settings = (names, cfg.tagger, cfg.label_column, *files, cfg.ids, cfg.caption_column, cfg.also)
    settings += (min(cfg.threshold, 0.5),)
    weights = (os.path.join(path, "checkpoint.pt") if path and os.path.isdir(path) else path for path in files)
    settings += tuple(stamp(path) for path in weights if path and os.path.isfile(path))
    by_text = cfg.ids in ("cc12m", "yfcc15m")  # an image's row depends on all captions
    settings += tuple(partition.name() for partition in partitions) if by_text else ()
    shards = list_partitions(cfg.images, cfg.partition, Path(cfg.out) / "cache") if cfg.images else partitions
    jobs = jobs_of(cfg, shards, "images", settings, names)
    if by_text and jobs:
        rows = Path(jobs[0].target).with_name("rows.npz")
        if not rows.exists():
            column = cfg.caption_column if cfg.ids == "cc12m" else "0"
            texts = (text for partition in partitions for text in read_captions(partition, column, "", []))
            CaptionRows.build(map(str.strip, texts)).save(str(rows))
        jobs = [job._replace(rows=str(rows)) for job in jobs]
    return stage(tag_partition if cfg.tagger else label_partition, jobs, cfg, "images")


def stamp(path: str) -> str:
    """Size and time of a file, to detect its replacement."""
    return f"{os.path.getsize(path)} {os.stat(path).st_mtime_ns}"


def stage(work: Callable, jobs: list[Job], cfg: CountConfig, label: str) -> list[Done]:
    """Run the jobs of `--part` whose results are missing; return all their results, in order. Shows progress."""
    if cfg.part:
        number, parts = cfg.part_of()
        jobs = jobs[number::parts]
    done = {i: done_before(job.target) for i, job in enumerate(jobs) if Path(job.target).exists()}
    for result in done.values():
        refuse_broken(result, cfg)
    todo = [i for i in range(len(jobs)) if i not in done]
    start, seen = time.perf_counter(), 0
    with run.counting(len(todo), label, "partition") as tick:
        for i, result in spread(work, [jobs[i] for i in todo], cfg):
            done[todo[i]] = result
            seen += result.documents
            tick(1, f"{seen / (time.perf_counter() - start):,.0f} {label}/s")
            refuse_broken(result, cfg)
    return [done[i] for i in range(len(jobs))]


def refuse_broken(result: Done, cfg: CountConfig) -> None:
    """With --strict, raise UserError if a partition has a broken sample, even if an earlier run read it."""
    if cfg.strict and result.broken:
        raise UserError(f"--strict: sample {result.broken[0].key}: {result.broken[0].reason}")


class Worker:
    """What a process uses to tag images: its device, and its number of processes that decode them."""

    device, decoders = "cpu", 0

    @classmethod
    def set(cls, devices: Any, decoders: int) -> None:
        cls.device, cls.decoders = devices.get(), decoders


def spread(work: Callable, jobs: Sequence, cfg: CountConfig) -> Iterator[tuple[int, Any]]:
    """(job number, result) in order of completion, from this process or a pool of processes.

    Images are tagged by one process per GPU, with its share of the workers as decoders; without a GPU, and for all
    other work, there is a process per worker.
    """
    workers = cfg.workers or run.cores()
    devices = gpus()[: min(workers, len(jobs))] if work is tag_partition else []
    size = len(devices) or min(workers, len(jobs))
    decoders = workers // size if devices and workers > size else 0
    if size <= 1:
        Worker.device, Worker.decoders = (devices or ["cpu"])[0], decoders
        yield from enumerate(map(work, jobs))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes to start
    context = multiprocessing.get_context("spawn")
    waiting = context.SimpleQueue()  # each process takes one device
    for device in devices or ["cpu"] * size:
        waiting.put(device)
    pool = ProcessPoolExecutor(size, context, Worker.set, (waiting, decoders))
    try:
        numbers = {pool.submit(work, job): i for i, job in enumerate(jobs)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def gpus() -> list[str]:
    """The GPUs of this machine."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


# --------------------------------------------------------------------------------------------------------------- counts


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
    searched: tuple[tuple[str, ...], ...] = ()  # only in the total: search terms of each concept
    missing: tuple[tuple[str, ...], ...] = ()  # only in the total: those terms that no caption has


class CountJob(NamedTuple):
    """A job that counts the concepts of a partition in captions, and in both caption and image."""

    index: str  # file of a partition's index
    base: int  # id of its first document in the corpus
    tags: tuple[tuple[str, int], ...]  # (file, id of its first document): may tag this partition's documents
    queries: tuple[tuple[str, ...], ...]  # known terms
    threshold: float


def sum_partitions(cfg: CountConfig, queries: Sequence[Sequence[str]], texts: list[Done], tags: list[Done]) -> Counted:
    """Counts of K lists of terms: sums over partitions, each counted alone.

    c matches i <=> K_c is not empty and a subset of N_i, with K_c = the terms of c that *some* document of the whole
    corpus has. So these terms are first collected over all partitions. (Upstream run on partitions drops the terms that
    are unknown in each of them, so its sums are too large.)
    """
    wanted = {term for terms in queries for term in terms}
    vocabulary = {term for done in texts for term in wanted.intersection(terms_of(done.target))}
    missing = tuple(tuple(term for term in terms if term not in vocabulary) for terms in queries)
    if not cfg.corrected:
        queries = [known_terms(terms, vocabulary) for terms in queries]
    searched, k = tuple(map(tuple, queries)), len(queries)

    bases = np.cumsum([0] + [done.documents for done in texts]).tolist()
    of_partition: list[list[tuple[str, int]]] = [[] for _ in texts]
    if cfg.images:  # a file of tags can contain documents of any partition
        for i, numbers in spread(partitions_of_tags, [(done.target, tuple(bases[:-1])) for done in tags], cfg):
            for number in numbers:
                of_partition[number].append((tags[i].target, 0))
    else:  # the tags of partition i belong to partition i
        for i, done in enumerate(tags):
            of_partition[i].append((done.target, bases[i]))
    jobs = [
        CountJob(done.target, base, tuple(sorted(files)), searched, cfg.threshold)
        for done, base, files in zip(texts, bases, of_partition, strict=False)
    ]
    tag_jobs = [(done.target, 0 if cfg.images else base, k, cfg) for done, base in zip(tags, bases, strict=False)]
    zero = np.zeros(k, dtype=np.int64)
    total = Counted(zero, zero, 0, 0, 0, zero, zero, 0, searched=searched, missing=missing)
    for work, todo, label in ((count_partition, jobs, "counts"), (count_tags, tag_jobs, "image counts")):
        for _, counted in run.progress(spread(work, todo, cfg), len(todo), label, unit="partition"):
            total = Counted(*(a + b for a, b in zip(total, counted, strict=True)))
    return total


def count_partition(job: CountJob) -> Counted:
    """Count the concepts of one partition; a document has a concept if it has all of the concept's known terms."""
    text = read_index(job.index).matches(job.queries)
    n, k = text.shape
    pairs = [read_tags(path, job.threshold) + np.array([[base - job.base], [0]]) for path, base in job.tags]
    rows, columns = np.concatenate([np.zeros((2, 0), dtype=np.int64), *pairs], axis=1)
    own = (rows >= 0) & (rows < n)
    image = sparse.csr_array((np.ones(own.sum(), dtype=bool), (rows[own], columns[own])), (n, k))
    with_text, nothing = int((text.sum(axis=1) > 0).sum()), np.zeros(k, dtype=np.int64)
    return Counted(
        text.sum(axis=0), matched_counts(text, image), n, with_text, misaligned(text, image), nothing, nothing, 0
    )


def count_tags(job: tuple[str, int, int, CountConfig]) -> Counted:
    """Count the concepts of the images in one file of tags, and of the images that the similarity control keeps; job:
    (this file, id of its first document, number of concepts, settings)."""
    path, base, k, cfg = job
    documents, concepts = read_tags(path, cfg.threshold) + np.array([[base], [0]])
    nothing = kept = np.zeros(k, dtype=np.int64)
    if cfg.keep:
        distinct = np.unique([documents, concepts], axis=1)
        kept = controlled_counts(*distinct, np.load(cfg.keep, allow_pickle=False), k)
    return Counted(nothing, nothing, 0, 0, 0, np.bincount(concepts, minlength=k), kept, len(np.unique(documents)))


def read_tags(path: str, threshold: float) -> NDArray[np.int64]:
    """(2, n): documents and concepts with a probability above the threshold."""
    with np.load(path, allow_pickle=False) as file:
        rows = tag_presence(file["probability"], threshold)
        return np.stack([file["document"][rows], file["concept"][rows]]).astype(np.int64)


def partitions_of_tags(job: tuple[str, tuple[int, ...]]) -> set[int]:
    """Indices of the partitions whose documents are in a file of tags; job: (this file, first document of each
    partition)."""
    path, bases = job
    with np.load(path, allow_pickle=False) as file:
        return set(np.unique(np.searchsorted(bases, file["document"], side="right") - 1).tolist())


# ----------------------------------------------------------------------------------------------------------- the script


def table_of(cfg: CountConfig, names: Sequence[str], counted: Counted) -> pd.DataFrame:
    """The counts of all concepts, the terms that were searched, and those that no caption has: they were dropped, or
    with `--corrected` set the count to zero."""
    columns = {"concept": list(names), "text": counted.text}
    if cfg.tagger or cfg.label_column:
        columns |= {"image": counted.image, "integrated": counted.both}
    columns |= {"kept": counted.kept} if cfg.keep else {}
    columns["searched_as"] = list(map(" ".join, counted.searched))
    columns["unknown" if cfg.corrected else "dropped"] = list(map(" ".join, counted.missing))
    return pd.DataFrame(columns)


def write_counts(cfg: CountConfig, lists: dict[str, list[str]], counts: pd.DataFrame, counted: Counted) -> None:
    """counts.parquet of all concepts, and the authors' <list>_<corpus>_<method>_search_counts.json of each list."""
    out, text = Path(cfg.out), "lemmatized" if cfg.lemmatize else "lowercased"
    kind = {"ram++": "rampp", "": "label"}.get(cfg.tagger, cfg.tagger.replace(":", "."))
    image = f"{kind}{cfg.threshold}"
    methods = {"text": text, "image": image, "integrated": f"integrated_t{text}_i{cfg.threshold}"}
    methods["kept"] = f"kept_{image}"
    with checkpoints.replaced(out / "counts.parquet") as file:
        counts.to_parquet(file)
    by_name = counts.set_index("concept")
    for (title, wanted), column in itertools.product(lists.items(), methods.keys() & set(counts.columns)):
        path = out / f"{title}_{cfg.corpus}_{methods[column]}_search_counts.json"
        checkpoints.write_json(path, by_name[column][wanted].to_dict())
    if "image" in counts:
        extracted, whole = degrees(cfg, counted)
        checkpoints.write_json(
            out / f"{cfg.corpus}_misalignment_degree.json",
            {
                "misalignment_counts": counted.misaligned,
                "misalignment_degree (percent); extracted dataset size": extracted,
                "misalignment_degree (percent); fixed conservative dataset size": whole,
            },
        )


def degrees(cfg: CountConfig, counted: Counted) -> tuple[float, float]:
    """The `misalignment_degrees` of a count."""
    size = cfg.size or max(counted.documents, 1)
    return misalignment_degrees(counted.misaligned, counted.with_text, counted.with_image, size)


def main(cfg: CountConfig) -> None:
    """Count the concepts of the lists, write the counts, print the most frequent."""
    cfg.check()
    lists = {Path(path).stem if Path(path).is_file() else Path(path).name: read_concepts(path) for path in cfg.concepts}
    if len(lists) < len(cfg.concepts):
        raise UserError(f"lists of concepts need different names, not {', '.join(cfg.concepts)}")
    names = list(dict.fromkeys(name for wanted in lists.values() for name in wanted))
    start, out = time.perf_counter(), Path(cfg.out)
    if cfg.part:
        texts, tags = prepare(cfg, tuple(names))
        print(f"part {cfg.part}: {len(texts) + len(tags)} files in {out}; the command without --part adds up all parts")
        return
    with run.lock(out):
        counted = count_corpus(cfg, names)
        counts = table_of(cfg, names, counted)
        write_counts(cfg, lists, counts, counted)
    seconds, never = time.perf_counter() - start, int((counted.text == 0).sum())
    print(f"{counted.documents:,} captions, {len(names):,} concepts, {seconds:.1f} s; {never:,} concepts in no caption")
    print(evaluation.table(counts.sort_values("text", ascending=False, kind="stable")[:10].to_dict("records")))
    if "image" in counts:
        print(f"misaligned: {counted.misaligned:,} pairs, {degrees(cfg, counted)[1]:.2%}")
    print(f"written to {out}")


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(COUNT_PRESETS)))
