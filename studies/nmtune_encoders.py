"""What the study of NMTune measures of a pre-trained encoder: its spectrum, heads tuned on it, and its wrong labels.

Heads have the paper's settings (nmtune/config.py `PAPER`) and one tuning seed, that of pre-training.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nmtune.config import PAPER, PretrainConfig
from nmtune.datasets import open_labelled, open_test
from nmtune.encoders import create_model, load_encoder, timm_transforms
from nmtune.eval import CENTRES, accuracy, feature_spectrum, largest_singular_value_ratio, singular_value_entropy
from nmtune.features import Bank, encode_set, split_encoder
from nmtune.model import transformed
from nmtune.pretrain import NoisyLabels
from nmtune.train import tuned_head
from shared import checkpoints, evaluation, pictures, run

HEADS = {
    "lp": PAPER["lp"],
    "mlp": PAPER["mlp"],
    "nmtune": PAPER["nmtune"],
    **{f"no-{term}": dataclasses.replace(PAPER["nmtune"], **{f"w_{term}": 0.0}) for term in ("mse", "cov", "svd")},
}


class Task(NamedTuple):
    """A downstream task: data sets as paths of nmtune.datasets."""

    train: str
    tests: dict[str, str]
    """{name: path}; the first is in domain, the others are out of domain."""
    own: str = ""
    """Test set of the pre-training's own classes."""

    @property
    def options(self) -> str:
        """--data and --tests of nmtune.extract and nmtune.train."""
        return f"--data {self.train} --tests " + " ".join(f"{name}={path}" for name, path in self.tests.items())

    def in_and_out(self, name: str, found: dict[str, Any]) -> dict[str, float]:
        """{"NAME/id", "NAME/ood"}: a number of the first test, and the mean over the others."""
        first, *others = (found[test] for test in self.tests)
        return {f"{name}/id": float(first), f"{name}/ood": float(np.mean(others))}


def spectrum(features: Tensor, centre: str = "sample") -> dict[str, float]:
    """{"sve", "lsvr"} of features (M, D)."""
    s = feature_spectrum(features, centre=centre)
    return {"sve": singular_value_entropy(s).item(), "lsvr": largest_singular_value_ratio(s).item()}


def encoded(folder: Path, task: Task, process: run.Process) -> tuple[Bank, int, dict[str, tuple[Tensor, Tensor]]]:
    """Features of the evaluation view: (training set, number of classes, {test: (features (M, D), labels (M,))})."""
    encoder, _, _, view = load_encoder(*split_encoder(str(folder), None))
    encoder.to(process.device, memory_format=torch.channels_last)
    train, options = open_labelled(task.train), {"process": process, "precision": "auto", "label": folder.name}
    tests = {}
    for name, path in task.tests.items():
        features, labels = encode_set(encoder, open_test(path, train.classnames)[0], view, **options)
        tests[name] = features[0], labels
    return Bank(*encode_set(encoder, train, view, **options)), train.num_classes, tests


@torch.no_grad()
def head_metrics(head: nn.Module, tests: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, Any]]:
    """{"top1": {test: per cent, and of a small test by picture}}, and of NMTune's head {"sve", "lsvr"} of z."""
    found: dict[str, dict[str, Any]] = {"top1": {}}
    for name, (features, labels) in tests.items():
        z, logits = transformed(head.eval(), features)
        found["top1"][name] = 100 * accuracy(logits, labels)
        found["top1"] |= pictures.by_picture(name, 100 * (logits.argmax(dim=1) == labels))
        for metric, value in (spectrum(z) if z is not features else {}).items():
            found.setdefault(metric, {})[name] = value
    return found


def tuned(name: str, seed: int, bank: Bank, classes: int) -> nn.Module:
    """One of HEADS, tuned on one view of each image."""
    return tuned_head(dataclasses.replace(HEADS[name], seed=seed), bank, classes, 1, torch.device("cpu"))


@torch.no_grad()
def fitted(folder: Path, cfg: PretrainConfig, own: str, process: run.Process) -> dict[str, float]:
    """Per cent of the classifier's answers: on its training images without augmentation "fitted_right" (right labels
    predicted), "fitted_wrong" (wrong labels predicted) and "true_instead" (the true label in place of a wrong one); on
    the test set of its own classes "own"."""
    images = open_labelled(cfg.data)
    model, *_ = create_model(cfg, images.num_classes)
    model.load_state_dict(checkpoints.load_checkpoint(folder / "checkpoint.pt")["state_dict"])
    model.to(process.device, memory_format=torch.channels_last).eval()
    view, samples = timm_transforms(model.pretrained_cfg)[1], NoisyLabels(cfg, images)
    options = {"process": process, "precision": "auto", "label": f"{folder.name}, its own labels"}
    answers = encode_set(model, samples.images, view, **options)[0][0].argmax(dim=1).numpy()
    wrong, hit, true = samples.noisy, answers == samples.images.labels, answers == images.labels
    found = {"fitted_right": 100 * hit[~wrong].mean()}
    if wrong.any():
        found |= {"fitted_wrong": 100 * hit[wrong].mean(), "true_instead": 100 * true[wrong].mean()}
    if own:
        logits, labels = encode_set(model, open_labelled(own), view, **options)
        found["own"] = 100 * accuracy(logits[0], labels)
    return {name: float(value) for name, value in found.items()}


def measure(folder: Path, task: Task) -> dict[str, float]:
    """Metrics of a finished encoder; singular values of F and z are written to folder/spectra.npz.

    "HEAD/id" and "HEAD/ood" are accuracies in per cent (of one test: "HEAD/TEST"), "z/HEAD/METRIC/SPLIT" numbers of the
    spectrum of z, and "METRIC_SPLIT" and "METRIC_SPLIT@CENTRE" those of F. CLIPs have a linear probe alone.
    """
    process = run.setup(0, "auto")
    state = checkpoints.load_checkpoint(folder / "checkpoint.pt")
    cfg = checkpoints.config_in(state, PretrainConfig, folder)
    bank, classes, tests = encoded(folder, task, process)
    found = {"noise": 100 * state["noise"], "pretrain_seconds": state["seconds"]}
    if cfg.kind == "supervised":
        found |= fitted(folder, cfg, task.own, process)
    for centre in CENTRES:
        of = {name: spectrum(features, centre) for name, (features, _) in tests.items()}
        for metric in ("sve", "lsvr"):
            split = task.in_and_out(metric, {name: values[metric] for name, values in of.items()})
            named = {key.replace("/", "_"): value for key, value in split.items()}
            found |= {f"{key}@{centre}": value for key, value in named.items()} | (named if centre == "sample" else {})
    spectra = {f"F/{name}": feature_spectrum(features).numpy() for name, (features, _) in tests.items()}
    heads = HEADS if cfg.kind == "supervised" else ("lp",)
    for name in run.progress(heads, len(heads), f"{folder.name}, heads", 1, process):
        head = tuned(name, cfg.seed, bank, classes)
        for metric, of in head_metrics(head, tests).items():
            found |= task.in_and_out(name if metric == "top1" else f"z/{name}/{metric}", of)
            if metric == "top1":
                found |= {f"{name}/{test}": value for test, value in of.items()}
        if name in ("mlp", "nmtune"):
            with torch.no_grad():
                spectra |= {
                    f"{name}/{test}": feature_spectrum(head.transform(x)).numpy() for test, (x, _) in tests.items()
                }
    with checkpoints.replaced(folder / "spectra.npz") as kept:
        np.savez(kept, **spectra)
    return found


def measured(folder: Path, task: Task) -> dict[str, float]:
    """`measure`, cached in folder/results.json."""
    folders = {path.partition(":")[0] for path in (task.train, *task.tests.values(), task.own) if path}
    sources = [folder / "checkpoint.pt", *(file for each in folders for file in evaluation.files_of(each))]
    setting = {"task": task._asdict()}
    return evaluation.measured(
        "studies.nmtune_encoders", folder / "results.json", setting, sources, lambda: measure(folder, task)
    )
