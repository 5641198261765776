"""NMTune's speed against the authors' code: `python -m studies.bench.nmtune [--upstream PATH]`.

Ours and theirs take turns on the same inputs, each side at its best thread setting. Prints a Markdown table of medians
and their ratio theirs/ours with its extremes over the repetitions (above 1: ours is faster). `--upstream` is a clone of
Hhhhhhao/Noisy-Model-Learning@f249dce; without it our regularisers are compared with their textbook definitions.
"""

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch

from nmtune import config, encoders, gram_losses, model, pretrain, train
from studies import nmtune as study
from studies import nmtune_encoders as encoder_study
from studies.bench import CPU, arguments, at_least, bench, print_row, race, step_row
from studies.bench.baselines import baseline_rows
from tests.adapters import nmtune as parity

OURS = {"cov": gram_losses.covariance_loss, "svd": gram_losses.dominant_singular_value_loss}


def textbook_terms() -> dict[str, Callable]:
    def cov(z):
        c = torch.cov(z.T)
        return (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]

    def svd(z):
        s = torch.linalg.svdvals(z)
        return -(s[:5] / s.sum()).mean()

    return {"cov": cov, "svd": svd}


def their_terms(up: SimpleNamespace, feats: torch.Tensor) -> dict[str, Callable]:
    """Their statements of L_COV and L_SVD, which do not use the encoder's features `feats`."""
    terms = parity.Losses().their(up)
    return {name: lambda z, name=name: terms[name](z, feats) for name in OURS}


def value_and_gradient(term: Callable, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.clone().requires_grad_()
    value = term(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


def ten_times(term: Callable, z: torch.Tensor) -> None:
    for _ in range(10):
        value_and_gradient(term, z)


def terms(theirs: dict[str, Callable], n: int, dim: int, repetitions: int) -> None:
    """Covariance and singular-value regulariser, forward and backward."""
    spread = torch.randn(n, dim) * torch.linspace(0.2, 2, dim)
    skewed = spread + 5 * torch.rand(dim)  # features with a large mean: L_SVD goes through fp64
    for name, z, what, target in (
        ("cov", spread, "", ">= 11"),
        ("svd", spread, "", ">= 5"),
        ("svd", skewed, " large mean,", ""),
    ):
        (value, gradient), (own_value, own_gradient) = (
            value_and_gradient(term, z) for term in (theirs[name], OURS[name])
        )
        gap = (gradient - own_gradient).abs().max().item()
        calls = [lambda term=side[name], z=z: ten_times(term, z) for side in (OURS, theirs)]
        note = f"values within {(value - own_value).abs().item():.0e}, gradients within {gap:.0e}"
        title = f"L_{name.upper()}, n={n}, D={dim},{what} forward and backward"
        print_row(*race(title, *calls, repetitions, per=10), target, note)


class Clocked(list):
    """Batches; records the time of each request for one."""

    def __iter__(self):
        self.times = []
        for item in super().__iter__():
            self.times.append(time.perf_counter())
            yield item
        self.times.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]  # the first step warms up


def tuning_step(up: SimpleNamespace, dim: int, classes: int, steps: int, repetitions: int) -> None:
    """A whole step of nml_tune (64 images, two views each) on a frozen identity encoder against ours, same weights."""
    loader = Clocked(
        (tuple(torch.randn(2, 64, dim)), torch.randint(classes, (64,))) for _ in range(steps)
    )  # ((features of view w, of view s), labels)
    head = model.NMTuneHead(dim, classes)
    start, seconds = copy.deepcopy(head.state_dict()), []
    cfg = config.Config(epochs=1, lr=parity.ARGS["lr"], weight_decay=parity.ARGS["wd"])
    for _ in range(repetitions):
        head.load_state_dict(start)
        train.tune(cfg, head, parity.Stacked(loader), views=2)
        own = statistics.median(loader.steps())
        with parity.on_cpu():
            parity.their_run(up, "nml_tune", loader, start, parity.Toy(dim), classes, epochs=1, batch_size=64)
        seconds.append((own, statistics.median(loader.steps())))
    print_row(f"NMTune step, batch 64 x 2 views, D={dim}, {classes} classes", seconds, ">= 1.7")


def clip_step(repetitions: int) -> None:
    """Forward and backward pass of the small CLIP's pre-training, against open_clip's model and loss."""
    cfg = dataclasses.replace(config.SMALL_CLIP, model="ViT-emoji", precision="bf16")
    network, *_ = encoders.create_model(cfg)
    images, tokens = torch.randn(128, 3, 40, 40), torch.randint(1, 49406, (128, 24))
    tokens[:, 12] = 49407
    theirs = open_clip.create_model("ViT-emoji", output_dict=True)
    loss = open_clip.ClipLoss(cache_labels=True)

    def ours():
        with torch.autocast("cpu", torch.bfloat16):
            output = network(images, tokens)
        pretrain.losses(cfg, output, tokens, torch.zeros(128, dtype=torch.bool))["loss"].backward()

    def open_clips():
        with torch.autocast("cpu", torch.bfloat16):
            out = theirs(images, tokens)
            loss(**out).backward()

    name = "CLIP step without optimizer, ViT-emoji, batch 128, bf16: open_clip"
    step_row(name, 128, "bf16", ours, open_clips, repetitions, target=">= 1")


def to_the_floor(seeds: int) -> None:
    """Seconds on one core until a linear probe on the encoder without label noise is better than one on raw pixels."""

    def probe(folder: str) -> float:
        bank, classes, tests = encoder_study.encoded(Path(folder), study.TASK, CPU)
        return encoder_study.head_metrics(encoder_study.tuned("lp", 0, bank, classes), tests)["top1"]["ood"]

    baseline_rows(
        study.STUDY, "sup-00", config.PRETRAIN_PRESETS, pretrain.main, seeds,
        "linear probe for other names, unseen style, ResNet from scratch",
        {"the probe on raw pixels": "the paper's linear probe on raw pixels"}, "lp/ood", probe, save_every=18,
    )  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    if options.upstream is None:
        terms(textbook_terms(), 128, 2048, options.repetitions)
    else:
        up = parity.load(options.upstream)
        terms(their_terms(up, torch.randn(128, 2048)), 128, 2048, options.repetitions)
        tuning_step(up, 2048, 100, options.steps, min(options.repetitions, 2))
        tuning_step(up, 1024, 100, options.steps, min(options.repetitions, 2))
    clip_step(options.repetitions)


def main() -> None:
    parser = arguments(__doc__, 3, ("Hhhhhhao/Noisy-Model-Learning", "f249dce", "src/models/nml_tune.py"))
    parser.add_argument("--steps", type=at_least(3), default=6, help="tuning steps a repetition")
    left_out = "the authors' regularisers and tuning step"
    bench(measure, parser.parse_args(), left_out, to_the_floor=to_the_floor)


if __name__ == "__main__":
    main()
