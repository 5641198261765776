"""Measure tuned heads, or compare the encoders of a study: `python -m nmtune.eval RUN... [--report FILE]`.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning@f249dce, `U:src/models/`eval.py, svd.py, pca.py.
  - run folders of nmtune.train: accuracy, balanced accuracy and the spectrum of F and z on every test set
  - encoder folders ARM-seedN with a study.json (nmtune.study), with --report: tables, claims with verdicts, plots
The analysis itself, `feature_spectrum` and so on, is in analysis.py.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from open_clip.transform import PreprocessCfg, image_transform_v2

from nmtune.analysis import (  # noqa: F401
    CENTRES,
    accuracy,
    balanced_accuracy,
    feature_spectrum,
    largest_singular_value_ratio,
    pmk_accuracy,
    project_logits,
    singular_value_entropy,
)
from nmtune.claims import ARMS, METRICS, compare, draw_spectrum, finish_spectra  # noqa: F401
from nmtune.config import Config as TrainConfig
from nmtune.datasets import vid_robust
from nmtune.model import head_from, split_upstream, transformed
from nmtune.pretrain import build
from nmtune.pretrain_config import PretrainConfig
from nmtune.train import Source, test_metrics
from shared import checkpoints, cli, evaluation, export, run


@dataclasses.dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders of nmtune.train; with --report, encoder folders ARM-seedN of nmtune.pretrain and nmtune.study."""
    tests: tuple[str, ...] = ()
    """Test sets as NAME=PATH instead of the run's own."""
    head: str = ""
    """A state dict exported from the authors' tuned model, in the place of the run's own head."""
    centre: str = "sample"
    """Centring before the spectrum: sample (svd.py), none (the paper's words), sample+feature (pca.py)."""
    export: str | None = None
    """Write a CLIP of nmtune.pretrain as a folder that open_clip loads as `local-dir:DIR`, and measure nothing."""
    report: str | None = None
    """Compare all encoders and write this file with claims and verdicts."""
    batch_size: int = 256
    """Images per forward pass."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "fp32"
    """Autocast of the encoder, as in training."""


@torch.no_grad()
def evaluate_run(path: str, cfg: Config, process: run.Process) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """({"SET/METRIC": number}, singular values by name) of one tuned head."""
    state = checkpoints.load_checkpoint(Path(path) / "checkpoint.pt")
    if "head" not in state:
        raise ValueError(f"{path} holds no head of nmtune.train; encoders are compared with --report")
    settings = state["config"] | {"tests": tuple(cfg.tests or state["config"]["tests"])}
    settings |= {"workers": cfg.workers, "precision": cfg.precision}
    source = Source(TrainConfig(**settings), process, cfg.batch_size)
    weights = split_upstream(checkpoints.load_checkpoint(cfg.head))[0] if cfg.head else state["head"]
    head = head_from(weights).to(process.device)
    results, spectra = test_metrics(head, source), {}
    for name in source.tests:
        features, *_ = source.test_set(name)
        z, _ = transformed(head.cpu(), features)
        for what, x in (("F", features), ("z", z)):
            s = feature_spectrum(x, center=cfg.centre)
            spectra[f"{name}/{what}"] = s.numpy()
            results[f"{name}/sve_{what}"] = singular_value_entropy(s).item()
            results[f"{name}/lsvr_{what}"] = largest_singular_value_ratio(s).item()
            results[f"{name}/share_{what}"] = 100 * (s.max() / s.sum()).item()
        if name == "vid_robust":
            frames, groups, accepted, sets = vid_robust(Path(source.tests[name]).parent)
            features, _ = source.encoded(frames, source.eval_view, 1, name)
            classes = project_logits(head(features[0]), groups)
            pm = pmk_accuracy(classes, accepted, sets)
            results |= {"vid_robust/pm0": 100 * pm[0], "vid_robust/pm10": 100 * pm[1]}
    return results, spectra


def export_run(path: str, folder: str) -> None:
    """A CLIP of nmtune.pretrain as an open_clip model; tuned heads and encoders of labels have no text tower."""
    state = checkpoints.load_checkpoint(Path(path) / "checkpoint.pt")
    if state["config"].get("kind") != "clip":
        raise ValueError(f"{path} cannot be exported: it has no text tower, which a model of open_clip needs")
    settings = PretrainConfig(**state["config"])
    model, _, side = build(settings)
    model.load_state_dict(state["state_dict"])
    model.output_dict = False
    transform = image_transform_v2(PreprocessCfg(side), is_train=False)
    export.write(folder, model.eval(), export.named_config(settings.model), model.state_dict(), transform)


def plot_spectra(spectra: dict[str, np.ndarray], path: Path) -> None:
    """Share of each singular value, before (F) and after (z) tuning, a panel a test set."""
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in spectra))
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for key, s in spectra.items():
            if key.rpartition("/")[0] == name:
                draw_spectrum(axis, s, {"F": "F, before tuning", "z": "z, after"}[key.rpartition("/")[2]])
        finish_spectra(axis, name)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(cfg: Config) -> None:
    process = run.setup(0, cfg.device)
    if not cfg.runs:
        raise ValueError("name at least one run folder")
    evaluation.check_report(cfg.report)
    if cfg.export:
        return export_run(export.single(cfg.runs), cfg.export)
    if cfg.centre not in CENTRES:
        raise ValueError(f"--centre is one of {', '.join(CENTRES)}, not {cfg.centre!r}")
    if cfg.report:
        compare([Path(path) for path in cfg.runs], Path(cfg.report))
        return
    for path in cfg.runs:
        metrics, spectra = evaluate_run(path, cfg, process)
        folder = Path(path)
        checkpoints.write_json(folder / "results.json", {"metrics": metrics})
        rows = [{"metric": key, "value": f"{value:.3f}"} for key, value in metrics.items()]
        (folder / "results.md").write_text(evaluation.table(rows) + "\n")
        if spectra:
            plot_spectra(spectra, folder / "spectra.png")
        shown = ", ".join(f"{key} {value:.2f}" for key, value in metrics.items() if key.endswith(("top1", "pm10")))
        print(f"{path}: {shown}", flush=True)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
