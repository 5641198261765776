"""Read the files that the authors published in bethgelab/frequency_determines_performance@11ef009 (`U:`).

`Results` reads search_counts, zero_shot_evaluations, retrieval_evaluations, t2i_evaluations, misalignment_metrics,
let_it_wag_datasets, the curves and figures in notebooks/plots, and the judgements of the people study from a clone.
This project contains none of these files. numbers.py has the numbers of the paper's tables and figures.
"""

import pickle
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concept_frequency import statistics
from concept_frequency.concepts import load_json, scores_of, short
from concept_frequency.config import COUNT_PRESETS
from concept_frequency.published.numbers import TABLE9
from shared.errors import UserError

# ------------------------------------------------------------------------------------------------ names in the files

CLASSIFICATION = (  # 17 data sets; the 18th, ImageNet-Sketch, has no text counts
    "imagenet cifar10 cifar100 caltech101 caltech256 sun397 birdsnap country211 cub dtd eurosat fgvcaircraft "
    "flowers102 food101 oxfordpets stanfordcars ucf101"
).split()
FINE_GRAINED = ["birdsnap", "cub", "fgvcaircraft", "flowers102", "food101"]  # they share classes with Let It Wag!
RETRIEVAL = ["coco", "flickr"]
METHODS = {"integrated": "integrated_tlemmatized_i0.7", "image": "rampp0.7", "text": "lemmatized"}
SETTINGS = {  # prompts of a class, or recall@k in one direction
    "classification": ("class", "simple", "ensemble"),
    "retrieval": ("i2t_k=1", "i2t_k=5", "i2t_k=10", "t2i_k=1", "t2i_k=5", "t2i_k=10"),
}
MAIN = {"classification": "class", "retrieval": "t2i_k=10"}  # the scores of figure 2
BINS = {"classification": 12, "retrieval": 7, "generation": 7, "people": 5}
CORPORA = {
    "cc3m": "CC-3M",
    "cc12m": "CC-12M",
    "yfcc15m": "YFCC-15M",
    "laion400m": "LAION-400M",
    "synthci30m": "SynthCI-30M",
    "laion200m_train_test_sim_normalized": "LAION, 150M pairs",  # similarity control; named 200M
}
SIZES = {name: COUNT_PRESETS[name][1].size for name in ("cc3m", "cc12m", "yfcc15m", "laion400m")}
GENERATION = {  # scores of text-to-image models, in the order of figures 3 and 11 to 15
    "exp_aesthetics": "expected aesthetics",
    "max_aesthetics": "max aesthetics",
    "human_aesthetics": "human aesthetics",
    "human_align": "human alignment",
    "exp_clip": "expected CLIP score",
    "max_clip": "max CLIP score",
}
GENERATION_MODELS = (  # three per panel of these figures
    "huggingface_openjourney-v1-0", "DeepFloyd_IF-I-L-v1.0", "huggingface_promptist-stable-diffusion-v1-4",
    "craiyon_dalle-mini", "huggingface_openjourney-v2-0", "adobe_giga-gan",
    "huggingface_vintedois-diffusion-v0-1", "huggingface_stable-diffusion-safe-strong", "DeepFloyd_IF-I-M-v1.0",
    "huggingface_stable-diffusion-safe-weak", "huggingface_stable-diffusion-v1-5",
    "huggingface_dreamlike-diffusion-v1-0",
    "huggingface_stable-diffusion-safe-medium", "huggingface_redshift-diffusion", "craiyon_dalle-mega",
    "lexica_search-stable-diffusion-1.5", "AlephAlpha_m-vader", "huggingface_stable-diffusion-v2-base",
    "DeepFloyd_IF-I-XL-v1.0", "huggingface_stable-diffusion-safe-max", "huggingface_stable-diffusion-v1-4",
    "kakaobrain_mindall-e", "huggingface_stable-diffusion-v2-1-base", "huggingface_dreamlike-photoreal-v2-0",
)  # fmt: skip


def plotted_bins(task: str, pretraining: str) -> slice:
    """The bins that the paper plots and correlates; they depend on task and corpus."""
    if task == "retrieval":
        return slice(3, None)
    if task == "generation":
        return slice(-4, None)
    return {"laion400m": slice(2, -1), "synthci30m": slice(0, -4)}.get(pretraining, slice(1, -1))


def with_table9(imagenet: dict[str, float]) -> dict[str, float]:
    """Add to {model: percent on ImageNet} the models that only table 9 has."""
    return {model: printed for model, (printed, _) in TABLE9.items()} | imagenet


def mean_scores(scores: dict[str, Sequence[float]], more_than: int = 5) -> dict[str, float]:
    """A concept's score is the mean over its prompts; concepts with 5 prompts or fewer are skipped.

    Source: U:notebooks/t2i_integrated_search_results.ipynb cell 3.
    """
    return {word: float(np.mean(values)) for word, values in scores.items() if len(values) > more_than}


# ---------------------------------------------------------------------------------------------------------------- files

read = cache(load_json)  # each file is parsed once


class PlainUnpickler(pickle.Unpickler):
    """Load pickles of arrays, numbers, text, lists and dictionaries. ValueError before any other object is made."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"), ("numpy", "ndarray"),
        ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"), ("numpy", "dtype"),
        ("collections", "defaultdict"), ("builtins", "list"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise UserError(f"a published pickle contains {module}.{name}, but only arrays and plain values are read")
        return super().find_class(module, name)


def read_pickle(path: Path) -> Any:
    """The content of a pickle file of arrays and plain values."""
    with open(path, "rb") as file:
        return PlainUnpickler(file).load()


class Results:
    """The authors' published files, in a clone of their repository."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.plots = self.folder / "notebooks/plots"
        self.study = self.folder / "src/text_to_image_experiments/human_experiment_evaluation"
        for name in ("search_counts", "zero_shot_evaluations", "retrieval_evaluations"):
            if not (self.folder / name).is_dir():
                raise UserError(
                    f"{self.folder} has no folder {name}: name a clone of bethgelab/frequency_determines_performance"
                )

    # ------------------------------------------------------------------ counts and scores

    def counts_file(self, dataset: str, pretraining: str, method: str) -> Path:
        return self.folder / "search_counts" / f"{dataset}_{pretraining}_{method}_search_counts.json"

    def has(self, search: str, pretraining: str, task: str = "classification") -> bool:
        dataset = CLASSIFICATION[0] if task == "classification" else RETRIEVAL[0]
        return self.counts_file(dataset, pretraining, METHODS[search]).is_file()

    def scores_file(self, task: str, dataset: str, setting: str) -> Path:
        place = "retrieval_evaluations" if task == "retrieval" else "zero_shot_evaluations"
        return self.folder / place / f"{dataset}_{setting}_results.json"

    @cache  # noqa: B019 - one object per run
    def pairs(
        self, task: str, search: str, model: str, setting: str = "class", method: str | None = None,
        sketch: bool = True,
    ):  # fmt: skip
        """(counts (P,), scores (P,), dataset (P,)) of a panel: the pairs of all its data sets, not their averages.

        `setting`: class, simple, ensemble, or for retrieval t2i_k=10 etc. The published files have COCO's empty concept
        only in the image counts. sketch=False uses the 17 data sets of the paper's text.
        """
        pretraining = model.partition("|")[2]
        sets = RETRIEVAL if task == "retrieval" else list(CLASSIFICATION)
        if task == "classification" and search != "text" and sketch:
            sets.append("imagenet-sketch")
        method = method or METHODS[search]
        counts = [read(self.counts_file(dataset, pretraining, method)) for dataset in sets]
        files = [self.scores_file(task, dataset, setting) for dataset in sets]
        return statistics.pooled(counts, [scores_of(read(path), model, path) for path in files])

    def has_scores(self, key: tuple[str, str, str]) -> bool:
        """Whether the clone has scores and the counts of any corpus for `key`: (task, counts, prompts or recall)."""
        task, search, setting = key
        dataset = RETRIEVAL[0] if task == "retrieval" else CLASSIFICATION[0]
        return self.scores_file(task, dataset, setting).is_file() and any(
            self.has(search, corpus, task) for corpus in CORPORA
        )

    def classes(self, path: Path) -> list[str]:
        """Class names in a file of scores."""
        return list(next(iter(read(path).values()))["classwise"])

    def tail_counts(self, pretraining: str, search: str) -> list[int]:
        """Counts of the 3,469 classes of the 17 data sets."""
        files = (load_json(self.counts_file(dataset, pretraining, METHODS[search])) for dataset in CLASSIFICATION)
        return [count for counts in files for count in counts.values()]

    def all_counts(self, pretraining: str, search: str) -> dict[str, int]:
        """Counts of all concepts of a corpus. If several files have a name, the alphabetically first file is used."""
        found: dict[str, int] = {}
        for path in sorted(
            (self.folder / "search_counts").glob(f"*_{pretraining}_{METHODS[search]}_search_counts.json")
        ):
            found = load_json(path) | found
        return found

    # ------------------------------------------------------------------ saved curves and figures

    def saved_curve(self, task: str, search: str, model: str, setting: str) -> dict[str, NDArray] | None:
        """{"exp_bins", "cum_means", "cum_stds"} of a panel as the authors' notebooks saved it, or None."""
        backbone, _, corpus = model.partition("|")
        method = {"integrated": "integrated_rampp0.7"}.get(search, METHODS.get(search, search))
        ending = {"classification": "", "retrieval": "_retrieval", "generation": "_t2i"}[task]
        name = f"counttype_{method}_prompttype_{setting}_ptdataset_{corpus}_model_{backbone}{ending}.pkl"
        path = self.plots / f"log-linear-all-datasets-plot-{name}"
        return read_pickle(path) if path.is_file() else None

    def figure(self, *names: str) -> Path | None:
        """The first of these images that exists in notebooks/plots, or None."""
        paths = [self.plots / f"{name}.png" for name in names]
        return next((path for path in paths if path.is_file()), None)

    def panel_image(self, task: str, search: str, corpus: str, setting: str) -> Path | None:
        """The authors' image of a panel, or None; file names have one of two forms."""
        plot, corpus = f"log-linear-plot-{search}-queried-search", corpus.replace("_", "-")
        kind = {"classification": "zero-shot", "retrieval": "retrieval"}[task]
        ends = ["", f"-{setting}"] if setting in (MAIN[task], "class") else [f"-{setting}"]
        forms = [f"{corpus}-{kind}", f"{kind}-{corpus}"]
        return self.figure(*(f"eccv-paper-{form}-{plot}{end}" for end in reversed(ends) for form in forms))

    # ------------------------------------------------------------------ the other tasks

    def generation(self, setting: str) -> dict[str, dict[str, list[float]]]:
        """{text-to-image model: {concept: scores of its prompts}}; empty if the clone lacks the file."""
        path = self.folder / f"t2i_evaluations/t2i_{setting}.json"
        return {model: value["classwise"] for model, value in read(path).items()} if path.is_file() else {}

    def generation_pairs(self, setting: str, model: str) -> tuple[list[int], list[float]] | None:
        """(counts in LAION-Aesthetics, mean scores) of concepts with enough prompts, or None if files are missing."""
        counts_file = self.counts_file("t2i", "laion_aesthetics", METHODS["integrated"])
        scores = self.generation(setting).get(model)
        if scores is None or not counts_file.is_file():
            return None
        counts = read(counts_file)
        means = mean_scores(scores, -1 if "human" in setting else 5)  # the authors' human curves skip no concepts
        names = sorted(counts.keys() & means.keys())
        return [counts[name] for name in names], [means[name] for name in names]

    def generation_models(self) -> list[str]:
        """Sorted names of the text-to-image models with scores or curves."""
        names = {name for setting in GENERATION for name in self.generation(setting)}
        for path in self.plots.glob("*_prompttype_exp_aesthetics_ptdataset_laion_aesthetics_model_*_t2i.pkl"):
            names.add(path.stem.partition("_model_")[2].removesuffix("_t2i"))
        return sorted(names)

    def people(self) -> tuple[NDArray[np.int64], dict[int, list[float]]] | None:
        """(counts of names of several words, {bucket: judgements}) of the people study, or None if files are missing.

        Judgements of all participants: 1 for yes, 0.5 for somewhat, 0 for no.
        """
        names, counts = self.study / "entities/P31_Q5_50000.txt", self.study / "entities/P31_Q5_50000/cnt_space.npy"
        files = sorted(self.study.glob("P*_v1_bucket_acc.pkl"))
        if not files or not names.is_file() or not counts.is_file():
            return None
        several = np.array([" " in name for name in names.read_text(encoding="utf-8").split("\n")])
        judged: dict[int, list[float]] = defaultdict(list)
        for path in files:
            for bucket, scores in read_pickle(path).items():
                judged[int(bucket)] += map(float, scores)
        return np.load(counts, allow_pickle=False)[several], dict(judged)

    def misalignment(self, name: str) -> tuple[int, float] | None:
        """(number of misaligned pairs, their fraction of the corpus' fixed size), or None if the file is missing."""
        path = self.folder / f"misalignment_metrics/{name}_misalignment_degree.json"
        if not path.is_file():
            return None
        found = read(path)
        return found["misalignment_counts"], found["misalignment_degree (percent); fixed conservative dataset size"]

    def let_it_wag(self) -> dict[str, dict[str, Any]]:
        """{model: {"full": percent, "classwise": {class: percent}}} on Let It Wag! with the ensemble of prompts."""
        name = "let_it_wag_ensemble_results.json"
        places = [self.folder / "let_it_wag_datasets/evaluations" / name, self.folder / "let_it_wag" / name]
        path = next((path for path in places if path.is_file()), places[0])
        return {short(model): value for model, value in read(path).items()}

    def imagenet(self) -> dict[str, float]:
        """{model: percent on ImageNet with the ensemble of prompts} of the models in the files."""
        files = read(self.scores_file("classification", "imagenet", "ensemble"))
        return {short(model): value["full"] for model, value in files.items()}

    def wag_classes(self) -> list[str]:
        """The classes of Let It Wag!."""
        return list(next(iter(self.let_it_wag().values()), {}).get("classwise", {}))
