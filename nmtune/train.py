"""Tune a head on frozen features: `python -m nmtune.train [PRESET] [--overrides]`, or just `--features FILE.npz`.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning@f249dce, `U:`. Three arms:
  lp      linear classifier on the features of the evaluation view            U:src/models/finetune.py:53-60,112-147
  mlp     NMTune's head on two training views, cross-entropy alone            U:src/models/nml_tune.py, weights 0
  nmtune  the same with the three regularisers, the paper's contribution      U:src/models/nml_tune.py:106-182
The encoder is a black box that is never trained; of several processes each encodes its share of a batch, features are
gathered, and all take the same step of the small head, so that W processes do what one does.
Heads and losses are in model.py, views and feature files in features.py, data sets in datasets.py.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nmtune.analysis import accuracy, balanced_accuracy, project_logits
from nmtune.config import EMOJI, PRESETS, Config, FinetuneConfig, check
from nmtune.datasets import SIZES, LabelledImages, benchmark, open_labelled, open_test
from nmtune.features import (
    Bank,
    FeatureSets,
    TwoViews,
    Views,
    bank_batches,
    collate,
    encode,
    encode_set,
    extract_features,  # noqa: F401
    gather_views,
    read_features,
    subset_per_class,
    with_rand_augment,
)
from nmtune.model import NMTuneHead, load_encoder, make_classifier, nmtune_loss, transformed
from nmtune.noise import flip_labels
from nmtune.pretrain_config import PretrainConfig
from shared import checkpoints, cli, data, run

# ------------------------------------------------------------------------------------------------------------ one step


def cosine_lr(base: float, warmup: int, total: int, step: int) -> float:
    """Learning rate at `step`, set before the step is taken. U:src/models/utils.py:15-32.

    base (t+1)/W in the W steps of warm-up, then base (1 + cos(pi (t-W)/(T-W)))/2; the last step's is not quite 0.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * base


def make_head(cfg: Config, dim: int, num_classes: int) -> nn.Module:
    """nn.Linear for lp, NMTuneHead for mlp and nmtune, in torch's order of random numbers."""
    if cfg.method == "lp":
        return make_classifier(dim, num_classes)
    return NMTuneHead(dim, num_classes, cfg.ratio, cfg.layers, cfg.residual, cfg.scale_init)


def make_optimizer(head: nn.Module | list[nn.Parameter], lr: float, wd: float) -> torch.optim.Optimizer:
    """AdamW with decay on *all* trained parameters: BatchNorm's, biases and the residual's scale, too."""
    parameters = head.parameters() if isinstance(head, nn.Module) else head
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=wd, fused=True)


def train_step(
    head: nn.Module,
    feats: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    weights: tuple[float, float, float] = (1.0, 0.04, 0.001),
    k: int = 5,
) -> dict[str, Tensor]:
    """One optimizer step on feats (n, D) = [view w; view s] -> {"loss", "ce", "mse", "cov", "svd"}, detached.

    labels (n,), or (n/2,) which both views share. A linear head has no z of its own: cross-entropy alone.
    """
    head.train()
    labels = labels.repeat(len(feats) // len(labels))
    z, logits = transformed(head, feats)
    loss, parts = nmtune_loss(logits, labels, z, feats, weights if z is not feats else (0.0, 0.0, 0.0), k)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.detach()} | {name: part.detach() for name, part in parts.items()}


def tune(
    method: str,
    head: nn.Module,
    loader: Iterable,
    epochs: int,
    lr: float,
    wd: float,
    weights: tuple[float, float, float] = (1.0, 0.04, 0.001),
    warmup: int = 0,
    k: int = 5,
) -> list[dict[str, float]]:
    """Tune `head` in place on features in memory; -> a line {"loss", ..., "lr"} a step. The script's loop is `main`'s.

    method lp, mlp or nmtune; `weights` count for nmtune alone. `loader`, with a length, gives one epoch's batches each
    time: (feats (n, D), labels), or ((feats_w, feats_s), labels) with labels of one view.
    """
    if method not in ("lp", "mlp", "nmtune"):
        raise ValueError(f"method is lp, mlp or nmtune, not {method!r}")
    weights = weights if method == "nmtune" else (0.0, 0.0, 0.0)
    optimizer, steps, history = make_optimizer(head, lr, wd), len(loader), []
    for epoch in range(epochs):
        for i, (feats, labels) in enumerate(loader):
            feats = torch.cat(list(feats)) if isinstance(feats, (tuple, list)) else feats
            now = optimizer.param_groups[0]["lr"] = cosine_lr(lr, warmup, epochs * steps, epoch * steps + i)
            parts = train_step(head, feats, labels, optimizer, weights, k)
            history.append({name: part.item() for name, part in parts.items()} | {"lr": now})
    return history


# ----------------------------------------------------------------------------------------------------- data of a run


def split_encoder(name: str, checkpoint: str | None) -> tuple[str, str, str | None]:
    """`timm:NAME`, `open_clip:NAME` or a run folder of pretrain -> (source, name, checkpoint)."""
    if (Path(name) / "checkpoint.pt").is_file():
        pretrained = checkpoints.config_in(
            checkpoints.load_checkpoint(Path(name) / "checkpoint.pt"), PretrainConfig, name
        )
        return "open_clip" if pretrained.kind == "clip" else "timm", pretrained.model, name
    source, _, model = name.partition(":")
    if source not in ("timm", "open_clip") or not model:
        raise ValueError(f"encoder {name!r} is neither timm:NAME, open_clip:NAME nor a run folder with a checkpoint.pt")
    return source, model, checkpoint or None


def data_sets(cfg: Config) -> tuple[str, dict[str, str]]:
    """(training set, {name: test set}) that the configuration names, as paths."""
    tests = dict(test.split("=", 1) for test in cfg.tests)
    if cfg.benchmark:
        training, own = benchmark(cfg.benchmark, cfg.root)
        return training, own | tests
    return cfg.data, tests


def reduced(labels: np.ndarray, cfg: Config) -> np.ndarray:
    """Rows that `train_fraction` keeps."""
    if cfg.train_fraction == 1:
        return np.arange(len(labels))
    rows = subset_per_class(labels, cfg.train_fraction, np.random.RandomState(cfg.seed))
    if not len(rows):
        raise ValueError(f"--train-fraction {cfg.train_fraction} keeps no image: every class has too few for it")
    return rows


def noisy(labels: np.ndarray, num_classes: int, cfg: Config) -> np.ndarray:
    """Labels after `label_noise`, the measured share of wrong ones printed."""
    if not cfg.label_noise:
        return labels
    flipped = flip_labels(labels, num_classes, cfg.label_noise, np.random.RandomState(cfg.seed), exclude_true=False)
    print(f"label noise {cfg.label_noise:g}: {100 * (flipped != labels).mean():.2f} % of {len(labels):,} labels wrong")
    return flipped


class Source:
    """A run's training features, batch by batch, and its test sets: from a features file, or by a frozen encoder."""

    def __init__(self, cfg: Config, process: run.Process, batch_size: int = 256):
        self.cfg, self.process, self.batch_size = cfg, process, batch_size  # batch_size: of what is encoded once
        self.broken: list[data.Broken] = []
        self.encoder, self.images, self.bank = None, None, None
        if cfg.features:
            self._from_file()
        else:
            self._from_images()
        self.two = cfg.method != "lp" or (cfg.views != "eval" and (self.bank is None or len(self.bank.features) > 1))

    def _from_file(self) -> None:
        sets: FeatureSets = read_features(self.cfg.features, seed=self.cfg.seed)
        rows = reduced(sets.train.labels.numpy(), self.cfg)
        labels = noisy(sets.train.labels.numpy()[rows], len(sets.classnames), self.cfg)
        self.bank = Bank(sets.train.features[:, rows], torch.from_numpy(np.asarray(labels, dtype=np.int64)))
        self.tests, self.classnames = sets.tests, sets.classnames
        self.dim, self.size = self.bank.features.shape[2], len(rows)
        self.fingerprint = data.fingerprint(self.bank.features.numpy().tobytes(), self.bank.labels.numpy().tobytes())

    def _from_images(self) -> None:
        cfg = self.cfg
        source, name, checkpoint = split_encoder(cfg.encoder, cfg.checkpoint)
        training, self.tests = data_sets(cfg)
        images = open_labelled(training)
        images = images.subset(reduced(images.labels, cfg))
        images = images.relabelled(noisy(images.labels, images.num_classes, cfg))
        images.strict = cfg.strict
        self.images, self.classnames, self.size = images, images.classnames, len(images)
        for test in self.tests.values():  # opened now, so that what is wrong with them shows before training
            open_test(test, self.classnames)
        self.encoder, self.dim, self.train_view, self.eval_view = load_encoder(source, name, checkpoint)
        self.encoder.to(self.process.device, memory_format=torch.channels_last)
        self.precision = run.resolve_precision(cfg.precision, self.process.device)
        self.fingerprint = images.fingerprint

    def encode_training_set(self) -> None:
        """What is encoded once: the evaluation view, or a bank of training views."""
        if self.images is None or (self.cfg.views != "eval" and not self.cfg.bank):
            return
        one = self.cfg.views == "eval"
        transform, views = (self.eval_view, 1) if one else (self.train_view, self.cfg.bank)
        if self.cfg.views == "train+rand":
            raise ValueError("--views train+rand draws new views in every step: leave --bank 0")
        self.bank = Bank(*self.encoded(self.images, transform, views, "training set"))

    def encoded(self, images: LabelledImages, transform: Callable, views: int, label: str) -> tuple[Tensor, Tensor]:
        return encode_set(
            self.encoder, images, transform, self.process, views=views, seed=self.cfg.seed, precision=self.precision,
            workers=self.cfg.workers, batch_size=self.batch_size, label=label,
        )  # fmt: skip

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This epoch's global batches of feats (n, D) and labels (n,) from batch `start` on, on the device."""
        cfg, process = self.cfg, self.process
        if self.bank is not None:
            for feats, labels in bank_batches(self.bank, cfg.batch_size, cfg.seed, epoch, start, self.two):
                yield feats.to(process.device), labels.to(process.device)
            return
        strong = with_rand_augment(self.train_view) if cfg.views == "train+rand" else self.train_view
        views = Views(self.images, TwoViews(self.train_view, strong), cfg.seed, epoch)
        size = cfg.batch_size // process.world_size
        order = data.batches(self.size, size, (cfg.seed, epoch), process.rank, process.world_size, start)
        loader = DataLoader(views, batch_sampler=order, num_workers=cfg.workers, collate_fn=collate_or_nothing)
        for images, labels, _ in data.watch(loader, self.broken):
            feats = torch.zeros(2, 0, self.dim, device=process.device)
            if len(labels):
                feats = encode(self.encoder, images, process.device, self.precision)
            feats, labels = gather_views(feats, labels.to(process.device), process)
            yield feats.flatten(0, 1), labels.repeat(2)

    def test_set(self, name: str) -> tuple[Tensor, Tensor, list[list[int]] | None]:
        """(features (M, D), labels (M,), groups of trained classes or None) of one test set."""
        if self.images is None:
            return *self.tests[name], None
        images, groups = open_test(self.tests[name], self.classnames)
        features, labels = self.encoded(images, self.eval_view, 1, name)
        return features[0], labels, groups


def collate_or_nothing(items: list) -> tuple[Tensor, Tensor, list]:
    """`collate`; a rank may have no row of a short last batch."""
    return collate(items) if items else (torch.zeros(2, 0), torch.zeros(0, dtype=torch.long), [])


@torch.no_grad()
def test_metrics(head: nn.Module, source: Source) -> dict[str, float]:
    """{"NAME/top1", "NAME/balanced"} of every test set, in per cent."""
    head.eval()
    results = {}
    for name in source.tests:
        features, labels, groups = source.test_set(name)
        logits = head.cpu()(features)
        logits = logits if groups is None else project_logits(logits, groups)
        results[f"{name}/top1"] = 100 * accuracy(logits, labels)
        results[f"{name}/balanced"] = 100 * balanced_accuracy(logits, labels)
    head.to(source.process.device)
    return results


# ---------------------------------------------------------------------------------------------------------- the script


def planned_encoder(cfg: Config | FinetuneConfig, default: tuple[str, str]) -> tuple[str, str]:
    """(source, name) for a dry run: a run folder of the embedded corpus need not be there, nor any be named."""
    if ":" in cfg.encoder or (Path(cfg.encoder) / "checkpoint.pt").is_file():
        return split_encoder(cfg.encoder, None)[:2]
    if not cfg.encoder:
        return default
    return ("open_clip", "ViT-emoji") if "clip" in Path(cfg.encoder).name else ("timm", "resnet_emoji")


def planned_samples(cfg: Config | FinetuneConfig) -> tuple[int, int, str]:
    """(training images, classes, remark) for a dry run, without data."""
    if cfg.benchmark in SIZES:
        return *SIZES[cfg.benchmark], f"{cfg.benchmark} as published"
    if cfg.data == EMOJI["data"]:
        return 2_681, 98, "embedded corpus"
    return *SIZES["cifar100"], "as many as in CIFAR-100, where data are not known yet"


def plan(cfg: Config | FinetuneConfig, samples: int, classes: int, remark: str, rows: int) -> None:
    """Print samples, batch, steps and learning rates."""
    steps = math.ceil(samples / cfg.batch_size)
    total = steps * cfg.epochs
    print(f"samples            {samples:,} an epoch, {cfg.epochs} epochs, {classes:,} classes ({remark})")
    print(f"batch              {cfg.batch_size} images, {rows} rows")
    print(f"steps              {total:,} ({steps:,} an epoch)")
    for step in sorted({0, min(cfg.warmup, total - 1), total // 2, total - 1}):
        print(f"learning rate      {cosine_lr(cfg.lr, cfg.warmup, total, step):.3e} at step {step:,}")


def dry_run(cfg: Config) -> None:
    """Print what a run would be: parameters, steps, learning rates, memory of the step."""
    frozen = 0
    if cfg.features:
        sets = read_features(cfg.features, seed=cfg.seed)
        dim, classes, remark = sets.train.features.shape[2], len(sets.classnames), cfg.features
        samples = len(reduced(sets.train.labels.numpy(), cfg))
    else:
        source, name = planned_encoder(cfg, ("timm", "resnet50"))
        encoder, dim, *_ = load_encoder(source, name)
        frozen = sum(p.numel() for p in encoder.parameters())
        samples, classes, remark = planned_samples(cfg)
        samples = int(samples * cfg.train_fraction)
    with torch.device("meta"):
        head = make_head(cfg, dim, classes)
    parameters = sum(p.numel() for p in head.parameters())
    rows = cfg.batch_size * (1 if cfg.method == "lp" and cfg.views == "eval" else 2)
    print("method             {}, weights mse {:g}, cov {:g}, svd {:g}".format(cfg.method, *cfg.weights))
    what = f"{frozen:,} frozen of {source}:{name}" if frozen else "features from a file"
    print(f"parameters         {parameters:,} tuned; {what}, D = {dim:,}")
    plan(cfg, samples, classes, remark, rows)
    hidden = int(dim * cfg.ratio) if cfg.method != "lp" else 0
    gib = (16 * parameters + 4 * rows * (6 * dim + 4 * hidden + 2 * classes)) / 2**30
    print(
        f"memory estimate    {gib:.2f} GiB of the head's step, {4 * frozen / 2**30:.2f} GiB of frozen weights, in fp32"
    )


def main(cfg: Config) -> Path | None:
    """Tune to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg) if process.main else None
    check(cfg, process.world_size)
    folder = Path(cfg.out)
    state = checkpoints.resume(folder, cfg) or {"epoch": 0, "batch": 0, "seconds": 0.0}
    if state["epoch"] >= cfg.epochs:
        if process.main:
            print(f"{folder} is finished ({cfg.epochs} epochs); nothing to do")
        return folder

    source = Source(cfg, process)
    if state.get("data", source.fingerprint) != source.fingerprint:
        raise ValueError(f"{folder} was trained on other data than there is now: choose another --out")
    torch.manual_seed(cfg.seed)
    head = make_head(cfg, source.dim, len(source.classnames)).to(process.device)
    optimizer = make_optimizer(head, cfg.lr, cfg.weight_decay)
    if "head" in state:
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
    source.encode_training_set()

    steps = math.ceil(source.size / cfg.batch_size)
    total, saved = steps * cfg.epochs, steps * state["epoch"] + state["batch"]
    log = run.RunLog(folder, cfg, process, step=saved)
    clock, commit = run.Stopwatch(state["seconds"]), run.commit()

    def save(epoch: int, batch: int) -> None:
        if process.main:
            about = {"dim": source.dim, "classnames": source.classnames, "data": source.fingerprint, "commit": commit}
            where = {"epoch": epoch, "batch": batch, "seconds": clock.read(), "config": dataclasses.asdict(cfg)}
            weights = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save_checkpoint(folder / "checkpoint.pt", weights | where | about)

    for epoch in range(state["epoch"], cfg.epochs):
        start = state["batch"] if epoch == state["epoch"] else 0
        label = f"{folder.name} {epoch + 1}/{cfg.epochs}"
        bar = run.progress(source.batches(epoch, start), steps - start, label, cfg.batch_size, process)
        for i, (feats, labels) in enumerate(bar, start):
            step = steps * epoch + i
            lr = optimizer.param_groups[0]["lr"] = cosine_lr(cfg.lr, cfg.warmup, total, step)
            parts = train_step(head, feats, labels, optimizer, cfg.weights, cfg.svd_k)
            if (step + 1) % cfg.log_every == 0 or step + 1 == total:
                log.write(step + 1, epoch=epoch, seconds=clock.read(), lr=lr, **parts)
                run.check_loss(parts["loss"], step)
            if step + 1 - saved >= cfg.save_every and step + 1 < total:
                save(epoch + (i + 1) // steps, (i + 1) % steps)
                saved = step + 1
        data.report_broken(source.broken, process, f"epoch {epoch + 1}")
    results = test_metrics(head, source)
    log.write(total, epoch=cfg.epochs - 1, seconds=clock.read(), **results)
    save(cfg.epochs, 0)
    log.close()
    if process.main:
        shown = ", ".join(f"{name} {value:.2f} %" for name, value in results.items() if name.endswith("top1"))
        print(f"{folder}: {shown or 'no test set was named'}")
    return folder


def command() -> Config:
    """Preset and overrides; without a preset, the overrides of plain NMTune."""
    if len(sys.argv) > 1 and sys.argv[1].startswith("--") and sys.argv[1] != "--help":
        return tyro.cli(Config)
    return tyro.extras.overridable_config_cli(PRESETS)


if __name__ == "__main__":
    cli.command_line(lambda: main(command()))
