"""Count concepts in a corpus of image-text pairs, on one machine or many: `python -m concept_frequency.count PRESET`

    python -m concept_frequency.count laion400m --data '/data/laion400m/part-{00000..00031}.parquet' --concepts a.txt
    python -m concept_frequency.count shards --data '/data/cc3m/{00000..00331}.tar' --concepts b.json --tagger clip

Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:`. Read in this order:
  corpus.py    files to partitions (a tar, or a slice of a table), their captions, ids of images
  tagging.py   captions to nouns, images to concepts
  search.py    the work on one partition, in any process
  this file    all partitions: index and tag the missing ones, collect the terms that any of them has, sum their counts
An index of the whole corpus is built only with --merge, and machines exchange only a few thousand words and numbers.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from concept_frequency.concepts import read_concepts
from concept_frequency.config import COUNT_PRESETS, CountConfig, check_count
from concept_frequency.corpus import Partition, RowTable, list_partitions, read_captions, sample_id  # noqa: F401
from concept_frequency.model import InvertedIndex, clean, query_terms
from concept_frequency.search import (
    Counted,
    CountJob,
    Done,
    Job,
    RayTagger,
    TagJob,
    count_partition,
    count_tags,
    done_before,
    index_partition,
    known_terms,
    label_partition,
    partitions_of_tags,
    phrase_partition,
    read_phrases,
    tag_partition,
)
from concept_frequency.tagging import lemmas_of, tag_captions, tag_images  # noqa: F401
from shared import checkpoints, cli, data, evaluation, run, tars
from shared.errors import UserError

CONNECT_SECONDS = 5.0  # time limit for a Ray head to answer


def count_corpus(cfg: CountConfig, names: Sequence[str]) -> Counted:
    """Counts of the concepts `names` in the corpus of `cfg`; finished partitions are not repeated."""
    cfg, names = absolute(cfg), tuple(names)
    if cfg.address:
        connect(cfg.address)
    out = Path(cfg.out)
    partitions = list_partitions(cfg.data, cfg.partition_captions, out / "cache")
    phrases = phrase_files(cfg, names, partitions, out)
    texts = text_stage(cfg, partitions, out, names, phrases)
    broken = [b for done in texts for b in done.broken]
    if not sum(done.documents for done in texts):
        why = f": {broken[0].reason} ({broken[0].key})" if broken else ""
        raise UserError(f"{', '.join(cfg.data)} holds no caption{why}")
    data.say_damaged(damaged_tars(partitions, texts))
    tags, broken_images = tag_stage(cfg, names, partitions, out)
    broken += broken_images
    if line := data.broken_report(broken, "kept as documents without concepts"):
        print(line)
    total = add_up(cfg, names, texts, tags)
    if cfg.phrases:
        jobs = [Job(partition, cfg, file, names) for partition, file in zip(partitions, phrases, strict=True)]
        found = stage(phrase_partition, jobs, cfg, "captions")
        total = total._replace(phrase=sum(read_phrases(done.target) for done in found))
    if cfg.merge:
        InvertedIndex.merge([InvertedIndex.load(done.target) for done in texts]).save(out / "index.npz")
    return total


def damaged_tars(partitions: list[Partition], texts: list[Done]) -> list[str]:
    """A sentence for each damaged local tar: bytes and captions that could be read, and the expected number."""
    found, whole = [], []
    for partition, done in zip(partitions, texts, strict=True):
        if partition.kind == ".tar" and partition.file in {broken.key for broken in done.broken}:
            found.append((partition.file, done.documents))
        elif partition.kind == ".tar":
            whole.append(done.documents)
    return [data.damaged_shard(file, count, tars.index_shard(file).spans, whole) for file, count in found]


def absolute(cfg: CountConfig) -> CountConfig:
    """The same settings with absolute paths, since remote processes have another working folder."""
    paths = {
        name: getattr(cfg, name) for name in ("keep", "checkpoint", "descriptions", "model", "pretrained", "spacy")
    }
    found = {name: os.path.abspath(path) for name, path in paths.items() if path and os.path.exists(path)}
    return dataclasses.replace(cfg, out=os.path.abspath(cfg.out), **found)


def phrase_files(cfg: CountConfig, names: tuple[str, ...], partitions: list[Partition], out: Path) -> list[str]:
    """The file of each partition's phrase counts; "" without --phrases."""
    if not cfg.phrases:
        return [""] * len(partitions)
    folder = out / "partitions" / f"phrases-{data.stable_hash(cfg.caption_column, cfg.also, *names):016x}"
    return [str(folder / f"{partition.name()}.npz") for partition in partitions]


def text_stage(
    cfg: CountConfig, partitions: list[Partition], out: Path, names: tuple[str, ...] = (), phrases: Sequence[str] = ()
) -> list[Done]:
    """Index the nouns of every partition. Partitions that are indexed now also get phrase counts of the names."""
    settings = (cfg.caption_column, cfg.also, cfg.spacy, cfg.exact, cfg.casefold)
    folder = out / "partitions" / f"text-{data.stable_hash(*map(str, settings)):016x}"
    files = phrases or [""] * len(partitions)
    jobs = [
        Job(partition, cfg, str(folder / f"{partition.name()}.npz"), names if file else (), phrases=file)
        for partition, file in zip(partitions, files, strict=True)
    ]
    return stage(index_partition, jobs, cfg, "captions")


def tag_stage(
    cfg: CountConfig, names: tuple[str, ...], partitions: list[Partition], out: Path
) -> tuple[list[Done], list[data.Broken]]:
    """(tags of every partition or image shard, broken samples); nothing without a tagger or labels."""
    if not (cfg.tagger or cfg.label_column):
        return [], []
    files = (cfg.model, cfg.pretrained, cfg.checkpoint, cfg.descriptions)
    settings = (names, cfg.tagger, cfg.label_column, *files)
    settings += (cfg.average, cfg.ids, cfg.caption_column, cfg.also, min(cfg.threshold, 0.5))
    weights = (os.path.join(path, "checkpoint.pt") if path and os.path.isdir(path) else path for path in files)
    settings += tuple(stamp(path) for path in weights if path and os.path.isfile(path))
    if cfg.ids in ("cc12m", "yfcc15m"):  # an image's row depends on all captions
        settings += tuple(partition.name() for partition in partitions)
    folder = out / "partitions" / f"images-{data.stable_hash(*map(str, settings)):016x}"
    table = ""
    if cfg.ids in ("cc12m", "yfcc15m"):
        table = str(folder / "rows.npz")
        if not Path(table).exists():
            folder.mkdir(parents=True, exist_ok=True)
            column = cfg.caption_column if cfg.ids == "cc12m" else "0"
            captions = (text for partition in partitions for text in read_captions(partition, column, "", []))
            RowTable.build(map(str.strip, captions)).save(table)
    shards = list_partitions(cfg.images, cfg.partition_captions, out / "cache") if cfg.images else partitions
    jobs = [Job(partition, cfg, str(folder / f"{partition.name()}.npz"), names, table) for partition in shards]
    done = stage(tag_partition if cfg.tagger else label_partition, jobs, cfg, "images")
    return done, [b for each in done for b in each.broken]


def stamp(path: str) -> str:
    """Size and time of a file, to detect its replacement."""
    return f"{os.path.getsize(path)} {os.stat(path).st_mtime_ns}"


def stage(work: Callable, jobs: list[Job], cfg: CountConfig, label: str) -> list[Done]:
    """Run the jobs whose results are missing; return all results, in order. Shows partitions, rate and time left."""
    done = {i: done_before(job.target) for i, job in enumerate(jobs) if Path(job.target).exists()}
    for result in done.values():
        refuse_broken(result, cfg)
    todo = [i for i in range(len(jobs)) if i not in done]
    for folder in {Path(job.target).parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
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


def shown(work: Callable, jobs: Sequence, cfg: CountConfig, label: str) -> Iterator[Any]:
    """Results in order of completion, under a progress bar."""
    results = (result for _, result in spread(work, jobs, cfg))
    return run.progress(results, len(jobs), label, unit="partition")


def add_up(cfg: CountConfig, names: tuple[str, ...], texts: list[Done], tags: list[Done]) -> Counted:
    """Sums over partitions; each is counted alone, with the terms that occur in any partition."""
    lemmas = lemmas_of(cfg.query_spacy) if cfg.lemmatize else None
    queries = [query_terms(name, lemmas, cfg.last_token, cfg.clean_terms) for name in names]
    wanted = frozenset(term for terms in queries for term in terms)
    vocabulary = set().union(*shown(known_terms, [(done.target, wanted) for done in texts], cfg, "terms"))
    missing = tuple(tuple(term for term in terms if term not in vocabulary) for terms in queries)
    if cfg.unknown == "drop":
        queries = [[term for term in terms if term in vocabulary] for terms in queries]
    frozen = tuple(map(tuple, queries))

    bases = np.cumsum([0] + [done.documents for done in texts]).tolist()
    if cfg.images:  # a file of tags can contain documents of any partition
        of_partition: list[list[tuple[str, int]]] = [[] for _ in texts]
        asked = [(done.target, tuple(bases[:-1])) for done in tags]
        for i, numbers in spread(partitions_of_tags, asked, cfg):
            for number in numbers:
                of_partition[number].append((tags[i].target, 0))
    else:  # the tags of partition i belong to partition i
        of_partition = [[(done.target, base)] for done, base in zip(tags, bases, strict=False)] or [[] for _ in texts]
    jobs = [
        CountJob(done.target, base, done.documents, tuple(sorted(files)), frozen, cfg.threshold)
        for done, base, files in zip(texts, bases, of_partition, strict=False)
    ]
    tag_jobs = [
        TagJob(done.target, base, len(names), cfg.threshold, cfg.keep)
        for done, base in zip(tags, [0] * len(tags) if cfg.images else bases, strict=False)
    ]
    zero = np.zeros(len(names), dtype=np.int64)
    total = Counted(zero, zero, 0, 0, 0, zero, zero, 0, searched=frozen, missing=missing)
    for work, todo, label in ((count_partition, jobs, "counts"), (count_tags, tag_jobs, "image counts")):
        for counted in shown(work, todo, cfg, label):
            total = Counted(*(a + b for a, b in zip(total, counted, strict=True)))
    return total


# ------------------------------------------------------------------------------------------------------- where jobs run


def spread(work: Callable, jobs: Sequence, cfg: CountConfig) -> Iterator[tuple[int, Any]]:
    """(job number, result) in order of completion, from this process, processes of this machine, or a Ray cluster.

    Jobs and results are pickled and functions are found by name, so the project must be importable where they run.
    """
    if cfg.address:
        yield from run_on_ray(work, jobs)
        return
    crews = processes(work, cfg.workers or cli.cores(), len(jobs))
    if sum(size for size, _ in crews) <= 1:
        yield from ((i, call(job)) for _, call in crews for i, job in enumerate(jobs))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes to start
    pools = [ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) for size, _ in crews]
    places = [(functools.partial(pool.submit, call), size) for pool, (size, call) in zip(pools, crews, strict=True)]

    def first(running: list[Future]) -> Future:
        return futures.wait(running, return_when=futures.FIRST_COMPLETED).done.pop()

    try:
        yield from as_they_come(jobs, places, first, Future.result)
    finally:
        for wait in (False, True):  # cancel everywhere first
            for pool in pools:
                pool.shutdown(wait, cancel_futures=True)


def processes(work: Callable, workers: int, jobs: int) -> list[tuple[int, Callable]]:
    """(number of processes, the function that each of them calls) for this number of jobs on this machine.

    Images are tagged by one process per GPU, with its share of the `workers` as decoders. Everything else, and images
    without a GPU, is done by as many processes as there are workers.
    """
    devices = gpus()[: min(workers, jobs)] if work is tag_partition else []
    if not devices:
        return [(min(workers, jobs), work)]
    decoders = workers // len(devices) if workers > len(devices) else 0
    return [(1, functools.partial(work, device=device, decoders=decoders)) for device in devices]


def gpus() -> list[str]:
    """The GPUs of this machine."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def as_they_come(
    jobs: Sequence, places: list[tuple[Callable, int]], first: Callable[[list], Any], result: Callable[[Any], Any]
) -> Iterator[tuple[int, Any]]:
    """(job number, result) in order of completion.

    places: (function that starts a job, number of simultaneous jobs); as many more are queued, so that no process
    waits. `first` waits for one of the running jobs, `result` returns its result.
    """
    todo, running = iter(enumerate(jobs)), {}

    def start(submit: Callable, count: int) -> None:
        running.update({submit(job): (i, submit) for i, job in itertools.islice(todo, count)})

    for submit, count in places * 2:
        start(submit, count)
    while running:
        done = first(list(running))
        i, submit = running.pop(done)
        start(submit, 1)
        yield i, result(done)


def run_on_ray(work: Callable, jobs: Sequence) -> Iterator[tuple[int, Any]]:
    """`spread` on the connected Ray cluster: one process per processor, for images one per GPU."""
    import ray

    taggers, share = [], cores_of_a_gpu(ray.nodes()) if work is tag_partition else None
    if share is None:
        places = [(ray.remote(work).remote, 2 * int(ray.cluster_resources().get("CPU", 1)))]
    else:  # long-lived processes that keep their GPU and model
        tagger = ray.remote(num_gpus=1, num_cpus=share, max_restarts=2, max_task_retries=2)(RayTagger)
        count = min(int(ray.available_resources().get("GPU", 0)) or 1, len(jobs))  # other programs may use some
        taggers = [tagger.remote(share) for _ in range(count)]
        places = [(tagger.tag.remote, 1) for tagger in taggers]

    def result(done: Any) -> Any:
        try:
            return ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # one sentence, without the tracebacks of both machines

    try:
        yield from as_they_come(jobs, places, lambda running: ray.wait(running, num_returns=1)[0][0], result)
    finally:
        for tagger in taggers:
            ray.kill(tagger)


def cores_of_a_gpu(nodes: list[dict]) -> int | None:
    """Processors per GPU on the machine of a Ray cluster with the lowest number; None without GPUs."""
    found = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("GPU")]
    return min((int(each.get("CPU", 0) // each["GPU"]) for each in found), default=None)


def connect(address: str) -> None:
    """Connect to the Ray cluster at HOST:PORT, ray://HOST:PORT or `auto`, or start one here (`local`).

    Its processes import this project and modules of the working folder from the same paths as this process, so machines
    share a file system or have the project installed. ValueError within seconds if nothing answers; Ray itself would
    try for minutes.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--address needs Ray: pip install 'ray[client]>=2.40'") from None
    if address not in ("auto", "local"):
        check_head(address)
    folders = [str(Path(__file__).resolve().parents[1]), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"}}
    try:
        ray.init(
            address=None if address == "local" else address, ignore_reinit_error=True, log_to_driver=False,
            runtime_env=environment,
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(f"--address {address}: no Ray cluster found ({why})") from None


def check_head(address: str) -> None:
    """UserError unless a gRPC server answers at [ray://]HOST:PORT, as a Ray head does."""
    import grpc

    where = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        host, port = where.hostname, where.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise UserError(f"--address is auto, local, HOST:PORT or ray://HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"--address {address}: no answer ({error}); `ray status` shows the head's address") from None
    if os.environ.get("RAY_USE_TLS", "0") == "1":
        return
    with grpc.insecure_channel(where.netloc, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            text = f"--address {address}: this is not a Ray head; `ray status` shows the head's address"
            raise UserError(text) from None


# ----------------------------------------------------------------------------------------------------------- the script


def write_counts(cfg: CountConfig, lists: dict[str, list[str]], names: Sequence[str], counted: Counted) -> None:
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
    about = {"phrase": counted.phrase} if cfg.phrases else {}
    about |= {
        "searched_as": list(map(" ".join, counted.searched)),
        missing_heading(cfg): list(map(" ".join, counted.missing)),
    }
    with checkpoints.replaced(out / "counts.parquet") as file:
        pq.write_table(pa.table({"concept": list(names)} | columns | about), file)
    place = {name: i for i, name in enumerate(names)}
    for title, wanted in lists.items():
        for key, method in methods.items():
            counts = {name: columns[key][place[name]].item() for name in wanted}
            checkpoints.write_json(out / f"{title}_{cfg.corpus}_{method}_search_counts.json", counts)
    if with_images:
        larger, size = max(counted.with_text, counted.with_image, 1), cfg.size or max(counted.documents, 1)
        checkpoints.write_json(
            out / f"{cfg.corpus}_misalignment_degree.json",
            {
                "misalignment_counts": counted.misaligned,
                "misalignment_degree (percent); extracted dataset size": counted.misaligned / larger,
                "misalignment_degree (percent); fixed conservative dataset size": counted.misaligned / size,
            },
        )


def missing_heading(cfg: CountConfig) -> str:
    """Heading for a concept's terms that no caption has: they were dropped, or set its count to zero."""
    return "dropped" if cfg.unknown == "drop" else "unknown"


def most_frequent(cfg: CountConfig, names: Sequence[str], counted: Counted, rows: int = 10) -> str:
    """A table of the concepts in the most captions, with the terms that were searched for each."""
    columns = {"captions": counted.text}
    columns |= {"phrase": counted.phrase} if cfg.phrases else {}
    columns |= {"images": counted.image, "both": counted.both} if cfg.tagger or cfg.label_column else {}
    return evaluation.table([
        {"concept": names[i], "searched as": " ".join(counted.searched[i]),
         missing_heading(cfg): " ".join(counted.missing[i])}
        | {heading: f"{values[i]:,}" for heading, values in columns.items()}
        for i in np.argsort(-counted.text, kind="stable")[:rows]
    ])  # fmt: skip


def why_never(cfg: CountConfig, names: Sequence[str], counted: Counted) -> str | None:
    """A sentence about concepts that cannot be found because of their spelling, if there are any."""
    odd = [name for name, terms in zip(names, counted.missing, strict=True) if any(clean(t) != t for t in terms)]
    if not odd:
        return None
    remedy = "pass --lemmatize, which splits words as captions are split" if not cfg.lemmatize else "pass --clean-terms"
    return (
        f"{len(odd):,} concepts, such as {odd[0]!r}, have a term with other signs than letters, which are deleted from "
        f"captions' nouns, so no caption has the term; {remedy}"
    )


def main(cfg: CountConfig) -> None:
    """Count the concepts of the lists, write the counts, print the most frequent."""
    check_count(cfg)
    lists = {Path(path).stem if Path(path).is_file() else Path(path).name: read_concepts(path) for path in cfg.concepts}
    if len(lists) < len(cfg.concepts):
        raise UserError(f"lists of concepts need different names, not {', '.join(cfg.concepts)}")
    names = list(dict.fromkeys(name for wanted in lists.values() for name in wanted))
    start = time.perf_counter()
    with run.lock(Path(cfg.out)):
        counted = count_corpus(cfg, names)
        write_counts(cfg, lists, names, counted)
    seconds, never = time.perf_counter() - start, int((counted.text == 0).sum())
    print(f"{counted.documents:,} captions, {len(names):,} concepts, {seconds:.1f} s; {never:,} concepts in no caption")
    print(most_frequent(cfg, names, counted))
    if line := why_never(cfg, names, counted):
        print(line)
    if cfg.tagger or cfg.label_column:
        size = cfg.size or max(counted.documents, 1)
        print(f"misaligned: {counted.misaligned:,} pairs, {counted.misaligned / size:.2%}")
    print(f"written to {cfg.out}")


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(COUNT_PRESETS)))
