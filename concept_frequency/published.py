"""What the authors have published: the values printed in their figures, and their files of counts and scores.

A clone of bethgelab/frequency_determines_performance@11ef009 (`U:`); nothing of its files is in this project.
"""

from functools import cache
from pathlib import Path

from concept_frequency import curves
from concept_frequency.concepts import load_counts, load_json, load_results

CLASSIFICATION = (  # 17 datasets; ImageNet-Sketch is the 18th, without text counts
    "imagenet cifar10 cifar100 caltech101 caltech256 sun397 birdsnap country211 cub dtd eurosat fgvcaircraft "
    "flowers102 food101 oxfordpets stanfordcars ucf101"
).split()
RETRIEVAL = ["coco", "flickr"]
METHODS = {"integrated": "integrated_tlemmatized_i0.7", "image": "rampp0.7", "text": "lemmatized"}
BINS = {"classification": 12, "retrieval": 7, "generation": 7}
CORPORA = {
    "cc3m": "CC-3M",
    "cc12m": "CC-12M",
    "yfcc15m": "YFCC-15M",
    "laion400m": "LAION-400M",
    "synthci30m": "SynthCI-30M",
    "laion200m_train_test_sim_normalized": "LAION-200M",
}
MODELS = (
    ("RN50|cc3m", "ViT-B-16|cc3m", "RN50|cc12m", "ViT-B-16|cc12m", "RN50|yfcc15m", "RN101|yfcc15m", "ViT-B-16|yfcc15m")
    + ("ViT-B-32|laion400m", "ViT-B-16|laion400m", "ViT-L-14|laion400m", "ViT-B-16|synthci30m")
    + ("ViT-B-32|laion200m_train_test_sim_normalized",)
)
SIMILARITY = MODELS[-1]

# Values printed in the legends of the authors' figures, in the order of MODELS; None: no such figure.
PRINTED = {
    ("classification", "integrated"): (0.97, 0.93, 0.93, 0.83, 0.96, 0.95, 0.96, None, None, None, 0.82, None),
    ("classification", "image"): (0.98, 0.97, 0.97, 0.95, 0.82, 0.89, 0.92, 0.95, 0.91, 0.87, 0.93, 0.97),
    ("classification", "text"): (0.92, 0.91, 0.95, 0.94, 0.85, 0.89, 0.88, 0.92, 0.85, 0.83, 0.89, None),
    ("retrieval", "integrated"): (1.00, 1.00, 0.98, 0.98, 1.00, 1.00, 0.99, 0.97, 0.97, 0.96, None, None),
    ("retrieval", "image"): (None,) * 11 + (0.99,),
}
DERIVED = {
    "ViT-B-32|laion400m": 0.957,
    "ViT-B-16|laion400m": 0.916,
    "ViT-L-14|laion400m": 0.855,
}  # main figure, 3 digits
MISALIGNED = {"cc3m": 16.81, "cc12m": 17.26, "yfcc15m": 36.49, "laion_aesthetics": 14.34, "laion400m": 5.31}  # percent
AGREEMENT = {  # Spearman, as U:notebooks/correlations_between_pretraining_frequencies.ipynb shows it
    ("cc3m", "cc12m"): 0.79, ("cc12m", "yfcc15m"): 0.96, ("cc3m", "laion400m"): 0.63, ("cc12m", "laion400m"): 0.74,
    ("yfcc15m", "laion400m"): 0.76,
}  # fmt: skip
IMAGENET = {  # percent, of open_clip's table, as U:notebooks/let_it_wag_eval.ipynb cell 5 has them
    "RN50|openai": 59.82, "RN101|openai": 62.28, "ViT-B-32|openai": 63.32, "ViT-B-16|siglip": 78.49,
    "ViT-B-16|openai": 68.34, "ViT-L-14|openai": 75.54, "SO400M|siglip": 83.44, "ViT-L-16|siglip": 82.07,
    "ViT-B-32|metaclip400m": 65.58, "ViT-B-32|commonpool": 23.04, "ViT-B-16|dfn": 76.24, "ViT-B-16|commonpool": 57.77,
    "ViT-L-14|commonpool": 76.37, "ViT-H-14|dfn": 83.44, "ViT-B-32|metaclip2.5b": 67.66,
    "ViT-B-16|metaclip400m": 70.80, "ViT-B-16|metaclip2.5b": 72.12, "ViT-L-14|metaclip400m": 76.20,
    "ViT-L-14|metaclip2.5b": 79.17, "ViT-H-14|metaclip2.5b": 80.51,
}  # fmt: skip


def plotted_bins(task: str, pretraining: str) -> slice:
    """The bins that the paper plots and correlates: they differ from panel to panel."""
    if task == "retrieval":
        return slice(3, None)
    if task == "generation":
        return slice(-4, None)
    return {"laion400m": slice(2, -1), "synthci30m": slice(0, -4)}.get(pretraining, slice(1, -1))


def short(model: str) -> str:
    """`backboneRN50_pretrainedcc3m` -> `RN50|cc3m`."""
    return model.removeprefix("backbone").replace("_pretrained", "|", 1)


class Results:
    """The authors' published files."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for name in ("search_counts", "zero_shot_evaluations", "retrieval_evaluations"):
            if not (self.folder / name).is_dir():
                raise FileNotFoundError(
                    f"{self.folder} has no folder {name}: name a clone of bethgelab/frequency_determines_performance"
                )

    def counts_file(self, dataset: str, pretraining: str, method: str) -> Path:
        return self.folder / "search_counts" / f"{dataset}_{pretraining}_{method}_search_counts.json"

    def has(self, search: str, pretraining: str, task: str = "classification") -> bool:
        dataset = CLASSIFICATION[0] if task == "classification" else RETRIEVAL[0]
        return self.counts_file(dataset, pretraining, METHODS[search]).is_file()

    @cache  # noqa: B019 - one object a run
    def pairs(self, task: str, search: str, model: str, prompts: str = "class", method: str | None = None):
        """(counts (P,), scores (P,), dataset (P,)) of a panel: pooled over its datasets, not averaged.

        `prompts` is class, simple, ensemble, or t2i_k=10 and the like for retrieval. COCO's empty concept is in the
        image counts alone, as published.
        """
        pretraining = model.partition("|")[2]
        datasets = RETRIEVAL if task == "retrieval" else CLASSIFICATION + ["imagenet-sketch"] * (search != "text")
        place = "retrieval_evaluations" if task == "retrieval" else "zero_shot_evaluations"
        method = method or METHODS[search]
        counts = [load_counts(self.counts_file(dataset, pretraining, method)) for dataset in datasets]
        scores = [load_results(self.folder / place / f"{d}_{prompts}_results.json", model) for d in datasets]
        return curves.pooled(counts, scores)

    def tail_counts(self, pretraining: str, search: str) -> list[int]:
        """Counts of the 3,469 classes of 17 datasets."""
        files = (load_counts(self.counts_file(dataset, pretraining, METHODS[search])) for dataset in CLASSIFICATION)
        return [count for counts in files for count in counts.values()]

    def all_counts(self, pretraining: str, search: str) -> dict[str, int]:
        """Counts of all concepts of a corpus; of a name that several files have, the first in order of names."""
        found: dict[str, int] = {}
        for path in sorted(
            (self.folder / "search_counts").glob(f"*_{pretraining}_{METHODS[search]}_search_counts.json")
        ):
            found = load_counts(path) | found
        return found

    def let_it_wag(self) -> dict[str, float]:
        """Percent on Let It Wag! of each model, by its short name."""
        name = "let_it_wag_ensemble_results.json"
        places = [self.folder / "let_it_wag_datasets/evaluations" / name, self.folder / "let_it_wag" / name]
        path = next((path for path in places if path.is_file()), places[0])
        return {short(model): value["full"] for model, value in load_json(path).items()}

    def imagenet(self) -> dict[str, float]:
        """Percent on ImageNet with the ensemble of prompts: from the files, else as the authors' notebook has it."""
        files = load_json(self.folder / "zero_shot_evaluations/imagenet_ensemble_results.json")
        return IMAGENET | {short(model): value["full"] for model, value in files.items()}
