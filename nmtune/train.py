"""Tune a head on frozen features: `python -m nmtune.train [PRESET] [--overrides]`, or just `--features FILE.npz`.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning@f249dce, `U:`. Three arms:
  lp      linear classifier on the features of the evaluation view            U:src/models/finetune.py:54-61,113-142
  mlp     NMTune's head, only cross-entropy                                   U:src/models/nml_tune.py, weights 0
  nmtune  the same with the three regularisers, the paper's contribution      U:src/models/nml_tune.py:106-182
mlp and nmtune get two training views of each image as in the authors' code, with `*-paper` the evaluation view.
The encoder is a frozen black box. With several processes, each encodes its share of a batch, features are gathered, and
all processes take the same step of the small head, as a single process would. Heads and losses are in model.py; views,
features files and batches in features.py; accuracy in eval.py.
"""

import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from nmtune.config import PRESETS, Config, TuningConfig, check, check_numbers
from nmtune.datasets import SIZES
from nmtune.encoders import load_encoder, zero_shot_weights
from nmtune.eval import accuracy, test_metrics
from nmtune.features import Bank, BankLoader, RunFeatures, hold_out, read_features, reduced, split_encoder
from nmtune.model import NMTuneHead, make_classifier, nmtune_loss, transformed
from shared import cli, data, pictures, run
from shared.errors import UserError

RATES, DECAYS = (1e-4, 1e-3, 1e-2, 1e-1), (1e-4, 1e-2, 1e-1, 1.0)  # candidates of `choose`

# ------------------------------------------------------------------------------------------------------------ one step


def cosine_lr(base: float, warmup: int, total: int, step: int) -> float:
    """Learning rate at `step`, set before the step is taken. U:src/models/utils.py:15-32.

    base (t+1)/W in the W steps of warm-up, then base (1 + cos(pi (t-W)/(T-W)))/2; in the last step it is not quite 0.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * base


def learning_rate(cfg: TuningConfig, total: int, step: int) -> float:
    """Learning rate at `step` of `total`: `cosine_lr`, or, after the warm-up, a straight line to 0 (app. B.3)."""
    if cfg.schedule == "linear" and step >= cfg.warmup:
        return cfg.lr * (total - step) / (total - cfg.warmup)
    return cosine_lr(cfg.lr, cfg.warmup, total, step)


def make_head(cfg: Config, dim: int, num_classes: int) -> nn.Module:
    """nn.Linear for lp, NMTuneHead for mlp and nmtune, initialised from torch's random numbers."""
    if cfg.method == "lp":
        return make_classifier(dim, num_classes)
    return NMTuneHead(dim, num_classes, cfg.ratio, cfg.layers, cfg.residual, cfg.scale_init, cfg.batch_norm)


def make_optimizer(head: nn.Module | list[nn.Parameter], lr: float, wd: float) -> torch.optim.Optimizer:
    """AdamW with decay on *all* trained parameters, including BatchNorm's, biases and the residual's scale."""
    parameters = head.parameters() if isinstance(head, nn.Module) else head
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=wd, fused=True)


def train_step(
    head: nn.Module,
    feats: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    weights: tuple[float, float, float] = (1.0, 0.04, 0.001),
    k: int = 5,
    views: int = 2,
) -> dict[str, Tensor]:
    """Take one optimizer step on feats (n, D), rows [view w; view s] or one view, and labels (n,).

    Returns {"loss", "ce", ...}, detached. For a linear head the loss is cross-entropy alone.
    """
    head.train()
    z, logits = transformed(head, feats)
    loss, terms = nmtune_loss(logits, labels, z, feats, weights if z is not feats else (0.0, 0.0, 0.0), k, views)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}


def tuning_steps(
    cfg: Config,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    total: int,
    views: int,
    start: int = 0,
) -> Iterator[tuple[int, dict[str, Tensor | float]]]:
    """The tuning loop: a step on each batch (feats (n, D), labels (n,)), from step `start` of `total` on.

    Yields (steps done, {"lr", "loss", "ce", ...}). views: views of each image in a batch.
    """
    for step, (feats, labels) in enumerate(batches, start):
        weights = cfg.loss_weights(feats.shape[1])
        lr = optimizer.param_groups[0]["lr"] = learning_rate(cfg, total, step)
        yield step + 1, {"lr": lr} | train_step(head, feats, labels, optimizer, weights, cfg.svd_k, views)


def tune(cfg: Config, head: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], views: int) -> list[dict]:
    """Tune `head` in place on features in memory. Returns what `tuning_steps` yields for each step.

    Each pass over `loader`, which has a length, yields one epoch's batches.
    """
    optimizer = make_optimizer(head, cfg.lr, cfg.weight_decay)
    batches = (batch for _ in range(cfg.epochs) for batch in loader)
    return [found for _, found in tuning_steps(cfg, head, optimizer, batches, len(loader) * cfg.epochs, views)]


def tuned_head(cfg: Config, bank: Bank, num_classes: int, views: int, device: torch.device) -> nn.Module:
    """A new head, tuned on features in memory with the settings and seed of `cfg`, as by `main`.

    views: views of each image in a batch.
    """
    torch.manual_seed(cfg.seed)
    head = make_head(cfg, bank.features.shape[2], num_classes).to(device)
    bank = Bank(bank.features.to(device), bank.labels.to(device))
    tune(cfg, head, BankLoader(bank, cfg.batch_size, cfg.seed, views == 2), views)
    return head


@torch.no_grad()
def head_metrics(head: nn.Module, source: RunFeatures) -> dict[str, float]:
    """`test_metrics` of a head on the test sets of a run."""
    head = head.cpu().eval()

    def test_set(name: str) -> tuple:
        features, labels, groups = source.test_set(name)
        return head(features), labels, groups

    return test_metrics(source.tests, test_set)


def mean_over_heads(cfg: Config, head: nn.Module, source: RunFeatures) -> dict[str, float]:
    """Means of `head_metrics` over `head` and, with --heads, others that are tuned with the seeds after the run's."""
    process, found = source.process, [head_metrics(head, source)]
    for seed in run.progress(range(cfg.seed + 1, cfg.seed + cfg.heads), cfg.heads - 1, "further heads", 1, process):
        of_seed = dataclasses.replace(cfg, seed=seed)
        other = tuned_head(of_seed, source.bank, len(source.classnames), source.views, process.device)
        found.append(head_metrics(other, source))
    return {metric: pictures.mean([each[metric] for each in found]) for metric in found[0]}


def choose(cfg: Config, source: RunFeatures) -> dict[str, float]:
    """{"lr", "weight_decay"} with the best top-1 on a held-out fifth of every class; ties go to the lower
    cross-entropy. Selects first the learning rate, then the decay."""
    device = source.process.device
    features, labels = source.bank.features.to(device), source.bank.labels.to(device)
    kept, rest = hold_out(labels.cpu().numpy(), cfg.seed)
    if not len(kept):
        raise UserError("--select holds out a fifth of every class, but every class is too small for that")
    smaller = Bank(features[:, kept], labels[kept])

    def score(tried: Config) -> tuple[float, float]:
        try:
            head = tuned_head(tried, smaller, len(source.classnames), source.views, device)
        except (torch.linalg.LinAlgError, ValueError):  # features have diverged
            return 0.0, -math.inf
        with torch.no_grad():
            logits = head.eval()(features[0, rest])
        loss = torch.nn.functional.cross_entropy(logits, labels[rest]).item()
        return accuracy(logits, labels[rest]), -loss if math.isfinite(loss) else -math.inf

    if source.process.main:
        print(f"--select: {len(RATES) + len(DECAYS)} heads, {cfg.epochs} epochs each, on {len(kept):,} samples")
    for field, values in (("lr", RATES), ("weight_decay", DECAYS)):
        tries = run.progress(values, len(values), f"--select {field}", 1, source.process)
        found = {value: score(dataclasses.replace(cfg, **{field: value})) for value in tries}
        best = max(found, key=found.__getitem__)
        cfg = dataclasses.replace(cfg, **{field: best})
        if source.process.main:
            tried = ", ".join(f"{value:g} {100 * top1:.1f} %" for value, (top1, _) in found.items())
            print(f"--{field.replace('_', '-')} {best:g} was chosen on {len(rest):,} held-out samples, top-1: {tried}")
    return {"lr": cfg.lr, "weight_decay": cfg.weight_decay}


# ---------------------------------------------------------------------------------------------------------- the script


def planned_encoder(cfg: TuningConfig, default: tuple[str, str]) -> tuple[str, str]:
    """(source, name) of the encoder for a dry run; `default` if none is named."""
    return split_encoder(cfg.encoder, None)[:2] if cfg.encoder else default


def planned_samples(cfg: TuningConfig) -> tuple[int, int, str]:
    """(training images, classes, remark) for a dry run, without data."""
    if cfg.benchmark in SIZES:
        return *SIZES[cfg.benchmark], f"{cfg.benchmark} as published"
    return *SIZES["cifar100"], "as in CIFAR-100, since a dry run reads no data"


def plan_rows(cfg: TuningConfig, samples: int, classes: int, remark: str, views: int) -> list[tuple[str, str]]:
    """Samples, batch, steps and learning rates of a dry run; views: training views of an image in a batch."""
    steps = math.ceil(samples / cfg.batch_size)
    total = steps * cfg.epochs
    return [
        ("samples", f"{samples:,} an epoch, {cfg.epochs} epochs, {classes:,} classes ({remark})"),
        ("batch", f"{cfg.batch_size} images, {cfg.batch_size * views} feature vectors"),
        cli.step_row(total, steps),
        *cli.rate_rows(lambda step: f"{learning_rate(cfg, total, step):.3e}", cfg.warmup, total),
    ]


def dry_run(cfg: Config) -> None:
    """Print the plan of a run: parameters, steps, learning rates, memory of the step."""
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
    views = 1 if cfg.views == "eval" else 2
    hidden = int(dim * cfg.ratio) if cfg.method != "lp" else 0
    gib = (16 * parameters + 4 * cfg.batch_size * views * (6 * dim + 4 * hidden + 2 * classes)) / 2**30
    heads = f"{cfg.heads} heads, " if cfg.heads > 1 else ""
    what = f"{frozen:,} frozen of {source}:{name}" if frozen else "features from a file"
    memory = f"{gib:.2f} GiB of the head's step, {4 * frozen / 2**30:.2f} GiB of frozen weights, in fp32"
    cli.show_plan(
        [
            ("method", "{}{}, weights mse {:g}, cov {:g}, svd {:g}".format(heads, cfg.method, *cfg.loss_weights(dim))),
            ("parameters", f"{parameters:,} tuned; {what}, D = {dim:,}"),
            *plan_rows(cfg, samples, classes, remark, views),
            ("memory estimate", memory),
        ]
    )


def main(cfg: Config) -> Path | None:
    """Tune to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        check_numbers(cfg, process.world_size)
        return dry_run(cfg) if process.main else None
    check(cfg, process.world_size)
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    if folder.finished(epoch=cfg.epochs):
        return folder.path

    # Features, head, optimizer; the last two from the checkpoint if there is one
    source = RunFeatures(cfg, process)
    folder.check_same("data", source.fingerprint, "on other data or with another encoder than there are now")
    chosen = folder.state.get("chosen", {})
    if cfg.select:
        source.encode_training_set()
        chosen = chosen or choose(cfg, source)
        cfg = dataclasses.replace(cfg, **chosen)
    torch.manual_seed(cfg.seed)
    head = make_head(cfg, source.dim, len(source.classnames)).to(process.device)
    if cfg.zero_shot and not folder.resumed:
        head.weight.data.copy_(zero_shot_weights(*source.model[1:], source.classnames))
    optimizer = make_optimizer(head, cfg.lr, cfg.weight_decay)
    folder.restore(head=head, optimizer=optimizer)
    source.encode_training_set()

    steps, epochs = math.ceil(source.size / cfg.batch_size), range(folder.state["epoch"], cfg.epochs)
    total, start = steps * cfg.epochs, steps * folder.state["epoch"] + folder.state["batch"]
    about = {"dim": source.dim, "classnames": source.classnames, "data": source.fingerprint, "chosen": chosen}
    folder.start(start, total, source.size, **about)
    if cfg.select and not folder.resumed:
        folder.save(0, epoch=0, batch=0)  # a run that is killed later does not select again
    batches = source.batches(epochs, folder.state["batch"])
    batches = run.progress(batches, total - start, folder.path.name, cfg.batch_size, process)
    for done, found in tuning_steps(cfg, head, optimizer, batches, total, source.views, start):
        if done % cfg.log_every == 0 or done == total:
            folder.log(done, epoch=(done - 1) // steps, **found)
        if folder.due(done) and done < total:
            folder.save(done, epoch=done // steps, batch=done % steps)
        if done % steps == 0:
            data.report_broken(source.broken, process, f"epoch {done // steps}")
    folder.save(total, epoch=cfg.epochs - 1, batch=steps)  # a resumed run then only tests
    results = mean_over_heads(cfg, head, source)
    folder.log(total, epoch=cfg.epochs - 1, **results)
    folder.save(total, epoch=cfg.epochs, batch=0)
    folder.close("")
    if process.main:
        shown = ", ".join(f"{name} {value:.2f} %" for name, value in results.items() if name.endswith("top1"))
        print(f"{folder.path}: {shown or 'no test set was named'}")
    return folder.path


def command() -> Config:
    """The settings of the command line: a preset and overrides. Without a preset, NMTune's; with a features file also
    --select, unless learning rate or weight decay is given."""
    if len(sys.argv) > 1 and sys.argv[1].startswith("--") and sys.argv[1] != "--help":
        flags = {word.partition("=")[0].replace("_", "-") for word in sys.argv[1:]}
        own = "--features" in flags and not flags & {"--lr", "--weight-decay"}
        return tyro.cli(Config, default=Config(select=own))
    return cli.preset_cli(PRESETS)


if __name__ == "__main__":
    cli.command_line(lambda: main(command()))
