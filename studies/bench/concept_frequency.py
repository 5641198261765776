"""Speed of concept_frequency against the authors' code: `python -m studies.bench.concept_frequency [--upstream PATH]`.

Ours and theirs take turns on the same inputs, each side at its best thread setting. Prints a Markdown table of medians
and their ratio theirs/ours (above 1: ours is faster). `--upstream` is a clone of
bethgelab/frequency_determines_performance@11ef009, whose search and dictionary are run; without it, functions of this
file do the same work.
"""

import argparse
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
from scipy import sparse

from concept_frequency import train
from concept_frequency.captions import list_partitions, load_spacy, tag_captions
from concept_frequency.config import COUNT_PRESETS, PRESETS, CountConfig
from concept_frequency.count import Job, index_partition, spread
from concept_frequency.model import InvertedIndex, known_terms, noun_set
from shared import data, run
from shared.loss import clip_loss
from studies import concept_frequency as study
from studies.bench import arguments, bench, one_thread, peak_memory, print_row, race, step_row
from studies.bench.baselines import baseline_rows
from tests.parity import import_beside


def make_index(total: int, num_terms: int, num_documents: int) -> InvertedIndex:
    """An index with random documents for each term, with Zipf numbers of documents that sum to about `total`."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, num_terms + 1)
    lengths = np.minimum(np.maximum(share / share.sum() * total, 1), num_documents // 4).astype(np.int64)
    ids = [np.unique(rng.integers(0, num_documents, length)) for length in lengths]
    ends, rows = np.cumsum([0, *map(len, ids)]), np.concatenate(ids)
    matrix = sparse.csc_array((np.ones(len(rows), dtype=bool), rows, ends), (num_documents, num_terms))
    return InvertedIndex([f"t{i}" for i in range(num_terms)], matrix)


def make_queries(terms: list[str], num: int) -> list[list[str]]:
    """`num` queries with as many words as concepts have: about half of them have one, the others two to four. Frequent
    terms are more likely."""
    rng = np.random.default_rng(1)
    share = 1 / np.arange(1, len(terms) + 1) ** 0.8
    words = np.where(rng.random(num) < 0.53, 1, rng.integers(2, 5, num))
    return [[terms[i] for i in rng.choice(len(terms), w, p=share / share.sum())] for w in words]


def search(search_for_text: Callable, total: int, repetitions: int) -> None:
    index, lists = make_index(total, 50_000, 3_000_000), {}
    queries, postings = make_queries(index.terms, 4029), index.matrix.nnz
    their_memory = peak_memory(lambda: lists.update({term: index.postings(term).tolist() for term in index.terms}))
    results = {}

    def ours():
        results["ours"] = [len(index.search(known_terms(query, index.place))) for query in queries]

    def theirs():
        results["theirs"] = [search_for_text(None, lists, query, "")[0] for query in queries]

    name = f"search of 4,029 concepts, {postings / 1e6:.1f}M postings"
    seconds = race(name, ours, theirs, repetitions)[1]
    assert results["ours"] == results["theirs"]
    print_row(f"{name}: their loop in one process", seconds, "> 1", "counts equal")
    start = time.perf_counter()
    pickle.dumps(lists, protocol=pickle.HIGHEST_PROTOCOL)
    sent = time.perf_counter() - start  # their process pool sends the whole index with each concept
    script = [(mine, other + 4029 * sent) for mine, other in seconds]
    print_row(f"{name}: their script (index pickled for each concept; one timed)", script, ">= 50")
    if their_memory is not None:
        arrays = (index.matrix.data, index.matrix.indices, index.matrix.indptr)
        own = sum(array.nbytes for array in arrays) / postings
        print_row("memory of a posting", [(own, 2**20 * their_memory / postings)], ">= 3", unit="bytes")


def tagging(index_of: Callable, pipeline: str, captions: list[str], repetitions: int) -> None:
    """Inverted index of captions, ours against spaCy's whole pipeline and the authors' dictionary."""
    nlp = load_spacy(pipeline)
    results: dict[str, Any] = {}

    def theirs():
        results["theirs"] = index_of(list(nlp.pipe(captions, batch_size=5000, n_process=1)))

    def ours():
        results["ours"] = InvertedIndex.build(tag_captions(captions, pipeline))

    name = f"tagging {len(captions):,} captions, {pipeline}"
    seconds = race(name, ours, theirs, repetitions)[1]
    index, lists = results["ours"], results["theirs"]
    differ = [set(lists.get(t, ())) ^ set(index.postings(t).tolist()) for t in {*index.terms, *lists}]
    print_row(name, seconds, ">= 2", f"{len(set().union(*differ))} noun sets differ")


def counting(captions: list[str], pipeline: str, partitions: int = 16, size: int = 500) -> None:
    """Seconds for 1,000 captions with `--workers` equal to the number of cores; hours for LAION-400M as a note.

    There are `partitions` files of `size` captions for each worker. Only the second half of the files is timed: by then
    all workers have loaded the pipeline.
    """
    cores, total = run.cores(), COUNT_PRESETS["laion400m"][1].size
    with tempfile.TemporaryDirectory() as folder:
        for i in range(partitions * cores):
            start = i * size % len(captions)
            Path(folder, f"{i:05}.txt").write_text("\n".join(captions[start : start + size]), encoding="utf-8")
        cfg = CountConfig((folder,), spacy=pipeline, workers=cores)
        files = list_partitions(cfg.data, cfg.partition, Path(folder))
        jobs = [Job(partition, cfg, f"{folder}/{partition.name()}.npz") for partition in files]
        ended = [(time.perf_counter(), done.documents) for _, done in spread(index_partition, jobs, cfg)]
    (start, _), *timed = ended[len(ended) // 2 - 1 :]
    rate = sum(documents for _, documents in timed) / (timed[-1][0] - start)
    words = sum(len(caption.split()) for caption in captions) / len(captions)
    hours = total / rate / 3600
    note = f"--workers {cores}: {rate:,.0f} captions/s, {words:.1f} words each; at this rate LAION-400M's "
    note += f"{total / 1e6:.0f}M captions take {hours:,.1f} hours, {hours * cores:,.0f} core-hours"
    print_row(f"`count`, a worker per core: 1,000 captions, {pipeline}", [(1000 / rate, None)], note=note)


def clip_step(name: str, captions: list[str], precision: str, repetitions: int) -> None:
    """The experiment's step on the corpus's captions, without computing padding, against open_clip's."""
    ours, theirs = train.create_model(name), open_clip.create_model(name)
    theirs.load_state_dict(ours.state_dict())
    tokens = open_clip.get_tokenizer(name)(captions)
    side = theirs.visual.image_size
    images = torch.randn(len(tokens), 3, *(side if isinstance(side, tuple) else (side, side)))
    plain = open_clip.ClipLoss()

    def step(model: torch.nn.Module, loss: Callable) -> Callable:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def one() -> None:
            with run.autocast(precision, images.device):
                image_features, text_features, scale, *_ = model(images, tokens)
            optimizer.zero_grad()
            loss(image_features, text_features, scale).backward()
            optimizer.step()

        return one

    words = (tokens != 0).sum(1).float()
    note = f"captions of {int(words.min())} to {int(words.max())} tokens, context {tokens.shape[1]}"
    title = f"CLIP step, {name}, batch {len(tokens)}, {precision}: open_clip"
    sides = step(ours, clip_loss), step(theirs, plain)
    step_row(title, len(tokens), precision, *sides, repetitions, target=">= 1", note=note)


def plain_index(docs: list) -> dict[str, list[int]]:
    """{noun: numbers of the documents with it}, like the authors' dictionary."""
    found: dict[str, list[int]] = {}
    for i, doc in enumerate(docs):
        for noun in noun_set((token.lemma_, token.pos_) for token in doc):
            found.setdefault(noun, []).append(i)
    return found


def plain_search(_, lists: dict[str, list[int]], query: list[str], name: str) -> tuple[int, str]:
    """(number of documents with all terms of a query, name), like the authors' search."""
    sets = [set(lists[term]) for term in query if term in lists]
    return len(set.intersection(*sets)) if sets else 0, name


def upstream_functions(root: Path) -> SimpleNamespace:
    names = [
        "dask", "dask.dataframe", "dask.diagnostics", "datasets", "downstream_dataloader", "pandas", "spacy",
    ]  # fmt: skip
    stubs = {name: ModuleType(name) for name in names}
    stubs["dask.diagnostics"].ProgressBar = stubs["downstream_dataloader"].DataLoader = None
    stubs["spacy"].load = lambda name: None
    words, index = "text_search_inverted_index_get_word_dictionaries", "text_search_matches_inverted_index"
    found = import_beside(root / "src", [words, index], stubs)
    return SimpleNamespace(search=found[index].search_for_text, index=found[words].create_unigram_dictionary_spacy)


def to_the_floor(seeds: int) -> None:
    """Seconds on one core until the arm with equal frequencies is above the nearest neighbour on raw pixels."""
    baseline_rows(
        study.STUDY, "uniform", PRESETS, train.main, seeds,
        "400 names of equal frequency, unseen style, ConvNet-emoji from scratch",
        {"the pixel floor": "nearest neighbour on raw pixels"}, "mean_per_class", eval_every=1,
    )  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    up = upstream_functions(options.upstream) if options.upstream else None
    search_for_text, index_of = (up.search, up.index) if up else (plain_search, plain_index)
    search(search_for_text, options.postings, options.repetitions)

    shards = data.Shards(data.expand_shards("data/emoji/train"), options.captions)
    captions = [f"{shards.caption(i)} number {i}" for i in range(len(shards))]  # no two are equal
    tagging(index_of, options.spacy, captions, options.repetitions)
    if one_thread():  # processes have one thread each
        counting(captions, options.spacy)
    precision = run.resolve_precision("auto", torch.device("cpu"))
    for name, size in (("ConvNet-emoji", 256), ("ViT-emoji", 128), ("ViT-B-32", 16)):
        clip_step(name, [shards.caption(i % len(shards)) for i in range(size)], precision, options.repetitions)


def main() -> None:
    part = "src/text_search_matches_inverted_index.py"
    parser = arguments(__doc__, 2, ("bethgelab/frequency_determines_performance", "11ef009", part))
    parser.add_argument("--postings", type=int, default=10_000_000)
    parser.add_argument("--captions", type=int, default=3_000, help="of the embedded corpus")
    parser.add_argument("--spacy", default="en_core_web_sm")
    bench(measure, parser.parse_args(), to_the_floor=to_the_floor)


if __name__ == "__main__":
    main()
