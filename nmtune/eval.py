"""Evaluate tuned heads, and CLIPs zero-shot: `python -m nmtune.eval RUN...`.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning@f249dce, `U:`. The paper measures the effect of
pre-training noise by the singular values of a test set's features F (M, D): `feature_spectrum`,
`singular_value_entropy` (SVE), `largest_singular_value_ratio` (LSVR).
  - run folders of nmtune.train: accuracy, balanced accuracy and the spectrum of F and z on every test set
  - CLIPs of nmtune.pretrain with --sets: zero-shot accuracy and retrieval
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from nmtune.config import Config as TrainConfig
from nmtune.config import PretrainConfig
from nmtune.datasets import vid_robust
from nmtune.encoders import create_model, read_weights, split_upstream
from nmtune.features import RunFeatures
from nmtune.model import head_from, transformed
from shared import checkpoints, cli, evaluation, export, run, zeroshot
from shared.errors import UserError
from shared.pictures import by_picture
from shared.settings import Count, Whole, check_limits

CENTRES = ("none", "sample", "sample+feature")

# ------------------------------------------------------------------------------------------------------------- spectrum


def feature_spectrum(features: Tensor, normalize: bool = True, centre: str = "sample") -> Tensor:
    """Singular values of F (M, D), descending, fp64: (min(M, D),).

    `normalize` scales each row to length 1 first. `centre`: "none" (the text of sec. 2.3); "sample" subtracts from each
    row its own mean over D (U:src/models/svd.py:38-58; by their curves also figures 11 to 14); "sample+feature" also
    subtracts the mean over rows (U:src/models/pca.py:38).
    """
    if centre not in CENTRES:
        raise UserError(f"centre is one of {', '.join(CENTRES)}, not {centre!r}")
    x = features.double()
    if normalize:
        x = F.normalize(x, dim=1)
    if centre != "none":
        x = x - x.mean(dim=1, keepdim=True)
    if centre == "sample+feature":
        x = x - x.mean(dim=0)
    return torch.linalg.svdvals(x)


def singular_value_entropy(s: Tensor) -> Tensor:
    """SVE = -sum_i p_i ln p_i with p = s / sum(s), of singular values (K,) -> () in [0, ln K]. Zeros add 0. Eq. 1."""
    p = s / s.sum()
    return torch.special.entr(p).sum()


def largest_singular_value_ratio(s: Tensor) -> Tensor:
    """LSVR = -ln(s_1 / sum(s)) of singular values (K,) -> () >= 0; it rises if the largest's share falls. Eq. 2."""
    return -torch.log(s.max() / s.sum())


# ------------------------------------------------------------------------------------------------------------- accuracy


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy of logits (N, C) for labels (N,), a fraction in [0, 1]. U:src/models/eval.py:14-60."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Mean recall of the classes that occur, a fraction in [0, 1]. U:src/datasets/flowers102.py."""
    hits = torch.bincount(labels, (logits.argmax(dim=1) == labels).double())
    counts = torch.bincount(labels)
    return (hits / counts)[counts > 0].mean().item()


def project_logits(logits: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """(N, K) -> (N, G): the maximum over each group of classes; single-member groups select columns.

    ImageNet-A/-R: U:src/datasets/imagenet.py:105-111; ObjectNet: U:src/datasets/objectnet.py:110-120; Vid-Robust:
    U:src/datasets/imagenet_vid_robust.py:54-73.
    """
    members = torch.tensor([member for group in groups for member in group], device=logits.device)
    group_of = torch.repeat_interleave(torch.tensor([len(group) for group in groups])).to(logits.device)
    projected = logits.new_full((len(logits), len(groups)), -torch.inf)
    return projected.scatter_reduce_(1, group_of.expand(len(logits), -1), logits[:, members], "amax")


def pmk_accuracy(
    logits: Tensor, accepted: Sequence[Sequence[int]], sets: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """ImageNet-Vid-Robust's (pm-0, pm-k), fractions. U:src/datasets/imagenet_vid_robust.py:113-136.

    logits (frames, C); accepted[j] has the correct classes of frame j; a set lists frames, its anchor first.
    pm-0 is the share of correct anchors, pm-k the share of sets in which every frame is correct.
    """
    right = torch.tensor([p in ok for p, ok in zip(logits.argmax(dim=1).tolist(), accepted, strict=True)])
    anchors = right[torch.tensor([frames[0] for frames in sets])]
    every = torch.stack([right[torch.as_tensor(frames)].all() for frames in sets])
    return anchors.double().mean().item(), every.double().mean().item()


def accuracies(name: str, logits: Tensor, labels: Tensor, groups: list[list[int]] | None) -> dict[str, float]:
    """{"NAME/top1", "NAME/mean_per_class"} in per cent, of small sets top1 also by picture; `groups` of trained classes
    are projected onto the test's classes."""
    logits = logits if groups is None else project_logits(logits, groups)
    found = {
        f"{name}/top1": 100 * accuracy(logits, labels),
        f"{name}/mean_per_class": 100 * balanced_accuracy(logits, labels),
    }
    return found | by_picture(f"{name}/top1", 100 * (logits.argmax(dim=1) == labels))


@torch.no_grad()
def test_metrics(names: Iterable[str], test_set: Callable[[str], tuple]) -> dict[str, float]:
    """`accuracies` on test sets; test_set(name) -> (logits (M, C), labels (M,), groups of trained classes or None)."""
    return {metric: value for name in names for metric, value in accuracies(name, *test_set(name)).items()}


# ---------------------------------------------------------------------------------------------------------------- plots


def draw_spectrum(axis: plt.Axes, s: np.ndarray, label: str, **style) -> None:
    """Plot the share of each singular value, without those that centring makes 0."""
    share = s / s.sum()
    axis.plot(np.arange(1, len(s) + 1)[share > 1e-6], share[share > 1e-6], label=label, **style)


def finish_spectra(axis: plt.Axes, title: str) -> None:
    """Title, labels and legend of a panel of spectra."""
    axis.set(title=title, xlabel="i", ylabel="$\\sigma_i$ / sum of all", xscale="log", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def plot_spectra(spectra: dict[str, np.ndarray], path: Path) -> None:
    """Plot the share of each singular value before (F) and after (z) tuning, one panel per test set."""
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


# ----------------------------------------------------------------------------------------------------------- the script


@dataclasses.dataclass
class Config:
    """Evaluate runs; prints the numbers and writes all of them to RUN/results.json and RUN/results.md."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders of nmtune.train; with --sets or --export, of CLIPs of nmtune.pretrain."""
    tests: tuple[str, ...] = ()
    """Test sets as NAME=PATH instead of the run's own."""
    sets: tuple[str, ...] = ()
    """Evaluation sets in the CLIP-benchmark layout, for zero-shot evaluation of CLIPs of nmtune.pretrain."""
    head: str = ""
    """A state dict exported from the authors' tuned model, used instead of the run's own head."""
    centre: str = "sample"
    """Centring before the spectrum: sample (upstream's svd.py), none (the text of sec. 2.3), sample+feature (pca)."""
    export: str | None = None
    """Write a CLIP of nmtune.pretrain as a folder that open_clip loads as `local-dir:DIR`, without evaluating it."""
    batch_size: Count = 256
    """Images per forward pass."""
    workers: Whole = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "fp32"
    """Autocast of the encoder, as in training."""


def read_head(path: str, dim: int, num_classes: int) -> nn.Module:
    """The head in a file for `split_upstream`. UserError if it has none for `dim` features and `num_classes`."""
    weights = split_upstream(read_weights(path))[0]
    classifier = weights.get("classification_head.weight")
    if classifier is None or classifier.shape != (num_classes, dim):
        found = "no head" if classifier is None else "a head for {1} features and {0} classes".format(*classifier.shape)
        raise UserError(f"--head {path} holds {found}, but the run has {dim} features and {num_classes} classes")
    return head_from(weights)


@torch.no_grad()
def evaluate_run(path: str, cfg: Config, process: run.Process) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """({"SET/METRIC": number}, singular values by name) of one tuned head."""
    state = checkpoints.load_checkpoint(Path(path) / "checkpoint.pt")
    if "head" not in state:
        raise UserError(f"{path} holds no head of nmtune.train; CLIPs of nmtune.pretrain take --sets")
    settings = checkpoints.config_in(state, TrainConfig, path)
    changed = {"tests": tuple(cfg.tests or settings.tests), "workers": cfg.workers, "precision": cfg.precision}
    source = RunFeatures(dataclasses.replace(settings, **changed), process, cfg.batch_size)
    if state["classnames"] != source.classnames or state.get("data", source.fingerprint) != source.fingerprint:
        raise UserError(f"{path} was tuned on other data or on another encoder than there are now")
    head = read_head(cfg.head, source.dim, len(source.classnames)) if cfg.head else head_from(state["head"])
    results, spectra = {}, {}
    for name in source.tests:
        features, labels, groups = source.test_set(name)
        z, logits = transformed(head, features)
        results |= accuracies(name, logits, labels, groups)
        for what, x in (("F", features), ("z", z)):
            s = feature_spectrum(x, centre=cfg.centre)
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


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`evaluate_run`, printed and stored in the run folder: results.json, results.md, spectra.png."""
    evaluation.check_own(path, cfg)
    folder = Path(path)
    metrics, spectra = (zero_shot_metrics(path, cfg, process), {}) if cfg.sets else evaluate_run(path, cfg, process)
    checkpoints.write_json(folder / "results.json", {"metrics": metrics})
    (folder / "results.md").write_text(evaluation.all_numbers(metrics) + "\n")
    if spectra:
        plot_spectra(spectra, folder / "spectra.png")
    print(f"{path}:\n\n{evaluation.tables(metrics, {})}\n\nall metrics: {folder / 'results.md'}\n", flush=True)
    return metrics


def pretrained_clip(path: str) -> tuple[PretrainConfig, nn.Module, Callable]:
    """(settings, model in eval mode, evaluation transform) of a CLIP of nmtune.pretrain. UserError for other runs,
    which have no text tower."""
    state = checkpoints.load_checkpoint(Path(path) / "checkpoint.pt")
    settings = checkpoints.config_in(state, PretrainConfig, path)
    if settings.kind != "clip":
        raise UserError(
            f"{path} is no CLIP: it has no text tower, which zero-shot evaluation and a model of open_clip need"
        )
    model, _, side = create_model(settings)
    model.load_state_dict(state["state_dict"])
    model.output_dict = False
    return settings, model.eval(), image_transform_v2(PreprocessCfg(side), is_train=False)


def zero_shot_metrics(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """{"SET/METRIC": per cent} of a CLIP of nmtune.pretrain, zero-shot on `cfg.sets`."""
    settings, model, transform = pretrained_clip(path)
    tokenizer = open_clip.get_tokenizer(settings.model)
    options = cfg.sets, process.device, cfg.batch_size, cfg.precision, cfg.workers
    found = zeroshot.evaluate(model.to(process.device), tokenizer, transform, *options)
    return {f"{name}/{metric}": value for name, metrics in found.items() for metric, value in metrics.items()}


def export_run(path: str, folder: str) -> None:
    """Write a CLIP of nmtune.pretrain as an open_clip model."""
    settings, model, transform = pretrained_clip(path)
    export.write(folder, model, export.named_config(settings.model), model.state_dict(), transform)


def main(cfg: Config) -> list[dict[str, float]] | None:
    """Evaluate every tuned head. Returns the metrics of each run."""
    check_limits(cfg)
    process = run.setup(0, cfg.device)
    if not cfg.runs:
        raise UserError("name at least one run folder")
    if cfg.export:
        return export_run(export.single(cfg), cfg.export)
    if cfg.centre not in CENTRES:
        raise UserError(f"--centre is one of {', '.join(CENTRES)}, not {cfg.centre!r}")
    return [evaluated(path, cfg, process) for path in cfg.runs]


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
