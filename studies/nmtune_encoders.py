"""The controlled study of one encoder: `python -m studies.nmtune_encoders --encoder RUN`, on the embedded corpus.

For an encoder that `nmtune.pretrain` trained at one noise ratio, as in the study of NMTune (arXiv 2309.17002):
  1. encode once: V training views of the tuning set, one view of the in-domain and of the out-of-domain test set
  2. measure the spectrum of the test features: SVE and LSVR in the three centring modes
  3. tune every head for every task; measure accuracy in and out of domain and the spectrum of the head's z, and for
     comparison the accuracy of the nearest neighbour
Writes numbers to RUN/study.json and singular values to RUN/spectra.npz, which the study compares (`encoder_metrics`).
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from nmtune.config import PRESETS, PretrainConfig
from nmtune.datasets import LabelledImages, open_labelled
from nmtune.eval import CENTRES, accuracy, feature_spectrum, largest_singular_value_ratio, singular_value_entropy
from nmtune.fast_losses import covariance_loss, dominant_singular_value_loss
from nmtune.features import Bank, encode_set, split_encoder
from nmtune.model import load_encoder, transformed
from nmtune.train import tuned_head
from shared import checkpoints, cli, evaluation, pictures, probes, run
from shared.errors import UserError
from shared.settings import Count, check_limits


@dataclasses.dataclass
class StudyConfig:
    """The controlled study of one pre-trained encoder: its spectrum, and heads tuned on its features."""

    encoder: str = "runs/nmtune/sup-30-seed0"
    """Run folder of `python -m nmtune.pretrain`; study.json and spectra.npz are written into it."""
    tasks: tuple[str, ...] = ("group", "subgroup")
    """Labels of the downstream tasks on held-out emoji: group, subgroup, name."""
    methods: tuple[str, ...] = ("lp", "mlp", "nmtune")
    """Heads to tune, named by presets of nmtune.train."""
    seeds: int = 1
    """Number of tuning seeds of every head."""
    bank: int = 4
    """Training views of each image, encoded once; two of them are drawn in every step."""
    epochs: Count = 15
    """Passes over the training set."""
    batch_size: Count = 64
    """Images per step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


class Encoded(NamedTuple):
    """Features of all drawings in the splits of the corpus that pre-training has not seen."""

    images: dict[str, LabelledImages]
    """By split: tune, id, ood."""
    plain: dict[str, Tensor]
    """Features (N, D) of the evaluation view, by split."""
    views: Tensor
    """Features (V, N, D) of training views of the split tune."""

    def indices(self, split: str, images: LabelledImages) -> Tensor:
        """Indices (M,) of the drawings `images`, a subset of the split, in the split's features."""
        known = {key: i for i, key in enumerate(self.images[split].keys.tolist())}
        return torch.tensor([known[key] for key in images.keys.tolist()])


def encode_splits(cfg: StudyConfig, process: run.Process) -> Encoded:
    """Features of the splits tune, id and ood; their drawings are the same for all tasks."""
    encoder, _, train_view, eval_view = load_encoder(*split_encoder(cfg.encoder, None))
    encoder.to(process.device, memory_format=torch.channels_last)
    images = {split: open_labelled(f"data/emoji:group:{split}") for split in ("tune", "id", "ood")}
    options = {"process": process, "precision": "auto", "label": Path(cfg.encoder).name}
    plain = {split: encode_set(encoder, each, eval_view, **options)[0][0] for split, each in images.items()}
    if all(PRESETS[method][1].views == "eval" for method in cfg.methods):
        return Encoded(images, plain, plain["tune"][None])  # no head needs more views
    return Encoded(images, plain, encode_set(encoder, images["tune"], train_view, views=cfg.bank, **options)[0])


def spectrum_metrics(features: Tensor, center: str = "sample") -> dict[str, float]:
    """{"sve", "lsvr", "share"} of F (M, D); share = sigma_1 / sum sigma, in per cent."""
    s = feature_spectrum(features, center=center)
    lsvr = largest_singular_value_ratio(s)
    return {"sve": singular_value_entropy(s).item(), "lsvr": lsvr.item(), "share": 100 * torch.exp(-lsvr).item()}


@torch.no_grad()
def head_metrics(head: nn.Module, tests: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Top-1 in per cent on each test set; for NMTune's head also the spectrum, L_COV and leading share of z."""
    head.eval()
    results = {}
    for name, (features, labels) in tests.items():
        z, logits = transformed(head, features)
        results[name] = 100 * accuracy(logits, labels)
        results |= pictures.by_picture(name, 100 * (logits.argmax(dim=1) == labels))
        if z is not features:
            spectrum = spectrum_metrics(z)
            results |= {f"{split}_{name}": value for split, value in spectrum.items()}
            results[f"cov_{name}"] = covariance_loss(z).item()
            results[f"top5_{name}"] = -500 * dominant_singular_value_loss(z).item()
    return results


def study_task(
    cfg: StudyConfig, task: str, encoded: Encoded, process: run.Process
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Results of one task: {"METHOD/METRIC": one number per seed, "nearest/SPLIT": [top-1 of the nearest neighbour]},
    and {"METHOD/SPLIT": singular values of z}."""
    sets = {split: open_labelled(f"data/emoji:{task}:{split}") for split in encoded.images}
    indices = {split: encoded.indices(split, images) for split, images in sets.items()}
    labels = {split: torch.from_numpy(images.labels) for split, images in sets.items()}
    tests = {split: (encoded.plain[split][indices[split]], labels[split]) for split in ("id", "ood")}
    views = Bank(encoded.views[:, indices["tune"]], labels["tune"])
    plain = Bank(encoded.plain["tune"][None, indices["tune"]], labels["tune"])
    found = {split: probes.nearest_neighbour(plain.features[0], plain.labels, *test) for split, test in tests.items()}
    numbers: dict[str, list[float]] = {f"nearest/{split}": [top1] for split, top1 in found.items()}
    spectra: dict[str, np.ndarray] = {}
    heads = [(method, seed) for method in cfg.methods for seed in range(cfg.seeds)]
    for method, seed in run.progress(heads, len(heads), f"{Path(cfg.encoder).name} {task}", 1, process):
        preset = dataclasses.replace(PRESETS[method][1], epochs=cfg.epochs, batch_size=cfg.batch_size, seed=seed)
        bank, count = (plain, 1) if preset.views == "eval" else (views, 2)
        head = tuned_head(preset, bank, sets["tune"].num_classes, count, torch.device("cpu"))
        for metric, value in head_metrics(head, tests).items():
            numbers.setdefault(f"{method}/{metric}", []).append(value)
        if seed == 0 and preset.method != "lp":
            with torch.no_grad():
                for split, (features, _) in tests.items():
                    spectra[f"{method}/{split}"] = feature_spectrum(head.transform(features)).numpy()
    return numbers, spectra


def encoder_metrics(folder: Path) -> dict[str, float]:
    """Metrics of an encoder: means over tuning seeds and tasks, and "TASK/METHOD/SPLIT" for each task; spectral metrics
    of the default centring have plain names."""
    study = checkpoints.read_json(folder / "study.json")
    tasks = {
        task: {metric: pictures.mean(values) for metric, values in of.items()} for task, of in study["tasks"].items()
    }
    first = next(iter(tasks.values()))
    numbers = {metric: pictures.mean([of[metric] for of in tasks.values()]) for metric in first}
    tops = [metric for metric in first if metric.endswith(("/id", "/ood"))]
    numbers |= {f"{task}/{metric}": of[metric] for task, of in tasks.items() for metric in tops}
    numbers |= {metric.removesuffix("@sample"): value for metric, value in study["spectrum"].items()}
    seconds = {"pretrain_seconds": study["pretrain_seconds"], "study_seconds": study["study_seconds"]}
    return numbers | seconds | {"noise": 100 * study["noise"]}


def main(cfg: StudyConfig) -> None:
    """Study a finished encoder, unless its study.json is from the same checkpoint, data, settings and code."""
    process = run.setup(0, cfg.device)
    check_limits(cfg)
    folder = Path(cfg.encoder)
    state = checkpoints.load_checkpoint(folder / "checkpoint.pt")
    pretrained = checkpoints.config_in(state, PretrainConfig, folder)
    if state["epoch"] < pretrained.epochs:
        raise UserError(f"{folder} is not finished: {state['epoch']} of {pretrained.epochs} epochs")
    if unknown := [method for method in cfg.methods if method not in PRESETS]:
        raise UserError(f"--methods knows no {unknown[0]!r}; methods are presets of nmtune.train")
    check_limits(cfg)
    file = folder / "study.json"
    images = evaluation.files_of("data/emoji") + evaluation.files_of("data/emoji/eval/names_ood")
    sources = evaluation.stamp([folder / "checkpoint.pt", *images])
    setting = dataclasses.asdict(cfg) | {"code": evaluation.code_of("studies.nmtune_encoders"), "sources": sources}
    setting = json.loads(json.dumps(setting))
    if file.exists() and checkpoints.read_json(file).get("setting") == setting:
        print(f"{file} exists for this checkpoint, these data and these settings; nothing to do")
        return
    start, tasks = time.perf_counter(), {}
    encoded = encode_splits(cfg, process)
    tests = {split: encoded.plain[split] for split in ("id", "ood")}
    spectra = {f"F/{split}": feature_spectrum(features).numpy() for split, features in tests.items()}
    spectrum = {
        f"{metric}_{split}@{center}": value
        for center in CENTRES
        for split, features in tests.items()
        for metric, value in spectrum_metrics(features, center).items()
    }
    for task in cfg.tasks:
        tasks[task], found = study_task(cfg, task, encoded, process)
        spectra |= {f"{task}/{name}": values for name, values in found.items()}
        shown = {m: [np.mean(tasks[task][f"{m}/{split}"]) for split in ("id", "ood")] for m in cfg.methods}
        line = ", ".join(f"{method} {i:.2f} / {o:.2f}" for method, (i, o) in shown.items())
        print(f"{folder.name}, {task}, top-1 ID / OOD in %: {line}", flush=True)
    with checkpoints.replaced(folder / "spectra.npz") as kept:
        np.savez(kept, **spectra)
    about = {"setting": setting, "noise": state["noise"], "kind": pretrained.kind, "commit": state["commit"]}
    seconds = {"pretrain_seconds": state["seconds"], "study_seconds": time.perf_counter() - start}
    checkpoints.write_json(file, about | seconds | {"spectrum": spectrum, "tasks": tasks})


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(StudyConfig)))
