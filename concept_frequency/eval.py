"""Evaluate the controlled experiment: `python -m concept_frequency.eval RUN... [--replay FILE]`.

The paper (arXiv 2404.04125; authors' code bethgelab/frequency_determines_performance@11ef009, `U:`) relates the
accuracy of each concept to its count. This file computes scores of concepts (zero-shot, retrieval); count.py counts
concepts, statistics.py has the curve and its correlation, let_it_wag.py the tail benchmark. measure.py scores any CLIP
model, and replay.py recomputes results from the authors' published files. For each run, this script counts the concepts
in its captions with our own pipeline, measures their accuracy on a drawing style that no arm was trained on, and
computes the curve. `--report` compares all runs, which must be named ARM-seedN.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import open_clip
import torch
import tyro
from torch import Tensor

from concept_frequency import count, let_it_wag, train
from concept_frequency.concepts import (  # noqa: F401
    Concepts,
    caption_concepts,
    load_counts,
    load_results,
    prompts_with_concept,
    read_concepts,
)
from concept_frequency.config import CountConfig
from concept_frequency.images import TestSet, plain_view, read_corpus, read_test_set
from concept_frequency.let_it_wag import balance_classes, deduplicate, phash, select_tail  # noqa: F401
from concept_frequency.statistics import (  # noqa: F401
    Curve,
    correlation,
    frequency_agreement,
    log_linear_curve,
    long_tail,
    misalignment,
    permutation_null,
    slope_per_decade,
    unbinned,
    within_slope,
)
from shared import checkpoints, cli, evaluation, export, run, zeroshot
from shared.clip import image_side

METRICS = {  # metrics in the table of a run, with their headings
    "top1": "top-1",
    "slope": "points a decade",
    "within": "... same concept",
    "rho": "ρ, bins 1:-1",
    "rho_null": "ρ, shuffled",
    "rho_counted": "ρ on our counts",
    "spearman": "rank r, no bins",
    "tail": "tail benchmark",
    "rest": "the rest",
    "counted_both": "rank r of our counts",
    "misaligned": "misaligned (%)",
    "seconds": "seconds",
}
NUM_BINS, INNER = 8, slice(1, -1)  # fewer than the paper's 12: 400 concepts, not 4,469
Table = dict[str, dict[str, float]]  # a run: concept -> assigned, text, image, integrated, accuracy

# -------------------------------------------------------------------------------------------------- scores of a concept


def zero_shot_classifier(prompts: Tensor) -> Tensor:
    """Text features (C, T, D), T prompts a class -> (D, C): normalise, mean, normalise. U:src/zero_shot_eval.py:90."""
    return zeroshot.zeroshot_classifier(prompts)


def per_class_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Logits (N, C) -> (percent, percent (C,) of each class, NaN if it has no samples). U:src/zero_shot_eval.py:238."""
    hits = zeroshot.label_ranks(logits, labels) < 1
    return zeroshot.percent(hits), zeroshot.per_class_accuracy(hits, labels, logits.shape[1])


def concept_recall(
    image: Tensor, text: Tensor, concepts: Concepts, k: int
) -> tuple[float, float, dict[str, float], dict[str, float]]:
    """Recall@k from image to text and from text to image, for all pairs and for each concept, as fractions.

    Source: U:src/retrieval_eval.py:164. image (I, D), text (nI, D); captions ni..ni+n-1 belong to image i. The
    text-to-image recall of a concept is the mean over its captions, its image-to-text recall the mean over its images.
    """
    text_to_image = torch.arange(len(image)).repeat_interleave(len(text) // len(image))
    to_text, to_image = (ranks < k for ranks in zeroshot.retrieval_ranks(image, text, text_to_image))
    t2i, i2t = to_image.double(), to_text.double()
    return (
        t2i.mean().item(),
        i2t.mean().item(),
        {name: t2i[rows].mean().item() for name, rows in concepts.to_texts.items()},
        {name: i2t[rows].mean().item() for name, rows in concepts.to_images.items()},
    )


# -------------------------------------------------------------------------------------------------------------- one run


@dataclasses.dataclass
class Config:
    """Evaluate runs. Prints a table and writes all metrics to RUN/results.json and RUN/results.md."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders of `concept_frequency.train`."""
    eval_set: str = "data/emoji/eval/names_ood"
    """Classification set in the CLIP-benchmark layout whose classes include the concepts."""
    views: int = 8
    """Fixed views of each test image, the first without augmentation; more views make accuracy less noisy."""
    spacy: str = "en_core_web_sm"
    """spaCy pipeline that tags the captions."""
    planted: tuple[int, ...] = ()
    """Percentages of captions to exchange: after each, the misalignment degree is measured again."""
    export: str | None = None
    """Write the run as a folder that open_clip loads as `local-dir:DIR` (shared/export.py), without evaluating it."""
    replay: str | None = None
    """results.json of `concept_frequency.replay`; its claims are added to the table."""
    batch_size: int = 256
    """Images or captions per forward pass."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Autocast of the encoders, as in training."""


def scored(
    model: torch.nn.Module, test: TestSet, names: list[str], settings: train.Config, cfg: Config, process: run.Process
) -> Tensor:
    """`train.zero_shot`, (K,) percent, for a model and its training settings."""
    tokenizer = open_clip.get_tokenizer(settings.model, context_length=model.context_length)
    precision = run.resolve_precision(cfg.precision, process.device)
    return train.zero_shot(model, tokenizer, test, names, cfg.views, process.device, precision, cfg.batch_size)


def evaluate_run(folder: Path, cfg: Config, process: run.Process) -> tuple[dict[str, float], Table]:
    """(metrics, {concept: {"assigned", "text", "image", "integrated", "accuracy"}}) of one run."""
    settings, model = train.load_run(folder, process.device)
    assigned = load_counts(folder / "frequencies.json")
    names = list(assigned)
    test = read_test_set(cfg.eval_set, names, cfg.workers)
    accuracy = scored(model, test, names, settings, cfg, process).double().numpy()

    counted = count_pairs(folder / "pairs.parquet", names, cfg.spacy)
    planted = count_exchanged(folder, settings, names, cfg.spacy, cfg.planted) if cfg.planted else {}
    frequency = np.array(list(assigned.values()))
    metrics = {
        "top1": float(accuracy.mean()),
        "misaligned": misaligned(counted),
        **{f"misaligned_{share}": misaligned(exchanged) for share, exchanged in planted.items()},
        "seconds": run.read_metrics(folder)[-1]["seconds"],
    }
    if np.ptp(frequency) > 1:  # if all are equally frequent, there is no curve
        metrics |= curve_metrics(frequency, accuracy, counted.both)
        for key, counts in (("counted_text", counted.text), ("counted_both", counted.both)):
            ours = dict(zip(names, counts.tolist(), strict=True))
            metrics[key], _ = frequency_agreement(assigned, ours)
    columns = {
        "assigned": frequency,
        "text": counted.text,
        "image": counted.image,
        "integrated": counted.both,
        "accuracy": accuracy,
    }
    table = {name: {key: values[i].item() for key, values in columns.items()} for i, name in enumerate(names)}
    return {name: value for name, value in metrics.items() if not math.isnan(value)}, table  # e.g. with few classes


def curve_metrics(frequency: np.ndarray, accuracy: np.ndarray, counted: np.ndarray) -> dict[str, float]:
    """Correlations and slopes of a run by assigned and counted frequency; also without bins, with shuffled scores."""
    curve, by_count = (log_linear_curve(each, accuracy, NUM_BINS) for each in (frequency, counted))
    null = permutation_null(frequency, accuracy, None, NUM_BINS, INNER)
    null = null[~np.isnan(null)]
    slope, flat = slope_per_decade(frequency, accuracy), unbinned(frequency, accuracy)
    return {
        "rho": correlation(curve, INNER)[0],
        "rho_all_bins": correlation(curve)[0],
        "rho_counted": correlation(by_count, INNER)[0],
        "rho_null": float(null.mean()) if len(null) else math.nan,
        "rho_null_std": float(null.std()) if len(null) else math.nan,
        "slope": slope["slope"],
        "slope_low": slope["low"],
        "slope_high": slope["high"],
        "r_log": flat["pearson"],
        "r_linear": float(np.corrcoef(frequency, accuracy)[0, 1]),
        "spearman": flat["spearman"],
    }


def count_pairs(path: Path, names: list[str], pipeline: str) -> count.Counted:
    """Count the concepts of an arm's corpus with count.py: in nouns of captions, in labels of images, and in both."""
    cfg = CountConfig(
        data=(str(path),), out=str(path.with_suffix("")), spacy=pipeline, query_spacy=pipeline, label_column="concept",
        phrases=False, workers=1,
    )  # fmt: skip
    with run.lock(Path(cfg.out)):
        return count.count_corpus(cfg, names)


def misaligned(counted: count.Counted) -> float:
    """The misalignment degree of a counted corpus in percent."""
    return 100 * counted.misaligned / counted.documents


def count_exchanged(
    folder: Path, settings: train.Config, names: list[str], pipeline: str, shares: Sequence[int]
) -> dict[int, count.Counted]:
    """Count a run's corpus again for each share in percent, after exchanging this share of its captions."""
    corpus, counted = read_corpus(settings.data, names, (), len(names), False), {}
    for share in shares:
        _, pairs = train.make_pairs(dataclasses.replace(settings, misaligned=share / 100), corpus)
        path = folder / f"exchanged-{share}.parquet"
        train.write_pairs(path, corpus, pairs)
        counted[share] = count_pairs(path, names, pipeline)
    return counted


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, Any]:
    """Metrics of a run and, under "concepts", its table, from `evaluate_run`.

    Cached in results.json and results.md beside the checkpoint until checkpoint or settings change.
    """
    folder = Path(path)
    setting = {key: getattr(cfg, key) for key in ("eval_set", "views", "spacy", "planted", "batch_size", "precision")}

    def measure() -> dict:
        metrics, table = evaluate_run(folder, cfg, process)
        rows = [{"metric": key, "value": f"{value:.3f}"} for key, value in metrics.items()]
        (folder / "results.md").write_text(evaluation.table(rows) + "\n")
        return {"metrics": metrics, "concepts": table}

    sources = [folder / "checkpoint.pt", *evaluation.files_of(cfg.eval_set)]
    found = evaluation.measured("concept_frequency", folder / "results.json", setting, sources, measure)
    return found["metrics"] | {"concepts": found["concepts"]}


def export_run(path: str, folder: str) -> None:
    """Export a run to open_clip. open_clip's preprocessing approximates the resize of `views`."""
    settings, model = train.load_run(path, "cpu")
    side, half = image_side(model), (0.5, 0.5, 0.5)
    near = {"mean": half, "std": half, "interpolation": "bilinear", "resize_mode": "squash"}
    config = export.named_config(settings.model, side)
    export.write(folder, model, config, model.state_dict(), plain_view(side), **near)


# ------------------------------------------------------------------------------------------------------------- two arms


def column(table: Table, key: str) -> np.ndarray:
    """(K,) values of `key` in the order of the table's concepts."""
    return np.array([row[key] for row in table.values()], dtype=np.float64)


def changes(reference: Sequence[Table], other: Sequence[Table]) -> tuple[np.ndarray, np.ndarray]:
    """(change of log10 frequency, gain in accuracy), each (S, K), from another arm to the reference arm, by seed."""
    pairs = list(zip(reference, other, strict=True))
    frequency = [np.log10(column(a, "assigned")) - np.log10(column(b, "assigned")) for a, b in pairs]
    return np.stack(frequency), np.stack([column(a, "accuracy") - column(b, "accuracy") for a, b in pairs])


def beside_zipf(own: Table, zipf: Table) -> dict[str, float]:
    """Metrics that compare an arm with the Zipf arm: slope of its accuracy on Zipf frequencies, changes by concept."""
    frequency, accuracy = column(zipf, "assigned"), column(own, "accuracy")
    found = {
        "slope_on_zipf": slope_per_decade(frequency, accuracy, 1)["slope"],
        "head": float(accuracy[frequency >= np.quantile(frequency, 0.9)].mean()),
    }
    if own is not zipf:
        (change,), (gain,) = changes([zipf], [own])
        found["within"] = within_slope(change, gain, 1)["slope"]
        found["change_r_log"] = float(np.corrcoef(change, gain)[0, 1])
        found["change_r_linear"] = float(np.corrcoef(frequency - column(own, "assigned"), gain)[0, 1])
    return found


def tail_benchmark(folder: Path, table: Table, cfg: Config) -> Path:
    """Write a tail benchmark for one seed: the half of the concepts that our counts in the Zipf arm find least often.

    Its images are those of the unseen style and held-out drawings of the other styles, on which no arm was trained,
    without near-duplicates. One image is drawn of each class that has more than one (the authors: 450 of more than
    450).
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts, out = folder / "counts.json", folder / "set"
    checkpoints.write_json(counts, {name: row["integrated"] for name, row in table.items()})
    images = (cfg.eval_set, *filter(lambda path: Path(path).is_dir(), [cfg.eval_set.replace("_ood", "_id")]))
    let_it_wag.build(
        let_it_wag.Config(
            counts=(str(counts),), images=tuple(dict.fromkeys(images)), out=str(out), n=len(table) // 2, per_class=1
        )
    )
    return out


def tail_accuracy(
    run_folder: Path, table: Table, benchmark: Path, cfg: Config, process: run.Process
) -> dict[str, float]:
    """{"tail": percent on the benchmark, "rest": percent on other concepts' images}, each among all K concepts."""
    settings, model = train.load_run(run_folder, process.device)
    names, tail = list(table), read_concepts(benchmark)
    test = read_test_set(str(benchmark), names, cfg.workers)
    accuracy = scored(model, test, names, settings, cfg, process)
    rest = [row["accuracy"] for name, row in table.items() if name not in tail]
    return {"tail": accuracy.nanmean().item(), "rest": float(np.mean(rest)), "tail_classes": len(tail)}


def add_comparisons(results: list[dict[str, Any]], cfg: Config, process: run.Process) -> None:
    """Add the metrics that compare each run ARM-seedN with zipf-seedN, for seeds that have both."""
    by_name = {Path(path).name: found for path, found in zip(cfg.runs, results, strict=True)}
    for folder, found in zip(map(Path, cfg.runs), results, strict=True):
        seed = folder.name.rpartition("-seed")[2]
        if (zipf := by_name.get(f"zipf-seed{seed}")) is not None:
            benchmark = tail_benchmark(folder.parent / f"let_it_wag-seed{seed}", zipf["concepts"], cfg)
            found |= tail_accuracy(folder, found["concepts"], benchmark, cfg, process)
            found |= beside_zipf(found["concepts"], zipf["concepts"])


# ----------------------------------------------------------------------------------------------------------- the script


def main(cfg: Config) -> list[dict[str, Any]] | None:
    """Evaluate every run. Returns the metrics of each."""
    process = run.setup(0, cfg.device)
    cli.check_counts(cfg, "views", "batch_size")
    cli.check_counts(cfg, "workers", least=0)
    if cfg.export:
        return export_run(export.single(cfg), cfg.export)
    return evaluation.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), METRICS)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
