"""Evaluate ProtoCLIP and CLIP checkpoints: `python -m protoclip.eval RUN_OR_CHECKPOINT...`.

The paper's evaluations (authors' code megvii-research/protoclip@fde1933, `U:` = its src/): zero-shot, linear probe,
retrieval, agreement of image clusters with classes, modality gap. All use z, without the heads. Takes our run folders
and upstream's checkpoint files (`--model RN50`), and any CLIP-benchmark evaluation set.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    calinski_harabasz_score,
    davies_bouldin_score,
    silhouette_score,
)
from torch import Tensor, nn

from protoclip.model import ProtoCLIP, create_model, image_statistics, kmeans
from protoclip.views import whole_image
from shared import checkpoints, cli, evaluation, export, run
from shared.clip import image_side
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.pictures import by_picture
from shared.probes import nearest_neighbour, sgd_probe
from shared.settings import Count, Whole, check_limits
from shared.zeroshot import (
    encode_texts,
    evaluate,
    extract_image_features,
    percent,
)

METRICS = {  # printed metrics and their headings
    "bare_names_ood/top1": "names OOD",
    "bare_names_id/top1": "names ID",
    "subgroups_ood/probe_best": "probe OOD",
    "subgroups_id/probe_best": "probe ID",
    "bare_names_id/probe_best": "probe names ID",
    "subgroups_ood/nearest": "neighbour OOD",
    "subgroups_id/nearest": "neighbour ID",
    "subgroups_ood/ami": "AMI OOD (0-1)",
    "retrieval_xm_en/mean_recall": "recall OOD",
    "modality_gap": "gap (0-2)",
    "seconds": "seconds",
}


@dataclasses.dataclass
class Config:
    """Evaluate runs; prints the numbers and writes all of them to RUN/results.json and RUN/results.md."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, checkpoint files in upstream's layout, or MODEL@PRETRAINED of open_clip, such as RN50@openai."""
    model: str = "RN50"
    """open_clip config of checkpoint files that do not contain its name."""
    quick_gelu: bool | None = None
    """Activation (True: QuickGELU, False: GELU) of checkpoint files without projection heads. True for CLIPs of the
    authors' trainer."""
    sets: tuple[str, ...] = ()
    """Evaluation sets in the CLIP-benchmark webdataset layout, for classification or retrieval; by default the run's
    eval_set, or the pictures held out from its training data."""
    probe: tuple[str, ...] = ()
    """Sets with a train/ split for linear probes, and for cluster scores if images outnumber classes. The features of
    the last one are kept in features.npz."""
    logistic: bool = False
    """Also fit scikit-learn's logistic regression (C 0.316, 1000 iterations), upstream's other protocol."""
    gap: str | None = None
    """Retrieval set on which the gap between images and their first captions is measured; None skips it."""
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


# ---------------------------------------------------------------------------------------------------- measurements


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, init: tuple[Tensor, Tensor] | None = None
) -> dict:
    """SGD probe on *unnormalised* z: 100 epochs, lr 0.1, cosine, batch 1024. U:training/evaluations/linear_eval.py:12.

    As upstream, no shuffling. Upstream reports `best`, the best test top-1 of all epochs; `final` is the last epoch's.
    Returns both in percent, the final weight (C, E) and bias (C,), and the `hits` (N,) of `best`. `init` sets the
    initial weight and bias.
    """
    probe = sgd_probe(train_x, train_y, test_x, test_y, init=init)
    return {name: getattr(probe, name) for name in ("best", "final", "weight", "bias", "hits")}


def logistic_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, C: float = 0.316) -> float:
    """Top-1 in percent of CLIP's linear probe, by scikit-learn's L-BFGS with inverse L2 strength C."""
    model = LogisticRegression(C=C, max_iter=1000, random_state=0).fit(train_x.cpu().numpy(), train_y.cpu().numpy())
    return percent(torch.from_numpy(model.predict(test_x.cpu().numpy())) == test_y.cpu())


def feature_statistics(image: Tensor, text: Tensor) -> dict[str, float]:
    """Modality gap, self-similarity and spread of paired features (N, E). U:training/evaluations/analyze_features.py:5.

    The gap is the distance between the two means. Self-similarity averages the positive entries of the full cosine
    matrix, including the diagonal.
    """

    def self_similarity(x: Tensor) -> float:
        x = F.normalize(x, dim=-1)
        total = count = 0.0
        for rows in x.split(4096):
            cosine = (rows @ x.T).double()
            total, count = total + cosine.clamp(min=0).sum().item(), count + (cosine > 0).sum().item()
        return total / count

    return {
        "image_avg_self_similarity": self_similarity(image),
        "text_avg_self_similarity": self_similarity(text),
        "modality_gap": (image.mean(0) - text.mean(0)).norm().item(),
        "image_feature_std": image.std(0).mean().item(),
        "text_feature_std": text.std(0).mean().item(),
    }


def clustering_scores(features: Tensor, labels: Tensor) -> dict[str, float]:
    """How well features (N, E) group by class labels (N,): ARI and AMI of K-means (K = classes), and cluster indices.

    ARI and AMI compare the clusters with the labels; the indices take the labels as clusters (upstream's take its
    K-means clusters of training features). Sources: U:training/evaluations/zero_shot.py:79 (niter 100, nredo 5),
    U:training/clustering.py:167 (silhouette of at most 5,000 rows).
    """
    x, y = features.float().numpy(), labels.numpy()
    found = kmeans(features, int(y.max()) + 1, niter=100, nredo=5)[0].numpy()
    return {
        "ari": float(adjusted_rand_score(found, y)),
        "ami": float(adjusted_mutual_info_score(found, y)),
        "n_cluster": len(np.unique(y)),
        "silhouette": float(silhouette_score(x, y, sample_size=min(5000, len(x)), random_state=0)),
        "davies_bouldin": float(davies_bouldin_score(x, y)),
        "calinski_harabasz": float(calinski_harabasz_score(x, y)),
    }


# ------------------------------------------------------------------------------------------------------ checkpoints


def load_model(path: str | Path, name: str = "RN50", quick_gelu: bool | None = None) -> tuple[ProtoCLIP, str]:
    """(model in eval mode, open_clip config name) of a run folder, or of a checkpoint file in upstream's layout.

    Keys may have DistributedDataParallel's prefix `module.`; the heads' shape is read from the weights. `name` and
    `quick_gelu` are for files that do not state them. UserError if the weights do not fit the config, or if the
    activation is unknown: a file without heads may be of open_clip's trainer, where it depends on the config.
    """
    path = Path(path)
    state = checkpoints.load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
    content = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(content, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in content.items()):
        raise UserError(f"{path} holds no weights by name")
    if (paper := state.get("paper", "protoclip")) != "protoclip":
        raise UserError(f"{path} is of {paper}: use 'python -m {paper}.eval'")
    config = state.get("config") if isinstance(state.get("config"), dict) else {}
    weights = {key.removeprefix("module."): value for key, value in content.items()}
    linears = [weights[k] for k in sorted(weights) if k.startswith("text_projection_head.") and weights[k].ndim == 2]
    name = config.get("model", name)
    hidden = linears[0].shape[0] if linears else 0
    # `sorted` is by name, so the last Linear is found by its index
    last = max((int(k.split(".")[1]) for k in weights if k.startswith("text_projection_head.")), default=0)
    projection = weights[f"text_projection_head.{last}.weight"].shape[0] if linears else 0
    if quick_gelu is None and not (config or linears or "quickgelu" in name):
        raise UserError(
            f"{path} does not say whether its activation is QuickGELU: pass --quick-gelu True, right for CLIPs of "
            "the authors' trainer, or False"
        )
    quick_gelu, size = None if config or linears else quick_gelu, config.get("image_size")
    try:
        model = create_model(name, bool(linears), hidden, projection, len(linears) - 1, size, quick_gelu)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        why = checkpoints.one_line(error, 300)
        raise UserError(f"{path} does not hold the weights of {name} (another --model?): {why}") from error
    return model.eval(), name


def load_any(path: str, name: str, quick_gelu: bool | None = None) -> tuple[nn.Module, Callable, Callable]:
    """(model, image transform, tokenizer) of a run folder, a checkpoint file, or open_clip's MODEL@PRETRAINED."""
    if evaluation.named(path):
        return export.load_model(path)
    model, name = load_model(path, name, quick_gelu)
    return model, whole_image(model), open_clip.get_tokenizer(name, context_length=model.context_length)


def export_run(path: str, folder: str, name: str, quick_gelu: bool | None = None) -> None:
    """Write the towers as an open_clip model, without the projection heads, since evaluation uses z."""
    model, name = load_model(path, name, quick_gelu)
    config = export.named_config(name, image_side(model), quick_gelu=model.quick_gelu)
    extra = ("text_projection_head.", "image_projection_head.", "logit_scale_proto")
    towers = {key: value for key, value in model.state_dict().items() if not key.startswith(extra)}
    mean, std = image_statistics(model)
    export.write(folder, model, config, towers, whole_image(model), mean=mean, std=std)


# ---------------------------------------------------------------------------------------------------- one checkpoint


def evaluate_run(
    path: str, cfg: Config, process: run.Process
) -> tuple[dict[str, float], tuple[Tensor, Tensor, list] | None]:
    """All metrics of one checkpoint, {"bare_names_ood/top1": ..., "subgroups_ood/probe_best": ...}.

    Also returns (unit image features, labels, class names) of the last probe set, for plots.
    """
    model, transform, tokenizer = load_any(path, cfg.model, cfg.quick_gelu)
    model.to(process.device)
    splits = ("train", "test")
    probed = [evaluation.open_sets("probe", cfg.probe, transform, "classification", split=split) for split in splits]
    paired = evaluation.open_sets("gap", [cfg.gap] if cfg.gap else [], transform, "retrieval")
    dtype = run.DTYPES[run.resolve_precision(cfg.precision, process.device)]
    results = evaluate(model, tokenizer, transform, cfg.sets, process.device, cfg.batch_size, dtype, cfg.workers)
    flat = {f"{name}/{metric}": value for name, metrics in results.items() for metric, value in metrics.items()}
    top1 = [metrics["top1"] for metrics in results.values() if "top1" in metrics]
    if len(top1) > 1:  # upstream's "average" is the plain mean
        flat["mean_top1"] = sum(top1) / len(top1)

    def features(images: EvalSet) -> tuple[Tensor, Tensor | list]:
        loader = images.batches(cfg.batch_size, cfg.workers, process.device)
        return extract_image_features(
            model.encode_image, loader, process.device, dtype, f"{images.name} {images.split}"
        )

    shown = None
    encoded: list[Path] = []  # the training shards of `train_x`
    for train, test in zip(*probed, strict=True):
        label, shards = test.name, train.shards
        if len(shards) != len(encoded) or not all(a.samefile(b) for a, b in zip(shards, encoded, strict=True)):
            (train_x, train_y), encoded = features(train), shards  # sets may share shards by hard links
        test_x, test_y = features(test)
        probe = linear_probe(train_x, train_y, test_x, test_y)
        flat |= {f"{label}/probe_{key}": probe[key] for key in ("best", "final")}
        flat |= by_picture(f"{label}/probe_best", 100 * probe["hits"])
        if cfg.logistic:
            flat[f"{label}/probe_logistic"] = logistic_probe(train_x, train_y, test_x, test_y)
        flat[f"{label}/nearest"] = nearest_neighbour(train_x, train_y, test_x, test_y)
        unit = F.normalize(test_x, dim=-1)
        if len(unit) > int(test_y.max()) + 1:  # the silhouette needs more images than classes
            flat |= {f"{label}/{key}": value for key, value in clustering_scores(unit, test_y).items()}
        shown = unit, test_y, test.classnames
    for pairs in paired:
        images, captions = features(pairs)
        first = encode_texts(
            model.encode_text, tokenizer, [c[0] for c in captions], cfg.batch_size, process.device, dtype
        )
        flat |= feature_statistics(F.normalize(images, dim=-1), F.normalize(first, dim=-1))
    return evaluation.without_nan(flat), shown


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`evaluate_run`, stored beside the checkpoint: results.json, results.md, and features.npz of the last probe set.

    Results of MODEL@PRETRAINED go to runs/protoclip/MODEL@PRETRAINED. Not repeated if nothing has changed
    (`evaluation.measured_run`).
    """
    other = cfg.probe or cfg.gap
    cfg = dataclasses.replace(cfg, sets=(evaluation.sets_of if other else evaluation.needed)(path, cfg.sets))

    def measure(folder: Path) -> dict[str, float]:
        metrics, shown = evaluate_run(path, cfg, process)
        if shown is not None:
            folder.mkdir(parents=True, exist_ok=True)
            x, y, names = shown
            with checkpoints.replaced(folder / "features.npz") as file:
                np.savez(file, x=x.numpy(), y=y.numpy(), names=np.array(names, dtype=np.str_))
        return metrics

    return evaluation.measured_run(path, cfg, (*cfg.sets, *cfg.probe, cfg.gap), measure)


def main(cfg: Config) -> list[dict[str, float]] | None:
    """Evaluate every run. Returns the metrics of each run."""
    check_limits(cfg)
    process = run.setup(0, cfg.device)
    if cfg.export:
        return export_run(export.single(cfg), cfg.export, cfg.model, cfg.quick_gelu)
    kinds = "run folder, checkpoint file or MODEL@PRETRAINED"
    return evaluation.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), METRICS, kinds)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
