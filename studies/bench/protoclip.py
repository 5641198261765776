"""ProtoCLIP's speed against the authors' code and open_clip: `python -m studies.bench.protoclip [--upstream PATH]`.

Ours and theirs take turns on the same inputs, each side at its best thread setting. Prints a Markdown table of medians
and their ratio theirs/ours with its extremes over the repetitions (above 1: ours is faster). `--upstream` is a clone of
megvii-research/protoclip@fde1933; without it only open_clip's training step is compared.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip_train.scheduler import cosine_lr

from protoclip import model, train
from shared.clip import image_side, trimmed
from studies import protoclip as study
from studies.bench import CPU, arguments, at_least, attention, bench, print_row, race, step_row
from studies.bench.baselines import floor_rows, trained
from studies.bench.open_clip_loop import open_clip_loop
from studies.harness import floors
from tests.adapters import protoclip as parity


def clustered(n: int, k: int, dim: int) -> torch.Tensor:
    """(n, dim) unit rows around k directions."""
    centres = F.normalize(torch.randn(k, dim), dim=-1)
    return F.normalize(centres[torch.randint(0, k, (n,))] + 0.6 * torch.randn(n, dim) / dim**0.5, dim=-1)


# ------------------------------------------------------------------------------------------------------- prototypes


def back_translation(up, n: int, k: int, repetitions: int) -> None:
    """The four calls of prototypical back translation in an episode."""
    image, text = F.normalize(torch.randn(n, 128), dim=-1), F.normalize(torch.randn(n, 128), dim=-1)
    labels = [torch.randint(0, k, (n,)) for _ in range(3)]
    jobs = [(labels[0], image), (labels[1], text), (labels[2], image), (labels[2], text)]
    clustering = up.clustering.Clustering(SimpleNamespace(episode_size=1, projection_dim=128, k=1))

    def ours():
        return [model.prototypical_back_translation(features, teacher, k) for teacher, features in jobs]

    def theirs():
        return [clustering.PBT(k, teacher, features) for teacher, features in jobs]

    gap = max((a - b).abs().max().item() for a, b in zip(ours(), theirs(), strict=True))
    name = f"back translation, four calls, N={n:,}, K={k:,}, P=128"
    print_row(*race(name, ours, theirs, repetitions), ">= 20", f"largest difference {gap:.0e}")


def prototype_stage(up, n: int, k: int, repetitions: int) -> None:
    """K-means of image, text and teacher features and back translation, from cached features."""
    image, text, external = clustered(n, k, 128), clustered(n, k, 128), 0.3 * clustered(n, k, 64)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "teacher.npy"
        np.save(file, external.numpy())
        everything = torch.arange(n)

        kmeans, in_kmeans = model.kmeans, []

        def timed(*inputs, **settings):
            start = time.perf_counter()
            found = kmeans(*inputs, **settings)
            in_kmeans.append(time.perf_counter() - start)
            return found

        def ours():
            with mock.patch.object(model, "kmeans", timed):
                results["ours"] = model.build_prototypes(image, text, k, external)

        def theirs():
            results["theirs"] = parity.their_prototypes(up, image, text, file, everything, k=k)

        name, seconds = race(f"prototype stage, N={n:,}, K={k:,}, niter 20, nredo 3", ours, theirs, repetitions)
        share = sum(in_kmeans[-3:]) / seconds[-1][0]  # of the last repetition: three calls
    same, gap = True, 0.0
    for own, other in parity.PROTOTYPES.items():
        a, b = getattr(results["ours"], own), getattr(results["theirs"], other)
        same &= torch.equal(a, b) or "labels" not in own
        gap = max(gap, 0.0 if "labels" in own else (a - b).abs().max().item())
    note = f"labels {'equal' if same else 'DIFFER'}, prototypes within {gap:.0e}; K-means {share:.0%} of ours"
    print_row(name, seconds, "> 1", note)


# ---------------------------------------------------------------------------------------------------- training steps


def batches(size: int, side: int, steps: int, samples: int = 2048) -> list:
    """(index, images, tokens) like those of the emoji presets' loader, with images of `side` pixels."""
    lengths = torch.randint(4, 24, (size, 1))
    position = torch.arange(24)
    found = []
    for _ in range(steps):
        tokens = torch.randint(1, 49406, (size, 24)) * (position < lengths)
        tokens[position == lengths.clamp(max=23)] = 49407
        images = torch.randn(size, 3, side, side).contiguous(memory_format=torch.channels_last)
        found.append((torch.randint(0, samples, (size,)), images, tokens))
    return found


def our_trainer(cfg: train.Config, prototypes=None) -> tuple[torch.nn.Module, Callable]:
    """(model, function that trains it on one pass over batches) with the optimizer of train.main."""
    network = model.create_model(cfg.model, cfg.heads, cfg.hidden_dim, cfg.projection_dim)
    groups = train.parameter_groups(network, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, **cfg.adamw, fused=True)

    weights = train.loss_weights(cfg, 1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def one_pass(loader):
        network.train()
        for step, (rows, images, tokens) in enumerate(loader, cfg.steps_per_episode):
            train.set_learning_rates(optimizer, cfg, step)
            batch = rows, images, trimmed(tokens, network, CPU.device)
            train.train_step(network, batch, prototypes, weights, optimizer, scaler, cfg)

    return network, one_pass


def clip_step(name: str, size: int, precision: str, repetitions: int, steps: int) -> None:
    """A CLIP step on batches of `size` against open_clip_train's on the same towers, from the same weights."""
    cfg = dataclasses.replace(train.PRESETS["emoji-clip"][1], model=name, batch_size=size, precision=precision)
    network, one_pass = our_trainer(cfg)
    towers = open_clip.create_model(name, output_dict=True)
    towers.load_state_dict(network.state_dict())
    named = list(towers.named_parameters())
    gains = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    rest = [p for n, p in named if not any(p is gain for gain in gains)]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": cfg.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, **cfg.adamw)
    scheduler = cosine_lr(optimizer, cfg.lr, cfg.warmup, cfg.steps_per_episode * cfg.episodes)
    loader = batches(size, image_side(network), steps)
    theirs = [(images.contiguous(), tokens) for _, images, tokens in loader]
    their_loop = open_clip_loop(towers, theirs, optimizer, scheduler, precision, cfg.max_grad_norm)

    def open_clips(flash):
        with attention(flash):
            their_loop()

    def ours():
        with attention(False):
            one_pass(loader)

    row = f"CLIP step, {name}, batch {size}, {precision}: open_clip"
    for flash, what in ((False, "with our attention setting"), (True, "as it comes")):
        step_row(f"{row} {what}", size, precision, ours, partial(open_clips, flash), repetitions, steps, ">= 1")


def protoclip_step(up, repetitions: int, steps: int) -> None:
    """The ProtoCLIP arm's step against the authors' train_one_epoch, fp32, same weights and prototypes."""
    sizes = {"model": "ViT-emoji", "batch_size": 128, "episode_size": 2_048}
    cfg = dataclasses.replace(train.PRESETS["emoji"][1], **sizes, precision="fp32", infonce_warmup=0)
    n, k, p = cfg.episode_size, cfg.k, cfg.projection_dim
    args = SimpleNamespace(**{
        **parity.TRAIN, "projection_hidden_dim": cfg.hidden_dim, "projection_dim": p, "episode_size": n, "k": k,
        "batch_size": cfg.batch_size, "lr": cfg.lr, "wd": cfg.weight_decay, "eps": cfg.adamw["eps"],
        "max_grad_norm": cfg.max_grad_norm,
    })  # fmt: skip
    image, text, external = clustered(n, k, p), clustered(n, k, p), clustered(n, k, 64)
    network, one_pass = our_trainer(cfg, model.build_prototypes(image, text, k, external))
    config = open_clip.get_model_config(cfg.model)
    towers = up.model.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], args=args)
    towers.load_state_dict(network.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/teacher.npy", external.numpy())
        flags = {name: value for name, value in vars(args).items() if name != "external_teacher"}
        clustering = parity.their_prototypes(up, image, text, f"{folder}/teacher.npy", torch.arange(n), **flags)
    optimizer = parity.optimizer_groups(up, towers, args)
    scheduler = up.scheduler.protoclip_cosine_lr(optimizer, cfg.lr, cfg.lr, cfg.warmup, 640, 640, 0, 640)
    loader = batches(cfg.batch_size, image_side(network), steps, n)
    loaders = parity.loaders_of(loader, n)

    def theirs(flash):
        with attention(flash):
            up.train.train_one_epoch(towers, loaders, 1, optimizer, None, scheduler, clustering, args)

    def ours():
        with attention(False):
            one_pass(loader)

    name = f"ProtoCLIP step, {cfg.model}, batch {cfg.batch_size}, K={k}, fp32"
    for flash, what in ((False, "with our attention setting"), (True, "as it comes")):
        step_row(f"{name}: theirs {what}", cfg.batch_size, "fp32", ours, partial(theirs, flash), repetitions, steps)


# --------------------------------------------------------------------------------------------- seconds to the floor


def to_the_floor(seeds: int) -> None:
    """Seconds on one core, without evaluation, until CLIP is above nearest-neighbour floors and higher goals."""
    unseen = "data/emoji/eval/bare_names_ood"
    settings = {"eval_set": unseen, "eval_every": 1}  # episodes
    runs = [trained(study.STUDY, "clip", train.PRESETS, train.main, seed, **settings) for seed in range(seeds)]
    pixels = floors.nearest_neighbour([unseen])["bare_names_ood/top1"]
    goals = {"the pixel floor": (pixels, "<= 20 s"), "40 %": (40.0, "<= 30 s"), "50 %": (50.0, "<= 60 s")}
    floor_rows("names of the unseen style, ConvNet-emoji from scratch", goals, runs)


# ------------------------------------------------------------------------------------------------------------ script


def measure(options: argparse.Namespace) -> None:
    if options.upstream is not None:
        up = parity.load(options.upstream)
        with parity.on_cpu():
            back_translation(up, options.samples, options.prototypes, options.repetitions)
            if options.stage_repetitions:
                prototype_stage(up, options.samples, options.prototypes, options.stage_repetitions)
    for name, size in (("ViT-emoji", 128), ("ConvNet-emoji", 512)):
        for precision in ("bf16", "fp32"):
            clip_step(name, size, precision, options.repetitions, options.steps)
    if options.upstream is not None:
        with parity.on_cpu():
            protoclip_step(up, options.repetitions, options.steps)


def main() -> None:
    parser = arguments(__doc__, 3, ("megvii-research/protoclip", "fde1933", "src/training"))
    parser.add_argument("--steps", type=at_least(1), default=4, help="training steps a repetition")
    parser.add_argument("--samples", type=int, default=40_000, help="N of back translation and of the prototype stage")
    parser.add_argument("--prototypes", type=int, default=4_000, help="K of both")
    parser.add_argument(
        "--stage-repetitions", type=at_least(0), default=2, help="of the prototype stage; 0 leaves it out"
    )
    left_out = "back translation, prototype stage, ProtoCLIP step against authors'"
    bench(measure, parser.parse_args(), left_out, to_the_floor=to_the_floor)


if __name__ == "__main__":
    main()
