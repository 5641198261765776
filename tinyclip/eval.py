"""Evaluate TinyCLIP runs and checkpoints: `python -m tinyclip.eval RUN_OR_CHECKPOINT...`.

The paper's evaluations (authors' code wkcn/TinyCLIP@ad981bf, `U:` = its src/): zero-shot, retrieval, parameters, MACs,
throughput, linear probe. Takes our run folders, the authors' checkpoints in either layout, folders of transformers and
open_clip, or MODEL@WEIGHTS of open_clip; and any CLIP-benchmark set.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import open_clip
import torch
import tyro
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shared import checkpoints, cli, evaluation, export, run, settings, zeroshot
from shared.clip import STATISTICS
from shared.errors import UserError
from shared.evalsets import EvalSet
from tinyclip.export import write_open_clip, write_transformers
from tinyclip.geometry import statistics_beside, weights_file
from tinyclip.masks import sparsity_warning
from tinyclip.model import CLIP, parameter_counts
from tinyclip.teacher import checked_clip
from tinyclip.train import image_transform

METRICS = {
    "names_ood/top1": "names OOD",
    "names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    "retrieval_ood/mean_recall": "recall OOD",
    "retrieval_id/mean_recall": "recall ID",
    "parameters_m": "parameters (M)",
    "block_parameters_m": "in blocks (M)",
    "macs_g": "MACs (G)",
    "pairs_per_second": "pairs/s",
}
# Files beside weights with activation, head width and image statistics, which shapes do not give
CONFIGURATIONS = ("config.json", "open_clip_config.json", "preprocessor_config.json")


@dataclasses.dataclass
class Config:
    """Evaluate runs; prints the numbers and writes all of them to RUN/results.json and RUN/results.md."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, checkpoint files in one of the authors' layouts, folders of transformers or open_clip, or
    MODEL@WEIGHTS of open_clip."""
    sets: tuple[str, ...] = ()
    """Evaluation sets in the CLIP-benchmark webdataset layout, for classification or retrieval; by default the run's
    eval_set, or the pictures held out from its training data; for other models, only size and speed are measured."""
    probe: tuple[str, ...] = ()
    """Sets with a train/ split for linear probes of the image features; none by default."""
    probe_c: settings.Positive = 0.316
    """Inverse L2 strength of the probe's logistic regression, the value in CLIP's README (its paper sweeps it)."""
    head_width: settings.Count = 64
    """Width of an attention head, for checkpoint files that do not contain it."""
    quick_gelu: bool | None = None
    """Activation (True: QuickGELU, False: GELU) of files that do not state it. The authors' files have GELU."""
    throughput: bool = True
    """Measure pairs per second; the machine should be idle otherwise."""
    export: str | None = None
    """Write the run as a folder that open_clip loads as `local-dir:DIR` (shared/export.py), without evaluating it."""
    layout: Literal["open_clip", "transformers"] = "open_clip"
    """Program that loads what --export writes; transformers: with CLIPModel.from_pretrained(DIR)."""
    batch_size: settings.Count = 256
    """Images or captions per forward pass."""
    workers: settings.Whole = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Autocast of the encoders, as in training."""


# ---------------------------------------------------------------------------------------------------- measurements


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, c: float = 0.316
) -> dict[str, float]:
    """CLIP's linear probe: logistic regression on unnormalised image features (N, D) and labels (N,), by L-BFGS with
    inverse L2 strength c, 1000 iterations. Returns top-1 and the mean accuracy per class, in percent.

    The paper's linear probe (section 4.4) is that of the Elevater toolkit; the authors have released no code for it.
    """
    fitted = LogisticRegression(C=c, max_iter=1000, random_state=0).fit(train_x.numpy(), train_y.numpy())
    hits = torch.from_numpy(fitted.predict(test_x.numpy())) == test_y
    per_class = zeroshot.per_class_accuracy(hits, test_y, int(test_y.max()) + 1)
    return {"probe_top1": zeroshot.percent(hits), "probe_mean_per_class": per_class.nanmean().item()}


def example(model: CLIP, batch: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """A batch of random images and full-length captions in the model's sizes."""
    size, text = model.geometry["vision"]["image_size"], model.geometry["text"]
    tokens = torch.ones(batch, text["context_length"], dtype=torch.long, device=device)
    tokens[:, -1] = text["vocab_size"] - 1
    return torch.rand(batch, 3, size, size, device=device), tokens


def macs(model: CLIP) -> float:
    """Multiply-accumulates of one image and one full-length caption, attention included, as in the model zoo."""
    device = model.logit_scale.device
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*example(model, 1, device))
    return counter.get_total_flops() / 2


@torch.no_grad()
def throughput(
    model: CLIP, batch: int = 32, seconds: float = 2.0, device: torch.device | str = "cpu", precision="fp32"
) -> dict:
    """Images, captions and pairs per second; 1 / pairs = 1 / images + 1 / captions. U:../measure_throughput.py:32."""
    device = torch.device(device)
    images, tokens = example(model, batch, device)
    rates = {}
    for name, encode in (
        ("images", lambda: model.encode_image(images)),
        ("captions", lambda: model.encode_text(tokens)),
    ):
        times, start = [], None
        while start is None or time.perf_counter() - start < seconds or len(times) < 5:
            begin = time.perf_counter()
            with run.autocast(precision, device):
                encode()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if start is None:  # the first call warms up
                start = time.perf_counter()
            else:
                times.append(time.perf_counter() - begin)
        rates[f"{name}_per_second"] = batch / sorted(times)[len(times) // 2]
    pairs = 1 / (1 / rates["images_per_second"] + 1 / rates["captions_per_second"])
    return rates | {"pairs_per_second": pairs}


# ---------------------------------------------------------------------------------------------------- one checkpoint


def export_run(path: str, folder: str, cfg: Config) -> None:
    """Write the run as a model of open_clip or transformers. UserError if these have no such towers."""
    write = {"open_clip": write_open_clip, "transformers": write_transformers}[cfg.layout]
    write(folder, checked_clip(path, path, cfg.head_width, cfg.quick_gelu), image_statistics(path), path)


def image_statistics(path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which a checkpoint's images are normalised."""
    return STATISTICS if evaluation.named(path) else statistics_beside(weights_file(Path(path)))


def probe_sets(cfg: Config, transform: Callable) -> list[tuple[EvalSet, EvalSet]]:
    """Both splits of each set of --probe. UserError for a set without classes, or for two sets of one name."""
    both = ("train", "test")
    splits = (evaluation.open_sets("probe", cfg.probe, transform, "classification", split=split) for split in both)
    return list(zip(*splits, strict=True))


def probes(
    model: CLIP, sets: list[tuple[EvalSet, EvalSet]], cfg: Config, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """`linear_probe` of each set, {"set/probe_top1": ...}."""
    found = {}
    for train, test in sets:
        features_and_labels = []
        for split, images in (("train", train), ("test", test)):
            batches = images.batches(cfg.batch_size, cfg.workers, device)
            features_and_labels += zeroshot.extract_image_features(
                model.encode_image, batches, device, dtype, f"{images.name} {split}"
            )
        metrics = linear_probe(*features_and_labels, cfg.probe_c)
        found |= {f"{test.name}/{metric}": value for metric, value in metrics.items()}
    return found


def sparsities(folder: Path) -> dict[str, float]:
    """Last logged sparsities of a run with masks; prints a warning if its pruned model is larger than intended."""
    lines, flat = run.read_metrics(folder), {}
    for key in ("sparsity_reached", "expected_sparsity", "target_sparsity"):
        found = [line[key] for line in lines if key in line]
        flat |= {key: found[-1]} if found else {}
    if "sparsity_reached" in flat:
        asked = checkpoints.read_json(folder / "config.json")["target_sparsity"]
        flat["target_sparsity"] = asked  # the logged target rises with the step, and may end lower in a short run
        if warning := sparsity_warning(flat["sparsity_reached"], asked):
            print(f"{folder}: {warning}, so the pruned model is larger than intended")
            flat["sparsity_missing"] = asked - flat["sparsity_reached"]
    return flat


def evaluate_run(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """All metrics of one checkpoint: {"names_ood/top1": ..., "parameters_m": ..., ...}."""
    model = checked_clip(path, path, cfg.head_width, cfg.quick_gelu).to(process.device)
    geometry = model.geometry
    if cfg.quick_gelu not in (None, geometry["quick_gelu"]):
        raise UserError(f"{path} says itself that QuickGELU is {geometry['quick_gelu']}: leave out --quick-gelu")
    transform = image_transform(geometry["vision"]["image_size"], statistics=image_statistics(path))
    precision = run.resolve_precision(cfg.precision, process.device)
    dtype = run.DTYPES[precision]
    probed = probe_sets(cfg, transform)  # opened first, so that errors come early
    results = zeroshot.evaluate(
        model,
        open_clip.SimpleTokenizer(context_length=geometry["text"]["context_length"]),
        transform,
        cfg.sets,
        process.device,
        cfg.batch_size,
        dtype,
        cfg.workers,
    )
    flat = probes(model, probed, cfg, process.device, dtype)
    flat |= {f"{name}/{metric}": value for name, metrics in results.items() for metric, value in metrics.items()}
    counts = parameter_counts(model)
    flat |= {f"{tower}_parameters_m": counts[tower] / 1e6 for tower in ("image", "text", "total")}
    flat["parameters_m"] = (counts["image"] + counts["text"]) / 1e6  # without token embedding, as in names of models
    blocks = (p.numel() for name, p in model.named_parameters() if "resblocks" in name)
    flat["block_parameters_m"] = sum(blocks) / 1e6  # of transformer blocks, which masks prune
    flat["macs_g"] = macs(model) / 1e9
    if cfg.throughput:
        flat |= throughput(model, device=process.device, precision=precision)
    if (Path(path) / "metrics.jsonl").exists():
        flat |= sparsities(Path(path))
    return evaluation.without_nan(flat)


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`evaluate_run`, stored beside the checkpoint in results.json and results.md; not repeated if nothing changed, and
    for --throughput only on the same machine and device."""
    cfg = dataclasses.replace(cfg, sets=evaluation.sets_of(path, cfg.sets))
    sets, files = (*cfg.sets, *cfg.probe), []
    if not evaluation.named(path):
        weights = weights_file(Path(path))
        files = [weights, *(weights.with_name(name) for name in CONFIGURATIONS)]
    where = {"machine": run.machine(), "device": str(process.device)} if cfg.throughput else {}
    return evaluation.measured_run(path, cfg, sets, lambda _: evaluate_run(path, cfg, process), files, **where)


def main(cfg: Config) -> list[dict[str, float]] | None:
    """Evaluate every run. Returns the metrics of each run."""
    process = run.setup(0, cfg.device)
    settings.check_limits(cfg)
    cfg.runs = tuple(path.removeprefix(export.LOCAL) for path in cfg.runs)
    if cfg.export:
        return export_run(export.single(cfg), cfg.export, cfg)
    kinds = "run folder, checkpoint file or MODEL@WEIGHTS"
    results = evaluation.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), METRICS, kinds)
    return results


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
