"""Concept frequency's parts, ours and those of bethgelab/frequency_determines_performance@11ef009, on the CPU.

Most of their code is scripts and notebooks: the statements that are compared are run with stand-ins for files. What is
derived from their published files is compared in tests/test_concept_frequency_published_replay.py.
"""

import ast
import contextlib
import functools
import itertools
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pytest import MonkeyPatch
from scipy import sparse, stats
from torch import Tensor, nn

from concept_frequency import concepts, count, evaluate, let_it_wag, model, statistics
from concept_frequency.captions import Partition
from concept_frequency.config import CountConfig
from shared.zeroshot import build_classifier
from tests.adapters import Case, Part, prefixed, seeded
from tests.parity import import_beside, unit

CLONE = "bethgelab/frequency_determines_performance", "11ef009", "src/zero_shot_eval.py"
quiet = {"print": lambda *_: None, "tqdm": lambda x, **_: x, "open": lambda path, *_: contextlib.nullcontext(path)}

# ----------------------------------------------------------------------------------------------------- their modules


def module(name: str, **values) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(values)
    return made


@functools.cache
def load(path: Path) -> SimpleNamespace:
    """Their modules, with stand-ins for imports that the functions do not need."""
    root = Path(path).resolve()
    stubs = {
        "spacy": module("spacy", load=lambda name: None), "dask": module("dask"),
        "dask.dataframe": module("dask.dataframe"), "dask.diagnostics": module("dask.diagnostics", ProgressBar=None),
        "datasets": module("datasets", load_dataset=None),
        "downstream_dataloader": module("downstream_dataloader", DataLoader=None),
    }  # fmt: skip
    names = {
        "words": "text_search_inverted_index_get_word_dictionaries", "search": "text_search_matches_inverted_index",
        "extract": "downstream_retrieval_extract_concepts", "images": "image_search_matches_inverted_index",
        "zero_shot": "zero_shot_eval",
    }  # fmt: skip
    found = import_beside(root / "src", [*names.values(), "zero_shot_templates"], stubs)
    up = SimpleNamespace(**{short: found[name] for short, name in names.items()}, root=root)
    up.prompts = import_beside(root / "src/text_to_image_experiments", ["utils"], {})["utils"]
    return up


@contextlib.contextmanager
def authors(path: Path) -> Iterator[SimpleNamespace]:
    with (
        mock.patch.object(Tensor, "cuda", lambda self, *_, **__: self),
        mock.patch.object(torch.cuda.amp, "autocast", contextlib.nullcontext),
    ):
        yield load(path)


def statements(path: Path, first: str, last: str, **names) -> dict:
    """Run the statements of a block of a file, from the one that starts with `first` to the one that starts with
    `last` -> the variables. What it assigns to a variable of `names` is left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for block in (getattr(node, field, None) for field in ("body", "orelse")):
            sources = [ast.unparse(each) for each in block] if isinstance(block, list) else []
            begins = [i for i, source in enumerate(sources) if source.startswith(first)]
            ends = [i for i, source in enumerate(sources) if source.startswith(last)]
            if not begins or not ends or ends[-1] < begins[0]:
                continue
            end = next(i for i in ends if i >= begins[0])
            scope = quiet | names
            for each, source in zip(block[begins[0] : end + 1], sources[begins[0] :], strict=False):
                if source.partition(" = ")[0] not in names:
                    exec(compile(ast.Module([each], []), str(path), "exec"), scope)
            return scope
    raise LookupError(f"{path} has no {first} ... {last}")


def function_of(path: Path, name: str, **values):
    """A function or method of a file or notebook; `values` are its globals. `.cuda()` is left out."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = ("".join(cell["source"]) for cell in json.loads(source)["cells"] if cell["cell_type"] == "code")
        source = next(cell for cell in cells if f"def {name}(" in cell)
    nodes = ast.walk(ast.parse(source))
    found = next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)
    scope = quiet | values
    exec(compile(ast.unparse(found).replace(".cuda()", ""), path.name, "exec"), scope)
    return scope[name]


def documents(docs: list) -> list[list[SimpleNamespace]]:
    """(lemma, part of speech) pairs as spaCy's tokens."""
    return [[SimpleNamespace(lemma_=lemma, pos_=pos) for lemma, pos in doc] for doc in docs]


# -------------------------------------------------------------------------------------------------- search in captions

WORDS = [
    "dog",
    "cat",
    "eagle",
    "Eagle",
    "bald",
    "tree",
    "frog",
    "shirt",
    "t-shirt",
    "2nd",
    "\u00fc",
    "car's",
    "ice cream",
]


def random_docs(n: int, words: list[str] = WORDS) -> list:
    """Captions as (lemma, part of speech) pairs; early words are frequent."""
    share = 1 / np.arange(1, len(words) + 1)
    draw = lambda: words[np.random.choice(len(words), p=share / share.sum())]  # noqa: E731
    speech = "NOUN", "PROPN", "VERB"
    return [[[draw(), random.choice(speech)] for _ in range(np.random.randint(0, 9))] for _ in range(n)]


def counts_of(parts: list[list[set[str]]], queries: list[list[str]]) -> list[int]:
    """Counts from indexes of partitions, with `index_partition` and `sum_partitions`; nothing is tagged."""
    texts, cfg = [], CountConfig(workers=1)
    with tempfile.TemporaryDirectory() as folder, MonkeyPatch.context() as patch:
        patch.setattr(count, "read_captions", lambda *_: ())
        for i, nouns in enumerate(parts):
            patch.setattr(count, "tag_captions", lambda *_, nouns=nouns: nouns)
            texts.append(count.index_partition(count.Job(Partition("", ".txt", "", 0), cfg, f"{folder}/{i}.npz")))
        return count.sum_partitions(cfg, queries, texts, []).text.tolist()


class Inline:
    """A pool of processes that works in this process and notes the terms of each search."""

    def __init__(self, searched: list):
        self.searched = searched

    def __call__(self):
        return contextlib.nullcontext(self)

    def submit(self, function, *arguments):
        self.searched.append(arguments[2])
        return SimpleNamespace(result=lambda: function(*arguments))


class TextSearch(Part):
    files = {"text_search": {}}
    functions = "concept_frequency.model.noun_set concept_frequency.model.InvertedIndex"
    functions += " concept_frequency.model.query_terms concept_frequency.model.known_terms"
    functions += " concept_frequency.model.InvertedIndex.search concept_frequency.count.sum_partitions"
    authors = "src/text_search_inverted_index_get_word_dictionaries.py:93, src/text_search_matches_inverted_index.py:17"
    # captions, *_model, spacy_version: what the tokens were made from. shard*: their search in shards of keys, whose
    # counts are too low where a lemma is in another shard than its word; ours has no shards of keys
    unused = ("captions", "*_model", "spacy_version", "shard*")
    json = True

    def inputs(self):
        docs = random_docs(90)
        names = ["dog", "Bald Eagle", "bald_eagle", "tree frog", "tree_frog", "T-shirt", "dogs", "unicorn dog", "zebra"]
        tokens = [[[lemma, lemma, pos] for lemma, pos in doc] for doc in docs]
        found = {"captions": [" ".join(lemma for lemma, _ in doc) for doc in docs], "tokens": tokens, "concepts": names}
        made_with = dict.fromkeys(("spacy_version", "index_model", "query_model"), "none: last part, without its s")
        return found | {"chunk_sizes": [30, 30, 30]} | made_with

    def split(self, case, docs):
        ends = [0, *itertools.accumulate(case["chunk_sizes"])]
        return [docs[a:b] for a, b in itertools.pairwise(ends)]

    def ours(self, case):
        docs = [[(lemma, pos) for _, lemma, pos in tokens] for tokens in case["tokens"]]
        nouns = [model.noun_set(doc) for doc in docs]
        index = model.InvertedIndex.build(nouns)
        postings = {term: index.postings(term).tolist() for term in index.terms}
        found, chunks = {"nouns": [sorted(of) for of in nouns], "index": postings}, self.split(case, nouns)
        for name, parts in (("single_chunk", [nouns]), ("three_chunks", chunks)):  # what their lists are too long by
            terms = [set(model.InvertedIndex.build(part).terms) for part in parts]
            lengths = {term: len(rows) + sum(term in of for of in terms) for term, rows in postings.items()}
            found[f"raw_posting_length_{name}"] = lengths
        return found | {"queries": {method: self.searched(case, index, nouns, method) for method in case["queries"]}}

    def searched(self, case, index, nouns, method):
        known = case["queries"][method].values()  # the lemmas of their pipeline
        lemma = {u: t for query in known for u, t in zip(query["unigrams"], query["terms"], strict=True)}
        lemmas_of, found = None if method == "lowercased" else lambda word: [lemma[word]], {}
        for name in case["concepts"]:
            terms = model.query_terms(name, lemmas_of)
            of_corpus = model.known_terms(terms, index.place)
            hits = index.search(of_corpus).tolist()
            found[name] = {"unigrams": model.query_terms(name, None), "terms": terms, "known_terms": of_corpus}
            found[name] |= {"hits": hits}
        queries = [query["terms"] for query in found.values()]
        counts = counts_of([nouns], queries)
        assert counts == counts_of(self.split(case, nouns), queries)
        return {name: query | {"count": n} for (name, query), n in zip(found.items(), counts, strict=True)}

    def theirs(self, up, case):
        docs = documents([[(lemma, pos) for _, lemma, pos in tokens] for tokens in case["tokens"]])
        index = up.words.create_unigram_dictionary_spacy(docs)
        found = {"nouns": [sorted(up.words.create_unigram_dictionary_spacy([doc])) for doc in docs]}
        found["index"] = {term: sorted(set(rows)) for term, rows in index.items()}
        files = {}
        for i, part in enumerate(self.split(case, docs)):
            files[f"_{i}_unigram_dict"] = up.words.create_unigram_dictionary_spacy(part)
            files[f"_{i}_links"] = [""] * len(part)
        args = SimpleNamespace(dataset="CC", save_filepath="", total_chunks=len(case["chunk_sizes"]))
        start = dict(args=args, load_file=lambda filename: files[filename], combined_links=[], offset=0)
        script, loop = up.root / "src/text_search_inverted_index_combine_dictionaries.py", "for idx in"
        chunked = statements(script, loop, loop, combined_unigram_dictionary={}, **start)["combined_unigram_dictionary"]
        assert {term: sorted(set(rows)) for term, rows in chunked.items()} == found["index"]
        for name, lists in (("single_chunk", index), ("three_chunks", chunked)):
            found[f"raw_posting_length_{name}"] = {term: len(rows) for term, rows in lists.items()}
        shards = {term: len(term) % 4 for term in index}
        found |= {"queries": {}, "shard_of_key": shards, "sharded_counts": {}}
        for method in ("lemmatized", "lowercased"):
            terms, counts = self.full_search(up, case, method, index)
            queries = found["queries"][method] = {}
            for name, of_name in zip(case["concepts"], terms, strict=True):
                hits = sorted(up.search.search_for_text(None, index, of_name, name, True)[0])
                known = [term for term in of_name if term in index]
                queries[name] = {"unigrams": re.split(r"[_\s]+", name.lower()), "terms": of_name, "known_terms": known}
                queries[name] |= {"hits": hits, "count": counts[name]}
            found["sharded_counts"][method] = self.sharded_search(up, case, method, index, shards)
        return found

    def full_search(self, up, case, method, index):
        """Their search in a whole index -> (terms of each concept, counts)."""
        searched, _, counts = self.searching(
            up, case, method, lambda path: "concept" in path and case["concepts"] or index
        )
        up.search.search_in_full_index(self.flags(method, "coco"))
        self.patch.stop()
        return searched, counts

    def sharded_search(self, up, case, method, index, shards):
        def load(path):
            number = re.search(r"dict_(\d)", path)
            return shards if number is None else {t: rows for t, rows in index.items() if shards[t] == int(number[1])}

        _, dumped, _ = self.searching(up, case, method, load)
        up.search.search_in_chunked_shards(self.flags(method, "t2i"))
        self.patch.stop()
        return dumped[0]

    def flags(self, method, dataset):
        flags = dict(search_method=method, downstream_dataset=dataset, pt_dataset="cc3m", max_num_procs=4)
        return SimpleNamespace(**flags, features_dir="", results_dir="")

    def searching(self, up, case, method, load):
        """Give their module files, a pipeline and a pool -> (terms, what it dumps, the last dump of counts)."""
        terms, dumped, counts = [], [], {}
        classwise = {"huggingface_openjourney-v1-0": {"classwise": dict.fromkeys(case["concepts"])}}

        def dump(value, *_, **__):
            dumped.append(value)
            counts.update(value)

        def nlp(word):
            return [SimpleNamespace(lemma_=part.rstrip("s")) for part in word.split("-")]

        files = SimpleNamespace(load=lambda path: load(path.enter_result))
        stand_ins = quiet | {"nlp": nlp, "ProcessPoolExecutor": Inline(terms), "pickle": files}
        stand_ins |= {"json": SimpleNamespace(load=lambda _: classwise, dump=dump)}
        stand_ins |= {"os": SimpleNamespace(path=os.path, makedirs=lambda *_, **__: None)}
        self.patch = mock.patch.multiple(up.search, create=True, **stand_ins)
        self.patch.start()
        return terms, dumped, counts


class PartitionedCounting(Part):
    files = {"partitioned_counting": {}}
    functions = "concept_frequency.count.sum_partitions concept_frequency.count.count_partition"
    authors = "src/text_search_matches_inverted_index.py:17"

    def inputs(self):
        found = {}
        for name, n, most in (("doc", 400, 6), ("query", 40, 4)):
            sizes = np.random.randint(1, most, n)
            found[f"{name}_terms"] = torch.from_numpy(np.minimum(np.random.zipf(1.5, sizes.sum()), 59))
            found[f"{name}_offsets"] = torch.from_numpy(np.cumsum([0, *sizes]))
        return found | {"partition": torch.randint(0, 5, (400,)), "vocabulary_size": torch.tensor([60])}

    def run(self, function, case):
        """function(list of parts of documents, queries) -> counts."""

        def ragged(name):
            ends = case[f"{name}_offsets"].tolist()
            return [list(map(str, case[f"{name}_terms"][a:b].tolist())) for a, b in itertools.pairwise(ends)]

        docs, queries, shards = [set(doc) for doc in ragged("doc")], ragged("query"), case["partition"].tolist()
        assert max(map(int, set.union(*docs))) < case["vocabulary_size"]
        parts = [[d for d, s in zip(docs, shards, strict=True) if s == i] for i in sorted(set(shards))]
        counts = function([docs], queries)
        if function is counts_of:
            assert counts == counts_of(parts, queries)
        local = np.sum([function([part], queries) for part in parts], axis=0)
        return {"counts": counts, "counts_with_partition_local_vocabulary": local}

    our = staticmethod(counts_of)

    def their(self, up):
        def function(parts, queries):
            index = {}
            for row, doc in enumerate(parts[0]):
                for term in doc:
                    index.setdefault(term, []).append(row)
            return [up.search.search_for_text(None, index, query, "")[0] for query in queries]

        return function


class CaseVariants(Part):
    """Lower-case and Capitalised words of a name in all combinations: nothing of ours searches them."""

    files = {"case_variants": {}}
    authors = "src/image_search_matches_inverted_index.py:10"
    unused = ("*",)
    json = True

    def inputs(self):
        return {}

    def ours(self, case):
        return {}

    def theirs(self, up, case):
        return {name: up.images.generate_combinations(name) for name in ("dog", "bald eagle", "black footed albatross")}


class PromptConcepts(Part):
    """Prompts with a word or, by a prefix rule, its plural; their scores. Nothing of ours reads prompts."""

    files = {"t2i_concepts": {}}
    authors = "src/text_to_image_experiments/utils.py:29, 71"
    unused = ("*",)
    json = True

    def inputs(self):
        prompts = ["a cat on a mat", "two cats.", "concatenate", "a dog's bowl", "the dog-house", 'a "bird"', "cars"]
        prompts.append("cup")
        scores = [[float(i), float(i * i)] for i in range(7)]  # the last prompt has none
        return {"prompts": prompts, "words": ["cat", "dog", "bird", "car", "cup", "zzz"], "scores": scores}

    def ours(self, case):
        return {}

    def theirs(self, up, case):
        found = up.prompts.find_word_indices(case["prompts"], case["words"])
        scores = up.prompts.calculate_aggregated_scores(found, [[None, *row] for row in case["scores"]])
        return {"indices": found, "aggregated": {word: rows and rows[0] for word, rows in scores.items()}}


# ---------------------------------------------------------------------------------------------------- search in images

NAMES = ["dog", "cat", "tree frog", "bald_eagle", "T-shirt", "car", "house", "rose", "iPod", "hot dog", "man", "saw"]


class ImageSearch(Part):
    files = {"image_search": {}}
    functions = "concept_frequency.model.tag_presence concept_frequency.model.matched_counts"
    functions += " concept_frequency.model.controlled_counts concept_frequency.statistics.misaligned"
    functions += " concept_frequency.statistics.misalignment_degrees"
    authors = "src/image_search_inverted_index_creation.py:9, src/misalignment_degree_quantification.py:152"
    tolerances = {"misalign_*": (1e-7, 1e-7)}

    def inputs(self):
        n, k = 120, len(NAMES)
        probabilities = torch.rand(n, k).half().float()
        probabilities[:5, 0] = torch.tensor([0.5, 0.55, 0.6, 0.65, 0.7]).half().float()  # on the thresholds
        found = {"probs_half_as_float32": probabilities, "thresholds": torch.tensor([0.5, 0.55, 0.6, 0.65, 0.7])}
        found |= {"shard_bounds": torch.tensor([0, 50, 51, n]), "text_hits": (torch.rand(n, k) < 0.2).long()}
        kept = torch.randperm(n)[: n // 2].sort().values
        single = torch.tensor([int(not re.search("[ _-]", name)) for name in NAMES])
        return found | {"control_keep_ids": kept, "single_word": single, "dataset_size": torch.tensor([n])}

    def ours(self, case):
        probabilities, thresholds = case["probs_half_as_float32"], case["thresholds"].tolist()
        present = np.stack([model.tag_presence(probabilities.half(), threshold) for threshold in thresholds])
        assert np.array_equal(present[-1], model.tag_presence(probabilities, thresholds[-1]))
        shards = [model.tag_presence(probabilities[a:b], 0.7) for a, b in itertools.pairwise(case["shard_bounds"])]
        used = (case["thresholds"] - 0.7).abs().argmin()  # the paper's
        assert np.array_equal(np.concatenate(shards), present[used])
        image, text = sparse.csr_array(present[used]), sparse.csr_array(case["text_hits"].numpy() != 0)
        found = {"present": present, "counts": present.sum(axis=1)}
        found["integrated_counts"] = model.matched_counts(text, image)
        kept = case["control_keep_ids"], probabilities.shape[1]
        found["control_counts"] = model.controlled_counts(*np.nonzero(present[used]), *kept)
        single = case["single_word"].numpy() != 0
        for name, of in (("search", text), ("unigram", text.multiply(single[None]).tocsr())):
            number = statistics.misaligned(of, image)
            with_any = [int((side.sum(axis=1) > 0).sum()) for side in (of, image)]
            degrees = statistics.misalignment_degrees(number, *with_any, case["dataset_size"].item())
            found |= {f"misalign_{name}_count": [number], f"misalign_{name}": [number, *degrees]}
        return found

    def theirs(self, up, case):
        probabilities, thresholds = case["probs_half_as_float32"].half().numpy(), case["thresholds"].tolist()
        (n, k), src = probabilities.shape, up.root / "src"
        names = [f"concept {i}" for i in range(k)]
        dumps = [
            {"filenames": [f"{i}.jpg" for i in range(a, b)], "probs": probabilities[a:b]}
            for a, b in itertools.pairwise(case["shard_bounds"].tolist())
        ]
        args = SimpleNamespace(thresholds=thresholds, pt_dataset="cc3m", start_index_id=0, end_index_id=99)
        args.features_dir = args.results_dir = ""
        files = dict(np=np, os=os, args=args, open=lambda path, *_: path)
        files["pickle"] = SimpleNamespace(load=lambda x: x, dump=lambda *_: None)
        start = files | dict(output_pickles=dumps, tag_list=np.array(names), torch=torch)
        script, loop = src / "image_search_inverted_index_creation.py", "for index, pickle_file in"
        index = statements(script, "image_search_index = ", loop, **start)["image_search_index"]
        present = np.zeros((len(thresholds), n, k), dtype=np.int64)
        for t, threshold in enumerate(thresholds):
            for column, name in enumerate(names):
                present[t, [int(file.split(".")[0]) for file in index[threshold][name]], column] = 1
        found, used = {"present": present, "counts": present.sum(axis=1)}, (case["thresholds"] - 0.7).abs().argmin()
        image = index[thresholds[used]]
        text = {name: case["text_hits"][:, column].nonzero().flatten().tolist() for column, name in enumerate(names)}
        rows = {name: [int(file.split(".")[0]) for file in image[name]] for name in names}
        script, start = src / "integrated_search_matches_inverted_index.py", dict(downstream_classes=names)
        scope = statements(
            script, "for k in image_result_dict", "for d in", image_result_dict=rows, text_result_dict=text, **start
        )
        found["integrated_counts"] = list(scope["integrated_result_dict"].values())
        matches = SimpleNamespace(load=lambda _: case["control_keep_ids"].numpy(), isin=np.isin)
        start |= files | dict(np=matches, image_index_paths=[image], result_dict={})
        script = src / "image_search_matches_inverted_index.py"
        scope = statements(script, "matching_indices = ", "for i in final_res_dict", **start)
        found["control_counts"] = list(scope["result_dict"].values())
        single = {name: text[name] for name, one in zip(names, case["single_word"].tolist(), strict=True) if one}
        for name, of in (("search", text), ("unigram", single)):
            degrees = self.misalignment(src, files, names, of, image, case["dataset_size"].item())
            found |= {f"misalign_{name}_count": degrees[:1], f"misalign_{name}": degrees}
        return found

    def misalignment(self, src, files, names, text, image, size):
        script, dumped = src / "misalignment_degree_quantification.py", []
        files = files | {"json": SimpleNamespace(dump=lambda value, *_, **__: dumped.extend(value.values()))}
        sides = {}
        for side, index in (("text", text), ("image", [image])):
            name = f"save_{side}_sample2concepts_index"
            made = function_of(script, name, **files)("cc3m", index, names)
            sides[f"sample2concept_{side}_index"] = made
        files |= {"open": quiet["open"], "DATASET_SIZES": {"cc3m": size}}
        statements(script, "intersecting_samples = ", "with open(results_path", **files, **sides)
        return dumped


class ImageSearchConcepts(Part):
    files = {"image_search_concepts": {}}
    functions = ""
    json = True

    def inputs(self):
        return {"concepts": NAMES}

    def ours(self, case):
        """Names of one word, as the arrays beside them have them."""
        words = [int(not re.search("[ _-]", name)) for name in case["concepts"]]
        assert words == beside(case, ImageSearch())["single_word"].tolist()
        return {}

    def theirs(self, up, case):
        return {}


def beside(case: Case, part: Part) -> Case:
    """The arrays of NAME.npz beside NAME_concepts.json; those of `part`, if there is no file."""
    path = case.path.with_name(case.path.name.replace("_concepts.json", ".npz"))
    return Case(path) if path.is_file() else part.case(path.stem, seeded(part.inputs))


class CrossAttention(nn.Module):
    """The case's replacement of the cross-attention: q + softmax(q k^T / 8) k."""

    def __init__(self, kv: nn.Module):
        super().__init__()
        self.kv = kv

    def forward(self, q: Tensor, tokens: Tensor) -> Tensor:
        k = self.kv(tokens)
        return q + (q @ k.transpose(1, 2) / 8).softmax(dim=-1) @ k


class TagHead(Part):
    files = {"ram_openset_head": {}}
    functions = "concept_frequency.model.OpenSetHead concept_frequency.model.description_weights"
    only = {"concept_frequency.model.OpenSetHead": "with a stand-in for the cross-attention"}
    authors = "ram_model/ram/models/ram_plus.py:330"
    tolerances = {"tagged": (0, 0), "*": (1e-5, 1e-5)}

    def inputs(self):
        descriptions, log_scale = unit(6, 5, 512), torch.tensor(math.log(1 / 0.07))
        made = {"image_proj": nn.Linear(24, 512), "wordvec_proj": nn.Linear(512, 64), "kv": nn.Linear(512, 64)}
        made["fc"] = nn.Linear(64, 1)
        made["fc"].weight.data *= 20  # spreads the probabilities
        state = {f"{name}.{key}": x for name, linear in made.items() for key, x in linear.state_dict().items()}
        state |= {"label_embed": descriptions.flatten(0, 1), "reweight_scale": log_scale}
        found = {
            "image_tokens": torch.randn(3, 7, 24),
            "label_embeddings": descriptions,
            "threshold": torch.tensor([0.165]),
        }
        return found | prefixed("param/", state)

    def ours(self, case):
        state = case.group("param/")
        descriptions, tokens = case["label_embeddings"], case["image_tokens"]
        assert state.pop("label_embed").view_as(descriptions).equal(descriptions)
        state = {key.replace("kv.", "tagging_head.kv."): value for key, value in state.items()}
        (dim, token_dim), (width, _) = state["image_proj.weight"].shape, state["wordvec_proj.weight"].shape
        head = model.OpenSetHead(CrossAttention(nn.Linear(dim, width)), token_dim, width, dim)
        head.load_state_dict(state)
        with torch.no_grad():
            weights = model.description_weights(head.image_proj(tokens)[:, 0], descriptions, head.reweight_scale)
            probabilities = head(tokens, descriptions)
        found = {"description_weights": weights, "probabilities": probabilities}
        found["label_embeddings_reweighted"] = torch.einsum("bkm,kmd->bkd", weights, descriptions)
        clear = (probabilities - case["threshold"]).abs() > 1e-3  # theirs compares in single precision, ours in half
        assert clear.float().mean() > 0.7
        tagged = torch.from_numpy(model.tag_presence(probabilities, case["threshold"].item())).long()
        return found | {"tagged": torch.where(clear, tagged, case["tagged"].long())}

    def theirs(self, up, case):
        state, kept = case.group("param/"), {}

        def linear(name):
            made = nn.Linear(*state[f"{name}.weight"].shape[::-1])
            made.load_state_dict({key: state[f"{name}.{key}"] for key in ("weight", "bias")})
            return made

        def softmax(x, dim):
            return kept.setdefault("description_weights", x.softmax(dim))

        project, attend = linear("wordvec_proj"), CrossAttention(linear("kv"))

        def wordvec_proj(x):
            return project(kept.setdefault("label_embeddings_reweighted", x))

        def tagging_head(encoder_embeds, encoder_hidden_states, **_):
            return [attend(encoder_embeds, encoder_hidden_states)]

        k = len(case["label_embeddings"])
        head = SimpleNamespace(
            visual_encoder=lambda tokens: tokens, image_proj=linear("image_proj"), wordvec_proj=wordvec_proj,
            tagging_head=tagging_head, fc=linear("fc"), label_embed=state["label_embed"], num_class=k,
            reweight_scale=state["reweight_scale"], class_threshold=case["threshold"], delete_tag_index=[],
            tag_list=np.array([str(i) for i in range(k)]),
        )  # fmt: skip
        path = up.root / "ram_model/ram/models/ram_plus.py"
        function = function_of(path, "generate_tag_openset", np=np, torch=torch, F=SimpleNamespace(softmax=softmax))
        with torch.no_grad():
            tags, probabilities = function(head, case["image_tokens"])
        tagged = [[int(str(i) in of_image.split(" | ")) for i in range(k)] for of_image in tags]
        return kept | {"probabilities": probabilities, "tagged": torch.tensor(tagged)}


class Descriptions(Part):
    files = {"description_embeddings": {}}
    functions = "concept_frequency.model.label_embedding"
    authors = "ram_model/ram/utils/openset_utils.py:336"
    atol = 1e-6

    def inputs(self):
        return {"description_embeddings": torch.randn(5, 51, 16)}

    def ours(self, case):
        return {"label_embedding": model.label_embedding(case["description_embeddings"])}

    def theirs(self, up, case):
        described = case["description_embeddings"]
        clip = SimpleNamespace(load=lambda _: (SimpleNamespace(encode_text=torch.clone), None))
        clip.tokenize = lambda rows, truncate: described[rows]
        path = up.root / "ram_model/ram/utils/openset_utils.py"
        function = function_of(path, "build_openset_llm_label_embedding", clip=clip, torch=torch)
        return {"label_embedding": function([{str(row): row} for row in range(len(described))])[0]}


class RamPlus(Part):
    """RAM++'s Swin and the cross-attention of its head; the authors' weights are given to ours."""

    more = {"ram_plus": {}}
    functions = "concept_frequency.model.RAMPlus"
    only = {functions: "its Swin and the cross-attention of its head"}
    authors = "ram_model/ram/models/swin_transformer.py, ram_model/ram/models/bert.py"
    rtol, atol = 1e-5, 1e-4

    def inputs(self):
        return {
            "images": torch.randn(1, 3, 224, 224),
            "queries": torch.randn(2, 5, 768),
            "tokens": torch.randn(2, 50, 512),
        }

    def ours(self, case):
        network = model.RAMPlus("swin_tiny_patch4_window7_224", 224).eval()
        rest = {k: v for k, v in network.head.state_dict().items() if not k.startswith("tagging_head")}
        network.load_checkpoint(self.weights | rest)
        with torch.no_grad():
            found = network.visual_encoder.forward_features(case["images"]).flatten(1, 2)
            found = torch.cat([found.mean(dim=1, keepdim=True), found], dim=1)
            return {"image": found, "head": network.head.tagging_head(case["queries"], case["tokens"])}

    def theirs(self, up, case):
        swin, bert = self.modules(up.root)
        sizes = dict(img_size=224, patch_size=4, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])
        network = swin.SwinTransformer(**sizes, window_size=7).eval()
        config = SimpleNamespace(
            hidden_size=768, num_attention_heads=4, encoder_width=512, attention_probs_dropout_prob=0.0,
            layer_norm_eps=1e-12, hidden_dropout_prob=0.0, intermediate_size=3072, hidden_act="gelu",
            chunk_size_feed_forward=0, add_cross_attention=True, num_hidden_layers=2,
        )  # fmt: skip
        encoder = bert.BertEncoder(config).eval()
        for layer in encoder.layer:
            del layer.attention
        self.weights = prefixed("visual_encoder.", network.state_dict())
        self.weights |= prefixed("tagging_head.encoder.", encoder.state_dict())
        inputs = dict(encoder_hidden_states=case["tokens"], encoder_attention_mask=torch.zeros(2, 1, 1, 50))
        with torch.no_grad():
            head = encoder(case["queries"], **inputs, mode="tagging", return_dict=False)[0]
            return {"image": network(case["images"]), "head": head}

    def modules(self, root):
        """With stand-ins for functions that newer transformers lack."""
        names = "PreTrainedModel", "find_pruneable_heads_and_indices", "prune_linear_layer"
        old = module("transformers.modeling_utils", **dict.fromkeys(names, nn.Module))
        old.apply_chunking_to_forward = lambda forward, size, dim, *inputs: forward(*inputs)
        outputs, docs = module("transformers.modeling_outputs"), module("transformers.file_utils")
        outputs.__getattr__ = lambda name: object
        docs.__getattr__ = lambda name: lambda *a, **k: lambda f: f
        log = SimpleNamespace(get_logger=lambda name: SimpleNamespace(warn=print))
        stubs = {name: module(name, __path__=[]) for name in ("transformers", "transformers.models")}
        stubs |= {
            "transformers.activations": module("transformers.activations", ACT2FN={"gelu": F.gelu}),
            "transformers.modeling_utils": old, "transformers.modeling_outputs": outputs,
            "transformers.file_utils": docs, "transformers.utils": module("transformers.utils", logging=log),
            "transformers.models.bert": module("transformers.models.bert", __path__=[]),
            "transformers.models.bert.configuration_bert": module("c", BertConfig=SimpleNamespace),
        }  # fmt: skip
        return import_beside(root / "ram_model/ram/models", ["swin_transformer", "bert"], stubs).values()


# -------------------------------------------------------------------------------------------------- scores of concepts


class ZeroShot(Part):
    files = {"zero_shot": {}}
    functions = "concept_frequency.evaluate.per_class_accuracy"
    authors = "src/zero_shot_eval.py:90, 113, 237"
    tolerances = {"logits": (0, 1e-4), "predictions": (0, 0), "*": (0, 1e-5)}

    def inputs(self):
        labels = torch.randint(0, 6, (90,))  # the last class has no samples
        prompts = torch.randn(7, 8, 16) + torch.randn(7, 1, 16)
        images = prompts.mean(1)[labels] + 1.5 * torch.randn(90, 16)
        return {"prompt_embeddings": prompts, "image_features_raw": images, "labels": labels}

    def ours(self, case):
        """Predictions are those of the file's logits: rounding decides between equal classes."""
        prompts = case["prompt_embeddings"]  # (C, T, D); class c in template t
        names, templates = [str(c) for c in range(len(prompts))], [f"{{c}} {t}" for t in range(prompts.shape[1])]
        encoding = self.encode(prompts), self.tokens, names, templates, 256, torch.device("cpu"), torch.float32
        classifier, features = build_classifier(*encoding), F.normalize(case["image_features_raw"], dim=-1)
        percent, per_class = evaluate.per_class_accuracy(case["logits"], case["labels"])
        found = {"classifier": classifier, "image_features": features, "logits": 100 * features @ classifier}
        found |= {"predictions": case["logits"].argmax(dim=1), "accuracy_percent": [percent]}
        return found | {"per_class_accuracy_percent": per_class}

    def tokens(self, texts: list[str]) -> Tensor:
        return torch.tensor([[int(number) for number in text.split()] for text in texts])

    def encode(self, prompts: Tensor):
        return lambda rows: prompts[rows[:, 0], rows[:, 1]]

    def theirs(self, up, case):
        prompts = case["prompt_embeddings"]
        names, templates = [str(c) for c in range(len(prompts))], [f"{{c}} {t}" for t in range(prompts.shape[1])]
        args = SimpleNamespace(dataset="table", text_prompts="ensemble", backbone="", pretraining="")
        network = SimpleNamespace(encode_text=self.encode(prompts), encode_image=torch.clone)
        with mock.patch.object(up.zero_shot, "ensemble_templates", {"table": templates}):
            classifier = up.zero_shot.construct_text_classifier(args, names, network, self.tokens)
        batches = list(zip(case["image_features_raw"].split(20), case["labels"].split(20), strict=True))
        features, labels = up.zero_shot.construct_test_features(batches, network)
        start = dict(args=args, np=np, torch=torch, string_classnames=names, test_labels=labels)
        start |= dict(test_features=features, text_classifier=classifier)
        with np.errstate(invalid="ignore"):  # a class without samples
            path = up.root / "src/zero_shot_eval.py"
            scope = statements(path, "logits = ", "for idx, classname in", **start)
        found = {"classifier": classifier, "image_features": features, "logits": scope["logits"]}
        found |= {"predictions": scope["np_preds"], "accuracy_percent": [scope["zs_acc"]]}
        return found | {"per_class_accuracy_percent": list(scope["per_class_accuracies"].values())}


def their_recall(up, case, to_texts: dict, to_images: dict) -> tuple:
    """Their evaluate; concepts by caption and by image."""
    image, text = case["image_embeddings"], case["text_embeddings"]
    n = len(text) // len(image)
    maps = torch.arange(len(text)).view(-1, n), torch.arange(len(text)) // n
    names = dict(torch=torch, device="cpu", get_embeddings=lambda *_: (image, text, *maps))
    function = function_of(up.root / "src/retrieval_eval.py", "evaluate", **names)
    return function(None, None, None, None, None, to_texts, None, to_images)


class Recall(Part):
    files = {"retrieval": {}}
    functions = "concept_frequency.evaluate.concept_recall"
    authors = "src/retrieval_eval.py:164"
    atol = 1e-6

    def inputs(self):
        image = unit(40, 12)
        text = F.normalize(image.repeat_interleave(5, 0) + 0.4 * torch.randn(200, 12), dim=-1)
        return {"image_embeddings": image, "text_embeddings": text, "k": torch.tensor([1, 5, 10])}

    def ours(self, case):
        embeddings, none = (case["image_embeddings"], case["text_embeddings"]), concepts.Concepts([], {}, {})
        found = [evaluate.concept_recall(*embeddings, none, k)[:2] for k in case["k"].tolist()]
        return dict(zip(("text_to_image_recall", "image_to_text_recall"), zip(*found, strict=True), strict=True))

    def theirs(self, up, case):
        empty = [{i: [] for i in range(len(case[f"{kind}_embeddings"]))} for kind in ("text", "image")]
        return dict(zip(("text_to_image_recall", "image_to_text_recall"), their_recall(up, case, *empty), strict=False))


class ConceptRecall(Part):
    """Nouns of captions, and the recall of the captions and images that have them."""

    files = {"retrieval_concepts": {}}
    functions = "concept_frequency.concepts.caption_concepts concept_frequency.evaluate.concept_recall"
    authors = "src/downstream_retrieval_extract_concepts.py:44, src/retrieval_eval.py:164"
    atol = 1e-6
    json = True

    def inputs(self):
        return {"docs": random_docs(200, ["dog", "Cat", "man", "t-shirt", "2nd", "boat", *"abcdefgh"])}

    def ours(self, case):
        arrays = beside(case, Recall())
        embeddings = arrays["image_embeddings"], arrays["text_embeddings"]
        found = concepts.caption_concepts(case["docs"], captions_per_image=len(embeddings[1]) // len(embeddings[0]))
        recalls = {str(k): evaluate.concept_recall(*embeddings, found, k) for k in arrays["k"].tolist()}
        result = {"concepts": found.names, "concept_to_images": found.to_images, "concept_to_texts": found.to_texts}
        result["conceptwise_text_to_image"] = {k: of[2] for k, of in recalls.items()}
        return result | {"conceptwise_image_to_text": {k: of[3] for k, of in recalls.items()}}

    def theirs(self, up, case):
        names, to_texts, of_text, to_images, of_image = up.extract.extract_concepts(documents(case["docs"]))
        _, _, i2t, t2i = their_recall(up, beside(case, Recall()), of_text, of_image)
        result = {"concepts": sorted(names), "concept_to_images": to_images, "concept_to_texts": to_texts}
        for way, recalls in (("text_to_image", t2i), ("image_to_text", i2t)):
            result[f"conceptwise_{way}"] = {str(k): of["conceptwise"] for k, of in recalls.items()}
        return result


# -------------------------------------------------------------------------------------------------------------- curves

SLICES = {
    "inner": slice(1, -1), "laion": slice(2, -1), "synth": slice(0, -4), "tail": slice(3, None),
    "last4": slice(-4, None), "all": slice(None),
}  # fmt: skip


def as_upstream(curve: statistics.Curve) -> statistics.Curve:
    """Fill empty bins with 0, like their arrays of fixed size."""
    return curve._replace(mean=np.nan_to_num(curve.mean), std=np.nan_to_num(curve.std))


class LogLinear(Part):
    files = {
        "loglinear_classification": dict(n=450, num_bins=12, datasets=18), "loglinear_retrieval_nb": dict(n=240),
        "loglinear_retrieval_integrated": dict(n=300), "loglinear_empty_bins_v": dict(n=9, datasets=1),
    }  # fmt: skip
    families = ("loglinear",)
    functions = "concept_frequency.statistics.log_linear_curve concept_frequency.statistics.correlation"
    authors = "notebooks/zero_shot_integrated_search_results.ipynb, notebooks/retrieval_*_search_results.ipynb"
    unused = ("dataset_id",)  # a curve pools the concepts of all data sets
    rtol = atol = 1e-5

    def inputs(self, n, num_bins=7, datasets=2):
        counts = (10 ** np.random.uniform(-0.5, 5, n)).astype(np.int64)
        if datasets == 1:
            counts = np.array([0, 0, 5, 6, 7, 8, 300_000, 400_000, 9])  # leaves bins empty
        scores = 5 * np.log(counts + 1) + np.random.randn(n)
        found = {"counts": torch.from_numpy(counts), "scores": torch.from_numpy(scores)}
        numbers = torch.arange(n) * datasets // n
        return found | {"dataset_id": numbers, "num_bins": torch.tensor([num_bins])}

    def ours(self, case):
        curve = statistics.log_linear_curve(case["counts"], case["scores"], case["num_bins"].item())
        assert np.isnan(curve.mean[curve.size == 0]).all()
        fixed = as_upstream(curve)
        found = {"bin_counts": curve.size, "bin_index": curve.index, "exp_bins": curve.position}
        found |= {"cum_means": fixed.mean, "cum_stds": fixed.std, "upstream_failed": [int("exp_bins" not in case)]}
        for name, bins in SLICES.items():
            found[f"pearson_{name}"] = statistics.correlation(fixed, bins)
            found[f"line_{name}"] = stats.linregress(np.log(fixed.position[bins]), fixed.mean[bins])[:2]
        return found

    def theirs(self, up, case):
        kept, numbers = {}, case["dataset_id"].tolist()
        counts, scores = case["counts"].tolist(), case["scores"].tolist()
        order: dict[str, int] = {}  # data sets as their loop meets them

        def load(path):
            number = order.setdefault(Path(path).name.split("_")[0], len(order))
            rows = [row for row in range(len(numbers)) if numbers[row] == number]
            if "search_counts" in path:
                return {f"{row:05}": counts[row] for row in rows}
            of_set = {"plane": 0.0} | {f"{row:05}": scores[row] for row in rows}
            return {"model corpus": {"classwise": of_set, "conceptwise": of_set}}

        def digitize(*arguments, **options):
            return kept.setdefault("index", np.digitize(*arguments, **options))

        numpy = module("numpy", **vars(np) | {"digitize": digitize})
        dump = SimpleNamespace(dump=lambda value, _: kept.update(value))
        files = SimpleNamespace(path=os.path, makedirs=lambda *_, **__: None)
        names = {
            "loglinear_classification": "zero_shot_integrated",
            "loglinear_retrieval_integrated": "retrieval_integrated",
        }
        path = up.root / f"notebooks/{names.get(case.path.stem, 'retrieval_text_only')}_search_results.ipynb"
        stand_ins = dict(np=numpy, os=files, pickle=dump, json=SimpleNamespace(load=load))
        function_of(path, "save_plotting_info", **stand_ins, search_counts_dir="search_counts", results_dir="scores")(
            "model", "corpus", "class"
        )
        found = {name: kept[name] for name in ("exp_bins", "cum_means", "cum_stds")}
        x, y = np.log(kept["exp_bins"]), kept["cum_means"]
        for name, bins in SLICES.items():
            found[f"pearson_{name}"] = list(stats.pearsonr(x[bins], y[bins]))
            found[f"line_{name}"] = list(stats.linregress(x[bins], y[bins])[:2])
        index = kept["index"]
        return found | {"bin_index": index, "bin_counts": np.bincount(index, minlength=len(x)), "upstream_failed": [0]}


class PeopleCurve(Part):
    files = {"human_eval_curve": {}}
    functions = "concept_frequency.statistics.log_linear_curve concept_frequency.statistics.correlation"
    authors = "src/text_to_image_experiments/human_experiment_evaluation/human_plot.py:141"
    rtol = atol = 1e-5

    def inputs(self):
        centres = torch.from_numpy(10 ** np.sort(np.random.uniform(0, 4, 44)))
        accuracy = 0.2 * centres.log10() + 0.1 * torch.rand(44)
        return {"bucket_centers": centres, "bucket_accuracy": accuracy, "num_bins": torch.tensor([5])}

    def ours(self, case):
        points = case["bucket_centers"], case["bucket_accuracy"]
        return self.curve(as_upstream(statistics.log_linear_curve(*points, case["num_bins"].item())))

    def curve(self, curve: statistics.Curve) -> dict:
        found = {"log_bins": np.log(curve.position), "cum_means": curve.mean, "cum_stds": curve.std}
        return found | {"pearson": statistics.correlation(curve)}

    def theirs(self, up, case):
        path = up.root / "src/text_to_image_experiments/human_experiment_evaluation/human_plot.py"
        start = dict(np=np, nb=case["num_bins"].item())
        start |= dict(x_vals=case["bucket_centers"].numpy(), y_vals=case["bucket_accuracy"].numpy())
        scope = statements(path, "bins = ", "add1 = ", **start)
        found = {"log_bins": scope["bins"], "cum_means": scope["cummeans"], "cum_stds": scope["cumstds"]}
        return found | {"pearson": [scope["xxx"], scope["sig1"]]}


# -------------------------------------------------------------------------------------------------------- Let It Wag!


class Deduplicate(Part):
    """Needs imagededup, the authors' library, for theirs."""

    files = {"dedup": {}}
    functions = "concept_frequency.let_it_wag.phash concept_frequency.let_it_wag.deduplicate"
    authors = "let_it_wag_datasets/deduplicate_let_it_wag_datasets.py:10-24"

    def inputs(self):
        names, images = [f"{name}_class/{row:03}.png" for name in "ab" for row in range(8)], []
        for row in range(len(names)):
            if row % 3 == 0:
                coarse = np.random.randint(0, 256, (6, 6, 3))
            coarse = coarse + np.random.randint(-9, 9, (6, 6, 3))  # like the one before
            picture = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
            images.append(np.asarray(picture))
        return {"images": torch.from_numpy(np.stack(images)).float(), "json": {"names": names, "threshold": 10}}

    def ours(self, case):
        bits = np.stack([let_it_wag.phash(image) for image in case["images"].numpy()])
        hamming, names, limit = let_it_wag.hamming_distances(bits), case.json["names"], case.json["threshold"]
        found = {"phash_bits": bits.astype(np.int64), "hamming": hamming}
        codes = [f"{int(''.join(map(str, row.astype(int))), 2):016x}" for row in bits]
        classes = {}
        for name, walk in case.json["classes"].items():
            rows = [i for i, file in enumerate(names) if file.partition("/")[0] == name]
            files = [names[i].partition("/")[2] for i in rows]
            orders = {"removed": walk["iteration_order"], "removed_if_sorted_order": sorted(files)}
            classes[name] = {"iteration_order": walk["iteration_order"]}
            for key, order in orders.items():
                removed = let_it_wag.deduplicate(hamming[rows][:, rows], [files.index(file) for file in order], limit)
                classes[name][key] = sorted(files[i] for i in removed)
        text = {"names": names, "threshold": limit, "phash_hex": codes, "classes": classes}
        assert text == case.json
        return found | {"json": text}

    def theirs(self, up, case):
        methods = pytest.importorskip("imagededup.methods")
        names, found, dumped = case.json["names"], [], []

        def find_duplicates(**options):
            """In its own order, then in that of names."""
            duplicates = methods.PHash(verbose=False).find_duplicates(**options)
            if by_name:
                duplicates = {file: duplicates[file] for file in sorted(duplicates)}
            found.append(list(duplicates))
            return duplicates

        def hasher(verbose):
            return SimpleNamespace(find_duplicates=find_duplicates)

        with tempfile.TemporaryDirectory() as folder:
            for name, image in zip(names, case["images"].numpy().astype(np.uint8), strict=True):
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                Image.fromarray(image).save(Path(folder) / name)
            classes = sorted({name.partition("/")[0] for name in names})
            start = dict(class_folders=[f"{folder}/{name}" for name in classes], threshold=case.json["threshold"])
            start |= dict(
                PHash=hasher, os=os, json=SimpleNamespace(dump=lambda value, *_, **__: dumped.append(dict(value)))
            )
            script = up.root / "let_it_wag_datasets/deduplicate_let_it_wag_datasets.py"
            for by_name in (False, True):  # noqa: B007
                statements(script, "phasher = ", "for class_dir in", **start, remove_images_dict={})
            codes = [methods.PHash(verbose=False).encode_image(f"{folder}/{name}") for name in names]
        bits = torch.tensor([[int(bit) for bit in f"{int(code, 16):064b}"] for code in codes])
        walks = {
            name: {"iteration_order": order, "removed": sorted(dumped[-1 - len(classes)][name])}
            | {"removed_if_sorted_order": sorted(dumped[-1][name])}
            for name, order in zip(classes, found, strict=False)
        }
        text = {"names": names, "threshold": case.json["threshold"], "phash_hex": codes, "classes": walks}
        return {"phash_bits": bits, "hamming": (bits[:, None] != bits[None]).sum(2), "json": text}


class Balance(Part):
    files = {"balance": {}}
    functions = "concept_frequency.let_it_wag.balance_classes"
    authors = "let_it_wag_datasets/class_balance_let_it_wag_datasets.py:13-38"
    json = True

    def inputs(self):
        counts = {"a": 449, "b": 450, "c": 451, "d": 600, "e": 0}
        return {"jpg_counts": counts, "other_file_counts": {"a": 9}, "per_class": 450, "min_exclusive": 450}

    def files_of(self, case):
        files = {name: [f"{i}.jpg" for i in range(n)] for name, n in case["jpg_counts"].items()}
        for name, n in case["other_file_counts"].items():
            files.setdefault(name, []).extend(f"{i}.txt" for i in range(n))
        return files

    def ours(self, case):
        assert case["min_exclusive"] == case["per_class"]  # the paper's is one number
        files = self.files_of(case)
        kept, again = (
            let_it_wag.balance_classes(files, case["per_class"], torch.Generator().manual_seed(0)) for _ in range(2)
        )
        assert kept == again and all(set(rows) <= set(files[name]) for name, rows in kept.items())
        (drawn,) = {len(set(rows)) for rows in kept.values()}
        return {"kept_classes": sorted(kept), "images_per_kept_class": drawn}

    def theirs(self, up, case):
        files, copied = self.files_of(case), []
        listing = SimpleNamespace(
            listdir=lambda path: files[Path(path).name], path=os.path, makedirs=lambda *_, **__: None
        )
        names = dict(os=listing, random=random, class_folders=[f"/{name}" for name in files], data_stats={})
        names |= dict(shutil=SimpleNamespace(copy=lambda _, to: copied.append(to)), final_path="/final")
        names |= dict(let_it_wag_original_data_path="/")
        script = up.root / "let_it_wag_datasets/class_balance_let_it_wag_datasets.py"
        scope = statements(script, "for class_dir in", "for k in", **names)
        (drawn,) = {sum(Path(to).parent.name == name for to in copied) for name in scope["sorted_dict"]}
        return {"kept_classes": sorted(scope["sorted_dict"]), "images_per_kept_class": drawn}
