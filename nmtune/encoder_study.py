"""The controlled study of one encoder: `python -m nmtune.encoder_study --encoder RUN`, on the embedded corpus.

NMTune (arXiv 2309.17002), sections 2 to 4, for an encoder that `nmtune.pretrain` trained at one noise ratio:
  1. encode once: V training views of the tuning set, one view of the in-domain and of the out-of-domain test set
  2. the spectrum of the test features: SVE, LSVR in the three centring modes
  3. tune every head from several seeds; accuracy in and out of domain, and the spectrum of what the head makes of F
Numbers go to RUN/study.json, singular values to RUN/spectra.npz; `nmtune.eval --report` compares encoders by them.
"""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from nmtune.config import PRESETS, StudyConfig
from nmtune.datasets import open_labelled
from nmtune.eval import CENTRES, accuracy, feature_spectrum, largest_singular_value_ratio, singular_value_entropy
from nmtune.features import Bank, BankLoader, encode_set, split_encoder
from nmtune.model import covariance_loss, dominant_singular_value_loss, load_encoder, transformed
from nmtune.train import make_head, tune
from shared import checkpoints, cli, run


def spectrum_metrics(features: Tensor, center: str = "sample") -> dict[str, float]:
    """{"sve", "lsvr", "share"} of F (M, D); share = sigma_1 / sum sigma, in per cent."""
    s = feature_spectrum(features, center=center)
    lsvr = largest_singular_value_ratio(s)
    return {"sve": singular_value_entropy(s).item(), "lsvr": lsvr.item(), "share": 100 * torch.exp(-lsvr).item()}


@torch.no_grad()
def head_metrics(head: nn.Module, tests: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Top-1 in per cent on each test set; of NMTune's head also the spectrum, L_COV and leading share of its z."""
    head.eval()
    results = {}
    for name, (features, labels) in tests.items():
        z, logits = transformed(head, features)
        results[name] = 100 * accuracy(logits, labels)
        if z is not features:
            spectrum = spectrum_metrics(z)
            results |= {f"{part}_{name}": value for part, value in spectrum.items()}
            results[f"cov_{name}"] = covariance_loss(z).item()
            results[f"top5_{name}"] = -500 * dominant_singular_value_loss(z).item()
    return results


def study_task(
    cfg: StudyConfig, task: str, process: run.Process
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """({"METHOD/METRIC": one number a seed, "METRIC@CENTRE": [one number]}, singular values by name) of one task."""
    source, name, checkpoint = split_encoder(cfg.encoder, None)
    encoder, dim, train_view, eval_view = load_encoder(source, name, checkpoint)
    encoder.to(process.device, memory_format=torch.channels_last)
    sets = {part: open_labelled(f"data/emoji:{task}:{part}") for part in ("tune", "id", "ood")}
    label = f"{Path(cfg.encoder).name} {task}"
    options = {"process": process, "precision": run.resolve_precision("auto", process.device), "label": label}
    views = Bank(*encode_set(encoder, sets["tune"], train_view, views=cfg.bank, **options))
    plain = Bank(*encode_set(encoder, sets["tune"], eval_view, **options))
    tests = {}
    for part in ("id", "ood"):
        features, labels = encode_set(encoder, sets[part], eval_view, **options)
        tests[part] = features[0], labels

    numbers: dict[str, list[float]] = {}
    spectra = {f"F/{part}": feature_spectrum(features).numpy() for part, (features, _) in tests.items()}
    for center in CENTRES:
        for part, (features, _) in tests.items():
            for metric, value in spectrum_metrics(features, center).items():
                numbers[f"{metric}_{part}@{center}"] = [value]
    jobs = [(method, seed) for method in cfg.methods for seed in range(cfg.seeds)]
    for method, seed in run.progress(jobs, len(jobs), label, 1, process):
        preset = dataclasses.replace(PRESETS[method][1], epochs=cfg.epochs, batch_size=cfg.batch_size)
        torch.manual_seed(seed)
        head = make_head(preset, dim, sets["tune"].num_classes)
        bank = plain if preset.views == "eval" else views
        loader = BankLoader(bank, cfg.batch_size, seed, two=preset.views != "eval")
        arguments = preset.epochs, preset.lr, preset.weight_decay, preset.weights, preset.warmup, preset.svd_k
        tune(preset.method, head, loader, *arguments)
        for metric, value in head_metrics(head, tests).items():
            numbers.setdefault(f"{method}/{metric}", []).append(value)
        if seed == 0 and preset.method != "lp":
            with torch.no_grad():
                for part, (features, _) in tests.items():
                    spectra[f"{method}/{part}"] = feature_spectrum(head.transform(features)).numpy()
    return numbers, spectra


def main(cfg: StudyConfig) -> None:
    """Study a finished encoder, unless its study.json is of the same checkpoint, settings and code."""
    process = run.setup(0, cfg.device)
    folder = Path(cfg.encoder)
    state = checkpoints.load_checkpoint(folder / "checkpoint.pt")
    if state["epoch"] < state["config"]["epochs"]:
        raise ValueError(f"{folder} is not finished: {state['epoch']} of {state['config']['epochs']} epochs")
    unknown = [method for method in cfg.methods if method not in PRESETS]
    if unknown or cfg.seeds < 1 or cfg.bank < 2:
        what = f"--methods knows no {unknown[0]!r}" if unknown else "--seeds starts at 1, --bank at 2"
        raise ValueError(f"{what}; methods are presets of nmtune.train")
    file, setting = folder / "study.json", json.loads(json.dumps(dataclasses.asdict(cfg) | {"code": run.commit()}))
    if file.exists() and file.stat().st_mtime > (folder / "checkpoint.pt").stat().st_mtime:
        if checkpoints.read_json(file)["setting"] == setting:
            print(f"{file} is there, of the same checkpoint and settings; nothing to do")
            return
    start, tasks, spectra = time.perf_counter(), {}, {}
    for task in cfg.tasks:
        tasks[task], found = study_task(cfg, task, process)
        spectra |= {f"{task}/{name}": values for name, values in found.items()}
        shown = {m: [np.mean(tasks[task][f"{m}/{part}"]) for part in ("id", "ood")] for m in cfg.methods}
        line = ", ".join(f"{method} {i:.2f} / {o:.2f}" for method, (i, o) in shown.items())
        print(f"{folder.name}, {task}, top-1 ID / OOD in %: {line}", flush=True)
    with checkpoints.replaced(folder / "spectra.npz") as kept:
        np.savez(kept, **spectra)
    about = {"setting": setting, "noise": state["noise"], "kind": state["config"]["kind"], "commit": state["commit"]}
    seconds = {"pretrain_seconds": state["seconds"], "study_seconds": time.perf_counter() - start}
    checkpoints.write_json(file, about | seconds | {"tasks": tasks})


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(StudyConfig)))
