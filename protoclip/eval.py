"""Evaluate ProtoCLIP and CLIP checkpoints: `python -m protoclip.eval RUN_OR_CHECKPOINT... [--report FILE]`.

The paper's evaluations (authors' code megvii-research/protoclip@fde1933, `U:` = its src/): zero-shot, linear probe,
retrieval, agreement of image clusters with classes, modality gap. Heads are not used; z is. Works on our run folders,
on upstream's checkpoint files (`--model RN50`), on the embedded corpus and on any CLIP-benchmark evaluation set.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from sklearn.manifold import TSNE
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    calinski_harabasz_score,
    davies_bouldin_score,
    silhouette_score,
)
from torch import Tensor

from protoclip.episodes import image_transform
from protoclip.model import ProtoCLIP, create_model, image_side, kmeans
from shared import report, run
from shared.evalsets import EvalSet
from shared.zeroshot import (
    encode_texts,
    evaluate,
    extract_image_features,
    logistic_probe,
    recall_metrics,
    retrieval_ranks_from_scores,
    sgd_probe,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

EMOJI = "data/emoji/eval/"


@dataclasses.dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, or checkpoint files in upstream's layout."""
    model: str = "RN50"
    """open_clip config of checkpoint files that do not name theirs."""
    sets: tuple[str, ...] = tuple(
        EMOJI + name
        for name in ("names_id", "names_ood", "subgroups_id", "subgroups_ood", "retrieval_id", "retrieval_ood")
    )
    """Evaluation sets in the CLIP-benchmark webdataset layout, for classification or retrieval as each says."""
    probe: tuple[str, ...] = (EMOJI + "subgroups_id", EMOJI + "subgroups_ood")
    """Sets with a train/ split for linear probes and cluster scores; give none to leave them out."""
    logistic: bool = False
    """Also fit scikit-learn's logistic regression (C 0.316, 1000 iterations), upstream's other protocol."""
    gap: str | None = EMOJI + "retrieval_ood"
    """Retrieval set whose images and first captions measure the modality gap; None leaves it out."""
    report: str | None = None
    """Also compare all runs, named ARM-seedN, and write this file with claims and verdicts."""
    batch_size: int = 256
    """Images or captions per forward pass."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """Autocast of the encoders, as in training."""


# ---------------------------------------------------------------------------------------------------- measurements


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    shuffle: bool = False,
    init: tuple[Tensor, Tensor] | None = None,
) -> dict:
    """SGD probe on *unnormalised* z: 100 epochs, lr 0.1, cosine, batch 1024. U:training/evaluations/linear_eval.py:12.

    Upstream does not shuffle and reports `best`, the best test top-1 of all epochs; `final` is the last epoch's.
    Returns both in percent, and the final weight (C, E) and bias (C,). `init` sets weight and bias to start from.
    """
    probe = sgd_probe(train_x, train_y, test_x, test_y, shuffle=shuffle, init=init)
    return {"best": probe.best, "final": probe.final, "weight": probe.weight, "bias": probe.bias}


def retrieval_metrics(scores: Tensor, text_to_image: Tensor) -> dict[str, float]:
    """R@1/5/10 both ways and their mean, percent, from scores (I, T). U:training/evaluations/coco_retrieval.py:136.

    An image's rank is that of the best of its captions.
    """
    return recall_metrics(*retrieval_ranks_from_scores(scores, text_to_image))


def feature_statistics(image: Tensor, text: Tensor) -> dict[str, float]:
    """Modality gap, self-similarity and spread of paired features (N, E). U:training/evaluations/analyze_features.py:5.

    The gap is the distance of the two means. Self-similarity averages the positive entries of the full cosine matrix,
    its diagonal included.
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
    """How well images group by class: ARI and AMI of K-means (K = classes) against labels, and indices of the labels.

    Sources: U:training/evaluations/zero_shot.py:79 (niter 100, nredo 5), U:training/clustering.py:167 (silhouette of at
    most 5,000 rows).
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


def load_model(path: str | Path, name: str = "RN50") -> tuple[ProtoCLIP, str]:
    """(model in eval mode, open_clip config name) of a run folder, or of a checkpoint file in upstream's layout.

    Keys may carry DistributedDataParallel's `module.`; the heads' shape is read off the weights. ValueError if the
    weights do not fit the config.
    """
    path = Path(path)
    state = run.load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
    config = state.get("config", {})
    weights = {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}
    linears = [weights[k] for k in sorted(weights) if k.startswith("text_projection_head.") and weights[k].ndim == 2]
    name = config.get("model", name)
    hidden = linears[0].shape[0] if linears else 0
    # `sorted` is by name, so the last Linear is found by its index
    last = max((int(k.split(".")[1]) for k in weights if k.startswith("text_projection_head.")), default=0)
    projection = weights[f"text_projection_head.{last}.weight"].shape[0] if linears else 0
    try:
        model = create_model(name, bool(linears), hidden, projection, len(linears) - 1, config.get("image_size"))
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        first = str(error).splitlines()[min(1, len(str(error).splitlines()) - 1)].strip()[:200]
        raise ValueError(f"{path} does not hold the weights of {name} (another --model?): {first}") from error
    return model.eval(), name


# ---------------------------------------------------------------------------------------------------- one checkpoint


def evaluate_run(
    path: str, cfg: Config, process: run.Process
) -> tuple[dict[str, float], tuple[Tensor, Tensor, list] | None]:
    """Every measurement of one checkpoint, flat: {"names_ood/top1": ..., "subgroups_ood/probe_best": ...}.

    Also (unit image features, labels, class names) of the last probe set, for `plot_features`.
    """
    model, name = load_model(path, cfg.model)
    model.to(process.device)
    transform = image_transform(image_side(model), train=False)
    tokenizer = open_clip.get_tokenizer(name, context_length=model.context_length)
    dtype = run.DTYPES[run.resolve_precision(cfg.precision, process.device)]
    results = evaluate(model, tokenizer, transform, cfg.sets, process.device, cfg.batch_size, dtype, cfg.workers)
    flat = {f"{name}/{metric}": value for name, metrics in results.items() for metric, value in metrics.items()}

    def features(folder: str, split: str) -> tuple[Tensor, Tensor | list]:
        loader = EvalSet(folder, transform, split).batches(cfg.batch_size, cfg.workers)
        return extract_image_features(model.encode_image, loader, process.device, dtype, f"{Path(folder).name} {split}")

    shown = None
    encoded: list[Path] = []  # training shards that `train_x` was encoded from
    for folder in cfg.probe:
        label, shards = Path(folder).name, sorted((Path(folder) / "train").glob("*.tar"))
        if len(shards) != len(encoded) or not all(a.samefile(b) for a, b in zip(shards, encoded, strict=True)):
            (train_x, train_y), encoded = features(folder, "train"), shards  # sets may share them by hard links
        test_x, test_y = features(folder, "test")
        for suffix, shuffle in (("", False), ("_shuffled", True)):
            probe = linear_probe(train_x, train_y, test_x, test_y, shuffle)
            flat |= {f"{label}/probe{suffix}_{key}": probe[key] for key in ("best", "final")}
        if cfg.logistic:
            flat[f"{label}/probe_logistic"] = logistic_probe(train_x, train_y, test_x, test_y, C=0.316).final
        unit = F.normalize(test_x, dim=-1)
        flat |= {f"{label}/{key}": value for key, value in clustering_scores(unit, test_y).items()}
        shown = unit, test_y, EvalSet(folder, transform).classnames
    if cfg.gap:
        images, captions = features(cfg.gap, "test")
        first = encode_texts(
            model.encode_text, tokenizer, [c[0] for c in captions], cfg.batch_size, process.device, dtype
        )
        flat |= feature_statistics(F.normalize(images, dim=-1), F.normalize(first, dim=-1))
    return flat, shown


# ------------------------------------------------------------------------------------------------ comparing the arms

ARMS = {  # run folders ARM-seedN, in the order of the paper's argument
    "clip": "CLIP",
    "clip-light-aug": "CLIP, ProtoCLIP's augmentation at paper scale",
    "clip-equal-time": "CLIP, as many seconds as ProtoCLIP",
    "proto-no-pbt": "+ prototypes, no back translation",
    "proto-pbt": "+ back translation",
    "protoclip": "+ external teacher = ProtoCLIP",
}
METRICS = {
    "names_ood/top1": "names OOD",
    "names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    "subgroups_ood/probe_best": "probe OOD (best)",
    "subgroups_ood/probe_final": "probe OOD (final)",
    "subgroups_id/probe_best": "probe ID (best)",
    "subgroups_ood/ami": "AMI OOD (0-1)",
    "retrieval_ood/mean_recall": "recall OOD",
    "modality_gap": "gap (0-2)",
    "seconds": "seconds",
}


def claims() -> list[report.Claim]:
    """The paper's claims in the terms of the embedded corpus (CC2.5M numbers: README of upstream, 8 GPUs)."""
    return [
        report.Claim("linear probe above CLIP", "+5.81 IN", "subgroups_ood/probe_best", "protoclip", "clip", 1, 5.81),
        report.Claim("... and at equal time", None, "subgroups_ood/probe_best", "protoclip", "clip-equal-time"),
        report.Claim("... light augmentation alone", None, "subgroups_ood/probe_best", "clip-light-aug", "clip"),
        report.Claim("zero-shot above CLIP", "+2.01 IN", "names_ood/top1", "protoclip", "clip", 1, 2.01),
        report.Claim("... and at equal time", None, "names_ood/top1", "protoclip", "clip-equal-time"),
        report.Claim("... light augmentation alone", None, "names_ood/top1", "clip-light-aug", "clip"),
        report.Claim("back translation helps zero-shot", "claimed", "names_ood/top1", "proto-pbt", "proto-no-pbt"),
        report.Claim(
            "back translation helps the probe", "claimed", "subgroups_ood/probe_best", "proto-pbt", "proto-no-pbt"
        ),
        report.Claim("external teacher helps zero-shot", "claimed", "names_ood/top1", "protoclip", "proto-pbt"),
        report.Claim(
            "external teacher helps the probe", "claimed", "subgroups_ood/probe_best", "protoclip", "proto-pbt"
        ),
        report.Claim(
            "image clusters closer to classes (AMI x 100)", "claimed", "subgroups_ood/ami", "protoclip", "clip"
        ),
        report.Claim(
            "retrieval slightly lower", "-0.79 COCO", "retrieval_ood/mean_recall", "protoclip", "clip", -1, -0.79
        ),
    ]


def cost(method: list[dict], baseline: list[dict]) -> dict[str, str]:
    """Training seconds a sample, ProtoCLIP's over CLIP's, as upstream's README has them for one GPU."""
    ratios = [m["seconds"] / b["seconds"] for m, b in zip(method, baseline, strict=True)]
    row = report.judge(
        report.Claim("training time, ProtoCLIP / CLIP", "1.79x", "seconds", "", "", 1), ratios, [1.0] * len(ratios)
    )
    return row | {"here": f"{report.spread(ratios)['mean']:.2f}x"}


def compare(runs: list[str], results: list[dict[str, float]], path: Path) -> None:
    """Group runs by arm and seed, judge the claims, print the tables, write `path` and the plots beside the runs."""
    arms: dict[str, dict[int, dict]] = {}
    folders: dict[str, list[Path]] = {}
    commits: set[str] = set()
    for folder, values in zip(map(Path, runs), results, strict=True):
        arm, _, seed = folder.name.rpartition("-seed")
        if not arm or not seed.isdigit():
            raise ValueError(f"--report compares run folders named ARM-seedN, not {folder}")
        state = run.load_checkpoint(folder / "checkpoint.pt")
        if state["episode"] < state["config"]["episodes"]:
            raise ValueError(f"{folder} is not finished: {state['episode']} of {state['config']['episodes']} episodes")
        commits.add(state.get("commit", "unknown"))
        arms.setdefault(arm, {})[int(seed)] = values
        folders.setdefault(arm, []).append(folder)
    if "clip-equal-time" in arms:  # its number of episodes was set beforehand: say how well the times agree
        seconds = [sum(values["seconds"] for values in arms[arm].values()) for arm in ("clip-equal-time", "protoclip")]
        if abs(seconds[0] / seconds[1] - 1) > 0.1:
            print(f"note: clip-equal-time took {seconds[0] / seconds[1]:.2f} times ProtoCLIP's seconds")
    order = [arm for arm in ARMS if arm in arms] + sorted(set(arms) - set(ARMS))
    seeds = sorted(next(iter(arms.values())))
    for arm in order:
        if sorted(arms[arm]) != seeds:
            raise ValueError(f"arm {arm} has seeds {sorted(arms[arm])}, but {next(iter(arms))} has {seeds}")
    by_seed = {arm: [arms[arm][seed] for seed in seeds] for arm in order}
    rows = []
    for claim in claims():
        if claim.method in by_seed and claim.baseline in by_seed:
            method, baseline = (
                [values[claim.metric] for values in by_seed[arm]] for arm in (claim.method, claim.baseline)
            )
            rows.append(report.judge(claim, method, baseline))
    if {"clip", "protoclip"} <= set(by_seed):
        rows.append(cost(by_seed["protoclip"], by_seed["clip"]))
    rows.append(report.untestable("YFCC-15M: CLIP's accuracy in 33 % of its time", "claimed", "needs YFCC-15M"))
    rows.append(
        report.untestable("absolute ImageNet, COCO and 10-set numbers", "55.22 / 21.47 / 22.52", "needs CC2.5M")
    )
    summary = report.results("ProtoCLIP (arXiv 2206.10996)", seeds, by_seed, rows, commits)
    report.save(path, summary)
    plot_curves(folders, order, path.parent)
    print(f"\nEmbedded emoji corpus, a stand-in for CC2.5M; seeds {', '.join(map(str, seeds))}; percent; mean ± std\n")
    print(report.arms_table(summary["arms"], METRICS))
    print(f"\nDifferences paired by seed, ± 95 % interval\n\n{report.table(rows)}\n\nwritten to {path}")


def plot_curves(folders: dict[str, list[Path]], order: list[str], out: Path) -> None:
    """protoclip_curves.png: zero-shot accuracy over steps and over seconds, modality gap over steps; mean of seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for color, arm in zip(plt.get_cmap("tab10").colors, order, strict=False):
        logs = [run.read_metrics(folder) for folder in folders[arm]]
        points = [[line for line in log if "zero_shot_top1" in line] for log in logs]
        gaps = [[line for line in log if "modality_gap" in line] for log in logs]
        mean = lambda lines, key: np.mean([[line[key] for line in each] for each in lines], axis=0)  # noqa: E731
        axes[0].plot(
            mean(points, "step"),
            mean(points, "zero_shot_top1"),
            color=color,
            marker="o",
            ms=3,
            label=ARMS.get(arm, arm),
        )
        axes[1].plot(mean(points, "seconds"), mean(points, "zero_shot_top1"), color=color, marker="o", ms=3)
        axes[2].plot(mean(gaps, "step"), mean(gaps, "modality_gap"), color=color)
    titles = (
        ("step", "emoji names OOD, top-1 (%)"),
        ("training seconds", "emoji names OOD, top-1 (%)"),
        ("step", "modality gap, training batch"),
    )
    for axis, (x, y) in zip(axes, titles, strict=True):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "protoclip_curves.png", dpi=110)
    plt.close(figure)


def plot_features(panels: list[tuple[str, Tensor, Tensor, list]], path: Path) -> None:
    """t-SNE of unit image features (N, E), coloured by class (the 12 largest), with their K-means prototypes.

    A panel is (title, features, labels, class names); of more than 3,000 rows, evenly spaced ones are drawn.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 6), squeeze=False)
    for axis, (title, x, y, names) in zip(axes[0], panels, strict=True):
        rows = torch.arange(0, len(x), math.ceil(len(x) / 3000))
        x, y = x[rows], y[rows]
        _, prototypes = kmeans(x, min(int(y.max()) + 1, len(x)))
        flat = TSNE(init="pca", random_state=0, perplexity=min(30, len(x) - 1)).fit_transform(
            torch.cat([x, prototypes])
        )
        points, centres = flat[: len(x)], flat[len(x) :]
        axis.scatter(*points.T, s=5, color="0.85")
        largest = torch.bincount(y).argsort(descending=True)[:12].tolist()
        for color, label in zip(plt.get_cmap("Paired").colors, largest, strict=False):
            axis.scatter(*points[(y == label).numpy()].T, s=12, color=color, label=names[label])
        axis.scatter(*centres.T, s=22, marker="x", color="black", linewidths=0.8, label="prototypes")
        axis.set(title=title, xticks=[], yticks=[])
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`evaluate_run`, kept beside the checkpoint: results.json, results.md, features.png, and features.npz for plots.

    Not repeated while it is newer than checkpoint and evaluation sets and was made with the same settings and code.
    """
    checkpoint = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    folder = checkpoint.parent if Path(path).is_dir() else checkpoint.with_suffix(".eval")
    file = folder / "results.json"
    setting = {
        key: value
        for key, value in dataclasses.asdict(cfg).items()
        if key not in ("runs", "report", "workers", "device")
    }
    setting = json.loads(json.dumps(setting | {"code": run.commit()}))
    if file.exists() and checkpoint.exists():
        sets = [Path(folder) for folder in (*cfg.sets, *cfg.probe, *([cfg.gap] if cfg.gap else []))]
        sources = [checkpoint, *(tar for folder in sets for tar in folder.glob("*/*.tar"))]
        kept = report.load(file)
        if kept.get("setting") == setting and all(file.stat().st_mtime > source.stat().st_mtime for source in sources):
            return kept["metrics"]
    metrics, shown = evaluate_run(path, cfg, process)
    if Path(path).is_dir():
        metrics["seconds"] = run.read_metrics(folder)[-1]["seconds"]
    folder.mkdir(exist_ok=True)
    rows = [{"metric": key, "value": f"{value:.3f}"} for key, value in metrics.items()]
    (folder / "results.md").write_text(report.table(rows) + "\n")
    if shown is not None:
        x, y, names = shown
        np.savez(folder / "features.npz", x=x.numpy(), y=y.numpy(), names=np.array(names, dtype=np.str_))
        plot_features([(title(path), *shown)], folder / "features.png")
    run.write_json(file, {"setting": setting, "metrics": metrics})
    return metrics


def title(path: str) -> str:
    arm = Path(path).name.rpartition("-seed")[0]
    return ARMS.get(arm, Path(path).name)


def main(cfg: Config) -> None:
    process = run.setup(0, cfg.device)
    if not cfg.runs:
        raise ValueError("name at least one run folder or checkpoint file")
    results = []
    for path in cfg.runs:
        results.append(evaluated(path, cfg, process))
        shown = ", ".join(f"{heading} {results[-1][key]:.2f}" for key, heading in METRICS.items() if key in results[-1])
        print(f"{path}: {shown}", flush=True)
    if cfg.report:
        compare(list(cfg.runs), results, Path(cfg.report))
        pair = [path for arm in ("clip", "protoclip") for path in cfg.runs if Path(path).name == f"{arm}-seed0"]
        if len(pair) == 2 and cfg.probe:
            files = [np.load(Path(path) / "features.npz", allow_pickle=False) for path in pair]
            panels = [
                (title(path), torch.from_numpy(file["x"]), torch.from_numpy(file["y"]), file["names"].tolist())
                for path, file in zip(pair, files, strict=True)
            ]
            plot_features(panels, Path(cfg.report).parent / "protoclip_features.png")


if __name__ == "__main__":
    run.command_line(lambda: main(tyro.cli(Config)))
