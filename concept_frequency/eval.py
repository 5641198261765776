"""Evaluate our experiment with assigned frequencies: `python -m concept_frequency.eval RUN...`.

The paper (arXiv 2404.04125) relates the accuracy of each concept to its count; its own evaluation of any CLIP model is
evaluate.py. For each run of train.py, this script counts the concepts in its captions with our own pipeline (count.py),
measures their accuracy on images that no arm was trained on, and computes the curve (statistics.py).
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import open_clip
import torch
import tyro
from torch import Tensor

from concept_frequency import count, train
from concept_frequency.assigned import TestSet, plain_view, read_test_set, zero_shot
from concept_frequency.concepts import load_json
from concept_frequency.config import CountConfig
from concept_frequency.statistics import (
    correlation,
    frequency_agreement,
    log_linear_curve,
    permutation_null,
    slope_per_decade,
    unbinned,
)
from shared import cli, evaluation, export, run
from shared.clip import image_side
from shared.settings import Count, Whole, check_limits

METRICS = {  # metrics in the table of a run, with their headings
    "mean_per_class": "mean per class",
    "slope": "points a decade",
    "rho": "ρ, bins 1:-1",
    "rho_null": "ρ, shuffled",
    "rho_counted": "ρ on our counts",
    "spearman": "rank r, no bins",
    "counted_both": "rank r of our counts",
    "misaligned": "misaligned (%)",
    "seconds": "seconds",
}
NUM_BINS, INNER = 8, slice(1, -1)  # fewer than the paper's 12: 400 concepts, not 4,469
Table = dict[str, dict[str, float]]  # a run: concept -> assigned, text, image, integrated, accuracy


@dataclasses.dataclass
class Config:
    """Evaluate runs. Prints a table and writes all metrics to RUN/results.json and RUN/results.md."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders of `concept_frequency.train`."""
    eval_set: str = ""
    """Classification set in the CLIP-benchmark layout whose classes include the concepts; by default the run's."""
    views: Count = 8
    """Fixed views of each test image, the first without augmentation; more views make accuracy less noisy."""
    spacy: str = "en_core_web_sm"
    """spaCy pipeline that tags the captions."""
    export: str | None = None
    """Write the run as a folder that open_clip loads as `local-dir:DIR` (shared/export.py), without evaluating it."""
    batch_size: Count = 256
    """Images or captions per forward pass."""
    workers: Whole = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Autocast of the encoders, as in training."""


def scored(
    model: torch.nn.Module, test: TestSet, names: list[str], settings: train.Config, cfg: Config, process: run.Process
) -> Tensor:
    """`zero_shot`, (K,) percent, for a model and its training settings."""
    tokenizer = open_clip.get_tokenizer(settings.model, context_length=model.context_length)
    return zero_shot(model, tokenizer, test, names, cfg.views, process.device, cfg.precision, cfg.batch_size)


def evaluate_run(folder: Path, cfg: Config, process: run.Process) -> tuple[dict[str, float], Table]:
    """(metrics, {concept: {"assigned", "text", "image", "integrated", "accuracy"}}) of one run."""
    settings, model = train.load_run(folder, process.device)
    assigned = load_json(folder / "frequencies.json")
    names, frequency = list(assigned), np.array(list(assigned.values()))
    test = read_test_set(cfg.eval_set, names, cfg.workers)
    accuracy = scored(model, test, names, settings, cfg, process).double().numpy()
    counted = count_pairs(folder / "pairs.parquet", names, cfg.spacy)
    metrics = {
        "mean_per_class": float(accuracy.mean()),
        "misaligned": misaligned(counted),
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
        workers=1,
    )  # fmt: skip
    with run.lock(Path(cfg.out)):
        return count.count_corpus(cfg, names)


def misaligned(counted: count.Counted) -> float:
    """The misalignment degree of a counted corpus in percent."""
    return 100 * counted.misaligned / counted.documents


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, Any]:
    """Metrics of a run and, under "concepts", its table, from `evaluate_run`.

    Cached in results.json and results.md beside the checkpoint until checkpoint or settings change.
    """
    folder = Path(path)
    cfg = dataclasses.replace(cfg, eval_set=cfg.eval_set or evaluation.needed(path, (), "--eval-set")[0])
    setting = {key: getattr(cfg, key) for key in ("eval_set", "views", "spacy", "batch_size", "precision")}

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


def main(cfg: Config) -> list[dict[str, Any]] | None:
    """Evaluate every run. Returns the metrics of each."""
    process = run.setup(0, cfg.device)
    check_limits(cfg)
    if cfg.export:
        return export_run(export.single(cfg), cfg.export)
    return evaluation.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), METRICS)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
